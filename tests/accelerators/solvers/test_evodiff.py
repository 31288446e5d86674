"""EVODiff against its formulas written out, its degenerate cases, and problems whose solution is known."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from hasten.accelerators.solvers.evodiff import Interval, correction, first_order, probe_offset, projection
from hasten.accelerators.steering.levels import AlphaSigma
from tests.accelerators.solvers.runs import DENOISERS, Path, angles, apart, ddim, dpm_2m, evodiff, flow, noise, pictures

EVEN, TURNS = flow(12)[2:], angles(12)[2:]


def written_out(xs: Tensor, ms: Tensor, path: Path, progress: float, short: bool) -> tuple[Tensor, Tensor]:
    """Probe and corrected state of one interval [C, P], as the method is stated with kappa = sigma / alpha and h, one channel at a time."""
    (a1, s1), (a0, s0), (at, st) = path
    k1, k0, kt = s1 / a1, s0 / a0, st / at
    h, rl = 1 / kt - 1 / k0, math.log(k1 / k0) / math.log(k0 / kt)
    w, bal = 0.5 * (1 - progress**2), math.sqrt((st / s0) / (s0 / s1))

    def sig(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    def share(u: Tensor, v: Tensor) -> float:
        return max(-2.0, min(2.0, float(u @ v) / float(v @ v)))

    probes, states = [], []
    for x, m1, m0, mt in zip(xs, *ms, strict=True):
        euler = st / s0 * x + st * h * m0
        r1 = (1 - w) * bal + w * share(m0, m1)
        d1 = m0 - r1 * m1
        ri = min(max(sig(0.25 * abs(r1)) * rl, 0.25 * rl), 1.5 * rl)
        probe = euler + 0.5 * st * h / ri * d1
        r2 = (1 - w) * bal + w * share(mt, m0)
        d2 = mt - r2 * m0
        bp, bn = d1 / (rl * h), rl * d2 / h
        eta = 0.5 * sig(abs(0.5 * share(bn + bp, bn - bp)))
        b = -eta * d1 / rl + (1 - eta) * rl * d2
        q = abs(share(probe - euler - 0.5 * st * h / ri * b, d1) / (h * st)) - 0.5
        zeta = sig(q) if short else sig(-q * sig(share(m0, (m0 - m1) / h) * (2 - (st / s0) ** 2)))
        probes.append(probe)
        states.append(euler + 0.5 * st * h / zeta * b)
    return torch.stack(probes), torch.stack(states)


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("path", [EVEN[1:4], TURNS[4:7], [AlphaSigma(1.0, s) for s in (9.0, 4.0, 1.0)]], ids=["flow", "vp", "edm"])
def test_one_interval_is_what_the_formulas_say(path: Path, short: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x, m1 = torch.randn(2, 2, 3, 4, 5, generator=generator, dtype=torch.float64)
    m0 = m1 + 0.2 * torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    mt = m0 + 0.3 * torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    interval = Interval(*path, progress=0.6, short=short)
    probe = first_order(x, m0, path[1], path[2]) + probe_offset(m0, m1, interval)
    state = probe + correction(mt, m0, m1, interval)
    for row in range(2):
        flat = [tensor[row].flatten(1) for tensor in (x, m1, m0, mt)]
        expected = written_out(flat[0], torch.stack(flat[1:]), path, 0.6, short)
        torch.testing.assert_close((probe[row].flatten(1), state[row].flatten(1)), expected)


@pytest.mark.parametrize("path", [EVEN, TURNS], ids=["flow", "vp"])
@pytest.mark.parametrize("short", [True, False])
def test_without_anything_new_it_is_of_first_order(path: Path, short: bool) -> None:
    m = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    interval = Interval(*path[1:4], progress=0.5, short=short, balanced=False)
    assert probe_offset(m, m, interval).abs().max() < 1e-12
    assert correction(m, m, m, interval).abs().max() < 1e-12
    zero = torch.zeros_like(m)
    assert not probe_offset(zero, zero, interval).any() and not correction(zero, zero, zero, interval).any()
    geometric = Interval(*(AlphaSigma(math.sqrt(1 - s * s), s) for s in (0.8, 0.4, 0.2)), progress=0.5, short=short)
    assert probe_offset(m, m, geometric).abs().max() < 1e-12, "as published, where the noise falls by equal ratios"
    assert correction(m, m, m, geometric).abs().max() < 1e-12


@pytest.mark.parametrize("steps", [1, 2, 7, 25])
def test_a_single_picture_is_reached_exactly(steps: int) -> None:
    """The estimate is the same everywhere, so every step of DDIM is exact, and so must be EVODiff's without the balance."""
    target = torch.linspace(-1, 1, 192, dtype=torch.float64).view(1, 3, 8, 8)
    for path in (flow(steps), angles(steps)):
        middle = [*path[:-1], AlphaSigma(0.98, 0.02)]
        found = evodiff(lambda x, at: target.expand_as(x), noise(2), middle, balanced=False)
        torch.testing.assert_close(found, ddim(lambda x, at: target.expand_as(x), noise(2), middle))
        torch.testing.assert_close(evodiff(lambda x, at: target.expand_as(x), noise(2), path), target.expand(2, -1, -1, -1))


def test_the_balance_does_not_vanish_with_many_steps_where_the_noise_falls_evenly() -> None:
    """Why flows go without it: equal estimates differ by an amount that depends on the place in the grid, not on how fine it is."""
    target = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    offsets = [float(probe_offset(target, target, Interval(*flow(n)[-4:-1], progress=0.0))[0, 0, 0, 0]) for n in (20, 200, 2000)]
    assert min(map(abs, offsets)) > 0.01 and offsets[2] == pytest.approx(offsets[1], rel=0.1)


def test_projections_are_taken_per_row_and_channel() -> None:
    u, v = torch.randn(2, 2, 3, 4, 5, 6, dtype=torch.float64).unbind()
    expected = torch.stack(
        [torch.stack([(a * b).sum() / (b * b).sum() for a, b in zip(*rows, strict=True)]) for rows in zip(u, v, strict=True)]
    )
    torch.testing.assert_close(projection(u, v)[:, :, 0, 0, 0], expected.clamp(-2, 2))
    torch.testing.assert_close(projection(u.flatten(2).mT, v.flatten(2).mT)[:, 0], expected.clamp(-2, 2))
    assert projection(u[:, 0].flatten(1), v[:, 0].flatten(1)).shape == (2, 1)
    assert projection(torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 1e-3)).item() == 2
    assert projection(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).item() == 0


@pytest.mark.parametrize("path", [flow, angles])
def test_a_row_does_not_depend_on_its_batch_mates(path) -> None:  # type: ignore[no-untyped-def]
    x = noise(3)
    torch.testing.assert_close(evodiff(pictures, x, path(8))[1:2], evodiff(pictures, x[1:2], path(8)))


def one_mode(latents: Tensor, at: AlphaSigma) -> Tensor:
    """Posterior mean of a Gaussian around a picture, whose probability flow is linear: orders show without many steps."""
    centre = torch.linspace(-1, 1, 192, dtype=torch.float64).view(1, 3, 8, 8)
    return centre + at.alpha * 0.25 / (at.alpha**2 * 0.25 + at.sigma**2) * (latents - at.alpha * centre)


@pytest.mark.parametrize("path", [flow, angles])
def test_measured_orders(path) -> None:  # type: ignore[no-untyped-def]
    """DDIM is of order 1 and DPM-Solver++ of order 2; the projections leave EVODiff at order 1, and the balance at order 0, where the
    noise falls to 0 evenly."""
    x = noise(2)
    reference = dpm_2m(one_mode, x, path(1000))
    solvers = {"DDIM": ddim, "2M": dpm_2m, "EVODiff": evodiff, "unbalanced": partial(evodiff, balanced=False)}
    errors = {name: [apart(solve(one_mode, x, path(steps)), reference) for steps in (80, 160)] for name, solve in solvers.items()}
    order = {name: math.log2(coarse / fine) for name, (coarse, fine) in errors.items()}
    assert order == {
        "DDIM": pytest.approx(1.0, abs=0.05),
        "2M": pytest.approx(1.65, abs=0.2),
        "EVODiff": pytest.approx(-0.06, abs=0.05),
        "unbalanced": pytest.approx(0.9, abs=0.1),
    }
    assert errors["unbalanced"][1] < 0.6 * errors["DDIM"][1] < 0.1 * errors["EVODiff"][1]


def test_it_is_ahead_of_the_first_order_on_a_mixture() -> None:
    x = noise(8, 3)
    for path in (flow, angles):
        reference = dpm_2m(DENOISERS["numbers"], x, path(600))
        for steps in (15, 20):
            found, first = (apart(solve(DENOISERS["numbers"], x, path(steps)), reference) for solve in (evodiff, ddim))
            assert found < 0.85 * first, steps
