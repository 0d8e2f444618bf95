"""The command that uses a model: predict."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zipfile import is_zipfile

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
from featx.cli.terminal import ProgressLine, check_file, check_writable, print_json, say, show
from featx.errors import ImageError, UsageError, one_line

if TYPE_CHECKING:
    from featx.cli.sorting import Sorted
    from featx.extraction import Embedder
    from featx.models import Bundle, Pickled

_STDIN = Path("-")
_SET = "set"
_CSV_COLUMNS = ("id", "label", "score", "score_kind", "abstain", "refused", "reason", "familiarity")
_CSV_MARK = ",".join(_CSV_COLUMNS[:6]).encode()  # files of featx 0.2 have no more
_MAX_STDIN = 2**30


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(
        epilog="Examples:  featx predict photos.model new/*.jpg  |  cat a.jpg | featx predict photos.model - --json"
    )(predict)


def predict(
    model: ModelArgument,
    images: ImagesArgument,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="MODEL is a joblib export. Loading it runs code, so trust its source."),
    ] = False,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Also write the answers to a CSV file.")
    ] = None,
    sort_into: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Copy the photos into a folder for each label in FOLDER, those that the model is unsure of into "
            "_unsure, and unknown ones into _unknown. Existing files are never replaced.",
        ),
    ] = None,
    coverage: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Also give the smallest set of labels that contains the true one this often, such as 0.9, on photos "
            "like the model's; the set of an unknown photo is empty.",
        ),
    ] = None,
    backbone: OwnBackbone = None,
    weights: Weights = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    as_json: Json = False,
) -> None:
    """Say what photos show: label, probability, and whether the model is unsure or finds the photo unlike its own.

    In a pipe, the output is one line per image with tabs between image, label, score and "abstains" or "unknown".
    A label beside either is a guess. With --coverage the set of labels follows, with " | " between them.
    """
    if csv is not None:
        check_file(csv, _CSV_MARK, example="answers.csv")
    if sort_into is not None:
        check_writable(sort_into)
        if _STDIN in images:
            raise UsageError("an image on standard input has no name to keep", where="--sort-into")
    with tempfile.TemporaryDirectory(prefix="featx-") as folder:
        named = name_files(images, Path(folder))
        from featx.models import predict_files

        kept, embedder, layer = _open(model, network_options(backbone, weights, engine, device), pickled=allow_pickle)
        cautions = [*kept.cautions, *([] if coverage is None else kept.cautions_of_sets(coverage))]
        predictions: list[dict[str, Any]] = []
        refused: list[dict[str, Any]] = []
        paths = [path for _, path in named]
        with ProgressLine("predicting") as line:
            found = predict_files(kept, embedder, layer, paths, coverage=coverage)
            for (name, _), answer in zip(named, found, strict=True):
                if isinstance(answer, ImageError):
                    refused.append({"id": name, "reason": answer.reason, "message": answer.what})
                else:
                    predictions.append({"id": name, **answer.to_json()})
                line.update(len(predictions) + len(refused), len(named))
    filed = None if sort_into is None else _sort_into(sort_into, dict(named), predictions, kept.class_names)
    if csv is not None:
        _write_csv(csv, predictions, refused, kept.class_names, sets=coverage is not None)
    if as_json:
        told: dict[str, Any] = {"predictions": predictions, "refused": refused}
        if coverage is not None:
            told["coverage"] = coverage
        if filed is not None:
            told["sorted"] = {"folder": str(sort_into), "copied": filed.copied, "already_there": filed.there}
        print_json(told)
    elif sys.stdout.isatty():
        _table(predictions, kept.score_kind)
    else:
        for each in predictions:
            say("\t".join(_cells(each)))
    for caution in cautions:
        say(f"Note: {caution}", err=True)
    if filed is not None:
        into = ", ".join(f"{name} {count}" for name, count in filed.copied.items())
        there = f"; {filed.there} already there" if filed.there else ""
        say(f"Copied into {sort_into}: {into or 'nothing'}{there}.", err=True)
    if csv is not None:
        say(f"CSV: {csv}", err=True)
    end_refused(refused, len(named))


def _open(model: Path, options: dict[str, Any], *, pickled: bool) -> tuple[Bundle | Pickled, Embedder, int | None]:
    """A bundle (or, where it is asked for, a pickled export), its network, and the layer that it is on."""
    from featx.extraction import Embedder
    from featx.models import layer_number, open_embedder, read_bundle

    if pickled and not is_zipfile(model):
        from featx.models import Pickled

        loaded = Pickled.load(model)
        return loaded, Embedder.like(loaded.provenance, where=model, **options), loaded.layer
    bundle = read_bundle(model)
    return bundle, open_embedder(bundle, model, **options), layer_number(bundle)


def name_files(images: list[Path], folder: Path) -> list[tuple[str, Path]]:
    """Each image under the name that results carry; what comes on standard input becomes a file in ``folder``."""
    from featx.models import named_files

    named: list[tuple[str, Path]] = []
    for path in images:
        if path == _STDIN:
            if any(name == "-" for name, _ in named):
                raise UsageError("standard input can be read once only", where="-")
            data = sys.stdin.buffer.read(_MAX_STDIN)
            (folder / "stdin").write_bytes(data)
            named.append(("-", folder / "stdin"))
            continue
        try:
            files = named_files(path)
        except OSError:  # such as a name that is too long: the decoder says so
            files = [path]
        if not files:
            raise UsageError("no such file", where=path)
        named += [(str(each), each) for each in files]
    return named


def _cells(prediction: dict[str, Any]) -> list[str]:
    """What a line or a row of the table says: image, label, score, doubt, and the set if one was asked for."""
    doubt = {None: "", "unsure": "abstains", "unknown": "unknown"}[prediction["reason"]]
    more = [one_line(" | ".join(prediction[_SET]))] if _SET in prediction else []
    return [one_line(prediction["id"]), one_line(prediction["label"]), f"{prediction['score']:.3f}", doubt, *more]


def _table(predictions: list[dict[str, Any]], kind: str) -> None:
    from rich.table import Column, Table

    score = "ahead of the next by" if kind == "margin" else kind
    table = Table(Column("image", overflow="fold"), "label", score, "", box=None)
    if any(_SET in each for each in predictions):
        table.add_column(_SET, overflow="fold")
    for each in predictions:
        table.add_row(*_cells(each))
    if predictions:
        show(table)


def _write_csv(
    path: Path,
    predictions: list[dict[str, Any]],
    refused: list[dict[str, Any]],
    class_names: Sequence[str],
    *,
    sets: bool,
) -> None:
    from featx._files import csv_text, publish_text

    columns = [*_CSV_COLUMNS, *([_SET] if sets else []), *(f"probability of {name}" for name in class_names)]
    rows: list[dict[str, Any]] = []
    for each in predictions:
        row = {name: each[name] for name in _CSV_COLUMNS if name in each} | (
            {_SET: " | ".join(each[_SET])} if sets else {}
        )
        shares = {f"probability of {name}": share for name, share in each["probabilities"].items()}
        rows.append({**row, **shares, "abstain": "yes" if each["abstain"] else "no"})
    rows += [{"id": each["id"], "refused": f"{each['reason']}: {each['message']}"} for each in refused]
    publish_text(path, csv_text(columns, rows))


def _sort_into(
    folder: Path, paths: dict[str, Path], predictions: list[dict[str, Any]], class_names: Sequence[str]
) -> Sorted:
    from featx.cli.sorting import sort_into

    photos = [(paths[each["id"]], each["label"], each["reason"]) for each in predictions]
    with ProgressLine("copying") as line:
        return sort_into(folder, photos, class_names, progress=lambda done: line.update(done, len(photos)))
