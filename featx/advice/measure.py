"""What to do next with a set of images: strategies compared within a time budget, and what follows from them.

All strategies are judged on the draws that a sweep of the same seed makes, so that every difference is paired. What is
cheap and always possible comes first (heads on the store), what needs pixels (random features as the control,
fine-tuning, training from scratch) after it, for as long as there is time; what there was no time for is named as not
measured. Words are made of the numbers in :mod:`featx.advice.advice`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featx._arrays import PENULTIMATE, Index
from featx.advice.advice import Advice, Family, NextImage, Skipped
from featx.advice.comparison import Budget, LabelledStore, OutOfTime, Progress, Trials
from featx.advice.curves import fit_curve
from featx.advice.domain import Domain, measure_domain, size_by_similarity
from featx.advice.labelling import Simulation, plan_simulation, rank_unlabelled, simulate
from featx.advice.shortcuts import MOST, Shortcuts, find_shortcuts, sample
from featx.backbones import RECIPES, Backbone, load_backbone, make_engine
from featx.errors import (
    MAY_BE_MISSING,
    FeatxError,
    ImageError,
    MismatchError,
    SourceError,
    UsageError,
    WeightsError,
    plural,
)
from featx.evaluation import Forecast, Shots, SweepResult, forecast_site, plan_shots, reached, sweep_heads
from featx.extraction import Embedder
from featx.heads import HEADS, Layers
from featx.images import CENTER, ImageSet, parse_views
from featx.store import FeatureSet, backbones_of, digest_keys

if TYPE_CHECKING:
    from featx.backbones import Unfreeze

GRID = (1, 2, 5, 10, 20, 50, 100, 200, 500)
COMPARED = (5, 20, 100)
"""Images per class at which strategies are compared, as far as there are any."""

EPISODES = 20
MIN_EPISODES = 3
TUNED_EPISODES = 3
"""Draws of what has to be trained anew for each of them."""

REFERENCE = HEADS["auto"].name
"""What every other strategy is compared with: the recommended head on the frozen embeddings."""
SCRATCH, RANDOM = "scratch", "random features"
_UP_TO = 0.7
"""Part of the smallest class that the learning curve learns from; the rest is judged."""


def curve_shots(smallest: int) -> list[int]:
    """Numbers of images per class for the learning curve, where the smallest class of it has so many."""
    most = max(int(_UP_TO * smallest), 1)
    shots = [n for n in GRID if n <= most]
    return [*shots, most] if most >= 1.5 * shots[-1] else shots


class _Run:
    """One measurement after another, and what each of them found."""

    def __init__(
        self, store: LabelledStore, budget: Budget, episodes: int, random_state: int, n_jobs: int | None
    ) -> None:
        store, about_groups = store.across_groups()
        self.store, self.budget, self.episodes = store, budget, episodes
        self.random_state, self.n_jobs = random_state, n_jobs
        self.trials = Trials(store.data.labels, REFERENCE, store.data.sites)
        self.skipped: list[Skipped] = []
        counts = store.data.drawable
        most = reached(counts)
        self.compared = [n for n in COMPARED if n < most] or [max(most - 1, 1)]
        groups = store.data.groups
        _, notes = plan_shots(
            store.data.labels, groups, store.data.class_names, shots=self.compared, default=(), sites=store.data.sites,
            group_name=store.features.group_name or "group",
        )  # fmt: skip
        self.notes = [*about_groups, *notes]
        # A curve is that of the same classes at every number of images.
        self.shots = curve_shots(most)
        large = counts > self.shots[-1]
        self.curved = store if large.all() else store.of_classes(large)
        self.curve = self.trials if large.all() else Trials(self.curved.data.labels, REFERENCE, self.curved.data.sites)
        if not large.all():
            classes = plural(len(large), "class")
            self.notes.append(f"The learning curve is that of the {large.sum()} of {classes} with enough images.")
        self.domain: Domain | None = None
        self.simulation: Simulation | None = None
        self.forecast: Forecast | None = None
        self.next_images: tuple[NextImage, ...] = ()
        self.costs: dict[str, float] = {}
        self.shortcuts: Shortcuts | None = None

    def stage(self, what: str, measure: Callable[[], None]) -> None:
        """Measure, if there is time; what cannot be measured is named with the reason."""
        if self.budget.left <= 0:
            self.skipped.append(Skipped(what, "the time was up"))
            return
        self.budget.show(what)
        try:
            measure()
        except OutOfTime:
            self.skipped.append(Skipped(what, "the time was up before it was done"))
        except (UsageError, WeightsError) as error:
            clauses = str(error).rstrip(".").split(". ")
            self.skipped.append(Skipped(what, "; ".join([clauses[0], *(c[0].lower() + c[1:] for c in clauses[1:])])))
        except ModuleNotFoundError as error:
            if error.name not in MAY_BE_MISSING:
                raise
            self.skipped.append(Skipped(what, f"{error.name} is not installed"))

    # --- from the store alone ---

    def first(self) -> None:
        """The recommended head along the learning curve: everything else is compared with it."""
        found = self.swept("learning curve", self.curved.reference, ("auto",), self.shots, store=self.curved)
        self.curve.add(found, "head")
        if self.curve is not self.trials:
            self.trials.add(self.swept("recommended head", self.store.reference, ("auto",), self.compared), "head")

    def heads(self) -> None:
        pixels = self.store.features.pixels
        own = None if pixels is None else pixels[self.store.data.rows]
        found = self.swept("heads", self.store.reference, tuple(HEADS), self.compared, pixels=own)
        self.trials.add(found, "head")

    def layers(self) -> None:
        columns, reference = self.store.columns, self.store.columns.reference
        rows = self.store.features.embeddings[self.store.data.rows]
        found = self.swept("layers", rows, ("auto",), self.compared, layers=columns)
        family: Family = "earlier layers" if len(columns.references) == 1 else "features"
        self.trials.add(found, family, {f"{REFERENCE}@{reference}": REFERENCE})

    def other_features(self, backbone: Backbone, origins: list[Any]) -> None:
        """What features would be worth that the store does not have: more views, and the networks of the recipes."""
        own, mode = self.store.of_reference, decode_mode(self.store.features)
        known = {name.partition("/")[0] for name in self.store.columns.names} | {backbone.name}
        views = RECIPES["best"].views
        more = {}
        if set(views) - set(parse_views(str(own.provenance.get("views", "center")))):
            more[f"{backbone.name} with {len(views)} views"] = backbone, views, self.store.place
        for name in RECIPES["balanced"].backbones:
            if name not in known:
                more[name] = load_backbone(name), CENTER, 0
        if not more:
            raise UsageError("the store has the networks and views of all recipes")
        for name, (network, looks, place) in more.items():
            embedder = Embedder(network, make_engine(network), decode=mode, views=looks)
            began = time.monotonic()
            rows = self.embedded(name, embedder, origins, place)
            self.costs[name] = self.costs[f"joined with {name}"] = 1000 * (time.monotonic() - began) / len(origins)
            layers = Layers({"own": own.embeddings.shape[1], name: rows.shape[1]}, {"own": "own", name: name})
            both = np.hstack([self.store.reference, rows])
            found = self.swept(name, both, ("auto",), self.compared, layers=layers, on=[name, layers.whole])
            joined = f"{REFERENCE}@{layers.whole}"
            self.trials.add(found, "features", {joined: f"{joined} with {name}"})

    def measure_domain(self, backbone: Backbone | FeatxError) -> None:
        if isinstance(backbone, FeatxError):
            raise UsageError(str(backbone).rstrip("."))
        columns = self.store.columns
        if PENULTIMATE not in self.store.of_reference.provenance["layers"]:
            raise UsageError("the store has no penultimate layer, which the pretraining's classes are read from")
        from featx.backbones import pretrained_classes

        weight, bias = pretrained_classes(backbone)
        features = self.store.features
        rows = features.embeddings[:, slice(*columns.columns(columns.reference))]
        self.domain = measure_domain(rows, weight, bias, features.labels, features.class_names)

    def labelling(self, count: int) -> None:
        store, groups = self.store, self.store.data.groups
        start = plan_simulation(store.data.labels, groups, count, store.data.sites)

        def keep_on(done: int) -> bool:
            self.budget.show(f"labelling by choice and at random, draw {done + 1}")
            return self.budget.left > 0

        self.simulation = simulate(
            store.reference, store.data.labels, groups, start=start, batch=count, episodes=max(self.episodes // 2, 2),
            random_state=self.random_state, sites=store.data.sites,
            keep_on=keep_on,
        )  # fmt: skip

    def new_group(self) -> None:
        """What to expect at a group never seen."""
        data, features = self.store.data, self.store.features
        name = features.group_name or "group"
        self.forecast = forecast_site(
            replace(data, embeddings=self.store.reference), features.groups[data.rows], HEADS["auto"], group_name=name,
            random_state=self.random_state, keep_on=lambda: self.budget.left > 0,
            progress=lambda done, total, what: self.budget.show(f"{what}: {done} of {total}"),
        )  # fmt: skip

    def rank(self, count: int) -> None:
        store, features = self.store, self.store.features
        pool = np.flatnonzero((features.labels < 0) & (features.splits != "test"))
        known = digest_keys(features.digests[features.labels >= 0])
        pool = pool[~np.isin(digest_keys(features.digests[pool]), known)]  # the others have a label under another name
        if not len(pool):
            raise UsageError("the store has no unlabelled images to choose from")
        first = pool[np.sort(np.unique(features.digests[pool], axis=0, return_index=True)[1])]
        columns = slice(*store.columns.columns(store.columns.reference))
        rows, margin, named = rank_unlabelled(
            store.reference, store.data.labels, store.data.groups, features.embeddings[first, columns], count,
            random_state=self.random_state,
        )  # fmt: skip
        self.next_images = tuple(
            NextImage(str(features.ids[first[row]]), float(each), store.data.class_names[int(name)], int(first[row]))
            for row, each, name in zip(rows, margin, named, strict=True)
        )

    # --- from the images ---

    def control(self, backbone: Backbone, origins: list[Any]) -> None:
        """The same architecture with random weights: what heads make of features that nothing was learnt for."""
        network = load_backbone(
            backbone.provider or backbone.name, weights="none", layers=(PENULTIMATE,), random_state=self.random_state
        )
        embedder = Embedder(network, make_engine(network), decode=decode_mode(self.store.features))
        found = self.swept(RANDOM, self.embedded(RANDOM, embedder, origins), ("auto",), self.compared)
        self.trials.add(found, "control", {REFERENCE: RANDOM})

    def embedded(self, what: str, embedder: Embedder, origins: list[Any], place: int = 0) -> NDArray[np.float32]:
        """Embeddings (n, d) of the labelled images, made anew, of the layer at a place among the network's."""
        rows = []
        for _, found in embedder.embed_files(origins):
            if isinstance(found, ImageError):
                raise found
            rows.append(found[place])
            self.budget.tick(f"{what}: {len(rows)} of {plural(len(origins), 'image')}")
        return np.stack(rows)

    def look(self, backbone: Backbone, origins: list[Any]) -> None:
        """What the recommended head takes from borders and corners, on the reference's network and views."""
        data, made = self.store.data, self.store.of_reference.provenance
        rows = sample(data.labels, data.groups, MOST, self.random_state)
        embedder = Embedder(
            backbone, make_engine(backbone), decode=decode_mode(self.store.features),
            views=parse_views(str(made.get("views", "center"))),
        )  # fmt: skip
        self.shortcuts = find_shortcuts(
            embedder, self.store.place, [origins[row] for row in rows],
            data.labels[rows], episodes=self.episodes, random_state=self.random_state, tick=self.budget.tick,
        )  # fmt: skip

    def tune(self, backbone: Backbone, images: ImageSet, folder: Path, unfreeze: Unfreeze | None) -> None:
        """Fine-tune the last blocks (all of them from random weights for None) on a few draws."""
        from featx.adaptation import judge_episodes, open_tuning, recipe_for

        what = SCRATCH if unfreeze is None else f"finetune:{unfreeze}"
        store, shots = self.store, [n for n in self.compared if n > 1]
        if not shots:
            raise UsageError("a class has too few images to hold any out while it is trained")
        features = store.of_reference
        recipe = recipe_for(from_scratch=unfreeze is None, whole=unfreeze in (None, "all"))
        with open_tuning(
            features, images, backbone, folder, unfreeze=unfreeze or "all", recipe=recipe,
            random_state=self.random_state, progress=self.budget.under(what),
        ) as tuning:  # fmt: skip
            last: tuple[int, float] | None = None
            for n_shots in shots:
                name = f"{what} at {plural(n_shots, 'image')} per class"
                # Every epoch sees the support once: the time grows with it.
                expected = 0.0 if last is None else last[1] * n_shots / last[0]
                if expected > self.budget.left:
                    reason = f"it would have taken about {expected / 60:.1f} minutes more"
                    self.skipped.append(Skipped(name, reason))
                    continue
                began = time.monotonic()

                def measure(n_shots: int = n_shots) -> None:
                    found = judge_episodes(
                        tuning, shots=(n_shots,), episodes=TUNED_EPISODES, heads=("auto",),
                        random_state=self.random_state, n_jobs=self.n_jobs, progress=self.budget.under(what),
                        sites=None if store.data.sites is None else store.features.groups,
                    )  # fmt: skip
                    self.trials.add(found.sweep, "control" if unfreeze is None else "fine-tuning")

                self.stage(name, measure)
                last = n_shots, time.monotonic() - began

    # --- sweeps ---

    def swept(
        self,
        what: str,
        rows: NDArray[np.floating],
        heads: tuple[str, ...],
        shots: Sequence[Shots],
        *,
        store: LabelledStore | None = None,
        **options: Any,
    ) -> SweepResult:
        """A sweep of as many draws as a fifth of what is left allows, by the time that the first of them take."""
        data = (store or self.store).data

        def run(episodes: int) -> SweepResult:
            return sweep_heads(
                rows, data.labels, class_names=data.class_names, groups=data.groups, heads=heads,
                shots=shots, episodes=episodes, random_state=self.random_state, n_jobs=self.n_jobs,
                progress=self.budget.under(what), near_duplicates=None, sites=data.sites, **options,
            )  # fmt: skip

        probe = run(MIN_EPISODES)
        affordable = int(0.2 * self.budget.left / max(probe.seconds / MIN_EPISODES, 1e-3))
        wanted = min(affordable, self.episodes)
        return run(wanted) if wanted > MIN_EPISODES else probe


def decode_mode(features: FeatureSet) -> str:
    """How the store's images were decoded."""
    made = backbones_of(features.provenance)[0]
    return str(dict(made.get("decode", {})).get("mode", "full"))


def origins_of(features: FeatureSet, rows: Index, images: ImageSet) -> list[Any]:
    """Where the images of these rows are, whose bytes must be those that the store was made from.

    Raises
    ------
    MismatchError
        A file is missing or another one.
    """
    known = {ref.id: ref.path for ref in images.refs}
    hint = "Name the SOURCE that the store was made from, or bring the store up to date with featx extract."
    out: list[Any] = []
    for row in rows:
        origin = known.get(str(features.ids[row]))
        try:
            digest = None if origin is None else hashlib.sha256(origin.read_bytes()).digest()
        except OSError as error:
            raise SourceError(f"cannot be read ({error.strerror})", where=origin, hint=hint) from error
        if digest != features.digests[row].tobytes():
            found = "no such image" if origin is None else "an image with other bytes"
            raise MismatchError(
                "these are not the images of the store", where=images.root, expected=features.ids[row], found=found,
                hint=hint,
            )  # fmt: skip
        out.append(origin)
    return out


def advise(
    features: FeatureSet,
    columns: Layers,
    *,
    backbone: Backbone | FeatxError,
    images: ImageSet | None = None,
    folder: Path | None = None,
    minutes: float = 5.0,
    count: int | None = None,
    episodes: int = EPISODES,
    random_state: int = 0,
    n_jobs: int | None = None,
    progress: Progress | None = None,
) -> Advice:
    """Compare strategies within a time budget, and say what follows.

    Parameters
    ----------
    features, columns : of :func:`featx.heads.layers.read_layers`: all layers of a store, side by side.
    backbone : what made them; or the error that says why it cannot be had, which is then told.
    images : the source that the store was made from, for what needs pixels.
    folder : where activations go while they are needed, with ``images``.
    minutes : that may be spent; a measurement that is under way when they are over is given up.
    count : how many images to label next; by default two per class, but at least ten.
    episodes : draws of heads, as far as the time allows; half as many of labelling, and three of what is trained.
    random_state : seed of all draws.
    n_jobs : workers of the sweeps.
    progress : called as ``progress(seconds spent, seconds in all, what)``.

    Raises
    ------
    UsageError
        The labels allow no comparison, or the time no single one.
    SourceError, MismatchError
        The images are not those of the store.
    """
    if not minutes > 0:
        raise UsageError("must be more than 0", where="minutes", found=minutes)
    if count is not None and count < 1:
        raise UsageError("must be at least 1", where="next", found=count)
    run = _Run(LabelledStore.of(features, columns), Budget(60 * minutes, progress), episodes, random_state, n_jobs)
    if images is not None and isinstance(backbone, FeatxError):
        raise backbone
    origins = [] if images is None else origins_of(features, run.store.data.rows, images)
    wanted = count or max(10, 2 * len(run.store.data.class_names))
    try:
        run.first()
    except OutOfTime as error:
        raise UsageError(
            "not even one head could be judged in this time", where="minutes", found=f"{minutes:g}",
            hint="Give it more with --minutes.",
        ) from error  # fmt: skip
    interrupted = False
    for what, measure in _stages(run, backbone, images, origins, folder, wanted):
        if interrupted:
            run.skipped.append(Skipped(what, "interrupted"))
            continue
        try:
            run.stage(what, measure)
        except KeyboardInterrupt:
            # What is measured already is worth having; the caller ends as interrupted.
            interrupted = True
            run.skipped.append(Skipped(what, "interrupted"))
    return _advice(run, minutes, interrupted)


def _stages(
    run: _Run,
    backbone: Backbone | FeatxError,
    images: ImageSet | None,
    origins: list[Any],
    folder: Path | None,
    count: int,
) -> list[tuple[str, Callable[[], None]]]:
    """All measurements after the first, the cheap ones before the dear ones."""
    cheap: list[tuple[str, Callable[[], None]]] = [
        ("nearness to the pretraining", lambda: run.measure_domain(backbone)),
        ("images to label next", lambda: run.rank(count)),
        *([("a new group", run.new_group)] if run.store.data.sites is not None else []),
        ("other heads", run.heads),
        ("labelling by choice", lambda: run.labelling(count)),
        ("layers", run.layers)
        if len(run.store.columns.names) > 1
        else (
            "earlier layers",
            _refusal("the store has one layer of one network: extract with --layer, or --backbone, more than once"),
        ),
    ]
    if images is None or folder is None or isinstance(backbone, FeatxError):
        no_images = _refusal("it takes the images themselves, named with --source")
        return [
            *cheap,
            *((what, no_images) for what in ("shortcuts", "other features", RANDOM, "fine-tuning", SCRATCH)),
        ]
    tune = partial(run.tune, backbone, images, folder)
    cheap.insert(3, ("shortcuts", partial(run.look, backbone, origins)))  # dear, but what it finds makes all else void
    return [
        *cheap,
        ("other features", partial(run.other_features, backbone, origins)),
        ("finetune:1", partial(tune, 1)),
        (RANDOM, partial(run.control, backbone, origins)),
        (SCRATCH, partial(tune, None)),
        ("finetune:2", partial(tune, 2)),
        ("finetune:all", partial(tune, "all")),
    ]


def _refusal(reason: str) -> Callable[[], None]:
    """A measurement that cannot be made."""

    def refuse() -> None:
        raise UsageError(reason)

    return refuse


def _advice(run: _Run, minutes: float, interrupted: bool) -> Advice:
    data = run.store.data
    now = float(run.curved.data.counts.mean())
    curve = (
        fit_curve(run.shots, run.curve.hits(REFERENCE, run.shots), random_state=run.random_state, sites=run.curve.sites)
        if len(run.shots) > 1
        else None
    )
    return Advice(
        images=len(data.labels),
        class_names=data.class_names,
        counts=tuple(int(n) for n in data.counts),
        cells=run.trials.cells(),
        reference=REFERENCE,
        curve=curve,
        gain=None if curve is None else curve.gain(now, now + 10),
        domain=run.domain,
        rule=None if run.domain is None else size_by_similarity(float(data.counts.mean()), run.domain.nearness),
        simulation=run.simulation,
        forecast=run.forecast,
        next_images=run.next_images,
        unlabelled=int((run.store.features.labels < 0).sum()),
        skipped=tuple(run.skipped),
        notes=tuple(dict.fromkeys(run.notes)),
        minutes=minutes,
        seconds=run.budget.spent,
        interrupted=interrupted,
        random_state=run.random_state,
        costs=run.costs,
        shortcuts=run.shortcuts,
    )
