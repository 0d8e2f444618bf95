"""Two thousand photos in the page, some with names that are hostile and some that cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from studiokit import open_studio
from webdriver import Browser, driver, missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing() or "there is a browser")]

MANY = 2000
END, HOME = "\ue010", "\ue011"
HOSTILE = [
    "two\nlines.jpg", "'\"><script>document.title='owned'<.jpg", "%2e%2e%2f.jpg", "x" * 251 + ".jpg", "\u202egpj.jpg",
]  # fmt: skip
ANSWERS = "performance.getEntriesByType('resource').map(e => new URL(e.name).pathname)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blue photos and red ones, in turn, with noise; five that are named by an enemy, and three that are not read."""
    folder = tmp_path_factory.mktemp("many")
    photos = folder / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    names = [f"{number:04}.jpg" for number in range(MANY - len(HOSTILE))] + HOSTILE
    for number, name in enumerate(names):
        noise = rng.integers(-30, 30, (48, 48, 3))
        pixels = np.clip(np.array([(40, 60, 200), (200, 50, 40)][number % 2]) + noise, 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(photos / name, quality=80)
    (photos / "0000 cut.jpg").write_bytes((photos / "0001.jpg").read_bytes()[:300])
    (photos / "0001 empty.jpg").write_bytes(b"")
    (photos / os.fsdecode(b"\xff\xfe.jpg")).write_bytes((photos / "0001.jpg").read_bytes())
    return folder


def test_two_thousand_photos_are_read_seen_and_labelled(folder: Path) -> None:
    with (
        driver(folder) as url,
        open_studio(folder, folder / "photos", "--backbone", "pixels", "--root", folder) as window,
    ):
        page = Browser(url, folder / "profile", (1280, 800))
        page.resize(1280, 800)
        page.open(f"{window.server.url}/?token={window.token}")
        page.wait(f"document.querySelector('.doing')?.textContent.startsWith('{MANY:,} photos read')")
        page.wait("document.querySelector('.refused').textContent.includes('3 files could not be used')")
        ids = window.get("/api/photos")["ids"]
        assert len(ids) == MANY + 3
        assert sum(window.get("/api/photos")["embedded"]) == MANY

        # All that is scrolled past comes in few answers.
        page.run("location.hash = 'label'")
        page.wait("document.querySelectorAll('.label .cell[data-state=shown]').length >= 30")
        order = "const field = document.querySelector('.label select[aria-label=Order]');"
        page.run(order + "field.value = 'name'; field.dispatchEvent(new Event('change'))")
        page.run("document.querySelector('.label .grid').focus()")
        seen = "document.querySelector('.label .cell.cursor[data-state=shown]')?.getAttribute('aria-posinset')"
        for key, place in ((END, MANY), (HOME, 1), (END, MANY)):
            page.press(key)
            page.wait(f"{seen} === '{place}'")
        page.wait("document.querySelectorAll('.label .cell:not([data-state=shown])').length === 0")
        asked = page.run(f"return {ANSWERS}")
        assert sum(path.startswith("/thumb/") for path in asked) == 0
        assert 0 < sum(path == "/thumbs" for path in asked) <= 40
        assert page.run("return document.querySelectorAll('.label .cell').length") < 400
        assert page.run("return document.title") == "Label · photos"

        # A thousand labels at a time, seen at once and kept; the map has every photo.
        window.label({row: ("blue", "red")[int(ids[row][:4]) % 2] for row in range(10, 16)})
        page.wait("document.querySelector('.batch')")
        blue = "document.querySelector('.batch button[aria-label^=\"Accept all\"]')"
        number = int(page.run(f"return {blue}.getAttribute('aria-label')").split()[2])
        page.run(f"{blue}.click()")
        page.wait(f"document.getElementById('steps').innerText.includes('{6 + number} labelled')")
        window.wait(lambda: window.get("/api/state")["labelled"] == 6 + number)
        assert number > MANY / 4
        page.run("location.hash = 'map'")
        legend = "[...document.querySelectorAll('.legend .soft')].map(e => Number(e.textContent.replace(',', '')))"
        page.wait(f"{legend}.reduce((sum, n) => sum + n, 0) === {MANY}")
        page.run("location.reload()")  # in the middle of it all
        page.wait(f"document.getElementById('steps').innerText.includes('{6 + number} labelled')")
        complaints = page.log()
        page.close()
        assert complaints == []
