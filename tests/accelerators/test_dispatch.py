"""Intercepting single modules and single schedulers: only here, only now, and nothing left behind; compiled blocks stay compiled."""

from __future__ import annotations

import copy
import inspect
import pickle
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.accelerators.caching.runtime import attach
from hasten.accelerators.caching.trace import TraceError
from hasten.accelerators.dispatch import compiled_whole, intercept
from hasten.accelerators.scheduler_hook import hooked
from hasten.pipelines.accelerated import ComputeAll
from tests.accelerators.caching.toys import WIDTH, Loop, guided, randn
from tests.families import FAMILIES, flux_pipeline, run


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def doubling(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return call(*args, **kwargs) * 2


# --------------------------------------------------------------------------------------------------------------- modules


def test_only_the_instance_only_inside_only_this_thread() -> None:
    a, b, x = nn.Identity(), nn.Identity(), torch.ones(1)
    seen: list[float] = []
    with intercept({a: doubling}):
        assert a(x) == 2 and b(x) == 1
        thread = threading.Thread(target=lambda: seen.append(float(a(x))))
        thread.start()
        thread.join()
    assert seen == [1.0] and a(x) == 1
    assert "_compiled_call_impl" not in a.__dict__ and "__call__" not in type(a).__dict__


def test_nesting_and_errors() -> None:
    a, x = nn.Identity(), torch.ones(1)
    with intercept({a: doubling}):
        with pytest.raises(ZeroDivisionError), intercept({a: lambda call, args, kwargs: call(*args, **kwargs) * 5}):
            assert a(x) == 5
            _ = 1 / 0
        assert a(x) == 2
    assert a(x) == 1 and "_compiled_call_impl" not in a.__dict__


def test_two_threads_may_come_and_go_in_any_order() -> None:
    a, x = nn.Identity(), torch.ones(1)
    inside, leave, results = threading.Event(), threading.Event(), []

    def work() -> None:
        with intercept({a: lambda call, args, kwargs: call(*args, **kwargs) * 7}):
            inside.set()
            assert leave.wait(30)
            results.append(float(a(x)))

    with intercept({a: doubling}):
        thread = threading.Thread(target=work)
        thread.start()
        assert inside.wait(30)
        assert a(x) == 2
    assert a(x) == 1
    leave.set()
    thread.join()
    assert results == [7.0] and a(x) == 1 and "_compiled_call_impl" not in a.__dict__


def test_hooks_see_the_call_only_when_it_is_made() -> None:
    a, x, calls = nn.Identity(), torch.ones(1), []
    a.register_forward_hook(lambda *_: calls.append(1))
    with intercept({a: lambda call, args, kwargs: args[0]}):
        a(x)
    assert calls == []
    with intercept({a: doubling}):
        a(x)
    assert calls == [1]


def test_a_copy_of_an_intercepted_module_is_bare() -> None:
    a, x = nn.Linear(1, 1), torch.ones(1)
    with intercept({a: doubling}):
        twin = copy.deepcopy(a)
        again = pickle.loads(pickle.dumps(a))
        assert torch.equal(a(x), 2 * twin(x)) and torch.equal(again(x), twin(x))


def test_a_module_that_is_compiled_meanwhile_stays_compiled() -> None:
    a, x = nn.Linear(1, 1), torch.ones(1)
    with intercept({a: doubling}):
        a.compile(backend="eager")
    compiled = a.__dict__["_compiled_call_impl"]
    assert compiled is not None
    a(x)
    with intercept({a: doubling}):
        assert torch.equal(a(x), 2 * a.forward(x))
    assert a.__dict__["_compiled_call_impl"] is compiled


# --------------------------------------------------------------------------------------------------------------- compile


def compiled_runs(net: nn.Module, calls: list[tuple[tuple[Any, ...], dict[str, Any]]], method: Any, trace: Any = None) -> list[Tensor]:
    out = []
    with attach(net, method, num_inference_steps=len(calls), trace=trace) as session:
        for k, (args, kwargs) in enumerate(calls):
            with session.step(k):
                made = net(*args, **kwargs)
                out.append(made if isinstance(made, Tensor) else made[0])
    assert not session.report.reasons
    return out


@pytest.mark.parametrize("how", ["block.compile()", "torch.compile(block)"])
def test_compiled_blocks_have_no_break_and_are_compiled_once(how: str) -> None:
    torch._dynamo.reset()
    model, inputs = FAMILIES["flux"]()
    calls = [((), inputs(seed)) for seed in range(4)]
    method = hasten.DeltaDiT(interval=2, cached=0.5)
    expected = compiled_runs(model, calls, method)
    plain = [model(*args, **kwargs)[0] for args, kwargs in calls]
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        for i, block in enumerate(blocks):
            if how == "block.compile()":
                block.compile(backend="eager", fullgraph=True)
            else:
                blocks[i] = torch.compile(block, backend="eager", fullgraph=True)
    assert not compiled_whole(model)
    for a, b in zip(compiled_runs(model, calls, method), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    before = dict(torch._dynamo.utils.counters["stats"])
    assert before["unique_graphs"] > 0 and not torch._dynamo.utils.counters["graph_break"]
    for a, b in zip(compiled_runs(model, calls, hasten.DeltaDiT(interval=3, cached=1.0)), plain, strict=True):
        assert a.shape == b.shape
    for a, b in zip(compiled_runs(model, calls, ComputeAll()), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    model(*calls[0][0], **calls[0][1])
    assert dict(torch._dynamo.utils.counters["stats"])["unique_graphs"] == before["unique_graphs"]
    torch._dynamo.reset()


def test_blocks_compiled_by_inductor() -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    net, cond = guided(3), randn(2, 2, 3, WIDTH)
    calls = [((randn(k, 2, 3, WIDTH), float(k), cond), {}) for k in range(4)]
    method = hasten.DeltaDiT(interval=2, cached=0.67)
    expected = compiled_runs(net, calls, method)
    for block in net.blocks:
        block.forward = type(block).offset.__get__(block)  # a pure function: counting calls is no business of a graph
    for i, block in enumerate(net.blocks):
        net.blocks[i] = _Adding(block)
        net.blocks[i].compile(fullgraph=True)
    made = compiled_runs(net, calls, method)
    for a, b in zip(made, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled_runs(net, calls, method)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


class _Adding(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner.forward(x)


def test_a_wholly_compiled_denoiser_is_refused_with_the_reason() -> None:
    for how in range(3):
        pipe, call = flux_pipeline()
        if how == 0:
            pipe.transformer.compile(backend="eager")
        elif how == 1:
            pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        else:
            pipe.transformer.forward = torch.compile(pipe.transformer.forward, backend="eager")
        fast = hasten.accelerate(pipe, hasten.DeltaDiT())
        with pytest.raises(TraceError, match=r"compiled as a whole.*compile_repeated_blocks"):
            run(fast, call)
        with pytest.raises(TraceError, match="compiled as a whole"):
            hasten.trace(pipe.transformer, torch.zeros(1))


# ------------------------------------------------------------------------------------------------------------- schedulers


class Listener:
    def __init__(self) -> None:
        self.heard: list[str] = []
        self.samples: list[Any] = []

    def timesteps_set(self, scheduler: Any) -> None:
        self.heard.append("set")

    def scaled(self, scheduler: Any, timestep: Any) -> None:
        self.heard.append(f"scale {int(timestep)}")

    def stepped(self, scheduler: Any, model_output: Any, sample: Any) -> None:
        self.heard.append("step")
        self.samples.append(sample)


def schedulers() -> list[Any]:
    from diffusers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
        HeunDiscreteScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    )

    kinds = [
        DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler,
        lambda: PNDMScheduler(skip_prk_steps=True), UniPCMultistepScheduler,
    ]  # fmt: skip
    return [kind() for kind in kinds]


@pytest.mark.parametrize("scheduler", schedulers(), ids=lambda s: type(s).__name__)
def test_a_hooked_scheduler_looks_and_acts_the_same(scheduler: Any) -> None:
    kind, x = type(scheduler), randn(1, 1, 4, 4, 4)
    twin = copy.deepcopy(scheduler)
    listener = Listener()
    members = {name for name in dir(scheduler) if not name.startswith("_")}
    with hooked(scheduler, listener):
        assert isinstance(scheduler, kind) and type(scheduler).__name__ == kind.__name__
        for name in ("step", "set_timesteps", "scale_model_input"):
            if hasattr(kind, name):
                assert inspect.signature(getattr(scheduler, name)) == inspect.signature(getattr(twin, name))
        assert {name for name in dir(scheduler) if not name.startswith("_")} == members
        for each in (scheduler, twin):
            each.set_timesteps(3)
        t = scheduler.timesteps[0]
        scaled = hasattr(kind, "scale_model_input")
        if scaled:
            assert torch.equal(scheduler.scale_model_input(x, t), twin.scale_model_input(x, t))
        assert torch.equal(scheduler.step(x, t, x)[0], twin.step(x, t, x)[0])
        scheduler.step(x, scheduler.timesteps[1], sample=2 * x)
        assert json_name(scheduler) == kind.__name__
        copied = copy.deepcopy(scheduler)
        copied.set_timesteps(3)
        copied.step(x, copied.timesteps[0], x)
    assert type(scheduler) is kind
    assert listener.heard == ["set", *([f"scale {int(t)}"] if scaled else []), "step", "step"]
    assert torch.equal(listener.samples[0], x) and torch.equal(listener.samples[1], 2 * x)
    scheduler.set_timesteps(3)
    assert len(listener.samples) == 2


def json_name(scheduler: Any) -> str:
    import json

    return str(json.loads(scheduler.to_json_string())["_class_name"])


def test_listeners_may_come_and_go_in_any_order() -> None:
    from diffusers import DDIMScheduler

    scheduler, first, second = DDIMScheduler(), Listener(), Listener()
    a, b = hooked(scheduler, first), hooked(scheduler, second)
    a.__enter__()
    b.__enter__()
    scheduler.set_timesteps(3)
    a.__exit__(None, None, None)
    scheduler.set_timesteps(3)
    b.__exit__(None, None, None)
    assert type(scheduler) is DDIMScheduler
    scheduler.set_timesteps(3)
    assert (first.heard, second.heard) == (["set"], ["set", "set"])


def test_a_copy_made_while_hooked_can_be_hooked_itself() -> None:
    from diffusers import DDIMScheduler

    scheduler, first, second = DDIMScheduler(), Listener(), Listener()
    with hooked(scheduler, first):
        twin = copy.deepcopy(scheduler)
        with hooked(twin, second):
            twin.set_timesteps(3)
        assert type(twin) is DDIMScheduler
    assert (first.heard, second.heard) == ([], ["set"])


def test_a_step_that_fails_is_no_step_and_the_class_comes_back() -> None:
    from diffusers import DDIMScheduler

    scheduler, listener = DDIMScheduler(), Listener()
    with pytest.raises(ValueError, match="set_timesteps"), hooked(scheduler, listener):
        scheduler.step(torch.zeros(1), 1, torch.zeros(1))
    assert type(scheduler) is DDIMScheduler and listener.heard == []


def test_a_scheduler_shared_by_overlapping_pipelines_keeps_its_class() -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler()
    loop, other = Loop(guided(), scheduler), Loop(guided(seed=9), scheduler)
    fast, rival = (hasten.accelerate(each, hasten.DeltaDiT()) for each in (loop, other))
    call: dict[str, Any] = {"latents": randn(1, 2, 3, WIDTH), "cond": [randn(2, 2, 3, WIDTH)]}
    expected = fast(**call)

    def whole_other_run(_: Any, i: int) -> None:
        if i == 5:
            rival(**call)

    assert torch.equal(fast(**call, on_step=whole_other_run), expected)
    assert type(scheduler) is DDIMScheduler
    assert np.array_equal(rival.report.plan.actions, rival.report.planned.actions)
