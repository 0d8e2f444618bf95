"""What a model's own images say of what is unlike them: learned and measured when a head is fitted.

Pure: arrays in, numbers out. The score and its sources are in :mod:`featx.models.novelty`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student
from threadpoolctl import threadpool_limits

from featx._arrays import Index
from featx.errors import plural
from featx.heads import Array, fold_numbers
from featx.models.calibrate import clopper_pearson
from featx.models.novelty import N_NEAREST, Familiarity, Single, is_unknown, kept_rows, nearest_mean, shares_among

_MOST_ROWS = 512
"""Own images that a model keeps, or more where five of each class are more: each photo is compared with all. Four times
as many refused no more of other sets, and of classes left out at most five points more.
"""

_ROOM = 10 * 2**20
"""Bytes in memory that they may take, of long embeddings."""

_MOST_JUDGED = 2000
"""Own images that are judged by the others: more would not make a share finer than anybody asks for."""

_MOST_LEFT_OUT = 50
"""Classes that are left out in turn."""

_N_FOLDS = 20
_LEAVE_ONE_OUT = 100
"""Images up to which each is a fold of its own: a fold of several would leave too few to compare with."""


@dataclass(frozen=True)
class Measured:
    """Own images that are called unknown, and those of classes left out in turn, each judged by images it is not among.

    Parameters
    ----------
    images : different own images that were compared with.
    own : (n,) whether each own image that was judged is called unknown.
    left_out : of each class that was left out, by its number, (n,) likewise; None where that was not tried.
    """

    images: int
    own: NDArray[np.bool_]
    left_out: dict[int, NDArray[np.bool_]] | None


def learn(
    embeddings: NDArray[np.floating],
    labels: NDArray[np.integer],
    groups: Index,
    *,
    kind: str,
    max_unknown: float,
    random_state: int = 0,
    sites: Index | None = None,
) -> tuple[Familiarity | None, Measured | None]:
    """Keep what it takes to know own images again, and measure what becomes of them.

    Of copies one counts: it would find the others, and new photos find no copies.

    Parameters
    ----------
    embeddings : (n, d).
    labels : (n,) in 0 .. c-1.
    groups : (n,) dense numbers; rows with the same number are copies.
    kind : as of :class:`Familiarity`.
    max_unknown : share of own images that may be called unknown; with 0 there is nothing to learn.
    random_state : seed of the folds, and of the choice where there are very many images.
    sites : (n,) dense numbers of what belongs together, with copies: nobody is then judged by images of its own site,
        for photos of a new one find none; but where a site has nearly all images, only copies count.

    Returns
    -------
    Nothing, twice, where ``max_unknown`` is 0 or there is one image only.
    """
    one = np.unique(groups, return_index=True)[1]
    if max_unknown == 0 or len(one) < 2:
        return None, None
    order = np.random.default_rng(random_state).permutation(one)
    kept = _in_turn(order, labels, embeddings.shape[1])
    judged = order[:_MOST_JUDGED]
    rows = kept_rows(embeddings, kept, kind)
    with threadpool_limits(limits=1, user_api="blas"):
        cosines = kept_rows(embeddings, judged, kind) @ rows.T
    # Nobody is evidence for itself.
    cosines[judged[:, None] == kept] = -np.inf
    own_folds = np.arange(len(order))
    if sites is not None:
        near = sites[judged][:, None] == sites[kept]
        if (~near).sum(axis=1).min() >= N_NEAREST:
            cosines[near] = -np.inf
            own_folds = np.unique(sites[order], return_inverse=True)[1].reshape(-1)
    own = np.sort(nearest_mean(cosines, min(N_NEAREST, len(kept) - 1)))
    judge = partial(_judge, cosines, max_unknown=max_unknown)
    refused = np.zeros(len(judged), bool)
    fold_of = np.full(len(embeddings), -1)
    n_folds = len(one) if len(one) <= _LEAVE_ONE_OUT else _N_FOLDS
    everyone = np.zeros(len(order), dtype=np.intp)
    fold_of[order] = fold_numbers(everyone, own_folds, n_folds, random_state)
    for fold in range(int(fold_of.max()) + 1):
        refused[fold_of[judged] == fold] = judge(fold_of[judged] == fold, fold_of[kept] == fold)
    classes = np.unique(labels[judged])
    left_out = None
    if len(classes) > 2:
        some = np.random.default_rng(random_state).permutation(classes)[:_MOST_LEFT_OUT]
        left_out = {int(c): judge(labels[judged] == c, labels[kept] == c) for c in np.sort(some)}
    return Familiarity(rows, own, kind), Measured(len(judged), refused, left_out)


def similarity_to(
    embeddings: NDArray[np.floating], own: NDArray[np.floating], labels: NDArray[np.integer], *, random_state: int = 0
) -> Array:
    """Similarity (n,) of embeddings (n, d) to images (m, d) that they are not among, of classes ``labels`` (m,)."""
    order = np.random.default_rng(random_state).permutation(len(own))
    rows = kept_rows(own, _in_turn(order, labels, own.shape[1]), "l2")
    return Familiarity(rows, np.zeros(0), "l2").similarity(embeddings)


def learn_from_folds(
    embeddings: NDArray[np.floating],
    labels: NDArray[np.integer],
    groups: Index,
    similarity: Array,
    folds: Index,
    *,
    max_unknown: float,
    random_state: int = 0,
) -> tuple[Familiarity | None, Measured | None]:
    """:func:`learn` where the embeddings themselves were trained on the images.

    Parameters
    ----------
    embeddings : (n, d) of the network to keep.
    labels, groups, max_unknown, random_state : as of :func:`learn`.
    similarity : (n,) of each image, by :func:`similarity_to` and a network that has not seen its fold.
    folds : (n,) the fold of each image.
    """
    one = np.unique(groups, return_index=True)[1]
    if max_unknown == 0 or len(one) < 2:
        return None, None
    order = np.random.default_rng(random_state).permutation(one)
    rows = kept_rows(embeddings, _in_turn(order, labels, embeddings.shape[1]), "l2")
    refused = np.zeros(len(one), bool)
    for fold in np.unique(folds[one]):
        held = folds[one] == fold
        refused[held] = is_unknown(shares_among(np.sort(similarity[one[~held]]), similarity[one[held]]), max_unknown)
    return Familiarity(rows, np.sort(similarity[one]), "l2"), Measured(len(one), refused, None)


def _judge(cosines: Single, images: NDArray[np.bool_], rows: NDArray[np.bool_], *, max_unknown: float) -> Any:
    """Whether some of the judged images are called unknown by a model that has not seen them, nor these own images."""
    others = cosines[:, ~rows]
    if others.shape[1] < 2:
        return np.zeros(int(images.sum()), bool)
    similarity = nearest_mean(others, min(N_NEAREST, others.shape[1] - 1))
    return is_unknown(shares_among(np.sort(similarity[~images]), similarity[images]), max_unknown)


def _in_turn(order: Index, labels: NDArray[np.integer], dims: int) -> Index:
    """The rows of ``order`` that a model keeps, ascending: of each class in turn, so that a rare one keeps its own."""
    classes = np.unique(labels)
    most = min(max(_MOST_ROWS, N_NEAREST * len(classes)), max(_ROOM // (4 * dims), 2 * N_NEAREST))
    rank = np.empty(len(order), dtype=np.intp)
    for c in classes:
        of_class = np.flatnonzero(labels[order] == c)
        rank[of_class] = np.arange(len(of_class))
    return np.sort(order[np.argsort(rank, kind="stable")[:most]])


# --- what to say of it --------------------------------------------------------------------------------------------


def metrics_of(measured: Measured, class_names: tuple[str, ...]) -> dict[str, Any]:
    """Plain JSON of what was measured: shares called unknown, with 95 % intervals."""
    low, high = clopper_pearson(int(measured.own.sum()), len(measured.own))
    out: dict[str, Any] = {
        "images": measured.images,
        # Rounded up, so that what is said can be asked for.
        "smallest_max_unknown": math.ceil(1e4 / (measured.images + 1)) / 1e4,
        "own_refused": {"mean": float(measured.own.mean()), "low": low, "high": high},
        "class_left_out": None,
    }
    if measured.left_out is not None:
        shares = np.array([each.mean() for each in measured.left_out.values()])
        images = np.array([len(each) for each in measured.left_out.values()])
        named = dict(zip((class_names[c] for c in measured.left_out), shares.tolist(), strict=True))
        mean, low, high = _over_classes(shares, images)
        out["class_left_out"] = {"classes": len(shares), "mean": mean, "low": low, "high": high, "per_class": named}
    return out


def _over_classes(shares: Array, images: NDArray[np.integer]) -> tuple[float, float, float]:
    """The mean share of a class like these, and its 95 % interval (Student's): classes are what was drawn, not images.

    Classes of a few images may agree by chance, so the variance is at least that of counting images.
    """
    counted = (shares * images + 1) / (images + 2)
    variance = max(float(shares.var(ddof=1)), float((counted * (1 - counted) / (images + 2)).mean()))
    mean = float(shares.mean())
    half = float(student.ppf(0.975, len(shares) - 1)) * math.sqrt(variance / len(shares))
    return mean, max(mean - half, 0.0), min(mean + half, 1.0)


def warnings_of_unknown(metrics: dict[str, Any] | None, max_unknown: float) -> Iterator[str]:
    """Sentences about a model that can call nothing unknown."""
    if max_unknown == 0:
        return
    if metrics is None:
        yield "All images are copies of one, so nothing can be called unknown. Add images."
    elif metrics["images"] + 1 < 1 / max_unknown - 1e-9:
        yield (
            f"Nothing is called unknown: promising that of at most {100 * max_unknown:g} % of your own photos takes at "
            f"least {plural(math.ceil(1 / max_unknown - 1 - 1e-9), 'different image')}, found {metrics['images']}. "
            f"Add images, or fit again with --max-unknown {metrics['smallest_max_unknown']:g}."
        )
