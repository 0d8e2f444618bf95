"""Fine-tuning the last blocks of a backbone, compared with heads on frozen embeddings on the very same draws.

The frozen part runs once over every image (:mod:`featx.adaptation.activations`); what is trained, the last blocks and a
head (:mod:`featx.adaptation.training`), starts from there for each draw anew. Draws, duplicates and intervals are those
of a sweep, so that the result is one: a :class:`featx.evaluation.results.SweepResult` with one competitor more. A
network trained from random weights (``from_scratch``) is the control: how much is owed to the pretraining?

Fine-tuning sees the centre crop only. Heads are compared on the store's embeddings as they are, whatever their views.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featx._arrays import Index
from featx.adaptation import training
from featx.adaptation.activations import MAX_GIB, Wanted, activations
from featx.adaptation.training import Recipe
from featx.backbones import Backbone, Halves, Own, Trunk, Unfreeze, cut_network, load_backbone, make_engine
from featx.errors import MismatchError, SourceError, UsageError, plural
from featx.evaluation import (
    Comparison,
    Journal,
    LabelledRows,
    Shots,
    SweepResult,
    Task,
    Trial,
    draw,
    plan_hash,
    reached,
    shots_label,
    splits,
    stats,
    sweep_heads,
)
from featx.heads import softmax
from featx.images import ImageSet
from featx.store import FeatureSet

SCRATCH = "scratch"
DEFAULT_SHOTS: tuple[Shots, ...] = (5, 20)

Progress = Callable[[int, int, str], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class FinetuneResult:
    """Fine-tuning beside heads.

    Attributes
    ----------
    sweep : all of them on the same draws; ``head`` names fine-tuning among its heads.
    head : "finetune:N", "finetune:all" or "scratch".
    cut : first trained module; "" for all of the network.
    parameters : how many numbers of the network are trained.
    cached_bytes : of the activations.
    trunk_seconds : for the activations of all images.
    draw_seconds : mean over draws, of training and judging.
    device : "cpu" or "cuda".
    """

    sweep: SweepResult
    head: str
    cut: str
    parameters: int
    cached_bytes: int
    trunk_seconds: float
    draw_seconds: float
    device: str

    def against_best(self) -> list[Comparison]:
        """Fine-tuning minus the best head, at every n_shots. The best was chosen on these draws."""
        found = []
        for n_shots in self.sweep.shots:
            best = next(r.head for r in self.sweep.results if r.n_shots == n_shots and r.head != self.head)
            each = next(c for c in self.sweep.comparisons if (c.a, c.b, c.n_shots) == (best, self.head, n_shots))
            was = each.difference
            interval = stats.Interval(-was.interval.mean, -was.interval.high, -was.interval.low)
            found.append(Comparison(self.head, best, n_shots, replace(was, interval=interval)))
        return found

    def to_json(self) -> dict[str, Any]:
        """What ``featx finetune --json`` prints: a sweep's fields, and those of fine-tuning."""
        return {
            **self.sweep.to_json(),
            "finetune": {
                "head": self.head,
                "cut": self.cut or "input",
                "trained_parameters": self.parameters,
                "cached_bytes": self.cached_bytes,
                "trunk_seconds": self.trunk_seconds,
                "draw_seconds": self.draw_seconds,
                "device": self.device,
                "against_best_head": [each.to_json() for each in self.against_best()],
            },
        }


def finetune_episodes(
    features: FeatureSet,
    images: ImageSet,
    backbone: Backbone,
    folder: Path,
    *,
    unfreeze: Unfreeze = 1,
    recipe: Recipe | None = None,
    shots: Sequence[Shots] | None = None,
    episodes: int = 5,
    heads: Sequence[str] | None = None,
    random_state: int = 0,
    device: str = "auto",
    journal: Path | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
) -> FinetuneResult:
    """Fine-tuning and heads on the same draws, which are those of :func:`featx.evaluation.sweep.sweep_heads`.

    Parameters
    ----------
    features, images, backbone, folder, unfreeze, recipe, device, progress, say : as of :func:`open_tuning`.
    shots : by default 5 and 20, as far as the smallest class goes.
    episodes : draws for each n_shots.
    heads : by default all.
    random_state : seed of the draws, and of training.
    journal : file of finished draws, from which an interrupted run goes on; removed at the end.
    """
    recipe = recipe or Recipe()
    wanted = plan_shots(features, shots, early_stop=recipe.early_stop)
    with open_tuning(
        features, images, backbone, folder, unfreeze=unfreeze, recipe=recipe, device=device,
        random_state=random_state, progress=progress, say=say,
    ) as opened:  # fmt: skip
        found = judge_episodes(
            opened,
            shots=wanted,
            episodes=episodes,
            heads=heads,
            random_state=random_state,
            journal=journal,
            progress=progress,
        )
        if journal is not None:
            journal.unlink(missing_ok=True)
        return found


def judge_episodes(
    tuning: Tuning,
    *,
    shots: Sequence[Shots],
    episodes: int = 5,
    heads: Sequence[str] | None = None,
    random_state: int = 0,
    n_jobs: int | None = None,
    journal: Path | None = None,
    progress: Progress | None = None,
    sites: ArrayLike | None = None,
) -> FinetuneResult:
    """Judge fine-tuning and heads on the draws that a sweep of the same seed makes; see :func:`finetune_episodes`.

    The shots are those that :func:`plan_shots` allows. The journal stays, for whoever goes on to do something long; the
    caller removes it. With ``sites`` (m,) of all rows of the store, draws are across them, as those of a sweep with
    sites.
    """
    started = time.perf_counter()
    tell: Progress = progress or (lambda done, total, what: None)
    use = tuning.choosable
    if heads is not None and not heads:
        raise UsageError("no head to compare with")
    swept = sweep_heads(
        tuning.features.embeddings[use], tuning.features.labels[use], class_names=tuning.features.class_names,
        groups=tuning.features.copies[use], heads=heads, shots=shots, episodes=episodes, random_state=random_state,
        n_jobs=n_jobs, near_duplicates=tuning.features.near_copies_of(use), progress=progress,
        sites=None if sites is None else np.asarray(sites)[use],
    )  # fmt: skip
    rows = use[swept.rows]
    tasks = [(n_shots, episode) for n_shots in swept.shots for episode in range(episodes)]
    kept = _journal(tuning, journal, swept, rows)
    seconds: list[float] = []
    done: dict[Task, Trial] = {}
    for number, task in enumerate(tasks):
        if kept is not None and task in kept.done:
            done[task] = kept.done[task][0][0]
            continue
        begun = time.perf_counter()
        place = f"{tuning.head}, {shots_label(task[0])}, draw {task[1] + 1}"

        def tick(what: str, number: int = number, place: str = place) -> None:
            tell(number, len(tasks), f"{place}: {what}")

        tick("training")
        done[task] = _trial(tuning, swept, rows, *task, random_state=random_state, tick=tick)
        seconds.append(time.perf_counter() - begun)
        if kept is not None:
            kept.add(task, ([done[task]], swept.queries[task]))
        if len(seconds) == 1 and number + 1 < len(tasks):
            left = seconds[0] * (len(tasks) - number - 1)
            tuning.say(f"The first draw took {seconds[0]:.0f} s; the others may take {left / 60:.1f} min.")
    tell(len(tasks), len(tasks), "done")
    result = replace(
        swept,
        heads=(*swept.heads, tuning.head),
        trials=(*swept.trials, *(done[task] for task in tasks)),
        notes=(*swept.notes, *tuning.notes, *(kept.notes if kept else ())),
        seconds=time.perf_counter() - started,
    )
    return FinetuneResult(
        sweep=result, head=tuning.head, cut=tuning.halves.cut, parameters=tuning.halves.parameters,
        cached_bytes=tuning.cached_bytes, trunk_seconds=tuning.trunk_seconds,
        draw_seconds=float(np.mean(seconds)) if seconds else 0.0, device=tuning.device,
    )  # fmt: skip


def plan_shots(features: FeatureSet, shots: Sequence[Shots] | None, *, early_stop: bool) -> list[Shots]:
    """What was asked for, or those of the default that half of the classes can give.

    Raises
    ------
    UsageError
        There are too few images for that, or to stop early by. It takes the embeddings alone, so that it can be said
        before anything is computed.
    """
    data = LabelledRows.of_features(features)
    if early_stop and 1 in (shots or ()):
        raise UsageError(
            "too few images to stop early by", where="shots", expected="2 or more of every class", found=1,
            hint="Leave 1 out of --shots, or ask for a fixed number of epochs with --no-early-stop.",
        )  # fmt: skip
    about = data.labels, data.groups, data.class_names
    wanted, _ = splits.plan_shots(*about, shots=shots, default=DEFAULT_SHOTS)
    if not wanted:
        most = reached(data.counts) - 1
        least = 2 if early_stop else 1
        wanted, _ = splits.plan_shots(*about, shots=(max(most, least),), default=())
    return wanted


def _journal(tuning: Tuning, path: Path | None, swept: SweepResult, rows: Index) -> Journal | None:
    if path is None:
        return None
    plan = plan_hash(
        tuning.features.embeddings[rows], swept.labels, swept.duplicates.groups,
        [
            tuning.head, asdict(tuning.recipe), tuning.halves.cut, tuning.backbone.weights_sha256, tuning.device,
            version("torch"),
        ],
        swept.random_state,
    )  # fmt: skip
    return Journal(path, plan)


def _trial(
    tuning: Tuning,
    swept: SweepResult,
    rows: Index,
    n_shots: Shots,
    episode: int,
    *,
    random_state: int,
    tick: training.Tick,
) -> Trial:
    labels, groups = swept.labels, swept.duplicates.groups
    support, query = draw(n_shots, labels, groups, swept.sites, seeds=(random_state, episode))
    if not np.array_equal(query, swept.queries[n_shots, episode]):
        raise RuntimeError("the draws of heads and of fine-tuning differ")
    classes, known = np.unique(labels[support], return_inverse=True)
    started = time.perf_counter()
    trained = training.train(
        tuning.halves.tail, tuning.activations, rows[support], known, groups[support],
        recipe=tuning.recipe, seeds=(random_state, episode), device=tuning.device, tick=tick,
        sites=None if swept.sites is None else swept.sites[support],
    )  # fmt: skip
    seconds = time.perf_counter() - started
    scores = training.scores(trained.classifier, tuning.activations, rows[query], tick=tick)
    probabilities = softmax(scores)
    return Trial.of(
        np.searchsorted(classes, labels[query]), probabilities.argmax(axis=1), probabilities, classes,
        head=tuning.head, n_shots=n_shots, episode=episode, n_support=len(support), params={"epochs": trained.epochs},
        selection_score=None if trained.losses is None else float(trained.losses.min()), converged=True,
        fit_seconds=seconds,
    )  # fmt: skip


# --- what it starts from: a store's images, their network cut in two, and the activations at the cut ---------------


@dataclass(frozen=True)
class Tuning:
    """A store's labelled images with their activations, ready to be trained on; made by :func:`open_tuning`.

    Attributes
    ----------
    features : of the images, one row each; ``activations`` has the same rows.
    backbone : with the base weights.
    head : what results call it: "finetune:N", "finetune:all" or "scratch".
    decode : how images are decoded.
    device : that tails are trained on, "cpu" or "cuda".
    trunk_seconds : that the activations took, and ``cached_bytes`` of the disk.
    say : told what may take its time.
    """

    features: FeatureSet
    backbone: Backbone
    halves: Halves
    activations: NDArray[Any]
    recipe: Recipe
    head: str
    decode: str
    device: str
    trunk_seconds: float
    cached_bytes: int
    say: Say = field(repr=False)

    @property
    def choosable(self) -> Index:
        """Rows that may be trained on: the split ``test`` is for the one judgement at the end."""
        return np.flatnonzero(self.features.splits != "test")

    @property
    def notes(self) -> list[str]:
        """What a reader of the results must know."""
        notes = ["Batch statistics and dropout stay as in use while the last blocks are trained."]
        if self.recipe.from_scratch:
            notes = ["scratch starts from random weights: the control for what pretraining gives."]
        if str(self.features.provenance.get("views", "center")) != "center":
            notes.append("Fine-tuning sees the centre crop only; heads are on the store's mean over views.")
        return notes


@contextmanager
def open_tuning(
    features: FeatureSet,
    images: ImageSet,
    backbone: Backbone,
    folder: Path,
    *,
    unfreeze: Unfreeze = 1,
    recipe: Recipe | None = None,
    with_test: bool = False,
    device: str = "auto",
    engine: str = "auto",
    max_gib: float = MAX_GIB,
    random_state: int = 0,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Iterator[Tuning]:
    """Cut the network, and compute (or find again) the activations of a store's labelled images.

    Parameters
    ----------
    features : of a store.
    images : the source that the store was made from.
    backbone : the store's.
    folder : where the activations go for the time being; they are removed when the block ends well.
    unfreeze : number of blocks, or "all".
    recipe : how it is trained; ``from_scratch`` takes random weights and trains all of them.
    with_test : whether images of the split ``test`` are wanted too.
    device : "auto", "cpu" or "cuda", for training and for the trunk.
    engine : of the trunk.
    max_gib : bound of the activations on the disk.
    random_state : seed of random weights.
    progress : called as ``progress(done, total, what)``.
    say : told what is about to be done.

    Raises
    ------
    UsageError
        The network cannot be cut there, or the activations would be too large.
    MismatchError, SourceError
        The source is not the store's.
    """
    recipe = recipe or Recipe()
    say = say or (lambda sentence: None)
    device = training.choose_device(device)
    if recipe.from_scratch:
        unfreeze = "all"
        named = backbone.provider if isinstance(backbone.provider, Own) else backbone.name
        network = load_backbone(named, weights="none", layers=("penultimate",), random_state=random_state)
    else:
        network = backbone if backbone.layers == ("penultimate",) else replace(backbone, layers=("penultimate",))
    use = features.labels >= 0
    if not with_test:
        use &= features.splits != "test"
    rows = np.flatnonzero(use)
    if not len(rows):
        raise UsageError("no labelled image to train on", hint="Images are labelled by folders, or by a list.")
    decode = str(dict(features.provenance.get("decode", {})).get("mode", "full"))
    halves = cut_network(network, unfreeze)
    trunk = None if halves.trunk is None else Trunk.of(network, halves)
    wanted = Wanted(
        ids=[str(name) for name in features.ids[rows]],
        origins=_origins(features, rows, images),
        digests=features.digests[rows],
        preprocess=network.preprocess,
        decode=decode,
        shape=halves.tail.shape,
        provenance={} if trunk is None else trunk.provenance(),
        engine=None if trunk is None else make_engine(trunk, engine=engine, device=device, precision="fp32"),
    )
    what = "pixels" if trunk is None else f"activations before {halves.cut}"
    say(
        f"Training {plural(halves.parameters, 'parameter')} on {what} of {plural(len(rows), 'image')}, which take "
        f"{wanted.nbytes / 2**20:.0f} MiB in {folder} until this is done."
    )
    started = time.perf_counter()

    def step(done: int, total: int) -> None:
        if progress:
            progress(done, total, what)

    with activations(folder, wanted, max_gib=max_gib, progress=step) as found:
        yield Tuning(
            features=features.some(rows), backbone=network, halves=halves, activations=found, recipe=recipe,
            head=SCRATCH if recipe.from_scratch else f"finetune:{unfreeze}", decode=decode, device=device,
            trunk_seconds=time.perf_counter() - started, cached_bytes=wanted.nbytes, say=say,
        )  # fmt: skip


def _origins(features: FeatureSet, rows: Index, images: ImageSet) -> list[Any]:
    """Where the bytes of each row are; their digests are compared when they are read."""
    known = {ref.id: ref.path for ref in images.refs}
    missing = [str(name) for name in features.ids[rows] if str(name) not in known]
    if missing:
        kind: type[SourceError | MismatchError] = MismatchError if len(missing) == len(rows) else SourceError
        raise kind(
            "the store's images are not all in it", where=images.root,
            found=f"{len(missing)} of {len(rows)} missing, such as {missing[0]}",
            hint="Name the SOURCE that the store was made from, or bring the store up to date with featx extract.",
        )  # fmt: skip
    return [known[str(name)] for name in features.ids[rows]]
