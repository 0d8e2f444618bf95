"""Several layers of one network, side by side: each by itself, or all of them combined in one head.

Early layers see texture and colour, late ones the objects that the network was trained on; which suits a domain has
to be measured. *Combined* means that the embeddings of all layers are brought to unit length, weighted and
concatenated. Early layers share a part of the squared length (:data:`SHARES`) that is chosen inside the support by
cross-validated log-loss: none of it, that is the reference layer alone, unless that names a held-out image wrongly and
another share is better by more than one standard error. A linear head on such rows is a linear head on embeddings, so
it is kept, served and exported as any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from featx._arrays import COMBINED, PENULTIMATE
from featx.errors import UsageError, did_you_mean
from featx.heads.catalogue import Catalogue, Head
from featx.heads.scorer import BlocksKind, blocks_kind
from featx.store import FeatureReader, FeatureSet, read_features

SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)
"""What the other layers than the reference may have together of the squared length, in equal parts."""

COMBINED_SHOTS = 5
"""Different images of the smallest class from which a share is chosen; below, the reference layer is taken alone."""


@dataclass(frozen=True)
class Layers:
    """The columns of embeddings that several layers have side by side.

    Parameters
    ----------
    sizes : number of columns of each layer, in their order.
    """

    sizes: Mapping[str, int]

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of the columns."""
        return tuple(self.sizes)

    @property
    def reference(self) -> str:
        """The layer that the others have to improve on: the penultimate one, or where that is missing the last."""
        return PENULTIMATE if PENULTIMATE in self.sizes else self.names[-1]

    def columns(self, name: str) -> tuple[int, int]:
        """First column of a layer, and the one after its last; of all for :data:`COMBINED`.

        Raises
        ------
        UsageError
            There is no such layer.
        """
        widths = list(self.sizes.values())
        if name == COMBINED and name not in self.sizes:
            return 0, sum(widths)
        if name not in self.sizes:
            known = [*self.names, COMBINED]
            raise UsageError(
                f"no layer {name!r} in this store", found=", ".join(self.names), hint=did_you_mean(name, known) or None
            )
        place = self.names.index(name)
        return sum(widths[:place]), sum(widths[: place + 1])

    def kinds(self) -> tuple[BlocksKind, ...]:
        """The normalisers of a combined head, the reference layer alone first."""
        others = len(self.sizes) - 1
        return tuple(
            blocks_kind(
                [
                    (size, float(np.sqrt(1.0 - share if name == self.reference else share / others)))
                    for name, size in self.sizes.items()
                ]
            )
            for share in (SHARES if others else SHARES[:1])
        )

    def on(self, head: Head, name: str) -> Head:
        """The head on one layer, or on all (:data:`COMBINED`), where it chooses their weights as its normaliser."""
        placed = replace(head, layer=name, columns=self.columns(name))
        if name in self.sizes:
            return placed
        return replace(placed, kinds=self.kinds(), mean=None, kind_shots=COMBINED_SHOTS, kind_margin=1.0)

    def heads(self, catalogue: Catalogue, names: Sequence[str] | None, on: Sequence[str] | None) -> dict[str, Head]:
        """What to compare, by name: ``HEAD@LAYER``, or the head's own name where there is one layer.

        Parameters
        ----------
        names : heads, each on each layer. By default all heads on the reference layer (or the first that is named),
            and the recommended one on the others.
        on : layers, of which :data:`COMBINED` may be one; by default all of them, and combined.
        """
        on = tuple(dict.fromkeys(on or (*self.names, *((COMBINED,) if len(self.sizes) > 1 else ()))))
        first = self.reference if self.reference in on else on[0]
        out = {}
        for layer in sorted(on, key=lambda name: name != first):
            wanted = names if names is not None else (catalogue if layer == first else ("auto",))
            for head in (self.on(catalogue[name], layer) for name in wanted):
                named = head if len(on) == 1 else replace(head, name=f"{head.name}@{layer}")
                out[named.name] = named
        return out


def read_layers(
    path: str | Path, names: Sequence[str] | None = None, *, max_images: int | None = None, random_state: int = 0
) -> tuple[FeatureSet, Layers]:
    """Read several layers of a store, side by side.

    Parameters
    ----------
    path : a store, or a packed one.
    names : the layers; all by default.
    max_images, random_state : as of :func:`featx.store.reader.read_features`.

    Returns
    -------
    The features, of the layer :data:`COMBINED` (or the only one), and which columns are whose.

    Raises
    ------
    StoreError, UsageError
        See :func:`featx.store.reader.read_features`.
    """
    wanted = tuple(names) if names is not None else stored_layers(path)
    parts = [read_features(path, layer=name, max_images=max_images, random_state=random_state) for name in wanted]
    first = parts[0]
    for other in parts[1:]:
        if other.fingerprint != first.fingerprint or not np.array_equal(other.digests, first.digests):
            raise UsageError("the store changed while it was read", where=path, hint="Read it again.")
    layers = Layers({part.layer: part.embeddings.shape[1] for part in parts})
    if len(parts) == 1:
        return first, layers
    return replace(first, embeddings=np.hstack([part.embeddings for part in parts]), layer=COMBINED), layers


def open_layers(
    path: str | Path, asked: str | None, *, one: bool = False, max_images: int | None = None, random_state: int = 0
) -> tuple[FeatureSet, Layers, list[str]]:
    """Read what ``--layers`` names.

    Parameters
    ----------
    path : a store, or a packed one.
    asked : names separated by commas, of which :data:`COMBINED` may be one; "all" and None are all of them, and
        combined where there are several.
    one : whether None is the reference layer alone.
    max_images, random_state : as of :func:`featx.store.reader.read_features`.

    Returns
    -------
    Features, columns, and the layers to compare.

    Raises
    ------
    StoreError, UsageError
        The store cannot be read, or has no such layer.
    """
    stored = stored_layers(path)
    known = [*stored, COMBINED] if len(stored) > 1 else [*stored]
    if asked is None or asked.strip() == "all":
        reference = Layers(dict.fromkeys(stored, 0)).reference
        wanted = [reference] if one and asked is None else known
    else:
        wanted = list(dict.fromkeys(name.strip() for name in asked.split(",") if name.strip()))
    for name in wanted or [""]:
        if name not in known:
            raise UsageError(
                f"no layer {name!r} in this store", where=path, expected=f"some of {', '.join(known)}, or all",
                hint=did_you_mean(name, known) or None,
            )  # fmt: skip
    names = stored if COMBINED in wanted and COMBINED not in stored else wanted
    features, layers = read_layers(path, names, max_images=max_images, random_state=random_state)
    return features, layers, wanted


def stored_layers(path: str | Path) -> tuple[str, ...]:
    """The names of a store's layers, in their order."""
    return tuple(FeatureReader(path).provenance["layers"])
