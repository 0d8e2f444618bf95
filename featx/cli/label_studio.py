"""The command that is a machine-learning backend of Label Studio."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featx.cli.feedback import login
from featx.cli.options import (
    ApiKeyFile,
    DeviceOption,
    EngineOption,
    HostOption,
    Insecure,
    LogJson,
    MaxPixels,
    OwnBackbone,
    PortOption,
    Weights,
    extra_packages,
    network_options,
    stem,
)
from featx.cli.serve import make_refitter, read_key
from featx.cli.terminal import ProgressLine, say
from featx.errors import ImageError, UsageError

if TYPE_CHECKING:
    from featx.models import Corrections, InstantModels
    from featx.service import Model

EVERY = 10
"""Labels after which suggestions change, by default, where there is no model yet."""


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(
        "label-studio",
        epilog="Examples:  featx label-studio photos.model --store photos.featx --every 20  |  "
        "featx label-studio photos.featx --url http://127.0.0.1:8080",
    )(label_studio)


def label_studio(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL|STORE",
            help="A model that suggests labels; or, where there is none yet, the store of the photos: suggestions then "
            "follow the labels that are given.",
        ),
    ],
    url: Annotated[str, typer.Option(help="Where Label Studio is.")] = "http://127.0.0.1:8080",
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with the access token of one of its users, if it is not in FEATX_LABEL_STUDIO_TOKEN."
        ),
    ] = None,
    feedback: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep labels with their photos in this folder. (default: beside MODEL or STORE, as NAME.labels)",
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(metavar="STORE", help="The store that the model was fitted on, for --every."),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Fit again after every N labels: a model by featx refit, on evidence. (default: a model never, else "
            f"{EVERY})",
        ),
    ] = None,
    order: Annotated[
        bool,
        typer.Option(
            help="Fetch suggestions for all tasks after each new version, and set the project's prediction version to "
            "it, so that Label Studio orders tasks by uncertainty. Needs a token."
        ),
    ] = True,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST[:PORT]", help="Another host that images may be fetched from; may be given several times."
        ),
    ] = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 9090,
    api_key_file: ApiKeyFile = None,
    insecure: Insecure = False,
    max_pixels: MaxPixels = 50_000_000,
    log_json: LogJson = False,
    backbone: OwnBackbone = None,
    weights: Weights = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Suggest labels in Label Studio, order its tasks by uncertainty, and learn from the labels that are submitted.

    A backend of Label Studio for the classification of images (one Choices on an Image). Connect it there under
    Settings, Model. Images are fetched from Label Studio alone. Ctrl-C or SIGTERM ends it in order.
    """
    with extra_packages("the service", "serve"):
        import featx.service.server
    from featx.models import Corrections
    from featx.service import LabelStudio, LabelStudioHost, Limits, Repository

    key = read_key(api_key_file)
    featx.service.server.check_address(host, key, insecure=insecure)
    token = read_key(token_file, "FEATX_LABEL_STUDIO_TOKEN", "token of Label Studio")
    studio = LabelStudioHost(url, token, allow_host or ())
    is_store = source.is_dir() or source.suffix == ".h5"
    if is_store and store is not None:
        raise UsageError("--store goes with a model", where="--store", found=store)
    if every is not None and not is_store and store is None:
        raise UsageError(
            "a refit needs the store that the model was fitted on", where="--every", expected="--store STORE"
        )
    folder = feedback or source.with_name(f"{stem(source).removesuffix('.model')}.labels")
    corrections = Corrections(folder)
    options = network_options(backbone, weights, engine, device)
    instant = None
    if is_store:
        model, instant = of_store(source, corrections, options)
    else:
        more = [("--backbone", backbone), ("--weights", weights)]
        model = of_model(source, corrections, store, every, options, more)
    repository = Repository([model], Limits(body=32 * 2**20, pixels=max_pixels))
    backend = LabelStudio(repository, studio, instant=instant, every=every or EVERY, order=order)
    featx.service.server.serve(
        repository,
        host=host,
        port=port,
        api_key=key,
        insecure=insecure,
        log_json=log_json,
        label_studio=backend,
        started=lambda own: say(
            *_serving(own, source, folder, studio.url, token=bool(token), key=bool(key), is_store=is_store)
        ),
    )


def of_model(
    path: Path,
    corrections: Corrections,
    store: Path | None,
    every: int | None,
    options: dict[str, Any],
    more: Sequence[tuple[str, object]] = (),
) -> Model:
    """The current version of a model, with its labels; ``more`` are options of the refits."""
    from featx.models import Versions, open_embedder, read_bundle
    from featx.service import BATCH_SIZES, Feedback, Model

    read_bundle(path)  # before anything is written for it
    corrections.open()
    versions = Versions(corrections.folder)
    file = versions.path(versions.begin(path, login()))
    bundle = read_bundle(file)
    embedder = open_embedder(bundle, file, batch_sizes=BATCH_SIZES, **options)
    refitter = None
    if every is not None and store is not None:
        refitter = make_refitter(path, corrections, store, every, more, who="featx label-studio --every")
    return Model(bundle, embedder, None, "model", Feedback(corrections, new_classes=True, refitter=refitter))


def of_store(path: Path, corrections: Corrections, options: dict[str, Any]) -> tuple[Model, InstantModels]:
    """A model by the labels so far, and what makes the next ones."""
    from featx.backbones import of_layer
    from featx.models import InstantModels, vote
    from featx.service import BATCH_SIZES, Feedback, Model

    instant = InstantModels(path, batch_size=BATCH_SIZES, **options)
    corrections.open()
    missing = {
        corrections.folder / "images" / each.file: bytes.fromhex(each.sha256)
        for each in corrections.latest
        if instant.row(bytes.fromhex(each.sha256)) is None
    }
    with ProgressLine("embedding labelled photos") as line:
        for done, (file, found) in enumerate(instant.embedder.embed_files(missing), start=1):
            if not isinstance(found, ImageError):
                instant.add(missing[file], of_layer(found, instant.place))
            line.update(done, len(missing), "embedding labelled photos")
    bundle = instant.model(vote(corrections.latest))
    return Model(bundle, instant.embedder, None, "labels", Feedback(corrections, new_classes=True)), instant


def _serving(own: str, source: Path, folder: Path, studio: str, *, token: bool, key: bool, is_store: bool) -> list[str]:
    """What to know of a backend that has just begun, a line each."""
    what = f"the labels so far, on {source}" if is_store else str(source)
    lines = [
        f"Label Studio gets suggestions at {own} by {what}.",
        f"Connect it at {studio}: the project's Settings, Model, Connect Model.",
    ]
    if not token:
        lines.append(
            "There is no token (FEATX_LABEL_STUDIO_TOKEN): images that were uploaded to Label Studio cannot be "
            "fetched, nor labels that were given while this was off; and tasks are not ordered."
        )
    if key:
        lines.append("Label Studio must show the API key: as the password of Basic authentication, whoever the user.")
    lines.append(f"Labels are kept in {folder}; next: featx feedback {folder}")
    return [*lines, "Ctrl-C stops it."]
