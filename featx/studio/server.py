"""Running the studio: one window's server on this machine, ended by Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from featx._system import told_to_end
from featx.studio.address import LastAddress
from featx.studio.app import Studio, create_app


class Server(uvicorn.Server):
    """uvicorn's server, which lets windows go before it waits for their connections."""

    def __init__(self, config: uvicorn.Config, studio: Studio, started: Callable[[], Any]) -> None:
        super().__init__(config)
        self._studio, self._started = studio, started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end it in order; both are how it is meant to end."""
        with told_to_end(asyncio.get_running_loop(), self._end):
            yield

    def _end(self) -> None:
        self._studio.events.close()
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell when requests are answered."""
        await super().startup(sockets)
        if self.started:  # older versions of uvicorn return from a start that fails
            await asyncio.to_thread(self._started)


def run(studio: Studio, *, port: int, started: Callable[[str], Any]) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Parameters
    ----------
    studio : what answers; it is closed in the end.
    port : 0 takes a free one; after a crash the one of before, where that is free.
    started : called with the address once requests are answered.

    Raises
    ------
    UsageError
        The port cannot be had.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    last = LastAddress.of(studio.setup.root if studio.session is None else studio.session.project.folder)
    listener = last.listen(port)
    config = uvicorn.Config(
        create_app(studio, last.token), ws="none", lifespan="on", log_config=None, access_log=False,
        server_header=False, timeout_graceful_shutdown=3,
    )  # fmt: skip
    server = Server(config, studio, lambda: started(last.url))
    try:
        with listener:
            asyncio.run(server.serve(sockets=[listener]))
        last.forget()
    finally:
        studio.close()
