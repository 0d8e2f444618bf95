"""Hostile stores: 25 crafted manifests, crafted indexes and packed files, folders with traps, noise."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from storekit import THREE, digests_of, index_of, make_store, names_of, provenance, rows_of

from featx._files import canonical_json
from featx.errors import StoreError
from featx.store import manifest
from featx.store.reader import read_features
from featx.store.tools import info, pack, verify
from featx.store.writer import StoreWriter

# --- manifests ----------------------------------------------------------------------------------------------------


def tampered(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and give it a right checksum."""
    path = store / "manifest.json"
    fields = json.loads(path.read_text())
    fields.pop("checksum")
    change(fields)
    fields["checksum"] = hashlib.sha256(canonical_json(fields)).hexdigest()
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def shard(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda fields: fields["shards"][0].update(changes)


def field(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda fields: fields.update(changes)


SHA = "ab" * 32
MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "path upwards": shard(name="../../etc/passwd"),
    "path upwards, disguised": shard(name="../00000-abababab.h5", sha256=SHA),
    "absolute path": shard(name="/etc/00000-abababab.h5", sha256=SHA),
    "name with a line end": shard(name="00000-abababab.h5\n", sha256=SHA),
    "name and sum apart": shard(sha256=SHA),
    "no name": lambda fields: fields["shards"][0].pop("name"),
    "number for a name": shard(name=7),
    "rows as text": shard(rows="5"),
    "rows as truth": shard(rows=True),
    "no rows": shard(rows=0),
    "negative rows": shard(rows=-1),
    "too many rows": shard(rows=2**63),
    "other rows": shard(rows=4),
    "shard twice": lambda fields: fields["shards"].append(fields["shards"][0]),
    "shard of another kind": lambda fields: fields["shards"].append("00000-abababab.h5"),
    "in flux upwards": field(in_flux=["../../index.h5"]),
    "in flux, no list": field(in_flux="00000-abababab.h5"),
    "provenance is a list": field(provenance=[]),
    "provenance without layers": lambda fields: fields["provenance"].pop("layers"),
    "layers of another kind": lambda fields: fields["provenance"].update(layers=[["penultimate"]]),
    "other provenance": lambda fields: fields["provenance"].update(backbone="other"),
    "other fingerprint": field(fingerprint=SHA),
    "classes of another kind": field(class_names=[1]),
    "format of another kind": field(format=["featx-store"]),
    "version as text": field(format_version="1"),
    "version 0": field(format_version=0),
}


def told(**changes: Any) -> dict[str, Any]:
    """A provenance with its fingerprint, as a manifest has it."""
    made = provenance(**changes)
    return {"provenance": made, "fingerprint": manifest.fingerprint(made)}


SEVERAL: dict[str, Callable[[dict[str, Any]], object]] = {
    "backbone twice": lambda fields: fields["more"].append(fields["more"][0]),
    "the own backbone twice": lambda fields: fields["more"].append(told()),
    "more is no list": field(more={"provenance": {}}),
    "more of another kind": field(more=["wide"]),
    "more without its fingerprint": lambda fields: fields["more"][0].pop("fingerprint"),
    "more with another fingerprint": lambda fields: fields["more"][0].update(fingerprint=SHA),
    "backbone without layers": field(more=[told(backbone="wide", layers=[])]),
    "several in one provenance": field(**told(backbones=[provenance()])),
    "shard of an unknown backbone": shard(backbones=["tiny", "wide", "pixels", "other"]),
    "shard of no backbone": shard(backbones=[]),
    "shard that names one twice": shard(backbones=["tiny", "tiny", "wide", "pixels"]),
    "backbones as text": shard(backbones="tiny"),
    "shard without a backbone that is in the file": shard(backbones=["tiny", "wide"]),
    "dropped is a list": shard(dropped=["wide"]),
    "dropped layers as text": shard(dropped={"other": "penultimate"}),
    "dropped layers as numbers": shard(dropped={"other": [1]}),
    "dropped, and held": shard(dropped={"wide": ["penultimate"]}),
    "dropped, and not in the file": shard(dropped={"other": ["penultimate"]}),
    "phash as text": shard(phash="true"),
    "no phash": lambda fields: fields["shards"][0].pop("phash"),
    "phash that is in the file denied": shard(phash=False),
    "unfinished names nothing": field(unfinished=["other"]),
    "unfinished as text": field(unfinished="wide"),
    "unfinished of another kind": field(unfinished=[["wide"]]),
}


@pytest.mark.parametrize(
    ("backbones", "change"),
    [
        *(pytest.param(("tiny",), change, id=name) for name, change in MANIFESTS.items()),
        *(pytest.param(THREE, change, id=f"three, {name}") for name, change in {**MANIFESTS, **SEVERAL}.items()),
    ],
)
def test_crafted_manifests(
    backbones: tuple[str, ...], change: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    store = make_store(tmp_path / "s.featx", backbones=backbones)
    tampered(store, change)
    with pytest.raises(StoreError):
        read_features(store)
    assert verify(store)
    with pytest.raises(StoreError):
        make_store(store, backbones=backbones)


SHARDS: dict[str, Callable[[h5py.File], object]] = {
    "narrow hashes": lambda file: put("phash", np.zeros((5, 16), np.uint8))(file),
    "hashes of 16 bits": lambda file: put("phash", np.zeros((5, 32), np.uint16))(file),
    "fewer hashes": lambda file: put("phash", np.zeros((4, 32), np.uint8))(file),
    "hashes in a row": lambda file: put("phash", np.zeros(160, np.uint8))(file),
    "no hashes": lambda file: file.__delitem__("phash"),
    "no embeddings of one": lambda file: file.__delitem__("embeddings/wide/penultimate"),
    "no group of one": lambda file: file.__delitem__("embeddings/wide"),
    "another group": lambda file: file.create_group("embeddings/other"),
    "doubles": lambda file: put("embeddings/wide/penultimate", np.zeros((5, 12)))(file),
    "another length": lambda file: put("embeddings/wide/penultimate", np.zeros((5, 13), np.float32))(file),
}


@pytest.mark.parametrize("craft", SHARDS.values(), ids=SHARDS)
def test_crafted_shards_of_three_backbones(craft: Callable[[h5py.File], object], tmp_path: Path) -> None:
    """With right checksums, as somebody makes them who knows the format."""
    store = make_store(tmp_path / "s.featx", backbones=THREE)
    path = sorted((store / "shards").iterdir())[0]
    with h5py.File(path, "r+") as file:
        craft(file)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    path = path.rename(path.with_name(f"00000-{sha256[:8]}.h5"))
    tampered(store, shard(name=path.name, sha256=sha256))
    with pytest.raises(StoreError):
        read_features(store)
    assert verify(store)


PACKED: dict[str, Callable[[h5py.File], object]] = {
    "narrow hashes": lambda file: put("phash", np.zeros((12, 16), np.uint8))(file),
    "no hashes": lambda file: file.__delitem__("phash"),
    "hashes denied": lambda file: text_attribute(file, "phash", "false"),
    "a backbone twice": lambda file: text_attribute(file, "more", json.dumps([told()])),
    "more is a number": lambda file: text_attribute(file, "more", "1"),
    "more is a text": lambda file: text_attribute(file, "more", '"wide"'),
    "more is deep": lambda file: text_attribute(file, "more", "[" * 50_000),
    "an unknown backbone": lambda file: text_attribute(file, "more", json.dumps([told(backbone="other")])),
}


def text_attribute(file: h5py.File, name: str, text: str) -> None:
    file.attrs.create(name, text.encode(), dtype=h5py.string_dtype("utf-8", len(text)))


@pytest.mark.parametrize("craft", PACKED.values(), ids=PACKED)
def test_crafted_packed_files_of_three_backbones(craft: Callable[[h5py.File], object], tmp_path: Path) -> None:
    path = pack(make_store(tmp_path / "s.featx", backbones=THREE), tmp_path / "p.h5")
    sealed(path, craft)
    with pytest.raises(StoreError, match=path.name):
        read_features(path)
    assert verify(path)


def test_a_pixels_baseline_of_another_size_is_refused(tmp_path: Path) -> None:
    made = provenance(backbone="pixels")
    with StoreWriter(tmp_path / "s.featx", provenance(), made) as writer:
        digests = digests_of(names_of(3))
        writer.add(digests, {"tiny": [rows_of(digests)], "pixels": [rows_of(digests)]})
        writer.finish(index_of(names_of(3)), [], source="by hand")
    with pytest.raises(StoreError, match="pixels baseline is not of 16 x 16 pixels"):
        read_features(tmp_path / "s.featx")


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "NaN", '{"format": "featx-store"}', "9" * 5000, "[" * 100_000])
def test_manifests_that_are_none(text: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx")
    (store / "manifest.json").write_text(text)
    with pytest.raises(StoreError):
        read_features(store)
    assert verify(store)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none(text: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx")
    path = store / "manifest.json"
    path.write_text(path.read_text().replace('"fingerprint"', f'"extra": {text},\n  "fingerprint"', 1))
    with pytest.raises(StoreError, match=r"manifest\.json"):
        read_features(store)


# --- folders ------------------------------------------------------------------------------------------------------


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    for name in ("manifest.json", "index.h5", "quarantine.jsonl"):
        store = make_store(tmp_path / name)
        (store / name).unlink()
        os.mkfifo(store / name)
        assert verify(store)
        if name != "quarantine.jsonl":
            with pytest.raises(StoreError):
                read_features(store)
        (store / name).unlink()
        (store / name).symlink_to("/dev/zero")
        assert verify(store)


def test_a_linked_lock_is_not_followed(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx")
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    (store / ".lock").unlink()
    (store / ".lock").symlink_to(precious)
    with pytest.raises(StoreError, match="not the lock of a store"):
        make_store(store)
    assert precious.read_text() == "keep me"
    (store / ".lock").unlink()
    os.mkfifo(store / ".lock")
    with pytest.raises(StoreError, match="not the lock of a store"):
        make_store(store)


def test_an_index_of_another_store(tmp_path: Path) -> None:
    one = make_store(tmp_path / "one.featx")
    other = make_store(tmp_path / "other.featx", layers=("penultimate", "features.3"))
    (one / "index.h5").write_bytes((other / "index.h5").read_bytes())
    with pytest.raises(StoreError, match="the index of another store"):
        read_features(one)
    assert "index.h5" in verify(one)[0]


def sealed(path: Path, craft: Callable[[h5py.File], object]) -> None:
    """Change a sealed file, and seal it again."""
    with h5py.File(path, "r+") as file:
        craft(file)
    raw = path.read_bytes()
    seal = b"featx sha256 " + hashlib.sha256(raw[512:]).hexdigest().encode() + b"\n"
    path.write_bytes(seal.ljust(512, b"\0") + raw[512:])


def put(name: str, value: Any) -> Callable[[h5py.File], object]:
    def craft(file: h5py.File) -> None:
        del file[name]
        file[name] = value

    return craft


def attribute(name: str, value: Any, dtype: Any = None) -> Callable[[h5py.File], object]:
    return lambda file: file.attrs.create(name, value, dtype=dtype)


SEALED: dict[str, Callable[[h5py.File], object]] = {
    "label beyond the classes": put("labels", np.full(12, 2, "<i8")),
    "label far beyond": put("labels", np.full(12, 2**62, "<i8")),
    "label below": put("labels", np.full(12, -2, "<i8")),
    "labels of 32 bits": put("labels", np.zeros(12, "<i4")),
    "fewer labels": put("labels", np.zeros(11, "<i8")),
    "id twice": put("ids", np.array([b"a"] * 12, "S1").astype(h5py.string_dtype("utf-8", 1))),
    "ASCII ids": put("ids", np.array([b"%02d" % i for i in range(12)], "S2")),
    "ids that are no text": put("ids", np.array([b"\xff%x" % i for i in range(12)], h5py.string_dtype("utf-8", 2))),
    "ids of variable length": put("ids", np.array(list("abcdefghijkl"), h5py.string_dtype())),
    "another split": put("split", np.array([b"other"] * 12, h5py.string_dtype("utf-8", 5))),
    "short digests": put("digests", np.zeros((12, 31), np.uint8)),
    "unknown digests": put("digests", np.zeros((12, 32), np.uint8)),
    "huge text": put("class_names", np.array([b"a"], h5py.string_dtype("utf-8", 100_000))),
    "fingerprint as a number": attribute("fingerprint", 1),
    "fingerprint of variable length": attribute("fingerprint", "a" * 64, h5py.string_dtype()),
    "fingerprints": attribute("fingerprint", np.array([b"a", b"b"])),
    "huge fingerprint": attribute("fingerprint", b"a", h5py.string_dtype("utf-8", 65_100)),
    "another fingerprint": attribute("fingerprint", b"a" * 64, h5py.string_dtype("utf-8", 64)),
    "no text": attribute("fingerprint", b"\xff" * 64, h5py.string_dtype("utf-8", 64)),
    "no fingerprint": lambda file: file.attrs.__delitem__("fingerprint"),
}


@pytest.mark.parametrize("craft", SEALED.values(), ids=SEALED)
@pytest.mark.parametrize("packed", [False, True], ids=["index", "packed"])
def test_crafted_index_and_packed_file(craft: Callable[[h5py.File], object], packed: bool, tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx")
    path = pack(store, tmp_path / "p.h5") if packed else store / "index.h5"
    sealed(path, craft)
    unknown = packed and craft is SEALED["unknown digests"]  # a packed file is its own witness
    if unknown:
        assert not read_features(path).digests.any()
        return
    where = path if packed else store
    with pytest.raises(StoreError, match=path.name):
        read_features(where)
    assert path.name in verify(where)[0]
    with pytest.raises(StoreError):
        info(where) if craft is not SEALED["unknown digests"] else read_features(where)


PROVENANCES = [
    "1",
    "[]",
    '{"layers": 3}',
    '{"layers": [["a"]]}',
    '{"layers": ["other"]}',
    "NaN",
    "[" * 50_000,
    "{",
    "9" * 5000,
]


@pytest.mark.parametrize("text", PROVENANCES, ids=lambda text: text[:12])
def test_crafted_provenance_of_a_packed_file(text: str, tmp_path: Path) -> None:
    path = pack(make_store(tmp_path / "s.featx"), tmp_path / "p.h5")

    def craft(file: h5py.File) -> None:
        file.attrs.create("provenance", text.encode(), dtype=h5py.string_dtype("utf-8", len(text)))
        try:
            value = manifest.fingerprint(json.loads(text))
        except (ValueError, TypeError, AttributeError, RecursionError):
            return
        file.attrs.create("fingerprint", value.encode(), dtype=h5py.string_dtype("utf-8", 64))

    sealed(path, craft)
    with pytest.raises(StoreError):
        read_features(path)
    assert verify(path)


def test_random_bytes_are_no_store(tmp_path: Path) -> None:
    """200 files of noise, some with a beginning that looks right."""
    rng = random.Random(0)
    path = tmp_path / "noise.h5"
    for number in range(200):
        head = (b"", b"\x89HDF\r\n\x1a\n", b"featx sha256 ", b"{")[number % 4]
        path.write_bytes(head + rng.randbytes(rng.randrange(2000)))
        with pytest.raises(StoreError):
            read_features(path)
        assert verify(path)


def test_a_writer_refuses_what_it_could_not_read_again(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx")
    before = (store / "index.h5").read_bytes()
    with StoreWriter(store, provenance()) as writer:
        with pytest.raises(StoreError, match="a text is longer than 4,096 bytes"):
            writer.finish(index_of(names_of(12), classes=("ants", "b" * 5000)), [], source="")
        with pytest.raises(StoreError, match="too many classes"):
            writer.finish(index_of(names_of(12), classes=[f"c{i}" for i in range(2**18)]), [], source="")
    assert (store / "index.h5").read_bytes() == before
    assert verify(store) == []
