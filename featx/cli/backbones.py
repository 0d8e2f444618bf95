"""The commands that list networks and their layers, and measure how fast they are here."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featx.cli.options import Json
from featx.cli.terminal import ProgressLine, print_json, say, show
from featx.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from featx.backbones import BackboneInfo, Speed

_POOLED = {
    "none": "as it is",
    "tokens": "mean of the tokens",
    "channels_first": "mean over the image",
    "channels_last": "mean over the image",
}

_KNOWN = {
    "sha256": "all of the sha256 of what was published",
    "digits": "the digits of the sha256 that the publisher gives",
    "nothing": "the sum that the Hugging Face hub announces; no revision is pinned",
}

_WIDTH = 90
"""Columns that the table of all networks needs; a narrower terminal breaks its lines."""

_LONGEST = 100
"""Columns of a line of text."""


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(
        epilog="Examples:  featx backbones  |  featx backbones dinov2_small  |  "
        "featx backbones --measure efficientnet_lite0 resnet18"
    )(backbones)
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
        listed = [{**asdict(info), "shape": list(info.shape)} for info in found]
        print_json({"backbone": chosen.name, "input_size": list(chosen.preprocess.crop), "layers": listed})
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


def backbones(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Show everything that is known about these. (default: a table of all)"),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run each NAME for some seconds, and keep its images per second.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="How long to run each for --measure.")] = 5,
    as_json: Json = False,
) -> None:
    """List the networks: how good, how fast here and how large they are, whether they work offline, and which to take.

    Images per second are those of the network alone, on random pixels, with the engine that featx extract would take.
    They are known only where --measure was run on this machine.
    """
    from featx.backbones import list_backbones, measured_speeds

    known = {info.name: info for info in list_backbones()}
    chosen = [_named(name, known) for name in names or ()] or list(known.values())
    if measure:
        _measure([info.name for info in chosen] if names else [], seconds)
    speeds = measured_speeds()
    if as_json:
        from featx.backbones import ADVICE, RECIPES

        rows = [_row(info, speeds.get(info.stored_as)) for info in chosen]
        recipes = {name: recipe.to_json() for name, recipe in RECIPES.items()}
        print_json({"backbones": rows, "advice": [asdict(advice) for advice in ADVICE], "recipes": recipes})
    elif names:
        for info in chosen:
            _details(info, speeds.get(info.stored_as))
    else:
        _table(chosen, speeds)


def _named(name: str, known: dict[str, BackboneInfo]) -> BackboneInfo:
    for info in known.values():
        if name in (info.name, info.stored_as, info.stored_as.removeprefix("timm:"), f"{info.source}:{info.name}"):
            return info
    hint = did_you_mean(name, known) or "'featx backbones' lists them."
    if name.startswith("timm:"):
        hint = f"What any other model of timm is like: featx layers {name}"
    raise UsageError(f"no network {name!r} in the catalogue", hint=hint)


def _measure(names: list[str], seconds: float) -> None:
    from featx.backbones import measure_speed

    if not names:
        raise UsageError(
            "no network to measure", where="--measure", expected="NAME", hint="'featx backbones' lists the names."
        )
    with ProgressLine("measuring") as line:
        for name in names:
            measure_speed(name, seconds=seconds, progress=line.say, advance=line.update)


def _row(info: BackboneInfo, speed: Speed | None) -> dict[str, Any]:
    return {**asdict(info), "input_size": list(info.input_size), "measured": None if speed is None else asdict(speed)}


def _table(infos: list[BackboneInfo], speeds: dict[str, Speed]) -> None:
    from rich.table import Column, Table

    from featx.backbones import ADVICE, RECIPES

    numbers = [Column(name, justify="right") for name in ("top-1", "images/s", "dims", "input", "params")]
    table = Table(Column("backbone", no_wrap=True), *numbers, "licence", "offline", box=None)
    for info in infos:
        speed = speeds.get(info.stored_as)
        table.add_row(
            info.name,
            _top1(info),
            "" if speed is None else f"{speed.images_per_second:,.0f}",
            str(info.embedding_dim),
            str(info.input_size[0]),
            f"{info.parameters / 1e6:.1f} M",
            info.licence,
            "yes" if info.offline else "",
        )
    show(table, least=_WIDTH)
    say("")
    say("top-1: on ImageNet in per cent, as published; * of a linear classifier on the frozen network.")
    say("images/s: of the network alone on this machine, where featx backbones --measure NAME was run.")
    say("", "Which to take (accuracies are means over 1, 5 and 20 labels per class):")
    columns = min(shutil.get_terminal_size().columns, _LONGEST)
    for advice in ADVICE:
        text = f"{advice.images}: {' or '.join(advice.take)}. {advice.basis}"
        say(*textwrap.wrap(text, columns, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False))
    say("", "Recipes (featx extract --recipe NAME), and the time of their networks:")
    for name, recipe in RECIPES.items():
        say(f"- {name}: {recipe.summary}, {recipe.cost:g} times")
    say("", "More about one network, and where its figures come from: featx backbones NAME.")
    say("Any other model of timm: timm:NAME. Weights of your own: --weights FILE.")
    say("A network of your own: --backbone FILE.py:CLASS (see featx guide features).")
    say("A network that learns from your images alone: featx autoencoder.")


def _top1(info: BackboneInfo) -> str:
    if info.top1 is None:
        return ""
    return f"{info.top1:.1f}" + ("*" if "linear classifier" in info.top1_source else " ")


def _int8(info: BackboneInfo) -> str:
    if info.int8_loss is None or info.int8_worst is None:
        return "not measured (--precision int8 quantises it)"
    return f"{-info.int8_loss:+.2f} points of accuracy against fp32, on the worst of five sets {-info.int8_worst:+.2f}"


def _details(info: BackboneInfo, speed: Speed | None) -> None:
    from rich.table import Table

    height, width = info.input_size
    here = f"not measured (featx backbones --measure {info.name})"
    if speed is not None:
        how = f"{speed.engine}, {speed.precision}, {speed.device}, batches of {speed.batch_size}, {speed.cpus} CPUs"
        here = f"{speed.images_per_second:,.1f} ({how}, {speed.date})"
    table = Table(show_header=False, box=None)
    rows = {
        "backbone": info.name,
        "in stores": info.stored_as,
        "from": info.source,
        "ImageNet top-1": "no figure verified" if info.top1 is None else f"{info.top1:.1f} % ({info.top1_source})",
        "images/s here": here,
        "embedding": f"{info.embedding_dim:,} dimensions",
        "input": f"{height} x {width} pixels",
        "parameters": f"{info.parameters:,}",
        "at int8": _int8(info),
        "licence": info.licence,
        "checked by": _KNOWN[info.known],
        "weights": "on this machine" if info.offline else f"not here (featx weights fetch {info.name})",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    show(table)
    say("", f"Next: featx extract photos --out photos.featx --backbone {info.name}", "")
