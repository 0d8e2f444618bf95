"""What people see on a terminal, and what the log of a job without one shows."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from featx.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress, TaskID

LOG_SECONDS = 10.0


def say(text: str, *, err: bool = False) -> None:
    """Print one line of text, as it is."""
    print(text, file=sys.stderr if err else sys.stdout, flush=True)


def show(table: RenderableType, *, err: bool = False) -> None:
    """Print a table or another of rich's renderables."""
    from rich.console import Console

    Console(stderr=err).print(table)


def print_json(value: dict[str, Any]) -> None:
    """Print the one JSON object of a command."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)


def check_writable(out: Path) -> None:
    """Say now, not after minutes of work, that nothing can be written there."""
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise UsageError("a file is in the way", where=parent, hint="Choose another folder for the output.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError("no permission to write", where=parent, hint="Choose another folder for the output.")


class ProgressLine:
    """A bar on stderr; where stderr is a file, a line every ten seconds."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._logged = time.monotonic()

    def __enter__(self) -> ProgressLine:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int, what: str = "") -> None:
        """Show that ``done`` of ``total`` are done."""
        self._show(what or self.what, done, total)

    def count(self, done: int) -> None:
        """Show that ``done`` are done, of a number that is not known yet."""
        self._show(self.what, done, None)

    def say(self, sentence: str) -> None:
        """Say what is about to be done."""
        if self._bar is not None:
            self._bar.console.print(sentence, markup=False, highlight=False)
        else:
            say(sentence, err=True)

    def _show(self, what: str, done: int, total: int | None) -> None:
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(what, total=total)
            self._bar.update(self._task, completed=done, total=total, description=what)
        elif time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            say(f"{what}: {done}" + ("" if total is None else f" of {total}"), err=True)
