"""Thumbnails come from the file that the row was made of, or from none."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import numpy as np
from conftest import class_folders, picture
from PIL import Image

from featx.images.thumbnails import SIDE, Originals, Thumbnails


def test_a_row_finds_its_own_file_only(tmp_path: Path) -> None:
    class_folders(tmp_path / "photos", each=2)
    picture(9, (900, 600)).save(tmp_path / "secret.png")
    ids = ["ants/000.png", "ants/001.png", "bees/002.png", "gone.png", "../secret.png", "a\0b"]
    data = [path.read_bytes() if (path := tmp_path / "photos" / name).is_file() else b"" for name in ids[:3]]
    digests = np.zeros((6, 32), np.uint8)
    for row, content in enumerate(data):
        digests[row] = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
    (tmp_path / "photos" / "ants" / "001.png").write_bytes(data[0])  # another picture under the same name
    with Originals(str(tmp_path / "photos"), ids, digests) as originals:
        pictures = [originals.thumbnail(row) for row in range(6)]
    assert [picture is not None for picture in pictures] == [True, False, True, False, False, False]
    for row in (0, 2):
        with Image.open(io.BytesIO(pictures[row] or b"")) as image, Image.open(tmp_path / "photos" / ids[row]) as whole:
            assert image.format == "JPEG"
            assert image.size == (SIDE, SIDE)
            side = min(whole.size)
            left, top = (whole.width - side) // 2, (whole.height - side) // 2
            centre = whole.convert("RGB").crop((left, top, left + side, top + side)).resize(image.size)
            assert np.abs(np.asarray(image, float) - np.asarray(centre, float)).mean() < 8


def test_files_that_crash_a_decoder_or_are_none_cost_themselves_only(tmp_path: Path) -> None:
    class_folders(tmp_path, each=1)
    good = tmp_path / "ants" / "000.png"
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "text.png").write_text("no image")
    wanted = [(path, None) for path in (good, tmp_path / "pipe.png", tmp_path / "text.png", good)]
    with Thumbnails(side=20, workers=2) as thumbnails:
        made = thumbnails.make(wanted)
    assert isinstance(made[0], bytes) and made[0] == made[3]
    assert made[1] == "not a regular file" and isinstance(made[2], str)


def test_a_manifest_is_relative_to_its_folder(tmp_path: Path) -> None:
    class_folders(tmp_path / "photos", each=1)
    manifest = tmp_path / "list.csv"
    manifest.write_text("path,label\nphotos/ants/000.png,ants\nphotos/bees/001.png,bees\n")
    data = (tmp_path / "photos" / "ants" / "000.png").read_bytes()
    digest = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)[None]
    with Originals(str(manifest), ["photos/ants/000.png"], digest) as originals:
        assert originals.thumbnail(0)
    with Originals("", ["photos/ants/000.png"], digest) as originals:
        assert originals.thumbnail(0) is None
