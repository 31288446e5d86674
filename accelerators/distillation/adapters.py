"""Low-rank adapters (LoRA, arXiv 2106.09685, by peft) on a denoiser: the student is the denoiser with them, the teacher without.

The weights of the base are held once. Adapters are taken off without a trace, and their weights have the names that diffusers saves and
loads, whatever the denoiser's class offers.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hasten.accelerators.checks import check_whole

ATTENTION_AND_FEED_FORWARD = re.compile(r"(^|\.)(attn|attention|self_attn|cross_attn|ff|feed_forward|ffn|mlp)[^.]*(\.|$)")
"""Where the linears lie that are adapted unless others are named, by their place in the denoiser."""


@dataclass(frozen=True)
class LoRA:
    """Which layers get adapters, and how wide they are.

    Attributes:
        rank: Of every adapter; the published step LoRAs have 32 to 128.
        targets: Ends of the names of the linear layers ("to_q", "ff.net.2"); all linears of attention and feed-forward by default.
        merged: The student's adapters are multiplied into the weights once a step, not applied at every call. Faster where a batch has
            more tokens than layers are wide, at the price of one more copy of the adapted weights and of their gradients.

    Raises:
        ValueError: A value is out of range.
    """

    rank: int = 64
    targets: tuple[str, ...] | None = None
    merged: bool = False

    def __post_init__(self) -> None:
        check_whole(1, rank=self.rank)
        if self.targets is not None and (isinstance(self.targets, str) or not self.targets):
            raise ValueError(f"targets must be names of layers, or None for attention and feed-forward, not {self.targets!r}")


def layers_of(denoiser: nn.Module, targets: Sequence[str] | None = None) -> list[str]:
    """Names of the linear layers that are adapted.

    Raises:
        ValueError: There is none.
    """
    found_all = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear) and "lora_" not in name]
    linears = [name.removesuffix(".base_layer") for name in found_all]  # other adapters wrap theirs
    if targets is None:
        found = [name for name in linears if ATTENTION_AND_FEED_FORWARD.search(name)]
    else:
        found = [name for name in linears if any(name == end or name.endswith(f".{end}") for end in targets)]
    if not found:
        asked = (
            "no linear layer in an attention or feed-forward block" if targets is None else f"no linear layer called {', '.join(targets)}"
        )
        raise ValueError(
            f"{type(denoiser).__name__} has {asked}; name some with targets= (it has {', '.join(linears[:6]) or 'no linears'})"
        )
    return found


class Adapters:
    """Adapters on a denoiser's layers.

    Args:
        denoiser: Changed in place until `remove`: each adapted layer is wrapped. Its own weights get no gradient.
        layers: Names of the layers.
        rank: Of every adapter. Their scale is 1 (alpha is the rank).
        name: Of the adapter.
        seed: Of the first factor; the second begins at zero, where the student is the teacher.

    Raises:
        ValueError: The denoiser has an adapter of that name already.
        ImportError: peft is not installed.
    """

    def __init__(self, denoiser: nn.Module, layers: Sequence[str], rank: int, name: str = "distilled", seed: int = 0) -> None:
        peft = _peft()
        self.denoiser, self.layers, self.rank, self.name = denoiser, list(layers), rank, name
        if any(name in getattr(module, "lora_A", {}) for module in denoiser.modules()):
            raise ValueError(f"the denoiser has an adapter {name!r} already; unload it, or give this one another name")
        self._before = [(p, p.requires_grad) for name, p in denoiser.named_parameters() if "lora_" not in name]
        self.config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=self.layers, lora_dropout=0.0, bias="none")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters on one base are meant
                peft.inject_adapter_in_model(self.config, denoiser, adapter_name=name)
        self.wrapped: dict[str, Any] = {layer: denoiser.get_submodule(layer) for layer in self.layers}
        for parameter, _ in self._before:
            parameter.requires_grad_(False)
        with torch.no_grad():
            for factor in self.factors.values():  # half precision cannot take an optimiser's small steps
                factor.data = factor.data.float()
                factor.requires_grad_(True)
        self.set(True)

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """Both factors of every layer by the names that diffusers gives them, without the denoiser's: A [rank, in], B [out, rank]."""
        return {
            f"{layer}.{factor}.weight": getattr(wrapped, factor)[self.name].weight
            for layer, wrapped in self.wrapped.items()
            for factor in ("lora_A", "lora_B")
        }

    def state(self) -> dict[str, Tensor]:
        """A copy of all factors on the CPU."""
        return {name: factor.detach().cpu().clone() for name, factor in self.factors.items()}

    def fresh(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Factors of another adapter that begins at nothing: the first is even over its layer's usual range, the second zero."""
        made = {}
        for name, factor in self.factors.items():
            if name.endswith("lora_A.weight"):
                drawn = torch.rand(factor.shape, generator=generator, device=generator.device)
                made[name] = ((2 * drawn - 1) / math.sqrt(factor.shape[1])).to(factor)
            else:
                made[name] = torch.zeros_like(factor)
        return made

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over factors as `state` gives them.

        Raises:
            ValueError: They are of other layers or of another rank.
        """
        factors = self.factors
        if (strange := sorted(factors.keys() ^ state.keys())) or (
            strange := [name for name, factor in factors.items() if factor.shape != state[name].shape]
        ):
            raise ValueError(f"these adapters do not fit the denoiser: {strange[0]} and {len(strange) - 1} more differ")
        with torch.no_grad():
            for name, factor in factors.items():
                factor.copy_(state[name])

    def merged(self, factors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights of the adapted layers with their adapters in them, as `functional_call` takes them; gradients flow to the factors."""
        factors = self.factors if factors is None else factors
        made = {}
        for layer, wrapped in self.wrapped.items():
            weight = wrapped.base_layer.weight
            change = factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"]
            made[f"{layer}.base_layer.weight"] = (weight.to(change.dtype) + change).to(weight.dtype)
        return made

    def set(self, active: bool) -> None:
        """Makes the denoiser the student, or the teacher."""
        for wrapped in self.wrapped.values():
            # peft also decides then what is trained; that stays as it was, other adapters' factors among it.
            needed = [(parameter, parameter.requires_grad) for parameter in wrapped.parameters()]
            wrapped.enable_adapters(active)
            if active:
                wrapped.set_adapter(self.name)
            for parameter, trained in needed:
                parameter.requires_grad_(trained)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the block the denoiser is the teacher, elsewhere the student: a checkpointed forward is repeated in the backward pass."""
        self.set(False)
        try:
            yield
        finally:
            self.set(True)

    def call_merged(self, weights: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The student's answer by weights of `merged`, which may have gradients; not under gradient checkpointing."""
        with self.off():
            return functional_call(self.denoiser, dict(weights), args, kwargs)

    def remove(self) -> None:
        """Takes the adapters off; the denoiser is as it was."""
        for layer, wrapped in self.wrapped.items():
            if others := [name for name in wrapped.lora_A if name != self.name]:
                if self.name in wrapped.active_adapters:
                    wrapped.set_adapter(others[0])
                wrapped.delete_adapter(self.name)
                continue
            parent, _, last = layer.rpartition(".")
            setattr(self.denoiser.get_submodule(parent), last, wrapped.base_layer)
        configs: Any = self.denoiser.peft_config
        del configs[self.name]
        if not configs:
            del self.denoiser.peft_config
        for parameter, needed in self._before:
            parameter.requires_grad_(needed)


@contextmanager
def carried(denoiser: nn.Module, factors: Mapping[str, Tensor], name: str) -> Iterator[None]:
    """Within the block the denoiser has adapters that are not trained; after it its weights are bit for bit as before.

    They are added to the weights where all adapted layers are plain linears: then a call costs no more than without them. Where some are
    quantised, have other adapters or are kept off the device between calls, they run beside the layers.

    Args:
        denoiser: Changed in place for the block.
        factors: By the names of `Adapters.factors`, of scale 1.
        name: Of the adapters, where they run beside the layers.

    Raises:
        ValueError: They do not fit the denoiser, or it has an adapter of that name already.
    """
    layers = list(dict.fromkeys(factor.rsplit(".", 2)[0] for factor in factors))
    present = dict(denoiser.named_modules())
    if missing := [layer for layer in layers if layer not in present]:
        raise ValueError(f"these adapters do not fit the denoiser: it has no {missing[0]}, and {len(missing) - 1} more are missing")
    linears: dict[str, Any] = {layer: present[layer] for layer in layers}
    if any(map(_moved, present.values())) or not all(map(_plain, linears.values())):
        adapters = Adapters(denoiser, layers, len(next(iter(factors.values()))), name)
        try:
            adapters.load(factors)
            yield
        finally:
            adapters.remove()
        return
    changes = {layer: _change(layer, linear.weight.data, factors) for layer, linear in linears.items()}
    before = {layer: linear.weight.data.clone() for layer, linear in linears.items()}
    try:
        for layer, linear in linears.items():  # in place: captured graphs read the same memory
            linear.weight.data.copy_(linear.weight.data + changes.pop(layer))
        yield
    finally:
        for layer, linear in linears.items():
            linear.weight.data.copy_(before[layer])


def _plain(module: nn.Module) -> bool:
    """Whether a module is a linear that computes with its weight as it lies there."""
    if type(module) is not nn.Linear or module.weight.is_meta:
        return False
    return module.weight.is_floating_point() and module.weight.element_size() > 1


def _moved(module: nn.Module) -> bool:
    """Whether a module's weights come from a copy of them at every call."""
    return "group_offloading" in getattr(getattr(module, "_diffusers_hook", None), "hooks", ())


def _change(layer: str, weight: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
    """Of the weight of a layer, in float32 at least."""
    kind = torch.promote_types(weight.dtype, torch.float32)
    names = [f"{layer}.lora_{side}.weight" for side in "AB"]
    if missing := [name for name in names if name not in factors]:
        raise ValueError(f"these adapters do not fit the denoiser: {missing[0]} is missing")
    first, second = (factors[name].to(weight.device, kind) for name in names)
    if (shape := (second.shape[0], first.shape[1])) != weight.shape or first.shape[0] != second.shape[1]:
        raise ValueError(f"these adapters do not fit the denoiser: {layer} takes {tuple(weight.shape)}, not {tuple(shape)}")
    return second @ first


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ImportError("distillation needs peft: pip install 'hasten[train]'") from None
    return peft
