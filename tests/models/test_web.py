"""onnxruntime for browsers: found, fetched once, and taken only as what it says that it is."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from featx.errors import UsageError
from featx.models.onnx import web
from featx.models.onnx.web import WebRuntime, web_runtime

ELSE = "1.28.4"
"""A version that suits, of which nothing is known."""


def members(version: str = ELSE, **changes: str | bytes) -> dict[str, bytes]:
    """The package's files that are used, as far as they are looked at."""
    about = {"name": "onnxruntime-web", "version": version, "license": "MIT"}
    about |= {name: text for name, text in changes.items() if isinstance(text, str)}
    return {
        "package/package.json": json.dumps(about).encode(),
        "package/dist/ort.wasm.bundle.min.mjs": f'var a="{version}";export{{a as env}};'.encode(),
        "package/dist/ort-wasm-simd-threaded.wasm": bytes(changes.get("wasm", b"\0asm\1\0\0\0")),  # type: ignore[arg-type]
    }


def folder_of(place: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


def packed(place: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(place, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return place


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path / "cache"))


def test_a_folder_a_part_of_one_and_a_packed_file_are_the_same(tmp_path: Path) -> None:
    inside = folder_of(tmp_path / "app" / "node_modules" / "onnxruntime-web", {})
    folder_of(tmp_path, members())
    for name, content in members().items():
        path = inside / name.removeprefix("package/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    archive = packed(tmp_path / "a.tgz", members())
    places = (tmp_path, tmp_path / "package", tmp_path / "package" / "dist", inside, tmp_path / "app", archive)
    found = [web_runtime(str(place)) for place in places]
    assert {(each.version, each.loader, each.wasm) for each in found} == {
        (ELSE, f'var a="{ELSE}";export{{a as env}};', b"\0asm\1\0\0\0")
    }
    with pytest.raises(UsageError, match="is not on this machine"):
        web_runtime(None)  # folders that are named are not kept


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (members(name="left-pad"), "this is not onnxruntime-web: expected onnxruntime-web, found left-pad"),
        (members("1.26.9"), "does not suit: expected from 1.27, before 2.0, found 1.26.9"),
        (members("2.0.0"), "does not suit"),
        (members("1.28.0-dev.20260101"), "does not suit"),
        (members(license="GPL-3.0"), "expected MIT, found GPL-3.0"),
        (members(wasm=b"MZ"), "no WebAssembly in ort-wasm-simd-threaded.wasm"),
        (members(web.VERSION), "is not the one that was published as onnxruntime-web 1.30.0"),
        ({**members(), "package/package.json": members("1.28.5")["package/package.json"]}, "files of another version"),
        ({**members(), "package/package.json": b"[" * 100_000}, "while reading package.json"),
        ({**members(), "package/package.json": b"[]"}, "TypeError while reading package.json"),
        ({**members(), "package/dist/ort.wasm.bundle.min.mjs": b"\xff\xfe"}, "UnicodeDecodeError"),
    ],
)
def test_what_it_is_not(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    for place in (folder_of(tmp_path / "folder", files), packed(tmp_path / "a.tgz", files)):
        with pytest.raises(UsageError) as caught:
            web_runtime(str(place))
        assert message in str(caught.value)


def test_packages_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.tgz").write_text("no archive")
    some = members()
    del some["package/dist/ort-wasm-simd-threaded.wasm"]
    cases = {
        tmp_path / "text.tgz": "ReadError",
        packed(tmp_path / "half.tgz", some): "a package without ort-wasm-simd-threaded.wasm",
        packed(tmp_path / "up.tgz", {f"../{name}": content for name, content in members().items()}): "package without",
        folder_of(tmp_path / "none", {}): "no such folder",
    }
    for place, message in cases.items():
        with pytest.raises(UsageError, match=message):
            web_runtime(str(place))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no onnxruntime-web in this folder"):
        web_runtime(str(tmp_path / "empty"))
    with pytest.raises(UsageError, match="this is not onnxruntime-web"):
        web_runtime(str(folder_of(tmp_path / "part", some)))
    monkeypatch.setattr(web, "_MOST", 4)
    with pytest.raises(UsageError, match=r"bytes of package\.json"):
        web_runtime(str(packed(tmp_path / "large.tgz", members())))
    monkeypatch.setattr(web, "_MOST_UNPACKED", 100)
    with pytest.raises(UsageError, match="more than 100 bytes"):
        web_runtime(str(packed(tmp_path / "bomb.tgz", {"package/zeros": bytes(5000), **members()})))


def npm(folder: Path, script: str) -> None:
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)


def test_npm_fetches_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = packed(tmp_path / "package.tgz", members())
    programs = tmp_path / "bin"
    programs.mkdir()
    npm(programs, f'echo "$@" > {tmp_path}/asked; cp {archive} onnxruntime-web-{web.VERSION}.tgz')
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    said: list[str] = []
    fetched = web_runtime("npm", said.append)
    assert said == [f"fetching onnxruntime-web {web.VERSION} with npm"]
    assert (tmp_path / "asked").read_text().startswith(f"pack onnxruntime-web@{web.VERSION} --silent --ignore-scripts")
    npm(programs, "exit 1")
    assert web_runtime(None) == fetched == WebRuntime(ELSE, fetched.loader, fetched.wasm, fetched.path)
    assert fetched.path == tmp_path / "cache" / "onnxruntime-web" / ELSE
    npm(programs, "echo 'npm error code E404' >&2; exit 1")
    with pytest.raises(UsageError, match="npm could not fetch onnxruntime-web: found npm error code E404"):
        web_runtime("npm")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="there is no npm on this machine"):
        web_runtime("npm")


def test_addresses_without_https_are_not_asked() -> None:
    with pytest.raises(UsageError, match="fetched over https only"):
        web_runtime("http://localhost:1/onnxruntime-web-1.30.0.tgz")
    with pytest.raises(UsageError, match="fetched over https only"):
        web_runtime("file:///etc/passwd")
    with pytest.raises(UsageError, match="cannot be fetched"):
        web_runtime("https://localhost:1/onnxruntime-web-1.30.0.tgz")
