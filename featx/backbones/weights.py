"""Weights on this machine, and on their way to another: listed, fetched, packed into one file, added from it.

A pack is a safetensors file: eight bytes with the length of a header, the header in JSON, and behind it the files, back
to back. Each is a "tensor" of bytes under the name of its network, and ``__metadata__`` has its sha256. Any library for
safetensors can read one. What travels are the publisher's own bytes, so that the sha256 that stores keep is the same on
both machines.

A pack is read as a stranger's. It says which network a file is for, never where it goes: that follows from the
network's name, which has to be a known one. Nothing of it is unpickled here, and a torch file, which is a pickle, is
taken only if it is known by its whole sha256: from the catalogue, or because the user gives the sha256 of the whole
pack, which ``featx weights pack`` prints. Converting such files to safetensors would not help: their own sha256 would
be lost, or be a claim that nobody can check. Safetensors cannot run code; these are taken if they fill their network.

Networks of these weights that were quantised on this machine travel along, so that a store at int8 goes on there with
the same numbers. They are taken with the sha256 of the whole pack only: nothing else ties their numbers to the weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from featx._files import cannot_write, fsync_path, make_folder, publish, sha256_file, temporary, uninterrupted
from featx.backbones.backbone import CatalogueNetwork, find
from featx.backbones.catalogue import HUB, NETWORKS, WEIGHTS
from featx.backbones.engines.graph import QUANTISED_NAME, Graph, check_network, quantised_folder, quantised_here
from featx.backbones.hub import Advance, Progress, cached_repositories, hub_folder, in_hub_cache
from featx.errors import UsageError, WeightsError, in_words, plural

if TYPE_CHECKING:
    from featx.backbones.timm import TimmModel

FORMAT, FORMAT_VERSION = "featx-weights", "1"

MAX_HEADER = 1 << 20
"""Bytes of a header; that of a hundred networks has some 20,000."""

MAX_NAME = 200
"""Characters of a network's name."""

_LENGTH = struct.Struct("<Q")
_BLOCK = 1 << 20
_SHA256 = re.compile("[0-9a-f]{64}")

Known = Literal["sha256", "digits", "safetensors", "pack", "nothing"]
"""What a file is known by: all of its sha256, the digits that its publisher put into its name, its format alone, or the
sha256 of the pack that it came in."""

_QUANTISED = "int8:"
"""What a pack's name of a quantised network starts with; behind it is the name of its file."""


@dataclass(frozen=True)
class LocalWeights:
    """Weights that are on this machine.

    Parameters
    ----------
    backbone : the network's name in the catalogue, or ``timm:NAME``.
    path : the file.
    bytes : its size.
    place : "installed package", "torch hub's folder" or "Hugging Face cache".
    """

    backbone: str
    path: Path
    bytes: int
    place: str


@dataclass(frozen=True)
class Carried:
    """Weights that were fetched, packed or added.

    Parameters
    ----------
    backbone : the network's name in the catalogue, or ``timm:NAME``; ``int8:FILE`` for a quantised network.
    path : the file on this machine.
    bytes : its size.
    sha256 : of all of it: what stores keep of weights.
    known : see :data:`Known`.
    new : whether it was not here before.
    """

    backbone: str
    path: Path
    bytes: int
    sha256: str
    known: Known
    new: bool


@dataclass(frozen=True)
class Pack:
    """A file with the weights of several networks; ``sha256`` is that of the whole file."""

    path: Path
    bytes: int
    sha256: str
    weights: tuple[Carried, ...]


@dataclass(frozen=True)
class _Quantised:
    """A quantised network in a pack; ``carried`` is the file that it goes to."""

    carried: Path

    def local(self) -> Path | None:
        """The file, if one is there that can be read: a damaged one is made anew."""
        return self.carried if Graph.read(self.carried) is not None else None


@dataclass(frozen=True)
class _Entry:
    """A file inside a pack: ``start`` counts from the pack's own first byte."""

    name: str
    sha256: str
    start: int
    size: int


def list_weights() -> list[LocalWeights]:
    """All weights of networks with a name that are here; torch is not imported."""
    found: dict[str, Path | None] = {}
    for name, network in NETWORKS.items():
        weights = WEIGHTS[network.default]
        found[name] = CatalogueNetwork(name=name, preprocess=weights.preprocess, row=network).local()
    short = {row.model: row.name for row in HUB.values()}
    for model, path in _of_timm():
        found.setdefault(short.get(model, f"timm:{model}"), path)
    return [LocalWeights(name, path, path.stat().st_size, _place(path)) for name, path in found.items() if path]


def _of_timm() -> Iterator[tuple[str, Path]]:
    for path in sorted(hub_folder().glob("*.safetensors")):
        if re.fullmatch(r"\w+\.\w+", path.stem):
            yield path.stem, path
    for repository in cached_repositories():
        cached = in_hub_cache(repository)
        if cached is not None:
            yield repository.partition("/")[2], cached


def _place(path: Path) -> str:
    if path.parent == hub_folder():
        return "torch hub's folder"
    return "Hugging Face cache" if "snapshots" in path.parts else "installed package"


def fetch_weights(name: str, *, progress: Progress | None = None, advance: Advance | None = None) -> Carried:
    """Download the default weights of a network, unless they are here; checked in either case.

    Raises
    ------
    UsageError
        There is no such network.
    WeightsError
        They cannot be downloaded, or are not what was published.
    """
    network = _published(name)
    here = network.local()
    path = here or network.fetch(progress, advance)
    return _checked(network, path, advance, new=here is None)


def pack_weights(names: Sequence[str], out: Path, *, advance: Advance | None = None) -> Pack:
    """Write the default weights of networks, which have to be on this machine, into one file.

    Raises
    ------
    UsageError
        A name is unknown, or there twice.
    WeightsError
        Weights are not here, have changed, or are a pickle that is known by no hash.
    """
    found: dict[str, Carried] = {}
    for name in names:
        network = _published(name)
        path = network.local()
        if path is None:
            raise WeightsError(
                "its weights are not on this machine", where=name, hint=f"First run: featx weights fetch {name}"
            )
        weights = _checked(network, path, advance, new=False)
        if weights.known == "nothing":
            raise WeightsError(
                "its weights are a pickle of which no hash is known, so another machine should not trust it",
                where=path,
                expected="a .safetensors file",
                hint="Copy the file itself, and name it with --weights FILE.",
            )
        if weights.backbone in found:
            raise UsageError("named twice", where=name, expected="each network once")
        found[weights.backbone] = weights
    for weights in list(found.values()):
        for path, graph in quantised_here(weights.sha256):
            content = graph.content
            name = _QUANTISED + path.name
            found[name] = Carried(name, path, len(content), hashlib.sha256(content).hexdigest(), "pack", False)
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "format_version": FORMAT_VERSION}}
    end = 0
    for weights in found.values():
        header["__metadata__"][weights.backbone] = weights.sha256
        start, end = end, end + weights.bytes
        header[weights.backbone] = {"dtype": "U8", "shape": [weights.bytes], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as safetensors asks for
    whole = hashlib.sha256()

    def write(temp: Path) -> None:
        with temp.open("wb") as file:
            for part in (_LENGTH.pack(len(text)), text):
                file.write(part)
                whole.update(part)
            done = 0
            for weights in found.values():
                with weights.path.open("rb") as source:
                    sha256 = _hash_of(
                        source, weights.bytes, weights.path, advance, file.write, whole.update,
                        title=weights.backbone, before=done, total=end,
                    )  # fmt: skip
                done += weights.bytes
                if sha256 != weights.sha256:
                    raise WeightsError("the file changed while it was read", where=weights.path, hint="Run it again.")

    publish(out, write)
    return Pack(out, out.stat().st_size, whole.hexdigest(), tuple(found.values()))


def add_weights(
    pack: Path, *, sha256: str = "", progress: Progress | None = None, advance: Advance | None = None
) -> list[Carried]:
    """Put the weights of a pack where featx finds them: all of them, or none.

    Parameters
    ----------
    pack : a file that :func:`pack_weights` made, or a stranger made to look like one.
    sha256 : that of the pack, from whoever made it; torch files of which the catalogue knows only some digits, and
        quantised networks, are taken only with it.

    Raises
    ------
    WeightsError
        The file is no such pack, is damaged, or holds what cannot be trusted; the message says which part.
    UsageError
        ``sha256`` is none.
    """
    sha256 = sha256.strip().lower()
    if sha256 and not _SHA256.fullmatch(sha256):
        raise UsageError("not a sha256", where="--sha256", expected="64 hexadecimal digits", found=sha256[:80])
    with _opened(pack) as (file, size):
        entries = _entries(file, size, pack)
        networks = {entry.name: _known_network(entry.name, pack) for entry in entries}
        if sha256:
            _check_whole(file, size, sha256, pack, advance)
        known = {entry.name: _recognised(entry, networks[entry.name], bool(sha256), pack) for entry in entries}
        for folder in {network.carried.parent for network in networks.values()}:
            make_folder(folder)
        ready: list[tuple[_Entry, Path, Path]] = []
        done: dict[str, Path] = {}
        try:
            with contextlib.ExitStack() as stack:
                for entry in entries:
                    network = networks[entry.name]
                    here = _already(network, entry, pack)
                    if here is not None:
                        done[entry.name] = here
                        continue
                    temp = stack.enter_context(temporary(network.carried))
                    _extract(file, entry, temp, pack, advance)
                    if isinstance(network, _Quantised):
                        _check_quantised(temp, entry, {other.sha256 for other in entries}, pack)
                    elif not isinstance(network, CatalogueNetwork):
                        if progress is not None:
                            progress(f"checking that the weights fill {entry.name}")
                        _check_fits(network, temp, entry, pack)
                    ready.append((entry, temp, network.carried))
                with uninterrupted():
                    for entry, temp, path in ready:
                        temp.replace(path)
                        done[entry.name] = path
                    for folder in {path.parent for _, _, path in ready}:
                        fsync_path(folder)
        except OSError as error:
            raise cannot_write(network.carried, error) from error
    new = {entry.name for entry, _, _ in ready}
    return [
        Carried(entry.name, done[entry.name], entry.size, entry.sha256, known[entry.name], entry.name in new)
        for entry in entries
    ]


# --- what is published -----------------------------------------------------------------------------------------


def _published(name: str) -> CatalogueNetwork | TimmModel:
    network = find(name)
    if isinstance(network, CatalogueNetwork):
        return network
    from featx.backbones.timm import TimmModel

    if isinstance(network, TimmModel):
        return network
    raise UsageError("it has no published weights", where=name, hint="Copy your own file to the other machine.")


def _spelling(network: CatalogueNetwork | TimmModel) -> str:
    """How a pack calls a network: the same for all of its spellings."""
    return network.name if isinstance(network, CatalogueNetwork) else f"timm:{network.published_name}"


def _checked(network: CatalogueNetwork | TimmModel, path: Path, advance: Advance | None, *, new: bool) -> Carried:
    """A file that is here with what it is known by; WeightsError if it is not what was published."""
    with path.open("rb") as file:
        sha256 = _hash_of(file, path.stat().st_size, path, advance, title=f"checking {path.name}")
    known: Known
    if isinstance(network, CatalogueNetwork):
        network.check(path, sha256)
        known = "sha256" if network.published.sha256 else "digits"
    else:
        known = "safetensors" if path.suffix == ".safetensors" else "nothing"
    return Carried(_spelling(network), path, path.stat().st_size, sha256, known, new)


# --- reading a pack --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(pack: Path) -> Iterator[tuple[BinaryIO, int]]:
    try:
        # Not to wait for whoever may write to a pipe, and to look at the file that was opened, not at its name again.
        file = open(pack, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    except OSError as error:
        raise _refused(pack, f"cannot be read ({in_words(error)})") from error
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise _no_pack(pack, "not a regular file")
        yield file, status.st_size


def _refused(
    pack: Path, what: str, *, expected: str | None = None, found: str | None = None, hint: str = ""
) -> WeightsError:
    """The error for a pack of which nothing is taken."""
    return WeightsError(what, where=pack, expected=expected, found=found, hint=f"{hint} Nothing was added.".lstrip())


def _no_pack(pack: Path, found: str) -> WeightsError:
    return _refused(pack, "is not a pack of weights", expected="a file made by featx weights pack", found=found)


def _entries(file: BinaryIO, size: int, pack: Path) -> list[_Entry]:
    """What the header says, with every number compared with the size of the file."""
    start = file.read(_LENGTH.size)
    if len(start) < _LENGTH.size:
        raise _no_pack(pack, f"{size} bytes")
    (length,) = _LENGTH.unpack(start)
    if length > MAX_HEADER or length > size - _LENGTH.size:
        raise _no_pack(pack, f"a header of {length:,} bytes in a file of {size:,}")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise _no_pack(pack, f"a header that is not JSON ({in_words(error)})") from error
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise _no_pack(pack, "another kind of file")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise WeightsError(
            "was packed by another version of featx",
            where=pack,
            expected=f"format_version {FORMAT_VERSION}",
            found=str(metadata.get("format_version"))[:20],
            hint="Install the same version of featx on both machines.",
        )
    if not header or set(metadata) != {"format", "format_version", *header}:
        raise _no_pack(pack, "a list of hashes that does not match its files")
    if any(len(name) > MAX_NAME for name in header):
        raise _no_pack(pack, f"a name of more than {MAX_NAME} characters")
    entries, first, end = [], _LENGTH.size + length, 0
    for name, tensor in header.items():
        offsets = tensor.get("data_offsets") if isinstance(tensor, dict) else None
        if not (isinstance(offsets, list) and [type(n) for n in offsets] == [int, int]):
            raise _no_pack(pack, f"no place of {name!r}")
        low, high = offsets
        place = {"dtype": "U8", "shape": [high - low], "data_offsets": offsets}
        if low != end or not low < high < 1 << 63 or tensor != place:
            raise _no_pack(pack, f"a place of {name!r} that is not the next one")
        if high > size - first:
            raise _refused(
                pack,
                "is cut off, or declares more than it holds",
                expected=f"{first + high:,} bytes",
                found=f"{size:,}",
                hint="Copy it again.",
            )
        if not isinstance(metadata[name], str) or not _SHA256.fullmatch(metadata[name]):
            raise _no_pack(pack, f"no sha256 of {name!r}")
        entries.append(_Entry(name, metadata[name], first + low, high - low))
        end = high
    if first + end != size:
        raise _no_pack(pack, f"{plural(size - first - end, 'byte')} behind the last file")
    return entries


def _known_network(name: str, pack: Path) -> CatalogueNetwork | TimmModel | _Quantised:
    """The network of an entry, which has to be spelt as :func:`pack_weights` spells it."""
    if name.startswith(_QUANTISED):
        file = name.removeprefix(_QUANTISED)
        if not QUANTISED_NAME.fullmatch(file):
            raise _no_pack(pack, f"{file!r} as the file of a quantised network")
        return _Quantised(quantised_folder() / file)
    try:
        network = _published(name)
    except UsageError as error:
        raise _refused(
            pack,
            f"holds weights of {name!r}, a network that is not known here",
            hint="Install the same versions of featx and timm on both machines.",
        ) from error
    if _spelling(network) != name:
        raise _no_pack(pack, f"{name!r} for {_spelling(network)!r}")
    return network


def _check_whole(file: BinaryIO, size: int, expected: str, pack: Path, advance: Advance | None) -> None:
    file.seek(0)
    sha256 = _hash_of(file, size, pack, advance, title=f"checking {pack.name}")
    if sha256 != expected:
        raise _refused(pack, "is not the pack that was meant", expected=f"sha256 {expected}", found=f"sha256 {sha256}")


def _recognised(entry: _Entry, network: CatalogueNetwork | TimmModel | _Quantised, vouched: bool, pack: Path) -> Known:
    """What an entry is known by, before a byte of it is read; WeightsError where that is too little."""
    if isinstance(network, _Quantised):
        if not vouched:
            raise _refused(
                pack,
                f"the quantised network {network.carried.name} can be recognised only by the sha256 of the pack",
                hint=_ASK_FOR_SHA256,
            )
        return "pack"
    if not isinstance(network, CatalogueNetwork):
        return "safetensors"
    weights = network.published
    if not entry.sha256.startswith(weights.sha256_prefix):
        raise _refused(
            pack,
            f"the weights for {entry.name} are not those that were published for it",
            expected=f"sha256 {weights.sha256_prefix}",
            found=f"sha256 {entry.sha256}",
        )
    if weights.sha256:
        return "sha256"
    if not vouched:
        raise _refused(
            pack,
            f"the weights for {entry.name} are a torch file of which featx knows only the first digits of the sha256, "
            f"{weights.sha256_prefix}",
            hint=_ASK_FOR_SHA256,
        )
    return "digits"


_ASK_FOR_SHA256 = "Give the sha256 of the pack, which featx weights pack printed where it was made: --sha256 DIGITS."


def _already(network: CatalogueNetwork | TimmModel | _Quantised, entry: _Entry, pack: Path) -> Path | None:
    """Where these weights are already; WeightsError if others are there that this would change in silence."""
    here: Path | None = network.local()
    if here is None or sha256_file(here) == entry.sha256:
        return here
    if isinstance(network, CatalogueNetwork):
        return None  # what is here is not what was published, and is replaced by what is
    what = "numbers" if isinstance(network, _Quantised) else "weights"
    raise _refused(
        pack,
        f"other {what} of {entry.name} are on this machine already",
        expected=f"sha256 {entry.sha256}",
        found=f"{here} with another",
        hint="Delete that file first if you want these.",
    )


def _extract(file: BinaryIO, entry: _Entry, temp: Path, pack: Path, advance: Advance | None) -> None:
    file.seek(entry.start)
    with temp.open("wb") as out:
        sha256 = _hash_of(file, entry.size, pack, advance, out.write, title=entry.name)
    if sha256 != entry.sha256:
        raise _refused(
            pack,
            f"the weights for {entry.name} are damaged",
            expected=f"sha256 {entry.sha256}",
            found=f"sha256 {sha256}",
            hint="Copy it again.",
        )
    fsync_path(temp)


def _check_quantised(temp: Path, entry: _Entry, weights: Collection[str], pack: Path) -> None:
    """WeightsError unless OpenVINO may be given a quantised network, and it is of weights that are in the pack."""
    try:
        if check_network(temp.read_bytes()).about.get("weights_sha256") not in weights:
            raise ValueError("it is of weights that are not in the pack")
    except ValueError as error:
        raise _refused(pack, f"the quantised network {entry.name} cannot be taken", found=str(error)) from error


def _check_fits(network: TimmModel, temp: Path, entry: _Entry, pack: Path) -> None:
    """WeightsError unless a file is safetensors, and fills the network."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(temp), "pt") as tensors:
            tensors.keys()
    except SafetensorError as error:
        raise _refused(
            pack,
            f"the weights for {entry.name} are not a safetensors file, and no hash of them is known",
            found=in_words(error),
        ) from error
    try:
        network.check_fits(temp)
    except WeightsError as error:
        raise _refused(
            pack, f"the weights for {entry.name} are those of another network", found=str(error.found)
        ) from error


def _hash_of(
    file: BinaryIO,
    size: int,
    path: Path,
    advance: Advance | None,
    *takers: Callable[[bytes], object],
    title: str,
    before: int = 0,
    total: int = 0,
) -> str:
    """Hex sha256 of exactly so many bytes from where the file stands, which ``takers`` are given, too.

    ``advance`` is told of ``total`` bytes (by default these), of which so many were read ``before``.
    """
    digest, left = hashlib.sha256(), size
    while left:
        try:
            block = file.read(min(left, _BLOCK))
        except OSError as error:
            raise WeightsError(f"cannot be read ({in_words(error)})", where=path) from error
        if not block:
            raise WeightsError("became shorter while it was read", where=path, hint="Run it again.")
        for take in (digest.update, *takers):
            take(block)
        left -= len(block)
        if advance is not None:
            advance(before + size - left, total or size, title)
    return digest.hexdigest()
