"""csrc/ on the CPU: its kernels compiled as C++ against the headers of this folder, and the same Python module of them.

`emulated()` loads it; emulator.cpp says how kernels run, and what it finds out. What it cannot show: speed, whatever
only a GPU's memory model allows, and races between threads that no barrier separates and that read what they write.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
KERNELS = ("select", "merge", "compact")
SHARED_MEMORY = 227 * 1024  # of a block, in bytes, as on an H100
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-U_FORTIFY_SOURCE"]


class Emulator:
    """The emulated `lookm_kernels._C`, and what its kernels run on."""

    def __init__(self, folder: Path) -> None:
        self._kernels = ctypes.CDLL(str(folder / "libkernels.so"))
        loader = importlib.machinery.ExtensionFileLoader("_C", str(folder / "_C.so"))
        spec = importlib.util.spec_from_loader("_C", loader)
        assert spec is not None
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        loader.exec_module(self.module)
        self.configure()

    def configure(self, seed: int = 0, shared_memory: int = SHARED_MEMORY, error: int = 0) -> None:
        """The order of threads, the shared memory of a block in bytes, and the cudaError_t of every call (0: none)."""
        self._kernels.emulator_configure(seed, shared_memory, error)


def why_not_built() -> str | None:
    """None when csrc/ can be compiled here, else the reason why it cannot."""
    if sys.platform != "linux":
        return "the emulator of csrc/ finds shared memory on Linux only"
    if shutil.which("g++") is None:
        return "the emulator of csrc/ needs g++"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "the emulator of csrc/ needs the headers of Python"
    return None


@functools.cache
def emulated() -> Emulator:
    """Built once for every state of the sources, in build/ of the repository."""
    sources = sorted([*(ROOT / "csrc").iterdir(), *(path for path in HERE.rglob("*") if path.suffix != ".pyc")])
    digest = hashlib.sha256(sysconfig.get_config_var("EXT_SUFFIX").encode())
    for path in sources:
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "emulator" / digest.hexdigest()[:16]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            build(Path(temporary) / "built")
            # another process may have been faster
            if not folder.exists():
                os.replace(Path(temporary) / "built", folder)
    return Emulator(folder)


def build(folder: Path, *options: str) -> None:
    """Compile libkernels.so (the kernels, and with them all shared memory) and _C.so, which uses it."""
    folder.mkdir()
    flags = [*FLAGS, *options]
    emulator, csrc = ["-I", str(HERE)], ["-I", str(ROOT / "csrc")]
    # pybind11 comes with torch
    python = ["-isystem", str(Path(torch.__file__).parent / "include"), "-I", sysconfig.get_paths()["include"]]
    compilations = [
        [*flags, *emulator, *csrc, "-x", "c++", "-c", str(ROOT / "csrc" / f"{kernel}.cu"), "-o", f"{kernel}.o"]
        for kernel in KERNELS
    ]
    compilations.append([*flags, *emulator, "-c", str(HERE / "emulator.cpp"), "-o", "emulator.o"])
    module = [*flags, *emulator, *csrc, *python, "-fvisibility=hidden", "-DLOOKM_EMULATED"]
    compilations.append([*module, "-c", str(ROOT / "csrc" / "bindings.cpp"), "-o", "bindings.o"])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda arguments: _run(folder, arguments), compilations))
    objects = [f"{kernel}.o" for kernel in KERNELS]
    _run(folder, [*options, "-shared", *objects, "emulator.o", "-o", "libkernels.so"])
    _run(folder, [*options, "-shared", "bindings.o", "-L.", "-lkernels", "-Wl,-rpath,$ORIGIN", "-o", "_C.so"])


def _run(folder: Path, arguments: list[str]) -> None:
    done = subprocess.run(["g++", *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ {' '.join(arguments)}:\n{done.stderr}")
