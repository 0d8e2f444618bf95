"""Several backbones in one extraction: engines that fail, interrupts, and extractions in parts."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import storekit
from numpy.typing import NDArray
from partkit import assert_same
from storekit import LightEngine, check_published, extract_part, light_backbones, light_like, png_folders, start_light

from featx.errors import FeatxError, Interrupted, StoreError
from featx.extraction import run
from featx.extraction.parts import Part, finish_parts
from featx.extraction.run import ExtractSummary
from featx.images.source import ImageSet
from featx.store.manifest import name_of, read_manifest
from featx.store.reader import FeatureReader, read_features
from featx.store.tools import content_hash, verify

BOTH = ("tiny", "wide")


@pytest.fixture(autouse=True)
def light_backbones_go_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """No catalogue has them."""
    monkeypatch.setattr(run, "network_like", light_like)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return png_folders(tmp_path / "photos", 30)


class Failing(LightEngine):
    """Fails at its third batch, or ends there without a word."""

    quiet = False

    def embed(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[tuple[NDArray[np.float32], ...]]:
        for number, outputs in enumerate(super().embed(batches)):
            if number == 2:
                if self.quiet:
                    return
                raise RuntimeError("the device is out of memory")
            yield outputs


class Ending(Failing):
    quiet = True


def starting(kind: type[LightEngine], failing: str) -> Any:
    def start(backbone: Any, **how: Any) -> LightEngine:
        side = backbone.preprocess.crop[0]
        return (kind if backbone.name == failing else LightEngine)(side=side, dim=side, batch_size=side // 2)

    return start


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("featx-")]


@pytest.mark.parametrize("failing", BOTH)
@pytest.mark.parametrize("kind", [Failing, Ending])
def test_an_engine_that_fails_stops_the_run_with_its_own_error(
    kind: type[Failing], failing: str, source: Path, tmp_path: Path
) -> None:
    store, log = tmp_path / "s.featx", tmp_path / "logs"
    said = "an engine (ended before|gave no)" if kind is Ending else "the device is out of memory"
    with pytest.raises(RuntimeError, match=said):
        storekit.extract(source, store, backbones=BOTH, engine=starting(kind, failing))
    assert threads() == []
    # Two whole batches of the one that failed are complete, as far as the other has got.
    kept = check_published(store)
    assert 0 < kept <= 2 * (4 if failing == "tiny" else 6)
    log.mkdir()
    storekit.extract(source, store, backbones=BOTH, log=log)
    assert {path.name: sum(map(int, path.read_text().split())) for path in log.iterdir()} == dict.fromkeys(
        BOTH, 30 - kept
    )
    storekit.extract(source, tmp_path / "whole.featx", backbones=BOTH)
    assert content_hash(store) == content_hash(tmp_path / "whole.featx") and verify(store) == []


def test_an_interrupt_keeps_what_is_complete_and_ends_all_threads(source: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.featx"

    def progress(done: int, total: int) -> None:
        if done == 25:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="25 of 30 images"):
        storekit.extract(source, store, backbones=BOTH, progress=progress)
    assert threads() == []
    assert check_published(store) >= 6
    storekit.extract(source, store, backbones=BOTH)
    storekit.extract(source, tmp_path / "whole.featx", backbones=BOTH)
    assert content_hash(store) == content_hash(tmp_path / "whole.featx")


# --- parts --------------------------------------------------------------------------------------------------------


def run_part(source: Path, store: Path, part: str, *names: str, **options: Any) -> ExtractSummary:
    images, number = ImageSet.from_folder(source), Part.parse(part)
    return extract_part(
        images, light_backbones(*names), store, number, engine=partial(start_light, **options), workers=1
    )


def finish(source: Path, store: Path) -> ExtractSummary:
    return finish_parts(ImageSet.from_folder(source), store)


def test_parts_of_two_backbones_make_what_one_run_makes(source: Path, tmp_path: Path) -> None:
    store, whole = tmp_path / "s.featx", tmp_path / "whole.featx"
    storekit.extract(source, whole, backbones=BOTH)
    for number in (2, 3, 1):
        run_part(source, store, f"{number}/3", *BOTH)
    assert finish(source, store).embedded == 30
    assert_same(store, whole)
    one, other = read_features(store), read_features(whole)
    assert one.hashes is not None and other.hashes is not None and np.array_equal(one.hashes, other.hashes)


def test_a_backbone_is_added_in_parts(source: Path, tmp_path: Path) -> None:
    """Over shards of which a part knows some rows, and a store that has only some of the images."""
    store, whole, logs = tmp_path / "s.featx", tmp_path / "whole.featx", tmp_path / "logs"
    late = tmp_path / "late"
    for path in sorted(source.rglob("*.png"))[::3]:
        (late / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.move(path, late / path.parent.name / path.name)
    storekit.extract(source, store)
    shutil.copytree(late, source, dirs_exist_ok=True)
    logs.mkdir()
    before = content_hash(store)
    for number in (1, 2):
        run_part(source, store, f"{number}/2", "wide", log=logs)
        assert content_hash(store) == before
    assert {path.name: sum(map(int, path.read_text().split())) for path in logs.iterdir()} == {"tiny": 10, "wide": 30}
    assert finish(source, store).embedded == 30
    storekit.extract(source, whole)
    storekit.extract(source, whole, backbones=("wide",))
    assert content_hash(store) == content_hash(whole) and verify(store) == []
    assert list(FeatureReader(store).backbones) == ["tiny", "pixels", "wide"]


def test_finishing_too_early_deletes_no_part_of_a_new_backbone(source: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.featx"
    storekit.extract(source, store)
    run_part(source, store, "1/2", "wide")
    with pytest.raises(StoreError, match=r"not all parts are finished: found part 2/2 has not begun"):
        finish(source, store)
    assert Part.parse("1/2").folder(store).is_dir()
    run_part(source, store, "2/2", "wide")
    assert finish(source, store).embedded == 30
    assert "wide" in FeatureReader(store).backbones


def test_a_part_without_a_backbone_of_the_others_is_named(source: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.featx"
    run_part(source, store, "1/2", "tiny")
    run_part(source, store, "2/2", *BOTH)
    with pytest.raises(StoreError, match=r"found part 1/2 was made without wide\. Run"):
        finish(source, store)
    run_part(source, store, "1/2", "wide")
    run_part(source, store, "2/2", "tiny")  # goes on with what it was told before
    finish(source, store)
    assert [name_of(each) for each in read_manifest(store).finished] == ["tiny", "pixels", "wide"]
    assert verify(store) == []


def test_a_part_that_stopped_while_a_backbone_was_added_is_not_finished(source: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.featx"
    run_part(source, store, "1/1", "tiny")
    with pytest.raises((RuntimeError, FeatxError)):
        extract_part(
            ImageSet.from_folder(source), light_backbones(*BOTH), store, Part.parse("1/1"),
            engine=starting(Failing, "wide"), workers=1,
        )  # fmt: skip
    with pytest.raises(StoreError, match="found part 1/1 was interrupted"):
        finish(source, store)
    run_part(source, store, "1/1", *BOTH)
    finish(source, store)
    assert "wide" in FeatureReader(store).backbones
