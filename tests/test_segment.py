"Stage 0 of the neck: the network learns on a crude neck, and what it finds is put in order."
import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from standin import crude_neck

from rsna_helpers.masks import LEVELS
from rsna_helpers.segment import (CLASSES, SEG_RECIPES, Grid, Segmenter, augment_volumes, build_segmenter, coarse_mask, coarse_volume, crop_positions, cut_vertebrae, dice_table, even_split,
                                  find_vertebrae, fit_segmenter, load_segmenter, save_segmenter, segment_folds, slice_targets, tidy_levels)

RECIPE = replace(SEG_RECIPES["test"], steps=400, lr=6e-3, rotate=4., shift=.04, scale=.06, cut=.2, noise=30.)


def grid_of(mask, mm, recipe=RECIPE): return Grid.over(mask.shape, mm, recipe.shape)


@pytest.fixture(scope="module")
def necks(): return {f"n{i}": crude_neck(i) for i in range(8)}


@pytest.fixture(scope="module")
def fitted(necks):
    volumes = {s: coarse_volume(hu, grid_of(m, mm)) for s, (hu, m, mm) in necks.items()}; labels = {s: coarse_mask(m, grid_of(m, mm)) for s, (_, m, mm) in necks.items()}
    return volumes, labels, fit_segmenter(volumes, labels, RECIPE, progress=False)


class Truth:
    "A network that is always right, but for what `change` does to its labels."
    recipe = SEG_RECIPES["quick"]
    def __init__(self, mask, mm, change=lambda x: x): self.mask, self.mm, self.change = mask, mm, change
    def __call__(self, volume, study=None): return (np.arange(9)[:, None, None, None] == self.change(coarse_mask(self.mask, grid_of(self.mask, self.mm, self.recipe)))).astype(np.float32)


def test_network_learns_levels_of_studies_it_never_saw(fitted):
    _, _, (segmenter, dice, losses) = fitted
    assert losses["fold 0"].iloc[-5:].mean() < .6*losses["fold 0"].iloc[:5].mean()
    assert set(dice.index) == {s for s, f in segmenter.fold.items() if f == 0} and 2 <= len(dice) <= 3
    assert dice[list(LEVELS)].mean().mean() > .4, dice                     # one part in eight would be luck


def test_same_seed_same_network(fitted):
    volumes, labels, _ = fitted; r = replace(RECIPE, steps=2); state = torch.random.get_rng_state()
    a, b, c = (fit_segmenter(volumes, labels, r, seed=s, progress=False)[0].members[0].state_dict() for s in (1, 1, 2)); name = next(iter(a))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a[name], c[name]) and torch.equal(state, torch.random.get_rng_state())


def test_every_fold_is_held_out_from_its_network(fitted):
    volumes, labels, _ = fitted; seg, dice, losses = fit_segmenter(volumes, labels, replace(RECIPE, steps=1, folds=(0, 1, 2)), progress=False)
    assert set(dice.index) == set(volumes) and list(losses) == ["fold 0", "fold 1", "fold 2"]
    for s, f in seg.fold.items(): assert seg.members_for(s) == [seg.members[f]]
    assert len(seg.members_for("a study without a mask")) == 3
    counts = np.bincount(list(segment_folds(range(87), 5).values())); assert counts.max() - counts.min() <= 1


def test_wrong_input_is_named(fitted):
    volumes, labels, _ = fitted
    with pytest.raises(ValueError, match="same studies, at least 3"): fit_segmenter(dict(list(volumes.items())[:2]), labels, RECIPE)
    with pytest.raises(ValueError, match=r"n3.*\(48, 32, 32\)"): fit_segmenter(volumes | dict(n3=volumes["n3"][:40]), labels, RECIPE)


def test_saved_and_loaded(fitted, tmp_path):
    volumes, _, (segmenter, *_) = fitted; save_segmenter(tmp_path, segmenter, profile="test"); back = load_segmenter(tmp_path)
    assert np.array_equal(segmenter(volumes["n0"], "n0"), back(volumes["n0"], "n0")) and back.fold == segmenter.fold and back.recipe == segmenter.recipe
    about = json.loads((tmp_path/"segmenter.json").read_text())
    (tmp_path/"segmenter.json").write_text(json.dumps(about | dict(recipe=about["recipe"] | dict(channels=[4, 8, 16, 16]))))
    with pytest.raises(ValueError, match="segmenter_fold0.safetensors does not fit"): load_segmenter(tmp_path)
    (tmp_path/"segmenter.json").write_text(json.dumps(dict(recipe=dict(name="x", sahpe=1), fold={})))
    with pytest.raises(ValueError, match="segmenter.json is damaged.*sahpe"): load_segmenter(tmp_path)
    (tmp_path/"segmenter.json").write_text(json.dumps(about)); (tmp_path/"segmenter_fold0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="segmenter_fold0"): load_segmenter(tmp_path)


def test_augmentation_moves_volume_and_mask_together():
    hu, mask, mm = crude_neck(3); r = replace(SEG_RECIPES["test"], noise=0., gain=0.); g = grid_of(mask, mm, r); torch.manual_seed(0)
    v, m = torch.from_numpy(coarse_volume(hu, g))[None, None].repeat(6, 1, 1, 1, 1), torch.from_numpy(coarse_mask(mask, g))[None, None].repeat(6, 1, 1, 1, 1); x, y = augment_volumes(v, m, r)
    assert set(np.unique(y)) <= set(range(9)) and all((y[i] != m[i]).any() for i in range(6))
    before, inside, outside = v[m > 0].mean(), x[y > 0].mean(), x[(y == 0) & (x > -300)].mean(); assert abs(inside - before) < 60 and inside > outside + 80


def test_coarse_and_back_keeps_the_vertebrae(necks):
    hu, mask, mm = necks["n0"]; found = find_vertebrae(Truth(mask, mm), hu, mm)
    d = dice_table(dict(s=np.minimum(mask, 8)), dict(s=found.mask)); assert found.note == "" and d[list(LEVELS)].min().min() > .75, d
    for k in range(7):
        at = np.argwhere(mask == k + 1); assert np.abs(found.boxes[k] - np.stack([at.min(0), at.max(0) + 1], 1).ravel()).max() <= 3
    assert found.shares.max(0).tolist() == [1]*7 and (np.diff(found.shares.argmax(0)) < 0).all()


@pytest.mark.parametrize("change, note", [
    (lambda m: np.where(m == 4, 0, m), "C4 filled in"), (lambda m: np.where(m == 4, 5, m), "C4 filled in"), (lambda m: np.where(m == 1, 0, m), "C1 filled in"),
    (lambda m: np.where(m == 3, 6, np.where(m == 6, 3, m)), "filled in"), (lambda m: np.where(m == 7, 8, m), "C7 filled in")])
def test_levels_that_are_missed_or_exchanged_are_put_right(necks, change, note):
    hu, mask, mm = necks["n1"]; right, found = find_vertebrae(Truth(mask, mm), hu, mm), find_vertebrae(Truth(mask, mm, change), hu, mm, study="n1")
    assert note in found.note
    middle = lambda f: f.boxes.reshape(7, 3, 2).mean(2)*[mm[2], mm[0], mm[1]]
    assert np.linalg.norm(middle(found) - middle(right), axis=1).max() < 12                       # mm
    assert (np.diff(middle(found)[:, 0]) < 0).all()


def test_noise_is_no_vertebra():
    rng = np.random.default_rng(0); p = rng.dirichlet(np.ones(9), (24, 16, 16)).transpose(3, 0, 1, 2).astype(np.float32)
    labels, _, notes = tidy_levels(p, 5.); assert labels is None or set(np.unique(labels)) <= set(range(9))
    empty = np.zeros((9, 24, 16, 16), np.float32); empty[0] = 1; assert tidy_levels(empty, 5.) == (None, None, ["0 of 7 levels found"])


def test_even_split_is_near_and_says_so(necks, caplog):
    caplog.set_level(logging.WARNING, logger="rsna_helpers")
    for s, (hu, mask, mm) in necks.items():
        found = find_vertebrae(None, hu, mm, study=s); assert found.note.startswith("even split of the spine") and f"study {s}: even split" in caplog.text
        truth = np.array([np.argwhere(mask == k + 1)[:, 0].mean() for k in range(7)])*mm[2]; assert np.abs(found.boxes[:, :2].mean(1)*mm[2] - truth).mean() < 20, s   # mm; a level takes 15


@pytest.mark.parametrize("hu", [np.full((9, 20, 20), -1000, np.int16), np.zeros((1, 20, 20), np.int16), np.full((3, 8, 40), 3000, np.int16)])
def test_odd_stacks_still_get_seven_boxes(hu):
    for segmenter in (None, Truth(np.zeros(hu.shape, np.uint8), (1., 1., 2.))):
        found = find_vertebrae(segmenter, hu, (1., 1., 2.), study="odd"); b = found.boxes
        assert "even split" in found.note and b.shape == (7, 6) and (b[:, 1::2] > b[:, ::2]).all() and (b >= 0).all() and (b[:, 1::2] <= hu.shape).all()
        crops = cut_vertebrae(hu, found.mask, b, (1., 1.), 15, 16, 20.); assert crops.shape == (7, 15, 2, 16, 16)
        assert np.isfinite(slice_targets(found.shares, crop_positions(b))).all()


def test_scan_that_ends_early(necks):
    hu, mask, mm = necks["n2"]; first = int(np.argwhere(mask == 6)[:, 0].max()) + 2; found = find_vertebrae(Truth(mask[first:], mm), hu[first:], mm, study="n2")
    assert "C6, C7" in found.note and (found.boxes[:, 1::2] <= hu[first:].shape).all() and (found.boxes >= 0).all()


def test_crops_show_the_vertebra_at_its_scale(necks):
    hu, mask, mm = necks["n0"]; found = find_vertebrae(Truth(mask, mm), hu, mm); crops = cut_vertebrae(hu, mask, found.boxes, mm, 15, 48, 80.); at = crop_positions(found.boxes, 15)
    assert crops.shape == (7, 15, 2, 48, 48) and crops.dtype == np.int16 and crops[:, :, 1].min() == 0 and crops[:, :, 1].max() == 1000
    for k in range(7):
        area = crops[k, :, 1].sum((1, 2))/1000*(80/48)**2; true = np.array([(mask[i] == k + 1).sum()*mm[0]*mm[1] for i in at[k]])
        assert np.abs(area - true).max() < .15*true.max()                          # mm2: nothing is cut off, nothing is stretched
        assert crops[k, :, 0][crops[k, :, 1] > 900].mean() > 300
    target = slice_targets(found.shares, at); assert target.shape == (7, 15) and (target.max(1) == 1).all() and (target[:, 0] < .5).all()


def test_reversed_numbers_of_pixels_do_not_matter():
    "A study with a gap: places in mm count, not numbers of slices."
    hu, mask, mm = crude_neck(4); keep = np.r_[0:20, 24:len(hu)]; z = np.arange(len(hu))[keep]*mm[2]; whole, gap = grid_of(mask, mm), Grid.over((len(keep), *mask.shape[1:]), mm, RECIPE.shape, z)
    a, b = coarse_volume(hu, whole), coarse_volume(hu[keep], gap); assert np.abs(a[30:46] - b[30:46]).mean() < 40 and gap.mm == pytest.approx(whole.mm, rel=.01)


def test_classes(): assert CLASSES[1:8] == LEVELS and len(CLASSES) == 9
