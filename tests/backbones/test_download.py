"""Downloads over a bad line and from a bad server: a file appears whole and checked, or not at all."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from weightskit import Server, serving

from featx.backbones import hub
from featx.backbones.hub import fetch
from featx.errors import StoreError, WeightsError

DATA = bytes(range(256)) * 12_000  # three blocks
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PAUSE", 0.0)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_progress_counts_bytes(tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    with serving(Server({"/w.pth": DATA})) as server:
        fetch(f"{server.url}/w.pth", tmp_path / "w.pth", SHA256[:8], None, lambda *step: steps.append(step))
    assert (tmp_path / "w.pth").read_bytes() == DATA
    assert [step[0] for step in steps] == sorted({step[0] for step in steps}) and len(steps) >= 3
    assert steps[-1] == (len(DATA), len(DATA), "w.pth")
    assert leftovers(tmp_path) == ["w.pth"]


@pytest.mark.parametrize("sha256", [SHA256, ""], ids=["known", "unknown"])
def test_a_line_that_breaks_goes_on_where_it_stopped(tmp_path: Path, sha256: str) -> None:
    with serving(Server({"/w.pth": DATA}, breaks=[1_000_000, 500_000])) as server:
        fetch(f"{server.url}/w.pth", tmp_path / "w.pth", sha256)
        assert server.asked == ["all", "bytes=1000000-", "bytes=1500000-"]
    assert (tmp_path / "w.pth").read_bytes() == DATA


def test_a_server_without_ranges_is_asked_for_all_of_it_again(tmp_path: Path) -> None:
    with serving(Server({"/w.pth": DATA}, breaks=[1_000_000], ranges=False)) as server:
        fetch(f"{server.url}/w.pth", tmp_path / "w.pth", SHA256)
    assert (tmp_path / "w.pth").read_bytes() == DATA


def test_a_file_that_changes_between_two_attempts_is_begun_again(tmp_path: Path) -> None:
    server = Server({"/w.pth": b"old" * 500_000}, breaks=[1_000_000])
    with serving(server):
        server.sums["/w.pth"] = "old"

        def change(done: int, total: int, what: str) -> None:
            if server.sums:
                server.files["/w.pth"] = DATA
                server.sums.clear()

        fetch(f"{server.url}/w.pth", tmp_path / "w.pth", "", None, change)
    assert (tmp_path / "w.pth").read_bytes() == DATA


def test_a_server_that_is_busy_is_asked_again(tmp_path: Path) -> None:
    with serving(Server({"/w.pth": DATA}, errors=[503, 429])) as server:
        fetch(f"{server.url}/w.pth", tmp_path / "w.pth", SHA256)
        assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("server", "says"),
    [
        (Server({"/w.pth": DATA}, breaks=[10] * 9), r"it ended after 40 of 3,072,000 bytes; 4 attempts were made"),
        (Server({"/w.pth": DATA}, errors=[500] * 9), r"the server answers 500 .*; 4 attempts were made"),
        (Server({}), "HTTP 404"),
        (Server({"/w.pth": DATA[:-1]}), "is not the file that was published: expected sha256 .*Nothing was kept"),
        (Server({"/w.pth": b""}), "is not the file that was published"),
    ],
    ids=["breaks", "fails", "missing", "wrong", "empty"],
)
def test_what_cannot_be_had_leaves_nothing_behind(tmp_path: Path, server: Server, says: str) -> None:
    with serving(server), pytest.raises(WeightsError, match=says):
        fetch(f"{server.url}/w.pth", tmp_path / "w.pth", SHA256)
    assert leftovers(tmp_path) == []


def test_wrong_bytes_do_not_replace_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(DATA)
    with serving(Server({"/w.pth": b"other"})) as server, pytest.raises(WeightsError):
        fetch(f"{server.url}/w.pth", tmp_path / "w.pth", SHA256)
    assert (tmp_path / "w.pth").read_bytes() == DATA


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with serving(Server({"/w.pth": DATA})) as server, pytest.raises(StoreError, match="file"):
        fetch(f"{server.url}/w.pth", tmp_path / "file" / "w.pth", SHA256)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_stopped_download_can_be_run_again(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import os, sys; from pathlib import Path; from featx.backbones.hub import fetch\n"
        "def stop(done, total, what): os.kill(os.getpid(), int(sys.argv[4]))\n"
        "fetch(sys.argv[1], Path(sys.argv[2]), sys.argv[3], None, stop)"
    )
    with serving(Server({"/w.pth": DATA})) as server:
        url, path = f"{server.url}/w.pth", tmp_path / "w.pth"
        command = [sys.executable, "-c", code, url, str(path), SHA256, str(int(number))]
        done = subprocess.run(command, capture_output=True, check=False, env={**os.environ})
        assert done.returncode != 0
        assert not path.exists()
        assert len(leftovers(tmp_path)) == (number == signal.SIGKILL)  # a temporary file, under a name of its own
        fetch(url, path, SHA256)
    assert leftovers(tmp_path) == ["w.pth"] and path.read_bytes() == DATA
