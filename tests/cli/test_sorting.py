"""Photos into folders: every one arrives whole, under a safe name, and nothing that was there is touched."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from conftest import class_folders
from hypothesis import given, strategies as st

from featx.cli.sorting import ASIDE, Sorted, folder_names, sort_into
from featx.errors import UsageError
from featx.images.source import ImageSet
from featx.models.predictor import image_files

EVIL = [
    "..",
    ".",
    "",
    "/etc",
    "../../up",
    "a/b",
    "a\\b",
    "a\0b",
    "line\nend",
    "\x1b[31mred",
    "\ud800",
    "x" * 300,
    "é" * 300,
]
EVIL += ["Ants", "ants", "ants (2)", "ants.", " ants", *ASIDE.values(), ".hidden", "a:b*c?"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def make(folder: Path, **files: str) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.jpg").write_text(content)
    return {name: folder / f"{name}.jpg" for name in files}


@given(labels=st.lists(st.text(max_size=200) | st.sampled_from(EVIL), unique=True, max_size=8))
def test_any_labels_get_folders_of_their_own(labels: list[str]) -> None:
    names = folder_names(labels)
    assert list(names) == labels
    assert len({name.casefold() for name in names.values()} | {*ASIDE.values()}) == len(labels) + 2
    for name in names.values():
        assert 0 < len(os.fsencode(name)) <= 127
        assert Path(name).name == name
        assert not name.startswith((".", " "))
        assert not re.search(r'[/\\:*?"<>|\x00-\x1f\x7f\ud800-\udfff]', name)


def test_evil_labels_stay_inside(tmp_path: Path) -> None:
    photo = make(tmp_path / "in", a="a")["a"]
    done = sort_into(tmp_path / "out", [(photo, label, None) for label in EVIL], EVIL)
    assert sum(done.copied.values()) == len(EVIL) == len(done.copied)
    assert {path.parent.parent for path in tmp_path.rglob("a.jpg")} == {tmp_path, tmp_path / "out"}
    assert len(list((tmp_path / "out").iterdir())) == len(EVIL)


def test_names_that_are_taken_and_photos_that_are_there(tmp_path: Path) -> None:
    one = make(tmp_path / "1", a="one", b="same", c="cat")
    two = make(tmp_path / "2", a="two", b="same")
    answers = [
        (one["a"], "x", None), (two["a"], "x", None), (one["b"], "x", "unsure"), (two["b"], "y", "unsure"),
        (one["c"], "x", "unknown"),
    ]  # fmt: skip
    out = tmp_path / "out"
    assert sort_into(out, answers, ["x"]) == Sorted({"_unknown": 1, "_unsure": 1, "x": 2}, 1)
    expected = {"x/a.jpg": b"one", "x/a (2).jpg": b"two", "_unsure/b.jpg": b"same", "_unknown/c.jpg": b"cat"}
    assert contents(out) == expected
    assert sort_into(out, answers, ["x"]) == Sorted({}, 5)  # once more: nothing is there twice
    assert contents(out) == expected
    (out / "x" / "a.jpg").write_text("mine now")
    assert sort_into(out, answers[:1], ["x"]) == Sorted({"x": 1}, 0)
    assert contents(out) == {**expected, "x/a.jpg": b"mine now", "x/a (3).jpg": b"one"}
    assert contents(tmp_path / "1") == {"a.jpg": b"one", "b.jpg": b"same", "c.jpg": b"cat"}
    assert (out / "x" / "a (2).jpg").stat().st_mtime_ns == two["a"].stat().st_mtime_ns


def test_photos_are_not_sorted_into_the_folder_that_they_lie_in(tmp_path: Path) -> None:
    files = make(tmp_path / "photos" / "ants", a="1", b="2")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"the photos lie in the folder that they are to be sorted into"):
        sort_into(tmp_path / "photos", [(files["a"], "bees", None), (files["b"], "bees", "unsure")], ["ants", "bees"])
    assert contents(tmp_path) == before


def test_links_are_neither_followed_nor_replaced(tmp_path: Path) -> None:
    photo = make(tmp_path / "in", a="a")["a"]
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "out"
    (out / "x").mkdir(parents=True)
    (out / "x" / "a.jpg").symlink_to(tmp_path / "elsewhere" / "victim")
    assert sort_into(out, [(photo, "x", None)], ["x", "y"]).copied == {"x": 1}
    assert (out / "x" / "a (2).jpg").read_text() == "a"
    (out / "y").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="a link or a file is in the way of a folder"):
        sort_into(out, [(photo, "y", None)], ["x", "y"])
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_long_names_stay_names(tmp_path: Path) -> None:
    photos = []
    for folder in ("1", "2"):
        (tmp_path / folder).mkdir()
        photos.append(tmp_path / folder / ("ü" * 125 + ".jpg"))
        photos[-1].write_text(folder)
    assert sort_into(tmp_path / "out", [(photo, "x", None) for photo in photos], ["x"]).copied == {"x": 2}
    names = sorted(contents(tmp_path / "out"))
    assert sorted(contents(tmp_path / "out").values()) == [b"1", b"2"]
    assert all(name.endswith(".jpg") for name in names)


def test_hidden_files_are_left_out_as_by_an_extraction(tmp_path: Path) -> None:
    class_folders(tmp_path)
    image = (tmp_path / "ants" / "000.png").read_bytes()
    for name in ("ants/._000.png", ".cache/a.png", "ants/.b.png", "__MACOSX/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(image)
    found = image_files(tmp_path)
    assert len(found) == 8
    assert [str(path.relative_to(tmp_path)) for path in found] == [r.id for r in ImageSet.from_folder(tmp_path).refs]
