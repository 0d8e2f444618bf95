"""A fitted head with all it takes to trust it, in one file that is data, not code.

Format, version 3
-----------------
One ZIP file, so any unzip opens it, and readers of safetensors in any language its arrays
(``safetensors.numpy.load(zipfile.ZipFile(path).read("arrays.safetensors"))["coef"]``). MUST and MAY are meant as in
RFC 2119.

- Members are stored, not compressed: ``bundle.json`` (UTF-8, at most 16 MiB), ``probe.png``, ``arrays.safetensors``
  and, where the network was fine-tuned, ``tail.safetensors`` with its trained part (:mod:`featx.backbones.cut`). A
  network's graph is ``network-<sha256>.ir`` (:mod:`featx.backbones.engines.graph`): one that was quantised on the
  machine of whoever made the model, whose sha256 is in the provenance, or one at full precision, whose sha256 is in
  ``networks`` of ``bundle.json``, by the name of its backbone. There MUST be no other member.
- The arrays are ``mean, scale``; ``coef, intercept`` of a linear head; ``rows, targets`` of a nearest-neighbour head;
  ``golden, golden_scores, probe_embedding``; ``own_rows, own_similarity`` where the model calls photos unknown;
  ``conformity``, and perhaps ``conformity_weights``, where it can answer with sets. A nearest-neighbour head MAY have
  an ``intercept``, which is added to its scores. There MUST be no other array. ``targets`` is int64, ``golden`` and
  ``probe_embedding`` are float32, ``own_rows`` is float16, all others float64.
- The ZIP's comment is ``sha256=<64 hex digits>``, of every byte of the file before it. A reader MUST compare it first.
- ``bundle.json``: ``format`` ("featx-bundle"), ``format_version`` (a reader MUST refuse a greater one), ``head``,
  ``params``, ``kind`` of normaliser, ``n_neighbors``, ``class_names``, ``layer`` ("combined": all of the provenance's,
  side by side in their order; ``kind`` then names the columns and weight of each), ``provenance`` (as a store's:
  backbone, weights sha256, preprocessing, ...), ``sharpness`` (what scores are multiplied by before the softmax, or
  null where they could not be calibrated), ``threshold`` (of the score below which to abstain, or null: always
  abstain), ``max_error``, ``max_unknown`` (0: nothing is called unknown; null: the model is from before there was
  unknown), ``prior`` (the share of each class that ``intercept`` and ``threshold`` are for, by name, or null: as they
  were labelled; it may be missing), ``metrics``, ``versions``, ``notes``.
- ``own_rows`` (m, d) are own images at unit length (several layers each, weighted as by ``kind``), ``own_similarity``
  (n,), ascending, the mean cosine of own images to the five most similar others of these rows. ``familiarity`` of a
  photo is (1 + how many of the n are not above its own mean cosine) / (n + 1); up to ``max_unknown`` it is unknown.
- ``conformity`` (n,), ascending, are the scores of the true labels of images left out (:mod:`featx.models.sets`):
  labels whose score is not above the limit for a coverage are in the set. ``conformity_weights`` (n + 1,) say how much
  each counts, and last how much a new image may.
- ``golden`` float32 (m, d) are vectors and ``golden_scores`` float64 (m, c) the probabilities (margins to the best
  class where ``sharpness`` is null) that this head gave them; a reader MUST find the same within 1e-6. ``probe.png``
  is an image and ``probe_embedding`` float32 (d,) what its backbone made of it; who embeds images MUST find the same
  within what the engines promise.

Versions 1 and 2, of featx 0.1 and 0.2, have each array as a member ``<name>.npy``; 1 has no ``tail.safetensors``. They
have no ``max_unknown`` and call nothing unknown. They are read for ever, and written no more.

The checksum finds damage and careless edits. It is no signature: whoever can write the file can write the checksum too,
and a forged head can give any answer. It cannot run anything.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import struct
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from featx._arrays import COMBINED, JOINED
from featx._files import publish_bytes, read_regular
from featx.backbones import check_network
from featx.errors import BundleError, FeatxError, StoreError, UsageError, made_by_newer
from featx.heads import Array, Scorer, is_kind, margins, softmax
from featx.models.novelty import Familiarity, is_unknown
from featx.models.sets import Conformity, among_known, check_coverage, label_sets
from featx.store import backbones_of, layers_of

FORMAT, FORMAT_VERSION = "featx-bundle", 3
GOLDEN_TOLERANCE = 1e-6
_UNIT = 1.001
"""Most that the length of a unit row, and so a cosine, may be in half precision."""

_ARRAYS_MEMBER, _TAIL_MEMBER = "arrays.safetensors", "tail.safetensors"
_MAX_BYTES = 2**31
_MAX_JSON = 2**24
_COMMENT = b"sha256="
_TAIL = len(_COMMENT) + 64
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(<[fi][48])', 'fortran_order': False, 'shape': \(([0-9, ]{2,60})\), \} *\n",
    re.DOTALL,
)
_UNSOUND = (
    ValueError, KeyError, TypeError, OverflowError, struct.error, EOFError, zipfile.BadZipFile,
    NotImplementedError,  # zipfile's own, for a ZIP of a version or compression that it cannot read: a foreign file
    RecursionError,  # JSON that is nested without end
    safetensors.SafetensorError,
)  # fmt: skip
_NETWORK = re.compile(r"network-([0-9a-f]{64})\.ir")
_ENCRYPTED = 0x1
"""The flag of a ZIP member that only a password opens."""

_AGAIN = "Copy it again, or make it again with: featx fit STORE --out MODEL"
_ARRAYS = {
    "mean": ("f8", 1),
    "scale": ("f8", 1),
    "coef": ("f8", 2),
    "intercept": ("f8", 1),
    "rows": ("f8", 2),
    "targets": ("i8", 1),
    "golden": ("f4", 2),
    "golden_scores": ("f8", 2),
    "probe_embedding": ("f4", 1),
    "own_rows": ("f2", 2),
    "own_similarity": ("f8", 1),
    "conformity": ("f8", 1),
    "conformity_weights": ("f8", 1),
}
"""Type and number of dimensions of each array that may be in a bundle."""


@dataclass(frozen=True)
class Answer:
    """What a head says about one embedding.

    ``score`` is the probability of the label, or its margin over the next class where the head is not calibrated;
    ``probabilities`` then has no entries. ``familiarity`` is the share of the model's own images that look at least as
    strange to it; None where it does not know. ``reason`` says why it abstains: it is "unsure" which class it is, or
    the photo is "unknown", of no class; None where it answers. ``labels`` are the set that was asked for, the most
    probable first, empty where the photo is unknown; None where none was.
    """

    label: str
    score: float
    score_kind: str
    probabilities: Mapping[str, float]
    reason: Literal["unsure", "unknown"] | None
    familiarity: float | None = None
    labels: tuple[str, ...] | None = None

    @property
    def abstain(self) -> bool:
        """Whether the label is not to be relied on."""
        return self.reason is not None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            **({} if self.labels is None else {"set": list(self.labels)}),
            "label": self.label,
            "score": self.score,
            "score_kind": self.score_kind,
            "abstain": self.abstain,
            "reason": self.reason,
            "familiarity": self.familiarity,
            "probabilities": dict(self.probabilities),
        }


@dataclass(frozen=True)
class Bundle:
    """A fitted head; fields as in the format above."""

    scorer: Scorer
    class_names: tuple[str, ...]
    head: str
    params: Mapping[str, Any]
    layer: str
    provenance: Mapping[str, Any]
    sharpness: float | None
    threshold: float | None
    max_error: float
    golden: NDArray[np.float32]
    probe: bytes
    probe_embedding: NDArray[np.float32]
    max_unknown: float | None = None
    familiarity: Familiarity | None = field(default=None, repr=False)
    conformity: Conformity | None = field(default=None, repr=False)
    prior: Mapping[str, float] | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sha256: str = ""
    tail: bytes | None = field(default=None, repr=False)
    networks: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    graphs: Mapping[str, str] = field(default_factory=dict)

    @property
    def score_kind(self) -> str:
        """What a score is: "probability" or "margin"."""
        return "margin" if self.sharpness is None else "probability"

    def probabilities(self, embeddings: NDArray[np.floating]) -> Array:
        """Probabilities (n, c); of a head that is not calibrated, margins to the best class: (n, c), at most 0."""
        return self._judge(self.scorer.scores(embeddings))

    def _judge(self, scores: Array) -> Array:
        if self.sharpness is None:
            return np.asarray(scores - scores.max(axis=1, keepdims=True))
        return softmax(scores, self.sharpness)

    def set_limit(self, coverage: float) -> float:
        """Up to which score labels are in sets that hold the truth with this coverage, of photos that are not unknown.

        Infinite where the images are too few for it: then every set is all labels.

        Raises
        ------
        UsageError
            It is no share, or the model is from before there were sets.
        """
        check_coverage(coverage)
        if self.conformity is not None:
            return self.conformity.limit(among_known(coverage, self.max_unknown))
        if self.sharpness is not None:
            raise UsageError(
                "this model gives no sets: it was made before featx 0.3", where="--coverage",
                hint="Fit it again: featx fit STORE --out MODEL",
            )  # fmt: skip
        return math.inf

    def cautions_of_sets(self, coverage: float) -> list[str]:
        """What to know before sets of this coverage are used: that each is all labels."""
        if self.set_limit(coverage) < math.inf:
            return []
        # Rounded down, so that what is said can be asked for.
        most = 0.0 if self.conformity is None else 1 - (1 - self.conformity.highest) / (1 - (self.max_unknown or 0.0))
        offer = f" The most that they can promise is {math.floor(1000 * most) / 1000:g}." if most >= 0.001 else ""
        return [f"The model's images are too few for a coverage of {coverage:g}: every set is all classes.{offer}"]

    def answer(self, embeddings: NDArray[np.floating], coverage: float | None = None) -> list[Answer]:
        """Label, score and abstention of each embedding (n, d), and with a ``coverage`` its set of labels."""
        if embeddings.ndim != 2 or embeddings.shape[1] != self.scorer.dims:
            raise ValueError(f"expected embeddings (n, {self.scorer.dims}), got {embeddings.shape}")
        scores = self.scorer.scores(embeddings)
        judged = self._judge(scores)
        # By the scores: probabilities of a head that knows nothing are all the same.
        labels = scores.argmax(axis=1)
        best = margins(scores) if self.sharpness is None else judged[np.arange(len(labels)), labels]
        unsure = np.ones(len(labels), bool) if self.threshold is None else best < self.threshold
        unknown, shares = np.zeros(len(labels), bool), [None] * len(labels)
        if self.familiarity is not None and self.max_unknown is not None:
            found = self.familiarity.shares(embeddings)
            unknown, shares = is_unknown(found, self.max_unknown), found.tolist()
        sets = [None] * len(labels) if coverage is None else self._sets(judged, unknown, self.set_limit(coverage))
        return [
            Answer(
                label=self.class_names[label],
                score=float(score),
                score_kind=self.score_kind,
                probabilities={} if self.sharpness is None else dict(zip(self.class_names, row.tolist(), strict=True)),
                reason="unknown" if strange else "unsure" if doubtful else None,
                familiarity=share,
                labels=chosen,
            )
            for label, score, row, strange, doubtful, share, chosen in zip(
                labels.tolist(), best, judged, unknown, unsure, shares, sets, strict=True
            )
        ]

    def _sets(self, judged: Array, unknown: NDArray[np.bool_], limit: float) -> list[tuple[str, ...] | None]:
        inside = label_sets(judged, limit)
        order = np.argsort(-judged, axis=1, kind="stable").tolist()
        return [
            () if strange else tuple(self.class_names[c] for c in ranked if row[c])
            for ranked, row, strange in zip(order, inside, unknown, strict=True)
        ]

    @property
    def cautions(self) -> list[str]:
        """What to know before its answers are used, in sentences: that all abstain, or none is unknown."""
        return [
            *silence(self.threshold, self.metrics),
            *([KNOWS_NO_UNKNOWN] if self.max_unknown is None else []),
        ]

    def describe(self) -> dict[str, Any]:
        """Everything that is not an array, in plain JSON types."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "head": self.head,
            "params": dict(self.params),
            "kind": self.scorer.kind,
            "n_neighbors": self.scorer.n_neighbors,
            "class_names": list(self.class_names),
            "layer": self.layer,
            "provenance": dict(self.provenance),
            "sharpness": self.sharpness,
            "threshold": self.threshold,
            "max_error": self.max_error,
            "max_unknown": self.max_unknown,
            "prior": None if self.prior is None else dict(self.prior),
            "metrics": dict(self.metrics),
            "versions": dict(self.versions),
            "notes": list(self.notes),
            **({"networks": dict(self.graphs)} if self.graphs else {}),
        }


KNOWS_NO_UNKNOWN = (
    "This model cannot call photos unknown: it was made before featx 0.3, and names a class for photos of anything. "
    "Fit it again: featx fit STORE --out MODEL"
)


def silence(threshold: float | None, metrics: Mapping[str, Any]) -> list[str]:
    """Why every answer of a model with this threshold and these metrics abstains, in a sentence; empty if not."""
    if threshold is not None:
        return []
    least = metrics.get("smallest_max_error")
    known = isinstance(least, float) and 0 < least < 1
    again = f"--max-error {least:g} is the smallest that they can promise" if known else "--max-error"
    return [
        "Every answer of this model abstains: its images could not promise as few errors as it was to make. "
        f"Fit it again with more images, or with a larger share of errors ({again})."
    ]


# --- writing ------------------------------------------------------------------------------------------------------


def write_bundle(bundle: Bundle, path: str | Path) -> Path:
    """Publish a bundle as one file, whole or not at all; the same bundle gives the same bytes."""
    return publish_bytes(Path(path), bundle_bytes(bundle))


def bundle_bytes(bundle: Bundle) -> bytes:
    """The file's content."""
    scorer = bundle.scorer
    arrays = {
        "mean": scorer.mean, "scale": scorer.scale, "coef": scorer.coef, "intercept": scorer.intercept,
        "rows": scorer.rows, "targets": scorer.targets, "golden": bundle.golden,
        "golden_scores": bundle.probabilities(bundle.golden), "probe_embedding": bundle.probe_embedding,
        "own_rows": None if bundle.familiarity is None else bundle.familiarity.rows,
        "own_similarity": None if bundle.familiarity is None else bundle.familiarity.own,
        **({} if bundle.conformity is None else bundle.conformity.to_arrays()),
    }  # fmt: skip
    members = {
        "bundle.json": json.dumps(bundle.describe(), indent=2, sort_keys=True, allow_nan=False).encode(),
        "probe.png": bundle.probe,
        _ARRAYS_MEMBER: safetensors.numpy.save(
            {
                name: np.ascontiguousarray(array, dtype=_ARRAYS[name][0])
                for name, array in arrays.items()
                if array is not None
            }
        ),
        **({} if bundle.tail is None else {_TAIL_MEMBER: bundle.tail}),
        **{f"network-{sha256}.ir": content for sha256, content in sorted(bundle.networks.items())},
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        for member, data in members.items():
            file.writestr(zipfile.ZipInfo(member), data)
        file.comment = _COMMENT + b"0" * 64
    body = out.getvalue()[:-_TAIL]
    return body + _COMMENT + hashlib.sha256(body).hexdigest().encode()


# --- reading ------------------------------------------------------------------------------------------------------


def read_bundle(path: str | Path) -> Bundle:
    """Read a bundle, and check its hash, its shapes and its golden values. Nothing is unpickled.

    Raises
    ------
    BundleError
        No such file, foreign, damaged, altered, of a newer version, or the head does not give its golden values.
    """
    return parse_bundle(bundle_content(Path(path)), Path(path))


def bundle_content(where: Path) -> bytes:
    """A file's content, which need not be that of a bundle; BundleError where it cannot be."""
    try:
        return read_regular(where, _MAX_BYTES)
    except FileNotFoundError as error:
        hint = "Make it with: featx fit STORE --out MODEL"
        raise BundleError("no such model", where=where, hint=hint) from error
    except StoreError as error:
        what, advice = error.what, None
        if where.is_dir() and (where / "manifest.json").is_file():
            what, advice = "this is a store, not a model", "Fit a head on it first: featx fit STORE --out MODEL"
        elif where.is_dir():
            what, advice = "this is a folder, not a model", "Make one with: featx fit STORE --out MODEL"
        raise BundleError(what, where=where, expected="a file made by featx fit", hint=advice) from error


def parse_bundle(raw: bytes, where: Path) -> Bundle:
    """:func:`read_bundle` of a file's content; ``where`` is for messages."""
    claimed = raw[-_TAIL:]
    if not raw.startswith(b"PK\x03\x04") or not claimed.startswith(_COMMENT):
        raise BundleError("not a model made by featx fit", where=where, hint=_foreign(raw))
    sha256 = hashlib.sha256(memoryview(raw)[:-_TAIL]).hexdigest()
    if claimed != _COMMENT + sha256.encode():
        raise BundleError("the model was altered: its sha256 does not match", where=where, hint=_AGAIN)
    try:
        members = _members(raw)
        fields = json.loads(members.pop("bundle.json"), parse_constant=_no_number)
        # What cannot be written again (1e999, half a surrogate pair) could not be shown to anybody either.
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
        _check_version(fields, where)
        probe, tail = members.pop("probe.png"), members.pop(_TAIL_MEMBER, None)
        networks = {match[1]: members.pop(match[0]) for match in map(_NETWORK.fullmatch, list(members)) if match}
        read = _arrays if fields["format_version"] > 2 else _arrays_of_old
        arrays = read(members)
        bundle = replace(_assemble(fields, arrays, probe, sha256), tail=tail, networks=networks)
        _check_networks(bundle)
        found, expected = bundle.probabilities(bundle.golden), arrays["golden_scores"]
        if found.shape != expected.shape:
            raise ValueError("golden_scores do not fit golden")
    except FeatxError:
        raise
    except _UNSOUND as error:
        how = f"{error.args[0]} is missing" if isinstance(error, KeyError) and error.args else str(error)
        raise BundleError(f"not a valid model: {how}", where=where, hint=_AGAIN) from error
    off = float(np.abs(found - expected).max())
    if not off <= GOLDEN_TOLERANCE:
        raise BundleError(
            "the head does not give its golden values",
            where=where,
            expected=f"differences up to {GOLDEN_TOLERANCE:g}",
            found=f"{off:.3g}",
            hint=_AGAIN,
        )
    return bundle


def _check_networks(bundle: Bundle) -> None:
    several = backbones_of(bundle.provenance)
    wanted = {each.get("quantised_sha256") for each in several} | set(bundle.graphs.values())
    if not set(bundle.graphs) <= {each.get("backbone") for each in several}:
        raise ValueError("a network is of none of its backbones")
    if not set(bundle.graphs.values()) <= set(bundle.networks):
        raise ValueError("a network is missing")
    for sha256, content in bundle.networks.items():
        if sha256 not in wanted:
            raise ValueError("a network does not belong in it")
        check_network(content, sha256)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} in bundle.json")


def _foreign(raw: bytes) -> str:
    if raw[:1] == b"\x80" or raw[:2] in (b"\x78\x9c", b"\x78\x01", b"\x78\xda"):
        return "It looks like a pickle, which runs code when it is loaded. If you trust its source: --allow-pickle"
    if raw[:8] == b"\x89HDF\r\n\x1a\n":
        return "It is a packed store; fit a head on it first: featx fit STORE --out MODEL"
    return "Make one with: featx fit STORE --out MODEL"


def _check_version(fields: Any, where: Path) -> None:
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT!r}")
    version = fields.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError("it has no format_version")
    if version > FORMAT_VERSION:
        raise made_by_newer(BundleError, where, FORMAT_VERSION, version)


def _members(raw: bytes) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        infos = file.infolist()
        if len(infos) > 3 + len(_ARRAYS):  # of versions 1 and 2
            raise ValueError(f"{len(infos)} members are too many")
        for info in infos:
            name = info.filename
            if info.flag_bits & _ENCRYPTED:
                raise ValueError(f"{name!r} is encrypted")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(raw) or name in members:
                raise ValueError(f"{name!r} is compressed, too large or there twice")
            if name == "bundle.json" and info.file_size > _MAX_JSON:
                raise ValueError("bundle.json is too large")
            members[name] = file.read(info)
    return members


def _arrays(members: dict[str, bytes]) -> dict[str, NDArray[Any]]:
    """The arrays of a bundle, from the members that are left."""
    # The library compares the header with the bytes that are there before it makes an array.
    arrays = safetensors.numpy.load(members.pop(_ARRAYS_MEMBER))
    _check_no_other({*members, *arrays} - {*_ARRAYS})
    return {name: _checked(name, array) for name, array in arrays.items()}


def _arrays_of_old(members: dict[str, bytes]) -> dict[str, NDArray[Any]]:
    """The same of versions 1 and 2, where each is a member."""
    _check_no_other({*members} - {f"{name}.npy" for name in _ARRAYS})
    arrays = {}
    for member, data in members.items():
        name = member.removesuffix(".npy")
        # Read as strictly as it was written: NumPy's own reader evaluates the header as Python.
        header = _NPY.match(data)
        if header is None:
            raise ValueError(f"{name} is not a .npy as featx wrote it")
        dtype, shape = np.dtype(header[1].decode()), tuple(int(n) for n in header[2].split(b",") if n.strip())
        if math.prod(shape) * dtype.itemsize != len(data) - header.end():
            raise ValueError(f"{name} does not have the length that its header says")
        arrays[name] = _checked(name, np.frombuffer(data, dtype, offset=header.end()).reshape(shape))
    return arrays


def _check_no_other(others: set[str]) -> None:
    if others:
        raise ValueError(f"{min(others)!r} does not belong in it")


def _checked(name: str, array: NDArray[Any]) -> NDArray[Any]:
    dtype, dimensions = _ARRAYS[name]
    if array.dtype != np.dtype("<" + dtype) or array.ndim != dimensions or not array.size:
        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}, not {dimensions}-dimensional {dtype}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} is not finite")
    return array


def _assemble(fields: dict[str, Any], arrays: dict[str, NDArray[Any]], probe: bytes, sha256: str) -> Bundle:
    names = _typed(fields, "class_names", list)
    if len(names) < 2 or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError("class_names is not a list of two or more different names")
    d, c = arrays["mean"].shape[0], len(names)
    shapes: dict[str, tuple[int | None, ...]] = {"mean": (d,), "scale": (d,), "probe_embedding": (d,)}
    shapes |= {"golden": (None, d), "golden_scores": (len(arrays["golden"]), c)}
    n_neighbors = _typed(fields, "n_neighbors", int)
    if n_neighbors:
        m = len(arrays["rows"])
        shapes |= {"rows": (m, d), "targets": (m,)} | ({"intercept": (c,)} if "intercept" in arrays else {})
    else:
        shapes |= {"coef": (c, d), "intercept": (c,)}
    if "own_rows" in arrays or "own_similarity" in arrays:
        shapes |= {"own_rows": (None, d), "own_similarity": (None,)}
    if "conformity" in arrays or "conformity_weights" in arrays:
        shapes |= {"conformity": (None,)}
        if "conformity_weights" in arrays:
            shapes |= {"conformity_weights": (len(arrays.get("conformity", ())) + 1,)}
    if set(shapes) != set(arrays):
        raise ValueError(f"its arrays are {', '.join(sorted(arrays))}")
    for name, shape in shapes.items():
        if any(want not in (None, have) for want, have in zip(shape, arrays[name].shape, strict=True)):
            raise ValueError(f"{name} has the shape {arrays[name].shape}, not {shape}")
    if n_neighbors and not (0 <= arrays["targets"].min() <= arrays["targets"].max() < c and 0 < n_neighbors <= m):
        raise ValueError("targets or n_neighbors are out of range")
    if not is_kind(fields.get("kind"), d) or not (arrays["scale"] > 0).all():
        raise ValueError("its normaliser is unknown")
    scorer = Scorer(
        kind=fields["kind"], mean=arrays["mean"], scale=arrays["scale"], n_classes=c, coef=arrays.get("coef"),
        intercept=arrays.get("intercept"), rows=arrays.get("rows"), targets=arrays.get("targets"),
        n_neighbors=n_neighbors,
    )  # fmt: skip
    provenance = _typed(fields, "provenance", dict)
    layer, several = _typed(fields, "layer", str), backbones_of(provenance)
    if not isinstance(several, list) or not several or not all(map(_has_layers, several)):
        raise ValueError("its provenance names no layers")
    if layer not in (*layers_of(provenance), COMBINED, JOINED):
        raise ValueError("its layer is not one of the provenance's")
    notes = _typed(fields, "notes", list)
    max_error = _number(fields, "max_error")
    if max_error is None:
        raise ValueError("max_error is null")
    max_unknown = _number(fields, "max_unknown") if fields["format_version"] > 2 else None
    if max_unknown is not None and max_unknown >= 1:
        raise ValueError(f"max_unknown is {max_unknown!r:.40}")
    return Bundle(
        scorer=scorer,
        class_names=tuple(names),
        head=_typed(fields, "head", str),
        params=_typed(fields, "params", dict),
        layer=layer,
        provenance=provenance,
        sharpness=_number(fields, "sharpness"),
        threshold=_number(fields, "threshold"),
        max_error=max_error,
        max_unknown=max_unknown,
        familiarity=_familiarity(arrays, scorer.kind) if "own_rows" in arrays else None,
        conformity=_conformity(arrays) if "conformity" in arrays else None,
        prior=_prior(fields.get("prior"), names),
        graphs=_graphs(fields.get("networks", {})),
        golden=arrays["golden"],
        probe=probe,
        probe_embedding=arrays["probe_embedding"],
        metrics=_typed(fields, "metrics", dict),
        versions=_typed(fields, "versions", dict),
        notes=tuple(str(note) for note in notes),
        sha256=sha256,
    )


def _familiarity(arrays: Mapping[str, NDArray[Any]], kind: str) -> Familiarity:
    rows, own = arrays["own_rows"].astype(np.float32), arrays["own_similarity"]
    if len(rows) < 2 or not np.linalg.norm(rows, axis=1).max() <= _UNIT:
        raise ValueError("own_rows are not two or more rows of unit length")
    if not -_UNIT <= own[0] <= own[-1] <= _UNIT or (np.diff(own) < 0).any():
        raise ValueError("own_similarity are not ascending cosines")
    return Familiarity(rows, own, kind)


def _conformity(arrays: Mapping[str, NDArray[Any]]) -> Conformity:
    scores, weights = arrays["conformity"], arrays.get("conformity_weights")
    if scores[0] < 0 or (np.diff(scores) < 0).any():
        raise ValueError("conformity are not ascending scores")
    if weights is not None and not (weights > 0).all():
        raise ValueError("conformity_weights are not above 0")
    return Conformity(scores) if weights is None else Conformity(scores, weights[:-1], float(weights[-1]))


def _graphs(graphs: Any) -> dict[str, str]:
    if not isinstance(graphs, dict) or not all(isinstance(sha256, str) for sha256 in graphs.values()):
        raise ValueError(f"networks is {graphs!r:.40}")
    return graphs


def _prior(prior: Any, names: list[str]) -> dict[str, float] | None:
    if prior is None:
        return None
    if not isinstance(prior, dict) or set(prior) != set(names):
        raise ValueError(f"prior is {prior!r:.40}")
    shares = {name: _number(prior, name) for name in names}
    if not all(shares.values()) or not abs(sum(filter(None, shares.values())) - 1.0) < 1e-6:
        raise ValueError("prior is not a share for each class")
    return {name: share for name, share in shares.items() if share}


def _has_layers(provenance: Any) -> bool:
    layers = provenance.get("layers") if isinstance(provenance, dict) else None
    return isinstance(layers, list) and bool(layers) and all(isinstance(name, str) for name in layers)


def _typed(fields: Mapping[str, Any], name: str, kind: Any) -> Any:
    value = fields[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r:.40}")
    return value


def _number(fields: Mapping[str, Any], name: str) -> float | None:
    value = fields[name]
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{name} is {value!r:.40}")
    return float(value)
