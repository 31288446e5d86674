"""Learned time grids: the timesteps of a short run are chosen among the nodes of a long one, by dynamic programming.

A long run of the same denoiser is recorded on calibration prompts. What one step from node to node would miss is then known for every pair
of nodes without a further denoiser call, and the best chain of so many steps is found as the caching planner finds its segments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hasten.accelerators.caching.solver import segment_dp
from hasten.accelerators.solvers.evodiff import first_order
from hasten.accelerators.steering.levels import AlphaSigma

FAINTEST = 0.02
"""Least signal by which an error is divided: at levels of noise only, the estimates of the clean sample say nothing."""
SCALE = 0.5
"""Errors are measured half-way between the scale of the latents (0) and that of the data (1, latents over alpha): the one lets early
mistakes pass that decide which picture it becomes, the other spends the whole grid on them where estimates begin as poor as they do with
guidance. On the mixtures of the tests 0.5 is better than the even grid at every number of steps from 5 to 10; 0 is not."""


def first_order_errors(states: Sequence[Tensor], x0: Sequence[Tensor], path: Sequence[AlphaSigma], scale: float = SCALE) -> np.ndarray:
    """What one first-order step (DDIM, Euler) misses between any two nodes of a recorded run.

    Args:
        states: M + 1 tensors [N, ...], the latents at the nodes, the finished sample last.
        x0: M tensors [N, ...], the denoiser's estimates of the clean sample at all nodes but the last.
        path: M + 1 coefficients, of falling noise.
        scale: Power of alpha that errors are divided by.

    Returns:
        float64 [M + 1, M + 1], errors relative to the finished samples; entry [a, b] is that of the step from node a to node b, and
        infinite unless a < b.

    Raises:
        ValueError: The lengths do not fit.
    """
    nodes = _nodes(states, x0, path)
    errors = np.full((nodes + 1, nodes + 1), np.inf)
    for a in range(nodes):
        for b in range(a + 1, nodes + 1):
            errors[a, b] = _missed(first_order(states[a], x0[a], path[a], path[b]), states, path, b, scale)
    return errors


def second_order_errors(states: Sequence[Tensor], x0: Sequence[Tensor], path: Sequence[AlphaSigma], scale: float = SCALE) -> np.ndarray:
    """What one step of a two-step solver (DPM-Solver++ 2M, arXiv 2211.01095) misses.

    Args:
        states, x0, path, scale: As for `first_order_errors`.

    Returns:
        float64 [M + 1, M + 1, M + 1]; entry [p, a, b] is the error of the step from node a to node b when the step before began at node p,
        [0, 0, b] that of the first step, of first order as the step to the clean sample is. All others are infinite.

    Raises:
        ValueError: The lengths do not fit.
    """
    nodes = _nodes(states, x0, path)
    errors = np.full((nodes + 1,) * 3, np.inf)
    log_snr = [math.log(max(at.alpha, FAINTEST) / at.sigma) if at.sigma else math.inf for at in path]
    for a in range(nodes):
        for b in range(a + 1, nodes + 1):
            plain = first_order(states[a], x0[a], path[a], path[b])
            if a == 0 or path[b].sigma == 0:
                errors[: max(1, a), a, b] = _missed(plain, states, path, b, scale)
                continue
            span = path[b].alpha - path[b].sigma * path[a].alpha / path[a].sigma
            for p in range(a):
                # Nodes where there is next to no signal are all alike.
                if log_snr[p] < log_snr[a]:
                    slope = (log_snr[b] - log_snr[a]) / (log_snr[a] - log_snr[p])
                    errors[p, a, b] = _missed(plain + 0.5 * span * slope * (x0[a] - x0[p]), states, path, b, scale)
    return errors


def learned_grid(errors: np.ndarray, steps: int) -> list[int]:
    """The nodes of the chain of so many steps with the least sum of errors.

    Squared errors make the largest one count for more, which suits two-step solvers: pass `errors**2`.

    Args:
        errors: [M + 1, M + 1] or [M + 1, M + 1, M + 1], of at least 0, as the functions above give them for any solver.
        steps: Denoiser calls of the run.

    Returns:
        steps + 1 nodes, from 0 to M.

    Raises:
        ValueError: The table is not square or holds NaN, or there is no chain of that many steps with finite errors.
    """
    errors = np.asarray(errors, dtype=np.float64)
    if errors.ndim not in (2, 3) or len(set(errors.shape)) != 1 or len(errors) < 2:
        raise ValueError(f"errors must be [M + 1, M + 1] or [M + 1, M + 1, M + 1], not {list(errors.shape)}")
    if not (errors >= 0).all():
        raise ValueError("errors must be numbers of at least 0")
    nodes = len(errors) - 1
    if type(steps) is not int or not 1 <= steps <= nodes:
        raise ValueError(f"steps must be a whole number from 1 to the recorded ones, {nodes}, not {steps!r}")
    if errors.ndim == 2:
        # A step from a to b is the segment of the recorded steps a to b - 1. The programme works in float32: no absolute scale is lost.
        finite = errors[np.isfinite(errors)]
        return [*segment_dp(errors[:-1, 1:] / (finite.max(initial=0.0) or 1.0), steps).starts(steps), nodes]
    return _chain(errors, steps)


def refined_grid(grid: Sequence[int], nodes: int, error: Callable[[Sequence[int]], float], calls: int = 200) -> list[int]:
    """Moves the points of a grid, one at a time, while the error of the whole run falls.

    For a solver whose errors do not add up, and where the denoiser is cheap enough to be asked: each trial is a short run. Few calibration
    samples are soon learned by heart.

    Args:
        grid: steps + 1 nodes from 0 to `nodes`, rising.
        nodes: The last node.
        error: Of a run along a grid, such as its distance from the recorded samples.
        calls: Most runs.

    Raises:
        ValueError: The grid does not rise from 0 to `nodes`, or `calls` is below 1.
    """
    best = list(grid)
    if len(best) < 2 or best[0] != 0 or best[-1] != nodes or any(a >= b for a, b in pairwise(best)):
        raise ValueError(f"grid must rise from 0 to nodes, {nodes}, not {best}")
    if calls < 1:
        raise ValueError(f"calls must be at least 1, not {calls!r}")
    least, seen, stride = error(best), {tuple(best)}, max(1, nodes // 10)
    while stride:
        moved = False
        for point in range(1, len(best) - 1):
            for move in (-stride, stride):
                trial = [*best[:point], best[point] + move, *best[point + 1 :]]
                if not trial[point - 1] < trial[point] < trial[point + 1] or tuple(trial) in seen:
                    continue
                if len(seen) >= calls:
                    return best
                seen.add(tuple(trial))
                value = error(trial)
                if value < least:
                    least, best, moved = value, trial, True
        if not moved:
            stride //= 2
    return best


def _chain(errors: np.ndarray, steps: int) -> list[int]:
    """The best chain where a step's error depends on the step before."""
    nodes = len(errors) - 1
    node = np.arange(nodes + 1)
    # value[a, b]: least sum of a chain whose last step is from a to b.
    value = np.full((nodes + 1, nodes + 1), np.inf)
    value[0, 1:] = errors[0, 0, 1:]
    errors = np.where((node[:, None, None] < node[:, None]) & (node[:, None] < node), errors, np.inf)
    came: list[np.ndarray] = []
    for _ in range(steps - 1):
        total = value[:, :, None] + errors
        came.append(total.argmin(0))
        value = total.min(0)
    start = int(value[:, nodes].argmin())
    if not np.isfinite(value[start, nodes]):
        raise ValueError(f"there is no chain of {steps} steps with finite errors")
    chain = [nodes, start]
    for previous in reversed(came):
        chain.append(int(previous[chain[-1], chain[-2]]))
    return chain[::-1]


def _nodes(states: Sequence[Tensor], x0: Sequence[Tensor], path: Sequence[AlphaSigma]) -> int:
    if not len(states) == len(path) == len(x0) + 1 or not len(x0):
        raise ValueError(f"a run of M steps has M + 1 states, M estimates and M + 1 levels, not {len(states)}, {len(x0)} and {len(path)}")
    return len(x0)


def _missed(reached: Tensor, states: Sequence[Tensor], path: Sequence[AlphaSigma], node: int, scale: float) -> float:
    size = max(path[node].alpha, FAINTEST) ** scale * torch.linalg.vector_norm(states[-1]).item()
    return torch.linalg.vector_norm(reached - states[node]).item() / size
