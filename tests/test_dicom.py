"""Reading one file: every quirk of facts.md with files written here, broken files, and real samples where they are at hand."""
import errno, multiprocessing, os, pickle, time, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset

from rsna_helpers import dicom
from rsna_helpers.dicom import (AIR, COLUMNS, DicomError, WINDOWS, apply_window, fix_intercept, header_table, read_header,
                                read_image, slice_normal, slice_position)

SAMPLES = Path(os.environ.get("RSNA_SAMPLES") or Path(__file__).resolve().parents[2]/"shared"/"data"/"real_dicom")
real = pytest.mark.skipif(not SAMPLES.is_dir(), reason="no real samples: set RSNA_SAMPLES")
IMPLICIT, EXPLICIT, BIG, DEFLATED = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"

yy, xx = np.mgrid[-32:32, -40:40] # not square, so that swapped sides show
RADIUS = np.hypot(yy, xx)
HEAD = (np.select([RADIUS < 20, RADIUS < 23], [40, 900], -1000) + (yy + xx) % 3).astype("int16")
WRAPPED = (HEAD.astype(int) % 4096).astype("uint16")
U12 = dict(BitsStored=12, HighBit=11, PixelRepresentation=0)
NO_RESCALE = dict(RescaleSlope=None, RescaleIntercept=None)


def write(path, px=None, meta=EXPLICIT, preamble=True, pixels=None, **tags):
    "A CT file; `tags` override or, with None, remove attributes; `pixels` are the bytes of PixelData."
    px = (HEAD + 1024).astype("int16") if px is None else px
    ds = Dataset()
    values = dict(PatientID="ID_p", StudyInstanceUID="ID_s", SeriesInstanceUID="ID_r", SOPInstanceUID="ID_a",
        SOPClassUID="1.2.840.10008.5.1.4.1.1.2", Modality="CT", Rows=px.shape[0], Columns=px.shape[1],
        BitsAllocated=px.dtype.itemsize * 8, BitsStored=px.dtype.itemsize * 8, HighBit=px.dtype.itemsize * 8 - 1,
        PixelRepresentation=int(px.dtype.kind == "i"), SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2",
        RescaleSlope="1", RescaleIntercept="-1024", WindowCenter=["40", "80"], WindowWidth=["80", "200"],
        PixelSpacing=["0.5", "0.75"], ImagePositionPatient=["-16", "-16", "7.5"], ImageOrientationPatient=["1", "0", "0", "0", "1", "0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k, v in (values | tags).items():
            if v is not None: setattr(ds, k, v)
        ds.PixelData = px.astype(px.dtype.newbyteorder(">" if meta == BIG else "<")).tobytes() if pixels is None else pixels
        ds["PixelData"].VR = "OW" if ds.BitsAllocated > 8 else "OB"
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = meta
        ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, "ID_a"
        pydicom.dcmwrite(path, ds, enforce_file_format=True)
    if not preamble:
        data = Path(path).read_bytes()
        Path(path).write_bytes(data[144 + int.from_bytes(data[140:144], "little"):])
    return path


@pytest.fixture
def file(tmp_path):
    "Write to a path of this test's own."
    return lambda *args, name="a.dcm", **kwargs: write(tmp_path/name, *args, **kwargs)


def only_dicom_error(path):
    "Read every way there is: a result that makes sense, or a DicomError that names the file; and soon."
    start = time.perf_counter()
    try:
        hu, header = read_image(path)
        assert hu.shape == (header["Rows"], header["Columns"]) and np.isfinite(hu).all()
    except DicomError as e:
        assert e.path == os.fspath(path) and e.cause and "\n" not in str(e)
        hu = None
    row = header_table([path], progress=False).iloc[0]
    assert row.path == os.fspath(path)
    assert time.perf_counter() - start < 20
    return hu, row.error


# ---------- header

@pytest.mark.parametrize("meta", [IMPLICIT, EXPLICIT, BIG, DEFLATED])
def test_header_in_every_encoding(file, meta):
    h = read_header(file(meta=meta, PixelPaddingValue=-2000, InstanceNumber="7", NumberOfFrames="1", PatientAge="065Y"))
    want = dict(PatientID="ID_p", SOPInstanceUID="ID_a", Rows=64, Columns=80, InstanceNumber=7, RescaleIntercept=-1024., WindowCenter=[40., 80.],
                PixelSpacing=[.5, .75], ImagePositionPatient=[-16., -16., 7.5], PixelPaddingValue=-2000, NumberOfFrames=1,
                PatientAge="065Y", TransferSyntaxUID=meta, Manufacturer=None, SliceThickness=None, warnings=[])
    assert {k: h[k] for k in want} == want
    assert all(isinstance(v, (str, int, float, list, type(None))) for v in h.values())


def test_invalid_uid_is_silent_and_filters_stay(file):
    path, filters = file(), list(warnings.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(path)[1]["StudyInstanceUID"] == "ID_s"
    assert warnings.filters == filters


def test_without_preamble(file):
    assert np.array_equal(read_image(file(preamble=False))[0], HEAD)


@pytest.mark.parametrize("old, new, key", [(b"-1024 ", b"water ", "RescaleIntercept"), (b"-1024 ", b"1\\2   ", "RescaleIntercept"), (b"-1024 ", b"1e9999", "RescaleIntercept"),
    (b"-1024 ", b"nan   ", "RescaleIntercept"), (b"-16\\-16\\7.5 ", b"-16\\-16 7.5 ", "ImagePositionPatient"), (b"0.5\\0.75", b"\\\\\\\\\\\\\\\\", "PixelSpacing"), (b"40\\80 ", b"40\\\xff\xfe ", "WindowCenter")])
def test_garbled_value_costs_one_key(file, old, new, key):
    path = file()
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    h = read_header(path)
    assert h[key] is None and len(h["warnings"]) == 1 and h["warnings"][0].startswith(key) and h["Rows"] == 64
    assert header_table([path], progress=False).warnings[0] == h["warnings"][0]


def test_padding_sign_follows_pixels(file):
    path = file(PixelPaddingValue=-2000)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\x28\x00\x20\x01SS", b"\x28\x00\x20\x01US"))
    assert read_header(path)["PixelPaddingValue"] == -2000


# ---------- pixels

@pytest.mark.parametrize("meta", [IMPLICIT, EXPLICIT, BIG, DEFLATED])
@pytest.mark.parametrize("dtype", ["int16", "uint16", "int32"])
def test_uncompressed(file, meta, dtype):
    hu, h = read_image(file((HEAD + 1024).astype(dtype), meta=meta))
    assert np.array_equal(hu, HEAD) and hu.dtype == np.int16 and h["repaired"] is None


@pytest.mark.parametrize("meta", [EXPLICIT, BIG])
def test_8_bit(file, meta):
    px = np.random.default_rng(0).integers(0, 256, (6, 8), "uint8")
    assert np.array_equal(read_image(file(px, meta=meta, Modality="CR", **NO_RESCALE))[0], px)


def test_slope(file):
    hu, _ = read_image(file(RescaleSlope="0.5", RescaleIntercept="-512.25"))
    assert hu.dtype == np.float32 and np.allclose(hu, HEAD / 2 - .25)
    hu, _ = read_image(file((HEAD + 1024).astype("uint16"), RescaleSlope="100", Modality="MR"))
    assert hu.dtype == np.float32 and hu.max() == (int(HEAD.max()) + 1024) * 100 - 1024


def test_slope_0_is_said(file):
    hu, h = read_image(file(RescaleSlope="0"))
    assert np.array_equal(hu, HEAD) and "RescaleSlope 0" in h["warnings"][0]


def test_rescale_absent(file):
    assert np.array_equal(read_image(file(HEAD, **NO_RESCALE))[0], HEAD)


@pytest.mark.parametrize("signed", [0, 1])
def test_unused_high_bits(file, signed):
    px = HEAD if signed else HEAD + 1024
    rubbish = np.random.default_rng(0).integers(0, 16, HEAD.shape, "uint16") << 12
    hu, _ = read_image(file((px.astype("uint16") & 0xFFF) | rubbish, BitsStored=12, HighBit=11, PixelRepresentation=signed,
                            RescaleIntercept="0" if signed else "-1024"))
    assert np.array_equal(hu, HEAD)


def test_high_bit_at_the_top(file):
    hu, _ = read_image(file((HEAD + 1024).astype("uint16") << 4, BitsStored=12, HighBit=15, PixelRepresentation=0))
    assert np.array_equal(hu, HEAD)


@pytest.mark.parametrize("tag, value", [(None, -2000), (-2000, -2000), (-1500, -1500), (-32768, -2000), (3000, 3000)])
def test_padding_becomes_air(file, tag, value):
    hu, _ = read_image(file(np.where(RADIUS > 30, value, HEAD).astype("int16"), RescaleIntercept="0", PixelPaddingValue=tag))
    want = np.where(RADIUS > 30, AIR, HEAD)
    assert np.array_equal(hu, want)


def test_padding_above_bits_stored(file):
    px = np.where(RADIUS > 30, 63536, HEAD + 1024).astype("uint16")
    hu, _ = read_image(file(px, PixelPaddingValue=63536, **U12))
    assert np.array_equal(hu, np.where(RADIUS > 30, AIR, HEAD))


def test_padding_named_like_water_spares_water(file):
    px = np.where(RADIUS > 30, 0, HEAD).astype("int16")
    px[30:34, 30:34] = 0
    hu, _ = read_image(file(px, RescaleIntercept="0", PixelPaddingValue=0))
    assert (hu[30:34, 30:34] == 0).all() and (hu[RADIUS > 30] == AIR).all()


def test_padding_of_a_radiograph_is_its_darkest_value(file):
    px = (HEAD + 1100).astype("uint16")
    hu, _ = read_image(file(np.where(RADIUS > 30, 65535, px).astype("uint16"), Modality="DX", PixelPaddingValue=65535, **NO_RESCALE))
    assert (hu[RADIUS > 30] == px[RADIUS <= 30].min()).all()
    assert np.array_equal(hu[RADIUS <= 30], px[RADIUS <= 30])


@pytest.mark.parametrize("intercept", ["0", "1", None])
def test_wrong_intercept(file, intercept):
    hu, h = read_image(file(WRAPPED, RescaleIntercept=intercept, **U12))
    assert np.array_equal(hu, HEAD) and "-1000" in h["repaired"]


def test_plain_unsigned_12_bit_is_left_alone(file):
    plain = np.clip(HEAD, 0, 4095).astype("uint16")
    hu, h = read_image(file(plain, RescaleIntercept="0", **U12))
    assert np.array_equal(hu, plain) and h["repaired"] is None and "kept" in h["warnings"][0]


def test_signed_12_bit_with_intercept_0_is_right(file):
    hu, h = read_image(file(HEAD & 0xFFF, BitsStored=12, HighBit=11, RescaleIntercept="0"))
    assert np.array_equal(hu, HEAD) and h["repaired"] is None and not h["warnings"]


@pytest.mark.parametrize("modality", ["CR", "DX", "MR"])
def test_intercept_of_other_modalities(file, modality):
    hu, h = read_image(file(WRAPPED, Modality=modality, RescaleIntercept="0", **U12))
    assert np.array_equal(hu, WRAPPED) and h["repaired"] is None


def test_fix_intercept_keeps_its_input():
    px, h = WRAPPED.copy(), dict(Modality=None, PixelRepresentation=0, BitsStored=12, SamplesPerPixel=1, RescaleSlope=None, RescaleIntercept=0.)
    x, intercept, note = fix_intercept(px, h)
    assert np.array_equal(x + intercept, HEAD) and note and np.array_equal(px, WRAPPED)


@pytest.mark.parametrize("signed", [0, 1])
def test_monochrome1(file, signed):
    px = HEAD + 1000
    film = (-1 - px).astype("int16") & 0xFFF if signed else 4095 - px
    hu, h = read_image(file(film.astype("uint16"), Modality="DX", PhotometricInterpretation="MONOCHROME1", **(U12 | dict(PixelRepresentation=signed)), **NO_RESCALE))
    assert np.array_equal(hu, px) and "MONOCHROME1" in h["repaired"]


def test_monochrome1_ct_with_air_around_stays(file):
    hu, h = read_image(file(PhotometricInterpretation="MONOCHROME1"))
    assert np.array_equal(hu, HEAD) and h["repaired"] is None


@pytest.mark.parametrize("planar", [0, 1])
def test_colour_becomes_luma(file, planar):
    rgb = np.random.default_rng(1).integers(0, 256, (6, 8, 3), "uint8")
    raw = (rgb.transpose(2, 0, 1) if planar else rgb).tobytes()
    tags = dict(Modality="CR", SamplesPerPixel=3, PlanarConfiguration=planar, **NO_RESCALE)
    path = file(rgb[..., 0], pixels=raw, PhotometricInterpretation="RGB", **tags)
    assert np.abs(read_image(path)[0] - rgb @ [.299, .587, .114]).max() <= .51
    path = file(rgb[..., 0], pixels=raw, PhotometricInterpretation="YBR_FULL", **tags)
    assert np.array_equal(read_image(path)[0], rgb[..., 0])


@pytest.mark.parametrize("tags, cause", [(dict(Rows=0), "0 x 80"), (dict(Rows=65535, Columns=65535), "65535 x 65535"), (dict(Rows=None), "no Rows"),
    (dict(NumberOfFrames=3), "NumberOfFrames 3"), (dict(SamplesPerPixel=2), "SamplesPerPixel 2"), (dict(BitsAllocated=12), "BitsAllocated 12"),
    (dict(BitsAllocated=None), "BitsAllocated None"), (dict(BitsStored=17), "BitsStored 17"), (dict(HighBit=3), "HighBit 3"),
    (dict(PhotometricInterpretation="PALETTE COLOR"), "PALETTE"), (dict(Rows=65), "10240 of 10400 bytes"), (dict(pixels=b""), "no PixelData"),
    (dict(RescaleSlope="1e300"), "out of range")])
def test_refused(file, tags, cause):
    tags = dict(tags)
    path = file(**tags) if "BitsAllocated" not in tags else file(HEAD, **{k: v for k, v in tags.items() if k != "BitsAllocated"})
    if "BitsAllocated" in tags: # pydicom itself would not write it
        data, want = path.read_bytes(), tags["BitsAllocated"]
        field = b"\x28\x00\x00\x01US\x02\x00\x10\x00"
        assert data.count(field) == 1
        path.write_bytes(data.replace(field, field[:-2] + want.to_bytes(2, "little") if want else b""))
    with pytest.raises(DicomError, match=cause): read_image(path)


# ---------- pictures

@pytest.mark.parametrize("ending", ["png", "jpg", "dcm"]) # the content decides, not the name
def test_picture(tmp_path, ending):
    px = np.uint8((xx + 40) * 3)
    path = tmp_path/f"a.{ending}"
    Image.fromarray(px).save(path, format="JPEG" if ending == "jpg" else "PNG", **(dict(quality=95) if ending == "jpg" else {}))
    got, h = read_image(path)
    assert got.dtype == np.uint8 and np.abs(got.astype(int) - px).max() <= (4 if ending == "jpg" else 0)
    assert (h["Rows"], h["Columns"], h["PatientID"], h["repaired"]) == (64, 80, None, None)


def test_picture_window(tmp_path):
    path, (center, width) = tmp_path/"a.png", WINDOWS["subdural"]
    hu = np.clip(HEAD, center - width / 2, center + width / 2)
    Image.fromarray(np.uint8(np.rint((hu - center + width / 2) / width * 255))).save(path)
    got, _ = read_image(path, window=(center, width))
    white = hu >= center + width * (252 / 255 - .5)
    assert got.dtype == np.float32 and np.abs(got - hu)[~white].max() <= width / 255 / 2 + 1e-3
    assert white.any() and (got[white] == dicom.BONE).all()      # cut off by the window: bone, whatever it was
    for bad in [(40, 0), (40, -1), (np.nan, 80), (40,)]:
        with pytest.raises(ValueError, match="window"): read_image(path, window=bad)


def test_picture_16_bit_and_colour(tmp_path):
    px = (HEAD.astype(int) + 30000).astype("uint16")
    Image.fromarray(px).save(tmp_path/"a.png")
    got, _ = read_image(tmp_path/"a.png")
    assert got.dtype == np.uint16 and np.array_equal(got, px)
    with pytest.raises(DicomError, match="16 bits"): read_image(tmp_path/"a.png", window=(40, 80))
    rgb = np.random.default_rng(1).integers(0, 256, (6, 8, 3), "uint8")
    Image.fromarray(rgb).save(tmp_path/"b.png")
    got, h = read_image(tmp_path/"b.png")
    assert got.ndim == 2 and np.abs(got - rgb @ [.299, .587, .114]).max() <= 1 and h["PhotometricInterpretation"] == "RGB"


# ---------- broken files

def test_error_survives_a_process():
    e = pickle.loads(pickle.dumps(DicomError(Path("a.dcm"), "why")))
    assert (str(e), e.path, e.cause) == ("a.dcm: why", "a.dcm", "why") and isinstance(e, ValueError)


@pytest.mark.parametrize("content", [b"", b"\0", b"ID,Label\n" * 5000, bytes(100_000), bytes(128) + b"DICM", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"\x08\x00\x05\x00" * 99,
                                     np.random.default_rng(0).bytes(100_000), np.random.default_rng(1).bytes(1_000_000)], ids=range(10))
def test_no_image(tmp_path, content):
    (tmp_path/"a.dcm").write_bytes(content)
    for read in (read_header, read_image):
        with pytest.raises(DicomError): read(tmp_path/"a.dcm")


def test_no_file(tmp_path):
    with pytest.raises(DicomError, match="No such file"): read_image(tmp_path/"absent.dcm")
    with pytest.raises(DicomError, match="directory"): read_image(tmp_path)


def test_machine_faults_pass(file, monkeypatch):
    path = file()
    for error in (MemoryError(), KeyboardInterrupt(), OSError(errno.EMFILE, "Too many open files"), OSError(errno.ENOSPC, "No space left")):
        def fail(*args, **kwargs): raise error
        monkeypatch.setattr(dicom.pydicom, "dcmread", fail)
        for call in (read_header, read_image, lambda p: header_table([p], n_jobs=1, progress=False)):
            with pytest.raises(type(error)): call(path)


@pytest.mark.parametrize("meta", [IMPLICIT, EXPLICIT, BIG, DEFLATED])
def test_truncated_anywhere(file, meta):
    path = file(meta=meta)
    data = path.read_bytes()
    cuts = sorted({*range(0, min(900, len(data)), 7), *np.linspace(0, len(data) - 1, 30).astype(int), *range(len(data) - 4, len(data))})
    for cut in cuts:
        path.write_bytes(data[:cut])
        hu, error = only_dicom_error(path)
        assert hu is None, f"{cut} of {len(data)} bytes were taken for a whole image"
        if meta != DEFLATED: assert error, f"header_table is content with {cut} of {len(data)} bytes"


def test_truncation_is_counted(file):
    path = file()
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DicomError, match="9240 of 10240 bytes"): read_image(path)
    assert header_table([path], progress=False).error[0] == "PixelData truncated: 9240 of 10240 bytes"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("meta", [IMPLICIT, EXPLICIT, BIG, DEFLATED])
def test_flipped_bytes(file, meta):
    path, rng = file(meta=meta), np.random.default_rng(5)
    data = np.frombuffer(path.read_bytes(), "uint8")
    for _ in range(120):
        broken = data.copy()
        where = rng.integers(0, min(len(data), 900), rng.integers(1, 12))
        broken[where] = rng.integers(0, 256, len(where))
        path.write_bytes(broken.tobytes())
        only_dicom_error(path)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_broken_picture(tmp_path, form):
    path, rng = tmp_path/"a", np.random.default_rng(6)
    Image.fromarray(rng.integers(0, 256, (40, 50), "uint8")).save(path, format=form)
    data = path.read_bytes()
    for cut in range(0, len(data) - 20, 97):
        path.write_bytes(data[:cut])
        assert only_dicom_error(path)[0] is None
    for _ in range(60):
        broken = np.frombuffer(data, "uint8").copy()
        broken[rng.integers(0, len(data), 5)] = rng.integers(0, 256, 5)
        path.write_bytes(broken.tobytes())
        only_dicom_error(path)


# ---------- table

def test_header_table(file, tmp_path):
    good = [file(name=f"ID_{i}.dcm", ImagePositionPatient=["0", "0", str(5 * i)], InstanceNumber=str(i)) for i in range(5)]
    (tmp_path/"text.dcm").write_text("no image")
    paths = [good[3], tmp_path/"text.dcm", tmp_path/"absent.dcm", str(good[1])]
    df = header_table(paths, progress=False)
    assert list(df.columns) == COLUMNS and list(df.path) == [os.fspath(p) for p in paths]
    assert list(df.image) == ["ID_3", "text", "absent", "ID_1"]
    assert df.error[0] is None and df.error[3] is None and "not a DICOM" in df.error[1] and "No such file" in df.error[2]
    first = df.iloc[0]
    want = dict(patient="ID_p", study="ID_s", series="ID_r", sop="ID_a", modality="CT", instance=3, rows=64, columns=80, bits_allocated=16, bits_stored=16,
        signed=1, photometric="MONOCHROME2", slope=1, intercept=-1024, window_center=40, window_width=80, n_windows=2, window_centers="40\\80",
        window_widths="80\\200", spacing_row=.5, spacing_col=.75, pos_z=15, ori_0=1, ori_4=1, z=15, tilt=0, samples=1, transfer_syntax=EXPLICIT,
        file_bytes=good[3].stat().st_size)
    assert {k: first[k] for k in want} == want
    assert np.isnan(first.padding) and first.sex is None and np.isnan(df.rows[1]) and df.file_bytes[1] == 8
    whole = header_table(good, progress=False)
    assert whole.rows.dtype == np.int64 and whole.error.isna().all()


def test_header_table_workers_agree_and_keep_order(file, tmp_path):
    (tmp_path/"bad.dcm").write_bytes(b"bad")
    files = [file(name=f"{i}.dcm", InstanceNumber=str(i)) for i in range(30)] + [tmp_path/"bad.dcm"]
    paths = [files[i] for i in np.random.default_rng(0).integers(0, len(files), 650)]
    one, two = header_table(paths, n_jobs=1, progress=False), header_table(paths, n_jobs=2, progress=False)
    pd.testing.assert_frame_equal(one, two)
    assert list(two.path) == [os.fspath(p) for p in paths]


def test_header_table_of_nothing():
    df = header_table([], progress=False)
    assert len(df) == 0 and list(df.columns) == COLUMNS
    with pytest.raises(TypeError, match="list of files"): header_table("a.dcm")


# ---------- geometry and windows

def test_geometry():
    rng = np.random.default_rng(0)
    for _ in range(20):
        q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        iop, normal = [*q[:, 0], *q[:, 1]], np.cross(q[:, 0], q[:, 1])
        assert np.allclose(slice_normal(iop), normal)
        origin = rng.normal(size=3) * 100
        # a move within the plane changes nothing, a move along the normal is measured in mm
        assert np.isclose(slice_position(origin + 3 * q[:, 0] - 7 * q[:, 1] + 5 * normal, iop) - slice_position(origin, iop), 5)
    for bad in ([0] * 6, [1, 0, 0] * 2, [1, 0, 0], [np.nan] * 6):
        with pytest.raises(ValueError, match="ImageOrientationPatient"): slice_normal(bad)
    with pytest.raises(ValueError, match="ImagePositionPatient"): slice_position([1, 2], [1, 0, 0, 0, 1, 0])


def test_window_is_the_standards():
    for center, width in [*WINDOWS.values(), (-600, 1500), (0, 2)]:
        for x in np.linspace(center - width, center + width, 41).tolist() + [-32768, 32767]:
            if x <= center - .5 - (width - 1) / 2: want = 0 # the pseudo-code of C.11.2.1.2.1
            elif x > center - .5 + (width - 1) / 2: want = 1
            else: want = (x - (center - .5)) / (width - 1) + .5
            assert np.isclose(apply_window(np.array([x]), center, width)[0], want, atol=1e-4)
    got = apply_window(HEAD, 40, 80)
    assert got.dtype == np.float32 and got.shape == HEAD.shape and 0 <= got.min() and got.max() <= 1
    for width in (0, -1, np.nan):
        with pytest.raises(ValueError, match="width"): apply_window(HEAD, 40, width)


# ---------- compressed streams and real files

def to_rle(path):
    "Compress a file in place."
    ds = pydicom.dcmread(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.compress(pydicom.uid.RLELossless)
        ds.save_as(path)


def test_rle(file, capfd):
    path = file()
    to_rle(path)
    hu, h = read_image(path)
    assert np.array_equal(hu, HEAD) and h["TransferSyntaxUID"] == "1.2.840.10008.1.2.5"
    data, rng = np.frombuffer(path.read_bytes(), "uint8"), np.random.default_rng(3)
    for _ in range(40): # the decoder panics with a BaseException on some of these
        broken = data.copy()
        broken[h["pixels_at"] + rng.integers(0, 120, 4)] = rng.integers(0, 256, 4)
        path.write_bytes(broken.tobytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            only_dicom_error(path)
    assert capfd.readouterr().err == ""


def test_decoder_death_costs_one_file(file, monkeypatch):
    path = file()
    to_rle(path)
    dicom._decoder().stop()
    with monkeypatch.context() as m:
        m.setattr(dicom, "_HELPER", "import os; os.read(0, 8); os.abort()")
        with pytest.raises(DicomError, match="crashed"): read_image(path)
    assert np.array_equal(read_image(path)[0], HEAD)


def _child(path, queue): queue.put(int(read_image(path)[0].sum()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore")
def test_decoder_after_fork_in_a_daemon(file):
    path = file()
    ds = pydicom.dcmread(path)
    ds.compress(pydicom.uid.RLELossless)
    ds.save_as(path)
    want = int(read_image(path)[0].sum()) # the parent's helper is running now
    ctx = multiprocessing.get_context("fork")
    queue = ctx.Queue()
    children = [ctx.Process(target=_child, args=(path, queue), daemon=True) for _ in range(2)]
    for c in children: c.start()
    assert [queue.get(timeout=60) for _ in children] == [want, want]
    for c in children: c.join()
    assert int(read_image(path)[0].sum()) == want


@real
def test_real_head_series():
    files = sorted((SAMPLES/"ge_head").glob("*.dcm"))
    assert len(files) == 28
    df = header_table(files, progress=False)
    assert df.error.isna().all() and df.z.is_monotonic_increasing and df.series.nunique() == 1
    assert np.allclose(df.tilt, 18.5, atol=.01) and np.allclose(df.tilt, df.tilt_tag.abs(), atol=.01)
    middle = []
    for f in files:
        hu, h = read_image(f)
        assert hu.shape == (512, 512) and hu.dtype == np.int16 and hu.min() >= -1024 and h["repaired"] is None
        assert abs(np.median(hu[[0, -1]]) - AIR) <= 5
        middle.append(np.median(hu[156:356, 176:336]))
    assert all(20 <= m <= 45 for m in middle[8:24]), middle # between the skull base and the vertex: brain


LOSSLESS = ["BigEndianExplicit", "DeflatedExplicit", "JPEG2000LosslessOnly", "JPEGLSLossless", "JPEGProcess14SV1", "JPEGProcess14T", "LittleEndianExplicit", "LittleEndianImplicit", "RLELossless"]
LOSSY = {"JPEG2000T": 30, "JPEGLSLossy": 2, "JPEGProcess1T": 65} # largest difference, HU; the last has 8 bits, steps of 32
UNSUPPORTED = ["JPEGProcess2_4", "JPEGProcess6_8", "JPEGProcess10_12"]


def _variant(name):
    found = list((SAMPLES/"transfer_syntaxes").glob(f"CTImage.dcm_{name}*"))
    assert len(found) == 1, found
    return found[0]


@real
@pytest.mark.parametrize("name", LOSSLESS)
def test_real_lossless_is_identical(name):
    want, _ = read_image(SAMPLES/"transfer_syntaxes"/"CTImage.dcm")
    got, _ = read_image(_variant(name))
    assert got.dtype == want.dtype and np.array_equal(got, want)


@real
@pytest.mark.parametrize("name", LOSSY)
def test_real_lossy_is_close(name):
    want, _ = read_image(SAMPLES/"transfer_syntaxes"/"CTImage.dcm")
    got, _ = read_image(_variant(name))
    diff = np.abs(got.astype(float) - want)
    assert 0 < diff.max() <= LOSSY[name] and diff.mean() < LOSSY[name] / 3


@real
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_real_12_bit_jpeg_says_so(name):
    assert read_header(_variant(name))["Rows"] == 512
    if name == "JPEGProcess2_4" and pydicom.__version__ < "3": return # there GDCM is trusted with it
    with pytest.raises(DicomError, match="support"): read_image(_variant(name))


@real
@pytest.mark.parametrize("name, cause", [("no-pixel-data.dcm", "no Rows"), ("no-pixel-spacing.dcm", "PALETTE"), ("CT0012.fragmented_no_bot_jpeg_baseline.51.dcm", "NumberOfFrames 2")])
def test_real_refused(name, cause):
    with pytest.raises(DicomError, match=cause): read_image(SAMPLES/"transfer_syntaxes"/name)


@real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["JPEG2000LosslessOnly", "JPEGLSLossy", "JPEGLSLossless", "JPEGProcess14SV1", "JPEGProcess1T", "RLELossless"])
def test_real_broken_streams(name, tmp_path, capfd):
    path, rng = tmp_path/"a.dcm", np.random.default_rng(1)
    data, at = np.frombuffer(_variant(name).read_bytes(), "uint8"), read_header(_variant(name))["pixels_at"]
    for i in range(24):
        broken = data.copy()
        where = at + rng.integers(0, 400 if i % 2 else len(data) - at, rng.integers(1, 20))
        broken[where] = rng.integers(0, 256, len(where))
        path.write_bytes(broken.tobytes())
        only_dicom_error(path)
    for cut in np.linspace(at + 8, len(data) - 9, 6).astype(int):
        path.write_bytes(data[:cut].tobytes())
        assert only_dicom_error(path)[0] is None, f"{cut} of {len(data)} bytes were taken for a whole image"
    assert capfd.readouterr().err == ""
