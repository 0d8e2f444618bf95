"""The commands about a store as it is: info, verify, pack, drop, export-features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from featx.cli.options import Json, Seed, StoreArgument
from featx.cli.terminal import ProgressLine, check_writable, print_json, say, show
from featx.errors import plural


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(epilog="Example:  featx info photos.featx --json")(info)
    app.command(epilog="Examples:  featx verify photos.featx  |  featx verify large.featx --sample 20")(verify)
    app.command(epilog="Example:  featx pack photos.featx photos.h5")(pack)
    app.command(epilog="Example:  featx drop photos.featx efficientnet_lite2")(drop)
    app.command(
        "export-features",
        epilog="Examples:  featx export-features photos.featx --out photos.parquet  |  "
        "featx export-features photos.featx --layer features.10 --out layer.npz",
    )(export_features)


def export_features(
    store: StoreArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to make.")],
    form: Annotated[
        Literal["parquet", "csv", "npz"] | None,
        typer.Option("--format", help="(default: by the suffix of --out)"),
    ] = None,
    layer: Annotated[str, typer.Option(help="Which of the store's layers.")] = "penultimate",
    as_json: Json = False,
) -> None:
    """Write ids, labels, splits and embeddings as one table: Parquet, CSV or npz.

    A row is an image. Stores larger than memory are fine.
    """
    from featx.store import export_table

    check_writable(out.parent)
    with ProgressLine("writing") as line:
        rows = export_table(store, out, form=form, layer=layer, progress=line.update)
    if as_json:
        print_json({"path": str(out), "rows": rows, "bytes": out.stat().st_size})
    say(f"{out}: {plural(rows, 'row')}, {out.stat().st_size:,} bytes.", err=as_json)


def info(store: StoreArgument, as_json: Json = False) -> None:
    """Show what a store holds: images, classes, splits, and how it was made."""
    from featx.store import info as describe

    facts = describe(store)
    if as_json:
        print_json(facts)
        return
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name in facts:
        if name in ("images", "embedding_dim", "provenance") or (name == "groups" and "group_by" not in facts):
            continue
        value = facts[name]
        if name == "backbones":
            for number, (backbone, made) in enumerate(value.items()):
                table.add_row("" if number else name, _backbone(backbone, made))
            continue
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        text = ", ".join(value) if isinstance(value, list) else text
        table.add_row(name, text or "none")
    show(table)


def _backbone(name: str, made: dict[str, Any]) -> str:
    words = [f"{name}: {', '.join(made['layers'])}", f"views {made['views']}", f"{made['precision']}"]
    return "; ".join([*words, *([] if made["finished"] else ["unfinished"])])


def drop(
    store: StoreArgument,
    backbone: Annotated[str, typer.Argument(metavar="BACKBONE", help="One of those that featx info lists.")],
    as_json: Json = False,
) -> None:
    """Take one of several backbones out of a store, and give its space back."""
    from featx._files import refuse_second_writer
    from featx.errors import UsageError
    from featx.store import StoreWriter, read_manifest

    if store.is_file():
        raise UsageError(
            "a packed store cannot be changed", where=store, hint="Drop it from the store, and pack again."
        )
    read_manifest(store)  # says that there is no store
    refuse_second_writer(store)
    with StoreWriter(store) as writer:
        writer.drop(backbone)
        writer.prune()
        left = writer.names
    if as_json:
        print_json({"dropped": backbone, "backbones": list(left)})
    say(f"{store}: {backbone} dropped; {', '.join(left)} left.", err=as_json)


def verify(
    store: StoreArgument,
    sample: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Check only N shards, drawn at random.")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compare every byte of a store with its checksums, and its parts with each other."""
    from featx.store import content_hash, verify as check

    with ProgressLine("verifying shards") as line:
        problems = check(store, sample=sample, random_state=seed, progress=line.update)
    if as_json:
        told = content_hash(store) if not problems and sample is None else None
        print_json({"sound": not problems, "problems": problems, "sample": sample, "content_hash": told})
    elif not problems:
        say(f"{store}: sound{'' if sample is None else ', as far as a sample of its shards shows'}.")
    for problem in problems:
        say(problem, err=True)
    if problems:
        raise typer.Exit(2)


def pack(
    store: StoreArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT.h5", help="The file to make.")],
    as_json: Json = False,
) -> None:
    """Make one plain HDF5 file of a store, which anything that reads HDF5 can open."""
    from featx.store import pack as make

    made = make(store, out)
    if as_json:
        print_json({"path": str(made), "bytes": made.stat().st_size})
    else:
        say(f"{made}: {made.stat().st_size:,} bytes.")
