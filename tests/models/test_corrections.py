"""Corrections on the disk, and what several people's labels come to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from servicekit import png
from sklearn.metrics import cohen_kappa_score

from featx.errors import StoreBusy, StoreError, UsageError
from featx.models.agreement import agreements, cohens_kappa, export_csv, vote
from featx.models.corrections import Corrections, Said


@pytest.fixture
def kept(tmp_path: Path) -> Corrections:
    made = Corrections(tmp_path / "feedback")
    made.open()
    return made


def test_what_was_added_is_there_again_once(kept: Corrections) -> None:
    first, new = kept.add(png(1), " ants ", "mia", Said("bees", 0.7, "abcd1234"))
    assert (first.label, first.by, first.said, first.version, new) == ("ants", "mia", "bees", "abcd1234", True)
    assert kept.add(png(1), "ants", "mia") == (first, False)
    assert kept.add(png(1), "ants", "leo")[1]
    second, new = kept.add(png(1), "bees", "mia")
    assert new
    assert [each.n for each in kept.latest] == [2, second.n]
    kept.close()
    again = Corrections(kept.folder)
    assert again.all == kept.all
    assert again.latest == kept.latest
    assert [path.name for path in (kept.folder / "images").iterdir()] == [first.file]
    assert (kept.folder / "images" / first.file).read_bytes() == png(1)


def test_a_line_that_a_crash_cut_short_is_dropped(kept: Corrections) -> None:
    kept.add(png(1), "ants")
    kept.close()
    whole = kept.path.read_bytes()
    kept.path.write_bytes(whole + whole[: len(whole) // 2])
    again = Corrections(kept.folder)
    assert len(again) == 1
    again.open()
    again.add(png(2), "bees")
    again.close()
    assert [each.label for each in Corrections(kept.folder).all] == ["ants", "bees"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"n": 2}, "not the next"),
        ({"sha256": "../x"}, "no name that featx gives"),
        ({"file": "../../passwd.jpg"}, "no name that featx gives"),
        ({"label": ""}, "not a name for a class"),
        ({"by": 3}, "not text"),
        ({"label": ["ants"]}, "not text"),
        ({"when": "\ud800"}, "not text"),
        ({"score": float("nan")}, "NaN is no number"),
        ({"score": "high"}, "score is no number"),
        ({"more": 1}, "unexpected keyword"),
    ],
)
def test_an_altered_journal_is_refused(kept: Corrections, change: dict[str, object], what: str) -> None:
    kept.add(png(1), "ants")
    kept.close()
    kept.path.write_text(json.dumps({**json.loads(kept.path.read_text()), **change}) + "\n")
    with pytest.raises((StoreError, UsageError), match=what):
        Corrections(kept.folder)


def test_what_is_no_name_is_not_written(kept: Corrections) -> None:
    for label, by in (("", ""), ("a\nb", ""), ("x" * 201, ""), ("ants", "\0")):
        with pytest.raises(UsageError, match="not a name"):
            kept.add(png(1), label, by)
    assert kept.path.read_bytes() == b""


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(png(1))
    with pytest.raises(UsageError, match="not a feedback folder"):
        Corrections(tmp_path).open()
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_second_service_is_kept_out(kept: Corrections) -> None:
    with pytest.raises(StoreBusy):
        Corrections(kept.folder).open()


def test_a_full_disk_leaves_nothing_half_written(kept: Corrections, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.add(png(1), "ants")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("featx._files.os.pwrite", full)
        with pytest.raises(StoreError, match="disk is full"):
            kept.add(png(2), "bees")
    assert kept.add(png(2), "bees")[0].n == 2
    kept.close()
    assert [each.n for each in Corrections(kept.folder).all] == [1, 2]


def test_majority_and_unanimity(kept: Corrections) -> None:
    said = {1: ["ants", "ants", "bees"], 2: ["ants", "bees"], 3: ["bees", "bees"], 4: ["ants"]}
    for image, labels in said.items():
        for person, label in zip(("mia", "leo", "kim"), labels, strict=False):
            kept.add(png(image), label, person)
    assert [each.label for each in vote(kept.latest)] == ["ants", None, "bees", "ants"]
    assert [each.label for each in vote(kept.latest, "unanimous")] == [None, None, "bees", "ants"]
    assert [each.disputed for each in vote(kept.latest)] == [True, True, False, False]
    found = {(each.a, each.b): (each.agreed, each.images) for each in agreements(vote(kept.latest))}
    assert found == {("leo", "mia"): (2, 3)}
    lines = export_csv(vote(kept.latest)).decode().splitlines()
    assert lines[0] == "path,label,by,when"
    assert [line.split(",")[1] for line in lines[1:]] == ["ants", "", "bees", "ants"]


def test_kappa_is_that_of_scikit_learn_and_its_interval_covers() -> None:
    rng = np.random.default_rng(0)
    # The truth of three classes, and two people who err by themselves: kappa of many photos is the true one.
    share = np.array([0.5, 0.3, 0.2])

    def people(n: int) -> list[tuple[str, str]]:
        true = rng.choice(3, n, p=share)
        said = [np.where(rng.random(n) < 0.25, rng.choice(3, n, p=share), true) for _ in range(2)]
        return list(zip(said[0].astype(str).tolist(), said[1].astype(str).tolist(), strict=True))

    many = people(400_000)
    true = cohens_kappa(many).mean
    assert true == pytest.approx(cohen_kappa_score(*zip(*many, strict=True)), abs=1e-12)
    drawn = [cohens_kappa(people(80)) for _ in range(1000)]
    covered = np.mean([each.low <= true <= each.high for each in drawn])
    assert 0.92 < covered < 0.98


def test_kappa_of_people_who_always_agree_is_not_certain() -> None:
    found = cohens_kappa([("a", "a"), ("b", "b")] * 10)
    assert found.mean == 1.0
    assert found.low == pytest.approx(1 - 2 * (1 - 0.025 ** (1 / 20)))
    assert (cohens_kappa([("a", "a")] * 5).low, cohens_kappa([("a", "a")] * 5).high) == (-1.0, 1.0)
    assert cohens_kappa([("a", "b"), ("b", "a")] * 10).mean == -1.0
