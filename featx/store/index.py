"""What the images of a store are called, and which were refused. The format is in ``featx/guide/store-format.md``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from urllib.parse import quote as quote_name

import numpy as np
from numpy.typing import NDArray

from featx._arrays import SPLITS
from featx._files import canonical_json, read_regular, sha256_json
from featx.errors import StoreError, UsageError
from featx.store import hdf5
from featx.store.hdf5 import RESTORE
from featx.store.manifest import Manifest, fingerprint

PARTS = ".parts"
"""Folder of a store in which an extraction in parts is under way: see :mod:`featx.extraction.parts`."""

_USUAL_ID = 512
_PADDED_IDS = 2**26

NAME_COLUMNS = {
    "ids": "text",
    "labels": "int64",
    "split": "text",
    "digests": "uint8 matrix",
    "class_names": "text",
}

STAMPS = "mtimes_ns"
"""The column's name: featx 0.1.0 kept modification times there, and refuses a file with any other column. It takes a
stamp for a time that has changed and reads the image again, as featx does with its times."""

FURTHER = "further"
"""The attribute that says which further columns there are, in stores with groups or metadata."""

MAX_COLUMNS = 65
"""Columns of metadata: those of a list, and when the photos were taken."""

MAX_FURTHER = 2**26
"""Bytes that groups and metadata may take; four times that in memory."""

INDEX_COLUMNS = {**NAME_COLUMNS, "sizes": "int64", STAMPS: "int64"}


@dataclass(frozen=True)
class Index:
    """What the images of a store are called: columns of equal length, sorted by id.

    ``labels`` are rows of ``class_names`` or -1; ``digests`` is uint8 (n, 32); ``sizes`` (bytes) and ``stamps``
    (:attr:`featx.images.origin.ImageRef.stamp`, -1 for what is to be read again) recognise unchanged files.
    ``groups`` has the group of each image, "" for none, and no values where no image has one; ``grouping`` is the rule
    that made them (:mod:`featx.images.grouping`) and ``group_name`` what one is, such as "camera". ``metadata`` has
    further columns by their names.
    """

    ids: Sequence[str]
    labels: NDArray[np.int64]
    split: Sequence[str]
    digests: NDArray[np.uint8]
    class_names: tuple[str, ...]
    sizes: NDArray[np.int64]
    stamps: NDArray[np.int64]
    groups: Sequence[str] = ()
    grouping: str = ""
    group_name: str = ""
    metadata: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels_as_text(self) -> list[str]:
        """The class name of each image, "" where there is none."""
        return [self.class_names[label] if label >= 0 else "" for label in self.labels.tolist()]

    def relabelled(self, labels: Mapping[str, str | None]) -> Index:
        """The same images with the labels that ``labels`` has for their ids; those it lacks keep theirs."""
        names = [labels.get(id, text or None) for id, text in zip(self.ids, self.labels_as_text, strict=True)]
        classes = tuple(sorted({name for name in names if name is not None}))
        number = {name: place for place, name in enumerate(classes)}
        codes = [-1 if name is None else number[name] for name in names]
        return replace(self, labels=np.array(codes, np.int64), class_names=classes)


def longest_id(images: int) -> int:
    """Bytes that an id may have in a store of so many images.

    Every row of the index is as wide as the longest id, on the disk and (four times that) in ``FeatureSet.ids``: among
    100,000 images one id of 4,096 bytes made an index of 9 MB one of 416 MB, and reading took 2 GB of memory.
    """
    return min(hdf5.MAX_STRING, max(_USUAL_ID, _PADDED_IDS // max(images, 1)))


def read_index(store: Path, manifest: Manifest) -> Index:
    """Read and check the index of a store; StoreError where the extraction has not finished."""
    path = store / "index.h5"
    if not path.exists():
        again = "Run the same featx extract command again"
        if (store / PARTS).is_dir():
            again = "Run the missing parts (featx extract ... --part), then featx extract ... --finish"
        raise StoreError(
            "the store has no index: its extraction has not finished",
            where=store,
            hint=f"{again}; what is there is kept.",
        )
    return _read_index(path, manifest)


def _read_index(path: Path, manifest: Manifest) -> Index:
    hdf5.check_seal(path)
    said = hdf5.read_attributes(path)
    if said.get("fingerprint", "") not in map(fingerprint, manifest.backbones):
        raise StoreError("the index of another store, made with other settings", where=path, hint=RESTORE)
    further = Further.parse(path, said)
    with hdf5.open_checked(path, {**INDEX_COLUMNS, **further.columns}) as file:
        return read_names(file, further, sizes=file.read("sizes"), stamps=file.read(STAMPS))


@dataclass(frozen=True)
class Further:
    """What a file has beside the columns of every index: groups and metadata; the JSON of the attribute ``further``."""

    grouped: bool = False
    grouping: str = ""
    group_name: str = ""
    metadata: tuple[str, ...] = ()

    @classmethod
    def of(cls, index: Index) -> Further:
        """What an index has."""
        return cls(bool(index.groups), index.grouping, index.group_name, tuple(index.metadata))

    @classmethod
    def parse(cls, path: Path, attributes: Mapping[str, str]) -> Further:
        """What a file says in its attributes; StoreError where it says it in no way that featx does."""
        if FURTHER not in attributes:
            return cls()
        try:
            said = json.loads(attributes[FURTHER])
            names = tuple(said["metadata"])
            found = cls(said["grouped"], said["grouping"], said["group_name"], names)
            sound = all(isinstance(name, str) for name in (found.grouping, found.group_name, *names))
            sound = sound and isinstance(found.grouped, bool) and all(names)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoreError("what it says of groups is not JSON of featx", where=path, hint=RESTORE) from error
        if not sound or len(set(names)) < len(names) or len(names) > MAX_COLUMNS:
            raise StoreError("what it says of groups is not what the format allows", where=path, hint=RESTORE)
        return found

    @property
    def attributes(self) -> dict[str, str]:
        """The attribute that says so; none where there is nothing to say."""
        if self == Further():
            return {}
        return {FURTHER: json.dumps({each.name: getattr(self, each.name) for each in fields(self)}, sort_keys=True)}

    @property
    def columns(self) -> dict[str, str]:
        """The columns and their kinds."""
        names = (["group"] if self.grouped else []) + [meta_column(name) for name in self.metadata]
        return dict.fromkeys(names, "text")


def meta_column(name: str) -> str:
    """Name of the dataset with a column of metadata."""
    return f"meta/{quote_name(name, safe=':,+@ ') if name != '.' else '%2E'}"  # HDF5 takes a dot for the group itself


def further_columns(index: Index) -> list[hdf5.Column]:
    """Groups and metadata, as an index and a packed file hold them.

    Raises
    ------
    UsageError
        They would make the file far larger than it is.
    """
    texts = {"group": index.groups} if index.groups else {}
    texts |= {meta_column(name): values for name, values in index.metadata.items()}
    arrays = {name: hdf5.strings(values) for name, values in texts.items()}
    sizes = {name: array.nbytes for name, array in arrays.items()}
    if sum(sizes.values()) > MAX_FURTHER or len(index.metadata) > MAX_COLUMNS:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UsageError(
            "groups and metadata take too much room", expected=f"at most {MAX_FURTHER:,} bytes",
            found=f"{sum(sizes.values()):,}, of which {sizes[largest]:,} are {largest}",
            hint="Every row is as wide as the longest value: leave out columns of long text.",
        )  # fmt: skip
    return [hdf5.Column.of(name, array) for name, array in arrays.items()]


def read_names(
    file: hdf5.CheckedFile, further: Further, *, sizes: NDArray[np.int64], stamps: NDArray[np.int64]
) -> Index:
    """The columns that name images, of an index or a packed file, checked against each other."""
    class_names = tuple(file.text("class_names"))
    ids, labels, split, digests = file.text("ids"), file.read("labels"), file.text("split"), file.read("digests")
    if len(labels) and not (labels.min() >= -1 and labels.max() < len(class_names)):
        raise StoreError("labels point outside class_names", where=file.path, hint=RESTORE)
    if digests.shape[1:] != (32,) or not set(split) <= {"", *SPLITS}:
        raise StoreError("digests or splits are not what the format allows", where=file.path, hint=RESTORE)
    raw = file.read("ids")
    # As bytes: a set of millions of strings would take half a gigabyte, and sorted ones need only their neighbours.
    if not (raw[1:] > raw[:-1]).all() and len(np.unique(raw)) < len(raw):
        raise StoreError("an id occurs twice", where=file.path, hint=RESTORE)
    texts = {name: file.text(name) for name in further.columns}
    groups = texts.pop("group", [])
    metadata = dict(zip(further.metadata, texts.values(), strict=True))
    rule, name = further.grouping, further.group_name
    return Index(ids, labels, split, digests, class_names, sizes, stamps, groups, rule, name, metadata)


def write_index(path: Path, index: Index, fingerprint: str) -> None:
    """Write an index that :func:`read_index` will take."""
    columns = [
        *name_columns(index),
        hdf5.Column.of("sizes", index.sizes.astype("<i8")),
        hdf5.Column.of(STAMPS, index.stamps.astype("<i8")),
    ]
    hdf5.write(path, columns, {"fingerprint": fingerprint, **Further.of(index).attributes}, seal=True)


def check_index(path: Path, index: Index, manifest: Manifest) -> None:
    """StoreError if a file that was just written does not read as ``index``."""
    found = _read_index(path, manifest)
    same = list(found.ids) == list(index.ids) and found.class_names == index.class_names
    same = same and list(found.split) == list(index.split)
    same = same and list(found.groups) == list(index.groups) and Further.of(found) == Further.of(index)
    same = same and all(list(found.metadata[name]) == list(values) for name, values in index.metadata.items())
    for name in ("labels", "digests", "sizes", "stamps"):
        same = same and np.array_equal(getattr(found, name), getattr(index, name))
    if not same:
        raise StoreError("the disk did not keep what was written", where=path)


def name_columns(index: Index) -> list[hdf5.Column]:
    """The columns that name images, as an index and a packed file hold them."""
    return [
        hdf5.Column.of("ids", hdf5.strings(index.ids)),
        hdf5.Column.of("labels", index.labels.astype("<i8")),
        hdf5.Column.of("split", hdf5.strings(index.split)),
        hdf5.Column.of("digests", index.digests),
        hdf5.Column.of("class_names", hdf5.strings(index.class_names)),
        *further_columns(index),
    ]


@dataclass(frozen=True)
class Refused:
    """One line of the quarantine. ``digest`` is hex, or "" where the file could not be read."""

    id: str
    digest: str
    reason: str
    message: str


def spell_quarantine(refused: Sequence[Refused]) -> bytes:
    """The quarantine's bytes."""
    lines = []
    for item in refused:
        said = asdict(item)
        lines.append(canonical_json({**said, "checksum": sha256_json(said)[:16]}))
    return b"".join(line + b"\n" for line in lines)


def quarantine_bytes(store: Path) -> bytes:
    """What the quarantine's file holds; a missing one counts as empty."""
    try:
        return read_regular(store / "quarantine.jsonl")
    except FileNotFoundError:
        return b""


def read_quarantine(store: Path, manifest: Manifest) -> list[Refused]:
    """The images that the last extraction refused.

    Raises
    ------
    StoreError
        A line was changed, or lines came or went: the sum is none that the manifest has.
    """
    path = store / "quarantine.jsonl"
    raw = quarantine_bytes(store)

    def altered(how: str) -> StoreError:
        hint = "The same featx extract command writes it anew; embeddings are not concerned."
        return StoreError(f"the list of refused images was altered: {how}", where=path, hint=hint)

    try:
        rows = [json.loads(line) for line in raw.splitlines()]
        refused = [Refused(row["id"], row["digest"], row["reason"], row["message"]) for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise altered("a line is not what featx wrote") from error
    if spell_quarantine(refused) != raw:
        raise altered("its checksum does not match")
    if manifest.quarantine and hashlib.sha256(raw).hexdigest() not in manifest.quarantine:
        raise altered("its sha256 is not the manifest's")
    return refused
