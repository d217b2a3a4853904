"Studies that come in windows, whatever happens to a decoder, and a budget that is kept whatever the machine does."
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rsna_helpers.npy import convert
from rsna_helpers.streaming import Budget, name_stacks, plan_ladder, plan_windows, stream_stacks

LAYOUT = dict(size=32, crop=True, spacing=None)


def headers(studies, slices):
    n = studies*slices; study = np.repeat([f"s{k:02d}" for k in range(studies)], slices)
    return pd.DataFrame(dict(image=[f"i{k}" for k in range(n)], patient="p", study=study, series=study, split="test", path=[f"{k}" for k in range(n)], z=np.arange(n)*5., instance=np.arange(n), tilt=0.,
                             thickness=5., spacing_row=1., spacing_col=1., rows=64, columns=64, error=None, **{f"ori_{i}": float(v) for i, v in enumerate([1, 0, 0, 0, 1, 0])}))


def read(path):
    if path.startswith("fatal"): os.kill(os.getpid(), signal.SIGSEGV)
    hu = np.full((64, 64), -1000, np.int16); hu[10:50, 14:52] = int(path) % 90
    return hu, {}


@pytest.mark.parametrize("seed", range(5))
def test_windows_hold_every_study_once_and_no_study_alone(seed):
    rng = random.Random(seed); sizes = {f"s{k}": rng.choice([1, 30, 400, 3000]) for k in range(rng.randrange(2, 60))}
    w = plan_windows(sizes, 2000)
    assert sum(w, []) == list(sizes) and min(map(len, w)) >= 2
    assert all(sum(sizes[n] for n in part[:-2]) <= 2000 for part in w)


def test_stacks_and_rows_are_those_of_02(tmp_path):
    t = headers(12, 5); t.loc[[3, 17], "error"] = "cut off"; t.loc[20:22, "series"] = "another"; t.loc[30:34, "error"] = "empty"
    whole = convert(t, tmp_path/"whole", read, n_jobs=1, progress=False, **LAYOUT); parts = []
    for index, folder, seconds in stream_stacks(name_stacks(t), tmp_path/"w", read, LAYOUT, n_jobs=1, most=15):
        for s in index.study[index.position >= 0].unique(): np.testing.assert_array_equal(np.load(folder/f"{s}.npy"), np.load(tmp_path/"whole"/f"{s}.npy"))
        assert len(list((tmp_path/"w").glob("window_*"))) <= 2 and seconds > 0
        parts.append(index)
    assert len(parts) > 3 and not list((tmp_path/"w").iterdir())
    pd.testing.assert_frame_equal(pd.concat(parts, ignore_index=True), whole)
    assert (whole.study == "s04-1").sum() == 2 or whole.study.str.endswith("-1").any()


def test_a_decoder_that_crashes_costs_one_image(tmp_path):
    t = headers(6, 4); t.loc[9, "path"] = "fatal"
    index = pd.concat([w for w, _, _ in stream_stacks(name_stacks(t), tmp_path, read, LAYOUT, n_jobs=2, most=8)]).set_index("image")
    assert len(index) == 24 and (index.position >= 0).sum() == 23 and "died" in index.error["i9"]


def test_leaving_early_leaves_nothing_behind(tmp_path):
    s = stream_stacks(name_stacks(headers(12, 4)), tmp_path, read, LAYOUT, n_jobs=1, most=8); next(s); s.close()
    assert not list(tmp_path.iterdir())


def test_a_window_that_does_not_come_is_not_waited_for(tmp_path):
    def slow(path): time.sleep(.05); return read(path)
    assert list(stream_stacks(name_stacks(headers(4, 4)), tmp_path, slow, LAYOUT, n_jobs=1, most=8, left=lambda: 0)) == []


class Machine:
    "A network and decoders on a clock of their own: nothing sleeps."
    def __init__(self, seed, unit, decode, noise): self.now, self.rng, self.unit, self.decode, self.noise, self.ready = 0., np.random.default_rng(seed), unit, decode, noise, 0.
    def clock(self): return self.now
    def run(self, hours, sizes, views=4, folds=5, slower=1.):
        b = Budget(plan_ladder(views, folds), hours, self.clock); b.worked(32, len(b.plans) - 1, 32*self.unit); took = []
        for k, n in enumerate(sizes):
            jitter = self.rng.uniform(1 - self.noise, 1 + self.noise, 2)*(slower if k > len(sizes)/3 else 1)
            self.ready += n*self.decode*jitter[0]; b.decoded(n, n*self.decode*jitter[0]); self.now = max(self.now, self.ready)
            plan = b.choose(n, sum(sizes[k+1:]), f"s{k}")
            if plan is None: return took + [None]*(len(sizes) - k), b
            seconds = n*self.unit*b.cost[plan]*jitter[1]; self.now += seconds; b.worked(n, plan, seconds); took.append(plan)
        return took, b


def need(sizes, unit, views=4, folds=5): return sum(sizes)*unit*views*folds/3600


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [2, 1.1, .7, .5, .2, .06, .03])
def test_the_budget_is_never_exceeded(seed, share):
    rng = np.random.default_rng(seed); sizes = rng.integers(20, 60, 120).tolist(); unit = .004
    for noise, slower in ((0, 1), (.4, 1), (.2, 1.5)):
        m = Machine(seed, unit, .002, noise); took, b = m.run(share*need(sizes, unit), sizes, slower=slower)
        assert m.now <= 3600*share*need(sizes, unit), (noise, slower)
        ranks = [len(b.plans) if t is None else t for t in took]; assert len(ranks) == 120 and bool(b.changes) == any(ranks)
        assert m.now > .8*3600*min(share, 1)*need(sizes, unit)                              # and it is used
        if share == 2 and slower == 1: assert ranks[-1] == 0
        if noise == 0: assert ranks == sorted(ranks)
        assert len(b.changes) < 12
        if share >= .2 and slower == 1: assert None not in took


def test_views_go_before_folds_and_the_prior_comes_last():
    sizes = [40]*200; m = Machine(0, .004, .0, 0.)
    took, b = m.run(.5*need(sizes, .004), sizes); assert {b.plans[t][1] for t in took} == {5} and {b.plans[t][0] for t in took} < {1, 2, 3, 4}
    took, b = Machine(0, .004, .0, 0.).run(.1*need(sizes, .004), sizes); assert {b.plans[t][0] for t in took} == {1} and None not in took
    took, b = Machine(0, .004, .0, 0.).run(.02*need(sizes, .004), sizes); assert took[-1] is None and b.plans[took[0]] == (1, 1)
    assert b.changes[-1]["now"] == "training prevalence" and b.changes[-1]["minutes_late"] > 0


def test_slow_decoders_do_not_cost_views_that_cost_no_time():
    sizes = [40]*100; m = Machine(0, .001, .05, 0.); took, b = m.run(.6*sum(sizes)*.05/3600, sizes)
    assert set(took) == {0, None} and took.count(0) > 50


def test_without_a_budget_nothing_is_left_out():
    b = Budget(plan_ladder(2, 2)); b.worked(10, 0, 1e9)
    assert b.choose(10, 10**9) == 0 and b.changes == [] and b.left() == float("inf")
    with pytest.raises(ValueError, match="max_hours"): Budget(plan_ladder(1, 1), -1)
