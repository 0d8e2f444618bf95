"""The rooms of the package: doors that open lazily, one door for each heavy dependency, and no cycles.

That imports go downwards only is a contract of import-linter (pyproject.toml), which ``scripts/test`` checks.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import featx

PACKAGE = Path(featx.__file__).parent

DOORS = {
    "fcntl": {"_system"},
    "resource": {"_system"},
    "ctypes": {"_system", "backbones.engines.choice"},
    "PIL": {"images.pixels"},
    "pillow_heif": {"images.pixels"},
    "pydicom": {"images.dicom"},
    "fsspec": {"images.remote"},
    "pyarrow": {"images.table_reader", "store.tables"},
    "torch": {"backbones", "adaptation", "heads.solvers.device", "models.onnx.network"},
    "torchvision": {"backbones.frozen", "backbones.checkpoint", "images.torchvision"},
    "timm": {"backbones.timm"},
    "openvino": {"backbones.engines.graph"},
    "nncf": {"backbones.engines.quantise"},
    "h5py": {"store.hdf5"},
    "pandas": {"store.frames"},
    "anndata": {"store.frames"},
    "ray": {"extraction.runners.ray"},
    "faiss": {"retrieval.faiss"},
    "onnx": {"models.onnx.builder"},
    "onnxruntime": {"models.onnx.model"},
    "onnxscript": {"models.onnx.network"},
    "skops": {"models.export"},
    "matplotlib": {"reports.sweep"},
    "jinja2": {"reports.page"},
    "fastapi": {"service", "studio.app"},
    "starlette": {"service", "studio.app"},
    "uvicorn": {"service.server", "studio.server"},
    "prometheus_client": {"service.telemetry"},
    "typer": {"cli"},
    "rich": {"cli", "reports.sweep"},
    "sklearn": {"heads", "evaluation", "retrieval", "models", "extraction.transformer", "advice.labelling"}
    | {"cli.demo_images", "studio.layout"},
}
"""Who may import what, as modules or whole rooms; a library that is not named is free."""


@functools.cache
def modules() -> dict[str, ast.Module]:
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]
    found = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text()) for path in paths}
    assert len(found) > 50
    return found


@functools.cache
def rooms() -> list[str]:
    return sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


@functools.cache
def names(room: str) -> dict[str, str]:
    """The names that a room gives to others, each with the module that it is from."""
    tree = ast.parse((PACKAGE / room / "__init__.pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(tree.body)
    return {alias.name: f"{room}.{node.module or alias.name}" for node in imports for alias in node.names}


@functools.cache
def imported(tree: ast.Module, only_at_run_time: bool = True) -> set[str]:
    """Dotted names of all imports, those inside functions too."""
    skipped: set[ast.AST] = set()
    if only_at_run_time:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                skipped |= {below for statement in node.body for below in ast.walk(statement)}
    dotted: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            dotted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            dotted |= {f"{node.module}.{alias.name}" for alias in node.names}
    return dotted


def home(dotted: str) -> str | None:
    """The module of featx that an import is answered by."""
    _, *parts = dotted.split(".")
    if len(parts) == 2 and parts[0] in rooms() and parts[1] in names(parts[0]):
        return names(parts[0])[parts[1]]
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in modules():
            return ".".join(parts[:length])
    return None


@pytest.mark.parametrize("room", rooms())
def test_a_room_is_entered_by_its_door(room: str) -> None:
    for name, tree in modules().items():
        here = name.split(".")[0]
        if here == room or name == "__main__":
            continue
        for dotted in imported(tree, only_at_run_time=False):
            if dotted.startswith(f"featx.{room}."):
                rest = dotted.split(".")[2:]
                is_module = (PACKAGE / room / "/".join(rest)).with_suffix(".py").exists()
                assert is_module or (len(rest) == 1 and rest[0] in names(room)), f"{name} imports {dotted}"


@pytest.mark.parametrize("room", rooms())
def test_a_door_has_every_name_it_promises_and_none_that_nobody_uses(room: str) -> None:
    door = import_module(f"featx.{room}")
    assert set(dir(door)) >= set(names(room))
    for name in names(room):
        assert getattr(door, name) is not None
    outside = {d for m, tree in modules().items() if m.split(".")[0] != room for d in imported(tree, False)}
    public = {a.name for n in ast.parse((PACKAGE / "__init__.pyi").read_text()).body for a in getattr(n, "names", [])}
    assert {name for name in names(room) if f"featx.{room}.{name}" not in outside} <= public


@pytest.mark.parametrize("word", ["sched_getaffinity", "sys.platform", "/proc/", "prctl"])
def test_one_module_knows_the_operating_system(word: str) -> None:
    users = {path.stem for path in PACKAGE.rglob("*.py") if word in path.read_text()}
    assert users == {"_system"}


@pytest.mark.parametrize("library", sorted(DOORS))
def test_each_library_has_its_doors(library: str) -> None:
    users = {name for name, tree in modules().items() if library in {i.split(".")[0] for i in imported(tree)}}
    assert users
    strangers = {u for u in users if not any(u == door or u.startswith(f"{door}.") for door in DOORS[library])}
    assert not strangers, f"{strangers} must not import {library}"


@pytest.mark.parametrize(
    "statement",
    [
        "import featx",
        "import featx.cli.main",
        "from featx import read_features, sweep_heads, make_head; import featx.reports.sweep",
        "from featx import extract_features",
        "import " + ", ".join(f"featx.{room}" for room in rooms()),
    ],
)
def test_torch_is_not_imported_before_it_is_needed(statement: str) -> None:
    heavy = ("torch", "torchvision", "timm", "openvino", "matplotlib", "pillow_heif", "pydicom")
    code = f"{statement}\nimport sys\nprint([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_cycles() -> None:
    edges = {
        name: {where for d in imported(tree) if d.startswith("featx.") and (where := home(d)) and where != name}
        for name, tree in modules().items()
    }
    assert sum(map(len, edges.values())) > 200
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in edges[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())
