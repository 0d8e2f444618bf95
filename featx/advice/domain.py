"""How far images are from what a network was pretrained on, by its own classification layer, offline.

For one image, the score of every class of the pretraining is computed from its embedding; the *standout* is how far
the highest of them is above their mean, in standard deviations of that image's scores: a maximum logit (Hendrycks et
al., 2022, "Scaling out-of-distribution detection for real-world settings") made comparable between networks by
standardising it (in the spirit of Jung et al., 2021, "Standardized max logits"). Scores that say nothing, as if drawn
from a normal distribution, have the standout that :func:`chance_standout` gives (3.2 for 1,000 classes): the zero of
the scale. Unlike the entropy of the softmax it does not rise when several close classes (breeds of dogs) share the
score.

What it cannot see: images may look like the pretraining's and be hard all the same, when the difference wanted is finer
than its classes. It is no distance to the pretraining images themselves, which are not here. The two limits were set on
five image sets and one network (efficientnet_lite0: ants and bees from ImageNet itself 8.6, cats and dogs 7.2, textures
5.9, satellite images 5.1, thumbnails of 32 pixels 4.8), so they are a rule of thumb.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import integrate, stats

from featx.errors import UsageError
from featx.evaluation import Interval

Array: TypeAlias = NDArray[np.float64]
Nearness: TypeAlias = Literal["similar", "in between", "different"]

SIMILAR, DIFFERENT = 6.5, 5.5
"""Mean standouts from which, and up to which, images count as similar to, and different from, the pretraining's."""

_BLOCK = 4096


@dataclass(frozen=True)
class Domain:
    """Where images stand.

    Attributes
    ----------
    standout : mean over images with its 95 % interval, in standard deviations.
    chance : what scores without any meaning would have.
    classes : number of classes of the pretraining.
    share_far : share of images at or below :data:`DIFFERENT`.
    by_class : mean standout of each class of the user's, by name; unlabelled images are left out.
    """

    standout: Interval
    chance: float
    classes: int
    share_far: float
    by_class: dict[str, float]

    @property
    def nearness(self) -> Nearness:
        """In words, by the limits."""
        if self.standout.mean >= SIMILAR:
            return "similar"
        return "different" if self.standout.mean <= DIFFERENT else "in between"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "measure": "standout: highest score of the pretraining's classes above their mean, in standard deviations",
            "standout": self.standout.to_json(),
            "chance": self.chance,
            "similar_from": SIMILAR,
            "different_up_to": DIFFERENT,
            "nearness": self.nearness,
            "pretraining_classes": self.classes,
            "share_far": self.share_far,
            "by_class": self.by_class,
        }


def chance_standout(classes: int) -> float:
    """Expected maximum of so many independent standard normal numbers."""
    # E max = integral over x of 1 - F(x)^n on the positive side, less that of F(x)^n on the negative one.
    above = integrate.quad(lambda x: -np.expm1(classes * stats.norm.logcdf(x)), 0, 12, limit=200)[0]
    below = integrate.quad(lambda x: np.exp(classes * stats.norm.logcdf(x)), -12, 0, limit=200)[0]
    return float(above - below)


def standouts(embeddings: NDArray[np.floating], weight: Array, bias: Array) -> Array:
    """How far the highest class score of each row stands above its scores' mean, in standard deviations, (n,).

    Parameters
    ----------
    embeddings : (n, d); weight : (c, d); bias : (c,), with two classes at least.
    """
    if weight.ndim != 2 or len(weight) < 2 or embeddings.shape[1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise UsageError(
            "embeddings and classes do not fit", expected="(n, d), (c, d) and (c,)",
            found=f"{embeddings.shape}, {weight.shape} and {bias.shape}",
        )  # fmt: skip
    out = []
    for start in range(0, len(embeddings), _BLOCK):
        scores = np.asarray(embeddings[start : start + _BLOCK], dtype=np.float64) @ weight.T + bias
        spread = scores.std(axis=1)
        out.append((scores.max(axis=1) - scores.mean(axis=1)) / np.where(spread > 0, spread, 1.0))
    return np.concatenate(out) if out else np.zeros(0)


def measure_domain(
    embeddings: NDArray[np.floating],
    weight: Array,
    bias: Array,
    labels: NDArray[np.integer] | None = None,
    class_names: tuple[str, ...] = (),
) -> Domain:
    """Measure penultimate embeddings (n, d) against the classes (c, d) and (c,) of the pretraining.

    Raises
    ------
    UsageError
        Fewer than two images, or shapes that do not fit.
    """
    found = standouts(embeddings, weight, bias)
    if len(found) < 2:
        raise UsageError("too few images to measure", expected="2 or more", found=len(found))
    mean = float(found.mean())
    margin = float(stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found)))
    by_class = {
        name: float(found[labels == number].mean())
        for number, name in enumerate(class_names)
        if labels is not None and (labels == number).any()
    }
    chance = chance_standout(len(weight))
    far = float((found <= DIFFERENT).mean())
    return Domain(Interval(mean, mean - margin, mean + margin), chance, len(weight), far, by_class)


# --- the rule of thumb --------------------------------------------------------------------------------------------
# As taught in Stanford's CS231n ("Transfer learning": new data small or large, similar or different), with Yosinski et
# al., 2014, "How transferable are features in deep neural networks?" behind it. It names no numbers; the limit between
# small and large here is ours. It stands beside a measurement, and does not replace it.

Family: TypeAlias = Literal["head", "earlier layers", "fine-tuning"]
"""What a strategy is: a head on frozen embeddings of the last layer, one on earlier layers, or a trained tail."""

LARGE = 100
"""Labelled images per class from which data count as large."""


@dataclass(frozen=True)
class Rule:
    """What the rule says, and where it stands: ``families`` are what it would have one try."""

    size: Literal["small", "large"]
    nearness: Nearness
    families: tuple[Family, ...]
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "size": self.size,
            "large_from_images_a_class": LARGE,
            "nearness": self.nearness,
            "families": list(self.families),
            "sentence": self.sentence,
        }


def size_by_similarity(images_a_class: float, nearness: Nearness) -> Rule:
    """Look the rule up."""
    size: Literal["small", "large"] = "large" if images_a_class >= LARGE else "small"
    if size == "large" and nearness == "similar":
        return Rule(size, nearness, ("fine-tuning",), "fine-tune the network: there is enough to do so without harm")
    if size == "large":
        families: tuple[Family, ...] = ("fine-tuning",)
        return Rule(size, nearness, families, "fine-tune all of the network: there is enough, and it has to change")
    if nearness == "similar":
        return Rule(size, nearness, ("head",), "train a linear head on the frozen last layer: all else would overfit")
    if nearness == "different":
        sentence = "train a linear head on frozen earlier layers: the last ones are too specific"
        return Rule(size, nearness, ("earlier layers",), sentence)
    sentence = "train a linear head, on the last layer or an earlier one: the rule does not say which"
    return Rule(size, nearness, ("head", "earlier layers"), sentence)
