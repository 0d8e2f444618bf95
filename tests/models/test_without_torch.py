"""Models that hold their network: predicted and served where neither torch nor weights are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Featx

from featx.backbones.engines.graph import Graph
from featx.errors import BundleError
from featx.models import read_bundle, write_bundle
from featx.models.bundle import bundle_bytes, parse_bundle

pytestmark = pytest.mark.slow
pytest.importorskip("openvino")

SMALL = ("--backbone", "shufflenet_v2_x0_5", "--weights", "none", "--precision", "fp32")
ABSENT = ("torch", "torchvision", "timm", "efficientnet", "huggingface", "nncf", "onnx", "functorch", "featx")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(photos: Path, featx: Featx, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a store of 24 photos, a model that holds its network, and one that does not."""
    here = tmp_path_factory.mktemp("without")
    for kind in ("ants", "bees"):
        (here / "photos" / kind).mkdir(parents=True)
        for path in sorted((photos / "hymenoptera" / "train" / kind).iterdir())[:12]:
            (here / "photos" / kind / path.name).symlink_to(path)
    assert featx("extract", here / "photos", "--out", here / "a.featx", *SMALL).code == 0
    for name, options in (("whole", ()), ("bare", ("--without-network",))):
        assert featx("fit", here / "a.featx", "--out", here / f"{name}.model", "--head", "ridge", *options).code == 0
    return here


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A Python that finds all that is installed but torch, weights and what belongs to them."""
    site = tmp_path_factory.mktemp("site")
    for entry in Path(np.__file__).parents[1].iterdir():
        if not entry.name.lower().startswith(("_", *ABSENT)) or entry.name.startswith("_cffi"):
            (site / entry.name).symlink_to(entry)
    (site / "featx").symlink_to(ROOT / "featx")
    code = f"import sys; sys.path[:0] = [{str(site)!r}]; from featx.cli.main import main; sys.argv[0] = 'featx'; main()"
    return [sys.executable, "-I", "-S", "-c", code]


def ask(python: list[str], cache: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "FEATX_CACHE": str(cache)}
    return subprocess.run(
        [*python, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=120, check=False
    )


def test_predictions_need_neither_torch_nor_weights(
    folder: Path, bare_python: list[str], featx: Featx, tmp_path: Path
) -> None:
    done = ask(bare_python, tmp_path, "predict", folder / "whole.model", folder / "photos", "--json")
    assert done.returncode == 0, done.stderr
    expected = featx("predict", folder / "bare.model", folder / "photos", "--json").json["predictions"]
    found = json.loads(done.stdout)["predictions"]
    assert [each["id"] for each in found] == [each["id"] for each in expected]
    for one, two in zip(found, expected, strict=True):
        assert one["label"] == two["label"]
        assert one["score"] == pytest.approx(two["score"], abs=1e-6)
    explained = ask(bare_python, tmp_path, "explain", folder / "whole.model", next((folder / "photos").rglob("*.jpg")))
    assert explained.returncode == 0, explained.stderr
    assert not (tmp_path / "openvino").exists()  # nothing was converted


def test_without_it_an_error_says_what_is_missing(folder: Path, bare_python: list[str], tmp_path: Path) -> None:
    photo = next((folder / "photos").rglob("*.jpg"))
    for arguments in (("bare.model", photo), ("whole.model", photo, "--engine", "torch")):
        done = ask(bare_python, tmp_path, "predict", folder / arguments[0], *arguments[1:])
        assert done.returncode == 2, done.stderr
        assert "torch is not installed" in done.stderr and "Traceback" not in done.stderr


def test_a_network_that_does_not_belong_is_refused(folder: Path) -> None:
    bundle = read_bundle(folder / "whole.model")
    (sha256,) = bundle.graphs.values()
    other = Graph.of(b"<net/>", b"")
    for changes, message in [
        ({"graphs": {}}, "a network does not belong in it"),
        ({"networks": {}}, "a network is missing"),
        ({"graphs": {"resnet18": sha256}}, "a network is of none of its backbones"),
        ({"networks": {sha256: other.content}}, "is damaged"),
    ]:
        with pytest.raises(BundleError, match=message):
            parse_bundle(bundle_bytes(replace(bundle, **changes)), Path("a.model"))  # type: ignore[arg-type]


def test_another_network_does_not_pass_as_its_own(folder: Path, featx: Featx, tmp_path: Path) -> None:
    bundle = read_bundle(folder / "whole.model")
    graph = Graph.parse(next(iter(bundle.networks.values())))
    assert graph is not None
    noise = np.random.default_rng(0).integers(0, 64, len(graph.constants), dtype=np.uint8).tobytes()
    kept = len(graph.constants) // 2
    for constants, message in (
        (noise, "the graph of a network cannot be read"),
        (graph.constants[:kept] + bytes(4096) + graph.constants[kept + 4096 :], "does not see the model's probe image"),
    ):
        forged = Graph.of(graph.description, constants)
        graphs = {"shufflenet_v2_x0_5": forged.sha256}
        model = replace(bundle, networks={forged.sha256: forged.content}, graphs=graphs)
        path = write_bundle(model, tmp_path / "forged.model")
        ran = featx("predict", path, next((folder / "photos").rglob("*.jpg")))
        assert ran.code == 2
        assert message in ran.err


def test_a_model_of_ones_own_weights_needs_them_no_more(folder: Path, featx: Featx, tmp_path: Path) -> None:
    import torch
    from torchvision.models import shufflenet_v2_x0_5

    torch.manual_seed(0)
    weights = tmp_path / "own.pth"
    torch.save(shufflenet_v2_x0_5(weights=None).state_dict(), weights)
    store = tmp_path / "own.featx"
    options = ("--backbone", "shufflenet_v2_x0_5", "--weights", weights, "--precision", "fp32")
    assert featx("extract", folder / "photos", "--out", store, *options).code == 0
    fit = featx("fit", store, "--out", tmp_path / "own.model", "--head", "ridge", "--weights", weights)
    assert fit.code == 0, fit.err
    weights.unlink()
    ran = featx("predict", tmp_path / "own.model", folder / "photos", "--json")
    assert ran.code == 0, ran.err
