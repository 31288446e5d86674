"""`tune` on a tiny pipeline: towards a reward with and without gradients and from given pairs, resumed exactly, refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from hasten.accelerators.distillation.adapters import LoRA
from hasten.accelerators.distillation.dmd import DistributionMatching
from hasten.accelerators.distillation.feedback import RewardFeedback
from hasten.accelerators.distillation.pso import OfflinePSO, OnlinePSO
from hasten.accelerators.distillation.trajectory import TrajectoryConsistency
from hasten.accelerators.steering.verifiers import Brightness, JPEGSize
from hasten.pipelines import training
from hasten.pipelines.distillation_data import grid_at
from hasten.pipelines.distilling import distill
from hasten.pipelines.step_lora import StepLoRA
from hasten.pipelines.tuning import tune
from hasten.pipelines.zoo.loading import call_defaults, load, path_of
from tests.pipelines.test_distilling import CALL, PROMPTS, QUICK, save_picture

FAST: dict[str, Any] = {"call": CALL, "batch_size": 4, "warmup": 0, "falling": 0.0, "progress": False}


@pytest.fixture
def pipe(tiny_pipeline_folder: Path) -> Any:
    made = DiffusionPipeline.from_pretrained(tiny_pipeline_folder, dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def lora(pipe: Any, tmp_path: Path) -> StepLoRA:
    run = {**QUICK, "lora": LoRA(2), "top": 499}
    return distill(pipe, PROMPTS, TrajectoryConsistency((2, 1), guidance=(2.0, 2.0)), steps=1, output=tmp_path / "lora", **run)


def brightness(pipe: Any, lora: StepLoRA, steps: int) -> float:
    """Mean over 16 pictures."""
    with lora.applied(pipe, steps) as call:
        generators = [torch.Generator().manual_seed(900 + i) for i in range(16)]
        images = pipe([PROMPTS[i % 3] for i in range(16)], generator=generators, output_type="pt", **{**CALL, **call}).images
    return float(Brightness().score(images, [""] * 16).mean())


PAIRWISE = OfflinePSO(beta=200.0, rejection=1.0, anchor=0.0)


@pytest.mark.parametrize("method", [OnlinePSO(beta=20.0), PAIRWISE, RewardFeedback()], ids=lambda method: type(method).__name__)
def test_the_student_moves_where_the_reward_is(pipe: Any, lora: StepLoRA, tmp_path: Path, method: Any) -> None:
    before = {name: factor.clone() for name, factor in lora.factors.items()}
    run = {**FAST, "batch_size": 8, "steps": 20, "learning_rate": 3e-3, "sampled_in": 2}
    tuned = tune(pipe, lora, PROMPTS * 8, method, reward=Brightness(), output=tmp_path / "run", **run)
    assert brightness(pipe, tuned, 2) > brightness(pipe, lora, 2) + 1e-3
    assert all(torch.equal(lora.factors[name], factor) for name, factor in before.items())
    assert tuned.steps == lora.steps and tuned.facts["method"] == f"TrajectoryConsistency, {type(method).__name__}"
    assert StepLoRA.load(tmp_path / "run").hash == tuned.hash


def test_an_interrupted_tuning_goes_on_to_the_same_weights(
    pipe: Any, lora: StepLoRA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: dict[str, Any] = {**FAST, "steps": 4, "checkpoint_every": 2, "learning_rate": 1e-2, "reward": JPEGSize()}
    whole = tune(pipe, lora, PROMPTS, OfflinePSO(), output=tmp_path / "whole", **run)
    step = training.Optimised.step

    def failing(self: Any, loss: Tensor, rate: float) -> None:
        step(self, loss, rate)
        if (tmp_path / "parts" / "checkpoint.pt").exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.Optimised, "step", failing)
        with pytest.raises(KeyboardInterrupt):
            tune(pipe, lora, PROMPTS, OfflinePSO(), output=tmp_path / "parts", **run)
    assert torch.load(tmp_path / "parts" / "checkpoint.pt")["step"] == 2
    parts = tune(pipe, lora, PROMPTS, OfflinePSO(), output=tmp_path / "parts", **run)
    assert parts.hash == whole.hash != lora.hash
    assert {file.name for file in (tmp_path / "whole").iterdir()} >= {"pairs.npz", "checkpoint.pt", "log.jsonl"}
    with pytest.raises(ValueError, match="other settings: start was"):
        tune(pipe, whole, PROMPTS, OfflinePSO(), output=tmp_path / "parts", **run)
    with pytest.raises(ValueError, match="is of a run on other data"):
        tune(pipe, lora, PROMPTS[:2], OfflinePSO(), output=tmp_path / "parts", **run)


def test_given_pairs_need_no_reward(pipe: Any, lora: StepLoRA, tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name, seed in (("good.png", 0), ("bad.png", 1)):
        save_picture(folder / name, seed=seed)
    entry = {"preferred": "good.png", "rejected": "bad.png", "text": PROMPTS[0]}
    (folder / "metadata.jsonl").write_text(json.dumps(entry) + "\n")
    tuned = tune(pipe, lora, folder, OfflinePSO(), steps=1, output=tmp_path / "run", **FAST)
    assert tuned.hash != lora.hash
    (folder / "metadata.jsonl").write_text(json.dumps({**entry, "rejected": "none.png"}))
    with pytest.raises(ValueError, match=r"entry 1: there is no file none\.png"):
        tune(pipe, lora, folder, OfflinePSO(), steps=1, output=tmp_path / "other", **FAST)
    (folder / "metadata.jsonl").write_text(json.dumps({"text": "a"}))
    with pytest.raises(ValueError, match="entry 1 has no 'preferred'"):
        tune(pipe, lora, folder, OfflinePSO(), steps=1, output=tmp_path / "other", **FAST)
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_tuned_is_refused(pipe: Any, lora: StepLoRA, tmp_path: Path) -> None:
    run = {**FAST, "steps": 1, "output": tmp_path / "run"}
    for message, data, method, more in (
        ("reward must be given", PROMPTS, OnlinePSO(), {}),
        ("verifier must be differentiable, which JPEGSize is not", PROMPTS, RewardFeedback(), {"reward": JPEGSize()}),
        ("method must be OnlinePSO", PROMPTS, TrajectoryConsistency(), {"reward": JPEGSize()}),
        ("data must be prompts for OnlinePSO", tmp_path, OnlinePSO(), {"reward": JPEGSize()}),
        ("data must be prompts for OnlinePSO, at least one", [], OnlinePSO(), {"reward": JPEGSize()}),
        ("top must be left out", PROMPTS, OnlinePSO(), {"reward": JPEGSize(), "top": 600}),
        ("which the LoRA was trained for, not 3", PROMPTS, OnlinePSO(), {"reward": JPEGSize(), "sampled_in": 3}),
        ("prefers neither of the two samples", PROMPTS, OfflinePSO(), {"reward": lambda images: torch.zeros(len(images))}),
    ):
        with pytest.raises(ValueError, match=message):
            tune(pipe, lora, data, method, **{**run, **more})


@pytest.mark.parametrize("name", ["shapes", "shapes-flow"])
def test_the_few_steps_are_the_sampler_s_own(name: str, tmp_path: Path) -> None:
    """The nodes of a tuning's grid have the noise levels that the scheduler of the step LoRA walks."""
    pipe = load(name)
    pipe.set_progress_bar_config(disable=True)
    call = {key: value for key, value in call_defaults(path_of(name)).items() if key not in ("guidance_scale", "num_inference_steps")}
    settings = {**QUICK, "call": {**call, **CALL} if name == "shapes" else call, "teacher_steps": 1}
    lora = distill(pipe, PROMPTS[:1], TrajectoryConsistency((2,), guidance=(2.0, 2.0)), steps=1, output=tmp_path, **settings)
    grid = grid_at(pipe, lora.timesteps(2))
    scheduler = lora.scheduler(pipe, 2)
    scheduler.set_timesteps(2)
    assert [float(time) for time in scheduler.timesteps] == pytest.approx([float(time) for time in grid.timesteps.flip(0)[:2]])
    sigma = grid.sigma / (grid.alpha if name == "shapes" else 1)
    if hasattr(scheduler, "sigmas"):
        torch.testing.assert_close(scheduler.sigmas.double()[:2], sigma.flip(0)[:2], rtol=1e-4, atol=1e-5)


def test_a_discriminator_is_trained_beside_the_student_and_resumed(pipe: Any, tmp_path: Path) -> None:
    method = TrajectoryConsistency((2, 1), guidance=(2.0, 2.0), adversarial=True)
    run = {**QUICK, "top": 499, "checkpoint_every": 1, "steps": 3}
    whole = distill(pipe, PROMPTS, method, output=tmp_path / "whole", **run)
    plain = distill(pipe, PROMPTS, replace(method, adversarial=False), output=tmp_path / "plain", **run)
    heads = torch.load(tmp_path / "whole" / "checkpoint.pt")["trained"][1]
    assert whole.hash != plain.hash and int(heads["optimizer"]["state"][0]["step"]) == 3
    step, steps = training.Optimised.step, []

    def counted(self: Any, loss: Tensor, rate: float) -> None:
        if len(steps) == 4:
            raise KeyboardInterrupt
        steps.append(float(loss))
        step(self, loss, rate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Optimised, "step", counted)
        with pytest.raises(KeyboardInterrupt):
            distill(pipe, PROMPTS, method, output=tmp_path / "parts", **run)
    assert distill(pipe, PROMPTS, method, output=tmp_path / "parts", **run).hash == whole.hash


def test_distribution_matching_goes_on_from_a_student_and_trains_a_score_beside_it(pipe: Any, lora: StepLoRA, tmp_path: Path) -> None:
    run = {**QUICK, "batch_size": 4, "checkpoint_every": 1, "start": lora}
    del run["lora"]
    method = DistributionMatching((2.0, 2.0), updates=2, counts=(1, 2))
    made = distill(pipe, PROMPTS, method, steps=2, output=tmp_path / "run", **run)
    state = torch.load(tmp_path / "run" / "checkpoint.pt")
    student, score = state["trained"]
    assert made.facts["method"] == "TrajectoryConsistency, DistributionMatching" and made.steps == (1, 2)
    assert made.hash != lora.hash and any(float(f.abs().max()) > 0 for n, f in score["factors"].items() if "lora_B" in n)
    steps = [int(kept["optimizer"]["state"][0]["step"]) for kept in (student, score)]
    assert steps == [2, 4]
    with pytest.raises(ValueError, match="leave those of lora out"):
        distill(pipe, PROMPTS, method, steps=1, output=tmp_path / "other", **{**run, "lora": LoRA(3)})
