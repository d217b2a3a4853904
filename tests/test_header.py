"""Headers: the quick walk agrees with pydicom on whatever is put before it, and nothing makes it run away."""
import io, os, struct, warnings, zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from test_dicom import SAMPLES, BIG, DEFLATED, EXPLICIT, HEAD, IMPLICIT, real, write

from rsna_helpers import header
from rsna_helpers.header import DicomError, open_header, read_header

pytestmark = pytest.mark.filterwarnings("ignore")


def outcome(path, lean):
    "Header and place of the pixels, or the error."
    try:
        with open(path, "rb") as f: return open_header(f, path, lean=lean)
    except DicomError as e: return e.cause


def is_plain(path):
    "Did the quick walk manage?"
    with open(path, "rb") as f:
        try: return bool(header._lean(f, f.read(8192), os.path.getsize(path)))
        except header._Doubt: return False


def with_sequences(path, undefined, meta=EXPLICIT, private=True):
    "A file with sequences in sequences, private tags and long values before the pixels."
    write(path, meta=meta)
    ds = pydicom.dcmread(path)
    inner, outer, empty = Dataset(), Dataset(), Dataset()
    inner.Rows, inner.PatientID, inner.RescaleIntercept = 3, "not the patient", "7"
    outer.ReferencedImageSequence = Sequence([inner, empty, inner])
    outer["ReferencedImageSequence"].is_undefined_length = undefined
    ds.ReferencedStudySequence, ds.SourceImageSequence = Sequence([outer, outer]), Sequence([])
    for item in (inner, outer): item.is_undefined_length_sequence_item = undefined
    ds["ReferencedStudySequence"].is_undefined_length = undefined
    ds.ImageComments = "long " * 3000 # the pixels are not in the first 8 kB
    if private: ds.private_block(0x0009, "GEMS_IDEN_01", create=True).add_new(0x01, "LO", "text")
    if private: ds.private_block(0x0009, "GEMS_IDEN_01").add_new(0x02, "UN", b"\0\1" * 20)
    ds.save_as(path)
    return path


@pytest.mark.parametrize("meta", [IMPLICIT, EXPLICIT, BIG, DEFLATED])
@pytest.mark.parametrize("undefined", [True, False])
def test_sequences_are_stepped_over(tmp_path, meta, undefined):
    path = with_sequences(tmp_path/"a.dcm", undefined, meta)
    h, place = outcome(path, True)
    assert (h["Rows"], h["PatientID"], h["RescaleIntercept"]) == (64, "ID_p", -1024) and place["size"] == HEAD.nbytes
    assert outcome(path, False) == (h, place) and is_plain(path) == (meta != BIG)


@pytest.mark.parametrize("tags", [dict(), dict(Modality=None), dict(PatientID="Müller", SpecificCharacterSet="ISO_IR 100"), dict(PatientID="x" * 200), dict(WindowCenter=[]),
    dict(WindowCenter="", WindowWidth=""), dict(PixelPaddingValue=-2000), dict(VOILUTFunction="SIGMOID"), dict(NumberOfFrames="1"), dict(ImagePositionPatient=["1", "2"]),
    dict(SOPInstanceUID="1.2.3", PatientAge="065Y", PatientSex="F", GantryDetectorTilt="-18.5", ConvolutionKernel=["a", "b"])])
def test_variety_agrees_with_pydicom(tmp_path, tags):
    for meta in (IMPLICIT, EXPLICIT, DEFLATED):
        for preamble in (True, False):
            path = write(tmp_path/"a.dcm", meta=meta, preamble=preamble, **tags)
            assert outcome(path, True) == outcome(path, False) and is_plain(path) == preamble


def corrupted(data, rng, first, last):
    "A copy with a few bytes changed, or lengths, or a piece lost, or cut off."
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, kind = int(rng.integers(first, min(last, first + 1200) if rng.random() < .8 else last)), rng.integers(5)
        if kind == 0: out[at] = rng.integers(256)
        elif kind == 1: out[at] ^= 1 << rng.integers(8)
        elif kind == 2: out[at:at + 4] = bytes(rng.choice([0, 255, 254, 221, 224, 1], 4).astype("u1"))
        elif kind == 3: del out[at:at + int(rng.integers(1, 12))]
        elif rng.random() < .1: return bytes(out[:at])
    return bytes(out)


@pytest.mark.parametrize("source", ["plain", "implicit", "sequences", "undefined", "implicit sequences", "real"])
def test_corrupted_headers_agree_with_pydicom(tmp_path, source):
    "Where the quick walk gives an answer, it is pydicom's."
    path, rng = tmp_path/"a.dcm", np.random.default_rng([7, len(source)])
    if source == "real":
        if not SAMPLES.is_dir(): pytest.skip("no real samples: set RSNA_SAMPLES")
        path.write_bytes((SAMPLES/"ge_head"/"05.dcm").read_bytes()[:20_000])
    elif source in ("plain", "implicit"): write(path, meta=IMPLICIT if source == "implicit" else EXPLICIT)
    else: with_sequences(path, source != "sequences", IMPLICIT if "implicit" in source else EXPLICIT, private=False)
    data, quick = path.read_bytes(), 0
    if source != "real": assert is_plain(path)
    end = data.rindex(b"\xe0\x7f\x10\x00") + 12 if source != "real" else 4000
    for _ in range(300):
        path.write_bytes(corrupted(data, rng, 132, end))
        quick += is_plain(path)
        assert outcome(path, True) == outcome(path, False)
    assert quick > 30 # else this has compared pydicom with itself


def element(tag, vr, value, size=None):
    "An explicit little endian element."
    head = struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, vr)
    n = len(value) if size is None else size
    return head + (struct.pack("<xxI", n) if vr in (b"SQ", b"OW", b"UN") else struct.pack("<H", n)) + value


START = bytes(128) + b"DICM" + element(0x00020010, b"UI", EXPLICIT.encode() + b"\0") + element(0x00080060, b"CS", b"CT")
ITEM, OPEN = struct.pack("<HHI", 0xFFFE, 0xE000, 0), struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)


@pytest.mark.parametrize("body", [element(0x00081140, b"SQ", b"", 0xFFFFFFFF) + ITEM * 300_000, (element(0x00081140, b"SQ", b"", 0xFFFFFFFF) + OPEN) * 100_000,
    element(0x00091010, b"UN", b"", 0xFFFFFFFF) + ITEM * 300_000, element(0x00100010, b"CS", b"") * 300_000, bytes(3_000_000), b"\x09\0\1\0CS\0\0" * 300_000],
    ids=["items", "depth", "items as UN", "elements", "zeros", "short"])
def test_endless_headers_are_given_up(tmp_path, body):
    path = tmp_path/"a.dcm"
    path.write_bytes(START + body)
    got = outcome(path, True)
    assert isinstance(got, str) or got[1] is None


def test_deflated_bomb_is_unfolded_no_further_than_needed(tmp_path, monkeypatch):
    z = zlib.compressobj(9, wbits=-15)
    rows = element(0x00280010, b"US", b"\2\0") + element(0x00280011, b"US", b"\2\0") + element(0x00280100, b"US", b"\x10\0")
    body = z.compress(element(0x00080060, b"CS", b"CT") + rows + element(0x7FE00010, b"OW", b"\1\0" * 4)) + b"".join(z.compress(bytes(1 << 20)) for _ in range(300)) + z.flush()
    path, most = tmp_path/"a.dcm", []
    path.write_bytes(bytes(128) + b"DICM" + element(0x00020010, b"UI", DEFLATED.encode()) + body)
    inflate = header._inflate
    monkeypatch.setattr(header, "_inflate", lambda f, at, n: (most.append(n), inflate(f, at, n))[1])
    h, place = outcome(path, True)
    assert (h["Rows"], place["size"]) == (2, 8) and max(most) <= 2**18


def test_a_header_never_reads_beyond_its_file(tmp_path):
    "A length of 4 GB must not be allocated, neither on the quick way nor by pydicom."
    path = tmp_path/"a.dcm"
    path.write_bytes(START + element(0x00091010, b"UN", b"x" * 100, 0xFFFFFFF0))
    read = []
    class Watched(io.BytesIO):
        def read(self, n=-1): read.append(n); return super().read(n)
    header._by_pydicom(Watched(path.read_bytes()), path.stat().st_size)
    assert max(read) <= path.stat().st_size and min(read) >= 0


def test_lists_are_the_callers_own(tmp_path):
    path = write(tmp_path/"a.dcm")
    read_header(path)["WindowCenter"].append(1)
    assert read_header(path)["WindowCenter"] == [40, 80]
