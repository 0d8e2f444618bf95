"""OpenVINO's cache and telemetry."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from enginekit import Array, on_cpu, random_batches, small

from featx.backbones.backbone import Backbone, load_backbone
from featx.backbones.engines import choice as engines, graph as graphs
from featx.backbones.engines.graph import Graph
from featx.backbones.hub import cache_folder

__all__ = ["small"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")


pytestmark_openvino = pytest.mark.skipif(not engines._installed("openvino"), reason="no openvino")


def _one(backbone: Backbone) -> Array:
    result: Array = next(on_cpu(backbone, "openvino", batch_size=2).embed(random_batches(backbone, 2)))[0]
    return result


@pytest.mark.slow
@pytestmark_openvino
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:999] + bytes([content[999] ^ 1]) + content[1000:],
        lambda content: b"x" + content[1:],
        lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
    ],
    ids=["short", "empty", "header", "bit", "magic", "length"],
)  # fmt: skip
def test_a_damaged_cache_file_is_made_again(small: Backbone, damage: Callable[[bytes], bytes]) -> None:
    expected = _one(small)
    path = graphs.cache_file(small)
    content = path.read_bytes()
    path.write_bytes(damage(content))
    np.testing.assert_array_equal(_one(small), expected)
    assert Graph.read(path) is not None
    assert [file.name for file in path.parent.iterdir() if file.name.startswith(".") and path.name in file.name] == []


@pytest.mark.slow
@pytestmark_openvino
def test_no_bit_of_the_header_can_be_altered(small: Backbone) -> None:
    _one(small)
    content = graphs.cache_file(small).read_bytes()  # not altered there: other tests' processes would mend the file
    for bit in range(8 * 64):  # magic, hash, length, and the start of the graph
        altered = bytearray(content)
        altered[bit // 8] ^= 1 << bit % 8
        assert Graph.parse(bytes(altered)) is None, bit
    assert Graph.parse(content) is not None


@pytestmark_openvino
def test_the_cache_tells_apart_what_differs(small: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(backbone: Backbone, batch_size: int | None = None) -> str:
        return graphs.cache_file(backbone, batch_size).name

    from dataclasses import replace

    mean = replace(small.preprocess, mean=(0.1, 0.2, 0.3))
    names = {
        name(small),
        name(small, 4),
        name(replace(small, layers=("features",))),
        name(replace(small, preprocess=mean)),
        name(replace(small, weights_sha256="1" * 64)),
        name(replace(small, name="squeezenet1_0")),
    }
    monkeypatch.setattr(graphs, "version", lambda package: "0")
    names.add(name(small))
    assert len(names) == 7
    assert name(replace(small, weights="moved.pth", file=Path("elsewhere"))) == name(small)


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"FEATX_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"FEATX_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/featx"),
        ({"FEATX_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/featx"),
    ],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


@pytest.mark.slow
@pytestmark_openvino
def test_a_cache_that_cannot_be_written_is_said(
    small: Backbone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = _one(small)
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="cannot write to the cache folder .* Set FEATX_CACHE"):
        found = _one(small)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
@pytestmark_openvino
def test_a_second_start_imports_no_torch(tmp_path: Path) -> None:
    on_cpu(load_backbone(), "openvino", batch_size=2)
    code = (
        "import sys, numpy as np; from featx import load_backbone, make_engine;"
        "engine = make_engine(load_backbone(), engine='openvino', batch_size=2);"
        "(result,) = engine.embed([np.zeros((1, 224, 224, 3), np.uint8)]);"
        "assert result[0].shape == (1, 1280);"
        "assert not {'torch', 'torchvision', 'timm', 'openvino_telemetry'} & set(sys.modules)"
    )
    env = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=env)
    assert not list(tmp_path.iterdir())  # telemetry would have left ~/intel


@pytestmark_openvino
def test_openvino_never_gets_its_telemetry(tmp_path: Path) -> None:
    code = (
        "import sys; from featx.backbones.engines.graph import import_openvino; import_openvino();"
        "from openvino.tools.ovc import convert_impl, telemetry_utils, utils;"
        "names = {module.tm.__name__ for module in (convert_impl, telemetry_utils, utils)};"
        "assert names == {'openvino.tools.ovc.telemetry_stub'}, names;"
        "assert 'openvino_telemetry' not in sys.modules"
    )
    env = {k: v for k, v in os.environ.items() if k != "CI"} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=env)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytestmark_openvino
def test_threads_that_convert_at_once_get_the_same_network(
    small: Backbone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = _one(small)
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path))
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: _one(small), range(4)):
            np.testing.assert_array_equal(found, expected)
