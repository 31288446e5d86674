"""What the options about caching mean: a method, a plan, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hasten.app.errors import BadInput

if TYPE_CHECKING:
    from hasten.accelerators.caching.plan import Plan
    from hasten.accelerators.caching.runtime import Method

INTERVALS = {"delta-dit": "DeltaDiT", "forecast": "Forecast", "fora": "FORA", "deepcache": "DeepCache"}
"""Methods that `--interval` sets, by their public name."""
DECIDERS = {"first-block": "FirstBlock", "teacache": "TeaCache"}
"""Methods that decide during the run."""
METHODS = (*INTERVALS, *DECIDERS, "auto", "none")


def choose_method(
    name: str | None,
    *,
    interval: int | None = None,
    threshold: float | None = None,
    skip_guidance: int | None = None,
    cached: str | None = None,
    boundary: str | None = None,
    preset: str | None = None,
    plan: Path | None = None,
    default: str = "auto",
) -> Method | Plan | None:
    """The method that the options name; None for the plain pipeline.

    Args:
        name: One of `METHODS`, or None where the option was not given.
        interval: Of the methods in `INTERVALS`.
        threshold: Of the methods in `DECIDERS`.
        skip_guidance: Interval at which both guidance branches are computed, beside what the method does.
        cached, boundary: Of Delta-DiT; they change the preset's values where one is named.
        preset: One of Delta-DiT's published settings.
        plan: A plan file, in place of a method.
        default: The method where no option says.

    Raises:
        BadInput: Options contradict each other, or a value is not allowed.
        PlanError: The file is no plan.
    """
    if skip_guidance is not None:
        from hasten.accelerators.caching.compose import Composed
        from hasten.accelerators.caching.skip_guidance import SkipGuidance

        if skip_guidance < 2:
            raise BadInput(f"--skip-guidance must be a whole number of at least 2, not {skip_guidance}")
        beside = choose_method(
            name, interval=interval, threshold=threshold, cached=cached, boundary=boundary, preset=preset, plan=plan, default=default
        )
        skips = SkipGuidance(interval=skip_guidance)
        return skips if beside is None else Composed((beside, skips))
    given_options = (
        ("--interval", interval), ("--threshold", threshold), ("--cached", cached), ("--boundary", boundary), ("--preset", preset),
    )  # fmt: skip
    own = [option for option, value in given_options if value is not None]
    if plan is not None:
        if name is not None or own:
            raise BadInput(
                f"--plan says everything that --method would: give either it or {' and '.join(['--method'] if name is not None else own)}"
            )
        from hasten.accelerators.caching.plan import Plan

        return Plan.load(plan)
    if name is None:
        name = "first-block" if own == ["--threshold"] else "delta-dit" if own else default
    if name not in METHODS:
        raise BadInput(f"--method must be one of {', '.join(METHODS)}, not {name!r}")
    if threshold is not None and name not in DECIDERS:
        raise BadInput(f"--method must be {' or '.join(DECIDERS)} where --threshold is given, not {name}")
    known = {"--interval": INTERVALS, "--threshold": DECIDERS}
    if name != "delta-dit" and (misfits := [option for option in own if name not in known.get(option, {})]):
        raise BadInput(f"--method must be delta-dit where {' and '.join(misfits)} is given, not {name}")
    if name in DECIDERS or (name in INTERVALS and name != "delta-dit"):
        import hasten

        kind = getattr(hasten, {**INTERVALS, **DECIDERS}[name])
        given_values = {"interval": interval, "threshold": threshold}
        try:
            return kind(**{option: value for option, value in given_values.items() if value is not None})
        except ValueError as error:
            raise BadInput(f"--{error}") from None
    if name == "none":
        return None
    if name == "auto":
        from hasten.accelerators.caching.auto import Auto

        return Auto()
    from hasten.accelerators.caching.delta_dit import PRESETS, DeltaDiT

    if preset is not None and preset not in PRESETS:
        raise BadInput(f"--preset must be one of {', '.join(PRESETS)}, not {preset!r}")
    rule = PRESETS[preset] if preset is not None else DeltaDiT()
    given = {"interval": interval, "cached": _amount("--cached", cached), "boundary": _amount("--boundary", boundary)}
    try:
        return rule.with_options(**{option: value for option, value in given.items() if value is not None})
    except ValueError as error:
        raise BadInput(f"--{error}") from None  # its messages begin with the argument's name


def _amount(option: str, text: str | None) -> int | float | None:
    """'0.75' is a fraction, '21' a count."""
    if text is None:
        return None
    try:
        return int(text) if text.strip().lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise BadInput(f"{option} must be a fraction such as 0.75 or a count such as 21, not {text!r}") from None
