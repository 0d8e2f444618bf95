"""Fine-tuning: paired with heads on a sweep's draws, repeatable, resumable, and what is kept is what was trained."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Featx, class_folders
from imagekit import pixels
from tuningkit import small, striped_folders
from warm import Warm

from featx.adaptation import training
from featx.adaptation.activations import Wanted, activations
from featx.adaptation.finetune import FinetuneResult, finetune_episodes, open_tuning
from featx.adaptation.training import Recipe
from featx.backbones.backbone import Backbone
from featx.backbones.cut import Trunk, cut_network
from featx.backbones.engines.choice import make_engine
from featx.errors import MismatchError, SourceError, UsageError
from featx.evaluation.sweep import sweep_heads
from featx.extraction.run import extract_features
from featx.heads.scorer import softmax
from featx.images.source import ImageSet
from featx.models.bundle import read_bundle, write_bundle
from featx.models.finetuned import finetune_bundle
from featx.models.predictor import open_embedder
from featx.store.reader import FeatureSet, read_features

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return small()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return ImageSet.from_source(striped_folders(tmp_path_factory.mktemp("striped") / "photos"))


@pytest.fixture(scope="module")
def features(images: ImageSet, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    store = tmp_path_factory.mktemp("store") / "s.featx"
    extract_features(images, backbone, store, engine=make_engine(backbone, engine="torch", device="cpu"))
    return read_features(store)


QUICK = Recipe(epochs=6, learning_rate=3e-3)


def tune(
    features: FeatureSet, images: ImageSet, backbone: Backbone, folder: Path, recipe: Recipe = QUICK, **options: object
) -> FinetuneResult:
    settings: dict[str, object] = {
        "shots": (3,), "episodes": 2, "heads": ("logreg", "ridge"), "device": "cpu", "unfreeze": "all", **options,
    }  # fmt: skip
    return finetune_episodes(features, images, backbone, folder, recipe=recipe, **settings)  # type: ignore[arg-type]


@pytest.mark.slow
def test_heads_and_draws_are_those_of_a_sweep(
    features: FeatureSet, images: ImageSet, backbone: Backbone, tmp_path: Path
) -> None:
    found = tune(features, images, backbone, tmp_path / "t", unfreeze=1)
    groups = features.copies
    swept = sweep_heads(
        features.embeddings, features.labels, class_names=features.class_names, groups=groups,
        heads=("logreg", "ridge"), shots=(3,), episodes=2, near_duplicates=features.near_copies,
    )  # fmt: skip
    for head in swept.heads:
        for ours, theirs in zip(found.sweep.of(head, 3), swept.of(head, 3), strict=True):
            assert ours.accuracy == theirs.accuracy
    for trial in found.sweep.of("finetune:1", 3):
        query = swept.queries[3, trial.episode]
        assert trial.accuracy == (trial.predictions == swept.labels[query]).mean()
        assert trial.n_query == len(query)
    told = found.to_json()
    assert {"winner", "results", "comparisons", "seconds", "duplicates"} <= set(told)
    json.dumps(told, allow_nan=False)
    (against,) = found.against_best()
    best = max(swept.heads, key=lambda head: np.mean([t.accuracy for t in swept.of(head, 3)]))
    assert (against.a, against.b) == ("finetune:1", best)
    difference = [
        a.accuracy - b.accuracy for a, b in zip(found.sweep.of("finetune:1", 3), swept.of(best, 3), strict=True)
    ]
    assert against.difference.interval.mean == pytest.approx(np.mean(difference))
    assert not (tmp_path / "t").exists()  # activations are for the time being


@pytest.mark.slow
def test_training_beats_frozen_random_features(
    features: FeatureSet, images: ImageSet, backbone: Backbone, tmp_path: Path
) -> None:
    found = tune(
        features, images, backbone, tmp_path / "t", Recipe(epochs=60, learning_rate=1e-2, early_stop=False),
        shots=(8,), episodes=4, unfreeze=3,
    )  # fmt: skip
    accuracy = {each.head: each.accuracy.mean for each in found.sweep.results}
    assert accuracy["finetune:3"] >= 0.8, accuracy
    assert accuracy["finetune:3"] >= max(accuracy["logreg"], accuracy["ridge"]) + 0.1


@pytest.mark.slow
def test_the_same_seed_gives_the_same_and_another_another(
    features: FeatureSet, images: ImageSet, backbone: Backbone, tmp_path: Path
) -> None:
    def confidences(**options: object) -> list[np.ndarray]:
        recipe = replace(QUICK, epochs=3, augment=True)
        found = tune(features, images, backbone, tmp_path / "t", recipe, heads=("logreg",), **options)
        return [t.confidences for t in found.sweep.of("finetune:all", 3) if t.confidences is not None]

    first, again, other = confidences(), confidences(), confidences(random_state=1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_from_scratch_is_another_competitor(
    features: FeatureSet, images: ImageSet, backbone: Backbone, tmp_path: Path
) -> None:
    recipe = Recipe(epochs=3, from_scratch=True, augment=True)
    found = tune(features, images, backbone, tmp_path / "t", recipe, heads=("logreg",))
    assert found.head == "scratch"
    assert found.cut == ""
    assert any("control" in note for note in found.sweep.notes)
    assert all(0 <= t.accuracy <= 1 for t in found.sweep.of("scratch", 3))


def test_no_training_is_the_logistic_head(features: FeatureSet, images: ImageSet, backbone: Backbone) -> None:
    """Stopped before the first epoch, fine-tuning is the head of the frozen embeddings."""
    from featx.heads.catalogue import make_head

    halves = cut_network(backbone, "all")
    shown = np.stack([pixels(Path(str(ref.path)).read_bytes(), backbone.preprocess) for ref in images.refs])
    rows = np.arange(len(shown))
    start = training._start(halves.tail, features.labels, features.embeddings)
    plain = make_head("logreg", kind="l2", C=training.START_C).fit(features.embeddings, features.labels)
    found = softmax(training.scores(start, shown, rows))
    np.testing.assert_allclose(found, plain.predict_proba(features.embeddings), atol=1e-4)


def test_epochs_are_chosen_by_held_out_rows_only(features: FeatureSet, images: ImageSet, backbone: Backbone) -> None:
    halves = cut_network(backbone, "all")
    shown = np.stack([pixels(Path(str(ref.path)).read_bytes(), backbone.preprocess) for ref in images.refs])
    rows, groups = np.arange(len(shown)), np.arange(len(shown))
    trained = training.train(halves.tail, shown, rows, features.labels, groups, recipe=QUICK)
    assert trained.losses is not None
    assert len(trained.losses) == QUICK.epochs + 1
    assert trained.epochs == int(trained.losses.argmin())
    before = [p.clone() for p in halves.tail.parameters()]
    training.train(halves.tail, shown, rows, features.labels, groups, recipe=replace(QUICK, early_stop=False))
    assert all(torch.equal(a, b) for a, b in zip(before, halves.tail.parameters(), strict=True))
    norms = [module for module in trained.classifier.tail.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    assert all(int(norm.state_dict()["num_batches_tracked"]) == 0 for norm in norms)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": (1,)}, "too few images to stop early by: expected 2 or more of every class, found 1"),
        ({"shots": (12,)}, "has too few images"),
        ({"unfreeze": 4}, "has no 4 blocks to unfreeze: expected 1 to 3, or all, found 4"),
        ({"unfreeze": 1, "recipe": replace(QUICK, augment=True)}, "activations cannot be mirrored or shifted"),
        ({"heads": ()}, "no head to compare with"),
    ],
)
def test_what_cannot_be_done_is_said(
    features: FeatureSet, images: ImageSet, backbone: Backbone, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        tune(features, images, backbone, tmp_path / "t", **options)  # type: ignore[arg-type]


def test_one_shot_without_early_stopping(
    features: FeatureSet, images: ImageSet, backbone: Backbone, tmp_path: Path
) -> None:
    recipe = replace(QUICK, epochs=2, early_stop=False)
    found = tune(features, images, backbone, tmp_path / "t", recipe, shots=(1,), heads=("logreg",))
    assert found.sweep.of("finetune:all", 1)[0].params == {"epochs": 2}
    assert found.sweep.of("finetune:all", 1)[0].selection_score is None


def test_another_source_than_the_stores(
    features: FeatureSet, images: ImageSet, backbone: Backbone, tmp_path: Path
) -> None:
    stranger = ImageSet.from_source(class_folders(tmp_path / "others"))
    with pytest.raises(MismatchError, match="the store's images are not all in it"):
        tune(features, stranger, backbone, tmp_path / "t")
    fewer = replace(images, refs=images.refs[1:])
    with pytest.raises(SourceError, match=r"1 of 24 missing, such as across/000\.png"):
        tune(features, fewer, backbone, tmp_path / "t")
    swapped = [replace(a, path=b.path) for a, b in zip(images.refs, images.refs[1:], strict=False)]
    with pytest.raises(MismatchError, match="the image is another one than in the store"):
        tune(features, replace(images, refs=(*swapped, images.refs[-1])), backbone, tmp_path / "t")


# --- activations --------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def wanted_of(features: FeatureSet, images: ImageSet, backbone: Backbone) -> Wanted:
    halves = cut_network(backbone, 1)
    trunk = Trunk.of(backbone, halves)
    return Wanted(
        ids=features.ids.tolist(), origins=[ref.path for ref in images.refs], digests=features.digests,
        preprocess=backbone.preprocess, decode="full", shape=halves.tail.shape, provenance=trunk.provenance(),
        engine=make_engine(trunk, engine="torch", device="cpu", precision="fp32", batch_size=4),
    )  # fmt: skip


def test_activations_go_on_where_they_stopped(
    features: FeatureSet, images: ImageSet, backbone: Backbone, tmp_path: Path
) -> None:
    wanted = wanted_of(features, images, backbone)
    with activations(tmp_path / "a", wanted) as found:
        expected = np.array(found)
    assert not (tmp_path / "a").exists()

    def stop(done: int, total: int) -> None:
        if done >= 12:
            raise Stopped

    with pytest.raises(Stopped), activations(tmp_path / "a", wanted, progress=stop):
        pass
    (file,) = (tmp_path / "a").glob("*.act")
    assert 12 * expected[0].nbytes <= file.stat().st_size < expected.nbytes
    seen: list[int] = []
    with activations(tmp_path / "a", wanted, progress=lambda done, total: seen.append(done)) as found:
        np.testing.assert_array_equal(found, expected)
    assert seen[0] >= 12


def test_altered_activations_are_made_again(
    features: FeatureSet, images: ImageSet, backbone: Backbone, tmp_path: Path
) -> None:
    wanted = wanted_of(features, images, backbone)
    with pytest.raises(Stopped), activations(tmp_path / "a", wanted) as found:
        expected = np.array(found)
        raise Stopped
    (file,) = (tmp_path / "a").glob("*.act")
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    with activations(tmp_path / "a", wanted) as found:
        np.testing.assert_array_equal(found, expected)


def test_activations_have_a_bound(features: FeatureSet, images: ImageSet, backbone: Backbone, tmp_path: Path) -> None:
    wanted = wanted_of(features, images, backbone)
    with (
        pytest.raises(UsageError, match=r"too much of the disk: expected at most 1e-06 GiB, .*--max-cache"),
        activations(tmp_path / "a", wanted, max_gib=1e-6),
    ):
        pass
    assert not (tmp_path / "a").exists()


# --- for keeps ----------------------------------------------------------------------------------------------------


def test_only_labelled_images_outside_of_test_are_trained_on(
    features: FeatureSet, images: ImageSet, backbone: Backbone, tmp_path: Path
) -> None:
    labels, splits = features.labels.copy(), features.splits.astype("U5")
    labels[0], splits[1] = -1, "test"
    some = replace(features, labels=labels, splits=splits)
    with open_tuning(some, images, backbone, tmp_path / "t", unfreeze=2, recipe=QUICK, device="cpu") as tuning:
        used = tuning.features
        assert used.ids.tolist() == features.ids[2:].tolist()
        assert len(used.groups) == len(used) == len(used.near_copies.hashes)  # type: ignore[union-attr]


@pytest.mark.slow
def test_the_kept_model_is_the_trained_one(
    features: FeatureSet, images: ImageSet, backbone: Backbone, tmp_path: Path
) -> None:
    with open_tuning(features, images, backbone, tmp_path / "t", unfreeze=2, recipe=QUICK, device="cpu") as tuning:
        bundle = finetune_bundle(tuning, engine="torch")
    write_bundle(bundle, tmp_path / "m.model")
    kept = read_bundle(tmp_path / "m.model")
    assert kept.tail == bundle.tail
    assert kept.provenance["finetuned"]["base_weights_sha256"] == backbone.weights_sha256
    assert kept.describe()["format_version"] == 3
    assert kept.metrics["images"] == 24
    # What is unknown was calibrated by networks that had not seen the images; another class takes another training.
    assert kept.familiarity is not None
    assert (len(kept.familiarity.rows), len(kept.familiarity.own), kept.max_unknown) == (24, 24, 0.05)
    assert kept.metrics["unknown"]["images"] == 24
    assert kept.metrics["unknown"]["class_left_out"] is None
    assert kept.familiarity.own.max() < 1 - 1e-6  # none found itself
    assert bundle.answer(bundle.golden) == kept.answer(kept.golden)
    # The golden rows are what training ended with; the network is built anew from its base and the tail.
    with pytest.raises(UsageError, match="a network of your own"):
        open_embedder(kept, tmp_path / "m.model", engine="torch", device="cpu")


@pytest.mark.slow
def test_a_kept_model_for_other_shares_of_the_classes(
    features: FeatureSet, images: ImageSet, backbone: Backbone, tmp_path: Path
) -> None:
    """The same network and head, whose scores move by one number a class, towards the one that is met more often."""
    first, *others = features.class_names
    prior = {first: 0.9, **{name: 0.1 / len(others) for name in others}}
    with open_tuning(features, images, backbone, tmp_path / "t", unfreeze=2, recipe=QUICK, device="cpu") as tuning:
        plain, moved = (finetune_bundle(tuning, engine="torch", prior=each) for each in (None, prior))
        with pytest.raises(UsageError, match="a class without a share"):
            finetune_bundle(tuning, engine="torch", prior={first: 1.0})
    assert plain.prior is None
    assert moved.prior == pytest.approx(prior)
    assert moved.tail == plain.tail
    assert plain.scorer.coef is not None and moved.scorer.coef is not None
    np.testing.assert_array_equal(moved.scorer.coef, plain.scorer.coef)
    before, after = plain.scorer.scores(plain.golden), moved.scorer.scores(plain.golden)
    np.testing.assert_allclose(after - before, np.broadcast_to((after - before)[0], before.shape), atol=1e-9)
    added = (after - before)[0]
    assert added.argmax() == 0 and added[0] > added[1:].max()
    assert moved.probabilities(plain.golden)[:, 0].mean() > plain.probabilities(plain.golden)[:, 0].mean()
    write_bundle(moved, tmp_path / "m.model")
    assert read_bundle(tmp_path / "m.model").prior == pytest.approx(prior)


@pytest.mark.slow
def test_finetune_from_the_command_line(featx: Featx, tmp_path: Path) -> None:
    """Compare, keep, predict; the model's probabilities are those of plain torch with the tail put in by hand."""
    import safetensors.torch

    from featx.backbones.backbone import load_backbone

    class_folders(tmp_path / "photos", each=6)
    assert featx("extract", "photos", "--out", "s.featx", cwd=tmp_path).code == 0
    options = ["--shots", "3", "--episodes", "2", "--heads", "logreg", "--seed", "0", "--json"]
    swept = featx("sweep", "s.featx", *options, cwd=tmp_path).json
    tuned = featx("finetune", "s.featx", "photos", *options, "--epochs", "2", "--out", "m.model", cwd=tmp_path)
    assert tuned.code == 0, tuned.err
    by_head = {each["head"]: each["accuracy"] for each in tuned.json["results"]}
    assert by_head["logreg"] == swept["results"][0]["accuracy"]
    assert set(by_head) == {"logreg", "finetune:1"}
    assert tuned.json["finetune"]["cut"] == "blocks.6.0"
    assert not (tmp_path / "s.tuning").exists()
    (image,) = sorted((tmp_path / "photos" / "bees").iterdir())[:1]
    said = featx("predict", "m.model", image, "--json", cwd=tmp_path).json["predictions"][0]
    bundle = read_bundle(tmp_path / "m.model")
    assert bundle.tail is not None
    body = load_backbone().network().body
    body.load_state_dict(safetensors.torch.load(bundle.tail), strict=False)
    shown = torch.from_numpy(pixels(image.read_bytes(), load_backbone().preprocess).copy())
    with torch.no_grad():
        embedding = body(shown.permute(2, 0, 1)[None].float().div(127.5).sub(1)).numpy()
    expected = bundle.answer(embedding)[0]
    assert said["label"] == expected.label
    for name, probability in said["probabilities"].items():
        assert probability == pytest.approx(expected.probabilities[name], abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--unfreeze", "99"], "has no 99 blocks to unfreeze"),
        (["--unfreeze", "some"], "--unfreeze cannot be read"),
        (["--shots", "1"], "too few images to stop early by"),
        (["--shots", "99"], "class 'ants' has too few images"),
        (["--augment"], "activations cannot be mirrored or shifted"),
        (["--weights", "other.pt"], "no such weights file"),
        (["--prior", "equal"], "only a model that is kept uses it"),
        (["--prior", "none.csv", "--out", "m.model"], "no such file"),
        (["--max-error", "2", "--out", "m.model"], "--max-error is a share of the answers"),
    ],
)
def test_usage_errors_exit_with_2(featx: Featx, store_of_photos: Path, options: list[str], message: str) -> None:
    ran = featx("finetune", "s.featx", "photos", "--heads", "logreg", *options, cwd=store_of_photos)
    assert ran.code == 2
    assert message in " ".join(ran.err.split())
    assert ran.err.count("Error:") == 1
    assert not (store_of_photos / "s.tuning").exists()


def test_images_without_labels_cannot_be_trained_on(featx: Featx, tmp_path: Path) -> None:
    class_folders(tmp_path / "photos", names=("a", "b"), each=3)
    photos = tmp_path / "photos" / "a"
    ran = featx("extract", photos, "--out", "s.featx", cwd=tmp_path)
    assert "Next: featx duplicates s.featx" in ran.out
    ran = featx("finetune", "s.featx", photos, cwd=tmp_path)
    assert ran.code == 2
    assert "at least two classes: expected 2 classes, found no labelled image" in ran.err
    assert not (tmp_path / "s.tuning").exists()


@pytest.fixture(scope="module")
def store_of_photos(featx: Featx, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    class_folders(folder / "photos", each=6)
    assert featx("extract", "photos", "--out", "s.featx", cwd=folder).code == 0
    return folder


@pytest.mark.slow
def test_ctrl_c_keeps_draws_and_activations(featx: Featx, warm: Warm, store_of_photos: Path) -> None:
    command = ["finetune", "s.featx", "photos", "--heads", "logreg", "--shots", "2", "--episodes", "40"]
    process = warm.begin(command, store_of_photos)
    journal = store_of_photos / "s.tuning" / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "finished draws are kept" in err
    assert list((store_of_photos / "s.tuning").glob("*.act"))
    assert journal.read_bytes().count(b"\n") >= 2
