"""setup.py: which nvcc it takes, for which architectures it builds, what it asks a build environment for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).parent.parent / "setup.py"


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, on a machine where nothing is installed."""
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CXX", "LOOKM_BUILD_CUDA", "LOOKM_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    spec = importlib.util.spec_from_file_location("lookm_setup", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setattr(module, "DEFAULT_NVCC", "/nonexistent/nvcc")
    return module


def program(path: Path, output: str) -> Path:
    """An executable that prints `output`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{output}\nEND\n")
    path.chmod(0o755)
    return path


def nvcc(path: Path, *known: int) -> Path:
    """An nvcc that answers every question with a release and the architectures it knows."""
    return program(
        path, "\n".join(["Cuda compilation tools, release 13.0, V13.0.88", *(f"compute_{n}" for n in known)])
    )


def test_a_too_old_nvcc_is_none(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = program(tmp_path / "nvcc", "Cuda compilation tools, release 11.5, V11.5.119")
    monkeypatch.setenv("CUDACXX", str(old))
    reason = f"{old} is of CUDA 11.5, 11.8 or newer is needed"
    assert setup.plan() == (None, {"archs": [], "reason": reason})
    monkeypatch.setenv("LOOKM_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match=f"LOOKM_BUILD_CUDA=1, but {reason}"):
        setup.plan()


def test_without_nvcc(setup: ModuleType) -> None:
    assert setup.plan() == (
        None,
        {
            "archs": [],
            "reason": "nvcc was not found: it is not on PATH, there is no /nonexistent/nvcc, and none of CUDACXX, "
            "CUDA_HOME and CUDA_PATH is set",
        },
    )
    assert setup.get_requires_for_build_wheel() == []


@pytest.mark.parametrize("variable", ["CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH", "default"])
def test_where_nvcc_is_found(setup: ModuleType, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = nvcc(tmp_path / "a toolkit" / "bin" / "nvcc", 80, 90)
    if variable == "default":
        monkeypatch.setattr(setup, "DEFAULT_NVCC", str(compiler))
    else:
        value = {"CUDACXX": compiler, "PATH": compiler.parent}.get(variable, compiler.parent.parent)
        monkeypatch.setenv(variable, str(value))
    assert setup.plan() == (str(compiler), {"archs": ["80", "90"], "cuda": "13.0"})


def test_a_variable_that_leads_nowhere_is_not_passed_over(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(nvcc(tmp_path / "nvcc", 80).parent))
    monkeypatch.setenv("CUDACXX", "/nonexistent/nvcc")
    _, record = setup.plan()
    assert record["reason"] == "nvcc was not found: CUDACXX is set, but /nonexistent/nvcc is not an executable"


def test_architectures(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = str(nvcc(tmp_path / "nvcc", 75, 80, 86, 87, 90, 100))
    # the default ones that this nvcc knows
    assert setup.chosen_archs(compiler) == ["80", "86", "90", "100"]
    monkeypatch.setenv("LOOKM_CUDA_ARCHS", "100;87;87")
    assert setup.chosen_archs(compiler) == ["87", "100"]
    for value, bad in {"80;120": "120", "sm_80": "sm_80", "80 90": "80 90", "80;": ""}.items():
        monkeypatch.setenv("LOOKM_CUDA_ARCHS", value)
        with pytest.raises(SystemExit, match=f"LOOKM_CUDA_ARCHS must list .*, got '{bad}'; it knows 75;80;86"):
            setup.chosen_archs(compiler)
    monkeypatch.delenv("LOOKM_CUDA_ARCHS")
    with pytest.raises(SystemExit, match="knows none of 80, 86, 89, 90, 100 and 120"):
        setup.chosen_archs(str(nvcc(tmp_path / "old", 52, 75)))
    with pytest.raises(SystemExit, match="fails: repair the CUDA toolkit, or set LOOKM_BUILD_CUDA=0"):
        setup.chosen_archs(str(program(tmp_path / "broken", "")))


def test_off_linux_only_on_demand(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", str(nvcc(tmp_path / "nvcc", 80)))
    monkeypatch.setattr(setup.sys, "platform", "darwin")
    assert setup.plan()[0] is None
    monkeypatch.setenv("LOOKM_BUILD_CUDA", "1")
    assert setup.plan()[0] is not None


@pytest.mark.parametrize(
    ("cmake", "ninja", "asked"),
    [
        (None, None, ["cmake>=3.24", "ninja>=1.10"]),
        ("cmake version 3.18.4", "1.10.0", ["cmake>=3.24"]),
        ("cmake version 3.24.0-rc1", "1.8.2", ["ninja>=1.10"]),
        ("cmake version 4.0.0", "1.11.1.git.kitware", []),
        ("cmake: its Python package is gone", "1.12", ["cmake>=3.24"]),
    ],
)
def test_an_isolated_build_asks_for_what_is_missing_or_too_old(
    setup: ModuleType,
    cmake: str | None,
    ninja: str | None,
    asked: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: "/nonexistent")
    monkeypatch.setenv("PATH", str(nvcc(tmp_path / "nvcc", 80).parent))
    for name, version in {"cmake": cmake, "ninja": ninja}.items():
        if version:
            program(tmp_path / name, version)
    assert setup.get_requires_for_build_wheel() == asked
    assert setup.get_requires_for_build_editable() == asked
    monkeypatch.setenv("LOOKM_BUILD_CUDA", "0")
    assert setup.get_requires_for_build_wheel() == []


def test_other_compilers_start_the_build_over(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    folder = setup.cmake_folder("/cuda/nvcc", "13.0")
    (folder / "CMakeCache.txt").touch()
    assert (setup.cmake_folder("/cuda/nvcc", "13.0") / "CMakeCache.txt").exists()
    monkeypatch.setenv("CXX", "clang++")
    assert not (setup.cmake_folder("/cuda/nvcc", "13.0") / "CMakeCache.txt").exists()
