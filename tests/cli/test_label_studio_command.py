"""featx label-studio by the real command: with a store and no model, and what it refuses before it begins."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from conftest import Featx

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from labelkit import TOKEN, annotation, hook, post, predict, setup, studio
from servicekit import Running, start

from featx.cli.label_studio import of_model, of_store
from featx.images.pixels import encode
from featx.models.agreement import vote
from featx.models.corrections import Corrections
from featx.models.instant import InstantModels
from featx.models.versions import Versions, version_of

NAMES = ("ants", "bees")
COLOURS = {"ants": (190, 70, 70), "bees": (70, 70, 190)}


def photo(name: str, seed: int) -> bytes:
    """Noise around a colour."""
    rng = np.random.default_rng(seed)
    return encode(np.clip(np.array(COLOURS[name]) + rng.normal(0, 40, (32, 32, 3)), 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, featx: Featx) -> Path:
    made = tmp_path_factory.mktemp("label-studio")
    for name in NAMES:
        (made / "photos" / name).mkdir(parents=True)
    for number in range(6):
        (made / "photos" / NAMES[number % 2] / f"{number}.png").write_bytes(photo(NAMES[number % 2], number))
    ran = featx("extract", "photos", "--out", "s.featx", cwd=made)
    assert ran.code == 0, ran.err
    return made


def labels_in(server: Running, *tasks: dict[str, object]) -> list[str | None]:
    """What is suggested for each task."""
    results = predict(server, *tasks).json["results"]
    return [each["result"][0]["value"]["choices"][0] if each else None for each in results]


@pytest.mark.slow
def test_with_a_store_suggestions_follow_the_labels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATX_LABEL_STUDIO_TOKEN", TOKEN)
    with studio() as labels:
        tasks = [labels.put(number, photo(NAMES[number % 2], number)) for number in range(10)]
        command = (
            "-m",
            "featx",
            "label-studio",
            folder / "s.featx",
            "--url",
            labels.url,
            "--port",
            "0",
            "--every",
            "2",
        )
        with start(folder, *command) as server:
            first = setup(server).json["model_version"]
            assert labels_in(server, *tasks) == [None] * 10

            def give(number: int) -> str:
                mark = annotation(number, number, NAMES[number % 2])
                labels.export.append({**tasks[number], "annotations": [mark]})
                answer = post(server, "/webhook", hook("ANNOTATION_CREATED", annotation=mark, task=tasks[number]))
                assert answer.json["kept"] == 1
                return str(answer.json["model_version"])

            assert give(0) == first
            assert labels_in(server, *tasks) == [None] * 10
            second = give(1)  # of the second class, so at once
            assert second != first
            assert labels_in(server, *tasks) == ["ants", "bees"] * 5
            assert give(8) == second  # not in the store, and the first of two
            third = give(9)
            assert third not in (first, second)
            assert predict(server, tasks[5]).json["model_version"] == third
            labels.export = [each for each in labels.export if each["id"] not in (1, 9)]
            gone = hook("ANNOTATIONS_DELETED", annotations=[{"id": 1}, {"id": 9}])
            assert post(server, "/webhook", gone).json["kept"] == 2
            assert labels_in(server, tasks[5]) == [None]
            give(9)
            assert give(1) != third  # one label more, of two
            assert post(server, "/webhook", hook("START_TRAINING")).json["model_version"] == third
            assert server.end() == 0
    # Started again it answers by the same labels, so with the same version.
    kept = Corrections(folder / "s.labels")
    model, _ = of_store(
        folder / "s.featx", kept, {"backbone": None, "weights": None, "engine": "auto", "device": "auto"}
    )  # fmt: skip
    kept.close()
    assert f"featx-{version_of(model.bundle)}" == third


@pytest.mark.slow
def test_a_model_answers_as_its_current_version_and_is_fitted_again(folder: Path, featx: Featx, tmp_path: Path) -> None:
    store, path = folder / "s.featx", tmp_path / "m.model"
    assert featx("fit", "s.featx", "--out", path, cwd=folder).code == 0
    kept = Corrections(tmp_path / "kept")
    options = {"backbone": None, "weights": None, "engine": "auto", "device": "auto"}
    model = of_model(path, kept, store, 7, options)
    assert Versions(kept.folder).current == version_of(model.bundle)
    assert model.feedback is not None
    assert model.feedback.new_classes
    assert model.feedback.refitter is not None
    assert model.feedback.refitter.every == 7
    assert "featx label-studio --every" in model.feedback.refitter.command
    kept.close()


@pytest.mark.slow
def test_the_labels_are_a_list_for_featx_extract(folder: Path, featx: Featx, tmp_path: Path) -> None:
    kept = Corrections(tmp_path / "kept")
    kept.open()
    for number in range(4):
        kept.add(photo(NAMES[number % 2], number), NAMES[number % 2], "user 1", source=f"1.1/{number}")
    kept.withdraw("1.1/3")
    kept.close()
    ran = featx("feedback", "kept", "--csv", "kept/labels.csv", cwd=tmp_path)
    assert ran.code == 0, ran.err
    with (tmp_path / "kept" / "labels.csv").open() as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["ants", "bees", "ants"]
    instant = InstantModels(folder / "s.featx")
    bundle = instant.model(vote(kept.latest))
    assert bundle.class_names == ("ants", "bees")
    features = instant._features
    assert [each.label for each in bundle.answer(features.embeddings)] == ["ants"] * 3 + ["bees"] * 3


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("s.featx", "--url", "127.0.0.1:8080"), "not the address of Label Studio"),
        (("s.featx", "--url", "http://user@127.0.0.1"), "not the address of Label Studio"),
        (("s.featx", "--store", "s.featx"), "--store goes with a model"),
        (("m.model", "--every", "3"), "a refit needs the store"),
        (("m.model",), "no such model"),
        (("s.featx", "--host", "0.0.0.0"), "others could reach the service"),
        (("s.featx", "--token-file", "none.txt"), "the token of Label Studio cannot be read"),
    ],
)
def test_what_cannot_work_is_refused_before_it_begins(
    folder: Path, featx: Featx, options: tuple[str, ...], why: str
) -> None:
    before = sorted(folder.iterdir())
    ran = featx("label-studio", *options, cwd=folder)
    assert ran.code == 2
    assert why in ran.err
    assert sorted(folder.iterdir()) == before
