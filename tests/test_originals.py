"""Thumbnails come from the file that the row was made of, or from none."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from conftest import class_folders, picture
from PIL import Image

from featx.images.thumbnails import Originals


def test_a_row_finds_its_own_file_only(tmp_path: Path) -> None:
    class_folders(tmp_path / "photos", each=2)
    picture(9, (900, 600)).save(tmp_path / "secret.png")
    ids = ["ants/000.png", "ants/001.png", "bees/002.png", "gone.png", "../secret.png", "a\0b"]
    data = [path.read_bytes() if (path := tmp_path / "photos" / name).is_file() else b"" for name in ids[:3]]
    digests = np.zeros((6, 32), np.uint8)
    for row, content in enumerate(data):
        digests[row] = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
    originals = Originals(str(tmp_path / "photos"), ids, digests)
    assert originals.read(0) == data[0]
    (tmp_path / "photos" / "ants" / "001.png").write_bytes(data[0])  # another picture under the same name
    assert [originals.read(row) for row in range(1, 6)] == [None, data[2], None, None, None]
    assert originals.thumbnail(3) is None
    small = originals.thumbnail(2, side=20)
    assert small is not None
    with Image.open(io.BytesIO(small)) as image:
        assert image.format == "JPEG"
        assert image.size == (20, 15)


def test_a_manifest_is_relative_to_its_folder(tmp_path: Path) -> None:
    class_folders(tmp_path / "photos", each=1)
    manifest = tmp_path / "list.csv"
    manifest.write_text("path,label\nphotos/ants/000.png,ants\nphotos/bees/001.png,bees\n")
    data = (tmp_path / "photos" / "ants" / "000.png").read_bytes()
    digest = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)[None]
    assert Originals(str(manifest), ["photos/ants/000.png"], digest).read(0) == data
    assert Originals("", ["photos/ants/000.png"], digest).read(0) is None
