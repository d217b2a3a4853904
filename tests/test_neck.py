"The neck phantom: anatomy with the right densities, masks that fit it, fractures that are seen, and no label that can be guessed without looking."
import numpy as np
import nibabel
import pandas as pd
import pydicom
import pytest
from scipy import ndimage as ndi

from rsna_helpers import phantom_neck
from rsna_helpers.dicom import header_table, read_image
from rsna_helpers.fractures import KINDS
from rsna_helpers.metrics import rank_auc
from rsna_helpers.neck import SEEN, make_neck
from rsna_helpers.phantom import write_phantom
from rsna_helpers.phantom_neck import BROKEN, BROKEN_LEVELS, PARTS, deal_levels, draw_study, mask_nifti, plan_cspine

BROKEN_NECK = dict(C1="posterior_arch", C2="dens", C4="body", C5="compression", C7="spinous")


@pytest.fixture(scope="module")
def necks(): return make_neck(11, BROKEN_NECK), make_neck(11)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    out = tmp_path_factory.mktemp("cspine")/"raw"
    return out, write_phantom("cspine", out, n_train=8, n_test=4, seed=1, progress=False)


def test_same_seed_same_study_and_a_fracture_changes_nothing_else(necks):
    broken, whole = necks
    again = make_neck(11, BROKEN_NECK)
    assert np.array_equal(again.hu, broken.hu) and np.array_equal(again.fracture, broken.fracture)
    assert broken.hu.shape == whole.hu.shape and np.array_equal(broken.positions, whole.positions) and broken.spacing == whole.spacing
    change = (broken.hu != whole.hu); levels = np.isin(np.maximum(broken.mask, whole.mask), [1, 2, 4, 5, 7])
    near = ndi.binary_dilation(levels, np.ones((3, 3, 3)), iterations=5)
    assert change.any() and not change[~near].any(), "a fracture reaches beyond its vertebra"
    assert whole.fracture.max() == 0 and whole.boxes == [] and whole.areas.sum() == 0


def test_densities(necks):
    hu, mask = necks[1].hu.astype(float), necks[1].mask
    bone = mask > 0; inner = ndi.binary_erosion(bone, np.ones((1, 3, 3)), iterations=2)
    assert 150 < np.median(hu[inner]) < 600 and 700 < np.percentile(hu[bone], 95) < 1700
    soft = ~ndi.binary_dilation((hu > 250) | (hu < -400), np.ones((3, 3, 3)), iterations=2); smooth = ndi.uniform_filter(hu, 5)[soft]
    assert -60 < np.median(smooth) < 60 and -130 < np.percentile(smooth, 10) < -70 and 30 < np.percentile(smooth, 90) < 90, "fat and muscle"
    assert np.median(hu[hu < -600]) < -900


def test_masks_are_levels_from_the_skull_down(necks):
    st = necks[0]
    assert set(np.unique(st.mask)) == set(range(10))
    z = [np.nonzero(st.mask == k)[0].mean() for k in range(1, 10)]
    assert (np.diff(z) < 0).all(), "C1 lies highest, slices ascend"
    volumes = [(st.mask == k).sum()*np.prod(st.spacing)/1000 for k in range(1, 8)]
    assert all(2 < v < 35 for v in volumes), volumes
    one, two = (np.argwhere(st.mask == k)[:, 1:] for k in (1, 2))
    y, x = one.mean(0).astype(int); ring = (st.mask == 1).any(0)
    assert ndi.binary_fill_holes(ring).sum() - ring.sum() > 150, "C1 is a ring"
    assert np.nonzero(st.mask == 2)[0].max() > np.nonzero(st.mask == 1)[0].min() + 2, "the dens stands inside C1"
    for k in (3, 4, 5, 6):                                                          # body and arch enclose a canal
        near = (st.mask == k).any(0); assert ndi.binary_fill_holes(near).sum() - near.sum() > 100
        assert np.median(st.hu[st.mask == k]) > 200


@pytest.mark.parametrize("level", ["C1", "C2", "C5", "C7"])
def test_every_kind_of_fracture_is_seen(level):
    for i, kind in enumerate(KINDS[level]):
        st = make_neck([7, i], {level: kind}, size=80, thick=2.5); k = PARTS.index(level)
        assert st.kinds == {level: [kind]} and st.areas[:, k].sum() >= SEEN*.7 and (np.delete(st.areas, k, 1) == 0).all(), kind
        other = make_neck([7, i], (), size=80, thick=2.5); change = np.abs(other.hu.astype(int) - st.hu)[st.fracture > 0]
        assert change.mean() > 100, (kind, "the picture changes where the fracture is marked")


def test_boxes_enclose_what_is_seen(necks):
    st = necks[0]
    assert {b["level"] for b in st.boxes} == {1, 2, 4, 5, 7}
    for b in st.boxes:
        y, x = np.nonzero(st.fracture[b["slice"]] == b["level"])
        assert b["x"] <= x.min() and x.max() < b["x"] + b["width"] and b["y"] <= y.min() and y.max() < b["y"] + b["height"]
        assert b["x"] >= 0 and b["y"] >= 0 and b["x"] + b["width"] <= 160 and b["y"] + b["height"] <= 160


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="T1"): make_neck(0, ("T1",))
    with pytest.raises(ValueError, match="size=32"): make_neck(0, size=32)
    with pytest.raises(ValueError, match="knee"): make_neck(0, dict(C4="knee"), size=64, thick=8)
    with pytest.raises(FileExistsError): write_phantom("cspine", "/")


@pytest.mark.parametrize("n", [10, 160, 2019])
def test_levels_have_the_published_shares(n):
    for seed in range(3):
        dealt = deal_levels(np.random.default_rng(seed), n); many = np.bincount([len(d) for d in dealt], minlength=7)
        assert np.abs(many - np.array(BROKEN_LEVELS)*n/2019).max() <= 1.01 and all(len(set(d)) == len(d) for d in dealt)
        levels = np.array([sum(p in d for d in dealt) for p in PARTS])
        assert np.abs(levels - np.array(list(BROKEN.values()))*(many @ np.arange(7))/1444).max() <= (2 if n > 100 else 3)


def test_plan_does_not_tell_the_label():
    plan = plan_cspine(4000, 10, seed=3).query("split == 'train'"); y = (plan.levels != "").astype(int)
    for fact in ("ascending", "first", "syntax", "family", "windows", "mask", "quirk", "px"):
        assert abs(rank_auc(y, pd.factorize(plan[fact], sort=True)[0]) - .5) < .03, fact
    assert (plan.boxed & (y == 0)).sum() == 0 and abs(plan.boxed.mean() - 235/2019) < .02


def test_geometry_does_not_tell_the_label():
    "The field of view, the slices and the scanner come from streams that never see the fracture."
    for seed in range(3):
        a, b = make_neck(seed, ("C3", "C6"), size=64, thick=5.), make_neck(seed, (), size=64, thick=5.)
        assert a.hu.shape == b.hu.shape and a.spacing == b.spacing and np.array_equal(a.positions, b.positions) and a.notes == b.notes


def test_layout(raw):
    out, truth = raw
    assert sorted(p.name for p in out.iterdir()) == ["PHANTOM", "sample_submission.csv", "segmentations", "test.csv", "test_images", "train.csv", "train_bounding_boxes.csv", "train_images"]
    train, test, sample, boxes = (pd.read_csv(out/f"{n}.csv") for n in ("train", "test", "sample_submission", "train_bounding_boxes"))
    assert list(train) == ["StudyInstanceUID", "patient_overall", *PARTS] and (train.patient_overall == train[list(PARTS)].max(axis=1)).all()
    assert list(test) == ["row_id", "StudyInstanceUID", "prediction_type"] and len(test) == 32 and (test.row_id == test.StudyInstanceUID + "_" + test.prediction_type).all()
    assert list(sample) == ["row_id", "fractured"] and (sample.row_id == test.row_id).all()
    assert list(boxes) == ["StudyInstanceUID", "x", "y", "width", "height", "slice_number"] and len(boxes)
    assert {p.name for p in (out/"train_images").iterdir()} == set(train.StudyInstanceUID)
    for b in boxes.itertuples(): assert (out/"train_images"/b.StudyInstanceUID/f"{b.slice_number}.dcm").is_file()
    quirk = truth.drop_duplicates("study").set_index("quirk").study
    assert not (out/"test_images"/quirk["missing"]).exists() and list((out/"test_images"/quirk["no files"]).iterdir()) == []
    assert truth.image.is_unique and set(test.StudyInstanceUID) <= set(truth.study)
    seen = truth[truth.box_x.notna()]; assert (seen[[f"{p}_mm2" for p in PARTS]].max(axis=1) > 0).all() and seen.patient_overall.all()


def test_headers(raw):
    out, truth = raw; truth = truth.set_index("image")
    files = sorted((out).rglob("*.dcm")); h = header_table(files, progress=False); h["name"] = h.study + "/" + h.image
    assert h.modality.isna().all() and h.error.notna().sum() == 1 and h.n_windows.between(1, 2).all()
    assert "1.2.840.10008.1.2.4.70" in set(h.transfer_syntax) and (h.image == h.instance.astype(str)).all()
    one = pydicom.dcmread(files[0], stop_before_pixels=True); assert "Modality" not in one and one.SeriesInstanceUID.startswith(one.StudyInstanceUID)
    rising, gaps, starts = set(), 0, set()
    for study, g in h.groupby("study"):
        g = g.sort_values("instance"); step = np.diff(g.z); rising.add(bool(step[0] > 0)); starts.add(int(g.instance.iloc[0])); gaps += (np.abs(step).max() > 1.5*np.abs(step).min())
        assert (np.sign(step) == np.sign(step[0])).all() and list(g.image) != sorted(g.image)
        by_z = g.sort_values("z"); assert (truth.loc[by_z.name, "slice"].to_numpy() == np.arange(len(by_z))).all()
    assert rising == {True, False} and gaps == 1 and len(starts) > 1


def test_pixels_come_back_bit_for_bit(raw):
    out, truth = raw; done = set()
    for study, rows in truth[~truth.quirk.isin(["missing", "no files", "unreadable slice"])].groupby("study"):
        st = draw_study(rows.iloc[0])
        for r in (rows.iloc[0], rows.iloc[len(rows)//2]):
            hu, header = read_image(out/f"{r.split}_images"/f"{r.image}.dcm"); y, x = np.ogrid[:160, :160]; ring = np.hypot(y - 79.5, x - 79.5) < 79
            assert np.array_equal(hu[ring], st.hu[r.slice][ring]); done.add(str(header["TransferSyntaxUID"]))
    assert "1.2.840.10008.1.2.4.70" in done and len(done) > 1


def test_masks_lie_where_the_images_do(raw):
    out, truth = raw; counts = dict(kept=0, reversed=0)
    for study, rows in truth[truth["mask"] != ""].groupby("study"):
        path = out/"segmentations"/f"{study}.nii"
        if rows["mask"].iloc[0] == "empty file": assert path.stat().st_size == 0; continue
        image = nibabel.load(path); arr = np.asarray(image.dataobj); counts[rows["mask"].iloc[0]] += 1
        assert arr.dtype == np.uint8 and nibabel.aff2axcodes(image.affine) == ("L", "A", "S")
        st = draw_study(rows.iloc[0]); flip = rows["mask"].iloc[0] == "reversed"
        order = arr[:, ::-1, ::-1].transpose(2, 1, 0)                                # as everybody reads them: z falls
        assert np.array_equal(order[::-1] if not flip else order, st.mask)
        world = image.affine @ [*[n//2 for n in arr.shape], 1]; k = arr.shape[2]//2
        assert np.allclose(world[2], st.positions[k][2]) and np.allclose(-world[0], st.positions[k][0] + st.spacing[1]*(arr.shape[0]//2))
    assert counts["kept"] >= 4 and counts["reversed"] >= 1


def test_stub_has_other_studies(tmp_path):
    write_phantom("cspine", tmp_path/"raw", n_train=1, n_test=1, n_jobs=1, progress=False, stub=True)
    test = pd.read_csv(tmp_path/"raw"/"test.csv"); assert len(test) == 3 and set(test.prediction_type) <= {*PARTS, "patient_overall"}
    assert not set(test.StudyInstanceUID) & {p.name for p in (tmp_path/"raw"/"test_images").iterdir()}
    assert list(pd.read_csv(tmp_path/"raw"/"sample_submission.csv").row_id) == list(test.row_id)


def test_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(phantom_neck, "_rows", lambda *a: 1/0)
    with pytest.raises(ZeroDivisionError): phantom_neck.write_cspine(tmp_path/"raw", n_train=1, n_test=1, n_jobs=1, progress=False)
    assert not (tmp_path/"raw").exists()


def test_thumbnails_do_not_tell_the_label():
    "Shrunk to what a thumbnail shows, broken and whole patients differ less than two patients do."
    a, b, c = make_neck(2, ("C2", "C6")), make_neck(2), make_neck(3)
    small = lambda st: np.stack([ndi.zoom(ndi.uniform_filter(s.astype(float), 10), 16/160, order=0) for s in st.hu[::5][:12]])
    assert np.abs(small(a) - small(b)).mean() < .05*np.abs(small(b) - small(c)).mean()
