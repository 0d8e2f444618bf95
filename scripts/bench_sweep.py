#!/usr/bin/env python3
"""The same plan by grid search and by featx: how much faster, and whether the results are the same.

    python scripts/bench_sweep.py STORE [--episodes 20] [--timed 2] [--n-jobs 2] [--seconds 100]

Plan: logistic regression and linear SVM, 12 penalties, 5 folds, 5 and 20 shots, raw embeddings. Timed:
``GridSearchCV(n_jobs=...)`` as users run it (joblib's and BLAS's own thread limits), the same with one BLAS
thread a worker, and featx on the same cores, before and after the others, so that other work on the machine
falls on all alike. CPU seconds are those of this process and its workers. Penalties are compared with the grid
search itself, and where they differ with one whose solver converges; predictions and probabilities with
scikit-learn solved to the optimum at the same penalty, because its default tolerance is further from it than
featx is. Run it without ``OMP_NUM_THREADS``: it would change what "as users run it" means, and is written
into the result. The comparison of results takes longer than the timings, and does not mind other work: what was found
is kept in a journal beside ``--out``, draw by draw and store by store, and another run goes on from there.

``--before PYTHON`` compares the default plan of ``featx sweep`` (``--timed`` draws) with the featx of another virtual
environment, in turns: how much faster, whether the same is chosen, and how far mean accuracies differ.
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
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import psutil  # type: ignore[import-untyped]
import sklearn
from joblib.externals.loky import get_reusable_executor
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from featx.evaluation.splits import KShotSplit
from featx.heads.folds import fold_numbers
from featx.heads.scorer import softmax
from featx.heads.solvers.rows import Loss, NewtonPath
from featx.store.reader import read_features

CS = list(np.logspace(-3, 3, 12))
PLAN: list[tuple[Loss, Any]] = [("softmax", LogisticRegression(max_iter=1000)), ("squared_hinge", LinearSVC())]
REPEATS = 5
"""How often featx does the tasks for one timing: once is over before the workers are evenly busy."""
Task = tuple[NDArray[np.float64], Any, Any, NDArray[np.float64]]


def grid_search(task: Task, model: Any, n_jobs: int) -> GridSearchCV:
    rows, labels, folds, _ = task
    return GridSearchCV(model, {"C": CS}, cv=PredefinedSplit(folds), n_jobs=n_jobs).fit(rows, labels)


@dataclass(frozen=True)
class Search:
    """What a grid search over plain penalties found.

    ``best`` is the first penalty with the highest mean accuracy over folds, as in ``GridSearchCV``; ``coef`` (c, d) and
    ``intercept`` (c,) are those of the refit.
    """

    best: int
    coef: NDArray[np.float64]
    intercept: NDArray[np.float64]
    converged: bool


def search_penalty(loss: Loss, rows: NDArray[np.float64], labels: Any, folds: Any) -> Search:
    """``GridSearchCV`` of ``LogisticRegression`` or ``LinearSVC`` with its refit, by featx's solver on shared work."""
    hinge, n_folds = loss == "squared_hinge", int(folds.max()) + 1
    origin = np.zeros(rows.shape[1]) if hinge else rows.mean(axis=0)
    centred = np.hstack([rows, np.ones((len(rows), 1))]) if hinge else rows - origin
    values, vectors = np.linalg.eigh(centred @ centred.T)
    keep = np.flatnonzero(values > 1e-14 * len(rows) * values[-1])[::-1]
    z = vectors[:, keep] * np.sqrt(values[keep])
    # The last weighting is the whole support: its point of the path is the refit.
    weights = np.array([*(folds != number for number in range(n_folds)), np.ones(len(z))], dtype=np.float64)
    path = NewtonPath(z, labels, int(labels.max()) + 1, weights, loss=loss, tolerance=1e-7)
    points = [path.solve(np.full(n_folds + 1, c)) for c in CS]
    accuracies = []
    for point in points:
        scores = np.einsum("ir,frc->fic", z, point.coef) + point.intercept[:, None]
        named = scores.argmax(axis=2) if scores.shape[2] > 1 else scores[:, :, 0] > 0
        accuracies.append(np.mean([(named[f] == labels)[folds == f].mean() for f in range(n_folds)]))
    best = int(np.argmax(np.round(accuracies, 12)))
    coef = points[best].coef[-1].T @ (vectors[:, keep] / np.sqrt(values[keep])).T @ centred
    coef, offset = (coef[:, :-1], coef[:, -1]) if hinge else (coef, points[best].intercept[-1] - coef @ origin)
    return Search(best, coef, offset, all(bool(point.converged.all()) for point in points))


def featx_search(task: tuple[NDArray[np.float64], Any, Any]) -> list[Search]:
    with threadpool_limits(1, user_api="blas"):
        return [search_penalty(loss, *task) for loss, _ in PLAN]


def cpu_seconds() -> float:
    """CPU seconds so far of this process and all its workers, past and present."""
    waited = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + waited.ru_utime + waited.ru_stime
    for child in psutil.Process().children(recursive=True):
        times = child.cpu_times()
        total += times.user + times.system
    return total


@dataclass
class Clock:
    """Wall and CPU seconds of one way of doing it, added up over draws."""

    wall: float = 0.0
    cpu: float = 0.0

    def time(self, work: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), cpu_seconds()
        out = work()
        self.wall += time.perf_counter() - wall
        self.cpu += cpu_seconds() - cpu
        return out


def draws(store: Path, episodes: int) -> list[list[Task]]:
    """For each episode one task of each number of shots."""
    features = read_features(store)
    known = features.labels >= 0
    rows, labels = features.embeddings[known].astype(np.float64), features.labels[known]
    out: list[list[Task]] = [[] for _ in range(episodes)]
    for n_shots in (5, 20):
        for i, (support, query) in enumerate(KShotSplit(n_shots, n_episodes=episodes).split(rows, labels)):
            folds = fold_numbers(labels[support], np.arange(len(support)), 5, 0)
            out[i].append((rows[support], labels[support], folds, rows[query]))
    return out


def quietly(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run a peer, whose solvers do stop early: what that costs is measured below. Of featx's own nothing is hidden."""
    with warnings.catch_warnings():
        # By their words: the peers' own settings stop these two solvers short, which is part of their protocols.
        warnings.filterwarnings("ignore", "(lbfgs|Liblinear) failed to converge", ConvergenceWarning)
        before = os.environ.get("PYTHONWARNINGS")
        # The same in workers, which start while this holds: by their words, for Python reads it before it can import.
        os.environ["PYTHONWARNINGS"] = "ignore:lbfgs failed to converge,ignore:Liblinear failed to converge"
        try:
            return work(*arguments)
        finally:
            if before is None:
                del os.environ["PYTHONWARNINGS"]
            else:
                os.environ["PYTHONWARNINGS"] = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("store", type=Path)
    parser.add_argument("--episodes", type=int, default=20, help="draws of each number of shots to compare results on")
    parser.add_argument("--timed", type=int, default=2, help="of these, how many to take the time of")
    parser.add_argument("--only", choices=("time", "agreement"), help="one of the two, the other having a quieter hour")
    parser.add_argument("--n-jobs", type=int, default=joblib.cpu_count())
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop then, to go on later")
    parser.add_argument("--out", type=Path, default=Path("data/bench/sweep.json"))
    parser.add_argument(
        "--before", type=Path, metavar="PYTHON", help="compare the default plan with the featx of another interpreter"
    )
    options = parser.parse_args()
    if options.before:
        print(json.dumps(against_before(options.store, options.before, options.timed), indent=1))
        return
    started = time.monotonic()
    plan = draws(options.store, options.episodes)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    journal = options.out.with_suffix(".journal.jsonl")
    lines = journal.read_text().splitlines() if journal.exists() else []
    done = {(e["store"], e["what"]): e["found"] for e in map(json.loads, lines)}

    def keep(what: str, found: dict[str, Any]) -> None:
        done[options.store.name, what] = found
        with journal.open("a") as file:
            file.write(json.dumps({"store": options.store.name, "what": what, "found": found}) + "\n")

    if options.only != "agreement" and (options.store.name, "time") not in done:
        keep("time", take_time([task for tasks in plan[: options.timed] for task in tasks], options.n_jobs))
    for episode, tasks in enumerate(plan):
        what = f"agreement {episode}"
        if options.only == "time" or time.monotonic() - started > options.seconds:
            break
        if (options.store.name, what) not in done:
            keep(what, agree(tasks, options.n_jobs))
    stores = sorted({store for store, _ in done})
    written = {
        "plan": "logreg and linear_svm, 12 penalties, 5 folds, 5 and 20 shots, raw embeddings",
        "date": datetime.now(UTC).date().isoformat(), "machine": f"{platform.system()} {platform.machine()}",
        "sklearn": sklearn.__version__, "stores": {store: summary(done, store) for store in stores},
    }  # fmt: skip
    print(json.dumps(written, indent=1))
    options.out.write_text(json.dumps(written, indent=1) + "\n")


DEFAULT_PLAN = """
import json, sys, time
from featx.evaluation import sweep_heads
from featx.store import read_features
features, episodes = read_features(sys.argv[1]), int(sys.argv[2])
wall, cpu = time.perf_counter(), time.process_time()
result = sweep_heads(
    features.embeddings, features.labels, class_names=features.class_names, groups=features.copies,
    pixels=features.pixels, episodes=episodes, n_jobs=1,
)
trials = [[t.head, str(t.n_shots), dict(t.params), t.accuracy] for t in (*result.trials, *result.pixels)]
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, trials]))
"""
"""The heads, numbers of shots and baseline of ``featx sweep``, on one core; any version of featx runs it."""


def against_before(store: Path, python: Path, episodes: int) -> dict[str, Any]:
    """The default plan by this featx and by that of another interpreter, three times in turns; the best counts."""
    ways: dict[str, list[Any]] = {"before": [], "featx": []}
    for _ in range(3):
        for name, each in (("before", python), ("featx", Path(sys.executable))):
            ran = subprocess.run(
                [each, "-c", DEFAULT_PLAN, store, str(episodes)], check=True, capture_output=True, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            ways[name].append(json.loads(ran.stdout))
    before, after = (min(runs, key=lambda run: run[1]) for runs in ways.values())
    cells: dict[tuple[str, str], list[float]] = {}
    for old, new in zip(before[2], after[2], strict=True):
        cells.setdefault((old[0], old[1]), []).append(new[3] - old[3])
    return {
        "store": store.name,
        "draws": episodes,
        "load": os.getloadavg()[0],
        "cpu_seconds": {"before": before[1], "featx": after[1]},
        "times_cpu": before[1] / after[1],
        "times_wall": min(run[0] for run in ways["before"]) / min(run[0] for run in ways["featx"]),
        "same_choices": sum(old[2] == new[2] for old, new in zip(before[2], after[2], strict=True)) / len(after[2]),
        "largest_difference_of_mean_accuracy": max(abs(float(np.mean(each))) for each in cells.values()),
    }


def take_time(tasks: list[Task], jobs: int) -> dict[str, Any]:
    """Wall and CPU seconds of each way over the same tasks."""
    ways = {"grid_search_as_it_comes": Clock(), "grid_search_one_thread": Clock(), "featx": Clock()}

    def grids() -> list[list[GridSearchCV]]:
        return [[grid_search(task, model, jobs) for _, model in PLAN] for task in tasks]

    # Each way gets its own warm workers: joblib replaces them where the thread limits differ.
    pool = joblib.Parallel(jobs)
    pool(joblib.delayed(featx_search)(task[:3]) for task in tasks[:jobs])
    ways["featx"].time(lambda: pool(joblib.delayed(featx_search)(task[:3]) for task in REPEATS * tasks))
    get_reusable_executor().shutdown()  # the peers' workers are to start with the peers' warnings
    quietly(grid_search, tasks[0], PLAN[0][1], jobs)
    quietly(ways["grid_search_as_it_comes"].time, grids)
    with joblib.parallel_config("loky", inner_max_num_threads=1), threadpool_limits(1, user_api="blas"):
        quietly(grid_search, tasks[0], PLAN[0][1], jobs)
        quietly(ways["grid_search_one_thread"].time, grids)
    get_reusable_executor().shutdown()
    pool(joblib.delayed(featx_search)(task[:3]) for task in tasks[:jobs])
    again = Clock()
    again.time(lambda: pool(joblib.delayed(featx_search)(task[:3]) for task in REPEATS * tasks))
    ours = ways["featx"]
    ours.wall, ours.cpu = (ours.wall + again.wall) / (2 * REPEATS), (ours.cpu + again.cpu) / (2 * REPEATS)
    print(f"{len(tasks)} draws x 2 heads x 12 penalties x 5 folds, {jobs} workers")
    rows: dict[str, Any] = {}
    for name, clock in ways.items():
        ratios = {"times_wall": clock.wall / ours.wall, "times_cpu": clock.cpu / ours.cpu}
        rows[name] = {"wall_seconds": clock.wall, "cpu_seconds": clock.cpu, **ratios}
        print(f"{name:<26}{clock.wall:9.2f} s{ratios['times_wall']:8.1f} x", end="")
        print(f"   CPU{clock.cpu:9.2f} s{ratios['times_cpu']:8.1f} x", flush=True)
    about = {"n_jobs": jobs, "cores": joblib.cpu_count(), "load": os.getloadavg()[0]}
    return {"draws": len(tasks), **about, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"), "seconds": rows}


def same_choice(search: Search, grid: GridSearchCV) -> bool:
    """Whether the penalty is the same, or one with an equal score."""
    score = grid.cv_results_["mean_test_score"][search.best]
    return bool(search.best == grid.best_index_ or np.isclose(score, grid.best_score_))


def agree(tasks: list[Task], jobs: int) -> dict[str, Any]:
    """How far the choices, predictions and probabilities are the same: counts over tasks and images."""
    out: dict[str, Any] = {}
    for task in tasks:
        # What is solved to the optimum is solved in the rows' span: the same problem turned, and many times faster.
        basis = np.linalg.qr(task[0].T)[0]
        turned = (task[0] @ basis, *task[1:3], task[3] @ basis)
        for (loss, model), search in zip(PLAN, featx_search(task[:3]), strict=True):
            _, labels, _, query = task
            found = out.setdefault(
                type(model).__name__,
                {"draws": 0, "same": 0, "same_as_converged": 0, "alike": 0, "images": 0, "gap": 0.0, "converged": 0},
            )
            with joblib.parallel_config("loky", inner_max_num_threads=1), threadpool_limits(1, user_api="blas"):
                equal = same_choice(search, quietly(grid_search, task, model, jobs))
                found["same"] += equal
                if not equal:  # is it the search, or that its solver stopped early?
                    patient = clone(model).set_params(tol=1e-7, max_iter=20_000)
                    equal = same_choice(search, quietly(grid_search, turned, patient, jobs))
                found["same_as_converged"] += equal
                tol = 1e-10 if loss == "softmax" else 1e-7  # lbfgs and liblinear do not mean the same by it
                exact = clone(model).set_params(C=CS[search.best], tol=tol, max_iter=100_000)
                quietly(exact.fit, turned[0], labels)
            mine = query @ search.coef.T + search.intercept
            named = mine.argmax(axis=1) if mine.shape[1] > 1 else (mine[:, 0] > 0).astype(int)
            found["draws"] += 1
            found["alike"] += int((named == exact.predict(turned[3])).sum())
            found["images"] += len(query)
            found["converged"] += int(search.converged)
            if loss == "softmax":
                found["gap"] = max(found["gap"], float(np.abs(softmax(mine) - exact.predict_proba(turned[3])).max()))
    return out


def summary(done: dict[tuple[str, str], dict[str, Any]], store: str) -> dict[str, Any]:
    """What the journal says of a store."""
    out: dict[str, Any] = {"time": done.get((store, "time")), "agreement": {}}
    parts = [found for (name, what), found in done.items() if name == store and what != "time"]
    for _, model in PLAN if parts else []:
        each = [part[type(model).__name__] for part in parts]
        total = {key: sum(part[key] for part in each) for key in each[0]}
        out["agreement"][type(model).__name__] = {
            "draws": total["draws"],
            "same_penalty_or_score": total["same"] / total["draws"],
            "same_penalty_or_score_as_converged_search": total["same_as_converged"] / total["draws"],
            "same_predictions": total["alike"] / total["images"],
            "converged": total["converged"] / total["draws"],
        }
        if isinstance(model, LogisticRegression):
            out["agreement"]["LogisticRegression"]["largest_gap_of_probabilities"] = max(part["gap"] for part in each)
    return out


if __name__ == "__main__":
    main()
