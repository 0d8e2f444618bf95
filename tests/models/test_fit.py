"""Fit: probabilities that are calibrated, a threshold that holds, and the commands that keep and use a head."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Featx, class_folders, picture
from modelkit import clusters
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, recall_score

from featx.backbones.engines.base import Engine
from featx.backbones.engines.choice import make_engine
from featx.cli.fit import AUTO, tell_model
from featx.cli.serve import _serving
from featx.errors import MismatchError, UsageError
from featx.evaluation.stats import Interval, expected_calibration_error, log_loss, percent
from featx.heads.catalogue import HEADS
from featx.heads.scorer import softmax
from featx.images.pixels import encode
from featx.models.bundle import read_bundle
from featx.models.calibrate import fit_sharpness, fit_threshold, smallest_error
from featx.models.fit import fit_head, measure, probe_pixels, warnings_of
from featx.models.predictor import open_embedder
from featx.service.evidence import Evidence
from featx.store.reader import read_features

# --- calibration --------------------------------------------------------------------------------------------------


def test_the_sharpness_is_that_of_the_scores_maker() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(20_000, 4)) * 2
    labels = np.array([rng.choice(4, p=p) for p in softmax(truth)])
    for unit in (1e-3, 1.0, 50.0):
        assert fit_sharpness(truth * unit, labels) * unit == pytest.approx(1.0, abs=0.03)


def test_two_classes_agree_with_logistic_regression() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(20_000, 1)) * 3
    labels = (rng.random(20_000) < expit(0.7 * scores[:, 0])).astype(int)
    both = np.hstack([np.zeros_like(scores), scores])
    plain = LogisticRegression(C=np.inf, fit_intercept=False).fit(scores, labels).coef_[0, 0]
    assert fit_sharpness(both, labels) == pytest.approx(plain, rel=2e-3)


def test_scores_that_know_nothing_give_even_probabilities() -> None:
    rng = np.random.default_rng(2)
    scores, labels = rng.normal(size=(2000, 3)), rng.integers(0, 3, 2000)
    assert np.abs(softmax(scores, fit_sharpness(scores, labels)) - 1 / 3).max() < 0.1


def test_always_right_is_not_certainty() -> None:
    labels = np.arange(20) % 2
    scores = np.where(labels[:, None] == np.arange(2), 1.0, -1.0)
    confidence = softmax(scores, fit_sharpness(scores, labels)).max(axis=1)
    assert np.allclose(confidence, 1 - 2 / 24, atol=1e-4)


def test_the_threshold_is_the_lowest_that_holds() -> None:
    rng = np.random.default_rng(3)
    scores = np.round(rng.random(300), 2)
    correct = rng.random(300) < scores
    found = fit_threshold(scores, correct, 0.2)
    assert found is not None

    def bound(threshold: float) -> float:
        answered = scores >= threshold
        return float(((~correct[answered]).sum() + 1) / (answered.sum() + 1))

    assert bound(found) <= 0.2
    assert all(bound(lower) > 0.2 for lower in np.unique(scores[scores < found]))


def test_too_few_images_show_nothing() -> None:
    for n, shown in ((18, False), (19, True)):
        threshold = fit_threshold(np.ones(n), np.ones(n, bool), 0.05)
        assert (threshold is not None) == shown
    assert fit_threshold(np.arange(10.0), np.zeros(10, bool), 0.5) is None


def test_the_smallest_error_is_the_smallest_that_has_a_threshold() -> None:
    rng = np.random.default_rng(6)
    for n in (1, 5, 40, 300):
        scores = np.round(rng.random(n), 1)
        correct = rng.random(n) < scores
        least = smallest_error(scores, correct)
        assert fit_threshold(scores, correct, least) is not None
        assert fit_threshold(scores, correct, least - 1e-9) is None


def test_the_error_rate_holds_on_new_images() -> None:
    rng = np.random.default_rng(4)
    rates = []
    for _ in range(300):
        scores = rng.random(200)
        threshold = fit_threshold(scores, rng.random(200) < 0.5 + scores / 2, 0.1)
        fresh = rng.random(5000)
        if threshold is not None and (fresh >= threshold).any():
            wrong = rng.random(5000) >= 0.5 + fresh / 2
            rates.append(float(wrong[fresh >= threshold].mean()))
    assert len(rates) > 200
    assert np.mean(rates) < 0.1


# --- fitting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_every_head_is_calibrated_on_images_it_has_not_seen(name: str) -> None:
    rows, labels = clusters(3, 60)
    fitted = fit_head(rows, labels, class_names=["a", "b", "c"], heads=[name])
    fresh, truth = clusters(3, 2000)
    fresh, truth = fresh[60 * 3 :], truth[60 * 3 :]  # the same centres, other draws
    assert fitted.sharpness is not None
    scores = fitted.scorer.scores(fresh)
    probabilities = softmax(scores, fitted.sharpness)
    correct = scores.argmax(axis=1) == truth
    assert expected_calibration_error(probabilities.max(axis=1), correct) < 0.08
    told = fitted.metrics["out_of_fold"]
    assert told["accuracy"]["low"] <= correct.mean() <= told["accuracy"]["high"]
    assert abs(told["log_loss"] - log_loss(truth, probabilities)) < 0.15
    assert fitted.threshold is not None
    answered = probabilities.max(axis=1) >= fitted.threshold
    assert (~correct[answered]).mean() < 0.1


def test_random_labels_are_not_answered() -> None:
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(120, 16)).astype(np.float32)
    # Copies of every image: a naive cross-validation would find them again.
    twice, labels = np.vstack([rows, rows]), np.tile(rng.integers(0, 2, 120), 2)
    fitted = fit_head(twice, labels, class_names=["a", "b"], heads=["knn"])
    assert fitted.metrics["duplicates"] == 120
    assert fitted.metrics["out_of_fold"]["accuracy"]["mean"] < 0.65
    assert fitted.metrics["out_of_fold"]["answered"] < 0.2


def test_one_image_a_class_has_margins_and_abstains() -> None:
    rows, labels = clusters(3, 1)
    fitted = fit_head(rows, labels, class_names=["a", "b", "c"])
    assert (fitted.sharpness, fitted.threshold) == (None, None)
    assert "Class 'a' has a single image" in fitted.notes[0]
    assert "say how far a label is ahead of the next" in fitted.notes[0] and "margin" not in fitted.notes[0]


def test_notes_say_what_was_left_out() -> None:
    rows, labels = clusters(2, 10)
    labels = np.where(np.arange(20) == 3, -1, 2 * labels)
    fitted = fit_head(rows, labels, class_names=["a", "none", "b"])
    assert fitted.class_names == ("a", "b")
    assert fitted.notes[:2] == (
        "1 image without a label left out.",
        "Classes without any labelled image were left out: none.",
    )
    few = fit_head(rows[:12:2], np.arange(6) % 2, class_names=["a", "b"])
    (note,) = [note for note in few.notes if "Every answer abstains" in note]
    assert "at most 5 % errors takes at least 19 correct answers without a mistake, which 6 images did not" in note
    assert few.threshold is None
    # What it proposes can be promised, and nothing less can.
    least = few.metrics["smallest_max_error"]
    assert f"--max-error {least:g}, the smallest" in note
    for asked, promised in ((least, True), (least - 0.001, False)):
        again = fit_head(rows[:12:2], np.arange(6) % 2, class_names=["a", "b"], max_error=asked)
        assert (again.threshold is not None) is promised


def test_recall_and_f1_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(8)
    labels, scores = rng.choice([0, 1, 3], 200), rng.normal(size=(200, 5))
    found = measure(labels, scores, softmax(scores), None, ["a", "b", "c", "d", "e"])
    predicted = scores.argmax(axis=1)
    recalls = recall_score(labels, predicted, average=None, labels=[0, 1, 3])
    assert [each["recall"] for each in found["recall_per_class"].values()] == pytest.approx(recalls.tolist())
    assert list(found["recall_per_class"]) == ["a", "b", "d"]
    assert sum(each["images"] for each in found["recall_per_class"].values()) == 200
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))


def test_a_class_that_is_hardly_recognised_is_named() -> None:
    rows, labels = clusters(4, 64)
    rng = np.random.default_rng(0)
    rare = rng.normal(size=(64, rows.shape[1])) * 1.5  # in the middle of all others
    few = np.vstack([rows, rare[:4]]).astype(np.float32)
    names = ["a", "b", "c", "d", "rare"]
    fitted = fit_head(few, np.append(labels, [4] * 4), class_names=names)
    assert (fitted.scorer.scores(rare[4:]).argmax(axis=1) == 4).mean() < 0.2  # indeed
    (note,) = [note for note in fitted.notes if note.startswith("Hardly recognised")]
    told = fitted.metrics["out_of_fold"]["recall_per_class"]["rare"]
    assert f"out of fold: rare ({told['right']} of 4 images). Add images" in note
    balanced = fit_head(*clusters(4, 64), class_names=names[:4])
    assert not any("Hardly" in note for note in balanced.notes)
    assert warnings_of(balanced.metrics, balanced.threshold, 0.05) == []


@pytest.mark.slow
def test_of_several_heads_the_sweeps_winner_is_taken() -> None:
    rows, labels = clusters(3, 30)
    fitted = fit_head(rows, labels, class_names=["a", "b", "c"], heads=["knn", "logreg"], n_jobs=1)
    assert fitted.head in ("knn", "logreg")
    assert fitted.notes[0].startswith(f"{fitted.head} had the highest accuracy of knn, logreg")
    assert "The choice has seen every image" in fitted.notes[0]
    assert fitted.metrics["chosen_among"] == ["knn", "logreg"]
    assert fit_head(rows, labels, class_names=["a", "b", "c"], heads=["knn"]).metrics["chosen_among"] == []


def test_it_repeats_itself() -> None:
    rows, labels = clusters(3, 20)
    one, two = (fit_head(rows, labels, class_names=["a", "b", "c"]) for _ in range(2))
    assert (one.sharpness, one.threshold, one.metrics) == (two.sharpness, two.threshold, two.metrics)


def test_usage_errors() -> None:
    rows, labels = clusters(3, 5)
    for change, message in [
        ({"heads": ["lgoreg"]}, "no such head"),
        ({"max_error": 0.0}, "--max-error is a share"),
    ]:
        with pytest.raises(UsageError, match=message):
            fit_head(rows, labels, class_names=["a", "b", "c"], **change)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least two classes"):
        fit_head(rows, np.zeros(15, int), class_names=["a"])
    rows[2, 3] = np.nan
    with pytest.raises(UsageError, match="must be finite"):
        fit_head(rows, labels, class_names=["a", "b", "c"])


# --- the commands -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, featx: Featx) -> Path:
    """A folder with photos/ of two classes, photos.featx and photos.model."""
    folder = tmp_path_factory.mktemp("kept")
    for split, first in (("train", 0), ("test", 100)):
        class_folders(folder / "photos" / split, each=14, first=first)
    assert featx("extract", "photos", "--out", "photos.featx", cwd=folder).code == 0
    done = featx("fit", "photos.featx", "--out", "photos.model", "--json", cwd=folder)
    assert done.code == 0, done.err
    told = done.json
    assert told["class_names"] == ["ants", "bees"]
    assert told["score_kind"] == "probability"
    assert told["metrics"]["images"] == 28
    assert told["metrics"]["test"]["images"] == 28
    assert "Model: photos.model" in done.err
    return folder


@pytest.mark.slow
def test_predict_files_folders_and_standard_input(kept: Path, featx: Featx, tmp_path: Path) -> None:
    photo = kept / "photos/train/ants/000.png"
    (kept / "bad.jpg").write_text("no picture")
    done = featx("predict", kept / "photos.model", photo, kept / "photos/train/bees", kept / "bad.jpg", "--json")
    assert done.code == 3
    found = done.json["predictions"]
    assert [each["id"] for each in found[:2]] == [str(photo), str(kept / "photos/train/bees/014.png")]
    assert len(found) == 15
    assert done.json["refused"][0]["id"] == str(kept / "bad.jpg")
    assert done.json["refused"][0]["reason"] == "not_an_image"
    for each in found:
        assert set(each) == {"id", "label", "score", "score_kind", "abstain", "reason", "familiarity", "probabilities"}
        assert each["score"] == max(each["probabilities"].values())
        assert sum(each["probabilities"].values()) == pytest.approx(1.0)
    piped = subprocess.run(
        [sys.executable, "-W", "error", "-m", "featx", "predict", kept / "photos.model", "-", "--json"],
        input=photo.read_bytes(), capture_output=True, check=True,
    )  # fmt: skip
    assert f'"score": {found[0]["score"]}' in piped.stdout.decode()
    odd = [tmp_path / name for name in ("link.png", "folder.png", "pipe.png")]
    odd[0].symlink_to(tmp_path / "nowhere")
    odd[1].mkdir()
    os.mkfifo(odd[2])
    mixed = featx("predict", kept / "photos.model", *odd, photo, "--json")
    assert mixed.code == 3
    assert [each["id"] for each in mixed.json["predictions"]] == [str(photo)]
    assert [each["reason"] for each in mixed.json["refused"]] == ["missing", "unreadable", "unreadable"]
    assert mixed.err.splitlines()[-1] == "Error: 3 of 4 images could not be read."
    none = featx("predict", kept / "photos.model", "/dev/zero")
    assert (none.code, none.out) == (3, "")
    assert none.err.splitlines()[-1] == "Error: the image could not be read."
    table = featx("predict", kept / "photos.model", photo)
    assert table.code == 0
    assert found[0]["label"] in table.out


@pytest.mark.slow
def test_serve_says_what_to_open_what_is_served_and_where_the_key_is(kept: Path) -> None:
    bundles, models = {"p": read_bundle(kept / "photos.model")}, {"p": Path("p.model")}
    plain = _serving("http://127.0.0.1:8000", models, bundles, {}, None, key=False, insecure=False)
    assert plain == [
        "Open http://127.0.0.1:8000 in a browser; http://127.0.0.1:8000/docs is for programs.",
        "It serves p.model (2 classes).",
        "Ctrl-C stops it.",
    ]
    for file, words in ((None, "FEATX_API_KEY."), (Path("key.txt"), "key.txt.")):
        keyed = _serving("http://x:1", models, bundles, {"p": Path("p.featx")}, file, key=True, insecure=False)
        assert keyed[1].endswith("and similar images from p.featx.") and keyed[2].endswith(words)
    assert "without a key" in _serving("http://x:1", models, bundles, {}, None, key=False, insecure=True)[2]
    two = {"p": bundles["p"], "q": bundles["p"]}
    several = _serving("http://x:1", {**models, "q": Path("q.model")}, two, {}, None, key=False, insecure=False)
    assert several[1:3] == [
        "It serves p.model (2 classes) at http://x:1/predict?model=p.",
        "It serves q.model (2 classes) at http://x:1/predict?model=q.",
    ]


@pytest.mark.slow
def test_copies_are_told_and_no_note_is_said_twice(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = read_bundle(kept / "photos.model")
    metrics = {**bundle.metrics, "images": 83, "duplicates": 2}
    tell_model(replace(bundle, metrics=metrics, notes=("One.", "One.")), Path("x.model"), err=False)
    printed = capsys.readouterr()
    assert "on 83 images, 2 of them copies, of 2 classes." in printed.out
    tell_model(bundle, Path("x.model"), err=False, how=AUTO)
    assert f"2 classes: {AUTO}." in capsys.readouterr().out
    assert printed.err.count("Note: One.") == 1


@pytest.mark.slow
def test_predict_in_a_pipe_is_one_line_an_image(kept: Path, featx: Featx, tmp_path: Path) -> None:
    image = (kept / "photos/train/ants/000.png").read_bytes()
    folder = tmp_path / ("a long name that a table would fold, " * 4)
    names = [
        "plain.png",
        "tab\there.png",
        "line\nend.png",
        "back\\slash.png",
        "\x1b[31mred.png",
        "b\udcff.png",
        "._x.png",
    ]
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(image)
    done = featx("predict", kept / "photos.model", folder, "--csv", tmp_path / "a.csv", env={"COLUMNS": "40"})
    assert done.code == 0, done.err
    rows = [line.split("\t") for line in done.out.splitlines()]
    assert len(rows) == 6
    assert len({tuple(row[1:]) for row in rows}) == 1
    spelt = {row[0].removeprefix(f"{folder}/").encode().decode("unicode_escape") for row in rows}
    assert spelt == set(names[:-1])
    with (tmp_path / "a.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert {row["id"].removeprefix(f"{folder}/") for row in table} == {*names[:5], "b\\udcff.png"}
    for row, line in zip(table, rows, strict=True):
        assert (row["label"], f"{float(row['score']):.3f}") == (line[1], line[2])
        assert float(row["probability of ants"]) + float(row["probability of bees"]) == pytest.approx(1)
        assert row["abstain"] == ("yes" if line[3] else "no")


@pytest.mark.slow
def test_predict_sorts_photos_and_lists_what_it_refused(kept: Path, featx: Featx, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    given = ("predict", kept / "photos.model", kept / "photos", tmp_path / "bad.png")
    told = ("--json", "--csv", tmp_path / "a.csv", "--sort-into", tmp_path / "out")
    done = featx(*given, *told)
    assert done.code == 3
    answers = {each["id"]: each for each in done.json["predictions"]}
    assert len(answers) == 56
    into = {name: f"_{each['reason']}" if each["abstain"] else each["label"] for name, each in answers.items()}
    copies = {path.relative_to(tmp_path / "out"): path.read_bytes() for path in (tmp_path / "out").rglob("*.png")}
    assert copies == {Path(label) / Path(name).name: Path(name).read_bytes() for name, label in into.items()}
    assert done.json["sorted"]["copied"] == dict(sorted(Counter(into.values()).items()))
    with (tmp_path / "a.csv").open(newline="") as file:
        (refused,) = [row for row in csv.DictReader(file) if row["refused"]]
    assert refused["id"] == str(tmp_path / "bad.png")
    assert refused["refused"].startswith("not_an_image: ")
    again = featx(*given, *told)  # the CSV file is featx's own, and is replaced; copies are not made twice
    assert again.json["sorted"] == {"folder": str(tmp_path / "out"), "copied": {}, "already_there": 56}
    (tmp_path / "letter.csv").write_text("dear,")
    for options, message in [
        (("--csv", tmp_path / "letter.csv"), "featx did not make it"),
        (("--sort-into", tmp_path / "letter.csv"), "a file is in the way"),
    ]:
        refusal = featx(*given, *options)
        assert (refusal.code, message in refusal.err) == (2, True), refusal.err
    assert featx("predict", kept / "photos.model", "-", "--sort-into", tmp_path / "out").code == 2


@pytest.mark.slow
def test_predict_gives_what_the_store_says(kept: Path, featx: Featx) -> None:
    features = read_features(kept / "photos.featx")
    expected = read_bundle(kept / "photos.model").answer(features.embeddings)
    done = featx("predict", kept / "photos.model", kept / "photos", "--json")
    assert [each["id"] for each in done.json["predictions"]] == [str(kept / "photos" / name) for name in features.ids]
    for each, answer in zip(done.json["predictions"], expected, strict=True):
        assert each["label"] == answer.label
        assert each["score"] == pytest.approx(answer.score, abs=1e-6)


@pytest.mark.slow
def test_fit_says_which_classes_are_recognised_and_how_it_chose(kept: Path, featx: Featx, tmp_path: Path) -> None:
    done = featx("fit", kept / "photos.featx", "--out", tmp_path / "all.model", "--head", "knn,ridge")
    assert done.code == 0
    assert "On images that the fit had not seen, but on which the best of 2 heads was chosen: accuracy" in done.out
    accuracy = Interval(**read_bundle(tmp_path / "all.model").metrics["out_of_fold"]["accuracy"])
    assert f"heads was chosen: accuracy {percent(accuracy)}, macro-F1" in done.out
    assert "On the split test: accuracy" in done.out
    assert "On images it had not seen" not in done.out
    recalls = read_bundle(tmp_path / "all.model").metrics["out_of_fold"]["recall_per_class"]
    for name, each in recalls.items():
        assert f"{name} {percent(Interval(each['recall'], each['low'], each['high']))} of 14" in done.out


@pytest.mark.slow
def test_a_model_that_always_abstains_says_so_everywhere(kept: Path, featx: Featx, tmp_path: Path) -> None:
    model, photo = tmp_path / "shy.model", kept / "photos/train/ants/000.png"
    fitted = featx("fit", kept / "photos.featx", "--out", model, "--max-error", "0.001", "--json")
    least = fitted.json["metrics"]["smallest_max_error"]
    assert fitted.code == 0
    assert f"or fit again with --max-error {least:g}, the smallest that they can promise" in fitted.err
    for arguments in ((), ("--json",)):
        done = featx("predict", model, photo, *arguments)
        assert done.code == 0
        assert "Every answer of this model abstains: its images could not promise" in done.err
        assert f"(--max-error {least:g} is the smallest that they can promise)" in done.err
    assert featx("fit", kept / "photos.featx", "--out", model, "--max-error", f"{least:g}").code == 0
    assert not any("Every answer" in each for each in read_bundle(model).cautions)


@pytest.mark.slow
def test_a_store_of_other_classes_is_not_served_in_silence(kept: Path, featx: Featx, tmp_path: Path) -> None:
    class_folders(tmp_path / "photos", ("cats", "dogs"))
    assert featx("extract", tmp_path / "photos", "--out", tmp_path / "other.featx").code == 0
    done = featx("serve", kept / "photos.model", "--store", tmp_path / "other.featx", "--port", "0")
    assert done.code == 2
    assert "no class in common: expected ants, bees, found cats, dogs" in done.err
    class_folders(tmp_path / "photos", ("ants",), first=50)
    assert featx("extract", tmp_path / "photos", "--out", tmp_path / "other.featx").code == 0
    notes = Evidence(tmp_path / "other.featx", read_bundle(kept / "photos.model")).notes
    assert [note.removeprefix(f"{tmp_path / 'other.featx'} ") for note in notes] == [
        "has classes that the model can never answer: cats, dogs. Fit it again.",
        "has no images of classes that the model can answer: bees.",
    ]
    assert Evidence(kept / "photos.featx", read_bundle(kept / "photos.model")).notes == []


def test_a_tampered_model_and_wrong_uses_exit_with_2(kept: Path, featx: Featx, tmp_path: Path) -> None:
    raw = bytearray((kept / "photos.model").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "bad.model").write_bytes(raw)
    photo = kept / "photos/train/ants/000.png"
    for arguments, message in [
        (("predict", tmp_path / "bad.model", photo), "its sha256 does not match"),
        (("predict", kept / "photos.featx", photo), "featx fit STORE"),
        (("predict", kept / "photos.model", kept / "photos.featx"), "no images in this folder"),
        (("fit", kept / "photos.featx", "--out", tmp_path / "no/where.model"), "no such folder"),
        (("fit", kept / "photos.featx", "--out", tmp_path / "m", "--head", "lgr"), "no such head"),
    ]:
        done = featx(*arguments)
        assert done.code == 2, done.err
        assert message in done.err


@pytest.mark.slow
def test_a_network_that_sees_the_probe_differently_is_refused(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = read_bundle(kept / "photos.model")
    made: list[Engine] = []

    def counted(*arguments: Any, **options: Any) -> Engine:
        made.append(make_engine(*arguments, **options))
        return made[-1]

    monkeypatch.setattr("featx.extraction.embedder.make_engine", counted)
    embedder = open_embedder(bundle, kept / "photos.model", batch_sizes={"cpu": 3, "cuda": 3})
    assert made == [embedder.engine] and embedder.engine.batch_size == 3  # built once, and as it was wanted
    turned = np.roll(bundle.probe_embedding, 1)
    with pytest.raises(MismatchError, match=r"does not see the model's probe image.*expected a cosine of at least"):
        open_embedder(replace(bundle, probe_embedding=turned), kept / "photos.model")
    other = {**bundle.provenance, "weights_sha256": "0" * 64}
    with pytest.raises(MismatchError, match="another weights_sha256"):
        open_embedder(replace(bundle, provenance=other), kept / "photos.model")


def test_the_probe_is_a_picture_of_nobody() -> None:
    assert probe_pixels().shape == (240, 320, 3)
    assert np.array_equal(probe_pixels(), probe_pixels())
    assert probe_pixels().std() > 30
    assert encode(probe_pixels()).startswith(b"\x89PNG")
    assert encode(np.asarray(picture(1)), form="JPEG").startswith(b"\xff\xd8")
