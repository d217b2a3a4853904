"Experiments: networks by name, one table for many recipes, and the ladder; what is on disk is not trained again."
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
import timm
import torch

from rsna_helpers import experiments, train
from rsna_helpers.experiments import (compare_architectures, compare_sizes, experiment_table, ladder, ladder_predictions, ladder_rungs, ladder_table, paired_difference,
                                      plot_experiments, plot_ladder, plot_score_by_size, run_experiment, run_experiments)
from rsna_helpers.models import build_model
from rsna_helpers.networks import NETWORKS, SMALLEST, check_side
from rsna_helpers.npy import load_stack
from rsna_helpers.recipes import RECIPES, Recipe
from rsna_helpers.validation import LeakageError
from rsna_helpers.variants import OwnWindow, file_window, other_stacks

TINY = replace(RECIPES["test"], name="tiny", size=32, batch_size=16)


@pytest.fixture(scope="module")
def table(run): return train.training_table(run)


@pytest.fixture
def trainings(monkeypatch):
    "Names of the recipes that were trained."
    done, real = [], experiments.fit_fold
    def counted(run, df, fold, recipe, *rest): done.append((recipe.name, fold)); return real(run, df, fold, recipe, *rest)
    monkeypatch.setattr(experiments, "fit_fold", counted)
    return done


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_learn_from_any_number_of_channels(name):
    "Each of the names builds with 3 and with 9 channels, and the loss reaches its first layer."
    side = max(SMALLEST.get(NETWORKS[name].split(".")[0], 32), 32); torch.manual_seed(0)
    for neighbours in (0, 1):
        recipe = Recipe(backbone=NETWORKS[name], neighbours=neighbours, size=side, pool="catavgmax")
        with torch.no_grad(): model = build_model(recipe, 6)
        first = next(model.encoder.parameters()); assert first.shape[1] == 3*(1 + 2*neighbours)
        x = torch.randn(2, first.shape[1], side, side)
        if neighbours == 0:
            model(x).square().sum().backward(); assert torch.isfinite(first.grad).all() and first.grad.abs().sum() > 0
        with torch.no_grad():
            f = model.eval().features(x); assert f.shape == (2, model.classifier.in_features) and model.classifier.out_features == 6
            torch.testing.assert_close(model.classifier(f), model(x)); torch.testing.assert_close(model(x), model.encoder(x))
        width = model.encoder.num_features
        assert f.shape[1] in (width, 2*width) and (f[0] != f[1]).any()


def test_basic_cnn_is_a_timm_model_like_any_other():
    net = timm.create_model("basic_cnn", in_chans=1, num_classes=4, global_pool="avg", drop_rate=.5)
    maps = net.forward_features(torch.randn(2, 1, 64, 64)); assert maps.shape == (2, 256, 2, 2) and timm.is_model("basic_cnn")
    net.eval(); torch.testing.assert_close(net.forward_head(maps, pre_logits=True), maps.mean((2, 3)))
    net.train(); assert not torch.equal(net.forward_head(maps), net.forward_head(maps))          # dropout
    net.reset_classifier(0); assert net.eval()(torch.randn(1, 1, 64, 64)).shape == (1, 256)


def test_a_picture_that_is_too_small_is_said_before_training():
    check_side("inception_v3", 75)
    with pytest.raises(ValueError, match="inception_v3.tv_in1k needs pictures of 75 px or more, got 74"): check_side("inception_v3.tv_in1k", 74)
    with pytest.raises(RuntimeError): timm.create_model("inception_v3")(torch.zeros(2, 3, 74, 74))


def test_table_has_a_row_for_every_recipe_in_order(run, table, tmp_path, trainings):
    recipes = {"b": TINY, "a": replace(TINY, backbone="basic_cnn"), "broken": replace(TINY, backbone="inception_v3"), "unknown": replace(TINY, backbone="resnet1800")}
    t = run_experiments(run, recipes, table, tmp_path)
    assert t.index.tolist() == list(recipes) and trainings == [("tiny", 0)]*3                # the unknown network fails in training
    assert t.columns.tolist() == ["log_loss", "low", "high", "AUC any", "matched AUC any", "mean AUC", "F1 any", "difference", "difference_low", "difference_high",
                                  "backbone", "size", "parameters", "images_per_s", "train_seconds", "best_epoch", "error"]
    good = t.loc[["b", "a"]]; assert (good.error == "").all() and good.drop(columns=["error", "F1 any"]).notna().all().all() and (good.images_per_s > 0).all()
    assert t.difference["b"] == 0 and t.difference["a"] == pytest.approx(t.log_loss["a"] - t.log_loss["b"]) and t.difference_low["a"] <= t.difference["a"] <= t.difference_high["a"]
    assert t.parameters["a"] == sum(p.numel() for p in build_model(recipes["a"], 6).parameters())
    assert "75 px" in t.error["broken"] and "resnet1800" in t.error["unknown"] and t.loc[["broken", "unknown"], "log_loss"].isna().all() and t.backbone["broken"] == "inception_v3"
    other = run_experiments(run, recipes, table, tmp_path, baseline="a"); assert len(trainings) == 4
    assert other.difference["b"] == pytest.approx(-t.difference["a"]) and other.difference["a"] == 0
    failed = run_experiments(run, recipes, table, tmp_path, baseline="broken"); assert failed.difference.isna().all() and failed.log_loss["a"] == t.log_loss["a"]
    assert len(plot_experiments(t).axes) == 2


def test_second_call_trains_nothing_and_a_killed_one_goes_on(run, table, tmp_path, trainings, monkeypatch):
    recipes = {"one": replace(TINY, name="one", folds=(0, 1)), "two": replace(TINY, name="two", lr=1e-3, folds=(0, 1))}; counted = experiments.fit_fold
    def killed(run, df, fold, recipe, *rest):
        if (recipe.name, fold) == ("two", 1): raise KeyboardInterrupt
        return counted(run, df, fold, recipe, *rest)
    monkeypatch.setattr(experiments, "fit_fold", killed)
    with pytest.raises(KeyboardInterrupt): run_experiments(run, recipes, table, tmp_path)
    monkeypatch.setattr(experiments, "fit_fold", counted); assert trainings == [("one", 0), ("one", 1), ("two", 0)]
    first = run_experiments(run, recipes, table, tmp_path); assert trainings[3:] == [("two", 1)]
    again = run_experiments(run, recipes, table, tmp_path); assert len(trainings) == 4; pd.testing.assert_frame_equal(first, again)
    oof, facts = run_experiment(run, recipes["one"], table, tmp_path); assert set(oof.index) == set(table.index[table.fold.isin((0, 1))]) and len(oof) == oof.index.nunique()
    stored = pd.concat([pd.read_parquet(f) for f in sorted(Path(facts["folder"]).glob("oof_fold*.parquet"))]); pd.testing.assert_frame_equal(stored, oof)
    assert Path(facts["folder"], "log.txt").is_file()


def test_what_is_wrong_with_the_machine_or_the_data_stops_all(run, table, tmp_path, monkeypatch):
    for error in (OSError("disk full"), MemoryError(), LeakageError("p1")):
        def broken(*args): raise error
        monkeypatch.setattr(experiments, "fit_fold", broken)
        with pytest.raises(type(error)): run_experiments(run, {"a": TINY, "b": replace(TINY, lr=1.)}, table, tmp_path)
    monkeypatch.setattr(experiments, "fit_fold", lambda *a: 1/0)
    with pytest.raises(RuntimeError, match="every experiment failed.*ZeroDivisionError"): run_experiments(run, {"a": TINY}, table, tmp_path)


def test_experiments_that_cannot_be_compared_are_refused(run, table, tmp_path):
    with pytest.raises(ValueError, match="different folds"): run_experiments(run, {"a": TINY, "b": replace(TINY, folds=(1,))}, table, tmp_path)
    with pytest.raises(ValueError, match="baseline is 'c'"): run_experiments(run, {"a": TINY}, table, tmp_path, baseline="c")
    with pytest.raises(ValueError, match="every name once"): run_experiments(run, {"a": TINY}, table, tmp_path, beside={"a": None})


def test_a_better_model_has_a_difference_below_zero(run, table):
    truth = table[table.fold == 0]; y = truth[list(run.task.labels)].astype(float); rng = np.random.default_rng(0); noise = rng.uniform(-.04, .04, y.shape)
    near, far = ((y*(1 - 2*e) + e + noise).clip(.001, .999) for e in (.05, .2))
    d, low, high = paired_difference(run, table, far, near.sample(frac=1, random_state=0))
    assert low < d < high < 0 and d == pytest.approx(run.task.score(y, near) - run.task.score(y, far))
    steps = ladder_table(run, table, {"start": far, "good": near, "bad": far})
    assert steps.verdict.tolist() == ["the start", "better", "worse"] and steps.to_previous.tolist() == pytest.approx([0, d, -d]) and steps.to_first["bad"] == 0
    assert steps.cut_percent["good"] == pytest.approx(-100*d/steps.log_loss["start"]) and steps.cut_percent["bad"] == 0
    t = experiment_table(run, table, {"far": far, "near": near}); assert t["mean AUC"]["near"] == 1 and t.difference_high["near"] < 0


def test_architectures_stand_beside_the_header(run, table, tmp_path):
    t = compare_architectures(run, TINY, ("test_resnet", "basic CNN"), table, tmp_path)
    assert t.index.tolist() == ["test_resnet", "basic CNN", "constant (training prevalence)", "header fields"] and t.backbone["basic CNN"] == "basic_cnn"
    assert t["AUC any"]["constant (training prevalence)"] == .5 and t.parameters.isna().tolist() == [False, False, True, True]


def test_sizes_grow_in_proportion(run, table, tmp_path, monkeypatch):
    seen = {}
    def fake(run, recipe, df, folder): seen[recipe.size] = recipe.grow; return train_constant(df), dict(backbone="x", size=recipe.size)
    train_constant = lambda df: pd.DataFrame(.1, df.index[df.fold == 0], list(run.task.labels))
    monkeypatch.setattr(experiments, "run_experiment", fake)
    t = compare_sizes(run, replace(TINY, size=160, grow=((.3, 96), (.7, 128)), epochs=9), (80, 160), table, tmp_path)
    assert seen == {80: ((.3, 48), (.7, 64)), 160: ((.3, 96), (.7, 128))} and t["size"].tolist() == [80, 160]
    assert [l.get_text() for l in plot_score_by_size(t).get_xticklabels()] == ["80", "160"]


def test_picture_is_what_the_standard_gives_for_the_first_window(run, table):
    for path in table.path[::40]:
        grey, header = OwnWindow(run.task)(run.raw/path); hu = run.task.read_image(run.raw/path)[0].astype(float)
        c, w = header["WindowCenter"][0], header["WindowWidth"][0]
        np.testing.assert_allclose(grey, 255*np.clip((hu - (c - .5))/(w - 1) + .5, 0, 1), atol=.51); assert grey.dtype == np.int16
    assert file_window(dict(WindowCenter=[36., 80.], WindowWidth=[80., 200.])) == (36, 80, None) and file_window({}, (50, 100)) == (50, 100, None)


def test_multi_valued_window_in_a_file(run, table, tmp_path):
    ds = pydicom.dcmread(run.raw/table.path.iloc[200]); hu = run.task.read_image(run.raw/table.path.iloc[200])[0]; read = OwnWindow(run.task); shown = {}
    for name, centers, widths in (("two", [30, 600], [60, 2800]), ("one", 30, 60), ("none first", [30, 40], [0, 80]), ("brain", 40, 80)):
        ds.WindowCenter, ds.WindowWidth = centers, widths; ds.save_as(tmp_path/"x.dcm"); shown[name] = read(tmp_path/"x.dcm")[0]
    np.testing.assert_array_equal(shown["two"], shown["one"]); np.testing.assert_array_equal(shown["none first"], shown["brain"])
    assert (shown["one"] != shown["brain"]).any() and (hu > 100).any() and (shown["two"][hu > 60] == 255).all() and (shown["two"][hu < 0] == 0).all()
    del ds.WindowCenter, ds.WindowWidth; ds.save_as(tmp_path/"x.dcm"); np.testing.assert_array_equal(read(tmp_path/"x.dcm")[0], shown["brain"])


def test_other_stacks_hold_the_same_images_uncropped(run, table, tmp_path):
    here = replace(run, data=tmp_path/"d"); link(run, here); few = table[table.study.isin(table.study.unique()[:2])]
    there, rows = other_stacks(here, few, "uncropped"); r = rows.iloc[len(rows)//2]
    assert rows.index.equals(few.index) and rows.fold.equals(few.fold) and r.study == few.study.iloc[len(rows)//2] and r.position == few.position.iloc[len(rows)//2]
    hu = run.task.read_image(run.raw/r.path)[0]; stack = load_stack(there, r.study)
    assert hu.shape[0] == hu.shape[1]; np.testing.assert_allclose(stack[r.position], cv2.resize(hu.astype(np.float32), stack.shape[1:], interpolation=cv2.INTER_AREA), atol=1.)
    assert json.loads((there.data/"npy.json").read_text())["facts"]["crop"] is False
    stamp = (there.data/"npy"/f"{r.study}.npy").stat().st_mtime_ns; other_stacks(here, few, "uncropped"); assert (there.data/"npy"/f"{r.study}.npy").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="no stacks 'upside down'"): other_stacks(here, few, "upside down")


def link(run, here):
    "The run's data in another folder."
    here.data.mkdir()
    for p in run.data.iterdir():
        if p.name != "other_stacks" and not p.name.startswith("."): (here.data/p.name).symlink_to(p)


def test_ladder_from_end_to_end(run, table, tmp_path, trainings):
    here = replace(run, data=tmp_path/"d"); link(run, here); recipe = replace(TINY, tta=("as is", "flip"), epochs=2)
    steps = ladder(here, recipe, epochs=1, df=table, folder=tmp_path/"e")
    assert steps.index.tolist() == ["own window", "windows", "crop", "neighbours", "sequence head", "TTA", "calibration", "ensemble"] and len(trainings) == 6
    assert steps.train_seconds.notna().tolist() == [True]*5 + [False, False, True] and (steps.change != "").all()
    for i in range(1, 8): assert steps.to_previous.iloc[i] == pytest.approx(steps.log_loss.iloc[i] - steps.log_loss.iloc[i - 1]) and steps.to_first.iloc[i] == pytest.approx(steps.log_loss.iloc[i] - steps.log_loss.iloc[0])
    assert steps.log_loss[["own window", "windows", "crop", "neighbours"]].nunique() == 4 and steps.log_loss["TTA"] != steps.log_loss["sequence head"]
    again = ladder(here, recipe, epochs=1, df=table, folder=tmp_path/"e"); assert len(trainings) == 6; pd.testing.assert_frame_equal(steps, again)
    p, facts = ladder_predictions(here, recipe, 1, table, tmp_path/"e", partner=replace(TINY, name="plain", backbone="basic_cnn")); assert len(trainings) == 7
    assert facts["ensemble"]["backbone"] == "basic_cnn" and all(v.index.equals(p["TTA"].index) for v in p.values())
    assert len(plot_ladder(steps).axes) == 2


def test_rungs_differ_in_what_they_say():
    rungs = {k: v[1] for k, v in ladder_rungs(RECIPES["quick"]).items() if v[1]}
    def changed(a, b): a, b = rungs[a].to_json(), rungs[b].to_json(); return {k for k in a if a[k] != b[k]}
    assert changed("own window", "windows") == {"windows", "hu_shift", "shade", "noise", "harden", "export"} and changed("windows", "crop") == set()
    assert changed("crop", "neighbours") == {"neighbours"} and changed("neighbours", "sequence head") == {"head"} and changed("sequence head", "TTA") == {"tta"}
    assert ladder_rungs(RECIPES["quick"])["own window"][2] == "own window" and ladder_rungs(RECIPES["quick"])["crop"][2] is None
