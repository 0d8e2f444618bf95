"""A fine-tuned model for keeps: network and head in one bundle, with what it takes to trust them."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace

import numpy as np

from featx._arrays import Index
from featx.adaptation import Progress, Tuning, training
from featx.backbones import make_engine, provenance_of, tail_bytes, tuned
from featx.errors import UsageError
from featx.evaluation import LabelledRows
from featx.extraction import Embedder
from featx.models.bundle import Bundle
from featx.models.fit import check_promises, judged_head, pack_bundle
from featx.models.prior import Prior, prior_shares
from featx.models.unknown import learn_from_folds, similarity_to
from featx.store import fingerprint

OUT_OF_FOLD = 3
"""Parts that a kept model's calibration and accuracy are measured on, each by a model that has not seen it."""


def finetune_bundle(
    tuning: Tuning,
    *,
    max_error: float = 0.05,
    max_unknown: float = 0.05,
    prior: Prior = None,
    random_state: int = 0,
    engine: str = "auto",
    progress: Progress | None = None,
) -> Bundle:
    """Train on all images but those of the split ``test``, and pack network and head as ``featx fit`` does.

    Calibration and the accuracy to be expected come from models that have not seen the images they judge. With a
    ``prior``, in the shares of which classes will be met, all of it is about such photos, as of :func:`fit_head`.
    """
    check_promises(max_error, max_unknown)
    data = LabelledRows.of_features(tuning.features)
    use, y, names, copies = data.rows, data.labels, data.class_names, data.groups
    shares = prior_shares(prior, names)
    folds, notes_on_groups = data.folds(OUT_OF_FOLD, random_state)
    together = None if notes_on_groups else data.sites
    total = int(folds.max()) + 2
    tell: Progress = progress or (lambda done, total, what: None)
    if total == 2:
        raise UsageError(
            "a class has a single image, so nothing can be validated",
            found=names[int(data.counts.argmin())],
            hint="Add images of it, or leave it out.",
        )

    def train(kept: Index, seed: int, number: int) -> training.Trained:
        return training.train(
            tuning.halves.tail, tuning.activations, use[kept], y[kept], np.unique(copies[kept], return_inverse=True)[1],
            recipe=tuning.recipe, seeds=(random_state, seed), device=tuning.device,
            sites=None if together is None else together[kept],
            tick=lambda what: tell(number, total, f"the model to keep: {what}"),
        )  # fmt: skip

    scores, similarity = np.zeros((len(use), len(names))), np.zeros(len(use))
    for fold in range(total - 1):
        held, others = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        trained = train(others, fold, fold)
        scores[held] = training.scores(trained.classifier, tuning.activations, use[held])
        if max_unknown:
            seen = training.embed(trained.classifier.tail, tuning.activations, use, device=tuning.device)
            similarity[held] = similarity_to(seen[held], seen[others], y[others], random_state=random_state)
    trained = train(np.arange(len(use)), total, total - 1)
    tell(total, total, "packing")
    every = np.arange(len(tuning.features))
    embeddings = training.embed(trained.classifier.tail, tuning.activations, every, device=tuning.device)
    known = learn_from_folds(
        embeddings[use], y, copies, similarity, folds, max_unknown=max_unknown, random_state=random_state
    )
    fitted = judged_head(
        data, trained.classifier.scorer(), scores, folds, together, known, head=tuning.head,
        params={"epochs": trained.epochs}, max_error=max_error, max_unknown=max_unknown, shares=shares,
    )  # fmt: skip
    tail = tail_bytes(trained.classifier.tail, tuning.halves.cut)
    network = tuned(tuning.backbone, tail)
    runner = make_engine(network, engine=engine, device=tuning.device, precision="fp32")
    embedder = Embedder(network, runner, decode=tuning.decode)
    provenance = provenance_of(network, runner, decode=tuning.decode) | {
        "finetuned": {
            "head": tuning.head,
            "cut": tuning.halves.cut or "input",
            "base_weights_sha256": tuning.backbone.weights_sha256,
            "tail_sha256": hashlib.sha256(tail).hexdigest(),
            "recipe": asdict(tuning.recipe),
        }
    }
    return pack_bundle(
        replace(fitted, notes=(*tuning.notes, *notes_on_groups, *fitted.notes)),
        replace(
            tuning.features, embeddings=embeddings, layer="penultimate", provenance=provenance,
            fingerprint=fingerprint(provenance),
        ),
        embedder,
        tail=tail,
    )  # fmt: skip
