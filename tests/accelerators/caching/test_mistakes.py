"""The mistakes that other caching projects made, each held against every pipeline to which it applies."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.accelerators.caching.compose import Composed
from hasten.accelerators.caching.plan import Plan, PlanError
from hasten.accelerators.caching.runtime import attach
from hasten.pipelines.accelerated import ComputeAll
from tests.accelerators.caching.toys import WIDTH, Loop, Toy, guided, randn
from tests.families import FAMILIES, PIPELINES, flux_pipeline, lumina2_pipeline, pixart_pipeline, run, sd3_pipeline

METHODS = {
    "delta-dit": hasten.DeltaDiT(interval=2, cached=0.6),
    "forecast": hasten.Forecast(interval=2, order=1, start=1),
    "fora": hasten.FORA(interval=2),
    "first-block": hasten.FirstBlock(threshold=1e9, warmup=1),
    "teacache": hasten.TeaCache(threshold=100.0),
    "skip-guidance": Composed((hasten.Forecast(interval=2, start=1), hasten.SkipGuidance(interval=2, start=1))),
}
"""Every rule and every decider, the latter set to reuse what they may; what needs calibration is carried out as a plan of the same kind."""
every_pipeline = pytest.mark.parametrize("name", PIPELINES)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Any:
    return METHODS[request.param]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def on_step(name: str, act: Callable[[Any, int], dict[str, Tensor] | None], **options: Any) -> dict[str, Any]:
    """The arguments that make a pipeline call `act(pipe, i)` after step i."""
    if name == "pixart":
        return {"callback": lambda i, t, latents: act(None, i)}
    return {"callback_on_step_end": lambda pipe, i, t, given: act(pipe, i) or {}, **options}


def smaller(name: str, call: dict[str, Any]) -> dict[str, Any]:
    """The call at half the resolution."""
    latents = call["latents"]
    latents = latents[:, :4] if latents.ndim == 3 else latents[..., :4, :4]
    control = {"control_image": call["control_image"][..., :32, :32]} if "control_image" in call else {}
    return {**call, **control, "height": 32, "width": 32, "latents": latents.contiguous()}


def clean(module: nn.Module) -> bool:
    return all("_compiled_call_impl" not in m.__dict__ and "cache_context" not in m.__dict__ for m in module.modules())


def hooked_class(scheduler: Any) -> bool:
    return "_hasten_hook" in type(scheduler).__dict__


# --------------------------------------------------------------------------------------------------------- run identity


@every_pipeline
def test_the_same_call_twice_gives_the_same_image(name: str, method: Any) -> None:
    pipe, call = PIPELINES[name]()
    fast = hasten.accelerate(pipe, method)
    first, plan = run(fast, call), fast.report.plan
    other = run(fast, call, latents=call["latents"].flip(-1))
    assert torch.equal(run(fast, call), first)
    assert not torch.equal(other, first)
    assert fast.report.plan == plan
    assert not fast.report.reasons


@every_pipeline
def test_a_second_pipeline_of_the_same_class(name: str, method: Any) -> None:
    (one, call), (two, _) = PIPELINES[name](), PIPELINES[name]()
    with torch.no_grad():
        for p in two.transformer.parameters():
            p.mul_(0.9)
    plain = run(two, call)
    alone = run(hasten.accelerate(two, method), call)
    fast_one, fast_two = hasten.accelerate(one, method), hasten.accelerate(two, method)
    first = run(fast_one, call)
    assert torch.equal(run(fast_two, call), alone)
    assert torch.equal(run(fast_one, call), first)
    assert torch.equal(run(two, call), plain)
    assert type(one).__dict__.keys() == type(two).__dict__.keys()
    assert clean(one.transformer) and clean(two.transformer)


@every_pipeline
def test_two_wrappers_on_one_transformer(name: str, method: Any) -> None:
    pipe, call = PIPELINES[name]()
    plain = run(pipe, call)
    slow, quick = hasten.accelerate(pipe, method), hasten.accelerate(pipe, hasten.DeltaDiT(interval=3, cached=1.0))
    first = run(slow, call), run(quick, call)
    assert not torch.equal(*first)
    assert torch.equal(run(slow, call), first[0])
    assert torch.equal(run(quick, call), first[1])
    assert torch.equal(run(pipe, call), plain)


@pytest.mark.parametrize("other", ["plain", "accelerated"])
@pytest.mark.parametrize("name", ["pixart", "sd3", "flux", "wan", "lumina2"])
def test_two_overlapping_runs_on_one_transformer(name: str, other: str, method: Any) -> None:
    """A begins, B begins in another thread, A ends, B ends: neither sees the other, and nothing is left behind."""
    pipe, call = PIPELINES[name]()
    second, _ = PIPELINES[name]()
    second.register_modules(transformer=pipe.transformer)
    fast = hasten.accelerate(pipe, method)
    rival = second if other == "plain" else hasten.accelerate(second, hasten.DeltaDiT(interval=3, cached=1.0))
    theirs = {**call, "latents": call["latents"].flip(-1)}
    expected, expected_rival = run(fast, call), run(rival, theirs)
    half_way, done = threading.Event(), threading.Event()
    result: list[Any] = []

    def wait_for_the_first(_: Any, i: int) -> None:
        if i == 2:
            half_way.set()
            assert done.wait(60)

    def work() -> None:
        try:
            result.append(rival(**theirs, **on_step(name, wait_for_the_first))[0])
        except BaseException as error:
            result.append(error)
            half_way.set()

    thread = threading.Thread(target=work)

    def begin_the_second(_: Any, i: int) -> None:
        if i == 1:
            thread.start()
            assert half_way.wait(60)

    try:
        mine = fast(**call, **on_step(name, begin_the_second))[0]
    finally:
        done.set()
        thread.join(60)
    assert torch.equal(mine, expected)
    assert isinstance(result[0], Tensor), result[0]
    assert torch.equal(result[0], expected_rival)
    assert clean(pipe.transformer)


@every_pipeline
def test_a_run_aborted_by_an_exception(name: str, method: Any) -> None:
    pipe, call = PIPELINES[name]()
    fast = hasten.accelerate(pipe, method)
    expected, small = run(fast, call), run(fast, smaller(name, call))

    def stop(_: Any, i: int) -> None:
        if i == 2:
            raise KeyboardInterrupt

    for changed in (call, smaller(name, call)):
        with pytest.raises(KeyboardInterrupt):
            fast(**changed, **on_step(name, stop))
        assert clean(pipe.transformer) and not hooked_class(pipe.scheduler)
        assert "the run ended after 3 of 6 steps" in "".join(fast.report.warnings)
        assert torch.equal(run(fast, smaller(name, call)), small)
        assert not fast.report.warnings and not fast.report.reasons
        with pytest.raises(KeyboardInterrupt):
            fast(**changed, **on_step(name, stop))
        assert torch.equal(run(fast, call), expected)


@pytest.mark.parametrize("name", ["sd3", "flux", "flux_control", "wan"])
def test_a_run_ended_by_the_interrupt_flag(name: str, method: Any) -> None:
    pipe, call = PIPELINES[name]()
    fast = hasten.accelerate(pipe, method)
    expected = run(fast, call)
    plan = fast.report.plan

    def interrupt(pipe: Any, i: int) -> None:
        pipe._interrupt = i == 2

    torch.manual_seed(0)
    assert not torch.equal(fast(**call, **on_step(name, interrupt))[0], expected)
    report = fast.report
    assert len(report.step_seconds) == 3
    assert np.array_equal(report.plan.actions[:3], plan.actions[:3]) and not report.plan.actions[3:].any()
    assert any("ended after 3 of 6 steps" in warning for warning in report.warnings)
    assert torch.equal(run(fast, smaller(name, call)), run(hasten.accelerate(pipe, method), smaller(name, call)))
    assert torch.equal(run(fast, call), expected)


@every_pipeline
def test_a_batch_mate_changes_nothing(name: str, method: Any) -> None:
    pipe, call = PIPELINES[name]()
    fast = hasten.accelerate(pipe, method)
    tensors = [key for key in call if key.endswith(("latents", "embeds", "mask")) and isinstance(call[key], Tensor)]
    mate = {key: call[key] if key.endswith("mask") else call[key].flip(-1) * 1.3 for key in tensors}
    control = {"control_image": torch.cat([call["control_image"]] * 2)} if "control_image" in call else {}
    both = run(fast, call, **{key: torch.cat([call[key], mate[key]]) for key in tensors}, **control)
    if name == "flux_control":
        pytest.skip("the pipeline draws the control latents for the batch as a whole: the inputs themselves depend on the batch")
    for row, given in enumerate((call, {**call, **mate})):
        alone = run(fast, given)
        assert (both[row : row + 1] - alone).norm() <= 1e-5 * alone.norm()


# -------------------------------------------------------------------------------------------------------------- guidance


def test_guidance_layouts(method: Any) -> None:
    expected = {
        "pixart": (("branch0",), "batched x2"),
        "sd3": (("branch0",), "batched x2"),
        "flux": (("cond",), "single"),  # guidance-distilled
        "flux_control": (("branch0",), "single"),
        "wan": (("cond", "uncond"), "2 calls"),
        "lumina2": (("branch0", "branch1"), "2 calls"),
    }
    for name, (branches, layout) in expected.items():
        pipe, call = PIPELINES[name]()
        fast = hasten.accelerate(pipe, method)
        run(fast, call)
        assert fast.report.plan.branches == branches, name
        assert fast.report.plan.facts["guidance"] == layout, name


@pytest.mark.parametrize("inference", [False, True])
def test_guidance_in_two_calls_keeps_the_branches_apart(inference: bool) -> None:
    """Fixed latents for every step: each branch must give what it gives when it runs alone, whatever the other does."""
    net = guided()
    conds = [randn(70 + b, 2, 3, WIDTH) for b in range(3)]
    latents = randn(80, 8, 2, 3, WIDTH)
    # Branch 1 pauses, the order changes, and one branch ends before the run does.
    calls = [[0, 1, 2], [0, 1, 2], [2, 0], [1, 0], [0, 1], [1], [0, 1], [1, 0]]
    plan_rows = hasten.DeltaDiT(interval=3, cached=0.75)
    with torch.inference_mode(inference):
        trace = hasten.trace(net, latents[0], 0.0, conds[0])
        out: dict[tuple[int, int], Tensor] = {}
        with attach(net, plan_rows, num_inference_steps=8, trace=trace) as session:
            for k, order in enumerate(calls):
                with session.step(k):
                    for b in order:
                        out[k, b] = net(latents[k], float(k), conds[b])
        assert session.report.plan is not None
        assert session.report.plan.branches == ("branch0", "branch1", "branch2")
        for b in range(3):
            with attach(net, plan_rows, num_inference_steps=8, trace=trace) as alone:
                for k, order in enumerate(calls):
                    if b in order:
                        with alone.step(k):
                            assert torch.equal(net(latents[k], float(k), conds[b]), out[k, b])


def test_guidance_against_the_same_prompt(method: Any) -> None:
    """Equal prompts in two tensors are told apart by identity. One tensor for both: nobody can tell the calls apart."""
    pipe, call = lumina2_pipeline()
    fast = hasten.accelerate(pipe, method)
    run(fast, call, negative_prompt_embeds=call["prompt_embeds"].clone())
    assert not fast.report.reasons and fast.report.computed_fraction < 1
    net, cond, x = guided(), randn(2, 2, 3, WIDTH), randn(1, 2, 3, WIDTH)
    with attach(net, hasten.DeltaDiT(interval=2, cached=1.0), num_inference_steps=2) as session:
        for k in range(2):
            with session.step(k):
                for _ in range(2):
                    net(x, float(k), cond)
    assert session.report.computed_fraction == 1.0
    assert any("same conditioning" in reason for reason in session.report.reasons)


@pytest.mark.parametrize("ratio", [0.34, 0.5, 0.67])
def test_guidance_in_two_calls_ends_part_way(ratio: float, method: Any) -> None:
    pipe, call = lumina2_pipeline()
    fast = hasten.accelerate(pipe, method)
    made = run(fast, call, cfg_trunc_ratio=ratio)
    report = fast.report
    planned, executed = report.planned.blocks.branch("branch0"), report.plan.blocks
    guided_steps = int(6 * ratio)
    assert np.array_equal(executed.branch("branch0"), planned)
    called = [k for k in range(guided_steps) if not report.plan.skips[k]]
    assert np.array_equal(executed.branch("branch1")[called], planned[called])
    assert not executed.branch("branch1")[guided_steps:].any()
    assert not report.reasons
    plain = run(pipe, call, cfg_trunc_ratio=ratio)
    assert torch.equal(run(hasten.accelerate(pipe, ComputeAll()), call, cfg_trunc_ratio=ratio), plain)
    assert 0 < (made - plain).norm() < 0.1 * plain.norm()


def test_guidance_in_one_batch_is_switched_off_part_way() -> None:
    pipe, call = sd3_pipeline()

    def switch_off(pipe: Any, i: int) -> dict[str, Tensor] | None:
        if i != 2:
            return None
        pipe._guidance_scale = 1.0
        return {"prompt_embeds": call["prompt_embeds"], "pooled_prompt_embeds": call["pooled_prompt_embeds"]}

    options = on_step("sd3", switch_off)
    plain = run(pipe, call, **options)
    assert torch.equal(run(hasten.accelerate(pipe, ComputeAll()), call, **options), plain)
    fast = hasten.accelerate(pipe, METHODS["delta-dit"])
    made = run(fast, call, **options)
    assert 0 < (made - plain).norm() < 0.1 * plain.norm()
    assert any("batch [1]" in reason for reason in fast.report.reasons)
    # Step 3 is the first without guidance: what is stored belongs to another batch.
    assert fast.report.plan.branches == ("branch0", "branch1")
    assert not fast.report.plan.branch("branch1")[3].any()
    assert np.array_equal(fast.report.plan.branch("branch1")[5], fast.report.planned.actions[5, :, 0])
    replay = hasten.accelerate(pipe, fast.report.plan)
    assert torch.equal(run(replay, call, **options), made)


def test_skip_layer_guidance_is_a_branch_with_its_own_blocks() -> None:
    pipe, call = sd3_pipeline()
    options = {"skip_guidance_layers": [1, 3], "skip_layer_guidance_stop": 0.9, "num_inference_steps": 8}
    plain = run(pipe, call, **options)
    assert torch.equal(run(hasten.accelerate(pipe, ComputeAll(), force_store=True), call, **options), plain)
    fast = hasten.accelerate(pipe, hasten.DeltaDiT(interval=2, cached=1.0))
    made = run(fast, call, **options)
    plan = fast.report.plan
    assert plan.branches == ("branch0", "branch1")
    assert 0 < (made - plain).norm() < 0.2 * plain.norm()
    assert np.array_equal(plan.branch("branch0"), fast.report.planned.branch("*"))
    left_out = [site for site, path in enumerate(plan.sites) if path in ("transformer_blocks.1", "transformer_blocks.3")]
    assert not plan.branch("branch1")[1].any()  # its first call: nothing is stored yet
    assert plan.branch("branch1")[3].sum() == len(plan.sites) - len(left_out)


def test_a_span_of_which_some_blocks_are_left_out_by_hand() -> None:
    model, inputs = FAMILIES["sd3"]()
    x = inputs(1)
    for skipped in ([1], [4], [0, 2], [3, 4]):
        plain = model(**x, skip_layers=skipped)[0]
        with attach(model, hasten.DeltaDiT(interval=2, cached=1.0), num_inference_steps=2) as session:
            for k in range(2):
                with session.step(k):
                    out = model(**x, skip_layers=skipped)[0]
        torch.testing.assert_close(out, plain, rtol=0, atol=2e-5)
        assert not session.report.reasons


# --------------------------------------------------------------------------------------------------- schedulers and steps


@pytest.mark.parametrize("scale", [False, True], ids=["told by the timestep", "told by scale_model_input"])
@pytest.mark.parametrize("begin", [0, 2, 5])
def test_image_to_image_without_a_begin_index(begin: int, scale: bool, method: Any) -> None:
    from diffusers import DDIMScheduler

    loop = Loop(guided(), DDIMScheduler(clip_sample=False))
    fast = hasten.accelerate(loop, method)
    call: dict[str, Any] = {"latents": randn(1, 2, 3, WIDTH), "cond": [randn(2, 2, 3, WIDTH)], "begin": begin, "scale": scale}
    plain = loop(**call)
    assert torch.equal(hasten.accelerate(loop, ComputeAll())(**call), plain)
    fast(**call)
    assert fast.report.plan.steps == 6 - begin
    assert len(fast.report.plan.facts["sigmas"]) == 6 - begin
    assert np.array_equal(fast.report.plan.blocks.actions, method.plan(fast.trace, 6 - begin).blocks.actions)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_image_to_image_with_a_begin_index(strength: float, method: Any) -> None:
    from diffusers import AutoencoderKL, StableDiffusion3Img2ImgPipeline

    base, call = sd3_pipeline()
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=2, shift_factor=0.0)
    pipe = StableDiffusion3Img2ImgPipeline(**{**base.components, "vae": vae, "image_encoder": None, "feature_extractor": None})
    pipe.set_progress_bar_config(disable=True)
    call = {key: value for key, value in call.items() if key not in ("latents", "height", "width")}
    call |= {"image": randn(5, 1, 4, 8, 8), "strength": strength, "height": 8, "width": 8}
    plain = run(pipe, call)
    assert torch.equal(run(hasten.accelerate(pipe, ComputeAll()), call), plain)
    fast = hasten.accelerate(pipe, method)
    run(fast, call)
    assert fast.report.plan.steps == 6 * strength
    assert np.array_equal(fast.report.plan.actions, method.plan(fast.trace, int(6 * strength)).actions)
    assert not fast.report.reasons and not fast.report.warnings


def heun(name: str) -> tuple[Any, dict[str, Any]]:
    from diffusers import FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler

    if name == "pixart":
        return pixart_pipeline(HeunDiscreteScheduler())
    return PIPELINES[name](FlowMatchHeunDiscreteScheduler())


@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_both_calls_of_a_second_order_step_share_a_row(name: str, method: Any) -> None:
    pipe, call = heun(name)
    plain = run(pipe, call)
    assert torch.equal(run(hasten.accelerate(pipe, ComputeAll(), force_store=True), call), plain)
    fast = hasten.accelerate(pipe, method)
    made = run(fast, call)  # traces as well
    computed: list[int] = []
    last = pipe.transformer.get_submodule(fast.report.plan.blocks.sites[-1])
    hook = last.register_forward_hook(lambda *_: computed.append(1))
    assert torch.equal(run(fast, call), made)
    hook.remove()
    report = fast.report
    assert report.plan.steps == 6 and report.plan.facts["order"] == 2
    assert not report.reasons and not report.warnings
    assert np.array_equal(report.plan.actions, report.planned.actions)
    per_row = [2] * 5 + [1]
    assert len(computed) == sum(n for n, action in zip(per_row, report.plan.blocks.actions[:, -1, 0], strict=True) if action == 0)
    assert 0 < (made - plain).norm() < 0.2 * plain.norm()


def test_pndm_has_a_row_for_every_timestep(method: Any) -> None:
    from diffusers import PNDMScheduler

    pipe, call = pixart_pipeline(PNDMScheduler(skip_prk_steps=True))
    fast = hasten.accelerate(pipe, method)
    run(fast, call)
    assert fast.report.plan.steps == 7
    assert not fast.report.reasons and not fast.report.warnings
    assert torch.equal(run(hasten.accelerate(pipe, ComputeAll()), call), run(pipe, call))


def test_copies_of_the_scheduler_do_not_advance_the_step(method: Any) -> None:
    from diffusers import DDIMScheduler

    def use_a_copy(loop: Loop, i: int) -> None:
        twin = copy.deepcopy(loop.scheduler)
        twin.set_timesteps(6)
        twin.step(torch.zeros(1), twin.timesteps[0], torch.zeros(1))

    loop = Loop(guided(), DDIMScheduler(clip_sample=False))
    fast = hasten.accelerate(loop, method)
    call = {"latents": randn(1, 2, 3, WIDTH), "cond": [randn(2, 2, 3, WIDTH)]}
    expected = fast(**call)
    assert torch.equal(fast(**call, on_step=use_a_copy), expected)
    assert np.array_equal(fast.report.plan.blocks.actions, fast.report.planned.blocks.actions)


def test_a_handover_to_another_denoiser_counts_as_no_history() -> None:
    from diffusers import DDIMScheduler

    loop = Loop(guided(seed=0), DDIMScheduler(clip_sample=False), guided(seed=50))
    fast = hasten.accelerate(loop, hasten.DeltaDiT(interval=3, cached=1.0, boundary=0.0))
    call: dict[str, Any] = {"latents": randn(1, 2, 3, WIDTH), "cond": [randn(2, 2, 3, WIDTH), randn(3, 2, 3, WIDTH)], "handover": 2}
    plain = loop(**call)
    assert torch.equal(hasten.accelerate(loop, ComputeAll())(**call), plain)
    made = fast(**call)
    assert torch.equal(fast(**call), made)
    first, second = fast.reports["transformer"], fast.reports["transformer_2"]
    assert [int(row.any()) for row in first.plan.actions[:, :, 0]] == [0, 1, 0, 0, 0, 0]
    # Step 2 says reuse, but this denoiser has not run yet.
    assert [int(row.any()) for row in second.plan.actions[:, :, 0]] == [0, 0, 0, 0, 1, 1]
    assert sum(second.reasons.values()) == 2 and all("nothing is stored" in reason for reason in second.reasons)
    assert first.plan.facts["guidance"] == second.plan.facts["guidance"] == "2 calls"
    alone = hasten.accelerate(loop, hasten.DeltaDiT(interval=3, cached=1.0, boundary=0.0), denoiser="transformer_2")
    alone(**call)
    assert list(alone.reports) == ["transformer_2"]
    assert np.array_equal(alone.report.plan.actions, second.plan.actions)


def test_a_pipeline_that_samples_twice_in_one_call(method: Any) -> None:
    from diffusers import DDIMScheduler

    loop = Loop(guided(), DDIMScheduler(clip_sample=False))
    call: dict[str, Any] = {"latents": randn(1, 2, 3, WIDTH), "cond": [randn(2, 2, 3, WIDTH)]}
    fast = hasten.accelerate(loop, method)
    once = fast(**call)
    assert torch.equal(fast(**call, rounds=2), fast(**{**call, "latents": once}))
    fast(**call, rounds=2)
    assert any("more than once" in warning for warning in fast.report.warnings)
    assert np.array_equal(fast.report.plan.blocks.actions, fast.report.planned.blocks.actions)


def test_going_back_in_a_loop_of_ones_own_forgets() -> None:
    net, conds, x = guided(), [randn(2, 2, 3, WIDTH), randn(3, 2, 3, WIDTH)], randn(1, 4, 2, 3, WIDTH)
    method = hasten.DeltaDiT(interval=4, cached=1.0)

    def sample(session: Any, cond: Tensor) -> list[Tensor]:
        out = []
        for k in range(4):
            with session.step(k):
                out.append(net(x[k], float(k), cond))
        return out

    alone = []
    for cond in conds:
        with attach(net, method, num_inference_steps=4) as session:
            alone.append(sample(session, cond))
    with attach(net, method, num_inference_steps=4) as session:
        both = [sample(session, cond) for cond in conds]
    for a, b in zip(alone, both, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not session.report.reasons


def test_going_back_to_a_step_that_reuses_computes_it() -> None:
    net, cond, x = guided(), randn(2, 2, 3, WIDTH), randn(1, 2, 3, WIDTH)
    with attach(net, hasten.DeltaDiT(interval=4, cached=1.0), num_inference_steps=4) as session:
        for k in (0, 1, 2, 1, 2):
            with session.step(k):
                out = net(x, float(k), cond)
    torch.testing.assert_close(out, net(x, 0.0, cond), rtol=0, atol=4e-6)
    assert dict(session.report.reasons) == {"blocks.0 to blocks.3: nothing is stored for it yet": 1}


def test_a_loop_that_never_says_the_step(method: Any) -> None:
    net = guided()
    with attach(net, method, num_inference_steps=4) as session:
        for k in range(4):
            net(randn(k, 2, 3, WIDTH), float(k), randn(9, 2, 3, WIDTH))
    assert session.report.computed_fraction == 1.0
    assert any("never entered" in warning for warning in session.report.warnings)


# -------------------------------------------------------------------------------------------------- changes in a run


@pytest.mark.parametrize("name", ["sd3", "flux", "wan", "lumina2"])
def test_a_prompt_that_is_changed_during_the_run(name: str) -> None:
    pipe, call = PIPELINES[name]()

    def change(pipe: Any, i: int) -> dict[str, Tensor] | None:
        if i != 2:
            return None
        new = -call["prompt_embeds"]
        return {"prompt_embeds": torch.cat([call["negative_prompt_embeds"], new]) if name == "sd3" else new}

    fast = hasten.accelerate(pipe, METHODS["delta-dit"])
    run(fast, call)
    assert fast.report.plan.actions[3].any()
    run(fast, call, **on_step(name, change))
    assert all("the conditioning changed" in reason for reason in fast.report.reasons)
    plan, planned = fast.report.plan.actions, fast.report.planned.actions[:, :, 0]
    assert not plan[3, :, 0].any()
    assert np.array_equal(np.delete(plan[:, :, 0], 3, 0), np.delete(planned, 3, 0))
    for other in range(1, plan.shape[2]):  # the negative prompt is what it was
        assert np.array_equal(plan[:, :, other], planned)


def test_a_forecast_never_mixes_offsets_of_two_prompts() -> None:
    """It waits until it has enough of the new one's."""
    pipe, call = PIPELINES["flux"]()
    fast = hasten.accelerate(pipe, METHODS["forecast"])
    run(fast, call, **on_step("flux", lambda pipe, i: {"prompt_embeds": -call["prompt_embeds"]} if i == 2 else None))
    assert fast.report.plan.actions[:, :, 0].any(1).tolist() == [False, True, False, False, False, False]
    assert {reason.partition(": ")[2] for reason in fast.report.reasons} == {
        "the conditioning changed since the offsets were stored", "nothing is stored for it yet"
    }  # fmt: skip


def test_an_adapter_scale_that_is_changed_during_the_run() -> None:
    net, cond, x = guided(), randn(2, 2, 3, WIDTH), randn(1, 6, 2, 3, WIDTH)
    with attach(net, hasten.DeltaDiT(interval=6, cached=1.0), num_inference_steps=6) as session:
        for k, scale in enumerate([1.0, 1.0, 1.0, 0.5, 0.5, 0.5]):
            with session.step(k):
                out = net(x[k], float(k), cond, scale=scale)
            start = x[k] + 0.5 * scale * cond.mean(1, keepdim=True)
            if k in (0, 3):
                end = start
                for block in net.blocks:
                    end = block(end)
                offset = end - start
                assert torch.equal(out, end * 0.5)
            else:  # the offset is that of the last step with this scale
                assert torch.equal(out, (start + offset) * 0.5)
    assert session.report.plan is not None
    assert [int(row.all()) for row in session.report.plan.actions[:, :, 0]] == [0, 1, 1, 0, 1, 1]
    assert all("conditioning changed" in reason for reason in session.report.reasons)


def test_a_batch_that_shrinks_during_the_run() -> None:
    """The conditioning has no batch, so the calls look alike: the shapes tell."""

    class Net(Toy):
        def forward(self, x: Tensor, table: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x + table)

    net = Net(list(guided().blocks))
    table, x = randn(3, 3, WIDTH), randn(1, 6, 4, 3, WIDTH)
    with attach(net, hasten.DeltaDiT(interval=6, cached=1.0), num_inference_steps=6) as session:
        for k in range(6):
            rows = 4 if k < 3 else 2
            with session.step(k):
                out = net(x[k, :rows], table)
            if k == 3:
                expected = Toy(list(net.blocks))(x[k, :rows] + table)
                assert torch.equal(out, expected)
    assert session.report.plan is not None
    assert [int(row.all()) for row in session.report.plan.actions[:, :, 0]] == [0, 1, 1, 0, 1, 1]
    assert any("batch" in reason for reason in session.report.reasons)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_computed_again(value: float) -> None:
    net, cond, x = guided(), randn(2, 2, 3, WIDTH), randn(1, 2, 3, WIDTH)
    plain = net(x, 0.0, cond)
    trace = hasten.trace(net, x, 0.0, cond)
    spoil = True

    def damage(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        if not spoil:
            return None
        out = out.clone()
        out.view(-1)[0] = value
        return out

    hook = net.blocks[1].register_forward_hook(damage)
    outputs = []
    with attach(net, hasten.DeltaDiT(interval=4, cached=1.0), num_inference_steps=4, trace=trace) as session:
        for k in range(4):
            spoil = k == 0
            with session.step(k):
                outputs.append(net(x, float(k), cond))
    hook.remove()
    assert not torch.isfinite(outputs[0]).all()
    assert torch.equal(outputs[1], plain)
    for out in outputs[2:]:
        torch.testing.assert_close(out, plain, rtol=0, atol=4e-6)
    assert session.report.plan is not None
    assert [int(row.all()) for row in session.report.plan.actions[:, :, 0]] == [0, 0, 1, 1]
    assert any("not finite" in reason for reason in session.report.reasons)


def test_nan_checks_can_be_turned_off() -> None:
    net, cond, x = guided(), randn(2, 2, 3, WIDTH), randn(1, 2, 3, WIDTH)
    x[0, 0, 0] = float("nan")
    with attach(net, hasten.DeltaDiT(interval=2, cached=1.0), num_inference_steps=2, nan_check="off") as session:
        for k in range(2):
            with session.step(k):
                net(x, float(k), cond)
    assert not session.report.reasons and session.report.computed_fraction == 0.5


# ------------------------------------------------------------------------------------------------------------- adapters


def test_lora_loaded_after_the_wrapper_was_made(method: Any) -> None:
    from peft import LoraConfig

    pipe, call = sd3_pipeline()
    fast = hasten.accelerate(pipe, method)
    before = run(fast, call)
    plan = fast.report.plan
    torch.manual_seed(1)
    fast.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    plain = run(pipe, call)
    assert torch.equal(run(hasten.accelerate(pipe, ComputeAll()), call), plain)
    made = run(fast, call)
    assert not torch.equal(made, before)
    assert torch.equal(made, run(hasten.accelerate(pipe, method), call))
    assert not fast.report.reasons
    # Delta-DiT needs no calibration, so its saved plan says nothing of weights: it still fits.
    assert torch.equal(run(hasten.accelerate(pipe, plan), call), made)


def test_a_transformer_that_was_replaced_is_traced_anew(method: Any) -> None:
    pipe, call = flux_pipeline()
    fast = hasten.accelerate(pipe, method)
    run(fast, call)
    old = fast.trace
    other, _ = flux_pipeline()
    other.transformer.single_transformer_blocks = other.transformer.single_transformer_blocks[:2]
    fast.transformer = other.transformer
    assert pipe.transformer is other.transformer
    made = run(fast, call)
    assert len(fast.trace.sites) == 5 != len(old.sites)
    assert torch.equal(made, run(hasten.accelerate(other, method), call))


# ------------------------------------------------------------------------------------------------- plans that do not fit


def test_a_plan_for_other_steps_another_scheduler_another_model(monkeypatch: pytest.MonkeyPatch, method: Any) -> None:
    from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler

    pipe, call = pixart_pipeline()
    fast = hasten.accelerate(pipe, method)
    run(fast, call, num_inference_steps=20)
    plan = fast.report.plan
    replay = hasten.accelerate(pipe, plan)
    with pytest.raises(PlanError, match="the plan has 20 steps, this run has 25"):
        run(replay, call, num_inference_steps=25)
    assert clean(pipe.transformer) and not hooked_class(pipe.scheduler)
    for scheduler in (DPMSolverMultistepScheduler(), HeunDiscreteScheduler()):
        other, _ = pixart_pipeline(scheduler)
        with pytest.raises(PlanError, match="scheduler 'DDIMScheduler', this run has"):
            run(hasten.accelerate(other, plan), call, num_inference_steps=20)
    wrong, theirs = sd3_pipeline()
    with pytest.raises(PlanError, match="model 'PixArtTransformer2DModel', this run has 'SD3Transformer2DModel'"):
        run(hasten.accelerate(wrong, plan), theirs, num_inference_steps=20)


def test_a_plan_for_another_guidance_layout(tmp_path: Any, method: Any) -> None:
    """Refused after the first step, which no plan can reuse anything in."""
    for make, unguided in ((pixart_pipeline, {"guidance_scale": 1.0}), (lumina2_pipeline, {"guidance_scale": 1.0})):
        pipe, call = make()
        fast = hasten.accelerate(pipe, method)
        run(fast, call)
        fast.report.plan.save(tmp_path / "plan.safetensors")
        replay = hasten.accelerate(pipe, Plan.load(tmp_path / "plan.safetensors"))
        with pytest.raises(PlanError, match=r"the plan is for guidance '(batched x2|2 calls)', this run has 'single'"):
            run(replay, call, **unguided)
        assert replay.report.computed_fraction == 1.0
        assert clean(pipe.transformer) and not hooked_class(pipe.scheduler)


def test_branches_are_matched_by_name_and_else_by_order() -> None:
    net, conds, x = guided(), [randn(70 + b, 2, 3, WIDTH) for b in range(3)], randn(1, 2, 3, WIDTH)
    trace = hasten.trace(net, x, 0.0, conds[0])
    actions = np.zeros((2, 4, 2), np.uint8)
    actions[1, :2, 0], actions[1, 2:, 1] = 1, 1

    def execute(plan: Plan, branches: int) -> Any:
        with attach(net, plan, num_inference_steps=2, trace=trace) as session:
            for k in range(2):
                with session.step(k):
                    for cond in conds[:branches]:
                        net(x, float(k), cond)
        return session.report

    for names in (("cond", "uncond"), ("branch0", "branch1")):
        report = execute(Plan(actions, trace.sites, names), 2)
        assert np.array_equal(report.plan.actions, actions)
        assert not report.warnings
    report = execute(Plan(actions, trace.sites, ("branch1", "branch0")), 2)
    assert np.array_equal(report.plan.actions, actions[:, :, ::-1])
    report = execute(Plan(actions, trace.sites, ("cond", "uncond")), 3)
    assert np.array_equal(report.plan.actions[:, :, 2], actions[:, :, 0])
    assert report.warnings == ["the plan knows the guidance branches cond, uncond; branch2 follows cond"]
    report = execute(Plan(actions, trace.sites, ("cond", "uncond")), 1)
    assert report.warnings == ["the plan has the guidance branches cond, uncond, this run had branch0"]


# -------------------------------------------------------------------------------------------------------------- threads


def test_two_threads_on_one_wrapper(method: Any) -> None:
    pipe, call = sd3_pipeline()
    fast = hasten.accelerate(pipe, method)
    expected = run(fast, call)
    errors: list[BaseException] = []

    def second(_: Any, i: int) -> None:
        if i == 1:
            thread = threading.Thread(target=attempt)
            thread.start()
            thread.join(60)

    def attempt() -> None:
        try:
            fast(**call)
        except BaseException as error:
            errors.append(error)

    assert torch.equal(run(fast, call, **on_step("sd3", second)), expected)
    assert [type(error) for error in errors] == [RuntimeError]
    assert "another thread" in str(errors[0])
    assert torch.equal(run(fast, call), expected)


def test_a_wrapper_called_from_its_own_callback(method: Any) -> None:
    pipe, call = sd3_pipeline()
    fast = hasten.accelerate(pipe, method)
    with pytest.raises(RuntimeError, match="already running"):
        run(fast, call, **on_step("sd3", lambda pipe, i: fast(**call) and None))


def test_a_session_serves_one_run_at_a_time(method: Any) -> None:
    session = attach(guided(), method, num_inference_steps=2)
    with session, pytest.raises(RuntimeError, match="already running"):
        session.__enter__()


# ---------------------------------------------------------------------------------------------------- offload through hooks


@pytest.mark.parametrize("how", ["whole", "sequential"])
@pytest.mark.parametrize("name", ["flux", "sd3", "wan"])
def test_offload_through_accelerates_hooks(name: str, how: str, method: Any) -> None:
    from accelerate import cpu_offload
    from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module

    pipe, call = PIPELINES[name]()
    expected = run(hasten.accelerate(pipe, method), call)
    plain = run(pipe, call)
    if how == "whole":
        add_hook_to_module(pipe.transformer, CpuOffload("cpu"))
    else:
        cpu_offload(pipe.transformer, torch.device("cpu"), offload_buffers=False)
        assert any(p.is_meta for p in pipe.transformer.parameters())
    fast = hasten.accelerate(pipe, method)
    assert torch.equal(run(fast, call), expected)
    assert torch.equal(run(fast, call), expected)
    assert torch.equal(run(hasten.accelerate(pipe, ComputeAll(), force_store=True), call), plain)
    assert not fast.report.reasons
    remove_hook_from_module(pipe.transformer, recurse=True)
