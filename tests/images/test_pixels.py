"""Decoding: what is refused and why, and that the pixels are those of the weights' own transforms."""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture
from imagekit import encoded, pixels, refused
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from featx.errors import ImageError
from featx.images.pixels import FORMATS, MAX_SCANS, Preprocess, decode, encode, resize_crop, weigh

HALF = (0.5, 0.5, 0.5)
IMAGENET = Preprocess(256, (224, 224), "bilinear", HALF, HALF)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "AVIF"])
def test_formats_decode_to_the_same_picture(kind: str) -> None:
    image = picture(1)
    decoded = np.asarray(decode(encoded(image, kind)), dtype=int)
    assert decoded.shape == (30, 40, 3)
    lossless = kind in ("PNG", "BMP", "TIFF", "PPM")
    assert np.abs(decoded - np.asarray(image, dtype=int)).mean() <= (0 if lossless else 12)


def test_only_listed_decoders_see_a_file() -> None:
    for kind in ("ICO", "PCX", "EPS", "SGI"):
        assert kind not in FORMATS
        assert refused(encoded(picture(1), kind)).reason == "not_an_image"


@pytest.mark.parametrize(
    ("data", "reason", "words"),
    [
        (b"", "empty", "empty"),
        (b"this is a text", "not_an_image", "not one of JPEG"),
        (b"<!DOCTYPE html><html></html>", "not_an_image", "HTML"),
        (b"%PDF-1.7 ...", "not_an_image", "PDF"),
        (b"\xff\x0a" + bytes(64), "unsupported_format", "JPEG XL"),
        (b"8BPS" + bytes(64), "unsupported_format", "PSD"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, reason: str, words: str) -> None:
    error = refused(data)
    assert error.reason == reason
    assert words in str(error)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_image_is_refused(kind: str, share: float) -> None:
    data = encoded(picture(2, (300, 200)), kind)
    assert refused(data[: int(len(data) * share)]).reason in ("truncated", "corrupt", "not_an_image")


def test_no_refusal_names_the_class_of_an_error() -> None:
    data = encode(np.asarray(picture(7, (64, 48))))
    broken = [data[:-40], data[:60] + b"x" * 40 + data[100:], b"GIF89a", b"BM" + bytes(60), b"II*\0" + bytes(8)]
    messages = [refused(each).what for each in broken]
    assert not [text for text in messages if re.search(r"[A-Z][a-z]+Error|\berror\b:", text)], messages
    assert any("cannot be decoded" in text for text in messages)


def test_a_truncated_jpeg_is_called_truncated() -> None:
    data = encoded(picture(2, (300, 200)), "JPEG")
    assert refused(data[: len(data) // 2]).reason == "truncated"


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    out = np.asarray(decode(encoded(Image.fromarray(ramp), "PNG")), dtype=float)
    assert np.abs(out[..., 0] - ramp / 257).max() <= 0.5
    assert out[0, 0, 0] == 0
    assert out[-1, -1, 0] == 255


def test_floating_point_has_no_defined_range() -> None:
    error = refused(encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"))
    assert error.reason == "unsupported_mode"


def test_hidden_colours_of_transparent_pixels_do_not_leak() -> None:
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., 0] = 200  # red, and invisible
    rgba[:4, :, 3] = 255
    out = np.asarray(decode(encoded(Image.fromarray(rgba), "PNG")))
    assert (out[:4] == (200, 0, 0)).all()
    assert (out[4:] == 255).all()


def test_transparency_of_palettes_and_grey() -> None:
    grey = Image.fromarray(np.stack([np.full((4, 4), 90, np.uint8), np.zeros((4, 4), np.uint8)], -1), "LA")
    assert (np.asarray(decode(encoded(grey, "PNG"))) == 255).all()
    palette = picture(3).quantize(4)
    data = encoded(palette, "PNG", transparency=int(np.asarray(palette)[0, 0]))
    assert (np.asarray(decode(data))[0, 0] == 255).all()


def test_cmyk_comes_out_in_the_colours_it_went_in_with() -> None:
    flat = Image.new("RGB", (16, 16), (200, 40, 90))
    out = np.asarray(decode(encoded(flat.convert("CMYK"), "JPEG", quality=95)), dtype=int)
    assert np.abs(out - (200, 40, 90)).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = picture(4, (48, 32))
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = decode(encoded(stored, "PNG", exif=exif))
    assert np.array_equal(np.asarray(out), np.asarray(upright))


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (12, 12), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (np.asarray(decode(data))[0, 0] == (250, 0, 0)).all()


def test_a_tracking_pixel_is_refused() -> None:
    assert refused(encoded(picture(1, (1, 1)), "PNG")).reason == "too_small"


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", body) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(10_000, 9_000), (20_000, 20_000), (60_000, 60_000), (2**31 - 1, 2)])
def test_a_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    assert refused(png_header(width, height)).reason == "too_large"


def test_random_damage_is_an_image_or_an_image_error() -> None:
    """300 damaged files: never another exception, and never a wrong shape."""
    random = np.random.default_rng(0)
    outcomes = set()
    for number in range(300):
        kind = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")[number % 6]
        data = bytearray(encoded(picture(number, (50, 40)), kind))
        for place in random.integers(0, len(data), 8):
            data[place] = random.integers(0, 256)
        try:
            assert pixels(bytes(data), IMAGENET).shape == (224, 224, 3)
            outcomes.add("decoded")
        except ImageError as error:
            outcomes.add(error.reason)
    assert {"decoded", "corrupt"} <= outcomes


TRANSFORMS = [
    (IMAGENET, [Resize(256), CenterCrop(224)]),
    (
        Preprocess(256, (224, 224), "bicubic", HALF, HALF),
        [Resize(256, InterpolationMode.BICUBIC), CenterCrop(224)],
    ),
    (
        Preprocess((96, 160), (96, 160), "bicubic", HALF, HALF),
        [Resize((96, 160), InterpolationMode.BICUBIC)],
    ),
    (Preprocess(224, (224, 224), "bilinear", HALF, HALF), [Resize(224), CenterCrop(224)]),
]


@pytest.mark.parametrize(("preprocess", "steps"), TRANSFORMS)
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (33, 32), (224, 224), (256, 256), (1000, 90), (641, 479)])
def test_pixels_are_those_of_the_transforms(preprocess: Preprocess, steps: list[Any], size: tuple[int, int]) -> None:
    image = picture(sum(size), size)
    ours = pixels(encoded(image, "PNG"), preprocess).astype(int)
    theirs = np.asarray(Compose(steps)(image), dtype=int)
    # Resampling the crop only rounds its coordinates once more: single pixels differ by one of 255.
    assert np.abs(ours - theirs).max() <= 1
    assert (ours != theirs).mean() < 0.02


def test_an_endless_strip_costs_nothing() -> None:
    strip = encoded(Image.new("L", (20_000, 4), 128), "PNG")
    assert pixels(strip, IMAGENET).shape == (224, 224, 3)


def test_real_photos_decode_like_the_transforms(photos: Path) -> None:
    transform = Compose([Resize(256), CenterCrop(224)])
    paths = sorted((photos / "hymenoptera" / "val").rglob("*.jpg"))[::5]
    assert len(paths) > 20
    for path in paths:
        with Image.open(path) as image:
            theirs = np.asarray(transform(image.convert("RGB")), dtype=int)
        assert np.abs(pixels(path.read_bytes(), IMAGENET).astype(int) - theirs).max() <= 1


def test_preprocess_survives_json() -> None:
    for preprocess, _ in TRANSFORMS:
        assert Preprocess.from_json(preprocess.to_json()) == preprocess


def test_scaled_decoding_gives_nearly_the_same_pixels() -> None:
    data = encoded(picture(7, (2400, 1800)), "JPEG", quality=92)
    assert decode(data, enough_for=[IMAGENET]).size == (600, 450)
    assert decode(data).size == (2400, 1800)
    full, scaled = pixels(data, IMAGENET).astype(int), pixels(data, IMAGENET, mode="scaled").astype(int)
    assert np.abs(full - scaled).mean() < 1.5
    small = encoded(picture(7, (400, 300)), "JPEG")  # nothing to save: the very same pixels
    assert np.array_equal(pixels(small, IMAGENET), pixels(small, IMAGENET, mode="scaled"))


def test_scaled_decoding_never_goes_below_what_the_resize_needs() -> None:
    for size in ((511, 400), (512, 512), (2048, 300), (1030, 1025), (5000, 260)):
        image = decode(encoded(picture(1, size), "JPEG"), enough_for=[IMAGENET])
        assert min(image.size) >= 256 or image.size == size


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(199, 272), (60, 300), (193, 130), (600, 50), (500, 375), (375, 500), (900, 1200)])
def test_resizing_the_crop_alone_is_resizing_everything(interpolation: str, size: tuple[int, int]) -> None:
    """Also on noise, where the order of the two passes shows, and where the picture is enlarged."""
    preprocess = replace(IMAGENET, interpolation=interpolation)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    width, height = preprocess.resized(*size)
    whole = Image.fromarray(noise).resize((width, height), Image.Resampling[interpolation.upper()])
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    expected = np.asarray(whole)[top : top + 224, left : left + 224].astype(int)
    difference = np.abs(expected - resize_crop(Image.fromarray(noise), preprocess))
    assert difference.max() <= 1
    assert difference.mean() < 5e-3


def test_metadata_is_not_written_anew_to_turn_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """EXIF can have as many bytes as the file, and its numbers are turned to text and back."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "x" * 1000
    data = encoded(picture(1, (40, 30)), "JPEG", exif=exif.tobytes())
    expected = np.asarray(decode(data))
    monkeypatch.setattr(Image.Exif, "tobytes", None)
    turned = decode(data)
    assert turned.size == (30, 40) and np.array_equal(np.asarray(turned), expected)


def repeated_scans(more: int) -> bytes:
    """A progressive JPEG, with its last scan so many times more."""
    data = encoded(picture(1, (64, 48)), "JPEG", progressive=True)
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * more + data[-2:]


def test_a_jpeg_of_too_many_scans_is_refused() -> None:
    usual = repeated_scans(0).count(b"\xff\xda")
    assert refused(repeated_scans(MAX_SCANS + 1 - usual)).reason == "too_costly"
    assert decode(repeated_scans(MAX_SCANS - usual)).size == (64, 48)
    assert weigh(repeated_scans(0)) == 64 * 48
    assert weigh(repeated_scans(50 - usual)) == 64 * 48 * 5


def test_what_only_looks_like_a_scan_is_none() -> None:
    """Previews in a segment before the picture, and a video or another picture behind it."""
    data, marks = encoded(picture(1), "JPEG", progressive=True), b"\xff\xda" * 500
    segment = b"\xff\xe9" + (len(marks) + 2).to_bytes(2, "big") + marks
    assert decode(data[:2] + segment + data[2:] + marks).tobytes() == decode(data).tobytes()


def test_transparency_is_the_same_in_rows_as_in_one_piece() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (700, 9, 4), dtype=np.uint8), "RGBA")
    whole = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    assert decode(encoded(image, "PNG")).tobytes() == whole.tobytes()
