"""The last address of a project: kept for its owner alone, and used again where that can be."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from featx.errors import UsageError
from featx.studio.address import HOST, LastAddress


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "studio" / "address.json"


def test_a_port_and_a_token_are_found_again_by_their_owner_alone(path: Path) -> None:
    assert (LastAddress(path).port, LastAddress(path).token) == (0, "")
    LastAddress(path).keep(1234, "first")
    LastAddress(path).keep(4321, "second")
    assert path.stat().st_mode & 0o777 == 0o600
    assert (LastAddress(path).port, LastAddress(path).token) == (4321, "second")
    assert LastAddress(path).url == "http://127.0.0.1:4321/?token=second"
    path.chmod(0o640)
    assert (LastAddress(path).port, LastAddress(path).token, LastAddress(path).url) == (0, "", "")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"port": "x", "token": "t"}', '{"port": 1}'])
def test_a_damaged_file_is_as_none(path: Path, text: str) -> None:
    LastAddress(path).keep(1, "t")
    path.write_text(text)
    assert (LastAddress(path).port, LastAddress(path).token) == (0, "")


def test_the_last_port_is_taken_again_where_it_is_free_and_none_was_asked_for(path: Path) -> None:
    with LastAddress(path).listen(0) as first:
        port = first.getsockname()[1]
    LastAddress(path).keep(port, "token")
    with LastAddress(path).listen(0) as again:
        again.listen()
        assert again.getsockname()[1] == port
        with LastAddress(path).listen(0) as other:
            assert other.getsockname()[1] != port
        with pytest.raises(UsageError, match="Choose another with --port"):
            LastAddress(path).listen(port)
    with socket.create_server((HOST, 0)) as taken, pytest.raises(UsageError, match="cannot listen there"):
        LastAddress(path).listen(taken.getsockname()[1])
