"""A store that follows its folder: relabelling, moving, removing, pruning, 100,000 unchanged files."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import storekit
from storekit import (
    assert_rows,
    digests_of,
    index_of,
    light_backbone,
    make_store,
    names_of,
    png_folders,
    provenance,
    rows_of,
)

from featx.errors import MismatchError
from featx.manifest import read_manifest
from featx.provenance import provenance_of
from featx.store import read_features
from featx.store_tools import content_hash, verify
from featx.store_writer import StoreWriter

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
        if number % 50_000 == 0:  # as many names as file systems allow one file to have
            path.write_bytes(b"no image")
            os.utime(path, ns=(10**18, 10**18))
            first = path
        else:
            os.link(first, path)
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
    started, used = time.perf_counter(), time.process_time()
    summary = storekit.extract(source, store)
    seconds, used = time.perf_counter() - started, time.process_time() - used
    print(f"{count / seconds:,.0f} files/s, {count / used:,.0f} in a second of this process")
    assert (summary.images, summary.reused, summary.quarantined) == (count, count, 0)
    walked = time.process_time()
    assert sum(path.stat().st_size for path in source.rglob("*.png")) == 8 * count
    walked = time.process_time() - walked
    print(f"{used / walked:.1f} times the time of pathlib's walk")
    assert used < 5 * walked  # every file is looked at, none is read
