#!/usr/bin/env python3
"""The same plan by grid search and by featx: how much faster, and whether the results are the same.

    python scripts/bench_sweep.py STORE [--episodes 3] [--n-jobs 2]

Plan: logistic regression and linear SVM, 12 penalties, 5 folds, 5 and 20 shots, raw embeddings. Timed:
``GridSearchCV(n_jobs=...)`` as users run it (BLAS as it comes), the same with one BLAS thread a worker, and
featx on the same cores. Agreement is with scikit-learn solved to the optimum, because its default
tolerance is further from it than featx is.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from featx.choose import Search, search_penalty
from featx.solvers import Loss, softmax
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


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    out = work()
    return time.perf_counter() - started, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("store", type=Path)
    parser.add_argument("--episodes", type=int, default=3)
    parser.add_argument("--n-jobs", type=int, default=joblib.cpu_count())
    options = parser.parse_args()
    features = read_features(options.store)
    known = features.labels >= 0
    rows, labels = features.embeddings[known].astype(np.float64), features.labels[known]
    tasks: list[Task] = []
    for n_shots in (5, 20):
        for support, query in KShotSplit(n_shots, n_episodes=options.episodes).split(rows, labels):
            folds = fold_numbers(labels[support], np.arange(len(support)), 5, 0)
            tasks.append((rows[support], labels[support], folds, rows[query]))
    warnings.simplefilter("ignore")  # scikit-learn's solvers do stop early here; agreement below says what it costs
    jobs = options.n_jobs
    pool = joblib.Parallel(jobs)
    pool(joblib.delayed(featx_search)(task) for task in tasks[:jobs])  # workers up, as for all three
    ours, found = timed(lambda: pool(joblib.delayed(featx_search)(task) for task in tasks))
    loky = {"inner_max_num_threads": 1}
    with joblib.parallel_config("loky", **loky):
        single, plain = timed(lambda: [[grid_search(t, model, jobs) for _, model in PLAN] for t in tasks])
    crowded, _ = timed(lambda: [[grid_search(t, model, jobs) for _, model in PLAN] for t in tasks])
    print(f"{len(tasks)} draws x 2 heads x 12 penalties x 5 folds, {jobs} workers")
    for name, seconds in [
        ("GridSearchCV, BLAS threads as they come", crowded),
        ("GridSearchCV, one BLAS thread a worker", single),
        ("featx", ours),
    ]:
        print(f"{name:<42}{seconds:9.2f} s{seconds / ours:9.1f} x")
    agree(tasks, found, plain)


def agree(tasks: list[Task], found: list[list[Search]], plain: list[list[GridSearchCV]]) -> None:
    """Print how far the choices, predictions and probabilities are the same."""
    for which, (loss, model) in enumerate(PLAN):
        same, alike, total, gap = 0, 0, 0, 0.0
        for task, ours, theirs in zip(tasks, found, plain, strict=True):
            search, grid = ours[which], theirs[which]
            scores = grid.cv_results_["mean_test_score"]
            same += search.best == grid.best_index_ or bool(np.isclose(scores[search.best], grid.best_score_))
            rows, labels, _, query = task
            exact = model.__class__(C=CS[search.best], tol=1e-8, max_iter=100_000).fit(rows, labels)
            mine = query @ search.coef.T + search.intercept
            alike += int((mine.argmax(axis=1) == exact.predict(query)).sum())
            total += len(query)
            if loss == "softmax":
                gap = max(gap, float(np.abs(softmax(mine) - exact.predict_proba(query)).max()))
        extra = f", probabilities within {gap:.1e}" if loss == "softmax" else ""
        name = model.__class__.__name__
        print(f"{name}: same penalty or score {same}/{len(tasks)}, same predictions {100 * alike / total:.2f} %{extra}")


if __name__ == "__main__":
    main()
