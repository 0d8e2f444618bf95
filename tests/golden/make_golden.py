"""Makes the golden store of the current format version, its packed file, and the golden model, beside this script.

Run it once for a new version of a format, commit what it makes, and never change that again: every later featx has
to read it, and what is there already is not made again. ``python tests/golden/make_golden.py``
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from modelkit import clusters, make_bundle  # noqa: E402
from storekit import THREE, make_store, names_of  # noqa: E402

from featx.heads.catalogue import make_head  # noqa: E402
from featx.models.bundle import FORMAT_VERSION as MODEL_VERSION, write_bundle  # noqa: E402
from featx.store.manifest import FORMAT_VERSION  # noqa: E402
from featx.store.tools import pack  # noqa: E402

if __name__ == "__main__":
    store, model = HERE / f"v{FORMAT_VERSION}-store", HERE / f"v{MODEL_VERSION}.model"
    if not store.exists():
        make_store(store, names_of(12), layers=("penultimate", "features.3"), backbones=THREE)
        (store / ".lock").unlink()
        pack(store, HERE / f"v{FORMAT_VERSION}-packed.h5")
    if not model.exists():
        rows, labels = clusters()
        write_bundle(make_bundle(make_head("logreg").fit(rows, labels), rows), model)
