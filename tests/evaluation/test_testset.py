"""The judgement on a test split: trained elsewhere, copies left out, every use counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Featx, class_folders

from featx.errors import UsageError
from featx.evaluation.testset import judge
from featx.heads.catalogue import HEADS
from featx.store.reader import FeatureSet


def made(n: int = 60, seed: int = 0) -> FeatureSet:
    """Two blobs; half of the rows are train, half test."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    embeddings = random.normal(size=(n, 20)) + 3 * labels[:, None] * np.eye(20)[0]
    return FeatureSet(
        embeddings=embeddings.astype(np.float32),
        ids=np.array([f"{i:03d}" for i in range(n)]),
        labels=labels,
        class_names=("a", "b"),
        splits=np.where(np.arange(n) < n // 2, "train", "test"),
        digests=random.integers(0, 256, (n, 32), dtype=np.uint8),
        layer="penultimate",
        provenance={},
        fingerprint="",
    )


def changed(features: FeatureSet, **fields: object) -> FeatureSet:
    return FeatureSet(**{**vars(features), **fields})


def test_it_trains_on_the_rest_and_counts_right_answers(tmp_path: Path) -> None:
    features = made()
    found = judge(features, "test", HEADS["nearest_centroid"], tmp_path / "uses.jsonl")
    assert (found.training_images, found.images, found.copies) == (30, 30, 0)
    assert 0.8 < found.accuracy.mean <= 1
    assert found.accuracy.low < found.accuracy.mean <= found.accuracy.high
    assert found.majority_baseline == 0.5
    # Labels of the test rows decide nothing but the score.
    flipped = changed(features, labels=np.where(features.splits == "test", 1 - features.labels, features.labels))
    other = judge(flipped, "test", HEADS["nearest_centroid"], tmp_path / "uses.jsonl")
    assert other.accuracy.mean == pytest.approx(1 - found.accuracy.mean)


def test_every_use_of_a_test_set_is_counted(tmp_path: Path) -> None:
    ledger = tmp_path / "uses.jsonl"
    assert [judge(made(), "test", HEADS[head], ledger).used for head in ("knn", "nearest_centroid", "knn")] == [1, 2, 3]
    assert judge(made(seed=1), "test", HEADS["knn"], ledger).used == 1  # other images
    assert "use number 4 of this test set. Choices made after" in judge(made(), "test", HEADS["knn"], ledger).sentence
    assert len([json.loads(line) for line in ledger.read_text().splitlines()]) == 5


@pytest.mark.parametrize(
    "line", [b"\xff\xfe{\n", b'{"test_set": "\xe9"}\n', b"{\n", b"[]\n", b'{"split": "test"}', b"\n"]
)
def test_a_ledger_that_cannot_be_counted_is_left_as_it_is(tmp_path: Path, line: bytes) -> None:
    ledger = tmp_path / "uses.jsonl"
    judge(made(), "test", HEADS["knn"], ledger)
    content = ledger.read_bytes() + line
    ledger.write_bytes(content)
    with pytest.raises(UsageError, match=r"uses\.jsonl, line 2: the uses of this test set cannot be counted"):
        judge(made(), "test", HEADS["knn"], ledger)
    assert ledger.read_bytes() == content


def test_copies_of_training_images_are_left_out(tmp_path: Path) -> None:
    features = made()
    embeddings, digests = features.embeddings.copy(), features.digests.copy()
    digests[40] = digests[3]  # the same file
    embeddings[40] = embeddings[3]
    embeddings[41] = embeddings[5] * 1.0001  # nearly the same picture
    found = judge(changed(features, embeddings=embeddings, digests=digests), "test", HEADS["knn"], tmp_path / "u")
    assert (found.images, found.copies) == (28, 2)


def test_mistakes_are_named(tmp_path: Path) -> None:
    features = made()
    with pytest.raises(UsageError, match="no labelled images in the split val"):
        judge(features, "val", HEADS["knn"], tmp_path / "u")
    labels = features.labels.copy()
    labels[-1] = 2
    with pytest.raises(UsageError, match="a class that only the split test has: found c"):
        judge(changed(features, labels=labels, class_names=("a", "b", "c")), "test", HEADS["knn"], tmp_path / "u")
    assert not (tmp_path / "u").exists()


@pytest.mark.slow
def test_the_command_says_how_often(tmp_path: Path, featx: Featx) -> None:
    class_folders(tmp_path / "photos" / "train", each=6)
    class_folders(tmp_path / "photos" / "test", each=6, first=50)
    store = tmp_path / "s.featx"
    assert featx("extract", tmp_path / "photos", "--out", store).code == 0
    arguments = ("sweep", store, "--shots", "2", "--heads", "knn", "--episodes", "3", "--test", "test")
    first = featx(*arguments, "--json")
    assert first.json["test"]["used"] == 1
    assert first.json["test"]["images"] == 12
    assert first.json["images"] == 12
    assert "This is use number 2 of this test set" in " ".join(featx(*arguments).out.split())
    assert "use number 2" in (tmp_path / "s.report" / "report.html").read_text()
    assert featx("sweep", store, "--test", "val", "--shots", "2").code == 2
    (tmp_path / "s.test-uses.jsonl").write_bytes(b"\xff\xfe")
    refused = featx(*arguments)
    assert (refused.code, "s.test-uses.jsonl, line 1" in refused.err) == (2, True)
