"""Decoding processes: ones that crash, hang, do not start, lose their parent or are stopped half-way.

The faults are injected into real child processes, by a ``sitecustomize.py`` on their path that breaks Pillow for
files with a marker in them.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import storekit
from conftest import TESTS, Featx, picture
from imagekit import pixels
from storekit import PREPROCESS, light_backbone, png_folders, refused_of

from featx.errors import FeatxError
from featx.extraction.run import extract_features
from featx.images.pixels import encode
from featx.images.pool import Decoded, DecoderPool, TooHeavy, _Child
from featx.images.source import ImageSet
from featx.store.reader import read_features
from featx.store.tools import verify

BROKEN = """
import os, signal, sys, time
if sys.argv[0] == "-c" and len(sys.argv) == 3:  # a decoding process
    import PIL.Image
    import PIL.PngImagePlugin
    real = PIL.Image.open
    def open(source, *arguments, **options):
        data = source.getvalue()
        if b"CRASH-ONCE" in data and not os.path.exists({flag!r}):
            with __import__("builtins").open({flag!r}, "w"):
                pass
            os.kill(os.getpid(), signal.SIGSEGV)
        if data.endswith(b"SEGV"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if data.endswith(b"EXIT"):
            os._exit(0)
        if data.endswith(b"HANG"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
            while True:
                time.sleep(1000)
        if data.endswith(b"GREED"):
            bytearray(8 << 30)
        if data.endswith(b"NOISE"):
            os.write(2, b"native noise\\n" * 100)
        if data.endswith(b"MEMORY"):
            raise MemoryError
        return real(source, *arguments, **options)
    PIL.Image.open = open
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Decoding processes break on marked files; the folder of the sitecustomize."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BROKEN.replace("{flag!r}", repr(str(tmp_path / "flag"))))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def mark(path: Path, word: bytes) -> Path:
    """Bytes after the end of a PNG do not matter to a decoder."""
    path.write_bytes(path.read_bytes() + word)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return png_folders(tmp_path / "photos", 12)


def files(source: Path) -> list[Path]:
    return sorted(source.rglob("*.png"))


def nothing_known(digest: bytes) -> bool:
    return False


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def handles() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else psutil.Process().num_fds()  # noqa: PTH208, PTH112


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No process, no zombie and no open file stays behind, whatever a test does."""
    gc.collect()
    before, open_files = children(), handles()
    yield
    gc.collect()
    assert children() <= before
    assert handles() <= open_files


def eventually(condition: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_pixels_are_those_of_the_decoder_in_order(source: Path) -> None:
    paths = files(source) * 5
    with DecoderPool(PREPROCESS, workers=3) as pool:
        done = list(pool.run(paths, nothing_known, ahead=7))
    assert len(done) == 60
    for path, decoded in zip(paths, done, strict=True):
        assert decoded.refusal is None and decoded.pixels is not None
        assert np.array_equal(decoded.pixels, pixels(path.read_bytes(), PREPROCESS))


@pytest.mark.slow
def test_crashes_and_hangs_cost_their_file_only(source: Path, broken: Path, tmp_path: Path) -> None:
    """12 files: 3 crash, 1 leaves, 2 hang, 1 has no memory, 1 crashes once only; two of them one after the other."""
    paths = files(source)
    words = {0: b"SEGV", 1: b"SEGV", 3: b"HANG", 5: b"EXIT", 6: b"CRASH-ONCE", 8: b"HANG", 10: b"MEMORY", 11: b"SEGV"}
    for number, word in words.items():
        mark(paths[number], word)
    store = tmp_path / "s.featx"
    summary = extract_features(
        ImageSet.from_folder(source),
        light_backbone(),
        store,
        engine=storekit.LightEngine(),
        workers=2,
        decode_timeout=1.0,
        max_bad=0.9,
    )
    assert (summary.embedded, summary.quarantined) == (5, 7)
    reasons = {item.id: (item.reason, len(item.digest)) for item in refused_of(store)}
    crash, hang = ("decoder_crash", 64), ("decoder_timeout", 64)
    expected = {0: crash, 1: crash, 3: hang, 5: crash, 8: hang, 10: crash, 11: crash}
    assert reasons == {paths[k].relative_to(source).as_posix(): reason for k, reason in expected.items()}
    assert verify(store) == []
    for name, row in zip(read_features(store).ids, read_features(store).embeddings, strict=True):
        (good,) = next(iter(storekit.LightEngine().embed([pixels((source / name).read_bytes(), PREPROCESS)[None]])))
        assert np.array_equal(row, good[0])


@pytest.mark.slow
def test_the_real_command_survives_a_crash(source: Path, broken: Path, tmp_path: Path, featx: Featx) -> None:
    mark(files(source)[4], b"SEGV")
    ran = featx("extract", source, "--out", tmp_path / "s.featx", "--json")
    assert ran.code == 3
    assert (ran.json["embedded"], ran.json["quarantined"]) == (11, 1)
    assert "decoder_crash, the decoder ended twice on this image" in ran.err


def test_native_noise_stays_inside(source: Path, broken: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mark(files(source)[0], b"NOISE")
    with DecoderPool(PREPROCESS, workers=1) as pool:
        (done,) = pool.run(files(source)[:1], nothing_known, ahead=1)
    assert done.refusal is None
    assert capfd.readouterr() == ("", "")


def test_children_that_do_not_start_are_no_fault_of_the_images(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import os, sys\nos.write(2, b'no luck today\\n')\nos._exit(7)\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    with (
        DecoderPool(PREPROCESS, workers=2) as pool,
        pytest.raises(FeatxError, match="a decoding process does not start: found no luck today"),
    ):
        list(pool.run(files(source), nothing_known, ahead=4))


def test_no_python_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(FeatxError, match=r"cannot be started .No such file"):
        DecoderPool(PREPROCESS, workers=3)


def test_the_third_child_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    started = 0
    real = subprocess.Popen

    def popen(*arguments: object, **options: object) -> object:
        nonlocal started
        started += 1
        if started == 3:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return real(*arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(FeatxError, match="Try fewer of them: --workers 1"):
        DecoderPool(PREPROCESS, workers=4)


def test_modules_in_the_working_folder_are_not_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("numpy", "PIL", "json", "socket", "featx"):
        (trap / f"{name}.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    monkeypatch.chdir(trap)
    with DecoderPool(PREPROCESS, workers=1) as pool:
        assert next(pool.run(files(source)[:1], nothing_known, ahead=1)).refusal is None
    assert not (tmp_path / "sprung").exists()


@pytest.mark.slow
def test_children_killed_while_idle_are_replaced(source: Path) -> None:
    with DecoderPool(PREPROCESS, workers=2) as pool:
        for path in files(source):
            for child in pool._children:
                os.kill(child._process.pid, signal.SIGKILL)
            (done,) = pool.run([path], nothing_known, ahead=1)
            assert done.refusal is None
        assert all(item.refusal is None for item in pool.run(files(source), nothing_known, ahead=4))


@pytest.mark.slow
def test_stopping_half_way_20_times(source: Path, broken: Path) -> None:
    """At any moment: while children start, decode, crash, are restarted, or hang (a hanging file in each)."""
    paths = files(source)
    mark(paths[2], b"SEGV")
    mark(paths[5], b"HANG")
    for number in range(20):
        began = time.monotonic()
        with DecoderPool(PREPROCESS, workers=3, timeout=60) as pool:
            stream = pool.run(paths * 3, nothing_known, ahead=9)
            for _ in range(number % 5):
                next(stream)
            time.sleep(0.01 * (number % 7))
        assert time.monotonic() - began < 20


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "hanging"])
def test_children_end_with_a_parent_that_is_killed(busy: bool, source: Path, broken: Path) -> None:
    mark(files(source)[0], b"HANG")
    code = f"""
import sys, time
sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
from storekit import PREPROCESS
from featx.images.pool import DecoderPool
pool = DecoderPool(PREPROCESS, workers=2, timeout={600.0 if sys.platform == "linux" else 1.0})
paths = [Path(p) for p in {[str(p) for p in files(source)]!r}]
first = next(pool.run(paths[1:3], lambda d: False, ahead=1))
print(first.refusal, *(child._process.pid for child in pool._children), flush=True)
if {busy}:
    pool.timeout = 1000
    for child in pool._children:
        child.timeout = 1000.0  # the parent's patience; the children were told one second
    pool._threads.submit(pool._one, paths[0], lambda d: False)
    pool._threads.submit(pool._one, paths[0], lambda d: False)
    time.sleep(0.3)
    print("busy", flush=True)
time.sleep(1000)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    refusal, *pids = parent.stdout.readline().split()
    assert refusal == "None" and len(pids) == 2
    assert not busy or parent.stdout.readline() == "busy\n"
    parent.kill()
    parent.communicate()

    def gone(pid: str) -> bool:
        try:
            return bool(psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE)  # ours to reap no more
        except psutil.NoSuchProcess:
            return True

    eventually(lambda: all(map(gone, pids)))


def test_odd_files(tmp_path: Path) -> None:
    """14 files that are none, cannot be read, or are called what no file should be: each refused with its reason."""
    png = tmp_path / "good.png"
    storekit.write_png(png, 1)
    odd: dict[Path, str | None] = {png: None, tmp_path / "none.png": "missing", tmp_path: "unreadable"}
    odd[Path("/dev/zero")] = "unreadable"
    os.mkfifo(tmp_path / "pipe.png")
    odd[tmp_path / "pipe.png"] = "unreadable"
    (tmp_path / "empty.png").touch()
    odd[tmp_path / "empty.png"] = "empty"
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(3 * 2**30)
    odd[tmp_path / "huge.png"] = "too_large"
    (tmp_path / "loop.png").symlink_to("loop.png")
    odd[tmp_path / "loop.png"] = "unreadable"
    odd[tmp_path / ("n" * 300)] = "unreadable"
    odd[Path(str(tmp_path) + "/a" * 4000)] = "unreadable"
    odd[Path(str(tmp_path) + "/\0.png")] = "unreadable"
    odd[tmp_path / "\ud800.png"] = "bad_name"
    for name in ("line\nend.png", os.fsdecode(b"caf\xe9.png")):
        (tmp_path / name).write_bytes(png.read_bytes())
        odd[tmp_path / name] = None
    with DecoderPool(PREPROCESS, workers=2) as pool:
        done = list(pool.run(odd, nothing_known, ahead=4))
    found = [item.refusal.reason if item.refusal else None for item in done]
    assert found == list(odd.values())


@pytest.mark.slow
def test_names_that_are_no_text(tmp_path: Path, featx: Featx) -> None:
    """Folder and file names in Latin-1, lone surrogates and zero bytes in a list, labels of 5,000 bytes."""
    source = png_folders(tmp_path / "photos", 4)
    storekit.write_png(source / "ants" / os.fsdecode(b"caf\xe9.png"), 50)
    (source / os.fsdecode(b"\xff")).mkdir()
    storekit.write_png(source / os.fsdecode(b"\xff") / "x.png", 51)
    ran = featx("extract", source, "--out", tmp_path / "s.featx", "--json", "--weights", "none")
    assert (ran.code, ran.json["embedded"], ran.json["quarantined"]) == (3, 4, 2)
    assert {item.reason for item in refused_of(tmp_path / "s.featx")} == {"bad_name"}
    assert read_features(tmp_path / "s.featx").class_names == ("ants", "bees")
    assert verify(tmp_path / "s.featx") == []

    rows = [{"path": f"photos/{p.relative_to(source).as_posix()}", "label": p.parent.name} for p in files(source)[:3]]
    rows += [
        {"path": "photos/bees/000001.png", "label": "b" * 5000},
        {"path": "photos/bees/000003.png", "label": "a\0"},
    ]
    rows = [row for row in rows if "\udce9" not in row["path"]]
    rows = list({row["path"]: row for row in rows}.values())
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = ImageSet.from_source(tmp_path / "list.jsonl")
    summary = extract_features(images, light_backbone(), tmp_path / "t.featx", engine=storekit.LightEngine(), workers=1)
    assert summary.quarantined == 2
    assert {item.reason for item in refused_of(tmp_path / "t.featx")} == {"bad_name"}
    assert verify(tmp_path / "t.featx") == []


def test_known_content_is_not_decoded(source: Path, broken: Path) -> None:
    mark(files(source)[0], b"SEGV")
    with DecoderPool(PREPROCESS, workers=1) as pool:
        (done,) = pool.run(files(source)[:1], lambda digest: True, ahead=1)
    assert isinstance(done, Decoded) and done.pixels is None and done.refusal is None


@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
def test_children_know_no_secrets_and_gain_no_privileges(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEATX_API_KEY", "AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_KEY", "HF_TOKEN", "SOME_PASSWORD"):
        monkeypatch.setenv(name, "secret-of-mine")
    with DecoderPool(PREPROCESS, workers=1) as pool:
        assert next(pool.run(files(source)[:1], nothing_known, ahead=1)).refusal is None
        proc = Path(f"/proc/{pool._children[0]._process.pid}")
        assert b"secret-of-mine" not in (proc / "environ").read_bytes()
        assert "NoNewPrivs:\t1" in (proc / "status").read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_memory_is_limited_and_is_enough(source: Path, broken: Path) -> None:
    """What takes 8 GiB ends; the greediest format at the limit of the service's pixels is decoded."""
    webp = bytes.fromhex("524946461a000000574542505650384c0d0000002f57dbd516071011118888fe0700")  # 49 megapixels
    with DecoderPool(PREPROCESS, workers=1, max_pixels=49_000_000, timeout=120) as pool:
        (greedy,) = pool.run([mark(files(source)[0], b"GREED")], nothing_known, ahead=1)
        assert greedy.refusal is not None and greedy.refusal.reason == "decoder_crash"
        decoded = pool.decode(webp, wanted=lambda: True)
        assert decoded is not None and decoded.pixels is not None


@pytest.mark.slow
def test_bytes_at_hand_are_tried_once_and_only_while_wanted(source: Path, broken: Path) -> None:
    hanging, good = files(source)[0].read_bytes() + b"HANG", files(source)[1].read_bytes()
    with DecoderPool(PREPROCESS, workers=1, timeout=2.0) as pool:
        refused = pool.decode(hanging, wanted=lambda: True)
        assert refused is not None and refused.refusal is not None
        assert refused.refusal.what == "the decoder did not finish within 2 s"
        assert pool.decode(hanging, wanted=lambda: False) is None
        pool.prepare()
        with pytest.raises(TooHeavy):
            pool.decode(good, wanted=lambda: True, heaviest=10)
        decoded = pool.decode(good, wanted=lambda: True, heaviest=10**6)
        assert decoded is not None and decoded.pixels is not None
        assert np.array_equal(decoded.pixels, pixels(good, PREPROCESS))


@pytest.mark.slow
@pytest.mark.parametrize("at_hand", [False, True])
def test_what_was_not_read_of_one_image_is_no_answer_about_the_next(
    at_hand: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent lacks memory for the pixels, and leaves them in the socket; black ones look like short messages."""
    black, other = tmp_path / "black.png", tmp_path / "other.png"
    black.write_bytes(encode(np.zeros((40, 40, 3), np.uint8)))
    other.write_bytes(encode(np.asarray(picture(1))))

    def fail(child: _Child, view: memoryview) -> None:
        raise MemoryError

    with DecoderPool(PREPROCESS, workers=1) as pool:

        def ask(path: Path) -> Decoded | None:
            if at_hand:
                return pool.decode(path.read_bytes(), wanted=lambda: True)
            return next(pool.run([path], lambda digest: False, ahead=1))

        with monkeypatch.context() as patched:
            patched.setattr(_Child, "_fill", fail)
            with pytest.raises(MemoryError):
                ask(black)
        decoded = ask(other)
        assert decoded is not None and decoded.pixels is not None
        assert np.array_equal(decoded.pixels, pixels(other.read_bytes(), PREPROCESS))


@pytest.mark.slow
def test_metadata_that_takes_long_makes_an_image_heavy_and_then_refused() -> None:
    """In seconds of a processor, so a busy machine changes nothing; chunks before the pixels, and after them."""
    good = encode(np.asarray(picture(1)))
    idat = good.index(b"IDAT") - 4
    chunks = b"\0\0\0\0teSt" + struct.pack(">I", zlib.crc32(b"teSt"))
    with DecoderPool(PREPROCESS, workers=1) as pool:
        for place in (idat, len(good) - 12):
            costly = good[:place] + chunks * 500_000 + good[place:]
            with pytest.raises(TooHeavy):
                pool.decode(costly, wanted=lambda: True, heaviest=10**6)
            refused = pool.decode(costly, wanted=lambda: True)
            assert refused is not None and refused.refusal is not None
            assert (refused.refusal.reason, refused.pixels) == ("too_costly", None)
            assert refused.refusal.what.startswith("its header or metadata is far larger than a photo's")
            decoded = pool.decode(good, wanted=lambda: True, heaviest=10**6)  # by the same process
            assert decoded is not None and decoded.pixels is not None
            assert np.array_equal(decoded.pixels, pixels(good, PREPROCESS))
