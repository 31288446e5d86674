"""Compiling once, keeping, loading, launching: and what happens when one of them fails."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hasten.kernels import cubins, fused, reference
from hasten.kernels.backend import Backend
from hasten.kernels.cubins import Cubins
from hasten.kernels.driver import Driver, DriverError, Kernels
from hasten.kernels.nvrtc import Compiled, CompileError, Compiler, NoCompiler
from tests.kernels.machine import IMAGE, Machine


class Counting(Compiler):
    """Compiles nothing, and counts."""

    def __init__(self, image: bytes = IMAGE, version: tuple[int, int] = (13, 0)) -> None:
        self.image, self.version, self.calls = image, version, 0

    def compile(self, *args: object, **kwargs: object) -> Compiled:  # type: ignore[override]
        self.calls += 1
        return Compiled(self.image, "", "")


def test_a_source_is_compiled_once_for_all_processes(tmp_path: Path) -> None:
    compiler = Counting()
    assert [Cubins("sm_90", tmp_path / "new" / "folder", compiler).get("apply") for _ in range(3)] == [IMAGE] * 3
    assert compiler.calls == 1


def test_what_the_code_depends_on_is_in_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {Cubins("sm_90", tmp_path, Counting()).path("apply").name}
    names.add(Cubins("sm_80", tmp_path, Counting()).path("apply").name)
    names.add(Cubins("sm_90", tmp_path, Counting(version=(12, 6))).path("apply").name)
    for changed in ("apply.cu", "common.cuh"):
        with monkeypatch.context() as patch:
            text = cubins.source_text
            patch.setattr(cubins, "source_text", lambda name, text=text, changed=changed: text(name) + "//" * (name == changed))
            names.add(Cubins("sm_90", tmp_path, Counting()).path("apply").name)
    monkeypatch.setattr(cubins, "OPTIONS", (*cubins.OPTIONS, "--use_fast_math"))
    names.add(Cubins("sm_90", tmp_path, Counting()).path("apply").name)
    assert len(names) == 6


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
def test_damaged_code_is_compiled_again(tmp_path: Path, damage: str) -> None:
    compiler = Counting()
    kept = Cubins("sm_90", tmp_path, compiler)
    kept.get("apply")
    path = kept.path("apply")
    content = path.read_bytes()
    path.write_bytes({"flipped": content[:-1] + bytes([content[-1] ^ 1]), "cut": content[:-1], "emptied": b""}[damage])
    assert kept.get("apply") == IMAGE and compiler.calls == 2
    assert path.read_bytes() == content == hashlib.sha256(IMAGE).digest() + IMAGE


def test_code_that_the_driver_refuses_is_compiled_again(machine: Machine, tmp_path: Path) -> None:
    """Whole on disk, but not what this driver loads."""
    Cubins("sm_90", tmp_path, Counting(b"from another machine")).get("apply")
    compiler = Counting()
    kernels = Kernels(Driver(machine.path), Cubins("sm_90", tmp_path, compiler).get)
    x = torch.randn(2, 3, 8)
    made = fused.delta_apply(Backend(lambda: kernels, lambda: 0), x, x)
    assert made is not None and torch.equal(made, x + x) and compiler.calls == 1


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    compiler = Counting()
    kept = Cubins("sm_90", tmp_path / "file", compiler)
    with pytest.warns(RuntimeWarning, match="compiled kernels cannot be kept in .*HASTEN_CACHE") as seen:
        assert [kept.get("apply"), kept.get("apply")] == [IMAGE, IMAGE]
    assert len(seen) == 1 and compiler.calls == 2 and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_processes_that_compile_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from hasten.kernels.cubins import Cubins
from hasten.kernels.nvrtc import Compiled, Compiler
class Large(Compiler):
    version = 13, 0
    def __init__(self): pass
    def compile(self, *args): return Compiled(b"ELF!" * 250_000, "", "")
kept = Cubins("sm_90", Path({str(tmp_path)!r}), Large())
for turn in range(60):
    assert kept.get("apply", again=turn % 3 == 0) == b"ELF!" * 250_000
"""
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1


def test_the_folder_is_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", "/elsewhere")
    assert cubins.default_folder() == Path("/elsewhere")
    monkeypatch.delenv("HASTEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cubins.default_folder() == Path("/caches/hasten/kernels")


def test_without_a_compiler_the_reference_answers_and_one_warning_says_why() -> None:
    def make() -> Kernels:
        raise NoCompiler("no NVRTC was found")

    backend, x = Backend(make, lambda: 0), torch.randn(2, 3, 8)
    with pytest.warns(RuntimeWarning, match="kernels are off, PyTorch's are used: no NVRTC was found"):
        assert fused.delta_apply(backend, x, x) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused.delta_apply(backend, x, x) is None
    assert backend.broken == "no NVRTC was found"


def test_a_machine_without_a_driver_says_so(tmp_path: Path) -> None:
    with pytest.raises(DriverError, match="no CUDA driver"):
        Driver(tmp_path / "libcuda.so.1")


def test_a_thread_without_a_context_is_given_the_devices(machine: Machine) -> None:
    """As a thread of a server is whose first work is a launch."""
    backend, x = machine.backend_of_its_own(), torch.randn(2, 3, 8)
    before = machine.library.shim_retained()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(fused.delta_apply, backend, x, x).result().equal(x + x)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(fused.delta_apply, backend, x, x).result().equal(x + x)
    assert machine.library.shim_retained() == before + 1
    with ThreadPoolExecutor(1) as pool, pytest.raises(DriverError, match="cuModuleLoadData failed: invalid device context"):
        pool.submit(Driver(machine.path, device=7).load, IMAGE).result()


def test_what_the_driver_refuses_for_once_is_tried_again(machine: Machine) -> None:
    """Three times, and other kernels go on meanwhile; compiled again is once."""
    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 8).bfloat16()
    bad, asked = {"apply"}, []

    def image(source: str, again: bool) -> bytes:
        asked.append((source, again))
        return b"no memory" if source in bad else IMAGE

    backend = Backend(lambda: Kernels(Driver(machine.path), image), lambda: 0)
    with pytest.warns(RuntimeWarning, match="one of hasten's kernels does not run, .*: apply_float_float_4: cuModuleLoadData failed"):
        assert fused.delta_apply(backend, x, x) is None
    assert backend.refused and "cuModuleLoadData" in backend.refused
    bad.clear()
    assert fused.delta_apply(backend, x, x) is not None and backend.broken is None
    bad.add("store")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(9):
            assert fused.delta_store(backend, x, x, "bf16") is None
            assert fused.delta_apply(backend, x, x) is not None, "the others run"
    assert len(said) == 1 and asked.count(("store", True)) == 1 and asked.count(("store", False)) == 3
    bad.clear()
    assert fused.delta_store(backend, x, x, "bf16") is None, "given up"
    assert fused.delta_store(backend, y, y, "bf16") is not None, "another kernel of the same file"


def test_a_source_that_is_refused_leaves_the_others(machine: Machine) -> None:
    x = torch.randn(2, 3, 8)

    def image(source: str, again: bool) -> bytes:
        if source == "store":
            raise CompileError("NVRTC 13.0 refuses store.cu")
        return IMAGE

    backend = Backend(lambda: Kernels(Driver(machine.path), image), lambda: 0)
    with pytest.warns(RuntimeWarning, match=r"PyTorch's are used in its place: NVRTC 13.0 refuses store\.cu"):
        assert fused.delta_store(backend, x, x, "bf16") is None
    assert fused.delta_apply(backend, x, x) is not None and backend.broken is None


def test_the_drivers_words_reach_the_user(machine: Machine) -> None:
    driver = Driver(machine.path)
    module = driver.load(IMAGE)
    with pytest.raises(DriverError, match="cuModuleGetFunction failed: named symbol not found"):
        driver.function(module, "no_such_kernel")
    with pytest.raises(DriverError, match="cuModuleLoadData failed"):
        driver.load(b"nothing that runs")


def test_structures_are_as_large_as_the_kernels_think(machine: Machine) -> None:
    """Every kernel's arguments, as Python packs them and as C++ reads them."""
    from hasten.kernels import launch

    sizes = {name.split("_")[0]: machine.library.shim_size(name.encode()) for name in machine.names()}
    assert sizes == launch.argument_sizes()


def test_the_machine_itself_refuses_what_a_gpu_would(machine: Machine) -> None:
    """A launch beyond the bounds of a kernel, as a test of the tests."""
    from hasten.kernels.launch import _Apply

    driver = Driver(machine.path)
    function = driver.function(driver.load(IMAGE), "apply_float_float_1")
    with pytest.raises(DriverError, match="invalid argument"):
        driver.launch(function, (1, 1), (512, 1), _Apply(), 0)
    with pytest.raises(DriverError, match="invalid argument"):
        driver.launch(function, (1, 70_000), (32, 1), _Apply(), 0)


def test_the_reference_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.kernels import backend

    assert backend.wanted()
    monkeypatch.setenv("HASTEN_KERNELS", "reference")
    assert not backend.wanted()
    monkeypatch.setenv("HASTEN_KERNELS", "off")
    with pytest.raises(ValueError, match="HASTEN_KERNELS must be 'reference' or not set, not 'off'"):
        backend.wanted()
    monkeypatch.delenv("HASTEN_KERNELS")
    assert not backend.usable(torch.device("cpu")) and backend.usable(torch.device("cuda", 3))
    monkeypatch.setattr(backend.of_device(3), "broken", "no compiler")
    assert not backend.usable(torch.device("cuda", 3))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not backend.usable(torch.device("cuda", 0))


def test_kernels_refuse_what_they_would_get_wrong(machine: Machine) -> None:
    from hasten.kernels import launch

    x, stream = torch.randn(2, 3, 8), 0
    kernels = machine.kernels()
    with pytest.raises(ValueError, match="channels next to each other"):
        launch.apply(kernels, stream, torch.empty(2, 3, 8), x.mT.contiguous().mT, [x], [], [1.0], None)
    with pytest.raises(ValueError, match="out must be a dense"):
        launch.apply(kernels, stream, torch.empty(2, 3, 16)[..., :8], x, [x], [], [1.0], None)
    with pytest.raises(ValueError, match="an offset must be"):
        launch.apply(kernels, stream, torch.empty(2, 3, 8), x, [x[:1]], [], [1.0], None)
    assert reference.delta_apply(x, x).equal(x + x)
