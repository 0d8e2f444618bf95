"""The command that takes a model to other software: export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featx.cli.options import (
    Device,
    DeviceOption,
    EngineName,
    EngineOption,
    Json,
    ModelArgument,
    OwnBackbone,
    Weights,
    own_network,
)
from featx.cli.terminal import ProgressLine, check_file, print_json, say
from featx.errors import UsageError, plural

if TYPE_CHECKING:
    from featx.models import Photo


class ExportFormat(StrEnum):
    """What a model is written for."""

    joblib = "joblib"
    skops = "skops"
    onnx = "onnx"


class Part(StrEnum):
    """How much of a model is written."""

    model = "model"
    head = "head"


_MARKS = {"joblib": b"sklearn", "skops": b"schema.json", "onnx": b"featx"}
_MOST_PHOTOS = 1000
"""Photos that an export is compared on at most."""

_SIDE = 640
"""Pixels of the longer side of the pictures of them that both are shown."""


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(
        epilog="Examples:  featx export photos.model --format onnx --out photos.onnx  |  "
        "featx export photos.model --format joblib --out photos.joblib"
    )(export)


def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to make.")],
    form: Annotated[
        ExportFormat,
        typer.Option("--format", help="onnx is a graph for any runtime; joblib is a pickle, skops is not."),
    ],
    part: Annotated[
        Part | None,
        typer.Option(
            help="model takes photos, head takes embeddings. (default: model for onnx; joblib and skops hold a head)",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="PHOTOS",
            help="Also compare the answers about these photos: 99.5 % have to be the same, at int8 99 %.",
        ),
    ] = None,
    backbone: OwnBackbone = None,
    weights: Weights = None,
    engine: EngineOption = EngineName.auto,
    device: DeviceOption = Device.auto,
    as_json: Json = False,
) -> None:
    """Write a model for other software: as an ONNX graph from photo to answer, or its head alone.

    An ONNX graph of the whole model is run in onnxruntime before it is written, and refused if it does not answer as
    featx does. The head alone takes embeddings and knows no unknown: it names a class for photos of anything.
    """
    from featx.models import export_bundle, export_model, open_embedder, read_bundle

    check_file(out, _MARKS[form.value], example=f"photos.{form.value}")
    whole = form is ExportFormat.onnx if part is None else part is Part.model
    if whole and form is not ExportFormat.onnx:
        raise UsageError("joblib and skops hold a head", where="--part", expected="head", found="model")
    if check is not None and not whole:
        raise UsageError("a head is not compared on photos", where="--check", hint="Leave it out, or --part model.")
    bundle = read_bundle(model)
    report: dict[str, object] = {}
    if whole:
        files = _files(check)
        refused: list[Path] = []
        with ProgressLine("exporting") as line:
            line.say("opening the network")
            embedder = open_embedder(
                bundle, model, backbone=own_network(backbone), weights=weights, engine=engine.value, device=device.value
            )
            line.say("writing the graph")
            compared = export_model(bundle, embedder, out, _photos(files, refused, line))
        report = {"compared": compared.to_json(), "refused": [str(file) for file in refused]}
        if refused:
            say(f"Note: {plural(len(refused), 'photo')} of {check} cannot be read and were left out.", err=True)
    else:
        export_bundle(bundle, out, form.value)
    if as_json:
        about = {"path": str(out), "format": form.value, "part": "model" if whole else "head"}
        print_json({**about, "bytes": out.stat().st_size, **report})
    say(f"{out}: {out.stat().st_size:,} bytes, takes {'a photo' if whole else 'embeddings'}.", err=as_json)
    if whole:
        say(
            f"Compared with featx on {plural(compared.photos, 'photo')}: {100 * compared.same_labels:.1f} % of the "
            f"answers the same, probabilities within {max(compared.probability_gap, 0.0001):.4f}.",
            err=as_json,
        )
        if check is None:
            say("Note: Compared on its own probe photo only. More: --check FOLDER", err=True)
    else:
        say("Note: The head alone knows no unknown: it names a class for photos of anything.", err=True)


def _files(check: Path | None) -> list[Path]:
    from featx.models import named_files

    if check is None:
        return []
    files = named_files(check)
    if not files:
        raise UsageError("no such file or folder", where=check)
    return files[:: -(-len(files) // _MOST_PHOTOS)]


def _photos(files: Sequence[Path], refused: list[Path], line: ProgressLine) -> Iterator[Photo]:
    """Pictures of files, decoded in processes of their own; those that cannot be read are named in ``refused``."""
    from featx.images import as_rgb, whole_pictures

    for number, (file, picture) in enumerate(zip(files, whole_pictures(files, side=_SIDE), strict=True)):
        line.update(number, len(files), "comparing answers")
        if isinstance(picture, str):
            refused.append(file)
        else:
            yield as_rgb(picture)
