"""Every command and every line of Python in the README runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import class_folders

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

ELSEWHERE = {
    "scripts/demo": "test_cli.test_the_demo runs what it runs, and CI runs scripts/test",
    "scripts/test": "is what runs this test",
    "pip install .": "is how featx came here",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with ``photos`` of two classes, and the scripts."""
    here = tmp_path_factory.mktemp("readme")
    class_folders(here / "photos", each=8)
    (here / "scripts").symlink_to(ROOT / "scripts")
    return here


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=200, check=False
    )


def test_every_command_runs(folder: Path) -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert len(commands) >= 10
    assert set(ELSEWHERE) <= set(commands)
    for command in commands:
        if command not in ELSEWHERE:
            done = run(["bash", "-c", command], folder)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            assert done.stdout.strip(), command


def test_the_python_runs(folder: Path) -> None:
    (code,) = blocks("python")
    shutil.rmtree(folder / "photos.featx", ignore_errors=True)
    done = run([sys.executable, "-W", "error", "-c", f"{code.rstrip()}\nprint(features.embeddings.shape)"], folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(16, 1280)"


def test_the_package_docstring_has_the_same_four_lines() -> None:
    import featx

    for line in blocks("python")[0].splitlines()[-4:]:
        assert line in (featx.__doc__ or "")


def test_commands_that_are_run_elsewhere_exist() -> None:
    for command in ELSEWHERE:
        if command.startswith("scripts/"):
            assert os.access(ROOT / command, os.X_OK)


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"@[A-Z0-9]+@|TODO|XXX", README)
