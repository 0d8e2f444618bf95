"""The manifest: what is published in a store, and how it was made. ``featx/guide/store-format.md`` has the format."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from featx._files import canonical_json, publish_bytes, read_regular, seal, unseal
from featx.errors import MismatchError, StoreError, did_you_mean
from featx.store.hdf5 import RESTORE, is_sealed

FORMAT = "featx-store"
FORMAT_VERSION = 1
FINGERPRINTED = ("backbone", "weights_sha256", "layers", "views", "preprocess", "decode", "precision")
"""Fields of the provenance that change the numbers."""

FINGERPRINTED_IF_THERE = ("code_sha256",)
"""Fields that only some stores have: those of networks that are the user's own."""

_SHARD_NAME = re.compile(r"[0-9]{5,9}-[0-9a-f]{8}\.h5")
_HEX = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 4 * 2**20
_MAX_VALUES = 2**17
"""Enough for a hundred million images, or a hundred thousand classes; what is larger costs memory just to parse."""


@dataclass(frozen=True)
class Shard:
    """One immutable file of embeddings, as the manifest lists it."""

    name: str
    rows: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"name": self.name, "rows": self.rows, "sha256": self.sha256}


@dataclass(frozen=True)
class Manifest:
    """The published state of a store.

    ``quarantine`` holds the sha256 of the list of refused images (two while it is being replaced, the later one last).
    """

    provenance: Mapping[str, Any]
    shards: tuple[Shard, ...] = ()
    in_flux: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    splits: Mapping[str, int] | None = None
    counts: Mapping[str, int] | None = None
    source: str = ""
    quarantine: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Hash of what changes the numbers."""
        return fingerprint(self.provenance)

    @property
    def names(self) -> frozenset[str]:
        """Every shard file that may exist."""
        return frozenset([*(shard.name for shard in self.shards), *self.in_flux])

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers whose embeddings are kept."""
        return tuple(self.provenance["layers"])

    def to_json(self) -> dict[str, Any]:
        """All fields but the checksum."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "provenance": dict(self.provenance),
            "fingerprint": self.fingerprint,
            "shards": [shard.to_json() for shard in self.shards],
            "in_flux": list(self.in_flux),
            "class_names": list(self.class_names),
            "splits": dict(self.splits or {}),
            "counts": dict(self.counts or {}),
            "source": self.source,
            "quarantine": list(self.quarantine),
        }


def fingerprint(provenance: Mapping[str, Any]) -> str:
    """Hex sha256 of the fields that change the numbers."""
    fields = {name: provenance.get(name) for name in FINGERPRINTED}
    fields |= {name: provenance[name] for name in FINGERPRINTED_IF_THERE if name in provenance}
    return hashlib.sha256(canonical_json(fields)).hexdigest()


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
            raise StoreError(f"cannot be looked at ({error.strerror})", where=store) from error
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
        raise StoreError(
            "made by a newer featx",
            where=path,
            expected=f"format_version up to {FORMAT_VERSION}",
            found=version,
            hint="Update featx: pip install -U featx",
        )


def _parse_manifest(path: Path, fields: dict[str, Any]) -> Manifest:
    provenance, shards, in_flux = fields.get("provenance"), fields.get("shards"), fields.get("in_flux")
    if not isinstance(provenance, dict) or not isinstance(shards, list):
        raise damaged(path, "provenance or shards are missing")
    layers = provenance.get("layers")
    if not isinstance(layers, list) or not layers or not all(isinstance(name, str) for name in layers):
        raise damaged(path, "provenance.layers is not a list of names")
    if not isinstance(in_flux, list) or not all(isinstance(n, str) and _SHARD_NAME.fullmatch(n) for n in in_flux):
        raise damaged(path, "in_flux is not a list of shard names")
    names = fields.get("class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise damaged(path, "class_names is not a list of names")
    quarantine = fields.get("quarantine", [])  # younger than the format: stores without it are read
    if not isinstance(quarantine, list) or not all(isinstance(s, str) and _HEX.fullmatch(s) for s in quarantine):
        raise damaged(path, "quarantine is not a list of sha256")
    splits, counts, source = fields.get("splits"), fields.get("counts"), fields.get("source")
    if not isinstance(splits, dict) or not isinstance(counts, dict) or not isinstance(source, str):
        raise damaged(path, "splits, counts or source are missing")
    manifest = Manifest(
        provenance=provenance,
        shards=tuple(_parse_shard(path, shard) for shard in shards),
        in_flux=tuple(in_flux),
        class_names=tuple(names),
        splits=splits,
        counts=counts,
        source=source,
        quarantine=tuple(quarantine),
    )
    if len({shard.name for shard in manifest.shards}) != len(manifest.shards):
        raise damaged(path, "a shard is listed twice")
    if fields.get("fingerprint") != manifest.fingerprint:
        raise damaged(path, "the fingerprint does not belong to the provenance")
    return manifest


def _parse_shard(path: Path, fields: Any) -> Shard:
    if not isinstance(fields, dict):
        raise damaged(path, "a shard is not an object")
    name, rows, sha256 = fields.get("name"), fields.get("rows"), fields.get("sha256")
    if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
        raise damaged(path, f"{name!r} is not the name of a shard")
    if not isinstance(rows, int) or isinstance(rows, bool) or not 0 < rows < 2**40:
        raise damaged(path, f"shard {name} has no sensible number of rows")
    if not isinstance(sha256, str) or not _HEX.fullmatch(sha256) or sha256[:8] != name[-11:-3]:
        raise damaged(path, f"shard {name} and its sha256 do not belong together")
    return Shard(name, rows, sha256)


def damaged(path: Path, how: str) -> StoreError:
    """The error for a file that is not as featx wrote it."""
    return StoreError(f"not a sound featx file: {how}", where=path, hint=RESTORE)
