"""The reach world and its policy: episodes depend on their seeds alone, both ways round are used, and the shipped policy arrives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hasten
from hasten.pipelines.zoo.reach import (
    HORIZON,
    LEFT,
    LIMIT,
    OBSERVATION,
    RIGHT,
    Expert,
    ReachPolicy,
    Sampler,
    Scenes,
    load_policy,
    new_scheduler,
    observe,
    passed_on,
    rollout,
    run_episodes,
    sample_actions,
    scenes_of,
    sides_of,
    simulator,
    weights_folder,
)

SEEDS = range(2_000, 2_256)


def tiny() -> ReachPolicy:
    torch.manual_seed(0)
    policy = ReachPolicy(width=32, heads=2, inner=64, layers=3)
    torch.nn.init.normal_(policy.action_out.weight, std=0.1)
    return policy.eval()


def observations(n: int) -> Tensor:
    scenes, _ = scenes_of(range(n))
    return observe(scenes, scenes.start, torch.zeros(n, 2))


# ------------------------------------------------------------------------------------------------------------- the world


@pytest.fixture(scope="module")
def world() -> tuple[Scenes, Tensor]:
    return scenes_of(SEEDS)


def test_scenes_depend_on_their_own_seed_alone(world: tuple[Scenes, Tensor]) -> None:
    again, ways = scenes_of(SEEDS)
    assert all(torch.equal(a, b) for a, b in zip((*again, ways), (*world[0], world[1]), strict=True))
    few, few_ways = scenes_of([SEEDS[200], SEEDS[3]])
    rows = torch.tensor([200, 3])
    assert all(torch.equal(a, b) for a, b in zip(few, world[0].at(rows), strict=True))
    torch.testing.assert_close(few_ways, world[1][rows])
    assert len({tuple(goal) for goal in world[0].goal.tolist()}) == len(SEEDS)


def test_scene_side_and_noise_are_drawn_from_streams_of_their_own() -> None:
    first = [torch.rand(4, generator=simulator.stream_of(5, purpose)).tolist() for purpose in range(3)]
    assert len({number for stream in first for number in stream}) == 12


def test_both_ways_are_free_and_within_the_speed_limit(world: tuple[Scenes, Tensor]) -> None:
    scenes, ways = world
    assert (simulator.way_clearance(scenes, ways) > 0.9 * simulator.MARGIN).all()
    assert (ways.diff(dim=2).square().sum(-1).sqrt() < simulator.MAX_SPEED).all()
    torch.testing.assert_close(ways[:, :, 0], scenes.start[:, None].expand(-1, 2, -1))
    torch.testing.assert_close(ways[:, :, -1], scenes.goal[:, None].expand(-1, 2, -1))
    assert (passed_on(scenes, ways[:, LEFT]) == LEFT).all() and (passed_on(scenes, ways[:, RIGHT]) == RIGHT).all()


def test_the_mean_of_the_two_ways_and_the_straight_line_collide(world: tuple[Scenes, Tensor]) -> None:
    scenes, ways = world
    assert (simulator.way_clearance(scenes, ways.mean(1)) < 0).all()
    assert (simulator.way_clearance(scenes, torch.stack([scenes.start, scenes.goal], 1)) < 0).all()
    averaging = Expert(SEEDS)
    averaging.ways = ways.mean(1)
    out = run_episodes(averaging, SEEDS)
    assert not out.success.any() and out.collided.all()


def test_the_expert_always_arrives_and_takes_either_side(world: tuple[Scenes, Tensor]) -> None:
    out = run_episodes(Expert(SEEDS), SEEDS)
    assert out.success.all() and not out.collided.any() and out.steps.max() < LIMIT
    sides = sides_of(SEEDS)
    assert torch.equal(passed_on(world[0], out.path), sides)
    assert 0.4 < sides.float().mean() < 0.6
    for side in (LEFT, RIGHT):
        assert rollout(Expert(SEEDS, torch.full((len(SEEDS),), side)), SEEDS).all()


def test_clearance_is_the_distance_from_the_nearest_disc() -> None:
    scenes = Scenes(
        start=torch.tensor([[-1.0, 0.0]]),
        goal=torch.tensor([[1.0, 0.0]]),
        centre=torch.tensor([[[0.0, 0.0], [0.0, 1.0], [3.0, 0.0]]]),
        radius=torch.tensor([[0.25, 0.5, 0.5]]),
    )
    points = torch.tensor([[[-1.0, 0.0], [0.0, 0.375], [0.0, 0.0]]])
    torch.testing.assert_close(simulator.clearance(scenes, points), torch.tensor([[0.75, 0.125, -0.25]]))
    # Both ends are free, the line between them is not.
    torch.testing.assert_close(simulator.way_clearance(scenes, torch.tensor([[[-1.0, 0.1], [1.0, 0.1]]])), torch.tensor([-0.15]))


def test_a_waypoint_out_of_reach_is_approached_at_the_speed_limit_and_a_disc_ends_the_episode() -> None:
    scenes, _ = scenes_of([7])
    out = run_episodes(lambda seen, rows: seen[:, None, 4:6].expand(-1, HORIZON, -1), [7])  # straight at the goal
    moves = out.path[0].diff(dim=0).square().sum(-1).sqrt()
    torch.testing.assert_close(moves[: int(out.steps)], torch.full((int(out.steps),), simulator.MAX_SPEED))
    assert out.collided.all() and not out.success.any()
    assert (moves[int(out.steps) :] == 0).all()
    assert (simulator.way_clearance(scenes, out.path[:, : int(out.steps)]) >= 0).all()


def test_who_stands_still_fails_without_a_collision() -> None:
    out = run_episodes(lambda seen, rows: seen[:, None, :2].expand(-1, HORIZON, -1), range(4), limit=16)
    assert not out.success.any() and not out.collided.any() and (out.steps == 16).all()


def test_arguments_are_checked() -> None:
    expert = Expert([0])
    with pytest.raises(ValueError, match="execute must be from 1 to 16, not 17"):
        rollout(expert, [0], execute=17)
    with pytest.raises(ValueError, match="limit must be from 1 to 40, not 0"):
        rollout(expert, [0], limit=0)
    with pytest.raises(ValueError, match="at least one seed"):
        scenes_of([])
    with pytest.raises(ValueError, match="seeds must be from 0 to 1073741823, got -1"):
        scenes_of([-1])
    with pytest.raises(ValueError, match=r"must return waypoints of shape \(1, 16, 2\), not \(1, 3, 2\)"):
        rollout(lambda seen, rows: torch.zeros(len(rows), 3, 2), [0])
    with pytest.raises(ValueError, match=r"sample must have shape \[B, 16, 2\], not \[1, 8, 2\]"):
        tiny()(torch.zeros(1, 8, 2), 0, torch.zeros(1, OBSERVATION))
    with pytest.raises(ValueError, match=r"global_cond must have shape \[2, 15\], not \[1, 15\]"):
        tiny()(torch.zeros(2, HORIZON, 2), 0, torch.zeros(1, OBSERVATION))


# ------------------------------------------------------------------------------------------------------------ the policy


def test_it_is_saved_and_loaded_as_a_diffusers_model(tmp_path: Path) -> None:
    policy = tiny()
    policy.save_pretrained(tmp_path)
    again = ReachPolicy.from_pretrained(tmp_path, local_files_only=True).eval()
    sample, seen = torch.randn(2, HORIZON, 2), observations(2)
    assert again.config.layers == 3 and torch.equal(again(sample, 5, seen), policy(sample, 5, seen))


def test_timesteps_may_be_numbers_scalars_or_one_for_each_row() -> None:
    policy, sample, seen = tiny(), torch.randn(3, HORIZON, 2), observations(3)
    expected = policy(sample, 7, seen)
    assert expected.shape == sample.shape and expected.abs().sum() > 0
    assert torch.equal(policy(sample, torch.tensor(7), seen), expected)
    torch.testing.assert_close(policy(sample, torch.tensor([7, 7, 7]), seen), expected)
    torch.testing.assert_close(policy(sample, 7, seen, policy.remember(seen)), expected, rtol=0, atol=0)
    assert not torch.equal(policy(sample, 8, seen), expected)


def test_it_does_not_matter_where_the_scene_lies_how_it_is_turned_nor_how_its_discs_are_ordered() -> None:
    policy, sample, seen = tiny(), torch.randn(2, HORIZON, 2), observations(2)
    expected = policy(sample, 30, seen)
    moved = seen.clone()
    for x in (0, 4, 6, 9, 12):
        moved[:, x : x + 2] += torch.tensor([0.3, -0.2])
    swapped = torch.cat([seen[:, :6], seen[:, 9:12], seen[:, 6:9], seen[:, 12:]], 1)
    for other in (moved, swapped):
        torch.testing.assert_close(policy(sample, 30, other), expected, rtol=1e-4, atol=1e-5)
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    turned = seen.clone()
    for x in (0, 2, 4, 6, 9, 12):
        turned[:, x : x + 2] = seen[:, x : x + 2] @ turn
    torch.testing.assert_close(policy(sample @ turn, 30, turned), expected @ turn, rtol=1e-4, atol=1e-5)


def test_a_caching_runtime_finds_its_blocks_and_their_parts_and_changes_nothing_by_itself() -> None:
    policy, seen = tiny(), observations(3)
    generators = [[torch.Generator().manual_seed(i) for i in range(3)] for _ in range(2)]
    plain = sample_actions(policy, new_scheduler(), seen, generators[0], 10)
    with hasten.attach(policy, hasten.DeltaDiT(interval=1), num_inference_steps=10) as session:
        cached = sample_actions(policy, new_scheduler(), seen, generators[1], 10, session)
        assert session.trace is not None
        assert session.trace.sites == ("blocks.0", "blocks.1", "blocks.2") and len(session.trace.chains) == 1
        for block in session.trace.blocks:
            assert [part.kind for part in block.parts] == ["attention", "cross-attention", "feed-forward"]
    assert torch.equal(cached, plain)


def test_sampling_depends_on_the_seed_and_not_on_batch_mates() -> None:
    policy, scheduler, seen = tiny(), new_scheduler(), observations(4)

    def draw(rows: list[int], seed: int = 0) -> Tensor:
        return sample_actions(policy, scheduler, seen[rows], [torch.Generator().manual_seed(seed + row) for row in rows], 20)

    everyone = draw([0, 1, 2, 3])
    assert everyone.shape == (4, HORIZON, 2) and everyone.dtype == torch.float32
    assert torch.equal(draw([0, 1, 2, 3]), everyone)
    torch.testing.assert_close(draw([3, 1]), everyone[[3, 1]], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(draw([0, 1, 2, 3], 10), everyone)


# ------------------------------------------------------------------------------------------------------ what was trained


def test_the_folder_is_small_and_in_bf16_and_its_card_tells_what_was_measured() -> None:
    from safetensors import safe_open

    folder = weights_folder()
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 2_000_000
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        tensors = file.keys()
        assert {file.get_slice(tensor).get_dtype() for tensor in tensors} == {"BF16"}
    results, card = json.loads((folder / "results.json").read_text()), (folder / "README.md").read_text()
    assert results["episodes"] >= 1_000 and results["success"] >= 0.95
    for key in ("success", "collided", "left", "mean_way_success"):
        assert f"{100 * results[key]:.1f}%" in card
    assert results["git"] in card
    assert (folder / "training_log.jsonl").stat().st_size > 0


def test_the_policy_arrives_on_either_side() -> None:
    policy, scheduler = load_policy()
    seeds = range(5_000, 5_040)
    with torch.autocast("cpu", torch.bfloat16):
        out = run_episodes(Sampler(policy, scheduler, seeds), seeds)
    assert out.success.float().mean() >= 0.9
    assert 0.25 <= passed_on(scenes_of(seeds)[0], out.path).float().mean() <= 0.75


def test_it_chooses_a_side_by_its_noise() -> None:
    policy, scheduler = load_policy()
    scenes, _ = scenes_of(range(5_000, 5_004))
    rows = torch.arange(4).repeat_interleave(8)
    seen = observe(scenes, scenes.start, torch.zeros(4, 2))[rows]
    with torch.autocast("cpu", torch.bfloat16):
        chunk = sample_actions(policy, scheduler, seen, torch.Generator().manual_seed(0))
    sides = passed_on(scenes.at(rows), chunk).view(4, 8)
    assert (sides == LEFT).any(1).sum() >= 3 and (sides == RIGHT).any(1).sum() >= 3


def test_episodes_do_not_depend_on_their_batch_mates() -> None:
    policy, scheduler = load_policy()
    seeds = [5_000, 5_001, 5_002]
    together = run_episodes(Sampler(policy, scheduler, seeds, 10), seeds)
    alone = run_episodes(Sampler(policy, scheduler, seeds[1:2], 10), seeds[1:2])
    again = run_episodes(Sampler(policy, scheduler, seeds, 10), seeds)
    assert torch.equal(together.path, again.path)
    torch.testing.assert_close(alone.path[0], together.path[1], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_policy_arrives_in_at_least_95_of_100_episodes() -> None:
    policy, scheduler = load_policy()
    seeds = range(1_000)
    with torch.autocast("cpu", torch.bfloat16):
        assert rollout(Sampler(policy, scheduler, seeds), seeds).float().mean() >= 0.95
