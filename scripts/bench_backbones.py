#!/usr/bin/env python3
"""What the choice of the network does to accuracy, on several sets of photos of your own.

    python scripts/bench_backbones.py SET [SET ...] [--backbone NAME[=WEIGHTS]]... [--layer LAYER]... [--out data/bench]

Each SET is a folder of class folders. With each network, at its penultimate layer and at each LAYER, it prints the mean
accuracy of the ridge head on the same 20 draws at 1, 5 and 20 labels per class. Stores are kept in the folder --out,
and not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SHOTS = (1, 5, 20)


def featx(*words: object) -> dict[str, Any]:
    """What a command answers."""
    done = subprocess.run(
        [sys.executable, "-m", "featx", *map(str, words), "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


def measure(folder: Path, backbone: str, layers: list[str], out: Path) -> dict[str, list[float]]:
    """Accuracy in per cent at each of SHOTS, by layer."""
    name, _, weights = backbone.partition("=")
    store = out / f"{'-'.join(folder.parts[-2:])}.{'-'.join([name, *layers])}.featx"
    wanted = [word for layer in ("penultimate", *layers) for word in ("--layer", layer)]
    featx("extract", folder, "--out", store, "--backbone", name, "--weights", weights or "default", *wanted)
    found = featx("sweep", store, "--heads", "ridge", "--shots", ",".join(map(str, SHOTS)))["results"]
    table: dict[str, list[float]] = {}
    for row in sorted(found, key=lambda row: int(row["n_shots"])):
        table.setdefault(row.get("layer") or "penultimate", []).append(100 * row["accuracy"]["mean"])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("sets", nargs="+", type=Path, metavar="SET")
    parser.add_argument("--backbone", action="append", metavar="NAME[=WEIGHTS]", help="may be repeated")
    parser.add_argument("--layer", action="append", default=[], help="may be repeated")
    parser.add_argument("--out", type=Path, default=Path("data/bench/backbones"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"{'set':<18}{'network':<22}{'layer':<14}" + "".join(f"{shots:>7}" for shots in SHOTS) + "   mean")
    for folder in options.sets:
        for backbone in options.backbone or ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"]:
            for layer, row in measure(folder, backbone, options.layer, options.out).items():
                numbers = "".join(f"{value:7.1f}" for value in (*row, sum(row) / len(row)))
                print(f"{folder.name:<18}{backbone.partition('=')[0]:<22}{layer:<14}{numbers}", flush=True)


if __name__ == "__main__":
    main()
