"Thresholds that are honest, plots that stand on odd input, and a report that needs its data and folds."
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from sklearn import metrics as sk

from rsna_helpers import evaluation as e
from rsna_helpers.metrics import class_report
from rsna_helpers.validation import LeakageError

LABELS = ["rare", "any"]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def table(patients=60, rows=20, seed=0):
    "Labelled rows with patient, fold, place, and predictions."
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), rows)
    y = (rng.random((len(patient), 2)) < [.03, .3]).astype(int)
    p = np.clip(.35 * y + .25 * rng.random((patients, 1))[patient] + .4 * rng.random(y.shape), 0, 1)
    index = pd.Index([f"ID_{i:04d}" for i in range(len(y))], name="image")
    df = pd.DataFrame(y, index, LABELS).assign(patient=[f"P{k}" for k in patient], fold=patient % 4, place=np.tile(np.linspace(0, 1, rows), patients))
    return df, pd.DataFrame(p, index, LABELS)


# --- thresholds ---------------------------------------------------------------------------------------------------

@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.sampled_from(["youden", "f1", "sensitivity"]), st.sampled_from([.3, .8, 1.]))
@settings(max_examples=150, deadline=None)
def test_no_threshold_is_better(seed, n, rule, wanted):
    rng = np.random.default_rng(seed)
    y, p = rng.integers(0, 2, n), (rng.integers(0, 11, n) / 10)
    t = e._threshold(y, p, rule, wanted)
    if y.min() == y.max(): assert np.isnan(t); return
    def value(cut):
        d = p > cut; tp, fp = (d & (y == 1)).sum(), (d & (y == 0)).sum()
        return tp / y.sum() - fp / (n - y.sum()) if rule == "youden" else 2 * tp / (tp + fp + y.sum()) if rule == "f1" else tp / y.sum()
    cuts = np.r_[0, np.unique(p)]
    assert 0 <= t <= 1
    if rule != "sensitivity": assert value(t) == pytest.approx(max(max(map(value, cuts[p.max() > cuts]), default=0), value(t)))
    elif value(0) >= wanted:      # else even the lowest threshold misses: a positive scored 0
        assert value(t) >= wanted - 1e-9 and all(value(cut) < wanted for cut in cuts if cut >= t and (p > cut).sum() < (p > t).sum())


def test_figures_beside_a_threshold_are_cross_fitted():
    df, p = table()
    got = e.choose_thresholds(df[LABELS], p, df.fold, df.patient, "f1").loc["any"]
    d = np.zeros(len(df), bool)
    for k in range(4):
        fit, held = df.fold != k, df.fold == k
        d[held] = p["any"][held] > e._threshold(df["any"][fit].to_numpy(), p["any"][fit].to_numpy(), "f1", None)
    assert got.f1 == pytest.approx(sk.f1_score(df["any"], d)) and got.sensitivity == pytest.approx(sk.recall_score(df["any"], d))
    assert got.lowest <= got.highest and got.threshold == e._threshold(df["any"].to_numpy(), p["any"].to_numpy(), "f1", None)


def test_thresholds_do_not_hang_on_order_and_serve_the_report():
    df, p = table()
    one = e.choose_thresholds(df[LABELS], p, df.fold, df.patient)
    mixed = e.choose_thresholds(df[LABELS], p.sample(frac=1, random_state=0)[LABELS[::-1]], df.fold.sample(frac=1, random_state=1), df.patient.sample(frac=1, random_state=2))
    pd.testing.assert_frame_equal(one, mixed)
    assert class_report(df[LABELS], p, groups=df.patient, threshold=one.threshold, n_boot=0).threshold[LABELS].tolist() == one.threshold.tolist()


def test_a_label_without_positives_has_no_threshold():
    df, p = table()
    none = e.choose_thresholds(df[LABELS].assign(rare=0), p, df.fold, df.patient)
    assert none.loc["rare"].isna().all() and none.loc["any"].notna().all()


@pytest.mark.parametrize("value", [np.nan, -1])
def test_rows_that_were_trained_on_choose_no_threshold(value):
    df, p = table()
    fold = df.fold.astype(float); fold["ID_0007"] = value
    with pytest.raises(ValueError, match="1 rows have no fold.*'ID_0007'.*out-of-fold"): e.choose_thresholds(df[LABELS], p, fold, df.patient)
    with pytest.raises(LeakageError): e.choose_thresholds(df[LABELS], p, np.arange(len(df)) % 2, df.patient)
    with pytest.raises(ValueError, match="rule is 'best'"): e.choose_thresholds(df[LABELS], p, df.fold, df.patient, "best")


# --- curves and plots ---------------------------------------------------------------------------------------------

def test_curves_are_scikit_learns():
    df, p = table()
    fpr, tpr, _ = sk.roc_curve(df["any"], p["any"])
    roc = e.roc_band(df["any"], p["any"], df.patient, n_boot=50)
    np.testing.assert_allclose(roc.tpr, np.interp(roc.index, fpr, tpr), atol=1e-9)
    assert (roc.low <= roc.tpr + 1e-9).mean() > .95 and (roc.tpr <= roc.high + 1e-9).mean() > .95
    precision, recall, _ = sk.precision_recall_curve(df["any"], p["any"])
    pr = e.pr_band(df["any"], p["any"], df.patient, n_boot=50)
    for r in (.1, .5, .9, 1.): assert pr.precision[r] in precision[np.isclose(recall, recall[recall >= r - 1e-9].min())]


PLOTS = [e.plot_roc, e.plot_pr, e.plot_reliability, e.plot_scores, e.plot_thresholds, lambda y, p: e.plot_confusion(y, p, .5), lambda y, p: e.plot_errors_by_place(y, p, np.linspace(0, 1, len(y)))]


@pytest.mark.parametrize("draw", PLOTS)
@pytest.mark.parametrize("positives", [0, 1, 300])
@pytest.mark.parametrize("constant", [False, True])
def test_plots_stand(draw, positives, constant):
    y = np.zeros(300); y[:positives] = 1
    ax = draw(y, np.full(300, .2) if constant else np.random.default_rng(0).random(300))
    ax.figure.canvas.draw()
    assert ax.get_title(loc="left")


def test_a_plot_without_positives_says_so():
    said = lambda ax: " ".join(t.get_text() for t in ax.texts)
    for draw in (e.plot_roc, e.plot_pr, e.plot_thresholds): assert "no positives among 5 rows" in said(draw(np.zeros(5), np.full(5, .3)))
    assert "no negatives" in said(e.plot_roc(np.ones(5), np.full(5, .3)))


def test_one_patient_gives_no_band():
    y, patient = np.zeros(40), np.repeat(np.arange(8), 5)
    y[:4] = 1
    ax = e.plot_roc(y, np.random.default_rng(0).random(40), patient)
    assert not ax.collections and "positives of one patient only" in ax.get_legend().get_texts()[0].get_text()


def test_plots_of_many_rows_draw_few_points():
    rng = np.random.default_rng(0)
    y, p = rng.random(200_000) < .1, rng.random(200_000)
    for draw in (lambda: e.plot_roc(y, p, n_boot=5), lambda: e.plot_thresholds(y, p), lambda: e.plot_scores(y, p)):
        ax = draw()
        assert max([len(l.get_xdata()) for l in ax.lines], default=0) < 2000


def test_misses_are_put_where_they_are():
    place = np.tile(np.arange(20) / 19, 50)
    y = np.tile(np.arange(20) % 2, 50)
    p = np.where(place > .9, .1, .9) * y
    ax = e.plot_errors_by_place(y, p, place, np.repeat(np.arange(50), 20), label="bleed", n_boot=20)
    missed = ax.containers[0].lines[0].get_ydata()
    assert missed[-1] == 1 and np.nanmax(missed[:8]) == 0 and "most at 0.9–1.0" in ax.get_title(loc="left")
    with pytest.raises(ValueError, match="place has shape"): e.plot_errors_by_place(y, p, place * 20)


# --- report -------------------------------------------------------------------------------------------------------

def report(df):
    return dict(recipe=dict(name="r"), data=e.data_facts(df, LABELS), folds=e.fold_facts(df, LABELS), versions=dict(python="3"),
                scores=dict(constant=dict(log_loss=.3, low=.2, high=.4), model=dict(log_loss=.2, low=.1, high=.3)))


def test_fingerprints_follow_the_rows():
    df, _ = table()
    mixed = df.sample(frac=1, random_state=0)
    assert e.data_facts(df, LABELS) == e.data_facts(mixed, LABELS) and e.fold_facts(df, LABELS)["fingerprint"] == e.fold_facts(mixed, LABELS)["fingerprint"]
    other = df.copy(); other.loc["ID_0003", "any"] = 1 - other.loc["ID_0003", "any"]
    assert e.data_facts(df, LABELS)["fingerprint"] != e.data_facts(other, LABELS)["fingerprint"]
    with pytest.raises(LeakageError): e.fold_facts(df.assign(fold=np.arange(len(df)) % 4), LABELS)


@pytest.mark.parametrize("change, words", [
    (dict(data={}), ["data.fingerprint"]), (dict(data=dict(fingerprint="unknown")), ["data.fingerprint"]), (dict(data=None, folds=None), ["data.fingerprint", "folds.fingerprint", "folds.audit"]),
    (dict(folds=dict(fingerprint="0123456789ab", audit=[])), ["folds.audit"]), (dict(scores={}), ["scores"]), (dict(recipe=None), ["recipe"]), (dict(versions={}), ["versions"]),
    (dict(scores=dict(model=dict(log_loss=.2))), ["scores['model'].low", "scores['model'].high"])])
def test_a_score_without_its_data_and_folds_is_not_written(change, words, tmp_path):
    df, _ = table()
    with pytest.raises(ValueError) as error: e.write_report(tmp_path, report(df) | change)
    assert all(w in str(error.value) for w in words) and not list(tmp_path.iterdir())


def test_page_and_json_of_a_run(tmp_path):
    df, p = table()
    chosen = e.choose_thresholds(df[LABELS], p, df.fold, df.patient)
    full = report(df) | dict(classes=class_report(df[LABELS], p, groups=df.patient, n_boot=20).to_dict("index"), thresholds=chosen.to_dict("index"), warning="not for use",
                             calibration=dict(method="platt", gain=dict(score=dict(before=.2, after=.1, difference=-.1, low=-.12, high=-.08, helps=True))), training=[dict(fold=0, lr=.1)], seconds=12.5)
    e.write_report(tmp_path, full, e.report_figures(df[LABELS], p, df.patient, chosen.threshold, df.place, n_boot=5))
    page, saved = (tmp_path/"report.html").read_text(encoding="utf-8"), json.loads((tmp_path/"report.json").read_text())
    assert sorted(f.name for f in tmp_path.iterdir()) == ["report.html", "report.json"] and saved["scores"] == full["scores"] and "created" in saved
    for text in (full["data"]["fingerprint"], full["folds"]["fingerprint"], "constant", "not for use", "platt", "0.2000 (0.1000 to 0.3000)", "sensitivity", "12.5"): assert text in page
    assert page.count("data:image/png;base64,") == 3 and not re.search(r"https?://|<script|<link|@import|url\(", page)


def test_texts_are_escaped(tmp_path):
    df, _ = table(); bad = "<img src=x onerror=alert(1)>&\"'"
    e.write_report(tmp_path, report(df) | dict(title=bad, warning=bad, recipe={bad: dict(inner=bad)}, classes={bad: {"positives": 3}}, scores={bad: dict(low=1., high=2., log_loss=1.5)}, training=[{bad: bad}],
                                               calibration={bad: bad, "gain": {bad: {"before": bad}}}, thresholds={bad: {bad: 1}}, versions={bad: bad}), {bad: plt.figure()})
    page = (tmp_path/"report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page and page.count("&lt;img src=x") >= 12 and '"\'' not in page.split("</style>")[1].replace("'none'", "")


def test_report_without_pictures_or_classes(tmp_path):
    df, _ = table()
    e.write_report(tmp_path/"new", report(df))
    assert "<img" not in (tmp_path/"new"/"report.html").read_text(encoding="utf-8")
