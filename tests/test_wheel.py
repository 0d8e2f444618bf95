"""The wheel has everything in it, and works where the sources are not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, TESTS


@pytest.mark.slow
def test_the_wheel_works_elsewhere(tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    shutil.copytree(ROOT / "featx", sources / "featx", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(sources)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("featx-*.whl")
    with zipfile.ZipFile(wheel) as file:
        inside = {name for name in file.namelist() if name.startswith("featx/")}
        file.extractall(tmp_path / "site")
    files = [path for path in (ROOT / "featx").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert inside == {path.relative_to(ROOT).as_posix() for path in files}

    def run(*command: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
        done = subprocess.run(
            [sys.executable, "-W", "error", *command], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert str(tmp_path / "site") in run("-c", "import featx; print(featx.__file__)")
    assert "images" in run("-m", "featx", "info", str(TESTS / "golden" / "v1-store"), "--json")
    assert "Heads" in run("-m", "featx", "guide", "heads")
    page = "from featx.reports import render_template as r; print(r('api.html', title='x', description='', routes=[]))"
    assert "<style>" in run("-c", page)
