"Loaders: order and values, what threads must not do, and images drawn by the rarity of their labels."
import random
import threading
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.load import DataLoader
from fastai.learner import Learner

from rsna_helpers import train
from rsna_helpers.loaders import StackImages, StackLoader, draw_weights, make_dls
from rsna_helpers.recipes import RECIPES

TINY = replace(RECIPES["test"], name="tiny", size=32, batch_size=16)


@pytest.fixture(scope="module")
def table(run): return train.training_table(run)


@pytest.fixture
def folder(tmp_path):
    "Five studies of seven small slices; a pixel says which study and slice it is of."
    for s in range(5): np.save(tmp_path/f"s{s}.npy", (100*s + np.arange(7, dtype=np.int16))[:, None, None] + np.zeros((1, 4, 6), np.int16))
    return tmp_path


ROWS = pd.DataFrame([dict(study=f"s{s}", position=p, a=s % 2, b=int(p == 3)) for s in range(5) for p in range(7)])


def readers(): return [t for t in threading.enumerate() if t.name.startswith("stacks")]


def test_loaders_keep_order_and_values(run, table):
    ds = StackImages(run, table, run.task.labels)
    for i in (0, len(ds)//2, len(ds) - 1):
        hu, y = ds[i]; r = table.iloc[i]
        assert hu.dtype == torch.int16 and hu.shape[0] == 1 and y.tolist() == r[list(run.task.labels)].tolist()
        np.testing.assert_array_equal(hu[0], np.load(run.data/"npy"/f"{r.study}.npy")[r.position])


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("neighbours", [0, 1])
def test_batches_are_those_of_the_plain_loader(folder, threads, neighbours):
    ds = StackImages(folder, ROWS, ["a", "b"], neighbours)
    for kw in (dict(), dict(drop_last=True), dict(shuffle=True), dict(shuffle=True, drop_last=True)):
        random.seed(1); torch.manual_seed(1); plain = DataLoader(ds, bs=8, num_workers=0, **kw); a = [list(plain), list(plain), torch.rand(1)]
        random.seed(1); torch.manual_seed(1); ours = StackLoader(ds, bs=8, readers=threads, **kw); b = [list(ours), list(ours), torch.rand(1)]
        assert len(ours) == len(plain) == len(b[0]) and ours.n == 35 and torch.equal(a[2], b[2])         # the same randomness is left for the rest
        for x, y in zip(a[0] + a[1], b[0] + b[1]): assert type(y) is tuple and all(torch.equal(u, v) and u.dtype == v.dtype for u, v in zip(x, y))
        if kw.get("shuffle"): assert not torch.equal(b[0][0][0], b[1][0][0])


def test_one_byte_a_pixel_reads_the_same(tmp_path, folder):
    from rsna_helpers.storage import ABOUT
    import json
    (tmp_path/"c").mkdir(); levels = list(range(-1000, -1000 + 4*256, 4)); codes = np.random.default_rng(0).integers(0, 256, (7, 4, 6)).astype(np.uint8)
    np.save(tmp_path/"c"/"s0.npy", codes); (tmp_path/"c"/ABOUT).write_text(json.dumps(dict(levels=levels)))
    (hu,) = StackImages(tmp_path/"c", ROWS[:7], neighbours=1).batch(range(7))
    assert torch.equal(hu[:, 1], torch.from_numpy(np.array(levels, np.int16)[codes])) and torch.equal(hu[1:, 0], hu[:-1, 1]) and torch.equal(hu[6, 2], hu[6, 1])


def test_more_studies_than_stay_open(tmp_path):
    for s in range(300): np.save(tmp_path/f"{s}.npy", np.full((1, 2, 2), s, np.int16))
    ds = StackImages(tmp_path, pd.DataFrame(dict(study=[str(s) for s in range(300)], position=0)))
    for _ in range(2): assert torch.cat([b[0] for b in StackLoader(ds, bs=16, readers=4)])[:, 0, 0, 0].tolist() == list(range(300))
    assert len(ds.open) <= 256


def test_no_more_batches_are_under_way_than_allowed(folder):
    class Counting(StackImages):
        read = 0
        def batch(self, *a): self.read += 1; return super().batch(*a)
    ds = Counting(folder, ROWS); it = iter(StackLoader(ds, bs=1, ahead=3))
    next(it); deadline = time.time() + 5
    while ds.read < 4 and time.time() < deadline: time.sleep(.01)
    time.sleep(.05); assert ds.read == 4                                # the one in use, and three that wait
    next(it); it.close()


def test_a_loop_that_is_left_ends_the_threads(folder):
    dl = StackLoader(StackImages(folder, ROWS), bs=2, readers=3)
    for b in dl:
        assert readers(); break
    del b; assert not readers()
    dl.one_batch(); assert not readers()
    list(dl); assert not readers()


@pytest.mark.parametrize("what, error, words", [("gone", FileNotFoundError, "s3"), ("short", ValueError, "'s3' has 2 images"), ("other", ValueError, "'s3'.*(9, 9)"), ("float", ValueError, "'s3'.*float32"), ("torn", ValueError, "s3")])
def test_an_error_in_a_thread_names_the_study(folder, what, error, words):
    f = folder/"s3.npy"
    if what == "gone": f.unlink()
    elif what == "torn": f.write_bytes(f.read_bytes()[:300])
    else: np.save(f, dict(short=np.zeros((2, 4, 6), np.int16), other=np.zeros((7, 9, 9), np.int16), float=np.zeros((7, 4, 6), np.float32))[what])
    dl = StackLoader(StackImages(folder, ROWS), bs=4); seen = []
    with pytest.raises(error, match=words.replace("(9, 9)", r"\(9, 9\)")):
        for b in dl: seen.append(len(b[0]))
    assert len(seen) >= 4 and not readers()                              # what lies before it still came


def test_images_without_a_place_and_wrong_weights_are_refused(folder):
    with pytest.raises(ValueError, match="first 'x'.*position -1"): StackImages(folder, pd.DataFrame(dict(study=["s0"], position=[-1]), index=["x"]))
    with pytest.raises(ValueError, match="3 weights for 35"): StackLoader(StackImages(folder, ROWS), weights=[1, 2, 3])
    with pytest.raises(ValueError, match="readers=2"): StackLoader(StackImages(folder, ROWS), num_workers=2)


def test_weights_follow_the_rarest_label():
    y = np.zeros((1000, 3)); y[:4, 0] = 1; y[:100, 1] = 1; y[:600, 2] = 1; w = draw_weights(y)
    assert w[0] == 10 and w[50] == pytest.approx(np.sqrt(5)) and (w[100:] == 1).all()
    assert draw_weights(y, most=20)[0] == pytest.approx(np.sqrt(125)) and (draw_weights(np.zeros((5, 2))) == 1).all()


def test_balanced_batches_hold_more_of_the_rare(folder):
    rows = ROWS.loc[np.arange(2000) % 35].reset_index(drop=True); rows["rare"] = 0; rows.loc[:19, "rare"] = 1; rows["some"] = (np.arange(2000) % 10 == 0).astype(int)
    ds = StackImages(folder, rows, ["rare", "some"]); w = draw_weights(ds.y); random.seed(0); dl = StackLoader(ds, bs=50, weights=w.tolist(), shuffle=True)
    got = torch.stack([torch.cat([b[1] for b in dl]).mean(0) for _ in range(5)]).mean(0); expected = (w[:, None]*ds.y.numpy()).sum(0)/w.sum()
    np.testing.assert_allclose(got, expected, atol=.012); assert got[0] > 5*.01 and got[1] > 1.6*.1
    random.seed(0); again = StackLoader(ds, bs=50, weights=w.tolist(), shuffle=True); random.seed(0); same = StackLoader(ds, bs=50, weights=w.tolist(), shuffle=True)
    assert torch.equal(torch.cat([b[0] for b in again]), torch.cat([b[0] for b in same])) and sum(len(b[0]) for b in again) == 2000
    order = dl.new(shuffle=False); assert torch.equal(torch.cat([b[1] for b in order]), ds.y) and order.weights is not None      # without shuffling: as the table
    assert dl.new(StackImages(folder, ROWS)).weights is None


def test_a_fold_is_balanced_in_training_only(run, table):
    fold = table[table.fold == 0]; rest = table[table.fold != 0]; count = lambda dl: torch.cat([b[1] for b in dl]).mean(0).numpy()
    plain, even = (make_dls(run, rest, fold, replace(TINY, balance=b)) for b in ("none", "sample"))
    assert count(even.train)[-1] > 1.2*count(plain.train)[-1]
    np.testing.assert_array_equal(torch.cat([b[1] for b in even.valid]), fold[list(run.task.labels)])
    with pytest.raises(ValueError, match="balance='smaple'"): make_dls(run, rest, fold, replace(TINY, balance="smaple"))
    with pytest.raises(ValueError, match="5 images to train on"): make_dls(run, rest[:5], fold, TINY)


def test_a_learner_takes_it(run, table):
    few = table[::8]; dls = make_dls(run, few[few.fold != 0], few[few.fold == 0], TINY)
    class Mean(torch.nn.Module):
        def __init__(self): super().__init__(); self.l = torch.nn.Linear(1, 6)
        def forward(self, x): return self.l(x.float().mean((2, 3))/1000)
    learn = Learner(dls, Mean(), loss_func=torch.nn.BCEWithLogitsLoss())
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2); p, y = learn.get_preds(ds_idx=1)
    np.testing.assert_array_equal(y, few[few.fold == 0][list(run.task.labels)]); assert p.shape == y.shape and not readers()
    assert len(dls.train.one_batch()[0]) == TINY.batch_size
