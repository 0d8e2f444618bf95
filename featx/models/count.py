"""How many photos of each class a pile has in truth: what a model names, put right by photos that people checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx._arrays import Index
from featx.errors import UsageError, listed, plural
from featx.evaluation import Interval, adjusted_shares, checked_share
from featx.models.bundle import Answer, Bundle

_HELPFUL = 0.3
"""Squared correlation of what is named and what is true from which on a model makes an interval narrower."""

LEAST_CHECKED = 10
"""Checked photos from which on a count is worth its name."""


@dataclass(frozen=True)
class ClassCount:
    """One class of a pile.

    Attributes
    ----------
    named : photos that the model calls so (of a label that it does not know: that it calls unknown).
    checked : checked photos that are of it; None where none were checked.
    share : of the pile that is of it.
    """

    named: int
    checked: int | None
    share: Interval

    def to_json(self, photos: int) -> dict[str, Any]:
        """Plain types; ``photos`` is the size of the pile that ``share`` is of."""
        share = self.share.to_json()
        return {
            "named": self.named,
            "checked": self.checked,
            "share": share,
            "photos": {name: value * photos for name, value in share.items()},
        }


@dataclass(frozen=True)
class Pile:
    """Photos and what a model says about them; ``refused`` could not be read and are in no count."""

    ids: Sequence[str]
    answers: Sequence[Answer]
    refused: Sequence[str] = ()

    @property
    def unknown(self) -> NDArray[np.bool_]:
        """Which photos (N,) the model calls unknown."""
        return np.array([answer.reason == "unknown" for answer in self.answers], dtype=bool)

    @property
    def unsure(self) -> int:
        """How many it is unsure of; they count as what it would call them."""
        return sum(answer.reason == "unsure" for answer in self.answers)

    def named(self, class_names: Sequence[str]) -> NDArray[np.intp]:
        """What each photo (N,) is called, unknown ones too, in 0 .. c-1."""
        place = {name: i for i, name in enumerate(class_names)}
        return np.array([place[answer.label] for answer in self.answers], dtype=np.intp)


def draw_to_check(ids: Sequence[str], n: int, random_state: int) -> list[str]:
    """Photos to check, at random and in a random order, so that the first of them are a random part, too."""
    ordered = sorted(ids)
    if n > len(ordered):
        raise UsageError("there are not so many photos", where="--draw", expected=f"up to {len(ordered)}", found=n)
    return [ordered[i] for i in np.random.default_rng(random_state).permutation(len(ordered))[:n]]


def check_rows(pile: Pile, checked: Mapping[str, str | None], where: object) -> tuple[Index, list[str]]:
    """The rows (n,) of checked photos in the pile, and their labels; those that cannot be read are left out.

    Raises
    ------
    UsageError
        A photo is not in the pile, has no label, or they are too few.
    """
    empty = [name for name, label in checked.items() if not label]
    if empty:
        raise UsageError(
            f"{plural(len(empty), 'photo')} of {len(checked)} without a label", where=where, found=listed(empty),
            hint="Label all of them: those left out may be the hard ones, and the interval would not hold. Write a "
            "name of your own where a photo is of no class.",
        )  # fmt: skip
    row = {name: i for i, name in enumerate(pile.ids)}
    lost = [name for name in checked if name not in row and name not in set(pile.refused)]
    if lost:
        raise UsageError(
            f"{plural(len(lost), 'checked photo')} not in the pile", where=where, found=listed(lost),
            hint="Paths are as featx count --draw writes them, relative to the pile.",
        )  # fmt: skip
    labels = {name: label for name, label in checked.items() if label and name in row}
    if len(labels) < LEAST_CHECKED:
        raise UsageError("too few checked photos", where=where, expected=f"at least {LEAST_CHECKED}", found=len(labels))
    return np.array([row[name] for name in labels], dtype=np.intp), list(labels.values())


def count_checked(
    pile: Pile, bundle: Bundle, rows: Index, labels: Sequence[str], *, level: float = 0.95
) -> dict[str, ClassCount]:
    """Every class of the model and every other label that was found, by checked photos.

    Parameters
    ----------
    pile, bundle : what the model says, and the model. Of a class that it hardly recognises, on images like its own that
        it had not seen, the checked photos alone tell more.
    rows, labels : (n,) of :func:`check_rows`.
    level : how often the interval of a class holds its true share.
    """
    class_names = bundle.class_names
    unknown, named = pile.unknown, pile.named(class_names)
    errors = _confusion(bundle)
    truth = np.array(labels)
    out = {}
    for name in [*class_names, *sorted(set(labels) - set(class_names))]:
        called = (named == class_names.index(name)) & ~unknown if name in class_names else unknown
        right = truth == name
        helps = errors is None or name not in class_names or _agreement(errors, class_names.index(name)) > _HELPFUL
        share = checked_share(called & helps, rows, right, level=level)
        out[name] = ClassCount(int(called.sum()), int(right.sum()), share)
    return out


def count_adjusted(pile: Pile, bundle: Bundle, *, level: float = 0.95, random_state: int = 0) -> dict[str, ClassCount]:
    """Every class of the model by how it errs on images like its own; shares are of the photos that are not unknown.

    Raises
    ------
    UsageError
        The model does not say how it errs, or calls everything unknown.
    """
    confusion = _confusion(bundle)
    if confusion is None:
        raise UsageError(
            "this model does not say how it errs", where="--checked",
            hint="Check some photos: featx count MODEL IMAGES --draw 100 --out to-check.csv",
        )  # fmt: skip
    names = bundle.class_names
    known = pile.named(names)[~pile.unknown]
    if not len(known):
        raise UsageError("the model calls every photo unknown", where="IMAGES")
    shares = adjusted_shares(known, confusion, level=level, random_state=random_state)
    counts = np.bincount(known, minlength=len(names)).tolist()
    return {name: ClassCount(n, None, share) for name, n, share in zip(names, counts, shares, strict=True)}


def _confusion(bundle: Bundle) -> NDArray[np.float64] | None:
    """How many images of each class (rows) the model called what, on images that it had not seen."""
    found = bundle.metrics.get("out_of_fold")
    if not isinstance(found, Mapping) or "confusion" not in found:
        return None
    counts, names = found["confusion"], bundle.class_names
    return np.array([[counts.get(true, {}).get(named, 0) for named in names] for true in names], dtype=np.float64)


def _agreement(confusion: NDArray[np.float64], c: int) -> float:
    """The squared correlation of being of a class and being called so."""
    total, both, of, called = confusion.sum(), confusion[c, c], confusion[c].sum(), confusion[:, c].sum()
    spread = of * (total - of) * called * (total - called)
    return float((total * both - of * called) ** 2 / spread) if spread else 0.0
