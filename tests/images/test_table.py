"""Images in Parquet and Arrow files, written by pyarrow and by ``datasets`` itself."""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
from conftest import TINY, Featx, TinyEngine, picture, tiny_backbone
from imagekit import pixels, png

from featx.errors import FeatxError, ImageError, SourceError, UsageError
from featx.extraction.run import extract_features
from featx.images import table as sources_table
from featx.images.origin import Unreadable
from featx.images.source import ImageSet, finder
from featx.images.table import Row, _reader
from featx.images.table_reader import Table
from featx.images.thumbnails import Originals
from featx.store.reader import read_features

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["ants", "bees"], "_type": "ClassLabel"}}


def rows(first: int, count: int) -> dict[str, Any]:
    numbers = range(first, first + count)
    return {
        "image": pa.array([{"bytes": png(n), "path": f"{n}.png"} for n in numbers], IMAGE),
        "label": pa.array([n % 2 for n in numbers], pa.int64()),
    }


def write(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = FEATURES, **options: Any) -> Path:
    """A Parquet file in the layout of the Hugging Face hub."""
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def named(images: ImageSet) -> dict[str, tuple[str | None, str]]:
    return {ref.id: (ref.label, ref.split) for ref in images.refs}


def test_rows_are_embedded_like_files(tmp_path: Path) -> None:
    write(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", rows(0, 7), row_group_size=3)
    write(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", rows(7, 2))
    (tmp_path / "hub" / "README.md").write_text("x")
    images = ImageSet.from_source(tmp_path / "hub")
    assert named(images) == {
        **{f"data/train-00000-of-00001.parquet/{n:06d}": (("ants", "bees")[n % 2], "train") for n in range(7)},
        **{f"data/test-00000-of-00001.parquet/{n:06d}": (("bees", "ants")[n % 2], "test") for n in range(2)},
    }
    store = tmp_path / "s.featx"
    summary = extract_features(images, tiny_backbone(), store, engine=TinyEngine(), workers=2)
    assert (summary.embedded, summary.quarantined) == (9, 0)
    features = read_features(store)
    find = finder(images.source)
    for row, name in enumerate(features.ids.tolist()):
        data = png(int(name[-6:]) + (7 if "test-" in name else 0))
        (wanted,) = next(iter(TinyEngine().embed([pixels(data, TINY)[None]])))
        assert np.array_equal(features.embeddings[row], wanted[0])
        assert find(name).read_bytes() == data
    again = extract_features(ImageSet.from_source(tmp_path / "hub"), tiny_backbone(), store, engine=TinyEngine())
    assert (again.embedded, again.reused) == (0, 9)


@pytest.mark.parametrize("order", [range(50), range(49, -1, -1), [3, 40, 4, 41, 5, 42, 49, 0]])
def test_any_order_gives_the_right_row(order: list[int], tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": [b"%d" % n for n in range(50)]}, None, row_group_size=20)
    table = Table(path)
    assert [table.image(row) for row in order] == [b"%d" % row for row in order]


@pytest.mark.slow
def test_one_row_group_larger_than_memory_is_streamed(tmp_path: Path) -> None:
    """240 MB in one row group, read within a fraction of that; so does the file that pandas writes by default."""
    random = np.random.default_rng(0)
    schema = pa.schema([("image", pa.binary())])
    batches = [pa.record_batch([[random.bytes(2**20) for _ in range(10)]], schema=schema) for _ in range(24)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_batches(batches), path, row_group_size=10_000, compression="none")
    del batches
    _reader(path).end()
    refs = ImageSet.from_source(path).refs
    reader = psutil.Process(_reader(path)._process.pid)
    before, most = reader.memory_info().rss, 0
    tracemalloc.start()
    for ref in refs:
        assert len(ref.path.read_bytes()) == 2**20
        most = max(most, reader.memory_info().rss - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 160 * 2**20 and peak < 20 * 2**20


def test_a_plain_column_of_bytes_and_labels_of_text(tmp_path: Path) -> None:
    columns = {"jpg": [png(0), png(1), png(2)], "label": ["ants", "bees", None], "caption": ["x", "y", "z"]}
    images = ImageSet.from_source(write(tmp_path / "a.parquet", columns, None))
    assert [ref.label for ref in images.refs] == ["ants", "bees", None]
    assert [ref.split for ref in images.refs] == ["", "", ""]
    categories = {"image": [png(0), png(1)], "label": pa.array(["b", "a"]).dictionary_encode()}
    assert ImageSet.from_source(write(tmp_path / "b.parquet", categories, None)).class_names == ("a", "b")


def test_rows_without_an_image_are_quarantined(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(50))
    pictures = [
        {"bytes": png(0), "path": None},
        {"bytes": None, "path": str(secret)},
        None,
        {"bytes": b"no", "path": "x"},
        {"bytes": png(1), "path": ""},
    ]
    path = write(tmp_path / "t" / "a.parquet", {"image": pa.array(pictures, IMAGE), "label": [0, 0, 1, 1, 1]})
    summary = extract_features(
        ImageSet.from_source(path), tiny_backbone(), tmp_path / "s.featx", engine=TinyEngine(), workers=1
    )
    assert summary.embedded == 2
    assert [(item.id, item.reason) for item in summary.refused] == [
        ("a.parquet/000001", "empty"),
        ("a.parquet/000002", "empty"),
        ("a.parquet/000003", "not_an_image"),
    ]


def test_a_file_damaged_behind_its_footer_costs_rows_not_the_run(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", rows(0, 8), row_group_size=4, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[start : start + 200] = b"\xff" * 200
    path.write_bytes(bytes(data))
    images = ImageSet.from_source(path)
    summary = extract_features(images, tiny_backbone(), tmp_path / "s.featx", engine=TinyEngine(), workers=2)
    assert summary.embedded == 4
    assert {item.reason for item in summary.refused} == {"corrupt"}


BYTES = [b"x", b"y"]


@pytest.mark.parametrize(
    ("columns", "features", "words"),
    [
        ({"label": [0, 1]}, None, r"no column with images: expected one column of bytes.*found label \(int64\)"),
        ({"a": BYTES, "b": BYTES}, None, r"more than one column with images.*found a \(binary\), b \(binary\)"),
        ({"image": BYTES, "label": [0.5, 1.5]}, None, r"row 0, column label: a label that is neither text nor a whole"),
        (
            {"image": BYTES, "label": [[0], [1]]},
            None,
            r"a label that is neither text nor a whole number: found \[0\]",
        ),
        ({"image": BYTES, "label": [0, 2]}, FEATURES, r"row 1, column label: a class number without a name: found 2"),
        (
            {"image": BYTES, "fine": [0, 1], "coarse": [0, 1]},
            dict.fromkeys(("fine", "coarse"), FEATURES["label"]),
            r"more than one column of classes.*found fine, coarse\. Rename the one that you mean to label",
        ),
        ({"image": BYTES, "label": [0, 0]}, FEATURES, r"only one class in these tables"),
        ({"image": pa.array([], pa.binary())}, None, r"no images in these tables"),
        ({"image": BYTES, "label": [0, 1]}, {"label": {"names": [1, 2]}}, r"metadata that datasets would not write"),
    ],
)
def test_tables_that_are_refused(
    columns: dict[str, Any], features: dict[str, Any] | None, words: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=words):
        ImageSet.from_source(write(tmp_path / "a.parquet", columns, features))


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + b"\xff" * 100 + b"PAR1", b"\x89PNG"])
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_files_that_are_no_tables(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError, match=rf"{name}: not a table that pyarrow reads"):
        ImageSet.from_source(tmp_path / name)


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", rows(0, 2))
    ids = ["a.parquet/000001", "a.parquet/000002", "a.parquet/-1", "a.parquet/x", "b.parquet/000000"]
    with Originals(str(tmp_path), ids, np.zeros((5, 32), np.uint8)) as originals:
        assert [originals.thumbnail(row) for row in range(5)] == [None] * 5
    assert isinstance(ImageSet.from_source(path).refs[0].path, Row)
    assert Unreadable("x") != Unreadable("y")


def test_what_datasets_writes(tmp_path: Path) -> None:
    """Parquet by ``to_parquet`` and Arrow by ``save_to_disk``, each against the library's own reading."""
    datasets = pytest.importorskip("datasets")
    labels = [0, 1, 1, 0, -1]
    features = datasets.Features({"label": datasets.ClassLabel(names=["ants", "bees"]), "image": datasets.Image()})
    made = datasets.Dataset.from_dict({"label": labels, "image": [picture(n) for n in range(5)]}, features=features)
    both = datasets.DatasetDict({"train": made.select([0, 1, 2, 3]), "test": made.select([4, 2])})
    both.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "made.parquet")

    saved = ImageSet.from_source(tmp_path / "saved")
    assert [ref.label for ref in saved.refs if ref.split == "train"] == ["ants", "bees", "bees", "ants"]
    assert [ref.label for ref in saved.refs if ref.split == "test"] == [None, "bees"]
    table = ImageSet.from_source(tmp_path / "made.parquet")
    raw = made.cast_column("image", datasets.Image(decode=False))
    assert [ref.path.read_bytes() for ref in table.refs] == [row["image"]["bytes"] for row in raw]
    assert [ref.label for ref in table.refs] == ["ants", "bees", "bees", "ants", None]
    summary = extract_features(saved, tiny_backbone(), tmp_path / "s.featx", engine=TinyEngine(), workers=1)
    assert (summary.embedded, summary.reused) == (5, 1)
    summary = extract_features(table, tiny_backbone(), tmp_path / "s.featx", engine=TinyEngine(), workers=1)
    assert (summary.embedded, summary.reused) == (0, 5)  # the same content in another container


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", rows(0, 2))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"needs pyarrow, which is not installed.*pip install 'featx\[parquet\]'"):
        ImageSet.from_source(path)


# --- hostile files ------------------------------------------------------------------------------------------------


def arrow(path: Path, count: int, file: bool) -> Path:
    """A small Arrow stream or file with labels of text in two batches."""
    table = pa.table({**rows(0, count), "label": pa.array(["ants", "bees"] * (count // 2)).dictionary_encode()})
    make = pa.ipc.new_file if file else pa.ipc.new_stream
    with make(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=count // 2)
    return path


@pytest.mark.parametrize("kind", ["plain.parquet", "packed.parquet", "stream.arrow", "file.arrow"])
def test_no_damaged_table_ends_this_process(kind: str, tmp_path: Path) -> None:
    """Each flip gives images, refused images, or one sentence that names the file."""
    path = tmp_path / kind
    if path.suffix == ".arrow":
        arrow(path, 4, kind == "file.arrow")
    else:
        options: dict[str, Any] = {"compression": "none", "use_dictionary": False} if kind == "plain.parquet" else {}
        write(path, rows(0, 4), row_group_size=2, **options)
    sound = path.read_bytes()
    random = np.random.default_rng(3)  # both Arrow files so made ended the process of featx 0.1.0
    # What describes the data is at the end of Parquet files and before that of Arrow's: that is where the harm is.
    likely = range(len(sound)) if path.suffix == ".arrow" else range(len(sound) - 1500, len(sound))
    ends = {"images": 0, "refused": 0, "sentence": 0}
    for _ in range(100):
        data = bytearray(sound)
        for at in random.choice(likely, random.integers(1, 4), replace=False).tolist():
            data[at] ^= 1 << int(random.integers(8))
        path.write_bytes(bytes(data))
        try:
            for ref in ImageSet.from_source(path).refs[:20]:
                try:
                    ref.path.read_bytes()
                except ImageError:
                    ends["refused"] += 1
                else:
                    ends["images"] += 1
        except FeatxError as error:
            assert kind in str(error) and len(str(error).splitlines()) == 1
            ends["sentence"] += 1
    print(ends)
    assert ends["images"] and ends["sentence"]
    path.write_bytes(sound)
    assert ImageSet.from_source(path).refs[3].path.read_bytes() == png(3)


def test_a_table_that_kills_its_reader_is_named(tmp_path: Path, featx: Featx) -> None:
    """A pyarrow that crashes on every file stands for what damaged ones do to it."""
    path = arrow(tmp_path / "a.arrow", 4, file=True)
    fake = tmp_path / "site" / "pyarrow"
    fake.mkdir(parents=True)
    (fake / "ipc.py").touch()
    (fake / "__init__.py").write_text(
        "import os, signal\n"
        "set_cpu_count = set_io_thread_count = lambda count: None\n"
        "supported_memory_backends = list\n"
        "class ArrowException(Exception): pass\n"
        "def memory_map(path): os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    ran = featx("extract", path, "--out", tmp_path / "s.featx", env={"PYTHONPATH": str(fake.parent)})
    assert ran.code == 2
    assert ran.err.strip().splitlines()[-1] == (
        f"Error: {path}: reading it took the process down (SIGSEGV), 2 times. "
        "The file may be damaged: fetch it again, or make it anew."
    )


def test_a_reader_that_is_killed_between_rows_is_started_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", rows(0, 4))
    refs = ImageSet.from_source(path).refs
    for number, ref in enumerate(refs):
        os.kill(_reader(path)._process.pid, signal.SIGKILL)
        assert ref.path.read_bytes() == png(number)


def test_a_reader_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", rows(0, 4))
    ref = ImageSet.from_source(path).refs[0]
    monkeypatch.setattr(sources_table, "_PATIENCE", 0.1)
    os.kill(_reader(path)._process.pid, signal.SIGSTOP)
    with pytest.raises(
        SourceError, match=r"a\.parquet: reading it did not end within 0\.1 s\. The file may be damaged"
    ):
        ref.path.read_bytes()
    monkeypatch.undo()
    assert ref.path.read_bytes() == png(0)


# --- groups -------------------------------------------------------------------------------------------------------

SITES = ["north", "south", None, "north"]


def with_sites(path: Path, first: int, **columns: Any) -> Path:
    found = {**rows(first, 4), "Site": SITES, "visit": [1, 2, 3, 2], **columns}
    if path.suffix == ".parquet":
        return write(path, found, row_group_size=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(found).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": FEATURES}})})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_rows_are_grouped_by_a_column(tmp_path: Path, suffix: str) -> None:
    for number in range(2):
        with_sites(tmp_path / f"{number}{suffix}", 4 * number)
    images = ImageSet.from_source(tmp_path)
    assert images.columns == ()
    assert images.has_column("SITE") and images.has_column("visit") and not images.has_column("label")
    grouped = images.grouped("column:site")
    assert [ref.group for ref in grouped.refs] == ["north", "south", "", "north"] * 2
    assert (grouped.columns, grouped.refs[1].metadata) == (("Site",), (("Site", "south"),))
    assert [ref.id for ref in grouped.refs] == [ref.id for ref in images.refs]
    assert [ref.group for ref in images.grouped("column:visit").refs] == ["1", "2", "3", "2"] * 2
    with pytest.raises(FeatxError, match=r"no column 'sites' to group by.*Site, visit. Did you mean Site or visit\?"):
        images.grouped("column:sites")


def test_values_of_other_kinds(tmp_path: Path) -> None:
    day = datetime.date(2026, 5, 1)
    columns = {
        "day": [day, None, day, day], "coded": pa.array(["a", "b", "a", None]).dictionary_encode(),
        "long": ["x" * 201, "y", "z", "z"], "list": [[1], [2], [3], [4]],
    }  # fmt: skip
    images = ImageSet.from_source(with_sites(tmp_path / "a.parquet", 0, **columns))
    assert [ref.group for ref in images.grouped("column:day").refs] == ["2026-05-01", "", "2026-05-01", "2026-05-01"]
    assert [ref.group for ref in images.grouped("column:coded").refs] == ["a", "b", "a", ""]
    for name in ("long", "list"):
        with pytest.raises(
            FeatxError, match=f"a.parquet, row 0, column {name}: a value that is not a short text, a number or a date"
        ):
            images.grouped(f"column:{name}")


def test_classes_group_by_their_names_and_tables_without_the_column_are_named(tmp_path: Path) -> None:
    features = {**FEATURES, "camera": {"names": ["left", "right"], "_type": "Value"}}
    write(tmp_path / "a.parquet", {**rows(0, 2), "camera": [1, 0]}, features)
    images = ImageSet.from_source(tmp_path)
    assert [ref.group for ref in images.grouped("column:camera").refs] == ["right", "left"]
    write(tmp_path / "b.parquet", rows(2, 2))
    both = ImageSet.from_source(tmp_path)
    assert not both.has_column("camera")
    with pytest.raises(FeatxError, match="no column 'camera' to group by"):
        both.grouped("column:camera")


@pytest.mark.slow
def test_a_store_of_tables_keeps_its_groups(tmp_path: Path, featx: Featx) -> None:
    source, store = tmp_path / "t", tmp_path / "s.featx"
    with_sites(source / "a.parquet", 0)
    made = ("extract", source, "--out", store, "--json")
    assert featx(*made, "--group-by", "column:site", "--weights", "none").code == 0
    told = featx("info", store, "--json").json
    assert (told["group_count"], told["group_by"], told["metadata"]) == (2, "column:site", ["Site"])
    with_sites(source / "b.parquet", 4)
    ran = featx(*made, "--weights", "none")
    assert (ran.code, ran.json["embedded"]) == (0, 4), ran.err
    features = read_features(store)
    assert features.metadata["Site"].tolist() == ["north", "south", "", "north"] * 2
    assert len(set(features.groups[[0, 3, 4, 7]])) == 1
    assert featx("info", store, "--json").json["group_count"] == 2
