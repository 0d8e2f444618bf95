#!/usr/bin/env python3
"""Search in a large gallery: featx, scikit-learn and faiss called by hand, on the same rows.

    python scripts/bench_search.py [--rows 100000] [--queries 1000] [--dim 1280]

Rows are synthetic: clusters of unequal size, variances that fall off along the axes as those of image embeddings do,
turned at random so that no axis is special; queries are new draws of the same. Every contender runs in a process of its
own on the same memory-mapped file, so that memory can be told apart; its best of ``--repeats`` counts. Prints a table
and the ratios, and writes them with machine and date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from machine import processor
from numpy.typing import NDArray

K = 10
BLOCK = 50_000
NAMES = ("featx exact", "featx approximate", "scikit-learn cosine", "scikit-learn euclidean", "faiss IndexFlatIP")
Floats = NDArray[np.float32]


def write_rows(folder: Path, rows: int, queries: int, dim: int, random_state: int) -> None:
    """rows.npy and queries.npy, made in blocks; all of length 1."""
    random = np.random.default_rng(random_state)
    spread = (1 / np.sqrt(1 + np.arange(dim) / 10)).astype(np.float32)
    turn = np.linalg.qr(random.normal(size=(dim, dim)))[0].astype(np.float32)
    clusters = max(10, rows // 200)
    centres = random.standard_normal((clusters, dim), dtype=np.float32) * spread
    share = random.pareto(1.5, clusters) + 0.1
    share /= share.sum()

    def draw(n: int) -> Floats:
        noise = random.standard_normal((n, dim), dtype=np.float32) * spread
        out = (centres[random.choice(clusters, n, p=share)] + 0.7 * noise) @ turn
        return np.asarray(out / np.linalg.norm(out, axis=1, keepdims=True), np.float32)

    mapped = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.float32, (rows, dim))
    for start in range(0, rows, BLOCK):
        stop = min(start + BLOCK, rows)
        mapped[start:stop] = draw(stop - start)
    mapped.flush()
    np.save(folder / "queries.npy", draw(queries))


def contend(name: str, folder: str, repeats: int, pipe: Any) -> None:
    """One contender in its own process: seconds to build, best seconds to search, what was found, peak memory."""
    rows: Floats = np.load(Path(folder) / "rows.npy", mmap_mode="r")
    queries: Floats = np.load(Path(folder) / "queries.npy")
    for start in range(0, len(rows), BLOCK):
        rows[start : start + BLOCK].sum()  # in the page cache, for everyone
    started = time.perf_counter()
    search, facts = prepare(name, rows, folder)
    built = time.perf_counter() - started
    times, work = [], []
    for _ in range(repeats):
        started, busy = time.perf_counter(), time.process_time()
        found = search(queries)
        times.append(time.perf_counter() - started)
        work.append(time.process_time() - busy)
    record = {"build": built, "search": min(times), "search_cpu": min(work), "all": times, **memory(), **facts}
    pipe.send({**record, "found": found})


def memory() -> dict[str, int]:
    """Peak memory of this process without the mapped rows, which every contender shares, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    mapped = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile")]
    return {"peak_own_bytes": peak - sum(mapped)}


def prepare(name: str, rows: Floats, folder: str) -> tuple[Callable[[Floats], Any], dict[str, Any]]:
    """The search function of a contender, and facts about it."""
    if name.startswith("featx"):
        from featx.retrieval.neighbours import GalleryIndex

        index = GalleryIndex(method="exact" if name == "featx exact" else "approximate").fit(rows)
        facts: dict[str, Any] = {"recall_measured_at_build": index.recall_}
        approximate = index.approximate_index
        if approximate is not None:
            saved = Path(folder) / "index.faiss"
            approximate.save(saved)
            facts |= {"file_bytes": saved.stat().st_size, "lists": approximate.n_lists}
            facts |= {"probes": approximate.probes, "depth": approximate.depth}
        return lambda queries: index.search(queries, K)[1], facts
    if name.startswith("scikit-learn"):
        from sklearn.neighbors import NearestNeighbors

        metric = name.split()[1]
        neighbours = NearestNeighbors(n_neighbors=K, algorithm="brute", metric=metric).fit(rows)
        return lambda queries: neighbours.kneighbors(queries, return_distance=False), {}
    import faiss

    flat = faiss.IndexFlatIP(rows.shape[1])
    for start in range(0, len(rows), BLOCK):
        flat.add(np.ascontiguousarray(rows[start : start + BLOCK]))
    return lambda queries: flat.search(queries, K)[1], {}


def run(name: str, folder: Path, repeats: int) -> dict[str, Any]:
    """A contender's record, or its error."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=contend, args=(name, str(folder), repeats, theirs))
    process.start()
    theirs.close()
    try:
        record: dict[str, Any] = ours.recv()
    except EOFError:
        process.join()
        return {"error": f"ended with {process.exitcode}"}
    process.join()
    return record


def recall(found: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """Share of the true neighbours that were found."""
    return float(np.mean([len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True)]) / truth.shape[1])


def adding(folder: Path) -> dict[str, float]:
    """Seconds to make an approximate index of nine tenths of the rows, and to add the last tenth."""
    from featx.retrieval.neighbours import GalleryIndex

    rows: Floats = np.load(folder / "rows.npy", mmap_mode="r")
    most = len(rows) * 9 // 10
    started = time.perf_counter()
    index = GalleryIndex(method="approximate").fit(rows[:most])
    built = time.perf_counter() - started
    started = time.perf_counter()
    index.partial_fit(rows[most:])
    return {"build_nine_tenths": built, "add_a_tenth": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=1280)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="contenders, separated by commas")
    parser.add_argument("--adding", action="store_true", help="time the adding of rows too")
    parser.add_argument("--out", type=Path, default=Path("data/bench/search.json"))
    options = parser.parse_args()
    names = [name for name in NAMES if options.only is None or name in options.only.split(",")]
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="featx-bench-") as place:
        folder = Path(place)
        print(f"{options.rows:,} rows of {options.dim}, {options.queries:,} queries, k = {K}", flush=True)
        write_rows(folder, options.rows, options.queries, options.dim, options.seed)
        records: dict[str, dict[str, Any]] = {}
        truth = None
        for name in names:
            record = run(name, folder, options.repeats)
            records[name] = record
            if "error" in record:
                print(f"{name:24} {record['error']}", flush=True)
                continue
            found = record.pop("found")
            truth = found if name == "featx exact" else truth
            if truth is not None:
                record["recall"] = recall(found, truth)
            print(
                f"{name:24} build {record['build']:8.1f} s   search {record['search']:8.2f} s   "
                f"CPU {record['search_cpu']:8.2f} s   recall {record.get('recall', 0):.4f}   "
                f"memory {record['peak_own_bytes'] / 2**30:.2f} GiB",
                flush=True,
            )
        if options.adding:
            records["adding"] = adding(folder)
            print(records["adding"])
    exact = records.get("featx exact", {}).get("search")
    ratios = {
        f"{name} / featx exact": record["search"] / exact
        for name, record in records.items()
        if exact and "search" in record and not name.startswith("featx")
    }
    if exact and "search" in records.get("featx approximate", {}):
        ratios["featx exact / featx approximate"] = exact / records["featx approximate"]["search"]
    # On a machine that does other work besides, the CPU seconds are the steadier measure.
    busy = records.get("featx exact", {}).get("search_cpu")
    cpu_ratios = {
        f"{name} / featx exact": record["search_cpu"] / busy
        for name, record in records.items()
        if busy and "search_cpu" in record and name != "featx exact"
    }
    for name, value in ratios.items():
        print(f"{name:44} {value:8.2f}")
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": processor(), "cores": os.cpu_count(), "system": platform.platform(), "load_before": load},
        "versions": {name: version(name) for name in ("featx", "numpy", "scikit-learn", "faiss-cpu")},
        "rows": options.rows,
        "dim": options.dim,
        "queries": options.queries,
        "k": K,
        "contenders": records,
        "ratios": ratios,
        "cpu_ratios": cpu_ratios,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{report['date']}, {processor()}, {os.cpu_count()} cores, load before {load:.1f}; written to {options.out}")


if __name__ == "__main__":
    main()
