"""The Open Inference Protocol: the same answers as /predict, by a real client of Triton, and what it refuses."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
from servicekit import Running, png, start_tiny

from featx.images.pixels import decode

pytestmark = pytest.mark.slow

INFER = "/v2/models/model/infer"
IMAGES = [png(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with start_tiny(tmp_path_factory.mktemp("inference")) as running:
        yield running


TEXT, SHAPE = {"type": "string"}, {"type": "array", "items": {"type": "integer"}}
TENSOR = {"name": TEXT, "datatype": TEXT, "shape": SHAPE}


def thing(needed: list[str], **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": needed}


def several(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


# What open_inference_rest.yaml of the protocol asks of the answers.
SERVER = thing(["name", "version", "extensions"], name=TEXT, version=TEXT, extensions=several(TEXT))
TENSORS = several(thing([*TENSOR], **TENSOR))
MODEL = thing(["name", "platform"], name=TEXT, platform=TEXT, versions=several(TEXT), inputs=TENSORS, outputs=TENSORS)
VALUES = several({"anyOf": [{"type": "number"}, TEXT, {"type": "boolean"}]})
RESPONSE = thing(
    ["model_name", "outputs"], model_name=TEXT, model_version=TEXT, id=TEXT, parameters={"type": "object"},
    outputs=several(thing([*TENSOR, "data"], **TENSOR, data=VALUES)),
)  # fmt: skip


def image_input(files: list[bytes] = IMAGES, **changes: Any) -> dict[str, Any]:
    data = [base64.b64encode(file).decode() for file in files]
    return {"name": "image", "shape": [len(files)], "datatype": "BYTES", "data": data, **changes}


def ask(server: Running, **said: Any) -> Any:
    return server.ask(INFER, json.dumps(said).encode(), {"Content-Type": "application/json"})


def test_the_answers_are_of_the_protocols_form(server: Running) -> None:
    for path in ("/v2", "/v2/"):
        jsonschema.validate(server.get(path).json, SERVER)
    jsonschema.validate(server.get("/v2/models/model/versions/1").json, MODEL)
    reply = server.ask("/v2/models/model/versions/1/infer", json.dumps({"inputs": [image_input()]}).encode())
    jsonschema.validate(reply.json, RESPONSE)


def test_who_is_there(server: Running) -> None:
    assert server.get("/v2").json["extensions"] == ["binary_tensor_data"]
    assert server.get("/v2/health/live").json == {"live": True}
    assert server.get("/v2/health/ready").json == {"ready": True}
    for base in ("/v2/models/model", "/v2/models/model/versions/1"):
        about = server.get(base).json
        assert (about["name"], about["versions"]) == ("model", ["1"])
        assert {each["name"]: each["datatype"] for each in about["outputs"]} == {
            "label": "BYTES", "score": "FP32", "abstain": "BOOL", "reason": "BYTES", "probabilities": "FP32",
            "familiarity": "FP32", "embedding": "FP32",
        }  # fmt: skip
        assert server.get(f"{base}/ready").json == {"name": "model", "ready": True}
    assert server.get("/v2/models/another").status == 404


def test_json_in_and_out(server: Running) -> None:
    found = ask(server, id="abc", inputs=[image_input()]).json
    assert (found["id"], found["model_name"], found["model_version"]) == ("abc", "model", "1")
    outputs = {each["name"]: each for each in found["outputs"]}
    assert "embedding" not in outputs
    for number, image in enumerate(IMAGES):
        (expected,) = server.send("/predict", image).json["predictions"]
        assert outputs["label"]["data"][number] == expected["label"]
        assert outputs["score"]["data"][number] == pytest.approx(expected["score"], abs=1e-6)
        assert outputs["abstain"]["data"][number] is expected["abstain"]
        assert outputs["reason"]["data"][number] == (expected["reason"] or "")
        row = outputs["probabilities"]["data"][2 * number : 2 * number + 2]
        assert row == pytest.approx(list(expected["probabilities"].values()), abs=1e-6)
    assert outputs["probabilities"]["shape"] == [3, 2]


def test_tritons_own_client(server: Running) -> None:
    http = pytest.importorskip("tritonclient.http")
    client = http.InferenceServerClient(server.url.removeprefix("http://"))
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("model")
    assert client.get_model_metadata("model")["platform"] == "featx"
    tensor = http.InferInput("image", [3], "BYTES")
    pixels = http.InferInput("pixels", [3, 30, 40, 3], "UINT8")
    decoded = np.stack([np.asarray(decode(image)) for image in IMAGES])
    expected = [server.send("/predict", image).json["predictions"][0] for image in IMAGES]
    for binary in (True, False):
        pixels.set_data_from_numpy(decoded, binary_data=binary)
        asked: list[tuple[Any, Any]] = [(pixels, None)]
        if binary:  # in JSON this client sends text only
            tensor.set_data_from_numpy(np.array(IMAGES, dtype=object), binary_data=True)
            asked.append((tensor, [http.InferRequestedOutput("probabilities"), http.InferRequestedOutput("label")]))
        for given, outputs in asked:
            result = client.infer("model", [given], outputs=outputs)
            found = result.as_numpy("probabilities")
            assert found.shape == (3, 2)
            np.testing.assert_allclose(found, [list(each["probabilities"].values()) for each in expected], atol=1e-6)
            assert [label.decode() for label in result.as_numpy("label")] == [each["label"] for each in expected]
    result = client.infer("model", [pixels], outputs=[http.InferRequestedOutput("embedding")])
    one = server.send("/embed", IMAGES[1]).json["embeddings"][0]["embedding"]
    np.testing.assert_allclose(result.as_numpy("embedding")[1], one, rtol=1e-6)
    with pytest.raises(Exception, match="no output 'nothing'"):
        client.infer("model", [pixels], outputs=[http.InferRequestedOutput("nothing")])
    client.close()


PIXELS = {"name": "pixels", "shape": [1, 2, 3], "datatype": "UINT8", "data": [1, 2, 3, 4, 5, 6]}


@pytest.mark.parametrize(
    ("said", "status", "message"),
    [
        ([], 400, "one input"),
        ({"inputs": []}, 400, "one input"),
        ({"inputs": [1]}, 400, "one input"),
        ({"inputs": [image_input(), image_input()]}, 400, "one input"),
        ({"inputs": [image_input(shape=[2])]}, 400, "The shape is"),
        ({"inputs": [image_input(shape=[-3])]}, 400, "has no shape"),
        ({"inputs": [image_input(shape=[True])]}, 400, "has no shape"),
        ({"inputs": [image_input(shape=[10**9] * 9)]}, 400, "The shape is"),
        ({"inputs": [image_input(data=["%"], shape=[1])]}, 400, "not in base64"),
        ({"inputs": [image_input(data=["é"], shape=[1])]}, 400, "not in base64"),
        ({"inputs": [image_input(data=[1], shape=[1])]}, 400, "not all str"),
        ({"inputs": [image_input(data=None)]}, 400, "do not end where the tensor does"),
        ({"inputs": [image_input(datatype="FP32")]}, 400, "The input is image"),
        ({"inputs": [image_input([b"no image"])]}, 422, "Image 1: "),
        ({"inputs": [image_input([IMAGES[0], b"no image"])]}, 422, "Image 2: "),
        ({"inputs": [image_input([IMAGES[0]] * 65)]}, 413, "1 to 64 images"),
        ({"inputs": [{**PIXELS, "shape": [2, 3]}]}, 400, "pixels have the shape"),
        ({"inputs": [{**PIXELS, "shape": [2, 2, 3]}]}, 400, "of 6 numbers"),
        ({"inputs": [{**PIXELS, "shape": [1, 2, 3], "data": [256] * 6}]}, 400, "from 0 to 255"),
        ({"inputs": [{**PIXELS, "shape": [1, 2, 3], "data": [0.5] * 6}]}, 400, "not all int"),
        ({"inputs": [{**PIXELS, "shape": [100_000, 100_000, 3]}]}, 413, "may have"),
        ({"inputs": [{**PIXELS, "parameters": {"binary_data_size": 6}}]}, 400, "binary_data_size"),
        ({"inputs": [image_input()], "outputs": 1}, 400, "not a list of outputs"),
        ({"inputs": [image_input()], "outputs": [{"name": "x"}]}, 400, "no output 'x'"),
        ({"inputs": [image_input()], "outputs": [{"name": ["label"]}]}, 400, "no output \"['label']\""),
        ({"inputs": [image_input()], "outputs": [{"name": "embedding"}] * 2}, 400, "asked for twice"),
    ],
)
def test_what_is_wrong_is_one_sentence(server: Running, said: Any, status: int, message: str) -> None:
    reply = server.ask(INFER, json.dumps(said).encode(), {"Content-Type": "application/json"})
    assert (reply.status, set(reply.json)) == (status, {"error"}), reply.body
    assert message in reply.json["error"]


def test_half_a_character_is_sent_back_as_a_question_mark(server: Running) -> None:
    assert ask(server, id="a\ud800", inputs=[image_input()]).json["id"] == "a?"


CUT = {**image_input(), "data": None, "parameters": {"binary_data_size": 9}}


@pytest.mark.parametrize(
    ("body", "length"),
    [
        (b"{", "1"), (b"{}", "3"), (b"{}", "-1"), (b"{}", "x"), (b"[" * 100_000, None), (b"", None), (b"\xff", None),
        (json.dumps({"inputs": [CUT]}).encode(), "all"),
    ],
)  # fmt: skip
def test_bodies_that_are_none(server: Running, body: bytes, length: str | None) -> None:
    tail = struct.pack("<I", 1 << 31) + b"short" if length == "all" else b""
    headers = {} if length is None else {"Inference-Header-Content-Length": str(len(body)) if tail else length}
    reply = server.ask(INFER, body + tail, headers)
    assert reply.status == 400 and set(reply.json) == {"error"}


def test_a_key_is_asked_for_but_not_by_probes(tmp_path_factory: pytest.TempPathFactory) -> None:
    with start_tiny(tmp_path_factory.mktemp("keyed"), api_key="secret") as running:
        assert running.get("/v2/health/live").status == 200
        assert running.get("/v2/health/ready").status == 200
        body = json.dumps({"inputs": [image_input()]}).encode()
        for path, data in (("/v2", None), ("/v2/models/model", None), (INFER, body)):
            assert running.ask(path, data).status == 401
            assert running.ask(path, data, {"X-API-Key": "secret"}).status == 200
