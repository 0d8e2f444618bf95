"""The command that keeps a head: fit."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featx.cli.options import (
    Device,
    EngineOption,
    Json,
    MaxError,
    MaxUnknown,
    OwnBackbone,
    PriorOption,
    Seed,
    StoreArgument,
    Unlabelled,
    UnlabelledFrom,
    Weights,
    let_scipy_take_tensors,
    network_options,
)
from featx.cli.terminal import MODEL_MARK, ProgressLine, check_file, print_json, say
from featx.errors import UsageError, plural

if TYPE_CHECKING:
    from featx.models import Bundle


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(epilog="Example:  featx fit photos.featx --out photos.model")(fit)


def fit(
    store: StoreArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="MODEL", help="The file to make.")],
    head: Annotated[
        str, typer.Option(help="A head, several heads separated by commas, or all; the best one is taken.")
    ] = "auto",
    layer: Annotated[
        str | None,
        typer.Option(help="Which of the store's layers. (default: all combined, where that is measured to help)"),
    ] = None,
    max_error: MaxError = 0.05,
    max_unknown: MaxUnknown = 0.05,
    prior: PriorOption = "as-is",
    without_network: Annotated[
        bool,
        typer.Option(
            "--without-network",
            help="Leave the network out of the model, which is then small and needs the weights wherever it is used.",
        ),
    ] = False,
    unlabelled: Unlabelled = False,
    unlabelled_from: UnlabelledFrom = None,
    backbone: OwnBackbone = None,
    weights: Weights = None,
    engine: EngineOption = "auto",
    device: Annotated[
        Device,
        typer.Option(
            help="Device of the network; auto is cuda if there is a GPU. cuda also fits logreg on very many images."
        ),
    ] = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Choose a head, calibrate it on images it has not seen, refit it on all images, and keep it in one file.

    The model promises that at most --max-error of its answers are wrong, and that it calls at most --max-unknown of the
    photos unknown: on average, and over photos like those that it was fitted on, in the shares that --prior says.
    Photos of another camera, place or season may be unlike them; a split called test shows it.
    """
    if device == "cuda":
        let_scipy_take_tensors()
    import numpy as np

    from featx.extraction import Embedder
    from featx.heads import heads_for, open_layers, unlabelled_centre, unlabelled_rows
    from featx.models import fit_bundle, read_prior, summary, write_bundle

    check_file(out, MODEL_MARK, example="photos.model")
    wanted = read_prior(prior)
    head, layer = _head_on(head, layer)
    pooled = unlabelled or unlabelled_from is not None
    features, columns, on = open_layers(store, layer, one=pooled)
    if layer is not None and len(on) > 1:
        raise UsageError("a model is on one layer, or on combined", where="--layer", found=layer)
    pool = None
    if pooled:
        own = np.flatnonzero(features.splits != "test") if unlabelled else np.arange(0)
        pool = unlabelled_rows(features, own, unlabelled_from)
    catalogue = heads_for(None if pool is None else unlabelled_centre(pool), pool)
    heads = tuple(catalogue) if head == "all" else tuple(name.strip() for name in head.split(",") if name.strip())
    if not heads:
        raise UsageError("--head is empty", expected="a name, names separated by commas, auto or all")
    for name in heads:
        catalogue[name]
    options = network_options(backbone, weights, engine, device)
    embedder = Embedder.like(features.provenance, where=store, **options)
    with ProgressLine("fitting") as line:
        bundle = fit_bundle(
            features, embedder, heads=heads, max_error=max_error, max_unknown=max_unknown, prior=wanted,
            random_state=seed, pool=pool, layers=columns if len(columns.names) > 1 else None,
            device="cuda" if device == "cuda" else None, with_network=not without_network, progress=line.update,
        )  # fmt: skip
    write_bundle(bundle, out)
    if as_json:
        print_json(summary(bundle, out))
    tell_model(bundle, out, err=as_json, how=AUTO if head == "auto" else "")


AUTO = "the recommended head, which --head auto takes without comparing others; featx sweep compares them"
"""How a head was chosen that nobody named."""


def tell_model(bundle: Bundle, out: Path, *, err: bool, how: str = "") -> None:
    """Say what a model that was just made is worth, and ``how`` its head was chosen; on stderr if ``err``."""
    for note in dict.fromkeys(bundle.notes):
        say(f"Note: {note}", err=True)
    say(*_story(bundle, how), err=err)
    say(f"Model: {out}", err=err)
    if not err:
        say(f"Next: {shlex.join(['featx', 'predict', str(out), 'photo.jpg'])}")


def _head_on(head: str, layer: str | None) -> tuple[str, str | None]:
    """``HEAD@LAYER``, as a sweep calls it, in its two parts."""
    pairs = [name.partition("@") for name in head.split(",")]
    named = {where.strip() for _, at, where in pairs if at}
    if not named:
        return head, layer
    if len(named) > 1 or not all(at for _, at, _ in pairs) or (layer is not None and {layer} != named):
        raise UsageError("several heads are compared on one layer", where="--head", found=head)
    return ",".join(name for name, _, _ in pairs), named.pop()


_CLASSES_TOLD = 12


def _percent(found: Mapping[str, Any], name: str = "mean") -> str:
    from featx.evaluation import Interval, percent

    return percent(Interval(found[name], found["low"], found["high"]))


def _story(bundle: Bundle, how: str) -> list[str]:
    from featx.models import by_recall

    metrics: Any = bundle.metrics
    params = ", ".join(f"{name} {value}" for name, value in bundle.params.items())
    images = plural(metrics["images"], "image")
    if metrics.get("duplicates"):
        images += f", {metrics['duplicates']} of them {'a copy' if metrics['duplicates'] == 1 else 'copies'},"
    counted = f"{images} of {plural(metrics['classes'], 'class')}"
    lines = [f"{bundle.head} ({params}) on {counted}{how and f': {how}'}."]
    if bundle.prior is not None:
        lines.append(f"For photos with other shares of the classes (--prior): {_shares(bundle.prior)}.")
    rivals = len(metrics.get("chosen_among") or ())
    groups = f" ({plural(metrics['groups'], 'group')}, whole)" if "groups" in metrics else ""
    unseen = f"On images that the fit had not seen, but on which the best of {rivals} heads was chosen{groups}"
    for key, where in (
        ("out_of_fold", unseen if rivals else f"On images it had not seen{groups}"),
        ("test", "On the split test"),
    ):
        found = metrics.get(key)
        if found:
            error = found["error_among_answered"]
            wrong = "" if error is None else f", {100 * error:.1f} % of these answers wrong"
            lines.append(
                f"{where}: accuracy {_percent(found['accuracy'])}, "
                f"macro-F1 {100 * found['macro_f1']:.1f} %, calibration error {100 * found['ece']:.1f} %; "
                f"answers {100 * found['answered']:.1f} %{wrong}."
            )
            classes = by_recall(found)
            recalls = [
                f"{name} {_percent(each, 'recall')} of {each['images']}" for name, each in classes[:_CLASSES_TOLD]
            ]
            rest = len(classes) - len(recalls)
            more = f", and {rest} better ones (--json lists all)" if rest else ""
            lines.append(f"  Recognised of each class: {', '.join(recalls)}{more}.")
            lines += _story_of_sets(found.get("sets"))
    if bundle.threshold is not None:
        lines.append(f"Abstains below a probability of {bundle.threshold:.3f} (--max-error {bundle.max_error:g}).")
        if metrics["out_of_fold"]["answered"] == 1:
            lines.append("  Even answering every photo keeps that promise, so it is seldom unsure.")
        lines.append("  The promise is about photos like those it was fitted on, and about no others.")
    return [*lines, *_story_of_unknown(metrics["unknown"], bundle.max_unknown)]


def _shares(prior: Mapping[str, float]) -> str:
    listed = [f"{name} {100 * share:.3g} %" for name, share in list(prior.items())[:_CLASSES_TOLD]]
    rest = len(prior) - len(listed)
    return ", ".join(listed) + (f" and {rest} more (--json lists all)" if rest else "")


def _story_of_sets(found: Any) -> list[str]:
    if not found:
        return []
    name, least = min(found["per_class"].items(), key=lambda item: item[1]["mean"])
    return [
        f"  Sets of labels (predict --coverage {found['asked']:g}): {_percent(found['coverage'])} hold the truth, "
        f"{found['mean_size']:.2f} labels on average; of {name} {_percent(least)}, the fewest (--json lists all)."
    ]


def _story_of_unknown(found: Any, most: float | None) -> list[str]:
    if not most or found is None or found["smallest_max_unknown"] > most:
        return []
    lines = [
        f"Calls photos unknown that are unlike its own (--max-unknown {most:g}): "
        f"{_percent(found['own_refused'])} of its own that it had not seen."
    ]
    if left := found["class_left_out"]:
        share = _percent(left)
        lines.append(f"  Of the photos of a class that it was not fitted on (each in turn), it called {share} unknown.")
    return lines
