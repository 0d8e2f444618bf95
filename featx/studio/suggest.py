"""What photos without a label probably show, and which of them are most worth labelling next.

The head is ridge without any choice (:mod:`featx.heads.instant`), fitted anew after every action; the model that is
taken along is fitted with all choices by :mod:`featx.models.fit`. Whoever labels one batch of suggestions accepts its
errors, so each batch comes with the share of labelled photos that were suggested as surely, without their labels, and
wrongly: of the random sample (:func:`featx.studio.quality.sample_of`) where that has enough of them. Of all labelled
photos it is far higher, since most were labelled because they were in doubt: with 93 ants and bees labelled 10 % of the
sure ones were wrong, and of the 277 in the batches 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featx._arrays import Index
from featx.advice import PRESELECT, choose_next
from featx.evaluation import Interval, percent
from featx.heads import InstantRidge, margins
from featx.models import clopper_pearson, is_unknown, nearest_mean, shares_among
from featx.studio.journal import NONE_OF_THESE, NOTHING

SURE = 0.95
"""The probability from which a suggestion may be accepted with others."""

MAX_UNKNOWN = 0.05

_DIVERSE = 24
"""The first photos are chosen to be unlike each other; the rest follows by doubt alone."""

_EVERY = 3
"""One labelled photo in so many is to be of the random sample, which accuracy is measured on."""

_OTHERS = 3
"""From so many photos on that are called "none of these", others are suggested to be."""

_NEAREST = 5
_COMPARED = 300
"""Labelled photos that others are compared with to find out which are unlike all of them."""

_ENOUGH = 20
"""From so many sure photos on, the random sample alone says how many are wrong, and a class by itself."""


@dataclass(frozen=True)
class Batch:
    """Suggestions of one class that are sure enough to be accepted together."""

    code: int
    rows: tuple[int, ...]
    wrong: int
    of: int
    drawn: bool

    def to_json(self) -> dict[str, object]:
        """Plain JSON types."""
        error = None
        if self.of:
            low, high = clopper_pearson(self.wrong, self.of)
            seen = "was wrong" if self.wrong == 1 else "were wrong"
            text = (
                f"Of {self.of} labelled photos that were suggested as surely without knowing their label, "
                f"{self.wrong or 'none'} {seen}: {percent(Interval(self.wrong / self.of, low, high))}."
            )
            if not self.drawn:
                text += " Most were labelled because they were in doubt, so in this batch fewer should be wrong."
            error = {"wrong": self.wrong, "of": self.of, "low": low, "high": high, "text": text}
        return {
            "class": self.code,
            "count": len(self.rows),
            "rows": list(self.rows),
            "least": round(100 * SURE),
            "error": error,
        }


@dataclass(frozen=True)
class Suggestions:
    """Of every photo, by row.

    Attributes
    ----------
    suggested : (n,) classes, or "none of these"; -1 for photos without an embedding.
    probability : (n,) 0 to 1.
    worth : rows without a label, most worth labelling first.
    batches : by class.
    reason : why there are no suggestions; "" where there are.
    """

    suggested: Index
    probability: NDArray[np.float32]
    worth: tuple[int, ...]
    batches: tuple[Batch, ...] = ()
    reason: str = ""


def suggest(
    unit: NDArray[np.float32],
    photos: Index,
    codes: Index,
    unlike: NDArray[np.bool_],
    drawn: Sequence[int],
    sample: Index,
) -> Suggestions:
    """Suggest a class for every photo.

    Parameters
    ----------
    unit : (m, d) embeddings of unit length.
    photos : (m,) the photo of each.
    codes : (n,) what each photo is called, as of :mod:`featx.studio.journal`.
    unlike : (n,) photos that are unlike all that are labelled; no batch has them.
    drawn : (n,) all photos in a random order.
    sample : photos from its beginning that are labelled.
    """
    total = len(codes)
    nothing = np.full(total, -1), np.zeros(total, np.float32)
    mine = codes[photos]
    taught = mine >= 0
    if (mine == NONE_OF_THESE).sum() >= _OTHERS:
        taught |= mine == NONE_OF_THESE  # what else there is in the folder is suggested, too
    labelled = np.flatnonzero(taught)
    classes, y = np.unique(mine[labelled], return_inverse=True)
    has_embedding = np.zeros(total, bool)
    has_embedding[photos] = True
    waiting = [row for row in drawn if codes[row] == NOTHING and has_embedding[row]]
    if (classes >= 0).sum() < 2:
        reason = "Label a few photos of each of two classes, and suggestions appear."
        return Suggestions(*nothing, tuple(waiting), reason=reason)
    head = InstantRidge.fit(unit[labelled], y, len(classes))
    probabilities = head.probabilities(unit)
    suggested, probability = nothing
    suggested[photos] = classes[probabilities.argmax(axis=1)]
    probability[photos] = probabilities.max(axis=1)
    lag = int((codes != NOTHING).sum()) - _EVERY * len(sample)
    worth = _worth(unit, photos, margins(probabilities), codes, waiting, lag)
    sure = probability >= SURE
    held = head.held_out.max(axis=1) >= SURE
    wrong = held & (head.held_out.argmax(axis=1) != y)
    of_sample = held & np.isin(photos[labelled], sample)
    drawn_ones = int(of_sample.sum()) >= _ENOUGH
    counted = of_sample if drawn_ones else held
    batches = []
    for place, code in enumerate(classes.tolist()):
        rows = np.flatnonzero((codes == NOTHING) & sure & ~unlike & (suggested == code))
        own = counted & (head.held_out.argmax(axis=1) == place)
        seen = own if own.sum() >= _ENOUGH else counted
        if len(rows):
            rows = rows[np.argsort(-probability[rows], kind="stable")]
            tally = int((wrong & seen).sum()), int(seen.sum())
            batches.append(Batch(code, tuple(rows.tolist()), *tally, drawn_ones))
    return Suggestions(suggested, probability, worth, tuple(batches))


def _worth(
    unit: NDArray[np.float32],
    photos: Index,
    margin: NDArray[np.float64],
    codes: Index,
    drawn: list[int],
    lag: int,
) -> tuple[int, ...]:
    """Rows without a label: those in doubt, the first of them unlike each other, and between them the random sample.

    ``lag`` is by how many photos more than one in :data:`_EVERY` are of the sample the others are ahead.
    """
    places = np.flatnonzero(codes[photos] == NOTHING)
    order = places[np.argsort(margin[places], kind="stable")]
    if len(places) > _DIVERSE:
        doubtful = order[: PRESELECT * _DIVERSE]
        first = doubtful[choose_next(unit[doubtful], margin[doubtful], _DIVERSE)]
        order = np.concatenate([first, order[~np.isin(order, first)]])
    out: dict[int, None] = {}
    sample = iter(drawn)
    for row in photos[order].tolist():
        if lag >= 0:
            out.setdefault(next(sample))  # there is one: as many are in the sample's order as in this one
            lag -= _EVERY - 1
        out.setdefault(row)
        lag += 1
    return tuple(out)


def unlike_labelled(unit: NDArray[np.float32], photos: Index, codes: Index, sample: Index) -> NDArray[np.bool_]:
    """Photos (n,) that are unlike all that are labelled: less like them than 95 % of the random sample are.

    Only the sample can say how alike photos of the folder are: those that were labelled because they were in doubt lie
    between the classes, where many are, and would have ten per cent of the folder called unlike.
    """
    out = np.zeros(len(codes), bool)
    mine = codes[photos]
    labelled = np.flatnonzero(mine >= 0)
    own = np.flatnonzero((mine >= 0) & np.isin(photos, sample))
    if len(own) < 1 / MAX_UNKNOWN - 1:
        return out
    if len(labelled) > _COMPARED:
        labelled = labelled[np.linspace(0, len(labelled) - 1, _COMPARED).astype(int)]
    known = unit[labelled]
    cosines = unit @ known.T
    cosines[labelled, np.arange(len(labelled))] = -1.0  # none vouches for itself
    similarity = nearest_mean(cosines, min(_NEAREST, len(labelled) - 1))
    out[photos] = is_unknown(shares_among(np.sort(similarity[own]), similarity), MAX_UNKNOWN)
    out[photos[mine >= 0]] = False
    return out
