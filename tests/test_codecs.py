"""Compressed pixels: every library that is at hand gives the same, a missing or dying one makes way, signs are settled."""
import os, sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from test_dicom import EXPLICIT, HEAD, LOSSLESS, NO_RESCALE, SAMPLES, _variant, real, to_rle, write

from rsna_helpers import codecs, dicom
from rsna_helpers.dicom import DicomError, read_image

pytestmark = pytest.mark.filterwarnings("ignore")
UID = "1.2.840.10008.1.2.4."
JPEG, JPEG_12, LOSSLESS_JPEG, SV1, JPEG_LS, J2K, HTJ2K = (UID + n for n in ("50", "51", "57", "70", "80", "90", "201"))


@pytest.fixture(autouse=True)
def own_helper():
    "Each test with a helper of its own."
    codecs._helper().stop(); codecs._MISSING.clear()
    yield
    codecs._helper().stop(); codecs._MISSING.clear()


@pytest.fixture
def ic(): return pytest.importorskip("imagecodecs")


def compressed(path, frame, px, meta, pieces=1, **tags):
    "A file with this frame, in so many fragments."
    write(path, px, **tags)
    ds = pydicom.dcmread(path)
    ds.file_meta.TransferSyntaxUID = meta
    frame += b"\0" * (len(frame) % 2)
    step = -(-len(frame) // pieces) + 1 & ~1
    parts = b"".join(b"\xfe\xff\0\xe0" + len(p).to_bytes(4, "little") + p for p in (frame[i:i + step] for i in range(0, len(frame), step)))
    ds.PixelData = b"\xfe\xff\0\xe0\0\0\0\0" + parts
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.save_as(path)
    return path


def with_start(monkeypatch, code):
    "Let the helper run this before it serves."
    monkeypatch.setattr(codecs, "_START", f"from rsna_helpers import codecs\n{code}\ncodecs._serve()")


# ---------- each library

CASES = [(uid, backend) for uid, backends in codecs.BACKENDS.items() for backend in backends]


@real
@pytest.mark.parametrize("backend", ["imagecodecs", "pylibjpeg", "gdcm", "pillow", "pydicom"])
def test_each_library_alone(monkeypatch, backend):
    "What one library decodes of the lossless samples is identical; what it cannot decode, it refuses."
    want, decoded = read_image(SAMPLES/"transfer_syntaxes"/"CTImage.dcm")[0], []
    for name in LOSSLESS:
        uid = dicom.read_header(_variant(name))["TransferSyntaxUID"]
        if backend not in codecs.BACKENDS.get(uid, ()): continue
        with monkeypatch.context() as m:
            m.setitem(codecs.BACKENDS, uid, (backend,))
            try: got, h = read_image(_variant(name))
            except DicomError: continue
            decoded.append(name)
            assert np.array_equal(got, want) and h["decoder"] == backend
    if backend in codecs._MISSING: pytest.skip(f"{backend} is not installed")
    if backend != "pillow": assert decoded


def test_fragments(ic, tmp_path):
    px = (HEAD + 1024).astype("uint16")
    frame = ic.jpeg8_encode(px, lossless=True, bitspersample=16)
    for meta in (LOSSLESS_JPEG, SV1):
        for pieces in (1, 2, 7): assert np.array_equal(read_image(compressed(tmp_path/"a.dcm", frame, px, meta, pieces))[0], HEAD)


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("signed", [0, 1])
def test_jpeg_lossless_bits(ic, tmp_path, bits, signed):
    px = HEAD if signed else (HEAD + 1024).astype("uint16")
    frame = ic.jpeg8_encode((px.astype("uint16") & (1 << bits) - 1), lossless=True, bitspersample=bits)
    path = compressed(tmp_path/"a.dcm", frame, px, SV1, BitsStored=bits, HighBit=bits - 1, PixelRepresentation=signed, RescaleIntercept="0" if signed else "-1024")
    assert np.array_equal(read_image(path)[0], HEAD)


def test_jpeg_of_12_bits(ic, tmp_path):
    px = (HEAD + 1024).astype("uint16")
    frame = ic.jpeg8_encode(px, level=98, bitspersample=12)
    hu, h = read_image(compressed(tmp_path/"a.dcm", frame, px, JPEG_12, BitsStored=12, HighBit=11, PixelRepresentation=0))
    assert np.abs(hu.astype(int) - HEAD).mean() < 10 and h["decoder"] == "imagecodecs"


@pytest.mark.parametrize("meta, encode", [(JPEG_LS, "jpegls_encode"), (J2K, "jpeg2k_encode"), (HTJ2K, "htj2k_encode")])
def test_other_lossless(ic, tmp_path, meta, encode):
    px = (HEAD + 1024).astype("uint16")
    try: frame = getattr(ic, encode)(px, **({} if "ls" in encode else dict(reversible=True)))
    except (ImportError, AttributeError) as e: pytest.skip(str(e))
    assert np.array_equal(read_image(compressed(tmp_path/"a.dcm", frame, px, meta))[0], HEAD)


def test_rle_in_every_shape(tmp_path):
    rng = np.random.default_rng(0)
    for dtype in ("uint8", "uint16"):
        px = rng.integers(0, 200, (6, 8)).astype(dtype)
        path = write(tmp_path/"a.dcm", px, Modality="CR", **NO_RESCALE)
        to_rle(path)
        assert np.array_equal(read_image(path)[0], px), dtype
    rgb = rng.integers(0, 256, (6, 8, 3), "uint8")
    path = write(tmp_path/"a.dcm", rgb[..., 0], pixels=rgb.tobytes(), Modality="CR", SamplesPerPixel=3, PlanarConfiguration=0, PhotometricInterpretation="RGB", **NO_RESCALE)
    to_rle(path)
    assert np.abs(read_image(path)[0] - rgb @ [.299, .587, .114]).max() <= .51


@pytest.mark.parametrize("backend", ["imagecodecs", "pillow"])
def test_colour_stays_as_it_is_in_the_stream(ic, tmp_path, monkeypatch, backend):
    "YBR_FULL_422 gives its first channel, RGB its luma; no library turns one into the other."
    y, x = np.mgrid[:64, :80]
    rgb = np.stack([x * 3, y * 3, 255 - x * 2], -1).astype("uint8")
    monkeypatch.setitem(codecs.BACKENDS, JPEG, (backend,))
    tags = dict(Modality="CR", SamplesPerPixel=3, PlanarConfiguration=0, **NO_RESCALE)
    luma = rgb @ [.299, .587, .114]
    frame = ic.jpeg8_encode(rgb, level=98, colorspace="RGB", outcolorspace="YCBCR")
    hu, h = read_image(compressed(tmp_path/"a.dcm", frame, rgb[..., 0], JPEG, PhotometricInterpretation="YBR_FULL_422", **tags))
    assert np.abs(hu - luma).max() < 4 and h["decoder"] == backend
    frame = ic.jpeg8_encode(rgb, level=98, colorspace="RGB", outcolorspace="RGB")
    hu, h = read_image(compressed(tmp_path/"a.dcm", frame, rgb[..., 0], JPEG, PhotometricInterpretation="RGB", **tags))
    assert np.abs(hu - luma).max() < 4 and h["decoder"] == backend


# ---------- signs

def test_unsigned_stream_of_a_signed_image(ic, tmp_path):
    "Two's complement, in as many bits as the stream has."
    for bits, stored in ((12, 16), (13, 13), (16, 16)):
        frame = ic.jpeg2k_encode((HEAD.astype(int) & (1 << bits) - 1).astype("uint16"), reversible=True, bitspersample=bits)
        hu, h = read_image(compressed(tmp_path/"a.dcm", frame, HEAD, J2K, BitsStored=stored, HighBit=stored - 1, RescaleIntercept="0"))
        assert np.array_equal(hu, HEAD) and h["repaired"] is None, bits


@pytest.mark.parametrize("intercept", ["0", "-1024"])
def test_signed_stream_of_an_image_said_to_be_unsigned(ic, tmp_path, intercept):
    "A CT that holds negative values is signed, whatever its header says; and it is noted."
    px = (HEAD - int(intercept)).astype("int16")
    px[:3] = -2000
    frame = ic.jpeg2k_encode(px, reversible=True)
    hu, h = read_image(compressed(tmp_path/"a.dcm", frame, px, J2K, PixelRepresentation=0, RescaleIntercept=intercept))
    assert (hu[:3] == dicom.AIR).all() and np.array_equal(hu[3:], HEAD[3:]) and "signed" in h["repaired"]


def test_sign_flag_that_means_nothing(ic, tmp_path):
    px = (HEAD + 1024).astype("int16")
    hu, h = read_image(compressed(tmp_path/"a.dcm", ic.jpeg2k_encode(px, reversible=True), px, J2K, PixelRepresentation=0))
    assert np.array_equal(hu, HEAD) and h["repaired"] is None


# ---------- what is missing, broken or wrong

def test_missing_library_makes_way(tmp_path, monkeypatch):
    path = write(tmp_path/"a.dcm")
    to_rle(path)
    with_start(monkeypatch, "codecs._MODULES['imagecodecs'] = ('no_such_module',)")
    hu, h = read_image(path)
    assert np.array_equal(hu, HEAD) and h["decoder"] in ("pylibjpeg", "pydicom") and codecs._MISSING == {"imagecodecs"}


@pytest.mark.parametrize("fault", ["raise RuntimeError('broken')", "import os; os.abort()"])
def test_broken_library_makes_way(tmp_path, monkeypatch, fault):
    path = write(tmp_path/"a.dcm")
    to_rle(path)
    with_start(monkeypatch, f"def broken(frame, job):\n    {fault}\ncodecs._by_imagecodecs = broken")
    hu, h = read_image(path)
    assert np.array_equal(hu, HEAD) and h["decoder"] in ("pylibjpeg", "pydicom")


def test_no_library_at_all_is_said(tmp_path, monkeypatch):
    path = write(tmp_path/"a.dcm")
    to_rle(path)
    with_start(monkeypatch, "codecs._MODULES = dict.fromkeys(codecs._MODULES, ('no_such_module',))")
    with pytest.raises(DicomError, match="no_such_module"): read_image(path)
    with pytest.raises(DicomError, match="no library at hand"): read_image(path)


@pytest.mark.skipif(sys.platform == "win32", reason="the system has no such timer")
@pytest.mark.parametrize("fault, cause", [("while True: pass", "took over"), ("import time; time.sleep(99)", "took over"), ("return bytearray(4 << 30)", "MemoryError")])
def test_greedy_library_is_stopped(tmp_path, monkeypatch, fault, cause):
    path, job = write(tmp_path/"a.dcm"), codecs._job
    to_rle(path)
    with_start(monkeypatch, f"codecs._CLOCK = 3\ndef greedy(*args):\n    {fault}\ncodecs._by_imagecodecs = codecs._by_pydicom = greedy")
    monkeypatch.setattr(codecs, "_job", lambda h: job(h) | dict(seconds=.3))
    with pytest.raises(DicomError, match=cause): read_image(path)


def test_stream_of_another_size_is_never_decoded(ic, tmp_path, monkeypatch):
    def never(*args): raise AssertionError("a decoder was asked")
    monkeypatch.setattr(codecs._Helper, "exchange", never)
    big = np.zeros((2000, 2000), "uint16")
    for meta, frame in ((SV1, ic.jpeg8_encode(big, lossless=True, bitspersample=16)), (J2K, ic.jpeg2k_encode(big, reversible=True)), (JPEG_LS, ic.jpegls_encode(big))):
        with pytest.raises(DicomError, match="the stream holds"): read_image(compressed(tmp_path/"a.dcm", frame, HEAD, meta))
    with pytest.raises(DicomError, match="cannot hold"): read_image(compressed(tmp_path/"a.dcm", b"\2" + bytes(99), HEAD, codecs.RLE, Rows=8000, Columns=8000))


def test_cut_or_mislabelled_streams(ic, tmp_path):
    px = (HEAD + 1024).astype("uint16")
    frame = ic.jpeg8_encode(px, lossless=True, bitspersample=16)
    with pytest.raises(DicomError, match="end mark"): read_image(compressed(tmp_path/"a.dcm", frame[:len(frame) // 2], px, SV1))
    with pytest.raises(DicomError, match="in the stream"): read_image(compressed(tmp_path/"a.dcm", frame, px, J2K))
    path = relabelled(compressed(tmp_path/"a.dcm", frame, px[:2], SV1), SV1, EXPLICIT)
    with pytest.raises(DicomError, match="in fragments, though"): read_image(path)
    with pytest.raises(DicomError, match="not supported"): read_image(compressed(tmp_path/"a.dcm", frame, px, UID + "102"))
    with pytest.raises(DicomError, match="not in fragments"): read_image(relabelled(write(tmp_path/"a.dcm"), EXPLICIT, SV1))


def relabelled(path, old, new):
    "Another transfer syntax in the file meta group, and nothing else changed."
    old, new = (b"\2\0\x10\0UI" + (len(u) + len(u) % 2).to_bytes(2, "little") + u.encode() + b"\0" * (len(u) % 2) for u in (old, new))
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    return path
