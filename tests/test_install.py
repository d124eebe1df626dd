"""pip install ., pip install -e . and sdist -> wheel, with and without nvcc: what is installed and what it says.

Minutes of compiling, so these tests run by `make test-install` only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.install
ROOT = Path(__file__).parent.parent
WITHOUT_NVCC = {"CUDA_HOME": "/nonexistent"}
NOT_BUILT = "not built: nvcc was not found: CUDA_HOME is set, but /nonexistent/bin/nvcc is not an executable"
IGNORED = (".*", "build", "dist", "out", "*.egg-info", "__pycache__", "_C.*", "_build.json")
CHOICES = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CXX", "CUDAHOSTCXX", "LOOKM_BUILD_CUDA")
needs_nvcc = pytest.mark.skipif(
    not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()), reason="needs nvcc"
)


def run(command: list[str | Path], cwd: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run without the caller's choices, for one architecture."""
    own = {name: text for name, text in os.environ.items() if name not in (*CHOICES, "PYTHONPATH")}
    environment = own | {"LOOKM_CUDA_ARCHS": "90"} | variables
    return subprocess.run(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def copy(target: Path) -> Path:
    """The source tree, with nothing that was built."""
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*IGNORED))
    return target


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree that the rows of the matrix use one after the other, and a path with spaces."""
    return copy(tmp_path_factory.mktemp("install") / "a path with spaces")


class Environment:
    """A new virtual environment, which borrows torch and the build tools of the one that runs the tests."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.folder, self.python = folder, folder / "bin" / "python"
        (site,) = folder.glob("lib/python*/site-packages")
        borrowed = [entry for entry in sys.path if entry.endswith("site-packages")]
        (site / "zz_borrowed.pth").write_text("\n".join(borrowed) + "\n")

    def pip(self, *arguments: str | Path, **variables: str) -> str:
        pip = [sys.executable, "-m", "pip", "--python", self.python, "-v", "install", "--no-deps", "--force-reinstall"]
        done = run([*pip, *arguments], self.folder, variables)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def rows(self) -> dict[str, str]:
        """What `python -m lookm_kernels` prints outside of the source tree."""
        done = run([self.python, "-m", "lookm_kernels"], self.folder, {})
        assert done.returncode == 0, done.stdout
        return {line[:18].strip(): line[18:].strip() for line in done.stdout.splitlines()}

    def extension(self) -> Path:
        """The file of the extension, imported on a machine that need not have a driver."""
        done = run([self.python, "-c", "import lookm_kernels._C as c; print(c.__file__)"], self.folder, {})
        assert done.returncode == 0, done.stdout
        return Path(done.stdout.strip())


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "venv")


def assert_built(environment: Environment, folder: Path) -> None:
    assert re.fullmatch(r"built for sm_90 with CUDA \d+\.\d+", environment.rows()["CUDA extension"])
    assert environment.extension().is_relative_to(folder)


def assert_not_built(environment: Environment, reason: str) -> None:
    rows = environment.rows()
    assert rows["CUDA extension"] == reason
    assert rows["backend cuda"] == f"missing: the CUDA extension was {reason}"
    assert rows["backend reference"] == "available"


@needs_nvcc
def test_pip_install_and_again(source: Path, environment: Environment, tmp_path: Path) -> None:
    assert "Building CUDA object" in environment.pip(source)
    assert_built(environment, environment.folder)
    # an isolated build has its tools in a new folder each time, and still compiles no kernel again
    again = environment.pip(source)
    assert "Building CUDA object" not in again
    assert "Linking CXX shared module" in again
    assert_built(environment, environment.folder)
    # where the machine's CMake is too old, an isolated build brings its own
    fake_cmake(tmp_path)
    environment.pip(source, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert_built(environment, environment.folder)


@needs_nvcc
def test_editable_with_nvcc_then_without(source: Path, environment: Environment) -> None:
    environment.pip("--no-build-isolation", "-e", source)
    assert_built(environment, source / "lookm_kernels")
    environment.pip("--no-build-isolation", "-e", source, LOOKM_BUILD_CUDA="0")
    assert_not_built(environment, "not built: LOOKM_BUILD_CUDA=0 was set")
    assert not list((source / "lookm_kernels").glob("_C.*"))


@needs_nvcc
def test_sdist_to_wheel_with_nvcc(source: Path, environment: Environment, tmp_path: Path) -> None:
    # what lies about in the tree must not be packed
    environment.pip("--no-build-isolation", "-e", source)
    wheel = build(source, tmp_path / "dist")
    assert re.search(r"-cp3\d+-cp3\d+t?-linux_", wheel.name)
    environment.pip(wheel)
    assert_built(environment, environment.folder)


def test_without_nvcc(source: Path, environment: Environment) -> None:
    environment.pip(source, **WITHOUT_NVCC)
    assert_not_built(environment, NOT_BUILT)
    environment.pip("--no-build-isolation", "-e", source, **WITHOUT_NVCC)
    assert_not_built(environment, NOT_BUILT)


def test_sdist_to_wheel_without_nvcc(source: Path, environment: Environment, tmp_path: Path) -> None:
    wheel = build(source, tmp_path / "dist", **WITHOUT_NVCC)
    assert wheel.name.endswith("-py3-none-any.whl")
    environment.pip(wheel)
    assert_not_built(environment, NOT_BUILT)


def build(source: Path, target: Path, **variables: str) -> Path:
    """The wheel from the sdist; the sdist holds the sources, and nothing that was built."""
    done = run([sys.executable, "-m", "build", "--no-isolation", "--outdir", target, source], ROOT.parent, variables)
    assert done.returncode == 0, done.stdout
    (sdist,) = target.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()}
    assert names >= sources | {"setup.py", "CMakeLists.txt", "CMakePresets.json", "tests/test_install.py"}
    assert not {name for name in names if re.search(r"^build/|_C\.|_build\.json|__pycache__|\.so$", name)}
    (wheel,) = target.glob("*.whl")
    return wheel


def fake_cmake(folder: Path) -> Path:
    """A CMake of long ago."""
    program = folder / "cmake"
    program.write_text("#!/bin/sh\necho cmake version 3.10.2\n")
    program.chmod(0o755)
    return program


def failure(source: Path, target: Path, **variables: str) -> str:
    """The output of an installation that fails."""
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", target, source]
    done = run(pip, target, variables)
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LOOKM_BUILD_CUDA": "yes"}, "LOOKM_BUILD_CUDA must be auto, 0 or 1, got 'yes'"),
        (
            {"LOOKM_BUILD_CUDA": "1", **WITHOUT_NVCC},
            "LOOKM_BUILD_CUDA=1, but nvcc was not found: CUDA_HOME is set, but /nonexistent/bin/nvcc is not an "
            "executable. Install the CUDA toolkit or point CUDA_HOME to it, or set LOOKM_BUILD_CUDA=0",
        ),
    ],
    ids=["bad value", "demanded without nvcc"],
)
def test_refused_at_once(source: Path, tmp_path: Path, variables: dict[str, str], message: str) -> None:
    assert message in failure(source, tmp_path, **variables)


@needs_nvcc
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LOOKM_CUDA_ARCHS": "90;33"}, "LOOKM_CUDA_ARCHS must list compute capabilities that .*\"80;90\", got '33'"),
        ({"CXX": "/nonexistent"}, r"no C\+\+ compiler was found, CXX is /nonexistent: install one"),
        ({"CUDAHOSTCXX": "/nonexistent"}, "CMake could not configure .*CUDAHOSTCXX choose the C.. compiler"),
    ],
    ids=["unknown architecture", "no compiler", "compiler that does not fit"],
)
def test_what_the_machine_lacks(source: Path, tmp_path: Path, variables: dict[str, str], message: str) -> None:
    assert re.search(message, failure(source, tmp_path, **variables))


@needs_nvcc
def test_old_cmake(source: Path, tmp_path: Path) -> None:
    cmake = fake_cmake(tmp_path)
    output = failure(source, tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert f"cmake 3.24 or newer is needed, {cmake} is 3.10.2: pip install cmake" in output


@needs_nvcc
def test_failing_compile(tmp_path: Path) -> None:
    source = copy(tmp_path / "source")
    for kernel in (source / "csrc").glob("*.cu"):
        kernel.write_text("no such thing;\n")
    output = failure(source, tmp_path)
    assert 'identifier "no" is undefined' in output
    assert "the CUDA extension did not compile, see the compiler's output above" in output
    assert "LOOKM_BUILD_CUDA=0" in output
