"""The studio's server: a real process, asked over HTTP as its page does, and as others should not."""

from __future__ import annotations

import csv
import io
import json
import signal
import struct
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from conftest import Featx, class_folders, picture
from PIL import Image
from studiokit import Window, listening, open_studio

from featx.models import read_bundle
from featx.store import read_features

pytestmark = pytest.mark.slow

BLUE, RED = (40, 60, 200), (200, 50, 40)


def coloured(folder: Path, number: int, colour: tuple[int, int, int]) -> Path:
    """A photo in one of two colours, with noise of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(-40, 40, (60, 80, 3))
    path = folder / f"{number:03d}.jpg"
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty loose photos, blue and red ones in turn, a broken one, and one whose name is hostile."""
    folder = tmp_path_factory.mktemp("studio") / "photos"
    for number in range(40):
        coloured(folder, number, (BLUE, RED)[number % 2])
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (folder / "<b>&'é.jpg").write_bytes((folder / "003.jpg").read_bytes())
    return folder


@pytest.fixture(scope="module")
def window(photos: Path) -> Iterator[Window]:
    with open_studio(photos.parent, photos, "--root", photos.parent) as found:
        found.wait_until_embedded()
        yield found


def frames(answer: bytes) -> dict[int, bytes]:
    """The pictures in an answer, by row."""
    found = {}
    while answer:
        row, length = struct.unpack("<II", answer[:8])
        found[row], answer = answer[8 : 8 + length], answer[8 + length :]
    return found


def truth(window: Window) -> dict[int, str]:
    ids = window.get("/api/photos")["ids"]
    return {row: ("blue", "red")[int(id[:3]) % 2] for row, id in enumerate(ids) if id[:3].isdigit()}


def test_photos_are_listed_embedded_and_refused_with_reasons(window: Window, photos: Path) -> None:
    listed = window.get("/api/photos")
    assert listed["ids"] == sorted(path.name for path in photos.iterdir())
    broken = listed["ids"].index("broken.jpg")
    assert listed["refused"] == [broken]
    assert [row for row, has in enumerate(listed["embedded"]) if not has] == [broken]
    (refused,) = window.get("/api/refused")["refused"]
    assert (refused["id"], refused["reason"]) == ("broken.jpg", "truncated")
    state = window.get("/api/state")
    assert (state["photos"], state["embedding"]["refused"], state["labelled"]) == (42, 1, 0)
    small = sum(1 for _ in photos.with_name("photos.studio").glob("thumbnails/*/*.jpg"))
    assert small >= 40  # made while the photos were read: nobody asked for them
    thumb = window.raw("/thumb/0")
    assert Image.open(io.BytesIO(thumb.body)).size == (160, 160)
    assert "immutable" in thumb.headers["cache-control"]
    assert Image.open(io.BytesIO(window.raw("/photo/0").body)).size == (1200, 900)
    assert window.raw(f"/thumb/{broken}").status == 404
    many = frames(window.raw(f"/thumbs?rows=1,{broken},0,99").body)
    assert many[0] == thumb.body
    assert (sorted(many), many[broken]) == ([0, 1, broken], b"")
    assert many == frames(window.raw(f"/thumbs?rows=0,1,{broken}").body)
    for rows in ("", "x", "-1", "0,", "0" * 20_000):
        assert window.raw(f"/thumbs?rows={rows}").status == 422, rows
    assert window.raw("/thumb/99").json["error"]["reason"] == "no_photo"
    copies = window.get("/api/duplicates")["groups"]
    assert [(group["kind"], {listed["ids"][row] for row in group["rows"]}) for group in copies] == [
        ("equal", {"003.jpg", "<b>&'é.jpg"})
    ]
    assert window.get(f"/api/similar/{listed['ids'].index('003.jpg')}")["rows"][1] == listed["ids"].index("<b>&'é.jpg")


def test_a_loop_of_labels_suggestions_and_what_follows(window: Window, photos: Path, featx: Featx) -> None:
    names = truth(window)
    with listening(window) as events:
        first = window.get("/api/suggestions")
        assert not first["ready"]
        assert "two classes" in first["reason"]
        window.label({row: names[row] for row in [row for row in first["worth"] if row in names][:10]})
        found = window.get("/api/suggestions")
        labels = window.get("/api/labels")
        right = [
            labels["classes"][found["suggested"][row]] == name
            for row, name in names.items()
            if labels["labels"][row] == -1
        ]
        assert np.mean(right) > 0.9
        embedded = [row for row, has in enumerate(window.get("/api/photos")["embedded"]) if has]
        assert sorted(found["worth"]) == [row for row in embedded if labels["labels"][row] == -1]
        few = window.upload("/api/try", coloured(photos.parent / "few", 101, RED).read_bytes()).json
        assert (few["reason"], few["caution"][:42]) == ("unsure", "This classifier is unsure of every photo: ")
        window.post("/api/take", what="model")
        (job,) = window.wait(lambda: [job for job in window.get("/api/state")["jobs"] if job["status"] == "done"])
        assert job["message"] == few["caution"]
        rest = {row: name for row, name in names.items() if labels["labels"][row] == -1}
        window.label(rest)
        window.wait(lambda: window.get("/api/quality")["status"] == "done")
        assert {"labels", "suggestions", "quality"} <= {name for name, _ in events}
    quality = window.get("/api/quality")
    assert quality["n"] == 40
    assert quality["accuracy"]["mean"] > 0.9
    assert sum(map(sum, quality["confusion"]["counts"])) == 40
    assert [each["shots"] for each in quality["curve"]][:3] == [1, 2, 5]
    assert sum(each["n"] for each in quality["classes"]) == 40

    # What was taken along is what the command line makes of the same files.
    window.post("/api/take", what="model")
    window.wait(lambda: all(job["status"] == "done" for job in window.get("/api/state")["jobs"]))
    reply = window.raw("/api/take/photos.model")
    taken = photos.parent / "taken.model"
    taken.write_bytes(reply.body)
    rows = list(csv.DictReader(io.StringIO((photos.parent / "photos.studio" / "labels.csv").read_text())))
    assert {(Path(row["path"]).name[:3], row["label"]) for row in rows if row["label"]} == {
        (f"{number:03d}", ("blue", "red")[number % 2]) for number in range(40)
    }
    store = photos.parent / "photos.studio" / "photos.featx"
    window.wait(lambda: (read_features(store).labels >= 0).sum() == 40)
    assert featx("fit", store, "--out", photos.parent / "same.model").code == 0
    same = read_bundle(photos.parent / "same.model")
    rows_of = read_features(store).embeddings
    found_answers = [answer.to_json() for answer in read_bundle(taken).answer(rows_of)]
    assert found_answers == [answer.to_json() for answer in same.answer(rows_of)]
    assert window.raw("/api/take/..%2Fjournal.jsonl").status in (404, 422)
    commands = window.get("/api/commands")["commands"]
    assert [command.split()[:2] for command in commands] == [["featx", "extract"], ["featx", "sweep"], ["featx", "fit"]]

    # A new photo is judged, corrected and added.
    new = coloured(photos.parent / "new", 100, RED).read_bytes()
    tried = window.upload("/api/try", new).json
    assert tried["probabilities"]["red"] > 0.5 and tried["caution"] == ""
    assert Image.open(io.BytesIO(window.raw(f"/tried/{tried['id']}").body)).format == "JPEG"
    assert window.raw("/tried/t99").status == 422
    assert tried["overlay"].startswith("data:image/png;base64,")
    assert {near["label"] for near in tried["neighbours"]} == {"red"}
    added = window.post("/api/try/add", id=tried["id"], name="green")
    assert window.get("/api/labels")["labels"][added["row"]] == window.get("/api/labels")["classes"].index("green")
    window.wait(lambda: window.get("/api/photos")["embedded"][added["row"]])
    assert window.ask("/api/try/add", id="t99", name="red").status == 422


def test_classes_and_undo(window: Window) -> None:
    before = window.get("/api/labels")
    made = window.post("/api/classes", op="add", name="moth")
    moth = made["classes"].index("moth")
    assert window.ask("/api/classes", op="add", name=" moth ").json["error"]["reason"] == "exists"
    assert window.ask("/api/classes", op="rename", class_=moth, name="red").status in (200, 409)
    window.post("/api/label", rows=[0, 1], label=moth, from_="key")
    window.post("/api/classes", op="rename", class_=moth, name="hawk moth")
    kept = window.post("/api/classes", op="add", name="kept")["classes"].index("kept")
    window.post("/api/classes", op="merge", class_=moth, into=kept)
    assert window.get("/api/labels")["labels"][:2] == [kept, kept]
    while window.get("/api/labels")["labels"] != before["labels"]:
        window.post("/api/undo")
    assert window.get("/api/labels")["redo"]
    assert window.ask("/api/label", rows=[0], label=99).status == 422
    assert window.ask("/api/label", rows=[10**6], label=0).status == 404
    assert window.ask("/api/label", rows=[0], label=0, name="both").status == 422
    assert window.ask("/api/label", rows="all", label=0).status == 422


def test_two_windows_see_the_same(window: Window, photos: Path) -> None:
    with listening(window) as first, listening(window) as second:
        window.post("/api/label", rows=[2], label=-3, from_="key")
        window.wait(lambda: all("labels" in {name for name, _ in list(events)} for events in (first, second)))
        wanted = ("labels", [2], [-3])
        for events in (first, second):
            name, data = next(each for each in events if each[0] == "labels")
            assert (name, data["rows"], data["labels"]) == wanted
        # What cannot be written is told, too, and later written.
        labels = photos.parent / "photos.studio" / "labels.csv"
        labels.unlink(missing_ok=True)
        labels.mkdir()
        window.post("/api/undo")
        problem = window.wait(lambda: next((data for name, data in list(first) if name == "problem"), None))
        assert problem["what"] == "labels.csv"
        labels.rmdir()
        window.post("/api/label", rows=[2], label=-3, from_="key")
        window.post("/api/undo")
        window.wait(labels.is_file)


def test_who_has_no_token_is_from_elsewhere_or_sends_too_much_is_refused(window: Window, photos: Path) -> None:
    server = window.server
    assert server.get("/").status == 401
    assert server.get("/api/state", {"Cookie": "featx-studio=wrong"}).status == 401
    assert server.get("/?token=wrong").status == 401
    assert server.get("/api/state?token=" + window.token).status == 401  # of the address itself alone
    assert server.get("/api/state", {**window.headers, "Host": "evil.example"}).status == 403
    posted = {**window.headers, "Content-Type": "application/json", "Origin": "http://evil.example"}
    assert server.ask("/api/undo", b"{}", posted).status == 403
    as_json = {**window.headers, "Content-Type": "application/json"}
    assert server.ask("/api/label", b"{" * 10_000, as_json).status == 422
    for path, length in (("/api/label", 17 * 2**20), ("/api/drop", 101 * 2**20), ("/api/drop", -1)):
        connection = HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.request("POST", path, headers={**as_json, "Content-Length": str(length)})
        assert connection.getresponse().status in (400, 413), path  # by its header: the body is not read
        connection.close()
    assert window.upload("/api/try", b"").json["error"]["message"] == "This file is empty."
    assert window.raw("/api/nothing").status == 404
    assert window.raw("/static/../session.py").status == 404
    page = window.raw("/")
    assert page.status == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"


def test_nothing_outside_the_root_is_shown_or_opened(window: Window, photos: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    class_folders(secret)
    (photos.parent / "link").symlink_to(secret)
    for path in ("..", "/", "/etc", str(secret), "link", "photos/../..", f"{photos}/../../..", "\0", "~"):
        reply = window.raw("/api/folders?path=" + quote(path))
        assert reply.status in (403, 404, 422), path
        assert window.ask("/api/open", path=path).status in (403, 404, 422), path
    listed = window.get("/api/folders")
    assert (listed["parent"], listed["root"]) == (None, str(photos.parent))
    assert {"name": "photos", "path": str(photos), "images": 42, "begun": True} in listed["folders"]
    assert window.get("/api/state")["open"]


def test_a_second_process_is_refused_and_a_killed_one_has_left_everything(
    window: Window, photos: Path, featx: Featx
) -> None:
    ran = featx("studio", photos, "--no-browser")
    assert ran.code == 2
    assert "another featx studio has this project open" in ran.err
    assert f"{window.server.url}/?token={window.token}" in ran.err, "for who has closed its window"
    labels = window.get("/api/labels")
    window.server.process.send_signal(signal.SIGKILL)
    window.server.process.wait()
    with open_studio(photos.parent, photos, "--root", photos.parent) as again:
        (kept,) = again.get("/api/state")["jobs"]  # what was taken along in the loop above is still there
        assert (kept["what"], kept["status"]) == ("model", "done")
        assert len(again.raw("/api/take/photos.model").body) == kept["bytes"]
        found = again.get("/api/labels")
        names = [found["classes"][code] if code >= 0 else code for code in found["labels"]]
        assert sorted(map(str, names)) == sorted(
            str(labels["classes"][code] if code >= 0 else code) for code in labels["labels"]
        )
        assert again.get("/api/state")["undo"] == labels["undo"]
        assert (again.server.port, again.token) == (window.server.port, window.token), "a window of before goes on"
        assert again.server.end(signal.SIGINT) == 0
        assert "Traceback" not in again.server.said()
    with open_studio(photos.parent, photos, "--root", photos.parent) as anew:
        assert anew.token != window.token, "it ended in order"


def test_class_folders_are_labels_if_one_says_so(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "insects", each=3)
    with open_studio(tmp_path, folder) as window:
        asked = window.get("/api/state")
        assert (asked["folder_classes"], asked["folder_names"], asked["list"]) == (2, {"ants": 3, "bees": 3}, False)
        assert window.get("/api/photos")["splits"] == []
        for said in ("labels of the folders not taken", "1 photo: left out"):
            if "taken" in said:
                window.post("/api/folder-classes", take=False)
                assert window.get("/api/state")["folder_classes"] == 0
            else:
                window.post("/api/label", rows=[0], label=-4, from_="copies")
                assert window.get("/api/state")["folder_classes"] == 2, "that copies are left out is no answer"
            assert window.get("/api/state")["undo"] == said
            window.post("/api/undo")
            assert window.get("/api/state")["folder_classes"] == 2
        told = window.post("/api/folder-classes", take=True)
        assert told["labelled"] == 6
        state = window.get("/api/state")
        assert (state["folder_classes"], state["undo"]) == (0, "6 photos: labels of the folders")
        window.wait_until_embedded()
        labels = tmp_path / "insects.studio" / "labels.csv"
        window.wait(lambda: labels.exists() and labels.read_text().count("the folders") == 6)
        assert len(labels.read_text().splitlines()) == 7
        start = time.perf_counter()
        assert window.server.end(signal.SIGTERM) == 0
        assert time.perf_counter() - start < 20
    assert sorted(path.name for path in folder.rglob("*.png")) == [f"{number:03d}.png" for number in range(6)]


def test_a_folder_is_chosen_made_and_filled_through_the_page(tmp_path: Path) -> None:
    class_folders(tmp_path / "insects", each=2)
    with open_studio(tmp_path, "--root", tmp_path) as window:
        assert window.get("/api/state")["open"] is False
        assert window.raw("/api/photos").json["error"]["reason"] == "no_folder_open"
        assert window.ask("/api/open", path="nowhere").status == 404
        assert window.post("/api/open", path="insects")["photos"] == 4
        window.wait_until_embedded()
        assert window.ask("/api/open", path="insects", make=True).json["error"]["reason"] == "exists"
        assert window.post("/api/open", path="dropped", make=True)["photos"] == 0
        out = io.BytesIO()
        picture(7).save(out, format="PNG")
        for name in ("a.png", "../../evil.png", "<i>.png", ".png", "x" * 900):
            assert window.upload(f"/api/drop?name={quote(name)}", out.getvalue() + name.encode()).status == 200
        window.wait(lambda: sum(window.get("/api/photos")["embedded"]) == 5)
        inside = sorted(path.name for path in (tmp_path / "dropped.studio" / "added").iterdir())
        assert len(inside) == 5
        assert not (tmp_path / "evil.png").exists()
        assert list((tmp_path / "dropped").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "no such folder or list of photos"),
        (["empty"], "no photos in this folder"),
        (["photos", "--project", "photos/inside"], "would lie inside the folder of photos"),
        (["--project", "x"], "--project goes with a folder"),
        (["photos", "--root", "nowhere"], "no such folder"),
        (["photos", "--backbone", "resnet5000"], "resnet5000"),
    ],
)
def test_what_cannot_be_opened_is_said(tmp_path: Path, featx: Featx, arguments: list[str], said: str) -> None:
    (tmp_path / "empty").mkdir()
    class_folders(tmp_path / "photos", each=1)
    ran = featx("studio", *arguments, "--no-browser", cwd=tmp_path)
    assert ran.code == 2
    assert said in ran.err, json.dumps(ran.err)


def test_photos_of_a_burst_are_shown_side_by_side_and_kept_on_one_side(tmp_path: Path) -> None:
    folder = tmp_path / "trap"
    folder.mkdir()
    for number in range(8):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9003] = f"2024:05:01 10:{number // 4:02d}:{2 * (number % 4):02d}"
        picture(number).save(folder / f"{number}.jpg", exif=exif)
    with open_studio(tmp_path, folder) as window:
        window.wait_until_embedded()
        groups = window.get("/api/duplicates")["groups"]
        assert groups == [{"rows": [0, 1, 2, 3], "kind": "burst"}, {"rows": [4, 5, 6, 7], "kind": "burst"}]
        window.post("/api/label", rows=[1, 2, 3], label=-4, from_="copies")
        assert window.get("/api/duplicates")["groups"] == groups[1:]
    assert set(read_features(tmp_path / "trap.studio" / "photos.featx").groups[:4]) == {"2024-05-01T10:00:00"}


def test_a_list_is_opened_with_its_labels_and_groups(tmp_path: Path) -> None:
    class_folders(tmp_path / "insects", each=3)
    (tmp_path / "insects" / "list.csv").write_text(
        "path,label,group,split\n"
        + "".join(f"ants/00{n}.png,ant,nest {n % 2},train\n" for n in range(3))
        + "bees/003.png,bee,,test\nbees/004.png,,,\nbees/gone.png,,,\n"
    )
    with open_studio(tmp_path, tmp_path / "insects" / "list.csv", "--project", tmp_path / "project") as window:
        window.wait_until_embedded()
        asked = window.get("/api/state")
        assert (asked["folder_names"], asked["list"]) == ({"ant": 3, "bee": 1}, True)
        assert window.post("/api/folder-classes", take=True)["labelled"] == 4
        assert [each["id"] for each in window.get("/api/refused")["refused"]] == ["bees/gone.png"]
        assert window.get("/api/photos")["splits"] == [*3 * ["train"], "test", "", ""]
        written = tmp_path / "project" / "labels.csv"
        window.wait(lambda: written.exists() and "the list" in written.read_text())
    features = read_features(tmp_path / "project" / "photos.featx")
    assert sorted(features.groups.tolist()) == ["", "", "nest 0", "nest 0", "nest 1"]


def test_a_folder_with_too_few_photos_for_a_map_says_so(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "few", ["."], each=4)
    with open_studio(tmp_path, folder, "--root", tmp_path) as window:
        said = window.wait(lambda: [found for found in [window.get("/api/state")["map"]] if found["version"]])
        assert (said[0]["status"], said[0]["message"]) == ("few", "It takes at least 5 photos that can be read.")
        window.upload("/api/drop?name=fifth.png", coloured(tmp_path / "more", 5, RED).read_bytes())
        window.wait(lambda: window.get("/api/state")["map"]["status"] == "done")
        assert None not in window.get("/api/map")["x"]


def test_a_link_that_leads_out_is_not_followed(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "home" / "photos", ["."], each=2)
    secret = class_folders(tmp_path / "secret", ["."], each=1, first=9) / "009.png"
    (folder / "linked.png").symlink_to(secret)
    (folder / "inside.png").symlink_to(folder / "000.png")
    (folder / "up").symlink_to(tmp_path / "secret")
    with open_studio(tmp_path, folder, "--root", tmp_path / "home") as window:
        window.wait_until_embedded()
        refused = {each["id"]: each["message"] for each in window.get("/api/refused")["refused"]}
        assert refused["linked.png"] == "a link that leads out of the folder"
        ids = window.get("/api/photos")["ids"]
        assert {row for row, has in enumerate(window.get("/api/photos")["embedded"]) if has} == {
            ids.index(name) for name in ("000.png", "001.png", "inside.png")
        }
        for name in refused:
            assert window.raw(f"/thumb/{ids.index(name)}").status == 404
            assert window.raw(f"/photo/{ids.index(name)}").status == 404


def test_labels_that_a_spreadsheet_changed_are_taken_over_and_can_be_taken_back(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "insects", ["."], each=4)
    labels = tmp_path / "insects.studio" / "labels.csv"
    with open_studio(tmp_path, folder) as window:
        window.wait_until_embedded()
        window.post("/api/label", rows=[0, 1], name="ant", from_="key")
        assert window.server.end() == 0
    text = labels.read_text()
    assert text.count("ant") == 2
    # As a spreadsheet in Europe writes it: another separator, another order, one label changed, one added, one marked.
    rows = [line.split(",") for line in text.splitlines()]
    rows[2][1], rows[3][1], rows[4][2] = "bee", "bee", "unsure"
    labels.write_text("\n".join(";".join(row) for row in [rows[0], *rows[:0:-1]]) + "\n")
    with open_studio(tmp_path, folder) as window:
        found = window.get("/api/labels")
        names = [found["classes"][code] if code >= 0 else code for code in found["labels"]]
        assert names == ["ant", "bee", "bee", -3]
        assert found["undo"] == "3 photos: labels of labels.csv"
        window.post("/api/undo")
        assert window.get("/api/labels")["labels"] == [0, 0, -1, -1]
        window.server.process.send_signal(signal.SIGKILL)  # before it has written the list
    with open_studio(tmp_path, folder) as window:
        assert window.get("/api/labels")["labels"] == [0, 0, -1, -1]
