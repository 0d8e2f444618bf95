"""Corrections over HTTP: kept before they are answered, once, whatever is killed, and listed again."""

from __future__ import annotations

import csv
import hashlib
import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from servicekit import Running, form, png, start_tiny

from featx.models.corrections import Corrections

SERVERS, CLIENTS, EACH = 3, 4, 15
"""Of the test that kills: 21, 8 and 125 once by hand."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("feedback") / "kept"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with start_tiny(folder.parent, feedback=str(folder)) as running:
        yield running


def test_a_correction_is_on_the_disk_when_it_is_answered(server: Running, folder: Path) -> None:
    answered = server.send("/predict", png(1)).json["predictions"][0]
    reply = server.send(f"/feedback?label=bees&by={quote('Mía')}", png(1)).json
    assert reply["new"]
    kept = reply["correction"]
    assert (kept["label"], kept["by"], kept["said"]) == ("bees", "Mía", answered["label"])
    assert kept["score"] == pytest.approx(answered["score"])
    assert kept["sha256"] == hashlib.sha256(png(1)).hexdigest() == answered["answer"]
    assert json.loads((folder / "journal.jsonl").read_bytes().splitlines()[kept["n"] - 1])["label"] == "bees"
    assert (folder / "images" / f"{kept['sha256']}.png").read_bytes() == png(1)
    again = server.send(f"/feedback?label=bees&by={quote('Mía')}", png(1)).json
    assert (again["new"], again["correction"]) == (False, kept)


def test_an_earlier_answer_is_corrected_by_its_id(server: Running) -> None:
    answer = server.send("/predict", png(2)).json["predictions"][0]["answer"]
    reply = server.ask(f"/feedback?label=ants&answer={answer}", b"")
    assert reply.status == 200
    assert reply.json["correction"]["sha256"] == answer
    unknown = server.ask(f"/feedback?label=ants&answer={'0' * 64}", b"")
    assert (unknown.status, unknown.json["error"]["reason"]) == (404, "no_answer")


def test_what_is_refused_is_not_kept(server: Running, folder: Path) -> None:
    before = (folder / "journal.jsonl").read_bytes(), sorted((folder / "images").iterdir())
    two, kind = form([("a.png", png(30)), ("b.png", png(31))])
    cases = [
        ("/feedback?label=wasps", png(30), {}, 422, "label"),
        ("/feedback?label=%20", png(30), {}, 422, "label"),
        (f"/feedback?label=ants&by={quote(chr(7))}", png(30), {}, 422, "label"),
        ("/feedback", png(30), {}, 422, "parameter"),
        ("/feedback?label=ants&answer=../../x", b"", {}, 422, "parameter"),
        ("/feedback?label=ants", b"no image", {}, 422, "not_an_image"),
        ("/feedback?label=ants", two, kind, 422, "images"),
        ("/feedback?label=ants&model=other", png(30), {}, 404, "no_model"),
        ("/feedback?label=ants", png(30), {"Origin": "http://evil.example"}, 403, "origin"),
        ("/feedback?label=ants", png(30), {"Sec-Fetch-Site": "cross-site"}, 403, "origin"),
    ]
    for path, body, headers, status, reason in cases:
        reply = server.ask(path, body, {"Content-Type": "image/png", **headers})
        assert (reply.status, reply.json["error"]["reason"]) == (status, reason), path
    assert "ants, bees" in server.send("/feedback?label=wasps", png(30)).json["error"]["message"]
    assert before == ((folder / "journal.jsonl").read_bytes(), sorted((folder / "images").iterdir()))


def test_all_are_listed_and_exported(server: Running) -> None:
    for person in ("kim", "leo"):
        server.send(f"/feedback?label={'ants' if person == 'kim' else 'bees'}&by={person}", png(40))
        server.send(f"/feedback?label=ants&by={person}", png(41))
    listed = server.get("/feedback").json
    assert [each["n"] for each in listed["corrections"]] == list(range(1, listed["total"] + 1))
    (disputed,) = listed["disagreements"]
    assert (disputed["image"], disputed["label"]) == (hashlib.sha256(png(40)).hexdigest(), None)
    assert [(each["a"], each["b"], each["agreed"], each["images"]) for each in listed["agreement"]] == [
        ("kim", "leo", 1, 2)
    ]
    page = server.get("/feedback?limit=1").json
    assert page["next"] == 1
    assert [each["n"] for each in server.get("/feedback?after=1&limit=1").json["corrections"]] == [2]
    rows = list(csv.DictReader(server.get("/feedback?format=csv").body.decode().splitlines()))
    assert len(rows) == listed["images"]
    assert {row["label"] for row in rows if row["path"].startswith(f"images/{disputed['image']}")} == {""}


def test_a_key_is_needed_where_one_is_set_and_new_classes_where_asked_for(tmp_path: Path) -> None:
    with start_tiny(tmp_path, feedback=str(tmp_path / "kept"), api_key="secret", new_classes=True) as server:
        assert server.send("/feedback?label=ants", png(1)).status == 401
        assert server.get("/feedback").status == 401
        # Browsers send HTTP's Basic along from any page, once somebody has typed it.
        assert server.get("/feedback", {"Authorization": "Basic OnNlY3JldA=="}).status == 401
        shown = {"X-API-Key": "secret"}
        assert server.ask("/feedback?label=wasps", png(1), {"Content-Type": "image/png", **shown}).json["new"]
        # Whoever has the key may ask from anywhere: a page of another site does not have it.
        reply = server.ask(
            "/feedback?label=ants", png(1), {"Content-Type": "image/png", "Origin": "https://x.example", **shown}
        )
        assert reply.json["new"]
        assert server.get("/info", shown).json["feedback"] == {"corrections": 2, "new_classes": True}


def test_without_feedback_nothing_is_kept(tmp_path: Path) -> None:
    with start_tiny(tmp_path) as server:
        assert "answer" not in server.send("/predict", png(1)).json["predictions"][0]
        for reply in (server.send("/feedback?label=ants", png(1)), server.get("/feedback")):
            assert (reply.status, reply.json["error"]["reason"]) == (404, "no_feedback")


@pytest.mark.slow
def test_what_was_acknowledged_survives_killed_servers_once(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    now: list[Running] = []
    acknowledged: Counter[tuple[str, str]] = Counter()
    counted, done = threading.Lock(), threading.Event()

    def client(number: int) -> None:
        for each in range(EACH):
            image, label = png(1000 * number + each), ("ants", "bees")[each % 2]
            while True:
                try:
                    reply = now[-1].send(f"/feedback?label={label}&by=client{number}", image)
                except (OSError, http.client.HTTPException):
                    time.sleep(0.05)  # it was killed, and the next one is not there yet
                    continue
                if reply.status == 200:
                    break
            with counted:
                acknowledged[hashlib.sha256(image).hexdigest(), label] += 1

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients: list[object] = []
        for life in range(SERVERS):
            with start_tiny(tmp_path, feedback=str(kept)) as server:
                now.append(server)
                clients = clients or [pool.submit(client, number) for number in range(CLIENTS)]
                if life < SERVERS - 1:
                    wanted = (life + 1) * CLIENTS * EACH // SERVERS
                    while sum(acknowledged.values()) < wanted:
                        assert server.process.poll() is None
                        done.wait(0.005)
                    server.process.kill()
                    server.process.wait()
                else:
                    for each in clients:
                        each.result()  # type: ignore[attr-defined]
    found = Corrections(kept)
    assert Counter((each.sha256, each.label) for each in found.all) == acknowledged
    assert len(found) == CLIENTS * EACH
    assert set(acknowledged.values()) == {1}
    for each in found.all:
        assert hashlib.sha256((kept / "images" / each.file).read_bytes()).hexdigest() == each.sha256
