"Duplicates: the same pixels, the same look, and a patient who was sent twice."
import shutil
import warnings
from dataclasses import replace

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
from hypothesis import given, settings, strategies as st

from rsna_helpers import dicom
from rsna_helpers.core import start
from rsna_helpers.duplicates import find_duplicates, hash_distance, hash_stacks, identical_pairs, likeness, near_pairs, picture_hash, pixel_hash
from rsna_helpers.npy import load_index, load_stack
from rsna_helpers.validation import LeakageError, create_folds


def test_pixel_hash_knows_values_and_shape_only():
    px = np.random.default_rng(0).integers(-1000, 2000, (40, 30)).astype(np.int16)
    same = [np.asfortranarray(px), px.astype(">i2"), px.astype(float) + .2, px.astype(np.int32), np.repeat(px, 2, 1)[:, ::2]]
    assert {pixel_hash(p) for p in same} == {pixel_hash(px)}
    other = px.copy(); other[-1, -1] += 1
    assert len({pixel_hash(p) for p in (px, other, px.T, px.reshape(30, 40), px[:-1])}) == 5


@pytest.mark.parametrize("value", [-2000, 0, 40, 3000])
def test_a_constant_picture_has_no_look(value): assert picture_hash(np.full((128, 128), value, np.int16)) is None


@given(st.integers(0, 2**32 - 1), st.integers(0, 256))
@settings(max_examples=30, deadline=None)
def test_distance_counts_bits(seed, n):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 2**64, 4, dtype=np.uint64)
    turned = np.zeros(256, np.uint8); turned[rng.choice(256, n, replace=False)] = 1
    assert hash_distance(a, a ^ np.packbits(turned).view(np.uint64)) == n


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=12))
@settings(max_examples=60, deadline=None)
def test_identical_pairs_link_all_groups_of_an_image(rows):
    pixels, group = [str(a) for a, _ in rows], [str(b) for _, b in rows]
    pairs = identical_pairs(pixels, group)
    assert all(pixels[a] == pixels[b] and group[a] != group[b] for a, b in zip(pairs.a, pairs.b))
    for image in set(pixels): assert sum(pixels[a] == image for a in pairs.a) == len({g for p, g in zip(pixels, group) if p == image}) - 1


def test_near_pairs_against_all_pairs():
    rng = np.random.default_rng(1)
    seeds = rng.integers(0, 2**64, (40, 4), dtype=np.uint64)
    noise = np.packbits(rng.random((120, 256)) < .03, axis=1).view(np.uint64)
    hashes, group = seeds[np.arange(120) % 40] ^ noise, np.arange(120) % 40 + 40 * (np.arange(120) >= 80)
    found = near_pairs(hashes, group)
    every = {(a, b) for a in range(120) for b in range(a + 1, 120) if group[a] != group[b] and hash_distance(hashes[a], hashes[b]) <= 24}
    got = set(zip(found.a, found.b))
    assert got <= every and len(got) >= .95 * len(every) > 50
    assert found.distance.is_monotonic_increasing and (found.distance == [hash_distance(hashes[a], hashes[b]) for a, b in zip(found.a, found.b)]).all()


def heads_of(run): # middle slices of all patients
    index = load_index(run).query("position >= 0")
    return [load_stack(run, r.study)[r.position] for r in index[index.position == index.n_slices // 2].drop_duplicates("patient").itertuples()]


def test_a_changed_copy_looks_the_same_and_another_patient_does_not(run):
    heads = heads_of(run); side = len(heads[0]); rng = np.random.default_rng(0)
    for k, hu in enumerate(heads):
        copies = [hu + rng.normal(0, 5, hu.shape).astype(np.int16) * (hu > -900), cv2.warpAffine(hu, np.float32([[.93, 0, .05 * side], [0, .93, .02 * side]]), (side, side), borderValue=-1000)]
        for copy in copies: assert hash_distance(picture_hash(hu), picture_hash(copy)) <= 40 and likeness(hu, copy) > .8
        for other in heads[:k]: assert hash_distance(picture_hash(hu), picture_hash(other)) > 24 and likeness(hu, other) < .8


def test_real_head_is_told_from_its_neighbours(samples):
    slices = [dicom.read_image(p)[0] for p in sorted((samples/"ge_head").glob("*.dcm"))]
    looks = [picture_hash(s) for s in slices]; middle = slices[len(slices) // 2]; look = looks[len(slices) // 2]
    assert sum(l is None for l in looks) < len(looks) / 2 and len({pixel_hash(s) for s in slices}) == len(slices)
    exported = cv2.imdecode(cv2.imencode(".jpg", np.clip((middle + 20) / 120 * 255, 0, 255).astype(np.uint8))[1], 0) / 255. * 120 - 20
    assert hash_distance(look, picture_hash(exported)) <= 24 and likeness(middle, exported) > .8
    rest = [s for k, (s, l) in enumerate(zip(slices, looks)) if l is not None and abs(k - len(slices) // 2) > 1]     # the next slice is 1 mm away, and alike
    assert len(rest) > 10 and all(likeness(middle, s) < .8 for s in rest)


def test_real_slice_in_many_transfer_syntaxes(samples):
    folder = samples/"transfer_syntaxes"
    lossless = {pixel_hash(dicom.read_image(p)[0]) for p in folder.glob("CTImage.dcm_*") if p.name.endswith(("1.2.840.10008.1.2.dcm", "1.2.1.dcm", "1.2.5.dcm", "4.57.dcm", "4.70.dcm", "4.80.dcm", "4.90.dcm"))}
    assert len(lossless) == 1


@pytest.fixture(scope="module")
def sent_twice(run, tmp_path_factory):
    "A copy of the raw data of four patients. One is there a second time under other names, and some of his slices a third time, which are cropped otherwise."
    index = load_index(run).query("split == 'train' and position >= 0")
    few = index[index.patient.isin(sorted(index.patient.unique())[:4])]; raw = tmp_path_factory.mktemp("twice")/"raw"
    victim = few[few.study == few.study.iloc[0]]
    labels = pd.read_csv(run.task.label_file(run.raw)); image = labels.ID.str.rpartition("_")[0]
    folders = {p: (raw/p).parent for p in few.path}
    for f in set(folders.values()): f.mkdir(parents=True)
    for p in few.path: shutil.copy(run.raw/p, raw/p)
    renamed, again = {"again": {}, "part": {}}, []
    for k, (who, rows) in enumerate({"again": victim, "part": victim[victim.position > victim.position.max() * .4]}.items()):
        for n, (name, p) in enumerate(zip(rows.image, rows.path)):
            ds = pydicom.dcmread(run.raw/p, force=True); renamed[who][name] = f"ID_000{k}{n:05x}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")              # the names of the competition are no valid UIDs
                ds.PatientID, ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = f"ID_{who}", f"ID_{who}_study", f"ID_{who}_series", renamed[who][name]
                ds.save_as((raw/p).with_name(renamed[who][name] + ".dcm"))
        again.append(labels[image.isin(renamed[who])].assign(ID=lambda d: d.ID.str.rpartition("_")[0].map(renamed[who]) + "_" + d.ID.str.rpartition("_")[2]))
    pd.concat([labels[image.isin(few.image)], *again]).to_csv(run.task.label_file(raw), index=False)
    test = index.path.iloc[0].replace("train", "test"); (raw/test).parent.mkdir(); shutil.copy(run.raw/index.path.iloc[0], raw/test)
    shutil.copy(run.task.sample_file(run.raw), run.task.sample_file(raw))
    return replace(start(raw=raw, profile="test", verbose=False), data=raw.parent/"data"), victim, renamed


def test_a_patient_sent_twice_is_found_and_kept_together(sent_twice):
    run, victim, renamed = sent_twice
    pairs, counts = find_duplicates(run)
    found = {frozenset(p) for p in zip(pairs.image_a[pairs.identical], pairs.image_b[pairs.identical])}
    hashes = hash_stacks(run, progress=False); telling = victim.image[~hashes.blank.loc[victim.image].to_numpy()]
    assert found >= {frozenset((a, renamed["again"][a])) for a in telling} and counts["identical"] == pairs.identical.sum()
    part = [a for a in telling if a in renamed["part"]]
    assert not set(hashes.pixels[part]) & set(hashes.pixels[[renamed["part"][a] for a in part]])     # other pixels in the stack, the same in the file
    assert np.mean([any({renamed["part"][a], b} in found for b in (a, renamed["again"][a])) for a in part]) > .8
    folds = create_folds(run, 3)
    assert set(folds.patient[folds.group == folds.group[victim.image.iloc[0]]]) == {"ID_again", "ID_part", victim.patient.iloc[0]}
    assert folds.group.nunique() == 4 and folds.patient.nunique() == 6


def test_given_folds_that_tear_them_apart_are_refused(sent_twice):
    run, victim, _ = sent_twice
    apart = {p: k % 2 for k, p in enumerate(sorted(create_folds(run, 3).patient.unique()))}
    apart[victim.patient.iloc[0]] = 1 - apart["ID_again"]
    with pytest.raises(LeakageError, match="'group'"): create_folds(run, given=apart)
    assert set(create_folds(run, 3).fold) == {0, 1, 2}                     # what was refused is not kept
    assert set(create_folds(run, given=apart, pictures=False).fold) == {0, 1}
    assert set(create_folds(run).fold) == {0, 1}                           # what was taken is
    (run.data/"folds_given.parquet").unlink()
    assert set(create_folds(run, 3).fold) == {0, 1, 2}
