"""What several people say of the same photos: the label to learn from, where they disagree, and how well they agree.

Agreement is Cohen's kappa (1960) of each two people over the photos that both have labelled: 1 is full agreement, 0 is
what chance would give with as many labels of each class by each. Its interval has the standard error of Fleiss, Cohen
and Everitt (1969); where two people never disagree, or always do, that is zero and says nothing, and the limit is what
the share of the other kind would give that may well not occur among so many photos (Clopper and Pearson).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal, TypeAlias

import numpy as np

from featx._files import csv_text
from featx.evaluation import Interval, unseen_share
from featx.models.corrections import Correction

Rule: TypeAlias = Literal["majority", "unanimous"]
"""Which label a photo has: the one that more people say than any other, or the one that all say; else none."""

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Voted:
    """A photo with what people say of it.

    Attributes
    ----------
    said : the last word of each person, in the order in which they came.
    label : what follows from it, or None.
    """

    sha256: str
    file: str
    said: tuple[Correction, ...]
    label: str | None

    @property
    def disputed(self) -> bool:
        """Whether not all say the same."""
        return len({each.label for each in self.said}) > 1

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        votes = [{"by": each.by, "label": each.label, "when": each.when} for each in self.said]
        return {"image": self.sha256, "file": self.file, "label": self.label, "said": votes}


def vote(latest: Iterable[Correction], rule: Rule = "majority") -> list[Voted]:
    """Each photo with its label, in the order in which photos came.

    Parameters
    ----------
    latest : the last word of each person on each photo.
    rule : which label follows.
    """
    said: dict[str, list[Correction]] = defaultdict(list)
    for each in latest:
        said[each.sha256].append(each)
    return [Voted(sha256, words[0].file, tuple(words), _label(words, rule)) for sha256, words in said.items()]


def export_csv(voted: Iterable[Voted]) -> bytes:
    """A list that ``featx extract`` takes: ``path`` (in the feedback folder), ``label``, ``by`` and ``when``.

    Photos on which people disagree have no label.
    """
    rows = []
    for each in voted:
        people = ", ".join(dict.fromkeys(word.by for word in each.said if word.by))
        when = max(word.when for word in each.said)
        rows.append({"path": f"images/{each.file}", "label": each.label or "", "by": people, "when": when})
    return csv_text(("path", "label", "by", "when"), rows).encode()


def _label(said: Sequence[Correction], rule: Rule) -> str | None:
    (first, most), *others = Counter(each.label for each in said).most_common()
    if others and (rule == "unanimous" or others[0][1] == most):
        return None
    return first


@dataclass(frozen=True)
class Agreement:
    """How well two people agree on the photos that both have labelled."""

    a: str
    b: str
    images: int
    agreed: int
    kappa: Interval

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def agreements(voted: Iterable[Voted]) -> list[Agreement]:
    """The agreement of each two people who have labelled two photos or more in common."""
    pairs: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for photo in voted:
        words = sorted(photo.said, key=lambda each: each.by)
        for one, other in combinations(words, 2):
            pairs[one.by, other.by].append((one.label, other.label))
    return [
        Agreement(a, b, len(labels), sum(one == other for one, other in labels), cohens_kappa(labels))
        for (a, b), labels in sorted(pairs.items())
        if len(labels) > 1
    ]


def cohens_kappa(labels: Sequence[tuple[str, str]]) -> Interval:
    """Cohen's kappa of two people's labels (n pairs) with its 95 % interval, within -1 and 1.

    Where both use one and the same class only, chance agrees fully: kappa is 1, and the interval is -1 to 1.
    """
    names = sorted({name for pair in labels for name in pair})
    number = {name: place for place, name in enumerate(names)}
    table = np.zeros((len(names), len(names)))
    for one, other in labels:
        table[number[one], number[other]] += 1
    n = len(labels)
    table /= n
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    observed, expected = float(np.trace(table)), float(rows @ columns)
    if expected >= 1.0:
        return Interval(1.0, -1.0, 1.0)
    kappa = (observed - expected) / (1 - expected)
    if observed in (0.0, 1.0):
        limit = (abs(observed - unseen_share(n)) - expected) / (1 - expected)
        low, high = min(kappa, limit), max(kappa, limit)
    else:
        # Fleiss, Cohen and Everitt, Psychological Bulletin 72 (1969), equation 13.
        both = rows[None, :] + columns[:, None]  # of cell i, j: how often the first says j, and the second i
        same = np.diag(table) * (1 - (rows + columns) * (1 - kappa)) ** 2
        off = (table * both**2).sum() - (np.diag(table) * (rows + columns) ** 2).sum()
        spread = same.sum() + (1 - kappa) ** 2 * off - (kappa - expected * (1 - kappa)) ** 2
        margin = _Z95 * math.sqrt(max(float(spread), 0.0) / n) / (1 - expected)
        low, high = kappa - margin, kappa + margin
    return Interval(kappa, max(low, -1.0), min(high, 1.0))
