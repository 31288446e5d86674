"""The same kernels under the address and undefined-behaviour sanitizers: no access outside of a tensor, none that is misaligned."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.machine import host_compiler

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(*arguments: str, examples: int = 4) -> subprocess.CompletedProcess[str]:
    """pytest with the sanitizers loaded before anything else."""
    compiler = host_compiler()
    found = [subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip() for name in LIBRARIES]
    preload = " ".join(str(Path(path).resolve()) for path in found)
    settings = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1", "UBSAN_OPTIONS": "halt_on_error=1"}
    env = {**os.environ, **settings, "HASTEN_SANITIZE": "1", "HASTEN_EXAMPLES": str(examples)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


LIBRARIES = ("libasan.so", "libubsan.so")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has LD_PRELOAD, by which Python gets the sanitizers")
def test_kernels_stay_within_their_tensors() -> None:
    files = [str(HERE / f"test_{name}.py") for name in ("apply", "store", "adaln", "gelu", "linear", "drift", "reindex", "tokens")]
    # Slow there, or nothing for a sanitizer: rows that lie gigabytes apart would have it keep a byte for every eight.
    skip = "not gigabytes and not every_number and not silu_of_every and not elementary and not drawn_as_often and not not_lost"
    done = run(*files, "-k", f"forwards and {skip}")
    assert done.returncode == 0, done.stdout + done.stderr
    caught = run("-s", str(HERE / "planted.py"), "-k", "forwards")
    assert caught.returncode != 0 and "heap-buffer-overflow" in caught.stderr and "apply.cu" in caught.stderr, caught.stdout + caught.stderr
