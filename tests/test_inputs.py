"From HU to channels: what one slice of a picture meets, all of them meet; seeds decide; nothing at all leaves the picture as it is."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rsna_helpers import inputs
from rsna_helpers.inputs import AUGMENTATIONS, Inputs, Windows, augment, mixup, plot_augmentations
from rsna_helpers.recipes import RECIPES

QUICK = replace(RECIPES["quick"], size=64)
OFF = replace(QUICK, **dict.fromkeys(AUGMENTATIONS, 0.))


def blob(n=6, c=1, side=64): # a head of 30 HU in a ring of bone, with a bright corner, so that no symmetry hides a flip
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side)]*2, indexing="ij"); rr = (x**2 + (1.2*y)**2).sqrt()
    hu = torch.full((side, side), -1000.); hu[rr < .8] = 900; hu[rr < .7] = 30; hu[(rr < .6) & (x > .1) & (y > .2)] = 65
    return hu.repeat(n, c, 1, 1)


def test_inputs_are_plain_when_predicting_and_augmented_when_training():
    hu = torch.randint(-1000, 1500, (2, 1, 64, 64), dtype=torch.int16); make = Inputs(QUICK)
    make.eval(); a = make(hu)
    assert a.shape == (2, len(QUICK.windows), 64, 64) and torch.equal(a, make(hu)) and torch.equal(make(hu, "flip"), a.flip(-1))
    expected = ((hu.float() - QUICK.windows[0][0])/(QUICK.windows[0][1]/2)).clamp(-1, 1)
    torch.testing.assert_close(a[:, :1], expected)
    make.train(); torch.manual_seed(0); b = make(hu); torch.manual_seed(0)
    assert not torch.allclose(a, b) and torch.equal(b, make(hu))


@pytest.mark.parametrize("windows, neighbours", [(((40, 80),), 0), (((40, 80),), 1), (((40, 80), (80, 200), (600, 2800)), 0), (((40, 80), (80, 200), (600, 2800)), 1)])
def test_channels_are_slices_times_windows_slice_by_slice(windows, neighbours):
    c = 1 + 2*neighbours; hu = torch.randint(-1000, 1500, (2, c, 64, 64), dtype=torch.int16); x = Inputs(replace(QUICK, windows=windows, neighbours=neighbours)).eval()(hu)
    assert x.shape == (2, c*len(windows), 64, 64)
    for s in range(c):
        for k, (center, width) in enumerate(windows):
            torch.testing.assert_close(x[:, s*len(windows) + k], ((hu[:, s].float() - center)/(width/2)).clamp(-1, 1))


@pytest.mark.parametrize("name", [*(k for k in AUGMENTATIONS if k not in ("mixup", "window_jitter")), "all"])
def test_a_slice_and_its_neighbours_meet_the_same(name):
    "Three equal slices go in, three equal ones come out; and pictures of a batch differ from one another."
    r = QUICK if name == "all" else replace(OFF, **{name: getattr(QUICK, name)})
    r = replace(r, export=.9) if name == "export" else replace(r, erase=1.) if name == "erase" else r
    torch.manual_seed(1); x = augment(blob(12, 3, 100), r)
    assert torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2])
    plain = augment(blob(1, 1, 100), OFF)
    assert (x[:, :1] - plain).abs().amax((1, 2, 3)).max() > .1, "it does nothing"
    assert len({round(v, 3) for v in x[:, 0].sum((1, 2)).tolist()}) > 2 or name == "flip"


def test_hardening_follows_the_bone_of_the_slice_itself():
    hu = blob(4, 3); hu[:, 0] = hu[:, 0].clamp(max=30)                  # no bone in the slice below
    r = replace(OFF, harden=5.); torch.manual_seed(0); a = augment(hu, r); torch.manual_seed(0); b = augment(hu[:, 1:2], r)
    assert torch.equal(a[:, 1:2], b) and (a[:, 1] - hu[:, 1]).abs().max() > .1


@pytest.mark.parametrize("size, into", [(64, 64), (128, 64), (90, 64), (48, 64)])
def test_no_strength_is_no_change_but_the_resize(size, into):
    hu = torch.full((3, 1, size, size), 30.); hu[:, :, :, size//2:] = 60
    x = augment(hu, replace(OFF, size=into)); assert x.shape[-1] == into
    assert (x[..., 4:-4, 4:into//2 - 4] - 30).abs().max() < 1e-3 and (x[..., 4:-4, into//2 + 4:-4] - 60).abs().max() < 1e-3
    if size == into:
        hu = torch.randint(-1000, 1500, (3, 3, size, size), dtype=torch.int16); make = Inputs(replace(OFF, windows=((200, 3000),)))
        torch.testing.assert_close(make.train()(hu), make.eval()(hu), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_the_batch_that_came_in_is_not_changed(dtype):
    hu = blob(4).to(dtype); before = hu.clone(); Inputs(replace(QUICK, export=1., window_jitter=.1)).train()(hu)
    assert torch.equal(hu, before)


def test_what_is_drawn_stays_within_what_the_recipe_says():
    r = replace(QUICK, rotate=10., zoom=.2, stretch=.1, shift=.05, flip=.3); m = inputs._affine(4000, r)
    a, b, c, d = m[:, 0, 0], m[:, 0, 1], m[:, 1, 0], m[:, 1, 1]
    mirrored = a*d - b*c < 0; assert .26 < mirrored.float().mean() < .34
    assert torch.atan2(-b, d).abs().max() <= math.radians(10) + 1e-5
    assert (a*d - b*c).abs().log().abs().max() <= .4 + 1e-5 and m[:, :, 2].abs().max() <= .1
    assert (a*d - b*c).abs().log().abs().max() > .35 and torch.atan2(-b, d).abs().max() > math.radians(9)


def test_window_jitter_moves_each_window_of_each_picture_by_itself():
    ramp = torch.arange(-200., 400.).view(1, 1, 1, -1).repeat(300, 3, 1, 1); w = Windows(((40, 80), (80, 200)))
    x = w(ramp, .1).view(300, 3, 2, -1); assert torch.equal(x[:, 0], x[:, 2])
    at = ramp[0, 0, 0][x[:, 0].abs().argmin(-1)]; inner = (x[:, 0].abs() < 1).sum(-1).float()        # middle and width, in HU
    for k, (center, width) in enumerate(((40, 80), (80, 200))):
        assert .085*width < (at[:, k] - center).abs().max() <= .1*width + 1
        assert math.exp(-.1)*width - 2 <= inner[:, k].min() < .93*width and 1.07*width < inner[:, k].max() <= math.exp(.1)*width + 2
    assert abs(np.corrcoef(at.T)[0, 1]) < .2
    make = Inputs(replace(OFF, window_jitter=.1)); hu = blob()
    assert torch.equal(make.eval()(hu), Inputs(OFF).eval()(hu)) and not torch.allclose(make.train()(hu), make.eval()(hu), atol=1e-3)


def test_no_jitter_draws_nothing():
    "A recipe without it trains as it did before there was one."
    torch.manual_seed(3); Windows(QUICK.windows)(blob()); a = torch.rand(1); torch.manual_seed(3); assert torch.equal(a, torch.rand(1))


def test_mixup_mixes_labels_as_it_mixes_pictures():
    x = torch.eye(40).view(40, 1, 1, 40).expand(40, 1, 2, 40).contiguous(); y = (torch.rand(40, 6) < .4).long()
    torch.manual_seed(0); a, b = mixup(x, y, .4); torch.manual_seed(0); again = mixup(x, y, .4)
    assert torch.equal(a, again[0]) and torch.equal(b, again[1]) and b.dtype == torch.float32
    share = a[:, 0, 0]                                                   # row: what the picture is made of
    torch.testing.assert_close(share.sum(1), torch.ones(40)); assert (share.diagonal() >= .5).all() and ((share > 0).sum(1) <= 2).all()
    torch.testing.assert_close(b, share @ y.float())
    assert (share.diagonal() < .9).sum() > 5 and len(set(share.diagonal().tolist())) > 20                 # a draw for each picture


def test_mixup_of_nothing():
    x, y = torch.rand(4, 3, 8, 8), torch.ones(4, 2)
    assert mixup(x, y, 0.)[0] is x and mixup(x, y, 0.)[1] is y
    with pytest.raises(ValueError, match="alpha=-0.1"): mixup(x, y, -.1)


def test_nothing_is_left_on_the_cpu():
    "The device `meta` refuses arithmetic with tensors of the CPU, as a GPU does."
    with pytest.raises(RuntimeError): torch.empty(2, device="meta") + torch.ones(2)
    make = Inputs(replace(QUICK, window_jitter=.1, export=.5, erase=1.)).to("meta"); hu = torch.empty(8, 3, 128, 128, dtype=torch.int16, device="meta")
    x = make.train()(hu); assert x.device.type == "meta" and x.shape == (8, 9, 64, 64)
    assert make.eval()(hu, "turn flip").shape == x.shape
    a, b = mixup(x, torch.empty(8, 6, device="meta"), .4); assert a.device.type == b.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_makes_what_the_cpu_makes():
    r = replace(QUICK, noise=0., window_jitter=.1); hu = blob(8, 3, 128).short(); make = Inputs(r).train()
    torch.manual_seed(0); a = make(hu); torch.manual_seed(0); b = make.cuda()(hu.cuda()).cpu()
    torch.testing.assert_close(a, b, atol=5e-3, rtol=0)


def test_gallery_shows_what_is_on_and_is_drawn_from_its_seed():
    import matplotlib.pyplot as plt
    hu = blob(2)[:, 0].numpy(); torch.manual_seed(5); before = torch.get_rng_state()
    draw = lambda r, seed=0, hu=hu: np.stack([np.asarray(a.images[0].get_array()).ravel() for a in plot_augmentations(hu, r, n=2, seed=seed).axes])
    r = replace(OFF, rotate=15., noise=4., mixup=.4)
    assert len(draw(r)) == 3*4 and len(draw(r, hu=hu[0])) == 3*3                     # a single picture has nothing to be mixed with
    assert np.array_equal(draw(r), draw(r)) and not np.array_equal(draw(r), draw(r, 1)) and torch.equal(torch.get_rng_state(), before)
    labels = [a.get_ylabel() for a in plot_augmentations(hu, r, n=1).axes if a.get_ylabel()]
    assert labels[0] == "turned\nup to ±15°" and labels[-1].startswith("all together"); plt.close("all")


def test_a_mask_moves_with_the_picture_and_keeps_its_values():
    "A mask of what is bright stays on what is bright, whatever geometry is drawn; brightness and noise do not touch it."
    x = blob(c=3); pair = torch.stack([x, (x > 50).to(x.dtype)*1000], 2); recipe = replace(RECIPES["quick"], size=64, neighbours=1, windows=((60, 100),), mask=True, erase=0, export=.5, noise=0, blur=0, shade=0, harden=0, hu_shift=0, hu_gain=0)
    torch.manual_seed(0); inputs = Inputs(recipe).train(); y = torch.cat([inputs(pair) for _ in range(8)]); picture, mask = y[:, 1], y[:, 3]
    assert y.shape[1] == 4 and mask.min() >= -1.001 and mask.max() <= 1.001
    on, off = picture[mask > .9], picture[mask < -.9]
    assert len(on) > 100 and on.float().mean() > off.float().mean() + .5
    loud = replace(recipe, export=0, rotate=0, zoom=0, shift=0, stretch=0, flip=0, noise=40, hu_shift=200, shade=50)
    np.testing.assert_allclose(Inputs(loud).train()(pair)[:, 3], Inputs(loud).eval()(pair)[:, 3], atol=1e-4)
