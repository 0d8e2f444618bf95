"""Which images belong together: rules, and dates from EXIF, hostile ones among them."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import class_folders, picture

from featx.errors import FeatxError, SourceError, UsageError
from featx.images.exif import taken_at
from featx.images.grouping import MAX_TEXT, Grouping
from featx.images.listing import MAX_COLUMNS
from featx.images.pixels import Preprocess
from featx.images.pool import DecoderPool
from featx.images.source import ImageSet


def photo(taken: object = None, subsecond: object = None, seed: int = 0, form: str = "JPEG") -> bytes:
    """A file that says when it was taken."""
    exif = picture(seed).getexif()
    exif[0x0112] = 1  # without any tag of its own Pillow writes none into a PNG
    inside = exif.get_ifd(0x8769)
    if taken is not None:
        inside[0x9003] = taken
    if subsecond is not None:
        inside[0x9291] = subsecond
    out = io.BytesIO()
    picture(seed).save(out, format=form, exif=exif)
    return out.getvalue()


# --- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "ids", "groups"),
    [
        ("folder:1", ["a/x/1.jpg", "b/1.jpg", "c.jpg"], ["a", "b", ""]),
        ("folder:2", ["a/x/1.jpg", "a/y/z/1.jpg", "b/1.jpg"], ["x", "y", ""]),
        (r"regex:(p\d+)_", ["a/p1_3.jpg", "b/p22_1.jpg", "b/other.jpg"], ["p1", "p22", ""]),
        (r"regex:(?:x(\d))?y", ["x1y", "y", "z"], ["1", "", ""]),
    ],
)
def test_rules_on_paths(rule: str, ids: list[str], groups: list[str]) -> None:
    assert Grouping.parse(rule).of_paths(ids) == groups


def test_bursts_are_chains_and_days_are_days() -> None:
    taken = ["2024-05-01T10:00:05", "2024-05-01T10:00:00.5", "", "2024-05-01T10:00:02.4", "2024-05-02T09:00:00"]
    assert Grouping.parse("exif-day").of_dates(taken) == ["2024-05-01", "2024-05-01", "", "2024-05-01", "2024-05-02"]
    first = "2024-05-01T10:00:00.5"
    assert Grouping.parse("exif-burst:2").of_dates(taken) == [
        "2024-05-01T10:00:05", first, "", first, "2024-05-02T09:00:00",
    ]  # fmt: skip
    assert Grouping.parse("exif-burst:2.6").of_dates(taken)[0] == first
    note = Grouping.parse("exif-day").note(Grouping.parse("exif-day").of_dates(taken))
    assert note == "2 groups by exif-day; 1 image with no date in their EXIF count as one each"


@pytest.mark.parametrize(
    "rule", ["", "folder", "folder:0", "folder:-1", "folder:x", "exif-day:1", "exif-burst", "exif-burst:x", "regex:",
             "regex:(", "regex:abc", "column:", "kind:1", "regex:(" + "a" * 2000 + ")", "exif-burst:1e400"],
)  # fmt: skip
def test_rules_that_cannot_be_read(rule: str) -> None:
    with pytest.raises(UsageError):
        Grouping.parse(rule)


def test_a_rule_that_matches_nothing_is_an_error_with_an_example(tmp_path: Path) -> None:
    images = ImageSet.from_folder(class_folders(tmp_path / "photos"))
    with pytest.raises(UsageError, match=r"the pattern matches no image.*images such as ants/000\.png"):
        images.grouped("regex:(camera.)")
    with pytest.raises(UsageError, match="no image lies 2 folders deep"):
        images.grouped("folder:2")
    with pytest.raises(UsageError, match=r"no column 'site' to group by.*none beside path, label and split"):
        images.grouped("column:site")


@pytest.mark.slow
def test_a_pattern_that_would_take_for_ever_is_stopped() -> None:
    # In a process of its own: a signal for a process with the threads of all tests before once ended it.
    code = "from featx.images.grouping import Grouping\nGrouping.parse('regex:((a+)+)$').of_paths(['a' * 60 + 'b'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "UsageError: --group-by: the pattern takes too long" in done.stderr


# --- lists ----------------------------------------------------------------------------------------------------------


def listed(tmp_path: Path, text: str, name: str = "a.csv") -> ImageSet:
    (tmp_path / name).write_text(text)
    return ImageSet.from_source(tmp_path / name)


def test_a_list_with_groups_and_metadata(tmp_path: Path) -> None:
    images = listed(tmp_path, "path,label,Group,Camera Name,empty\na.png,x,s1,Nikon,\nb.png,y,,Canon,\n")
    assert [(ref.group, ref.metadata) for ref in images.refs] == [
        ("s1", (("Camera Name", "Nikon"), ("empty", ""))), ("", (("Camera Name", "Canon"), ("empty", ""))),
    ]  # fmt: skip
    assert images.grouping == Grouping("column:group", "group")
    assert images.notes == ("the columns Camera Name, empty of a.csv are kept as metadata",)
    by_camera = images.grouped("column:camera name")
    assert [ref.group for ref in by_camera.refs] == ["Nikon", "Canon"]
    assert by_camera.grouping is not None
    assert by_camera.grouping.name == "camera name"


def test_what_cannot_be_kept_is_named_and_bounded(tmp_path: Path) -> None:
    long = "x" * (MAX_TEXT + 1)
    images = listed(tmp_path, f"path,label,a,b\n1.png,x,{long},fine\n2.png,y,short,fine\n")
    assert images.columns == ("b",)
    assert "the column a of a.csv is ignored" in images.notes[1]
    many = ",".join(f"c{i}" for i in range(MAX_COLUMNS + 36))
    values = ",".join("v" for _ in range(MAX_COLUMNS + 36))
    images = listed(tmp_path, f"path,label,{many}\n1.png,x,{values}\n2.png,y,{values}\n")
    assert len(images.columns) == MAX_COLUMNS
    assert "and 26 more of a.csv are ignored" in images.notes[1]
    lines = '{"path": "1.png", "label": "x", "a": [1], "b": "\\ud800", "c": 1.5, "d": true}\n'
    lines += '{"path": "2.png", "label": "y"}\n'
    assert listed(tmp_path, lines, "a.jsonl").columns == ("c", "d")
    for group in (long, "a\0b"):
        with pytest.raises(SourceError, match=r"a group that is not a short text|zero bytes|line contains NUL"):
            listed(tmp_path, f"path,label,group\n1.png,x,{group}\n2.png,y,g\n")


# --- dates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_when_a_photo_was_taken(form: str) -> None:
    assert taken_at(photo("2024:05:01 10:00:00", form=form)) == "2024-05-01T10:00:00"
    assert taken_at(photo("2024:05:01 10:00:00", "25", form=form)) == "2024-05-01T10:00:00.25"
    assert taken_at(photo(form=form)) == ""


@pytest.mark.parametrize(
    "taken", ["0000:00:00 00:00:00", "2024:13:01 10:00:00", "2024-05-01", "", " ", "x" * 60_000, "٢٠٢٤:05:01 10:00:00"]
)
def test_dates_that_are_none(taken: str) -> None:
    assert taken_at(photo(taken)) == ""


def test_hostile_headers_are_harmless() -> None:
    whole = photo("2024:05:01 10:00:00", "5" * 40_000)
    assert taken_at(whole) == "2024-05-01T10:00:00.555555"
    start = whole.index(b"Exif\0\0")
    rng = random.Random(0)
    for _ in range(500):
        broken = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            broken[start + rng.randrange(200)] = rng.randrange(256)
        found = taken_at(bytes(broken))
        assert found == "" or found[4] == "-"
    # A directory that claims to contain itself, and one with 65,535 entries.
    loop = bytearray(whole)
    place = loop.index(struct.pack(">H", 0x8769)) if struct.pack(">H", 0x8769) in loop else loop.index(b"\x69\x87")
    loop[place + 8 : place + 12] = b"\0\0\0\x08"
    assert isinstance(taken_at(bytes(loop)), str)
    for data in (b"", b"no image", whole[:40]):
        assert taken_at(data) == ""


def test_decoding_processes_read_dates_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(photo("2024:05:01 10:00:00"))
    (tmp_path / "b.jpg").write_bytes(photo(None, seed=1))
    (tmp_path / "c.jpg").write_bytes(b"broken")
    preprocess = Preprocess(resize=8, crop=(8, 8), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    files = [tmp_path / name for name in ("a.jpg", "b.jpg", "c.jpg")]
    for dated, expected in ((True, ["2024-05-01T10:00:00", "", ""]), (False, ["", "", ""])):
        with DecoderPool(preprocess, workers=1, dated=dated) as pool:
            found = list(pool.run(files, lambda digest: False, ahead=2))
        assert [each.taken for each in found] == expected
        assert [each.refusal is None for each in found] == [True, True, False]


def test_a_source_without_groups_has_none(tmp_path: Path) -> None:
    images = ImageSet.from_folder(class_folders(tmp_path / "photos"))
    assert images.grouping is None
    assert {ref.group for ref in images.refs} == {""}
    with pytest.raises(FeatxError):
        images.grouped("folder:1", "x" * 60)
