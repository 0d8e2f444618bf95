"""The advice as one HTML page, in the style of the sweep's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from featx.advice import Advice, Cell, Curve, named
from featx.errors import plural
from featx.evaluation import BRACKETS, limits, points
from featx.reports.html import HINT, Images, Thumbnail, bar, document, made

_HEADINGS = {
    "strategy": "Which strategy now",
    "pretraining": "What the pretraining gives",
    "learning curve": "What more images would give",
    "fine-tuning": "When fine-tuning starts to pay",
    "domain": "How far from the pretraining",
    "rule": "The rule of thumb beside it",
    "label next": "What to label next",
    "not measured": "What was not measured",
}


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
    thumbnail : of a row of the store, for the images to label; None where they are not at hand.
    paths : where they are, by id.
    """
    sentences = advice.sentences()
    extra = {
        "strategy": "".join(
            _table(advice, n) for n in sorted({cell.n_shots for cell in advice.cells if cell.difference})
        ),
        "learning curve": "" if advice.curve is None else _curve(advice.curve, advice),
        "domain": _by_class(advice),
        "label next": _next(advice, thumbnail, paths or {}),
    }
    parts = [
        f"<h1>Advice on {escape(title)}</h1>",
        f'<p class="soft">{plural(advice.images, "labelled image")}, {plural(len(advice.class_names), "class")}, '
        f"{_span(advice.counts)} different images each. {BRACKETS}</p>",
        f'<p class="lead">{escape(sentences["strategy"])}</p>',
    ]
    if advice.interrupted:
        parts.append('<p class="warn">This was interrupted: what follows is what had been measured until then.</p>')
    parts += [f'<p class="warn">{escape(note)}</p>' for note in advice.notes]
    for topic, sentence in sentences.items():
        parts.append(f"<h2>{_HEADINGS[topic]}</h2>")
        if topic != "strategy":
            parts.append(f"<p>{escape(sentence)}</p>")
        parts.append(extra.get(topic, ""))
    rows = {"command": command, **{k: v for k, v in provenance.items() if isinstance(v, str | int | float)}}
    rows |= {"seed": advice.random_state, "minutes allowed": f"{advice.minutes:g}", "seconds": f"{advice.seconds:.0f}"}
    return document(f"Advice on {title}", [*parts, "<h2>How this was made</h2>", made(rows)])


def _span(counts: Sequence[int]) -> str:
    return f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(min(counts))


def _table(advice: Advice, n_shots: int) -> str:
    cells = advice.at(n_shots)
    first = next((cell.accuracy.mean for cell in cells if cell.strategy == advice.reference), 0.0)
    rows = "".join(_row(cell, first) for cell in cells)
    return (
        f'<h3>{plural(n_shots, "image")} a class</h3>{HINT}<div class="wide"><table><thead><tr>'
        "<th>strategy</th><th>right %</th><th></th><th>95 % interval</th>"
        "<th>against the first head</th><th>verdict</th>"
        f"<th>draws</th><th>s a draw</th></tr></thead><tbody>{rows}</tbody><caption>Differences to "
        f"{escape(named(advice.reference))}, on the same draws; verdicts hold for all of a table together."
        "</caption></table></div>"
    )


def _row(cell: Cell, reference: float) -> str:
    apart = verdict = ""
    if cell.difference is not None:
        apart = points(cell.difference.interval, beside=(cell.accuracy.mean, reference))
        verdict = cell.difference.verdict
    return (
        f"<tr{' class=tied' if cell.difference is None else ''}><td>{escape(cell.strategy)}</td>"
        f"<td>{100 * cell.accuracy.mean:.1f}</td>{bar(cell.accuracy.mean)}"
        f"<td>{limits(cell.accuracy)}</td><td>{apart}</td><td>{verdict}</td>"
        f"<td>{cell.episodes}</td><td>{cell.seconds:.2f}</td></tr>"
    )


def _curve(curve: Curve, advice: Advice) -> str:
    """Measured points with their intervals, and the fitted curve with its own; dashed beyond the last point."""
    width, height, left, bottom = 720, 360, 56, 72
    last, first = float(curve.shots[-1]), float(curve.shots[0])
    gain = advice.gain
    end = max(last, gain.n_to) if gain is not None and gain.verdict != "cannot tell" else last
    ns = np.geomspace(first, max(end, first * 1.01), 60)
    band = [curve.accuracy(float(n)) for n in ns]
    lowest = min([each.low for each in curve.measured] + [each.low for each in band])
    low = max(0.0, np.floor(10 * lowest) / 10)

    def x(n: float) -> float:
        return float(left + 16 + np.log(n / first) / np.log(ns[-1] / first) * (width - left - 40))

    def y(value: float) -> float:
        return float(20 + (1 - value) / (1 - low + 1e-9) * (height - bottom - 20))

    out = []
    for tick in np.arange(low, 1.001, 0.1):
        out.append(f'<path class="axis" d="M{left} {y(tick):.1f}H{width}"/>')
        out.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{100 * tick:.0f}</text>')
    edges = [f"{x(float(n)):.1f},{y(each.high):.1f}" for n, each in zip(ns, band, strict=True)]
    edges += [f"{x(float(n)):.1f},{y(each.low):.1f}" for n, each in zip(ns[::-1], band[::-1], strict=True)]
    out.append(f'<polygon points="{" ".join(edges)}" fill="var(--best)" fill-opacity=".12"/>')
    line = [(x(float(n)), y(each.mean), float(n)) for n, each in zip(ns, band, strict=True)]
    for inside, dash in ((True, ""), (False, ' stroke-dasharray="5 4"')):
        some = " ".join(f"{a:.1f},{b:.1f}" for a, b, n in line if (n <= last * 1.0001) == inside)
        if some:
            out.append(f'<polyline points="{some}" fill="none" stroke="var(--best)" stroke-width="2"{dash}/>')
    for n, each in zip(curve.shots.tolist(), curve.measured, strict=True):
        out.append(
            f'<path d="M{x(n):.1f} {y(each.low):.1f}V{y(each.high):.1f}" stroke="var(--rival)" stroke-width="2"/>'
        )
        out.append(
            f'<circle cx="{x(n):.1f}" cy="{y(each.mean):.1f}" r="4" fill="var(--rival)"><title>{n} images a class: '
            f"{100 * each.mean:.1f} %</title></circle>"
        )
        out.append(f'<text x="{x(n):.1f}" y="{height - 42}" text-anchor="middle">{n}</text>')
    out.append(f'<text x="{width / 2:.0f}" y="{height - 10}" text-anchor="middle">labelled images of each class</text>')
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="learning curve">{"".join(out)}</svg>'
        "<figcaption>Accuracy in %: dots are measured, on the images that the largest draw leaves over, with 95 % "
        "intervals over draws and images; the line is error = c + a &middot; n<sup>&minus;b</sup>, shaded is its "
        f"interval{'; dashed is what was not measured' if ns[-1] > last * 1.0001 else ''}.</figcaption></figure>"
    )


def _by_class(advice: Advice) -> str:
    if advice.domain is None or len(advice.domain.by_class) > 40:
        return ""
    found = sorted(advice.domain.by_class.items(), key=lambda item: -item[1])
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{value:.1f}</td></tr>" for name, value in found)
    return (
        '<div class="wide small"><table><thead><tr><th>class</th><th>similarity score</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _next(advice: Advice, thumbnail: Thumbnail | None, paths: Mapping[str, str]) -> str:
    if not advice.next_images:
        return ""
    images = Images({each.row: each.id for each in advice.next_images}, thumbnail)
    cards = "".join(
        images.card(
            each.row,
            f"perhaps {escape(each.likeliest)}<br>"
            f'<span class="soft">{100 * each.margin:.0f} % ahead of the next class</span>',
        )
        for each in advice.next_images[:60]
    )
    lines = (
        f'<pre class="list">{escape(chr(10).join(paths.get(each.id, each.id) for each in advice.next_images))}</pre>'
    )
    return f'<div class="cards">{cards}</div><details><summary>List to copy</summary>{lines}</details>'
