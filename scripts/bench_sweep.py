#!/usr/bin/env python3
"""The same plan by grid search and by featx: how much faster, and whether the results are the same.

    python scripts/bench_sweep.py STORE [--episodes 3] [--n-jobs 2] [--out data/bench/sweep.json]

Plan: logistic regression and linear SVM, 12 penalties, 5 folds, 5 and 20 shots, raw embeddings. Timed:
``GridSearchCV(n_jobs=...)`` as users run it (joblib's and BLAS's own thread limits), the same with one BLAS
thread a worker, and featx on the same cores, before and after the others, so that other work on the machine
falls on all alike. CPU seconds are those of this process and its workers. Penalties are compared with the grid
search itself, and where they differ with one whose solver converges; predictions and probabilities with
scikit-learn solved to the optimum at the same penalty, because its default tolerance is further from it than
featx is. Run it without ``OMP_NUM_THREADS``: it would change what "as users run it" means, and is written
into the result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import psutil  # type: ignore[import-untyped]
import sklearn
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from featx.choose import Search, search_penalty
from featx.scoring import softmax
from featx.solvers import Loss
from featx.splits import KShotSplit, fold_numbers
from featx.store import read_features

CS = list(np.logspace(-3, 3, 12))
PLAN: list[tuple[Loss, Any]] = [("softmax", LogisticRegression(max_iter=1000)), ("squared_hinge", LinearSVC())]
Task = tuple[NDArray[np.float64], Any, Any, NDArray[np.float64]]


def grid_search(task: Task, model: Any, n_jobs: int) -> GridSearchCV:
    rows, labels, folds, _ = task
    return GridSearchCV(model, {"C": CS}, cv=PredefinedSplit(folds), n_jobs=n_jobs).fit(rows, labels)


def featx_search(task: Task) -> list[Search]:
    with threadpool_limits(1, user_api="blas"):
        return [search_penalty(loss, *task[:3], CS) for loss, _ in PLAN]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("store", type=Path)
    parser.add_argument("--episodes", type=int, default=3)
    parser.add_argument("--n-jobs", type=int, default=joblib.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("data/bench/sweep.json"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # scikit-learn's solvers do stop early here; agreement below says what it costs
    os.environ["PYTHONWARNINGS"] = "ignore"  # the same in the workers
    jobs, plan = options.n_jobs, draws(options.store, options.episodes)
    tasks = [task for tasks in plan for task in tasks]
    ways = {"grid_search_as_it_comes": Clock(), "grid_search_one_thread": Clock(), "featx": Clock()}
    single: list[list[GridSearchCV]] = []

    def grids() -> list[list[GridSearchCV]]:
        return [[grid_search(task, model, jobs) for _, model in PLAN] for task in tasks]

    # Each way gets its own warm workers: joblib replaces them where the thread limits differ.
    pool = joblib.Parallel(jobs)
    pool(joblib.delayed(featx_search)(task) for task in tasks[:jobs])
    found = ways["featx"].time(lambda: pool(joblib.delayed(featx_search)(task) for task in tasks))
    grid_search(tasks[0], PLAN[0][1], jobs)
    ways["grid_search_as_it_comes"].time(grids)
    loky = {"inner_max_num_threads": 1}
    with joblib.parallel_config("loky", **loky), threadpool_limits(1, user_api="blas"):
        grid_search(tasks[0], PLAN[0][1], jobs)
        single = ways["grid_search_one_thread"].time(grids)
    again = Clock()
    again.time(lambda: pool(joblib.delayed(featx_search)(task) for task in tasks))
    ours = ways["featx"]
    ours.wall, ours.cpu = (ours.wall + again.wall) / 2, (ours.cpu + again.cpu) / 2
    print(f"{len(tasks)} draws x 2 heads x 12 penalties x 5 folds, {jobs} workers")
    rows = {}
    for name, clock in ways.items():
        ratios = {"times_wall": clock.wall / ours.wall, "times_cpu": clock.cpu / ours.cpu}
        rows[name] = {"wall_seconds": clock.wall, "cpu_seconds": clock.cpu, **ratios}
        print(f"{name:<26}{clock.wall:9.2f} s{ratios['times_wall']:8.1f} x", end="")
        print(f"   CPU{clock.cpu:9.2f} s{ratios['times_cpu']:8.1f} x")
    written = {
        "plan": "logreg and linear_svm, 12 penalties, 5 folds, 5 and 20 shots, raw embeddings",
        "draws": len(tasks), "n_jobs": jobs, "cores": joblib.cpu_count(), "load": os.getloadavg()[0],
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"), "sklearn": sklearn.__version__,
        "processor": platform.machine(), "seconds": rows, "agreement": agree(tasks, found, single),
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(written, indent=1) + "\n")


def agree(tasks: list[Task], found: list[list[Search]], plain: list[list[GridSearchCV]]) -> dict[str, Any]:
    """How far the choices, predictions and probabilities are the same."""
    out: dict[str, Any] = {}
    for which, (loss, model) in enumerate(PLAN):
        same, same_solved, alike, total, gap = 0, 0, 0, 0, 0.0
        for task, ours, theirs in zip(tasks, found, plain, strict=True):
            search, grid = ours[which], theirs[which]
            scores = grid.cv_results_["mean_test_score"]
            rows, labels, folds, query = task
            equal = search.best == grid.best_index_ or bool(np.isclose(scores[search.best], grid.best_score_))
            same += equal
            if not equal:  # is it the search, or that its solver stopped early?
                patient = model.__class__(tol=1e-7, max_iter=20_000)
                grid = GridSearchCV(patient, {"C": CS}, cv=PredefinedSplit(folds), n_jobs=-1).fit(rows, labels)
                scores = grid.cv_results_["mean_test_score"]
                equal = search.best == grid.best_index_ or bool(np.isclose(scores[search.best], grid.best_score_))
            same_solved += equal
            tol = 1e-10 if loss == "softmax" else 1e-7  # lbfgs and liblinear do not mean the same by it
            exact = model.__class__(C=CS[search.best], tol=tol, max_iter=100_000).fit(rows, labels)
            mine = query @ search.coef.T + search.intercept
            alike += int((mine.argmax(axis=1) == exact.predict(query)).sum())
            total += len(query)
            if loss == "softmax":
                gap = max(gap, float(np.abs(softmax(mine) - exact.predict_proba(query)).max()))
        name = model.__class__.__name__
        out[name] = {
            "same_penalty_or_score": same / len(tasks),
            "same_penalty_or_score_as_converged_search": same_solved / len(tasks),
            "same_predictions": alike / total,
        }
        if loss == "softmax":
            out[name]["largest_gap_of_probabilities"] = gap
        out[name]["converged"] = all(ours[which].converged for ours in found)
        print(name, json.dumps(out[name]), flush=True)
    return out


if __name__ == "__main__":
    main()
