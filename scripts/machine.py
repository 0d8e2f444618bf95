"""What benchmarks say of the machine that they ran on."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def processor() -> str:
    """The processor's name, where the system tells, and whether it has matrix units."""
    path = Path("/proc/cpuinfo")
    told = path.read_text() if path.exists() else ""
    name = re.search(r"model name\s*: (.*)", told)
    return (name[1] if name else platform.processor()) + (" (amx)" if "amx_tile" in told else "")
