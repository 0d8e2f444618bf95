"""Commands in processes that have imported everything already: real processes, forked from one that waits.

Starting Python and importing scikit-learn, torch and matplotlib takes most of the time of a short command, and the
suite runs hundreds. What a command does, prints and exits with is that of ``python -W error -m featx``, in an
environment of its own, too; tests about the start itself start Python anew.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import select
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path

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
        with (
            contextlib.ExitStack() as stack,
            open(os.devnull) as nothing,  # noqa: PTH123
        ):
            out, err = (stack.enter_context((self.folder / f"{id(stack)}.{n}").open("w+b")) for n in (1, 2))
            handles = [nothing.fileno(), out.fileno(), err.fileno()]
            code = ask(str(self.socket), arguments, str(cwd or Path.cwd()), dict(env), handles, timeout, first)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode().replace("\r\n", "\n"))
                Path(file.name).unlink()
        return code, texts[0], texts[1]

    def program(self) -> Path:
        """A folder with a program ``featx`` that lets this process do it."""
        folder = self.folder / "bin"
        folder.mkdir(exist_ok=True)
        text = f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        (folder / "featx").write_text(f"{text}import warm\nwarm.pass_on()\n")
        (folder / "featx").chmod(0o755)
        return folder


def ask(
    path: str,
    arguments: list[str],
    cwd: str,
    env: dict[str, str],
    handles: list[int],
    timeout: float | None = None,
    first: str = "",
) -> int:
    """Have one command run; its exit code, or minus the signal."""
    request = json.dumps({"arguments": arguments, "cwd": cwd, "env": env, "first": first}).encode()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(timeout)
        client.connect(path)
        socket.send_fds(client, [len(request).to_bytes(4, "big")], handles)
        client.sendall(request)
        answer = client.recv(16)
    if not answer:
        raise RuntimeError("the process that runs commands has ended")
    return int(answer)


def pass_on() -> None:
    """What the program ``featx`` does."""
    raise SystemExit(ask(os.environ[SOCKET], sys.argv[1:], os.getcwd(), dict(os.environ), [0, 1, 2]) % 256)  # noqa: PTH109


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
    import rich.markdown
    import rich.progress
    import rich.table  # noqa: F401
    import torchvision  # noqa: F401

    let_children_be_counted()
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
                running[pid] = client
            while running:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                with running.pop(pid) as client, contextlib.suppress(OSError):
                    client.sendall(str(os.waitstatus_to_exitcode(status)).encode())
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
    sys.argv = ["featx", *request["arguments"]]
    from featx.cli.main import main

    code: object = 0
    try:
        exec(request["first"], {})
        main()
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
