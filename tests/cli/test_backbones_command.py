"""featx backbones: the table that one chooses from, the details of one network, and its speed here."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Featx

from featx.backbones.catalogue import ADVICE, HUB, NETWORKS

OLD_FIELDS = {"name", "embedding_dim", "parameters", "licence", "offline", "source"}


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {
        "FEATX_CACHE": str(tmp_path / "cache"),
        "TORCH_HOME": str(tmp_path / "torch"),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
    }


def test_the_table_fits_a_hundred_columns(featx: Featx, env: dict[str, str]) -> None:
    for columns in ("100", "80"):
        ran = featx("backbones", env={**env, "COLUMNS": columns})
        assert ran.code == 0 and ran.err == ""
        lines = ran.out.splitlines()
        assert max(map(len, lines)) <= 100
        rows = {line.split()[0]: line.split()[1:] for line in lines[: lines.index("")]}
        assert set(rows) >= {*NETWORKS, *HUB}  # one line each: none is wrapped
        assert rows["efficientnet_lite0"] == ["75.1", "1280", "224", "4.7", "M", "Apache-2.0", "yes"]
        assert rows["dinov2_small"] == ["81.1*", "384", "518", "22.1", "M", "Apache-2.0"]
        assert rows["dinov3_base"] == ["768", "256", "85.6", "M", "DINOv3"]
        assert rows["vit_h_14"][-1] == "CC-BY-NC-4.0"
    text = " ".join(ran.out.split())
    for advice in ADVICE:
        assert f"{advice.images}: {' or '.join(advice.take)}. {advice.basis}" in text


def test_json_keeps_its_fields_and_gains_new_ones(featx: Featx, env: dict[str, str]) -> None:
    rows = {row["name"]: row for row in featx("backbones", "--json", env=env).json["backbones"]}
    assert all(set(row) >= OLD_FIELDS for row in rows.values())
    row = rows["dinov2_base"]
    assert (row["input_size"], row["top1"], row["measured"]) == ([518, 518], 84.5, None)
    assert row["stored_as"] == "timm:vit_base_patch14_dinov2.lvd142m"
    assert rows["resnet50"]["top1"] == 80.858 and rows["resnet50"]["top1_source"].startswith("torchvision")
    ran = featx("backbones", "resnet18", "clip_base", "--json", env=env)
    assert [row["name"] for row in ran.json["backbones"]] == ["resnet18", "clip_base"]
    assert [advice["take"] for advice in ran.json["advice"]] == [list(advice.take) for advice in ADVICE]


def test_details_say_whose_figure_it_is_and_what_to_do_next(featx: Featx, env: dict[str, str]) -> None:
    for name in ("dinov2_small", "vit_small_patch14_dinov2.lvd142m", "timm:vit_small_patch14_dinov2.lvd142m"):
        ran = featx("backbones", name, env=env)
        assert ran.code == 0
        text = " ".join(ran.out.split())
        assert "81.1 % (DINOv2's README: a linear classifier on the frozen network)" in text
        assert "in stores timm:vit_small_patch14_dinov2.lvd142m" in text
        assert "not measured (featx backbones --measure dinov2_small)" in text
        assert "not here (featx weights fetch dinov2_small)" in text
        assert "Next: featx extract photos --out photos.featx --backbone dinov2_small" in text
        assert "the sum that the Hugging Face hub announces; no revision is pinned" in text
    assert "all of the sha256" in featx("backbones", "resnet18", env=env).out
    assert "the digits of the sha256" in featx("backbones", "resnet101", env=env).out
    assert "no figure verified" in featx("backbones", "clip_base", env=env).out


@pytest.mark.slow
def test_measuring_shows_in_the_table_and_the_details(featx: Featx, env: dict[str, str]) -> None:
    ran = featx("backbones", "--measure", "squeezenet1_1", "--seconds", "0.2", "--json", env=env)
    assert ran.code == 0, ran.err
    first, *_ = ran.err.splitlines()  # a slow machine shows progress, too
    assert first == "building squeezenet1_1 with random weights: its own are not here"
    (row,) = ran.json["backbones"]
    assert row["measured"]["images_per_second"] > 1 and row["measured"]["batch_size"] == 16
    shown = featx("backbones", env=env).out
    (line,) = (line for line in shown.splitlines() if line.split()[:1] == ["squeezenet1_1"])
    assert line.split()[2] == f"{row['measured']['images_per_second']:,.0f}"
    assert row["measured"]["date"] in featx("backbones", "squeezenet1_1", env=env).out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--measure",), "--measure: no network to measure: expected NAME"),
        (("resnet1",), "Did you mean resnet18"),
        (("--measure", "resnet1"), "Did you mean resnet18"),
        (("timm:resnet10t",), "What any other model of timm is like: featx layers timm:resnet10t"),
        (("--measure", "resnet18", "--seconds", "0"), "Invalid value for '--seconds'"),
    ],
)
def test_mistakes(featx: Featx, words: tuple[str, ...], says: str) -> None:
    ran = featx("backbones", *words)
    assert ran.code == 2
    assert says in " ".join(ran.err.split())
