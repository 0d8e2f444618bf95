#!/usr/bin/env python3
"""Strategies against images per class, on several sets of photos: what to do with few labels, with the time of each
cell.

    python scripts/strategies.py SET [SET ...] [--out data/bench/strategies.json] [--seconds 140]

Each SET is a folder of class folders, of which 40 images per class are used (100 of two classes). Everything is judged
on the same draws of ``featx sweep`` (three of them; one where all of a network is trained):

- head: the recommended head on frozen embeddings of one centre crop;
- views+layers: the same head on the mean over five views and the combined layers;
- random features: the same head on the same network with random weights;
- finetune:1, :2, :all: the last blocks, or all, trained too; scratch: all trained, from random weights.

Training all of a network on a CPU is held short: 10 passes over the support (30 from scratch), no early stopping, and
no more than 1,500 image passes a draw; cells beyond that are left out by name. A cell that was done is not repeated:
stop the script, or let ``--seconds`` do so, and run it again. It writes the table, and a figure of transfer against no
transfer beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from bench_layers import some_of, suggested_layers
from numpy.typing import NDArray

from featx._arrays import COMBINED, PENULTIMATE
from featx._files import publish_bytes
from featx.adaptation.finetune import judge_episodes, open_tuning
from featx.adaptation.training import recipe_for
from featx.backbones.backbone import Backbone, load_backbone
from featx.backbones.engines.choice import make_engine
from featx.evaluation.duplicates import find_duplicates
from featx.evaluation.results import SweepResult
from featx.evaluation.sweep import sweep_heads
from featx.extraction.embedder import Embedder
from featx.extraction.run import extract_features
from featx.heads.layers import Layers, read_layers
from featx.images.source import ImageSet
from featx.images.views import parse_views
from featx.store.reader import FeatureSet

SHOTS = (5, 20)
FROZEN = ("head", "views+layers", "random features")
TRAINED = ("finetune:1", "scratch", "finetune:2", "finetune:all")
VIEWS = "center,flip,full,full-flip,zoom"
EPISODES, MOST_PASSES = 3, 1500
PASSES = {"finetune:all": 10, "scratch": 30}


class Photos:
    """One set: its images, and the stores of their embeddings."""

    def __init__(self, folder: Path, work: Path) -> None:
        found = some_of(ImageSet.from_folder(folder), 40, least=200)
        # Without splits: the trained strategies keep out of `test`, and would judge other draws than the heads do.
        self.images = replace(found, refs=tuple(replace(ref, split="") for ref in found.refs))
        self.name, self.work = folder.name, work
        self.backbone = load_backbone(layers=suggested_layers("efficientnet_lite0"))

    def store(self, views: tuple[str, ...]) -> tuple[FeatureSet, Layers]:
        """Embeddings of all layers: of the centre crop, or of the views."""
        path = self.work / f"{self.name}.{'center' if len(views) == 1 else 'views'}.featx"
        extract_features(self.images, self.backbone, path, views=views)
        return read_layers(path)

    def random_rows(self, features: FeatureSet) -> NDArray[np.float32]:
        """Embeddings by the network with random weights, in the store's order."""
        path = self.work / f"{self.name}.random.npy"
        if not path.is_file():
            network = load_backbone(weights="none")
            by_id: dict[str, Any] = {ref.id: ref.path for ref in self.images.refs}
            found = Embedder(network, make_engine(network)).embed_files(by_id[str(name)] for name in features.ids)
            np.save(path, np.stack([embedding[0] for _, embedding in found if isinstance(embedding, tuple)]))
        return np.asarray(np.load(path))


def judged(rows: NDArray[Any], features: FeatureSet, groups: Any, n_shots: int, **options: Any) -> SweepResult:
    return sweep_heads(
        rows, features.labels, class_names=features.class_names, groups=groups, near_duplicates=None, heads=("auto",),
        shots=(n_shots,), episodes=EPISODES, n_jobs=1, **options,
    )  # fmt: skip


def frozen_cell(photos: Photos, strategy: str, n_shots: int) -> dict[str, Any]:
    """The recommended head on frozen features of one kind or another."""
    features, layers = photos.store(("center",))
    reference = features.embeddings[:, slice(*layers.columns(layers.reference))]
    groups = find_duplicates(reference, features.copies).groups
    if strategy == "head":
        return cell(judged(reference, features, groups, n_shots), 0)
    if strategy == "random features":
        return cell(judged(photos.random_rows(features), features, groups, n_shots), 0)
    views, layers = photos.store(parse_views(VIEWS))
    return cell(judged(views.embeddings, features, groups, n_shots, layers=layers, on=(COMBINED,)), 0)


def trained_cell(photos: Photos, strategy: str, n_shots: int) -> dict[str, Any]:
    """Some or all of the network trained on the support."""
    features, layers = photos.store(("center",))
    features = replace(features, embeddings=features.embeddings[:, slice(*layers.columns(layers.reference))])
    scratch, blocks = strategy == "scratch", strategy.removeprefix("finetune:")
    whole = strategy in PASSES
    support = n_shots * len(features.class_names)
    if whole and PASSES[strategy] * support > MOST_PASSES:
        return {"left_out": f"{PASSES[strategy] * support} image passes a draw, more than {MOST_PASSES}"}
    recipe = recipe_for(
        from_scratch=scratch, whole=whole, epochs=PASSES.get(strategy), early_stop=not whole, augment=whole
    )
    network: Backbone = replace(photos.backbone, layers=(PENULTIMATE,))
    folder = photos.work / f"{photos.name}.{strategy.replace(':', '-')}.tuning"
    unfreeze: Any = "all" if whole else int(blocks)
    with open_tuning(features, photos.images, network, folder, unfreeze=unfreeze, recipe=recipe) as tuning:
        journal = folder / f"journal-{n_shots}.jsonl"
        found = judge_episodes(
            tuning, shots=(n_shots,), episodes=1 if whole else EPISODES, heads=("auto",), n_jobs=1, journal=journal
        )
        journal.unlink(missing_ok=True)
    return cell(found.sweep, -1)


def cell(result: SweepResult, head: int) -> dict[str, Any]:
    """What is kept of one strategy at one number of shots."""
    (n_shots,) = result.shots
    trials = result.of(result.heads[head], n_shots)
    summary = next(each for each in result.results if each.head == result.heads[head])
    return {
        "accuracy": summary.accuracy.to_json(),
        "draws": [trial.accuracy for trial in trials],
        "fit_seconds_a_draw": float(np.mean([trial.fit_seconds for trial in trials])),
        "queries": trials[0].n_query,
    }


def table(cells: dict[str, Any], sets: list[str]) -> str:
    """Markdown: strategies by sets and shots, accuracy in % and seconds of a draw's training."""
    heads = [f"{name} {n}" for name in sets for n in SHOTS]
    lines = ["| strategy | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for strategy in (*FROZEN, *TRAINED):
        row = []
        for name in sets:
            for n_shots in SHOTS:
                found = cells.get(f"{name}|{strategy}|{n_shots}", {})
                shown = "" if "accuracy" not in found else (
                    f"{100 * found['accuracy']['mean']:.1f} ({found['fit_seconds_a_draw']:.1f} s)"
                )  # fmt: skip
                row.append(shown or ("left out" if found else "not run"))
        lines.append(f"| {strategy} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def draw(cells: dict[str, Any], sets: list[str], path: Path) -> None:
    """Bars: transfer against no transfer, at the smaller number of shots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = {"head": "#0072B2", "finetune:1": "#56B4E9", "random features": "#E69F00", "scratch": "#D55E00"}
    for k, (strategy, colour) in enumerate(colours.items()):
        found = [cells.get(f"{name}|{strategy}|{SHOTS[0]}", {}).get("accuracy") for name in sets]
        if not any(found):
            continue
        places = [i + 0.2 * (k - 1.5) for i, each in enumerate(found) if each]
        means = [100 * each["mean"] for each in found if each]
        spread = [[100 * (each["mean"] - each["low"]) for each in found if each],
                  [100 * (each["high"] - each["mean"]) for each in found if each]]  # fmt: skip
        axes.bar(places, means, 0.18, yerr=spread, label=strategy, color=colour, ecolor="#555555", capsize=2)
    axes.set_xticks(range(len(sets)), sets)
    axes.set_ylabel("accuracy, %")
    axes.set_title(f"Transfer (blue) against no transfer, {SHOTS[0]} images per class")
    axes.legend(frameon=False, fontsize=8, ncols=4)
    axes.set_ylim(0, 110)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("sets", nargs="+", type=Path, metavar="SET")
    parser.add_argument("--out", type=Path, default=Path("data/bench/strategies.json"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further cell after so many")
    options = parser.parse_args()
    work = options.out.parent / "strategies"
    work.mkdir(parents=True, exist_ok=True)
    kept = json.loads(options.out.read_text()) if options.out.is_file() else {}
    cells: dict[str, Any] = kept.get("cells", {})
    names = list(dict.fromkeys([*kept.get("sets", []), *(folder.name for folder in options.sets)]))
    began = time.monotonic()
    wanted = [(s, n, folder) for s in FROZEN for n in SHOTS for folder in options.sets]
    wanted += [(s, n, folder) for n in SHOTS for s in TRAINED for folder in options.sets]
    left = [each for each in wanted if f"{each[2].name}|{each[0]}|{each[1]}" not in cells]
    for strategy, n_shots, folder in left:
        if time.monotonic() - began > options.seconds:
            print(f"{options.seconds:.0f} s have passed; run it again for the rest.")
            break
        started = time.perf_counter()
        make = frozen_cell if strategy in FROZEN else trained_cell
        found = make(Photos(folder, work), strategy, n_shots)
        found |= {"cell_seconds": round(time.perf_counter() - started, 2)}
        cells[f"{folder.name}|{strategy}|{n_shots}"] = found
        print(f"{folder.name}, {strategy}, {n_shots} shots: {found}", flush=True)
        machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        told = {"machine": machine, "date": datetime.now(UTC).date().isoformat(), "sets": names, "cells": cells}
        publish_bytes(options.out, json.dumps(told, indent=1).encode() + b"\n")
    else:
        shutil.rmtree(work)  # nothing is left to do with the stores
    print(table(cells, names))
    draw(cells, names, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
