"""The journal of a sweep that was killed: whatever became of it, the numbers are those of an undisturbed sweep."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TESTS
from sweepkit import PLAN, blobs, sweep

from featx.evaluation.results import SweepResult
from featx.evaluation.sweep import sweep_heads

KILLED = 4
"""Draws that are done when the sweep is killed, of six."""


def numbers(result: SweepResult) -> Any:
    """All that a reader sees of a result, but seconds and notes; and every trial's own numbers."""
    page = result.to_json()
    del page["seconds"], page["notes"]
    for row in page["results"]:
        del row["fit_seconds"]
    trials = [
        [value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(trial).items()
         if name != "fit_seconds"]
        for trial in result.trials
    ]  # fmt: skip
    return json.loads(json.dumps([page, trials]))


@pytest.fixture(scope="module")
def whole() -> SweepResult:
    return sweep()


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What kill -9 leaves."""
    path = tmp_path_factory.mktemp("killed") / "journal.jsonl"
    code = (
        "import os, signal; from pathlib import Path; from sweepkit import sweep\n"
        "def kill(done, total, what):\n"
        f"    if done == {KILLED}: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"sweep(Path({str(path)!r}), kill)"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=TESTS, check=False)
    assert killed.returncode == -signal.SIGKILL
    return path.read_bytes()


def resumed(content: bytes, path: Path) -> tuple[SweepResult, int]:
    """The sweep that goes on from such a journal, and how many draws it took from there."""
    path.write_bytes(content)
    seen: list[int] = []
    result = sweep(path, lambda done, total, what: seen.append(done))
    assert not path.exists()
    return result, seen[0]


@pytest.mark.slow
def test_no_changed_byte_of_a_journal_changes_a_number(journal: bytes, whole: SweepResult, tmp_path: Path) -> None:
    rng = random.Random(0)
    expected = numbers(whole)
    for _ in range(100):
        content = bytearray(journal)
        content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        result, kept = resumed(bytes(content), tmp_path / "j")
        assert numbers(result) == expected
        assert kept >= KILLED - 2  # a changed line end costs two lines at most
        assert [note for note in result.notes if "damaged" in note] == [*result.notes]
        assert len(result.notes) == 1


@pytest.mark.slow
def test_a_line_that_is_cut_short_is_done_again(journal: bytes, whole: SweepResult, tmp_path: Path) -> None:
    result, kept = resumed(journal, tmp_path / "j")
    assert (kept, result.notes) == (KILLED, ())
    last = len(journal) - journal[:-1].rindex(b"\n") - 1
    for cut in (1, 2, 30, 100, last - 1):
        result, kept = resumed(journal[:-cut], tmp_path / "j")
        assert kept == KILLED - 1
        assert numbers(result) == numbers(whole)
        assert "one cut short: their draws were made again" in result.notes[0]


def test_lines_of_another_plan_are_not_believed(journal: bytes, whole: SweepResult, tmp_path: Path) -> None:
    other = tmp_path / "other"

    def stop(done: int, total: int, what: str) -> None:
        if done == KILLED:
            raise KeyboardInterrupt

    rows, labels, names = blobs([10, 10], seed=1)
    with pytest.raises(KeyboardInterrupt):
        sweep_heads(rows, labels, class_names=names, journal=other, progress=stop, **PLAN)
    foreign = other.read_bytes().splitlines(keepends=True)
    own = journal.splitlines(keepends=True)
    result, kept = resumed(b"".join(foreign), tmp_path / "j")
    assert (kept, numbers(result), result.notes) == (0, numbers(whole), ())  # begun anew, as it always was
    result, kept = resumed(b"".join([*own[:3], *foreign[3:]]), tmp_path / "j")
    assert (kept, numbers(result), len(result.notes)) == (2, numbers(whole), 1)


def test_a_journal_without_checksums_is_not_used(journal: bytes, whole: SweepResult, tmp_path: Path) -> None:
    rows = [json.loads(line.partition(b" ")[2]) for line in journal.splitlines()]
    for row in rows[1:]:
        row["trials"][0]["accuracy"] = 0.123
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    result, kept = resumed(content, tmp_path / "j")
    assert (kept, numbers(result)) == (0, numbers(whole))
    assert "had damaged lines" in result.notes[0]
