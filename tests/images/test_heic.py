"""HEIC through pillow-heif: upright, whole, within the limits, and refused as other formats are when it is damaged."""

from __future__ import annotations

import collections
import io
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Featx, picture, without
from imagekit import refused
from PIL import Image
from storekit import PREPROCESS

from featx.errors import ImageError
from featx.images.pixels import MAX_PIXELS, Preprocess, decode, encode, weigh
from featx.images.pool import Decoded, DecoderPool

pillow_heif = pytest.importorskip("pillow_heif")

SIZE = (300, 200)
ORIENTATION = 0x0112


def heic(image: Image.Image, **options: Any) -> bytes:
    """A HEIC as phones write it: HEVC with chroma at half resolution."""
    out = io.BytesIO()
    pillow_heif.from_pillow(image).save(out, **{"quality": 90, **options})
    return out.getvalue()


def declared(data: bytes, width: int, height: int) -> bytes:
    """The same file, whose header declares another size."""
    place = data.index(b"ispe") + 8
    return data[:place] + struct.pack(">II", width, height) + data[place + 8 :]


def with_orientation(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif.tobytes()


def apart(data: bytes, image: Image.Image) -> float:
    """Mean difference of the decoded image to another, in grey levels."""
    found = decode(data)
    assert (found.mode, found.size) == ("RGB", image.size)
    return float(np.abs(np.asarray(found, dtype=int) - np.asarray(image, dtype=int)).mean())


@pytest.mark.slow
def test_a_photo_is_what_it_was(photos: Path) -> None:
    """Against the pixels that went in, and no worse than JPEG is; also in tiles, as iPhones write it."""
    paths = sorted((photos / "hymenoptera" / "val").rglob("*.jpg"))[::30]
    assert len(paths) >= 5
    for path in paths:
        image = decode(path.read_bytes())
        out = io.BytesIO()
        image.save(out, "JPEG", quality=90)
        as_jpeg = apart(out.getvalue(), image)
        assert apart(heic(image), image) < 1.5 * as_jpeg + 1
        assert apart(heic(image, tile_size=128), image) < 1.5 * as_jpeg + 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_once(orientation: int) -> None:
    """A photo with an orientation, converted as phones do: the container says how it is turned, and EXIF still too."""
    upright = picture(4, SIZE)
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    turn = turns.get(orientation)
    stored = upright if turn is None else upright.transpose(turn)
    data = heic(stored, exif=with_orientation(orientation))
    assert (b"irot" in data or b"imir" in data) == (orientation > 1)
    assert apart(data, upright) < 3
    # What EXIF alone says does not count in HEIF: the container's word does.
    usual = with_orientation(1)
    data = heic(stored, exif=usual)
    assert data.count(usual) == 1
    assert apart(data.replace(usual, with_orientation(orientation)), stored) < 3


def test_ten_bits_and_transparency() -> None:
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16)
    wide = np.repeat(np.tile(ramp, (64, 1))[..., None], 3, axis=2)
    out = io.BytesIO()
    pillow_heif.encode("RGB;16", (256, 64), wide.tobytes(), out, quality=-1, chroma=444)
    found = np.asarray(decode(out.getvalue()), dtype=int)
    assert np.abs(found - np.arange(256)[None, :, None]).max() <= 2
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[..., 0] = 200  # red, and invisible below
    rgba[:32, :, 3] = 255
    found = np.asarray(decode(heic(Image.fromarray(rgba))), dtype=int)
    assert np.abs(found[:28] - (200, 0, 0)).max() < 12
    assert found[36:].min() > 243
    grey = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (64, 1)))
    assert apart(heic(grey), grey.convert("RGB")) < 2


def test_of_several_images_the_primary_one() -> None:
    several = pillow_heif.HeifFile()
    images = [picture(seed, SIZE) for seed in (1, 2, 3)]
    for image in images:
        several.add_from_pillow(image)
    for primary in (0, 2):
        out = io.BytesIO()
        several.save(out, quality=90, primary_index=primary)
        assert apart(out.getvalue(), images[primary]) < 3


def test_an_embedded_preview_is_never_taken_for_the_photo() -> None:
    image = picture(3, (800, 600))
    data = heic(image, thumbnails=[320])
    small = Preprocess(64, (64, 64), "bilinear", (0.5,) * 3, (0.5,) * 3)
    assert decode(data, enough_for=[small]).tobytes() == decode(data).tobytes()


@pytest.mark.parametrize(("width", "height"), [(10_000, 9_000), (60_000, 60_000), (2**31 - 1, 2)])
def test_a_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    data = declared(heic(picture(1, SIZE)), width, height)
    assert width * height > MAX_PIXELS
    assert refused(data).reason == "too_large"
    with pytest.raises(ImageError, match="declared"):
        weigh(data)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (301, 200), (600, 400)])
def test_a_header_that_lies_is_found_out(width: int, height: int) -> None:
    """Otherwise a small header would let a large picture past the limit."""
    assert refused(declared(heic(picture(1, SIZE)), width, height)).reason == "corrupt"


def test_weight_and_small_limits() -> None:
    data = heic(picture(1, SIZE))
    assert weigh(data) == 300 * 200
    with pytest.raises(ImageError) as caught:
        decode(data, max_pixels=59_999)
    assert caught.value.reason == "too_large"
    assert refused(declared(data, 1, 1)).reason == "too_small"


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_photo_is_refused(share: float) -> None:
    data = heic(picture(2, SIZE))
    error = refused(data[: int(len(data) * share)])
    assert error.reason == ("truncated" if share > 0.03 else "corrupt")
    assert "\n" not in error.what


@pytest.mark.slow
def test_damage_is_an_image_or_an_image_error() -> None:
    """600 damaged files, half of them in their headers: decoders stay alive, in the processes that meet strangers."""
    random = np.random.default_rng(0)
    good = [heic(picture(5, SIZE)), heic(picture(6, (256, 256)), tile_size=128)]
    outcomes: collections.Counter[str] = collections.Counter()
    with DecoderPool(PREPROCESS, workers=1, timeout=20) as pool:
        for number in range(600):
            data = bytearray(good[number % 2])
            for place in random.integers(0, 700 if number % 4 < 2 else len(data), 6):
                data[place] = random.integers(0, 256)
            done = pool.decode(bytes(data), wanted=lambda: True)
            assert isinstance(done, Decoded)
            outcomes[done.refusal.reason if done.refusal else "decoded"] += 1
            if done.refusal is None:
                assert done.pixels is not None
    assert outcomes["decoded"] > 100 and outcomes["corrupt"] > 50 and outcomes["truncated"] > 10, outcomes
    assert not outcomes.keys() & {"decoder_crash", "decoder_timeout"}, outcomes


LIMITED = """
import sys
from pathlib import Path
from featx._system import limited_memory
from featx.images.pixels import BYTES_PER_PIXEL, decode
data = Path(sys.argv[1]).read_bytes()
with limited_memory(BYTES_PER_PIXEL * 24_000_000):
    print(decode(data).size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_what_decoding_may_take_is_enough(tmp_path: Path) -> None:
    """Also with tiles, which took more on several threads, and with transparency."""
    image, fast = picture(1, (6000, 4000)), {"quality": 50, "enc_params": {"preset": "ultrafast"}}
    for data in (heic(image, tile_size=512, **fast), heic(image.convert("RGBA"), **fast)):
        (tmp_path / "large.heic").write_bytes(data)
        command = [sys.executable, "-c", LIMITED, str(tmp_path / "large.heic")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "(6000, 4000)", done.stderr


def test_without_pillow_heif_a_photo_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(picture(1, SIZE))
    for broken in (None, object()):  # not there, or not with what is needed of it
        monkeypatch.setitem(sys.modules, "pillow_heif", broken)
        error = refused(data)
        assert error.reason == "unsupported_format"
        assert "HEIC, the iPhone's format, needs pillow-heif: pip install 'featx[heic]'" in str(error)
        assert decode(encode(np.asarray(picture(1)))).size == (40, 30)


@pytest.mark.slow
def test_a_folder_of_phone_photos(tmp_path: Path, featx: Featx) -> None:
    """First without pillow-heif: named, not counted as broken. Then with it: the same store takes them in."""
    photos, store, model = tmp_path / "photos", tmp_path / "s.featx", tmp_path / "m.model"
    for number in range(16):
        folder = photos / ("ants", "bees")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(number, SIZE).save(folder / f"{number}.png")
        (folder / f"IMG_{number}.HEIC").write_bytes(heic(picture(100 + number, SIZE)))
    hidden = without("pillow_heif", tmp_path)
    ran = featx("extract", photos, "--out", store, "--json", env=hidden)
    assert (ran.code, ran.json["embedded"], ran.json["quarantined"]) == (3, 16, 16)
    assert any("16 images left out for the format" in note and "featx[heic]" in note for note in ran.json["notes"])
    before = featx("info", store, "--json").json
    ran = featx("extract", photos, "--out", store, "--json")
    assert (ran.code, ran.json["embedded"], ran.json["quarantined"]) == (0, 16, 0), ran.err
    after = featx("info", store, "--json").json
    assert after["images"] == 32
    assert after["fingerprint"] == before["fingerprint"]
    assert featx("fit", store, "--out", model).code == 0
    one = photos / "ants" / "IMG_0.HEIC"
    ran = featx("predict", model, one, "--json", env=hidden)
    assert "featx[heic]" in ran.out + ran.err
    ran = featx("predict", model, one, "--json")
    assert ran.code == 0 and ran.json["predictions"][0]["label"] in ("ants", "bees"), ran.out
