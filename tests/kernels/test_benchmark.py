"""The benchmark for GPUs, on a device that is none: it runs from end to end, and its bars and its page say what its rows say."""

from __future__ import annotations

import json
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from hasten.benchmarks import kernel_pipelines, kernels
from hasten.benchmarks.harness import BenchError, Results, unnoted
from hasten.benchmarks.kernel_pipelines import PIPELINES, Subject, build, synchronisations, time_pipeline
from hasten.benchmarks.kernels import bars_of, execute, scheduler_beside
from hasten.kernels import report
from hasten.kernels.backend import Backend
from hasten.kernels.cubins import digest
from hasten.kernels.driver import Driver, DriverError, Kernels
from hasten.kernels.nvrtc import CompileError, Resources
from hasten.kernels.trials import DECODING, TRIALS, Trial
from tests.kernels.machine import IMAGE, Machine

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "checked": ((1, 3, 40),), "checked_logits": ((1, 2, 65),), "blocks": ((1, 2, 16),), "logits": ((2, 4, 64),), "pipelines": (),
    "compiled": False, "minutes": 1.0, "cached": (), "note": unnoted, "device": CPU, "copied": 1 << 12,
}  # fmt: skip
FOUND = {"one": {"one_float_4": {name: Resources(40, 128, 0) for name in report.ARCHITECTURES}}}


@pytest.fixture(scope="module")
def results(any_machine: Machine) -> Results:
    return execute(backend=any_machine.backend, **SMALL)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer is a small one."""
    measure = kernels.int8_on_cpu
    monkeypatch.setattr(kernels, "int8_on_cpu", lambda *sizes, rounds=1: measure(*(sizes or (4, 16, 8)), rounds=rounds))


def test_all_ops_are_checked_and_timed(results: Results) -> None:
    names = [trial.name for trial in (*TRIALS, *DECODING)]
    of = {part: [row for row in results.rows if row["part"] == part] for part in ("checks", "times", "decoding")}
    assert [row["name"] for row in of["checks"]] == [name for name in names for _ in range(3)] and all(row["right"] for row in of["checks"])
    assert [row["name"] for row in of["times"]] == names and all(row["kernel"] > 0 and row["compiled"] is None for row in of["times"])
    assert len(of["decoding"]) == 1 and of["decoding"][0]["unlike"] == 0
    right = [bar for bar in results.bars if "time over" not in bar.name and "step over" not in bar.name]
    assert all(bar.holds for bar in right), right


def test_the_page_says_what_was_measured(results: Results, tmp_path: Path) -> None:
    results.write_json(tmp_path / "kernels.json")
    read = json.loads((tmp_path / "kernels.json").read_text())
    text = report.on_gpu([read])
    assert "| token_stats, drawn | bfloat16 | 2 x 4 x 64 |" in text and "### Pipelines\n\nNot measured." in text and "### Bars" in text
    assert "cpu; a copy" in text and report.on_gpu([read, {**read, "settings": {"device": "two", "bandwidth": 1.0}}]).count("### Bars") == 2
    assert "token_stats, drawn" in kernels.page(results)
    for none in ([], [{**read, "settings": {"device": None}}]):
        assert report.on_gpu(none).startswith("Not measured: no number here was seen on a GPU.")


def test_the_page_has_every_kernel_and_every_spill() -> None:
    cpu = {"part": "cpu", "name": "own", "float32": 40.0, "int8": 8.0, "ratio": 5.0}
    less = {"rows": [], "settings": {"device": None}, "machine": {"processor": "y"}}
    run = {"rows": [cpu], "settings": {"device": None}, "machine": {"processor": "x"}}
    again = {**run, "machine": {"processor": "x", "load_at_start": 1.234}}
    text = report.page(FOUND, (13, 0), [less, run, again])
    assert "x, one thread." in text and "x, one thread; load of the machine before: 1.2." in text and "y, one" not in text
    assert "1 kernels for each of 7 architectures, 7 in all: none spills registers" in text
    assert f"| `one_float_4` |{' 40 / 128 |' * 7} 0 |" in text and "| own | 40 | 8 | 5 |" in text and "Not measured: no" in text
    assert "The bar is 5 times as fast.\n\nNot measured." in report.page(FOUND, (13, 0))
    spilled = {"one": {"one_float_4": {**FOUND["one"]["one_float_4"], "sm_75": Resources(255, 128, 16)}}}
    text = report.page(spilled, (13, 0))
    assert "1 spills registers" in text and "| 16 |" in text and "255 / 128" in text


def test_the_written_page_has_every_kernel(any_machine: Machine) -> None:
    """Of the present sources, for all architectures, and no spill: whoever changes a kernel runs `python -m hasten.kernels.report`."""
    text = report.PAGE.read_text(encoding="utf-8")
    assert f"sources {digest()}" in text
    rows = {line.split("`")[1]: line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `")}
    assert set(rows) == set(any_machine.names())
    assert all(len(row) == 2 + len(report.ARCHITECTURES) and row[-1].strip() == "0" for row in rows.values())
    assert all(f"| {name} |" in text for name in report.ARCHITECTURES)


def test_bars_are_those_of_the_rows() -> None:
    check = {"part": "checks", "error": 0.4, "right": True, "unlike": 3, "exact": False}
    time = {"part": "times", "name": "a", "size": [1, 4096, 3072], "memory_bound": True, "decoding": False, "share": 0.9, "kernel": 2.0}
    small, logits = {**time, "size": [1, 8, 8], "share": 0.1}, {**time, "size": [1, 1, 9], "decoding": True, "share": 0.1}
    lost, product = {**time, "name": "lost: not run", "kernel": None, "share": None}, {**time, "memory_bound": False, "share": 0.1}
    slow = {**time, "name": "slow", "share": 0.8, "compiled": 1.0}
    step = {"part": "decoding", "ratio": 12.0, "unlike": 0, "kernel": 3.0}
    rows = [{**time, "compiled": 3.0}, {**small, "compiled": 0.1}, {**logits, "compiled": 9.0}, {**product, "compiled": 9.0}]
    bars = bars_of([check, *rows, slow, step])
    assert [bar.value for bar in bars] == [0.4, 0, 0, 0, 0.8, 0.5, 12.0, 0]
    assert [bar.holds for bar in bars] == [True, True, True, True, False, False, True, True]
    assert "slow" in bars[4].note and len(bars_of([check])) == 3
    assert [bar.value for bar in bars_of([check, lost])][3:] == [1]
    for others in ({**logits, "name": "logits", "compiled": 1.0}, {**product, "name": "product", "compiled": 1.0}):
        assert bars_of([check, {**time, "compiled": 3.0}, others])[-1].note == others["name"], "all ops are to be no slower than compiled"
    flux = {"part": "pipelines", "name": "FLUX.1-dev", "bound": 1.0, "seconds": 4.0, "waits": 3}
    graphed = {**flux, "variant": "planner, graphs", "seconds": 2.0, "bound": 2.0}
    pipelines = [{**flux, "variant": "plain", "seconds": 9.0}, {**flux, "variant": "all computed"}]
    for waits, held in ((3, True), (30, False)):
        bars = bars_of([check, *pipelines, {**graphed, "waits": waits}])
        assert [bar.value for bar in bars[3:]] == [1.0, waits - 3] and bars[-1].holds == held
    assert [bar.holds for bar in bars_of([{**check, "error": 1.1, "right": False, "exact": True}])] == [False] * 3


def test_a_step_that_fails_is_a_row(any_machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert")

    monkeypatch.setattr(kernels.Draw, "hidden", broken)  # of an op before, which every later call meets
    row = scheduler_beside((3, 8, 300), any_machine.backend, CPU)
    assert row["name"] == "token_commit, threshold: not run, CUDA error: device-side assert" and row["ratio"] is None
    assert [bar.value for bar in bars_of([{"part": "checks", "error": 0.4, "right": True, "unlike": 0, "exact": True}, row])][3:] == [1]


def test_the_step_beside_it_commits_the_same_tokens(any_machine: Machine) -> None:
    row = scheduler_beside((3, 8, 300), any_machine.backend, CPU)
    assert row["unlike"] == 0 and row["ratio"] == row["eager"] / row["kernel"]


def test_without_a_gpu_the_cpu_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    small = kernels.int8_on_cpu(4, 16, 8, rounds=1)
    monkeypatch.setattr(kernels, "int8_on_cpu", lambda: [{**row, "ratio": 5.5} for row in small])
    assert kernels.run(quick=True, json_path=tmp_path / "kernels.json") == 0
    assert "no CUDA device was found: what needs a GPU is not measured" in capsys.readouterr().err
    read = json.loads((tmp_path / "kernels.json").read_text())
    assert [row["part"] for row in read["rows"]] == ["cpu"] * 2 and read["settings"]["device"] is None
    assert read["bars"][0]["holds"] and "| a grid fixed beforehand |" in report.on_cpu([read])
    # A full run: that of a whole denoiser takes minutes, and has a test of its own at a small size.
    monkeypatch.setattr(kernels, "cached_on_cpu", lambda: {"part": "cpu denoiser", "name": "XL", "float32": 3.0, "int8": 2.0, "ratio": 1.5})
    assert kernels.main([]) == 0
    monkeypatch.setattr(kernels, "int8_on_cpu", lambda: [{**row, "ratio": 4.9} for row in small])
    assert kernels.main([]) == 1


def test_a_gpu_that_runs_no_kernels_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "int8_on_cpu", list)

    def make() -> Kernels:
        raise DriverError("no CUDA driver")

    with pytest.warns(RuntimeWarning), pytest.raises(BenchError, match="no kernel runs here: no CUDA driver"):
        execute(backend=Backend(make, lambda: 0), **SMALL)


def test_a_source_that_does_not_compile_costs_its_own_ops_alone(any_machine: Machine) -> None:
    def image(source: str, again: bool) -> bytes:
        if source == "drift":
            raise CompileError("NVRTC refuses drift.cu")
        return IMAGE

    with pytest.warns(RuntimeWarning):
        found = execute(backend=Backend(lambda: Kernels(Driver(any_machine.path), image), lambda: 0), **SMALL)
    lost = [row["name"] for row in found.rows if "not run" in row["name"]]
    assert lost == ["drift: not run, drift: NVRTC refuses drift.cu"] * 4 and not found.all_hold


def test_an_op_that_fails_costs_no_other_its_result(any_machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(trial: Trial, *rest: Any) -> Any:
        if trial.op == "drift":
            raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")
        return measure(trial, *rest)

    for name, part in (("check", "checks"), ("timed", "times")):
        measure = getattr(kernels, name)
        with monkeypatch.context() as patched:
            patched.setattr(kernels, name, failing)
            found = execute(backend=any_machine.backend, **SMALL)
        rows = [row for row in found.rows if row["part"] == part]
        lost = [row for row in rows if row["name"].startswith("drift")]
        assert {row["name"] for row in lost} == {"drift: not run, CUDA error: an illegal memory access was encountered"}
        assert len(rows) > 3 * len(lost) and not found.all_hold
        assert "drift: not run" in report.on_gpu([found.to_json()])


def test_where_the_compiler_fails_the_rest_is_timed(any_machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no such backend")

    monkeypatch.setattr(torch, "compile", broken)
    rows = execute(backend=any_machine.backend, **{**SMALL, "compiled": True}).rows
    assert all(row["kernel"] > 0 and row["compiled"] is None for row in rows if row["part"] == "times")


TINY: dict[str, dict[str, Any]] = {
    "FLUX.1-dev": {
        "config": {"in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
                   "joint_attention_dim": 24, "pooled_projection_dim": 12, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True},
        "text": (5, 24), "pooled": 12,
    },
    "PixArt-alpha-XL": {
        "config": {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 4, "cross_attention_dim": 32, "sample_size": 8,
                   "caption_channels": 24},
        "text": (5, 24),
    },
    "SD3-medium": {
        "config": {"sample_size": 8, "num_layers": 4, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24,
                   "caption_projection_dim": 32, "pooled_projection_dim": 12, "pos_embed_max_size": 8},
        "text": (5, 24), "pooled": 12,
    },
    "Wan2.1-1.3B": {
        "config": {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 4},
        "text": (5, 16),
    },
}  # fmt: skip


def tiny(name: str) -> Subject:
    """The same pipeline, small."""
    call = {**PIPELINES[name].call, "height": 64, "width": 64, "num_inference_steps": 4}
    return replace(PIPELINES[name], **TINY[name], call={**call, "num_frames": 5} if "num_frames" in call else call)


def test_a_denoiser_in_int8_is_timed_beside_itself() -> None:
    threads = torch.get_num_threads()
    row = kernels.cached_on_cpu(tiny("PixArt-alpha-XL"), side=64, steps=4, rounds=1)
    assert row["part"] == "cpu denoiser" and row["ratio"] == row["float32"] / row["int8"] > 0
    assert row["name"] == "PixArt-alpha-XL, 64 x 64 pixels, 4 steps, every second computed" and torch.get_num_threads() == threads


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_are_timed_in_every_way(name: str) -> None:
    rows = time_pipeline(tiny(name), CPU, compiled=False, rounds=1, speedup=1.1)
    names = [row["variant"] for row in rows if row["variant"] != "cache-dit"]  # wherever it is installed
    assert names == [
        "plain", "all computed", "Delta-DiT", "Delta-DiT, graphs", "Delta-DiT, without kernels",
        "planner", "planner, graphs", "planner, without kernels",
        "planner, int8 state", "planner, int8 state, without kernels",
    ]  # fmt: skip
    assert rows[0]["speedup"] == 1 and all(row["seconds"] > 0 and row["part"] == "pipelines" for row in rows)
    assert rows[0]["bound"] == rows[1]["bound"] == 1 and all(row["bound"] > 1 for row in rows[2:10])
    assert "HASTEN_KERNELS" not in os.environ and all(row["waits"] is None for row in rows)
    assert {row.pop("name") for row in rows} == {name}


def test_a_pipeline_that_cannot_be_timed_costs_no_results(any_machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def large(subject: Subject, device: torch.device, compiled: bool, deadline: float) -> list[dict[str, Any]]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 24 GiB.")

    monkeypatch.setattr(kernels, "time_pipeline", large)
    rows = execute(backend=any_machine.backend, **{**SMALL, "pipelines": ("FLUX.1-dev",)}).rows
    assert rows[-1]["variant"] == "all: not run, CUDA out of memory" and rows[2]["part"] == "checks"
    assert "| FLUX.1-dev | all: not run, CUDA out of memory | not measured |" in report.on_gpu(
        [{"rows": rows, "bars": [], "settings": {"device": "x", "bandwidth": 1e9}}]
    )


def test_what_does_not_fit_in_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tiny("PixArt-alpha-XL")
    built: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setattr(kernel_pipelines, "build", lambda *args: built.append(args))
        (row,) = kernels.pipelines_of(subject, CPU, True, time.monotonic() + 1)
    assert not built and row["variant"].startswith("all: not run, about 30 s are needed")
    monkeypatch.setattr(kernel_pipelines, "BUILDING", 0.0)
    (row,) = kernels.pipelines_of(subject, CPU, True, time.monotonic() + 0.001)
    assert row["variant"].startswith("all: not run, about ") and row["variant"].endswith("s are left") and row["seconds"] is None
    monkeypatch.setattr(kernel_pipelines, "COMPILING", 1e6)
    rows = time_pipeline(subject, CPU, True, time.monotonic() + 1e5, rounds=1, speedup=1.1)
    assert rows[0]["seconds"] > 0 and rows[-1]["variant"].startswith("compiled: not run, about 1000") and rows[-1]["speedup"] is None


def test_waits_between_steps_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch says them; what else is warned of is not counted, nor what is before the first step's end or behind the last's begin."""
    mode = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: "default")
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda wanted: mode.__setitem__(0, wanted))
    scheduler = DDIMScheduler()

    def waits() -> None:
        if mode[0] == "warn":
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at /some/file.cpp:80.)", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)

    def run() -> None:
        waits()
        scheduler.set_timesteps(5)
        for timestep in scheduler.timesteps:
            waits()
            scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
        waits()

    assert synchronisations(run, scheduler, 5, torch.device("cuda")) == 3 and mode == ["default"]
    assert synchronisations(run, scheduler, 5, CPU) is None


@pytest.mark.parametrize("name", PIPELINES)
def test_sizes_are_the_published_ones(name: str) -> None:
    """Parameters, by hand from the checkpoints: billions."""
    import diffusers

    with torch.device("meta"):
        denoiser = getattr(diffusers, PIPELINES[name].transformer)(**PIPELINES[name].config)
    billions = sum(p.numel() for p in denoiser.parameters()) / 1e9
    assert abs(billions - {"FLUX.1-dev": 11.90, "PixArt-alpha-XL": 0.611, "SD3-medium": 2.03, "Wan2.1-1.3B": 1.42}[name]) < 0.03


def test_the_same_words_are_the_same_text() -> None:
    pipe = build(tiny("FLUX.1-dev"), CPU)
    one, same, other = (pipe.encode_prompt(prompt=words)[0] for words in ("a", "a", "b"))
    assert torch.equal(one, same) and not torch.equal(one, other) and one.dtype == torch.bfloat16
    assert next(pipe.transformer.parameters()).dtype == torch.bfloat16 and torch.get_default_dtype() == torch.float32
