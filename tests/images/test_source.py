"""Which images a source has, what they are called, and which mistakes are named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import class_folders, picture

from featx.errors import SourceError
from featx.images.source import ImageSet


def labels(images: ImageSet) -> dict[str, tuple[str | None, str]]:
    return {ref.id: (ref.label, ref.split) for ref in images.refs}


def test_class_folders(tmp_path: Path) -> None:
    class_folders(tmp_path, each=2)
    (tmp_path / "ants" / "deeper").mkdir()
    picture(9).save(tmp_path / "ants" / "deeper" / "x.JPG", format="JPEG")
    images = ImageSet.from_folder(tmp_path)
    assert labels(images) == {
        "ants/000.png": ("ants", ""),
        "ants/001.png": ("ants", ""),
        "ants/deeper/x.JPG": ("ants", ""),
        "bees/002.png": ("bees", ""),
        "bees/003.png": ("bees", ""),
    }
    assert images.class_names == ("ants", "bees")
    assert [ref.id for ref in images.refs] == sorted(labels(images))
    assert all((tmp_path / ref.id).stat().st_size == ref.size for ref in images.refs)


def test_splits_above_class_folders(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", each=1)
    class_folders(tmp_path / "test", each=1)
    images = ImageSet.from_folder(tmp_path)
    assert labels(images)["train/bees/001.png"] == ("bees", "train")
    assert labels(images)["test/ants/000.png"] == ("ants", "test")


def test_classes_called_train_and_bus_are_classes(tmp_path: Path) -> None:
    class_folders(tmp_path, names=("train", "bus"), each=1)
    assert ImageSet.from_folder(tmp_path).class_names == ("bus", "train")


def test_split_folders_beside_others_are_a_question(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", each=1)
    class_folders(tmp_path / "test", each=1)
    class_folders(tmp_path / "wasps", each=1)
    with pytest.raises(SourceError, match=r"side by side.*found wasps"):
        ImageSet.from_folder(tmp_path)


def test_a_folder_of_images_is_unlabelled(tmp_path: Path) -> None:
    class_folders(tmp_path)
    assert labels(ImageSet.from_folder(tmp_path / "ants")) == {f"00{i}.png": (None, "") for i in range(4)}


def test_other_files_are_passed_over_and_counted(tmp_path: Path) -> None:
    class_folders(tmp_path, each=1)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "ants" / ".DS_Store").write_text("x")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "x.png").write_text("x")
    images = ImageSet.from_folder(tmp_path)
    assert len(images) == 2
    assert len(images.ignored) == 1


def test_links_are_followed_once(tmp_path: Path) -> None:
    class_folders(tmp_path / "real", each=2)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "ants").symlink_to(tmp_path / "real" / "ants")
    (tmp_path / "set" / "bees").mkdir()
    (tmp_path / "set" / "bees" / "b.png").symlink_to(tmp_path / "real" / "bees" / "002.png")
    (tmp_path / "set" / "bees" / "loop").symlink_to(tmp_path / "set")
    images = ImageSet.from_folder(tmp_path / "set")
    assert sorted(labels(images)) == ["ants/000.png", "ants/001.png", "bees/b.png"]


def test_links_to_nowhere_and_pipes_are_images_that_cannot_be_read(tmp_path: Path) -> None:
    """The extraction quarantines each with its id, and goes on."""
    folder = tmp_path / "photos" / "a"
    folder.mkdir(parents=True)
    (folder / "nowhere.jpg").symlink_to("missing.jpg")
    (folder / "circle.jpg").symlink_to("circle.jpg")
    (folder / "circle").symlink_to("circle")
    class_folders(tmp_path / "photos", names=("b",), each=1)
    os.mkfifo(folder / "pipe.jpg")
    images = ImageSet.from_folder(tmp_path / "photos")
    assert [ref.id for ref in images.refs] == ["a/circle.jpg", "a/nowhere.jpg", "a/pipe.jpg", "b/000.png"]
    assert len(images.ignored) == 1


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_manifests(tmp_path: Path, suffix: str) -> None:
    class_folders(tmp_path / "pictures", each=1)
    rows = [
        {"path": "pictures/ants/000.png", "label": "ants", "split": "train"},
        {"path": "pictures/bees/001.png", "label": "bees", "split": "test"},
        {"path": "pictures/lost.png", "label": "", "split": ""},
    ]
    manifest = tmp_path / f"list{suffix}"
    if suffix == ".csv":
        manifest.write_text("path,label,split\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    else:
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = ImageSet.from_source(manifest)
    assert labels(images) == {
        "pictures/ants/000.png": ("ants", "train"),
        "pictures/bees/001.png": ("bees", "test"),
        "pictures/lost.png": (None, ""),
    }
    assert [ref.size > 0 for ref in images.refs] == [True, True, False]


def test_a_spreadsheet_with_byte_order_mark_and_spaces(tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_text("\ufeffpath, label\na.png, ants\nb.png, bees\n", encoding="utf-8")
    assert labels(ImageSet.from_manifest(manifest)) == {"a.png": ("ants", ""), "b.png": ("bees", "")}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "file,label\na.png,x\n", r"no column named path.*found file,label"),
        ("a.csv", "path,label\na.png,x,train,more\n", r"line 2: more fields"),
        ("a.csv", "path,label,split\na.png,x,training\n", r"line 2: unknown split: expected train, val or test, found"),
        ("a.csv", "path,label\na.png,x\na.png,y\n", r"line 3: the path is listed twice"),
        ("a.csv", "path,label\n,x\n", r"line 2: no path"),
        ("a.csv", "path,label\n", r"no images in this manifest"),
        ("a.csv", "path,label\na.png,x\nb.png,x\n", r"only one class"),
        ("a.jsonl", '{"path": "a.png"\n', r"not JSON lines"),
        ("a.jsonl", "[1]\n", r"line 1: not a JSON object"),
        ("a.jsonl", '{"path": "a.png", "label": ["x"]}\n', r"line 1: a label that is not text"),
        ("a.xlsx", "x", r"not a list of images: expected .csv, .jsonl, .tar or .parquet, found .xlsx"),
        ("a.JPG", "x", r"not a list of images: expected .*, found one photo\. Give the folder that holds it"),
    ],
)
def test_mistakes_in_manifests_are_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SourceError, match=words):
        ImageSet.from_source(tmp_path / name)


def test_binary_files_are_no_manifests(tmp_path: Path) -> None:
    for name in ("a.csv", "a.jsonl"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00path\x00")
        with pytest.raises(SourceError, match="UTF-8"):
            ImageSet.from_source(tmp_path / name)


def test_mistakes_about_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder or file"):
        ImageSet.from_source(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"no images in this folder.*found nothing"):
        ImageSet.from_source(tmp_path)
    class_folders(tmp_path, names=("ants",))
    with pytest.raises(SourceError, match=r"only one class folder.*found ants.*give the folder that holds them"):
        ImageSet.from_source(tmp_path)
    class_folders(tmp_path / "deep" / "bees", names=("more",), each=2)
    picture(9).save(tmp_path / "deep" / "bees" / "x.png")
    words = r"found more\. 1 image lies beside it: if bees is a class itself, give the folder above it"
    with pytest.raises(SourceError, match=words):
        ImageSet.from_folder(tmp_path / "deep" / "bees")
