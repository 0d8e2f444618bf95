"""The command that takes a model to other software: export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from featx.cli.options import (
    DeviceOption,
    EngineOption,
    Json,
    ModelArgument,
    OwnBackbone,
    Weights,
    network_options,
)
from featx.cli.terminal import PAGE_MARK, ProgressLine, check_file, print_json, say
from featx.errors import UsageError, plural

if TYPE_CHECKING:
    from featx.extraction import Embedder
    from featx.images import Origin
    from featx.models import Bundle, Labelled, Photo
    from featx.reports import Examples


_MARKS = {"joblib": b"sklearn", "skops": b"schema.json", "onnx": b"featx", "html": PAGE_MARK}
_MOST_PHOTOS = 1000
"""Photos that an export is compared on at most."""

_EXAMPLES = 5
"""Example photos of each class in a page."""

_WORKERS = 2
"""Processes that make small pictures."""

_SIDE = 640
"""Pixels of the longer side of the pictures of them that both are shown."""


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(
        epilog="Examples:  featx export photos.model --format onnx --out photos.onnx  |  "
        "featx export photos.model --format html --out photos.html --store photos.featx --runtime npm  |  "
        "featx export photos.model --format joblib --out photos.joblib"
    )(export)


def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to make.")],
    form: Annotated[
        Literal["joblib", "skops", "onnx", "html"],
        typer.Option(
            "--format",
            help="onnx is a graph for any runtime, html a page that runs it in a browser; joblib is a pickle, skops "
            "is not.",
        ),
    ],
    part: Annotated[
        Literal["model", "head"] | None,
        typer.Option(
            help="model takes photos, head takes embeddings. (default: model for onnx and html; joblib and skops hold "
            "a head)"
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="PHOTOS",
            help="Also compare the answers about these photos: 99.5 % have to be the same, at int8 99 %.",
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|npm|URL",
            help="For html: where onnxruntime-web is. A folder or .tgz of the package; npm or an https address fetches "
            "it once. (default: what was fetched)",
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            help="For html: the store that the model was fitted on; answers then show the most similar examples."
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="For html: where the images of the store are. (default: as at extraction)")
    ] = None,
    examples: Annotated[
        int,
        typer.Option(
            min=0,
            max=100,
            help="For html with --store: example photos of each class, which travel in the file as small pictures, "
            "without their names; 0: none.",
        ),
    ] = _EXAMPLES,
    backbone: OwnBackbone = None,
    weights: Weights = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    as_json: Json = False,
) -> None:
    """Write a model for other software: as an ONNX graph or a web page from photo to answer, or its head alone.

    The graph of a whole model is run in onnxruntime before it is written, and refused if it does not answer as featx
    does. A web page is one file that runs the graph in a browser, without a server and without a connection; it needs
    onnxruntime-web (--runtime). The head alone takes embeddings, and cannot call photos unknown: it names a class
    for photos of anything.
    """
    from featx._files import publish_bytes
    from featx.models import export_bundle, labelled_images, model_onnx, open_embedder, read_bundle, web_runtime
    from featx.reports import image_finder, render_offline

    check_file(out, _MARKS[form], example=f"photos.{form}")
    page = form == "html"
    takes_photos = page or form == "onnx"
    whole = takes_photos if part is None else part == "model"
    if whole and not takes_photos:
        raise UsageError("joblib and skops hold the head alone", where="--part", expected="head", found="model")
    if page and not whole:
        raise UsageError("a page holds the whole model", where="--part", expected="model", found="head")
    if check is not None and not whole:
        raise UsageError(
            "a head alone cannot be compared on photos", where="--check", hint="Leave it out, or use --part model."
        )
    for name, value in (("--runtime", runtime), ("--store", store), ("--source", source)):
        if value is not None and not page:
            raise UsageError("only for a page", where=name, hint="Leave it out, or use --format html.")
    if source is not None and store is None:
        raise UsageError("--source goes with --store", hint="Name the store with --store STORE.")
    bundle = read_bundle(model)
    report: dict[str, object] = {}
    if whole:
        files = _files(check)
        refused: list[Path] = []
        labelled = find = running = None
        if store is not None and examples:
            labelled, find = labelled_images(store, bundle), image_finder(store, source)
        with ProgressLine("exporting") as line:
            if page:
                running = web_runtime(runtime, line.say)
            line.say("opening the network")
            embedder = open_embedder(bundle, model, **network_options(backbone, weights, engine, device))
            line.say("writing the graph")
            exported = model_onnx(bundle, embedder, _photos(files, refused, line))
            content, shown = exported.content, None
            if running is not None:
                if labelled is not None and find is not None:
                    line.say("choosing examples")
                    shown = _shown(labelled, find, examples, bundle, embedder)
                title = model.name.removesuffix(".model") or "model"
                page_text = render_offline(bundle, exported, running, title=title, examples=shown)
                content = page_text.encode("utf-8", errors="backslashreplace")
            publish_bytes(out, content)
        compared = exported.compared
        report = {"compared": compared.to_json(), "refused": [str(file) for file in refused]}
        if running is not None:
            report |= {"runtime": running.version, "examples": 0 if shown is None else len(shown.labels)}
        if refused:
            say(f"Note: {plural(len(refused), 'photo')} of {check} cannot be read and were left out.", err=True)
    else:
        export_bundle(bundle, out, form)
    if as_json:
        about = {"path": str(out), "format": form, "part": "model" if whole else "head"}
        print_json({**about, "bytes": out.stat().st_size, **report})
    say(f"{out}: {out.stat().st_size:,} bytes, takes {'a photo' if whole else 'embeddings'}.", err=as_json)
    if whole:
        say(
            f"Compared with featx on {plural(compared.photos, 'photo')}: {100 * compared.same_labels:.1f} % of the "
            f"answers the same, probabilities within {max(compared.probability_gap, 0.0001):.4f}.",
            err=as_json,
        )
        if check is None:
            say("Note: Compared on one photo only, which is in the model. To compare on more: --check FOLDER", err=True)
        if page:
            _say_examples(labelled, shown, examples)
    else:
        say("Note: The head alone cannot call photos unknown: it names a class for photos of anything.", err=True)


def _shown(
    labelled: Labelled, find: Callable[[str], Origin], each: int, bundle: Bundle, embedder: Embedder
) -> Examples:
    """Small pictures of examples of every class; those whose files have gone or changed are left out."""
    from featx.images import Thumbnails
    from featx.models import layer_number
    from featx.reports import Examples

    rows = labelled.examples(each, bundle.class_names)
    with Thumbnails(workers=_WORKERS) as thumbnails:
        made = thumbnails.make([(find(str(labelled.ids[row])), labelled.digests[row].tobytes()) for row in rows])
    kept = [(row, picture) for row, picture in zip(rows, made, strict=True) if isinstance(picture, bytes)]
    start = 0
    if layer_number(bundle) is None:  # the graph gives all layers, one after the other
        start = sum(layer.shape[1] for layer in embedder.embed_bytes(bundle.probe)[: labelled.place])
    return Examples(
        [labelled.labels[row] for row, _ in kept],
        [picture for _, picture in kept],
        labelled.embeddings[[row for row, _ in kept]],
        (start, start + labelled.embeddings.shape[1]),
        missing=len(rows) - len(kept),
    )


def _say_examples(labelled: Labelled | None, shown: Examples | None, each: int) -> None:
    if labelled is None or shown is None:
        if each:
            say("Note: The page shows no examples. To have some: --store STORE", err=True)
        return
    gone = f" {plural(shown.missing, 'picture')} of the store are gone or have changed." if shown.missing else ""
    say(
        f"Note: {plural(len(shown.labels), 'example photo')} in the file.{gone} To leave them out: --examples 0",
        err=True,
    )
    for note in labelled.notes:
        say(f"Note: {note}", err=True)


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
