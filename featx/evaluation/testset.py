"""One judgement on images that took no part in choosing, and an honest count of how often that was done.

A test set is spent by use: whoever looks at it twice has begun to choose on it. So every use is written down beside
the store, under a hash of the test images and their labels, and every report says how many there have been.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest
from threadpoolctl import threadpool_limits

from featx._files import cannot_write
from featx.errors import UsageError, plural
from featx.evaluation import stats
from featx.evaluation.labelled import LabelledRows, sites_of
from featx.heads import Head, fit_chosen, is_large
from featx.store import FeatureSet


@dataclass(frozen=True)
class Judgement:
    """Accuracy of one head, trained on everything else, on the images of one split.

    The 95 % interval is exact over images (Clopper and Pearson, 1934), and with groups over these (Student's).
    ``copies`` test images were left out because the training images have them too, and ``shared`` further ones because
    their groups are in training; ``used`` counts this use.
    """

    split: str
    head: str
    params: Mapping[str, Any]
    training_images: int
    images: int
    copies: int
    accuracy: stats.Interval
    balanced_accuracy: float
    majority_baseline: float
    used: int
    converged: bool
    shared: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if not self.shared:
            del fields["shared"]
        return {**fields, "params": dict(self.params), "accuracy": self.accuracy.to_json()}

    @property
    def sentence(self) -> str:
        """The result in words, with the number of uses."""
        times = "the first use" if self.used == 1 else f"use number {self.used}"
        warning = "" if self.used == 1 else " Choices made after an earlier look make this figure too good."
        if self.shared:
            warning += f" {plural(self.shared, 'image')} of it left out, as their groups were learnt from."
        warning += "" if self.converged else " A fit stopped before its optimum."
        return (
            f"On {plural(self.images, 'image')} of the split {self.split}, {self.head} has an accuracy of "
            f"{stats.percent(self.accuracy)}. This is {times} of this test set.{warning}"
        )


def judge(
    features: FeatureSet,
    split: str,
    head: Head,
    ledger: Path,
    *,
    random_state: int = 0,
) -> Judgement:
    """Train ``head`` on all labelled images outside ``split`` and "test", and judge it on ``split``.

    Parameters
    ----------
    head : of a catalogue, such as ``HEADS["ridge"]`` or one of :func:`featx.heads.unlabelled.heads_for`.
    ledger : file that every use is added to.

    Raises
    ------
    UsageError
        No labelled images in the split or outside it, classes that only the split has, or a ledger that featx did
        not write.
    """
    _uses(ledger)  # nobody looks at a test set where that cannot be counted
    labelled = features.labels >= 0
    inside = labelled & (features.splits == split)
    outside = labelled & (features.splits != split) & (features.splits != "test")
    for rows, what in ((inside, f"in the split {split}"), (outside, f"outside the split {split}")):
        if not rows.any():
            raise UsageError(
                f"no labelled images {what}", found=", ".join(sorted(set(features.splits.tolist()) - {""}))
            )
    both = np.flatnonzero(inside | outside)
    embeddings = head.seen(features.embeddings)
    data = LabelledRows.of(
        embeddings[both], features.labels[both], features.class_names, groups=features.copies[both],
        near_duplicates=features.near_copies_of(both), sites=sites_of(features, both),
    )  # fmt: skip
    groups, sites = data.groups, data.sites
    here = outside[both]
    copied = inside[both] & np.isin(groups, groups[here])
    together = groups if sites is None else sites
    shared = inside[both] & ~copied & np.isin(together, together[here])
    judged = ~here & ~copied & ~shared
    train, test = both[here], both[judged]
    if not len(test):
        what = "is a copy of a training image" if not shared.any() else "is of a group that training images are of"
        raise UsageError(f"every image of the split {split} {what}")
    classes, labels = np.unique(features.labels[train], return_inverse=True)
    unknown = sorted(set(features.labels[test].tolist()) - set(classes.tolist()))
    if unknown:
        raise UsageError(
            f"a class that only the split {split} has",
            found=", ".join(features.class_names[label] for label in unknown),
            hint="Give it training images, or leave it out.",
        )
    support = embeddings[train]
    with threadpool_limits(limits=None if is_large(support) else 1, user_api="blas"):
        choice, model = fit_chosen(
            head, support, labels, groups[here], random_state=[random_state, 0],
            sites=None if sites is None else sites[here],
        )  # fmt: skip
        predicted = classes[model.predict(embeddings[test])]
    truth = features.labels[test]
    right = predicted == truth
    if sites is None:
        exact = binomtest(int(right.sum()), len(test)).proportion_ci(method="exact")
        accuracy = stats.Interval(float(right.mean()), float(exact.low), float(exact.high))
    else:
        accuracy = stats.mean_over_sites(right.astype(np.float64), sites[judged])
    digest = hashlib.sha256()
    for row in np.argsort(features.ids[inside]):
        digest.update(features.digests[inside][row].tobytes() + int(features.labels[inside][row]).to_bytes(8, "little"))
    use = {"test_set": digest.hexdigest(), "split": split, "head": head.name, "accuracy": accuracy.mean}
    used = _write_down(ledger, use)
    return Judgement(
        split=split,
        head=head.name,
        params=choice.params,
        training_images=len(train),
        images=len(test),
        copies=int(copied.sum()),
        accuracy=accuracy,
        balanced_accuracy=stats.balanced_accuracy(truth, predicted),
        majority_baseline=stats.majority_baseline(truth),
        used=used,
        converged=choice.converged,
        shared=int(shared.sum()),
    )


def _uses(ledger: Path) -> list[str]:
    """The test sets of all uses that are written down; UsageError for a file that featx did not write."""
    try:
        lines = ledger.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise cannot_write(ledger, error) from error
    uses = []
    for number, line in enumerate(lines[:-1] if lines[-1] == b"" else lines, 1):
        try:
            use = json.loads(line.decode())
            uses.append(str(use["test_set"]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UsageError(
                "the uses of this test set cannot be counted",
                where=f"{ledger}, line {number}",
                expected="one JSON object a line, as featx writes them",
                found=ascii(line[:40].decode(errors="replace")),
                hint="Restore the file; if it is gone for good, move it away and count the earlier uses yourself.",
            ) from error
    return uses


def _write_down(ledger: Path, use: dict[str, Any]) -> int:
    """Add a use to the ledger; returns how many of this test set there are now."""
    line = json.dumps({**use, "time": datetime.now(UTC).isoformat(timespec="seconds")})
    try:
        with ledger.open("ab") as file:
            file.write(line.encode() + b"\n")
    except OSError as error:
        raise cannot_write(ledger, error) from error
    return _uses(ledger).count(use["test_set"])
