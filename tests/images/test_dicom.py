"""DICOM through pydicom: the pixels that NumPy makes of the raw ones, nothing of the patient, and damage refused."""

from __future__ import annotations

import collections
import io
import json
import logging
import math
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Featx, without
from numpy.typing import NDArray
from storekit import PREPROCESS

from featx.errors import ImageError
from featx.images.pixels import MAX_PIXELS, REASONS, decode, weigh
from featx.images.pool import Decoded, DecoderPool

pydicom = pytest.importorskip("pydicom", reason="the extra dicom is not installed")

FILES = Path(pydicom.__file__).parent / "data" / "test_files"
"""Those that come with pydicom."""

EXPLICIT, IMPLICIT, BIG, DEFLATED = (f"1.2.840.10008.1.2{end}" for end in (".1", "", ".2", ".1.99"))
SECRET = "Mustermann^Erika"


def made(pixels: NDArray[Any], syntax: str = EXPLICIT, **elements: Any) -> bytes:
    """A DICOM file of grey (h, w), RGB (h, w, 3) or several grey (n, h, w) pixels, of a patient with a name."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = SECRET, "4711-SECRET", "19640812"
    colours = pixels.ndim == 3 and pixels.shape[2] == 3
    bits = 8 * pixels.dtype.itemsize
    fields = {
        "Rows": pixels.shape[0 if colours or pixels.ndim == 2 else 1],
        "Columns": pixels.shape[1 if colours or pixels.ndim == 2 else 2],
        "SamplesPerPixel": 3 if colours else 1,
        "PhotometricInterpretation": "RGB" if colours else "MONOCHROME2",
        "BitsAllocated": bits, "BitsStored": bits, "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        **({"PlanarConfiguration": 0} if colours else {}),
        **({"NumberOfFrames": len(pixels)} if pixels.ndim == 3 and not colours else {}),
        **elements,
    }  # fmt: skip
    for name, value in fields.items():
        setattr(dataset, name, value)
    if "PixelData" not in fields:
        dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder(">" if syntax == BIG else "<")).tobytes()
    dataset["PixelData"].VR = "OW" if bits > 8 else "OB"
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pydicom.dcmwrite(out, dataset, enforce_file_format=True)
    return out.getvalue()


def grey(data: bytes) -> NDArray[np.int64]:
    found = np.asarray(decode(data), dtype=np.int64)
    assert found.ndim == 3 and (found == found[..., :1]).all()
    return found[..., 0]


def refused(data: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert caught.value.reason in REASONS
    assert caught.value.__cause__ is None or isinstance(caught.value.__cause__, ImportError)
    return caught.value


def eight_bits(shares: NDArray[Any]) -> NDArray[np.int64]:
    return np.asarray(np.floor(255 * np.clip(shares, 0, 1) + 0.5), np.int64)


def raw(data: bytes, dtype: str, height: int, width: int) -> NDArray[np.float64]:
    """The pixels as they lie in the file: in these, they are its last element."""
    mark = data.rindex(b"\xe0\x7f\x10\x00" if dtype[0] != ">" else b"\x7f\xe0\x00\x10")
    start = mark + (12 if data[mark + 4 : mark + 6] in (b"OW", b"OB") else 8)
    return np.frombuffer(data, dtype, height * width, start).reshape(height, width).astype(np.float64)


# --- against NumPy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("MR_small.dcm", "<i2"), ("MR_small_bigendian.dcm", ">i2"), ("MR_small_implicit.dcm", "<i2")],
)
def test_a_window(name: str, dtype: str) -> None:
    """Center 600, width 1600: by the formula of the standard, C.11.2.1.2.1."""
    data = (FILES / name).read_bytes()
    expected = eight_bits((raw(data, dtype, 64, 64) - (600 - 0.5)) / (1600 - 1) + 0.5)
    assert len(np.unique(expected)) > 50
    np.testing.assert_array_equal(grey(data), expected)


def test_run_lengths_are_read_by_pydicom_itself() -> None:
    np.testing.assert_array_equal(
        grey((FILES / "MR_small_RLE.dcm").read_bytes()), grey((FILES / "MR_small.dcm").read_bytes())
    )


def test_without_a_window_from_the_darkest_to_the_brightest() -> None:
    """A CT in Hounsfield units whose padding is darker than all of it; its file starts as a TIFF does."""
    data = (FILES / "CT_small.dcm").read_bytes()
    assert data[:2] == b"II" and weigh(data) == 128 * 128
    values = raw(data, "<i2", 128, 128)
    padding = pydicom.dcmread(io.BytesIO(data)).PixelPaddingValue
    inside = values[values != padding]
    expected = eight_bits((values - inside.min()) / (inside.max() - inside.min()))
    np.testing.assert_array_equal(grey(data), expected)


def test_colours_as_they_are() -> None:
    data = (FILES / "SC_rgb_jpeg_dcmd.dcm").read_bytes()
    expected = np.frombuffer(data, np.uint8)[-256 * 256 * 3 :].reshape(256, 256, 3)
    np.testing.assert_array_equal(np.asarray(decode(data)), expected)
    whole = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
    np.testing.assert_array_equal(np.asarray(decode(made(whole))), whole)
    planes = made(whole, PlanarConfiguration=1, PixelData=np.ascontiguousarray(whole.transpose(2, 0, 1)).tobytes())
    np.testing.assert_array_equal(np.asarray(decode(planes)), whole)
    wide = whole.astype(np.uint16) * 257
    np.testing.assert_array_equal(np.asarray(decode(made(wide))), whole)


def test_ybr_and_palettes_become_rgb() -> None:
    """The matrix of PS3.3 C.7.6.3.1.2, and a table of 16 bits."""
    random = np.random.default_rng(0)
    ybr = random.integers(60, 190, (8, 8, 3), dtype=np.uint8)
    y, b, r = (ybr[..., place].astype(float) for place in range(3))
    rgb = np.stack([y + 1.402 * (r - 128), y - 0.344136 * (b - 128) - 0.714136 * (r - 128), y + 1.772 * (b - 128)], -1)
    found = np.asarray(decode(made(ybr, PhotometricInterpretation="YBR_FULL")), dtype=float)
    assert np.abs(found - np.clip(rgb, 0, 255)).max() <= 1.0
    index = random.integers(0, 4, (5, 7), dtype=np.uint8)
    table = random.integers(0, 65536, (3, 4), dtype=np.uint16)
    colours: dict[str, Any] = {
        f"{name}PaletteColorLookupTable{part}": value
        for name, entries in zip(("Red", "Green", "Blue"), table, strict=True)
        for part, value in (("Descriptor", [4, 0, 16]), ("Data", entries.tobytes()))
    }
    data = made(index, PhotometricInterpretation="PALETTE COLOR", **colours)
    expected = eight_bits(table / 65535)[:, index].transpose(1, 2, 0)
    np.testing.assert_array_equal(np.asarray(decode(data)), expected)


RAMP = np.arange(-1000, 1000, 5, dtype=np.int16).reshape(20, 20)


def test_hounsfield_units_windows_and_inversion() -> None:
    scale: dict[str, Any] = {"RescaleSlope": 2.0, "RescaleIntercept": -24.0}
    window: dict[str, Any] = {"WindowCenter": [40, 400], "WindowWidth": [400, 10]}  # the first counts
    units = 2.0 * RAMP - 24.0
    expected = eight_bits((units - 39.5) / 399 + 0.5)
    np.testing.assert_array_equal(grey(made(RAMP, **scale, **window)), expected)
    np.testing.assert_array_equal(
        grey(made(RAMP, PhotometricInterpretation="MONOCHROME1", **scale, **window)), 255 - expected
    )
    # A slope below zero turns the values round, not what their window calls black.
    turned = grey(made(RAMP, RescaleSlope=-2.0, RescaleIntercept=-24.0, **window))
    np.testing.assert_array_equal(turned, eight_bits((-2.0 * RAMP - 24.0 - 39.5) / 399 + 0.5))
    np.testing.assert_array_equal(grey(made(RAMP, RescaleSlope=-1.0, RescaleIntercept=0.0)), 255 - grey(made(RAMP)))


def test_the_other_functions_of_a_window() -> None:
    window: dict[str, Any] = {"WindowCenter": 0, "WindowWidth": 400}
    exact = eight_bits(RAMP / 400 + 0.5)
    assert np.abs(grey(made(RAMP, VOILUTFunction="LINEAR_EXACT", **window)) - exact).max() <= 1  # .5 may be rounded
    sigmoid = eight_bits(1 / (1 + np.exp(-4 * RAMP.astype(float) / 400)))
    assert np.abs(grey(made(RAMP, VOILUTFunction="SIGMOID", **window)) - sigmoid).max() <= 1


def test_tables_of_the_modality_and_of_the_view() -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8)

    def table(entries: NDArray[Any], bits: int) -> Any:
        item = pydicom.Dataset()
        item.LUTDescriptor, item.LUTData = [len(entries), 0, bits], entries.tolist()
        item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
        return pydicom.Sequence([item])

    view = (np.arange(64) ** 2 // 4).astype(np.uint16)  # up to 992 of 1023
    window: dict[str, Any] = {"WindowCenter": 5, "WindowWidth": 2}
    data = made(values, VOILUTSequence=table(view, 10), **window)  # the table goes before the window
    np.testing.assert_array_equal(grey(data), eight_bits(view[values] / 1023))
    modality = np.flip(np.arange(64)).astype(np.uint16) * 3
    data = made(values, ModalityLUTSequence=table(modality, 16))
    np.testing.assert_array_equal(grey(data), eight_bits(modality[values] / (63 * 3)))
    data = made(values, RescaleSlope=1.0, RescaleIntercept=0.0, VOILUTSequence=table(view, 10))
    np.testing.assert_array_equal(grey(data), eight_bits(view[values] / 1023))


def test_few_bits_keep_their_range() -> None:
    """An ultrasound, say, is a picture already: its darkest grey is not black."""
    picture = np.arange(50, 150, dtype=np.uint8).reshape(10, 10)
    np.testing.assert_array_equal(grey(made(picture)), picture)
    np.testing.assert_array_equal(grey(made(picture, RescaleSlope=1.0, RescaleIntercept=0.0)), picture)
    np.testing.assert_array_equal(grey(made(picture // 16, BitsStored=4, HighBit=3)), picture // 16 * 17)
    assert set(np.unique(grey((FILES / "liver_1frame.dcm").read_bytes()))) == {0, 255}
    flat = np.full((4, 4), 1000, np.uint16)
    assert grey(made(flat)).max() == 0


def test_of_several_frames_the_first() -> None:
    frames = np.stack([RAMP, RAMP[::-1], 0 * RAMP])
    window: dict[str, Any] = {"WindowCenter": 0, "WindowWidth": 2000}
    np.testing.assert_array_equal(grey(made(frames, **window)), grey(made(RAMP, **window)))
    assert weigh(made(frames)) == RAMP.size


def test_large_images_are_done_in_strips() -> None:
    tall = np.random.default_rng(0).integers(0, 4096, (700, 5), dtype=np.uint16)
    np.testing.assert_array_equal(
        grey(made(tall, BitsStored=12, HighBit=11)), eight_bits((tall - tall.min()) / (tall.max() - tall.min()))
    )


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("JPEG2000.dcm", "as JPEG 2000"), ("MR_small_jp2klossless.dcm", "as JPEG 2000"),
        ("SC_rgb_jpeg.dcm", "as JPEG"), ("SC_rgb_jpeg_gdcm.dcm", "as JPEG"), ("JPEG-lossy.dcm", "as JPEG"),
        ("MR_small_jpeg_ls_lossless.dcm", "as JPEG-LS"), ("image_dfl.dcm", "as a whole (deflate)"),
    ],
)  # fmt: skip
def test_compressed_pixels_are_named(name: str, how: str) -> None:
    error = refused((FILES / name).read_bytes())
    assert error.reason == "unsupported_format"
    assert f"DICOM that is compressed {how} is not read" in error.what


@pytest.mark.parametrize("name", ["reportsi.dcm", "rtplan.dcm", "test-SR.dcm", "waveform_ecg.dcm"])
def test_what_has_no_image(name: str) -> None:
    assert refused((FILES / name).read_bytes()).reason == "not_an_image"


def test_kinds_of_pixels_without_a_meaning() -> None:
    assert refused(made(RAMP, PhotometricInterpretation="HSV")).reason == "unsupported_mode"
    floats = made(RAMP).replace(b"\xe0\x7f\x10\x00OW", b"\xe0\x7f\x08\x00OF")
    assert refused(floats).reason == "unsupported_mode"
    assert refused(made(RAMP, WindowCenter=5, WindowWidth=0)).reason == "corrupt"
    assert refused(made(np.zeros((1, 9), np.uint8))).reason == "too_small"


@pytest.mark.parametrize(("height", "width"), [(10_000, 9_000), (65_535, 65_535)])
def test_a_bomb_is_refused_by_its_header(height: int, width: int) -> None:
    assert width * height > MAX_PIXELS
    for syntax in (EXPLICIT, IMPLICIT, BIG, "1.2.840.10008.1.2.5"):
        options: dict[str, Any] = {"PixelData": bytes(400)}
        data = made(RAMP, EXPLICIT if syntax.endswith(".5") else syntax, Rows=height, Columns=width, **options)
        if syntax.endswith(".5"):
            data = data.replace(EXPLICIT.encode() + b"\0", syntax.encode() + b"\0")
        assert refused(data).reason in ("too_large", "truncated")
        with pytest.raises(ImageError):
            weigh(data)
    large = made(np.zeros((300, 200), np.uint8))
    with pytest.raises(ImageError) as caught:
        decode(large, max_pixels=59_999)
    assert caught.value.reason == "too_large"


@pytest.mark.parametrize("share", [0.03, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_is_refused(share: float) -> None:
    for data in (made(RAMP), (FILES / "SC_rgb_jpeg_dcmd.dcm").read_bytes()):  # they end with their pixels
        data = data[: max(140, int(len(data) * share))]
        assert refused(data).reason in ("truncated", "corrupt", "not_an_image")


def test_damage_is_an_image_or_an_image_error() -> None:
    """Damaged in their headers, most of them: no decoder ends, hangs, or says more than one fixed sentence."""
    random = np.random.default_rng(0)
    window: dict[str, Any] = {"WindowCenter": 40, "WindowWidth": 400}
    good = [(FILES / "MR_small_RLE.dcm").read_bytes(), made(RAMP, **window), (FILES / "CT_small.dcm").read_bytes()]
    outcomes: collections.Counter[str] = collections.Counter()
    sentences: set[str] = set()
    with DecoderPool(PREPROCESS, workers=1, timeout=20) as pool:
        for number in range(450):
            data = bytearray(good[number % 3])
            for place in random.integers(128, 2000 if number % 4 else len(data), 8) % len(data):
                data[place] = random.integers(0, 256)
            done = pool.decode(bytes(data), wanted=lambda: True)
            assert isinstance(done, Decoded)
            outcomes[done.refusal.reason if done.refusal else "decoded"] += 1
            if done.refusal is not None:
                sentences.add(done.refusal.what)
    assert outcomes["decoded"] > 30 and outcomes["corrupt"] > 30, outcomes
    assert not outcomes.keys() & {"decoder_crash", "decoder_timeout"}, outcomes
    assert len(sentences) < 20, sentences


def nested(depth: int) -> bytes:
    """Sequences in sequences, of no defined length."""
    inside = struct.pack("<HH2sHI", 0x0040, 0xA730, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHI", 0xFFFE, 0xE000, 2**32 - 1
    )
    return made(RAMP).split(b"\x28\x00\x02\x00US")[0] + inside * depth


@pytest.mark.parametrize("depth", [100, 5000])
def test_what_costs_much_ends(depth: int) -> None:
    assert refused(nested(depth)).reason in ("corrupt", "truncated", "not_an_image")


# --- the patient --------------------------------------------------------------------------------------------------


def test_nothing_of_a_patient_is_said(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """Values that pydicom would quote in warnings and errors: a name where a number should be, a bad date, a bad VR."""
    caplog.set_level(logging.DEBUG)
    logging.getLogger("pydicom").setLevel(logging.DEBUG)
    good = made(RAMP, WindowCenter=111, WindowWidth=222)
    bad = [
        good.replace(b"111 ", b"Erik").replace(b"222 ", b"Must"),
        good.replace(b"19640812", b"ERIKA-64"),
        good.replace(SECRET.encode(), SECRET.encode()[:9] + b"\x1b[31m\n\\"),
        good.replace(b"MONOCHROME2 ", b"MustermannEr"),
        good[:-300],
        good.replace(EXPLICIT.encode() + b"\0", b"Mustermann.Erika4711\0"[: len(EXPLICIT) + 1]),
    ]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for data in bad:
            try:
                decode(data)
            except ImageError as error:
                said = f"{error!r} {error} {error.__cause__!r}"
                assert not any(word in said for word in ("Erik", "Must", "4711", "1964", "ERIKA")), said
        for data in bad:
            with pytest.raises(ImageError):
                decode(data[: len(data) // 2])
    assert not [each for each in warned if "pydicom" in str(each.filename) or "Erik" in str(each.message)]
    assert not [record for record in caplog.records if record.name.startswith("pydicom")]
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_store_of_scans_knows_the_rule_and_no_patient(tmp_path: Path, featx: Featx) -> None:
    """First without pydicom: named, not counted as broken. Then with it: the same store takes them in."""
    scans, store, model = tmp_path / "scans", tmp_path / "s.featx", tmp_path / "m.model"
    for number in range(16):
        folder = scans / ("ants", "bees")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(number).integers(0, 4000, (40, 30), dtype=np.uint16)
        window: dict[str, Any] = {"WindowCenter": 2000, "WindowWidth": 4000}
        (folder / f"{number}{('.dcm', '.DICOM')[number % 4 // 2]}").write_bytes(made(values, **window))
        (folder / f"{number}.png").write_bytes(png(number))
    hidden = without("pydicom", tmp_path)
    ran = featx("extract", scans, "--out", store, "--json", env=hidden)
    assert (ran.code, ran.json["embedded"], ran.json["quarantined"]) == (3, 16, 16)
    assert any("16 images left out for the format" in note and "featx[dicom]" in note for note in ran.json["notes"])
    before = featx("info", store, "--json").json["fingerprint"]
    ran = featx("extract", scans, "--out", store, "--json")
    assert (ran.code, ran.json["embedded"], ran.json["quarantined"]) == (0, 16, 0), ran.err
    assert featx("info", store, "--json").json["fingerprint"] == before
    assert "darkest to brightest" in json.loads((store / "manifest.json").read_text())["provenance"]["dicom"]
    assert featx("fit", store, "--out", model).code == 0
    for path in [*store.rglob("*"), model]:
        if path.is_file():
            data = path.read_bytes()
            assert not any(word in data for word in (b"Muster", b"4711-SECRET", b"19640812")), path
    one = scans / "ants" / "0.dcm"
    ran = featx("predict", model, one, "--json", env=hidden)
    assert "featx[dicom]" in ran.out + ran.err
    ran = featx("predict", model, one, "--json")
    assert ran.code == 0 and ran.json["predictions"][0]["label"] in ("ants", "bees"), ran.out


def png(seed: int) -> bytes:
    from servicekit import png as picture_file

    return picture_file(seed)


LIMITED = """
import sys
from pathlib import Path
from featx._system import limited_memory
from featx.images.pixels import BYTES_PER_PIXEL, decode, prepare
data = Path(sys.argv[1]).read_bytes()
prepare(data)
with limited_memory(BYTES_PER_PIXEL * 24_000_000):
    print(decode(data).size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
@pytest.mark.parametrize(
    "window", [{}, {"WindowCenter": 2000, "WindowWidth": 4000, "RescaleSlope": 1.0, "RescaleIntercept": 0.0}]
)
def test_what_decoding_may_take_is_enough(tmp_path: Path, window: dict[str, Any]) -> None:
    (tmp_path / "large.dcm").write_bytes(made(np.zeros((4000, 6000), np.uint16) + 7, **window))
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "large.dcm")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(6000, 4000)", done.stderr


def test_the_service_reads_one(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    from servicekit import start_tiny

    with start_tiny(tmp_path) as server:
        for kind in ("application/dicom", "application/octet-stream"):
            reply = server.ask("/predict", made(np.tile(RAMP, (2, 2))), {"Content-Type": kind})
            assert reply.status == 200, reply.body
        report = server.ask("/predict", (FILES / "test-SR.dcm").read_bytes(), {"Content-Type": "application/dicom"})
        assert (report.status, report.json["error"]["reason"]) == (422, "not_an_image")


def test_without_pydicom_a_scan_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = made(RAMP)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    error = refused(data)
    assert error.reason == "unsupported_format"
    assert "DICOM, the format of scanners, needs pydicom: pip install 'featx[dicom]'" in str(error)
    assert not math.isnan(weigh(png(1)))
