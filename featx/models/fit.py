"""One head for keeps: chosen, calibrated on scores of images it had not seen, refitted on all, and packed.

Out-of-fold scores repeat the whole choice in every fold (nested cross-validation), with copies of an image in one
fold, so the calibration, the threshold and the numbers in ``metrics`` are about new images. The split ``test`` takes
no part in any of it; where there is one, it judges the finished head once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits

from featx._arrays import NEAR, Index
from featx.backbones import layer_place, of_layer
from featx.errors import UsageError, plural
from featx.evaluation import LabelledRows, joined_sites, sites_of, stats, sweep_heads
from featx.extraction import Embedder
from featx.heads import (
    HEADS,
    N_FOLDS,
    Array,
    Head,
    Layers,
    Scorer,
    Views,
    check_device,
    fit_chosen,
    heads_for,
    is_large,
    softmax,
    taken,
    unlabelled_centre,
)
from featx.images import encode
from featx.models.bundle import Bundle
from featx.models.calibrate import clopper_pearson, fit_sharpness, fit_threshold, smallest_error, weighted_interval
from featx.models.novelty import Familiarity
from featx.models.prior import Prior, class_weights, moved, prior_shares
from featx.models.sets import COVERAGE, Conformity, among_known, cross_sets, label_sets, measure_sets, true_scores
from featx.models.unknown import Measured, learn, metrics_of, warnings_of_unknown
from featx.store import Alike, FeatureSet, layers_of, title_of

N_GOLDEN = 16
"""Rows that are kept with the scores they got, to find out at loading whether the head still gives them."""

_SEED_OF_GOLDEN = 20
_N_LISTED = 10
"""Classes that a sentence names at most."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class HeldOut:
    """What heads said of images that they had not seen, and how the images were divided.

    Attributes
    ----------
    data : the images with a label.
    folds : (n,) the images of one fold were judged by the same head.
    scores : (n, c), before they were moved to other shares of the classes.
    apart : (n,) groups that are whole in each fold; None where there are none, or they could not be kept apart.
    views : the images as heads see them, with what was made of them already.
    """

    data: LabelledRows
    folds: Index
    scores: Array
    apart: Index | None
    views: Views | None = None


@dataclass(frozen=True)
class FittedHead:
    """What :func:`fit_head` finds; fields as of :class:`featx.models.bundle.Bundle`."""

    scorer: Scorer
    class_names: tuple[str, ...]
    head: str
    params: dict[str, Any]
    sharpness: float | None
    threshold: float | None
    max_error: float
    max_unknown: float
    familiarity: Familiarity | None
    metrics: dict[str, Any]
    notes: tuple[str, ...]
    conformity: Conformity | None = None
    prior: dict[str, float] | None = None
    held_out: HeldOut | None = field(default=None, repr=False)


def fit_head(
    embeddings: NDArray[np.floating],
    labels: NDArray[np.integer],
    *,
    class_names: Sequence[str],
    groups: NDArray[np.integer] | None = None,
    near_duplicates: Alike = NEAR,
    heads: Sequence[str] = ("auto",),
    max_error: float = 0.05,
    max_unknown: float = 0.05,
    prior: Prior = None,
    random_state: int = 0,
    n_jobs: int | None = None,
    pool: NDArray[np.floating] | None = None,
    layers: Layers | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    sites: ArrayLike | None = None,
) -> FittedHead:
    """Choose, calibrate and fit a head.

    Parameters
    ----------
    embeddings : (n, d), finite.
    labels : (n,) in 0 .. c-1; rows with a negative label are left out.
    class_names : c names, of which those without any row are left out.
    groups : (n,) rows with the same value are exact copies.
    near_duplicates : what makes two images copies: their pictures, or a cosine from which on; None looks for exact
        copies only.
    heads : names of :data:`featx.heads.catalogue.HEADS`; of several, the sweep's winner when all images but a fifth are
        shots.
    max_error : share of answers that may be wrong; below the threshold that follows the head abstains.
    max_unknown : share of photos like these that may be called unknown; with 0 none ever is.
    prior : in which shares classes will be met, by name, or "equal"; by default as in these rows.
    random_state : seed of the folds.
    n_jobs : workers that compare several heads; by default one for each core.
    layers : which columns are which layer's, to combine them; by default the embeddings are of one layer.
    pool : (m, d) embeddings of images without labels, no copies of labelled ones; "auto" is then the head that learns
        from them, and the others measure from their mean (:mod:`featx.heads.unlabelled`).
    device : of torch, such as "cuda", for logistic regression on large embeddings; everything else is the CPU's.
    progress : called as ``progress(done, total, what)``.
    sites : (n,) rows with the same value belong together (a patient, a camera, a burst), "" is a row by itself: they
        are in one fold, so that calibration, threshold and metrics are about groups never seen.

    Raises
    ------
    UsageError
        Fewer than two classes with images, no such head, or no such device.
    """
    check_promises(max_error, max_unknown)
    if device is not None:
        check_device(device)
    data = LabelledRows.of(
        np.asarray(embeddings), labels, class_names, groups=groups, near_duplicates=near_duplicates,
        columns=None if layers is None else layers.columns(layers.reference), sites=sites,
    )  # fmt: skip
    names, rows, y, copies = data.class_names, data.embeddings, data.labels, data.groups
    if len(names) < 2:
        raise UsageError("a head needs images of at least two classes", found=f"{len(names)}")
    shares = prior_shares(prior, names)
    say: Progress = progress or (lambda done, total, what: None)
    folds, notes = data.folds(N_FOLDS, random_state)
    together = None if notes else data.sites
    notes = [*data.notes, *notes]

    centre = None if pool is None else unlabelled_centre(pool)
    catalogue = heads_for(centre, pool)
    notes += [centre.told] if centre else []
    chosen = [catalogue[name].name for name in dict.fromkeys(heads)]
    compared_heads: list[str] = []
    if len(chosen) > 1:
        swept = sweep_heads(
            rows, y, class_names=names, groups=copies, heads=chosen, shots=("all",), episodes=10,
            random_state=random_state, n_jobs=n_jobs, near_duplicates=None, centre=centre, pool=pool,
            layers=layers, on=None if layers is None else [layers.whole], device=device, progress=progress,
            sites=together,
        )  # fmt: skip
        notes.append(
            f"{swept.winner} had the highest accuracy of {', '.join(chosen)} over 10 draws. The choice has seen every "
            "image, so the accuracy below may be slightly too high; a split called test is judged honestly."
        )
        compared_heads, chosen = chosen, [swept.winner]
    head = catalogue[chosen[0]] if layers is None else layers.on(catalogue[chosen[0]], layers.whole)
    n_folds = int(folds.max()) + 1
    if shares is not None and n_folds < 2:
        raise UsageError(
            "a class with a single image cannot be weighed against the others", where="--prior",
            found=names[int(data.counts.argmin())], hint="Add images of it, or leave it out.",
        )  # fmt: skip
    total = 1 + (n_folds if n_folds > 1 else 0)
    say(0, total, f"fitting {head.name}")
    views = Views(rows, head.mean)
    scorer, params, converged = _fit(head, views, y, copies, random_state, device, together)
    if is_large(rows):
        views = Views(rows, head.mean)  # there is no room to keep what was made of them
    say(1, total, f"fitting {head.name}")
    scores = None
    if n_folds > 1:
        scores = np.zeros((len(rows), len(names)))
        for fold in range(n_folds):
            held, others = folds == fold, np.flatnonzero(folds != fold)
            inner = np.unique(copies[others], return_inverse=True)[1].reshape(-1)
            kept = None if together is None else together[others]
            part, _, fine = _fit(head, views.part(others), y[others], inner, random_state, device, kept)
            scores[held] = part.scores(rows[held])
            if part.kind != scorer.kind and not head.probabilistic:
                scores[held] *= _spread(scorer, rows[others]) / _spread(part, rows[others])
            converged &= fine
            say(2 + fold, total, "scoring images out of fold")
    else:
        smallest = names[int(data.counts.argmin())]
        notes.append(
            f"Class {smallest!r} has a single image, so nothing could be validated: "
            "scores are no probabilities but say how far a label is ahead of the next, and every answer abstains."
        )
    if not converged:
        notes.append("A fit stopped before its optimum.")
    say(total, total, "measuring what is unknown")
    known = learn(rows, y, copies, kind=scorer.kind, max_unknown=max_unknown, random_state=random_state, sites=together)
    fitted = judged_head(
        data, scorer, scores, folds, together, known, head=head.name, params=params, max_error=max_error,
        max_unknown=max_unknown, shares=shares,
    )  # fmt: skip
    about = {"unlabelled_images": 0 if pool is None else len(pool), "chosen_among": compared_heads}
    return replace(
        fitted,
        metrics={**fitted.metrics, **about},
        notes=(*notes, *fitted.notes, *data.duplicates.notes),
        held_out=None if scores is None else HeldOut(data, folds, scores, together, views),
    )


def check_promises(max_error: float, max_unknown: float) -> None:
    """UsageError where what a model is to promise are no shares."""
    if not 0 < max_error < 1:
        raise UsageError(
            "--max-error is a share of the answers", expected="more than 0 and less than 1", found=max_error
        )
    if not 0 <= max_unknown < 1:
        raise UsageError(
            "--max-unknown is a share of the photos", expected="at least 0 (off) and less than 1", found=max_unknown
        )


def _fit(
    head: Head,
    views: Views,
    labels: NDArray[np.int64],
    groups: Index,
    random_state: int,
    device: str | None,
    sites: Index | None,
) -> tuple[Scorer, dict[str, Any], bool]:
    """A head fitted as the sweep fits it: normaliser and parameters chosen on these rows alone."""
    with threadpool_limits(limits=None if is_large(views.raw) else 1, user_api="blas"):
        choice, pipeline = fit_chosen(
            head, views, labels, groups, random_state=random_state, device=device, sites=sites
        )
    return Scorer.of(pipeline), choice.params, choice.converged


def scores_without(
    held_out: HeldOut, without: NDArray[np.bool_], head: str, layers: Layers | None, random_state: int
) -> tuple[Array, bool]:
    """What heads of the same recipe say of the same images in the same folds, had they not learnt from some of them.

    Parameters
    ----------
    held_out : of :func:`fit_head`.
    without : (n,) which images take no part in any fit; they are judged all the same.
    head, layers, random_state : as they were there, of a head that learnt from no pool.

    Returns
    -------
    (n, c) scores, -inf for classes that no other image of the other folds has; and whether every fit reached its
    optimum.
    """
    data, folds, sites = held_out.data, held_out.folds, held_out.apart
    recipe = HEADS[head] if layers is None else layers.on(HEADS[head], layers.whole)
    views = held_out.views or Views(data.embeddings, recipe.mean)
    scores = np.full(held_out.scores.shape, -np.inf)
    converged = True
    # One after the other: each fit catches warnings, to know whether it converged, for the whole process.
    for fold in range(int(folds.max()) + 1):
        part = np.flatnonzero((folds != fold) & ~without)
        names, labels = np.unique(data.labels[part], return_inverse=True)
        groups = np.unique(data.groups[part], return_inverse=True)[1].reshape(-1)
        kept = None if sites is None else np.unique(sites[part], return_inverse=True)[1].reshape(-1)
        scorer, _, fine = _fit(recipe, views.part(part), labels.reshape(-1), groups, random_state, None, kept)
        held = np.flatnonzero(folds == fold)
        scores[np.ix_(held, names)] = scorer.scores(data.embeddings[held])
        converged &= fine
    return scores, converged


def _spread(scorer: Scorer, rows: NDArray[np.floating]) -> float:
    """How far apart scores of rows (n, d) are: distances to class means have other units with another normaliser."""
    scores = scorer.scores(rows)
    return float((scores.max(axis=1) - scores.min(axis=1)).mean()) or 1.0


def judged_head(
    data: LabelledRows,
    scorer: Scorer,
    scores: Array | None,
    folds: Index,
    sites: Index | None,
    known: tuple[Familiarity | None, Measured | None],
    *,
    head: str,
    params: dict[str, Any],
    max_error: float,
    max_unknown: float,
    shares: Array | None,
) -> FittedHead:
    """A fitted head with what follows from scores of images that it had not seen; its notes are warnings.

    Parameters
    ----------
    data : the images.
    scorer, head, params : fitted on all of them.
    scores : (n, c) out of fold; None where nothing could be validated.
    folds : (n,) which images are judged by the same head.
    sites : (n,) groups that were whole in each fold: what is to be expected is of new groups, with intervals over them.
    known : what it takes to know own images again, and what was measured of it.
    max_error, max_unknown : as of :func:`fit_head`.
    shares : (c,) in which the classes will be met, if not as here.
    """
    names, labels = data.class_names, data.labels
    counts = {"images": len(labels), "duplicates": len(labels) - len(np.unique(data.groups)), "classes": len(names)}
    if sites is not None:
        counts["groups"] = len(np.unique(sites))
    familiarity, measured = known
    metrics: dict[str, Any] = {**counts, "out_of_fold": None, "smallest_max_error": None}
    sharpness = threshold = conformity = None
    if scores is not None:
        if shares is None:
            sharpness = fit_sharpness(scores, labels)
        else:
            sharpness, added, scores = moved(scores, labels, folds, data.groups, shares)
            scorer = scorer.shifted(added)
        threshold, found, conformity = _judge(data, scores, sharpness, folds, sites, max_error, max_unknown, shares)
        metrics |= found
    metrics["unknown"] = measured and metrics_of(measured, names)
    return FittedHead(
        scorer=scorer, class_names=names, head=head, params=params, sharpness=sharpness, threshold=threshold,
        max_error=max_error, max_unknown=max_unknown, familiarity=familiarity, metrics=metrics, conformity=conformity,
        prior=None if shares is None else dict(zip(names, shares.tolist(), strict=True)),
        notes=(
            *warnings_of(metrics, threshold, max_error, weighted=shares is not None),
            *warnings_of_unknown(metrics["unknown"], max_unknown),
        ),
    )  # fmt: skip


def _judge(
    data: LabelledRows, scores: Array, sharpness: float, folds: Index, sites: Index | None, max_error: float,
    max_unknown: float, shares: Array | None,
) -> tuple[float | None, dict[str, Any], Conformity]:  # fmt: skip
    """The threshold, what is to be expected of new images, and what sets of labels go by."""
    class_names = data.class_names
    # Copies of an image are not evidence of their own: one of each group counts.
    one = np.unique(data.groups, return_index=True)[1]
    labels, scores, folds = data.labels[one], scores[one], folds[one]
    probabilities = softmax(scores, sharpness)
    predicted = scores.argmax(axis=1)
    confidence, correct = probabilities[np.arange(len(labels)), predicted], predicted == labels
    weights, heaviest = None, 1.0
    if shares is not None:
        of_class = class_weights(labels, shares)
        weights, heaviest = of_class[labels], float(of_class.max())
    threshold = fit_threshold(confidence, correct, max_error, weights, heaviest)
    sets = cross_sets(probabilities, labels, folds, among_known(COVERAGE, max_unknown), weights, heaviest)
    measured = {
        **measure(
            labels, scores, probabilities, threshold, class_names, weights, None if sites is None else sites[one]
        ),
        "confusion": _confusion(labels, predicted, class_names),
        "sets": measure_sets(sets, labels, class_names, coverage=COVERAGE, weights=weights),
    }
    # Rounded up, so that what is said can be asked for.
    least = math.ceil(1000 * smallest_error(confidence, correct, weights, heaviest)) / 1000
    conformity = Conformity.of(true_scores(probabilities, labels), weights, heaviest)
    return threshold, {"out_of_fold": measured, "smallest_max_error": least}, conformity


def _confusion(
    labels: NDArray[np.int64], predicted: NDArray[np.integer], class_names: Sequence[str]
) -> dict[str, dict[str, int]]:
    """How many images of each class are called what; what never happens is left out."""
    out: dict[str, dict[str, int]] = {}
    for (true, named), n in zip(
        *np.unique(np.column_stack([labels, predicted]), axis=0, return_counts=True), strict=True
    ):
        out.setdefault(class_names[true], {})[class_names[named]] = int(n)
    return out


def warnings_of(
    metrics: Mapping[str, Any], threshold: float | None, max_error: float, *, weighted: bool = False
) -> list[str]:
    """Sentences about a head that answers nothing, and about classes that it does not recognise."""
    found = metrics["out_of_fold"]
    if found is None:
        return []
    out = []
    if threshold is None:
        least = metrics["smallest_max_error"]
        offer = f", or fit again with --max-error {least:g}, the smallest that they can promise" if least < 1 else ""
        where = " With --prior, an image of a class that will be met more often counts more." if weighted else ""
        out.append(
            f"Every answer abstains: promising at most {100 * max_error:g} % errors takes at least "
            f"{plural(math.ceil(1 / max_error - 1 - 1e-9), 'correct answer')} without a mistake, which "
            f"{plural(found['images'], 'image')} did not show.{where} Add images{offer}."
        )
    # Counted with one more image, a wrong one: two of four show little.
    weak = [
        f"{name} ({each['right']} of {plural(each['images'], 'image')})"
        for name, each in by_recall(found)
        if each["right"] / (each["images"] + 1) < found["accuracy"]["mean"] / 2
    ]
    if weak:
        listed = ", ".join(weak[:_N_LISTED]) + (f" and {len(weak) - _N_LISTED} more" if len(weak) > _N_LISTED else "")
        out.append(f"Hardly recognised out of fold: {listed}. Add images of such a class, or leave it out.")
    return out


def by_recall(found: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Each class of :func:`measure` with its ``recall``, ``right`` and ``images``, the least recognised first."""
    return sorted(found["recall_per_class"].items(), key=lambda item: item[1]["recall"])


def measure(
    labels: NDArray[np.int64],
    scores: Array,
    probabilities: Array,
    threshold: float | None,
    class_names: Sequence[str],
    weights: Array | None = None,
    sites: Index | None = None,
) -> dict[str, Any]:
    """Accuracy and recall of each class with their 95 % intervals, calibration and abstention.

    Parameters
    ----------
    labels, scores, probabilities : (m,), (m, c) and (m, c).
    threshold : below which an answer abstains; None where every one does.
    class_names : c names.
    weights : (m,) how much each image counts, where classes will be met in other shares.
    sites : (m,) which the interval is then over.
    """
    predicted = scores.argmax(axis=1)
    correct = predicted == labels
    confidence = probabilities[np.arange(len(labels)), predicted]
    answered = np.zeros(len(labels), bool) if threshold is None else confidence >= threshold
    mean, low, high = weighted_interval(correct, weights)
    if sites is not None:
        counted = correct if weights is None else correct * weights / weights.mean()
        over = stats.mean_over_sites(counted.astype(np.float64), sites)
        low, high = over.low, over.high
    images = np.bincount(labels, minlength=len(class_names)).tolist()
    right = np.bincount(labels[correct], minlength=len(class_names)).tolist()
    recalled = {}
    for name, r, n in zip(class_names, right, images, strict=True):
        if n:
            limits = clopper_pearson(r, n)
            recalled[name] = {"recall": r / n, "low": limits[0], "high": limits[1], "right": r, "images": n}
    wrong = None
    if answered.any():
        wrong = float(1 - np.average(correct[answered], weights=None if weights is None else weights[answered]))
    return {
        "images": len(labels),
        "accuracy": {"mean": mean, "low": low, "high": high},
        "balanced_accuracy": stats.balanced_accuracy(labels, predicted),
        "macro_f1": stats.macro_f1(labels, predicted, weights),
        "recall_per_class": recalled,
        "majority_baseline": stats.majority_baseline(labels, weights),
        "log_loss": stats.log_loss(labels, probabilities, weights),
        "brier": stats.brier(labels, probabilities, weights),
        "ece": stats.expected_calibration_error(confidence, correct, weights=weights),
        "answered": float(np.average(answered, weights=weights)),
        "error_among_answered": wrong,
    }


# --- the bundle ---------------------------------------------------------------------------------------------------


def fit_bundle(features: FeatureSet, embedder: Embedder, *, with_network: bool = True, **options: Any) -> Bundle:
    """Fit a head on a store's images, but not on its split ``test``, and pack it with its backbone's provenance.

    Parameters
    ----------
    features : of the store.
    embedder : what made them (:meth:`Embedder.like`); it embeds the probe image.
    with_network : as of :func:`pack_bundle`.
    options : as of :func:`fit_head`.
    """
    return pack_bundle(fit_features(features, **options), features, embedder, with_network=with_network)


def fit_features(features: FeatureSet, *, pool: NDArray[np.floating] | None = None, **options: Any) -> FittedHead:
    """:func:`fit_head` on a store's images, but not on its split ``test``; options as there."""
    use = np.flatnonzero((features.splits != "test") & ((features.labels >= 0) | (pool is None)))
    return fit_head(
        taken(features.embeddings, use),
        features.labels[use],
        class_names=features.class_names,
        groups=features.copies[use],
        near_duplicates=features.near_copies_of(use),
        pool=pool,
        sites=sites_of(features, use),
        **options,
    )


MOST_NETWORK = 100 * 2**20
"""Bytes that the networks in a model may have, unless they are quantised and exist nowhere else."""


def pack_bundle(
    fitted: FittedHead,
    features: FeatureSet,
    embedder: Embedder,
    *,
    tail: bytes | None = None,
    with_network: bool = True,
) -> Bundle:
    """A fitted head with what it takes to trust it; the split ``test``, where there is one, judges it once.

    Parameters
    ----------
    fitted : the head.
    features : the embeddings that it was fitted on, and those of the split ``test``.
    embedder : what made them.
    tail : the trained part of a fine-tuned network, of :func:`featx.backbones.cut.tail_bytes`.
    with_network : keep the network's graph in the bundle, so that who uses it needs neither weights nor torch.
    """
    networks, graphs = embedder.networks, embedder.graphs
    if not with_network or sum(map(len, networks.values())) > MOST_NETWORK:
        networks = {sha256: content for sha256, content in networks.items() if sha256 not in graphs.values()}
        graphs = {}
    use = np.flatnonzero(features.splits != "test")
    probe = encode(probe_pixels())
    place = layer_place(features.layer, layers_of(features.provenance))
    golden = np.sort(np.random.default_rng(_SEED_OF_GOLDEN).permutation(use)[:N_GOLDEN])
    bundle = Bundle(
        **{name: value for name, value in vars(fitted).items() if name != "held_out"},
        layer=features.layer,
        provenance={**features.provenance, "fingerprint": features.fingerprint},
        golden=features.embeddings[golden],
        probe=probe,
        probe_embedding=of_layer(embedder.embed_bytes(probe), place)[0],
        versions={name: version(name) for name in ("featx", "numpy", "scikit-learn")},
        tail=tail,
        networks=networks,
        graphs=graphs,
    )
    judged, notes = _test(bundle, features)
    return replace(bundle, metrics={**bundle.metrics, "test": judged}, notes=(*bundle.notes, *notes))


def _test(bundle: Bundle, features: FeatureSet) -> tuple[dict[str, Any] | None, list[str]]:
    """How the finished head does on the split ``test``, less copies and groups of what it was fitted on; and notes."""
    together, test = features.copies, features.splits == "test"
    learnt, notes = np.isin(together, together[~test]), []
    if (features.groups != "").any():
        together = joined_sites(features.groups, together)
        of_groups = test & ~learnt & np.isin(together, together[~test])
        if of_groups.any():
            shared = plural(int(of_groups.sum()), "test image")
            name = features.group_name or "group"
            notes.append(f"Left out of the judgement: {shared} of a {name} that was learnt from.")
        learnt |= of_groups
    place = {name: i for i, name in enumerate(bundle.class_names)}
    known = np.array([name in place for name in features.class_names] + [False])  # label -1 is the last
    use = np.flatnonzero(test & known[features.labels] & ~learnt)
    if not len(use) or bundle.sharpness is None:
        return None, notes
    labels = np.array([place[features.class_names[int(i)]] for i in features.labels[use]])
    scores = bundle.scorer.scores(features.embeddings[use])
    probabilities = softmax(scores, bundle.sharpness)
    weights = None
    if bundle.prior is not None and len(np.unique(labels)) == len(place):
        weights = class_weights(labels, np.array([bundle.prior[name] for name in bundle.class_names]))[labels]
    found = measure(labels, scores, probabilities, bundle.threshold, bundle.class_names, weights)
    if bundle.conformity is not None:
        sets = label_sets(probabilities, bundle.set_limit(COVERAGE))
        found["sets"] = measure_sets(sets, labels, bundle.class_names, coverage=COVERAGE, weights=weights)
    unknown = [each.reason == "unknown" for each in bundle.answer(features.embeddings[use])]
    return {**found, "unknown": float(np.average(unknown, weights=weights))}, notes


def probe_pixels() -> NDArray[np.uint8]:
    """A picture of nobody's, uint8 (240, 320, 3): waves of every direction and several lengths."""
    y, x = np.mgrid[0:240, 0:320].astype(np.float64)
    channels = []
    for phase in (0.0, 2.1, 4.2):
        waves = np.sin(x / 9 + phase) + np.sin(y / 23 - phase) + np.sin((x + y) / 41 + 2 * phase)
        channels.append(waves + np.sin(np.hypot(x - 90, y - 130) / 5 + phase))
    scaled = (np.stack(channels, axis=-1) + 4.0) / 8.0
    return np.rint(255 * scaled).astype(np.uint8)


def summary(bundle: Bundle, path: Path) -> dict[str, Any]:
    """What ``featx fit --json`` prints."""
    told = bundle.describe()
    told.pop("provenance")
    return {**told, "model": str(path), "backbone": title_of(bundle.provenance), "score_kind": bundle.score_kind}
