"""Versions: immutable, switched atomically, gone back to, and what the audit log says after a crash."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from modelkit import clusters, make_bundle

from featx.errors import BundleError, FeatxError, StoreBusy, StoreError, UsageError
from featx.heads import make_head
from featx.models.bundle import Bundle, bundle_bytes, write_bundle
from featx.models.corrections import Corrections
from featx.models.refit import batch_sizes
from featx.models.versions import Versions, read_current


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    rows, labels = clusters()
    return make_bundle(make_head("ridge", alpha=1.0).fit(rows, labels), rows)


def other(bundle: Bundle, number: int) -> Bundle:
    return replace(bundle, metrics={**bundle.metrics, "number": number})


@pytest.fixture
def versions(tmp_path: Path, bundle: Bundle) -> Versions:
    made = Versions(tmp_path / "feedback")
    made.begin(write_bundle(bundle, tmp_path / "first.model"), "mia")
    return made


def promote(versions: Versions, bundle: Bundle, corrections: list[int]) -> str:
    with versions.changing():
        return versions.promote(bundle, corrections, {"verdict": "better"}, "mia")


def test_a_model_is_begun_with_promoted_and_gone_back_to(versions: Versions, bundle: Bundle) -> None:
    first = versions.current
    second = promote(versions, other(bundle, 2), [1, 2])
    third = promote(versions, other(bundle, 3), [1, 2, 3])
    assert read_current(versions.folder) == versions.current == third
    assert [each.name for each in versions.all()] == [first, second, third]
    assert [sorted(each.corrections) for each in versions.all()] == [[], [1, 2], [1, 2, 3]]
    assert versions.read(third).metrics["number"] == 3
    assert versions.roll_back("leo") == (second, "batch-4")
    assert versions.held == {"batch-4": [3]}
    assert read_current(versions.folder) == second
    assert versions.roll_back("leo", first)[0] == first
    again = Versions(versions.folder)
    assert again.current == first
    assert again.held == {"batch-4": [3], "batch-5": [1, 2]}
    assert again.settle_batch("batch-4", "released", "kim") == 1
    assert again.settle_batch("batch-5", "discarded", "kim") == 2
    assert (again.held, again.settled("released"), again.settled("discarded")) == ({}, {3}, {1, 2})
    assert [(each["who"], each["what"]) for each in again.records] == [
        ("mia", "began"), ("mia", "promoted"), ("mia", "promoted"), ("leo", "rolled back"), ("leo", "rolled back"),
        ("kim", "released"), ("kim", "discarded"),
    ]  # fmt: skip


def test_networks_are_opened_for_one_photo_where_few_are_new(versions: Versions, bundle: Bundle) -> None:
    corrections = Corrections(versions.folder)
    corrections.open()
    for number in range(102):
        corrections.add(bytes([number]), "ants")
    corrections.close()
    assert batch_sizes(versions) is None
    promote(versions, other(bundle, 1), [1, 2])
    found = batch_sizes(versions)
    assert found is not None
    assert found["cpu"] == 1
    assert found["cuda"] > 1


def test_what_cannot_be_done_is_said(versions: Versions, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no version before"):
        versions.roll_back("mia")
    for name in ("00000000", "../../x", str(versions.current)):
        with pytest.raises(UsageError, match=r"no such version|is the current version"):
            versions.roll_back("mia", name)
    with pytest.raises(UsageError, match="no such batch"):
        versions.settle_batch("batch-9", "released", "mia")
    with pytest.raises(UsageError, match="belongs to another model"):
        versions.begin(write_bundle(other(bundle, 9), tmp_path / "other.model"), "mia")
    (tmp_path / "x.model").write_bytes(b"nonsense")
    with pytest.raises(FeatxError, match="not a model"):
        versions.add(tmp_path / "x.model", "mia")
    assert len(versions.records) == 1


def test_versions_are_never_written_to_again(versions: Versions, tmp_path: Path, bundle: Bundle) -> None:
    path = versions.path(str(versions.current))
    assert path.stat().st_mode & 0o222 == 0
    path.chmod(0o644)
    path.write_bytes(bundle_bytes(other(bundle, 5)))
    with pytest.raises(BundleError, match="altered"):
        versions.read(str(versions.current))
    with pytest.raises(StoreError, match="another model has this name"):
        versions.add(tmp_path / "first.model", "mia")


def test_a_crash_between_the_log_and_the_switch_is_made_good(
    versions: Versions, tmp_path: Path, bundle: Bundle
) -> None:
    first = versions.current
    second = promote(versions, other(bundle, 2), [1])
    (versions.folder / "current").write_text(f"{first}\n")  # as a crash leaves it
    again = Versions(versions.folder)
    with again.changing():
        pass
    assert read_current(versions.folder) == second
    (versions.folder / "current").write_text(f"{first}\n")
    # A server answers with what this says, and then follows the file.
    assert Versions(versions.folder).begin(tmp_path / "first.model", "mia") == second
    assert read_current(versions.folder) == second
    log = versions.folder / "audit.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"n":3,"what":"promo')
    assert Versions(versions.folder).current == second
    with Versions(versions.folder).changing():
        pass
    assert log.read_bytes() == whole


@pytest.mark.parametrize(
    "change",
    [
        {"n": 5}, {"version": "../../etc"}, {"corrections": ["x"]}, {"when": None}, {"who": []}, {"before": 1},
        {"what": "held", "batch": "batch-1"}, {"batch": [], "held": [1]}, {"held": 3}, {"evidence": [1]},
        {"evidence": {"verdict": "better", "all": 5}}, {"evidence": {"all": {"mean": "0", "low": 0, "high": 0}}},
        {"evidence": {"p": float("inf")}},
    ],
)  # fmt: skip
def test_an_altered_log_is_refused(versions: Versions, change: dict[str, object]) -> None:
    log = versions.folder / "audit.jsonl"
    log.write_text(json.dumps({**json.loads(log.read_text()), **change}) + "\n")
    with pytest.raises(StoreError, match="audit log was altered"):
        Versions(versions.folder)


def test_one_changes_at_a_time(versions: Versions) -> None:
    with versions.changing(), pytest.raises(StoreBusy), Versions(versions.folder).changing():
        pass


def test_a_file_that_names_no_version_is_none(tmp_path: Path) -> None:
    assert read_current(tmp_path) is None
    for text in ("", "../../x", "ABCDEF01", "0" * 200):
        (tmp_path / "current").write_text(text)
        if len(text) > 100:
            with pytest.raises(StoreError):
                read_current(tmp_path)
        else:
            assert read_current(tmp_path) is None
