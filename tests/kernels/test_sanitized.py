"""The same kernels under the address and undefined-behaviour sanitizers: no access outside of a tensor, none that is misaligned."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hasten.kernels import launch
from tests.kernels.machine import Machine

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
inside = pytest.mark.skipif("HASTEN_SANITIZE" not in os.environ, reason="run by test_kernels_stay_within_their_tensors")


def run(*arguments: str, examples: int = 4) -> subprocess.CompletedProcess[str]:
    """pytest with the sanitizers loaded before anything else."""
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux")
    found = [subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip() for name in LIBRARIES]
    preload = " ".join(str(Path(path).resolve()) for path in found)
    settings = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1", "UBSAN_OPTIONS": "halt_on_error=1"}
    env = {**os.environ, **settings, "HASTEN_SANITIZE": "1", "HASTEN_EXAMPLES": str(examples)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


LIBRARIES = ("libasan.so", "libubsan.so")


@pytest.mark.slow
def test_kernels_stay_within_their_tensors() -> None:
    files = [str(HERE / f"test_{name}.py") for name in ("apply", "store", "adaln", "gelu", "linear", "drift", "reindex", "tokens")]
    skip = "not every_number and not silu_of_every and not elementary and not drawn_as_often and not not_lost"
    done = run(*files, "-k", f"forwards and {skip}")
    assert done.returncode == 0, done.stdout + done.stderr
    caught = run("-s", str(HERE / "test_sanitized.py"), "-k", "forwards and planted")
    assert caught.returncode != 0 and "heap-buffer-overflow" in caught.stderr and "apply.cu" in caught.stderr, caught.stdout + caught.stderr


@inside
def test_a_planted_access_outside_is_caught(machine: Machine) -> None:
    """The kernel is told of a row more than there is."""
    x, out = torch.randn(1, 3, 8), torch.empty(1, 4, 8)
    args = launch._Apply(launch.Rows.of(x), batch=1, tokens=4, channels=8, group=1, out=out.data_ptr(), terms=1)
    args.offset[0], args.weight[0] = launch.Rows.of(x), 1.0
    machine.kernels().launch("apply", "apply_float_float_4", (1, 1), (2, 4), args, 0)
