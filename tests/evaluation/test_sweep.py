"""The sweep as a whole: honest on random labels, the same for any n_jobs, everything chosen inside."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from sklearn.metrics import f1_score
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sweepkit import blobs

from featx.errors import UsageError
from featx.evaluation import stats
from featx.evaluation.splits import KShotSplit
from featx.evaluation.sweep import sweep_heads
from featx.heads.catalogue import HEADS, Head
from featx.heads.folds import fold_numbers
from featx.heads.layers import Layers
from featx.heads.normalise import Normalise
from featx.heads.scorer import softmax
from featx.heads.selection import Views, _Validation, choose
from featx.heads.solvers.rows import temperature
from featx.reports.sweep import conclusion, feature_rows, features_sentence, render_page, worth_sentence


@pytest.fixture(scope="module")
def result() -> Any:
    rows, labels, names = blobs([40, 30, 35])
    return sweep_heads(rows, labels, class_names=names, episodes=6, shots=(1, 5, 12, "all"), n_jobs=1)


@pytest.mark.slow
def test_intervals_and_comparisons_count_what_supports_teach(result: Any) -> None:
    for pair in result.comparisons:
        left, right = (result.of(head, pair.n_shots) for head in (pair.a, pair.b))
        hits, asked = np.zeros((2, len(left), len(result.labels)))
        for trial, other in zip(left, right, strict=True):
            query = result.queries[pair.n_shots, trial.episode]
            hits[trial.episode, query] = trial.predictions == result.labels[query]
            hits[trial.episode, query] -= other.predictions == result.labels[query]
            asked[trial.episode, query] = 1
        images = hits.sum(axis=0)[asked.any(axis=0)] / asked.sum(axis=0)[asked.any(axis=0)]
        taught = ((1 - asked)[:, asked.any(axis=0)] * (images - images.mean())).sum(axis=1)
        scores = hits.sum(axis=1) / asked.sum(axis=1)
        sizes = np.mean([t.n_support for t in left]), np.mean([t.n_query for t in left])
        assert pair.difference.p == pytest.approx(stats.paired_difference(scores, images, *sizes, taught).p)


@pytest.mark.slow
def test_json_has_what_the_design_lists_in_plain_types(result: Any) -> None:
    found = result.to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["winner"] in HEADS
    assert len(found["results"]) == 6 * 4
    for row in found["results"]:
        assert {"head", "n_shots", "episodes", "accuracy", "balanced_accuracy", "params", "fit_seconds"} <= set(row)
        assert 0 <= row["accuracy"]["low"] <= row["accuracy"]["mean"] <= row["accuracy"]["high"] <= 1
        assert row["episodes"] == 6
        assert row["params"].keys() == HEADS[row["head"]].default.keys()
        assert (row["ece"] is None) == (not HEADS[row["head"]].probabilistic)
    assert len(found["comparisons"]) == 15 * 4
    for pair in found["comparisons"]:
        assert {"a", "b", "n_shots", "difference", "low", "high", "p", "verdict"} <= set(pair)
        assert pair["verdict"] in ("better", "worse", "cannot tell")
        assert pair["p"] >= pair["p_unadjusted"]
    assert found["duplicates"] == {"exact": 0, "near": 0, "groups": 0}
    assert found["majority_baseline"] == pytest.approx(40 / 105)
    assert found["classes"] == {"a": 40, "b": 30, "c": 35}
    assert found["seconds"] > 0


def test_trials_are_what_the_draws_and_pipelines_give(result: Any) -> None:
    rows, labels, _ = blobs([40, 30, 35])
    for n_shots in (1, 5, "all"):
        for episode, (support, query) in enumerate(KShotSplit(n_shots, n_episodes=6).split(rows, labels)):
            for head in ("logreg", "knn"):
                trial = result.of(head, n_shots)[episode]
                model = HEADS[head].build(**trial.params).fit(rows[support], labels[support])
                assert trial.accuracy == model.score(rows[query], labels[query])
                assert (trial.n_support, trial.n_query) == (len(support), len(query))
                np.testing.assert_array_equal(result.queries[n_shots, episode], query)


def test_the_macro_f1_is_scikit_learns(result: Any) -> None:
    for trial in result.trials:
        truth = result.labels[result.queries[trial.n_shots, trial.episode]]
        assert trial.macro_f1 == pytest.approx(f1_score(truth, trial.predictions, average="macro", zero_division=0))
        assert trial.row()["macro_f1"] == trial.macro_f1
    for row in result.to_json()["results"]:
        own = [t.macro_f1 for t in result.of(row["head"], row["n_shots"])]
        assert row["macro_f1"] == pytest.approx(np.mean(own))


def test_ranks_follow_the_means_and_the_best_is_tied_with_itself(result: Any) -> None:
    for n_shots in result.shots:
        rows = [each for each in result.results if each.n_shots == n_shots]
        assert [each.rank for each in rows] == [1, 2, 3, 4, 5, 6]
        assert all(a.accuracy.mean >= b.accuracy.mean for a, b in pairwise(rows))
        assert rows[0].tied


def test_one_shot_takes_the_stated_defaults(result: Any) -> None:
    for trial in result.trials:
        if trial.n_shots == 1:
            assert trial.params == HEADS[trial.head].default
            assert trial.selection_score is None


def test_a_sweep_whose_time_is_up_tells_what_is_missing_and_goes_on(result: Any, tmp_path: Path) -> None:
    rows, labels, names = blobs([40, 30, 35])
    plan: dict[str, Any] = {"class_names": names, "episodes": 6, "shots": (1, 5, 12, "all"), "n_jobs": 1}
    known: list[Any] = []
    short = sweep_heads(rows, labels, **plan, seconds=0, journal=tmp_path / "j", partial=known.append)
    assert short.shots == (1,)
    assert short.missing == {1: 4, 5: 6, 12: 6, "all": 6}
    assert short.to_json()["missing"] == {"1": 4, "5": 6, "12": 6, "all": 6}
    assert short.missing_sentence.startswith("Provisional: 2 of 24 draws are done (2 with 1 shot, 0 with 5 shots")
    assert {each.episodes for each in short.results} == {2}
    assert len(known) == 1
    assert [t.accuracy for t in known[0].trials] == [t.accuracy for t in short.trials]
    whole = sweep_heads(rows, labels, **plan, journal=tmp_path / "j", partial=known.append)
    assert not (tmp_path / "j").exists()
    assert whole.missing == {}
    assert whole.missing_sentence == ""
    assert [t.row() for t in whole.trials] == [t.row() for t in result.trials]
    drawn = [len(each.queries) for each in known]
    assert drawn == sorted(drawn)
    # Two draws of each number of images come before the third of any.
    first = next(each for each in known if len(each.queries) == 8)
    assert {n_shots: first.draws(n_shots) for n_shots in first.shots} == dict.fromkeys((1, 5, 12, "all"), 2)


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_number_of_workers(result: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One here, against by default one a core."""
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "2")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert joblib.cpu_count() == 2
    rows, labels, names = blobs([40, 30, 35])
    seen: list[tuple[int, int, str]] = []
    again = sweep_heads(
        rows, labels, class_names=names, episodes=6, shots=(1, 5, 12, "all"),
        progress=lambda *args: seen.append(args),
    )  # fmt: skip
    drop = {"seconds", "fit_seconds"}

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items() if key not in drop}
        return [plain(inner) for inner in value] if isinstance(value, list) else value

    assert plain(again.to_json()) == plain(result.to_json())
    assert seen[0] == (0, 24, "1 shot, draw 1")
    assert seen[-1] == (24, 24, "done")
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


@pytest.mark.slow
def test_random_labels_with_duplicated_images_stay_at_chance() -> None:
    rng = np.random.default_rng(0)
    originals = np.maximum(rng.normal(size=(1000, 32)) + 0.3, 0)
    originals_labels = rng.permutation(np.arange(1000) % 2)
    rows = np.repeat(originals, 3, axis=0)
    rows[1::3] += 0.02 * rng.normal(size=originals.shape)  # a third are near, a third exact duplicates
    labels = np.repeat(originals_labels, 3)
    digests = np.arange(3000) // 3 * 3 + (np.arange(3000) % 3 == 1)
    found = sweep_heads(
        rows.astype(np.float32), labels, class_names=["a", "b"], groups=digests, episodes=10, n_jobs=1,
    )  # fmt: skip
    assert found.shots == (1, 2, 5, 10, 20, "all")
    assert {each.head for each in found.results} == set(found.heads) > {"ridge", "lda", "linear_svm"}
    assert found.duplicates.to_json() == {"exact": 1000, "near": 1000, "groups": 1000}
    for each in found.results:
        assert abs(each.accuracy.mean - 0.5) <= 0.05, (each.head, each.n_shots)
    assert np.mean([each.accuracy.low <= 0.5 <= each.accuracy.high for each in found.results]) >= 0.9
    assert all(pair.difference.verdict == "cannot tell" for pair in found.comparisons)
    leaky = sweep_heads(
        rows.astype(np.float32), labels, class_names=["a", "b"], heads=["knn"], shots=("all",), n_jobs=1,
        near_duplicates=None, episodes=5,
    )  # fmt: skip
    assert leaky.results[0].accuracy.mean > 0.8  # what the grouping protects from


def test_default_shots_that_cannot_be_given_are_left_out_and_named() -> None:
    rows, labels, names = blobs([30, 8])
    found = sweep_heads(rows, labels, class_names=names, heads=["ridge"], episodes=2, n_jobs=1)
    assert found.shots == (1, 2, 5, "all")
    assert found.notes == ("n_shots 10, 20 left out: class 'b' has 8 different images, and n_shots 10 takes 11.",)
    with pytest.raises(UsageError, match=r"class 'b' has too few images: expected at least 11 .* found 8\."):
        sweep_heads(rows, labels, class_names=names, heads=["ridge"], shots=(5, 10), n_jobs=1)


@pytest.mark.slow
def test_a_small_class_takes_no_size_from_the_others() -> None:
    """At the sizes that it does not reach the others are compared as if it were not there."""
    rows, labels, names = blobs([30, 4, 30, 30])
    options: dict[str, Any] = {"heads": ["logreg", "ridge", "knn"], "episodes": 3, "n_jobs": 1}
    found = sweep_heads(rows, labels, class_names=names, **options)
    assert found.shots == (1, 2, 5, 10, 20, "all")
    (note,) = found.notes
    assert note.startswith("At n_shots 5, 10, 20 only the classes") and "'b' has only 4 different images" in note
    large = labels != 1
    for n_shots in (5, 10, 20):
        for head in found.heads:
            for trial in found.of(head, n_shots):
                query = found.queries[n_shots, trial.episode]
                assert set(found.labels[query]) == {0, 2, 3} >= set(trial.predictions)
                assert trial.accuracy == (trial.predictions == found.labels[query]).mean()
                assert trial.n_support + trial.n_query == large.sum()
    # One set of draws: the accuracy is about that of a sweep of the three alone.
    alone = sweep_heads(rows[large], np.array([0, -1, 1, 2])[labels[large]], class_names=["a", "c", "d"], **options)
    means = {(r.head, r.n_shots): r.accuracy.mean for r in found.results}
    for each in alone.results:
        if each.n_shots in (5, 10, 20):
            assert means[each.head, each.n_shots] == pytest.approx(each.accuracy.mean, abs=0.06)
    json.dumps(found.to_json(), allow_nan=False)
    # What is said of the sizes does not take fewer classes for more images.
    assert found.compared(20) == ("a", "c", "d") and found.compared(2) == found.class_names
    few = replace(found, shots=(2, 20))
    assert "among 3 of 4 classes" in conclusion(few) and "More images help" not in conclusion(few)
    page = render_page(few, title="x", provenance={}, command="", ids=None, thumbnail=None, labels=None)
    assert ">20*</text>" in page and ">2</text>" in page and "among fewer classes" in page
    row = re.search(r"<tr><td>b</td>(.*?)</tr>", page)
    assert row is not None and re.findall(r">([^<]*)</td>", row[1]) == ["-"] * 4


def test_unlabelled_rows_and_empty_classes_are_left_out_and_named() -> None:
    rows, labels, _ = blobs([10, 10, 10])
    labels[:5] = -1
    labels[labels == 1] = -1
    found = sweep_heads(rows, labels, class_names=["a", "b", "c"], heads=["ridge"], shots=(2,), episodes=2, n_jobs=1)
    assert found.class_names == ("a", "c")
    assert found.rows.tolist() == [*range(5, 10), *range(20, 30)]
    assert found.notes == (
        "15 images without a label left out.",
        "Classes without any labelled image were left out: b.",
    )


def test_bad_arguments_are_usage_errors() -> None:
    rows, labels, names = blobs([10, 10])
    cases: list[tuple[str, dict[str, Any]]] = [
        ("takes at least two classes: expected 2 classes, found only 'a'", {"labels": np.zeros(20, dtype=int)}),
        ("takes at least two classes: expected 2 classes, found no labelled", {"labels": np.full(20, -1)}),
        ("no such head: .*found logrek", {"heads": ["logrek"]}),
        ("embeddings and labels do not fit", {"labels": labels[:-1]}),
        ("a label has no class name: expected < 1, found 1", {"class_names": ["a"]}),
        ("at least one episode: found 0", {"episodes": 0}),
        ("no head to compare", {"heads": []}),
        ("no n_shots to sweep", {"shots": []}),
        ("row 3: embeddings must be finite", {"embeddings": np.where(np.arange(20)[:, None] == 3, np.nan, rows)}),
    ]
    for message, change in cases:
        arguments: dict[str, Any] = {"embeddings": rows, "labels": labels, "class_names": names, "n_jobs": 1, **change}
        with pytest.raises(UsageError, match=message):
            sweep_heads(arguments.pop("embeddings"), arguments.pop("labels"), **arguments)


def test_an_interrupt_passes_through() -> None:
    rows, labels, names = blobs([10, 10])

    def stop(done: int, total: int, what: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep_heads(rows, labels, class_names=names, heads=["ridge"], shots=(1, 2), n_jobs=1, progress=stop)


def test_what_does_not_converge_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featx.heads.solvers.rows._MAX_NEWTON", 2)
    rows, labels, names = blobs([10, 10])
    found = sweep_heads(rows, labels, class_names=names, heads=["logreg", "ridge"], shots=(5,), episodes=3, n_jobs=1)
    assert found.notes == ("logreg did not converge in 3 of 3 trials.",)
    assert [t.converged for t in found.trials] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("name", ["logreg", "linear_svm", "ridge", "lda", "knn", "nearest_centroid"])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_out_of_fold_losses_are_those_of_pipelines_fitted_fold_by_fold(name: str, n_classes: int) -> None:
    rows, labels, _ = blobs([12] * n_classes, gap=0.4)
    head: Head = HEADS[name]
    folds = fold_numbers(labels, np.arange(len(labels)), 4, 0)
    values = head.values[:3] or (0.0,)
    losses, converged = _Validation(head, Views(rows), labels, folds).losses("l2", values)
    assert converged
    for i, value in enumerate(values):
        params: dict[str, Any] = {head.parameter: value} if head.parameter else {}
        logits = np.zeros((len(labels), n_classes))
        if name == "ridge":  # one alpha for all folds, in units of the whole support: that has a closed form
            unit = Normalise("l2").fit_transform(rows).var(axis=0).sum()
            params = {"alpha": value * unit, "scale_free": False}
        for fold in range(4):
            held = folds == fold
            model = head.build(kind="l2", **params).fit(rows[~held], labels[~held])
            if head.criterion == "log_loss":
                expected = -np.log(model.predict_proba(rows[held])[np.arange(held.sum()), labels[held]])
            elif head.criterion == "accuracy":
                expected = (model.predict(rows[held]) != labels[held]).astype(float)
            else:
                scores = model.decision_function(rows[held]).reshape(held.sum(), -1)
                signs = np.where(labels[held][:, None] == np.arange(n_classes), 1, -1)[:, -scores.shape[1] :]
                expected = (np.maximum(1 - signs * scores, 0) ** 2).sum(axis=1)
            if name != "ridge":
                np.testing.assert_allclose(losses[i, held], expected, atol=2e-3)
                continue
            scores = model.decision_function(rows[held]).reshape(held.sum(), -1)
            logits[held] = np.hstack([-scores, scores]) if n_classes == 2 else scores
        if name == "ridge":  # its held-out scores, all of them, have one temperature
            each = softmax(temperature(logits, labels) * logits)[np.arange(len(labels)), labels]
            np.testing.assert_allclose(losses[i], -np.log(each), atol=2e-3)


@pytest.mark.slow
def test_the_choice_is_that_of_grid_search_on_the_same_folds() -> None:
    agreed = 0
    for seed in range(10):
        rows, labels, _ = blobs([5] * 3, gap=0.4, seed=seed)
        head = HEADS["logreg"]
        choice = choose(head, rows, labels, np.arange(len(labels)), random_state=seed)
        folds = fold_numbers(labels, np.arange(len(labels)), 5, seed)
        grid = {"classify__C": list(head.values)}
        plain = GridSearchCV(head.build(), grid, cv=PredefinedSplit(folds), scoring="neg_log_loss").fit(rows, labels)
        agreed += choice.params == {"kind": "l2", "C": plain.best_params_["classify__C"]}
        assert choice.score == pytest.approx(-plain.best_score_, rel=1e-3)
    assert agreed >= 9


def test_the_choice_does_not_see_the_query(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels, names = blobs([15, 15])
    before = sweep_heads(rows, labels, class_names=names, shots=(5,), episodes=3, n_jobs=1)
    for episode, (support, query) in enumerate(KShotSplit(5, n_episodes=3).split(rows, labels)):
        other = rows.copy()
        other[query] = np.random.default_rng(1).permutation(other[query])
        after = sweep_heads(other, labels, class_names=names, shots=(5,), episodes=3, n_jobs=1)
        for a, b in zip(before.trials, after.trials, strict=True):
            if a.episode == episode:
                assert (a.params, a.selection_score) == (b.params, b.selection_score)
        assert len(support) == 10


def test_an_interrupted_sweep_resumes_from_its_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels, names = blobs([10, 10])
    plan: dict[str, Any] = {"class_names": names, "heads": ["logreg", "linear_svm"], "shots": (1, 2), "episodes": 3}
    whole = sweep_heads(rows, labels, **plan, n_jobs=1)
    path = tmp_path / "deep" / "journal.jsonl"

    def stop(done: int, total: int, what: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep_heads(rows, labels, **plan, n_jobs=1, journal=path, progress=stop)
    assert len(path.read_text().splitlines()) == 1 + 4
    with path.open("ab") as file:
        file.write(b'{"task": [2, 1], "que')  # cut short by a crash
    seen: list[int] = []
    resumed = sweep_heads(
        rows, labels, **plan, n_jobs=1, journal=path, progress=lambda done, total, what: seen.append(done)
    )
    assert seen == [4, 5, 6]
    for ours, theirs in zip(resumed.trials, whole.trials, strict=True):
        assert (ours.accuracy, ours.params, ours.ece) == (theirs.accuracy, theirs.params, theirs.ece)
        np.testing.assert_array_equal(ours.predictions, theirs.predictions)
    assert resumed.results[0].accuracy == whole.results[0].accuracy
    assert not path.exists()


def test_a_journal_of_another_plan_is_not_used(tmp_path: Path) -> None:
    rows, labels, names = blobs([10, 10])
    path = tmp_path / "journal.jsonl"

    for seed, change, expected in [(0, 0.0, 0), (1, 0.0, 0), (1, 1.0, 0), (1, 1.0, 2)]:
        seen: list[int] = []

        def watch(done: int, total: int, what: str, seen: list[int] = seen) -> None:
            seen.append(done)
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sweep_heads(
                rows + np.float32(change), labels, class_names=names, heads=["ridge"], shots=(1,), episodes=4,
                random_state=seed, n_jobs=1, journal=path, progress=watch,
            )  # fmt: skip
        assert seen[0] == expected
    path.with_name("file").write_text("")
    with pytest.raises(UsageError, match="cannot write the journal"):
        sweep_heads(rows, labels, class_names=names, shots=(1,), n_jobs=1, journal=path.with_name("file") / "x")


def test_the_pixels_baseline_is_judged_on_the_same_draws_and_wins_nothing() -> None:
    rows, labels, names = blobs([60, 50])
    rng = np.random.default_rng(0)
    pixels = np.clip(60 * labels[:, None] + rng.integers(0, 60, (len(labels), 48)), 0, 255).astype(np.uint8)
    plan: dict[str, Any] = {"class_names": names, "shots": (1, 20), "episodes": 6, "n_jobs": 1}
    noise = rng.normal(size=rows.shape)
    found = sweep_heads(noise, labels, heads=("ridge", "knn"), pixels=pixels, **plan)
    alone = sweep_heads(pixels / np.float32(255), labels, heads=("ridge",), near_duplicates=None, **plan)
    assert [t.accuracy for t in found.pixels] == [t.accuracy for t in alone.trials]
    assert found.heads == ("ridge", "knn") and found.winner in found.heads
    assert {each.head for each in found.results} == {"ridge", "knn"}
    for n_shots, each in zip(found.shots, found.baseline, strict=True):
        means = [np.mean([t.accuracy for t in found.of(head, n_shots)]) for head in (found.winner, "pixels")]
        assert each.difference.interval.mean == pytest.approx(means[0] - means[1])
    assert found.baseline[-1].difference.verdict == "worse"
    told = found.to_json()["pixels_baseline"]
    assert [each["n_shots"] for each in told] == [1, 20] and told[1]["verdict"] == "worse"
    assert "Raw pixels without any network are" in worth_sentence(found)
    without = sweep_heads(noise, labels, heads=("ridge", "knn"), **plan)
    assert [t.row() for t in without.trials] == [t.row() for t in found.trials]
    assert without.pixels == () and without.to_json()["pixels_baseline"] == [] and worth_sentence(without) == ""


def test_features_are_ranked_with_one_head_for_all() -> None:
    rows, labels, names = blobs([30, 25])
    both = np.hstack([np.random.default_rng(0).normal(size=rows.shape), rows])
    layers = Layers({"noise": rows.shape[1], "good": rows.shape[1]}, {"noise": "noise", "good": "good"})
    found = sweep_heads(both, labels, class_names=names, shots=(5,), episodes=4, n_jobs=1, layers=layers)
    assert list(found.by_features.values())[-1] == "ridge@noise"
    assert set(found.by_features) == {"noise", "good", "joined"}
    assert {each["features"] for each in found.to_json()["results"]} == {"noise", "good", "joined"}
    (first, *_, last) = feature_rows(found)
    assert first.features in ("good", "joined") and last.features == "noise"
    assert first.cells[0][0].mean > last.cells[0][0].mean + 0.2
    assert features_sentence(found).startswith(f"Best features: {first.features}, ")
