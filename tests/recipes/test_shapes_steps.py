"""The recipe of the step LoRAs: it asks the pipeline's own denoiser, samples as the pipeline will, and goes on where it stopped."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hasten.accelerators.distillation.dmd import rollout
from hasten.pipelines.solver_schedulers import GammaScheduler
from hasten.pipelines.step_lora import StepLoRA
from hasten.pipelines.zoo.loading import call_defaults, path_of

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SIZES = {"SCENES": 8, "CHUNK": 8, "BATCH": 4, "SEGMENTS": {2: 2, 1: 2}, "WARMUP": 1, "CHECKED": 2}
CHECKS = (("segments", 2), ("segments", 4), ("match", 4), ("feedback", 4))
CAPTIONS = ["a small red circle left of a blue square", "a green triangle", "a yellow square above a large red square"]


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    """The recipe for a handful of scenes and a few steps. It loads each pipeline once and compiles nothing: that takes a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPES))
        import shapes_steps

        pipes: dict[str, Any] = {}
        load = shapes_steps.load
        patch.setattr(shapes_steps, "load", lambda name: pipes[name] if name in pipes else pipes.setdefault(name, load(name)))
        patch.setattr(torch, "compile", lambda function, **_: function)
        for name, value in SIZES.items():
            patch.setattr(shapes_steps, name, value)
        patch.setattr(shapes_steps, "MATCHING", tuple(replace(matching, steps=4) for matching in shapes_steps.MATCHING[:2]))
        yield shapes_steps


@pytest.fixture(params=["shapes", "shapes-flow"])
def model(recipe: ModuleType, request: pytest.FixtureRequest) -> Any:
    return recipe.Model(request.param)


def arguments_of(model: Any) -> dict[str, Any]:
    """Of the pipeline's call, as the card recommends them."""
    return {**call_defaults(Path(model.pipe.config._name_or_path)), **model.teacher.call, "output_type": "latent"}


def noise_of(seed: int) -> Tensor:
    return torch.randn(len(CAPTIONS), 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_the_teacher_is_told_what_the_pipeline_tells_its_denoiser_and_answers_the_same(model: Any) -> None:
    calls: list[dict[str, Any]] = []

    def record(network: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        calls.append({**({"hidden_states": args[0]} if args else {}), **kwargs})

    arguments = arguments_of(model)
    assert arguments["guidance_scale"] == model.teacher.guidance, "the guidance of the model's card is folded in"
    hook = model.network.register_forward_pre_hook(record, with_kwargs=True)
    model.pipe(CAPTIONS, latents=noise_of(0), **{**arguments, "num_inference_steps": 3})
    hook.remove()
    given = calls[1]
    latents, rows = given["hidden_states"], 2 * len(CAPTIONS)  # without the caption first, and then with it
    untold = tuple(row.expand(len(CAPTIONS), *row.shape[1:]) for row in model.empty)
    told = tuple(torch.cat(pair) for pair in zip(untold, model.encoded(CAPTIONS), strict=True))
    times = model.pipe.scheduler.timesteps[1].expand(rows)
    said = model.teacher.arguments(times, *told)
    for name, value in said.items():
        if isinstance(value, Tensor):
            assert value.shape == given[name].shape and torch.equal(value, given[name].to(value.dtype)), name
        else:
            assert value == given[name], name
    unsaid = {name: value for name, value in given.items() if name not in said and name not in ("hidden_states", "return_dict")}
    assert all(value is None for value in unsaid.values()), unsaid
    answer = model.denoiser(model.plain)(latents, times, told)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        expected = model.network(**given)[0]
    assert torch.equal(answer, expected)


def relative(one: Tensor, other: Tensor) -> float:
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


@pytest.mark.parametrize("steps", [1, 4])
def test_the_student_is_rolled_out_as_the_pipeline_draws_with_its_lora(recipe: ModuleType, model: Any, tmp_path: Path, steps: int) -> None:
    generator = torch.Generator().manual_seed(3)
    factors = {name: factor.detach() for name, factor in model.new_factors(0).items()}
    for name, factor in factors.items():
        if name.endswith("lora_B.weight"):
            factor.copy_(0.2 * torch.randn(factor.shape, generator=generator))
    saved = recipe.lora_of(model.teacher, model.pipe, factors).save(tmp_path, torch.bfloat16)
    assert saved.stat().st_size <= 2_000_000
    with StepLoRA.load(saved).applied(model.pipe, steps) as call:
        assert isinstance(model.pipe.scheduler, GammaScheduler)
        drawing = torch.Generator().manual_seed(5)
        model.pipe.scheduler.generator = drawing
        with torch.autocast("cpu", torch.bfloat16):
            drawn = model.pipe(CAPTIONS, latents=noise_of(1), generator=drawing, **{**arguments_of(model), **call}).images
    told = model.encoded(CAPTIONS)
    walked = model.teacher.nodes.get(steps, recipe.few_nodes(model.grid, steps))

    def rolled(weights: Mapping[str, Tensor]) -> Tensor:
        drawing = torch.Generator().manual_seed(5)
        with torch.no_grad():
            x0: Tensor = rollout(model.denoiser(weights), noise_of(1), told, model.grid, walked, drawing).x0
        return x0

    off, moved = relative(rolled(model.merged(factors)), drawn), relative(rolled(model.plain), drawn)
    assert off < 0.03 and moved > 10 * off, (off, moved)


def run(recipe: ModuleType, work: Path, stage: str, *more: str) -> None:
    """The recipe's command for `shapes-flow`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["shapes_steps.py", "--model", "shapes-flow", "--work", str(work), "--stage", stage, *more])
        patch.setattr(recipe, "ZOO", work / "zoo")
        recipe.main()


@pytest.fixture(scope="module")
def whole(recipe: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every stage was run."""
    work = tmp_path_factory.mktemp("runs") / "shapes-flow-steps"
    run(recipe, work, "all", "--samples", "2")
    return work


def test_every_stage_runs_and_what_is_exported_draws(recipe: ModuleType, whole: Path) -> None:
    zoo = whole / "zoo" / "shapes-flow-steps"
    rows = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    checks = [(row["stage"], row["step"], set(row["correct"])) for row in rows if "correct" in row]
    assert checks == [(stage, step, {"1", "2", "4", "8"}) for stage, step in CHECKS]
    results = json.loads((zoo / "results.json").read_text())
    assert results["stage"] == "feedback" and results["step"] == 4 and set(results["correct"]) == {"1", "2", "4", "8"}
    card = (zoo / "README.md").read_text()
    assert card.startswith("# shapes-flow-steps\n") and "Guidance 2.5" in card and "height=64, width=64, max_sequence_length=20" in card
    lora, pipe = StepLoRA.load(zoo), recipe.load("shapes-flow")
    trained = torch.load(whole / "feedback.pt")["student"]["average"]
    assert all(torch.equal(lora.factors[name], factor.bfloat16()) for name, factor in trained.items())
    before = pipe.scheduler
    with lora.applied(pipe, 4) as call:
        assert call == {"num_inference_steps": 4, "guidance_scale": 1.0}
        assert pipe(CAPTIONS[0], height=64, width=64, max_sequence_length=20, **call).images[0].size == (64, 64)
    assert pipe.scheduler is before


def test_the_export_of_a_flow_can_be_repeated(recipe: ModuleType) -> None:
    model = recipe.Model("shapes-flow")
    lora = recipe.lora_of(model.teacher, model.pipe, {name: factor.detach() for name, factor in model.new_factors(0).items()})
    captions = recipe.world.sample_scenes(2, torch.Generator().manual_seed(0), placed=False).captions()
    with lora.applied(model.pipe, 2) as call:
        arguments = {**call_defaults(path_of("shapes-flow")), **call}
        one, other = (recipe.pictures_of(model.pipe, captions, **arguments) for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("stage", [pytest.param(name, marks=pytest.mark.slow) for name in ("segments", "match")] + ["feedback"])
def test_a_stage_that_was_ended_early_ends_where_it_would_have_ended(recipe: ModuleType, whole: Path, tmp_path: Path, stage: str) -> None:
    before = {"segments": [], "match": ["segments.pt"], "feedback": ["match.pt"]}[stage]
    for name in ("pool.pt", *before):
        shutil.copy(whole / name, tmp_path)
    with pytest.raises(SystemExit, match="after 1 of 4 steps"):
        run(recipe, tmp_path, stage, "--minutes", "0")
    run(recipe, tmp_path, stage)
    one, other = (torch.load(work / f"{stage}.pt")["student"]["average"] for work in (whole, tmp_path))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
