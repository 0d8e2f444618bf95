"""What a comparison of strategies says, in words with numbers. Nothing is computed here that was not measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from featx._arrays import PIXELS
from featx.advice.curves import Curve, Gain
from featx.advice.domain import DIFFERENT, LARGE, SIMILAR, Domain, Rule
from featx.advice.labelling import Simulation
from featx.advice.shortcuts import Shortcuts
from featx.errors import plural
from featx.evaluation import Forecast, limits, percent, points, stats

Family: TypeAlias = Literal["head", "earlier layers", "features", "fine-tuning", "control"]
"""What a strategy is; "control" is none to use, but shows what the pretraining gives."""


@dataclass(frozen=True)
class Cell:
    """One strategy at one number of images per class.

    ``difference`` is to the reference on the same draws, adjusted by Holm over all strategies at this number; None for
    the reference itself. ``seconds`` are those of one draw: choosing and training.
    """

    strategy: str
    family: Family
    n_shots: int
    episodes: int
    accuracy: stats.Interval
    difference: stats.Difference | None
    seconds: float

    @property
    def verdict(self) -> stats.Verdict | None:
        """Against the reference; None for the reference."""
        return None if self.difference is None else self.difference.verdict

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "strategy": self.strategy, "family": self.family, "n_shots": self.n_shots, "episodes": self.episodes,
            "accuracy": self.accuracy.to_json(),
            "against_reference": None if self.difference is None else self.difference.to_json(),
            "seconds": self.seconds,
        }  # fmt: skip


@dataclass(frozen=True)
class Skipped:
    """What was not measured, and why."""

    what: str
    reason: str


@dataclass(frozen=True)
class NextImage:
    """An image to label next: its ``margin`` (0 is undecided), likeliest class, and row in the store."""

    id: str
    margin: float
    likeliest: str
    row: int


@dataclass(frozen=True)
class Advice:
    """Everything that was measured, and what it says.

    Attributes
    ----------
    images : labelled images outside the split "test"; ``counts`` different ones of each of ``class_names``.
    reference : the strategy that the others are compared with.
    gain : of ten more images per class.
    unlabelled : images without a label that the store has.
    minutes : allowed; ``seconds`` : spent.
    interrupted : whether the user stopped it; then the rest is among ``skipped``.
    forecast : for a group never seen, in stores with groups.
    costs : milliseconds an image that features took which the store does not have, by their name.
    """

    images: int
    class_names: tuple[str, ...]
    counts: tuple[int, ...]
    cells: tuple[Cell, ...]
    reference: str
    curve: Curve | None = field(repr=False)
    gain: Gain | None
    domain: Domain | None
    rule: Rule | None
    simulation: Simulation | None
    next_images: tuple[NextImage, ...]
    unlabelled: int
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    minutes: float
    seconds: float
    interrupted: bool
    random_state: int
    costs: Mapping[str, float] = field(default_factory=dict)
    shortcuts: Shortcuts | None = None
    forecast: Forecast | None = None

    @property
    def n_now(self) -> float:
        """Mean number of different labelled images of a class."""
        return sum(self.counts) / len(self.counts)

    @property
    def n_compared(self) -> int:
        """The largest number of images per class at which strategies were compared with the reference."""
        compared = [cell.n_shots for cell in self.cells if cell.difference is not None]
        return max(compared or [cell.n_shots for cell in self.cells])

    def at(self, n_shots: int) -> list[Cell]:
        """All strategies at one number of images per class, best first."""
        found = [cell for cell in self.cells if cell.n_shots == n_shots]
        return sorted(found, key=lambda cell: -cell.accuracy.mean)

    @property
    def recommended(self) -> Cell:
        """The best of those that are better than the reference for sure, else the reference, which is the cheapest."""
        cells = self.at(self.n_compared)
        better = [cell for cell in cells if cell.verdict == "better" and cell.family != "control"]
        return better[0] if better else next(cell for cell in cells if cell.strategy == self.reference)

    # --- sentences ---

    def sentences(self) -> dict[str, str]:
        """What to read, by topic, in the order in which to read it."""
        return {
            "strategy": self._strategy(),
            "features": self._features(),
            "pretraining": self._pretraining(),
            **({"new group": self.forecast.sentence} if self.forecast is not None else {}),
            "learning curve": self._learning_curve(),
            "fine-tuning": self._fine_tuning(),
            "domain": self._domain(),
            "rule": self._rule(),
            "shortcuts": self._shortcuts(),
            "label next": self._label_next(),
            "not measured": self._not_measured(),
        }

    def _strategy(self) -> str:
        return f"{self._best()} {_CHOSEN_SO}"

    def _best(self) -> str:
        best, n = self.recommended, self.n_compared
        others = [cell for cell in self.at(n) if cell.family != "control" and cell.strategy != best.strategy]
        large = sum(count > n for count in self.counts)
        among = (
            "" if large == len(self.counts) else f", among the {large} of {plural(len(self.counts), 'class')} with more"
        )
        where = f"With {plural(n, 'image')} per class{among}"
        text = f"{where}, use {named(best.strategy)}: accuracy {percent(best.accuracy)}"
        if not others:
            return f"{text}; nothing else was compared."
        if best.difference is not None:
            return f"{text}, {points(best.difference.interval)} more than {named(self.reference)} on the same draws."
        nearest = others[0]
        assert nearest.difference is not None
        gap = points(nearest.difference.interval)
        if nearest.difference.interval.mean > 0:
            return (
                f"{text}. {capital(named(nearest.strategy))} scored higher, {gap}, but the difference may be chance, "
                "so the simpler option is recommended."
            )
        return (
            f"{text}. No other strategy ({len(others)} compared) is clearly better; the next best is "
            f"{named(nearest.strategy)}, {gap}."
        )

    def _features(self) -> str:
        found = [cell for cell in self.at(self.n_compared) if cell.family in ("features", "earlier layers")]
        told = [
            f"{cell.strategy.partition('@')[2]} {points(cell.difference.interval)}{self._cost(cell)}, {cell.verdict}"
            for cell in found
            if cell.difference
        ]
        if not told:
            return "What other features are worth was not measured: the store has one set of them (--source adds more)."
        return f"Against {named(self.reference)}, at {plural(self.n_compared, 'image')} per class: {'; '.join(told)}."

    def _cost(self, cell: Cell) -> str:
        cost = self.costs.get(cell.strategy.partition("@")[2])
        return "" if cost is None else f" for {cost:.0f} ms per image"

    def _pretraining(self) -> str:
        controls = [cell for cell in self.at(self.n_compared) if cell.family == "control" and cell.difference]
        if not controls:
            return "What the pretraining gives was not measured: that takes the images (--source) and the time."
        parts = [
            f"{named(cell.strategy)} {percent(cell.accuracy)} ({points(cell.difference.interval)})"
            for cell in controls
            if cell.difference
        ]
        return f"Without any pretraining, at {plural(self.n_compared, 'image')} per class: {'; '.join(parts)}."

    def _learning_curve(self) -> str:
        if self.curve is None or self.gain is None:
            return "Ten more images per class: cannot tell; there are too few images for a learning curve."
        now = self.curve.measured[-1]
        most = int(self.curve.shots[-1])
        text = (
            f"On draws that judge the same images at every size, {named(self.reference)} has an accuracy of "
            f"{percent(now)} with {plural(most, 'image')} per class"
        )
        interval = self.gain.interval
        ten = f"from {self.gain.n_from:.0f} to {self.gain.n_to:.0f} images per class"
        if self.gain.verdict == "cannot tell":
            return f"{text}. What ten more ({ten}) are worth: cannot tell; {points(interval)}, and {self.gain.reason}."
        if self.gain.verdict == "little":
            return f"{text}. Ten more ({ten}) are worth less than half a point: {points(interval)}."
        return f"{text}. Ten more ({ten}) are worth about {points(interval)}."

    def _fine_tuning(self) -> str:
        tuned = [cell for cell in self.cells if cell.family == "fine-tuning" and cell.difference is not None]
        if not tuned:
            return "When fine-tuning starts to pay was not measured."
        pays = sorted((cell for cell in tuned if cell.verdict == "better"), key=lambda cell: cell.n_shots)
        shown = best_at_each(tuned)
        told = "; ".join(
            f"{plural(cell.n_shots, 'image')} per class: {cell.strategy} {points(cell.difference.interval)}"
            for cell in shown
            if cell.difference
        )
        if pays:
            return f"Fine-tuning pays from {plural(pays[0].n_shots, 'image')} per class on ({told})."
        up_to = f"{plural(max(cell.n_shots for cell in tuned), 'image')} per class"
        if all(cell.verdict == "worse" for cell in shown):
            return f"Fine-tuning does not pay up to {up_to}: it loses ({told}). Beyond, it was not measured."
        return f"It is not clear that fine-tuning pays up to {up_to} ({told}). Beyond, it was not measured."

    def _domain(self) -> str:
        if self.domain is None:
            return "How far the images are from those of the pretraining was not measured."
        found, mean = self.domain, self.domain.standout
        words = {
            "similar": "Your photos resemble those the network was trained on",
            "in between": "Your photos are neither close to those the network was trained on nor far from them",
            "different": "Your photos differ from those the network was trained on",
        }
        least = min(found.by_class, key=lambda name: found.by_class[name]) if found.by_class else ""
        furthest = f" The class that differs most is {least} ({found.by_class[least]:.1f})." if least else ""
        return (
            f"{words[found.nearness]}: score {mean.mean:.1f} ({limits(mean, scale=1.0)}), where {SIMILAR:g} or more is "
            f"similar, {DIFFERENT:g} or less is different, and images that show nothing would get about "
            f"{found.chance:.1f}.{furthest}"
        )

    def _rule(self) -> str:
        if self.rule is None:
            return "The rule of size and similarity needs the nearness to the pretraining, which was not measured."
        rule, best = self.rule, self.recommended
        than = "at least" if rule.size == "large" else "fewer than"
        text = (
            f"The classic rule (CS231n; {rule.size} data, that is {than} {LARGE} images per class; {rule.nearness}) "
            f"says: {rule.sentence}."
        )
        if best.family in rule.families:
            return f"{text} The measurement agrees."
        own = [cell for cell in self.at(self.n_compared) if cell.family in rule.families and cell.difference]
        if not own:
            return (
                f"{text} What it recommends was not measured there; the measurement recommends {named(best.strategy)}."
            )
        first = own[0]
        assert first.difference is not None
        gap = f"{named(first.strategy)}, {points(first.difference.interval)} against {named(self.reference)}"
        if first.verdict == "worse" or best.difference is not None:
            return f"{text} The measurement disagrees: {named(best.strategy)} is better ({gap})."
        return f"{text} The measurement cannot confirm it ({gap}), and takes what is simpler."

    def _shortcuts(self) -> str:
        if self.shortcuts is None:
            return (
                "Whether the head takes borders or corners for the class was not measured: that takes the images "
                "(--source) and the time."
            )
        return self.shortcuts.sentence()

    def _label_next(self) -> str:
        parts = []
        if self.next_images:
            first = ", ".join(each.id for each in self.next_images[:3])
            more = ", ..." if len(self.next_images) > 3 else "."
            counted = f"{len(self.next_images)} of {plural(self.unlabelled, 'unlabelled image')}"
            parts.append(f"Label these {counted} next: {first}{more}")
        if self.simulation is None:
            parts.append("What choosing images gains over drawing them at random was not measured.")
            return " ".join(parts)
        found = self.simulation
        gain = points(found.gain.interval, beside=(found.chosen, found.at_random))
        where = (
            f"from {plural(found.start, 'image')} per class on, {found.batch} more bring held-out accuracy from "
            f"{100 * found.before:.1f} to {100 * found.chosen:.1f} % when chosen (images that the head is unsure of, "
            f"and that are unlike each other), and to {100 * found.at_random:.1f} % at random ({gain})"
        )
        words = {
            "better": f"Choosing pays here: {where}.",
            "worse": f"Label at random, not by choice: {where}.",
            "cannot tell": f"No clear difference between choosing images and drawing them at random: {where}.",
        }
        parts.append(words[found.verdict])
        return " ".join(parts)

    def _not_measured(self) -> str:
        if not self.skipped:
            return "Everything was measured."
        by_reason: dict[str, list[str]] = {}
        for each in self.skipped:
            by_reason.setdefault(each.reason, []).append(each.what)
        return "Not measured: " + "; ".join(f"{', '.join(what)} ({reason})" for reason, what in by_reason.items()) + "."

    def to_json(self) -> dict[str, Any]:
        """What ``featx advise --json`` prints."""
        curve, gain, found = self.curve, self.gain, self.simulation
        return {
            "strategy": self.recommended.to_json(),
            "sentences": self.sentences(),
            "cells": [cell.to_json() for cell in self.cells],
            "costs": dict(self.costs), "reference": self.reference,
            "images": self.images,
            "classes": dict(zip(self.class_names, self.counts, strict=True)),
            "images_a_class": self.n_now,
            "learning_curve": None if curve is None else {
                "shots": curve.shots.tolist(),
                "accuracy": [each.to_json() for each in curve.measured],
                "asymptote": 1 - float(curve.parameters[0]),
                "scale": float(curve.parameters[1]),
                "exponent": float(curve.parameters[2]),
                "miss": None if math.isnan(curve.miss) else curve.miss,
            },
            "ten_more_a_class": None if gain is None else {
                "from": gain.n_from, "to": gain.n_to, **gain.interval.to_json(), "verdict": gain.verdict,
                "reason": gain.reason,
            },
            "domain": None if self.domain is None else self.domain.to_json(),
            "rule": None if self.rule is None else self.rule.to_json(),
            "shortcuts": None if self.shortcuts is None else self.shortcuts.to_json(),
            "labelling": None if found is None else {
                "start": found.start, "batch": found.batch, "episodes": found.episodes, "before": found.before,
                "chosen": found.chosen, "random": found.at_random, "gain": found.gain.interval.to_json(),
                "p": found.gain.p, "verdict": found.verdict,
            },
            **({"forecast": self.forecast.to_json()} if self.forecast is not None else {}),
            "label_next": [{"id": e.id, "margin": e.margin, "likeliest": e.likeliest} for e in self.next_images],
            "not_measured": [{"what": each.what, "reason": each.reason} for each in self.skipped],
            "notes": list(self.notes),
            "minutes": self.minutes,
            "seconds": self.seconds,
            "interrupted": self.interrupted,
            "random_state": self.random_state,
        }  # fmt: skip


_CHOSEN_SO = (
    "Advice leaves the recommended head only for what is better beyond chance; featx sweep names the highest mean."
)
"""Why another command may name another head."""


def best_at_each(cells: list[Cell]) -> list[Cell]:
    """The strategy with the highest accuracy at every number of images per class, ascending."""
    numbers = sorted({cell.n_shots for cell in cells})
    return [max((c for c in cells if c.n_shots == n), key=lambda c: c.accuracy.mean) for n in numbers]


def named(strategy: str) -> str:
    """A strategy in words."""
    if strategy.startswith("finetune:"):
        number = strategy.removeprefix("finetune:")
        return "fine-tuning all blocks" if number == "all" else f"fine-tuning the last {plural(int(number), 'block')}"
    if strategy == "scratch":
        return "training from scratch"
    if strategy == "random features":
        return "a head on random features"
    if strategy == PIXELS:
        return "a head on raw pixels"
    head, _, features = strategy.partition("@")
    return f"the head {head} on {features}" if features else f"the head {head} on frozen embeddings"


def capital(text: str) -> str:
    """The text with its first letter large."""
    return text[:1].upper() + text[1:]
