"The cspine task: its files, labels, boxes and submissions, and stages 00 to 03 on labels that belong to studies."
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from neck_files import DESCENDING, GAP, LABELS, LOSSLESS, TEST, TRAIN, UID, write_neck

from rsna_helpers import core, datasheet, dicom, eda, evaluation, npy, validation
from rsna_helpers.baselines import baselines
from rsna_helpers.duplicates import find_duplicates
from rsna_helpers.metrics import cspine_log_loss, cspine_rows
from rsna_helpers.tasks import get_task

TASK = get_task("cspine")


@pytest.fixture(scope="module")
def raw(tmp_path_factory): return write_neck(tmp_path_factory.mktemp("neck"))


@pytest.fixture(scope="module")
def run(raw, tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        for k in ("DATA", "MODELS"): m.setenv(f"RSNA_{k}", str(tmp_path_factory.mktemp(k.lower())))
        return core.start("cspine", raw=raw, profile="test", verbose=False)


@pytest.fixture(scope="module")
def tables(run): return eda.prepare_tables(run, progress=False)


# --- files

@pytest.mark.parametrize("mount", ["{slug}", "{slug}/{slug}", "competitions/{slug}", "competitions/{slug}/{slug}"])
def test_mounts_of_kaggle(raw, tmp_path, mount):
    where = tmp_path/mount.format(slug=TASK.slug); where.parent.mkdir(parents=True, exist_ok=True); where.symlink_to(raw)
    assert core.find_raw(TASK, roots=[tmp_path]) == raw.resolve()


def test_what_a_copy_lacks_is_said(raw, tmp_path):
    assert TASK.check_layout(raw) == []
    (tmp_path/"train_images"/"1.2").mkdir(parents=True); (tmp_path/"train.csv").touch()
    assert TASK.check_layout(tmp_path) == ["folder train_images/ holds no <study>/<number>.dcm", "folder test_images/ is missing", "file sample_submission.csv is missing"]
    with pytest.raises(FileNotFoundError, match="test_images/ is missing"): core.start("cspine", raw=tmp_path)


def test_images_are_in_the_order_of_their_numbers(raw, tmp_path):
    t = TASK.list_images(raw, "train")
    assert t.study.drop_duplicates().tolist() == sorted(TRAIN) and (t.study == t.patient).all() and t.image.is_unique
    assert t[t.study == UID + "777"].image.tolist() == [f"{UID}777/{n}" for n in range(4, 16)]              # 9 before 10
    assert t[t.study == GAP].shape[0] == 11 and t.path.map(lambda p: p.endswith(".dcm")).all()
    (tmp_path/"train_images"/"1.9").mkdir(parents=True)
    assert list(TASK.list_images(tmp_path, "train")) == list(t) and len(TASK.list_images(tmp_path, "train")) == 0       # a study without files has no row


def test_masks_and_boxes(raw, tmp_path):
    assert TASK.mask_files(raw).index.tolist() == [UID + "10", UID + "1363"] and len(TASK.mask_files(tmp_path)) == 0
    b = TASK.read_boxes(raw)
    assert len(b) == 5 and b.image[0] == f"{UID}6200/9" and b.width.tolist() == [12.]*3 + [8.]*2 and b.attrs["unknown"] == []
    assert len(TASK.read_boxes(tmp_path)) == 0 and len(get_task("hemorrhage").read_boxes(tmp_path)) == 0
    csv = pd.read_csv(raw/"train_bounding_boxes.csv"); f = tmp_path/"train_bounding_boxes.csv"; (tmp_path/"train.csv").write_bytes((raw/"train.csv").read_bytes())
    pd.concat([csv, csv[:1].assign(StudyInstanceUID="1.2.3")]).to_csv(f, index=False)
    assert TASK.read_boxes(tmp_path).attrs["unknown"] == ["1.2.3"] and len(TASK.read_boxes(f)) == 6
    for spoil, words in ((dict(width=-1), "line 2.*-1"), (dict(height=np.nan), "line 2.*nan"), (dict(slice_number=3.5), "3.5"), (dict(x="left"), "line 2.*left")):
        pd.concat([csv[:1].assign(**spoil), csv[1:]]).to_csv(f, index=False)
        with pytest.raises(ValueError, match=f"(?s)train_bounding_boxes.csv: a box.*{words}"): TASK.read_boxes(tmp_path)
    csv.drop(columns="width").to_csv(f, index=False)
    with pytest.raises(ValueError, match="no column width"): TASK.read_boxes(tmp_path)


# --- labels

def real_table(seed=0) -> pd.DataFrame:
    "2,019 studies with the published counts of positives, and of fractured levels a study."
    levels = dict(zip(LABELS[1:], (146, 285, 73, 108, 162, 277, 393))); several = dict(zip(range(7), (1058, 623, 239, 64, 26, 7, 2)))
    rng = np.random.default_rng(seed); want = np.repeat(list(several), list(several.values()))[::-1]; y = np.zeros((len(want), 7), int); left = np.array(list(levels.values()), float)
    for i, k in enumerate(want[want > 0]):                       # those with most first; what is left decides what is drawn, so that it comes out even
        rest = (want[i:] > 0).sum(); must = left >= rest
        pick = np.r_[np.flatnonzero(must), rng.permutation(np.flatnonzero(~must & (left > 0)))[np.argsort(-rng.gumbel(size=(~must & (left > 0)).sum()) - np.log(left[~must & (left > 0)]))]][:k]
        if k == 1: pick = [left.argmax()] if rest <= left.max() + 1 else [rng.choice(7, p=left/left.sum())]
        y[i, pick] = 1; left[pick] -= 1
    assert not left.any()
    df = pd.DataFrame(y, columns=LABELS[1:]); df.insert(0, "patient_overall", y.max(1)); df.index = pd.Index([f"{UID}{n}" for n in rng.choice(40_000, len(df), replace=False)], name="StudyInstanceUID")
    return df.sample(frac=1, random_state=seed)


def test_a_table_of_the_real_size(tmp_path):
    made = real_table(); made.to_csv(tmp_path/"train.csv")
    y = TASK.read_labels(tmp_path)
    assert y.index.name == "study" and list(y) == LABELS and y.sum().tolist() == [961, 146, 285, 73, 108, 162, 277, 393]
    assert y[LABELS[1:]].sum(axis=1).value_counts().sort_index().tolist() == [1058, 623, 239, 64, 26, 7, 2]
    df = y.assign(patient=y.index); fold = validation.make_folds(df, LABELS, "patient"); report = validation.audit(df, LABELS, "patient", fold)
    even = validation.evenness(df, LABELS, "patient", fold)
    assert report["sound"] and report["unit"] == "studies" and set(fold.value_counts()) <= {403, 404} and (even.reached < even.best_possible + .02).all() and even.reached.max() < .05
    p = pd.DataFrame(np.tile(y.mean(), (len(y), 1)), index=y.index, columns=LABELS)
    assert TASK.score(y, p) == pytest.approx(.5638, abs=5e-4) and TASK.score(y, p*0 + .5) == pytest.approx(np.log(2))
    (tmp_path/"sample_submission.csv").write_text("row_id,fractured\n" + "".join(f"{s}_{l},0.5\n" for s in y.index for l in [*LABELS[1:], LABELS[0]]))
    TASK.write_submission(p, tmp_path/"submission.csv", tmp_path)
    assert len(pd.read_csv(tmp_path/"submission.csv")) == 8*2019
    np.testing.assert_allclose(TASK.check_submission(tmp_path/"submission.csv", tmp_path).loc[y.index, LABELS], p, atol=1e-6)


@pytest.mark.parametrize("spoil, words", [
    (lambda t: t.assign(C3=t.C3 + 2), "0 or 1: .*has C3 = 2"), (lambda t: t.assign(C3=t.C3.astype(object).where(t.index > 0, "yes")), "has C3 = yes"), (lambda t: t.assign(C3=t.C3.where(t.index > 0)), "has C3 = nan"),
    (lambda t: t.assign(patient_overall=1 - t.patient_overall), "`patient_overall` is not the maximum of the others for 8 studys?"), (lambda t: t.drop(columns="C7"), "no column C7"),
    (lambda t: pd.concat([t, t[:1].assign(patient_overall=1, C1=1)]), "repeated with other labels: " + UID + "10"), (lambda t: t.rename(columns=dict(StudyInstanceUID="uid")), "no column StudyInstanceUID"),
    (lambda t: t.assign(StudyInstanceUID=t.StudyInstanceUID.where(t.index != 2)), "no StudyInstanceUID in line 4")])
def test_broken_labels_are_named(raw, tmp_path, spoil, words):
    spoil(pd.read_csv(raw/"train.csv")).to_csv(tmp_path/"train.csv", index=False)
    with pytest.raises(ValueError, match=f"train.csv: .*{words}"): TASK.read_labels(tmp_path)


def test_repeated_studies_are_dropped_and_counted(raw, tmp_path):
    t = pd.read_csv(raw/"train.csv"); pd.concat([t, t[:3]]).to_csv(tmp_path/"train.csv", index=False)
    y = TASK.read_labels(tmp_path); assert len(y) == 8 and y.attrs["repeated"] == 3 and TASK.read_labels(raw).attrs["repeated"] == 0
    assert y.loc[UID + "24606"].tolist() == [1, 0, 1, 1, 0, 0, 0, 1] and y.dtypes.eq(np.int8).all()


# --- score and submission

def test_the_score_by_both_readings():
    rng = np.random.default_rng(0); y = (rng.random((50, 8)) < .2).astype(int); p = rng.random((50, 8)); w = np.array([7] + [1]*7)*(1 + y); ll = -np.log(np.where(y == 1, p, 1 - p))*w
    assert TASK.score(y, p) == pytest.approx((ll.sum(1)/w.sum(1)).mean()) and TASK.score(y, p, norm="global") == pytest.approx(ll.sum()/w.sum())
    np.testing.assert_allclose(TASK.score_rows(y, p), ll.sum(1)/w.sum(1)); assert cspine_rows(y, p).mean() == pytest.approx(cspine_log_loss(y, p))
    with pytest.raises(ValueError, match="norm is 'mean'"): TASK.score(y, p, norm="mean")
    f = pd.DataFrame(p, columns=LABELS).rename_axis("study"); assert TASK.score(pd.DataFrame(y, columns=LABELS), f.sample(frac=1, random_state=1)[LABELS[::-1]]) == pytest.approx(TASK.score(y, p))


def predictions(studies, seed=0): return pd.DataFrame(np.random.default_rng(seed).random((len(studies), 8)), index=pd.Index(studies, name="study"), columns=LABELS)


def test_a_submission_in_the_order_of_the_sample(raw, tmp_path):
    assert TASK.expected_ids(raw).tolist() == TEST[::-1]
    p, f = predictions(TEST), tmp_path/"submission.csv"; TASK.write_submission(p[LABELS[::-1]], f, raw); csv = pd.read_csv(f)
    assert csv.row_id.tolist() == pd.read_csv(raw/"sample_submission.csv").row_id.tolist() and list(csv) == ["row_id", "fractured"]
    assert csv.set_index("row_id").fractured[f"{TEST[0]}_patient_overall"] == pytest.approx(p.patient_overall[TEST[0]], abs=1e-6)
    np.testing.assert_allclose(TASK.check_submission(f, raw).loc[TEST, LABELS], p, atol=1e-6)
    TASK.write_submission(p, f); assert pd.read_csv(f).row_id[1] == f"{TEST[0]}_C1" and len(TASK.check_submission(f, TEST)) == 2        # no sample: all labels of the studies named


def test_the_public_stub_asks_for_three_rows(tmp_path):
    raw = write_neck(tmp_path/"raw", stub=True); ids = TASK.expected_ids(raw); f = tmp_path/"s.csv"
    assert ids.tolist() == [UID + n for n in ("10197", "10454", "10690")] and not set(ids) & set(TASK.list_images(raw, "test").study)
    p = predictions(ids); TASK.write_submission(p, f, raw); csv = pd.read_csv(f)
    assert csv.row_id.tolist() == [f"{UID}10197_C1", f"{UID}10454_patient_overall", f"{UID}10690_C7"]
    np.testing.assert_allclose(csv.fractured, [p.C1.iloc[0], p.patient_overall.iloc[1], p.C7.iloc[2]], atol=1e-6)
    back = TASK.check_submission(f, raw); assert back.notna().sum().sum() == 3 and back.loc[UID + "10690", "C7"] == pytest.approx(p.C7.iloc[2], abs=1e-6)


@pytest.mark.parametrize("spoil, words", [
    (lambda c: c[1:], "1 ids are missing"), (lambda c: pd.concat([c, c[:2]]), "2 ids stand twice"), (lambda c: c.assign(fractured=c.fractured + 2), "outside 0..1"), (lambda c: c.assign(fractured=c.fractured.where(c.index != 3)), "1 values are not numbers"),
    (lambda c: pd.concat([c, c[:1].assign(row_id="1.2_C1")]), "not asked for: 1.2_C1"), (lambda c: c.rename(columns=dict(fractured="p")), "no column fractured")])
def test_a_bad_submission_is_refused(raw, tmp_path, spoil, words):
    f = tmp_path/"s.csv"; TASK.write_submission(predictions(TEST), f, raw); spoil(pd.read_csv(f)).to_csv(f, index=False)
    with pytest.raises(ValueError, match=words): TASK.check_submission(f, raw)


def test_bad_predictions_and_samples_are_refused(raw, tmp_path):
    f, p = tmp_path/"s.csv", predictions(TEST)
    for bad, words in ((p[1:], "1 ids are missing"), (predictions([*TEST, "1.2"]), "not asked for: 1.2"), (pd.concat([p[:1]*np.nan, p[1:]]), "8 values are not numbers"), (p*3, "outside 0..1")):
        with pytest.raises(ValueError, match=words): TASK.write_submission(bad, f, raw)
    assert not f.exists()
    (tmp_path/"sample.csv").write_text("row_id,fractured\n1.2_C8,0.5\n")
    with pytest.raises(ValueError, match="sample.csv: no label of this task in 1.2_C8"): TASK.expected_ids(tmp_path/"sample.csv")


# --- stages

def test_tables(run, tables):
    labels, headers = tables
    assert labels.index.name == "study" and len(headers) == 119 and headers.error.isna().all() and headers.warnings.isna().all()        # no Modality, and nothing odd about it
    assert headers.modality.isna().all() and (headers.study == headers.patient).all() and (headers.study_tag == headers.study).all() and headers.patient.nunique() == 10
    t = eda.labelled(headers, labels); assert len(t) == 95 and t[t.study == DESCENDING].image.tolist() == [f"{DESCENDING}/{n}" for n in range(106, 94, -1)]
    pd.testing.assert_frame_equal(eda.prepare_tables(run, progress=False)[1], headers)


def test_stacks_ascend_with_z_whatever_the_numbers_do(run):
    index = npy.create_npy(run, n_jobs=1, progress=False)
    assert (index.position >= 0).all() and index.brain_cm2.isna().all() and not index.notes.str.contains("brain").any()
    for study, rows in index.groupby("study"): assert rows.sort_values("position").z.is_monotonic_increasing and npy.load_stack(run, study).shape == (len(rows), 64, 64)
    down = index[index.study == DESCENDING].sort_values("position"); assert down.image.tolist()[0] == f"{DESCENDING}/106"
    gap = index[index.study == GAP]; assert gap.notes.str.contains("missing slices").sum() == 1 and gap.gap.max() == pytest.approx(1.6)
    assert index[index.study == UID + "777"].sort_values("position").image.str.rpartition("/")[2].astype(int).tolist() == list(range(4, 16))
    assert core.load_json(run.data/"npy.json")["facts"]["crop"] == "body" and index.mm_row.between(.38, .43).all()                        # 52 of 64 pixels are neck


def test_a_body_that_fills_the_picture_is_not_cut():
    "Not shrunk by a margin either: the stack holds the pixels of the file."
    hu = np.random.default_rng(0).normal(40, 100, (3, 64, 64)).astype(np.int16)
    rows = pd.DataFrame(dict(image=list("abc"), path=["0", "1", "2"], study="s", series="x", z=[0., 1., 2.], instance=1, error=None, spacing_row=.5, spacing_col=.5))
    stack, index = npy.stack_study(rows, lambda p: (hu[int(p)], {}), size=64, crop="body")
    np.testing.assert_array_equal(stack, hu); assert index[0]["crop_side"] == 64 and index[0]["mm_row"] == .5


def test_jpeg_lossless_is_read_to_the_bit(run, tables):
    _, headers = tables; own = headers[headers.study == LOSSLESS]
    assert (own.transfer_syntax == "1.2.840.10008.1.2.4.70").all()
    from neck_files import slice_hu
    rng = np.random.default_rng(list(TRAIN).index(LOSSLESS))
    for k, path in enumerate(own.sort_values("z").path):
        hu, h = run.task.read_image(run.raw/path); np.testing.assert_array_equal(hu, slice_hu(rng, k).clip(-1024)); assert h["repaired"] is None and not h["warnings"]


def test_folds_are_of_studies(run):
    folds = validation.create_folds(run); note = core.load_json(run.data/"folds.json")["result"]
    assert folds.index.name == "study" and sorted(folds.index) == sorted(TRAIN) and list(folds) == ["patient", "group", "fold"] and set(folds.fold) == set(range(5))
    assert note["audit"]["sound"] and note["audit"]["unit"] == "studies" and note["images"] == 95 and note["patients"] == 8 and note["audit"]["images"]["identical"] == 0
    pd.testing.assert_frame_equal(validation.create_folds(run), folds); plt.close(validation.plot_audit(note["audit"]))
    with pytest.raises(validation.LeakageError): validation._gate(pd.concat([folds, folds[:1].assign(fold=(folds.fold.iloc[0] + 1) % 5)]))


def test_a_study_sent_twice_is_found_and_kept_together(raw, tmp_path, monkeypatch):
    "Ten studies, one of them a copy under another name and of other file numbers."
    import shutil
    two = tmp_path/"raw"; shutil.copytree(raw, two); old, new = UID + "777", UID + "88"; (two/"train_images"/new).mkdir()
    for f in (two/"train_images"/old).iterdir(): shutil.copy(f, two/"train_images"/new/f"{int(f.stem) + 40}.dcm")
    t = pd.read_csv(two/"train.csv"); pd.concat([t, t[t.StudyInstanceUID == old].assign(StudyInstanceUID=new)]).to_csv(two/"train.csv", index=False)
    for k in ("DATA", "MODELS"): monkeypatch.setenv(f"RSNA_{k}", str(tmp_path/k))
    run = core.start("cspine", raw=two, profile="test", verbose=False); folds = validation.create_folds(run); pairs, counts = find_duplicates(run)
    assert counts["identical"] == 12 and {*pairs.group_a, *pairs.group_b} == {old, new} and folds.group[old] == folds.group[new] == old and folds.fold[old] == folds.fold[new]
    own = folds.drop(columns="fold").join(eda.prepare_tables(run)[0]); apart = folds.fold.where(folds.index != new, (folds.fold[old] + 1) % 5); of = npy.load_index(run).set_index("image").study
    report = validation.audit(own, LABELS, "patient", apart, [], (pairs, counts), row_of=of); assert not report["sound"] and report["images"]["identical_in_two_folds"] == 12
    _, headers = eda.prepare_tables(run); odd = datasheet.oddities(headers).set_index("oddity")["count"]
    assert odd["files that name another study than the one they lie in"] == 12


def test_a_study_of_both_splits_keeps_its_name_in_training(raw, tmp_path):
    h = dicom.header_table(sorted(str(p) for p in (raw/"train_images"/(UID + "10")).iterdir()), progress=False); h = pd.concat([h.assign(split="train"), h.assign(split="test", image=h.image + "t")], ignore_index=True)
    index = npy.convert(h, tmp_path/"npy", TASK.read_image, size=16, crop="body", n_jobs=1, progress=False)
    assert index.groupby("split").study.first().to_dict() == {"train": UID + "10", "test": UID + "10-test"} and len(npy.load_stack(tmp_path/"npy", UID + "10")) == 12


def test_baselines_of_studies(run, tables):
    labels, headers = tables; npy.create_npy(run, n_jobs=1, progress=False); b = baselines(run, labels[:6], labels[6:], headers)
    assert list(b) == ["constant (training prevalence)", "header fields", "length of the scan", "blurred thumbnails"]
    for p in b.values(): assert p.index.equals(labels.index[6:]) and list(p) == LABELS and p.to_numpy().min() >= 0 and p.to_numpy().max() <= 1


# --- looking at it

def test_plots_of_labels_of_studies(run, tables):
    labels, headers = tables; boxes = run.task.read_boxes(run.raw)
    assert eda.overall_label(labels) == "patient_overall" and list(eda.prevalence(headers, labels)) == ["study"] and eda.prevalence(headers, labels).study["C2"] == 2/8
    bars = eda.plot_label_counts(labels, sort=False); assert [t.get_text() for t in bars.get_yticklabels()][::-1] == LABELS and bars.patches[-1].get_width() == 5
    each = eda.plot_labels_each(labels); assert [p.get_height() for p in each.patches] == [3, 3, 1, 1] and "subtypes" not in each.get_title(loc="left")
    assert eda.plot_sizes(headers).axes[2].get_title(loc="left") == "A study a patient"
    for f in (eda.plot_heights, eda.persistence):
        with pytest.raises(ValueError, match="which of the images show them is not known"): f(headers, labels)
    with pytest.raises(ValueError, match="not known"): eda.choose_images(run, headers, labels)
    heights = eda.plot_heights(headers, labels, bins=4, boxes=boxes); np.testing.assert_allclose(heights.lines[0].get_ydata(), np.array([0, 1, 4, 0])/6) # of 2 x 3 slices a quarter
    assert eda.persistence(headers, labels, boxes).loc["box", "all slices"] == pytest.approx(5/24)
    t = eda.box_table(headers, boxes); assert t.boxes.to_dict() == {UID + "6200": 3, UID + "99": 2} and t["width (mm)"][UID + "6200"] == 6 and t.share[UID + "99"] == 2/12
    assert len(eda.plot_boxes(headers, boxes).axes) == 3
    stack, rows = eda.read_study(run, headers, UID + "99"); captions, mark = eda.study_marks(rows, labels, boxes)
    assert rows.image[mark].tolist() == [f"{UID}99/99", f"{UID}99/98"] and not eda.study_marks(rows, labels)[1].any()
    title = eda.plot_study(run, headers, labels, UID + "99", boxes=boxes).axes[0].get_title(loc="left"); assert "framed: box; the study: C2" in title and "bone window" in title
    assert len(eda.plot_random(run, headers, labels, n=3).axes) >= 3; plt.close("all")


def test_data_sheet(run, tables):
    labels, headers = tables; boxes = run.task.read_boxes(run.raw); odd = datasheet.oddities(headers, labels, boxes).set_index("oddity")["count"]
    assert odd["files neither in Explicit nor in Implicit VR Little Endian"] == 12 and odd["studies with uneven steps between slices"] == 1 and odd["files with several windows that differ"] == 119
    assert odd[["studies with boxes but without labels", "rows of the box file that name an image that is not there", "studies with boxes that are labelled healthy", "files that name another study than the one they lie in"]].sum() == 0
    wrong = pd.concat([boxes, boxes[:1].assign(study=UID + "10", image=f"{UID}10/77")]); wrong.attrs["unknown"] = ["1.2"]; odd = datasheet.oddities(headers, labels, wrong).set_index("oddity")["count"]
    assert odd[["studies with boxes but without labels", "rows of the box file that name an image that is not there", "studies with boxes that are labelled healthy"]].tolist() == [1, 1, 1]
    assert "C7" in datasheet.summary_page(run, n_examples=3).read_text(encoding="utf-8"); plt.close("all")


def test_the_report_shows_the_label_that_sums_up():
    y = pd.DataFrame((np.random.default_rng(0).random((40, 8)) < .4).astype(int), columns=LABELS); figures = evaluation.report_figures(y, y*.6 + .2, np.arange(40), n_boot=10, main=TASK.main)
    assert list(figures)[:2] == ["Decisions: patient_overall", "patient_overall"] and len(figures) == 9; plt.close("all")


# --- real files

def test_real_files_go_through_the_reader_of_the_task(samples):
    lossless = next((samples/"transfer_syntaxes").glob("*_1.2.840.10008.1.2.4.70.dcm")); plain = next((samples/"transfer_syntaxes").glob("*LittleEndianExplicit*")); hu, h = TASK.read_image(lossless)
    np.testing.assert_array_equal(hu, TASK.read_image(plain)[0]); assert h["TransferSyntaxUID"].endswith("4.70") and hu.min() >= -1024
    files = sorted((samples/"ge_head").glob("*.dcm")); headers = dicom.header_table(files, progress=False); stack, index = npy.stack_study(headers, TASK.read_image, size=128, crop="body")
    assert stack.shape == (28, 128, 128) and all(np.isnan(r["brain_cm2"]) for r in index) and np.isfinite([r["mm_row"] for r in index]).all()
    held = [npy.BOXES["body"](TASK.read_image(f)[0]) for f in files]; assert all(b is not None and b[1] - b[0] > 100 for b in held)
