"""Extraction and sweep on a real Ray cluster of two workers on this machine; one of them is killed in the middle."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import storekit
from conftest import TESTS, Featx, class_folders
from partkit import assert_same, computed, computed_by, fail_once, job_for, source, store, whole
from storekit import extract_part, light_backbone, start_light

from featx.errors import FeatxError, Interrupted, MismatchError, UsageError
from featx.evaluation.sweep import sweep_heads
from featx.extraction.parts import Part, parts_of
from featx.extraction.runners.local import Job
from featx.extraction.runners.ray import connected, joblib_on_ray, run_ray
from featx.images.source import ImageSet
from featx.store.tools import content_hash

__all__ = ["source", "store", "whole"]  # fixtures

ray: Any = pytest.importorskip("ray", reason="Ray is not installed: pip install 'featx[ray]'")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray's sockets and processes
]

# Ray 2.60 ended one driver of some 500 so, without a word from its handler: before it was connected, or afterwards.
CRASH = -signal.SIGSEGV


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Two workers of one core each; the address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), *filter(None, sys.path)]))
        ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
        try:
            yield ray.get_runtime_context().gcs_address
        finally:
            ray.shutdown()


def busy_workers() -> list[psutil.Process]:
    """Ray's processes that run a task of ours just now: they say so in their names."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie's parent has not noticed yet
            if process.cmdline()[:1] == ["ray::_do_part"]:
                found.append(process)
    return found


@pytest.mark.slow
def test_the_cluster_makes_what_one_process_makes_though_a_worker_is_killed(
    cluster: str, source: Path, store: Path, whole: Path
) -> None:
    images, job = job_for(source, store, pause=0.6)
    victims: list[int] = []
    seen: list[tuple[int, int]] = []

    def kill_one() -> None:
        while not (busy := busy_workers()):
            time.sleep(0.02)
        time.sleep(0.5)  # into its work, of which there are seconds
        victims.append(busy[0].pid)
        os.kill(victims[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    summary = run_ray(images, job, progress=lambda done, total: seen.append((done, total)))
    killer.join()
    assert len(victims) == 1
    assert (summary.images, summary.embedded, summary.reused) == (40, 40, 0)
    assert_same(store, whole)
    assert seen[0] == (0, 40)
    assert seen[-1] == (40, 40)
    # Nothing is left to do: no task is begun.
    log = store.with_name("log")
    assert run_ray(images, job_for(source, store, log=log)[1]).reused == 40
    assert not log.exists()


@pytest.mark.slow
def test_a_backbone_that_is_named_later_is_computed(cluster: str, source: Path, store: Path, whole: Path) -> None:
    """By parts that are waiting with one, and again over the store that was made of them."""
    for part in map(Part.parse, ("1/2", "2/2")):
        extract_part(ImageSet.from_folder(source), light_backbone(), store, part, engine=start_light, workers=1)
    logs, names = store.with_name("logs"), ("tiny", "wide", "third")
    logs.mkdir()
    for count in (2, 3):
        storekit.extract(source, whole, backbones=names[:count])
        run_ray(*job_for(source, store, backbones=names[:count], log=logs))
        assert computed_by(logs) == {names[count - 1]: 40}
        assert_same(store, whole)


@pytest.mark.slow
def test_what_a_task_fails_with(cluster: str, source: Path, store: Path, whole: Path, tmp_path: Path) -> None:
    images, job = job_for(source, store, fail_once, flag=tmp_path / "flag")
    run_ray(images, job)  # anything but an error of featx is tried again
    assert_same(store, whole)

    class Other(storekit.LightEngine):
        precision = "bf16"

    other = tmp_path / "other.featx"
    extract_part(images, light_backbone(), other, Part.parse("1/3"), engine=Other(), workers=1)
    with pytest.raises(MismatchError, match="another precision"):
        run_ray(images, job_for(source, other)[1])
    images, job = job_for(source, tmp_path / "never.featx", always)
    with pytest.raises(FeatxError, match=r"part ./2 was tried 3 times.*the device is gone"):
        run_ray(images, job)


def always(backbone: Any, **how: Any) -> None:
    raise RuntimeError("the device is gone")


@pytest.mark.slow
def test_an_interrupt_keeps_what_was_computed(
    cluster: str, source: Path, store: Path, whole: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    images, job = job_for(source, store, log=log, pause=1.5)

    def stop(done: int, total: int) -> None:
        if done >= 9:  # by then one of the two has computed a batch of four
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"stopped after \d+ of 40 images. Run the same command again"):
        run_ray(images, job, progress=stop)
    first = computed(log)
    kept = sum(storekit.check_published(part.folder(store)) for part in parts_of(store))
    assert 0 < kept <= first < 40
    images, job = job_for(source, store, log=log)
    run_ray(images, job)
    assert computed(log) - first == 40 - kept
    assert_same(store, whole)


def test_what_the_cluster_cannot_do_is_said(cluster: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = ImageSet.from_folder(source)
    job = Job(Path("relative.featx"), len(images), light_backbone, partial(start_light))
    with pytest.raises(UsageError, match=r"relative\.featx: a relative path, which other hosts cannot know"):
        run_ray(images, job)
    with pytest.raises(UsageError, match="the Ray cluster has no GPU"):
        run_ray(images, job_for(source, source / "s.featx")[1], device="cuda")


def test_without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", nothing)
    handler = signal.getsignal(signal.SIGTERM)
    no_cluster = r"no Ray cluster to work on: found Could not.* Start one \(ray start"
    with pytest.raises(UsageError, match=no_cluster), connected():
        pass
    assert signal.getsignal(signal.SIGTERM) is handler
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"Ray is not installed. Install it: pip install 'featx\[ray\]'"), connected():
        pass


def driver(program: str, cluster: str) -> subprocess.CompletedProcess[str]:
    """Run a program that connects to the cluster; once more where Ray crashed it before it had answered."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    env = {**os.environ, "RAY_ADDRESS": cluster}
    for _ in range(2):
        run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if run.returncode != CRASH or run.stdout:
            break
    return run


@pytest.mark.slow
def test_what_ray_says_is_not_in_the_way_of_the_answer(cluster: str) -> None:
    program = """
        import io, os, sys, time
        from featx.extraction.runners.ray import connected
        sys.stderr = said = io.StringIO()
        with connected() as ray:
            ray.wait([ray.remote(lambda: os._exit(1)).options(max_retries=0).remote()])
            end = time.monotonic() + 30
            while "worker died" not in said.getvalue() and time.monotonic() < end:
                time.sleep(0.1)
        print("worker died" in said.getvalue(), ray.is_initialized())
    """
    run = driver(program, cluster)
    assert (run.stdout, run.returncode) == ("True False\n", 0), run.stderr


def test_a_crash_after_the_connection_says_where(cluster: str) -> None:
    program = """
        import faulthandler, os, signal
        from featx.extraction.runners.ray import connected
        faulthandler.enable()
        with connected():
            pass
        print("disconnected", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    """
    run = driver(program, cluster)
    assert (run.stdout, run.returncode) == ("disconnected\n", -signal.SIGSEGV), run.stderr
    assert "Fatal Python error: Segmentation fault" in run.stderr
    assert 'File "<string>", line 8 in <module>' in run.stderr


@pytest.mark.slow
def test_a_sweep_on_the_cluster_is_the_ordinary_sweep(cluster: str) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 12)
    rows = (rng.normal(size=(36, 24)) + 2 * np.eye(3, 24)[labels]).astype(np.float32)
    how: dict[str, Any] = {"class_names": "abc", "heads": ["logreg", "ridge"], "shots": [1, 5], "episodes": 3}
    here = sweep_heads(rows, labels, n_jobs=1, **how)
    with joblib_on_ray():
        there = sweep_heads(rows, labels, n_jobs=-1, **how)
    assert len(here.trials) == len(there.trials) == 12
    for one, other in zip(here.trials, there.trials, strict=True):
        assert (one.head, one.n_shots, one.episode, one.params) == (
            other.head, other.n_shots, other.episode, other.params,
        )  # fmt: skip
        assert np.array_equal(one.predictions, other.predictions)
        assert one.accuracy == other.accuracy


@pytest.mark.slow
def test_the_real_commands(cluster: str, tmp_path: Path, featx: Featx) -> None:
    photos = class_folders(tmp_path / "photos", each=6)
    env = {"RAY_ADDRESS": cluster}
    assert featx("extract", photos, "--out", tmp_path / "whole.featx").code == 0
    store = tmp_path / "ray.featx"
    extract = ["extract", "photos", "--out", "ray.featx", "--runner", "ray", "--json"]
    done = featx(*extract, cwd=tmp_path, env=env)
    if done.code == CRASH:  # nothing is lost by it: the same command goes on
        done = featx(*extract, cwd=tmp_path, env=env)
    assert done.code == 0, done.err
    assert done.json["embedded"] + done.json["reused"] == 12
    assert content_hash(store) == content_hash(tmp_path / "whole.featx")
    sweep = ["sweep", store, "--heads", "logreg", "--shots", "1,2", "--episodes", "2", "--json"]
    ordinary = featx(*sweep, "--out", tmp_path / "a")
    on_ray = featx(*sweep, "--out", tmp_path / "b", "--backend", "ray", env=env)
    if on_ray.code == CRASH:
        on_ray = featx(*sweep, "--out", tmp_path / "c", "--backend", "ray", env=env)
    assert on_ray.code == 0, on_ray.err
    for one, other in zip(ordinary.json["results"], on_ray.json["results"], strict=True):
        assert {**one, "fit_seconds": 0} == {**other, "fit_seconds": 0}
