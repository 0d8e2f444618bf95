"""Compare heads on embeddings: many small draws, the same for every head, everything chosen inside them.

Takes arrays, not paths. A *trial* is one head on one episode; each episode draws a support of
``n_shots`` rows per class and is judged on the rest. See :mod:`featx.evaluation.splits` for the draws,
:mod:`featx.heads.selection` for what is chosen inside the support and :mod:`featx.evaluation.stats` for the intervals.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn import config_context
from sklearn.pipeline import Pipeline
from threadpoolctl import threadpool_limits

from featx._arrays import NEAR, PIXELS, Index
from featx.errors import UsageError, plural
from featx.evaluation.journal import Journal, Outcome, Task, plan_hash
from featx.evaluation.labelled import LabelledRows
from featx.evaluation.results import SweepResult, Trial
from featx.evaluation.splits import Shots, draw, plan_shots, shots_label
from featx.evaluation.workers import worker_pool
from featx.heads import (
    HEADS,
    Centre,
    Head,
    Kind,
    Layers,
    Logistic,
    Views,
    check_device,
    fit_chosen,
    heads_for,
    is_large,
    of_one_class,
    row_blocks,
)
from featx.heads.solvers import blocks as large
from featx.store import Alike

DEFAULT_SHOTS: tuple[Shots, ...] = (1, 2, 5, 10, 20, "all")
Progress = Callable[[int, int, str], None]

_HEAD_START = 3
"""Chunks that are made before workers are started: two draws of each of the first n_shots."""

Baseline = tuple[Head, NDArray[np.float32]]
"""A head that is judged beside the others, and the rows (n, p) that it is given instead of embeddings."""


def sweep_heads(
    embeddings: NDArray[np.floating],
    labels: ArrayLike,
    *,
    class_names: Sequence[str],
    groups: ArrayLike | None = None,
    heads: Sequence[str] | None = None,
    shots: Sequence[Shots] | None = None,
    episodes: int = 20,
    random_state: int = 0,
    n_jobs: int | None = None,
    near_duplicates: Alike = NEAR,
    centre: Centre | None = None,
    pool: NDArray[np.floating] | None = None,
    layers: Layers | None = None,
    on: Sequence[str] | None = None,
    pixels: NDArray[np.integer] | None = None,
    device: str | None = None,
    journal: str | Path | None = None,
    seconds: float | None = None,
    partial: Callable[[SweepResult], None] | None = None,
    progress: Progress | None = None,
    sites: ArrayLike | None = None,
    group_name: str = "group",
) -> SweepResult:
    """Compare heads by repeated few-shot draws, all choices inside the support.

    Parameters
    ----------
    embeddings : (n, d), finite.
    labels : (n,) in 0 .. c-1; rows with a negative label are left out.
    class_names : c names, of which those without any row are left out.
    groups : (n,) rows with the same value are exact copies (e.g. equal digests).
    heads : names of :data:`featx.heads.catalogue.HEADS` or "auto"; all of them by default.
    shots : by default 1, 2, 5, 10, 20 and "all", less those that half of the classes cannot give. At each, the classes
        that have the images are compared; ``notes`` name the others. Shots that fewer than two classes can give are an
        error.
    episodes : draws for each n_shots.
    random_state : seed of the draws and folds; the result does not depend on ``n_jobs``.
    n_jobs : joblib workers, one BLAS thread each; by default one for each core. Large embeddings
        (:func:`featx.heads.solvers.blocks.is_large`) have one worker with as many threads.
    near_duplicates : what makes two images copies: their pictures, or a cosine from which on; None looks for exact
        copies only.
    centre : a mean from elsewhere that heads measure from (:mod:`featx.heads.unlabelled`); ``notes`` then say which.
    pool : (m, d) embeddings of images without labels, of which ``centre`` is the mean: adds the head "ridge_pool".
    layers : which columns of the embeddings are which block's, to compare heads on several of them.
    on : the blocks to compare, of which the whole may be one; see :meth:`featx.heads.layers.Layers.heads`.
    pixels : (n, p) array of uint8, thumbnails of the images: the recommended head on them is judged on the same draws,
        as a baseline that can win nothing.
    device : of torch, such as "cuda", for logistic regression on a large support; everything else is the CPU's.
    journal : file of finished draws, from which an interrupted sweep of the same data and plan goes on;
        removed at the end. Seconds in trials that were resumed are those of their first run.
    seconds : no draw is begun when so many have passed; what was not drawn is in ``missing``, and the journal is kept.
        Two draws of the first n_shots are always made.
    partial : called with what is known so far, again and again from the second draw on.
    progress : called as ``progress(done, total, what)``.
    sites : (n,) rows with the same value belong together, "" or a negative number is a row by itself: support and query
        then share none (:class:`featx.evaluation.splits.GroupKShotSplit`), nor do the folds inside the support where it
        has enough of them. Intervals are over sites and draws: where another study of as many sites would find the
        mean, and not where a single new site would lie (:mod:`featx.evaluation.forecast`).
    group_name : what one of them is, such as "camera".

    Raises
    ------
    UsageError
        Fewer than two classes, a class with too few images, an unknown head, or arrays that do not fit.
    """
    started = time.perf_counter()
    catalogue = heads_for(centre, pool)
    if layers is None:
        chosen = {catalogue[name].name: catalogue[name] for name in (catalogue if heads is None else heads)}
    else:
        _check_layers(layers, embeddings, centre)
        chosen = layers.heads(catalogue, heads, on)
    names = tuple(chosen)
    if not names:
        raise UsageError("no head to compare", expected=", ".join(catalogue))
    if episodes < 1:
        raise UsageError("a sweep needs at least one episode", found=episodes)
    if device is not None:
        check_device(device)
    if progress and is_large(embeddings):
        progress(0, 1, "looking for duplicates")
    columns = None if layers is None else layers.columns(layers.reference)
    data = LabelledRows.of(
        embeddings, labels, class_names, groups=groups, near_duplicates=near_duplicates, columns=columns, sites=sites
    )
    if shots is not None and not shots:
        raise UsageError("no n_shots to sweep", expected="numbers of images of each class, or all")
    wanted, notes = plan_shots(
        data.labels, data.groups, data.class_names, shots=shots, default=DEFAULT_SHOTS,
        sites=data.sites, group_name=group_name,
    )  # fmt: skip
    tasks = [(n_shots, episode) for n_shots in wanted for episode in range(episodes)]
    done: dict[Task, Outcome] = {}
    kept = None
    if journal is not None:
        settings = [(head, head.default) for head in chosen.values()]
        elsewhere = joblib.hash((centre and centre.mean, pool, device, pixels, data.sites))
        plan = plan_hash(data.embeddings, data.labels, data.groups, [*settings, elsewhere], random_state)
        kept = Journal(Path(journal), plan)
        done = {task: outcome for task, outcome in kept.done.items() if task in set(tasks)}
    left = [task for task in tasks if task not in done]
    baseline: Baseline | None = None
    if pixels is not None:
        pictures = np.asarray(pixels)[data.rows].astype(np.float32) / np.float32(255)
        baseline = replace(HEADS["auto"], name=PIXELS, layer=PIXELS), pictures

    def is_over() -> bool:
        return seconds is not None and time.perf_counter() - started > seconds and bool(_drawn(wanted, done))

    def known() -> SweepResult:
        drawn = _drawn(wanted, done)
        some = [task for task in tasks if task in done and task[0] in drawn]
        by_head = {(t.head, t.n_shots, t.episode): t for task in some for t in done[task][0]}
        trials = tuple(by_head[head, *task] for head in names for task in some)
        counts = Counter(n_shots for n_shots, _ in some)
        missing = {n_shots: episodes - counts[n_shots] for n_shots in wanted if counts[n_shots] < episodes}
        return SweepResult(
            heads=names,
            shots=drawn,
            episodes=episodes,
            class_names=data.class_names,
            labels=data.labels,
            rows=data.rows,
            trials=trials,
            recommended=HEADS["auto"].name,
            pixels=() if pixels is None else tuple(by_head[PIXELS, *task] for task in some),
            queries={task: done[task][1] for task in some},
            duplicates=data.duplicates,
            notes=(
                *data.notes,
                *_conflict_notes(data),
                *data.duplicates.notes,
                *notes,
                *(kept.notes if kept else ()),
                *([centre.told] if centre else []),
                *_device_notes(device, chosen, trials, data),
                *_convergence_notes(trials),
            ),
            random_state=random_state,
            seconds=time.perf_counter() - started,
            missing=missing,
            sites=data.sites,
            group_name=group_name,
        )

    compared = tuple(chosen.values())
    for some in _run(data, compared, baseline, left, len(done), random_state, n_jobs, device, progress, is_over):
        for task, outcome in some:
            done[task] = outcome
            if kept:
                kept.add(task, outcome)
        if partial and _drawn(wanted, done):
            partial(known())
    if kept and len(done) == len(tasks):
        kept.close()
    return known()


def _drawn(wanted: Sequence[Shots], done: Collection[Task]) -> tuple[Shots, ...]:
    """The n_shots with two draws or more: fewer tell nothing about the spread."""
    counts = Counter(n_shots for n_shots, _ in done)
    return tuple(n_shots for n_shots in wanted if counts[n_shots] >= 2)


def _check_layers(layers: Layers, embeddings: NDArray[np.floating], centre: Centre | None) -> None:
    if embeddings.shape[1] != sum(layers.sizes.values()):
        raise UsageError("embeddings and layers do not fit", expected=dict(layers.sizes), found=embeddings.shape)
    if centre is not None and len(layers.sizes) > 1:
        raise UsageError("images without labels can be learnt from on one layer at a time", found=layers.names)


def _run(
    data: LabelledRows,
    heads: tuple[Head, ...],
    baseline: Baseline | None,
    tasks: list[Task],
    already: int,
    random_state: int,
    n_jobs: int | None,
    device: str | None,
    progress: Progress | None,
    is_over: Callable[[], bool],
) -> Iterator[list[tuple[Task, Outcome]]]:
    """Outcomes of all tasks, in chunks, so that any joblib backend can report progress.

    Two draws of each n_shots come first, then a few of each in turn, so that what is known early is of all of them. The
    very first are made here, while workers would still be starting.
    """
    n_workers = joblib.cpu_count() if n_jobs is None else joblib.effective_n_jobs(n_jobs)
    # Each worker holds rows of its own: where they are large, one worker with all threads takes draw by draw.
    n_workers, threads = (1, n_workers) if is_large(data.embeddings) else (n_workers, 1)
    each = 4 * n_workers if n_workers > 1 else 1
    chunks = _in_turn(tasks, each)
    arguments = data.embeddings, data.labels, data.groups, heads, baseline, random_state, threads, device, data.sites
    count = already

    def tell(some: Sequence[Task]) -> None:
        if progress:
            progress(count, already + len(tasks), f"{shots_label(some[0][0])}, draw {some[0][1] + 1}")

    first = chunks[: _HEAD_START if n_workers > 1 and len(chunks) > _HEAD_START else 0]
    for some in first:
        if is_over():
            return
        tell(some)
        yield [(task, _episode(*arguments, *task)) for task in some]
        count += len(some)
    with worker_pool(max(1, min(n_workers, len(tasks)))) as pool:
        for some in chunks[len(first) :]:
            if is_over():
                return
            tell(some)
            outcomes = pool(joblib.delayed(_episode)(*arguments, *task) for task in some)
            yield list(zip(some, outcomes, strict=True))
            count += len(some)
    if progress:
        progress(count, count, "done")


def _in_turn(tasks: Sequence[Task], each: int) -> list[list[Task]]:
    """Tasks of one n_shots, at most ``each`` of them, in the order in which they are done."""
    chunks: dict[tuple[int, int], list[Task]] = {}
    places = {n_shots: place for place, n_shots in enumerate(dict.fromkeys(n_shots for n_shots, _ in tasks))}
    for n_shots, episode in tasks:
        turn = 0 if episode < 2 else 1 + (episode - 2) // each
        chunks.setdefault((turn, places[n_shots]), []).append((n_shots, episode))
    return [chunk[i : i + each] for _, chunk in sorted(chunks.items()) for i in range(0, len(chunk), each)]


def _episode(
    embeddings: NDArray[np.floating],
    labels: NDArray[np.int64],
    groups: Index,
    heads: tuple[Head, ...],
    baseline: Baseline | None,
    random_state: int,
    threads: int,
    device: str | None,
    sites: Index | None,
    n_shots: Shots,
    episode: int,
) -> Outcome:
    """All heads on one draw."""
    support, query = draw(n_shots, labels, groups, sites, seeds=(random_state, episode))
    together = None if sites is None else sites[support]
    local = np.unique(groups[support], return_inverse=True)[1]
    classes, known = np.unique(labels[support], return_inverse=True)
    truth = np.searchsorted(classes, labels[query])
    # Finite they are (LabelledRows); nobody has to look again for each head.
    with threadpool_limits(limits=threads, user_api="blas"), config_context(assume_finite=True):
        shared: dict[tuple[int, int] | None, tuple[Views, _Query]] = {}
        trials = []
        for head in heads:
            if head.columns not in shared:
                rows = head.seen(embeddings)
                shared[head.columns] = Views(rows[support], head.mean), _Query(rows[query])
        compared = [(head, *shared[head.columns]) for head in heads]
        if baseline is not None:
            head, rows = baseline
            compared.append((head, Views(rows[support]), _Query(rows[query])))
        for head, views, asked in compared:
            started = time.perf_counter()
            choice, pipeline = fit_chosen(
                head, views, known, local, random_state=[random_state, episode], device=device, sites=together
            )
            seconds = time.perf_counter() - started
            probabilities = asked.judge(pipeline, "predict_proba") if head.probabilistic else None
            named = asked.judge(pipeline, "predict") if probabilities is None else probabilities.argmax(axis=1)
            trials.append(
                Trial.of(
                    truth, named, probabilities, classes,
                    head=head.name, layer=head.layer, n_shots=n_shots, episode=episode, n_support=len(support),
                    params=choice.params, selection_score=choice.score, converged=choice.converged,
                    fit_seconds=seconds,
                )
            )  # fmt: skip
    return trials, query


class _Query:
    """Rows to be judged, normalised once for all heads that agree on how; large ones block by block for each head."""

    def __init__(self, rows: NDArray[np.floating]) -> None:
        self.rows = rows if is_large(rows) else rows.astype(np.float64)
        self._done: dict[Kind, NDArray[np.float64]] = {}

    def judge(self, pipeline: Pipeline, method: str) -> NDArray[Any]:
        """What ``pipeline.predict_proba`` or ``predict`` gives for the rows."""
        if is_large(self.rows):
            return np.concatenate([getattr(pipeline, method)(self.rows[part]) for part in row_blocks(len(self.rows))])
        normaliser, model = pipeline.named_steps.values()
        if normaliser.kind not in self._done:
            self._done[normaliser.kind] = normaliser.transform(self.rows)
        return np.asarray(getattr(model, method)(self._done[normaliser.kind]))


def _conflict_notes(data: LabelledRows) -> list[str]:
    own = of_one_class(data.labels, data.groups)
    if own.all():
        return []
    copied = plural(int((~own).sum()), "image")
    return [f"Left out: {copied} with copies in another class; featx duplicates lists them."]


def _device_notes(device: str | None, heads: dict[str, Head], trials: Sequence[Trial], data: LabelledRows) -> list[str]:
    if device is None:
        return []
    features = data.embeddings.shape[1]
    fits = [t for t in trials if heads[t.head].estimator is Logistic and t.n_support * features >= large.LARGE]
    if fits:
        return [f"{plural(len(fits), 'logistic regression')} solved on {device}, everything else on the CPU."]
    return [f"Nothing was solved on {device}: no support of logistic regression had {large.LARGE:,} numbers or more."]


def _convergence_notes(trials: Sequence[Trial]) -> list[str]:
    notes = []
    for head in dict.fromkeys(t.head for t in trials):
        own = [t for t in trials if t.head == head]
        failed = sum(not t.converged for t in own)
        if failed:
            notes.append(f"{head} did not converge in {failed} of {plural(len(own), 'trial')}.")
    return notes
