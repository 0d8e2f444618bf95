"""Views: what is cut, that it is averaged, and that a store's views are those of every later image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import storekit
from conftest import TINY, Featx, TinyEngine, class_folders, picture, tiny_backbone
from imagekit import encoded, pixels
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from featx.backbones.backbone import load_backbone
from featx.backbones.engines.base import ViewsEngine, for_views
from featx.errors import MismatchError, UsageError
from featx.extraction.embedder import Embedder
from featx.extraction.lanes import Lane
from featx.extraction.run import extract_features
from featx.images.pixels import Preprocess, decode
from featx.images.pool import DecoderPool
from featx.images.source import ImageSet
from featx.images.views import VIEWS, Looks, parse_views
from featx.store.manifest import fingerprint
from featx.store.reader import read_features

HALF = (0.5, 0.5, 0.5)
WIDE = Preprocess(resize=60, crop=(50, 40), interpolation="bicubic", mean=HALF, std=HALF)


# --- names --------------------------------------------------------------------------------------------------------


def test_views_have_one_order_however_they_are_asked_for() -> None:
    assert parse_views("full, flip ,center") == ("center", "flip", "full")
    assert parse_views(",".join(reversed(list(VIEWS)))) == tuple(VIEWS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("center,flop", r"--views: no view 'flop': expected some of center, flip.*Did you mean flip"),
        ("sideways", "no view 'sideways'"),
        (" , ", "no view is named"),
        ("flip,center,flip", "the view 'flip' is named twice"),
    ],
)
def test_unknown_views_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_views(text)


# --- pixels -------------------------------------------------------------------------------------------------------


def test_each_view_is_what_pillow_and_torchvision_cut() -> None:
    image = picture(3, (200, 150))
    bicubic = InterpolationMode.BICUBIC
    center = np.asarray(Compose([Resize(60, bicubic), CenterCrop((50, 40))])(image), dtype=int)
    full = np.asarray(image.resize((40, 50), Image.Resampling.BICUBIC), dtype=int)
    found = Looks(WIDE, ("center", "flip", "full", "full-flip")).cut(image).astype(int)
    for ours, theirs in zip(found, (center, center[:, ::-1], full, full[:, ::-1]), strict=True):
        assert np.abs(ours - theirs).max() <= 1
    corners = {"top-left": (0, 0), "top-right": (80, 0), "bottom-left": (0, 60), "bottom-right": (80, 60)}
    for name, (left, top) in corners.items():
        part = image.crop((left, top, left + 120, top + 90)).resize((40, 50), Image.Resampling.BICUBIC)
        ours = Looks(WIDE, (name,)).cut(image).astype(int)
        assert ours.shape == (50, 40, 3)
        # At its inner edges a part of a picture is resampled with a look across them.
        assert np.abs(ours - np.asarray(part, dtype=int))[4:-4, 4:-4].max() <= 1


def test_one_view_is_a_picture_and_several_are_a_stack() -> None:
    data = encoded(picture(1, (90, 70)))
    assert pixels(data, Looks(WIDE)).shape == Looks(WIDE).shape == (50, 40, 3)
    assert pixels(data, Looks(WIDE, ("full",))).flags.c_contiguous
    both = Looks(WIDE, ("flip", "center"))
    assert pixels(data, both).shape == both.shape == (2, 50, 40, 3)
    np.testing.assert_array_equal(pixels(data, both)[0], pixels(data, Looks(WIDE)))


@pytest.mark.parametrize("views", [("center",), ("full",), ("center", "top-left"), tuple(VIEWS)])
def test_scaled_decoding_never_goes_below_what_a_view_needs(views: tuple[str, ...]) -> None:
    looks = Looks(replace(WIDE, crop=(60, 60)), views)
    for size in ((4000, 300), (300, 4000), (900, 800), (2400, 1800)):
        data = encoded(picture(1, size), "JPEG")
        width, height = decode(data, enough_for=[looks]).size
        need = 100 if any(name.startswith(("top", "bottom", "zoom")) for name in views) else 60
        assert min(width, height) >= need, (size, views)
    small = np.abs(pixels(data, looks).astype(int) - pixels(data, looks, mode="scaled").astype(int))
    assert small.mean() < 2


def test_zoom_is_the_middle_of_the_crop_s_shape() -> None:
    image = picture(5, (300, 150))  # the largest part of 40 x 50 is 120 x 150 pixels
    part = image.crop((114, 30, 186, 120)).resize((40, 50), Image.Resampling.BICUBIC)
    ours, mirrored = Looks(WIDE, ("zoom", "zoom-flip")).cut(image).astype(int)
    assert np.abs(ours - np.asarray(part, dtype=int))[4:-4, 4:-4].max() <= 1
    np.testing.assert_array_equal(mirrored, ours[:, ::-1])


@pytest.mark.parametrize("size", [(2, 2), (20_000, 3), (3, 20_000), (41, 51)])
def test_odd_images_have_every_view(size: tuple[int, int]) -> None:
    looks = Looks(WIDE, tuple(VIEWS))
    data = encoded(picture(2, size), "JPEG")
    for mode in ("full", "scaled"):
        assert pixels(data, looks, mode=mode).shape == (len(VIEWS), 50, 40, 3)


def test_decoding_processes_give_the_same_views(tmp_path: Path) -> None:
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"{number}.jpg")
        paths[-1].write_bytes(encoded(picture(number, (300, 200)), "JPEG"))
    for mode in ("full", "scaled"):
        looks = Looks(TINY, ("center", "full", "bottom-right"))
        with DecoderPool(TINY, workers=2, views=looks.views, mode=mode) as pool:
            found = list(pool.run(paths, lambda digest: False, ahead=2))
        for path, decoded in zip(paths, found, strict=True):
            assert decoded.pixels is not None
            np.testing.assert_array_equal(decoded.pixels, pixels(path.read_bytes(), looks, mode=mode))


# --- the mean -----------------------------------------------------------------------------------------------------


def stacks(n: int, views: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, views, 24, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7])
@pytest.mark.parametrize("views", [2, 3, 5])
def test_embeddings_are_averaged_image_by_image(batch_size: int, views: int) -> None:
    inner = TinyEngine(batch_size)
    engine = for_views(inner, views)
    batches = [stacks(n, views, seed=n) for n in (batch_size, 1, max(1, batch_size - 1))]
    found = list(engine.embed(iter(batches)))
    assert (engine.name, engine.device, engine.precision, engine.batch_size) == ("torch", "cpu", "fp32", batch_size)
    assert max(inner.batches) <= batch_size
    for batch, (rows,) in zip(batches, found, strict=True):
        each = [next(iter(TinyEngine(1).embed([view[None]])))[0][0] for stack in batch for view in stack]
        plain = np.array(each, dtype=np.float64).reshape(len(batch), views, -1).mean(axis=1)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(rows, plain, rtol=1e-5, atol=1e-5)


def test_one_view_is_left_to_the_engine_itself() -> None:
    engine = TinyEngine()
    assert for_views(engine, 1) is engine


def test_an_engine_that_averages_views_is_not_put_into_another() -> None:
    embedder = Embedder(tiny_backbone(), TinyEngine(), views=("center", "flip"))
    lane = Lane.of(embedder.backbone, embedder.engine, embedder.looks.views, "full")  # as a refit does
    (found,) = next(iter(lane.engine.embed([stacks(3, 2)])))
    (expected,) = embedder.embed_pixels([(stack,) for stack in stacks(3, 2)])
    np.testing.assert_array_equal(found, expected)


def test_an_engine_that_works_ahead_keeps_images_and_means_together() -> None:
    class Ahead(TinyEngine):
        def embed(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[tuple[NDArray[np.float32], ...]]:
            waiting = []
            for result in super().embed(batches):
                waiting.append(result)
                if len(waiting) == 4:
                    yield waiting.pop(0)
            yield from waiting

    batches = [stacks(n, 3, seed=n) for n in (2, 1, 2, 2, 1)]
    expected = list(ViewsEngine(TinyEngine(2), 3).embed(batches))
    found = list(ViewsEngine(Ahead(2), 3).embed(batches))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])


def test_batches_of_another_number_of_views_are_refused() -> None:
    for wrong in (stacks(2, 3), stacks(2, 1)[:, 0]):
        with pytest.raises(ValueError, match=r"expected images \(n, 2, h, w, 3\)"):
            list(ViewsEngine(TinyEngine(), 2).embed([wrong]))


# --- stores -------------------------------------------------------------------------------------------------------


def test_the_fingerprint_of_one_centre_crop_is_what_it_always_was() -> None:
    # As written by the first release: stores of it are continued, not refused.
    old = "0cf2d7d9453c0e5e1411864eeb1423c4198d76b75464f7437a7ad9e3121aec87"
    assert fingerprint(storekit.provenance()) == old


def test_a_store_of_views_says_so_and_is_not_mixed_with_another(tmp_path: Path) -> None:
    source, store = class_folders(tmp_path / "photos", each=5), tmp_path / "views.featx"
    images, asked = ImageSet.from_folder(source), ("full", "center", "flip")
    summary = extract_features(images, tiny_backbone(), store, engine=TinyEngine(), views=asked)
    assert summary.to_json()["views"] == ["center", "flip", "full"]
    features = read_features(store)
    assert features.provenance["views"] == "center,flip,full"
    for row, name in enumerate(features.ids):
        stack = pixels((source / name).read_bytes(), Looks(TINY, asked))
        each = [next(iter(TinyEngine(1).embed([view[None]])))[0][0] for view in stack]
        np.testing.assert_allclose(features.embeddings[row], np.mean(each, axis=0), rtol=1e-5, atol=1e-5)
    again = extract_features(images, tiny_backbone(), store, engine=TinyEngine(), views=("flip", "full", "center"))
    assert again.reused == 10
    with pytest.raises(MismatchError, match=r"another views: expected .*center,flip,full.*found .*center"):
        extract_features(images, tiny_backbone(), store, engine=TinyEngine())
    with pytest.raises(UsageError, match="no view 'flipp'"):
        extract_features(images, tiny_backbone(), store, engine=TinyEngine(), views=("flipp",))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_embeddings_are_means_of_plain_torch_over_plain_transforms(tmp_path: Path, engine: str) -> None:
    import torch

    if engine == "openvino":
        pytest.importorskip("openvino")
    views = ("center", "flip", "full")
    source = tmp_path / "photos"
    for number, name in enumerate("aab"):
        (source / name).mkdir(parents=True, exist_ok=True)
        picture(number, (320, 240)).save(source / name / f"{number}.png")
    backbone = load_backbone("efficientnet_lite0", layers=("penultimate", "blocks.4"))
    extract_features(
        ImageSet.from_folder(source), backbone, tmp_path / "s.featx", views=views, engine=_engine(backbone, engine)
    )
    bicubic = InterpolationMode.BICUBIC
    center = Compose([Resize(256, bicubic), CenterCrop(224)])
    for layer, place in (("penultimate", 0), ("blocks.4", 1)):
        features = read_features(tmp_path / "s.featx", layer=layer)
        for row, name in enumerate(features.ids):
            with Image.open(source / name) as image:
                crops = [np.asarray(center(image)), np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC))]
            stack = np.stack([crops[0], crops[0][:, ::-1], crops[1]]).astype(np.float32)
            with torch.no_grad():
                plain = backbone.network()(torch.from_numpy(stack / 127.5 - 1).permute(0, 3, 1, 2))[place]
            expected, ours = plain.mean(0).numpy(), features.embeddings[row]
            cosine = expected @ ours / (np.linalg.norm(expected) * np.linalg.norm(ours))
            assert cosine > 0.9999
            assert np.linalg.norm(ours - expected) < 0.02 * np.linalg.norm(expected)


def _engine(backbone: Any, name: str) -> Any:
    from featx.backbones.engines.choice import make_engine

    return make_engine(backbone, engine=name, device="cpu", precision="fp32", batch_size=4, threads=1)


@pytest.mark.slow
def test_predict_and_search_look_as_the_store_did(tmp_path: Path, featx: Featx) -> None:
    source, store, model = class_folders(tmp_path / "photos", each=6), tmp_path / "s.featx", tmp_path / "s.model"
    ran = featx("extract", source, "--out", store, "--views", "flip,center", "--json")
    assert ran.code == 0
    assert ran.json["views"] == ["center", "flip"]
    assert "2 views (center, flip): the network takes about 2 times as long." in ran.err
    features = read_features(store)
    # An image is as similar to its mirror image as to itself only where both are looked at both ways.
    embedder = Embedder.like(features.provenance, where=store)
    assert embedder.looks.views == ("center", "flip")
    image = source / features.ids[0]
    mirrored = tmp_path / "mirrored.png"
    with Image.open(image) as opened:
        opened.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored)
    (_, same), (_, other) = embedder.embed_files([image, mirrored])
    assert isinstance(same, tuple)
    assert isinstance(other, tuple)
    np.testing.assert_array_equal(same[0], features.embeddings[0])
    assert same[0] @ other[0] / np.linalg.norm(same[0]) / np.linalg.norm(other[0]) > 0.9995
    assert featx("fit", store, "--out", model).code == 0
    predicted = featx("predict", model, image, mirrored, "--json").json["predictions"]
    assert predicted[0]["score"] == pytest.approx(predicted[1]["score"], abs=0.02)
    wrong = featx("extract", source, "--out", store, "--views", "center,flop")
    assert wrong.code == 2
    assert "Did you mean flip" in wrong.err
