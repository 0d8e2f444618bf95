"""What a killed process leaves beside its output is removed by the next one, and what is alive is not touched."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Featx, class_folders

from featx._files import publish_bytes, temporary, without_replacing

pytestmark = pytest.mark.slow

KILLED = """
import os, signal, sys
def killed(handle):
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = killed
sys.argv[0] = "featx"
import runpy
runpy.run_module("featx", run_name="__main__")
"""
"""The real command, killed (-9) when its output is written but not yet published."""

WRITER = """
import sys
from pathlib import Path
from featx._files import publish
def write(temp):
    temp.write_bytes(b"slow")
    print(temp.name, flush=True)
    sys.stdin.readline()
publish(Path(sys.argv[1]), write)
"""

HASTY = """
import os, signal, sys
from pathlib import Path
from featx._files import publish
folder, number = Path(sys.argv[1]), int(sys.argv[2])
def write(temp):
    temp.write_bytes(b"%d" % n * 1000)
    if n == number:
        os.kill(os.getpid(), signal.SIGKILL)
for n in range(60):
    publish(folder / f"{number}-{n}", write)
    print(n, flush=True)
"""


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".tmp-"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, featx: Featx) -> Path:
    folder = tmp_path_factory.mktemp("leftovers")
    class_folders(folder / "photos", each=8)
    assert featx("extract", folder / "photos", "--out", folder / "s.featx").code == 0
    return folder / "s.featx"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [("fit", "s.featx", "--out", "a.model"), ("pack", "s.featx", "a.h5")], ids=["fit", "pack"]
)
def test_what_a_killed_command_left_is_removed_by_the_next(store: Path, featx: Featx, command: tuple[str, ...]) -> None:
    folder = store.parent
    kept = folder / command[-1]
    kept.unlink(missing_ok=True)
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], cwd=folder, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not kept.exists()
    (left,) = leftovers(folder)
    assert (folder / left).stat().st_size > 0
    done = featx(*command, cwd=folder)
    assert done.code == 0, done.err
    assert kept.exists()
    assert leftovers(folder) == []


def test_a_folder_that_was_being_filled_goes_too(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from featx._files import temporary\n"
        "with temporary(Path(sys.argv[1]) / 'page.html') as folder:\n"
        "    folder.mkdir(); (folder / 'activations').write_bytes(b'much'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    (left,) = leftovers(tmp_path)
    assert (tmp_path / left / "activations").exists()
    publish_bytes(tmp_path / "page.html", b"page")
    assert leftovers(tmp_path) == []


def test_what_is_being_written_stays(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path / "slow"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdin is not None and writer.stdout is not None
        name = writer.stdout.readline().strip()
        publish_bytes(tmp_path / "quick", b"quick")
        assert leftovers(tmp_path) == [name]
        writer.stdin.write("\n")
        writer.stdin.close()
        assert writer.wait(60) == 0
    assert (tmp_path / "slow").read_bytes() == b"slow"
    assert leftovers(tmp_path) == []


def test_writers_that_die_in_crowds_cost_the_others_nothing(tmp_path: Path) -> None:
    numbers = [5, 25, 45, 60, 60]  # the last two live
    crowd = [subprocess.Popen([sys.executable, "-c", HASTY, tmp_path, str(n)], stdout=subprocess.PIPE) for n in numbers]
    said = [process.communicate(timeout=60)[0].split() for process in crowd]
    assert [process.returncode for process in crowd] == [-9, -9, -9, 0, 0]
    for number, lines in zip(numbers, said, strict=True):
        assert len(lines) == number
        for n in range(number):
            assert (tmp_path / f"{number}-{n}").read_bytes() == b"%d" % n * 1000
    publish_bytes(tmp_path / "last", b"")
    assert leftovers(tmp_path) == []


def test_only_what_featx_made_is_removed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    (tmp_path / ".tmp-1-abc-link").symlink_to(tmp_path / "mine")
    for name in (".tmp-notes", ".tmp-1-xyz-notes", ".tmp--abc-notes", "tmp-1-abc-notes"):
        (tmp_path / name).write_text("mine")
    publish_bytes(tmp_path / "out", b"out")
    assert leftovers(tmp_path) == [".tmp--abc-notes", ".tmp-1-xyz-notes", ".tmp-notes"]
    assert (tmp_path / "mine" / "letter").read_text() == "dear"


def test_a_folder_that_another_program_locked_can_be_written_to(tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # as "flock FOLDER featx ..." does
        publish_bytes(tmp_path / "out", b"out")
    finally:
        os.close(handle)
    assert (tmp_path / "out").read_bytes() == b"out"


@pytest.mark.parametrize("links", [True, False])
def test_nothing_is_replaced(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:  # as on a memory card

        def refused(self: Path, target: Path) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(Path, "hardlink_to", refused)
    (tmp_path / "old").write_text("old")
    with temporary(tmp_path / "new") as temp:
        temp.write_text("new")
        with pytest.raises(FileExistsError):
            without_replacing(temp, tmp_path / "old")
        without_replacing(temp, tmp_path / "new")
    assert ((tmp_path / "old").read_text(), (tmp_path / "new").read_text()) == ("old", "new")
    assert (tmp_path / "new").stat().st_nlink == 1
    assert leftovers(tmp_path) == []
