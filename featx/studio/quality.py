"""How good a model of the labels would be on photos that nobody has labelled.

Every labelled photo is named by heads that were fitted without it and its copies. Labelling what is in doubt makes a
harder set than the folder is, and accepting suggestions an easier one; so accuracy is counted on a random sample alone
where it is large enough: the photos from the beginning of a fixed random order (:func:`featx.studio.project.order`)
that are labelled without a gap, into which "worth labelling" mixes the next one again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx._arrays import Index
from featx.advice import LabelRanking, fit_curve, rank_labels
from featx.errors import plural
from featx.evaluation import Interval, SweepResult, percent, points, sites_of, sweep_heads
from featx.heads import Layers
from featx.models import clopper_pearson
from featx.store import FeatureSet
from featx.studio.journal import LEFT_OUT, NOTHING, UNSURE

LEAST = 20
"""Labelled photos from which on anything is said, and photos of the random sample from which on it is counted alone."""

LEAST_EACH = 3
"""Labelled photos that each of two classes needs."""

_EPISODES = 10
_SECONDS = 20.0
_DOUBTFUL = 60
"""Most photos that are shown as perhaps mislabelled."""

_MORE = 10

Stop = Callable[[], bool]


class OutOfDate(Exception):
    """Labels have changed meanwhile; what was measured so far is of no use."""


@dataclass(frozen=True)
class Labelled:
    """The photos with an embedding, as a store has them, with the labels that they have now.

    Attributes
    ----------
    features : of those photos; ``features.labels`` are codes of classes, or -1.
    photos : (m,) the photo of each.
    codes : (n,) what every photo is called, embedded or not.
    drawn : (n,) all photos in a random order.
    layers : the columns of the embeddings.
    """

    features: FeatureSet
    photos: Index
    codes: Index
    drawn: Sequence[int]
    layers: Layers

    @property
    def sample(self) -> Index:
        """The random sample, as of :func:`sample_of`."""
        return sample_of(self.codes, self.drawn)


def too_early(codes: Index) -> str:
    """Why nothing can be said yet of labels (n,), as a sentence; "" where it can."""
    counts = np.bincount(codes[codes >= 0])
    classes = int((counts >= LEAST_EACH).sum())
    missing = LEAST - int(counts.sum())
    if classes < 2:
        return f"Cannot tell yet: label at least {LEAST_EACH} photos of each of two classes."
    return f"Cannot tell yet: label {missing} more." if missing > 0 else ""


def sample_of(codes: Index, drawn: Sequence[int]) -> Index:
    """The random sample: photos from the beginning of the random order up to the first that nobody has looked at.

    Photos that are "unsure" or left out as copies are no part of it.
    """
    looked = codes[np.asarray(drawn, dtype=np.intp)] != NOTHING
    length = len(looked) if looked.all() else int(looked.argmin())
    rows = np.asarray(drawn[:length], dtype=np.intp)
    return rows[~np.isin(codes[rows], (UNSURE, LEFT_OUT))]


def measure(data: Labelled, stop: Stop, tell: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """What the page shows under "How good?".

    Parameters
    ----------
    stop : asked now and then; when it says yes, OutOfDate is raised.
    tell : called with what is being done.
    """
    tell("naming each labelled photo without its own label")
    use = np.flatnonzero(data.features.labels >= 0)
    labelled = data.features.some(use)
    both: dict[str, Any] = {
        "class_names": labelled.class_names, "groups": labelled.copies, "near_duplicates": labelled.near_copies,
        "sites": sites_of(data.features, use), "n_jobs": 1, "progress": lambda *_: _check(stop),
    }  # fmt: skip
    judged = rank_labels(labelled.embeddings, labelled.labels, repeats=1, **both)
    rows = data.photos[use[judged.rows]]
    right = judged.suggested == judged.labels
    _check(stop)
    out: dict[str, Any] = {
        "n": len(rows),
        "accuracy": _accuracy(rows, right, data),
        "majority": float(np.bincount(judged.labels).max() / len(rows)),
        "pixels": None,
        "curve": [],
        "forecast": "",
        "classes": _classes(judged, right),
        "confusion": _confusion(judged, rows),
        "doubtful": [
            {
                "row": int(rows[i]), "label": int(judged.labels[i]), "suggested": int(judged.suggested[i]),
                "confidence": float(judged.confidence[i]),
            }
            for i in np.flatnonzero(judged.doubtful)[:_DOUBTFUL].tolist()
        ],
        "notes": _notes(judged, rows, data),
    }  # fmt: skip
    tell("learning curve")
    several = len(data.layers.names) > 1
    swept = sweep_heads(
        labelled.embeddings, labelled.labels, heads=("auto",), episodes=_EPISODES, seconds=_SECONDS,
        layers=data.layers if several else None, on=[data.layers.whole] if several else None, pixels=labelled.pixels,
        **both,
    )  # fmt: skip
    return {**out, **_curve(swept)}


def _check(stop: Stop) -> None:
    if stop():
        raise OutOfDate


def _interval(right: int, of: int) -> dict[str, float]:
    low, high = clopper_pearson(right, of)
    return {"mean": right / of, "low": low, "high": high}


def _accuracy(rows: Index, right: NDArray[np.bool_], data: Labelled) -> dict[str, Any]:
    sample = np.isin(rows, data.sample)
    enough = int(sample.sum()) >= LEAST
    if enough and sample.all() and len(rows) == int((data.codes != LEFT_OUT).sum()):
        on = f"all {len(rows)} photos"
    elif enough:
        on = f"{int(sample.sum())} photos that were drawn at random"
    else:
        on = (
            f"all {len(rows)} labelled photos, which were not drawn at random: the whole folder may be easier or "
            f"harder; {plural(LEAST - int(sample.sum()), 'photo')} more in the order of 'worth labelling', and it is "
            "counted on a random sample"
        )
    counted = right[sample] if enough else right
    share = _interval(int(counted.sum()), len(counted))
    return {**share, "text": percent(Interval(**share)), "on": on}


def _classes(judged: LabelRanking, right: NDArray[np.bool_]) -> list[dict[str, Any]]:
    out = []
    for code in np.unique(judged.labels).tolist():
        own = judged.labels == code
        share = _interval(int(right[own].sum()), int(own.sum()))
        out.append({"class": code, "n": int(own.sum()), "recall": share, "hint": ""})
    worst = min(out, key=lambda each: each["recall"]["mean"])
    if worst["recall"]["mean"] < 1:
        worst["hint"] = "The least often recognised: on average, more labels of such a class help more than of others."
    return out


def _confusion(judged: LabelRanking, rows: Index) -> dict[str, Any]:
    codes = np.unique(np.concatenate([judged.labels, judged.suggested]))
    counts = np.zeros((len(codes), len(codes)), int)
    a, b = np.searchsorted(codes, judged.labels), np.searchsorted(codes, judged.suggested)
    np.add.at(counts, (a, b), 1)
    cells = {
        f"{codes[i]},{codes[j]}": rows[(a == i) & (b == j)].tolist() for i, j in zip(*np.nonzero(counts), strict=True)
    }
    return {"classes": codes.tolist(), "counts": counts.tolist(), "cells": cells}


def _notes(judged: LabelRanking, rows: Index, data: Labelled) -> list[str]:
    notes = []
    groups = data.features.groups[data.features.labels >= 0]
    together = len(np.unique(groups[groups != ""]))
    if together < int((groups != "").sum()):
        name = data.features.group_name or "group"
        notes.append(f"No photo was judged by a classifier that knew others of its {name}: {plural(together, name)}.")
    if not np.isin(rows, data.sample).all():
        notes.append(
            "Curve, classes and confusions are about all labelled photos. Many of them were labelled because they were "
            "in doubt, so they look worse than the folder as a whole."
        )
    if judged.left_out:
        notes.append(f"Not counted, for they have a single photo: {', '.join(judged.left_out)}.")
    return notes


def _curve(swept: SweepResult) -> dict[str, Any]:
    """The learning curve with the pixels baseline beside it, and what more labels would be worth."""
    curve = []
    by_shots = {result.n_shots: result for result in swept.results if result.head == swept.heads[0]}
    for n_shots, result in by_shots.items():
        if isinstance(n_shots, int):
            share = result.accuracy
            point: dict[str, Any] = {
                "shots": n_shots, "mean": share.mean, "low": share.low, "high": share.high, "pixels": None,
            }  # fmt: skip
            if swept.pixels:
                point["pixels"] = swept.pixels_accuracy(n_shots).mean
            curve.append(point)
    pixels = None
    if swept.pixels:
        last = swept.pixels_accuracy(swept.shots[-1])
        pixels = {"mean": last.mean, "low": last.low, "high": last.high}
    return {"curve": curve, "pixels": pixels, "forecast": _forecast(swept, [each["shots"] for each in curve])}


def _forecast(swept: SweepResult, shots: list[int]) -> str:
    """What more labels of each class would be worth, as a sentence; "" where the curve cannot tell."""
    if len(shots) < 2:
        return ""
    episodes = sorted(set.intersection(*({t.episode for t in swept.of(swept.heads[0], n)} for n in shots)))
    hits = np.full((len(episodes), len(shots), len(swept.labels)), np.nan)
    for j, n_shots in enumerate(shots):
        for trial in swept.of(swept.heads[0], n_shots):
            if trial.episode in episodes:
                query = swept.queries[n_shots, trial.episode]
                hits[episodes.index(trial.episode), j, query] = trial.predictions == swept.labels[query]
    # Like with like: only what the largest support of the same draw leaves over.
    hits[np.isnan(hits).any(axis=1, keepdims=True).repeat(len(shots), axis=1)] = np.nan
    if not np.isfinite(hits).any(axis=(0, 2)).all():
        return ""
    now = int(np.bincount(swept.labels).min())
    gain = fit_curve(shots, hits, sites=swept.sites).gain(now, now + _MORE)
    if gain.reason:
        return f"What {_MORE} more labels of each class would be worth cannot be told yet: {gain.reason}."
    return f"{_MORE} more labels of each class would be worth about {points(gain.interval)}."
