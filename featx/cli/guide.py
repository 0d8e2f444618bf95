"""The command that shows the guide: the pages of ``featx/guide``, which are part of the package."""

from __future__ import annotations

import re
import sys
from importlib.resources import files
from typing import Annotated

import typer

from featx.cli.options import Json
from featx.cli.terminal import print_json, say
from featx.errors import UsageError, did_you_mean

TOPICS = {
    "getting-started": "From a folder of photos to a classifier that answers, and what a source may be.",
    "studio": "Label photos in a browser, see how good a classifier is, and take it along; without programming.",
    "honest-numbers": "What the accuracy means: labels, groups, duplicates, intervals, and what is promised.",
    "heads": "The classifiers, how they are compared, and how good the recommended one is.",
    "features": "Other networks, weights, layers and views, a network of your own, working offline.",
    "training": "Fine-tuning, the autoencoder, and whether they pay.",
    "retrieval": "Search, duplicates, and how to measure a search.",
    "serving": "Keep a model, predict, serve it over HTTP with keys and limits.",
    "feedback": "Corrections of a served model: kept, learnt on evidence, versions, several people, Label Studio.",
    "shipping": "A model in other software: one ONNX graph from photo to answer, or the head alone.",
    "many-machines": "Parts, runners, Ray, and stores of millions of images.",
    "store-format": "The format of a store, with MUST and MAY, and how to take embeddings elsewhere.",
    "benchmarks": "Every measured number, with its command, machine and date.",
    "inside": "How featx is built: the rooms, and what they must not know.",
    "python": "The Python API, one short example for each name.",
}
"""Name of each page, in reading order, and what it is about."""

_LINK = re.compile(r"\[([^\]]+)\]\(([a-z-]+)\.md\)")
_PICTURE = re.compile(r"!\[([^\]]+)\]\([^)]+\)")


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(epilog="Examples:  featx guide  |  featx guide heads  |  featx guide store-format | less")(guide)


def guide(
    topic: Annotated[
        str | None,
        typer.Argument(
            metavar="[TOPIC]", help="A page. Without one, the topics are listed.", autocompletion=lambda: list(TOPICS)
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Read the guide: a list of its topics, or the page of one.

    In a pipe, a page is the Markdown text as it is.
    """
    if topic is None:
        if as_json:
            print_json({"topics": list(TOPICS), "summaries": dict(TOPICS)})
        else:
            width = max(map(len, TOPICS))
            say(*(f"{name:{width}}  {summary}" for name, summary in TOPICS.items()))
            say("", "Next: featx guide getting-started")
        return
    text = page(topic)
    if as_json:
        print_json({"topic": topic, "text": text})
    elif sys.stdout.isatty():
        _render(text)
    else:
        say(*text.splitlines())


def page(topic: str) -> str:
    """The Markdown text of a page.

    Raises
    ------
    UsageError
        There is no such page.
    """
    if topic not in TOPICS:
        raise UsageError(
            f"no topic {topic!r} in the guide",
            expected=f"one of {', '.join(TOPICS)}",
            hint=did_you_mean(topic, TOPICS) or "To list them: featx guide",
        )
    return files("featx").joinpath("guide", f"{topic}.md").read_text(encoding="utf-8")


def _render(text: str) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    # A link to another page becomes the command that shows it; pictures are in the repository only.
    text = _PICTURE.sub(r"(Figure in the repository: \1)", text)
    text = _LINK.sub(r"\1 (`featx guide \2`)", text)
    Console().print(Markdown(text, code_theme="ansi_dark", hyperlinks=False))
