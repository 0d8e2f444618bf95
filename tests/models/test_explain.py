"""Evidence maps: they add up to the score that predict gives, lie where the evidence is, and are refused otherwise."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Featx, class_folders
from modelkit import clusters
from numpy.typing import NDArray
from PIL import Image

from featx.backbones import Engine, feature_maps, load_backbone, make_engine
from featx.backbones.engines import choice as engines
from featx.errors import MismatchError, UsageError
from featx.extraction import Embedder
from featx.heads import HEADS, NotLinear, Scorer, make_head
from featx.images import Looks, Preprocess
from featx.models import Explainer, Explanation, layer_number, open_embedder, read_bundle
from featx.models.explain import Part
from featx.reports.heat import AGAINST, FOR, UNSEEN, heat, overlays, painted

KINDS = ("none", "l2", "centre_l2", "standardise", "power_l2", "blocks_l2:7*0.8000,5*0.6000")
COLOURS = {"blue": (30, 60, 235), "green": (40, 200, 60), "red": (230, 40, 40)}
needs_openvino = pytest.mark.skipif(not engines._installed("openvino"), reason="no openvino")


# --- arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in HEADS if name != "knn"])
def test_a_linear_head_is_linear_in_the_numbers_of_an_embedding(name: str, kind: str, n_classes: int) -> None:
    rows, labels = clusters(n_classes)
    scorer = Scorer.of(make_head(name, kind=kind).fit(rows, labels))
    for row in (*rows[::17], np.zeros(12, np.float32)):
        weights, shift, intercept = scorer.linear_form(row)
        np.testing.assert_allclose(weights @ (row - shift) + intercept, scorer.scores(row[None])[0], atol=1e-9)


def test_heads_that_are_no_sum_say_so() -> None:
    rows, labels = clusters()
    with pytest.raises(NotLinear, match="count votes of whole photos"):
        Scorer.of(make_head("knn", n_neighbors=3).fit(rows, labels)).linear_form(rows[0])


def explanation(*parts: Part, size: tuple[int, int] = (120, 80)) -> Explanation:
    scores = np.array([1.0, 0.0])
    return Explanation(("a", "b"), scores, np.zeros(2), parts, (), size, 0.0, np.zeros(3, np.float32))


def test_colours_lie_on_the_part_that_the_network_sees() -> None:
    grid = np.zeros((2, 4, 4))
    grid[0, 0, 3], grid[1, 3, 0] = 4.0, -2.0  # for a: up on the right; against b: down on the left
    found = explanation(Part("x", "center", (0.25, 0.0, 0.75, 1.0), grid))
    first, second = overlays(found, (0, 1), 120, 80)
    assert first.shape == (80, 120, 4)
    assert (first[:, :30, :3] == UNSEEN).all()
    assert (first[:, 90:, :3] == UNSEEN).all()
    assert tuple(first[10, 82, :3]) == FOR
    assert tuple(second[70, 37, :3]) == AGAINST
    assert first[70, 37, 3] == 0  # nothing there
    assert first[10, 82, 3] > 1.8 * second[70, 37, 3] > 0  # one scale for both
    picture = np.full((80, 120, 3), (200, 10, 10), np.uint8)
    below = painted(picture, first)
    assert len(set(below[70, 37].tolist())) == 1  # a photo's own red is no evidence
    assert below[10, 82].tolist() != below[70, 37].tolist()


def test_the_mean_of_a_shown_map_is_what_the_parts_add() -> None:
    rng = np.random.default_rng(0)
    parts = [
        Part("x", "center", (0.2, 0.1, 0.8, 0.9), rng.normal(size=(2, 7, 7)) + 1),
        Part("x", "full", (0.0, 0.0, 1.0, 1.0), rng.normal(size=(2, 7, 7)) - 1),
    ]
    found = explanation(*parts)
    for place in (0, 1):
        shown = heat(found, place, 480, 320)
        inside, outside = found.shares(place)
        total = sum(part.evidence[place].mean() for part in parts)
        # Between the centres of places a value is a mix, so that the outer places count a little more.
        assert np.nanmean(shown) == pytest.approx(total, abs=0.15)
        assert inside + outside == pytest.approx(total, abs=1e-12)
    even = explanation(Part("x", "center", (0, 0, 1, 1), np.ones((2, 7, 7))))
    assert even.shares(0) == pytest.approx([0.25, 0.75])


def test_views_know_which_part_of_a_photo_they_show() -> None:
    preprocess = Preprocess(64, (48, 48), "bilinear", (0.5,) * 3, (0.5,) * 3)
    looks = Looks(preprocess, ("center", "flip", "full", "zoom"))
    ramp = np.zeros((100, 200, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, 200)  # red says how far to the right
    ramp[..., 1] = np.linspace(0, 255, 100)[:, None]
    cuts = looks.cut(Image.fromarray(ramp))
    for cut, mirrored, (left, top, right, bottom) in zip(cuts, looks.mirrored, looks.boxes(200, 100), strict=True):
        upright = cut[:, ::-1] if mirrored else cut
        for found, at in zip((upright[24, 0, 0], upright[24, -1, 0], upright[0, 24, 1], upright[-1, 24, 1]),
                             (left, right, top, bottom), strict=True):  # fmt: skip
            assert found / 255 == pytest.approx(at, abs=0.02)
    assert looks.mirrored == [False, True, False, False]


# --- networks -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", pytest.param("openvino", marks=needs_openvino)])
@pytest.mark.parametrize(("name", "side"), [("resnet18", 7), ("squeezenet1_1", 13), ("mobilenet_v3_small", 0)])
def test_the_map_is_what_the_network_averages(name: str, side: int, engine: str) -> None:
    backbone = load_backbone(name, weights="none")
    runner = make_engine(backbone, engine=engine, device="cpu", precision="fp32", threads=1, pad=False)
    batch = np.random.default_rng(0).integers(0, 256, (2, *backbone.preprocess.crop, 3), dtype=np.uint8)
    (found,), (embedding,) = feature_maps(runner, batch), next(iter(runner.embed([batch])))
    if not side:  # a layer behind the mean
        assert found == "the network does not end this layer with a mean over the image"
        return
    assert not isinstance(found, str)
    assert found.shape == (2, side, side, embedding.shape[1])
    np.testing.assert_allclose(found.mean(axis=(1, 2)), embedding, atol=1e-4 * np.abs(embedding).max())
    if name == "resnet18":
        import torch

        body, preprocess = backbone.network().body, backbone.preprocess
        pixels = torch.from_numpy(batch).permute(0, 3, 1, 2) / 255
        images = (pixels - torch.tensor(preprocess.mean)[:, None, None]) / torch.tensor(preprocess.std)[:, None, None]
        kept: list[torch.Tensor] = []
        handle = body.get_submodule("layer4").register_forward_hook(lambda module, args, output: kept.append(output))
        with torch.inference_mode():
            body(images)
        handle.remove()
        expected = kept[0].permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def shapes(folder: Path, each: int, *, seed: int = 0) -> Path:
    """Photos of noise, each with a disc in the colour of its class, somewhere in the middle."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(each):
            at = rng.uniform(0.3, 0.7, 2)
            disc((240, 180), at, colour, rng).save(folder / name / f"{number:02d}.png")
    return folder


def disc(
    size: tuple[int, int], at: NDArray[np.float64], colour: tuple[int, int, int], rng: np.random.Generator
) -> Image.Image:
    width, height = size
    noise = rng.integers(90, 170, (height // 4, width // 4, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)).copy()
    y, x = np.mgrid[:height, :width]
    pixels[np.hypot(x - at[0] * width, y - at[1] * height) < 0.13 * min(size)] = colour
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, featx: Featx) -> Path:
    folder = tmp_path_factory.mktemp("explain")
    shapes(folder / "photos", 12)
    several = ("--layer", "blocks.4", "--layer", "penultimate", "--views", "center,flip,full")
    for name, options in {"plain": (), "several": several}.items():
        store = folder / f"{name}.featx"
        assert featx("extract", folder / "photos", "--out", store, *options).code == 0
        assert featx("fit", store, "--out", folder / f"{name}.model").code == 0
    assert featx("fit", folder / "plain.featx", "--out", folder / "knn.model", "--head", "knn").code == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "several"])
def test_maps_add_up_to_the_score_that_predict_gives(name: str, models: Path, featx: Featx, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    files = []
    for number, size in enumerate([(300, 200), (150, 400), (64, 64), (900, 600)]):
        files.append(tmp_path / f"{number}.png")
        disc(size, np.array([0.5, 0.5]), list(COLOURS.values())[number % 3], rng).save(files[-1])
    model = models / f"{name}.model"
    found = featx("explain", model, *files, "--json").json["explanations"]
    predicted = featx("predict", model, *files, "--json").json["predictions"]
    bundle = read_bundle(model)
    embedder = open_embedder(bundle, model)
    for each, answer, file in zip(found, predicted, files, strict=True):
        assert {name: each[name] for name in answer} == answer
        for about in each["evidence"]:
            maps = [np.array(one["evidence"]) for one in about["maps"]]
            assert len(maps) == {"plain": 1, "several": 6}[name] or bundle.layer != "combined"
            assert about["left_out"] == []
            assert about["intercept"] + sum(one.mean() for one in maps) == pytest.approx(about["score"], abs=1e-4)
        first, second = each["evidence"]
        assert [first["class"], second["class"]] == [each["label"], each["runner_up"]]
        # What predict says of the two: the ratio of their probabilities is that of the scores' difference.
        ratio = answer["probabilities"][each["label"]] / answer["probabilities"][each["runner_up"]]
        assert bundle.sharpness is not None
        assert math.log(ratio) / bundle.sharpness == pytest.approx(first["score"] - second["score"], abs=1e-4)
        assert each["margin"] == pytest.approx(first["score"] - second["score"])
        # And the head's own scores, from its own embedding of the file.
        (_, layers), *_ = embedder.embed_files([file])
        assert not isinstance(layers, Exception)
        place = layer_number(bundle)
        own = bundle.scorer.scores((np.concatenate(layers) if place is None else layers[place])[None])[0]
        assert first["score"] == pytest.approx(own.max() - own.mean(), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "several"])
def test_the_evidence_lies_where_the_disc_is(name: str, models: Path) -> None:
    model = models / f"{name}.model"
    bundle = read_bundle(model)
    embedder = open_embedder(bundle, model)
    explainer = Explainer(bundle.scorer, bundle.class_names, embedder, layer_number(bundle))
    rng = np.random.default_rng(11)
    for number, colour in enumerate(COLOURS):
        at = np.array([0.36 + 0.14 * number, 0.3 + 0.2 * number])
        image = disc((300, 200), at, COLOURS[colour], rng)
        found = explainer.explain(embedder.cut(image), image.size)
        place = bundle.class_names.index(colour)
        shown = np.nan_to_num(heat(found, place, 300, 200), nan=-np.inf)
        y, x = np.unravel_index(shown.argmax(), shown.shape)
        assert np.hypot(x - 300 * at[0], y - 200 * at[1]) < 45
        for part in (each for each in found.parts if each.layer == "penultimate"):  # those of mirrored views, too
            left, top, right, bottom = part.box
            row, column = np.unravel_index(part.evidence[place].argmax(), part.evidence[place].shape)
            height, width = part.evidence[place].shape
            x, y = left + (column + 0.5) / width * (right - left), top + (row + 0.5) / height * (bottom - top)
            assert np.hypot(300 * x - 300 * at[0], 200 * y - 200 * at[1]) < 70


@pytest.mark.slow
def test_a_turned_photo_is_explained_upright(models: Path, featx: Featx, tmp_path: Path) -> None:
    image = disc((300, 200), np.array([0.4, 0.35]), COLOURS["red"], np.random.default_rng(3))
    image.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    one, two = featx("explain", models / "plain.model", tmp_path, "--json").json["explanations"]
    assert one["size"] == two["size"] == [300, 200]
    assert one["evidence"] == two["evidence"]


@pytest.mark.slow
def test_both_engines_explain_alike(models: Path) -> None:
    pytest.importorskip("openvino")
    model = models / "plain.model"
    bundle = read_bundle(model)
    image = disc((300, 200), np.array([0.4, 0.35]), COLOURS["red"], np.random.default_rng(3))
    backbone, found = load_backbone(), []
    for engine in ("torch", "openvino"):
        runner = make_engine(backbone, engine=engine, device="cpu", precision="fp32", threads=1, pad=False)
        embedder = Embedder(backbone, runner)
        found.append(Explainer(bundle.scorer, bundle.class_names, embedder, 0).explain(embedder.cut(image), image.size))
    one, two = (each.parts[0].evidence for each in found)
    np.testing.assert_allclose(one, two, atol=1e-3 * np.abs(one).max())


@pytest.mark.slow
def test_what_has_no_map_says_so(models: Path, featx: Featx, tmp_path: Path) -> None:
    photo = models / "photos/red/00.png"
    done = featx("explain", models / "knn.model", photo)
    assert done.code == 2
    assert "no exact map" in done.err
    assert "Nearest neighbours count votes of whole photos" in done.err
    backbone = load_backbone("mobilenet_v3_small", weights="none")
    embedder = Embedder(backbone, make_engine(backbone, engine="torch", device="cpu", precision="fp32", pad=False))
    image = Image.open(photo)
    rng = np.random.default_rng(0)

    def scorer(kind: str, dims: int) -> Scorer:
        return Scorer(
            kind=kind, mean=np.zeros(dims), scale=np.ones(dims), n_classes=3, coef=rng.normal(size=(3, dims)),
            intercept=np.ones(3),
        )  # fmt: skip

    head = scorer("l2", embedder.embed_pixels([embedder.cut(image)])[0].shape[1])
    with pytest.raises(UsageError, match=r"no exact map.*does not end this layer with a mean over the image"):
        Explainer(head, "abc", embedder, 0).explain(embedder.cut(image), image.size)
    # Beside a layer that has one, it is named with what it adds.
    backbone = load_backbone("mobilenet_v3_small", weights="none", layers=("features.8", "penultimate"))
    embedder = Embedder(backbone, make_engine(backbone, engine="torch", device="cpu", precision="fp32", pad=False))
    sizes = [each.shape[1] for each in embedder.embed_pixels([embedder.cut(image)])]
    head = scorer("blocks_l2:" + ",".join(f"{size}*0.7071" for size in sizes), sum(sizes))
    found = Explainer(head, "abc", embedder, None).explain(embedder.cut(image), image.size)
    assert [part.layer for part in found.parts] == ["features.8"]
    assert [(each.layer, each.reason) for each in found.left_out] == [
        ("penultimate", "the network does not end this layer with a mean over the image")
    ]
    assert np.abs(found.left_out[0].adds).min() > 1e-3
    np.testing.assert_allclose(found.parts[0].adds + found.left_out[0].adds + found.intercepts, found.scores, atol=1e-4)


@pytest.mark.slow
def test_several_networks_and_views_each_add_their_maps(models: Path) -> None:
    image = Image.open(models / "photos/red/00.png")
    first, second = load_backbone(), load_backbone("squeezenet1_1", weights="none")
    options: dict[str, Any] = {"engine": "torch", "device": "cpu", "precision": "fp32", "pad": False}
    other = Embedder(second, make_engine(second, **options))
    embedder = Embedder(first, make_engine(first, **options), views=("center", "flip"), others=[other])
    seen = embedder.cut(image)
    row = np.concatenate([each[0] for each in embedder.embed_pixels([seen])])
    rng = np.random.default_rng(0)
    for kind in ("blocks_l2:1280*0.6000,512*0.8000", "centre_l2", "power_l2"):
        head = Scorer(
            kind=kind, mean=rng.normal(size=1792), scale=np.ones(1792), n_classes=3, coef=rng.normal(size=(3, 1792)),
            intercept=rng.normal(size=3),
        )  # fmt: skip
        found = Explainer(head, "abc", embedder, None).explain(seen, image.size)
        names = ["efficientnet_lite0/penultimate"] * 2 + ["squeezenet1_1/penultimate"]
        assert [part.layer for part in found.parts] == names
        assert [part.view for part in found.parts] == ["center", "flip", "center"]
        own = head.scores(row[None])[0]
        total = sum(part.adds for part in found.parts) + found.intercepts
        np.testing.assert_allclose(total, own - own.mean(), atol=1e-4)
        assert ("root" in found.note) == (kind == "power_l2")

    # A root of what is partly less than nothing is not shared out.
    class Signed(Engine):
        name, device, precision, batch_size = "torch", "cpu", "fp32", 4

        def embed(self, batches: Any) -> Any:
            for batch in batches:
                yield (batch.astype(np.float32).mean(axis=(1, 2)) - 90,)

        def maps(self, batch: Any) -> Any:
            whole = batch.astype(np.float32) - 90
            return [(whole.mean(axis=(1, 2)), [whole])]

    signed = Embedder(first, Signed())
    three: dict[str, Any] = {"mean": np.zeros(3), "scale": np.ones(3), "coef": np.eye(3), "intercept": np.zeros(3)}
    assert Explainer(Scorer("l2", n_classes=3, **three), "abc", signed, 0).explain(signed.cut(image), image.size).parts
    with pytest.raises(UsageError, match="partly less than nothing"):
        Explainer(Scorer("power_l2", n_classes=3, **three), "abc", signed, 0).explain(signed.cut(image), image.size)


@pytest.mark.slow
def test_maps_that_do_not_add_up_are_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models / "plain.model"
    bundle = read_bundle(model)
    embedder = open_embedder(bundle, model)
    explainer = Explainer(bundle.scorer, bundle.class_names, embedder, 0)
    image = Image.open(models / "photos/red/00.png")
    real = explainer.explain(embedder.cut(image), image.size).rounding
    assert real < 1e-6
    monkeypatch.setattr("featx.models.explain.EXACT", real / 2)
    with pytest.raises(MismatchError, match="the maps do not add up to the score"):
        explainer.explain(embedder.cut(image), image.size)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_and_the_pictures(models: Path, featx: Featx, tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "in", ["<b>&", "b"], each=1)
    (folder / "b" / "bad.png").write_bytes(b"no picture")
    for each in folder.rglob("0*.png"):
        each.rename(each.with_name("same.png"))
    page, pictures = tmp_path / "why.html", tmp_path / "pictures"
    done = featx("explain", models / "several.model", folder, "--html", page, "--png", pictures, "--json")
    assert done.code == 3
    assert [each["id"] for each in done.json["refused"]] == [str(folder / "b" / "bad.png")]
    assert sorted(path.name for path in pictures.iterdir()) == ["same-2.why.png", "same.why.png"]
    assert done.json["pictures"] == [str(pictures / name) for name in ("same.why.png", "same-2.why.png")]
    with Image.open(pictures / "same.why.png") as picture:
        assert picture.size == (3 * 448 + 2 * 8, 336 + 28)  # 40 x 30 pixels, three times, below a line of text
    text = page.read_text()
    assert text.count("<figure>") == 6
    assert "<b>&/" not in text
    assert "&lt;b&gt;&amp;" in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    for each in done.json["explanations"]:
        assert f"evidence for {each['runner_up']}" in text
        for about in each["evidence"]:
            assert f"{about['score']:+.4f}" in text
    again = featx("explain", models / "plain.model", folder / "b/same.png", "--html", page)
    assert again.code == 0
    label, _, other, ahead, inside, outside = again.out.strip().split("\t")[1:]
    assert {label, other} <= set(COLOURS)
    assert float(ahead) >= 0
    assert math.isfinite(float(inside) + float(outside))
    precious = tmp_path / "mine.html"
    precious.write_text("<p>mine</p>")
    assert featx("explain", models / "plain.model", folder / "b/same.png", "--html", precious).code == 2
    assert precious.read_text() == "<p>mine</p>"


@pytest.mark.slow
def test_errors_are_objects_with_json(models: Path, featx: Featx) -> None:
    done = featx("explain", models / "knn.model", models / "photos/red/00.png", "--json")
    assert done.code == 2
    assert "no exact map" in json.loads(done.out)["error"]
