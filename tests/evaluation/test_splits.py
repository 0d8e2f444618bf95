"""The draws: stratified, nested, paired, free of duplicates on both sides; and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Featx, class_folders
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray
from PIL import Image
from sklearn.model_selection import cross_val_score

from featx.errors import UsageError
from featx.evaluation.duplicates import find_duplicates
from featx.evaluation.splits import KShotSplit, Shots, plan_shots
from featx.evaluation.sweep import sweep_heads
from featx.heads.catalogue import make_head
from featx.heads.folds import fold_numbers
from featx.models.fit import fit_head
from featx.store.reader import read_features


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(7, 30), min_size=2, max_size=5),
    seed=st.integers(0, 2**32 - 1),
    copies=st.integers(1, 3),
)
def test_draws_are_stratified_nested_and_free_of_copies(sizes: list[int], seed: int, copies: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), np.array(sizes) * copies)
    groups = np.concatenate(
        [1000 * c + np.tile(np.arange(size), copies) for c, size in enumerate(sizes)]
    )  # every image is there `copies` times
    smaller: set[int] = set()
    for n_shots in (1, 3, 6):
        ((support, query),) = KShotSplit(n_shots, n_episodes=1, random_state=seed).split(None, labels, groups)
        assert np.bincount(labels[support]).tolist() == [n_shots] * len(sizes)
        assert len(set(groups[support])) == len(support)
        assert not set(groups[support]) & set(groups[query])
        assert set(labels[query]) == set(range(len(sizes)))
        assert len(query) == len(labels) - copies * len(support)
        assert smaller <= set(support)
        smaller = set(support)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(2, 40), min_size=2, max_size=5), seed=st.integers(0, 1000))
def test_all_holds_out_a_fifth_of_each_class_with_whole_groups(sizes: list[int], seed: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), np.array(sizes) * 2)
    groups = np.concatenate([1000 * c + np.tile(np.arange(size), 2) for c, size in enumerate(sizes)])
    ((support, query),) = KShotSplit("all", n_episodes=1, random_state=seed).split(None, labels, groups)
    assert sorted([*support, *query]) == list(range(len(labels)))
    assert not set(groups[support]) & set(groups[query])
    for c, size in enumerate(sizes):
        assert (labels[query] == c).sum() == 2 * max(1, round(0.2 * size))


def test_few_shots_lie_inside_all() -> None:
    labels = np.repeat([0, 1], 30)
    for few, every in zip(
        KShotSplit(20, n_episodes=5).split(None, labels),
        KShotSplit("all", n_episodes=5).split(None, labels),
        strict=True,
    ):
        assert set(few[0]) <= set(every[0])


def test_an_episode_depends_on_seed_and_number_only() -> None:
    labels = np.repeat(["a", "b", "c"], 12)
    many = list(KShotSplit(2, n_episodes=9, random_state=5).split(None, labels))
    few = list(KShotSplit(2, n_episodes=3, random_state=5).split(None, labels))
    for (a, _), (b, _) in zip(few, many, strict=False):
        np.testing.assert_array_equal(a, b)
    assert len({tuple(support) for support, _ in many}) == 9
    other = list(KShotSplit(2, n_episodes=3, random_state=6).split(None, labels))
    assert all(tuple(a[0]) != tuple(b[0]) for a, b in zip(few, other, strict=True))
    assert KShotSplit(2, n_episodes=9).get_n_splits() == 9


def test_every_image_is_drawn_equally_often() -> None:
    labels = np.repeat([0, 1], 10)
    drawn = np.zeros(20)
    for support, _ in KShotSplit(2, n_episodes=2000).split(None, labels):
        drawn[support] += 1
    assert np.abs(drawn / 2000 - 0.2).max() < 0.04  # 4.5 standard errors


def test_it_is_a_scikit_learn_splitter() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 15)
    rows = rng.normal(size=(3, 8))[labels] * 4 + rng.normal(size=(45, 8))
    scores = cross_val_score(make_head("logreg"), rows, labels, cv=KShotSplit(5, n_episodes=4))
    assert scores.shape == (4,)
    assert scores.mean() > 0.9


def test_a_class_with_too_few_images_is_named_with_both_numbers() -> None:
    with pytest.raises(
        UsageError,
        match=r"^class 'bees' has too few images: expected at least 6 for 5 shots and one query image, found 4\. Ask",
    ):
        next(KShotSplit(5).split(None, ["ants"] * 9 + ["bees"] * 4))
    with pytest.raises(UsageError, match=r"class 'b' has too few images.* found 2 once copies are counted once"):
        next(KShotSplit(2).split(None, ["a"] * 5 + ["b"] * 5, [0, 1, 2, 3, 4, 5, 5, 5, 6, 6]))
    with pytest.raises(UsageError, match=r"at least two classes: expected 2 classes, found only 'a'"):
        next(KShotSplit(1).split(None, ["a", "a", "a"]))
    with pytest.raises(UsageError, match=r"n_shots must be at least 1: found 0"):
        next(KShotSplit(0).split(None, [0, 0, 1, 1]))


def test_one_image_under_two_labels_is_drawn_for_one_of_them_only() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    groups = np.array([0, 1, 2, 3, 0, 4, 5, 6])
    for support, query in KShotSplit(2, n_episodes=50).split(None, labels, groups):
        assert len(set(groups[support])) == 4
        assert not set(groups[support]) & set(groups[query])


def test_classes_that_are_too_small_stay_out_of_a_draw_and_are_named() -> None:
    labels = np.repeat([0, 1, 2, 3], [30, 4, 21, 40])
    groups = np.arange(95)
    names = ["ants", "bees", "cats", "dogs"]

    def plan(*shots: Shots) -> tuple[list[Shots], list[str]]:
        return plan_shots(labels, groups, names, shots=shots or None, default=(1, 2, 5, 20, 30, "all"))

    wanted, notes = plan()
    assert wanted == [1, 2, 5, 20, "all"]  # half of the classes have 30 images, but one is for the query
    assert notes == [
        "n_shots 30 left out: class 'ants' has 30 different images, and n_shots 30 takes 31.",
        "At n_shots 5, 20 only the classes with enough images are compared: 'bees' has only 4 different images. "
        "Add photos there first.",
    ]
    assert plan(1, "all") == ([1, "all"], [])
    assert plan(20, 20)[0] == [20]
    with pytest.raises(UsageError, match=r"class 'bees' has too few images: expected at least 41"):
        plan(40)
    for n_shots in wanted:
        split = KShotSplit(n_shots)
        for episode in range(5):
            support, query = split.episode(labels, groups, episode)
            others = {0, 2, 3} if n_shots in (5, 20) else {0, 1, 2, 3}
            assert set(labels[support]) == set(labels[query]) == others
            assert not set(support) & set(query)
            if n_shots != "all":
                assert (np.bincount(labels[support])[sorted(others)] == n_shots).all()
                assert len(support) + len(query) == np.isin(labels, sorted(others)).sum()
    # The classes that take part are drawn as they were: nested, and the same rows as without the small class.
    few, more = (set(KShotSplit(n).episode(labels, groups, 0)[0]) for n in (2, 20))
    assert {row for row in few if labels[row] != 1} < more


def test_folds_are_stratified_and_keep_groups_together() -> None:
    labels = np.repeat([0, 1, 2], [20, 11, 8])
    groups = np.arange(39)
    groups[1] = groups[0]
    groups[25] = groups[24] = groups[23]
    folds = fold_numbers(labels, groups, 5, 0)
    assert folds[0] == folds[1]
    assert folds[23] == folds[24] == folds[25]
    for c in range(3):
        counts = np.bincount(folds[labels == c], minlength=5)
        assert counts.min() >= 1
        assert np.ptp(counts) <= 3  # groups of up to three rows
    assert fold_numbers(np.array([0, 0, 0, 1, 1]), np.arange(5), 5, 0).max() == 1
    assert fold_numbers(np.array([0, 0, 1]), np.arange(3), 5, 0).tolist() == [0, 0, 0]


def test_duplicates_are_grouped_and_counted() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(10, 64))
    rows[1] = rows[0]  # the same bytes
    rows[2] = rows[0] + 0.01 * rng.normal(size=64)  # nearly the same
    rows[5] = 3.0 * rows[4]  # the same direction
    found = find_duplicates(rows, [0, 0, *range(2, 10)])
    assert found.to_json() == {"exact": 1, "near": 2, "groups": 2}
    assert found.groups[0] == found.groups[1] == found.groups[2]
    assert found.groups[4] == found.groups[5]
    assert len(set(found.groups)) == 7
    only = find_duplicates(rows, [0, 0, *range(2, 10)], by=None)
    assert only.to_json() == {"exact": 1, "near": 0, "groups": 1}


def test_blocks_of_the_duplicate_search_meet() -> None:
    rows = np.random.default_rng(1).normal(size=(1500, 16)).astype(np.float32)
    rows[1400] = rows[3]
    found = find_duplicates(rows, by=0.9999)
    assert found.to_json() == {"exact": 0, "near": 1, "groups": 1}
    assert found.groups[3] == found.groups[1400]


def _partition(groups: NDArray[np.intp]) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(groups == number).tolist()) for number in np.unique(groups)}


def _by_brute_force(rows: NDArray[np.float64], digests: list[int], threshold: float) -> set[frozenset[int]]:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    alike = (unit @ unit.T >= threshold) | np.equal.outer(digests, digests)
    sets = [{i} for i in range(len(rows))]
    for i, j in zip(*np.nonzero(alike), strict=True):
        if sets[i] is not sets[j]:
            sets[i] |= sets[j]
            for k in sets[j]:
                sets[k] = sets[i]
    return {frozenset(members) for members in sets}


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 14), exact=st.integers(0, 4), near=st.integers(0, 6))
def test_copies_are_those_of_brute_force_in_any_order_and_under_any_digests(
    seed: int, n: int, exact: int, near: int
) -> None:
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(n, 40))
    same, alike = rng.integers(0, n, exact), rng.integers(0, n, near)
    rows = np.concatenate([base, base[same], base[alike] + 0.01 * rng.normal(size=(near, 40))])
    digests = np.concatenate([np.arange(n), same, np.arange(n, n + near)])
    order, names = rng.permutation(len(rows)), rng.permutation(n + near)
    rows, digests = rows[order], names[digests[order]]
    found = find_duplicates(rows, digests)
    expected = _by_brute_force(rows, digests.tolist(), 0.98)
    assert _partition(found.groups) == expected
    assert (found.exact, found.near) == (exact, n + near - len(expected))
    first = np.unique(found.groups, return_index=True)[1]
    assert (np.diff(first) > 0).all()  # numbered in the order of their first row


@pytest.mark.slow
def test_every_photo_is_paired_with_its_own_resaved_copy(photos: Path, featx: Featx, tmp_path: Path) -> None:
    """The order that real data has: no two files are equal, and digests are in no order."""
    originals = sorted((photos / "hymenoptera" / "train").rglob("*.jpg"))[::3][:64]
    for number, path in enumerate(originals):
        folder = tmp_path / "photos" / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.open(path).convert("RGB")
        image.save(folder / f"{number:03d}-a.png", compress_level=1)
        image.save(folder / f"{number:03d}-b.jpg", quality=93)
    store = tmp_path / "photos.featx"
    assert featx("extract", tmp_path / "photos", "--out", store).code == 0
    groups = featx("duplicates", store, "--json", "--threshold", "0.95").json["groups"]
    pairs = [sorted(Path(image["id"]).stem[:3] for image in group["images"]) for group in groups]
    assert len(pairs) >= 0.9 * len(originals)
    assert all(len(set(pair)) == 1 and len(pair) == 2 for pair in pairs)
    features = read_features(store)
    alone = np.array([str(name).endswith(".png") for name in features.ids])
    plan: dict[str, Any] = {"class_names": features.class_names, "heads": ["ridge"], "shots": (5, 10), "n_jobs": 1}
    without = sweep_heads(features.embeddings[alone], features.labels[alone], groups=features.copies[alone], **plan)
    both = sweep_heads(
        features.embeddings, features.labels, groups=features.copies, near_duplicates=0.95, **plan
    )  # fmt: skip
    for a, b in zip(without.results, both.results, strict=True):
        assert b.accuracy.mean <= a.accuracy.high


def test_images_that_two_classes_have_are_in_no_draw_and_named(featx: Featx, tmp_path: Path) -> None:
    labels = np.repeat([0, 1], [12, 9])
    groups = np.array([*range(12), *range(4), *range(12, 17)])
    for n_shots in (1, 4, "all"):
        for support, query in KShotSplit(n_shots, n_episodes=20).split(None, labels, groups):
            assert not set(groups[[*support, *query]]) & set(range(4))
            assert set(labels[query]) == set(labels[support]) == {0, 1}
    folds = fold_numbers(labels, groups, 4, 0)
    assert all(set(labels[folds != fold]) == {0, 1} for fold in range(4))
    with pytest.raises(UsageError, match=r"class '1' has too few images: .* found 0, as 4 are in other classes too"):
        next(KShotSplit(1).split(None, labels[:16], groups[:16]))
    class_folders(tmp_path / "photos", ["ants"], each=12)
    class_folders(tmp_path / "photos", ["bees"], each=4)
    assert featx("extract", tmp_path / "photos", "--out", tmp_path / "s.featx").code == 0
    ran = featx("sweep", tmp_path / "s.featx", "--json")
    assert ran.code == 2
    assert "class 'bees' has too few images" in json.dumps(ran.json)


def test_equal_rows_are_copies_where_no_groups_are_given() -> None:
    rows = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    rows, labels = np.repeat(rows, 2, axis=0), np.repeat([0, 1], 12)
    groups = np.repeat(np.arange(12), 2)
    safe = KShotSplit(2, n_episodes=5).split(rows, labels)
    told = KShotSplit(2, n_episodes=5).split(None, labels, groups)
    for ours, theirs in zip(safe, told, strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1], theirs[1])
        assert not set(groups[ours[0]]) & set(groups[ours[1]])


def test_pairs_above_a_cosine_of_0_9_that_are_no_copies_are_counted_in_a_note() -> None:
    rng = np.random.default_rng(3)
    rows = np.repeat(rng.normal(size=(20, 60)), 2, axis=0)
    rows[1::2] += 0.3 * rng.normal(size=(20, 60))
    labels = np.repeat([0, 1], 20)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = np.triu(unit @ unit.T, 1)
    expected = int((cosine >= 0.9).sum())
    assert expected >= 10
    assert cosine.max() < 0.98
    swept = sweep_heads(rows, labels, class_names="ab", heads=["ridge"], shots=(2,), episodes=2, n_jobs=1)
    fitted = fit_head(rows, labels, class_names="ab")
    for notes in (swept.notes, fitted.notes):
        assert any(note.startswith(f"{expected} more pairs of images with a cosine above 0.9") for note in notes)


@pytest.mark.slow
def test_random_weights_find_copies_by_their_looks_and_sweep(featx: Featx, tmp_path: Path) -> None:
    class_folders(tmp_path / "photos", each=8)
    first = sorted((tmp_path / "photos" / "ants").iterdir())[0]
    with Image.open(first) as image:
        image.convert("RGB").save(tmp_path / "photos" / "ants" / "again.jpg", quality=90)
    store = tmp_path / "random.featx"
    assert featx("extract", tmp_path / "photos", "--out", store, "--weights", "none").code == 0
    ran = featx("sweep", store, "--heads", "ridge", "--episodes", 2, "--json")
    assert ran.code == 0
    assert ran.json["duplicates"] == {"exact": 0, "near": 1, "groups": 1}
    fitted = featx("fit", store, "--out", tmp_path / "random.model", "--json")  # it would find one image per class
    assert fitted.code == 0, fitted.err
    labels = featx("labels", store, "--json")
    assert labels.code == 0 and labels.json["images"] == 17
