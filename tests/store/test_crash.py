"""Crashes: kill -9 at 60 random instants of a light run and 8 of the real one, signals at a third of the writer's
lines and 6 of the real one, and the order of publication as the kernel saw it."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import pytest
import storekit
from conftest import TESTS, Featx
from storekit import begin, check_published, digests_of, index_of, names_of, provenance, rows_of
from warm import Started, shared

from featx import _files
from featx.extraction.lanes import _AHEAD
from featx.store import writer as store_writer
from featx.store.index import Refused
from featx.store.manifest import read_manifest
from featx.store.tools import content_hash, verify
from featx.store.writer import StoreWriter

if TYPE_CHECKING:
    from _typeshed import TraceFunction

pytestmark = pytest.mark.slow

KILLS = 60
REAL_KILLS = 8
SHARD_ROWS = 4


def computed(log: Path) -> int:
    """Rows that the engine gave out."""
    return sum(map(int, log.read_text().split())) if log.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize(("backbones", "kills"), [(("tiny",), KILLS), (("tiny", "wide", "third"), KILLS // 2)])
@pytest.mark.usefixtures("warm")  # before the threads
def test_sixty_kills(backbones: tuple[str, ...], kills: int, tmp_path: Path) -> None:
    source = storekit.png_folders(tmp_path / "photos", 32)
    (source / "ants" / "bad.png").write_bytes(b"no image")  # so that there is a list of refused images
    storekit.extract(source, tmp_path / "whole.featx", backbones=backbones)
    expected = content_hash(tmp_path / "whole.featx")

    def kill_again_and_again(worker: int) -> tuple[int, int, int]:
        """Kill runs on one store; kills that met a living run, runs that came to an end, most rows lost by a kill."""
        store, logs = tmp_path / f"{worker}.featx", tmp_path / f"{worker}.logs"
        logs.mkdir()
        log = logs / "tiny"
        job = {"source": source, "store": store, "log": logs, "shard_rows": SHARD_ROWS, "backbones": backbones}
        rng = random.Random(worker)
        killed = finished = lost = rows = 0
        whole = 0.0
        while killed < kills // 2:
            log.unlink(missing_ok=True)
            started = time.perf_counter()
            process = begin(**job)
            if finished:  # else the run is to the end, and measured
                time.sleep(rng.random() * whole)
                process.kill()
            _, err = process.communicate()
            code = process.returncode
            assert code in (0, -signal.SIGKILL), err
            killed += code != 0
            whole *= 1.03 if code else 0.85  # a busy machine's first run says little of the others
            kept = check_published(store)
            lost = max(lost, computed(log) - (kept - rows))
            rows = kept
            if code == 0:
                whole = whole or time.perf_counter() - started
                finished += 1
                assert content_hash(store) == expected
                assert verify(store) == []
                assert list(store.rglob(".tmp-*")) == []
                shutil.rmtree(store)
                rows = 0
        return killed, finished, lost

    with ThreadPoolExecutor(2) as pool:
        killed, finished, lost = zip(*pool.map(kill_again_and_again, range(2)), strict=True)
    assert sum(killed) >= kills
    assert min(finished) >= (3 if len(backbones) == 1 else 1)
    # A shard, and the batches of 4 that an engine takes while the others and the writer are behind.
    assert 0 < max(lost) <= SHARD_ROWS + 4 * (_AHEAD + 1) * len(backbones)


@pytest.fixture(scope="module")
def photos_to_extract(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return storekit.png_folders(tmp_path_factory.mktemp("real") / "photos", 200)


@pytest.fixture(scope="module")
def uninterrupted_run(photos_to_extract: Path, featx: Featx) -> tuple[str, float]:
    """Content hash of the whole store, and seconds that the command takes."""
    store = photos_to_extract.parent / "whole.featx"
    started = time.perf_counter()
    assert featx("extract", photos_to_extract, "--out", store).code == 0
    return content_hash(store), time.perf_counter() - started


def launch(source: Path, store: Path) -> Started:
    return shared().begin(["extract", str(source), "--out", str(store), "--json"])


def has_taken(store: Path, process: Started) -> bool:
    """Whether the process has the store's lock: then that has its number in it."""
    lock = store / ".lock"
    return lock.exists() and str(process.pid) in lock.read_text()


def wait_for(condition: Callable[[], object], process: Started, seconds: float = 60) -> None:
    """Until the condition holds or the process has ended."""
    until = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.0005)


@pytest.mark.slow
def test_kills_of_the_real_command(
    photos_to_extract: Path, uninterrupted_run: tuple[str, float], tmp_path: Path, featx: Featx
) -> None:
    expected, whole = uninterrupted_run
    store = tmp_path / "s.featx"
    rng = random.Random(1)
    for number in range(REAL_KILLS):
        process = launch(photos_to_extract, store)
        if number % 2:  # about the moment when something is published, which is short
            wait_for(lambda: any(store.glob("shards/*")) or any(store.glob("shards/.tmp*")), process)
            time.sleep(rng.random() * 0.05)
        else:  # once it has the store: a kill among the imports would show nothing
            wait_for(lambda: has_taken(store, process), process)  # noqa: B023 - called at once
            time.sleep(rng.random() * whole / 2)
        process.kill()
        process.communicate()
        check_published(store)
        if (store / "manifest.json").exists() and read_manifest(store).finished:
            assert content_hash(store) == expected
            shutil.rmtree(store)
    assert featx("extract", photos_to_extract, "--out", store).code == 0
    assert content_hash(store) == expected
    assert list(store.rglob(".tmp-*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_real_command(
    number: signal.Signals, photos_to_extract: Path, uninterrupted_run: tuple[str, float], tmp_path: Path, featx: Featx
) -> None:
    expected, whole = uninterrupted_run
    store = tmp_path / "s.featx"
    rng = random.Random(int(number))
    interrupted = 0
    for _ in range(3):
        process = launch(photos_to_extract, store)
        wait_for(lambda: has_taken(store, process), process)  # noqa: B023 - called at once
        time.sleep(rng.random() * whole / 4)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        if process.returncode == -number:  # it came when all was done, and Python was on its way out
            assert json.loads(out)["images"] == 200
            continue
        assert process.returncode in (0, 130), err
        if process.returncode:
            interrupted += 1
            assert "run the same command again" in err.lower()  # "... to go on" once the run itself hears of it
            assert json.loads(out)["exit_code"] == 130
            assert "Traceback" not in err
        check_published(store)
    assert interrupted
    assert featx("extract", photos_to_extract, "--out", store).code == 0
    assert content_hash(store) == expected
    assert list(store.rglob(".tmp-*")) == []


# --- signals at every line of the writer --------------------------------------------------------------------------


def write_in_two_runs(store: Path) -> None:
    """Every way in which the writer changes a store: new, continued, updated, pruned."""
    for first, last in ((0, 12), (4, 16)):
        names = names_of(last - first, first)
        with StoreWriter(store, provenance(), shard_rows=5) as writer:
            try:
                for start in range(0, len(names), 2):
                    fresh = [digest for digest in digests_of(names[start : start + 2]) if writer.lacks(digest)]
                    if fresh:
                        writer.add(fresh, {"tiny": [rows_of(fresh)]})
                writer.finish(index_of(names), [Refused(f"{first}.png", "", "empty", "")], source="by hand")
                writer.prune()
            except KeyboardInterrupt:
                writer.flush()  # as an extraction does
                raise


class At:
    """Sends this process SIGINT at the given line events of the writer's modules (a second one comes 3 lines later)."""

    def __init__(self, *wanted: int) -> None:
        self.wanted, self.count = wanted, 0
        self.events: dict[tuple[str, int], list[int]] = {}
        self._files = {_files.__file__, store_writer.__file__}

    def __enter__(self) -> At:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        if frame.f_code.co_filename not in self._files:
            return None
        if event == "line":
            self.count += 1
            self.events.setdefault((frame.f_code.co_filename, frame.f_lineno), []).append(self.count)
            if self.count in self.wanted:
                signal.raise_signal(signal.SIGINT)
        return self._trace


def interrupt_every_third_line(folder: Path) -> None:
    """Lines, not instants: two thirds of these are in the loops that write bytes. Of a line's turns, any."""
    with At() as counted:
        write_in_two_runs(folder / "whole.featx")
    expected = content_hash(folder / "whole.featx")
    rng = random.Random(0)
    turns = [rng.choice(counted.events[line]) for line in sorted(counted.events)[::3]]
    assert len(turns) > 75
    for turn in turns:
        store = folder / f"{turn}.featx"
        with pytest.raises(KeyboardInterrupt), At(turn, turn + 3):
            write_in_two_runs(store)
        gc.collect()  # a process that goes on after it lets go of what was open (the lock) now or later
        check_published(store) if (store / "shards").exists() else None
        write_in_two_runs(store)
        assert content_hash(store) == expected, turn
        assert verify(store) == [], turn
        shutil.rmtree(store)


@pytest.mark.slow
def test_ctrl_c_at_every_third_line_of_the_writer(tmp_path: Path) -> None:
    """In a process of its own, so that no interrupt meets what other tests have loaded and left running."""
    code = "import pathlib, sys, test_crash; test_crash.interrupt_every_third_line(pathlib.Path(sys.argv[1]))"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- the order of publication -------------------------------------------------------------------------------------

CALL = re.compile(r"^\d+\s+(openat|fsync|rename\w*|unlink\w*)\((.*)\)\s+= (-?\d+)(?:<(.*?)>)?")


def system_calls(trace: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and the paths of each successful call; of fsync, the path of the file."""
    for line in trace.read_text().splitlines():
        found = CALL.match(line)
        if found is None or int(found[3]) < 0:
            continue
        name, arguments = found[1], found[2]
        if name == "fsync":
            yield name, [arguments[arguments.index("<") + 1 : arguments.rindex(">")]]
        else:
            yield name.removesuffix("at2").removesuffix("at"), re.findall(r'"([^"]*)"', arguments)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_order_of_publication_as_the_kernel_saw_it(tmp_path: Path) -> None:
    store = tmp_path / "s.featx"
    code = f"from storekit import *; make_store(Path({str(store)!r}))"
    trace = tmp_path / "trace"
    watched = "trace=openat,fsync,rename,renameat,renameat2,unlink,unlinkat"
    done = subprocess.run(
        ["strace", "-f", "-y", "-s", "4096", "-o", str(trace), "-e", watched, sys.executable, "-c", code],
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
    )
    if "PTRACE_TRACEME" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip("this machine does not allow strace")
    assert done.returncode == 0, done.stderr
    calls = [call for call in system_calls(trace) if any(str(store) in path for path in call[1])]
    renames = [i for i, (name, _) in enumerate(calls) if name == "rename"]
    shards = sorted(path.name for path in (store / "shards").iterdir())
    targets = [Path(calls[i][1][1]).relative_to(store).as_posix() for i in renames]
    # The first manifest; 3 shards and the quarantine, each announced before; the index, the last manifest.
    each = [name for shard in shards for name in ("manifest.json", f"shards/{shard}", "manifest.json")]
    assert targets == ["manifest.json", *each, "manifest.json", "quarantine.jsonl", "index.h5", "manifest.json"]
    for i in renames:
        temp, final = calls[i][1]
        before = calls[:i]
        opened = [k for k, (name, paths) in enumerate(before) if name == "open" and paths[-1] == temp]
        synced = [k for k, (name, paths) in enumerate(before) if name == "fsync" and paths[-1] == temp]
        written = opened[0]
        assert len(synced) == 1 and written < synced[0]
        if final.endswith(".h5"):  # read back after the fsync, before the rename
            assert any(k > synced[0] for k in opened)
        # Nothing of the store is touched between the rename and the fsync of the folder.
        assert calls[i + 1][0] == "open" and calls[i + 2] == ("fsync", [str(Path(final).parent)])
