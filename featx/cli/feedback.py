"""The commands around a served model's corrections: feedback, refit, models."""

from __future__ import annotations

import getpass
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from featx.cli.options import (
    DeviceOption,
    EngineOption,
    Json,
    ModelArgument,
    OwnBackbone,
    Seed,
    Weights,
    network_options,
)
from featx.cli.terminal import ProgressLine, print_json, say
from featx.errors import UsageError, plural

if TYPE_CHECKING:
    from featx.models import Refit, Versions, Voted

_SHOWN = 200
"""Photos on the sheet of a batch, at most."""

_LISTED = 10


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The feedback folder of a served model.")]
FolderOption = Annotated[
    Path, typer.Option("--feedback", metavar="DIR", help="The feedback folder of featx serve --feedback.")
]
Who = Annotated[str | None, typer.Option(help="Who does this, for the audit log. (default: your login)")]
RuleOption = Annotated[
    Literal["majority", "unanimous"],
    typer.Option(
        "--disagreements",
        help="Of photos that people label differently: learn the majority's label, or leave them out (unanimous). "
        "Without a majority a photo is left out, too.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(epilog="Example:  featx feedback feedback/ --csv corrected.csv")(feedback)
    app.command(epilog="Example:  featx refit photos.model --feedback feedback/ --store photos.featx")(refit)
    app.command(epilog="Examples:  featx models feedback/  |  featx models feedback/ --rollback")(models)


def feedback(
    folder: Folder,
    disagreements: RuleOption = "majority",
    csv: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="Write a list of the photos with their labels, for featx extract."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the corrections of a served model: how many, by whom, where people disagree, and how well they agree."""
    from featx._files import publish_bytes
    from featx.models import Corrections, Versions, agreements, export_csv, held_words, vote

    check_folder(folder)
    corrections, versions = Corrections(folder), Versions(folder)
    voted = vote(corrections.latest, disagreements)
    agreed = agreements(voted)
    disputed = [each for each in voted if each.disputed]
    people: dict[str, int] = {}
    for each in corrections.latest:
        people[each.by] = people.get(each.by, 0) + 1
    if csv is not None:
        publish_bytes(csv, export_csv(voted))
    if as_json:
        print_json(
            {
                "corrections": len(corrections), "images": len(voted), "people": people, "held": versions.held,
                "disagreements": [each.to_json() for each in disputed],
                "agreement": [each.to_json() for each in agreed], "csv": None if csv is None else str(csv),
            }
        )  # fmt: skip
        return
    said = ", ".join(f"{name or 'anonymous'} {count}" for name, count in sorted(people.items()))
    say(f"{plural(len(corrections), 'correction')} of {plural(len(voted), 'photo')}" + (f": {said}." if said else "."))
    for pair in agreed:
        kappa = pair.kappa
        say(
            f"{pair.a or 'anonymous'} and {pair.b or 'anonymous'} agree on {pair.agreed} of "
            f"{plural(pair.images, 'photo')}: Cohen's kappa {kappa.mean:.2f} ({kappa.low:.2f} to {kappa.high:.2f})."
        )
    for photo in disputed[:_LISTED]:
        say(f"Disagreement: {photo.file}: {words_of(photo)}; taken: {photo.label or 'none'}.")
    if len(disputed) > _LISTED:
        say(f"And {len(disputed) - _LISTED} more (--json lists all).")
    if versions.held:
        say(f"Held: {held_words(versions.held)}.")
    if csv is not None:
        say(f"List: {csv}")


def refit(
    model: ModelArgument,
    feedback: FolderOption,
    store: Annotated[
        Path | None,
        typer.Option(metavar="STORE", help="The store that the model was fitted on; its embeddings are used again."),
    ] = None,
    disagreements: RuleOption = "majority",
    force: Annotated[bool, typer.Option("--force", help="Switch to the new model whatever the evidence says.")] = False,
    release: Annotated[
        str | None, typer.Option(metavar="BATCH", help="Learn from a held batch, whose labels are right.")
    ] = None,
    discard: Annotated[
        str | None, typer.Option(metavar="BATCH", help="Never learn from a held batch, whose labels are wrong.")
    ] = None,
    who: Who = None,
    backbone: OwnBackbone = None,
    weights: Weights = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Fit a model again with the corrections that it has not learnt, and switch to the new one only on evidence.

    Only new photos are embedded. On photos that neither has seen, the new model is better or worse, or the data cannot
    tell. A worse one is refused; so is one that cannot be told apart, if the new labels seem unrelated to the photos. A
    batch that contradicts the model, but not in the way of its errors, is held, with a sheet of its photos to look at.
    A server with --feedback switches to the new version by itself.
    """
    from featx.models import Versions, batch_sizes, open_embedder, refit as refitted

    check_folder(feedback)
    person = who or login()
    if release and discard:
        raise UsageError("--release and --discard do not go together", hint="Decide about one batch at a time.")
    versions = Versions(feedback)
    versions.begin(model, person)
    for batch, what in ((release, "released"), (discard, "discarded")):
        if batch is not None:
            count = versions.settle_batch(batch, what, person)
            say(f"{batch}: {plural(count, 'correction')} {what}.", err=True)
    if store is None:
        raise UsageError(
            "a model holds no photos, so the store that it was fitted on is needed", where="--store",
            hint=shlex.join(["featx", "refit", str(model), "--feedback", str(feedback), "--store", "photos.featx"]),
        )  # fmt: skip
    bundle = versions.read(str(versions.current))
    with ProgressLine("fitting") as line:
        current, options = versions.path(str(versions.current)), network_options(backbone, weights, engine, device)
        embedder = open_embedder(bundle, current, **options, batch_sizes=batch_sizes(versions))
        with versions.changing():
            done = refitted(
                versions, store, embedder, who=person, rule=disagreements, force=force, random_state=seed,
                progress=line.update,
            )  # fmt: skip
    sheet = None if done.batch is None else write_batch(versions, done)
    if as_json:
        print_json({**done.to_json(), "sheet": None if sheet is None else str(sheet)})
    for note in done.notes:
        say(f"Note: {note}", err=True)
    say(*story(done, model, feedback, store, sheet), err=as_json)


def models(
    folder: Folder,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Go back to the version before the current one, or to that of --to.")
    ] = False,
    to: Annotated[str | None, typer.Option(metavar="VERSION", help="The version to go back to.")] = None,
    add: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="Make a model of your own the current version.")
    ] = None,
    log: Annotated[bool, typer.Option("--log", help="Show the audit log: who changed what.")] = False,
    who: Who = None,
    as_json: Json = False,
) -> None:
    """List the versions of a served model with the evidence for each, and go back to an earlier one.

    A server with --feedback switches by itself, and loses no request. What the abandoned version had learnt is held
    until somebody releases it (featx refit --release).
    """
    from featx.models import Versions

    check_folder(folder)
    versions = Versions(folder)
    person = who or login()
    if to is not None and not rollback:
        raise UsageError("--to goes with --rollback", hint="Add --rollback.")
    if rollback and add is not None:
        raise UsageError("--rollback and --add do not go together", hint="Do one after the other.")
    if add is not None:
        versions.add(add, person)
    if rollback:
        name, batch = versions.roll_back(person, to)
        say(f"Current is {name} again.", err=as_json)
        if batch is not None:
            held = plural(len(versions.held[batch]), "correction")
            say(f"What only the other version had learnt is held: {held} ({batch}).")
    if as_json:
        listed = [each.to_json() for each in versions.all()]
        print_json(
            {"current": versions.current, "versions": listed, "held": versions.held, "log": versions.records}
        )  # fmt: skip
        return
    for each in versions.all():
        mark = "*" if each.current else " "
        learnt = f", {plural(len(each.corrections), 'correction')}" if each.corrections else ""
        say(f"{mark} {each.name}  {each.what} {each.when} by {each.who}{learnt}{evidence_words(each.evidence)}")
    if not versions.all():
        say("There is no version yet; featx serve MODEL --feedback DIR makes the first.")
    if log:
        for record in versions.records:
            rest = {name: record[name] for name in ("version", "before", "batch") if record.get(name)}
            about = " ".join(f"{name} {value}" for name, value in rest.items())
            say(f"{record['when']} {record['who']}: {record['what']} {about}{evidence_words(record.get('evidence'))}")


def check_folder(folder: Path) -> None:
    """UsageError where there is no feedback folder."""
    if not (folder / "journal.jsonl").exists() and not (folder / "audit.jsonl").exists():
        raise UsageError(
            "no feedback folder",
            where=folder,
            hint="featx serve MODEL --feedback DIR makes one, and keeps corrections.",
        )


def login() -> str:
    """Who runs this."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"  # a number without a name, as in containers


def words_of(photo: Voted) -> str:
    """What people say of a photo."""
    return ", ".join(f"{each.by}: {each.label}" if each.by else each.label for each in photo.said)


def write_batch(versions: Versions, done: Refit) -> Path:
    """The sheet of the batch that is held."""
    from featx._files import make_folder
    from featx.reports import batch_sheet

    sheet = versions.folder / "held" / f"{done.batch}.html"
    make_folder(sheet.parent)
    photos = [
        (versions.folder / "images" / each.file, words_of(each), bytes.fromhex(each.sha256))
        for each in done.photos[:_SHOWN]
    ]
    facts = [
        f"{plural(len(done.photos), 'photo')} with the label that people gave. The labels contradict the model, but "
        "not in the way of its errors, and could not be predicted from the photos either. If they are right, release "
        "the batch; if they are wrong, discard it.",
        *([f"The first {_SHOWN} are shown."] if len(done.photos) > _SHOWN else []),
    ]
    batch_sheet(sheet, str(done.batch), facts, photos)
    return sheet


def story(done: Refit, model: Path, folder: Path, store: Path, sheet: Path | None) -> list[str]:
    """What a refit came to, and what next."""
    if done.outcome == "nothing":
        return [f"Nothing new to learn; current is {done.version}."]
    lines = [f"{plural(len(done.photos), 'new photo')}, {done.embedded} embedded. {done.sentence()}."]
    again = ["featx", "refit", str(model), "--feedback", str(folder), "--store", str(store)]
    if done.outcome == "promoted":
        forced = " (--force, against the evidence)" if done.forced else ""
        return [*lines, f"Promoted{forced}: current is {done.version}."]
    if done.outcome == "held":
        return [
            *lines,
            f"Held: the labels of {done.batch} contradict the model, but not in the way of its errors. Look at {sheet}",
            f"Right: {shlex.join([*again, '--release', str(done.batch)])}",
            f"Wrong: {shlex.join([*again, '--discard', str(done.batch)])}",
        ]  # fmt: skip
    why = "there is evidence against it" if done.outcome == "refused" else "there is no evidence for it yet"
    return [*lines, f"Not promoted, since {why}: current is still {done.version}. --force overrides this."]


def evidence_words(evidence: Any) -> str:
    """The verdict of a comparison, or nothing."""
    if not evidence or not evidence.get("all"):
        return ""
    from featx.evaluation import Interval, points

    found = evidence["all"]
    return f"; {evidence['verdict']}: {points(Interval(found['mean'], found['low'], found['high']))}"
