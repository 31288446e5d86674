"""What settings of every method are tried for; an error names the setting, its value and what is allowed."""

from __future__ import annotations


def check_whole(least: int, **settings: object) -> None:
    """Refuses settings that are no whole numbers of at least `least`.

    Raises:
        ValueError: One of them is not.
    """
    for name, value in settings.items():
        if type(value) is not int or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def check_not_negative(**settings: float) -> None:
    """Refuses settings that are below 0 or not a number.

    Raises:
        ValueError: One of them is.
    """
    for name, value in settings.items():
        if not value >= 0:
            raise ValueError(f"{name} must be a number of at least 0, not {value!r}")
