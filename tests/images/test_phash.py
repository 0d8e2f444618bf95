"""Perceptual hashes: the bits, the mirror, and copies among real photos that find_duplicates has to find."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy.fft import dctn

from featx.backbones import load_backbone, make_engine
from featx.evaluation.duplicates import BITS, LOOSE_BITS, find_duplicates
from featx.images.phash import HASH_BYTES, mirrored_hashes, mirrored_thumbnails, perceptual_hash
from featx.images.pixels import decode
from featx.images.views import Looks
from featx.store.reader import Pictures

SETS = {"cats_dogs": 40, "cifar10": 40, "dtd10": 40, "hymenoptera": 40, "rsscn7": 40}
"""Sets of FEATX_PHOTOS, and how many photos of each are copied."""


def bits_of(hashes: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.unpackbits(np.frombuffer(bytes(hashes), np.uint8))


def pictures_of(images: list[Image.Image]) -> Pictures:
    """As an extraction makes them."""
    backbone = load_backbone("pixels")
    looks = Looks(backbone.preprocess)
    (rows,) = next(iter(make_engine(backbone).embed([np.stack([looks.cut(image) for image in images])])))
    hashes = np.frombuffer(b"".join(map(perceptual_hash, images)), np.uint8).reshape(-1, HASH_BYTES)
    return Pictures(hashes, np.rint(rows * 255).astype(np.uint8))


def saved_anew(image: Image.Image) -> Image.Image:
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=60)
    return decode(out.getvalue())


def two_thirds(image: Image.Image) -> Image.Image:
    return image.resize((max(1, 2 * image.width // 3), max(1, 2 * image.height // 3)), Image.Resampling.BICUBIC)


@cache
def photos_of(folder: Path, count: int) -> list[Image.Image]:
    """Different photos, spread over a set."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return [decode(path.read_bytes()) for path in paths[:: max(1, len(paths) // count)][:count]]


def test_an_oracle_gives_the_same_bits() -> None:
    for seed in range(20):
        image = picture(seed, (64, 64))
        grey = np.asarray(image, dtype=np.float64) @ [0.299, 0.587, 0.114]
        waves = dctn(grey, type=2)[:16, :16]
        waves[0, 0] = 0
        found = bits_of(perceptual_hash(image)).reshape(16, 16)
        clear = np.abs(waves) > 1e-3
        assert clear.mean() > 0.9
        assert np.array_equal(found[clear], (waves > 0)[clear])
        assert found[0, 0] == 0


@pytest.mark.parametrize("level", [0, 1, 77, 255])
def test_what_is_flat_has_no_bits(level: int) -> None:
    """Rounding decides nothing: every flat image has the same hash, on every processor."""
    assert perceptual_hash(Image.new("RGB", (90, 70), (level, level, level))) == bytes(HASH_BYTES)
    rows = np.tile(np.linspace(255, 0, 64).astype(np.uint8)[:, None, None], (1, 64, 3))
    found = bits_of(perceptual_hash(Image.fromarray(rows))).reshape(16, 16)
    assert found[:, 0].any() and not found[:, 1:].any()


def test_the_hash_of_the_mirror_image_follows(photos: Path) -> None:
    images = [picture(seed, (120, 90)) for seed in range(20)]
    images += [image for name in SETS for image in photos_of(photos / name, 40)]
    apart = []
    for image in images:
        (turned,) = mirrored_hashes(np.frombuffer(perceptual_hash(image), np.uint8).reshape(1, -1))
        apart.append(int((bits_of(turned) != bits_of(perceptual_hash(ImageOps.mirror(image)))).sum()))
    print(f"mirror: {max(apart)} bits at most, {np.mean(apart):.2f} on average")
    assert np.mean(apart) < 1 and np.quantile(apart, 0.99) <= 6
    seen = pictures_of([picture(0, (64, 64)), ImageOps.mirror(picture(0, (64, 64)))])
    turned_back = mirrored_thumbnails(seen.pixels)[0].astype(int)
    assert np.abs(turned_back - seen.pixels[1]).max() <= 1


def test_copies_of_photos_are_found_and_others_are_not(photos: Path) -> None:
    counts: dict[str, list[float]] = {}
    for name, count in SETS.items():
        images = photos_of(photos / name, count)
        n = len(images)
        originals = pictures_of(images)
        own = find_duplicates(np.zeros((n, 1)), by=originals)
        joined = int(sum(size * (size - 1) // 2 for size in np.bincount(own.groups)))
        found = []
        for copy in (saved_anew, two_thirds, ImageOps.mirror):
            copies = pictures_of([copy(image) for image in images])
            both = Pictures(
                np.concatenate([originals.hashes, copies.hashes]), np.concatenate([originals.pixels, copies.pixels])
            )
            groups = find_duplicates(np.zeros((2 * n, 1)), by=both).groups
            found.append(int((groups[:n] == groups[n:]).sum()))
        counts[name] = [n, *found, joined]
        print(f"{name}: of {n} found {found} (JPEG 60, two thirds, mirror); {joined} pairs of originals joined")
    table = np.array(list(counts.values()))
    assert table[:, 1:4].sum() >= 0.99 * 3 * table[:, 0].sum()
    pairs = (table[:, 0] * (table[:, 0] - 1) / 2).sum()
    assert table[:, 4].sum() <= pairs / 10_000 + 1, counts


def brute_force(pictures: Pictures) -> NDArray[np.intp]:
    """Groups by a loop over all pairs, in exact arithmetic of float64."""
    n = len(pictures.hashes)
    groups = list(range(n))
    thumbs = pictures.pixels.astype(np.float64).reshape(n, 16, 16, 3)
    contrast = np.sqrt(thumbs.reshape(n, 256, 3).var(axis=1).mean(axis=1))
    waves = np.unpackbits(pictures.hashes, axis=1).reshape(n, 16, 16).astype(bool)
    for i in range(n):
        for j in range(n):
            for mirror in (False, True):
                flipped = waves[j] ^ (np.arange(16) % 2 == 1)[None, :] if mirror else waves[j]
                other = thumbs[j][:, ::-1] if mirror else thumbs[j]
                apart = int((waves[i] ^ flipped).sum())
                rms, least = np.sqrt(((thumbs[i] - other) ** 2).mean()), min(contrast[i], contrast[j])
                if (apart <= LOOSE_BITS and rms <= 0.15 * least + 1) or (apart <= BITS and rms <= 0.25 * least + 2):
                    old, new = groups[j], groups[i]
                    groups = [new if each == old else each for each in groups]
    return np.unique(groups, return_inverse=True)[1]


@cache
def near_copies() -> Pictures:
    """Pictures of 8 images and of what became of them: more and more noise, mirrors, and flat ones."""
    images: list[Image.Image] = []
    for seed in range(8):
        image = picture(seed, (64, 48))
        images += [image, ImageOps.mirror(image)]
        for strength in (4, 12, 30, 60, 90):
            noise = np.random.default_rng(seed).normal(0, strength, (48, 64, 3))
            images.append(Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)))
            images.append(Image.blend(image, picture(seed + 1, (64, 48)), strength / 180))
    images += [Image.new("RGB", (64, 48), (level,) * 3) for level in (0, 1, 2, 100, 255)]
    return pictures_of(images)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=24))
def test_groups_are_those_of_all_pairs_in_any_order(rows: list[int]) -> None:
    pictures = near_copies().some(np.array(rows))
    found = find_duplicates(np.zeros((len(rows), 1)), by=pictures).groups
    expected = brute_force(pictures)
    assert np.array_equal(found[:, None] == found, expected[:, None] == expected)


def test_near_copies_are_a_test_of_both_thresholds() -> None:
    """Among them are pairs on either side: else the comparison with all pairs could not fail."""
    every = near_copies()
    groups = find_duplicates(np.zeros((len(every.hashes), 1)), by=every).groups
    assert len(every.hashes) == 101 and 8 < len(np.unique(groups)) < 90
