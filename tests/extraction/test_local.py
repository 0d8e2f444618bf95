"""One process for each device: what they make together, and what is left when some of them die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import storekit
from conftest import Featx, class_folders
from partkit import TWO, assert_same, computed, computed_by, fail_once, job_for, source, store, whole
from storekit import extract_part, light_backbone, start_light

from featx.backbones.backbone import Backbone
from featx.errors import FeatxError, Interrupted, MismatchError, UsageError
from featx.extraction.parts import Part, parts_of
from featx.extraction.runners import local as runners
from featx.extraction.runners.local import Job, pack, parse_devices, run_local
from featx.images.source import ImageSet
from featx.store.reader import FeatureReader
from featx.store.tools import content_hash, verify

__all__ = ["source", "store", "whole"]  # fixtures

pytestmark = pytest.mark.slow


def workers() -> list[psutil.Process]:
    """The processes of parts that are running."""
    return [
        child for child in psutil.Process().children() if "featx.extraction.runners.local" in " ".join(child.cmdline())
    ]


@pytest.mark.slow
def test_two_processes_make_what_one_makes(source: Path, store: Path, whole: Path, tmp_path: Path) -> None:
    images, job = job_for(source, store, log=tmp_path / "log")
    seen: list[tuple[int, int]] = []
    summary = run_local(images, job, TWO, progress=lambda done, total: seen.append((done, total)))
    assert (summary.images, summary.embedded, summary.reused, summary.quarantined) == (40, 40, 0, 0)
    assert summary.images_per_second == pytest.approx(40 / summary.seconds)
    assert_same(store, whole)
    assert computed(tmp_path / "log") == 40
    assert seen[0] == (0, 40)
    assert seen[-1] == (40, 40)
    assert workers() == []


@pytest.mark.slow
def test_a_killed_process_is_replaced(source: Path, store: Path, whole: Path) -> None:
    images, job = job_for(source, store, pause=0.5)
    victims: list[int] = []

    def kill_one(done: int, total: int) -> None:
        if done and not victims:
            victims.append(workers()[0].pid)
            os.kill(victims[0], signal.SIGKILL)

    summary = run_local(images, job, TWO, progress=kill_one)
    assert len(victims) == 1
    assert summary.embedded == 40
    assert_same(store, whole)


def die(backbone: Backbone, **how: Any) -> None:
    os._exit(7)


@pytest.mark.slow
def test_a_process_that_always_dies_ends_the_run(source: Path, store: Path) -> None:
    images, job = job_for(source, store, die)
    with pytest.raises(
        FeatxError, match=r"part ./2 was tried 3 times, and its process died each time: found exit code 7"
    ):
        run_local(images, job, TWO)
    assert workers() == []


@pytest.mark.slow
def test_a_device_that_fails_is_tried_again(
    source: Path, store: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, job = job_for(source, store, fail_once, flag=tmp_path / "flag")
    run_local(images, job, TWO)
    assert_same(store, whole)
    monkeypatch.setattr(runners, "RESTARTS", 0)
    images, job = job_for(source, tmp_path / "other.featx", fail_once, flag=tmp_path / "flag2")
    with pytest.raises(FeatxError, match=r"was tried 1 times.*found RuntimeError: the device is out of memory"):
        run_local(images, job, ("cpu",))


def test_an_error_of_a_part_ends_the_run_as_it_is(source: Path, store: Path) -> None:
    class Other(storekit.LightEngine):
        precision = "bf16"

    images = ImageSet.from_folder(source)
    extract_part(images, light_backbone(), store, Part.parse("1/4"), engine=Other(), workers=1)
    images, job = job_for(source, store)
    with pytest.raises(MismatchError, match="another precision"):
        run_local(images, job, TWO)


@pytest.mark.slow
def test_an_interrupt_keeps_what_was_computed(source: Path, store: Path, whole: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    images, job = job_for(source, store, log=log, pause=0.5)

    def stop(done: int, total: int) -> None:
        if done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"stopped after \d+ of 40 images. Run the same command again"):
        run_local(images, job, TWO, progress=stop)
    assert workers() == []
    first = computed(log)
    kept = sum(storekit.check_published(part.folder(store)) for part in parts_of(store))
    assert 0 < kept <= first < 40
    run_local(images, job, ("cpu",))  # with another number of devices the parts that were begun are ended
    assert computed(log) - first == 40 - kept
    assert_same(store, whole)


DRIVER = """
import sys
from pathlib import Path
from partkit import TWO, job_for
from featx.extraction.runners.local import run_local
images, job = job_for(Path(sys.argv[1]), Path(sys.argv[2]), pause=0.3)
run_local(images, job, TWO)
"""


@pytest.mark.slow
def test_processes_end_when_their_parent_is_killed(source: Path, store: Path, whole: Path) -> None:
    path = os.pathsep.join(map(str, sys.path))
    command = [sys.executable, "-c", DRIVER, str(source), str(store)]
    parent = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    family: list[psutil.Process] = []
    until = time.monotonic() + 60
    while not all((Part.parse(part).folder(store) / "manifest.json").exists() for part in ("1/2", "2/2")):
        assert time.monotonic() < until
        assert parent.poll() is None
        time.sleep(0.02)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) >= 2
    parent.kill()
    parent.wait()
    psutil.wait_procs(family, timeout=30)
    assert [process for process in family if process.is_running()] == []
    images, job = job_for(source, store)
    run_local(images, job, TWO)
    assert_same(store, whole)


def test_what_was_done_is_not_begun_again(source: Path, store: Path, whole: Path, tmp_path: Path) -> None:
    images, job = job_for(source, store, log=tmp_path / "log")
    extract_part(images, light_backbone(), store, Part.parse("2/3"), engine=storekit.LightEngine(), workers=1)
    run_local(images, job, TWO)
    assert computed(tmp_path / "log") == 40 - len(Part.parse("2/3").cut(images))
    assert_same(store, whole)


@pytest.mark.slow
@pytest.mark.parametrize("finished", [False, True], ids=["parts waiting", "parts finished"])
def test_a_backbone_that_is_named_later_is_computed(
    finished: bool, source: Path, store: Path, whole: Path, tmp_path: Path
) -> None:
    """All parts have one backbone: the run with two computes the second one, by both processes, and ends."""
    both, logs = ("tiny", "wide"), tmp_path / "logs"
    logs.mkdir()
    if finished:
        run_local(*job_for(source, store), TWO)
    else:
        for part in map(Part.parse, ("1/2", "2/2")):
            extract_part(ImageSet.from_folder(source), light_backbone(), store, part, engine=start_light, workers=1)
    summary = run_local(*job_for(source, store, backbones=both, log=logs), TWO)
    assert computed_by(logs) == {"wide": 40}
    assert summary.backbones == ("tiny", "pixels", "wide")
    storekit.extract(source, whole, backbones=both)
    assert_same(store, whole)
    one, other = FeatureReader(store), FeatureReader(whole)
    assert one.index.ids == other.index.ids
    for layer in (*both, "pixels"):
        mine, theirs = (each.read(np.arange(40), layer=layer) for each in (one, other))
        assert np.array_equal(mine, theirs) and mine.std() > 0
    assert run_local(*job_for(source, store, backbones=both, log=logs), TWO).reused == 40
    assert computed_by(logs) == {}


def test_other_settings_are_refused_where_all_parts_are_done(source: Path, store: Path) -> None:
    extract_part(
        ImageSet.from_folder(source), light_backbone(), store, Part.parse("1/1"), engine=start_light, workers=1
    )
    images, job = job_for(source, store)
    with pytest.raises(MismatchError, match="another views"):
        run_local(images, replace(job, options={"workers": 1, "views": ("center", "flip")}), TWO)
    assert run_local(images, job, TWO).embedded == 40


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0", "torch finds no GPU here.*--devices cpu,cpu"),
        ("all", "torch finds no GPU here"),
        ("cpu,0", "torch finds no GPU here"),
        ("", "--devices cannot be read"),
        ("gpu", "--devices cannot be read: expected all, or GPU numbers"),
        ("0,,1", "--devices cannot be read"),
        ("all,cpu", "--devices cannot be read"),
        ("-1", "--devices cannot be read"),
    ],
)
def test_devices_that_are_not_there(text: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "cuda_devices", lambda: 0)
    with pytest.raises(UsageError, match=problem):
        parse_devices(text)


def test_each_process_sees_its_own_gpu(source: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be told without GPUs: which one each process is given, and how the CPU's cores are shared."""
    monkeypatch.setattr(runners, "cuda_devices", lambda: 2)
    monkeypatch.setattr(runners, "available_cpus", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert parse_devices("all") == ("0", "1")
    with pytest.raises(UsageError, match="no such GPU: expected 0 to 1, found 2"):
        parse_devices("0,2")
    images = ImageSet.from_folder(source)
    places = list(runners._places(parse_devices("1, 0, cpu, cpu"), Job(store, len(images), light_backbone)))
    assert [place.environment for place in places] == [{"CUDA_VISIBLE_DEVICES": n} for n in "10"] + [{}, {}]
    assert [place.engine["device"] for place in places] == ["cuda", "cuda", "cpu", "cpu"]
    assert [place.decoders for place in places] == [2, 2, 4, 4]
    assert [place.engine.get("threads") for place in places] == [None, None, 4, 4]
    # torch counts the GPUs that this process may see from 0.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc")
    places = list(runners._places(("0", "1"), Job(store, len(images), light_backbone)))
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in places] == ["4", "GPU-abc"]


def test_images_that_cannot_be_sent_are_refused() -> None:
    with pytest.raises(UsageError, match=r"cannot be sent to other processes.*--part i/n"):
        pack(lambda: None)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--part", "1/2", "--finish"], "--part and --finish do not go together"),
        (["--part", "3/2"], "no such part: expected i/n"),
        (["--part", "1/2", "--prune"], "Give it to --finish"),
        (["--devices", "cpu"], "--devices is for --runner local"),
        (["--runner", "ray", "--devices", "cpu"], "--devices is for --runner local"),
        (["--runner", "local", "--device", "cpu"], "Use --devices cpu"),
        (["--runner", "local", "--devices", "none"], "--devices cannot be read"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from featx.cli.main import main

    photos = class_folders(tmp_path / "photos", each=1)
    monkeypatch.setattr(sys, "argv", ["featx", "extract", str(photos), "--out", str(tmp_path / "s.featx"), *options])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "s.featx").exists()


@pytest.mark.slow
def test_the_real_commands(tmp_path: Path, featx: Featx) -> None:
    photos = class_folders(tmp_path / "photos", each=5)
    (photos / "ants" / "!bad.png").write_bytes(b"no image")
    command = ["extract", photos, "--json", "--out"]
    assert featx(*command, tmp_path / "whole.featx").code == 3
    expected = content_hash(tmp_path / "whole.featx")
    store = tmp_path / "parts.featx"
    assert featx(*command, store, "--part", "1/2").code == 3
    early = featx(*command, store, "--finish")
    assert early.code == 2
    assert f"featx extract {photos} --out {store} --part 2/2" in early.json["error"]
    second = featx("extract", photos, "--out", store, "--part", "2/2")
    assert second.code == 0, second.err
    assert f"Next: when all 2 parts are done, featx extract {photos} --out {store} --finish" in second.out
    done = featx(*command, store, "--finish")
    assert done.code == 3
    assert {k: done.json[k] for k in ("images", "embedded", "reused", "quarantined")} == {
        "images": 11, "embedded": 10, "reused": 0, "quarantined": 1,
    }  # fmt: skip
    local = featx(*command, tmp_path / "local.featx", "--runner", "local", "--devices", "cpu,cpu")
    assert local.code == 3, local.err
    assert local.json["embedded"] == 10
    for made in (store, tmp_path / "local.featx"):
        assert content_hash(made) == expected
        assert verify(made) == []
    # A further backbone: by one process, by two, by parts that nobody has finished yet, and by hand.
    two = ["--backbone", "efficientnet_lite0", "--backbone", "efficientnet_lite1"]
    for part, images in (("1/2", 4), ("2/2", 6)):
        featx(*command, tmp_path / "waiting.featx", "--part", part)
        assert featx(*command, store, "--part", part, *two).json["embedded"] == images
    by_two = [*two, "--runner", "local", "--devices", "cpu,cpu"]
    ways = {"whole": two, "local": by_two, "waiting": by_two, "parts": ["--finish"]}
    hashes = set()
    for name, options in ways.items():
        ran = featx(*command, tmp_path / f"{name}.featx", *options)
        assert ran.code == 3, ran.err
        assert ran.json["embedded"] == 10 and ran.json["backbones"] == ["efficientnet_lite0", "pixels", two[-1]]
        hashes.add(content_hash(tmp_path / f"{name}.featx"))
        assert verify(tmp_path / f"{name}.featx") == []
    assert len(hashes) == 1 and hashes != {expected}
