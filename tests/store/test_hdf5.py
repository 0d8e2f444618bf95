"""Hostile shards: 40 crafted HDF5 files with a manifest that vouches for them, and what they cost."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import TESTS
from storekit import make_store, names_of

from featx.errors import StoreError
from featx.store import hdf5, manifest
from featx.store.manifest import Shard, read_manifest
from featx.store.reader import FeatureReader, read_features
from featx.store.tools import verify

N, D = 6, 4
EMBEDDINGS = np.arange(N * D, dtype="<f4").reshape(N, D)
DIGESTS = np.arange(N * 32, dtype=np.uint8).reshape(N, 32)


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
    shard = Shard(f"00000-{sha256[:8]}.h5", N, sha256, {"tiny": ("penultimate",)}, version=1)
    (store / "shards" / shard.name).write_bytes(raw)
    manifest.write_manifest(store, manifest.Manifest(old.backbones, (shard,)))
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
        next((store / "shards").iterdir()), {"embeddings/penultimate": "float32 matrix", "digests": "uint8 matrix"}
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
from featx.store.reader import FeatureReader, read_features
from featx.store.tools import info, verify
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
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    print(f"{int(done.stdout) / 1024:.1f} MB")
    assert int(done.stdout) < 50_000  # kB
