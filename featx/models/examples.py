"""The labelled images of the store that a model was fitted on: examples to show beside its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featx.errors import MismatchError, UsageError, listed
from featx.heads import unit_rows
from featx.models.bundle import Bundle
from featx.store import backbones_of, check_same, layers_of, read_features

_MOST_COMPARED = 1000
"""Images of a class that its examples are chosen from at most."""


@dataclass(frozen=True)
class Labelled:
    """Labelled images of a store, on the layer that they are best compared on.

    Parameters
    ----------
    ids, labels : (n,) of each image.
    digests : uint8 (n, 32), sha256 of the files.
    embeddings : float32 (n, d).
    place : number of the layer among those of the model's networks.
    notes : sentences about classes that only one of store and model has.
    """

    ids: NDArray[np.str_]
    labels: list[str]
    digests: NDArray[np.uint8]
    embeddings: NDArray[np.float32]
    place: int
    notes: list[str]

    def examples(self, each: int, class_names: Sequence[str]) -> list[int]:
        """Rows of images that stand for their class: ``each`` of every class, or as many as it has.

        The first of a class is the one that is most similar to all others, each further one is what those before it are
        least like a part of the class by: greedy facility location (Nemhauser, Wolsey and Fisher, "An analysis of
        approximations for maximizing submodular set functions", 1978) on cosines.
        """
        labels, chosen = np.array(self.labels), []
        for name in class_names:
            rows = np.flatnonzero(labels == name)
            rows = rows[:: max(1, -(-len(rows) // _MOST_COMPARED))]
            _, first = np.unique(self.digests[rows], axis=0, return_index=True)
            rows = rows[np.sort(first)]
            unit = unit_rows(self.embeddings[rows].astype(np.float64), "l2")
            cosines = unit @ unit.T
            covered = np.full(len(rows), -1.0)
            left = np.ones(len(rows), bool)
            for _ in range(min(each, len(rows))):
                gains = np.maximum(cosines, covered).sum(axis=1)
                best = int(np.argmax(np.where(left, gains, -np.inf)))
                covered, left[best] = np.maximum(covered, cosines[best]), False
                chosen.append(int(rows[best]))
        return chosen


def labelled_images(store: Path, bundle: Bundle) -> Labelled:
    """The labelled images of a store that was made as a model's was.

    Raises
    ------
    MismatchError
        Store and model are of different networks, weights or preprocessing, or have no class in common.
    UsageError
        The store has no labelled image.
    """
    layers = layers_of(bundle.provenance)
    of, *others = backbones_of(bundle.provenance)
    # Of a head on several layers, the one that search is best on; of several networks, the first one's.
    name = bundle.layer if bundle.layer in layers else layers[0]
    if name != bundle.layer and not others and "penultimate" in layers:
        name = "penultimate"
    features = read_features(store, layer=name if others else f"{of.get('backbone')}/{name}")
    try:
        check_same(features.provenance, of, store)
    except MismatchError as error:
        raise MismatchError(
            f"store and model do not belong together: {error.what}",
            where=store,
            expected=str(error.expected),
            found=str(error.found).replace("this run's", "the model's"),
            hint="Give the store that the model was fitted on, or fit it again.",
        ) from error
    rows = np.flatnonzero(features.labels >= 0)
    if not len(rows):
        raise UsageError("the store has no labelled image", where=store)
    labels = [features.class_names[int(label)] for label in features.labels[rows]]
    return Labelled(
        features.ids[rows], labels, features.digests[rows], features.embeddings[rows], layers.index(name),
        _class_differences(store, set(labels), bundle.class_names),
    )  # fmt: skip


def _class_differences(store: Path, stored: set[str], known: tuple[str, ...]) -> list[str]:
    strange, gone = sorted(stored - set(known)), [name for name in known if name not in stored]
    if len(gone) == len(known):
        raise MismatchError(
            "store and model have no class in common",
            where=store,
            expected=listed(known),
            found=listed(strange),
            hint="Give the store that the model was fitted on, or none.",
        )
    notes = []
    if strange:
        notes.append(f"{store} has classes that the model can never answer: {listed(strange)}. Fit it again.")
    if gone:
        notes.append(f"{store} has no images of classes that the model can answer: {listed(gone)}.")
    return notes
