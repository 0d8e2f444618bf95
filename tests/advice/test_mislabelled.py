"""Planted mistakes among labels are found, by the function and by the command."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import Featx
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_predict

from featx.advice.mislabelled import MISSED, rank_labels
from featx.cli.demo_images import write_photographs
from featx.errors import UsageError

NAMES = [str(digit) for digit in range(10)]


def planted(share: float, n: int = 500) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]]:
    """Digits, labels of which a share is wrong, and which."""
    digits = load_digits()
    rng = np.random.default_rng(0)
    rows, labels = digits.data[:n] / 16, digits.target[:n].astype(np.int64)
    wrong = np.zeros(n, dtype=bool)
    wrong[rng.choice(n, round(share * n), replace=False)] = True
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, int(wrong.sum()))) % 10
    return rows, labels, wrong


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1])
def test_planted_mistakes_come_first(share: float) -> None:
    rows, labels, wrong = planted(share)
    found = rank_labels(rows, labels, class_names=NAMES, n_jobs=1)
    assert np.array_equal(np.sort(found.rows), np.arange(len(rows)))
    assert np.array_equal(found.labels, labels[found.rows])
    assert np.all(np.diff(found.label_confidence) >= 0)
    assert np.all(found.confidence >= found.label_confidence)
    precision = average_precision_score(wrong[found.rows], -found.label_confidence)
    plain = cross_val_predict(LogisticRegression(max_iter=500), rows, labels, cv=5, method="predict_proba")
    own = plain[np.arange(len(labels)), labels]
    assert precision > 0.85
    assert precision > average_precision_score(wrong, -own) - 0.02
    assert np.all(found.suggested[found.doubtful] != found.labels[found.doubtful])
    assert wrong[found.rows][found.doubtful].sum() >= 0.65 * wrong.sum()
    assert found.doubtful.sum() <= wrong.sum() + 0.05 * len(rows)
    assert np.array_equal(load_digits().target[found.rows[:5]], found.suggested[:5])


@pytest.mark.slow
def test_copies_do_not_vouch_for_a_wrong_label() -> None:
    """The mistakes three times over: in one fold none is learnt from, spread over several they defend each other."""
    rows, labels, wrong = planted(0.03, 300)
    again = np.concatenate([np.arange(len(rows)), np.flatnonzero(wrong), np.flatnonzero(wrong)])
    for groups, threshold in ((again, None), (None, 0.98)):
        found = rank_labels(
            rows[again], labels[again], class_names=NAMES, groups=groups, near_duplicates=threshold, n_jobs=1
        )
        assert average_precision_score(wrong[again][found.rows], -found.label_confidence) > 0.9
    apart = rank_labels(rows[again], labels[again], class_names=NAMES, near_duplicates=None, n_jobs=1)
    together = found.label_confidence[wrong[again][found.rows]].mean()
    assert apart.label_confidence[wrong[again][apart.rows]].mean() > together + 0.1


def test_an_image_under_two_labels_and_classes_too_small() -> None:
    rows, labels, _ = planted(0.0, 200)
    copies = np.concatenate([np.arange(200), [0, 1]])
    other = np.concatenate([labels, [(labels[0] + 1) % 10, 10], [-1]])
    more = np.vstack([rows[copies], rows[:1]])
    found = rank_labels(
        more, other, class_names=[*NAMES, "lonely"], near_duplicates=None, groups=[*copies, 500], n_jobs=1
    )
    assert found.left_out == ("lonely",)
    assert not {201, 202} & set(found.rows.tolist())
    first = int(np.flatnonzero(found.rows == 200)[0])
    assert first < 3 and found.suggested[first] == labels[0]
    with pytest.raises(UsageError, match="two classes of two different images"):
        rank_labels(rows[:5], [0, 0, 0, 1, -1], class_names=["a", "b"], near_duplicates=None)
    with pytest.raises(UsageError, match="gives none"):
        rank_labels(rows, labels, class_names=NAMES, head="linear_svm")


@pytest.mark.slow
def test_the_command_finds_swapped_photos(tmp_path: Path, featx: Featx) -> None:
    photos = tmp_path / "tiles"
    write_photographs(photos, tmp_path / "new")
    swapped = {}
    for name, to in (("coins", "coffee"), ("rocket", "cell"), ("chelsea", "moon"), ("brick", "ihc")):
        (photos / name / "1-1.png").rename(photos / to / f"{name}.png")
        swapped[f"{to}/{name}.png"] = (to, name)
    store = tmp_path / "tiles.featx"
    assert featx("extract", photos, "--out", store).code == 0
    html, table = tmp_path / "labels.html", tmp_path / "labels.csv"
    ran = featx("labels", store, "--html", html, "--csv", table, "--json")
    assert ran.code == 0, ran.err
    assert MISSED in ran.err and MISSED in html.read_text()
    answer = ran.json
    first = answer["ranking"][:6]
    assert set(swapped) <= {row["id"] for row in first}
    for row in first:
        if row["id"] in swapped:
            assert (row["label"], row["suggested"]) == swapped[row["id"]]
            assert row["doubtful"] and row["confidence"] > row["label_confidence"]
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row["id"], row["suggested"]) for row in rows] == [
        (row["id"], row["suggested"]) for row in answer["ranking"]
    ]
    assert len(rows) == answer["images"] == 237
    page = html.read_text()
    assert page.count('src="data:image/jpeg') == answer["doubtful"] == sum(row["doubtful"] for row in answer["ranking"])
    for to, name in swapped.values():
        assert f"{to} \u2192 {name}" in page
    text = featx("labels", store).out
    assert all(re.search(rf"{re.escape(name)} +{to} +{by}", text) for name, (to, by) in swapped.items())
    table.write_text("something of mine\n")
    refused = featx("labels", store, "--csv", table)
    assert refused.code == 2 and table.read_text() == "something of mine\n"
    # The report of a sweep shows the same ones.
    swept = featx("sweep", store, "--heads", "ridge", "--shots", "1", "--episodes", "2")
    assert swept.code == 0, swept.err
    report = (tmp_path / "tiles.report" / "report.html").read_text()
    (listed,) = re.findall(r'<pre class="list">(.*?)</pre>', report, re.DOTALL)
    assert [line.split("\t")[0] for line in listed.splitlines()] == [
        row["id"] for row in answer["ranking"] if row["doubtful"]
    ]


def test_a_burst_does_not_vouch_for_its_own_label() -> None:
    """Ten copies of a photo with one wrong label agree with each other; photos of other bursts do not."""
    rng = np.random.default_rng(0)
    truth = np.arange(40) % 2
    wrong = np.isin(np.arange(40), (4, 17, 30))
    rows = np.repeat(5.0 * np.eye(2, 100)[truth] + rng.normal(size=(40, 100)), 10, axis=0)
    rows += 0.05 * rng.normal(size=rows.shape)
    labels, bursts = np.repeat(np.where(wrong, 1 - truth, truth), 10), np.repeat(np.arange(40), 10)
    found = {}
    for name, sites in (("with", bursts), ("without", None)):
        ranking = rank_labels(rows, labels, class_names="ab", sites=sites, near_duplicates=None, n_jobs=1, repeats=1)
        found[name] = np.mean(np.repeat(wrong, 10)[ranking.rows[:30]])
    assert found["with"] >= 0.9
    assert found["without"] < 0.3
