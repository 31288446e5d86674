"""`hasten doctor --kernels`: over a device that is none, and where there is no device at all."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hasten.app import kernel_check
from hasten.app.cli import app
from hasten.app.kernel_check import compiled, examine
from hasten.kernels import fused
from hasten.kernels.backend import Backend
from hasten.kernels.cubins import SOURCES
from hasten.kernels.driver import DriverError, Kernels
from hasten.kernels.nvrtc import Compiled, CompileError, Compiler
from hasten.kernels.trials import DECODING, TRIALS
from tests.kernels.machine import Machine

SIZES: dict[str, Any] = {"blocks": [(2, 3, 40)], "logits": [(2, 3, 130)], "timed_blocks": (1, 2, 16), "timed_logits": (1, 2, 64)}
ALL = [trial.name for trial in (*TRIALS, *DECODING)]


def examined(backend: Backend) -> Any:
    return examine(backend, torch.device("cpu"), "no GPU", bandwidth=1e9, **SIZES)


def test_a_device_whose_kernels_are_right(any_machine: Machine) -> None:
    found = examined(any_machine.backend)
    assert found.code == 0 and found.data["ok"] and "every kernel is right" in found.text and "!" not in found.text
    assert [one["name"] for one in found.data["times"]] == ALL
    assert len(found.data["checks"]) == 3 * len(ALL) and all(one["right"] for one in found.data["checks"])
    assert all(f"{name} " in found.text for name in ALL) and json.dumps(found.data, allow_nan=False)


def test_a_kernel_that_is_wrong_is_named(any_machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused.drift

    def wrong(backend: Backend, now: torch.Tensor, before: torch.Tensor, threshold: float) -> Any:
        made = right(backend, now, before, threshold)
        assert made is not None
        return made[0] * 1.01, made[1]

    monkeypatch.setattr(fused, "drift", wrong)
    found = examined(any_machine.backend)
    assert found.code == 1 and not found.data["ok"] and "3 problems, marked !" in found.text
    assert all(problem.startswith("drift, ") for problem in found.data["problems"]) and "0 of 3" in found.text


def test_a_device_that_runs_no_kernels_says_why() -> None:
    def make() -> Kernels:
        raise DriverError("no CUDA driver: libcuda.so.1")

    found = examined(Backend(make, lambda: 0))
    assert found.code == 1 and f"{len(ALL)} problems" in found.text and "delta_apply, int8, corrected: no CUDA driver" in found.text
    assert found.data["checks"] == [] and json.dumps(found.data, allow_nan=False)


class Stub(Compiler):
    """Says what NVRTC would."""

    def __init__(self) -> None:
        self.version = 13, 0

    def compile(self, *args: object, **kwargs: object) -> Compiled:  # type: ignore[override]
        part = (
            "Compiling entry function '{}' for 'sm_90'\n    {} bytes stack frame, 0 bytes spill stores\nUsed {} registers, 128 bytes smem\n"
        )
        return Compiled(b"", "", part.format("one", 0, 40) + part.format("two", 8, 64))


def test_without_a_device_what_compiles_is_shown() -> None:
    found = compiled(Stub())
    assert found.code == 0 and "compiled for sm_90 by NVRTC 13.0" in found.text and "no kernel was run: " in found.text
    assert [row["source"] for row in found.data["compiled"]] == list(SOURCES)
    want = {"kernels": "2", "registers": "64", "bytes shared": "128", "bytes spilled": "8"}
    assert all({key: row[key] for key in want} == want for row in found.data["compiled"])


def test_the_command_without_a_device_and_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Compiler:
        raise CompileError("no NVRTC was found: pip install nvidia-cuda-nvrtc, or set CUDA_HOME")

    monkeypatch.setattr(kernel_check, "Compiler", none)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["doctor", "--kernels"])
    assert done.exit_code == 0 and "no kernel was run" in done.stdout and "pip install nvidia-cuda-nvrtc" in done.stdout
    read = json.loads(CliRunner().invoke(app, ["doctor", "--kernels", "--json"]).stdout)
    assert read["ok"] and read["device"] is None and read["compiled"] == [] and len(read["missing"]) == 2
