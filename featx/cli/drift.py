"""The command that says whether photos have changed: drift."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from featx.cli.options import Json
from featx.cli.terminal import print_json, say, show
from featx.errors import UsageError, plural

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from featx.service import Counted

_ROWS = 14
"""Periods of a table, at most: days, or weeks where they are more."""

_CLASSES = 6
"""Columns of a table for classes, at most."""

_DIGITS = 8
"""Of a model's sha256, in what people read."""


Unit = Literal["hour", "day"]
"""What counts once, however many photos it has."""


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(
        epilog="Examples:  featx drift counts  |  featx drift counts --model photos.model --since 2026-11-01  |  "
        "featx drift counts --unit day --json"
    )(drift)


def drift(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of featx serve --counts DIR.")],
    model: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="Of this model only. (default: all that answered)")
    ] = None,
    since: Annotated[
        datetime | None,
        typer.Option(
            formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"],
            metavar="DATE",
            help="Leave out what was before, in UTC. The promise holds for a date chosen before you looked.",
        ),
    ] = None,
    unit: Annotated[
        Unit,
        typer.Option(
            help="What counts once in the test. Use day where the hours of a day differ, as night and day do."
        ),
    ] = "hour",
    as_json: Json = False,
) -> None:
    """Say whether the photos that a service answered have changed from those that its model was fitted on.

    By familiarity, as its model saw it in whole hours (or days) that are over: "changed", "no sign of change", or
    "cannot tell yet". You may look as often as you like: the probability that unchanged photos are ever called
    changed is at most 5 %. Shares of classes, abstentions and unknown photos are shown beside it.
    """
    from featx.models import read_bundle
    from featx.service import read_counts

    kept = read_counts(folder)
    if model is not None:
        sha256 = read_bundle(model).sha256
        kept = [each for each in kept if each.about["model"] == sha256]
        if not kept:
            raise UsageError(
                "this model answered nothing that was counted", where=model, found=f"sha256 {sha256[:_DIGITS]}",
                hint=f"See which did: featx drift {folder}",
            )  # fmt: skip
    found = [_judge(each, since, unit) for each in kept]
    if as_json:
        print_json({"folder": str(folder), "unit": unit, "models": found})
        return
    for place, each in enumerate(found):
        say(*([""] if place else []), *_sentences(each, unit))
        _show_periods(each)


def _judge(counted: Counted, since: datetime | None, unit: Unit) -> dict[str, Any]:
    """What is to be said of one model, in plain types."""
    import numpy as np

    from featx.models import BET_HOURS, find_drift, share_over_units

    about = counted.about
    use = np.ones(len(counted.hours), bool) if since is None else counted.hours >= np.datetime64(since, "h")
    hours, days = counted.hours[use], counted.hours[use].astype("datetime64[D]")
    parts = (counted.photos, counted.unsure, counted.unknown, counted.labels, counted.familiarity)
    rows = np.column_stack([each[use] for each in parts])
    bins = rows.shape[1] - counted.familiarity.shape[1]
    begins, tested = _summed(days if unit == "day" else hours, rows)
    # What is not over would be looked at twice, and not be the same.
    over = begins < np.datetime64(datetime.now(UTC).replace(tzinfo=None), "D" if unit == "day" else "h")
    begins, tested = begins[over], tested[over]
    found = find_drift(
        tested[:, bins:], tested[:, 2], begins.astype(np.int64) // (1 if unit == "day" else BET_HOURS),
        own=about["own"], max_unknown=about["max_unknown"], both_sides=not about["groups"],
    )  # fmt: skip
    if len(np.unique(days)) > _ROWS:
        days = (days - (days.astype(np.int64) + 3) % 7).astype("datetime64[D]")  # weeks; 1970 began with a Thursday
    periods = _summed(days, rows)
    return {
        "name": about["name"],
        "sha256": about["model"],
        "verdict": found.verdict,
        "side": found.side,
        "since": None if found.since is None else _stamp(begins[found.since]),
        "seen": None if found.seen is None else _stamp(begins[found.seen] + 1),
        "evidence": found.evidence,
        "needed": found.needed,
        "least_seen": found.least_seen,
        "units": len(begins),
        "own": about["own"],
        "max_unknown": about["max_unknown"],
        "own_refused": about["own_refused"],
        "unknown_share": share_over_units(rows[:, 2], rows[:, 0]).to_json(),
        "from": _stamp(hours[0]) if len(hours) else None,
        "to": _stamp(hours[-1] + 1) if len(hours) else None,
        **_counts(rows.sum(axis=0), about["class_names"]),
        "periods": [
            {"from": _stamp(begin), **_counts(row, about["class_names"])} for begin, row in zip(*periods, strict=True)
        ],
    }


def _summed(keys: NDArray[np.datetime64], rows: NDArray[np.int64]) -> tuple[NDArray[np.datetime64], NDArray[np.int64]]:
    """The different keys (k,), ascending, and the sums (k, d) of the rows (n, d) of each."""
    import numpy as np

    different, place = np.unique(keys, return_inverse=True)
    sums = np.zeros((len(different), rows.shape[1]), dtype=np.int64)
    np.add.at(sums, place, rows)
    return different, sums


def _counts(row: NDArray[np.int64], class_names: list[str]) -> dict[str, Any]:
    """A row of numbers, by their names."""
    from featx.models import median_of

    photos, unsure, unknown, *rest = row.tolist()
    return {
        "photos": photos,
        "unsure": unsure,
        "unknown": unknown,
        "labels": dict(zip(class_names, rest, strict=False)),
        "familiarity": rest[len(class_names) :],
        "median_familiarity": median_of(row[3 + len(class_names) :]),
    }


def _stamp(moment: np.datetime64) -> str:
    """A day, or a day with its hour, in UTC."""
    text = str(moment)
    return f"{text}:00Z" if "T" in text else text


def _sentences(found: dict[str, Any], unit: Unit) -> list[str]:
    from featx.evaluation import Interval, percent

    lines = [f"{found['name']} ({found['sha256'][:_DIGITS]}): {found['verdict']}{_why(found, unit)}"]
    if not found["photos"]:
        return lines
    lines.append(f"{plural(found['photos'], 'photo')} from {found['from']} to {found['to']}.")
    if found["own"]:
        own = found["own_refused"]
        measured = "" if own is None else f", and {percent(Interval(**own))} of its own that it had not seen"
        lines.append(
            f"Unknown: {percent(Interval(**found['unknown_share']))} of the photos. The model was set to call at "
            f"most {100 * found['max_unknown']:g} % of photos like its own unknown{measured}."
        )
    return lines


def _why(found: dict[str, Any], unit: Unit) -> str:
    """What follows the verdict in its sentence."""
    over = f"{plural(found['units'], unit)} that {'is' if found['units'] == 1 else 'are'} over"
    if not found["own"]:
        return (
            ". This model cannot call photos unknown, so nothing can be compared. Fit it again with --max-unknown 0.05."
        )
    if found["verdict"] == "changed":
        how = {
            "unlike": "More photos are unlike those that it was fitted on than can be by chance",
            "alike": "They are more like those that it was fitted on than these are like each other: as these would "
            "be, sent again",
        }[found["side"]]
        return (
            f", perhaps since {found['since']}. {how}. This was seen by {found['seen']}. Look at some of them; if they "
            "are to be answered, label them and fit the model again."
        )
    least = found["least_seen"]
    if least is None:
        return f". Of {over}, not even a change of all photos would have been seen."
    return f". In {over}, unknown photos in the place of {100 * least:g} % would have been seen."


def _show_periods(found: dict[str, Any]) -> None:
    from rich.table import Table

    if not found["photos"]:
        return
    labels = sorted(found["labels"], key=lambda name: -found["labels"][name])
    shown = labels if len(labels) <= _CLASSES else labels[: _CLASSES - 1]
    titles = ["from", "photos", *shown, *(["other classes"] if len(shown) < len(labels) else []), "unsure", "unknown"]
    table = Table(*titles, "familiarity", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for each in found["periods"][-_ROWS:]:
        named = [each["labels"][name] for name in shown]
        rest = [sum(each["labels"].values()) - sum(named)] if len(shown) < len(labels) else []
        shares = [f"{100 * n / each['photos']:.1f} %" for n in (*named, *rest, each["unsure"], each["unknown"])]
        middle = each["median_familiarity"]
        table.add_row(each["from"], f"{each['photos']:,}", *shares, "-" if middle is None else f"{middle:.2f}")
    show(table, least=24 + 9 * (len(titles) + 1))
