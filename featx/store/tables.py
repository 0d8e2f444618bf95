"""A store's embeddings as one table for other programs: Parquet, CSV or npz, a block of rows at a time.

Every form has the same rows, one an image, in the order of the ids: ``id``, ``label`` (the class name; null or empty
where there is none), ``split``, ``digest`` (hex sha256 of the image file), ``group`` and ``meta/NAME`` where the store
has any, and the embedding. Memory holds the index and one block, however large the store is.

Parquet has the embedding as a fixed-size list of float32, which Arrow, DuckDB, Polars, LanceDB and pandas read, and
how it was made in the schema's metadata (``featx``). CSV has a column for each dimension, with the nine digits that
give every float32 back. An .npz has the arrays of :meth:`featx.store.reader.FeatureSet.to_numpy`.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featx._files import csv_line, publish
from featx.errors import UsageError, not_installed
from featx.store.manifest import fingerprint
from featx.store.reader import FeatureReader
from featx.store.tools import check_new

if TYPE_CHECKING:
    import pyarrow

FORMATS = ("parquet", "csv", "npz")
BLOCK_ROWS = 4096

Progress = Callable[[int, int], None]
Block = tuple[slice, NDArray[np.float32]]


def export_table(
    store: str | Path,
    out: str | Path,
    *,
    form: str | None = None,
    layer: str = "penultimate",
    progress: Progress | None = None,
) -> int:
    """Write the embeddings of one layer as a table that appears whole or not at all.

    Parameters
    ----------
    store : a store or a packed store.
    out : the file to make.
    form : of :data:`FORMATS`; by default what the file's suffix says.
    progress : called as ``progress(rows, all_rows)``.

    Returns
    -------
    The number of rows.

    Raises
    ------
    UsageError
        An unknown format or layer, or a package is missing.
    StoreError
        The store is damaged, or ``out`` exists.
    """
    out = Path(out)
    form = form or out.suffix.removeprefix(".").lower()
    if form not in FORMATS:
        raise UsageError(
            "no such format",
            where=out,
            expected=", ".join(FORMATS),
            found=form or "no suffix",
            hint="Name it with --format.",
        )
    check_new(out, Path(store))
    reader = FeatureReader(store)
    table = _Rows(reader, layer, progress)
    write = {"parquet": _parquet, "csv": _csv, "npz": _npz}[form]
    publish(out, lambda temp: write(table, temp))
    return len(reader.index)


class _Rows:
    """What is written, a block at a time."""

    def __init__(self, reader: FeatureReader, layer: str, progress: Progress | None) -> None:
        self.reader, self.layer, self._progress = reader, layer, progress
        self.index, self.rows = reader.index, len(reader.index)
        self.dims = reader.dims(layer)

    def blocks(self) -> Iterator[Block]:
        for rows, block in self.reader.stream(self.layer, BLOCK_ROWS):
            yield rows, block
            if self._progress is not None:
                self._progress(rows.stop, self.rows)

    def labels(self, rows: slice) -> list[str | None]:
        names = self.index.class_names
        return [names[label] if label >= 0 else None for label in self.index.labels[rows].tolist()]

    def digests(self, rows: slice) -> list[str]:
        return [row.tobytes().hex() for row in self.index.digests[rows]]

    @property
    def further(self) -> dict[str, Sequence[str]]:
        """Groups and metadata by the names of their columns."""
        groups = {"group": self.index.groups} if self.index.groups else {}
        return {**groups, **{f"meta/{name}": values for name, values in self.index.metadata.items()}}

    def told(self) -> str:
        provenance = dict(self.reader.backbones[self.reader.block(self.layer).backbone])
        made = {"layer": self.layer, "fingerprint": fingerprint(provenance), "provenance": provenance}
        return json.dumps({**made, "class_names": list(self.index.class_names)}, sort_keys=True)


def record_batches(store: str | Path, *, layer: str = "penultimate") -> pyarrow.RecordBatchReader:
    """The rows of the Parquet file as a stream of Arrow record batches, for databases that take one."""
    table = _Rows(FeatureReader(store), layer, None)
    columns = _schema(table)
    import pyarrow

    return pyarrow.RecordBatchReader.from_batches(columns, _batches(table, columns))


def _schema(table: _Rows) -> pyarrow.Schema:
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise not_installed("pyarrow", "parquet", "writing Parquet") from error
    text = pyarrow.string()
    return pyarrow.schema(
        [
            pyarrow.field("id", text, nullable=False),
            pyarrow.field("label", text),
            pyarrow.field("split", text, nullable=False),
            pyarrow.field("digest", text, nullable=False),
            *(pyarrow.field(name, text, nullable=False) for name in table.further),
            pyarrow.field("embedding", pyarrow.list_(pyarrow.float32(), table.dims), nullable=False),
        ],
        metadata={"featx": table.told()},
    )


def _batches(table: _Rows, columns: pyarrow.Schema) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow

    for rows, block in table.blocks():
        flat = pyarrow.array(np.ascontiguousarray(block).reshape(-1))
        about = [table.index.ids[rows], table.labels(rows), table.index.split[rows], table.digests(rows)]
        about += [values[rows] for values in table.further.values()]
        arrays = [pyarrow.array(list(values), pyarrow.string()) for values in about]
        arrays.append(pyarrow.FixedSizeListArray.from_arrays(flat, table.dims))
        yield pyarrow.RecordBatch.from_arrays(arrays, schema=columns)


def _parquet(table: _Rows, path: Path) -> None:
    columns = _schema(table)
    from pyarrow import parquet

    # Embeddings are noise to a compressor, and no value of theirs occurs twice.
    small = ["id", "label", "split", "digest", *table.further]
    compression = {**dict.fromkeys(small, "zstd"), "embedding.list.element": "none"}
    with parquet.ParquetWriter(
        path, columns, compression=compression, use_dictionary=["label", "split", *table.further]
    ) as writer:
        for batch in _batches(table, columns):
            writer.write_batch(batch)


def _csv(table: _Rows, path: Path) -> None:
    numbers = ",".join(["%.9g"] * table.dims)
    with path.open("w", newline="", encoding="utf-8") as file:
        embedding = (f"e{number}" for number in range(table.dims))
        file.write(csv_line(["id", "label", "split", "digest", *table.further, *embedding]))
        for rows, block in table.blocks():
            about = zip(
                table.index.ids[rows], table.labels(rows), table.index.split[rows], table.digests(rows),
                *(values[rows] for values in table.further.values()), strict=True,
            )  # fmt: skip
            for said, row in zip(about, block, strict=True):
                file.write(csv_line(said).removesuffix("\n") + "," + numbers % tuple(row.tolist()) + "\n")


def _npz(table: _Rows, path: Path) -> None:
    index = table.index
    small: dict[str, NDArray[Any]] = {
        "ids": np.array(index.ids, dtype=np.str_),
        "labels": index.labels,
        "class_names": np.array(index.class_names, dtype=np.str_),
        "splits": np.array(index.split, dtype=np.str_),
        "digests": index.digests,
        **({"groups": np.array(index.groups, dtype=np.str_)} if index.groups else {}),
        **{f"meta/{name}": np.array(values, dtype=np.str_) for name, values in index.metadata.items()},
        "featx": np.array(table.told()),
    }
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for name, array in small.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
        with archive.open("embeddings.npy", "w", force_zip64=True) as file:
            about = {"descr": "<f4", "fortran_order": False, "shape": (table.rows, table.dims)}
            np.lib.format.write_array_header_2_0(file, about)
            for _, block in table.blocks():
                file.write(np.ascontiguousarray(block, dtype="<f4").tobytes())
