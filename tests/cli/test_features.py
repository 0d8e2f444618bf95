"""Several backbones, stores and recipes, with the real commands: embedded, compared, joined, kept and served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Featx, class_folders

from featx.backbones.recipes import RECIPES
from featx.extraction.embedder import Embedder
from featx.heads.layers import Blocks, read_layers
from featx.models.bundle import read_bundle
from featx.models.predictor import layer_number, open_embedder, predict_files
from featx.service.evidence import Evidence
from featx.store.reader import FeatureReader, read_features

BOTH = ("efficientnet_lite0", "efficientnet_lite1")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("features") / "photos", each=8)


@pytest.fixture(scope="module")
def store(source: Path, featx: Featx) -> Path:
    out = source.parent / "both.featx"
    ran = featx("extract", source, "--out", out, "--backbone", BOTH[0], "--backbone", BOTH[1], "--json")
    assert ran.code == 0, ran.err
    assert ran.json["backbones"] == [*BOTH, "pixels"] and ran.json["embedded"] == 16
    return out


@pytest.mark.slow
def test_a_store_of_two_networks_is_swept_joined_kept_and_served(store: Path, featx: Featx, tmp_path: Path) -> None:
    info = featx("info", store, "--json").json
    assert info["layers"] == dict.fromkeys(BOTH, 1280) and list(info["backbones"]) == [*BOTH, "pixels"]
    ran = featx(
        "sweep", store, "--shots", "1,5", "--episodes", 3, "--heads", "ridge,knn", "--out", tmp_path / "r", "--json"
    )
    assert ran.code == 0, ran.err
    found = ran.json
    assert {each["features"] for each in found["results"]} == {*BOTH, "joined"}
    assert {each["n_shots"] for each in found["pixels_baseline"]} == {1, 5}
    assert {(each["a"], each["b"]) for each in found["comparisons"]} >= {("ridge@joined", f"ridge@{BOTH[0]}")}
    assert "raw pixels, no network" in ran.err and "Best features: " in ran.err
    page = (tmp_path / "r" / "report.html").read_text()
    assert "<h2>Features</h2>" in page and "raw pixels, no network" in page

    model = tmp_path / "both.model"
    assert featx("fit", store, "--out", model).code == 0
    bundle = read_bundle(model)
    assert bundle.layer == "joined" and len(bundle.provenance["backbones"]) == 2
    features, _ = read_layers(store)
    embedder = open_embedder(bundle, model)
    paths = [store.parent / "photos" / name for name in features.ids]
    found_rows = [np.concatenate(rows) for _, rows in embedder.embed_files(paths)]  # type: ignore[arg-type]
    np.testing.assert_allclose(np.stack(found_rows), features.embeddings, rtol=1e-3, atol=1e-3)
    answers = [answer for _, answer in predict_files(bundle, embedder, layer_number(bundle), paths)]
    named = featx("predict", model, *paths, "--json").json["predictions"]
    assert [each["label"] for each in named] == [answer.label for answer in answers]  # type: ignore[union-attr]
    assert Evidence(store, bundle).layer == 0
    one = tmp_path / "one.model"
    assert featx("fit", store, "--layer", BOTH[1], "--out", one).code == 0
    assert read_bundle(one).provenance["backbone"] == BOTH[1]
    assert featx("predict", one, paths[0]).code == 0


@pytest.mark.slow
def test_two_stores_are_compared_on_the_images_that_both_have(store: Path, source: Path, featx: Featx) -> None:
    fewer = source.parent / "fewer"
    shutil.copytree(source, fewer)
    left = sorted((fewer / "ants").iterdir())[0]
    left.unlink()
    (fewer / "bees" / "new name.png").write_bytes(sorted((fewer / "bees").iterdir())[0].read_bytes())
    other = source.parent / "other.featx"
    assert featx("extract", fewer, "--out", other, "--backbone", "efficientnet_lite2").code == 0
    features, layers = read_layers([store, other])
    assert layers.names == (*(f"both/{name}" for name in BOTH), "other") and len(features) == 15
    by_content = {row.tobytes(): i for i, row in enumerate(read_features(other).digests)}
    rows = [by_content[row.tobytes()] for row in features.digests]
    np.testing.assert_array_equal(features.embeddings[:, 2560:], read_features(other).embeddings[rows])
    ran = featx(
        "sweep", store, other, "--shots", "5", "--episodes", 2, "--heads", "ridge", "--out", source.parent / "r"
    )
    assert ran.code == 0, ran.err
    assert f"{other} lacks 1 image of {store} (ants/{left.name})" in ran.err
    again = featx("sweep", store, store, "--shots", "5")
    assert again.code == 2 and "two stores of one name" in again.err
    nothing = class_folders(source.parent / "nothing", each=2, first=90)
    none = source.parent / "none.featx"
    assert featx("extract", nothing, "--out", none, "--backbone", "pixels").code == 0
    apart = featx("sweep", store, none)
    assert apart.code == 2 and "no image in common" in apart.err


@pytest.mark.slow
def test_a_recipe_is_its_networks_layers_and_views(source: Path, featx: Featx, tmp_path: Path) -> None:
    out = tmp_path / "best.featx"
    assert featx("extract", source, "--out", out, "--recipe", "best").code == 0
    reader = FeatureReader(out)
    for name, layers in RECIPES["best"].backbones.items():
        assert tuple(reader.backbones[name]["layers"]) == layers
        assert reader.backbones[name]["views"] == ",".join(RECIPES["best"].views)
        assert reader.backbones[name]["recipe"] == "best"
    assert reader.backbones["pixels"]["views"] == "center" and "recipe" not in reader.backbones["pixels"]
    assert len(Blocks([out]).networks) == 9
    wrong = featx("extract", source, "--out", out, "--recipe", "fast", "--backbone", "resnet18")
    assert wrong.code == 2 and "--recipe does not go with --backbone" in wrong.err
    other = featx("extract", source, "--out", out, "--recipe", "fast")
    assert other.code == 2 and "the store was made with another layers" in other.err
    again = featx("extract", source, "--out", out, "--json")
    assert again.code == 0 and again.json["embedded"] == 0  # what the store has goes on


@pytest.mark.slow
def test_options_that_do_not_go_together(source: Path, tmp_path: Path, featx: Featx) -> None:
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"x")
    ran = featx("extract", source, "--out", tmp_path / "s", *(f"--backbone={n}" for n in BOTH), "--weights", weights)
    assert ran.code == 2 and "a file of weights is one network's" in ran.err
    twice = featx("extract", source, "--out", tmp_path / "s", "--backbone", BOTH[0], "--backbone", BOTH[0])
    assert twice.code == 2 and "each once" in twice.err
    pixels = featx("extract", source, "--out", tmp_path / "p", "--backbone", "pixels", "--json")
    assert pixels.code == 0 and pixels.json["backbone"] == "pixels"
    assert featx("sweep", tmp_path / "p", "--shots", "1", "--episodes", 2, "--heads", "ridge").code == 0
    assert json.loads((tmp_path / "p.report" / "summary.json").read_text())["results"][0]["features"] == "pixels"
    assert Embedder.like(read_features(tmp_path / "p").provenance, where=tmp_path).backbone.name == "pixels"


@pytest.mark.slow
def test_a_backbone_is_dropped_by_a_command(source: Path, tmp_path: Path, featx: Featx) -> None:
    store, alone = tmp_path / "s", tmp_path / "alone"
    made = featx(
        "extract", source, "--out", store, "--backbone", "resnet18", "--backbone", BOTH[0], "--weights", "none"
    )
    assert made.code == 0, made.err
    before = sum(path.stat().st_size for path in (store / "shards").iterdir())
    ran = featx("drop", store, "resnet18", "--json")
    assert ran.code == 0 and ran.json == {"dropped": "resnet18", "backbones": [BOTH[0], "pixels"]}
    assert sum(path.stat().st_size for path in (store / "shards").iterdir()) < before
    assert featx("verify", store).code == 0
    assert featx("extract", source, "--out", alone, "--backbone", BOTH[0], "--weights", "none").code == 0
    np.testing.assert_array_equal(read_features(store).embeddings, read_features(alone).embeddings)
    for wrong in (BOTH[0], "resnet18", "nothing"):
        refused = featx("drop", store, wrong)
        assert refused.code == 2 and f"{wrong} cannot be taken out" in refused.err
    assert featx("drop", tmp_path / "none", "x").code == 2 and not (tmp_path / "none").exists()
