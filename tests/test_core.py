"Where am I, where is the data: both mounts of Kaggle, clear errors, stages that are whole or absent."
import json
import multiprocessing as mp
import os
from dataclasses import replace
from pathlib import Path

import pytest

from rsna_helpers import core
from rsna_helpers.tasks import get_task

TASK = get_task("hemorrhage")


def copy_of_competition(folder: Path):
    for s in ("train", "test"): (folder/f"stage_2_{s}").mkdir(parents=True); (folder/f"stage_2_{s}"/"ID_0.dcm").touch()
    for f in ("stage_2_train.csv", "stage_2_sample_submission.csv"): (folder/f).touch()
    return folder


@pytest.mark.parametrize("mount", ["{slug}", "{slug}/{slug}", "competitions/{slug}", "competitions/{slug}/{slug}"])
def test_both_mounts_of_kaggle(tmp_path, mount):
    raw = copy_of_competition(tmp_path/mount.format(slug=TASK.slug))
    assert core.find_raw(TASK, roots=[tmp_path]) == raw.resolve()


def test_a_folder_that_is_no_copy_says_what_is_missing(tmp_path):
    raw = copy_of_competition(tmp_path/"raw"); (raw/"stage_2_train.csv").unlink(); (raw/"stage_2_test"/"ID_0.dcm").unlink()
    with pytest.raises(FileNotFoundError) as e: core.start(raw=raw)
    for words in (str(raw), TASK.slug, "stage_2_train.csv is missing", "stage_2_test/ holds no .dcm file"): assert words in str(e.value)
    with pytest.raises(FileNotFoundError, match="is not a folder"): core.start(raw=tmp_path/"nowhere")


def test_the_environment_sets_what_is_not_given(tmp_path, monkeypatch):
    raw = copy_of_competition(tmp_path/"raw")
    for k, v in dict(RSNA_RAW=raw, RSNA_DATA=tmp_path/"d", RSNA_MODELS=tmp_path/"m", RSNA_PROFILE="quick", RSNA_TASK="hemorrhage").items(): monkeypatch.setenv(k, str(v))
    run = core.start(verbose=False)
    assert (run.raw, run.profile, run.phantom) == (raw.resolve(), "quick", False)
    assert run.data == (tmp_path/"d"/"hemorrhage").resolve() and run.models == (tmp_path/"m"/"hemorrhage").resolve()
    monkeypatch.setenv("RSNA_TASK", "knee")
    with pytest.raises(ValueError, match="hemorrhage"): core.start()
    assert core.start("hemorrhage", verbose=False).task is TASK              # what is given wins


def test_a_stage_is_done_once_and_again_when_its_facts_change(run, tmp_path):
    here, made = replace(run, data=tmp_path), []
    def make(x):
        with core.stage(here, "demo", dict(x=x)) as s:
            if not s["done"]: made.append(x); s["result"] = dict(twice=2*x)
            return s["result"]
    assert [make(1), make(1), make(2), make(1)] == [{"twice": 2}, {"twice": 2}, {"twice": 4}, {"twice": 2}] and made == [1, 2, 1]
    def broken():
        with core.stage(here, "broken", {}): raise RuntimeError
    with pytest.raises(RuntimeError): broken()
    assert not (tmp_path/"broken.json").exists()
    (tmp_path/"demo.json").write_text("{half")
    with pytest.raises(ValueError, match="demo.json is not valid JSON"): make(1)


def _count(args):
    run, log = args
    with core.stage(run, "shared", {}) as s:
        if not s["done"]:
            with open(log, "a") as f: f.write("made\n")


def test_processes_that_want_the_same_artifact_make_it_once(run, tmp_path):
    here = replace(run, data=tmp_path)
    with mp.get_context("spawn").Pool(4) as pool: pool.map(_count, [(here, str(tmp_path/"log"))]*8)
    assert (tmp_path/"log").read_text().splitlines() == ["made"]


def test_writing_leaves_nothing_behind_when_it_fails(tmp_path):
    target = tmp_path/"a"/"table.json"
    core.save_json({"x": 1}, target)
    with pytest.raises(ZeroDivisionError):
        with core.writing(target) as p: p.write_text("half"); 1/0
    assert json.loads(target.read_text()) == {"x": 1} and os.listdir(target.parent) == ["table.json"]


@pytest.mark.parametrize("device, memory, profile", [("cpu", 0, "quick"), ("cuda", 16e9, "kaggle_t4"), ("cuda", 80e9, "full"), ("mps", 0, "kaggle_t4")])
def test_the_device_chooses_the_recipe_for_real_data(monkeypatch, device, memory, profile):
    monkeypatch.setattr(core, "find_device", lambda: device); monkeypatch.setattr(core, "gpu_memory", lambda: memory); monkeypatch.delenv("IN_TEST", raising=False)
    assert core._profile(None, phantom_only=False) == profile and core._profile(None, phantom_only=True) == "quick"
