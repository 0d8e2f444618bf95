"""What a sweep finds: trials, and from them results, comparisons and a winner. Numbers only, no drawing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from featx._arrays import PENULTIMATE, PIXELS, Index
from featx.errors import plural
from featx.evaluation import stats
from featx.evaluation.duplicates import Duplicates
from featx.evaluation.splits import Shots, drawable, least_images, shots_label


@dataclass(frozen=True)
class Trial:
    """One head on one episode; ``layer`` is that of its embeddings, "" where there was no choice.

    ``predictions`` (m,) and ``confidences`` (m,; None without probabilities) follow the query of the draw.
    ``selection_score`` is the loss that chose ``params``: it was used to select, so it is no result.
    """

    head: str
    n_shots: Shots
    episode: int
    n_support: int
    n_query: int
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    log_loss: float | None
    ece: float | None
    brier: float | None
    params: Mapping[str, Any]
    selection_score: float | None
    converged: bool
    fit_seconds: float
    predictions: NDArray[np.int32] = field(repr=False, compare=False)
    confidences: NDArray[np.float32] | None = field(repr=False, compare=False)
    layer: str = ""

    def times(self) -> dict[str, Any]:
        """One row of ``times.csv``."""
        return {name: getattr(self, name) for name in ("head", "layer", "n_shots", "episode", "fit_seconds")}

    @classmethod
    def of(
        cls,
        truth: NDArray[np.integer],
        predicted: NDArray[np.integer],
        probabilities: NDArray[np.float64] | None,
        classes: Index,
        **about: Any,
    ) -> Trial:
        """Judge what was named: truth and predicted (m,), probabilities (m, k), all in 0 .. k-1 of ``classes`` (k,)."""
        confidence = None if probabilities is None else probabilities.max(axis=1)
        return cls(
            n_query=len(truth),
            accuracy=stats.accuracy(truth, predicted),
            balanced_accuracy=stats.balanced_accuracy(truth, predicted),
            macro_f1=stats.macro_f1(truth, predicted),
            log_loss=None if probabilities is None else stats.log_loss(truth, probabilities),
            ece=None if confidence is None else stats.expected_calibration_error(confidence, predicted == truth),
            brier=None if probabilities is None else stats.brier(truth, probabilities),
            predictions=classes[predicted].astype(np.int32),
            confidences=None if confidence is None else confidence.astype(np.float32),
            **about,
        )

    def row(self) -> dict[str, Any]:
        """One row of ``trials.csv``: plain values, parameters as columns ``param_*``; the same at every run."""
        skip = {"params", "predictions", "confidences", "fit_seconds"}
        row = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in skip}
        return {**row, **{f"param_{name}": value for name, value in self.params.items()}}


@dataclass(frozen=True)
class HeadResult:
    """One head at one n_shots, over all episodes; ``tied`` says that the best is not better for sure."""

    head: str
    n_shots: Shots
    episodes: int
    accuracy: stats.Interval
    balanced_accuracy: stats.Interval
    macro_f1: float
    log_loss: float | None
    ece: float | None
    brier: float | None
    params: Mapping[str, Any]
    converged: float
    fit_seconds: float
    rank: int
    tied: bool
    layer: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain types, as ``summary.json`` has them."""
        out = {name: getattr(self, name) for name in self.__dataclass_fields__}
        out["accuracy"] = self.accuracy.to_json()
        out["balanced_accuracy"] = self.balanced_accuracy.mean
        out["balanced_accuracy_interval"] = self.balanced_accuracy.to_json()
        out["params"] = dict(self.params)
        return out


@dataclass(frozen=True)
class Comparison:
    """Head ``a`` minus head ``b`` at one n_shots, on the same draws; p is adjusted by Holm."""

    a: str
    b: str
    n_shots: Shots
    difference: stats.Difference

    def to_json(self) -> dict[str, Any]:
        """Plain types, as ``summary.json`` has them."""
        about = {"a": self.a, "b": self.b, "n_shots": self.n_shots}
        return {**about, **self.difference.to_json(), "p_unadjusted": self.difference.p}


Queries: TypeAlias = Mapping[tuple[Shots, int], Index]
"""Rows that a draw was judged on, by (n_shots, episode)."""


def mean_interval(
    trials: Sequence[Trial],
    queries: Queries,
    labels: NDArray[np.int64],
    measure: str = "accuracy",
    sites: Index | None = None,
) -> stats.Interval:
    """Mean of a measure over the trials of one competitor at one n_shots, with its 95 % interval.

    Parameters
    ----------
    trials : by episode.
    queries : of all draws.
    labels : (n,) of all rows.
    measure : "accuracy" or "balanced_accuracy".
    sites : (n,) of draws across sites: then these, and not images, are what another study would draw anew, and the
        variance is that of a mean over them (:func:`_by_site`).
    """
    scores = np.array([getattr(trial, measure) for trial in trials])
    parts = _parts(_hits(trials, queries, labels), trials, queries, sites)
    return stats.mean_interval(scores, *parts, few=sites is not None)


def paired_difference(
    a: Sequence[Trial],
    b: Sequence[Trial],
    queries: Queries,
    labels: NDArray[np.int64],
    sites: Index | None = None,
) -> stats.Difference:
    """Accuracy of ``a`` less that of ``b`` on the same draws, with its 95 % interval and p; arguments as above."""
    scores = np.array([x.accuracy - y.accuracy for x, y in zip(a, b, strict=True)])
    images = _hits(a, queries, labels) - _hits(b, queries, labels)
    return stats.paired_difference(scores, *_parts(images, a, queries, sites), few=sites is not None)


def _parts(
    images: NDArray[np.float64], trials: Sequence[Trial], queries: Queries, sites: Index | None
) -> tuple[NDArray[np.float64], float, float, NDArray[np.float64]]:
    return _by_image(images, trials, queries) if sites is None else _by_site(images, trials, queries, sites)


def _hits(trials: Sequence[Trial], queries: Queries, labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of right predictions (n,) of each image; nan where it was never queried."""
    right, seen = np.zeros(len(labels)), np.zeros(len(labels))
    for trial in trials:
        query = queries[trial.n_shots, trial.episode]
        right[query] += trial.predictions == labels[query]
        seen[query] += 1
    return np.asarray(np.divide(right, seen, out=np.full(len(right), np.nan), where=seen > 0))


def _by_image(
    images: NDArray[np.float64], trials: Sequence[Trial], queries: Queries
) -> tuple[NDArray[np.float64], float, float, NDArray[np.float64]]:
    """What the variance of a mean over draws is made of: images, mean sizes of support and query, and lessons."""
    sizes = float(np.mean([t.n_support for t in trials])), float(np.mean([t.n_query for t in trials]))
    return images, *sizes, stats.lessons(images, [queries[t.n_shots, t.episode] for t in trials])


def _by_site(
    images: NDArray[np.float64], trials: Sequence[Trial], queries: Queries, sites: Index
) -> tuple[NDArray[np.float64], float, float, NDArray[np.float64]]:
    """As :func:`_by_image`, of sites in the place of images.

    Sites of a draw are in the support or in the query: what it does not query, it learnt from.
    """
    places, values = stats.site_values(images, sites)
    asked = [np.searchsorted(places, np.unique(sites[queries[t.n_shots, t.episode]])) for t in trials]
    n_query = float(np.mean([len(each) for each in asked]))
    return values, max(len(places) - n_query, 1.0), n_query, stats.lessons(values, asked)


@dataclass(frozen=True)
class SweepResult:
    """Everything a sweep found; see :meth:`to_json` for the numbers and ``trials`` for the rows.

    Attributes
    ----------
    heads, shots : what was compared, in the order asked.
    labels : (n,) of the rows that took part, in 0 .. c-1; ``rows`` (n,) says which rows of the input.
    trials : one for each head, n_shots and episode, in this order.
    queries : the rows (positions in ``labels``) that an episode was judged on, by (n_shots, episode).
    notes : sentences that a reader must know: what was left out, what did not converge.
    pixels : trials of the pixels baseline, for each n_shots and episode; none where it was not judged.
    features : what the embeddings of the usual layer are called.
    recommended : name of the head that the pixels baseline was judged with.
    missing : by n_shots, how many draws of the plan were not made; those with fewer than two are not in ``shots``.
    sites : (n,) of draws in which support and query share no site; None for ordinary ones. Intervals are then over
        sites. ``group_name`` is what one is, such as "camera".
    """

    heads: tuple[str, ...]
    shots: tuple[Shots, ...]
    episodes: int
    class_names: tuple[str, ...]
    labels: NDArray[np.int64] = field(repr=False)
    rows: Index = field(repr=False)
    trials: tuple[Trial, ...] = field(repr=False)
    queries: Queries = field(repr=False)
    duplicates: Duplicates = field(repr=False)
    notes: tuple[str, ...]
    random_state: int
    seconds: float
    pixels: tuple[Trial, ...] = field(default=(), repr=False)
    features: str = "embeddings"
    recommended: str = "ridge"
    missing: Mapping[Shots, int] = field(default_factory=dict)
    sites: Index | None = field(default=None, repr=False)
    group_name: str = "group"

    @property
    def planned(self) -> int:
        """Draws that were made and that are missing, of all n_shots."""
        return len(self.queries) + sum(self.missing.values())

    def draws(self, n_shots: Shots) -> int:
        """Draws of one n_shots: the same for every head."""
        return sum(shots == n_shots for shots, _ in self.queries)

    @property
    def missing_sentence(self) -> str:
        """How many draws each n_shots has, where some are missing; else ""."""
        if not self.missing:
            return ""
        shots = (*self.shots, *(n_shots for n_shots in self.missing if n_shots not in self.shots))
        each = ", ".join(f"{self.draws(n_shots)} with {shots_label(n_shots)}" for n_shots in shots)
        return f"Provisional: {len(self.queries)} of {plural(self.planned, 'draw')} are done ({each})."

    def mean_accuracy(self, head: str) -> float:
        """Mean over all n_shots of the mean accuracy over its draws."""
        return float(np.mean([np.mean([t.accuracy for t in self.of(head, n_shots)]) for n_shots in self.shots]))

    def of(self, head: str, n_shots: Shots) -> list[Trial]:
        """Trials of one head (or of the pixels baseline) at one n_shots, by episode."""
        if head == PIXELS:
            return [t for t in self.pixels if t.n_shots == n_shots]
        return [t for t in self.trials if t.head == head and t.n_shots == n_shots]

    def compared(self, n_shots: Shots) -> tuple[str, ...]:
        """The classes that have enough images for this n_shots; the others are in none of its draws."""
        return tuple(name for name, n in zip(self.class_names, self._counts, strict=True) if n >= least_images(n_shots))

    @cached_property
    def _counts(self) -> Index:
        return drawable(self.labels, self.duplicates.groups, self.sites, len(self.class_names))

    @cached_property
    def majority_baseline(self) -> float:
        """Accuracy of always naming the most frequent class."""
        return stats.majority_baseline(self.labels)

    @cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Every pair of heads at every n_shots, Holm over the pairs of one n_shots."""
        pairs = list(combinations(self.heads, 2))
        return tuple(each for n_shots in self.shots for each in self._compared([(a, b, n_shots) for a, b in pairs]))

    @cached_property
    def results(self) -> tuple[HeadResult, ...]:
        """Every head at every n_shots, ranked by mean accuracy within each."""
        out = []
        for n_shots in self.shots:
            means = {h: float(np.mean([t.accuracy for t in self.of(h, n_shots)])) for h in self.heads}
            ranked = sorted(self.heads, key=lambda head: -means[head])
            for rank, head in enumerate(ranked, start=1):
                out.append(self._summarise(head, n_shots, rank, self.cannot_tell(ranked[0], head, n_shots)))
        return tuple(out)

    def cannot_tell(self, a: str, b: str, n_shots: Shots) -> bool:
        """Whether two heads cannot be told apart at this n_shots (a head from itself cannot)."""
        for each in self.comparisons:
            if each.n_shots == n_shots and {each.a, each.b} == {a, b}:
                return each.difference.verdict == "cannot tell"
        return True

    def _summarise(self, head: str, n_shots: Shots, rank: int, tied: bool) -> HeadResult:
        trials = self.of(head, n_shots)
        choices = [tuple(t.params.items()) for t in trials]
        return HeadResult(
            head=head,
            n_shots=n_shots,
            episodes=len(trials),
            accuracy=mean_interval(trials, self.queries, self.labels, sites=self.sites),
            balanced_accuracy=mean_interval(trials, self.queries, self.labels, "balanced_accuracy", self.sites),
            macro_f1=float(np.mean([t.macro_f1 for t in trials])),
            log_loss=_mean([t.log_loss for t in trials]),
            ece=_mean([t.ece for t in trials]),
            brier=_mean([t.brier for t in trials]),
            params=dict(Counter(choices).most_common(1)[0][0]),
            converged=float(np.mean([t.converged for t in trials])),
            fit_seconds=float(np.mean([t.fit_seconds for t in trials])),
            rank=rank,
            tied=tied,
            layer=trials[0].layer,
        )

    @cached_property
    def winner(self) -> str:
        """The head with the highest accuracy averaged over all n_shots."""
        return max(self.heads, key=self.mean_accuracy)

    def features_of(self, layer: str) -> str:
        """What the features of a trial are called: ``features`` for the usual layer, else as the layer is."""
        return self.features if layer in ("", PENULTIMATE) else layer

    @cached_property
    def by_features(self) -> Mapping[str, str]:
        """The head that stands for each set of features: one that all of them were given, the first if it can be.

        In the order of their mean accuracy. The pixels baseline stands last, where it was judged.
        """
        heads: dict[str, dict[str, str]] = {}
        for head in self.heads:
            layer = next(t.layer for t in self.trials if t.head == head)
            heads.setdefault(self.features_of(layer), {})[head.partition("@")[0]] = head
        common = [name for name in next(iter(heads.values())) if all(name in own for own in heads.values())]
        usual = [name for name in common if name == self.recommended] or common
        if not usual:
            return {}
        if len(heads) == 1 and self.recommended not in common:
            usual = [self.winner]
        chosen = {features: own[usual[0]] for features, own in heads.items()}
        means = {name: self.mean_accuracy(head) for name, head in chosen.items()}
        ordered = {name: chosen[name] for name in sorted(chosen, key=lambda name: -means[name])}
        return {**ordered, **({PIXELS: PIXELS} if self.pixels else {})}

    @cached_property
    def baseline(self) -> tuple[Comparison, ...]:
        """The winner less the pixels baseline at every n_shots: what the networks are worth on these images.

        Empty where the baseline was not judged; Holm over the numbers of shots.
        """
        if not self.pixels:
            return ()
        return self._compared([(self.winner, PIXELS, n_shots) for n_shots in self.shots])

    def _compared(self, pairs: Sequence[tuple[str, str, Shots]]) -> tuple[Comparison, ...]:
        """Pairs of heads, each at one n_shots; Holm over all of them."""
        found = [
            paired_difference(self.of(a, n_shots), self.of(b, n_shots), self.queries, self.labels, self.sites)
            for a, b, n_shots in pairs
        ]
        adjusted = stats.holm([each.p for each in found])
        return tuple(
            Comparison(*pair, stats.Difference(each.interval, each.p, p))
            for pair, each, p in zip(pairs, found, adjusted, strict=True)
        )

    def recall(self, head: str, n_shots: Shots) -> dict[str, stats.Interval]:
        """Share of each class's images that are recognised, over draws, with its 95 % interval.

        Classes that are in no draw of this size are left out.
        """
        trials = self.of(head, n_shots)
        queries = [self.queries[n_shots, trial.episode] for trial in trials]
        hits, c = _hits(trials, self.queries, self.labels), len(self.class_names)
        sizes = np.array([np.bincount(self.labels[query], minlength=c) for query in queries])
        right = np.array(
            [
                np.bincount(self.labels[query][trial.predictions == self.labels[query]], minlength=c)
                for trial, query in zip(trials, queries, strict=True)
            ]
        )
        out = {}
        for i, name in enumerate(self.class_names):
            judged = np.flatnonzero(sizes[:, i])
            if not len(judged):
                continue
            n_query = float(sizes[judged, i].mean())
            n_support = float(n_shots) if n_shots != "all" else max(int((self.labels == i).sum()) - n_query, 1.0)
            images = np.where(self.labels == i, hits, np.nan)
            taught = stats.lessons(images, [queries[j] for j in judged])
            scores = right[judged, i] / sizes[judged, i]
            out[name] = stats.mean_interval(scores, images, n_support, n_query, taught)
        return out

    def pixels_accuracy(self, n_shots: Shots) -> stats.Interval:
        """Mean accuracy of the pixels baseline at one n_shots."""
        return mean_interval(self.of(PIXELS, n_shots), self.queries, self.labels, sites=self.sites)

    def votes(self, head: str, n_shots: Shots) -> NDArray[np.int64]:
        """How often (n, c) each image was named as each class while it was in the query."""
        out = np.zeros((len(self.labels), len(self.class_names)), dtype=np.int64)
        for trial in self.of(head, n_shots):
            out[self.queries[n_shots, trial.episode], trial.predictions] += 1
        return out

    def confusion(self, head: str, n_shots: Shots) -> NDArray[np.int64]:
        """Counts (c, c) over all draws: rows are true classes, columns named ones."""
        out = np.zeros((len(self.class_names),) * 2, dtype=np.int64)
        np.add.at(out, self.labels, self.votes(head, n_shots))
        return out

    def reliability(self, head: str, n_shots: Shots, *, bins: int = 10) -> list[tuple[float, float, int]]:
        """Mean confidence, accuracy and count of each bin of the confidence that has any; over all draws."""
        confidence, right = [], []
        for trial in self.of(head, n_shots):
            if trial.confidences is None:
                return []
            confidence.append(trial.confidences)
            right.append(trial.predictions == self.labels[self.queries[n_shots, trial.episode]])
        sure, hit = np.concatenate(confidence), np.concatenate(right)
        which = np.minimum((sure * bins).astype(int), bins - 1)
        inside = [which == i for i in range(bins)]
        return [(float(sure[at].mean()), float(hit[at].mean()), int(at.sum())) for at in inside if at.any()]

    def to_json(self) -> dict[str, Any]:
        """What ``featx sweep --json`` prints and ``summary.json`` holds."""
        return {
            "winner": self.winner,
            "results": [
                {
                    **each.to_json(),
                    "features": self.features_of(each.layer),
                    # Of the heads that one would take: of all, large sets of classes would fill the file.
                    "recall": {name: share.to_json() for name, share in self.recall(each.head, each.n_shots).items()}
                    if each.head in (self.winner, self.recommended)
                    else None,
                }
                for each in self.results
            ],
            "comparisons": [each.to_json() for each in self.comparisons],
            "duplicates": self.duplicates.to_json(),
            "majority_baseline": self.majority_baseline,
            "pixels_baseline": [
                {**each.to_json(), "accuracy": self.pixels_accuracy(each.n_shots).to_json()} for each in self.baseline
            ],
            "images": len(self.labels),
            "classes": dict(zip(self.class_names, np.bincount(self.labels).tolist(), strict=True)),
            "heads": list(self.heads),
            "shots": list(self.shots),
            "episodes": self.episodes,
            "missing": {str(n_shots): n for n_shots, n in self.missing.items()},
            "random_state": self.random_state,
            "notes": list(self.notes),
            "seconds": self.seconds,
        }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
