"""The real service in a process of its own, with an engine that can be told to be slow, to fail, or to die.

python tiny_server.py PORT '{"seconds": 0.1, "limits": {...}, "api_key": "", "host": "127.0.0.1"}'

With "counts" it counts answers in this folder, and writes every "count_seconds".

With "feedback", it keeps corrections in this folder.

With "label_studio", as in {"url": "http://127.0.0.1:8080", "token": "", "refit": ["true"], "every": 2}, it is a backend
of this Label Studio, and runs a command after every so many labels.

With "models", as in [["a", 0], ["b", 0], ["c", 1]], it serves several: each a name, and the number of its engine.

What an image does is written in its colour: red ones fail the batch that they are in, blue ones end the engine's
thread.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from conftest import TINY, TinyEngine, tiny_backbone
from imagekit import pixels
from numpy.typing import NDArray

from featx.errors import FeatxError
from featx.extraction.embedder import Embedder
from featx.heads.catalogue import make_head
from featx.heads.scorer import Scorer
from featx.images.pixels import encode
from featx.models.bundle import Bundle, write_bundle
from featx.models.corrections import Corrections
from featx.models.fit import probe_pixels
from featx.models.sets import Conformity
from featx.models.unknown import learn
from featx.models.versions import Versions
from featx.service import batcher as service_batch, counts as service_counts
from featx.service.feedback import Feedback, Refitter
from featx.service.guard import Limits
from featx.service.label_studio import LabelStudio
from featx.service.label_studio_host import LabelStudioHost
from featx.service.server import serve
from featx.service.work import Model, Repository

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


class MoodyEngine(TinyEngine):
    """Takes ``seconds`` for a batch."""

    def __init__(self, seconds: float) -> None:
        super().__init__(batch_size=4)
        self.seconds = seconds

    def embed(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[tuple[NDArray[np.float32], ...]]:
        for batch in batches:
            time.sleep(self.seconds)
            colours = [tuple(image[12, 12].tolist()) for image in batch]
            if BLUE in colours:
                raise SystemExit("the engine is gone")
            if GREEN in colours:
                time.sleep(1000)
            if RED in colours:
                raise RuntimeError("a red image")
            yield from super().embed([batch])


def tiny_bundle() -> Bundle:
    """A head on what the tiny engine makes of random pictures."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, *TINY.crop, 3), dtype=np.uint8)
    rows = next(TinyEngine(batch_size=40).embed([images]))[0]
    labels = np.arange(40) % 2
    probe = encode(probe_pixels())
    (found,) = next(TinyEngine().embed([pixels(probe, TINY)[None]]))
    provenance = {"backbone": "tiny", "layers": ["penultimate"], "fingerprint": "f" * 64}
    kept, _ = learn(rows, labels, np.arange(40), kind="l2", max_unknown=0.05)
    return Bundle(
        scorer=Scorer.of(make_head("logreg", C=1.0).fit(rows, labels)),
        class_names=("ants", "bees"), head="logreg", params={"C": 1.0}, layer="penultimate", provenance=provenance,
        sharpness=1.0, threshold=0.5, max_error=0.05, golden=rows[:4], probe=probe, probe_embedding=found[0],
        max_unknown=0.05, familiarity=kept, conformity=Conformity.of(np.linspace(0.0, 1.0, 40)),
    )  # fmt: skip


def _for(bundle: Bundle, name: str, models: int) -> Bundle:
    """The bundle of one of several models: its classes tell which."""
    return replace(bundle, class_names=(f"ants of {name}", f"bees of {name}")) if models > 1 else bundle


def main() -> None:
    port, wanted = int(sys.argv[1]), json.loads(sys.argv[2])
    settings: dict[str, Any] = {"host": "127.0.0.1", "log_json": True, **wanted}
    seconds, names = settings.pop("seconds", 0.0), settings.pop("models", [["model", 0]])
    embedders = {number: Embedder(tiny_backbone(), MoodyEngine(seconds)) for _, number in names}
    service_batch.STUCK, service_batch.LOST = settings.pop("patience", (service_batch.STUCK, service_batch.LOST))
    limits = Limits(**settings.pop("limits", {}))
    bundle = tiny_bundle() if settings.pop("sets", True) else replace(tiny_bundle(), conformity=None)
    service_counts.SECONDS = settings.pop("count_seconds", service_counts.SECONDS)
    counted = settings.pop("counts", None)
    folder, new_classes = settings.pop("feedback", ""), settings.pop("new_classes", False)
    feedback, studio = None, settings.pop("label_studio", {})
    if folder:
        corrections = Corrections(Path(folder))
        corrections.open()
        versions = Versions(Path(folder))
        bundle = versions.read(versions.begin(write_bundle(bundle, Path(folder).parent / "tiny.model"), "test"))
        refitter = Refitter(studio["refit"], studio["every"]) if "refit" in studio else None
        feedback = Feedback(corrections, new_classes=new_classes, refitter=refitter)
    models = [Model(_for(bundle, name, len(names)), embedders[number], None, name, feedback) for name, number in names]
    try:
        counts = None if counted is None else service_counts.Counts(Path(counted)).open()
        repository = Repository(models, limits, counts)
        if studio:
            host = LabelStudioHost(studio["url"], studio.get("token", ""), studio.get("allow", ()))
            settings["label_studio"] = LabelStudio(repository, host)
        serve(repository, port=port, started=lambda url: print(f"Serving at {url} ", flush=True), **settings)
    except FeatxError as error:  # as the command does
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
