"""A model fitted again on what it was fitted on and on corrections of its answers, and promoted only on evidence.

The same recipe (head, layers, promises, seed) is fitted on the old images (the store that the first version was fitted
on, with every correction that the current version has learnt) and the new ones (the batch: corrections that it has not
learnt). Only photos that the feedback folder's store does not have are embedded.

*Evidence.* All images, old and new, are divided into folds once, with copies and groups whole. In each fold a head that
learnt from old and new images of the other folds is compared with one that learnt from the old ones alone, on the same
held-out images. People correct errors, so a batch is no sample: counted as it is, it would always promise much, and
errors alone, rightly labelled, were promoted in 18 of 20 tries while they took 17 points off. So what is gained on
images that the former named wrong, and what is lost on those that it named right, are weighted as among the old images
(:func:`stratified_difference`). "Worse" is said if that holds of this difference, or of the old images; it is refused.
"Better" is promoted. Where the data cannot tell, as of a few sound labels, the batch is promoted if the difference does
not point down and the labels can be predicted (below); otherwise it waits. ``force`` overrules all.

*A mistaken batch.* That a batch disagrees with the model says nothing. But a calibrated model also says how its errors
will look: it will be wrong mostly where it was unsure, and the truth is mostly its second choice. From probabilities of
old images, each by a head that had not seen it, labels are drawn as the model itself expects its errors, and their mean
surprise (minus the log of the probability of a label) is compared with that of the batch's disagreeing labels. A batch
that is more surprising than all but 1 % of 2,000 such draws either has wrong labels, or its photos are of a kind that
the model does not know (another camera). These two are told apart by whether the labels can be predicted: by heads that
learnt from the old images and the rest of the batch, more often than all but 1 % of 2,000 permutations of the batch's
labels are. A batch that is surprising and not predictable is held for somebody to look at. Labels that are wrong in a
consistent way can be predicted; they make the old images worse.

Of 60 batches with shuffled labels on three image sets none was promoted, of 60 with right ones 54 (the others wait);
``scripts/bench_refit.py`` measures it, and ``featx guide benchmarks`` has the table.

Permutation tests of classifiers: Ojala and Garriga, "Permutation Tests for Studying Classifier Performance", JMLR 11
(2010).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from featx._arrays import PIXELS, Index
from featx.backbones import BATCH_SIZES, load_backbone, make_engine
from featx.errors import UsageError, plural
from featx.evaluation import points, stats
from featx.extraction import Embedder, Lane, extract_lanes
from featx.heads import Array, Layers, read_layers, softmax
from featx.images import CENTER, ImageSet, file_ref
from featx.models.agreement import Rule, Voted, vote
from featx.models.bundle import Bundle
from featx.models.calibrate import fit_sharpness
from featx.models.corrections import Correction, Corrections, last_words
from featx.models.fit import HeldOut, fit_features, pack_bundle, scores_without
from featx.models.versions import Versions, held_words
from featx.store import FeatureSet, Pictures, backbones_of, check_same

Verdict: TypeAlias = Literal["better", "cannot tell", "worse"]
Outcome: TypeAlias = Literal["promoted", "waits", "refused", "held", "nothing"]
"""What became of a batch: "waits" has no evidence for it, "refused" has evidence against it."""

DRAWS = 2000
LEVEL = 0.01
"""Share of honest batches that are more surprising than is let pass, and of random labels that count as predictable."""

_TESTED = 1000
"""Most photos of a batch that these tests look at."""

_LEAST = 3
"""Labels that disagree with the model from which on they can be suspicious together."""

_FEW = 100
"""New photos up to which they are embedded one by one: compiling networks for batches takes more than it saves."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Compared:
    """How old and new images together compare with the old ones alone: differences in accuracy on held-out images.

    Attributes
    ----------
    everything, old, new : of all images, of the old ones and of the batch; None where there is only one.
    surprise, predictable : p of a batch at least as surprising, and of labels at least as predictable if they had
        nothing to do with the photos; None where it could not be tested.
    disagreeing, tested : labels of the batch that are not what the old images say, and all that were looked at.
    converged : whether every fit on the old images reached its optimum.
    """

    everything: stats.Difference | None
    old: stats.Difference | None
    new: stats.Difference | None
    surprise: float | None
    predictable: float | None
    disagreeing: int
    tested: int
    converged: bool = True

    @property
    def verdict(self) -> Verdict:
        """What may be said of the new model at a 5 % error rate."""
        verdicts = [_verdict(each) for each in (self.everything, self.old)]
        return "worse" if "worse" in verdicts else verdicts[0]

    @property
    def learnable(self) -> bool:
        """Whether the labels can be predicted, so that they have to do with the photos."""
        return self.predictable is not None and self.predictable < LEVEL

    @property
    def points_down(self) -> bool:
        """Whether the new model is worse as far as can be seen, or nothing can be."""
        return self.everything is None or self.everything.interval.mean < 0

    @property
    def suspicious(self) -> bool:
        """Whether the labels disagree with the model as its errors do not, and cannot be predicted either."""
        surprising = self.surprise is not None and self.surprise < LEVEL
        return surprising and not self.learnable

    @property
    def outcome(self) -> Outcome:
        """What becomes of the batch, unless somebody overrules it."""
        if self.suspicious:
            return "held"
        if self.verdict == "worse":
            return "refused"
        sound = self.verdict == "better" or (self.learnable and not self.points_down)
        return "promoted" if sound else "waits"

    def without_doubt(self) -> Compared:
        """The same of a batch that somebody has looked at and found right."""
        return replace(self, surprise=None, predictable=0.0)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""

        def of(each: stats.Difference | None) -> dict[str, Any] | None:
            return None if each is None else {**each.interval.to_json(), "p": each.p, "verdict": _verdict(each)}

        return {
            "verdict": self.verdict, "all": of(self.everything), "old": of(self.old), "new": of(self.new),
            "surprise_p": self.surprise, "predictable_p": self.predictable, "disagreeing": self.disagreeing,
            "tested": self.tested, "suspicious": self.suspicious,
        }  # fmt: skip


def _verdict(each: stats.Difference | None) -> Verdict:
    if each is None or not each.p < 0.05:
        return "cannot tell"
    return "better" if each.interval.mean > 0 else "worse"


@dataclass(frozen=True)
class Refit:
    """What a refit came to.

    Attributes
    ----------
    outcome : what became of the batch.
    version : the one that is current now.
    batch : what it is called, where it is held.
    photos : of the batch, with what people say of them.
    compared : the evidence.
    notes : sentences on what was left out, and why.
    """

    outcome: Outcome
    version: str
    batch: str | None = None
    photos: tuple[Voted, ...] = ()
    compared: Compared | None = None
    embedded: int = 0
    notes: tuple[str, ...] = ()
    forced: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "outcome": self.outcome, "version": self.version, "batch": self.batch, "new_photos": len(self.photos),
            "embedded": self.embedded, "forced": self.forced,
            "evidence": None if self.compared is None else self.compared.to_json(), "notes": list(self.notes),
        }  # fmt: skip

    def sentence(self) -> str:
        """The evidence in words."""
        if self.compared is None or self.compared.everything is None:
            return "Nothing could be held out, so the two could not be compared."
        found = self.compared
        parts = [
            f"{points(each.interval)} on {name}"
            for name, each in (
                ("photos like the old ones", found.everything),
                ("old photos", found.old),
                ("new photos", found.new),
            )
            if each is not None
        ]
        return f"{found.verdict}: {', '.join(parts)}, all held out"


def refit(
    versions: Versions,
    store: Path,
    embedder: Embedder,
    *,
    who: str,
    rule: Rule = "majority",
    force: bool = False,
    random_state: int = 0,
    progress: Progress | None = None,
) -> Refit:
    """Fit the current version again with the corrections that it has not learnt, and switch to it on evidence.

    Call it inside :meth:`Versions.changing`.

    Parameters
    ----------
    versions : of the feedback folder.
    store : what the first version was fitted on.
    embedder : of the current version.
    who : for the audit log.
    rule : which label a photo has that several people have labelled.
    force : promote whatever the evidence says.
    random_state : seed of folds and draws.
    progress : called as ``progress(done, total, what)``.

    Raises
    ------
    UsageError, MismatchError
        The store is not one that the model can have been fitted on.
    """
    tell = progress or (lambda *_: None)
    current = versions.current
    assert current is not None, "there is a version to fit again"
    bundle = versions.read(current)
    if bundle.tail is not None:
        raise UsageError(
            "a fine-tuned model cannot be fitted again on corrections", where=versions.path(current),
            hint="Fine-tune it again with the list that GET /feedback?format=csv gives.",
        )  # fmt: skip
    words = usable(Corrections(versions.folder).all, versions)
    voted, learnt = vote(words, rule), versions.learnt(current)
    notes = [f"Held until somebody has looked at them: {held_words(versions.held)}."] if versions.held else []
    if bundle.metrics.get("unlabelled_images"):
        notes.append("The first version learnt from unlabelled images, too; a refit does not.")
    disputed = sum(each.label is None for each in voted)
    if disputed:
        notes.append(f"Left out, since people disagree: {plural(disputed, 'photo')}.")
    fresh = [each for each in voted if any(word.n not in learnt for word in each.said)]
    if not any(each.label is not None for each in fresh):
        return Refit("nothing", current, notes=tuple(notes))
    tell(0, 1, "embedding new photos")
    embedded, own = _embed(versions.folder, voted, embedder)
    tell(1, 1, "embedding new photos")
    names = blocks_of(bundle)
    old, layers = read_layers(store, names)
    for ours, theirs in zip(backbones_of(old.provenance), backbones_of(bundle.provenance), strict=True):
        check_same(ours, theirs, store, whose="the model's")
    added, _ = read_layers(own, names)
    joined, is_new, waiting = join(old, added, voted, fresh)
    notes += [f"Left out until there are two photos of it: {name}." for name in waiting]
    photos = tuple(each for each in fresh if each.label is not None and each.label not in waiting)
    if not is_new.any():
        return Refit("nothing", current, embedded=embedded, notes=tuple(notes))
    columns = layers if len(layers.names) > 1 else None
    fitted = fit_features(
        joined, heads=(bundle.head,), max_error=bundle.max_error, max_unknown=bundle.max_unknown or 0.0,
        prior=None if bundle.prior is None else dict(bundle.prior), random_state=random_state, layers=columns,
        progress=tell,
    )  # fmt: skip
    use = np.flatnonzero(joined.splits != "test")  # as fit_features does
    compared = compare(fitted.held_out, is_new[use], fitted.head, columns, random_state)
    if not compared.converged:
        notes.append("A fit on the old photos, for the comparison, stopped before its optimum.")
    evidence = compared.to_json()
    numbers = [word.n for each in voted if each.label not in waiting for word in each.said]
    batch = sorted(word.n for each in fresh if each.label not in waiting for word in each.said if word.n not in learnt)
    if set(batch) <= versions.settled("released"):
        compared = compared.without_doubt()

    def told(outcome: Outcome, **fields: Any) -> Refit:
        return Refit(
            outcome, str(versions.current), photos=photos, compared=compared, embedded=embedded, notes=tuple(notes),
            **fields,
        )  # fmt: skip

    outcome = compared.outcome
    if outcome == "held" and not force:
        return told("held", batch=versions.hold(batch, evidence, who))
    if outcome != "promoted" and not force:
        versions.log(outcome, who, corrections=batch, evidence=evidence)
        return told(outcome)
    tell(0, 1, "packing")
    made = pack_bundle(fitted, joined, embedder, with_network=bool(bundle.graphs))
    about = {"before": current, "corrections": len(numbers), **evidence}
    made = replace(made, metrics={**made.metrics, "refit": about})
    forced = outcome != "promoted"
    versions.promote(made, numbers, evidence, who, forced=forced)
    return told("promoted", forced=forced)


def batch_sizes(versions: Versions) -> dict[str, int] | None:
    """How many images a network is to be opened for, by device, to embed what no refit has looked at; None as usual."""
    last = versions.considered
    fresh = {each.sha256 for each in Corrections(versions.folder).all if each.n > last}
    return {**BATCH_SIZES, "cpu": 1} if len(fresh) <= _FEW else None


def usable(corrections: Iterable[Correction], versions: Versions) -> list[Correction]:
    """The last word of each person on each photo, of the corrections that are neither held nor discarded."""
    out = versions.settled("discarded").union(*versions.held.values())
    return last_words(each for each in corrections if each.n not in out)


def blocks_of(bundle: Bundle) -> list[str]:
    """The blocks that a model's embeddings are made of, as stores call them."""
    parts = backbones_of(bundle.provenance)
    if len(parts) == 1 and bundle.layer in parts[0]["layers"]:
        return [f"{parts[0]['backbone']}/{bundle.layer}"]
    return [f"{each['backbone']}/{layer}" for each in parts for layer in each["layers"]]


def _embed(folder: Path, voted: Sequence[Voted], embedder: Embedder) -> tuple[int, Path]:
    """How many photos were new to the store of the feedback folder, and the store."""
    root = folder / "images"
    refs = []
    for each in sorted(voted, key=lambda photo: photo.file):
        path = root / each.file
        refs.append(file_ref(each.file, path, each.label, "", path.stat() if path.exists() else None))
    lanes = [Lane.of(each.backbone, each.engine, each.looks.views, each.decode) for each in embedder.members]
    pixels = load_backbone(PIXELS)
    lanes.append(Lane.of(pixels, make_engine(pixels), CENTER, embedder.decode))
    store = folder / "store.featx"
    done = extract_lanes(ImageSet(tuple(refs), root), lanes, store, max_bad=1.0, replace_images=True)
    return done.embedded, store


def join(
    old: FeatureSet, added: FeatureSet, voted: Sequence[Voted], fresh: Sequence[Voted]
) -> tuple[FeatureSet, NDArray[np.bool_], list[str]]:
    """Old images and corrected ones with the labels that they have now.

    Parameters
    ----------
    old, added : of the store, and of the feedback folder's.
    voted : the corrected photos; a photo of the store that was corrected has the new label, or none.
    fresh : those of the batch.

    Returns
    -------
    The features, which rows (n,) are of the batch and have a label, and new classes that have a single photo, whose
    photos have no label yet.
    """
    said = {bytes.fromhex(each.sha256): each.label for each in voted}
    batch = {bytes.fromhex(each.sha256) for each in fresh}
    labelled = {old.class_names[i] for i in np.unique(old.labels[old.labels >= 0]).tolist()}
    known = {row.tobytes() for row in old.digests}
    counts: dict[str, int] = {}
    for label in said.values():
        if label is not None and label not in labelled:
            counts[label] = counts.get(label, 0) + 1
    waiting = sorted(name for name, count in counts.items() if count < 2)
    names = (*old.class_names, *sorted({*counts} - {*old.class_names} - {*waiting}))
    number = {name: place for place, name in enumerate(names)}
    number.update(dict.fromkeys(waiting, -1))
    rows = np.flatnonzero([row.tobytes() not in known for row in added.digests])
    digests = np.concatenate([old.digests, added.digests[rows]])
    before = [*old.labels.tolist(), *[-1] * len(rows)]
    keys = [row.tobytes() for row in digests]
    labels = [
        (-1 if said[key] is None else number[str(said[key])]) if key in said else label
        for key, label in zip(keys, before, strict=True)
    ]
    splits = np.concatenate([old.splits, np.full(len(rows), "", dtype=old.splits.dtype)])
    pictures = old.near_copies, added.near_copies
    hashes = pixels = None
    if all(isinstance(each, Pictures) for each in pictures):
        hashes, pixels = (
            np.concatenate([getattr(old, name), getattr(added, name)[rows]]) for name in ("hashes", "pixels")
        )
    joined = replace(
        old,
        embeddings=np.concatenate([old.embeddings, added.embeddings[rows]]),
        ids=np.concatenate([old.ids, added.ids[rows]]), labels=np.array(labels, np.int64), class_names=names,
        splits=splits, digests=digests, hashes=hashes, pixels=pixels,
        groups=np.concatenate([old.groups, np.full(len(rows), "", dtype=old.groups.dtype)]), metadata={},
    )  # fmt: skip
    is_new = np.array([key in batch for key in keys]) & (joined.labels >= 0) & (splits != "test")
    return joined, is_new, waiting


# --- evidence -----------------------------------------------------------------------------------------------------


def compare(
    held_out: HeldOut | None, is_new: NDArray[np.bool_], head: str, layers: Layers | None, random_state: int
) -> Compared:
    """How heads that learnt from all images compare with heads that learnt from the old ones alone.

    Parameters
    ----------
    held_out : what heads that learnt from all of the other folds say; None where nothing could be held out.
    is_new : (n,) which of its images are the batch.
    head, layers, random_state : as they were fitted.
    """
    if held_out is None:
        return Compared(None, None, None, None, None, 0, 0)
    data = held_out.data
    is_new = is_new[data.rows]
    before, converged = scores_without(held_out, is_new, head, layers, random_state)
    now, was = held_out.scores.argmax(axis=1) == data.labels, before.argmax(axis=1) == data.labels
    gained = now.astype(np.float64) - was.astype(np.float64)
    apart = data.groups if held_out.apart is None else held_out.apart
    everything = stratified_difference(now, was, ~is_new, apart)
    old, new = _difference(gained[~is_new], apart[~is_new]), _difference(gained[is_new], apart[is_new])
    rng = np.random.default_rng([random_state, 1])
    rows = np.flatnonzero(is_new)
    rows = np.sort(rng.permutation(rows)[:_TESTED])
    surprise, disagreeing = _surprise(before, data.labels, is_new, rows, rng)
    named = held_out.scores.argmax(axis=1)
    predictable = _predictable(named[rows], data.labels[rows], named[~is_new], rng)
    return Compared(everything, old, new, surprise, predictable, disagreeing, len(rows), converged)


def stratified_difference(
    now: NDArray[np.bool_], was: NDArray[np.bool_], drawn: NDArray[np.bool_], apart: Index
) -> stats.Difference | None:
    """How much accuracy changes, where some images were chosen for being named wrong.

    Images that were named right and those that were named wrong are counted apart, and weighted as among those that
    nobody chose: by the error rate there (with one right and one wrong more, Laplace). The interval is Student's over
    ``apart``, of the linearised estimate (post-stratification: Saerndal, Swensson and Wretman, "Model Assisted Survey
    Sampling", 1992, 7.6).

    Parameters
    ----------
    now, was : (n,) whether an image is named right by the new and by the former.
    drawn : (n,) images that nobody chose.
    apart : (n,) images with the same number count as one.
    """
    places = np.unique(apart, return_inverse=True)[1].reshape(-1)
    m = int(places.max(initial=-1)) + 1
    if m < 2 or not drawn.any():
        return None
    gained = now.astype(np.float64) - was.astype(np.float64)
    n = int(drawn.sum()) + 2
    error = (1 + int((drawn & ~was).sum())) / n
    lost, won = (float(gained[each].mean()) if each.any() else 0.0 for each in (was, ~was))
    mean = (1 - error) * lost + error * won
    effect = np.where(was, (1 - error) * (gained - lost) / max(was.sum(), 1), 0.0)
    effect += np.where(~was, error * (gained - won) / max((~was).sum(), 1), 0.0)
    effect += np.where(drawn, (won - lost) * (~was - error) / n, 0.0)
    values = mean + m * np.bincount(places, weights=effect, minlength=m)
    return stats.mean_difference(values.astype(np.float64))


def _difference(gained: Array, apart: Index) -> stats.Difference | None:
    if len(gained) < 2 or len(np.unique(apart)) < 2:
        return None
    return stats.mean_difference(stats.site_values(gained, apart)[1])


def _surprise(
    before: Array, labels: NDArray[np.int64], is_new: NDArray[np.bool_], rows: Index, rng: np.random.Generator
) -> tuple[float | None, int]:
    """P that labels which disagree are as surprising, if they are errors that the model expects; and their number."""
    old = np.flatnonzero(~is_new)
    known = np.unique(labels[old])
    place = np.full(before.shape[1], -1)
    place[known] = np.arange(len(known))
    judged = before[:, known]
    # A class that is in one fold alone was not known to the head that judged it.
    old = old[np.isfinite(judged[old]).all(axis=1)]
    rows = rows[(place[labels[rows]] >= 0) & np.isfinite(judged[rows]).all(axis=1)]
    rows = rows[judged[rows].argmax(axis=1) != place[labels[rows]]]
    if len(rows) < _LEAST or len(known) < 2 or not len(old):
        return None, len(rows)
    sharpness = fit_sharpness(judged[old], place[labels[old]])
    expected, found = softmax(judged[old], sharpness), softmax(judged[rows], sharpness)
    wrong = expected.copy()
    wrong[np.arange(len(old)), expected.argmax(axis=1)] = 0.0
    weights = np.cumsum(wrong.reshape(-1))
    tiny = np.finfo(np.float64).tiny
    errors = -np.log(np.maximum(expected.reshape(-1), tiny))
    drawn = np.searchsorted(weights, weights[-1] * rng.random((DRAWS, len(rows))), side="right")
    means = errors[np.minimum(drawn, len(errors) - 1)].mean(axis=1)
    own = float(-np.log(np.maximum(found[np.arange(len(rows)), place[labels[rows]]], tiny)).mean())
    return float((1 + (means >= own).sum()) / (DRAWS + 1)), len(rows)


def _predictable(predicted: Index, labels: NDArray[np.int64], others: Index, rng: np.random.Generator) -> float:
    """P that as many labels (n,) are predicted, if they had nothing to do with the photos.

    Labels that are all the same cannot be permuted: then what is predicted of ``others`` takes the place of what is
    predicted of these photos.
    """
    hits = int((labels == predicted).sum())
    if len(np.unique(labels)) < 2:
        share = (1 + (others == labels[0]).sum()) / (2 + len(others))
        return float(binom.sf(hits - 1, len(labels), share))
    shuffled = rng.permuted(np.broadcast_to(labels, (DRAWS, len(labels))), axis=1)
    return float((1 + ((shuffled == predicted).sum(axis=1) >= hits).sum()) / (DRAWS + 1))
