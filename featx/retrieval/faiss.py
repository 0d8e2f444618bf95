"""The approximate index for very large galleries: faiss's only door.

Rows of length 1 are rotated onto their leading principal axes, grouped into lists by k-means, and kept as codes of 2
bits an axis, which are compared in registers (Jégou, Douze and Schmid, 2011, "Product quantization for nearest neighbor
search"; André, Kermarrec and Le Scouarnec, 2015, "Cache locality is not enough"; Douze et al., 2024, "The faiss
library"). The best by these are compared by codes of 8 bits an axis, and the best of those are the candidates: what is
returned is ranked by the embeddings themselves (:mod:`featx.retrieval.neighbours`). How many lists are read is the
smallest number that reaches the recall asked for, as measured against the exact search on rows of the gallery itself.

faiss is optional, and imported when the first approximate index is made or opened.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from featx._files import sha256_file
from featx.errors import StoreError, UsageError

Rows: TypeAlias = NDArray[np.int64]
Take: TypeAlias = Callable[[Rows], NDArray[np.float32]]
"""Row numbers (m,) to embeddings of length 1, float32 (m, d)."""

MIN_ROWS = 1_000
"""Below this an index has nothing to save, and k-means too little to learn from."""

CODE_DIM = 256
"""Principal axes that candidates are compared on; 1,280-d embeddings keep nearly all their variance there."""

REFINED = 8
"""Rows that are compared by the finer codes, for each candidate."""

_BLOCK = 65_536
_TRAIN_PER_LIST = 64
_ALONE_BELOW = 50_000
"""Rows to learn from below which threads mostly wait for each other: on a busy machine, twenty times longer."""


def available() -> bool:
    """Whether faiss is installed."""
    return importlib.util.find_spec("faiss") is not None


def _faiss() -> Any:
    if not available():
        raise UsageError(
            "the approximate index needs faiss, which is not installed",
            hint="Install it (pip install 'featx[search]'), or search exactly.",
        )
    import faiss

    return faiss


def n_lists(rows: int) -> int:
    """Number of lists: the power of two next to 2 sqrt(rows), so that choosing lists costs what reading some does."""
    return int(2 ** max(4, round(math.log2(2 * math.sqrt(rows)))))


class ApproximateIndex:
    """Candidates for the nearest rows by cosine.

    Parameters
    ----------
    index : faiss's index over rows of length 1.
    probes : lists that a query reads.
    depth : candidates that are ranked exactly, for a ``k`` of ten.
    recall : share of the true ten nearest that were found when it was measured.
    trained_rows : how many rows there were when the lists were learnt.
    """

    def __init__(self, index: Any, *, probes: int, depth: int, recall: float, trained_rows: int) -> None:
        self._index = index
        self.depth, self.recall, self.trained_rows = depth, recall, trained_rows
        self.set_probes(probes)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def set_probes(self, probes: int) -> None:
        """Read so many lists a query; as many as there are at most."""
        lists = _lists(self._index)
        self.probes = min(probes, int(lists.nlist))
        lists.nprobe = self.probes

    @property
    def n_lists(self) -> int:
        """Lists that the index divides the rows into."""
        return int(_lists(self._index).nlist)

    @classmethod
    def train(cls, take: Take, rows: int, dim: int, *, random_state: int) -> ApproximateIndex:
        """Learn axes, lists and codes from a sample of the rows; none of them is added yet.

        Raises
        ------
        UsageError
            faiss is not installed, or there are fewer than ``MIN_ROWS`` rows.
        """
        faiss = _faiss()
        if rows < MIN_ROWS:
            raise UsageError(
                "too few images for an approximate index", expected=f"at least {MIN_ROWS:,}", found=f"{rows:,}"
            )
        if dim < 2:
            raise UsageError("too few features for an approximate index", expected="at least 2", found=dim)
        lists, code_dim = n_lists(rows), min(CODE_DIM, dim - dim % 2)
        # On rows of length 1 the order by distance is the order by cosine, and distances survive the centring of PCA.
        codes = faiss.index_factory(code_dim, f"IVF{lists},PQ{code_dim // 2}x4fs,Refine(SQ8)", faiss.METRIC_L2)
        codes.k_factor = REFINED
        index = faiss.IndexPreTransform(faiss.PCAMatrix(dim, code_dim), codes)
        clusters = _lists(index).cp
        clusters.seed, clusters.min_points_per_centroid = random_state, 1
        drawn = np.random.default_rng(random_state).permutation(rows)[: _TRAIN_PER_LIST * lists]
        threads = faiss.omp_get_max_threads()
        if len(drawn) < _ALONE_BELOW:
            faiss.omp_set_num_threads(1)
        try:
            index.train(take(np.sort(drawn)))
        finally:
            faiss.omp_set_num_threads(threads)
        return cls(index, probes=1, depth=0, recall=math.nan, trained_rows=rows)

    def add(self, take: Take, rows: Rows) -> None:
        """Add rows, which get the next numbers; nothing that is there is touched."""
        for start in range(0, len(rows), _BLOCK):
            self._index.add(take(rows[start : start + _BLOCK]))

    def candidates(self, queries: NDArray[np.float32], depth: int) -> Rows:
        """Numbers (q, depth) of likely neighbours of queries (q, d) of length 1; -1 where there are no more."""
        found: Rows = self._index.search(np.ascontiguousarray(queries), depth)[1]
        return found

    def save(self, path: Path) -> None:
        """Write it to a file."""
        try:
            _faiss().write_index(self._index, str(path))
        except RuntimeError as error:
            raise StoreError("cannot write the search index", where=path.parent, found=_first_line(error)) from error

    @classmethod
    def open(
        cls, path: Path, sha256: str, *, writable: bool, probes: int, depth: int, recall: float, trained_rows: int
    ) -> ApproximateIndex:
        """Open a saved index: lists are mapped from the file, unless it is to be ``writable``.

        Parameters
        ----------
        sha256 : what the file must be. faiss's reader trusts what it reads, so nothing else is ever given to it.

        Raises
        ------
        StoreError
            The file is missing, or another.
        """
        faiss = _faiss()
        try:
            if not path.is_file() or sha256_file(path) != sha256:
                raise StoreError("the search index is missing or was altered", where=path)
            index = faiss.read_index(str(path), 0 if writable else faiss.IO_FLAG_MMAP_IFC)
        except OSError as error:
            raise StoreError(f"cannot be read ({error.strerror})", where=path) from error
        except RuntimeError as error:
            raise StoreError("not an index of this faiss", where=path, found=_first_line(error)) from error
        faiss.downcast_index(index.index).k_factor = REFINED  # the file has it too, but as what its maker set
        return cls(index, probes=probes, depth=depth, recall=recall, trained_rows=trained_rows)


def _lists(index: Any) -> Any:
    """The inverted lists of an index made here."""
    faiss = _faiss()
    return faiss.downcast_index(faiss.downcast_index(index.index).base_index)


def faiss_version() -> str:
    """The version of faiss, for the record of a saved index."""
    return str(_faiss().__version__)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1][:200]
