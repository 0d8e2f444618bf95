"""Tables, files and the sentence, on a sweep with a clear winner and one without."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pagekit import Page
from PIL import Image
from rich.console import Console

from featx.advice.mislabelled import rank_labels
from featx.errors import UsageError
from featx.evaluation.results import SweepResult
from featx.evaluation.stats import limits, percent, shown_gap
from featx.evaluation.sweep import sweep_heads
from featx.reports.sweep import TOO_WIDE, conclusion, render, render_table, write_report


def sweep(heads: list[str], seed: int = 0, shots: tuple[int, ...] = (1, 5)) -> SweepResult:
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1, 2], 40)
    rows = 0.6 * rng.normal(size=(3, 64))[labels] + rng.normal(size=(120, 64))
    return sweep_heads(
        rows, labels, class_names=["[red]ants[/red]", "bees", "wasps"], heads=heads, shots=shots, episodes=8, n_jobs=1
    )


@pytest.fixture(scope="module")
def result() -> SweepResult:
    return sweep(["logreg", "ridge", "knn"])


def test_the_table_fits_eighty_columns_and_shows_ranks_and_ties(result: SweepResult) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(render(result))
    text = console.export_text()
    console.file.close()
    for each in result.results:
        assert limits(each.accuracy) in text
        assert f" {each.head} " in text
    assert "…" not in text
    for heading in ("shots", "head", "accuracy", "95 % interval", "balanced", "ECE", "fit s"):
        assert f" {heading} " in f" {text.splitlines()[1]} "
    assert all(len(line) <= 80 for line in text.splitlines())
    assert conclusion(result) in " ".join(text.split())


def test_the_widest_table_fits_eighty_columns() -> None:
    """Names, numbers and headings at their longest: a truncated heading is a riddle."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 30)
    rows = 9.0 * rng.normal(size=(2, 16))[labels] + rng.normal(size=(60, 16))
    perfect = sweep_heads(rows, labels, class_names="ab", shots=(20,), episodes=2, n_jobs=1, near_duplicates=None)
    slow = replace(perfect, trials=tuple(replace(trial, fit_seconds=34.56) for trial in perfect.trials))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_table(slow))
    text = console.export_text()
    assert "…" not in text
    for words in ("nearest_centroid", "100.0", "34.56", "balanced", "accuracy", "fit s", "95 % interval"):
        assert words in text


def test_the_conclusion_names_ties_and_the_beaten(result: SweepResult) -> None:
    sentence = conclusion(result)
    last = {each.head: each for each in result.results if each.n_shots == 5}
    own = last[result.winner]
    assert sentence.startswith(f"Use {result.winner}: accuracy {percent(own.accuracy)} with 5 images per class.")
    assert "Its mean accuracy over all numbers of images is the highest of 3 heads here." in sentence
    same, _, beaten = sentence.partition(" beats ")
    for head in set(last) - {result.winner}:
        tied = result.cannot_tell(result.winner, head, 5)
        assert (head in same.partition("No clear difference between")[2]) == tied
        assert (head in beaten) == (not tied and last[head].accuracy.mean < own.accuracy.mean)
    before = next(r for r in result.results if (r.head, r.n_shots) == (result.winner, 1))
    gain = own.accuracy.mean - before.accuracy.mean
    assert gain > 0.01
    words = "More images help more than another head"
    shown = shown_gap(own.accuracy.mean, before.accuracy.mean)
    assert f"{words}: {100 * shown:.1f} points from 1 to 5 images per class." in sentence
    alone = sweep(["ridge"], shots=(5,))
    assert conclusion(alone).startswith("Use ridge: ") and conclusion(alone).count("ridge") == 1


def test_too_few_photos_are_no_recommendation() -> None:
    labels = np.repeat([0, 1], 3)
    rows = np.random.default_rng(1).normal(size=(6, 8))
    few = sweep_heads(rows, labels, class_names="ab", heads=["ridge", "knn"], shots=(1,), episodes=2, n_jobs=1)
    own = next(each for each in few.results if each.head == few.winner)
    assert own.accuracy.high - own.accuracy.low > 2 * TOO_WIDE
    sentence = conclusion(few)
    assert sentence.startswith("There are too few photos to tell which head is best.")
    assert "Use " not in sentence and percent(own.accuracy) in sentence
    assert "Add images to every class" in sentence and "--episodes" in sentence


def test_files_of_the_report(result: SweepResult, tmp_path: Path) -> None:
    folder = write_report(result, tmp_path / "deep" / "report", title="insects", provenance={"backbone": "tiny"})
    assert sorted(path.name for path in folder.iterdir()) == [
        "accuracy_vs_shots.png", "report.html", "summary.json", "times.csv", "trials.csv",
    ]  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["title"] == "insects"
    assert summary["provenance"] == {"backbone": "tiny"}
    assert {k: summary[k] for k in result.to_json()} == result.to_json()
    rows = list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))
    assert len(rows) == 3 * 2 * 8
    assert {(r["head"], r["n_shots"], r["episode"]) for r in rows} == {
        (h, str(n), str(e)) for h in result.heads for n in (1, 5) for e in range(8)
    }
    for head in result.heads:
        mean = np.mean([float(r["accuracy"]) for r in rows if r["head"] == head and r["n_shots"] == "5"])
        stated = next(r for r in summary["results"] if r["head"] == head and r["n_shots"] == 5)
        assert mean == pytest.approx(stated["accuracy"]["mean"])
    with Image.open(folder / "accuracy_vs_shots.png") as picture:
        assert picture.size[0] >= 1000
        assert len(set(picture.convert("RGB").resize((60, 40)).tobytes())) > 20
    write_report(result, folder, title="again", provenance=None)
    assert json.loads((folder / "summary.json").read_text())["title"] == "again"


def test_a_folder_that_cannot_be_written_is_a_usage_error(result: SweepResult, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write the report.* Choose another folder with --out\."):
        write_report(result, tmp_path / "file", title="x")


def test_the_page_is_one_file_that_loads_nothing_and_escapes_names(result: SweepResult, tmp_path: Path) -> None:
    dot = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(dot, "PNG")
    names = [f"<i>{i}</i>.jpg" for i in range(120)]
    folder = write_report(
        result, tmp_path, title="<b>insects</b>", provenance={"backbone": "tiny", "fingerprint": "f00d"},
        command="featx sweep 'a & b'", ids=names, thumbnail=lambda row: dot.getvalue() if row % 2 else None,
    )  # fmt: skip
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "b", "i"}
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#")), tag
        if tag == "img":
            assert attributes["alt"]
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    words = " ".join(" ".join(page.words).split())
    assert "<b>insects</b>" in words
    assert "featx sweep 'a & b'" in words
    assert "f00d" in words
    assert conclusion(result) in words
    assert "prefers-color-scheme: dark" in text
    for each in result.results:
        assert f"{100 * each.accuracy.mean:.1f}" in words


@pytest.mark.slow
def test_the_page_leads_with_what_to_do_and_folds_the_hashes_away(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], 40)
    rows = 3.0 * rng.normal(size=(2, 32))[labels] + rng.normal(size=(80, 32))
    labels[[5, 50]] = 1 - labels[[5, 50]]
    heads = ["ridge", "knn", "lda", "logreg"]
    found = sweep_heads(rows, labels, class_names=["a", "b"], heads=heads, shots=(1, 10), episodes=8, n_jobs=1)
    names = [f"{i:02}.jpg" for i in range(80)]
    provenance = {"backbone": "tiny", "fingerprint": "f00d"}
    ranking = rank_labels(rows, labels, class_names=["a", "b"], n_jobs=1)
    folder = write_report(found, tmp_path, title="x", provenance=provenance, ids=names, labels=ranking)
    text = (folder / "report.html").read_text(encoding="utf-8")
    places = [text.index(part) for part in (conclusion(found)[:40], "Labels to check", "<svg", '<td class="bar">')]
    assert places == sorted(places)
    (copied,) = re.findall(r'<pre class="list">(.*?)</pre>', text, re.DOTALL)
    lines = [line.split("\t") for line in copied.splitlines()]
    assert sorted(line[0] for line in lines) == ["05.jpg", "50.jpg"]
    assert all({line[1], line[2]} == {"a", "b"} and float(line[3]) >= 0.8 for line in lines)
    # Of four heads the best and one rival are in colour; bars are no background of digits.
    curve = text[text.index("<svg") : text.index("</svg>")]
    assert sorted(re.findall(r'stroke="var\(--(\w+)\)"', curve)) == ["best", "rest", "rest", "rival"]
    assert set(re.findall(r'<td class="bar">(.*?)</td>', text)) == {
        f'<span style="width:{100 * each.accuracy.mean:.1f}%"></span>' for each in found.results
    }
    folded = text[text.index("Versions, settings and hashes") :]
    assert text.count("f00d") == folded.count("f00d") == 1


def test_likely_mislabelled_images_are_found() -> None:
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], 40)
    rows = 3.0 * rng.normal(size=(2, 32))[labels] + rng.normal(size=(80, 32))
    labels[[5, 50]] = 1 - labels[[5, 50]]
    found = sweep_heads(rows, labels, class_names=["a", "b"], heads=["ridge"], shots=(10,), episodes=8, n_jobs=1)
    ranking = rank_labels(rows, labels, class_names=["a", "b"], n_jobs=1)
    assert sorted(ranking.rows[ranking.doubtful].tolist()) == [5, 50]
    assert (ranking.suggested != ranking.labels)[ranking.doubtful].all()
    assert (ranking.confidence[ranking.doubtful] >= 0.8).all()
    confusion = found.confusion("ridge", 10)
    assert confusion.sum() == sum(t.n_query for t in found.trials)
    assert np.trace(confusion) / confusion.sum() == pytest.approx(found.results[0].accuracy.mean, abs=0.01)
    bins = found.reliability("ridge", 10)
    assert sum(count for _, _, count in bins) == confusion.sum()
    assert all(0 <= value <= 1 for sure, hit, _ in bins for value in (sure, hit))
