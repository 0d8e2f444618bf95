"""Groups of images, from the source into the store, and through all that may happen to a store."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import TINY, TinyEngine, class_folders, picture, tiny_backbone
from storekit import extract_part

from featx.errors import StoreError, UsageError
from featx.extraction.parts import Part, finish_parts
from featx.extraction.run import ExtractSummary, extract_features
from featx.images.source import ImageSet
from featx.store import hdf5, index as store_index
from featx.store.reader import FeatureSet, read_features
from featx.store.tables import export_table
from featx.store.tools import content_hash, info, pack, verify

assert TINY


def extract(images: ImageSet, store: Path, **options: Any) -> ExtractSummary:
    return extract_features(images, tiny_backbone(), store, engine=TinyEngine(), workers=1, **options)


def groups_of(store: Path) -> dict[str, str]:
    features = read_features(store)
    return dict(zip(features.ids.tolist(), features.groups.tolist(), strict=True))


def dated_photos(root: Path, n: int = 8, first: int = 0) -> Path:
    """Photos in two classes, two taken in one second, a minute between two pairs; the last has no date."""
    for i in range(n):
        folder = root / ("ants", "bees")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        exif = picture(i).getexif()
        if i < n - 1:
            exif.get_ifd(0x8769)[0x9003] = f"2024:05:01 10:{(first + i) // 2:02d}:00"
        picture(first + i).save(folder / f"{first + i:03d}.jpg", exif=exif)
    return root


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    class_folders(tmp_path, each=6)
    lines = ["path,label,group,camera"]
    for i, path in enumerate(sorted(tmp_path.rglob("*.png"))):
        lines.append(f"{path.relative_to(tmp_path)},{path.parent.name},s{i % 4 or ''},{('N', 'C')[i % 2]}")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "list.csv"


def test_groups_and_metadata_are_in_the_store(listed: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.featx"
    summary = extract(ImageSet.from_source(listed), store)
    assert "4 groups by column:group" in summary.notes
    features = read_features(store)
    assert features.groups.tolist() == [f"s{i % 4 or ''}" for i in range(12)]
    assert features.metadata["camera"].tolist() == ["N", "C"] * 6
    assert features.group_name == "group"
    said = info(store)
    assert said["groups"] == {"s": 3, "s1": 3, "s2": 3, "s3": 3}
    assert (said["group_count"], said["group_by"], said["metadata"]) == (4, "column:group", ["camera"])
    assert verify(store) == []
    packed = pack(store, tmp_path / "s.h5")
    assert info(packed)["groups"] == said["groups"]
    assert read_features(packed).metadata["camera"].tolist() == ["N", "C"] * 6
    assert content_hash(packed) == content_hash(store)


def test_a_store_without_groups_has_no_further_columns(tmp_path: Path) -> None:
    store = tmp_path / "s.featx"
    extract(ImageSet.from_folder(class_folders(tmp_path / "photos")), store)
    with h5py.File(store / "index.h5") as file:
        assert set(file) == {"ids", "labels", "split", "digests", "class_names", "sizes", "mtimes_ns"}
        assert set(file.attrs) == {"fingerprint"}
    assert info(store)["groups"] == {}
    assert "group_by" not in info(store)
    features = read_features(store)
    assert features.groups.tolist() == [""] * len(features)
    assert "groups" not in features.to_numpy()


def test_regrouping_embeds_nothing_and_the_rule_is_kept(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "photos", each=4)
    store = tmp_path / "s.featx"
    extract(ImageSet.from_folder(source), store)
    images = ImageSet.from_folder(source)
    again = extract(images.grouped(r"regex:00(\d)", "camera"), store)
    assert (again.embedded, again.reused) == (0, 8)
    assert groups_of(store)["ants/003.png"] == "3"
    # Relabelled, renamed and with new photos, without saying the rule again.
    (source / "bees").rename(source / "wasps")
    picture(77).save(source / "ants" / "008.png")
    after = extract(ImageSet.from_folder(source), store)
    assert (after.embedded, after.reused) == (1, 8)
    assert groups_of(store) == {
        **{f"ants/00{i}.png": str(i) for i in (0, 1, 2, 3, 8)}, **{f"wasps/00{i}.png": str(i) for i in (4, 5, 6, 7)}
    }  # fmt: skip
    assert read_features(store).group_name == "camera"
    gone = extract(ImageSet.from_folder(source).grouped("none"), store)
    assert gone.embedded == 0
    assert set(groups_of(store).values()) == {""}


def test_groups_of_a_column_survive_a_list_that_has_none(listed: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.featx"
    extract(ImageSet.from_source(listed), store)
    before = groups_of(store)
    lines = [",".join(line.split(",")[:2]) for line in listed.read_text().splitlines()]
    picture(99).save(tmp_path / "new.png")
    listed.write_text("\n".join([*lines, "new.png,bees"]) + "\n")
    summary = extract(ImageSet.from_source(listed), store)
    assert groups_of(store) == {**before, "new.png": ""}
    kept = "groups by column:group, which this source does not have, were kept by content; 1 image without one"
    assert kept in summary.notes


@pytest.mark.parametrize("read_before", [False, True])
def test_dates_of_photos_that_are_not_read_again(read_before: bool, tmp_path: Path) -> None:
    """Unchanged files get their groups, whether or not the store has been told of dates before."""
    source, store = dated_photos(tmp_path / "photos"), tmp_path / "s.featx"
    images = ImageSet.from_folder(source)
    summary = extract(images.grouped("exif-day") if read_before else images, store)
    assert summary.embedded == 8
    again = extract(images.grouped("exif-burst:5"), store)
    assert (again.embedded, again.reused, again.copies) == (0, 8, 0)
    assert "4 groups by exif-burst:5; 1 image with no date in their EXIF count as one each" in again.notes
    assert [groups_of(store)[f"{name}.jpg"][11:16] for name in ("ants/000", "bees/001", "ants/002", "bees/007")] == [
        "10:00", "10:00", "10:01", "",
    ]  # fmt: skip
    more = dated_photos(source, 4, first=8)
    after = extract(ImageSet.from_folder(more), store)
    assert after.embedded == 4
    assert groups_of(store)["ants/008.jpg"].startswith("2024-05-01T10:04")


def test_parts_have_the_groups_of_the_whole(tmp_path: Path) -> None:
    source = dated_photos(tmp_path / "photos", 10)
    images = ImageSet.from_folder(source).grouped("exif-burst:90")
    extract(images, tmp_path / "whole.featx")
    store = tmp_path / "parts.featx"
    for number in (1, 2, 3):
        extract_part(images, tiny_backbone(), store, Part(number=number, of=3), engine=TinyEngine(), workers=1)
    finish_parts(ImageSet.from_folder(source), store)  # the rule is in the parts
    assert groups_of(store) == groups_of(tmp_path / "whole.featx")
    assert len(set(groups_of(store).values())) == 2  # one long chain across all parts, and the photo without a date
    assert content_hash(store) == content_hash(tmp_path / "whole.featx")
    assert info(store)["group_by"] == "exif-burst:90"


def test_parts_that_did_not_read_dates_are_not_put_together_by_them(tmp_path: Path) -> None:
    images = ImageSet.from_folder(dated_photos(tmp_path / "photos"))
    store = tmp_path / "parts.featx"
    extract_part(images, tiny_backbone(), store, Part(number=1, of=1), engine=TinyEngine(), workers=1)
    with pytest.raises(UsageError, match="the parts did not read when photos were taken"):
        finish_parts(images.grouped("exif-day"), store)


def test_tables_have_groups(listed: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.featx"
    extract(ImageSet.from_source(listed), store)
    export_table(store, tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().splitlines()[0].startswith("id,label,split,digest,group,meta/camera,e0,")
    export_table(store, tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz") as arrays:
        assert arrays["groups"].tolist() == read_features(store).groups.tolist()
        assert arrays["meta/camera"].tolist() == ["N", "C"] * 6
    parquet = pytest.importorskip("pyarrow.parquet")
    export_table(store, tmp_path / "t.parquet")
    table = parquet.read_table(tmp_path / "t.parquet")
    assert table.column_names == ["id", "label", "split", "digest", "group", "meta/camera", "embedding"]
    assert table["group"].to_pylist() == read_features(store).groups.tolist()
    pytest.importorskip("pandas")
    frame = read_features(store).to_pandas()
    assert frame["group"].tolist() == read_features(store).groups.tolist()


# --- files that somebody made ---------------------------------------------------------------------------------------


def altered(store: Path, change: Any) -> Path:
    """The store with another index, sealed anew: what a hostile hand would do."""
    path = store / "index.h5"
    raw = path.read_bytes()
    bare = store.parent / "bare.h5"
    bare.write_bytes(raw)
    with h5py.File(bare, "r+") as file:
        change(file)
    body = bare.read_bytes()
    import hashlib

    digest = hashlib.sha256(body[hdf5.USER_BLOCK :]).hexdigest().encode()
    path.write_bytes((b"featx sha256 " + digest + b"\n").ljust(hdf5.USER_BLOCK, b"\0") + body[hdf5.USER_BLOCK :])
    return store


def set_further(text: str) -> Any:
    def change(file: h5py.File) -> None:
        del file.attrs["further"]
        file.attrs.create("further", text.encode(), dtype=h5py.string_dtype("utf-8", len(text.encode()) or 1))

    return change


SAID = '{"group_name": "g", "grouped": %s, "grouping": "column:group", "metadata": %s}'


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "[" * 5000, SAID % ("1", "[]"), SAID % ("true", "{}"), SAID % ("true", "[1]"),
        SAID % ("true", '["camera", "camera"]'), SAID % ("true", '["nothing"]'),
        SAID % ("true", '["camera", "../ids"]'),
        SAID % ("false", '["camera"]'), SAID % ("true", "[]"), SAID % ("true", str([f"c{i}" for i in range(200)])),
    ],
)  # fmt: skip
def test_an_index_that_lies_about_its_columns_is_refused(text: str, listed: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.featx"
    extract(ImageSet.from_source(listed), store)
    with pytest.raises(StoreError):
        read_features(altered(store, set_further(text.replace("'", '"'))))


def test_columns_of_the_wrong_kind_are_refused(listed: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.featx"
    extract(ImageSet.from_source(listed), store)
    kept = tmp_path / "kept.featx"
    shutil.copytree(store, kept)

    def numbers(file: h5py.File) -> None:
        del file["group"]
        file["group"] = np.arange(12)

    def linked(file: h5py.File) -> None:
        del file["group"]
        file["group"] = h5py.ExternalLink("other.h5", "/x")

    def short(file: h5py.File) -> None:
        values = file["meta/camera"][:5]
        del file["meta/camera"]
        file["meta/camera"] = values

    for change in (numbers, linked, short):
        shutil.rmtree(store)
        shutil.copytree(kept, store)
        with pytest.raises(StoreError):
            read_features(altered(store, change))


def test_metadata_that_would_bloat_the_index_is_refused(
    listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_index, "MAX_FURTHER", 20)
    with pytest.raises(UsageError, match=r"groups and metadata take too much room: expected at most 20 bytes"):
        extract(ImageSet.from_source(listed), tmp_path / "s.featx")


def test_a_feature_set_by_hand_has_groups_that_fit() -> None:
    fields: dict[str, Any] = {
        "embeddings": np.zeros((2, 3), np.float32), "ids": np.array(["a", "b"]), "labels": np.zeros(2, np.int64),
        "class_names": ("x",), "splits": np.array(["", ""]), "digests": np.zeros((2, 32), np.uint8), "layer": "l",
        "provenance": {}, "fingerprint": "f",
    }  # fmt: skip
    assert FeatureSet(**fields).groups.tolist() == ["", ""]
    with pytest.raises(UsageError, match="groups and ids do not fit"):
        FeatureSet(**fields, groups=np.array(["x"]))
