"""How fast do headers become a table, per core?

10,000 names (hard links to the plain files): `dicom.header_table`, `DataFrame.from_dicoms(px_summ=False)` of fastai, and pydicom in a loop.
And what each makes of files that are not as they should be."""
import os
from pathlib import Path

import common
import files

NAMES, SUBSET = 10_000, 1_000
TARGET = 10


def fastai(paths):
    "fastai, as it is called in a notebook; the pixels are left out."
    import pandas as pd
    from fastai.medical.imaging import Path as P  # importing it adds `from_dicoms`
    return lambda: len(pd.DataFrame.from_dicoms([P(p) for p in paths], px_summ=False, n_workers=0, progress=False))


def loop(paths):
    "pydicom, which stops before the pixels; every element becomes a column."
    import pandas as pd
    import pydicom
    def one(path): return {e.keyword: e.value for e in pydicom.dcmread(path, stop_before_pixels=True)}
    return lambda: len(pd.DataFrame([one(p) for p in paths]))


def ours(paths):
    "dicom.header_table"
    from rsna_helpers import dicom
    def job():
        bad = (table := dicom.header_table(paths, n_jobs=1, progress=False)).error.notna()
        if bad.any(): raise ValueError(f"{bad.sum()} files were refused, first {table.error[bad].iloc[0]}")
        return len(table)
    return job


def fastai_each(paths):
    "One table a file: what fastai says of it."
    import pandas as pd
    from fastai.medical.imaging import Path as P
    def one(path):
        try: pd.DataFrame.from_dicoms([P(path)], px_summ=False, n_workers=0, progress=False); return ""
        except Exception as e: return type(e).__name__
    return lambda: [one(p) for p in paths]


def ours_each(paths):
    "The column `error` of one table."
    from rsna_helpers import dicom
    return lambda: [e if isinstance(e, str) else "" for e in dicom.header_table(paths, n_jobs=1, progress=False).error]


WAYS = {f.__name__: f for f in (fastai, loop, ours, fastai_each, ours_each)}


def samples() -> list: # paths
    "The real samples, where they are at hand."
    folder = Path(os.environ.get("RSNA_SAMPLES") or common.HERE.parents[1]/"shared"/"data"/"real_dicom")
    return sorted(str(p) for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []


def odd_files(o, good: str) -> tuple: # (rows, note)
    "Files on which fastai, and with it the whole table, ends with an error, or which ours refuses."
    broken, real = files.write_broken(o.work/"broken", good), samples(); paths = broken + real
    they = each("fastai_each", paths); we = each("ours_each", paths)
    rows = [{"file": Path(p).name, "fastai from_dicoms": t or "a row", "dicom.header_table": f"a row with the error: {w}" if w else "a row"} for p, t, w in zip(paths, they, we) if t or w]
    of = lambda said: sum(map(bool, said[len(broken):]))
    note = f"of {len(real)} real samples fastai ends with an error on {of(they)}, ours names an error in {of(we)}" if real else "no real samples here: set RSNA_SAMPLES"
    return rows, note


def each(way: str, paths: list) -> list: # a text a file, empty where there is nothing to say
    "What one side says of each file; where it cannot run at all, that for every file."
    try: return common.run_once("headers", way, paths=paths)["value"]
    except RuntimeError as e: return [str(e)]*len(paths)


def cold_bytes(paths: list) -> float: # bytes a file; 0 where the system does not say
    "What the header table makes the disk read, with the files dropped from the page cache first."
    if not hasattr(os, "posix_fadvise"): return 0.
    for p in paths:
        with open(p, "rb") as f: os.fsync(f.fileno()); os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return common.run_once("headers", "ours", paths=paths)["disk"][0]/len(paths)


def measure(o) -> dict:
    "Ours on all names; the others, which need minutes for them, on the first thousand."
    studies = files.write_set(o.work/f"plain-{o.slices}", o.studies, o.slices); plain = [p for s in studies for p in s]
    names = files.more_names(plain, o.work/f"names-{o.slices}", 100 if o.quick else NAMES); paths = dict(fastai=names[:SUBSET], loop=names[:SUBSET], ours=names)
    figures = common.rounds("headers", {"": {k: dict(paths=p) for k, p in paths.items()}}, {"": dict.fromkeys(paths, dict(paths=plain))}, o)[""]
    if "error" in figures["ours"]: raise RuntimeError(f"dicom.header_table: {figures['ours']['error']}")
    odd, note = odd_files(o, plain[0]); figures["cold_bytes"] = cold_bytes(plain)
    return dict(rows=table(figures), notes=[f"headers: {len(names):,} names, fastai and the loop on the first {len(paths['loop']):,}", note], tables=[("Files that are not as they should be", odd)] if odd else [], figures=figures)


def table(figures: dict) -> list: # rows
    rate = lambda k: figures[k].get("rate")
    return [common.row("headers", "fastai from_dicoms(px_summ=False)", figures["fastai"], f"≥ {TARGET} ×", common.verdict(rate("ours")/rate("fastai"), TARGET) if rate("fastai") else ""),
            common.row("headers", "pydicom loop", figures["loop"], "", common.verdict(rate("ours")/rate("loop")) if rate("loop") else ""),
            common.row("headers", "ours: dicom.header_table", figures["ours"])]


if __name__ == "__main__": common.main(measure, __doc__)
