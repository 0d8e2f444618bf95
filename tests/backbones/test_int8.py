"""Networks at eight bits: those that come with featx, those that are quantised here, and how they travel."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from enginekit import cosines, on_cpu, small
from imagekit import pixels

from featx.backbones.backbone import Backbone, load_backbone
from featx.backbones.catalogue import INT8, INT8_LOSS
from featx.backbones.engines import choice as engines, graph as graphs
from featx.backbones.engines.choice import make_engine
from featx.backbones.engines.graph import Graph, carried, check_network, quantised_file
from featx.backbones.provenance import provenance_of
from featx.backbones.recipes import RECIPES
from featx.errors import UsageError
from featx.store.manifest import fingerprint

__all__ = ["small"]  # a fixture

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not engines._installed("openvino"), reason="no openvino"),
]


@pytest.fixture(scope="module")
def pictures(photos: Path) -> np.ndarray:
    files = sorted((photos / "hymenoptera").rglob("*.jpg"))[::16][:24]
    return np.stack([pixels(file.read_bytes(), load_backbone().preprocess) for file in files])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RECIPES["best"].backbones))
def test_the_networks_of_the_recipes_come_quantised(name: str) -> None:
    for layers in (("penultimate",), RECIPES["best"].backbones[name]):
        backbone = load_backbone(name, layers=layers)
        graph = carried(backbone)
        assert graph is not None
        engine = make_engine(backbone, engine="openvino", precision="int8", batch_size=1)
        assert engine.precision == "int8"
        assert provenance_of(backbone, engine)["quantised_sha256"] == graph.sha256
    assert carried(replace(backbone, weights_sha256="0" * 64)) is None
    assert carried(load_backbone(name, layers=("blocks.3",))) is None


@pytest.mark.slow
def test_int8_is_near_to_single_precision_on_photos(pictures: np.ndarray) -> None:
    backbone = load_backbone()
    exact, quantised = (
        next(make_engine(backbone, engine="openvino", precision=precision, batch_size=24).embed([pictures]))[0]
        for precision in ("fp32", "int8")
    )
    found = cosines(exact, quantised)
    assert 0.98 < np.median(found) < 0.9999
    assert found.min() > 0.9
    gaps = np.linalg.norm(exact[:, None] - exact[None], axis=2) + np.diag(np.full(len(exact), np.inf))
    assert (np.linalg.norm(exact - quantised, axis=1) < gaps.min(axis=1)).mean() > 0.9  # nearer than any other photo


@pytest.mark.slow
def test_a_layer_is_the_same_whatever_else_is_asked_for(pictures: np.ndarray) -> None:
    alone, among = (
        next(make_engine(load_backbone(layers=layers), precision="int8", batch_size=24).embed([pictures]))
        for layers in (("penultimate",), ("blocks.5", "penultimate"))
    )
    np.testing.assert_array_equal(alone[0], among[1])


_ON_OTHER_CPU = """
import sys, numpy as np
from featx import load_backbone, make_engine
engine = make_engine(load_backbone(), engine="openvino", precision="int8", batch_size=24)
np.save(sys.argv[2], next(engine.embed([np.load(sys.argv[1])]))[0])
assert "torch" not in sys.modules
"""


def _on_cpu_with(instructions: str, pictures: np.ndarray, tmp_path: Path) -> np.ndarray:
    """Embeddings as a CPU with these instructions and no later ones computes them; "" for all that this one has."""
    found = tmp_path / f"{instructions}.npy"
    np.save(tmp_path / "pictures.npy", pictures)
    command = [sys.executable, "-c", _ON_OTHER_CPU, str(tmp_path / "pictures.npy"), str(found)]
    limit = {"ONEDNN_MAX_CPU_ISA": instructions} if instructions else {}
    subprocess.run(command, check=True, env={**os.environ, **limit})
    return np.load(found)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_all_x86_cpus_give_the_same_numbers(tmp_path: Path, pictures: np.ndarray) -> None:
    here = _on_cpu_with("", pictures, tmp_path)  # with AMX this would differ, if it were used
    for instructions in ("AVX2", "AVX512_CORE"):
        assert cosines(here, _on_cpu_with(instructions, pictures, tmp_path)).min() > 0.99999


@pytest.mark.slow
def test_a_cpu_with_amx_is_near_if_a_user_asks_for_it(tmp_path: Path, pictures: np.ndarray) -> None:
    amx, without = (_on_cpu_with(name, pictures, tmp_path) for name in ("AVX512_CORE_AMX", "AVX512_CORE_FP16"))
    assert cosines(amx, without).min() > 0.998


def test_limiting_instructions_is_not_for_child_processes() -> None:
    make_engine(load_backbone(), precision="int8", batch_size=1)
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ


@pytest.mark.slow
def test_auto_takes_int8_where_cpu_and_figures_allow_it(monkeypatch: pytest.MonkeyPatch, small: Backbone) -> None:
    monkeypatch.setattr(engines, "has_int8", lambda: True)
    monkeypatch.setattr(engines, "_cuda", lambda: False)
    known = [name for name, row in INT8.items() if row.loss <= INT8_LOSS]
    assert "efficientnet_lite0" in known
    for name in known:
        assert make_engine(load_backbone(name), batch_size=1).precision == "int8"
    assert make_engine(load_backbone(), batch_size=1, engine="torch").precision == "fp32"
    assert make_engine(small, batch_size=1).precision == "fp32"
    assert make_engine(load_backbone(layers=("blocks.3",)), batch_size=1).precision == "fp32"
    monkeypatch.setattr(engines, "has_int8", lambda: False)
    assert make_engine(load_backbone(), batch_size=1).precision == "fp32"


@pytest.mark.parametrize("options", [{"engine": "torch"}, {"device": "cuda"}])
def test_int8_elsewhere_is_refused(options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="int8 is for OpenVINO on a CPU"):
        make_engine(load_backbone(), precision="int8", **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_network_is_quantised_once_and_keeps_its_numbers(
    small: Backbone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("skimage")
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path))
    batch = np.random.default_rng(0).integers(0, 256, (4, *small.preprocess.crop, 3), dtype=np.uint8)
    engine = on_cpu(small, "openvino", "int8")
    assert capfd.readouterr().out == ""  # NNCF's progress bars go to stderr
    first = next(engine.embed([batch]))[0]
    assert np.median(cosines(first, next(on_cpu(small, "openvino").embed([batch]))[0])) > 0.95
    assert quantised_file(small).is_file()
    monkeypatch.setattr(graphs, "version", lambda package: "another")  # an updated library changes nothing
    monkeypatch.setitem(sys.modules, "nncf", None)
    again = on_cpu(small, "openvino", "int8")
    np.testing.assert_array_equal(next(again.embed([batch]))[0], first)
    about = provenance_of(small, again)
    assert about["quantised_sha256"] == Graph.read(quantised_file(small)).sha256  # type: ignore[union-attr]
    assert fingerprint(about) != fingerprint({**about, "quantised_sha256": "0" * 64})
    content = quantised_file(small).read_bytes()
    quantised_file(small).unlink()
    with pytest.raises(UsageError, match=r"pip install 'featx\[int8\]'"):
        on_cpu(small, "openvino", "int8")
    brought = make_engine(small, engine="openvino", precision="int8", batch_size=4, threads=1, network=content)
    np.testing.assert_array_equal(next(brought.embed([batch]))[0], first)


def _altered(change: Callable[[bytes], bytes]) -> Graph:
    graph = carried(load_backbone())
    assert graph is not None
    return Graph.of(change(graph.description), graph.constants)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace(b'version="opset1"', b'version="extension"', 1), "foreign operation"),
        (lambda text: text.replace(b'offset="0"', b'offset="99999999"', 1), "lies outside"),
        (lambda text: text.replace(b'offset="0"', b'offset="-4"', 1), "has no place"),
        (lambda text: text.replace(b'offset="0"', b'offset="1e3"', 1), "has no place"),
        (lambda text: text[:5000], "cannot be read"),
        (lambda text: b'<!DOCTYPE a [<!ENTITY b "c">]>' + text.replace(b"Model0", b"&d;", 1), "cannot be read"),
    ],
    ids=["operation", "outside", "negative", "number", "cut", "entity"],
)
def test_a_strangers_network_is_checked_before_openvino_sees_it(change: Callable[[bytes], bytes], message: str) -> None:
    graph = _altered(change)
    with pytest.raises(ValueError, match=message):
        check_network(graph.content, graph.sha256)


def test_a_network_is_known_by_its_hash() -> None:
    graph = carried(load_backbone())
    assert graph is not None
    check_network(graph.content, graph.sha256)
    for content in (graph.content[:-1], b"", graph.content[:50], zlib.compress(graph.content)):
        with pytest.raises(ValueError, match="damaged"):
            check_network(content, graph.sha256)
    with pytest.raises(ValueError, match="damaged"):
        check_network(graph.content, "0" * 64)
