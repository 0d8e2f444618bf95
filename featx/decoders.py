"""Decoding many files at once, in processes of their own.

A decoder is native code that meets bytes from anywhere: now and then one takes its process down, or never
comes back. Here that costs the one file. Each worker is a child process that does nothing but read, hash and
decode; its pixels come back through shared memory. The child never imports torch, never unpickles, and does not
run the caller's main module, so a script needs no ``if __name__ == "__main__"``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import queue
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from featx.errors import ImageError
from featx.images import Preprocess, pixels

ATTEMPTS = 2
_READ, _DECODE = b"R", b"G"
TIMEOUT = 30.0
"""Seconds that one image may take; the slowest honest one (89 megapixels of PNG) takes about five."""


@dataclass(frozen=True)
class Decoded:
    """What became of one file: its pixels, or only its digest because its content is known, or a refusal."""

    digest: bytes | None
    pixels: NDArray[np.uint8] | None = None
    refusal: ImageError | None = None


class DecoderPool:
    """``workers`` child processes that turn files into pixels, in order.

    Parameters
    ----------
    preprocess : what the pixels are resized and cropped to.
    workers : number of processes.
    timeout : seconds after which a decoder counts as hanging.
    """

    def __init__(self, preprocess: Preprocess, *, workers: int, timeout: float = TIMEOUT) -> None:
        self.preprocess, self.workers, self.timeout = preprocess, workers, timeout
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        self._children = [_Child(preprocess) for _ in range(workers)]
        for child in self._children:
            self._idle.put(child)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="featx-decode")

    def __enter__(self) -> DecoderPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children:
            child.stop()  # a thread that waits for it gets EOF, and ends
        self._threads.shutdown(wait=True, cancel_futures=True)
        for child in self._children:
            child.close()

    def run(self, paths: Iterable[Path], known: Callable[[bytes], bool], *, ahead: int) -> Iterator[Decoded]:
        """Yield what became of each path, in order, working up to ``ahead`` files ahead of the consumer.

        ``known(digest)`` says whether that content needs no decoding; it is called from several threads.
        """
        waiting: deque[Future[Decoded]] = deque()
        for path in paths:
            waiting.append(self._threads.submit(self._one, path, known))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _one(self, path: Path, known: Callable[[bytes], bool]) -> Decoded:
        child = self._idle.get()
        try:
            reason, digest = "decoder_crash", None
            for _ in range(ATTEMPTS):
                try:
                    return child.decode(path, known, self.timeout)
                except _Lost as lost:
                    reason, digest = lost.reason, lost.digest
                    child.restart()
            how = "took its process down" if reason == "decoder_crash" else f"did not end within {self.timeout:g} s"
            return Decoded(digest, refusal=ImageError(reason, f"the decoder {how}, {ATTEMPTS} times"))
        finally:
            self._idle.put(child)


class _Lost(Exception):
    """The child is gone, or has to go."""

    def __init__(self, reason: str, digest: bytes | None) -> None:
        super().__init__(reason)
        self.reason, self.digest = reason, digest


class _Child:
    """One process, the socket to it, and the memory that it puts pixels into."""

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess
        self.shape = (*preprocess.crop, 3)
        # An unlinked file: shared by descriptor, and gone with its users however they end.
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as the child
        size = int(np.prod(self.shape))
        self._file.truncate(size)
        self._memory = mmap.mmap(self._file.fileno(), size)
        self._stopped = False
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parent.parent)
        inherited = os.environ.get("PYTHONPATH")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "featx.decoders", str(theirs.fileno()), str(self._file.fileno())],
                pass_fds=(theirs.fileno(), self._file.fileno()),
                stdin=subprocess.DEVNULL,
                # A group of its own: Ctrl-C is for the parent, which then ends the child.
                process_group=0,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([root, inherited] if inherited else [root])},
            )
        self._socket = Connection(ours.detach())
        self._socket.send_bytes(json.dumps(self.preprocess.to_json()).encode())

    def stop(self) -> None:
        self._stopped = True
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self._socket.close()
        self._memory.close()
        self._file.close()

    def restart(self) -> None:
        self._process.kill()
        self._process.wait()
        self._socket.close()
        if not self._stopped:
            self._start()

    def decode(self, path: Path, known: Callable[[bytes], bool], timeout: float) -> Decoded:
        digest: bytes | None = None
        try:
            self._socket.send_bytes(_READ + os.fsencode(path))
            answer = self._answer(timeout, digest)
            if answer[:1] == b"D":
                digest = answer[1:]
                if known(digest):
                    return Decoded(digest)
                self._socket.send_bytes(_DECODE)
                answer = self._answer(timeout, digest)
            if answer[:1] == b"E":
                reason, message = json.loads(answer[1:])
                return Decoded(digest, refusal=ImageError(reason, message))
        except (EOFError, OSError) as error:
            raise _Lost("decoder_crash", digest) from error
        pixels = np.frombuffer(self._memory, dtype=np.uint8).reshape(self.shape).copy()
        return Decoded(digest, pixels)

    def _answer(self, timeout: float, digest: bytes | None) -> bytes:
        if not self._socket.poll(timeout):
            raise _Lost("decoder_timeout", digest)
        return self._socket.recv_bytes()


def serve(socket_handle: int, memory_handle: int) -> None:
    """The child's side: answer requests until the parent is gone."""
    with contextlib.suppress(EOFError, ConnectionError), Connection(socket_handle) as parent:
        preprocess = Preprocess.from_json(json.loads(parent.recv_bytes()))
        memory = mmap.mmap(memory_handle, 0)
        out = np.frombuffer(memory, dtype=np.uint8).reshape((*preprocess.crop, 3))
        data = b""
        while True:
            message = parent.recv_bytes()
            if message == _DECODE:
                try:
                    out[...] = pixels(data, preprocess)
                    parent.send_bytes(b"K")
                except ImageError as error:
                    parent.send_bytes(b"E" + json.dumps([error.reason, error.what]).encode())
                continue
            try:
                data = Path(os.fsdecode(message[1:])).read_bytes()
                parent.send_bytes(b"D" + hashlib.sha256(data).digest())
            except OSError as error:
                reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
                parent.send_bytes(b"E" + json.dumps([reason, error.strerror or str(error)]).encode())


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
