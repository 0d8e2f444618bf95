"""Another version of a model, while clients ask: none of their requests is lost, and each answer is of one version."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from servicekit import Connection, Reply, Running, png, start_tiny
from tiny_server import tiny_bundle

from featx.models.bundle import Bundle
from featx.models.versions import Versions

REQUESTS, CLIENTS, SWITCHES = 600, 6, 5
"""10,000, 8 and 40 once by hand."""


def numbered(bundle: Bundle, number: int) -> Bundle:
    """A version whose labels tell which it is."""
    return replace(bundle, class_names=(f"ants {number}", f"bees {number}"))


def promote(folder: Path, number: int) -> str:
    versions = Versions(folder)
    with versions.changing():
        return versions.promote(numbered(tiny_bundle(), number), [], {}, "test")


def wait_for(server: Running, version: str) -> None:
    until = time.monotonic() + 30
    while server.get("/info").json["version"] != version:
        assert time.monotonic() < until, server.said()
        time.sleep(0.02)


async def ask_all(server: Running, folder: Path, begun: str) -> tuple[list[Reply], dict[str, str]]:
    replies: list[Reply] = []
    classes = {begun: ""}
    images = [png(seed) for seed in range(20)]

    switched = asyncio.Event()

    async def client() -> None:
        connection = Connection(server.port)
        while len(replies) < REQUESTS or not switched.is_set():
            replies.append(await connection.post("/predict", images[len(replies) % len(images)]))
        await connection.close()

    async def switch() -> None:
        for number in range(1, SWITCHES + 1):
            while len(replies) < number * REQUESTS // (SWITCHES + 1):
                await asyncio.sleep(0.005)
            version = await asyncio.to_thread(promote, folder, number)
            classes[version] = f" {number}"
            await asyncio.to_thread(wait_for, server, version)
        before = len(replies)
        while len(replies) < before + 2 * CLIENTS:  # some that began after the last switch
            await asyncio.sleep(0.005)
        switched.set()

    await asyncio.gather(switch(), *(client() for _ in range(CLIENTS)))
    return replies, classes


@pytest.mark.slow
def test_no_request_is_lost_when_the_version_changes(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    with start_tiny(tmp_path, feedback=str(folder)) as server:
        begun = server.get("/info").json["version"]
        assert begun == Versions(folder).current
        replies, classes = asyncio.run(ask_all(server, folder, begun))
        assert Counter(reply.status for reply in replies) == {200: len(replies)}
        assert len(replies) >= REQUESTS
        told: Counter[str] = Counter()
        for reply in replies:
            said: Any = reply.json
            (prediction,) = said["predictions"]
            told[said["version"]] += 1
            for name in (prediction["label"], *prediction["probabilities"]):
                assert name.endswith(classes[said["version"]]), (said["version"], name)
        assert set(told) == set(classes)

        # The protocol of KServe has the version's classes, too, and says which it is.
        data = [base64.b64encode(png(1)).decode()]
        body = json.dumps({"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": data}]}).encode()
        infer = server.ask("/v2/models/model/infer", body, {"Content-Type": "application/json"}).json
        assert infer["parameters"]["version"] == Versions(folder).current
        assert infer["outputs"][0]["data"][0].endswith(f" {SWITCHES}")

        # Corrections know which version they correct; one that cannot be served is logged, and the other one stays.
        kept = server.send(f"/feedback?label=ants%20{SWITCHES}", png(1)).json["correction"]
        assert kept["version"] == Versions(folder).current
        versions = Versions(folder)
        strange = replace(tiny_bundle(), provenance={**tiny_bundle().provenance, "fingerprint": "0" * 64})
        with versions.changing():
            versions.promote(strange, [], {}, "test")
        until = time.monotonic() + 30
        while "another network" not in server.said():
            assert time.monotonic() < until
            time.sleep(0.05)
        assert server.send("/predict", png(1)).json["version"] == kept["version"]
        versions.roll_back("test")
        assert server.end() == 0
