"""How many 512 x 512 CT slices a second become a 256 x 256 stack on disk, per core?

Each way reads the same files and writes one .npy a study. The peers are handed the studies and the order of their slices and keep the whole
slice; ours has a header table (its own row says what that costs), finds studies and order by itself, crops to the head and writes an index.
`crop=False` ("whole") is the same picture as the peers'."""
import os
import time
from pathlib import Path

import common
import files

SIZE = 256
WINDOWS = [(80, 40), (200, 80), (2800, 600)]               # width, centre: brain, subdural, bone
SIDE = 440                                                 # of the square that the cropped floor takes, about what a head needs


def save(out, k: int, stack):
    import numpy as np
    np.save(Path(out)/f"{k:05d}.npy", stack)


def fastai(studies, out):
    "(a) fastai.medical.imaging: three windows as channels, resized, 8 bits."
    import numpy as np
    import torch
    import torch.nn.functional as F
    from fastai.medical.imaging import Path as P  # importing it adds `dcmread` and `to_nchan`
    def one(path):
        x = P(path).dcmread().to_nchan(WINDOWS, bins=0)
        return (F.interpolate(torch.as_tensor(x)[None], (SIZE, SIZE), mode="area")[0]*255).byte().numpy()
    def job():
        for k, paths in enumerate(studies): save(out, k, np.stack([one(p) for p in paths]))
        return count(out)
    return job


def monai(studies, out):
    "(b) MONAI: LoadImage with PydicomReader, Resize."
    import numpy as np
    from monai.data import PydicomReader
    from monai.transforms import Compose, LoadImage, Resize
    load = Compose([LoadImage(reader=PydicomReader(), image_only=True, ensure_channel_first=True), Resize((SIZE, SIZE), mode="area")])
    def job():
        for k, paths in enumerate(studies): save(out, k, np.stack([load(p)[0].numpy().astype(np.int16) for p in paths]))
        return count(out)
    return job


def loop(studies, out):
    "(c) the loop of many notebooks: pydicom, rescale, three windows, cv2.resize, np.save."
    import cv2
    import numpy as np
    import pydicom
    def window(hu, width, center):
        low = center - width/2
        return (np.clip((hu - low)/width, 0, 1)*255).astype(np.uint8)
    def one(path):
        ds = pydicom.dcmread(path); hu = ds.pixel_array*float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        return cv2.resize(np.dstack([window(hu, *w) for w in WINDOWS]), (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    def job():
        for k, paths in enumerate(studies): save(out, k, np.stack([one(p) for p in paths]))
        return count(out)
    return job


def frame_of(data: memoryview) -> memoryview: # the one frame of an encapsulated image
    "Walk over the offset table to the first item after it."
    at = bytes(data).index(b"\xe0\x7f\x10\x00OB\x00\x00\xff\xff\xff\xff") + 12
    at += 8 + int.from_bytes(data[at+4:at+8], "little")
    return data[at+8:at+8+int.from_bytes(data[at+4:at+8], "little")]


def fastest_codec(frame): # (function that decodes into an array, its name)
    "The fastest JPEG Lossless decoder of imagecodecs for this frame."
    import imagecodecs
    import numpy as np
    out = np.empty((512, 512), np.uint16); took = {}
    for name in ("jpeg8_decode", "ljpeg_decode", "jpegsof3_decode"):
        decode = getattr(imagecodecs, name)
        try: decode(frame, out=out)
        except Exception: continue                         # not built into this copy of imagecodecs, or not for this frame
        start = time.perf_counter(); [decode(frame, out=out) for _ in range(10)]; took[name] = time.perf_counter() - start
    best = min(took, key=took.get)
    return getattr(imagecodecs, best), best


def floor(studies, out, side: int = 512):
    "(d) the least that can be done: read the bytes, take the pixels, area-resize, write. No header, no rescale, no order, no failure."
    import cv2
    import numpy as np
    n = 512*512*2; buffer = bytearray(8*n); view = memoryview(buffer); px = np.empty((512, 512), np.int16)
    stack = np.empty((max(map(len, studies)), SIZE, SIZE), np.int16); inner = slice((512 - side)//2, (512 + side)//2)
    def read(path):
        with open(path, "rb", buffering=0) as f: return view[:f.readinto(buffer)]
    compressed = len(read(studies[0][0])) < n
    decode, note = fastest_codec(frame_of(read(studies[0][0]))) if compressed else (None, "")
    def one(path, to):
        data = read(path)
        if compressed: decode(frame_of(data), out=px.view(np.uint16)); hu = px
        else: hu = np.frombuffer(data[-n:], "<i2").reshape(512, 512)
        cv2.resize(hu[inner, inner], (SIZE, SIZE), dst=to, interpolation=cv2.INTER_AREA)
    def job():
        for k, paths in enumerate(studies):
            for i, p in enumerate(paths): one(p, stack[i])
            save(out, k, stack[:len(paths)])
        return count(out)
    job.note = note
    return job


def floor_cropped(studies, out):
    "(d) for a square that does not shrink by a whole number, which costs `cv2.resize` more than the rest together. The square is given."
    return floor(studies, out, SIDE)


def header_table(studies):
    "The header table that `npy.convert` wants."
    from rsna_helpers import dicom
    table = dicom.header_table([p for s in studies for p in s], n_jobs=1, progress=False).assign(split="train")
    bad = table[table.error.notna()]
    if len(bad): raise ValueError(f"{len(bad)} files were refused, first {bad.error.iloc[0]}")
    return table


def ours(studies, out, **kwargs):
    "npy.convert on a header table that is there, with all that it does by default."
    from rsna_helpers import dicom, npy
    table = header_table(studies)
    def job():
        npy.convert(table, out, dicom.read_image, size=SIZE, progress=False, **{"n_jobs": 1} | kwargs)
        return count(out)
    return job


def ours_whole(studies, out):
    "npy.convert without the crop: what the peers do."
    return ours(studies, out, crop=False)


def ours_two(studies, out):
    "npy.convert with two processes on two cores."
    return ours(studies, out, n_jobs=2)


def ours_all(studies, out):
    "Header table and npy.convert, from nothing but file names."
    return lambda: ours(studies, out)()


def count(out) -> int: # slices that lie in `out`
    "Slices in the stacks of a folder: a way that leaves some out would look fast."
    import numpy as np
    return sum(len(np.load(f, mmap_mode="r")) for f in Path(out).rglob("*.npy"))


WAYS = {f.__name__: f for f in (fastai, monai, loop, floor, floor_cropped, ours, ours_whole, ours_two, ours_all)}
LABELS = dict(fastai="(a) fastai.medical.imaging", monai="(b) MONAI LoadImage + Resize", loop="(c) pydicom loop", floor="(d) floor", floor_cropped="(d) floor, cropped",
              ours="ours: npy.convert", ours_whole="ours, whole: crop=False", ours_two="ours, 2 workers", ours_all="ours with header table")
TARGETS = {"plain": dict(fastai=12, monai=10, floor=.7, floor_cropped=.7), "JPEG Lossless": dict(fastai=3, floor=.8, floor_cropped=.8)}
TWO_WORKERS = 1.8


def measure_sets(sets: dict, o) -> dict: # set -> {way: figures}
    "Rounds over all ways on each set of files."
    jobs = lambda cut: {n: {k: dict(studies=s[:cut], out=str(o.work/"out"/k)) for k in WAYS} for n, s in sets.items()}
    figures = common.rounds("conversion", jobs(None), jobs(2), o, dict(ours_two=2))
    for n, s in sets.items():
        for k, f in figures[n].items():
            if "error" in f and k.startswith("ours"): raise RuntimeError(f"{n}: {LABELS[k]}: {f['error']}")
            if "error" not in f and f["images"] != sum(map(len, s)): raise ValueError(f"{n}: {LABELS[k]} wrote {f['images']} of {sum(map(len, s))} slices")
    return figures


def table(kind: str, figures: dict) -> list: # rows
    "Every way beside ours. A floor is compared with the same picture: the cropped with the cropped."
    rate = lambda k: figures[k].get("rate"); ours, whole = rate("ours"), rate("ours_whole"); rows = []
    for k in WAYS:
        what = LABELS[k] + (f", {figures[k]['note']}" if figures[k].get("note") else ""); target, cells = TARGETS[kind].get(k), {}
        if k == "ours_two": target = TWO_WORKERS; cells = dict(default=common.verdict(rate(k)/ours, target, " of one"))
        elif k == "ours_all": cells = dict(default=common.verdict(rate(k)/ours, of=" of ours"))
        elif k not in ("ours", "ours_whole") and rate(k):
            if k != "floor": cells["default"] = common.verdict(ours/rate(k), target)
            if k != "floor_cropped": cells["whole"] = common.verdict(whole/rate(k), target)
        rows.append(common.row(kind, what, figures[k], f"≥ {target} ×" if target else "", **cells))
    return rows


def measure(o) -> dict:
    "Plain files, then JPEG Lossless."
    sets = {"plain": files.write_set(o.work/f"plain-{o.slices}", o.studies, o.slices), "JPEG Lossless": files.write_set(o.work/f"jpeg-{o.slices}", o.studies, o.slices, compressed=True)}
    figures = measure_sets(sets, o)
    size = {k: sum(os.path.getsize(p) for s in v for p in s)/sum(map(len, v)) for k, v in sets.items()}
    notes = [f"{k}: {len(s)} studies, {sum(map(len, s)):,} slices of {size[k]/1000:,.0f} kB; median of {o.rounds} rounds, one thread and one core a way" for k, s in sets.items()]
    return dict(rows=[r for k in sets for r in table(k, figures[k])], notes=notes, figures=figures | dict(file_bytes=size))


if __name__ == "__main__": common.main(measure, __doc__)
