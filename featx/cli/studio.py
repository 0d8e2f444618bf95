"""The command that opens the studio: label photos in a browser, see how good a model is, and take it along."""

from __future__ import annotations

import webbrowser
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featx.cli.extract import Asked, RecipeName, load
from featx.cli.options import PortOption, extra_packages
from featx.cli.terminal import say
from featx.errors import UsageError

if TYPE_CHECKING:
    from featx.studio import Studio


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(epilog="Examples:  featx studio photos  |  featx studio photos --recipe balanced  |  featx studio")(
        studio
    )


def studio(
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FOLDER]", help="The photos: a folder, or a list (.csv). Without it, choose one on the page."
        ),
    ] = None,
    project: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where labels, embeddings and models go. (default: FOLDER.studio)"),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The page opens folders below this one only. (default: your home)"),
    ] = None,
    recipe: Annotated[
        RecipeName | None, typer.Option(help="What embeds the photos: see featx backbones. (default: fast)")
    ] = None,
    backbone: Annotated[
        list[str] | None,
        typer.Option(help="A network by name, instead of a recipe; more than once joins several."),
    ] = None,
    weights: Annotated[list[str] | None, typer.Option(help="Its weights, as of featx extract.")] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="npm|URL|DIR",
            help="What runs a model in a page to take along, as of featx export. (default: the one it kept)",
        ),
    ] = None,
    port: PortOption = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the address only.")] = False,
) -> None:
    """Label photos in your browser, see how good a classifier is, and take it along as a file.

    The page is for this machine only, and nothing leaves it. Photos are never moved, renamed or written to; labels,
    embeddings and models go into a folder beside them. Ctrl-C ends it; what was labelled is kept.
    """
    with extra_packages("the studio", "serve,export"):
        from featx.studio import Setup, Studio, run
    if root is not None and not root.is_dir():
        raise UsageError("no such folder", where="--root", found=root)
    if source is None and project is not None:
        raise UsageError("--project goes with a folder of photos", hint="Name the folder, too.")
    # What the options say is looked at now, and not when the first folder is opened.
    how = partial(_how, backbone, recipe, weights)
    how(Path("photos.featx"))
    made = Studio(Setup((root or Path.home()).resolve(), how, runtime), project)
    if source is not None:
        made.open(source)
    run(made, port=port, started=partial(_tell, made, browser=not no_browser))


def _how(
    backbone: list[str] | None, recipe: RecipeName | None, weights: list[str] | None, store: Path
) -> dict[str, Any]:
    """How a store's photos are embedded, by the options."""
    asked = Asked.of(store, backbone, recipe, weights, None, None)
    return {"backbone": load(asked.networks), "views": asked.views, "recipe": recipe or ""}


def _tell(made: Studio, url: str, *, browser: bool) -> None:
    session = made.session
    say(f"Open {url}")
    if session is not None:
        say(f"Labels, embeddings and models go to {session.project.folder}")
    say("Ctrl-C ends it; what was labelled is kept.")
    if browser:
        webbrowser.open(url)
