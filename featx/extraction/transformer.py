"""Embeddings as a scikit-learn transformer: images in, rows of a matrix out, with a store as its cache.

cross_val_score(make_pipeline(FeatureExtractor(store="cache.featx"), LogisticRegression()), paths, labels)
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from joblib import effective_n_jobs
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin

from featx._files import sha256_json
from featx.backbones import DEFAULT_BACKBONE, NETWORKS, Backbone, Provider, load_backbone, make_engine, provenance_of
from featx.errors import ImageError, MismatchError, SourceError, StoreBusy, UsageError
from featx.extraction.embedder import Embedder, Seen
from featx.images import DecoderPool, as_rgb, decode_settings, is_image, parse_views
from featx.store import ShardReader, StoreWriter, check_same, read_manifest, steady, stored_backbones

_AT_A_TIME = 1024
"""Images that are embedded between two visits to the store: a crash costs no more."""

_OTHERS = ".networks"
"""Folder inside a store with the stores of other networks than the one that it was made with."""

_PATIENCE = 600.0
"""Seconds to wait for another writer of the store, such as another fold of a cross-validation."""


class ImageTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """What transformers of images have in common: they learn nothing, and take a list and no matrix."""

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.input_tags.two_d_array = False
        tags.input_tags.one_d_array = True
        tags.input_tags.string = True
        tags.transformer_tags.preserves_dtype = []
        return tags


class FeatureExtractor(ImageTransformer):
    """Embeddings of images by a frozen network.

    Nothing is learnt: ``fit`` only checks the parameters, and an image's embedding depends on no other image. The
    network is loaded at the first ``transform`` that needs it; copies, clones and pickles of the estimator go without.

    Parameters
    ----------
    backbone : a name of ``featx backbones``, ``timm:NAME``, or a :class:`~featx.backbones.provider.Provider` of your
    own.
    weights : "default", "none" (random, as a control), or a file.
    layer : "penultimate", or a name of the network's module tree; one that ``store`` has, if that exists.
    views : ways to see an image whose embeddings are averaged, such as "center,flip".
    store : folder of a store that serves as the cache, by the content of the images: made if there is none, and used
        and added to if ``featx extract`` made it. Where it was made with another network, layer or other views, a
        second store is kept inside it, below ``.networks``: a search over ``backbone`` may share one ``store``.
        Without one everything is computed every time.
    engine, device, precision, batch_size : see :func:`featx.make_engine`. A store decides the "auto" of precision.
    n_jobs : decoding processes, and threads of the network on a CPU; None is one (joblib's rule), -1 all cores.

    Examples
    --------
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> make_pipeline(FeatureExtractor(store="cache.featx"), LogisticRegression()).fit(paths, labels)  # doctest: +SKIP
    """

    def __init__(
        self,
        backbone: str | Provider = DEFAULT_BACKBONE,
        *,
        weights: str | Path = "default",
        layer: str = "penultimate",
        views: str = "center",
        store: str | Path | None = None,
        engine: str = "auto",
        device: str = "auto",
        precision: str = "auto",
        batch_size: int | None = None,
        n_jobs: int | None = None,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.layer = layer
        self.views = views
        self.store = store
        self.engine = engine
        self.device = device
        self.precision = precision
        self.batch_size = batch_size
        self.n_jobs = n_jobs

    def fit(self, X: Any, y: Any = None) -> FeatureExtractor:
        """Check the parameters; no image is looked at.

        Raises
        ------
        UsageError, WeightsError
            For an unknown backbone or view, or weights that are missing.
        """
        items_of(X)
        self._open()
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Embed images.

        Parameters
        ----------
        X : n images: paths (a list, an array, a pandas column), PIL images, or uint8 arrays (h, w) or (h, w, 3), which
            may be one array (n, h, w, 3).

        Returns
        -------
        float32 (n, embedding_dim).

        Raises
        ------
        SourceError
            An image is refused; it and the reason are named.
        UsageError
            X is nothing of the kind.
        """
        items = items_of(X)
        run = self._open()
        return run.embed_all(items) if run.cache is None else run.cached(items)

    def _open(self) -> _Run:
        if self.n_jobs == 0:
            raise UsageError("must not be 0", where="n_jobs")
        return _Run(self, None if self.store is None else Path(self.store))

    @property
    def _n_features_out(self) -> int:
        row = NETWORKS.get(self.backbone) if isinstance(self.backbone, str) else None
        if row is not None and self.layer == "penultimate":
            return row.embedding_dim
        black = np.zeros((8, 8, 3), np.uint8)
        return int(_Run(self, None).embed_all(items_of([black])).shape[1])


class _Run:
    """What one call needs: the backbone, and the store of embeddings that are known."""

    def __init__(self, given: FeatureExtractor, root: Path | None) -> None:
        self.given, self.root = given, root
        self.views = parse_views(given.views)
        self.backbone = self._load((given.layer,))
        self.cache: Path | None = None
        self.stored: dict[str, Any] = {}
        if root is not None:
            self._find_store(root)
        self.number = self.backbone.layers.index(given.layer)

    def _load(self, layers: tuple[str, ...]) -> Backbone:
        return load_backbone(self.given.backbone, weights=self.given.weights, layers=layers)

    def _find_store(self, root: Path) -> None:
        """The store ``root`` itself if it is new or of this network, else the one of this network inside it."""
        wanted = {**self.backbone.provenance(), "views": ",".join(self.views), "decode": decode_settings()}
        if self.given.precision != "auto":
            wanted["precision"] = self.given.precision
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", self.backbone.name)
        own = root / _OTHERS / f"{name}-{sha256_json(wanted)[:12]}"
        for self.cache in (root, own):
            held = stored_backbones(self.cache)
            if not held:
                return
            stored = dict(held.get(self.backbone.name, next(iter(held.values()))))
            layers = tuple(stored["layers"])
            same = {"layers": stored["layers"]} if self.given.layer in layers else {}
            try:
                check_same(stored, {**stored, **wanted, **same}, self.cache)
            except MismatchError:
                if self.cache == own:
                    raise
                continue
            self.stored = stored
            if layers != self.backbone.layers:
                self.backbone = self._load(layers)
            return

    def embed_all(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """Embeddings of all items, computed."""
        return np.concatenate([layers[self.number] for _, layers in self.embed(items)])

    def cached(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """Embeddings of all items, of which the store learns those that it does not have."""
        assert self.cache is not None
        digests = np.frombuffer(b"".join(item.digest() for item in items), np.uint8).reshape(-1, 32)
        known, rows = self._look_up(digests)
        if known is not None and not self.stored:
            # Since this run looked, another has made the store, perhaps with another network: its rows may be foreign.
            return _Run(self.given, self.root).cached(items)
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            first = np.unique(digests[missing], axis=0, return_index=True)[1]
            try:
                self._learn([items[row] for row in missing[np.sort(first)].tolist()])
            except MismatchError:
                if self.stored:
                    raise
                # Since this run looked, another candidate of a search has made the store, with its own network.
                return _Run(self.given, self.root).cached(items)
            known, rows = self._look_up(digests)
        if (rows < 0).any():
            item = items[int(np.flatnonzero(rows < 0)[0])]
            raise SourceError("changed while it was read", where=item.name, hint="Run it again.")
        assert known is not None
        return known.read(rows, layer=self.given.layer)

    def _look_up(self, digests: NDArray[np.uint8]) -> tuple[ShardReader | None, NDArray[np.int64]]:
        cache = self.cache
        assert cache is not None
        if self.backbone.name not in stored_backbones(cache):
            return None, np.full(len(digests), -1, np.int64)
        reader = steady(cache, lambda: ShardReader(cache, read_manifest(cache), self.backbone.name))
        return reader, reader.find(digests)

    def _learn(self, items: Sequence[Item]) -> None:
        assert self.cache is not None
        provenance = provenance_of(self.backbone, self.embedder.engine, views=self.views)
        for digests, layers in self.embed(items):
            with _writer(self.cache, provenance) as writer:
                # Of two files with one content, which they may have got since they were hashed, one.
                name = self.backbone.name
                once = {digest: row for row, digest in enumerate(digests) if name in writer.lacks(digest)}
                if once:
                    rows = list(once.values())
                    writer.add(list(once), {name: [layer[rows] for layer in layers]})
                    writer.flush()

    @property
    def embedder(self) -> Embedder:
        """The network on its engine; the last one is kept, for the next fold."""
        given = self.given
        precision = str(self.stored.get("precision", given.precision)) if given.precision == "auto" else given.precision
        threads = effective_n_jobs(given.n_jobs)
        return _embedder(self.backbone, given.engine, given.device, precision, given.batch_size, threads, self.views)

    def embed(self, items: Sequence[Item]) -> Iterator[tuple[list[bytes], tuple[NDArray[np.float32], ...]]]:
        """Digests and embeddings, one array (m, d) a layer, of so many items at a time."""
        embedder = self.embedder
        size = embedder.engine.batch_size
        for start in range(0, len(items), _AT_A_TIME):
            digests: list[bytes] = []
            layers: list[tuple[NDArray[np.float32], ...]] = []
            pixels: list[Seen] = []
            part = items[start : start + _AT_A_TIME]
            for digest, image in pixels_of(
                part,
                lambda workers: embedder.decoders(workers=workers),
                embedder.looks.cut,
                jobs=effective_n_jobs(self.given.n_jobs),
                ahead=2 * size,
            ):
                digests.append(digest)
                pixels.append((image,))
                if len(pixels) == size or len(digests) == len(part):
                    layers.append(embedder.embed_pixels(pixels))
                    pixels = []
            yield digests, tuple(np.concatenate(each) for each in zip(*layers, strict=True))


@functools.lru_cache(maxsize=1)
def _embedder(
    backbone: Backbone,
    engine: str,
    device: str,
    precision: str,
    batch_size: int | None,
    threads: int,
    views: tuple[str, ...],
) -> Embedder:
    chosen = make_engine(
        backbone, engine=engine, device=device, precision=precision, batch_size=batch_size, threads=threads
    )
    return Embedder(backbone, chosen, views=views)


class Item:
    """One image: a file, or pixels."""

    def __init__(self, value: Any, place: int) -> None:
        self.path = Path(value) if isinstance(value, str | os.PathLike) else None
        self.name = str(self.path or f"X[{place}]")
        self.image = None if self.path is not None else _rgb(value, self.name)

    def digest(self) -> bytes:
        """Of the content: the file's bytes, or size and values of the pixels."""
        if self.path is None:
            assert self.image is not None
            return hashlib.sha256(b"pixels %d %d " % self.image.size + self.image.tobytes()).digest()
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise SourceError(f"cannot be read ({error.strerror})", where=self.name) from error


def items_of(X: Any) -> list[Item]:
    """The images of ``X``; pixels are checked here, files when they are read."""
    if isinstance(X, str | bytes | os.PathLike) or is_image(X):
        raise UsageError("one image, where a list of them is expected", where="X", hint="Write [X].")
    if isinstance(X, np.ndarray) or hasattr(X, "to_numpy"):
        X = np.asarray(X)
        if X.ndim == 2 and X.shape[1] == 1 and X.dtype.kind in "OUT":
            X = X[:, 0]  # a table of one column, as ColumnTransformer gives it
        if X.ndim == 3 and X.shape[2] == 3:
            raise UsageError("one image, where a list of them is expected", where="X", hint="Write [X].")
        if X.ndim not in (1, 3, 4) or (X.ndim == 1 and X.dtype.kind not in "OUT"):
            raise UsageError(
                "no images",
                where="X",
                expected="paths, PIL images, or uint8 pixels (n, h, w, 3)",
                found=f"an array {X.dtype} {X.shape}",
            )
    elif not isinstance(X, Sequence):
        raise UsageError("no images", where="X", expected="a list of paths or images", found=type(X).__name__)
    if not len(X):
        raise UsageError("no images", where="X", expected="one or more", found=0)
    return [Item(value, place) for place, value in enumerate(X)]


def _rgb(value: Any, name: str) -> Any:
    try:
        return as_rgb(value)
    except ImageError as error:
        raise SourceError(f"refused ({error.reason}: {error.what})", where=name) from error
    except TypeError as error:
        raise UsageError(
            "no image",
            where=name,
            expected="a path, a PIL image, or uint8 pixels (h, w) or (h, w, 3)",
            found=str(error),
        ) from error


def pixels_of(
    items: Sequence[Item],
    open_decoders: Callable[[int], DecoderPool],
    cut: Callable[[Any], NDArray[np.uint8]],
    *,
    jobs: int,
    ahead: int,
) -> Iterator[tuple[bytes, NDArray[np.uint8]]]:
    """Digest and pixels of each item; files are decoded in processes of their own.

    Parameters
    ----------
    open_decoders : starts so many decoding processes.
    cut : what they do, for an RGB image that is in memory.
    jobs : decoding processes.
    ahead : images that are decoded ahead of the one that is wanted.

    Raises
    ------
    SourceError
        An image is refused.
    """
    files = [item.path for item in items if item.path is not None]
    with contextlib.ExitStack() as stack:
        if files:
            workers = min(jobs, len(files))
            pool = stack.enter_context(open_decoders(workers))
            decoded = pool.run(files, lambda digest: False, ahead=ahead + workers)
        for item in items:
            if item.image is not None:
                yield item.digest(), cut(item.image)
                continue
            result = next(decoded)
            if result.refusal is not None:
                raise SourceError(f"refused ({result.refusal.reason}: {result.refusal.what})", where=item.name)
            assert result.digest is not None and result.pixels is not None
            yield result.digest, result.pixels


@contextlib.contextmanager
def _writer(store: Path, provenance: dict[str, Any]) -> Iterator[StoreWriter]:
    """The one writer of the store, when it is this one's turn: other folds of a cross-validation write, too."""
    end = time.monotonic() + _PATIENCE
    with contextlib.ExitStack() as stack:
        while True:
            try:
                writer = stack.enter_context(StoreWriter(store, provenance))
                break
            except StoreBusy:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
        yield writer
