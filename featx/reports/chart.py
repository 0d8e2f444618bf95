"""Accuracy as a line chart in SVG, in the colours of the page that it stands on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from featx.evaluation import Interval

if TYPE_CHECKING:
    from markupsafe import Markup

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 360, 56, 44, 20


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Parameters
    ----------
    at : places from 0 (left) to 1 (right).
    values : the accuracy at each, with its interval.
    role : colour of the page's style: "best", "rival" or "rest".
    tips : what each dot says of itself; without, there are no dots.
    line : whether the dots are joined.
    band, bars : how intervals are drawn, if at all.
    dashed_from : place from which on the line is dashed.
    """

    at: Sequence[float]
    values: Sequence[Interval]
    role: str
    tips: Sequence[str] = ()
    line: bool = True
    band: bool = False
    bars: bool = False
    dashed_from: float = 1.0


def accuracy_chart(
    series: Sequence[Series],
    ticks: Sequence[tuple[float, str]],
    *,
    label: str,
    baseline: float | None = None,
    across: str = "",
) -> Markup:
    """The chart.

    Parameters
    ----------
    series : those that matter last: they are drawn on top.
    ticks : places and texts on the axis below.
    label : what the chart is, for those who do not see it.
    baseline : an accuracy that is drawn as a dotted line.
    across : name of the axis below.
    """
    from markupsafe import Markup, escape

    height = HEIGHT + (28 if across else 0)
    floor = min(each.low for one in series for each in one.values)
    low = max(0.0, np.floor(10 * min(floor, 1.0 if baseline is None else baseline)) / 10)

    def x(place: float) -> float:
        return LEFT + 20 + place * (WIDTH - LEFT - 40)

    def y(value: float) -> float:
        return float(TOP + (1 - value) / (1 - low + 1e-9) * (HEIGHT - BOTTOM - TOP))

    def points(places: Sequence[float], values: Sequence[float]) -> str:
        return " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in zip(places, values, strict=True))

    out = []
    for tick in np.arange(low, 1.001, 0.1):
        out.append(f'<path class="axis" d="M{LEFT} {y(tick):.1f}H{WIDTH}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y(tick) + 5:.1f}" text-anchor="end">{100 * tick:.0f}</text>')
    for place, text in ticks:
        out.append(f'<text x="{x(place):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{escape(text)}</text>')
    if across:
        out.append(f'<text x="{WIDTH / 2:.0f}" y="{height - 10}" text-anchor="middle">{escape(across)}</text>')
    if baseline is not None:
        out.append(f'<path d="M{LEFT} {y(baseline):.1f}H{WIDTH}" stroke="#888" stroke-dasharray="2 4"/>')
    for one in series:
        colour, at = f"var(--{one.role})", list(one.at)
        if one.band:
            edges = points([*at, *at[::-1]], [each.high for each in one.values] + [v.low for v in one.values[::-1]])
            out.append(f'<polygon points="{edges}" fill="{colour}" fill-opacity=".12"/>')
        means = [each.mean for each in one.values]
        within = sum(place <= one.dashed_from + 1e-9 for place in at) if one.line else 0
        width = 1.5 if one.role == "rest" else 2.5
        for start, stop, dash in ((0, within, ""), (max(within - 1, 0), len(at), ' stroke-dasharray="5 4"')):
            if one.line and stop > start and not (dash and within == len(at)):
                line = points(at[start:stop], means[start:stop])
                out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width}"{dash}/>')
        for place, value, tip in zip(at, one.values, one.tips or [""] * len(at), strict=True):
            if one.bars:
                ends = f"M{x(place):.1f} {y(value.low):.1f}V{y(value.high):.1f}"
                out.append(f'<path d="{ends}" stroke="{colour}" stroke-width="2"/>')
            if tip:
                out.append(
                    f'<circle cx="{x(place):.1f}" cy="{y(value.mean):.1f}" r="{3 if one.role == "rest" else 4}" '
                    f'fill="{colour}"><title>{escape(tip)}</title></circle>'
                )
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
    return Markup(f"{head}{''.join(out)}</svg>")
