"""Every command and every line of Python in the README and in the guide runs, and every link leads somewhere.

``bash`` blocks are run line by line; ``python`` blocks of a page are one script, but for those that begin with
``# FILE.py``, which are files; ``sh`` blocks are a server and what it is asked; ``text`` blocks show output.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main
from conftest import ROOT, class_folders, picture
from warm import SOCKET, Warm

from featx.cli.guide import TOPICS
from featx.cli.main import app

GUIDE = ROOT / "featx" / "guide"
README = ROOT / "README.md"
PAGES = (README, *(GUIDE / f"{topic}.md" for topic in TOPICS))
PROSE = (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md")
SERVING = GUIDE / "serving.md"

ELSEWHERE = {
    "scripts/demo": "test_demo.test_the_demo runs what it runs, and CI runs scripts/test",
    "scripts/test": "is what runs this test",
    "featx studio photos": "ends with Ctrl-C; tests/studio runs it",
    "pip install '.[serve,export]'": "is how featx came here, but for the extras of the development",
    "pip install 'featx[serve]'": "needs a package index",
    "featx export photos.model --format html --out photos.html --store photos.featx --runtime npm": "fetches a "
    "package; test_offline runs it with a folder",
    "python scripts/bench_sweep.py photos.featx": "takes minutes",
    "python scripts/bench_extract.py --images 480": "takes minutes",
    "python scripts/bench_extract.py --photos rsscn7 "
    "--together efficientnet_lite0,efficientnet_lite1,efficientnet_lite2": "takes minutes",
    "python scripts/bench_extract.py --large 24": "takes minutes",
    "python scripts/bench_extract.py --backbones efficientnet_lite0 --precisions fp32,bf16,int8": "takes minutes",
    "python scripts/bench_serve.py photos --featx OTHER/bin/featx": "takes minutes, and another version of featx",
    "python scripts/bench_refit.py hymenoptera.featx cats_dogs.featx dtd10.featx": "takes minutes, and three stores",
    "python scripts/bench_refit.py joined.featx --time new_photos": "takes minutes, and a store of three networks",
    "python scripts/bench_extract.py --linear 10000,50000": "takes an hour",
    "python scripts/bench_search.py --rows 1000000": "takes minutes, and 10 GB",
    "python scripts/bench_growth.py --rows 10000000 --dims 32": "takes an hour; test_growth runs it with few rows",
}
"""Commands that this test does not run, and why."""


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of one language; those inside a list are indented."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return ["\n".join(line.removeprefix(indent) for line in text.splitlines()) for indent, text in found]


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]


def files(page: Path) -> dict[str, str]:
    """Blocks of Python that are a file, by its name."""
    found = {re.match(r"# (\w+\.py)\n", block): block for block in blocks(page, "python")}
    return {match.group(1): block for match, block in found.items() if match}


def script(page: Path) -> str:
    """All other blocks of Python, in order."""
    return "\n".join(block for block in blocks(page, "python") if block not in files(page).values())


Run = Callable[[list[str], Path], "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def run(warm: Warm) -> Run:
    """Run a command in a folder; ``featx`` in it starts quickly."""
    path = os.pathsep.join([str(warm.program()), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, SOCKET: str(warm.socket)}

    def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200, check=False)

    return run


@pytest.fixture(scope="module")
def folder(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with ``photos`` of two classes, the scripts, and what the first page has made: a store and a model."""
    here = tmp_path_factory.mktemp("readme")
    class_folders(here / "photos", each=8)
    picture(500, (300, 200)).save(here / "photo.jpg")
    (here / "scripts").symlink_to(ROOT / "scripts")
    for command in ("featx extract photos --out photos.featx", "featx fit photos.featx --out photos.model"):
        done = run(["bash", "-c", command], here)
        assert done.returncode == 0, done.stderr
    return here


@pytest.fixture(scope="module")
def seen() -> set[str]:
    """Commands that have run: one that several pages have runs once."""
    return set()


def name_of(page: Path) -> str:
    return page.stem


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_every_command_runs(run: Run, page: Path, folder: Path, seen: set[str]) -> None:
    for name, text in files(page).items():
        (folder / name).write_text(text)
    for command in commands(page):
        if command not in ELSEWHERE and command not in seen:
            seen.add(command)
            done = run(["bash", "-c", command], folder)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            assert done.stdout.strip(), command
            assert "\\n" not in done.stdout + done.stderr, command


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if script(page) and page != SERVING], ids=name_of)
def test_the_python_runs(run: Run, page: Path, folder: Path) -> None:
    code = f"{script(page)}\nprint(features.embeddings.shape)"
    done = run([sys.executable, "-W", "error", "-c", code], folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(16, 1280)"


@pytest.mark.slow
def test_the_service_answers_as_the_guide_asks(run: Run, folder: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    (block,) = blocks(SERVING, "sh")
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
        client = run([sys.executable, "-W", "error", "-c", script(SERVING).replace("8000", str(port))], folder)
        assert client.returncode == 0, client.stderr
        answers = [line.split() for line in client.stdout.splitlines()]
        assert len(answers) == 16 and {line[0] for line in answers} <= {"ants", "bees"}
    finally:
        server.terminate()
        assert server.wait(timeout=40) == 0


@pytest.mark.slow
def test_the_output_that_is_shown_is_real(run: Run, photos: Path, tmp_path: Path) -> None:
    """That of ants and bees, but for times, and for the few tenths that another processor makes of it, or fp32."""
    line, table = (block.splitlines() for block in blocks(README, "text"))
    store = tmp_path / "photos.featx"
    done = run(["featx", "extract", str(photos / "hymenoptera"), "--out", str(store)], tmp_path)
    assert done.returncode == 0, done.stderr
    for shown in line:
        assert shown.partition(", in ")[0] in done.stdout
    done = run(["featx", "sweep", str(store), "--shots", "5", "--json"], tmp_path)
    assert done.returncode == 0, done.stderr
    found = {result["head"]: result for result in json.loads(done.stdout)["results"]}
    rows = [match for row in table if (match := re.match(r"(?:5| ) +(\w+) +=? +([\d.]+) +([\d.]+) to ([\d.]+) ", row))]
    assert len(rows) == 4
    for row in rows:
        accuracy = found[row[1]]["accuracy"]
        for name, shown in zip(("mean", "low", "high"), row.groups()[1:], strict=True):
            assert abs(100 * accuracy[name] - float(shown)) < 0.9, row[0]


def test_the_package_docstring_has_the_same_four_lines() -> None:
    import featx

    for line in script(README).splitlines()[-4:]:
        assert line in (featx.__doc__ or "")


def test_commands_that_are_run_elsewhere_are_there_and_exist() -> None:
    known = {command for page in PAGES for command in commands(page)}
    assert len(known) >= 40
    assert set(ELSEWHERE) <= known
    for command in ELSEWHERE:
        words = command.split()
        if words[0].startswith("scripts/"):
            assert os.access(ROOT / words[0], os.X_OK)
        if words[0] == "python":
            source = (ROOT / words[1]).read_text()
            for option in (word for word in words if word.startswith("--")):
                assert f'"{option}"' in source, command


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_commands_in_the_text_exist_with_their_options(page: Path) -> None:
    """Those in `backquotes`, and those of ``text`` blocks, which need another host or scheduler."""
    known = typer.main.get_command(app)
    assert isinstance(known, typer.core.TyperGroup)
    prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    lines += [line for block in blocks(page, "text") for line in block.splitlines()]
    for line in re.findall(r"(?:^|[ '])featx ([a-z].*)", "\n".join(lines), flags=re.MULTILINE):
        words = shlex.split(line.split("|")[0].replace("'", "").replace("&", " "))
        assert words[0] in known.commands, line
        command = known.commands[words[0]]
        if isinstance(command, typer.core.TyperGroup) and len(words) > 1:
            assert words[1] in command.commands, line
            command = command.commands[words[1]]
        options = {name for item in command.params for name in (*item.opts, *item.secondary_opts)}
        for word in words[1:]:
            if word.startswith("-") and word != "-":
                assert word in options | {"--help"}, line


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_every_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not re.match(r"https?:|mailto:", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    for topic in TOPICS:
        assert f"(featx/guide/{topic}.md)" in text
    for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "data/report.png"):
        assert f"({name})" in text


def test_the_guide_draws_every_room() -> None:
    rooms = {path.parent.name for path in (ROOT / "featx").glob("*/__init__.py")}
    for place in (GUIDE / "inside.md", ROOT / "CONTRIBUTING.md"):
        assert {room for room in rooms if f"`{room}/`" not in place.read_text()} == set()


def test_the_guide_shows_every_public_name() -> None:
    names = set(re.findall(r"as (\w+)", (ROOT / "featx" / "__init__.pyi").read_text()))
    assert len(names) > 15
    shown = "\n".join(blocks(GUIDE / "python.md", "python"))
    assert {name for name in names if not re.search(rf"\b{name}\b", shown)} == set()


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_no_placeholder_is_left(page: Path) -> None:
    assert not re.findall(r"@[A-Z0-9]+@|TODO|XXX", page.read_text())
