"""Normaliser and penalty of a head, chosen inside the support and nowhere else.

The choice is by grouped, stratified cross-validation of the support, by a proper score where the head
has one (log-loss wherever there are probabilities). All penalties of all folds are solved
together on one projection where the normaliser treats each row by itself. Where a class has fewer than
two different images there is nothing to validate on, and the head's stated defaults hold.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
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
    signs,
)
from featx.heads.folds import distinct_counts, fold_numbers
from featx.heads.normalise import Normalise
from featx.heads.scorer import Kind, blocks_of, softmax, unit_rows
from featx.heads.solvers.blocks import is_large
from featx.heads.solvers.rows import (
    Array,
    NewtonPath,
    RowSpace,
    discriminant_held_out,
    hinge_duals,
    ridge_held_out,
    temperature,
)

N_FOLDS = 5
#: A larger support is thinned to about this many rows for the choice (not for the fit that follows):
#: penalties are scale-free, and more rows hardly change which one is best.
MAX_ROWS = 400
#: Enough to rank penalties; the fit that follows is exact. Mean losses move by 2e-4 of themselves, of 15 rows by up to
#: 2e-3, far less than their standard errors. Of 144 choices of logistic regression on four image sets, thirty times as
#: much changed two; the hinge bears it.
_TOLERANCE = 3e-6
_HINGE_TOLERANCE = 1e-4
#: Each value and each fold is an optimisation of its own.
_COSTLY = (Logistic, SquaredHinge)
_IN_ROW_SPACE = (SquaredHinge, Ridge, Logistic, Discriminant)
#: Supports of so many rows are worked on by their inner products, even where they have fewer features than rows.
_FEW_ROWS = 512


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
        self._whole: tuple[Views, Index] | None = None
        self._normalisers: dict[Kind, Normalise] = {}
        self._rows: dict[Kind, Array] = {}
        self._products: dict[Kind, Array] = {}
        self._cosines: dict[tuple[int, int], Array] = {}
        self._spaces: dict[Kind, RowSpace] = {}
        self._parts: dict[bytes, Views] = {}
        self.ridge_losses: dict[tuple[Kind, bytes, bytes], Array] = {}

    def normaliser(self, kind: Kind) -> Normalise:
        """Fitted to the rows."""
        if kind not in self._normalisers:
            self._normalisers[kind] = Normalise(kind, self.mean).fit(self.raw)
        return self._normalisers[kind]

    def rows(self, kind: Kind) -> Array:
        """Normalised rows (n, d)."""
        if kind not in self._rows:
            whole = self._of_whole(kind)
            if whole is not None and kind in whole[0]._rows:
                self._rows[kind] = whole[0]._rows[kind][whole[1]]
            else:
                self._rows[kind] = self.normaliser(kind).transform(self.raw)
        return self._rows[kind]

    def products(self, kind: Kind) -> Array:
        """Inner products (n, n) of the normalised rows; those of several normalisers come from the same."""
        if kind not in self._products:
            whole = self._of_whole(kind)
            if whole is not None and kind in whole[0]._products:
                self._products[kind] = _among(whole[0]._products[kind], whole[1])
            else:
                self._products[kind] = self._products_of(kind)
        return self._products[kind]

    def _of_whole(self, kind: Kind) -> tuple[Views, Index] | None:
        """The views that these rows are a part of, and which they are, where the normaliser treats each by itself."""
        return self._whole if kind in ("none", "l2", "power_l2") or blocks_of(kind) else None

    def _products_of(self, kind: Kind) -> Array:
        if blocks := blocks_of(kind):
            ends = np.cumsum([size for size, _ in blocks]).tolist()
            places = zip([0, *ends], ends, blocks, strict=False)
            each = [weight**2 * self._cosines_of(start, end) for start, end, (_, weight) in places if weight]
            return np.asarray(sum(each[1:], start=each[0]))
        if kind not in ("l2", "centre_l2"):
            rows = self.rows(kind)
            return rows @ rows.T
        plain = self.products("none")
        squares = np.diagonal(plain)
        if kind == "centre_l2":
            origin = self.normaliser(kind).mean_
            to_mean = np.asarray(self.raw @ origin, dtype=np.float64)
            plain = plain - to_mean - to_mean[:, None] + float(origin @ origin)
        # What centring leaves of a row that is the mean is rounding, and has no direction.
        lengths = np.sqrt(np.where(np.diagonal(plain) > 1e-13 * squares, np.diagonal(plain), np.inf))
        return plain / lengths / lengths[:, None]

    def _cosines_of(self, start: int, end: int) -> Array:
        """Cosines (n, n) of the rows in one block of columns, of which all weightings of the blocks are sums."""
        place = start, end
        if place not in self._cosines:
            if self._whole is not None and place in self._whole[0]._cosines:
                self._cosines[place] = _among(self._whole[0]._cosines[place], self._whole[1])
            else:
                rows = unit_rows(self.raw[:, start:end])
                self._cosines[place] = rows @ rows.T
        return self._cosines[place]

    def space(self, kind: Kind) -> RowSpace:
        """That of the normalised rows, by their inner products unless there are many more rows than features."""
        if kind not in self._spaces:
            wide = len(self.raw) <= max(self.raw.shape[1], _FEW_ROWS)
            self._spaces[kind] = RowSpace(partial(self.rows, kind), products=self.products(kind) if wide else None)
        return self._spaces[kind]

    def part(self, some: Index) -> Views:
        """The views of these rows only, with what is known of them already."""
        whole, places = (self, some) if self._whole is None else (self._whole[0], self._whole[1][some])
        made = Views(self.raw[some], self.mean)
        made._whole = whole, places
        return made

    def thinned(self, some: Index) -> Views:
        """The same, made once for all heads that ask for it."""
        key = some.tobytes()
        if key not in self._parts:
            self._parts[key] = self.part(some)
        return self._parts[key]


def _among(products: Array, some: Index) -> Array:
    return products.take(some, axis=0).take(some, axis=1)


def fit_chosen(
    head: Head,
    rows: NDArray[np.floating] | Views,
    labels: NDArray[np.integer],
    groups: Index,
    *,
    random_state: Any = 0,
    device: str | None = None,
    sites: Index | None = None,
) -> tuple[Choice, Pipeline]:
    """Choose as :func:`choose` does, and fit the choice on all rows: what a sweep, a fit and a test set share.

    Parameters
    ----------
    rows, labels, groups, random_state, sites : as of :func:`choose`.
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
        choice = choose(head, views, labels, groups, random_state=random_state, sites=sites)
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
        known = {"space": views.space(kind)} if head.estimator in _IN_ROW_SPACE else {}
        classifier.fit(views.rows(kind), labels, **known)
    return Pipeline([("normalise", normaliser), ("classify", classifier)])


def choose(
    head: Head,
    rows: NDArray[np.floating] | Views,
    labels: NDArray[np.integer],
    groups: Index,
    *,
    random_state: Any = 0,
    sites: Index | None = None,
) -> Choice:
    """Choose the parameters of ``head`` on a support.

    Parameters
    ----------
    rows : (n, d) embeddings of the support, or their views, which heads then share.
    labels : (n,) in 0 .. c-1, every class present.
    groups : (n,) rows with the same number, 0 or more, are copies, which stay in one fold.
    random_state : seed or seeds of the folds.
    sites : (n,) what else stays in one fold, where there are enough of them (:mod:`featx.heads.folds`).
    """
    n_classes = int(labels.max()) + 1
    smallest = int(distinct_counts(labels, groups, n_classes).min())
    kinds = head.kinds if smallest >= head.kind_shots else head.kinds[:1]
    if smallest < 2 or (len(kinds) == 1 and not head.parameter):
        return Choice(head.default, None, 0, True)
    views = rows if isinstance(rows, Views) else Views(rows, head.mean)
    if len(labels) > MAX_ROWS:
        some = _thin(labels, random_state)
        views, labels, groups = views.thinned(some), labels[some], groups[some]
        sites = None if sites is None else sites[some]
    validation = _Validation(head, views, labels, fold_numbers(labels, groups, N_FOLDS, random_state, sites))
    kind, converged = _choose_kind(validation, kinds) if len(kinds) > 1 else (kinds[0], True)
    if not head.parameter:
        score = float(validation.losses(kind, (validation.start,))[0][0].mean())
        return Choice({"kind": kind}, score, validation.n_folds, converged)
    values, losses, fine = _along_the_grid(validation, kind)
    start = validation.start
    if head.cautious:
        order = [values.index(start), *(i for i, value in enumerate(values) if value != start)]
        best = order[_clearly_best(losses[order])]
    else:
        means = losses.mean(axis=1)
        # Equal losses are common for accuracies: the value nearest to the default is then as good as any.
        ties = np.flatnonzero(means <= means.min() * (1 + 1e-12))
        best = int(ties[np.argmin(np.abs(np.log(np.array(values)[ties] / start)))])
    params = {"kind": kind, head.parameter: values[best]}
    return Choice(params, float(losses[best].mean()), validation.n_folds, converged and fine)


def _along_the_grid(validation: _Validation, kind: Kind) -> tuple[list[float], Array, bool]:
    """Values that were tried, their losses (v, n), and whether all fits converged.

    Where fits are costly, from the default on as long as the mean loss falls, to smaller values or else to greater
    ones: it has one valley.
    """
    values, start = validation.values, validation.start
    if validation.head.estimator not in (*_COSTLY, Ridge):
        return [*values], *validation.losses(kind, values)
    found, converged = validation.losses(kind, (start,))
    tried = {start: found[0]}
    for way in (sorted((v for v in values if v < start), reverse=True), sorted(v for v in values if v > start)):
        last = start
        for value in way:
            losses, fine = validation.losses(kind, (value,))
            tried[value], converged = losses[0], converged and fine
            if losses[0].mean() > tried[last].mean():
                break
            last = value
        if last != start:
            break
    return sorted(tried), np.stack([tried[value] for value in sorted(tried)]), converged


def _choose_kind(validation: _Validation, kinds: Sequence[Kind]) -> tuple[Kind, bool]:
    """A normaliser, and whether all fits converged.

    The first is kept, and no other tried, where it names every held-out row rightly: what a lower loss then tells is
    noise. Measured on cats and dogs (98 % right), where it brings back a third of what combined layers lose; four sets
    that are harder do not notice.

    Where fits are costly, one is not tried that ridge rates below the first by a standard error: of 720 choices on six
    image sets this changed none.
    """
    start = (validation.start,)
    scores, converged = validation.scores(kinds[0], start)
    if not _wrong(scores, validation.labels)[0].any():
        return kinds[0], converged
    if validation.head.estimator in _COSTLY:
        usual = validation.ridge_losses(kinds[0])
        kinds = [kind for kind in kinds if not _is_worse(validation.ridge_losses(kind), usual)]
    found = [validation.losses(kind, start) for kind in kinds]
    best = _clearly_best(np.concatenate([losses for losses, _ in found]), validation.head.kind_margin)
    return kinds[best], all(fine for _, fine in found)


def _is_worse(losses: Array, others: Array) -> bool:
    """Whether losses (n,) are higher than others by more than a standard error."""
    lost = losses - others
    return bool(lost.mean() > lost.std() / np.sqrt(len(lost)))


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


class _Validation:
    """A cross-validation of one head on a support: what was solved is kept, and the next solve starts from it."""

    def __init__(self, head: Head, views: Views, labels: NDArray[np.integer], folds: Index) -> None:
        self.head, self.views, self.labels, self.folds = head, views, labels, folds
        self.n_classes, self.n_folds = int(labels.max()) + 1, int(folds.max()) + 1
        self.start: float = head.default[head.parameter] if head.parameter else 0.0
        self.values = head.values
        if head.estimator is KNeighborsClassifier:
            self.values = tuple(k for k in head.values if k <= len(labels) - int(np.bincount(folds).max()))
        self._scores: dict[tuple[Kind, float], Scores] = {}
        self._solved: dict[Kind, _Folds] = {}

    def scores(self, kind: Kind, values: tuple[float, ...]) -> Scores:
        """Scores (v, n, c), or (v, n, 1) for the second of two classes, by fits without the row's fold."""
        left = tuple(value for value in values if (kind, value) not in self._scores)
        if left:
            found, fine = _FAMILIES[self.head.estimator](self, kind, left)
            self._scores |= {(kind, value): (each, fine) for value, each in zip(left, found, strict=True)}
        each = [self._scores[kind, value] for value in values]
        return np.stack([scores for scores, _ in each]), all(fine for _, fine in each)

    def losses(self, kind: Kind, values: tuple[float, ...]) -> tuple[Array, bool]:
        """Losses (v, n) by the head's criterion."""
        scores, fine = self.scores(kind, values)
        return _losses(self.head, scores, self.labels), fine

    def ridge_losses(self, kind: Kind) -> Array:
        """Log-losses (n,) of the ridge head at its default, which is shared by all heads that ask on these views."""
        key = kind, self.labels.tobytes(), self.folds.tobytes()
        if key not in self.views.ridge_losses:
            scores, _ = _ridge(self, kind, (Ridge().alpha,))
            picked = softmax(scores[0])[np.arange(len(self.labels)), self.labels]
            self.views.ridge_losses[key] = -np.log(np.maximum(picked, np.finfo(np.float64).tiny))
        return self.views.ridge_losses[key]

    def solve(self, kind: Kind, value: float) -> Scores:
        """Scores (n, c) of logistic regression or of the hinge, and whether all folds converged."""
        like = None
        if kind not in self._solved:
            like = next(iter(self._solved.values()), None)
            self._solved[kind] = self._solver(kind)
        return self._solved[kind].solve(value, like=like)

    def _solver(self, kind: Kind) -> _Folds:
        numbers, space = np.arange(self.n_folds)[:, None], self.views.space(kind)
        hinge: type[_Folds] = _NewtonHinge if space.products is None else _Hinge
        family = hinge if self.head.estimator is SquaredHinge else _Newton
        return family(space, self.labels, self.n_classes, self.folds != numbers, self.folds == numbers)


class _Folds(ABC):
    """Fits of one head and one normaliser without each fold; a fit starts from the one before.

    Parameters
    ----------
    space : of the whole support.
    labels, n_classes : of its rows.
    weights, held : (f, n) which rows each fit has, and which it is judged on.
    """

    def __init__(
        self,
        space: RowSpace,
        labels: NDArray[np.integer],
        n_classes: int,
        weights: NDArray[np.bool_],
        held: NDArray[np.bool_],
    ) -> None:
        self.space, self.labels, self.n_classes, self.weights, self.held = space, labels, n_classes, weights, held

    def penalties(self, value: float) -> Array:
        """The plain C (f,) of each fit."""
        share = self.weights / self.weights.sum(axis=1, keepdims=True)
        products = self.space.products
        if products is None:
            z = self.space.coordinates
            spread = share @ np.einsum("ij,ij->i", z, z) - ((share @ z) ** 2).sum(axis=1)
        else:
            spread = share @ np.diagonal(products) - np.einsum("fi,fi->f", share @ products, share)
        return np.asarray(value / np.where(spread > 1e-12, spread, 1.0))

    @abstractmethod
    def solve(self, value: float, like: _Folds | None = None) -> Scores:
        """Scores (n, k) of rows by the fits without them, and whether all converged.

        ``like`` has solved the same with another normaliser.
        """


class _Newton(_Folds):
    """Logistic regression, and the hinge where there are many more rows than features."""

    hinge = False

    @cached_property
    def path(self) -> NewtonPath:
        return NewtonPath(
            self.rows, self.labels, self.n_classes, self.weights.astype(np.float64),
            loss="squared_hinge" if self.hinge else "softmax", tolerance=_TOLERANCE,
        )  # fmt: skip

    @property
    def rows(self) -> Array:
        return self.space.lifted if self.hinge else self.space.coordinates

    def solve(self, value: float, like: _Folds | None = None) -> Scores:
        path = like.path if isinstance(like, _Newton) else None
        point = self.path.solve(self.penalties(value), like=path)
        scores = np.zeros((len(self.rows), point.coef.shape[2]))
        for held, coef, offset in zip(self.held, point.coef, point.intercept, strict=True):
            scores[held] = self.rows[held] @ coef + offset
        return scores, bool(point.converged.all())


class _NewtonHinge(_Newton):
    hinge = True


class _Hinge(_Folds):
    """The hinge by inner products."""

    last: tuple[Array, Array] | None = None
    """Penalties (f,) and duals (n, f, k) of the last fit."""

    def solve(self, value: float, like: _Folds | None = None) -> Scores:
        products, c = self.space.lifted_products, self.penalties(value)
        assert products is not None
        start = None if self.last is None else self.last[1]
        if isinstance(like, _Hinge) and like.last is not None:
            there, duals = like.last
            start = duals * (c / there)[:, None]  # as lengths change, so do the penalties
        duals, converged = hinge_duals(
            products, signs(self.labels, self.n_classes), self.weights, c, start=start, tolerance=_HINGE_TOLERANCE
        )
        self.last = c, duals
        scores = np.zeros((len(products), duals.shape[2]))
        for number, held in enumerate(self.held):
            scores[held] = products[held] @ duals[:, number]
        return scores, bool(converged.all())


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


def _penalised(task: _Validation, kind: Kind, values: tuple[float, ...]) -> Scores:
    found = [task.solve(kind, value) for value in values]
    return np.stack([scores for scores, _ in found]), all(fine for _, fine in found)


def _ridge(task: _Validation, kind: Kind, values: tuple[float, ...]) -> Scores:
    """Log-odds rather than targets: by squared error a smaller penalty looks better than its labels are."""
    targets = signs(task.labels, task.n_classes)
    shape = task.views.space(kind)
    out = []
    for value in values:
        held_out = ridge_held_out(shape, targets, value * shape.mean_squared_norm, task.folds)
        scores = both_columns(held_out)
        out.append(temperature(scores, task.labels) * scores)
    return np.stack(out), True


def _discriminant(task: _Validation, kind: Kind, values: tuple[float, ...]) -> Scores:
    return discriminant_held_out(
        task.views.space(kind), task.labels, task.n_classes, values, task.folds, task.views.raw.shape[1]
    ), True


def _centroid(task: _Validation, kind: Kind, values: tuple[float, ...]) -> Scores:
    products, hot = task.views.products(kind), task.labels[:, None] == np.arange(task.n_classes)
    out = np.zeros((1, *hot.shape))
    for number in range(task.n_folds):
        held = task.folds == number
        share = np.where(held[:, None], 0.0, hot)
        share /= share.sum(axis=0)
        to_means = products @ share
        out[0, held] = to_means[held] - 0.5 * np.einsum("ic,ic->c", share, to_means)
    return out, True


def _neighbours(task: _Validation, kind: Kind, values: tuple[float, ...]) -> Scores:
    products = task.views.products(kind)
    lengths = np.diagonal(products)
    distance = lengths[:, None] + lengths[None] - 2.0 * products
    distance[task.folds[:, None] == task.folds[None]] = np.inf
    most = int(max(values))
    # argmin is the first of equals, too, and many times faster than to sort.
    nearest = distance.argmin(axis=1)[:, None] if most == 1 else np.argsort(distance, axis=1, kind="stable")[:, :most]
    hot = (task.labels[nearest][:, :, None] == np.arange(task.n_classes)).astype(np.float64)
    votes = np.cumsum(hot, axis=1)
    return np.stack([votes[:, int(k) - 1] for k in values]), True


_FAMILIES: dict[type, Callable[[_Validation, Kind, tuple[float, ...]], Scores]] = {
    Logistic: _penalised,
    SquaredHinge: _penalised,
    Ridge: _ridge,
    Discriminant: _discriminant,
    Centroid: _centroid,
    KNeighborsClassifier: _neighbours,
}
