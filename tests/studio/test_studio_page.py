"""The studio's page in a real browser, with the real server and real photos, as a person uses it.

The tests are the steps of one session and run in their order.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from studiokit import Window, open_studio
from webdriver import Browser, driver, missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing() or "there is a browser")]

HOSTILE = "<img src=x onerror=document.title='owned'>.jpg"
ENTER, RIGHT, HOME, END, ESCAPE = "\ue007", "\ue014", "\ue011", "\ue010", "\ue00c"
CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
VIEWS = ("photos", "label", "map", "quality", "try", "take")
STEPS = "document.getElementById('steps').innerText"
FIRST = (
    "(document.querySelector('.label .cell[aria-selected=true]') || "
    "document.querySelector('.label .cell[aria-posinset=\"1\"]')).dataset.text.split(',')[0]"
)
CHOOSE = (
    "const field = document.querySelector(`.label select[aria-label=${arguments[0]}]`);"
    "field.value = arguments[1]; field.dispatchEvent(new Event('change'))"
)


@dataclass
class Scene:
    """A browser, the server and how to start it, what each photo really shows, and photos that it does not have."""

    page: Browser
    window: Window
    start: Callable[[], Window]
    truth: dict[str, str]
    fresh: list[Path]

    def go(self, view: str) -> None:
        self.page.run("location.hash = arguments[0]", view)
        self.page.wait(f"document.querySelector('.view.{view}:not([hidden])')?.innerText")

    def type(self, text: str) -> None:
        for letter in text:
            self.page.press(letter)

    def labels(self) -> dict[str, str | int]:
        """What the server has, by the name of the photo."""
        found, ids = self.window.get("/api/labels"), self.window.get("/api/photos")["ids"]
        names = [found["classes"][label] if label >= 0 else label for label in found["labels"]]
        return dict(zip(ids, names, strict=True))

    def key_of(self, kind: str) -> str:
        names = self.page.run("return [...document.querySelectorAll('.label .class-name')].map(e => e.textContent)")
        return str(names.index(kind) + 1)


@pytest.fixture(scope="module")
def scene(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A hundred unsorted photos below a root, one with a hostile name, and a broken one; nothing is open yet."""
    folder = tmp_path_factory.mktemp("studio")
    truth, fresh, unsorted = {}, [], folder / "root" / "unsorted"
    unsorted.mkdir(parents=True)
    kinds = {name: sorted((photos / "hymenoptera" / "train" / name).glob("*.jpg"))[:52] for name in ("ants", "bees")}
    for kind, files in kinds.items():
        fresh += files[50:]
        for i, file in enumerate(files[:50]):
            name = HOSTILE if (i, kind) == (0, "bees") else f"{i:03}{kind[0]}.jpg"
            shutil.copy(file, unsorted / name)
            truth[name] = kind
    (unsorted / "broken.jpg").write_bytes(kinds["ants"][0].read_bytes()[:2000])
    with ExitStack() as stack:
        url = stack.enter_context(driver(folder))

        def start() -> Window:
            return stack.enter_context(open_studio(folder, "--root", folder / "root"))

        window = start()
        page = Browser(url, folder / "profile", (1280, 800), more=CAMERA)
        page.resize(1280, 800)
        page.open(f"{window.server.url}/?token={window.token}")
        yield Scene(page, window, start, truth, fresh)
        complaints = page.log()
        page.close()
    assert complaints == []


def test_a_folder_is_chosen_and_read(scene: Scene) -> None:
    page = scene.page
    page.wait("[...document.querySelectorAll('.folder')].some(b => b.innerText.includes('unsorted'))")
    page.run("[...document.querySelectorAll('.folder')].find(b => b.innerText.includes('unsorted')).click()")
    page.wait("document.querySelector('.chooser input').value.endsWith('unsorted')")
    page.run("document.querySelector('.chooser .primary').click()")
    page.wait("document.querySelector('.doing')?.textContent.startsWith('100 photos read')")
    page.wait("document.querySelector('.refused').textContent.includes('1 file could not be used')")
    assert "broken.jpg" in page.run("return document.querySelector('.refused').textContent")
    page.wait("document.querySelectorAll('.photos .cell[data-state=shown]').length >= 30")


def test_labelling_by_keys_until_suggestions_come(scene: Scene) -> None:
    page, names = scene.page, list[str]()
    page.run("[...document.querySelectorAll('.photos a')].find(a => a.textContent === 'Start labelling').click()")
    page.wait("document.querySelectorAll('.label .cell[data-state=shown]').length >= 20")
    page.press(RIGHT)
    for _ in range(20):
        name = page.run(f"return {FIRST}")
        kind = scene.truth[name]
        if kind in names:
            page.press(str(names.index(kind) + 1))
        else:
            names.append(kind)
            scene.type(kind)
            page.press(ENTER)
        assert page.run(f"return {FIRST}") != name, "the selection did not move on"
    page.wait(f"{STEPS}.includes('20 labelled')")
    page.wait("document.querySelectorAll('.label .chip.faint').length > 10")
    assert page.run("return document.getElementById('said').textContent").startswith("1 photo: ")
    # The page shows labels before the server has them all.
    scene.window.wait(lambda: sum(label != -1 for label in scene.labels().values()) == 20)
    labelled = {name: label for name, label in scene.labels().items() if label != -1}
    assert labelled == {name: scene.truth[name] for name in labelled}


def test_undo_redo_unsure_and_reload(scene: Scene) -> None:
    page = scene.page
    before, name = scene.labels(), page.run(f"return {FIRST}")
    page.press("-")
    page.wait(f"{STEPS}.includes('21 labelled') && document.getElementById('undo').title == '1 photo: unsure'")
    page.press("u")
    page.wait(f"{STEPS}.includes('20 labelled')")
    assert scene.labels() == before
    assert page.run(f"return {FIRST}") == name, "what came back by undo is selected"
    page.run("document.getElementById('redo').click()")
    page.wait(f"{STEPS}.includes('21 labelled')")
    page.run("location.reload()")  # in the middle of it all
    page.wait(f"{STEPS}.includes('21 labelled') && !document.getElementById('undo').disabled")
    assert scene.labels() == {**before, name: -3}
    page.run("document.getElementById('undo').click()")
    page.wait(f"{STEPS}.includes('20 labelled')")


def test_a_lost_connection_keeps_labels_and_sends_them(scene: Scene) -> None:
    page = scene.page
    page.wait("document.querySelectorAll('.label .cell').length > 0")
    before = scene.labels()
    network: dict[str, Any] = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.devtools("Network.enable")
    page.devtools("Network.emulateNetworkConditions", offline=True, **network)
    page.run("document.querySelector('.label .grid').focus()")
    page.press(RIGHT)
    name = page.run(f"return {FIRST}")
    page.press(scene.key_of(scene.truth[name]))
    page.wait(f"{STEPS}.includes('21 labelled')")  # shown at once
    page.wait("document.getElementById('trouble').textContent.includes('connection')")
    assert scene.labels() == before
    page.devtools("Network.emulateNetworkConditions", offline=False, **network)
    page.wait("!document.getElementById('trouble').textContent")
    scene.window.wait(lambda: scene.labels() == {**before, name: scene.truth[name]})
    page.log()  # forget the requests that could not go out


def test_a_killed_server_is_started_again_and_no_label_is_lost(scene: Scene) -> None:
    page = scene.page
    before = scene.labels()
    scene.window.server.process.send_signal(signal.SIGKILL)
    scene.window.server.process.wait()
    name = page.run(f"return {FIRST}")
    page.press(scene.key_of(scene.truth[name]))
    page.wait(f"{STEPS}.includes('22 labelled')")  # shown at once
    page.wait("document.getElementById('trouble').textContent.startsWith('The connection to featx studio is lost')")
    scene.window = scene.start()  # by the same command, which names no folder
    page.wait("!document.getElementById('trouble').textContent")
    scene.window.wait(lambda: scene.labels() == {**before, name: scene.truth[name]})
    page.wait(f"{STEPS}.includes('22 labelled')")
    page.press("u")
    scene.window.wait(lambda: scene.labels() == before)
    page.wait("document.querySelectorAll('.label .chip.faint').length > 10")
    page.log()  # forget the requests that could not go out


def test_hostile_names_stay_text(scene: Scene) -> None:
    page = scene.page
    before = scene.labels()
    page.press("/")
    scene.type("<b>x</b>")
    page.press(ENTER)
    scene.window.wait(lambda: "<b>x</b>" in scene.labels().values())
    assert "<b>x</b>" in page.run("return document.querySelector('.label .classes').innerText")
    assert page.run("return document.querySelectorAll('.classes b').length") == 0
    page.press("u")
    scene.window.wait(lambda: scene.labels() == before)
    page.run(CHOOSE, "Show", "all")
    page.run(CHOOSE, "Order", "name")
    page.run("document.querySelector('.label .grid').focus()")
    page.press(HOME)
    labels = "[...document.querySelectorAll('.label .cell')].map(c => c.dataset.text)"
    page.wait(f"{labels}.some(name => name.startsWith({HOSTILE!r}))")
    assert page.run("return document.title") == "Label · unsorted"
    assert page.run("return document.querySelectorAll('img[src=x]').length") == 0
    page.run(CHOOSE, "Order", "worth")
    page.run(CHOOSE, "Show", "todo")


def test_a_class_name_that_is_refused_is_rolled_back(scene: Scene) -> None:
    page = scene.page
    before = scene.labels()
    page.run("document.querySelector('.label .grid').focus()")
    page.press(RIGHT)
    page.run("document.querySelector('.label .class-add input').removeAttribute('maxlength')")
    page.run(
        "const f = document.querySelector('.label .class-add input');"
        "f.value = 'long'.repeat(200); f.form.requestSubmit()"
    )
    page.wait("document.getElementById('said').classList.contains('bad')")
    page.wait(f"{STEPS}.includes('21 labelled')")
    assert scene.labels() == before
    page.log()  # forget the refusal


def test_a_batch_is_accepted_with_its_measured_error(scene: Scene) -> None:
    page = scene.page
    page.wait("document.querySelector('.batch')")
    text = page.run("return document.querySelector('.batches').innerText")
    assert "labelled photos" in text or "Cannot tell yet" in text
    before = scene.labels()
    accept = "document.querySelector('.batch button[aria-label^=\"Accept all\"]')"
    told = page.run(f"return {accept}.getAttribute('aria-label')").split()  # Accept all 34 suggestions of bees ...
    number, kind = int(told[2]), told[5]
    page.run(f"{accept}.click()")
    scene.window.wait(lambda: scene.labels() != before)
    changed = {name: label for name, label in scene.labels().items() if label != before[name]}
    assert len(changed) == number
    assert set(changed.values()) == {kind}
    scene.go("photos")  # which was out of sight meanwhile
    page.wait(f"document.querySelectorAll('.photos .cell .chip:not(.faint)').length >= {number}")
    right = sum(scene.truth[name] == kind for name in changed)
    assert right >= 0.8 * number, f"{right} of {number} suggestions above 95 % were right"


def test_a_lasso_on_the_map_selects_and_labels(scene: Scene) -> None:
    page = scene.page
    scene.go("map")
    page.wait("!document.querySelector('.map-work').hidden && document.querySelectorAll('.legend li').length > 1")
    box = page.run(
        "const r = document.querySelector('.stage canvas').getBoundingClientRect();"
        "return [r.left + 3, r.top + 3, r.right - 3, r.bottom - 3]"
    )
    left, top, right, bottom = box
    chosen = "document.querySelector('.picked p').textContent"
    page.drag((left, top), (right, top), (right, bottom), (left, bottom), (left, top + 2))
    page.wait(f"{chosen}.startsWith('100 photos selected')")
    middle = (left + right) / 2
    page.drag((left, top), (middle, top), (middle, bottom), (left, bottom), (left, top + 2))
    page.wait(f"!{chosen}.startsWith('100')")
    number = int(page.run(f"return {chosen}").split()[0])
    assert 0 < number < 100
    before = scene.labels()
    page.press("0")
    scene.window.wait(lambda: sum(label == -2 for label in scene.labels().values()) == number)
    page.press("u")
    scene.window.wait(lambda: scene.labels() == before)


def test_how_good_it_is_and_the_photos_behind_it(scene: Scene) -> None:
    page = scene.page
    scene.go("quality")
    page.wait("document.querySelector('.big') && document.querySelector('.confusion td.right button')")
    scene.window.wait(lambda: scene.window.get("/api/quality")["status"] == "done")
    mean = scene.window.get("/api/quality")["accuracy"]["mean"]
    page.wait(f"document.querySelector('.big strong')?.textContent == '{100 * mean:.0f}\\u00a0%'")
    page.wait(f"{STEPS}.includes('{100 * mean:.0f}\\u00a0%')")
    page.run("document.querySelector('.confusion td.right button').click()")
    page.wait("document.querySelectorAll('.gallery .cell[data-state=shown]').length > 0")
    assert "labelled " in page.run("return document.querySelector('.gallery h2').textContent")
    page.run("document.querySelector('.gallery').close()")
    page.wait("!document.querySelector('dialog')")


def test_a_new_photo_is_tried_and_added(scene: Scene) -> None:
    page = scene.page
    page.resize(390, 780)
    scene.go("try")
    page.choose(".try input[type=file]", scene.fresh[-1])
    page.wait("document.querySelector('.try .bars')")
    assert page.run("return document.querySelectorAll('.try .near img').length") > 0
    assert page.run("const m = document.getElementById('main'); return m.scrollWidth <= m.clientWidth"), "too wide"
    page.run(
        "const box = document.querySelector('.correct'), field = box.querySelector('input');"
        "field.value = 'Bees'; field.form.requestSubmit()"  # as the keyboard of a phone spells it
    )
    page.wait("document.querySelector('.correct .good')?.textContent.startsWith('Added as bees')")
    page.wait(f"{STEPS}.includes('101 photos')")
    assert len(scene.labels()) == 102, "a hundred, the broken one, and this one"
    assert list(scene.labels().values())[-1] == "bees"
    page.resize(1280, 800)


def test_a_tried_photo_that_the_browser_cannot_show_is_shown_all_the_same(scene: Scene, tmp_path: Path) -> None:
    page = scene.page
    scene.go("try")
    with Image.open(scene.fresh[-1]) as image:
        image.save(tmp_path / "scan.tif")
    page.choose(".try input[type=file]", tmp_path / "scan.tif")
    page.wait("document.querySelector('.try .bars')?.closest('.card').innerText.includes('scan.tif')")
    page.wait("document.querySelector('.try .layers img:first-child').naturalWidth > 100")
    assert page.run("return document.querySelector('.try .layers').innerText") == ""


@contextmanager
def as_a_phone(page: Browser) -> Iterator[Browser]:
    """The window as small as a phone's, and fingers instead of a mouse."""
    page.devtools("Emulation.setDeviceMetricsOverride", width=390, height=780, deviceScaleFactor=2, mobile=True)
    page.devtools("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        yield page
    finally:
        page.devtools("Emulation.setTouchEmulationEnabled", enabled=False)
        page.resize(1280, 800)


def test_the_camera_takes_a_photo_on_a_phone(scene: Scene) -> None:
    with as_a_phone(scene.page) as page:
        page.tap("[...document.querySelectorAll('.try button')].find(b => b.textContent === 'Use the camera')")
        page.wait("document.querySelector('.camera video').videoWidth > 0")
        page.tap("[...document.querySelectorAll('.camera button')].find(b => b.textContent === 'Take the photo')")
        page.wait("document.querySelector('.tries li .told .small')?.textContent.startsWith('camera ')")
        page.wait("document.querySelector('.tries li .bars')")
        page.tap("[...document.querySelectorAll('.camera button')].find(b => b.textContent === 'Close the camera')")
        assert page.run("return document.querySelector('.camera video').srcObject.active") is False
        for view in VIEWS:
            scene.go(view)
            wide = page.run("const m = document.getElementById('main'); return m.scrollWidth - m.clientWidth")
            assert wide <= 0, f"{view} is wider than a phone by {wide}"
        # A finger selects photo by photo, and a tap on a class labels them.
        scene.go("label")
        before = scene.labels()
        page.run("document.querySelector('.label .grid').scrollTop = 0")  # it stays where somebody scrolled it
        for place in (1, 2):
            page.wait(f"document.querySelector('.label .cell[aria-posinset=\"{place}\"][data-state=shown]')")
        page.run("document.querySelector('.label .grid').focus()")
        page.press(ESCAPE)  # nothing is selected
        for place in (1, 2):
            page.tap(f"document.querySelector('.label .cell[aria-posinset=\"{place}\"]')")
        assert page.run("return document.querySelectorAll('.label .cell[aria-selected=true]').length") == 2
        page.tap("[...document.querySelectorAll('.label .class-line')].find(e => e.textContent.includes('unsure'))")
        scene.window.wait(lambda: sum(label == -3 for label in scene.labels().values()) == 2)
        page.run("document.getElementById('undo').click()")
        scene.window.wait(lambda: scene.labels() == before)


def test_a_dropped_folder_is_added_but_for_what_is_no_photo(scene: Scene, tmp_path: Path) -> None:
    page = scene.page
    dropped = tmp_path / "more bees"
    (dropped / "inside").mkdir(parents=True)
    shutil.copy(scene.fresh[0], dropped / "a.jpg")
    shutil.copy(scene.fresh[1], dropped / "inside" / "b.JPG")
    (dropped / "notes.txt").write_text("seen at noon")
    before = len(scene.labels())
    scene.go("photos")
    page.drop((600, 500), dropped)
    page.wait("document.getElementById('said').textContent.startsWith('2 photos added. 1 not: notes.txt')")
    scene.window.wait(lambda: sum(scene.window.get("/api/photos")["embedded"]) == before + 1)
    assert len(scene.labels()) == before + 2
    page.wait(f"{STEPS}.includes('{before + 1} photos')")
    page.log()  # forget the refusal


def test_labels_and_model_are_taken_along(scene: Scene) -> None:
    page = scene.page
    scene.go("take")
    for title in ("Model file", "Labels"):
        page.run("document.querySelector(`.take[aria-label='${arguments[0]}'] button`).click()", title)
    for title in ("Model file", "Labels"):
        link = page.wait(f"document.querySelector(\".take[aria-label='{title}'] a\")?.getAttribute('href')")
        reply = scene.window.raw(link)
        assert reply.status == 200
        if title == "Labels":
            rows = list(csv.reader(io.StringIO(reply.body.decode())))
            assert {"ants", "bees"} <= set(itertools.chain(*rows[1:]))
    assert page.wait("document.querySelector('.sheet pre')?.textContent").count("featx ") >= 3


def test_no_serious_fault_for_screen_readers(scene: Scene) -> None:
    axe = os.environ.get("FEATX_AXE")
    if not axe:
        pytest.skip("FEATX_AXE does not name axe.min.js of the npm package axe-core")
    page, faults = scene.page, []
    page.run(Path(axe).read_text() + "; window.axe = axe")
    check = (
        "return axe.run().then(r => r.violations.filter(v => ['serious', 'critical'].includes(v.impact))"
        ".map(v => [v.id, v.nodes[0].html]))"
    )
    version = "return import('/static/store.js').then(m => m.store.suggestions.version)"
    still = {"name": "prefers-reduced-motion", "value": "reduce"}  # what fades has no contrast meanwhile
    for shade in ("light", "dark"):
        page.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": shade}, still])
        for view in VIEWS:
            scene.go(view)
            before, found = None, list[Any]()
            while before != (now := page.run(version)):  # new suggestions redraw photos while axe reads them
                before, found = now, page.run(check)
            faults += [(shade, view, *each) for each in found]
    assert faults == []


def test_ten_thousand_photos_hold_few_elements(scene: Scene) -> None:
    page = scene.page
    page.run(
        "import('/static/grid.js').then(({Grid}) => {"
        "  const box = document.createElement('div'); box.id = 'many';"
        "  Object.assign(box.style, {position: 'fixed', inset: '0'});"
        "  window.many = new Grid({label: 'many', decorate: (row) => ({text: `photo ${row}`}), pending: () => true});"
        "  box.append(many.element); document.body.append(box);"
        "  many.show([...Array(10000).keys()]); many.element.focus(); })"
    )
    page.wait("document.querySelectorAll('#many .cell').length > 0")
    page.press(END)
    page.wait("document.querySelector('#many .cell.cursor')?.getAttribute('aria-posinset') === '10000'")
    assert page.run("return document.querySelectorAll('#many .cell').length") < 400
    active = "document.getElementById(document.querySelector('#many .grid').getAttribute('aria-activedescendant'))"
    assert page.run(f"return {active}.dataset.text") == "photo 9999"
    assert page.run("return many.selected()") == [9999]
    page.run("document.getElementById('many').remove()")


HOLD = """
const real = window.fetch;
window.held = null;
window.asked = 0;
window.fetch = async (path, ...more) => {
  const answer = await real(path, ...more);
  if (path !== "/api/state") return answer;
  const state = await answer.json();
  if (!window.asked++ || window.held) {
    state.embedding = {...state.embedding, status: "running", done: 1, seconds_left: null};
    await window.held;
  }
  return new Response(JSON.stringify(state), {headers: {"Content-Type": "application/json"}});
};
"""
"""The first answer about the state, and those that are held, are from before the photos were read."""


def test_an_answer_that_an_event_overtook_does_not_say_that_photos_are_still_read(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    for file in sorted((photos / "hymenoptera" / "train" / "ants").glob("*.jpg"))[:8]:
        shutil.copy(file, folder)
    read = "document.querySelector('.doing')?.textContent.startsWith('8 photos read')"
    with driver(tmp_path) as url, open_studio(tmp_path, folder, "--backbone", "pixels") as window:
        window.wait_until_embedded()
        page = Browser(url, tmp_path / "profile", (1280, 800))
        page.devtools("Page.addScriptToEvaluateOnNewDocument", source=HOLD)
        page.open(f"{window.server.url}/?token={window.token}")
        page.wait(read)  # it ended after the page had asked, and before it listened
        page.run(
            "window.heard = 0; const events = new EventSource('/api/events');"
            "events.addEventListener('open', () => { window.listens = true; });"
            "events.addEventListener('embedding', () => { window.heard++; });"
        )
        page.wait("window.listens")
        asked = page.run(
            "window.held = new Promise((done) => { window.release = done; }); const {asked} = window;"
            "window.loading = import('/static/store.js').then((store) => store.load()); return asked"
        )
        page.wait(f"window.asked > {asked}")
        window.post("/api/embedding", op="start")
        page.wait("window.heard >= 2")
        window.wait_until_embedded()
        page.run("window.release(); return window.loading")
        page.wait(read)
        page.close()


def test_names_of_folders_are_asked_for_until_there_is_an_answer(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "days"
    for day in ("monday", "tuesday"):
        (folder / day).mkdir(parents=True)
        for file in sorted((photos / "hymenoptera" / "train" / "ants").glob("*.jpg"))[:4]:
            shutil.copy(file, folder / day)
    asks = "[...document.querySelectorAll('.ask button')].some((each) => each.offsetParent)"
    with driver(tmp_path) as url, open_studio(tmp_path, folder, "--backbone", "pixels") as window:
        page = Browser(url, tmp_path / "profile", (1280, 800))
        page.open(f"{window.server.url}/?token={window.token}")
        page.wait(asks)
        assert "monday (4), tuesday (4)" in page.run("return document.querySelector('.ask').innerText")
        page.wait("document.querySelectorAll('.copy figcaption').length === 8")
        assert page.run("return document.querySelector('.copy figcaption').innerText").startswith("monday/")
        page.run("document.querySelector('.copies > button').click()")
        page.wait("document.getElementById('said').textContent.startsWith('4 photos: left out. 0 of 4 labelled.')")
        window.wait(lambda: window.get("/api/state")["undo"] == "4 photos: left out")
        assert page.run(f"return {asks} && {STEPS}.includes('0 labelled')")
        page.run("[...document.querySelectorAll('.ask button')].at(-1).click()")
        page.wait(f"!({asks}) && document.getElementById('undo').title === 'labels of the folders not taken'")
        page.press("u")
        page.wait(asks)
        page.close()


def test_what_is_labelled_after_the_studio_has_ended_is_taken_back_and_said(scene: Scene) -> None:
    page = scene.page
    scene.go("label")
    page.run(CHOOSE, "Show", "all")
    page.run("document.querySelector('.label .grid').focus()")
    page.press(HOME)
    before = page.run(f"return {STEPS}")
    assert scene.window.server.end() == 0
    page.wait("document.getElementById('trouble').textContent.startsWith('featx studio was ended. Start it again')")
    page.press("-")
    page.wait("document.getElementById('said').textContent.startsWith('1 photo not labelled: The connection')")
    assert page.run(f"return {STEPS}") == before
    assert page.run("return document.getElementById('trouble').textContent").startswith("featx studio was ended")
    page.log()  # forget the requests that could not go out
