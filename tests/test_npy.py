"Stacks: order, crop, failures that cost one slice, folders of one's own, storage, disks that fill up."
import errno
import json
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from rsna_helpers import dicom, npy
from rsna_helpers.dicom import AIR, DicomError
from rsna_helpers.eda import prepare_tables


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
    headers = prepare_tables(run)[1]; headers["path"] = [str(run.raw/p) for p in headers.path]
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


def dicom_files(folder, n=6, **how):
    "A small series, file names in reverse order of z; columns of `how` overwrite header values."
    pydicom = pytest.importorskip("pydicom")
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        ds = pydicom.Dataset(); ds.file_meta = pydicom.dataset.FileMetaDataset(); ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        ds.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage; ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{k + 1}"
        ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality, ds.PatientID = pydicom.uid.CTImageStorage, f"1.2.3.{k + 1}", "CT", "p"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.InstanceNumber = "1.2", "1.2.1", k + 1
        ds.ImageOrientationPatient, ds.ImagePositionPatient, ds.PixelSpacing = [1, 0, 0, 0, 1, 0], [0, 0, 5.*k], [1, 1]
        ds.Rows = ds.Columns = 64; ds.BitsAllocated = ds.BitsStored = 16; ds.HighBit = 15; ds.PixelRepresentation = ds.SamplesPerPixel = 1
        ds.PhotometricInterpretation, ds.RescaleSlope, ds.RescaleIntercept = "MONOCHROME2", 1, 0
        for name, v in how.items(): setattr(ds, name, v(k) if callable(v) else v)
        ds.PixelData = slices(f"i{k}")[0].tobytes()
        ds.save_as(folder/f"IM{99 - k:04d}", **({"enforce_file_format": True} if int(pydicom.__version__.split(".")[0]) >= 3 else {"write_like_original": False}))


def test_a_folder_of_ones_own(tmp_path):
    "Extensionless files, two series, a localizer, DICOMDIR, text, pictures: each file has a row, and nothing is mixed."
    from PIL import Image
    a = tmp_path/"in"
    dicom_files(a/"A"); dicom_files(a/"B", n=3, SeriesInstanceUID="1.2.2"); dicom_files(a/"scout", n=1, SeriesInstanceUID="1.2.3", ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    (a/"DICOMDIR").write_bytes(b"\0"*128 + b"DICM"); (a/"notes.txt").write_text("x"); (a/"empty.dcm").write_bytes(b""); (a/".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (a/"film").mkdir(); grey = np.zeros((40, 60), np.uint8); grey[8:32, 10:50] = 200
    for n in (10, 9, 1): Image.fromarray(grey + n).save(a/"film"/f"v{n}.png")
    Image.fromarray(np.stack([grey, grey//2, grey//4], -1)).save(a/"film"/"v11.jpg", quality=95)
    index = npy.convert_folder(a, tmp_path/"out", size=32, n_jobs=1, progress=False)
    files = [p for p in a.rglob("*") if p.is_file()]
    assert len(index) == len(files) and {str(p) for p in files} == set(index.path)
    assert index.groupby("study").size()[["1.2", "1.2-1", "1.2-2", "film"]].tolist() == [6, 3, 1, 4]
    z = index[index.study == "1.2"].sort_values("position").z.tolist(); assert z == [0, 5, 10, 15, 20, 25]
    notes = index.groupby("study").notes.first()
    assert "other series" in notes["1.2-1"] and {"other orientation", "not axial"} <= set(notes["1.2-2"].split(";")) and notes["1.2"] == ""
    bad = index[index.position < 0].assign(name=lambda d: [p.split("/")[-1] for p in d.path]).set_index("name").error
    assert set(bad.index) == {"DICOMDIR", "notes.txt", "empty.dcm", ".DS_Store"} and "table of contents" in bad["DICOMDIR"] and bad.notna().all()
    film = index[index.study == "film"].sort_values("position"); stack = npy.load_stack(tmp_path/"out", "film")
    assert [p.split("/")[-1] for p in film.path] == ["v1.png", "v9.png", "v10.png", "v11.jpg"]
    assert abs(int(np.median(stack[3][stack[3] > 20])) - round(200*(.299 + .587/2 + .114/4))) <= 3          # colour to luma
    assert stack.min() >= 0                                                                              # around a picture is black, not -1000


def test_output_inside_the_folder_is_not_input(tmp_path):
    dicom_files(tmp_path/"in")
    for _ in range(2): index = npy.convert_folder(tmp_path/"in", tmp_path/"in"/"out", size=16, n_jobs=1, progress=False)
    assert len(index) == 6


def test_missing_slices_and_the_unreadable_leave_a_flagged_gap():
    def read(path):
        if path == "i5": raise DicomError(path, "cut off")
        return slices(path)
    _, index = npy.stack_study(header_rows(np.r_[0:40:5, 45:80:5].astype(float)), read, size=16)
    rows = pd.DataFrame(index); flagged = rows[rows.notes.str.contains("missing slices")]
    assert flagged.z.tolist() == [20, 35] and flagged.gap.tolist() == [10, 10]


def test_a_study_called_index(run, tmp_path):
    rows = header_rows([0., 5.], study="index").assign(format="dicom", file_bytes=1)
    index = npy.convert(rows, tmp_path, slices, size=16, n_jobs=1, progress=False)
    assert npy.load_stack(tmp_path, "index").shape == (2, 16, 16) and len(pd.read_parquet(tmp_path/"index.parquet")) == len(index) == 2


def test_long_studies_stream_and_files_are_read_once(monkeypatch):
    n = 130; count = {}
    def read(path): count[path] = count.get(path, 0) + 1; return slices(path)
    rows = header_rows(np.arange(float(n)))
    stack, index = npy.stack_study(rows, read, size=16)
    assert set(count.values()) == {1} and len(count) == n
    from rsna_helpers import stacks
    monkeypatch.setattr(stacks, "KEEP", 64*64*2*10); monkeypatch.setattr(stacks, "_memory", type(stacks._memory)())
    count.clear(); again, _ = npy.stack_study(rows, read, size=16)
    np.testing.assert_array_equal(stack, again); assert max(count.values()) == 2


def test_memory_does_not_grow_with_the_study():
    import tracemalloc
    from rsna_helpers.stacks import Layout, stream_study
    def peak(n):
        rows = header_rows(np.arange(float(n))).assign(notes="").to_dict("records")
        stream_study(rows[:1], slices, lambda hu: None, Layout(16)); tracemalloc.start()
        stream_study(rows, lambda p: (np.full((256, 256), 30, np.int16), {}), lambda hu: None, Layout(64)); top = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
        return top
    assert peak(500) < peak(60) + 10*256*256*2                       # 440 slices more, room for 10: rows and buffers


def test_unequal_spacing_and_a_field_in_mm():
    hu = np.full((100, 200), AIR, np.int16); yy, xx = np.ogrid[:100, :200]; hu[((yy - 50)*2.)**2 + (xx - 110.)**2 < 50**2] = 40       # round on the patient
    rows = header_rows([0.], spacing_row=1., spacing_col=.5)
    stack, index = npy.stack_study(rows, lambda p: (hu, {}), size=64); inside = stack[0] > 0
    assert inside.any(0).sum() == pytest.approx(inside.any(1).sum(), abs=2) and index[0]["mm_row"] == pytest.approx(index[0]["mm_col"], rel=.02)
    stack, index = npy.stack_study(rows, lambda p: (hu, {}), size=64, spacing=1.); inside = stack[0] > 0
    assert inside.any(0).sum() == pytest.approx(50, abs=2) and inside.any(1).sum() == pytest.approx(50, abs=2) and index[0]["mm_row"] == 1
    _, index = npy.stack_study(rows, lambda p: (hu, {}), size=16, spacing=1.); assert "larger than the field" in index[0]["notes"]
    _, index = npy.stack_study(rows.assign(spacing_row=np.nan), lambda p: (hu, {}), size=64, spacing=1.); assert "no spacing" in index[0]["notes"]
    for absurd in (1e-9, 1e9, -1., 0.): npy.stack_study(rows.assign(spacing_row=absurd), lambda p: (hu, {}), size=64, spacing=1.)


def test_little_brain_is_flagged_not_deleted():
    stack, index = npy.stack_study(header_rows([0., 5.]), lambda p: (np.full((64, 64), {"i0": 30, "i1": 900}[p], np.int16), {}), size=32, crop=False)
    assert len(stack) == 2 and [r["brain_share"] for r in index] == [1, 0] and "little brain" in index[1]["notes"] and "little" not in index[0]["notes"]
    _, index = npy.stack_study(header_rows([0.]), lambda p: (np.full((64, 64), 900, np.int16), {}), size=32, min_brain_share=0); assert index[0]["notes"] == "constant;"


def test_16_bit_pictures_keep_their_contrast():
    stack, index = npy.stack_study(header_rows([0.]), lambda p: (np.linspace(0, 65535, 64*64).reshape(64, 64).astype(np.uint16), {"format": "png"}), size=64, crop=False)
    assert stack.max() == 32767 and "16 bits halved" in index[0]["notes"]


def test_a_byte_a_pixel_reads_as_hu_within_the_stated_error(run, tmp_path):
    here = replace(run, data=tmp_path); index = npy.create_npy(here, size=64, store="uint8", progress=False)
    about = json.loads((tmp_path/"npy"/"stacks.json").read_text()); stated = about["largest_error_hu"]
    assert stated["brain"] == 0 and set(run.task.windows) < set(stated)
    exact = replace(run, data=tmp_path/"exact"); npy.create_npy(exact, size=64, progress=False)
    study = index[index.position >= 0].study.iloc[0]; a, b = npy.load_stack(here, study), npy.load_stack(exact, study)
    assert a.shape == b.shape and a[0].dtype == np.int16 and (tmp_path/"npy"/f"{study}.npy").stat().st_size < (tmp_path/"exact"/"npy"/f"{study}.npy").stat().st_size*.55
    off = np.abs(np.asarray(a).astype(int) - b)
    for name, (c, w) in {k: dicom.WINDOWS[k] for k in run.task.windows}.items():
        shown = (b >= c - w/2) & (b <= c + w/2); assert off[shown].max() <= stated[name], name
    pd.testing.assert_frame_equal(npy.load_index(here), index)                                            # later stages take what is there
    assert np.load(tmp_path/"npy"/f"{study}.npy").dtype == np.uint8


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(OSError, match=r"2 images as int16 stacks of 512 px need 0.0 GB and 0.0 GB are free; what would fit: int16 at 384 px .* or uint8 at 512 px") as e:
        npy.convert(header_rows([0., 5.]), tmp_path, slices, size=512, n_jobs=1, progress=False, free=1_000_000)
    assert e.value.errno == errno.ENOSPC and not list(tmp_path.glob("*.npy"))


def test_a_full_disk_names_the_path_and_keeps_what_was_done(tmp_path, monkeypatch):
    from rsna_helpers import storage
    if not os.path.exists("/dev/full"): pytest.skip("no /dev/full on this system")
    rows = pd.concat([header_rows([0., 5.], study=s, series=s) for s in ("s1", "s2", "s3")], ignore_index=True)
    class Full(storage.StackFile):
        def __enter__(self):
            super().__enter__()
            if self.path.stem == "s2": self.file.close(); self.file = open("/dev/full", "wb", buffering=0)
            return self
    with monkeypatch.context() as m:
        m.setattr("rsna_helpers.stacks.StackFile", Full)
        with pytest.raises(OSError, match="No space left on device.*s2.npy"): npy.convert(rows, tmp_path, slices, size=16, n_jobs=1, progress=False)
    assert [p.name for p in tmp_path.glob("*.npy")] == ["s1.npy"]
    seen = []
    index = npy.convert(rows, tmp_path, lambda p: seen.append(p) or slices(p), size=16, n_jobs=1, progress=False)
    assert len(seen) == 4 and (index.position >= 0).all()


def test_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path/"file").write_text("in the way")
    with pytest.raises(OSError, match="file"): npy.convert(header_rows([0.]), tmp_path/"file"/"npy", slices, n_jobs=1, progress=False)


def test_a_file_that_vanishes_has_a_row_and_a_folder_that_vanishes_stops_the_run(tmp_path):
    dicom_files(tmp_path/"in"); headers = npy.folder_headers(tmp_path/"in", n_jobs=1, progress=False)
    (tmp_path/"in"/"IM0097").unlink()
    index = npy.convert(headers, tmp_path/"a", dicom.read_image, size=16, n_jobs=1, progress=False)
    lost = index[index.position < 0]; assert len(index) == 6 and lost.path.str.endswith("IM0097").all() and lost.error.str.contains("No such file").all()
    (tmp_path/"in").rename(tmp_path/"unmounted")
    for _ in range(2):                                                   # gone, and a mount point without its disk
        with pytest.raises(FileNotFoundError, match="folder of the images is gone"): npy.convert(headers, tmp_path/"b", dicom.read_image, size=16, n_jobs=1, progress=False)
        (tmp_path/"in").mkdir(exist_ok=True)


def test_stacks_that_do_not_belong_are_replaced_and_other_files_left_alone(tmp_path):
    rows = pd.concat([header_rows([0., 5.], study=s, series=s) for s in ("s1", "s2")], ignore_index=True); np.save(tmp_path/"mine.npy", np.zeros(3))
    npy.convert(rows, tmp_path, slices, size=16, n_jobs=1, progress=False)
    index = npy.convert(rows[rows.study == "s2"], tmp_path, slices, size=32, n_jobs=1, progress=False)
    assert sorted(p.name for p in tmp_path.glob("*.npy")) == ["mine.npy", "s2.npy"] and npy.load_stack(tmp_path, "s2").shape == (2, 32, 32) and set(index.study) == {"s2"}
