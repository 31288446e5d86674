"""Attention back ends: which kernel computes softmax(QK^T)V in a denoiser's attention layers, chosen layer by layer.

diffusers 0.42's `set_attention_backend` reaches only processors that carry `_attention_backend` (not those of DiT, PixArt, SD3 and the
UNets), passes over the others in silence, and changes the choice of every other model in the process. Here each layer's processor gets a
*face* for the length of a run: an object of a subclass, over the same state, whose methods are the processor's own with one name bound
otherwise, that of the attention call. So masks, norms, residuals, rotary embeddings and image prompts are the processor's to the letter,
and no processor is changed.
"""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FunctionType, ModuleType
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

How = Literal["set", "routed", "already", "kept"]
"""How a layer comes to run a back end: by its processor's own `_attention_backend`; by the attention call in its processor's code; it did
before; or not at all."""


@dataclass(frozen=True)
class Backend:
    """A back end, and what it asks for.

    Attributes:
        key: Its name in diffusers.
        outside: Whether it is another package's kernel, whose rules differ from SDPA's in the corners (see `refusal`).
        cuda: Whether it runs on CUDA devices only.
        half: Whether it takes float16 and bfloat16 only, on CUDA.
        masks: Whether it takes attention masks.
        head_dim: Largest dimension of a head; 0 for any.
        capability: Least compute capability of a CUDA device.
    """

    key: str
    outside: bool = False
    cuda: bool = False
    half: bool = False
    masks: bool = True
    head_dim: int = 0
    capability: tuple[int, int] = (0, 0)

    def refusal(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool, enable_gqa: bool
    ) -> str | None:
        """Why a call must be left to SDPA: what the back end cannot do, or would do differently without saying so; None if it may run.

        Args:
            query: [batch, tokens, heads, head_dim], as `key` and `value`.
            attn_mask: Boolean or additive.
            dropout_p: Probability.
            is_causal: Whether later keys are hidden.
            enable_gqa: Whether several query heads share one key head.
        """
        if attn_mask is not None and not self.masks:
            return "mask"
        if self.half and query.is_cuda and query.dtype not in (torch.float16, torch.bfloat16):
            return str(query.dtype).removeprefix("torch.")
        if self.head_dim and query.shape[-1] > self.head_dim:
            return f"head dimension {query.shape[-1]}"
        if not self.outside:
            return None
        if dropout_p:
            return "dropout"
        if value.shape[-1] != query.shape[-1]:
            return "value dimension"
        if is_causal and query.shape[1] != key.shape[1]:
            return "causal, lengths differ"  # flash aligns the triangle to the last key, SDPA to the first
        if enable_gqa and attn_mask is not None:
            return "mask with grouped heads"
        return None


_FLASH = Backend("flash", outside=True, cuda=True, half=True, masks=False, head_dim=256, capability=(8, 0))
_SAGE = replace(_FLASH, key="sage", head_dim=128)

BACKENDS: dict[str, Backend] = {
    "sdpa": Backend("native"),
    "native": Backend("native"),
    "math": Backend("_native_math"),
    "efficient": Backend("_native_efficient", cuda=True),
    "cudnn": Backend("_native_cudnn", cuda=True, half=True, capability=(8, 0)),
    "sdpa_flash": Backend("_native_flash", half=True, masks=False, head_dim=256, capability=(8, 0)),
    "xformers": Backend("xformers", outside=True, cuda=True),
    "flash": _FLASH,
    "flash3": replace(_FLASH, key="_flash_3", capability=(9, 0)),
    "sage": _SAGE,
    "flash_hub": replace(_FLASH, key="flash_hub"),
    "flash3_hub": replace(_FLASH, key="_flash_3_hub", capability=(9, 0)),
    "sage_hub": replace(_SAGE, key="sage_hub"),
}
"""By the name that users know. "sdpa" and "native" are one: torch chooses its kernel. The "_hub" ones are fetched from the Hugging Face Hub
by the package `kernels`. diffusers' own names are understood as well. Its variants for sequences of varying length are not offered: they
read any mask as padding."""


def backend_of(name: str) -> Backend:
    """The back end of that name, ours or diffusers'.

    Raises:
        ValueError: There is none.
    """
    if name in BACKENDS:
        return BACKENDS[name]
    for backend in BACKENDS.values():
        if backend.key == name:
            return backend
    raise ValueError(f"attention must be one of {', '.join(BACKENDS)}, not {name!r}")


@dataclass(frozen=True)
class AttentionLayer:
    """What one layer runs.

    Attributes:
        path: In the model.
        processor: Class of its processor, or of the layer where it has none.
        how: How it comes to run the back end.
        reason: Where it is kept: why.
    """

    path: str
    processor: str
    how: How
    reason: str = ""


@dataclass(frozen=True)
class AttentionReport:
    """What every attention layer of a model runs. `print` it.

    Attributes:
        model: Its class.
        attention: The back end's name.
        layers: In the model's order.
        ran: By class of processor, what the calls ran so far: the back end, and SDPA with the reason where it had to stand in. Of compiled
            code, what was compiled. Empty for a custom processor that is only told its `_attention_backend`.
    """

    model: str
    attention: str
    layers: tuple[AttentionLayer, ...]
    ran: dict[str, set[str]] = field(default_factory=dict)

    @property
    def changed(self) -> int:
        """How many layers run the back end by this choice."""
        return sum(layer.how in ("set", "routed") for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "model": self.model,
            "attention": self.attention,
            "layers": [vars(layer) for layer in self.layers],
            "ran": {processor: sorted(ran) for processor, ran in self.ran.items()},
        }

    def __str__(self) -> str:
        counts = Counter((layer.processor, layer.how, layer.reason) for layer in self.layers)
        rows = [("layers", "processor", "back end", "how", "ran so far")]
        for (processor, how, reason), count in counts.items():
            kept = how == "kept"
            ran = "" if kept else ", ".join(sorted(self.ran.get(processor, ())))
            rows.append((str(count), processor, "its own" if kept else self.attention, f"kept: {reason}" if kept else how, ran))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"attention {self.attention!r} on {self.model}", *lines])


class Attention:
    """A back end for denoisers, put on for the length of a `with` block.

        attention = Attention("xformers")
        with attention.applied(pipe.transformer) as report:
            image = pipe(prompt).images[0]
        print(report)

    Calls that the back end cannot take (masks in flash and sage attention, a head too large) run SDPA, and the report says so. Processors
    whose code is not diffusers' are left as they are, or told by their `_attention_backend` where they read one. The choice sits on the
    model's layers: whoever else runs this very model meanwhile gets it too; other models, and diffusers' process-wide choice, are not
    touched.

    Args:
        name: One of `BACKENDS`, or diffusers' name for it.

    Raises:
        ValueError: There is no such back end, or its package is not installed or too old.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.backend = backend_of(name)
        _require(name, self.backend)
        self._choices: WeakKeyDictionary[nn.Module, _Choice] = WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"Attention({self.name!r})"

    def report(self, model: nn.Module) -> AttentionReport:
        """What the layers of a model would run; nothing is changed.

        Raises:
            RuntimeError: A back end is on the model now.
        """
        return self._chosen(model).report

    @contextmanager
    def applied(self, model: nn.Module, device: torch.device | str | None = None) -> Iterator[AttentionReport]:
        """Has the model's attention layers run the back end until the block is left.

        Args:
            model: A denoiser.
            device: Where it will run, if that is not where its weights lie now (offloading).

        Yields:
            What each layer runs; `ran` fills as the model is called.

        Raises:
            ValueError: No layer can run the back end, or device, dtype or context parallelism do not fit it. Nothing was changed then.
            RuntimeError: A back end is on the model already.
        """
        with _INSTALLING:
            choice = self._chosen(model)
            self._check(model, choice, device)
            for module, (_, face) in choice.faces.items():
                module.processor = face
        try:
            yield choice.report
        finally:
            with _INSTALLING:
                for module, (processor, face) in choice.faces.items():
                    if module.processor is face:  # else somebody gave the layer another processor meanwhile, which stays
                        module.processor = processor

    def _chosen(self, model: nn.Module) -> _Choice:
        """The choice for the model as it is now. Faces that still fit are kept, so that compiled code stays valid from run to run."""
        choice = _Choice(model, self.name, self.backend, self._choices.get(model))
        self._choices[model] = choice
        return choice

    def _check(self, model: nn.Module, choice: _Choice, device: torch.device | str | None) -> None:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        what, report, backend = type(model).__name__, choice.report, self.backend
        if all(layer.how == "kept" for layer in report.layers):
            reasons = sorted({f"{layer.processor}: {layer.reason}" for layer in report.layers})
            raise ValueError(f"attention={self.name!r} changes nothing in {what}: {'; '.join(reasons) or 'it has no attention layers'}")
        first = next(model.parameters(), None)
        where = torch.device(device) if device is not None else first.device if first is not None else torch.device("cpu")
        if backend.cuda and where.type != "cuda":
            raise ValueError(f"attention={self.name!r} runs on CUDA devices only, and {what} is on {where}")
        if where.type == "cuda" and any(backend.capability) and torch.cuda.get_device_capability(where) < backend.capability:
            least = ".".join(map(str, backend.capability))
            raise ValueError(f"attention={self.name!r} needs a device of compute capability {least} or above; {where} has less")
        if backend.half and where.type == "cuda" and not torch.is_autocast_enabled("cuda"):
            dtypes = {p.dtype for module in choice.faces for p in module.parameters() if p.is_floating_point()}
            if dtypes and dtypes <= {torch.float32, torch.float64}:
                raise ValueError(f"attention={self.name!r} needs float16 or bfloat16, and the attention layers of {what} are float32")
        shared = any(getattr(processor, "_parallel_config", None) is not None for processor, _ in choice.faces.values())
        if shared and backend.key not in _AttentionBackendRegistry._supports_context_parallel:
            raise ValueError(f"attention={self.name!r} does not support context parallelism, which is on in {what}")


_INSTALLING = threading.Lock()
_ATTENTION_CALLS = ("scaled_dot_product_attention", "dispatch_attention_fn", "memory_efficient_attention")


def _require(name: str, backend: Backend) -> None:
    """Refuses a back end whose package is missing, too old, or cannot be fetched, in diffusers' words."""
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _check_attention_backend_requirements,
        _maybe_download_kernel_for_backend,
    )

    try:
        member = AttentionBackendName(backend.key)
        _check_attention_backend_requirements(member)
        _maybe_download_kernel_for_backend(member)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"attention={name!r} cannot be used: {error}") from error


class _Route:
    """Stands for the attention functions in the methods of one class of processors, and notes what their calls ran."""

    def __init__(self, name: str, backend: Backend) -> None:
        from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

        self.name = name
        self.backend = backend
        self.member = AttentionBackendName(backend.key)
        self.native = AttentionBackendName("native")
        self.diffusers = dispatch_attention_fn
        self.ran: set[str] = set()
        self.functional = ModuleType(F.__name__)
        vars(self.functional).update(vars(F) | {"scaled_dot_product_attention": self.sdpa})

    @torch.compiler.assume_constant_result
    def note(self, ran: str) -> int:
        """Notes what a call runs; under `torch.compile` when it is traced."""
        self.ran.add(ran)
        return len(ran)

    def sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As `F.scaled_dot_product_attention`; tensors are [batch, heads, tokens, head_dim]."""
        q, k, v = query, key, value
        refusal: str | None = f"{query.ndim}-d call"
        if query.ndim == 4:
            q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            refusal = self.backend.refusal(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa)
        if refusal is not None:
            self.note(f"sdpa ({refusal})")
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None:
            attn_mask = self._fitting(attn_mask[(None,) * (4 - attn_mask.ndim)], q, k)
        self.note(self.name)
        out = self.diffusers(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend=self.member)
        return out.transpose(1, 2)

    def dispatch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Any:
        """As diffusers' `dispatch_attention_fn`; tensors are [batch, tokens, heads, head_dim]."""
        run: Any = self.member
        if backend is not None and backend != self.member:
            # Written into the processor's code, and its mask made for it.
            self.note(f"{getattr(backend, 'value', backend)} (the processor's choice)")
            run = backend
        else:
            refusal = self.backend.refusal(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
            if refusal is not None:
                self.note(f"sdpa ({refusal})")
                run = self.native
            else:
                self.note(self.name)
                if attn_mask is not None:
                    # Two dimensions are [batch, keys] to diffusers where they fit, and else [queries, keys] as in SDPA.
                    padding = attn_mask.ndim == 2 and attn_mask.shape == (query.shape[0], key.shape[1])
                    lifted = attn_mask[:, None, None] if padding else attn_mask[(None,) * (4 - attn_mask.ndim)]
                    attn_mask = self._fitting(lifted, query, key)
        return self.diffusers(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            attention_kwargs,
            backend=run,
            parallel_config=parallel_config,
        )

    def _fitting(self, mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """A mask [batch or 1, heads or 1, queries or 1, keys or 1] as the back end reads it."""
        return additive_bias(mask, query, key.shape[1]) if self.backend.key == "xformers" else mask


def additive_bias(mask: Tensor, query: Tensor, keys: int) -> Tensor:
    """A mask as xformers wants it: added to the scores, in their dtype, every row beginning at a multiple of 8 elements.

    diffusers' dispatch would take True for 1.0, and its rows fit only where the number of keys happens to be a multiple of 8. What is
    masked gets the dtype's least number instead of -inf, which becomes NaN in a row without any key.

    Args:
        mask: [batch or 1, heads or 1, queries or 1, keys or 1]; boolean (True is seen) or additive.
        query: [batch, queries, heads, head_dim].
        keys: How many.

    Returns:
        [batch, heads, queries, keys], a view that repeats what is broadcast.
    """
    least = torch.finfo(query.dtype).min
    if mask.dtype == torch.bool:
        bias = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, least)
    else:
        bias = mask.to(query.dtype).clamp(min=least)
    bias = F.pad(bias.expand(*bias.shape[:3], keys), (0, -keys % 8))
    return bias[..., :keys].expand(query.shape[0], query.shape[2], query.shape[1], keys)


class _Choice:
    """For one model as it stands: the face of every layer's processor that can run the back end, and the report."""

    def __init__(self, model: nn.Module, name: str, backend: Backend, before: _Choice | None) -> None:
        self.name = name
        self.backend = backend
        self.types: dict[type, tuple[type, _Route] | None] = before.types if before is not None else {}
        self.faces: dict[nn.Module, tuple[Any, Any]] = {}
        layers: list[AttentionLayer] = []
        looked: dict[type, tuple[How, str]] = {}
        without: dict[type, bool] = {}  # of modules without a processor: whether they compute attention
        for path, module in model.named_modules():
            processor = getattr(module, "processor", None)
            cls = type(processor)
            if not callable(processor):
                cls = type(module)
                if cls not in without:
                    without[cls] = _computes_attention(cls)
                if without[cls]:
                    layers.append(AttentionLayer(path, cls.__name__, "kept", "it has no processor"))
                continue
            if "_hasten_attention" in vars(cls):
                raise RuntimeError(
                    f"an attention back end is on {type(model).__name__} already; one at a time: give every thread a model of its own"
                )
            if cls not in looked:
                looked[cls] = self._look(cls)
            how, reason = looked[cls]
            if how in ("set", "routed"):
                known = before.faces.get(module) if before is not None else None
                self.faces[module] = known if known is not None and known[0] is processor else (processor, self._face(processor))
            layers.append(AttentionLayer(path, cls.__name__, how, reason))
        ran = {cls.__name__: typed[1].ran for cls in looked if (typed := self.types.get(cls)) is not None}
        self.report = AttentionReport(type(model).__name__, name, tuple(layers), ran)

    def _look(self, cls: type) -> tuple[How, str]:
        """How processors of a class can be made to run the back end, and if they cannot, why."""
        methods = _methods(cls)
        names = {name for method in methods.values() for name in method.__code__.co_names}
        calls = names.intersection(_ATTENTION_CALLS)
        own = {"native": "scaled_dot_product_attention", "xformers": "memory_efficient_attention"}.get(self.backend.key)
        if calls == {own}:
            return "already", ""
        if cls not in self.types:
            self.types[cls] = self._subclass(cls, methods, "_attention_backend" in names)
        if self.types[cls] is not None:
            return ("set" if "_attention_backend" in names else "routed"), ""
        if not calls:
            return "kept", "it calls no attention function"
        return "kept", "its code is not diffusers'" if calls & set(_ATTENTION_CALLS[:2]) else "it calls xformers"

    def _subclass(self, cls: type, methods: dict[str, FunctionType], settable: bool) -> tuple[type, _Route] | None:
        """The class of the faces of a class of processors, shared by all of them so that compiled blocks share their code."""
        route = _Route(self.name, self.backend)
        members: dict[str, Any] = {}
        for name, method in methods.items():
            if (method.__module__ or "").startswith("diffusers."):  # whose globals stay as they are: the copy would not see a change
                bound = _bindings(method, route)
                if bound:
                    members[name] = _rebound(method, bound)
        if settable:
            members["_attention_backend"] = property(lambda face: route.member)
        if not members or cls.__dictoffset__ == 0:
            return None
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "_hasten_attention": route}
        return type(cls.__name__, (cls,), names | members), route

    def _face(self, processor: Any) -> Any:
        """An object over the processor's own state: what either changes, both have."""
        typed = self.types[type(processor)]
        assert typed is not None
        face: Any = object.__new__(typed[0])
        object.__setattr__(face, "__dict__", processor.__dict__)
        return face


def _methods(cls: type) -> dict[str, FunctionType]:
    """The methods that objects of a class have, each as the class that overrides it last defines it."""
    found = {name: inspect.getattr_static(cls, name) for base in cls.__mro__ if base not in (object, nn.Module) for name in vars(base)}
    return {name: value for name, value in found.items() if isinstance(value, FunctionType)}


def _computes_attention(cls: type) -> bool:
    """Whether modules of a class compute attention themselves."""
    return issubclass(cls, nn.MultiheadAttention) or any(
        name in method.__code__.co_names for method in _methods(cls).values() for name in _ATTENTION_CALLS
    )


def _bindings(method: FunctionType, route: _Route) -> dict[str, Any]:
    """The global names by which a method reaches an attention function, bound to the route's; empty if it does so in another way."""
    instead: tuple[tuple[Any, Any], ...] = (
        (F.scaled_dot_product_attention, route.sdpa),
        (route.diffusers, route.dispatch),
        (F, route.functional),
    )
    names = method.__code__.co_names
    if "scaled_dot_product_attention" not in names and "dispatch_attention_fn" not in names:
        return {}
    return {name: new for name in names for old, new in instead if method.__globals__.get(name) is old}


def _rebound(method: FunctionType, bound: dict[str, Any]) -> Callable[..., Any]:
    """The same method, with some of its global names bound otherwise."""
    # Without a module's name torch.compile takes the globals as they are, and does not look into that module for them.
    scope = {name: value for name, value in method.__globals__.items() if name != "__name__"} | bound
    copy = FunctionType(method.__code__, scope, method.__name__, method.__defaults__, method.__closure__)
    copy.__kwdefaults__ = method.__kwdefaults__
    copy.__annotations__ = method.__annotations__
    copy.__qualname__, copy.__module__, copy.__doc__ = method.__qualname__, method.__module__, method.__doc__
    return copy
