#!/usr/bin/env python3
"""How often `featx drift` calls photos changed that have not, and how soon it sees those that have.

    python scripts/bench_drift.py [STORE STORE ...] [--photos FOLDER] [--runs 200] [--out data/bench/drift.json]

Each STORE holds the features of one image set. In each run a set's different photos are split in two at random: one
half are the model's own (`featx fit`'s code, at --max-unknown 0.05), the other half comes in hours of about five to
eight photos, each once, in three orders: at random; in bursts, where an hour has photos of one class only; and by days
and nights, where the stranger half of the photos comes in every second twelve hours. Alarms that ever come are counted,
beside those of a plain test (Kolmogorov and Smirnov) of all familiarities against a uniform distribution after every
24 hours, and once at the end. Then photos of the other sets, or with --photos (which has a folder of photos for each
store, of its name) blurred and darkened photos of the same half, take the place of 10 or 30 % of the photos, at random.

Last, or alone where no STORE is given, long lives of a model: its own photos and 500 hours are drawn from continuous
distributions, with hours in which photos are alike (correlation 0.5).
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter
from scipy.stats import kstest, norm
from threadpoolctl import threadpool_limits

from featx import ImageSet, extract_features, load_backbone, read_features
from featx._files import publish_bytes
from featx.evaluation.duplicates import find_duplicates
from featx.models import BET_HOURS, bins_of, find_drift, is_unknown, shares_among
from featx.models.drift import Drift
from featx.models.novelty import Familiarity
from featx.models.unknown import learn
from featx.store import FeatureSet

ASKED = 0.05
HOUR = 6.5
"""Photos in an hour, in the mean."""

MOST = 1200
"""Photos of a set, drawn at random where there are more."""

Shares = NDArray[np.float64]


def hours_of(shares: Shares, hour: NDArray[np.intp]) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Bins (h, 20) of familiarity, and unknown photos (h,), by the hour of each photo (n,)."""
    parts = [shares[hour == each] for each in np.unique(hour)]
    return np.stack([bins_of(part) for part in parts]), np.array([int(is_unknown(p, ASKED).sum()) for p in parts])


def judge(shares: Shares, hour: NDArray[np.intp], own: int, *, unit: int = 1) -> Drift:
    """What featx drift says of familiarities (n,); ``unit`` hours count once."""
    bins, unknown = hours_of(shares, hour // unit)
    units = np.unique(hour // unit)
    return find_drift(bins, unknown, units // (BET_HOURS if unit == 1 else 1), own=own, max_unknown=ASKED)


def plain(shares: Shares, hour: NDArray[np.intp]) -> tuple[bool, bool]:
    """Whether a plain test alarms: after some day, and at the end."""
    ends = [*range(24, int(hour.max()) + 1, 24), int(hour.max()) + 1]
    alarms = [bool(kstest(shares[hour < end], "uniform", method="asymp").pvalue < 0.05) for end in ends]
    return any(alarms), alarms[-1]


def sizes(n: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """The hour (n,) of each photo, in order."""
    each = rng.integers(5, 9, size=n)
    return np.repeat(np.arange(n), each)[:n]


class Photos:
    """A set of different photos."""

    def __init__(self, features: FeatureSet) -> None:
        use = np.flatnonzero(features.labels >= 0)
        use = np.sort(np.random.default_rng(0).permutation(use)[:MOST])
        raw = features.embeddings[use].astype(np.float64)
        groups = find_duplicates(raw, features.copies[use], by=features.near_copies_of(use)).groups
        keep = use[np.unique(groups, return_index=True)[1]]
        self.ids, self.rows, self.labels = features.ids[keep], features.embeddings[keep], features.labels[keep]

    def split(self, rng: np.random.Generator, seed: int) -> tuple[Familiarity, NDArray[np.intp]]:
        order = rng.permutation(len(self.rows))
        own, new = order[: len(order) // 2], order[len(order) // 2 :]
        labels = np.unique(self.labels[own], return_inverse=True)[1]
        kept, _ = learn(
            self.rows[own], labels, np.arange(len(own)), kind="l2", max_unknown=ASKED, random_state=seed
        )  # fmt: skip
        assert kept is not None
        return kept, new


def orders(photos: Photos, new: NDArray[np.intp], shares: Shares, rng: np.random.Generator) -> dict[str, Any]:
    """The place (n,) of each photo in time, and its hour (n,), in each order."""
    n = len(new)
    hour = sizes(n, rng)
    labels = photos.labels[new]
    left = {int(c): list(rng.permutation(np.flatnonzero(labels == c))) for c in np.unique(labels)}
    bursts: list[int] = []
    burst_hours: list[int] = []
    number = 0
    while any(left.values()):
        waiting = np.array([len(each) for each in left.values()], dtype=float)
        of = list(left)[int(rng.choice(len(left), p=waiting / waiting.sum()))]
        take = int(rng.integers(5, 9))
        part, left[of] = left[of][:take], left[of][take:]
        bursts += part
        burst_hours += [number] * len(part)
        number += 1
    half = np.argsort(shares, kind="stable")
    night, day = list(rng.permutation(half[: n // 2])), list(rng.permutation(half[n // 2 :]))
    cycle: list[int] = []
    for each in range(int(hour.max()) + 1):
        source = (night if each // 12 % 2 else day) or night or day
        for _ in range(int((hour == each).sum())):
            cycle.append(source.pop() if source else (night or day).pop())
    return {
        "at random": (rng.permutation(n), hour),
        "in bursts": (np.array(bursts), np.array(burst_hours)),
        "days and nights": (np.array(cycle), hour),
    }


def mixed(shares: Shares, foreign: Shares, change: float, rng: np.random.Generator) -> Shares:
    """Familiarities (n,) where others are in the place of some, at random."""
    which = rng.random(len(shares)) < change
    return np.where(which, rng.choice(foreign, size=len(shares)), shares)


def long_life(own: int, hours: int, change: float, rng: np.random.Generator) -> tuple[Drift, bool]:
    """An artificial model and its photos, of which a part is unknown."""
    kept = np.sort(rng.uniform(size=own))
    count = rng.geometric(1 / HOUR, size=hours)
    hour = np.repeat(np.arange(hours), count)
    common = rng.normal(size=hours)[hour]
    similar = norm.cdf(np.sqrt(0.5) * common + np.sqrt(0.5) * rng.normal(size=len(hour)))
    shares = shares_among(kept, np.where(rng.random(len(hour)) < change, -1.0, similar))
    return judge(shares, hour, own), bool(kstest(shares, "uniform", method="asymp").pvalue < 0.05)


def changed_copies(folder: Path, photos: Photos) -> dict[str, NDArray[np.float32]]:
    """Embeddings (n, d) of blurred and of darkened copies of the photos, in their order."""
    found = {}
    for name in ("blurred", "darkened"):
        with tempfile.TemporaryDirectory() as place:
            for number, photo in enumerate(photos.ids):
                image = Image.open(folder / str(photo)).convert("RGB")
                if name == "blurred":
                    image = image.filter(ImageFilter.GaussianBlur(max(image.size) / 60))
                else:
                    image = ImageEnhance.Brightness(image).enhance(0.25)
                image.save(Path(place) / f"{number:06d}.png")
            store = Path(place) / "copies.featx"
            extract_features(ImageSet.from_folder(place), load_backbone("efficientnet_lite0"), store)
            features = read_features(store)
            found[name] = features.embeddings[np.argsort(features.ids)]
            assert len(found[name]) == len(photos.ids)
    return found


def share(done: list[Drift]) -> float:
    return sum(each.verdict == "changed" for each in done) / len(done)


def soon(done: list[Drift]) -> str:
    seen = [each.seen + 1 for each in done if each.seen is not None]
    return f"{np.median(seen):.0f}" if seen else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="*", type=Path, metavar="STORE")
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("data/bench/drift.json"))
    asked = parser.parse_args()
    sets = {store.name.removesuffix(".featx"): Photos(read_features(store)) for store in asked.stores}
    told: dict[str, Any] = {"machine": platform.platform(), "date": str(date.today()), "runs": asked.runs, "sets": {}}
    with threadpool_limits(limits=1):
        print("Photos like the model's own: % of runs with an alarm; a plain test each day, and once at the end")
        for name, photos in sets.items():
            others = {other: p.rows for other, p in sets.items() if other != name}
            if asked.photos:
                others |= changed_copies(asked.photos / name, photos)
            done: dict[str, list[Drift]] = {}
            naive: dict[str, list[tuple[bool, bool]]] = {}
            for run in range(asked.runs):
                rng = np.random.default_rng([run, 1])
                kept, new = photos.split(rng, run)
                own, shares = len(kept.own), kept.shares(photos.rows[new])
                for order, (place, hour) in orders(photos, new, shares, rng).items():
                    done.setdefault(order, []).append(judge(shares[place], hour, own))
                    naive.setdefault(order, []).append(plain(shares[place], hour))
                    if order == "days and nights":
                        done.setdefault("the same, --unit day", []).append(judge(shares[place], hour, own, unit=24))
                if run < asked.runs // 10:
                    hour = sizes(len(new), rng)
                    for other, rows in others.items():
                        copies = other in ("blurred", "darkened")
                        half = rows[new] if copies else rows[: MOST // 2]
                        foreign = kept.shares(half)
                        for change in (0.1, 0.3, 1.0)[: 3 if copies else 2]:
                            moved = mixed(shares, foreign, change, rng)
                            done.setdefault(f"{change:.0%} {other}", []).append(judge(moved, hour, own))
            hours = int(sizes(len(new), np.random.default_rng(0)).max()) + 1
            print(f"\n{name}: {own} own photos, {len(new)} new ones in some {hours} hours")
            for order, each in done.items():
                verdicts = Counter(d.verdict for d in each)
                line = f"  {order:24} {100 * share(each):5.1f} % of {len(each)}, after {soon(each):>3} units; "
                line += ", ".join(f"{n} {verdict}" for verdict, n in verdicts.items())
                if order in naive:
                    often, once = np.mean(naive[order], axis=0)
                    line += f"; plain test {100 * often:.0f} %, once {100 * once:.0f} %"
                print(line, flush=True)
            told["sets"][name] = {order: [vars(d) for d in each] for order, each in done.items()}
            told["sets"][name]["plain"] = {order: np.mean(each, axis=0).tolist() for order, each in naive.items()}
        print("\nLong lives, 500 hours of photos that are alike within an hour")
        for own in (40, 300, 2000):
            for change in (0.0, 0.1, 0.3):
                runs = asked.runs if change == 0 else asked.runs // 10
                lives = [long_life(own, 500, change, np.random.default_rng([run, own])) for run in range(runs)]
                lived, once = [each for each, _ in lives], np.mean([each for _, each in lives])
                print(
                    f"  {own} own photos, {change:.0%} unknown: {100 * share(lived):.1f} % of {runs}, "
                    f"after {soon(lived)} hours; plain test once at the end {100 * once:.0f} %", flush=True,
                )  # fmt: skip
                told[f"long life, {own} own photos, {change:g}"] = [vars(each) for each in lived]
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    publish_bytes(asked.out, json.dumps(told, indent=1).encode())
    print(f"\n{asked.out}")


if __name__ == "__main__":
    main()
