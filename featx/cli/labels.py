"""The command that looks for wrong labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featx.cli.options import Jobs, Json, Seed, SourceOption, StoreArgument
from featx.cli.terminal import PAGE_MARK, ProgressLine, check_file, print_json, say, show
from featx.errors import UsageError, plural

if TYPE_CHECKING:
    from rich.table import Table

    from featx.advice import LabelRanking

MOST = 30
"""Images that the terminal lists."""

CSV_COLUMNS = ("id", "label", "suggested", "confidence", "label_confidence", "doubtful")


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(
        epilog="Examples:  featx labels photos.featx --html labels.html  |  featx labels photos.featx --csv labels.csv"
    )(labels)


def labels(
    store: StoreArgument,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a sheet of the doubtful images, as one file.")
    ] = None,
    csv_file: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE.csv", help="Write a table of all images, the most doubtful first."),
    ] = None,
    head: Annotated[str, typer.Option(help="A head that gives probabilities.")] = "auto",
    layer: Annotated[str | None, typer.Option(help="Which of the store's layers. (default: the last)")] = None,
    source: SourceOption = None,
    n_jobs: Jobs = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Find labels that are likely to be wrong.

    Every labelled image is judged by heads that have not learnt from it; those whose label they find least likely come
    first, with the label that they would give.
    """
    import numpy as np

    from featx._files import csv_text, publish_text
    from featx.advice import MISSED, rank_labels
    from featx.evaluation import sites_of
    from featx.heads import open_layers
    from featx.reports import MAX_GROUPS, image_finder, label_sheet

    if csv_file is not None:
        check_file(csv_file, ",".join(CSV_COLUMNS).encode(), example="labels.csv")
    if html is not None:
        check_file(html, PAGE_MARK, example="labels.html")
        find = image_finder(store, source)
    features, _, on = open_layers(store, layer, one=True)
    if len(on) > 1:
        raise UsageError("labels are judged on one layer", where="--layer", found=layer)
    with ProgressLine("judging labels") as line:
        ranking = rank_labels(
            features.embeddings,
            features.labels,
            class_names=features.class_names,
            groups=features.copies,
            ids=features.ids.tolist(),
            head=head,
            near_duplicates=features.near_copies,
            random_state=seed,
            n_jobs=n_jobs,
            progress=line.update,
            sites=sites_of(features, np.arange(len(features))),
        )
    rows = [_row(ranking, i) for i in range(len(ranking))]
    doubtful = [row for row in rows if row["doubtful"]]
    missing = None if html is None else label_sheet(html, store, find, features, ranking)
    if csv_file is not None:
        table = csv_text(CSV_COLUMNS, ({**row, "doubtful": int(row["doubtful"])} for row in rows))
        publish_text(csv_file, table)
    if as_json:
        print_json(
            {
                "images": len(ranking),
                "doubtful": len(doubtful),
                "head": head,
                "layer": features.layer,
                "left_out": list(ranking.left_out),
                "ranking": rows,
            }
        )
    elif doubtful:
        show(_table(doubtful[:MOST]))
    unlabelled = int((features.labels < 0).sum())
    if unlabelled:
        say(f"Note: left out: {plural(unlabelled, 'image')} without a label.", err=True)
    if ranking.left_out:
        say(f"Note: classes of a single image cannot be judged: {', '.join(ranking.left_out)}.", err=True)
    seen = f"{len(doubtful)} of {plural(len(ranking), 'label')} may be wrong"
    look = " Look at the photos before you change them." if doubtful else ""
    say(f"{seen}.{look} {MISSED}", err=as_json)
    if len(doubtful) > MOST and not as_json:
        say(f"The first {MOST} are shown; --csv FILE has all.")
    if html is not None:
        say(f"Sheet: {html}", err=as_json)
        if missing:
            say(f"{plural(missing, 'picture')} could not be shown; the sheet says why in their places.", err=True)
        if len(doubtful) > MAX_GROUPS:
            say(f"It shows the first {MAX_GROUPS}.", err=as_json)
    if csv_file is not None:
        say(f"Table: {csv_file}", err=as_json)


def _row(ranking: LabelRanking, i: int) -> dict[str, Any]:
    return {
        "id": str(ranking.ids[i]),
        "label": ranking.class_names[int(ranking.labels[i])],
        "suggested": ranking.class_names[int(ranking.suggested[i])],
        "confidence": round(float(ranking.confidence[i]), 6),
        "label_confidence": round(float(ranking.label_confidence[i]), 6),
        "doubtful": bool(ranking.doubtful[i]),
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Column, Table

    table = Table(Column("image", overflow="fold"), "label", "suggested", "confidence", box=None)
    for row in rows:
        table.add_row(row["id"], row["label"], row["suggested"], f"{row['confidence']:.2f}")
    return table
