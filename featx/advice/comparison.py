"""Strategies on the same draws: what there is to compare, the time it may take, and paired differences."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from featx._arrays import Index
from featx.advice.advice import Cell, Family
from featx.errors import UsageError
from featx.evaluation import Duplicates, Shots, SweepResult, Trial, find_duplicates, stats
from featx.heads import Layers, distinct_counts
from featx.store import FeatureSet

Progress: TypeAlias = Callable[[int, int, str], None]


class OutOfTime(Exception):
    """Raised inside a measurement whose time is up."""


class Budget:
    """Seconds that may be spent, told to ``progress`` as they pass."""

    def __init__(self, seconds: float, progress: Progress | None = None) -> None:
        self.seconds, self.progress = seconds, progress
        self.started = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Seconds that are left; negative when they are over."""
        return self.seconds - self.spent

    def tick(self, what: str) -> None:
        """Show the time, and end what is being measured if it is up."""
        self.show(what)
        if self.left <= 0:
            raise OutOfTime

    def show(self, what: str) -> None:
        """Show the time."""
        if self.progress:
            self.progress(min(int(self.spent), int(self.seconds)), int(self.seconds), f"{what}; seconds")

    def under(self, what: str) -> Progress:
        """A progress callback for one measurement."""
        return lambda done, total, detail: self.tick(f"{what}: {detail}" if detail else what)


@dataclass
class Labelled:
    """The labelled images outside the split ``test``, and what else belongs to them."""

    features: FeatureSet
    rows: Index
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    duplicates: Duplicates
    columns: Layers

    @classmethod
    def of(cls, features: FeatureSet, columns: Layers) -> Labelled:
        rows = np.flatnonzero((features.labels >= 0) & (features.splits != "test"))
        if not len(rows):
            raise UsageError("no labelled images outside the split test", hint="Advice takes labelled images.")
        present, labels = np.unique(features.labels[rows], return_inverse=True)
        names = tuple(features.class_names[int(i)] for i in present)
        exact = features.copies[rows]
        reference = features.embeddings[:, slice(*columns.columns(columns.reference))]
        found = find_duplicates(reference[rows], exact, threshold=features.near_copies)
        return cls(features, rows, labels.reshape(-1).astype(np.int64), names, found, columns)

    def of_classes(self, wanted: NDArray[np.bool_]) -> Labelled:
        """The images of some of the classes (c,) only."""
        kept = wanted[self.labels]
        return replace(
            self, rows=self.rows[kept], labels=(np.cumsum(wanted) - 1)[self.labels[kept]],
            class_names=tuple(name for name, use in zip(self.class_names, wanted, strict=True) if use),
            duplicates=replace(
                self.duplicates, groups=np.unique(self.duplicates.groups[kept], return_inverse=True)[1].reshape(-1)
            ),
        )  # fmt: skip

    @property
    def reference(self) -> NDArray[np.float32]:
        """Embeddings (n, d) of the reference layer."""
        return self.features.embeddings[self.rows, slice(*self.columns.columns(self.columns.reference))]

    @property
    def counts(self) -> Index:
        """Different images of each class."""
        return distinct_counts(self.labels, self.duplicates.groups, len(self.class_names))


@dataclass
class Trials:
    """Outcomes of all strategies on the same draws, each compared with ``reference``."""

    labels: NDArray[np.int64]
    reference: str
    trials: dict[tuple[str, Shots, int], Trial] = field(default_factory=dict)
    queries: dict[tuple[Shots, int], Index] = field(default_factory=dict)
    families: dict[str, Family] = field(default_factory=dict)

    def add(self, result: SweepResult, family: Callable[[str], Family], rename: Callable[[str], str] = str) -> None:
        """Take in what a sweep found; its draws must be those that are here already."""
        for draw, query in result.queries.items():
            known = self.queries.setdefault(draw, query)
            if not np.array_equal(known, query):
                raise RuntimeError("two measurements did not make the same draws")
        for trial in result.trials:
            name = rename(trial.head)
            self.trials.setdefault((name, trial.n_shots, trial.episode), trial)
            self.families.setdefault(name, family(name))

    def cells(self) -> tuple[Cell, ...]:
        """Every strategy at every number of shots, with its difference to the reference on the draws of both."""
        found = []
        for name, n_shots in dict.fromkeys((name, n) for name, n, _ in self.trials):
            own = {e: t for (s, n, e), t in self.trials.items() if (s, n) == (name, n_shots)}
            base = {e: t for (s, n, e), t in self.trials.items() if (s, n) == (self.reference, n_shots) and e in own}
            difference = self._difference(own, base, n_shots) if name != self.reference and len(base) > 1 else None
            seconds = float(np.mean([t.fit_seconds for t in own.values()]))
            accuracy = self._mean(own, n_shots)
            found.append(Cell(name, self.families[name], int(n_shots), len(own), accuracy, difference, seconds))
        return _adjusted(found)

    def _images(self, own: dict[int, Trial], n_shots: Shots) -> NDArray[np.float64]:
        right, seen = np.zeros(len(self.labels)), np.zeros(len(self.labels))
        for episode, trial in own.items():
            query = self.queries[n_shots, episode]
            right[query] += trial.predictions == self.labels[query]
            seen[query] += 1
        return np.asarray(np.divide(right, seen, out=np.full(len(right), np.nan), where=seen > 0))

    def _mean(self, own: dict[int, Trial], n_shots: Shots) -> stats.Interval:
        images = self._images(own, n_shots)
        scores = np.array([own[e].accuracy for e in sorted(own)])
        return stats.mean_interval(scores, images, *_sizes(own), self._lessons(images, own, n_shots))

    def _difference(self, own: dict[int, Trial], base: dict[int, Trial], n_shots: Shots) -> stats.Difference:
        episodes = sorted(base)
        scores = np.array([own[e].accuracy - base[e].accuracy for e in episodes])
        images = self._images({e: own[e] for e in episodes}, n_shots) - self._images(base, n_shots)
        return stats.paired_difference(scores, images, *_sizes(base), self._lessons(images, base, n_shots))

    def _lessons(self, images: NDArray[np.float64], own: dict[int, Trial], n_shots: Shots) -> NDArray[np.float64]:
        return stats.lessons(images, [self.queries[n_shots, episode] for episode in sorted(own)])

    def hits(self, name: str, shots: Sequence[int]) -> NDArray[np.float64]:
        """Hits (e, s, n) at every number of shots on the images that the largest leaves over, else nan.

        Of the draws that were made at every number of shots: the time may have allowed more of them at some.
        """
        episodes = sorted(set.intersection(*({e for s, n, e in self.trials if (s, n) == (name, k)} for k in shots)))
        out = np.full((len(episodes), len(shots), len(self.labels)), np.nan)
        for i, episode in enumerate(episodes):
            judged = self.queries[shots[-1], episode]
            for j, n_shots in enumerate(shots):
                query = self.queries[n_shots, episode]
                right = self.trials[name, n_shots, episode].predictions == self.labels[query]
                out[i, j, query] = right
                out[i, j, np.setdiff1d(query, judged)] = np.nan
        return out


def _sizes(trials: dict[int, Trial]) -> tuple[float, float]:
    return (
        float(np.mean([t.n_support for t in trials.values()])),
        float(np.mean([t.n_query for t in trials.values()])),
    )


def _adjusted(cells: list[Cell]) -> tuple[Cell, ...]:
    """Holm's correction over all comparisons at one number of shots."""
    out = list(cells)
    for n_shots in dict.fromkeys(cell.n_shots for cell in cells):
        places = [i for i, cell in enumerate(cells) if cell.n_shots == n_shots and cell.difference is not None]
        ps = stats.holm([cells[i].difference.p for i in places])  # type: ignore[union-attr]
        for i, p in zip(places, ps, strict=True):
            was = cells[i].difference
            assert was is not None
            out[i] = replace(cells[i], difference=stats.Difference(was.interval, was.p, p))
    return tuple(out)
