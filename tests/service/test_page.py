"""The page in a real browser: photos in, results and errors out, by mouse and keyboard, on a phone, in the dark."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from conftest import Featx, class_folders, picture
from servicekit import Running, plain, png, start, start_tiny
from webdriver import Browser, driver, missing

from featx.images.pixels import encode
from featx.models.corrections import Corrections

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing() or "there is a browser")]

DONE = "!document.querySelector('.card[data-state=waiting]') && document.querySelectorAll('.card').length == {}"
READY = "document.getElementById('health').textContent == 'ready'"


def photos(folder: Path, number: int) -> list[Path]:
    folder.mkdir()
    files = [folder / f"{i:03}.png" for i in range(number)]
    for i, file in enumerate(files):
        file.write_bytes(png(i))
    return files


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("chrome")
    with driver(folder) as url:
        yield url, folder


@pytest.fixture(scope="module")
def browser(chrome: tuple[str, Path]) -> Iterator[Browser]:
    made = Browser(chrome[0], chrome[1] / "profile", (1000, 900))
    yield made
    made.close()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, featx: Featx) -> Path:
    folder = tmp_path_factory.mktemp("page")
    class_folders(folder / "photos", each=8)
    assert featx("extract", "photos", "--out", "photos.featx", cwd=folder).code == 0
    assert featx("fit", "photos.featx", "--out", "photos.model", cwd=folder).code == 0
    return folder


@pytest.fixture(scope="module")
def server(kept: Path) -> Iterator[Running]:
    command = ("-m", "featx", "serve", kept / "photos.model", "--store", kept / "photos.featx", "--images")
    with start(kept, *command, kept / "photos", "--port", 0) as running:
        yield running


@pytest.mark.slow
def test_photos_and_a_broken_file(server: Running, kept: Path, browser: Browser, tmp_path: Path) -> None:
    good = [kept / "photos/ants/000.png", kept / "photos/bees/008.png"]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(encode(np.asarray(picture(3)), form="JPEG")[:300])
    odd = tmp_path / "<b>notes.txt"
    odd.write_text("no image")
    browser.open(server.url + "/")
    browser.wait(READY)
    assert browser.run("return document.getElementById('about').textContent") == "ants, bees"
    browser.choose("#files", *good, broken, odd)
    browser.wait(DONE.format(4))
    told = {
        name: browser.run(
            "const card = [...document.querySelectorAll('.card')].find(c => c.querySelector('.name').textContent == "
            "arguments[0]); return [card.dataset.state, card.querySelector('h2').textContent, "
            "card.querySelectorAll('.bars .fill').length, card.querySelectorAll('.near li').length]",
            name,
        )
        for name in ("000.png", "008.png", "broken.jpg", "<b>notes.txt")
    }
    for photo in good:
        (expected,) = server.send("/predict", photo.read_bytes()).json["predictions"]
        state, title, bars, neighbours = told[photo.name]
        assert (state, bars, neighbours) == ("done", 2, 6)
        assert (expected["label"] in title) == (expected["reason"] != "unknown")
        assert title.startswith("Not sure") == (expected["reason"] == "unsure")
    assert told["broken.jpg"][0] == "failed" and "The file ends before the image does" in told["broken.jpg"][1]
    assert told["<b>notes.txt"][0] == "failed" and "Not one of JPEG" in told["<b>notes.txt"][1]
    thumbnails = "[...document.querySelectorAll('.near img')]"
    browser.wait(f"{thumbnails}.length == 12 && {thumbnails}.every(i => i.naturalWidth == 160)")
    width = browser.run("return document.querySelector('.bars .fill').getBoundingClientRect().width")
    assert width > 0
    # The two refused files are all that the browser may complain of: no script was blocked, nothing was missing.
    assert all("422" in line for line in browser.log())
    shots = Path(os.environ.get("FEATX_SCREENSHOTS") or tmp_path)
    assert browser.screenshot(shots / "page.png").stat().st_size > 10_000
    browser.resize(360, 740)
    assert browser.run("return document.documentElement.scrollWidth") <= 360
    browser.screenshot(shots / "phone.png")
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.devtools("Emulation.setEmulatedMedia", features=dark)
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(16, 19, 23)"
    browser.screenshot(shots / "dark.png")
    browser.devtools("Emulation.setEmulatedMedia", features=[])
    browser.resize(1000, 900)


@pytest.mark.slow
def test_the_switch_shows_why(server: Running, kept: Path, browser: Browser, tmp_path: Path) -> None:
    browser.open(server.url + "/")
    browser.wait(READY)
    first, second = kept / "photos/ants/000.png", kept / "photos/bees/008.png"
    browser.choose("#files", first)
    browser.wait(DONE.format(1))
    why, images = "document.querySelectorAll('.why')", "[...document.querySelectorAll('.why img')]"
    assert browser.run(f"return {why}.length") == 0  # nobody asked
    browser.run("document.getElementById('why').click()")
    browser.wait(f"{why}.length == 1")  # what is there already is explained, too
    browser.choose("#files", second)
    browser.wait(DONE.format(2))
    browser.wait(f"{why}.length == 2")
    browser.wait(f"{images}.length == 8 && {images}.every(i => i.complete && i.naturalWidth > 0)")
    shown = browser.run(
        "return [...document.querySelectorAll('.card')].map(c => [c.querySelector('.name').textContent, "
        "[...c.querySelectorAll('.why figcaption')].map(f => f.textContent), c.querySelectorAll('.bars').length])"
    )
    for name, captions, bars in shown:
        file = first if name == "000.png" else second
        (expected,) = server.send("/predict?explain=true", file.read_bytes()).json["predictions"]
        assert captions == [f"Evidence for {each['class']}" for each in expected["explanation"]["classes"]]
        assert captions[0] == f"Evidence for {expected['label']}"
        assert bars == 1
    boxes = browser.run(
        "return [...document.querySelectorAll('.why .layers')].map(box => [...box.children].map(i => "
        "{ const r = i.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; }))"
    )
    for photo, overlay in boxes:
        assert np.abs(np.subtract(photo, overlay)).max() < 1.5
        assert photo[2] / photo[3] == pytest.approx(40 / 30, abs=0.02)
    shots = Path(os.environ.get("FEATX_SCREENSHOTS") or tmp_path)
    browser.screenshot(shots / "why.png")
    browser.resize(360, 740)
    assert browser.run("return document.documentElement.scrollWidth") <= 360
    browser.resize(1000, 900)
    browser.run("document.getElementById('why').click()")
    assert browser.run("return getComputedStyle(document.querySelector('.why')).display") == "none"
    assert browser.log() == []


def test_dropping_and_pasting(server: Running, kept: Path, browser: Browser) -> None:
    browser.open(server.url + "/")
    browser.wait(READY)
    script = """
        const canvas = document.createElement("canvas");
        canvas.width = canvas.height = 64;
        canvas.getContext("2d").fillRect(8, 8, 30, 20);
        return new Promise(done => canvas.toBlob(blob => {
          const data = new DataTransfer();
          data.items.add(new File([blob], arguments[0] + ".png", {type: "image/png"}));
          dispatchEvent(arguments[0] == "drop" ? new DragEvent("drop", {dataTransfer: data, cancelable: true})
            : new ClipboardEvent("paste", {clipboardData: data}));
          done(true);
        }));
    """
    for number, way in enumerate(("drop", "paste"), 1):
        browser.run(script, way)
        browser.wait(DONE.format(number))
        assert browser.run("return document.querySelector('.card .name').textContent") == f"{way}.png"
        assert browser.run("return document.querySelector('.card').dataset.state") == "done"


def test_the_keyboard_opens_the_file_dialogue(server: Running, browser: Browser) -> None:
    browser.open(server.url + "/")
    browser.wait(READY)
    browser.run("window.opened = 0; document.getElementById('files').click = () => { window.opened++; }")
    browser.press("\ue004")  # Tab
    assert browser.run("return document.activeElement.id") == "drop"
    browser.press("\ue007")  # Enter
    browser.press(" ")
    assert browser.run("return window.opened") == 2


@pytest.mark.slow
def test_a_key_is_asked_for_and_the_badge_tells_the_end(chrome: tuple[str, Path], browser: Browser) -> None:
    with start_tiny(chrome[1], api_key="sesame") as server:
        browser.open(server.url + "/")
        browser.wait("!document.getElementById('key').hidden")
        browser.run(
            "document.getElementById('secret').value = 'sesame'; document.getElementById('key').requestSubmit()"
        )
        browser.wait("document.getElementById('about').textContent == 'ants, bees'")
        assert server.end() == 0
    browser.wait("document.getElementById('health').textContent == 'no connection'", 30)


@pytest.mark.slow
def test_an_unknown_photo_is_called_unknown(chrome: tuple[str, Path], browser: Browser) -> None:
    black = chrome[1] / "black.png"
    black.write_bytes(plain((0, 0, 0)))
    with start_tiny(chrome[1]) as server:
        browser.open(server.url + "/")
        browser.wait(READY)
        browser.choose("#files", black, *photos(chrome[1] / "own", 1))
        browser.wait(DONE.format(2))
        title, told = browser.run(
            "const card = [...document.querySelectorAll('.card')].find(c => c.querySelector('.name').textContent == "
            "'black.png'); return [card.querySelector('h2').textContent, card.querySelector('.told').innerText]"
        )
        assert title == "Unknown"
        assert "Unlike the photos that this model was made from" in told and "nine times out of ten" not in told
        # The model of this service is seldom sure of one of its two classes.
        every = browser.run("return document.getElementById('results').innerText")
        assert "One of these nine times out of ten: " in every
        assert browser.run("return document.getElementById('counts').textContent") == "2 photos, 1 unknown"
        assert "unknown (1)" in browser.run("return document.getElementById('filter').innerText")
        rows = {row["file"]: row for row in csv.DictReader(browser.run("return table()").splitlines())}
        assert (rows["black.png"]["reason"], float(rows["black.png"]["familiarity"])) == ("unknown", 1 / 41)
        shots = Path(os.environ.get("FEATX_SCREENSHOTS") or chrome[1])
        browser.screenshot(shots / "unknown.png")


@pytest.mark.slow
def test_what_was_refused_without_a_key_is_tried_again_with_it(chrome: tuple[str, Path], browser: Browser) -> None:
    files = photos(chrome[1] / "locked", 2)
    with start_tiny(chrome[1], api_key="sesame") as server:
        browser.open(server.url + "/")
        browser.wait("!document.getElementById('key').hidden")
        browser.choose("#files", *files)
        browser.wait("document.querySelectorAll('.card[data-state=locked]').length == 2")
        for secret, state in (("wrong", "locked"), ("sesame", "done")):
            browser.run("document.getElementById('secret').value = arguments[0]", secret)
            browser.run("document.getElementById('key').requestSubmit()")
            browser.wait(f"document.querySelectorAll('.card[data-state={state}]').length == 2")


@pytest.mark.slow
def test_a_photo_above_the_limit_is_scaled_down_and_says_so(chrome: tuple[str, Path], browser: Browser) -> None:
    large = chrome[1] / "large.png"
    large.write_bytes(encode(np.random.default_rng(0).integers(0, 256, (1900, 2200, 3), dtype=np.uint8)))
    assert large.stat().st_size > 10 * 2**20
    with start_tiny(chrome[1]) as server:
        assert server.send("/predict", large.read_bytes()).status == 413
        browser.open(server.url + "/")
        browser.choose("#files", large)
        browser.wait(DONE.format(1))
        assert browser.run("return document.querySelector('.card').dataset.state") == "done"
        note = browser.run("return document.querySelector('.card .note').textContent")
        assert "scaled down to 2048 x 1769 pixels" in note


@pytest.mark.slow
def test_many_photos_get_a_summary_a_filter_and_a_table(chrome: tuple[str, Path], browser: Browser) -> None:
    files = photos(chrome[1] / "many", 60)
    odd = chrome[1] / "=odd, name.txt"
    odd.write_text("no image")
    with start_tiny(chrome[1]) as server:
        browser.open(server.url + "/")
        browser.choose("#files", *files, odd)
        browser.wait(DONE.format(61))
        names = "return [...document.querySelectorAll('.card .name')].map(e => e.textContent)"
        assert browser.run(names) == [*(file.name for file in files), odd.name]
        assert browser.run("return document.getElementById('counts').textContent").startswith("61 photos")
        assert browser.run("return document.body.scrollHeight") < 12_000
        visible = "[...document.querySelectorAll('.card')].filter(c => !c.hidden)"
        assert browser.run(f"return {visible}.length") == 20
        browser.run("document.getElementById('more').click()")
        assert browser.run(f"return {visible}.length") == 40
        browser.run(
            "const f = document.getElementById('filter'); f.value = 'not read'; f.dispatchEvent(new Event('change'))"
        )
        assert browser.run(f"return {visible}.map(c => c.querySelector('.name').textContent)") == [odd.name]
        # Nothing that the browser cannot show leaves an empty slot.
        browser.wait(f"getComputedStyle({visible}[0].querySelector('img')).display == 'none'")
        rows = list(csv.DictReader(browser.run("return table()").splitlines()))
        assert [row["file"] for row in rows] == [*(file.name for file in files), "'" + odd.name]
        (expected,) = server.send("/predict", files[7].read_bytes()).json["predictions"]
        assert rows[7]["label"] == expected["label"]
        assert float(rows[7]["score"]) == pytest.approx(expected["score"], abs=1e-6)
        assert rows[60]["label"] == "" and "Not one of JPEG" in rows[60]["error"]


def test_a_sheet_of_duplicates_uses_the_width_and_fits_a_phone(
    kept: Path, browser: Browser, featx: Featx, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(kept / "photos", photos)
    for file in sorted(photos.rglob("*.png"))[:6]:
        shutil.copy(file, file.with_name(f"copy-{file.name}"))
    assert featx("extract", photos, "--out", tmp_path / "s.featx").code == 0
    assert featx("duplicates", tmp_path / "s.featx", "--exact-only", "--html", tmp_path / "d.html").code == 0
    browser.open((tmp_path / "d.html").as_uri())
    assert "Of copies keep one and delete the others" in browser.run("return document.body.innerText")
    tops = "return [...document.querySelectorAll('section')].map(e => Math.round(e.getBoundingClientRect().top))"
    sizes = "return [...document.images].map(i => [i.width, i.height, i.naturalWidth])"
    try:
        for width, fewest in ((1280, 3), (390, 1)):
            browser.resize(width, 900)
            assert browser.run("return document.documentElement.scrollWidth") <= width
            rows = browser.run(tops)
            assert len(rows) == 6 and max(rows.count(top) for top in rows) >= fewest
            assert all(w == h <= natural for w, h, natural in browser.run(sizes))
    finally:
        browser.resize(1000, 900)


@pytest.mark.slow
def test_of_several_models_one_is_chosen(chrome: tuple[str, Path], browser: Browser) -> None:
    first, second = photos(chrome[1] / "chosen", 2)
    choose = (
        "const box = document.getElementById('model'); box.value = 'dogs'; box.dispatchEvent(new Event('change')); "
        "return [...box.options].map(option => option.value)"
    )
    with start_tiny(chrome[1], models=[["cats", 0], ["dogs", 0]]) as server:
        browser.log()  # what other tests left there
        browser.open(server.url + "/")
        browser.wait("document.getElementById('about').textContent == 'ants of cats, bees of cats'")
        browser.choose("#files", first)
        browser.wait(DONE.format(1))
        assert browser.run(choose) == ["cats", "dogs"]
        assert browser.run("return document.getElementById('about').textContent") == "ants of dogs, bees of dogs"
        browser.choose("#files", second)
        browser.wait(DONE.format(2))
        rows = {row["file"]: row for row in csv.DictReader(browser.run("return table()").splitlines())}
        for file, name in ((first, "cats"), (second, "dogs")):
            (expected,) = server.send(f"/predict?model={name}", file.read_bytes()).json["predictions"]
            assert (rows[file.name]["label"], rows[file.name]["model"]) == (expected["label"], name)
        notes = browser.run("return [...document.querySelectorAll('.note.model')].map(each => each.textContent)")
        assert notes == ["Model: dogs", "Model: cats"]
        browser.resize(360, 740)
        assert browser.run("return document.documentElement.scrollWidth") <= 360
        browser.screenshot(Path(os.environ.get("FEATX_SCREENSHOTS") or chrome[1]) / "several.png")
        browser.resize(1000, 900)
        assert browser.log() == []
    with start_tiny(chrome[1]) as server:
        browser.open(server.url + "/")
        browser.wait("document.getElementById('about').textContent == 'ants, bees'")
        assert browser.run("return getComputedStyle(document.getElementById('models')).display") == "none"
        assert browser.run("return getComputedStyle(document.getElementById('model')).width") == "auto"


@pytest.mark.slow
def test_photos_that_came_before_the_key_go_to_the_chosen_model(chrome: tuple[str, Path], browser: Browser) -> None:
    (photo,) = photos(chrome[1] / "early", 1)
    with start_tiny(chrome[1], api_key="sesame", models=[["cats", 0], ["dogs", 0]]) as server:
        browser.open(server.url + "/")
        browser.wait("!document.getElementById('key').hidden")
        browser.choose("#files", photo)
        browser.wait("document.querySelectorAll('.card[data-state=locked]').length == 1")
        browser.run(
            "document.getElementById('secret').value = 'sesame'; document.getElementById('key').requestSubmit()"
        )
        browser.wait("document.querySelectorAll('.card[data-state=done]').length == 1")
        assert browser.run("return document.querySelector('.note.model').textContent") == "Model: cats"


@pytest.mark.parametrize("new_classes", [False, True])
def test_a_wrong_answer_is_corrected_on_its_card(
    chrome: tuple[str, Path], browser: Browser, tmp_path: Path, new_classes: bool
) -> None:
    kept = tmp_path / "kept"
    submit = (
        "const form = document.querySelector('.wrong form'); document.querySelector('.wrong').open = true;"
        "const [label, by] = form.querySelectorAll('select, input'); label.value = {}; by.value = {};"
        "form.querySelector('button').click()"
    )
    with start_tiny(tmp_path, feedback=str(kept), new_classes=new_classes) as server:
        browser.open(server.url + "/")
        browser.wait(READY)
        browser.wait("document.getElementById('how').textContent.includes('Those that you correct are kept there')")
        browser.choose("#files", *photos(tmp_path / "photos", 2))
        browser.wait(DONE.format(2))
        assert browser.run("return document.querySelectorAll('.wrong').length") == 2
        label = "wasps" if new_classes else "bees"
        browser.run(submit.format(repr(label), "'Mía'"))
        browser.wait("document.querySelector('.wrong .kept')")
        assert browser.run("return document.querySelector('.wrong .kept').textContent") == f"Kept: {label}."
        (correction,) = Corrections(kept).all
        assert (correction.label, correction.by) == (label, "Mía")
        assert (kept / "images" / correction.file).read_bytes() in {png(0), png(1)}
        browser.run(submit.format(repr(label), "'Mía'"))
        browser.wait("document.querySelector('.wrong .kept')?.textContent.startsWith('That was kept already')")
        browser.resize(360, 740)
        assert browser.run("return document.documentElement.scrollWidth") <= 360
        browser.screenshot(Path(os.environ.get("FEATX_SCREENSHOTS") or chrome[1]) / f"wrong-{new_classes}.png")
        browser.resize(1000, 900)
        browser.screenshot(Path(os.environ.get("FEATX_SCREENSHOTS") or chrome[1]) / f"wrong-wide-{new_classes}.png")
        browser.log()
