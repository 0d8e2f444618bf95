"""Running the studio: one window's server on this machine, ended by Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from featx.backbones import cache_folder
from featx.errors import UsageError
from featx.service import listen
from featx.studio.app import Studio, create_app

HOST = "127.0.0.1"


class Server(uvicorn.Server):
    """uvicorn's server, which lets windows go before it waits for their connections."""

    def __init__(self, config: uvicorn.Config, studio: Studio) -> None:
        super().__init__(config)
        self._studio = studio

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end it in order; both are how it is meant to end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _end(self) -> None:
        self._studio.events.close()
        self.should_exit = True

    async def tell(self, say: Callable[[], Any]) -> None:
        """Tell when requests are answered."""
        while not self.started:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(say)


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
    def of(cls, studio: Studio) -> LastAddress:
        """That of what is open, or of the root."""
        about = studio.setup.root if studio.session is None else studio.session.project.folder
        name = hashlib.sha256(os.fsencode(about)).hexdigest()[:32]
        return cls(cache_folder() / "studio" / f"{name}.json")

    def listen(self, port: int) -> socket.socket:
        """A socket at a port; for 0 at the last one where it is free."""
        if not port and self.port:
            with contextlib.suppress(UsageError):
                return listen(HOST, self.port)
        return listen(HOST, port)

    def keep(self, port: int, token: str) -> None:
        """Keep them for the next time; where that cannot be done, a window has to be opened anew then."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)  # with whatever rights it had
            with os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump({"port": port, "token": token}, file)


def run(studio: Studio, *, port: int, started: Callable[[str], Any]) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Parameters
    ----------
    studio : what answers; it is closed in the end.
    port : 0 takes a free one; the last one of this project, where that is free.
    started : called with the address once requests are answered.

    Raises
    ------
    UsageError
        The port cannot be had.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    last = LastAddress.of(studio)
    token = last.token or secrets.token_urlsafe(24)
    listener = last.listen(port)
    last.keep(listener.getsockname()[1], token)
    config = uvicorn.Config(
        create_app(studio, token), ws="none", lifespan="on", log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=3,
    )  # fmt: skip
    server = Server(config, studio)
    url = f"http://{HOST}:{listener.getsockname()[1]}/?token={token}"

    async def serve() -> None:
        telling = asyncio.get_running_loop().create_task(server.tell(lambda: started(url)))
        await server.serve(sockets=[listener])
        telling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await telling

    try:
        with listener:
            asyncio.run(serve())
    finally:
        studio.close()
