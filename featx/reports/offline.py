"""A whole model as one page that runs it in any browser, without a server and without a connection."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featx.backbones import list_backbones
from featx.errors import UsageError
from featx.models import Bundle, Exported, WebRuntime
from featx.reports.page import hash_source, render_template
from featx.store import backbones_of

_FINER = 3
"""A photo is made smaller before the network's own resize only as long as it stays so many times larger than that."""

_LEAST_COSINE = {"fp32": 0.999, "int8": 0.99}

_EXPORTS = re.compile(r"export\{([\w$]+ as [\w$]+(?:,[\w$]+ as [\w$]+)*)\};?\s*(?://# sourceMappingURL=\S+\s*)?\Z")
"""The end of the loader, a module; a page's own script can only import what has an address, and nothing here has."""

_NEEDED = {"InferenceSession", "Tensor", "env"}

_TURNED = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/4QAiRXhpZgAATU0AKgAAAAgAAQESAAMAAAABAAYAAAAAAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYW"
    "GDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1xeXBkeFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2Nj"
    "Y2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2P/wAARCAAIABADASIAAhEBAxEB/8QAFgABAQEAAAAAAAAAAAAAAAAAAAcI/8QAFBAB"
    "AAAAAAAAAAAAAAAAAAAAAP/EABQBAQAAAAAAAAAAAAAAAAAAAAD/xAAUEQEAAAAAAAAAAAAAAAAAAAAA/9oADAMBAAIRAxEAPwCgM/gD/9k="
)
"""A JPEG of 16 x 8 pixels, white on the left and black on the right, that its EXIF says is to be turned upright."""


@dataclass(frozen=True)
class Examples:
    """Example photos that an answer is shown beside.

    Parameters
    ----------
    labels : (n,) of each.
    pictures : a small JPEG of each.
    embeddings : float32 (n, d).
    columns : where in the embedding that the graph gives these d are: first, and one past the last.
    missing : how many more there would be, were their files still there.
    """

    labels: Sequence[str]
    pictures: Sequence[bytes]
    embeddings: NDArray[np.float32]
    columns: tuple[int, int]
    missing: int = 0


def render_offline(
    bundle: Bundle, exported: Exported, runtime: WebRuntime, *, title: str, examples: Examples | None = None
) -> str:
    """The page.

    Parameters
    ----------
    bundle : the model.
    exported : its graph.
    runtime : what runs the graph in a browser.
    title : the page's.
    examples : shown beside answers; None for none.

    Raises
    ------
    UsageError
        The runtime is of a form that is not known.
    """
    from markupsafe import Markup

    style, script = render_template("offline.css"), render_template("offline.js")
    loader = _as_script(runtime)
    policy = (
        f"default-src 'none'; script-src {hash_source(loader)} {hash_source(script)} 'wasm-unsafe-eval'; "
        f"style-src {hash_source(style)}; img-src blob: data:; connect-src 'none'; base-uri 'none'; form-action 'none'"
    )
    least_side = _FINER * max(_shorter_side(each) for each in backbones_of(bundle.provenance))
    vectors = b"" if examples is None else np.ascontiguousarray(examples.embeddings, dtype="<f4").tobytes()
    return render_template(
        "offline.html",
        title=title,
        summary=_summary(bundle.class_names),
        policy=Markup(policy),
        style=Markup(style),
        script=Markup(script),
        loader=Markup(loader),
        model=_packed(json.dumps(_model(bundle, exported, least_side, examples)).encode()),
        wasm=_packed(runtime.wasm),
        graph=_packed(exported.content),
        vectors=_packed(vectors),
        notes=bundle.cautions,
        facts=_facts(bundle, runtime),
        meaning=_meaning(bundle),
        least_side=least_side,
        version=runtime.version,
    )


def _as_script(runtime: WebRuntime) -> str:
    """The loader as a script of the page itself, which leaves what it exports in ``ort``."""
    text = runtime.loader.replace("\r\n", "\n").replace("\r", "\n")
    found = _EXPORTS.search(text)
    pairs = [pair.split(" as ") for pair in found[1].split(",")] if found else []
    names = {outside: inside for inside, outside in pairs}
    if not names.keys() >= _NEEDED or re.search(r"</script|<!--", text, re.IGNORECASE):
        raise UsageError(
            "this onnxruntime-web is of a form that featx does not know", where=runtime.path, found=runtime.version,
            hint="Take the version that featx was tried with: --runtime npm.",
        )  # fmt: skip
    assert found is not None
    kept = ", ".join(f"{name}: {names[name]}" for name in sorted(_NEEDED))
    return f"{text[: found.start()]}globalThis.ort = {{{kept}}};\n"


def _packed(content: bytes) -> str:
    """Gzip in base64, the same for the same content."""
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def _model(bundle: Bundle, exported: Exported, least_side: int, examples: Examples | None) -> dict[str, Any]:
    judged = bundle.probabilities(bundle.probe_embedding[None])[0]
    if bundle.sharpness is None:
        judged = np.exp(judged) / np.exp(judged).sum()
    precisions = {str(each.get("precision")) for each in backbones_of(bundle.provenance)}
    shown = [] if examples is None else zip(examples.labels, examples.pictures, strict=True)
    return {
        "class_names": list(bundle.class_names),
        "calibrated": bundle.sharpness is not None,
        "least_side": least_side,
        "resizes": [each["preprocess"]["resize"] for each in backbones_of(bundle.provenance) if _keeps_aspect(each)],
        "most_apart": exported.most_apart,
        "least_cosine": _LEAST_COSINE["int8" if "int8" in precisions else "fp32"],
        "proof": {
            "photo": base64.b64encode(bundle.probe).decode(),
            "label": bundle.class_names[int(judged.argmax())],
            "probabilities": judged.tolist(),
            "embedding": base64.b64encode(bundle.probe_embedding.astype("<f4").tobytes()).decode(),
        },
        "turned": _TURNED,
        "columns": [0, 0] if examples is None else list(examples.columns),
        "examples": [{"label": label, "picture": base64.b64encode(data).decode()} for label, data in shown],
    }


def _keeps_aspect(provenance: Mapping[str, Any]) -> bool:
    """Whether the network's own resize does."""
    return isinstance(provenance["preprocess"]["resize"], int)


def _shorter_side(provenance: Mapping[str, Any]) -> int:
    """Of a photo as the network's own resize makes it."""
    resize = provenance["preprocess"]["resize"]
    return int(resize if isinstance(resize, int) else min(resize))


def _summary(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{len(names)} classes"


def _facts(bundle: Bundle, runtime: WebRuntime) -> list[tuple[str, str]]:
    licences = {row.stored_as: row.licence for row in list_backbones()}
    networks = [str(each.get("backbone")) for each in backbones_of(bundle.provenance)]
    return [
        ("Classes", ", ".join(bundle.class_names)),
        ("Network", ", ".join(f"{name} (weights: {licences.get(name, 'licence unknown')})" for name in networks)),
        ("Classifier", bundle.head),
        ("Model", f"sha256 {bundle.sha256}"),
        ("Made by", f"featx {version('featx')}"),
        ("Runs with", f"onnxruntime-web {runtime.version} (MIT licence)"),
    ]


def _meaning(bundle: Bundle) -> str:
    """When the model abstains, in sentences."""
    said = []
    if bundle.sharpness is None:
        said.append("It gives no probabilities: the number is how far the label is ahead of the next.")
    if bundle.threshold is None:
        said.append("It is never sure of its answers.")
    else:
        kind = "a probability" if bundle.sharpness is not None else "a lead"
        said.append(
            f"Below {kind} of {bundle.threshold:.2f} it is not sure, so that at most {100 * bundle.max_error:g} % of "
            "its answers are wrong, on photos like those it was made from."
        )
    if bundle.familiarity is None or bundle.max_unknown is None:
        said.append("It cannot call photos unknown: it names a class for photos of anything.")
    else:
        said.append(
            "It calls a photo unknown that is stranger to it than all but "
            f"{100 * bundle.max_unknown:g} % of the photos that it was made from."
        )
    return " ".join(said)
