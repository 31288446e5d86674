"""docs/kernels.md: its examples run, and its counts are those that are counted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from hasten.kernels.measure import bytes_per_entry
from hasten.kernels.trials import DECODING, TRIALS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
SHOWN = {
    "delta_store": "int8 by token", "quantise_rows": "int8", "delta_apply": "int8, corrected", "forecast_apply": "order 2, bf16",
    "gated_residual_adaln": "", "gated_residual_adaln_quant": "int8", "gelu_quant": "gelu, int8", "drift": "", "reindex": "8 tensors",
    "token_stats": "greedy", "token_commit": "threshold",
}  # fmt: skip


EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_examples_run(example: str) -> None:
    exec(compile(example, "docs/kernels.md", "exec"), {})


def test_traffic_is_what_is_counted() -> None:
    rows = {op: cells for op, *cells in re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \| ([\d]+) \|$", PAGE, re.MULTILINE)}
    assert set(rows) == set(SHOWN)
    for op, way in SHOWN.items():
        (trial,) = [trial for trial in (*TRIALS, *DECODING) if (trial.op, trial.way) == (op, way)]
        fused, chain = bytes_per_entry(trial, (1, 8, 32_768) if trial in DECODING else (1, 64, 3072), torch.bfloat16)
        tensors = 8 if op == "reindex" else 1
        shown, one_by_one = rows[op]
        total = re.findall(r"\d+", shown.rpartition("=")[2])[0]
        assert int(total) == round(fused / tensors) and int(one_by_one) == round(chain / tensors), op
