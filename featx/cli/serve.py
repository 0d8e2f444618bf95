"""The command that serves a model over HTTP."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featx.cli.options import (
    Device,
    DeviceOption,
    EngineName,
    EngineOption,
    ModelArgument,
    OwnBackbone,
    Weights,
    own_network,
)
from featx.cli.terminal import say
from featx.errors import UsageError, plural

if TYPE_CHECKING:
    from featx.models import Bundle


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(epilog="Example:  featx serve photos.model --store photos.featx")(serve)


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
    for note in [*bundle.cautions, *(evidence.notes if evidence else [])]:
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
            name=re.sub(r"[^A-Za-z0-9_.-]", "-", model.name.removesuffix(".model")) or "model",
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
