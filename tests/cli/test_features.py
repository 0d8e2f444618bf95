"""Several backbones, stores and recipes, with the real commands: embedded, compared, joined, kept and served."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Featx, class_folders

from featx.backbones.recipes import RECIPES
from featx.errors import BundleError, UsageError
from featx.extraction.embedder import Embedder
from featx.heads.layers import Blocks, read_layers
from featx.models.bundle import Answer, bundle_bytes, parse_bundle, read_bundle
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
    answers = list(predict_files(bundle, embedder, layer_number(bundle), paths))
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
def test_weights_of_ones_own_are_named_for_each_network(source: Path, tmp_path: Path, featx: Featx) -> None:
    """A store whose network has a file of the user's own gets another network, and neither is taken for the other."""
    from featx.backbones import load_backbone

    store, own, alone = tmp_path / "s", tmp_path / "own.pth", tmp_path / "alone"
    torch.manual_seed(1)
    torch.save(load_backbone("squeezenet1_1", weights="none").provider.build().state_dict(), own)  # type: ignore[union-attr]
    first = featx("extract", source, "--out", store, "--backbone", "squeezenet1_1", "--weights", own)
    assert first.code == 0, first.err
    before = read_features(store)
    forgotten = featx("extract", source, "--out", store, "--backbone", BOTH[0])
    assert forgotten.code == 2 and "--backbone squeezenet1_1 --weights squeezenet1_1=FILE" in forgotten.err
    both = ["--backbone", BOTH[0], "--backbone", "squeezenet1_1"]
    vague = featx("extract", source, "--out", store, *both, "--weights", own)
    assert vague.code == 2 and "expected BACKBONE=FILE, of a --backbone that is named" in vague.err
    unnamed = featx("extract", source, "--out", store, *both[:2], "--weights", f"squeezenet1_1={own}")
    assert unnamed.code == 2 and "no such weights file" in unnamed.err
    own.with_name("lost.pth").write_bytes(own.read_bytes()[:-1])
    lost = featx("extract", source, "--out", store, *both, "--weights", f"squeezenet1_1={own.with_name('gone.pth')}")
    assert lost.code == 2 and "gone.pth" in lost.err
    assert np.array_equal(read_features(store).embeddings, before.embeddings)
    ran = featx("extract", source, "--out", store, *both, "--weights", f"squeezenet1_1={own}", "--json")
    assert ran.code == 0 and ran.json["embedded"] == 16, ran.err
    assert featx("extract", source, "--out", alone, "--backbone", BOTH[0]).code == 0
    for mine, theirs in ((before, "squeezenet1_1"), (read_features(alone), BOTH[0])):
        here = read_features(store, layer=theirs)
        assert np.array_equal(here.embeddings, mine.embeddings) and here.fingerprint == mine.fingerprint


@pytest.mark.slow
def test_views_layers_and_precision_are_of_the_networks_that_are_named(
    source: Path, tmp_path: Path, featx: Featx
) -> None:
    store, alone = tmp_path / "s", tmp_path / "alone"
    base = ["--weights", "none", "--engine", "torch", "--backbone"]
    assert featx("extract", source, "--out", store, *base, "squeezenet1_1").code == 0
    added = [*base, "resnet18", "--views", "center,flip", "--precision", "bf16", "--layer", "resnet18/layer1"]
    for out in (store, alone):
        ran = featx("extract", source, "--out", out, *added)
        assert ran.code == 0, ran.err
    made = {name: (each["views"], each["precision"]) for name, each in FeatureReader(store).backbones.items()}
    assert made == {
        "squeezenet1_1": ("center", "fp32"), "resnet18": ("center,flip", "bf16"), "pixels": ("center", "fp32"),
    }  # fmt: skip
    one, other = (read_features(each, layer="resnet18/layer1") for each in (store, alone))
    assert np.array_equal(one.embeddings, other.embeddings) and one.fingerprint == other.fingerprint
    assert featx("extract", source, "--out", store, "--engine", "torch", "--json").json["embedded"] == 0
    everything = featx("extract", source, "--out", store, "--views", "flip")
    assert everything.code == 2 and "another views" in everything.err
    typo = featx("extract", source, "--out", store, *base, "resnet18", "--layer", "resnet81/layer1")
    assert typo.code == 2 and "a layer of a backbone that is not named: expected resnet18/..., found res" in typo.err
    first = featx("extract", source, "--out", tmp_path / "p", *base, "pixels", "--backbone", "squeezenet1_1", "--json")
    assert first.json["backbone"] == "squeezenet1_1" and first.json["engine"] == "torch"


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


@pytest.mark.slow
def test_a_model_takes_its_quantised_network_along(
    source: Path, tmp_path: Path, featx: Featx, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that featx does not carry is quantised where the store is made, and needs no NNCF where it is used."""
    store, model = tmp_path / "s", tmp_path / "m.model"
    options = ["--backbone", "squeezenet1_1", "--weights", "none", "--precision", "int8", "--json"]
    ran = featx("extract", source, "--out", store, *options)
    assert ran.code == 0 and ran.json["precision"] == "int8", ran.err
    again = featx("extract", source, "--out", store, "--json")
    assert again.code == 0 and again.json["precision"] == "int8" and again.json["embedded"] == 0, again.err
    mixed = featx("extract", source, "--out", store, *options[:4], "--precision", "fp32")
    assert mixed.code == 2 and "another precision" in mixed.err
    assert featx("fit", store, "--out", model).code == 0
    bundle = read_bundle(model)
    assert list(bundle.networks) == [bundle.provenance["quantised_sha256"]]
    photo = next(source.rglob("*.png"))
    here = featx("predict", model, photo, "--json")
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setitem(sys.modules, "nncf", None)
    embedder = open_embedder(bundle, model)
    answer, *_ = predict_files(bundle, embedder, layer_number(bundle), [photo])
    assert isinstance(answer, Answer)
    assert answer.score == pytest.approx(here.json["predictions"][0]["score"], abs=1e-6)
    assert list((tmp_path / "elsewhere").rglob("*.ir")) == []
    assert embedder.networks == dict(bundle.networks)  # from the model, with nothing in the cache
    lost = replace(bundle, networks={})
    with pytest.raises(UsageError, match=r"featx\[int8\]"):
        open_embedder(lost, model)
    raw = bundle_bytes(replace(bundle, networks={"0" * 64: next(iter(bundle.networks.values()))}))
    with pytest.raises(BundleError, match="does not belong in it"):
        parse_bundle(raw, model)
    damaged = {sha256: content[:-1] for sha256, content in bundle.networks.items()}
    with pytest.raises(BundleError, match="quantised network is damaged"):
        parse_bundle(bundle_bytes(replace(bundle, networks=damaged)), model)
