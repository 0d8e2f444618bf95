"""The command that says in writing what a model is and is worth: card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featx.cli.options import Json, ModelArgument
from featx.cli.terminal import check_file, print_json, say


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(epilog="Examples:  featx card photos.model --out README.md  |  featx card photos.model")(card)


def card(
    model: ModelArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The file to make, such as README.md. (default: print it)"),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="The licence that you give the model, as Hugging Face calls it, such as cc-by-4.0. "
            "(default: that of the network's weights)",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model card: what a model is for, how good it was on which photos, when it abstains, and its limits.

    Markdown with the front matter that Hugging Face reads. What featx cannot know, such as who is in the photos, the
    card says that it does not say; add it before you pass the model on.
    """
    from featx._files import publish_bytes
    from featx.models import read_bundle
    from featx.reports import LIBRARY, card_data, render_card

    if out is not None:
        check_file(out, LIBRARY, example="README.md")
    bundle = read_bundle(model)
    text = render_card(bundle, model.stem, licence=licence)
    if out is not None:
        publish_bytes(out, text.encode())
    if as_json:
        metadata = card_data(bundle, model.stem, licence=licence).to_dict()  # type: ignore[no-untyped-call]
        print_json({"path": None if out is None else str(out), "metadata": metadata, "card": text})
    elif out is None:
        say(*text.splitlines())
    if out is not None:
        say(f"{out}: the card of {model}. Add what it cannot know: where the photos are from.", err=as_json)
