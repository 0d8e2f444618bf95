"""Where the studio of a project answered last: its port and its token."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from pathlib import Path

from featx.backbones import cache_folder
from featx.errors import UsageError
from featx.service import listen

HOST = "127.0.0.1"


class LastAddress:
    """The port and the token that a project had last: with them again, a window that is still open goes on.

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
        """A socket at a port; for 0 at the last one where it is free."""
        if not port and self.port:
            with contextlib.suppress(UsageError):
                return listen(HOST, self.port)
        return listen(HOST, port)

    def keep(self, port: int, token: str) -> None:
        """Keep them for the next time; where that cannot be done, a window has to be opened anew then."""
        self.port, self.token = port, token
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)  # with whatever rights it had
            with os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump({"port": port, "token": token}, file)
