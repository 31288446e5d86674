"""The table of mistakes names tests that exist, has a reason for every empty cell, and is what the page in docs/ shows."""

from __future__ import annotations

import pytest

from tests.accelerators.caching.mistakes_table import PAGE, TABLE, Mistake, exists, page
from tests.families import PIPELINES

ROWS = [(method, mistake) for method, mistakes in TABLE.items() for mistake in mistakes]


@pytest.mark.parametrize(("method", "mistake"), ROWS, ids=[f"{method}: {mistake.what}" for method, mistake in ROWS])
def test_every_cell_has_a_test_or_a_reason(method: str, mistake: Mistake) -> None:
    assert mistake.tests.keys() <= {*PIPELINES, "toys"}
    for pipeline in PIPELINES:
        if pipeline in mistake.tests:
            assert exists(mistake.tests[pipeline], pipeline), (method, mistake.what, pipeline)
        else:
            assert mistake.reason(pipeline), (method, mistake.what, pipeline)
    assert "toys" not in mistake.tests or exists(mistake.tests["toys"], "toys")


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run python -m tests.accelerators.caching.mistakes_table"
