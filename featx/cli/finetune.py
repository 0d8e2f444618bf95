"""The commands that train: fine-tuning the last blocks of a backbone, and an autoencoder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featx.cli.fit import tell_model
from featx.cli.options import (
    QUARANTINED,
    DeviceOption,
    EngineOption,
    Json,
    MaxError,
    MaxUnknown,
    OwnBackbone,
    PriorOption,
    Seed,
    StoreArgument,
    Weights,
    own_network,
    stem,
)
from featx.cli.sweep import parse_heads, parse_shots
from featx.cli.terminal import MODEL_MARK, ProgressLine, check_file, print_json, say, show
from featx.errors import Interrupted, UsageError, plural

if TYPE_CHECKING:
    from featx.adaptation import FinetuneResult
    from featx.backbones import Unfreeze


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(
        epilog="Examples:  featx finetune photos.featx photos  |  featx finetune photos.featx photos --unfreeze 3 "
        "--shots 5,20 --out photos.model  |  featx finetune photos.featx photos --from-scratch"
    )(finetune)
    app.command(
        epilog="Example:  featx autoencoder photos --out ae.pt  and then  "
        "featx extract photos --out ae.featx --backbone autoencoder --weights ae.pt"
    )(autoencoder)


def finetune(
    store: StoreArgument,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The images that the store was made from.")],
    unfreeze: Annotated[str, typer.Option(help="How many of the last blocks to train, or all.")] = "1",
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Train all of the network from random weights, as a control.")
    ] = False,
    shots: Annotated[
        str | None, typer.Option(help="Labelled images per class. (default: 5,20, as far as they go)")
    ] = None,
    episodes: Annotated[int, typer.Option(min=2, max=10_000, help="Random draws for each number of shots.")] = 5,
    heads: Annotated[str, typer.Option(help="Heads to compare with: names separated by commas, or all.")] = "all",
    epochs: Annotated[
        int | None, typer.Option(min=1, help="At most this many. (default: 30; from scratch 100)")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Learning rate of the trained blocks. (default: 5e-4; from scratch 1e-3)")
    ] = None,
    early_stop: Annotated[
        bool, typer.Option("--early-stop/--no-early-stop", help="Choose the epochs inside the support.")
    ] = True,
    augment: Annotated[
        bool | None,
        typer.Option("--augment/--no-augment", help="Mirror and shift images. (default: where all is trained)"),
    ] = None,
    layer: Annotated[str, typer.Option(help="Layer of the store that the heads use.")] = "penultimate",
    max_cache: Annotated[float, typer.Option(min=0.001, help="GiB of disk that activations may take.")] = 8.0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="MODEL", help="Also train on all images, and keep network and head."),
    ] = None,
    max_error: MaxError = 0.05,
    max_unknown: MaxUnknown = 0.05,
    prior: PriorOption = "as-is",
    backbone: OwnBackbone = None,
    weights: Weights = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train the last blocks of the network, too, and compare that with heads on the same draws.

    The frozen part runs once over every image; draws and intervals are those of featx sweep with the same seed.
    """
    blocks = _unfreeze(unfreeze)
    wanted_heads, wanted_shots = parse_heads(heads), parse_shots(shots)
    if out is not None:
        check_file(out, MODEL_MARK, example="photos.model")
    if from_scratch and (blocks != 1 and blocks != "all"):
        raise UsageError("--from-scratch trains the whole network", where="--unfreeze", expected="all", found=unfreeze)
    if augment and blocks != "all" and not from_scratch:
        raise UsageError(
            "activations cannot be mirrored or shifted, images can", where="--augment", hint="Use --unfreeze all."
        )
    if prior != "as-is" and out is None:
        raise UsageError("only a model that is kept uses it", where="--prior", hint="Keep one with --out MODEL.")
    from featx.adaptation import judge_episodes, open_tuning, plan_shots, recipe_for
    from featx.evaluation import LabelledRows
    from featx.extraction import network_like
    from featx.images import ImageSet
    from featx.models import check_promises, finetune_bundle, prior_shares, read_prior
    from featx.store import check_same, read_features

    check_promises(max_error, max_unknown)
    recipe = recipe_for(
        from_scratch=from_scratch, whole=blocks == "all", epochs=epochs, learning_rate=learning_rate,
        early_stop=early_stop, augment=augment,
    )  # fmt: skip
    features, in_shares = read_features(store, layer=layer), read_prior(prior)
    prior_shares(in_shares, LabelledRows.of_features(features).class_names)  # a class without one is said at once
    wanted = plan_shots(features, wanted_shots, early_stop=recipe.early_stop)
    images = ImageSet.from_source(source)
    network = network_like(features.provenance, where=store, backbone=own_network(backbone), weights=weights)
    check_same(features.provenance, {**features.provenance, **network.provenance()}, store)
    folder = store.with_name(stem(store) + ".tuning")
    journal = folder / "journal.jsonl"
    bundle = None
    try:
        with (
            ProgressLine("fine-tuning") as line,
            open_tuning(
                features, images, network, folder, unfreeze=blocks, recipe=recipe, with_test=out is not None,
                device=device, engine=engine, max_gib=max_cache, random_state=seed,
                progress=line.update, say=line.say,
            ) as tuning,
        ):  # fmt: skip
            result = judge_episodes(
                tuning, shots=wanted, episodes=episodes, heads=wanted_heads, random_state=seed,
                journal=journal, progress=line.update,
            )  # fmt: skip
            if out is not None:
                bundle = finetune_bundle(
                    tuning,
                    max_error=max_error,
                    max_unknown=max_unknown,
                    prior=in_shares,
                    random_state=seed,
                    engine=engine,
                    progress=line.update,
                )
            journal.unlink(missing_ok=True)
    except KeyboardInterrupt as error:
        if not folder.is_dir():
            raise Interrupted("stopped before anything was computed", where=store) from error
        raise Interrupted(
            "stopped; activations and finished draws are kept",
            where=folder,
            hint="Run the same command again to go on.",
        ) from error
    if bundle is not None and out is not None:
        from featx.models import write_bundle

        write_bundle(bundle, out)
    if as_json:
        print_json({**result.to_json(), "model": str(out) if out else None})
    _show(result, as_json)
    if bundle is not None and out is not None:
        tell_model(bundle, out, err=as_json)


def _unfreeze(text: str) -> Unfreeze:
    if text == "all":
        return "all"
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise UsageError("--unfreeze cannot be read", expected="a number of blocks such as 1, or all", found=repr(text))


def _show(result: FinetuneResult, as_json: bool) -> None:
    from featx.evaluation import points, shots_label
    from featx.reports import TABLE_WIDTH, render

    show(render(result.sweep), err=as_json, least=TABLE_WIDTH)
    for each in result.against_best():
        right = {row.head: row.accuracy.mean for row in result.sweep.results if row.n_shots == each.n_shots}
        say(
            f"{result.head} against {each.b}, the best head here, at {shots_label(each.n_shots)}: "
            f"{points(each.difference.interval, beside=(right[each.a], right[each.b]))}, {each.difference.verdict}.",
            err=as_json,
        )
    say(
        f"{plural(result.parameters, 'parameter')} trained on {result.device}; the frozen part took "
        f"{result.trunk_seconds:.1f} s once, a draw {result.draw_seconds:.1f} s.",
        err=as_json,
    )


def autoencoder(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Images, as for featx extract; labels are not used.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The checkpoint to make.")],
    dim: Annotated[int, typer.Option(help="Length of the code, which is the embedding.")] = 64,
    size: Annotated[
        int, typer.Option(help="Height and width that images are scaled to, in pixels; a multiple of 16.")
    ] = 64,
    epochs: Annotated[int | None, typer.Option(min=1, help="(default: enough to see 60,000 images)")] = None,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, order and of what is held out.")] = 0,
    as_json: Json = False,
) -> None:
    """Learn a backbone from your own images, without labels: a small convolutional autoencoder."""
    check_file(out, b"featx-autoencoder", example="ae.pt")
    from featx._system import available_cpus
    from featx.adaptation import choose_device, held_out_rows, read_pixels, train_autoencoder
    from featx.backbones import check_shape
    from featx.images import ImageSet

    check_shape(dim, size)
    where = choose_device(device)
    images = ImageSet.from_source(source)
    with ProgressLine("reading images") as line:
        found = read_pixels(images, size, workers=available_cpus(), progress=line.update)
    held = held_out_rows(found.digests, seed)
    try:
        with ProgressLine("learning") as line:
            trained = train_autoencoder(
                found.pixels, held, dim=dim, epochs=epochs, random_state=seed, device=where, tick=line.update
            )
    except KeyboardInterrupt as error:
        raise Interrupted("stopped before the first epoch was done; nothing is written", where=out) from error
    trained.save(out)
    facts = {"checkpoint": str(out), **trained.facts(), "refused": len(found.refused), "device": where}
    if trained.epochs < trained.planned:
        raise Interrupted(
            f"stopped after {trained.epochs} of {plural(trained.planned, 'epoch')}; the best of them is kept", where=out
        )
    if as_json:
        print_json(facts)
    say(
        f"{plural(trained.images, 'image')}, {plural(trained.epochs, 'epoch')}, {trained.seconds:.0f} s on {where}. "
        f"Squared error of {plural(trained.held_out, 'held-out image')}: {trained.error:.4f} "
        f"({trained.baseline:.4f} for the mean image, so "
        f"{100 * (1 - trained.error / max(trained.baseline, 1e-12)):.0f} % is explained).",
        err=as_json,
    )
    for name, refusal in found.refused[:10]:
        say(f"  refused {name}: {refusal.reason}, {refusal.what}", err=True)
    if not as_json:
        again = ["featx", "extract", source, "--out", "ae.featx", "--backbone", "autoencoder", "--weights", str(out)]
        say(f"Next: {shlex.join(again)}")
    if found.refused:
        raise typer.Exit(QUARANTINED)
