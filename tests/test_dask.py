"The same conversion on a Dask cluster, also when a worker is lost."
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rsna_helpers import npy

distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install 'rsna_helpers[dask]'")


@pytest.fixture(scope="module")
def cluster():
    import dask
    with dask.config.set({"distributed.scheduler.allowed-failures": 1}), distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as c: yield c


def table(n_studies=12, n=5):
    study = np.repeat([f"s{k}" for k in range(n_studies)], n); m = len(study)
    return pd.DataFrame(dict(image=[f"i{k}" for k in range(m)], patient="p", study=study, series=study, split="train", path=[f"{s}/{k}" for k, s in enumerate(study)], z=np.arange(m)*5., instance=np.arange(m),
                             tilt=0., thickness=5., spacing_row=1., spacing_col=1., rows=64, columns=64, error=None, **{f"ori_{i}": float(v) for i, v in enumerate([1, 0, 0, 0, 1, 0])}))


def read(path):
    hu = np.full((64, 64), -1000, np.int16); hu[10:50, 14:52] = sum(map(ord, path.split("/")[-1])) % 90
    return hu, {}


def files(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir() if not p.name.startswith(".")}


def test_a_lost_worker_changes_nothing(cluster, tmp_path):
    alone = npy.convert(table(), tmp_path/"alone", read, size=32, n_jobs=1, progress=False); sign = tmp_path/"killed"
    def deadly_once(path):
        if path.endswith("/27") and not sign.exists():
            sign.write_text(str(os.getpid())); os.kill(os.getpid(), signal.SIGKILL)
        return read(path)
    with distributed.Client(cluster) as client: there = npy.convert(table(), tmp_path/"cluster", deadly_once, size=32, progress=False, cluster=client)
    assert sign.read_text() != str(os.getpid())                                    # it was a worker that died
    pd.testing.assert_frame_equal(there.drop(columns="path"), alone.drop(columns="path"))
    assert {k: v for k, v in files(tmp_path/"cluster").items() if k.endswith(".npy")} == {k: v for k, v in files(tmp_path/"alone").items() if k.endswith(".npy")}


def test_a_file_that_kills_every_worker_is_named(cluster, tmp_path):
    def deadly(path):
        if path.endswith("/27"): os._exit(3)
        return read(path)
    index = npy.convert(table(), tmp_path, deadly, size=32, progress=False, cluster=cluster)
    bad = index[index.error.notna()]
    assert bad.path.str.endswith("/27").all() and len(bad) == 1 and "died" in bad.error.iloc[0] and (index.position >= 0).sum() == len(table()) - 1


def test_an_error_of_the_disk_comes_back(cluster, tmp_path):
    def full(path): raise OSError(28, "No space left on device", "/somewhere")
    with pytest.raises(OSError, match="/somewhere"): npy.convert(table(), tmp_path, full, size=32, progress=False, cluster=cluster)


def test_create_npy_on_a_cluster_by_its_address(run, cluster, tmp_path):
    a, b = replace(run, data=tmp_path/"a"), replace(run, data=tmp_path/"b")
    pd.testing.assert_frame_equal(npy.create_npy(a, size=32, n_jobs=1, progress=False), npy.create_npy(b, size=32, cluster=cluster.scheduler_address, progress=False))
    assert {k: v for k, v in files(a.data/"npy").items()} == files(b.data/"npy")
