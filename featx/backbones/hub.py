"""Folders of weights, and fetching weights into them: torch hub's, and the cache of the Hugging Face hub.

What is checked of a download: its length against what the server announces, and its sha256 against the catalogue,
where that knows it (:mod:`featx.backbones.catalogue`), or for the Hugging Face hub against the sum that the hub
itself announces. The latter finds damage on the way. It is no proof of who made the file: the networks there are
named by repository, without a pinned revision.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import inspect
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from featx._files import make_folder, publish, sha256_file
from featx.errors import WeightsError, in_words

Progress = Callable[[str], None]
"""Told, in a sentence, before something slow begins (a download)."""

Advance = Callable[[int, int, str], None]
"""Told how many of so many bytes are done, and of what."""

HUB_SECONDS = 5.0
"""How long the Hugging Face hub may take to answer at all."""

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""timm's names on the Hugging Face hub, in its order."""

ATTEMPTS = 4
"""How often a download is begun; after the first, where the last one broke off, if the server can."""

PAUSE = 1.0
"""Seconds before the second attempt; the others wait longer."""

SECONDS = 30.0
"""How long a server may send nothing."""

_BLOCK = 1 << 20
_SHA256 = re.compile("[0-9a-f]{64}")


class _BrokenOff(Exception):
    """The connection failed, not the file: worth another attempt."""


def hub_folder() -> Path:
    """Torch hub's checkpoint folder, found by torch's own rules without importing torch."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TORCH_HOME") or Path(cache) / "torch").expanduser() / "hub" / "checkpoints"


def cache_folder() -> Path:
    """Where featx keeps what can be made again: FEATX_CACHE, or featx in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("FEATX_CACHE")
    return Path(own or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "featx").expanduser()


def fetch(
    url: str, path: Path, sha256_prefix: str, progress: Progress | None = None, advance: Advance | None = None
) -> None:
    """Download a file of weights, which appears whole and checked, or not at all.

    Parameters
    ----------
    sha256_prefix : as much of its sha256 as is known.

    Raises
    ------
    WeightsError
        There is no such file, the connection is too bad, or what came is another file.
    """
    if progress is not None:
        progress(f"downloading {url} to {path.parent}")

    def write(temp: Path) -> None:
        with temp.open("wb") as file:
            sha256 = _receive(url, file, path, bool(sha256_prefix), advance)
        if not sha256.startswith(sha256_prefix):
            raise WeightsError(
                f"what came from {url} is not the file that was published",
                where=path.name,
                expected=f"sha256 {sha256_prefix}",
                found=f"sha256 {sha256}",
                hint="Nothing was kept. Run it again; if that does not help, the server or the line alters files.",
            )

    make_folder(path.parent)
    publish(path, write)


def _receive(url: str, file: BinaryIO, path: Path, checked: bool, advance: Advance | None) -> str:
    """Write what is at ``url`` to an empty file; its sha256."""
    digest, done, mark = hashlib.sha256(), 0, ""
    for attempt in range(ATTEMPTS):
        rest = {"Range": f"bytes={done}-", "If-Range": mark} if done and mark else {}
        headers = {"User-Agent": "featx", **rest}
        try:
            with _open(urllib.request.Request(url, headers=headers)) as answer:
                if not rest or answer.status != 206:
                    file.seek(0)
                    file.truncate()
                    digest, done = hashlib.sha256(), 0
                    mark = answer.headers.get("ETag", "")
                length = answer.headers.get("Content-Length")
                total = None if length is None else done + int(length)
                if total is None and not checked:
                    raise _unreachable(url, path, "the server does not say how large it is")
                while block := _block(answer):
                    file.write(block)
                    digest.update(block)
                    done += len(block)
                    if advance is not None:
                        advance(done, total or done, path.name)
                if total is not None and done != total:
                    raise _BrokenOff(f"it ended after {done:,} of {total:,} bytes")
                return digest.hexdigest()
        except _BrokenOff as error:
            if attempt + 1 == ATTEMPTS:
                raise _unreachable(url, path, f"{error}; {ATTEMPTS} attempts were made") from error
            time.sleep(PAUSE * (attempt + 1))
    raise AssertionError("every attempt returns or raises")


@contextlib.contextmanager
def _open(request: urllib.request.Request) -> Any:
    try:
        answer = urllib.request.urlopen(request, timeout=SECONDS)
    except urllib.error.HTTPError as error:
        with error:
            if error.code >= 500 or error.code in (408, 429):
                raise _BrokenOff(f"the server answers {error.code} {error.reason}") from error
            raise _unreachable(request.full_url, None, f"HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(request.full_url, None, str(getattr(error, "reason", None) or in_words(error))) from error
    with answer:
        yield answer


def _block(answer: Any) -> bytes:
    try:
        return bytes(answer.read(_BLOCK))
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOff(in_words(error)) from error


def _unreachable(url: str, path: Path | None, reason: str) -> WeightsError:
    name = url.rpartition("/")[2] if path is None else path.name
    return WeightsError(
        f"the weights are not on this machine and cannot be downloaded from {url} ({reason})",
        where=name,
        hint=f"Put that file into {hub_folder()}, name one that you have with --weights FILE, or carry it here "
        f"(featx guide features).",
    )


# --- the Hugging Face hub ----------------------------------------------------------------------------------------


def in_hub_cache(repository: str, files: Sequence[str] = HUB_FILES) -> Path | None:
    """The first of these files of a repository that the cache of the Hugging Face hub holds."""
    from huggingface_hub import try_to_load_from_cache

    for file in files:
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)
    return None


def cached_repositories() -> list[str]:
    """Repositories of timm that the cache of the Hugging Face hub knows."""
    from huggingface_hub import constants

    prefix = "models--timm--"
    return sorted(f"timm/{path.name.removeprefix(prefix)}" for path in Path(constants.HF_HUB_CACHE).glob(f"{prefix}*"))


def fetch_from_hub(
    name: str,
    repository: str,
    files: Sequence[str] = HUB_FILES,
    progress: Progress | None = None,
    advance: Advance | None = None,
) -> Path:
    """Download the first of these files that a repository has, into the hub's own cache.

    Raises
    ------
    WeightsError
        The hub cannot be reached, has none of them, or what came does not have the sum that it announces.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    if progress is not None:
        progress(f"downloading {repository} from the Hugging Face hub")
    try:
        for file in files:
            # One question first: the download itself would try for half a minute to reach a hub that is not there.
            try:
                record = get_hf_file_metadata(hf_hub_url(repository, file), timeout=HUB_SECONDS)
            except EntryNotFoundError:
                continue
            path = Path(hf_hub_download(repository, file, **_bar(advance, name)))
            _check_announced(path, record.etag or "", name)
            return path
    except WeightsError:
        raise
    except Exception as error:  # which HTTP library's errors these are depends on the hub's version
        raise _hub_unreachable(name, repository, in_words(error)) from error
    raise _hub_unreachable(name, repository, f"the hub has no {' or '.join(files)} of it")


def _check_announced(path: Path, announced: str, name: str) -> None:
    """Large files have their sha256 as their tag; the hub's own client compares lengths alone."""
    if not _SHA256.fullmatch(announced):
        return
    sha256 = sha256_file(path)
    if sha256 != announced:
        blob = path.resolve()
        path.unlink()
        blob.unlink(missing_ok=True)
        raise WeightsError(
            "the download does not have the sum that the Hugging Face hub announces",
            where=name,
            expected=f"sha256 {announced}",
            found=f"sha256 {sha256}",
            hint="It was deleted. Run it again.",
        )


def _bar(advance: Advance | None, name: str) -> dict[str, Any]:
    """What makes the hub's client report to ``advance``; an older one shows its own bar."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils.tqdm import tqdm

    if advance is None or "tqdm_class" not in inspect.signature(hf_hub_download).parameters:
        return {}
    report = advance

    class Bar(tqdm):
        """Counts, and draws nothing."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            self.n += int(n or 0)
            report(int(self.n), max(int(self.total or 0), int(self.n)), name)
            return None

    return {"tqdm_class": Bar}


def _hub_unreachable(name: str, repository: str, reason: str) -> WeightsError:
    return WeightsError(
        f"the weights are not on this machine and cannot be downloaded ({' '.join(reason.split())})",
        where=name,
        hint=f"Fetch them on a machine that is online (featx weights fetch {name}, or huggingface-cli download "
        f"{repository}), and carry them here (featx weights pack, featx weights add), or name the file with "
        f"--weights FILE.",
    )
