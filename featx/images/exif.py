"""When a photo was taken, as its camera wrote it down."""

from __future__ import annotations

import contextlib
import re
from datetime import datetime
from typing import Any

from featx.images.pixels import open_header

_INSIDE, _TAKEN, _SUBSECOND = 0x8769, 0x9003, 0x9291
_DATE = re.compile(r"(\d{4}):(\d\d):(\d\d) (\d\d):(\d\d):(\d\d)", re.ASCII)


def taken_at(data: bytes) -> str:
    """``DateTimeOriginal`` of an image file's bytes, such as "2024-05-01T10:00:00.25"; "" where there is none.

    Only the header is read. The clock is the camera's, without a time zone. What cannot be read counts as none: a
    damaged or hostile header is for the decoder to refuse.
    """
    inside: dict[int, Any] = {}
    with contextlib.suppress(Exception):  # Pillow raises whatever its parsers happen to; none of it is a date
        inside = open_header(data).getexif().get_ifd(_INSIDE)
    date = _DATE.match(str(inside.get(_TAKEN, ""))[:32])
    if date is None:
        return ""
    fraction = re.match(r"\d{1,6}", str(inside.get(_SUBSECOND, ""))[:32], re.ASCII)
    try:
        taken = datetime(*map(int, date.groups()))  # type: ignore[arg-type]
    except ValueError:
        return ""  # such as 0000:00:00 00:00:00, which cameras write before their clock is set
    return taken.isoformat() + (f".{fraction[0]}" if fraction else "")
