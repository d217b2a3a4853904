"Stacks: order, crop, failures that cost one slice, runs that go on where they were."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from rsna_helpers import dicom, npy
from rsna_helpers.dicom import AIR, DicomError


def header_rows(z, **columns):
    n = len(z)
    base = dict(image=[f"i{k}" for k in range(n)], patient="p", study="s", series="r", split="train", path=[f"i{k}" for k in range(n)], z=z, instance=range(n), tilt=0., thickness=5.,
                spacing_row=1., spacing_col=1., rows=64, columns=64, error=None, **{f"ori_{i}": float(v) for i, v in enumerate([1, 0, 0, 0, 1, 0])})
    return pd.DataFrame(base | columns)


def slices(path):
    k = int(path[1:]); hu = np.full((64, 64), AIR, np.int16); hu[12:52, 10:50] = 20 + k
    return hu, {"repaired": None}


def test_order_is_by_position_not_by_name():
    stack, index = npy.stack_study(header_rows([5., -10., 20., 0.]), slices, size=64, crop=False)
    rows = pd.DataFrame(index).sort_values("position")
    assert rows.z.tolist() == [-10, 0, 5, 20] and stack[:, 30, 30].tolist() == [21, 23, 20, 22]
    assert rows.gap.tolist()[:3] == [10, 5, 15]


def test_two_slices_at_one_z_are_kept_and_flagged():
    _, index = npy.stack_study(header_rows([0., 5., 5., 10.]), slices, size=32)
    rows = pd.DataFrame(index)
    assert (rows.position >= 0).all() and rows.notes.str.contains("same z").sum() == 2


def test_a_bad_slice_costs_one_slice_and_says_why():
    def read(path):
        if path == "i1": raise DicomError(path, "cut off")
        return slices(path)
    stack, index = npy.stack_study(header_rows([0., 5., 10.]), read, size=32)
    rows = npy._finish(index).set_index("image")
    assert len(stack) == 2 and rows.loc["i1", "position"] == -1 and rows.loc["i1", "error"] == "cut off" and len(rows) == 3


def test_only_failures_of_a_file_are_caught():
    def read(path): raise MemoryError
    with pytest.raises(MemoryError): npy.stack_study(header_rows([0.]), read)


def test_other_series_and_orientations_are_not_mixed():
    rows = header_rows([0., 5., 10., 0.], series=["r", "r", "r", "scout"])
    names = npy.assign_studies(rows)
    assert names.tolist() == ["s", "s", "s", "s-1"]
    rows = header_rows([0., 5., 10., 0.]); rows.loc[3, ["ori_1", "ori_3"]] = [1., 1.]
    assert npy.assign_studies(rows).tolist() == ["s", "s", "s", "s-1"]


def test_crop_of_a_non_square_picture_keeps_the_shape_of_the_head():
    hu = np.full((300, 200), AIR, np.int16); yy, xx = np.ogrid[:300, :200]; hu[(yy - 150)**2/90**2 + (xx - 90)**2/60**2 < 1] = 40
    stack, index = npy.stack_study(header_rows([0.]), lambda p: (hu, {}), size=128)
    inside = stack[0] > 0
    assert inside.any(0).sum()/inside.any(1).sum() == pytest.approx(60/90, abs=.03)
    assert index[0]["crop_side"] == pytest.approx(180*1.08, abs=8)
    assert stack[0].min() == AIR


def test_a_second_run_makes_only_what_is_missing(run, tmp_path):
    headers = pd.read_parquet(run.data/"tables"/"headers.parquet"); headers["path"] = [str(run.raw/p) for p in headers.path]
    first = npy.convert(headers, tmp_path, run.task.read_image, size=32, n_jobs=2, progress=False)
    files = sorted(tmp_path.glob("*.npy")); before = {f: f.read_bytes() for f in files}; lost = files[1]
    lost.unlink(); (tmp_path/".half.npy.1.part").write_bytes(b"half")
    stamps = {f: f.stat().st_mtime_ns for f in files if f != lost}
    again = npy.convert(headers, tmp_path, run.task.read_image, size=32, n_jobs=1, progress=False)
    assert {f: f.read_bytes() for f in files} == before
    assert {f: f.stat().st_mtime_ns for f in stamps} == stamps
    pd.testing.assert_frame_equal(first, again)
    assert len(first) == len(headers) and set(first.image) == set(headers.image)


def test_other_parameters_do_not_reuse_old_stacks(run, tmp_path):
    here = replace(run, data=tmp_path)
    a = npy.create_npy(here, size=32); b = npy.create_npy(here, size=48)
    study = b.study[b.position >= 0].iloc[0]
    assert npy.load_stack(here, study).shape[1:] == (48, 48) and len(a) == len(b)


def test_every_raw_image_of_the_phantom_has_a_row(run):
    index = npy.load_index(run)
    wanted = {i for s in run.task.splits for i in run.task.list_images(run.raw, s).image}
    assert set(index.image) == wanted and index.image.is_unique
    assert index.error[index.position < 0].notna().all()
    assert index.repaired.notna().any()
    ok = index[index.position >= 0]
    assert (ok.groupby("study").position.max() + 1 == ok.groupby("study").size()).all()


def test_hu_survives_every_way_of_storing_it(run):
    "Air and brain lie where they should, whatever the header of the file was."
    index = npy.load_index(run).query("position >= 0")
    for study, rows in index.groupby("study"):
        middle = npy.load_stack(run, study)[int(rows.loc[rows.brain_cm2.idxmax(), "position"])]
        assert abs(np.median(middle[middle < -500]) - AIR) < 40, study
        brain = middle[(middle > 5) & (middle < 75)]
        assert 22 < np.median(brain) < 45, study


def test_real_series_is_one_stack(samples):
    paths = sorted(str(p) for p in (samples/"ge_head").glob("*.dcm"))
    table = dicom.header_table(paths[::-1], progress=False, n_jobs=1).assign(split="test")
    assert npy.assign_studies(table).nunique() == 1
    stack, index = npy.stack_study(table, dicom.read_image, size=256)
    rows = pd.DataFrame(index).sort_values("position")
    assert stack.shape == (28, 256, 256) and stack.dtype == np.int16
    assert (rows.z.diff().dropna() > 0).all()
    assert rows.tilt.abs().round(1).eq(18.5).all()
    gaps = rows.gap.dropna()
    assert gaps.max()/gaps.min() > 3                                        # uneven: about 1.1, 4.0 and 7.0 mm along the normal
    assert abs(np.median(stack[14][stack[14] < -500]) - AIR) < 10
    centre = np.concatenate([stack[k][108:148, 88:118].ravel() for k in (15, 18, 20)])
    assert 20 < np.median(centre) < 45
