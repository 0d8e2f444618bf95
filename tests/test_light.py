"""featx without torch: the main job with the packages of ``scripts/light.txt``, and with no other that is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from conftest import ROOT, class_folders, picture
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from servicekit import png, start
from studiokit import Window

BLOCK = """\
import sys
from importlib.machinery import PathFinder

class Missing(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {names!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Missing if finder is PathFinder else finder for finder in sys.meta_path]
"""


def listed(path: Path) -> set[str]:
    """The packages of a list, and all that they need."""
    found: set[str] = set()

    def add(requirement: Requirement) -> None:
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            return
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            return
        found.add(name)
        for need in needs:
            add(Requirement(need))

    for line in path.read_text().splitlines():
        if line.startswith("-r "):
            found |= listed(path.parent / line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            add(Requirement(line))
    return found


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds no other packages than those."""
    kept = listed(ROOT / "scripts" / "light.txt")
    installed = packages_distributions()
    names = {name for name, owners in installed.items() if not kept.intersection(map(canonicalize_name, owners))}
    names -= {"featx"}
    assert {"torch", "torchvision", "timm", "onnx", "pandas"} <= names
    site = tmp_path_factory.mktemp("light")
    (site / "sitecustomize.py").write_text(BLOCK.format(names=names))
    # A cache of its own: a network that another test has converted needs no torch any more.
    return {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "120", "FEATX_CACHE": str(site / "cache")}


@pytest.mark.slow
def test_all_but_training_and_other_networks_works(light: dict[str, str], tmp_path: Path) -> None:
    def featx(*arguments: object, code: int = 0) -> str:
        words = [sys.executable, "-m", "featx", *map(str, arguments)]
        done = subprocess.run(words, cwd=tmp_path, env=light, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    class_folders(tmp_path / "photos", each=12)
    picture(99).save(tmp_path / "new.png")
    assert "24 embedded" in featx("extract", "photos", "--out", "s.featx", "--recipe", "balanced")
    assert "openvino on cpu, int8" in featx("extract", "photos", "--out", "s.featx")
    assert "Report: s.report" in featx("sweep", "s.featx", "--shots", "1,2", "--episodes", 3)
    featx("fit", "s.featx", "--out", "m.model")
    assert featx("predict", "m.model", "new.png").startswith("new.png")
    assert "new.png" in featx("search", "s.featx", "new.png")
    featx("explain", "m.model", "new.png", "--html", "why.html")
    featx("labels", "s.featx")
    advice = featx("advise", "s.featx", "--source", "photos", "--minutes", 0.3)
    assert "scratch, finetune:2, finetune:all (torch is not installed)" in " ".join(advice.split())
    assert "efficientnet_lite0" in featx("backbones")
    for arguments in (
        ("extract", "photos", "--out", "other.featx", "--precision", "fp32"),
        ("extract", "photos", "--out", "other.featx", "--backbone", "timm:resnet18", "--precision", "int8"),
        ("finetune", "s.featx", "photos", "--out", "tuned"),
        ("autoencoder", "photos", "--out", "own"),
    ):
        said = featx(*arguments, code=2)
        assert "is not installed, which this needs. Install all of featx" in said
        assert not (tmp_path / "other.featx").exists()


@pytest.mark.slow
def test_the_studio_and_the_service_work(
    light: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", light["PYTHONPATH"])
    photos = class_folders(tmp_path / "photos", each=6)
    with start(tmp_path, "-P", "-m", "featx", "studio", photos, "--port", 0, "--no-browser") as server:
        window = Window(server)
        window.wait_until_embedded()
        window.label({row: "ants" if row < 6 else "bees" for row in range(12)})
        server.end()
    words = ("fit", tmp_path / "photos.studio" / "photos.featx", "--out", tmp_path / "m.model")
    subprocess.run([sys.executable, "-P", "-m", "featx", *map(str, words)], env=light, check=True)
    with start(tmp_path, "-P", "-m", "featx", "serve", tmp_path / "m.model", "--port", 0) as server:
        assert server.send("/predict", png(1)).json["predictions"][0]["label"] in ("ants", "bees", None)
