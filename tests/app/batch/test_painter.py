"""One pipeline for many jobs: pictures that depend on their jobs alone, cancelling, and what is kept between calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hasten
from hasten.app.batch.jobs import Job, Rules
from hasten.app.batch.painter import Cancelled, Painted, Painter
from hasten.app.errors import BadInput


@pytest.fixture(scope="module")
def painter(tiny_pipeline_folder: Path) -> Painter:
    return Painter(str(tiny_pipeline_folder), "float32", "cpu", score="brightness")


def job(number: int = 0, **row: Any) -> Job:
    return Job.from_row({"prompt": "a red circle", "steps": 4, "method": "none", **row}, None, number=number, rules=Rules())


def pixels(painted: Painted) -> np.ndarray:
    return np.asarray(painted.image).astype(int)


@pytest.mark.parametrize("method", ["none", "delta-dit", "first-block"])
def test_a_picture_does_not_depend_on_the_jobs_beside_it(painter: Painter, method: str) -> None:
    jobs = [job(i, method=method, prompt=prompt) for i, prompt in enumerate(("a red circle", "a blue square", "a small circle"))]
    together = painter.paint(jobs)
    for one, beside in zip(jobs, together, strict=True):
        assert np.abs(pixels(painter.paint([one])[0]) - pixels(beside)).max() <= 1
    backwards = painter.paint(jobs[::-1])[::-1]
    assert all(
        np.array_equal(pixels(a), pixels(b)) or np.abs(pixels(a) - pixels(b)).max() <= 1 for a, b in zip(together, backwards, strict=True)
    )
    assert (together[0].plan_hash is None) == (method == "none")


def test_it_draws_what_the_plain_call_draws(painter: Painter) -> None:
    one = job(seed=11, guidance=3.0, negative_prompt="a blue square", width=32, height=64)
    expected = painter.model.pipe(
        prompt=["a red circle"], negative_prompt=["a blue square"], generator=[torch.Generator().manual_seed(11)], num_inference_steps=4,
        guidance_scale=3.0, width=32, height=64, use_resolution_binning=False, clean_caption=False,
    ).images[0]  # fmt: skip
    (painted,) = painter.paint([one])
    assert np.array_equal(pixels(painted), np.asarray(expected).astype(int)) and painted.image.size == (32, 64)
    luma = (pixels(painted) @ np.array([0.299, 0.587, 0.114])).mean() / 255
    assert painted.score == pytest.approx(luma, abs=1e-3)


@pytest.mark.parametrize("method", ["none", "delta-dit"])
def test_cancelling_ends_at_a_step_and_leaves_no_trace(painter: Painter, method: str) -> None:
    jobs = [job(i, method=method, steps=6) for i in range(2)]
    before = [pixels(painted) for painted in painter.paint(jobs)]
    scheduler, steps = type(painter.model.pipe.scheduler), []
    with pytest.raises(Cancelled):
        painter.paint(jobs, cancelled=lambda: len(steps) >= 3, stepped=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 6), (2, 6), (3, 6)] and type(painter.model.pipe.scheduler) is scheduler
    with pytest.raises(Cancelled):
        painter.paint(jobs, cancelled=lambda: True)
    assert all(np.array_equal(a, pixels(b)) for a, b in zip(before, painter.paint(jobs), strict=True))


def test_a_steered_job_is_what_steering_gives(painter: Painter) -> None:
    one = job(seed=7, steer="best-of-n", particles=3, reward="brightness", method=None)
    (painted,) = painter.paint([one])
    wrapped = hasten.steer(painter.model.pipe, _brightness(), hasten.BestOfN(candidates=3))
    arguments = painter.model.arguments(None, None)
    expected = wrapped("a red circle", generator=torch.Generator().manual_seed(7), num_inference_steps=4, **arguments).images[0]
    assert np.abs(pixels(painted) - np.asarray(expected).astype(int)).max() <= 1
    luma = (pixels(painted) @ np.array([0.299, 0.587, 0.114])).mean() / 255
    assert painted.score == pytest.approx(luma, abs=2 / 255) and painted.plan_hash is None
    plain = [painter.paint([job(seed=seed)])[0].score or 0 for seed in (7,)]
    assert painted.score >= plain[0] - 2 / 255


def _brightness() -> Any:
    from hasten.accelerators.steering.verifiers import Brightness

    return Brightness()


def test_jobs_that_do_not_go_together_are_refused(painter: Painter) -> None:
    for jobs in ([], [job(0), job(1, steps=5)]):
        with pytest.raises(ValueError, match="of the same key"):
            painter.paint(jobs)
    with pytest.raises(BadInput, match="takes no etta; did you mean eta"):
        painter.check(job(arguments={"etta": 1.0}))
    painter.check(job(arguments={"eta": 0.5}))


def test_few_wrappers_are_kept_and_the_model_is_traced_once_for_all_steps(tiny_pipeline_folder: Path) -> None:
    painter = Painter(str(tiny_pipeline_folder), "float32", "cpu", kept=2)
    for steps in (2, 3, 4):
        painter.paint([job(steps=steps, method="delta-dit")])
    assert len(painter._wrappers) == 2 and len(painter._fast) == 1
    for interval in (2, 3, 4):
        painter.paint([job(method="delta-dit", interval=interval)])
    assert len(painter._fast) == 2


def test_prompts_that_a_verifier_cannot_read_have_no_score(tiny_pipeline_folder: Path) -> None:
    painter = Painter(str(tiny_pipeline_folder), "float32", "cpu", score="shapes")
    known, unknown = painter.paint([job(0), job(1, prompt="a red")])
    assert known.score is not None and 0 <= known.score <= 1 and unknown.score is None
