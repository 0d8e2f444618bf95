"""Embedding single images exactly as a store's (or a bundle's) were: what search, predict and the service share.

The provenance says which network, weights, preprocessing and precision that was; if one of them cannot be had
here, or has changed, this is an error that names it, never a silent near miss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from featx._system import available_cpus
from featx.backbones import (
    Backbone,
    Engine,
    Provider,
    carried,
    for_views,
    is_for_openvino,
    is_own,
    load_backbone,
    make_engine,
    provenance_of,
)
from featx.errors import ImageError, UsageError, WeightsError
from featx.images import CENTER, Decoded, DecoderPool, Looks, Origin, decode, parse_views
from featx.store import check_same

Seen = tuple[NDArray[np.uint8], ...]
"""Pixels of one image for each backbone in turn: (h, w, 3), of several views (v, h, w, 3)."""

Somewhere = TypeVar("Somewhere", bound=Origin)


def network_like(
    provenance: Mapping[str, Any],
    *,
    where: Path,
    backbone: str | Provider | None = None,
    weights: str | Path | None = None,
    hint: str = "Name the file with --weights FILE.",
) -> Backbone:
    """The network that a provenance names; whether it is the same one, nobody has compared yet.

    Parameters
    ----------
    provenance : of a store or a bundle.
    where : the store or bundle, for messages.
    backbone : the network, where it is one of the user's own: what a store says is never imported.
    weights : the weights file, where the provenance names one of the user's own.
    hint : how to give it, for messages.

    Raises
    ------
    WeightsError
        The weights are a file of the user's that has to be given.
    UsageError
        The network is the user's own, and has to be given.
    """
    recorded = str(provenance.get("backbone", ""))
    if backbone is None and is_own(recorded):
        raise UsageError(
            "made with a network of your own, whose code runs only when you name it",
            where=where,
            expected=recorded,
            hint="Name it with --backbone FILE.py:CLASS, or package.module:CLASS.",
        )
    named = str(provenance.get("weights", "default"))
    if weights is None and named not in ("default", "none"):
        raise WeightsError(
            "made with weights of your own, which are needed again",
            where=where,
            expected=named,
            hint=hint,
        )
    return load_backbone(backbone or recorded, weights=weights or named, layers=tuple(provenance["layers"]))


class Embedder:
    """A backbone on an engine, checked against the provenance of what its embeddings will be compared with.

    Parameters
    ----------
    backbone : the network.
    engine : how it is run.
    decode : "full" or "scaled", see :data:`featx.images.pixels.DECODE_MODES`.
    views : names of :data:`featx.images.views.VIEWS`, over which the embeddings of an image are averaged.
    others : further backbones, whose embeddings follow those of this one; an image is decoded once for all.
    """

    def __init__(
        self,
        backbone: Backbone,
        engine: Engine,
        *,
        decode: str = "full",
        views: Sequence[str] = CENTER,
        others: Sequence[Embedder] = (),
    ) -> None:
        self.backbone, self.decode, self.others = backbone, decode, tuple(others)
        self.looks = Looks(backbone.preprocess, views)
        self.engine = for_views(engine, len(self.looks.views))

    @classmethod
    def like(
        cls,
        provenance: Mapping[str, Any],
        *,
        where: Path,
        backbone: str | Provider | None = None,
        weights: str | Path | None = None,
        tail: bytes | None = None,
        device: str = "auto",
        engine: str = "auto",
        batch_size: int | Mapping[str, int] | None = None,
        networks: Mapping[str, bytes] | None = None,
        graphs: Mapping[str, str] | None = None,
    ) -> Embedder:
        """What made the embeddings of ``where``, ready to make more.

        Parameters
        ----------
        provenance : of a store or a bundle; of one backbone, or of several (``{"backbones": [...]}``).
        where : the store or bundle, for messages.
        backbone, weights : as of :func:`network_like`, for the one that needs them.
        tail : the trained part of a fine-tuned network, which a bundle brings along.
        device, engine, batch_size : as of :func:`featx.backbones.engines.choice.make_engine`.
        networks : graphs that a bundle brings along, by their sha256. With one of these, or one that comes with featx,
            OpenVINO needs neither weights nor torch.
        graphs : the sha256 of the graph of each backbone that is not quantised, by its name.

        Raises
        ------
        WeightsError
            The weights are a file of the user's that has to be given.
        UsageError
            The network is the user's own, and has to be given.
        MismatchError
            What is installed here makes other embeddings; the field is named.
        """
        if "backbones" in provenance:
            first, *others = (
                cls.like(
                    each, where=where, backbone=backbone if is_own(str(each.get("backbone"))) else None,
                    weights=weights if each.get("weights") not in ("default", "none") else None,
                    device=device, engine=engine, batch_size=batch_size, networks=networks, graphs=graphs,
                )
                for each in provenance["backbones"]
            )  # fmt: skip
            first.others = tuple(others)
            return first
        precision = str(provenance.get("precision", "auto"))

        def load() -> Backbone:
            network = network_like(provenance, where=where, backbone=backbone, weights=weights)
            if tail is None:
                return network
            from featx.backbones import tuned

            return tuned(network, tail)

        sha256 = provenance.get("quantised_sha256") or (graphs or {}).get(str(provenance.get("backbone")))
        brought = (networks or {}).get(str(sha256))
        network = None
        if backbone is None and weights is None and is_for_openvino(engine, device):
            recorded_only = Backbone.recorded(provenance, load)
            if brought or (precision == "int8" and carried(recorded_only) is not None):
                network = recorded_only
        network = network or load()
        chosen = make_engine(
            network, engine=engine, device=device, precision=precision, batch_size=batch_size, pad=False,
            network=brought,
        )  # fmt: skip
        recorded = provenance.get("decode")
        mode = str(recorded.get("mode", "full")) if isinstance(recorded, Mapping) else "full"
        views = parse_views(str(provenance.get("views", "center")))
        check_same(provenance, provenance_of(network, chosen, views=views, decode=mode), where)
        return cls(network, chosen, decode=mode, views=views)

    @property
    def networks(self) -> dict[str, bytes]:
        """The graphs of networks that can travel with a model, by their sha256; those that featx has are left out."""
        found = {each.engine.graph_sha256: each.engine.network_to_keep for each in self.members}
        return {sha256: content for sha256, content in found.items() if content}

    @property
    def graphs(self) -> dict[str, str]:
        """The sha256 of the graph of each backbone that runs as one and is not quantised, by its name."""
        return {
            each.backbone.name: each.engine.graph_sha256
            for each in self.members
            if each.engine.graph_sha256 and not each.engine.quantised_sha256
        }

    @property
    def members(self) -> tuple[Embedder, ...]:
        """Itself and the further ones, whose layers follow each other."""
        return self, *self.others

    def pixels(self, data: bytes) -> Seen:
        """What the engines are to see of an image file's bytes."""
        looks = [each.looks for each in self.members]
        return self.cut(decode(data, enough_for=looks if self.decode == "scaled" else ()))

    def cut(self, image: Any) -> Seen:
        """What the engines are to see of an upright RGB image of Pillow's."""
        return tuple(each.looks.cut(image) for each in self.members)

    @staticmethod
    def seen(decoded: Decoded) -> Seen | None:
        """What the engines are to see of an image that one of :meth:`decoders` has decoded; None where it has not."""
        parts = [part for part in (decoded.pixels, *decoded.others) if part is not None]
        return tuple(parts) or None

    def decoders(self, *, workers: int, **options: Any) -> DecoderPool:
        """Processes that make such pixels of files; options as of :class:`featx.images.pool.DecoderPool`."""
        return DecoderPool(
            self.backbone.preprocess, workers=workers, mode=self.decode, views=self.looks.views,
            others=[each.looks for each in self.others], **options,
        )  # fmt: skip

    def embed_pixels(self, images: Sequence[Seen]) -> tuple[NDArray[np.float32], ...]:
        """Embeddings (n, d), one array a layer of each backbone, of images as :meth:`pixels` gives them."""
        found: list[NDArray[np.float32]] = []
        for each, pictures in zip(self.members, zip(*images, strict=True), strict=True):
            size = each.engine.batch_size
            batches = (np.stack(pictures[start : start + size]) for start in range(0, len(pictures), size))
            parts = list(each.engine.embed(batches))
            found += [np.concatenate(layer) for layer in zip(*parts, strict=True)]
        return tuple(found)

    def embed_bytes(self, data: bytes) -> tuple[NDArray[np.float32], ...]:
        """Embeddings (1, d) of one image file's bytes, decoded in this process; ImageError when it is refused."""
        return self.embed_pixels([self.pixels(data)])

    def embed_files(
        self, paths: Iterable[Somewhere]
    ) -> Iterator[tuple[Somewhere, tuple[NDArray[np.float32], ...] | ImageError]]:
        """Embeddings (d,), one a layer, or the refusal of each file, in order; decoded in processes of their own.

        ``paths`` may be other origins of images, too.
        """
        waiting: list[tuple[Somewhere, Seen | ImageError]] = []

        def flush() -> Iterator[tuple[Somewhere, tuple[NDArray[np.float32], ...] | ImageError]]:
            images = [seen for _, seen in waiting if not isinstance(seen, ImageError)]
            rows = zip(*self.embed_pixels(images), strict=True) if images else iter(())
            for path, seen in waiting:
                yield path, seen if isinstance(seen, ImageError) else next(rows)
            waiting.clear()

        given = list(paths)
        if not given:
            return
        workers = min(available_cpus(), len(given))
        with self.decoders(workers=workers) as pool:
            stream = pool.run(given, lambda digest: False, ahead=2 * self.engine.batch_size + workers)
            ready = 0
            for path, decoded in zip(given, stream, strict=True):
                seen = decoded.refusal or self.seen(decoded)
                assert seen is not None
                waiting.append((path, seen))
                ready += not isinstance(seen, ImageError)
                if ready == self.engine.batch_size:
                    yield from flush()
                    ready = 0
            yield from flush()
