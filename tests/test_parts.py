"Studies in parts: what the encoder learns from, the study from its parts, and the neck from raw files to a submission."
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rsna_helpers import inference, parts, train
from rsna_helpers.core import load_json, start
from rsna_helpers.models import any_part, load_model
from rsna_helpers.npy import load_index, load_stack
from rsna_helpers.recipes import RECIPES
from rsna_helpers.tasks import get_task

TASK = get_task("cspine")


@pytest.fixture(scope="module")
def run(): return start("cspine", profile="test", verbose=False)


@pytest.fixture(scope="module")
def report(run): return train.fit(run)


def made(n=5):
    "Two studies of seven parts with n images each; shares rise and fall."
    share = np.tile(1 - np.abs(np.linspace(-1, 1, n)), (7, 1)); at = np.tile(np.arange(n), (7, 1)) + 10
    index = pd.DataFrame(dict(position=np.arange(40), image=[f"x/{i}" for i in range(40)]))
    rows = pd.concat([parts.part_rows(s, TASK.parts, share, at, index.assign(image=index.image.str.replace("x", s)), "") for s in "ab"], ignore_index=True)
    df = pd.DataFrame(0, index=pd.Index(["a", "b"], name="study"), columns=list(TASK.labels)).assign(fold=[0, 1], patient=["a", "b"])
    df.loc["a", ["C3", "patient_overall"]] = 1
    return rows, df


def test_an_image_is_positive_as_far_as_it_shows_a_part_that_is():
    rows, df = made(); t = parts.part_table(TASK, rows, df)
    assert list(t.positive[t.study == "a_C3"]) == [0, .5, 1, .5, 0] and (t.positive[t.study != "a_C3"] == 0).all()
    assert (t.groupby("study").size() == 5).all() and t.index.is_unique and set(t.fold[t.whole == "b"]) == {1}
    assert list(t.source[t.study == "a_C3"]) == [f"a/{i}" for i in range(10, 15)]


def test_boxes_say_which_images_show_it():
    rows, df = made(); boxes = pd.DataFrame(dict(image=["a/11", "b/12"])); t = parts.part_table(TASK, rows, df, boxes)
    assert list(t.positive[t.study == "a_C3"]) == pytest.approx([0, .9, .25, .125, 0]) and (t.positive[t.study != "a_C3"] == 0).all()      # a box does not make a healthy part positive
    elsewhere = parts.part_table(TASK, rows, df, pd.DataFrame(dict(image=["a/30"])))
    assert list(elsewhere.positive[elsewhere.study == "a_C3"]) == [0, .5, 1, .5, 0]                                                       # no image of the part has one: the shares stay


def test_the_answer_for_a_study():
    p = np.array([.1, .2, 0, 0, 0, 0, .5]); row = parts.answer_study(TASK, p, .7, "head"); assert list(row) == [.7, *p]
    assert list(parts.answer_study(TASK, p, .7, "product")) == [any_part(p, 2.), *p] == list(parts.answer_study(TASK, p, np.nan, "head"))
    assert p.max() < any_part(p, 2.) < 1


def test_folds_reports_and_both_ways(run, report):
    df = train.training_table(run); studies = train.answer_table(run, df); oof = pd.read_parquet(run.data/"predictions"/"oof_test.parquet")
    assert set(oof.index) == set(studies.index[studies.fold == 0]) and list(oof.columns) == list(TASK.labels) and oof.notna().all().all()
    assert report["whole_by"] == min(report["score_of"], key=report["score_of"].get) == load_json(Path(report["folder"])/"recipe.json")["whole_by"]
    assert report["scores"]["test"]["log_loss"] == pytest.approx(TASK.score(studies.loc[oof.index, list(TASK.labels)], oof))
    prior = load_json(Path(report["folder"])/"recipe.json")["prior"]; y = studies[list(TASK.labels)].mean()
    assert prior["patient_overall"] == pytest.approx(2*y.patient_overall/(1 + y.patient_overall))


def test_parts_are_cut_once_and_again_the_same(run, report):
    recipe = RECIPES["test"].of(TASK); segmenter = parts.train_segmenter(run); there, rows = parts.cut_studies(run, segmenter, recipe, progress=False)
    study = rows.whole.iloc[0]; file = there.data/"npy"/f"{study}_C4.npy"; before, crops = file.stat().st_mtime_ns, np.load(file)
    assert crops.shape == (5, 2, 48, 48) and set(np.unique(crops[:, 1])) <= set(range(1001)) and len(rows) == 7*5*rows.whole.nunique()
    (there.data/"rows"/f"{study}.parquet").unlink(); _, again = parts.cut_studies(run, segmenter, recipe, progress=False)
    pd.testing.assert_frame_equal(rows, again); assert np.array_equal(np.load(file), crops) and file.stat().st_mtime_ns > before
    other = parts.cut_studies(run, segmenter, replace(recipe, part_size=32), progress=False)[0]; assert other.data != there.data


def test_the_rows_of_the_sample_whatever_is_missing(run, report):
    p, index = inference.predict(run, with_index=True); result = inference.submit(run, made=(p, index)); sub = pd.read_csv(result["path"]); sample = pd.read_csv(run.raw/"sample_submission.csv")
    assert list(sub.row_id) == list(sample.row_id) and sub.fractured.between(0, 1).all()
    lost = set(TASK.expected_ids(run.raw)) - set(load_index(run).query("split == 'test' and position >= 0").study)
    assert lost and lost <= set(result["filled"])
    prior = load_json(Path(report["folder"])/"recipe.json")["prior"]; back = TASK.check_submission(result["path"], run.raw)
    for s in lost: assert back.loc[s].to_numpy() == pytest.approx([prior[l] for l in TASK.labels], abs=1e-5)
    assert result["held_out"]["level"] == "study" and not set(index.study) & set(train.training_table(run).study)


def test_streamed_from_files_as_from_stacks(run, report):
    index = load_index(run).query("split == 'test' and position >= 0"); study = index.study.iloc[0]; files = [run.raw/f for f in index.path[index.study == study]] if "path" in index else run.task.list_images(run.raw, "test").query("study == @study").path.tolist()
    whole = inference.predict(run).loc[study]; alone = inference.predict(run, files)
    assert len(alone) == 1 and alone.iloc[0].to_numpy() == pytest.approx(whole.to_numpy(), abs=.02)


def test_the_folder_goes_with_its_segmenter(run, report, tmp_path):
    members, recipe, about = load_model(report["folder"]); assert recipe.cut and about["parts"] == list(TASK.parts) and members[0].whole is not None
    loaded = inference.load_folders(run, [report["folder"]])[0]; assert (loaded.segmenter is None) == (parts.train_segmenter(run) is None)
    study = load_index(run).query("split == 'train' and position >= 0").study.iloc[0]; rows = load_index(run).query("study == @study and position >= 0")
    images, answer = loaded.answer(load_stack(run, study), rows, loaded.members, ("as is",), "cpu"); assert images is None and answer.shape == (8,) and ((0 <= answer) & (answer <= 1)).all()
