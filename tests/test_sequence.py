"The head over a study: padding, order, what it starts as, what it learns, its features and its folder."
import logging
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from rsna_helpers import sequence
from rsna_helpers.core import seed_everything
from rsna_helpers.heads import KINDS, StudyHead, pad_studies, reverse_studies
from rsna_helpers.learner import WeightedBCE
from rsna_helpers.models import build_head, build_model, load_model, predict_stack, save_model
from rsna_helpers.npy import load_stack
from rsna_helpers.recipes import RECIPES
from rsna_helpers.train import predict_table, training_table
from rsna_helpers.validation import LeakageError

TINY = replace(RECIPES["test"], name="tiny", size=32, head="gru", head_width=8, head_layers=2, head_epochs=2)


def head_of(kind, seed=0, **options):
    "A head whose last layers are not zero."
    torch.manual_seed(seed); head = StudyHead(kind, 12, 3, width=8, **options).eval()
    for p in (*head.image.parameters(), *head.study.parameters()): nn.init.normal_(p)
    return head


def studies(*sizes):
    torch.manual_seed(1); return [torch.randn(n, 12)*20 for n in sizes], [torch.randn(n, 3) for n in sizes]


@pytest.fixture(scope="module")
def small(run, tmp_path_factory):
    "A copy of the run with few studies, so that a test may spoil its stacks."
    df = training_table(run); pick = df.drop_duplicates("patient").groupby("fold").study.head(2)
    here = replace(run, data=tmp_path_factory.mktemp("small")); df = df[df.study.isin(pick)]
    (here.data/"npy").mkdir()
    for s in df.study.unique(): shutil.copy(run.data/"npy"/f"{s}.npy", here.data/"npy")
    return here, df


@pytest.fixture()
def member():
    seed_everything(3); return build_model(TINY, 6).eval()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_never_leaks(kind, device):
    "Alone, or beside a longer study with anything in the padding: the same, also for the gradients of what is padded."
    head = head_of(kind).to(device); fs, gs = studies(9, 1, 2, 5)
    (f, mask), (g, _) = (tuple(t.to(device) for t in pad_studies(x)) for x in (fs, gs))
    noise = torch.randn_like(f)*100*~mask.unsqueeze(-1); f = (f + noise).requires_grad_(); g = g + 50*~mask.unsqueeze(-1)
    images, whole = head(f, g, mask)
    for k, n in enumerate((9, 1, 2, 5)):
        with torch.no_grad(): a, b = head(fs[k][None].to(device), gs[k][None].to(device), torch.ones(1, n, dtype=torch.bool, device=device))
        torch.testing.assert_close(images[k, :n], a[0], atol=1e-5, rtol=1e-5); torch.testing.assert_close(whole[k], b[0], atol=1e-5, rtol=1e-5)
    assert not images[~mask].any()
    if device == "cuda": return                                 # cuDNN has no gradients of a recurrent network that predicts
    sum(x.sum() for x in head(f, g, mask)).backward(); assert not f.grad[~mask].any() and f.grad[mask].any()


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_packing_is_the_plain_network_on_each_study(kind):
    head = head_of(kind); x, mask = pad_studies([torch.randn(n, head.mix.rnn.input_size) for n in (4, 7, 1)])
    with torch.no_grad():
        packed = head.mix(x, mask)
        for k, n in enumerate((4, 7, 1)): torch.testing.assert_close(packed[k, :n], head.mix.rnn(x[k:k + 1, :n])[0][0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_is_the_first_stage(kind):
    head = StudyHead(kind, 12, 3, width=8).eval(); fs, gs = studies(6, 1); (f, mask), (g, _) = pad_studies(fs), pad_studies(gs)
    images, whole = head(f, g, mask)
    assert torch.equal(images, g) and torch.equal(whole, torch.stack([x.amax(0) for x in gs]))


@pytest.mark.parametrize("kind", ["attention", "mean"])
def test_without_order_any_order_gives_the_same(kind):
    head = head_of(kind, ordered=False); (f,), (g,) = studies(7); i = torch.randperm(7); one = torch.ones(1, 7, dtype=torch.bool)
    with torch.no_grad(): (a, s), (b, t) = head(f[None], g[None], one), head(f[i][None], g[i][None], one)
    torch.testing.assert_close(a[0, i], b[0], atol=1e-5, rtol=1e-5); torch.testing.assert_close(s, t, atol=1e-5, rtol=1e-5)
    with torch.no_grad(): assert not torch.allclose(head_of(kind)(f[None], g[None], one)[0][0, i], head_of(kind)(f[i][None], g[i][None], one)[0][0], atol=1e-3)


def test_turning_twice_is_nothing_and_padding_stays():
    x, mask = pad_studies(studies(5, 2, 1)[0]); y = reverse_studies(x, mask)
    assert torch.equal(reverse_studies(y, mask), x) and torch.equal(y[0], x[0].flip(0)) and not y[1, 2:].any()


@pytest.mark.parametrize("options, name", [(dict(kind="rnn"), "rnn"), (dict(kind="lstm", ordered=False), "follow each other"), (dict(kind="attention", width=10), "head_width=10")])
def test_a_head_that_cannot_be_is_refused(options, name):
    with pytest.raises(ValueError, match=name): StudyHead(n_features=4, n_labels=2, **options)


@pytest.mark.parametrize("mask", [[[True, True, False], [False, False, False]], [[True, False, True], [True, True, True]]])
def test_a_mask_that_is_no_padding_is_refused(mask):
    with pytest.raises(ValueError, match="padding"): head_of("gru")(torch.zeros(2, 3, 12), torch.zeros(2, 3, 3), torch.tensor(mask))


def neighbours_tell(n, seed):
    rng = np.random.default_rng(seed); out = []
    for _ in range(n):
        f = torch.from_numpy(rng.choice([-1., 1.], size=(2, rng.integers(8, 16), 8))).float(); f[1] = f[0]; x = F.pad(f[0, :, 0], (1, 1))
        out.append((f, torch.zeros(*f.shape[:2], 1), (x[:-2] + x[2:] > 0).float().view(-1, 1)))
    return out


@pytest.mark.parametrize("kind", ["lstm", "attention"])
def test_what_neighbours_tell_is_learned_and_again_the_same(kind):
    train, valid = neighbours_tell(120, 0), neighbours_tell(30, 1); y = torch.cat([s[-1] for s in valid]); p = y.mean()
    alone = F.binary_cross_entropy(p.expand_as(y), y).item(); recipe = replace(TINY, head_epochs=14, head_lr=1e-2, head_keep=1.)
    runs = []
    for _ in range(2):
        torch.manual_seed(0); head = StudyHead(kind, 8, 1, 16, 1, .05)
        runs.append((sequence.train_head(head, train, valid, recipe, WeightedBCE((1,)), "image", 0), head.state_dict()))
    (a, first), (b, second) = runs
    assert a == b and all(torch.equal(first[k], second[k]) for k in first)
    assert a["head_loss"] < .5*alone and a["stage1_loss"] == pytest.approx(np.log(2), abs=1e-4)


def test_a_study_label_is_learned_where_the_task_is_of_studies():
    "Every image carries the label of its study; what tells is the share of images with a feature, which no single image shows."
    rng = np.random.default_rng(0)
    def make(n):
        for _ in range(n):
            y = float(rng.random() < .5); f = torch.from_numpy(rng.normal(size=(1, rng.integers(8, 16), 6))).float()
            f[0, :, 0] = torch.from_numpy(rng.choice([-3., 3.], size=f.shape[1], p=[.3, .7] if y else [.7, .3])); k = f.shape[1]
            yield f, torch.zeros(1, k, 1), torch.full((k, 1), y)
    torch.manual_seed(0); head = StudyHead("mean", 6, 1, 16, 1, 0., ordered=False)
    note = sequence.train_head(head, list(make(200)), list(make(60)), replace(TINY, head_epochs=15, head_lr=1e-2), WeightedBCE((1,)), "study", 0)
    assert note["stage1_loss"] == pytest.approx(np.log(2), abs=1e-4) and note["head_loss"] < .4


def test_a_head_that_never_helps_changes_nothing(small, member, tmp_path, caplog):
    run, df = small; broken = replace(TINY, head_lr=50., head_epochs=1)
    with caplog.at_level(logging.WARNING, "rsna_helpers"): _, note = sequence.fit_head(run, df, 0, member, broken, tmp_path)
    assert note["head_epoch"] is None and note["head_gain"] == 0 and "never beat" in caplog.text
    stack = load_stack(run, df.study.iloc[0])
    np.testing.assert_allclose(predict_stack([member], broken, stack)[0], predict_stack([member], replace(broken, head="none"), stack)[0], atol=1e-6)


def test_one_image_two_images_none(member):
    member.head = build_head(member, TINY)
    for p in (*member.head.image.parameters(), *member.head.study.parameters()): nn.init.normal_(p)
    stack = np.random.default_rng(0).integers(-100, 200, (5, 40, 40)).astype(np.int16)
    for n in (1, 2, 5):
        p, study = predict_stack([member], TINY, stack[:n])
        assert p.shape == (n, 6) and study.shape == (6,) and np.isfinite(p).all() and np.isfinite(study).all()
    p, study = predict_stack([member], TINY, stack[:0])
    assert p.shape == (0, 6) and np.isnan(study).all()


@pytest.mark.parametrize("kinds", ["gru", "gru+attention"])
def test_fit_save_load_predict(small, member, tmp_path, kinds):
    "What comes back from the folder gives the out-of-fold predictions, and the features on disk those of the live network."
    run, df = small; recipe = replace(TINY, head=kinds, head_lr=1e-2, head_epochs=4)
    member, note = sequence.fit_head(run, df, 0, member, recipe, tmp_path/"features")
    assert {"stage1_loss", "head_loss", "head_gain", "head_epoch", "head_seconds"} <= set(note) and note["head_loss"] < note["stage1_loss"]
    oof = predict_table(run, df[df.fold == 0], [member], recipe)
    save_model(tmp_path/"m", 0, member, recipe, labels=list(run.task.labels)); (again,), back, _ = load_model(tmp_path/"m")
    assert back == recipe
    pd.testing.assert_frame_equal(predict_table(run, df[df.fold == 0], [again], back), oof, atol=1e-6, rtol=0)
    here = tmp_path/"features"/sequence.cache_name(member, recipe, 0); data = sequence.StudyFeatures(here, df[df.fold == 0], list(run.task.labels))
    f, g, y = data[0]; study = data.rows[0][0]; whole = torch.ones(1, len(y), dtype=torch.bool); parts = []
    for v in range(2):
        for d in ((), (0,)):
            with torch.no_grad(): parts.append(again.head(f[v].flip(d)[None], g[v].flip(d)[None], whole)[0][0].sigmoid().flip(d))
    np.testing.assert_allclose(torch.stack(parts).mean(0)[data.rows[0][1]], oof.loc[df.index[(df.study == study)]], atol=2e-3)
    for spoil, word in ((lambda b: b[:500], "not a valid"), (lambda b: b"", "not a valid")):
        file = tmp_path/"m"/"model_fold0.safetensors"; good = file.read_bytes(); file.write_bytes(spoil(good))
        with pytest.raises(ValueError, match=f"model_fold0.safetensors.*{word}"): load_model(tmp_path/"m")
        file.write_bytes(good)
    save_file({k: v.contiguous() for k, v in member.encoder.state_dict().items()}, str(file))
    with pytest.raises(ValueError, match="model_fold0.safetensors is of an earlier version"): load_model(tmp_path/"m")
    save_model(tmp_path/"m", 0, member, replace(recipe, head="lstm"), labels=list(run.task.labels))
    with pytest.raises(ValueError, match="model_fold0.safetensors.*head 'lstm'"): load_model(tmp_path/"m")


def test_several_heads_differ_and_their_mean_is_what_is_noted(small, member, tmp_path):
    run, df = small; recipe = replace(TINY, head="gru+gru", head_lr=1e-2, head_epochs=4)
    member, note = sequence.fit_head(run, df, 0, member, recipe, tmp_path); a, b = member.head.heads
    assert len(note["head_losses"]) == 2 and note["head_losses"][0] != note["head_losses"][1] and not torch.equal(a.image.weight, b.image.weight)
    data = sequence.StudyFeatures(tmp_path/sequence.cache_name(member, recipe, 0), df[df.fold == 0], list(run.task.labels)); bce = sequence.WeightedBCE(run.task.class_weights)
    assert [sequence.head_loss(h, data, bce, 0., "cpu") for h in (a, b, member.head)] == pytest.approx([*note["head_losses"], note["head_loss"]])


def test_features_are_reused_and_never_stale(small, member, tmp_path):
    import os
    run, df = small; make = lambda m, r=TINY: sequence.cache_features(run, df, m, r, tmp_path, 0)
    times = lambda d: {f.name: f.stat().st_mtime_ns for f in d.iterdir()}
    here = make(member); first = times(here); assert {k[:-4] for k in first} == set(df.study)
    assert times(make(member, replace(TINY, head="lstm", head_width=99))) == first               # another head, the same features
    some = sorted(here.iterdir())[0]; some.unlink(); (here/f".{some.name}.123.part").write_bytes(b"half")      # a run that was killed
    second = times(make(member)); assert second[some.name] != first[some.name] and all(second[k] == first[k] for k in first if k != some.name)
    stack = run.data/"npy"/f"{df.study.iloc[0]}.npy"; np.save(stack, np.load(stack)[::-1]); os.utime(stack)
    third = times(make(member)); assert [k for k in first if third[k] != second[k]] == [stack.with_suffix(".npz").name]
    other = make(member, replace(TINY, size=48)); assert other != here and not here.exists()
    with torch.no_grad(): member.classifier.bias += 1
    assert make(member, replace(TINY, size=48)) != other


def test_features_that_do_not_fit_are_refused(small, member, tmp_path, monkeypatch):
    run, df = small; monkeypatch.setattr(sequence, "free_space", lambda *a: 1000)
    with pytest.raises(OSError, match="features of .* images need"): sequence.cache_features(run, df, member, TINY, tmp_path, 0)
    assert not list(tmp_path.rglob("*.npz"))


def test_a_patient_on_both_sides_stops_the_head(small, member, tmp_path):
    run, df = small; leaky = df.copy(); leaky.iloc[0, leaky.columns.get_loc("fold")] = (df.fold.iloc[0] + 1) % 5
    with pytest.raises(LeakageError, match=df.patient.iloc[0]): sequence.fit_head(run, leaky, 0, member, TINY, tmp_path)


def test_unlabelled_images_are_seen_and_not_learned_from(small, member, tmp_path):
    run, df = small; here = sequence.cache_features(run, df, member, TINY, tmp_path, 0); part = df.iloc[::2]
    data = sequence.StudyFeatures(here, part, list(run.task.labels)); (f, g, y), (study, position, _) = data[0], data.rows[0]
    assert len(y) == f.shape[1] == len(load_stack(run, study)) and (~y.isnan().any(1)).nonzero().flatten().tolist() == sorted(position.tolist())
    drawn = sequence.draw_study(data[0], .5, np.random.default_rng(0)); assert len(drawn[0]) == round(.5*len(y))
