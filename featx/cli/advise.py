"""The command that says what to do next with a set of images."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featx.cli.options import Jobs, Json, OwnBackbone, Seed, StoreArgument, Weights, own_network, stem
from featx.cli.terminal import PAGE_MARK, ProgressLine, check_file, print_json, say, show
from featx.errors import FeatxError, Interrupted

if TYPE_CHECKING:
    from featx.backbones import Backbone


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(
        epilog="Examples:  featx advise photos.featx  |  featx advise photos.featx --source photos --minutes 10 --json"
    )(advise)


def advise(
    store: StoreArgument,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="The images that the store was made from, to try fine-tuning on them, too."
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(help="Minutes that it may take; what does not fit is listed.")] = 5.0,
    label: Annotated[
        int | None, typer.Option("--next", help="How many images to label next. (default: 2 per class, at least 10)")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="PAGE.html", help="Where to write the page. (default: beside the store)"),
    ] = None,
    backbone: OwnBackbone = None,
    weights: Weights = None,
    n_jobs: Jobs = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Say which strategy to use, what more images would bring, whether fine-tuning pays, and what to label next.

    Strategies are compared on the same draws within the time given; where the data cannot tell, it says so. Images of
    the split test take no part.
    """
    from featx._files import publish_bytes, temporary
    from featx.advice import advise as measure
    from featx.extraction import network_like
    from featx.heads import read_layers
    from featx.images import ImageSet, Originals, finder, is_local
    from featx.reports import render_advice
    from featx.store import backbones_of, check_same, source_of

    features, columns = read_layers(store)
    images = None if source is None else ImageSet.from_source(source)
    page = out or store.with_name(stem(store) + ".advice.html")
    check_file(page, PAGE_MARK, example="photos.advice.html")
    network: Backbone | FeatxError
    try:
        made = backbones_of(features.provenance)[0]
        network = network_like(made, where=store, backbone=own_network(backbone), weights=weights)
        check_same(made, {**made, **network.provenance()}, store)
    except FeatxError as error:
        if backbone is not None or weights is not None:
            raise  # asked for, and cannot be had
        network = error
    with temporary(page.absolute()) as folder, ProgressLine("advice") as line:
        folder.mkdir()
        found = measure(
            features, columns, backbone=network, images=images, folder=folder, minutes=minutes, count=label,
            random_state=seed, n_jobs=n_jobs, progress=line.update,
        )  # fmt: skip
    command = shlex.join(["featx", *sys.argv[1:]])
    provenance = {**features.provenance, "fingerprint": features.fingerprint}
    origin = source or source_of(store)
    find = finder(origin) if origin and is_local(origin) else Path
    paths = {each.id: str(find(each.id)) for each in found.next_images}
    with Originals(origin, features.ids.tolist(), features.digests) as originals:
        text = render_advice(
            found, title=store.name, provenance=provenance, command=command, paths=paths,
            thumbnail=originals.thumbnail,
        )  # fmt: skip
    publish_bytes(page, text.encode())
    if as_json:
        print_json({**found.to_json(), "page": str(page)})
    for note in found.notes:
        say(f"Note: {note}", err=as_json)
    _tell(found.sentences(), err=as_json)
    if paths:
        say("Label next:", err=as_json)
    for path in paths.values():
        say(f"  {path}", err=as_json)
    say("", f"Page: {page}", err=as_json)
    if found.interrupted:
        raise typer.Exit(Interrupted.exit_code)


def _tell(sentences: dict[str, str], *, err: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from featx.evaluation import BRACKETS

    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 1, 0))
    for topic, sentence in sentences.items():
        first = topic == "strategy"
        table.add_row(Text(topic, style="dim"), Text(sentence, style="bold" if first else ""))
    table.caption = BRACKETS
    show(table, err=err, prose=True)
