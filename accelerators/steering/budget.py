"""One meter for what steering and search spend: denoiser calls, decodes, verifier calls and seconds.

Papers on noise search count NFE, one for each denoiser call of each particle, and leave out guidance, decoding and the verifier; under
equal seconds plain best-of-N often wins (Flash-BoN, arXiv 2607.04461). So every unit is counted apart, and any of them can be limited.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

PHASES = ("denoise", "decode", "verify")


class BudgetError(ValueError):
    """A budget does not suffice; the message says in one line for what."""


@dataclass(frozen=True)
class Cost:
    """An amount of work. Costs add up and are multiplied by whole numbers.

    Attributes:
        particle_steps: Denoiser calls times particles: the papers' NFE, where guidance is not counted twice.
        denoiser_rows: Rows that went through the denoiser: twice the particle-steps under batched guidance.
        decodes: Latents that were decoded.
        verifier_rows: Images that were scored, times the verifiers that scored them.
    """

    particle_steps: int = 0
    denoiser_rows: int = 0
    decodes: int = 0
    verifier_rows: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in COUNTED))

    def __mul__(self, times: int) -> Cost:
        return Cost(*(getattr(self, name) * times for name in COUNTED))


COUNTED = tuple(entry.name for entry in fields(Cost))


@dataclass(frozen=True)
class Budget:
    """The most that a call may spend over all its prompts; None is without limit.

    Attributes:
        particle_steps, denoiser_rows, decodes, verifier_rows: As in `Cost`. These are never exceeded.
        seconds: Wall-clock time. Nothing is begun that would end later at the pace measured so far; before anything was measured there
            is no pace, so the first batch always runs.

    Raises:
        ValueError: A limit is not a number above 0.
    """

    particle_steps: int | None = None
    denoiser_rows: int | None = None
    decodes: int | None = None
    verifier_rows: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in COUNTED:
            limit = getattr(self, name)
            if limit is not None and (type(limit) is not int or limit < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, or None for no limit, not {limit!r}")
        if self.seconds is not None and (isinstance(self.seconds, bool) or not self.seconds > 0):
            raise ValueError(f"seconds must be above 0, or None for no limit, not {self.seconds!r}")

    def share(self, parts: int) -> Budget:
        """The budget of each of `parts` calls that share this one evenly; what does not divide is left over.

        Raises:
            BudgetError: There is not one unit of something for each part.
        """
        shares: dict[str, Any] = {}
        for name in COUNTED:
            limit = getattr(self, name)
            if limit is not None and limit < parts:
                raise BudgetError(f"the budget of {limit} {name} cannot be shared among {parts}; it must be at least {parts}")
            shares[name] = None if limit is None else limit // parts
        return Budget(**shares, seconds=None if self.seconds is None else self.seconds / parts)


@dataclass
class Meter:
    """Counts what is spent against a budget.

    Attributes:
        budget: The limits.
        clock: Seconds that only ever grow.
        spent: Work so far.
        seconds: Time in each of `PHASES`.
        began: When the meter was made, by the clock.
    """

    budget: Budget = Budget()
    clock: Callable[[], float] = time.perf_counter
    spent: Cost = Cost()
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the meter was made."""
        return self.clock() - self.began

    def predicted(self, cost: Cost) -> float:
        """Seconds that the work takes at the pace so far; 0 for what was never done."""
        pace = zip(PHASES, ("particle_steps", "decodes", "verifier_rows"), strict=True)
        return sum(
            self.seconds[phase] / getattr(self.spent, unit) * getattr(cost, unit) for phase, unit in pace if getattr(self.spent, unit)
        )

    def lacking(self, cost: Cost, timed: bool = True) -> str | None:
        """The first limit that the work would break, None if it may be done.

        Args:
            timed: Whether seconds count; else only what is never exceeded.
        """
        for name in COUNTED:
            limit = getattr(self.budget, name)
            if limit is not None and getattr(self.spent, name) + getattr(cost, name) > limit:
                return name
        limit = self.budget.seconds
        if timed and limit is not None and (self.elapsed + self.predicted(cost) > limit or self.elapsed >= limit):
            return "seconds"
        return None

    def allows(self, cost: Cost) -> bool:
        """Whether the work stays within the budget."""
        return self.lacking(cost) is None

    def most(self, cost: Callable[[int], Cost], at_most: int) -> int:
        """The largest number of something, from 0 to `at_most`, whose cost stays within the budget.

        Args:
            cost: Of a number of at least 1; does not fall as the number grows.
        """
        low, high = 0, at_most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.allows(cost(middle)) else (low, middle - 1)
        return low

    def require_sample(self, cost: Cost) -> None:
        """Refuses a budget that does not suffice for one finished and scored sample at this cost.

        Raises:
            BudgetError: It does not.
        """
        short = self.lacking(cost)
        if short == "seconds":
            raise BudgetError(f"the budget of {self.budget.seconds} seconds is used up before one sample can be finished")
        if short is not None:
            left = getattr(self.budget, short) - getattr(self.spent, short)
            raise BudgetError(f"the budget has {left} {short} left, but one sample takes {getattr(cost, short)}; raise {short}")

    def charge(self, cost: Cost) -> None:
        """Counts work that is about to be done.

        Raises:
            BudgetError: A counted limit would be exceeded; the work must not be done.
        """
        for name in COUNTED:
            limit = getattr(self.budget, name)
            if limit is not None and getattr(self.spent, name) + getattr(cost, name) > limit:
                raise BudgetError(f"{getattr(self.spent, name) + getattr(cost, name)} {name} would exceed the budget of {limit}")
        self.spent = self.spent + cost

    @contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        """Adds the time within the block to one of `PHASES`. On an accelerator the block must end with a synchronisation to be true."""
        begin = self.clock()
        try:
            yield
        finally:
            self.seconds[phase] += self.clock() - begin

    def to_json(self) -> dict[str, Any]:
        """Plain data: what was spent, what was left, and the time."""
        limits = {name: getattr(self.budget, name) for name in (*COUNTED, "seconds")}
        spent = {name: getattr(self.spent, name) for name in COUNTED}
        unspent = {name: limit - spent[name] for name, limit in limits.items() if limit is not None and name in spent}
        return {"spent": spent, "budget": limits, "unspent": unspent, "elapsed": self.elapsed, "seconds": dict(self.seconds)}

    def __str__(self) -> str:
        parts = []
        for name in COUNTED:
            limit = getattr(self.budget, name)
            parts.append(f"{getattr(self.spent, name)} {name.replace('_', ' ')}" + ("" if limit is None else f" of {limit}"))
        times = ", ".join(f"{phase} {self.seconds[phase]:.3f}" for phase in PHASES)
        limit = "" if self.budget.seconds is None else f" of {self.budget.seconds:g}"
        return ", ".join(parts) + f"; {self.elapsed:.3f} s{limit} ({times})"
