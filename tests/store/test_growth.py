"""What large stores need: a sample verified, a part read, contents kept; no step reads or sorts everything again."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Featx

from featx._files import sha256_file
from featx.errors import StoreError, UsageError
from featx.store import shards
from featx.store.index import Index
from featx.store.manifest import read_manifest
from featx.store.reader import FeatureReader, draw_rows, read_features
from featx.store.shards import Contents, ShardReader
from featx.store.tools import info, verify
from featx.store.writer import StoreWriter

ROWS, SHARDS = 600, 12
EMBEDDINGS = np.random.default_rng(1).normal(size=(ROWS, 8)).astype(np.float32)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Twelve shards; row i is of class i % 3."""
    path = tmp_path / "s.featx"
    rng = np.random.default_rng(0)
    digests = [rng.bytes(32) for _ in range(ROWS)]
    with StoreWriter(path, {"backbone": "tiny", "layers": ["penultimate"]}, shard_seconds=1e9) as writer:
        for start in range(0, ROWS, ROWS // SHARDS):
            stop = start + ROWS // SHARDS
            writer.add(digests[start:stop], {"tiny": [EMBEDDINGS[start:stop]]})
            writer.flush()
        index = Index(
            ids=[f"{i:04d}.jpg" for i in range(ROWS)],
            labels=np.arange(ROWS, dtype=np.int64) % 3,
            split=["test" if i < 60 else "train" for i in range(ROWS)],
            digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32),
            class_names=("a", "b", "c"),
            sizes=np.ones(ROWS, np.int64),
            stamps=np.ones(ROWS, np.int64),
        )
        writer.finish(index, [], source="")
    return path


def test_contents_are_those_of_a_set_however_they_are_added() -> None:
    rng = np.random.default_rng(0)
    wanted: set[bytes] = set()
    contents = Contents(np.empty((0, 32), np.uint8))
    for size in rng.integers(1, 40, 60).tolist():
        new = rng.integers(0, 256, (size, 32), dtype=np.uint8)
        new[0, 16:] = 0  # trailing zeros, which numpy's strings would lose
        contents.add(new)
        wanted |= {row.tobytes() for row in new}
    # Few blocks, whatever the number of additions: each is more than twice as long as the next.
    sizes = [len(block) for block in contents._blocks]
    assert sum(sizes) == len(wanted)
    assert all(a > 2 * b for a, b in itertools.pairwise(sizes))
    others = rng.integers(0, 256, (100, 32), dtype=np.uint8)
    others[:50] = np.frombuffer(b"".join(sorted(wanted)[:50]), np.uint8).reshape(-1, 32)
    assert contents.has(others).tolist() == [row.tobytes() in wanted for row in others]
    assert all(each in contents for each in wanted)
    assert b"\0" * 32 not in contents


def test_contents_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    digests = np.zeros((9, 32), np.uint8)
    digests[:6, 8] = [3, 1, 5, 0, 4, 2]
    digests[6:, 0] = 7
    digests[7:, 31] = [1, 2]
    rows = np.arange(9, dtype=np.float32)[:, None]
    with StoreWriter(tmp_path / "s.featx", {"backbone": "tiny", "layers": ["penultimate"]}, shard_rows=4) as writer:
        for digest, row in zip(digests, rows, strict=True):
            writer.add([digest.tobytes()], {"tiny": [row[None]]})
        writer.flush()
        reader = ShardReader(writer.path, writer.manifest)
    others = np.zeros((2, 32), np.uint8)
    others[0, 8], others[1] = 9, 255
    order = np.random.default_rng(0).permutation(9)
    assert reader.find(np.concatenate([digests[order], others])).tolist() == [*order.tolist(), -1, -1]


def test_rows_come_in_the_order_asked_for(store: Path) -> None:
    reader = FeatureReader(store)
    rows = np.random.default_rng(0).integers(0, ROWS, 1000)
    assert np.array_equal(reader.read(rows), EMBEDDINGS[rows])


def test_only_the_shards_that_rows_lie_in_are_read(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = sha256_file

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr(shards, "sha256_file", counted)
    reader = FeatureReader(store)
    assert hashed == []
    reader.read(np.array([3, 55, 4]))
    reader.read(np.array([5]))
    assert hashed == sorted(path.name for path in (store / "shards").iterdir())[:2]


def test_a_shard_that_is_not_read_may_be_altered_one_that_is_may_not(store: Path) -> None:
    first, second = sorted((store / "shards").iterdir())[:2]
    data = bytearray(second.read_bytes())
    data[-2000] ^= 1
    second.write_bytes(data)
    reader = FeatureReader(store)
    assert np.array_equal(reader.read(np.array([0])), EMBEDDINGS[:1])
    with pytest.raises(StoreError, match=f"{second.name}: the shard was altered"):
        reader.read(np.array([50]))
    assert first.name not in " ".join(verify(store))


def test_a_shard_that_was_another_when_its_rows_were_numbered_is_refused(store: Path) -> None:
    first, second = sorted((store / "shards").iterdir())[:2]
    right = first.read_bytes()
    manifest = read_manifest(store)
    # The second's rows under the first's name while the digests are read, and the right ones afterwards.
    hidden = store / "shards" / "hidden"
    second.rename(hidden)
    first.write_bytes(hidden.read_bytes())
    second.write_bytes(right)
    reader = ShardReader(store, manifest)
    first.write_bytes(right)
    hidden.replace(second)
    with pytest.raises(StoreError, match="the shard was replaced while it was read"):
        reader.read(np.array([0]), layer="penultimate")


def test_a_sample_of_the_shards_is_verified(store: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert verify(store, sample=5, progress=lambda done, total: seen.append((done, total))) == []
    assert seen == [(number, 5) for number in range(1, 6)]
    broken = sorted((store / "shards").iterdir())[7]
    data = bytearray(broken.read_bytes())
    data[-2000] ^= 1
    broken.write_bytes(data)
    found = [verify(store, sample=5, random_state=seed) for seed in range(20)]
    assert 0 < sum(map(bool, found)) < 20  # 5 of 12 are looked into
    assert all(broken.name in problems[0] for problems in found if problems)
    assert verify(store, sample=SHARDS) == verify(store) != []
    (store / "index.h5").unlink()
    assert "has no index" in verify(store, sample=1, random_state=0)[-1]
    with pytest.raises(UsageError, match="sample: must be 1 or more"):
        verify(store, sample=0)


def test_a_draw_is_in_proportion_and_has_every_class_of_every_split() -> None:
    labels = np.repeat(np.array([0, 1, 2, -1]), [700, 200, 90, 10])
    splits = ["train"] * 500 + ["test"] * 500
    rows = draw_rows(labels, splits, 100, 0)
    assert len(rows) == len(np.unique(rows)) == 100 and (np.diff(rows) > 0).all()
    drawn = list(zip(labels[rows].tolist(), [splits[row] for row in rows], strict=True))
    wanted = {(0, "train"): 50, (0, "test"): 20, (1, "test"): 20, (2, "test"): 9, (-1, "test"): 1}
    assert all(abs(drawn.count(group) - count) <= 1 for group, count in wanted.items())
    assert set(drawn) == set(wanted)
    assert np.array_equal(rows, draw_rows(labels, splits, 100, 0))
    assert not np.array_equal(rows, draw_rows(labels, splits, 100, 1))
    assert len(draw_rows(labels, splits, 2, 0)) == len(wanted)
    counts = np.bincount(np.concatenate([draw_rows(labels, splits, 100, seed) for seed in range(200)]), minlength=1000)
    assert counts[:500].max() < 50 and (counts[:500] > 0).all()  # 20 expected, each with the same chance


def test_features_of_a_draw(store: Path) -> None:
    everything, drawn = read_features(store), read_features(store, max_images=90, random_state=3)
    rows = np.flatnonzero(np.isin(everything.ids, drawn.ids))
    assert len(rows) == len(drawn) == 90
    for name in ("embeddings", "ids", "labels", "splits", "digests"):
        assert np.array_equal(getattr(drawn, name), getattr(everything, name)[rows])
    assert len(read_features(store, max_images=10_000)) == ROWS
    assert set(read_features(store, splits=["test"], max_images=9).splits) == {"test"}


def test_facts_count_what_the_index_says(store: Path) -> None:
    facts = info(store)
    assert facts["classes"] == {"a": 200, "b": 200, "c": 200}
    assert facts["splits"] == {"test": 60, "train": 540}


@pytest.mark.slow
def test_on_the_command_line(featx: Featx, store: Path) -> None:
    done = featx("verify", store, "--sample", 4)
    assert (done.code, done.out) == (0, f"{store}: sound, as far as a sample of its shards shows.\n")
    assert featx("verify", store, "--sample", 4, "--json").json["content_hash"] is None
    done = featx("sweep", store, "--max-images", 90, "--shots", "2", "--episodes", 2, "--heads", "ridge", "--json")
    assert done.code == 0, done.err
    assert "the split test (9 images) is left out" in done.err


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "growth.json"
    command = [sys.executable, str(ROOT / "scripts" / "bench_growth.py"), "--rows", "3000", "--dims", "8"]
    command += ["--store", str(tmp_path / "g.featx"), "--out", str(out), "--only", "open,info,verify,subset"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (told,) = json.loads(out.read_text())
    assert [step["step"] for step in told["steps"]] == ["make", "open", "info", "verify", "subset"]
    assert told["steps"][0]["rows written"] == 3000 == told["steps"][1]["rows"]
