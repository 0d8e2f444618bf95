"""Fuzzing for a fixed time: manifests with right checksums, and damaged HDF5."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, seed, settings, strategies as st
from storekit import THREE, make_store, names_of

from featx._files import canonical_json
from featx.errors import StoreError
from featx.store.manifest import read_manifest

FUZZ_SECONDS = 5.0


# --- fuzzing ------------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=8,
)
FIELDS = [
    "format_version",
    "provenance",
    "fingerprint",
    "more",
    "unfinished",
    "shards",
    "in_flux",
    "class_names",
    "splits",
    "counts",
    "source",
]


@pytest.mark.slow
def test_fuzzed_manifests(tmp_path: Path) -> None:
    """Five seconds of manifests with right checksums and any JSON in their fields: read, or refused in a sentence."""
    store = make_store(tmp_path / "s.featx", backbones=THREE)
    good = json.loads((store / "manifest.json").read_text())
    until = time.monotonic() + FUZZ_SECONDS
    tried = 0

    @settings(max_examples=100, deadline=None, database=None, phases=[Phase.generate, Phase.shrink])
    @given(st.dictionaries(st.sampled_from(FIELDS), values, max_size=3), st.dictionaries(st.text(), values, max_size=2))
    def fuzz(changed: dict[str, Any], extra: dict[str, Any]) -> None:
        nonlocal tried
        tried += 1
        fields = {**extra, **good, **changed}
        fields.pop("checksum")
        try:
            fields["checksum"] = hashlib.sha256(canonical_json(fields)).hexdigest()
        except ValueError:  # NaN, which a file can hold all the same
            fields["checksum"] = "0" * 64
        (store / "manifest.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        try:
            read_manifest(store)
        except StoreError as error:
            assert "manifest.json" in str(error)

    rounds = 0
    while time.monotonic() < until or rounds < 3:  # on a busy machine, too
        seed(rounds)(fuzz)()
        rounds += 1
    print(f"{tried} manifests")
    assert tried > 200


@pytest.mark.slow
def test_fuzzed_hdf5(tmp_path: Path) -> None:
    """Five seconds of damaged HDF5, in a process of its own since HDF5 is native code: the rows, or a StoreError.

    The checksums that stand before this in a store are left out here.
    """
    store = make_store(tmp_path / "s.featx", names_of(40), shard_rows=40, backbones=("tiny", "wide"))
    path = next((store / "shards").iterdir())
    code = f"""
import random, sys, time
from pathlib import Path
import numpy as np
from featx.store import hdf5
from featx.errors import StoreError
from featx.store.manifest import Shard
SHARD_COLUMNS = Shard("", 40, "", {{"tiny": ("penultimate",), "wide": ("penultimate",)}}, hashed=True).columns()
source, target = Path({str(path)!r}), Path({str(tmp_path / "x.h5")!r})
good, rng = source.read_bytes(), random.Random(int(sys.argv[1]))
with hdf5.open_checked(source, SHARD_COLUMNS) as file:
    expected = file.read("embeddings/tiny/penultimate")
until, tried, read = time.monotonic() + {FUZZ_SECONDS}, 0, 0
while time.monotonic() < until:
    raw = bytearray(good)
    for _ in range(rng.choice([1, 1, 2, 8])):
        # Mostly in the structure, which is at the front.
        at = rng.randrange(len(raw)) if rng.random() < 0.2 else rng.randrange(4000)
        raw[at % len(raw)] = rng.choice([0, 1, 255, 127, 128, raw[at % len(raw)] ^ (1 << rng.randrange(8))])
    if rng.random() < 0.1:
        del raw[rng.randrange(len(raw)) :]
    target.write_bytes(raw)
    tried += 1
    try:
        with hdf5.open_checked(target, SHARD_COLUMNS) as file:
            for name in file.columns:
                file.read(name)
        read += 1
    except StoreError:
        pass
print(tried, read)
"""
    done = subprocess.run([sys.executable, "-c", code, "0"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    tried, read = map(int, done.stdout.split())
    print(f"{tried} files, of which {read} were read")
    assert tried > 100 and read < tried
