"Calibration: what it recovers, that it never turns an order around, and that its gain is not flattered."
import json
import logging

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from rsna_helpers import calibration as c
from rsna_helpers.metrics import hemorrhage_rows, HEMORRHAGE_LABELS
from rsna_helpers.validation import LeakageError

LABELS = ["rare", "common"]


def model(patients=300, rows=10, slope=2., offset=0., seed=0):
    "Truth, probabilities whose logits are `slope` times the true ones plus `offset`, and patients."
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), rows)
    truth = rng.normal([-3.5, -1], 1, (patients, 2))[patient] + rng.normal(0, 1, (patients * rows, 2))
    return (rng.random(truth.shape) < expit(truth)).astype(int), expit(slope * truth + offset), patient


@pytest.mark.parametrize("method, slope, offset", [("temperature", 2, 0), ("temperature", .5, 0), ("platt", 2, 1), ("platt", 1, -2)])
def test_what_was_done_is_undone(method, slope, offset):
    y, p, patient = model(2000, slope=slope, offset=offset)
    part = c.fit_calibration(y, p, patient, method, LABELS).parts[1]
    assert part["slope"] == pytest.approx(1 / slope, rel=.08) and part["offset"] == pytest.approx(-offset / slope, abs=.1)


def test_platt_is_logistic_regression_on_the_logit():
    y, p, patient = model(offset=1)
    part = c.fit_calibration(y, p, patient, "platt", LABELS).parts[1]
    sk = LogisticRegression(C=1e12, tol=1e-10, max_iter=1000).fit(logit(p[:, 1:]), y[:, 1])
    assert part["slope"] == pytest.approx(sk.coef_[0, 0], rel=1e-3) and part["offset"] == pytest.approx(sk.intercept_[0], abs=2e-3)


@given(st.sampled_from(c.METHODS), st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=40, deadline=None)
def test_order_is_kept_whatever_the_model(method, seed, inverted):
    rng = np.random.default_rng(seed)
    p = rng.random((200, 1)).round(rng.integers(1, 5))
    y = (rng.random((200, 1)) < (1 - p if inverted else p)).astype(int)
    y[:2, 0] = 0, 1
    out = c.fit_calibration(y, p, method=method, labels=["a"], min_positives=1).apply(np.linspace(0, 1, 501)[:, None])[:, 0]
    assert (np.diff(out) >= 0).all() and (out >= 0).all() and (out <= 1).all() and np.isfinite(out).all()


@pytest.mark.parametrize("method", c.METHODS)
def test_certain_mistakes_stay_finite(method):
    y, p = np.r_[np.zeros(60), np.ones(60)][:, None], np.r_[np.zeros(30), np.ones(60), np.zeros(30)][:, None]
    out = c.fit_calibration(y, p, method=method, labels=["a"]).apply(p)
    assert ((out > 0) & (out < 1)).all()


@pytest.mark.parametrize("method", c.METHODS)
def test_json_and_back(method, tmp_path):
    y, p, patient = model()
    one = c.fit_calibration(y, p, patient, method, LABELS)
    again = c.Calibration.from_json(json.loads(json.dumps(one.to_json())))
    assert again == one and (again.apply(p) == one.apply(p)).all()
    assert c.save_calibration(one, tmp_path).name == "calibration.json" and c.load_calibration(tmp_path) == one
    assert [f.name for f in tmp_path.iterdir()] == ["calibration.json"] and c.load_calibration(tmp_path/"none") is None


def test_tables_are_matched_by_name():
    y, p, patient = model()
    ids = [f"ID_{i}" for i in range(len(y))]
    Y, P, G = pd.DataFrame(y, ids, LABELS), pd.DataFrame(p, ids, LABELS), pd.Series(patient, ids)
    mixed = P.sample(frac=1, random_state=0)[LABELS[::-1]]
    one = c.fit_calibration(Y, mixed, G.sample(frac=1, random_state=1), "platt")
    for part, want in zip(one.parts, c.fit_calibration(y, p, patient, "platt", LABELS).parts): assert part == pytest.approx(want, rel=1e-6)
    out = one.apply(mixed)
    assert list(out) == LABELS[::-1] and out.index.equals(mixed.index)
    np.testing.assert_allclose(out.loc[ids, LABELS], one.apply(p), rtol=1e-12)
    assert one.apply(P[:0]).empty
    np.testing.assert_allclose(c.cross_calibrated(Y, mixed, G, G % 5, "platt"), c.cross_calibrated(y, p, patient, patient % 5, "platt", LABELS), rtol=1e-6)


def test_few_patients_leave_a_label_as_it_is(caplog):
    y, p, patient = model()
    y[:, 0] = 0; y[:200:10, 0] = 1; y[20:40, 0] = 1       # 40 positive rows in 20 patients
    with caplog.at_level(logging.WARNING):
        one = c.fit_calibration(y, p, patient, "isotonic", LABELS)
    assert one.parts[0] == {} and one.parts[1] and "rare: 20 patients" in one.notes[0] and "needs 50" in caplog.text
    assert (one.apply(p)[:, 0] == p[:, 0]).all()
    assert c.fit_calibration(np.zeros((50, 1)), np.full((50, 1), .2), labels=["a"]).parts == ({},)


def test_slices_of_few_patients_do_not_count_as_many():
    y, p, patient = model(12, 100)
    assert c.fit_calibration(y, p, patient, "platt", LABELS).parts == ({}, {})
    assert c.fit_calibration(y, p, None, "platt", LABELS).parts[1]


def test_held_out_rows_never_touch_their_own_fit():
    y, p, patient = model(60)
    fold, other = patient % 3, y.copy()
    other[fold == 0] = 1 - other[fold == 0]
    a, b = (c.cross_calibrated(t, p, patient, fold, "platt", LABELS, min_positives=1) for t in (y, other))
    assert (a[fold == 0] == b[fold == 0]).all() and (a[fold == 1] != b[fold == 1]).any()


@pytest.mark.parametrize("fold", [None, 0])
def test_one_fold_is_judged_by_halves_of_patients(fold):
    patient = np.repeat(["a", "b", "c", "d", "e"], 4)
    part = c.cross_parts(patient, None if fold is None else np.zeros(20))
    assert set(part) == {0, 1} and all(len(set(part[patient == g])) == 1 for g in set(patient))
    with pytest.raises(ValueError, match="one group only"): c.cross_parts(["a"] * 3)


def test_a_patient_in_two_folds_is_refused():
    with pytest.raises(LeakageError, match="P1"): c.cross_parts(["P1", "P1", "P2"], [0, 1, 1])


def test_gain_on_noise_is_not_flattered():
    "A right model with few patients: on its own rows every fit gains, on other rows none does."
    y, p, patient = model(80, slope=1.)
    fitted = c.fit_calibration(y, p, patient, "isotonic", LABELS, min_positives=5)
    loss = lambda q: -np.log(np.where(y == 1, q, 1 - q)).mean()
    gain = c.calibration_gain(y, p, patient, patient % 4, "isotonic", LABELS, n_boot=100, min_positives=5)
    assert loss(fitted.apply(p)) < loss(p) and not gain.helps.any() and (gain.difference > 0).all()


def test_gain_of_a_bad_model_is_found_and_chosen():
    y, p, patient = model(slope=3)
    y6, p6 = np.repeat(y[:, [1]], 6, 1), np.repeat(p[:, [1]], 6, 1)
    chosen, table = c.choose_calibration(y6, p6, patient, patient % 5, list(HEMORRHAGE_LABELS), hemorrhage_rows, n_boot=100)
    assert chosen.method == "temperature" and table.loc[("temperature", "score"), "helps"]
    assert table.loc[("temperature", "score"), "before"] == pytest.approx(hemorrhage_rows(y6, p6).mean())
    assert (table.low <= table.difference).all() and (table.difference <= table.high).all()


def test_a_right_model_is_left_alone():
    y, p, patient = model(slope=1.)
    chosen, _ = c.choose_calibration(y, p, patient, patient % 5, LABELS, n_boot=100)
    assert chosen is None


@pytest.mark.parametrize("change, words", [(dict(method="beta"), "method is 'beta'"), (dict(labels=None), "labels is None"), (dict(groups=[1, 2]), "groups has shape (2,)"),
                                           (dict(p=np.full((4, 2), np.nan)), "p[0, 0] is nan"), (dict(y=np.full((4, 2), 2)), "y[0, 0] is 2"), (dict(groups=["a", None, "b", "c"]), "groups[1] is")])
def test_bad_input_is_named(change, words):
    good = dict(y=np.eye(2)[[0, 1, 0, 1]], p=np.full((4, 2), .5), groups=list("abcd"), labels=LABELS)
    with pytest.raises(ValueError) as error: c.fit_calibration(**good | change)
    assert words in str(error.value)


@pytest.mark.parametrize("part", [dict(slope=-1., offset=0.), dict(slope=1.), dict(slope=float("nan"), offset=0.), dict(x=[0., 1.], y=[.5, .4]), dict(x=[0., 0.], y=[.1, .2]), dict(x=[0.], y=[1.5]), dict(x=[], y=[])])
def test_a_file_that_would_break_the_order_is_refused(part, tmp_path):
    (tmp_path/"calibration.json").write_text(json.dumps(dict(method="platt", labels=["a"], parts=[part], notes=[])))
    with pytest.raises(ValueError, match="calibration.json.*'a' is not a rising curve"): c.load_calibration(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"method": "platt", "labels": ["a"], "parts": [], "notes": []}', "{"])
def test_a_damaged_file_is_named(text, tmp_path):
    (tmp_path/"calibration.json").write_text(text)
    with pytest.raises(ValueError, match="calibration.json"): c.load_calibration(tmp_path)
