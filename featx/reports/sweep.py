"""What people read of a sweep: a table for the terminal, CSV and JSON for machines, a figure.

Numbers come from :class:`featx.evaluation.results.SweepResult`; nothing is computed here that is not shown there.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from featx._arrays import PIXELS
from featx._files import csv_text, publish, publish_text
from featx.advice import MISSED, LabelRanking
from featx.errors import StoreError, UsageError, plural
from featx.evaluation import BRACKETS, Forecast, HeadResult, Interval, Shots, SweepResult, limits, percent, shown_gap
from featx.reports.chart import Series, accuracy_chart
from featx.reports.heat import LEGEND
from featx.reports.page import Evidence, Facts, Images, Thumbnail, render_template

if TYPE_CHECKING:
    from matplotlib.figure import Figure


TABLE_WIDTH = 76
"""Columns of a terminal that the table needs with all its digits."""


def images_per_class(n_shots: Shots) -> str:
    """How many images of each class the support has, in words."""
    if n_shots == "all":
        return "all but a fifth of the images"
    return f"{plural(n_shots, 'image')} per class"


def classes_among(result: SweepResult, n_shots: Shots) -> str:
    """Of how many classes a size is, in words, where it is not of all; else ""."""
    compared = len(result.compared(n_shots))
    return "" if compared == len(result.class_names) else f", among {compared} of {len(result.class_names)} classes"


def ranked(result: SweepResult, n_shots: Shots) -> list[HeadResult]:
    """Results at one n_shots, best first."""
    return sorted((each for each in result.results if each.n_shots == n_shots), key=lambda each: each.rank)


def rival(result: SweepResult) -> str | None:
    """The head to see beside the winner: the best other one with the most images."""
    return next((each.head for each in ranked(result, result.shots[-1]) if each.head != result.winner), None)


def _table(title: str, caption: str | None = None, *, narrow: bool = True) -> Table:
    """A table without upright lines and, where it has to fit 80 columns, with one space for each."""
    return Table(
        title=title, caption=caption, caption_justify="left", box=box.HORIZONTALS, show_edge=False, pad_edge=False,
        collapse_padding=narrow,
    )  # fmt: skip


def render_table(result: SweepResult) -> Table:
    """Ranked table: one section for each n_shots, 95 % intervals, ``=`` where the best is not better for sure."""
    table = _table(_counts(result), "= no clear difference from the best. ECE: confidence against accuracy, points.")
    table.add_column("shots", no_wrap=True)
    table.add_column("head", no_wrap=not any("@" in head for head in result.heads))
    table.add_column("", no_wrap=True)
    for name in ("accuracy", "95 % interval", "balanced", "ECE", "fit s"):
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


def render_provisional(result: SweepResult) -> Table:
    """Heads by their mean accuracy so far, one column for each n_shots: few lines, to be drawn again and again."""
    of = "" if result.sites is None else f"photos of a new {result.group_name}, "
    table = _table(f"{of}provisional: {len(result.queries)} of {plural(result.planned, 'draw')}, accuracy, %")
    table.add_column("per class", no_wrap=True)
    for n_shots in result.shots:
        table.add_column(str(n_shots), justify="right", no_wrap=True)
    for head in sorted(result.heads, key=result.mean_accuracy, reverse=True):
        means = (np.mean([trial.accuracy for trial in result.of(head, n_shots)]) for n_shots in result.shots)
        table.add_row(head, *(f"{100 * mean:.1f}" for mean in means))
    table.add_row("draws", *(str(result.draws(n_shots)) for n_shots in result.shots))
    return table


def render_features(result: SweepResult) -> Table | None:
    """Accuracy by features and number of images, with one head for all; None where there is nothing to compare."""
    rows = feature_rows(result)
    if len(rows) < 2:
        return None
    title = f"features, with {rows[0].head.partition('@')[0]}: accuracy, %"
    table = _table(title, "= no clear difference from the best.", narrow=False)
    table.add_column("features", overflow="fold")
    for n_shots in result.shots:
        table.add_column(f"{n_shots}" if n_shots == "all" else f"{n_shots} per class", justify="right", no_wrap=True)
    for row in rows:
        cells = [f"{100 * each.mean:.1f}{' =' if tied else '  '}" for each, tied in row.cells]
        table.add_row(Text(row.title, style="" if row.features != PIXELS else "dim"), *cells)
    return table


@dataclass(frozen=True)
class FeatureRow:
    """One set of features, judged with one head.

    Attributes
    ----------
    cells : accuracy at each number of images, and whether the best features are not better for sure.
    """

    features: str
    head: str
    cells: tuple[tuple[Interval, bool], ...]

    @property
    def title(self) -> str:
        """What it is called, for people."""
        return NO_NETWORK if self.features == PIXELS else self.features


NO_NETWORK = "raw pixels, no network"
"""What the pixels baseline is called in tables."""


def feature_rows(result: SweepResult) -> list[FeatureRow]:
    """The features of a sweep, best first; the pixels baseline last."""
    heads = result.by_features
    best = next(iter(heads.values()), "")
    rows = []
    for features, head in heads.items():
        cells = []
        for n_shots in result.shots:
            if features == PIXELS:
                cells.append((result.pixels_accuracy(n_shots), False))
                continue
            found = next(each for each in result.results if (each.head, each.n_shots) == (head, n_shots))
            cells.append((found.accuracy, head != best and result.cannot_tell(best, head, n_shots)))
        rows.append(FeatureRow(features, head, tuple(cells)))
    return rows


def features_sentence(result: SweepResult) -> str:
    """Which features to take, in words; "" where there was no choice."""
    rows = [row for row in feature_rows(result) if row.features != PIXELS]
    if len(rows) < 2:
        return ""
    n_shots, best = result.shots[-1], rows[0]
    tied = [row.title for row in rows[1:] if row.cells[-1][1]]
    also = f" No clear difference with {images_per_class(n_shots)} from {_and(tied)}." if tied else ""
    return f"Best features: {best.title}, {percent(best.cells[-1][0])} with {images_per_class(n_shots)}.{also}"


def worth_sentence(result: SweepResult) -> str:
    """What the network is worth over raw pixels, in words; "" where that was not judged."""
    if not result.baseline:
        return ""
    middle = result.baseline[len(result.baseline) // 2]
    gap, where = middle.difference.interval, images_per_class(middle.n_shots)
    interval = f"95 % interval {100 * gap.low:.1f} to {100 * gap.high:.1f}"
    if middle.difference.verdict == "better":
        return f"Over raw pixels the network is worth {100 * gap.mean:.1f} points with {where} ({interval})."
    if middle.difference.verdict == "worse":
        return (
            f"Raw pixels without any network are {-100 * gap.mean:.1f} points better than {middle.a} with {where}: "
            "these images are unlike those that the network was trained on."
        )
    return (
        f"No clear difference between the network and raw pixels with {where} "
        f"({100 * gap.mean:+.1f} points, {interval})."
    )


def _counts(result: SweepResult) -> str:
    return (
        f"{plural(len(result.labels), 'image')}, {plural(len(result.class_names), 'class')}, "
        f"{plural(result.episodes, 'draw')}"
    )


Across: TypeAlias = tuple[SweepResult, Forecast]
"""What a sweep across groups found, beside the ordinary one."""


def across_sentence(result: SweepResult, across: Across) -> str:
    """How good the winner is on new photos, and on photos of a new group, in words."""
    both = [n_shots for n_shots in result.shots if n_shots in across[0].shots]
    if not both:
        return f"Photos of a new {across[0].group_name}: not compared at any of these numbers of images."
    n_shots, name = both[-1], across[0].group_name
    own, other = (
        next(each for each in found.results if (each.head, each.n_shots) == (result.winner, n_shots))
        for found in (result, across[0])
    )
    return (
        f"{result.winner} with {images_per_class(n_shots)}: new photos: {percent(own.accuracy)}; "
        f"photos of a new {name}: {percent(other.accuracy)}."
    )


def across_rows(result: SweepResult, across: Across) -> list[tuple[Shots, str, Interval, Interval]]:
    """Accuracy of each head at each number of images on new photos, and on photos of a new group; best first there."""
    ordinary = {(each.head, each.n_shots): each.accuracy for each in result.results}
    return [
        (n_shots, each.head, ordinary[each.head, n_shots], each.accuracy)
        for n_shots in across[0].shots
        for each in ranked(across[0], n_shots)
        if (each.head, n_shots) in ordinary
    ]


def render_across(result: SweepResult, across: Across) -> Table:
    """Both comparisons side by side."""
    name = across[0].group_name
    table = _table(
        f"new photos, and photos of a new {name}: accuracy, %",
        f"Intervals on the right are over {plural(2, name).partition(' ')[2]}, not over photos.",
    )
    table.add_column("shots", no_wrap=True)
    table.add_column("head", overflow="fold")
    for column in ("new photos", "95 % interval", f"new {name}", "95 % interval"):
        table.add_column(column, justify="right")
    before: Shots | None = None
    for n_shots, head, own, other in across_rows(result, across):
        cells = [f"{100 * own.mean:.1f}", limits(own), f"{100 * other.mean:.1f}", limits(other)]
        table.add_row("" if n_shots == before else str(n_shots), head.replace("@", " @"), *cells)
        before = n_shots
    return table


def render(result: SweepResult, across: Across | None = None) -> Group:
    """The table, the conclusion and the notes, for a rich console."""
    baseline = f"Guessing the most common class: {100 * result.majority_baseline:.1f} %. {BRACKETS}"
    notes = [
        Text(note, style="yellow")
        for note in (result.missing_sentence, *result.notes, result.duplicates.sentence)
        if note
    ]
    features, lead = render_features(result), features_sentence(result)
    parts: list[Table | Text] = [] if features is None else [features, Text("")]
    parts += [render_table(result), *([Text(lead, style="bold")] if lead else [])]
    parts += [Text(conclusion(result), style="bold"), Text(" ".join(filter(None, [worth_sentence(result), baseline])))]
    if across is not None:
        parts += [Text(""), render_across(result, across), Text(across_sentence(result, across), style="bold")]
        parts += [Text(across[1].sentence)]
        own = [note for note in (across[0].missing_sentence, *across[0].notes) if note and note not in result.notes]
        notes += [Text(f"Across groups: {note}", style="yellow") for note in own]
    return Group(*parts, *notes)


def conclusion(result: SweepResult) -> str:
    """What to do, in words: which head, how good it is with the most images, and what would help more."""
    n_shots = result.shots[-1]
    rows = ranked(result, n_shots)
    own = next(each for each in rows if each.head == result.winner)
    where = images_per_class(n_shots)
    among = classes_among(result, n_shots)
    if own.accuracy.high - own.accuracy.low > 2 * TOO_WIDE:
        return (
            f"There are too few photos to tell which head is best. The highest mean is that of {own.head}: accuracy "
            f"{percent(own.accuracy)} with {where}{among}. Add images to every class, ask for more draws with "
            "--episodes, and sweep again."
        )
    parts = [f"Use {own.head}: accuracy {percent(own.accuracy)} with {where}{among}."]
    others = [each for each in rows if each is not own]
    if others:
        over = " over all numbers of images" if len(result.shots) > 1 else ""
        parts.append(f"Its mean accuracy{over} is the highest of {plural(len(result.heads), 'head')} here.")
    # Fewer classes are easier: only where they are the same is a difference owed to the images.
    if len(result.shots) > 1 and result.compared(result.shots[-2]) == result.compared(n_shots):
        before = next(r for r in result.results if r.head == own.head and r.n_shots == result.shots[-2])
        gain = own.accuracy.mean - before.accuracy.mean
        if gain >= _WORTH and gain > max([each.accuracy.mean - own.accuracy.mean for each in others] or [0.0]):
            first = result.shots[-2] if n_shots != "all" else images_per_class(result.shots[-2])
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
    evidence: Evidence | None = None,
    across: Across | None = None,
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
    evidence : shows which places of photos speak for two classes; without it, confused photos are not shown.
    across : the same comparison across groups, and the forecast for a new one, where they were asked for.

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
    if across is not None:
        summary["across"] = {**across[0].to_json(), "forecast": across[1].to_json()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        texts = {
            "trials.csv": _csv([trial.row() for trial in result.trials]),
            "times.csv": _csv([trial.times() for trial in result.trials]),
            "summary.json": json.dumps(summary, indent=2, allow_nan=False) + "\n",
        }
        texts["report.html"] = render_page(
            result, title=title, provenance=provenance or {}, command=command, ids=ids, thumbnail=thumbnail,
            labels=labels, evidence=evidence, across=across,
        )  # fmt: skip
        for name, text in texts.items():
            publish_text(folder / name, text)
        figure = draw_accuracy(result, title=title)
        publish(folder / "accuracy_vs_shots.png", lambda temp: figure.savefig(temp, dpi=150, format="png"))
    except (OSError, StoreError) as error:
        found = error.what if isinstance(error, StoreError) else error.strerror
        hint = "Choose another folder with --out."
        raise UsageError("cannot write the report", where=folder, found=found, hint=hint) from error
    return folder


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Empty cells where a row has no such column."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return csv_text(columns, rows)


# --- the page -----------------------------------------------------------------------------------------------------


_FIRST = 6
"""Photos in sight before the rest folds away: a row of a desktop's page."""

_MOST_SUSPECTS = 24
"""Photos that are shown; the list to copy has all."""

EXPLAINED = 12
"""Confused photos, and as many suspicious ones, whose evidence is shown where it is asked for."""

_MOST_CLASSES = 30
"""More of them make a matrix that nobody reads."""

_GROUPS, _OF_A_GROUP = 12, 4
"""Groups of duplicates that are shown, and images of each."""


def render_page(
    result: SweepResult,
    *,
    title: str,
    provenance: Mapping[str, Any],
    command: str,
    ids: Sequence[str] | None,
    thumbnail: Thumbnail | None,
    labels: LabelRanking | None,
    evidence: Evidence | None = None,
    across: Across | None = None,
) -> str:
    """The whole page as text; the arguments are those of :func:`write_report`."""
    images = Images(ids, thumbnail)
    confused = [] if evidence is None else _confused(result)
    found = _doubtful(labels)
    why = {} if evidence is None else evidence([*confused, *(each[:3] for each in found[:EXPLAINED])])
    first, stop, rest = conclusion(result).partition(". ")
    facts: dict[str, Any] = {"command": command} if command else {}
    facts |= dict(provenance)
    facts |= {f"version of {name}": version(name) for name in ("featx", "scikit-learn", "numpy", "scipy")}
    facts |= {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "seed": result.random_state,
        "seconds": f"{result.seconds:.1f}",
    }
    return render_template(
        "sweep.html",
        title=title,
        counts=_counts(result),
        baseline=result.majority_baseline,
        brackets=BRACKETS,
        sentence={"lead": features_sentence(result), "first": first + stop.strip(), "rest": rest},
        features=feature_rows(result),
        shots=result.shots,
        worth=worth_sentence(result),
        notes=result.notes,
        across=None if across is None else _across(result, across),
        suspects=_suspects(found, images, why),
        legend=LEGEND if why else "",
        confused=[images.card(row, label=label, named=named, why=why.get(row)) for row, label, named in confused],
        unexplained=evidence is not None and not why,
        curves=_curves(result),
        ranking=[
            {"title": (images_per_class(n) + classes_among(result, n)).capitalize(), "rows": ranked(result, n)}
            for n in result.shots[::-1]
        ],
        winner=result.winner,
        recognised=_recognised(result),
        confusion=_confusion(result),
        reliability=_reliability(result),
        duplicates=_duplicates(result, images),
        facts=Facts.of(facts),
    )


def _curves(result: SweepResult) -> dict[str, Any]:
    names = {result.winner: "best", rival(result): "rival"}
    rest = [head for head in result.heads if head not in names]
    places = {n_shots: i / max(len(result.shots) - 1, 1) for i, n_shots in enumerate(result.shots)}
    series = []
    for head in [*rest, *(head for head in list(names)[::-1] if head is not None)]:
        role = names.get(head, "rest")
        own = [each for each in result.results if each.head == head]
        tips = [f"{head}, {images_per_class(each.n_shots)}: {100 * each.accuracy.mean:.1f} %" for each in own]
        at, values = [places[each.n_shots] for each in own], [each.accuracy for each in own]
        series.append(Series(at, values, role, tips, band=role != "rest"))
    if result.pixels:
        values = [result.pixels_accuracy(n_shots) for n_shots in result.shots]
        tips = [f"{NO_NETWORK}: {100 * each.mean:.1f} %" for each in values]
        series.insert(0, Series(list(places.values()), values, "soft", tips, dashed_from=-1.0))
    fewer = {n_shots for n_shots in result.shots if classes_among(result, n_shots)}
    chart = accuracy_chart(
        series,
        [(place, f"{n_shots}{'*' if n_shots in fewer else ''}") for n_shots, place in places.items()],
        label="accuracy against images per class",
        baseline=result.majority_baseline,
    )
    legend = [(role, head) for head, role in names.items() if head is not None]
    legend += [("rest", ", ".join(rest))] if rest else []
    legend += [("soft", NO_NETWORK)] if result.pixels else []
    return {"chart": chart, "legend": legend, "fewer": fewer}


def _recognised(result: SweepResult) -> dict[str, Any]:
    """Recall of each class with the most images, the least recognised first."""
    n_shots = result.shots[-1]
    images = dict(zip(result.class_names, np.bincount(result.labels).tolist(), strict=True))
    found = sorted(result.recall(result.winner, n_shots).items(), key=lambda item: item[1].mean)
    own = next(each for each in result.results if (each.head, each.n_shots) == (result.winner, n_shots))
    rows = [(name, images[name], share) for name, share in found]
    return {"where": images_per_class(n_shots), "macro_f1": own.macro_f1, "rows": rows}


def _across(result: SweepResult, across: Across) -> dict[str, Any]:
    found, forecast = across
    return {
        "name": found.group_name,
        "sentence": across_sentence(result, across),
        "rows": across_rows(result, across),
        "notes": [note for note in (found.missing_sentence, *found.notes) if note and note not in result.notes],
        "forecast": forecast.sentence,
        "left_out": sorted(forecast.left_out, key=lambda each: each.accuracy),
        "method": forecast.method,
    }


def _confusion(result: SweepResult) -> dict[str, Any]:
    n_shots = result.shots[-1]
    counts = result.confusion(result.winner, n_shots)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = result.class_names
    off = [(float(shares[i, j]), i, j) for i, j in product(range(len(names)), repeat=2) if i != j and shares[i, j]]
    rows = [(name, bool(counts[i].any()), shares[i].tolist()) for i, name in enumerate(names)]
    return {
        "where": images_per_class(n_shots),
        "worst": [(names[i], names[j], value) for value, i, j in sorted(off, reverse=True)[:5]],
        "names": names,
        "rows": rows if len(names) <= _MOST_CLASSES else None,
    }


def _reliability(result: SweepResult) -> dict[str, Any] | None:
    n_shots = result.shots[-1]
    for head in [result.winner, *(each.head for each in ranked(result, n_shots))]:
        bins = result.reliability(head, n_shots)
        if bins:
            return {"head": head, "bins": bins, "most": max(count for _, _, count in bins)}
    return None


def _confused(result: SweepResult) -> list[tuple[int, str, str]]:
    """Rows of the input that the winner most often gets wrong with the most images: label and what it names."""
    votes = result.votes(result.winner, result.shots[-1])
    wrong = votes.copy()
    wrong[np.arange(len(wrong)), result.labels] = 0
    share = wrong.sum(axis=1) / np.maximum(votes.sum(axis=1), 1)
    worst = [row for row in np.argsort(-share, kind="stable")[:EXPLAINED] if share[row] > 0]
    names = result.class_names
    return [(int(result.rows[row]), names[result.labels[row]], names[wrong[row].argmax()]) for row in worst]


def _doubtful(labels: LabelRanking | None) -> list[tuple[int, str, str, float]]:
    """Rows of the input whose labels are doubtful, with label, suggestion and confidence."""
    if labels is None:
        return []
    names = labels.class_names
    return [
        (int(labels.rows[i]), names[labels.labels[i]], names[labels.suggested[i]], float(labels.confidence[i]))
        for i in np.flatnonzero(labels.doubtful).tolist()
    ]


def _suspects(
    found: Sequence[tuple[int, str, str, float]], images: Images, why: Mapping[int, bytes]
) -> dict[str, Any] | None:
    if not found:
        return None
    cards = [
        images.card(row, label=label, suggested=suggested, confidence=f"{100 * confidence:.0f}", why=why.get(row))
        for row, label, suggested, confidence in found[:_MOST_SUSPECTS]
    ]
    return {
        "text": f"{plural(len(found), 'photo')} may be mislabelled. The arrow points from the present label to the one "
        "suggested by models that have not seen the photo; confidence is the probability that they give it. "
        f"{MISSED} featx labels ranks all photos.",
        "first": cards[:_FIRST],
        "more": cards[_FIRST:],
        "list": "\n".join(f"{images.name(row)}\t{label}\t{better}\t{sure:.2f}" for row, label, better, sure in found),
    }


def _duplicates(result: SweepResult, images: Images) -> dict[str, Any] | None:
    found = result.duplicates
    if not found.n_groups:
        return None
    groups = np.flatnonzero(np.bincount(found.groups) > 1)[:_GROUPS]
    shown = [row for group in groups for row in np.flatnonzero(found.groups == group)[:_OF_A_GROUP]]
    cards = [images.card(int(result.rows[row]), label=result.class_names[result.labels[row]]) for row in shown]
    return {"sentence": found.sentence, "cards": cards}


# --- the figure ---------------------------------------------------------------------------------------------------


_BEST, _RIVAL, _REST = "#0072B2", "#D55E00", "#AAB1BA"
_MARKS = "osD^vPX"


def draw_accuracy(result: SweepResult, *, title: str) -> Figure:
    """Accuracy against images per class, with 95 % bands and the majority baseline."""
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
    if result.pixels:
        means = [100 * result.pixels_accuracy(n_shots).mean for n_shots in result.shots]
        axes.plot(places, means, color="#777777", linestyle="--", label=NO_NETWORK, zorder=1)
    axes.axhline(100 * result.majority_baseline, color="#777777", linestyle=":", label="most common class")
    axes.set_xticks(
        list(places),
        ["all but\na fifth" if n == "all" else f"{n}{'*' if classes_among(result, n) else ''}" for n in result.shots],
    )
    axes.set_xlabel("labelled images per class")
    axes.set_ylabel("accuracy on the others, %")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    return figure
