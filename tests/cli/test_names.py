"""A name that is nearly right is answered with the right one, and shells complete the rest."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import typer
from conftest import Featx, picture
from storekit import make_store

from featx.cli.main import app
from featx.errors import plural

PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("names") / "s.featx")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("verfy STORE", "No such command 'verfy'. Did you mean 'verify'?"),
        ("info STORE --jsno", "No such option: --jsno (Possible options: --json)"),
        ("sweep STORE --heads logrg", "Did you mean logreg?"),
        ("sweep STORE --layer penultimat", "no layer 'penultimat' in this store"),
        ("extract photos -o out.featx --backbone efficentnet_lite0", "Did you mean efficientnet_lite0"),
        ("extract photos -o out.featx --backbone tim:resnet18", "Did you mean timm?"),
        ("extract photos -o out.featx --engine opnvino", "'opnvino' is not one of 'auto', 'torch', 'openvino'"),
        ("verify STOR", "Did you mean s.featx?"),
    ],
)
def test_the_nearest_name_is_suggested(featx: Featx, store: Path, command: str, says: str) -> None:
    folder = store.parent
    (folder / "photos").mkdir(exist_ok=True)
    (folder / "photos" / "a.png").touch()
    words = [{"STORE": str(store), "STOR": "s.feat"}.get(word, word) for word in command.split()]
    done = featx(*words, cwd=folder)
    assert done.code == 2
    assert says in " ".join(done.err.split())


def test_help_hides_nothing_and_every_command_has_an_example() -> None:
    """Square brackets would be markup, which is not shown: so were the defaults of a dozen options."""
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    assert len(group.commands) > 15
    commands = dict(group.commands)
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            commands |= {f"{name} {below}": inner for below, inner in command.commands.items()}
    for name, command in commands.items():
        texts = [
            command.help or "",
            command.epilog or "",
            *(getattr(item, "help", "") or "" for item in command.params),
        ]
        assert not [text for text in texts if re.search(r"\[[a-z/]", text)], name
        assert f"featx {name}" in (command.epilog or ""), name


def _install(home: Path, shell: str) -> None:
    done = subprocess.run(
        ["featx", "--install-completion", shell],
        # Otherwise it is for the shell that runs the tests, which need not be the one that is meant.
        env={**os.environ, "PATH": PATH, "HOME": str(home), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{shell} completion installed" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes(tmp_path: Path) -> None:
    _install(tmp_path, "bash")
    asked = 'COMP_WORDS=($1 $2 $3); COMP_CWORD=$(($# - 1)); _featx_completion featx; echo "${COMPREPLY[@]}"'
    for words, found in (
        ("featx ver", "verify"),
        ("featx info --js", "--json"),
        ("featx evaluate", "evaluate-retrieval"),
    ):
        done = subprocess.run(
            ["bash", "-c", f"source ~/.bashrc; {asked}", "bash", *words.split()],
            env={**os.environ, "PATH": PATH, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [found], done.stderr


def test_zsh_is_told_where_to_ask(tmp_path: Path) -> None:
    _install(tmp_path, "zsh")
    assert "compinit" in (tmp_path / ".zshrc").read_text()
    assert "_FEATX_COMPLETE=complete_zsh featx" in (tmp_path / ".zfunc" / "_featx").read_text()
    done = subprocess.run(
        ["featx"],
        env={**os.environ, "PATH": PATH, "_FEATX_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "featx ver"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"verify"' in done.stdout and '"pack"' not in done.stdout


def test_numbers_and_nouns_agree() -> None:
    assert plural(1, "class") == "1 class"
    assert plural(2, "class") == "2 classes"
    assert plural(0, "copy") == "0 copies"
    assert plural(3, "day") == "3 days"
    assert plural(2000, "epoch") == "2,000 epochs"


HOSTILE = ("\x1b[31mred\nError: forged.png", "\x9b2Jclear.png", "\u202egpj.png", "[red]x[bold].png")
"""Names that would colour, clear or reverse the terminal, add a line, or be markup."""


def assert_shown(text: str) -> None:
    assert not [char for char in text if char != "\n" and unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp")]
    assert "Error: forged.png" not in [line.strip() for line in text.splitlines()]


@pytest.mark.slow
def test_names_neither_forge_nor_hide_what_the_terminal_shows(featx: Featx, tmp_path: Path) -> None:
    photos, store = tmp_path / "photos", tmp_path / "s.featx"
    for number, (folder, name) in enumerate(itertools.product(("a[", "[b]"), HOSTILE)):
        (photos / folder).mkdir(parents=True, exist_ok=True)
        picture(number // 2).save(photos / folder / name)
    picture(98).save(photos / "a[" / "].png")  # "a[/].png" would be markup that closes nothing
    picture(98).save(photos / "[b]" / "copy.png")
    bad = photos / "[b]" / "bad\x1b]0;title\x07.png"
    bad.write_bytes(b"no image")
    ran = featx("extract", photos, "--out", store)
    assert ran.code == 3 and r"refused [b]/bad\x1b]0;title\x07.png: not_an_image" in ran.err
    for words in (["info", store], ["duplicates", store], ["search", store, *sorted((photos / "a[").iterdir())]):
        shown = featx(*words, env={"COLUMNS": "200"})
        assert shown.code == 0, shown.err
        assert_shown(shown.out + shown.err)
        if words[0] != "info":
            assert "a[/].png" in shown.out and r"\x1b[31mred\nError: forged.png" in shown.out
    assert "[b] 5" in featx("info", store).out
    ran = featx("info", tmp_path / HOSTILE[0])
    assert ran.code == 2 and ran.err.startswith("Error: ") and r"\x1b[31mred\nError: forged.png" in ran.err
    assert_shown(ran.err)
    ran = featx("info", store, "--\x1b[31m")
    assert ran.code == 2 and r"--\x1b[31m" in ran.err
    assert_shown(ran.err)
    ran = featx("duplicates", store, "--json")
    ids = [image["id"] for group in ran.json["groups"] for image in group["images"]]
    assert f"a[/{HOSTILE[0]}" in ids  # the name itself, in JSON's own spelling
    assert_shown(ran.out)
