"""From the bytes of one image file to upright RGB pixels: the only door of Pillow, and of pillow-heif.

Extraction and the service decode through the same functions, so a photo gives the same numbers in
both. What is decided here, once:

- only the formats of ``FORMATS`` are tried (Pillow has some forty readers, most of them unaudited), and HEIC where
  pillow-heif is installed: its reader is called by name, and Pillow's own list of readers stays as it is; DICOM where
  pydicom is, with its own rule of what is black and white (:mod:`featx.images.dicom`);
- the size and a JPEG's scans are checked before anything is decoded;
- EXIF orientation is applied (of HEIC what the container says of turning, which libheif has applied already: what its
  EXIF says is a copy of it); of an animation the first frame is taken, of several images in a HEIC the primary one;
- 16-bit images are scaled to 8 bits (a plain ``convert("RGB")`` would clip them to white), 10 and 12 bits of HEIC too;
- transparency is composited on white (hidden pixels under it often hold arbitrary colours);
- colour profiles are ignored, as in the pipelines that the networks were trained with.

A file that cannot be decoded raises :class:`featx.errors.ImageError` with one of the ``REASONS``.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageDraw,
    ImageFont,
    ImageOps,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from featx._files import publish
from featx.errors import ImageError, in_words
from featx.images.dicom import DicomFile, is_dicom, load as load_pydicom

if TYPE_CHECKING:
    from pillow_heif import HeifImageFile

    from featx.images.views import Looks

_READERS = (
    JpegImagePlugin.JpegImageFile,
    PngImagePlugin.PngImageFile,
    WebPImagePlugin.WebPImageFile,
    GifImagePlugin.GifImageFile,
    BmpImagePlugin.BmpImageFile,
    TiffImagePlugin.TiffImageFile,
    PpmImagePlugin.PpmImageFile,
    AvifImagePlugin.AvifImageFile,
    MpoImagePlugin.MpoImageFile,  # the JPEG of many phones and stereo cameras
)
FORMATS = tuple(reader.format for reader in _READERS if reader.format in Image.OPEN)
"""Decoders that are allowed to see a file (those of the list that this Pillow was built with)."""

DICOM = "DICOM"
"""What the extra ``dicom`` reads; no format of Pillow's."""

HEIF = "HEIF"
"""What Pillow calls HEIC and its relatives, which the extra ``heic`` reads."""

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

DECODE_MODES = ("full", "scaled")
"""How much of a JPEG is decoded: everything, or (for large photos) only as much as the resize needs."""

MAX_PIXELS = 89_478_485
"""Above this (a quarter of 2**30 bytes at 3 bytes a pixel, Pillow's own bound) a file is refused by its header."""

BYTES_PER_PIXEL = 24
"""Memory that decoding may take; the greediest (lossless WebP, TIFF with 32-bit integers) were seen to take 18."""

MAX_SCANS = 100
"""Every scan of a JPEG is work on all pixels. Cameras write 1, common programs 10, the most thorough ones some 20."""

_USUAL_SCANS = 10

MIN_SIDE = 2
"""A tracking pixel decodes well, and says nothing: images with a side below this are refused."""

BACKGROUND = (255, 255, 255)

_UNSUPPORTED = {
    "JPEG XL": (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
    "Photoshop's PSD": (b"8BPS",),
}

REASONS: Mapping[str, str] = MappingProxyType(
    {
        "empty": "the file has no bytes",
        "bad_name": "the path or the label cannot be stored as text",
        "unreadable": "the operating system cannot read the file",
        "missing": "the manifest names a file that is not there",
        "not_an_image": "no allowed decoder recognises the bytes",
        "unsupported_format": "a photo, in a format that is not read",
        "truncated": "the file ends before the image does",
        "corrupt": "the decoder gives up on the bytes",
        "too_large": "the header declares more pixels than MAX_PIXELS",
        "too_costly": "decoding would take far longer than a photo does",
        "too_small": "a side is shorter than MIN_SIDE pixels",
        "unsupported_mode": "pixels of a kind that has no defined 8-bit meaning",
        "decoder_crash": "the decoder ended on this image",
        "decoder_timeout": "the decoder did not end in time",
    }
)

# Pillow warns above MAX_PIXELS and goes on; here that warning is an answer, in every thread.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

_ROWS = 256

_RADIUS = 3
"""Of the widest filter (Lanczos), in pixels of the smaller of the two pictures."""

_SHRUNK = "_featx_shrunk"

_FINER = 4
"""A thumbnail is made at so many times its size, and averaged: then it hardly depends on the image's own size."""

_RESAMPLING = MappingProxyType(
    {
        "nearest": Image.Resampling.NEAREST,
        "bilinear": Image.Resampling.BILINEAR,
        "bicubic": Image.Resampling.BICUBIC,
        "lanczos": Image.Resampling.LANCZOS,
    }
)


@dataclass(frozen=True)
class Preprocess:
    """How pixels become a network's input. It belongs to the weights, not to the architecture.

    Parameters
    ----------
    resize : the length in pixels that the shorter side is scaled to (keeping the aspect), or the exact
        ``(height, width)`` to scale to.
    crop : ``(height, width)`` in pixels, cut from the centre after the resize.
    interpolation : "nearest", "bilinear", "bicubic" or "lanczos", antialiased as Pillow does; "area" is for
        thumbnails of whole images, the mean over what a pixel covers, fast and approximate.
    mean, std : per channel, of pixels scaled to 0..1; applied by the engine, not here.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int]
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON types (tuples become lists)."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Preprocess:
        """The inverse of :meth:`to_json`."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**plain)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """``(width, height)`` after the resize, rounded as torchvision and timm round."""
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        if width <= height:
            return self.resize, int(self.resize * height / width)
        return int(self.resize * width / height), self.resize


def decode_settings(mode: str = "full") -> dict[str, Any]:
    """What of this module changes pixels: part of a store's fingerprint."""
    return {"mode": mode, "background": list(BACKGROUND), "orientation": "exif", "frame": 0}


def decoder_version() -> str:
    """Name and version of the decoder, for provenance."""
    return f"Pillow {PIL.__version__}"


class _DicomImage(Image.Image):
    """A DICOM file as one of Pillow's images, in RGB once it is loaded."""

    format = DICOM

    def __init__(self, file: DicomFile) -> None:
        super().__init__()
        self._file: DicomFile | None = file
        self._size, self._mode = file.size, "RGB"

    def load(self) -> Any:
        """Decode it, once."""
        if self._file is not None:
            self.im = Image.fromarray(self._file.pixels()).convert("RGB").im
            self._file = None
        return super().load()


def decode(data: bytes, *, enough_for: Sequence[Preprocess | Looks] = (), max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one file's bytes to an upright RGB image.

    Parameters
    ----------
    enough_for : decode a JPEG at a half, a quarter or an eighth of its size, as long as that is no smaller than what
        each of these resizes to (decode mode "scaled"). By default the image has its full size.
    max_pixels : a larger image is refused by its header.

    Raises
    ------
    ImageError
        With the reason code of what is wrong with the file.
    """
    image, _ = _admit(data, max_pixels)
    with _refusing():
        # Of HEIC, draft would take an embedded preview, which need not be of the same picture.
        if enough_for and image.format != HEIF:
            widths, heights = zip(*(each.resized(*image.size) for each in enough_for), strict=True)
            image.draft("RGB", (max(widths), max(heights)))
        image.load()
        return _to_rgb(image if image.format == HEIF else _upright(image))


def weigh(data: bytes, *, max_pixels: int = MAX_PIXELS) -> int:
    """How much work decoding is, before it is done: the pixels that the header declares, more for needless scans.

    Raises
    ------
    ImageError
        It would be refused, as by :func:`decode`.
    """
    image, scans = _admit(data, max_pixels)
    return image.width * image.height * max(_USUAL_SCANS, scans) // _USUAL_SCANS


def prepare(data: bytes) -> None:
    """Import what reads this file, so that nobody counts its time as the file's, or ends it half done."""
    with contextlib.suppress(ImageError, ImportError):
        if is_dicom(data):
            load_pydicom()
        elif _is_heif(data):
            import pillow_heif  # noqa: F401 - for its import's sake


def _admit(data: bytes, max_pixels: int) -> tuple[Image.Image, int]:
    """The image, of which only the header was read, and the number of its scans; ImageError where it is refused."""
    if not data:
        raise ImageError("empty", "the file is empty")
    image = _open(data)
    width, height = image.size
    if width * height > max_pixels:
        raise _too_large(f"{width}x{height}", max_pixels)
    if min(width, height) < MIN_SIDE:
        raise ImageError("too_small", f"{width}x{height} pixels; at least {MIN_SIDE} a side are needed")
    scans = _scans(data) if image.format in ("JPEG", "MPO") else 1
    if scans > MAX_SCANS:
        raise ImageError("too_costly", f"more than {MAX_SCANS} scans; save it again with any program")
    return image, scans


_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def _scans(data: bytes) -> int:
    """Scans of a JPEG up to one more than MAX_SCANS, by its markers."""
    if data.count(b"\xff\xda") <= _USUAL_SCANS:  # fast, and never less than there are
        return 1
    place, scans = 2, 0
    while scans <= MAX_SCANS and (found := _MARKER.search(data, place)):
        place = found.end()
        kind = data[place - 1]
        if kind == 0xD9:  # the end: an embedded preview or video may follow
            break
        if kind not in (0x01, 0xD8):
            scans += kind == 0xDA
            place += int.from_bytes(data[place : place + 2], "big")
    return scans


def open_header(data: bytes) -> Image.Image:
    """The image, of which only the header was read; ImageError where it is refused."""
    return _admit(data, MAX_PIXELS)[0]


def is_image(value: object) -> bool:
    """Whether this is one of Pillow's images."""
    return isinstance(value, Image.Image)


def as_rgb(value: object) -> Image.Image:
    """An upright RGB image of one of Pillow's images or of uint8 pixels (h, w) or (h, w, 3), as of a file with them.

    Raises
    ------
    TypeError
        It is neither, and what it is.
    ImageError
        Its size or its kind of pixels is refused.
    """
    if not isinstance(value, Image.Image):
        if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.shape[2:] not in ((), (3,)):
            raise TypeError(f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__)
        if value.ndim < 2:
            raise TypeError(f"{value.dtype} {value.shape}")
        if not value.size:
            raise ImageError("empty", "it has no pixels")
        value = Image.fromarray(value)
    width, height = value.size
    if min(width, height) < MIN_SIDE:
        raise ImageError("too_small", f"{width}x{height} pixels; at least {MIN_SIDE} a side are needed")
    return _to_rgb(_upright(value))


def encode(array: NDArray[np.uint8], *, form: str = "PNG") -> bytes:
    """Bytes of a "PNG" or "JPEG" file with grey ``(h, w)`` or RGB ``(h, w, 3)`` pixels."""
    out = io.BytesIO()
    Image.fromarray(array).save(out, format=form)
    return out.getvalue()


def resized(array: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """RGB pixels (h, w, 3) at another size."""
    return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR), dtype=np.uint8)


def written(text: str, width: int, height: int) -> NDArray[np.uint8]:
    """A line of text, dark on white, as RGB pixels (height, width, 3); what does not fit in is cut off."""
    strip = Image.new("RGB", (width, height), BACKGROUND)
    font = ImageFont.load_default(size=0.6 * height)
    ImageDraw.Draw(strip).text((0.2 * height, 0.12 * height), text, fill=(26, 28, 31), font=font)
    return np.asarray(strip, dtype=np.uint8)


def save_png(array: NDArray[np.uint8], path: Path) -> None:
    """Write grey ``(h, w)`` or RGB ``(h, w, 3)`` pixels as a PNG that appears whole or not at all."""
    publish(path, lambda temp: Image.fromarray(array).save(temp, format="PNG"))


def resize_crop(image: Image.Image, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Resize and centre-crop an RGB image as torchvision's and timm's transforms do: uint8 ``(h, w, 3)``.

    Only the part of the picture that ends up in the crop is resampled, which gives the same pixels as
    resizing everything and cropping then, in half the time (and a 1x20000 strip costs nothing).
    """
    width, height = image.size
    box = crop_box(preprocess, width, height)
    if (width, height) == preprocess.resized(width, height):
        return np.asarray(image.crop(tuple(map(round, box))), dtype=np.uint8)  # type: ignore[arg-type]
    return resize_box(image, preprocess, box)


def crop_box(preprocess: Preprocess, width: int, height: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the part of an image of this size that ends up in the crop, in its pixels."""
    new_width, new_height = preprocess.resized(width, height)
    crop_height, crop_width = preprocess.crop
    if crop_width > new_width or crop_height > new_height:
        raise ImageError("unsupported_mode", f"the crop {preprocess.crop} is larger than the resized image")
    left = round((new_width - crop_width) / 2.0)
    top = round((new_height - crop_height) / 2.0)
    scale_x, scale_y = width / new_width, height / new_height
    return (
        left * scale_x,
        top * scale_y,
        min((left + crop_width) * scale_x, float(width)),
        min((top + crop_height) * scale_y, float(height)),
    )


def shrink(image: Image.Image, width: int, height: int) -> Image.Image:
    """An RGB image at so many pixels, fast where it is far larger: the same to within a grey level or two.

    The last one is kept with the image: its hash and its thumbnail are both made of 64 x 64 pixels.
    """
    small: Image.Image | None = getattr(image, _SHRUNK, None)
    if small is None or small.size != (width, height):
        small = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
        setattr(image, _SHRUNK, small)
    return small


def resize_box(image: Image.Image, preprocess: Preprocess, box: tuple[float, float, float, float]) -> NDArray[np.uint8]:
    """Resize a part of an RGB image, (left, top, right, bottom) in pixels, to the crop's shape: uint8 ``(h, w, 3)``."""
    height, width = preprocess.crop
    left, top, right, bottom = box
    resampling = _RESAMPLING[preprocess.interpolation.replace("area", "bilinear")]
    if box == (0, 0, *image.size):
        if preprocess.interpolation == "area":
            return np.asarray(shrink(image, _FINER * width, _FINER * height).reduce(_FINER), dtype=np.uint8)
        return np.asarray(image.resize((width, height), resampling), dtype=np.uint8)
    # Columns, then rows: so does Pillow with a picture that keeps its shape, and rounds in between. Left to itself with
    # a box it may turn the order round, by the shape of the whole picture. Only rows that the filter reaches count.
    reach = _RADIUS * max((bottom - top) / height, 1.0) + 1
    first, last = max(0, math.floor(top - reach)), min(image.height, math.ceil(bottom + reach))
    rows = image.crop((0, first, image.width, last))
    columns = rows.resize((width, rows.height), resampling, box=(left, 0, right, rows.height))
    return np.asarray(
        columns.resize((width, height), resampling, box=(0, top - first, width, bottom - first)), np.uint8
    )


def _open(data: bytes) -> Image.Image:
    # Before the others: in the 128 bytes before its mark, many programs write the start of a TIFF.
    if is_dicom(data):
        return _DicomImage(DicomFile(data))
    with _refusing():
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise _too_large(str(error)) from error
        except UnidentifiedImageError as error:
            if _is_heif(data):
                return _open_heif(data)
            if found := _unsupported(data):
                raise ImageError("unsupported_format", f"{found} is not read; export it as JPEG") from error
            known = ", ".join((*FORMATS, "HEIC", "DICOM"))
            raise ImageError("not_an_image", f"not one of {known}{_what_it_is(data)}") from error


def _is_heif(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS


def _open_heif(data: bytes) -> HeifImageFile:
    try:
        from pillow_heif import HeifImageFile, options
    except ImportError as error:
        hint = "pip install 'featx[heic]', or export it as JPEG"
        raise ImageError("unsupported_format", f"HEIC, the iPhone's format, needs pillow-heif: {hint}") from error
    # Photos are decoded side by side already, and the tiles of one on four threads take three times the memory.
    options.DECODE_THREADS = 1
    return HeifImageFile(io.BytesIO(data))  # type: ignore[no-untyped-call]


def _upright(image: Image.Image) -> Image.Image:
    # Most files are upright already, and exif_transpose copies.
    if image.getexif().get(0x0112, 1) == 1:
        return image
    for name in ("exif", "Raw profile type exif"):
        image.info.pop(name, None)  # else exif_transpose writes it anew, however large it is
    return ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return _from_16_bits(np.asarray(image, dtype=np.uint16))
    if image.mode == "I":
        wide = np.asarray(image)
        if wide.min() < 0 or wide.max() > 65535:
            raise ImageError("unsupported_mode", "32-bit integers outside 0..65535; save as 8 or 16 bits")
        return _from_16_bits(wide.astype(np.uint16))
    if image.mode == "F":
        raise ImageError("unsupported_mode", "floating-point pixels have no defined range; save as 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _on_background(image)
    return image.convert("RGB")


def _on_background(image: Image.Image) -> Image.Image:
    """Transparency composited, by rows: the whole in one piece would take three more copies of it."""
    width, height = image.size
    rgb = Image.new("RGB", image.size)
    for top in range(0, height, _ROWS):
        rows = image.crop((0, top, width, min(top + _ROWS, height))).convert("RGBA")
        canvas = Image.new("RGBA", rows.size, (*BACKGROUND, 255))
        rgb.paste(Image.alpha_composite(canvas, rows).convert("RGB"), (0, top))
    return rgb


def _from_16_bits(wide: NDArray[np.uint16]) -> Image.Image:
    # 257 = 65535 / 255: full scale maps to full scale; + 128 rounds.
    return Image.fromarray(((wide.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")


def _too_large(found: str, most: int = MAX_PIXELS) -> ImageError:
    return ImageError("too_large", f"more than {most:,} pixels are declared ({found})")


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """An ImageError for whatever a decoder says of a file; a lack of memory is the process's."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        said = str(error).lower()
        reason = "truncated" if "truncated" in said or "unexpected end of file" in said else "corrupt"
        raise ImageError(reason, f"it cannot be decoded ({in_words(error)})") from error


def _unsupported(data: bytes) -> str:
    """The format of an image that is sound for all that is known, and that no allowed decoder reads; or ""."""
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"):
        return "AVIF (by this Pillow)"
    return next((name for name, starts in _UNSUPPORTED.items() if data.startswith(starts)), "")


def _what_it_is(data: bytes) -> str:
    """A word of help for the files that people most often mistake for photos."""
    if data[:4] == b"%PDF":
        return " (it is a PDF)"
    if data.lstrip()[:1] == b"<":
        return " (it is HTML, XML or SVG)"
    return ""
