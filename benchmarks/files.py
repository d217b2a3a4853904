"""The files that are measured on: phantom studies, written again under new names until there are enough.

Pixels and headers are those of `rsna_helpers.phantom` (512 x 512, 16-bit signed and 12-bit unsigned, explicit and implicit), without its
oddities, and with valid UIDs: pydicom warns about those of the competition, which would slow the peers down."""
import copy
import functools
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pydicom
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLosslessSV1

from rsna_helpers import phantom

ROOT = "1.2.826.0.1.3680043.8.498.2019"


@functools.lru_cache
def base_studies() -> list: # four lists of datasets in order of z
    "A few studies of the phantom: signed and unsigned, then the same implicit."
    plan = phantom.plan_hemorrhage(4, 0, seed=2019).drop_duplicates("patient")
    plan = plan.assign(quirk="", family=["signed16", "unsigned12"]*2, implicit=[False, False, True, True])
    studies = []
    for s in plan.itertuples(index=False):
        with tempfile.TemporaryDirectory() as d, warnings.catch_warnings():
            warnings.simplefilter("ignore")                # UIDs of the form ID_... are not valid
            phantom.write_study(s, d)
            slices = sorted((pydicom.dcmread(f) for f in Path(d).glob("*.dcm")), key=lambda ds: float(ds.ImagePositionPatient[2]))
            for i, ds in enumerate(slices): identify(ds, 0, i)
            studies.append(slices)
    return studies


def compress(ds: pydicom.Dataset):
    "Turn an explicit plain dataset into JPEG Lossless SV1, in place, and check with another decoder that its pixels come back."
    import imagecodecs
    px = np.frombuffer(ds.PixelData, "<u2").reshape(ds.Rows, ds.Columns)
    frame = imagecodecs.jpeg8_encode(px, lossless=True, predictor=1, bitspersample=int(ds.BitsStored))
    if not np.array_equal(imagecodecs.ljpeg_decode(frame), px): raise ValueError("JPEG Lossless did not give the pixels back")
    ds.PixelData = encapsulate([frame]); ds["PixelData"].VR = "OB"; ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1


def identify(ds, study: int, image: int, z=None):
    "Give a dataset the identity of image `image` of study `study`."
    ds.PatientID = f"P{study:05d}"; ds.StudyInstanceUID = f"{ROOT}.{study + 1}"; ds.SeriesInstanceUID = f"{ROOT}.{study + 1}.1"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{ROOT}.{study + 1}.1.{image + 1}"; ds.InstanceNumber = image + 1
    if z is not None: ds.ImagePositionPatient = [*list(ds.ImagePositionPatient)[:2], f"{z:.3f}"]


def write_study(folder: Path, slices: list, study: int, spacing=None):
    "One study as `0000.dcm`, `0001.dcm`, … in order of z; the folder appears when it is whole."
    part = folder.with_name(folder.name + ".part"); shutil.rmtree(part, ignore_errors=True); part.mkdir(parents=True)
    for i, ds in enumerate(slices): identify(ds, study, i, None if spacing is None else i*spacing); ds.save_as(part/f"{i:04d}.dcm")
    part.rename(folder)


def middle(slices: list, n: int) -> list: # the `n` slices around the middle of the head
    at = max(len(slices) - n, 0)//2
    return slices[at:at + n]


def write_set(folder, studies: int, slices: int = 30, compressed: bool = False) -> list: # a list of paths for every study
    "Studies of at most `slices` slices, a folder a study. What is there is not made again."
    folder = Path(folder); names = [folder/f"{k:05d}" for k in range(studies)]
    if not all(d.is_dir() for d in names):
        base = [middle(s, slices) for s in copy.deepcopy(base_studies())[:2 if compressed else 4]]
        if compressed: [compress(ds) for s in base for ds in s]
        for k, d in enumerate(names):
            if not d.is_dir(): write_study(d, base[k % len(base)], k)
    return [[str(f) for f in sorted(d.iterdir())] for d in names]


def write_neck(folder, slices: int = 1082) -> list: # paths
    "One study as long as the longest neck CT of RSNA 2022, 0.6 mm apart. The pixels are a head's: only their number matters here."
    folder = Path(folder)/f"neck-{slices}"
    if not folder.is_dir():
        base = copy.deepcopy(base_studies()[0]); write_study(folder, [base[i*len(base)//slices] for i in range(slices)], 99_999, spacing=.6)
    return [str(f) for f in sorted(folder.glob("*.dcm"))]


def more_names(paths: list, folder, n: int) -> list: # `n` paths
    "The same files under many names (hard links): a long table without a full disk."
    folder = Path(folder); folder.mkdir(parents=True, exist_ok=True); names = [folder/f"{i:06d}.dcm" for i in range(n)]
    for i, to in enumerate(names):
        if not to.exists(): os.link(paths[i % len(paths)], to)
    return [str(p) for p in names]


def write_broken(folder, good: str) -> list: # paths
    "Files that turn up in every large collection."
    folder = Path(folder); folder.mkdir(parents=True, exist_ok=True); data = Path(good).read_bytes()
    kinds = {"empty.dcm": b"", "text.dcm": b"patient,date\n"*40, "cut_in_header.dcm": data[:600], "cut_in_pixels.dcm": data[:len(data)//2], "no_preamble.dcm": data[132:]}
    for k, v in kinds.items(): (folder/k).write_bytes(v)
    return [str(folder/k) for k in kinds]
