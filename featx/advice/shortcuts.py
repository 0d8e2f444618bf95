"""Shortcuts: what a head finds at the borders and in the corners of photos, where dates, rulers and logos are.

Two questions about a region, on the same draws. *Without it*: a head that learnt from whole photos judges photos whose
region is grey; what it loses is what it took from there (and what grey does to it by itself). *It alone*: a head learns
from and judges photos of which only the region is left; what it reaches beyond guessing, the region tells.

The measure is as large an area in the middle, treated alike. In a photo of an object the middle matters more, and in a
texture every part does as much; where a region matters more than the middle, something is odd. It may be a shortcut, or
a background that rightly differs from class to class: a person has to look.

What is masked is the crop that the network is given, after all that the pixels go through otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx._arrays import Index
from featx._system import available_cpus
from featx.backbones import feature_maps
from featx.errors import UsageError, plural
from featx.evaluation import KShotSplit, Trial, limits, mean_interval, paired_difference, percent, points, stats
from featx.extraction import Embedder
from featx.heads import HEADS, Scorer, fit_chosen
from featx.models import MIDDLE, in_middle

FRAME = 0.1
"""Of width and height, on each side: the borders."""

CORNER = 0.2
"""Of width and height: each corner."""

MOST = 200
"""Images that are looked at; more would tell little more, and each costs nine times its embedding."""

LEAST = 5
"""Images that a class needs, so that a fifth of it can be judged."""

REGIONS = {
    "borders": f"{FRAME:.0%} of width and height on each side".replace("%", " %"),
    "corners": f"four squares of {CORNER:.0%} of width and height".replace("%", " %"),
}

_MIDDLE = "'s area in the middle"
_BATCH = 16
_RESAMPLES = 1000


@dataclass(frozen=True)
class Region:
    """What a head takes from one region of photos, beside as large an area in the middle.

    Attributes
    ----------
    name : one of :data:`REGIONS`.
    without, without_middle : accuracy on photos whose region, or as much of whose middle, is grey.
    loss : ``without`` less the accuracy on whole photos; ``more`` : less ``without_middle``.
    alone, alone_middle : accuracy of a head on the region alone, or on as much of the middle.
    gain : ``alone`` less the accuracy of guessing; ``tells`` : less ``alone_middle``.
    """

    name: str
    without: stats.Interval
    without_middle: stats.Interval
    loss: stats.Difference
    more: stats.Difference
    alone: stats.Interval
    alone_middle: stats.Interval
    gain: stats.Difference
    tells: stats.Difference

    @property
    def used(self) -> bool:
        """Whether the region tells classes apart, and a head loses more without it than without the middle."""
        return self.loss.verdict == self.more.verdict == "worse" and self.gain.verdict == "better"

    @property
    def gives_away(self) -> bool:
        """Whether the region alone tells classes apart better than the middle alone."""
        return self.gain.verdict == self.tells.verdict == "better"

    @property
    def verdict(self) -> str:
        """Either "used", "gives away", "not used" (less than two points are lost for sure) or "cannot tell"."""
        if self.used or self.gives_away:
            return "used" if self.used else "gives away"
        return "not used" if self.loss.interval.low > -_SMALL else "cannot tell"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        shown = ("without", "without_middle", "alone", "alone_middle")
        apart = {name: getattr(self, name) for name in ("loss", "more", "gain", "tells")}
        return {
            "region": self.name, **{name: getattr(self, name).to_json() for name in shown},
            **{name: {**each.interval.to_json(), "p": each.adjusted} for name, each in apart.items()},
            "verdict": self.verdict,
        }  # fmt: skip


_SMALL = 0.02
"""A loss that is surely less than this is none."""


@dataclass(frozen=True)
class Shortcuts:
    """What was found on so many ``images``.

    Attributes
    ----------
    whole : accuracy on whole photos.
    guessing : accuracy of naming the most frequent class.
    middle : the share of the evidence for the right class, over the strongest other, that lies in the middle; None
        where there are no exact maps, and ``no_map`` says why.
    """

    images: int
    episodes: int
    whole: stats.Interval
    guessing: float
    regions: tuple[Region, ...]
    middle: stats.Interval | None
    no_map: str

    def sentence(self) -> str:
        """In words."""
        used = " and the ".join(region.name for region in self.regions if region.used)
        given = " and the ".join(region.name for region in self.regions if region.gives_away)
        if used or given:
            first = f"The head uses the {used}" if used else f"The {given} alone tell the classes apart"
            told = [
                f"{first}, more than the middle of the photos. Look there for dates, rulers, logos or a background "
                "that gives the class away; if photos to come will lack it, crop it off."
            ]
        elif all(region.verdict == "not used" for region in self.regions):
            told = ["No shortcut at the borders or in the corners: the head loses less than two points without them."]
        else:
            told = ["No shortcut was found at the borders or in the corners, but a small one cannot be ruled out."]
        told.append(f"On {plural(self.images, 'image')}, whole: {percent(self.whole)}.")
        for region in self.regions:
            gap = points(region.loss.interval, beside=(region.without.mean, self.whole.mean))
            told.append(
                f"Without {region.name} ({REGIONS[region.name]} in grey) {percent(region.without)}, {gap}; without as "
                f"much of the middle {100 * region.without_middle.mean:.1f} %. The {region.name} alone give "
                f"{percent(region.alone)}, as much of the middle {100 * region.alone_middle.mean:.1f} %, guessing "
                f"{100 * self.guessing:.1f} %."
            )
        if self.middle is not None:
            told.append(
                f"Of the evidence for the right class {100 * self.middle.mean:.0f} % ({limits(self.middle)}) lies in "
                f"the middle quarter of what the network sees; spread evenly it would be {100 * MIDDLE**2:.0f} %."
            )
        else:
            told.append(f"Where the evidence lies: {self.no_map}.")
        return " ".join(told)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "images": self.images, "episodes": self.episodes, "whole": self.whole.to_json(),
            "guessing": self.guessing, "regions": [region.to_json() for region in self.regions],
            "evidence_in_the_middle": None if self.middle is None else self.middle.to_json(),
            "no_map": self.no_map or None,
        }  # fmt: skip


def region_mask(name: str, height: int, width: int) -> NDArray[np.bool_]:
    """Where a region is, (height, width)."""
    y, x = ((np.arange(n) + 0.5) / n for n in (height, width))
    share = FRAME if name == "borders" else CORNER
    rows, columns = (np.minimum(at, 1 - at) < share for at in (y, x))
    return rows[:, None] | columns if name == "borders" else rows[:, None] & columns


def middle_mask(share: float, height: int, width: int) -> NDArray[np.bool_]:
    """Where the middle is that has this share of the area, (height, width)."""
    y, x = (np.abs((np.arange(n) + 0.5) / n - 0.5) < share**0.5 / 2 for n in (height, width))
    return np.asarray(y[:, None] & x)


def masked(pixels: NDArray[np.uint8], mask: NDArray[np.bool_], grey: Sequence[int]) -> NDArray[np.uint8]:
    """Pixels (..., h, w, 3) whose places in ``mask`` (h, w) have one colour."""
    out = pixels.copy()
    out[..., mask, :] = grey
    return out


def sample(labels: NDArray[np.int64], groups: Index, most: int, random_state: int) -> Index:
    """Rows of at most so many different images, as even over classes as there are any; ascending."""
    order = np.random.default_rng([random_state, 0x5C]).permutation(len(labels))
    first = order[np.sort(np.unique(groups[order], return_index=True)[1])]
    place = np.empty(len(first), dtype=np.intp)  # of each among those of its class
    for label in np.unique(labels[first]):
        own = labels[first] == label
        place[own] = np.arange(own.sum())
    return np.sort(first[np.argsort(place, kind="stable")[:most]])


def find_shortcuts(
    embedder: Embedder,
    layer: int,
    origins: Sequence[Any],
    labels: NDArray[np.int64],
    *,
    episodes: int,
    random_state: int,
    tick: Callable[[str], None],
) -> Shortcuts:
    """Measure what a head takes from each region.

    Parameters
    ----------
    embedder : the network; of several only the first counts.
    layer : which of its layers.
    origins : n files of different images.
    labels : (n,) in 0 .. c-1.
    episodes : draws; in each a fifth of every class is judged.
    random_state : seed of the draws.
    tick : called with what is being done; it may raise to end the measurement.

    Raises
    ------
    UsageError
        A class has too few images.
    """
    if (counts := np.bincount(labels)).min() < LEAST:
        raise UsageError(f"a class has fewer than {LEAST} different images", found=int(counts.min()))
    rows, split, no_map = _embed(embedder, layer, origins, tick)
    names = list(rows)
    trials: dict[str, list[Trial]] = {name: [] for name in [*names, "guessing"]}
    queries: dict[tuple[Any, int], Index] = {}
    inside, total = np.zeros(len(labels)), np.zeros(len(labels))
    head, groups = HEADS["auto"], np.arange(len(labels))
    draws = KShotSplit("all", n_episodes=episodes, random_state=random_state).split(None, labels, groups)
    for episode, (support, query) in enumerate(draws):
        tick(f"shortcuts: draw {episode + 1} of {episodes}")
        queries["all", episode] = query
        seed = [random_state, episode]

        def fitted(kind: str, support: Index = support, seed: list[int] = seed) -> Any:
            return fit_chosen(head, rows[kind][support], labels[support], groups[support], random_state=seed)[1]

        whole = fitted("whole")
        named = {"guessing": np.full(len(query), np.bincount(labels[support]).argmax())}
        for name in names:
            pipeline = fitted(name) if name.startswith("alone") else whole
            named[name] = pipeline.predict(rows[name][query])
        for name, predicted in named.items():
            trials[name].append(
                Trial.of(
                    labels[query], predicted, None, np.arange(len(counts)), head=name, n_shots="all",
                    episode=episode, n_support=len(support), params={}, selection_score=None, converged=True,
                    fit_seconds=0.0,
                )
            )  # fmt: skip
        if split is not None:
            _count(whole, rows["whole"], split, labels, query, inside, total)
    shown = {name: mean_interval(each, queries, labels) for name, each in trials.items()}

    def apart(one: str, other: str) -> stats.Difference:
        return paired_difference(trials[one], trials[other], queries, labels)

    pairs = {
        region: {
            "loss": apart(f"without {region}", "whole"),
            "more": apart(f"without {region}", f"without {region}{_MIDDLE}"),
            "gain": apart(f"alone {region}", "guessing"),
            "tells": apart(f"alone {region}", f"alone {region}{_MIDDLE}"),
        }
        for region in REGIONS
    }
    ps = iter(stats.holm([each.p for found in pairs.values() for each in found.values()]))
    regions = tuple(
        Region(
            region, without=shown[f"without {region}"], without_middle=shown[f"without {region}{_MIDDLE}"],
            alone=shown[f"alone {region}"], alone_middle=shown[f"alone {region}{_MIDDLE}"],
            **{name: replace(each, adjusted=next(ps)) for name, each in found.items()},
        )
        for region, found in pairs.items()
    )  # fmt: skip
    middle = None if no_map else _share(inside, total, random_state)
    if middle is None and not no_map:
        no_map = "cannot tell; the right class is not ahead on the whole"
    return Shortcuts(len(labels), episodes, shown["whole"], shown["guessing"].mean, regions, middle, no_map)


def _embed(
    embedder: Embedder, layer: int, origins: Sequence[Any], tick: Callable[[str], None]
) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.float64] | None, str]:
    """Embeddings (n, d) of the photos in every form; (n, 2, d), what middle and rest add to those; or why not."""
    height, width = embedder.backbone.preprocess.crop
    grey = [round(255 * mean) for mean in embedder.backbone.preprocess.mean]
    masks: dict[str, NDArray[np.bool_]] = {"whole": np.zeros((height, width), bool)}
    for region in REGIONS:
        there = region_mask(region, height, width)
        middle = middle_mask(float(there.mean()), height, width)
        for of, mask in (("", there), (_MIDDLE, middle)):
            masks |= {f"without {region}{of}": mask, f"alone {region}{of}": ~mask}
    rows: dict[str, list[NDArray[np.float32]]] = {name: [] for name in masks}
    split: list[NDArray[np.float64]] = []
    no_map = ""
    for pictures in _batches(embedder, origins):
        for name, mask in masks.items():
            seen = [(masked(picture, mask, grey),) for picture in pictures]
            rows[name].append(embedder.embed_pixels(seen)[layer])
        for picture in pictures if not no_map else []:
            found = feature_maps(embedder.engine, picture if picture.ndim == 4 else picture[None])[layer]
            if isinstance(found, str):
                no_map = found
                break
            split.append(_halves(found))
        tick(f"shortcuts: {sum(map(len, rows['whole']))} of {plural(len(origins), 'image')}")
    made = {name: np.concatenate(each) for name, each in rows.items()}
    return made, None if no_map else np.stack(split), no_map


def _batches(embedder: Embedder, origins: Sequence[Any]) -> Iterator[list[NDArray[np.uint8]]]:
    """Pixels of the photos, some at a time."""
    workers = min(available_cpus(), len(origins))
    waiting: list[NDArray[np.uint8]] = []
    with embedder.decoders(workers=workers) as pool:
        for decoded in pool.run(origins, lambda digest: False, ahead=_BATCH + workers):
            if decoded.refusal is not None:
                raise decoded.refusal
            assert decoded.pixels is not None
            waiting.append(decoded.pixels)
            if len(waiting) == _BATCH:
                yield waiting
                waiting = []
    if waiting:
        yield waiting


def _halves(maps: NDArray[np.float32]) -> NDArray[np.float64]:
    """What the middle and the rest of maps (v, h, w, d) add to their mean, (2, d)."""
    weight = np.outer(*(in_middle(n) for n in maps.shape[1:3])) / (maps.shape[1] * maps.shape[2])
    middle = np.einsum("vhwd,hw->vd", maps.astype(np.float64), weight).mean(axis=0)
    return np.stack([middle, maps.mean(axis=(0, 1, 2), dtype=np.float64) - middle])


def _count(
    pipeline: Any,
    rows: NDArray[np.float32],
    split: NDArray[np.float64],
    labels: NDArray[np.int64],
    query: Index,
    inside: NDArray[np.float64],
    total: NDArray[np.float64],
) -> None:
    """Add the evidence on each image of a query to ``inside`` and ``total`` (n,)."""
    scorer = Scorer.of(pipeline)
    scores = scorer.scores(rows[query])
    for i, row in enumerate(query):
        weights, shift, _ = scorer.linear_form(rows[row])
        own = labels[row]
        other = int(np.where(np.arange(len(weights)) == own, -np.inf, scores[i]).argmax())
        apart = weights[own] - weights[other]
        middle = float(apart @ (split[row, 0] - MIDDLE**2 * shift))
        inside[row] += middle
        total[row] += middle + float(apart @ (split[row, 1] - (1 - MIDDLE**2) * shift))


def _share(inside: NDArray[np.float64], total: NDArray[np.float64], random_state: int) -> stats.Interval | None:
    """Of all evidence the part inside, with a bootstrap interval over images; None where there is none on the whole."""
    rng = np.random.default_rng([random_state, 0xB0])
    drawn = rng.integers(0, len(total), (_RESAMPLES, len(total)))
    sums = total[drawn].sum(axis=1)
    if not np.quantile(sums, 0.025) > 0:
        return None
    low, high = np.quantile(inside[drawn].sum(axis=1) / sums, [0.025, 0.975])
    return stats.Interval(float(inside.sum() / total.sum()), float(low), float(high))
