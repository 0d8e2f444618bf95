"""FeatureExtractor: a scikit-learn transformer whose cache is a store."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import class_folders, picture
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks
from torch import nn

from featx.backbones.backbone import load_backbone
from featx.backbones.catalogue import NETWORKS
from featx.backbones.engines.choice import make_engine
from featx.backbones.provider import Provider
from featx.errors import FeatxError, SourceError, UsageError, WeightsError
from featx.extraction import transformer as estimator
from featx.extraction.run import extract_features
from featx.extraction.transformer import FeatureExtractor
from featx.images.pixels import Preprocess, resize_crop
from featx.images.source import ImageSet
from featx.store.manifest import read_manifest
from featx.store.reader import read_features
from featx.store.shards import ShardReader
from featx.store.tools import verify


class Toy(Provider):
    """Small enough to be run a hundred times."""

    preprocess = Preprocess(24, (24, 24), "bilinear", (0.5,) * 3, (0.25,) * 3)

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 5, 3), nn.ReLU(), nn.Conv2d(8, 6, 3))

    def __repr__(self) -> str:
        return "Toy()"


def toy(**options: Any) -> FeatureExtractor:
    return FeatureExtractor(Toy(), engine="torch", device="cpu", **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "photos", each=6)


@pytest.fixture
def paths(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.png"))


@pytest.fixture(autouse=True)
def no_engine_is_left() -> Iterator[None]:
    estimator._embedder.cache_clear()
    yield
    estimator._embedder.cache_clear()


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of every engine that is made."""
    made: list[str] = []

    def make(backbone: Any, **options: Any) -> Any:
        made.append(backbone.name)
        return make_engine(backbone, **options)

    monkeypatch.setattr(estimator, "make_engine", make)
    return made


def plain(paths: list[Path]) -> NDArray[np.float32]:
    """The same by torch alone."""
    backbone = load_backbone(Toy())
    rows = []
    for path in paths:
        pixels = resize_crop(Image.open(path).convert("RGB"), backbone.preprocess)
        image = (torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
        with torch.no_grad():
            rows.append(backbone.network().body(image).mean((2, 3))[0].numpy())
    return np.array(rows)


def labels(paths: list[Path]) -> list[str]:
    return [path.parent.name for path in paths]


def test_paths_pictures_and_pixels_give_the_embeddings_of_plain_torch(paths: list[Path]) -> None:
    images = [Image.open(path) for path in paths]
    wanted = plain(paths)
    for X in (
        paths,
        list(map(str, paths)),
        np.array(list(map(str, paths))),
        pd.Series(list(map(str, paths))),
        pd.DataFrame({"path": list(map(str, paths))}),
        images,
        [np.asarray(image) for image in images],
        np.stack([np.asarray(image) for image in images]),
    ):
        found = toy().fit(X).transform(X)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_what_is_in_the_store_is_not_computed_again(paths: list[Path], tmp_path: Path, engines: list[str]) -> None:
    store = tmp_path / "cache.featx"
    first = toy(store=store).fit_transform(paths[:8])
    assert len(engines) == 1
    estimator._embedder.cache_clear()
    again = toy(store=store).fit_transform(paths[:8][::-1])
    assert len(engines) == 1
    assert np.array_equal(again, first[::-1])
    copy = tmp_path / "another name.png"
    copy.write_bytes(paths[3].read_bytes())
    assert np.array_equal(toy(store=store).transform([copy, copy, paths[0]]), first[[3, 3, 0]])
    assert len(engines) == 1
    both = toy(store=store).transform(paths)
    assert len(engines) == 2
    np.testing.assert_allclose(both, plain(paths), atol=1e-5)
    assert len(ShardReader(store, read_manifest(store))) == len(paths)


def test_pixels_are_cached_too_and_are_no_files(paths: list[Path], tmp_path: Path, engines: list[str]) -> None:
    store = tmp_path / "cache.featx"
    pixels = [np.asarray(Image.open(path)) for path in paths[:2]]
    first = toy(store=store).transform(pixels)
    assert np.array_equal(toy(store=store).transform([Image.fromarray(each) for each in pixels]), first)
    turned = toy(store=store).transform([pixels[0].reshape(40, 30, 3)])  # the same bytes, another picture
    assert not np.allclose(turned, first[:1])
    assert len(ShardReader(store, read_manifest(store))) == 3


def test_the_cache_is_a_store_that_extract_goes_on_with(folder: Path, paths: list[Path], tmp_path: Path) -> None:
    backbone = load_backbone(Toy())
    engine = make_engine(backbone, engine="torch", device="cpu")
    mine, theirs = tmp_path / "mine.featx", tmp_path / "theirs.featx"
    toy(store=mine).transform(paths)
    assert extract_features(ImageSet.from_folder(folder), backbone, mine, engine=engine).embedded == 0
    extract_features(ImageSet.from_folder(folder), backbone, theirs, engine=engine)
    before = read_manifest(theirs)
    found = toy(store=theirs).transform(paths)
    assert read_manifest(theirs) == before
    features = read_features(theirs)
    assert [folder / name for name in features.ids] == paths
    assert np.array_equal(found, features.embeddings)


def test_one_layer_of_a_store_with_several(folder: Path, paths: list[Path], tmp_path: Path) -> None:
    backbone = load_backbone(Toy(), layers=["0", "penultimate"])
    store = tmp_path / "s.featx"
    half = ImageSet.from_folder(folder / "ants")
    extract_features(half, backbone, store, engine=make_engine(backbone, engine="torch", device="cpu"))
    assert toy(store=store, layer="0").transform(paths).shape == (12, 8)
    np.testing.assert_allclose(toy(store=store).transform(paths), plain(paths), atol=1e-5)
    assert read_manifest(store).provenance["layers"] == ["0", "penultimate"]


def test_in_a_pipeline_it_scores_as_its_embeddings_do(paths: list[Path], tmp_path: Path, engines: list[str]) -> None:
    y = labels(paths)
    pipeline = make_pipeline(toy(store=tmp_path / "cache.featx"), LogisticRegression())
    scores = cross_val_score(pipeline, paths, y, cv=3)
    wanted = cross_val_score(LogisticRegression(), plain(paths), y, cv=3)
    np.testing.assert_allclose(scores, wanted)
    assert len(engines) == 2  # for all folds: the second when the store that the first made says what "auto" is
    search = GridSearchCV(pipeline, {"featureextractor__layer": ["penultimate", "0"]}, cv=2, error_score="raise")
    search.fit(paths, y)
    assert set(search.predict(paths)) <= {"ants", "bees"}


def test_tables_with_a_column_of_paths(paths: list[Path]) -> None:
    frame = pd.DataFrame({"path": list(map(str, paths)), "weight": np.arange(12.0)})
    for columns in ("path", ["path"]):
        table = make_column_transformer((toy(), columns), ("passthrough", ["weight"])).fit_transform(frame)
        np.testing.assert_allclose(table, np.c_[plain(paths), np.arange(12)], atol=1e-5)


def test_names_of_the_columns_and_pandas(paths: list[Path]) -> None:
    names = [f"featureextractor{i}" for i in range(6)]
    extractor = toy().fit(paths)
    assert list(extractor.get_feature_names_out()) == names
    frame = extractor.set_output(transform="pandas").transform(paths)
    assert list(frame.columns) == names
    np.testing.assert_allclose(frame, plain(paths), atol=1e-5)


def test_the_default_knows_its_width_without_the_network() -> None:
    assert (
        len(FeatureExtractor().fit(["x.jpg"]).get_feature_names_out()) == NETWORKS["efficientnet_lite0"].embedding_dim
    )


@pytest.mark.parametrize(
    "check",
    [
        estimator_checks.check_estimator_cloneable,
        estimator_checks.check_estimator_tags_renamed,
        estimator_checks.check_valid_tag_types,
        estimator_checks.check_estimator_repr,
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_do_not_raise_errors_in_init_or_set_params,
        estimator_checks.check_mixin_order,
        estimator_checks.check_parameters_default_constructible,
        estimator_checks.check_get_params_invariance,
        estimator_checks.check_set_params,
    ],
    ids=lambda check: check.__name__,
)
def test_scikit_learns_checks_that_need_no_table_of_numbers(check: Callable[..., None]) -> None:
    check("FeatureExtractor", FeatureExtractor())


def test_scikit_learn_has_no_other_checks_for_what_takes_no_table() -> None:
    with pytest.warns(UserWarning, match="Can't test estimator FeatureExtractor which requires"):
        results = estimator_checks.check_estimator(FeatureExtractor(), legacy=True, on_fail="raise", on_skip=None)
    assert results


def test_what_the_other_checks_ask_for_with_images_instead(paths: list[Path]) -> None:
    extractor = toy()
    before = dict(vars(extractor))
    given = list(paths)
    assert extractor.fit(paths, labels(paths)) is extractor
    found = extractor.transform(paths)
    assert vars(extractor) == before and paths == given  # nothing is learnt, nothing is changed
    assert np.array_equal(found, extractor.fit_transform(paths, labels(paths)))  # idempotent
    assert np.array_equal(found[[5, 2]], extractor.transform([paths[5], paths[2]]))  # in subsets and any order
    assert np.array_equal(found, clone(extractor).transform(paths))


def test_pickles_go_without_the_network(paths: list[Path], tmp_path: Path) -> None:
    extractor = toy(store=tmp_path / "cache.featx")
    found = extractor.fit_transform(paths)
    packed = pickle.dumps(extractor)
    assert len(packed) < 1_000
    assert np.array_equal(pickle.loads(packed).transform(paths), found)  # noqa: S301 - our own


def test_many_writers_of_one_cache(paths: list[Path], tmp_path: Path) -> None:
    store = tmp_path / "cache.featx"
    rng = np.random.default_rng(0)
    orders = [rng.permutation(12)[:9] for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda order: toy(store=store).transform([paths[i] for i in order]), orders))
    wanted = plain(paths)
    for order, each in zip(orders, found, strict=True):
        np.testing.assert_allclose(each, wanted[order], atol=1e-5)
    assert len(ShardReader(store, read_manifest(store))) == len(set(np.concatenate(orders).tolist()))


@pytest.mark.slow
def test_other_networks_have_stores_of_their_own_inside(paths: list[Path], tmp_path: Path, engines: list[str]) -> None:
    store = tmp_path / "cache.featx"
    toy(store=store).transform(paths)
    before, wrong = read_manifest(store), verify(store)  # a cache has no index
    others: tuple[dict[str, Any], ...] = ({"views": "center,flip"}, {"precision": "bf16"}, {"layer": "0"})
    for options in others:
        wanted = toy(**options).transform(paths)
        np.testing.assert_allclose(toy(store=store, **options).transform(paths), wanted, atol=1e-5)
        made = len(engines)
        estimator._embedder.cache_clear()
        np.testing.assert_allclose(toy(store=store, **options).transform(paths), wanted, atol=1e-5)
        assert len(engines) == made
    assert read_manifest(store) == before
    assert verify(store) == wrong
    inside = sorted((store / ".networks").iterdir())
    assert len(inside) == len(others)
    assert all(len(ShardReader(each, read_manifest(each))) == len(paths) for each in inside)


def test_two_networks_that_meet_in_a_new_store_both_keep_theirs(paths: list[Path], tmp_path: Path) -> None:
    """What the workers of a search do: both look before either has made the store."""
    store = tmp_path / "cache.featx"
    first, second = toy(store=store)._open(), toy(store=store, views="center,flip")._open()
    items = estimator.items_of(paths)
    np.testing.assert_allclose(first.cached(items), plain(paths), atol=1e-5)
    np.testing.assert_allclose(second.cached(items), toy(views="center,flip").transform(paths), atol=1e-5)
    assert len(list((store / ".networks").iterdir())) == 1


@pytest.mark.slow
def test_a_search_over_backbones_shares_one_store(folder: Path, tmp_path: Path) -> None:
    paths = sorted(folder.rglob("*.png"))
    y = labels(paths)
    names = ["shufflenet_v2_x0_5", "shufflenet_v2_x1_0"]
    extractor = FeatureExtractor(weights="none", engine="torch", device="cpu", store=tmp_path / "cache.featx")
    pipeline = make_pipeline(extractor, LogisticRegression())
    grid = {"featureextractor__backbone": names}
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise", refit=False).fit(paths, y)
    for name, score in zip(names, search.cv_results_["mean_test_score"], strict=True):
        alone = clone(pipeline).set_params(featureextractor__backbone=name, featureextractor__store=None)
        assert score == cross_val_score(alone, paths, y, cv=2).mean()
    stores = [tmp_path / "cache.featx", *(tmp_path / "cache.featx" / ".networks").iterdir()]
    assert sorted(read_manifest(each).provenance["backbone"] for each in stores) == names


@pytest.mark.parametrize(
    ("X", "says"),
    [
        ("photo.jpg", r"one image, where a list of them is expected. Write \[X\]"),
        (Path("photo.jpg"), "one image"),
        (picture(0), "one image"),
        (np.zeros((8, 8, 3), np.uint8), "one image"),
        ([], "expected one or more, found 0"),
        (np.zeros((4, 5)), r"no images: .*found an array float64 \(4, 5\)"),
        (np.zeros((2, 8, 8, 3)), r"X\[0\]: no image: .*found float64 \(8, 8, 3\)"),
        (np.zeros((2, 8, 8, 4), np.uint8), r"found uint8 \(8, 8, 4\)"),
        ([np.zeros((1, 1, 3), np.uint8)], r"X\[0\]: refused \(too_small"),
        ([picture(0), 3], r"X\[1\]: no image: .*found int"),
        ({"a": 1}, "found dict"),
    ],
)
def test_what_is_no_list_of_images(X: Any, says: str) -> None:
    with pytest.raises(FeatxError, match=says):
        toy().transform(X)


def test_files_that_are_refused_are_named(paths: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(paths[0].read_bytes()[:100])
    for options in ({}, {"store": tmp_path / "cache.featx"}):
        with pytest.raises(SourceError, match=r"bad.png: refused \(truncated"):
            toy(**options).transform([*paths, bad])
        with pytest.raises(SourceError, match=r"nowhere.png: (refused \(missing|cannot be read)"):
            toy(**options).transform([tmp_path / "nowhere.png"])


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"backbone": "resnet1"}, UsageError, "Did you mean .*resnet18"),
        ({"views": "centre"}, UsageError, "Did you mean center"),
        ({"weights": "nowhere.pth"}, WeightsError, "no such weights file"),
        ({"n_jobs": 0}, UsageError, "n_jobs: must not be 0"),
    ],
)
def test_wrong_parameters_are_noticed_by_fit(options: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        FeatureExtractor(**options).fit(["x.jpg"])


@pytest.mark.slow
def test_the_default_in_parallel_processes(paths: list[Path], tmp_path: Path) -> None:
    # A script as people write them, with processes that share a cache nobody has filled.
    script = f"""
from pathlib import Path
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from featx import FeatureExtractor
paths = sorted(Path({str(paths[0].parent.parent)!r}).rglob("*.png"))
pipeline = make_pipeline(FeatureExtractor(store="cache.featx", engine="torch", device="cpu"), LogisticRegression())
print(cross_val_score(pipeline, paths, [path.parent.name for path in paths], cv=2, n_jobs=2, error_score="raise"))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) >= 2
    store = tmp_path / "cache.featx"
    assert len(ShardReader(store, read_manifest(store))) == len(paths)
