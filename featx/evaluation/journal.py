"""What an interrupted sweep has done already, one line for each draw.

A line is appended and synced when its draw is complete. It starts with a sha256 of itself together with the plan (a
hash of the embeddings, labels, duplicates, heads, seed and versions), and only lines that match are believed: the
draws of all others, damaged or cut short by a crash, are done again. The first line names the plan; a journal
of another plan is begun anew.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from numpy.typing import NDArray

from featx._arrays import Index
from featx._files import publish_bytes
from featx.errors import UsageError
from featx.evaluation.results import Trial
from featx.evaluation.splits import Shots

Task = tuple[Shots, int]
"""A draw: n_shots and episode."""

Outcome = tuple[list[Trial], Index]
"""What came of it: a trial of each head, and the rows of the query."""

_VERSION = 5


def plan_hash(
    embeddings: NDArray[np.floating],
    labels: NDArray[np.integer],
    groups: Index,
    settings: Sequence[Any],
    random_state: int,
) -> str:
    """Hash of all that a draw's outcome depends on; of the settings by their repr."""
    digest = hashlib.sha256()
    for array in (embeddings, labels, groups):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    digest.update(repr((_VERSION, sklearn.__version__, list(settings), random_state)).encode())
    return digest.hexdigest()


class Journal:
    """Append-only file of finished draws.

    Parameters
    ----------
    path : the file; its folder is made.
    plan : of :func:`plan_hash`.

    Attributes
    ----------
    done : the draws that are finished.
    notes : sentences on what could not be used.

    Raises
    ------
    FeatxError
        The file cannot be read or written.
    """

    def __init__(self, path: Path, plan: str) -> None:
        self.path, self.plan = path, plan
        self.done: dict[Task, Outcome] = {}
        self.notes: list[str] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise self._refused(error) from error
        header, *lines = content.removesuffix(b"\n").split(b"\n")
        whole = []
        for line in lines if content.endswith(b"\n") else lines[:-1]:
            row = _opened(line, plan)
            if row is not None:
                task, outcome = _decode(row)
                self.done[task] = outcome
                whole.append(line)
        kept = b"".join(line + b"\n" for line in (_sealed({"plan": plan}, plan), *whole))
        if content == kept:
            return
        if content and (whole or not _of_a_plan(header)):
            self.notes = [f"{path} had damaged lines, or one cut short: their draws were made again."]
        publish_bytes(path, kept)

    def _refused(self, error: OSError) -> UsageError:
        return UsageError(
            "cannot write the journal", where=self.path, found=error.strerror,
            hint="Free some space and run the same command again: it goes on from the finished draws.",
        )  # fmt: skip

    def add(self, task: Task, outcome: Outcome) -> None:
        """Keep one finished draw."""
        try:
            with self.path.open("ab") as file:
                file.write(_sealed(_encode(task, outcome), self.plan) + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        """The sweep is complete: its journal is of no more use."""
        self.path.unlink(missing_ok=True)


def _sealed(row: dict[str, Any], plan: str) -> bytes:
    data = json.dumps(row).encode()
    return hashlib.sha256(plan.encode() + data).hexdigest().encode() + b" " + data


def _opened(line: bytes, plan: str) -> dict[str, Any] | None:
    """What :func:`_sealed` was given; None for a line that is damaged or of another plan."""
    seal, _, data = line.partition(b" ")
    if seal != hashlib.sha256(plan.encode() + data).hexdigest().encode():
        return None
    row: dict[str, Any] = json.loads(data)
    return row


def _of_a_plan(header: bytes) -> bool:
    """Whether a first line is intact, of whatever plan."""
    named = re.search(rb'"plan": "([0-9a-f]{64})"', header)
    return named is not None and _opened(header, named[1].decode()) is not None


def _encode(task: Task, outcome: Outcome) -> dict[str, Any]:
    trials, query = outcome
    return {"task": list(task), "query": _pack(query), "trials": [_trial(trial) for trial in trials]}


def _trial(trial: Trial) -> dict[str, Any]:
    row = {name: getattr(trial, name) for name in trial.__dataclass_fields__}
    row["params"] = dict(trial.params)
    row["predictions"] = _pack(trial.predictions)
    row["confidences"] = None if trial.confidences is None else _pack(trial.confidences)
    return row


def _decode(line: dict[str, Any]) -> tuple[Task, Outcome]:
    trials = []
    for row in line["trials"]:
        row["predictions"] = _unpack(row["predictions"])
        row["confidences"] = None if row["confidences"] is None else _unpack(row["confidences"])
        trials.append(Trial(**row))
    n_shots, episode = line["task"]
    return (n_shots, episode), (trials, _unpack(line["query"]))


def _pack(array: NDArray[Any]) -> list[str]:
    return [array.dtype.str, base64.b64encode(array.tobytes()).decode()]


def _unpack(pair: list[str]) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(pair[1]), dtype=np.dtype(pair[0]))
