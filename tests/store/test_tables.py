"""Ways out: frames, tables and a vector database hold what the store holds."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Featx, TinyEngine, class_folders, picture, tiny_backbone

from featx.errors import StoreError, UsageError
from featx.extraction.run import extract_features
from featx.images.source import ImageSet
from featx.store import tables as tabular
from featx.store.reader import FeatureSet, read_features
from featx.store.tables import export_table
from featx.store.tools import pack

SCRIPT = ROOT / "scripts" / "to_lancedb.py"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits, awkward names, and an image without a label."""
    folder = tmp_path_factory.mktemp("tabular")
    class_folders(folder / "photos", each=5)
    picture(60).save(folder / "photos" / "ants" / 'with, comma "and" ünïcode\nof two\rlines.png')
    picture(61).save(folder / "photos" / "none.png")
    rows = [["path", "label", "split"]]
    for path in sorted((folder / "photos").rglob("*.png")):
        label = path.parent.name if path.parent.name != "photos" else ""
        rows.append([path.relative_to(folder).as_posix(), label, "test" if path.stem.endswith("4") else "train"])
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    images = ImageSet.from_source(folder / "list.csv")
    extract_features(images, tiny_backbone(), folder / "s.featx", engine=TinyEngine(), workers=1)
    return folder / "s.featx"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks even for a small store."""
    monkeypatch.setattr(tabular, "BLOCK_ROWS", 5)


def names(features: FeatureSet) -> list[str | None]:
    return [features.class_names[label] if label >= 0 else None for label in features.labels]


def hexes(features: FeatureSet) -> list[str]:
    return [row.tobytes().hex() for row in features.digests]


def test_arrays(store: Path, tmp_path: Path) -> None:
    features = read_features(store)
    arrays = features.to_numpy()
    assert arrays["embeddings"] is features.embeddings
    np.savez(tmp_path / "mine.npz", **arrays)  # type: ignore[arg-type]
    assert export_table(store, tmp_path / "theirs.npz") == 12
    with np.load(tmp_path / "mine.npz") as mine, np.load(tmp_path / "theirs.npz") as theirs:  # without pickle
        assert set(theirs) == {*mine, "featx"}
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype
            assert np.array_equal(mine[name], theirs[name])
        assert json.loads(str(theirs["featx"]))["fingerprint"] == features.fingerprint


def test_a_frame(store: Path) -> None:
    pytest.importorskip("pandas")
    features = read_features(store)
    frame = features.to_pandas()
    assert frame.index.tolist() == features.ids.tolist()
    assert frame["split"].tolist() == features.splits.tolist()
    assert frame["digest"].tolist() == hexes(features)
    assert [label if isinstance(label, str) else None for label in frame["label"]] == names(features)
    assert list(frame["label"].cat.categories) == ["ants", "bees"]
    embeddings = frame.filter(regex=r"^e\d+$")
    assert (embeddings.dtypes == np.float32).all()
    assert np.array_equal(embeddings.to_numpy(), features.embeddings)
    frame.loc[frame.index[0], "e0"] = 1e9
    assert features.embeddings.max() < 1e9  # a frame is a copy


def test_an_anndata_file(store: Path, tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata")
    features = read_features(store)
    features.to_anndata().write_h5ad(tmp_path / "x.h5ad")
    read = anndata.read_h5ad(tmp_path / "x.h5ad")
    assert np.array_equal(read.X, features.embeddings)
    assert read.obs_names.tolist() == features.ids.tolist()
    assert [label if isinstance(label, str) else None for label in read.obs["label"]] == names(features)
    assert json.loads(read.uns["featx"]["provenance"]) == dict(features.provenance)


def test_parquet(store: Path, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    seen: list[tuple[int, int]] = []
    export_table(store, tmp_path / "x.parquet", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(5, 12), (10, 12), (12, 12)]
    features = read_features(store)
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), features.embeddings.shape[1])
    assert parquet.ParquetFile(tmp_path / "x.parquet").num_row_groups == 3
    assert table["id"].to_pylist() == features.ids.tolist()
    assert table["label"].to_pylist() == names(features)
    assert table["split"].to_pylist() == features.splits.tolist()
    assert table["digest"].to_pylist() == hexes(features)
    flat = table["embedding"].combine_chunks().flatten().to_numpy()
    assert np.array_equal(flat.reshape(features.embeddings.shape), features.embeddings)
    told = json.loads(table.schema.metadata[b"featx"])
    assert told["provenance"] == dict(features.provenance)


def test_csv(store: Path, tmp_path: Path) -> None:
    export_table(store, tmp_path / "x.csv")
    features = read_features(store)
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == features.ids.tolist()
    assert [row["label"] or None for row in rows] == names(features)
    assert [row["digest"] for row in rows] == hexes(features)
    dims = features.embeddings.shape[1]
    numbers = np.array([[row[f"e{column}"] for column in range(dims)] for row in rows], dtype=np.float32)
    assert np.array_equal(numbers, features.embeddings)


def test_a_packed_store_gives_the_same_table(store: Path, tmp_path: Path) -> None:
    pack(store, tmp_path / "p.h5")
    for source, name in ((store, "a.csv"), (tmp_path / "p.h5", "b.csv")):
        export_table(source, tmp_path / name)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


@pytest.mark.parametrize(
    ("out", "options", "words"),
    [
        ("x.xlsx", {}, r"no such format: expected parquet, csv, npz, found xlsx. Name it with --format"),
        ("x", {}, r"no such format.*found no suffix"),
        ("x.csv", {"layer": "features.3"}, r"no layer 'features.3' in this store"),
        ("there.csv", {}, r"there is a file of this name already"),
        ("nowhere/x.csv", {}, r"nowhere: no such folder"),
    ],
)
def test_mistakes_are_named(out: str, options: dict[str, Any], words: str, store: Path, tmp_path: Path) -> None:
    (tmp_path / "there.csv").write_text("mine")
    with pytest.raises((UsageError, StoreError), match=words):
        export_table(store, tmp_path / out, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["there.csv"]
    with pytest.raises(StoreError, match="would lie inside the store"):
        export_table(store, store / "x.csv")


@pytest.mark.parametrize("missing", ["pandas", "anndata", "pyarrow"])
def test_what_is_not_installed(missing: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    ask: Callable[[], object] = {
        "pandas": lambda: read_features(store).to_pandas(),
        "anndata": lambda: read_features(store).to_anndata(),
        "pyarrow": lambda: export_table(store, tmp_path / "x.parquet"),
    }[missing]
    with pytest.raises(UsageError, match=rf"{missing}.*is not installed.*pip install 'featx\[(frames|parquet)\]'"):
        ask()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(store: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for suffix in ("csv", "npz"):
        with pytest.raises(KeyboardInterrupt):
            export_table(store, tmp_path / f"x.{suffix}", progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_vector_database(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("lancedb")
    images = ImageSet.from_source(store.with_name("list.csv")).grouped(r"regex:(\d)\.")
    store = tmp_path / "s.featx"
    extract_features(images, tiny_backbone(), store, engine=TinyEngine(), workers=1)
    features = read_features(store)
    like = str(features.ids[3])
    unit = features.embeddings / np.linalg.norm(features.embeddings, axis=1, keepdims=True)
    cosine = unit @ unit[3]
    expected = [int(row) for row in np.argsort(-cosine) if row != 3][:4]
    command = [sys.executable, SCRIPT, store, tmp_path / "db", "--like", like, "-k", "4"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.startswith("12 images are in")
    found = [line.split("\t") for line in lines]
    assert [name for name, _, _ in found] == [features.ids[row] for row in expected]
    assert [float(score) for *_, score in found] == pytest.approx(cosine[expected], abs=1e-4)


def test_the_command(store: Path, tmp_path: Path, featx: Featx) -> None:
    out = tmp_path / "x.parquet"
    ran = featx("export-features", store, "--out", out, "--json")
    assert ran.code == 0, ran.err
    assert ran.json == {"path": str(out), "rows": 12, "bytes": out.stat().st_size}
    ran = featx("export-features", store, "--out", out, "--json")
    assert ran.code == 2
    assert "already" in ran.json["error"]
    assert featx("export-features", store, "--out", tmp_path / "y", "--format", "csv").out.startswith(
        f"{tmp_path}/y: 12"
    )
