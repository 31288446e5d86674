"""Caching of other projects, at several settings each, put on an unmodified diffusers pipeline and taken off again.

Each project is driven through its public interface and at its defaults but for what a setting names. All are optional:
`installed` says which are there. Where one cannot serve a pipeline, its own error is the result (`attempt`).

    for peer in (peer for name in families_for(pipe) for peer in grid(name)):
        output, error = attempt(peer, pipe, lambda pipe: pipe(prompt, num_inference_steps=50), steps=50)
"""

from __future__ import annotations

import ast
import copy
import functools
import io
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, fields
from importlib import import_module, metadata
from types import new_class
from typing import Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from hasten.benchmarks.harness import BenchError

DENOISERS = ("transformer", "transformer_2", "unet")
"""Names under which diffusers pipelines hold what a cache is put on."""

T = TypeVar("T")


class PeerMissing(BenchError):
    """The package of a peer is not installed."""


# -------------------------------------------------------------------------------------------------------- put on, take off


def _double(module: nn.Module) -> nn.Module:
    """A copy of every module in `module`, with the same weights: what is patched on it does not reach the original."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


@contextmanager
def _isolated(pipe: Any) -> Iterator[None]:
    """Whatever is done inside to the pipeline, its class or its denoiser is gone afterwards.

    Peers assign to `pipe.__class__.__call__` and to modules' `forward`, and not all undo it, least of all after an error. So inside,
    the pipeline is of a class of its own, with the name that peers look for, and its denoiser is a double.
    """
    kind, attributes = type(pipe), dict(vars(pipe))
    own = new_class(kind.__name__, (kind,))
    own.__module__ = kind.__module__
    try:
        pipe.__class__ = own
        for name in DENOISERS:
            if isinstance(attributes.get(name), nn.Module):
                vars(pipe)[name] = _double(attributes[name])  # not by setattr, which would rewrite the pipeline's config
        yield
    finally:
        pipe.__class__ = kind
        vars(pipe).clear()
        vars(pipe).update(attributes)


def _denoiser(pipe: Any) -> nn.Module:
    """The pipeline's transformer, or its UNet."""
    found = getattr(pipe, "transformer", None)
    return found if found is not None else pipe.unet


def _cache_dit() -> Any:
    """cache-dit, which on import replaces methods of `logging.Logger`, sets environment variables, and logs each step it takes."""
    before, methods = dict(os.environ), {name: getattr(logging.Logger, name, None) for name in ("warning_once", "info_once")}
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    try:
        return import_module("cache_dit")
    finally:
        os.environ.clear()
        os.environ.update(before)
        for name, method in methods.items():
            if method is not None:
                setattr(logging.Logger, name, method)


# ---------------------------------------------------------------------------------------------------------------- the peers


@dataclass(frozen=True)
class Peer(ABC):
    """One setting of another project's cache.

    Attributes:
        name: Of the family that `grid` knows.
        package: The distribution to install.
    """

    name: ClassVar[str]
    package: ClassVar[str]

    @property
    def version(self) -> str | None:
        """Of the installed package; None where it is missing."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None

    @property
    def settings(self) -> dict[str, Any]:
        """What tells this setting from others of its family."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.compare}

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in self.settings.items())})"

    @contextmanager
    def on(self, pipe: Any, *, steps: int = 50, calibration: Callable[[Any], object] | None = None) -> Iterator[Any]:
        """Puts the cache on the pipeline; on exit the pipeline is as it was, also after an error.

        Args:
            pipe: Called as usual inside. Its denoiser is a double there, which shares the weights.
            steps: `num_inference_steps` of the calls.
            calibration: Calls the pipeline it is given once, at that number of steps; for peers that must measure the model.

        Raises:
            PeerMissing: The package is not installed.
            Exception: The peer's own error where it does not serve this pipeline.
        """
        if self.version is None:
            raise PeerMissing(f"{self.name} needs the package {self.package}: pip install {self.package}")
        measured = self._measure(pipe, steps, calibration)
        with _isolated(pipe):
            self._enable(pipe, steps, measured)
            yield pipe

    def _measure(self, pipe: Any, steps: int, calibration: Callable[[Any], object] | None) -> list[float]:
        """What the setting needs to know of the model."""
        return []

    @abstractmethod
    def _enable(self, pipe: Any, steps: int, measured: list[float]) -> None:
        """Puts the cache on a pipeline that need not be restored."""


@dataclass(frozen=True)
class DBCache(Peer):
    """cache-dit's DBCache: while the residual of the first blocks changes little, the last residual of the others is added again.

    Attributes:
        threshold: Largest relative change of the residual at which a step is reused ("R").
        warmup: First steps, which are all computed ("W").
        continuous: Most reused steps in a row, -1 for no limit ("MC").
        first: Blocks that are always computed ("F").
    """

    name: ClassVar[str] = "cache-dit"
    package: ClassVar[str] = "cache-dit"
    threshold: float
    warmup: int
    continuous: int
    first: int = 1

    def _calibrator(self, cache_dit: Any) -> Any:
        return None

    def _enable(self, pipe: Any, steps: int, measured: list[float]) -> None:
        cache_dit = _cache_dit()
        target, denoiser = pipe, _denoiser(pipe)
        if hasattr(denoiser, "joint_transformer_blocks") and hasattr(denoiser, "single_transformer_blocks"):
            # Its own adapter for AuraFlow caches the single-stream blocks alone; by hand it serves both kinds.
            target = cache_dit.BlockAdapter(
                pipe=pipe,
                transformer=denoiser,
                blocks=[denoiser.joint_transformer_blocks, denoiser.single_transformer_blocks],
                forward_pattern=[cache_dit.ForwardPattern.Pattern_1, cache_dit.ForwardPattern.Pattern_3],
                check_forward_pattern=True,
            )
        cache_dit.enable_cache(
            target,
            cache_config=cache_dit.DBCacheConfig(
                Fn_compute_blocks=self.first,
                Bn_compute_blocks=0,
                residual_diff_threshold=self.threshold,
                max_warmup_steps=self.warmup,
                max_continuous_cached_steps=self.continuous,
            ),
            calibrator_config=self._calibrator(cache_dit),
        )


@dataclass(frozen=True)
class DBCacheTaylor(DBCache):
    """DBCache with the residual forecast by a Taylor series instead of held.

    Attributes:
        order: Of the series.
    """

    name: ClassVar[str] = "cache-dit-taylorseer"
    order: int = 1

    def _calibrator(self, cache_dit: Any) -> Any:
        return cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=self.order)


class _Hooked(Peer):
    """A cache that comes with diffusers."""

    package: ClassVar[str] = "diffusers"

    def _apply(self, pipe: Any, config: Any, function: str) -> None:
        denoiser: Any = _denoiser(pipe)
        if hasattr(denoiser, "enable_cache"):
            denoiser.enable_cache(config)
        else:  # no CacheMixin; the function beneath it may serve all the same
            getattr(import_module("diffusers.hooks"), function)(denoiser, config)


@dataclass(frozen=True)
class FirstBlock(_Hooked):
    """diffusers' FirstBlockCache.

    Attributes:
        threshold: Largest relative change of the first block's residual at which the other blocks are reused.
    """

    name: ClassVar[str] = "diffusers-first-block"
    threshold: float

    def _enable(self, pipe: Any, steps: int, measured: list[float]) -> None:
        from diffusers.hooks import FirstBlockCacheConfig

        self._apply(pipe, FirstBlockCacheConfig(threshold=self.threshold), "apply_first_block_cache")


@dataclass(frozen=True)
class MagCache(_Hooked):
    """diffusers' MagCache: reuses the residual while the growth of its norm, measured beforehand, adds up to little.

    Attributes:
        threshold: Largest accumulated error.
        skip: Most reused steps in a row.
        retention: Share of the steps, at the beginning, that is computed.
        ratios: The growth measured, by denoiser and number of steps. One grid shares it, so that a model is measured once.
    """

    name: ClassVar[str] = "diffusers-magcache"
    threshold: float
    skip: int
    retention: float
    ratios: WeakKeyDictionary[nn.Module, dict[int, list[float]]] = field(default_factory=WeakKeyDictionary, compare=False, repr=False)

    def _measure(self, pipe: Any, steps: int, calibration: Callable[[Any], object] | None) -> list[float]:
        from diffusers.hooks import MagCacheConfig

        known = self.ratios.setdefault(_denoiser(pipe), {})
        if steps not in known:
            if calibration is None:
                raise BenchError(f"{self.name} measures a model before it can run: on() needs calibration=")
            printed = io.StringIO()
            with _isolated(pipe):
                self._apply(pipe, MagCacheConfig(calibrate=True, num_inference_steps=steps), "apply_mag_cache")
                with redirect_stdout(printed):  # it has no other way to say what it found
                    calibration(pipe)
            lists = [line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
            found = [ast.literal_eval(line) for line in lists if not line.startswith("[MagCache]")]
            if not found:
                raise BenchError(f"{self.name} found no ratios: the calibration must be one call at {steps} steps")
            known[steps] = found[0]  # of the conditional call, where guidance makes two
        return known[steps]

    def _enable(self, pipe: Any, steps: int, measured: list[float]) -> None:
        from diffusers.hooks import MagCacheConfig

        config = MagCacheConfig(
            threshold=self.threshold,
            max_skip_steps=self.skip,
            retention_ratio=self.retention,
            num_inference_steps=steps,
            mag_ratios=measured,
        )
        self._apply(pipe, config, "apply_mag_cache")


_ATTENTION = (r"(single_)?transformer_blocks\..*attn\d?", r"(temporal_transformer_)?blocks\..*attn\d?")
"""The modules that diffusers' TaylorSeer forecasts by default, and `attn1`, `attn2`, which its patterns miss: it would do nothing."""


@dataclass(frozen=True)
class TaylorSeer(_Hooked):
    """diffusers' TaylorSeer: attention outputs are forecast between steps at a fixed interval.

    Attributes:
        interval: From one computed step to the next.
        order: Of the series.
        warmup: First steps, which are all computed.
    """

    name: ClassVar[str] = "diffusers-taylorseer"
    interval: int
    order: int = 1
    warmup: int = 3

    def _enable(self, pipe: Any, steps: int, measured: list[float]) -> None:
        from diffusers.hooks import TaylorSeerCacheConfig

        config = TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=self.warmup,
            max_order=self.order,
            cache_identifiers=list(_ATTENTION),
            taylor_factors_dtype=next(_denoiser(pipe).parameters()).dtype,  # its default, bfloat16, would cost it exactness
        )
        self._apply(pipe, config, "apply_taylorseer_cache")


@dataclass(frozen=True)
class DeepCache(Peer):
    """DeepCache: between steps at a fixed interval only the outer layers of a UNet are computed.

    Attributes:
        interval: From one fully computed step to the next.
        branch: Skip connection down to which layers are always computed: 3 times the block plus the layer in it.
    """

    name: ClassVar[str] = "deepcache"
    package: ClassVar[str] = "DeepCache"
    interval: int
    branch: int = 0

    def _enable(self, pipe: Any, steps: int, measured: list[float]) -> None:
        helper = import_module("DeepCache").DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=self.interval, cache_branch_id=self.branch)
        helper.enable()
        kind: Any = type(pipe)
        bare = kind.__call__

        @functools.wraps(bare)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            # By itself it keeps features and the first timestep from one call to the next.
            helper.cached_output.clear()
            helper.start_timestep = None
            return bare(self, *args, **kwargs)

        kind.__call__ = call


# -------------------------------------------------------------------------------------------------------------------- grids

_DB: tuple[tuple[float, int, int], ...] = (
    (0.02, 4, -1), (0.03, 4, -1), (0.05, 8, -1), (0.08, 8, -1), (0.12, 4, 2), (0.12, 8, 3), (0.24, 4, 3), (0.24, 4, 6), (0.5, 4, 8),
    (1.0, 2, 12),
)  # fmt: skip


def _magcache() -> list[Peer]:
    shared: WeakKeyDictionary[nn.Module, dict[int, list[float]]] = WeakKeyDictionary()
    settings = ((0.03, 2, 0.2), (0.06, 3, 0.2), (0.12, 3, 0.2), (0.12, 5, 0.2), (0.24, 5, 0.1), (0.5, 8, 0.1), (1.0, 12, 0.1))
    return [MagCache(*setting, ratios=shared) for setting in settings]


_GRIDS: Mapping[str, Callable[[], list[Peer]]] = {
    DBCache.name: lambda: [DBCache(*setting) for setting in _DB],
    DBCacheTaylor.name: lambda: [DBCacheTaylor(*setting) for setting in _DB],
    FirstBlock.name: lambda: [FirstBlock(threshold) for threshold in (0.02, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5)],
    MagCache.name: _magcache,
    TaylorSeer.name: lambda: [TaylorSeer(interval) for interval in (2, 3, 4, 5, 6, 8)],
    DeepCache.name: lambda: [DeepCache(interval, branch) for branch in (0, 3) for interval in (2, 3, 4, 5, 6, 8)],
}


def grid(name: str) -> list[Peer]:
    """Settings of a family, from cautious to bold, enough to draw its front of speed and error.

    Raises:
        ValueError: There is no family of that name.
    """
    if name not in _GRIDS:
        raise ValueError(f"no peer is called {name!r}; there are {', '.join(_GRIDS)}")
    return _GRIDS[name]()


def installed() -> dict[str, str | None]:
    """Every family with the version of its package, None where that is missing."""
    return {name: _GRIDS[name]()[0].version for name in _GRIDS}


def families_for(pipe: Any) -> list[str]:
    """Families made for what the pipeline denoises with, a transformer or a UNet, installed or not."""
    if getattr(pipe, "transformer", None) is not None:
        return [name for name in _GRIDS if name != DeepCache.name]
    return [DeepCache.name] if getattr(pipe, "unet", None) is not None else []


def attempt(
    peer: Peer,
    pipe: Any,
    call: Callable[[Any], T],
    *,
    steps: int = 50,
    calibration: Callable[[Any], object] | None = None,
) -> tuple[T | None, str | None]:
    """Calls the pipeline under a peer.

    Args:
        call: Given the pipeline with the cache on.
        steps: `num_inference_steps` of the call.
        calibration: See `Peer.on`; `call` where it is None.

    Returns:
        What `call` returned and None, or None and the peer's error in one line.
    """
    try:
        with peer.on(pipe, steps=steps, calibration=calibration or call):
            return call(pipe), None
    except PeerMissing:
        raise
    except Exception as error:  # whatever it is, it is what a user of that project would get
        text = " ".join(str(error).split())
        return None, f"{type(error).__name__}: {text}" if text else type(error).__name__
