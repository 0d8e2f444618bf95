"""The Open Inference Protocol, version 2, which KServe and Triton speak: the same answers, as tensors.

https://github.com/kserve/open-inference-protocol (REST), with Triton's extension for binary tensors: behind the JSON,
whose length is in the header ``Inference-Header-Content-Length``, the tensors follow as they lie in memory.

Images come as ``image`` (BYTES: each element a file; in JSON in base64) or as ``pixels`` (UINT8, height x width x 3).
"""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray

from featx.images import encode
from featx.models import Answer
from featx.service.guard import Limits, Refusal, whole_text
from featx.service.work import Repository, Service, Work, do_work

HEADER = "inference-header-content-length"
_LENGTH = struct.Struct("<I")
_VERSION = "1"


@dataclass(frozen=True)
class _Output:
    """An output tensor: its type in the protocol, its shape behind the number of images, and its values."""

    datatype: str
    shape: tuple[int, ...]
    values: Callable[[list[Answer], Work], NDArray[Any]]


def paths(name: str) -> frozenset[str]:
    """Those of a model of this name, and of the server."""
    model = f"/v2/models/{name}"
    whole = [
        each for base in (model, f"{model}/versions/{_VERSION}") for each in (base, f"{base}/ready", f"{base}/infer")
    ]
    return frozenset({"/v2", "/v2/health/live", "/v2/health/ready", "/v2/repository/index", *whole})


Answering = Callable[[str, Callable[[], dict[str, Any]]], None]
"""What adds a route that answers with a body; its status is 503 where that says that something is not ready."""


def add_inference(app: FastAPI, repository: Repository, keyed: list[Any]) -> None:
    """Add the routes of the protocol; they are in the protocol's own documents, not in featx's."""

    def plain(path: str, answer: Callable[[], dict[str, Any]]) -> None:
        @app.get(path, include_in_schema=False, dependencies=keyed)
        async def route() -> Response:
            body = answer()
            return JSONResponse(body, 200 if body.get("ready", True) else 503)

    plain("/v2", lambda: {"name": "featx", "version": version("featx"), "extensions": ["binary_tensor_data"]})
    plain("/v2/health/live", lambda: {"live": True})
    plain("/v2/health/ready", lambda: {"ready": not repository.problem()})

    # Of Triton's extension for repositories, what its clients list models with; none is loaded or unloaded here.
    @app.post("/v2/repository/index", include_in_schema=False, dependencies=keyed)
    async def index(request: Request) -> Response:
        return await _protocols(repository, _index(repository, request))

    for name in repository.services:
        _add_model(app, repository, name, plain, keyed)


async def _protocols(repository: Repository, answer: Awaitable[Response]) -> Response:
    """An answer; refusals are counted as any other, but the protocol's errors are one sentence."""
    try:
        return await answer
    except Refusal as refusal:
        repository.metrics.rejected(refusal.status, refusal.reason)
        return JSONResponse({"error": refusal.message}, refusal.status, headers=refusal.headers)


async def _index(repository: Repository, request: Request) -> Response:
    """Every model with its state; where the body asks for it, those that are ready only."""
    try:
        said = json.loads(await request.body() or b"{}")
    except (ValueError, RecursionError) as error:
        raise _wrong("The request is not JSON.") from error
    problems = {name: service.problem() for name, service in repository.services.items()}
    only_ready = isinstance(said, dict) and said.get("ready") is True
    return JSONResponse(
        [
            {"name": name, "version": _VERSION, "state": "UNAVAILABLE" if problem else "READY", "reason": problem}
            for name, problem in problems.items()
            if not (problem and only_ready)
        ]
    )


def _add_model(app: FastAPI, repository: Repository, name: str, plain: Answering, keyed: list[Any]) -> None:
    def about() -> dict[str, Any]:
        outputs = _outputs(repository.named(name))
        return {
            "name": name,
            "versions": [_VERSION],
            "platform": "featx",
            "inputs": [
                {"name": "image", "datatype": "BYTES", "shape": [-1]},
                {"name": "pixels", "datatype": "UINT8", "shape": [-1, -1, -1, 3]},
            ],
            "outputs": [
                {"name": each, "datatype": output.datatype, "shape": [-1, *output.shape]}
                for each, output in outputs.items()
            ],
        }

    for base in (f"/v2/models/{name}", f"/v2/models/{name}/versions/{_VERSION}"):
        plain(base, about)
        plain(f"{base}/ready", lambda: {"name": name, "ready": not repository.named(name).problem()})

        @app.post(f"{base}/infer", include_in_schema=False, dependencies=keyed)
        async def infer(request: Request) -> Response:
            # Another version of the model may have other classes.
            service = repository.named(name)
            return await _protocols(repository, _infer(service, _outputs(service), request))


def _outputs(service: Service) -> dict[str, _Output]:
    bundle = service.bundle
    classes = bundle.class_names

    def of(field: str, dtype: Any) -> Callable[[list[Answer], Work], NDArray[Any]]:
        return lambda answers, work: np.array([getattr(answer, field) for answer in answers], dtype)

    found = {
        "label": _Output("BYTES", (), of("label", object)),
        "score": _Output("FP32", (), of("score", np.float32)),
        "abstain": _Output("BOOL", (), of("abstain", np.bool_)),
        "reason": _Output("BYTES", (), lambda answers, work: np.array([each.reason or "" for each in answers], object)),
    }
    if bundle.sharpness is not None:
        found["probabilities"] = _Output(
            "FP32", (len(classes),),
            lambda answers, work: np.array([[a.probabilities[name] for name in classes] for a in answers], np.float32),
        )  # fmt: skip
    if bundle.familiarity is not None and bundle.max_unknown is not None:
        found["familiarity"] = _Output("FP32", (), of("familiarity", np.float32))
    found["embedding"] = _Output("FP32", (bundle.scorer.dims,), lambda answers, work: work.matrix(service.layer))
    return found


# --- a request ----------------------------------------------------------------------------------------------------


@dataclass
class _Asked:
    """What a request says beside its images."""

    id: str = ""
    outputs: list[tuple[str, bool]] | None = None
    binary: bool = False


async def _infer(service: Service, outputs: dict[str, _Output], request: Request) -> Response:
    asked = _Asked()

    async def read(request: Request, limits: Limits) -> list[tuple[str, bytes]]:
        length, body = request.headers.get(HEADER), await request.body()
        return await asyncio.to_thread(_images, length, body, limits, asked, set(outputs))

    work = await do_work(service, request, read=read)
    if work.refused:
        first = work.refused[0]
        raise Refusal(422, first["reason"], f"Image {int(first['id']) + 1}: {first['message']}")
    answers = service.answer(work.matrix(service.layer))
    wanted = asked.outputs or [(name, asked.binary) for name in outputs if name != "embedding"]
    described, tensors = [], []
    for name, binary in wanted:
        output = outputs[name]
        values = output.values(answers, work)
        about: dict[str, Any] = {"name": name, "datatype": output.datatype, "shape": list(values.shape)}
        if binary:
            data = _bytes_of(values)
            about["parameters"] = {"binary_data_size": len(data)}
            tensors.append(data)
        else:
            about["data"] = values.reshape(-1).tolist()
        described.append(about)
    said: dict[str, Any] = {"model_name": service.name, "model_version": _VERSION, "outputs": described}
    if service.version:
        said["parameters"] = {"version": service.version}
    if asked.id:
        said["id"] = asked.id
    if not tensors:
        return JSONResponse(said)
    text = json.dumps(said, separators=(",", ":")).encode()
    headers = {HEADER: str(len(text))}
    return Response(b"".join([text, *tensors]), media_type="application/octet-stream", headers=headers)


def _bytes_of(values: NDArray[Any]) -> bytes:
    if values.dtype != object:
        return np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
    texts = [str(text).encode() for text in values.reshape(-1)]
    return b"".join(_LENGTH.pack(len(text)) + text for text in texts)


def _images(length: str | None, body: bytes, limits: Limits, asked: _Asked, known: set[str]) -> list[tuple[str, bytes]]:
    """The images of a request, as files, by their number; what else it says goes into ``asked``."""
    size = len(body) if length is None else int(length) if length.isascii() and length.isdigit() else -1
    if not 0 <= size <= len(body):
        raise _wrong(f"{HEADER} is {length[:20] if length else ''!r}, of a body of {len(body)} bytes.")
    try:
        said = json.loads(body[:size])
    except (ValueError, RecursionError) as error:
        raise _wrong("The request is not JSON.") from error
    tensors = said.get("inputs") if isinstance(said, dict) else None
    if not isinstance(tensors, list) or len(tensors) != 1 or not isinstance(tensors[0], dict):
        raise _wrong("A request has one input, image or pixels.")
    asked.id = whole_text(said.get("id", ""))[:200]
    asked.binary = _parameter(said, "binary_data_output") is True
    if said.get("outputs") is not None:
        asked.outputs = _wanted(said["outputs"], asked.binary, known)
    tensor = tensors[0]
    shape = tensor.get("shape")
    if not isinstance(shape, list) or not all(type(n) is int and 0 < n < 1 << 32 for n in shape):
        raise _wrong("The input has no shape.")
    raw = _parameter(tensor, "binary_data_size")
    if raw is not None and (type(raw) is not int or raw != len(body) - size):
        raise _wrong(f"binary_data_size is not the {len(body) - size} bytes behind the JSON.")
    content = body[size:] if raw is not None else tensor.get("data")
    if (tensor.get("name"), tensor.get("datatype")) == ("image", "BYTES"):
        files = _files(content)
        if np.prod(shape, dtype=object) != len(files):
            raise _wrong(f"The shape is {shape}, of {len(files)} images.")
    elif (tensor.get("name"), tensor.get("datatype")) == ("pixels", "UINT8"):
        files = _from_pixels(content, shape, limits)
    else:
        raise _wrong("The input is image (BYTES) or pixels (UINT8).")
    most = min(limits.images, limits.queue)
    if not 0 < len(files) <= most:
        raise Refusal(413, "images", f"A request may have 1 to {most} images, found {len(files)}.")
    return [(str(number), file) for number, file in enumerate(files)]


def _wrong(message: str) -> Refusal:
    return Refusal(400, "inference", message)


def _parameter(said: dict[str, Any], name: str) -> Any:
    parameters = said.get("parameters")
    return parameters.get(name) if isinstance(parameters, dict) else None


def _wanted(outputs: Any, binary: bool, known: set[str]) -> list[tuple[str, bool]]:
    if not isinstance(outputs, list) or not all(isinstance(each, dict) for each in outputs):
        raise _wrong("outputs is not a list of outputs.")
    found: list[tuple[str, bool]] = []
    for each in outputs:
        name = each.get("name")
        if not isinstance(name, str) or name not in known:
            raise _wrong(f"There is no output {str(name)[:40]!r}; there are {', '.join(sorted(known))}.")
        if any(name == other for other, _ in found):  # a body has room for half a million
            raise _wrong(f"The output {name} is asked for twice.")
        own = _parameter(each, "binary_data")
        found.append((name, binary if own is None else own is True))
    return found


def _files(content: Any) -> list[bytes]:
    """Each element of a BYTES tensor: in binary with its length before it, in JSON in base64."""
    if isinstance(content, list):
        try:
            return [base64.b64decode(text, validate=True) for text in _flat(content, str)]
        except ValueError as error:  # binascii's, or of text that is not ASCII
            raise _wrong("An image is not in base64.") from error
    files, place = [], 0
    while isinstance(content, bytes) and place + _LENGTH.size <= len(content):
        (length,) = _LENGTH.unpack_from(content, place)
        place += _LENGTH.size
        if length > len(content) - place:
            break
        files.append(content[place : place + length])
        place += length
    if not isinstance(content, bytes) or place != len(content):
        raise _wrong("The images do not end where the tensor does.")
    return files


def _from_pixels(content: Any, shape: list[int], limits: Limits) -> list[bytes]:
    n, height, width, colours = shape if len(shape) == 4 else (1, *shape) if len(shape) == 3 else (0, 0, 0, 0)
    if colours != 3:
        raise _wrong("pixels have the shape (height, width, 3), or (n, height, width, 3).")
    if height * width > limits.pixels or n > limits.images:
        raise Refusal(
            413, "too_large", f"An image may have {limits.pixels:,} pixels, and a request {limits.images} images."
        )
    if isinstance(content, list):
        numbers = np.array(_flat(content, int))
        if numbers.size and not 0 <= numbers.min() <= numbers.max() <= 255:
            raise _wrong("pixels are numbers from 0 to 255.")
        pixels = numbers.astype(np.uint8)
    else:
        pixels = np.frombuffer(content if isinstance(content, bytes) else b"", np.uint8)
    if pixels.size != n * height * width * 3:
        raise _wrong(f"The shape is {shape}, of {pixels.size} numbers.")
    return [encode(each) for each in pixels.reshape(n, height, width, 3)]


def _flat(values: list[Any], kind: type) -> list[Any]:
    """The numbers or texts of nested lists, in order."""
    while values and all(isinstance(each, list) for each in values):
        values = [inner for each in values for inner in each]
    if not all(type(each) is kind for each in values):
        raise _wrong(f"data are not all {kind.__name__}.")
    return values
