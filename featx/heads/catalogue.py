"""The heads: classifiers on embeddings, each an unfitted scikit-learn pipeline with its normaliser inside.

:data:`HEADS` is the whole catalogue, a literal; :func:`make_head` builds one. Linear heads measure their
penalty in units of the support's own spread (*scale-free*): ``C`` is divided by the mean squared norm of
the centred support, so that one number means the same for raw and for normalised embeddings, for any
backbone and any ``n_shots``. ``scale_free=False`` gives scikit-learn's penalty.

Not learnt here: the embeddings. A head sees arrays (n, d) only.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from featx.errors import UsageError, did_you_mean
from featx.heads.normalise import Normalise
from featx.heads.scorer import Kind, softmax
from featx.heads.solvers.blocks import fit_blocks
from featx.heads.solvers.device import fit_on_device
from featx.heads.solvers.rows import (
    PRIOR,
    Array,
    NewtonPath,
    RowSpace,
    discriminant,
    hinge_duals,
    ridge_with_held_out,
    temperature,
)


class _Linear(ClassifierMixin, BaseEstimator, ABC):  # type: ignore[misc]
    """What every linear head shares: validation, ``coef_`` (c, d), ``intercept_`` (c,), scores."""

    classes_: NDArray[Any]
    coef_: Array
    intercept_: Array

    def fit(self, X: ArrayLike, y: ArrayLike, space: RowSpace | None = None) -> _Linear:
        """Fit on rows (n, d) and labels (n,). ``space`` is that of these rows where it is known already."""
        rows, target = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(target)
        self.classes_, labels = np.unique(target, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"a head needs rows of at least 2 classes, got the class {self.classes_[0]!r} only")
        self._fit(rows, labels, space)
        return self

    @abstractmethod
    def _fit(self, rows: Array, labels: NDArray[np.intp], space: RowSpace | None) -> None:
        """Set ``coef_`` and ``intercept_`` from rows (n, d) and the numbers (n,) of their classes."""

    def _keep(self, coef: Array, intercept: Array) -> None:
        """Take coefficients (c, d) and intercepts (c,); of two classes, what the second has over the first."""
        two = len(coef) == 2
        self.coef_, self.intercept_ = (np.diff(coef, axis=0), np.diff(intercept)) if two else (coef, intercept)

    def decision_function(self, X: ArrayLike) -> Array:
        """Scores (n, c), or (n,) for the second of two classes."""
        check_is_fitted(self)
        rows = validate_data(self, X, dtype=np.float64, reset=False)
        scores: Array = rows @ self.coef_.T + self.intercept_
        return scores.reshape(-1) if scores.shape[1] == 1 else scores

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        scores = self.decision_function(X)
        which = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)
        return np.asarray(self.classes_[which])


class _Penalised(_Linear):
    """A head with scikit-learn's penalty parameter ``C``, by default in units of the support's spread."""

    def __init__(self, C: float = 1.0, *, scale_free: bool = True) -> None:
        self.C = C
        self.scale_free = scale_free

    def penalty(self, space: RowSpace) -> Array:
        """The plain C (1,) that a fit on the rows of this space uses."""
        self._check()
        return np.array([self.C / space.mean_squared_norm if self.scale_free else self.C])

    def _check(self) -> None:
        if not self.C > 0:
            raise ValueError(f"C of {type(self).__name__} must be positive, got {self.C!r}")

    def _warn(self, converged: NDArray[np.bool_]) -> None:
        self.converged_ = bool(converged.all())
        if not self.converged_:
            message = f"{type(self).__name__}(C={self.C}) stopped before the optimum"
            warnings.warn(message, ConvergenceWarning, stacklevel=4)


class Logistic(_Penalised):
    """Multinomial logistic regression; with ``scale_free=False`` equal to ``LogisticRegression(C=C)``."""

    def __init__(self, C: float = 316.0, *, scale_free: bool = True) -> None:
        super().__init__(C, scale_free=scale_free)

    def _fit(self, rows: Array, labels: NDArray[np.intp], space: RowSpace | None) -> None:
        space = space or RowSpace(rows)
        path = NewtonPath(space.coordinates, labels, len(self.classes_), np.ones((1, len(rows))), loss="softmax")
        point = path.solve(self.penalty(space))
        self._keep(*space.coefficients(point.coef[0], point.intercept[0]))
        self._warn(point.converged)

    def fit_large(
        self, rows: NDArray[np.floating], y: ArrayLike, normalise: Normalise, device: str | None = None
    ) -> Logistic:
        """Fit on many rows (n, d), and read them block by block.

        Parameters
        ----------
        rows : embeddings as they are.
        normalise : fitted; the result is that of :meth:`fit` on the rows that it would return.
        device : of torch, such as ``"cuda"``, where scikit-learn then solves it; by default
        :mod:`featx.heads.solvers.blocks` does.
        """
        self._check()
        self.classes_, labels = np.unique(np.asarray(y), return_inverse=True)
        self.n_features_in_ = rows.shape[1]
        solve = fit_blocks if device is None else partial(fit_on_device, device=device)
        self.coef_, self.intercept_, converged = solve(
            rows, labels, len(self.classes_), self.C, scale_free=self.scale_free, **normalise.by_block(rows)
        )
        self._warn(np.array([converged]))
        return self

    def predict_proba(self, X: ArrayLike) -> Array:
        """Probabilities (n, c) of the classes."""
        return softmax(self.decision_function(X))


class SquaredHinge(_Penalised):
    """Linear SVM, one against the rest; with ``scale_free=False`` equal to ``LinearSVC(C=C)`` on normalised rows."""

    def __init__(self, C: float = 10.0, *, scale_free: bool = True) -> None:
        super().__init__(C, scale_free=scale_free)

    def _fit(self, rows: Array, labels: NDArray[np.intp], space: RowSpace | None) -> None:
        n_classes = len(self.classes_)
        space = space or RowSpace(rows)
        products = space.lifted_products
        if products is not None:
            every = np.ones((1, len(rows)), dtype=np.bool_)
            duals, converged = hinge_duals(products, signs(labels, n_classes), every, self.penalty(space))
            self.coef_, self.intercept_ = space.dual_coefficients(duals[:, 0])
        else:
            path = NewtonPath(space.lifted, labels, n_classes, np.ones((1, len(rows))), loss="squared_hinge")
            point = path.solve(self.penalty(space))
            self.coef_, self.intercept_ = space.lifted_coefficients(point.coef[0])
            converged = point.converged
        self._warn(converged)


def signs(labels: NDArray[np.integer], n_classes: int) -> Array:
    """Targets of -1 and 1, (n, c); a single column for two classes, as in scikit-learn."""
    hot = np.where(labels[:, None] == np.arange(n_classes), 1.0, -1.0)
    return hot[:, 1:] if n_classes == 2 else hot


class Ridge(_Linear):
    """Least squares on targets -1 and 1, with an intercept that is penalised like every other coefficient.

    With ``scale_free=False`` it equals ``RidgeClassifier(alpha, fit_intercept=False)`` on normalised rows
    and a constant of 1.
    A free intercept is learnt from the means of a few rows, and costs a quarter of a point at two shots.

    ``alpha`` is in units of the mean squared norm of the centred support. Probabilities are a softmax of
    the scores times ``temperature_``, which is learnt from the support alone: see
    :func:`featx.heads.solvers.rows.temperature`. At one shot there is nothing to learn it from, and it keeps its prior.
    """

    def __init__(self, alpha: float = 1.0, *, scale_free: bool = True) -> None:
        self.alpha = alpha
        self.scale_free = scale_free

    def _fit(self, rows: Array, labels: NDArray[np.intp], space: RowSpace | None) -> None:
        if not self.alpha > 0:
            raise ValueError(f"alpha of Ridge must be positive, got {self.alpha!r}")
        targets, space = signs(labels, len(self.classes_)), space or RowSpace(rows)
        alpha = self.alpha * space.mean_squared_norm if self.scale_free else self.alpha
        counts = np.bincount(labels)
        folds = round_robin(labels, min(int(counts.min()), 10))
        self.coef_, self.intercept_, held_out = ridge_with_held_out(space, targets, alpha, folds)
        self.temperature_ = PRIOR if counts.min() < 2 else temperature(both_columns(held_out), labels)

    def predict_proba(self, X: ArrayLike) -> Array:
        """Probabilities (n, c) of the classes."""
        scores = self.decision_function(X)
        return softmax(self.temperature_ * both_columns(scores.reshape(len(scores), -1)))


def both_columns(scores: Array) -> Array:
    """Scores (n, c) of every class: a single column stands for the second of two."""
    return np.hstack([-scores, scores]) if scores.shape[1] == 1 else scores


def round_robin(labels: NDArray[np.integer], n_folds: int) -> NDArray[np.intp]:
    """Fold (n,) of each row: the rows of each class are dealt out in their order."""
    folds = np.zeros(len(labels), dtype=np.intp)
    for c in range(int(labels.max()) + 1):
        own = labels == c
        folds[own] = np.arange(own.sum()) % max(n_folds, 1)
    return folds


class Discriminant(_Linear):
    """Linear discriminant analysis; equal to ``LinearDiscriminantAnalysis("lsqr", shrinkage)``.

    Where no class has two distinct rows, scikit-learn's has a covariance of zero; this one then takes
    the spread of all rows, the same in every direction.
    """

    def __init__(self, shrinkage: float = 0.5) -> None:
        self.shrinkage = shrinkage

    def _fit(self, rows: Array, labels: NDArray[np.intp], space: RowSpace | None) -> None:
        if not 0 < self.shrinkage <= 1:
            raise ValueError(f"shrinkage of Discriminant must lie in (0, 1], got {self.shrinkage!r}")
        self._keep(*discriminant(space or RowSpace(rows), labels, len(self.classes_), self.shrinkage))

    def predict_proba(self, X: ArrayLike) -> Array:
        """Probabilities (n, c) of the classes."""
        return softmax(self.decision_function(X))


class Centroid(_Linear):
    """The class whose mean is nearest; the same labels as ``NearestCentroid``, written as a linear head."""

    def _fit(self, rows: Array, labels: NDArray[np.intp], space: RowSpace | None) -> None:
        means = np.stack([rows[labels == c].mean(axis=0) for c in range(len(self.classes_))])
        self._keep(means, -0.5 * np.einsum("ij,ij->i", means, means))


Criterion: TypeAlias = Literal["log_loss", "squared_hinge", "accuracy"]


@dataclass(frozen=True)
class Head:
    """One entry of the catalogue.

    Attributes
    ----------
    name : what ``--heads`` takes.
    estimator : class of the classifier; its own defaults are those of the head.
    kinds : normalisers to choose from; the first is the default.
    parameter : the one hyper-parameter of the classifier, or "" for none.
    values : its grid, ascending in the order in which a path is fastest.
    criterion : what chooses among them, out of fold, inside the support.
    summary : one line for people.
    fixed : parameters of the classifier that differ from its own defaults.
    cautious : whether the default stays unless another value is better by more than two standard errors.
    mean : (d,) from elsewhere for the kind ``"centre_l2"``, or None: the support's own.
    kind_shots : different images of the smallest class from which another normaliser than the first may be chosen:
        choosing among several inside five shots loses more than it gains.
    kind_margin : by how many standard errors of the loss another has to be better than the first.
    layer : of the embeddings that it is for, "" where there is no choice; see :mod:`featx.heads.layers`.
    columns : (first, last + 1) of the embeddings' columns that it sees; None for all.
    """

    name: str
    estimator: type[BaseEstimator]
    kinds: tuple[Kind, ...]
    parameter: str
    values: tuple[float, ...]
    criterion: Criterion
    summary: str
    fixed: tuple[tuple[str, Any], ...] = ()
    cautious: bool = False
    mean: Array | None = field(default=None, repr=False, compare=False)
    kind_shots: int = 10
    kind_margin: float = 2.0
    layer: str = ""
    columns: tuple[int, int] | None = None

    def seen(self, embeddings: NDArray[np.floating]) -> NDArray[np.floating]:
        """The columns (n, d') of embeddings (n, d) that are this head's."""
        return embeddings if self.columns is None else embeddings[:, slice(*self.columns)]

    def centred(self, mean: Array) -> Head:
        """The same head with a mean from elsewhere (d,), which is then its default normaliser."""
        kinds: tuple[Kind, ...] = ("centre_l2", *(kind for kind in self.kinds if kind != "centre_l2"))
        return replace(self, kinds=kinds, mean=mean)

    def build(self, **params: Any) -> Pipeline:
        """Unfitted pipeline with the steps ``normalise`` and ``classify``."""
        steps = [("normalise", Normalise(self.kinds[0], self.mean)), ("classify", self.estimator(**dict(self.fixed)))]
        try:
            return Pipeline(steps).set_params(**{_full(name): value for name, value in params.items()})
        except ValueError as error:
            known = sorted({"kind", *self.estimator().get_params()})
            raise UsageError(
                f"head {self.name} does not take these parameters", expected=", ".join(known), found=params
            ) from error

    @property
    def default(self) -> dict[str, Any]:
        """Parameters that are used where nothing can be cross-validated."""
        start: dict[str, Any] = {"kind": self.kinds[0]}
        if self.parameter:
            start[self.parameter] = getattr(self.estimator(**dict(self.fixed)), self.parameter)
        return start

    @property
    def probabilistic(self) -> bool:
        """Whether its fitted pipeline has ``predict_proba``."""
        return hasattr(self.estimator, "predict_proba")


def _full(name: str) -> str:
    if "__" in name:
        return name
    return f"normalise__{name}" if name in ("kind", "mean") else f"classify__{name}"


_KINDS: tuple[Kind, ...] = ("l2", "none", "centre_l2", "standardise", "power_l2")


class Catalogue(Mapping[str, Head]):
    """Immutable mapping of names to heads; a name that is not there is a usage error."""

    def __init__(self, *heads: Head, recommended: str = "ridge") -> None:
        self.recommended = recommended
        self._heads = {head.name: head for head in heads}
        if len(self._heads) < len(heads):
            raise UsageError("two heads of the catalogue share a name", found=[head.name for head in heads])

    def __getitem__(self, name: str) -> Head:
        name = self.recommended if name == "auto" else name
        if name not in self._heads:
            known = [*self._heads, "auto"]
            pooled = "It learns from images without labels: add --unlabelled, or --unlabelled-from STORE."
            hint = pooled if name == "ridge_pool" else did_you_mean(name, known) or None
            raise UsageError("no such head", expected=f"one of {', '.join(known)}", found=name, hint=hint)
        return self._heads[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._heads)

    def __len__(self) -> int:
        return len(self._heads)

    def __contains__(self, name: object) -> bool:
        return name == "auto" or name in self._heads


HEADS = Catalogue(
    Head(
        "logreg", Logistic, _KINDS, "C", (3.16, 10.0, 31.6, 100.0, 316.0, 1000.0, 3160.0), "log_loss",
        "logistic regression, calibrated",
    ),
    Head(
        "linear_svm", SquaredHinge, _KINDS, "C", (0.1, 0.316, 1.0, 3.16, 10.0, 31.6, 100.0), "squared_hinge",
        "linear SVM, one against the rest", cautious=True,
    ),
    Head(
        "ridge", Ridge, _KINDS, "alpha", (0.01, 0.0316, 0.1, 0.316, 1.0, 3.16, 10.0), "log_loss",
        "least squares with a penalty, calibrated by held-out rows", cautious=True,
    ),
    Head(
        "lda", Discriminant, _KINDS, "shrinkage", (0.1, 0.25, 0.5, 0.75, 0.9, 1.0), "log_loss",
        "linear discriminant, shrunk covariance",
    ),
    Head(
        "nearest_centroid", Centroid, ("centre_l2", "l2", "none", "standardise", "power_l2"), "", (), "accuracy",
        "nearest class mean",
    ),
    Head(
        "knn", KNeighborsClassifier, _KINDS, "n_neighbors", (1, 3, 5, 9, 15), "accuracy", "nearest neighbours",
        (("n_neighbors", 1),),
    ),
)  # fmt: skip


def make_head(name: str = "auto", **params: Any) -> Pipeline:
    """Build a head: an unfitted scikit-learn pipeline of a normaliser and a classifier.

    Parameters
    ----------
    name : a name of :data:`HEADS`, or ``"auto"`` for the recommended one.
    **params : ``kind`` of the normaliser and parameters of the classifier (``C``, ``alpha``, ...), also in
        the long form ``classify__C``.

    Raises
    ------
    UsageError
        There is no such head, or it does not take such a parameter.

    Examples
    --------
    >>> make_head("logreg", C=100.0).named_steps["classify"].C
    100.0
    """
    return HEADS[name].build(**params)
