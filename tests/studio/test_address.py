"""The last address of a project: kept for its owner alone, and used again where that can be."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from featx.errors import UsageError
from featx.studio.address import LastAddress


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "studio" / "address.json"


def known(path: Path) -> tuple[int, str, str]:
    found = LastAddress(path)
    return found.port, found.token, found.url


def test_a_port_and_a_token_are_found_again_by_their_owner_alone_until_they_are_forgotten(path: Path) -> None:
    assert known(path) == (0, "", "")
    address = LastAddress(path)
    address.listen(0).close()
    port, token, url = known(path)
    assert (port, url) == (address.port, f"http://127.0.0.1:{port}/?token={token}")
    assert len(token) >= 32
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    assert known(path) == (0, "", "")
    path.chmod(0o600)
    assert known(path) == (port, token, url)
    address.forget()
    assert known(path) == (0, "", "")
    address.forget()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"port": "x", "token": "t"}', '{"port": 1}'])
def test_a_damaged_file_is_as_none(path: Path, text: str) -> None:
    LastAddress(path).listen(0).close()
    path.write_text(text)
    assert known(path) == (0, "", "")


def test_a_port_that_is_free_is_taken_again_with_its_token_and_another_has_another(path: Path) -> None:
    LastAddress(path).listen(0).close()
    before = known(path)
    with LastAddress(path).listen(0) as again:
        again.listen()
        assert known(path) == before
        with pytest.raises(UsageError, match="Choose another with --port"):
            LastAddress(path).listen(before[0])
        with LastAddress(path).listen(0):
            port, token, _ = known(path)
            assert port != before[0]
            assert token != before[1], "whoever listens at the old port has seen it"
