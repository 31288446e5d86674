"""What checks and times the kernels: it passes kernels that are right, sees what is wrong with others, and counts bytes and time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.kernels import fused, reference
from hasten.kernels.arguments import Noise, Selection
from hasten.kernels.backend import Backend
from hasten.kernels.driver import DriverError, Kernels
from hasten.kernels.measure import NotRun, Traffic, bytes_per_entry, check, copy_bandwidth, seconds, timed
from hasten.kernels.trials import DECODING, TRIALS, Draw, Trial, tensors, traffic
from tests.kernels.cases import STREAMS
from tests.kernels.machine import Machine

CPU = torch.device("cpu")
NAMES = {trial.name: trial for trial in (*TRIALS, *DECODING)}


def test_every_op_is_on_trial() -> None:
    from hasten.kernels import ops

    public = {name for name, value in vars(ops).items() if callable(value) and value.__module__ == ops.__name__ and name.islower()}
    assert {name for name in public if not name.startswith("_")} == {trial.op for trial in NAMES.values()}
    assert len(NAMES) == len(TRIALS) + len(DECODING)


@pytest.mark.parametrize("dtype", STREAMS)
@pytest.mark.parametrize("trial", [*TRIALS, *DECODING], ids=list(NAMES))
def test_right_kernels_pass(any_machine: Machine, trial: Trial, dtype: torch.dtype) -> None:
    for seed, size in enumerate([(2, 3, 40), (1, 5, 33)] if trial in TRIALS else [(2, 3, 130), (1, 2, 8195)]):
        found = check(trial, size, dtype, any_machine.backend, CPU, seed)
        assert found.right, found
        made = trial.reference(trial.make(Draw(seed, size, dtype, CPU)))
        assert trial.error(trial.make(Draw(seed, size, dtype, CPU)), made) <= 1


class Wrong:
    """A kernel with a fault, put in the place of `fused`'s."""

    def __init__(self, trial: Trial, fault: Callable[[list[Tensor], tuple[Any, ...]], None]) -> None:
        self.trial, self.fault = trial, fault

    def kernel(self, backend: object, args: tuple[Any, ...]) -> list[Tensor]:
        made = self.trial.reference(args)
        self.fault(made, args)
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trial, name)


def _first(k: int, change: Callable[[Tensor], Any]) -> Callable[[list[Tensor], tuple[Any, ...]], None]:
    """Changes one entry of a result."""

    def fault(made: list[Tensor], args: tuple[Any, ...]) -> None:
        flat = made[k].view(-1)
        flat[1] = change(flat[1].clone())

    return fault


def poison(value: Tensor) -> Any:
    """What an entry holds that was left out."""
    return torch.nan if value.dtype.is_floating_point else ~value if value.dtype == torch.bool else -value - 1


FAULTS = [
    *((name, k, lambda v: v + 2) for name, k in [("delta_store, int8 by token", 0), ("gelu_quant, gelu, int8", 0)]),
    *((name, 0, lambda v: v * 1.03 + 0.1) for name in NAMES if "apply" in name or "linear" in name),
    ("delta_store, bf16", 0, lambda v: v * 1.02 + 0.02),
    ("quantise_rows, int8", 1, lambda v: v * 1.2),
    *(("gated_residual_adaln", k, lambda v: v * 1.02 + 0.1) for k in range(2)),
    ("gated_residual_adaln_quant, int8", 1, lambda v: v + 2 if v < 0 else v - 2),
    ("drift", 0, lambda v: v * 1.0001),
    ("drift", 1, lambda v: ~v),
    ("reindex, 8 tensors", 7, lambda v: v + 1),
    ("token_stats, greedy", 0, lambda v: v ^ 1),
    ("token_commit, threshold", 2, lambda v: ~v),
    ("token_commit, threshold", 3, lambda v: v ^ 1),
    ("token_stats, greedy", 1, lambda v: v + 1e-3),
    ("token_stats, drawn", 0, lambda v: v ^ 1),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}-{fault[1]}")
def test_wrong_kernels_do_not(fault: tuple[str, int, Callable[[Tensor], Any]]) -> None:
    name, k, change = fault
    wrong: Any = Wrong(NAMES[name], _first(k, change))
    broken = Backend(lambda: Kernels(None, None), lambda: 0)  # type: ignore[arg-type]
    found = check(wrong, (2, 3, 40), torch.float32, broken, CPU, 1)
    assert not found.right, found
    missing: Any = Wrong(NAMES[name], _first(k, poison))
    assert not check(missing, (2, 3, 40), torch.float32, broken, CPU, 1).right


def test_a_changed_input_is_seen() -> None:
    def fault(made: list[Tensor], args: tuple[Any, ...]) -> None:
        args[0].view(-1)[0] += 1

    wrong: Any = Wrong(NAMES["delta_store, bf16"], fault)
    assert not check(wrong, (2, 3, 40), torch.float32, Backend(lambda: None, lambda: 0), CPU, 1).right  # type: ignore[arg-type,return-value]


def test_a_kernel_that_does_not_run_is_not_right() -> None:
    def make() -> Kernels:
        raise DriverError("no CUDA driver")

    backend = Backend(make, lambda: 0)
    with pytest.warns(RuntimeWarning), pytest.raises(NotRun, match="delta_store, bf16: no CUDA driver"):
        check(NAMES["delta_store, bf16"], (2, 3, 40), torch.float32, backend, CPU, 1)
    with pytest.raises(NotRun, match="delta_store, bf16: no CUDA driver"):
        timed(NAMES["delta_store, bf16"], (2, 3, 40), torch.float32, backend, CPU, 1e9)


def test_traffic_is_counted_once() -> None:
    """By hand: 16 bits in and out, a byte stored, a scale for each token; a table of a sample is read once."""
    elements, tokens = 2 * 3 * 40, 2 * 3
    for name, want in {
        "delta_store, int8 by token": 5 * elements + 4 * tokens,
        "delta_apply, int8, corrected": 5 * elements + 4 * tokens + 2 * 4 * 40,
        "gated_residual_adaln": 8 * elements + 3 * 2 * 2 * 40,
        "gelu_quant, gelu, int8": 3 * elements + 4 * tokens,
        "drift": 4 * elements + 2 * 9,
    }.items():
        args = NAMES[name].make(Draw(0, (2, 3, 40), torch.bfloat16, CPU))
        assert traffic(args, NAMES[name].reference(args)) == want


def test_a_seed_gives_the_same_inputs_and_another_one_others() -> None:
    for trial in NAMES.values():
        one, same, other = (tensors(trial.make(Draw(seed, (2, 3, 40), torch.float32, CPU))) for seed in (1, 1, 2))
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(one, same, strict=True))
        assert any(not torch.equal(a.float(), b.float()) for a, b in zip(one, other, strict=True))


def test_calls_are_timed_and_their_inputs_take_turns() -> None:
    seen: list[int] = []

    def run(k: int) -> None:
        seen.append(k)
        time.sleep(0.002 if k else 0.004)

    took = seconds(run, [(0,), (1,)], CPU, rounds=3)
    assert 0.003 <= took < 0.03 and seen == [0, 1] * 4


def test_an_op_is_timed_beside_its_chain(any_machine: Machine) -> None:
    bandwidth = copy_bandwidth(CPU, 1 << 16)
    for trial in NAMES.values():
        found = timed(trial, (1, 2, 64), torch.bfloat16, any_machine.backend, CPU, bandwidth)
        assert found.kernel > 0 and found.eager > 0 and found.compiled is None and found.floor == found.bytes / bandwidth > 0
        assert found.share == found.floor / found.kernel


def test_trials_of_tokens_draw_and_commit() -> None:
    """Or nothing would be tried of them."""
    args = NAMES["token_stats, drawn"].make(Draw(3, (2, 6, 40), torch.float32, CPU))
    assert isinstance(args[-1], Noise) and bool((reference.token_stats(*args)[0][0] != reference.token_stats(*args)[0][1]).any())
    args = NAMES["token_commit, threshold"].make(Draw(3, (2, 6, 40), torch.float32, CPU))
    commits = reference.token_commit(*args)[2]
    assert isinstance(args[3], Selection) and 2 <= int(commits.sum()) < int((args[1] == args[3].mask).sum())
    assert replace(NAMES["drift"], way="x").name == "drift, x" and hasattr(fused, "token_commit")


def test_what_pytorch_moves_is_counted() -> None:
    """By hand: a view costs nothing, a reduction what it reads, and a number beside a tensor nothing."""
    x, y = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(4, 8, dtype=torch.bfloat16)
    with Traffic() as counted:
        z = (x.view(8, 4) - y.view(8, 4)).t().float()
        z.abs().amax(0) / 127
    assert counted.bytes == 32 * (2 + 2 + 2) + 32 * (2 + 4) + 32 * (4 + 4) + (32 + 8) * 4 + (8 + 8) * 4
    fused, chain = bytes_per_entry(NAMES["delta_store, int8 by token"], (2, 3, 3072), torch.bfloat16)
    assert round(fused, 2) == 5.0 and round(chain, 1) == 39.0
