"From files to probabilities: a real series, broken files, a submission that is always complete."
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rsna_helpers import inference
from rsna_helpers.models import load_model


def test_real_series_gets_28_times_6_probabilities(trained, samples):
    run, folder = trained
    p, index = inference.predict(run, samples/"ge_head", folder, with_index=True)
    assert p.shape == (28, 6) and list(p.columns) == list(run.task.labels) and p.attrs["filled"] == {}
    assert np.isfinite(p).all().all() and ((p > 0) & (p < 1)).all().all()
    assert index.study.nunique() == 1 and sorted(index.position) == list(range(28))


def test_any_file_of_the_samples_gets_a_row(trained, samples):
    run, folder = trained
    files = sorted((samples/"transfer_syntaxes").iterdir())
    p = inference.predict(run, files, folder)
    assert len(p) == len(files) and not p.isna().any().any()
    assert 0 < len(p.attrs["filled"]) < len(files)


def test_order_of_files_does_not_matter(trained):
    run, folder = trained
    files = run.task.list_images(run.raw, "test").path.tolist()[:20]
    a, b = inference.predict(run, files, folder), inference.predict(run, files[::-1], folder)
    assert a.index.tolist() == b.index.tolist()[::-1]
    pd.testing.assert_frame_equal(a, b.loc[a.index], atol=1e-4)


def test_one_file_and_exported_pictures(trained, tmp_path):
    import cv2
    run, folder = trained
    index = run.truth.query("split == 'test' and quirk == ''"); name = index.index[len(index)//2]
    dcm = run.raw/"stage_2_test"/f"{name}.dcm"
    hu, _ = run.task.read_image(dcm)
    cv2.imwrite(str(tmp_path/"slice.png"), np.clip(hu/80*255, 0, 255).astype(np.uint8))
    p = inference.predict(run, dcm, folder); q = inference.predict(run, tmp_path, folder)
    assert p.shape == q.shape == (1, 6) and q.attrs["filled"] == {}


def test_what_cannot_be_read_is_named_and_filled_with_the_prior(trained, tmp_path, caplog):
    run, folder = trained
    good = run.task.list_images(run.raw, "test").path[3]; shutil.copy(good, tmp_path)
    (tmp_path/"empty.dcm").touch(); (tmp_path/"letter.dcm").write_text("Dear colleague")
    with caplog.at_level(logging.WARNING, "rsna_helpers"): p = inference.predict(run, tmp_path, folder)
    prior = load_model(folder)[2]["prior"]
    assert len(p) == 3 and set(p.attrs["filled"]) == {"empty", "letter"}
    for k in ("empty", "letter"): assert p.loc[k].to_dict() == pytest.approx(prior) and k in caplog.text


def test_a_folder_of_nothing_is_an_error(trained, tmp_path):
    run, folder = trained
    with pytest.raises(FileNotFoundError, match="holds no"): inference.predict(run, tmp_path, folder)
    (tmp_path/"notes.txt").write_text("not an image")
    with pytest.raises(FileNotFoundError, match="no image files"): inference.predict(run, tmp_path, folder)
    with pytest.raises(FileNotFoundError, match="nowhere"): inference.predict(run, tmp_path/"nowhere", folder)


def test_submission_is_complete_and_named(trained):
    run, folder = trained
    report = inference.submit(run, folder)
    p = run.task.check_submission(report["path"], run.raw)
    assert p.index.tolist() == run.task.expected_ids(run.raw).tolist()
    cut = run.truth.query("split == 'test' and quirk == 'truncated'").index
    assert set(report["filled"]) == set(cut) and len(cut) == 1
    held = report["held_out"]
    in_training = run.truth.query("split == 'train'").patient.unique()
    assert held["images"] == (~run.truth.query("split == 'test'").patient.isin(in_training)).sum()
    assert {"model", "constant (training prevalence)", "header fields", "brain area and position", "blurred thumbnail"} == set(held["scores"])


def test_an_id_without_a_file_is_filled_too():
    p = pd.DataFrame([[.2, .3]], index=["a"], columns=["x", "any"]); errors = pd.Series({"a": None, "b": "cut off"})
    out = inference.fill_in(p, errors, ["b", "c", "a"], dict(x=.1, any=.4))
    assert out.loc["a"].tolist() == [.2, .3] and out.loc["c"].tolist() == [.1, .4]
    assert out.attrs["filled"] == {"b": "cut off", "c": "there is no such image"}


def test_pictures_in_a_folder_are_not_taken_for_one_patient(trained, tmp_path):
    "Each exported picture is cut to its own head; white is bone."
    from PIL import Image
    run, folder = trained; index = run.truth.query("split == 'test' and quirk == ''").index[:6]
    hu = [run.task.read_image(run.raw/"stage_2_test"/f"{i}.dcm")[0] for i in index]
    for k, h in enumerate(hu):
        grey = np.uint8(np.clip(h, 0, 80)/80*255); Image.fromarray(np.roll(grey, 40*(k % 2), 1)).save(tmp_path/f"{k}.png")
    p, rows = inference.predict(run, tmp_path, folder, with_index=True)
    assert rows.study.nunique() == 6 and (rows.n_slices == 1).all() and p.notna().all().all() and not p.attrs["filled"]
    assert p.index.tolist() == [str(k) for k in range(6)]


# -- streaming, budget, resuming, several models --

@pytest.fixture
def fresh(trained, tmp_path):
    "The trained run with an empty data folder: the test images have to be decoded."
    run, folder = trained
    return replace(run, data=tmp_path/"data"), folder


@pytest.fixture(scope="module")
def undisturbed(trained): return inference.predict(trained[0], folder=trained[1], with_index=True)


def parts(run): return sorted((run.data/"predictions").rglob("part_*.parquet"))


def test_streamed_from_the_files_is_what_the_stacks_give(fresh, undisturbed):
    run, folder = fresh; p, index = inference.predict(run, folder=folder, with_index=True)
    pd.testing.assert_frame_equal(p, undisturbed[0]); assert p.attrs == undisturbed[0].attrs
    assert index.position.tolist() == undisturbed[1].position.tolist() and index.notes.tolist() == undisturbed[1].notes.tolist()
    assert not list((run.data/"predictions").iterdir()) and not (run.data/"npy").exists()
    assert set(index.kept) == {"2 views x 1 fold"}


def test_stacks_of_another_size_or_other_images_are_not_used(trained, undisturbed, tmp_path, monkeypatch):
    run, folder = trained
    monkeypatch.setattr("rsna_helpers.streaming.stream_stacks", lambda *a, **k: pytest.fail("decoded again"))
    inference.predict(run, folder=folder, tta=False)                                        # all there
    monkeypatch.undo(); other = tmp_path/"model"; shutil.copytree(folder, other); about = json.loads((other/"recipe.json").read_text())
    about["layout"]["size"] = 80; (other/"recipe.json").write_text(json.dumps(about))
    p = inference.predict(run, folder=other)
    assert p.index.tolist() == undisturbed[0].index.tolist() and 1e-4 < np.abs(p - undisturbed[0]).max().max() < .5


KILLED = '''
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from rsna_helpers import inference
from rsna_helpers.core import start
data, folder, n = sys.argv[1:]; calls, network = [], inference.predict_stack
def deadly(*a, **k):
    calls.append(1)
    if len(calls) > int(n): os.kill(os.getpid(), signal.SIGKILL)
    return network(*a, **k)
inference.predict_stack = deadly; inference.PART = 2
inference.predict(replace(start(profile="test", verbose=False), data=Path(data)), folder=folder)
'''


def test_killed_and_resumed_is_the_same_table(fresh, undisturbed, tmp_path, monkeypatch):
    run, folder = fresh; (tmp_path/"killed.py").write_text(KILLED)
    with open(tmp_path/"said", "w") as said:
        dead = subprocess.Popen([sys.executable, str(tmp_path/"killed.py"), str(run.data), str(folder), "3"], stdout=said, stderr=said, cwd=Path(inference.__file__).parents[1], start_new_session=True)
        assert dead.wait(120) == -signal.SIGKILL, (tmp_path/"said").read_text()[-500:]
    try: os.killpg(dead.pid, signal.SIGKILL)                                                # its decoders, which would wait for five minutes
    except ProcessLookupError: pass
    done = pd.concat(map(pd.read_parquet, parts(run))).study.nunique(); assert done == 2
    network, seen = inference.predict_stack, []
    monkeypatch.setattr(inference, "predict_stack", lambda *a, **k: seen.append(1) or network(*a, **k))
    p, index = inference.predict(run, folder=folder, with_index=True); whole = undisturbed[1]
    assert len(seen) == whole[whole.position >= 0].study.nunique() - done
    pd.testing.assert_frame_equal(p, undisturbed[0], check_exact=True); assert p.attrs == undisturbed[0].attrs
    assert index.index.tolist() == whole.index.tolist() and not list((run.data/"predictions").iterdir())


def test_ended_at_any_study_nothing_is_lost_or_done_twice(fresh, undisturbed, monkeypatch):
    class Killed(BaseException): "Not an error that anything may catch."
    run, folder = fresh; monkeypatch.setattr(inference, "PART", 1); network = inference.predict_stack; total = [0]
    monkeypatch.setattr(inference, "predict_stack", lambda *a, **k: total.__setitem__(0, total[0] + 1) or network(*a, **k))
    real = inference.save_parquet
    def ending(df, path):
        real(df, path)
        if "part_" in str(path): raise Killed
    for _ in range(3):
        with monkeypatch.context() as m, pytest.raises(Killed): m.setattr(inference, "save_parquet", ending); inference.predict(run, folder=folder)
    p = inference.predict(run, folder=folder); index = undisturbed[1]
    pd.testing.assert_frame_equal(p, undisturbed[0], check_exact=True)
    assert total[0] == index[index.position >= 0].study.nunique()


def test_another_model_does_not_go_on_with_these_parts(fresh, tmp_path, monkeypatch):
    run, folder = fresh; monkeypatch.setattr(inference, "PART", 1)
    def killed(df, path): save(df, path); raise KeyboardInterrupt
    save = inference.save_parquet
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt): m.setattr(inference, "save_parquet", killed); inference.predict(run, folder=folder)
    assert len(parts(run)) == 1
    other = tmp_path/"other"; shutil.copytree(folder, other); (other/"calibration.json").write_text(json.dumps(dict(method="platt", labels=list(run.task.labels), parts=[dict(slope=1., offset=-20.)]*6, notes=[])))
    p = inference.predict(run, folder=other); read = ~p.index.isin(list(p.attrs["filled"]))
    assert p[read].max().max() < 1e-3 and len(parts(run)) == 1                              # calibrated all, and the other's parts wait


def pretend(monkeypatch, clock, fails=lambda stack: False):
    "A network that takes a second an image, view and fold on a clock of its own."
    def network(members, recipe, stack, device, views=None, batch=64):
        if fails(stack): raise RuntimeError("the picture is absurd")
        clock.now += len(stack)*len(views)*len(members); p = np.full((len(stack), 6), .01*len(views)); return p, p[0]
    monkeypatch.setattr(inference, "predict_stack", network)


class Clock:
    now = 0.
    def __call__(self): return self.now


@pytest.mark.parametrize("share,first,last", [(1.3, "2 views x 1 fold", "2 views x 1 fold"), (.9, "2 views x 1 fold", "1 view x 1 fold"), (.3, "1 view x 1 fold", "training prevalence"), (1e-6, "training prevalence", "training prevalence")])
def test_the_budget_is_kept_and_said(trained, monkeypatch, caplog, share, first, last):
    run, folder = trained; clock = Clock(); pretend(monkeypatch, clock); images = len(run.task.list_images(run.raw, "test"))
    hours = share*images*2/3600
    with caplog.at_level(logging.WARNING, "rsna_helpers"): p, index = inference.predict(run, folder=folder, with_index=True, max_hours=hours, clock=clock)
    kept = index.kept[index.kept != ""]; budget = p.attrs["budget"]
    assert (clock.now <= 3600*hours or share < 1e-3) and kept.iloc[0] == first and kept.iloc[-1] == last
    assert len(p) == images and p.notna().all().all() and budget["max_hours"] == hours and sum(budget["images"].values()) == len(kept)
    assert [c["now"] for c in budget["changes"]] == [k for k in kept.unique() if k != "2 views x 1 fold"]
    for c in budget["changes"]: assert c["study"] in caplog.text and index[index.study == c["study"]].kept.iloc[0] == c["now"]
    late = index.index[index.kept == "training prevalence"]
    assert set(late) <= set(p.attrs["filled"]) and all(p.attrs["filled"][i] == "no time was left" or index.error[i] for i in late)
    for n, v in (("2 views x 1 fold", .02), ("1 view x 1 fold", .01)):
        rows = p[(index.kept == n) & (index.position >= 0)]; raw = inference.load_folders(run, [folder])[0].calibration
        if raw is None and len(rows): assert np.allclose(rows, v)
    json.dumps(p.attrs)


def test_what_was_cut_short_is_done_again_when_there_is_time(fresh, monkeypatch):
    run, folder = fresh; clock = Clock(); pretend(monkeypatch, clock); images = len(run.task.list_images(run.raw, "test")); monkeypatch.setattr(inference, "PART", 1)
    class Killed(BaseException): "Not an error that anything may catch."
    save = inference.save_parquet
    def ended(df, path):
        save(df, path)
        if "1 view x 1 fold" in set(df.get("kept", [])): raise Killed
    with monkeypatch.context() as m, pytest.raises(Killed): m.setattr(inference, "save_parquet", ended); inference.predict(run, folder=folder, max_hours=images*1.8/3600, clock=clock)
    assert {"1 view x 1 fold", "2 views x 1 fold"} == set(pd.concat(map(pd.read_parquet, parts(run))).kept)
    p = inference.predict(run, folder=folder); assert set(p.attrs["budget"]["images"]) == {"2 views x 1 fold"}


def test_a_study_that_the_network_cannot_take_is_named(trained, undisturbed, monkeypatch, caplog):
    run, folder = trained; sizes = undisturbed[1].query("position >= 0").groupby("study").size(); worst = sizes.idxmax(); clock = Clock()
    pretend(monkeypatch, clock, lambda stack: len(stack) == sizes.max())
    with caplog.at_level(logging.WARNING, "rsna_helpers"): p, index = inference.predict(run, folder=folder, with_index=True)
    bad = {i for i in index.index[index.study.map(sizes) == sizes.max()] if index.position[i] >= 0}
    assert bad <= set(p.attrs["filled"]) and "the picture is absurd" in caplog.text and p.notna().all().all() and worst in set(index.study[list(bad)])
    assert "absurd" in p.attrs["filled"][next(iter(bad))] and len(bad) < len(p)


def test_a_network_that_takes_nothing_is_an_error(trained, monkeypatch):
    run, folder = trained; pretend(monkeypatch, Clock(), lambda stack: True)
    with pytest.raises(RuntimeError, match="absurd"): inference.predict(run, folder=folder)


def test_no_number_is_no_answer(trained, monkeypatch):
    run, folder = trained; network = inference.predict_stack; calls = []
    def odd(*a, **k):
        x, s = network(*a, **k); calls.append(1)
        if len(calls) == 1: x[:] = np.nan
        return x, s
    monkeypatch.setattr(inference, "predict_stack", odd); p, index = inference.predict(run, folder=folder, with_index=True)
    first = index.study[index.position >= 0].iloc[0]
    assert set(index.index[(index.study == first) & (index.position >= 0)]) <= set(p.attrs["filled"]) and "no number" in p.attrs["filled"][index.index[index.study == first][0]]


def test_a_task_of_studies_gets_a_row_a_study(trained, undisturbed, tmp_path):
    run, folder = trained; run = replace(run, task=replace(run.task, level="study")); images, index = undisturbed
    p = inference.predict(run, folder=folder)
    assert p.index.name == "study" and p.index.tolist() == index.study.unique().tolist() and not p.attrs["filled"]
    read = index[index.position >= 0]; highest = images.loc[read.index].groupby(read.study).max()
    np.testing.assert_allclose(p.to_numpy(), highest.loc[p.index].to_numpy())               # the heads-free study answer is its highest image
    good = run.task.list_images(run.raw, "test").path[3]; shutil.copy(good, tmp_path); (tmp_path/"letter.dcm").write_text("Dear colleague")
    q = inference.predict(run, tmp_path, folder); assert len(q) == 2 and list(q.attrs["filled"]) == ["letter"]


def test_several_folders_in_one_pass(trained, undisturbed, tmp_path, monkeypatch):
    run, folder = trained; other = tmp_path/"other"; shutil.copytree(folder, other); about = json.loads((other/"recipe.json").read_text())
    about["recipe"]["windows"] = [[50, 120], [30, 60], [40, 400]]; (other/"recipe.json").write_text(json.dumps(about))
    b = inference.predict(run, folder=other); opened, load = [], inference.load_stack
    monkeypatch.setattr(inference, "load_stack", lambda where, name: opened.append(name) or load(where, name))
    p = inference.predict(run, folder=[folder, other]); read = ~p.index.isin(list(p.attrs["filled"]))
    pd.testing.assert_frame_equal(p[read], ((undisturbed[0] + b)/2)[read]); assert len(opened) == len(set(opened))
    assert p.attrs["budget"]["images"] == {"2 views x 2 folds": len(p)}


def test_folders_of_two_layouts_take_two_passes(trained, undisturbed, tmp_path):
    run, folder = trained; other = tmp_path/"other"; shutil.copytree(folder, other); about = json.loads((other/"recipe.json").read_text())
    about["layout"]["size"] = 80; (other/"recipe.json").write_text(json.dumps(about))
    b = inference.predict(run, folder=other); p, index = inference.predict(run, folder=[folder, other], with_index=True); read = ~p.index.isin(list(p.attrs["filled"]))
    pd.testing.assert_frame_equal(p[read], ((undisturbed[0] + b)/2)[read]); assert index.index.tolist() == p.index.tolist()
    files = run.task.list_images(run.raw, "test").path.tolist()[:9]
    assert inference.predict(run, files, [folder, other]).index.tolist() == [Path(f).stem for f in files]


def test_a_folder_of_other_labels_is_refused(trained, tmp_path):
    run, folder = trained; other = tmp_path/"other"; shutil.copytree(folder, other); about = json.loads((other/"recipe.json").read_text())
    about["labels"] = about["labels"][::-1]; (other/"recipe.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="any, subdural"): inference.predict(run, folder=[folder, other])
    with pytest.raises(ValueError, match="empty list"): inference.predict(run, folder=[])


def test_ensemble_matches_by_name_and_refuses_what_differs():
    rng = np.random.default_rng(0); a = pd.DataFrame(rng.random((50, 2)), columns=["x", "any"], index=[f"i{k}" for k in range(50)]); b = pd.DataFrame(rng.random((50, 2)), columns=["any", "x"], index=a.index[::-1])
    pd.testing.assert_frame_equal(inference.ensemble([a, b]), (a + b)/2, check_like=True)
    pd.testing.assert_frame_equal(inference.ensemble([a, b], weights=[0, 2]), b.loc[a.index, a.columns])
    r = inference.ensemble([a, b**3], "rank"); assert ((r > 0) & (r < 1)).all().all()
    assert r.x.rank().corr((a.x.rank() + b.x.rank()).rank()) > .9999                                # scales do not matter, ranks do
    with pytest.raises(ValueError, match="i7"): inference.ensemble([a, b.drop("i7")])
    with pytest.raises(ValueError, match="columns.*extra"): inference.ensemble([a, b.assign(extra=0)])
    with pytest.raises(ValueError, match="not numbers"): inference.ensemble([a, b.assign(x=np.nan)])
    with pytest.raises(ValueError, match="weights"): inference.ensemble([a, b], weights=[1, -1])
    with pytest.raises(ValueError, match="no predictions"): inference.ensemble([])
