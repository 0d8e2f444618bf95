"""The command that counts: how many photos of each class a pile has in truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featx.cli.options import (
    DeviceOption,
    EngineOption,
    Json,
    ModelArgument,
    OwnBackbone,
    Seed,
    Weights,
    end_refused,
    network_options,
)
from featx.cli.terminal import ProgressLine, check_file, print_json, say, show
from featx.errors import ImageError, MismatchError, UsageError, one_line, plural

if TYPE_CHECKING:
    from rich.table import Table

    from featx.images import ImageSet
    from featx.models import Bundle, ClassCount, Pile


_LISTED = 5
_MARK = b"path,label\n"


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(
        epilog="Examples:  featx count photos.model pile --draw 100 --out to-check.csv  |  "
        "featx count photos.model pile --checked to-check.csv"
    )(count)


def count(
    model: ModelArgument,
    images: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES",
            help="The pile: a folder or whatever else featx extract reads, or a store of the same network. Labels that "
            "it may have are not read.",
        ),
    ],
    checked: Annotated[
        Path | None,
        typer.Option(
            metavar="LIST", help="A list with path,label of a random part of the pile, every photo with its true label."
        ),
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="How often, at least, the interval of a class contains its true share.")
    ] = 0.95,
    draw: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Draw N photos to check at random, and count nothing.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="LIST", help="The list to make, for --draw.")
    ] = None,
    seed: Seed = 0,
    backbone: OwnBackbone = None,
    weights: Weights = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    as_json: Json = False,
) -> None:
    """Estimate how many photos of each class a pile really has.

    A model is wrong more often about some classes than about others, so the numbers of photos that it names are wrong,
    too. With --checked they are corrected, with an interval that holds whatever the model does, as long as the checked
    photos were drawn at random, as --draw does. Without it they are corrected by how the model errs on the photos that
    it was fitted on, which holds only if those of the pile are like these.
    """
    from featx.models import count_adjusted, count_checked, read_bundle

    if not 0 < confidence < 1:
        raise UsageError("not a share", where="--confidence", expected="more than 0 and less than 1", found=confidence)
    if (draw is None) != (out is None):
        raise UsageError("--draw and --out go together", expected="--draw N --out FILE.csv")
    if draw is not None and checked is not None:
        raise UsageError(
            "--draw and --checked do not go together", hint="First draw photos, then count with them checked."
        )
    bundle = read_bundle(model)
    source = _store_or_images(images)
    if draw is not None and out is not None:
        _draw(bundle, source, draw, out, seed, as_json=as_json)
        return
    listed = None if checked is None else _read_list(checked)
    options = network_options(backbone, weights, engine, device)
    with ProgressLine("predicting") as line:
        pile, refused = _predict(bundle, model, source, options, line)
    if not pile.ids:
        raise UsageError("no photo of the pile could be read", where=images)
    notes: list[str] = list(bundle.cautions)
    if listed is None or checked is None:
        method, photos = "adjusted counts", len(pile.ids) - int(pile.unknown.sum())
        found = count_adjusted(pile, bundle, level=confidence, random_state=seed)
        notes.append(
            "Nothing was checked: this holds only if photos of each class are recognised as those that the model was "
            f"fitted on. To be sure: --draw {min(len(pile.ids), 100)} --out to-check.csv, then --checked to-check.csv."
        )
    else:
        from featx.models import check_rows

        method, photos = "prediction-powered inference", len(pile.ids)
        rows, labels = check_rows(pile, listed, checked)
        found = count_checked(pile, bundle, rows, labels, level=confidence)
        notes += _notes_of_checked(pile, bundle, listed, labels, seed)
    told: dict[str, Any] = {
        "photos": len(pile.ids),
        "unknown": int(pile.unknown.sum()),
        "unsure": pile.unsure,
        "refused": refused,
        "method": method,
        "confidence": confidence,
        "checked": None if listed is None else len(labels),
        "of": photos,
        "classes": {name: each.to_json(photos) for name, each in found.items()},
        "notes": notes,
    }
    if as_json:
        print_json(told)
    say(
        f"{plural(len(pile.ids), 'photo')}: {told['unknown']} unknown to the model, {pile.unsure} that it is unsure of"
        + (f"; {len(refused)} more could not be read." if refused else "."),
        err=as_json,
    )
    if not as_json:
        show(_table(found, photos, confidence))
    of = "all of them" if listed is not None else f"the {plural(photos, 'photo')} that are not unknown"
    say(f"Estimated by {method}; shares are of {of}.", err=as_json)
    for note in notes:
        say(f"Note: {note}", err=True)
    end_refused(refused, len(pile.ids) + len(refused))


def _store_or_images(images: str) -> Path | ImageSet:
    from featx.images import ImageSet, is_local
    from featx.store import is_packed

    path = Path(images)
    if is_local(images) and ((path / "manifest.json").is_file() or (path.is_file() and is_packed(path))):
        return path
    with ProgressLine("listing images") as line:
        return ImageSet.from_source(images, progress=line.update)


def _ids(source: Path | ImageSet, bundle: Bundle) -> list[str]:
    if isinstance(source, Path):
        from featx.heads import open_layers

        return [str(name) for name in open_layers(source, bundle.layer)[0].ids]
    return [ref.id for ref in source.refs]


def _draw(bundle: Bundle, source: Path | ImageSet, n: int, out: Path, seed: int, *, as_json: bool) -> None:
    from featx._files import csv_text, publish_bytes
    from featx.models import LEAST_CHECKED, draw_to_check

    check_file(out, _MARK, example="to-check.csv")
    if out.exists() and any(_read_list(out).values()):
        raise UsageError("this list has labels, and would be replaced", where=out, hint="Choose another name.")
    if n < LEAST_CHECKED:
        raise UsageError("too few to count with", where="--draw", expected=f"at least {LEAST_CHECKED}", found=n)
    ids = _ids(source, bundle)
    drawn = draw_to_check(ids, n, seed)
    text = csv_text(("path", "label"), ({"path": name} for name in drawn))
    publish_bytes(out, text.encode(errors="surrogateescape"))  # it is read again, by these names
    if as_json:
        print_json({"list": str(out), "drawn": n, "photos": len(ids), "random_state": seed})
    say(f"{n} of {plural(len(ids), 'photo')}, drawn at random: {out}", err=as_json)
    names = ", ".join(bundle.class_names[:12]) + (", ..." if len(bundle.class_names) > 12 else "")
    say(f"Write the true label beside each ({names}, or any other name), then: --checked {out}", err=as_json)


def _read_list(path: Path) -> dict[str, str | None]:
    from featx.images import list_refs

    if not path.is_file():
        raise UsageError("no such list", where=path, hint="Make one with --draw 100 --out to-check.csv.")
    refs, notes = list_refs(path)
    for note in notes:
        say(f"Note: {note}", err=True)
    return {ref.id: (ref.label or "").strip() or None for ref in refs}


def _predict(
    bundle: Bundle, model: Path, source: Path | ImageSet, options: dict[str, Any], line: ProgressLine
) -> tuple[Pile, list[dict[str, Any]]]:
    """What the model says of each photo; embeddings of a store are not computed again."""
    from featx.models import Pile, layer_number, open_embedder, predict_files

    if isinstance(source, Path):
        from featx.heads import open_layers
        from featx.store import is_packed, read_manifest, read_quarantine

        features = open_layers(source, bundle.layer)[0]
        if features.fingerprint != bundle.provenance.get("fingerprint"):
            raise MismatchError(
                "the features of this store are not those that the model was fitted on", where=source,
                expected=f"fingerprint {bundle.provenance.get('fingerprint')}", found=features.fingerprint,
                hint="Give the photos themselves, or extract them with the model's network.",
            )  # fmt: skip
        bad = [] if is_packed(source) else read_quarantine(source, read_manifest(source))
        lost = [{"id": each.id, "reason": each.reason, "message": each.message} for each in bad]
        ids = [str(name) for name in features.ids]
        return Pile(ids, bundle.answer(features.embeddings), [each["id"] for each in lost]), lost
    embedder = open_embedder(bundle, model, **options)
    ids, answers, lost = [], [], []
    found = predict_files(bundle, embedder, layer_number(bundle), [ref.path for ref in source.refs])
    for done, (ref, answer) in enumerate(zip(source.refs, found, strict=True), 1):
        if isinstance(answer, ImageError):
            lost.append({"id": ref.id, "reason": answer.reason, "message": answer.what})
        else:
            ids.append(ref.id)
            answers.append(answer)
        line.update(done, len(source.refs))
    return Pile(ids, answers, [each["id"] for each in lost]), lost


def _notes_of_checked(
    pile: Pile, bundle: Bundle, listed: dict[str, str | None], labels: Sequence[str], seed: int
) -> list[str]:
    from featx.errors import did_you_mean
    from featx.models import draw_to_check

    notes = []
    unread = len(listed) - len(labels)
    if unread:
        notes.append(f"Left out: {plural(unread, 'checked photo')} that could not be read.")
    if set(draw_to_check([*pile.ids, *pile.refused], len(listed), seed)) != set(listed):
        notes.append("These are not the photos that --draw draws. The intervals hold if they were drawn at random.")
    strange = sorted(set(labels) - set(bundle.class_names))
    for name in strange[:_LISTED]:
        meant = did_you_mean(name, bundle.class_names)
        notes.append(
            f"{name!r} is not a class of the model; it is estimated from the photos that are unknown. {meant}".strip()
        )
    if len(strange) > _LISTED:
        notes.append(f"So are {len(strange) - _LISTED} more.")
    return notes


def _table(found: dict[str, ClassCount], photos: int, level: float) -> Table:
    from rich.table import Column, Table

    from featx.evaluation import limits

    checked = any(each.checked is not None for each in found.values())
    sure = f"{100 * level:g} %"
    names = ["named", *(["checked"] if checked else []), "share, %", sure, "photos", sure]
    numbers = [Column(name, justify="right", no_wrap=True) for name in names]
    table = Table(Column("class", overflow="fold"), *numbers, box=None)
    for name, each in sorted(found.items(), key=lambda item: -item[1].share.mean):
        share = each.share
        table.add_row(
            one_line(name),
            f"{each.named}",
            *([f"{each.checked}"] if checked else []),
            f"{100 * share.mean:.1f}",
            limits(share),
            f"{share.mean * photos:.0f}",
            f"{share.low * photos:.0f} to {share.high * photos:.0f}",
        )
    return table
