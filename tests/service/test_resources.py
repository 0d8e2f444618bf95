"""A service that lacks something, or is sent what costs much: it answers, recovers, and leaves nothing behind.

Limits are set on the real process from outside; files are in small file systems of its own.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn")

from http.client import HTTPConnection

from PIL import Image
from servicekit import Running, form, plain, png, start_through, start_tiny
from tiny_server import GREEN

from featx.images.pixels import encode

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("prlimit") is None, reason="it takes Linux and its command prlimit"
    ),
]

WEBP = bytes.fromhex("524946461a000000574542505650384c0d0000002f57dbd516071011118888fe0700")
"""34 bytes that declare 7,000 x 7,000 pixels, all of one colour."""


def many_scans(scans: int, side: int = 2000) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    out = io.BytesIO()
    Image.new("L", (side, side), 128).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * scans + data[-2:]


def in_shared_memory() -> set[Path]:
    """Files there, but for the semaphores of joblib's workers, which another test may just have started."""
    return {path for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.loky-")}


def eventually(condition: Callable[[], object], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def decoders(server: Running) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(server.process.pid).children()
        if child.status() != psutil.STATUS_ZOMBIE and "featx.images.decoder" in " ".join(child.cmdline())
    ]


class Client:
    """One kept connection, which needs no descriptor that the service does not have yet."""

    def __init__(self, server: Running) -> None:
        self._connection = HTTPConnection("127.0.0.1", server.port, timeout=60)

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
        self._connection.request("GET" if body is None else "POST", path, body, headers)
        answer = self._connection.getresponse()
        return answer.status, answer.read().decode()

    def close(self) -> None:
        self._connection.close()


@contextlib.contextmanager
def limited(server: Running, option: str, most: int, wrapper: Sequence[str] = ("env",)) -> Iterator[None]:
    """A soft limit of the running service, and only as long as this lasts; set by the user that runs it."""

    def prlimit(*arguments: str) -> str:
        command = [*wrapper, "prlimit", "--pid", str(server.process.pid), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    before = prlimit(option, "--noheadings", "--output", "SOFT")
    prlimit(f"{option}={most}:")
    try:
        yield
    finally:
        prlimit(f"{option}={before}:")


def as_nobody() -> list[str]:
    """What starts a command as a user whose processes the kernel counts; root's are not."""
    if os.geteuid() != 0:
        return ["env"]
    rights = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]  # Python may lie in /root
    wrapper = ["setpriv", "--reuid", "54321", "--clear-groups", *rights]
    if shutil.which("setpriv") is None or subprocess.run([*wrapper, sys.executable, "-c", ""], check=False).returncode:
        pytest.skip("root's processes are not counted, and setpriv cannot change the user here")
    return wrapper


def check_shortage(server: Running, option: str, most: int, words: str, wrapper: Sequence[str] = ("env",)) -> None:
    """Without decoders and without what a new one needs: 503, told by /ready, and over when it is over."""
    with contextlib.closing(Client(server)) as client:
        _check_shortage(server, client, option, most, words, wrapper)


def _check_shortage(
    server: Running, client: Client, option: str, most: int, words: str, wrapper: Sequence[str] = ("env",)
) -> None:
    image = {"Content-Type": "image/png"}
    assert client.ask("/predict", png(1), **image)[0] == 200
    with limited(server, option, most, wrapper):
        for child in decoders(server):
            child.kill()
        for seed in range(3):
            status, text = client.ask("/predict", png(seed), **image)
            assert (status, words in text, '"resources"' in text) == (503, True, True), text
            status, text = client.ask("/ready")
            assert (status, words in text) == (503, True), text
    eventually(lambda: client.ask("/ready")[0] == 200)  # by itself: nobody sends requests to who is not ready
    assert client.ask("/predict", png(3), **image)[0] == 200
    assert server.process.poll() is None


@pytest.mark.slow
def test_no_descriptor_left(tmp_path: Path) -> None:
    with start_tiny(tmp_path) as server:
        check_shortage(server, "--nofile", 3, "Too many open files")


@pytest.mark.slow
def test_decoders_at_work_need_no_descriptor(tmp_path: Path) -> None:
    with start_tiny(tmp_path) as server, contextlib.closing(Client(server)) as client:
        body, headers = form([("big.png", png(1)), ("noise.png", noise())])
        assert client.ask("/predict", png(1), **{"Content-Type": "image/png"})[0] == 200
        with limited(server, "--nofile", 3):
            assert client.ask("/predict", body, **headers)[0] == 200
            assert client.ask("/ready")[0] == 200


@pytest.mark.slow
def test_no_process_left(tmp_path: Path) -> None:
    wrapper = as_nobody()
    with start_through(tmp_path, *wrapper) as server:
        check_shortage(server, "--nproc", 1, "Resource temporarily unavailable", wrapper)


def noise() -> bytes:
    """A file of more than a megabyte, which a form would put on the disk."""
    return encode(np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8))


@pytest.mark.slow
def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full /dev/shm and a full temporary folder are no matter at all."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    mount = f"mount -t tmpfs -o size=64k tmpfs /dev/shm && mount -t tmpfs -o size=64k tmpfs {temporary}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("no file systems can be mounted here: it takes root")
    monkeypatch.setenv("TMPDIR", str(temporary))
    with start_through(tmp_path, "unshare", "-m", "sh", "-c", f'{mount} && exec "$0" "$@"') as server:
        for folder in (Path("/dev/shm"), temporary):
            full = Path(f"/proc/{server.process.pid}/root{folder}/full")
            with pytest.raises(OSError, match="No space"):
                full.write_bytes(bytes(2**20))
        body, headers = form([("noise.png", noise()), ("small.png", png(1))])
        for _ in range(2):
            assert server.ask("/predict", body, headers).status == 200
            assert server.send("/predict", noise()).status == 200
            for child in decoders(server):
                child.kill()
        assert server.get("/ready").status == 200


@pytest.mark.slow
def test_a_hanging_batch_is_told_within_two_seconds(tmp_path: Path) -> None:
    with start_tiny(tmp_path, limits={"deadline": 4.0}) as server:
        assert server.send("/predict", png(1)).status == 200
        hanging = threading.Thread(target=server.send, args=("/predict", plain(GREEN)))
        started = time.monotonic()
        hanging.start()
        eventually(lambda: server.get("/ready").status == 503)
        assert time.monotonic() - started < 2.0
        assert "a batch has been running for more than 1.5 s" in server.get("/ready").json["reason"]
        hanging.join()


@pytest.mark.slow
def test_work_of_which_the_deadline_has_passed_is_ended(tmp_path: Path) -> None:
    """All decoders hang; when their requests are answered 504, others have taken their places."""
    with start_tiny(tmp_path, limits={"deadline": 1.5}) as server:
        eventually(lambda: server.send("/predict", png(1)).status == 200)
        before = decoders(server)
        for child in before:
            child.suspend()
        replies: Counter[int] = Counter()
        askers = [
            threading.Thread(target=lambda: replies.update([server.send("/predict", png(2)).status])) for _ in before
        ]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        assert replies[504] >= len(before) - 1
        eventually(lambda: server.send("/predict", png(3)).status == 200, seconds=6)  # less than a decoder may take


@pytest.mark.alone
def test_small_files_that_cost_much_stop_nobody(tmp_path: Path) -> None:
    """Attackers on loopback send what takes a decoder a second or more; every honest request is answered."""
    bombs = [WEBP, many_scans(20_000)]
    with start_tiny(tmp_path) as server:
        replies: Counter[int] = Counter()
        over = threading.Event()

        def attack(bomb: bytes) -> None:
            for _ in range(40):
                if not over.is_set():
                    replies.update([server.send("/predict", bomb).status])

        attackers = [threading.Thread(target=attack, args=(bombs[k % 2],)) for k in range(8)]
        for attacker in attackers:
            attacker.start()
        eventually(lambda: replies)
        honest = [server.send("/predict", png(seed)) for seed in range(20)]
        under_attack = any(attacker.is_alive() for attacker in attackers)
        over.set()
        for attacker in attackers:
            attacker.join()
        assert under_attack
        assert {reply.status for reply in honest} == {200}
        assert set(replies) <= {200, 422, 429, 504}
        refused = server.send("/predict", bombs[1])
        assert (refused.status, refused.json["error"]["reason"]) == (422, "too_costly")
        assert server.send("/predict", WEBP).status == 200  # alone, it is an image as any other
        assert server.get("/ready").status == 200


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def costly_headers() -> dict[str, bytes]:
    """Sound images of a few thousand pixels and less than 10 MB, whose metadata takes seconds to walk through."""
    small = io.BytesIO()
    Image.new("RGB", (50, 50)).save(small, "JPEG")
    start, rest = small.getvalue()[:2], small.getvalue()[2:]
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 50, 50, 8, 2, 0, 0, 0))
    tail = chunk(b"IDAT", zlib.compress(bytes(50 * 151))) + chunk(b"IEND", b"")
    return {
        "png": head + chunk(b"teSt", b"") * 800_000 + tail,
        "png of late chunks": head + tail[:-12] + chunk(b"teSt", b"") * 800_000 + tail[-12:],
        "ppm": b"P6\n" + b"#" * 9_500_000 + b"\n50 50 255\n" + bytes(7500),
        "jpeg": start + b"\xff\xe1\0\2" * 2_300_000 + rest,
        "jpeg of fill bytes": start + b"\xff" * 9_000_000 + rest,
    }


@pytest.mark.alone
def test_images_with_costly_headers_slow_nobody(tmp_path: Path) -> None:
    """Five clients send them: the slowest honest answers take no twice as long as without."""
    hostile = costly_headers()
    with start_tiny(tmp_path, seconds=0.1) as server:
        for name, data in hostile.items():
            refused = server.send("/predict", data)
            assert (refused.status, refused.json["error"]["reason"]) == (422, "too_costly"), (name, refused.body)
        over = threading.Event()
        replies: Counter[int] = Counter()

        def attack(data: bytes) -> None:
            while not over.is_set():
                replies.update([server.send("/predict", data).status])

        quiet = [server.send("/predict", png(seed)) for seed in range(60)]
        with ThreadPoolExecutor(len(hostile)) as pool:
            attackers = [pool.submit(attack, data) for data in hostile.values()]
            eventually(lambda: replies)
            try:
                honest = [server.send("/predict", png(seed)) for seed in range(60)]
            finally:
                over.set()
            for attacker in attackers:
                attacker.result()
        assert {reply.status for reply in honest} == {200}
        slow, usual = (np.percentile([reply.seconds for reply in each], 99) for each in (honest, quiet))
        assert slow < 2 * usual, (slow, usual, replies)
        assert set(replies) <= {422, 429, 504}
        assert server.get("/ready").status == 200


@pytest.mark.slow
def test_kill_9_leaves_no_upload_and_no_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    before = in_shared_memory()
    with start_tiny(tmp_path) as server:
        assert server.send("/predict", png(1)).status == 200
        children = decoders(server)
        for child in children:
            child.suspend()
        body, headers = form([("noise.png", noise())])
        head = "".join(f"{name}: {value}\r\n" for name, value in {**headers, "Content-Length": len(body)}.items())
        with (
            socket.create_connection(("127.0.0.1", server.port)) as whole,
            socket.create_connection(("127.0.0.1", server.port)) as half,
        ):
            whole.sendall(f"POST /predict HTTP/1.1\r\nHost: localhost\r\n{head}\r\n".encode() + body)
            half.sendall(f"POST /predict HTTP/1.1\r\nHost: localhost\r\n{head}\r\n".encode() + body[:-100])
            eventually(lambda: server.metric("featx_queue_images") == 1)
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
        eventually(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children))
        assert list(temporary.iterdir()) == []
        assert in_shared_memory() <= before
