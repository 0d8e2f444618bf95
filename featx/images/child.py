"""Processes that meet what comes from outside, so that native code that cannot bear it takes nothing else down.

A child runs the function ``serve(handle)`` of one module of featx and speaks by messages over a socket; nothing that it
says is unpickled. It does not run the caller's main module, so a script needs no ``if __name__ == "__main__"``.

A child ends with its parent, however that ends: Linux kills it. It knows no secrets: its environment holds only what
Python and its libraries need to start, and it can gain no privileges.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, ClassVar

from featx.errors import FeatxError

ATTEMPTS = 2
"""How often a child is asked, or started: something may have killed the first one, such as a lack of memory."""

READY = b"!"
"""A child's first word."""

_START_TIMEOUT = 60.0

_ENVIRONMENT = (
    *("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "PYTHONHOME", "PYTHONPATH", "PYTHONUTF8"),
    *("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH"),
)
"""All that a child learns of the parent's environment."""


def start_process(module: str, **options: Any) -> tuple[subprocess.Popen[bytes], Connection]:
    """A Python process that runs ``serve(handle)`` of a module of featx, and the socket to it.

    Parameters
    ----------
    options : as of Popen.

    Raises
    ------
    OSError
        There can be none.
    """
    main = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    main += f"from {module} import serve; serve(int(sys.argv[1]))"
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            process = subprocess.Popen(
                # -P: a numpy.py in the working folder must not become part of it.
                [sys.executable, "-P", "-c", main, str(theirs.fileno()), json.dumps([*map(str, sys.path)])],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is for the parent, which then ends the child
                **options,
            )
    except BaseException:  # of Ctrl-C, too: a process that has begun reads its end, and ends
        ours.close()
        raise
    return process, Connection(ours.detach())


class Child:
    """One process, and the socket to it.

    Parameters
    ----------
    settings : the first message to it.
    """

    module: ClassVar[str]
    """Whose ``serve`` it runs."""

    what: ClassVar[str]
    """The process in words."""

    missing: ClassVar[type[FeatxError]]
    """The error for one that cannot be had."""

    fewer: ClassVar[str | None] = None
    """What to try where the system lets no more processes start."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._changing = threading.Lock()
        self._stopped = False
        self._start()

    def _start(self) -> None:
        self._ready = False
        try:
            self._process, self._socket = start_process(
                self.module,
                stderr=subprocess.PIPE,  # what it says before it is ready, for the error message
                env=_environment(),
            )
        except OSError as error:
            raise self.missing(
                f"{self.what} cannot be started ({error.strerror})", where=sys.executable, hint=self.fewer
            ) from error
        with contextlib.suppress(OSError):  # it has ended already: wait_until_ready says why
            self._socket.send_bytes(json.dumps(self._settings).encode())

    def wait_until_ready(self) -> None:
        """The first answer of a child; one that has ended meanwhile is started anew.

        One that cannot even start is no fault of what it is to read: the error is ``missing``.
        """
        for _ in range(ATTEMPTS):
            if not self._stopped and self._process.poll() is not None:
                self._restart()
            if self._ready or self._stopped:
                return
            try:
                self._ready = self._socket.poll(_START_TIMEOUT) and self._socket.recv_bytes(len(READY)) == READY
            except (EOFError, OSError):
                self._ready = False
            if self._ready:
                return
            self.end()
        if not self._stopped:
            assert self._process.stderr is not None
            words = self._process.stderr.read()[-2000:].decode(errors="replace").strip().splitlines()
            raise self.missing(
                f"{self.what} does not start",
                where=sys.executable,
                found=words[-1] if words else "no answer",
                hint=f"Does this Python import {self.module}?",
            )

    def stop(self) -> None:
        """End the process, for good."""
        with self._changing:
            self._stopped = True
            self._end()

    def close(self) -> None:
        """Give back what an ended child held; nobody may use it any more."""
        assert self._process.stderr is not None
        self._process.stderr.close()
        self._socket.close()

    def end(self) -> int:
        """End the process; another takes its place when it is needed. The code that it ended with."""
        with self._changing:
            return self._end()

    def _restart(self) -> None:
        with self._changing:
            if not self._stopped:
                self.close()
                self._start()

    def _end(self) -> int:
        self._process.kill()
        return self._process.wait()


def speak_to_nobody() -> None:
    """In a child that is ready: what native code says is lost. Libtiff has much to say of sound files."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    return {**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
