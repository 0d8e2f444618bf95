"""Normaliser and penalty of a head, chosen inside the support and nowhere else.

The choice is by grouped, stratified cross-validation of the support, by a proper score where the head
has one (log-loss wherever there are probabilities). All penalties of all folds are solved
together on one projection where the normaliser treats each row by itself. Where a class has fewer than
two different images there is nothing to validate on, and the head's stated defaults hold.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline

from featx._arrays import Index
from featx.heads.catalogue import (
    Centroid,
    Discriminant,
    Head,
    Logistic,
    Ridge,
    SquaredHinge,
    both_columns,
    mean_squared_norm,
    signs,
    with_constant,
)
from featx.heads.folds import distinct_counts, fold_numbers
from featx.heads.normalise import Normalise
from featx.heads.scorer import Kind, softmax
from featx.heads.solvers.blocks import is_large
from featx.heads.solvers.rows import Array, Loss, RowSpace, discriminant_path, newton_path, ridge_held_out, temperature

N_FOLDS = 5
#: A larger support is thinned to about this many rows for the choice (not for the fit that follows):
#: penalties are scale-free, and more rows hardly change which one is best.
MAX_ROWS = 400
#: Enough to rank penalties; the fit that follows is exact. Mean losses move by less than 1e-3 of themselves, far less
#: than their standard errors: 48 choices on three image sets were those of 1e-8.
_TOLERANCE = 3e-6
_PENALISED_INTERCEPT = (SquaredHinge, Ridge)
_IN_ROW_SPACE = (*_PENALISED_INTERCEPT, Logistic, Discriminant)
_SEARCH_TOLERANCE = 1e-7


@dataclass(frozen=True)
class Choice:
    """What was chosen, and on what grounds.

    Attributes
    ----------
    params : for :meth:`featx.heads.catalogue.Head.build`.
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
    mean : (d,) from elsewhere, as of :class:`featx.heads.catalogue.Normalise`.
    """

    def __init__(self, rows: NDArray[np.floating], mean: Array | None = None) -> None:
        self.raw, self.mean = rows, mean
        self._normalisers: dict[Kind, Normalise] = {}
        self._rows: dict[Kind, Array] = {}
        self._spaces: dict[tuple[Kind, bool], RowSpace] = {}
        self._parts: dict[bytes, Views] = {}

    def normaliser(self, kind: Kind) -> Normalise:
        """Fitted to the rows."""
        if kind not in self._normalisers:
            self._normalisers[kind] = Normalise(kind, self.mean).fit(self.raw)
        return self._normalisers[kind]

    def rows(self, kind: Kind) -> Array:
        """Normalised rows (n, d)."""
        if kind not in self._rows:
            self._rows[kind] = self.normaliser(kind).transform(self.raw)
        return self._rows[kind]

    def space(self, kind: Kind, estimator: type) -> RowSpace:
        """What ``estimator.space_of`` gives for the normalised rows."""
        key = kind, estimator in _PENALISED_INTERCEPT
        if key not in self._spaces:
            self._spaces[key] = (SquaredHinge if key[1] else Logistic).space_of(self.rows(kind))
        return self._spaces[key]

    def part(self, some: Index) -> Views:
        """The views of these rows only."""
        return self._parts.setdefault(some.tobytes(), Views(self.raw[some], self.mean))


def fit_chosen(
    head: Head,
    rows: NDArray[np.floating] | Views,
    labels: NDArray[np.integer],
    groups: Index,
    *,
    random_state: Any = 0,
    device: str | None = None,
) -> tuple[Choice, Pipeline]:
    """Choose as :func:`choose` does, and fit the choice on all rows: what a sweep, a fit and a test set share.

    Parameters
    ----------
    rows, labels, groups, random_state : as of :func:`choose`.
    device : of torch, where logistic regression on large rows (:func:`featx.heads.solvers.blocks.is_large`) is to be
    solved.

    Returns
    -------
    The choice, whose ``converged`` covers the last fit too, and the pipeline that ``head.build(**params).fit(rows,
    labels)`` would be.
    """
    views = rows if isinstance(rows, Views) else Views(rows, head.mean)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        choice = choose(head, views, labels, groups, random_state=random_state)
        pipeline = _fit(head, choice.params, views, labels, device)
    stopped = False
    for each in caught:
        if issubclass(each.category, ConvergenceWarning):
            stopped = True
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return replace(choice, converged=choice.converged and not stopped), pipeline


def _fit(head: Head, params: dict[str, Any], views: Views, labels: NDArray[np.integer], device: str | None) -> Pipeline:
    classifier, kind = head.build(**params).named_steps["classify"], params["kind"]
    normaliser = views.normaliser(kind)
    if head.estimator is Logistic and is_large(views.raw):
        classifier.fit_large(views.raw, labels, normaliser, device)
    else:
        known = {"space": views.space(kind, head.estimator)} if head.estimator in _IN_ROW_SPACE else {}
        classifier.fit(views.rows(kind), labels, **known)
    return Pipeline([("normalise", normaliser), ("classify", classifier)])


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
    kinds = head.kinds if smallest >= head.kind_shots else head.kinds[:1]
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
        kind, score, converged = _choose_kind(head, kinds, views, labels, folds, start)
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


def _choose_kind(
    head: Head, kinds: Sequence[Kind], views: Views, labels: NDArray[np.integer], folds: Index, start: float
) -> tuple[Kind, float, bool]:
    """A normaliser, its mean loss, and whether all fits converged.

    The first is kept, and no other tried, where it names every held-out row rightly: what a lower loss then tells is
    noise. Measured on cats and dogs (98 % right), where it brings back a third of what combined layers lose; four sets
    that are harder do not notice.
    """
    scores, converged = _out_of_fold_scores(head, kinds[0], views, labels, folds, (start,))
    each = [_losses(head, scores, labels)[0]]
    if _wrong(scores, labels)[0].any():
        for name in kinds[1:]:
            losses, fine = out_of_fold_losses(head, name, views, labels, folds, (start,))
            each.append(losses[0])
            converged &= fine
    best = _clearly_best(np.stack(each), head.kind_margin)
    return kinds[best], float(each[best].mean()), converged


def _thin(labels: NDArray[np.integer], random_state: Any) -> Index:
    """About MAX_ROWS rows, the same share of every class but never fewer than twice the folds."""
    order = np.argsort(np.random.default_rng(random_state).random(len(labels)), kind="stable")
    counts = np.bincount(labels)
    wanted = np.maximum(np.rint(counts * MAX_ROWS / len(labels)).astype(int), 2 * N_FOLDS)
    picked = [order[labels[order] == c][: wanted[c]] for c in range(len(counts))]
    return np.sort(np.concatenate(picked))


def _clearly_best(losses: Array, margin: float = 2.0) -> int:
    """Row of losses (v, n) to take: the first, unless another is better by more than ``margin`` standard errors.

    For normalisers and penalties fewer than two was measured to lose: on five image sets a choice by one standard error
    costs 0.1 to 0.2 points at every number of shots against a sensible default.
    """
    best = int(losses.mean(axis=1).argmin())
    gain = losses[0] - losses[best]
    return best if gain.mean() > margin * gain.std() / np.sqrt(len(gain)) else 0


Scores: TypeAlias = tuple[Array, bool]


@dataclass(frozen=True)
class _Validation:
    """A cross-validation: the arguments of :func:`out_of_fold_losses`."""

    views: Views
    kind: Kind
    labels: NDArray[np.integer]
    folds: Index
    values: tuple[float, ...]

    @property
    def n_classes(self) -> int:
        return int(self.labels.max()) + 1

    def held_out(self) -> list[NDArray[np.bool_]]:
        """For each fold which rows (n,) are in it."""
        return [self.folds == number for number in range(int(self.folds.max()) + 1)]


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
    scores, converged = _out_of_fold_scores(head, kind, views, labels, folds, values)
    return _losses(head, scores, labels), converged


def _out_of_fold_scores(
    head: Head, kind: Kind, views: Views, labels: NDArray[np.integer], folds: Index, values: tuple[float, ...]
) -> Scores:
    """Scores (v, n, c), or (v, n, 1) for the second of two classes, by fits without the row's fold."""
    return _FAMILIES[head.estimator](_Validation(views, kind, labels, folds, values))


def _losses(head: Head, scores: Array, labels: NDArray[np.integer]) -> Array:
    if head.criterion == "log_loss":
        picked = [softmax(each)[np.arange(len(labels)), labels] for each in scores]
        return np.asarray(-np.log(np.maximum(np.stack(picked), np.finfo(np.float64).tiny)))
    if head.criterion == "accuracy":
        return _wrong(scores, labels).astype(np.float64)
    short = np.maximum(1.0 - signs(labels, int(labels.max()) + 1) * scores, 0.0)
    return np.asarray((short**2).sum(axis=2))


def _wrong(scores: Array, labels: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Which rows (v, n) the scores name wrongly."""
    named = scores.argmax(axis=2) if scores.shape[2] > 1 else (scores[:, :, 0] > 0)
    return np.asarray(named != labels)


def _penalised(task: _Validation, *, hinge: bool) -> Scores:
    space = task.views.space(task.kind, SquaredHinge if hinge else Logistic)
    held_out = task.held_out()
    weights = np.array([~held for held in held_out], dtype=np.float64)
    z = space.coordinates
    unit = np.array([mean_squared_norm(z, w) for w in weights])
    path = newton_path(
        z, task.labels, task.n_classes, weights, [value / unit for value in task.values],
        loss="squared_hinge" if hinge else "softmax", fit_intercept=not hinge, tolerance=_TOLERANCE,
    )  # fmt: skip
    out, converged = [], True
    for point in path:
        scores = np.zeros((len(z), point.coef.shape[2]))
        for held, coef, offset in zip(held_out, point.coef, point.intercept, strict=True):
            scores[held] = z[held] @ coef + offset
        out.append(scores)
        converged &= bool(point.converged.all())
    return np.stack(out), converged


def _ridge(task: _Validation) -> Scores:
    """Log-odds rather than targets: by squared error a smaller penalty looks better than its labels are."""
    targets = signs(task.labels, task.n_classes)
    space = task.views.space(task.kind, Ridge)
    unit = mean_squared_norm(space.coordinates)
    out = []
    for value in task.values:
        held_out = ridge_held_out(space, targets, value * unit, task.folds, fit_intercept=False)
        scores = both_columns(held_out)
        out.append(temperature(scores, task.labels) * scores)
    return np.stack(out), True


def _discriminant(task: _Validation) -> Scores:
    out = np.zeros((len(task.values), len(task.labels), task.n_classes))
    rows = task.views.space(task.kind, Discriminant).coordinates
    for held in task.held_out():
        origin = rows[~held].mean(axis=0)
        space = RowSpace(origin, np.eye(len(origin)), rows[~held] - origin)
        path = discriminant_path(
            space, task.labels[~held], task.n_classes, task.values, n_features=task.views.raw.shape[1]
        )
        for i, (coef, offset) in enumerate(path):
            out[i, held] = rows[held] @ coef.T + offset
    return out, True


def _centroid(task: _Validation) -> Scores:
    rows = task.views.rows(task.kind)
    out = np.zeros((1, len(rows), task.n_classes))
    for held in task.held_out():
        model = Centroid().fit(rows[~held], task.labels[~held])
        out[0, held] = both_columns(model.decision_function(rows[held]).reshape(held.sum(), -1))
    return out, True


def _neighbours(task: _Validation) -> Scores:
    rows = task.views.rows(task.kind)
    lengths = np.einsum("ij,ij->i", rows, rows)
    distance = lengths[:, None] + lengths[None] - 2.0 * rows @ rows.T
    distance[task.folds[:, None] == task.folds[None]] = np.inf
    nearest = np.argsort(distance, axis=1, kind="stable")[:, : int(max(task.values))]
    hot = (task.labels[nearest][:, :, None] == np.arange(task.n_classes)).astype(np.float64)
    votes = np.cumsum(hot, axis=1)
    return np.stack([votes[:, int(k) - 1] for k in task.values]), True


_FAMILIES: dict[type, Callable[[_Validation], Scores]] = {
    Logistic: partial(_penalised, hinge=False),
    SquaredHinge: partial(_penalised, hinge=True),
    Ridge: _ridge,
    Discriminant: _discriminant,
    Centroid: _centroid,
    KNeighborsClassifier: _neighbours,
}


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
