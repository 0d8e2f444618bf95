"""The advice as one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from featx.advice import Advice, Curve, named
from featx.errors import plural
from featx.evaluation import BRACKETS, points
from featx.reports.chart import Series, accuracy_chart
from featx.reports.page import Facts, Images, Thumbnail, render_template

_HEADINGS = {
    "strategy": "Which strategy now",
    "features": "What other features are worth",
    "pretraining": "What the pretraining gives",
    "new group": "What to expect of a group never seen",
    "learning curve": "What more images would give",
    "fine-tuning": "When fine-tuning starts to pay",
    "domain": "How far from the pretraining",
    "rule": "The rule of thumb beside it",
    "shortcuts": "Does the head look at the right places",
    "label next": "What to label next",
    "not measured": "What was not measured",
}

_MOST_NEXT = 60
"""Images to label next that are shown; the list to copy has all."""

_MOST_CLASSES = 40


def render_advice(
    advice: Advice,
    *,
    title: str,
    provenance: Mapping[str, Any],
    command: str,
    thumbnail: Thumbnail | None = None,
    paths: Mapping[str, str] | None = None,
) -> str:
    """The whole page as text: one file that loads nothing.

    Parameters
    ----------
    advice : of :func:`featx.advice.advise`.
    title : what it is on.
    provenance : of the embeddings.
    command : the command line that made it.
    thumbnail : of a row of the store, for the images to label; None where they are not at hand.
    paths : where they are, by id.
    """
    facts = {"command": command, **provenance, "seed": advice.random_state}
    facts |= {"minutes allowed": f"{advice.minutes:g}", "seconds": f"{advice.seconds:.0f}"}
    images = Images({each.row: each.id for each in advice.next_images}, thumbnail)
    counts = f"{plural(advice.images, 'labelled image')}, {plural(len(advice.class_names), 'class')}"
    return render_template(
        "advice.html",
        title=f"Advice on {title}",
        counts=f"{counts}, {_span(advice.counts)} different images each.",
        brackets=BRACKETS,
        advice=advice,
        sentences=advice.sentences(),
        headings=_HEADINGS,
        reference=named(advice.reference),
        tables=[
            (plural(n_shots, "image"), _table(advice, n_shots))
            for n_shots in sorted({cell.n_shots for cell in advice.cells if cell.difference})
        ],
        curve=None if advice.curve is None else _curve(advice.curve, advice),
        by_class=_by_class(advice),
        next_images=[
            images.card(each.row, likeliest=each.likeliest, ahead=f"{100 * each.margin:.0f}")
            for each in advice.next_images[:_MOST_NEXT]
        ],
        next_list="\n".join((paths or {}).get(each.id, each.id) for each in advice.next_images),
        facts=Facts.of(facts),
    )


def _span(counts: Sequence[int]) -> str:
    return f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(min(counts))


def _table(advice: Advice, n_shots: int) -> list[tuple[Any, str]]:
    """The cells at this number of images, each with its difference to the first head in words."""
    cells = advice.at(n_shots)
    first = next((cell.accuracy.mean for cell in cells if cell.strategy == advice.reference), 0.0)
    apart = [
        "" if cell.difference is None else points(cell.difference.interval, beside=(cell.accuracy.mean, first))
        for cell in cells
    ]
    return list(zip(cells, apart, strict=True))


def _curve(curve: Curve, advice: Advice) -> dict[str, Any]:
    """Measured points with their intervals, and the fitted curve with its own; dashed beyond the last point."""
    first, last = float(curve.shots[0]), float(curve.shots[-1])
    gain = advice.gain
    end = max(last, gain.n_to) if gain is not None and gain.verdict != "cannot tell" else last
    numbers = np.geomspace(first, max(end, first * 1.01), 60)

    def place(n: float) -> float:
        return float(np.log(n / first) / np.log(numbers[-1] / first))

    measured = curve.shots.tolist()
    tips = [
        f"{n} images per class: {100 * value.mean:.1f} %" for n, value in zip(measured, curve.measured, strict=True)
    ]
    fitted = [curve.accuracy(float(n)) for n in numbers]
    chart = accuracy_chart(
        [
            Series([place(n) for n in numbers], fitted, "best", band=True, dashed_from=place(last * 1.0001)),
            Series([place(n) for n in measured], curve.measured, "rival", tips, line=False, bars=True),
        ],
        [(place(n), str(n)) for n in measured],
        label="learning curve",
        across="labelled images of each class",
    )
    return {"chart": chart, "dashed": bool(numbers[-1] > last * 1.0001)}


def _by_class(advice: Advice) -> list[tuple[str, float]]:
    if advice.domain is None or len(advice.domain.by_class) > _MOST_CLASSES:
        return []
    return sorted(advice.domain.by_class.items(), key=lambda item: -item[1])
