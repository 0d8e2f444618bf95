"""The command that serves a model over HTTP."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    own_network,
)
from featx.cli.terminal import say
from featx.errors import UsageError, in_words, plural

if TYPE_CHECKING:
    from featx.extraction import Embedder
    from featx.models import Bundle, Corrections
    from featx.service import Refitter

_NAMED = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]{0,99})=(.+)", re.DOTALL)


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(
        epilog="Examples:  featx serve photos.model --store photos.featx  |  featx serve photos.model --counts counts"
    )(serve)


def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]MODEL...",
            help="Files made by featx fit. Several models are addressed by NAME; by default the file's name.",
        ),
    ],
    store: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]STORE",
            help="The store that the model was fitted on: answers then show the nearest labelled images. "
            "With several models, NAME says whose store it is; may be given for each.",
        ),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FOLDER",
            help="The folder of the store's images, for the page. (default: what the store says)",
        ),
    ] = None,
    feedback: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="Keep corrections of answers in this folder, and answer with the current version of the model in it "
            "(featx refit, featx models). With several models, NAME says whose folder it is.",
        ),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Run featx refit after every N corrections, with the store of --store. (default: never)",
        ),
    ] = None,
    new_classes: Annotated[
        bool, typer.Option("--new-classes", help="Let corrections name classes that the model does not know.")
    ] = False,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    api_key_file: ApiKeyFile = None,
    insecure: Insecure = False,
    max_images: Annotated[int, typer.Option(min=1, max=10_000, help="Images that one request may have.")] = 64,
    max_pixels: MaxPixels = 50_000_000,
    log_json: LogJson = False,
    counts: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Count answers by the hour in this folder: labels, abstentions, familiarity; no photo and no name. "
            "featx drift DIR then says whether photos have changed.",
        ),
    ] = None,
    backbone: OwnBackbone = None,
    weights: Weights = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Serve models over HTTP, with a page to drop photos on. Ctrl-C or SIGTERM shuts it down cleanly.

    Several models get a queue each and take turns; those that were fitted on the same features share their network.
    """
    with extra_packages("the service", "serve"):
        import featx.service.server
    from featx.backbones import is_own
    from featx.models import Corrections, Versions, open_embedder, read_bundle
    from featx.service import BATCH_SIZES, Counts, Evidence, Feedback, Limits, Model, Repository
    from featx.store import backbones_of, name_of

    key = read_key(api_key_file)
    featx.service.server.check_address(host, key, insecure=insecure)
    files = _by_name(models)
    stores, folders = (_belonging(each, files, option) for each, option in ((store, "--store"), (images, "--images")))
    kept = _belonging(feedback, files, "--feedback")
    for option, given in (("--new-classes", new_classes), ("--every", every is not None)):
        if given and not kept:
            raise UsageError(
                "corrections are not kept", where=option, hint="Name a folder for them with --feedback DIR."
            )
    if len({path.resolve() for path in kept.values()}) < len(kept):
        raise UsageError("two models cannot share a feedback folder", where="--feedback")
    corrections = {name: Corrections(path) for name, path in kept.items()}
    without_store = [name for name in kept if name not in stores]
    if every is not None and without_store:
        raise UsageError(
            "a refit needs the store that the model was fitted on", where="--every", expected="--store STORE",
            found=f"none for {', '.join(without_store)}",
        )  # fmt: skip
    for each in corrections.values():
        each.open()
    named = dict(files)
    for name, folder in kept.items():
        versions = Versions(folder)
        files[name] = versions.path(versions.begin(files[name], login()))
    bundles = {name: read_bundle(path) for name, path in files.items()}
    evidence = {name: Evidence(path, bundles[name], folders.get(name)) for name, path in stores.items()}
    for name, bundle in bundles.items():
        of = f"{name}: " if len(files) > 1 else ""
        for note in [*bundle.cautions, *(evidence[name].notes if name in evidence else [])]:
            say(f"Note: {of}{note}", err=True)
    counting = None if counts is None else Counts(counts).open()
    opened: dict[str, Embedder] = {}
    served = []
    for name, bundle in bundles.items():
        # What one of several models needs is not for the others.
        alone, networks = len(files) == 1, backbones_of(bundle.provenance)
        own_name = alone or any(is_own(name_of(each)) for each in networks)
        own_weights = alone or any(each.get("weights") not in ("default", "none") for each in networks)
        embedder = open_embedder(
            bundle,
            files[name],
            backbone=own_network(backbone) if own_name else None,
            weights=weights if own_weights else None,
            engine=engine,
            device=device,
            batch_sizes=BATCH_SIZES,
            opened=opened,
        )
        own = None
        if name in kept:
            refitter = None
            if every is not None:
                more = [("--backbone", backbone), ("--weights", weights)]
                refitter = make_refitter(named[name], corrections[name], stores[name], every, more)
            own = Feedback(corrections[name], new_classes=new_classes, refitter=refitter)
        served.append(Model(bundle, embedder, evidence.get(name), name, own))
    featx.service.server.serve(
        Repository(served, Limits(pixels=max_pixels, images=max_images, queue=max(Limits.queue, max_images)), counting),
        host=host,
        port=port,
        api_key=key,
        insecure=insecure,
        log_json=log_json,
        started=lambda url: say(
            *_serving(
                url,
                named,
                bundles,
                stores,
                api_key_file,
                key=bool(key),
                insecure=insecure,
                feedback=[*kept.values()],
                counts=counts,
            )
        ),
    )


def make_refitter(
    model: Path, corrections: Corrections, store: Path, every: int, more: Sequence[tuple[str, object]],
    who: str = "featx serve --every",
) -> Refitter:  # fmt: skip
    """What runs ``featx refit`` after so many corrections, those before the start among them."""
    from featx.models import Versions
    from featx.service import Refitter

    command = [sys.executable, "-m", "featx", "refit", str(model), "--feedback", str(corrections.folder)]
    command += ["--store", str(store), "--who", who]
    command += [str(each) for pair in more if pair[1] is not None for each in pair]
    considered = Versions(corrections.folder).considered
    return Refitter(command, every, max(0, len(corrections) - considered))


def _named(text: str) -> tuple[str, Path]:
    """The name and the path of NAME=PATH; "" where there is no name. What exists as it is written, is a path."""
    match = _NAMED.fullmatch(text)
    return ("", Path(text)) if match is None or Path(text).exists() else (match[1], Path(match[2]))


def _by_name(models: Sequence[str]) -> dict[str, Path]:
    """The files of the models, by the names that they answer to."""
    found: dict[str, Path] = {}
    for name, path in map(_named, models):
        name = name or re.sub(r"[^A-Za-z0-9_.-]", "-", path.name.removesuffix(".model")) or "model"
        if name in found:
            raise UsageError(
                "two models have the same name",
                expected="a name for each",
                found=f"{name}, of {found[name]} and of {path}",
                hint=f"Give one of them another: NAME={path}",
            )
        found[name] = path
    return found


def _belonging(given: Sequence[str] | None, models: Mapping[str, Path], option: str) -> dict[str, Path]:
    """What an option gives to models, by their names; where there is only one, it need not be named."""
    found: dict[str, Path] = {}
    for name, path in map(_named, given or ()):
        name = name or (next(iter(models)) if len(models) == 1 else "")
        if name not in models or name in found:
            raise UsageError(
                "given twice for one model" if name in found else "for none of the models",
                where=option,
                expected=f"NAME={path}, with a NAME of {', '.join(models)}",
                found=f"{name}={path}" if name else str(path),
            )
        found[name] = path
    return found


def _serving(
    url: str,
    files: Mapping[str, Path],
    bundles: Mapping[str, Bundle],
    stores: Mapping[str, Path],
    key_file: Path | None,
    *,
    key: bool,
    insecure: bool,
    counts: Path | None = None,
    feedback: Sequence[Path] = (),
) -> list[str]:
    """What to know of a service that has just begun, a line each."""
    lines = [f"Open {url} in a browser; {url}/docs is for programs."]
    for name, path in files.items():
        alike = f", and similar images from {stores[name]}" if name in stores else ""
        at = f" at {url}/predict?model={name}" if len(files) > 1 else ""
        lines.append(f"It serves {path} ({plural(len(bundles[name].class_names), 'class')}){alike}{at}.")
    if key:
        lines.append(f"Requests need the API key that is in {key_file or 'FEATX_API_KEY'}.")
    elif insecure:
        lines.append("Anyone who can reach this address can use it without a key (--insecure).")
    if counts is not None:
        lines.append(f"It counts its answers in {counts}; to see whether photos have changed: featx drift {counts}")
    lines += [f"Corrections are kept in {path}; next: featx feedback {path}" for path in feedback]
    return [*lines, "Ctrl-C stops it."]


def read_key(file: Path | None, variable: str = "FEATX_API_KEY", what: str = "API key") -> str:
    """From a file or the environment, never from the arguments, which every user of a machine can read."""
    if file is None:
        return os.environ.get(variable, "").strip()
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = in_words(error) if isinstance(error, OSError) else "it is not text in UTF-8"
        raise UsageError(f"the {what} cannot be read ({why})", where=file) from error
    if not key:
        raise UsageError(f"the {what} is empty", where=file, hint="Write it into this file, in one line.")
    return key
