"Training: the folds are checked again, the loss is the score, a second run gives the same model."
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from rsna_helpers import models, train
from rsna_helpers.recipes import RECIPES, Recipe
from rsna_helpers.validation import LeakageError

TINY = replace(RECIPES["test"], name="tiny", size=32, batch_size=16)


@pytest.fixture(scope="module")
def table(run): return train.training_table(run)


def test_table_has_every_labelled_image_that_could_be_read(run, table):
    labels = run.task.read_labels(run.raw)
    cut = run.truth.query("split == 'train' and quirk == 'truncated'").index
    assert set(labels.index) - set(table.index) == set(cut)
    assert table.groupby("patient").fold.nunique().max() == 1


def test_folds_on_disk_that_leak_are_refused(run, tmp_path):
    import shutil
    from rsna_helpers.validation import create_folds
    here = replace(run, data=tmp_path/"d"); shutil.copytree(run.data, here.data, ignore=shutil.ignore_patterns("raw", "*.lock"))
    f = here.data/"folds.parquet"; folds = pd.read_parquet(f); folds.iloc[0, folds.columns.get_loc("fold")] = (folds.fold.iloc[0] + 1) % 5; folds.to_parquet(f)
    with pytest.raises(LeakageError, match=folds.patient.iloc[0]): create_folds(here)
    with pytest.raises(LeakageError): train.fit(here, TINY)


def test_two_runs_give_the_same_model_and_it_is_kept(run, table, tmp_path):
    folders = [tmp_path/"a", tmp_path/"b"]
    (oof, note), (again, _) = [train.fit_fold(run, table, 0, TINY, f) for f in folders]
    a, b = (load_file(str(f/"model_fold0.safetensors")) for f in folders)
    assert all(torch.equal(a[k], b[k]) for k in a)
    pd.testing.assert_frame_equal(oof, again)
    assert oof.index.tolist() == table.index[table.fold == 0].tolist() and ((oof > 0) & (oof < 1)).all().all()
    assert note["best_epoch"] == 0 and math.isfinite(note["best_valid_loss"])
    (model,), recipe, about = models.load_model(folders[0])
    assert recipe == TINY and about["prior"] == pytest.approx(table[list(run.task.labels)].mean().to_dict())
    alone = train.predict_table(run, table.loc[oof.index[5:8]], [model], recipe)
    np.testing.assert_allclose(alone, oof.iloc[5:8], atol=1e-5)
    assert (folders[0]/"history_fold0.csv").read_text().startswith("epoch,train_loss,valid_loss")


def test_report_stands_beside_baselines(trained):
    run, folder = trained
    report = train.fit(run)
    assert {"constant (training prevalence)", "header fields", "brain area and position", "blurred thumbnail", "test"} == set(report["scores"])
    assert {"normal", *run.task.labels} == set(report["classes"]) and "chose the epoch" in report["warning"]
    for s in report["scores"].values(): assert s["low"] <= s["log_loss"] <= s["high"]
    assert Path(folder, "report.json").is_file()


def test_recipes_are_known_to_timm_and_come_back_from_json():
    import json, timm
    for r in RECIPES.values():
        assert timm.is_model(r.backbone.split(".")[0]) and Recipe.from_json(json.loads(json.dumps(r.to_json()))) == r


def test_only_slices_without_brain_are_thinned_out(table):
    empty = table.brain_cm2 < train.EMPTY
    some = train.thin_out(table, .25, seed=3)
    assert empty.sum() > 20 and some.index.tolist() == [i for i in table.index if i in set(some.index)]
    assert set(table.index[~empty]) <= set(some.index) and empty[some.index].sum() == round(.25*empty.sum())
    assert some.index.equals(train.thin_out(table, .25, seed=3).index) and not some.index.equals(train.thin_out(table, .25, seed=4).index)
    assert train.thin_out(table, 1., seed=3).index.equals(table.index) and not (train.thin_out(table, 0., seed=3).brain_cm2 < train.EMPTY).any()


def test_thinned_out_slices_are_still_scored(run, table, tmp_path):
    oof, note = train.fit_fold(run, table, 0, replace(TINY, keep_empty=0.), tmp_path)
    assert oof.index.tolist() == table.index[table.fold == 0].tolist()
    assert note["empty_left_out"] == ((table.fold != 0) & (table.brain_cm2 < train.EMPTY)).sum() and note["images"] == (table.fold != 0).sum() - note["empty_left_out"]


def test_folds_that_are_finished_are_kept_when_a_later_one_fails(run, tmp_path, monkeypatch):
    import shutil
    here = replace(run, data=tmp_path/"d", models=tmp_path/"m"); shutil.copytree(run.data, here.data, ignore=shutil.ignore_patterns("raw", "*.lock"))
    recipe, made, real = replace(TINY, name="two", folds=(0, 1)), [], train.fit_fold
    def failing(run, df, fold, *rest):
        if fold == 1 and len(made) < 2: made.append("failed"); raise RuntimeError("the power went")
        made.append(fold); return real(run, df, fold, *rest)
    monkeypatch.setattr(train, "fit_fold", failing)
    with pytest.raises(RuntimeError, match="power"): train.fit(here, recipe)
    first = (tmp_path/"m"/"two"/"model_fold0.safetensors").read_bytes(); report = train.fit(here, recipe)
    assert made == [0, "failed", 1] and (tmp_path/"m"/"two"/"model_fold0.safetensors").read_bytes() == first
    assert [n["fold"] for n in report["training"]] == [0, 1] and report["images"] == train.training_table(here).fold.isin([0, 1]).sum()
    train.fit(here, replace(recipe, lr=1e-4)); assert made == [0, "failed", 1, 0, 1]        # another recipe begins anew
