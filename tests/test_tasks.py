"Label tables and submissions of the hemorrhage task, with what real files hold and what broken ones may."
import itertools

import numpy as np
import pandas as pd
import pytest

from rsna_helpers.tasks import get_task

TASK = get_task("hemorrhage")
L = list(TASK.labels)


def table(n, seed=0):
    y = (np.random.default_rng(seed).random((n, 5)) < .2).astype(int)
    return pd.DataFrame(np.c_[y, y.max(1)], columns=L, index=pd.Index([f"ID_{i:09x}" for i in range(n)], name="image"))


def long(df): return pd.DataFrame({"ID": [f"{i}_{l}" for i, l in itertools.product(df.index, L)], "Label": df[L].to_numpy().ravel()})


def test_labels_come_back_whatever_the_order_of_rows(tmp_path):
    y = table(50); f = tmp_path/"t.csv"; long(y).sample(frac=1, random_state=0).to_csv(f, index=False)
    got = TASK.read_labels(f)
    assert list(got.columns) == L and got.attrs["repeated"] == 0
    pd.testing.assert_frame_equal(got.loc[y.index], y, check_dtype=False)


def test_repeated_rows_are_dropped_and_counted_contradictions_are_not(tmp_path):
    y = table(10); rows = long(y); f = tmp_path/"t.csv"
    pd.concat([rows, rows[:24]]).to_csv(f, index=False)                       # as in stage 1: 4 images x 6
    assert TASK.read_labels(f).attrs["repeated"] == 24 and len(TASK.read_labels(f)) == 10
    bad = rows[:1].assign(Label=1 - rows.Label[0]); pd.concat([rows, bad]).to_csv(f, index=False)
    with pytest.raises(ValueError, match=f"contradict.*{rows.ID[0]}"): TASK.read_labels(f)


@pytest.mark.parametrize("spoil, message", [
    (lambda r: r[1:], "lack a value"), (lambda r: r.assign(Label=r.Label + .5), "0 or 1"), (lambda r: r.rename(columns={"ID": "id"}), "no column ID"),
    (lambda r: r.assign(ID=r.ID.str.replace("epidural", "extradural")), "unknown label in ID ID_000000000_extradural"),
    (lambda r: r.assign(Label=np.where(r.ID.str.endswith("_any"), 0, 1)), "`any` is not the maximum")])
def test_a_broken_label_table_is_named(tmp_path, spoil, message):
    f = tmp_path/"t.csv"; spoil(long(table(5))).to_csv(f, index=False)
    with pytest.raises(ValueError, match=message) as e: TASK.read_labels(f)
    assert "t.csv" in str(e.value)


def test_what_is_no_table_is_named(tmp_path):
    f = tmp_path/"t.csv"
    with pytest.raises(FileNotFoundError, match="t.csv"): TASK.read_labels(f)
    f.write_bytes(b""); pytest.raises(ValueError, TASK.read_labels, f)
    f.write_bytes(bytes(range(128, 256))*9); pytest.raises(ValueError, TASK.read_labels, f)


def test_submission_goes_out_in_the_order_of_the_sample_and_comes_back(tmp_path):
    p = table(20).astype(float)*.8 + .1; order = p.index[::-1]; f = tmp_path/"submission.csv"
    TASK.write_submission(p, f, order)
    csv = pd.read_csv(f)
    assert list(csv.columns) == ["ID", "Label"] and csv.ID[0] == f"{order[0]}_{L[0]}" and len(csv) == 120
    pd.testing.assert_frame_equal(TASK.check_submission(f, order), p.loc[order], check_names=False)


@pytest.mark.parametrize("spoil, message", [
    (lambda c: c[1:], "1 ids are missing"), (lambda c: pd.concat([c, c[:2]]), "2 ids stand twice"), (lambda c: c.assign(Label=c.Label*3), "outside 0..1"),
    (lambda c: c.assign(Label=c.Label.where(c.index != 3)), "1 values are not numbers"), (lambda c: pd.concat([c, c[:1].assign(ID="ID_x_any")]), "1 ids were not asked for: ID_x_any")])
def test_a_submission_that_would_be_refused_is_refused_here(tmp_path, spoil, message):
    p = table(5).astype(float)*.5 + .4; f = tmp_path/"s.csv"; TASK.write_submission(p, f)
    spoil(pd.read_csv(f)).to_csv(f, index=False)
    with pytest.raises(ValueError, match=message): TASK.check_submission(f, p.index)


def test_predictions_that_lack_an_image_are_not_written(tmp_path):
    p = table(5).astype(float)
    with pytest.raises(ValueError, match="1 ids are missing"): TASK.write_submission(p[1:], tmp_path/"s.csv", p.index)
    assert not (tmp_path/"s.csv").exists()


def test_score_matches_frames_by_name():
    y = table(40); p = (y*.7 + .15).sample(frac=1, axis=0, random_state=1)[L[::-1]]
    assert TASK.score(y, p) == pytest.approx(TASK.score(y.to_numpy(), p.loc[y.index, L].to_numpy()))
    with pytest.raises(ValueError, match="missing"): TASK.score(y, p[1:])
