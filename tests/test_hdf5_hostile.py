"""Hostile files: 40 crafted HDF5 files, 25 crafted manifests, folders with traps, and fuzzing for a fixed time."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from storekit import index_of, make_store, names_of, provenance

from featx import hdf5, manifest
from featx._files import canonical_json
from featx.errors import StoreError
from featx.manifest import Shard, read_manifest
from featx.store import FeatureReader, read_features
from featx.store_tools import info, pack, verify
from featx.store_writer import StoreWriter

N, D = 6, 4
EMBEDDINGS = np.arange(N * D, dtype="<f4").reshape(N, D)
DIGESTS = np.arange(N * 32, dtype=np.uint8).reshape(N, 32)
FUZZ_SECONDS = 10.0


def sound(file: h5py.File) -> None:
    """What a shard is like; each craft below changes one thing."""
    file.create_dataset("embeddings/penultimate", data=EMBEDDINGS, chunks=(N, D), fletcher32=True)
    file.create_dataset("digests", data=DIGESTS, chunks=(N, 32), fletcher32=True)


def embeddings(file: h5py.File, *arguments: Any, **options: Any) -> h5py.Dataset:
    """Put something else in the place of the embeddings."""
    del file["embeddings"]
    return file.create_dataset("embeddings/penultimate", *arguments, **options)


def external_storage(file: h5py.File) -> None:
    embeddings(file, (N, D), "<f4", external=[("/etc/passwd", 0, N * D * 4)])


def external_link(file: h5py.File) -> None:
    del file["embeddings"]
    file["embeddings/penultimate"] = h5py.ExternalLink("/etc/passwd", "/embeddings")


def external_group(file: h5py.File) -> None:
    del file["embeddings"]
    file["embeddings"] = h5py.ExternalLink("other.h5", "/embeddings")


def soft_link(file: h5py.File) -> None:
    del file["embeddings"]
    file["real"] = EMBEDDINGS
    file["embeddings/penultimate"] = h5py.SoftLink("/real")


def soft_digests(file: h5py.File) -> None:
    file.move("digests", "embeddings/digests")
    file["digests"] = h5py.SoftLink("/embeddings/digests")


def virtual(file: h5py.File) -> None:
    del file["embeddings"]
    layout = h5py.VirtualLayout((N, D), "<f4")
    layout[:] = h5py.VirtualSource("nowhere.h5", "x", shape=(N, D))
    file.create_virtual_dataset("embeddings/penultimate", layout)


def bomb(file: h5py.File) -> None:
    embeddings(file, (2**50, D), "<f4", chunks=(1024, D))


def bomb_in_two_dimensions(file: h5py.File) -> None:
    embeddings(file, (2**31, 2**31), "<f4", chunks=(64, 64))


def beyond_63_bits(file: h5py.File) -> None:
    space = h5py.h5s.create_simple((2**63 - 1, 0), (2**63 - 1, 0))
    del file["embeddings"]
    group = file.create_group("embeddings")
    h5py.h5d.create(group.id, b"penultimate", h5py.h5t.IEEE_F32LE, space)


def contiguous_bomb(file: h5py.File) -> None:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_LATE)
    del file["embeddings"]
    group = file.create_group("embeddings")
    h5py.h5d.create(group.id, b"penultimate", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((2**40, D)), plist)


def never_written(file: h5py.File) -> None:
    embeddings(file, (N, D), "<f4", chunks=(2, D))[0:2] = 1


def never_written_contiguous(file: h5py.File) -> None:
    embeddings(file, (N, D), "<f4")


def split_rows(file: h5py.File) -> None:
    embeddings(file, data=EMBEDDINGS, chunks=(N, 2))


def half_written_split_rows(file: h5py.File) -> None:
    embeddings(file, (N, D), "<f4", chunks=(64, 3), maxshape=(None, D))[:, :3] = 1


def huge_chunks(file: h5py.File) -> None:
    embeddings(file, (N, D), "<f4", chunks=(2**24, D), maxshape=(None, D))


def committed_type_in_place(file: h5py.File) -> None:
    del file["embeddings"]
    file["embeddings/penultimate"] = np.dtype("<f4")


def cycle(file: h5py.File) -> None:
    file["embeddings/again"] = file["embeddings"]


def root_in_itself(file: h5py.File) -> None:
    del file["embeddings"]
    file["embeddings"] = file["/"]


def no_group(file: h5py.File) -> None:
    del file["embeddings"]
    file["embeddings"] = EMBEDDINGS


def empty_group(file: h5py.File) -> None:
    del file["embeddings/penultimate"]


def more_objects(file: h5py.File) -> None:
    file["more"] = EMBEDDINGS


def without_digests(file: h5py.File) -> None:
    del file["digests"]


def other_length(file: h5py.File) -> None:
    embeddings(file, data=EMBEDDINGS[:-1])


def scalar(file: h5py.File) -> None:
    embeddings(file, data=np.float32(1))


def null_space(file: h5py.File) -> None:
    embeddings(file, data=h5py.Empty("<f4"))


def rank_three(file: h5py.File) -> None:
    embeddings(file, data=EMBEDDINGS[:, :, None])


def no_width(file: h5py.File) -> None:
    embeddings(file, (N, 0), "<f4")


def gzip(file: h5py.File) -> None:
    embeddings(file, data=EMBEDDINGS, chunks=(N, D), compression="gzip")


def gzip_bomb(file: h5py.File) -> None:
    embeddings(file, data=np.zeros((100_000, D), "<f4"), chunks=(100_000, D), compression="gzip")


def shuffled(file: h5py.File) -> None:
    embeddings(file, data=EMBEDDINGS, chunks=(N, D), shuffle=True)


def unknown_filter(file: h5py.File) -> None:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((N, D))
    plist.set_filter(32_099, h5py.h5z.FLAG_OPTIONAL, (1, 2))
    del file["embeddings"]
    group = file.create_group("embeddings")
    h5py.h5d.create(group.id, b"penultimate", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((N, D)), plist)


def of_type(dtype: Any, value: Any = 0) -> Callable[[h5py.File], None]:
    def craft(file: h5py.File) -> None:
        embeddings(file, shape=(N, D), dtype=dtype)[...] = value

    return craft


def references(file: h5py.File) -> None:
    embeddings(file, (N, D), h5py.ref_dtype)


def compound(file: h5py.File) -> None:
    embeddings(file, (N, D), np.dtype([("a", "<f4")]))


def array_type(file: h5py.File) -> None:
    embeddings(file, (N, D), np.dtype(("<f4", (2,))))


def odd_float(file: h5py.File) -> None:
    """Four bytes, as float32 has, with the fields of the number elsewhere."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(31, 20, 11, 0, 20)
    del file["embeddings"]
    group = file.create_group("embeddings")
    h5py.h5d.create(group.id, b"penultimate", kind, h5py.h5s.create_simple((N, D)))


def nan(file: h5py.File) -> None:
    file["embeddings/penultimate"][2, 1] = np.nan


def infinity(file: h5py.File) -> None:
    file["embeddings/penultimate"][2, 1] = -np.inf


def short_digests(file: h5py.File) -> None:
    del file["digests"]
    file["digests"] = DIGESTS[:, :31]


def other_layer(file: h5py.File) -> None:
    file.move("embeddings/penultimate", "embeddings/another")


CRAFTS = [
    *(external_storage, external_link, external_group, soft_link, soft_digests, virtual, bomb, bomb_in_two_dimensions),
    *(beyond_63_bits, contiguous_bomb, never_written, never_written_contiguous, split_rows, half_written_split_rows),
    *(
        huge_chunks,
        committed_type_in_place,
        cycle,
        root_in_itself,
        no_group,
        empty_group,
        more_objects,
        without_digests,
    ),
    *(other_length, scalar, null_space, rank_three, no_width, gzip, gzip_bomb, shuffled, unknown_filter, references),
    *(compound, array_type, odd_float, nan, infinity, short_digests, other_layer),
]
TYPES = {
    "big_endian": ">f4",
    "double": "<f8",
    "half": "<f2",
    "integers": "<i4",
    "complex": "<c8",
    "booleans": bool,
    "fixed_text": "S4",
    "text": h5py.string_dtype(),
    "lists": h5py.vlen_dtype("<f4"),
    "enumeration": h5py.enum_dtype({"a": 1}, "i4"),
    "opaque": h5py.opaque_dtype("V4"),
}


def hostile_store(folder: Path, craft: Callable[[h5py.File], None]) -> Path:
    """A store whose manifest vouches for the crafted file, as an attacker's would."""
    store = make_store(folder / "s.featx", names_of(N), shard_rows=N)
    with h5py.File(folder / "x.h5", "w") as file:
        sound(file)
        craft(file)
    raw = (folder / "x.h5").read_bytes()
    sha256 = hashlib.sha256(raw).hexdigest()
    old = read_manifest(store)
    (store / "shards" / old.shards[0].name).unlink()
    shard = Shard(f"00000-{sha256[:8]}.h5", N, sha256)
    (store / "shards" / shard.name).write_bytes(raw)
    manifest.write_manifest(store, manifest.Manifest(old.provenance, (shard,)))
    return store


def must_be_refused(store: Path, name: str) -> None:
    for read in (read_features, FeatureReader):
        with pytest.raises(StoreError) as caught:
            reader = read(store)
            if isinstance(reader, FeatureReader):
                reader.read(np.arange(N))
        assert name in str(caught.value)
    problems = verify(store)
    assert problems and any(name in problem for problem in problems)


def test_the_file_that_the_crafts_start_from_is_read(tmp_path: Path) -> None:
    store = hostile_store(tmp_path, lambda file: None)
    with pytest.raises(StoreError, match="names an image that no shard has"):  # its digests are made up
        read_features(store)
    with hdf5.open_checked(
        next((store / "shards").iterdir()), {"embeddings/*": "float32 matrix", "digests": "uint8 matrix"}
    ) as file:
        assert np.array_equal(file.read("embeddings/penultimate"), EMBEDDINGS)


@pytest.mark.parametrize("craft", CRAFTS, ids=lambda craft: craft.__name__)
def test_crafted_shards(craft: Callable[[h5py.File], None], tmp_path: Path) -> None:
    must_be_refused(hostile_store(tmp_path, craft), ".h5")


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_wrong_types(dtype: Any, tmp_path: Path) -> None:
    def craft(file: h5py.File) -> None:
        embeddings(file, (N, D), dtype)

    must_be_refused(hostile_store(tmp_path, craft), "is not float32 matrix")


def test_bombs_cost_no_memory(tmp_path: Path) -> None:
    """In a process of its own: the growth of its peak over 12 crafted shards and 3 manifests."""
    crafts = [bomb, bomb_in_two_dimensions, contiguous_bomb, beyond_63_bits, huge_chunks, gzip_bomb, virtual]
    crafts += [external_storage, external_link, never_written, half_written_split_rows, unknown_filter]
    stores = []
    for craft in crafts:
        (tmp_path / craft.__name__).mkdir()
        stores.append(hostile_store(tmp_path / craft.__name__, craft))
    for name, text in {
        "lists": b"[" + b"[]," * 1_300_000 + b"[]]",
        "objects": b'{"format": "featx-store", "x": [' + b'{"a":{}},' * 400_000 + b"1]}",
        "wide": b'{"format": "featx-store", "x": "' + b"a" * 2**21 + "\U0001f600".encode() + b'"}',
    }.items():
        store = tmp_path / name
        store.mkdir()
        (store / "manifest.json").write_bytes(text)
        stores.append(store)
    code = """
import sys
from storekit import peak
from featx.errors import StoreError
from featx.store import FeatureReader, read_features
from featx.store_tools import info, verify
opened = []
sys.addaudithook(lambda name, arguments: opened.append(str(arguments[0])) if name == "open" else None)
before = peak()
for store in sys.argv[1:]:
    for read in (read_features, FeatureReader, info):
        try:
            read(store)
            assert read is info
        except StoreError:
            pass
    assert verify(store)
print(peak() - before)
assert not [name for name in opened if "passwd" in name]
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, stores)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    print(f"{int(done.stdout) / 1024:.1f} MB")
    assert int(done.stdout) < 50_000  # kB


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


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_crafted_manifests(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.featx")
    tampered(store, change)
    with pytest.raises(StoreError):
        read_features(store)
    assert verify(store)
    with pytest.raises(StoreError):
        make_store(store)


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
        except (ValueError, AttributeError, RecursionError):
            return
        file.attrs.create("fingerprint", value.encode(), dtype=h5py.string_dtype("utf-8", 64))

    sealed(path, craft)
    with pytest.raises(StoreError):
        read_features(path)
    assert verify(path)


# --- fuzzing ------------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=8,
)
FIELDS = [
    "format_version",
    "provenance",
    "fingerprint",
    "shards",
    "in_flux",
    "class_names",
    "splits",
    "counts",
    "source",
]


@pytest.mark.slow
def test_fuzzed_manifests(tmp_path: Path) -> None:
    """Ten seconds of manifests with right checksums and any JSON in their fields: read, or refused in a sentence."""
    store = make_store(tmp_path / "s.featx")
    good = json.loads((store / "manifest.json").read_text())
    until = time.monotonic() + FUZZ_SECONDS
    tried = 0

    @settings(max_examples=100, deadline=None, database=None, phases=[Phase.generate, Phase.shrink])
    @given(st.dictionaries(st.sampled_from(FIELDS), values, max_size=3), st.dictionaries(st.text(), values, max_size=2))
    def fuzz(changed: dict[str, Any], extra: dict[str, Any]) -> None:
        nonlocal tried
        tried += 1
        fields = {**extra, **good, **changed}
        fields.pop("checksum")
        try:
            fields["checksum"] = hashlib.sha256(canonical_json(fields)).hexdigest()
        except ValueError:  # NaN, which a file can hold all the same
            fields["checksum"] = "0" * 64
        (store / "manifest.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        try:
            read_manifest(store)
        except StoreError as error:
            assert "manifest.json" in str(error)

    rounds = 0
    while time.monotonic() < until:
        seed(rounds)(fuzz)()
        rounds += 1
    print(f"{tried} manifests")
    assert tried > 200


@pytest.mark.slow
def test_fuzzed_hdf5(tmp_path: Path) -> None:
    """Ten seconds of damaged HDF5, in a process of its own since HDF5 is native code: the rows, or a StoreError.

    The checksums that stand before this in a store are left out here.
    """
    store = make_store(tmp_path / "s.featx", names_of(40), shard_rows=40)
    path = next((store / "shards").iterdir())
    code = f"""
import random, sys, time
from pathlib import Path
import numpy as np
from featx import hdf5
from featx.errors import StoreError
from featx.store import SHARD_COLUMNS
source, target = Path({str(path)!r}), Path({str(tmp_path / "x.h5")!r})
good, rng = source.read_bytes(), random.Random(int(sys.argv[1]))
with hdf5.open_checked(source, SHARD_COLUMNS) as file:
    expected = file.read("embeddings/penultimate")
until, tried, read = time.monotonic() + {FUZZ_SECONDS}, 0, 0
while time.monotonic() < until:
    raw = bytearray(good)
    for _ in range(rng.choice([1, 1, 2, 8])):
        # Mostly in the structure, which is at the front.
        at = rng.randrange(len(raw)) if rng.random() < 0.2 else rng.randrange(4000)
        raw[at % len(raw)] = rng.choice([0, 1, 255, 127, 128, raw[at % len(raw)] ^ (1 << rng.randrange(8))])
    if rng.random() < 0.1:
        del raw[rng.randrange(len(raw)) :]
    target.write_bytes(raw)
    tried += 1
    try:
        with hdf5.open_checked(target, SHARD_COLUMNS) as file:
            for name in file.columns:
                file.read(name)
        read += 1
    except StoreError:
        pass
print(tried, read)
"""
    done = subprocess.run([sys.executable, "-c", code, "0"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    tried, read = map(int, done.stdout.split())
    print(f"{tried} files, of which {read} were read")
    assert tried > 100 and read < tried


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
            writer.finish(index_of(names_of(12), classes=[f"c{i}" for i in range(2**17)]), [], source="")
    assert (store / "index.h5").read_bytes() == before
    assert verify(store) == []
