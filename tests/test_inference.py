"From files to probabilities: a real series, broken files, a submission that is always complete."
import logging
import shutil

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
