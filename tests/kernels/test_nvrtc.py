"""The real compiler, without a GPU: every kernel for every architecture."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from hasten.kernels import nvrtc
from hasten.kernels.cubins import HEADERS, SOURCES, Cubins, source_text
from hasten.kernels.nvrtc import CompileError, Compiler
from hasten.kernels.report import ARCHITECTURES
from tests.kernels.machine import CUDA, Machine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the [dev] extra brings NVRTC on Linux only")


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return Compiler()


@pytest.fixture(scope="module")
def names(library: Path) -> set[str]:
    return set(Machine(library).names())


def compiles(compiler: Compiler, source: str, architecture: str, names: set[str]) -> None:
    made = Cubins(architecture, compiler=compiler).compile(source)
    assert made.cubin[:4] == b"\x7fELF" and "warning" not in made.log
    used = made.resources()
    assert used and set(used) <= names
    assert {name: r.spilled for name, r in used.items() if r.spilled} == {}
    # 48 kB of static shared memory and 64 registers at full blocks of 1,024 threads are what every architecture has.
    assert max(r.shared for r in used.values()) <= 49152 and max(r.registers for r in used.values()) <= 128


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("architecture", ["sm_90"])
def test_kernels_compile_without_spills(compiler: Compiler, source: str, architecture: str, names: set[str]) -> None:
    compiles(compiler, source, architecture, names)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "sm_90"])
def test_kernels_compile_for_all_architectures(compiler: Compiler, source: str, architecture: str, names: set[str]) -> None:
    compiles(compiler, source, architecture, names)


def test_every_source_is_listed() -> None:
    assert {path.stem for path in CUDA.glob("*.cu")} == set(SOURCES)
    assert {path.name for path in CUDA.glob("*.cuh")} == set(HEADERS)


def test_wide_kernels_move_16_bytes_at_once(compiler: Compiler) -> None:
    ptx = Cubins("sm_80", compiler=compiler).compile("apply").ptx
    (wide,) = re.findall(r"\.entry apply_bf16_bf16_8\(.*?\n}", ptx, re.DOTALL)
    assert re.search(r"ld\.global(\.nc)?\.v4\.[bu]32", wide) and re.search(r"st\.global\.v4\.[bu]32", wide)
    assert not re.search(r"(ld|st)\.global[.\w]*\.[bu]16", wide)


def test_the_compilers_words_reach_the_user(compiler: Compiler) -> None:
    with pytest.raises(CompileError, match=r"refuses broken\.cu for sm_80.*broken\.cu\(1\): error"):
        compiler.compile("int f( {", "broken.cu", "sm_80", {})
    with pytest.raises(CompileError, match="for sm_12345"):
        compiler.compile(source_text("apply.cu"), "apply.cu", "sm_12345", {name: source_text(name) for name in HEADERS})


@pytest.mark.parametrize(("cuda", "wanted"), [("12.8", "libnvrtc.so.12"), ("13.0", "libnvrtc.so.13"), (None, "libnvrtc.so.13")])
def test_of_several_compilers_torchs_own_is_taken(cuda: str | None, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, name in (("cu13", "libnvrtc.so.13"), ("cuda_nvrtc", "libnvrtc.alt.so.12"), ("cuda_nvrtc", "libnvrtc.so.12")):
        (tmp_path / folder / "lib").mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "lib" / name).touch()
    monkeypatch.setattr(nvrtc, "_folders", lambda package: [tmp_path])
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = nvrtc.find_nvrtc()
    assert found is not None and found.name == wanted


def test_a_library_that_is_none_is_no_compiler(tmp_path: Path) -> None:
    path = tmp_path / "libnvrtc.so.13"
    path.write_bytes(b"nonsense")
    with pytest.raises(CompileError, match="cannot be loaded as NVRTC"):
        Compiler(path)
