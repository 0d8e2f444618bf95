"""The command that compares heads."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from featx.cli.evidence import evidence_of
from featx.cli.options import Jobs, Json, Seed, Unlabelled, UnlabelledFrom, let_scipy_take_tensors, stem
from featx.cli.terminal import ProgressLine, check_writable, print_json, say, show
from featx.errors import Interrupted, UsageError, plural

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from featx._arrays import Index
    from featx.advice import LabelRanking
    from featx.evaluation import Forecast, Shots, SweepResult
    from featx.heads import Layers
    from featx.store import FeatureSet


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(
        epilog="Examples:  featx sweep photos.featx  |  featx sweep photos.featx --seconds 10  |  "
        "featx sweep photos.featx --heads logreg,knn --shots 5,20 --json"
    )(sweep)


def sweep(
    stores: Annotated[
        list[Path],
        typer.Argument(
            metavar="STORE...",
            help="A store, or several whose features are compared on the images that they have in common.",
        ),
    ],
    heads: Annotated[str, typer.Option(help="Names separated by commas, or all.")] = "all",
    shots: Annotated[
        str | None,
        typer.Option(help="Labelled images per class. (default: 1,2,5,10,20,all, as far as they go)"),
    ] = None,
    episodes: Annotated[int, typer.Option(min=2, max=10_000, help="Random draws for each number of shots.")] = 20,
    test: Annotated[
        Literal["val", "test"] | None,
        typer.Option(help="Judge the winner once on this split, which takes no part in choosing."),
    ] = None,
    across: Annotated[
        Literal["groups"] | None,
        typer.Option(
            help="Compare on photos of groups never seen, too: a new patient, camera or day (featx extract --group-by)."
        ),
    ] = None,
    group_name: Annotated[
        str | None, typer.Option(help="What one group is, such as camera. (default: as the store says)")
    ] = None,
    unlabelled: Unlabelled = False,
    unlabelled_from: UnlabelledFrom = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            "--layer",
            help="Blocks of features to compare, separated by commas; joined is all networks in one head, combined "
            "all layers of one. (default: all the store has)",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Folder of the report. (default: beside the store)"),
    ] = None,
    max_images: Annotated[
        int | None,
        typer.Option(
            min=2, metavar="N", help="Use only N images of a large store, drawn in proportion to its classes."
        ),
    ] = None,
    n_jobs: Jobs = None,
    backend: Annotated[
        Literal["local", "ray"],
        typer.Option(help="Where the workers run: here, or on the Ray cluster that runs here or RAY_ADDRESS names."),
    ] = "local",
    device: Annotated[
        Literal["cpu", "cuda"],
        typer.Option(help="Where logistic regression on very many images is solved; the rest runs on the CPU."),
    ] = "cpu",
    seed: Seed = 0,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=1, metavar="N", help="Stop drawing after N seconds, and show what is known; the same command goes on."
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Show in the report what speaks for the two classes on confused and suspicious photos. The network "
            "runs on these photos again.",
        ),
    ] = False,
    as_json: Json = False,
) -> Any:  # a SweepResult; Typer evaluates annotations, and that one would import much before it is needed
    """Compare heads on a store: how good they are with how few labels, and how sure that is."""
    started = time.monotonic()
    if device == "cuda":
        let_scipy_take_tensors()

    from featx.evaluation import judge, sweep_heads
    from featx.extraction import joblib_on_ray
    from featx.heads import heads_for, left_out, open_layers, taken, unlabelled_centre, unlabelled_rows
    from featx.images import Originals
    from featx.reports import TABLE_WIDTH, render, render_provisional, write_report
    from featx.store import Pictures, source_of

    if explain and len(stores) > 1:
        raise UsageError("--explain takes one store, whose network is known", where="--explain", found=len(stores))
    wanted_heads, wanted_shots = parse_heads(heads), parse_shots(shots)
    one = unlabelled or unlabelled_from is not None
    store = stores[0]
    features, columns, on = open_layers(stores, layers, one=one, max_images=max_images, random_state=seed)
    for note in left_out(stores):
        say(f"Note: {note}", err=True)
    out = out or store.with_name(stem(store) + ".report")
    check_writable(out)
    rows = _rows(features, store, test)
    pool = None
    if one:
        pool = unlabelled_rows(features, rows if unlabelled else rows[:0], unlabelled_from)
        rows = rows[features.labels[rows] >= 0]
    centre = None if pool is None else unlabelled_centre(pool)
    apart = None
    if across is not None:
        apart = Apart.of(features, rows, group_name, wanted_shots, store)
    elif (features.groups != "").any():
        say("Note: the store has groups; --across groups compares on photos of groups never seen, too.", err=True)
    if across is None and group_name is not None:
        raise UsageError("--group-name is for --across groups")
    copies = features.near_copies_of(rows)
    if not isinstance(copies, Pictures):
        by = (
            "as the weights are random, only copies of equal bytes are found" if copies is None else
            f"near copies are images with a cosine of {copies:g} or more, which copies saved anew may not reach"
        )  # fmt: skip
        say(f"Note: without perceptual hashes, {by}. To add the hashes, run featx extract again.", err=True)
    network = str(features.provenance.get("backbone", features.layer))
    latest: SweepResult | None = None
    ordinary: SweepResult | None = None
    found: tuple[SweepResult, Forecast] | None = None

    def left(part: float) -> float | None:
        """Seconds for what comes next, of which there may be more after it."""
        return None if seconds is None else max(0.0, seconds - (time.monotonic() - started)) * part

    try:
        workers = joblib_on_ray() if backend == "ray" else nullcontext()
        n_jobs = n_jobs or (-1 if backend == "ray" else None)
        with workers, ProgressLine("comparing heads") as line:

            def keep(known: SweepResult) -> None:
                nonlocal latest
                latest = replace(known, features=network)
                if not as_json and known.missing:
                    line.table(lambda: render_provisional(known))

            options: dict[str, Any] = {
                "class_names": features.class_names,
                "heads": wanted_heads,
                "shots": wanted_shots,
                "episodes": episodes,
                "random_state": seed,
                "n_jobs": n_jobs,
                "centre": centre,
                "pool": pool,
                "layers": columns,
                "on": on,
                "device": None if device == "cpu" else device,
                "partial": keep,
                "progress": line.update,
            }
            result = sweep_heads(
                taken(features.embeddings, rows),
                features.labels[rows],
                groups=features.copies[rows],
                near_duplicates=copies,
                pixels=None if features.pixels is None else features.pixels[rows],
                journal=out / "journal.jsonl",
                seconds=left(1.0 if apart is None else 0.5),
                **options,
            )
            line.clear()
            result = replace(result, features=network)
            if apart is not None:
                ordinary = result
                found = apart.compare(features, rows, result, out, left, columns, on, options)
                line.clear()
                latest = found[0]
            judged = None
            if test:
                winner = columns.heads(heads_for(centre, pool), wanted_heads, on)[result.winner]
                ledger = store.with_name(stem(store) + ".test-uses.jsonl")
                judged = judge(features, test, winner, ledger, random_state=seed)
                result = replace(result, notes=(*result.notes, judged.sentence))
            labels = None
            if not result.missing:
                labels = _rank_labels(features, rows, result, columns, n_jobs, line.update)
            replaced = _replaced(out, result, features.fingerprint)
            with Originals(source_of(store), features.ids[rows].tolist(), features.digests[rows]) as originals:
                why = None
                if explain:
                    why = evidence_of(
                        store, features, columns, rows, originals, random_state=seed, progress=line.update
                    )  # fmt: skip
                where = write_report(
                    result,
                    out,
                    title=" and ".join(each.name for each in stores),
                    provenance={**features.provenance, "fingerprint": features.fingerprint},
                    command=shlex.join(["featx", *sys.argv[1:]]),
                    ids=originals.ids,
                    thumbnail=originals.thumbnail,
                    labels=labels,
                    evidence=why,
                    across=found,
                )
    except KeyboardInterrupt as error:
        for known in (ordinary, latest):
            if known is not None and not as_json:
                if known.sites is not None:
                    say(f"Photos of a new {known.group_name}:")
                show(render(known), least=TABLE_WIDTH)
        raise Interrupted(
            "stopped; finished draws are kept", where=out, hint="Run the same command again to go on."
        ) from error
    if as_json:
        print_json(
            {
                **result.to_json(),
                **({} if found is None else {"across": {**found[0].to_json(), "forecast": found[1].to_json()}}),
                "unlabelled": 0 if pool is None else len(pool),
                "test": judged.to_json() if judged else None,
                "report": str(where),
            }
        )
    if replaced:
        say(f"Note: {replaced}", err=True)
    show(render(result, found), err=as_json, least=TABLE_WIDTH)
    say(f"Report: {where}", err=as_json)
    return result


@dataclass(frozen=True)
class Apart:
    """The comparison across groups: the group of each row (n,) of the sweep, "" for none, and what one is called."""

    groups: NDArray[np.str_]
    name: str

    @classmethod
    def of(
        cls, features: FeatureSet, rows: Index, name: str | None, shots: tuple[Shots, ...] | None, store: Path
    ) -> Apart:
        """The groups of a store, where enough of them can be held out; that is told before anything is computed."""
        from featx.evaluation import DEFAULT_SHOTS, LabelledRows, plan_shots, sites_of

        groups = sites_of(features, rows)
        if groups is None:
            raise UsageError(
                "the store has no groups", where=store, expected="images that belong together",
                hint="Say which do: featx extract SOURCE --out STORE --group-by RULE (nothing is embedded again).",
            )  # fmt: skip
        own = cls(groups, name or features.group_name or "group")
        data = LabelledRows.of(
            features.embeddings[rows, :1], features.labels[rows], features.class_names, groups=features.copies[rows],
            near_duplicates=None, sites=groups,
        )  # fmt: skip
        plan_shots(
            data.labels, data.groups, data.class_names, shots=shots, default=DEFAULT_SHOTS, sites=data.sites,
            group_name=own.name,
        )  # fmt: skip
        alone = int((groups[features.labels[rows] >= 0] == "").sum())
        if alone:
            say(f"Note: {plural(alone, 'image')} without a {own.name} count as one each.", err=True)
        return own

    def compare(
        self,
        features: FeatureSet,
        rows: Index,
        ordinary: SweepResult,
        out: Path,
        left: Callable[[float], float | None],
        columns: Layers,
        on: list[str],
        options: dict[str, Any],
    ) -> tuple[SweepResult, Forecast]:
        """The same sweep across groups, with the copies that the ordinary one found; and a forecast by its winner."""
        from featx.evaluation import LabelledRows, forecast_site, sweep_heads
        from featx.heads import heads_for, taken

        rows = rows[ordinary.rows]
        groups = self.groups[ordinary.rows]
        embeddings = taken(features.embeddings, rows)
        copies = ordinary.duplicates.groups
        result = sweep_heads(
            embeddings, features.labels[rows], groups=copies, near_duplicates=None, sites=groups,
            pixels=None if features.pixels is None else features.pixels[rows], group_name=self.name,
            journal=out / "journal.across.jsonl", seconds=left(0.7), **options,
        )  # fmt: skip
        heads = columns.heads(heads_for(options["centre"], options["pool"]), options["heads"], on)
        data = LabelledRows.of(
            embeddings, features.labels[rows], features.class_names, groups=copies, near_duplicates=None, sites=groups
        )

        def keep_on() -> bool:
            seconds = left(1.0)
            return seconds is None or seconds > 0

        forecast = forecast_site(
            data, groups, heads[result.winner], group_name=self.name, random_state=options["random_state"],
            keep_on=keep_on, progress=options["progress"],
        )  # fmt: skip
        return replace(result, rows=ordinary.rows[result.rows], features=ordinary.features), forecast


def _rows(features: FeatureSet, store: Path, test: str | None) -> Index:
    """The rows that may be chosen on, with notes of those that may not."""
    import numpy as np

    # Test images are for the one judgement at the end; they take no part in choosing.
    if test and test not in features.splits:
        found = ", ".join(sorted(set(features.splits.tolist()) - {""})) or "no splits"
        raise UsageError(f"no images in the split {test}", where=store, found=found)
    held = {"test"} | ({test} if test else set())
    rows = np.flatnonzero(~np.isin(features.splits, sorted(held)))
    for name in sorted(held & set(features.splits.tolist())):
        say(f"Note: the split {name} ({plural(int((features.splits == name).sum()), 'image')}) is left out.", err=True)
    if {"train", "val"} <= set(features.splits[rows].tolist()):
        say("Note: draws are made from train and val together; --test val keeps val for one judgement.", err=True)
    return rows


def _rank_labels(
    features: FeatureSet,
    rows: Index,
    result: SweepResult,
    columns: Layers,
    n_jobs: int | None,
    progress: Callable[[int, int, str], None],
) -> LabelRanking | None:
    """The labels of the images that took part in a sweep, by the reference layer; None where there is too little."""
    import numpy as np

    from featx.advice import REPEATS, rank_labels
    from featx.evaluation import sites_of
    from featx.heads import distinct_counts, is_large, taken

    groups = result.duplicates.groups
    if (distinct_counts(result.labels, groups, len(result.class_names)) >= 2).sum() < 2:
        return None
    took_part = rows[result.rows]
    reference = taken(features.embeddings, took_part)[:, slice(*columns.columns(columns.reference))]
    ranking = rank_labels(
        reference,
        result.labels,
        class_names=result.class_names,
        groups=groups,
        repeats=1 if is_large(reference) else REPEATS,
        near_duplicates=None,
        random_state=result.random_state,
        n_jobs=n_jobs,
        progress=progress,
        sites=sites_of(features, took_part),
    )
    return replace(ranking, rows=np.asarray(result.rows)[ranking.rows])


def _replaced(out: Path, result: SweepResult, fingerprint: str) -> str:
    """A sentence on the finished report in the folder ``out``, where it is of other settings; else ""."""
    summary = out / "summary.json"
    try:
        earlier = json.loads(summary.read_bytes())
        date = datetime.fromtimestamp(summary.stat().st_mtime).astimezone()
        before = [earlier.get(name) for name in _SETTINGS]
        print_of = earlier["provenance"].get("fingerprint")
    except (OSError, ValueError, RecursionError, KeyError, AttributeError, TypeError):
        return ""  # there is none, or none of featx
    told = result.to_json()
    if before == [told[name] for name in _SETTINGS] and print_of == fingerprint:
        return ""
    return f"replaced the report of {date:%Y-%m-%d %H:%M}, which had other settings; --out DIR keeps both."


_SETTINGS = ("heads", "shots", "episodes", "random_state", "classes")
"""Fields of ``summary.json`` in which two reports on one store may differ."""


def parse_heads(text: str) -> tuple[str, ...] | None:
    """Names of heads from ``--heads``; None for all."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise UsageError("--heads is empty", expected="names separated by commas, or all")
    return None if names == ("all",) else names


def parse_shots(text: str | None) -> tuple[Shots, ...] | None:
    """Numbers of shots from ``--shots``; None where it was not given."""
    if text is None:
        return None
    shots: list[Shots] = []
    for part in (part.strip() for part in text.split(",")):
        if part == "all":
            shots.append("all")
        elif part.isascii() and part.isdigit() and int(part) > 0:
            shots.append(int(part))
        else:
            raise UsageError("--shots cannot be read", expected="such as 1,5,20,all", found=repr(text))
    return tuple(dict.fromkeys(shots))
