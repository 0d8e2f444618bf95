"""Several models in one process: each by its name, with a share of its own, and one network for those alike."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn")

from conftest import TINY, Featx, TinyEngine, class_folders
from imagekit import pixels
from servicekit import Connection, Running, form, plain, png, start, start_tiny
from tiny_server import GREEN, tiny_bundle

from featx._system import available_cpus
from featx.extraction import Embedder
from featx.models import open_embedder, read_bundle

NAMES = ["cats", "dogs", "birds"]
MODELS = [["cats", 0], ["dogs", 0], ["birds", 1]]
"""Names with the number of a network: two models share one."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with start_tiny(tmp_path_factory.mktemp("several"), models=MODELS) as running:
        yield running


def infer_body(image: bytes) -> bytes:
    data = [base64.b64encode(image).decode()]
    return json.dumps({"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": data}]}).encode()


@pytest.mark.slow
def test_each_answers_to_its_name(server: Running) -> None:
    row = next(TinyEngine().embed([pixels(png(1), TINY)[None]]))[0]
    (answer,) = tiny_bundle().answer(row)
    for name in NAMES:
        (found,) = server.send(f"/predict?model={name}", png(1)).json["predictions"]
        assert found["label"] == f"{answer.label} of {name}"
        assert found["score"] == pytest.approx(answer.score)
        np.testing.assert_allclose(
            server.send(f"/embed?model={name}", png(1)).json["embeddings"][0]["embedding"], row[0], rtol=1e-5
        )
        assert server.get(f"/info?model={name}").json["class_names"] == [f"ants of {name}", f"bees of {name}"]
        assert server.get(f"/ready?model={name}").json == {"ready": True, "reason": ""}
        reply = server.ask(f"/v2/models/{name}/infer", infer_body(png(1))).json
        assert reply["model_name"] == name
        assert reply["outputs"][0]["data"] == [found["label"]]
        assert server.get(f"/v2/models/{name}").json["name"] == name


def test_who_names_none_is_told_which_there_are(server: Running) -> None:
    for path in ("/predict", "/embed", "/search", "/predict?coverage=0.9"):
        refused = server.send(path, png(1))
        assert (refused.status, refused.json["error"]["reason"]) == (422, "which_model")
        assert refused.json["error"]["message"] == (
            "There are several models: cats, dogs, birds. Say which one, as in ?model=cats."
        )
    assert server.get("/thumbnail/1").json["error"]["reason"] == "which_model"
    for path in ("/predict?model=cat", "/predict?model=", "/predict?model=%00" + "x" * 1000):
        refused = server.send(path, png(1))
        assert (refused.status, refused.json["error"]["reason"]) == (404, "no_model")
        assert "there is cats, dogs, birds." in refused.json["error"]["message"] and len(refused.body) < 500
    for path in ("/info?model=x", "/ready?model=x"):
        assert server.get(path).status == 404
    assert server.ask("/v2/models/cat/infer", infer_body(png(1))).status == 404
    assert server.send("/search?model=dogs", png(1)).json["error"]["reason"] == "no_store"


def test_what_there_is(server: Running) -> None:
    info = server.get("/info").json
    assert [each["name"] for each in info["models"]] == NAMES
    for each in info["models"]:
        assert server.get(f"/info?model={each.pop('name')}").json == each
    assert server.get("/ready").json == {"ready": True, "reason": ""}
    listed = [{"name": name, "version": "1", "state": "READY", "reason": ""} for name in NAMES]
    for body in (b"", b"{}", b'{"ready": true}'):
        assert server.ask("/v2/repository/index", body).json == listed
    refused = server.ask("/v2/repository/index", b"{")
    assert (refused.status, refused.json) == (400, {"error": "The request is not JSON."})


def test_metrics_and_log_say_which_model(server: Running) -> None:
    names = {name: f'featx_images_total{{model="{name}",outcome="embedded"}}' for name in NAMES}
    before = {name: server.metric(sample) for name, sample in names.items()}
    body, headers = form([(f"{seed}.png", png(seed)) for seed in range(3)])
    assert server.ask("/predict?model=dogs", body, headers).status == 200
    assert server.ask("/v2/models/birds/infer", infer_body(png(1))).status == 200
    assert server.send("/predict?model=birds", b"no image").status == 422
    grown = {name: server.metric(sample) - before[name] for name, sample in names.items()}
    assert grown == {"cats": 0, "dogs": 3, "birds": 1}
    assert server.metric('featx_requests_total{model="birds",route="/predict",status="422"}') == 1
    assert server.metric('featx_images_total{model="birds",outcome="refused"}') == 1
    assert server.metric('featx_ready{model="cats"}') == 1
    assert server.metric('featx_queue_images{model="cats"}') == 0
    before_none = server.metric('featx_rejected_total{model="",reason="which_model",status="422"}')
    assert server.send("/predict", png(1)).status == 422
    assert server.metric('featx_rejected_total{model="",reason="which_model",status="422"}') == before_none + 1
    assert {line.get("model") for line in server.log() if line.get("path") == "/predict"} >= {"dogs", "birds", ""}


def decoders(server: Running) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children()
    return [child for child in children if "featx.images.decoder" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_a_shared_network_has_one_set_of_decoders(server: Running) -> None:
    per_network = max(min(2, available_cpus()), -(-available_cpus() // 2)) + 1  # and one for what is heavy
    assert len(decoders(server)) == 2 * per_network


def test_tritons_own_client_lists_them_and_asks_two(server: Running) -> None:
    http = pytest.importorskip("tritonclient.http")
    client = http.InferenceServerClient(server.url.removeprefix("http://"))
    assert [each["name"] for each in client.get_model_repository_index()] == NAMES
    tensor = http.InferInput("image", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([png(2)], dtype=object), binary_data=True)
    for name in ("cats", "birds"):
        assert client.is_model_ready(name)
        (label,) = client.infer(name, [tensor]).as_numpy("label")
        assert label.decode() == server.send(f"/predict?model={name}", png(2)).json["predictions"][0]["label"]
    assert not client.is_model_ready("fish")
    client.close()


# --- one that is flooded ------------------------------------------------------------------------------------------

STARVED = 4.0
"""A lone client of a model waits at most this many times as long while another model is flooded."""


@contextlib.contextmanager
def flood(server: Running, path: str, *, clients: int = 16, images: int = 8) -> Iterator[Counter[int]]:
    """So many clients that send forms of so many images as fast as they can, on a thread of their own."""
    statuses: Counter[int] = Counter()
    done = threading.Event()
    body, headers = form([(f"{seed}.png", png(seed)) for seed in range(images)])

    async def client() -> None:
        connection = Connection(server.port)
        while not done.is_set():
            reply = await connection.post(path, body, headers["Content-Type"])
            statuses[reply.status] += 1
            if reply.status == 429:
                await asyncio.sleep(0.01)
        await connection.close()

    async def everyone() -> None:
        await asyncio.gather(*(client() for _ in range(clients)))

    flooding = threading.Thread(target=asyncio.run, args=(everyone(),))
    flooding.start()
    try:
        until = time.monotonic() + 20
        while not statuses[429]:
            assert time.monotonic() < until
            time.sleep(0.01)
        yield statuses
    finally:
        done.set()
        flooding.join()


def median(server: Running, path: str, requests: int = 24) -> float:
    replies = [server.send(path, png(seed)) for seed in range(requests)]
    assert {reply.status for reply in replies} == {200}
    return float(np.median([reply.seconds for reply in replies]))


@pytest.mark.alone
@pytest.mark.parametrize("lone", ["dogs", "birds"])
def test_a_flooded_model_starves_no_other(tmp_path: Path, lone: str) -> None:
    """Whether they share a network or not; the flooded one fills its own queue, and is refused when it is full."""
    # Four images in 50 ms: 64 that wait are eight batches in each of two lanes, 0.4 s.
    with start_tiny(tmp_path, models=MODELS, seconds=0.05) as server:
        median(server, "/predict?model=cats", 4)
        alone = median(server, f"/predict?model={lone}")
        with flood(server, "/predict?model=cats") as statuses:
            beside = median(server, f"/predict?model={lone}")
            assert server.metric('featx_queue_images{model="cats"}') > 30
        assert set(statuses) == {200, 429}
        own = server.metric('featx_queue_wait_seconds_sum{model="cats"}') / server.metric(
            'featx_queue_wait_seconds_count{model="cats"}'
        )
        print(f"{lone}: {1000 * alone:.0f} ms alone, {1000 * beside:.0f} ms beside; the flooded wait {1000 * own:.0f}")
        assert beside < STARVED * alone
        assert own > 2 * (beside - alone)  # the flooded ones do wait: there was a flood
        assert server.metric(f'featx_rejected_total{{model="{lone}",reason="busy",status="429"}}') == 0


@pytest.mark.alone
def test_a_model_that_hangs_stops_none_of_another_network(tmp_path: Path) -> None:
    with start_tiny(tmp_path, models=MODELS, limits={"deadline": 3.0}) as server:
        hanging = threading.Thread(target=server.send, args=("/predict?model=cats", plain(GREEN)))
        hanging.start()
        until = time.monotonic() + 20
        while server.get("/ready?model=cats").status == 200:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert server.get("/ready").json["reason"].startswith("cats: a batch has been running")
        assert server.get("/v2/models/dogs/ready").status == 503  # it has the same network
        assert server.get("/v2/models/birds/ready").status == 200
        assert server.send("/predict?model=birds", png(1)).status == 200
        index = {each["name"]: each for each in server.ask("/v2/repository/index", b"{}").json}
        assert (index["cats"]["state"], index["birds"]["state"]) == ("UNAVAILABLE", "READY")
        assert [each["name"] for each in server.ask("/v2/repository/index", b'{"ready": true}').json] == ["birds"]
        hanging.join()


@pytest.mark.slow
def test_uploads_for_one_model_leave_room_for_those_of_others(tmp_path: Path) -> None:
    half = 600_000
    limits = {"body": 2 * half, "buffered": 6 * half}  # two halves for each of three models
    with start_tiny(tmp_path, models=MODELS, limits=limits) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(8)]
        head = b"POST /predict?model=cats HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (2 * half)
        for client in clients:
            client.sendall(head + b"x" * half)
        refused = 0
        for client in clients:
            client.settimeout(1)
            with contextlib.suppress(TimeoutError):
                refused += client.recv(65536).startswith(b"HTTP/1.1 429")
        assert refused == 6
        assert server.send("/predict?model=cats", png(1) + bytes(half)).status == 429
        assert server.send("/predict?model=dogs", png(1) + bytes(half)).status == 200


# --- the real command ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, featx: Featx) -> Path:
    """Two models on one store, with different heads, and one of another network; no weights, so it is quick."""
    folder = tmp_path_factory.mktemp("kept")
    class_folders(folder / "photos", each=6)
    for store, views in (("s.featx", "center"), ("t.featx", "center,flip")):
        done = featx("extract", "photos", "--out", store, "--weights", "none", "--views", views, cwd=folder)
        assert done.code == 0, done.err
    for store, model, head in (("s", "one", "ridge"), ("s", "two", "nearest_centroid"), ("t", "other", "ridge")):
        done = featx("fit", f"{store}.featx", "--out", f"{model}.model", "--head", head, cwd=folder)
        assert done.code == 0, done.err
    return folder


@pytest.mark.slow
def test_models_of_one_network_open_it_once(kept: Path) -> None:
    opened: dict[str, Embedder] = {}
    one, two, other = (
        open_embedder(read_bundle(kept / f"{name}.model"), kept / f"{name}.model", opened=opened)
        for name in ("one", "two", "other")
    )
    assert one is two
    assert one is not other
    assert len(opened) == 2
    assert open_embedder(read_bundle(kept / "one.model"), kept / "one.model") is not one


@pytest.mark.slow
def test_the_command_serves_several_and_ends_in_order(kept: Path) -> None:
    command = ("-m", "featx", "serve", kept / "one.model", f"second={kept / 'two.model'}", kept / "other.model")
    image = next((kept / "photos").rglob("*.png")).read_bytes()
    with start(kept, *command, "--store", f"second={kept / 's.featx'}", "--port", 0) as server:
        assert [each["name"] for each in server.get("/info").json["models"]] == ["one", "second", "other"]
        (found,) = server.send("/predict?model=second&k=1", image).json["predictions"]
        assert found["neighbours"][0]["score"] == pytest.approx(1.0, abs=1e-4)
        (match,) = server.send("/search?model=second&k=1", image).json["results"][0]["matches"]
        assert server.get(f"/thumbnail/{match['row']}?model=second").status == 200
        assert "neighbours" not in server.send("/predict?model=one", image).json["predictions"][0]
        explained = server.send("/predict?model=other&explain=true", image).json["predictions"][0]["explanation"]
        assert len(explained["classes"]) == 2
        per_network = max(min(2, available_cpus()), -(-available_cpus() // 2)) + 1
        assert len(decoders(server)) == 2 * per_network + 1  # and one for thumbnails
        assert server.end() == 0


REFUSED: list[tuple[list[str], str]] = [
    (["one.model", "one=two.model"], "two models have the same name"),
    (["one.model", "bad.model"], "bad.model"),
    (["one.model", "none.model"], "none.model"),
    (["one.model", "a/b=two.model"], "a/b=two.model"),
    (["one.model", "two.model", "--store", "s.featx"], "for none of the models"),
    (["one.model", "two.model", "--store", "three=s.featx"], "NAME of one, two"),
    (["one.model", "--store", "s.featx", "--store", "one=s.featx"], "given twice for one model"),
    ([], "MODEL"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_does_not_go_together_is_refused_at_the_start(
    kept: Path, featx: Featx, arguments: list[str], message: str
) -> None:
    (kept / "bad.model").write_bytes(b"no model")
    done = featx("serve", *arguments, "--port", 0, cwd=kept)
    assert done.code == 2
    assert message in re.sub(r"\s+", " ", done.err)


def test_one_model_need_not_be_named_and_another_is_not_answered_for(tmp_path: Path) -> None:
    with start_tiny(tmp_path) as alone:
        plain_reply: Any = alone.send("/predict", png(1)).json["predictions"]
        assert alone.send("/predict?model=model", png(1)).json["predictions"] == plain_reply
        refused = alone.send("/predict?model=other", png(1))
        assert (refused.status, refused.json["error"]["reason"]) == (404, "no_model")
        assert "models" not in alone.get("/info").json
        assert "model=" not in alone.get("/metrics").body.decode()
