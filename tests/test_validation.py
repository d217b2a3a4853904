"Folds: no patient split, every label even, the same whatever the order of the rows."
import itertools
import json

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from rsna_helpers.validation import (LeakageError, _deal, _gate, _shares, _trade, audit, audit_folds, best_possible, check_no_leak, create_folds,
                                     deviations, evenness, import_folds, largest_deviation, link_groups, make_folds, make_holdout, plot_audit,
                                     plot_folds, stratifiers)

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
    "17,000 patients: every label within 0.3 % by images; by patients as near as whole patients allow."
    df = head_table(17_000)
    fold = make_folds(df, LABELS, "patient")
    assert len(df) > 600_000 and (largest_deviation(audit_folds(df, LABELS, "patient", fold)) <= .003).all()
    even = evenness(df, LABELS, "patient", fold)
    assert (even.reached <= even.best_possible + .0005).all() and (even.groups_reached <= even.groups_best_possible + .003).all()


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
    fold = _deal(shares, np.ones(5), np.arange(len(keys)))
    uneven = lambda fold: sum(((shares[fold == k].sum(0) - shares.sum(0) / 5) ** 2).sum() for k in range(5))
    assert uneven(_trade(shares, fold, np.ones(5), np.random.default_rng(0))) < .1 * uneven(fold)


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


def test_deviations_by_groups():
    df = pd.DataFrame({"who": list("aabbcd"), "ill": [1, 0, 1, 1, 0, 1], "fold": [0, 0, 1, 1, 1, 0]})
    found = deviations(audit_folds(df, ["ill"], "who", "fold"), "groups")
    assert found.groups.tolist() == pytest.approx([2 / 3 / (4 / 6) - 1] * 2)
    assert found.ill.tolist() == pytest.approx([2 / 2 / .75 - 1, 1 / 2 / .75 - 1])


def test_another_seed_gives_folds_that_have_nothing_to_do_with_these(heads):
    from sklearn.metrics import adjusted_rand_score
    a, b = (make_folds(heads, LABELS, "patient", seed=s).groupby(heads.patient).first() for s in (1, 2))
    assert abs(adjusted_rand_score(a, b)) < .01


# --- what is possible ---------------------------------------------------------------------------------------------

@given(st.lists(st.integers(0, 12), min_size=1, max_size=7), st.integers(2, 3))
@settings(max_examples=80, deadline=None)
def test_no_partition_beats_the_bound(brings, n_folds):
    total, best = sum(brings), np.inf
    for deal in itertools.product(range(n_folds), repeat=len(brings)):
        sums = np.bincount(deal, brings, minlength=n_folds)
        if total: best = min(best, abs(sums * n_folds / total - 1).max())
    assert best_possible(brings, n_folds) <= (best if total else 0) + 1e-12


@pytest.mark.parametrize("brings, n_folds, bound", [([1] * 10, 5, 0), ([1] * 11, 5, 3 / 2.2 - 1), ([8, 1, 1, 1, 1], 2, 1 / 3), ([4, 4, 4], 5, 1), ([5] * 7, 3, 15 / (35 / 3) - 1), ([0, 0], 2, 0)])
def test_bound_is_sharp_here(brings, n_folds, bound): assert best_possible(brings, n_folds) == pytest.approx(bound)


def test_evenness_is_never_better_than_possible(heads):
    for folds in (2, 5, 9):
        even = evenness(heads, LABELS, "patient", make_folds(heads, LABELS, "patient", folds))
        assert (even.reached >= even.best_possible - 1e-12).all() and (even.groups_reached >= even.groups_best_possible - 1e-12).all()
    assert even.loc["rows", "positives"] == len(heads) and even.loc["any", "groups"] == heads[heads["any"] == 1].patient.nunique()


# --- stratifiers, hold-out, given folds ---------------------------------------------------------------------------

def test_stratifiers_are_spread(heads):
    who = pd.Series(np.random.default_rng(0).choice(["GE", "Siemens", None], 2000, p=[.8, .15, .05]), index=heads.patient.unique())
    df = heads.assign(maker=who[heads.patient].to_numpy())
    columns = stratifiers(df, "maker")
    assert list(columns) == ["maker=GE", "maker=Siemens", "maker=missing"] and (columns.sum(axis=1) == 1).all()
    worst = lambda fold: largest_deviation(audit_folds(df.join(columns), [*LABELS, *columns], "patient", fold))
    assert worst(make_folds(df, LABELS, "patient"))[list(columns)].max() > .02
    fold = make_folds(df, LABELS, "patient", stratify=["maker"])
    assert (worst(fold) < .02).all()
    assert make_folds(df.iloc[::-1], LABELS, "patient", stratify="maker").loc[df.index].equals(fold)
    with pytest.raises(ValueError, match="column 'x' has 200 values: wanted at most 50"): make_folds(TOY.loc[[10] * 200].assign(x=range(200), who=range(200)), ["ill"], "who", stratify=["x"])
    with pytest.raises(ValueError, match="column 'bone' is not in the table"): make_holdout(heads, LABELS, "patient", stratify=["bone"])


@pytest.mark.parametrize("share", [.03, .15, .5, .8])
def test_holdout(heads, share):
    held = make_holdout(heads, LABELS, "patient", share)
    assert held.dtype == bool and abs(held.mean() - share) < .002
    check_no_leak(heads.patient, held)
    counts = audit_folds(heads, LABELS, "patient", held, {True: share, False: 1 - share})
    assert (counts.rows_deviation.abs() < .01).all()
    for label in LABELS:
        expected = heads[label].mean() * counts.rows
        assert ((counts[f"{label}_count"] - expected).abs() <= np.maximum(1.5, .005 * expected)).all()
    assert make_holdout(heads.iloc[::-1], LABELS, "patient", share).loc[heads.index].equals(held)
    assert not make_holdout(heads, LABELS, "patient", share, seed=1).equals(held)


@pytest.mark.parametrize("share", [0, 1, -.1, 20, float("nan")])
def test_holdout_refuses(share):
    with pytest.raises(ValueError, match="wanted a number between 0 and 1"): make_holdout(TOY, ["ill"], "who", share)


def test_holdout_of_less_than_a_patient():
    with pytest.raises(ValueError, match="2 groups in 'who' are too few"): make_holdout(TOY, ["ill"], "who", .001)
    with pytest.raises(ValueError, match="1 groups in 'who' are too few"): make_holdout(TOY.assign(who="a"), ["ill"], "who", .5)


@pytest.fixture
def named(heads): return heads.rename_axis("image"), make_folds(heads, LABELS, "patient")


def test_import_folds(named, tmp_path):
    df, fold = named
    by_patient = fold.groupby(df.patient).first()
    same = lambda given: pd.testing.assert_series_equal(import_folds(df, "patient", given), fold, check_dtype=False, check_names=False, check_index_type=False)
    for given in (fold.sample(frac=1, random_state=0), by_patient.to_dict(), by_patient.reset_index(), by_patient.to_frame(), fold.rename_axis("image").reset_index(),
                  fold.rename_axis("image").to_frame(), df.assign(fold=fold)): same(given)
    fold.rename_axis("image").to_csv(tmp_path/"images.csv"); same(tmp_path/"images.csv")
    df.assign(fold=fold)[["patient", "fold"]].to_csv(tmp_path/"patients.csv", index=False); same(str(tmp_path/"patients.csv"))
    assert import_folds(df, "patient", fold.map({0: "valid"}).fillna("train")).nunique() == 2


def test_import_folds_refuses(named, tmp_path):
    df, fold = named
    with pytest.raises(LeakageError, match="2000 of 2000 groups"): import_folds(df, "patient", pd.Series(np.arange(len(df)) % 5, index=df.index))
    twice = pd.DataFrame({"patient": [*df.patient.unique(), df.patient.iloc[0]], "fold": [0] * 2000 + [1]})
    with pytest.raises(LeakageError, match=f"{df.patient.iloc[0]} in folds 0, 1"): import_folds(df, "patient", twice)
    with pytest.raises(ValueError, match="fold is missing in"): import_folds(df, "patient", {df.patient.iloc[0]: 1})
    with pytest.raises(ValueError, match="wanted 'fold' and 'image' or 'patient'"): import_folds(df, "patient", pd.DataFrame({"who": [1], "fold": [1]}))
    (tmp_path/"no.csv").write_text("image,part\n1,2\n")
    with pytest.raises(ValueError, match="no.csv: no column fold"): import_folds(df, "patient", tmp_path/"no.csv")


# --- who is the same, and the whole audit -------------------------------------------------------------------------

def test_link_groups_is_transitive_and_knows_no_order():
    df = pd.DataFrame({"patient": list("abcdef"), "study": [1, 1, 2, 2, None, None]})
    assert link_groups(df, ["patient"]).tolist() == list("abcdef")
    assert link_groups(df, ["patient", "study"]).tolist() == list("aaccef")
    linked = link_groups(df, ["patient", "study"], [("b", "c"), ("f", "e"), ("nobody", "a")])
    assert linked.tolist() == list("aaaaee")
    assert link_groups(df.iloc[::-1], ["patient", "study"], [("c", "b"), ("e", "f")]).loc[df.index].equals(linked)
    with pytest.raises(ValueError, match="'patient' is missing in 1 of 6"): link_groups(df.assign(patient=[None, *"bcdef"]), ["patient"])


def pairs_of(df, *rows):
    return pd.DataFrame([dict(image_a=a, image_b=b, group_a=df.patient[a], group_b=df.patient[b], distance=3, likeness=.9, identical=same) for a, b, same in rows])


def test_audit_tells_image_level_folds(heads):
    df = heads.assign(study=heads.patient + "." + (heads.groupby("patient").cumcount() // 25).astype(str))
    by_image = audit(df, LABELS, "patient", np.random.default_rng(0).integers(0, 5, len(df)), ["study"])
    assert not by_image["sound"] and "dealt by image, not by patient: 100% of the 2,000" in by_image["findings"][0]
    by_study = audit(df, LABELS, "patient", make_folds(df, LABELS, "study"), ["study"])
    assert not by_study["sound"] and "dealt by study, not by patient" in by_study["findings"][0] and len(by_study["findings"]) == 1
    fold = make_folds(df, LABELS, "patient")
    good = audit(df, LABELS, "patient", fold, ["study"])
    assert good["sound"] and good["findings"] == [] and good["deviation"]["rows"] == largest_deviation(audit_folds(df, LABELS, "patient", fold)).to_dict()
    fold.iloc[0] = (fold.iloc[0] + 1) % 5
    one = audit(df, LABELS, "patient", fold)
    assert not one["sound"] and "1 of 2,000 values of 'patient' are in more than one fold: " + df.patient.iloc[0] in one["findings"][0]
    assert json.loads(json.dumps(good, default=int))["rows"] == len(df)


def test_audit_of_pictures(heads):
    fold = make_folds(heads, LABELS, "patient")
    other, same = heads.index[fold != fold.iloc[0]][0], heads.index[(fold == fold.iloc[0]) & (heads.patient != heads.patient.iloc[0])][0]
    counts = dict(blank=7, blank_identical=2, not_looked_at=0)
    look = audit(heads, LABELS, "patient", fold, duplicates=(pairs_of(heads, (0, other, False), (0, same, True)), counts))
    assert look["sound"] and look["images"]["similar_in_two_folds"] == 1 and look["images"]["identical_in_two_folds"] == 0
    assert any("look the same" in f for f in look["findings"]) and any("2 of them equal" in f and "no leak" in f for f in look["findings"])
    leak = audit(heads, LABELS, "patient", fold, duplicates=(pairs_of(heads, (0, other, True)), counts))
    assert not leak["sound"] and f"0 ({heads.patient[0]}) and {other} ({heads.patient[other]})" in leak["findings"][0]


def test_plot_audit(heads):
    for fold, words in ((make_folds(heads, LABELS, "patient"), "Sound: no patient in two folds"), (np.arange(len(heads)) % 5, "LEAK, in more than one fold: 2,000 of 2,000 (patient)")):
        fig = plot_audit(audit(heads, LABELS, "patient", fold))
        assert fig._suptitle.get_text() == words and len(fig.axes) == 2
        matplotlib.pyplot.close(fig)


def test_gate():
    folds = pd.DataFrame(dict(patient=["a", "b", "b"], study=[1, 2, 3], group=["a", "b", "b"], fold=[0, 1, 1]))
    assert _gate(folds) is folds
    with pytest.raises(LeakageError, match="'group'.*a in folds 0, 1"): _gate(folds.assign(group="a"))
    with pytest.raises(LeakageError, match="'study'.*2 in folds 0, 1"): _gate(folds.assign(study=2))


def test_create_folds(run):
    folds = create_folds(run)
    assert list(folds.columns) == ["patient", "study", "group", "fold"] and create_folds(run).equals(folds)
    note = json.loads((run.data/"folds.json").read_text())["result"]
    assert note["audit"]["sound"] and note["images"] == len(folds) and set(note["even"]) >= {"reached", "best_possible"}


def test_plot(heads):
    audit = audit_folds(heads, LABELS, "patient", make_folds(heads, LABELS, "patient"))
    ax = plot_folds(audit)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["rows", *LABELS]
    assert len(ax.texts) == 5 * 7 and f"{largest_deviation(audit).max():.1%}" in ax.get_title()
    matplotlib.pyplot.close(ax.figure)
