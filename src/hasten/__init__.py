"""hasten makes an existing diffusers pipeline faster, or better for the same compute, without forking it.

    import hasten

    fast = hasten.accelerate(pipe, hasten.DeltaDiT(interval=2, cached=0.75, boundary=0.5))
    image = fast("a red circle left of a blue square").images[0]
    print(fast.report)

This module only re-exports: every public name lives in `hasten.accelerators` or `hasten.pipelines` and is imported when it
is first used, so that `import hasten` costs nothing.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING

# In an installed wheel the sub-packages lie beside this file. In a source checkout they are the repository's own top-level
# folders (accelerators/, pipelines/, app/, ...): look there too.
_root = _Path(__file__).resolve().parents[2]
if (_root / "pyproject.toml").is_file() and (_root / "accelerators").is_dir():
    __path__.append(str(_root))

from hasten._version import __version__  # noqa: E402

if TYPE_CHECKING:
    from hasten.accelerators.caching.bac import BAC
    from hasten.accelerators.caching.cachequant import CacheQuant
    from hasten.accelerators.caching.deepcache import DeepCache
    from hasten.accelerators.caching.delta_dit import DeltaDiT
    from hasten.accelerators.caching.first_block import FirstBlock
    from hasten.accelerators.caching.fora import FORA
    from hasten.accelerators.caching.forecast import Forecast
    from hasten.accelerators.caching.magcache import MagCache
    from hasten.accelerators.caching.plan import Action, Plan, PlanError
    from hasten.accelerators.caching.report import RunReport
    from hasten.accelerators.caching.runtime import attach
    from hasten.accelerators.caching.skip_guidance import SkipGuidance
    from hasten.accelerators.caching.teacache import TeaCache
    from hasten.accelerators.caching.trace import Trace
    from hasten.accelerators.decoding.freedave import FreeDave
    from hasten.accelerators.decoding.wino import WINO
    from hasten.accelerators.distillation.adapters import LoRA
    from hasten.accelerators.distillation.ctm import ConsistencyTrajectory
    from hasten.accelerators.distillation.dmd import DistributionMatching
    from hasten.accelerators.distillation.feedback import RewardFeedback
    from hasten.accelerators.distillation.lcm import LCM
    from hasten.accelerators.distillation.pcm import PhasedConsistency
    from hasten.accelerators.distillation.pso import OfflinePSO, OnlinePSO
    from hasten.accelerators.distillation.trajectory import TrajectoryConsistency
    from hasten.accelerators.search.carinox import CARINOX
    from hasten.accelerators.search.paths import SearchOverPaths
    from hasten.accelerators.search.random_search import RandomSearch
    from hasten.accelerators.search.reno import ReNO
    from hasten.accelerators.search.rollover import RolloverBudget
    from hasten.accelerators.search.zero_order import ZeroOrder
    from hasten.accelerators.steering.best_of_n import BestOfN
    from hasten.accelerators.steering.budget import Budget, BudgetError
    from hasten.accelerators.steering.controller import SteeringError
    from hasten.accelerators.steering.fk import FKSteering
    from hasten.accelerators.steering.mixes import CategoryMix, MeanRank, WeightedSum
    from hasten.accelerators.steering.pretrained import Aesthetic, CLIPScore, HPSv2, ImageReward, PickScore, VQAScore
    from hasten.accelerators.steering.report import SearchReport
    from hasten.accelerators.steering.successive_halving import SuccessiveHalving
    from hasten.accelerators.steering.svdd import SVDD, CoDe
    from hasten.accelerators.steering.verifiers import Brightness, ColourTarget, JPEGSize, Sharpness
    from hasten.pipelines.accelerated import AcceleratedPipeline, accelerate, explain, trace
    from hasten.pipelines.calibration import calibrate
    from hasten.pipelines.decoding_schedulers import (
        CCDDecoding,
        CreditDecoding,
        EditingDecoding,
        EntropyBoundDecoding,
        FactorDecoding,
        HierarchicalDecoding,
        KLASSDecoding,
        RCRDecoding,
        SaberDecoding,
        StaticDecoding,
        ThresholdDecoding,
    )
    from hasten.pipelines.distilling import distill
    from hasten.pipelines.planning import plan
    from hasten.pipelines.presets import PUBLISHED, Preset, few_step
    from hasten.pipelines.searching import SearchedPipeline, search
    from hasten.pipelines.solver_schedulers import EVODiffScheduler, GammaScheduler
    from hasten.pipelines.steering import SteeredPipeline, steer
    from hasten.pipelines.step_lora import StepLoRA
    from hasten.pipelines.text import TextPipeline
    from hasten.pipelines.tuning import tune

__all__ = [
    "BAC",
    "CARINOX",
    "FORA",
    "LCM",
    "PUBLISHED",
    "SVDD",
    "WINO",
    "AcceleratedPipeline",
    "Action",
    "Aesthetic",
    "BestOfN",
    "Brightness",
    "Budget",
    "BudgetError",
    "CCDDecoding",
    "CLIPScore",
    "CacheQuant",
    "CategoryMix",
    "CoDe",
    "ColourTarget",
    "ConsistencyTrajectory",
    "CreditDecoding",
    "DeepCache",
    "DeltaDiT",
    "DistributionMatching",
    "EVODiffScheduler",
    "EditingDecoding",
    "EntropyBoundDecoding",
    "FKSteering",
    "FactorDecoding",
    "FirstBlock",
    "Forecast",
    "FreeDave",
    "GammaScheduler",
    "HPSv2",
    "HierarchicalDecoding",
    "ImageReward",
    "JPEGSize",
    "KLASSDecoding",
    "LoRA",
    "MagCache",
    "MeanRank",
    "OfflinePSO",
    "OnlinePSO",
    "PhasedConsistency",
    "PickScore",
    "Plan",
    "PlanError",
    "Preset",
    "RCRDecoding",
    "RandomSearch",
    "ReNO",
    "RewardFeedback",
    "RolloverBudget",
    "RunReport",
    "SaberDecoding",
    "SearchOverPaths",
    "SearchReport",
    "SearchedPipeline",
    "Sharpness",
    "SkipGuidance",
    "StaticDecoding",
    "SteeredPipeline",
    "SteeringError",
    "StepLoRA",
    "SuccessiveHalving",
    "TeaCache",
    "TextPipeline",
    "ThresholdDecoding",
    "Trace",
    "TrajectoryConsistency",
    "VQAScore",
    "WeightedSum",
    "ZeroOrder",
    "__version__",
    "accelerate",
    "attach",
    "calibrate",
    "distill",
    "explain",
    "few_step",
    "plan",
    "search",
    "steer",
    "trace",
    "tune",
]

_HOME = {
    "PUBLISHED": "hasten.pipelines.presets",
    "Preset": "hasten.pipelines.presets",
    "few_step": "hasten.pipelines.presets",
    "LoRA": "hasten.accelerators.distillation.adapters",
    "ConsistencyTrajectory": "hasten.accelerators.distillation.ctm",
    "DistributionMatching": "hasten.accelerators.distillation.dmd",
    "RewardFeedback": "hasten.accelerators.distillation.feedback",
    "LCM": "hasten.accelerators.distillation.lcm",
    "PhasedConsistency": "hasten.accelerators.distillation.pcm",
    "OfflinePSO": "hasten.accelerators.distillation.pso",
    "OnlinePSO": "hasten.accelerators.distillation.pso",
    "TrajectoryConsistency": "hasten.accelerators.distillation.trajectory",
    "distill": "hasten.pipelines.distilling",
    "EVODiffScheduler": "hasten.pipelines.solver_schedulers",
    "GammaScheduler": "hasten.pipelines.solver_schedulers",
    "StepLoRA": "hasten.pipelines.step_lora",
    "tune": "hasten.pipelines.tuning",
    "CARINOX": "hasten.accelerators.search.carinox",
    "SearchOverPaths": "hasten.accelerators.search.paths",
    "RandomSearch": "hasten.accelerators.search.random_search",
    "ReNO": "hasten.accelerators.search.reno",
    "RolloverBudget": "hasten.accelerators.search.rollover",
    "ZeroOrder": "hasten.accelerators.search.zero_order",
    "BestOfN": "hasten.accelerators.steering.best_of_n",
    "Budget": "hasten.accelerators.steering.budget",
    "BudgetError": "hasten.accelerators.steering.budget",
    "SteeringError": "hasten.accelerators.steering.controller",
    "FKSteering": "hasten.accelerators.steering.fk",
    "CategoryMix": "hasten.accelerators.steering.mixes",
    "MeanRank": "hasten.accelerators.steering.mixes",
    "WeightedSum": "hasten.accelerators.steering.mixes",
    "Aesthetic": "hasten.accelerators.steering.pretrained",
    "CLIPScore": "hasten.accelerators.steering.pretrained",
    "HPSv2": "hasten.accelerators.steering.pretrained",
    "ImageReward": "hasten.accelerators.steering.pretrained",
    "PickScore": "hasten.accelerators.steering.pretrained",
    "VQAScore": "hasten.accelerators.steering.pretrained",
    "SearchReport": "hasten.accelerators.steering.report",
    "SuccessiveHalving": "hasten.accelerators.steering.successive_halving",
    "SVDD": "hasten.accelerators.steering.svdd",
    "CoDe": "hasten.accelerators.steering.svdd",
    "Brightness": "hasten.accelerators.steering.verifiers",
    "ColourTarget": "hasten.accelerators.steering.verifiers",
    "JPEGSize": "hasten.accelerators.steering.verifiers",
    "Sharpness": "hasten.accelerators.steering.verifiers",
    "SearchedPipeline": "hasten.pipelines.searching",
    "search": "hasten.pipelines.searching",
    "SteeredPipeline": "hasten.pipelines.steering",
    "steer": "hasten.pipelines.steering",
    "CCDDecoding": "hasten.pipelines.decoding_schedulers",
    "CreditDecoding": "hasten.pipelines.decoding_schedulers",
    "EditingDecoding": "hasten.pipelines.decoding_schedulers",
    "EntropyBoundDecoding": "hasten.pipelines.decoding_schedulers",
    "FactorDecoding": "hasten.pipelines.decoding_schedulers",
    "HierarchicalDecoding": "hasten.pipelines.decoding_schedulers",
    "KLASSDecoding": "hasten.pipelines.decoding_schedulers",
    "RCRDecoding": "hasten.pipelines.decoding_schedulers",
    "SaberDecoding": "hasten.pipelines.decoding_schedulers",
    "StaticDecoding": "hasten.pipelines.decoding_schedulers",
    "ThresholdDecoding": "hasten.pipelines.decoding_schedulers",
    "TextPipeline": "hasten.pipelines.text",
    "FreeDave": "hasten.accelerators.decoding.freedave",
    "WINO": "hasten.accelerators.decoding.wino",
    "CacheQuant": "hasten.accelerators.caching.cachequant",
    "TeaCache": "hasten.accelerators.caching.teacache",
    "FirstBlock": "hasten.accelerators.caching.first_block",
    "FORA": "hasten.accelerators.caching.fora",
    "DeepCache": "hasten.accelerators.caching.deepcache",
    "BAC": "hasten.accelerators.caching.bac",
    "AcceleratedPipeline": "hasten.pipelines.accelerated",
    "Action": "hasten.accelerators.caching.plan",
    "DeltaDiT": "hasten.accelerators.caching.delta_dit",
    "Forecast": "hasten.accelerators.caching.forecast",
    "MagCache": "hasten.accelerators.caching.magcache",
    "Plan": "hasten.accelerators.caching.plan",
    "PlanError": "hasten.accelerators.caching.plan",
    "RunReport": "hasten.accelerators.caching.report",
    "SkipGuidance": "hasten.accelerators.caching.skip_guidance",
    "Trace": "hasten.accelerators.caching.trace",
    "accelerate": "hasten.pipelines.accelerated",
    "attach": "hasten.accelerators.caching.runtime",
    "calibrate": "hasten.pipelines.calibration",
    "explain": "hasten.pipelines.accelerated",
    "plan": "hasten.pipelines.planning",
    "trace": "hasten.pipelines.accelerated",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'hasten' has no attribute {name!r}")
    value = getattr(_import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
