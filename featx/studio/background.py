"""Work beside the page: done again when something has changed, once for any number of changes meanwhile."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from featx.errors import FeatxError

log = logging.getLogger("featx.studio")


class Again:
    """A thread that does one piece of work whenever it is asked to.

    Parameters
    ----------
    work : what to do; asked for while it runs, it is done once more.
    wait : seconds without another asking before it begins.
    failed : called with what went wrong.
    """

    def __init__(self, name: str, work: Callable[[], None], failed: Callable[[Exception], None], wait: float = 0.0):
        self.work, self.failed, self.wait = work, failed, wait
        self._asked = threading.Event()
        self._ended = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """Have it done, soon."""
        self._idle.clear()
        self._asked.set()

    @property
    def asked_again(self) -> bool:
        """Whether what is being done is out of date already, for the work to look at."""
        return self._asked.is_set() or self._ended.is_set()

    def finish(self, timeout: float) -> bool:
        """Wait until nothing is left to do; whether that came in ``timeout`` seconds."""
        return self._idle.wait(timeout)

    def end(self) -> None:
        """Begin nothing more."""
        self._ended.set()
        self._asked.set()

    def _run(self) -> None:
        while True:
            self._asked.wait()
            while not self._ended.is_set():
                self._asked.clear()
                if not self._asked.wait(self.wait):
                    break
            if self._ended.is_set():
                self._idle.set()
                return
            try:
                self.work()
            except Exception as error:
                log.error("%s failed: %s", self._thread.name, error, exc_info=not isinstance(error, FeatxError))
                self.failed(error)
            if not self._asked.is_set():
                self._idle.set()
