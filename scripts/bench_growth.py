"""What a store of millions of images costs: time and memory of making, opening, verifying, sweeping and searching it.

python scripts/bench_growth.py --rows 1000000 --dims 1280         # the default backbone's embeddings: 5.3 GB
python scripts/bench_growth.py --rows 10000000 --dims 32          # ten million rows, in 2 GB
python scripts/bench_growth.py --rows 10000000 --only info,search # some steps; the store is made first

Embeddings, digests and names are generated; the store is written by featx's own writer, shard by shard, and a run
that was stopped goes on. Each step is a process of its own, so that its peak memory is its own. The result is added to
data/bench/growth.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

CLASSES = 100
SHARD_ROWS = 65_536
QUERIES = 100


def generated(start: int, stop: int, dims: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Digests and embeddings of rows: class centres with noise around them; a block depends on its number only."""
    rng = np.random.default_rng([start, dims])
    centres = np.random.default_rng(0).normal(size=(CLASSES, dims)).astype(np.float32)
    digests = rng.integers(0, 256, (stop - start, 32), dtype=np.uint8)
    noise = rng.standard_normal((stop - start, dims), dtype=np.float32)
    return digests, centres[np.arange(start, stop) % CLASSES] + np.float32(1.5) * noise


def blocks(rows: int) -> Iterator[tuple[int, int]]:
    """Where each shard starts and stops."""
    for start in range(0, rows, SHARD_ROWS):
        yield start, min(start + SHARD_ROWS, rows)


def make(store: Path, rows: int, dims: int) -> dict[str, Any]:
    """Write the store, or what is missing of it."""
    from featx.store.index import Index
    from featx.store.manifest import read_manifest
    from featx.store.writer import StoreWriter

    if (store / "index.h5").exists() and (read_manifest(store).counts or {}).get("images") == rows:
        return {"rows written": 0}
    provenance = {"backbone": "generated", "weights_sha256": "0" * 64, "layers": ["penultimate"], "dims": dims}
    with StoreWriter(store, provenance, shard_rows=SHARD_ROWS, shard_seconds=1e9) as writer:
        here = writer.rows
        for start, stop in blocks(rows):
            if start < here:
                continue
            digests, embeddings = generated(start, stop, dims)
            writer.add([row.tobytes() for row in digests], {"generated": [embeddings]})
            writer.flush()
        index = Index(
            ids=[f"photos/{row:09d}.jpg" for row in range(rows)],
            labels=np.arange(rows, dtype=np.int64) % CLASSES,
            split=[""] * rows,
            digests=np.concatenate([generated(start, stop, dims)[0] for start, stop in blocks(rows)]),
            class_names=tuple(f"class{number:03d}" for number in range(CLASSES)),
            sizes=np.full(rows, 50_000),
            stamps=np.full(rows, 1),
        )
        writer.finish(index, [], source="")
    return {"rows written": rows - here}


def open_(store: Path) -> dict[str, Any]:
    """Open it for reading."""
    from featx.store.reader import FeatureReader

    return {"rows": len(FeatureReader(store).index)}


def info(store: Path) -> dict[str, Any]:
    """featx info."""
    from featx.store.tools import info

    return {"classes": len(info(store)["classes"])}


def verify(store: Path) -> dict[str, Any]:
    """featx verify --sample 10."""
    from featx.store.tools import verify

    assert not verify(store, sample=10)
    return {"shards": 10}


def verify_all(store: Path) -> dict[str, Any]:
    """featx verify."""
    from featx.store.tools import verify

    assert not verify(store)
    return {}


def subset(store: Path) -> dict[str, Any]:
    """Read 10,000 images in proportion."""
    from featx.store.reader import read_features

    return {"rows": len(read_features(store, max_images=10_000))}


def sweep(store: Path) -> dict[str, Any]:
    """featx sweep --max-images 3000 --heads ridge --shots 5,20 --episodes 5."""
    from featx.evaluation.sweep import sweep_heads
    from featx.store.reader import read_features

    features = read_features(store, max_images=3000)
    result = sweep_heads(
        features.embeddings,
        features.labels,
        class_names=features.class_names,
        heads=("ridge",),
        shots=(5, 20),
        episodes=5,
    )
    best = max(float(np.mean([t.accuracy for t in result.trials if t.n_shots == shots])) for shots in (5, 20))
    return {"accuracy": round(best, 3)}


def search(store: Path, method: str) -> dict[str, Any]:
    """100 queries, k = 10, after reading the store and making the index."""
    from featx.retrieval.neighbours import GalleryIndex
    from featx.store.reader import FeatureReader, iter_features

    reader = FeatureReader(store)
    gallery = np.empty((len(reader.index), reader.dims("penultimate")), np.float32)
    for rows, part in iter_features(store, block_rows=SHARD_ROWS):
        gallery[rows] = part

    started = time.perf_counter()
    index = GalleryIndex(method=method).fit(gallery)  # type: ignore[arg-type]
    built = time.perf_counter()
    queries = gallery[np.random.default_rng(0).integers(0, len(gallery), QUERIES)]
    index.search(queries, 10)
    done = time.perf_counter()
    found: dict[str, Any] = {"index, s": round(built - started, 2), "100 queries, s": round(done - built, 3)}
    return found | ({"recall": index.recall_} if method == "approximate" else {})


STEPS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "open": open_,
    "info": info,
    "verify": verify,
    "verify-all": verify_all,
    "subset": subset,
    "sweep": sweep,
    "search": lambda store: search(store, "exact"),
    "search-approximate": lambda store: search(store, "approximate"),
}


def measured(step: str, given: argparse.Namespace) -> dict[str, Any]:
    """A step in a process of its own."""
    command = [sys.executable, __file__, "--step", step, "--store", str(given.store)]
    command += ["--rows", str(given.rows), "--dims", str(given.dims)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{step}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_step(given: argparse.Namespace) -> None:
    """What the process of one step does: the result as one line of JSON."""
    started = time.perf_counter()
    told = make(given.store, given.rows, given.dims) if given.step == "make" else STEPS[given.step](given.store)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({"step": given.step, "seconds": round(seconds, 2), "peak MB": round(peak), **told}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dims", type=int, default=32)
    parser.add_argument("--store", type=Path, default=None, help="[default: data/bench/growth-ROWS-DIMS.featx]")
    parser.add_argument("--only", default=",".join(STEPS), help=f"of {', '.join(STEPS)}")
    parser.add_argument("--step", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("data/bench/growth.json"))
    given = parser.parse_args()
    given.store = given.store or Path(f"data/bench/growth-{given.rows}-{given.dims}.featx")
    if given.step:
        run_step(given)
        return
    given.store.parent.mkdir(parents=True, exist_ok=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    table = Table("step", "s", "peak MB", "", title=f"{given.rows:,} rows of {given.dims}")
    rows = []
    for step in ["make", *filter(None, given.only.split(","))]:
        rows.append(measured(step, given))
        told = {name: value for name, value in rows[-1].items() if name not in ("step", "seconds", "peak MB")}
        table.add_row(step, f"{rows[-1]['seconds']:.2f}", str(rows[-1]["peak MB"]), str(told or ""))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    Console(width=120).print(table)
    size = sum(path.stat().st_size for path in given.store.rglob("*") if path.is_file())
    told = {
        "rows": given.rows,
        "dims": given.dims,
        "gigabytes": round(size / 1e9, 3),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "date": date.today().isoformat(),
        "steps": rows,
    }
    earlier = json.loads(given.out.read_text()) if given.out.exists() else []
    given.out.write_text(json.dumps([*earlier, told], indent=2) + "\n")


if __name__ == "__main__":
    main()
