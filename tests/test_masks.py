"Masks of vertebrae: geometry from the headers, what is reversed, what is damaged."
import errno
import gzip

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from standin import crude_neck

from rsna_helpers import masks, npy
from rsna_helpers.dicom import DicomError
from rsna_helpers.masks import ORI, audit_masks, check_mask, mask_files, mask_rows, open_mask, read_mask

HU, MASK, MM = crude_neck(1)


def headers_of(study="s", n=len(HU), side=64, start=7, flip_numbers=False, drop=()):
    "Header rows as `prepare_tables` gives them, for slices whose file numbers run with z or against it."
    at = [k for k in range(n) if k not in drop]; number = [start + (n - 1 - k if flip_numbers else k) for k in at]
    t = pd.DataFrame(dict(image=[f"{study}/{i}" for i in number], patient=study, study=study, series="r", split="train", path=[f"{study}/{k}" for k in at], instance=number, tilt=0., thickness=MM[2],
                          z=[-300 + MM[2]*k for k in at], spacing_row=MM[0], spacing_col=MM[1], rows=side, columns=side, error=None, pos_x=-70., pos_y=-160.))
    return t.assign(pos_z=t.z, **dict(zip(ORI, (1., 0, 0, 0, 1, 0)))).sample(frac=1, random_state=0)


def read_slice(path): return HU[int(path.split("/")[1])], {"repaired": None}


def stacked(headers, size=64, crop=False, **options):
    stack, rows = npy.stack_study(headers, read_slice, size=size, crop=crop, **options)
    return stack, pd.DataFrame(rows)


def nifti(mask=MASK, dtype=np.uint8, reverse=False, move=0., ornt=None):
    "Sagittal storage, as the competition has it: columns, rows from the back, slices from the top or the bottom."
    n, h, w = mask.shape; affine = np.array([[-MM[1], 0, 0, 70 + move], [0, MM[0], 0, 160 - MM[0]*(h - 1)], [0, 0, MM[2], -300], [0, 0, 0, 1.]])
    image = nib.Nifti1Image(mask.transpose(2, 1, 0)[:, ::-1, ::-1 if reverse else 1].astype(dtype), affine)
    return image if ornt is None else image.as_reoriented(np.array(ornt))


@pytest.mark.parametrize("ornt", [None, [(0, 1), (1, -1), (2, -1)], [(2, -1), (0, 1), (1, 1)]])
@pytest.mark.parametrize("against", [False, True])
def test_every_storage_and_numbering_gives_the_same_mask(tmp_path, ornt, against):
    stack, index = stacked(h := headers_of(flip_numbers=against)); nib.save(nifti(ornt=ornt), tmp_path/"s.nii")
    assert np.array_equal(stack, HU)
    assert np.array_equal(read_mask(tmp_path/"s.nii", mask_rows(index, h)), MASK)


def test_crop_and_size_of_the_stack_are_followed(tmp_path):
    stack, index = stacked(h := headers_of(), size=80, crop=True); nib.save(nifti(), tmp_path/"s.nii"); mask = read_mask(tmp_path/"s.nii", mask_rows(index, h))
    assert mask.shape == stack.shape and index.crop_side.iloc[0] < 64
    assert np.median(stack[mask > 0]) > 300                                             # it lies on the bone of the cut and enlarged stack
    area = (mask > 0).sum()*index.mm_row.iloc[0]*index.mm_col.iloc[0]; assert area == pytest.approx((MASK > 0).sum()*MM[0]*MM[1], rel=.02)


@pytest.mark.parametrize("change", [dict(dtype=np.float32), dict(dtype=np.int16), "gz", "slope"])
def test_number_formats(tmp_path, change):
    _, index = stacked(h := headers_of()); f = tmp_path/("s.nii.gz" if change == "gz" else "s.nii"); image = nifti(**(change if isinstance(change, dict) else {}))
    if change == "slope":                                                                # stored doubled, with a slope of one half
        nib.save(nifti(MASK*2), f); raw = bytearray(f.read_bytes()); raw[112:120] = np.array([.5, 0], "<f4").tobytes(); f.write_bytes(raw)
    else: nib.save(image, f)
    assert mask_files(tmp_path) == {"s": f} and np.array_equal(read_mask(f, mask_rows(index, h)), MASK)


def test_gap_and_unreadable_slices(tmp_path):
    nib.save(nifti(), tmp_path/"whole.nii"); keep = [k for k in range(len(HU)) if k not in (20, 21)]
    _, index = stacked(h := headers_of(drop=(20, 21)))
    assert np.array_equal(read_mask(tmp_path/"whole.nii", mask_rows(index, h)), MASK[keep])               # the mask knows slices that the study lacks
    nib.save(nifti(MASK[keep]), tmp_path/"same.nii")
    assert np.array_equal(read_mask(tmp_path/"same.nii", mask_rows(index, h)), MASK[keep])                 # one slice a file, whatever the affine says of the gap
    def broken(path):
        if path.endswith("/30"): raise DicomError(path, "broken")
        return read_slice(path)
    stack, rows = npy.stack_study(h := headers_of(), broken, size=64, crop=False)
    assert np.array_equal(read_mask(tmp_path/"whole.nii", mask_rows(pd.DataFrame(rows), h)), np.delete(MASK, 30, 0))


def test_reversed_masks_are_found_and_turned(tmp_path):
    stack, index = stacked(h := headers_of()); nib.save(nifti(reverse=True), tmp_path/"s.nii"); mask, row = check_mask(tmp_path/"s.nii", mask_rows(index, h), stack)
    assert row["ok"] and row["reversed"] and row["flip"] == "z" and row["order"] < 0 < row["bone_turned"] - row["bone"] and np.array_equal(mask, MASK)
    nib.save(nifti(move=500., reverse=True), tmp_path/"s.nii"); mask, row = check_mask(tmp_path/"s.nii", mask_rows(index, h), stack)
    assert row["reversed"] and "placed by its shape" in row["note"] and np.array_equal(mask, MASK)
    upside = np.where(MASK, 10 - MASK, 0); nib.save(nifti(upside), tmp_path/"s.nii"); mask, row = check_mask(tmp_path/"s.nii", mask_rows(index, h), stack)
    assert mask is None and not row["ok"] and "contradict" in row["wrong"]


def test_damaged_masks_are_rows(tmp_path):
    names = ["good", "zero", "text", "cut", "cutgz", "other", "empty", "labels", "flat", "volumes", "nowhere", "hole"]
    tables = {s: headers_of(s) for s in names if s != "nowhere"}; h = pd.concat(tables.values()); index = pd.concat([stacked(t)[1] for t in tables.values()])
    save = lambda image, s: nib.save(image, tmp_path/f"{s}.nii")
    save(nifti(), "good"); (tmp_path/"zero.nii").touch(); (tmp_path/"text.nii").write_bytes(b"StudyInstanceUID,C1\n"*99); (tmp_path/"cut.nii").write_bytes((tmp_path/"good.nii").read_bytes()[:9000])
    (tmp_path/"cutgz.nii.gz").write_bytes(gzip.compress((tmp_path/"good.nii").read_bytes())[:900])
    save(nifti(MASK[:, :40, :30], move=900.), "other"); save(nifti(MASK*0), "empty"); save(nifti(MASK*5), "labels"); save(nib.Nifti1Image(MASK[0], np.eye(4)), "flat")
    save(nib.Nifti1Image(np.stack([MASK, MASK], 3), np.eye(4)), "volumes"); save(nifti(), "nowhere"); save(nib.Nifti1Image(np.full(MASK.T.shape, np.nan, np.float32), nifti().affine), "hole")
    kept = []; t = audit_masks(mask_files(tmp_path), index, h, lambda s: HU, lambda s, rows, stack, mask: kept.append(s), progress=False)
    assert sorted(t.index) == sorted(names) and t.index[t.ok].tolist() == kept == ["good"]
    for study, why in dict(zero="0 bytes", text="not a NIfTI", cut="cut off", cutgz="cut off", other="does not fit the study", empty="empty", labels="unknown labels", flat="volume of labels", volumes="volume of labels", nowhere="no stack", hole="empty").items():
        assert why in t.wrong[study], (study, t.wrong[study])


def test_random_damage_never_raises(tmp_path):
    stack, index = stacked(h := headers_of()); rows = mask_rows(index, h); nib.save(nifti(), tmp_path/"s.nii"); whole = (tmp_path/"s.nii").read_bytes(); rng = np.random.default_rng(0); bad = 0
    for _ in range(60):
        raw = bytearray(whole)
        for at in rng.integers(0, 352, 6): raw[at] = rng.integers(256)
        (tmp_path/"s.nii").write_bytes(raw); mask, row = check_mask(tmp_path/"s.nii", rows, stack); bad += mask is None
        assert (mask is None) == bool(row["wrong"]) and (mask is None or mask.shape == HU.shape)
    assert bad > 5


def test_faults_of_the_machine_are_not_faults_of_the_file(tmp_path, monkeypatch):
    nib.save(nifti(), tmp_path/"s.nii")
    def full(*_): raise OSError(errno.EIO, "input/output error")
    monkeypatch.setattr(masks.nib, "load", full)
    with pytest.raises(OSError) as e: open_mask(tmp_path/"s.nii")
    assert not isinstance(e.value, DicomError)
