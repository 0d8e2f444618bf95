"""The journal of labels: against a list of states, reopened, cut short, altered, and with its process killed."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from featx.errors import FeatxError, StoreError, UsageError
from featx.images import ImageSet
from featx.studio.journal import LEFT_OUT, NONE_OF_THESE, NOTHING, UNSURE, Journal

KILLS = 8

PHOTOS = [f"../photos/{number:02d}.jpg" for number in range(20)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


class Oracle:
    """The same by copies of the whole state."""

    def __init__(self) -> None:
        self.state: tuple[dict[str, str], set[str]] = ({}, set())
        self.done: list[Any] = []
        self.undone: list[Any] = []

    def act(self, labels: dict[str, str], classes: set[str]) -> None:
        if (labels, classes) != self.state:
            self.done.append(self.state)
            self.undone.clear()
            self.state = labels, classes

    def undo(self) -> None:
        if self.done:
            self.undone.append(self.state)
            self.state = self.done.pop()

    def redo(self) -> None:
        if self.undone:
            self.done.append(self.state)
            self.state = self.undone.pop()


def state_of(journal: Journal) -> tuple[dict[str, str], set[str]]:
    marks = {NONE_OF_THESE: "!none", UNSURE: "!unsure", LEFT_OUT: "!left"}
    labels = {
        photo: marks[code] if code in marks else str(journal.classes[code]) for photo, code in journal.codes.items()
    }
    return labels, {name for name in journal.classes if name is not None}


def one_step(dice: random.Random, journal: Journal, oracle: Oracle) -> None:
    labels, classes = deepcopy(oracle.state)
    kind = dice.choice(
        ["label", "label", "label", "mark", "nothing", "rename", "merge", "remove", "add", "undo", "redo"]
    )
    photos = dice.sample(PHOTOS, dice.randint(1, 5))
    name = dice.choice("abcde")
    if kind == "label":
        journal.label(photos, name, how="key")
        oracle.act({**labels, **dict.fromkeys(photos, name)}, classes | {name})
    elif kind == "mark":
        journal.label(photos, UNSURE, how="key")
        oracle.act({**labels, **dict.fromkeys(photos, "!unsure")}, classes)
    elif kind == "nothing":
        journal.label(photos, NOTHING, how="key")
        oracle.act({photo: label for photo, label in labels.items() if photo not in photos}, classes)
    elif kind == "add" and name not in classes:
        journal.add_class(name)
        oracle.act(labels, classes | {name})
    elif kind in ("undo", "redo"):
        getattr(journal, kind)()
        getattr(oracle, kind)()
    elif kind in ("rename", "merge", "remove") and classes:
        old = dice.choice(sorted(classes))
        number = journal.number(old)
        assert number is not None
        if kind == "rename" and name not in classes:
            journal.rename_class(number, name)
            renamed = {photo: name if label == old else label for photo, label in labels.items()}
            oracle.act(renamed, classes - {old} | {name})
        elif kind == "remove":
            journal.remove_class(number)
            oracle.act({photo: label for photo, label in labels.items() if label != old}, classes - {old})
        elif kind == "merge" and len(classes) > 1:
            into = dice.choice(sorted(classes - {old}))
            journal.remove_class(number, journal.number(into))
            oracle.act({photo: into if label == old else label for photo, label in labels.items()}, classes - {old})


@pytest.mark.parametrize("seed", range(5))
def test_any_actions_leave_what_a_list_of_states_has_also_when_it_is_opened_again(path: Path, seed: int) -> None:
    dice, oracle = random.Random(seed), Oracle()
    journal = Journal(path, "ann")
    for step in range(300):
        one_step(dice, journal, oracle)
        assert state_of(journal) == oracle.state, step
        assert (journal.undo_says is None, journal.redo_says is None) == (not oracle.done, not oracle.undone)
        if step % 50 == 49:
            journal.close()
            journal = Journal(path, "bob")
            assert state_of(journal) == oracle.state, step
    while journal.undo():
        oracle.undo()
        assert state_of(journal) == oracle.state
    assert state_of(journal) == ({}, set())


def test_the_csv_is_a_list_that_an_extraction_takes(path: Path, tmp_path: Path) -> None:
    journal, photos = Journal(path, "ann"), [*PHOTOS[:3], "a\rb\n.jpg", *PHOTOS[4:6]]
    journal.label(photos[:2], "bee, honey", how="key")
    journal.label(photos[2:4], "wasp", how="batch", by="ann, accepting a suggestion")
    journal.label(photos[4:5], NONE_OF_THESE, how="key")
    (tmp_path / "labels.csv").write_bytes(journal.csv(photos))
    with (tmp_path / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == photos
    assert [(row["label"], row["mark"], row["by"]) for row in rows] == [
        ("bee, honey", "", "ann"), ("bee, honey", "", "ann"), ("wasp", "", "ann, accepting a suggestion"),
        ("wasp", "", "ann, accepting a suggestion"), ("", "none of these", "ann"), ("", "", ""),
    ]  # fmt: skip
    images = ImageSet.from_manifest(tmp_path / "labels.csv")
    labels = dict(zip(photos, ("bee, honey", "bee, honey", "wasp", "wasp", None, None), strict=True))
    assert {ref.id: ref.label for ref in images.refs} == labels


@pytest.mark.parametrize("name", ["", "   ", "a\nb", "\0", "x" * 201, "a\u202eb"])
def test_what_is_no_name_is_refused_and_changes_nothing(path: Path, name: str) -> None:
    journal = Journal(path, "ann")
    with pytest.raises(UsageError, match="not a name"):
        journal.label(PHOTOS[:1], name, how="key")
    assert state_of(journal) == ({}, set())
    assert path.read_bytes() == b""


def test_numbers_of_classes_that_there_are_not_are_refused(path: Path) -> None:
    journal = Journal(path, "ann")
    journal.add_class("bee")
    journal.add_class("wasp")
    journal.remove_class(1)
    for number in (1, 2, 99, -5):
        with pytest.raises(UsageError, match="no such class"):
            journal.label(PHOTOS[:1], number, how="key")
    with pytest.raises(UsageError, match="of this name"):
        journal.add_class(" bee ")
    with pytest.raises(UsageError, match="with itself"):
        journal.remove_class(0, 0)


def test_a_line_that_a_crash_cut_short_is_dropped(path: Path) -> None:
    journal = Journal(path, "ann")
    journal.label(PHOTOS[:2], "bee", how="key")
    journal.label(PHOTOS[2:4], "wasp", how="key")
    journal.close()
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in (first, first + 1, len(whole) - 1):
        path.write_bytes(whole[:length])
        journal = Journal(path, "ann")
        assert set(state_of(journal)[0].values()) == {"bee"}
        journal.label(PHOTOS[5:6], "ant", how="key")
        journal.close()
        assert set(state_of(Journal(path, "ann"))[0].values()) == {"bee", "ant"}


@pytest.mark.parametrize("change", [(b'"n":2', b'"n":3'), (b'"set"', b'"sat"'), (b"{", b"["), (b'"n":1', b'"n":"x"')])
def test_an_altered_journal_is_an_error_with_its_line(path: Path, change: tuple[bytes, bytes]) -> None:
    journal = Journal(path, "ann")
    journal.label(PHOTOS[:2], "bee", how="key")
    journal.label(PHOTOS[2:4], "wasp", how="key")
    journal.close()
    path.write_bytes(path.read_bytes().replace(*change, 1))
    with pytest.raises(StoreError, match=r"journal\.jsonl, line [12]: the journal of labels was altered"):
        Journal(path, "ann")


def test_a_full_disk_is_an_error_and_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path, "ann")
    journal.label(PHOTOS[:2], "bee", how="key")
    before, state = path.read_bytes(), state_of(journal)

    def full(handle: int, data: bytes, offset: int) -> int:
        os.lseek(handle, offset, os.SEEK_SET)
        os.write(handle, bytes(data)[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(FeatxError, match="the disk is full"):
            journal.label(PHOTOS[:9], "wasp", how="key")
    assert (path.read_bytes(), state_of(journal)) == (before, state)
    journal.label(PHOTOS[:9], "wasp", how="key")
    assert state_of(Journal(path, "ann")) == state_of(journal)


LABELLER = """
import sys
from pathlib import Path
from featx.studio.journal import Journal
journal = Journal(Path(sys.argv[1]), "ann")
for number in range(journal.n, 100_000):
    journal.label([f"{number}.jpg"], f"class {number % 7}", how="key")
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


@pytest.mark.slow
def test_a_killed_process_loses_no_label_that_was_answered(path: Path) -> None:
    dice = random.Random(1)
    for _ in range(KILLS):
        command = [sys.executable, "-c", LABELLER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(dice.uniform(0.0, 0.2))
            child.send_signal(signal.SIGKILL)
            answered = [int(line) for line in child.stdout.read().splitlines(keepends=True) if line.endswith(b"\n")]
        journal = Journal(path, "ann")
        last = max(answered, default=journal.n - 1)
        assert journal.n in (last + 1, last + 2)
        wanted = {f"{number}.jpg": f"class {number % 7}" for number in range(journal.n)}
        assert state_of(journal)[0] == wanted
        journal.close()


def test_it_says_who_did_what(path: Path) -> None:
    Journal(path, "ann").label(PHOTOS[:1], "bee", how="map")
    (record,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert (record["n"], record["by"], record["how"], record["say"]) == (1, "ann", "map", "1 photo: bee")
    assert record["set"] == [[PHOTOS[0], NOTHING, 0]]
    assert record["classes"] == [[0, None, "bee"]]
