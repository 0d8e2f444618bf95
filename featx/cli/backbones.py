"""The commands that list networks and their layers."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from featx.cli.options import Json
from featx.cli.terminal import ProgressLine, print_json, say, show

if TYPE_CHECKING:
    from featx.backbones import LayerInfo

_POOLED = {
    "none": "as it is",
    "tokens": "mean of the tokens",
    "channels_first": "mean over the image",
    "channels_last": "mean over the image",
}


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(epilog="Example:  featx backbones --json")(backbones)
    app.command(epilog="Examples:  featx layers efficientnet_lite0  |  featx layers resnet50 --all --json")(layers)


def layers(
    backbone: Annotated[str, typer.Argument(metavar="BACKBONE", help="See: featx backbones.")],
    weights: Annotated[
        str, typer.Option(help="none (shapes do not depend on them, and it works offline), default, or a file.")
    ] = "none",
    every: Annotated[bool, typer.Option("--all", help="Also list the layers inside blocks.")] = False,
    as_json: Json = False,
) -> None:
    """List the layers of a network that embeddings can be taken from: names for --layer, shapes, and which to try."""
    from featx.backbones import describe_layers, load_backbone

    with ProgressLine("building") as line:
        chosen = load_backbone(backbone, weights=weights, progress=line.say)
        found = describe_layers(chosen.network())
    if as_json:
        print_json({"backbone": chosen.name, "input_size": list(chosen.preprocess.crop), "layers": _plain(found)})
        return
    from rich.table import Column, Table

    height, width = chosen.preprocess.crop
    table = Table(Column("layer", no_wrap=True), "kind", "shape", "pooled", "dimensions", "try", box=None)
    shown = [info for info in found if every or info.suggested or info.name.count(".") < 2]
    for info in shown:
        shape = " x ".join(map(str, info.shape))
        row = (info.name, info.kind, shape, _POOLED[info.pooling], str(info.embedding_dim))
        table.add_row(*row, "yes" if info.suggested else "")
    show(table)
    more = " More inside these: --all." if len(shown) < len(found) else ""
    say("", f"Shapes are of one image of {height} x {width} pixels.{more}")
    named = " ".join(f"--layer {info.name}" for info in found if info.suggested)
    say(f"Next: featx extract photos --out photos.featx --backbone {backbone} {named}")


def _plain(found: list[LayerInfo]) -> list[dict[str, object]]:
    return [{**asdict(info), "shape": list(info.shape)} for info in found]


def backbones(as_json: Json = False) -> None:
    """List the networks that can be used, and which of them work offline."""
    from featx.backbones import list_backbones

    known = list_backbones()
    if as_json:
        print_json({"backbones": [asdict(info) for info in known]})
        return
    from rich.table import Table

    table = Table("backbone", "dimensions", "parameters", "licence of the weights", "offline now", box=None)
    for info in known:
        size = f"{info.parameters / 1e6:.1f} M"
        table.add_row(info.name, str(info.embedding_dim), size, info.licence, "yes" if info.offline else "")
    show(table)
    say("", "Any timm model too, as timm:NAME. Weights of your own: --weights FILE.")
    say("A network of your own: --backbone FILE.py:CLASS (see featx guide features).")
    say("One that learns from your images alone: featx autoencoder.")
