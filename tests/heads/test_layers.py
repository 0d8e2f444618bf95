"""Several layers of a store: compared on the same draws, combined in one head, kept, served and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Featx, class_folders
from numpy.typing import NDArray
from sklearn.linear_model import RidgeClassifier

from featx._arrays import COMBINED, JOINED
from featx.backbones.engines.base import layer_place, of_layer
from featx.errors import UsageError
from featx.evaluation.splits import KShotSplit
from featx.evaluation.sweep import sweep_heads
from featx.heads.catalogue import HEADS
from featx.heads.folds import fold_numbers
from featx.heads.layers import SHARES, Layers, read_layers
from featx.heads.normalise import Normalise
from featx.heads.scorer import Scorer, blocks_kind, blocks_of, is_kind
from featx.heads.selection import Views, _Validation, choose
from featx.models.bundle import read_bundle
from featx.models.export import to_pipeline
from featx.models.predictor import open_embedder
from featx.service.evidence import Evidence

SIZES = {"early": 6, "middle": 5, "penultimate": 12}
LAYERS = Layers(SIZES)
Rows = NDArray[np.float32]


def stacked(n: int, strength: dict[str, float], seed: int = 0, classes: int = 3) -> tuple[Rows, NDArray[np.int64]]:
    """Embeddings of three layers side by side, each with its own say about the class."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), n)
    parts = []
    for name, size in SIZES.items():
        means = rng.normal(size=(classes, size))
        parts.append(5 + strength[name] * means[labels] + rng.normal(size=(len(labels), size)))
    scale = np.repeat([100.0, 1.0, 0.01], list(SIZES.values()))  # layers differ in scale
    return (np.hstack(parts) * scale).astype(np.float32), labels


def unit(rows: NDArray[Any]) -> NDArray[np.float64]:
    rows = rows.astype(np.float64)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def by_hand(rows: Rows, share: float) -> NDArray[np.float64]:
    """Early and middle have ``share`` of the squared length, penultimate the rest."""
    each = np.sqrt(share / 2)
    return np.hstack([each * unit(rows[:, :6]), each * unit(rows[:, 6:11]), np.sqrt(1 - share) * unit(rows[:, 11:])])


# --- columns and normalisers --------------------------------------------------------------------------------------


def test_columns_are_where_the_layers_are() -> None:
    assert [LAYERS.columns(name) for name in SIZES] == [(0, 6), (6, 11), (11, 23)]
    assert LAYERS.columns(COMBINED) == (0, 23)
    assert LAYERS.reference == "penultimate"
    assert Layers({"a": 3, "b": 4}).reference == "b"
    with pytest.raises(UsageError, match=r"no layer 'midle' in this store: found early, middle.*Did you mean middle"):
        LAYERS.columns("midle")


def test_a_layer_that_is_called_combined_is_that_layer() -> None:
    odd = Layers({"combined": 3, "penultimate": 4})
    assert odd.columns(COMBINED) == (0, 3)
    assert layer_place(COMBINED, ("combined", "penultimate")) == 0
    assert layer_place(COMBINED, ("early", "penultimate")) is None
    found = (np.ones((2, 3), np.float32), np.zeros((2, 4), np.float32))
    assert of_layer(found, None).shape == (2, 7)
    assert of_layer(found, 1) is found[1]


def test_the_kinds_are_unit_layers_by_their_share() -> None:
    rows, _ = stacked(4, dict.fromkeys(SIZES, 1.0))
    assert len(LAYERS.kinds()) == len(SHARES)
    for kind, share in zip(LAYERS.kinds(), SHARES, strict=True):
        found = Normalise(kind).fit_transform(rows)
        np.testing.assert_allclose(found, by_hand(rows, share), atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-3)
    rows[0, :6] = 0.0
    assert np.isfinite(Normalise(LAYERS.kinds()[2]).fit_transform(rows)).all()


def test_several_networks_are_joined_in_equal_parts_before_anything_else() -> None:
    joined = Layers({"a/early": 3, "a": 4, "b": 5}, {"a/early": "a", "a": "a", "b": "b"})
    assert joined.references == ("a", "b") and joined.reference == "a" and joined.whole == JOINED
    assert joined.columns(JOINED) == (0, 12) and joined.columns("b") == (7, 12)
    half = np.sqrt(0.5)
    weights = [[weight for _, weight in blocks_of(kind)] for kind in joined.kinds()]
    assert weights[0] == pytest.approx([0.0, half, half], abs=1e-4)
    for each, share in zip(weights[1:], SHARES[1:], strict=False):
        assert np.square(each) == pytest.approx([share, (1 - share) / 2, (1 - share) / 2], abs=1e-3)
    assert weights[-2:] == [pytest.approx([0, 1, 0]), pytest.approx([0, 0, 1])]  # one network alone, at last
    chosen = joined.heads(HEADS, None, None)
    assert set(chosen) == {f"{name}@joined" for name in HEADS} | {f"ridge@{name}" for name in joined.names}


def test_a_network_that_sees_nothing_is_left_out_where_there_is_evidence() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 40)
    good = 0.6 * rng.normal(size=(3, 20))[labels] + rng.normal(size=(120, 20))
    rows = np.hstack([good, 50 * rng.normal(size=(120, 20))]).astype(np.float32)
    head = Layers({"good": 20, "noise": 20}, {"good": "good", "noise": "noise"}).on(HEADS["ridge"], JOINED)
    many = choose(head, rows, labels, np.arange(120))
    assert [weight for _, weight in blocks_of(many.params["kind"])] == [1.0, 0.0]
    few = choose(head, rows[::20], labels[::20], np.arange(6))
    assert few.params["kind"] == head.kinds[0]


@pytest.mark.parametrize(
    "kind", ["none", "l2", "power_l2", "centre_l2", "standardise", blocks_kind([(4, 0.6), (5, 0.8)])]
)
def test_a_part_of_the_rows_is_seen_as_by_itself(kind: Any) -> None:
    rows = np.random.default_rng(0).normal(size=(30, 9)).astype(np.float32)
    whole = Views(rows)
    whole.products(kind), whole.rows(kind)  # what is known of all is used again
    some = np.array([1, 4, 5, 11, 17, 28])
    part = whole.part(np.arange(1, 29)).part(some - 1)
    alone = Normalise(kind).fit_transform(rows[some])
    np.testing.assert_allclose(part.rows(kind), alone, atol=1e-12)
    np.testing.assert_allclose(part.products(kind), alone @ alone.T, atol=1e-12)


def test_kinds_are_read_strictly() -> None:
    kind = blocks_kind([(1280, 0.5), (40, 0.0)])
    assert kind == "blocks_l2:1280*0.5000,40*0.0000"
    assert blocks_of(kind) == [(1280, 0.5), (40, 0.0)]
    assert is_kind(kind, 1320)
    assert not is_kind(kind, 1280)
    for bad in ("blocks_l2:", "blocks_l2:3", "blocks_l2:3*1", "blocks_l2:03*1.0000", "blocks_l2:3*9.0000", "l2 ", None):
        assert not is_kind(bad, 3)
    with pytest.raises(ValueError, match="blocks of 5 columns, got 'blocks_l2:4"):
        Normalise(blocks_kind([(4, 1.0)])).fit(np.ones((3, 5)))


# --- choosing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["ridge", "logreg"])
def test_weights_go_where_the_classes_can_be_told(head: str) -> None:
    combined = LAYERS.on(HEADS[head], COMBINED)
    share = dict(zip(LAYERS.kinds(), SHARES, strict=True))
    found: dict[str, list[float]] = {"early": [], "penultimate": []}
    for best, chosen in found.items():
        for seed in range(6):
            strength = {name: 1.5 if name == best else 0.0 for name in SIZES}
            rows, labels = stacked(10, strength, seed)
            choice = choose(combined, rows, labels, np.arange(len(labels)), random_state=seed)
            chosen.append(share[choice.params["kind"]])
            assert choice.score is not None
    assert min(found["early"]) >= 0.5
    assert np.mean(found["penultimate"]) < 0.1


def test_the_reference_layer_is_left_alone_where_it_makes_no_mistake() -> None:
    head = LAYERS.on(HEADS["ridge"], COMBINED)
    rows, labels = stacked(10, {"early": 6.0, "middle": 0.0, "penultimate": 3.0})
    groups = np.arange(len(labels))
    folds = fold_numbers(labels, groups, 5, 0)
    validation = _Validation(head, Views(rows), labels, folds)
    reference, other = (validation.losses(kind, (1.0,))[0][0] for kind in (head.kinds[0], head.kinds[2]))
    gain = reference - other
    assert gain.mean() > 2 * gain.std() / np.sqrt(len(gain))  # the loss alone would have it otherwise
    assert choose(head, rows, labels, groups, random_state=0).params["kind"] == head.kinds[0]


def test_with_few_images_the_reference_layer_is_taken_alone() -> None:
    rows, labels = stacked(4, {"early": 2.0, "middle": 0.0, "penultimate": 0.0})
    choice = choose(LAYERS.on(HEADS["ridge"], COMBINED), rows, labels, np.arange(len(labels)))
    assert choice.params["kind"] == LAYERS.kinds()[0]


def test_a_combined_head_is_ridge_on_weighted_unit_layers() -> None:
    rows, labels = stacked(12, dict.fromkeys(SIZES, 1.0))
    head = LAYERS.on(HEADS["ridge"], COMBINED)
    model = head.build(kind=LAYERS.kinds()[2], alpha=1.0).fit(rows, labels)
    plain = by_hand(rows, SHARES[2])
    design = np.hstack([plain, np.ones((len(plain), 1))])
    oracle = RidgeClassifier(alpha=plain.var(axis=0).sum(), fit_intercept=False).fit(design, labels)
    np.testing.assert_allclose(model.decision_function(rows), oracle.decision_function(design), atol=2e-3)
    scorer = Scorer.of(model)
    np.testing.assert_allclose(scorer.scores(rows), model.decision_function(rows), atol=1e-9)


# --- the sweep ----------------------------------------------------------------------------------------------------


def test_layers_are_compared_on_the_same_draws_as_alone() -> None:
    rows, labels = stacked(20, {"early": 1.0, "middle": 0.2, "penultimate": 0.4})
    plan: dict[str, Any] = {"class_names": list("abc"), "shots": (2, 6), "episodes": 4, "n_jobs": 1}
    plan["near_duplicates"] = None
    found = sweep_heads(rows, labels, **plan, heads=["ridge", "knn"], layers=LAYERS)
    assert set(found.heads) == {f"{h}@{name}" for h in ("ridge", "knn") for name in (*SIZES, COMBINED)}
    assert found.heads[:2] == ("ridge@penultimate", "knn@penultimate")
    for name, (first, last) in ((name, LAYERS.columns(name)) for name in SIZES):
        alone = sweep_heads(rows[:, first:last], labels, **plan, heads=["ridge", "knn"])
        for head in ("ridge", "knn"):
            for n_shots in (2, 6):
                for ours, theirs in zip(found.of(f"{head}@{name}", n_shots), alone.of(head, n_shots), strict=True):
                    np.testing.assert_array_equal(ours.predictions, theirs.predictions)
                    assert (ours.layer, ours.params) == (name, theirs.params)
    for episode, (support, query) in enumerate(
        KShotSplit(6, n_episodes=4).split(rows, labels, found.duplicates.groups)
    ):
        trial = found.of("ridge@combined", 6)[episode]
        model = LAYERS.on(HEADS["ridge"], COMBINED).build(**trial.params).fit(rows[support], labels[support])
        assert trial.accuracy == model.score(rows[query], labels[query])
    told = json.loads(json.dumps(found.to_json()))
    assert {row["layer"] for row in told["results"]} == {*SIZES, COMBINED}
    assert found.winner.endswith(("@early", "@combined"))
    assert all(row["head"].endswith("@" + row["layer"]) for row in told["results"])


def test_by_default_all_heads_are_on_the_reference_and_the_best_on_the_others() -> None:
    named = LAYERS.heads(HEADS, None, None)
    assert set(named) == {*(f"{head}@penultimate" for head in HEADS), "ridge@early", "ridge@middle", "ridge@combined"}
    assert set(LAYERS.heads(HEADS, None, ["middle"])) == set(HEADS)
    assert {head.layer for head in LAYERS.heads(HEADS, None, ["middle"]).values()} == {"middle"}
    assert set(LAYERS.heads(HEADS, ["auto"], ["middle", COMBINED])) == {"ridge@middle", "ridge@combined"}


def test_layers_that_do_not_fit_are_refused() -> None:
    rows, labels = stacked(6, dict.fromkeys(SIZES, 1.0))
    with pytest.raises(UsageError, match="embeddings and layers do not fit"):
        sweep_heads(rows[:, 1:], labels, class_names=list("abc"), layers=LAYERS)


def test_journals_tell_layers_apart(tmp_path: Path) -> None:
    rows, labels = stacked(8, dict.fromkeys(SIZES, 1.0))
    path = tmp_path / "journal.jsonl"

    def run(layer: str, stop: int) -> list[int]:
        seen: list[int] = []

        def watch(done: int, total: int, what: str) -> None:
            seen.append(done)
            if done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sweep_heads(
                rows, labels, class_names=list("abc"), heads=["ridge"], shots=(1,), episodes=4, n_jobs=1,
                layers=LAYERS, on=[layer], journal=path, progress=watch,
            )  # fmt: skip
        return seen

    assert run("early", 2)[0] == 0
    assert run("early", 3)[0] == 2
    assert run("middle", 1)[0] == 0


# --- the commands -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, featx: Featx) -> Path:
    folder = tmp_path_factory.mktemp("layers")
    source = class_folders(folder / "photos", each=12)
    layers = ("--layer", "blocks.2", "--layer", "penultimate", "--layer", "blocks.4")
    ran = featx("extract", source, "--out", folder / "s.featx", *layers, "--json")
    assert ran.code == 0
    return folder / "s.featx"


@pytest.mark.slow
def test_a_store_of_several_layers_is_swept_fitted_served_and_exported(store: Path, featx: Featx) -> None:
    swept = featx(
        "sweep", store, "--heads", "auto", "--shots", "1,6", "--episodes", "3", "--n-jobs", "1", "--json"
    ).json
    assert {row["layer"] for row in swept["results"]} == {"blocks.2", "blocks.4", "penultimate", "combined"}
    assert "ridge@combined" in (store.parent / "s.report" / "trials.csv").read_text()
    model = store.parent / "s.model"
    told = featx("fit", store, "--out", model, "--head", "ridge@combined", "--json").json
    assert told["layer"] == "combined"
    bundle = read_bundle(model)  # compares the golden vectors
    assert bundle.scorer.dims == 1280 + 40 + 112
    assert [size for size, _ in blocks_of(bundle.scorer.kind)] == [40, 1280, 112]
    rows = bundle.golden
    np.testing.assert_allclose(
        to_pipeline(bundle).predict_proba(rows), bundle.probabilities(rows), atol=1e-7, err_msg="scikit-learn's own"
    )
    image = sorted((store.parent / "photos").rglob("*.png"))[0]
    (predicted,) = featx("predict", model, image, "--json").json["predictions"]
    features, _ = read_layers(store)
    row = int(np.flatnonzero(features.ids == f"{image.parent.name}/{image.name}")[0])
    ours = bundle.answer(features.embeddings[row : row + 1])[0]
    assert (predicted["label"], predicted["score"]) == (ours.label, pytest.approx(ours.score, abs=1e-5))
    evidence = Evidence(store, bundle)
    assert features.provenance["layers"][evidence.layer] == "penultimate"
    embedder = open_embedder(bundle, model)  # proves the network on all layers of the probe image
    found = embedder.embed_bytes(image.read_bytes())
    np.testing.assert_array_equal(of_layer(found, None)[0], features.embeddings[row])
    assert evidence.nearest(of_layer(found, evidence.layer), 1)[0][0]["id"] == features.ids[row]
    single = featx("fit", store, "--out", store.parent / "one.model", "--layer", "blocks.4", "--json").json
    assert (single["layer"], single["params"]["kind"]) == ("blocks.4", single["kind"])


@pytest.mark.slow
def test_layers_that_are_not_there_are_named(store: Path, featx: Featx) -> None:
    wrong = featx("sweep", store, "--layers", "blocks.4,block.2")
    assert wrong.code == 2
    assert "no layer 'block.2' in this store: expected some of blocks.2, penultimate, blocks.4, combined, or all" in (
        " ".join(wrong.err.split())
    )
    assert "Did you mean blocks.2" in wrong.err
    assert featx("fit", store, "--out", store.parent / "x.model", "--layer", "combine").code == 2
    two = featx("fit", store, "--out", store.parent / "x.model", "--layer", "blocks.4,blocks.2")
    assert (two.code, "a model is on one layer, or on combined" in two.err) == (2, True)
    mixed = featx("fit", store, "--out", store.parent / "x.model", "--head", "ridge@blocks.4,knn@blocks.2")
    assert (mixed.code, "several heads are compared on one layer" in mixed.err) == (2, True)


def test_the_table_of_many_layers_fits_eighty_columns_and_cuts_no_name() -> None:
    from io import StringIO

    from rich.console import Console

    from featx.reports.sweep import render_table

    rows, labels = stacked(8, dict.fromkeys(SIZES, 1.0))
    found = sweep_heads(
        rows, labels, class_names=list("abc"), shots=(2,), episodes=2, n_jobs=1, layers=LAYERS,
        heads=["nearest_centroid", "ridge"],
    )  # fmt: skip
    out = StringIO()
    Console(file=out, width=80).print(render_table(found))
    text = out.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    words = text.replace("│", " ").split()
    assert {"nearest_centroid", "ridge", "@penultimate", "@early", "@middle", "@combined"} <= set(words)
