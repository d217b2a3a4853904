"""Tables and plots of notebook 01 on a handful of small files whose every oddity is known."""
import os

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from rsna_helpers import core, dicom, eda, explain, npy
from rsna_helpers.phantom import dicom_bytes
from rsna_helpers.tasks import get_task

LABELS = list(get_task("hemorrhage").labels)
yy, xx = np.mgrid[-48:48, -48:48]
RADIUS = np.hypot(yy, xx)
HEAD = np.select([RADIUS < 36, RADIUS < 40], [30, 900], -1000).astype(np.int16)
BLOOD = np.where(np.hypot(yy - 10, xx - 8) < 10, 70, HEAD).astype(np.int16)


def tags(patient, study, z, **more):
    base = dict(Modality="CT", PatientID=patient, StudyInstanceUID=study, SeriesInstanceUID="r" + study, RescaleSlope=1, RescaleIntercept=-1024, PixelSpacing=["2", "2"],
                ImagePositionPatient=["0", "0", str(z)], ImageOrientationPatient=["1", "0", "0", "0", "1", "0"], WindowCenter="40", WindowWidth="80", BitsStored=16, HighBit=15, PixelRepresentation=1)
    return base | more


def files():
    "name -> (split, HU, share of the pixels kept, tags, labels or None)"
    out = {}
    for i in range(6): # a: six slices, file names against the order of z; two bleed, in the middle
        y = [0, 0, 0, 0, 1, 1] if i in (2, 3) else [0]*6
        out[f"ID_a{9 - i}"] = ("train", BLOOD if y[-1] else HEAD, 1, tags("p1", "a", 5*i), y)
    for i in range(3): # b: same patient; one slice at the z of another, wrapped values, two labels at once
        out[f"ID_b{i}"] = ("train", HEAD, 1, tags("p1", "b", [0, 5, 5][i], RescaleIntercept=0, BitsStored=12, HighBit=11, PixelRepresentation=0, WindowCenter=["40", "80"], WindowWidth=["80", "80"]), [1, 0, 1, 0, 0, 1] if i == 1 else [0]*6)
    for i in range(4): # c: healthy; one slice is cut off, one is not square
        out[f"ID_c{i}"] = ("train", HEAD[:, 8:] if i == 1 else HEAD, .5 if i == 2 else 1, tags("p2", "c", 5*i), [0]*6)
    out["ID_d0"] = ("train", HEAD, 1, tags("p3", "d", 0, BitsStored=12, HighBit=11, RescaleIntercept=0, ImageOrientationPatient=["1", "0", "0", "0", "0.96", "0.28"]), None) # no label
    out["ID_t0"] = ("test", HEAD, 1, tags("p2", "t", 0, WindowCenter=["40", "40"], WindowWidth=["80", "80"]), None) # patient of the training set
    return out


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    raw = tmp_path_factory.mktemp("raw"); rows = [("ID_gone", [0]*6)]
    for split in ("train", "test"): (raw/f"stage_2_{split}").mkdir()
    for name, (split, hu, keep, t, y) in files().items():
        px = (hu.astype(int) - t["RescaleIntercept"]) & (0xfff if t["BitsStored"] == 12 else 0xffff)
        (raw/f"stage_2_{split}"/f"{name}.dcm").write_bytes(dicom_bytes(px.astype("<u2"), t | dict(SOPInstanceUID=name), False, keep))
        if y is not None: rows.append((name, y))
    (raw/"stage_2_train"/"ID_e0.dcm").write_bytes(b"no image at all"); rows.append(("ID_e0", [0]*6))
    long = [(f"{n}_{l}", v) for n, y in rows for l, v in zip(LABELS, y)]
    pd.DataFrame(long + long[:6], columns=["ID", "Label"]).to_csv(raw/"stage_2_train.csv", index=False)
    pd.DataFrame([(f"ID_t0_{l}", .5) for l in LABELS], columns=["ID", "Label"]).to_csv(raw/"stage_2_sample_submission.csv", index=False)
    return raw


@pytest.fixture
def run(raw, tmp_path, monkeypatch):
    monkeypatch.setenv("RSNA_DATA", str(tmp_path/"data")); monkeypatch.setenv("RSNA_MODELS", str(tmp_path/"models"))
    return core.start(raw=raw, profile="quick", verbose=False)


@pytest.fixture
def tables(run): return eda.prepare_tables(run, n_jobs=1, progress=False)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_tables_hold_every_file(run, tables):
    labels, headers = tables
    assert len(headers) == len(files()) + 1 and headers.image.is_unique
    assert headers.set_index("image").path["ID_t0"] == "stage_2_test/ID_t0.dcm" # relative, forward slashes
    assert headers.set_index("image").split["ID_t0"] == "test"
    assert list(labels) == LABELS and labels.index.name == "image" and labels.attrs["repeated"] == 6
    bad = headers[headers.error.notna()].set_index("image").error
    assert set(bad.index) == {"ID_c2", "ID_e0"} and "truncated" in bad["ID_c2"]
    note = core.load_json(run.data/"tables.json")
    assert note["result"] == dict(images=len(headers), not_read=2, labelled=15, repeated=6)


def test_second_call_reads_the_files(run, tables, monkeypatch):
    def never(*a, **k): raise AssertionError("the headers were read again")
    monkeypatch.setattr(dicom, "header_table", never)
    labels, headers = eda.prepare_tables(run, progress=False)
    pd.testing.assert_frame_equal(headers, tables[1]); pd.testing.assert_frame_equal(labels, tables[0])
    assert labels.attrs["repeated"] == 6
    (run.data/"tables"/"headers.parquet").unlink()
    with pytest.raises(AssertionError, match="read again"): eda.prepare_tables(run, progress=False)


def test_new_labels_are_noticed(run, tables):
    f = run.raw/"stage_2_train.csv"; old, stat = f.read_bytes(), f.stat()
    try:
        f.write_bytes(old.replace(b"ID_c0_subdural,0", b"ID_c0_subdural,1").replace(b"ID_c0_any,0", b"ID_c0_any,1"))
        os.utime(f, (stat.st_mtime + 5, stat.st_mtime + 5))
        labels, _ = eda.prepare_tables(run, n_jobs=1, progress=False)
        assert labels.subdural["ID_c0"] == 1 and tables[0].subdural["ID_c0"] == 0
    finally: f.write_bytes(old); os.utime(f, (stat.st_atime, stat.st_mtime))


def test_a_stopped_read_goes_on(run, tmp_path, monkeypatch):
    "Killed in the third part: the first two are not read again, and the whole is what one go gives."
    real, calls = dicom.header_table, []
    def mortal(paths, *a, **k):
        calls.append(len(paths))
        if len(calls) == 3: raise KeyboardInterrupt
        return real(paths, *a, **k)
    monkeypatch.setattr(dicom, "header_table", mortal)
    found = eda._files(run); args = run, found, tmp_path/"parts", 1, False, 5
    with pytest.raises(KeyboardInterrupt): eda._read_headers(*args)
    assert len(list((tmp_path/"parts").glob("*.parquet"))) == 2
    headers = eda._read_headers(*args)
    assert sum(calls[3:]) == len(found) - 10
    whole = eda._read_headers(run, found, tmp_path/"whole", 1, False)
    assert headers.image.tolist() == found.image.tolist() == whole.image.tolist()
    pd.testing.assert_series_equal(headers.z, whole.z); assert headers.error.isna().tolist() == whole.error.isna().tolist()


def test_labelled_orders_by_position(tables):
    labels, headers = tables
    t = eda.labelled(headers, labels)
    assert len(t) == 14 and "ID_d0" not in set(t.image) and "ID_t0" not in set(t.image) # ID_gone has no file
    a = t[t.study == "a"]
    assert a.image.tolist() == [f"ID_a{9 - i}" for i in range(6)] and np.allclose(a.height, np.arange(6)/5)
    assert eda.labelled(t, labels) is t


def test_labels_of_a_study(tables):
    "Where the labels belong to studies, all images of a study share them and counts go by study."
    _, headers = tables
    labels = pd.DataFrame(dict(patient_overall=[1, 0], C1=[1, 0], C2=[0, 0]), index=pd.Index(["a", "b"], name="study"))
    t = eda.labelled(headers, labels)
    assert len(t) == 9 and t[t.study == "a"].C1.eq(1).all() and t[t.study == "b"].C1.eq(0).all()
    p = eda.prevalence(headers, labels)
    assert list(p) == ["study", "patient"] and p.loc["n"].tolist() == [2, 1] and p.loc["C1"].tolist() == [.5, 1]
    assert eda.split_table(headers, labels)["labelled studies"]["train"] == 2
    assert "2 labelled studies" in eda.plot_label_counts(labels).get_title(loc="left")
    assert eda.plot_prevalence(headers, labels).get_title(loc="left")
    with pytest.raises(ValueError, match="which of the images show them is not known"): eda.plot_heights(headers, labels)


def test_split_table(tables):
    labels, headers = tables
    t = eda.split_table(headers, labels)
    assert t.images.to_dict() == dict(train=15, test=1) and t.studies["train"] == 4 and t.patients["train"] == 3
    assert t["labelled images"].to_dict() == dict(train=14, test=0) and t["not readable"]["train"] == 2
    assert t["patients also elsewhere"].to_dict() == dict(train=1, test=1) and t["studies also elsewhere"].sum() == 0


def test_overall_label_is_found_by_its_values():
    x = pd.DataFrame(dict(first=[1, 0, 0, 1], a=[1, 0, 0, 0], b=[0, 0, 0, 1]))
    assert eda.overall_label(x) == "first" and eda.subtypes(x) == ["a", "b"]
    assert eda.overall_label(x.assign(b=x["first"])) == "b" # two are: the last
    assert eda.overall_label(x.assign(first=1 - x["first"])) is None
    assert eda.overall_label(x[["a", "b"]]) is None and eda.subtypes(x[["a", "b"]]) == ["a", "b"]


def test_counts(tables):
    labels, headers = tables
    c = eda.label_counts(labels)
    assert c.positive.to_dict() == dict(epidural=1, intraparenchymal=0, intraventricular=1, subarachnoid=0, subdural=2, any=3)
    assert c.alone.to_dict() == dict(epidural=0, intraparenchymal=0, intraventricular=0, subarachnoid=0, subdural=2, any=2) and c.share["any"] == 3/15
    n = eda.cooccurrence(labels)
    assert n.loc["epidural", "intraventricular"] == 1 and n.loc["subdural", "epidural"] == 0 and (n == n.T).all().all() and n.loc["any", "any"] == 3
    p = eda.prevalence(headers, labels)
    assert np.allclose(p.loc["subdural"], [2/14, 1/3, 1/2]) and p.loc["n"].tolist() == [14, 3, 2] # ID_e0 has no study


def test_persistence(tables):
    labels, headers = tables
    p = eda.persistence(headers, labels)
    assert p.loc["subdural", "slice below positive"] == .5 # ID_a7 is above ID_a6's neighbour, ID_a5 shows nothing
    assert np.isclose(p.loc["subdural", "slice below negative"], 1/8) # 5 + 2 + 3 pairs, two of them with a positive below


def test_tag_tables(tables):
    _, headers = tables
    t = eda.tag_counts(headers, ["bits_stored", "signed", "intercept"])
    assert t.files.tolist() == [11, 3, 1, 1] and t.iloc[1, :3].tolist() == [12, 0, 0]
    assert t.iloc[-1, :3].tolist() in (["", "", ""], [12, 1, 0]) and np.isclose(t.share.sum(), 1, atol=1e-3)
    short = eda.tag_counts(headers, "image", top=3)
    assert short.files.tolist() == [1, 1, 1, 13] and short.image.iloc[-1] == "..."
    assert eda.syntax_names(headers).value_counts().to_dict() == {"Explicit VR Little Endian": 15}
    missing = eda.tag_presence(headers)
    assert missing["files with it"]["thickness"] == 0 and missing["files with it"]["rows"] == 15
    gaps = eda.slice_gaps(headers)
    assert sorted(gaps) == [0] + [5]*9


def test_plots_show_the_counts(tables):
    labels, headers = tables
    widths = sorted(p.get_width() for p in eda.plot_label_counts(labels).patches)
    assert widths == [0, 0, 1, 1, 2, 3]
    assert [p.get_height() for p in eda.plot_labels_each(labels).patches] == [12, 2, 1]
    assert len(eda.plot_prevalence(headers, labels).patches) == 3*6
    heat = eda.plot_cooccurrence(labels).axes
    texts = [t.get_text() for t in heat[0].texts]
    assert len(texts) == 25 and texts[0*5 + 2] == "100%" and texts[1*5] == "-" # epidural -> intraventricular; a label nobody has
    lines = eda.plot_heights(headers, labels, bins=3).lines
    assert len(lines) == 5 and max(lines[4].get_ydata()) > 0
    sizes = eda.plot_sizes(headers)
    assert [p.get_height() for p in sizes.axes[1].patches] == [5] and [p.get_height() for p in sizes.axes[2].patches] == [1, 2] # p1 has a and b, p2 c and t
    for fig in (sizes, eda.plot_geometry(headers)):
        assert all(a.get_title(loc="left") and a.get_xlabel() and a.get_ylabel() for a in fig.axes)
    eda.plot_geometry(headers.assign(spacing_row=np.nan, tilt=np.nan, z=np.nan)) # nothing to count is no crash


def test_read_study(run, tables):
    _, headers = tables
    stack, rows = eda.read_study(run, headers, "c")
    assert rows.image.tolist() == ["ID_c0", "ID_c1", "ID_c2", "ID_c3"] and [s is None for s in stack] == [False, False, True, False]
    assert stack[1].shape == (96, 88) and stack[0][48, 48] == 30
    assert eda.read_study(run, headers, "b")[0][0][0, 0] == -1000 # wrapped values are put right on the way
    with pytest.raises(ValueError, match="no study 'zzz'"): eda.read_study(run, headers, "zzz")


def test_choose_images(run, tables):
    labels, headers = tables
    picks = eda.choose_images(run, headers, labels, n=2)
    assert picks[picks.label == "subdural"].image.tolist() in (["ID_a7"], ["ID_a6"]) and picks[picks.label == "subdural"].alone.all()
    assert picks[picks.label == "epidural"].image.tolist() == ["ID_b1"] and not picks[picks.label == "epidural"].alone.any() # never alone here
    assert "subarachnoid" not in set(picks.label)
    assert eda.dense_share(BLOOD) > 10*eda.dense_share(HEAD) and eda.dense_share(np.full((64, 64), 70, np.int16)) == 0
    normal = eda.healthy_image(headers, labels, .1, skip=7)
    assert normal.image == "ID_c0" and normal.study == "c"
    assert eda.healthy_image(headers[headers.study != "c"], labels, .5) is None


def test_long_tails_end_in_one_bar():
    n = pd.Series(range(1, 31), index=range(1, 31)); _, ax = plt.subplots()
    eda._log_bars(ax, n, ["k"]*30)
    assert [p.get_height() for p in ax.patches] == [*range(1, 12), sum(range(12, 31))] and ax.get_xticklabels()[-1].get_text() == "12+"


def test_found_in():
    assert eda.found_in(["a", "c", None, "a"], ["b", "a", "a", None]).tolist() == [True, False, False, True]
    df = pd.DataFrame(dict(p=["x", "x", "y", None, None], s=["1", "2", "3", "4", "5"]))
    assert eda.in_several(df, "p", "s").tolist() == ["x"] and eda.in_several(df, "s", "p").tolist() == []


def test_pictures_of_a_study(run, tables):
    "From the files and from the stack of notebook 02: the same slices, captions and frames."
    labels, headers = tables
    fig = eda.plot_study(run, headers, labels, "a")
    ax = fig.axes[0]
    assert len(ax.patches) == 2 and "subdural" in ax.get_title(loc="left") and [t.get_text() for t in ax.texts] == list("123456") and len(fig.axes) == 3
    assert [t.get_text() for t in eda.plot_study(run, headers, labels, "a", every=3).axes[0].texts] == ["1", "4"]
    assert len(eda.plot_study(run, headers, labels, "c").axes) == 1 # another size, so no cuts; a file that cannot be read
    stack, rows = eda.read_study(run, headers, "a"); captions, mark = eda.study_marks(rows, labels)
    assert mark.tolist() == [False]*2 + [True]*2 + [False]*2 and captions[2] == "3/6\nsubdural"
    assert eda.study_marks(eda.read_study(run, headers, "c")[1], labels)[0][2] == "3/4\nnot readable"
    index = npy.create_npy(run, n_jobs=1); own = index[(index.study == "a") & (index.position >= 0)].sort_values("position")
    mapped = npy.load_stack(run, "a"); again = eda.study_marks(own, labels)
    assert again[0] == captions and again[1].tolist() == mark.tolist() and len(mapped) == len(stack)
    assert len(explain.montage(mapped, "hist", mark=mark, captions=captions).patches) == 2
    assert explain.make_gif(mapped, mask=mapped > 50)[:3] == b"GIF" and "data:image/png" in explain.viewer_page(mapped, mask=mapped > 50)


def test_galleries(run, tables):
    labels, headers = tables
    fig = eda.plot_gallery(run, headers, labels, n=2)
    titles = [a.get_title() for a in fig.axes]
    assert len(titles) == 15 and titles.count("none in these data") == 2 and sum("healthy" in t for t in titles) == 3
    fig = eda.plot_random(run, headers, labels, n=5, seed=3)
    again = eda.plot_random(run, headers, labels, n=5, seed=3)
    assert [a.get_title() for a in fig.axes] == [a.get_title() for a in again.axes] and {a.get_title() for a in fig.axes if a.get_title()} <= {"no label", "subdural", "epidural, intraventricular"}


def test_pixels_are_sampled(run, tables):
    "Counts are those of the files; wrapped and padded values are seen as they are stored; broken files are named."
    labels, headers = tables
    stats, counts = eda.sample_pixels(run, headers, 100, progress=False)
    assert len(stats) == 14 and set(stats.image) == set(headers.image[headers.error.isna()])
    s = stats.set_index("image")
    assert s.repaired.notna().sum() == 3 and s.family["ID_b0"] == "12 bits unsigned, intercept 0" and s.stored_high["ID_b0"] > 3000 and s.low["ID_b0"] == -1000
    assert s.brain["ID_c0"] == np.isclose(HEAD, 30).mean() and s.brain["ID_a7"] == ((BLOOD > 0) & (BLOOD < 80)).mean()
    wrapped = counts["12 bits unsigned, intercept 0"]
    assert wrapped[0][3096 - explain.LOWEST] == wrapped[1][-1000 - explain.LOWEST] == 3*(HEAD == -1000).sum()
    few = eda.sample_pixels(run, headers, 3, progress=False)[0]
    assert len(few) == 3 and few.image.tolist() == eda.sample_pixels(run, headers, 3, progress=False)[0].image.tolist()
    said = " ".join(eda.describe_pixels(stats))
    assert "3 of 14 sampled files had to be repaired" in said and "0 of 14 sampled files are constant." in said and "padding" not in said
    lines = eda.plot_brain_share(stats, labels).lines
    assert lines[1].get_label() == "slices with a label (n = 3)" and lines[0].get_ydata()[0] == 0 and lines[0].get_ydata()[-1] <= 1
    assert len(eda.plot_pixels(counts).axes) == 2
    empty, none = eda.sample_pixels(run, headers[:0], 5, progress=False)
    assert not len(empty) and len(eda.describe_pixels(empty)) == 4 and eda.plot_pixels(none).axes


def test_padding_is_seen(run, tables, tmp_path):
    px = np.where(RADIUS > 47, -2000, HEAD + 1024).astype("<i2"); (tmp_path/"pad.dcm").write_bytes(dicom_bytes(px, tags("p", "s", 0) | dict(SOPInstanceUID="pad"), False))
    _, h = dicom.read_image(tmp_path/"pad.dcm")
    row = eda._pixel_row(HEAD, eda._stored(tmp_path/"pad.dcm", h), h)
    assert row["stored_low"] == -2000 and row["below_air"] == (RADIUS > 47).mean()
    text = eda.describe_pixels(pd.DataFrame([row]).reindex(columns=eda._PIXELS))[0]
    assert text.startswith("1 of 1 sampled files hold stored values below -1024 HU; the lowest are -2000")


def test_a_million_rows_need_no_files(run, tables, monkeypatch):
    "200,000 headers: every table and plot is drawn without a file being opened, and samples read no more than they were asked for."
    from rsna_helpers import datasheet
    labels, headers = tables; n = 200_000; ok = headers[headers.error.isna()].reset_index(drop=True); rng = np.random.default_rng(0)
    big = ok.loc[np.arange(n) % len(ok)].reset_index(drop=True); big["path"] = ok.path[0]
    big["image"] = [f"ID_{i:09x}" for i in range(n)]; big["study"] = big["series"] = pd.Series(np.arange(n)//36).map("s{}".format); big["patient"] = pd.Series(np.arange(n)//72).map("p{}".format)
    big["z"] = np.arange(n) % 36*5.; big["sop"] = big.image; big["split"] = "train"
    y = pd.DataFrame((rng.random((n, 6)) < .1).astype(np.int8), columns=LABELS, index=pd.Index(big.image, name="image")); y["any"] = y[LABELS[:-1]].max(axis=1)
    reads = []; real = type(run.task).read_image
    monkeypatch.setattr(type(run.task), "read_image", lambda self, path: reads.append(path) or real(self, path))
    t = eda.labelled(big, y)
    assert len(t) == n and t.height.max() == 1 and eda.split_table(big, y).images["train"] == n
    for plot in (eda.plot_label_counts, eda.plot_labels_each, eda.plot_cooccurrence): plot(y)
    for plot in (eda.plot_prevalence, eda.plot_heights): plot(t, y)
    for fig in (eda.plot_sizes(big), eda.plot_geometry(big)):
        assert sum(len(a.patches) for a in fig.axes) < 200 # bins and bars, not a mark a row
    odd = datasheet.oddities(big, y).set_index("oddity")["count"]
    wrong = int((big.bits_stored.eq(12) & big.signed.eq(0) & big.intercept.gt(-100)).sum())
    assert odd["files with unsigned 12-bit pixels and an intercept over -100"] == wrong > 10_000 and odd["images at the z of another of their series"] == 0
    assert not reads
    assert len(eda.sample_pixels(run, big, 20, progress=False)[0]) == len(reads) == 20
    reads.clear(); eda.plot_random(run, t, y, 6); assert len(reads) == 6
    reads.clear(); eda.choose_images(run, t, y, 2); assert len(reads) <= 2*4*5
