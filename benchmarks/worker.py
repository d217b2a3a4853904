"""One process for one way of doing a job: `python worker.py <script> <way> <cores>`; requests and answers are lines of JSON.

A process of its own gives each way its own peak memory, and keeps it to one thread and one core. The ways take turns, so they may share that core."""
import importlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import common


def stay_on(cores: int):
    "Keep this process and its children on `cores` cores, where the system lets us."
    if hasattr(os, "sched_setaffinity"): os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
    try:
        import cv2
        cv2.setNumThreads(1)
    except ImportError: pass


def repeat(job, out, seconds: float) -> dict:
    "Do the job into an empty folder, again and again until `seconds` have passed; the emptying is not timed."
    times, before = [], common.disk_bytes()
    while not times or sum(times) < seconds:
        if out: shutil.rmtree(out, ignore_errors=True); Path(out).mkdir(parents=True)
        start = time.perf_counter(); value = job(); times.append(time.perf_counter() - start)
    return dict(value=value, seconds=sum(times), repeats=len(times), disk=[b - a for a, b in zip(before, common.disk_bytes())])


def answer(way, request: dict, cores: int) -> dict:
    "Set up with the request's arguments, run, and say how long it took and how much memory it held."
    try:
        common.reset_peak()
        job = way(**request["args"])                       # imports and preparation: not timed, and on any core
        stay_on(cores); start = common.peak_memory()
        return repeat(job, request["args"].get("out"), request["seconds"]) | dict(start_mb=start, note=getattr(job, "note", ""),
                                                                                  peak_mb=common.peak_memory(), child_mb=common.peak_of_children())
    except Exception as e: # a peer that fails is a row of the table
        return dict(error=f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}")


if __name__ == "__main__":
    script, way, cores = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w"); os.dup2(2, 1)     # what libraries print must not get into the answers
    ways = importlib.import_module(script).WAYS
    for line in sys.stdin:
        replies.write(json.dumps(answer(ways[way], json.loads(line), int(cores))) + "\n"); replies.flush()
