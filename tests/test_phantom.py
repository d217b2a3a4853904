"The phantom: the competition's layout to the letter, every quirk, and no label that can be guessed without looking."
import numpy as np
import pandas as pd
import pydicom
import pytest

from rsna_helpers import phantom
from rsna_helpers.dicom import header_table
from rsna_helpers.metrics import rank_auc


def test_layout(run):
    names = sorted(p.name for p in run.raw.iterdir())
    assert names == ["PHANTOM", "stage_2_sample_submission.csv", "stage_2_test", "stage_2_train", "stage_2_train.csv"]
    assert pd.read_csv(run.raw/"stage_2_train.csv").ID.str.fullmatch(r"ID_[0-9a-f]{9}_(epidural|intraparenchymal|intraventricular|subarachnoid|subdural|any)").all()
    assert (pd.read_csv(run.raw/"stage_2_sample_submission.csv").Label == .5).all()


def test_every_quirk_is_there(run):
    h = header_table([p for s in run.task.splits for p in run.task.list_images(run.raw, s).path], progress=False)
    truth = run.truth
    assert {16, 12} <= set(h.bits_stored) and {0, 1} <= set(h.signed.astype(int)) and {-1024, -1000, 0} <= set(h.intercept)
    assert ((h.bits_stored == 12) & (h.signed == 0) & (h.intercept > -100)).any() and ((h.bits_stored == 12) & (h.signed == 1) & (h.intercept == 0)).any()
    assert (h["rows"] != h["columns"]).any() and (h.n_windows > 1).any() and (h.n_windows == 1).any()
    assert h.transfer_syntax.nunique() == 2 and (h.tilt.abs() > 3).any() and h.duplicated(["study", "pos_z"]).any()
    assert h.error.str.contains("truncated").sum() == 2
    assert set(phantom.QUIRKS) <= set(truth.quirk)
    assert run.task.read_labels(run.raw).attrs["repeated"] == 24
    patients = truth.groupby("patient")
    assert (patients.study.nunique() > 1).any()
    test_file = pydicom.dcmread(run.task.list_images(run.raw, "train").path[0], stop_before_pixels=True)
    assert test_file.SOPInstanceUID.startswith("ID_") and test_file.Modality == "CT"


def test_headers_do_not_tell_the_label():
    "Over many studies no single fact of the plan ranks bleeding ones: the oddities are dealt without looking."
    plan = phantom.plan_hemorrhage(n_train=3000, n_test=10).query("split == 'train'")
    for fact in ("family", "implicit"):
        code = pd.factorize(plan[fact])[0]
        assert abs(rank_auc(plan.bleeding.astype(int), code) - .5) < .03, fact
    odd = (plan.quirk != "").to_numpy().astype(float)
    assert abs(rank_auc(plan.bleeding.astype(int), odd) - .5) < .03


def test_file_size_and_name_do_not_tell_the_label(run):
    truth = run.truth.query("split == 'train' and quirk == ''")
    size = np.array([(run.raw/"stage_2_train"/f"{i}.dcm").stat().st_size for i in truth.index])
    by_study = pd.DataFrame(dict(size=size, any=truth["any"].to_numpy(), study=truth.study.to_numpy())).groupby("study")
    assert (by_study["size"].nunique() <= 8).all()                       # only the lengths of numbers in the header differ
    within = by_study.apply(lambda g: np.nan if g["any"].nunique() < 2 else rank_auc(g["any"], g["size"]), include_groups=False).dropna()
    assert abs(within.mean() - .5) < .2
    assert abs(rank_auc(truth["any"], [int(i[3:], 16) for i in truth.index]) - .5) < .12


def test_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(phantom, "_long", lambda *a: 1/0)
    with pytest.raises(ZeroDivisionError): phantom.write_hemorrhage(tmp_path/"raw", n_train=1, n_test=1, n_jobs=1, progress=False)
    assert not (tmp_path/"raw").exists()
    (tmp_path/"there").mkdir()
    with pytest.raises(FileExistsError, match="there"): phantom.write_phantom("hemorrhage", tmp_path/"there")
    with pytest.raises(ValueError, match="hemorrhage"): phantom.write_phantom("knee", tmp_path/"x")
