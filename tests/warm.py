"""Commands in processes that have imported everything already: real processes, forked from one that waits.

Starting Python and importing scikit-learn, torch and matplotlib takes most of the time of a short command, and the
suite runs hundreds. What a command does, prints and exits with is that of ``python -W error -m featx``, in an
environment of its own, too; tests about the start itself start Python anew. Servers are started in the same way.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import BinaryIO

SOCKET = "FEATX_WARM_SOCKET"
"""Variable that names the server's socket for the program ``featx`` of :meth:`Warm.program`."""

_COUNTING = "COVERAGE_PROCESS_CONFIG"

_SERVER = "import sys; sys.path.insert(0, sys.argv.pop(1)); import warm; warm.serve(sys.argv.pop(1))"


class Warm:
    """The process that waits; a context manager.

    Parameters
    ----------
    folder : an empty one for its socket, with a short path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "s"

    def __enter__(self) -> Warm:
        command = [sys.executable, "-W", "error", "-c", _SERVER, str(Path(__file__).parent), str(self.socket)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}  # a process with threads cannot be forked safely
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()

    def run(
        self, arguments: list[str], cwd: Path | None, env: Mapping[str, str], timeout: float, first: str = ""
    ) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of one command; ``first`` is Python that its process runs before it."""
        with self.begin(arguments, cwd, env, first) as process:
            out, err = process.communicate(timeout)
        return process.wait(), out, err

    def begin(
        self,
        arguments: list[str],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        first: str = "",
        script: str = "",
    ) -> Started:
        """Begin a command, or a script of Python; ``communicate`` gives what it printed."""
        out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (closed when they are read)
        process = self.start(arguments, out.fileno(), err.fileno(), cwd=cwd, env=env, first=first, script=script)
        process.printed = out, err
        return process

    def start(
        self,
        arguments: list[str],
        out: int,
        err: int,
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        first: str = "",
        script: str = "",
    ) -> Started:
        """Begin a command, or a script of Python, that writes to these descriptors."""
        job = {"arguments": arguments, "cwd": str(cwd or Path.cwd()), "env": dict(env or os.environ)}
        with open(os.devnull) as nothing:  # noqa: PTH123
            return Started(str(self.socket), {**job, "first": first, "script": script}, [nothing.fileno(), out, err])

    def program(self) -> Path:
        """A folder with a program ``featx`` that lets this process do it."""
        folder = self.folder / "bin"
        folder.mkdir(exist_ok=True)
        text = f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        (folder / "featx").write_text(f"{text}import warm\nwarm.pass_on()\n")
        (folder / "featx").chmod(0o755)
        return folder


@cache
def shared() -> Warm:
    """The one of this process, for all tests; it is told to end by :func:`end_shared`, or when this process ends."""
    return Warm(Path(tempfile.mkdtemp(prefix="featx-"))).__enter__()


def end_shared() -> None:
    """End it, if there is one."""
    if shared.cache_info().currsize:
        shared().__exit__()
        shutil.rmtree(shared().folder)
        shared.cache_clear()


class Started:
    """A process that was forked for a command, to be used as one of :mod:`subprocess`.

    Parameters
    ----------
    path : the server's socket.
    job : arguments, cwd, env, first and script.
    handles : its stdin, stdout and stderr.
    """

    def __init__(self, path: str, job: dict[str, object], handles: list[int]) -> None:
        request = json.dumps(job).encode()
        self.returncode: int | None = None
        self.printed: tuple[BinaryIO, ...] = ()
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(path)
        socket.send_fds(self._line, [len(request).to_bytes(4, "big")], handles)
        self._line.sendall(request)
        self.pid = self._number()

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()
        self._close()

    def _close(self) -> None:
        self._line.close()
        for file in self.printed:
            file.close()

    def _number(self) -> int:
        text = b""
        while not text.endswith(b"\n"):
            more = self._line.recv(1)
            if not more:
                raise RuntimeError("the process that runs commands has ended")
            text += more
        return int(text)

    def poll(self) -> int | None:
        """The exit code, or minus the signal, once it has ended."""
        if self.returncode is None and select.select([self._line], [], [], 0)[0]:
            self.returncode = self._number()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended; TimeoutExpired if it does not in time."""
        if self.returncode is None and not select.select([self._line], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a forked command", timeout or 0.0)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has printed to stdout and stderr, once it has ended."""
        self.wait(timeout)
        for file in self.printed:
            file.seek(0)
        out, err = (file.read().decode().replace("\r\n", "\n") for file in self.printed)
        self._close()
        return out, err

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # since
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def pass_on() -> None:
    """What the program ``featx`` does."""
    job: dict[str, object] = {"arguments": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}  # noqa: PTH109
    raise SystemExit(Started(os.environ[SOCKET], job, [0, 1, 2]).wait() % 256)


def let_children_be_counted() -> None:
    """Where lines are counted, those of decoders are, too: they learn of it, and may write it down before they end."""
    from featx.images import child

    if _COUNTING not in os.environ:
        return

    def end(self: child.Child) -> int:
        self._process.terminate()
        try:
            return self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    child._ENVIRONMENT = (*child._ENVIRONMENT, _COUNTING)  # type: ignore[assignment]
    child.Child._end = end  # type: ignore[method-assign]


def serve(path: str) -> None:
    """Fork a process for each request, until standard input ends."""
    import importlib
    import pkgutil

    import featx

    for module in pkgutil.walk_packages(featx.__path__, "featx."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    import huggingface_hub.constants
    import jinja2  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import rich.markdown
    import rich.progress
    import rich.table  # noqa: F401
    import torch._dynamo.utils
    import torchvision  # noqa: F401
    import typer.main

    import featx.cli.main as cli

    let_children_be_counted()
    cli.app = typer.main.get_command(cli.app)  # type: ignore[assignment]  # Typer would spell it out for each command
    sys.argv = ["featx", "--version"]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        cli.main()  # and imports more when it is first used
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # What libraries would put away at the end of this process takes each forked one longer than a short command.
    atexit.unregister(torch._dynamo.utils.dump_compile_times)
    for each in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        each.atexit = False
    assert threading.active_count() == 1
    gc.freeze()  # a collection would write to, and so copy, all that was imported
    running: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(16)
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([server, sys.stdin], [], [], 0.005 if running else None)
            if sys.stdin in ready:
                os._exit(0)
            if server in ready:
                client = server.accept()[0]
                size, handles, _, _ = socket.recv_fds(client, 4, 3)
                request = json.loads(_exactly(client, int.from_bytes(size, "big")))
                pid = os.fork()
                if pid == 0:
                    break
                for handle in handles:
                    os.close(handle)
                client.sendall(f"{pid}\n".encode())
                running[pid] = client
            while running:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                with running.pop(pid) as client, contextlib.suppress(OSError):
                    client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    client.close()
    for other in running.values():
        other.close()
    for number, handle in enumerate(handles):
        os.dup2(handle, number)
        os.close(handle)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    importlib.reload(huggingface_hub.constants)  # it reads its variables when it is imported
    script = request.get("script", "")
    sys.argv = [script or "featx", *request["arguments"]]
    code: object = 0
    try:
        exec(request.get("first", ""), {})
        if script:
            runpy.run_path(script, run_name="__main__")
        else:
            cli.main()
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        code = 1
    # What the end of an interpreter does, but for taking down every module of torch, which takes seconds.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _exactly(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += client.recv(size - len(data))
    return data
