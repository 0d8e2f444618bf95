"""Decoding many files at once, in processes of their own.

A decoder is native code that meets bytes from anywhere: now and then one takes its process down, or never
comes back. Here that costs the one file. Each worker is a child process (:mod:`featx.images.child`) that does nothing
but read, hash and decode; bytes and pixels travel through a socket, so that no temporary file is needed. The child
never imports torch.

Where no kernel ends a child with its parent, an idle one reads end-of-file, and one that hangs in a decoder is ended by
its own alarm, which the kernel delivers without asking the interpreter.

A child's memory is limited while it decodes. Its time is limited by the clock and not by RLIMIT_CPU, which would
also count the threads of a decoder that uses several cores. There is no seccomp filter: Python's binding needs a system
library that wheels do not bring, and no released package offers Landlock.
"""

from __future__ import annotations

import json
import math
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx._files import uninterrupted
from featx.errors import FeatxError, ImageError
from featx.images.child import ATTEMPTS, Child
from featx.images.decoder import DECODE, DECODE_LIGHT, HEAVY, HERE, LATE, LIMITS, PART, PLACE, READ, SIZE, TIMES
from featx.images.fetchers import Fetchers, Fetching
from featx.images.origin import MAX_BYTES as MAX_BYTES, Fetched, Origin, Part
from featx.images.pixels import MAX_PIXELS, Preprocess
from featx.images.views import CENTER, Looks

FETCH_AHEAD = 32
"""So many images that are no local files are in memory at a time, at most."""

_MAX_ANSWER = 65_536

_GRACE = 1.0
"""Seconds for which a decoder goes on for a caller that has left: most images cost less than another process."""

_STEP = 0.1
"""Seconds between two looks at whether the caller is still there."""

TIMEOUT = 30.0
"""Seconds that one image may take; the slowest honest one (89 megapixels of PNG) takes about five."""

HEADER_SECONDS = 0.1
"""Of a processor, to read a header with its metadata, where strangers are served; an honest one takes 2 ms."""

LIGHT_HEADER_SECONDS = 0.01
"""The same for an image that is not to be heavy; kernels count in steps of some milliseconds."""

SECONDS_A_PIXEL = 1e-6
"""Of a processor, in addition, to decode; the slowest formats take a tenth."""

Seconds = tuple[float, float, float, float]
"""Time in a worker for reading, hashing, decoding and resizing."""


@dataclass(frozen=True)
class Decoded:
    """What became of one file: its pixels, or only its digest because its content is known, or a refusal.

    Attributes
    ----------
    pixels : for the pool's own preprocessing and views.
    others : for each further look of the pool; None for those that were not wanted.
    phash : the perceptual hash, of a pool that makes them.
    size : (width, height) of the upright image; (0, 0) where it was not decoded.
    taken : when the photo was taken (:func:`featx.images.exif.taken_at`), of a pool that reads dates.
    """

    digest: bytes | None
    pixels: NDArray[np.uint8] | None = None
    refusal: ImageError | None = None
    seconds: Seconds = (0.0, 0.0, 0.0, 0.0)
    others: tuple[NDArray[np.uint8] | None, ...] = ()
    phash: bytes = b""
    size: tuple[int, int] = (0, 0)
    taken: str = ""


class NoDecoder(FeatxError):
    """No decoding process can be had now, which says nothing about the image."""


class TooHeavy(Exception):
    """The image costs more than the caller wants to spend here."""


class DecoderPool:
    """``workers`` child processes that turn files, or what else an image's bytes are in, into pixels, in order.

    Parameters
    ----------
    preprocess : what the pixels are resized and cropped to.
    workers : number of processes.
    timeout : seconds after which a decoder counts as hanging.
    mode : of :data:`featx.images.pixels.DECODE_MODES`.
    max_pixels : a larger image is refused by its header.
    views : names of :data:`featx.images.views.VIEWS`; of several, an image's pixels are a stack (v, h, w, 3).
    background : let the processes run only while others leave a processor idle.
    others : further ways to look at each image, which is decoded once for all.
    wanted : called with a digest, from several threads; the places of what is wanted of this content, 0 for the pool's
        own pixels and 1 and up for ``others``; where there are none, it is not decoded. By default all of them.
    hashed : make the perceptual hash of each image, too.
    dated : read when each photo was taken, too.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        *,
        workers: int,
        timeout: float = TIMEOUT,
        mode: str = "full",
        max_pixels: int = MAX_PIXELS,
        views: Sequence[str] = CENTER,
        background: bool = False,
        others: Sequence[Looks] = (),
        wanted: Callable[[bytes], Sequence[int]] | None = None,
        hashed: bool = False,
        dated: bool = False,
    ) -> None:
        self.preprocess, self.workers, self.timeout = preprocess, workers, timeout
        looks = (Looks(preprocess, views), *others)
        settings = {
            "looks": [{"preprocess": each.preprocess.to_json(), "views": each.views} for each in looks],
            "timeout": timeout,
            "mode": mode,
            "max_pixels": max_pixels,
            "background": background,
            "hashed": hashed,
            "dated": dated,
        }
        every = tuple(range(len(looks)))
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        self._children: list[_Child] = []
        try:
            for _ in range(workers):
                child = _Child(settings, [each.shape for each in looks], wanted or (lambda digest: every))
                self._children.append(child)
        except BaseException:
            for child in self._children:
                child.stop()
                child.close()
            raise
        for child in self._children:
            self._idle.put(child)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="featx-decode")
        self._fetchers: dict[int, Fetchers] = {}

    def __enter__(self) -> DecoderPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with uninterrupted():
            for child in self._children:
                child.stop()  # a thread that waits for it gets EOF, and ends
            for fetchers in self._fetchers.values():
                fetchers.stop()
            self._threads.shutdown(wait=True, cancel_futures=True)
            for child in self._children:
                child.close()

    def run(self, origins: Iterable[Origin], known: Callable[[bytes], bool], *, ahead: int) -> Iterator[Decoded]:
        """Yield what became of each image, in order, working up to ``ahead`` images ahead of the consumer.

        ``known(digest)`` says whether that content needs no decoding; it is called from several threads.

        Raises
        ------
        SourceError
            What has the images does not answer any more.
        """
        waiting: deque[Future[Decoded]] = deque()
        for origin in origins:
            fetching = self._fetch(origin) if isinstance(origin, Fetched) else None
            waiting.append(self._threads.submit(self._one, origin, fetching, known))
            while len(waiting) >= (ahead if fetching is None else min(ahead, FETCH_AHEAD)):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _fetch(self, origin: Fetched) -> Fetching:
        # Other threads than those that wait for a child, so that a slow network does not idle the decoders.
        if origin.parallel not in self._fetchers:
            self._fetchers[origin.parallel] = Fetchers(origin.parallel)
        return self._fetchers[origin.parallel].submit(origin)

    def _one(self, origin: Origin, fetching: Fetching | None, known: Callable[[bytes], bool]) -> Decoded:
        try:
            data, waited = fetching.result() if fetching is not None else (b"", 0.0)
            request = HERE + data if fetching is not None else _request(origin)
        except ImageError as refusal:
            return Decoded(None, refusal=refusal)
        decoded = self._decode(request, known)
        reading, hashing, decoding, resizing = decoded.seconds
        return replace(decoded, seconds=(reading + waited, hashing, decoding, resizing))

    def _decode(self, request: bytes, known: Callable[[bytes], bool]) -> Decoded:
        child = self._idle.get()
        try:
            for attempt in range(ATTEMPTS):
                try:
                    return child.decode(request, known)
                except _Lost as lost:
                    child.end()
                    if attempt == ATTEMPTS - 1:
                        return Decoded(lost.digest, refusal=self._refusal(lost, " twice"))
                except BaseException:
                    child.end()  # the rest of what it says would be taken for an answer about the next image
                    raise
            raise AssertionError("unreachable")
        finally:
            self._idle.put(child)

    def _refusal(self, lost: _Lost, often: str = "") -> ImageError:
        if lost.reason == "decoder_crash":
            return ImageError(lost.reason, f"the decoder ended{often} on this image")
        return ImageError(lost.reason, f"the decoder did not finish within {self.timeout:g} s{often and ', twice'}")

    def prepare(self) -> None:
        """Wait until a process is ready, and start it anew if it has ended; NoDecoder where that fails."""
        child = self._idle.get()
        try:
            child.wait_until_ready()
        finally:
            self._idle.put(child)

    def decode(self, data: bytes, *, wanted: Callable[[], bool], heaviest: float = math.inf) -> Decoded | None:
        """What becomes of an image file's bytes, without a second try; None when they were not wanted any more.

        What takes far more of a processor than its pixels account for is refused as "too_costly".

        Parameters
        ----------
        wanted : asked now and then; when it says no, the work is ended.
        heaviest : an image with a larger weight (:func:`featx.images.pixels.weigh`) raises TooHeavy before it is
            decoded, and one with a costly header (or other metadata) as soon as that shows.

        Raises
        ------
        NoDecoder
            There is no process, and none can be started.
        TooHeavy
            See ``heaviest``.
        """
        child = self._idle.get()
        try:
            for _ in range(ATTEMPTS):
                try:
                    return child.decode_light(data, wanted, heaviest)
                except TooHeavy:  # all that it had to say
                    raise
                except _Lost as lost:
                    child.end()
                    if lost.reason == _UNWANTED:
                        return None
                    refused = Decoded(lost.digest, refusal=self._refusal(lost))
                    if lost.digest is not None or lost.reason != "decoder_crash":
                        break
                    # It ended before any decoder saw the bytes, so something else killed it.
                except BaseException:
                    child.end()  # as above
                    raise
            return refused
        finally:
            self._idle.put(child)


def _request(origin: Origin) -> bytes:
    """What a child is asked for a file or a part of one."""
    if not isinstance(origin, Path | Part):
        raise TypeError(f"an image's origin must be a Path, a Part or Fetched, got {type(origin).__name__}")
    try:
        if isinstance(origin, Part):
            return PART + PLACE.pack(origin.offset, origin.size) + os.fsencode(origin.path)
        return READ + os.fsencode(origin)
    except UnicodeEncodeError as error:
        raise ImageError("bad_name", "the path is not one that a file system can hold") from error


class _Lost(Exception):
    """The child is gone, or has to go."""

    def __init__(self, reason: str, digest: bytes | None) -> None:
        super().__init__(reason)
        self.reason, self.digest = reason, digest


_UNWANTED = "unwanted"


def _read_digest(answer: bytes) -> tuple[bytes, tuple[float, float], str]:
    """The digest of an image, the seconds of reading and hashing it, and when the photo was taken."""
    reading, hashing = TIMES.unpack_from(answer, 33)
    return answer[1:33], (reading, hashing), answer[33 + TIMES.size :].decode()


def _refused(answer: bytes, digest: bytes | None) -> Decoded:
    reason, message = json.loads(answer[1:])
    return Decoded(digest, refusal=ImageError(reason, message))


_COSTLY = "its header or metadata is far larger than a photo's; save it again with any program"


class _Child(Child):
    """One decoding process."""

    module, what, missing = "featx.images.decoder", "a decoding process", NoDecoder
    fewer = "Try fewer of them: --workers 1."

    def __init__(
        self,
        settings: Mapping[str, Any],
        shapes: Sequence[tuple[int, ...]],
        places: Callable[[bytes], Sequence[int]],
    ) -> None:
        self.timeout, self._shapes, self._places = settings["timeout"], shapes, places
        super().__init__(settings)

    def decode(self, request: bytes, known: Callable[[bytes], bool]) -> Decoded:
        """What becomes of one image, which is decoded if its content is new; _Lost when the process ends on it."""
        self.wait_until_ready()
        digest: bytes | None = None
        try:
            self._socket.send_bytes(request)
            answer = self._answer(digest)
            if answer[:1] == b"E":
                return _refused(answer, None)
            digest, reading, taken = _read_digest(answer)
            places = () if known(digest) else self._places(digest)
            if not places:
                return Decoded(digest, seconds=(*reading, 0.0, 0.0), taken=taken)
            self._socket.send_bytes(DECODE + bytes(places))
            return self._decoded(digest, self._answer(digest), places, reading, taken)
        except (EOFError, OSError) as error:
            raise _Lost("decoder_crash", digest) from error

    def decode_light(self, data: bytes, wanted: Callable[[], bool], heaviest: float) -> Decoded:
        """What becomes of an image file's bytes, within limits; TooHeavy, _Lost when the process ends on it."""
        self.wait_until_ready()
        digest: bytes | None = None
        light = heaviest < math.inf
        header_seconds = LIGHT_HEADER_SECONDS if light else HEADER_SECONDS
        places = range(len(self._shapes))
        try:
            # All at once: each wait for the other process would cost as much as decoding a small photo.
            self._socket.send_bytes(HERE + data)
            self._socket.send_bytes(
                DECODE_LIGHT + LIMITS.pack(header_seconds, heaviest, SECONDS_A_PIXEL) + bytes(places)
            )
            digest, reading, taken = _read_digest(self._answer(digest, wanted))
            answer = self._answer(digest, wanted)
            if answer == HEAVY or (answer == LATE and light):
                raise TooHeavy
            if answer == LATE:
                return Decoded(digest, refusal=ImageError("too_costly", _COSTLY))
            return self._decoded(digest, answer, places, reading, taken)
        except (EOFError, OSError) as error:
            raise _Lost("decoder_crash", digest) from error

    def _decoded(
        self, digest: bytes, answer: bytes, places: Sequence[int], reading: tuple[float, float], taken: str
    ) -> Decoded:
        """What a child's answer says, with the pixels that follow it."""
        if answer[:1] == b"E":
            return _refused(answer, digest)
        decoding = TIMES.unpack(answer[1 : 1 + TIMES.size])
        pixels: list[NDArray[np.uint8] | None] = [None] * len(self._shapes)
        for place in places:
            one = np.empty(self._shapes[place], dtype=np.uint8)
            self._fill(one.data.cast("B"))
            pixels[place] = one
        width, height = SIZE.unpack_from(answer, 1 + TIMES.size)
        phash = answer[1 + TIMES.size + SIZE.size :]
        return Decoded(
            digest, pixels[0], seconds=(*reading, *decoding), others=tuple(pixels[1:]), phash=phash,
            size=(width, height), taken=taken,
        )  # fmt: skip

    def _answer(self, digest: bytes | None, wanted: Callable[[], bool] | None = None) -> bytes:
        started = time.monotonic()
        wait = self.timeout if wanted is None else min(_GRACE, self.timeout)
        while not self._socket.poll(wait):
            left = started + self.timeout - time.monotonic()
            if left <= 0:
                raise _Lost("decoder_timeout", digest)
            if wanted is not None and not wanted():
                raise _Lost(_UNWANTED, digest)
            wait = min(_STEP, left)
        return self._socket.recv_bytes(_MAX_ANSWER)

    def _fill(self, pixels: memoryview) -> None:
        # Past the Connection, which would copy them three times.
        while pixels:
            read = os.readv(self._socket.fileno(), [pixels])
            if not read:
                raise EOFError
            pixels = pixels[read:]
