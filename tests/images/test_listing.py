"""Lists of images as spreadsheets and people write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import TinyEngine, class_folders, tiny_backbone

from featx.errors import SourceError
from featx.extraction.run import extract_features
from featx.images.source import ImageSet

WANTED = {"ä.png": ("Käfer", "train"), "b,c.png": ("bees", "test")}


def named(images: ImageSet) -> dict[str, tuple[str | None, str]]:
    return {ref.id: (ref.label, ref.split) for ref in images.refs}


@pytest.mark.parametrize("charset", ["utf-8", "utf-8-sig", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("header", ["path,label,split", "Path,LABEL, Split", '"path","label","split"'])
def test_what_spreadsheets_write(separator: str, charset: str, header: str, tmp_path: Path) -> None:
    rows = [separator.join(f'"{value}"' for value in (name, *rest)) for name, rest in WANTED.items()]
    text = "\r\n".join([header.replace(",", separator), *rows, ""])
    (tmp_path / "list.csv").write_bytes(text.encode(charset))
    images = ImageSet.from_source(tmp_path / "list.csv")
    assert named(images) == WANTED
    assert [("cp1252" in note) for note in images.notes] == ([True] if charset == "cp1252" else [])


def test_a_list_of_paths_alone(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path\na;b.png\nc.png\n")
    assert named(ImageSet.from_source(tmp_path / "list.csv")) == {"a;b.png": (None, ""), "c.png": (None, "")}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "path,label,group,Site,\na.png,x,1,2,\nb.png,y,1,2,\n"),
        ("a.jsonl", '{"path": "a.png", "label": "x", "group": 1}\n{"Path": "b.png", "Label": "y", "Site": 2}\n'),
    ],
)
def test_further_columns_are_named(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    images = ImageSet.from_source(tmp_path / name)
    assert named(images) == {"a.png": ("x", ""), "b.png": ("y", "")}
    assert images.notes == (f"the column Site of {name} is kept as metadata",)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "path,class\na.png,x\nb.png,y\n", r"no column named label.*found path,class\. If class is the label"),
        ("a.csv", "Path;Lable\na.png;x\nb.png;y\n", r"If Lable is the label, rename it to label"),
        ("a.csv", "path,label,splits\na.png,x,test\nb.png,y,\n", r"no column named split.*If splits is the split"),
        ("a.csv", "filename,label\na.png,x\n", r"no column named path.*If filename is the path"),
        ("a.csv", "path,Path,label\na.png,b.png,x\n", r"two columns are called path: found path,Path,label"),
        ("a.csv", "path,label,label\na.png,x,y\n", r"two columns are called label: found path,label,label"),
        ("a.jsonl", '{"path": "a.png", "label": NaN}\n', r"line 1: a label that is not text.* found nan"),
        ("a.jsonl", '{"path": "a.png", "label": 1e999}\n', r"line 1: a label that is not text.* found inf"),
        ("a.jsonl", '{"path": "a.png", "class": "x"}\n', r"no column named label.*If class is the label"),
        ("a.jsonl", f'{{"path": "a.png"}}\n{{"path": {"1" * 5000}}}\n', r"a.jsonl, line 2: a number with too many"),
    ],
)
def test_near_misses_are_asked_about(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SourceError, match=words):
        ImageSet.from_source(tmp_path / name)


def test_paths_that_no_system_takes_are_quarantined(tmp_path: Path) -> None:
    class_folders(tmp_path / "photos", each=2)
    lines = ['{"path": "photos/ants/000.png", "label": "ants"}', '{"path": "photos/bees/002.png", "label": "bees"}']
    lines += ['{"path": "\\ud800.png", "label": "ants"}', f'{{"path": "{"d/" * 3000}x.png", "label": "bees"}}']
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    images = ImageSet.from_source(tmp_path / "list.jsonl")
    summary = extract_features(images, tiny_backbone(), tmp_path / "s.featx", engine=TinyEngine(), workers=1)
    assert (summary.embedded, [item.reason for item in summary.refused]) == (2, ["bad_name"] * 2)


def test_a_folder_too_deep_to_open_is_quarantined(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "photos", each=2)
    before = Path.cwd()
    try:
        os.chdir(root / "ants")
        for _ in range(25):  # 5,000 bytes in all, which no single path may have
            Path("d" * 200).mkdir()
            os.chdir("d" * 200)
        Path("x.png").touch()
    finally:
        os.chdir(before)
    images = ImageSet.from_source(root)
    summary = extract_features(images, tiny_backbone(), tmp_path / "s.featx", engine=TinyEngine(), workers=1)
    (refused,) = summary.refused
    assert summary.embedded == 4 and refused.id.startswith("ants/ddd")
    # The longer the folder's own path, the less of the rest stands in the id, which has a limit too.
    assert refused.reason in ("bad_name", "unreadable")
