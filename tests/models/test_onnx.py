"""Whole models as ONNX: the pixels of Pillow, the answers of featx, and nothing of it needed to run them."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Featx, picture
from PIL import Image

from featx.errors import UsageError
from featx.images.pixels import Preprocess
from featx.images.views import Looks
from featx.models import open_embedder, read_bundle
from featx.models.onnx import model as whole
from featx.models.onnx.builder import Builder
from featx.models.onnx.pixels import add_pixels

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SIZES = ((20, 30), (224, 224), (500, 33), (640, 480), (480, 640), (256, 256), (7, 900), (230, 1000), (1601, 1067))


def noise(width: int, height: int) -> Image.Image:
    """The hardest picture for a filter: every pixel differs from the next."""
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("interpolation", "resize", "crop", "views"),
    [
        ("bicubic", 256, (224, 224), ("center", "flip")),
        ("bilinear", 232, (224, 224), ("center", "zoom", "top-right", "bottom-left")),
        ("lanczos", (200, 260), (200, 240), ("center", "zoom-flip")),
    ],
)
def test_the_pixels_are_pillows(interpolation: str, resize: Any, crop: tuple[int, int], views: tuple[str, ...]) -> None:
    looks = Looks(Preprocess(resize, crop, interpolation, (0, 0, 0), (1, 1, 1)), views)
    graph = Builder()
    graph.add("Identity", add_pixels(graph, "photo", looks), name="pixels")
    shape = (len(views), 3, *crop)
    running = whole.session(graph.model({"photo": (np.uint8, "hwc")}, {"pixels": (np.float32, shape)}, {}))
    for size in SIZES:
        image = noise(*size)
        (found,) = running.run(None, {"photo": np.asarray(image)})
        expected = looks.cut(image).reshape(-1, *crop, 3).transpose(0, 3, 1, 2)
        apart = np.abs(found - expected)
        assert apart.max() <= 1, (size, apart.max())  # a level, where a sum ends in a half
        assert (apart > 0).mean() < (0.02 if interpolation == "bilinear" else 1e-3), size


def test_the_whole_frame_is_pillows_but_for_a_few_pixels() -> None:
    looks = Looks(Preprocess(256, (224, 224), "bicubic", (0, 0, 0), (1, 1, 1)), ("full", "full-flip"))
    graph = Builder()
    graph.add("Identity", add_pixels(graph, "photo", looks), name="pixels")
    running = whole.session(graph.model({"photo": (np.uint8, "hwc")}, {"pixels": (np.float32, (2, 3, 224, 224))}, {}))
    for seed, size in enumerate(SIZES):
        image = picture(seed, size)
        (found,) = running.run(None, {"photo": np.asarray(image)})
        assert np.abs(found - looks.cut(image).transpose(0, 3, 1, 2)).max() <= 2, size


@pytest.fixture(scope="module")
def folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with ``photos`` of two classes: 24 of each."""
    here = tmp_path_factory.mktemp("onnx")
    for kind in ("ants", "bees"):
        (here / "photos" / kind).mkdir(parents=True)
        for path in sorted((photos / "hymenoptera" / "train" / kind).iterdir())[:24]:
            (here / "photos" / kind / path.name).symlink_to(path)
    return here


SMALL = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def at_eight_bits(folder: Path, featx: Featx) -> Path:
    """The folder, with a model at int8 and its graph in it."""
    model = folder / "int8.model"
    assert featx("extract", folder / "photos", "--out", folder / "int8.featx", "--precision", "int8").code == 0
    assert featx("fit", folder / "int8.featx", "--out", model, "--head", "ridge").code == 0
    assert featx("export", model, "--format", "onnx", "--out", folder / "int8.onnx").code == 0
    return folder


STORES = {
    "int8": ("--precision", "int8"),
    "fp32": ("--precision", "fp32"),
    "several": ("--backbone", "efficientnet_lite0", "--backbone", SMALL, "--weights", f"{SMALL}=none"),
    "layers": ("--precision", "int8", "--layer", "blocks.4", "--layer", "penultimate", "--views", "center,zoom"),
}
MODELS = {
    "int8": ("int8", "--head", "ridge"),
    "no unknown": ("int8", "--head", "ridge", "--max-unknown", "0"),
    "fp32": ("fp32", "--head", "logreg"),
    "neighbours": ("fp32", "--head", "knn"),
    "several": ("several", "--layer", "joined", "--head", "ridge"),
    "layers": ("layers", "--layer", "combined", "--head", "linear_svm"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_graph_answers_as_the_model(name: str, at_eight_bits: Path, featx: Featx) -> None:
    folder = at_eight_bits
    kind, *fitting = MODELS[name]
    store, model, out = folder / f"{kind}.featx", folder / f"{name}.model", folder / f"{name}.onnx"
    if not store.exists():
        assert featx("extract", folder / "photos", "--out", store, *STORES[kind]).code == 0
    assert featx("fit", store, "--out", model, *fitting).code == 0
    ran = featx("export", model, "--format", "onnx", "--out", out, "--check", folder / "photos", "--json")
    assert ran.code == 0, ran.err
    compared = ran.json["compared"]
    exact = kind == "fp32"
    assert compared["photos"] == 49
    assert compared["probability_gap"] < (1e-3 if exact else 0.1)
    assert compared["cosine"] > (0.99999 if exact else 0.995)
    assert compared["share_gap"] <= (0.03 if exact else 0.2)  # of 48 photos one is 0.02
    bundle = read_bundle(model)
    outputs = {output.name for output in whole.session(out.read_bytes()).get_outputs()}
    assert ("unknown" in outputs) == (bundle.familiarity is not None) == (name != "no unknown")


@pytest.mark.slow
def test_a_graph_that_answers_otherwise_is_not_written(at_eight_bits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = at_eight_bits / "int8.model"
    bundle = read_bundle(model)
    embedder = open_embedder(bundle, model)
    monkeypatch.setattr(  # another crop of the photo: the mistake that exports make
        whole, "add_pixels", lambda graph, photo, looks: add_pixels(graph, photo, Looks(looks.preprocess, ("full",)))
    )
    with pytest.raises(UsageError, match="does not answer as the model does, so it is not written"):
        whole.model_onnx(bundle, embedder, [picture(seed, (300, 90)) for seed in range(40)])


@pytest.mark.slow
def test_a_fine_tuned_model(folder: Path, tmp_path: Path, featx: Featx) -> None:
    shutil.copytree(folder / "photos", tmp_path / "photos")
    small = ("--backbone", SMALL, "--weights", "none", "--precision", "fp32")
    assert featx("extract", tmp_path / "photos", "--out", tmp_path / "a.featx", *small).code == 0
    tuned = featx("finetune", tmp_path / "a.featx", tmp_path / "photos", "--out", tmp_path / "a.model", "--epochs", 1)
    assert tuned.code == 0, tuned.err
    ran = featx(
        "export", tmp_path / "a.model", "--format", "onnx", "--out", tmp_path / "a.onnx", "--check",
        tmp_path / "photos", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.json["compared"]["probability_gap"] < 0.01
    head = featx("export", tmp_path / "a.model", "--format", "onnx", "--part", "head", "--out", tmp_path / "h.onnx")
    assert head.code == 2 and "fine-tuned" in head.err


# What the guide's fifteen lines need, and what these import themselves.
NEEDED = ("numpy", "PIL", "onnxruntime", "flatbuffers", "google", "packaging", "sympy", "mpmath")


@pytest.mark.slow
def test_the_guides_lines_run_with_three_packages(
    photos: Path, at_eight_bits: Path, featx: Featx, tmp_path: Path
) -> None:
    (code,) = re.findall(
        r"```python\n(# ask\.py\n.*?)```", files("featx").joinpath("guide/shipping.md").read_text(), re.S
    )
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) <= 16
    (tmp_path / "ask.py").write_text(code)
    site = tmp_path / "site"
    site.mkdir()
    for package in NEEDED:  # nothing else is to be found
        for entry in Path(np.__file__).parents[1].glob(f"{package}*"):
            if package != "sympy":
                (site / entry.name).symlink_to(entry)
    for libraries in Path(np.__file__).parents[1].glob("*.libs"):
        if not (site / libraries.name).exists():
            (site / libraries.name).symlink_to(libraries)
    model, out = at_eight_bits / "int8.model", at_eight_bits / "int8.onnx"
    asked = [
        *sorted((photos / "hymenoptera" / "val").rglob("*.jpg"))[::3],
        *sorted((photos / "dtd10").rglob("*.jpg"))[::40],
    ]
    command = [sys.executable, "-I", "-S", "-c",
               f"import sys; sys.path[:0] = [{str(site)!r}]; sys.argv.pop(0); exec(open(sys.argv[0]).read())",
               str(tmp_path / "ask.py"), str(out), *map(str, asked)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    answers = [line.split("\t") for line in done.stdout.splitlines()]
    expected = featx("predict", model, *asked, "--json").json["predictions"]
    assert [path for path, _, _ in answers] == [str(path) for path in asked]
    said = [label for _, label, _ in answers]
    told = [each["reason"] or each["label"] for each in expected]
    same = np.mean([a == b for a, b in zip(said, told, strict=True)])
    unknown = np.mean([(a == "unknown") == (b == "unknown") for a, b in zip(said, told, strict=True)])
    assert unknown >= 0.98 and same >= 0.96  # at eight bits a photo at the threshold may fall to either side
    labels = {each["label"] for each in expected}
    assert {"ants", "bees"} == labels and "unknown" in said


@pytest.mark.slow
def test_the_proof_inside_proves(at_eight_bits: Path) -> None:
    out, model = at_eight_bits / "int8.onnx", at_eight_bits / "int8.model"
    running = whole.session(out.read_bytes())
    about = {name: json.loads(text) for name, text in running.get_modelmeta().custom_metadata_map.items()}
    proof = about["proof"]
    image = Image.open(io.BytesIO(base64.b64decode(proof["photo_png"]))).convert("RGB")
    names = [output.name for output in running.get_outputs()]
    found = dict(zip(names, running.run(None, {"photo": np.asarray(image)}), strict=True))
    assert about["class_names"][int(found["label"])] == proof["label"]
    expected = [proof["probabilities"][name] for name in about["class_names"]]
    np.testing.assert_allclose(found["probabilities"], expected, atol=0.05)
    assert about["licences"] == {"efficientnet_lite0": "Apache-2.0"}
    assert about["model_sha256"] == read_bundle(model).sha256


def test_what_cannot_be_exported_whole(tmp_path: Path, featx: Featx) -> None:
    golden = Path(__file__).parents[1] / "golden" / "v2.model"
    for options, message in [
        (("--format", "joblib", "--part", "model"), "joblib and skops hold the head alone"),
        (("--format", "onnx", "--part", "head", "--check", tmp_path), "a head alone cannot be compared on photos"),
        (("--format", "onnx", "--check", tmp_path / "nowhere"), "no such file or folder"),
        (("--format", "onnx", "--check", tmp_path), "no images in this folder"),
    ]:
        ran = featx("export", golden, *options, "--out", tmp_path / "a.out")
        assert ran.code == 2 and message in ran.err, ran.err
        assert not (tmp_path / "a.out").exists()
