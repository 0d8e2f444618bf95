"""A store that follows its folder: relabelling, moving, removing, pruning, 100,000 unchanged files."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import storekit
from storekit import (
    assert_rows,
    digests_of,
    extract_part,
    index_of,
    light_backbone,
    make_store,
    names_of,
    png_folders,
    provenance,
    rows_of,
    write_png,
)

from featx.backbones.backbone import load_backbone
from featx.backbones.engines.choice import make_engine
from featx.backbones.provenance import provenance_of
from featx.errors import MismatchError
from featx.extraction.parts import Part, finish_parts
from featx.images.origin import Origin
from featx.images.pool import DecoderPool
from featx.images.source import ImageSet
from featx.store.index import INDEX_COLUMNS, read_index
from featx.store.manifest import read_manifest
from featx.store.reader import read_features
from featx.store.tools import content_hash, verify
from featx.store.writer import StoreWriter

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
    with pytest.raises(MismatchError, match=r"found 10 of 19 labelled images missing"):
        storekit.extract(source, store, prune=True)
    assert storekit.extract(source, store, prune=True, replace_images=True).pruned == 10
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


# --- what has not changed is not read -----------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that decoders are asked for; files count as settled at once."""
    names: list[str] = []
    decode = DecoderPool._one

    def noting(pool: DecoderPool, origin: Origin, *rest: Any) -> Any:
        names.append(Path(str(origin)).name)
        return decode(pool, origin, *rest)

    monkeypatch.setattr(DecoderPool, "_one", noting)
    monkeypatch.setattr("featx.extraction.run._SETTLED_NS", 0)
    return names


def written_in_place(path: Path) -> None:
    """Other content of the same size, and the time set back."""
    before, other = path.stat(), other_png(path)
    with path.open("r+b") as file:
        file.write(other)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_ino == before.st_ino


def copied_with_times(path: Path) -> None:
    """As ``rsync --times`` does: a new file beside it gets the time, then the name."""
    before, temp = path.stat(), path.with_name(".000000.png.Xy12")
    temp.write_bytes(other_png(path))
    os.utime(temp, ns=(before.st_atime_ns, before.st_mtime_ns))
    temp.replace(path)


def other_png(path: Path) -> bytes:
    """A PNG of other pixels with as many bytes."""
    old, made = path.read_bytes(), path.with_name(".other")
    for seed in range(1_000_000, 1_001_000):
        write_png(made, seed)
        new = made.read_bytes()
        if len(new) == len(old) and new != old:
            made.unlink()
            return new
    raise AssertionError("no seed gives a PNG of that size")


@pytest.mark.parametrize("change", [written_in_place, copied_with_times])
def test_other_content_of_the_same_size_and_time_is_read_again(
    tmp_path: Path, read: list[str], change: Callable[[Path], None]
) -> None:
    source, store = png_folders(tmp_path / "photos", 6), tmp_path / "s.featx"
    storekit.extract(source, store)
    read.clear()
    storekit.extract(source, store)
    assert read == []
    path = source / "ants" / "000000.png"
    before = path.stat()
    change(path)
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    again = storekit.extract(source, store)
    assert (again.embedded, again.reused, read) == (1, 5, ["000000.png"])
    features = read_features(store)
    assert features.digests[0].tobytes() == hashlib.sha256(path.read_bytes()).digest()


def test_parts_recognise_what_has_not_changed(tmp_path: Path, read: list[str]) -> None:
    source, store = png_folders(tmp_path / "photos", 6), tmp_path / "s.featx"
    images = ImageSet.from_folder(source)
    for part in (Part.parse("1/2"), Part.parse("2/2")):
        extract_part(images, light_backbone(), store, part, engine=storekit.LightEngine(), workers=1)
    finish_parts(images, store)
    assert len(read) == 6
    read.clear()
    assert (storekit.extract(source, store).reused, read) == (6, [])
    written_in_place(source / "bees" / "000001.png")
    assert (storekit.extract(source, store).embedded, read) == (1, ["000001.png"])


def test_rehash_reads_everything_and_embeds_what_is_new(tmp_path: Path, read: list[str]) -> None:
    source, store = png_folders(tmp_path / "photos", 6), tmp_path / "s.featx"
    storekit.extract(source, store)
    read.clear()
    again = storekit.extract(source, store, rehash=True)
    assert (again.embedded, again.reused, len(read)) == (0, 6, 6)


def test_an_index_of_0_1_0_is_read_and_a_new_one_has_its_columns(tmp_path: Path, read: list[str]) -> None:
    """It kept modification times: images are read again once, and nothing is embedded."""
    source, store = png_folders(tmp_path / "photos", 6), tmp_path / "s.featx"
    storekit.extract(source, store)
    with StoreWriter(store, read_manifest(store).provenance) as writer:
        assert writer.index is not None
        writer.finish(replace(writer.index, stamps=np.full(6, 10**18, np.int64)), [], source="")
    read.clear()
    again = storekit.extract(source, store)
    assert (again.embedded, again.reused, len(read)) == (0, 6, 6)
    # Featx 0.1.0 refuses an index with any other column.
    assert sorted(INDEX_COLUMNS) == ["class_names", "digests", "ids", "labels", "mtimes_ns", "sizes", "split"]
    assert (read_index(store, read_manifest(store)).stamps >= 0).all()


@pytest.mark.slow
def test_unchanged_files_are_recognised_without_reading(tmp_path: Path) -> None:
    """50,000 files that no decoder could read: whoever opened one would refuse it."""
    count = 50_000
    source, store = tmp_path / "photos", tmp_path / "s.featx"
    ids = []
    for number in range(count):
        if number % 1000 == 0:
            folder = source / ("ants", "bees")[number // 1000 % 2] / f"{number // 1000:03d}"
            folder.mkdir(parents=True)
        path = folder / f"{number:06d}.png"
        if number % 25_000 == 0:  # as many names as file systems allow one file to have
            path.write_bytes(b"no image")
            os.utime(path, ns=(10**18, 10**18))
            first = path
        else:
            os.link(first, path)
        ids.append(path.relative_to(source).as_posix())
    ids.sort()
    index = index_of(ids)
    index.sizes[:], index.stamps[:] = 8, [ref.stamp for ref in ImageSet.from_folder(source).refs]
    made = provenance_of(light_backbone(), storekit.LightEngine())
    pixels = load_backbone("pixels")
    with StoreWriter(store, made, provenance_of(pixels, make_engine(pixels))) as writer:
        for start in range(0, count, 4096):
            digests = digests_of(ids[start : start + 4096])
            thumbnails = np.zeros((len(digests), 768), np.float32)
            writer.add(digests, {"tiny": [rows_of(digests)], "pixels": [thumbnails]})
        writer.finish(index, [], source="")
    started, used = time.perf_counter(), time.process_time()
    summary = storekit.extract(source, store)
    seconds, used = time.perf_counter() - started, time.process_time() - used
    print(f"{count / seconds:,.0f} files/s, {count / used:,.0f} in a second of this process")
    assert (summary.images, summary.reused, summary.quarantined) == (count, count, 0)
    walked = time.process_time()
    assert sum(path.stat().st_size for path in source.rglob("*.png")) == 8 * count
    walked = time.process_time() - walked
    print(f"{used / walked:.1f} times the time of pathlib's walk")
    if sys.gettrace() is None:  # lines that are counted take longer
        assert used < 5 * walked  # every file is looked at, none is read
