"""Pictures and measures of volumes with masks and boxes: geometry, colours, memory, noise."""
import base64
import io
import re
import tracemalloc

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab

from rsna_helpers import explain, heatmaps, stacks, volumes

ZZ, YY, XX = np.indices((40, 64, 48))
SPACING = (.5, .75, 1.)                         # row, column, slice
NECK = np.where(np.hypot((YY - 32)/30, (XX - 24)/22) < 1, 50, -1000).astype(np.int16)
MASK = np.zeros(NECK.shape, np.uint8)           # five blocks in a column, C5 lowest to T2 ... C6 lacks
for k, label in enumerate((9, 8, 7, 5, 4)): MASK[2 + 7*k:7 + 7*k, 24:36, 20:30] = label
NECK[MASK > 0] = 800
BOXES = pd.DataFrame(dict(position=[10, 11, 12, -1], x=18., y=22., width=12., height=10.))
NOISY = np.where(np.random.default_rng(0).random(MASK.shape) < .002, np.random.default_rng(1).integers(1, 22, MASK.shape), MASK).astype(np.uint8)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def texts(fig): return {t.get_text() for ax in fig.axes for t in ax.texts}
def legend(fig): return [t.get_text() for t in fig.legends[0].texts]


# Machado, Oliveira and Fernandes 2009, full dichromacy
EYES = dict(normal=np.eye(3), protan=[[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],
            deutan=[[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]],
            tritan=[[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .303900]])

@pytest.mark.parametrize("eye", EYES)
def test_colours_stay_apart_for_every_eye(eye):
    rgb = np.array([to_rgb(volumes.level_colour(v)) for v in range(1, 20)]); linear = np.where(rgb <= .04045, rgb/12.92, ((rgb + .055)/1.055)**2.4)
    seen = np.clip(linear @ np.array(EYES[eye]).T, 0, 1); lab = rgb2lab(np.where(seen <= .0031308, seen*12.92, 1.055*seen**(1/2.4) - .055)[None])[0]
    far = deltaE_ciede2000(lab[:, None], lab[None])
    assert far[:7, :7][np.triu_indices(7, 1)].min() > 11 and np.diag(far, 1).min() > 18     # any two of the neck; neighbours anywhere
    assert far[:7, 7:].min() > 14 and lab[:, 0].min() > 40                                  # neck and chest; none is lost on black


def test_names_and_levels():
    assert [volumes.level_name(v) for v in (1, 7, 8, 19, 20, 255)] == ["C1", "C7", "T1", "T12", "20", "255"]
    assert volumes.shown_levels(MASK) == [4, 5, 7, 8, 9] and volumes.shown_levels([None, MASK[2]]) == [9] and volumes.shown_levels([]) == []
    assert volumes.shown_levels(NOISY) == list(range(1, 22)) and volumes.shown_levels(NOISY, 20) == [4, 5, 7, 8, 9]
    assert volumes.level_colour(9) == "#{:02x}{:02x}{:02x}".format(*explain.add_mask(np.zeros((3, 3), np.uint8), np.full((3, 3), 9))[0, 0]) # as every other picture has it


@pytest.mark.parametrize("mask", [MASK, NOISY], ids=["clean", "noisy"])
def test_overlay_names_and_lists_what_it_shows(mask):
    at = [3, 10, 36]; fig = volumes.plot_masked(NECK[at], mask[at], ["a $ b", "b", "c"], cols=3, px=96)
    assert texts(fig) == {"T2", "T1"} and legend(fig) == ["T1", "T2"]                       # slice 36 lies above C4
    strip = fig.axes[0].images[0].get_array(); image, claim, both = np.split(np.asarray(strip), 3, axis=1); assert strip.shape == (96, 288, 3)
    assert not np.ptp(image.astype(int), axis=2).any() and (claim[claim.any(2)] == explain.MASK_COLOURS[8]).all(1).mean() > .9
    inner = (np.ptp(both.astype(int), axis=2) > 0).sum(); assert .8 < inner/claim.any(2).sum() < 1.2
    near = volumes.plot_masked(NECK[at[:1]], mask[at[:1]], px=96, near=True).axes[0].images[0].get_array(); assert np.split(np.asarray(near), 3, axis=1)[1].any(2).sum() > 2*claim.any(2).sum()


def test_overlay_without_a_mask():
    fig = volumes.plot_masked([NECK[3], NECK[4][:, 4:]], [None, MASK[4][:, 4:]]); assert texts(fig) == {"T2"}
    assert not volumes.plot_masked(NECK[:2], [None, None]).legends
    with pytest.raises(ValueError, match=r"mask of slice 1 is \(63, 48\)"): volumes.plot_masked(NECK[:2], [MASK[0], MASK[1, 1:]])
    with pytest.raises(ValueError, match="mask has 1 entries for 2 slices"): volumes.plot_masked(NECK[:2], MASK[:1])


def test_planes_are_to_scale_and_head_up():
    im = volumes.plane(MASK.astype(int), "sagittal", 24, SPACING, 80, True)                                   # 40 mm high, 32 mm deep
    assert im.shape == (80, 64) and im.dtype == np.uint8 and im[80 - 2*4, 30] == 9 and im[80 - 2*32, 30] == 4
    assert volumes.plane(MASK, "coronal", 30, SPACING, 80).shape == (80, 72) and volumes.plane(NECK, "coronal", 30, None, 50).shape == (50, 50)
    fig = volumes.plot_planes(NECK, MASK, SPACING, px=120); shapes = [ax.images[0].get_array().shape for ax in fig.axes]
    assert shapes == [(120, 96, 3)]*2 + [(120, 108, 3)]*2 and legend(fig) == ["C4", "C5", "C7", "T1", "T2"] == sorted(texts(fig) - {"20 mm"})
    high = {t.get_text(): t.get_position()[1] for t in fig.axes[1].texts}; assert high["C4"] < high["C5"] < high["C7"] < high["T1"] < high["T2"] # smaller is higher up
    bar = fig.axes[0].lines[0].get_xdata(); assert bar[1] - bar[0] == pytest.approx(60)     # 20 of 40 mm
    plain = volumes.plot_planes(NECK); assert len(plain.axes) == 2 and "not to scale" in plain.axes[0].get_title(loc="left") and not plain.legends


def test_planes_are_found():
    aside = np.roll(MASK, 9, 2); assert abs(volumes.choose_planes(NECK, MASK)[0] - 24.5) <= 1 and abs(volumes.choose_planes(NECK, aside)[0] - 33.5) <= 1
    assert 24 <= volumes.choose_planes(NECK, MASK)[1] < 36 and 24 <= volumes.choose_planes(NECK, NOISY)[1] < 36
    assert abs(volumes.choose_planes(NECK)[0] - 24.5) <= 1 and volumes.choose_planes(NECK, MASK*0) == volumes.choose_planes(NECK)
    assert volumes.choose_planes(NECK*0) == (24, 32)
    fig = volumes.plot_planes(NECK, MASK, SPACING, sagittal=5, coronal=0); assert [ax.get_title(loc="left") for ax in fig.axes[::2]] == ["sagittal, column 5", "coronal, row 0"] and not fig.legends
    with pytest.raises(ValueError, match="mask of slice 0"): volumes.plot_planes(NECK, MASK[:, 1:])


def test_one_slice_and_masks_of_any_integer():
    assert legend(volumes.plot_planes(NECK[4:5], MASK[4:5], SPACING)) == ["T2"] and legend(volumes.plot_planes(NECK, MASK.astype(np.int64), SPACING)) == ["C4", "C5", "C7", "T1", "T2"]
    assert len(gif(volumes.animate_levels(NECK[4:5], MASK[4:5].astype(np.int64), px=64))) == 1 and volumes.slice_levels(MASK[4:5].astype(np.int64)).tolist() == [9]
    assert set(volumes.bone_surface(NECK, SPACING, 300, MASK.astype(np.int64), mm=1).labels) == {4, 5, 7, 8, 9}


@pytest.mark.parametrize("shape, mm, size, crop", [((128, 128), (1, 1), 64, True), ((256, 200), (.5, .5), 64, True), ((120, 160), (.8, .6), 96, True), ((90, 90), (1, 1), 128, False)])
def test_a_box_of_a_file_is_found_in_its_stack(shape, mm, size, crop):
    "Files whose numbers sort as numbers, against z, with one that cannot be read: a marker drawn in a file lies in the box in the stack."
    numbers, z = [9, 10, 11, 100], [30., 20., 10., 0.]; h, w = shape; box = dict(x=w//2 - 17, y=h//2 + 5, width=20, height=12)
    r, c = np.indices(shape); body = np.where(np.hypot((r - h*.5)/(.3*h), (c - w*.45)/(.3*w)) < 1, 50, -1000).astype(np.int16); marked = body.copy(); marked[box["y"]:box["y"] + 12, box["x"]:box["x"] + 20] = 3000
    def read(path):
        if path == "11": raise stacks.DicomError(path, "broken")
        return (marked if path == "10" else body), dict(Modality=None)
    rows = pd.DataFrame(dict(path=[str(n) for n in numbers], image=[f"1.2.3/{n}" for n in numbers], study="1.2.3", z=z, instance=numbers, spacing_row=float(mm[0]), spacing_col=float(mm[1]), error=None))
    stack, index = stacks.stack_study(rows, read, size, crop); index = pd.DataFrame(index)
    index = index.assign(position=index.get("position").fillna(-1).astype(int))
    table = pd.DataFrame([dict(StudyInstanceUID="1.2.3", slice_number=n, **box) for n in (10, 11, 100, 12)]); found = volumes.stack_boxes(table, index, size)
    assert found.position.to_list() == [1, -1, 0, -1] and found.image.to_list()[0] == "1.2.3/10"
    b = found.iloc[0]; share = (stack[1].astype(float) - stack[0])/(3000 - 50); rr, cc = np.indices(share.shape) + .5
    assert share.max() > .9 and [(share*cc).sum()/share.sum(), (share*rr).sum()/share.sum()] == pytest.approx([b.x + b.width/2, b.y + b.height/2], abs=.6)
    assert share.sum() == pytest.approx(b.width*b.height, rel=.15)
    inside = (cc > b.x - .5) & (cc < b.x + b.width + .5) & (rr > b.y - .5) & (rr < b.y + b.height + .5); assert share[~inside].max() < .5
    named = volumes.stack_boxes(table.assign(image=found.image)[["image", "x", "y", "width", "height"]], index.set_index("image"), size); pd.testing.assert_frame_equal(named, found)


def test_boxes_that_do_not_fit_are_refused():
    table = pd.DataFrame(dict(image=["a"], x=0, y=0, width=1, height=1)); index = pd.DataFrame(dict(image=["a", "a"], study="s", position=[0, 1], crop_top=0, crop_left=0, crop_side=9, crop_width=9))
    with pytest.raises(ValueError, match="image 'a' stands twice"): volumes.stack_boxes(table, index, 9)
    with pytest.raises(ValueError, match="index_rows has no column crop_width"): volumes.stack_boxes(table, index[:1].drop(columns="crop_width"), 9)
    assert len(volumes.stack_boxes(table[:0], index[:1], 9)) == 0


def test_slices_are_thinned_with_their_boxes():
    before = MASK.copy(); thin = volumes.thin_slices(NECK, MASK, BOXES, most=8)
    assert len(thin["stack"]) == len(thin["mask"]) == 8 and thin["captions"][0] == "1/40" and thin["captions"][2] == "12/40 T1" and np.flatnonzero(thin["mark"]).tolist() == [2] # slice 12 has the middle box of the five
    frame = thin["mask"][2] == volumes.BOX; assert frame.sum() == 2*12 + 2*8 and frame[22, 18] and frame[31, 29] and not frame[25:30, 20:27].any() and (MASK == before).all()
    assert np.shares_memory(thin["stack"][0], NECK) and np.shares_memory(thin["mask"][0], MASK)
    assert set(volumes.thin_slices(NECK)) == {"stack", "captions"} and "mark" not in volumes.thin_slices(NECK, MASK) and any(volumes.thin_slices(NECK, None, BOXES)["mark"])
    assert volumes.thin_slices(NECK, NOISY, most=8)["captions"][1] == "6/40 T2"
    page = explain.viewer_page(**volumes.thin_slices(NECK, MASK, BOXES), windows="bone", px=96); assert '"mask": "data:image/png' in page


def test_boxes_on_slices():
    fig = volumes.plot_boxes(NECK, BOXES, n=2, px=100); assert [ax.get_title() for ax in fig.axes] == ["slice 11 of 40", "slice 13 of 40"]
    white = (np.asarray(fig.axes[0].images[0].get_array()) == 255).all(2); r, c = np.nonzero(white); top, _, left, _ = explain.body_box(NECK[10]); k = 100/60 # the body is 60 rows high
    assert np.ptp(r) == pytest.approx(10*k, abs=3) and r.min() == pytest.approx((22 - top)*k, abs=3) and np.ptp(c) == pytest.approx(12*k, abs=3)
    with pytest.raises(ValueError, match="none of the boxes"): volumes.plot_boxes(NECK, BOXES[3:])
    ax = volumes.plot_boxes_each(pd.DataFrame(dict(study=["a"] + ["b"]*2 + ["c"]*167 + ["d"]*3))); assert [int(b.get_height()) for b in ax.patches] == [1, 2, 0, 0, 0, 0, 0, 1] and ax.get_xticklabels()[-1].get_text() == "128–255"
    volumes.plot_boxes_each(BOXES.assign(study="a")[:0])


def gif(html):
    im = Image.open(io.BytesIO(base64.b64decode(re.search('base64,([^"]+)', html.data)[1]))); out = []
    for k in range(im.n_frames): im.seek(k); out.append({c for _, c in im.convert("RGB").getcolors(70000)})
    return out


def test_animation_with_and_without_mask():
    shown = volumes.animate_levels(NECK, MASK, BOXES, most=20, px=96); frames = gif(shown)
    assert len(frames) == 20 and [explain.MASK_COLOURS[8] in f for f in frames[:5]] == [False, True, True, True, False] and explain.MASK_COLOURS[3] in frames[16]
    assert [k for k, f in enumerate(frames) if (255, 107, 87) in f] == [5, 6]                 # framed in red: slices 11 to 13
    assert re.findall(r"</span>(\w+)", shown.data) == ["C4", "C5", "C7", "T1", "T2", "box"]
    plain = volumes.animate_levels(NECK, px=64); assert len(gif(plain)) == 40 and "<span" not in plain.data and not any(len(set(c)) > 1 for f in gif(plain) for c in f if c != (255, 107, 87))
    loud = np.random.default_rng(0).normal(300, 500, (90, 128, 128)).astype(np.int16); assert len(volumes.animate_levels(loud, max_kb=150).data) < 155*1024


def test_surface_of_a_ball():
    ball = np.where((ZZ*1. - 20)**2 + (YY*.5 - 16)**2 + (XX*.75 - 18)**2 < 10**2, 1000, -1000).astype(np.int16); ball[2, 5:7, 5:7] = 1000 # and a speck
    s = volumes.bone_surface(ball, SPACING, 0, np.where(ball > 0, np.where(ZZ < 20, 9, 3), 0).astype(np.uint8), mm=.8)
    assert s.points.min(0) == pytest.approx([8, 6, 10], abs=.5) and s.points.max(0) == pytest.approx([28, 26, 30], abs=.5)   # x, y, z in mm
    a, b, c = np.moveaxis(s.points[s.faces], 1, 0); assert abs((a*np.cross(b, c)).sum()/6) == pytest.approx(4/3*np.pi*1000, rel=.08)
    away = s.points[s.faces].mean(1)[:, 2] - 20; assert set(s.labels) == {3, 9} and (s.labels[away < -2] == 9).all() and (s.labels[away > 2] == 3).all()
    few = volumes.bone_surface(ball, SPACING, 0, most=1500); assert 200 < len(few.faces) <= 1500 and few.spacing[0] > s.spacing[0] and few.points.max(0) == pytest.approx([28, 26, 30], abs=2)
    with pytest.raises(ValueError, match="denser than 2000 HU"): volumes.bone_surface(ball, SPACING, 2000)
    with pytest.raises(ValueError, match="mask has 3 entries"): volumes.bone_surface(ball, SPACING, 0, MASK[:3])


def test_surface_of_levels():
    s = volumes.bone_surface(NECK, SPACING, 300, NOISY, mm=1); assert set(s.labels[s.labels > 0]) == {4, 5, 7, 8, 9}                    # stray labels colour nothing
    skull = NECK.copy(); skull[37:39] = 900; every, own = (volumes.bone_surface(skull, SPACING, 300, MASK, only, mm=1) for only in (False, True))
    assert (every.labels == 0).any() and (own.labels > 0).all() and 0 < len(own.faces) < len(every.faces)
    fig = volumes.plot_surface(own, ["front", (20, 45)], title="x"); fig.canvas.draw()
    assert fig._suptitle.get_text() == "x: surface at 300 HU, voxels of 1 x 1 x 1 mm" and legend(fig) == ["C4", "C5", "C7", "T1", "T2"] and len(fig.axes) == 2
    with pytest.raises(KeyError): volumes.plot_surface(own, ["top"])


def test_level_table():
    t = volumes.level_table(MASK, SPACING); assert t.index.to_list() == ["C4", "C5", "C7", "T1", "T2"] and (t.voxels == 5*12*10).all()
    assert t.cm3.to_numpy() == pytest.approx(600*.5*.75*1/1000) and (t.height_mm == 5).all() and t.loc["T2", ["position", "row", "column", "lowest", "highest"]].to_list() == [4, 29.5, 24.5, 2, 6]
    noisy = volumes.level_table(NOISY, SPACING).loc[t.index]; assert (noisy.height_mm == 5).all() and noisy.cm3.to_numpy() == pytest.approx(t.cm3.to_numpy(), rel=.03)
    assert len(volumes.level_table(MASK*0, SPACING)) == 0 == len(volumes.level_table(MASK[:0], SPACING))
    assert volumes.slice_levels(MASK)[[0, 2, 9, 16, 23, 30]].tolist() == [0, 9, 8, 7, 5, 4] and (volumes.slice_levels(MASK) > 0).sum() == 25
    both = MASK.copy(); both[2, 0, :5] = 1; assert volumes.slice_levels(both)[2] == 9
    ax = volumes.plot_level_volumes(t); assert [p.get_height() for p in ax.patches] == pytest.approx(t.cm3.to_list()) and [x.get_text() for x in ax.get_xticklabels()] == t.index.to_list()
    many = volumes.plot_level_volumes(pd.concat([t, 3*t[:2], 2*t]), "height_mm"); assert [p.get_height() for p in many.patches] == [10, 10, 7.5, 7.5, 7.5] and len(many.lines[0].get_xdata()) == 12
    volumes.plot_level_volumes(t[:0])


def test_memory_is_that_of_what_is_drawn(tmp_path):
    "Four times as many slices on disk take no more memory, whatever is drawn."
    peaks = {}
    for n in (40, 160):
        for name, a in dict(hu=NECK, mask=MASK).items(): np.save(tmp_path/f"{name}.npy", a.repeat(n//40, 0).repeat(4, 1).repeat(4, 2))
        hu, mask = (np.load(tmp_path/f"{k}.npy", mmap_mode="r") for k in ("hu", "mask")); spacing = (.125, .1875, 40/n)
        for name, draw in dict(planes=lambda: volumes.plot_planes(hu, mask, spacing), animation=lambda: volumes.animate_levels(hu, mask, BOXES, most=10, px=64), table=lambda: volumes.level_table(mask, spacing),
                               surface=lambda: volumes.bone_surface(hu, spacing, 300, mask, mm=2)).items():
            tracemalloc.start(); draw(); peaks[name, n] = tracemalloc.get_traced_memory()[1]; tracemalloc.stop(); plt.close("all")
    for name in ("planes", "animation", "table", "surface"): assert peaks[name, 160] < 1.3*peaks[name, 40] + 1e6 < 20e6, peaks


P = pd.Series([.9, .1, .2, .3, .4, .5, .6, .7], ["patient_overall", *volumes.LEVELS[:7]])

def test_bars():
    ax = volumes.plot_levels(P, pd.Series([1, 1], ["C6", "patient_overall"]).reindex(P.index[::-1]).fillna(0)); assert [b.get_height() for b in ax.patches] == pytest.approx(P.to_list())
    assert [t.get_text() for t in ax.get_xticklabels() if "*" in t.get_text()] == ["patient*", "C6*"] and {i for i, b in enumerate(ax.patches) if b.get_facecolor()[:3] == pytest.approx(to_rgb(explain.ACCENT))} == {0, 6}
    assert "*" not in "".join(t.get_text() for t in volumes.plot_levels(P.to_numpy()).get_xticklabels())
    for bad in (P[:3].to_numpy(), P.where(P != .1)):
        with pytest.raises(ValueError, match="p must hold one number for each of patient_overall, C1"): volumes.plot_levels(bad)
    with pytest.raises(ValueError, match="truth must hold"): volumes.plot_levels(P, [0, 1])


def test_curve_over_levels_and_boxes():
    p = np.linspace(0, 1, 40); ax = volumes.plot_level_curve(p, volumes.slice_levels(MASK), BOXES, MASK.any((1, 2)))
    assert {t.get_text() for t in ax.texts} == {"C4", "C5", "C7", "T1", "T2", "box"} and len(ax.patches) == 25 + 2*5
    bars = [l for l in ax.lines if len(l.get_xdata()) == 2]; assert [l.get_xdata().tolist() if hasattr(l.get_xdata(), "tolist") else list(l.get_xdata()) for l in bars] == [[10.5, 13.5]]
    assert not volumes.plot_level_curve(p, boxes=BOXES[3:]).texts
    for k, v in dict(levels=[1], truth=[0]*41).items():
        with pytest.raises(ValueError, match=f"{k} has {len(v)} entries for 40 slices"): volumes.plot_level_curve(p, **{k: v})
    fig = heatmaps.plot_study_curve(p, stack=NECK, levels=volumes.slice_levels(MASK), boxes=BOXES, window="bone"); assert "C7" in {t.get_text() for t in fig.axes[0].texts} and len(fig.axes) == 6
