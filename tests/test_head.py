"The synthetic head: same seed, same study, in any process; blood only where it was asked for, and where its kind belongs."
import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from rsna_helpers import bleeds
from rsna_helpers.bleeds import EDH, IVH, KINDS, SAH
from rsna_helpers.head import make_head

SMALL = dict(size=96, n_sub=1)
HASH = "import hashlib; from rsna_helpers.head import make_head; print(hashlib.md5(make_head(11, True, size=96, n_sub=1).hu.tobytes()).hexdigest())"


def test_same_seed_same_study_in_another_process():
    here = hashlib.md5(make_head(11, True, **SMALL).hu.tobytes()).hexdigest()
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p), PYTHONHASHSEED="7")
    assert subprocess.run([sys.executable, "-c", HASH], capture_output=True, text=True, check=True, env=env).stdout.strip() == here


def test_order_of_calls_does_not_matter():
    a = make_head(3, True, **SMALL); make_head(4, False, **SMALL)
    assert np.array_equal(a.hu, make_head(3, True, **SMALL).hu)


@pytest.mark.parametrize("size", [64, 98, 130])
def test_any_even_size(size):
    st = make_head(8, True, size=size, n_sub=2, keep_masks=True)
    assert st.hu.shape[1:] == (size, size) and st.hu.dtype == np.int16
    assert st.masks.shape == (len(st.hu), len(KINDS), size//2, size//2) and 0 <= st.masks.min() and st.masks.max() <= 1.0001
    assert np.isfinite(st.areas).all() and st.areas.shape == (len(st.hu), len(KINDS))


def test_no_blood_without_bleeding():
    assert max(make_head(s, False, **SMALL).areas.max() for s in range(5)) == 0


def test_truth_lies_on_bright_or_settled_pixels(monkeypatch):
    "Fresh blood is brighter in the image than the rest of the brain, where the truth says so."
    for story, kind in ((bleeds._epidural, EDH), (bleeds._ventricles, IVH), (bleeds._aneurysm, SAH)):
        monkeypatch.setattr(bleeds, "STORIES", {story: 1.0}); found = 0
        for seed in range(6):
            st = make_head(seed, True, size=256, n_sub=1, keep_masks=True); small = st.hu[:, ::2, ::2].astype(float)
            blood = st.masks[:, kind] > .8; rest = (st.masks.max(1) == 0) & (small > 5) & (small < 45)
            if blood.sum() > 30: found += 1; assert np.median(small[blood]) > np.median(small[rest]) + 8, (KINDS[kind], seed)
        assert found >= 2, KINDS[kind]


def test_bad_arguments_are_named():
    for bad in (dict(size=95), dict(size=10), dict(n_sub=0)):
        with pytest.raises(ValueError, match=next(iter(bad))): make_head(1, True, **bad)
