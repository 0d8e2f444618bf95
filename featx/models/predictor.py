"""A kept head together with the network that its embeddings come from: images in, answers out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featx._files import canonical_json
from featx.backbones import Provider, layer_place, of_layer
from featx.errors import ImageError, MismatchError, SourceError, UsageError
from featx.extraction import Embedder
from featx.images import IMAGE_SUFFIXES, Origin, walk_folder
from featx.models.bundle import Answer, Bundle
from featx.store import fingerprint, layers_of

if TYPE_CHECKING:
    from featx.models.export import Pickled


def open_embedder(
    bundle: Bundle,
    path: Path,
    *,
    backbone: str | Provider | None = None,
    weights: Path | None = None,
    device: str = "auto",
    engine: str = "auto",
    batch_sizes: Mapping[str, int] | None = None,
    opened: MutableMapping[str, Embedder] | None = None,
) -> Embedder:
    """The network that a bundle's embeddings come from, proved on its probe image.

    Parameters
    ----------
    bundle, path : the model, and where it is from, for messages.
    backbone : the network, where the bundle names one of the user's own.
    weights : the weights file, where the bundle names one of the user's own.
    device, engine : as of :func:`featx.backbones.engines.choice.make_engine`.
    batch_sizes : images per batch by device ("cpu", "cuda"); by default what suits many images at once.
    opened : networks that were opened before, with the same options. One that is there is taken, and one that is not
        is added: models that were fitted on the same features share it.

    Raises
    ------
    MismatchError
        What is installed here makes other embeddings.
    WeightsError
        The weights are a file of the user's that has to be given.
    """
    opened = {} if opened is None else opened
    key = _network_key(bundle)
    embedder = opened.get(key) or Embedder.like(
        bundle.provenance,
        where=path,
        backbone=backbone,
        weights=weights,
        tail=bundle.tail,
        networks=bundle.networks,
        graphs=bundle.graphs,
        device=device,
        engine=engine,
        batch_size=batch_sizes,
    )
    found = of_layer(embedder.embed_bytes(bundle.probe), layer_number(bundle))[0].astype(np.float64)
    expected = bundle.probe_embedding.astype(np.float64)
    wanted = 0.9999 if bundle.provenance.get("precision") == "fp32" else 0.999  # what engines promise of each other
    length = float(np.linalg.norm(found) * np.linalg.norm(expected))
    cosine = float(found @ expected) / length if length else 0.0
    gap = float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-12))
    if not cosine >= wanted or gap > 0.1:
        raise MismatchError(
            "the network here does not see the model's probe image as the one it was made with",
            where=path,
            expected=f"a cosine of at least {wanted}",
            found=f"{cosine:.6f}",
            hint="Another version of a library may be the reason; the model keeps those it was made with.",
        )
    opened[key] = embedder
    return embedder


def _network_key(bundle: Bundle) -> str:
    """Says which network a bundle needs: two of the same key give the same embeddings of all layers."""
    trained = hashlib.sha256(bundle.tail or b"").hexdigest()
    return canonical_json(
        {"fingerprint": fingerprint(bundle.provenance), "tail": trained, "graphs": dict(bundle.graphs)}
    ).hex()


def layer_number(bundle: Bundle) -> int | None:
    """Which of the embedder's layers the head is on; None for all of them, combined."""
    return layer_place(bundle.layer, layers_of(bundle.provenance))


def predict_files(
    model: Bundle | Pickled,
    embedder: Embedder,
    layer: int | None,
    paths: Iterable[Origin],
    *,
    coverage: float | None = None,
) -> Iterator[Answer | ImageError]:
    """The answer about each file (with its set of labels, for a ``coverage``), or why it was refused, in order."""
    for _, found in embedder.embed_files(paths):
        yield found if isinstance(found, ImageError) else model.answer(of_layer(found, layer)[None], coverage)[0]


def image_files(folder: Path) -> list[Path]:
    """Files below a folder whose names promise an image, sorted; hidden ones are left out, as by an extraction.

    Folders that cannot be listed are among them: whoever reads them says why they are refused.
    """
    found = ((folder / relative, relative.endswith("/")) for relative, _ in walk_folder(folder))
    return sorted(path for path, closed in found if closed or path.suffix.lower() in IMAGE_SUFFIXES)


def named_files(path: Path) -> list[Path]:
    """The images that a path on the command line stands for; one that cannot be read is among them, to be refused.

    Empty where there is nothing at this path.

    Raises
    ------
    UsageError
        It is a folder without images.
    """
    try:
        if path.is_dir():
            inside = image_files(path)
            if not inside and path.suffix.lower() not in IMAGE_SUFFIXES:
                raise UsageError("no images in this folder", where=path, expected="files such as .jpg or .png")
            return inside or [path]
        return [path] if path.exists() or path.is_symlink() else []
    except (SourceError, PermissionError):
        return [path]
