"""The store: 1,000 flipped bytes, files that come and go, the list of refused images, provenance."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import storekit
from conftest import Featx
from storekit import (
    THREE,
    assert_rows,
    digests_of,
    index_of,
    light_backbone,
    make_store,
    names_of,
    png_folders,
    provenance,
    refused_of,
    rows_of,
)

from featx._files import canonical_json, publish_bytes
from featx.errors import MismatchError, StoreError
from featx.extraction.run import extract_features
from featx.images.pixels import Preprocess
from featx.images.source import ImageSet
from featx.store.index import Refused, spell_quarantine
from featx.store.manifest import FINGERPRINTED, check_same, read_manifest
from featx.store.reader import FeatureReader, read_features
from featx.store.tools import content_hash, info, pack, verify
from featx.store.writer import StoreWriter

FLIPS = 500


# --- flipped bytes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["store", "packed"])
@pytest.mark.parametrize("backbones", [("tiny",), THREE], ids=["one", "three"])
def test_two_thousand_flipped_bytes(backbones: tuple[str, ...], packed: bool, tmp_path: Path) -> None:
    """Half of them anywhere by size, half in each file alike; single bits and whole bytes."""
    names = names_of(200)
    refused = [Refused(f"x/{i}.png", "ab" * 32, "corrupt", "broken data stream") for i in range(5)]
    store = make_store(tmp_path / "s.featx", names, shard_rows=90, refused=refused, backbones=backbones)
    if packed:
        store = pack(store, tmp_path / "p.h5")
    expected = read_features(store)
    assert str(len(expected)) in repr(expected) and len(repr(expected)) < 120
    files = [store] if packed else sorted(path for path in store.rglob("*") if path.is_file() and path.stat().st_size)
    assert len(files) == (1 if packed else 6)
    sizes = [path.stat().st_size for path in files]
    rng = random.Random(0)
    raised = 0
    for number in range(FLIPS):
        path = rng.choices(files, sizes)[0] if number % 2 else rng.choice(files)
        before = path.read_bytes()
        raw = bytearray(before)
        raw[rng.randrange(len(raw))] ^= rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)])
        path.write_bytes(raw)
        problems = verify(store)
        assert problems, f"{path.name} was changed, and verify did not see it"
        assert any(path.name in problem for problem in problems), problems
        try:
            features = read_features(store)
        except StoreError as error:
            raised += 1
            assert path.name in str(error)
        else:
            assert path.name == "quarantine.jsonl"
            assert np.array_equal(features.embeddings, expected.embeddings)
            assert np.array_equal(features.ids, expected.ids) and np.array_equal(features.labels, expected.labels)
        path.write_bytes(before)
    assert verify(store) == []
    assert raised > FLIPS / 2


def test_missing_extra_and_renamed_files(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx")
    shards = sorted((store / "shards").iterdir())
    first = shards[0].read_bytes()

    shards[0].unlink()
    with pytest.raises(StoreError, match=f"{shards[0].name}: the shard is missing"):
        read_features(store)
    assert shards[0].name in " ".join(verify(store))

    other = store / "shards" / f"00007-{shards[0].name[-11:]}"
    other.write_bytes(first)  # renamed
    assert other.name in " ".join(verify(store)) and shards[0].name in " ".join(verify(store))
    shards[0].write_bytes(first)  # and now one too many
    assert [problem for problem in verify(store) if other.name in problem] == verify(store)
    with pytest.raises(StoreError, match=f"{other.name}: a shard that the manifest does not name"):
        make_store(store)
    other.unlink()

    shards[0].write_bytes(shards[1].read_bytes())  # swapped
    with pytest.raises(StoreError, match=f"{shards[0].name}: the shard was altered"):
        read_features(store)
    shards[0].write_bytes(first)

    (store / "shards" / ".DS_Store").touch()
    (store / "shards" / ".nfs0001").touch()
    assert verify(store) == []
    make_store(store)
    shutil.rmtree(store / "shards")
    assert "shards: the folder is missing" in " ".join(verify(store))
    (store / "manifest.json").unlink()
    assert "it has no manifest.json" in verify(store)[0]
    with pytest.raises(StoreError, match="a folder with other things in it"):
        make_store(store)


def test_a_shard_changed_after_a_reader_was_opened(tmp_path: Path) -> None:
    for packed in (False, True):
        store = make_store(tmp_path / f"{packed}.featx")
        path = pack(store, tmp_path / "p.h5") if packed else max((store / "shards").iterdir())
        reader = FeatureReader(path if packed else store)
        reader.read(np.arange(12))
        raw = bytearray(path.read_bytes())
        at = raw.index(rows_of(digests_of(names_of(12))[-1:]).tobytes())
        raw[at] ^= 1
        path.write_bytes(raw)
        with pytest.raises(StoreError):
            reader.read(np.arange(12))


# --- the list of refused images -----------------------------------------------------------------------------------

REFUSED = [Refused(f"x/{i}.png", "ab" * 32, "corrupt", "broken data stream") for i in range(4)]
EDITS: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "first line deleted": lambda lines: lines[1:],
    "last line deleted": lambda lines: lines[:-1],
    "all lines deleted": lambda lines: [],
    "two lines swapped": lambda lines: [lines[1], lines[0], *lines[2:]],
    "a line twice": lambda lines: [*lines, lines[0]],
    "no line end": lambda lines: [*lines[:-1], lines[-1].rstrip()],
    "another store's": lambda lines: [spell_quarantine([Refused("y/0.png", "", "empty", "the file is empty")])],
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_list_of_refused_images(edit: Callable[[list[bytes]], list[bytes]], tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx", refused=REFUSED)
    path = store / "quarantine.jsonl"
    assert (verify(store), info(store)["quarantined"]) == ([], 4)
    path.write_bytes(b"".join(edit(path.read_bytes().splitlines(keepends=True))))
    (problem,) = verify(store)
    assert "quarantine.jsonl: the list of refused images was altered" in problem
    with pytest.raises(StoreError, match=r"list of refused images was altered.*writes it anew"):
        info(store)
    assert_rows(store)  # no concern of the embeddings
    make_store(store, refused=REFUSED[:1])
    assert (verify(store), refused_of(store)) == ([], REFUSED[:1])


def test_a_missing_list_of_refused_images(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx", refused=REFUSED)
    (store / "quarantine.jsonl").unlink()
    assert "quarantine.jsonl" in verify(store)[0]
    make_store(store, refused=[])
    (store / "quarantine.jsonl").unlink()  # an empty list may be missing
    assert verify(store) == []


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_run_that_ends_while_it_replaces_the_list(
    done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "s.featx", refused=REFUSED)

    def interrupted(path: Path, data: bytes) -> Path:
        if done:
            publish_bytes(path, data)
        raise KeyboardInterrupt

    for finish in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr("featx.store.writer.publish_bytes", interrupted)
            with StoreWriter(store, provenance()) as writer, pytest.raises(KeyboardInterrupt):
                if finish:
                    writer.finish(index_of(names_of(12)), REFUSED[:2], source="")
                else:
                    writer.write_quarantine(REFUSED[:3])
        assert verify(store) == []
    assert len(refused_of(store)) == (3 if done else 4)
    with StoreWriter(store, provenance()) as writer:
        writer.write_quarantine(REFUSED[:1])
    assert (verify(store), refused_of(store)) == ([], REFUSED[:1])
    assert len(read_manifest(store).quarantine) == 1


def test_a_store_from_before_the_list_was_sealed(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx", refused=REFUSED)
    fields = json.loads((store / "manifest.json").read_text())
    fields = {name: value for name, value in fields.items() if name not in ("quarantine", "checksum")}
    fields["checksum"] = hashlib.sha256(canonical_json(fields)).hexdigest()
    (store / "manifest.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    assert (verify(store), refused_of(store)) == ([], REFUSED)
    with StoreWriter(store, provenance()) as writer:  # looked at, and left as it was
        assert writer.manifest.quarantine == ()
    assert (verify(store), refused_of(store)) == ([], REFUSED)
    make_store(store, refused=REFUSED)
    (store / "quarantine.jsonl").write_bytes(b"")
    assert verify(store)


# --- provenance ---------------------------------------------------------------------------------------------------


def test_every_field_of_the_fingerprint_is_named(tmp_path: Path) -> None:
    old = {**provenance(), "preprocess": storekit.PREPROCESS.to_json()}
    for name in FINGERPRINTED:
        with pytest.raises(MismatchError) as caught:
            check_same(old, {**old, name: "changed"}, tmp_path)
        assert f"another {name}" in str(caught.value) and '"changed" (this run\'s)' in str(caught.value)
    with pytest.raises(MismatchError, match=r"another preprocess\.crop: expected \[8, 8\] .*, found \[9, 9\]"):
        check_same(old, {**old, "preprocess": {**old["preprocess"], "crop": [9, 9]}}, tmp_path)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"weights_sha256": "1" * 64}, r'another weights_sha256: expected "0{64}" .* found "1{64}"'),
    "layer": ({"layers": ("features.3",)}, r'another layers: expected \["penultimate"\] .* found \["features.3"\]'),
    "crop": (
        {"preprocess": Preprocess(9, (9, 9), "bilinear", (0.5,) * 3, (0.5,) * 3)},
        r"another preprocess.crop: expected \[8, 8\] .* found \[9, 9\]",
    ),
}


@pytest.mark.parametrize("name", [*CHANGES, "precision", "decode"])
def test_other_settings_stop(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, store = png_folders(tmp_path / "photos", 4), tmp_path / "s.featx"
    storekit.extract(source, store)
    before = content_hash(store)
    engine, backbone = storekit.LightEngine(), light_backbone()
    if name == "precision":
        engine.precision, said = "bf16", r'another precision: expected "fp32" \(the store\'s\), found "bf16"'
    elif name == "decode":
        monkeypatch.setattr("featx.backbones.provenance.decode_settings", lambda mode: {"mode": "draft"})
        said = r"another decode\..*: expected .*, found "
    else:
        changes, said = CHANGES[name]
        backbone = light_backbone(**changes)
    with pytest.raises(MismatchError, match=said) as caught:
        extract_features(ImageSet.from_folder(source), backbone, store, engine=engine, workers=1)
    assert caught.value.exit_code == 2
    assert content_hash(store) == before


@pytest.mark.slow
def test_other_settings_stop_the_real_command(tmp_path: Path, featx: Featx) -> None:
    source, store = png_folders(tmp_path / "photos", 4), tmp_path / "s.featx"
    assert featx("extract", source, "--out", store).code == 0
    for field, arguments in {
        "weights_sha256": ["--weights", "none"],
        "layers": ["--layer", "blocks.2"],
        "precision": ["--precision", "bf16"],
    }.items():
        ran = featx("extract", source, "--out", store, *arguments)
        assert ran.code == 2
        assert f"the store was made with another {field}: expected " in ran.err and "found " in ran.err
    assert verify(store) == []
