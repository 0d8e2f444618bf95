"""The format: the golden files, packed stores, newer versions, odd names."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import TESTS, Featx
from storekit import (
    THREE,
    assert_rows,
    check_published,
    digests_of,
    made_up,
    make_store,
    names_of,
    provenance,
    rows_of,
)

from featx._files import canonical_json
from featx.cli.guide import page
from featx.errors import StoreError, UsageError
from featx.store.index import Refused, read_quarantine
from featx.store.manifest import read_manifest
from featx.store.reader import FeatureReader, Pictures, read_features
from featx.store.tools import content_hash, info, pack, verify
from featx.store.writer import StoreWriter

GOLDEN = TESTS / "golden"


# --- the format ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v1-store", "v1-packed.h5"])
def test_golden_files_are_read_for_ever(name: str, tmp_path: Path) -> None:
    path = GOLDEN / name
    assert verify(path) == []
    assert_rows(path)
    features = read_features(path, layer="features.3")
    assert features.embeddings.shape == (12, 9)
    assert np.array_equal(features.embeddings, rows_of(digests_of(features.ids.tolist()), 9))
    assert features.ids.tolist() == names_of(12)
    assert features.class_names == ("ants", "bees")
    assert features.labels.tolist() == [-1, 0, 1] * 4
    assert features.splits.tolist() == ["train", "val", "test", ""] * 3
    assert features.fingerprint == "8b3cfc3cd9f3a240af0ad0b64208ec9559aee58312c257d211687eb3e51db4b8"
    assert content_hash(path) == "84528e4661cffcfb567ced60d93b18db1883d424efa6810fca087fc4ab0c593d"
    if path.is_dir():
        assert read_quarantine(path, read_manifest(path)) == [Refused("x/bad.png", "", "empty", "the file is empty")]
        shutil.copytree(path, tmp_path / "copy")
        make_store(tmp_path / "copy", names_of(20), layers=("penultimate", "features.3"))  # and continued
        assert_rows(tmp_path / "copy", 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v2-store", "v2-packed.h5"])
def test_golden_files_of_several_backbones_are_read_for_ever(name: str, tmp_path: Path, featx: Featx) -> None:
    path = tmp_path / f"kept-{name}"
    (shutil.copytree if (GOLDEN / name).is_dir() else shutil.copy2)(GOLDEN / name, path)
    assert verify(path) == []
    assert_rows(path)
    features, digests = read_features(path), digests_of(names_of(12))
    assert features.ids.tolist() == names_of(12)
    reader = FeatureReader(path)
    assert list(reader.backbones) == [*THREE] and reader.networks == ("tiny", "tiny/features.3", "wide")
    for backbone, layer, number in (("tiny", "penultimate", 0), ("tiny", "features.3", 1), ("wide", "penultimate", 0)):
        rows = read_features(path, layer=f"{backbone}/{layer}").embeddings
        assert np.array_equal(rows, made_up(backbone, digests, number))
    pictures = features.near_copies
    assert isinstance(pictures, Pictures)
    assert [row.tobytes() for row in pictures.hashes] == digests
    assert np.array_equal(pictures.pixels, np.rint(made_up("pixels", digests) * 255))
    assert features.fingerprint == "8b3cfc3cd9f3a240af0ad0b64208ec9559aee58312c257d211687eb3e51db4b8"
    assert content_hash(path) == "8181ec8d1331cb0d07a35376098e4fd001adf97b62c361079ba7f5307a989f76"
    ran = featx("sweep", path, "--shots", "1", "--episodes", 2, "--heads", "ridge,knn", "--json")
    assert ran.code == 0, ran.err
    assert {each["features"] for each in ran.json["results"]} == {*reader.networks, "joined"}
    assert [each["n_shots"] for each in ran.json["pixels_baseline"]] == [1]
    assert ran.json["duplicates"] == {"exact": 0, "near": 0, "groups": 0}
    if path.is_dir():
        make_store(path, names_of(20), layers=("penultimate", "features.3"), backbones=THREE)  # and continued
        assert_rows(path, 20)


def test_a_packed_file_is_read_with_h5py_alone(tmp_path: Path) -> None:
    path = pack(make_store(tmp_path / "s.featx"), tmp_path / "p.h5")
    with h5py.File(path) as file:
        ids = [name.decode() for name in file["ids"][:]]
        assert ids == names_of(12)
        assert np.array_equal(file["embeddings/tiny/penultimate"][:], rows_of(digests_of(ids)))
        assert file["labels"][:].tolist() == [-1, 0, 1] * 4
        assert file["digests"][0].tobytes() == digests_of(ids)[0]
        assert (
            file["embeddings/tiny/penultimate"].fletcher32 and file["embeddings/tiny/penultimate"].compression is None
        )
        assert json.loads(file.attrs["provenance"])["backbone"] == "tiny"
    assert_rows(path)
    assert content_hash(path) == content_hash(tmp_path / "s.featx")
    facts = info(path)
    assert facts == {**info(tmp_path / "s.featx"), "shards": 1, "quarantined": 0}
    with pytest.raises(StoreError, match="there is a file of this name already"):
        pack(tmp_path / "s.featx", path)
    with pytest.raises(StoreError, match="inside the store"):
        pack(tmp_path / "s.featx", tmp_path / "s.featx" / "p.h5")
    with pytest.raises(UsageError, match=r"no layer 'penultimat'.*Did you mean penultimate"):
        read_features(path, layer="penultimat")
    with pytest.raises(UsageError, match="no such split: expected a list of train, val, test, found"):
        read_features(path, splits=["valid"])
    assert len(read_features(path, splits=["val", "test"])) == 6


def test_a_newer_version_says_update(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx")
    packed = pack(store, tmp_path / "p.h5")
    fields = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps({"format": fields["format"], "format_version": 3, "all": "new"}))
    with h5py.File(packed, "r+") as file:
        file.attrs.create("format_version", b"3", dtype=h5py.string_dtype("utf-8", 1))
        del file["labels"]
        file["targets"] = np.zeros(3)
    raw = packed.read_bytes()
    seal = b"featx sha256 " + hashlib.sha256(raw[512:]).hexdigest().encode() + b"\n"
    packed.write_bytes(seal.ljust(512, b"\0") + raw[512:])
    reads: list[Callable[[Path], object]] = [read_features, FeatureReader, info, content_hash]
    for path in (store, packed):
        for read in reads:
            with pytest.raises(StoreError, match=r"newer featx.*up to 2, found 3.*[Uu]pdate featx"):
                read(path)
        assert "Update featx" in verify(path)[0]
    with pytest.raises(StoreError, match="Update featx"):
        make_store(store)


def test_the_format_is_written_down() -> None:
    text = page("store-format")
    for word in ("MUST", "MAY", "manifest.json", "index.h5", "quarantine.jsonl", "fletcher32", "featx-packed"):
        assert word in text
    manifest = read_manifest(GOLDEN / "v1-store")
    for name in manifest.to_json():
        assert f"`{name}`" in text, name


def test_an_empty_store(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx", [])
    assert verify(store) == []
    features = read_features(store)
    assert (len(features), features.embeddings.shape) == (0, (0, 0))
    packed = pack(store, tmp_path / "p.h5")
    assert len(read_features(packed)) == 0 and verify(packed) == []
    assert info(packed)["rows"] == info(store)["rows"] == 0
    make_store(store)
    assert_rows(store)


def test_odd_digests_and_names(tmp_path: Path) -> None:
    """Digests full of zeros at the end, 300 of them; names with line ends, quotes, markup, 4,096 bytes, no ASCII."""
    names = ["a\nb", 'q"\\', "[red]x[/red]", "é" * 2048, "😀", " ", "a\u2028b", "../up"]
    store = make_store(tmp_path / "s.featx", sorted(names))
    assert read_features(store).ids.tolist() == sorted(names)
    assert verify(store) == []
    digests = [bytes([1, i % 256]) + bytes(30) for i in range(256)] + [bytes(32)] + [bytes(31) + b"\1"]
    with StoreWriter(tmp_path / "t.featx", provenance(), shard_rows=50) as writer:
        for digest in digests:
            assert writer.lacks(digest)
            writer.add([digest], {"tiny": [np.full((1, 8), digest[1], np.float32)]})
            assert not writer.lacks(digest)
        with pytest.raises(ValueError, match="in the store already"):
            writer.add(digests[:1], {"tiny": [np.zeros((1, 8), np.float32)]})
        with pytest.raises(StoreError, match="NaN or infinity"):
            writer.add([b"\2" * 32], {"tiny": [np.full((1, 8), np.nan, np.float32)]})
        writer.flush()
        assert not any(map(writer.lacks, digests)) and writer.lacks(b"\2" * 32)
    assert check_published(tmp_path / "t.featx") == len(digests)


def test_the_manifest_is_canonical(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx")
    fields = json.loads((store / "manifest.json").read_text())
    claimed = fields.pop("checksum")
    assert claimed == hashlib.sha256(canonical_json(fields)).hexdigest()
    assert fields["counts"] == {"images": 12, "embeddings": 12, "quarantined": 1}
    assert fields["splits"] == {"test": 3, "train": 3, "val": 3}
    assert info(store)["classes"] == {"ants": 4, "bees": 4}
