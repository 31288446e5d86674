"""Trains the `reach` model: `python recipes/reach.py`. See the card for what was measured.

    demonstrations   the expert's ways on both sides of the training scenes
    train            the diffusion policy on states along them, some of them pushed off the way
    export           bf16 weights, 1,000 episodes of 100 DDPM steps, the card

Checkpoints lie in runs/reach; give the same command again to resume. Training scenes have seeds of their own, so that no episode of the
export or of the tests was seen.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import shared
import torch
import torch.nn.functional as F
from denoising import ZOO, git_hash
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hasten.pipelines.zoo.reach import (
    HORIZON,
    LIMIT,
    Expert,
    ReachPolicy,
    Sampler,
    Scenes,
    load_policy,
    new_scheduler,
    observe,
    passed_on,
    run_episodes,
    scenes_of,
    sides_of,
)
from hasten.pipelines.zoo.reach.policy import SCALE

WORK = Path("runs/reach")
TRAIN_SEEDS, VALIDATION_SEEDS = range(1_000_000, 1_040_000), range(900_000, 900_064)
STEPS, BATCH, RATE = 1_500, 256, 2e-3
PUSH, RETURN = 0.025, 0.6
"""Standard deviation of the push off the expert's way, in workspace units, and what is left of it after each step."""


# ------------------------------------------------------------------------------------------------------- demonstrations


def make_demonstrations() -> None:
    path = WORK / "demonstrations.pt"
    if path.exists():
        return
    parts = []
    with shared.progress() as bar:
        task = bar.add_task("demonstrations", total=len(TRAIN_SEEDS), note="")
        for at in range(0, len(TRAIN_SEEDS), 1_000):
            scenes, ways = scenes_of(TRAIN_SEEDS[at : at + 1_000])
            parts.append((*scenes, ways))
            bar.update(task, advance=1_000)
    *fields, ways = (torch.cat(part) for part in zip(*parts, strict=True))
    shared.save(path, scenes=fields, ways=ways)


class Demonstrations:
    """Draws training samples from the expert's ways."""

    def __init__(self) -> None:
        state = torch.load(WORK / "demonstrations.pt")
        self.scenes, self.ways = Scenes(*state["scenes"]), state["ways"]
        self.arrival = ((self.ways - self.ways[:, :, -1:]).abs().amax(-1) > 1e-4).sum(-1)

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Observations [n, OBSERVATION] and normalised chunks [n, HORIZON, 2].

        Both ways from the start are shown equally often, and most states are pushed off their way: the chunk then leads back to it, or
        the policy would not know what to do after its own small errors.
        """
        row = torch.randint(len(self.ways), (n,), generator=generator)
        side = torch.randint(2, (n,), generator=generator)
        way = self.ways[row, side]
        index = (torch.rand(n, generator=generator) * (self.arrival[row, side] + 1)).long()
        index = index * (torch.rand(n, generator=generator) > 0.35)
        every = torch.arange(n)
        position = way[every, index]
        moving = (index > 0)[:, None]
        displacement = (position - way[every, (index - 1).clamp(min=0)]) + 0.4 * PUSH * torch.randn(n, 2, generator=generator) * moving
        push = PUSH * torch.randn(n, 2, generator=generator) * (torch.rand(n, 1, generator=generator) < 0.7) * moving
        ahead = index[:, None] + 1 + torch.arange(HORIZON)
        target = way.gather(1, ahead.clamp(max=LIMIT)[..., None].expand(-1, -1, 2))
        target = target + push[:, None] * (RETURN ** torch.arange(1.0, HORIZON + 1))[:, None]
        position = position + push
        return observe(self.scenes.at(row), position, displacement), (target - position[:, None]) / SCALE


# ---------------------------------------------------------------------------------------------------------------- train


def train() -> None:
    torch.manual_seed(3)
    policy, scheduler = ReachPolicy(), new_scheduler()
    hidden = [p for name, p in policy.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    training = shared.Training(WORK / "policy.pt", {"policy": policy}, hidden, steps=STEPS, rate=RATE, falling=0.6)
    if training.finished:
        return
    start = training.start
    demonstrations = Demonstrations()
    generator = torch.Generator().manual_seed(4_000_000 + start)
    policy.compile_repeated_blocks(fullgraph=True)  # all of them share one graph, which compiles in a fraction of the time
    began = time.time()
    with shared.progress() as bar:
        task = bar.add_task("train", total=STEPS, completed=start, note="")
        for step in range(start, STEPS):
            observations, chunks = demonstrations.batch(BATCH, generator)
            noise = torch.randn(chunks.shape, generator=generator)
            times = torch.randint(scheduler.config.num_train_timesteps, (BATCH,), generator=generator)
            noisy = scheduler.add_noise(chunks, noise, times)
            # Plain products: the fused kernel's backward is slow on short sequences.
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                loss = F.mse_loss(policy(noisy, times, observations), noise)
            loss.backward()
            training.step(step)
            if (step + 1) % 10 == 0:
                bar.update(task, completed=step + 1, note=f"loss {loss.item():.4f}")
            if (step + 1) % 100 == 0:
                per_step = (time.time() - began) / (step + 1 - start)
                shared.log(WORK, stage="train", step=step + 1, loss=round(loss.item(), 5), seconds=round(per_step, 4))
            if (step + 1) % 250 == 0 or step + 1 == STEPS:
                training.save(step + 1)
            if (step + 1) % 500 == 0:
                shared.log(WORK, stage="validate", step=step + 1, success=validate(training.average))


def validate(average: dict[str, Tensor]) -> float:
    """Success of the averaged weights on episodes that only serve to watch the training."""
    policy = ReachPolicy()
    policy.load_state_dict(average)
    with torch.autocast("cpu", torch.bfloat16):
        sampler = Sampler(policy.eval(), new_scheduler(), VALIDATION_SEEDS)
        return run_episodes(sampler, VALIDATION_SEEDS).success.float().mean().item()


# --------------------------------------------------------------------------------------------------------------- export


def interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z, share = 1.96, successes / n
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def export(episodes: int) -> None:
    """Saves the averaged weights in bf16, runs episodes with what was saved, and writes the card."""
    state = torch.load(WORK / "policy.pt")
    policy = ReachPolicy()
    policy.load_state_dict(state["average"])
    with shared.replacing(ZOO / "reach") as scratch:
        policy.to(torch.bfloat16).save_pretrained(scratch)
        new_scheduler().save_pretrained(scratch / "scheduler")
        seeds = range(episodes)
        policy, scheduler = load_policy(folder=scratch)
        with torch.autocast("cpu", torch.bfloat16):
            ours = run_episodes(Sampler(policy, scheduler, seeds), seeds)
        scenes, ways = scenes_of(seeds)
        mean = Expert(seeds)
        mean.ways = ways.mean(1)
        good = int(ours.success.sum())
        results: dict[str, Any] = {
            "step": state["step"],
            "samples": state["step"] * BATCH,
            "git": git_hash(),
            "episodes": episodes,
            "num_inference_steps": 100,
            "success": good / episodes,
            "success_interval": interval(good, episodes),
            "collided": ours.collided.float().mean().item(),
            "steps": ours.steps[ours.success].float().mean().item(),
            "left": (passed_on(scenes, ours.path) == 0).float().mean().item(),
            "expert_success": run_episodes(Expert(seeds), seeds).success.float().mean().item(),
            "expert_left": (sides_of(seeds) == 0).float().mean().item(),
            "mean_way_success": run_episodes(mean, seeds).success.float().mean().item(),
        }
        shared.log(WORK, **{"stage": "export", **results})
        print(json.dumps(results))
        shared.describe(scratch, WORK, results, card(results))


CARD = """# reach

A transformer diffusion policy (in the manner of Diffusion Policy's DP-T) for a world whose truth can be checked exactly: a point effector
must reach a goal around three discs, with a way round on either side. {layers} decoder layers of width {width}, {parameters:,} parameters,
chunks of 16 waypoints of which 8 are carried out, trained from nothing by `recipes/reach.py`.

```python
from hasten.pipelines.zoo.reach import Sampler, load_policy, rollout

policy, scheduler = load_policy()
seeds = range(100)
successes = rollout(Sampler(policy, scheduler, seeds, num_inference_steps=100), seeds)
```

Trained for {step:,} steps of {batch} states ({samples:,} in all) along the expert's ways in {scenes:,} scenes, git {git}.
Figures: {episodes:,} episodes in scenes that training never saw, {num_inference_steps} DDPM steps a chunk, under bf16 autocast.

| who acts | success | 95% interval | touched a disc | went left |
|---|---|---|---|---|
| this policy | {success} | {low} to {high} | {collided} | {left} |
| the expert, side by a coin | {expert_success} | | | {expert_left} |
| the mean of the expert's two ways | {mean_way_success} | | | |

A successful episode takes {steps:.1f} steps in the mean. The training log is `training_log.jsonl`; the figures are in `results.json`.
"""


def card(results: dict[str, Any]) -> str:
    """The model card; every figure in it was measured by `export` on the saved weights."""
    policy = ReachPolicy()
    low, high = results["success_interval"]
    shares = {"low": low, "high": high} | {
        key: results[key] for key in ("success", "collided", "left", "expert_success", "expert_left", "mean_way_success")
    }
    return CARD.format(
        **{**results, **{key: f"{100 * share:.1f}%" for key, share in shares.items()}},
        layers=policy.config.layers,
        width=policy.config.width,
        parameters=sum(p.numel() for p in policy.parameters()),
        batch=BATCH,
        scenes=len(TRAIN_SEEDS),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=1_000, help="episodes that the export is judged by (default: %(default)s)")
    stages = {
        "demonstrations": lambda args: make_demonstrations(),
        "train": lambda args: train(),
        "export": lambda args: export(args.episodes),
    }
    shared.run_stages(parser, stages, [WORK])


if __name__ == "__main__":
    main()
