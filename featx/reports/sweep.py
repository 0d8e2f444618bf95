"""What people read of a sweep: a table for the terminal, CSV and JSON for machines, a figure.

Numbers come from :class:`featx.evaluation.results.SweepResult`; nothing is computed here that is not shown there.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from featx.advice import LabelRanking
from featx.errors import UsageError, plural
from featx.evaluation import BRACKETS, SweepResult, limits, percent, shown_gap
from featx.reports.html import Thumbnail, classes_among, images_a_class, ranked, render_page, rival

if TYPE_CHECKING:
    from matplotlib.figure import Figure


TABLE_WIDTH = 76
"""Columns of a terminal that the table needs with all its digits."""


def render_table(result: SweepResult) -> Table:
    """Ranked table: one section for each n_shots, 95 % intervals, ``=`` where the best is not better for sure."""
    table = Table(
        title=", ".join(
            [
                plural(len(result.labels), "image"),
                plural(len(result.class_names), "class"),
                plural(result.episodes, "draw"),
            ]
        ),
        caption="= no clear difference from the best. ECE: confidence against accuracy, points.",
        caption_justify="left",
        box=box.HORIZONTALS,  # without upright lines, and one space for each: it has to fit 80 columns
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("shots", no_wrap=True)
    table.add_column("head", no_wrap=not any("@" in head for head in result.heads))
    table.add_column("", no_wrap=True)
    for name in ("right %", "95 % interval", "balanced", "ECE", "fit s"):
        table.add_column(name, justify="right", no_wrap=True)
    for n_shots in result.shots:
        for each in ranked(result, n_shots):
            best = each.rank == 1
            table.add_row(
                Text(str(n_shots) if best else ""),
                Text(each.head.replace("@", " @"), style="bold" if each.tied else ""),  # where a line may end
                Text("" if best else "=" if each.tied else ""),
                Text(f"{100 * each.accuracy.mean:.1f}", style="bold" if each.tied else ""),
                limits(each.accuracy),
                f"{100 * each.balanced_accuracy.mean:.1f}",
                "" if each.ece is None else f"{100 * each.ece:.1f}",
                f"{each.fit_seconds:.2f}",
                end_section=each.rank == len(result.heads),
            )
    return table


def render(result: SweepResult) -> Group:
    """The table, the conclusion and the notes, for a rich console."""
    baseline = f"Guessing the most common class: {100 * result.majority_baseline:.1f} %. {BRACKETS}"
    notes = [Text(note, style="yellow") for note in (*result.notes, result.duplicates.sentence) if note]
    return Group(render_table(result), Text(conclusion(result), style="bold"), Text(baseline), *notes)


def conclusion(result: SweepResult) -> str:
    """What to do, in words: which head, how good it is with the most images, and what would help more."""
    n_shots = result.shots[-1]
    rows = ranked(result, n_shots)
    own = next(each for each in rows if each.head == result.winner)
    where = images_a_class(n_shots)
    among = classes_among(result, n_shots)
    if own.accuracy.high - own.accuracy.low > 2 * TOO_WIDE:
        return (
            f"There are too few photos to tell which head is best. The highest mean is that of {own.head}: right in "
            f"{percent(own.accuracy)} with {where}{among}. Add images to every class, ask for more draws with "
            "--episodes, and sweep again."
        )
    parts = [f"Use {own.head}: right in {percent(own.accuracy)} with {where}{among}."]
    others = [each for each in rows if each is not own]
    if others:
        over = " over all numbers of images" if len(result.shots) > 1 else ""
        parts.append(f"Its mean accuracy{over} is the highest of {plural(len(result.heads), 'head')} here.")
    # Fewer classes are easier: only where they are the same is a difference owed to the images.
    if len(result.shots) > 1 and result.compared(result.shots[-2]) == result.compared(n_shots):
        before = next(r for r in result.results if r.head == own.head and r.n_shots == result.shots[-2])
        gain = own.accuracy.mean - before.accuracy.mean
        if gain >= _WORTH and gain > max([each.accuracy.mean - own.accuracy.mean for each in others] or [0.0]):
            first = result.shots[-2] if n_shots != "all" else images_a_class(result.shots[-2])
            more = f"{100 * shown_gap(own.accuracy.mean, before.accuracy.mean):.1f} points from {first} to {where}"
            parts.append(f"More images help{' more than another head' if others else ''}: {more}.")
    tied = [each.head for each in others if result.cannot_tell(own.head, each.head, n_shots)]
    worse = [each.head for each in others if each.head not in tied and each.accuracy.mean < own.accuracy.mean]
    better = [each.head for each in others if each.head not in tied and each.accuracy.mean >= own.accuracy.mean]
    if better:
        parts.append(f"With {where}, {_and(better)} {'is' if len(better) == 1 else 'are'} better.")
    if tied:
        parts.append(f"No clear difference between {_and([own.head, *tied])}.")
    if worse:
        parts.append(f"{own.head} beats {_and(worse)}.")
    return " ".join(parts)


TOO_WIDE = 0.15
"""Half the width of an interval beyond which no head is recommended: 70 % might then as well be 55 or 85 %."""

_WORTH = 0.01
"""A gain in accuracy that is worth a sentence."""


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def write_report(
    result: SweepResult,
    out_dir: str | Path,
    *,
    title: str,
    provenance: Mapping[str, Any] | None = None,
    command: str = "",
    ids: Sequence[str] | None = None,
    thumbnail: Thumbnail | None = None,
    labels: LabelRanking | None = None,
) -> Path:
    """Write ``report.html``, ``trials.csv``, ``summary.json`` and ``accuracy_vs_shots.png`` into a folder.

    Equal sweeps give equal ``trials.csv``: how long each trial took is in ``times.csv``.

    Parameters
    ----------
    result : of :func:`featx.evaluation.sweep.sweep_heads`.
    out_dir : made if it is not there; files of an earlier report are replaced.
    title : what was swept, for the figure.
    provenance : of the embeddings; goes into the summary as it is.
    command : the command line that made this, for the page.
    ids : names of all rows of the sweep's input; by default their numbers.
    thumbnail : small JPEG or PNG of an input row, or None where the image is not at hand.
    labels : which labels to check, where they were ranked; its rows are those of the sweep's input.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    UsageError
        The folder cannot be written.
    """
    folder = Path(out_dir)
    summary = {"title": title, "provenance": dict(provenance or {}), **result.to_json()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "trials.csv", _csv([trial.row() for trial in result.trials]))
        _write(folder / "times.csv", _csv([trial.times() for trial in result.trials]))
        _write(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
        page = render_page(
            result, title=title, sentence=conclusion(result), provenance=provenance or {}, command=command,
            ids=ids, thumbnail=thumbnail, labels=labels,
        )  # fmt: skip
        _write(folder / "report.html", page)
        picture = folder / "accuracy_vs_shots.tmp.png"
        draw_accuracy(result, title=title).savefig(picture, dpi=150)
        picture.replace(folder / "accuracy_vs_shots.png")
    except OSError as error:
        hint = "Choose another folder with --out."
        raise UsageError("cannot write the report", where=folder, found=error.strerror, hint=hint) from error
    return folder


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a report that is being read never shows half a file."""
    part = path.with_name(path.name + ".tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)  # noqa: PTH105 (the two-argument form reads as what it does)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Empty cells where a row has no such column."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = _Lines()
    writer = csv.DictWriter(lines, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return "".join(lines)


class _Lines(list[str]):
    def write(self, text: str) -> int:
        self.append(text)
        return len(text)


_BEST, _RIVAL, _REST = "#0072B2", "#D55E00", "#AAB1BA"
_MARKS = "osD^vPX"


def draw_accuracy(result: SweepResult, *, title: str) -> Figure:
    """Accuracy against images a class, with 95 % bands and the majority baseline."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(result.shots))
    for i, head in enumerate(result.heads):
        rows = [each for each in result.results if each.head == head]
        colour = {result.winner: _BEST, rival(result): _RIVAL}.get(head, _REST)
        front = 2 if colour == _REST else 3
        means = [100 * each.accuracy.mean for each in rows]
        low, high = ([100 * getattr(each.accuracy, end) for each in rows] for end in ("low", "high"))
        axes.plot(places, means, color=colour, marker=_MARKS[i % len(_MARKS)], label=head, zorder=front)
        if colour != _REST:
            axes.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.axhline(100 * result.majority_baseline, color="#777777", linestyle=":", label="most common class")
    axes.set_xticks(
        list(places),
        ["all but\na fifth" if n == "all" else f"{n}{'*' if classes_among(result, n) else ''}" for n in result.shots],
    )
    axes.set_xlabel("labelled images a class")
    axes.set_ylabel("accuracy on the others, %")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    return figure
