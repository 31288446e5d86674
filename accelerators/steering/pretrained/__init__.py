"""Verifiers with published weights: CLIPScore, PickScore, HPS v2.1, ImageReward, the aesthetic predictor and VQAScore.

Each is built on transformers' own model classes and on image tensors from end to end, so that gradients reach the images. Making one
loads nothing; the first `score` does. The upper ends of the range hints are the numbers from which ReNO's losses subtract the scores
(100, 30, 1, 2 and 10); the lower ends are round numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from hasten.accelerators.steering.pretrained.aesthetic import Aesthetic
from hasten.accelerators.steering.pretrained.base import Judge, Pretrained, WeightsError
from hasten.accelerators.steering.pretrained.clip import CLIPScore, PickScore
from hasten.accelerators.steering.pretrained.hps import HPSv2
from hasten.accelerators.steering.pretrained.image_reward import ImageReward
from hasten.accelerators.steering.pretrained.preprocess import Preprocess
from hasten.accelerators.steering.pretrained.vqa import VQAScore
from hasten.accelerators.steering.verifiers import Verifier

PRETRAINED: Mapping[str, Callable[[], Verifier]] = MappingProxyType(
    {
        "clip": CLIPScore,
        "pickscore": PickScore,
        "hps": HPSv2,
        "image_reward": ImageReward,
        "aesthetic": Aesthetic,
        "vqa": VQAScore,
    }
)
"""By the names that `mixes.RENO_REWARDS` and `mixes.CARINOX_REWARDS` use: each verifier with its default weights."""

__all__ = [
    "PRETRAINED",
    "Aesthetic",
    "CLIPScore",
    "HPSv2",
    "ImageReward",
    "Judge",
    "PickScore",
    "Preprocess",
    "Pretrained",
    "VQAScore",
    "WeightsError",
]
