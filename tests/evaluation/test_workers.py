"""Parallel workers of the real command: they end with it, leave nothing that the next start does not remove, and
what they cannot hold is one sentence."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
from conftest import Featx
from storekit import digests_of, index_of, names_of, provenance

from featx.store.writer import StoreWriter

pytestmark = pytest.mark.slow

ROWS = 2400
"""Half of them, labelled and for training, have 2.5 MB: joblib hands arrays over 1 MB to workers in files."""

SWEEP = ("--heads", "logreg,knn", "--shots", "5,20", "--episodes", "12", "--n-jobs", "2", "--json")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("workers") / "s.featx"
    names = names_of(ROWS)
    rng = np.random.default_rng(0)
    rows = np.maximum(rng.normal(size=(ROWS, 512)), 0).astype(np.float32)
    rows[::2, :20] += 0.3
    with StoreWriter(path, provenance()) as writer:
        writer.add(digests_of(names), {"tiny": [rows]})
        writer.finish(index_of(names), (), source="by hand")
    return path


def command(store: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "featx", "sweep", str(store), "--out", str(out), *SWEEP]


def numbers(text: str) -> Any:
    """What a sweep printed, without what depends on the time or the place."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: plain(inner) for key, inner in value.items() if key not in {"seconds", "fit_seconds", "report"}
            }
        return [plain(inner) for inner in value] if isinstance(value, list) else value

    return plain(json.loads(text))


def of_session(number: int) -> list[psutil.Process]:
    alive = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == number and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return alive


def wait_for(what: Any, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)


def killed(store: Path, out: Path, arrays: Path, *, all_of_them: bool) -> int:
    """Start a sweep, kill it (-9) in the middle, alone or with all its children; its session."""
    with subprocess.Popen(
        command(store, out),
        env={**os.environ, "JOBLIB_TEMP_FOLDER": str(arrays)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as sweep:
        journal = out / "journal.jsonl"
        try:
            wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 5, 60)
            # The first draws are made before there are workers: two, that read the embeddings from a file.
            wait_for(lambda: len(of_session(sweep.pid)) >= 3 and bool(list(arrays.rglob("*.pkl"))), 60)
        finally:
            (os.killpg if all_of_them else os.kill)(sweep.pid, signal.SIGKILL)
    assert sweep.returncode == -signal.SIGKILL
    return sweep.pid


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The numbers of two sweeps at once: the first to end leaves the other's folder alone."""
    folder = tmp_path_factory.mktemp("both")
    environment = {**os.environ, "JOBLIB_TEMP_FOLDER": str(folder / "arrays")}
    both = [
        subprocess.Popen(command(store, folder / name), env=environment, stdout=subprocess.PIPE, stderr=sys.stderr)
        for name in ("a", "b")
    ]
    first, second = (numbers(process.communicate(timeout=120)[0].decode()) for process in both)
    assert first == second
    assert list((folder / "arrays").iterdir()) == []
    return first


@pytest.mark.slow
def test_workers_end_with_a_killed_sweep_and_the_next_removes_their_arrays(
    store: Path, undisturbed: Any, tmp_path: Path
) -> None:
    arrays = tmp_path / "arrays"
    session = killed(store, tmp_path / "out", arrays, all_of_them=False)
    wait_for(lambda: not of_session(session), 5)
    killed(store, tmp_path / "other", arrays, all_of_them=True)
    assert list(arrays.rglob("*.pkl"))  # nobody was left to remove them
    resumed = subprocess.run(
        command(store, tmp_path / "out"),
        env={**os.environ, "JOBLIB_TEMP_FOLDER": str(arrays)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert list(arrays.iterdir()) == []
    assert numbers(resumed.stdout) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("way", ["limit", "mount"])
def test_a_folder_without_room_is_one_sentence_and_the_sweep_goes_on_later(
    store: Path, featx: Featx, tmp_path: Path, way: str
) -> None:
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    mounted = (
        way == "mount"
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "none", arrays], capture_output=True, check=False
        ).returncode
    )
    if way == "mount" and not mounted:
        pytest.skip("no file system may be mounted here")
    limit = 10**6 if way == "limit" else resource.RLIM_INFINITY
    try:
        done = subprocess.run(
            command(store, tmp_path / "out"),
            env={**os.environ, "JOBLIB_TEMP_FOLDER": str(arrays)},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        if mounted:
            subprocess.run(["umount", arrays], check=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    sentence = " ".join(done.stderr.split())
    assert "arrays: no room for the arrays that parallel workers share: found " in sentence
    assert "Set JOBLIB_TEMP_FOLDER to a folder with more room" in sentence
    again = featx("sweep", store, "--out", tmp_path / "out", *SWEEP)
    assert again.code == 0
