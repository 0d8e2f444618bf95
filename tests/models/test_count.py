"""How many photos of each class a pile has: with a checked random part, and by a model's errors alone."""

from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Featx, class_folders
from modelkit import clusters, make_bundle

from featx.errors import UsageError
from featx.heads.catalogue import make_head
from featx.models.bundle import Answer, Bundle, read_bundle, write_bundle
from featx.models.count import Pile, check_rows, count_adjusted, count_checked, draw_to_check
from featx.models.fit import fit_head

NAMES = ("a", "b", "c")


def model() -> Bundle:
    rows, labels = clusters(3, 60, dims=6, seed=2)
    fitted = fit_head(rows, labels, class_names=NAMES, near_duplicates=None)
    return make_bundle(
        make_head("logreg").fit(rows, labels), rows, class_names=NAMES, scorer=fitted.scorer,
        sharpness=fitted.sharpness, threshold=fitted.threshold, metrics=fitted.metrics, max_unknown=0.05,
        familiarity=fitted.familiarity,
    )  # fmt: skip


def pile_of(bundle: Bundle, counts: list[int], seed: int, strange: int = 0) -> tuple[Pile, list[str]]:
    """Photos of these numbers of each class in a random order, some of them unlike all, and what they are."""
    rows, labels = clusters(3, 1500, dims=6, seed=2)
    rng = np.random.default_rng(seed)
    own = np.concatenate([rng.choice(np.flatnonzero(labels == c), n, replace=False) for c, n in enumerate(counts)])
    every = np.vstack([rows[own], -8.0 * np.abs(rng.normal(size=(strange, 6)))]).astype(np.float32)
    truth = [*(NAMES[c] for c in labels[own]), *["other"] * strange]
    order = rng.permutation(len(every))
    ids = [f"{i:05}.jpg" for i in range(len(every))]
    return Pile(ids, bundle.answer(every[order])), [truth[i] for i in order]


def test_a_checked_part_puts_a_pile_right() -> None:
    bundle, held = model(), dict.fromkeys((*NAMES, "other"), 0)
    for seed in range(40):
        pile, truth = pile_of(bundle, [700, 12, 250], seed, strange=40)
        rows = np.random.default_rng(seed).permutation(len(truth))[:150]
        found = count_checked(pile, bundle, rows, [truth[i] for i in rows])
        for name in held:
            share = truth.count(name) / len(truth)
            # A label that no checked photo has is none that could be counted; it then has too few to be seen.
            held[name] += name not in found or found[name].share.low <= share <= found[name].share.high
        assert found["a"].checked == sum(truth[i] == "a" for i in rows)
        assert found["a"].named == sum(each.label == "a" and each.reason != "unknown" for each in pile.answers)
        assert found["a"].to_json(len(truth))["photos"]["mean"] == pytest.approx(found["a"].share.mean * len(truth))
    assert min(held.values()) >= 40 * (0.95 - 3 * math.sqrt(0.95 * 0.05 / 40))


@pytest.mark.slow
def test_the_models_own_count_is_wrong_and_the_adjusted_one_is_not() -> None:
    bundle = model()
    named, adjusted, held = [], [], 0
    for seed in range(20):
        pile, truth = pile_of(bundle, [900, 20, 80], seed)
        found = count_adjusted(pile, bundle, random_state=seed)
        share = truth.count("b") / len(truth)
        known = [each.label for each in pile.answers if each.reason != "unknown"]
        assert found["b"].named == known.count("b")
        named.append(found["b"].named / len(known) - share)
        adjusted.append(found["b"].share.mean - share)
        held += found["b"].share.low <= share <= found["b"].share.high
        assert sum(each.share.mean for each in found.values()) == pytest.approx(1.0)
    assert abs(np.mean(adjusted)) < abs(np.mean(named)) / 2
    assert held >= 16


def test_of_a_class_that_is_hardly_recognised_the_checked_photos_alone_are_asked() -> None:
    bundle = model()
    pile, truth = pile_of(bundle, [500, 300, 200], 0)
    rows = np.arange(150)
    labels = [truth[i] for i in rows]
    blind: dict[str, Any] = {"out_of_fold": {"confusion": {name: {"a": 20, "b": 20, "c": 20} for name in NAMES}}}
    found = count_checked(pile, replace(bundle, metrics=blind), rows, labels)
    assert all(each.share.mean == labels.count(name) / 150 for name, each in found.items())
    helped = count_checked(pile, bundle, rows, labels)
    assert helped["a"].share.high - helped["a"].share.low < found["a"].share.high - found["a"].share.low


def test_what_is_drawn_is_random_repeatable_and_begins_the_same() -> None:
    ids = [f"{i}.jpg" for i in range(400)]
    drawn = draw_to_check(ids, 100, 0)
    assert len(set(drawn)) == 100 and drawn != sorted(drawn)
    assert draw_to_check(ids[::-1], 30, 0) == drawn[:30]
    assert draw_to_check(ids, 100, 1) != drawn
    counts = np.zeros(400)
    for seed in range(400):
        for name in draw_to_check(ids, 40, seed):
            counts[int(name[:-4])] += 1
    assert abs(counts.mean() - 40) < 1e-9 and counts.min() > 20 and counts.max() < 62
    with pytest.raises(UsageError, match="there are not so many photos: expected up to 400, found 401"):
        draw_to_check(ids, 401, 0)


def test_lists_that_will_not_do() -> None:
    answers = [Answer("a", 0.9, "probability", {"a": 0.9, "b": 0.1}, None)] * 20
    pile = Pile([f"{i}.jpg" for i in range(20)], answers, ["bad.jpg"])
    full: Mapping[str, str | None] = {f"{i}.jpg": "a" for i in range(12)}
    rows, labels = check_rows(pile, {**full, "bad.jpg": "b"}, "list.csv")
    assert rows.tolist() == list(range(12)) and labels == ["a"] * 12
    for changed, message in (
        ({**full, "3.jpg": None}, "list.csv: 1 photo of 12 without a label: found 3.jpg. Label all of them"),
        ({**full, "far.jpg": "a"}, "list.csv: 1 checked photo not in the pile: found far.jpg"),
        (dict(list(full.items())[:9]), "too few checked photos: expected at least 10, found 9"),
    ):
        with pytest.raises(UsageError, match=message):
            check_rows(pile, changed, "list.csv")


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, featx: Featx) -> Path:
    """A folder with photos.model of two classes, and a pile of 40 photos without labels, one of which is no image."""
    folder = tmp_path_factory.mktemp("made")
    class_folders(folder / "photos", each=20)
    class_folders(folder / "more", each=40, first=100)
    (folder / "pile").mkdir()
    for i, path in enumerate(
        sorted((folder / "more/ants").iterdir())[:30] + sorted((folder / "more/bees").iterdir())[:9]
    ):
        shutil.copy(path, folder / "pile" / f"{(7 * i) % 39:02}-{path.parent.name}.png")
    (folder / "pile/40-ants.png").write_text("no image")
    assert featx("extract", "photos", "--out", "photos.featx", cwd=folder).code == 0
    assert featx("fit", "photos.featx", "--out", "photos.model", cwd=folder).code == 0
    return folder


def fill(path: Path, out: Path, label: Any = None) -> None:
    """Write true labels, which the names end in, beside the photos of a list."""
    with path.open() as file:
        names = [row["path"] for row in csv.DictReader(file)]
    true = label or (lambda name: name.split("-")[1].removesuffix(".png"))
    out.write_text("path,label\n" + "".join(f"{name},{true(name)}\n" for name in names))


@pytest.mark.slow
def test_from_drawing_to_counting(made: Path, featx: Featx) -> None:
    drawn = featx("count", "photos.model", "pile", "--draw", "25", "--out", "to-check.csv", "--json", cwd=made)
    assert drawn.code == 0
    assert drawn.json == {"list": "to-check.csv", "drawn": 25, "photos": 40, "random_state": 0}
    assert (made / "to-check.csv").read_text().startswith("path,label\n")
    half = featx("count", "photos.model", "pile", "--checked", "to-check.csv", cwd=made)
    assert half.code == 2 and "25 photos of 25 without a label" in half.err
    fill(made / "to-check.csv", made / "checked.csv")
    done = featx("count", "photos.model", "pile", "--checked", "checked.csv", "--json", cwd=made)
    assert done.code == 3
    assert done.json["refused"][0]["id"] == "40-ants.png"
    assert (done.json["photos"], done.json["method"]) == (39, "prediction-powered inference")
    for name, count in (("ants", 30), ("bees", 9)):
        photos = done.json["classes"][name]["photos"]
        assert photos["low"] - 1e-9 <= count <= photos["high"] + 1e-9
        assert photos["high"] - photos["low"] < 39 / 2
    assert "not the photos that --draw draws" not in done.err
    table = featx("count", "photos.model", "pile", "--checked", "checked.csv", cwd=made)
    assert "ants" in table.out and "Estimated by prediction-powered inference; shares are of all of them." in table.out
    # What was filled in is not lost.
    again = featx("count", "photos.model", "pile", "--draw", "25", "--out", "checked.csv", cwd=made)
    assert again.code == 2 and "this list has labels, and would be replaced" in again.err
    assert featx("count", "photos.model", "pile", "--draw", "25", "--out", "to-check.csv", cwd=made).code == 0


@pytest.mark.slow
def test_without_checking_it_says_what_that_is_worth(made: Path, featx: Featx) -> None:
    done = featx("count", "photos.model", "pile", cwd=made)
    assert done.code == 3
    assert "Estimated by adjusted counts; shares are of the " in done.out
    assert "Note: Nothing was checked: this holds only if photos of each class are recognised as those" in done.err
    old = replace(read_bundle(made / "photos.model"), metrics={})
    write_bundle(old, made / "old.model")
    refused = featx("count", "old.model", "pile", cwd=made)
    assert refused.code == 2 and "this model does not say how it errs. Check some photos" in refused.err


@pytest.mark.slow
def test_a_store_is_counted_as_its_photos_are(made: Path, featx: Featx) -> None:
    assert featx("extract", "pile", "--out", "pile.featx", cwd=made).code == 3
    featx("count", "photos.model", "pile", "--draw", "25", "--out", "one.csv", cwd=made)
    fill(made / "one.csv", made / "one-checked.csv")
    asked = ("--checked", "one-checked.csv", "--json")
    files = featx("count", "photos.model", "pile", *asked, cwd=made).json
    store = featx("count", "photos.model", "pile.featx", *asked, cwd=made).json
    assert store["classes"] == files["classes"]
    assert [each["id"] for each in store["refused"]] == ["40-ants.png"]
    other = ("extract", "pile", "--out", "other.featx", "--backbone", "mobilenet_v2", "--weights", "none")
    featx(*other, cwd=made)
    wrong = featx("count", "photos.model", "other.featx", *asked, cwd=made)
    assert wrong.code == 2 and "not those that the model was fitted on" in wrong.err


@pytest.mark.slow
def test_what_is_odd_is_said(made: Path, featx: Featx) -> None:
    featx("count", "photos.model", "pile", "--draw", "25", "--out", "two.csv", cwd=made)
    fill(made / "two.csv", made / "odd.csv", lambda name: "bee" if "bees" in name else "ants")
    done = featx("count", "photos.model", "pile", "--checked", "odd.csv", "--seed", "1", cwd=made)
    assert (
        "'bee' is not a class of the model; it is estimated from the photos that are unknown. Did you mean bees?"
        in done.err
    )
    assert "These are not the photos that --draw draws. The intervals hold if they were drawn at random." in done.err
    (made / "twice.csv").write_text(
        (made / "odd.csv").read_text() + (made / "odd.csv").read_text().splitlines()[1] + "\n"
    )
    for arguments, message in (
        (("--checked", "twice.csv"), "the path is listed twice"),
        (("--checked", "none.csv"), "no such list"),
        (("--draw", "20"), "--draw and --out go together"),
        (("--draw", "5", "--out", "x.csv"), "too few to count with: expected at least 10, found 5"),
        (("--draw", "500", "--out", "x.csv"), "there are not so many photos"),
        (("--draw", "20", "--out", "x.csv", "--checked", "odd.csv"), "--draw and --checked do not go together"),
        (("--confidence", "95"), "--confidence: not a share"),
    ):
        refused = featx("count", "photos.model", "pile", *arguments, cwd=made)
        assert refused.code == 2 and message in refused.err, refused.err
