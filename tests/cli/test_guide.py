"""The guide on the command line: topics, pages, and what a terminal and a pipe get."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from importlib.resources import files

import pytest
from conftest import Featx

from featx.cli.guide import TOPICS, page
from featx.errors import UsageError


def in_a_terminal(*arguments: str, columns: int = 100) -> str:
    """What ``featx`` prints on a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-W", "error", "-m", "featx", *arguments]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns)}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        out = io.BytesIO()
        while True:
            try:
                data = os.read(ours, 65_536)
            except OSError:  # how Linux says that nobody holds the other end any more
                break
            if not data:
                break
            out.write(data)
    os.close(ours)
    assert process.returncode == 0
    return out.getvalue().decode()


def test_the_topics_are_the_pages() -> None:
    pages = {entry.name for entry in files("featx").joinpath("guide").iterdir()}
    assert pages == {f"{topic}.md" for topic in TOPICS}


@pytest.mark.parametrize("topic", TOPICS)
def test_every_page_has_one_title_and_lines_that_fit(topic: str) -> None:
    text = page(topic)
    assert text.startswith("# ") and text.endswith("\n")
    inside, titles = False, 0
    for line in text.splitlines():
        inside ^= line.lstrip().startswith("```")
        titles += not inside and line.startswith("# ")
        assert len(line) <= 120 or line.lstrip().startswith("|"), line
    assert titles == 1 and not inside


def test_without_a_topic_all_are_listed(featx: Featx) -> None:
    ran = featx("guide")
    assert ran.code == 0
    for topic, summary in TOPICS.items():
        (line,) = [line for line in ran.out.splitlines() if line.split() and line.split()[0] == topic]
        assert line.endswith(summary)
    assert featx("guide", "--json").json == {"topics": list(TOPICS), "summaries": dict(TOPICS)}


def test_in_a_pipe_a_page_is_its_text(featx: Featx) -> None:
    assert featx("guide", "heads").out == page("heads")
    assert featx("guide", "heads", "--json").json == {"topic": "heads", "text": page("heads")}


def test_in_a_terminal_a_page_is_rendered() -> None:
    shown = in_a_terminal("guide", "training")
    assert "\x1b[" in shown and "## " not in shown and "```" not in shown
    words = " ".join(shown.split())
    assert "Fine-tune the last blocks" in words and "Figure in the repository" in words
    assert "featx guide features" in words and "](" not in shown


def test_an_unknown_topic_is_answered_with_the_nearest(featx: Featx) -> None:
    ran = featx("guide", "headz")
    assert ran.code == 2
    assert "no topic 'headz' in the guide" in ran.err and "Did you mean heads?" in ran.err
    assert all(topic in ran.err for topic in TOPICS)
    ran = featx("guide", "headz", "--json")
    assert ran.code == 2 and ran.json["exit_code"] == 2
    with pytest.raises(UsageError, match="To list them: featx guide"):
        page("zzz")
    with pytest.raises(UsageError):
        page("../cli/guide")


def test_nothing_heavy_is_loaded_to_read() -> None:
    code = "import featx.cli.guide as g, sys; g.page('heads'); print('torch' in sys.modules, 'h5py' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
