"""Classes that will be met in other shares than they were labelled in.

Calibrated log-probabilities move by the log of what a class's share will be over what it was (Saerens, Latinne and
Decaestecker, "Adjusting the Outputs of a Classifier to New a Priori Probabilities", Neural Computation 2002). That is
right for scores that mean the shares that were labelled, as those of ``logreg`` and ``lda`` nearly do; those of
``ridge``, ``linear_svm``, ``nearest_centroid`` and ``knn`` mean none. So each class first gets an offset of its own,
fitted with the sharpness to out-of-fold scores (bias-corrected temperature scaling: Alexandari, Kundaje and Shrikumar,
ICML 2020), with which the mean probability of every class is its share among the images. Both end in the head's
intercepts, so one that is exported has them, too.

Pure: arrays in, numbers out.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from featx._arrays import Index
from featx.errors import UsageError, did_you_mean, in_words
from featx.heads import Array
from featx.models.calibrate import fit_sharpness

Prior: TypeAlias = Mapping[str, float] | Literal["equal"] | None
"""The share of each class by its name, the same for all, or (None) as they were labelled."""

_NEAR = 0.01
"""How far from 1 the sum of shares may be that people have rounded."""


def read_prior(text: str) -> Prior:
    """What ``--prior`` means: ``as-is``, ``equal``, or a file: CSV with ``class,share`` or JSON ``{class: share}``.

    Raises
    ------
    UsageError
        No such file, or it has no share for each of some classes.
    """
    if text == "as-is":
        return None
    if text == "equal":
        return "equal"
    path = Path(text)
    if not path.is_file():
        raise UsageError("no such file", where="--prior", expected="as-is, equal or a file .json or .csv", found=text)
    try:
        content = path.read_text(encoding="utf-8-sig")
        return _of_json(path, content) if path.suffix.lower() == ".json" else _of_csv(path, content)
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise UsageError(
            f"not a table of shares ({in_words(error)})",
            where=path,
            expected='JSON {"class": share} or CSV class,share',
        ) from error


def _of_json(path: Path, content: str) -> Mapping[str, float]:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        for name, _ in pairs:
            if sum(other == name for other, _ in pairs) > 1:
                raise UsageError("a class is named twice", where=path, found=name)
        return dict(pairs)

    shares = json.loads(content, object_pairs_hook=once)
    if not isinstance(shares, dict):
        raise ValueError("no JSON object")
    return {name: _share(path, name, value) for name, value in shares.items()}


def _of_csv(path: Path, content: str) -> Mapping[str, float]:
    rows = [row for row in csv.reader(content.splitlines(), skipinitialspace=True) if any(row)]
    if not rows or [name.strip().lower() for name in rows[0]] != ["class", "share"]:
        raise UsageError("not a table of shares", where=path, expected="the columns class,share", found=rows[:1])
    shares: dict[str, float] = {}
    for row in rows[1:]:
        if len(row) != 2:
            raise UsageError("not a class and its share", where=path, found=",".join(row))
        if row[0] in shares:
            raise UsageError("a class is named twice", where=path, found=row[0])
        shares[row[0]] = _share(path, row[0], row[1])
    return shares


def _share(path: Path, name: str, value: object) -> float:
    try:
        share = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        share = math.nan
    if not 0 < share < math.inf:
        raise UsageError(
            f"the share of {name!r} is not valid", where=path, expected="a number above 0", found=value,
            hint="A class that does not occur is better left out of the store.",
        )  # fmt: skip
    return share


def prior_shares(prior: Prior, class_names: Sequence[str]) -> Array | None:
    """The share (c,) of each class, summing to 1; None where they stay as they were labelled.

    Raises
    ------
    UsageError
        A class is missing or unknown, or the shares do not sum to 1 within 0.01.
    """
    if prior is None:
        return None
    if prior == "equal":
        return np.full(len(class_names), 1.0 / len(class_names))
    assert not isinstance(prior, str)
    for name in prior:
        if name not in class_names:
            raise UsageError(
                "a class that has no images", where="--prior", expected=", ".join(class_names), found=name,
                hint=did_you_mean(name, class_names) or None,
            )  # fmt: skip
    for name in class_names:
        if name not in prior:
            raise UsageError("a class without a share", where="--prior", found=name, hint="Name every class.")
    shares = np.array([prior[name] for name in class_names])
    if not (shares > 0).all():
        raise UsageError("a share that is not above 0", where="--prior", found=dict(prior))
    if not abs(shares.sum() - 1.0) <= _NEAR:
        raise UsageError("the shares do not sum to 1", where="--prior", found=f"{shares.sum():g}")
    return np.asarray(shares / shares.sum())


def class_weights(labels: NDArray[np.integer], shares: Array) -> Array:
    """How much an image of each class (c,) counts, so that classes of images (n,) have these shares; 1 on average."""
    counts = np.bincount(labels, minlength=len(shares))
    return np.asarray(shares * len(labels) / counts)


def fit_offsets(scores: Array, labels: NDArray[np.integer]) -> tuple[float, Array]:
    """A sharpness, and an offset (c,) for each class, with which a softmax of scores (n, c) is calibrated.

    As :func:`featx.models.calibrate.fit_sharpness`, as if one image more had been seen and were wrong; of that one all
    classes have their shares of the images, so that these stay the mean probabilities.
    """
    n, n_classes = scores.shape
    wrong = 2.0 / (n + 4.0)
    own = np.zeros(scores.shape)
    own[np.arange(n), labels] = 1.0
    target = (1.0 - wrong) * own + wrong * own.mean(axis=0)
    centred = scores - scores.max(axis=1, keepdims=True)
    start = fit_sharpness(scores, labels)

    def loss(point: Array) -> tuple[float, Array]:
        sharpness = start * math.exp(min(float(point[0]), 50.0))
        logits = sharpness * centred + point[1:]
        highest = logits.max(axis=1, keepdims=True)
        normaliser = np.log(np.exp(logits - highest).sum(axis=1, keepdims=True)) + highest
        gap = (np.exp(logits - normaliser) - target) / n
        slope = np.append((gap * sharpness * centred).sum(), gap.sum(axis=0))
        return float((normaliser[:, 0] - (target * logits).sum(axis=1)).mean()), slope

    best = minimize(loss, np.zeros(1 + n_classes), jac=True, method="L-BFGS-B", options={"maxiter": 1000, "gtol": 1e-8})
    offsets = best.x[1:] - best.x[1:].mean()
    return start * math.exp(float(best.x[0])), offsets


def shift(scores: Array, labels: NDArray[np.integer], shares: Array) -> tuple[float, Array]:
    """A sharpness, and what to add to scores (c,) before it, so that probabilities are those under ``shares`` (c,)."""
    sharpness, offsets = fit_offsets(scores, labels)
    had = np.bincount(labels, minlength=len(shares)) / len(labels)
    return sharpness, np.asarray((offsets + np.log(shares / had)) / sharpness)


def moved(
    scores: Array, labels: NDArray[np.integer], folds: Index, copies: Index, shares: Array
) -> tuple[float, Array, Array]:
    """:func:`shift` for the head that is kept, and out-of-fold scores (n, c) by shifts that their folds had no part in.

    ``copies`` (n,) are equal for images that are copies of each other, of which one counts.
    """
    one = np.unique(copies, return_index=True)[1]
    sharpness, added = shift(scores[one], labels[one], shares)
    out = np.zeros(scores.shape)
    for fold in np.unique(folds):
        held, others = folds == fold, one[folds[one] != fold]
        own, more = shift(scores[others], labels[others], shares)
        out[held] = own * (scores[held] + more)
    return sharpness, added, out / sharpness
