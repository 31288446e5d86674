"""The package as a user gets it: what is in the wheel and the sdist, that it runs away from the checkout, and that none of
the top-level folders gets in the way of another package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import pytest

import hasten

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("accelerators", "pipelines", "kernels", "app", "benchmarks")
PRESENT = tuple(folder for folder in FOLDERS if (ROOT / folder).is_dir())
WEIGHTS = ROOT / "pipelines" / "zoo" / "weights"


def run(*command: object, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """Runs a command with nothing of this checkout in its environment, and returns what it printed."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env={**clean, **(env or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(words)}\nexited with {done.returncode}:\n{done.stdout}"
    return done.stdout


class Venv:
    """A new virtual environment.

    With `borrow` it also sees the third-party packages of the environment that runs the tests, by a .pth file: torch and
    diffusers need not be installed again, which would take minutes and a gigabyte. A path that is added so comes last and its
    own .pth files are not read, so the checkout's editable install stays unseen and `hasten` can only be the one installed here.
    """

    def __init__(self, folder: Path, borrow: bool = True) -> None:
        self.folder = folder
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / "python"
        self.site = Path(run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
        if borrow:
            outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
            (self.site / "borrowed.pth").write_text("\n".join(sorted(outer)) + "\n")

    def pip_install(self, *arguments: object, cwd: Path) -> None:
        run(sys.executable, "-m", "pip", "--python", self.python, "install", "-q", "--disable-pip-version-check", *arguments, cwd=cwd)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built from: setuptools leaves build/ and an egg-info behind, and old ones leak into a wheel."""
    copy = tmp_path_factory.mktemp("source") / "hasten"
    skip = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
    copy.mkdir()
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, copy / name)
    for name in ("src", "tests", "recipes", "docs", *PRESENT):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=skip)
    return copy


@pytest.fixture(scope="session")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel made from that sdist: so a file that is missing in either is missed below."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="session")
def names_in_wheel(built: tuple[Path, Path]) -> set[str]:
    return set(zipfile.ZipFile(built[1]).namelist())


def code_folders() -> set[Path]:
    """Every folder of the checkout that holds code of the package; models under zoo/weights are data, whatever their suffix."""
    files = [path for folder in PRESENT for path in (ROOT / folder).rglob("*.py")]
    return {path.parent.relative_to(ROOT) for path in files if WEIGHTS not in path.parents}


def test_every_folder_with_code_is_listed_as_a_package() -> None:
    listed = {line.strip(' ",') for line in pyproject_block("packages = [")}
    needed = {".".join(("hasten", *folder.parts)) for folder in code_folders()}
    assert needed - listed == set(), "add these to [tool.setuptools] packages in pyproject.toml"
    top = {"hasten"} | {f"hasten.{folder}" for folder in PRESENT}
    assert {name for name in listed if ".".join(name.split(".")[:2]) not in top} == set()


def pyproject_block(opening: str) -> list[str]:
    """The lines of one list in pyproject.toml (Python 3.10 has no tomllib)."""
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    start = lines.index(opening) + 1
    return lines[start : lines.index("]", start)]


@pytest.mark.parametrize("folder", PRESENT)
def test_top_level_folder_is_no_regular_package(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/__init__.py would hide an installed package called {folder!r}"


def test_face_names_resolve() -> None:
    for name in hasten.__all__:
        assert getattr(hasten, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        hasten.nonsense  # noqa: B018


def test_face_table_agrees_with_the_public_names() -> None:
    assert {*hasten._HOME, "__version__"} == set(hasten.__all__) <= set(dir(hasten))


def test_importing_the_face_imports_no_torch() -> None:
    code = "import sys, hasten; assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    run(sys.executable, "-c", code, cwd=ROOT, env={"PYTHONPATH": str(ROOT / "src")})


def test_imports_run_one_way() -> None:
    """app -> pipelines -> accelerators -> kernels, and benchmarks on top: no folder imports one that stands above it."""
    rank = {"kernels": 0, "accelerators": 1, "pipelines": 2, "benchmarks": 3, "app": 4}
    wrong = []
    for folder in PRESENT:
        above = tuple(f"hasten.{name}" for name in rank if rank[name] > rank[folder])
        for path in sorted((ROOT / folder).rglob("*.py")):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                words = line.split()
                if words[:1] in (["from"], ["import"]) and words[1].startswith(above):
                    wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert wrong == []


def test_wheel_holds_only_hasten(built: tuple[Path, Path], names_in_wheel: set[str]) -> None:
    info = f"hasten-{hasten.__version__}.dist-info"
    assert {PurePosixPath(name).parts[0] for name in names_in_wheel} == {"hasten", info}
    with zipfile.ZipFile(built[1]) as wheel:
        assert wheel.read(f"{info}/top_level.txt").decode().split() == ["hasten"]
        assert "hasten = hasten.app.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert f"{info}/licenses/LICENSE" in names_in_wheel


CUDA = {path.relative_to(ROOT) for path in (ROOT / "kernels" / "cuda").iterdir() if path.suffix in (".cu", ".cuh")}


def test_wheel_holds_all_code_and_all_weights(names_in_wheel: set[str]) -> None:
    files = {path.relative_to(ROOT) for folder in code_folders() for path in (ROOT / folder).glob("*.py")}
    files |= {path.relative_to(ROOT) for path in WEIGHTS.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    files |= CUDA
    expected = {f"hasten/{path.as_posix()}" for path in files} | {"hasten/__init__.py", "hasten/__main__.py", "hasten/py.typed"}
    assert expected - names_in_wheel == set()
    assert not [name for name in names_in_wheel if "tests/" in name or "recipes/" in name]


def test_sdist_holds_what_is_needed_to_build_and_test(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        names = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in sdist.getnames()}
    assert {"pyproject.toml", "LICENSE", "Makefile", "constraints.txt", "src/hasten/py.typed", "tests/test_packaging.py"} <= names
    assert CUDA and {path.as_posix() for path in CUDA} | {"tests/kernels/shim/cuda_on_cpu.h", "tests/kernels/shim/driver.cpp"} <= names


def generate(python: Path, cwd: Path, model: Path) -> None:
    """`hasten generate` as a user runs it, by the console script that was installed beside `python`."""
    out = cwd / "pictures"
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
    run(python.parent / "hasten", "generate", "a small red circle", "--model", model, "--steps", "4", "--out", out, cwd=cwd, env=env)
    assert list(out.rglob("*.png"))


IS_IN = "pathlib.Path(sys.argv[1]).resolve() in pathlib.Path({}.__file__).resolve().parents"
HASTEN_IS_IN = f"import pathlib, sys, hasten; assert {IS_IN.format('hasten')}, hasten.__file__"
IMPORT_ALL = f"{HASTEN_IS_IN}; assert all(getattr(hasten, name) is not None for name in hasten.__all__)"


def test_wheel_generates_away_from_the_checkout(built: tuple[Path, Path], tmp_path: Path, tiny_pipeline_folder: Path) -> None:
    venv = Venv(tmp_path / "venv")
    venv.pip_install("--no-deps", "--no-index", built[1], cwd=tmp_path)
    run(venv.python, "-c", IMPORT_ALL, venv.site, cwd=tmp_path)
    generate(venv.python, tmp_path, tiny_pipeline_folder)


@pytest.mark.slow
def test_wheel_generates_with_dependencies_of_its_own(built: tuple[Path, Path], tmp_path: Path, tiny_pipeline_folder: Path) -> None:
    venv = Venv(tmp_path / "venv", borrow=False)
    (torch,) = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    venv.pip_install(torch, cwd=tmp_path)  # first, for the reason that the Makefile gives
    venv.pip_install("-c", ROOT / "constraints.txt", built[1], cwd=tmp_path)
    run(venv.python, "-c", IMPORT_ALL, venv.site, cwd=tmp_path)
    generate(venv.python, tmp_path, tiny_pipeline_folder)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "editable", "strict", "sdist"])
def test_every_way_to_install(how: str, source: Path, built: tuple[Path, Path], tmp_path: Path, tiny_pipeline_folder: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(source, checkout)
    arguments: dict[str, list[object]] = {
        "plain": [checkout],
        "editable": ["-e", checkout],
        "strict": ["-e", checkout, "--config-settings", "editable_mode=strict"],
        "sdist": [built[0]],
    }
    venv = Venv(tmp_path / "venv")
    venv.pip_install("--no-deps", "--no-build-isolation", *arguments[how], cwd=tmp_path)
    home = checkout if how in ("editable", "strict") else venv.site
    run(venv.python, "-c", IMPORT_ALL, home, cwd=tmp_path)
    generate(venv.python, tmp_path, tiny_pipeline_folder)


def pretend_install(venv: Venv, name: str) -> None:
    """Puts a regular package called `name` into the environment, with the metadata of a distribution."""
    (venv.site / name).mkdir()
    (venv.site / name / "__init__.py").write_text("somebody_elses = True\n")
    info = venv.site / f"{name}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")


def test_an_installed_package_of_a_folders_name_wins_in_the_root(tmp_path: Path) -> None:
    """Hugging Face ships a package called `kernels`; diffusers must find that one when it is run from the repository root,
    which `python -c` and `python -m` put first on sys.path. The same holds for the other folders' names."""
    venv = Venv(tmp_path / "venv")
    for name in FOLDERS:
        pretend_install(venv, name)
    check = "".join(f"import {name}; assert {name}.somebody_elses, {name}.__path__\n" for name in FOLDERS)
    run(venv.python, "-c", check, cwd=ROOT)
    test = tmp_path / "test_names.py"
    test.write_text("def test_names():\n" + "".join(f"    {line}\n" for line in check.splitlines()) + "    import hasten\n")
    assert "1 passed" in run(venv.python, "-m", "pytest", "-c", ROOT / "pyproject.toml", "-p", "no:cacheprovider", test, cwd=ROOT)


@pytest.mark.slow
def test_the_real_kernels_package_wins_in_the_root(tmp_path: Path) -> None:
    venv = Venv(tmp_path / "venv")
    venv.pip_install("--no-deps", "kernels==0.17.2", cwd=tmp_path)
    code = (
        "import pathlib, sys, kernels, hasten.accelerators; from diffusers import PixArtAlphaPipeline; kernels.get_kernel; "
        f"assert {IS_IN.format('kernels')}, kernels.__file__"
    )
    run(venv.python, "-c", code, venv.site, cwd=ROOT, env={"PYTHONPATH": str(ROOT / "src")})
