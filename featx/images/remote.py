"""Images below an address that fsspec knows, such as ``s3://bucket/photos``: fsspec's only door.

One listing says what is there; each image is fetched when it is embedded, several at a time, and kept nowhere. Size and
modification time of the listing tell which images have not changed since: those are not fetched again. Credentials,
endpoints and anonymous access are the back end's own matter (for S3 the usual AWS environment and files,
``AWS_ENDPOINT_URL`` for other servers, ``FSSPEC_S3_ANON=true`` for public buckets).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar

from featx.errors import FeatxError, ImageError, SourceError, UsageError, in_words, not_installed
from featx.images.origin import (
    IMAGE_SUFFIXES,
    MAX_FETCHED,
    Fetched,
    ImageRef,
    labels_from_folders,
    no_images,
    too_many_bytes,
)

_EXTRA = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3")}
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")


def remote_refs(url: str) -> tuple[list[ImageRef], list[str]]:
    """The images below an address, labelled by folders as on a disk, and the names of the other files there.

    Raises
    ------
    SourceError
        There is nothing, no permission, or no answer.
    UsageError
        No package is installed that speaks this protocol, or it has no folders (http).
    """
    files, top = _system(url)
    try:
        files.invalidate_cache()  # what was listed earlier in this process may have changed
        listed: Mapping[str, Mapping[str, Any]] = files.find(top, detail=True)
    except Exception as error:
        raise _no_answer(error, url) from error
    prefix = top.rstrip("/") + "/"
    found: list[tuple[str, Mapping[str, Any]]] = []
    ignored: list[str] = []
    for path, about in listed.items():
        name = path.removeprefix(prefix)
        if not path.startswith(prefix) or not name or name.endswith("/") or _hidden(name):
            continue
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:  # noqa: PTH122 - pathlib is 5 times slower here
            found.append((name, about))
        else:
            ignored.append(name)
    if not found:
        raise no_images("at this address", url, ignored)
    named = labels_from_folders([name for name, _ in found])
    refs = [
        ImageRef(name, Remote(url, prefix + name, _size(about)), label, split, _size(about), _time_ns(about))
        for (name, about), (label, split) in zip(found, named, strict=True)
    ]
    return refs, ignored


def remote_origin(url: str, name: str) -> Remote:
    """Where one image below an address is."""
    return Remote(url, f"{_system(url)[1].rstrip('/')}/{name}", -1)


@dataclass(frozen=True, slots=True)
class Remote(Fetched):
    """One file behind an address; ``size`` is that of the listing, or -1."""

    parallel: ClassVar[int] = 16

    url: str
    path: str
    size: int

    def read_bytes(self) -> bytes:
        """The bytes of the image's file."""
        if self.size > MAX_FETCHED:
            raise too_many_bytes(self.size, MAX_FETCHED)
        files, _ = _system(self.url)
        try:
            data = files.cat_file(self.path)
        except FileNotFoundError as error:
            raise ImageError("missing", "it was listed, and is not there any more") from error
        except PermissionError as error:
            raise ImageError("unreadable", "no permission to read it") from error
        except Exception as error:
            # A network that is down says nothing about the image: the run stops, and goes on when it is back.
            raise _no_answer(error, self.url) from error
        return bytes(data)


@functools.lru_cache(maxsize=8)
def _system(url: str) -> tuple[Any, str]:
    """The file system behind an address, and the path in it."""
    protocol, _, rest = url.partition("://")
    if not rest.strip("/"):
        raise SourceError("the address names nothing", where=url, expected="one such as s3://bucket/photos")
    if protocol in ("http", "https"):
        raise UsageError("a web address has no folders to list", where=url, hint="Download the images into a folder.")
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except ImportError as error:
        package, extra = _EXTRA.get(protocol, ("", ""))
        if package:
            raise not_installed(package, extra, f"{protocol}://") from error
        raise UsageError(f"{protocol}:// needs a package that is not installed", where=url, found=str(error)) from error
    except Exception as error:
        raise SourceError(f"not an address that fsspec knows ({in_words(error)})", where=url) from error


def _no_answer(error: Exception, url: str) -> FeatxError:
    if isinstance(error, FeatxError):
        return error
    if isinstance(error, FileNotFoundError):
        return SourceError("nothing is at this address", where=url)
    if isinstance(error, PermissionError) or "credentials" in str(error).lower():
        return SourceError(
            f"no permission ({in_words(error)})", where=url, hint="Are the credentials set, and for this address?"
        )
    return SourceError(
        f"no answer ({in_words(error)})",
        where=url,
        hint="What was embedded is kept; run the same command again when it is reachable.",
    )


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _size(about: Mapping[str, Any]) -> int:
    size = about.get("size")
    return int(size) if isinstance(size, int | float) else -1


def _time_ns(about: Mapping[str, Any]) -> int:
    """Modification time in nanoseconds; -1 where the back end has none, so that nothing is taken for unchanged."""
    for name in _TIMES:
        value = about.get(name)
        if isinstance(value, str):
            try:
                value = datetime.fromisoformat(value)
            except ValueError:
                continue
        if isinstance(value, datetime):
            aware = value if value.tzinfo else value.replace(tzinfo=UTC)
            return int(aware.timestamp()) * 10**9 + aware.microsecond * 1000
        if isinstance(value, int | float):
            return int(value * 10**9)
    return -1
