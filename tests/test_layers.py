"""The layers of the package: imports go downwards only, and each heavy dependency has one door."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import featx

PACKAGE = Path(featx.__file__).parent

LAYERS = [
    {"errors", "_arrays", "_files", "_system"},
    {"sources_list", "sources_tar", "sources_table", "sources_remote", "sources_torchvision"}
    | {
        "images",
        "origins",
        "sources",
        "children",
        "decoders",
        "decoder_child",
        "table_child",
        "fetchers",
        "originals",
        "views",
    },
    {
        "batches",
        "catalogue",
        "backbones",
        "hub",
        "providers",
        "checkpoints",
        "networks",
        "timm_models",
        "tails",
        "classifiers",
        "autoencoder_network",
        "engines",
        "openvino_engine",
        "provenance",
    },
    {
        "hdf5",
        "manifest",
        "index",
        "shards",
        "frames",
        "store",
        "store_writer",
        "store_tools",
        "workers",
        "heads",
        "normalise",
        "solvers",
        "large",
        "torch_heads",
        "splits",
        "stats",
        "curves",
        "domain",
        "labelling",
        "rule",
        "choose",
        "layers",
        "centre",
        "unlabelled",
        "scoring",
        "calibrate",
        "folds",
        "autoencoder",
        "training",
        "activations",
        "bundle",
        "ann",
        "gallery",
        "postprocess",
        "retrieval",
        "retrieval_metrics",
        "search",
    },
    {
        "extract",
        "embed",
        "sweep",
        "testset",
        "results",
        "journal",
        "fit",
        "export",
        "predictor",
        "estimator",
        "tabular",
        "pixels",
        "mislabelled",
        "sorting",
    }
    | {"tuning", "finetune", "finetune_bundle"}
    | {"parts", "runners", "ray_runner"},
    {
        "advice",
        "advice_page",
        "advise",
        "comparison",
        "report",
        "html",
        "demo",
        "terminal",
        "sheet",
        "service",
        "service_batch",
        "service_docs",
        "service_evidence",
        "service_guard",
        "service_run",
        "service_schema",
        "service_watch",
        "service_work",
    },
    {
        "cli",
        "cli_advise",
        "cli_demo",
        "cli_labels",
        "cli_finetune",
        "cli_layers",
        "cli_model",
        "cli_parts",
        "cli_search",
        "cli_sweep",
        "cli_tabular",
    }
    | {"__main__", "__init__"},
]
"""From the floor upwards. A module may import from its own layer and from those below."""

DOORS = {
    "fcntl": {"_system"},
    "resource": {"_system"},
    "ctypes": {"_system", "engines"},
    "PIL": {"images"},
    "h5py": {"hdf5"},
    "torch": {"networks", "checkpoints", "timm_models", "engines", "openvino_engine", "hub"}
    | {"tails", "training", "autoencoder", "autoencoder_network", "torch_heads", "classifiers"},
    "torchvision": {"networks", "checkpoints", "sources_torchvision"},
    "pyarrow": {"table_child", "tabular"},
    "fsspec": {"sources_remote"},
    "pandas": {"frames"},
    "anndata": {"frames"},
    "timm": {"timm_models"},
    "openvino": {"openvino_engine"},
    "faiss": {"ann"},
    "ray": {"ray_runner"},
    "typer": {"cli", "cli_advise", "cli_finetune", "cli_layers", "cli_model", "cli_parts", "cli_search", "cli_sweep"}
    | {"cli_tabular", "cli_demo", "cli_labels"},
    "rich": {
        "cli",
        "cli_advise",
        "cli_demo",
        "cli_labels",
        "cli_layers",
        "cli_model",
        "cli_search",
        "cli_sweep",
        "terminal",
        "report",
    },
    "matplotlib": {"report"},
    "fastapi": {"service", "service_work"},
    "starlette": {"service", "service_work", "service_guard"},
    "uvicorn": {"service_run"},
    "prometheus_client": {"service_watch"},
    "sklearn": {"retrieval", "postprocess", "normalise", "heads", "solvers", "splits", "stats", "choose"}
    | {"sweep", "journal", "fit", "export", "demo", "estimator", "torch_heads", "labelling"}
    | {"pixels"},
}
"""Who may import what; a library that is not named is free."""


@functools.cache
def modules() -> dict[str, ast.Module]:
    return {path.stem: ast.parse(path.read_text()) for path in sorted(PACKAGE.glob("*.py"))}


def imported(tree: ast.Module) -> set[str]:
    """Dotted names of all imports, those inside functions too; those for type checkers only are left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def test_every_module_has_a_layer() -> None:
    assert set(modules()) == set().union(*LAYERS)
    assert sum(map(len, LAYERS)) == len(set().union(*LAYERS))


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_downwards(name: str) -> None:
    level = next(i for i, layer in enumerate(LAYERS) if name in layer)
    allowed = set().union(*LAYERS[: level + 1])
    inside = {dotted.split(".")[1] for dotted in imported(modules()[name]) if dotted.startswith("featx.")}
    assert inside <= allowed, f"{name} imports {inside - allowed} from above"


@pytest.mark.parametrize("word", ["sched_getaffinity", "sys.platform", "/proc/", "prctl"])
def test_one_module_knows_the_operating_system(word: str) -> None:
    users = {path.stem for path in PACKAGE.glob("*.py") if word in path.read_text()}
    assert users <= {"_system"}


@pytest.mark.parametrize("library", sorted(DOORS))
def test_each_library_has_its_doors(library: str) -> None:
    users = {name for name, tree in modules().items() if library in {i.split(".")[0] for i in imported(tree)}}
    assert users <= DOORS[library], f"{users - DOORS[library]} must not import {library}"


@pytest.mark.parametrize(
    "statement",
    [
        "import featx",
        "import featx.cli.main",
        "import featx.store.reader, featx.evaluation.sweep, featx.heads.catalogue, featx.reports.sweep",
        "import featx.extraction.run",
    ],
)
def test_torch_is_not_imported_before_it_is_needed(statement: str) -> None:
    heavy = ("torch", "torchvision", "timm", "openvino", "matplotlib")
    code = f"{statement}\nimport sys\nprint([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_cycles() -> None:
    edges = {
        name: {d.split(".")[1] for d in imported(tree) if d.startswith("featx.")} & set(modules())
        for name, tree in modules().items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in edges[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())
