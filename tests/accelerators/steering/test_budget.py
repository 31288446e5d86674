"""The meter."""

from __future__ import annotations

import pytest

from hasten.accelerators.steering.budget import Budget, BudgetError, Cost, Meter


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_costs_add_up_and_multiply() -> None:
    assert Cost(1, 2, 3, 4) + Cost(10, 20, 30, 40) * 2 == Cost(21, 42, 63, 84)


@pytest.mark.parametrize("unit", ["particle_steps", "denoiser_rows", "decodes", "verifier_rows"])
def test_what_would_exceed_a_limit_is_not_charged(unit: str) -> None:
    meter = Meter(Budget(**{unit: 10}))
    meter.charge(Cost(**{unit: 7}))
    assert meter.allows(Cost(**{unit: 3})) and not meter.allows(Cost(**{unit: 4}))
    assert meter.lacking(Cost(**{unit: 4})) == unit
    with pytest.raises(BudgetError, match=f"11 {unit} would exceed the budget of 10"):
        meter.charge(Cost(**{unit: 4}))
    assert getattr(meter.spent, unit) == 7
    assert meter.to_json()["unspent"] == {unit: 3}
    with pytest.raises(BudgetError, match=f"the budget has 3 {unit} left, but one sample takes 4; raise {unit}"):
        meter.require_sample(Cost(**{unit: 4}))


def test_the_most_that_is_affordable_is_found() -> None:
    meter = Meter(Budget(particle_steps=100, decodes=7))
    assert meter.most(lambda n: Cost(particle_steps=9 * n, decodes=n), 50) == 7
    assert meter.most(lambda n: Cost(particle_steps=15 * n, decodes=n), 50) == 6
    assert meter.most(lambda n: Cost(particle_steps=n), 50) == 50
    assert meter.most(lambda n: Cost(particle_steps=101), 50) == 0
    # Jumps as of a method that needs more from the second particle on.
    assert meter.most(lambda n: Cost(particle_steps=10 if n == 1 else 60 + n), 50) == 40


def test_time_is_predicted_from_the_pace_so_far() -> None:
    clock = Clock()
    meter = Meter(Budget(seconds=10.0), clock)
    assert meter.predicted(Cost(1000, 1000, 1000, 1000)) == 0.0 and meter.allows(Cost(1000, 1000, 1000, 1000))
    meter.charge(Cost(4, 8, 2, 6))
    for phase, seconds in (("denoise", 2.0), ("decode", 1.0), ("verify", 3.0)):
        with meter.timing(phase):
            clock.now += seconds
    assert meter.predicted(Cost(2, 4, 1, 2)) == pytest.approx(1.0 + 0.5 + 1.0)
    assert meter.allows(Cost(8, 16)) and not meter.allows(Cost(9, 18))
    assert meter.lacking(Cost(9, 18)) == "seconds" and meter.lacking(Cost(9, 18), timed=False) is None
    clock.now += 4.0
    assert not meter.allows(Cost())
    with pytest.raises(BudgetError, match=r"the budget of 10\.0 seconds is used up before one sample can be finished"):
        meter.require_sample(Cost())
    assert "10.000 s of 10 (denoise 2.000, decode 1.000, verify 3.000)" in str(meter)


def test_time_is_counted_when_the_work_fails() -> None:
    clock = Clock()
    meter = Meter(clock=clock)
    with pytest.raises(RuntimeError), meter.timing("decode"):
        clock.now += 1.0
        raise RuntimeError
    assert meter.seconds["decode"] == 1.0


def test_a_budget_is_shared_evenly() -> None:
    assert Budget(particle_steps=10, decodes=4, seconds=3.0).share(3) == Budget(particle_steps=3, decodes=1, seconds=1.0)
    with pytest.raises(BudgetError, match="the budget of 4 decodes cannot be shared among 5; it must be at least 5"):
        Budget(decodes=4).share(5)


@pytest.mark.parametrize(
    "wrong", [{"decodes": 0}, {"particle_steps": 1.5}, {"denoiser_rows": True}, {"seconds": 0.0}, {"seconds": float("nan")}]
)
def test_limits_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        Budget(**wrong)  # type: ignore[arg-type]
