"""The report as one HTML file: no script, nothing loaded from elsewhere, light and dark, phone and desktop."""

from __future__ import annotations

import base64
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from typing import Any, TypeAlias

import numpy as np

from featx.advice import MISSED, LabelRanking
from featx.errors import plural
from featx.evaluation import BRACKETS, HeadResult, Shots, SweepResult, limits

Thumbnail: TypeAlias = Callable[[int], bytes | None]


_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1c1f; --soft: #5d6570; --line: #d9dee5; --fill: 0,114,178;
  --best: #0072b2; --rival: #d55e00; --rest: #aab1ba; --warn: #8a4b00; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --ink: #e8eaed; --soft: #a0a8b3; --line: #343b45;
  --fill: 86,180,233; --best: #56b4e9; --rival: #f08a4b; --rest: #5c6570; --warn: #f0b060; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.2rem 1rem 3rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; } p { margin: .4rem 0; overflow-wrap: anywhere; }
.lead { font-size: 1.1rem; font-weight: 600; }
.soft, figcaption, caption { color: var(--soft); font-size: .88rem; } .warn { color: var(--warn); }
caption { text-align: left; caption-side: bottom; padding-top: .3rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { color: var(--soft); font-weight: 500; }
tr.tied td:first-child { font-weight: 600; }
td.bar { width: 22%; min-width: 5rem; } td.bar span { display: block; height: .7rem; border-radius: .2rem;
  background: rgba(var(--fill),.55); }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--soft); } summary h3 { display: inline; }
pre.list { user-select: all; margin: .5rem 0; padding: .6rem; border: 1px solid var(--line); border-radius: .4rem;
  overflow-x: auto; font: .82rem/1.5 ui-monospace, monospace; }
.hint { display: none; } .confusion { width: auto; }
.confusion td { text-align: center; min-width: 2.6rem; padding: .25rem; border: 1px solid var(--line); }
.confusion thead th:not(:first-child) { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left;
  vertical-align: middle; padding: .3rem .1rem; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font: 13px system-ui, sans-serif; }
svg .axis { stroke: var(--line); } figure { margin: 0; } .small { max-width: 26rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.6rem, 1fr)); gap: .8rem; }
.card { border: 1px solid var(--line); border-radius: .4rem; padding: .5rem; font-size: .85rem;
  overflow-wrap: anywhere; }
.card img { width: 100%; height: 7rem; object-fit: cover; border-radius: .25rem; display: block;
  margin-bottom: .3rem; }
code { font-family: ui-monospace, monospace; font-size: .88rem; overflow-wrap: anywhere; }
.legend span { display: inline-block; margin-right: 1rem; font-size: .88rem; }
.legend em { display: inline-block; width: .8rem; height: .8rem; border-radius: 50%; margin-right: .35rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0; } dd { margin: 0;
  overflow-wrap: anywhere; } dt { color: var(--soft); }
@media (max-width: 40rem) {
  th, td { padding-right: .45rem; font-size: .84rem; } td { line-height: 1.3; }
  svg text { font-size: 24px; } .small svg text { font-size: 13px; } .hint { display: block; }
  .wide { position: relative; border-right: 1px dashed var(--line); } caption { white-space: normal; max-width: 20rem; }
  .wide th:first-child, .wide td:first-child { position: sticky; left: 0; background: var(--page); z-index: 1;
    box-shadow: 4px 0 4px -4px var(--line); max-width: 9rem; overflow-wrap: break-word; white-space: normal; }
  .confusion td { min-width: 1.75rem; padding: .2rem .1rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; } }
"""


_FIRST = 6
"""Photos in sight before the rest folds away: a row of a desktop's page."""

_MOST_SUSPECTS = 24
"""Photos that are shown; the list to copy has all."""


def render_page(
    result: SweepResult,
    *,
    title: str,
    sentence: str,
    provenance: Mapping[str, Any],
    command: str,
    ids: Sequence[str] | None,
    thumbnail: Thumbnail | None,
    labels: LabelRanking | None,
) -> str:
    """The whole page as text; the arguments are those of :func:`featx.reports.sweep.write_report`."""
    n_shots = result.shots[-1]
    images = Images(ids, thumbnail)
    first, stop, rest = sentence.partition(". ")
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{plural(len(result.labels), "image")}, {plural(len(result.class_names), "class")}, '
        f"{plural(result.episodes, 'draw')}. Guessing the most common class: "
        f"{_points(result.majority_baseline)} %. {BRACKETS}</p>",
        f'<p class="lead">{escape(first + stop.strip())}</p><p>{escape(rest)}</p>',
        *(f'<p class="warn">{escape(note)}</p>' for note in result.notes),
        *_suspects(labels, images),
        "<h2>Accuracy against images a class</h2>",
        _curves(result),
        "<h2>Heads, ranked</h2>",
        *(_ranking(result, n) for n in result.shots[::-1]),
        f"<h2>What {escape(result.winner)} confuses</h2>",
        _confusion(result, n_shots),
        _reliability(result, n_shots),
        *_duplicates(result, images),
        "<h2>How this was made</h2>",
        _made(result, provenance, command),
    ]
    return document(title, parts)


def document(title: str, parts: Sequence[str], style: str = "") -> str:
    """A whole page of these parts (which are HTML), in the one style of all of featx's reports, and one's own."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="generator" content="featx">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


@dataclass(frozen=True)
class Images:
    """Names and small pictures of images by row."""

    ids: Sequence[str] | Mapping[int, str] | None
    thumbnail: Thumbnail | None

    def name(self, row: int) -> str:
        """The image's id, or its place."""
        return str(self.ids[row]) if self.ids is not None else f"row {row}"

    def card(self, row: int, text: str) -> str:
        """A picture, if it is at hand, above its name and ``text`` (which is HTML)."""
        name = self.name(row)
        data = self.thumbnail(row) if self.thumbnail else None
        picture = ""
        if data:
            kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
            code = base64.b64encode(data).decode()
            picture = f'<img alt="{escape(name)}" src="data:image/{kind};base64,{code}">'
        return f'<div class="card">{picture}<code>{breakable(name)}</code><br>{text}</div>'


def breakable(name: str) -> str:
    """A file's name as HTML, whose lines may end after what divides it: not within a word, where there is a choice."""
    return re.sub(r"([/_.-]+)(?=.)", r"\1<wbr>", escape(name))


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def images_a_class(n_shots: Shots) -> str:
    """How many images of each class the support has, in words."""
    if n_shots == "all":
        return "all but a fifth of the images"
    return f"{plural(n_shots, 'image')} a class"


def classes_among(result: SweepResult, n_shots: Shots) -> str:
    """Of how many classes a size is, in words, where it is not of all; else ""."""
    compared = len(result.compared(n_shots))
    return "" if compared == len(result.class_names) else f", among {compared} of {len(result.class_names)} classes"


def ranked(result: SweepResult, n_shots: Shots) -> list[HeadResult]:
    """Results at one n_shots, best first."""
    return sorted((each for each in result.results if each.n_shots == n_shots), key=lambda each: each.rank)


def _ranking(result: SweepResult, n_shots: Shots) -> str:
    rows = []
    for each in ranked(result, n_shots):
        mark = "" if each.rank == 1 or not each.tied else " ="
        params = ", ".join(f"{name} {value:g}" if isinstance(value, float) else str(value)
                           for name, value in each.params.items())  # fmt: skip
        rows.append(
            f"<tr{' class=tied' if each.tied else ''}><td>{escape(each.head)}{mark}</td>"
            f"<td>{_points(each.accuracy.mean)}</td>{bar(each.accuracy.mean)}"
            f"<td>{limits(each.accuracy)}</td>"
            f"<td>{_points(each.balanced_accuracy.mean)}</td><td>{'' if each.ece is None else _points(each.ece)}</td>"
            f"<td>{'' if each.brier is None else f'{each.brier:.3f}'}</td><td>{escape(params)}</td>"
            f"<td>{each.fit_seconds:.2f}</td></tr>"
        )
    caption = "= no clear difference from the best. ECE: how far confidence is from accuracy, in points."
    table = (
        f'{HINT}<div class="wide"><table><thead><tr><th>head</th><th>right %</th><th></th><th>95 % interval</th>'
        "<th>balanced</th><th>ECE</th><th>Brier</th><th>chosen most often</th><th>fit s</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div><p class=soft>{caption}</p>"
    )
    # The most images first: that is what one has. The rest is there for who asks.
    state = " open" if n_shots == result.shots[-1] else ""
    words = images_a_class(n_shots) + classes_among(result, n_shots)
    return f"<details{state}><summary><h3>{words[:1].upper()}{words[1:]}</h3></summary>{table}</details>"


HINT = '<p class="soft hint">Scroll the table sideways for more &rarr;</p>'


def bar(share: float) -> str:
    """A cell with a bar, to stand beside its number."""
    return f'<td class="bar"><span style="width:{100 * share:.1f}%"></span></td>'


def rival(result: SweepResult) -> str | None:
    """The head to see beside the winner: the best other one with the most images."""
    return next((each.head for each in ranked(result, result.shots[-1]) if each.head != result.winner), None)


def _curves(result: SweepResult) -> str:
    width, height, left, bottom = 720, 360, 56, 44
    results = result.results
    floor = min([each.accuracy.low for each in results] + [result.majority_baseline])
    low = max(0.0, np.floor(10 * floor) / 10)

    def x(i: int) -> float:
        return left + 20 + i * (width - left - 40) / max(len(result.shots) - 1, 1)

    def y(value: float) -> float:
        return float(20 + (1 - value) / (1 - low + 1e-9) * (height - bottom - 20))

    out = []
    for tick in np.arange(low, 1.001, 0.1):
        out.append(f'<path class="axis" d="M{left} {y(tick):.1f}H{width}"/>')
        out.append(f'<text x="{left - 8}" y="{y(tick) + 5:.1f}" text-anchor="end">{100 * tick:.0f}</text>')
    fewer = [n_shots for n_shots in result.shots if classes_among(result, n_shots)]
    for i, n_shots in enumerate(result.shots):
        mark = "*" if n_shots in fewer else ""
        out.append(f'<text x="{x(i):.1f}" y="{height - 10}" text-anchor="middle">{n_shots}{mark}</text>')
    base = y(result.majority_baseline)
    out.append(f'<path d="M{left} {base:.1f}H{width}" stroke="#888" stroke-dasharray="2 4"/>')
    names = {result.winner: "best", rival(result): "rival"}
    rest = [head for head in result.heads if head not in names]
    for head in [*rest, *(head for head in list(names)[::-1] if head is not None)]:  # what matters is drawn on top
        role = names.get(head, "rest")
        own = [each for each in results if each.head == head]
        line = [f"{x(i):.1f},{y(each.accuracy.mean):.1f}" for i, each in enumerate(own)]
        if role != "rest":
            upper = [f"{x(i):.1f},{y(each.accuracy.high):.1f}" for i, each in enumerate(own)]
            lower = [f"{x(i):.1f},{y(each.accuracy.low):.1f}" for i, each in enumerate(own)]
            out.append(f'<polygon points="{" ".join(upper + lower[::-1])}" fill="var(--{role})" fill-opacity=".1"/>')
        out.append(
            f'<polyline points="{" ".join(line)}" fill="none" stroke="var(--{role})" '
            f'stroke-width="{1.5 if role == "rest" else 2.5}"/>'
        )
        for i, each in enumerate(own):
            tip = f"{head}, {images_a_class(each.n_shots)}: {_points(each.accuracy.mean)} %"
            out.append(
                f'<circle cx="{x(i):.1f}" cy="{y(each.accuracy.mean):.1f}" r="{3 if role == "rest" else 4}" '
                f'fill="var(--{role})"><title>{escape(tip)}</title></circle>'
            )
    legend = [(role, head) for head, role in names.items() if head is not None]
    legend += [("rest", ", ".join(rest))] if rest else []
    keys = "".join(f'<span><em style="background:var(--{role})"></em>{escape(text)}</span>' for role, text in legend)
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="accuracy against images a class">'
        f'{"".join(out)}</svg><p class="legend">{keys}</p><figcaption>Across: labelled images a class. '
        "Up: accuracy in % on the other images, with 95 % intervals. Dotted: guessing the most common "
        f"class.{' *: among fewer classes, so not to be compared with the others.' if fewer else ''}"
        "</figcaption></figure>"
    )


def _confusion(result: SweepResult, n_shots: Shots) -> str:
    counts = result.confusion(result.winner, n_shots)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names, judged = result.class_names, [bool(row.any()) for row in counts]
    off = [(float(shares[i, j]), i, j) for i in range(len(names)) for j in range(len(names)) if i != j and shares[i, j]]
    worst = [f"{escape(names[i])} as {escape(names[j])} {_points(s)} %" for s, i, j in sorted(off, reverse=True)[:5]]
    text = f"<p>With {images_a_class(n_shots)}. Most confused: {'; '.join(worst)}.</p>" if worst else "<p>Nothing.</p>"
    if len(names) > 30:
        return text + '<p class="soft">More than 30 classes: the matrix is left out.</p>'
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = "".join(
        f"<tr><td>{escape(names[i])}</td>"
        + "".join(
            f'<td style="background:rgba(var(--fill),{0.75 * s:.3f})">{f"{100 * s:.0f}" if judged[i] else "-"}</td>'
            for s in shares[i]
        )
        + "</tr>"
        for i in range(len(names))
    )
    return (
        f'{text}{HINT if len(names) > 6 else ""}<div class="wide">'
        f'<table class="confusion"><thead><tr><th>true</th>{head}</tr></thead><tbody>{rows}'
        "</tbody><caption>Rows are true classes, columns what they were named, in % of the row.</caption></table></div>"
    )


def _reliability(result: SweepResult, n_shots: Shots) -> str:
    for head in [result.winner, *(each.head for each in ranked(result, n_shots))]:
        bins = result.reliability(head, n_shots)
        if bins:
            break
    else:
        return '<p class="soft">None of these heads gives probabilities.</p>'
    most = max(count for _, _, count in bins)
    points = "".join(
        f'<circle cx="{40 + 250 * sure:.1f}" cy="{270 - 250 * hit:.1f}" r="{3 + 9 * (count / most) ** 0.5:.1f}" '
        f'fill="var(--best)" fill-opacity=".7"><title>said {_points(sure)} %, right {_points(hit)} %, {count} '
        "times</title></circle>"
        for sure, hit, count in bins
    )
    ticks = "".join(
        f'<text x="{40 + 250 * t:.0f}" y="288" text-anchor="middle">{100 * t:.0f}</text>'
        f'<text x="34" y="{274 - 250 * t:.0f}" text-anchor="end">{100 * t:.0f}</text>'
        for t in (0.0, 0.5, 1.0)
    )
    return (
        f'<h3>Can its probabilities be believed? ({escape(head)})</h3><figure class="small"><svg viewBox="0 0 310 300" '
        'role="img" aria-label="reliability diagram"><path class="axis" d="M40 20V270H290" fill="none"/>'
        f'<path d="M40 270L290 20" stroke="#888" stroke-dasharray="2 4"/>{ticks}{points}</svg>'
        "<figcaption>Across: what it said, %. Up: how often it was right, %. The dotted line "
        "is honest; larger dots are more images."
        "</figcaption></figure>"
    )


def _suspects(labels: LabelRanking | None, images: Images) -> list[str]:
    if labels is None or not labels.doubtful.any():
        return []
    names, doubtful = labels.class_names, np.flatnonzero(labels.doubtful).tolist()
    found = [
        (int(labels.rows[i]), names[labels.labels[i]], names[labels.suggested[i]], float(labels.confidence[i]))
        for i in doubtful
    ]
    cards = [
        images.card(
            row,
            f"{escape(label)} &rarr; <strong>{escape(suggested)}</strong><br>"
            f'<span class="soft">confidence {100 * confidence:.0f}&nbsp;%</span>',
        )
        for row, label, suggested, confidence in found[:_MOST_SUSPECTS]
    ]
    lines = "\n".join(f"{images.name(row)}\t{label}\t{better}\t{sure:.2f}" for row, label, better, sure in found)
    shown = f'<div class="cards">{"".join(cards[:_FIRST])}</div>'
    if cards[_FIRST:]:
        more = f"{len(cards) - _FIRST} more"
        shown += f'<details><summary>Show {more}</summary><div class="cards">{"".join(cards[_FIRST:])}</div></details>'
    return [
        "<h2>Labels to check</h2>",
        f"<p>{plural(len(found), 'photo')} may be mislabelled. The arrow points from the present label to the "
        "one suggested by models that have not seen the photo; confidence is the probability that they give it. "
        f"{MISSED} featx labels ranks all photos.</p>",
        shown,
        "<details><summary>List to copy: file, label, suggested label, confidence</summary>"
        f'<pre class="list">{escape(lines)}</pre></details>',
    ]


def _duplicates(result: SweepResult, images: Images) -> list[str]:
    found = result.duplicates
    if not found.n_groups:
        return []
    sizes = np.bincount(found.groups)
    cards = []
    for group in np.flatnonzero(sizes > 1)[:12]:
        rows = np.flatnonzero(found.groups == group)
        for row in rows[:4]:
            cards.append(images.card(int(result.rows[row]), escape(result.class_names[result.labels[row]])))
    return [
        "<h2>Duplicates</h2>",
        f'<p>{escape(found.sentence)}</p><p class="soft">The first of them:</p>',
        f'<div class="cards">{"".join(cards)}</div>',
    ]


def _made(result: SweepResult, provenance: Mapping[str, Any], command: str) -> str:
    rows: dict[str, Any] = {"command": command} if command else {}
    rows |= {name: value for name, value in provenance.items() if isinstance(value, str | int | float)}
    rows |= {f"version of {name}": version(name) for name in ("featx", "scikit-learn", "numpy", "scipy")}
    rows |= {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "seed": result.random_state,
        "seconds": f"{result.seconds:.1f}",
    }
    return made(rows)


_FIRST_FACTS = ("command", "backbone", "seed", "seconds", "minutes allowed")


def made(rows: Mapping[str, Any]) -> str:
    """How a page was made: what people ask for first; versions, hashes and the like fold away."""

    def cells(first: bool) -> str:
        return "".join(
            f"<dt>{escape(str(k))}</dt><dd><code>{escape(str(v))}</code></dd>"
            for k, v in rows.items()
            if (k in _FIRST_FACTS) == first
        )

    rest = f"<details><summary>Versions, settings and hashes</summary><dl>{cells(False)}</dl></details>"
    return f"<dl>{cells(True)}</dl>{rest}"
