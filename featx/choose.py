"""Normaliser and penalty of a head, chosen inside the support and nowhere else.

The choice is by grouped, stratified cross-validation of the support, by a proper score where the head
has one (log-loss for probabilities, squared error for ridge). All penalties of all folds are solved
together on one projection where the normaliser treats each row by itself. Where a class has fewer than
two different images there is nothing to validate on, and the head's stated defaults hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier

from featx.heads import (
    Centroid,
    Discriminant,
    Head,
    Logistic,
    Ridge,
    SquaredHinge,
    mean_squared_norm,
    signs,
    with_constant,
)
from featx.normalise import Kind, Normalise
from featx.solvers import Array, Loss, RowSpace, discriminant_path, newton_path, ridge_held_out, softmax
from featx.splits import Index, distinct_counts, fold_numbers

N_FOLDS = 5
#: Below this many different images of the smallest class the default normaliser is taken: choosing among
#: several inside five shots loses more than it gains.
SHOTS_FOR_KIND = 10
#: A larger support is thinned to about this many rows for the choice (not for the fit that follows):
#: penalties are scale-free, and more rows hardly change which one is best.
MAX_ROWS = 400
#: Enough to rank penalties; the fit that follows is exact. Mean losses move by less than 1e-3 of themselves, far less
#: than their standard errors: 48 choices on three image sets were those of 1e-8.
_TOLERANCE = 1e-5
_SEARCH_TOLERANCE = 1e-7


@dataclass(frozen=True)
class Choice:
    """What was chosen, and on what grounds.

    Attributes
    ----------
    params : for :meth:`featx.heads.Head.build`.
    score : mean out-of-fold loss of the choice, or None where the defaults were taken. It was used to
        select and is too optimistic to report as a result.
    n_folds : 0 where the defaults were taken.
    converged : whether every fit on the way did.
    """

    params: dict[str, Any]
    score: float | None
    n_folds: int
    converged: bool


class Views:
    """The rows of a support as the heads see them: each normaliser and each row space is made once, for all heads.

    Parameters
    ----------
    rows : (n, d) embeddings.
    mean : (d,) from elsewhere, as of :class:`featx.heads.Normalise`.
    """

    def __init__(self, rows: NDArray[np.floating], mean: Array | None = None) -> None:
        self.raw, self.mean = rows, mean
        self._normalisers: dict[Kind, tuple[Normalise, Array]] = {}
        self._spaces: dict[tuple[Kind, bool], RowSpace] = {}
        self._parts: dict[bytes, Views] = {}

    def normaliser(self, kind: Kind) -> Normalise:
        """Fitted to the rows."""
        return self._normalised(kind)[0]

    def rows(self, kind: Kind) -> Array:
        """Normalised rows (n, d)."""
        return self._normalised(kind)[1]

    def _normalised(self, kind: Kind) -> tuple[Normalise, Array]:
        if kind not in self._normalisers:
            fitted = Normalise(kind, self.mean).fit(self.raw)
            self._normalisers[kind] = fitted, fitted.transform(self.raw)
        return self._normalisers[kind]

    def space(self, kind: Kind, estimator: type) -> RowSpace:
        """What ``estimator.space_of`` gives for the normalised rows."""
        key = kind, estimator in (SquaredHinge, Ridge)  # those that penalise their intercept
        if key not in self._spaces:
            self._spaces[key] = (SquaredHinge if key[1] else Logistic).space_of(self.rows(kind))
        return self._spaces[key]

    def part(self, some: Index) -> Views:
        """The views of these rows only."""
        return self._parts.setdefault(some.tobytes(), Views(self.raw[some], self.mean))


def fit_head(head: Head, params: dict[str, Any], views: Views, labels: NDArray[np.integer]) -> Any:
    """The classifier that ``head.build(**params)`` would fit behind its normaliser ``params["kind"]``."""
    classifier = head.build(**params).named_steps["classify"]
    rows = views.rows(params["kind"])
    if head.estimator in (Logistic, SquaredHinge, Ridge, Discriminant):
        return classifier.fit(rows, labels, space=views.space(params["kind"], head.estimator))
    return classifier.fit(rows, labels)


def choose(
    head: Head,
    rows: NDArray[np.floating] | Views,
    labels: NDArray[np.integer],
    groups: Index,
    *,
    random_state: Any = 0,
) -> Choice:
    """Choose the parameters of ``head`` on a support.

    Parameters
    ----------
    rows : (n, d) embeddings of the support, or their views, which heads then share.
    labels : (n,) in 0 .. c-1, every class present.
    groups : (n,) dense numbers of duplicates, which stay in one fold.
    random_state : seed or seeds of the folds.
    """
    n_classes = int(labels.max()) + 1
    smallest = int(distinct_counts(labels, groups, n_classes).min())
    kinds = head.kinds if smallest >= SHOTS_FOR_KIND else head.kinds[:1]
    if smallest < 2 or (len(kinds) == 1 and not head.parameter):
        return Choice(head.default, None, 0, True)
    views = rows if isinstance(rows, Views) else Views(rows, head.mean)
    if len(labels) > MAX_ROWS:
        some = _thin(labels, random_state)
        views, labels, groups = views.part(some), labels[some], np.unique(groups[some], return_inverse=True)[1]
    folds = fold_numbers(labels, groups, N_FOLDS, random_state)
    start = head.default[head.parameter] if head.parameter else 0.0
    kind, converged, score = kinds[0], True, 0.0
    if len(kinds) > 1:
        each = []
        for name in kinds:
            losses, fine = out_of_fold_losses(head, name, views, labels, folds, (start,))
            each.append(losses[0])
            converged &= fine
        kind = kinds[_clearly_best(np.stack(each))]
        score = float(each[kinds.index(kind)].mean())
    if not head.parameter:
        return Choice({"kind": kind}, score, int(folds.max()) + 1, converged)
    values = head.values
    if head.estimator is KNeighborsClassifier:
        values = tuple(k for k in values if k <= len(labels) - int(np.bincount(folds).max()))
    losses, fine = out_of_fold_losses(head, kind, views, labels, folds, values)
    if head.cautious:
        order = [values.index(start), *(i for i, value in enumerate(values) if value != start)]
        best = order[_clearly_best(losses[order])]
        params = {"kind": kind, head.parameter: values[best]}
        return Choice(params, float(losses[best].mean()), int(folds.max()) + 1, converged and fine)
    means = losses.mean(axis=1)
    # Equal losses are common for accuracies: the value nearest to the default is then as good as any.
    ties = np.flatnonzero(means <= means.min() * (1 + 1e-12))
    best = int(ties[np.argmin(np.abs(np.log(np.array(values)[ties] / start)))])
    params = {"kind": kind, head.parameter: values[best]}
    return Choice(params, float(means[best]), int(folds.max()) + 1, converged and fine)


def _thin(labels: NDArray[np.integer], random_state: Any) -> Index:
    """About MAX_ROWS rows, the same share of every class but never fewer than twice the folds."""
    order = np.argsort(np.random.default_rng(random_state).random(len(labels)), kind="stable")
    counts = np.bincount(labels)
    wanted = np.maximum(np.rint(counts * MAX_ROWS / len(labels)).astype(int), 2 * N_FOLDS)
    picked = [order[labels[order] == c][: wanted[c]] for c in range(len(counts))]
    return np.sort(np.concatenate(picked))


def _clearly_best(losses: Array) -> int:
    """Row of losses (v, n) to take: the first, unless another is better by more than two standard errors.

    Fewer than that was measured to lose: on five image sets a choice by one standard error costs 0.1 to 0.2
    points at every number of shots against a sensible default.
    """
    best = int(losses.mean(axis=1).argmin())
    gain = losses[0] - losses[best]
    return best if gain.mean() > 2.0 * gain.std() / np.sqrt(len(gain)) else 0


Scores: TypeAlias = tuple[Array, bool]
Family: TypeAlias = Callable[[Views, Kind, NDArray[np.integer], Index, tuple[float, ...]], Scores]


def out_of_fold_losses(
    head: Head,
    kind: Kind,
    rows: NDArray[np.floating] | Views,
    labels: NDArray[np.integer],
    folds: Index,
    values: tuple[float, ...],
) -> tuple[Array, bool]:
    """Loss (v, n) of every row for every value of the head's parameter, by fits without the row's fold.

    The loss is the head's criterion. The normaliser sees the whole support, without labels, so that all
    folds share one projection. The second value says whether all fits converged.
    """
    views = rows if isinstance(rows, Views) else Views(rows, head.mean)
    scores, converged = _FAMILIES[head.estimator](views, kind, labels, folds, values)
    return _losses(head, scores, labels), converged


def _losses(head: Head, scores: Array, labels: NDArray[np.integer]) -> Array:
    n_classes = int(labels.max()) + 1
    if head.criterion == "log_loss":
        picked = [softmax(each)[np.arange(len(labels)), labels] for each in scores]
        return np.asarray(-np.log(np.maximum(np.stack(picked), np.finfo(np.float64).tiny)))
    if head.criterion == "accuracy":
        named = scores.argmax(axis=2) if scores.shape[2] > 1 else (scores[:, :, 0] > 0)
        return np.asarray(named != labels, dtype=np.float64)
    targets = signs(labels, n_classes)
    gaps = targets - scores if head.criterion == "squared_error" else np.maximum(1 - targets * scores, 0)
    return np.asarray((gaps**2).sum(axis=2))


def _penalised(
    views: Views,
    kind: Kind,
    labels: NDArray[np.integer],
    folds: Index,
    values: tuple[float, ...],
    *,
    hinge: bool,
) -> Scores:
    space = views.space(kind, SquaredHinge if hinge else Logistic)
    weights = np.stack([(folds != number).astype(np.float64) for number in range(int(folds.max()) + 1)])
    z = space.coordinates
    unit = np.array([mean_squared_norm(z, w) for w in weights])
    path = newton_path(
        z, labels, int(labels.max()) + 1, weights, [value / unit for value in values],
        loss="squared_hinge" if hinge else "softmax", fit_intercept=not hinge, tolerance=_TOLERANCE,
    )  # fmt: skip
    out, converged = [], True
    for point in path:
        scores = np.zeros((len(z), point.coef.shape[2]))
        for i in range(len(weights)):
            held = folds == i
            scores[held] = z[held] @ point.coef[i] + point.intercept[i]
        out.append(scores)
        converged &= bool(point.converged.all())
    return np.stack(out), converged


@dataclass(frozen=True)
class Search:
    """What a grid search over plain penalties found; see :func:`search_penalty`.

    ``accuracies`` (v,) are means over folds; ``best`` is the first of the highest, as in ``GridSearchCV``; ``coef``
    (c, d) and ``intercept`` (c,) are those of the refit.
    """

    accuracies: Array
    best: int
    coef: Array
    intercept: Array
    converged: bool


def search_penalty(
    loss: Loss, rows: NDArray[np.floating], labels: NDArray[np.integer], folds: Index, cs: Sequence[float]
) -> Search:
    """``GridSearchCV`` of ``LogisticRegression`` or ``LinearSVC`` over C, with its refit, on shared work.

    Parameters
    ----------
    loss : ``"softmax"`` or ``"squared_hinge"``.
    rows : (n, d); labels : (n,) in 0 .. c-1; folds : (n,) in 0 .. f-1.
    cs : ascending plain values of C.
    """
    hinge = loss == "squared_hinge"
    space = RowSpace.of(with_constant(np.asarray(rows), 1.0), centre=False) if hinge else RowSpace.of(rows)
    z, n_folds = space.coordinates, int(folds.max()) + 1
    # The last weighting is the whole support: its point of the path is the refit.
    weights = np.array([*(folds != number for number in range(n_folds)), np.ones(len(z))], dtype=np.float64)
    path = newton_path(
        z, labels, int(labels.max()) + 1, weights, [np.full(n_folds + 1, c) for c in cs], loss=loss,
        fit_intercept=not hinge, tolerance=_SEARCH_TOLERANCE,
    )  # fmt: skip
    accuracies, fits, converged = np.empty(len(cs)), [], True
    for i, point in enumerate(path):
        right = np.empty(n_folds)
        for number in range(n_folds):
            held = folds == number
            scores = z[held] @ point.coef[number] + point.intercept[number]
            named = scores.argmax(axis=1) if scores.shape[1] > 1 else scores[:, 0] > 0
            right[number] = (named == labels[held]).mean()
        accuracies[i] = right.mean()
        fits.append((point.coef[-1], point.intercept[-1]))
        converged &= bool(point.converged.all())
    best = int(np.argmax(np.round(accuracies, 12)))
    inner, offset = fits[best]
    coef = (space.basis @ inner).T
    if hinge:
        return Search(accuracies, best, coef[:, :-1], coef[:, -1], converged)
    return Search(accuracies, best, coef, offset - coef @ space.origin, converged)


def _logistic(*args: Any) -> Scores:
    return _penalised(*args, hinge=False)


def _squared_hinge(*args: Any) -> Scores:
    return _penalised(*args, hinge=True)


def _ridge(
    views: Views,
    kind: Kind,
    labels: NDArray[np.integer],
    folds: Index,
    values: tuple[float, ...],
) -> Scores:
    targets = signs(labels, int(labels.max()) + 1)
    space = views.space(kind, Ridge)
    unit = mean_squared_norm(space.coordinates)
    held_out = [ridge_held_out(space, targets, value * unit, folds, fit_intercept=False) for value in values]
    return np.stack(held_out), True


def _discriminant(
    views: Views,
    kind: Kind,
    labels: NDArray[np.integer],
    folds: Index,
    values: tuple[float, ...],
) -> Scores:
    n_classes = int(labels.max()) + 1
    out = np.zeros((len(values), len(labels), n_classes))
    n_features = views.raw.shape[1]
    rows = views.space(kind, Discriminant).coordinates
    for number in range(int(folds.max()) + 1):
        held = folds == number
        origin = rows[~held].mean(axis=0)
        space = RowSpace(origin, np.eye(len(origin)), rows[~held] - origin)
        path = discriminant_path(space, labels[~held], n_classes, values, n_features=n_features)
        for i, (coef, offset) in enumerate(path):
            out[i, held] = rows[held] @ coef.T + offset
    return out, True


def _centroid(
    views: Views,
    kind: Kind,
    labels: NDArray[np.integer],
    folds: Index,
    values: tuple[float, ...],
) -> Scores:
    rows, n_classes = views.rows(kind), int(labels.max()) + 1
    out = np.zeros((1, len(rows), n_classes))
    for number in range(int(folds.max()) + 1):
        held = folds == number
        means = np.stack([rows[~held & (labels == c)].mean(axis=0) for c in range(n_classes)])
        out[0, held] = rows[held] @ means.T - 0.5 * np.einsum("ij,ij->i", means, means)
    return out, True


def _neighbours(
    views: Views,
    kind: Kind,
    labels: NDArray[np.integer],
    folds: Index,
    values: tuple[float, ...],
) -> Scores:
    rows = views.rows(kind)
    lengths = np.einsum("ij,ij->i", rows, rows)
    distance = lengths[:, None] + lengths[None] - 2.0 * rows @ rows.T
    distance[folds[:, None] == folds[None]] = np.inf
    nearest = np.argsort(distance, axis=1, kind="stable")[:, : int(max(values))]
    hot = (labels[nearest][:, :, None] == np.arange(int(labels.max()) + 1)).astype(np.float64)
    votes = np.cumsum(hot, axis=1)
    return np.stack([votes[:, int(k) - 1] for k in values]), True


_FAMILIES: dict[type, Family] = {
    Logistic: _logistic,
    SquaredHinge: _squared_hinge,
    Ridge: _ridge,
    Discriminant: _discriminant,
    Centroid: _centroid,
    KNeighborsClassifier: _neighbours,
}
