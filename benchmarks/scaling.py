"""How long would the two large sets take? Written on paper, from `results.json`: `python benchmarks/scaling.py`."""
import json
import sys
from pathlib import Path

import common

SETS = [("RSNA 2019, plain", 752_803, "plain", 60), ("RSNA 2022, all plain", 711_601, "plain", 1082), ("RSNA 2022, all JPEG Lossless", 711_601, "JPEG Lossless", 1082)]  # name, slices, files, slices of the longest study
PLACES = [(2, "Kaggle-like disk", .2, 2_000), (16, "local NVMe", 2., 50_000), (256, "cluster file system", 10., 50_000)]  # cores, storage, GB/s, files opened a second
STORED = dict(int16=256*256*2, uint8=256*256)              # bytes a slice
KAGGLE_OUTPUT = 20                                         # GB


def stages(figures: dict, slices: int, kind: str, longest: int, cores: int, gbs: float, opens: float, stored: int) -> dict: # stage -> {resource: hours}
    "Hours that each stage asks of each resource. A stage takes as long as the resource that it keeps busy longest."
    c, h = figures["conversion"], figures["headers"]; one = c[kind]["ours"]["rate"]; together = min(c[kind]["ours_two"]["rate"]/(2*one), 1)
    read = c["file_bytes"][kind]; head = min(h["cold_bytes"] or read, read); hours = lambda s: s/3600
    return dict(headers=dict(cpu=hours(slices/(h["ours"]["rate"]*cores*together)), disk=hours(slices*head/(gbs*1e9)), opens=hours(slices/opens)),
                convert=dict(cpu=hours(slices/(one*cores*together) + longest/one), disk=hours(slices*(read + stored)/(gbs*1e9)), opens=hours(slices/opens)))


def span(hours: float) -> str: return f"{hours:.1f} h" if hours >= 1 else f"{hours*60:.1f} min"


def rows(figures: dict) -> list:
    "Every set at every place, as int16 stacks."
    out = []
    for name, slices, kind, longest in SETS:
        for cores, storage, gbs, opens in PLACES:
            s = stages(figures, slices, kind, longest, cores, gbs, opens, STORED["int16"]); h, c = s["headers"], s["convert"]
            out.append({"set": name, "cores": cores, "storage": f"{storage}, {gbs:g} GB/s", "header table": f"{span(max(h.values()))} ({max(h, key=h.get)})", "stacks: cpu": span(c["cpu"]), "disk": span(c["disk"]),
                        "opens": span(c["opens"]), "total": span(max(h.values()) + max(c.values())), "bottleneck of the stacks": max(c, key=c.get)})
    return out


def sizes(figures: dict) -> list:
    "What is read and written."
    c = figures["conversion"]["file_bytes"]
    return [{"set": name, "slices": f"{n:,}", "read, GB": f"{n*c[kind]/1e9:,.0f}"} | {f"written as {k}, GB": f"{n*b/1e9:,.0f}" for k, b in STORED.items()} for name, n, kind, _ in SETS]


def text(results: dict) -> str:
    "scaling.md"
    f = results["figures"]; c, h, m = f["conversion"], f["headers"], results["machine"]; pair = {k: c[k]["ours_two"]["rate"]/c[k]["ours"]["rate"] for k in ("plain", "JPEG Lossless")}
    given = [f"Measured on {m['cpu']}, {m['cores']} cores, page cache warm (see results.md): one core converts {c['plain']['ours']['rate']:,.0f} plain and {c['JPEG Lossless']['ours']['rate']:,.0f} JPEG Lossless slices a second, "
             f"two workers {pair['plain']:.2f} and {pair['JPEG Lossless']:.2f} times that; one core reads {h['ours']['rate']:,.0f} headers a second.",
             f"Measured: a plain file is {c['file_bytes']['plain']/1e3:,.0f} kB, a JPEG Lossless one {c['file_bytes']['JPEG Lossless']/1e3:,.0f} kB (of the phantom; real ones may be larger or smaller)"
             + (f"; the header table makes the disk read {h['cold_bytes']/1e3:,.0f} kB a file." if h["cold_bytes"] else "; what the header table reads from the disk could not be measured here, so whole files are assumed."),
             "Assumed: all slices are 512 × 512. How many files of RSNA 2022 are JPEG Lossless is not known, so both ends are given.",
             "Assumed, not measured: 16 and 256 cores are each as fast as this one and together lose no more than two do here. Studies are handed out whole; the longest one begins last and runs alone.",
             "Assumed storage: " + "; ".join(f"{s}: {g:g} GB/s for reading and writing together, {n:,} files opened a second" for _, s, g, n in PLACES) + ".",
             "Reading, computing and writing overlap: a stage takes as long as the resource that is busy longest. Header table and stacks follow one another. Nothing is read from a cache."]
    fit = [f"{int(KAGGLE_OUTPUT*1e9/b):,} slices as {k}" for k, b in STORED.items()]
    return "\n\n".join(["# The large sets on 2, 16 and 256 cores", "Written by `benchmarks/scaling.py` from `results.json`; not run, but computed." + (" From a quick run: too short to mean anything." if results["quick"] else ""),
                        "## What goes in and out", common.markdown(sizes(f)), f"{KAGGLE_OUTPUT} GB, the output of a Kaggle session, hold {' or '.join(fit)} (256 × 256).",
                        "## How long", common.markdown(rows(f)), "`cpu`, `disk` and `opens` (files opened) are what the stage would take if only that resource counted. Stacks are int16; as uint8 half as much is written.",
                        "## What this rests on", "\n".join("- " + g for g in given)]) + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else common.HERE
    (folder/"scaling.md").write_text(text(json.loads((folder/"results.json").read_text(encoding="utf-8"))), encoding="utf-8")
