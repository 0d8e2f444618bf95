"""Extraction: what is computed, what is reused, what is refused, and what an interruption leaves."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, TinyEngine, bad_images, class_folders, picture, tiny_backbone
from imagekit import pixels
from numpy.typing import NDArray
from storekit import refused_of

from featx.errors import Interrupted, MismatchError, SourceError, TooManyBadImages
from featx.extraction.run import ExtractSummary, extract_features
from featx.images.origin import ImageRef
from featx.images.source import ImageSet
from featx.images.thumbnails import THUMBNAIL
from featx.models.predictor import image_files
from featx.store import index
from featx.store.index import longest_id
from featx.store.reader import read_features
from featx.store.tools import content_hash, info, verify


def run(source: Path, store: Path, **options: object) -> ExtractSummary:
    engine = options.pop("engine", None) or TinyEngine()
    images = ImageSet.from_source(source)
    return extract_features(images, tiny_backbone(), store, engine=engine, workers=2, **options)  # type: ignore[arg-type]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "photos", each=5)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "photos.featx"


def test_embeddings_of_another_store_are_taken_over(source: Path, store: Path, tmp_path: Path) -> None:
    run(source, store)
    summary = run(source, tmp_path / "new.featx", known=store, total=20)  # both are of the public API since 0.1.0
    assert (summary.embedded, summary.reused) == (0, 10)
    np.testing.assert_array_equal(read_features(tmp_path / "new.featx").embeddings, read_features(store).embeddings)


def test_every_image_gets_its_own_embedding(source: Path, store: Path) -> None:
    summary = run(source, store)
    assert (summary.images, summary.embedded, summary.reused, summary.quarantined) == (10, 10, 0, 0)
    features = read_features(store)
    assert features.ids.tolist() == sorted(f"{path.parent.name}/{path.name}" for path in source.rglob("*.png"))
    for row, name in enumerate(features.ids):
        data = (source / name).read_bytes()
        (expected,) = next(iter(TinyEngine().embed([pixels(data, TINY)[None]])))
        assert np.array_equal(features.embeddings[row], expected[0])
        assert features.digests[row].tobytes() == hashlib.sha256(data).digest()
        assert features.class_names[features.labels[row]] == name.split("/")[0]
    assert verify(store) == []


@pytest.mark.slow
def test_thumbnails_come_of_the_same_decoding(source: Path, store: Path, tmp_path: Path) -> None:
    made: dict[str, NDArray[np.uint8]] = {}

    def keep(ref: ImageRef, thumbnail: NDArray[np.uint8]) -> None:
        made[ref.id] = thumbnail

    run(source, store, small=keep)
    run(source, tmp_path / "without.featx")
    assert content_hash(store) == content_hash(tmp_path / "without.featx")
    assert sorted(made) == read_features(store).ids.tolist()
    for name, thumbnail in made.items():
        assert np.array_equal(thumbnail, pixels((source / name).read_bytes(), THUMBNAIL.preprocess))
    made.clear()
    shutil.copy(source / name, source / "ants" / "copy.png")
    run(source, store, small=keep)
    run(source, tmp_path / "scaled.featx", small=keep, decode="scaled")
    assert not made


def test_batches_are_full_but_for_the_last(source: Path, store: Path) -> None:
    engine = TinyEngine(batch_size=4)
    run(source, store, engine=engine)
    assert engine.batches == [4, 4, 2]


def test_a_second_run_embeds_nothing_and_does_not_even_read(source: Path, store: Path) -> None:
    run(source, store)
    for path in source.rglob("*.png"):
        assert path.stat().st_mtime_ns < 2**62
    engine = TinyEngine()
    again = run(source, store, engine=engine)
    assert (again.embedded, again.reused) == (0, 10)
    assert engine.batches == []


def test_only_added_images_are_embedded(source: Path, store: Path) -> None:
    run(source, store)
    class_folders(source, names=("ants",), each=3, first=100)
    again = run(source, store)
    assert (again.images, again.embedded, again.reused) == (13, 3, 10)
    assert info(store)["classes"] == {"ants": 8, "bees": 5}


def test_renamed_and_relabelled_images_are_not_embedded_again(source: Path, store: Path) -> None:
    run(source, store)
    before = read_features(store)
    by_digest = {before.digests[i].tobytes(): before.embeddings[i] for i in range(len(before))}
    for number, path in enumerate(sorted(source.rglob("*.png"))):
        target = source / ("wasps" if number % 2 else path.parent.name) / f"new {number}.png"
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    again = run(source, store)
    assert (again.embedded, again.reused) == (0, 10)
    after = read_features(store)
    assert after.class_names == ("ants", "bees", "wasps")
    assert all("new" in name for name in after.ids)
    for i in range(len(after)):
        assert np.array_equal(after.embeddings[i], by_digest[after.digests[i].tobytes()])
        assert after.class_names[after.labels[i]] == str(after.ids[i]).split("/")[0]


def test_a_closed_folder_is_named_and_costs_nothing_else(
    source: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "bees" / "locked").mkdir()
    (source / "locked").mkdir()
    scandir = os.scandir

    def closed(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)  # root may read what is forbidden to others
    summary = run(source, store)
    assert (summary.images, summary.embedded, summary.quarantined) == (12, 10, 2)
    assert {(item.id, item.reason, item.message) for item in summary.refused} == {
        (name, "unreadable", "this folder cannot be read") for name in ("bees/locked/", "locked/")
    }
    assert read_features(store).class_names == ("ants", "bees")
    assert image_files(source)[-1] == source / "locked"
    shutil.move(source / "bees", source / "locked")
    with pytest.raises(SourceError, match="locked: no permission to read this folder"):
        ImageSet.from_folder(source)  # one class is left


def test_copies_are_embedded_once(source: Path, store: Path) -> None:
    first = sorted((source / "ants").iterdir())[0]
    shutil.copy(first, source / "bees" / "copy.png")
    summary = run(source, store)
    assert (summary.images, summary.embedded, summary.reused, summary.copies) == (11, 10, 1, 1)
    again = run(source, store)
    assert (again.reused, again.copies) == (11, 0)  # now the store has them
    features = read_features(store)
    one, other = (features.ids.tolist().index(name) for name in (f"ants/{first.name}", "bees/copy.png"))
    assert np.array_equal(features.embeddings[one], features.embeddings[other])
    assert features.labels[one] != features.labels[other]


def test_an_image_changed_in_place_is_embedded_again(source: Path, store: Path) -> None:
    run(source, store)
    changed = sorted(source.rglob("*.png"))[0]
    size = changed.stat().st_size
    picture(777).save(changed)
    assert run(source, store).embedded == 1
    # The same size and time, but different bytes, right after the last run: not to be trusted, so read again.
    data = bytearray(changed.read_bytes())
    assert size
    data[-20] ^= 1
    changed.write_bytes(bytes(data))
    assert run(source, store).quarantined == 1


def test_bad_images_are_refused_with_a_reason_and_the_good_ones_kept(source: Path, store: Path) -> None:
    expected = bad_images(source / "ants")
    summary = run(source, store)
    assert (summary.images, summary.embedded, summary.quarantined) == (18, 15, 3)
    refused = {item.id: item for item in refused_of(store)}
    assert {name: item.reason for name, item in refused.items()} == {f"ants/{k}": v for k, v in expected.items()}
    for name, item in refused.items():
        assert item.digest == hashlib.sha256((source / name).read_bytes()).hexdigest()
        assert item.message
    assert not set(refused) & set(read_features(store).ids.tolist())
    # Mended, they come in; the quarantine then is empty.
    for name in refused:
        picture(50 + len(name)).save(source / name, format="PNG")
    assert run(source, store).embedded == 3
    assert refused_of(store) == []


def test_missing_and_unreadable_files_of_a_manifest(source: Path, store: Path) -> None:
    manifest = source.parent / "list.csv"
    lines = [f"photos/{path.parent.name}/{path.name},{path.parent.name}" for path in sorted(source.rglob("*.png"))]
    manifest.write_text("\n".join(["path,label", *lines, "photos/lost.png,ants", "photos,ants"]) + "\n")
    summary = run(manifest, store)
    assert (summary.embedded, summary.quarantined) == (10, 2)
    assert {item.id: item.reason for item in summary.refused} == {"photos/lost.png": "missing", "photos": "unreadable"}


def test_more_bad_images_than_allowed(source: Path, store: Path) -> None:
    bad_images(source / "ants")
    with pytest.raises(TooManyBadImages, match=r"quarantine.jsonl.*at most 1 of 18, found 3.*--max-bad") as caught:
        run(source, store, max_bad=0.1)
    assert caught.value.exit_code == 4
    assert not (store / "index.h5").exists()
    assert len(refused_of(store)) == 3
    assert run(source, store, max_bad=0.5).reused == 15  # nothing was lost


def test_nothing_good_at_all_is_an_error(tmp_path: Path, store: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "x.jpg").write_text("no")
    with pytest.raises(TooManyBadImages, match="at least one good image, found none; 2 refused, such as"):
        run(tmp_path / "photos", store)


class Interrupting(TinyEngine):
    """Ctrl-C after a number of batches."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.left = batches

    def embed(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[tuple[NDArray[np.float32], ...]]:
        for outputs in super().embed(batches):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield outputs


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(source: Path, store: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=r"6 embeddings kept.*same command again") as caught:
        run(source, store, engine=Interrupting(2))
    assert caught.value.exit_code == 130
    again = run(source, store)
    assert (again.embedded, again.reused) == (4, 6)
    run(source, tmp_path / "other.featx")
    assert content_hash(store) == content_hash(tmp_path / "other.featx")


def test_other_settings_are_named(source: Path, store: Path) -> None:
    run(source, store)
    images = ImageSet.from_source(source)
    for changes, field in (
        ({"weights_sha256": "1" * 64}, "weights_sha256"),
        ({"layers": ("features.3",)}, "layers"),
        ({"preprocess": TINY.__class__(24, (20, 20), "bilinear", TINY.mean, TINY.std)}, "preprocess.crop"),
        ({"preprocess": TINY.__class__(24, (24, 24), "bicubic", TINY.mean, TINY.std)}, "preprocess.interpolation"),
    ):
        with pytest.raises(MismatchError, match=rf"another {field}: expected .*\(the store's\), found"):
            extract_features(images, tiny_backbone(**changes), store, engine=TinyEngine())
    assert verify(store) == []


def test_progress_counts_to_the_end(source: Path, store: Path) -> None:
    seen: list[tuple[int, int]] = []
    run(source, store, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 10)
    assert seen[-1] == (10, 10)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.slow
def test_another_source_takes_the_place_of_the_first_only_when_told(source: Path, store: Path, tmp_path: Path) -> None:
    run(source, store)
    before = content_hash(store)
    other = class_folders(tmp_path / "others", each=2, first=60)
    with pytest.raises(
        MismatchError, match=r"would replace other labelled images.* found 10 of 10 .*--replace"
    ) as error:
        run(other, store)
    assert error.value.expected == f"the images of {source}, for the most part"
    assert read_features(store).ids.tolist() == [ref.id for ref in ImageSet.from_folder(source).refs]
    assert content_hash(store) == before and verify(store) == []
    # Half of them, under other names, in other classes and from another place, are no other images.
    half = tmp_path / "half"
    for number, path in enumerate(sorted(source.rglob("*.png"))):
        copy = half / f"{number % 2}" / path.name if number < 5 else half / f"{number % 2}" / f"new{number}.png"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes()) if number < 5 else picture(900 + number).save(copy)
    assert run(half, store).embedded == 5
    run(source, store)
    flat = tmp_path / "flat"  # the same images, without their labels
    flat.mkdir()
    for number, path in enumerate(source.rglob("*.png")):
        shutil.copy(path, flat / f"{number}.png")
    with pytest.raises(MismatchError, match="10 of 10 labelled images missing, or without a label"):
        run(flat, store)
    summary = run(other, store, replace_images=True)
    assert summary.embedded == 0  # kept, when it was refused
    assert any("describes" in note for note in summary.notes)
    assert len(read_features(store)) == 4
    back = run(source, store, replace_images=True)
    assert back.embedded == 0  # all are kept ...
    assert run(source, store, prune=True).pruned == 9  # ... until they are pruned
    assert verify(store) == []


def test_a_class_that_is_gone_is_named(source: Path, store: Path) -> None:
    class_folders(source, names=("cats", "dogs"), each=2, first=40)
    run(source, store)
    shutil.rmtree(source / "cats")
    assert "not there any more: class cats" in run(source, store).notes
    assert not any("not there" in note for note in run(source, store).notes)


def test_classes_that_people_take_for_one_are_named(tmp_path: Path, store: Path) -> None:
    listed = tmp_path / "list.csv"
    source = class_folders(tmp_path / "photos", names=("a", "b", "c", "d", "e"), each=2)
    names = {"a": "Bees", "b": "bees", "c": "M\u00fccke", "d": "Mu\u0308cke", "e": "ants"}
    rows = [f"{file},{names[file.parent.name]}" for file in sorted(source.rglob("*.*"))]
    listed.write_text("\n".join(["path,label", *rows]) + "\n", encoding="utf-8")
    notes = [note for note in run(listed, store).notes if "differ only in letter case" in note]
    assert [note.split(" differ")[0] for note in notes] == [
        "the classes 'Bees' and 'bees'",
        "the classes 'Mu\u0308cke' and 'M\u00fccke'",
    ]


def test_an_id_that_would_widen_a_large_index_is_refused(
    tmp_path: Path, source: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [longest_id(n) for n in (0, 1, 16_384, 100_000, 10**7)] == [4096, 4096, 4096, 671, 512]
    deep = source / "ants" / "/".join(("d" * 200,) * 3)
    deep.mkdir(parents=True)
    picture(70).save(deep / "a.png")
    assert run(source, tmp_path / "small.featx").embedded == 11  # among few images it costs nothing
    monkeypatch.setattr(index, "_PADDED_IDS", 0)
    summary = run(source, store)
    assert (summary.embedded, summary.quarantined) == (10, 1)
    (refused,) = refused_of(store)
    assert (refused.reason, len(refused.id)) == ("bad_name", 613)
    assert refused.message == "the path has 613 bytes; at most 512 can be kept in a store of this size"
    assert verify(store) == []


def test_without_sched_getaffinity_as_on_macos(source: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    summary = extract_features(ImageSet.from_source(source), tiny_backbone(), store, engine=TinyEngine())
    assert summary.embedded == 10
