"""All photos in two dimensions: principal components at once, then t-SNE (van der Maaten and Hinton, 2008).

Both depend on the embeddings alone, so the map stays as it is while labels change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from featx._files import publish

LEAST = 5
"""Photos that a map needs."""

_DIMENSIONS = 50
"""Of the principal components that t-SNE starts from."""

_PERPLEXITY = 30.0


def maps(unit: NDArray[np.float32], kept: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Names and places (m, 2) in -1 .. 1 of maps of embeddings (m, d), the better one later.

    Parameters
    ----------
    kept : a file that the last one is kept in, for the next time.
    """
    key = hashlib.sha256(f"tsne {unit.shape}".encode() + unit.tobytes()).hexdigest()
    found = _read(kept, key, len(unit))
    if found is not None:
        yield "tsne", found
        return
    components = PCA(min(_DIMENSIONS, *unit.shape), random_state=0).fit_transform(unit)
    yield "pca", _scaled(components[:, :2])
    perplexity = min(_PERPLEXITY, (len(unit) - 1) / 3)
    places = _scaled(TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(components))

    def write(temp: Path) -> None:
        with temp.open("wb") as file:
            np.savez(file, key=np.array(key), places=places)

    publish(kept, write)
    yield "tsne", places


def _read(path: Path, key: str, n: int) -> NDArray[np.float32] | None:
    """What was kept of the same embeddings; a file that cannot be read is made anew."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            places = np.asarray(file["places"], np.float32)
            same = str(file["key"]) == key and places.shape == (n, 2) and bool(np.isfinite(places).all())
            return places if same else None
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def _scaled(places: NDArray[np.floating]) -> NDArray[np.float32]:
    """Places (m, 2) about the middle, the longer side -1 to 1."""
    middle = (places.max(axis=0) + places.min(axis=0)) / 2
    reach = float(np.abs(places - middle).max()) or 1.0
    return np.asarray((places - middle) / reach, dtype=np.float32)
