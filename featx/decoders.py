"""Decoding many files at once, in processes of their own.

A decoder is native code that meets bytes from anywhere: now and then one takes its process down, or never
comes back. Here that costs the one file. Each worker is a child process that does nothing but read, hash and
decode; its pixels come back through shared memory. The child never imports torch, never unpickles, and does not
run the caller's main module, so a script needs no ``if __name__ == "__main__"``.

A child ends with its parent, however that ends: an idle one reads end-of-file, and one that hangs in a decoder is
ended by its own alarm, which the kernel delivers without asking the interpreter.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from featx._files import uninterrupted
from featx.decoder_child import DECODE, HERE, PART, PLACE, READ, READY, TIMES
from featx.errors import FeatxError, ImageError
from featx.fetchers import Fetchers, Fetching
from featx.images import MAX_PIXELS, Preprocess
from featx.origins import MAX_BYTES as MAX_BYTES
from featx.origins import Fetched, Origin, Part
from featx.views import CENTER, Looks

ATTEMPTS = 2
FETCH_AHEAD = 32
"""So many images that are no local files are in memory at a time, at most."""

_START_TIMEOUT = 60.0
_MAX_ANSWER = 65_536
TIMEOUT = 30.0
"""Seconds that one image may take; the slowest honest one (89 megapixels of PNG) takes about five."""


Seconds = tuple[float, float, float, float]
"""Time in a worker for reading, hashing, decoding and resizing."""


@dataclass(frozen=True)
class Decoded:
    """What became of one file: its pixels, or only its digest because its content is known, or a refusal."""

    digest: bytes | None
    pixels: NDArray[np.uint8] | None = None
    refusal: ImageError | None = None
    seconds: Seconds = (0.0, 0.0, 0.0, 0.0)


class DecoderPool:
    """``workers`` child processes that turn files, or what else an image's bytes are in, into pixels, in order.

    Parameters
    ----------
    preprocess : what the pixels are resized and cropped to.
    workers : number of processes.
    timeout : seconds after which a decoder counts as hanging.
    mode : of :data:`featx.images.DECODE_MODES`.
    max_pixels : a larger image is refused by its header.
    views : names of :data:`featx.views.VIEWS`; of several, an image's pixels are a stack (v, h, w, 3).
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
    ) -> None:
        self.preprocess, self.workers, self.timeout = preprocess, workers, timeout
        looks = Looks(preprocess, views)
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        self._children: list[_Child] = []
        try:
            for _ in range(workers):
                self._children.append(_Child(looks, timeout, mode, max_pixels))
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
            reason, digest = "decoder_crash", None
            for _ in range(ATTEMPTS):
                try:
                    return child.decode(request, known)
                except _Lost as lost:
                    reason, digest = lost.reason, lost.digest
                    child.restart()
            how = "took its process down" if reason == "decoder_crash" else f"did not end within {self.timeout:g} s"
            return Decoded(digest, refusal=ImageError(reason, f"the decoder {how}, {ATTEMPTS} times"))
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
        raise ImageError("bad_name", "the path is no text that a file system knows") from error


class _Lost(Exception):
    """The child is gone, or has to go."""

    def __init__(self, reason: str, digest: bytes | None) -> None:
        super().__init__(reason)
        self.reason, self.digest = reason, digest


class _Child:
    """One process, the socket to it, and the memory that it puts pixels into."""

    def __init__(self, looks: Looks, timeout: float, mode: str, max_pixels: int) -> None:
        self.looks, self.timeout, self.mode, self.max_pixels = looks, timeout, mode, max_pixels
        self.shape = looks.shape
        self._file = _shared_file(math.prod(self.shape))
        self._memory = mmap.mmap(self._file.fileno(), math.prod(self.shape))
        self._changing = threading.Lock()
        self._stopped = False
        try:
            self._start()
        except BaseException:
            self._memory.close()
            self._file.close()
            raise

    def _start(self) -> None:
        self._ready = False
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - what it says before it is ready, for the error message
        ours, theirs = socket.socketpair()
        with theirs:
            handles = (theirs.fileno(), self._file.fileno())
            try:
                self._process = subprocess.Popen(
                    # -P: a numpy.py in the working folder must not become part of the decoder.
                    [sys.executable, "-P", "-c", _MAIN, *map(str, handles), json.dumps([*map(str, sys.path)])],
                    pass_fds=handles,
                    stdin=subprocess.DEVNULL,
                    stderr=self._words,
                    # A group of its own: Ctrl-C is for the parent, which then ends the child.
                    process_group=0,
                )
            except OSError as error:
                ours.close()
                self._words.close()
                raise FeatxError(
                    f"a decoding process cannot be started ({error.strerror})",
                    where=sys.executable,
                    hint="Try fewer of them: --workers 1.",
                ) from error
        self._socket = Connection(ours.detach())
        said = {
            "preprocess": self.looks.preprocess.to_json(),
            "views": self.looks.views,
            "timeout": self.timeout,
            "mode": self.mode,
            "max_pixels": self.max_pixels,
        }
        with contextlib.suppress(OSError):  # it has ended already: _wait_until_ready says why
            self._socket.send_bytes(json.dumps(said).encode())

    def _wait_until_ready(self) -> None:
        """The first answer of a child. One that cannot even start is no fault of the image."""
        for attempt in range(ATTEMPTS):
            if self._ready or self._stopped:
                return
            if attempt:
                self.restart()  # something may have killed the first one, such as a lack of memory
            try:
                self._ready = self._socket.poll(_START_TIMEOUT) and self._socket.recv_bytes(_MAX_ANSWER) == READY
            except (EOFError, OSError):
                self._ready = False
        if not self._ready and not self._stopped:
            self._words.seek(0)
            words = self._words.read()[-2000:].decode(errors="replace").strip().splitlines()
            raise FeatxError(
                "a decoding process does not start",
                where=sys.executable,
                found=words[-1] if words else "no answer",
                hint="Does this Python import featx.decoder_child?",
            )

    def stop(self) -> None:
        """End the process, for good."""
        with self._changing:
            self._stopped = True
            self._end()

    def close(self) -> None:
        """Give back what a stopped child held; nobody may use it any more."""
        self._socket.close()
        self._words.close()
        self._memory.close()
        self._file.close()

    def restart(self) -> None:
        """Another process in place of this one."""
        with self._changing:
            self._end()
            if not self._stopped:
                self._socket.close()
                self._words.close()
                self._start()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

    def decode(self, request: bytes, known: Callable[[bytes], bool]) -> Decoded:
        """What becomes of one image; _Lost when the process does not survive it."""
        self._wait_until_ready()
        digest: bytes | None = None
        try:
            self._socket.send_bytes(request)
            answer = self._answer(digest)
            reading, decoding = (0.0, 0.0), (0.0, 0.0)
            if answer[:1] == b"D":
                digest, reading = answer[1:33], TIMES.unpack(answer[33:])
                if known(digest):
                    return Decoded(digest, seconds=(*reading, *decoding))
                self._socket.send_bytes(DECODE)
                answer = self._answer(digest)
            if answer[:1] == b"E":
                reason, message = json.loads(answer[1:])
                return Decoded(digest, refusal=ImageError(reason, message))
            decoding = TIMES.unpack(answer[1:])
        except (EOFError, OSError) as error:
            raise _Lost("decoder_crash", digest) from error
        pixels = np.frombuffer(self._memory, dtype=np.uint8).reshape(self.shape).copy()
        return Decoded(digest, pixels, seconds=(*reading, *decoding))

    def _answer(self, digest: bytes | None) -> bytes:
        if not self._socket.poll(self.timeout):
            raise _Lost("decoder_timeout", digest)
        return self._socket.recv_bytes(_MAX_ANSWER)


def _shared_file(size: int) -> BinaryIO:
    """An unlinked file: shared by descriptor, and gone with its users however they end."""
    for folder in ("/dev/shm", None):
        try:
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as the child
        except OSError:
            continue
        try:
            # Reserved now: a page that cannot be had later on would kill the decoder, as if by the image.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError:
            file.close()
            continue
        return file
    raise FeatxError("no room for temporary files", where=tempfile.gettempdir(), hint="Free some space, or set TMPDIR.")


_MAIN = """\
import json, sys
sys.path[:] = json.loads(sys.argv[3])
from featx.decoder_child import serve
serve(int(sys.argv[1]), int(sys.argv[2]))
"""
