"""What to expect at a site never seen: a new patient, camera or place, by leaving out each of those that are known.

The interval is one for prediction: where the accuracy at a single new site would lie, which is wider than where the
mean over sites lies, and does not shrink with more photos of the same sites.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from featx._arrays import Index
from featx.errors import plural
from featx.evaluation import stats
from featx.evaluation.labelled import LabelledRows
from featx.heads import Head, fit_chosen, is_large, taken

ADDED = (1, 2, 5)
"""Labels of each class that are added from the new site."""

MOST_SITES = 60
"""Sites that are left out in turn, at the most; of more, so many are drawn."""

LEAST_SITES = 3
"""Fewer say nothing about how sites differ."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class LeftOut:
    """One site that was left out: its name, how many of its images were judged, and the accuracy."""

    name: str
    images: int
    accuracy: float


@dataclass(frozen=True)
class Added:
    """What ``labels`` of each class from the new site add to the accuracy there, over ``sites`` that have so many.

    ``difference`` is paired: the same images of a site are judged with and without them; None below LEAST_SITES.
    """

    labels: int
    sites: int
    difference: stats.Difference | None

    @property
    def verdict(self) -> stats.Verdict:
        """What may be said at a 5 % error rate over all numbers of labels together."""
        return "cannot tell" if self.difference is None else self.difference.verdict

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        found = None
        if self.difference is not None:
            found = {**self.difference.interval.to_json(), "p": self.difference.adjusted}
        return {"labels": self.labels, "groups": self.sites, "gain": found, "verdict": self.verdict}


@dataclass(frozen=True)
class Forecast:
    """What to expect at a new site.

    Attributes
    ----------
    head : what was trained on all other sites.
    group_name : what a site is, such as "camera".
    known : sites with a name that there are; ``left_out`` are those that were, at most :data:`MOST_SITES`.
    expected : mean accuracy over the sites left out and the limits between which a new one lies in 95 of 100 cases;
        None below :data:`LEAST_SITES`.
    method : how the limits were found, see :func:`featx.evaluation.stats.prediction_interval`.
    added : what labels from there add.
    stopped : whether the time was up before all were left out.
    """

    head: str
    group_name: str
    known: int
    left_out: tuple[LeftOut, ...]
    expected: stats.Interval | None
    method: str
    added: tuple[Added, ...]
    stopped: bool = False

    @property
    def sentence(self) -> str:
        """What to expect, in words."""
        count = plural(len(self.left_out), self.group_name)
        if self.expected is None:
            why = "the time was up" if self.stopped else f"{count} could be left out, and it takes {LEAST_SITES}"
            return f"At a new {self.group_name}: cannot tell; {why}."
        text = (
            f"At a new {self.group_name} expect {stats.percent(self.expected)}; in brackets, where a single new one "
            f"lies in 95 of 100 cases, found by leaving out each of {count}."
        )
        words = []
        for each in self.added:
            labels = f"{each.labels} per class"
            if each.difference is None:
                words.append(f"{labels}, cannot tell ({plural(each.sites, self.group_name)} with enough photos)")
            else:
                words.append(f"{labels}, {stats.points(each.difference.interval)}, {each.verdict}")
        return f"{text} What labels from there add: {'; '.join(words)}."

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "head": self.head,
            "group_name": self.group_name,
            "groups": self.known,
            "accuracy": None if self.expected is None else self.expected.to_json(),
            "method": self.method,
            "left_out": [{"group": e.name, "images": e.images, "accuracy": e.accuracy} for e in self.left_out],
            "added": [each.to_json() for each in self.added],
            "sentence": self.sentence,
        }


def forecast_site(
    data: LabelledRows,
    names: Sequence[str] | NDArray[np.str_],
    head: Head,
    *,
    group_name: str = "group",
    random_state: int = 0,
    keep_on: Callable[[], bool] | None = None,
    progress: Progress | None = None,
) -> Forecast:
    """Leave out each site with a name, train on all others, and judge there.

    Parameters
    ----------
    data : labelled rows, with sites.
    names : (n,) the group of each row, "" for none: such rows are learnt from only.
    head : what is trained; its parameters are chosen anew each time, across the other sites.
    group_name : what a site is, such as "camera".
    random_state : seed of the folds and of the labels that are added.
    keep_on : asked before each site; when it says no, what is known is returned.
    progress : called as ``progress(done, total, what)``.
    """
    if data.sites is None:
        raise ValueError("a forecast takes sites")
    texts = np.asarray(names)
    known = [int(site) for site in np.unique(data.sites[texts != ""])]
    drawn = np.sort(np.random.default_rng(random_state).permutation(known)[:MOST_SITES]).tolist()
    rows = head.seen(data.embeddings)
    left_out: list[LeftOut] = []
    gains: dict[int, list[float]] = {labels: [] for labels in ADDED}
    stopped = False
    for number, site in enumerate(drawn):
        stopped = keep_on is not None and not keep_on()
        if stopped:
            break
        if progress is not None:
            progress(number, len(drawn), f"leaving out each {group_name}")
        there = data.sites == site
        others = np.flatnonzero(~there)
        classes = np.unique(data.labels[others])
        own = np.flatnonzero(there & np.isin(data.labels, classes))
        if not len(own) or len(classes) < 2:
            continue
        right = _right(head, rows, data, others, own, random_state)
        name = texts[there & (texts != "")][0]
        left_out.append(LeftOut(str(name), len(own), float(right.mean())))
        # Copies once; a fixed order, so that two labels are the one and another.
        order = np.random.default_rng([random_state, site]).permutation(own)
        order = order[np.sort(np.unique(data.groups[order], return_index=True)[1])]
        fewest = np.bincount(data.labels[order])
        for labels in ADDED:
            if fewest[fewest > 0].min() <= labels:
                continue
            some = np.concatenate([order[data.labels[order] == c][:labels] for c in np.unique(data.labels[order])])
            rest = np.flatnonzero(~np.isin(data.groups[own], data.groups[some]))
            if len(rest):
                now = _right(head, rows, data, np.sort(np.concatenate([others, some])), own[rest], random_state)
                gains[labels].append(float(now.mean() - right[rest].mean()))
    expected, method = None, ""
    if len(left_out) >= LEAST_SITES:
        expected, method = stats.prediction_interval(np.array([each.accuracy for each in left_out]))
    added = _added(gains)
    return Forecast(head.name, group_name, len(known), tuple(left_out), expected, method, added, stopped)


def _right(
    head: Head, rows: NDArray[np.floating], data: LabelledRows, train: Index, judged: Index, random_state: int
) -> NDArray[np.bool_]:
    """Which of some rows are named rightly by a head that was trained on others."""
    assert data.sites is not None
    classes, labels = np.unique(data.labels[train], return_inverse=True)
    support = taken(rows, train)
    with threadpool_limits(limits=None if is_large(support) else 1, user_api="blas"):
        _, model = fit_chosen(
            head, support, labels, data.groups[train], random_state=random_state, sites=data.sites[train]
        )
        return np.asarray(classes[model.predict(taken(rows, judged))] == data.labels[judged])


def _added(gains: dict[int, list[float]]) -> tuple[Added, ...]:
    """Differences over sites, each with Student's interval, adjusted by Holm over the numbers of labels."""
    found = {n: stats.mean_difference(np.array(each)) for n, each in gains.items() if len(each) >= LEAST_SITES}
    adjusted = dict(zip(found, stats.holm([each.p for each in found.values()]), strict=True))
    return tuple(
        Added(n, len(each), stats.Difference(found[n].interval, found[n].p, adjusted[n]) if n in found else None)
        for n, each in gains.items()
    )
