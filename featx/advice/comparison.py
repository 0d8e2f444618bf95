"""Strategies on the same draws: what there is to compare, the time it may take, and paired differences."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from featx._arrays import PENULTIMATE, PIXELS, Index
from featx.advice.advice import Cell, Family
from featx.errors import UsageError
from featx.evaluation import (
    LabelledRows,
    Shots,
    SweepResult,
    Trial,
    mean_interval,
    paired_difference,
    plan_shots,
    stats,
)
from featx.heads import Layers
from featx.store import FeatureSet, backbones_of, fingerprint

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
class LabelledStore:
    """The labelled images of a store outside its split ``test``; near copies are judged by the reference layer."""

    features: FeatureSet
    data: LabelledRows
    columns: Layers

    @classmethod
    def of(cls, features: FeatureSet, columns: Layers) -> LabelledStore:
        """The labelled images of a store; UsageError where there are none."""
        if not ((features.labels >= 0) & (features.splits != "test")).any():
            raise UsageError("no labelled images outside the split test", hint="Advice takes labelled images.")
        return cls(features, LabelledRows.of_features(features, columns.columns(columns.reference)), columns)

    def across_groups(self) -> tuple[LabelledStore, list[str]]:
        """The same, without sites where none can be held out; and a sentence on what is judged, where there are any."""
        data = self.data
        if data.sites is None:
            return self, []
        name = self.features.group_name or "group"
        try:
            _, notes = plan_shots(
                data.labels, data.groups, data.class_names, shots=(1,), default=(), sites=data.sites, group_name=name
            )
        except UsageError as error:
            clause = str(error).partition(": expected")[0].partition(". ")[0].rstrip(".")
            note = f"Not judged on photos of a new {name}: {clause}."
            return replace(self, data=replace(data, sites=None)), [note]
        what = f"All accuracies are those on photos of a new {name}: none that was learnt from is judged."
        return self, [what, *notes]

    def of_classes(self, wanted: NDArray[np.bool_]) -> LabelledStore:
        """The images of some of the classes (c,) only."""
        return replace(self, data=self.data.of_classes(wanted))

    @property
    def of_reference(self) -> FeatureSet:
        """The store's images with the embeddings of the reference alone, which are of its first network."""
        made = backbones_of(self.features.provenance)[0]
        columns = slice(*self.columns.columns(self.columns.reference))
        return replace(
            self.features,
            embeddings=self.features.embeddings[:, columns],
            provenance=made,
            fingerprint=fingerprint(made),
        )

    @property
    def place(self) -> int:
        """Where the reference is among the layers of its network."""
        layers, name = list(backbones_of(self.features.provenance)[0]["layers"]), self.columns.reference
        # Of several networks the penultimate layer has the network's name.
        return layers.index(name.partition("/")[2] or (name if name in layers else PENULTIMATE))

    @property
    def reference(self) -> NDArray[np.floating]:
        """Embeddings (n, d) of the reference layer."""
        return self.data.embeddings[:, slice(*self.columns.columns(self.columns.reference))]


@dataclass
class Trials:
    """Outcomes of all strategies on the same draws, each compared with ``reference``; ``sites`` as of a sweep."""

    labels: NDArray[np.int64]
    reference: str
    sites: Index | None = None
    trials: dict[tuple[str, Shots, int], Trial] = field(default_factory=dict)
    queries: dict[tuple[Shots, int], Index] = field(default_factory=dict)
    families: dict[str, Family] = field(default_factory=dict)

    def add(self, result: SweepResult, family: Family, names: Mapping[str, str] | None = None) -> None:
        """Take in what a sweep found, by other ``names`` than its own; its draws must be those that are here already.

        What is new is of this family.
        """
        for draw, query in result.queries.items():
            known = self.queries.setdefault(draw, query)
            if not np.array_equal(known, query):
                raise RuntimeError("two measurements did not make the same draws")
        for trial in (*result.trials, *result.pixels):
            name = (names or {}).get(trial.head, trial.head)
            self.trials.setdefault((name, trial.n_shots, trial.episode), trial)
            self.families.setdefault(name, "control" if name == PIXELS else family)

    def cells(self) -> tuple[Cell, ...]:
        """Every strategy at every number of shots, with its difference to the reference on the draws of both."""
        found = []
        for name, n_shots in dict.fromkeys((name, n) for name, n, _ in self.trials):
            own, base = self._of(name, n_shots), self._of(self.reference, n_shots)
            both = sorted(set(own) & set(base)) if name != self.reference else []
            difference = None
            if len(both) > 1:
                pair = [own[e] for e in both], [base[e] for e in both]
                difference = paired_difference(*pair, self.queries, self.labels, self.sites)
            trials = [own[e] for e in sorted(own)]
            accuracy = mean_interval(trials, self.queries, self.labels, sites=self.sites)
            seconds = float(np.mean([t.fit_seconds for t in trials]))
            found.append(Cell(name, self.families[name], int(n_shots), len(own), accuracy, difference, seconds))
        return _adjusted(found)

    def _of(self, name: str, n_shots: Shots) -> dict[int, Trial]:
        """Trials by episode."""
        return {e: trial for (s, n, e), trial in self.trials.items() if (s, n) == (name, n_shots)}

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
