"Scores against scikit-learn, brute force and the competitions' own numbers."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from rsna_helpers import metrics as m

LABELS = ["epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any"]


def pairs(columns=None, low=0.0, high=1.0, min_rows=1, max_rows=40, decimals=None):
    "Strategy: truth and prediction of the same shape."
    rows = st.integers(min_rows, max_rows)
    shape = rows.map(lambda n: (n,) if columns is None else (n, columns))
    p = st.floats(low, high) if decimals is None else st.integers(0, 10**decimals).map(lambda i: i / 10**decimals)
    return shape.flatmap(lambda s: st.tuples(hnp.arrays(np.int64, s, elements=st.integers(0, 1)), hnp.arrays(np.float64, s, elements=p)))


# --- log losses ---------------------------------------------------------------------------------------------------

@given(pairs(6, 1e-9, 1 - 1e-9))
@settings(max_examples=60, deadline=None)
def test_hemorrhage_is_weighted_log_loss(yp):
    y, p = yp
    weight = np.tile([1, 1, 1, 1, 1, 2], len(y))
    want = sk.log_loss(y.ravel(), p.ravel(), sample_weight=weight, labels=[0, 1])
    assert m.hemorrhage_log_loss(y, p) == pytest.approx(want, rel=1e-9)
    assert m.hemorrhage_rows(y, p).mean() == pytest.approx(want, rel=1e-9)


@given(pairs(8, 1e-9, 1 - 1e-9))
@settings(max_examples=60, deadline=None)
def test_cspine_both_normalisations(yp):
    y, p = yp
    weight = np.where(y == 1, 2, 1) * np.array([7] + [1] * 7)
    want = sk.log_loss(y.ravel(), p.ravel(), sample_weight=weight.ravel(), labels=[0, 1])
    assert m.cspine_log_loss(y, p, norm="global") == pytest.approx(want, rel=1e-9)
    rows = [sk.log_loss(a, b, sample_weight=w, labels=[0, 1]) for a, b, w in zip(y, p, weight)]
    assert m.cspine_log_loss(y, p) == pytest.approx(np.mean(rows), rel=1e-9)


def test_vectors_of_the_competitions():
    assert m.hemorrhage_log_loss([[0, 1, 0, 0, 0, 1]], [[.5] * 6]) == pytest.approx(.693147, abs=1e-6)
    assert m.hemorrhage_log_loss([[0, 1, 0, 0, 0, 1]], [[.01, .7, .05, .1, .2, .9]]) == pytest.approx(.136749, abs=1e-6)
    y, p = [[1, 1, 0, 0, 0, 0, 0, 0], [0] * 8], [[.8, .6] + [.1] * 6, [.2] + [.1] * 7]
    assert m.cspine_log_loss(y, p) == pytest.approx(.190713, abs=1e-6)
    assert m.cspine_log_loss(y, p, norm="global") == pytest.approx(.196593, abs=1e-6)
    for norm in ("row", "global"):
        assert m.cspine_log_loss(y, [[.5] * 8] * 2, norm=norm) == pytest.approx(.693147, abs=1e-6)
    y, p = np.repeat([1, 0, 1, 0], [40, 10, 5, 45]), np.repeat([.9, .9, .1, .1], [40, 10, 5, 45])
    assert m.study_kappa(y, p) == pytest.approx(.70)


def test_stage_1_column_means():
    "The prior for every image, on a table with exactly the positives of stage 1."
    n, positives = 674_258, [2761, 32564, 23766, 32122, 42496, 97103]
    y = (np.arange(n)[:, None] < positives).astype(np.uint8)
    assert m.hemorrhage_log_loss(y, np.broadcast_to(np.array(positives) / n, y.shape)) == pytest.approx(.231956, abs=1e-6)


def test_cspine_column_means():
    n, positives = 2019, [961, 146, 285, 73, 108, 162, 277, 393]
    prior = np.array(positives) / n
    loss = -(2 * prior * np.log(prior) + (1 - prior) * np.log(1 - prior)) * [7, 1, 1, 1, 1, 1, 1, 1]
    y = (np.arange(n)[:, None] < positives).astype(int)
    want = loss.sum() / ((1 + prior) * [7, 1, 1, 1, 1, 1, 1, 1]).sum()
    assert m.cspine_log_loss(y, np.tile(prior, (n, 1)), norm="global") == pytest.approx(want, rel=1e-12)


def test_clip_is_1e_15_unless_asked_otherwise():
    wrong = m.hemorrhage_log_loss([[0, 0, 0, 0, 0, 1]], [[0.] * 6])
    assert wrong == pytest.approx(-2 * np.log(1e-15) / 7)
    assert m.hemorrhage_log_loss([[0, 0, 0, 0, 0, 1]], [[0.] * 6], eps=.01) == pytest.approx((-2 * np.log(.01) - 5 * np.log(.99)) / 7)
    assert m.cspine_log_loss([[1] + [0] * 7], [[0.] * 8]) == pytest.approx(-14 * np.log(1e-15) / 21, rel=1e-9)


def test_float32_and_bool_input():
    y, p = np.array([[0, 1, 0, 0, 0, 1]], bool), np.array([[0, 1, 0, 0, 0, 1]], np.float32)
    assert m.hemorrhage_log_loss(y, p) < 1e-12


def test_order_of_columns_matters():
    y, p = np.array([[0, 0, 0, 0, 0, 1]]), np.array([[.1, .1, .1, .1, .1, .3]])
    assert m.hemorrhage_log_loss(y, p) != m.hemorrhage_log_loss(y[:, ::-1], p[:, ::-1])


@pytest.mark.parametrize("y, p, words", [
    ([[0] * 6, [0] * 6], [[.5] * 6, [.5, .5, np.nan, .5, .5, .5]], "p[1, 2] is nan"),
    ([[0] * 6], [[.5, 1.5, -1, .5, .5, .5]], "p[0, 1] is 1.5: wanted a probability in [0, 1] (1 more"),
    ([[0, 0, 0, 0, 0, np.nan]], [[.5] * 6], "y[0, 5] is nan: wanted 0 or 1"),
    ([[0, 0, .5, 0, 0, 0]], [[.5] * 6], "y[0, 2] is 0.5: wanted 0 or 1"),
    ([[0] * 5], [[.5] * 5], "y has shape (1, 5): wanted (n, 6)"),
    ([[0] * 6], [[.5] * 6] * 2, "p has shape (2, 6) and y has (1, 6)"),
    ([0] * 6, [.5] * 6, "y has shape (6,): wanted (n, 6)"),
    (np.zeros((0, 6)), np.zeros((0, 6)), "y has shape (0, 6): wanted (n, 6) with n > 0"),
    ([[0] * 6], [["high"] * 6], "p is not an array of numbers"),
    ([[0] * 6], [[np.inf] * 6], "p[0, 0] is inf"),
])
def test_bad_input_is_named(y, p, words):
    with pytest.raises(ValueError) as error: m.hemorrhage_log_loss(y, p)
    assert words in str(error.value)


@pytest.mark.parametrize("score, y, p", [(m.cspine_log_loss, [[0] * 8], [[.5] * 7 + [np.nan]]), (m.study_kappa, [0, 1], [.5, np.nan]),
                                         (m.cspine_log_loss, [[0] * 6], [[.5] * 6]), (m.study_kappa, [[0, 1]], [[.5, .5]]),
                                         (m.study_kappa, [0, 2], [.5, .5]), (m.cspine_log_loss, [[0] * 8], [[1.01] * 8])])
def test_other_scores_refuse_too(score, y, p):
    with pytest.raises(ValueError, match=r"^[yp](\[| has)"): score(y, p)


@pytest.mark.parametrize("kwargs, words", [(dict(weights=[1, np.nan]), "weights[1] is nan"), (dict(weights=[0, 0]), "weights.sum"),
                                           (dict(weights=[[1, 1, 1]] * 2), "wanted (n, 3)"), (dict(weights=[1, 1], eps=.5), "eps is 0.5"),
                                           (dict(weights=[1, 1], norm="rows"), "norm is 'rows'"), (dict(weights=3), "wanted (n, 0)")])
def test_bad_weights(kwargs, words):
    with pytest.raises(ValueError) as error: m.weighted_log_loss([[0, 1]] * 2, [[.5, .5]] * 2, **kwargs)
    assert words in str(error.value)


# --- tables are matched by name ----------------------------------------------------------------------------------

def as_table(a, labels=LABELS): return pd.DataFrame(a, [f"ID_{i:03d}" for i in range(len(a))], list(labels))


@given(pairs(6, max_rows=12), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_order_of_tables_is_never_assumed(yp, random):
    y, p = yp
    rows, columns = random.sample(range(len(p)), len(p)), random.sample(range(6), 6)
    shuffled = as_table(p).iloc[rows, columns]
    assert m.hemorrhage_log_loss(as_table(y), shuffled) == pytest.approx(m.hemorrhage_log_loss(y, p), rel=1e-12)
    assert m.hemorrhage_log_loss(as_table(y)[LABELS[::-1]], shuffled) == pytest.approx(m.hemorrhage_log_loss(y, p), rel=1e-12)
    assert m.weighted_log_loss(as_table(y), shuffled, dict(zip(LABELS[::-1], range(6, 0, -1)))) == pytest.approx(m.weighted_log_loss(y, p, [6, 5, 4, 3, 2, 1][::-1]))


def test_other_scores_take_tables_too():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, (30, 8)), rng.random((30, 8))
    Y, P = as_table(y, m.CSPINE_LABELS), as_table(p, m.CSPINE_LABELS).sample(frac=1, random_state=0)[list(m.CSPINE_LABELS[::-1])]
    for norm in ("row", "global"): assert m.cspine_log_loss(Y, P, norm) == pytest.approx(m.cspine_log_loss(y, p, norm), rel=1e-12)
    assert m.study_kappa(Y.C1, P.C1) == m.study_kappa(y[:, 1], p[:, 1]) and m.rank_auc(Y.C1, P.C1) == m.rank_auc(y[:, 1], p[:, 1])
    assert m.average_precision(Y.C1, P.C1) == m.average_precision(y[:, 1], p[:, 1])


def test_groups_of_a_report_are_matched_too():
    y, p, patient = slices(100)
    Y, P = as_table(y), as_table(p).sample(frac=1, random_state=1)[LABELS[::-1]]
    others = pd.concat([pd.Series(patient, Y.index), pd.Series("ID_9", ["not asked for"])]).sample(frac=1, random_state=2)
    pd.testing.assert_frame_equal(m.class_report(Y, P, groups=others, n_boot=20), m.class_report(y, p, LABELS, patient, n_boot=20))
    with pytest.raises(ValueError, match="groups lacks 1 ids: 'ID_007'"): m.class_report(Y, P, groups=others.drop("ID_007"))


@pytest.mark.parametrize("change, words", [
    (lambda t: t.drop("ID_003"), "p lacks 1 ids: 'ID_003'"),
    (lambda t: t.drop([f"ID_{i:03d}" for i in range(6)]), "p lacks 6 ids: 'ID_000', 'ID_001', 'ID_002' and 3 more"),
    (lambda t: pd.concat([t, t.loc[["ID_004"]]]), "p holds 1 ids more than once: 'ID_004'"),
    (lambda t: pd.concat([t, t.loc[["ID_004"]].rename(index={"ID_004": "ID_x"})]), "p holds 1 ids that were not asked for: 'ID_x'"),
    (lambda t: t.rename(columns={"any": "Any"}), "p lacks the columns 'any'"),
    (lambda t: pd.concat([t, t[["any"]]], axis=1), "p holds columns more than once: 'any'"),
    (lambda t: t.replace(t.loc["ID_002", "any"], np.nan), "p['ID_002', 'any'] is nan"),
    (lambda t: t * 2, "wanted a probability in [0, 1]"),
    (lambda t: t.astype("Float64").mask(t == t.loc["ID_001", "epidural"], pd.NA), "p['ID_001', 'epidural'] is nan"),
    (lambda t: t.to_numpy(), "y is a DataFrame and p is a ndarray"),
    (lambda t: t["any"], "y is a DataFrame and p is a Series"),
    (lambda t: t.astype(object).replace(t.loc["ID_002", "any"], "high"), "p is not an array of numbers"),
])
def test_bad_tables_are_named(change, words):
    y, p = as_table(np.eye(6)[np.arange(8) % 6]), as_table(np.random.default_rng(0).uniform(.4, .9, (8, 6)))
    with pytest.raises(ValueError) as error: m.hemorrhage_log_loss(y, change(p))
    assert words in str(error.value)


def test_truth_with_an_id_twice_is_refused():
    y, p = as_table(np.zeros((3, 6))), as_table(np.full((3, 6), .5))
    with pytest.raises(ValueError, match="y holds 1 ids more than once: 'ID_001'"): m.hemorrhage_log_loss(y.rename(index={"ID_002": "ID_001"}), p)
    with pytest.raises(ValueError, match="p holds columns that y lacks: 'fold'"): m.weighted_log_loss(y, p.assign(fold=0), [1] * 6)
    with pytest.raises(ValueError, match="weights has names and y has none"): m.weighted_log_loss(y.to_numpy(), p.to_numpy(), dict(a=1))


def test_studies_are_means_of_their_images():
    p = pd.DataFrame(dict(a=[.1, .3, .8], b=[0., 1., .5]), ["i3", "i1", "i2"])
    study = pd.Series(["s2", "s1", "s2", "s1"], ["i1", "i2", "i3", "i4"], name="study")
    pd.testing.assert_frame_equal(m.study_mean(p, study), pd.DataFrame(dict(a=[.8, .2], b=[.5, .5]), pd.Index(["s1", "s2"], name="study")))
    with pytest.raises(ValueError, match="study lacks 1 ids: 'i2'"): m.study_mean(p, study.drop("i2"))
    with pytest.raises(ValueError, match=r"p\['i1', 'a'\] is nan"): m.study_mean(p.replace(.3, np.nan), study)


def test_study_scores_by_bone():
    rng = np.random.default_rng(0)
    y, bone = rng.integers(0, 2, 200), rng.choice(["XR_HAND", "XR_ELBOW"], 200)
    p = (.4 * y + .7 * rng.random(200)).clip(0, 1)
    table = m.study_scores(y, p, bone, threshold=.6)
    assert list(table.index) == ["overall", "XR_ELBOW", "XR_HAND"]
    for name, row in table.iterrows():
        rows = np.ones(200, bool) if name == "overall" else bone == name
        assert row.kappa == pytest.approx(sk.cohen_kappa_score(y[rows], p[rows] > .6)) and row.auc == pytest.approx(sk.roc_auc_score(y[rows], p[rows]))


# --- kappa and AUC ------------------------------------------------------------------------------------------------

@given(pairs(decimals=1), st.sampled_from([0, .3, .5, 1]))
@settings(max_examples=150, deadline=None)
def test_kappa_is_scikit_learns(yp, threshold):
    y, p = yp
    decision = p > threshold
    constant = len(set(y)) == 1 or len(set(decision)) == 1
    want = 0 if constant else sk.cohen_kappa_score(y, decision)
    assert m.study_kappa(y, p, threshold) == pytest.approx(want, abs=1e-12)


def test_a_tie_at_the_threshold_is_normal():
    assert m.study_kappa([0, 1], [.5, .6]) == 1


@given(pairs(decimals=1, max_rows=60))
@settings(max_examples=150, deadline=None)
def test_auc_is_scikit_learns(yp):
    y, p = yp
    if len(set(y)) == 1: assert np.isnan(m.rank_auc(y, p))
    else: assert m.rank_auc(y, p) == pytest.approx(sk.roc_auc_score(y, p), abs=1e-12)


@given(pairs(decimals=1, max_rows=60), st.data())
@settings(max_examples=100, deadline=None)
def test_matched_auc_counts_pairs(yp, data):
    y, p = yp
    stratum = data.draw(hnp.arrays(np.int64, len(y), elements=st.integers(-1, 3)))
    wins, n = 0., 0
    for i in np.flatnonzero(y == 1):
        for j in np.flatnonzero((y == 0) & (stratum == stratum[i])):
            wins, n = wins + (p[i] > p[j]) + .5 * (p[i] == p[j]), n + 1
    auc, count = m.matched_auc(y, p, stratum)
    assert count == n
    if n: assert auc == wins / n
    else: assert np.isnan(auc)


def test_auc_of_any_order():
    y, p = np.array([0, 0, 1, 1]), np.array([-10., 3, 2, np.inf])
    assert m.rank_auc(y, p) == .75 == m.rank_auc(y, np.exp(p / 10))


@given(st.integers(1, 200), st.integers(1, 12), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_strata_have_equal_counts(n, bins, random):
    x = np.array(random.sample(range(10 * n), n))  # no ties
    strata = m.position_strata(x, bins)
    count = np.bincount(strata, minlength=bins)
    assert len(count) == bins and count.max() - count.min() <= 1
    assert (np.diff(strata[np.argsort(x)]) >= 0).all()


def test_equal_positions_share_a_stratum():
    x = np.repeat([1., 2, 3], [5, 1, 4])
    assert (pd.Series(m.position_strata(x, 4)).groupby(x).nunique() == 1).all()
    with pytest.raises(ValueError, match=r"x\[1\] is nan"): m.position_strata([1, np.nan])
    with pytest.raises(ValueError, match="n is 0"): m.position_strata([1, 2], 0)


# --- report and intervals -----------------------------------------------------------------------------------------

def slices(n=600, patients=40, seed=0):
    "Truth, probabilities with ties, and patients, of a rough head CT."
    rng = np.random.default_rng(seed)
    patient = np.sort(rng.integers(0, patients, n))
    y = (rng.random((n, 5)) < [.01, .2, .1, .15, .3]).astype(int)
    y = np.c_[y, y.max(1)]
    return y, (.3 * y + .7 * rng.random(y.shape)).round(2), np.char.add("ID_", patient.astype(str))


@pytest.mark.parametrize("threshold", [.4, dict(zip(LABELS, [.1, .2, .3, .4, .5, .6]))])
def test_report_is_scikit_learns(threshold):
    y, p, patient = slices()
    report = m.class_report(y, p, LABELS, patient, threshold=threshold, n_boot=10)
    assert list(report.index) == LABELS + ["normal"]
    truth, prob = np.c_[y, 1 - y[:, 5]], np.c_[p, 1 - p[:, 5]]
    cuts = [threshold] * 6 if isinstance(threshold, float) else [threshold[l] for l in LABELS]
    for k, (label, row) in enumerate(report.iterrows()):
        decision = prob[:, k] > (cuts + [1 - cuts[5]])[k]
        tn, fp, fn, tp = sk.confusion_matrix(truth[:, k], decision, labels=[0, 1]).ravel()
        of = lambda a, b: a / b if b else np.nan
        want = dict(n=600, positives=truth[:, k].sum(), prevalence=truth[:, k].mean(), auc=sk.roc_auc_score(truth[:, k], prob[:, k]),
                    average_precision=sk.average_precision_score(truth[:, k], prob[:, k]), brier=sk.brier_score_loss(truth[:, k], prob[:, k]),
                    log_loss=sk.log_loss(truth[:, k], prob[:, k].clip(1e-15, 1 - 1e-15)), sensitivity=of(tp, tp + fn), specificity=of(tn, tn + fp),
                    ppv=of(tp, tp + fp), npv=of(tn, tn + fn), f1=of(2 * tp, 2 * tp + fp + fn), tp=tp, fp=fp, fn=fn, tn=tn)
        for name, value in want.items(): assert row[name] == pytest.approx(value, abs=1e-10, nan_ok=True), (label, name)


def test_no_threshold_no_decision():
    y, p, patient = slices(100)
    row = m.class_report(y, p, LABELS, patient, threshold={l: np.nan if l == "epidural" else .5 for l in LABELS}, n_boot=5).loc["epidural"]
    assert row[["sensitivity", "specificity", "ppv", "npv", "f1", "tp", "tn", "sensitivity_low"]].isna().all() and np.isfinite(row.log_loss)


def copies(code, n_groups, n_boot, seed):
    "Rows of each resample, copied out."
    counts = np.concatenate(list(m._resamples(n_groups, n_boot, seed, len(code))), axis=1)
    assert (counts.sum(0) == n_groups).all()
    return [np.repeat(np.arange(len(code)), w[code].astype(int)) for w in counts.T]


def test_bootstrap_is_what_copying_the_rows_gives():
    y, p, patient = slices(200, 15)
    code, n_groups = m._codes("groups", patient, len(y))
    _, boot = m._bootstrap(y.astype(float), p, np.full(6, .5), code, n_groups, 12, 3)
    for b, rows in enumerate(copies(code, n_groups, 12, 3)):
        for k in range(6):
            a, q = y[rows, k], p[rows, k]; d = q > .5; of = lambda x, by: (x & by).sum() / by.sum() if by.any() else np.nan
            want = [sk.log_loss(a, q.clip(1e-15, 1 - 1e-15), labels=[0, 1]), ((a - q) ** 2).mean(), of(d, a == 1), of(~d, a == 0), of(a == 1, d), of(a == 0, ~d),
                    2 * (a * d).sum() / (a.sum() + d.sum()) if a.any() or d.any() else np.nan,
                    np.nan if len(set(a)) == 1 else sk.roc_auc_score(a, q), sk.average_precision_score(a, q) if a.any() else np.nan]
            if len(set(patient[y[:, k] == 1])) < 2: want = [np.nan if j in (2, 6, 7, 8) else v for j, v in enumerate(want)]
            assert boot[b, k] == pytest.approx(want, rel=1e-9, nan_ok=True)


def test_paired_report_draws_the_same_patients():
    y, p, patient = slices(200, 15)
    q = (.5 * p + .5 * np.random.default_rng(9).random(p.shape)).round(2)
    pair = m.paired_report(y, p, q, LABELS, patient, m.hemorrhage_rows, n_boot=30, seed=3)
    code, n_groups = m._codes("groups", patient, len(y))
    auc, loss, score = [], [], []
    for rows in copies(code, n_groups, 30, 3):
        auc.append(sk.roc_auc_score(y[rows, 5], q[rows, 5]) - sk.roc_auc_score(y[rows, 5], p[rows, 5]))
        loss.append(sk.log_loss(y[rows, 5], q[rows, 5].clip(1e-15, 1 - 1e-15)) - sk.log_loss(y[rows, 5], p[rows, 5].clip(1e-15, 1 - 1e-15)))
        score.append(m.hemorrhage_log_loss(y[rows], q[rows]) - m.hemorrhage_log_loss(y[rows], p[rows]))
    for name, row, values in (("auc", "any", auc), ("log_loss", "any", loss), ("log_loss", "score", score)):
        assert pair.loc[row, [f"{name}_low", f"{name}_high"]].tolist() == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist(), rel=1e-8)
    assert pair.auc_difference["any"] == pytest.approx(sk.roc_auc_score(y[:, 5], q[:, 5]) - sk.roc_auc_score(y[:, 5], p[:, 5]))


def test_difference_is_known_better_than_either_score():
    y, p, patient = slices(3000, 200)
    pair = m.paired_report(y[:, 5], p[:, 5], (.99 * p[:, 5]), "any", patient, n_boot=200).loc["any"]
    alone = m.class_report(y[:, 5], p[:, 5], "any", patient, n_boot=200, normal_from=None).loc["any"]
    assert pair.log_loss_high - pair.log_loss_low < .2 * (alone.log_loss_high - alone.log_loss_low)
    assert pair.auc_low == pair.auc_high == 0   # the order did not change


@given(st.integers(0, 2**32 - 1), st.integers(5, 3000), st.sampled_from([.01, .3]))
@settings(max_examples=40, deadline=None)
def test_bins_of_scores_hardly_change_auc(seed, n, share):
    rng = np.random.default_rng(seed)
    y = rng.random(n) < share
    p = rng.random(n) + .5 * y
    pos, neg = m.binned_counts(y.astype(float), p, np.zeros(n, int), 1, most=400)
    assert pos.shape[0] <= 410 or n <= 400
    auc, ap = m._auc_ap(pos.toarray(), neg.toarray())[:, 0]
    if 0 < y.sum() < n: assert auc == pytest.approx(sk.roc_auc_score(y, p), abs=.005) and ap == pytest.approx(sk.average_precision_score(y, p), abs=.03)


@given(pairs(decimals=1, max_rows=60))
@settings(max_examples=100, deadline=None)
def test_average_precision_is_scikit_learns(yp):
    y, p = yp
    if not y.any(): assert np.isnan(m.average_precision(y, p))
    else: assert m.average_precision(y, p) == pytest.approx(sk.average_precision_score(y, p), abs=1e-12)


def test_curves_go_from_nothing_to_all():
    y, p, patient = slices(400)
    (tp, fp), *others = m.resampled_curves(y[:, 5], p[:, 5], patient, n_boot=20)
    fpr, tpr, _ = sk.roc_curve(y[:, 5], p[:, 5], drop_intermediate=False)
    assert tp[:, 0] / tp[-1, 0] == pytest.approx(tpr) and fp[:, 0] / fp[-1, 0] == pytest.approx(fpr)
    for t, f in others: assert (np.diff(t, axis=0) >= 0).all() and (t[0] == 0).all() and ((t[-1] + f[-1]) > 0).all()


@pytest.mark.parametrize("by, strategy", [("width", "uniform"), ("count", "quantile")])
def test_reliability_is_scikit_learns(by, strategy):
    rng = np.random.default_rng(0)
    p = rng.permutation(3000) / 3000 + 1e-4    # no ties, and no value on an edge
    y = rng.random(3000) < p ** 2
    t = m.reliability(y, p, 10, by)
    share, mean_p = calibration_curve(y, p, n_bins=10, strategy=strategy)
    assert t.share.to_numpy() == pytest.approx(share) and t.mean_p.to_numpy() == pytest.approx(mean_p) and t.n.sum() == 3000 and t.positives.sum() == y.sum()
    assert m.expected_calibration_error(y, p, 10, by) == pytest.approx((np.abs(share - mean_p) * t.n).sum() / 3000)


def test_reliability_of_the_ends():
    t = m.reliability([0, 1, 1], [0., 1., 1.])
    assert t.n.tolist() == [1, 2] and t.share.tolist() == [0, 1] and m.expected_calibration_error([0, 1, 1], [0., 1., 1.]) == 0
    for bad in (dict(bins=0), dict(by="size")):
        with pytest.raises(ValueError, match="bins is"): m.reliability([0, 1], [.1, .2], **bad)


def test_chunks_do_not_change_the_draws():
    one = np.concatenate(list(m._resamples(30, 50, 1, 1)), axis=1)
    many = np.concatenate(list(m._resamples(30, 50, 1, 400_000)), axis=1)
    assert one.shape == (30, 50) and (one == many).all()


def test_resamples_without_positives_are_left_out_and_counted():
    y, p, patient = np.zeros(100), np.linspace(0, 1, 100), np.repeat(np.arange(10), 10)
    y[8:12] = 1
    row = m.class_report(y, p, "rare", patient, n_boot=400).loc["rare"]
    # two patients of ten hold all positives: a resample misses both with probability .8 ** 10
    assert row.auc_resamples == pytest.approx(400 * (1 - .8 ** 10), abs=30)
    assert 0 <= row.auc_low <= row.auc_high <= 1
    lone = m.class_report((p < .05).astype(int), p, ["lone"], patient, n_boot=50).loc["lone"]
    assert np.isfinite(lone.auc) and lone[["auc_low", "sensitivity_low", "average_precision_high"]].isna().all() and lone.auc_resamples == 0 and np.isfinite(lone.specificity_low)
    empty = m.class_report(np.zeros(100), p, ["none"], patient, n_boot=50).loc["none"]
    assert np.isnan(empty.auc) and np.isnan(empty.auc_low) and empty.auc_resamples == 0 and np.isfinite(empty.log_loss_low)


def test_report_does_not_hang_on_the_order_of_rows():
    y, p, patient = slices()
    order = np.random.default_rng(1).permutation(len(y))
    one, other = m.class_report(y, p, LABELS, patient, n_boot=50), m.class_report(y[order], p[order], LABELS, patient[order], n_boot=50)
    pd.testing.assert_frame_equal(one, other, rtol=1e-9)
    assert not one.equals(m.class_report(y, p, LABELS, patient, n_boot=50, seed=1))


def test_report_options():
    y, p, patient = slices(60)
    assert list(m.class_report(y, p, LABELS, n_boot=0, normal_from=None).index) == LABELS
    assert m.class_report(y, p, LABELS, n_boot=0).auc_low.isna().all()
    assert list(m.class_report(y[:, :2], p[:, :2], ["a", "b"], n_boot=5).index) == ["a", "b"]
    assert m.class_report(y, p, LABELS, np.zeros(60), n_boot=5).log_loss_low.isna().all()
    for kwargs, words in ((dict(groups=patient[:-1]), "groups has shape"), (dict(threshold=2), "threshold is 2"), (dict(normal_from="x"), "'x'")):
        with pytest.raises(ValueError, match=words): m.class_report(y, p, LABELS, **{"n_boot": 5, **kwargs})
    with pytest.raises(ValueError, match=r"groups\[3\] is nan"): m.class_report(y, p, LABELS, [0, 0, 0, np.nan] + [1.] * 56)


def test_interval_over_groups_covers():
    "About 95 of 100 intervals must hold the truth, over patients; over rows far fewer do."
    inside = dict(patients=0, rows=0)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        patient = np.repeat(np.arange(60), 10)
        score = rng.normal(size=60)[patient] + .1 * rng.normal(size=600)
        for name, groups in (("patients", patient), ("rows", None)):
            mean, low, high = m.score_interval(score, groups, n_boot=200, seed=seed)
            assert mean == pytest.approx(score.mean()) and low <= mean <= high
            inside[name] += low <= 0 <= high
    assert inside["patients"] >= 87 and inside["rows"] <= 60


def test_interval_weighs_patients_by_their_rows():
    score, patient = np.array([1., 1, 1, 0]), np.array(["a", "a", "a", "b"])
    mean, low, high = m.score_interval(score, patient, n_boot=2000)
    assert (mean, low, high) == (.75, 0, 1)


def test_interval_refuses():
    for bad, words in (([1, np.nan], "score_rows"), ([], "n > 0"), ([[1, 2]], "shape")):
        with pytest.raises(ValueError, match=words): m.score_interval(bad)
    mean, low, high = m.score_interval([1, 2], ["a", "a"])
    assert mean == 1.5 and np.isnan(low) and np.isnan(high)
