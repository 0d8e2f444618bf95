"""From a DICOM file to grey or RGB pixels of eight bits: the only door of pydicom.

What a scanner measured has no brightness until somebody says what is black and what is white. The rule here,
:data:`RULE`, in the order of the standard (PS3.4, annex N.2):

- the first frame, as of other formats;
- the modality's values: its LUT, or slope and intercept (a CT's Hounsfield units), by pydicom's ``apply_modality_lut``;
- black and white: the file's VOI LUT, or its first window (linear, exact or sigmoid), by ``apply_voi_lut``. Where it
  has neither: the whole range of images of up to eight bits, and from the darkest to the brightest pixel of others
  (leaving out the padding value);
- ``MONOCHROME1`` is inverted, so that what its scanner shows bright is bright; palettes and YBR become RGB.

Only the elements that say how pixels are to be read are taken from a file, never a patient's. pydicom quotes values in
its warnings and errors: its warnings and its log are switched off here, and no message has its words.
"""

from __future__ import annotations

import contextlib
import io
import logging
import struct
import warnings
from collections.abc import Iterable, Iterator
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx.errors import ImageError

RULE = "first frame; VOI LUT, else first window, else darkest to brightest above 8 bits (1)"
"""What decides how bright a pixel is, for provenance; the number is another one when the pixels would be."""

SUFFIXES = (".dcm", ".dicom")
"""What DICOM files are called, where their names say so."""

_IMPLICIT, _EXPLICIT, _BIG_ENDIAN, _RLE = (f"1.2.840.10008.1.2{end}" for end in ("", ".1", ".2", ".5"))
_READ = frozenset({_IMPLICIT, _EXPLICIT, _BIG_ENDIAN, _RLE})
"""Transfer syntaxes that pydicom decodes by itself, into no more bytes than the image has."""

_COMPRESSED = MappingProxyType(
    {
        "1.2.840.10008.1.2.1.99": "as a whole (deflate)",
        "1.2.840.10008.1.2.4.5": "as JPEG",
        "1.2.840.10008.1.2.4.6": "as JPEG",
        "1.2.840.10008.1.2.4.7": "as JPEG",
        "1.2.840.10008.1.2.4.8": "as JPEG-LS",
        "1.2.840.10008.1.2.4.9": "as JPEG 2000",
        "1.2.840.10008.1.2.4.10": "as video",
        "1.2.840.10008.1.2.4.11": "as JPEG XL",
        "1.2.840.10008.1.2.4.20": "as JPEG 2000",
    }
)
"""How others are compressed, by what their UIDs begin with; the longest one counts."""

_ELEMENTS = (
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue",
    "RedPaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData", "ModalityLUTSequence", "RescaleIntercept", "RescaleSlope",
    "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "PixelData", "FloatPixelData",
    "DoubleFloatPixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
)  # fmt: skip
"""All that is read of a file."""

_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422")
_PALETTE = "PALETTE COLOR"

_META_ELEMENTS = 100
"""Of a file's own description, at most; the standard knows some twenty."""

_LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
"""Kinds of values whose length is in four bytes, two bytes later."""

_ROWS = 256
"""At a time: the arrays of floats in between would take more memory than the image may."""


def is_dicom(data: bytes) -> bool:
    """Whether these are the bytes of a DICOM file, by its mark."""
    return data[128:132] == b"DICM"


def rules_of(ids: Iterable[str]) -> dict[str, str]:
    """What a store's provenance says of images that are called so: the rule, where there are DICOM files among them."""
    return {"dicom": RULE} if any(each.lower().endswith(SUFFIXES) for each in ids) else {}


def load() -> Any:
    """Pydicom, silenced.

    Raises
    ------
    ImageError
        It is not installed.
    """
    # What it warns of quotes elements of the file, which may be names of patients where numbers should be. What is
    # wrong with a file is told in words of featx's own. Each time: other filters may have been put before this one.
    warnings.filterwarnings("ignore", module=r"pydicom\b|featx\.images\.dicom\b")
    logging.getLogger("pydicom").disabled = True
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        hint = "pip install 'featx[dicom]', or export it as PNG"
        raise ImageError("unsupported_format", f"DICOM, the format of scanners, needs pydicom: {hint}") from error
    return pydicom


class DicomFile:
    """A DICOM file, of which only the description was read.

    Parameters
    ----------
    data : its bytes.

    Attributes
    ----------
    size : (width, height) of a frame.

    Raises
    ------
    ImageError
        It has no image, or one of a kind that is not read.
    """

    def __init__(self, data: bytes) -> None:
        pydicom = load()
        syntax = _transfer_syntax(data)
        _check_syntax(syntax)
        with _without_its_words():
            self._dataset = pydicom.dcmread(io.BytesIO(data), specific_tags=list(_ELEMENTS))
        found = self._dataset
        if "Rows" not in found and "Columns" not in found:
            raise ImageError("not_an_image", "DICOM without an image: a report, a plan, or a measurement")
        self.size = self._number("Columns"), self._number("Rows")
        self._samples, self._stored = self._number("SamplesPerPixel", 1), self._number("BitsStored")
        self._kind = str(self._value("PhotometricInterpretation"))
        if "PixelData" not in found:
            if "FloatPixelData" in found or "DoubleFloatPixelData" in found:
                raise ImageError("unsupported_mode", "floating-point pixels have no defined range; save as 16 bits")
            raise _truncated()
        if self._kind not in {1: (*_GREY, _PALETTE), 3: _COLOURS}.get(self._samples, ()):
            raise ImageError("unsupported_mode", "DICOM with colours of a kind that is not read; export it as PNG")
        allocated = self._number("BitsAllocated")
        if min(self.size) < 1 or not 1 <= self._stored <= allocated <= 32:
            raise _corrupt()
        bits = self.size[0] * self.size[1] * (2 if self._kind == "YBR_FULL_422" else self._samples) * allocated
        if syntax != _RLE and 8 * len(self._value("PixelData")) < bits:
            raise _truncated()

    def pixels(self) -> NDArray[np.uint8]:
        """Grey (h, w) or RGB (h, w, 3) pixels of the first frame.

        Raises
        ------
        ImageError
            They cannot be decoded.
        """
        pydicom = load()
        with _without_its_words(), np.errstate(all="ignore"):
            raw = pydicom.pixels.pixel_array(self._dataset, index=0)
            return self._grey(raw) if self._kind in _GREY else self._coloured(raw)

    def _value(self, name: str) -> Any:
        with _without_its_words():
            return self._dataset.get(name)

    def _number(self, name: str, default: int = -1) -> int:
        value = self._value(name)
        return value if isinstance(value, int) else default

    def _coloured(self, raw: NDArray[Any]) -> NDArray[np.uint8]:
        out = np.empty((*raw.shape[:2], 3), np.uint8)
        for rows in _strips(raw):
            part = raw[rows]
            if self._kind == _PALETTE:
                part = load().pixels.apply_color_lut(part, self._dataset)
                most = 2.0 ** (8 * part.dtype.itemsize) - 1
            else:
                most = 2.0**self._stored - 1
            out[rows] = _scaled(part[..., :3], 0.0, most)
        return out

    def _grey(self, raw: NDArray[Any]) -> NDArray[np.uint8]:
        tools, found = load().pixels, self._dataset

        def modality(values: NDArray[Any]) -> NDArray[Any]:
            return np.asarray(tools.apply_modality_lut(values, found))

        windowed = None not in (found.get("WindowCenter"), found.get("WindowWidth"))
        table = found.get("VOILUTSequence")
        if table:
            low, high = 0.0, 2.0 ** int(table[0].LUTDescriptor[2]) - 1
        elif windowed:  # as far as the window's ends go, whatever pydicom makes of them
            low, high = tools.apply_windowing(np.array([-1e30, 1e30]), found)
        else:
            low, high = self._range(raw, modality)
        out = np.empty(raw.shape, np.uint8)
        for rows in _strips(raw):
            values = modality(raw[rows])
            if table:
                # A table is of whole numbers, which slopes and intercepts need not leave.
                values = np.rint(values).astype(np.int64) if values.dtype.kind == "f" else values
            if table or windowed:
                values = tools.apply_voi_lut(values, found)
            out[rows] = _scaled(values, low, high)
        return 255 - out if self._kind == "MONOCHROME1" else out

    def _range(self, raw: NDArray[Any], modality: Any) -> tuple[float, float]:
        """What is black and what is white where the file does not say."""
        if self._stored <= 8:
            signed = self._number("PixelRepresentation", 0) == 1
            first = -(2 ** (self._stored - 1)) if signed else 0
            raw, padding = np.array([first, first + 2**self._stored - 1], raw.dtype), None
        else:
            padding = self._value("PixelPaddingValue")
        ends = []
        for rows in _strips(raw):
            part = raw[rows]
            inside = part[part != padding] if isinstance(padding, int) else part
            if inside.size:
                values = modality(inside)
                ends += [float(values.min()), float(values.max())]
        return (min(ends), max(ends)) if ends else (0.0, 1.0)


def _strips(array: NDArray[Any]) -> Iterator[slice]:
    for top in range(0, len(array), _ROWS):
        yield slice(top, top + _ROWS)


def _scaled(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """From ``low``, black, to ``high``, white; all black where that is one value."""
    if not high > low and not low > high:
        return np.zeros(values.shape, np.uint8)
    shares = (values.astype(np.float64) - low) / (high - low)
    return np.asarray(np.floor(255.0 * np.clip(shares, 0.0, 1.0) + 0.5), np.uint8)


def _check_syntax(syntax: str) -> None:
    """ImageError where the pixels are compressed in a way that is not read; before anything is unpacked."""
    if syntax in _READ:
        return
    starts = max((start for start in _COMPRESSED if syntax.startswith(start)), key=len, default="")
    how = _COMPRESSED.get(starts, "in an unknown way")
    raise ImageError(
        "unsupported_format",
        f"DICOM that is compressed {how} is not read; decompress it first, as by gdcmconv --raw, or export it as PNG",
    )


def _transfer_syntax(data: bytes) -> str:
    """The UID of how the rest of a file is written, from its group 2, which is always explicit and little endian."""
    place = 132
    try:
        for _ in range(_META_ELEMENTS):
            group, element, kind, length = struct.unpack_from("<HH2sH", data, place)
            place += 8
            if group != 2:
                break
            if kind in _LONG:
                (length,) = struct.unpack_from("<I", data, place)
                place += 4
            if element == 0x10:
                return data[place : place + min(length, 64)].rstrip(b"\0 ").decode("ascii", errors="replace")
            place += length
    except struct.error:
        raise _truncated() from None
    raise _corrupt()


@contextlib.contextmanager
def _without_its_words() -> Iterator[None]:
    """An ImageError for whatever pydicom says of a file, since that may be a patient's name."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception:  # noqa: BLE001
        raise _corrupt() from None


def _truncated() -> ImageError:
    return ImageError("truncated", "the file ends before the image does")


def _corrupt() -> ImageError:
    return ImageError("corrupt", "the DICOM file is damaged, or not as the standard has it")
