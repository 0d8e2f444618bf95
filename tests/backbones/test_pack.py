"""Packs of weights: what they are made of, and every way in which a stranger's could be worse."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from weightskit import TINY, tiny_weights, write_pack

from featx.backbones import backbone as backbones, weights as packs
from featx.backbones.backbone import load_backbone
from featx.backbones.catalogue import NETWORKS, WEIGHTS
from featx.backbones.engines.choice import make_engine
from featx.backbones.engines.graph import CARRIED, Graph, quantised_file, quantised_folder
from featx.backbones.hub import hub_folder
from featx.backbones.provenance import provenance_of
from featx.backbones.weights import add_weights, list_weights, pack_weights
from featx.errors import FeatxError, UsageError, WeightsError

pytestmark = pytest.mark.usefixtures("one_thread")

LITE1, LITE2 = "efficientnet_lite1", "efficientnet_lite2"
SMALL = "shufflenet_v2_x0_5"
MODEL = TINY.removeprefix("timm:")
PETABYTES = 1 << 60


@pytest.fixture(autouse=True)
def empty_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Folders of weights with nothing in them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="session")
def tiny() -> bytes:
    return tiny_weights()


def original(name: str) -> bytes:
    """The published file of a network that is installed."""
    path = load_backbone(name).file
    assert path is not None
    return path.read_bytes()


def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the packages of weights were not installed."""
    for row in (WEIGHTS[NETWORKS[name].default] for name in (LITE1, LITE2)):
        known = {**vars(backbones)["WEIGHTS"], row.file: replace(row, package="")}
        monkeypatch.setattr(backbones, "WEIGHTS", known)


def nothing_is_left() -> bool:
    return not hub_folder().exists() or not list(hub_folder().iterdir())


# What a pack is


def test_a_pack_holds_the_publishers_own_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    names = [LITE1, LITE2]
    made = pack_weights(names, tmp_path / "w.safetensors", advance=lambda *step: steps.append(step))
    files = {name: original(name) for name in names}
    assert made.sha256 == hashlib.sha256(made.path.read_bytes()).hexdigest()
    assert [(each.backbone, each.known) for each in made.weights] == [(name, "sha256") for name in names]
    assert steps[-1][:2] == (sum(map(len, files.values())),) * 2
    with safe_open(made.path, "pt") as opened:  # any library for safetensors reads one
        assert set(opened.keys()) == set(names)
        for name, data in files.items():
            assert opened.get_tensor(name).numpy().tobytes() == data
            assert opened.metadata()[name] == hashlib.sha256(data).hexdigest()
    without_package(monkeypatch)
    added = add_weights(made.path)
    assert all(each.new for each in added)
    for name, data in files.items():
        file = hub_folder() / WEIGHTS[NETWORKS[name].default].file
        assert file.read_bytes() == data
        assert load_backbone(name).file == file
    assert {weights.backbone for weights in list_weights() if weights.place == "torch hub's folder"} == set(names)
    assert not any(each.new for each in add_weights(made.path))


def test_packs_are_the_same_whoever_makes_them(tmp_path: Path) -> None:
    first, second = (pack_weights([LITE1], tmp_path / f"{n}.safetensors") for n in (1, 2))
    assert first.sha256 == second.sha256


def test_weights_of_timm_travel_as_safetensors(tmp_path: Path, tiny: bytes) -> None:
    pack = write_pack(tmp_path / "w.safetensors", {TINY: tiny})
    said: list[str] = []
    (added,) = add_weights(pack, progress=said.append)
    assert (added.backbone, added.known, added.new) == (TINY, "safetensors", True)
    assert said == [f"checking that the weights fill {TINY}"]
    assert added.path == hub_folder() / f"{MODEL}.safetensors"
    for spelling in (TINY, "timm:test_resnet"):  # without its tag, too
        assert load_backbone(spelling).weights_sha256 == hashlib.sha256(tiny).hexdigest()
        again = pack_weights([spelling], tmp_path / "again.safetensors")
        assert again.weights[0].sha256 == added.sha256 and again.weights[0].backbone == TINY
    assert [(w.backbone, w.place) for w in list_weights() if w.backbone == TINY] == [(TINY, "torch hub's folder")]


def test_what_is_not_here_cannot_be_packed(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"resnet18: its weights are not .*\. First run: featx weights f"):
        pack_weights([LITE1, "resnet18"], tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="named twice"):
        pack_weights([LITE1, LITE1], tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="it has no published weights"):
        pack_weights(["autoencoder"], tmp_path / "w.safetensors")
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_pickle_that_is_known_by_no_hash_is_not_packed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from featx.backbones.timm import TimmModel

    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1)}, file)
    monkeypatch.setattr(TimmModel, "local", lambda self: file)
    with pytest.raises(WeightsError, match="a pickle of which no hash is known"):
        pack_weights([TINY], tmp_path / "w.safetensors")


def test_a_file_that_has_changed_is_not_packed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub_folder().mkdir(parents=True)
    (hub_folder() / NETWORKS["resnet18"].default).write_bytes(b"something else")
    with pytest.raises(WeightsError, match="has changed since it was published"):
        pack_weights(["resnet18"], tmp_path / "w.safetensors")
    file = tmp_path / "changed.pth"
    file.write_bytes(original(LITE1))
    monkeypatch.setattr(backbones.CatalogueNetwork, "local", lambda self: file)

    def change(done: int, total: int, title: str) -> None:
        if title.startswith("checking") and done == total:  # once its hash has been taken
            file.write_bytes(original(LITE1)[::-1])

    with pytest.raises(WeightsError, match="changed while it was read"):
        pack_weights([LITE1], tmp_path / "w.safetensors", advance=change)
    assert not list(tmp_path.glob("*w.safetensors"))


# Torch files of which only some digits are known


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[str, bytes]:
    """A published torch file, of whose sha256 the catalogue knows eight digits."""
    buffer = io.BytesIO()
    torch.save({"weight": torch.arange(1000.0)}, buffer)
    data = buffer.getvalue()
    usual = WEIGHTS[NETWORKS[SMALL].default]
    row = replace(usual, file=f"small-{hashlib.sha256(data).hexdigest()[:8]}.pth")
    monkeypatch.setattr(backbones, "WEIGHTS", {**WEIGHTS, usual.file: row})
    return row.file, data


def test_digits_alone_are_not_enough_without_the_sum_of_the_pack(digits: tuple[str, bytes], tmp_path: Path) -> None:
    name, data = digits
    pack = write_pack(tmp_path / "w.safetensors", {SMALL: data})
    whole = hashlib.sha256(pack.read_bytes()).hexdigest()
    with pytest.raises(WeightsError, match=r"only the first digits of the sha256, \w{8}. Give the sha256 of the pack"):
        add_weights(pack)
    with pytest.raises(WeightsError, match=f"is not the pack that was meant: .*found sha256 {whole}"):
        add_weights(pack, sha256="0" * 64)
    with pytest.raises(UsageError, match="--sha256: not a sha256: expected 64 hexadecimal digits, found abc"):
        add_weights(pack, sha256="abc")
    assert nothing_is_left()
    (added,) = add_weights(pack, sha256=f" {whole.upper()}\n")
    assert (added.known, added.path) == ("digits", hub_folder() / name)
    assert added.path.read_bytes() == data


def test_the_sum_of_the_pack_does_not_make_other_weights_right(digits: tuple[str, bytes], tmp_path: Path) -> None:
    pack = write_pack(tmp_path / "w.safetensors", {SMALL: digits[1] + b"x"})
    with pytest.raises(WeightsError, match="not those that were published for it"):
        add_weights(pack, sha256=hashlib.sha256(pack.read_bytes()).hexdigest())
    assert nothing_is_left()


# Files that are no packs


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../escaped.pth", b"x")


def _tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("efficientnet_lite1")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)


class _Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {os.environ['TORCH_HOME']}.was-run",)


def _pickle(path: Path) -> None:
    torch.save(_Evil(), path)


NO_PACKS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "seven bytes": lambda path: path.write_bytes(b"1234567"),
    "zip": _zip,
    "tar": _tar,
    "pickle": _pickle,
    "text": lambda path: path.write_text("not weights at all, but a letter"),
    "endless header": lambda path: path.write_bytes(struct.pack("<Q", (1 << 64) - 1) + b"{}"),
    "large header": lambda path: path.write_bytes(struct.pack("<Q", packs.MAX_HEADER + 1) + b" " * (1 << 21)),
    "header beyond the end": lambda path: path.write_bytes(struct.pack("<Q", 3) + b"{}"),
    "no JSON": lambda path: write_pack(path, {}, text=b"{]"),
    "not text": lambda path: write_pack(path, {}, text=b"\xff\xfe"),
    "a list": lambda path: write_pack(path, {}, text=b"[1]"),
    "deep": lambda path: write_pack(path, {}, text=b"[" * 500_000),
    "ordinary safetensors": lambda path: path.write_bytes(save({"a": torch.zeros(3)})),
    "no files": lambda path: write_pack(path, {}),
    "a hash too many": lambda path: write_pack(path, {LITE1: b"x"}, metadata={LITE2: "0" * 64}),
    "no hash": lambda path: write_pack(path, {LITE1: b"x"}, metadata={LITE1: 7}),
    "short hash": lambda path: write_pack(path, {LITE1: b"x"}, metadata={LITE1: "77cc7160"}),
    "a name twice": lambda path: write_pack(
        path,
        {LITE1: b"x"},
        text=b'{"__metadata__": {"format": "featx-weights", "format_version": "1"}, "a": 1, "a": 2}',
    ),
    "no number": lambda path: write_pack(path, {}, text=b'{"a": NaN}'),
    "a long number": lambda path: write_pack(path, {}, text=b'{"a": ' + b"9" * 5_000 + b"}"),
    "a far place": lambda path: write_pack(path, {LITE1: b"x"}, header={LITE1: _tensor([0, int("9" * 4_300)])}),
    "a long name": lambda path: write_pack(path, {"x" * 100_000: b"x"}),
    "bytes behind": lambda path: path.write_bytes(write_pack(path, {LITE1: b"x"}).read_bytes() + b"more"),
    "floats": lambda path: write_pack(path, {LITE1: b"x"}, header={LITE1: _tensor([0.0, 1.0])}),
    "truths": lambda path: write_pack(path, {LITE1: b"x"}, header={LITE1: _tensor([False, True])}),
    "negative": lambda path: write_pack(path, {LITE1: b"x"}, header={LITE1: _tensor([-1, 1])}),
    "empty file": lambda path: write_pack(path, {LITE1: b""}),
    "gap": lambda path: write_pack(path, {LITE1: b"xy"}, header={LITE1: _tensor([1, 2])}),
    "overlap": lambda path: write_pack(path, {LITE1: b"x", LITE2: b"y"}, header={LITE2: _tensor([0, 1])}),
    "another type": lambda path: write_pack(
        path, {LITE1: b"xxxx"}, header={LITE1: {**_tensor([0, 4]), "dtype": "F32"}}
    ),
    "another shape": lambda path: write_pack(path, {LITE1: b"xx"}, header={LITE1: {**_tensor([0, 2]), "shape": [9]}}),
    "more fields": lambda path: write_pack(path, {LITE1: b"x"}, header={LITE1: {**_tensor([0, 1]), "path": "/x"}}),
    "no tensor": lambda path: write_pack(path, {LITE1: b"x"}, header={LITE1: "x"}),
    "another spelling": lambda path: write_pack(path, {"torchvision:resnet18": b"x"}),
}


def _tensor(offsets: list[Any]) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [offsets[1] - offsets[0]], "data_offsets": offsets}


@pytest.mark.parametrize("kind", sorted(NO_PACKS))
def test_what_is_no_pack_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    NO_PACKS[kind](path)
    with pytest.raises(
        WeightsError, match=r"w.safetensors: is not a pack of weights: expected a file made by .*Nothing"
    ):
        add_weights(path)
    assert nothing_is_left()
    assert sorted(found.name for found in tmp_path.iterdir()) == ["w.safetensors"]  # nothing ran, nothing escaped


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WeightsError, match="not a regular file"):  # and nobody is waited for
        add_weights(tmp_path / "pipe")
    with pytest.raises(WeightsError, match=r"cannot be read \(Is a directory"):
        add_weights(tmp_path)
    with pytest.raises(WeightsError, match=r"cannot be read \(No such file"):
        add_weights(tmp_path / "nowhere")


# Packs that hold what they should not


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "/etc/passwd",
        "timm:../../x",
        "timm:/x",
        "x.py:Plankton",
        "os:system",
        "no_network",
        "",
        "a\x1b[31mb\n",
    ],
)
def test_a_name_is_looked_up_and_is_never_a_path(name: str, tmp_path: Path) -> None:
    pack = write_pack(tmp_path / "w.safetensors", {name: b"data"})
    with pytest.raises(WeightsError, match="a network that is not known here"):
        add_weights(pack)
    assert nothing_is_left()
    assert sorted(found.name for found in tmp_path.iterdir()) == ["w.safetensors"]


def test_more_than_the_file_holds_is_refused_by_arithmetic(tmp_path: Path) -> None:
    pack = write_pack(tmp_path / "w.safetensors", {LITE1: b"x"}, header={LITE1: _tensor([0, PETABYTES])})
    with pytest.raises(
        WeightsError, match=r"declares more than it holds: expected 1,152,921,504,606,8\d\d,\d\d\d bytes"
    ):
        add_weights(pack)
    assert nothing_is_left()


@pytest.mark.parametrize("left", [0.2, 0.5, 0.999999])
def test_a_pack_that_is_cut_off(left: float, tmp_path: Path) -> None:
    data = pack_weights([LITE1], tmp_path / "w.safetensors").path.read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data[: int(len(data) * left)])
    with pytest.raises(WeightsError, match=r"is cut off.*Copy it again. Nothing was added"):
        add_weights(tmp_path / "w.safetensors")
    assert nothing_is_left()


def test_another_version(tmp_path: Path) -> None:
    pack = write_pack(tmp_path / "w.safetensors", {LITE1: b"x"}, metadata={"format_version": "2"})
    with pytest.raises(WeightsError, match="another version of featx: expected format_version 1, found 2"):
        add_weights(pack)


def test_the_weights_of_another_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without = write_pack(tmp_path / "w.safetensors", {LITE1: original(LITE2)})
    without_package(monkeypatch)
    with pytest.raises(WeightsError, match=r"weights for efficientnet_lite1 are not those .*found sha256 9656183eaeaf"):
        add_weights(without)
    assert nothing_is_left()


def test_damage_is_found_and_no_file_of_the_pack_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pack = pack_weights([LITE1, LITE2], tmp_path / "w.safetensors").path
    data = bytearray(pack.read_bytes())
    data[-1000] ^= 1
    pack.write_bytes(data)
    without_package(monkeypatch)
    with pytest.raises(WeightsError, match=r"the weights for efficientnet_lite2 are damaged: .*Copy it again"):
        add_weights(pack)
    assert nothing_is_left()  # of the first one, which was whole, neither


def test_a_pickle_for_a_network_of_timm_is_not_read(tmp_path: Path) -> None:
    evil = tmp_path / "evil"
    _pickle(evil)
    pack = write_pack(tmp_path / "w.safetensors", {TINY: evil.read_bytes()})
    with pytest.raises(WeightsError, match="are not a safetensors file, and no hash of them is known"):
        add_weights(pack)
    assert nothing_is_left() and sorted(found.name for found in tmp_path.iterdir()) == [
        "evil",
        "torch",
        "w.safetensors",
    ]


def _inner(tensors: dict[str, Any]) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "data",
    [
        _inner({"conv1.weight": {"dtype": "F32", "shape": [PETABYTES], "data_offsets": [0, 4 * PETABYTES]}}),
        struct.pack("<Q", PETABYTES) + b"{}",
        b"{}",
    ],
    ids=["petabytes", "header", "short"],
)
def test_safetensors_inside_that_lie_about_their_size(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="are not a safetensors file"):
        add_weights(write_pack(tmp_path / "w.safetensors", {TINY: data}))
    assert nothing_is_left()


@pytest.mark.parametrize("change", ["other names", "one missing", "one more", "other shapes"])
def test_safetensors_that_do_not_fill_the_network(change: str, tmp_path: Path, tiny: bytes) -> None:
    from safetensors.torch import load

    tensors = load(tiny)
    name = min(key for key in tensors if key.endswith(".weight"))  # not one that counts batches
    if change == "other names":
        tensors = {f"x.{key}": value for key, value in tensors.items()}
    elif change == "one missing":
        del tensors[name]
    elif change == "one more":
        tensors["more"] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(3, 3)
    with pytest.raises(WeightsError, match="are those of another network"):
        add_weights(write_pack(tmp_path / "w.safetensors", {TINY: save(tensors)}))
    assert nothing_is_left()


def test_other_weights_that_are_here_are_not_replaced_in_silence(tmp_path: Path, tiny: bytes) -> None:
    add_weights(write_pack(tmp_path / "w.safetensors", {TINY: tiny}))
    with pytest.raises(WeightsError, match=r"other weights of timm:test_resnet\.r160_in1k are on this machine"):
        add_weights(write_pack(tmp_path / "w.safetensors", {TINY: tiny_weights(seed=1)}))
    assert load_backbone(TINY).weights_sha256 == hashlib.sha256(tiny).hexdigest()


def test_a_damaged_file_of_the_catalogue_is_replaced_by_what_was_published(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pack = pack_weights([LITE1], tmp_path / "w.safetensors").path
    without_package(monkeypatch)
    file = hub_folder() / WEIGHTS[NETWORKS[LITE1].default].file
    hub_folder().mkdir(parents=True)
    file.write_bytes(b"damaged")
    (added,) = add_weights(pack)
    assert added.new and load_backbone(LITE1).file == file


def test_a_link_in_the_way_is_replaced_and_not_followed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pack = pack_weights([LITE1], tmp_path / "w.safetensors").path
    without_package(monkeypatch)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    file = hub_folder() / WEIGHTS[NETWORKS[LITE1].default].file
    hub_folder().mkdir(parents=True)
    file.symlink_to(victim)
    add_weights(pack)
    assert victim.read_text() == "mine" and not file.is_symlink()


def test_a_flipped_byte_anywhere_in_the_header_is_an_error_in_words(tmp_path: Path) -> None:
    path = write_pack(tmp_path / "w.safetensors", {LITE1: b"one", LITE2: b"two"})
    data = path.read_bytes()
    for position in range(len(data) - 6):
        for bit in (1, 32):
            changed = bytearray(data)
            changed[position] ^= bit
            path.write_bytes(changed)
            with pytest.raises(FeatxError):
                add_weights(path)
    assert nothing_is_left()


# Stopped half-way


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_stopped_addition_leaves_no_half_file(number: signal.Signals, tmp_path: Path, tiny: bytes) -> None:
    pack = write_pack(tmp_path / "w.safetensors", {TINY: tiny})
    code = (
        "import os, sys; from pathlib import Path; from featx.backbones.weights import add_weights\n"
        "add_weights(Path(sys.argv[1]), advance=lambda *_: os.kill(os.getpid(), int(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(pack), str(int(number))]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    names = [path.name for path in hub_folder().iterdir()]
    assert f"{MODEL}.safetensors" not in names and len(names) == (number == signal.SIGKILL)
    add_weights(pack)
    assert [path.name for path in hub_folder().iterdir()] == [f"{MODEL}.safetensors"]


# Quantised networks

LITE0 = "efficientnet_lite0"
FILE = f"{LITE0}-{'0' * 24}.ir"


def quantised_pack(path: Path, content: bytes, name: str = f"int8:{FILE}", weights: str = LITE0) -> packs.Pack:
    write_pack(path, {weights: original(weights), name: content})
    data = path.read_bytes()
    return packs.Pack(path, len(data), hashlib.sha256(data).hexdigest(), ())


@pytest.fixture
def carried_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> bytes:
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path / "cache"))
    return (CARRIED / f"{LITE0}.ir").read_bytes()


@pytest.mark.slow
def test_a_store_at_int8_goes_on_elsewhere_with_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: bytes
) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path / "here"))
    add_weights(write_pack(tmp_path / "w.safetensors", {TINY: tiny}))
    options: dict[str, Any] = {"engine": "openvino", "precision": "int8", "batch_size": 4, "threads": 1}
    backbone = load_backbone(TINY)
    pixels = np.random.default_rng(0).integers(0, 256, (4, *backbone.preprocess.crop, 3), dtype=np.uint8)
    here = make_engine(backbone, **options)
    expected = next(here.embed([pixels]))[0]
    made = pack_weights([TINY], tmp_path / "both.safetensors")
    assert [each.known for each in made.weights] == ["safetensors", "pack"]
    monkeypatch.setenv("FEATX_CACHE", str(tmp_path / "there"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "there"))
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(WeightsError, match="recognised only by the sha256 of the pack"):
        add_weights(made.path)
    assert not (tmp_path / "there").exists()
    added = add_weights(made.path, sha256=made.sha256)
    assert [(each.known, each.new) for each in added] == [("safetensors", True), ("pack", True)]
    there = make_engine(load_backbone(TINY), **options)
    assert provenance_of(backbone, there) == provenance_of(backbone, here)
    np.testing.assert_array_equal(next(there.embed([pixels]))[0], expected)
    assert quantised_file(backbone) == added[1].path
    assert not any(each.new for each in add_weights(made.path, sha256=made.sha256))


def test_quantised_networks_of_other_weights_stay_here(carried_graph: bytes, tmp_path: Path) -> None:
    quantised_folder().mkdir(parents=True)
    (quantised_folder() / FILE).write_bytes(carried_graph)
    (quantised_folder() / f"{LITE0}-{'1' * 24}.ir").write_bytes(carried_graph[:-1])  # damaged
    (quantised_folder() / f"{LITE1}-{'2' * 24}.ir").write_bytes((CARRIED / f"{LITE1}.ir").read_bytes())
    made = pack_weights([LITE0], tmp_path / "w.safetensors")
    assert [each.backbone for each in made.weights] == [LITE0, f"int8:{FILE}"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda graph: Graph.of(graph.description.replace(b'version="opset1"', b'version="x"', 1), graph.constants),
         "foreign operation"),
        (lambda graph: Graph.of(graph.description[:999], graph.constants), "cannot be read"),
        (lambda graph: Graph.of(graph.description, graph.constants[:-9]), "lies outside"),
        (lambda graph: None, "is damaged"),
    ],
    ids=["operation", "cut", "constants", "seal"],
)  # fmt: skip
def test_a_strangers_quantised_network_is_looked_at(
    change: Callable[[Graph], Graph | None], message: str, carried_graph: bytes, tmp_path: Path
) -> None:
    graph = Graph.parse(carried_graph)
    assert graph is not None
    altered = change(graph)
    pack = quantised_pack(tmp_path / "w.safetensors", altered.content if altered else b"x" + carried_graph[1:])
    with pytest.raises(WeightsError, match=message):
        add_weights(pack.path, sha256=pack.sha256)
    assert list(quantised_folder().iterdir()) == []


def test_a_quantised_network_comes_with_its_weights(carried_graph: bytes, tmp_path: Path) -> None:
    pack = quantised_pack(tmp_path / "w.safetensors", carried_graph, weights=LITE1)
    with pytest.raises(WeightsError, match="of weights that are not in the pack"):
        add_weights(pack.path, sha256=pack.sha256)


@pytest.mark.parametrize("name", ["../x", f"../{FILE}", f"/tmp/{FILE}", "x.ir", f".{FILE}", f"a/{FILE}", ""])
def test_the_name_of_a_quantised_network_is_no_path(name: str, carried_graph: bytes, tmp_path: Path) -> None:
    pack = quantised_pack(tmp_path / "w.safetensors", carried_graph, f"int8:{name}")
    with pytest.raises(WeightsError, match="as the file of a quantised network"):
        add_weights(pack.path, sha256=pack.sha256)
    assert not quantised_folder().exists()


def test_numbers_that_are_here_are_not_replaced_in_silence(carried_graph: bytes, tmp_path: Path) -> None:
    quantised_folder().mkdir(parents=True)
    graph = Graph.parse(carried_graph)
    assert graph is not None
    (quantised_folder() / FILE).write_bytes(Graph.of(graph.description + b" ", graph.constants).content)
    pack = quantised_pack(tmp_path / "w.safetensors", carried_graph)
    with pytest.raises(WeightsError, match=r"other numbers of .* are on this machine already"):
        add_weights(pack.path, sha256=pack.sha256)
