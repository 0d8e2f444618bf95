"""The autoencoder: it learns, stops, is kept, and its code is a backbone like any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Featx
from tuningkit import striped_folders, stripes

from featx.adaptation.autoencoder import Autoencoder, held_out_rows, read_pixels, train_autoencoder
from featx.backbones.backbone import load_backbone
from featx.backbones.engines.choice import make_engine
from featx.errors import UsageError, WeightsError
from featx.images.source import ImageSet
from featx.store.reader import read_features

pytestmark = pytest.mark.slow


def pictures(n: int = 60, size: int = 16) -> np.ndarray:
    return np.stack([stripes(i, upright=i % 2 == 0, size=size) for i in range(n)])


def digests(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 32), np.uint8)


@pytest.fixture(scope="module")
def trained() -> Autoencoder:
    return train_autoencoder(pictures(), held_out_rows(digests(60), 0), dim=16, epochs=25)


@pytest.mark.slow
def test_it_draws_images_it_has_not_seen_better_than_their_mean(trained: Autoencoder) -> None:
    shown, held = pictures(), held_out_rows(digests(60), 0)
    with torch.no_grad():
        images = torch.from_numpy(shown[held]).permute(0, 3, 1, 2).float() / 255
        drawn = trained.decoder(trained.encoder(images * 2 - 1)) / 2 + 0.5
        error = float(((drawn - images) ** 2).mean())
    assert trained.error == pytest.approx(error, rel=1e-4)
    baseline = float((((shown[held] - shown[~held].mean(axis=0)) / 255.0) ** 2).mean())
    assert trained.baseline == pytest.approx(baseline, rel=1e-6)
    assert trained.error < 0.7 * trained.baseline
    assert trained.error == min(trained.errors)
    assert (trained.images, trained.held_out, trained.epochs) == (54, 6, 25)


def test_the_same_seed_gives_the_same_network(trained: Autoencoder) -> None:
    held = held_out_rows(digests(60), 0)
    short = [train_autoencoder(pictures(), held, dim=4, epochs=2, random_state=seed) for seed in (3, 3, 4)]
    assert short[0].errors == short[1].errors != short[2].errors


def test_copies_are_held_out_together() -> None:
    some = np.repeat(digests(40), 3, axis=0)
    held = held_out_rows(some, 0)
    assert held.sum() == 12
    assert (held.reshape(40, 3).sum(axis=1) % 3 == 0).all()
    with pytest.raises(UsageError, match="too few images to learn from: expected at least 10 different ones, found 2"):
        held_out_rows(np.repeat(digests(2), 50, axis=0), 0)


def test_an_interrupted_one_keeps_its_best_epoch() -> None:
    def stop(done: int, total: int, what: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    held = held_out_rows(digests(60), 0)
    found = train_autoencoder(pictures(), held, dim=4, epochs=9, tick=stop)
    assert (found.epochs, found.planned) == (3, 9)
    assert found.error == min(found.errors)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_its_code_is_a_backbone(trained: Autoencoder, tmp_path: Path, engine: str) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    file = trained.save(tmp_path / "ae.pt")
    backbone = load_backbone("autoencoder", weights=file)
    assert backbone.preprocess.crop == (16, 16)
    shown = pictures(3)
    (found,) = next(iter(make_engine(backbone, engine=engine, device="cpu", precision="fp32").embed([shown])))
    with torch.no_grad():
        expected = trained.encoder(torch.from_numpy(shown).permute(0, 3, 1, 2).float() / 127.5 - 1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert trained.save(tmp_path / "again.pt").read_bytes() == file.read_bytes()


def test_wrong_files_and_numbers(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="comes without weights: it learns them from your images"):
        load_backbone("autoencoder")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="not the checkpoint of an autoencoder"):
        load_backbone("autoencoder", weights=tmp_path / "other.pt")
    sound = {"format": "featx-autoencoder", "format_version": 1, "config": {"dim": 4, "size": 16}, "state_dict": {}}
    for change, message in (
        ({"format_version": 2}, "made by a newer featx"),
        ({"config": {"dim": 10**9, "size": 16}}, "its config is not valid"),
        ({"config": {"dim": 4, "size": 10**6}}, "its config is not valid"),
        ({"config": None}, "its config is not valid"),
    ):
        torch.save({**sound, **change}, tmp_path / "bad.pt")
        with pytest.raises(WeightsError, match=message):
            load_backbone("autoencoder", weights=tmp_path / "bad.pt")
    with pytest.raises(UsageError, match="expected a multiple of 16 up to 512, found 20"):
        train_autoencoder(pictures(30, 20), held_out_rows(digests(30), 0))


def test_unreadable_images_are_left_out_and_named(tmp_path: Path) -> None:
    striped_folders(tmp_path / "photos", each=3)
    (tmp_path / "photos" / "across" / "bad.png").write_bytes(b"no image")
    found = read_pixels(ImageSet.from_source(tmp_path / "photos"), 16, workers=1)
    assert found.pixels.shape == (6, 16, 16, 3)
    assert found.digests.shape == (6, 32)
    assert [name for name, _ in found.refused] == ["across/bad.png"]


@pytest.mark.slow
def test_from_images_to_a_sweep(featx: Featx, tmp_path: Path) -> None:
    striped_folders(tmp_path / "photos")
    made = featx(
        "autoencoder", "photos", "--out", "ae.pt", "--dim", "8", "--size", "32", "--epochs", "3", "--json", cwd=tmp_path
    )
    assert made.code == 0, made.err
    assert made.json["dim"] == 8
    assert made.json["reconstruction_error"] > 0
    extracted = featx(
        "extract", "photos", "--out", "ae.featx", "--backbone", "autoencoder", "--weights", "ae.pt", cwd=tmp_path
    )
    assert extracted.code == 0, extracted.err
    features = read_features(tmp_path / "ae.featx")
    assert features.embeddings.shape == (24, 8)
    assert features.provenance["backbone"] == "autoencoder"
    swept = featx("sweep", "ae.featx", "--heads", "ridge", "--shots", "2", "--episodes", "2", "--json", cwd=tmp_path)
    assert swept.json["winner"] == "ridge"
    again = featx("search", "ae.featx", "photos/across/000.png", "--weights", "ae.pt", "--json", cwd=tmp_path)
    assert again.json["results"][0]["matches"][0]["id"] == "across/000.png"
    assert featx("autoencoder", "photos", "--out", "x.pt", "--size", "20", cwd=tmp_path).code == 2
