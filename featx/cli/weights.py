"""The commands about weights: which are here, fetching them, and carrying them to a machine without internet."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featx.cli.options import Json
from featx.cli.terminal import ProgressLine, check_file, print_json, say, show
from featx.errors import plural

if TYPE_CHECKING:
    from featx.backbones import Carried

_MARK = b"featx-weights"
"""What the first KiB of a pack has in it."""

_MEGABYTE = 1_000_000

Names = Annotated[list[str], typer.Argument(metavar="NAME", help="Networks; see: featx backbones.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    group = typer.Typer(no_args_is_help=True)
    group.command("list", epilog="Example:  featx weights list --json")(list_weights)
    group.command(epilog="Example:  featx weights fetch dinov2_small resnet50")(fetch)
    group.command(epilog="Example:  featx weights pack dinov2_small resnet50 --out weights.safetensors")(pack)
    group.command(epilog="Example:  featx weights add weights.safetensors --sha256 3f5a...")(add)
    app.add_typer(
        group,
        name="weights",
        help="Weights of networks: which are here, fetching them, and carrying them to a machine without internet.",
        epilog="Examples:  featx weights list  |  featx weights fetch dinov2_small  |  "
        "featx weights pack dinov2_small --out weights.safetensors  |  featx weights add weights.safetensors",
    )


def list_weights(as_json: Json = False) -> None:
    """List the default weights that are on this machine: of which network, how large, and where."""
    from featx.backbones import list_weights as find

    found = find()
    if as_json:
        print_json({"weights": [_plain(weights) for weights in found]})
        return
    from rich.table import Column, Table

    table = Table(Column("backbone", no_wrap=True), Column("MB", justify="right"), "place", "file", box=None)
    for weights in found:
        size = f"{weights.bytes / _MEGABYTE:,.1f}"
        table.add_row(weights.backbone, size, weights.place, weights.path.name)
    show(table)
    total = sum(weights.bytes for weights in found)
    say("", f"{plural(len(found), 'network')}, {total / _MEGABYTE:,.1f} MB. Whole paths: featx weights list --json.")
    say("More: featx weights fetch NAME. For another machine: featx weights pack NAME --out weights.safetensors")


def fetch(names: Names, as_json: Json = False) -> None:
    """Download weights, unless they are here already, and check them.

    A download appears whole or not at all. Stopped or broken off, run the same command again.
    """
    from featx.backbones import fetch_weights

    found = []
    with ProgressLine("fetching") as line:
        for name in names:
            weights = fetch_weights(name, progress=line.say, advance=_megabytes(line))
            found.append(weights)
            if not as_json:
                _say(weights, "fetched" if weights.new else "was here already")
    if as_json:
        print_json({"weights": [_plain(weights) for weights in found]})


def pack(
    names: Names,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to make.")],
    as_json: Json = False,
) -> None:
    """Write the weights of several networks into one file, to carry to a machine without internet.

    They have to be on this machine: featx weights fetch. Stores made there have the same fingerprint as here, also at
    int8: networks of them that were quantised on this machine go along.
    """
    from featx.backbones import pack_weights

    check_file(out, _MARK, example="weights.safetensors")
    with ProgressLine("packing") as line:
        made = pack_weights(names, out, advance=_megabytes(line))
    if as_json:
        weights = [_plain(each) for each in made.weights]
        print_json({"path": str(made.path), "bytes": made.bytes, "sha256": made.sha256, "weights": weights})
        return
    for each in made.weights:
        _say(each, "packed")
    say("", f"{made.path}: {made.bytes / _MEGABYTE:,.1f} MB, sha256 {made.sha256}")
    needed = any(each.known in ("digits", "pack") for each in made.weights)
    say(f"On the other machine: featx weights add {made.path.name}" + (f" --sha256 {made.sha256}" if needed else ""))


def add(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file made by featx weights pack.")],
    sha256: Annotated[
        str,
        typer.Option(metavar="DIGITS", help="The sha256 of FILE, as featx weights pack printed it where it was made."),
    ] = "",
    as_json: Json = False,
) -> None:
    """Put the weights of a packed file where featx finds them: all of them, or none.

    Torch files of which featx knows only the first digits of the sha256, and quantised networks, are taken only with
    --sha256.
    """
    from featx.backbones import add_weights

    with ProgressLine("adding") as line:
        found = add_weights(file, sha256=sha256, progress=line.say, advance=_megabytes(line))
    if as_json:
        print_json({"weights": [_plain(weights) for weights in found]})
        return
    for weights in found:
        _say(weights, "added" if weights.new else "was here already")


def _megabytes(line: ProgressLine) -> Any:
    def advance(done: int, total: int, what: str) -> None:
        line.update(done // _MEGABYTE, -(-total // _MEGABYTE), f"{what}, MB")

    return advance


def _plain(weights: Any) -> dict[str, Any]:
    return {**asdict(weights), "path": str(weights.path)}


def _say(weights: Carried, what: str) -> None:
    say(f"{weights.backbone}: {what}, {weights.bytes / _MEGABYTE:,.1f} MB, sha256 {weights.sha256[:12]}...")
