"""What differs between operating systems, and what only some of them have: processors, locks, limits of a process.

Nothing else in featx asks which system it runs on. Linux has all of it; macOS has locks and descriptors, and what it
lacks is left out, as each function says. Windows lacks the modules that are imported here.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

_LINUX = sys.platform == "linux"

_PDEATHSIG, _NO_NEW_PRIVS = 1, 38
"""Of prctl(2)."""

_LOOK = 0.5
"""Seconds between two looks at whether the parent is there."""


def available_cpus() -> int:
    """How many CPUs this process may run on, which on Linux can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_int8() -> bool:
    """Whether networks at eight bits are faster on this CPU, with the numbers of others: x86 with AVX2 or later.

    Only Linux says so. They were 1.4 times as fast as fp32 with AVX2, 1.7 times with AVX-512, and 3 with VNNI.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx2" in flags


@contextlib.contextmanager
def told_to_end(loop: AbstractEventLoop, end: Callable[[], None]) -> Iterator[None]:
    """Have an event loop call ``end`` for SIGTERM and for Ctrl-C, each time, in place of what they do."""
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def lock(handle: int, *, shared: bool = False) -> None:
    """Lock an open file or folder (flock), without waiting; the lock goes with the process, however that ends.

    Raises
    ------
    BlockingIOError
        Another process holds it.
    OSError
        The file system has no locks.
    """
    fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def confine() -> None:
    """Make this process end with its parent and never gain privileges; Linux only."""
    if _LINUX:
        kernel = ctypes.CDLL(None, use_errno=True)
        for option, value in ((_PDEATHSIG, signal.SIGKILL), (_NO_NEW_PRIVS, 1)):
            if kernel.prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3):
                raise OSError(ctypes.get_errno(), "prctl failed")


def stand_back() -> None:
    """Let this process run only while others leave a processor idle.

    Linux has a class for it, beside which the lowest priority still slows a network that computes on all processors;
    elsewhere the lowest priority has to do.
    """
    os.nice(19)
    if _LINUX:
        with contextlib.suppress(PermissionError):  # a sandbox may forbid to choose a class
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def end_with_parent(parent: int) -> None:
    """Make this process end within a second of its parent, the process ``parent``, by a thread that looks.

    Unlike :func:`confine`, this takes no notice of which thread of the parent has started it, nor when that ends.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def shared_memory(least: int) -> Path | None:
    """The folder of shared memory, where the system has one with so many bytes free."""
    folder = Path("/dev/shm")
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return folder if status.f_bsize * status.f_bavail >= least and os.access(folder, os.W_OK) else None


class OutOfTime(BaseException):
    """Raised where :func:`limited_time` is over; no ``except Exception`` on the way may take it for its own."""


@contextlib.contextmanager
def limited_time(seconds: float) -> Iterator[None]:
    """Let what follows have so much of a processor: then OutOfTime, as soon as native code returns to Python.

    For the main thread of a process that uses neither SIGVTALRM nor its timer for anything else.
    """
    inside = True

    def end(number: int, frame: object) -> None:
        if inside:
            raise OutOfTime

    signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        inside = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@contextlib.contextmanager
def limited_memory(more: int) -> Iterator[None]:
    """Let this process have no more than ``more`` bytes in addition: a MemoryError in place of a machine that swaps.

    Linux only: nothing else says how much address space a process has, and keeps to the limit.
    """
    if not _LINUX:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(os.pread(_own_size(), 32, 0).split()[0])
    most = pages * resource.getpagesize() + more
    if before[0] != resource.RLIM_INFINITY:
        most = min(most, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@functools.cache
def _own_size() -> int:
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


def allow_descriptors(wanted: int) -> int:
    """Raise the limit on open files to ``wanted`` or as far as the system lets it; the limit that holds then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    return wanted if soft == resource.RLIM_INFINITY else soft
