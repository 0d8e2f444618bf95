"""Advice: the comparison against a sweep, words against numbers, time and interruption, and the command."""

from __future__ import annotations

import json
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Featx, class_folders
from pagekit import Page
from warm import Warm

from featx.advice import measure
from featx.advice.advice import Advice, Cell, Family, Skipped
from featx.advice.comparison import Budget, LabelledStore, OutOfTime, Trials
from featx.advice.domain import Domain, size_by_similarity
from featx.advice.labelling import Simulation
from featx.advice.measure import REFERENCE, advise, curve_shots
from featx.backbones import RECIPES
from featx.errors import UsageError
from featx.evaluation import stats
from featx.evaluation.splits import KShotSplit
from featx.evaluation.sweep import sweep_heads
from featx.extraction import network_like
from featx.heads.layers import Layers, read_layers
from featx.images import ImageSet
from featx.images.pixels import encode
from featx.reports.advice import render_advice
from featx.store.reader import FeatureSet

pytestmark = pytest.mark.slow

NO_NETWORK = UsageError("there is no network behind these numbers")


def feature_set(each: int = 30, unlabelled: int = 40, noise: float = 1.0, seed: int = 0) -> FeatureSet:
    """Three classes of random rows with a mean of their own, and rows without a label."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1, 2, -1], [each, each, each, unlabelled])
    means = 0.8 * rng.normal(size=(3, 24))
    rows = means[np.where(labels < 0, rng.integers(0, 3, len(labels)), labels)] + noise * rng.normal(
        size=(len(labels), 24)
    )
    n = len(labels)
    return FeatureSet(
        embeddings=rows.astype(np.float32),
        ids=np.array([f"{i:03d}.png" for i in range(n)]),
        labels=labels.astype(np.int64),
        class_names=("<a>", "b", "c"),
        splits=np.full(n, ""),
        digests=rng.integers(0, 256, (n, 32)).astype(np.uint8),
        layer="penultimate",
        provenance={"backbone": "made up"},
        fingerprint="f00d",
    )


@pytest.fixture(scope="module")
def advice() -> Advice:
    features = feature_set()
    return advise(features, Layers({"penultimate": 24}), backbone=NO_NETWORK, minutes=60, episodes=5, n_jobs=1)


@pytest.mark.slow
def test_cells_are_those_of_a_sweep_of_the_same_seed(advice: Advice) -> None:
    features = feature_set()
    rows = np.flatnonzero(features.labels >= 0)
    swept = sweep_heads(
        features.embeddings[rows],
        features.labels[rows],
        class_names=features.class_names,
        shots=(5, 20),
        episodes=5,
        n_jobs=1,
    )
    for n_shots in (5, 20):
        for cell in advice.at(n_shots):
            assert cell.episodes == 5
            theirs = next(r for r in swept.results if (r.head, r.n_shots) == (cell.strategy, n_shots))
            assert cell.accuracy.mean == pytest.approx(theirs.accuracy.mean)
            assert cell.accuracy.low == pytest.approx(theirs.accuracy.low, abs=1e-6)
            if cell.difference is not None:
                other = next(
                    c for c in swept.comparisons if {c.a, c.b} == {cell.strategy, REFERENCE} and c.n_shots == n_shots
                )
                sign = 1 if other.a == cell.strategy else -1
                assert cell.difference.interval.mean == pytest.approx(sign * other.difference.interval.mean)
                assert cell.difference.p == pytest.approx(other.difference.p)


def test_everything_without_images_is_there_and_the_rest_is_named(advice: Advice) -> None:
    assert advice.images == 90
    assert advice.counts == (30, 30, 30)
    assert advice.curve is not None
    assert advice.curve.shots.tolist() == [1, 2, 5, 10, 20]
    assert advice.simulation is not None
    assert len({each.id for each in advice.next_images}) == 10
    assert all(int(each.id[:3]) >= 90 for each in advice.next_images)  # only images without a label
    missing = {each.what: each.reason for each in advice.skipped}
    assert set(missing) == {
        "nearness to the pretraining", "earlier layers", "shortcuts", "other features", "random features",
        "fine-tuning", "scratch",
    }  # fmt: skip
    assert "there is no network" in missing["nearness to the pretraining"]
    assert "--source" in missing["scratch"]
    told = advice.sentences()
    for what in missing:
        assert what in told["not measured"]
    json.dumps(advice.to_json(), allow_nan=False)


def test_the_learning_curve_judges_the_same_images_at_every_number(advice: Advice) -> None:
    features = feature_set()
    rows = np.flatnonzero(features.labels >= 0)
    found = sweep_heads(
        features.embeddings[rows], features.labels[rows], class_names=features.class_names, heads=("auto",),
        shots=(1, 20), episodes=4, n_jobs=1,
    )  # fmt: skip
    trials = Trials(found.labels, REFERENCE)
    trials.add(found, "head")
    hits = trials.hits(REFERENCE, (1, 20))
    for episode in range(4):
        _, query = KShotSplit(20).episode(found.labels, np.arange(90), episode)
        for i, n_shots in enumerate((1, 20)):
            assert np.array_equal(np.flatnonzero(np.isfinite(hits[episode, i])), query)
            trial = trials.trials[REFERENCE, n_shots, episode]
            right = trial.predictions == found.labels[trials.queries[n_shots, episode]]
            assert np.array_equal(hits[episode, i, query], right[np.isin(trials.queries[n_shots, episode], query)])
    with pytest.raises(RuntimeError, match="same draws"):
        trials.add(replace(found, queries={**found.queries, (1, 0): np.arange(3)}), "head")


@pytest.mark.parametrize(
    ("smallest", "shots"), [(2, [1]), (12, [1, 2, 5, 8]), (30, [1, 2, 5, 10, 20]), (190, [1, 2, 5, 10, 20, 50, 100])]
)
def test_the_numbers_of_the_curve(smallest: int, shots: list[int]) -> None:
    assert curve_shots(smallest) == shots


def test_copies_and_the_split_test_take_no_part() -> None:
    features = feature_set(unlabelled=0)
    splits = features.splits.astype("<U4")
    splits[80:] = "test"
    found = advise(
        replace(features, splits=splits), Layers({"penultimate": 24}), backbone=NO_NETWORK, minutes=60,
        episodes=3, n_jobs=1,
    )  # fmt: skip
    assert found.counts == (30, 30, 20)
    assert "the store has no unlabelled images" in found.sentences()["not measured"]


@pytest.mark.slow
def test_layers_are_compared_where_there_are_several() -> None:
    features = feature_set(noise=3.0)
    better = np.hstack([feature_set(noise=0.3).embeddings, features.embeddings])
    found = advise(
        replace(features, embeddings=better, layer="combined"), Layers({"early": 24, "penultimate": 24}),
        backbone=NO_NETWORK, minutes=60, episodes=8, n_jobs=1,
    )  # fmt: skip
    best = found.recommended
    assert best.family == "earlier layers"
    assert "early" in best.strategy or "combined" in best.strategy
    assert best.verdict == "better"
    assert "early" in found.sentences()["strategy"] or "combined" in found.sentences()["strategy"]


# --- words ---


def cell(
    strategy: str,
    family: Family,
    n_shots: int,
    mean: float,
    difference: tuple[float, float, float] | None,
    p: float = 0.001,
) -> Cell:
    apart = None if difference is None else stats.Difference(stats.Interval(*difference), p, p)
    return Cell(strategy, family, n_shots, 5, stats.Interval(mean, mean - 0.03, mean + 0.03), apart, 0.1)


def with_cells(advice: Advice, *cells: Cell, **changes: Any) -> Advice:
    first = [cell(REFERENCE, "head", n, 0.8, None) for n in sorted({c.n_shots for c in cells})]
    return replace(advice, cells=(*first, *cells), **changes)


def test_when_fine_tuning_pays(advice: Advice) -> None:
    worse, unsure = cell("finetune:1", "fine-tuning", 5, 0.7, (-0.1, -0.15, -0.05)), (0.01, -0.02, 0.04)
    never = with_cells(advice, worse)
    assert "does not pay up to 5 images per class" in never.sentences()["fine-tuning"]
    assert "finetune:1 -10.0 points (-15.0 to -5.0)" in never.sentences()["fine-tuning"]
    perhaps = with_cells(advice, worse, cell("finetune:2", "fine-tuning", 20, 0.81, unsure, p=0.5))
    assert "not clear that fine-tuning pays up to 20 images per class" in perhaps.sentences()["fine-tuning"]
    assert perhaps.recommended.strategy == REFERENCE
    assert "the difference may be chance, so the simpler option is recommended" in perhaps.sentences()["strategy"]
    pays = with_cells(advice, worse, cell("finetune:2", "fine-tuning", 20, 0.9, (0.1, 0.06, 0.14)))
    assert "pays from 20 images per class on" in pays.sentences()["fine-tuning"]
    assert pays.recommended.strategy == "finetune:2"
    assert "fine-tuning the last 2 blocks" in pays.sentences()["strategy"]
    assert pays.sentences()["strategy"].endswith("better beyond chance; featx sweep names the highest mean.")


def test_the_control_is_told_and_never_recommended(advice: Advice) -> None:
    found = with_cells(advice, cell("random features", "control", 20, 0.99, (0.19, 0.1, 0.2)))
    assert found.recommended.strategy == REFERENCE
    assert "a head on random features 99.0 %" in found.sentences()["pretraining"]


def test_the_rule_stands_beside_the_measurement(advice: Advice) -> None:
    far = Domain(stats.Interval(5.0, 4.9, 5.1), 3.24, 1000, 0.7, {"b": 5.0})
    base = {"domain": far, "rule": size_by_similarity(30, far.nearness)}
    agrees = with_cells(advice, cell("ridge@early", "earlier layers", 20, 0.9, (0.1, 0.06, 0.14)), **base)
    assert agrees.sentences()["rule"].endswith("The measurement agrees.")
    against = with_cells(advice, cell("ridge@early", "earlier layers", 20, 0.7, (-0.1, -0.15, -0.05)), **base)
    assert "The measurement disagrees" in against.sentences()["rule"]
    unsure = with_cells(advice, cell("ridge@early", "earlier layers", 20, 0.81, (0.01, -0.02, 0.04), p=0.6), **base)
    assert "cannot confirm" in unsure.sentences()["rule"]
    other = with_cells(advice, cell("knn", "head", 20, 0.7, (-0.1, -0.15, -0.05)), **base)
    assert "was not measured there" in other.sentences()["rule"]
    assert "differ from those the network was trained on" in other.sentences()["domain"]


def test_labelling_in_words(advice: Advice) -> None:
    for p, mean, words in (
        (0.001, 0.05, "Choosing pays"),
        (0.5, 0.01, "No clear difference"),
        (0.001, -0.05, "at random, not"),
    ):
        gain = stats.Difference(stats.Interval(mean, mean - 0.02, mean + 0.02), p, p)
        found = replace(advice, simulation=Simulation(5, 10, 8, 0.7, 0.80049, 0.80049 - mean, gain))
        sentence = found.sentences()["label next"]
        assert words in sentence and "unsure of, and that are unlike each other" in sentence
        shown = re.search(r"to (\S+) % when chosen .* to (\S+) % at random \((\S+) points", sentence)
        assert shown and float(shown[1]) - float(shown[2]) == pytest.approx(float(shown[3]), abs=1e-6)


def test_the_page_is_whole_escapes_names_and_shows_every_number(advice: Advice) -> None:
    text = render_advice(advice, title="<store>", provenance={"backbone": "made up"}, command="featx advise x")
    page = Page(text)
    words = " ".join(" ".join(page.words).split())
    assert not re.search(r"\b(noise|margin)\b", words.rpartition("}")[2])  # words that nobody has explained
    assert not {tag for tag, _ in page.tags} & {"script", "link", "a", "b"}
    for topic, sentence in advice.sentences().items():
        assert sentence in words, topic
    for each in advice.cells:
        if each.n_shots in (5, 20):
            assert f"{100 * each.accuracy.mean:.1f}" in words
    assert advice.next_images[0].id in words
    assert "http" not in text.replace("http-equiv", "")


def test_the_caption_names_what_is_drawn(advice: Advice) -> None:
    assert advice.curve is not None and advice.gain is not None
    for reason in ("", "the interval includes zero"):  # with a reason nothing is drawn beyond the last point
        page = render_advice(
            replace(advice, gain=replace(advice.gain, n_to=100.0, reason=reason)),
            title="x", provenance={}, command="",
        )  # fmt: skip
        assert ("dashed is" in page) == ("stroke-dasharray" in page) == (not reason)
        assert "shaded is its interval" in page and "<polygon" in page


def test_the_images_to_label_are_shown_and_listed_with_whole_paths(advice: Advice) -> None:
    rows = {each.row: each.id for each in advice.next_images}
    assert rows
    paths = {name: f"/photos/{name}" for name in rows.values()}
    dot = encode(np.zeros((4, 4, 3), dtype=np.uint8))
    text = render_advice(
        advice, title="x", provenance={"fingerprint": "f00d"}, command="", thumbnail=lambda row: dot, paths=paths
    )
    page = Page(text)
    assert {dict(attributes)["alt"] for tag, attributes in page.tags if tag == "img"} == set(rows.values())
    (copied,) = re.findall(r'<pre class="list">(.*?)</pre>', text, re.DOTALL)
    assert copied.splitlines() == [paths[each.id] for each in advice.next_images]
    assert text.index("f00d") > text.index("Versions, settings and hashes")


# --- time ---


def test_a_budget_counts_and_ends() -> None:
    seen: list[tuple[int, int, str]] = []
    budget = Budget(0.02, lambda *told: seen.append(told))
    budget.tick("first")
    time.sleep(0.03)
    with pytest.raises(OutOfTime):
        budget.under("second")(1, 2, "draw 1")
    assert [what for _, _, what in seen] == ["first; seconds", "second: draw 1; seconds"]


def test_no_time_at_all_is_an_error_and_little_time_is_said() -> None:
    features, columns = feature_set(), Layers({"penultimate": 24})
    with pytest.raises(UsageError, match="must be more than 0"):
        advise(features, columns, backbone=NO_NETWORK, minutes=0)
    with pytest.raises(UsageError, match="must be at least 1"):
        advise(features, columns, backbone=NO_NETWORK, count=0)
    with pytest.raises(UsageError, match=r"not even one head could be judged in this time.*--minutes"):
        advise(features, columns, backbone=NO_NETWORK, minutes=1e-6, n_jobs=1)
    with pytest.raises(UsageError, match="no labelled images"):
        advise(replace(features, labels=np.full(len(features), -1)), columns, backbone=NO_NETWORK)


def test_an_interruption_keeps_what_was_measured() -> None:
    def stop(done: int, total: int, what: str) -> None:
        if what.startswith("labelling"):
            raise KeyboardInterrupt

    found = advise(
        feature_set(), Layers({"penultimate": 24}), backbone=NO_NETWORK, minutes=60, episodes=3, n_jobs=1, progress=stop
    )
    assert found.interrupted
    assert Skipped("labelling by choice", "interrupted") in found.skipped
    assert Skipped("scratch", "interrupted") in found.skipped
    assert found.curve is not None
    assert "interrupted" in render_advice(found, title="x", provenance={}, command="")


# --- the command ---


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, featx: Featx) -> Path:
    folder = tmp_path_factory.mktemp("advise")
    class_folders(folder / "photos", each=9)
    class_folders(folder / "strange", each=9, first=500)
    assert featx("extract", folder / "photos", "--out", folder / "photos.featx").code == 0
    return folder


@pytest.mark.slow
def test_the_command_prints_words_a_page_and_one_json_object(store: Path, featx: Featx) -> None:
    ran = featx("advise", "photos.featx", "--minutes", "0.3", "--n-jobs", "1", "--json", cwd=store)
    assert ran.code == 0, ran.err
    found = ran.json
    assert found["domain"]["pretraining_classes"] == 1000
    assert found["rule"]["size"] == "small"
    assert found["strategy"]["strategy"]
    assert {"sentences", "cells", "learning_curve", "ten_more_a_class", "labelling", "not_measured"} <= set(found)
    assert found["sentences"]["strategy"].split(":")[0] in " ".join(ran.err.split())
    page = (store / "photos.advice.html").read_text()
    assert "Which strategy now" in page
    assert [path.name for path in store.glob(".*advise*")] == []
    again = featx("advise", "photos.featx", "--minutes", "0.2", "--n-jobs", "1", "--next", "3", cwd=store)
    assert again.code == 0, again.err
    assert "fine-tuning" in again.out
    assert "--next" in (store / "photos.advice.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.featx"], "nowhere.featx"),
        (["photos.featx", "--minutes", "0"], "minutes: must be more than 0"),
        (["photos.featx", "--next", "0"], "next: must be at least 1"),
        (["photos.featx", "--source", "strange"], "these are not the images of the store"),
        (["photos.featx", "--source", "nowhere"], "nowhere: no such folder"),
        (["photos.featx", "--out", "photos"], "a folder is in the way"),
    ],
)
def test_a_users_mistake_is_one_sentence(store: Path, featx: Featx, arguments: list[str], message: str) -> None:
    ran = featx("advise", *arguments, cwd=store)
    assert ran.code == 2
    assert message in ran.err
    assert ran.err.count("\n") <= 2


@pytest.mark.slow
def test_with_the_images_everything_is_measured(store: Path, featx: Featx) -> None:
    ran = featx(
        "advise", "photos.featx", "--source", "photos", "--minutes", "0.3", "--n-jobs", "1", "--json", cwd=store
    )
    assert ran.code == 0, ran.err
    measured = {each["strategy"] for each in ran.json["cells"]}
    assert REFERENCE in measured
    named = " ".join(each["what"] for each in ran.json["not_measured"])
    for strategy in ("random features", "finetune:1", "finetune:2", "finetune:all", "scratch"):
        assert strategy in measured or strategy in named  # a busy machine measures less, and says so
    looked = ran.json["shortcuts"]
    if "shortcuts" not in named:
        assert [each["region"] for each in looked["regions"]] == ["borders", "corners"]
        assert looked["images"] == 18
        assert f"whole: {100 * looked['whole']['mean']:.1f} %" in ran.json["sentences"]["shortcuts"]
    else:
        assert looked is None
    for each in ran.json["cells"]:
        apart = each["against_reference"]
        assert (apart is None) == (each["strategy"] == REFERENCE)


@pytest.mark.slow
def test_features_that_the_store_does_not_have_are_of_its_reference(
    tmp_path: Path, featx: Featx, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a store of early layers, too, more views are tried on the penultimate one, not on the first."""
    photos, own = class_folders(tmp_path / "photos", each=9), {"efficientnet_lite0": ("penultimate",)}
    monkeypatch.setattr(measure, "RECIPES", {**RECIPES, "balanced": replace(RECIPES["balanced"], backbones=own)})
    views = RECIPES["best"].views
    for name, options in (
        ("few", ["--layer", "blocks.4", "--layer", "penultimate"]),
        ("many", ["--layer", "blocks.4", "--layer", "penultimate", "--views", ",".join(views)]),
    ):
        ran = featx("extract", photos, "--out", tmp_path / name, *options)
        assert ran.code == 0, ran.err

    def begun(name: str) -> measure._Run:
        store = LabelledStore.of(*read_layers(tmp_path / name))
        assert store.place == 1
        return measure._Run(store, Budget(3600), episodes=3, random_state=0, n_jobs=1)

    run, many = begun("few"), begun("many")
    refs = ImageSet.from_folder(photos)
    network = network_like(run.store.of_reference.provenance, where=tmp_path)
    run.first()
    run.other_features(network, measure.origins_of(run.store.features, run.store.data.rows, refs))
    many.first()
    found = {(each.strategy, each.n_shots): each.accuracy.mean for each in run.trials.cells()}
    expected = {each.n_shots: each.accuracy.mean for each in many.trials.cells()}
    for n_shots in run.compared:
        assert found[f"{REFERENCE}@efficientnet_lite0 with {len(views)} views", n_shots] == expected[n_shots]
    with pytest.raises(UsageError, match="the store has the networks and views of all recipes"):
        many.other_features(network, [])


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_leaves_no_folder_behind(store: Path, warm: Warm) -> None:
    command = ["advise", "photos.featx", "--minutes", "2", "--n-jobs", "1", "--json", "--out", "stopped.html"]
    going = warm.begin(command, store)
    deadline = time.monotonic() + 60
    while not list(store.glob(".tmp-*-stopped.html")):
        assert going.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    going.send_signal(signal.SIGINT)
    out, err = going.communicate(timeout=60)
    assert going.returncode == 130, err
    assert isinstance(json.loads(out), dict)
    assert list(store.glob(".tmp-*-stopped.html")) == []
