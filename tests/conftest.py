"What several test files share: the smallest phantom, trained, and the real samples where they are at hand."
import os
from pathlib import Path

import pytest

SAMPLES = Path(os.environ.get("RSNA_SAMPLES") or Path(__file__).resolve().parents[2]/"shared"/"data"/"real_dicom")


@pytest.fixture(scope="session")
def samples():
    if not SAMPLES.is_dir(): pytest.skip("no real samples: set RSNA_SAMPLES")
    return SAMPLES


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    "The caller's own settings do not reach the tests."
    for k in ("RSNA_TASK", "RSNA_RAW", "RSNA_PROFILE", "RSNA_DATA", "RSNA_MODELS"): monkeypatch.delenv(k, raising=False)


@pytest.fixture(scope="session")
def run():
    "The run of the test profile: the same that `nbdev_test` uses, so it is built once."
    from rsna_helpers.core import start
    return start(profile="test", verbose=False)


@pytest.fixture(scope="session")
def trained(run):
    "The run with its model folder."
    from rsna_helpers.train import fit
    return run, fit(run)["folder"]
