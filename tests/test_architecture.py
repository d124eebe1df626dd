"""The layout's rules (CONTRIBUTING.md), read from the syntax tree and from what an import loads."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch

ROOT = Path(__file__).parent.parent
KERNELS, LOOKM, CSRC = ROOT / "lookm_kernels", ROOT / "python" / "lookm", ROOT / "csrc"
OPS = {
    "scores",
    "select",
    "nearest",
    "merge",
    "compact",
    "compress",
    "kept_attention",
    "quantize",
    "quantized_attention",
}
LEAVES = {f"lookm_kernels.{name}" for name in ("_ambient", "_checks", "_formats", "_version")}
PUBLIC = {"lookm_kernels", "lookm_kernels.rules", "lookm_kernels._version"}


def imports(path: Path) -> set[str]:
    """Every module a file imports, at the top or inside a function; `from a import b` counts as a."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def top_level(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


@pytest.mark.parametrize("path", files(KERNELS), ids=lambda path: str(path.relative_to(ROOT)))
def test_lookm_kernels_imports_torch_and_itself_only(path: Path) -> None:
    allowed = {"torch", "lookm_kernels"} | ({"triton"} if path.parent.name == "triton" else set())
    assert top_level(imports(path)) <= allowed


@pytest.mark.parametrize("path", [*files(KERNELS / "reference"), KERNELS / "rules.py"], ids=lambda path: path.name)
def test_the_specification_stands_on_its_own(path: Path) -> None:
    own = {module for module in imports(path) if module.startswith("lookm_kernels")}
    assert {module for module in own if not module.startswith("lookm_kernels.reference")} <= LEAVES | {
        "lookm_kernels.rules"
    }


@pytest.mark.parametrize("op", sorted(OPS))
def test_an_op_knows_its_backends_through_the_dispatcher_only(op: str) -> None:
    backends = ("reference", "triton", "cuda")
    assert not {module for module in imports(KERNELS / f"{op}.py") if any(backend in module for backend in backends)}
    assert "lookm_kernels._dispatch" in imports(KERNELS / f"{op}.py")


def test_the_same_basename_is_the_same_op_in_every_folder() -> None:
    assert {path.stem for path in KERNELS.glob("*.py")} >= OPS
    # compress_ is the others, one after the other
    for backend in ("reference", "triton"):
        kernels = {path.stem for path in (KERNELS / backend).glob("*.py") if not path.stem.startswith("_")}
        assert kernels == OPS - {"compress"}
    # what Triton does poorly
    own = {path.stem for path in (KERNELS / "cuda").glob("*.py") if not path.stem.startswith("_")}
    assert own == {path.stem for path in CSRC.glob("*.cu")} == {"select", "merge", "compact"}


def test_python_is_known_to_one_file_of_csrc_and_libtorch_to_none() -> None:
    for path in CSRC.iterdir():
        if path.suffix in (".h", ".cu", ".cuh", ".cpp"):
            text = path.read_text()
            assert ("pybind11" in text) == (path.name == "bindings.cpp")
            assert not re.search("torch/|ATen|c10", text)


@pytest.mark.parametrize("path", [*files(KERNELS / "cuda"), KERNELS / "_native.py"], ids=lambda path: path.name)
def test_the_extension_is_known_to_one_file(path: Path) -> None:
    own = {module for module in imports(path) if module.startswith("lookm_kernels")}
    assert own <= {"lookm_kernels", "lookm_kernels._build", "lookm_kernels._lists"}
    assert ("lookm_kernels._C" in path.read_text()) == (path.name == "_native.py")


@pytest.mark.parametrize("path", files(LOOKM), ids=lambda path: str(path.relative_to(ROOT)))
def test_lookm_uses_public_names_of_lookm_kernels_only(path: Path) -> None:
    modules = imports(path)
    assert {module for module in modules if module.startswith("lookm_kernels")} <= PUBLIC
    assert top_level(modules) <= {
        "torch",
        "numpy",
        "transformers",
        "huggingface_hub",
        "jinja2",
        "PIL",
        "rich",
        "typer",
        "lookm",
        "lookm_kernels",
    }


def test_arrows_point_one_way() -> None:
    """No file of lookm imports one above it, not even for a type; graphlib raises where there is a circle."""
    modules = {".".join(("lookm", *path.relative_to(LOOKM).with_suffix("").parts)): path for path in files(LOOKM)}
    order = list(
        TopologicalSorter({name: imports(path) & set(modules) for name, path in modules.items()}).static_order()
    )
    known = ["lookm.forward", "lookm.reading", "lookm.layer", "lookm.cache", "lookm.cli"]
    assert sorted(known, key=order.index) == known


def test_nothing_below_knows_the_command_line() -> None:
    for path in files(LOOKM):
        if path.name not in ("cli.py", "__main__.py"):
            assert not {module for module in imports(path) if module in ("lookm.cli", "typer")}, path


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_kernels_loads_no_backend_and_no_transformers() -> None:
    loaded = loaded_by("import lookm_kernels") - loaded_by("import torch")
    assert not {"transformers", "triton", "lookm", "lookm_kernels.reference.scores", "lookm_kernels._C"} & loaded


def test_importing_lookm_loads_neither_the_command_line_nor_the_demo() -> None:
    loaded = loaded_by("from lookm import LookMCache") - loaded_by("import torch, transformers")
    assert "lookm.cache" in loaded
    assert not {"lookm_kernels.triton", "typer", "PIL", "lookm.cli", "lookm.demo"} & loaded


def test_the_command_line_starts_without_torch() -> None:
    assert "lookm.cli" in (loaded := loaded_by("import lookm.__main__, lookm.cli"))
    assert not {"torch", "transformers", "numpy", "PIL", "rich"} & loaded


def test_in_place_verbs_end_in_an_underscore() -> None:
    mutating = {schema.name for schema in _schemas() if schema.is_mutable}
    assert mutating == {"lookm::merge_", "lookm::compact_", "lookm::compress_"}
    assert all(schema.name.endswith("_") == schema.is_mutable for schema in _schemas())
    for schema in _schemas():
        modified = [x.name for x in schema.arguments if x.alias_info is not None and x.alias_info.is_write]
        expected = [name for name in ("key", "value") if schema.is_mutable and not schema.overload_name]
        expected += [name for name in ("out_votes",) if schema.is_mutable and schema.name != "lookm::compact_"]
        assert modified == expected + [name for name in ("out_key", "out_value") if schema.overload_name]


def _schemas() -> list[Any]:
    importlib.import_module("lookm_kernels")
    return [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("lookm::")]


def test_no_file_is_too_long_to_read() -> None:
    for path in [*files(KERNELS), *files(LOOKM)]:
        assert len(path.read_text().splitlines()) <= 400, path


def test_the_wheel_has_every_package() -> None:
    """Of an editable installation, which the other tests run on, nothing is missing either way."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {
        ".".join(file.parent.relative_to(base).parts)
        for base, name in ((ROOT, "lookm_kernels"), (ROOT / "python", "lookm"))
        for file in (base / name).rglob("__init__.py")
    }
    assert sorted(listed) == sorted(there)
