"""Processes that work on shared arrays (joblib), and that leave nothing behind however this process ends.

By itself, a worker of joblib waits five minutes for more work after its parent was killed, with all its memory, and
the folder of arrays is removed only where joblib's tracker outlives them all.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pickle
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import joblib
from joblib.parallel import get_active_backend

from featx._files import temporary
from featx._system import end_with_parent, shared_memory
from featx.errors import UsageError

_LEAST = 2 * 10**9
"""Bytes that shared memory must have free to be used: joblib's own rule."""


@contextlib.contextmanager
def worker_pool(n_jobs: int) -> Iterator[joblib.Parallel]:
    """A pool of so many workers, of the backend that joblib is set to.

    Those of this machine (loky) end within a second of this process, and their arrays lie in a folder that the
    next pool removes if this process cannot.

    Raises
    ------
    UsageError
        There is no room for the arrays.
    """
    backend, _ = get_active_backend()
    here = n_jobs > 1 and type(backend).__name__ == "LokyBackend"
    folder = _folder() if here else None
    own = {"initializer": end_with_parent, "initargs": (os.getpid(),), "temp_folder": folder} if here else {}
    try:
        with joblib.Parallel(n_jobs=n_jobs, **own) as pool:
            yield pool
    except pickle.PicklingError as error:
        number = re.findall(
            r"^OSError: \[Errno (\d+)\]", str(error.__cause__), re.MULTILINE
        )  # all that joblib keeps of it
        if not number:
            raise
        raise UsageError(
            "no room for the arrays that parallel workers share",
            where="a temporary folder" if folder is None else Path(folder).parent.parent,
            found=os.strerror(int(number[-1])),
            hint="Set JOBLIB_TEMP_FOLDER to a folder with more room, or use one worker (--n-jobs 1), which needs none; "
            "then run the same command again.",
        ) from error


@functools.cache
def _folder() -> str | None:
    """A folder for arrays that goes with this process, or is removed by the next; None where joblib's own must do."""
    named = os.environ.get("JOBLIB_TEMP_FOLDER")
    above = Path(named) if named else shared_memory(_LEAST) or Path(tempfile.gettempdir())
    home = above / f"featx-{os.geteuid()}"
    stack = contextlib.ExitStack()
    for _ in range(10):
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = home.lstat()
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return None  # somebody else's, in a folder where anybody may make one
            folder = stack.enter_context(temporary(home / "arrays"))
            folder.mkdir(mode=0o700)
        except FileNotFoundError:
            stack.close()  # another process has just ended, and removed the empty home
        except OSError:
            stack.close()
            return None
        else:
            atexit.register(_leave, stack, home, os.getpid())
            return str(folder)
    return None


def _leave(stack: contextlib.ExitStack, home: Path, owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of it
    stack.close()
    with contextlib.suppress(OSError):
        home.rmdir()  # unless others are at work
