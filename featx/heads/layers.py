"""Several blocks of features, side by side: layers of one network, or of several; each by itself, or all in one head.

Early layers see texture and colour, late ones the objects that the network was trained on; and networks differ in what
they see. Which suits a domain has to be measured. The embeddings of all blocks are brought to unit length, weighted and
concatenated. Several networks are *joined* in equal parts: that helps on most images, most with few labels
(``featx guide benchmarks``). The layers of one network are *combined*: early ones share a part of the squared length
(:data:`SHARES`). Where the support has enough images, another weighting (a share for the early layers, or one network
alone) is taken if cross-validated log-loss finds it clearly better: the first one names a held-out image wrongly, and
the other is better by more than one standard error. A linear head on such rows is a linear head on embeddings, so it
is kept, served and exported as any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from featx._arrays import COMBINED, JOINED, PENULTIMATE, PIXELS
from featx.errors import UsageError, did_you_mean, plural
from featx.heads.catalogue import Catalogue, Head
from featx.heads.scorer import BlocksKind, blocks_kind
from featx.store import FeatureReader, FeatureSet, fingerprint, steady

SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)
"""What the other layers than the reference may have together of the squared length, in equal parts."""

COMBINED_SHOTS = 5
"""Different images of the smallest class from which a weighting is chosen; below, the first one is taken."""


_NAMED = 3
"""Images that a note names."""


def _is_penultimate(name: str) -> bool:
    return name.rpartition("/")[2] == PENULTIMATE


@dataclass(frozen=True)
class Layers:
    """The columns of embeddings that several blocks have side by side.

    Parameters
    ----------
    sizes : number of columns of each block, in their order.
    networks : the backbone of each block; by default all are layers of one.
    """

    sizes: Mapping[str, int]
    networks: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of the columns."""
        return tuple(self.sizes)

    @cached_property
    def references(self) -> tuple[str, ...]:
        """Of each network, the block that others have to improve on: its penultimate layer, or else the last."""
        own: dict[str, list[str]] = {}
        for name in self.names:
            own.setdefault(self.networks.get(name, ""), []).append(name)
        return tuple(next(filter(_is_penultimate, names), names[-1]) for names in own.values())

    @property
    def reference(self) -> str:
        """The block that stands for all where one has to: the reference of the first network."""
        return self.references[0]

    @property
    def whole(self) -> str:
        """What all blocks together are called."""
        return JOINED if len(self.references) > 1 else COMBINED

    def columns(self, name: str) -> tuple[int, int]:
        """First column of a block, and the one after its last; of all for ``whole``.

        Raises
        ------
        UsageError
            There is no such block.
        """
        widths = list(self.sizes.values())
        if name == self.whole and name not in self.sizes:
            return 0, sum(widths)
        if name not in self.sizes:
            known = [*self.names, self.whole]
            raise UsageError(
                f"no layer {name!r} in this store", found=", ".join(self.names), hint=did_you_mean(name, known) or None
            )
        place = self.names.index(name)
        return sum(widths[:place]), sum(widths[: place + 1])

    def kinds(self) -> tuple[BlocksKind, ...]:
        """The normalisers of a head on all blocks: the references in equal parts first, then what may do better."""
        others = [name for name in self.names if name not in self.references]
        weights = [self._weights(self.references, others, share) for share in (SHARES if others else SHARES[:1])]
        if len(self.references) > 1:
            weights += [self._weights((name,), (), 0.0) for name in self.references]
        return tuple(blocks_kind([(self.sizes[name], each[name]) for name in self.names]) for each in weights)

    @property
    def default_kind(self) -> str:
        """The normaliser where none is chosen: unit length, of several blocks that of the first of :meth:`kinds`."""
        return "l2" if len(self.names) == 1 else self.kinds()[0]

    def _weights(self, references: Sequence[str], others: Sequence[str], share: float) -> dict[str, float]:
        """The length that each block gets: of the squared length, the ``others`` have this share together."""
        squares = dict.fromkeys(self.names, 0.0)
        squares |= dict.fromkeys(references, (1.0 - share) / len(references))
        squares |= dict.fromkeys(others, share / max(len(others), 1))
        return {name: float(np.sqrt(each)) for name, each in squares.items()}

    def on(self, head: Head, name: str) -> Head:
        """The head on one block, or on all (``whole``), where it chooses their weights as its normaliser."""
        placed = replace(head, layer=name, columns=self.columns(name))
        if name in self.sizes:
            return placed
        return replace(placed, kinds=self.kinds(), mean=None, kind_shots=COMBINED_SHOTS, kind_margin=1.0)

    def heads(self, catalogue: Catalogue, names: Sequence[str] | None, on: Sequence[str] | None) -> dict[str, Head]:
        """What to compare, by name: ``HEAD@BLOCK``, or the head's own name where there is one block.

        Parameters
        ----------
        names : heads, each on each block. By default all heads on the first one below, and the recommended one on the
            others.
        on : blocks, of which ``whole`` may be one; by default all of them, and the whole. The first one is the whole
            of several networks, or the reference of one, or whatever is named first.
        """
        on = tuple(dict.fromkeys(on or (*self.names, *((self.whole,) if len(self.sizes) > 1 else ()))))
        usual = self.whole if len(self.references) > 1 else self.reference
        first = usual if usual in on else on[0]
        out = {}
        for layer in sorted(on, key=lambda name: name != first):
            wanted = names if names is not None else (catalogue if layer == first else ("auto",))
            for head in (self.on(catalogue[name], layer) for name in wanted):
                named = head if len(on) == 1 else replace(head, name=f"{head.name}@{layer}")
                out[named.name] = named
        return out


def read_layers(
    path: str | Path | Sequence[str | Path],
    names: Sequence[str] | None = None,
    *,
    max_images: int | None = None,
    random_state: int = 0,
) -> tuple[FeatureSet, Layers]:
    """Read several blocks of features, side by side.

    Parameters
    ----------
    path : a store, or a packed one, or several of them (:class:`Blocks`).
    names : the blocks; all networks' by default.
    max_images, random_state : as of :func:`featx.store.reader.read_features`.

    Returns
    -------
    The features, of the layer ``whole`` (or the only one), and which columns are whose.

    Raises
    ------
    StoreError, UsageError
        See :func:`featx.store.reader.read_features`.
    """
    paths = paths_of(path)

    def read() -> tuple[FeatureSet, Layers]:
        blocks = Blocks(paths)
        return blocks.read(names or blocks.networks, max_images=max_images, random_state=random_state)

    return steady(paths, read)


class Blocks:
    """The blocks of one store, or of several whose images are matched by content.

    Parameters
    ----------
    paths : of the stores. The first one says what images are called, and has their labels and splits.

    Attributes
    ----------
    networks : the names of the blocks that networks made, in their order: as the store calls them, or of several
        stores ``STORE`` or ``STORE/BLOCK``.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._readers = [FeatureReader(path) for path in paths]
        self._places: dict[str, tuple[int, str]] = {}
        for number, (path, reader) in enumerate(zip(paths, self._readers, strict=True)):
            stem = path.name.removesuffix(".featx").removesuffix(".h5")
            for own in reader.networks:
                name = own if len(paths) == 1 else stem if len(reader.networks) == 1 else f"{stem}/{own}"
                if name in self._places:
                    raise UsageError("two stores of one name", where=path, found=name, hint="Rename one of them.")
                self._places[name] = number, own
        self.networks = tuple(self._places)

    @property
    def notes(self) -> list[str]:
        """Sentences on images that not all stores have, which are left out."""
        notes = []
        first = self._readers[0]
        for reader in self._readers[1:]:
            for here, there in ((first, reader), (reader, first)):
                gone = np.flatnonzero(there.find(here.index.digests) < 0)
                if len(gone):
                    named = ", ".join(here.index.ids[row] for row in gone[:_NAMED].tolist())
                    more = ", ..." if len(gone) > _NAMED else ""
                    notes.append(f"{there.path} lacks {plural(len(gone), 'image')} of {here.path} ({named}{more}).")
        return notes

    def layers(self, names: Sequence[str]) -> Layers:
        """The columns of some blocks, side by side."""
        sizes, networks = {}, {}
        for name in names:
            number, own = self._place(name)
            sizes[name] = self._readers[number].dims(own)
            networks[name] = f"{number}/{self._readers[number].block(own).backbone}"
        return Layers(sizes, networks)

    def _place(self, name: str) -> tuple[int, str]:
        """The number of a block's store, and the block's name in it."""
        return self._places.get(name, (0, name))

    def read(
        self, names: Sequence[str], *, max_images: int | None = None, random_state: int = 0
    ) -> tuple[FeatureSet, Layers]:
        """Some blocks of the images that all stores have; see :func:`read_layers`."""
        first, *others = self._readers
        rows = [first.pick(max_images=max_images, random_state=random_state)]
        for reader in others:
            found = reader.find(first.index.digests[rows[0]])
            rows = [*(each[found >= 0] for each in rows), found[found >= 0]]
        if not len(rows[0]):
            raise UsageError("these stores have no image in common", where=first.path, found=others[-1].path)
        places = [self._place(name) for name in names]
        parts = [self._readers[number].read(rows[number], layer=own) for number, own in places]
        made = {
            (number, backbone): self._readers[number].backbones[backbone]
            for number, backbone in ((number, self._readers[number].block(own).backbone) for number, own in places)
        }
        layers, provenance = self.layers(names), next(iter(made.values()))
        if len(made) > 1:
            provenance = {"backbones": list(made.values())}
        features = replace(
            first.features(rows[0], ()),
            embeddings=parts[0] if len(parts) == 1 else np.hstack(parts),
            layer=self._readers[places[0][0]].block(places[0][1]).layer if len(names) == 1 else layers.whole,
            provenance=provenance,
            fingerprint=fingerprint(provenance),
        )
        for reader, picked in zip(others, rows[1:], strict=True):
            if features.hashes is None or features.pixels is None:
                features = replace(features, hashes=reader.read_hashes(picked), pixels=reader.read_pixels(picked))
        return features, layers


def open_layers(
    path: str | Path | Sequence[str | Path],
    asked: str | None,
    *,
    one: bool = False,
    max_images: int | None = None,
    random_state: int = 0,
) -> tuple[FeatureSet, Layers, list[str]]:
    """Read what ``--layers`` names.

    Parameters
    ----------
    path : a store, or a packed one, or several of them.
    asked : names separated by commas, of which ``whole`` may be one; "all" and None are all of them, and the whole
        where there are several.
    one : whether None is the reference block alone.
    max_images, random_state : as of :func:`featx.store.reader.read_features`.

    Returns
    -------
    Features, columns, and the blocks to compare.

    Raises
    ------
    StoreError, UsageError
        The store cannot be read, or has no such block.
    """
    paths = paths_of(path)

    def plan() -> tuple[tuple[str, ...], Layers]:
        blocks = Blocks(paths)
        return blocks.networks, blocks.layers(blocks.networks)

    stored, every = steady(paths, plan)
    known = [*stored, every.whole] if len(stored) > 1 else [*stored]
    if asked is None or asked.strip() == "all":
        wanted = [every.reference] if one and asked is None else known
    else:
        wanted = list(dict.fromkeys(name.strip() for name in asked.split(",") if name.strip()))
    for name in wanted or [""]:
        if name not in known and name != PIXELS:
            raise UsageError(
                f"no layer {name!r} in this store", where=paths[0], expected=f"some of {', '.join(known)}, or all",
                hint=did_you_mean(name, known) or None,
            )  # fmt: skip
    names = stored if every.whole in wanted and every.whole not in stored else wanted
    features, layers = read_layers(path, names, max_images=max_images, random_state=random_state)
    return features, layers, wanted


def paths_of(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """One path or several, as a list."""
    return [Path(path)] if isinstance(path, str | Path) else [Path(each) for each in path]


def left_out(path: str | Path | Sequence[str | Path]) -> list[str]:
    """Sentences on images that not all of several stores have."""
    paths = paths_of(path)
    return steady(paths, lambda: Blocks(paths).notes)
