"""The manifest: what is published in a store, and how it was made. ``featx/guide/store-format.md`` has the format.

A store may hold the embeddings of several backbones, each with its own provenance. The first one is the store's own:
its layers go by their bare names, and its fingerprint is the store's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any, TypeGuard
from urllib.parse import quote as quote_name

from featx._arrays import PENULTIMATE, PIXELS
from featx._files import publish_bytes, read_regular, seal, sha256_json, unseal
from featx.errors import MismatchError, StoreError, did_you_mean, made_by_newer
from featx.store.hdf5 import RESTORE, is_sealed

FORMAT = "featx-store"
FORMAT_VERSION = 2
FINGERPRINTED = ("backbone", "weights_sha256", "layers", "views", "preprocess", "decode", "precision")
"""Fields of the provenance that change the numbers."""

FINGERPRINTED_IF_THERE = ("code_sha256", "quantised_sha256")
"""Fields that only some stores have: of networks that are the user's own, and of those that run quantised."""

_SHARD_NAME = re.compile(r"[0-9]{5,9}-[0-9a-f]{8}\.h5")
_HEX = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 16 * 2**20
_MAX_VALUES = 2**18
"""Enough for a hundred million images, or a hundred thousand classes; what is larger costs memory just to parse."""


@dataclass(frozen=True)
class Block:
    """The columns that one layer of one backbone has."""

    backbone: str
    layer: str


@dataclass(frozen=True)
class Shard:
    """One immutable file of embeddings, as the manifest lists it.

    Attributes
    ----------
    blocks : layers of each backbone whose embeddings the file has.
    dropped : likewise, of backbones that were taken out of the store since.
    hashed : whether it has the perceptual hashes of its images.
    version : of the format that it was written in; 1 has its layers without the name of their backbone.
    """

    name: str
    rows: int
    sha256: str
    blocks: Mapping[str, tuple[str, ...]]
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hashed: bool = False
    version: int = 2

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        about: dict[str, Any] = {"name": self.name, "rows": self.rows, "sha256": self.sha256}
        if self.version > 1:
            about |= {"backbones": list(self.blocks), "phash": self.hashed}
            if self.dropped:
                about["dropped"] = {name: list(layers) for name, layers in self.dropped.items()}
        return about

    def column(self, block: Block) -> str:
        """Name of the dataset with the embeddings of a block."""
        return f"embeddings/{block.layer}" if self.version == 1 else column_of(block)

    def columns(self) -> dict[str, str]:
        """All datasets of the file with their kinds, as :func:`featx.store.hdf5.open_checked` takes them."""
        held = [*self.blocks.items(), *self.dropped.items()]
        columns = {self.column(Block(name, layer)): "float32 matrix" for name, layers in held for layer in layers}
        hashes = {"phash": "uint8 matrix"} if self.hashed else {}
        return {**columns, "digests": "uint8 matrix", **hashes}


def column_of(block: Block) -> str:
    """Name of the dataset with the embeddings of a block, in version 2 of the format."""
    return f"embeddings/{quote_name(block.backbone, safe=':,+@ ')}/{quote_name(block.layer, safe=':,+@ ')}"


@dataclass(frozen=True)
class Manifest:
    """The published state of a store.

    Attributes
    ----------
    backbones : the provenance of each backbone, the store's own first.
    unfinished : names of backbones that may still lack embeddings of images.
    quarantine : the sha256 of the list of refused images (two while it is being replaced, the later one last).
    """

    backbones: tuple[Mapping[str, Any], ...]
    shards: tuple[Shard, ...] = ()
    in_flux: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    splits: Mapping[str, int] | None = None
    counts: Mapping[str, int] | None = None
    source: str = ""
    quarantine: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()

    @property
    def provenance(self) -> Mapping[str, Any]:
        """How the embeddings of the store's own backbone were made."""
        return self.backbones[0]

    @property
    def fingerprint(self) -> str:
        """Hash of what changes the numbers of the store's own backbone."""
        return fingerprint(self.provenance)

    @property
    def names(self) -> frozenset[str]:
        """Every shard file that may exist."""
        return frozenset([*(shard.name for shard in self.shards), *self.in_flux])

    @property
    def finished(self) -> tuple[Mapping[str, Any], ...]:
        """The provenance of each backbone that has an embedding of every image."""
        return tuple(each for each in self.backbones if name_of(each) not in self.unfinished)

    def of(self, backbone: str) -> tuple[Shard, ...]:
        """The shards with embeddings of a backbone."""
        return tuple(shard for shard in self.shards if backbone in shard.blocks)

    def to_json(self) -> dict[str, Any]:
        """All fields but the checksum."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "provenance": dict(self.provenance),
            "fingerprint": self.fingerprint,
            "more": [{"provenance": dict(each), "fingerprint": fingerprint(each)} for each in self.backbones[1:]],
            "unfinished": list(self.unfinished),
            "shards": [shard.to_json() for shard in self.shards],
            "in_flux": list(self.in_flux),
            "class_names": list(self.class_names),
            "splits": dict(self.splits or {}),
            "counts": dict(self.counts or {}),
            "source": self.source,
            "quarantine": list(self.quarantine),
        }


def name_of(provenance: Mapping[str, Any]) -> str:
    """Name of the backbone that a provenance is of."""
    return str(provenance.get("backbone", ""))


def backbones_of(provenance: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The provenance of each backbone: those that it has one beside the other, or itself."""
    return provenance.get("backbones", [provenance])  # type: ignore[no-any-return]


def title_of(provenance: Mapping[str, Any]) -> str:
    """Names of the backbones that a provenance is of, for people."""
    return " + ".join(map(name_of, backbones_of(provenance)))


def layers_of(provenance: Mapping[str, Any]) -> list[str]:
    """The layers of the backbone that a provenance is of; of several backbones, the blocks' names, one after another.

    Embeddings by the same backbones come in this order.
    """
    return list(blocks_of(provenance["backbones"])) if "backbones" in provenance else list(provenance["layers"])


def blocks_of(backbones: Sequence[Mapping[str, Any]]) -> dict[str, Block]:
    """The blocks of several backbones by the names that people use.

    Of one network, layers go by their own names. Of several, a penultimate layer goes by its network's name and any
    other as ``NETWORK/LAYER``. The pixels baseline is "pixels" and stands last.
    """
    networks = [each for each in backbones if name_of(each) != PIXELS] or list(backbones)
    named: dict[str, Block] = {}
    for each in networks:
        for layer in each["layers"]:
            short = name_of(each) if layer == PENULTIMATE else f"{name_of(each)}/{layer}"
            named[layer if len(networks) == 1 else short] = Block(name_of(each), layer)
    if any(name_of(each) == PIXELS for each in backbones):
        named.setdefault(PIXELS, Block(PIXELS, PENULTIMATE))
    return named


def fingerprint(provenance: Mapping[str, Any]) -> str:
    """Hex sha256 of the fields that change the numbers; of several backbones, of those of each in turn."""
    if "backbones" in provenance:
        return sha256_json([fingerprint(each) for each in provenance["backbones"]])
    fields = {name: provenance.get(name) for name in FINGERPRINTED}
    fields |= {name: provenance[name] for name in FINGERPRINTED_IF_THERE if name in provenance}
    return sha256_json(fields)


def check_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: Path, *, whose: str = "this run's") -> None:
    """MismatchError naming the first field of the fingerprint in which two provenances differ."""
    for name in FINGERPRINTED + FINGERPRINTED_IF_THERE:
        difference = _difference(name, stored.get(name), wanted.get(name))
        if difference is not None:
            field, was, now = difference
            raise MismatchError(
                f"the store was made with another {field}",
                where=where,
                expected=f"{was} (the store's)",
                found=f"{now} ({whose})",
                hint="Embeddings of the two cannot be mixed: repeat the store's setting, or choose another --out.",
            )


def check_backbones(
    stored: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]], where: Path, *, whose: str = "this run's"
) -> None:
    """MismatchError where a backbone of ``wanted`` is among the stored ones, but made otherwise."""
    known = {name_of(each): each for each in stored}
    for each in wanted:
        if name_of(each) in known:
            check_same(known[name_of(each)], each, where, whose=whose)


def _difference(name: str, stored: Any, wanted: Any) -> tuple[str, str, str] | None:
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        for key in sorted({*stored, *wanted}):
            inner = _difference(f"{name}.{key}", stored.get(key), wanted.get(key))
            if inner is not None:
                return inner
        return None
    if stored == wanted:
        return None
    return name, json.dumps(stored), json.dumps(wanted)


def write_manifest(store: Path, manifest: Manifest) -> None:
    """Publish the manifest."""
    publish_bytes(store / "manifest.json", spell_manifest(store, manifest))


def spell_manifest(store: Path, manifest: Manifest) -> bytes:
    """The manifest's bytes; StoreError where a reader would refuse them."""
    raw = seal(manifest.to_json())
    if not _reasonable(raw):
        raise StoreError(
            "too many classes or shards for one store", where=store, hint="Divide the images among several."
        )
    return raw


def _reasonable(raw: bytes) -> bool:
    """Whether parsing takes little memory, told without parsing."""
    values = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    return len(raw) <= _MAX_BYTES and values <= _MAX_VALUES and raw.isascii()


def read_manifest(store: Path) -> Manifest:
    """Read and check the manifest of a store.

    Raises
    ------
    StoreError
        There is no store, it is damaged, or of a newer version.
    """
    path = store / "manifest.json"
    raw = manifest_bytes(store)
    if not raw:
        try:
            there = store.exists()
        except OSError as error:
            raise StoreError(f"cannot be opened ({error.strerror})", where=store) from error
        if not there:
            hint = did_you_mean(store.name, _names(store.parent)) or "Make it with: featx extract FOLDER --out STORE"
            raise StoreError("no such store", where=store, hint=hint)
        hint = f"If it is a folder of images: featx extract {quote(str(store))} --out {quote(store.name + '.featx')}"
        raise StoreError("not a featx store: it has no manifest.json", where=store, hint=hint)
    return _parse(path, raw)


def _names(folder: Path) -> list[str]:
    """Of the stores in a folder, for a suggestion; none where it cannot be read."""
    try:
        near = [path for path in folder.iterdir() if path.suffix in (".featx", ".h5")]
        return [path.name for path in near if (path / "manifest.json").is_file() or is_sealed(path)]
    except OSError:
        return []


def manifest_bytes(store: Path) -> bytes:
    """What the manifest's file holds just now, b"" where there is none: two equal answers mean that nothing changed."""
    try:
        return read_regular(store / "manifest.json", _MAX_BYTES)
    except FileNotFoundError:
        return b""


def _parse(path: Path, raw: bytes) -> Manifest:
    if not _reasonable(raw):
        raise damaged(path, "it has more values than a manifest needs, or is not ASCII")
    try:
        fields = json.loads(raw)
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise damaged(path, f"its format is not {FORMAT!r}")
        check_version(path, fields.get("format_version"))
        return _parse_manifest(path, unseal(raw))
    except RecursionError as error:
        raise damaged(path, "not JSON") from error
    except ValueError as error:
        raise damaged(path, "not JSON" if isinstance(error, json.JSONDecodeError) else str(error)) from error


def check_version(path: Path, version: Any) -> None:
    """Refuse a format of the future."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise damaged(path, "it has no format_version")
    if version > FORMAT_VERSION:
        raise made_by_newer(StoreError, path, FORMAT_VERSION, version)


def _parse_manifest(path: Path, fields: dict[str, Any]) -> Manifest:
    more, shards, in_flux = fields.get("more", []), fields.get("shards"), fields.get("in_flux")
    if not isinstance(more, list) or not isinstance(shards, list):
        raise damaged(path, "shards or backbones are not lists")
    backbones = tuple(parse_backbone(path, each) for each in (fields, *more))
    layers = {name_of(each): tuple(each["layers"]) for each in backbones}
    if len(layers) < len(backbones):
        raise damaged(path, "a backbone is listed twice")
    unfinished = fields.get("unfinished", [])
    if not is_names(unfinished) or not set(unfinished) <= set(layers):
        raise damaged(path, "unfinished is not a list of its backbones")
    if not isinstance(in_flux, list) or not all(isinstance(n, str) and _SHARD_NAME.fullmatch(n) for n in in_flux):
        raise damaged(path, "in_flux is not a list of shard names")
    names = fields.get("class_names")
    if not is_names(names):
        raise damaged(path, "class_names is not a list of names")
    quarantine = fields.get("quarantine", [])  # younger than the format: stores without it are read
    if not isinstance(quarantine, list) or not all(isinstance(s, str) and _HEX.fullmatch(s) for s in quarantine):
        raise damaged(path, "quarantine is not a list of sha256")
    splits, counts, source = fields.get("splits"), fields.get("counts"), fields.get("source")
    if not isinstance(splits, dict) or not isinstance(counts, dict) or not isinstance(source, str):
        raise damaged(path, "splits, counts or source are missing")
    manifest = Manifest(
        backbones=backbones,
        shards=tuple(_parse_shard(path, shard, layers) for shard in shards),
        in_flux=tuple(in_flux),
        class_names=tuple(names),
        splits=splits,
        counts=counts,
        source=source,
        quarantine=tuple(quarantine),
        unfinished=tuple(unfinished),
    )
    if len({shard.name for shard in manifest.shards}) != len(manifest.shards):
        raise damaged(path, "a shard is listed twice")
    return manifest


def parse_backbone(path: Path, fields: Any) -> Mapping[str, Any]:
    """The provenance in an object with its fingerprint; StoreError if one is not what it must be."""
    provenance = fields.get("provenance") if isinstance(fields, dict) else None
    if not isinstance(provenance, dict) or "backbones" in provenance:
        raise damaged(path, "a provenance is missing, or is not that of one backbone")
    if not is_names(provenance.get("layers")) or not provenance["layers"]:
        raise damaged(path, "provenance.layers is not a list of names")
    if fields.get("fingerprint") != fingerprint(provenance):
        raise damaged(path, "the fingerprint does not belong to the provenance")
    return provenance


def is_names(value: Any) -> TypeGuard[list[str]]:
    """Whether a value from JSON is a list of texts."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _parse_shard(path: Path, fields: Any, layers: Mapping[str, tuple[str, ...]]) -> Shard:
    if not isinstance(fields, dict):
        raise damaged(path, "a shard is not an object")
    name, rows, sha256 = fields.get("name"), fields.get("rows"), fields.get("sha256")
    if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
        raise damaged(path, f"{name!r} is not the name of a shard")
    if not isinstance(rows, int) or isinstance(rows, bool) or not 0 < rows < 2**40:
        raise damaged(path, f"shard {name} has no sensible number of rows")
    if not isinstance(sha256, str) or not _HEX.fullmatch(sha256) or sha256[:8] != name[-11:-3]:
        raise damaged(path, f"shard {name} and its sha256 do not belong together")
    if "backbones" not in fields:
        own = next(iter(layers))
        return Shard(name, rows, sha256, {own: layers[own]}, version=1)
    held, dropped, hashed = fields["backbones"], fields.get("dropped", {}), fields.get("phash")
    sound = is_names(held) and bool(held) and set(held) <= set(layers) and len(set(held)) == len(held)
    if not sound or not isinstance(hashed, bool):
        raise damaged(path, f"shard {name} does not say what it has")
    if not isinstance(dropped, dict) or set(dropped) & set(held) or not all(map(is_names, dropped.values())):
        raise damaged(path, f"shard {name} does not say what was dropped from it")
    blocks = {each: layers[each] for each in held}
    return Shard(name, rows, sha256, blocks, {each: tuple(value) for each, value in dropped.items()}, hashed)


def damaged(path: Path, how: str) -> StoreError:
    """The error for a file that is not as featx wrote it."""
    return StoreError(f"not a valid featx file: {how}", where=path, hint=RESTORE)
