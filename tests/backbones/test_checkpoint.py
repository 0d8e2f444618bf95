"""Checkpoints as people have them: wrapped, prefixed, of other class counts, of other networks, or no checkpoint."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn

from featx.backbones.backbone import load_backbone
from featx.errors import WeightsError

State = OrderedDict[str, Tensor]
SMALL = "shufflenet_v2_x0_5"


def _model(name: str = SMALL, classes: int = 1000) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: nn.Module = tv.get_model(name, weights=None, num_classes=classes)
    # Running statistics of their own, so that a checkpoint that lost them would show.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)  # type: ignore[arg-type]
    return model


def _prefixed(state: State, prefix: str) -> State:
    return OrderedDict((prefix + key, value) for key, value in state.items())


def _same_body(path: Path, model: nn.Module, name: str = SMALL) -> None:
    loaded = load_backbone(name, weights=path).network().body.state_dict()
    expected = model.state_dict()
    assert loaded and all(torch.equal(value, expected[key]) for key, value in loaded.items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"state_dict": _prefixed(state, "module.")},
        lambda state: _prefixed(state, "module.model."),
        lambda state: _prefixed(state, "model.backbone."),
        lambda state: {**_prefixed(state, "backbone."), "projector.0.weight": torch.zeros(3)},
        lambda state: _prefixed(state, "_orig_mod."),
        lambda state: {k: v for k, v in state.items() if not k.startswith("fc.")},
        lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
        lambda state: {**{k: v for k, v in state.items() if k != "fc.bias"}, "fc.1.weight": torch.zeros(5, 1024)},
    ],
)
def test_wrappings_that_are_undone(tmp_path: Path, wrap: Callable[[State], Any]) -> None:
    model = _model()
    torch.save(wrap(OrderedDict(model.state_dict())), tmp_path / "mine.pt")
    _same_body(tmp_path / "mine.pt", model)


def test_another_number_of_classes_is_no_matter(tmp_path: Path) -> None:
    model = _model(classes=7)
    torch.save(model.state_dict(), tmp_path / "seven.pth")
    _same_body(tmp_path / "seven.pth", model)


def test_data_parallel_and_layer_versions(tmp_path: Path) -> None:
    # MNASNet converts by the version that a state dict carries beside its names; a prefix must not lose it.
    model = _model("mnasnet0_5")
    torch.save(nn.DataParallel(model).state_dict(), tmp_path / "parallel.pth")
    _same_body(tmp_path / "parallel.pth", model, "mnasnet0_5")


def test_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = _model()
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    _same_body(tmp_path / "mine.safetensors", model)


def test_the_old_spelling_of_densenet(tmp_path: Path) -> None:
    model = _model("densenet121")
    old = {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))([12])", r"\1.\2", k): v for k, v in model.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet121.pth")
    _same_body(tmp_path / "densenet121.pth", model, "densenet121")


def test_auxiliary_classifiers_are_left_out(tmp_path: Path) -> None:
    model = tv.googlenet(weights=None, aux_logits=True, init_weights=False)
    torch.save(model.state_dict(), tmp_path / "googlenet.pth")
    _same_body(tmp_path / "googlenet.pth", model, "googlenet")


def test_timms_spelling_of_the_default_network(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("tf_efficientnet_lite0", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "tuned.pth")
    _same_body(tmp_path / "tuned.pth", model, "efficientnet_lite0")


def test_a_file_for_a_timm_model(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("resnet10t", num_classes=4)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "tuned.pth")
    _same_body(tmp_path / "tuned.pth", model, "timm:resnet10t")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (SMALL, lambda: _without("conv5.0.weight"), r"does not fill .*: 1 of \d+ .*missing \(conv5.0.weight\)"),
        ("resnet18", lambda: _model("resnet34").state_dict(), "another network than resnet18: .* not known to it"),
        ("resnet34", lambda: _model("resnet18").state_dict(), r"does not fill resnet34: \d+ of 218 weights"),
        (SMALL, lambda: _model("shufflenet_v2_x1_0").state_dict(), "another network .*differs in shape: expected"),
        ("resnet18", lambda: _model(SMALL).state_dict(), "another network than resnet18"),
        ("efficientnet_lite0", lambda: _lite("efficientnet_lite1"), "another network than efficientnet_lite0"),
        (SMALL, lambda: _model(), "not a file of weights alone.*model.state_dict"),
        (SMALL, lambda: {"epoch": 3}, "holds no weights: expected a mapping of names to tensors, found dict"),
        (SMALL, lambda: torch.zeros(3), "holds no weights: .*found Tensor"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_in_a_sentence(
    tmp_path: Path, name: str, content: Callable[[], Any], says: str
) -> None:
    torch.save(content(), tmp_path / "mine.pth")
    with pytest.raises(WeightsError, match=says) as caught:
        load_backbone(name, weights=tmp_path / "mine.pth").network()
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'mine.pth'}: ") and len(text) < 500 and "\n" not in text


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"\xff\xd8\xff\xe0 a photo", b"PK\x03\x04 a broken zip"])
def test_files_that_are_no_weights(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"mine.{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"cannot be read as weights|not a file of weights alone"):
        load_backbone(SMALL, weights=path).network()


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "was_here",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="could run code"):
        load_backbone(SMALL, weights=tmp_path / "evil.pth").network()
    assert not (tmp_path / "was_here").exists()


def _without(key: str) -> State:
    state: State = OrderedDict(_model().state_dict())
    del state[key]
    return state


def _lite(name: str) -> dict[str, Tensor]:
    from featx.backbones.catalogue import NETWORKS, WEIGHTS
    from featx.backbones.frozen import catalogue_body

    return dict(catalogue_body(NETWORKS[name], WEIGHTS[NETWORKS[name].default].preprocess).state_dict())
