"""What people see on a terminal, and what the log of a job without one shows."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featx.errors import UsageError, visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.progress import Progress, TaskID
    from rich.segment import Segment

LOG_SECONDS = 10.0

_UNFOLDED = 10_000
"""Columns; more than any name has."""

_UNSEEN = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What of JSON a terminal would obey: :func:`featx.errors.visible` spells the same of other text."""

PAGE_MARK, MODEL_MARK = b'<meta name="generator" content="featx">', b"bundle.json"
"""What :func:`check_file` knows featx's own pages and models by."""


def say(*lines: str, err: bool = False) -> None:
    """Print lines; what a name has of escapes and line ends is spelt, so that it can neither forge nor hide any."""
    print(*(visible(line, keep="\t") for line in lines), sep="\n", file=sys.stderr if err else sys.stdout, flush=True)


def show(table: RenderableType, *, err: bool = False, least: int = 0, prose: bool = False) -> None:
    """Print a table or another of rich's renderables.

    A terminal that is narrower than ``least`` columns breaks the lines itself: rich would cut digits. Where there is
    no terminal, nothing but ``prose`` is folded: a name in two lines is none for ``grep``.
    """
    console = _console(err=err)
    if prose or console.is_terminal or os.environ.get("COLUMNS"):
        console.width = max(console.width, least)
        console.print(table)
        return
    console.width = max(least, console.measure(table, options=console.options.update(width=_UNFOLDED)).maximum)
    with console.capture() as captured:
        console.print(table)
    print(*map(str.rstrip, captured.get().splitlines()), sep="\n", file=console.file, flush=True)


def print_json(value: dict[str, Any]) -> None:
    """Print the one JSON object of a command."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    # Whatever visible() spells is inside a string here, where JSON has a spelling of its own for it.
    print(re.sub(_UNSEEN, lambda found: f"\\u{ord(found[0]):04x}", text), flush=True)


def _console(*, err: bool) -> Console:
    """A console of rich that shows text as it is: square brackets are no markup, control characters are spelt."""
    from rich.console import Console
    from rich.text import Text

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(visible(text), **{**options, "markup": False, "emoji": False})

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            if isinstance(renderable, Text) and renderable.plain != visible(renderable.plain):
                renderable = renderable.copy()
                renderable.plain = visible(renderable.plain)
            return super().render(renderable, options)

    return Plain(stderr=err)


def check_writable(out: Path) -> None:
    """Say now, not after minutes of work, that nothing can be written there."""
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise UsageError("a file is in the way", where=parent, hint="Choose another folder for the output.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError("no permission to write", where=parent, hint="Choose another folder for the output.")


def check_file(out: Path, mark: bytes, *, example: str) -> None:
    """Say now, not after the work, that a file cannot be written there, or that it would replace someone's own.

    Parameters
    ----------
    mark : what the first or the last KiB of such a file has in it when featx made it; only these are replaced.
    example : a name to suggest.
    """
    if out.is_dir():
        raise UsageError("a folder is in the way", where=out, hint=f"Name a file, such as {example}.")
    if not out.absolute().parent.is_dir():
        raise UsageError("no such folder", where=out.absolute().parent, hint="Make it first, or choose another one.")
    check_writable(out.absolute().parent)
    if not out.exists():
        return
    if not out.is_file():
        raise UsageError("not a regular file", where=out, hint=f"Name a file, such as {example}.")
    try:
        with out.open("rb") as file:
            start = file.read(1024)
            file.seek(max(0, out.stat().st_size - 1024))
            end = file.read(1024)
    except OSError as error:
        raise UsageError(f"cannot be read ({error.strerror}), and would be replaced", where=out) from error
    if start and mark not in start and mark not in end:
        raise UsageError(
            "there is a file of this name already, and featx did not make it", where=out,
            hint=f"Delete it, or choose another name, such as {example}.",
        )  # fmt: skip


class ProgressLine:
    """A bar on stderr; where stderr is a file, a line every ten seconds."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._logged = time.monotonic()
        self._above: RenderableType | None = None
        self._tabled = -LOG_SECONDS

    def __enter__(self) -> ProgressLine:
        if sys.stderr.isatty():
            from rich.console import Group
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            line = self

            class Bar(Progress):
                def get_renderable(self) -> RenderableType:
                    bar = super().get_renderable()
                    return bar if line._above is None else Group(line._above, bar)

            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=_console(err=True),
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int | None = None, what: str = "") -> None:
        """Show that ``done`` of ``total`` are done; None where that is not known yet."""
        what = what or self.what
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(what, total=total)
            self._bar.update(self._task, completed=done, total=total, description=what)
        elif time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            say(f"{what}: {done}" + ("" if total is None else f" of {total}"), err=True)

    def table(self, make: Callable[[], RenderableType]) -> None:
        """Show what is known so far above the bar, in place of what was; in a file again after ten seconds."""
        if self._bar is not None:
            self._above = make()
        elif time.monotonic() - self._tabled >= LOG_SECONDS:
            self._tabled = time.monotonic()
            show(make(), err=True)

    def clear(self) -> None:
        """Take the table away again."""
        self._above = None

    def say(self, sentence: str) -> None:
        """Say what is about to be done."""
        if self._bar is not None:
            self._bar.console.print(sentence, highlight=False)
        else:
            say(sentence, err=True)
