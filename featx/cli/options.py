"""What several commands have in common: shared options, exit codes, and what goes with them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from featx.cli.terminal import say
from featx.errors import UsageError, one_line, plural

if TYPE_CHECKING:
    from featx.backbones import Own

QUARANTINED = 3
"""Exit code: done, but some images were refused."""


Device = Literal["auto", "cpu", "cuda"]
"""Where the network runs."""


StoreArgument = Annotated[Path, typer.Argument(metavar="STORE", help="A store, or a file made by featx pack.")]
ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="A file made by featx fit.")]
ImagesArgument = Annotated[
    list[Path], typer.Argument(metavar="IMAGE...", help="Files, folders, or - for an image on standard input.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random draw.")]
Jobs = Annotated[int | None, typer.Option(min=1, max=1024, help="Parallel workers. (default: cores)")]
SourceOption = Annotated[
    str | None, typer.Option(help="Where the images of the store are, for the sheet. (default: as at extraction)")
]
EngineOption = Annotated[
    Literal["auto", "torch", "openvino"], typer.Option(help="auto is torch on cuda, or else openvino.")
]
DeviceOption = Annotated[Device, typer.Option(help="auto is cuda if there is a GPU.")]
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


Unlabelled = Annotated[
    bool, typer.Option("--unlabelled", help="Let heads also learn from the unlabelled images of the store.")
]
UnlabelledFrom = Annotated[
    Path | None,
    typer.Option(
        metavar="STORE", help="Let heads also learn from all images of this store; their labels are not read."
    ),
]


PriorOption = Annotated[
    str,
    typer.Option(
        "--prior",
        metavar="as-is|equal|FILE",
        help="How often each class will occur: as often as it was labelled, all equally often, or by the shares in "
        "a file (CSV with class,share, or JSON). All promises are then about such photos.",
    ),
]


MaxError = Annotated[
    float,
    typer.Option(help="Share of answers that may be wrong, on photos like the model's; it abstains to stay below it."),
]
MaxUnknown = Annotated[
    float,
    typer.Option(
        help="Share of photos like the model's that may be called unknown, so that other photos are; 0: none at all."
    ),
]


HostOption = Annotated[
    str, typer.Option(help="Address to listen on; any other than this machine's own needs an API key.")
]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")]
ApiKeyFile = Annotated[Path | None, typer.Option(help="A file with the API key, if it is not in FEATX_API_KEY.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Answer anyone who can reach the address.")]
MaxPixels = Annotated[int, typer.Option(min=4, help="Larger images are refused before they are decoded.")]
LogJson = Annotated[bool, typer.Option("--log-json", help="Log lines as JSON.")]


def own_network(name: str | None) -> Own | None:
    """The user's network that ``--backbone`` names; any other is what the store or the model says."""
    from featx.backbones import import_provider, is_own

    if name is None:
        return None
    if not is_own(name):
        raise UsageError("not a network of your own", where="--backbone", expected="FILE.py:CLASS", found=name)
    return import_provider(name)


def network_options(backbone: str | None, weights: Path | None, engine: str, device: str) -> dict[str, Any]:
    """What ``--backbone``, ``--weights``, ``--engine`` and ``--device`` say, as ``Embedder.like`` takes it."""
    return {"backbone": own_network(backbone), "weights": weights, "engine": engine, "device": device}


@contextmanager
def extra_packages(who: str, extras: str) -> Iterator[None]:
    """UsageError if what is imported here needs packages of ``extras`` that are not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("featx"):
            raise
        raise UsageError(
            f"{who} needs packages that are not installed ({error.name})",
            hint=f"Install them with: pip install 'featx[{extras}]'",
        ) from error


def let_scipy_take_tensors() -> None:
    """Set what :mod:`featx.heads.solvers.device` needs.

    SciPy looks once, when it is first imported: no command has done it yet.
    """
    os.environ["SCIPY_ARRAY_API"] = "1"


def stem(store: Path) -> str:
    """The name that files beside a store begin with."""
    return store.name.removesuffix(".featx").removesuffix(".h5")


def end_refused(refused: Sequence[dict[str, Any]], of: int) -> None:
    """Say which images were refused and why, and end the command, if any were.

    Parameters
    ----------
    refused : of each its name, the code of the reason, and the reason in words.
    of : how many images there were.
    """
    if not refused:
        return
    for name, reason, message in (each.values() for each in refused):
        say(f"  refused {one_line(name)}: {reason}, {message}", err=True)
    count = len(refused)
    counted = "the image" if of == 1 else "none of the images" if count == of else f"{count} of {plural(of, 'image')}"
    say(f"Error: {counted} could {'not ' if of == 1 or count < of else ''}be read.", err=True)
    raise typer.Exit(QUARANTINED)
