"""The command that hands embeddings on to other programs: export-features."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from featx.cli.model import Json
from featx.cli.terminal import ProgressLine, check_writable, print_json, say
from featx.errors import plural


class TableFormat(StrEnum):
    parquet = "parquet"
    csv = "csv"
    npz = "npz"


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(
        "export-features",
        epilog="Examples:  featx export-features photos.featx --out photos.parquet  |  "
        "featx export-features photos.featx --layer features.10 --out layer.npz",
    )(export_features)


def export_features(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A store, or a file made by featx pack.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to make.")],
    form: Annotated[TableFormat | None, typer.Option("--format", help="(default: by the suffix of --out)")] = None,
    layer: Annotated[str, typer.Option(help="Which of the store's layers.")] = "penultimate",
    as_json: Json = False,
) -> None:
    """Write ids, labels, splits and embeddings as one table: Parquet, CSV or npz.

    A row is an image. Stores larger than memory are fine.
    """
    from featx.store import export_table

    check_writable(out.parent)
    with ProgressLine("writing") as line:
        rows = export_table(store, out, form=form.value if form else None, layer=layer, progress=line.update)
    if as_json:
        print_json({"path": str(out), "rows": rows, "bytes": out.stat().st_size})
    say(f"{out}: {plural(rows, 'row')}, {out.stat().st_size:,} bytes.", err=as_json)
