"""The options of ``featx extract`` that spread it over processes and machines."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featx.errors import UsageError

if TYPE_CHECKING:
    from featx.backbones import Backbone
    from featx.extraction import ExtractSummary, Part
    from featx.images import ImageSet

_PANEL = "Many machines or devices"


class Runner(StrEnum):
    local = "local"
    ray = "ray"


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
        if devices is not None and runner is not Runner.local:
            raise UsageError("--devices is for --runner local", hint="Without it, one device is chosen by --device.")
        if runner is Runner.local and device != "auto":
            raise UsageError("--device does not go with --runner local", hint=f"Use --devices {device}.")
        if part is not None and prune:
            raise UsageError("--prune does not go with --part", hint="Give it to --finish.")
        if finish and rehash:
            raise UsageError(
                "--rehash does not go with --finish", hint="Give it to every --part: they read the images."
            )
        return cls(None if part is None else Part.parse(part), finish, runner, devices)

    @property
    def whole(self) -> bool:
        """Whether it is an ordinary extraction, by this process alone."""
        return self == Spread()

    def source(self, source: str) -> str:
        """Where the images are, in a way that other hosts understand too."""
        path = Path(source)
        return str(path.absolute()) if self.runner is Runner.ray and path.exists() else source

    def run(
        self,
        images: ImageSet,
        store: Path,
        load: Callable[[], Backbone],
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
        if self.whole:
            started = job.engine(device=device)
            return extract_features(
                images, job.backbone, store, engine=started, prune=prune, progress=progress, **options
            )
        if self.part is not None:
            return job.do(self.part, self.part.cut(images), job.engine(device=device), progress)
        if self.runner is Runner.ray:
            from featx.extraction import run_ray

            return run_ray(images, replace(job, store=store.absolute()), device=device, prune=prune, progress=progress)
        return run_local(images, job, parse_devices(self.devices or "all"), prune=prune, progress=progress)

    def folder(self, store: Path) -> Path:
        """Where this command's list of refused images is."""
        return store if self.part is None else self.part.folder(store)

    def next_step(self, store: Path, source: str, *, labelled: bool, unlabelled: Sequence[str] = ()) -> str:
        """What to do after this command."""
        if self.part is not None:
            nameless = [word for name in unlabelled for word in ("--unlabelled", name)]
            finish = shlex.join(["featx", "extract", source, "--out", str(store), *nameless, "--finish"])
            return f"when all {self.part.of} parts are done, {finish}"
        return shlex.join(["featx", "sweep" if labelled else "duplicates", str(store)])


def load(name: str, weights: str, layers: tuple[str, ...], progress: Callable[[str], None] | None = None) -> Backbone:
    """The backbone of the options; a function of texts alone, so that other processes can make the same one."""
    from featx.backbones import load_backbone, named

    return load_backbone(named(name), weights=weights, layers=layers, progress=progress)


def everywhere(text: str) -> str:
    """A file's path, or that of FILE.py:NAME, as an absolute one; other texts stay as they are."""
    path, colon, name = text.rpartition(":") if ".py:" in text else (text, "", "")
    return f"{Path(path).absolute()}{colon}{name}" if Path(path).is_file() else text
