"""onnxruntime-web, which runs a graph in a browser: found on this machine, or fetched once.

featx does not carry it (30 MB packed). Of npm's package two files are used: the loader, a JavaScript module with the
WebAssembly's own loader inside, and the WebAssembly for CPUs with SIMD. What is checked: that the folder's
``package.json`` names the package, a version that suits and the MIT licence, that both files say that they are what
they are named, and of the version that featx was tried with that they are the very bytes that were published. Of other
versions nothing but npm's own check ties the bytes to their publisher.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from featx._files import make_folder, publish_bytes, read_regular
from featx.backbones import cache_folder
from featx.errors import UsageError, one_line

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
"""The package, and its version that featx was tried with and fetches."""

OLDEST, BEFORE = (1, 27), (2, 0)
"""Versions that suit: the oldest that was tried, and where the next great one begins."""

_LOADER, _WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
_MANIFEST = "package.json"
_PUBLISHED = {
    _LOADER: "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    _WASM: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
"""The sha256 of both files of ``VERSION``."""

_MOST_PACKED, _MOST_UNPACKED, _MOST = 2**27, 2**29, 2**26
"""Bytes of the package as it comes, of all of it unpacked, and of one file."""

_SECONDS = 600
_FETCH = f"featx fetches it once with --runtime npm, or takes a folder: npm pack {PACKAGE}@{VERSION}, unpack it, and "
_FETCH += "--runtime FOLDER."


@dataclass(frozen=True)
class WebRuntime:
    """The package, as text and bytes.

    Parameters
    ----------
    version : such as "1.30.0".
    loader : a JavaScript module.
    wasm : WebAssembly.
    path : where they are from.
    """

    version: str
    loader: str
    wasm: bytes
    path: Path


def web_runtime(given: str | None, progress: Callable[[str], None] | None = None) -> WebRuntime:
    """The package that runs graphs in browsers.

    Parameters
    ----------
    given : a folder with it, a file ``.tgz`` as ``npm pack`` makes it, "npm" to let npm fetch it, or the https address
        of such a file. What was fetched is kept in featx's cache. None takes what is there.
    progress : told, in a sentence, before something is fetched.

    Raises
    ------
    UsageError
        It is not there, cannot be fetched, or is not what it should be.
    """
    say = progress or (lambda sentence: None)
    kept = cache_folder() / PACKAGE
    if given is None:
        versions = [(_numbers(path.name), path) for path in kept.glob("*") if (path / _MANIFEST).is_file()]
        if not versions:
            raise UsageError(f"{PACKAGE}, which runs the model in a browser, is not on this machine", hint=_FETCH)
        return _read(max(versions)[1])
    if given == "npm":
        say(f"fetching {PACKAGE} {VERSION} with npm")
        return _keep(_packed(_by_npm(), given), kept)
    if re.match(r"[a-z][a-z0-9+.-]+://", given, re.IGNORECASE):
        say(f"fetching {given}")
        return _keep(_packed(_download(given), given), kept)
    path = Path(given).expanduser()
    if path.is_file():
        return _runtime(_packed(_bytes_of(path, _MOST_PACKED), given), path)
    if not path.is_dir():
        raise UsageError("no such folder", where=f"--runtime {given}", hint=_FETCH)
    return _read(path)


# --- what it is ---------------------------------------------------------------------------------------------------


def _read(folder: Path) -> WebRuntime:
    """From a folder: the package's own, the ``dist`` in it, or one that such a package was installed in."""
    inside = folder / "node_modules" / PACKAGE
    unpacked = folder / "package"  # as tar unpacks what npm packs
    for place in (folder, folder.parent, unpacked, inside):
        if (place / _MANIFEST).is_file() and (place / "dist" / _LOADER).is_file():
            names = {_MANIFEST: place / _MANIFEST, **{name: place / "dist" / name for name in _PUBLISHED}}
            return _runtime({name: _bytes_of(path, _MOST) for name, path in names.items()}, place)
    raise UsageError(
        f"no {PACKAGE} in this folder", where=folder, expected=f"{_MANIFEST} and dist/{_LOADER}", hint=_FETCH
    )


def _bytes_of(path: Path, most: int) -> bytes:
    try:
        return read_regular(path, most)
    except FileNotFoundError as error:
        raise _other(path.parent, f"no {path.name}") from error


def _runtime(files: Mapping[str, bytes], path: Path) -> WebRuntime:
    """The files as what they are named; UsageError where they are something else."""
    manifest, loader, wasm = (files[name] for name in (_MANIFEST, _LOADER, _WASM))
    try:
        about = json.loads(manifest)
        name, version, licence = (str(about[key]) for key in ("name", "version", "license"))
        text = loader.decode("utf-8")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _other(path, f"{type(error).__name__} while reading {_MANIFEST}") from error
    if name != PACKAGE:
        raise _other(path, name)
    numbers = _numbers(version)
    if not OLDEST <= numbers[:2] < BEFORE:
        raise UsageError(
            f"this version of {PACKAGE} does not suit", where=path, found=version,
            expected=f"from {'.'.join(map(str, OLDEST))}, before {'.'.join(map(str, BEFORE))}", hint=_FETCH,
        )  # fmt: skip
    if licence != "MIT":
        raise UsageError("the licence is not the one that featx knows", where=path, expected="MIT", found=licence)
    if version not in text or not wasm.startswith(b"\0asm"):
        raise _other(path, "files of another version" if wasm.startswith(b"\0asm") else f"no WebAssembly in {_WASM}")
    for file, sha256 in _PUBLISHED.items():
        found = hashlib.sha256(files[file]).hexdigest()
        if version == VERSION and found != sha256:
            raise UsageError(
                f"{file} is not the one that was published as {PACKAGE} {version}", where=path,
                expected=f"sha256 {sha256}", found=found, hint=f"Delete it. {_FETCH}",
            )  # fmt: skip
    return WebRuntime(version, text, wasm, path)


def _other(path: Path | str, found: str) -> UsageError:
    return UsageError(f"this is not {PACKAGE}", where=path, expected=PACKAGE, found=one_line(found)[:200], hint=_FETCH)


def _numbers(version: str) -> tuple[int, ...]:
    """Of a version; those before a release are none, as they may be anything."""
    return tuple(map(int, version.split("."))) if re.fullmatch(r"\d+\.\d+\.\d+", version) else ()


# --- fetching -----------------------------------------------------------------------------------------------------


def _by_npm() -> bytes:
    npm = shutil.which("npm")
    if npm is None:
        raise UsageError(
            "there is no npm on this machine", where="--runtime npm",
            hint=f"Where there is one, run npm pack {PACKAGE}@{VERSION}, and give the file that it makes: "
            "--runtime FILE.tgz.",
        )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="featx-") as folder:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--ignore-scripts", "--pack-destination", folder]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UsageError(f"npm did not end: {one_line(str(error))[:200]}", where="--runtime npm") from error
        made = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(made) != 1:
            said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            raise UsageError(
                f"npm could not fetch {PACKAGE}", where="--runtime npm",
                found=one_line(said[0])[:200] if said else f"exit code {done.returncode}",
                hint=f"Try it by hand: npm pack {PACKAGE}@{VERSION}",
            )  # fmt: skip
        return _bytes_of(made[0], _MOST_PACKED)


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    """Follows a server elsewhere only where nobody on the way can change what comes."""

    def redirect_request(self, *arguments: object) -> urllib.request.Request | None:
        """As the base class; UsageError for an address without https."""
        found = super().redirect_request(*arguments)  # type: ignore[arg-type]
        if found is not None:
            _check_https(found.full_url)
        return found


def _check_https(url: str) -> None:
    if urllib.parse.urlsplit(url).scheme.lower() != "https":
        raise UsageError("fetched over https only", where=f"--runtime {url}", expected="https://...")


def _download(url: str) -> bytes:
    _check_https(url)
    try:
        with urllib.request.build_opener(_OnlyHttps).open(url, timeout=30) as answer:
            content: bytes = answer.read(_MOST_PACKED + 1)
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise UsageError(f"cannot be fetched ({one_line(str(error))[:200]})", where=f"--runtime {url}") from error
    if len(content) > _MOST_PACKED:
        raise UsageError("too large", where=f"--runtime {url}", expected=f"at most {_MOST_PACKED:,} bytes")
    return content


def _packed(content: bytes, where: str) -> dict[str, bytes]:
    """The files that are used of a package as npm packs it. Nothing is written, whatever its members are named."""
    wanted = {PurePosixPath("package", _MANIFEST): _MANIFEST}
    wanted |= {PurePosixPath("package", "dist", name): name for name in _PUBLISHED}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            for member in archive:
                if member.offset_data + member.size > _MOST_UNPACKED:
                    raise _other(where, f"more than {_MOST_UNPACKED:,} bytes")
                name = wanted.get(PurePosixPath(member.name))
                if name is None or not member.isfile():
                    continue
                if member.size > _MOST:
                    raise _other(where, f"{member.size:,} bytes of {name}")
                file = archive.extractfile(member)
                assert file is not None
                found[name] = file.read()
                if len(found) == len(wanted):
                    break
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise _other(where, f"{type(error).__name__}: {error}") from error
    if missing := [name for name in wanted.values() if name not in found]:
        raise _other(where, f"a package without {missing[0]}")
    return found


def _keep(files: Mapping[str, bytes], folder: Path) -> WebRuntime:
    """Put what was fetched into the cache, if it is what it should be."""
    fetched = _runtime(files, folder)
    place = folder / fetched.version
    make_folder(place / "dist")
    for name in _PUBLISHED:
        publish_bytes(place / "dist" / name, files[name])
    publish_bytes(place / _MANIFEST, files[_MANIFEST])  # last: it is what is looked for
    return WebRuntime(fetched.version, fetched.loader, fetched.wasm, place)
