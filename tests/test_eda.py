"""Tables and plots of notebook 01 on a handful of small files whose every oddity is known."""
import base64, io, os, re

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rsna_helpers import core, dicom, eda
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
    for plot in (eda.plot_prevalence, eda.plot_heights): assert plot(headers, labels).get_title(loc="left")
    odd = eda.oddities(headers, labels).set_index("oddity")
    assert odd["count"]["studies without labels"] == 2 and odd.example["studies without labels"] == "c"


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


def test_oddities(tables):
    labels, headers = tables
    odd = eda.oddities(headers, labels).set_index("oddity")
    expected = {"files that cannot be read, by their header or size": 2, "unsigned 12-bit pixels and intercept over -100": 3, "signed 12-bit pixels": 1,
        "rows differ from columns": 1, "size other than 96 x 96": 1, "several windows in the header": 4, "several windows that differ": 3, "gantry tilted by more than 1 degree": 1,
        "two slices at one z": 2, "studies with slices of several sizes": 1, "patients in several splits": 1, "label rows repeated": 6, "images without labels": 1,
        "labels without images": 1, "labels that are never true": 2}
    assert odd["count"][odd["count"] > 0].to_dict() == expected
    assert odd.example["images without labels"] == "ID_d0" and odd.example["labels without images"] == "ID_gone" and odd.example["patients in several splits"] == "p2"
    assert odd.example["two slices at one z"] in ("ID_b1", "ID_b2") and odd.what_then.str.len().min() > 0


def test_oddities_of_pictures():
    "PNG files have no tags; that is not an oddity of each of them."
    headers = pd.DataFrame([dict.fromkeys(dicom.COLUMNS) | dict(image=f"i{k}", study="s", patient="p", split="train", format="png", rows=8, columns=8)  for k in range(3)])
    numbers = ["n_windows", "intercept", "slope", "bits_stored", "signed", "tilt", "z", "spacing_row", "spacing_col", "file_bytes"]
    headers[numbers] = headers[numbers].astype(float)
    labels = pd.DataFrame(dict(abnormal=[1]), index=pd.Index(["s"], name="study"))
    odd = eda.oddities(headers, labels)
    assert odd["count"].sum() == 0, odd[odd["count"] > 0]


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
    for fig in (eda.plot_sizes(headers), eda.plot_geometry(headers)):
        assert all(a.get_title(loc="left") and a.get_xlabel() and a.get_ylabel() for a in fig.axes)
    eda.plot_geometry(headers.assign(spacing_row=np.nan, tilt=np.nan, z=np.nan)) # nothing to count is no crash


def test_read_study(run, tables):
    _, headers = tables
    stack, rows = eda.read_study(run, headers, "c")
    assert rows.image.tolist() == ["ID_c0", "ID_c1", "ID_c2", "ID_c3"] and [s is None for s in stack] == [False, False, True, False]
    assert stack[1].shape == (96, 88) and stack[0][48, 48] == 30
    assert eda.read_study(run, headers, "b")[0][0][0, 0] == -1000 # wrapped values are put right on the way
    with pytest.raises(ValueError, match="no study 'zzz'"): eda.read_study(run, headers, "zzz")


def test_thumbnail_keeps_proportions():
    t = eda.thumbnail(np.full((100, 50), 200, np.int16), "brain", 64)
    assert t.shape == (64, 64) and (t[:, 16:48] == 255).all() and (t[:, :16] == 0).all() and (t[:, 48:] == 0).all()
    assert eda.thumbnail(None, "brain", 32).any()
    assert eda.thumbnail(np.full((8, 8), 40, np.int16), (40, 81), 8)[0, 0] in (127, 128, 129)
    with pytest.raises(ValueError, match="no window 'brian'.*brain, subdural"): eda.thumbnail(HEAD, "brian")
    t, b, l, r = eda._box(HEAD); assert abs(t - 9) <= 2 and abs(b - 88) <= 2 and abs(l - 9) <= 2 and abs(r - 88) <= 2
    assert eda._box(np.full((40, 30), -1000, np.int16)) == (0, 40, 0, 30)


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


def test_pictures(run, tables):
    labels, headers = tables
    ax = eda.plot_stack(run, headers, labels, "a")
    assert len(ax.patches) == 2 and "subdural" in ax.get_title(loc="left") and [t.get_text() for t in ax.texts] == list("123456")
    assert [t.get_text() for t in eda.plot_stack(run, headers, labels, "a", every=3).texts] == ["1", "4"]
    eda.plot_stack(run, headers, labels, "c") # holds a file that cannot be read, and another size
    fig = eda.plot_gallery(run, headers, labels, n=2)
    assert len(fig.axes) == 15 and sum("none in" in t.get_text() for a in fig.axes for t in a.texts) == 2
    assert len(eda.plot_windows(BLOOD, ("brain", "bone")).axes) == 4


def test_gif(run, tables, tmp_path):
    _, headers = tables
    stack, _ = eda.read_study(run, headers, "c")
    eda.save_gif(stack, tmp_path/"c.gif", "brain", px=96, mark=[False, True, False, False])
    assert not list(tmp_path.glob(".*part"))
    with Image.open(tmp_path/"c.gif") as im:
        assert im.format == "GIF" and im.size == (96, 96) and im.n_frames == 4
        edge = []
        for k in range(4): im.seek(k); edge.append(im.convert("RGB").getpixel((95, 95)))
    assert edge[1][0] > 200 > edge[1][2] and len({*edge[0]}) == 1 # the frame is red on the marked image only, the rest is grey
    noisy = [np.random.default_rng(k).integers(0, 80, (256, 256)).astype(np.int16) for k in range(20)]
    html = eda.animate(noisy, "brain", max_kb=100).data
    gif = base64.b64decode(re.search('base64,([^"]+)', html)[1])
    assert len(html) < 105*1024 and Image.open(io.BytesIO(gif)).n_frames == 20
