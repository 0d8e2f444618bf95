"""Disks that are full or read-only: a clear sentence, and the published part intact."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import storekit
from conftest import Featx
from storekit import check_published, digests_of, index_of, make_store, names_of, provenance, rows_of

from featx._files import LatchedFile
from featx.errors import StoreError
from featx.store.reader import read_features
from featx.store.tools import content_hash, verify
from featx.store.writer import StoreWriter

if TYPE_CHECKING:
    pass


@pytest.mark.parametrize("limit", [0, 600, 2000, 4000, 9000])
def test_hdf5_survives_a_full_disk(tmp_path: Path, limit: int) -> None:
    """In a process of its own: what HDF5 does after a failed write, it does at exit."""
    code = f"""
import resource, signal
from pathlib import Path
import numpy as np
from featx.store import hdf5
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
columns = [hdf5.Column.of(name, np.ones((300, 64), np.float32)) for name in "ab"]
try:
    hdf5.write(Path({str(tmp_path / "x.h5")!r}), columns, {{}}, seal=True)
except OSError as error:
    raise SystemExit(error.errno)
"""
    # Without what measures coverage, which would want to write a file at exit, too.
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (27, "")  # EFBIG, and no complaint of HDF5


def test_latched_file_reads_what_the_disk_did_not_take(tmp_path: Path) -> None:
    rng = random.Random(0)
    plain = bytearray()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with LatchedFile(tmp_path / "x") as file:
            for _ in range(500):
                at, data = rng.randrange(1000), rng.randbytes(rng.randrange(1, 60))
                plain.extend(bytes(max(0, at + len(data) - len(plain))))
                plain[at : at + len(data)] = data
                file.seek(at)
                assert file.write(data) == len(data)
                at = rng.randrange(1000)
                file.seek(at)
                assert file.read(80) == bytes(plain[at : at + 80]).ljust(80, b"\0")
                assert file.seek(0, os.SEEK_END) == len(plain)
            with pytest.raises(OSError, match="too large"):
                file.check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "featx-test", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk(small_disk: Path) -> None:
    store, slack = small_disk / "s.featx", small_disk / "slack"
    make_store(store)
    slack.write_bytes(bytes(60_000))
    before = content_hash(store)
    names = names_of(5000)
    with (
        StoreWriter(store, provenance(), shard_rows=1000) as writer,
        pytest.raises(StoreError, match=r"the disk is full.*is intact; free some space"),
    ):
        for start in range(0, len(names), 500):
            digests = [digest for digest in digests_of(names[start : start + 500]) if writer.lacks(digest)]
            writer.add(digests, {"tiny": [rows_of(digests)]})
        writer.finish(index_of(names), [], source="by hand")
    assert check_published(store) > 12
    assert content_hash(store) == before
    assert verify(store) == []
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"), filler.open("wb") as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(StoreError, match="the disk is full"):
        make_store(store)
    filler.unlink()
    slack.unlink()
    make_store(store)
    assert content_hash(store) == before


@pytest.mark.slow
def test_full_disk_with_the_real_command(small_disk: Path, tmp_path: Path, featx: Featx) -> None:
    source = storekit.png_folders(tmp_path / "photos", 20)
    store = small_disk / "s.featx"
    assert featx("extract", source, "--out", store).code == 0
    before = content_hash(store)
    ran = featx("extract", storekit.png_folders(source, 60, first=20), "--out", store)
    assert ran.code == 2
    assert ran.err.count("\n") == 1 and "the disk is full" in ran.err and "intact" in ran.err
    assert content_hash(store) == before
    assert verify(store) == []


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_full_disk(small_disk: Path, tmp_path: Path, featx: Featx) -> None:
    store = make_store(tmp_path / "s.featx", names_of(300))
    arguments = ["sweep", store, "--heads=ridge,knn", "--shots=1,2", "--episodes=6", "--n-jobs=1", "--json"]
    whole = featx(*arguments, "--out", tmp_path / "whole").json
    filler = small_disk / "filler"
    filler.write_bytes(bytes(380_000))
    ran = featx(*arguments, "--out", small_disk / "report")
    assert ran.code == 2
    assert ran.err.count("Error: ") == 1
    assert "cannot write the journal: found No space left on device. Free some space and run" in ran.err
    assert (small_disk / "report" / "journal.jsonl").read_bytes().count(b"\n") > 1
    filler.unlink()
    resumed = featx(*arguments, "--out", small_disk / "report").json
    for row in (whole, resumed):
        del row["seconds"], row["report"], row["notes"]
        for each in row["results"]:
            del each["fit_seconds"]
    assert resumed == whole


def test_read_only_folder(tmp_path: Path, featx: Featx) -> None:
    source, store = storekit.png_folders(tmp_path / "photos", 4), tmp_path / "s.featx"
    make_store(store)
    before = content_hash(store)
    folders = [store, store / "shards"]
    if os.geteuid() == 0:  # whom permissions do not stop
        if subprocess.run(["chattr", "+i", *folders], capture_output=True, check=False).returncode:
            pytest.skip("root, and a file system without chattr +i")
        undo = ["chattr", "-i", *map(str, folders)]
    else:
        for folder in folders:
            folder.chmod(0o555)
        undo = ["chmod", "755", *map(str, folders)]
    try:
        with pytest.raises(StoreError, match="no permission to write"):
            make_store(store)
        assert content_hash(store) == before
        assert len(read_features(store)) == 12
        ran = featx("extract", source, "--out", store / "inside.featx")
        assert ran.code == 2 and "no permission to write" in ran.err
    finally:
        subprocess.run(undo, check=True)
    assert verify(store) == []
