"""Training a tail and a head on few images: the recipe, and the number of epochs, both inside the support.

The head starts as the logistic head that the frozen embeddings would get, and only then does everything move
together: training from a random head first distorts the features that it is meant to use (Kumar et al., 2022,
"Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution"). AdamW, a cosine to zero, batch
normalisation and dropout as in use: the running statistics of the pretraining are better than those of ten images.
From scratch there are none to keep, so there it trains as usual, and statistics are taken anew before each judgement.

How long is decided by held-out rows of the support: the epoch of the least log-loss, the start included; so where
training does not help, nothing is trained. Then all of the support is used for that long.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn

from featx._arrays import Index
from featx.backbones import Tail, seeded
from featx.errors import UsageError
from featx.heads import Array, Scorer, distinct_counts, fold_numbers, make_head

N_FOLDS = 3
ENOUGH_HELD_OUT = 20
"""Folds are held out in turn until this many rows have been: with ten images each of them is needed."""

START_C = 10.0
"""Of the head to start from. A weaker penalty, chosen by cross-validation, is as accurate, but so sure of the support
that little pulls at the features: on satellite images (efficientnet_lite0, the last four blocks, 20 shots, one draw)
training then went from 79.0 to 78.0 % right, and from here from 77.0 to 80.5; at 5 shots from 62.0 to 68.5."""

SCRATCH_EPOCHS, SCRATCH_RATE = 100, 1e-3
WHOLE_RATE = 1e-4
"""Learning rate where all of a pretrained network is trained."""

_JUDGED = 64
"""Rows at a time when nothing is trained."""

Tick = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """How a tail is trained.

    Parameters
    ----------
    epochs : at most so many, and the length of the cosine.
    learning_rate : of the tail, at the start.
    head_rate : of the head, which may move faster.
    weight_decay : of AdamW.
    batch_size : rows a step.
    early_stop : choose the number of epochs inside the support; otherwise all of them are run.
    augment : mirror and shift images; only for pixels, that is for a cut at the input.
    from_scratch : the network starts from random weights: a random head, batch statistics, a higher rate.
    """

    epochs: int = 30
    learning_rate: float = 5e-4
    head_rate: float = 1e-3
    weight_decay: float = 1e-2
    batch_size: int = 32
    early_stop: bool = True
    augment: bool = False
    from_scratch: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate", "head_rate"):
            if not getattr(self, name) > 0:
                raise UsageError("must be more than 0", where=name.replace("_", " "), found=getattr(self, name))


def recipe_for(
    *,
    from_scratch: bool = False,
    whole: bool = False,
    epochs: int | None = None,
    learning_rate: float | None = None,
    early_stop: bool = True,
    augment: bool | None = None,
) -> Recipe:
    """The recipe for a task; what is None takes what suits it. ``whole`` says that the cut is at the input."""
    usual = Recipe()
    return Recipe(
        epochs=epochs or (SCRATCH_EPOCHS if from_scratch else usual.epochs),
        learning_rate=learning_rate or (SCRATCH_RATE if from_scratch else WHOLE_RATE if whole else usual.learning_rate),
        early_stop=early_stop,
        augment=(whole or from_scratch) if augment is None else augment,
        from_scratch=from_scratch,
    )


class Classifier(nn.Module):
    """A tail and a linear head on its embeddings (of unit length, unless it was trained from scratch)."""

    def __init__(self, tail: Tail, coef: Tensor, intercept: Tensor, kind: str) -> None:
        super().__init__()
        self.tail, self.kind = tail, kind
        self.coef, self.intercept = nn.Parameter(coef), nn.Parameter(intercept)

    def forward(self, activations: Tensor) -> Tensor:
        """Logits (n, c)."""
        embeddings = self.tail(activations)
        if self.kind == "l2":
            embeddings = functional.normalize(embeddings, dim=1)
        return functional.linear(embeddings, self.coef, self.intercept)

    def scorer(self) -> Scorer:
        """The head as featx keeps it."""
        coef = self.coef.detach().cpu().numpy().astype(np.float64)
        d = coef.shape[1]
        return Scorer(
            kind=self.kind, mean=np.zeros(d), scale=np.ones(d), n_classes=len(coef), coef=coef,
            intercept=self.intercept.detach().cpu().numpy().astype(np.float64),
        )  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A trained classifier, in eval mode.

    ``losses`` (epochs + 1,) is the held-out log-loss by epoch, from the start on, that chose ``epochs``; None without
    early stopping. It was used to select and is no result.
    """

    classifier: Classifier
    epochs: int
    losses: Array | None


def choose_device(device: str) -> str:
    """Choose "cuda" or "cpu"; "auto" is cuda where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch finds no CUDA device here", where="device", hint="Use --device cpu.")
    return device


def train(
    tail: Tail,
    activations: NDArray[Any],
    rows: Index,
    labels: NDArray[np.integer],
    groups: Index,
    *,
    recipe: Recipe,
    seeds: tuple[int, ...] = (0,),
    device: str = "cpu",
    tick: Tick | None = None,
    sites: Index | None = None,
) -> Trained:
    """Train a copy of ``tail`` with a head on it.

    Parameters
    ----------
    tail : as it was cut; it stays as it is.
    activations : (m, *shape), which may be a file's.
    rows : (n,) rows of ``activations``: the support.
    labels, groups : (n,) classes in 0 .. c-1, and numbers of copies, which are held out together.
    seeds : of everything that is random; the same seeds give the same classifier on the same machine.
    tick : told after every epoch what is being done.
    sites : (n,) what else is held out together, where there are enough of them (:mod:`featx.heads.folds`).

    Raises
    ------
    UsageError
        Early stopping is asked for, and a class has a single image: there is nothing to hold out.
    """
    if recipe.augment and not tail.takes_pixels:
        raise UsageError(
            "activations cannot be mirrored or shifted, images can", where="augment",
            hint="Use --unfreeze all, or --no-augment.",
        )  # fmt: skip
    tell = tick or (lambda what: None)
    losses = None
    epochs = recipe.epochs
    data = _Data(activations, device)
    frozen = None if recipe.from_scratch else embed(tail, activations, rows, device=device)
    seed = int(np.random.SeedSequence(list(seeds)).generate_state(1)[0])
    with seeded(seed, device=device):  # dropout, random heads
        if recipe.early_stop:
            losses = _held_out(tail, data, rows, labels, groups, frozen, recipe, seeds, tell, sites)
            epochs = int(losses.argmin())
        classifier = _start(tail, labels, frozen).to(device)
        for _ in _epochs(classifier, data, rows, labels, recipe, seeds, epochs):
            tell("training")
        _settle(classifier, data, rows, recipe)
    return Trained(classifier.requires_grad_(False).eval(), epochs, losses)


def embed(tail: Tail, activations: NDArray[Any], rows: Index, *, device: str = "cpu") -> NDArray[np.float32]:
    """Embeddings (n, d) of rows of ``activations``."""
    module = copy.deepcopy(tail).to(device)
    return _run(module, _Data(activations, device), rows).astype(np.float32)


def scores(classifier: Classifier, activations: NDArray[Any], rows: Index, *, tick: Tick | None = None) -> Array:
    """Logits (n, c), float64, of rows of ``activations``."""
    device = str(classifier.coef.device)
    return _run(classifier, _Data(activations, device), rows, tick).astype(np.float64)


class _Data:
    """Rows of activations as tensors on a device, a batch at a time, so that they may be a file larger than memory."""

    def __init__(self, activations: NDArray[Any], device: str) -> None:
        self.activations, self.device = activations, device

    def batch(self, rows: Index) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.activations[rows])).to(self.device)


def _run(module: nn.Module, data: _Data, rows: Index, tick: Tick | None = None) -> NDArray[np.float32]:
    parts = []
    module.eval()
    with torch.inference_mode():
        for start in range(0, len(rows), _JUDGED):
            parts.append(module(data.batch(rows[start : start + _JUDGED])).cpu().numpy())
            if tick:
                tick("judging")
    return np.concatenate(parts)


def _held_out(
    tail: Tail,
    data: _Data,
    rows: Index,
    labels: NDArray[np.integer],
    groups: Index,
    frozen: NDArray[np.float32] | None,
    recipe: Recipe,
    seeds: tuple[int, ...],
    tell: Tick,
    sites: Index | None,
) -> Array:
    """Mean log-loss of held-out rows by epoch (epochs + 1,)."""
    smallest = int(distinct_counts(labels, groups, int(labels.max()) + 1).min())
    if smallest < 2:
        raise UsageError(
            "too few images to stop early by",
            expected="at least 2 different images of every class in the support",
            found=smallest,
            hint="Ask for 2 shots or more, or for a fixed number of epochs with --no-early-stop.",
        )
    folds = fold_numbers(labels, groups, N_FOLDS, list(seeds), sites)
    total, counted = np.zeros(recipe.epochs + 1), 0
    for fold in range(int(folds.max()) + 1):
        held = folds == fold
        kept = np.flatnonzero(~held)
        some = None if frozen is None else frozen[kept]
        classifier = _start(tail, labels[kept], some).to(data.device)
        target = torch.from_numpy(labels[held].astype(np.int64))
        for epoch, _ in enumerate(_epochs(classifier, data, rows[kept], labels[kept], recipe, seeds, recipe.epochs)):
            _settle(classifier, data, rows[kept], recipe)
            logits = torch.from_numpy(_run(classifier, data, rows[held]))
            total[epoch] += float(functional.cross_entropy(logits, target, reduction="sum"))
            tell(f"stopping early, fold {fold + 1}")
        counted += int(held.sum())
        if counted >= ENOUGH_HELD_OUT:
            break
    return total / counted


def _start(tail: Tail, labels: NDArray[np.integer], frozen: NDArray[np.float32] | None) -> Classifier:
    """The classifier before training: the tail as it is, and the logistic head of its embeddings, or a random one."""
    own = copy.deepcopy(tail)
    n_classes = int(labels.max()) + 1
    if frozen is None:
        with torch.no_grad():
            d = int(tail(torch.zeros((1, *tail.shape), dtype=tail.dtype)).shape[1])
        coef = torch.empty(n_classes, d)
        nn.init.normal_(coef, std=d**-0.5)
        return Classifier(own, coef, torch.zeros(n_classes), "none")
    # Unit length and no other normaliser: training moves embeddings, and what others learn of them would not follow.
    fitted = Scorer.of(make_head("logreg", kind="l2", C=START_C).fit(frozen, labels))
    assert fitted.coef is not None
    assert fitted.intercept is not None
    coef, intercept = (torch.from_numpy(array.astype(np.float32)) for array in (fitted.coef, fitted.intercept))
    return Classifier(own, coef, intercept, "l2")


def _epochs(
    classifier: Classifier,
    data: _Data,
    rows: Index,
    labels: NDArray[np.integer],
    recipe: Recipe,
    seeds: tuple[int, ...],
    epochs: int,
) -> Iterator[None]:
    """Train; stops before the first epoch and after each, so that it can be judged there."""
    rng = np.random.default_rng([*seeds, 1])
    batches = max(1, round(len(rows) / recipe.batch_size))
    target = torch.from_numpy(labels.astype(np.int64)).to(data.device)
    head, body = [classifier.coef, classifier.intercept], list(classifier.tail.parameters())
    rates = [{"params": body, "lr": recipe.learning_rate}, {"params": head, "lr": recipe.head_rate}]
    optimiser = torch.optim.AdamW(rates, weight_decay=recipe.weight_decay)
    # Always as long as the whole recipe: stopping at epoch k is then the same run, cut short.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.epochs * batches)
    yield
    for _ in range(epochs):
        classifier.train(recipe.from_scratch)
        for some in np.array_split(rng.permutation(len(rows)), batches):
            batch = data.batch(rows[some])
            if recipe.augment:
                batch = _augmented(batch, rng)
            loss = functional.cross_entropy(classifier(batch), target[torch.from_numpy(some).to(data.device)])
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
        yield


def _settle(classifier: Classifier, data: _Data, rows: Index, recipe: Recipe) -> None:
    """From scratch: batch statistics of the network as it is now, over the rows it was trained on."""
    if recipe.from_scratch:
        steps = range(0, len(rows), _JUDGED)
        with torch.no_grad():
            update_bn((data.batch(rows[start : start + _JUDGED]) for start in steps), classifier)


def _augmented(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Each of (n, h, w, 3) mirrored or not, and shifted by up to an eighth; the edge is reflected."""
    height, width = pixels.shape[1:3]
    down, right = height // 8, width // 8
    padded = functional.pad(pixels.permute(0, 3, 1, 2).float(), (right, right, down, down), mode="reflect")
    out = []
    for image in padded:
        y, x = int(rng.integers(2 * down + 1)), int(rng.integers(2 * right + 1))
        part = image[:, y : y + height, x : x + width]
        out.append(part.flip(2) if rng.random() < 0.5 else part)
    return torch.stack(out).permute(0, 2, 3, 1).to(torch.uint8)
