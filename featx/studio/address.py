"""Where the studio of a project answers: kept while it runs, and so found again after a crash.

A studio that ends in order forgets its token. One that finds its port taken gets another token, too: a window that is
still open shows its cookie to whoever listens there now.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import socket
from pathlib import Path

from featx.backbones import cache_folder
from featx.errors import UsageError
from featx.service import listen

HOST = "127.0.0.1"


class LastAddress:
    """The port and the token of a project: with them again, a window that is still open after a crash goes on.

    Parameters
    ----------
    path : a file that only its owner can read; any other is not believed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.port, self.token = 0, ""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid == os.geteuid() and not status.st_mode & 0o077:
                kept = json.load(file)
                self.port, self.token = int(kept["port"]), str(kept["token"])

    @classmethod
    def of(cls, folder: Path) -> LastAddress:
        """That of a project's folder; or of the root, of a studio that was started without photos."""
        name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]
        return cls(cache_folder() / "studio" / f"{name}.json")

    @property
    def url(self) -> str:
        """What a browser opens; "" where nothing was kept."""
        return f"http://{HOST}:{self.port}/?token={self.token}" if self.token else ""

    def listen(self, port: int) -> socket.socket:
        """A socket at a port, for 0 at the last one where it is free; at any other the token is a new one."""
        listener = None
        if not port and self.port:
            with contextlib.suppress(UsageError):
                listener = listen(HOST, self.port)
        listener = listener or listen(HOST, port)
        found = int(listener.getsockname()[1])
        if found != self.port or not self.token:
            self.port, self.token = found, secrets.token_urlsafe(24)
        self._keep()
        return listener

    def forget(self) -> None:
        """Nobody needs them any more."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _keep(self) -> None:
        """Where that cannot be done, a window has to be opened anew after a crash."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)  # with whatever rights it had
            with os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump({"port": self.port, "token": self.token}, file)
