"""The protocol of Label Studio's backends, against a stand-in that sends what the real one was seen to send.

``scripts/try_label_studio.py`` does the same with the real one.
"""

from __future__ import annotations

import base64
import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from labelkit import CONFIG, PERSONAL, TOKEN, UID, Studio, annotation, hook, post, predict, setup, studio, task, until
from servicekit import Reply, Running, png, start_tiny
from tiny_server import tiny_bundle

from featx.models.bundle import Answer, write_bundle
from featx.models.corrections import Correction, Corrections
from featx.models.versions import Versions
from featx.service.guard import Refusal
from featx.service.label_studio import Choices
from featx.service.label_studio_host import LabelStudioHost, NotFetched


@pytest.fixture(scope="module")
def labels() -> Iterator[Studio]:
    with studio() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("label-studio") / "kept"


@pytest.fixture(scope="module")
def server(labels: Studio, folder: Path) -> Iterator[Running]:
    wanted = {"url": labels.url, "token": TOKEN}
    with start_tiny(folder.parent, feedback=str(folder), label_studio=wanted) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_was_asked(labels: Studio) -> None:
    labels.asked.clear()


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_bytes().splitlines()]


def said(server: Running) -> str:
    return " ".join(each["message"] for each in server.log())


# --- suggestions ----------------------------------------------------------------------------------------------------


def test_setup_names_the_version_and_predict_answers_with_it(server: Running, labels: Studio) -> None:
    assert server.get("/health").json["status"] == "UP"
    version = setup(server).json["model_version"]
    assert version == f"featx-{server.get('/info').json['version']}"
    tasks = [labels.put(number, png(number)) for number in (1, 2, 3)]
    reply = predict(server, *tasks).json
    assert reply["model_version"] == version
    for prediction in reply["results"]:
        (region,) = prediction["result"]
        assert (region["from_name"], region["to_name"], region["type"]) == ("choice", "image", "choices")
        assert region["value"]["choices"] in (["ants"], ["bees"])
        assert prediction["model_version"] == version
        assert 0.0 <= prediction["score"] == region["score"] <= 1.0
    assert {shown for _, path, shown in labels.asked if path.startswith("/data")} == {f"Token {TOKEN}"}
    # The same again asks Label Studio for no image.
    labels.asked.clear()
    assert predict(server, *tasks).json == reply
    assert labels.paths() == []


def test_the_least_sure_has_the_lowest_score_and_what_is_unknown_a_lower_one() -> None:
    choices = Choices.of(CONFIG)

    def score(sure: float, reason: Any = None, familiarity: float = 0.5) -> float:
        shares = {"ants": sure, "bees": 1 - sure}
        suggested = choices.suggestion(Answer("ants", sure, "probability", shares, reason, familiarity))
        assert suggested is not None
        return suggested[1]

    assert score(0.55, "unsure") < score(0.8) < score(0.99)
    assert score(0.99, "unknown", 0.01) == 0.01


def test_a_class_that_is_no_choice_is_not_suggested() -> None:
    choices = Choices.of(CONFIG.replace('<Choice value="ants"/>', '<Choice value="wasps" alias="w"/>'))
    assert choices.names == ("w", "bees")
    answer = Answer("ants", 0.7, "probability", {"ants": 0.7, "bees": 0.2, "wasps": 0.1}, None)
    assert choices.suggestion(answer) == ("bees", 0.2)
    assert choices.suggestion(Answer("ants", 0.7, "margin", {}, None)) is None


def test_differing_classes_are_told(server: Running) -> None:
    assert setup(server, CONFIG.replace("bees", "wasps")).status == 200
    assert "choices that the model does not know: wasps" in said(server)
    assert "no choice for what the model knows: bees" in said(server)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("<View/>", "no Choices whose toName is an Image"),
        ("<View><", "cannot be read"),
        ('<!DOCTYPE x [<!ENTITY a "aaaa">]><View>&a;</View>', "without declarations"),
        ('<?x <!-- ?><!DOCTYPE x [<!ENTITY a "aaaa">]><!-- --><View>&a;</View>', "without declarations"),
        ("<!-- a comment --><View/>", "no Choices whose toName is an Image"),
        ("<!--" * 2**18, "cannot be read"),  # at once: comments that do not end were looked for minutes
        (CONFIG.replace("single", "multiple"), "not one for each image"),
        (CONFIG.replace('choice="single"', 'perRegion="true"'), "not one for each image"),
        (CONFIG.replace("$image", "http://x/y.png"), "not a \\$field"),
        (CONFIG.replace("Image name", "Text name"), "no Choices whose toName is an Image"),
        (CONFIG.replace("<Choice value", "<Option value"), "no Choice of their own"),
        (None, "without declarations"),
    ],
)
def test_a_project_that_does_not_classify_images_is_refused(config: Any, why: str) -> None:
    with pytest.raises(Refusal, match=why) as refused:
        Choices.of(config)
    assert (refused.value.status, refused.value.reason) == (422, "config")


def test_requests_that_are_none_are_refused(server: Running, labels: Studio) -> None:
    cases = [
        ("/setup", {"project": UID, "schema": "<View/>"}, {}, 422, "config"),
        ("/setup", {"project": "../1", "schema": CONFIG}, {}, 422, "project"),
        ("/predict", {"project": UID, "label_config": CONFIG}, {}, 422, "tasks"),
        ("/predict", [], {}, 422, "request"),
        ("/webhook", hook("ANNOTATION_CREATED", "<View/>"), {}, 422, "config"),
        ("/webhook", hook("ANNOTATIONS_DELETED", annotations=[{"id": "1"}]), {}, 422, "annotation"),
        ("/webhook", hook("TASKS_CREATED"), {"Origin": "http://evil.example"}, 403, "origin"),
        ("/webhook", hook("TASKS_CREATED"), {"Content-Type": "text/plain"}, 415, "content_type"),
        ("/setup", {}, {"Host": "evil.example"}, 403, "host"),
    ]
    for path, body, headers, status, reason in cases:
        reply = post(server, path, body, **headers)
        assert (reply.status, reply.json["error"]["reason"]) == (status, reason), path
    skipped = annotation(1, 1, None, task=[1])
    assert post(server, "/webhook", hook("ANNOTATION_CREATED", annotation=skipped, task={"id": {}})).json["kept"] == 0
    assert post(server, "/webhook", {"action": "\ud800"}).json == {"ignored": "?"}
    reply = server.ask("/webhook", b"[" * 10_000, {"Content-Type": "application/json"})
    assert (reply.status, reply.json["error"]["reason"]) == (400, "json")
    assert post(server, "/webhook", {"action": "TASKS_CREATED"}).json == {"ignored": "TASKS_CREATED"}
    assert server.get("/").status == server.send("/embed", png(1)).status == 404
    assert labels.paths() == []


def test_a_task_whose_image_is_none_gets_no_prediction_and_the_others_theirs(server: Running, labels: Studio) -> None:
    inline = "data:image/png;base64," + base64.b64encode(png(4)).decode()
    tasks = [
        labels.put(10, b"no image"), labels.put(11, png(11)), task(12, "/data/upload/1/gone.png"), task(13, inline),
        task(14, None), {"id": 15}, task(16, "s3://bucket/a.png"), task(17, "file:///etc/passwd"),
    ]  # fmt: skip
    results = predict(server, *tasks).json["results"]
    assert [bool(each) for each in results] == [False, True, False, True, False, False, False, False]
    for why in ("404", "it has no image", "begins with s3:", "begins with file:"):
        assert why in said(server)


# --- where images come from -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://127.0.0.1:1/data/upload/1/a.png",
        "//evil.example/data/upload/1/a.png",
        "http://evil.example/data/upload/1/a.png",
        "http://{host}@evil.example/data/upload/1/a.png",
        "http://user:pass@{host}/data/upload/1/a.png",
        "http://{host}.evil.example/data/upload/1/a.png",
        "ftp://{host}/data/upload/1/a.png",
        "gopher://{host}/data/x",
        "file:///etc/passwd",
        "/etc/passwd",
        "/api/projects/1",
        "/data/../api/projects/1",
        "/data/%2e%2e/api/projects/1",
        "/data/%252e%252e/api/projects/1",
        "/data/..\\api/projects/1",
        "http://{host}/api/projects/1",
        "/user/login/",
        "http://[::1",
        "http://{host}/data/upload/1/a.png\r\nX: y",
        "data:image/png;base64,!!!",
        "",
    ],
)
def test_nothing_is_fetched_from_elsewhere(labels: Studio, url: str) -> None:
    host = LabelStudioHost(labels.url, TOKEN)
    with pytest.raises(NotFetched):
        host.image(url.replace("{host}", labels.url.removeprefix("http://")))
    assert labels.paths() == []


def test_a_redirect_is_looked_at_as_any_address_and_takes_no_token_along(labels: Studio) -> None:
    host = LabelStudioHost(labels.url, TOKEN)
    labels.images["/data/upload/1/real.png"] = png(1)
    for target in ("http://169.254.169.254/", "/user/login/?next=/data/", "//evil.example/data/a.png"):
        labels.redirects["/data/upload/1/moved.png"] = target
        with pytest.raises(NotFetched, match="it is redirected, and"):
            host.image("/data/upload/1/moved.png")
    assert set(labels.paths()) == {"/data/upload/1/moved.png"}
    labels.redirects["/data/upload/1/moved.png"] = "real.png"
    assert host.image("/data/upload/1/moved.png") == png(1)
    labels.redirects["/data/upload/1/moved.png"] = "/data/upload/1/moved.png"
    with pytest.raises(NotFetched, match="again and again"):
        host.image("/data/upload/1/moved.png")
    with studio() as other:
        allowed = LabelStudioHost(labels.url, TOKEN, [other.url.removeprefix("http://")])
        labels.redirects["/data/upload/1/moved.png"] = f"{other.url}/data/upload/1/real.png"
        with pytest.raises(NotFetched, match="the answer was 401"):  # the stand-in shows nothing without a token
            allowed.image("/data/upload/1/moved.png")
        assert other.asked == [("GET", "/data/upload/1/real.png", "")]


def test_label_studio_is_known_by_its_address_in_all_spellings(labels: Studio) -> None:
    labels.images["/data/local-files/"] = png(2)
    path = "/data/local-files/?d=a b/ä.png"
    for url in (path, labels.url + path, labels.url.replace("127.0.0.1", "LOCALHOST") + path):
        assert LabelStudioHost(labels.url, TOKEN).image(url) == png(2)
    assert set(labels.paths()) == {"/data/local-files/?d=a%20b/%C3%A4.png"}


def test_what_is_too_large_or_too_slow_is_not_waited_for(labels: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    host = LabelStudioHost(labels.url, TOKEN)
    large = labels.put(20, bytes(300_000))["data"]["image"]
    monkeypatch.setattr("featx.service.label_studio_host.MAX_IMAGE", 200_000)
    with pytest.raises(NotFetched, match="more than 200,000 bytes"):
        host.image(large)
    monkeypatch.setattr("featx.service.label_studio_host.SECONDS", 0.0)
    with pytest.raises(NotFetched, match="too long"):
        host.image(labels.put(21, png(21))["data"]["image"])


def test_a_personal_token_is_exchanged_once_and_again_when_it_is_refused(labels: Studio) -> None:
    host = LabelStudioHost(labels.url, PERSONAL)
    url = labels.put(22, png(22))["data"]["image"]
    assert host.image(url) == host.image(url) == png(22)
    assert labels.paths() == ["/api/token/refresh/", url, url]
    assert labels.asked[1][2] == f"Bearer {labels.access}"
    before, labels.access = labels.access, labels.access + "x"
    assert host.image(url) == png(22)
    assert labels.paths()[3:] == [url, "/api/token/refresh/", url]
    labels.access = before
    for token in ("", "wrong", PERSONAL.replace("unsigned", "foreign")):
        with pytest.raises(NotFetched, match=r"token"):
            LabelStudioHost(labels.url, token).image(url)


# --- labels ---------------------------------------------------------------------------------------------------------


def test_annotations_are_kept_changed_and_taken_back_once(server: Running, labels: Studio, folder: Path) -> None:
    image = labels.put(30, png(30))
    suggested = predict(server, image).json["results"][0]
    start = len(journal(folder))
    created = hook("ANNOTATION_CREATED", annotation=annotation(1, 30, "bees"), task=image)
    assert post(server, "/webhook", created).json["kept"] == 1
    kept = journal(folder)[start]
    assert (kept["label"], kept["by"], kept["source"]) == ("bees", "user 1", f"{UID}/1")
    assert (kept["said"], kept["score"]) == (suggested["result"][0]["value"]["choices"][0], suggested["score"])
    assert f"featx-{kept['version']}" == suggested["model_version"]
    assert (folder / "images" / kept["file"]).read_bytes() == png(30)
    assert post(server, "/webhook", created).json["kept"] == 0
    updated = hook("ANNOTATION_UPDATED", annotation=annotation(1, 30, "ants"), task=image)
    assert [post(server, "/webhook", updated).json["kept"] for _ in range(2)] == [1, 0]
    skipped = hook("ANNOTATION_UPDATED", annotation=annotation(1, 30, "ants", was_cancelled=True), task=image)
    assert [post(server, "/webhook", skipped).json["kept"] for _ in range(2)] == [1, 0]
    assert post(server, "/webhook", created).json["kept"] == 1
    deleted = hook("ANNOTATIONS_DELETED", annotations=[{"id": 1}, {"id": 99}])
    assert [post(server, "/webhook", deleted).json["kept"] for _ in range(2)] == [1, 0]
    found = [(each["label"], each.get("withdrawn", False)) for each in journal(folder)[start:]]
    assert found == [("bees", False), ("ants", False), ("ants", True), ("bees", False), ("bees", True)]


def test_two_annotators_and_many_at_once(server: Running, labels: Studio, folder: Path) -> None:
    tasks = [labels.put(number, png(number)) for number in (40, 41)]
    given = [annotation(40, 40, "ants", 1), annotation(41, 41, "bees", 1), annotation(42, 40, "bees", 2)]
    assert post(server, "/webhook", hook("ANNOTATIONS_CREATED", annotation=given, task=tasks)).json["kept"] == 3
    latest = [each for each in Corrections(folder).latest if each.source in {f"{UID}/{n}" for n in (40, 41, 42)}]
    assert [(each.by, each.label) for each in latest] == [("user 1", "ants"), ("user 1", "bees"), ("user 2", "bees")]


def test_results_that_are_no_single_choice_are_no_label() -> None:
    choices = Choices.of(CONFIG)
    region = annotation(1, 1, "ants")["result"][0]
    assert choices.label([region]) == "ants"
    for result in (
        None, [], [None], [{**region, "value": None}], [{**region, "value": {"choices": ["ants", "bees"]}}],
        [{**region, "from_name": "other"}], [{**region, "type": "labels"}], [{**region, "value": {"choices": [1]}}],
    ):  # fmt: skip
        assert choices.label(result) is None


def test_what_could_not_be_kept_is_fetched_later_and_what_is_gone_is_taken_back(
    server: Running, labels: Studio, folder: Path
) -> None:
    image = task(50, "/data/upload/1/late.png")
    reply = post(server, "/webhook", hook("ANNOTATION_CREATED", annotation=annotation(50, 50, "ants"), task=image))
    assert (reply.status, reply.json["error"]["reason"]) == (502, "not_kept")
    labels.images["/data/upload/1/late.png"] = png(50)
    standing = Corrections(folder).standing(f"{UID}/")
    assert standing
    assert f"{UID}/50" not in standing
    labels.export = [{**image, "annotations": [annotation(50, 50, "ants"), annotation(51, 50, None, 2)]}]
    assert post(server, "/webhook", hook("START_TRAINING")).json["kept"] == 1 + len(standing)
    assert [*Corrections(folder).standing(f"{UID}/")] == [f"{UID}/50"]
    labels.asked.clear()
    assert post(server, "/webhook", hook("START_TRAINING")).json["kept"] == 0
    assert [path for path in labels.paths() if path.startswith("/data")] == []


def test_a_person_s_other_annotation_stands_when_one_is_deleted(tmp_path: Path) -> None:
    kept = Corrections(tmp_path / "kept")
    kept.open()

    def stands(found: Corrections) -> list[tuple[str, str]]:
        return [(each.by, each.label) for each in found.latest]

    kept.add(png(1), "ants", "mia", source="1.1/1")
    kept.add(png(1), "bees", "mia", source="1.1/2")
    assert kept.add(png(1), "bees", "mia")[1] is False
    assert stands(kept) == [("mia", "bees")]
    assert isinstance(kept.withdraw("1.1/2"), Correction)
    assert kept.withdraw("1.1/2") is None
    assert stands(kept) == [("mia", "ants")]
    kept.add(png(2), "ants", "mia", source="1.1/1")  # the annotation is of another photo now
    assert [each.sha256 for each in kept.latest] == [kept.all[-1].sha256]
    kept.add(png(1), "ants", "leo")
    kept.close()
    again = Corrections(kept.folder)
    assert stands(again) == stands(kept) == [("mia", "ants"), ("leo", "ants")]
    assert again.standing("1.1/") == kept.standing("1.1/")


# --- versions -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Studio, Path]]:
    """A backend with a key, which runs a command after two labels, its Label Studio and its folder."""
    folder = tmp_path_factory.mktemp("keyed")
    with studio() as labels:
        wanted = {"url": labels.url, "token": PERSONAL, "refit": ["touch", str(folder / "ran")], "every": 2}
        with start_tiny(folder, feedback=str(folder / "kept"), api_key="secret", label_studio=wanted) as server:
            yield server, labels, folder


BASIC = {"Authorization": "Basic " + base64.b64encode(b"anybody:secret").decode()}
KEY = {"X-API-Key": "secret"}


def give(server: Running, labels: Studio, number: int) -> Reply:
    """Submit an annotation of a new task."""
    image = labels.put(number, png(number))
    labels.export.append({**image, "annotations": [annotation(number, number, "ants")]})
    body = hook("ANNOTATION_CREATED", annotation=annotation(number, number, "ants"), task=image)
    return post(server, "/webhook", body, **KEY)


@pytest.mark.slow
def test_a_refit_leads_to_a_new_version_by_which_tasks_are_ordered(keyed: tuple[Running, Studio, Path]) -> None:
    server, labels, folder = keyed
    ran = folder / "ran"
    labels.backends = [{"id": 1, "title": "featx", "model_version": "other"}]
    labels.model_version, labels.tasks = "featx", list(range(1, 251))
    assert setup(server).status == server.get("/health").status == 401
    first = setup(server, **BASIC).json["model_version"]
    labels.backends[0]["model_version"] = first  # as Label Studio notes it
    until(lambda: labels.model_version == first)
    assert labels.retrieved == [list(range(1, 101)), list(range(101, 201)), list(range(201, 251))]
    for number in (1, 2):
        assert not ran.exists()
        assert give(server, labels, number).json["kept"] == 1
    until(ran.exists)
    second = f"featx-{add_version(folder / 'kept', 1)}"
    until(lambda: labels.model_version == second)
    assert setup(server, **BASIC).json["model_version"] == second
    assert len(labels.retrieved) == 6
    labels.model_version = "somebody's choice"
    third = add_version(folder / "kept", 2)
    until(lambda: f"ordered by version featx-{third}" in said(server))
    assert (labels.model_version, len(labels.retrieved)) == ("somebody's choice", 9)
    ran.unlink()
    assert post(server, "/webhook", hook("START_TRAINING"), **KEY).json["kept"] == 0
    until(ran.exists)  # whatever the number of labels


def add_version(folder: Path, number: int) -> str:
    other = replace(tiny_bundle(), metrics={"number": number})
    return Versions(folder).add(write_bundle(other, folder.parent / "tiny.model"), "test")


@pytest.mark.slow
def test_what_was_acknowledged_survives_a_killed_server(keyed: tuple[Running, Studio, Path]) -> None:
    server, labels, folder = keyed
    before = len(Corrections(folder / "kept"))
    for number in range(10, 14):
        assert give(server, labels, number).status == 200
    labels.slow = 0.5
    with ThreadPoolExecutor(1) as pool:
        unanswered = pool.submit(give, server, labels, 14)
        until(lambda: any("-14.png" in path for path in labels.paths()))
        server.end(signal.SIGKILL)
        with pytest.raises(OSError):
            unanswered.result()
    found = [each.source for each in Corrections(folder / "kept").all[before:]]
    assert found == [f"{UID}/{number}" for number in range(10, 14)]
