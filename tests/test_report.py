"""Tables, files and the sentence, on a sweep with a clear winner and one without."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from featx.errors import UsageError
from featx.report import conclusion, render, write_report
from featx.results import SweepResult
from featx.sweep import sweep_heads


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
        assert f"{100 * each.accuracy.low:.1f} - {100 * each.accuracy.high:.1f}" in text
        assert f" {each.head} " in text
    assert "…" not in text
    assert "95 % interval" in text
    assert conclusion(result).split(";")[0].split(" (")[0] in " ".join(text.split())


def test_the_conclusion_names_ties_and_the_beaten(result: SweepResult) -> None:
    five = sorted((r for r in result.results if r.n_shots == 5), key=lambda r: r.rank)
    sentence = conclusion(result)
    assert sentence.endswith(".")
    assert sentence.count(".") - sentence.count(".0") >= 1
    for each in five[1:]:
        if each.tied:
            assert each.head in sentence.split("cannot be told apart")[0]
        else:
            assert each.head in sentence.split("beats")[1]
    alone = sweep(["ridge"])
    assert conclusion(alone).startswith("ridge is right in ")


def test_files_of_the_report(result: SweepResult, tmp_path: Path) -> None:
    folder = write_report(result, tmp_path / "deep" / "report", title="insects", provenance={"backbone": "tiny"})
    assert sorted(path.name for path in folder.iterdir()) == ["accuracy_vs_shots.png", "summary.json", "trials.csv"]
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
