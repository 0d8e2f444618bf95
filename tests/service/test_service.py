"""The service over real HTTP: answers, refusals, keys, logs, and ends."""

from __future__ import annotations

import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn")

from conftest import TINY, Featx, TinyEngine
from imagekit import pixels
from servicekit import Running, form, plain, png, start_tiny
from tiny_server import BLUE, GREEN, RED, tiny_bundle


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with start_tiny(tmp_path_factory.mktemp("tiny")) as running:
        yield running


def expected(image: bytes) -> NDArray[np.float32]:
    return next(TinyEngine().embed([pixels(image, TINY)[None]]))[0]


# --- answers ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_image_as_it_is(server: Running) -> None:
    image = png(1)
    (answer,) = tiny_bundle().answer(expected(image))
    for kind in ("image/png", "image/whatever", "application/octet-stream"):
        reply = server.send("/predict", image, **{"Content-Type": kind})
        assert reply.status == 200
        (found,) = reply.json["predictions"]
        assert found == {"id": "image", **answer.to_json()}
        assert reply.json["request_id"] == reply.headers["x-request-id"]


def test_a_photo_of_an_iphone(server: Running) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    out = io.BytesIO()
    pillow_heif.encode("RGB", (64, 64), bytes(BLUE) * 64 * 64, out, quality=95)
    (answer,) = tiny_bundle().answer(expected(out.getvalue()))
    reply = server.send("/predict", out.getvalue(), **{"Content-Type": "image/heic"})
    assert reply.status == 200
    assert reply.json["predictions"] == [{"id": "image", **answer.to_json()}]


def test_an_unknown_photo_is_called_so_and_counted(server: Running) -> None:
    counted = {word: f'featx_predictions_total{{answer="{word}"}}' for word in ("answered", "unsure", "unknown")}
    before = {word: server.metric(name) for word, name in counted.items()}
    body, headers = form([("black.png", plain((0, 0, 0))), ("own.png", png(1))])
    black, own = server.ask("/predict", body, headers).json["predictions"]
    assert (black["abstain"], black["reason"], black["familiarity"]) == (True, "unknown", 1 / 41)
    assert (own["abstain"], own["reason"]) == (False, None)
    assert own["familiarity"] > 0.05
    after = {word: server.metric(name) - before[word] for word, name in counted.items()}
    assert after == {"answered": 1, "unsure": 0, "unknown": 1}
    assert server.get("/info").json["max_unknown"] == 0.05
    shape = server.get("/openapi.json").json["components"]["schemas"]["Prediction"]
    assert {"reason", "familiarity"} <= set(shape["required"])


@pytest.mark.slow
def test_a_set_of_labels_comes_when_it_is_asked_for(server: Running, tmp_path: Path) -> None:
    sizes = set()
    for number in range(12):
        (answer,) = tiny_bundle().answer(expected(png(number)), 0.6)
        (found,) = server.send("/predict?coverage=0.6", png(number)).json["predictions"]
        assert found == {"id": "image", **answer.to_json()}
        sizes.add(len(found["set"]))
    assert len(sizes) > 1
    assert "set" not in server.send("/predict", png(1)).json["predictions"][0]
    (black,) = server.send("/predict?coverage=0.6", plain((0, 0, 0))).json["predictions"]
    assert (black["set"], black["reason"]) == ([], "unknown")
    assert (server.get("/info").json["sets"], server.get("/info").json["prior"]) == (True, None)
    for wrong in ("0", "1", "nan", "much"):
        refused = server.send(f"/predict?coverage={wrong}", png(1))
        assert (refused.status, refused.json["error"]["reason"]) == (422, "parameter")
    with start_tiny(tmp_path, sets=False) as old:
        refused = old.send("/predict?coverage=0.9", png(1))
        assert (refused.status, refused.json["error"]["reason"]) == (422, "no_sets")
        assert old.get("/info").json["sets"] is False
        assert old.send("/predict", png(1)).status == 200


def test_several_in_a_form_where_a_broken_one_fails_alone(server: Running) -> None:
    files = [("a.png", png(1)), ("b.jpg", b"no image"), ("c.png", png(2)), ("d.png", plain(RED)), ("e.png", png(3))]
    body, headers = form(files)
    reply = server.ask("/embed", body, headers)
    assert reply.status == 200
    assert [each["id"] for each in reply.json["embeddings"]] == ["a.png", "c.png", "e.png"]
    for (_, image), each in zip([files[0], files[2], files[4]], reply.json["embeddings"], strict=True):
        assert np.abs(np.array(each["embedding"]) - expected(image)[0]).max() < 1e-5
    assert [(each["id"], each["reason"]) for each in reply.json["refused"]] == [
        ("b.jpg", "not_an_image"),
        ("d.png", "engine"),
    ]
    assert server.get("/ready").status == 200


def test_what_it_says_of_itself(server: Running) -> None:
    assert server.get("/live").json == {"live": True}
    assert server.get("/ready").json == {"ready": True, "reason": ""}
    info = server.get("/info").json
    assert (info["class_names"], info["embedding_dim"], info["store"]) == (["ants", "bees"], 8, None)
    before = server.metric('featx_requests_total{route="/predict",status="200"}')
    server.send("/predict", png(5))
    assert server.metric('featx_requests_total{route="/predict",status="200"}') == before + 1
    assert server.metric("featx_ready") == 1
    document = server.get("/openapi.json").json
    assert set(document["paths"]) >= {"/predict", "/embed", "/search", "/live", "/ready", "/info", "/metrics"}
    assert "multipart/form-data" in document["paths"]["/predict"]["post"]["requestBody"]["content"]
    docs = server.get("/docs")
    assert (docs.status, "/predict" in docs.body.decode()) == (200, True)
    assert "query, number above 0 below 1<" in docs.body.decode()
    assert "query, string. The name of the model" in docs.body.decode()
    assert b"http://" not in docs.body.replace(b"http://127.0.0.1", b"") and b"https://" not in docs.body


# --- refusals -----------------------------------------------------------------------------------------------------


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header declares that size, with no pixels behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
    )


@pytest.mark.slow
def test_a_form_may_have_as_many_images_as_the_limit_says(tmp_path: Path) -> None:
    images = [(f"{i}.png", png(i)) for i in range(101)]
    with start_tiny(tmp_path, limits={"images": 100, "queue": 100}) as server:
        assert server.get("/info").json["limits"]["images"] == 100
        body, kind = form(images[:100])
        answer = server.ask("/predict", body, kind)
        assert answer.status == 200 and len(answer.json["predictions"]) == 100
        body, kind = form(images)
        answer = server.ask("/predict", body, kind)
        assert answer.status == 413 and "at most 100 images" in answer.json["error"]["message"]


def test_every_refusal_has_its_status_and_reason(server: Running) -> None:
    image = png(1)
    cut_form, kind = form([("a.png", image)])
    for path, body, headers, status, reason, words in [
        ("/predict", b"GIF89a", {}, 422, "corrupt|truncated|not_an_image", ""),
        ("/predict", b"", {}, 422, "empty", "empty"),
        ("/predict", b"no image", {}, 422, "not_an_image", "Not one of JPEG"),
        ("/predict", image[:-40], {}, 422, "truncated", "The file ends before the image does"),
        (
            "/predict",
            huge_png(8000, 7000),
            {},
            422,
            "too_large",
            r"than 50,000,000 pixels .*\(8000x7000",
        ),
        ("/predict", huge_png(50_000, 50_000), {}, 422, "too_large", "pixels"),
        ("/predict", plain(RED), {}, 422, "engine", "network fails on this image"),
        ("/predict", b"{}", {"Content-Type": "application/json"}, 415, "content_type", "multipart/form-data"),
        ("/predict", b"a=b", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "content_type", ""),
        ("/predict", b"x", {"Content-Type": "multipart/form-data"}, 400, "form", "cannot be read"),
        ("/predict", b"xyz", kind, 400, "form", "cannot be read"),
        ("/predict", cut_form.replace(b'; filename="a.png"', b""), kind, 422, "empty", "no file"),
        (
            "/predict",
            form([(f"{i}", b"x") for i in range(70)])[0],
            kind,
            413,
            "images",
            r"at most 64 images \(serve --max-images\). Send them in batches.",
        ),
        ("/predict", b"x" * (10 * 2**20 + 1), {}, 413, "body", "larger than 10,485,760 bytes"),
        ("/predict?k=-1", image, {}, 422, "parameter", "query.k"),
        ("/search", image, {}, 404, "no_store", "started without --store"),
        ("/nothing", image, {}, 404, "no_route", "Not Found"),
        ("/predict", None, {}, 405, "method", "Method Not Allowed"),
        ("/thumbnail/0", None, {}, 404, "no_image", ""),
        ("/ready", None, {"Host": "evil.example"}, 403, "host", "API key"),
    ]:
        reply = server.ask(path, body, headers or ({"Content-Type": "image/png"} if body is not None else {}))
        assert reply.status == status, (path, reply)
        error = reply.json["error"]
        assert re.fullmatch(reason, error["reason"])
        assert re.search(words, error["message"])
        assert reply.json["request_id"] == reply.headers["x-request-id"]
    assert server.send("/predict", image).status == 200


def test_not_http_at_all(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        answer = raw.recv(10_000)
    assert answer.startswith(b"HTTP/1.1 400") and b"x-request-id: " in answer


def test_a_chunked_upload_without_end_is_refused_and_not_kept(server: Running) -> None:
    """128 MiB here; the slow test sends a GiB."""
    upload_forever(server, 128)


def upload_forever(server: Running, megabytes: int) -> int:
    """Send a chunked body to the end, and only then read the answer; the most memory that the server took for it."""
    server.send("/predict", png(0))
    before, peak, done = server.memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, server.memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as raw:
            kind = b"Content-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
            raw.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\n" + kind)
            chunk = b"100000\r\n" + bytes(2**20) + b"\r\n"
            for _ in range(megabytes):
                raw.sendall(chunk)
            raw.sendall(b"0\r\n\r\n")
            answer = raw.recv(10_000)
    finally:
        done.set()
        watcher.join()
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"x-request-id" in answer
    assert peak - before < 2 * 10 * 2**20
    return peak - before


@pytest.mark.slow
def test_a_chunked_upload_of_a_gibibyte(server: Running) -> None:
    print(f"memory for 1 GiB: {upload_forever(server, 1024) / 2**20:.1f} MiB")


# --- ids, logs and keys -------------------------------------------------------------------------------------------


def test_the_request_id_is_the_clients_if_it_is_sensible(server: Running) -> None:
    assert server.get("/live", {"X-Request-ID": "abc-123"}).headers["x-request-id"] == "abc-123"
    for odd in ("", "a b", "x" * 200, "é".encode().decode("latin-1"), 'a"b'):
        given = server.get("/live", {"X-Request-ID": odd}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", given)


@pytest.mark.slow
def test_the_log_has_a_line_for_each_request_and_no_secret(tmp_path: Path) -> None:
    key = "a-very-secret-key"
    with start_tiny(tmp_path, api_key=key) as server:
        assert server.get("/live").status == server.get("/ready").status == server.get("/").status == 200
        for path in ("/info", "/metrics", "/openapi.json", "/docs"):
            assert server.get(path).status == 401
        assert server.send("/predict", png(1)).status == 401
        assert server.send("/predict", png(1), **{"X-API-Key": key[:-1]}).status == 401
        assert server.send("/predict", png(1), Authorization=f"Basic {key}").status == 401
        assert server.send("/predict", png(1), Authorization=f"Bearer {key}").status == 200
        reply = server.send("/predict", png(1), **{"X-API-Key": key, "X-Request-ID": "mine", "Host": "any.example"})
        assert reply.status == 200
        assert server.end() == 0
        lines = server.log()
        (line,) = [line for line in lines if line["request_id"] == "mine"]
        assert (line["message"], line["method"], line["path"], line["status"]) == ("request", "POST", "/predict", 200)
        assert line["bytes"] == len(png(1)) and line["ms"] > 0
        assert all("request_id" in line for line in lines)
        assert key not in server.log_path.read_text()


def test_who_may_reach_it(featx: Featx, tmp_path: Path) -> None:
    done = featx("serve", tmp_path / "none.model", "--host", "0.0.0.0")
    assert done.code == 2
    assert "others could reach the service at this address" in done.err and "--insecure" in done.err
    done = featx("serve", tmp_path / "none.model")
    assert (done.code, "no such model" in done.err) == (2, True)


def test_without_its_packages_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['fastapi'] = None; sys.argv[1:] = ['serve', 'a.model']\n"
        "from featx.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'featx[serve]'" in done.stderr
    light = "import sys, featx.cli.main, featx.cli.serve; print([n for n in ('fastapi', 'torch') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- the end ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_at_the_end_requests_in_flight_are_answered(tmp_path: Path, number: int) -> None:
    with start_tiny(tmp_path, seconds=1.0) as server:
        statuses: list[int] = []
        clients = [
            threading.Thread(target=lambda seed=seed: statuses.append(server.send("/predict", png(seed)).status))
            for seed in range(6)
        ]  # fmt: skip
        for client in clients:
            client.start()
        until = time.monotonic() + 10
        while server.metric("featx_requests_in_flight") < 7 and time.monotonic() < until:
            time.sleep(0.02)
        server.process.send_signal(number)
        time.sleep(0.3)
        ready = server.get("/ready")
        assert (ready.status, ready.json["reason"]) == (503, "the service stops")
        late = server.send("/predict", png(9))
        assert (late.status, late.headers["connection"]) == (503, "close")
        for client in clients:
            client.join()
        assert statuses == [200] * 6
        assert server.process.wait(timeout=30) == 0


@pytest.mark.slow
def test_when_the_worker_dies_it_is_not_ready(tmp_path: Path) -> None:
    with start_tiny(tmp_path, seconds=0.05) as server:
        assert server.send("/predict", png(1)).status == 200
        dying = server.send("/predict", plain(BLUE))
        assert (dying.status, dying.json["error"]["reason"]) == (503, "not_ready")
        started = time.monotonic()
        while server.get("/ready").status != 503:
            assert time.monotonic() - started < 2.0
        assert "compute failed: SystemExit" in server.get("/ready").json["reason"]
        refused = server.send("/predict", png(1))
        assert (refused.status, refused.headers["retry-after"]) == (503, "5")
        assert server.get("/live").status == 200
        assert server.process.wait(timeout=10) == 1  # by itself, so that a supervisor starts it anew
        assert "Error: the service ended: nothing can be computed any more: found compute failed" in server.said()


@pytest.mark.slow
def test_before_it_ends_for_a_dead_worker_it_answers_all(tmp_path: Path) -> None:
    with start_tiny(tmp_path, seconds=1.0) as server:
        statuses: list[int] = []
        images = [png(1), png(2), plain(BLUE), *map(png, range(3, 9))]

        def ask(image: bytes) -> None:
            statuses.append(server.send("/predict", image).status)

        clients = [threading.Thread(target=ask, args=(image,)) for image in images]
        for client in clients:
            client.start()
            time.sleep(0.1)
        for client in clients:
            client.join()
        assert sorted(set(statuses)) == [200, 503] and len(statuses) == len(images)
        assert statuses[0] == 200  # its batch was running
        assert server.process.wait(timeout=10) == 1


@pytest.mark.slow
def test_a_batch_that_hangs_ends_the_service_too(tmp_path: Path) -> None:
    with start_tiny(tmp_path, patience=[0.5, 8.0], limits={"deadline": 1.0}) as server:
        assert server.send("/predict", plain(GREEN)).status == 504
        ready = server.get("/ready")
        while ready.status == 200:  # a slow machine's batches may take longer before they count as stuck
            ready = server.get("/ready")
        assert ready.status == 503 and ready.json["reason"].startswith("a batch has been running for more than ")
        assert server.process.wait(timeout=20) == 1
        assert "found a batch has been running" in server.said()


@pytest.mark.slow
def test_a_decoder_that_is_killed_costs_nothing(tmp_path: Path) -> None:
    import psutil  # type: ignore[import-untyped]

    with start_tiny(tmp_path) as server:
        assert server.send("/predict", png(1)).status == 200
        children = psutil.Process(server.process.pid).children()
        assert children
        for child in children:
            child.kill()
        for seed in range(8):
            assert server.send("/predict", png(seed)).status == 200
        assert server.get("/ready").status == 200
        assert json.loads(server.get("/ready").body)["ready"]
