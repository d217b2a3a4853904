"A neck CT competition in little: 8 + 2 studies of some 12 slices, 64 px, in the exact layout of RSNA 2022, quirks included."
import io
from pathlib import Path

import imagecodecs
import numpy as np
import pandas as pd
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian

LEVELS = [f"C{i}" for i in range(1, 8)]
LABELS = ["patient_overall", *LEVELS]
UID = "1.2.826.0.1.3680043."
TRAIN = {UID + n: y for n, y in {"10": [], "99": [2], "1363": [5, 6], "2243": [], "6200": [7], "777": [1], "20120": [], "24606": [2, 3, 7]}.items()}    # as text, 10 comes before 1363 before 777
TEST = [UID + "5", UID + "31000"]
GAP, DESCENDING, LOSSLESS, FIRST = UID + "1363", UID + "99", UID + "2243", {UID + "10": 1, UID + "99": 95}    # numbers of files start at 4 elsewhere
yy, xx = np.mgrid[-32:32, -32:32]


def slice_hu(rng, k: int) -> np.ndarray:
    "A neck of noise with a disc of bone that drifts from slice to slice."
    hu = np.where(np.hypot(yy, xx) < 26, 40, -1000) + rng.normal(0, 60, (64, 64))*(np.hypot(yy, xx) < 26)
    return np.where(np.hypot(yy - 8 + k/3, xx) < 7 + k % 3, 700 + rng.normal(0, 60, (64, 64)), hu).round().astype(np.int16)


def dicom(hu, study: str, number: int, z: float, lossless: bool) -> bytes:
    "One file: no Modality, two windows, 0.5 mm pixels."
    meta = FileMetaDataset(); meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"; meta.MediaStorageSOPInstanceUID = f"{study}.1.{number}"
    meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.70" if lossless else ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0"*128); px = (hu.astype(int) + 1024).astype("<u2")
    tags = dict(SOPInstanceUID=f"{study}.1.{number}", StudyInstanceUID=study, SeriesInstanceUID=f"{study}.1", PatientID=study.rpartition(".")[2], InstanceNumber=number, SliceThickness=1,
                ImagePositionPatient=[-16, -16, z], ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[.5, .5], RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=[450, 40], WindowWidth=[1500, 350],
                SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", Rows=64, Columns=64, BitsAllocated=16, BitsStored=16, HighBit=15, PixelRepresentation=0)
    for k, v in tags.items(): setattr(ds, k, v)
    ds.PixelData = encapsulate([imagecodecs.ljpeg_encode(px, bitspersample=16)]) if lossless else px.tobytes()
    ds["PixelData"].VR = "OB" if lossless else "OW"; ds["PixelData"].is_undefined_length = lossless
    out = io.BytesIO(); ds.save_as(out, enforce_file_format=True) if hasattr(ds, "set_pixel_data") else ds.save_as(out, write_like_original=False)
    return out.getvalue()


def write_study(folder: Path, study: str, seed: int):
    rng, n = np.random.default_rng(seed), 12; first = FIRST.get(study, 4); folder.mkdir(parents=True)
    for k in range(n):
        number = first + (n - 1 - k if study == DESCENDING else k)
        if study == GAP and k == 5: continue
        (folder/f"{number}.dcm").write_bytes(dicom(slice_hu(rng, k), study, number, 100 + .8*k, study == LOSSLESS))


def write_neck(raw: Path, stub: bool = False) -> Path:
    "All files. `stub`: the sample asks for three rows of studies that have no images, as in public."
    for split, studies in (("train", TRAIN), ("test", TEST)):
        for k, study in enumerate(studies): write_study(raw/f"{split}_images"/study, study, 100*(split == "test") + k)
    rows = [[s, int(bool(y)), *(int(i in y) for i in range(1, 8))] for s, y in TRAIN.items()]
    pd.DataFrame(rows, columns=["StudyInstanceUID", *LABELS]).to_csv(raw/"train.csv", index=False)
    asked = [(UID + "10197", "C1"), (UID + "10454", "patient_overall"), (UID + "10690", "C7")] if stub else [(s, l) for s in TEST[::-1] for l in [*LEVELS, "patient_overall"]]
    t = pd.DataFrame(asked, columns=["StudyInstanceUID", "prediction_type"]); t.insert(0, "row_id", t.StudyInstanceUID + "_" + t.prediction_type)
    t.to_csv(raw/"test.csv", index=False); t[["row_id"]].assign(fractured=.5).to_csv(raw/"sample_submission.csv", index=False)
    boxes = [(UID + "6200", 20.5, 18., 12., 9.25, n) for n in (9, 10, 11)] + [(UID + "99", 25., 20., 8., 8., n) for n in (98, 99)]
    pd.DataFrame(boxes, columns=["StudyInstanceUID", "x", "y", "width", "height", "slice_number"]).to_csv(raw/"train_bounding_boxes.csv", index=False)
    (raw/"segmentations").mkdir(); (raw/"segmentations"/f"{UID}1363.nii").touch(); (raw/"segmentations"/f"{UID}10.nii").write_bytes(b"\0"*352)
    return raw
