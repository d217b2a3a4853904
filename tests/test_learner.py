"The training of a fold: every option of the recipe does what it says, a killed training ends as an undisturbed one, two processes end as one."
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback

from rsna_helpers import callbacks, inputs, learner, models, parallel, records, train
from rsna_helpers.core import seed_everything
from rsna_helpers.recipes import RECIPES
from rsna_helpers.validation import LeakageError

ROOT = Path(__file__).resolve().parents[1]
TINY = replace(RECIPES["test"], name="tiny", size=32, batch_size=16)


@pytest.fixture(scope="module")
def table(run): return train.training_table(run)


@pytest.fixture(scope="module")
def few(table): return pd.concat([table[table.fold != 0][::4], table[table.fold == 0][::4]])


@pytest.fixture
def exact(monkeypatch):
    "Without bfloat16, so that small differences mean something."
    monkeypatch.setattr(callbacks, "fast_cpu", lambda: False)


def fit(run, few, recipe, folder, **kwargs):
    return learner.fit_encoder(run, few[few.fold != 0], few[few.fold == 0], recipe, folder, 0, **kwargs)


def same(a, b): return all(torch.equal(v, b[k]) for k, v in a.items())


class Spy(Callback):
    "What happens in a training, seen from behind all other callbacks."
    order, run_valid = 200, False
    def before_fit(self): self.losses, self.rates, self.bodies, self.steps, self.sides, self.labels, self.n = [], [], [], 0, [], [], []
    def before_epoch(self): self.bodies.append([p.detach().clone() for p in self.opt.param_lists[0]])
    def before_batch(self): self.sides.append((self.epoch, self.xb[0].shape[-1])); self.labels.append(self.yb[0].clone()); self.n.append(len(self.xb[0]))
    def after_step(self): self.steps += 1; self.rates.append([h["lr"] for h in self.opt.hypers])
    def after_fit(self): self.bodies.append([p.detach().clone() for p in self.opt.param_lists[0]])


# ---- the loss and the loop

def test_loss_is_the_score(run):
    rng = np.random.default_rng(0); y = (rng.random((64, 6)) < .3).astype(float); logits = rng.normal(size=(64, 6))
    loss = learner.WeightedBCE(run.task.class_weights)
    assert loss(torch.tensor(logits), torch.tensor(y)).item() == pytest.approx(run.task.score(y, 1/(1 + np.exp(-logits))), rel=1e-5)
    each = learner.WeightedBCE(run.task.class_weights, reduction="none")(torch.tensor(logits), torch.tensor(y))
    assert each.shape == (64,) and each[7].item() == pytest.approx(run.task.score(y[7:8], 1/(1 + np.exp(-logits[7:8]))), rel=1e-5)


def test_a_patient_on_both_sides_stops_the_run(run, table):
    leaky = table.copy(); patient = table.patient.iloc[0]
    rows = table.index[table.patient == patient]; leaky.loc[rows[:3], "fold"] = (table.fold[rows[0]] + 1) % 5
    for fold in {table.fold[rows[0]], (table.fold[rows[0]] + 1) % 5}:
        with pytest.raises(LeakageError, match=patient):
            learner.make_learner(run, leaky[leaky.fold != fold], leaky[leaky.fold == fold], TINY)


def test_what_is_written_down_does_not_change_what_is_trained(run, few, tmp_path):
    "The same bits as from a bare fastai loop, with and without further records."
    recipe = replace(TINY, epochs=2, size=48, grow=((.5, 32),), drop=.2)
    seed_everything(run.seed); bare = learner.make_learner(run, few[few.fold != 0], few[few.fold == 0], recipe, path=tmp_path)
    bare.fit_one_cycle(2, recipe.lr, cbs=[learner.KeepBest(recipe)])
    member, note = fit(run, few, recipe, tmp_path/"a")
    assert same(bare.model.state_dict(), member.state_dict()) and set(note) == {"lr", "best_epoch", "best_valid_loss", "seconds"}
    history = pd.read_csv(tmp_path/"a"/"history_fold0.csv")
    assert history.columns.tolist() == ["epoch", "train_loss", "valid_loss", "time", "lr"] and history.epoch.tolist() == [0, 1] and history.valid_loss.isna().tolist() == [True, False]
    assert history.valid_loss.iloc[-1] == bare.recorder.values[-1][1] == note["best_valid_loss"]


class Ruin(Callback):
    "From the third epoch on the model gets worse."
    def before_validate(self):
        if self.epoch > 1:
            with torch.no_grad(): self.model.classifier.bias += 3


def test_the_best_epoch_is_kept_not_the_last(run, few, tmp_path):
    _, note = fit(run, few, replace(TINY, epochs=4), tmp_path, cbs=[Ruin()]); history = pd.read_csv(tmp_path/"history_fold0.csv")
    assert note["best_valid_loss"] == history.valid_loss.min() and note["best_epoch"] == history.valid_loss.idxmin() < 2


def test_small_pictures_first_and_never_kept(run, few, tmp_path):
    "The sides that the network met, epoch by epoch; the kept epoch is one of full size, however good the others were."
    recipe = replace(TINY, size=64, epochs=4, grow=((.3, 32), (.6, 48)), lr=1e-6); spy = Spy()
    _, note = fit(run, few, recipe, tmp_path, cbs=[spy])
    assert sorted(set(spy.sides)) == [(0, 32), (1, 48), (2, 64), (3, 64)] and note["best_epoch"] >= 2
    history = pd.read_csv(tmp_path/"history_fold0.csv")
    assert history.valid_loss.isna().tolist() == [True, True, False, False] and history.train_loss.notna().all()


def test_a_model_that_went_to_nan_is_not_kept(run, few, tmp_path):
    class Ruin(Callback):
        def before_train(self):
            with torch.no_grad(): next(self.model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="never a number"): fit(run, few, TINY, tmp_path, cbs=[Ruin()])


def test_a_rate_is_looked_for_where_the_recipe_has_none(run, few, tmp_path):
    _, note = fit(run, few, replace(TINY, lr=None), tmp_path)
    assert 1e-6 < note["lr"] < 1 and sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_fold0.safetensors", "history_fold0.csv"]


# ---- the options

def test_mean_of_the_weights_is_validated_and_kept(run, few, tmp_path, exact):
    recipe = replace(TINY, epochs=2, ema=.97); plain, _ = fit(run, few, replace(recipe, ema=0.), tmp_path/"plain")
    member, note = fit(run, few, recipe, tmp_path/"ema"); valid = few[few.fold == 0]
    assert not same(plain.state_dict(), member.state_dict()) and not torch.equal(plain.state_dict()["encoder.bn1.running_mean"], member.state_dict()["encoder.bn1.running_mean"])
    p = train.predict_table(run, valid, [member], replace(recipe, tta=("as is",))).to_numpy()
    if not models.fast_cpu(): assert run.task.score(valid[list(run.task.labels)].to_numpy(float), p) == pytest.approx(note["best_valid_loss"], rel=1e-3)
    member.eval(); ds = learner.make_learner(run, few[few.fold != 0], valid, recipe, path=tmp_path).dls.valid_ds
    x = inputs.Inputs(recipe).eval()(torch.stack([ds[i][0] for i in range(len(ds))]))
    with torch.no_grad(): loss = learner.WeightedBCE(run.task.class_weights)(member(x), ds.y).item()
    assert loss == pytest.approx(note["best_valid_loss"], rel=1e-4)


def test_frozen_layers_wait_and_then_learn_slower(run, few, tmp_path):
    spy = Spy(); fit(run, few, replace(TINY, epochs=3, freeze=1, lr_spread=10.), tmp_path, cbs=[spy])
    moved = [any(not torch.equal(p, q) for p, q in zip(a, b)) for a, b in zip(spy.bodies, spy.bodies[1:])]
    assert moved[:3] == [False, True, True]
    rates = np.array(spy.rates); assert rates.shape[1] > 3 and np.allclose(rates[:, -1]/rates[:, 0], 10) and (np.diff(rates, axis=1) > 0).all()
    assert rates[:, -1].max() == pytest.approx(TINY.lr, rel=.05)


def test_accumulated_steps_are_those_of_larger_batches(run, few, tmp_path):
    "Also those of the last, smaller group of an epoch."
    one, four = Spy(), Spy(); fit(run, few, replace(TINY, epochs=2), tmp_path/"1", cbs=[one]); fit(run, few, replace(TINY, epochs=2, accumulate=4), tmp_path/"4", cbs=[four])
    per_epoch = one.steps//2; assert per_epoch % 4 and len(four.n) == one.steps and four.steps == 2*-(-per_epoch//4)


def test_training_stops_when_nothing_gets_better(run, few, tmp_path, capsys):
    recipe = replace(TINY, epochs=8, patience=2); _, note = fit(run, few, recipe, tmp_path, cbs=[Ruin()]); history = pd.read_csv(tmp_path/"history_fold0.csv")
    assert len(history) == note["best_epoch"] + 3 < 8 and f"nothing better than epoch {note['best_epoch']} in 2" in capsys.readouterr().out
    _, again = fit(run, few, recipe, tmp_path)                                       # the same training, started again when it is over
    assert again["best_epoch"] == note["best_epoch"] and len(pd.read_csv(tmp_path/"history_fold0.csv")) == len(history)


def test_weighted_positives_do_not_shift_the_probabilities(run, few, tmp_path, exact):
    "The loss that is validated is the score, and the kept model gives it without any weights."
    recipe = replace(TINY, epochs=2, balance="weight"); member, note = fit(run, few, recipe, tmp_path/"w"); valid = few[few.fold == 0]; y = few[list(run.task.labels)]
    plain, note0 = fit(run, few, replace(recipe, balance="none"), tmp_path/"n"); assert not same(plain.state_dict(), member.state_dict())
    assert (learner.positive_weights(y[few.fold != 0]) > 1).any() and note["best_valid_loss"] < 1.2*note0["best_valid_loss"]
    member.eval(); ds = learner.make_learner(run, few[few.fold != 0], valid, recipe, path=tmp_path).dls.valid_ds
    x = inputs.Inputs(recipe).eval()(torch.stack([ds[i][0] for i in range(len(ds))]))
    with torch.no_grad(): logits = member(x)
    assert learner.WeightedBCE(run.task.class_weights)(logits, ds.y).item() == pytest.approx(note["best_valid_loss"], rel=1e-4)
    assert logits.sigmoid().mean(0).numpy() == pytest.approx(y[few.fold != 0].mean().to_numpy(), abs=.15)


def test_mixed_labels_and_fewer_images_reach_the_network(run, few, tmp_path):
    spy = Spy(); fit(run, few, replace(TINY, mixup=.4, losers=.5), tmp_path, cbs=[spy])
    y = torch.cat(spy.labels); assert set(spy.n) == {8} and ((y > 0) & (y < 1)).any() and y.min() >= 0 and y.max() <= 1


def test_losers_are_the_ones_that_lose(run, few, tmp_path):
    "Half a batch by its loss: more positives than there are."
    spy = Spy(); fit(run, few, replace(TINY, losers=.25, epochs=2, lr=1e-4), tmp_path, cbs=[spy])
    assert torch.cat(spy.labels)[:, -1].mean() > 1.3*few[few.fold != 0][run.task.labels[-1]].mean()


@pytest.mark.parametrize("field, value", [("clip", .01), ("lr_spread", 5.), ("freeze", 1), ("ema", .9), ("mixup", .3), ("losers", .5), ("accumulate", 2), ("balance", "weight")])
def test_an_option_changes_the_training(run, few, tmp_path, field, value):
    a, b = (fit(run, few[::2], replace(TINY, epochs=2, **kw), tmp_path/str(i))[0] for i, kw in enumerate(({}, {field: value})))
    assert not same(a.state_dict(), b.state_dict()) and all(torch.isfinite(v).all() for v in b.state_dict().values())


@pytest.mark.parametrize("field, value", [("losers", 1.5), ("accumulate", 0), ("ema", 1.), ("balance", "weights"), ("lr_spread", 0.), ("clip", -1.), ("mixup", -.1)])
def test_a_field_that_cannot_be_is_named(run, few, tmp_path, field, value):
    with pytest.raises(ValueError, match=f"recipe tiny: {field}={re.escape(repr(value))}"): fit(run, few, replace(TINY, **{field: value}), tmp_path)


# ---- going on after a kill

EVERYTHING = replace(TINY, epochs=5, grow=((.3, 24),), drop=.2, ema=.9, mixup=.3, losers=.75, accumulate=3, clip=1., freeze=1, lr_spread=4., patience=4)
KILLED = '''
import os, signal, sys
from fastai.callback.core import Callback
import test_learner as t
from rsna_helpers import train
from rsna_helpers.core import start
from safetensors.torch import save_file

class Kill(Callback):
    order = 300
    def after_batch(self):
        if self.training and (self.epoch, self.iter) == at: os.kill(os.getpid(), signal.SIGKILL)

folder, epoch, batch = sys.argv[1:]; at = (int(epoch), int(batch)); run = start(profile="test", verbose=False); few = t.few.__wrapped__(train.training_table(run))
member, note = t.fit(run, few, t.EVERYTHING, folder, cbs=[Kill()])
save_file({k: v.contiguous() for k, v in member.state_dict().items()}, folder + "/weights"); print("whole")
'''


def differences(a, b, at=""):
    "Where two nested values differ, times apart."
    if isinstance(a, dict): return [d for k in {**a, **b} if k != "time" for d in (differences(a[k], b[k], f"{at}/{k}") if k in a and k in b else [f"{at}/{k}"])]
    if isinstance(a, list): return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{at}/{i}")] + ([at] if len(a) != len(b) else [])
    return [] if (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or a != a and b != b) else [at]


def last_state(folder): return records.load_tree(records.checkpoint_path(folder, 0))["state"]


def test_a_killed_training_ends_as_an_undisturbed_one(run, few, tmp_path):
    "Killed twice in the middle of an epoch; the kept weights, the history and all that the last checkpoint holds agree to the last bit."
    from safetensors.torch import load_file
    script = tmp_path/"killed.py"; script.write_text(KILLED); folder = tmp_path/"k"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT/"tests")])}
    sit = lambda folder, *at: subprocess.run([sys.executable, str(script), str(folder), *at], capture_output=True, text=True, cwd=Path.cwd(), env=env)
    sittings = [sit(folder, *at) for at in (("1", "2"), ("3", "1"), ("9", "9"))]
    assert [s.returncode for s in sittings] == [-signal.SIGKILL, -signal.SIGKILL, 0], sittings[-1].stderr[-2000:]
    assert "goes on after 1 of 5" in sittings[1].stdout and "goes on after 3 of 5" in sittings[2].stdout
    whole = sit(tmp_path/"whole", "9", "9"); assert not whole.returncode, whole.stderr[-2000:]          # in a process of its own too: this one may have another number of threads by now
    assert same(load_file(str(tmp_path/"whole"/"weights")), load_file(str(folder/"weights")))
    a, b = (pd.read_csv(f/"history_fold0.csv").drop(columns="time") for f in (tmp_path/"whole", folder)); pd.testing.assert_frame_equal(a, b, check_exact=True)
    whole = last_state(tmp_path/"whole"); assert {"model", "opt", "random"} < set(whole) and not differences(whole, last_state(folder)) and differences(whole, last_state(folder) | dict(epoch=4))
    records.remove_checkpoint(folder, 0); assert not list(folder.glob("checkpoint*")) and not list(folder.glob(".*"))


def test_a_checkpoint_of_something_else_is_not_used(run, few, tmp_path, caplog):
    "Another recipe, other images, or a damaged file: the result is that of a fresh start, and a message says why."
    recipe = replace(TINY, epochs=2); whole, _ = fit(run, few, recipe, tmp_path/"fresh"); file = records.checkpoint_path(tmp_path/"b", 0)
    fit(run, few, replace(recipe, lr=1e-2), tmp_path/"b"); member, _ = fit(run, few, recipe, tmp_path/"b"); assert same(whole.state_dict(), member.state_dict()) and "another recipe" in caplog.text
    caplog.clear(); fit(run, few.iloc[1:], recipe, tmp_path/"b"); assert "other images" in caplog.text
    caplog.clear(); data = bytearray(file.read_bytes()); data[len(data)//2] ^= 4; file.write_bytes(bytes(data))
    member, _ = fit(run, few, recipe, tmp_path/"b"); assert same(whole.state_dict(), member.state_dict()) and "damaged" in caplog.text and file.name in caplog.text


# ---- several processes

PLAIN = '''
import torch.nn.functional as F
from rsna_helpers import callbacks, inputs
inputs.augment = lambda hu, r: F.interpolate(hu, size=(r.size,)*2, mode="area")
callbacks.fast_cpu = lambda: False
'''


def test_two_processes_train_as_one(run, few, tmp_path, exact, monkeypatch):
    "The same batches, shared: the same model but for rounding. Without augmentation, dropout and batch norm, which differ by process."
    monkeypatch.setattr(inputs, "augment", lambda hu, r: F.interpolate(hu, size=(r.size,)*2, mode="area"))
    recipe = replace(TINY, backbone="test_vit", pool="avg", drop=0., epochs=2, freeze=1, clip=1.); few = few.iloc[(few.fold == 0).sum() % 2:]
    while (few.fold == 0).sum() % 2: few = few.drop(few.index[few.fold == 0][-1])
    one, note1 = fit(run, few, recipe, tmp_path/"1"); seed_everything(run.seed); start = learner.make_learner(run, few[few.fold != 0], few[few.fold == 0], recipe, path=tmp_path).model.state_dict()
    two, note2 = parallel.fit_parallel(run, few[few.fold != 0], few[few.fold == 0], recipe, tmp_path/"2", 0, 2, PLAIN + parallel.SCRIPT)
    for k, v in one.state_dict().items(): torch.testing.assert_close(two.state_dict()[k], v, atol=2e-5, rtol=0, msg=k)
    assert max((v - start[k]).abs().max() for k, v in one.state_dict().items()) > 1e-3          # it is not that nothing moved
    a, b = (pd.read_csv(tmp_path/k/"history_fold0.csv").drop(columns="time") for k in "12"); np.testing.assert_allclose(a, b, rtol=1e-4)
    assert note2["best_valid_loss"] == pytest.approx(note1["best_valid_loss"], rel=1e-4) and note2["best_epoch"] == note1["best_epoch"]


def test_batches_that_cannot_be_shared_are_named(run, few, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 processes cannot share batches of 16"): learner.make_learner(run, few[few.fold != 0], few[few.fold == 0], TINY, path=tmp_path)


def test_a_process_that_fails_is_an_error(tmp_path, capsys):
    with pytest.raises(RuntimeError, match="no memory left"): parallel.launch("raise SystemExit('no memory left')", tmp_path, 2)


# ---- what is shown

def test_history_is_drawn_for_all_folds(tmp_path):
    for k in (0, 2, 10): pd.DataFrame(dict(epoch=[0, 1, 2], train_loss=[.3, .2, .1], valid_loss=[np.nan, .25, .3], time="00:01", lr=[1e-3, 2e-3, 1e-5])).to_csv(tmp_path/f"history_fold{k}.csv", index=False)
    a, b = records.plot_history(tmp_path).axes; plt.close("all")
    assert [t.get_text() for t in a.get_legend().get_texts()][1::2] == ["validation, fold 0", "validation, fold 2", "validation, fold 10"] and len(b.lines) == 3
    assert a.lines[2].get_xydata().tolist() == [[1, .25]]                                         # the ring: the epoch that was kept


def test_live_plot_is_one_figure_and_only_for_eyes(run, few, tmp_path, monkeypatch):
    import IPython.display
    shown = []
    class Handle:
        def update(self, fig): shown.append(("update", len(fig.axes[0].lines[0].get_xdata())))
    monkeypatch.setattr(IPython.display, "display", lambda fig, display_id: (shown.append(("new", len(fig.axes[0].lines[0].get_xdata()))), Handle())[1])
    fit(run, few, replace(TINY, epochs=3), tmp_path/"a"); assert shown == [] and not records.watched()
    monkeypatch.setattr(records, "watched", lambda: True)
    fit(run, few, replace(TINY, epochs=3), tmp_path/"b"); assert shown == [("new", 1), ("update", 2), ("update", 3)] and not plt.get_fignums()


def test_tensorboard_is_asked_for_by_name(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None); monkeypatch.delitem(sys.modules, "fastai.callback.tensorboard", raising=False)
    with pytest.raises(ImportError, match="pip install tensorboard"): records.tensorboard(tmp_path)
