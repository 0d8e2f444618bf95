"""Extractions in parts: what is put together is what one process makes, whatever happened to the parts meanwhile."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import storekit
from hypothesis import given, strategies as st
from partkit import assert_same, store, whole
from storekit import LightEngine, extract_part, light_backbone, refused_of

from featx import _files
from featx._files import writer_lock
from featx.backbones.provenance import provenance_of
from featx.errors import FeatxError, Interrupted, MismatchError, StoreBusy, StoreError, TooManyBadImages, UsageError
from featx.extraction.parts import Part, finish_parts, parts_of, unfinished
from featx.extraction.run import ExtractSummary
from featx.images.origin import ImageRef
from featx.images.source import ImageSet
from featx.store import manifest, writer as store_writer
from featx.store.reader import read_features
from featx.store.tools import content_hash, info, verify
from featx.store.writer import StoreWriter

__all__ = ["store", "whole"]  # fixtures


def run_part(source: Path, store: Path, part: str, **options: Any) -> ExtractSummary:
    engine = options.pop("engine", None) or LightEngine()
    images = ImageSet.from_folder(source)
    return extract_part(images, light_backbone(), store, Part.parse(part), engine=engine, workers=1, **options)


def run_parts(source: Path, store: Path, of: int, **options: Any) -> None:
    for number in range(1, of + 1):
        run_part(source, store, f"{number}/{of}", **options)


def finish(source: Path, store: Path, **options: Any) -> ExtractSummary:
    return finish_parts(ImageSet.from_folder(source), store, **options)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """14 good images, of which two are copies of others in another part, and three bad ones."""
    root = storekit.png_folders(tmp_path / "photos", 12)
    shutil.copy2(root / "ants" / "000000.png", root / "bees" / "copy.png")
    shutil.copy2(root / "bees" / "000011.png", root / "ants" / "000001.png")
    for name in ("ants/bad.png", "ants/worse.png", "bees/bad.png"):
        (root / name).write_bytes(b"this is no image " + name.encode())
        os.utime(root / name, ns=(10**18, 10**18))
    return root


@given(total=st.integers(0, 500), of=st.integers(1, 60))
def test_parts_are_consecutive_even_and_complete(total: int, of: int) -> None:
    refs = tuple(ImageRef(f"{i:03d}", Path(), None, "", 1, 1) for i in range(total))
    cuts = [Part(number=i, of=of).cut(ImageSet(refs, Path())).refs for i in range(1, of + 1)]
    assert tuple(ref for cut in cuts for ref in cut) == refs
    assert max(map(len, cuts)) - min(map(len, cuts)) <= 1


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/4/2", "-1/4", "1/0", "", "1/999999", "1/4 "])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--part: no such part: expected i/n"):
        Part.parse(text)


@pytest.mark.slow
@pytest.mark.parametrize("of", [1, 2, 5, 23])
def test_parts_make_the_store_that_one_process_makes(source: Path, store: Path, whole: Path, of: int) -> None:
    numbers = list(range(1, of + 1))
    random.Random(of).shuffle(numbers)
    summaries = [run_part(source, store, f"{number}/{of}") for number in numbers]
    assert sum(summary.images for summary in summaries) == 17
    assert sum(summary.quarantined for summary in summaries) == 3
    seen: list[tuple[int, int]] = []
    summary = finish(source, store, progress=lambda done, total: seen.append((done, total)))
    assert (summary.images, summary.embedded, summary.reused, summary.quarantined) == (17, 12, 2, 3)
    assert seen[-1] == (17, 17)
    assert_same(store, whole)
    assert [item.id for item in summary.refused] == ["ants/bad.png", "ants/worse.png", "bees/bad.png"]
    assert storekit.check_published(store) == 12


@pytest.mark.slow
def test_a_part_run_twice_computes_nothing_twice(source: Path, store: Path, whole: Path) -> None:
    run_parts(source, store, 2)
    engine = LightEngine()
    assert run_part(source, store, "2/2", engine=engine).embedded == 0
    finish(source, store)
    assert finish(source, store).images == 17  # a second time: everything is done
    assert run_part(source, store, "1/2").embedded == 0  # a scheduler's late retry
    assert content_hash(store) == content_hash(whole)
    run_part(source, store, "2/2")
    assert finish(source, store).embedded == 0
    assert_same(store, whole)


def test_two_runs_of_one_part_at_once_do_not_meet(source: Path, store: Path) -> None:
    run_part(source, store, "1/2")
    folder = Part.parse("1/2").folder(store)
    with writer_lock(folder / ".lock"), pytest.raises(StoreBusy, match=f"another process.*process {os.getpid()} on"):
        run_part(source, store, "1/2")


@pytest.mark.slow
def test_missing_parts_are_named_with_the_command(source: Path, store: Path) -> None:
    with pytest.raises(StoreError, match=r"no parts to put together. Run every part first, .*photos --out .*--part"):
        finish(source, store)
    run_part(source, store, "1/3")
    part = Part.parse("3/3").folder(store)
    with pytest.raises(Interrupted):
        run_part(source, store, "3/3", progress=interrupt_after(2))
    with pytest.raises(StoreError) as caught:
        finish(source, store)
    assert "part 2/3 has not begun; part 3/3 was interrupted" in str(caught.value)
    assert str(caught.value).endswith(f"featx extract {source} --out {store} --part 2/3.")
    assert caught.value.exit_code == 2
    with writer_lock(part / ".lock"), pytest.raises(StoreError, match=f"3/3 is being written by process {os.getpid()}"):
        finish(source, store)
    images = ImageSet.from_folder(source)
    assert list(map(str, unfinished(images, store, 3))) == ["2/3", "3/3"]
    assert list(map(str, parts_of(store))) == ["1/3", "3/3"]


def interrupt_after(calls: int) -> Any:
    left = iter(range(calls))

    def progress(done: int, total: int) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return progress


@pytest.mark.slow
def test_parts_of_other_images_are_refused(source: Path, store: Path, whole: Path) -> None:
    run_parts(source, store, 2)
    storekit.png_folders(source, 1, first=100)
    with pytest.raises(StoreError, match=r"found part 1/2 is of another list of images \(8 then, 9 now\). Run"):
        finish(source, store)
    (source / "ants" / "000100.png").unlink()
    storekit.write_png(source / "bees" / "000001.png", 7777)
    with (source / "bees" / "000001.png").open("ab") as file:
        file.write(b"longer")
    with pytest.raises(StoreError, match=r"part 2/2 was made before bees/000001.png changed. Run.*--part 2/2"):
        finish(source, store)
    engine = LightEngine()
    run_part(source, store, "2/2", engine=engine)
    finish(source, store)
    storekit.extract(source, whole)
    assert content_hash(store) == content_hash(whole)


@pytest.mark.slow
def test_parts_of_another_kind_are_refused(source: Path, store: Path, tmp_path: Path) -> None:
    class Half(LightEngine):
        precision = "bf16"

    run_part(source, store, "1/2")
    with pytest.raises(
        MismatchError, match=r'precision: expected "fp32" \(the store\'s\), found "bf16" \(this run\'s\)'
    ):
        run_part(source, store, "2/2", engine=Half())
    # The same from a host that did not see the store in time.
    run_parts(source, tmp_path / "other.featx", 2, engine=Half())
    shutil.copytree(Part.parse("2/2").folder(tmp_path / "other.featx"), Part.parse("2/2").folder(store))
    with pytest.raises(MismatchError, match=r"another precision: .*\"bf16\" \(.*2-of-2's\)"):
        finish(source, store)


def test_a_note_says_that_parts_were_computed_differently(source: Path, store: Path) -> None:
    class Elsewhere(LightEngine):
        device = "cuda"

    run_part(source, store, "1/2")
    run_part(source, store, "2/2", engine=Elsewhere())
    assert finish(source, store).notes == ("parts came from torch on cpu (1) and torch on cuda (1)",)


@pytest.mark.parametrize("what", ["shards", "index.h5", "quarantine.jsonl", "manifest.json"])
def test_a_damaged_part_is_named(source: Path, store: Path, what: str) -> None:
    run_parts(source, store, 2)
    path = Part.parse("2/2").folder(store) / what
    path = next(path.iterdir()) if path.is_dir() else path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError) as caught:
        finish(source, store)
    assert str(caught.value).startswith(str(path))
    if what == "shards":
        assert str(caught.value).endswith(f"and run: featx extract {source} --out {store} --part 2/2.")
    # As it says: without the part, and after it has been run again, all is well.
    shutil.rmtree(Part.parse("2/2").folder(store))
    run_part(source, store, "2/2")
    finish(source, store)
    assert verify(store) == []


@pytest.mark.slow
def test_readers_see_what_was_there_before(source: Path, store: Path, whole: Path) -> None:
    run_part(source, store, "1/2")
    with pytest.raises(StoreError, match=r"has not finished. Run the missing parts .*--part\), then .*--finish"):
        read_features(store)
    (problem,) = verify(store)
    assert "its extraction has not finished" in problem
    run_part(source, store, "2/2")
    finish(source, store)
    before = content_hash(store)
    storekit.png_folders(source, 4, first=50)
    engine = LightEngine()
    run_part(source, store, "1/2", engine=engine)
    assert content_hash(store) == before
    assert verify(store) == []
    assert info(store)["rows"] == 14
    run_part(source, store, "2/2", engine=engine)
    summary = finish(source, store)
    assert (summary.embedded, summary.reused, summary.quarantined) == (4, 14, 3)
    storekit.extract(source, whole)
    assert content_hash(store) == content_hash(whole)


def test_an_update_in_parts_computes_new_images_only(source: Path, whole: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    storekit.png_folders(source, 3, first=60)
    run_parts(source, whole, 3, engine=LightEngine(log=log))
    assert sum(map(int, log.read_text().split())) == 3
    shards = {path.name: path.stat().st_ino for path in (whole / "shards").iterdir()}
    finish(source, whole)
    assert {path.name: path.stat().st_ino for path in (whole / "shards").iterdir()}.items() >= shards.items()
    assert verify(whole) == []


def test_a_plain_extraction_says_that_parts_are_waiting(source: Path, store: Path) -> None:
    run_part(source, store, "1/2")
    assert any("--finish takes over" in note for note in storekit.extract(source, store).notes)


@pytest.mark.slow
def test_bad_images_are_counted_over_all_parts(source: Path, store: Path) -> None:
    run_part(source, store, "1/2", max_bad=2 / 17)
    run_part(source, store, "2/2", max_bad=2 / 17)  # two of its nine, which is what the whole may have
    with pytest.raises(TooManyBadImages, match=r"expected at most 2 of 17, found 3 refused, such as ants/bad.png"):
        finish(source, store, max_bad=2 / 17)
    assert [item.id for item in refused_of(store)] == ["ants/bad.png", "ants/worse.png", "bees/bad.png"]
    with pytest.raises(TooManyBadImages, match="expected at most 1 of 17, found 2"):
        run_part(source, store, "2/2", max_bad=1 / 17)
    assert finish(source, store, max_bad=3 / 17).quarantined == 3


def test_file_systems_without_hard_links(
    source: Path, store: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    run_parts(source, store, 3)
    finish(source, store)
    assert_same(store, whole)


@pytest.mark.slow
def test_finishing_can_fail_at_every_step_and_be_repeated(
    source: Path, store: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_parts(source, tmp_path / "parts.featx", 3)
    publish, write_manifest, failed = _files.publish, manifest.write_manifest, 0
    for allowed in range(100):
        shutil.copytree(tmp_path / "parts.featx", store)
        steps = iter(range(allowed))

        def step(steps: Iterator[int] = steps) -> None:
            if next(steps, None) is None:
                raise StoreError("stopped by the test")

        def failing_publish(*arguments: Any, step: Any = step) -> Path:
            step()
            path = publish(*arguments)
            step()
            return path

        def failing_manifest(*arguments: Any, step: Any = step) -> None:
            step()
            write_manifest(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(store_writer, "publish", failing_publish)
            patch.setattr(store_writer, "write_manifest", failing_manifest)
            try:
                finish(source, store)
            except StoreError as error:
                failed += 1
                assert error.what == "stopped by the test"
                storekit.check_published(store)
            else:
                break
        finish(source, store)
        assert_same(store, whole)
        shutil.rmtree(store)
    assert failed >= 10


@pytest.mark.slow
@pytest.mark.parametrize("backbones", [("tiny",), ("tiny", "wide", "third")], ids=["one", "three"])
@pytest.mark.usefixtures("warm")  # before the clock
def test_parts_and_finishing_survive_kills(backbones: tuple[str, ...], tmp_path: Path) -> None:
    source, store = storekit.png_folders(tmp_path / "photos", 48), tmp_path / "photos.featx"
    storekit.extract(source, tmp_path / "whole.featx", backbones=backbones)
    rng, kills = random.Random(0), 0
    job: dict[str, Any] = {"source": source, "store": store, "shard_rows": 3, "backbones": backbones}
    started = time.perf_counter()
    with storekit.begin(**{**job, "store": tmp_path / "timed.featx", "part": "1/3"}) as process:
        assert process.wait() == 0
    seconds = time.perf_counter() - started
    for do in ({"part": "1/3"}, {"part": "3/3"}, {"part": "2/3"}, {"finish": True}):
        code, deadly = None, 12
        while code != 0:
            process = storekit.begin(**job, **do)
            if deadly:
                time.sleep(rng.random() * (0.05 if "finish" in do else seconds))
                process.kill()
                deadly -= 1
            _, err = process.communicate()
            code = process.returncode
            assert code in (0, -signal.SIGKILL), err
            kills += code != 0
            storekit.check_published(store)
    assert kills >= 12
    assert_same(store, tmp_path / "whole.featx")


def test_what_is_in_the_way_of_the_store_is_left_alone(source: Path, store: Path) -> None:
    store.write_bytes(b"a letter")
    with pytest.raises(StoreError, match="a file is in the way of the store"):
        run_part(source, store, "1/2")
    store.unlink()
    store.mkdir()
    (store / "letter.txt").write_text("Dear")
    with pytest.raises(StoreError, match="a folder with other things in it"):
        run_part(source, store, "1/2")
    assert [path.name for path in store.iterdir()] == ["letter.txt"]


def test_a_part_without_images_is_done(source: Path, store: Path) -> None:
    summary = run_part(source, store, "1/20")
    assert (summary.images, summary.embedded) == (0, 0)
    assert summary.notes == ("part 1/20 has no images, as there are only 17",)
    assert not store.exists()


def test_two_cuts_in_one_store(source: Path, store: Path, whole: Path) -> None:
    run_part(source, store, "1/4")
    run_part(source, store, "1/2")
    with pytest.raises(StoreError, match=r"part 2/2 has not begun; there are incomplete parts of 4 too"):
        finish(source, store)
    run_part(source, store, "2/2")
    finish(source, store)
    assert_same(store, whole)


def test_a_part_that_is_being_written_again_is_left_alone(source: Path, store: Path) -> None:
    run_parts(source, store, 2)
    folder = Part.parse("2/2").folder(store)
    with writer_lock(folder / ".lock"):
        summary = finish(source, store)
    assert summary.notes == ("parts 2/2 are being written again just now, and were left there",)
    assert folder.is_dir()
    assert verify(store) == []
    finish(source, store)
    assert not folder.exists()


def test_another_writer_of_the_store_is_respected(source: Path, store: Path) -> None:
    run_parts(source, store, 2)
    with writer_lock(store / ".lock"):
        with pytest.raises(FeatxError, match="another process is writing to this store"):
            finish(source, store)
        assert run_part(source, store, "1/2").reused == 7  # parts do not need it


def test_the_store_may_appear_while_a_part_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another part makes it between this one's looks: that is no folder with other things in it."""
    store = tmp_path / "s.featx"
    store.mkdir()
    provenance = provenance_of(light_backbone(), LightEngine())
    look = store_writer._foreign

    def look_late(folder: Path) -> bool:
        monkeypatch.setattr(store_writer, "_foreign", look)
        with StoreWriter(folder, provenance):
            pass
        return look(folder)

    monkeypatch.setattr(store_writer, "_foreign", look_late)
    with StoreWriter(store, provenance) as writer:
        assert writer.manifest.shards == ()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with (
        pytest.raises(StoreError, match="a folder with other things in it"),
        StoreWriter(tmp_path / "other", provenance),
    ):
        pass
