"What the benchmarks share: options, workers, memory, the machine, tables."
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = ("rsna_helpers", "pydicom", "numpy", "pandas", "opencv-python-headless", "joblib", "fastai", "monai", "torch", "imagecodecs", "python-gdcm")
ONE_THREAD = {k: "1" for k in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")}


# options

def options(description: str, argv=None) -> argparse.Namespace:
    "The options that all scripts take."
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--studies", type=int, default=20, help="studies of about 30 slices (default 20)")
    p.add_argument("--rounds", type=int, default=3, help="rounds, in each of which every way has its turn (default 3)")
    p.add_argument("--quick", action="store_true", help="a few files and one short round: does it run?")
    p.add_argument("--work", type=Path, help="folder for the files; kept, and used again (default: a temporary one)")
    p.add_argument("--out", type=Path, help="run.py: folder for results.md, results.json, scaling.md (default: benchmarks/; a quick run writes none)")
    o = p.parse_args(argv)
    if o.studies < 1 or o.rounds < 1: p.error("--studies and --rounds must be at least 1")
    if o.quick: o.studies, o.rounds = min(o.studies, 2), 1
    elif o.out is None: o.out = HERE
    o.seconds, o.slices = (0, 6) if o.quick else (1, 30)   # a turn lasts at least so many seconds; a study has at most so many slices
    return o


@contextmanager
def work_folder(o: argparse.Namespace):
    "The folder for files: the one that was named, or a temporary one."
    with ExitStack() as stack:
        if o.work is None: o.work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        o.work.mkdir(parents=True, exist_ok=True)
        yield o.work


# workers

class Worker:
    "A process that does one way of a script's job, on request."
    def __init__(self, script: str, way: str, cores: int = 1):
        self.way = way; env = os.environ | ONE_THREAD | dict(CUDA_VISIBLE_DEVICES="", PYTHONWARNINGS="ignore")
        self.proc = subprocess.Popen([sys.executable, str(HERE/"worker.py"), script, way, str(cores)], env=env, text=True,
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def ask(self, seconds: float = 0, **args):
        "Have the job done, for `seconds` or once, and do not wait."
        try: self.proc.stdin.write(json.dumps(dict(args=args, seconds=seconds)) + "\n"); self.proc.stdin.flush()
        except BrokenPipeError: pass                       # it has died: `hear` says so

    def hear(self) -> dict:
        "The answer of `worker.answer`, when it comes."
        line = self.proc.stdout.readline()
        return json.loads(line) if line else dict(error=f"the process ended with code {self.proc.wait()}")

    def close(self):
        "The process ends when its input does."
        try: self.proc.stdin.close()
        except BrokenPipeError: pass
        self.proc.stdout.close(); self.proc.wait()


def run_once(script: str, way: str, warm: dict = None, seconds: float = 0, **args) -> dict: # the worker's answer
    "One job in a process of its own, after a smaller one (`warm`) if there is one. Raises `RuntimeError` if it fails."
    w = Worker(script, way)
    try:
        if warm: w.ask(**warm); w.hear()
        w.ask(seconds=seconds, **args); answer = w.hear()
    finally: w.close()
    if "error" in answer: raise RuntimeError(f"{script}, {way}: {answer['error']}")
    return answer


def rounds(script: str,
           sets: dict,           # name of a set of files -> {way: its arguments}
           warm: dict,           # the same for a first, smaller job, after which libraries, pools and codecs are warm
           o: argparse.Namespace,
           cores: dict = {},     # way -> cores, where it is not one
          ) -> dict:             # name -> {way: dict(rate, best, images, peak_mb, …) or dict(error)}
    "Every way has its turn in every round, so that a slow minute of the machine hits all of them. The rate is the median of the rounds."
    workers = {k: Worker(script, k, cores.get(k, 1)) for k in next(iter(sets.values()))}; turns = {n: {k: [] for k in workers} for n in sets}
    try:
        for n in sets:
            for k, w in workers.items(): w.ask(**warm[n][k])               # all at once: most of it is imports
            for w in workers.values(): w.hear()
            for _ in range(o.rounds):
                for k, w in workers.items(): w.ask(seconds=o.seconds, **sets[n][k]); turns[n][k].append(w.hear())
    finally:
        for w in workers.values(): w.close()
    return {n: {k: summary(t) for k, t in of.items()} for n, of in turns.items()}


def summary(turns: list) -> dict: # the figures of one way
    "Median and best rate of some turns, and the memory at their end."
    bad = [t["error"] for t in turns if "error" in t]; last = turns[-1]
    if bad: return dict(error=bad[0])
    rates = [t["value"]*t["repeats"]/t["seconds"] for t in turns]
    return dict(rate=statistics.median(rates), best=max(rates), images=last["value"], peak_mb=max(t["peak_mb"] for t in turns), child_mb=last["child_mb"], start_mb=last["start_mb"], note=last["note"])


# memory, disk, machine

def peak_memory(pid="self") -> float: # MB; nan where the system does not say
    """The most memory a process ever held (resident), or since `reset_peak`.

    `ru_maxrss` also counts what the parent held before it started this program, so it serves only where there is no /proc."""
    try: lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError: lines = []
    kb = [int(l.split()[1]) for l in lines if l.startswith("VmHWM")]
    if kb: return kb[0]/1024
    if pid != "self": return float("nan")
    try: import resource
    except ImportError: return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if sys.platform == "darwin" else 2**10)


def reset_peak():
    "Start the peak of this process anew from what it holds, where the system can do that."
    try: Path("/proc/self/clear_refs").write_text("5")
    except OSError: pass


def peak_of_children() -> float: # MB, of the largest; 0 where there are none
    "Peak memory of the largest process under this one that still lives."
    def below(pid):
        try: kids = [k for f in Path(f"/proc/{pid}/task").glob("*/children") for k in f.read_text().split()]
        except OSError: return []
        return kids + [g for k in kids for g in below(k)]
    return max((peak_memory(k) for k in below(os.getpid())), default=0.)


def disk_bytes() -> tuple: # (read, written) since the start of this process; zeros where the system does not say
    "Bytes that this process made the disk read and write; what comes from the page cache does not count."
    try: io = dict(l.split(": ") for l in Path("/proc/self/io").read_text().splitlines())
    except OSError: return 0, 0
    return int(io["read_bytes"]), int(io["write_bytes"])


def machine() -> dict: # what the figures depend on
    "CPU, cores, memory, system, load, versions."
    try: cpu = next(l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name"))
    except (OSError, StopIteration): cpu = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE")*os.sysconf("SC_PHYS_PAGES")/2**30 if hasattr(os, "sysconf") else float("nan")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return dict(cpu=cpu, cores=cores, memory_gb=round(memory, 1), system=platform.platform(), load=round(load, 2), versions={"python": platform.python_version()} | {p: version(p) for p in PACKAGES})


def version(package: str) -> str:
    try: return metadata.version(package)
    except metadata.PackageNotFoundError: return "not installed"


# tables

def verdict(value: float, target=None, of: str = "", least: bool = True) -> str: # "3.10 ×, MISSED"
    "A ratio and whether it meets its target: at least it, or at most it."
    text = f"{value:.2f} ×{of}"
    return text if target is None else f"{text}, {'met' if (value >= target if least else value <= target) else 'MISSED'}"


def row(part: str, what: str, figures: dict, target: str = "", default: str = "", whole: str = "", memory: str = "") -> dict:
    """A row of the table. `default` and `whole` say how many times as fast ours is with its defaults, and with `crop=False`.

    `memory` is a remark behind the peak, which is that of the largest process."""
    ok = "error" not in figures
    rate = f"{figures['rate']:,.0f}" if ok else figures["error"]
    peak = f"{peak_of(figures):,.0f}{memory}" if ok else ""
    return {"part": part, "what": what, "images/s": rate, "ours ÷ it": default, "ours, whole ÷ it": whole, "target": target, "peak MB": peak}


def peak_of(figures: dict) -> float: return max(figures["peak_mb"], figures["child_mb"])


def markdown(rows: list) -> str:
    "A list of dicts as a table, aligned so that it can be read in a terminal."
    head = list(rows[0]); cells = [head] + [[str(r[h]) for h in head] for r in rows]
    wide = [max(len(c[i]) for c in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(v.ljust(w) for v, w in zip(c, wide)) + " |" for c in cells]
    return "\n".join([lines[0], "|" + "|".join("-"*(w + 2) for w in wide) + "|", *lines[1:]])


def main(measure, description: str, argv=None):
    "Run one script by itself: print its table and notes."
    o = options(description, argv)
    with work_folder(o): result = measure(o)
    print(report(result["rows"], result["notes"], result.get("tables", [])))


def report(rows: list, notes: list, tables: list) -> str:
    "The table, what belongs to it, and further tables with their titles."
    return "\n\n".join([markdown(rows), "\n".join("- " + n for n in notes), *(f"{title}\n\n{markdown(r)}" for title, r in tables)]) + "\n"
