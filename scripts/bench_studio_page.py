#!/usr/bin/env python
"""The studio's page in Chromium: the whole loop against the command line, and how long thumbnails stay blank.

The loop: unsorted photos with names that say nothing are opened, and a person is simulated who presses the key of what
the selected photo shows, 100 times, and takes the model along. The same labels go through featx extract and featx fit.
Both models name the photos that were not labelled.

The thumbnails: 10,000 crops of these photos are scrolled through, and jumped about in. Blank is a place in sight from
the first frame that it has no photo in until the frame that it has one; frames are as long as this machine makes them.

usage: PYTHONPATH=tests scripts/bench_studio_page.py FOLDER [--photos 600] [--labels 100] [--many 10000]

FOLDER has class folders of photos. Prints the machine's date.
"""

from __future__ import annotations

import argparse
import csv
import random
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
from PIL import Image
from studiokit import Window, open_studio
from webdriver import Browser, driver

from featx import read_features
from featx.images import IMAGE_SUFFIXES
from featx.models import read_bundle

SELECTED = "document.querySelector('.label .cell[aria-selected=true]')?.dataset.text.split(',')[0]"
STEPS = ((100, 60), (600, 60), (30_000, 1), (-20_000, 1), (40_000, 1), (-35_000, 1))
"""Pixels a frame, and frames: a wheel, a thumb of the scroll bar that is drawn, and jumps."""

SCROLL = """
const [by, frames] = arguments, grid = document.querySelector('.label .grid'), height = grid.clientHeight;
const frame = () => new Promise((done) => requestAnimationFrame(done));
return (async () => {
  const since = new Map(), blank = [];
  const look = (now) => {
    const all = [...grid.querySelectorAll('.cell')];
    const cells = new Map(all.map((cell) => [Number(cell.getAttribute('aria-posinset')), cell]));
    const boxes = all.map((cell) => cell.getBoundingClientRect());
    const step = boxes[0].width + 6, columns = new Set(boxes.map((box) => Math.round(box.left))).size;
    const first = Math.floor((grid.scrollTop - 8) / step) * columns + 1;
    const end = Math.ceil((grid.scrollTop + height - 8) / step) * columns;
    for (let place = Math.max(1, first); place <= end; place++) {
      const image = cells.get(place)?.firstChild;
      if (image && image.complete && image.naturalWidth) {
        if (since.has(place)) blank.push(now - since.get(place));
        since.delete(place);
      } else if (!since.has(place)) since.set(place, now);
    }
    for (const [place, from] of since) {
      if (place >= first && place <= end) continue;
      blank.push(now - from);
      since.delete(place);
    }
  };
  for (let i = 0; i < frames; i++) { look(await frame()); grid.scrollTop += by; }
  for (let i = 0; i < 4 || (since.size && i < 600); i++) look(await frame());
  return blank.sort((a, b) => a - b);
})();
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photos", type=int, default=600)
    parser.add_argument("--labels", type=int, default=100)
    parser.add_argument("--many", type=int, default=10_000)
    options = parser.parse_args()
    files = [path for path in sorted(options.folder.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    random.Random(0).shuffle(files)
    with tempfile.TemporaryDirectory() as place, driver(Path(place)) as chromium:
        loop(Path(place), chromium, files[: options.photos], options.labels)
        scroll(Path(place), chromium, files, options.many)
    print(date.today())


def loop(place: Path, chromium: str, files: list[Path], labels: int) -> None:
    """Label by keys, take the model along, and compare it with that of the command line."""
    photos, truth = place / "unsorted", {}
    photos.mkdir()
    for number, file in enumerate(files):
        name = f"IMG_{number:04}{file.suffix.lower()}"
        shutil.copy(file, photos / name)
        truth[name] = file.parent.name
    with open_studio(place, photos) as window:
        page = opened(place, chromium, window)
        page.wait(f"document.querySelector('.doing')?.textContent.startsWith('{len(files):,} photos read')", 600)
        page.run("location.hash = 'label'")
        page.wait("document.querySelectorAll('.label .cell[data-state=shown]').length >= 20")
        page.run("document.querySelector('.label .grid').focus()")
        page.press("\ue014")
        started, before = time.perf_counter(), ""
        for _ in range(labels):
            before = page.wait(f"({SELECTED}) !== arguments[0] && {SELECTED}".replace("arguments[0]", repr(before)))
            names = page.run("return [...document.querySelectorAll('.label .class-name')].map((e) => e.textContent)")
            kinds = names[: names.index("none of these")] if "none of these" in names else names
            if truth[before] in kinds[:9]:
                page.press(str(kinds.index(truth[before]) + 1))
                continue
            page.press("/")
            for letter in truth[before]:
                page.press(letter)
            page.press("\ue007")
        took = time.perf_counter() - started
        window.wait(lambda: window.get("/api/state")["labelled"] == labels)
        window.post("/api/take", what="model")
        window.wait(lambda: all(job["status"] == "done" for job in window.get("/api/state")["jobs"]), 120)
        (place / "page.model").write_bytes(window.raw("/api/take/unsorted.model").body)
        page.close()
        window.server.end()
    listed = place / "unsorted.studio" / "labels.csv"
    wrong = sum(
        row["label"] not in ("", truth[Path(row["path"]).name]) for row in csv.DictReader(listed.open(newline=""))
    )
    for command in (
        ["extract", listed, "--out", place / "again.featx"],
        ["fit", place / "again.featx", "--out", place / "line.model"],
    ):
        subprocess.run([sys.executable, "-m", "featx", *map(str, command)], check=True, capture_output=True)
    features = read_features(place / "again.featx")
    rest = features.labels < 0
    kinds = [truth[Path(name).name] for name in features.ids[rest].tolist()]
    shares = {}
    for name in ("page", "line"):
        said = [answer.label for answer in read_bundle(place / f"{name}.model").answer(features.embeddings[rest])]
        shares[name] = 100 * np.mean([a == b for a, b in zip(said, kinds, strict=True)])
    print(
        f"{labels} of {len(files)} photos labelled by keys in the page, {labels - wrong} as meant, in {took:.0f} s; of "
        f"the {len(kinds)} others the model of the page names {shares['page']:.1f} % rightly, that of the command line "
        f"{shares['line']:.1f} %: a difference of {abs(shares['page'] - shares['line']):.1f} points"
    )


def scroll(place: Path, chromium: str, files: list[Path], many: int) -> None:
    """Scroll through many photos as soon as they are read, and tell how long they were blank."""
    photos, rng = place / "many", np.random.default_rng(0)
    photos.mkdir()
    for number in range(many):
        with Image.open(files[number % len(files)]) as image:
            image.draft("RGB", (320, 320))
            side = round(min(image.size) * rng.uniform(0.6, 0.95))
            x, y = (int(rng.integers(0, length - side + 1)) for length in image.size)
            image.convert("RGB").crop((x, y, x + side, y + side)).resize((200, 200)).save(photos / f"{number:05}.jpg")
    with open_studio(place, photos, "--backbone", "pixels") as window:
        window.wait(lambda: window.get("/api/state")["embedding"]["status"] == "done", 600)
        page = opened(place, chromium, window)
        page.run("location.hash = 'label'")
        page.wait("document.querySelectorAll('.label .cell[data-state=shown]').length >= 20")
        time.sleep(2)
        print(f"{many:,} photos  {'pixels a frame':>14} {'frames':>6} {'blank':>6} {'median':>8} {'longest':>8}")
        for by, frames in STEPS:
            blank = page.run(SCROLL, by, frames) or [0.0]
            print(f"{by:29,} {frames:6} {len(blank):6} {np.median(blank):5.0f} ms {max(blank):5.0f} ms")
            time.sleep(1)
        page.close()


def opened(place: Path, chromium: str, window: Window) -> Browser:
    """A browser with the page."""
    page = Browser(chromium, place / f"profile{time.monotonic_ns()}", (1280, 800))
    page.resize(1280, 800)
    page.open(f"{window.server.url}/?token={window.token}")
    return page


if __name__ == "__main__":
    main()
