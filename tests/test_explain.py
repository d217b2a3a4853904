"""Pictures: grey values, montages, masks, GIFs and pages with a slider."""
import base64, io, json, re, tracemalloc

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from rsna_helpers import dicom, explain

yy, xx = np.mgrid[-48:48, -48:48]
RADIUS = np.hypot(yy, xx)
HEAD = np.select([RADIUS < 36, RADIUS < 40], [30, 900], -1000).astype(np.int16)
BLOOD = (np.hypot(yy - 10, xx - 8) < 10)
STACK = np.stack([np.where(BLOOD & (i in (2, 3)), 70, HEAD) for i in range(6)]).astype(np.int16)
MASK = (STACK == 70).astype(np.uint8)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def page_data(page): return json.loads(re.search(r"const S = (\{.*?\}), \$ =", page, re.S)[1])
def decoded(uri): return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


@pytest.mark.parametrize("kind", ["normal", "two values", "skewed"])
def test_bins_are_those_of_a_sort(kind):
    rng = np.random.default_rng(3)
    x = dict(normal=rng.normal(0, 300, (5, 60, 70)), skewed=rng.gamma(.3, 900, (5, 60, 70)) - 1000)[kind] if kind != "two values" else np.where(rng.random((5, 60, 70)) < .7, -1000, 40)
    x = np.rint(x).astype(np.int16); s = np.sort(x.ravel()); at = (np.r_[.001, np.arange(100)/100 + .005, .999]*s.size).astype(int)
    assert explain.hist_bins(x).tolist() == np.unique(s[at]).tolist()
    assert explain.hist_bins(iter(x)).tolist() == explain.hist_bins(x.astype(np.float32) + .3).tolist() == explain.hist_bins(x).tolist()
    y = explain.hist_scaled(x); assert y.dtype == np.float32 and y.shape == x.shape and y.min() == 0 and y.max() == 1
    a, b = x.ravel()[:500], y.ravel()[:500]; order = np.argsort(a, kind="stable"); assert (np.diff(b[order]) >= 0).all() # denser is never darker


def test_constant_empty_and_extreme_images():
    assert explain.hist_scaled(np.full((4, 4), 7, np.int16)).tolist() == [[0]*4]*4
    assert explain.hist_scaled(np.full((2, 4, 4), 7, np.int16), explain.hist_bins(STACK)).shape == (2, 4, 4)
    odd = np.array([[np.nan, np.inf], [-np.inf, 3e9]]); assert np.isfinite(explain.hist_scaled(odd)).all()
    assert explain.hist_bins(np.array([[-32768, 32767]], np.int16)).tolist() == [-32768, 32767]
    assert explain.hist_bins(np.array([[0, 65535]], np.uint16)).tolist() == [0, 65535] and explain.hist_bins(np.array([[0, 255]], np.uint8)).tolist() == [0, 255]
    with pytest.raises(ValueError, match="no pixels to count"): explain.hist_bins([])


def test_memory_is_that_of_a_slice(tmp_path):
    "A stack on disk, 1 and 8 times as long: counting its values takes no more memory."
    peaks = []
    for n in (4, 32):
        f = tmp_path/f"{n}.npy"; np.save(f, np.random.default_rng(0).integers(-1000, 1000, (n, 256, 256)).astype(np.int16)); stack = np.load(f, mmap_mode="r")
        tracemalloc.start(); explain.hist_bins(stack); peaks.append(tracemalloc.get_traced_memory()[1]); tracemalloc.stop()
    assert peaks[1] < 1.2*peaks[0], peaks


def test_windows_by_name_everywhere():
    for show in (lambda w: explain.thumbnail(HEAD, w), lambda w: explain.montage(STACK, w), lambda w: explain.plot_stack(STACK, w), lambda w: explain.make_gif(STACK, w, px=32), lambda w: explain.viewer_page(STACK, w, px=32),
                 lambda w: explain.gallery(list(STACK), w), lambda w: explain.plot_windows(HEAD, [w])):
        for w in ("bone", (40, 80), "hist"): show(w)
        with pytest.raises(ValueError, match="no window 'brian'.*brain, subdural"): show("brian")
    assert explain.to_grey(HEAD, "brain").tolist() == dicom.apply_window(HEAD, *dicom.WINDOWS["brain"]).tolist()


def test_thumbnail_keeps_proportions():
    t = explain.thumbnail(np.full((100, 50), 200, np.int16), "brain", 64)
    assert t.shape == (64, 64) and (t[:, 16:48] == 255).all() and (t[:, :16] == 0).all() and (t[:, 48:] == 0).all()
    assert explain.thumbnail(None, "brain", 32).any()
    assert explain.thumbnail(np.full((8, 8), 40, np.int16), (40, 81), 8)[0, 0] in (127, 128, 129)
    t, b, l, r = explain.body_box(HEAD); assert abs(t - 9) <= 2 and abs(b - 88) <= 2 and abs(l - 9) <= 2 and abs(r - 88) <= 2
    assert explain.body_box(np.full((40, 30), -1000, np.int16)) == (0, 40, 0, 30)


def test_montage():
    ax = explain.montage(STACK, mark=[0, 0, 1, 1, 0, 0], title="a $ b $ _ {")
    ax.figure.canvas.draw() # a dollar sign from a header is no formula
    assert len(ax.patches) == 2 and [t.get_text() for t in ax.texts] == list("123456")
    long = np.repeat(STACK, 50, axis=0); assert len(explain.montage(long, px=16).texts) == 60
    plain, drawn = (explain.montage(STACK, mask=m, px=96).images[0].get_array() for m in (None, MASK))
    coloured = np.ptp(drawn.astype(int), axis=2) > 0
    assert not np.ptp(plain.astype(int), axis=2).any() and 0 < coloured.sum() < 2*MASK[2].sum() # an outline, in the slices with a mask
    explain.montage([None, HEAD[:, 8:], HEAD], mask=[None, None, MASK[0]])
    for kwargs, what in ((dict(mask=MASK[1:]), "mask has 5 entries for 6 slices"), (dict(mask=MASK[:, 1:]), "mask of slice 0 is"), (dict(captions=["a"]), "captions has 1"), (dict(mark=[1]), "mark has 1")):
        for show in (explain.montage, explain.make_gif, explain.viewer_page):
            with pytest.raises(ValueError, match=what): show(STACK, **kwargs)


def test_cuts_show_the_order():
    ramp = np.repeat(np.arange(6, dtype=np.int16)[:, None, None]*10, 96, 1).repeat(96, 2)
    assert (explain.cut(ramp, "sagittal")[:, 5] == [50, 40, 30, 20, 10, 0]).all()
    fig = explain.plot_stack(STACK, mm=(5, .5)); assert len(fig.axes) == 3 and fig.axes[1].get_aspect() == 10
    assert len(explain.plot_stack([HEAD, HEAD[:, 8:], None]).axes) == 1 # slices of several sizes cannot be cut across
    with pytest.raises(ValueError, match="differ in size"): explain.cut([HEAD, HEAD[:, 8:]], "coronal")


def test_gif(tmp_path):
    stack = [HEAD, HEAD, None, HEAD[:, 8:]]
    explain.save_gif(stack, tmp_path/"c.gif", px=96, mark=[False, True, False, False])
    assert [f.name for f in tmp_path.iterdir()] == ["c.gif"]
    with Image.open(tmp_path/"c.gif") as im:
        assert im.format == "GIF" and im.size == (96, 96) and im.n_frames == 4
        edge = []
        for k in range(4): im.seek(k); edge.append(im.convert("RGB").getpixel((95, 95)))
    assert edge[1][0] > 200 > edge[1][2] and len({*edge[0]}) == 1 # the frame is red on the marked image only, the rest is grey
    noisy = [np.random.default_rng(k).integers(0, 80, (256, 256)).astype(np.int16) for k in range(20)]
    html = explain.animate(noisy, "brain", max_kb=100).data
    assert len(html) < 105*1024 and decoded(re.search('src="([^"]+)', html)[1]).n_frames == 20
    with Image.open(io.BytesIO(explain.make_gif(np.repeat(STACK, 50, axis=0), px=16))) as im: assert im.n_frames <= 120
    with pytest.raises(ValueError, match="no slices"): explain.make_gif([])


def test_gif_with_a_mask():
    with Image.open(io.BytesIO(explain.make_gif(STACK, mask=2*MASK, px=96))) as im:
        colours = []
        for k in range(6): im.seek(k); colours.append(explain.MASK_COLOURS[1] in {c for _, c in im.convert("RGB").getcolors(10000)})
    assert colours == [False, False, True, True, False, False]


def test_viewer_holds_slices_and_mask(tmp_path):
    page = explain.viewer_page(STACK, ["brain", (600, 2800)], mask=MASK, mark=[0, 0, 1, 1, 0, 0], px=96, first=2); S = page_data(page)
    assert S["windows"] == ["brain", "600/2800"] and len(S["sheets"]) == 2 and S["first"] == 2 and S["mark"] == [False, False, True, True, False, False] and not S["autoplay"]
    sheet, mask = decoded(S["sheets"][0]), decoded(S["mask"]); assert sheet.size == mask.size == (3*96, 2*96)
    drawn = np.asarray(mask.convert("RGBA"))[..., 3] > 0
    assert drawn[:96, 192:].any() and drawn[96:, :96].any() and drawn.sum() == drawn[:96, 192:].sum() + drawn[96:, :96].sum() # slices 3 and 4 alone
    assert page_data(explain.viewer_page(STACK, autoplay=True))["autoplay"] and page_data(explain.viewer_page(STACK))["mask"] is None
    explain.save_viewer(STACK, tmp_path/"v.html", "brain", mask=MASK); assert [f.name for f in tmp_path.iterdir()] == ["v.html"]
    assert "http" not in (tmp_path/"v.html").read_text()


def test_viewer_fits_and_is_harmless():
    noisy = np.random.default_rng(0).integers(0, 80, (40, 128, 128)).astype(np.int16)
    page = explain.viewer_page(noisy, "brain", max_kb=60); S = page_data(page); assert len(page) < 66*1024 and S["captions"][0] == "1/40"
    bad = explain.viewer_page(STACK, captions=["</script><script>alert(1)</script>"]*6, title="<script>")
    assert bad.count("<script") == bad.count("</script") == 1
    assert "<script" not in explain.viewer(STACK, captions=["<script>"]*6).data # the page stands escaped in the frame
