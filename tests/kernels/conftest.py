"""What the kernels' tests share: the machine that runs them, built once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kernels.machine import Machine, build


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HASTEN_SANITIZE=1 builds it with the sanitizers, which the process must have loaded before."""
    sanitizers = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    return build(tmp_path_factory.mktemp("shim"), *(sanitizers if os.environ.get("HASTEN_SANITIZE") else ["-O1"]))


@pytest.fixture(scope="session", params=["forwards", "backwards"])
def machine(library: Path, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Twice: threads and blocks run in order, and the other way round. What depends on it lacks a barrier."""
    made = Machine(library)
    made.library.shim_order(3 if request.param == "backwards" else 0)
    yield made
    made.library.shim_order(0)


@pytest.fixture(scope="session")
def any_machine(library: Path) -> Machine:
    """Once, in whichever order: for what the order cannot change."""
    return Machine(library)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New tensors hold NaN or the largest integer: an entry that a kernel leaves out is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
