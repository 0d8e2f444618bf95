"""Networks cut in two: both halves give what the whole gives, and a trained tail comes back as it was."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from tuningkit import small

from featx.backbones.backbone import Backbone, load_backbone
from featx.backbones.cut import Halves, Tail, Trunk, Unfreeze, blocks, cut_network, tail_bytes, tuned
from featx.backbones.engines.choice import make_engine
from featx.errors import BundleError, UsageError

FAMILIES = ["efficientnet_lite0", "mobilenet_v2", "resnet18"]


def network(name: str) -> Backbone:
    """With its weights where they come along; the halves of a random network are as good a test."""
    return load_backbone(name, weights="default" if name == "efficientnet_lite0" else "none")


def noise(backbone: Backbone, n: int = 3, seed: int = 5) -> Tensor:
    return torch.randn(n, 3, *backbone.preprocess.crop, generator=torch.Generator().manual_seed(seed))


def through(halves: Halves, images: Tensor) -> Tensor:
    assert halves.trunk is not None
    with torch.no_grad():
        out: Tensor = halves.tail(halves.trunk(images))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_tail_on_activations_gives_the_logits_of_the_whole_network(name: str) -> None:
    backbone = network(name)
    images = noise(backbone)
    head = torch.nn.Linear(1280 if name != "resnet18" else 512, 7)
    with torch.no_grad():
        expected = head(backbone.network()(images)[0])
        for unfreeze in (1, 3):
            halves = cut_network(backbone, unfreeze)
            found = head(through(halves, images))
            assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "unfreeze", "cut"),
    [
        ("efficientnet_lite0", 1, "blocks.6.0"),
        ("efficientnet_lite0", 16, "blocks.0.0"),
        ("mobilenet_v2", 2, "features.16"),
        ("resnet18", 1, "layer4.1"),
        ("densenet121", 1, "features.denseblock4"),
    ],
)
def test_the_cut_is_before_the_last_blocks(name: str, unfreeze: int, cut: str) -> None:
    backbone = network(name)
    halves = cut_network(backbone, unfreeze)
    assert halves.cut == cut
    whole = sum(p.numel() for p in backbone.network().body.parameters())
    assert 0 < halves.parameters < whole
    assert all(p.requires_grad for p in halves.tail.parameters())
    assert halves.trunk is not None
    assert not any(p.requires_grad for p in halves.trunk.parameters())
    assert halves.parameters + sum(p.numel() for p in halves.trunk.parameters()) == whole


def test_a_cut_at_the_input_takes_pixels() -> None:
    backbone = small()
    halves = cut_network(backbone, "all")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3), np.uint8)
    (expected,) = next(iter(make_engine(backbone, engine="torch", device="cpu").embed([pixels])))
    with torch.no_grad():
        found = halves.tail(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert halves.trunk is None


def test_blocks_are_what_has_two_weight_matrices() -> None:
    body = small().network().body
    names, numbered = blocks(body, "head")
    assert names == ["stem", "stages.0", "stages.1.0", "stages.1.1"]
    assert numbered == names[1:]


@pytest.mark.parametrize("unfreeze", [0, 4, 99])
def test_more_blocks_than_there_are(unfreeze: int) -> None:
    with pytest.raises(UsageError, match=f"has no {unfreeze} blocks to unfreeze: expected 1 to 3, or all"):
        cut_network(small(), unfreeze)


@pytest.mark.parametrize("name", ["googlenet"])
def test_a_network_that_is_no_chain_says_so(name: str) -> None:
    with pytest.raises(UsageError, match=r"is not a chain of modules, so it cannot be cut before .*--unfreeze all"):
        cut_network(network(name), 1)


def trained(backbone: Backbone, unfreeze: Unfreeze = 2) -> tuple[Halves, Tail]:
    """Halves, and their tail with all its numbers changed a little."""
    halves = cut_network(backbone, unfreeze)
    with torch.no_grad():
        for value in [*halves.tail.parameters(), *halves.tail.body.buffers()]:
            if value.is_floating_point():
                value.add_(0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).abs())
    return halves, halves.tail


@pytest.mark.parametrize("unfreeze", [2, "all"])
def test_a_trained_tail_comes_back(unfreeze: Unfreeze) -> None:
    backbone = small()
    images = noise(backbone)
    halves, tail = trained(backbone, unfreeze)
    data = tail_bytes(tail, halves.cut)
    again = tuned(backbone, data)
    with torch.no_grad():
        expected = tail.body(images) if halves.trunk is None else through(halves, images)
        (found,) = again.network()(images)
        (before,) = backbone.network()(images)
    torch.testing.assert_close(found, expected)
    assert (found - before).abs().max() > 1e-3
    assert again.weights_sha256 != backbone.weights_sha256
    assert tuned(backbone, data).weights_sha256 == again.weights_sha256
    assert tail_bytes(tail, halves.cut) == data


def test_the_hash_is_of_the_weights_below_too() -> None:
    backbone = small()
    other = replace(backbone, weights_sha256="0" * 64)
    halves, tail = trained(backbone)
    data = tail_bytes(tail, halves.cut)
    assert tuned(backbone, data).weights_sha256 != tuned(other, data).weights_sha256
    halves, tail = trained(backbone, "all")
    data = tail_bytes(tail, halves.cut)
    assert tuned(backbone, data).weights_sha256 == tuned(other, data).weights_sha256  # nothing is below it


def test_foreign_and_damaged_tails_are_refused() -> None:
    halves, tail = trained(small())
    data = tail_bytes(tail, halves.cut)
    with pytest.raises(BundleError, match="belongs to another network"):
        tuned(load_backbone("resnet18", weights="none"), data).network()
    header = json.dumps({"__metadata__": {"featx": json.dumps({"format": "x", "format_version": 1, "cut": ""})}})
    for bad in (b"", data[:20], data[:-1], b"\x80" * 64, struct.pack("<Q", len(header)) + header.encode()):
        with pytest.raises(BundleError, match="cannot be read"):
            tuned(small(), bad).network()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_engines_run_a_trunk(engine: str) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    backbone = small()
    halves = cut_network(backbone, 2)
    trunk = Trunk.of(backbone, halves)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 24, 24, 3), np.uint8)
    runner = make_engine(trunk, engine=engine, device="cpu", precision="fp32", batch_size=4)
    found = np.concatenate([rows for (rows,) in runner.embed([pixels[:4], pixels[4:]])])
    assert halves.trunk is not None
    with torch.no_grad():
        normalised = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        expected = halves.trunk(normalised).numpy()
    assert found.shape == (5, *halves.tail.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert trunk.provenance()["layers"] != backbone.provenance()["layers"]  # a converted trunk is not the network
