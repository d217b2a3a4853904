"Whatever ends a conversion, and whenever: running it again gives the same bytes, and does only what was missing."
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rsna_helpers import npy, stacks

STUDIES, SLICES = 8, 6
SCRIPT = '''
import os, signal, sys, time
import numpy as np, pandas as pd
from rsna_helpers import npy

def read(path):
    "A slice that follows from its name; what is read is written down. `fatal/` files end the process."
    with open(LOG, "a") as f: f.write(path + "\\n")
    time.sleep(PAUSE)
    if path.startswith("fatal/"): os.kill(os.getpid(), signal.SIGSEGV) if path.endswith("7") else os._exit(3)
    hu = np.full((64, 64), -1000, np.int16); hu[10:50, 14:52] = sum(map(ord, path)) % 90
    return hu, {}

if __name__ == "__main__":
    table, out, LOG, PAUSE, n_jobs = sys.argv[1:]; PAUSE = float(PAUSE)
    npy.convert(pd.read_parquet(table), out, read, size=32, n_jobs=int(n_jobs), progress=False)
'''


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    "A script that converts a table of studies, the table, and the files of an undisturbed run."
    d = tmp_path_factory.mktemp("resume"); (d/"script.py").write_text(SCRIPT); n = STUDIES*SLICES
    study = np.repeat([f"s{k}" for k in range(STUDIES)], SLICES)
    t = pd.DataFrame(dict(image=[f"i{k}" for k in range(n)], patient="p", study=study, series=study, split="train", path=[f"{s}/{k}" for k, s in enumerate(study)], z=np.arange(n)*5., instance=np.arange(n),
                          tilt=0., thickness=5., spacing_row=1., spacing_col=1., rows=64, columns=64, error=None, **{f"ori_{i}": float(v) for i, v in enumerate([1, 0, 0, 0, 1, 0])}))
    t.to_parquet(d/"table.parquet"); run_to_the_end(d, d/"whole")
    return d, files(d/"whole")


def files(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir() if not p.name.startswith(".")}


def command(d, out, pause=0., n_jobs=1): return [sys.executable, str(d/"script.py"), str(d/"table.parquet"), str(out), str(out) + ".log", str(pause), str(n_jobs)]


def run_to_the_end(d, out): # in this process
    space = {"__name__": "script", "LOG": str(out) + ".log", "PAUSE": 0}; exec(SCRIPT, space)
    return npy.convert(pd.read_parquet(d/"table.parquet"), out, space["read"], size=32, n_jobs=1, progress=False)


def reads(out): return Path(str(out) + ".log").read_text().splitlines() if Path(str(out) + ".log").exists() else []


def kill_after(d, out, n, n_jobs, all_of_it=True): # -9 to all its processes, or to the first alone, as soon as `n` more files were read
    n += len(reads(out)); p = subprocess.Popen(command(d, out, pause=.01, n_jobs=n_jobs), start_new_session=True, stderr=subprocess.DEVNULL)
    while len(reads(out)) < n and p.poll() is None: time.sleep(.002)
    os.killpg(p.pid, signal.SIGKILL) if all_of_it else p.kill()
    p.wait(); return p.pid


@pytest.mark.parametrize("seed,n_jobs", [(0, 1), (1, 2)])
def test_killed_twice_at_any_moment(job, tmp_path, seed, n_jobs):
    d, whole = job; rng = random.Random(seed); out = tmp_path/"npy"; finished = set()
    for _ in range(2):
        kill_after(d, out, rng.randrange(1, STUDIES*SLICES//2), n_jobs)
        seen = files(out)
        assert {k: v for k, v in seen.items() if k.endswith(".npy")}.items() <= whole.items()              # whole, or not to be seen
        assert set(seen) <= set(whole)
        at = len(reads(out)); done = {p.stem for p in (out/stacks.NOTES).glob("*.json")}; finished |= done
    run_to_the_end(d, out)
    assert files(out) == whole
    again = [p.split("/")[0] for p in reads(out)[at:]]
    assert not finished & set(again) and set(again) == {f"s{k}" for k in range(STUDIES)} - finished and len(again) == SLICES*(STUDIES - len(finished))
    before = len(reads(out)); run_to_the_end(d, out); assert len(reads(out)) == before                     # nothing is left to do
    assert not [p for p in out.rglob("*") if p.name.endswith((".part", ".reading"))]


def test_workers_that_outlive_the_run_do_no_harm(job, tmp_path):
    "The main process alone is killed; its workers are still at it when the next run, of another size, begins."
    d, whole = job; out = tmp_path/"npy"; group = kill_after(d, out, 9, 2, all_of_it=False)
    try:
        t = pd.read_parquet(d/"table.parquet"); space = {"__name__": "script", "LOG": str(out) + ".log", "PAUSE": .02}; exec(SCRIPT, space)
        npy.convert(t, out, space["read"], size=16, n_jobs=1, progress=False)
        assert {npy.load_stack(out, s).shape for s in t.study.unique()} == {(SLICES, 16, 16)}
        run_to_the_end(d, out); assert files(out) == whole
    finally:
        try: os.killpg(group, signal.SIGKILL)
        except ProcessLookupError: pass


class Killed(BaseException): "Not an error that anything may catch."


def test_ended_at_every_step(job, tmp_path, monkeypatch):
    "Before and after each rename, of a stack, of a note and of the index."
    d, whole = job; rename = os.replace; steps = 2*STUDIES + 3
    for late in (False, True):
        for k in range(steps):
            out = tmp_path/f"{k}{late}"; count = iter(range(10**6))
            def ended(a, b):
                if (n := next(count)) == k and not late: raise Killed
                rename(a, b)
                if n == k and late: raise Killed
            with monkeypatch.context() as m:
                m.setattr(os, "replace", ended)
                with pytest.raises(Killed): run_to_the_end(d, out)
            stopped = {k: v for k, v in files(out).items() if k.endswith(".npy")}; assert stopped.items() <= whole.items()
            run_to_the_end(d, out); assert files(out) == whole, (k, late)
    assert len(reads(out)) == SLICES*STUDIES                                                              # ended at the last step: nothing was read twice


def test_files_that_end_the_process_are_named_and_the_rest_is_made(job, tmp_path, caplog):
    d, whole = job; t = pd.read_parquet(d/"table.parquet"); t.loc[[7, 20], "path"] = ["fatal/7", "fatal/20"]
    space = {"__name__": "script", "LOG": str(tmp_path/"log"), "PAUSE": 0}; exec(SCRIPT, space)
    index = npy.convert(t, tmp_path/"npy", space["read"], size=32, n_jobs=2, progress=False)
    bad = index[index.error.notna()].set_index("path").error
    assert set(bad.index) == {"fatal/7", "fatal/20"} and bad.str.contains("the process that read it died").all() and "SIGSEGV" in bad["fatal/7"]
    assert len(index) == len(t) and (index.position >= 0).sum() == len(t) - 2 and "fatal/7" in caplog.text
    made = files(tmp_path/"npy"); hurt = {f"{s}.npy" for s in t.study[[7, 20]]}
    assert {k: v for k, v in made.items() if k.endswith(".npy") and k not in hurt} == {k: v for k, v in whole.items() if k.endswith(".npy") and k not in hurt}


def test_what_is_no_failure_of_a_file_is_not_swallowed(job, tmp_path):
    d, _ = job
    for wrong in (MemoryError, KeyboardInterrupt, ZeroDivisionError):
        def read(path): raise wrong
        with pytest.raises(wrong): npy.convert(pd.read_parquet(d/"table.parquet"), tmp_path/wrong.__name__, read, size=32, n_jobs=1, progress=False)
