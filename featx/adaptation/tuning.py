"""What fine-tuning starts from: a store's images, their network cut in two, and the activations at the cut.

The frozen part runs once over every image (:mod:`featx.adaptation.activations`); draws and the model to keep start from
there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx._arrays import Index
from featx.adaptation import training
from featx.adaptation.activations import MAX_GIB, Wanted, activations, check_room
from featx.adaptation.training import Recipe
from featx.backbones import Backbone, Halves, Own, Trunk, Unfreeze, cut_network, load_backbone, make_engine
from featx.errors import MismatchError, SourceError, UsageError, plural
from featx.images import ImageSet
from featx.store import FeatureSet

SCRATCH = "scratch"

Progress = Callable[[int, int, str], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Tuning:
    """A store's labelled images with their activations, ready to be trained on; made by :func:`open_tuning`.

    Attributes
    ----------
    features : of the images, one row each; ``activations`` has the same rows.
    backbone : with the base weights.
    head : what results call it: "finetune:N", "finetune:all" or "scratch".
    decode : how images are decoded.
    device : that tails are trained on, "cpu" or "cuda".
    trunk_seconds : that the activations took, and ``cached_bytes`` of the disk.
    say : told what may take its time.
    """

    features: FeatureSet
    backbone: Backbone
    halves: Halves
    activations: NDArray[Any]
    recipe: Recipe
    head: str
    decode: str
    device: str
    trunk_seconds: float
    cached_bytes: int
    say: Say = field(repr=False)

    @property
    def choosable(self) -> Index:
        """Rows that may be trained on: the split ``test`` is for the one judgement at the end."""
        return np.flatnonzero(self.features.splits != "test")

    @property
    def notes(self) -> list[str]:
        """What a reader of the results must know."""
        notes = ["Batch statistics and dropout stay as in use while the last blocks are trained."]
        if self.recipe.from_scratch:
            notes = ["scratch starts from random weights: the control for what pretraining gives."]
        if str(self.features.provenance.get("views", "center")) != "center":
            notes.append("Fine-tuning sees the centre crop only; heads are on the store's mean over views.")
        return notes


@contextmanager
def open_tuning(
    features: FeatureSet,
    images: ImageSet,
    backbone: Backbone,
    folder: Path,
    *,
    unfreeze: Unfreeze = 1,
    recipe: Recipe | None = None,
    with_test: bool = False,
    device: str = "auto",
    engine: str = "auto",
    max_gib: float = MAX_GIB,
    random_state: int = 0,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Iterator[Tuning]:
    """Cut the network, and compute (or find again) the activations of a store's labelled images.

    Parameters
    ----------
    features : of a store.
    images : the source that the store was made from.
    backbone : the store's.
    folder : where the activations go for the time being; they are removed when the block ends well.
    unfreeze : number of blocks, or "all".
    recipe : how it is trained; ``from_scratch`` takes random weights and trains all of them.
    with_test : whether images of the split ``test`` are wanted too.
    device : "auto", "cpu" or "cuda", for training and for the trunk.
    engine : of the trunk.
    max_gib : bound of the activations on the disk.
    random_state : seed of random weights.
    progress : called as ``progress(done, total, what)``.
    say : told what is about to be done.

    Raises
    ------
    UsageError
        The network cannot be cut there, or the activations would be too large.
    MismatchError, SourceError
        The source is not the store's.
    """
    recipe = recipe or Recipe()
    say = say or (lambda sentence: None)
    device = training.choose_device(device)
    if recipe.from_scratch:
        unfreeze = "all"
        named = backbone.provider if isinstance(backbone.provider, Own) else backbone.name
        network = load_backbone(named, weights="none", layers=("penultimate",), random_state=random_state)
    else:
        network = backbone if backbone.layers == ("penultimate",) else replace(backbone, layers=("penultimate",))
    use = features.labels >= 0
    if not with_test:
        use &= features.splits != "test"
    rows = np.flatnonzero(use)
    if not len(rows):
        raise UsageError("no labelled image to train on", hint="Images are labelled by folders, or by a list.")
    decode = str(dict(features.provenance.get("decode", {})).get("mode", "full"))
    halves = cut_network(network, unfreeze)
    wanted = Wanted(
        ids=[str(name) for name in features.ids[rows]],
        origins=_origins(features, rows, images),
        digests=features.digests[rows],
        preprocess=network.preprocess,
        decode=decode,
        shape=halves.tail.shape,
        provenance={} if halves.trunk is None else Trunk.of(network, halves).provenance(),
    )
    runner = None
    if halves.trunk is not None:
        runner = make_engine(Trunk.of(network, halves), engine=engine, device=device, precision="fp32")
    size = wanted.nbytes(runner)
    check_room(folder, size, max_gib)
    what = "pixels" if runner is None else f"activations before {halves.cut}"
    say(
        f"Training {plural(halves.parameters, 'parameter')} on {what} of {plural(len(rows), 'image')}, which take "
        f"{size / 2**20:.0f} MiB in {folder} until this is done."
    )
    started = time.perf_counter()

    def step(done: int, total: int) -> None:
        if progress:
            progress(done, total, what)

    with activations(folder, wanted, runner, max_gib=max_gib, progress=step) as found:
        yield Tuning(
            features=_rows(features, rows), backbone=network, halves=halves, activations=found, recipe=recipe,
            head=SCRATCH if recipe.from_scratch else f"finetune:{unfreeze}", decode=decode, device=device,
            trunk_seconds=time.perf_counter() - started, cached_bytes=size, say=say,
        )  # fmt: skip


def _origins(features: FeatureSet, rows: Index, images: ImageSet) -> list[Any]:
    """Where the bytes of each row are; their digests are compared when they are read."""
    known = {ref.id: ref.path for ref in images.refs}
    missing = [str(name) for name in features.ids[rows] if str(name) not in known]
    if missing:
        kind: type[SourceError | MismatchError] = MismatchError if len(missing) == len(rows) else SourceError
        raise kind(
            "the store's images are not all in it", where=images.root,
            found=f"{len(missing)} of {len(rows)} missing, such as {missing[0]}",
            hint="Name the SOURCE that the store was made from, or bring the store up to date with featx extract.",
        )  # fmt: skip
    return [known[str(name)] for name in features.ids[rows]]


def _rows(features: FeatureSet, rows: Index) -> FeatureSet:
    return replace(
        features, embeddings=features.embeddings[rows], ids=features.ids[rows], labels=features.labels[rows],
        splits=features.splits[rows], digests=features.digests[rows],
    )  # fmt: skip
