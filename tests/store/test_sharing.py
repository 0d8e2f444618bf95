"""One store for many: two writers, readers beside a writer, forks, and memory that does not grow."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import TESTS, Featx
from numpy.typing import NDArray
from storekit import (
    assert_rows,
    digests_of,
    index_of,
    make_store,
    names_of,
    png_folders,
    provenance,
    rows_of,
)

from featx.errors import StoreError
from featx.store.reader import FeatureReader, iter_features, read_features
from featx.store.tools import info, pack, verify
from featx.store.writer import StoreWriter

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
    process = subprocess.Popen([sys.executable, "-c", code], cwd=TESTS, stdout=subprocess.PIPE, text=True)
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


@pytest.mark.slow
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
                fresh = [digest for digest in digests_of(names) if writer.lacks(digest)]
                for digest in fresh:
                    writer.add([digest], {"tiny": [rows_of([digest])]})
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
            writer.add([digest], {"tiny": [rows_of([digest])]})
            assert_rows(store, 12)
        assert writer.rows == 32
        assert verify(store) == []
        writer.finish(index_of(names), [], source="")
        assert_rows(store, 40)


# --- processes and memory -----------------------------------------------------------------------------------------

_EIGHT = """
import hashlib, multiprocessing, sys
from pathlib import Path
import numpy as np
from featx.store.reader import FeatureReader

inherited = None

def read(task):
    reader, store, rows = task
    return hashlib.sha256((reader or inherited or FeatureReader(store)).read(np.array(rows)).tobytes()).digest()

if __name__ == "__main__":
    method, store = sys.argv[1], Path(sys.argv[2])
    inherited = FeatureReader(store)
    alone = inherited.read(np.arange(300))
    rng = np.random.default_rng(0)
    parts = [rng.permutation(300)[:100].tolist() for _ in range(24)]
    tasks = [((None, FeatureReader(store))[i % 2], store, rows) for i, rows in enumerate(parts)]
    with multiprocessing.get_context(method).Pool(8) as pool:
        found = pool.map(read, tasks, chunksize=1)
    assert found == [hashlib.sha256(alone[rows].tobytes()).digest() for rows in parts]
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_eight_processes_read_the_same(method: str, tmp_path: Path) -> None:
    """By a reader that they inherit, that is sent to them, and that they open themselves.

    In a process without the threads of the suite: what forks with threads may hang whatever it reads.
    """
    store = make_store(tmp_path / "s.featx", names_of(300), shard_rows=40)
    script = tmp_path / "eight.py"
    script.write_text(_EIGHT)
    subprocess.run([sys.executable, str(script), method, str(store)], check=True, timeout=240)


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
    command = [sys.executable, "-c", frame.replace("{code}", code), str(TESTS), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["store", "packed"])
def test_streaming_takes_little_memory(packed: bool, tmp_path: Path) -> None:
    """A store of 120 MB, read by blocks and packed within less than 60 MB."""
    code = """
from featx.store.reader import FeatureReader, iter_features
from featx.store.tools import pack
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
            writer.add(digests, {"tiny": [rows_of(digests, dim)]})
        writer.finish(index_of(names), [], source="")
    store = tmp_path / "s.featx"
    path = pack(store, tmp_path / "p.h5") if packed else store
    grown = peak_of(code, path, tmp_path / "out.h5")
    print(f"{grown} MB")
    assert grown < 60


@pytest.mark.slow
def test_memory_does_not_depend_on_the_number_of_images(tmp_path: Path) -> None:
    """2,000 and 10,000 PNGs through real decoding processes and a light engine."""
    code = "def work():\n    extract(Path(sys.argv[2]), Path(sys.argv[3]), workers=2)\n"
    source = png_folders(tmp_path / "photos", 2000)
    few = peak_of(code, source, tmp_path / "few.featx")
    many = peak_of(code, png_folders(source, 8000, first=2000), tmp_path / "many.featx")
    print(f"{few} MB and {many} MB")
    assert info(tmp_path / "many.featx")["rows"] == 10_000
    assert many - few < 45
