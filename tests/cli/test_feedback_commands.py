"""feedback, refit and models, by the real commands, on photos whose colours are their classes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from conftest import Featx
from servicekit import start

from featx.images.pixels import encode
from featx.models.corrections import Corrections
from featx.models.versions import Versions

pytestmark = pytest.mark.slow

COLOURS = {"red": (190, 70, 70), "blue": (70, 70, 190), "green": (70, 190, 70)}


def photo(name: str, seed: int) -> bytes:
    """Noise around a colour, so far that some are mistaken."""
    rng = np.random.default_rng(seed)
    colour = np.array(COLOURS[name]) + rng.normal(0, 45, 3)
    noise = rng.normal(0, 20, (32, 32, 3))
    return encode(np.clip(colour + noise, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, featx: Featx) -> Path:
    folder = tmp_path_factory.mktemp("refit")
    for place, name in enumerate(("red", "blue")):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(8):
            (folder / "photos" / name / f"{number}.png").write_bytes(photo(name, 100 * place + number))
    ran = featx("extract", "photos", "--out", "s.featx", "--weights", "none", cwd=folder)
    assert ran.code == 0, ran.err
    assert featx("fit", "s.featx", "--out", "m.model", cwd=folder).code == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    for name in ("s.featx", "m.model"):
        (shutil.copytree if (made / name).is_dir() else shutil.copy)(made / name, tmp_path / name)
    return tmp_path


def correct(folder: Path, label: Callable[[str, int], str], number: int = 15, by: str = "mia") -> None:
    corrections = Corrections(folder / "kept")
    corrections.open()
    for place, name in enumerate(("red", "blue")):
        for seed in range(1000, 1000 + number):
            corrections.add(photo(name, seed + 500 * place), label(name, seed), by)
    corrections.close()


REFIT = ("refit", "m.model", "--feedback", "kept", "--store", "s.featx")


def test_right_corrections_are_promoted_and_gone_back_from(featx: Featx, made: Path, folder: Path) -> None:
    correct(folder, lambda name, seed: name)
    ran = featx(*REFIT, "--json", "--who", "mia", cwd=folder)
    assert ran.code == 0, ran.err
    assert (ran.json["outcome"], ran.json["new_photos"], ran.json["embedded"]) == ("promoted", 30, 30)
    version = ran.json["version"]
    assert (folder / "kept/current").read_text().strip() == version
    bundle = Versions(folder / "kept").read(version)
    assert bundle.metrics["images"] == 46
    assert bundle.metrics["refit"]["corrections"] == 30

    # The same recipe on the same photos, fitted at once, answers alike.
    shutil.copytree(made / "photos", folder / "all")
    for each in Corrections(folder / "kept").all:
        shutil.copy(folder / "kept/images" / each.file, folder / "all" / each.label)
    assert featx("extract", "all", "--out", "all.featx", "--weights", "none", cwd=folder).code == 0
    assert featx("fit", "all.featx", "--out", "all.model", cwd=folder).code == 0
    (folder / "new").mkdir()
    for seed in range(60):
        (folder / "new" / f"{seed}.png").write_bytes(photo(("red", "blue")[seed % 2], 5000 + seed))
    told = [
        [each["label"] for each in featx("predict", model, "new", "--json", cwd=folder).json["predictions"]]
        for model in (f"kept/models/{version}.model", "all.model")
    ]
    assert np.mean([one == other for one, other in zip(*told, strict=True)]) >= 0.95

    again = featx(*REFIT, "--json", cwd=folder)
    assert (again.json["outcome"], again.json["embedded"]) == ("nothing", 0)
    listed = featx("models", "kept", "--json", cwd=folder).json
    assert [each["what"] for each in listed["versions"]] == ["began", "promoted"]
    assert listed["versions"][1]["evidence"]["verdict"] in ("better", "cannot tell")
    back = featx("models", "kept", "--rollback", "--who", "leo", cwd=folder)
    assert back.code == 0
    assert "What only the other version had learnt is held: 30 corrections (batch-3)" in back.out
    held = featx(*REFIT, cwd=folder)
    assert "Nothing new to learn" in held.out
    assert "batch-3" in held.err
    released = featx(*REFIT, "--release", "batch-3", "--json", cwd=folder)
    assert (released.json["outcome"], released.json["version"]) == ("promoted", version)
    assert "leo: rolled back" in featx("models", "kept", "--log", cwd=folder).out


def test_wrong_corrections_are_held_with_their_photos(featx: Featx, folder: Path) -> None:
    rng = np.random.default_rng(3)
    correct(folder, lambda name, seed: str(rng.choice(["red", "blue"])))
    ran = featx(*REFIT, "--json", cwd=folder)
    assert ran.json["outcome"] in ("held", "waits", "refused"), ran.json
    before = ran.json["version"]
    if ran.json["outcome"] == "held":
        page = Path(folder / ran.json["sheet"]).read_text()
        assert page.count("<figure") == 30
        assert page.count("data:image/jpeg") == 30
        assert "mia: " in page
        done = featx(*REFIT, "--discard", ran.json["batch"], cwd=folder)
        assert "Nothing new to learn" in done.out
    forced = featx(*REFIT, "--force", "--json", cwd=folder).json
    if ran.json["outcome"] != "held":
        assert forced["forced"]
        assert forced["version"] != before


def test_swapped_labels_make_the_old_photos_worse(featx: Featx, folder: Path) -> None:
    correct(folder, lambda name, seed: "blue" if name == "red" else "red")
    ran = featx(*REFIT, cwd=folder)
    assert "Promoted" not in ran.out


def test_people_who_disagree_are_listed(featx: Featx, folder: Path) -> None:
    correct(folder, lambda name, seed: name, number=4)
    correct(folder, lambda name, seed: "red" if seed == 1001 else name, number=4, by="leo")
    found = featx("feedback", "kept", "--json", "--csv", "list.csv", cwd=folder).json
    assert found["people"] == {"mia": 8, "leo": 8}
    (pair,) = found["agreement"]
    assert (pair["images"], pair["agreed"]) == (8, 7)
    assert pair["kappa"]["mean"] == pytest.approx(0.75)
    (disputed,) = found["disagreements"]
    assert disputed["label"] is None
    text = featx("feedback", "kept", cwd=folder).out
    assert "leo and mia agree on 7 of 8 photos: Cohen's kappa 0.75" in text
    assert "leo: red" in text
    assert len((folder / "list.csv").read_text().splitlines()) == 9
    ran = featx(*REFIT, "--json", "--disagreements", "unanimous", cwd=folder)
    assert ran.json["new_photos"] == 7
    assert "people disagree: 1 photo" in ran.err


def test_what_cannot_be_done_is_said(featx: Featx, made: Path, folder: Path) -> None:
    cases = [
        (("feedback", "nowhere"), "no feedback folder"),
        (("models", "nowhere"), "no feedback folder"),
        ((*REFIT[:4],), "no feedback folder"),
    ]
    for arguments, message in cases:
        ran = featx(*arguments, cwd=folder)
        assert ran.code == 2
        assert message in " ".join(ran.err.split())
    correct(folder, lambda name, seed: name, number=2)
    cases = [
        (REFIT[:4], "the store that it was fitted on is needed"),
        ((*REFIT, "--release", "batch-7"), "no such batch is held"),
        ((*REFIT, "--release", "a", "--discard", "b"), "do not go together"),
        (("refit", "s.featx", *REFIT[2:]), "this is a store, not a model"),
        (("models", "kept", "--rollback"), "no version before"),
        (("models", "kept", "--to", "x"), "Add --rollback"),
        (("serve", "m.model", "--new-classes"), "corrections are not kept"),
        (("serve", "m.model", "--feedback", "kept", "--every", "5"), "a refit needs the store"),
    ]
    for arguments, message in cases:
        ran = featx(*arguments, cwd=folder)
        assert ran.code == 2, ran.out
        assert message in " ".join(ran.err.split()), ran.err


def test_a_server_learns_by_itself_after_so_many_corrections(folder: Path) -> None:
    command = ("-m", "featx", "serve", folder / "m.model", "--store", folder / "s.featx", "--feedback", folder / "kept")
    with start(folder, *command, "--every", 30, "--port", 0) as server:
        first = server.get("/info").json["version"]
        for place, name in enumerate(("red", "blue")):
            for seed in range(15):
                image = photo(name, 1000 + seed + 500 * place)
                assert server.send(f"/feedback?label={quote(name)}&by=mia", image).status == 200
        until = time.monotonic() + 120
        while server.get("/info").json["version"] == first:
            assert time.monotonic() < until, server.said()
            time.sleep(0.2)
        answer = server.send("/predict", photo("red", 7777)).json
        assert answer["version"] == Versions(folder / "kept").current != first
        assert server.end() == 0
