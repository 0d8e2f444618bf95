"""The inside of a decoding process: read, hash, decode, and send the pixels back.

This is all that a child of :class:`featx.images.pool.DecoderPool` runs. It speaks by short messages over a socket: the
parent names an image (or brings its bytes), the child answers with its digest; the parent asks for the pixels if that
content is new, each network's for itself. A parent that serves strangers asks first how much work they are, and says
how long both may take.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import stat
import struct
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx._system import OutOfTime, confine, limited_memory, limited_time, stand_back
from featx.errors import ImageError
from featx.images.child import READY, speak_to_nobody
from featx.images.exif import taken_at
from featx.images.origin import MAX_BYTES, too_many_bytes
from featx.images.phash import perceptual_hash
from featx.images.pixels import BYTES_PER_PIXEL, Preprocess, decode, prepare, weigh
from featx.images.views import Looks

READ, PART, HERE, DECODE, DECODE_LIGHT = b"R", b"P", b"H", b"G", b"L"
"""What the parent asks: read a file, read a part of one, take these bytes; then, decode them, or decode them within
LIMITS. The last two end with a byte for each set of pixels that is wanted: its place among the settings' looks."""

HEAVY, LATE = b"W", b"T"
"""The answers where the limits do not allow to decode an image, by its header, or where time was up."""

PLACE = struct.Struct("<QQ")
TIMES = struct.Struct("<dd")
SIZE = struct.Struct("<II")
"""Width and height of the upright image, as it was decoded."""

LIMITS = struct.Struct("<ddd")
"""Seconds of a processor for the header, the heaviest weight (:func:`featx.images.pixels.weigh`), and seconds for each
unit of it. Only Python is stopped, not native code: formats let a small file have millions of chunks, segments,
comments or tags, and Pillow walks through them in Python."""

_HEADER_SECONDS = 1.0
"""Of a processor, to find the date of a photo; an honest header takes 2 ms."""

_SPARE = 256 * 2**20
"""Bytes for decoding beside those that every pixel needs."""


def serve(socket_handle: int) -> None:
    """The child's side: answer requests until the parent is gone."""
    with contextlib.suppress(EOFError, ConnectionError), Connection(socket_handle) as parent:
        confine()
        settings = json.loads(parent.recv_bytes())
        if settings["background"]:
            stand_back()
        looks = [Looks(Preprocess.from_json(each["preprocess"]), each["views"]) for each in settings["looks"]]
        data = b""
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it would be ignored if it was so in a parent of the parent
        speak_to_nobody()
        parent.send_bytes(READY)
        while True:
            message = parent.recv_bytes()
            # The parent is patient for the time-out; the alarm is for the case that there is no parent any more.
            signal.setitimer(signal.ITIMER_REAL, settings["timeout"] + 5.0)
            pixels: list[NDArray[np.uint8]] = []
            try:
                if message[:1] == DECODE:
                    answer, pixels = _decode(data, [looks[place] for place in message[1:]], settings)
                elif message[:1] == DECODE_LIGHT:
                    places = message[1 + LIMITS.size :]
                    limits = LIMITS.unpack_from(message, 1)
                    answer, pixels = _decode_light(data, [looks[place] for place in places], settings, *limits)
                else:
                    started = time.perf_counter()
                    data = _take(message)
                    read = time.perf_counter()
                    digest = hashlib.sha256(data).digest()
                    answer = b"D" + digest + TIMES.pack(read - started, time.perf_counter() - read)
                    prepare(data)
                    if settings["dated"]:
                        answer += _taken(data, settings["max_pixels"]).encode()
            except ImageError as error:
                answer = b"E" + json.dumps([error.reason, error.what[:4096]]).encode()
            except OutOfTime:
                answer, pixels = LATE, []
            signal.setitimer(signal.ITIMER_REAL, 0)
            parent.send_bytes(answer)
            for each in pixels:
                left = each.data.cast("B")
                while left:
                    left = left[os.write(socket_handle, left) :]


def _decode(data: bytes, looks: list[Looks], settings: dict[str, Any]) -> tuple[bytes, list[NDArray[np.uint8]]]:
    """The answer, and the pixels that follow it."""
    started = time.perf_counter()
    with limited_memory(BYTES_PER_PIXEL * settings["max_pixels"] + _SPARE):
        enough_for = looks if settings["mode"] == "scaled" else ()
        image = decode(data, enough_for=enough_for, max_pixels=settings["max_pixels"])
        decoded = time.perf_counter()
        pixels = [np.ascontiguousarray(each.cut(image)) for each in looks]
        hashed = perceptual_hash(image) if settings["hashed"] else b""
    times = TIMES.pack(decoded - started, time.perf_counter() - decoded)
    return b"K" + times + SIZE.pack(*image.size) + hashed, pixels


def _decode_light(
    data: bytes, looks: list[Looks], settings: dict[str, Any], header_seconds: float, heaviest: float, seconds: float
) -> tuple[bytes, list[NDArray[np.uint8]]]:
    """The same, of an image whose header says that it is light enough, in time."""
    with limited_time(header_seconds), limited_memory(BYTES_PER_PIXEL * settings["max_pixels"] + _SPARE):
        weight = weigh(data, max_pixels=settings["max_pixels"])
    if weight > heaviest:
        return HEAVY, []
    with limited_time(header_seconds + seconds * weight):
        return _decode(data, looks, settings)


def _taken(data: bytes, max_pixels: int) -> str:
    """When the photo was taken, "" where finding out costs more than an honest header does."""
    try:
        with limited_time(_HEADER_SECONDS), limited_memory(BYTES_PER_PIXEL * max_pixels + _SPARE):
            return taken_at(data)
    except (OutOfTime, MemoryError):
        return ""


def _take(message: bytes) -> bytes:
    """The bytes that a request names, or brings along."""
    kind, rest = message[:1], message[1:]
    if kind == HERE:
        return rest
    if kind == PART:
        offset, size = PLACE.unpack_from(rest)
        return _read(os.fsdecode(rest[PLACE.size :]), offset, size)
    return _read(os.fsdecode(rest))


def _read(path: str, offset: int = 0, size: int | None = None) -> bytes:
    try:
        # Not blocking: opening a pipe would wait for its writer.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("unreadable", "not a regular file")
            wanted = status.st_size if size is None else size
            if wanted > MAX_BYTES:
                raise too_many_bytes(wanted, MAX_BYTES)
            file.seek(offset)
            data = file.read(MAX_BYTES if size is None else size)
    except (OSError, ValueError) as error:
        raise unreadable(error) from error
    if size is not None and len(data) < size:
        raise ImageError("truncated", "the archive ends before the image does")
    return data


def unreadable(error: OSError | ValueError) -> ImageError:
    """The refusal of a file that the system does not give."""
    reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
    return ImageError(reason, getattr(error, "strerror", None) or str(error))
