"""Networks of the user's own: the protocol, when their code runs, and what a store keeps of them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Featx, class_folders
from PIL import Image
from torch import nn

import featx
from featx.backbones.backbone import load_backbone
from featx.backbones.provider import Provider, import_provider, is_own
from featx.errors import MismatchError, UsageError, WeightsError
from featx.images.pixels import Preprocess, resize_crop
from featx.store.manifest import FINGERPRINTED, check_same, fingerprint

CODE = (featx.backbones.provider.__doc__ or "").split("::\n\n")[1].split("\n\nFrom here on")[0]
"""The example of the documentation, which is the toy of these tests."""


@pytest.fixture
def plankton(tmp_path: Path) -> Iterator[Path]:
    """plankton.py and its weights."""
    file = tmp_path / "plankton.py"
    file.write_text("\n".join(line.removeprefix("    ") for line in CODE.splitlines()) + "\n")
    torch.manual_seed(0)
    torch.save(_body().state_dict(), tmp_path / "plankton.pth")
    yield file
    sys.modules.pop("plankton", None)


def _body() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2))


def test_the_documented_example_is_short(plankton: Path) -> None:
    assert len([line for line in plankton.read_text().splitlines() if line.strip()]) <= 10


def test_a_network_of_ones_own_embeds_as_plain_torch_does(plankton: Path) -> None:
    provider = import_provider(f"{plankton}:Plankton")
    backbone = load_backbone(provider, layers=["penultimate", "0"])
    weights = plankton.with_name("plankton.pth")
    assert backbone.name == "plankton:Plankton"
    assert backbone.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert backbone.provenance()["code_sha256"] == hashlib.sha256(plankton.read_bytes()).hexdigest()
    images = torch.randn(2, 3, 64, 64)
    body = _body()
    body.load_state_dict(torch.load(weights, weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(backbone.network()(images)[0], body(images).mean((2, 3)))
        torch.testing.assert_close(backbone.network()(images)[1], body[0](images).mean((2, 3)))


def test_without_weights_it_is_a_seeded_control(plankton: Path) -> None:
    provider = import_provider(f"{plankton}:Plankton")
    first, again, other = (load_backbone(provider, weights="none", random_state=seed) for seed in (3, 3, 4))
    assert first.weights_sha256 == again.weights_sha256 != other.weights_sha256


def test_weights_that_build_brings_along_are_known_by_their_values() -> None:
    class Fixed(Provider):
        preprocess = Preprocess(8, (8, 8), "bilinear", (0.5,) * 3, (0.5,) * 3)
        scale = 1.0

        def build(self) -> nn.Module:
            body = nn.Conv2d(3, 4, 3)
            nn.init.constant_(body.weight, self.scale)
            return body

    one, same, two = Fixed(), Fixed(), Fixed()
    two.scale = 2.0
    shas = [load_backbone(each).weights_sha256 for each in (one, same, two)]
    assert shas[0] == shas[1] != shas[2]
    assert load_backbone(one).weights == "default"
    with pytest.raises(UsageError, match=r"build\(\) of this network brings its weights along"):
        load_backbone(one, weights="none")


def test_the_classification_layer_is_taken_off() -> None:
    class Classifier(Provider):
        preprocess = Preprocess(8, (8, 8), "bilinear", (0.5,) * 3, (0.5,) * 3)
        classifier = "3"

        def build(self) -> nn.Module:
            return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))

    assert load_backbone(Classifier()).network()(torch.zeros(2, 3, 8, 8))[0].shape == (2, 4)


def test_names_that_are_foreign_code_are_never_imported_from_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"imported {name}"))
    for name in ("os:system", "plankton.py:Plankton", "antigravity:x"):
        assert is_own(name)
        with pytest.raises(UsageError, match="no backbone"):
            load_backbone(name)
    assert not any(map(is_own, ("timm:resnet18", "torchvision:resnet18", "resnet18")))


def test_code_decides_the_fingerprint_only_where_there_is_some() -> None:
    # What stores without it have, computed as it was before networks of one's own existed.
    provenance = {"backbone": "efficientnet_lite0", "layers": ["penultimate"]}
    old = json.dumps({name: provenance.get(name) for name in FINGERPRINTED}, sort_keys=True, separators=(",", ":"))
    assert fingerprint(provenance) == hashlib.sha256(old.encode()).hexdigest()
    mine = {**provenance, "code_sha256": "a"}
    assert len({fingerprint(each) for each in (provenance, mine, {**mine, "code_sha256": "b"})}) == 3
    with pytest.raises(MismatchError, match="another code_sha256"):
        check_same(mine, {**mine, "code_sha256": "b"}, Path("s.featx"))


@pytest.mark.parametrize(
    ("code", "name", "says"),
    [
        ("", "Plankton", "no 'Plankton' in it"),
        ("from featx import Provider\nclass Planktom(Provider): ...", "Plankton", "Did you mean Planktom?"),
        ("1 / 0", "Plankton", r"cannot be imported: found ZeroDivisionError: division by zero \(mine.py, line 1\)"),
        ("def broken(:", "x", "cannot be imported: found SyntaxError"),
        ("import qqqq", "x", "cannot be imported: found ModuleNotFoundError: No module named 'qqqq'"),
        ("Plankton = 3", "Plankton", "is not a network that featx can use.*found int"),
        ("class Plankton: ...", "Plankton", "is not a network that featx can use.*found Plankton"),
        ("def f(a): ...", "f", r"cannot be made: found TypeError: f\(\) missing"),
        ("from featx import Provider\nclass P(Provider): ...", "P", "does not say how its images are prepared"),
    ],
)
def test_mistakes_in_ones_own_code_are_sentences(tmp_path: Path, code: str, name: str, says: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(code)
    try:
        with pytest.raises(UsageError, match=says):
            import_provider(f"{file}:{name}")
    finally:
        sys.modules.pop("mine", None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nowhere.py:Net", "no such file"),
        ("no_such_module:Net", "no module 'no_such_module'. A file is named FILE.py:CLASS"),
        ("tim:resnet18", "no module 'tim'. Did you mean timm?"),
        ("json:Net", "json: no 'Net' in it"),
    ],
)
def test_names_that_lead_nowhere(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        import_provider(text)


def test_a_file_cannot_take_the_name_of_another_module(tmp_path: Path) -> None:
    for name in ("json", "wave"):  # one is loaded, the other is not
        (tmp_path / f"{name}.py").write_text("x = 1")
        with pytest.raises(UsageError, match=r"another module has this name.*Rename the file"):
            import_provider(f"{tmp_path / name}.py:Net")


@pytest.mark.parametrize(
    ("body", "says"),
    [("3", "build.. does not return a network.*found int"), ("1 / 0", r"cannot be built: found ZeroDivisionError")],
)
def test_a_network_that_cannot_be_built(body: str, says: str) -> None:
    class Broken(Provider):
        preprocess = Preprocess(8, (8, 8), "bilinear", (0.5,) * 3, (0.5,) * 3)

        def build(self) -> nn.Module:
            return eval(body)  # type: ignore[no-any-return]

    with pytest.raises(UsageError, match=says):
        load_backbone(Broken())


def test_a_network_without_build() -> None:
    class Empty(Provider):
        preprocess = Preprocess(8, (8, 8), "bilinear", (0.5,) * 3, (0.5,) * 3)

    with pytest.raises(UsageError, match=r"Empty: the network has no method build: expected build\(self\)"):
        load_backbone(Empty())


def test_weights_that_do_not_fit(plankton: Path, tmp_path: Path) -> None:
    torch.save({"0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="another network than Plankton"):
        load_backbone(import_provider(f"{plankton}:Plankton"), weights=tmp_path / "other.pth").network()
    plankton.with_name("plankton.pth").unlink()
    with pytest.raises(WeightsError, match="no such weights file"):
        load_backbone(import_provider(f"{plankton}:Plankton"))


@pytest.mark.slow
def test_on_the_command_line_it_is_a_backbone_like_any_other(featx: Featx, plankton: Path, tmp_path: Path) -> None:
    class_folders(tmp_path / "photos", each=6)
    mine = ("--backbone", "plankton.py:Plankton", "--engine", "torch")
    here = {"cwd": tmp_path}
    done = featx("extract", "photos", "--out", "s.featx", *mine, "--json", **here)
    assert done.code == 0, done.err
    assert done.json["backbone"] == "plankton:Plankton"
    image = Image.open(tmp_path / "photos" / "ants" / "000.png").convert("RGB")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "new.png")

    # A store names code, and nobody runs it for that.
    refused = featx("search", "s.featx", "new.png", **here)
    assert refused.code == 2
    assert "made with a network of your own, whose code runs only when you name it" in refused.err
    found = featx("search", "s.featx", "new.png", "-k", "1", *mine, "--json", **here)
    assert found.code == 0, found.err
    assert found.json["results"][0]["matches"][0]["id"].startswith("ants/")

    fitted = featx("fit", "s.featx", "--out", "m.model", "--head", "ridge", *mine, **here)
    assert fitted.code == 0, fitted.err
    assert "whose code runs only when you name it" in featx("predict", "m.model", "new.png", **here).err
    said = featx("predict", "m.model", "new.png", *mine, "--json", **here)
    assert said.code == 0, said.err
    assert said.json["predictions"][0]["label"] in ("ants", "bees")

    plankton.write_text(plankton.read_text().replace("32, 3, 2", "32, 3, 1"))
    changed = featx("search", "s.featx", "new.png", *mine, **here)
    assert changed.code == 2 and "another code_sha256" in changed.err


@pytest.mark.slow
def test_openvino_runs_it_too(plankton: Path) -> None:
    from featx.backbones.engines.choice import make_engine

    backbone = load_backbone(import_provider(f"{plankton}:Plankton"))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pixels = resize_crop(Image.fromarray(noise), backbone.preprocess)[None]
    pytest.importorskip("openvino")
    found = [
        next(iter(make_engine(backbone, engine=name, device="cpu", batch_size=1).embed([pixels])))[0]
        for name in ("torch", "openvino")
    ]
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


def test_a_network_that_openvino_cannot_take_is_for_torch() -> None:
    from featx.backbones.engines.choice import make_engine

    class Deciding(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))

    class Own(Provider):
        preprocess = Preprocess(8, (8, 8), "bilinear", (0.5,) * 3, (0.5,) * 3)

        def build(self) -> nn.Module:
            return Deciding()

    pytest.importorskip("openvino")
    backbone = load_backbone(Own())
    with pytest.raises(UsageError, match=r"cannot be converted for OpenVINO.*Use --engine torch"):
        make_engine(backbone, engine="openvino", device="cpu", batch_size=1)
    black = np.zeros((1, 8, 8, 3), np.uint8)
    (found,) = next(iter(make_engine(backbone, engine="torch", device="cpu", batch_size=1).embed([black])))
    assert np.array_equal(found, [[-1, -1, -1]])
