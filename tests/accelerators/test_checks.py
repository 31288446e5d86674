"""Settings that are refused, and with what words."""

from __future__ import annotations

from typing import Any

import pytest

from hasten.accelerators.checks import check_not_negative, check_whole


@pytest.mark.parametrize("value", [1, 0, -3, True, 2.0, "3", None])
def test_what_is_no_whole_number_of_at_least_two_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^rounds must be a whole number of at least 2, not {value!r}$"):
        check_whole(2, particles=2, rounds=value)
    check_whole(2, particles=2, rounds=10**9)


@pytest.mark.parametrize("value", [-1e-9, float("nan"), -float("inf")])
def test_negative_settings_and_nan_are_refused_by_name(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^bound must be a number of at least 0, not {value!r}$"):
        check_not_negative(threshold=0.0, bound=value)
    check_not_negative(threshold=0, bound=float("inf"))
