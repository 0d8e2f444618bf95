"""Draws across groups: nothing of a group on both sides, and numbers that hold for groups never seen."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.model_selection import cross_val_score

from featx import GroupKShotSplit, KShotSplit, make_head
from featx.backbones.backbone import load_backbone
from featx.errors import UsageError
from featx.evaluation import stats
from featx.evaluation.forecast import forecast_site
from featx.evaluation.labelled import LabelledRows
from featx.evaluation.splits import joined_sites
from featx.evaluation.sweep import sweep_heads
from featx.extraction.run import extract_features
from featx.heads.catalogue import HEADS
from featx.heads.folds import fold_numbers, site_folds
from featx.heads.selection import fit_chosen
from featx.images.source import ImageSet
from featx.store.reader import read_features

Rows = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.str_]]
NAMES = ["a", "b", "c"]


def cameras(n: int, sites: int, seed: int = 0, shift: float = 0.0, classes: int = 3) -> Rows:
    """Rows of cameras that all saw all classes, each with a shift of its own."""
    rng = np.random.default_rng(seed)
    means = 1.2 * np.random.default_rng(99).normal(size=(classes, 12))
    labels, which = rng.integers(0, classes, n), rng.integers(0, sites, n)
    moved = shift * rng.normal(size=(sites, classes, 12))
    rows = means[labels] + moved[which, labels] + rng.normal(size=(n, 12))
    return rows.astype(np.float32), labels, np.array([f"camera {i}" for i in which])


def bursts(n: int, seed: int, noise: float, per: int = 10, classes: int = 3, dims: int = 40) -> Rows:
    """Bursts of nearly the same row, with one label each, of which a share is wrong."""
    rng = np.random.default_rng(seed)
    means = 0.3 * np.random.default_rng(99).normal(size=(classes, dims))
    truth = rng.integers(0, classes, n)
    rows = np.repeat(means[truth] + rng.normal(size=(n, dims)), per, axis=0) + 0.05 * rng.normal(size=(n * per, dims))
    wrong = (truth + rng.integers(1, classes, n)) % classes
    labels = np.repeat(np.where(rng.random(n) < noise, wrong, truth), per)
    order = rng.permutation(n * per)
    return rows[order].astype(np.float32), labels[order], np.repeat([f"{i:04d}" for i in range(n)], per)[order]


# --- the splitter ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_no_group_straddles_whatever_the_groups_are(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, classes = int(rng.integers(60, 240)), int(rng.integers(2, 5))
    labels = rng.integers(0, classes, n)
    groups = np.array([f"g{i}" for i in rng.integers(0, rng.integers(4, 30), n)])
    groups[rng.random(n) < 0.2] = ""
    rows = rng.normal(size=(n, 3))
    rows[rng.integers(0, n, 8)] = rows[rng.integers(0, n, 8)]  # copies, some with other labels or in other groups
    before: list[set[int]] = []
    for n_shots in (1, 2, 5, "all"):
        draws = list(GroupKShotSplit(n_shots, n_episodes=4, random_state=seed).split(rows, labels, groups))
        assert len(draws) == 4
        for episode, (support, query) in enumerate(draws):
            for i in support:  # by brute force
                same = (groups[query] == groups[i]) & (groups[i] != "")
                assert not same.any()
                assert not (rows[query] == rows[i]).all(axis=1).any()
            counts = np.bincount(labels[support], minlength=classes)
            if n_shots != "all":
                assert (counts == n_shots).all()
                assert len(np.unique(rows[support], axis=0)) == len(support)
            assert set(labels[query]) == set(range(classes))
            assert len(np.intersect1d(support, query)) == 0
            if n_shots == 1:
                before.append(set(support.tolist()))
            else:
                assert before[episode] <= set(support.tolist())
                before[episode] = set(support.tolist())


def test_all_groups_are_judged_sooner_or_later_and_draws_depend_on_seed_and_episode_only() -> None:
    _, labels, groups = cameras(300, 10)
    many = list(GroupKShotSplit("all", n_episodes=60).split(None, labels, groups))
    seen = np.bincount(np.unique(groups[np.concatenate([q for _, q in many])], return_inverse=True)[1])
    assert len(seen) == 10
    few = list(GroupKShotSplit("all", n_episodes=3).split(None, labels, groups))
    assert all(np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) for a, b in zip(few, many, strict=False))
    assert not np.array_equal(many[0][1], many[1][1])
    share = [len(query) / len(labels) for _, query in many]
    assert 0.15 < np.mean(share) < 0.35


def test_a_draw_takes_from_as_many_groups_as_there_are() -> None:
    _, labels, groups = cameras(400, 20)
    for support, _ in GroupKShotSplit(10, n_episodes=5).split(None, labels, groups):
        for c in range(3):
            assert len(set(groups[support[labels[support] == c]])) == 10


def test_it_is_a_splitter_of_scikit_learn() -> None:
    rows, labels, groups = cameras(300, 8)
    split = GroupKShotSplit(5, n_episodes=4, random_state=3)
    scores = cross_val_score(make_head("nearest_centroid"), rows, labels, groups=groups, cv=split)
    assert len(scores) == split.get_n_splits() == 4
    assert scores.mean() > 0.6
    assert repr(split) == "GroupKShotSplit(5, n_episodes=4, random_state=3)"
    with pytest.raises(UsageError, match="GroupKShotSplit takes groups"):
        next(split.split(rows, labels))


def test_copies_join_groups() -> None:
    copies = np.array([0, 0, 1, 2, 3, 4])
    found = joined_sites(np.array(["x", "y", "y", "z", "", ""]), copies)
    assert len(np.unique(found)) == 4
    assert found[0] == found[1] == found[2]
    assert len(set(found[2:])) == 4
    assert np.array_equal(joined_sites(np.array([5, 7, 7, 9, -1, -1]), copies), found)


def refusal(labels: object, groups: object) -> str:
    with pytest.raises(UsageError) as caught:
        next(GroupKShotSplit(1).split(None, np.array(labels), np.array(groups)))
    return str(caught.value)


def test_one_sentence_each_where_groups_cannot_be_held_out() -> None:
    assert "too few groups to hold any out" in refusal([0, 1] * 5, ["one"] * 10)
    assert "groups coincide with classes" in refusal([0, 1, 2] * 5, ["x", "y", "z"] * 5)
    assert "groups coincide with classes" in refusal([0, 1] * 5, ["x", "y"] * 5)


def test_a_giant_group_is_always_learnt_from_and_that_is_said() -> None:
    rows, labels, groups = cameras(300, 6)
    groups[:200] = "giant"
    found = sweep_heads(
        rows, labels, class_names=NAMES, heads=["nearest_centroid"], shots=[5, "all"], episodes=4, sites=groups,
        n_jobs=1, near_duplicates=None, group_name="camera",
    )  # fmt: skip
    assert all("giant" not in groups[query] for query in found.queries.values())
    assert any(note.startswith("One camera has ") and "always learnt from" in note for note in found.notes)


# --- what the numbers are worth -------------------------------------------------------------------------------------


def accuracy(rows: Rows, sites: NDArray[np.str_] | None) -> float:
    found = sweep_heads(
        rows[0], rows[1], class_names=NAMES, heads=["ridge"], shots=["all"], episodes=10, near_duplicates=None,
        sites=sites, n_jobs=1,
    )  # fmt: skip
    return found.results[0].accuracy.mean


@pytest.mark.slow
def test_where_labels_are_random_within_groups_accuracy_is_at_chance() -> None:
    ordinary, across = [], []
    for seed in range(3):
        rng = np.random.default_rng(700 + seed)
        rows, _, groups = bursts(60, seed, 0.0)
        named = dict(zip(np.unique(groups), rng.integers(0, 3, 60), strict=True))
        labels = np.array([named[group] for group in groups])
        ordinary.append(accuracy((rows, labels, groups), None))
        across.append(accuracy((rows, labels, groups), groups))
    assert np.mean(ordinary) > 0.85
    assert abs(np.mean(across) - 1 / 3) < 0.08


@pytest.mark.slow
def test_across_groups_is_the_truth_on_fresh_bursts_and_ordinary_draws_are_far_above() -> None:
    gaps = []
    for seed in range(5):
        rows = bursts(75, seed, 0.2)
        fresh = bursts(300, 1000 + seed, 0.2)
        some = np.isin(rows[2], [f"{i:04d}" for i in range(60)])  # as many bursts as a draw learns from
        copies, sites = np.arange(some.sum()), np.unique(rows[2][some], return_inverse=True)[1]
        _, model = fit_chosen(HEADS["ridge"], rows[0][some], rows[1][some], copies, sites=sites)
        truth = float((model.predict(fresh[0]) == fresh[1]).mean())
        assert accuracy(rows, None) > truth + 0.2
        gaps.append(accuracy(rows, rows[2]) - truth)
    assert abs(np.mean(gaps)) < 0.05


@pytest.mark.slow
def test_intervals_are_over_groups() -> None:
    """Another study of as many cameras finds its mean within the interval in about 95 of 100 cases."""
    truth = np.mean([accuracy(cameras(400, 400, seed, 0.8), None) for seed in range(3)])
    inside, narrow = 0, 0
    for seed in range(30):
        rows, labels, groups = cameras(240, 8, 100 + seed, 0.8)
        options = {"class_names": NAMES, "heads": ["nearest_centroid"], "shots": ["all"], "episodes": 10, "n_jobs": 1}
        found = sweep_heads(rows, labels, near_duplicates=None, sites=groups, **options).results[0].accuracy  # type: ignore[arg-type]
        own = sweep_heads(rows, labels, near_duplicates=None, **options).results[0].accuracy  # type: ignore[arg-type]
        inside += int(found.low <= truth <= found.high)
        narrow += int(own.low <= truth <= own.high)
    assert inside >= 26, (inside, narrow)
    assert narrow < inside


@pytest.mark.slow
def test_bursts_of_photos(photos: Path, tmp_path: Path) -> None:
    """Bursts made of real photos: the photo, nine jittered copies, and one label a burst, of which a fifth is wrong."""
    rng = np.random.default_rng(0)
    lines = ["path,label,group,fresh"]
    for number, name in enumerate(("cats", "dogs")):
        folder = next(path for path in sorted((photos / "cats_dogs").rglob(f"*{name[:3]}*")) if path.is_dir())
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".png"))[:80]
        for i, path in enumerate(files):
            image = Image.open(path).convert("RGB").resize((256, 256))
            label = ("cats", "dogs")[number if rng.random() > 0.2 else 1 - number]
            for k in range(10):
                left, top = rng.integers(0, 24, 2) if k else (12, 12)
                file = f"{name}-{i:03d}-{k}.jpg"
                image.crop((left, top, left + 232, top + 232)).save(tmp_path / file, quality=int(rng.integers(70, 95)))
                lines.append(f"{file},{label},{name}{i},{int(i >= 40)}")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    images = ImageSet.from_source(tmp_path / "list.csv")
    extract_features(images, load_backbone("efficientnet_lite0"), tmp_path / "s.featx")
    features = read_features(tmp_path / "s.featx")
    assert features.group_name == "group"
    fresh = features.metadata["fresh"] == "1"
    assert len(set(features.groups)) == 160
    x, y, groups = features.embeddings[~fresh], features.labels[~fresh], features.groups[~fresh]
    options = {"class_names": features.class_names, "heads": ["ridge"], "shots": ["all"], "n_jobs": 1}
    ordinary = sweep_heads(x, y, near_duplicates=None, **options).results[0].accuracy  # type: ignore[arg-type]
    across = sweep_heads(x, y, near_duplicates=None, sites=groups, **options).results[0].accuracy  # type: ignore[arg-type]
    names, truths = np.unique(groups), []
    for _ in range(5):
        some = np.isin(groups, rng.permutation(names)[:64])
        model = make_head("ridge").fit(x[some], y[some])
        truths.append((model.predict(features.embeddings[fresh]) == features.labels[fresh]).mean())
    print(ordinary, across, np.mean(truths))
    assert ordinary.mean > np.mean(truths) + 0.1
    assert abs(across.mean - np.mean(truths)) < 0.05


# --- folds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_folds_keep_sites_whole_and_classes_everywhere(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(3), rng.choice(3, 200, p=[0.6, 0.3, 0.1])])
    sites = rng.integers(0, 25, len(labels))
    folds = site_folds(labels, sites, 5, seed)
    assert folds is not None
    for site in range(25):
        assert len(set(folds[sites == site])) <= 1
    for c in range(3):
        shares = np.bincount(folds[labels == c], minlength=folds.max() + 1) / (labels == c).sum()
        assert (shares < 0.75).all()
    sizes = np.bincount(folds)
    assert sizes.max() < 2.2 * sizes.min()
    assert np.array_equal(folds, fold_numbers(labels, np.arange(len(labels)), 5, seed, sites))


def test_folds_where_a_class_has_one_site() -> None:
    labels = np.arange(20) % 2
    assert site_folds(labels, labels, 5, 0) is None
    copies = np.arange(20)
    assert np.array_equal(fold_numbers(labels, copies, 5, 0, labels), fold_numbers(labels, copies, 5, 0))


# --- the forecast ---------------------------------------------------------------------------------------------------


def labelled(rows: Rows) -> LabelledRows:
    return LabelledRows.of(rows[0], rows[1], NAMES, near_duplicates=None, sites=rows[2])


@pytest.mark.slow
def test_the_forecast_is_of_a_new_site() -> None:
    """Of 95 of 100 new cameras the accuracy lies in the interval; by counting, of at least 85."""
    inside = 0
    for seed in range(40):
        rows = cameras(280, 9, 500 + seed, 0.8)
        new = rows[2] == "camera 8"
        known = rows[0][~new], rows[1][~new], rows[2][~new]
        found = forecast_site(labelled(known), known[2], HEADS["nearest_centroid"], random_state=seed)
        model = make_head("nearest_centroid").fit(known[0], known[1])
        accuracy = (model.predict(rows[0][new]) == rows[1][new]).mean()
        assert found.expected is not None
        inside += found.expected.low <= accuracy <= found.expected.high
        assert found.known == len(found.left_out) == 8
    assert inside >= 34


@pytest.mark.slow
def test_labels_from_the_new_site_help_where_sites_differ_much_and_not_where_they_do_not() -> None:
    much = cameras(400, 8, 3, 2.5)
    found = forecast_site(labelled(much), much[2], HEADS["ridge"], group_name="camera")
    by_labels = {each.labels: each for each in found.added}
    assert by_labels[5].verdict == "better"
    assert by_labels[5].difference is not None
    assert by_labels[1].difference is not None
    assert by_labels[5].difference.interval.mean > by_labels[1].difference.interval.mean
    same = cameras(400, 8, 3, 0.0)
    calm = forecast_site(labelled(same), same[2], HEADS["ridge"], group_name="camera")
    assert {each.verdict for each in calm.added} == {"cannot tell"}
    assert found.sentence.startswith("At a new camera expect ")
    assert found.to_json()["added"][2]["verdict"] == "better"


def test_the_forecast_says_what_it_cannot_tell() -> None:
    rows = cameras(60, 2)
    found = forecast_site(labelled(rows), rows[2], HEADS["nearest_centroid"])
    assert found.expected is None
    assert found.sentence == "At a new group: cannot tell; 2 groups could be left out, and it takes 3."


def test_prediction_intervals_by_both_ways() -> None:
    rng = np.random.default_rng(0)
    for m in (5, 60):
        inside = 0
        for _ in range(2000):
            values = np.clip(0.7 + 0.08 * rng.normal(size=m + 1), 0, 1)
            found, method = stats.prediction_interval(values[:m])
            inside += found.low <= values[m] <= found.high
            assert method == ("Student's t" if m == 5 else "order statistics")
        assert 0.935 < inside / 2000 < 0.985
    low, high = stats.prediction_interval(np.full(4, 1.0))[0].low, stats.prediction_interval(np.full(4, 1.0))[0].high
    assert (low < 0.6, high) == (True, 1.0)


def test_the_mean_of_differences_is_students() -> None:
    from scipy.stats import ttest_1samp

    values = np.array([0.1, 0.0, 0.05, 0.2, -0.02])
    found, expected = stats.mean_difference(values), ttest_1samp(values, 0.0)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.interval.low, found.interval.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_draws_without_groups_are_as_before() -> None:
    rows, labels, _ = cameras(90, 5)
    for a, b in pairwise(list(KShotSplit(5, n_episodes=2).split(rows, labels)) * 2):
        assert len(a[0]) == len(b[0]) == 15
