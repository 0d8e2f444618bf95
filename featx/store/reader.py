"""The store of embeddings: the wall between pixels and arrays.

The format is written down, with MUST and MAY, in ``featx/guide/store-format.md`` (``featx guide store-format``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from featx._arrays import NEAR, PIXELS, SPLITS
from featx._files import signature
from featx.errors import StoreError, UsageError, did_you_mean, plural
from featx.images import HASH_BYTES, THUMBNAIL_SIDE
from featx.store import frames, hdf5
from featx.store.hdf5 import RESTORE
from featx.store.index import NAME_COLUMNS, Further, read_index, read_names
from featx.store.manifest import (
    Block,
    backbones_of,
    blocks_of,
    check_version,
    column_of,
    damaged,
    fingerprint,
    manifest_bytes,
    name_of,
    parse_backbone,
    read_manifest,
)
from featx.store.shards import ShardReader, digest_keys, read_rows, width_of

if TYPE_CHECKING:
    import anndata
    import pandas

PACKED_FORMAT = "featx-packed"
T = TypeVar("T")

_RETRIES = 20
_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Pictures:
    """What tells copies of an image from other images, whatever network embeds them.

    Attributes
    ----------
    hashes : (n, 32) array of uint8, perceptual hashes.
    pixels : (n, p) array of uint8, thumbnails.
    """

    hashes: NDArray[np.uint8]
    pixels: NDArray[np.uint8]

    def some(self, rows: NDArray[np.intp]) -> Pictures:
        """Those of some of the images."""
        return Pictures(self.hashes[rows], self.pixels[rows])


Alike: TypeAlias = float | Pictures | None
"""What makes near copies of images: how their pictures look, a cosine from which on, or nothing does."""


@dataclass(frozen=True)
class FeatureSet:
    """Embeddings with all that they are worth knowing by, one row an image, sorted by id.

    Parameters
    ----------
    embeddings : float32 (n, embedding_dim).
    ids : str (n,).
    labels : int64 (n,), rows of ``class_names``; -1 is unlabelled.
    class_names : the names of the classes.
    splits : str (n,): "train", "val", "test" or "".
    digests : uint8 (n, 32), sha256 of the image files.
    layer : the layer that the embeddings are of.
    provenance : how they were made; of several backbones side by side, ``{"backbones": [...]}`` with one for each.
    fingerprint : hash of what of the provenance changes the numbers.
    hashes : uint8 (n, 32), perceptual hashes of the images; None where the store has none.
    pixels : uint8 (n, p), thumbnails of the images; None where the store has none.
    groups : str (n,): images with the same one belong together (a patient, a site, a burst); "" for none.
    group_name : what one group is, such as "camera".
    metadata : str (n,) by name: further columns of the list that the images were named by.
    """

    embeddings: NDArray[np.float32]
    ids: NDArray[np.str_]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    splits: NDArray[np.str_]
    digests: NDArray[np.uint8]
    layer: str
    provenance: Mapping[str, Any]
    fingerprint: str
    hashes: NDArray[np.uint8] | None = None
    pixels: NDArray[np.uint8] | None = None
    groups: NDArray[np.str_] = field(default_factory=lambda: np.empty(0, dtype=np.str_))
    group_name: str = ""
    metadata: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.groups) != len(self.ids):
            if len(self.groups):
                raise UsageError("groups and ids do not fit", expected=len(self.ids), found=len(self.groups))
            object.__setattr__(self, "groups", np.full(len(self.ids), "", dtype=np.str_))

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        counted = f"{plural(len(self), 'image')} x {self.embeddings.shape[1]}"
        return f"FeatureSet({counted}, {plural(len(self.class_names), 'class')}, layer {self.layer!r})"

    @property
    def copies(self) -> NDArray[np.intp]:
        """Dense numbers (n,): equal for equal bytes."""
        return np.unique(self.digests, axis=0, return_inverse=True)[1].reshape(-1)

    @property
    def near_copies(self) -> Alike:
        """What makes near copies of these images: their pictures, or in stores without hashes a cosine.

        Random weights find every image like every other, so their cosine tells nothing; it is None then.
        """
        if self.hashes is not None and self.pixels is not None:
            return Pictures(self.hashes, self.pixels)
        return None if any(each.get("weights") == "none" for each in backbones_of(self.provenance)) else NEAR

    def some(self, rows: NDArray[np.intp]) -> FeatureSet:
        """Some of the images, in this order."""
        arrays: dict[str, Any] = {name: each[rows] for name, each in vars(self).items() if isinstance(each, np.ndarray)}
        return replace(self, **arrays, metadata={name: values[rows] for name, values in self.metadata.items()})

    def near_copies_of(self, rows: NDArray[np.intp]) -> Alike:
        """The same of some of the images."""
        every = self.near_copies
        return every.some(rows) if isinstance(every, Pictures) else every

    def to_numpy(self) -> dict[str, NDArray[Any]]:
        """Plain arrays by name, which ``numpy.savez`` keeps and ``numpy.load`` reads without pickle."""
        return {
            "embeddings": self.embeddings,
            "ids": self.ids,
            "labels": self.labels,
            "class_names": np.array(self.class_names, dtype=np.str_),
            "splits": self.splits,
            "digests": self.digests,
            **({"groups": self.groups} if (self.groups != "").any() else {}),
            **{f"meta/{name}": values for name, values in self.metadata.items()},
        }

    def to_pandas(self) -> pandas.DataFrame:
        """A frame with the ids as its index: label, split, digest, and ``e0``, ``e1``, ... of the embedding.

        Raises
        ------
        UsageError
            pandas is not installed (the extra ``frames``).
        """
        return frames.to_pandas(self)

    def to_anndata(self) -> anndata.AnnData:
        """An AnnData with the embeddings as ``X`` and label, split and digest in ``obs``.

        Raises
        ------
        UsageError
            anndata is not installed (the extra ``frames``).
        """
        return frames.to_anndata(self)


def is_packed(path: Path) -> bool:
    """Whether ``path`` is a file (a packed store) and not a folder."""
    return path.is_file()


# --- reading ------------------------------------------------------------------------------------------------------


def read_features(
    path: str | Path,
    *,
    layer: str = "penultimate",
    splits: Sequence[str] | None = None,
    max_images: int | None = None,
    random_state: int = 0,
) -> FeatureSet:
    """Read the embeddings of a store (or of a packed store) with their ids, labels and provenance.

    Every shard is compared with its checksum first, so altered numbers are never returned.

    Parameters
    ----------
    layer : which layer's embeddings.
    splits : only the images of these splits.
    max_images : at most so many, drawn by ``random_state`` with the shares that classes and splits have; a class has
        one at least. Only the shards that they lie in are read.

    Raises
    ------
    StoreError
        No store there, or it is damaged, foreign, unfinished, or of a newer version.
    UsageError
        The store has no such layer, or there is no such split.
    """
    if splits is not None and (isinstance(splits, str) or not set(splits) <= set(SPLITS)):
        raise UsageError("no such split", where="splits", expected="a list of train, val, test", found=splits)

    def read() -> FeatureSet:
        reader = FeatureReader(path)
        rows = reader.pick(splits=splits, max_images=max_images, random_state=random_state)
        return reader.features(rows, [layer])

    return steady(Path(path), read)


def steady(store: Path | Sequence[Path], read: Callable[[], T]) -> T:
    """Read again where a writer published, or a prune replaced shards, between two steps of the reading."""
    stores = [store] if isinstance(store, Path) else list(store)
    for _ in range(_RETRIES):
        before = [_state(each) for each in stores]
        try:
            return read()
        except StoreError:
            if [_state(each) for each in stores] == before:
                raise  # nothing moved: it is what the error says
    raise StoreError("changes faster than it can be read", where=stores[0], hint="Read it when the writer is done.")


def source_of(path: Path) -> str:
    """The folder or manifest that a store was made from; "" for a packed store, which does not keep it."""
    return "" if path.is_file() else read_manifest(path).source


def _state(store: Path) -> bytes:
    return b"" if store.is_file() else manifest_bytes(store)


def draw_rows(labels: NDArray[np.int64], splits: Sequence[str], n: int, random_state: int) -> NDArray[np.int64]:
    """About ``n`` rows, ascending, drawn at random from every class in every split in proportion, one at least."""
    if n < 1:
        raise UsageError("must be 1 or more", where="max_images", found=n)
    codes = {name: code for code, name in enumerate(("", *SPLITS))}
    key = labels * len(codes) + np.fromiter((codes[name] for name in splits), np.int64, len(splits))
    groups = np.unique(key, return_inverse=True)[1].reshape(-1)
    # By a random order in which each row stands at its quantile in its group: the first n are in proportion.
    order = np.random.default_rng(random_state).permutation(len(groups))
    order = order[np.argsort(groups[order], kind="stable")]
    sizes = np.bincount(groups)
    place = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    quantile = np.where(place == 0, 0.0, (place + 0.5) / np.repeat(sizes, sizes))
    kept = np.argsort(quantile, kind="stable")[: max(n, len(sizes))]
    return np.sort(order[kept])


def stored_backbones(path: Path) -> dict[str, Mapping[str, Any]]:
    """The provenance of each backbone of a store by its name, its own first; none where there is no store yet."""
    if not (path / "manifest.json").is_file():
        return {}
    return {name_of(each): each for each in read_manifest(path).backbones}


def iter_features(
    path: str | Path, *, layer: str = "penultimate", block_rows: int = _BLOCK_ROWS
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Stream embeddings in the order of the index, for stores larger than memory.

    Yields
    ------
    The slice of index rows, and their embeddings, float32 (at most ``block_rows``, d).
    """
    yield from FeatureReader(path).stream(layer, block_rows)


class FeatureReader:
    """Random access to the rows of a store or a packed store, by their place in the index.

    No file stays open between calls, so a reader may be used after a fork and sent to other processes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._shards: dict[str, ShardReader] | None = None
        if self.path.is_file():
            self._open_packed()
        else:
            steady(self.path, self._open_store)

    def _open_packed(self) -> None:
        self._state = signature(self.path)
        self._seal = hdf5.check_seal(self.path)
        said = hdf5.read_attributes(self.path)
        if said.get("format") != PACKED_FORMAT:
            raise damaged(self.path, f"its format is not {PACKED_FORMAT!r}")
        try:
            version = json.loads(said["format_version"])
            check_version(self.path, version)
            listed = [{"provenance": json.loads(said["provenance"]), "fingerprint": said["fingerprint"]}]
            if version > 1:
                listed += json.loads(said["more"])
            backbones = [parse_backbone(self.path, each) for each in listed]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise damaged(self.path, "attributes are missing, or are not JSON") from error
        self._know(backbones)
        if len(self.backbones) < len(backbones):
            raise damaged(self.path, "a backbone is listed twice")
        held = [Block(name, layer) for name, each in self.backbones.items() for layer in each["layers"]]
        # The layers of version 1 go without the name of the one backbone that there is.
        self._columns = {block: f"embeddings/{block.layer}" if version == 1 else column_of(block) for block in held}
        further = Further.parse(self.path, said)
        self._expected = {**NAME_COLUMNS, **further.columns, **dict.fromkeys(self._columns.values(), "float32 matrix")}
        if version > 1 and said.get("phash") == "true":
            self._expected["phash"] = "uint8 matrix"
        with hdf5.open_checked(self.path, self._expected) as file:
            unknown = np.full(file.rows, -1, dtype=np.int64)
            self.index = read_names(file, further, sizes=unknown, stamps=unknown)
            if "phash" in file.columns and width_of(file, "phash") != HASH_BYTES:
                raise StoreError(f"phash are not {HASH_BYTES} bytes", where=self.path)

    def _open_store(self) -> None:
        manifest = read_manifest(self.path)
        self.index = read_index(self.path, manifest)
        finished = manifest.finished
        if not finished:
            raise StoreError(
                "the extraction has not finished", where=self.path, hint="Run the same featx extract command again."
            )
        self._know(finished)
        self._shards = {}
        self._rows = {}
        for name in self.backbones:
            shards = ShardReader(self.path, manifest, name)
            rows = shards.find(self.index.digests)
            shards.forget_contents()
            lost = np.flatnonzero(rows < 0)
            if len(lost):
                shards.check_sums()
                missing = self.index.ids[int(lost[0])]
                raise StoreError(
                    "the index names an image that no shard has", where=self.path / "index.h5", found=missing,
                    hint=RESTORE,
                )  # fmt: skip
            self._shards[name], self._rows[name] = shards, rows

    def _know(self, backbones: Sequence[Mapping[str, Any]]) -> None:
        self.backbones = {name_of(each): each for each in backbones}
        self.provenance: Mapping[str, Any] = backbones[0]
        self.blocks = blocks_of(backbones)

    @contextmanager
    def _packed(self) -> Iterator[hdf5.CheckedFile]:
        if signature(self.path) != self._state and hdf5.check_seal(self.path) != self._seal:
            raise StoreError("the file was replaced while it was read", where=self.path, hint="Open it again.")
        with hdf5.open_checked(self.path, self._expected) as file:
            yield file

    @property
    def networks(self) -> tuple[str, ...]:
        """The names of the blocks that networks made; those of the pixels baseline where there is no network."""
        names = tuple(name for name, block in self.blocks.items() if block.backbone != PIXELS)
        return names or tuple(self.blocks)[:1]

    def pick(
        self, *, splits: Sequence[str] | None = None, max_images: int | None = None, random_state: int = 0
    ) -> NDArray[np.intp]:
        """Rows of the index, ascending, of some splits, and at most so many; as of :func:`read_features`."""
        index = self.index
        rows = np.flatnonzero(np.ones(len(index), bool) if splits is None else np.isin(index.split, list(splits)))
        if max_images is not None and max_images < len(rows):
            drawn = draw_rows(index.labels[rows], [index.split[row] for row in rows.tolist()], max_images, random_state)
            rows = rows[drawn]
        return rows

    def find(self, digests: NDArray[np.uint8]) -> NDArray[np.intp]:
        """The first row (n,) of the index with each of these contents (n, 32); -1 where there is none."""
        keys, first = np.unique(digest_keys(self.index.digests), return_index=True)
        wanted = digest_keys(digests)
        at = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
        return np.where(keys[at] == wanted, first[at], -1) if len(keys) else np.full(len(wanted), -1)

    def block(self, layer: str) -> Block:
        """Whose embeddings a name stands for.

        Parameters
        ----------
        layer : a name of ``blocks``, ``BACKBONE/LAYER``, or a layer of the store's own backbone.

        Raises
        ------
        UsageError
            There is nothing of this name.
        """
        if layer in self.blocks:
            return self.blocks[layer]
        held = {f"{name}/{each}": Block(name, each) for name, of in self.backbones.items() for each in of["layers"]}
        own = {each: Block(name_of(self.provenance), each) for each in self.provenance["layers"]}
        known = {**own, **held}
        if layer not in known:
            raise UsageError(
                f"no layer {layer!r} in this store",
                where=self.path,
                found=", ".join(self.blocks),
                hint=did_you_mean(layer, [*self.blocks, *known]),
            )
        return known[layer]

    def read(self, rows: NDArray[np.integer[Any]], *, layer: str = "penultimate") -> NDArray[np.float32]:
        """Embeddings of index rows, float32 (len(rows), d), in the order asked for; ``layer`` as of :meth:`block`."""
        block = self.block(layer)
        if self._shards is not None:
            return self._shards[block.backbone].read(self._rows[block.backbone][rows], layer=block.layer)
        with self._packed() as file:
            column = self._columns[block]
            out = np.empty((len(rows), width_of(file, column)), np.float32)
            read_rows(file, column, np.asarray(rows, np.int64), out)
        return out

    def stream(self, layer: str, block_rows: int = _BLOCK_ROWS) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """The embeddings of all rows in the order of the index, some at a time; ``layer`` as of :meth:`block`."""
        for start in range(0, len(self.index), block_rows):
            rows = slice(start, min(start + block_rows, len(self.index)))
            yield rows, self.read(np.arange(rows.start, rows.stop), layer=layer)

    def read_hashes(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.uint8] | None:
        """Perceptual hashes of index rows, uint8 (len(rows), 32); None where the store has not one of each image."""
        if self._shards is not None:
            for name, shards in self._shards.items():
                if shards.hashed:
                    return shards.read_hashes(self._rows[name][rows])
            return None
        if "phash" not in self._expected:
            return None
        out = np.empty((len(rows), HASH_BYTES), np.uint8)
        with self._packed() as file:
            read_rows(file, "phash", np.asarray(rows, np.int64), out)
        return out

    def read_pixels(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.uint8] | None:
        """Thumbnails of index rows, uint8 (len(rows), p); None where the store has none."""
        if PIXELS not in self.backbones:
            return None
        if self.dims(PIXELS) not in (0, 3 * THUMBNAIL_SIDE**2):
            side = f"{THUMBNAIL_SIDE} x {THUMBNAIL_SIDE}"
            raise StoreError(f"the pixels baseline is not of {side} pixels", where=self.path)
        parts = [
            np.rint(self.read(rows[start : start + _BLOCK_ROWS], layer=PIXELS) * 255).astype(np.uint8)
            for start in range(0, max(len(rows), 1), _BLOCK_ROWS)
        ]
        return np.concatenate(parts)

    def features(self, rows: NDArray[np.intp], layers: Sequence[str]) -> FeatureSet:
        """Index rows with all that they are worth knowing by.

        Parameters
        ----------
        rows : rows of the index, ascending.
        layers : as of :meth:`block`; the embeddings of several stand side by side, those of none have no columns.
        """
        index, picked = self.index, rows.tolist()
        parts = [np.empty((len(rows), 0), np.float32), *(self.read(rows, layer=layer) for layer in layers)]
        made = list(dict.fromkeys(self.block(layer).backbone for layer in layers)) or [name_of(self.provenance)]
        provenance = self.backbones[made[0]]
        if len(made) > 1:
            provenance = {"backbones": [self.backbones[name] for name in made]}
        return FeatureSet(
            embeddings=parts[1] if len(parts) == 2 else np.hstack(parts),
            ids=np.array([index.ids[row] for row in picked], dtype=np.str_),
            labels=index.labels[rows],
            class_names=index.class_names,
            splits=np.array([index.split[row] for row in picked], dtype=np.str_),
            digests=index.digests[rows],
            layer=self.block(layers[0]).layer if len(layers) == 1 else "",
            provenance=provenance,
            fingerprint=fingerprint(provenance),
            hashes=self.read_hashes(rows),
            pixels=self.read_pixels(rows),
            groups=np.array([index.groups[row] for row in picked] if index.groups else [""] * len(picked), np.str_),
            group_name=index.group_name,
            metadata={
                name: np.array([values[row] for row in picked], dtype=np.str_)
                for name, values in index.metadata.items()
            },
        )

    def dims(self, layer: str) -> int:
        """Length of a layer's embeddings; 0 for a store that has none yet."""
        block = self.block(layer)
        if self._shards is not None:
            return self._shards[block.backbone].dims(block.layer)
        with self._packed() as file:
            return width_of(file, self._columns[block])
