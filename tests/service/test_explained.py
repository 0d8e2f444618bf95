"""The service explains where it is asked to: the same answer, and maps that add up to it."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from conftest import Featx, class_folders
from PIL import Image
from servicekit import Running, form, png, start, start_tiny

from featx.models import read_bundle


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, featx: Featx) -> Path:
    folder = tmp_path_factory.mktemp("explained")
    class_folders(folder / "photos", each=8)
    assert featx("extract", "photos", "--out", "photos.featx", cwd=folder).code == 0
    assert featx("fit", "photos.featx", "--out", "photos.model", cwd=folder).code == 0
    return folder


@pytest.fixture(scope="module")
def server(kept: Path) -> Iterator[Running]:
    with start(kept, "-m", "featx", "serve", kept / "photos.model", "--port", 0) as running:
        yield running


@pytest.mark.slow
def test_an_explanation_adds_up_and_changes_no_answer(server: Running, kept: Path, featx: Featx) -> None:
    sharpness = read_bundle(kept / "photos.model").sharpness
    assert sharpness is not None
    assert server.get("/info").json["explains"] is True
    photo = kept / "photos/bees/009.png"
    (plain,) = server.send("/predict", photo.read_bytes()).json["predictions"]
    assert "explanation" not in plain
    (told,) = server.send("/predict?explain=true", photo.read_bytes()).json["predictions"]
    explanation = told.pop("explanation")
    assert told == plain
    assert explanation["reason"] is None or "root" in explanation["reason"]
    first, second = explanation["classes"]
    assert first["class"] == told["label"]
    for each in (first, second):
        (one,) = each["maps"]
        evidence = np.array(one["evidence"])
        assert evidence.shape == (7, 7)
        assert one["adds"] == pytest.approx(evidence.mean())
        assert each["intercept"] + one["adds"] == pytest.approx(each["score"], abs=1e-4)
        head, _, data = each["overlay"].partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as overlay:
            assert (overlay.size, overlay.mode) == ((192, 144), "RGBA")  # 40 x 30 pixels
    ratio = told["probabilities"][first["class"]] / told["probabilities"][second["class"]]
    assert math.log(ratio) / sharpness == pytest.approx(first["score"] - second["score"], abs=1e-4)
    # The command shows the same.
    (by_command,) = featx("explain", kept / "photos.model", photo, "--json").json["explanations"]
    for ours, theirs in zip(explanation["classes"], by_command["evidence"], strict=True):
        np.testing.assert_allclose(ours["maps"][0]["evidence"], theirs["maps"][0]["evidence"], atol=1e-6)


@pytest.mark.slow
def test_several_in_a_form_one_of_them_broken(server: Running) -> None:
    body, headers = form([("a.png", png(1)), ("broken.png", b"no image"), ("wide.png", png(2, (80, 20)))])
    reply = server.ask("/predict?explain=1", body, headers).json
    assert [each["id"] for each in reply["predictions"]] == ["a.png", "wide.png"]
    assert [each["id"] for each in reply["refused"]] == ["broken.png"]
    boxes = [each["explanation"]["classes"][0]["maps"][0]["box"] for each in reply["predictions"]]
    left, top, right, bottom = boxes[1]  # of a wide photo the middle is seen
    assert (left + right, top + bottom) == pytest.approx((1.0, 1.0), abs=0.02)
    assert (right - left) * 80 == pytest.approx((bottom - top) * 20, rel=0.05)
    assert server.send("/predict?explain=perhaps", png(1)).status == 422


def test_a_network_without_maps_says_so(tmp_path: Path) -> None:
    with start_tiny(tmp_path) as server:
        (told,) = server.send("/predict?explain=true", png(1)).json["predictions"]
        assert told["explanation"]["classes"] == []
        assert "exact map" in told["explanation"]["reason"] or "Networks" in told["explanation"]["reason"]
        (plain,) = server.send("/predict", png(1)).json["predictions"]
        told.pop("explanation")
        assert told == plain
