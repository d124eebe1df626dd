"""Builds the CUDA extension lookm_kernels._C with CMake, where there is an nvcc; all else is in pyproject.toml.

LOOKM_BUILD_CUDA   auto (the default): build when nvcc is found; 0: do not build; 1: fail when nvcc is not found
LOOKM_CUDA_ARCHS   compute capabilities without the dot, such as "80;90"; by default those of ARCHS that nvcc knows

It is also the build backend: setuptools', which besides asks for CMake and ninja where the machine's will not do.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.build_meta import (  # noqa: F401  (the hooks of the build backend)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ARCHS = ("80", "86", "89", "90", "100", "120")
DEFAULT_NVCC = "/usr/local/cuda/bin/nvcc"
OLDEST = {"cmake": (3, 24), "ninja": (1, 10)}
OLDEST_CUDA = (11, 8)  # has the launch with attributes that csrc/ uses
WITHOUT = "or set LOOKM_BUILD_CUDA=0 to install without the CUDA extension"


def find_nvcc() -> str:
    """The CUDA compiler; LookupError where there is none. A variable that is set decides alone."""
    for variable, program in {"CUDACXX": "", "CUDA_HOME": "bin/nvcc", "CUDA_PATH": "bin/nvcc"}.items():
        if value := os.environ.get(variable):
            path = str(Path(value, program))
            if found := shutil.which(path):
                return found
            raise LookupError(f"nvcc was not found: {variable} is set, but {path} is not an executable")
    if found := shutil.which("nvcc") or shutil.which(DEFAULT_NVCC):
        return found
    raise LookupError(
        f"nvcc was not found: it is not on PATH, there is no {DEFAULT_NVCC}, "
        f"and none of CUDACXX, CUDA_HOME and CUDA_PATH is set"
    )


def output(*command: str) -> str:
    """What a program prints; a program that fails to start prints nothing."""
    return subprocess.run(command, capture_output=True, text=True).stdout


def chosen_archs(nvcc: str) -> list[str]:
    """What the extension is built for, ascending."""
    known = re.findall(r"compute_(\d+)", output(nvcc, "--list-gpu-arch"))
    if not known:
        sys.exit(f"`{nvcc} --list-gpu-arch` fails: repair the CUDA toolkit, {WITHOUT}.")
    asked = os.environ.get("LOOKM_CUDA_ARCHS", "").split(";")
    if asked == [""]:
        if not (default := [arch for arch in ARCHS if arch in known]):
            sys.exit(f"{nvcc} knows none of {', '.join(ARCHS[:-1])} and {ARCHS[-1]}: install a newer one, {WITHOUT}.")
        return default
    if unknown := [arch for arch in asked if arch not in known]:
        sys.exit(
            f'LOOKM_CUDA_ARCHS must list compute capabilities that {nvcc} knows, such as "80;90", '
            f"got {unknown[0]!r}; it knows {';'.join(known)}"
        )
    return sorted(set(asked), key=int)


def plan() -> tuple[str | None, dict[str, Any]]:
    """The nvcc to build with, None for no build, and what the installed package will say of it."""
    mode = os.environ.get("LOOKM_BUILD_CUDA") or "auto"
    if mode not in ("auto", "0", "1"):
        sys.exit(f"LOOKM_BUILD_CUDA must be auto, 0 or 1, got {mode!r}")
    try:
        if mode == "0":
            raise LookupError("LOOKM_BUILD_CUDA=0 was set")
        if mode == "auto" and sys.platform != "linux":
            raise LookupError("it was tried on Linux only; LOOKM_BUILD_CUDA=1 builds it elsewhere")
        nvcc = find_nvcc()
        release = cuda_release(nvcc)
    except LookupError as reason:
        if mode == "1":
            sys.exit(f"LOOKM_BUILD_CUDA=1, but {reason}. Install the CUDA toolkit or point CUDA_HOME to it, {WITHOUT}.")
        return None, {"archs": [], "reason": str(reason)}
    return nvcc, {"archs": chosen_archs(nvcc), "cuda": release}


def cuda_release(nvcc: str) -> str:
    """The version of a CUDA compiler; LookupError where it is too old."""
    release = re.search(r"release ([\d.]+)", output(nvcc, "--version"))
    if release and tuple(map(int, release[1].split("."))) < OLDEST_CUDA:
        raise LookupError(f"{nvcc} is of CUDA {release[1]}, {dotted(OLDEST_CUDA)} or newer is needed")
    return release[1] if release else "unknown"


def find_tool(name: str) -> str:
    """A program on PATH or beside this Python that is new enough; LookupError where there is none."""
    found = "it was not found"
    for path in (None, sysconfig.get_path("scripts")):
        if program := shutil.which(name, path=path):
            version = re.search(r"\d+(\.\d+)+", output(program, "--version"))
            if version and tuple(map(int, version[0].split("."))) >= OLDEST[name]:
                return program
            found = f"{program} is {version[0] if version else 'of an unknown version'}"
    raise LookupError(f"{name} {dotted(OLDEST[name])} or newer is needed, {found}")


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """CMake and ninja, when the extension will be built and the machine's are missing or too old."""
    missing = []
    for name in OLDEST if plan()[0] else ():
        try:
            find_tool(name)
        except LookupError:
            missing.append(f"{name}>={dotted(OLDEST[name])}")
    return missing


get_requires_for_build_editable = get_requires_for_build_wheel


def cmake_command(nvcc: str, archs: list[str], folder: Path) -> list[str]:
    """What configures the build; exits with what to install when something is missing."""
    try:
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        import pybind11  # noqa: F401  (CMake asks this Python for it)
    except (LookupError, ImportError) as error:
        sys.exit(f"{error}: pip install cmake ninja pybind11, leave out --no-build-isolation, {WITHOUT}.")
    given = shlex.split(os.environ.get("CXX", ""))[:1]
    if not any(map(shutil.which, given or ("c++", "g++", "clang++", "cl"))):
        sys.exit(
            f"no C++ compiler was found{f', CXX is {given[0]}' if given else ''}: "
            f"install one (g++ or clang++) or point CXX to it, {WITHOUT}."
        )
    # machine code for each, and for newer GPUs the newest as PTX
    architectures = ";".join([f"{arch}-real" for arch in archs[:-1]] + archs[-1:])
    return [
        *(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
        # that of an isolated build is gone the next time
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={architectures}",
        "-DCMAKE_BUILD_TYPE=Release",
    ]


def cmake_folder(nvcc: str, cuda: str) -> Path:
    """Where CMake builds, emptied when that was with other compilers, which CMake would go on using."""
    folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
    compilers = ("CC", "CXX", "CUDAHOSTCXX", "CFLAGS", "CXXFLAGS", "CUDAFLAGS", "LDFLAGS")
    settings = json.dumps([str(ROOT), sys.base_prefix, nvcc, cuda, [os.environ.get(name) for name in compilers]])
    record = folder / "settings.json"
    if not record.is_file() or record.read_text() != settings:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        record.write_text(settings)
    return folder


class BuildExtension(build_ext):
    """Lets CMake do the work, then records it in the package."""

    def run(self) -> None:
        super().run()
        package = ROOT / "lookm_kernels" if self.inplace else Path(self.build_lib, "lookm_kernels")
        (package / "_build.json").write_text(json.dumps(plan()[1]) + "\n")

    def build_extension(self, ext: Extension) -> None:
        nvcc, record = plan()
        print(f"lookm-kernels: CUDA extension for sm_{', sm_'.join(record['archs'])} by {nvcc}", flush=True)
        folder = cmake_folder(nvcc, record["cuda"])
        configure = cmake_command(nvcc, record["archs"], folder)
        if subprocess.run(configure).returncode:
            sys.exit(
                f"CMake could not configure the CUDA extension, see its output above. Often a compiler does not fit: "
                f"CXX and CUDAHOSTCXX choose the C++ compiler, CUDACXX or CUDA_HOME the nvcc; {WITHOUT}."
            )
        if subprocess.run([configure[0], "--build", str(folder)]).returncode:
            sys.exit(f"the CUDA extension did not compile, see the compiler's output above: repair that, {WITHOUT}.")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / target.name, target)


class BuildPython(build_py):
    """Records in the package why the extension is not built; an editable one may have an extension of earlier."""

    def run(self) -> None:
        super().run()
        if not self.distribution.ext_modules:
            package = ROOT / "lookm_kernels" if self.editable_mode else Path(self.build_lib, "lookm_kernels")
            for old in package.glob(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"):
                old.unlink()
            (package / "_build.json").write_text(json.dumps(plan()[1]) + "\n")


# executed, not imported, by setuptools
if __name__ == "__main__":
    nvcc, record = plan()
    if nvcc is None:
        print(f"lookm-kernels: the CUDA extension is not built: {record['reason']}", file=sys.stderr)
    setup(
        ext_modules=[Extension("lookm_kernels._C", [])] if nvcc else [],
        cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
    )
