"""Broken files by the thousand: an image or a `DicomError` comes out, soon, and in bounded memory.

The files are made in a process of their own, whose memory is measured. Each follows from the seed and its number alone:
`python tests/test_fuzz.py FROM TO` does a range again. `RSNA_FUZZ` sets how many (2,000), `RSNA_FUZZ_SEED` the seed."""
import json, os, struct, subprocess, sys, time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
COUNT, SEED = int(os.environ.get("RSNA_FUZZ") or 2000), int(os.environ.get("RSNA_FUZZ_SEED") or 2019)
ENDLESS = struct.pack("<HH2sHI", 8, 0x1140, b"SQ", 0, 0xFFFFFFFF)
ITEM, OPEN = struct.pack("<HHI", 0xFFFE, 0xE000, 0), struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)


# ---------- whole files to start from

def sources(folder):
    "Whole files, name to bytes: made here in every encoding at hand, and the real samples."
    from test_codecs import compressed
    from test_dicom import BIG, DEFLATED, EXPLICIT, HEAD, IMPLICIT, NO_RESCALE, SAMPLES, U12, WRAPPED, to_rle, write
    from test_header import with_sequences
    out, path, px = {}, folder/"source.dcm", (HEAD + 1024).astype("uint16")
    def keep(name, _=None): out[name] = path.read_bytes()
    for name, meta in dict(implicit=IMPLICIT, explicit=EXPLICIT, big=BIG, deflated=DEFLATED).items():
        for dtype in ("int16", "uint8", "int32"): keep(f"{name} {dtype}", write(path, (HEAD.clip(0, 250)).astype(dtype), meta=meta))
        keep(f"{name} sequences", with_sequences(path, True, meta)), keep(f"{name} closed sequences", with_sequences(path, False, meta))
    keep("wrapped", write(path, WRAPPED, RescaleIntercept="0", **U12)), keep("bare", write(path, preamble=False))
    keep("film", write(path, px, Modality="DX", PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=0, **NO_RESCALE))
    rgb = np.random.default_rng(0).integers(0, 256, (*HEAD.shape, 3), "uint8")
    keep("colour", write(path, rgb[..., 0], pixels=rgb.tobytes(), Modality="CR", SamplesPerPixel=3, PlanarConfiguration=0, PhotometricInterpretation="RGB", **NO_RESCALE))
    to_rle(path), keep("rle colour"), write(path), to_rle(path), keep("rle")
    try: import imagecodecs as ic
    except ImportError: ic = None
    if ic:
        uid = "1.2.840.10008.1.2.4."
        keep("jpeg", compressed(path, ic.jpeg8_encode(px.clip(0, 255).astype("uint8")), px.clip(0, 255).astype("uint8"), uid + "50"))
        keep("jpeg lossless", compressed(path, ic.jpeg8_encode(px, lossless=True, bitspersample=16), px, uid + "70", 3))
        keep("jpeg 12", compressed(path, ic.jpeg8_encode(px, level=95, bitspersample=12), px, uid + "51", BitsStored=12, HighBit=11))
        keep("jpeg-ls", compressed(path, ic.jpegls_encode(px), px, uid + "80"))
        keep("jpeg 2000", compressed(path, ic.jpeg2k_encode(px, reversible=True), px, uid + "90"))
    from PIL import Image
    for kind in ("PNG", "JPEG"): Image.fromarray(HEAD.clip(0, 255).astype("uint8")).save(path, format=kind), keep(kind)
    for p in sorted(SAMPLES.glob("transfer_syntaxes/*")) + sorted(SAMPLES.glob("ge_head/*1.dcm")): out[p.name] = p.read_bytes()
    return out


# ---------- what is done to them

def field(data, rng):
    "An absurd value in place of a number that decides about sizes."
    group, elem = [(0x28, 0x10), (0x28, 0x11), (0x28, 2), (0x28, 0x100), (0x28, 0x101), (0x28, 0x102), (0x28, 0x103), (0x28, 6)][rng.integers(8)]
    at = data.find(struct.pack("<HH", group, elem))
    if at < 0: return data
    value = struct.pack("<H", int(rng.choice([0, 1, 7, 8, 12, 15, 16, 17, 32, 63, 255, 4096, 32767, 65535])))
    return data[:at + 8] + value + data[at + 10:]


def frames(data, rng):
    "Many frames: an element of its own before the pixels' description."
    at = data.find(b"\x28\0\x10\0US\2\0")
    text = [b"2 ", b"0 ", b"-1", b"999999999 ", b"1e9 ", b"9" * 400][rng.integers(6)]
    return data if at < 0 else data[:at] + b"\x28\0\x08\0IS" + struct.pack("<H", len(text)) + text + data[at:]


def missing(data, rng):
    "Without one of the explicit elements of group 0028."
    at = [i for i in range(132, min(len(data), 20_000)) if data[i:i + 2] == b"\x28\0" and data[i + 4:i + 6] in (b"US", b"CS", b"DS", b"IS")]
    if not at: return data
    i = at[rng.integers(len(at))]
    return data[:i] + data[i + 8 + int.from_bytes(data[i + 6:i + 8], "little"):]


def endless(data, rng):
    "A sequence that has no end, or thousands of levels, or elements."
    body = [ENDLESS + ITEM * 30_000, (ENDLESS + OPEN) * 10_000, (ENDLESS + OPEN) * 150, b"\x09\0\1\0CS\0\0" * 30_000, bytes(200_000)][rng.integers(5)]
    at = data.find(b"\x08\0\x60\0")
    return data if at < 0 else data[:at] + body + (data[at:] if rng.random() < .5 else b"")


def flips(data, rng, first, last, most=12):
    "Random bytes and bits at random places."
    out = np.frombuffer(data, "u1").copy()
    if last > first:
        at = rng.integers(first, last, rng.integers(1, most))
        out[at] = rng.integers(0, 256, len(at)) if rng.random() < .6 else out[at] ^ (1 << rng.integers(0, 8, len(at))).astype("u1")
    return out.tobytes()


def broken(data, others, rng):
    "One file, broken in one or two of the ways that are known."
    for _ in range(rng.integers(1, 3)):
        n, end = len(data), min(len(data), 4000)
        kind, pixels = rng.integers(13), max(data.rfind(b"\xe0\x7f\x10\0"), 0)
        if n < 20: break
        if kind <= 1: data = flips(data, rng, 0, end)
        elif kind <= 3: data = flips(data, rng, pixels, min(n, pixels + 700))
        elif kind == 4: data = flips(data, rng, pixels, n, 200)
        elif kind == 5: data = data[:rng.integers(0, n)] if rng.random() < .5 else data[:rng.integers(0, end)]
        elif kind == 6: data = field(data, rng)
        elif kind == 7: data = [frames, missing, endless][rng.integers(3)](data, rng)
        elif kind == 8: i = int(rng.integers(0, n)); data = data[:i] + rng.bytes(int(rng.integers(1, 40))) + data[i:]
        elif kind == 9: i = int(rng.integers(0, end)); data = data[:i] + data[i + int(rng.integers(1, 60)):]
        elif kind == 10: i = int(rng.integers(0, n)); data = data[:i] + b"\xff" * 4 + data[i + 4:]
        elif kind == 11: other = others[rng.integers(len(others))]; data = data[:rng.integers(0, end)] + other[rng.integers(0, len(other)):]
        else: data = [b"", b"ID,Label\n" * 500, bytes(5000), rng.bytes(3000), data[:132], data * 2, data[::-1]][rng.integers(7)]
    return data


# ---------- the run

def proper(hu, header):
    "Is that an image?"
    return hu.ndim == 2 and hu.shape == (header["Rows"], header["Columns"]) and str(hu.dtype) in ("int16", "float32", "uint8", "uint16") and bool(np.isfinite(hu).all())


def run(first, last, folder):
    "Break and read files; a dict of what came out."
    import logging, resource, warnings
    warnings.simplefilter("ignore"), logging.disable(logging.CRITICAL)
    from rsna_helpers import dicom
    whole, path, failed, slowest, counts = sources(folder), folder/"broken.dcm", [], (0, None), dict(image=0, refused=0)
    names, before = list(whole), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(first, last):
        rng = np.random.default_rng([SEED, i])
        name = names[i % len(names)]
        path.write_bytes(broken(whole[name], list(whole.values()), rng))
        start, clock = time.process_time(), time.perf_counter()
        try:
            hu, header = dicom.read_image(path)
            counts["image"] += 1
            if not proper(hu, header): failed.append((i, name, f"{hu.shape} {hu.dtype}"))
        except dicom.DicomError as e:
            counts["refused"] += 1
            if not (e.path == str(path) and e.cause and "\n" not in e.cause): failed.append((i, name, repr(e)))
        except BaseException as e: failed.append((i, name, f"{type(e).__name__}: {e}"))
        slowest = max(slowest, (time.perf_counter() - clock, (i, name, round(time.process_time() - start, 2))), key=lambda s: s[0])
        try: row = dicom.header_table([path], progress=False).iloc[0]
        except BaseException as e: failed.append((i, name, f"header_table: {type(e).__name__}: {e}"))
    dicom.codecs._helper().stop() # only who has ended is counted
    kept = {who: resource.getrusage(which).ru_maxrss // 1024 for who, which in (("self", resource.RUSAGE_SELF), ("helper", resource.RUSAGE_CHILDREN))}
    return dict(files=last - first, sources=len(names), **counts, failed=failed[:20], slowest=slowest, megabytes=kept | dict(before=before // 1024))


def test_broken_files(tmp_path):
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT/"tests"), *sys.path]), OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    done = subprocess.run([sys.executable, __file__, "0", str(COUNT), str(tmp_path)], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    got = json.loads(done.stdout.splitlines()[-1])
    print(got)
    assert got["failed"] == [] and got["files"] == COUNT == got["image"] + got["refused"]
    assert got["image"] > COUNT // 20 and got["refused"] > COUNT // 4 # else nothing much was tried
    assert got["slowest"][0] < 30, got["slowest"] # seconds by the clock of a busy machine
    mb = got["megabytes"]; assert mb["self"] < max(1000, mb["before"] + 300) and mb["helper"] < 1000, mb    # the test process may have grown before


if __name__ == "__main__":
    import tempfile
    folder = Path(sys.argv[3] if len(sys.argv) > 3 else tempfile.mkdtemp())
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]), folder)))
