"""Verifiers: what they measure, how they are mixed, and what is said of one that returns something else than a score per image."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.accelerators.steering.budget import Meter
from hasten.accelerators.steering.loop import Scorer
from hasten.accelerators.steering.mixes import CARINOX_CATEGORIES, CARINOX_REWARDS, CategoryMix, MeanRank, Panel, WeightedSum
from hasten.accelerators.steering.verifiers import (
    Brightness,
    ColourTarget,
    JPEGSize,
    RewardWarning,
    Sharpness,
    Verifier,
    VerifierError,
    as_verifier,
    checked_score,
    ranks,
    spearman,
)

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "bb", "ccc", "dddd"]


def column(values: Sequence[float]) -> Verifier:
    """Scores images by their row, which is written into the first pixel."""
    table = torch.tensor(values)
    return as_verifier(lambda images: table[images[:, 0, 0, 0].long()])


ROWS = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2)


# ----------------------------------------------------------------------------------------------------------- the protocol


def test_any_callable_will_do() -> None:
    bright = checked_score(Brightness(), IMAGES, PROMPTS)
    for callable_ in (lambda images: Brightness().score(images, []), lambda images, prompts: Brightness().score(images, prompts)):
        torch.testing.assert_close(checked_score(as_verifier(callable_), IMAGES, PROMPTS), bright)
    assert checked_score(as_verifier(lambda images, prompts: torch.tensor([len(p) for p in prompts])), IMAGES, PROMPTS).tolist() == [
        1,
        2,
        3,
        4,
    ]
    assert checked_score(as_verifier(lambda images, prompts=None: torch.tensor([len(p) for p in prompts])), IMAGES, PROMPTS).sum() == 10
    assert as_verifier(Brightness()).differentiable

    class Bare:
        def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return torch.zeros(len(images))

    assert checked_score(as_verifier(Bare()), IMAGES, PROMPTS).tolist() == [0.0] * 4  # type: ignore[arg-type]
    with pytest.raises(VerifierError, match=r"must be callable or have score\(images, prompts\), not int"):
        as_verifier(3)  # type: ignore[arg-type]


def batch_mean(images: Tensor) -> Tensor:
    return images.mean()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (batch_mean, "batch_mean must return one score per image, shape [4], not []; average over each image, not over the batch"),
        (lambda images: images.mean((1, 2, 3))[:, None], "must return one score per image, shape [4], not [4, 1]; flatten it"),
        (lambda images: images.mean((2, 3)), "must return one score per image, shape [4], not [4, 3]"),
        (lambda images: [0.0] * 4, "must return a tensor with one score per image, not list"),
    ],
)
def test_a_wrong_shape_is_told_with_what_to_change(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(VerifierError, match=re.escape(message)):
        checked_score(as_verifier(function), IMAGES, PROMPTS)


def test_nan_and_infinity_lose_with_a_warning() -> None:
    with pytest.warns(RewardWarning, match=r"returned NaN or infinity for 2 of 4 images; they lose \(-inf\)"):
        scores = checked_score(as_verifier(lambda images: torch.tensor([1.0, math.nan, math.inf, -math.inf])), IMAGES, PROMPTS)
    assert scores.tolist() == [1.0, -math.inf, -math.inf, -math.inf]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked_score(Brightness(), IMAGES, PROMPTS)


def test_there_must_be_a_prompt_for_each_image() -> None:
    with pytest.raises(VerifierError, match="there are 4 images but 1 prompts; give one prompt per image"):
        checked_score(Brightness(), IMAGES, ["a"])


# ----------------------------------------------------------------------------------------------------------- weight-free


def test_brightness_and_colour() -> None:
    flat = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])[:, :, None, None].expand(4, 3, 8, 8)
    torch.testing.assert_close(Brightness().score(flat, PROMPTS), torch.tensor([0.0, 1.0, 0.299, 0.114]))
    torch.testing.assert_close(
        ColourTarget((1.0, 0.0, 0.0)).score(flat, PROMPTS), -torch.tensor([1 / 3, 2 / 3, 0.0, 2 / 3]).sqrt(), atol=1e-5, rtol=0
    )
    video = flat[:, None].expand(4, 5, 3, 8, 8)
    torch.testing.assert_close(Brightness().score(video, PROMPTS), Brightness().score(flat, PROMPTS))


def test_blur_takes_sharpness_and_bytes_away() -> None:
    blurred = torch.nn.functional.avg_pool2d(IMAGES, 3, 1, 1)
    assert (Sharpness().score(IMAGES, PROMPTS) > 4 * Sharpness().score(blurred, PROMPTS)).all()
    small, large = JPEGSize().score(blurred, PROMPTS), JPEGSize().score(IMAGES, PROMPTS)
    assert (small > large).all() and (large < 0).all()
    torch.testing.assert_close(JPEGSize(larger=True).score(IMAGES, PROMPTS), -large)
    assert (JPEGSize(quality=20).score(IMAGES, PROMPTS) > large).all()
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)  # a straight ramp has no second derivative
    assert float(Sharpness().score(ramp, ["a"])) == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize("verifier", [Brightness(), ColourTarget(), Sharpness()])
def test_gradients_pass_where_they_are_said_to(verifier: Verifier) -> None:
    assert verifier.differentiable
    images = IMAGES.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(verifier.score(images, PROMPTS).sum(), images)
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()
    target = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(1, 3, 4, 4).clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(ColourTarget().score(target, ["a"]).sum(), target)
    assert gradient.isfinite().all()  # at the target itself the root has none


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(VerifierError, match=re.escape("images must have shape [N, 3, H, W], videos [N, F, 3, H, W], not [2, 1, 8, 8]")):
        Brightness().score(torch.zeros(2, 1, 8, 8), ["a", "b"])
    with pytest.raises(ValueError, match="colour must be red, green and blue from 0 to 1"):
        ColourTarget((2.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="quality must be a whole number from 1 to 95, not 100"):
        JPEGSize(quality=100)


# ----------------------------------------------------------------------------------------------------------------- mixes


def test_a_weighted_sum_adds_and_can_normalise_by_the_range_hints() -> None:
    mix = WeightedSum((Brightness(), ColourTarget()), (2.0, 0.5))
    bright, colour = Brightness().score(IMAGES, PROMPTS), ColourTarget().score(IMAGES, PROMPTS)
    torch.testing.assert_close(mix.score(IMAGES, PROMPTS), 2 * bright + 0.5 * colour)
    assert mix.differentiable and mix.range_hint == (-0.5, 2.0)
    scaled = WeightedSum((Brightness(), ColourTarget()), (2.0, 0.5), normalise=True)
    torch.testing.assert_close(scaled.score(IMAGES, PROMPTS), 2 * bright + 0.5 * (colour + 1))
    assert scaled.range_hint == (0.0, 2.5) and WeightedSum((JPEGSize(), Brightness())).range_hint is None
    with pytest.raises(VerifierError, match="normalise needs the range_hint of every verifier; JPEGSize has none"):
        WeightedSum((JPEGSize(),), normalise=True)
    with pytest.raises(VerifierError, match="weights must hold one number for each of 2 verifiers, not 1"):
        WeightedSum((Brightness(), Sharpness()), (1.0,))
    with pytest.raises(VerifierError, match="at least one verifier"):
        WeightedSum(())


def test_ranks_share_ties_and_spearman_is_their_correlation() -> None:
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 10.0, 100.0])) == pytest.approx(1.0)
    assert spearman(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 1.0, 4.0, 3.0])) == pytest.approx(0.6)
    assert spearman(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 5.0])) == 0.0
    with pytest.raises(ValueError, match=r"at least 2, not \[1\] and \[1\]"):
        spearman(torch.zeros(1), torch.zeros(1))


def test_the_mean_rank_needs_no_scale_and_sees_the_whole_candidate_set() -> None:
    mix = MeanRank((column([1e6, 2e6, 3e6, 3e6]), column([0.3, 0.2, 0.1, 0.4])))
    scores = mix.score(ROWS, PROMPTS)
    torch.testing.assert_close(scores, torch.tensor([(1 + 3) / 8, (2 + 2) / 8, (3.5 + 1) / 8, (3.5 + 4) / 8], dtype=torch.float64))
    assert not mix.differentiable
    # In micro-batches the raw scores are put together before anything is ranked.
    for size in (1, 3, None):
        scorer = Scorer(mix, ["a"], Meter(), micro_batch=size)
        torch.testing.assert_close(scorer.rewards(ROWS, torch.zeros(4, dtype=torch.int64)), scores)
    with pytest.raises(VerifierError, match="a MeanRank cannot be mixed with other verifiers"):
        WeightedSum((mix, Brightness()))


@pytest.mark.parametrize("kind", [WeightedSum, MeanRank])
def test_who_is_lost_for_one_verifier_is_lost_for_the_mix(kind: type[WeightedSum] | type[MeanRank]) -> None:
    with pytest.warns(RewardWarning):
        scores = kind((column([math.nan, 1.0, 2.0, 0.0]), column([9.0, 1.0, 2.0, 3.0]))).score(ROWS, PROMPTS)
    assert scores[0] == -math.inf and scores[1:].isfinite().all()
    negative = WeightedSum((column([1.0, -math.inf, 2.0, 0.0]),), (-1.0,)).score(ROWS, PROMPTS)
    assert negative[1] == -math.inf
    with pytest.warns(RewardWarning):
        assert MeanRank((column([math.nan] * 4),)).score(ROWS, PROMPTS).tolist() == [-math.inf] * 4


def test_the_category_decides_on_the_weights() -> None:
    named = {"hps": column([1.0, 0.0, 0.0, 1.0]), "vqa": column([0.0, 1.0, 0.0, 1.0])}
    mix = CategoryMix(named, lambda prompt: "color" if "red" in prompt else "3d-spatial")
    scores = mix.score(ROWS, ["red", "red", "behind", "behind"])
    torch.testing.assert_close(scores, torch.tensor([5 * 0.40, 1.14, 0.0, 5 * 0.96 + 1.43]))
    assert CategoryMix(named).weights_of("anything") == pytest.approx([5 * 0.59, 1.34])
    with pytest.raises(VerifierError, match=r"category must be one of color, shape, texture, .*, not 'faces'"):
        CategoryMix(named, lambda prompt: "faces").score(ROWS, PROMPTS)
    with pytest.raises(VerifierError, match="the table has no factor for clip in the category 'color'"):
        CategoryMix({"clip": Brightness()})
    own = CategoryMix({"clip": column([1.0, 2.0, 3.0, 4.0])}, lambda p: p, {"a": {"clip": 2.0}}, {})
    assert own.score(ROWS[1:2], ["a"]).tolist() == [4.0]


def test_the_published_table_is_complete_and_its_rows_average_to_one() -> None:
    assert len(CARINOX_CATEGORIES) == 9
    for factors in CARINOX_CATEGORIES.values():
        assert factors.keys() == CARINOX_REWARDS.keys()
        assert sum(factors.values()) / 4 == pytest.approx(1.0, abs=0.01)


def test_a_panel_counts_every_verifier_that_sees_an_image() -> None:
    nested = WeightedSum((Brightness(), WeightedSum((Sharpness(), JPEGSize()))))
    assert (Panel(nested).size, Panel(nested).calls) == (2, 3)
    assert (Panel(Brightness()).size, Panel(Brightness()).calls) == (1, 1)
    meter = Meter()
    Scorer(nested, ["a"], meter).rewards(IMAGES, torch.zeros(4, dtype=torch.int64))
    assert (meter.spent.decodes, meter.spent.verifier_rows) == (4, 12)


def test_every_prompt_is_a_candidate_set_of_its_own() -> None:
    scorer = Scorer(MeanRank((column([1.0, 2.0, 3.0, 4.0]),)), ["a", "b"], Meter())
    assert scorer.rewards(ROWS, torch.tensor([0, 1, 0, 1])).tolist() == [0.5, 0.5, 1.0, 1.0]
