"""How fast do batches come, and how long does training wait for them?

    python benchmarks/loader.py                # writes benchmarks/loader.md
    python benchmarks/loader.py --quick        # a few images and one short round: does it run? Nothing is written

Iterating: `StackLoader` over memory-mapped stacks, with `Inputs` making the network's channels, beside plain fastai `ImageDataLoaders` over PNG
files of the same images (three windows as RGB, at the size of the stacks), with and without augmentation, on the same cores.
Training: epochs from our loader, beside epochs in which the batch already lies on the device, with the same Learner and the same augmentation."""
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import common
from run import describe

SIZE, OUT, BATCH, EPOCH = 256, 160, 32, 3                  # side of stacks and files, of what the network gets; how often an epoch shows each image
WINDOWS = ((40, 80), (80, 200), (600, 2800))
ONLY_OURS = ("shift", "stretch", "shade", "harden", "blur", "noise", "export", "erase")
LABELS = ["epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any"]


# the images

def write_images(folder: Path, studies: int, slices: int):
    "Phantom heads as stacks and as PNG files, and a table of both; what is there is used again."
    import numpy as np
    import pandas as pd
    from PIL import Image
    from rsna_helpers.head import make_head
    if (folder/"table.parquet").is_file(): return
    for sub in ("npy", "png"): (folder/sub).mkdir(parents=True, exist_ok=True)
    rows = []
    for s in range(studies):
        head = make_head(s, s % 2 == 0, size=SIZE, n_sub=1); name = f"s{s:04d}"; hu = head.hu[:slices]; np.save(folder/"npy"/f"{name}.npy", hu)
        for p, (x, areas) in enumerate(zip(hu, head.areas)):
            rgb = np.stack([np.clip((x - (c - w/2))/w, 0, 1)*255 for c, w in WINDOWS], -1).round().astype(np.uint8); Image.fromarray(rgb).save(folder/"png"/f"{name}_{p:03d}.png")
            rows.append(dict(study=name, position=p, file=f"{name}_{p:03d}.png", **dict(zip(LABELS, [*(areas > 0), (areas > 0).any()]))))
    table = pd.DataFrame(rows); table[LABELS] = table[LABELS].astype(int); table.to_parquet(folder/"table.parquet")


def table_of(folder, epoch: int): # as often as an epoch shows it
    import pandas as pd
    return pd.concat([pd.read_parquet(Path(folder)/"table.parquet")]*epoch, ignore_index=True)


# iterating

def iterate(dl, make=None) -> int: # images
    "All batches of an epoch, brought to the network's channels."
    n = 0
    for b in dl: x = b[0] if make is None else make(b[0]); n += len(x)
    return n


def stacks(folder, epoch, cores, workers, augment, whole=False):
    "Our loader and `Inputs`: with the augmentation that fastai does too, or all that the recipe `quick` has (`whole`)."
    import torch
    from rsna_helpers.inputs import Inputs
    from rsna_helpers.loaders import StackImages, StackLoader
    from rsna_helpers.recipes import RECIPES
    torch.set_num_threads(cores)
    dl = StackLoader(StackImages(Path(folder)/"npy", table_of(folder, epoch), LABELS), BATCH, readers=max(workers, 1), shuffle=True, drop_last=True)
    recipe = replace(RECIPES["quick"], windows=WINDOWS, size=OUT if augment else SIZE)
    make = Inputs(recipe if whole else replace(recipe, **dict.fromkeys(ONLY_OURS, 0.))).train(augment)
    return lambda: iterate(dl, make)


def pngs(folder, epoch, cores, workers, augment):
    "fastai as in its tutorials: decode, collate, then augmentation in batches."
    import torch
    from fastai.vision.all import ImageDataLoaders, aug_transforms
    torch.set_num_threads(cores)
    tfms = aug_transforms(size=OUT, max_rotate=15, min_zoom=1/1.15, max_zoom=1.15, max_lighting=.1, max_warp=0) if augment else None
    df = table_of(folder, epoch); df["valid"] = df.index == len(df) - 1
    dls = ImageDataLoaders.from_df(df, path=Path(folder)/"png", fn_col="file", label_col="any", valid_col="valid", bs=BATCH, num_workers=workers, batch_tfms=tfms, device=torch.device("cpu"))
    return lambda: iterate(dls.train)


# training

def make_training(source, folder, epoch, device, recipe):
    "A job that trains an epoch: batches from 'loader', one batch of HU that lies on the device ('hu'), or one of channels ('channels')."
    import torch
    from fastai.data.core import DataLoaders
    from fastai.callback.core import Callback, CancelValidException
    from fastai.learner import Learner
    from fastai.optimizer import Adam
    from rsna_helpers.inputs import Inputs
    from rsna_helpers.learner import MakeInputs, WeightedBCE, precision_callbacks
    from rsna_helpers.loaders import StackImages, StackLoader
    from rsna_helpers.models import build_model

    class Held(StackLoader): # the same batch again and again, on the device since before the start
        def create_batches(self, samps):
            if not hasattr(self, "held"): self.held = next(super().create_batches(iter(range(self.bs))))
            if source == "channels" and self.held[0].dtype != torch.float32: self.held = (Inputs(recipe).to(self.device).train()(self.held[0]).contiguous(memory_format=torch.channels_last), self.held[1])
            for _ in range(len(self)): yield self.held

    class Clock(Callback): # from the end of a step to the arrival of the next batch
        order = -30
        def before_train(self): self.waited, self.since = 0., time.perf_counter()
        def before_batch(self): self.waited += time.perf_counter() - self.since
        def after_batch(self): self.since = time.perf_counter()
        def before_validate(self): raise CancelValidException

    more = dict(device=torch.device(device), readers=1 if device == "cpu" else 4); kind = StackLoader if source == "loader" else Held
    dl = kind(StackImages(Path(folder)/"npy", table_of(folder, epoch), LABELS, recipe.neighbours), recipe.batch_size, shuffle=True, drop_last=True, **more)
    learn = Learner(DataLoaders(dl, dl, device=more["device"]), build_model(recipe, len(LABELS)).to(memory_format=torch.channels_last), WeightedBCE([1, 1, 1, 1, 1, 2]), Adam,
                    cbs=[Clock(), *([] if source == "channels" else [MakeInputs(recipe)]), *precision_callbacks(device)])
    def job():
        start = time.perf_counter()
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4)
        if device == "cuda": torch.cuda.synchronize()
        job.note = f"{learn.clock.waited/(time.perf_counter() - start):.4f}"           # share of the epoch
        return len(dl)*recipe.batch_size
    return job


def small(): # the recipe `quick` at 128 pixels
    from rsna_helpers.recipes import RECIPES
    return replace(RECIPES["quick"], size=128, grow=(), epochs=1, batch_size=BATCH)


def large(): # the recipe `full`, from scratch
    from rsna_helpers.recipes import RECIPES
    return replace(RECIPES["full"], pretrained=False, grow=(), epochs=1)


def training(folder, epoch, cores, source):
    "On the CPU, with all its cores."
    import torch
    torch.set_num_threads(cores)
    return make_training(source, folder, epoch, "cpu", small())


WAYS = {f"{f.__name__}_{w}": partial(f, workers=w) for w in (0, 2) for f in (stacks, pngs)} | {f"whole_{w}": partial(stacks, workers=w, whole=True) for w in (0, 2)} | {f"training_{k}": partial(training, source=k) for k in ("loader", "hu", "channels")}
CORES = {k: int(k[-1]) or 1 for k in WAYS if k[-1].isdigit()}                     # without workers one core, else one a worker
FASTER, WAIT, SHARE = 3, .05, .9                           # the targets: times fastai's images/s; at most this share of waiting; at least this share of the rate without a loader


# the table

def row(part, what, figures, target="", verdict="") -> dict:
    if "error" in figures: return {"part": part, "what": what, "images/s": figures["error"], "result": "", "target": target, "peak MB": ""}
    return {"part": part, "what": what, "images/s": f"{figures['rate']:,.0f}", "result": verdict, "target": target, "peak MB": f"{common.peak_of(figures):,.0f}" if "peak_mb" in figures else ""}


def waiting(figures) -> str: return f"waits {float(figures['note']):.1%}, {'met' if float(figures['note']) <= WAIT else 'MISSED'}"


def iterating_rows(part, figures) -> list:
    rows = []
    for w in (0, 2):
        at = f", {w} workers, {w or 1} core{'s' if w else ''}"; peer = figures[f"pngs_{w}"]; target = FASTER if "augment" in part else None
        beside = lambda f, target: "" if "error" in peer else "ours ÷ fastai " + common.verdict(f["rate"]/peer["rate"], target)
        rows.append(row(part, "fastai over PNG" + at, peer))
        rows.append(row(part, "ours" + at, f := figures[f"stacks_{w}"], f"≥ {target} ×" if target else "", beside(f, target)))
        if f := figures.get(f"whole_{w}"): rows.append(row(part, "ours with all of the recipe" + at, f, "", beside(f, None)))
    return rows


def training_rows(part, figures, wait=True, share=True) -> list: # which of the two targets there is
    ours = figures["loader"]; beside = lambda k, target=None: "the loader " + common.verdict(ours["rate"]/figures[k]["rate"], target)
    return [row(part, "from our loader", ours, f"waits ≤ {WAIT:.0%}" if wait else "", waiting(ours) if wait else f"waits {float(ours['note']):.1%}"),
            row(part, "one batch of HU on the device", figures["hu"], f"≥ {SHARE} ×" if share else "", beside("hu", SHARE if share else None)),
            row(part, "one batch of channels on the device: no augmentation either", figures["channels"], "", beside("channels"))]


def on_gpu(folder, o, recipe) -> dict: # source -> figures
    "In this process, in turns, after an epoch each that is not timed."
    import statistics
    jobs = {k: make_training(k, folder, o.epoch, "cuda", recipe) for k in ("loader", "hu", "channels")}; rates = {k: [] for k in jobs}; notes = {k: [] for k in jobs}
    for turn in range(o.rounds + 1):
        for k, job in jobs.items():
            start = time.perf_counter(); n = job(); took = time.perf_counter() - start
            if turn: rates[k].append(n/took); notes[k].append(job.note)
    return {k: dict(rate=statistics.median(rates[k]), note=sorted(notes[k])[len(notes[k])//2]) for k in jobs}


def measure(o) -> dict:
    "Iterating, then training on the CPU, then on the GPU if there is one."
    import torch
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")    # for the workers: threads that spin while they wait take the cores from other work, and from one another
    o.epoch = 8 if o.quick else EPOCH; folder = o.work/f"loader-{o.studies}-{o.slices}"; write_images(folder, o.studies, o.slices)
    everything = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    args = lambda k, epoch, **more: dict(folder=str(folder), epoch=epoch, cores=CORES.get(k, everything), **more)
    rows, figures = [], {}
    for part, ways in (("same augmentation", ("pngs", "stacks", "whole")), ("as stored", ("pngs", "stacks"))):
        jobs = lambda epoch: {part: {f"{k}_{w}": args(f"{k}_{w}", epoch, augment=part != "as stored") for w in (0, 2) for k in ways}}
        figures |= common.rounds("loader", jobs(o.epoch), jobs(o.epoch if o.quick else 1), o, CORES)
        if bad := [v["error"] for k, v in figures[part].items() if "error" in v and not k.startswith("pngs")]: raise RuntimeError(f"{part}: {bad[0]}")
        rows += iterating_rows(part, figures[part])
    ways = [k for k in WAYS if k not in CORES]; jobs = lambda epoch: {"cpu": {k: args(k, epoch) for k in ways}}
    f = {k.split("_")[1]: v for k, v in common.rounds("loader", jobs(o.epoch), jobs(o.epoch if o.quick else 1), o, {k: everything for k in ways})["cpu"].items()}
    if bad := [v["error"] for v in f.values() if "error" in v]: raise RuntimeError(f"training: {bad[0]}")
    rows += training_rows("training on the CPU", f, share=False); figures["cpu"] = f
    if torch.cuda.is_available():
        for name, recipe in dict(quick=small(), full=large()).items():
            figures[f"gpu {name}"] = on_gpu(folder, o, recipe); rows += training_rows(f"training on the GPU, {name}", figures[f"gpu {name}"], wait=False)
        gpu = torch.cuda.get_device_name()
    else: gpu = "no GPU"; rows.append(row("training on the GPU", "from our loader", dict(error="no GPU"), f"≥ {SHARE} ×"))
    images = len(table_of(folder, 1))
    notes = [f"{images:,} images of {SIZE} px, {o.epoch} times an epoch, batches of {BATCH}; median of {o.rounds} rounds, in which every way has its turn; the files are in the page cache",
             f"same augmentation: fastai's `aug_transforms` and ours flip, turn by up to 15 degrees, zoom by up to 15 %, change brightness and contrast, all to {OUT} px; the recipe `quick` does more; as stored: windows or decoded files, {SIZE} px, no augmentation",
             f"training: resnet10t at 128 px (recipe `quick`) with its augmentation; all {everything} cores on a CPU; waiting is the time from the end of a step to the next batch, the first of an epoch too",
             f"GPU: {gpu}" + ("; the recipe `full` is trained too, from scratch" if torch.cuda.is_available() else "")]
    return dict(rows=rows, notes=notes, figures=figures)


def main(argv=None):
    o = common.options(__doc__.splitlines()[0], argv); machine = common.machine()
    with common.work_folder(o): result = measure(o)
    notes = result["notes"] + describe(machine) + [", ".join(f"{p} {common.version(p)}" for p in ("timm", "pillow"))]
    body = common.report(result["rows"], notes, []); print(body)
    if o.out is None: print("a quick run: nothing was written"); return
    o.out.mkdir(parents=True, exist_ok=True)
    (o.out/"loader.md").write_text("# Batches\n\nWritten by `python benchmarks/loader.py`. What is compared: [README](README.md).\n\n" + body, encoding="utf-8")


if __name__ == "__main__": main()
