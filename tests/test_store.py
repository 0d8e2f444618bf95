"""The store: 1,000 flipped bytes, provenance, two writers, readers beside a writer, forks, memory, the golden files."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import storekit
from conftest import Featx
from numpy.typing import NDArray
from storekit import (
    check_published,
    digests_of,
    index_of,
    light_backbone,
    make_store,
    names_of,
    png_folders,
    provenance,
    rows_of,
)

from featx import store_tools
from featx._files import canonical_json
from featx.errors import MismatchError, StoreError, UsageError
from featx.extract import extract_features
from featx.images import Preprocess
from featx.index import Refused, read_quarantine
from featx.manifest import FINGERPRINTED, check_same, read_manifest
from featx.provenance import provenance_of
from featx.sources import ImageSet
from featx.store import FeatureReader, iter_features, read_features
from featx.store_tools import content_hash, info, pack, verify
from featx.store_writer import StoreWriter

GOLDEN = Path(__file__).parent / "golden"
FLIPS = 1000


def assert_rows(store: Path, rows: int = 12) -> None:
    """Each row is the one that belongs to its digest, and each digest to its id."""
    features = read_features(store)
    assert len(features) == rows
    assert [digest.tobytes() for digest in features.digests] == digests_of(features.ids.tolist())
    assert np.array_equal(features.embeddings, rows_of(digests_of(features.ids.tolist())))


# --- flipped bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["store", "packed"])
def test_a_thousand_flipped_bytes(packed: bool, tmp_path: Path) -> None:
    """Half of them anywhere by size, half in each file alike; single bits and whole bytes."""
    names = names_of(200)
    refused = [Refused(f"x/{i}.png", "ab" * 32, "corrupt", "broken data stream") for i in range(5)]
    store = make_store(tmp_path / "s.featx", names, shard_rows=90, refused=refused)
    if packed:
        store = pack(store, tmp_path / "p.h5")
    expected = read_features(store)
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
    "backbone": ({"name": "other"}, r'another backbone: expected "tiny" \(the store\'s\), found "other"'),
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
        monkeypatch.setattr("featx.provenance.decode_settings", lambda mode: {"mode": "draft"})
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
        "backbone": ["--backbone", "resnet18", "--weights", "none"],
    }.items():
        ran = featx("extract", source, "--out", store, *arguments)
        assert ran.code == 2
        assert f"the store was made with another {field}: expected " in ran.err and "found " in ran.err
    assert verify(store) == []


# --- two writers, and readers beside one --------------------------------------------------------------------------


def holder(store: Path) -> subprocess.Popen[str]:
    """A process that writes to the store until it is killed."""
    code = f"""
import time
from storekit import *
with StoreWriter(Path({str(store)!r}), provenance()) as writer:
    print("ready", flush=True)
    time.sleep(1000)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path, featx: Featx) -> None:
    source, store = png_folders(tmp_path / "photos", 4), tmp_path / "s.featx"
    make_store(store)
    process = holder(store)
    try:
        named = f"process {process.pid} on host {socket.gethostname()}"
        started = time.perf_counter()
        with pytest.raises(StoreError, match=f"another process is writing to this store: found {named}"):
            make_store(store)
        assert time.perf_counter() - started < 1
        ran = featx("extract", source, "--out", store)
        assert (ran.code, named in ran.err) == (2, True)
        assert_rows(store)  # reading goes on
    finally:
        process.kill()
        process.communicate()
    assert str(process.pid) in (store / ".lock").read_text()  # stale, and no obstacle
    make_store(store, names_of(20))
    assert_rows(store, 20)
    assert (store / ".lock").read_text() == ""


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": 1}', "\0" * 100, '{"pid": "x", "host": 3}'])
def test_whatever_a_stale_lock_says(text: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx")
    (store / ".lock").write_text(text)
    make_store(store)


def test_two_threads_are_two_writers(tmp_path: Path) -> None:
    with (
        StoreWriter(tmp_path / "s.featx", provenance()),
        pytest.raises(StoreError, match=f"found process {os.getpid()} on"),
    ):
        make_store(tmp_path / "s.featx")


def test_readers_beside_a_writer_that_adds_and_prunes(tmp_path: Path) -> None:
    """Two readers and a verifier, during 12 rounds of growing and shrinking; every answer is a whole one."""
    store = make_store(tmp_path / "s.featx", names_of(12), shard_rows=3)
    wholes = {tuple(names_of(12 + n)[n:]) for n in range(30)} | {tuple(names_of(12))}
    counts = [0, 0, 0]
    writing = threading.Event()

    def watch(number: int) -> None:
        while not writing.is_set():
            if number == 2:
                assert verify(store) == []
            else:
                features = read_features(store)
                assert tuple(features.ids.tolist()) in wholes
                assert np.array_equal(features.embeddings, rows_of(digests_of(features.ids.tolist())))
            counts[number] += 1

    pool = ThreadPoolExecutor(3)
    watchers = [pool.submit(watch, number) for number in range(3)]
    try:
        for n in range(12):
            names = names_of(12 + n)[n:]
            with StoreWriter(store, provenance(), shard_rows=3) as writer:
                fresh = [digest for digest in digests_of(names) if not writer.has(digest)]
                for digest in fresh:
                    writer.add([digest], [rows_of([digest])])
                writer.finish(index_of(names), [], source="")
                writer.prune()
    finally:
        writing.set()
        pool.shutdown()
    for watcher in watchers:
        watcher.result()
    assert min(counts) > 3


def test_only_published_rows_are_seen(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx")
    names = names_of(40)
    with StoreWriter(store, provenance(), shard_rows=10) as writer:
        for digest in digests_of(names[12:]):
            writer.add([digest], [rows_of([digest])])
            assert_rows(store, 12)
        assert writer.rows == 32
        assert verify(store) == []
        writer.finish(index_of(names), [], source="")
        assert_rows(store, 40)


# --- processes and memory -----------------------------------------------------------------------------------------

_reader: FeatureReader | None = None


def _read_part(task: tuple[FeatureReader | None, Path, list[int]]) -> bytes:
    reader, store, rows = task
    reader = reader or _reader or FeatureReader(store)
    return hashlib.sha256(reader.read(np.array(rows)).tobytes()).digest()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_eight_processes_read_the_same(method: str, tmp_path: Path) -> None:
    """By a reader that they inherit, that is sent to them, and that they open themselves."""
    global _reader
    store = make_store(tmp_path / "s.featx", names_of(300), shard_rows=40)
    _reader = FeatureReader(store)
    alone = _reader.read(np.arange(300))
    rng = np.random.default_rng(0)
    parts = [rng.permutation(300)[:100].tolist() for _ in range(24)]
    tasks = [((None, FeatureReader(store))[i % 2], store, rows) for i, rows in enumerate(parts)]
    with multiprocessing.get_context(method).Pool(8) as pool:
        found = pool.map(_read_part, tasks, chunksize=1)
    _reader = None
    assert found == [hashlib.sha256(alone[rows].tobytes()).digest() for rows in parts]


@pytest.mark.parametrize("packed", [False, True], ids=["store", "packed"])
def test_blocks_are_the_whole(packed: bool, tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx", names_of(100), shard_rows=7)
    path = pack(store, tmp_path / "p.h5") if packed else store
    blocks: list[NDArray[np.float32]] = []
    for where, block in iter_features(path, block_rows=9):
        assert where == slice(9 * len(blocks), min(9 * len(blocks) + 9, 100))
        blocks.append(block)
    assert np.array_equal(np.concatenate(blocks), read_features(store).embeddings)
    rows = np.array([99, 0, 50, 50, 3])
    assert np.array_equal(FeatureReader(path).read(rows), read_features(store).embeddings[rows])
    assert FeatureReader(path).read(np.arange(0)).shape == (0, 8)


def peak_of(code: str, *arguments: object) -> int:
    """Growth of a process's peak of memory while it runs ``work()``, in MB."""
    frame = """
import sys
sys.path.insert(0, sys.argv[1])
from storekit import *
{code}
before = peak()
work()
print((peak() - before) // 1024)
"""
    command = [sys.executable, "-c", frame.replace("{code}", code), str(Path(__file__).parent), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["store", "packed"])
def test_streaming_takes_little_memory(packed: bool, tmp_path: Path) -> None:
    """A store of 120 MB, read by blocks and packed within less than 60 MB."""
    code = """
from featx.store import FeatureReader, iter_features
from featx.store_tools import pack
def work():
    total = 0
    for where, block in iter_features(sys.argv[2], block_rows=512):
        total += len(block)
    assert total == 30_000
    FeatureReader(sys.argv[2]).read(np.array([0, 29_999]))
    pack(sys.argv[2], sys.argv[3])
"""
    names, dim = names_of(30_000), 1000
    with StoreWriter(tmp_path / "s.featx", provenance(), shard_rows=2048) as writer:
        for start in range(0, len(names), 1024):
            digests = digests_of(names[start : start + 1024])
            writer.add(digests, [rows_of(digests, dim)])
        writer.finish(index_of(names), [], source="")
    store = tmp_path / "s.featx"
    path = pack(store, tmp_path / "p.h5") if packed else store
    grown = peak_of(code, path, tmp_path / "out.h5")
    print(f"{grown} MB")
    assert grown < 60


@pytest.mark.slow
def test_memory_does_not_depend_on_the_number_of_images(tmp_path: Path) -> None:
    """2,000 and 20,000 PNGs through real decoding processes and a light engine."""
    code = "def work():\n    extract(Path(sys.argv[2]), Path(sys.argv[3]), workers=2)\n"
    source = png_folders(tmp_path / "photos", 2000)
    few = peak_of(code, source, tmp_path / "few.featx")
    many = peak_of(code, png_folders(source, 18_000, first=2000), tmp_path / "many.featx")
    print(f"{few} MB and {many} MB")
    assert info(tmp_path / "many.featx")["rows"] == 20_000
    assert many - few < 100


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
        assert read_quarantine(path) == [Refused("x/bad.png", "", "empty", "the file is empty")]
        shutil.copytree(path, tmp_path / "copy")
        make_store(tmp_path / "copy", names_of(20), layers=("penultimate", "features.3"))  # and continued
        assert_rows(tmp_path / "copy", 20)


def test_a_packed_file_is_read_with_h5py_alone(tmp_path: Path) -> None:
    path = pack(make_store(tmp_path / "s.featx"), tmp_path / "p.h5")
    with h5py.File(path) as file:
        ids = [name.decode() for name in file["ids"][:]]
        assert ids == names_of(12)
        assert np.array_equal(file["embeddings/penultimate"][:], rows_of(digests_of(ids)))
        assert file["labels"][:].tolist() == [-1, 0, 1] * 4
        assert file["digests"][0].tobytes() == digests_of(ids)[0]
        assert file["embeddings/penultimate"].fletcher32 and file["embeddings/penultimate"].compression is None
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
    (store / "manifest.json").write_text(json.dumps({"format": fields["format"], "format_version": 2, "all": "new"}))
    with h5py.File(packed, "r+") as file:
        file.attrs.create("format_version", b"2", dtype=h5py.string_dtype("utf-8", 1))
        del file["labels"]
        file["targets"] = np.zeros(3)
    raw = packed.read_bytes()
    seal = b"featx sha256 " + hashlib.sha256(raw[512:]).hexdigest().encode() + b"\n"
    packed.write_bytes(seal.ljust(512, b"\0") + raw[512:])
    reads: list[Callable[[Path], object]] = [read_features, FeatureReader, info, content_hash]
    for path in (store, packed):
        for read in reads:
            with pytest.raises(StoreError, match=r"newer featx.*up to 1, found 2.*[Uu]pdate featx"):
                read(path)
        assert "Update featx" in verify(path)[0]
    with pytest.raises(StoreError, match="Update featx"):
        make_store(store)


def test_the_format_is_written_down() -> None:
    import featx.store

    text = featx.store.__doc__ or ""
    for word in ("MUST", "MAY", "manifest.json", "index.h5", "quarantine.jsonl", "fletcher32", "featx-packed"):
        assert word in text
    manifest = read_manifest(GOLDEN / "v1-store")
    for name in manifest.to_json():
        assert f"``{name}``" in text, name


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
            assert not writer.has(digest)
            writer.add([digest], [np.full((1, 8), digest[1], np.float32)])
            assert writer.has(digest)
        with pytest.raises(ValueError, match="in the store already"):
            writer.add(digests[:1], [np.zeros((1, 8), np.float32)])
        with pytest.raises(StoreError, match="NaN or infinity"):
            writer.add([b"\2" * 32], [np.full((1, 8), np.nan, np.float32)])
        writer.flush()
        assert all(map(writer.has, digests)) and not writer.has(b"\2" * 32)
    assert check_published(tmp_path / "t.featx") == len(digests)


# --- relabelling, moving, removing --------------------------------------------------------------------------------


def test_relabelling_moving_removing_pruning(tmp_path: Path) -> None:
    source, store = png_folders(tmp_path / "photos", 20), tmp_path / "s.featx"
    assert storekit.extract(source, store).embedded == 20
    rows = dict(zip(read_features(store).ids, read_features(store).embeddings, strict=True))
    (source / "ants").rename(source / "wasps")  # relabelled
    (source / "bees" / "000001.png").rename(source / "bees" / "moved.png")
    (source / "bees" / "000003.png").unlink()
    summary = storekit.extract(source, store)
    assert (summary.embedded, summary.reused) == (0, 19)
    features = read_features(store)
    assert features.class_names == ("bees", "wasps")
    for name, row in zip(features.ids, features.embeddings, strict=True):
        old = name.replace("wasps", "ants").replace("moved", "000001")
        assert np.array_equal(row, rows[old])
    assert sum(shard.rows for shard in read_manifest(store).shards) == 20
    before = content_hash(store)
    assert storekit.extract(source, store, prune=True).pruned == 1
    assert sum(shard.rows for shard in read_manifest(store).shards) == 19
    assert content_hash(store) == before and verify(store) == []
    shutil.rmtree(source / "wasps")
    png_folders(source, 2, first=100)
    assert storekit.extract(source, store, prune=True).pruned == 10
    assert verify(store) == [] and len(read_features(store)) == 11


def test_pruning_rewrites_only_the_shards_it_must(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx", names_of(20), shard_rows=5)
    before = [shard.name for shard in read_manifest(store).shards]
    names = names_of(20)[:5] + names_of(20)[7:15]  # shard 2 in part, shard 4 wholly
    with StoreWriter(store, provenance()) as writer:
        writer.finish(index_of(names), [], source="")
        assert writer.prune() == 7
        assert writer.prune() == 0
    after = [shard.name for shard in read_manifest(store).shards]
    assert set(before) & set(after) == {before[0], before[2]} and len(after) == 3
    assert sorted(path.name for path in (store / "shards").iterdir()) == sorted(after)
    assert read_manifest(store).in_flux == ()
    assert_rows(store, 13)


@pytest.mark.slow
def test_unchanged_files_are_recognised_without_reading(tmp_path: Path) -> None:
    """100,000 files that no decoder could read: whoever opened one would refuse it."""
    count = 100_000
    source, store = tmp_path / "photos", tmp_path / "s.featx"
    ids = []
    for number in range(count):
        if number % 1000 == 0:
            folder = source / ("ants", "bees")[number // 1000 % 2] / f"{number // 1000:03d}"
            folder.mkdir(parents=True)
        path = folder / f"{number:06d}.png"
        with open(path, "wb") as file:  # noqa: PTH123 - pathlib is slower, and there are many
            file.write(b"no image")
        os.utime(path, ns=(10**18, 10**18))
        ids.append(path.relative_to(source).as_posix())
    ids.sort()
    index = index_of(ids)
    index.sizes[:], index.mtimes_ns[:] = 8, 10**18
    made = provenance_of(light_backbone(), storekit.LightEngine())
    with StoreWriter(store, made) as writer:
        for start in range(0, count, 4096):
            digests = digests_of(ids[start : start + 4096])
            writer.add(digests, [rows_of(digests)])
        writer.finish(index, [], source="")
    started = time.perf_counter()
    summary = storekit.extract(source, store)
    seconds = time.perf_counter() - started
    print(f"{count / seconds:,.0f} files/s")
    assert (summary.images, summary.reused, summary.quarantined) == (count, count, 0)
    started = time.perf_counter()
    for path in source.rglob("*.png"):
        hashlib.sha256(path.read_bytes()).digest()
    reading = time.perf_counter() - started
    assert seconds < max(reading, 20)


def test_the_manifest_is_canonical(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx")
    fields = json.loads((store / "manifest.json").read_text())
    claimed = fields.pop("checksum")
    assert claimed == hashlib.sha256(canonical_json(fields)).hexdigest()
    assert fields["counts"] == {"images": 12, "embeddings": 12, "quarantined": 1}
    assert fields["splits"] == {"test": 3, "train": 3, "val": 3}
    assert store_tools.info(store)["classes"] == {"ants": 4, "bees": 4}
