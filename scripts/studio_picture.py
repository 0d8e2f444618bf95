#!/usr/bin/env python
"""Draw the studio while photos are labelled: scripts/studio_picture.py CLASS_FOLDERS OUT.png (see scripts/pictures)."""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from pathlib import Path

from studiokit import open_studio
from webdriver import Browser, driver

CLASSES = ["astronaut", "brick", "chelsea", "coffee", "coins", "grass", "gravel", "motorcycle_left", "rocket"]
LABELS = 40


def main(source: Path, out: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "photos"
        folder.mkdir()
        files = [file for name in CLASSES for file in sorted((source / name).iterdir())]
        random.Random(0).shuffle(files)
        truth = {}
        for number, file in enumerate(files):
            name = f"{number:03d}{file.suffix}"
            shutil.copy(file, folder / name)
            truth[name] = file.parent.name.removesuffix("_left").replace("chelsea", "cat")
        with open_studio(Path(place), folder) as window, driver(Path(place)) as chromium:
            window.wait_until_embedded()
            ids = window.get("/api/photos")["ids"]
            for _ in range(LABELS):
                row = window.get("/api/suggestions")["worth"][0]
                window.label({row: truth[ids[row]]})
            browser = Browser(chromium, Path(place) / "profile", (1280, 760))
            browser.open(f"{window.server.url}/?token={window.token}#label")
            browser.wait("document.querySelectorAll('.chip').length > 10")
            browser.wait("[...document.images].every((image) => image.complete)")
            browser.screenshot(out)
            browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
