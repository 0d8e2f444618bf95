"""Recall of each class over a sweep's draws."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from sweepkit import blobs

from featx.evaluation.sweep import sweep_heads
from featx.heads import make_head
from featx.reports.sweep import write_report


def test_recall_is_the_mean_over_draws_of_the_recommended_heads() -> None:
    rows, labels, names = blobs([40, 12, 25])
    order = np.random.default_rng(0).permutation(len(labels))
    found = sweep_heads(
        rows[order], labels[order], class_names=names, heads=["ridge", "logreg", "knn"], shots=(1, 5, "all"),
        episodes=6, n_jobs=1,
    )  # fmt: skip
    for n_shots in (1, 5, "all"):
        recall = found.recall("ridge", n_shots)
        assert list(recall) == names
        for c, name in enumerate(names):
            shares = []
            for trial in found.of("ridge", n_shots):
                query = found.queries[trial.n_shots, trial.episode]
                own = found.labels[query] == c
                shares.append((trial.predictions[own] == c).mean())
            assert recall[name].mean == pytest.approx(np.mean(shares))
            assert 0 <= recall[name].low <= recall[name].mean <= recall[name].high <= 1
    told = json.loads(json.dumps(found.to_json()))["results"]
    for each in told:
        asked = each["head"] in ("ridge", found.winner)
        assert (each["recall"] is not None) is asked
        assert not asked or (set(each["recall"]) == set(names) and set(each["recall"]["a"]) == {"mean", "low", "high"})
    # Of fewer images less is known.
    width = {name: share.high - share.low for name, share in found.recall("ridge", "all").items()}
    assert width["b"] > width["a"]


@pytest.mark.slow
def test_its_interval_holds_the_recall_on_new_images() -> None:
    held = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        labels = np.repeat([0, 1], [60, 20])
        rows = rng.normal(size=(80, 6)) + np.where(labels[:, None] == 1, 0.8, 0.0)
        found = sweep_heads(
            rows,
            labels,
            class_names=["a", "b"],
            heads=["ridge"],
            shots=(5,),
            episodes=10,
            n_jobs=1,
            near_duplicates=None,
        )
        truth = []
        for draw in range(10):  # heads of five images of each class, on very many new ones
            new = np.random.default_rng((seed, draw))
            support = np.concatenate([new.normal(size=(5, 6)), new.normal(size=(5, 6)) + 0.8])
            head = make_head("ridge").fit(support, np.repeat([0, 1], 5))
            truth.append((head.predict(new.normal(size=(300, 6)) + 0.8) == 1).mean())
        share = found.recall("ridge", 5)["b"]
        held.append(share.low <= np.mean(truth) <= share.high)
    assert np.mean(held) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 40)


def test_the_report_shows_it_the_least_recognised_first(tmp_path: Path) -> None:
    rows, labels, names = blobs([30, 10, 20])
    found = sweep_heads(rows, labels, class_names=names, heads=["ridge"], shots=(2, 5), episodes=4, n_jobs=1)
    text = (write_report(found, tmp_path, title="x") / "report.html").read_text()
    part = text[text.index("How much of each class") : text.index("confuses")]
    shown = re.findall(r"<tr><td>(\w)</td><td>(\d+)</td><td>([\d.]+)</td>", part)
    recall = found.recall("ridge", 5)
    expected = sorted(names, key=lambda name: recall[name].mean)
    assert [name for name, _, _ in shown] == expected
    for name, _, value in shown:
        assert float(value) == pytest.approx(100 * recall[name].mean, abs=0.06)
    assert {name: int(images) for name, images, _ in shown} == {"a": 30, "b": 10, "c": 20}
    assert "Macro-F1" in part
