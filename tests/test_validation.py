"Folds: no patient split, every label even, the same whatever the order of the rows."
import itertools
import time

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from rsna_helpers.validation import (LeakageError, _deal, _shares, _trade, audit_folds, check_no_leak, largest_deviation, make_folds,
                                     plot_folds)

matplotlib.use("Agg")
LABELS = ["epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any"]


def head_table(n_patients: int, seed: int = 0) -> pd.DataFrame:
    "Slices of a head CT: several studies a patient, bleedings over neighbouring slices, one label very rare."
    rng = np.random.default_rng(seed)
    slices = rng.integers(25, 55, n_patients) * np.minimum(rng.geometric(.85, n_patients), 15)
    row, patient = np.arange(slices.sum()), np.repeat(np.arange(n_patients), slices)
    at, severity = row - (slices.cumsum() - slices)[patient], rng.gamma(1, 1, n_patients)
    df = pd.DataFrame({"patient": np.array([f"ID_{k:08x}" for k in np.arange(n_patients) * 2654435761 % 2**32], object)[patient]})
    for name, share in zip(LABELS, (.02, .2, .15, .2, .2)):
        length = rng.geometric(.1, n_patients) * (rng.random(n_patients) < share * severity)
        start = (rng.random(n_patients) * (slices - length).clip(0)).astype(int)
        df[name] = ((at >= start[patient]) & (at < (start + length)[patient])).astype(int)
    df["any"] = df[LABELS[:5]].max(axis=1)
    return df


@pytest.fixture(scope="module")
def heads(): return head_table(2000)


# --- make_folds ---------------------------------------------------------------------------------------------------

def test_at_the_size_of_the_competition():
    "17,000 patients: within 0.3 % in a few seconds (0.2 s and 0.1 % on two cores)."
    df = head_table(17_000)
    start = time.perf_counter()
    fold = make_folds(df, LABELS, "patient")
    assert time.perf_counter() - start < 3
    audit = audit_folds(df, LABELS, "patient", fold)
    assert len(df) > 600_000 and (largest_deviation(audit) <= .003).all()
    assert audit.groups.max() - audit.groups.min() <= 40
    for label in LABELS: assert np.ptp(audit[f"{label}_groups"]) <= max(3, .01 * audit[f"{label}_groups"].sum())


def test_series(heads):
    fold = make_folds(heads, LABELS, "patient")
    assert fold.index.equals(heads.index) and fold.name == "fold" and fold.dtype.kind == "i" and set(fold) == set(range(5))
    audit = audit_folds(heads, LABELS, "patient", fold)
    assert (largest_deviation(audit) < .02).all()
    assert (largest_deviation(audit).drop("epidural") < .005).all()


@pytest.mark.parametrize("n_folds", [2, 3, 7, 10])
def test_other_numbers_of_folds(heads, n_folds):
    audit = audit_folds(heads, LABELS, "patient", make_folds(heads, LABELS, "patient", n_folds))
    assert len(audit) == n_folds and (largest_deviation(audit).drop("epidural") < .01).all()


def test_order_of_rows_does_not_matter(heads):
    fold = make_folds(heads, LABELS, "patient")
    for k in range(3):
        shuffled = heads.sample(frac=1, random_state=k)
        assert make_folds(shuffled, LABELS, "patient").loc[heads.index].equals(fold)
    assert make_folds(heads.sort_values("any"), LABELS, "patient").loc[heads.index].equals(fold)


def test_type_of_groups_and_labels_does_not_matter(heads):
    fold = make_folds(heads, LABELS, "patient").to_numpy()
    backwards = pd.Categorical(heads.patient, categories=heads.patient.unique()[::-1])
    for df in (heads.assign(patient=backwards), heads.assign(patient=heads.patient.astype("string")),
               heads.astype({label: bool for label in LABELS}), heads.astype({label: float for label in LABELS})):
        assert (make_folds(df, LABELS, "patient").to_numpy() == fold).all()


def test_seed(heads):
    fold = make_folds(heads, LABELS, "patient", seed=1)
    assert fold.equals(make_folds(heads, LABELS, "patient", seed=1))
    # folds of another seed share few patients beyond what chance gives
    assert abs((fold == make_folds(heads, LABELS, "patient", seed=2)).mean() - .2) < .1


def test_input_is_left_alone(heads):
    before = heads.copy()
    make_folds(heads, LABELS, "patient")
    pd.testing.assert_frame_equal(heads, before)


def test_repeated_index():
    df = head_table(30).assign(index=0).set_index("index")
    fold = make_folds(df, LABELS, "patient")
    assert len(fold) == len(df) and audit_folds(df, LABELS, "patient", fold).rows.sum() == len(df)


@st.composite
def tables(draw):
    "Small tables with groups of very different size and labels from empty to full."
    sizes = draw(st.lists(st.integers(1, 30), min_size=2, max_size=15))
    group = np.repeat(np.arange(len(sizes)), sizes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shares = draw(st.lists(st.sampled_from([0, .05, .5, 1]), min_size=0, max_size=3))
    df = pd.DataFrame({f"l{k}": (rng.random(len(group)) < share).astype(int) for k, share in enumerate(shares)}, index=range(len(group)))
    return df.assign(who=group), list(df.columns), draw(st.integers(2, len(sizes)))


@given(tables(), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_no_group_is_split_and_no_fold_is_empty(table, seed):
    df, labels, n_folds = table
    fold = make_folds(df, labels, "who", n_folds, seed)
    assert set(fold) == set(range(n_folds))
    assert (fold.groupby(df.who).nunique() == 1).all()
    back = make_folds(df.iloc[::-1], labels, "who", n_folds, seed)
    assert back.loc[df.index].equals(fold)


@pytest.mark.parametrize("seed", range(8))
def test_as_good_as_trying_everything(seed):
    "Nine patients in two folds: no partition out of all is more than a little more even."
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(9), rng.integers(3, 25, 9))
    df = pd.DataFrame({"a": rng.integers(0, 2, len(who)), "b": (rng.random(len(who)) < .1).astype(int), "who": who})
    shares = _shares(who, df[["a", "b"]].to_numpy(), 2)
    uneven = lambda fold: ((shares[fold == 0].sum(0) - shares[fold == 1].sum(0)) ** 2).sum()
    every = [uneven(np.array((0, *rest))) for rest in itertools.product((0, 1), repeat=8) if any(rest)]
    mine = make_folds(df, ["a", "b"], "who", 2).groupby(who).first().to_numpy()
    assert uneven(mine) == min(every)


def test_trading_only_helps(heads):
    code, keys = pd.factorize(heads.patient, sort=True)
    shares = _shares(code, heads[LABELS].to_numpy(), 5)
    fold = _deal(shares, 5, np.arange(len(keys)))
    uneven = lambda fold: sum(((shares[fold == k].sum(0) - shares.sum(0) / 5) ** 2).sum() for k in range(5))
    assert uneven(_trade(shares, fold, 5, np.random.default_rng(0))) < .1 * uneven(fold)


def test_one_patient_with_half_of_the_rows():
    df = pd.concat([head_table(40), head_table(1, seed=1).sample(3000, replace=True, random_state=0).assign(patient="giant")], ignore_index=True)
    audit = audit_folds(df, LABELS, "patient", make_folds(df, LABELS, "patient"))
    giant = audit.rows.idxmax()
    assert audit.groups[giant] <= 5 and np.ptp(audit.rows.drop(giant)) < .05 * audit.rows.min()


def test_as_many_folds_as_groups():
    df = head_table(7)
    assert audit_folds(df, LABELS, "patient", make_folds(df, LABELS, "patient", n_folds=7)).groups.eq(1).all()


def test_a_rare_label_goes_to_every_fold():
    who = np.repeat(np.arange(50), 20)
    df = pd.DataFrame({"who": who, "rare": ((who < 5) & (np.arange(1000) % 20 == 0)).astype(int), "common": np.arange(1000) % 3 == 0})
    assert audit_folds(df, ["rare", "common"], "who", make_folds(df, ["rare", "common"], "who")).rare_count.eq(1).all()


TOY = pd.DataFrame({"who": ["a", "b", "b"], "ill": [0, 1, 0]}, index=[10, 11, 12])


@pytest.mark.parametrize("change, kwargs, words", [
    ({}, dict(labels=["ill", "any"]), "column 'any' is not in the table, which has ['who', 'ill']"),
    ({}, dict(group="patient"), "column 'patient' is not in the table"),
    (dict(who=["a", None, "b"]), {}, "'who' is missing in 1 of 3 rows, the first at index 11"),
    (dict(who=[1., 2., np.nan]), {}, "'who' is missing in 1 of 3 rows, the first at index 12"),
    (dict(ill=[0, 1, 2]), {}, "label 'ill' is 2 at index 12: wanted 0 or 1 (1 such rows)"),
    (dict(ill=[0, np.nan, .5]), {}, "label 'ill' is nan at index 11: wanted 0 or 1 (2 such rows)"),
    (dict(ill=["0", "1", "0"]), {}, "label 'ill' is '0' at index 10"),
    ({}, dict(n_folds=1), "n_folds is 1: wanted 2 to 2, the number of groups in 'who'"),
    ({}, dict(n_folds=3), "n_folds is 3: wanted 2 to 2"),
    (dict(who=["a", "b", "c"]), dict(n_folds=2.5), "n_folds is 2.5: wanted 2 to 3"),
])
def test_bad_input_is_named(change, kwargs, words):
    with pytest.raises(ValueError) as error:
        make_folds(TOY.assign(**change), **{"labels": ["ill"], "group": "who", "n_folds": 2, **kwargs})
    assert words in str(error.value) and "np." not in str(error.value)


# --- audit --------------------------------------------------------------------------------------------------------

def test_audit_counts():
    df = pd.DataFrame({"who": list("aabbc"), "ill": [1, 0, 1, 1, 0], "never": 0, "fold": [0, 0, 1, 1, 1]})
    audit = audit_folds(df, ["ill", "never"], "who", "fold")
    assert audit.loc[0, ["rows", "groups", "ill_count", "ill_groups"]].tolist() == [2, 1, 1, 1]
    assert audit.loc[1, ["rows", "groups", "ill_count", "ill_groups"]].tolist() == [3, 2, 2, 1]
    assert audit.ill_prevalence.tolist() == pytest.approx([1 / 2, 2 / 3])
    assert audit.ill_deviation.tolist() == pytest.approx([.5 / .6 - 1, 2 / 3 / .6 - 1])
    assert audit.rows_deviation.tolist() == pytest.approx([-.2, .2])
    assert (audit.never_deviation == 0).all()
    assert largest_deviation(audit).to_dict() == pytest.approx({"rows": .2, "ill": 1 / 6, "never": 0})


def test_audit_matches_a_series_by_index(heads):
    fold = make_folds(heads, LABELS, "patient")
    want = audit_folds(heads.assign(fold=fold), LABELS, "patient", "fold")
    pd.testing.assert_frame_equal(audit_folds(heads, LABELS, "patient", fold.sample(frac=1, random_state=0)), want)
    pd.testing.assert_frame_equal(audit_folds(heads, LABELS, "patient", fold.to_numpy()), want)


@pytest.mark.parametrize("fold, words", [
    (pd.Series([0, 1]), "fold is missing in 3 of 3 rows, the first at index 10"),
    (pd.Series([0, 1, 1], index=[10, 11, 11]), "fold has index 11 more than once"),
    ([0, 1], "fold has shape (2,): wanted (3,)"),
    ([0, np.nan, np.nan], "fold is missing in 2 of 3 rows, the first at index 11"),
    ("fold", "column 'fold' is not in the table"),
])
def test_audit_refuses(fold, words):
    with pytest.raises(ValueError) as error: audit_folds(TOY, ["ill"], "who", fold)
    assert words in str(error.value) and "np." not in str(error.value)


def test_leak_names_groups_and_folds(heads):
    fold = make_folds(heads, LABELS, "patient")
    victim = heads.patient.iloc[0]
    fold.iloc[0] = (fold.iloc[0] + 1) % 5
    with pytest.raises(LeakageError) as error: audit_folds(heads, LABELS, "patient", fold)
    assert "1 of 2000 groups ('patient')" in str(error.value) and f"{victim} in folds" in str(error.value)
    with pytest.raises(LeakageError, match=victim): check_no_leak(heads.patient, fold)


def test_check_no_leak():
    check_no_leak(["a", "b", "a"], [0, 1, 0])
    check_no_leak(pd.Series(["a", "b"], index=[1, 2]), pd.Series([1, 0], index=[2, 1]))
    with pytest.raises(LeakageError, match="7 in folds 0, 2"): check_no_leak(np.array([7, 7, 8]), np.array([2, 0, 1]))
    with pytest.raises(LeakageError, match="20 of 20 groups .*; \\.\\.\\."): check_no_leak(list(range(20)) * 2, [0] * 20 + [1] * 20)
    for missing in (None, np.nan):
        with pytest.raises(ValueError, match="groups.* is missing in 1 of 2 rows"): check_no_leak(["a", missing], [0, 1])
    assert issubclass(LeakageError, ValueError)


def test_plot(heads):
    audit = audit_folds(heads, LABELS, "patient", make_folds(heads, LABELS, "patient"))
    ax = plot_folds(audit)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["rows", *LABELS]
    assert len(ax.texts) == 5 * 7 and f"{largest_deviation(audit).max():.1%}" in ax.get_title()
    matplotlib.pyplot.close(ax.figure)
