"""The command that shows why: explain."""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featx.cli.options import (
    DeviceOption,
    EngineOption,
    ImagesArgument,
    Json,
    ModelArgument,
    OwnBackbone,
    Weights,
    end_refused,
    network_options,
)
from featx.cli.predict import name_files
from featx.cli.terminal import PAGE_MARK, ProgressLine, check_file, check_writable, print_json, say, show
from featx.errors import ImageError, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from featx.models import Answer, Explanation

_SIDE = 448
"""Pixels of a shown photo's longer side."""

_WORKERS = 2


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(epilog="Example:  featx explain photos.model new/*.jpg --html why.html")(explain)


def explain(
    model: ModelArgument,
    images: ImagesArgument,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page with the photos, as one file.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write a picture of each photo, NAME.why.png.")
    ] = None,
    backbone: OwnBackbone = None,
    weights: Weights = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    as_json: Json = False,
) -> None:
    """Show which places of photos speak for the label, and which for the runner-up, as heat maps.

    The maps are exact: their means and the head's intercept add up to the score. Heads and networks whose scores are no
    sum over places have no such map, and the command says so.
    """
    if html is not None:
        check_file(html, PAGE_MARK, example="why.html")
    if png is not None:
        check_writable(png)
    from featx._files import publish_bytes, publish_text
    from featx.images import whole_pictures
    from featx.models import Explainer, layer_number, open_embedder, read_bundle
    from featx.reports import figure_png, render_explanations

    bundle = read_bundle(model)
    with tempfile.TemporaryDirectory(prefix="featx-") as folder:
        named = name_files(images, Path(folder))
        embedder = open_embedder(bundle, model, **network_options(backbone, weights, engine, device))
        explainer = Explainer(bundle.scorer, bundle.class_names, embedder, layer_number(bundle))
        explained: list[tuple[str, Path, Answer, Explanation]] = []
        refused: list[dict[str, Any]] = []
        with ProgressLine("explaining") as line:
            for (name, path), found in zip(named, explainer.explain_files(path for _, path in named), strict=True):
                if isinstance(found, ImageError):
                    refused.append({"id": name, "reason": found.reason, "message": found.what})
                else:
                    explained.append((name, path, bundle.answer(found.embedding[None])[0], found))
                line.update(len(explained) + len(refused), len(named))
        written: list[str] = []

        def shown(line: ProgressLine) -> Iterator[tuple[str, Answer, Explanation, NDArray[np.uint8] | str]]:
            """Each photo with its pixels, one at a time; its picture is written on the way."""
            paths = [path for _, path, _, _ in explained]
            drawn = zip(explained, whole_pictures(paths, side=_SIDE, workers=_WORKERS), _names(explained), strict=True)
            for number, ((name, _, answer, found), picture, file_name) in enumerate(drawn, 1):
                if png is not None and isinstance(picture, str):
                    refused.append({"id": name, "reason": "changed", "message": picture})
                elif png is not None and not isinstance(picture, str):
                    publish_bytes(png / file_name, figure_png(picture, found))
                    written.append(str(png / file_name))
                line.update(number, len(explained))
                yield name, answer, found, picture

        if png is not None:
            png.mkdir(parents=True, exist_ok=True)
        with ProgressLine("drawing") as line:
            if html is not None:
                command = shlex.join(["featx", *sys.argv[1:]])
                page = render_explanations(
                    shown(line), title=model.name, provenance=bundle.provenance, command=command
                )  # fmt: skip
                publish_text(html, page)
            elif png is not None:
                for _ in shown(line):
                    pass
    if as_json:
        about = [_json(name, answer, found) for name, _, answer, found in explained]
        page_at = None if html is None else str(html)
        print_json({"explanations": about, "refused": refused, "page": page_at, "pictures": written})
    else:
        _tell(explained)
    if png is not None:
        say(f"Pictures: {len(written)} in {png}", err=True)
    if html is not None:
        say(f"Page: {html}", err=True)
    end_refused(refused, len(named))


def _names(explained: Sequence[tuple[str, Path, Answer, Explanation]]) -> list[str]:
    """A file's name for each photo, after its own; of photos with one name, the later ones are numbered."""
    names: dict[str, None] = {}
    for given, *_ in explained:
        stem, number = Path(given).stem if given != "-" else "stdin", 1
        while (name := f"{stem}.why.png" if number == 1 else f"{stem}-{number}.why.png") in names:
            number += 1
        names[name] = None
    return list(names)


def _json(name: str, answer: Answer, found: Explanation) -> dict[str, Any]:
    label, other = found.ranked[:2]
    return {
        "id": name,
        **answer.to_json(),
        "runner_up": found.class_names[other],
        "margin": float(found.scores[label] - found.scores[other]),
        "size": list(found.size),
        "rounding": found.rounding,
        "note": found.note or None,
        "evidence": [found.to_json(label), found.to_json(other)],
    }


def _tell(explained: Sequence[tuple[str, Path, Answer, Explanation]]) -> None:
    """How far each label is ahead, and how much of that lies in the photo's middle; in a pipe by lines with tabs."""
    from rich.table import Column, Table

    table = Table(
        Column("image", overflow="fold"),
        "label",
        "score",
        "runner-up",
        "ahead by",
        "in the middle",
        "outside it",
        box=None,
    )
    left_out: dict[str, str] = {}
    for name, _, answer, found in explained:
        label, other = found.ranked[:2]
        inside, outside = found.shares(label) - found.shares(other)
        ahead = found.scores[label] - found.scores[other]
        row = [
            one_line(name), one_line(answer.label), f"{answer.score:.3f}", one_line(found.class_names[other]),
            f"{ahead:.3f}", f"{inside:+.3f}", f"{outside:+.3f}",
        ]  # fmt: skip
        if sys.stdout.isatty():
            table.add_row(*row)
        else:
            say("\t".join(row))
        left_out |= {each.layer: each.reason for each in found.left_out}
    if explained and sys.stdout.isatty():
        show(table)
    for note in dict.fromkeys(found.note for *_, found in explained if found.note):
        say(f"Note: {note}", err=True)
    for layer, reason in left_out.items():
        say(f"Note: {layer} has no map: {reason}.", err=True)
