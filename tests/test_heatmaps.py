"Heat maps point at what the answer came from; masks lie on the stack; galleries hold what they say."
from dataclasses import replace

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage as ndi
from torch import nn

from rsna_helpers import galleries, heatmaps
from rsna_helpers.head import KINDS
from rsna_helpers.models import Member, build_model
from rsna_helpers.npy import load_index, load_stack
from rsna_helpers.recipes import RECIPES
from rsna_helpers.storage import CodedStack
from rsna_helpers.train import training_table

TINY = replace(RECIPES["test"], size=64)
CORNERS = [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def stack(): return np.random.default_rng(0).integers(0, 80, (5, 64, 64)).astype(np.int16)


class Corners(nn.Module):
    "An encoder with four answers; each reads one quarter of its map, and of one of its input channels."
    feature_info = [dict(module="conv", num_chs=4, reduction=8)]
    num_features = 4
    def __init__(self, channels=3, channel=0):
        super().__init__(); self.conv, self.fc = nn.Conv2d(channels, 4, 8, 8, bias=False), nn.Linear(4, 4)
        with torch.no_grad(): self.conv.weight.zero_(); self.conv.weight[:, channel] = 1/64; self.fc.weight.copy_(torch.eye(4)); self.fc.bias.zero_()
    def get_classifier(self): return self.fc
    def forward_features(self, x): return (self.conv(x) + 1.1).relu()
    def forward_head(self, z, pre_logits=True):
        h, w = z.shape[-2]//2, z.shape[-1]//2
        return torch.stack([z[:, i, y*h:(y + 1)*h, x*w:(x + 1)*w].mean((1, 2)) for i, (y, x) in enumerate(CORNERS)], 1)


def hooks(m): return sum(len(x._forward_hooks) + len(x._forward_pre_hooks) + len(x._backward_hooks) for x in m.modules())


def test_map_has_shape_and_range(stack):
    torch.manual_seed(0); member = build_model(TINY, 3)
    for x in (stack, stack[:, :48], CodedStack((stack//20).astype(np.uint8), np.arange(256)*20)):
        maps = heatmaps.heat_study(member, TINY, x, 1)
        assert maps.shape == x.shape and maps.dtype == np.float32 and maps.min() >= 0 and np.isfinite(maps).all()
        np.testing.assert_allclose(maps.max((1, 2)), 1, rtol=1e-5)       # the hottest place of every slice
    np.testing.assert_allclose(heatmaps.heat_map(member, TINY, stack, 2, 1), heatmaps.heat_study(member, TINY, stack, 1, batch=2)[2], atol=1e-4)
    assert heatmaps.heat_study(member, TINY, stack, positions=[]).shape == (0, 64, 64)


@pytest.mark.parametrize("method", heatmaps.METHODS)
def test_peak_is_where_the_answer_comes_from(stack, method):
    "Each answer sees one quarter of the picture alone. What it sees in the mirrored view lies on the other side of the slice."
    member = Member(Corners())
    for i, (y, x) in enumerate(CORNERS):
        for view, side in (("as is", x), ("flip", 1 - x)):
            maps = heatmaps.heat_study(member, TINY, stack, i, method=method, views=[view]); near = maps[:, y*32:(y + 1)*32, side*32:(side + 1)*32]
            if method == "hires-cam": assert near.sum()/maps.sum() > .8       # the rest is what enlarging spreads over the border
            bright = np.full((1, 64, 64), 5, np.int16); bright[0, y*48:y*48 + 16, side*48:side*48 + 16] = 70         # in the outer corner of the quarter
            peak = np.unravel_index(heatmaps.heat_map(member, TINY, bright, 0, i, method=method, views=[view]).argmax(), (64, 64))
            assert abs(peak[0] - (y*48 + 8)) <= 10 and abs(peak[1] - (side*48 + 8)) <= 10


def test_neighbours_are_shown_as_in_training():
    "The answer reads the slice above alone, so its map shows what lies there; above the last slice stands the last."
    near = replace(TINY, neighbours=1); member = Member(Corners(channels=9, channel=6))
    stack = np.full((4, 64, 64), 5, np.int16); stack[2, :16, :16] = 70; stack[3, 16:32, 16:32] = 70
    peaks = [np.unravel_index(m.argmax(), m.shape) for m in heatmaps.heat_study(member, near, stack, 0, batch=2, views=["as is"])]
    assert max(peaks[1]) < 18 and min(peaks[2]) > 14 and peaks[3] == peaks[2]
    np.testing.assert_array_equal(heatmaps.heat_map(member, near, stack, 1, 0), heatmaps.heat_study(member, near, stack, 0)[1])


@pytest.mark.parametrize("backbone,size,pool", [("resnet18", 64, "catavgmax"), ("densenet121", 64, "catavgmax"), ("inception_v3", 107, "avg"), ("test_efficientnet", 64, "catavgmax"), ("legacy_xception", 64, "avg"),
                                                ("test_convnext", 64, "avg"), ("test_mambaout", 64, "avg"), ("test_vit", 160, "token")])
def test_any_backbone_has_a_map(stack, backbone, size, pool):
    torch.manual_seed(0); recipe = replace(TINY, backbone=backbone, size=size, pool=pool); member = build_model(recipe, 2)
    maps = heatmaps.heat_study(member, recipe, stack[:2], 1); assert maps.shape == (2, 64, 64) and np.isfinite(maps).all() and (maps.max((1, 2)) > .99).all() and maps.min() < .5


def test_nothing_is_left_behind(stack):
    member = build_model(TINY, 3).train()
    for p in member.parameters(): p.requires_grad_(False)                     # frozen, as a loaded model may be
    before = {k: v.clone() for k, v in member.state_dict().items()}
    with torch.no_grad(): heatmaps.heat_study(member, TINY, stack)
    assert not hooks(member) and not member.training and all(p.grad is None and not p.requires_grad for p in member.parameters())
    assert all(torch.equal(v, before[k]) for k, v in member.state_dict().items())
    member.encoder.layer4.register_forward_pre_hook(lambda m, x: 1/0); n = hooks(member)
    with pytest.raises(ZeroDivisionError): heatmaps.heat_study(member, TINY, stack)
    assert hooks(member) == n


def test_what_cannot_be_mapped_is_named(stack):
    member = build_model(TINY, 3)
    for kwargs, what in ((dict(positions=[5]), "position 5 .* 0 to 4"), (dict(positions=[-1]), "position -1"), (dict(label=3), "label is 3.*3 answers"), (dict(method="lime"), "'lime'.*hires-cam"), (dict(views=("turn",)), "views is")):
        with pytest.raises(ValueError, match=what): heatmaps.heat_study(member, TINY, stack, **kwargs)
    plain = Corners(); plain.feature_info = []
    with pytest.raises(ValueError, match="no maps .* Corners"): heatmaps.heat_study(Member(plain), TINY, stack)
    last = replace(TINY, backbone="test_mambaout", pool="avg")
    with pytest.raises(ValueError, match="keeps its channels last"): heatmaps.heat_study(build_model(last, 2), last, stack, method="grad-cam")


# the phantom's bleeds

@pytest.fixture(scope="module")
def index(run): return load_index(run)


@pytest.fixture(scope="module")
def bled(run, index):
    "Stack name -> masks, for all studies that bleed."
    any_ = run.truth["any"]; names = index[index.image.isin(any_.index[any_ == 1])].study.unique()
    return {s: heatmaps.phantom_masks(run, s, index) for s in names}


def test_masks_lie_on_the_stack(run, index, bled):
    "Fresh blood is denser than the brain around it, in every study, odd ones included; moved by a few pixels the mask no longer fits."
    quirks, contrast, moved = set(), [], []
    for s, masks in bled.items():
        rows = index[(index.study == s) & (index.position >= 0)]; hu = np.array(load_stack(run, s)); assert masks.shape == (len(rows), len(KINDS), *hu.shape[1:]) and masks.dtype == bool
        fresh = masks[:, [KINDS.index("intraparenchymal"), KINDS.index("epidural")]].any(1); soft = (hu > -10) & (hu < 110)
        if fresh.sum() < 30: continue
        quirks |= set(run.truth.quirk[rows.image])
        gap = lambda m: np.median(hu[m & soft]) - np.median(hu[ndi.binary_dilation(m, np.ones((1, 3, 3)), 3) & ~m & soft])
        contrast.append(gap(fresh)); moved.append(gap(np.roll(fresh, (6, 6), (1, 2))))
    assert len(contrast) >= 4 and min(contrast) > 5 and np.mean(contrast) > np.mean(moved) + 8
    assert len(quirks - {""}) >= 1


def test_masks_have_the_area_that_was_written_down(run, index, bled):
    rows = index[index.study.isin(bled) & (index.position >= 0)]
    for k, kind in enumerate(KINDS):
        truth = run.truth[f"{kind}_mm2"][rows.image].to_numpy(); area = np.array([bled[r.study][r.position, k].sum()*r.mm_row*r.mm_col for r in rows.itertuples()])
        assert (area[truth == 0] == 0).all()                                  # blanked slices, and blood that cannot be seen
        if kind in ("epidural", "intraparenchymal", "subdural") and truth.max() > 200: assert np.corrcoef(area, truth)[0, 1] > .95 and .8 < area.sum()/truth.sum() < 1.25


def test_every_quirk_of_geometry_is_followed(run, index):
    "A slice that was blanked has no mask; one without as many columns has it where its picture has."
    for quirk in ("constant", "empty", "nonsquare", "same_z"):
        images = run.truth.index[run.truth.quirk == quirk]; assert len(images)
        for s in index[index.image.isin(images)].study.unique():
            rows = index[(index.study == s) & (index.position >= 0)].sort_values("position"); masks = heatmaps.phantom_masks(run, s, index); odd = rows.image.isin(images).to_numpy()
            assert len(masks) == len(rows) and (quirk not in ("constant", "empty") or not masks[odd].any())
            seen = (run.truth.loc[rows.image, ["epidural_mm2", "intraparenchymal_mm2"]] > 35).to_numpy(); assert masks.any((2, 3))[:, :2][seen].all()
    m = np.zeros((256, 256), np.float32); m[100:140, 40:60] = 1                # drawn at half the size: rows 200 to 280, columns 80 to 120 of 512
    row = pd.Series(dict(columns=468, crop_top=0, crop_left=-22, crop_side=512, crop_width=512))
    at = np.argwhere(heatmaps._stored(m, (512, 512), row, 128) >= heatmaps.BLOOD); assert at.min(0).tolist() == [50, 20] and at.max(0).tolist() == [69, 29]


def test_real_data_and_other_phantoms_are_refused(run, index, bled, tmp_path):
    study = next(iter(bled))
    with pytest.raises(ValueError, match="is no phantom"): heatmaps.phantom_masks(replace(run, phantom=False), study, index)
    other = run.truth.reset_index(); other["seed"] += 1; other.to_parquet(tmp_path/"raw_truth.parquet")
    with pytest.raises(ValueError, match=f"{study} of the phantom was drawn by another version"): heatmaps.phantom_masks(replace(run, raw=tmp_path/"raw"), study, index)


# the pointing game

def head_slice(side=96):
    r = np.hypot(*(np.mgrid[:side, :side] - side/2 + .5)); return np.select([r < .36*side, r < .42*side], [30, 900], -1000).astype(np.int16)


def test_hits_are_counted():
    hu = head_slice(); mask = np.zeros(hu.shape, bool); mask[30:40, 50:60] = True; hu[mask] = 70
    brain = heatmaps.brain_pixels(hu); assert abs(brain.sum() - np.pi*(.36*96)**2) < 60
    heat = lambda y, x: np.eye(1, 96*96, y*96 + x).reshape(96, 96)
    hits = heatmaps.pointing_hits([heat(35, 55), heat(35, 64), heat(35, 70), np.zeros((96, 96))], [mask]*4, [hu]*4)
    assert hits["heat map"].to_numpy().tolist() == [[1, 1], [0, 1], [0, 0], [0, 0]]          # in it, within 15 of 256, beyond, no peak at all
    assert hits["brightest brain"].to_numpy().min() == 1 and hits["middle of the head"].exact.max() == 0
    yy, xx = np.mgrid[:96, :96]; reach = np.hypot(np.maximum(np.maximum(30 - yy, yy - 39), 0), np.maximum(np.maximum(50 - xx, xx - 59), 0)) <= 15*96/256
    assert hits["random brain pixel"].near[0] == pytest.approx(reach[brain].mean()) and hits["random brain pixel"].exact[0] == pytest.approx(mask[brain].mean())
    game = heatmaps.pointing_game(hits, ["a", "a", "b", "c"])
    assert game.loc["heat map", ["exact", "near", "slices", "patients"]].tolist() == [.25, .5, 4, 3] and game.loc["heat map", "near_low"] < .5 < game.loc["heat map", "near_high"]
    assert game.loc["brightest brain", "ahead"] == -.5 and game.loc["brightest brain", "ahead_high"] <= 0
    with pytest.raises(ValueError, match="mask of slice 1 is empty"): heatmaps.pointing_hits([heat(0, 0)]*2, [mask, ~mask & False], [hu]*2)
    for odd in (np.full((96, 96), -1000, np.int16), np.full((96, 96), 40, np.int16)): assert heatmaps.pointing_hits([heat(35, 55)], [mask], [odd]).notna().all(axis=None)


def test_each_patient_is_pointed_at_by_the_member_that_has_not_seen_it(run, monkeypatch):
    df = training_table(run); recipe = replace(TINY, folds=(2, 0)); seen = []
    def heat(member, recipe, stack, label, device, at): seen.append((member, label)); return np.ones((len(at), *stack.shape[1:]), np.float32)
    monkeypatch.setattr(heatmaps, "heat_study", heat)
    rows = df[df.fold.isin([0, 2])]; game = heatmaps.phantom_pointing(run, ["model_fold0", "model_fold2"], recipe, rows, ["subdural", "any"], n_boot=20)
    bleeding = rows[rows[["subdural", "any"]].any(axis=1)].groupby("study", sort=False).fold.first()
    assert list(dict.fromkeys(m for m, _ in seen)) == list(dict.fromkeys(f"model_fold{f}" for f in bleeding)) and {k for _, k in seen} <= {4, 5}
    assert game.loc[("any", "heat map"), "slices"] <= rows["any"].sum() and set(game.index.get_level_values(1)) == set(heatmaps.POINTERS)
    with pytest.raises(ValueError, match="were trained on"): heatmaps.phantom_pointing(run, ["a", "b"], recipe, df)
    with pytest.raises(ValueError, match="nothing to point at"): heatmaps.phantom_pointing(run, ["a", "b"], recipe, rows[rows["any"] == 0])
    with pytest.raises(ValueError, match="1 members for the folds"): heatmaps.phantom_pointing(run, ["a"], recipe, rows)


# pictures

def test_pictures(stack):
    hu, heat, mask = head_slice(), np.zeros((96, 96)), np.zeros((96, 96), bool); heat[20:50, 20:50] = 1; mask[60:70, 60:70] = True
    rgb = heatmaps.overlay(hu, heat, mask, px=96, box=(0, 96, 0, 96)).astype(int); coloured = np.ptp(rgb, axis=2) > 0
    assert coloured[22:48, 22:48].all() and coloured[60, 60:70].all() and not coloured[62:68, 62:68].any() and coloured.sum() < 30*30 + 4*10     # hot, outlined, and nothing else
    assert not np.ptp(heatmaps.overlay(hu, heat*.3), axis=2).any()            # cool: the slice shows through
    assert len(heatmaps.plot_heat([hu]*7, [heat]*7, titles=list("abcdefg"), cols=4).axes) == 16
    p = [.1, .9, .8, .2, .7]; fig = heatmaps.plot_study_curve(p, [0, 1, 1, 0, 0], stack, stack/80, top=2)
    assert [a.get_title() for a in fig.axes[1:]] == ["slice 2: 0.90", "slice 5: 0.70"] and len(fig.axes[0].patches) == 2
    assert len(heatmaps.plot_study_curve(p).axes) == 1
    with pytest.raises(ValueError, match="maps has 4 entries for 5 slices"): heatmaps.plot_study_curve(p, stack=stack, maps=stack[:4])
    with pytest.raises(ValueError, match=r"mask is \(95, 96\)"): heatmaps.overlay(hu, heat, mask[1:])


# galleries

@pytest.fixture(scope="module")
def scored():
    "Sixty patients with twenty images each, ten of them positive in a third of the patients; predictions of some skill."
    rng = np.random.default_rng(1); n = 1200; patient = np.repeat(np.arange(60), 20); y = ((patient % 3 == 0) & (np.arange(n) % 20 < 10)).astype(int)
    ids = pd.Index([f"ID_{i}" for i in rng.permutation(n)], name="image")
    df = pd.DataFrame(dict(study=[f"s{k}" for k in patient], patient=[f"ID_{k:08x}" for k in patient], position=np.arange(n) % 20, fold=patient % 5, split="train", bleed=y, other=1 - y), index=ids)
    p = 1/(1 + np.exp(-(4*y - 2 + rng.normal(0, 1.5, n))))
    return df, pd.DataFrame(dict(bleed=p, other=1 - p), index=ids).sample(frac=1, random_state=0)


def test_galleries_are_sorted_and_spread_over_patients(scored):
    df, oof = scored; y, p = df.bleed[oof.index], oof.bleed
    wanted = {"false positive": (y == 0) & (p >= .5), "false negative": (y == 1) & (p < .5), "true positive": (y == 1) & (p >= .5), "true negative": (y == 0) & (p < .5), "unsure": (p > .4) & (p < .6)}
    for kind, which in wanted.items():
        t = galleries.gallery_table(oof, df, "bleed", kind, n=2000, per_patient=99); assert set(t.index) == set(which.index[which]) and len(t) == which.sum()
        key = (t.p - .5).abs() if kind == "unsure" else t.loss
        assert key.is_monotonic_decreasing if kind.startswith("false") else key.is_monotonic_increasing
        np.testing.assert_allclose(t.loss, -np.log(np.where(t.y == 1, t.p, 1 - t.p)))
        few = galleries.gallery_table(oof, df, "bleed", kind, n=9, per_patient=1); assert len(few) == 9 and df.patient[few.index].is_unique
        assert few.index.tolist() == t[~df.patient[t.index].duplicated().to_numpy()].index[:9].tolist()
        assert not {*few.who} & {*df.patient} and (few.groupby("who").size() == 1).all()
    strict = galleries.gallery_table(oof, df, "bleed", "false positive", threshold=.9, n=2000); assert strict.p.min() >= .9


def test_only_out_of_fold_predictions_are_shown(scored):
    df, oof = scored; held = oof[df.fold[oof.index] == 3]
    galleries.gallery_table(held, df, "bleed", "unsure", folds=(3,))
    for bad, table, folds, what in ((oof.rename(index={oof.index[0]: "ID_test"}), df, None, "not in the training table, such as 'ID_test'"), (oof, df.assign(fold=-1), None, "without a fold"), (oof, df, (3,), "were trained on"),
                                    (pd.concat([held, held]), df, (3,), "has one already"), (oof, df.assign(split="test"), None, "outside the training data")):
        with pytest.raises(ValueError, match=what): galleries.gallery_table(bad, table, "bleed", "unsure", folds=folds)
    with pytest.raises(ValueError, match="no label 'stroke'.*bleed, other"): galleries.gallery_table(oof, df, "stroke", "unsure")
    with pytest.raises(ValueError, match="probability"): galleries.gallery_table(oof*2, df, "bleed", "unsure")


@pytest.mark.parametrize("share", [.3, .03])
def test_planted_label_errors_are_found(share):
    "One label in twenty of either kind is turned around, also where the label is rare; the list is many times better than chance."
    rng = np.random.default_rng(2); n = 6000; y = rng.random(n) < share; p = 1/(1 + np.exp(-(np.where(y, 1.5, -4.) + rng.normal(0, 1.2, n))))
    flipped = rng.random(n) < .05; margin = galleries.label_errors(y ^ flipped, p); order = np.argsort(-np.nan_to_num(margin, nan=-9)); first = order[:100]
    assert flipped[first].mean() > .8 and flipped[~np.isnan(margin)].mean() > 10*.05 and (flipped & ~np.isnan(margin)).sum() > .4*flipped.sum()
    right = galleries.label_errors(y, p); assert np.mean(~np.isnan(right)) < .03
    t = ~np.isnan(margin); other = np.where(y ^ flipped, 1 - p, p); np.testing.assert_allclose(margin[t], (2*other - 1)[t])


def test_label_errors_follow_the_thresholds_of_the_classes():
    "By hand: the means are .3 with the label and .9 for the lack of it, so .35 without the label is a candidate although it is under one half."
    y, p = np.array([1, 1, 0, 0, 0, 0]), np.array([.05, .55, .35, .05, 0., 0.])
    margin = galleries.label_errors(y, p); assert np.flatnonzero(~np.isnan(margin)).tolist() == [0, 2] and margin[0] == pytest.approx(.9) and margin[2] == pytest.approx(-.3)
    with pytest.raises(ValueError, match="all labels are the same"): galleries.label_errors([1, 1], [.2, .3])


def test_gallery_pictures(run):
    df = training_table(run); rows = df[df.fold == 0]; rng = np.random.default_rng(0); oof = pd.DataFrame(rng.random((len(rows), 6)), rows.index, list(run.task.labels)); recipe = replace(TINY, folds=(0,))
    table = galleries.gallery_table(oof, df, "any", "false positive", n=5, per_patient=9, folds=recipe.folds); torch.manual_seed(0)
    maps = galleries.gallery_maps(run, [build_model(recipe, 6)], recipe, table, "any"); assert [m.shape for m in maps] == [load_stack(run, s).shape[1:] for s in table.study]
    fig = galleries.plot_errors(run, table, "any", maps=maps, cols=3)
    text = " ".join(t.get_text() for a in fig.axes for t in (a.title, *a.texts)); assert text.count("p(any)") == len(table) and not any(i in text for i in (*table.index, *table.study, *df.patient.unique()))
    with pytest.raises(KeyError): galleries.gallery_maps(run, [build_model(recipe, 6)], recipe, table.assign(fold=1), "any")
