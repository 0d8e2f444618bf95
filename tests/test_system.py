"""What differs between systems: with everything that Linux has, and without what only Linux has."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from featx import _system


def test_without_what_only_linux_has_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr(_system, "_LINUX", False)
    monkeypatch.setattr("ctypes.CDLL", None)
    monkeypatch.setattr("os.pread", None)
    before = resource.getrlimit(resource.RLIMIT_AS)
    assert _system.available_cpus() == os.cpu_count()
    _system.confine()
    with _system.limited_memory(1):
        assert len(bytearray(2**24)) == 2**24
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_memory_is_limited_and_given_back() -> None:
    code = """
from featx import _system
with _system.limited_memory(64 * 2**20):
    try:
        bytearray(2**28)
    except MemoryError:
        print("refused")
print(len(bytearray(2**28)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused", str(2**28)]


def test_a_lock_is_one_writers_or_all_readers(tmp_path: Path) -> None:
    first, second, third = (os.open(tmp_path, os.O_RDONLY) for _ in range(3))
    try:
        _system.lock(first, shared=True)
        _system.lock(second, shared=True)
        with pytest.raises(BlockingIOError):
            _system.lock(third)
    finally:
        for handle in (first, second, third):
            os.close(handle)


def test_descriptors_are_raised_as_far_as_the_system_allows() -> None:
    code = """
import resource
from featx._system import allow_descriptors
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))
print(allow_descriptors(50), allow_descriptors(150), allow_descriptors(1000))
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["100", "150", "200", "200", "200"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a class for what stands back")
def test_what_stands_back_runs_only_on_an_idle_processor() -> None:
    code = "from featx import _system; import os; _system.stand_back(); print(os.nice(0), os.sched_getscheduler(0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["19", str(os.SCHED_IDLE)]
