"""The command that shows the main job, on images that are already there."""

from __future__ import annotations

import json
import shlex
import time
import webbrowser
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featx.cli.options import Json, Seed
from featx.cli.terminal import check_writable, print_json, say, show

if TYPE_CHECKING:
    from rich.table import Table

    from featx.cli.demo_images import Job

EPISODES = 10


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(epilog="Examples:  featx demo  |  featx demo --open")(demo)


def demo(
    context: typer.Context,
    folder: Annotated[Path, typer.Option(help="Where images, stores, report and model go.")] = Path("data/demo"),
    open_report: Annotated[bool, typer.Option("--open", help="Open the report in the browser at the end.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Do the main job, offline: on photographs, where the network helps, and on digits, where it does not."""
    started = time.monotonic()
    check_writable(folder)
    from featx.cli import demo_images
    from featx.images import PHOTOGRAPHS

    steps = _Steps(context.find_root().command, as_json=as_json)
    photographs, new, digits = folder / "photographs", folder / "new", folder / "digits"
    counts = {
        "photographs": demo_images.write_photographs(photographs, new),
        "digits": demo_images.write_digits(digits),
    }
    say(
        f"{counts['photographs']} tiles of {len(PHOTOGRAPHS)} photographs are in {photographs}, and "
        f"{counts['digits']} scanned digits in {digits}: a folder for each class.",
        err=as_json,
    )
    seeded = ("--seed", seed) if seed else ()
    jobs = []
    for images, options in (
        (photographs, ("--shots", "1,2,5")),
        (digits, ("--heads", "auto", "--shots", "1,2,5,20")),
    ):
        store = images.with_suffix(".featx")
        steps.run("extract", images, "--out", store)
        swept, _ = steps.run("sweep", store, *options, "--episodes", EPISODES, *seeded)
        jobs.append(demo_images.compare_with_pixels(images.name, swept))
    store, model, report = (photographs.with_suffix(end) for end in (".featx", ".model", ".report"))
    tiles = [new / f"{name}.png" for name in demo_images.NEW]
    steps.run("fit", store, "--out", model, *seeded)
    _, predicted = steps.run("predict", model, *tiles)
    _, found = steps.run("search", store, tiles[0], "-k", 3)
    page = report / "report.html"
    if as_json:
        print_json(
            {
                **{job.name: {"images": counts[job.name], **job.to_json()} for job in jobs},
                "commands": steps.commands,
                "predictions": predicted["predictions"],
                "search": found["results"],
                "report": str(page),
                "model": str(model),
                "seconds": time.monotonic() - started,
            }
        )
    say("", err=as_json)
    show(_table(jobs), err=as_json)
    say(*demo_images.verdict(jobs), err=as_json)
    say("", f"Report: {page}", f"Model: {model}", err=as_json)
    say("Now with your own photos, one folder for each class:", err=as_json)
    say("  featx extract photos --out photos.featx", "  featx sweep photos.featx", err=as_json)
    if open_report and not webbrowser.open(page.resolve().as_uri()):
        say("Note: no browser could be opened.", err=True)


class _Steps:
    """Runs commands as a user would, each after the line that would run it."""

    def __init__(self, featx: Any, *, as_json: bool) -> None:
        self.featx, self.as_json = featx, as_json
        self.commands: list[str] = []

    def run(self, *words: object) -> tuple[Any, dict[str, Any]]:
        """Run a command; what it returns, and with ``--json`` its object, else {}."""
        arguments = [str(word) for word in words]
        self.commands.append(shlex.join(["featx", *arguments]))
        say("", f"$ {self.commands[-1]}", err=self.as_json)
        if not self.as_json:
            return self.featx.main(arguments, standalone_mode=False), {}
        with redirect_stdout(StringIO()) as out:
            returned = self.featx.main([*arguments, "--json"], standalone_mode=False)
        return returned, json.loads(out.getvalue())


def _table(jobs: list[Job]) -> Table:
    from rich.table import Table

    shots = sorted({n for job in jobs for n in job.embeddings}, key=lambda n: (n == "all", n))
    table = Table("accuracy, %", "", *(f"{n} per class" for n in shots), box=None, title=f"head: {jobs[0].head}")
    for job in jobs:
        for label, means in (("embeddings", job.embeddings), ("raw pixels", job.pixels)):
            cells = [f"{100 * means[n]:.0f}" if n in means else "" for n in shots]
            table.add_row(job.name if label == "embeddings" else "", label, *cells, end_section=label == "raw pixels")
    return table
