"""Engines against plain torch with the weights' own transforms, and what they promise about order and batches."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.models as tv
from enginekit import ON_CPU, Array, cosines, on_cpu, random_batches, small
from imagekit import pixels
from numpy.typing import NDArray
from PIL import Image, ImageOps

from featx._system import available_cpus
from featx.backbones.backbone import Backbone, load_backbone
from featx.backbones.catalogue import NETWORKS
from featx.backbones.checkpoint import load_checkpoint
from featx.backbones.engines import choice as engines
from featx.backbones.engines.base import sizes_of
from featx.backbones.engines.choice import BATCH_SIZES, make_engine
from featx.backbones.engines.torch import TorchEngine
from featx.backbones.frozen import catalogue_body
from featx.backbones.provider import Provider
from featx.errors import UsageError
from featx.images.pixels import Preprocess

__all__ = ["small"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")


# The same embeddings as plain torch


@pytest.fixture(scope="session")
def files() -> list[bytes]:
    """48 real photos where there are some; else scikit-learn's two and pictures made here, in several shapes."""
    folder = os.environ.get("FEATX_PHOTOS")
    if folder:
        paths = sorted(Path(folder).rglob("*.jp*g"))
        chosen = np.random.default_rng(0).choice(len(paths), 48, replace=False)
        return [paths[i].read_bytes() for i in chosen]
    from sklearn.datasets import load_sample_images

    pictures = [Image.fromarray(image) for image in load_sample_images().images]
    generator = np.random.default_rng(0)
    for size in [(500, 375), (375, 500), (640, 240), (224, 224), (60, 90), (1000, 900)]:
        noise = Image.fromarray(generator.integers(0, 256, (7, 9, 3), dtype=np.uint8))
        pictures.append(noise.resize(size, Image.Resampling.BICUBIC))
    result = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90)
        result.append(file.getvalue())
    return result


def _plain_torch(model: torch.nn.Module, transform: Callable[[Image.Image], torch.Tensor], files: list[bytes]) -> Array:
    rows = []
    with torch.no_grad():
        for data in files:
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
            rows.append(model.eval()(transform(image)[None])[0].numpy())
    return np.stack(rows)


@pytest.fixture(scope="session")
def lite0(files: list[bytes]) -> tuple[Backbone, Array]:
    """The default backbone, and what timm and its own transform make of the files."""
    import timm.data

    backbone = load_backbone()
    assert backbone.file is not None
    model: Any = catalogue_body(NETWORKS[backbone.name], backbone.preprocess)
    load_checkpoint(model, backbone.file, network=backbone.name, classifiers=())
    model.reset_classifier(0)
    data: Any = timm.data
    return backbone, _plain_torch(model, data.create_transform(**data.resolve_model_data_config(model)), files)


@pytest.fixture(scope="session")
def mobilenet(files: list[bytes]) -> tuple[Backbone, Array]:
    """torchvision's MobileNetV2 from its file, and what torchvision with the weights' own transform makes of them."""
    file = os.environ.get("FEATX_MOBILENET_WEIGHTS")
    if not file:
        pytest.skip("FEATX_MOBILENET_WEIGHTS does not name the file mobilenet_v2-b0353104.pth")
    model = tv.mobilenet_v2()
    model.load_state_dict(torch.load(file, weights_only=True))
    model.classifier = torch.nn.Identity()
    transform = tv.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    return load_backbone("mobilenet_v2", weights=file), _plain_torch(model, transform, files)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lite0", "mobilenet"])
@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.9999), ("bf16", 0.999)])
@pytest.mark.parametrize("engine", ON_CPU)
def test_embeddings_are_those_of_plain_torch(
    request: pytest.FixtureRequest, files: list[bytes], name: str, engine: str, precision: str, least: float
) -> None:
    backbone, expected = request.getfixturevalue(name)
    images = np.stack([pixels(data, backbone.preprocess) for data in files])
    batches = [images[i : i + 16] for i in range(0, len(images), 16)]
    found = np.concatenate([result[0] for result in on_cpu(backbone, engine, precision, 16).embed(batches)])
    assert found.dtype == np.float32 and found.shape == expected.shape == (len(files), 1280)
    assert cosines(found, expected).min() >= least
    # Not only the direction: heads that do not normalise see the lengths.
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(expected, axis=1), rtol=0.03)


@pytest.mark.slow
@pytest.mark.skipif(not engines._installed("openvino"), reason="no openvino")
def test_several_layers_come_in_the_order_asked() -> None:
    # conv1.1 is followed by a ReLU that works in place, which a converter could fold into it.
    layers = ["stage3", "penultimate", "conv1.1", "conv1"]
    backbone = load_backbone("shufflenet_v2_x0_5", weights="none", layers=layers)
    (batch,) = random_batches(backbone, 3)
    (expected,) = on_cpu(backbone, "torch").embed([batch])
    (found,) = on_cpu(backbone, "openvino").embed([batch])
    assert [layer.shape for layer in found] == [(3, 96), (3, 1024), (3, 24), (3, 24)]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert not np.allclose(found[2], found[3])


@pytest.mark.slow
@pytest.mark.skipif(not engines._installed("openvino"), reason="no openvino")
@pytest.mark.parametrize(
    ("name", "layer"), [("swin_t", "features.3"), ("timm:vit_tiny_patch16_224", "norm"), ("timm:test_resnet", "layer2")]
)
def test_transformers_and_timm_convert(name: str, layer: str) -> None:
    backbone = load_backbone(name, weights="none", layers=["penultimate", layer])
    (batch,) = random_batches(backbone, 2)
    (expected,) = on_cpu(backbone, "torch", batch_size=2).embed([batch])
    (found,) = on_cpu(backbone, "openvino", batch_size=2).embed([batch])
    for a, b in zip(found, expected, strict=True):
        assert cosines(a, b).min() > 0.99999


# Order, batches, threads


@pytest.mark.slow
@pytest.mark.parametrize("engine", ON_CPU)
def test_an_embedding_does_not_depend_on_its_company(engine: str, small: Backbone) -> None:
    running = on_cpu(small, engine)
    (four,) = random_batches(small, 4)
    ((together,),) = running.embed([four])
    alone = [result[0] for result in running.embed([four[3:], four[:3], four[::-1], four[1:2]])]
    np.testing.assert_array_equal(alone[0], together[3:])
    np.testing.assert_array_equal(alone[1], together[:3])
    np.testing.assert_array_equal(alone[2], together[::-1])
    np.testing.assert_array_equal(alone[3], together[1:2])
    assert len(np.unique(together, axis=0)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("engine", ON_CPU)
def test_results_come_in_order_and_little_is_taken_ahead(engine: str, small: Backbone) -> None:
    running = on_cpu(small, engine)
    batches = random_batches(small, 4, 1, 3, 4, 2, 4, 1)
    taken = 0

    def source() -> Iterator[NDArray[np.uint8]]:
        nonlocal taken
        for batch in batches:
            taken += 1
            yield batch

    ahead, found = [], []
    for (result,) in running.embed(source()):
        found.append(result)
        ahead.append(taken - len(found))
    assert [len(result) for result in found] == [len(batch) for batch in batches]
    assert max(ahead) <= 2
    for batch, result in zip(batches, found, strict=True):
        np.testing.assert_array_equal(next(running.embed([batch]))[0], result)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ON_CPU)
def test_an_engine_survives_a_consumer_that_stops_and_a_source_that_fails(engine: str, small: Backbone) -> None:
    running = on_cpu(small, engine)
    batches = random_batches(small, 4, 4, 4, 4)
    (expected,) = next(running.embed(batches[:1]))
    early: Any = running.embed(batches)
    next(early)
    early.close()

    def failing() -> Iterator[NDArray[np.uint8]]:
        yield batches[1]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(running.embed(failing()))
    np.testing.assert_array_equal(next(running.embed(batches[:1]))[0], expected)
    assert list(running.embed([])) == []


@pytest.mark.parametrize("engine", ON_CPU)
def test_results_are_the_callers_own(engine: str, small: Backbone) -> None:
    running = on_cpu(small, engine)
    batches = random_batches(small, 2, 2, 2, 2)
    results = [result[0] for result in running.embed(batches)]
    kept = [result.copy() for result in results]
    for result in results[:2]:
        result[:] = -1
    list(running.embed(batches))
    np.testing.assert_array_equal(results[3], kept[3])


@pytest.mark.parametrize("engine", ON_CPU)
@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((5, 224, 224, 3), np.uint8),
        np.zeros((0, 224, 224, 3), np.uint8),
        np.zeros((2, 224, 200, 3), np.uint8),
        np.zeros((2, 3, 224, 224), np.uint8),
        np.zeros((2, 224, 224, 3), np.float32),
    ],
)
def test_batches_of_another_shape_are_refused(engine: str, small: Backbone, batch: Array) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(1..4, 224, 224, 3\)"):
        list(on_cpu(small, engine).embed([batch]))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ON_CPU)
def test_threads_can_share_an_engine(engine: str, small: Backbone) -> None:
    running = on_cpu(small, engine, batch_size=1)
    batches = random_batches(small, *[1] * 6)
    expected = [result[0] for result in running.embed(batches)]
    found: dict[int, list[Array]] = {}

    def work(number: int) -> None:
        found[number] = [result[0] for result in running.embed(batches)]

    workers = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(found) == [0, 1, 2]
    for results in found.values():
        np.testing.assert_array_equal(results, expected)


# Choosing


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"engine": "openvino", "device": "cuda"}, "openvino runs on the CPU. Use --engine torch"),
        ({"device": "cuda"}, "torch finds no CUDA device here. Use --device cpu"),
        ({"precision": "fp16"}, "fp16 is for CUDA. On a CPU use fp32 or bf16"),
        (
            {"precision": "fp64"},
            "precision: not one of the choices: expected auto or fp32 or bf16 or fp16 or int8, found fp64",
        ),
        ({"engine": "onnx"}, "engine: not one of the choices"),
        ({"device": "tpu"}, "device: not one of the choices"),
        ({"batch_size": 0}, "batch size: must be 1 or more: found 0"),
        ({"batch_size": {"cpu": 2, "cuda": 0}}, "batch size: must be 1 or more: found 0"),
        ({"threads": -1}, "threads: must be 1 or more"),
    ],
)
def test_impossible_combinations(
    monkeypatch: pytest.MonkeyPatch, small: Backbone, asked: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(engines, "_cuda", lambda: False)
    with pytest.raises(UsageError, match=says):
        make_engine(small, **asked)


def test_without_openvino(monkeypatch: pytest.MonkeyPatch, small: Backbone) -> None:
    monkeypatch.setattr(engines, "_cuda", lambda: False)
    monkeypatch.setattr(engines, "_installed", lambda package: False)
    chosen = make_engine(small)
    assert (chosen.name, chosen.device, chosen.precision) == ("torch", "cpu", "fp32")
    with pytest.raises(UsageError, match=r"OpenVINO is not installed. Install it .pip install openvino., or use"):
        make_engine(small, engine="openvino")


@pytest.mark.slow
@pytest.mark.skipif(not engines._installed("openvino"), reason="no openvino")
def test_auto_is_openvino_on_a_cpu(monkeypatch: pytest.MonkeyPatch, small: Backbone) -> None:
    monkeypatch.setattr(engines, "_cuda", lambda: False)
    chosen = make_engine(small)
    assert (chosen.name, chosen.device, chosen.precision) == ("openvino", "cpu", "fp32")
    assert chosen.batch_size == BATCH_SIZES["cpu"]
    assert make_engine(small, batch_size={"cpu": 3, "cuda": 5}).batch_size == 3


def test_no_driver_means_no_torch() -> None:
    code = (
        "import sys, featx.backbones.engines.choice as e\n"
        "assert e._has_driver() or (not e._cuda() and 'torch' not in sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no CPU affinity")
def test_only_the_cpus_of_this_process_are_used() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert available_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert available_cpus() == len(before)


def test_bf16_is_not_fp32_in_disguise(small: Backbone) -> None:
    (batch,) = random_batches(small, 2)
    exact, rounded = (next(on_cpu(small, "torch", precision).embed([batch]))[0] for precision in ("fp32", "bf16"))
    assert 0 < np.abs(exact - rounded).max() < 0.05 * np.abs(exact).max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.9999), ("bf16", 0.999), ("fp16", 0.999)])
def test_cuda_agrees_with_the_cpu(precision: str, least: float) -> None:
    backbone = load_backbone()
    batches = random_batches(backbone, 4, 1, 4, 3)
    expected = np.concatenate([result[0] for result in on_cpu(backbone, "torch").embed(batches)])
    running = TorchEngine(backbone, device="cuda", precision=precision, batch_size=4)
    found = np.concatenate([result[0] for result in running.embed(batches)])
    assert cosines(found, expected).min() >= least
    np.testing.assert_array_equal(next(running.embed([batches[2][1:2]]))[0][0], found[6])


@pytest.mark.parametrize("engine", ON_CPU)
def test_short_batches_need_not_be_padded(small: Backbone, engine: str) -> None:
    padded = make_engine(small, engine=engine, device="cpu", precision="fp32", batch_size=6, threads=1)
    short = make_engine(small, engine=engine, device="cpu", precision="fp32", batch_size=6, threads=1, pad=False)
    batches = random_batches(small, 1, 6, 2, 3, 1, 5)
    for one, other in zip(padded.embed(batches), short.embed(batches), strict=True):
        assert one[0].shape == other[0].shape
        np.testing.assert_allclose(one[0], other[0], rtol=1e-4, atol=1e-5)
    assert short.batch_size == 6
    if engine == "openvino":
        assert sorted(short._compiled) == [1, 2, 4, 6]  # type: ignore[attr-defined]


def test_sizes_of_batches() -> None:
    assert sizes_of(16, pad=True) == (16,)
    assert sizes_of(16, pad=False) == (1, 2, 4, 8, 16)
    assert sizes_of(12, pad=False) == (1, 2, 4, 8, 12)
    assert sizes_of(1, pad=False) == sizes_of(1, pad=True) == (1,)


class _CountsImages(torch.nn.Module):
    """Looks at the number of its images in Python, so that it is converted for one number of them."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        count = int(images.shape[0])
        return torch.cat([images[i].mean((1, 2))[None] for i in range(count)])


class _Counting(Provider):
    preprocess = Preprocess(32, (32, 32), "bilinear", (0.5,) * 3, (0.5,) * 3)

    def build(self) -> torch.nn.Module:
        return _CountsImages()


class _AddsWhatWasWrittenOver(torch.nn.Module):
    """Not x + relu(x): the activation has written over x when it is added."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.act = torch.nn.ReLU6(inplace=inplace)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        return torch.mean(self.act(x) + x, (2, 3))


class _InPlace(_Counting):
    def __init__(self, inplace: bool) -> None:
        self.inplace = inplace

    def build(self) -> torch.nn.Module:
        return _AddsWhatWasWrittenOver(self.inplace)


@pytest.mark.slow
@pytest.mark.skipif(not engines._installed("openvino"), reason="no openvino")
def test_a_network_that_counts_its_images_is_converted_for_one_number(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path))
    backbone = load_backbone(_Counting())
    batches = random_batches(backbone, 1, 3, 4)
    for pad in (True, False):
        engine = make_engine(backbone, engine="openvino", precision="fp32", batch_size=4, threads=1, pad=pad)
        for batch, found in zip(batches, engine.embed(batches), strict=True):
            expected = (batch / 255.0 - 0.5).mean((1, 2)) / 0.5
            np.testing.assert_allclose(found[0], expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not engines._installed("openvino"), reason="no openvino")
@pytest.mark.parametrize("inplace", [True, False])
def test_what_a_network_writes_over_stays_written_over(tmp_path: Path, monkeypatch: Any, inplace: bool) -> None:
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path))
    backbone = load_backbone(_InPlace(inplace))
    (batch,) = random_batches(backbone, 3)
    (found,) = next(on_cpu(backbone, "openvino").embed([batch]))
    x = (batch / 255.0 - 0.5) / 0.5 * 2
    expected = (np.clip(x, 0, 6) + (np.clip(x, 0, 6) if inplace else x)).mean((1, 2))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert backbone.network().get_submodule("body.act").inplace == inplace
