"""The tree of frames against a search through all of its branches."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.accelerators.search.frame_tree import FrameTree, grow_video, stage_of
from hasten.accelerators.search.task import Found
from hasten.accelerators.steering.budget import Budget, BudgetError, Meter
from hasten.accelerators.steering.mixes import WeightedSum
from hasten.accelerators.steering.noise import stream
from hasten.accelerators.steering.report import ROOT


def extend(prefixes: Tensor | None, noises: Tensor, chunk: int) -> Tensor:
    """Two frames of one number: a walk that the noise pushes on."""
    last = torch.zeros(len(noises)) if prefixes is None else prefixes[:, -1]
    return torch.stack([last + noises[:, 0], 0.5 * last - noises[:, 0] + chunk], 1)


def smoothness(videos: Tensor) -> Tensor:
    return -videos.diff(dim=1).square().sum(1)


def run(tree: FrameTree, **more: Any) -> Found:
    arguments: dict[str, Any] = {"chunks": 3, "seed": 1, **more}
    return grow_video(tree, arguments.pop("extend", extend), (1,), arguments.pop("verifiers", smoothness), **arguments)


def test_a_beam_that_drops_nothing_finds_the_best_of_all_leaves() -> None:
    tree = FrameTree((2, 2, 2), (8, 8, 8))
    found = run(tree)
    # Child by child and best first: rebuild the tree from the streams alone.
    number = itertools.count()

    def draw() -> Tensor:
        return torch.randn(1, 1, generator=stream(1, 0, next(number)))

    beam: list[Tensor] = [extend(None, draw(), 0) for _ in range(2)]
    for chunk in (1, 2):
        beam.sort(key=lambda video: -float(smoothness(video)))
        beam = [torch.cat([video, extend(video, draw(), chunk)], 1) for _ in range(2) for video in beam]
    best = max(beam, key=lambda video: float(smoothness(video)))
    assert torch.equal(found.latents, best[0])
    assert float(found.scores) == pytest.approx(float(smoothness(best)))
    assert found.report.meter.spent.particle_steps == 2 + 4 + 8
    replayed = None
    for chunk, noise in enumerate(found.noise):
        made = extend(replayed, noise[None], chunk)
        replayed = made if replayed is None else torch.cat([replayed, made], 1)
    assert replayed is not None and torch.equal(replayed[0], found.latents)


def test_the_beam_keeps_the_best_of_every_stage_and_narrows() -> None:
    found = run(FrameTree((6, 3, 2), (3, 2, 1)), chunks=4, steps=5, rows_per_step=2)
    lineage = found.report.lineage
    assert [len(lineage.at(stage)) for stage in range(4)] == [6, 9, 6, 4]
    for stage, width in ((0, 3), (1, 2), (2, 2)):
        ranked = sorted(lineage.at(stage), key=lambda node: -lineage.nodes[node].reward)
        assert {lineage.nodes[node].parent for node in lineage.at(stage + 1)} == set(ranked[:width])
    assert (found.report.meter.spent.particle_steps, found.report.meter.spent.denoiser_rows) == (25 * 5, 25 * 10)
    assert found.report.meter.spent.verifier_rows == found.report.meter.spent.decodes == 25
    assert all(lineage.nodes[node].parent == ROOT for node in lineage.at(0))


def test_every_stage_has_its_verifier_its_prompt_and_the_video_so_far() -> None:
    asked: list[tuple[str, str, int]] = []

    def verifier(stage: str) -> Any:
        def judge(videos: Tensor, prompts: list[str]) -> Tensor:
            asked.append((stage, prompts[0], videos.shape[1]))
            return smoothness(videos)

        return judge

    prompt = {"first": "a ship", "middle": "is the motion smooth?", "final": "a ship sails"}
    run(FrameTree(), verifiers={stage: verifier(stage) for stage in prompt}, prompt=prompt, chunks=4)
    assert asked == [
        ("first", "a ship", 2),
        ("middle", "is the motion smooth?", 4),
        ("middle", "is the motion smooth?", 6),
        ("final", "a ship sails", 8),
    ]
    assert [stage_of(0, 1), stage_of(0, 2), stage_of(1, 2)] == ["final", "first", "final"]
    # A video of two chunks has no middle, so none need be judged.
    run(FrameTree(), verifiers={"first": smoothness, "final": smoothness}, chunks=2)
    with pytest.raises(ValueError, match="verifiers must have an entry for middle; it has first, final"):
        run(FrameTree(), verifiers={"first": smoothness, "final": smoothness})
    with pytest.raises(ValueError, match="prompt must have an entry for final; it has first, middle"):
        run(FrameTree(), prompt={"first": "a", "middle": "b"})


def test_a_wider_tree_is_better_and_batches_of_any_size_agree() -> None:
    for size in (1, 3):
        assert torch.equal(run(FrameTree(), micro_batch=size).latents, run(FrameTree()).latents)
    plain = [run(FrameTree((1, 1, 1), (1, 1, 1)), seed=seed).report.rewards[0] for seed in range(30)]
    wide = [run(FrameTree(), seed=seed).report.rewards[0] for seed in range(30)]
    assert sum(wide) / 30 > 0.6 * sum(plain) / 30


@settings(max_examples=60)
@given(
    branches=st.tuples(*[st.integers(1, 5)] * 3),
    widths=st.tuples(*[st.integers(1, 4)] * 3).map(lambda w: tuple(sorted(w, reverse=True))),
    chunks=st.integers(1, 5),
    limit=st.fixed_dictionaries(
        {}, optional={"particle_steps": st.integers(1, 80), "decodes": st.integers(1, 40), "verifier_rows": st.integers(1, 60)}
    ),
)
def test_no_budget_is_exceeded_and_one_below_a_video_is_refused(branches: Any, widths: Any, chunks: int, limit: dict[str, int]) -> None:
    verifiers: dict[str, Any] = {"first": smoothness, "middle": smoothness, "final": WeightedSum((smoothness, smoothness))}  # type: ignore[arg-type]
    one = {"particle_steps": 2 * chunks, "decodes": chunks, "verifier_rows": chunks + 1}
    arguments: dict[str, Any] = {"verifiers": verifiers, "chunks": chunks, "steps": 2, "budget": Budget(**limit)}
    if any(limit.get(name, math.inf) < cost for name, cost in one.items()):
        with pytest.raises(BudgetError, match="but one sample takes"):
            run(FrameTree(branches, widths), **arguments)
        return
    found = run(FrameTree(branches, widths), **arguments)
    assert found.latents.shape == (2 * chunks,) and found.noise.shape == (chunks, 1)
    for name, most in limit.items():
        assert getattr(found.report.meter.spent, name) <= most


def test_the_time_is_not_exceeded_once_the_pace_is_known() -> None:
    now = 0.0

    def slow(prefixes: Tensor | None, noises: Tensor, chunk: int) -> Tensor:
        nonlocal now
        now += len(noises)
        return extend(prefixes, noises, chunk)

    found = run(FrameTree(), extend=slow, budget=Meter(Budget(seconds=13.0), lambda: now))
    assert now <= 13.0 and found.latents.shape == (6,) and found.report.warnings
    now = 0.0
    short = run(FrameTree(), extend=slow, budget=Meter(Budget(seconds=1.5), lambda: now))
    assert short.latents.shape == (2,) and short.report.warnings[-1] == "the time ran out: the video ends after 1 of 3 chunks"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FrameTree(branches=(2, 2)), r"branches must be three whole numbers of at least 1 \(first, middle, final\), not \(2, 2\)"),  # type: ignore[arg-type]
        (lambda: FrameTree(widths=(1, 2, 1)), r"widths must not grow from stage to stage, not \(1, 2, 1\)"),
        (lambda: FrameTree(widths=(2, 1, 0)), "widths must be three whole numbers of at least 1"),
        (lambda: run(FrameTree(), chunks=0), "chunks must be a whole number of at least 1, not 0"),
    ],
)
def test_arguments_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
