"""Which images to label next: those the head is unsure of, and of these such that are unlike each other.

Uncertainty is a small margin between the two likeliest classes; diversity comes from k-means over the most uncertain
images, weighted by uncertainty, of which each cluster gives the image nearest to its centre (Zhdanov, 2019, "Diverse
mini-batch active learning"). Whether that gains anything over labelling at random is not assumed but measured, on
images whose labels are known: with few labels it often does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.pipeline import Pipeline
from threadpoolctl import threadpool_limits

from featx._arrays import Index
from featx.errors import UsageError, plural
from featx.evaluation import draw, drawable, stats
from featx.heads import HEADS, distinct_counts, fit_chosen, margins, unit_rows

Array: TypeAlias = NDArray[np.float64]

PRESELECT = 10
"""So many times the wanted number are clustered: the most uncertain ones."""

RANDOM_DRAWS = 4
"""Random batches that a chosen one is compared with, in every draw."""


def choose_next(embeddings: NDArray[np.floating], margin: Array, count: int, *, random_state: int = 0) -> Index:
    """The rows to label next, the most uncertain cluster first.

    Parameters
    ----------
    embeddings : (n, d) of images without labels.
    margin : (n,) of :func:`featx.heads.margins`, of probabilities: 0 is undecided, 1 is sure.
    count : how many; at most n.

    Returns
    -------
    (count,) different rows.

    Raises
    ------
    UsageError
        More are wanted than there are.
    """
    if not 1 <= count <= len(embeddings):
        raise UsageError("cannot choose so many images", expected=f"1 to {len(embeddings)}", found=count)
    pool = np.argsort(margin, kind="stable")[: PRESELECT * count]
    rows = unit_rows(embeddings[pool])
    weight = np.maximum(1.0 - margin[pool], 1e-6)
    distinct = len(np.unique(rows, axis=0))
    found = KMeans(min(count, distinct), n_init=1, random_state=random_state).fit(rows, sample_weight=weight)
    distance = ((rows - found.cluster_centers_[found.labels_]) ** 2).sum(axis=1)
    mass = np.bincount(found.labels_, weights=weight)
    nearest = [
        int(own[distance[own].argmin()]) for own in (np.flatnonzero(found.labels_ == k) for k in range(len(mass)))
    ]
    first = [nearest[k] for k in np.argsort(-mass, kind="stable")]
    # Where images are the same, there are fewer clusters than asked for: the most uncertain others fill up.
    rest = [place for place in range(len(pool)) if place not in set(first)]
    return np.asarray(pool[[*first, *rest][:count]])


@dataclass(frozen=True)
class Simulation:
    """Chosen against random labelling where the labels are known.

    Attributes
    ----------
    start : labelled images per class before; ``batch`` : images labelled more.
    before, chosen, at_random : mean accuracy on held-out images.
    gain : chosen minus random, and its verdict.
    episodes : draws.
    """

    start: int
    batch: int
    episodes: int
    before: float
    chosen: float
    at_random: float
    gain: stats.Difference

    @property
    def verdict(self) -> stats.Verdict:
        """Whether choosing is better than chance."""
        return self.gain.verdict


def plan_simulation(labels: NDArray[np.integer], groups: Index, batch: int, sites: Index | None = None) -> int:
    """With how many labelled images per class a simulation can start: as near to now as leaves a choice.

    What is not held out has to give the start, and at least four times the batch to choose from.

    Raises
    ------
    UsageError
        There are too few images.
    """
    counts = distinct_counts(labels, groups, int(labels.max()) + 1)
    left = counts - np.maximum(1, np.rint(0.2 * counts)).astype(int)
    if sites is not None:
        left = np.maximum(drawable(labels, groups, sites, len(counts)) - 1, 0)
    for start in (20, 10, 5, 2, 1):
        if left.min() >= start and left.sum() - start * len(counts) >= 4 * batch:
            return start
    raise UsageError(
        "too few labelled images to try labelling on",
        expected=f"{plural(4 * batch, 'image')} beyond one of each class",
        found=f"{max(int(left.sum()) - len(counts), 0)} that are not held out",
        hint="Ask for fewer images with --next." if batch > 1 else None,
    )  # fmt: skip


def simulate(
    embeddings: NDArray[np.floating],
    labels: NDArray[np.integer],
    groups: Index,
    *,
    start: int,
    batch: int,
    episodes: int = 10,
    random_state: int = 0,
    sites: Index | None = None,
    keep_on: Callable[[int], bool] = lambda done: True,
) -> Simulation:
    """Label a batch by choice and at random, and compare the heads that learn from them on held-out images.

    Parameters
    ----------
    embeddings : (n, d); labels : (n,) in 0 .. c-1; groups : (n,) dense numbers of copies.
    start : images per class whose labels are known at first; ``batch`` : images to label.
    episodes : draws; a fifth of every class is held out in each.
    sites : (n,) what else is held out whole, and what the interval is over.
    keep_on : asked before each draw with the number of finished ones; False ends the simulation.

    Raises
    ------
    UsageError
        Fewer than two draws were made.
    """
    gains, hits, rows = [], np.zeros(len(labels)), np.zeros(len(labels))
    accuracy = []
    sizes = []
    for episode in range(episodes):
        if not keep_on(episode):
            break
        seeds = (random_state, episode)
        pool, query = draw("all", labels, groups, sites, seeds=seeds)
        begin, rest = draw(start, labels[pool], groups[pool], None, seeds=seeds)
        begin, rest = pool[begin], pool[rest]
        judge = _Judge(embeddings, labels, groups, query, seeds)
        known = judge.fit(begin)
        margin = margins(known.predict_proba(embeddings[rest]))
        picked = rest[choose_next(embeddings[rest], margin, batch, random_state=episode)]
        rng = np.random.default_rng([random_state, episode, 1])
        others = [rng.choice(rest, batch, replace=False) for _ in range(RANDOM_DRAWS)]
        chosen = judge.right(judge.fit(np.concatenate([begin, picked])))
        chance = np.mean([judge.right(judge.fit(np.concatenate([begin, other]))) for other in others], axis=0)
        accuracy.append((judge.right(known).mean(), chosen.mean(), chance.mean()))
        gains.append(float((chosen - chance).mean()))
        hits[query] += chosen - chance
        rows[query] += 1
        sizes.append((len(begin) + batch, len(query)))
    if len(gains) < 2:
        raise UsageError("labelling was not simulated often enough", expected="2 draws", found=len(gains))
    images = hits[rows > 0] / rows[rows > 0]
    if sites is not None:
        images = stats.site_values(images, sites[rows > 0])[1]
    support, asked = np.mean(sizes, axis=0)
    found = stats.paired_difference(np.array(gains), images, float(support), float(asked), few=sites is not None)
    # A single comparison: nothing else to adjust for.
    gain = stats.Difference(found.interval, found.p, found.p)
    before, chosen_mean, random_mean = (float(value) for value in np.mean(accuracy, axis=0))
    return Simulation(start, batch, len(gains), before, chosen_mean, random_mean, gain)


@dataclass(frozen=True)
class _Judge:
    embeddings: NDArray[np.floating]
    labels: NDArray[np.integer]
    groups: Index
    query: Index
    seeds: tuple[int, int]

    def fit(self, support: Index) -> Pipeline:
        with threadpool_limits(limits=1, user_api="blas"):
            return fit_chosen(
                HEADS["auto"], self.embeddings[support], self.labels[support], self.groups[support],
                random_state=list(self.seeds),
            )[1]  # fmt: skip

    def right(self, fitted: Pipeline) -> Array:
        named = fitted.predict(self.embeddings[self.query])
        return np.asarray(named == self.labels[self.query], dtype=np.float64)


def rank_unlabelled(
    embeddings: NDArray[np.floating],
    labels: NDArray[np.integer],
    groups: Index,
    pool: NDArray[np.floating],
    count: int,
    *,
    random_state: int = 0,
) -> tuple[Index, Array, Index]:
    """Which rows of a pool (m, d) to label next, by a head that learnt from all labelled images.

    Returns
    -------
    (k,) rows of the pool, their margins (k,), and their likeliest classes (k,); k is ``count``, or m if that is less.
    """
    judge = _Judge(embeddings, labels, groups, np.arange(0), (random_state, 0))
    probabilities = judge.fit(np.arange(len(labels))).predict_proba(pool)
    margin = margins(probabilities)
    rows = choose_next(pool, margin, min(count, len(pool)), random_state=random_state)
    return rows, margin[rows], np.asarray(probabilities[rows].argmax(axis=1))
