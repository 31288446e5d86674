"""What the options about steering and search mean: a method, a reward and a budget."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hasten.app.drawing import check_number
from hasten.app.errors import BadInput
from hasten.app.options import parse_settings
from hasten.app.rewards import Reward, choose_reward, closest, reward_names, with_gradients

if TYPE_CHECKING:
    from hasten.accelerators.steering.budget import Budget


class Named(NamedTuple):
    """A method by the name of its class, and the setting that --particles or --rounds stands for."""

    kind: str
    number: str | None


STEERS: Mapping[str, Named] = {
    "fk": Named("FKSteering", "particles"),
    "best-of-n": Named("BestOfN", "candidates"),
    "halving": Named("SuccessiveHalving", "candidates"),
    "svdd": Named("SVDD", "children"),
    "code": Named("CoDe", "branches"),
}
SEARCHES: Mapping[str, Named] = {
    "random": Named("RandomSearch", "rounds"),
    "zero-order": Named("ZeroOrder", "rounds"),
    "paths": Named("SearchOverPaths", None),
    "rollover": Named("RolloverBudget", None),
    "reno": Named("ReNO", "iterations"),
    "carinox": Named("CARINOX", "iterations"),
}
CLIMBING = ("reno", "carinox")
"""Searches that need gradients."""
NOT_PLAIN = ("kernel", "category")
"""Settings that are functions."""


@dataclass(frozen=True)
class Steering:
    """What the command line says; None where it says nothing.

    Attributes:
        steer, search: Name of a method, one of the two.
        reward: Names and weights.
        rank: Whether rewards are combined by their ranks.
        particles, rounds: Of the method.
        settings: Further ones, each as "name=value".
        kernel: The step that draws noise.
        budget: Limits for each caption, each as "unit=number,...".
        micro_batch: Particles at a time.
        select: Which particles are returned.
        versus: Whether best-of-N is drawn in the same time.
        report: A file for everything that was learned.
        plots: A folder for pictures of it.
    """

    steer: str | None = None
    search: str | None = None
    reward: str | None = None
    rank: bool = False
    particles: int | None = None
    rounds: int | None = None
    settings: Sequence[str] = ()
    kernel: str | None = None
    budget: Sequence[str] = ()
    micro_batch: int | None = None
    select: str | None = None
    versus: bool = False
    report: Path | None = None
    plots: Path | None = None

    def asked(self) -> bool:
        """Whether anything is to be steered or searched for.

        Raises:
            BadInput: Both are, or neither is and another option means that one should be.
        """
        if self.steer is not None and self.search is not None:
            raise BadInput("give --steer or --search, one of the two")
        if self.steer is not None or self.search is not None:
            return True
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None and value is not False and value != ():
                option = "set" if entry.name == "settings" else entry.name.replace("_", "-")
                raise BadInput(f"--{option} needs --steer or --search")
        return False

    @property
    def name(self) -> str:
        """Of the method."""
        return str(self.steer or self.search)


@dataclass(frozen=True)
class Chosen:
    """Options of steering that make sense together.

    Attributes:
        method: With its settings.
        reward: What is maximised.
        budget: Of each caption.
        extra: Further arguments of `steer` or `search`.
    """

    method: Any
    reward: Reward
    budget: Budget
    extra: dict[str, Any]


def choose(steering: Steering, *, shipped: bool, captions: Sequence[str]) -> Chosen:
    """Checks the options without loading a model.

    Args:
        steering: The options.
        shipped: Whether the model came with hasten.
        captions: What is to be drawn.

    Raises:
        BadInput: One of them is not allowed.
    """
    check_number("--particles", steering.particles, 1, whole=True)
    check_number("--rounds", steering.rounds, 1, whole=True)
    check_number("--micro-batch", steering.micro_batch, 1, whole=True)
    method, extra = _method(steering)
    budget = _budget(steering.budget)
    reward = _reward(steering, shipped)
    reward.check_captions(captions)
    return Chosen(method, reward, budget, extra)


def _method(steering: Steering) -> tuple[Any, dict[str, Any]]:
    """The method, and what else `steer` or `search` is to be told."""
    import hasten

    option, allowed = ("--steer", STEERS) if steering.steer is not None else ("--search", SEARCHES)
    name = steering.name
    if name not in allowed:
        other = next((f"; {name} is for {o}" for o, table_ in (("--steer", STEERS), ("--search", SEARCHES)) if name in table_), "")
        raise BadInput(f"{option} must be one of {', '.join(allowed)}, not {name!r}{other or closest(name, list(allowed))}")
    kind = getattr(hasten, allowed[name].kind)
    known = {entry.name: str(entry.type) for entry in fields(kind) if entry.name not in NOT_PLAIN}
    further = {"eta": "float"} if steering.steer is not None else {"draft_steps": "int"} if name in CLIMBING else {}
    given = _given(steering, known, allowed[name].number)
    values = parse_settings(steering.settings, "potential=max")
    if "lambda" in values and "lambda_" in known:
        values["lambda_"] = values.pop("lambda")
    for key, value in values.items():
        if key not in known and key not in further:
            near = closest(key, [*known, *further])
            raise BadInput(f"--set: {name} has no setting {key!r}, but {', '.join([*known, *further])}{near}")
        if key in given:
            raise BadInput(f"--set gives {key}, which another option gives already")
        _check_type(key, value, {**known, **further}[key])
    extra = {key: values.pop(key) for key in further if key in values}
    kernel = _kernel(steering)
    if steering.steer is not None:
        extra["kernel"] = kernel or "auto"
    elif kernel is not None:
        given["kernel"] = _kernel_function(kernel)
    try:
        return kind(**given, **values), extra
    except TypeError as why:
        raise BadInput(f"--set: {name} cannot take {' '.join(steering.settings)} ({' '.join(str(why).split())})") from None
    except ValueError as why:  # its messages begin with the setting's name
        raise BadInput(f"--{why}" if str(why).split()[0] in given else f"--set: {why}") from None


def _given(steering: Steering, known: Mapping[str, str], number: str | None) -> dict[str, Any]:
    """Settings that have options of their own."""
    given: dict[str, Any] = {}
    for option, value, fits in (
        ("--particles", steering.particles, steering.steer is not None),
        ("--rounds", steering.rounds, steering.search is not None),
    ):
        if value is None:
            continue
        if not fits or number is None:
            raise BadInput(f"{option} is no setting of {steering.name}; --set takes {', '.join(known)}")
        given[number] = value
    if steering.select is not None:
        if "select" not in known:
            raise BadInput(
                f"--select must be left out, or best, where the method is {steering.name}: it returns one sample; fk and best-of-n take it"
            )
        given["select"] = steering.select
    return given


KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "a word"),
    "bool": ((bool,), "true or false"),
    "tuple": ((list,), "a JSON list"),
    "None": ((type(None),), "null"),
}


def _check_type(key: str, value: object, declared: str) -> None:
    """Refuses a value that a setting declared as, say, "float | None" cannot have."""
    kinds = re.sub(r"\[.*\]", "", declared).split(" | ")
    for kind in kinds:
        if isinstance(value, KINDS[kind][0]) and (kind == "bool" or not isinstance(value, bool)):
            return
    raise BadInput(f"--set {key} must be {' or '.join(KINDS[kind][1] for kind in kinds)}, not {value!r}")


def _kernel(steering: Steering) -> str | None:
    from hasten.pipelines.steering import KERNELS

    kernel = steering.kernel
    if kernel is None:
        return None
    if kernel not in KERNELS:
        raise BadInput(f"--kernel must be one of {', '.join(KERNELS)}, not {kernel!r}{closest(kernel, KERNELS)}")
    if steering.search is not None and steering.search != "rollover":
        raise BadInput(f"--kernel is for --steer and for --search rollover; {steering.search} draws no noise at its steps")
    return kernel


def _kernel_function(kernel: str) -> Any:
    """As rollover budget forcing takes it."""
    from hasten.accelerators.steering.kernels import ddim_eta, full_renoise, linear_sde

    functions = {"auto": ddim_eta, "ddim": ddim_eta, "linear-sde": linear_sde, "renoise": full_renoise}
    if kernel not in functions:
        raise BadInput(f"--kernel must be one of {', '.join(functions)} where --search is rollover, not {kernel!r}")
    return functions[kernel]


def _budget(texts: Sequence[str]) -> Budget:
    from hasten.accelerators.steering.budget import Budget

    units = [entry.name for entry in fields(Budget)]
    limits: dict[str, Any] = {}
    for part in (part.strip() for text in texts for part in text.split(",")):
        name, equals, number = (word.strip() for word in part.partition("="))
        name = name.replace("-", "_")
        if not equals:
            raise BadInput(f"--budget must be UNIT=N such as particle_steps=200 or seconds=30, not {part!r}")
        if name not in units:
            raise BadInput(f"--budget must limit {', '.join(units)}, not {name!r}{closest(name, units)}")
        if name in limits:
            raise BadInput(f"--budget gives {name} twice")
        try:
            limits[name] = float(number) if name == "seconds" else int(number)
        except ValueError:
            raise BadInput(f"--budget {name} must be a {'' if name == 'seconds' else 'whole '}number, not {number!r}") from None
    if not math.isfinite(limits.get("seconds", 0.0)):
        raise BadInput(f"--budget seconds must be finite, not {limits['seconds']}")
    try:
        return Budget(**limits)
    except ValueError as why:
        raise BadInput(f"--budget: {why}") from None


def _reward(steering: Steering, shipped: bool) -> Reward:
    climbs = steering.name in CLIMBING
    text = steering.reward
    if text is None:
        if not shipped:
            raise BadInput(f"--reward is missing: say what is to be maximised, one of {', '.join(reward_names())}")
        text = "shapes-proxy" if climbs else "shapes"
    reward = choose_reward(text, rank=steering.rank)
    if steering.rank and steering.versus:
        raise BadInput("--versus compares rewards, and ranks are worth something within one run alone; leave out --rank")
    if climbs and not reward.verifier.differentiable:
        without = [name for name, part in zip(reward.names, reward.parts, strict=True) if not part.differentiable]
        why = f"{' and '.join(without)} has none" if without else "ranks have none"
        raise BadInput(f"--search {steering.name} climbs gradients, and {why}; these have: {', '.join(with_gradients())}")
    return reward
