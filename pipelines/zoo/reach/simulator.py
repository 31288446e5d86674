"""The `reach` world: a point effector in the plane must reach a goal around discs, with a way round on either side of them.

Everything is a function of the episodes' seeds and works on a batch of episodes at once. A scene is accepted only if the expert
finds a way on both sides, and if the mean of the two ways runs well into a disc: a policy that averages the expert's choices fails.

Lengths are in workspace units; scenes lie about in the square [-1, 1] x [-1, 1]. Time is counted in steps, one waypoint each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

OBSTACLES = 3
HORIZON = 16
"""Waypoints in an action chunk."""
EXECUTE = 8
"""Waypoints of a chunk that are carried out before the policy is asked again."""
LIMIT = 40
"""Steps after which an episode has failed; the longest of 80,000 ways of the expert takes 33."""
SPEED = 0.08
"""Distance between the expert's waypoints."""
MAX_SPEED = 0.12
"""Farthest that the effector moves in a step, whatever the waypoint says."""
TOLERANCE = 0.06
"""Distance from the goal at which it is reached."""
MARGIN = 0.1
"""Free space that the expert keeps from every disc."""

OBSERVATION = 6 + 3 * OBSTACLES
"""Entries of an observation: position (2), last displacement (2), goal (2), then x, y and radius of each disc."""

LEFT, RIGHT = 0, 1
"""Sides of the line from start to goal, as seen by who walks along it."""

_DRAWS = 4 + 3 * OBSTACLES
_CURVE = 49  # points of a candidate way; 0.04 apart at most, so that the clearance between two of them is off by 0.002
_AMPLITUDES = 36
_SKEWS = (0.7, 1.0, 1.4)


class Scenes(NamedTuple):
    """A batch of scenes; all float32."""

    start: Tensor  # [B, 2]
    goal: Tensor  # [B, 2]
    centre: Tensor  # [B, OBSTACLES, 2]
    radius: Tensor  # [B, OBSTACLES]

    def at(self, index: Tensor) -> Scenes:
        """The scenes of the given rows."""
        return Scenes._make(field[index] for field in self)


class Episodes(NamedTuple):
    """What happened in a batch of episodes."""

    success: Tensor  # [B] bool: the goal was reached in time and no disc was touched before
    collided: Tensor  # [B] bool
    steps: Tensor  # [B] int64: steps until the episode ended
    path: Tensor  # [B, LIMIT + 1, 2]: positions, the last one repeated after the end


class Policy(Protocol):
    """Chooses the next waypoints."""

    def __call__(self, observations: Tensor, episodes: Tensor, /) -> Tensor:
        """Waypoints [n, HORIZON, 2] in the workspace, from observations [n, OBSERVATION] of the running episodes [n] (indices of seeds)."""
        ...


def clearance(scenes: Scenes, points: Tensor) -> Tensor:
    """Distance of points [B, ..., 2] from the nearest disc of their scene, [B, ...]; negative inside."""
    shape = (len(points), *(1,) * (points.ndim - 2), OBSTACLES)
    offset = points[..., None, :] - scenes.centre.view(*shape, 2)
    return (offset.square().sum(-1).sqrt() - scenes.radius.view(shape)).amin(-1)


def way_clearance(scenes: Scenes, way: Tensor) -> Tensor:
    """Smallest distance of ways [B, ..., T, 2] from the discs, straight lines between waypoints included, [B, ...]."""
    begin, step = way[..., :-1, None, :], way.diff(dim=-2)[..., None, :]
    shape = (len(way), *(1,) * (way.ndim - 2), OBSTACLES)
    centre = scenes.centre.view(*shape, 2)
    along = ((centre - begin) * step).sum(-1) / step.square().sum(-1).clamp(min=1e-12)
    nearest = begin + along.clamp(0, 1)[..., None] * step
    return ((nearest - centre).square().sum(-1).sqrt() - scenes.radius.view(shape)).amin((-1, -2))


def _frame(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """The line from start to goal [B, 2] and the unit normal to its left [B, 2]."""
    line = scenes.goal - scenes.start
    unit = line / line.square().sum(-1, keepdim=True).sqrt()
    return line, torch.stack([-unit[:, 1], unit[:, 0]], -1)


def _ways(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """The expert's way on either side, [B, 2, LIMIT + 1, 2], and whether there is one, [B, 2].

    A way is the line from start to goal plus a skewed half-wave across it: of all that keep MARGIN, the one that bends least. Its
    waypoints are SPEED apart and stay at the goal from its arrival on.
    """
    line, normal = _frame(scenes)
    t = torch.linspace(0, 1, _CURVE)
    # Ordered by how much they bend, so that the first that is free is the one that is wanted.
    amplitude = torch.linspace(0.15, 1.0, _AMPLITUDES).repeat_interleave(len(_SKEWS))
    skew = torch.tensor(_SKEWS).repeat(_AMPLITUDES)
    order = (amplitude * (1 + 0.3 * skew.log().abs())).argsort(stable=True)
    waves = (amplitude[:, None] * torch.sin(math.pi * t ** skew[:, None]))[order]
    waves = torch.stack([waves, -waves])  # [2, K, T]: to the left and to the right
    # In the frame of the line a disc's distance splits into a part that all curves share and one that all scenes do.
    offset = scenes.centre - scenes.start[:, None]
    length = line.square().sum(-1).sqrt()
    along = t * length[:, None, None] - (offset * (line / length[:, None])[:, None]).sum(-1)[..., None]  # [B, OBSTACLES, T]
    across = (offset * normal[:, None]).sum(-1)
    room = along.square() - (scenes.radius + MARGIN).square()[..., None]
    free = torch.ones(len(line), 2, len(order), dtype=torch.bool)
    for i in range(OBSTACLES):
        distance = (waves - across[:, i, None, None, None]).square_().add_(room[:, i, None, None])
        free &= distance.amin(-1) >= 0
    wave = waves[torch.arange(2), free.int().argmax(-1)]  # [B, 2, T]
    straight = scenes.start[:, None] + t[:, None] * line[:, None]
    chosen = straight[:, None] + wave[..., None] * normal[:, None, None]
    return _paced(chosen), free.any(-1)


def _paced(curves: Tensor) -> Tensor:
    """Points [..., LIMIT + 1, 2] that are SPEED apart along curves [..., T, 2]."""
    lengths = curves.diff(dim=-2).square().sum(-1).sqrt()
    arc = torch.cat([torch.zeros_like(lengths[..., :1]), lengths.cumsum(-1)], -1)
    wanted = torch.minimum(SPEED * torch.arange(LIMIT + 1.0), arc[..., -1:])
    after = torch.searchsorted(arc, wanted).clamp(1, arc.shape[-1] - 1)
    low, high = arc.gather(-1, after - 1), arc.gather(-1, after)
    share = ((wanted - low) / (high - low).clamp(min=1e-9))[..., None]
    pair = (*after.shape, 2)
    before_point = curves.gather(-2, (after - 1)[..., None].expand(pair))
    after_point = curves.gather(-2, after[..., None].expand(pair))
    return before_point + share * (after_point - before_point)


def _drawn(u: Tensor) -> tuple[Scenes, Tensor]:
    """Scenes of uniform numbers [B, _DRAWS], and whether start and goal have room, [B]."""
    length, angle = 1.0 + 0.5 * u[:, 0], 2 * math.pi * u[:, 1]
    unit = torch.stack([angle.cos(), angle.sin()], -1)
    normal = torch.stack([-unit[:, 1], unit[:, 0]], -1)
    start = 0.5 * (u[:, 2:4] - 0.5) - 0.5 * length[:, None] * unit
    disc = u[:, 4:].view(-1, OBSTACLES, 3)
    # The first disc stands in the way, the others to its sides.
    along = torch.cat([0.35 + 0.3 * disc[:, :1, 0], 0.1 + 0.8 * disc[:, 1:, 0]], 1)
    beside = 2 * disc[..., 1] - 1
    across = torch.cat([0.08 * beside[:, :1], beside[:, 1:].sign() * (0.2 + 0.55 * beside[:, 1:].abs())], 1)
    radius = torch.cat([0.16 + 0.1 * disc[:, :1, 2], 0.08 + 0.08 * disc[:, 1:, 2]], 1)
    centre = start[:, None] + (along * length[:, None])[..., None] * unit[:, None] + across[..., None] * normal[:, None]
    scenes = Scenes(start, start + length[:, None] * unit, centre, radius)
    return scenes, torch.minimum(clearance(scenes, scenes.start), clearance(scenes, scenes.goal)) >= 2 * MARGIN


def stream_of(seed: int, purpose: int) -> torch.Generator:
    """A generator for one purpose of an episode: 0 draws the scene, 1 the expert's side, 2 a policy's noise.

    Raises:
        ValueError: `seed` is outside 0 to 2**30 - 1.
    """
    if not 0 <= seed < 1 << 30:
        raise ValueError(f"seeds must be from 0 to {(1 << 30) - 1}, got {seed}")
    # torch's CPU generator reads the lower 32 bits only, so the purpose must lie among them.
    return torch.Generator().manual_seed(int(seed) + (purpose << 30))


def scenes_of(seeds: Sequence[int]) -> tuple[Scenes, Tensor]:
    """The scenes of the seeds, and the expert's ways on their left and right, [B, 2, LIMIT + 1, 2].

    A row depends on its own seed only.

    Raises:
        ValueError: There is no seed, or one is outside 0 to 2**30 - 1.
    """
    if not len(seeds):
        raise ValueError("seeds must hold at least one seed")
    generators = [stream_of(seed, 0) for seed in seeds]
    scenes = Scenes(*(torch.zeros(len(seeds), *shape) for shape in ((2,), (2,), (OBSTACLES, 2), (OBSTACLES,))))
    ways = torch.zeros(len(seeds), 2, LIMIT + 1, 2)
    todo = list(range(len(seeds)))
    while todo:
        left = []
        for at in range(0, len(todo), 256):  # the candidate ways of 256 scenes take 11 MB
            rows = torch.tensor(todo[at : at + 256])
            drawn, ok = _drawn(torch.stack([torch.rand(_DRAWS, generator=generators[row]) for row in rows.tolist()]))
            pair, found = _ways(drawn)
            ok &= found.all(1) & (way_clearance(drawn, pair.mean(1)) < -MARGIN / 2) & (way_clearance(drawn, pair) > 0).all(1)
            for field, value in zip(scenes, drawn, strict=True):
                field[rows[ok]] = value[ok]
            ways[rows[ok]] = pair[ok]
            left += rows[~ok].tolist()
        todo = left
    return scenes, ways


def sides_of(seeds: Sequence[int]) -> Tensor:
    """The side, LEFT or RIGHT, that the expert takes in each episode, [B] int64: a fair coin that is thrown by the seed."""
    return torch.cat([torch.randint(2, (1,), generator=stream_of(seed, 1)) for seed in seeds])


def passed_on(scenes: Scenes, path: Tensor) -> Tensor:
    """The side, LEFT or RIGHT, on which paths [B, T, 2] go round the first disc, [B] int64."""
    line, normal = _frame(scenes)
    offset = path - scenes.centre[:, :1]
    # Where the path is level with the disc's centre, as measured along the line from start to goal.
    level = (offset * line[:, None]).sum(-1).abs().argmin(1)
    across = (offset[torch.arange(len(path)), level] * normal).sum(-1)
    return torch.where(across > 0, LEFT, RIGHT)


def observe(scenes: Scenes, position: Tensor, displacement: Tensor) -> Tensor:
    """Observations [B, OBSERVATION] at positions [B, 2] that were reached by a displacement [B, 2] in the last step."""
    discs = torch.cat([scenes.centre, scenes.radius[..., None]], -1).flatten(1)
    return torch.cat([position, displacement, scenes.goal, discs], -1)


class Expert:
    """Follows one of the two ways of each scene.

    Args:
        seeds: Of the episodes.
        sides: [B] LEFT or RIGHT; `sides_of(seeds)` by default.
    """

    def __init__(self, seeds: Sequence[int], sides: Tensor | None = None) -> None:
        _, ways = scenes_of(seeds)
        self.ways = ways[torch.arange(len(seeds)), sides_of(seeds) if sides is None else sides]

    def __call__(self, observations: Tensor, episodes: Tensor, /) -> Tensor:
        ways = self.ways[episodes]
        nearest = (ways - observations[:, None, :2]).square().sum(-1).argmin(1)
        ahead = (nearest[:, None] + 1 + torch.arange(HORIZON)).clamp(max=LIMIT)
        return ways.gather(1, ahead[..., None].expand(-1, -1, 2))


@torch.no_grad()
def run_episodes(policy: Policy, seeds: Sequence[int], *, execute: int = EXECUTE, limit: int = LIMIT) -> Episodes:
    """Runs one episode for each seed, all in one batch, with a receding horizon.

    Args:
        policy: Is asked for the running episodes only, every `execute` steps.
        seeds: Of the scenes.
        execute: Waypoints of a chunk that are carried out, 1 to HORIZON.
        limit: Steps after which an episode has failed, 1 to LIMIT.

    Raises:
        ValueError: An argument is outside its range, there is no seed, or the policy's chunk has another shape than [n, HORIZON, 2].
    """
    if not 1 <= execute <= HORIZON:
        raise ValueError(f"execute must be from 1 to {HORIZON}, not {execute}")
    if not 1 <= limit <= LIMIT:
        raise ValueError(f"limit must be from 1 to {LIMIT}, not {limit}")
    scenes, _ = scenes_of(seeds)
    position, displacement = scenes.start.clone(), torch.zeros_like(scenes.start)
    success, collided = (torch.zeros(len(seeds), dtype=torch.bool) for _ in range(2))
    steps = torch.full((len(seeds),), limit)
    path = position[:, None].repeat(1, LIMIT + 1, 1)
    for begin in range(0, limit, execute):
        running = (~(success | collided)).nonzero()[:, 0]
        if not len(running):
            break
        chunk = policy(observe(scenes.at(running), position[running], displacement[running]), running)
        if chunk.shape != (len(running), HORIZON, 2):
            raise ValueError(f"the policy must return waypoints of shape {(len(running), HORIZON, 2)}, not {tuple(chunk.shape)}")
        for k in range(min(execute, limit - begin)):
            still = ~(success | collided)[running]
            rows = running[still]
            move = chunk[still, k].to(position) - position[rows]
            move = move * (MAX_SPEED / move.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-9)).clamp(max=1)
            reached = position[rows] + move
            hit = way_clearance(scenes.at(rows), torch.stack([position[rows], reached], 1)) < 0
            position[rows], displacement[rows] = reached, move
            path[rows, begin + k + 1 :] = reached[:, None]
            collided[rows] = hit
            success[rows] = ~hit & ((reached - scenes.goal[rows]).square().sum(-1).sqrt() <= TOLERANCE)
            steps[rows[(success | collided)[rows]]] = begin + k + 1
    return Episodes(success, collided, steps, path)


def rollout(policy: Policy, seeds: Sequence[int], *, execute: int = EXECUTE, limit: int = LIMIT) -> Tensor:
    """Whether each episode succeeded, [B] bool: the goal reached in time and no disc touched. See `run_episodes`."""
    return run_episodes(policy, seeds, execute=execute, limit=limit).success
