"""What an interrupted sweep has done already, one line for each draw.

A line is appended and synced when its draw is complete. The first line names the plan (a hash of the embeddings,
labels, duplicates, heads, seed and versions); a journal of another plan is begun anew, and a line cut
short by a crash is done again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from numpy.typing import NDArray

from featx.errors import UsageError
from featx.results import Trial
from featx.splits import Index, Shots

Task = tuple[Shots, int]
Outcome = tuple[list[Trial], Index]

_VERSION = 3


def plan_hash(
    embeddings: NDArray[np.floating],
    labels: NDArray[np.integer],
    groups: Index,
    heads: Sequence[str],
    grids: Sequence[Any],
    random_state: int,
) -> str:
    """Hash of all that a draw's outcome depends on."""
    digest = hashlib.sha256()
    for array in (embeddings, labels, groups):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    digest.update(repr((_VERSION, sklearn.__version__, list(heads), list(grids), random_state)).encode())
    return digest.hexdigest()


class Journal:
    """Append-only file of finished draws.

    Parameters
    ----------
    path : the file; its folder is made.
    plan : of :func:`plan_hash`.

    Raises
    ------
    UsageError
        The file cannot be written.
    """

    def __init__(self, path: Path, plan: str) -> None:
        self.path, self.plan = path, plan
        self.done: dict[Task, Outcome] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
            whole = lines[:-1]  # what follows the last line end was cut short
            if whole and json.loads(whole[0]) == {"plan": plan}:
                for line in whole[1:]:
                    task, outcome = _decode(json.loads(line))
                    self.done[task] = outcome
                self._rewrite(whole)
            else:
                self._rewrite([json.dumps({"plan": plan}).encode()])
        except OSError as error:
            raise UsageError("cannot write the journal", where=path, found=error.strerror) from error

    def _rewrite(self, lines: Sequence[bytes]) -> None:
        part = self.path.with_name(self.path.name + ".tmp")
        part.write_bytes(b"".join(line + b"\n" for line in lines))
        part.replace(self.path)

    def add(self, task: Task, outcome: Outcome) -> None:
        """Keep one finished draw."""
        with self.path.open("ab") as file:
            file.write(json.dumps(_encode(task, outcome)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """The sweep is complete: its journal is of no more use."""
        self.path.unlink(missing_ok=True)


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
