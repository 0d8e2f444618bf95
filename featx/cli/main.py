"""The command line: the one place that puts the parts together.

``--json`` prints exactly one JSON object on stdout, whatever happens; text for people goes to stderr then.
Exit codes: 0 done; 2 wrong usage, wrong or foreign file, mismatch; 3 done, but images were quarantined; 4 more bad
images than ``--max-bad``; 130 interrupted, resumable.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from featx._files import refuse_second_writer
from featx.cli import (
    advise as cli_advise,
    demo as cli_demo,
    finetune as cli_finetune,
    guide as cli_guide,
    labels as cli_labels,
    layers as cli_layers,
    model as cli_model,
    search as cli_search,
    sweep as cli_sweep,
    tables as cli_tabular,
)
from featx.cli.model import Device, EngineName, Json
from featx.cli.parts import DevicesOption, FinishOption, PartOption, RunnerOption, Spread, everywhere, load
from featx.cli.terminal import ProgressLine, check_writable, print_json, say, show
from featx.errors import FeatxError, Interrupted, UsageError, plural, visible

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table


QUARANTINED = 3
_INTERRUPTED = 130
_STDERR = 2
_CLASSES = 12
"""Classes that are counted by name at the end of an extraction."""

# Typer has brought click along in two ways; wherever it lives, this is the base of its usage errors.
ClickException: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    name="featx",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "From a folder of photos with few labels to a classifier you can trust.\n\n"
        "A frozen network looks at every photo once; its embeddings are kept in a store; comparing, choosing and "
        "serving heads on them takes seconds.\n\n"
        "Start with [bold]featx demo[/bold], then: [bold]featx extract photos --out photos.featx[/bold] and "
        "[bold]featx sweep photos.featx[/bold]\n\n"
        "The guide: [bold]featx guide[/bold]"
    ),
)


class Decode(StrEnum):
    full = "full"
    scaled = "scaled"


class Precision(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


StoreArgument = Annotated[Path, typer.Argument(metavar="STORE", help="A store, or a file made by featx pack.")]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"featx {installed('featx')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


@app.command(epilog="Example:  featx backbones --json")
def backbones(as_json: Json = False) -> None:
    """List the networks that can be used, and which of them work offline."""
    from featx.backbones import list_backbones

    known = list_backbones()
    if as_json:
        print_json({"backbones": [asdict(info) for info in known]})
        return
    from rich.table import Table

    table = Table("backbone", "dimensions", "parameters", "licence of the weights", "offline now", box=None)
    for info in known:
        size = f"{info.parameters / 1e6:.1f} M"
        table.add_row(info.name, str(info.embedding_dim), size, info.licence, "yes" if info.offline else "")
    show(table)
    print("\nAny timm model too, as timm:NAME. Weights of your own: --weights FILE.")
    print("A network of your own: --backbone FILE.py:CLASS (see featx guide features).")
    print("One that learns from your images alone: featx autoencoder.")


@app.command(
    epilog="Examples:  featx extract photos --out photos.featx  |  featx extract list.csv -o s.featx --engine torch"
    "  |  featx extract photos -o s.featx --part 2/8"
)
def extract(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder of class folders (train/ val/ test/ may be above them), CSV/JSONL list, tar or Parquet files, "
            "torchvision:NAME:ROOT, or an address such as s3://bucket/photos.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="STORE", help="The store: made, continued or updated.")],
    backbone: Annotated[
        str, typer.Option(help="See: featx backbones. FILE.py:CLASS is a network of your own; its code is run.")
    ] = "efficientnet_lite0",
    weights: Annotated[str, typer.Option(help="default, none (random, as a control), or a file.")] = "default",
    layer: Annotated[
        list[str] | None, typer.Option(help="Layer to take embeddings from; may be repeated. (default: penultimate)")
    ] = None,
    views: Annotated[
        str,
        typer.Option(
            help="Views whose embeddings are averaged, such as center,flip,full. Every view takes the full time."
        ),
    ] = "center",
    device: Annotated[Device, typer.Option(help="auto is cuda if there is a GPU.")] = Device.auto,
    engine: Annotated[EngineName, typer.Option(help="auto is torch on cuda, or else openvino.")] = EngineName.auto,
    precision: Annotated[
        Precision, typer.Option(help="auto is that of the store, or else fp32 on a CPU and bf16 on a GPU.")
    ] = Precision.auto,
    batch_size: Annotated[int | None, typer.Option(min=1, max=4096, help="(default: measured for the engine)")] = None,
    decode: Annotated[
        Decode, typer.Option(help="scaled decodes large JPEGs only as far as the resize needs.")
    ] = Decode.full,
    workers: Annotated[int | None, typer.Option(min=1, max=256, help="Decoding processes. (default: cores)")] = None,
    max_bad: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of images that may be refused. (default: 0.01, but at least ten)"),
    ] = None,
    unlabelled: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A folder (or label) that is not a class: its images count as unlabelled. May be repeated.",
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Let SOURCE replace most of the labelled images of the store.")
    ] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Drop embeddings that no image refers to any more.")] = False,
    rehash: Annotated[
        bool,
        typer.Option(
            "--rehash", help="Read every image again, including those whose size, times and inode have not changed."
        ),
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time went.")] = False,
    part: PartOption = None,
    finish: FinishOption = False,
    runner: RunnerOption = None,
    devices: DevicesOption = None,
    as_json: Json = False,
) -> None:
    """Embed every image of SOURCE once, into STORE.

    Run it again after adding, renaming or relabelling images: only new content is computed. An interrupted run goes
    on where it stopped.
    """
    from featx.extraction import UNREAD
    from featx.images import ImageSet, count_labels, parse_views

    how = Spread.of(part, finish, runner, devices, prune=prune, rehash=rehash, device=device.value)
    source = how.source(source)
    _check_output(out, Path(source), alone=how.part is None)
    with ProgressLine("listing") as line:
        if "://" in source:
            line.say(f"Listing {source} ...")
        images = ImageSet.from_source(source, progress=line.count).without_labels(unlabelled or ())

    looks = parse_views(views)
    if len(looks) > 1:
        say(f"{len(looks)} views ({', '.join(looks)}): the network takes about {len(looks)} times as long.", err=True)
    with ProgressLine("embedding") as line:
        layers = tuple(layer or ("penultimate",))
        loader = partial(load, everywhere(backbone), everywhere(weights), layers)
        summary = how.run(
            images,
            out,
            loader if how.runner else partial(loader, progress=line.say),
            engine={"engine": engine.value, "batch_size": batch_size},
            device=device.value,
            precision=precision.value,
            options={
                "workers": workers,
                "decode": decode.value,
                "views": looks,
                "max_bad": max_bad,
                "replace_images": replace,
                "rehash": rehash,
            },
            prune=prune,
            progress=line.update,
        )
    for note in summary.notes:
        say(f"Note: {note}.", err=True)
    refused = {item.id for item in summary.refused}
    labels = [ref.label for ref in (images if how.part is None else how.part.cut(images)).refs if ref.id not in refused]
    classes, nameless = count_labels(labels), labels.count(None)
    if as_json:
        print_json({**summary.to_json(), "classes": classes, "unlabelled": nameless})
    rate = f", {summary.images_per_second:.0f} images/s" if summary.images_per_second else ""
    say(
        f"{plural(summary.images, 'image')}: {summary.embedded} embedded, {summary.reused - summary.copies} reused, "
        f"{plural(summary.copies, 'copy') + ', ' if summary.copies else ''}"
        f"{summary.quarantined} quarantined, in {summary.seconds:.1f} s{rate} "
        f"({summary.backbone}, {summary.engine} on {summary.device}, {summary.precision}).",
        err=as_json,
    )
    say(_classes(classes, nameless), err=as_json)
    if profile:
        show(_stages(summary.stages, summary.embedded), err=as_json)
    for item in [each for each in summary.refused if each.reason != UNREAD][:10]:
        say(f"  refused {item.id}: {item.reason}, {item.message}", err=True)
    if summary.quarantined:
        say(f"All refused images: {how.folder(out) / 'quarantine.jsonl'}", err=True)
        raise typer.Exit(QUARANTINED)
    if not as_json:
        labelled = len(images.class_names) > 1
        say(f"Next: {how.next_step(out, source, labelled=labelled, unlabelled=unlabelled or ())}")


def _classes(classes: dict[str, int], nameless: int) -> str:
    counted = [f"{name} {n}" for name, n in list(classes.items())[:_CLASSES]]
    more = [plural(len(classes) - _CLASSES, "more class")] if len(classes) > _CLASSES else []
    without = [f"{nameless} without a label"] if nameless else []
    found = f"{plural(len(classes), 'class')}: {', '.join([*counted, *more])}" if classes else "No classes"
    return f"{'; '.join([found, *without])}."


@app.command(epilog="Example:  featx info photos.featx --json")
def info(store: StoreArgument, as_json: Json = False) -> None:
    """Show what a store holds: images, classes, splits, and how it was made."""
    from featx.store import info as describe

    facts = describe(store)
    if as_json:
        print_json(facts)
        return
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name in facts:
        if name in ("images", "embedding_dim", "provenance"):
            continue
        value = facts[name]
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(name, text or "none")
    show(table)


@app.command(epilog="Examples:  featx verify photos.featx  |  featx verify large.featx --sample 20")
def verify(
    store: StoreArgument,
    sample: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Check only N shards, drawn at random.")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compare every byte of a store with its checksums, and its parts with each other."""
    from featx.store import content_hash, verify as check

    with ProgressLine("verifying shards") as line:
        problems = check(store, sample=sample, random_state=seed, progress=line.update)
    if as_json:
        told = content_hash(store) if not problems and sample is None else None
        print_json({"sound": not problems, "problems": problems, "sample": sample, "content_hash": told})
    elif not problems:
        say(f"{store}: sound{'' if sample is None else ', as far as a sample of its shards shows'}.")
    for problem in problems:
        say(problem, err=True)
    if problems:
        raise typer.Exit(2)


@app.command(epilog="Example:  featx pack photos.featx photos.h5")
def pack(
    store: StoreArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT.h5", help="The file to make.")],
    as_json: Json = False,
) -> None:
    """Make one plain HDF5 file of a store, which anything that reads HDF5 can open."""
    from featx.store import pack as make

    made = make(store, out)
    if as_json:
        print_json({"path": str(made), "bytes": made.stat().st_size})
    else:
        say(f"{made}: {made.stat().st_size:,} bytes.")


def _stages(stages: Mapping[str, float], images: int) -> Table:
    from rich.table import Table

    table = Table("stage", "seconds", "ms an image", box=None, title="where the time went")
    for name, seconds in stages.items():
        table.add_row(name, f"{seconds:.2f}", f"{1000 * seconds / max(images, 1):.2f}")
    table.caption = "the first four are summed over the decoding processes, which run beside the rest"
    return table


cli_labels.register(app)
cli_layers.register(app)
cli_model.register(app)
cli_search.register(app)
cli_sweep.register(app)
cli_tabular.register(app)
cli_finetune.register(app)
cli_advise.register(app)
cli_demo.register(app, extract)
cli_guide.register(app)


# --- arguments ----------------------------------------------------------------------------------------------------


def _check_output(out: Path, source: Path, *, alone: bool) -> None:
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise UsageError(
            "the store would lie inside the folder of images", where=out, hint="Choose an --out beside it, not in it."
        )
    check_writable(out)
    if alone:
        refuse_second_writer(out)


# --- the end ------------------------------------------------------------------------------------------------------


def _fail(message: str, code: int) -> NoReturn:
    say(f"Error: {message}", err=True)
    if "--json" in sys.argv[1:]:
        print_json({"error": message, "exit_code": code})
    sys.stdout.flush()
    raise SystemExit(code)


def _terminate(number: int, frame: object) -> None:
    # One way to stop: SIGTERM (schedulers, systemd) does what Ctrl-C does.
    raise KeyboardInterrupt


def _by_ctrl_c(error: BaseException) -> bool:
    """Whether an error was made of a Ctrl-C: an extension module that is just being imported says ImportError."""
    cause = error.__cause__
    return cause is not None and (isinstance(cause, KeyboardInterrupt) or _by_ctrl_c(cause))


def main() -> None:
    """Entry point of ``featx``."""
    faulthandler.enable(_STDERR)  # a crash in a library's native code says where
    signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, TextIOWrapper):
        # A file name that is no text must not end the output; in JSON the escape even means the same.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False)
    except ClickException as error:
        error.message = visible(error.message or "", keep="\n\t")
        error.show()
        if "--json" in sys.argv[1:]:
            print_json({"error": error.format_message(), "exit_code": 2})
        code = 2
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if isinstance(error, Interrupted) or not _by_ctrl_c(error):
            if isinstance(error, FeatxError):
                _fail(str(error), error.exit_code)
            raise
        code = _INTERRUPTED
    if code == _INTERRUPTED:  # Typer makes an exit code, or an error, of Ctrl-C, as its version has it
        _fail("interrupted; run the same command again.", _INTERRUPTED)
    raise SystemExit(code if isinstance(code, int) else 0)
