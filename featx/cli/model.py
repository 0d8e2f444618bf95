"""The commands about a kept head: fit, predict, export, serve."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zipfile import is_zipfile

import typer

from featx._arrays import COMBINED
from featx.cli.terminal import MODEL_MARK, ProgressLine, check_file, check_writable, print_json, say, show
from featx.errors import ImageError, UsageError, one_line, plural

if TYPE_CHECKING:
    from featx.backbones import Own
    from featx.cli.sorting import Sorted
    from featx.extraction import Embedder
    from featx.models import Bundle, Pickled

REFUSED = 3
_STDIN = Path("-")
_CSV_COLUMNS = ("id", "label", "score", "score_kind", "abstain", "refused")
_CSV_MARK = ",".join(_CSV_COLUMNS).encode()
_MAX_STDIN = 2**30

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="A file made by featx fit.")]
Weights = Annotated[
    Path | None, typer.Option(help="The weights file, if the features were made with weights of your own.")
]


OwnBackbone = Annotated[
    str | None,
    typer.Option(
        "--backbone",
        metavar="FILE.py:CLASS",
        help="The network, if it is one of your own. Its code runs only when you name it here.",
    ),
]


class EngineName(StrEnum):
    auto = "auto"
    torch = "torch"
    openvino = "openvino"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Unlabelled = Annotated[
    bool, typer.Option("--unlabelled", help="Let heads also learn from the unlabelled images of the store.")
]
UnlabelledFrom = Annotated[
    Path | None,
    typer.Option(
        metavar="STORE", help="Let heads also learn from all images of this store; their labels are not read."
    ),
]
EngineOption = Annotated[EngineName, typer.Option(help="auto is torch on cuda, or else openvino.")]
DeviceOption = Annotated[Device, typer.Option(help="auto is cuda if there is a GPU.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(epilog="Example:  featx fit photos.featx --out photos.model")(fit)
    app.command(
        epilog="Examples:  featx predict photos.model new/*.jpg  |  cat a.jpg | featx predict photos.model - --json"
    )(predict)
    app.command(epilog="Example:  featx export photos.model --format joblib --out photos.joblib")(export)
    app.command(epilog="Example:  featx serve photos.model --store photos.featx")(serve)


def fit(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A store, or a file made by featx pack.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="MODEL", help="The file to make.")],
    head: Annotated[
        str, typer.Option(help="A head, several heads separated by commas, or all; the best one is taken.")
    ] = "auto",
    layer: Annotated[
        str | None,
        typer.Option(help="Which of the store's layers. (default: all combined, where that is measured to help)"),
    ] = None,
    max_error: Annotated[
        float, typer.Option(help="Share of answers that may be wrong; the model abstains to keep it.")
    ] = 0.05,
    unlabelled: Unlabelled = False,
    unlabelled_from: UnlabelledFrom = None,
    backbone: OwnBackbone = None,
    weights: Weights = None,
    engine: EngineOption = EngineName.auto,
    device: Annotated[
        Device,
        typer.Option(
            help="Device of the network; auto is cuda if there is a GPU. cuda also fits logreg on very many images."
        ),
    ] = Device.auto,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    as_json: Json = False,
) -> None:
    """Choose a head, calibrate it on images it has not seen, refit it on all images, and keep it in one file."""
    if device == Device.cuda:
        let_scipy_take_tensors()
    import numpy as np

    from featx.extraction import Embedder
    from featx.heads import heads_for, open_layers, unlabelled_centre, unlabelled_rows
    from featx.models import fit_bundle, summary, write_bundle

    check_file(out, MODEL_MARK, example="photos.model")
    head, layer = _head_on(head, layer)
    pooled = unlabelled or unlabelled_from is not None
    features, columns, on = open_layers(store, layer, one=pooled)
    if layer is not None and len(on) > 1:
        raise UsageError("a model is on one layer, or on combined", where="--layer", found=layer)
    pool = None
    if unlabelled or unlabelled_from:
        own = np.flatnonzero(features.splits != "test") if unlabelled else np.arange(0)
        pool = unlabelled_rows(features, own, unlabelled_from)
    catalogue = heads_for(None if pool is None else unlabelled_centre(pool), pool)
    heads = tuple(catalogue) if head == "all" else tuple(name.strip() for name in head.split(",") if name.strip())
    if not heads:
        raise UsageError("--head is empty", expected="a name, names separated by commas, auto or all")
    for name in heads:
        catalogue[name]
    embedder = Embedder.like(
        features.provenance,
        where=store,
        backbone=own_network(backbone),
        weights=weights,
        engine=engine.value,
        device=device.value,
    )
    with ProgressLine("fitting") as line:
        bundle = fit_bundle(
            features, embedder, heads=heads, max_error=max_error, random_state=seed, pool=pool,
            layers=columns if features.layer == COMBINED else None,
            device="cuda" if device == Device.cuda else None, progress=line.update,
        )  # fmt: skip
    write_bundle(bundle, out)
    if as_json:
        print_json(summary(bundle, out))
    tell_model(bundle, out, err=as_json, how=AUTO if head == "auto" else "")


AUTO = "the recommended head, which --head auto takes without comparing others; featx sweep compares them"
"""How a head was chosen that nobody named."""


def let_scipy_take_tensors() -> None:
    """What :mod:`featx.heads.solvers.device` needs. SciPy looks once, when it is first imported: no command has done it
    yet."""
    os.environ["SCIPY_ARRAY_API"] = "1"


def tell_model(bundle: Bundle, out: Path, *, err: bool, how: str = "") -> None:
    """Say what a model that was just made is worth, and ``how`` its head was chosen; on stderr if ``err``."""
    for note in dict.fromkeys(bundle.notes):
        say(f"Note: {note}", err=True)
    say(*_story(bundle, how), err=err)
    say(f"Model: {out}", err=err)
    if not err:
        say(f"Next: {shlex.join(['featx', 'predict', str(out), 'photo.jpg'])}")


def own_network(name: str | None) -> Own | None:
    """The user's network that ``--backbone`` names; any other is what the store or the model says."""
    from featx.backbones import import_provider, is_own

    if name is None:
        return None
    if not is_own(name):
        raise UsageError("not a network of your own", where="--backbone", expected="FILE.py:CLASS", found=name)
    return import_provider(name)


def _head_on(head: str, layer: str | None) -> tuple[str, str | None]:
    """``HEAD@LAYER``, as a sweep calls it, in its two parts."""
    pairs = [name.partition("@") for name in head.split(",")]
    named = {where.strip() for _, at, where in pairs if at}
    if not named:
        return head, layer
    if len(named) > 1 or not all(at for _, at, _ in pairs) or (layer is not None and {layer} != named):
        raise UsageError("several heads are compared on one layer", where="--head", found=head)
    return ",".join(name for name, _, _ in pairs), named.pop()


_CLASSES_TOLD = 12


def _story(bundle: Bundle, how: str = "") -> list[str]:
    from featx.evaluation import Interval, percent
    from featx.models import by_recall

    metrics: Any = bundle.metrics
    params = ", ".join(f"{name} {value}" for name, value in bundle.params.items())
    images = plural(metrics["images"], "image")
    if metrics.get("duplicates"):
        images += f", {metrics['duplicates']} of them {'a copy' if metrics['duplicates'] == 1 else 'copies'},"
    counted = f"{images} of {plural(metrics['classes'], 'class')}"
    lines = [f"{bundle.head} ({params}) on {counted}{how and f': {how}'}."]
    rivals = len(metrics.get("chosen_among") or ())
    unseen = f"On images that the fit, but not the choice among {rivals} heads, had not seen"
    for key, where in (
        ("out_of_fold", unseen if rivals else "On images it had not seen"),
        ("test", "On the split test"),
    ):
        found = metrics.get(key)
        if found:
            error = found["error_among_answered"]
            wrong = "" if error is None else f", {100 * error:.1f} % of these answers wrong"
            lines.append(
                f"{where}: accuracy {percent(Interval(**found['accuracy']))}, "
                f"macro-F1 {100 * found['macro_f1']:.1f} %, calibration error {100 * found['ece']:.1f} %; "
                f"answers {100 * found['answered']:.1f} %{wrong}."
            )
            classes = by_recall(found)
            recalls = [
                f"{name} {100 * each['recall']:.1f} % of {each['images']}" for name, each in classes[:_CLASSES_TOLD]
            ]
            rest = len(classes) - len(recalls)
            more = f", and {rest} better ones (--json lists all)" if rest else ""
            lines.append(f"  Recognised of each class: {', '.join(recalls)}{more}.")
    if bundle.threshold is not None:
        lines.append(f"Abstains below a probability of {bundle.threshold:.3f} (--max-error {bundle.max_error:g}).")
    return lines


def predict(
    model: ModelArgument,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Files, folders, or - for an image on standard input.")
    ],
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
            "_unsure. Existing files are never replaced.",
        ),
    ] = None,
    backbone: OwnBackbone = None,
    weights: Weights = None,
    engine: EngineOption = EngineName.auto,
    device: DeviceOption = Device.auto,
    as_json: Json = False,
) -> None:
    """Say what is on photos: label, probability, and whether the model is unsure.

    In a pipe, the output is one line per image with tabs between image, label, score and "abstains".
    """
    if csv is not None:
        check_file(csv, _CSV_MARK, example="answers.csv")
    if sort_into is not None:
        check_writable(sort_into)
        if _STDIN in images:
            raise UsageError("an image on standard input has no name to keep", where="--sort-into")
    with tempfile.TemporaryDirectory(prefix="featx-") as folder:
        named = _name_files(images, Path(folder))
        from featx.models import predict_files

        kept, embedder, layer = _open(model, backbone, weights, engine, device, pickled=allow_pickle)
        predictions: list[dict[str, Any]] = []
        refused: list[dict[str, Any]] = []
        paths = [path for _, path in named]
        with ProgressLine("predicting") as line:
            found = predict_files(kept, embedder, layer, paths)
            for (name, _), (_, answer) in zip(named, found, strict=True):
                if isinstance(answer, ImageError):
                    refused.append({"id": name, "reason": answer.reason, "message": answer.what})
                else:
                    predictions.append({"id": name, **answer.to_json()})
                line.update(len(predictions) + len(refused), len(named))
    filed = None if sort_into is None else _sort_into(sort_into, dict(named), predictions, kept.class_names)
    if csv is not None:
        _write_csv(csv, predictions, refused, kept.class_names)
    if as_json:
        told: dict[str, Any] = {"predictions": predictions, "refused": refused}
        if filed is not None:
            told["sorted"] = {"folder": str(sort_into), "copied": filed.copied, "already_there": filed.there}
        print_json(told)
    elif sys.stdout.isatty():
        _table(predictions, kept.score_kind)
    else:
        for each in predictions:
            say("\t".join([*map(one_line, (each["id"], each["label"])), f"{each['score']:.3f}", _doubt(each)]))
    if kept.silence:
        say(f"Note: {kept.silence}", err=True)
    for item in refused:
        say(f"  refused {one_line(item['id'])}: {item['reason']}, {item['message']}", err=True)
    if filed is not None:
        into = ", ".join(f"{name} {count}" for name, count in filed.copied.items())
        there = f"; {filed.there} already there" if filed.there else ""
        say(f"Copied into {sort_into}: {into or 'nothing'}{there}.", err=True)
    if csv is not None:
        say(f"CSV: {csv}", err=True)
    if refused:
        say_refused(len(refused), len(named))
        raise typer.Exit(REFUSED)


def say_refused(count: int, of: int) -> None:
    """Say how many images were refused, below the reasons."""
    counted = "the image" if of == 1 else "none of the images" if count == of else f"{count} of {plural(of, 'image')}"
    say(f"Error: {counted} could {'not ' if of == 1 or count < of else ''}be read.", err=True)


def _open(
    model: Path, backbone: str | None, weights: Path | None, engine: EngineName, device: Device, *, pickled: bool
) -> tuple[Bundle | Pickled, Embedder, int | None]:
    """A bundle (or, where it is asked for, a pickled export), its network, and the layer that it is on."""
    from featx.extraction import Embedder
    from featx.models import layer_number, open_embedder, read_bundle

    options: dict[str, Any] = {
        "backbone": own_network(backbone),
        "weights": weights,
        "engine": engine.value,
        "device": device.value,
    }
    if pickled and not is_zipfile(model):
        from featx.models import Pickled

        loaded = Pickled.load(model)
        return loaded, Embedder.like(loaded.provenance, where=model, **options), loaded.layer
    bundle = read_bundle(model)
    return bundle, open_embedder(bundle, model, **options), layer_number(bundle)


class ExportFormat(StrEnum):
    joblib = "joblib"
    skops = "skops"
    onnx = "onnx"


_EXPORT_MARKS = {"joblib": b"sklearn", "skops": b"schema.json", "onnx": b"embedding"}


def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to make.")],
    form: Annotated[ExportFormat, typer.Option("--format", help="joblib is a pickle; skops is not; onnx is a graph.")],
    as_json: Json = False,
) -> None:
    """Write the head for other software: a scikit-learn pipeline or an ONNX graph, which takes embeddings."""
    from featx.models import export_bundle, read_bundle

    check_file(out, _EXPORT_MARKS[form.value], example=f"photos.{form.value}")
    export_bundle(read_bundle(model), out, form.value)
    if as_json:
        print_json({"path": str(out), "format": form.value, "bytes": out.stat().st_size})
    say(f"{out}: {out.stat().st_size:,} bytes, takes embeddings.", err=as_json)


def serve(
    model: ModelArgument,
    store: Annotated[
        Path | None,
        typer.Option(help="The store that the model was fitted on: answers then show the nearest labelled images."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="The folder of the store's images, for the page. (default: what the store says)")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any other than this machine's own needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with the API key, if it is not in FEATX_API_KEY.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Answer anyone who can reach the address.")] = False,
    max_images: Annotated[int, typer.Option(min=1, max=10_000, help="Images that one request may have.")] = 64,
    max_pixels: Annotated[int, typer.Option(min=4, help="Larger images are refused by their header.")] = 50_000_000,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log lines as JSON.")] = False,
    backbone: OwnBackbone = None,
    weights: Weights = None,
    engine: EngineOption = EngineName.auto,
    device: DeviceOption = Device.auto,
) -> None:
    """Serve a model over HTTP, with a page to drop photos on. Ctrl-C or SIGTERM ends it in order."""
    try:
        import featx.service.server
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("featx"):
            raise
        raise UsageError(
            f"the service needs packages that are not installed ({error.name})",
            hint="Install them with: pip install 'featx[serve]'",
        ) from error
    from featx.models import open_embedder, read_bundle
    from featx.service import BATCH_SIZES, Evidence, Limits, Service

    key = _api_key(api_key_file)
    featx.service.server.check_address(host, key, insecure=insecure)
    bundle = read_bundle(model)
    evidence = None if store is None else Evidence(store, bundle, images)
    for note in [*([bundle.silence] if bundle.silence else []), *(evidence.notes if evidence else [])]:
        say(f"Note: {note}", err=True)
    embedder = open_embedder(
        bundle,
        model,
        backbone=own_network(backbone),
        weights=weights,
        engine=engine.value,
        device=device.value,
        batch_sizes=BATCH_SIZES,
    )
    featx.service.server.serve(
        Service(
            bundle,
            embedder,
            evidence,
            Limits(pixels=max_pixels, images=max_images, queue=max(Limits.queue, max_images)),
        ),
        host=host,
        port=port,
        api_key=key,
        insecure=insecure,
        log_json=log_json,
        started=lambda url: say(*_serving(url, model, bundle, store, api_key_file, key=bool(key), insecure=insecure)),
    )


def _serving(
    url: str, model: Path, bundle: Bundle, store: Path | None, key_file: Path | None, *, key: bool, insecure: bool
) -> list[str]:
    """What to know of a service that has just begun, a line each."""
    alike = "" if store is None else f", and what looks alike in {store}"
    lines = [
        f"Open {url} in a browser; {url}/docs is for programs.",
        f"It serves {model} ({plural(len(bundle.class_names), 'class')}){alike}.",
    ]
    if key:
        lines.append(f"Who asks must show the API key that is in {key_file or 'FEATX_API_KEY'}.")
    elif insecure:
        lines.append("Everybody who can reach this address may ask, without a key (--insecure).")
    return [*lines, "Ctrl-C stops it."]


def _api_key(file: Path | None) -> str:
    """From a file or the environment, never from the arguments, which every user of a machine can read."""
    if file is None:
        return os.environ.get("FEATX_API_KEY", "").strip()
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the API key cannot be read", where=file) from error
    if not key:
        raise UsageError("the API key is empty", where=file)
    return key


def _name_files(images: list[Path], folder: Path) -> list[tuple[str, Path]]:
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


def _doubt(prediction: dict[str, Any]) -> str:
    return "abstains" if prediction["abstain"] else ""


def _table(predictions: list[dict[str, Any]], kind: str) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("image", "label", "ahead of the next by" if kind == "margin" else kind, "", box=None)
    for each in predictions:
        name, label = Text(one_line(each["id"]), overflow="fold"), Text(one_line(each["label"]))
        table.add_row(name, label, f"{each['score']:.3f}", _doubt(each))
    if predictions:
        show(table)


def _write_csv(
    path: Path, predictions: list[dict[str, Any]], refused: list[dict[str, Any]], class_names: Sequence[str]
) -> None:
    from csv import DictWriter
    from io import StringIO

    from featx._files import publish_bytes

    columns = [f"probability of {name}" for name in class_names]
    text = StringIO()
    writer = DictWriter(text, [*_CSV_COLUMNS, *columns], lineterminator="\n")
    writer.writeheader()
    for each in predictions:
        row = {name: each[name] for name in _CSV_COLUMNS if name in each}
        shares = {f"probability of {name}": share for name, share in each["probabilities"].items()}
        writer.writerow({**row, **shares, "abstain": "yes" if each["abstain"] else "no"})
    for each in refused:
        writer.writerow({"id": each["id"], "refused": f"{each['reason']}: {each['message']}"})
    publish_bytes(path, text.getvalue().encode(errors="backslashreplace"))


def _sort_into(
    folder: Path, paths: dict[str, Path], predictions: list[dict[str, Any]], class_names: Sequence[str]
) -> Sorted:
    from featx.cli.sorting import sort_into

    photos = [(paths[each["id"]], None if each["abstain"] else each["label"]) for each in predictions]
    with ProgressLine("copying") as line:
        return sort_into(folder, photos, class_names, progress=lambda done: line.update(done, len(photos)))
