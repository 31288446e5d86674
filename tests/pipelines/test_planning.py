"""`hasten.plan` and `hasten.calibrate` on the model that ships, in few steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

import hasten
from hasten.accelerators.caching.plan import Action
from hasten.pipelines.zoo.loading import call_defaults, load, path_of

PROMPTS = ["a small red circle", "a large blue square", "a large green cross left of a small red square"]
CALL = {**call_defaults(path_of("shapes")), "num_inference_steps": 10, "clean_caption": False, "use_resolution_binning": False}


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = load("shapes")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def latents(target: Any, seed: int = 100) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(PROMPTS))]
    return target(PROMPTS, generator=generators, output_type="latent", return_dict=False, **CALL)[0]


def test_a_plan_within_an_error(pipe: Any, tmp_path: Path) -> None:
    plan = hasten.plan(pipe, PROMPTS, error=0.05, replays=2, progress=False, **CALL)
    certificate = plan.facts["certificate"]
    assert 0 < certificate["predicted"] <= 0.05
    assert 0 < plan.computed_fraction < 1 and certificate["speedup"] > 1
    assert len(certificate["step_errors"]) == 10 and certificate["held_out"] == 1 and certificate["calibrated_on"] == 2
    steps = plan.actions[:, 0, 0]
    assert steps[0] == Action.COMPUTE and set(steps) == {Action.COMPUTE, Action.FORECAST}
    assert all(certificate["step_errors"][k] == 0 for k in np.flatnonzero(steps == Action.COMPUTE))
    again = hasten.plan(pipe, PROMPTS, error=0.05, replays=2, progress=False, **CALL)
    assert np.array_equal(again.actions, plan.actions) and np.array_equal(again.weights, plan.weights)
    plan.save(tmp_path / "plan.safetensors")
    loaded = hasten.Plan.load(tmp_path / "plan.safetensors")
    assert loaded == plan and np.array_equal(loaded.weights, plan.weights)
    fast = hasten.accelerate(pipe, loaded)
    made, plain = latents(fast), latents(pipe)
    assert (made - plain).norm() < 0.3 * plain.norm()
    assert not fast.report.reasons and not fast.report.warnings
    assert torch.equal(latents(hasten.accelerate(pipe, fast.report.plan)), made), "what was executed replays to the same bits"


def test_a_plan_for_a_speedup_takes_a_trace_for_each_size_of_batch(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three forward passes, which every replay would take again."""
    from hasten.accelerators.caching import runtime

    shapes = []
    original = runtime.trace_module

    def noted(denoiser: Any, args: Any, kwargs: Any) -> Any:
        shapes.append(args[0].shape if args else kwargs["hidden_states"].shape)
        return original(denoiser, args, kwargs)

    monkeypatch.setattr(runtime, "trace_module", noted)
    plan = hasten.plan(pipe, PROMPTS, speedup=1.5, progress=False, **CALL)
    assert plan.facts["certificate"]["speedup"] >= 1.5
    assert len(shapes) == len(set(shapes)) == 2, "of the prompts that are measured, and of the one that is held out"
    assert plan.facts["method"] == "planned for speedup 1.5"


def test_magcache_from_one_prompt(pipe: Any) -> None:
    plan = hasten.calibrate(pipe, PROMPTS[:1], hasten.MagCache(threshold=0.5, max_skip=2), progress=False, **CALL)
    steps = plan.actions[:, 0, 0]
    assert set(steps) == {Action.COMPUTE, Action.REUSE} and not steps[:2].any()
    assert plan.facts["calibrated_on"] == 1 and len(plan.facts["ratios"]) == 9
    fast = hasten.accelerate(pipe, plan)
    assert (latents(fast) - latents(pipe)).norm() > 0
    everything = hasten.calibrate(pipe, PROMPTS[:1], hasten.MagCache(threshold=0.0), progress=False, **CALL)
    assert everything.computed_fraction == 1


def test_magcache_decides_as_published() -> None:
    """Worked by hand: ratios .98 .98 .98 drift by .02, then .0396, then .0588 of the product."""
    rule = hasten.MagCache(threshold=0.07, max_skip=5, retention=0.0)
    assert rule.computed(np.full(6, 0.98)) == [True, False, False, True, False, False, True]
    assert hasten.MagCache(threshold=9.0, max_skip=1, retention=0.0).computed(np.ones(4)) == [True, False, True, False, True]
    assert hasten.MagCache(threshold=9.0, max_skip=9, retention=0.5).computed(np.ones(5)) == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give speedup or error"),
        ({"speedup": 2.0, "error": 0.1}, "give speedup or error"),
        ({"speedup": 0.5}, "speedup must be at least 1, not 0.5"),
        ({"error": 0.0}, "error must be positive, not 0"),
        ({"speedup": 2.0, "held_out": 3}, "at least one prompt to calibrate on"),
        ({"speedup": 2.0, "num_inference_steps": 2}, "num_inference_steps must be a whole number of at least 3"),
        ({"speedup": 500.0}, "speedup=500 is out of reach: with one computed step of 10"),
    ],
)
def test_what_cannot_be_planned(pipe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hasten.plan(pipe, PROMPTS, progress=False, **{**CALL, **options})


def test_what_cannot_be_calibrated(pipe: Any) -> None:
    with pytest.raises(ValueError, match="prompts is empty"):
        hasten.calibrate(pipe, [], hasten.MagCache(), **CALL)
    with pytest.raises(ValueError, match="DeltaDiT needs no calibration"):
        hasten.calibrate(pipe, PROMPTS, hasten.DeltaDiT(), **CALL)
    for options, message in (({"threshold": -1}, "threshold"), ({"max_skip": 1.5}, "max_skip"), ({"retention": 2}, "retention")):
        with pytest.raises(ValueError, match=message):
            hasten.MagCache(**options)
    for options, message in (({"interval": 0}, "interval"), ({"order": 3}, "order"), ({"start": 1.5}, "start"), ({"start": True}, "start")):
        with pytest.raises(ValueError, match=message):
            hasten.Forecast(**options)


def test_an_interrupted_calibration_goes_on_where_it_was(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.pipelines import calibration

    # For an error and not for a speed-up: costs are timed, and a busy machine would solve two plans for two numbers of steps.
    asked: dict[str, Any] = {"error": 0.05, "batch": 1, "replays": 1, "progress": False, **CALL}
    whole = hasten.plan(pipe, PROMPTS, **asked)
    file, runs = tmp_path / "deep" / "plan.partial", 0
    original = calibration.Runs.run

    def stopping(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs == 6:
            raise KeyboardInterrupt
        return original(self, *args, **options)

    monkeypatch.setattr(calibration.Runs, "run", stopping)
    with pytest.raises(KeyboardInterrupt):
        hasten.plan(pipe, PROMPTS, checkpoint=file, **asked)
    assert file.exists()
    with pytest.raises(ValueError, match="of another calibration"):
        hasten.plan(pipe, PROMPTS[::-1], checkpoint=file, **asked)
    resumed = hasten.plan(pipe, PROMPTS, checkpoint=file, **asked)
    assert np.array_equal(resumed.actions, whole.actions) and np.array_equal(resumed.weights, whole.weights)
    assert not file.exists() and not list(file.parent.iterdir())
    runs_needed = runs - 6
    runs = 100
    hasten.plan(pipe, PROMPTS, **asked)
    assert runs_needed == runs - 100 - 5, "the five runs that were done are not done again"
    file.write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"cannot be read .*delete it"):
        hasten.plan(pipe, PROMPTS, checkpoint=file, **asked)


def test_a_plan_for_loops_of_ones_own() -> None:
    from hasten.pipelines.zoo.reach.policy import load_policy, sample_actions
    from hasten.pipelines.zoo.reach.simulator import observe, scenes_of, stream_of

    policy, scheduler = load_policy()

    def loop_from(first: int) -> Any:
        seeds = range(first, first + 4)
        scenes, _ = scenes_of(seeds)
        seen = observe(scenes, scenes.start, torch.zeros_like(scenes.start))
        return lambda session: sample_actions(policy, scheduler, seen, [stream_of(seed, 2) for seed in seeds], 20, session)

    plan = hasten.plan(policy, [loop_from(1), loop_from(50)], speedup=1.8, num_inference_steps=20, progress=False)
    assert plan.facts["certificate"]["held_out"] == 1 and plan.facts["certificate"]["replayed"] < 0.2
    alone = hasten.plan(policy, loop_from(1), error=0.05, num_inference_steps=20, progress=False)
    assert "replayed" not in alone.facts["certificate"] and alone.facts["certificate"]["predicted"] <= 0.05
    with hasten.attach(policy, plan, num_inference_steps=20) as session:
        loop_from(90)(session)
    assert session.report.plan is not None and not session.report.reasons
    with pytest.raises(ValueError, match="prompts must be a function"):
        hasten.plan(policy, ["a caption"], speedup=2.0, num_inference_steps=20)
    with pytest.raises(ValueError, match="must return its samples"):
        hasten.plan(policy, lambda session: loop_from(1)(session).tolist(), speedup=2.0, num_inference_steps=20)
    method = hasten.BAC(updates=6, sensitivity=True, shared=True)
    weighed = hasten.calibrate(policy, loop_from(1), method, num_inference_steps=20, progress=False)
    computed = weighed.actions[:, :, 0] == Action.COMPUTE
    assert (computed.all(1) == computed.any(1)).all() and computed.all(1).sum() == 6
    assert computed[10:].all(1).sum() >= 3, "the last steps count most"


def test_a_unet_is_planned_for_at_its_deep_branch() -> None:
    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, cross_attention_dim=8, attention_head_dim=2,
        norm_num_groups=2,
    ).eval()  # fmt: skip

    def loop(seed: int) -> Any:
        def run(session: Any) -> torch.Tensor:
            generator = torch.Generator().manual_seed(seed)
            x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
            for k in range(12):
                with session.step(k):
                    x = x + 0.05 * net(x, 900 - 70 * k, encoder_hidden_states=context).sample
            return x

        return run

    loops = [loop(seed) for seed in range(3)]
    plan = hasten.plan(net, loops, error=0.002, num_inference_steps=12, progress=False)
    steps, certificate = plan.actions[:, 0, 0], plan.facts["certificate"]
    assert plan.sites == ("up_blocks.1.resnets.0",)
    assert set(steps) == {Action.COMPUTE, Action.FORECAST} and (steps == Action.COMPUTE).sum() < 10
    assert certificate["predicted"] <= 0.002 and certificate["replayed"] < 0.004
