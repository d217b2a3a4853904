"""Folds side by side: `make_folds`, scikit-learn's StratifiedGroupKFold, and MultilabelStratifiedKFold on patients.

    python benchmarks/folds.py                 # writes benchmarks/folds.md
    python benchmarks/folds.py --seeds 3 --out other.md

The table is made here, from the public counts of the stage-1 labels: 674,258 images, 17,079 patients with up to 15 studies
of 30 to 60 slices, the positives of each label to the row. `pip install iterative-stratification` for the third column;
without it that column is left out, with a message. Needs rsna_helpers and scikit-learn.
"""
import argparse
import os
import platform
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

import common
from rsna_helpers.validation import audit_folds, evenness, largest_deviation, make_folds

FIVE = ["epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural"]
LABELS = [*FIVE, "any"]
POSITIVE = [2_761, 32_564, 23_766, 32_122, 42_496]                     # stage_1_train.csv
IMAGES, PATIENTS = 674_258, 17_079
PUBLIC = {"any": 97_103, "IPH-IVH": .318, "IPH-SAH": .220, "IVH-SAH": .212, "subtypes 0..5": [577_155, 67_969, 22_587, 5_642, 885, 20]}
TOGETHER = {(1, 2): .65, (1, 3): .49, (2, 3): .48, (3, 4): .4, (1, 4): .3, (0, 4): .3, (0, 3): .3, (0, 1): .2, (2, 4): .15}


def head_ct(seed: int) -> pd.DataFrame: # one row an image: patient, study and the labels
    "A label table like stage 1. Each label takes the slices with the highest score: severity of the study less the distance from its centre."
    rng = np.random.default_rng(seed)
    studies = np.minimum(rng.geometric(.895, PATIENTS), 15); studies[0] = 15
    patient = np.repeat(np.arange(PATIENTS), studies)
    slices = 30 + np.rint(30 * rng.beta(.7, 3., len(patient))).astype(int)
    while off := IMAGES - slices.sum():                                # a slice more or less, until the total is right
        pick = rng.choice(len(slices), min(abs(off), len(slices)), replace=False)
        pick = pick[(slices[pick] < 60) if off > 0 else (slices[pick] > 30)]
        slices[pick] += np.sign(off)
    study = np.repeat(np.arange(len(slices)), slices)
    height = (np.arange(IMAGES) - (slices.cumsum() - slices)[study]) / slices[study]
    corr = np.eye(5)
    for (a, b), r in TOGETHER.items(): corr[a, b] = corr[b, a] = r
    root = np.linalg.cholesky(corr)
    severity = np.sqrt(.7) * rng.standard_normal((len(slices), 5)) @ root.T + np.sqrt(.3) * (rng.standard_normal((PATIENTS, 5)) @ root.T)[patient]
    centre = .5 + .16 * (np.sqrt(.6) * rng.standard_normal((len(slices), 1)) + np.sqrt(.4) * rng.standard_normal((len(slices), 5)))
    name = lambda n, digits: np.array([f"ID_{k:0{digits}x}" for k in rng.choice(2 ** 32, n, replace=False)], object)
    df = pd.DataFrame({"patient": name(PATIENTS, 8)[patient[study]], "study": name(len(slices), 10)[study]})
    for j, (label, n) in enumerate(zip(FIVE, POSITIVE)):
        score = severity[study, j] - (25 if j == 0 else 12) * (height - centre[study, j]) ** 2 + .03 * rng.standard_normal(IMAGES)
        df[label] = 0
        df.loc[np.argpartition(-score, n)[:n], label] = 1
    df["any"] = df[FIVE].max(axis=1)
    return df.sample(frac=1, random_state=seed, ignore_index=True)


def ours(df, seed): return make_folds(df, LABELS, "patient", 5, seed).to_numpy()


def stratified_group(df, seed): # scikit-learn, on `any`
    fold = np.empty(len(df), int)
    for k, (_, valid) in enumerate(StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(df, df["any"], df.patient)): fold[valid] = k
    return fold


def multilabel(df, seed): # iterative stratification of patients by the labels they have
    from iterstrat.ml_stratifiers import MultilabelStratifiedKFold
    has = df.groupby("patient")[LABELS].max()
    fold = pd.Series(0, index=has.index)
    for k, (_, valid) in enumerate(MultilabelStratifiedKFold(5, shuffle=True, random_state=seed).split(has, has)): fold.iloc[valid] = k
    return fold[df.patient].to_numpy()


def methods() -> dict: # name -> function
    out = {"make_folds": ours, "StratifiedGroupKFold on any": stratified_group}
    try: metadata.version("iterative-stratification")
    except metadata.PackageNotFoundError: print("iterative-stratification is not installed: MultilabelStratifiedKFold is left out"); return out
    return out | {"MultilabelStratifiedKFold on patients": multilabel}


def measure(seeds: int) -> tuple: # (a row a method and seed, evenness of make_folds by seed, facts of the tables)
    rows, even, facts = [], [], []
    for seed in range(seeds):
        df = head_ct(seed); facts.append(about(df)); print("seed", seed, facts[-1])
        for name, method in methods().items():
            wall, cpu = time.perf_counter(), time.process_time()
            fold = method(df, seed)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            audit = audit_folds(df, LABELS, "patient", fold)
            rows.append(dict(method=name, seed=seed, wall=wall, cpu=cpu, **{f"rows:{k}": v for k, v in largest_deviation(audit).items()},
                             **{f"groups:{k}": v for k, v in largest_deviation(audit, "groups").items()}))
            print(f"  {name}: {wall:.2f} s ({cpu:.2f} s of CPU), " + ", ".join(f"{k} {v:.3%}" for k, v in largest_deviation(audit).items()))
            if method is ours: even.append(evenness(df, LABELS, "patient", fold))
    return pd.DataFrame(rows), even, facts


def about(df) -> dict: # what the public table has, and this one
    c = df[FIVE].corr()
    return {"any": int(df["any"].sum()), "IPH-IVH": round(float(c.iloc[1, 2]), 3), "IPH-SAH": round(float(c.iloc[1, 3]), 3), "IVH-SAH": round(float(c.iloc[2, 3]), 3),
            "subtypes 0..5": df[FIVE].sum(axis=1).value_counts().reindex(range(6), fill_value=0).tolist()}


def table(head, rows) -> list: # lines of Markdown
    return ["| " + " | ".join(map(str, r)) + " |" for r in [head, ["---"] * len(head), *rows]]


def page(rows, even, facts) -> str: # the Markdown page
    seeds = rows.seed.nunique()
    worst = rows.groupby("method", sort=False).max(numeric_only=True)
    time_of = rows.groupby("method", sort=False)[["wall", "cpu"]].median()
    pct = lambda v: f"{v:.3%}"
    percent = lambda kind, unit: table(["largest deviation", unit, *LABELS], [[m, *(pct(worst.loc[m, f"{kind}:{c}"]) for c in ["rows" if kind == "rows" else "groups", *LABELS])] for m in worst.index])
    e = pd.concat(even).groupby(level=0, sort=False).max()
    return "\n".join([
        "# Folds", "", f"Made by `python benchmarks/folds.py`: {IMAGES:,} images × {len(LABELS)} labels, {PATIENTS:,} patients, 5 folds, {seeds} tables with seeds 0 to {seeds - 1}. The same rows and seeds for all. "
        "Of each deviation the worst fold of the worst seed is given, of the times the median.", "",
        f"Machine: {common.machine()['cpu']}, {os.cpu_count()} cores, {platform.system()}. Load average at the end {os.getloadavg()[0]:.1f}; the CPU time is what a free core would need. Python {platform.python_version()}, "
        + ", ".join(f"{p} {common.version(p)}" for p in ("numpy", "pandas", "scikit-learn", "iterative-stratification")) + ".", "",
        "## Time", "", *table(["", "wall, s", "CPU, s"], [[m, f"{t.wall:.2f}", f"{t.cpu:.2f}"] for m, t in time_of.iterrows()]), "",
        "## Evenness by images", "", "Fold size, and prevalence of each label among the images of a fold, against the whole table.", "", *percent("rows", "fold size"), "",
        "## Evenness by patients", "", "Number of patients a fold (against its share of the images), and share of patients with the label.", "", *percent("groups", "patients"), "",
        "## How near the best possible", "", "Largest deviation of a count (not of a prevalence) from its mean over the folds, `make_folds`, worst seed, and the lower bound of `best_possible`.", "",
        *table(["", "positives", "patients", "images: reached", "images: bound", "patients: reached", "patients: bound"],
               [[l, f"{int(r.positives):,}", f"{int(r.groups):,}", pct(r.reached), pct(r.best_possible), pct(r.groups_reached), pct(r.groups_best_possible)] for l, r in e.iterrows()]), "",
        "## The table", "", "Positives of the five subtypes, images and patients are those of stage 1 to the row. What follows from them:", "",
        *table(["", *PUBLIC], [["stage 1", *PUBLIC.values()], *([f"seed {i}", *f.values()] for i, f in enumerate(facts))]), ""])


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, default=3); p.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    a = p.parse_args()
    text = page(*measure(a.seeds))
    part = a.out.with_suffix(".part"); part.write_text(text, encoding="utf-8"); part.replace(a.out)
    print(f"wrote {a.out.name}")
