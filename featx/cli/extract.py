"""The command that embeds images into a store, and its options that spread it over processes and machines."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from featx._arrays import PENULTIMATE, PIXELS
from featx._files import refuse_second_writer
from featx.cli.options import QUARANTINED, DeviceOption, EngineOption, Json
from featx.cli.terminal import ProgressLine, check_writable, print_json, say, show
from featx.errors import UsageError, plural

if TYPE_CHECKING:
    from rich.table import Table

    from featx.backbones import Backbone
    from featx.extraction import ExtractSummary, Part
    from featx.images import ImageSet

_CLASSES = 12
"""Classes that are counted by name at the end of an extraction."""

_PANEL = "Many machines or devices"


Runner = Literal["local", "ray"]
"""What does the parts of an extraction."""


PartOption = Annotated[
    str | None,
    typer.Option(
        "--part", metavar="I/N", rich_help_panel=_PANEL,
        help="Do only part I of N, such as 2/8: one task of an array job. Parts may run on any host, and be repeated.",
    ),
]  # fmt: skip
FinishOption = Annotated[
    bool,
    typer.Option("--finish", rich_help_panel=_PANEL, help="Put the parts together, or say which are missing."),
]
RunnerOption = Annotated[
    Runner | None,
    typer.Option(rich_help_panel=_PANEL, help="Do all parts and finish. local: one process for each of --devices; "
                 "ray: on the Ray cluster that runs here or that RAY_ADDRESS names."),
]  # fmt: skip
DevicesOption = Annotated[
    str | None,
    typer.Option(rich_help_panel=_PANEL, help="For --runner local: all GPUs, or 0,1, or cpu,cpu. (default: all)"),
]


RecipeName = Literal["fast", "balanced", "best"]
"""Of :data:`featx.backbones.recipes.RECIPES`."""


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(
        epilog="Examples:  featx extract photos --out photos.featx  |  featx extract photos -o s.featx --recipe best"
        "  |  featx extract list.csv -o s.featx --engine torch  |  featx extract photos -o s.featx --part 2/8"
    )(extract)


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
        list[str] | None,
        typer.Option(
            help="Network to embed with, see: featx backbones. May be repeated, and adds to what the store has. "
            "FILE.py:CLASS is one of your own; its code is run. (default: those of the store, or efficientnet_lite0)",
        ),
    ] = None,
    recipe: Annotated[
        RecipeName | None, typer.Option(help="Backbones, layers and views that go well together: featx backbones.")
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="default, none (random, as a control), or a file; of several backbones a file is given as "
            "BACKBONE=FILE, and the option may be repeated. (default: default)"
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            help="Layer to take embeddings from, of several backbones as BACKBONE/LAYER; may be repeated. "
            "(default: penultimate)"
        ),
    ] = None,
    views: Annotated[
        str | None,
        typer.Option(
            help="Views whose embeddings are averaged, such as center,flip,full. Every view takes the full time. "
            "(default: those of the store, or center)"
        ),
    ] = None,
    device: DeviceOption = "auto",
    engine: EngineOption = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16", "int8"],
        typer.Option(
            help="auto is that of the store, or else bf16 on a GPU; on a CPU int8, where it has instructions for it "
            "and the network bears it (see: featx backbones NAME), or fp32."
        ),
    ] = "auto",
    batch_size: Annotated[int | None, typer.Option(min=1, max=4096, help="(default: measured for the engine)")] = None,
    decode: Annotated[
        Literal["full", "scaled"],
        typer.Option(help="scaled decodes large JPEGs only as far as the resize needs."),
    ] = "full",
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
    group_by: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="Which images belong together: folder:N is the N-th folder of the path (folder:2 of cat/anna/1.jpg is "
            "anna); exif-day; exif-burst:SECONDS; regex:(...) on the path; column:NAME of a list; none. "
            "(default: the list's column group, or the store's rule)",
        ),
    ] = None,
    group_name: Annotated[
        str | None, typer.Option(help="What one group is, such as camera or patient. (default: as the rule says)")
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
    from featx.images import ImageSet, count_names
    from featx.store import stored_backbones

    how = Spread.of(part, finish, runner, devices, prune=prune, rehash=rehash, device=device)
    if runner == "ray" and Path(source).exists():
        source = str(Path(source).absolute())  # which other hosts understand, too
    _check_output(out, Path(source), alone=how.part is None)
    with ProgressLine("listing") as line:
        if "://" in source:
            line.say(f"Listing {source} ...")
        images = ImageSet.from_source(source, progress=line.update).without_labels(unlabelled or ())
    if group_by is not None:
        images = images.grouped(group_by, group_name)
    elif group_name is not None:
        if images.grouping is None:
            raise UsageError("--group-name names the groups of --group-by, or of a list with a column group")
        images = images.grouped(images.grouping.rule, group_name)

    asked = Asked.of(out, backbone, recipe, weights, layer, views)
    if asked.views is not None and len(asked.views) > 1:
        say(
            f"{len(asked.views)} views ({', '.join(asked.views)}): the network takes about {len(asked.views)} times as "
            "long.", err=True,
        )  # fmt: skip
    own = images if how.part is None else how.part.cut(images)
    recorded = stored_backbones(out)
    if recorded and PIXELS not in recorded and not how.finish:
        say(
            f"Note: {plural(len(own), 'photo')} will be read once more, for the thumbnails and perceptual hashes that "
            "this store does not have yet.", err=True,
        )  # fmt: skip
    with ProgressLine("embedding") as line:
        loader = partial(load, asked.networks)
        summary = how.run(
            images,
            out,
            loader if how.runner else partial(loader, progress=line.say),
            engine={"engine": engine, "batch_size": batch_size},
            device=device,
            precision=precision,
            options={
                "workers": workers,
                "decode": decode,
                "views": asked.views,
                "recipe": recipe or "",
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
    labels = [ref.label for ref in own.refs if ref.id not in refused]
    classes, nameless = count_names(labels), labels.count(None)
    if as_json:
        print_json({**summary.to_json(), "classes": classes, "unlabelled": nameless})
    rate = f", {summary.images_per_second:.0f} images/s" if summary.images_per_second else ""
    say(
        f"{plural(summary.images, 'image')}: {summary.embedded} embedded, {summary.reused - summary.copies} reused, "
        f"{plural(summary.copies, 'copy') + ', ' if summary.copies else ''}"
        f"{summary.quarantined} quarantined, in {summary.seconds:.1f} s{rate} "
        f"({' + '.join(name for name in summary.backbones if name != PIXELS or len(summary.backbones) == 1)}, "
        f"{summary.engine} on {summary.device}, {summary.precision}).",
        err=as_json,
    )
    say(_classes(classes, nameless), err=as_json)
    if profile:
        show(_stages(summary.stages, summary.embedded), err=as_json)
    for item in [each for each in summary.refused if each.reason != UNREAD][:10]:
        say(f"  refused {item.id}: {item.reason}, {item.message}", err=True)
    if summary.quarantined:
        folder = out if how.part is None else how.part.folder(out)
        say(f"All refused images: {folder / 'quarantine.jsonl'}", err=True)
    if not as_json:
        labelled = len(images.class_names) > 1
        say(f"Next: {how.next_step(out, source, labelled=labelled, unlabelled=unlabelled or ())}")
    if summary.quarantined:
        raise typer.Exit(QUARANTINED)


def _classes(classes: dict[str, int], nameless: int) -> str:
    counted = [f"{name} {n}" for name, n in list(classes.items())[:_CLASSES]]
    more = [plural(len(classes) - _CLASSES, "more class")] if len(classes) > _CLASSES else []
    without = [f"{nameless} without a label"] if nameless else []
    found = f"{plural(len(classes), 'class')}: {', '.join([*counted, *more])}" if classes else "No classes"
    return f"{'; '.join([found, *without])}."


def _stages(stages: Mapping[str, float], images: int) -> Table:
    from rich.table import Table

    table = Table("stage", "seconds", "ms an image", box=None, title="where the time went")
    for name, seconds in stages.items():
        table.add_row(name, f"{seconds:.2f}", f"{1000 * seconds / max(images, 1):.2f}")
    table.caption = "the first four are summed over the decoding processes, which run beside the rest"
    return table


def _check_output(out: Path, source: Path, *, alone: bool) -> None:
    if (source / "manifest.json").is_file():
        raise UsageError(
            "this is a store already, and no folder of photos",
            where=source,
            hint=f"Go on with it: featx sweep {source}. For another network in it, give its photos and --out {source}.",
        )
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise UsageError(
            "the store would lie inside the folder of images", where=out, hint="Choose an --out beside it, not in it."
        )
    check_writable(out)
    if alone:
        refuse_second_writer(out)


@dataclass(frozen=True)
class Spread:
    """What of an extraction this command does, and with whom."""

    part: Part | None = None
    finish: bool = False
    runner: Runner | None = None
    devices: str | None = None

    @classmethod
    def of(
        cls,
        part: str | None,
        finish: bool,
        runner: Runner | None,
        devices: str | None,
        *,
        prune: bool,
        rehash: bool,
        device: str,
    ) -> Spread:
        """The options, where they go together."""
        from featx.extraction import Part

        given = [name for name, value in (("--part", part), ("--finish", finish), ("--runner", runner)) if value]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} do not go together", hint="--runner does all parts and finishes.")
        if devices is not None and runner != "local":
            raise UsageError("--devices is for --runner local", hint="Without it, one device is chosen by --device.")
        if runner == "local" and device != "auto":
            raise UsageError("--device does not go with --runner local", hint=f"Use --devices {device}.")
        if part is not None and prune:
            raise UsageError("--prune does not go with --part", hint="Give it to --finish.")
        if finish and rehash:
            raise UsageError(
                "--rehash does not go with --finish", hint="Give it to every --part: they read the images."
            )
        return cls(None if part is None else Part.parse(part), finish, runner, devices)

    def run(
        self,
        images: ImageSet,
        store: Path,
        load: Callable[[], Sequence[Backbone]],
        *,
        engine: dict[str, Any],
        device: str,
        precision: str,
        options: dict[str, Any],
        prune: bool,
        progress: Callable[[int, int], None],
    ) -> ExtractSummary:
        """Do it."""
        from featx.backbones import make_engine
        from featx.extraction import Job, extract_features, finish_parts, parse_devices, run_local

        if self.finish:
            chosen = {name: options[name] for name in ("max_bad", "replace_images")}
            return finish_parts(images, store, prune=prune, progress=progress, **chosen)
        job = Job(store, len(images), load, partial(make_engine, **engine), precision, options)
        if self == Spread():  # an ordinary extraction, by this process alone
            return extract_features(
                images, job.backbones, store, engine=job.starter(device=device), prune=prune, progress=progress,
                **options,
            )  # fmt: skip
        if self.part is not None:
            return job.do(self.part, self.part.cut(images), job.starter(device=device), progress)
        if self.runner == "ray":
            from featx.extraction import run_ray

            return run_ray(images, replace(job, store=store.absolute()), device=device, prune=prune, progress=progress)
        return run_local(images, job, parse_devices(self.devices or "all"), prune=prune, progress=progress)

    def next_step(self, store: Path, source: str, *, labelled: bool, unlabelled: Sequence[str]) -> str:
        """What to do after this command."""
        if self.part is not None:
            nameless = [word for name in unlabelled for word in ("--unlabelled", name)]
            finish = shlex.join(["featx", "extract", source, "--out", str(store), *nameless, "--finish"])
            return f"when all {self.part.of} parts are done, {finish}"
        return shlex.join(["featx", "sweep" if labelled else "duplicates", str(store)])


Network = tuple[str, str, tuple[str, ...]]
"""Name, weights and layers of a backbone, as the options say them."""


@dataclass(frozen=True)
class Asked:
    """What embeds the images, as far as the command says; the rest is recorded in the store.

    Attributes
    ----------
    networks : backbones to start with; none where the store's own are to go on as they are.
    views : None where those of the store are to be taken.
    """

    networks: tuple[Network, ...]
    views: tuple[str, ...] | None

    @classmethod
    def of(
        cls,
        store: Path,
        backbones: list[str] | None,
        recipe: RecipeName | None,
        weights: list[str] | None,
        layers: list[str] | None,
        views: str | None,
    ) -> Asked:
        """The options, where they go together."""
        from featx.backbones import DEFAULT_BACKBONE, RECIPES
        from featx.images import parse_views
        from featx.store import stored_backbones

        looks = None if views is None else parse_views(views)
        if recipe is not None:
            given = [("--backbone", backbones), ("--layer", layers), ("--views", views), ("--weights", weights)]
            named = [name for name, value in given if value]
            if named:
                raise UsageError(
                    f"--recipe does not go with {named[0]}", hint="A recipe says backbones, weights, layers and views."
                )
            chosen = RECIPES[recipe]
            return cls(tuple((name, "default", kept) for name, kept in chosen.backbones.items()), chosen.views)
        own = next(iter(stored_backbones(store)), DEFAULT_BACKBONE)
        says_nothing = backbones is None and weights is None and layers is None
        if says_nothing and stored_backbones(store):
            return cls((), looks)
        names = backbones or [own]
        chosen_weights = _weights(names, weights or [])
        chosen_layers = _layers(names, layers or [])
        networks = tuple((everywhere(name), everywhere(chosen_weights[name]), chosen_layers[name]) for name in names)
        return cls(networks, looks)


def _weights(names: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    """The weights of each backbone: BACKBONE=WEIGHTS for it, else what is given for all, else the default ones."""
    own, every = {}, []
    for text in given:
        name, equals, weights = text.partition("=")
        if equals and name in names:
            own[name] = weights
        else:
            every.append(text)
    of_all = every[0] if every else "default"
    if len(every) > 1 or (of_all not in ("default", "none") and len(names) > 1):
        raise UsageError(
            "a file of weights is one network's", where="--weights",
            expected="BACKBONE=FILE, of a --backbone that is named", found=", ".join(every),
        )  # fmt: skip
    return {name: own.get(name, of_all) for name in names}


def _layers(names: Sequence[str], given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The layers of each backbone: those given as BACKBONE/LAYER or for all; PENULTIMATE where there are none."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for text in given:
        own = [name for name in names if text.startswith(f"{name}/")]
        if "/" in text and not own:
            raise UsageError(
                "a layer of a backbone that is not named", where="--layer",
                expected=" or ".join(f"{name}/..." for name in names), found=text,
            )  # fmt: skip
        for name in own or found:
            found[name].append(text.removeprefix(f"{name}/"))
    return {name: tuple(layers) or (PENULTIMATE,) for name, layers in found.items()}


def load(networks: tuple[Network, ...], progress: Callable[[str], None] | None = None) -> tuple[Backbone, ...]:
    """The backbones of the options; of texts alone, so that other processes can make the same ones."""
    from featx.backbones import load_backbone, named

    return tuple(
        load_backbone(named(name), weights=weights, layers=layers, progress=progress)
        for name, weights, layers in networks
    )


def everywhere(text: str) -> str:
    """A file's path, or that of FILE.py:NAME, as an absolute one; other texts stay as they are."""
    path, colon, name = text.rpartition(":") if ".py:" in text else (text, "", "")
    return f"{Path(path).absolute()}{colon}{name}" if Path(path).is_file() else text
