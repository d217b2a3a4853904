"The benchmarks run on a few files, and their table has all rows. How fast anything is, is not tested."
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest

ROOT = Path(__file__).resolve().parents[1]; FOLDER = ROOT/"benchmarks"


@pytest.fixture(scope="module")
def bench():
    "The scripts as modules; they import one another as scripts do."
    sys.path.insert(0, str(FOLDER))
    import common, conversion, files, headers, loader, memory, scaling
    yield dict(common=common, conversion=conversion, files=files, headers=headers, loader=loader, memory=memory, scaling=scaling)
    sys.path.remove(str(FOLDER))
    for m in ("common", "conversion", "files", "headers", "loader", "memory", "run", "scaling"): sys.modules.pop(m, None)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "One quick run: (its output, the folder with what it wrote, the folder with its files)."
    pytest.importorskip("imagecodecs", reason="the benchmarks want the extra `bench`")
    out, work = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("work")
    r = subprocess.run([sys.executable, str(FOLDER/"run.py"), "--quick", "--out", str(out), "--work", str(work)], capture_output=True, text=True,
                       env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])})
    assert r.returncode == 0, r.stderr[-2000:]
    return r.stdout, out, work


def cells(text: str) -> list: # every row of the tables in a Markdown text
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]


def test_the_table_has_all_rows(bench, done):
    text, out, _ = done; c = bench["conversion"]
    assert set(cells((out/"results.md").read_text())[0]) == {"part", "what", "images/s", "ours ÷ it", "ours, whole ÷ it", "target", "peak MB"}
    rows = [r for r in cells((out/"results.md").read_text()) if r[0] in ("plain", "JPEG Lossless", "headers", "memory")]
    for part in ("plain", "JPEG Lossless"):
        what = [r[1] for r in rows if r[0] == part]
        assert len(what) == len(c.LABELS) and all(any(w == l or w.startswith(l + ", ") for w in what) for l in c.LABELS.values())
    assert [r[0] for r in rows].count("headers") == 3 and [r[0] for r in rows].count("memory") == 4
    assert cells(text) == cells((out/"results.md").read_text())


def test_own_rows_have_figures_and_targets_have_verdicts(done):
    rows = [r for r in cells((done[1]/"results.md").read_text()) if r[0] in ("plain", "JPEG Lossless", "headers", "memory")]
    for r in rows:
        ours = r[0] == "memory" or r[1].startswith(("ours", "(d)", "pydicom", "(c)")); works = r[2].replace(",", "").isdigit()
        assert works or not ours, r
        if works and r[5]: assert any("met" in v or "MISSED" in v for v in (r[3], r[4], r[6])), r
        if works: assert float(r[6].split(",", 1)[0] if r[0] != "memory" else r[6].split(", M")[0].split(", m")[0].replace(",", "")) > 0


def test_figures_and_scaling_are_written(bench, done):
    _, out, _ = done; kept = json.loads((out/"results.json").read_text())
    assert kept["quick"] and kept["machine"]["cores"] >= 1 and kept["machine"]["versions"]["numpy"] == np.__version__
    assert kept["figures"]["conversion"]["plain"]["ours"]["images"] == 12
    text = (out/"scaling.md").read_text()
    assert text == bench["scaling"].text(kept) and "quick run" in text
    assert len([r for r in cells(text) if r[1] in ("2", "16", "256")]) == 9


def test_jpeg_files_hold_the_pixels_of_the_plain_ones(done):
    work = done[2]
    for k in (0, 1):
        for i in (0, 5): assert np.array_equal(*(pydicom.dcmread(work/f"{s}-6"/f"{k:05d}"/f"{i:04d}.dcm").pixel_array for s in ("plain", "jpeg")))
    ds = pydicom.dcmread(work/"jpeg-6"/"00000"/"0000.dcm"); assert ds.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.4.70"


def test_the_frame_is_found_without_pydicom(bench):
    from pydicom.encaps import encapsulate
    frame = b"\xff\xd8" + bytes(range(100)) + b"\xff\xd9"
    data = b"header" + b"\xe0\x7f\x10\x00OB\x00\x00\xff\xff\xff\xff" + encapsulate([frame]) + b"\xfe\xff\xdd\xe0\0\0\0\0"
    assert bytes(bench["conversion"].frame_of(memoryview(data))) == frame


def test_a_way_that_fails_is_an_answer(bench):
    w = bench["common"].Worker("headers", "loop"); w.ask(paths=["/nowhere.dcm"])
    try: assert w.hear()["error"].startswith("FileNotFoundError")
    finally: w.close()


def test_peak_memory_grows_by_what_is_held(bench):
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import common; a = common.peak_memory(); b = bytearray(b'x')*(200 << 20); print(common.peak_memory() - a)"
    assert 190 < float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) < 450


def test_hours_follow_the_scarcest_resource(bench):
    s = bench["scaling"]; way = lambda r: dict(rate=r)
    f = dict(conversion={"plain": dict(ours=way(100), ours_two=way(200)), "file_bytes": {"plain": 500_000}}, headers=dict(ours=way(1000), cold_bytes=0))
    h = s.stages(f, 360_000, "plain", 100, 2, 1., 1e9, 100_000)["convert"]
    assert h["cpu"] == pytest.approx(.5 + 1/3600) and h["disk"] == pytest.approx(.06) and max(h, key=h.get) == "cpu"
    h = s.stages(f, 360_000, "plain", 100, 256, .1, 1e9, 100_000)["convert"]
    assert max(h, key=h.get) == "disk"


def test_every_requirements_line_is_an_extra(monkeypatch):
    got = {}; setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **k: got.update(k)); runpy.run_path(str(ROOT/"setup.py"))
    assert set(got["extras_require"]) >= {"dev", "bench"} and any(r.startswith("kornia") for r in got["extras_require"]["bench"])
    assert not any(r.startswith("kornia") for r in got["install_requires"])


def test_every_way_of_the_loader_benchmark_counts_its_images(bench, tmp_path):
    import torch
    b = bench["loader"]; b.write_images(tmp_path, 2, 4); cores = torch.get_num_threads(); args = dict(folder=str(tmp_path), epoch=9, cores=cores)
    assert len(b.table_of(tmp_path, 9)) == 72
    for augment in (True, False):
        assert {k: b.WAYS[k](**args, augment=augment)() for k in ("stacks_0", "whole_0", "pngs_0")} == dict(stacks_0=64, whole_0=64, pngs_0=64)
    for source in ("loader", "hu", "channels"):
        job = b.make_training(source, tmp_path, 9, "cpu", b.replace(b.small(), size=32, backbone="test_resnet"))
        assert job() == 64 and 0 <= float(job.note) < 1


def test_rows_of_the_loader_benchmark_say_whether_targets_are_met(bench):
    b = bench["loader"]; f = lambda rate, note="": dict(rate=rate, note=note, peak_mb=1, child_mb=2)
    rows = b.iterating_rows("same augmentation", {k: f(v) for k, v in dict(pngs_0=100, stacks_0=310, whole_0=250, pngs_2=100, stacks_2=290, whole_2=200).items()})
    assert [r["result"] for r in rows] == ["", "ours ÷ fastai 3.10 ×, met", "ours ÷ fastai 2.50 ×", "", "ours ÷ fastai 2.90 ×, MISSED", "ours ÷ fastai 2.00 ×"]
    rows = b.training_rows("x", dict(loader=f(85, ".06"), hu=f(100), channels=f(120)))
    assert [r["result"] for r in rows] == ["waits 6.0%, MISSED", "the loader 0.85 ×, MISSED", "the loader 0.71 ×"]
    rows = b.iterating_rows("as stored", {k: f(1) if "png" not in k else dict(error="gone") for k in ("pngs_0", "stacks_0", "pngs_2", "stacks_2")})
    assert rows[0]["images/s"] == "gone" and rows[1]["result"] == rows[1]["target"] == ""
