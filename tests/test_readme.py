"""Every command and every line of Python in the README runs."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import class_folders, picture

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

ELSEWHERE = {
    "scripts/demo": "test_demo.test_the_demo runs what it runs, and CI runs scripts/test",
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
    picture(500, (300, 200)).save(here / "photo.jpg")
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
            assert "\\n" not in done.stdout + done.stderr, command


def test_the_python_runs(folder: Path) -> None:
    code = blocks("python")[0]
    shutil.rmtree(folder / "photos.featx", ignore_errors=True)
    done = run([sys.executable, "-W", "error", "-c", f"{code.rstrip()}\nprint(features.embeddings.shape)"], folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(16, 1280)"


def test_the_pipeline_of_scikit_learn_runs(folder: Path) -> None:
    (code,) = [block for block in blocks("python") if "FeatureExtractor(" in block]
    done = run([sys.executable, "-W", "error", "-c", code], folder)
    assert done.returncode == 0, done.stderr
    scores = [float(score) for score in done.stdout.strip("[] \n").split()]
    assert len(scores) == 4 and all(0 <= score <= 1 for score in scores)


@pytest.mark.slow
def test_the_service_answers_as_the_readme_asks(folder: Path) -> None:
    for command in ("featx extract photos --out photos.featx", "featx fit photos.featx --out photos.model"):
        assert run(["bash", "-c", command], folder).returncode == 0
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    (block,) = blocks("sh")
    serve, *questions = block.strip().splitlines()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server_command = [sys.executable, "-m", *serve.split(), "--port", str(port)]
    server = subprocess.Popen(server_command, cwd=folder, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while run(["curl", "-sf", f"http://127.0.0.1:{port}/ready"], folder).returncode:
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        for question in questions:
            done = run(["bash", "-c", question.replace("curl", "curl -sf").replace("8000", str(port))], folder)
            assert done.returncode == 0, done.stderr
            assert "ants" in done.stdout
        client = run([sys.executable, "-W", "error", "-c", blocks("python")[1].replace("8000", str(port))], folder)
        assert client.returncode == 0, client.stderr
        told = [line.split() for line in client.stdout.splitlines()]
        assert len(told) == 16 and {line[0] for line in told} <= {"ants", "bees"}
    finally:
        server.terminate()
        assert server.wait(timeout=40) == 0


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
