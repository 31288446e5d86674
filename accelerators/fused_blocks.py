"""DiT blocks of diffusers with fewer passes over memory: the gated residual, the norm and the modulation behind attention are one kernel.

Each function is the forward of one class of block, up to rounding; attention, feed-forward and projections are called as always, so that
plans for parts of blocks, other attention and quantised layers stay what they are. Blocks that are compiled or replaced, and calls with
gradients, autocast or arguments that are not foreseen here, run as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn

from hasten.accelerators.dispatch import Call, Handler, compiled_whole
from hasten.accelerators.fusing import fuses
from hasten.kernels import backend, ops
from hasten.kernels.arguments import Modulation, Norm

Forward = Callable[..., Any]
LEAST = 1 << 21
"""Entries of a sample's hidden states from which on its blocks are fused. With fewer, what the host takes to prepare a launch (some ten
microseconds more than for the chain) is longer than the passes over memory that it saves; reckoned for two samples and 2 to 4 TB/s, not
measured. Of a sample, so that its result does not depend on how many others there are."""


class NotForeseen(Exception):
    """The block has something that its function here does not know: it runs as it is."""


def between(residual: Tensor, y: Tensor, norm: nn.Module, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Any:
    """(x, modulated): `x = residual + gate * y`, and the norm of that, scaled and shifted.

    Args:
        residual, y: [batch, tokens, channels].
        norm: LayerNorm over channels.
        gate, scale, shift: [batch, channels], [batch, 1, channels] or [batch, tokens, channels]; None for none.
    """
    tables = (t if t is None or t.dtype in (residual.dtype, torch.float32) else t.float() for t in (gate, scale, shift))
    return ops.gated_residual_adaln(residual, y.to(residual.dtype), Modulation(*tables), _norm(norm, residual.shape[-1]))


def added(residual: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`residual + gate * y` [batch, tokens, channels] in one pass; the gate is [batch, channels], or broadcasts."""
    gate = gate if gate.ndim == residual.ndim else gate.unsqueeze(1)
    return torch.addcmul(residual, gate, y).to(residual.dtype)


def _norm(norm: nn.Module, channels: int) -> Norm:
    """Its numbers.

    Raises:
        NotForeseen: It is none of the two classes, not over channels, or is listened to: it will not be called.
    """
    if type(norm) not in (nn.LayerNorm, FP32LayerNorm) or not _bare(norm) or tuple(norm.normalized_shape) != (channels,):  # type: ignore[arg-type]
        raise NotForeseen
    return Norm(norm.weight, norm.bias, norm.eps)  # type: ignore[arg-type]


def _bare(module: nn.Module) -> bool:
    """Whether a call of the module is one of its class's forward, and nothing else."""
    own = vars(module)
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in own or own.get("_compiled_call_impl"))


def basic(
    block: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """`BasicTransformerBlock` of PixArt ("ada_norm_single") and DiT ("ada_norm_zero")."""
    single = block.norm_type == "ada_norm_single"
    unusual = cross_attention_kwargs or block.pos_embed is not None or block.only_cross_attention or block._chunk_size is not None
    if unusual or hidden_states.ndim != 3 or not (single or block.norm_type == "ada_norm_zero"):
        raise NotForeseen
    last = block.norm2 if single else block.norm3
    for norm in {last} if single or block.attn2 is None else {block.norm2, last}:  # before anything is computed
        _norm(norm, hidden_states.shape[-1])
    if single:
        assert timestep is not None
        tables = block.scale_shift_table[None] + timestep.reshape(len(hidden_states), 6, -1)
        shift_in, scale_in, gate_in, shift, scale, gate = tables.chunk(6, dim=1)
        modulated = block.norm1(hidden_states) * (1 + scale_in) + shift_in
    else:
        modulated, gate_in, shift, scale, gate = block.norm1(hidden_states, timestep, class_labels, hidden_dtype=hidden_states.dtype)
    y = block.attn1(modulated, encoder_hidden_states=None, attention_mask=attention_mask)
    if block.attn2 is not None:
        if single:
            x = queries = added(hidden_states, y, gate_in)
        else:
            x, queries = between(hidden_states, y, block.norm2, gate_in, None, None)
        y = block.attn2(queries, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
        x, modulated = between(x, y, last, None, scale, shift)
    else:
        x, modulated = between(hidden_states, y, last, gate_in, scale, shift)
    return added(x, block.ff(modulated), gate)


def joint(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """`JointTransformerBlock` of SD3 and SD3.5."""
    if block._chunk_size is not None:
        raise NotForeseen
    _norm(block.norm2, hidden_states.shape[-1])
    if not block.context_pre_only:
        _norm(block.norm2_context, encoder_hidden_states.shape[-1])
    named, text = joint_attention_kwargs or {}, encoder_hidden_states
    modulated, gate_in, shift, scale, gate, *second = block.norm1(hidden_states, emb=temb)
    context: tuple[Tensor, ...] = ()
    if block.context_pre_only:
        queries = block.norm1_context(text, temb)
    else:
        queries, *context = block.norm1_context(text, emb=temb)
    y, of_text = block.attn(hidden_states=modulated, encoder_hidden_states=queries, **named)
    if second:
        modulated_again, gate_again = second
        hidden_states, y, gate_in = added(hidden_states, y, gate_in), block.attn2(hidden_states=modulated_again, **named), gate_again
    x, modulated = between(hidden_states, y, block.norm2, gate_in, scale, shift)
    x = added(x, block.ff(modulated), gate)
    return (_text(block, text, of_text, *context) if context else None), x


def _text(block: Any, text: Tensor, y: Tensor, gate_in: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    """The second stream of a block of two, behind attention."""
    text, modulated = between(text, y, block.norm2_context, gate_in, scale, shift)
    return added(text, block.ff_context(modulated), gate)


def flux(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """`FluxTransformerBlock`, with two streams."""
    _norm(block.norm2, hidden_states.shape[-1])
    _norm(block.norm2_context, encoder_hidden_states.shape[-1])
    modulated, gate_in, shift, scale, gate = block.norm1(hidden_states, emb=temb)
    queries, *context = block.norm1_context(encoder_hidden_states, emb=temb)
    y, of_text, *of_adapter = block.attn(
        hidden_states=modulated, encoder_hidden_states=queries, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
    )
    x, modulated = between(hidden_states, y, block.norm2, gate_in, scale, shift)
    x = added(x, block.ff(modulated), gate)
    for more in of_adapter:
        x = x + more
    return _clipped(_text(block, encoder_hidden_states, of_text, *context)), x


def flux_single(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """`FluxSingleTransformerBlock`: attention and feed-forward side by side."""
    words = encoder_hidden_states.shape[1]
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    modulated, gate = block.norm(x, emb=temb)
    wide = block.act_mlp(block.proj_mlp(modulated))
    y = block.attn(hidden_states=modulated, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    x = _clipped(added(x, block.proj_out(torch.cat([y, wide], dim=2)), gate))
    return x[:, :words], x[:, words:]


def _clipped(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def wan(block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
    """`WanTransformerBlock`, whose modulation is in float32."""
    channels, tables = hidden_states.shape[-1], block.scale_shift_table
    _norm(block.norm3, channels)
    if not isinstance(block.norm2, nn.Identity):
        _norm(block.norm2, channels)
    rows = (tables.unsqueeze(0) + temb.float()).unbind(2) if temb.ndim == 4 else (tables + temb.float()).chunk(6, dim=1)
    shift_in, scale_in, gate_in, shift, scale, gate = rows
    modulated = (block.norm1(hidden_states.float()) * (1 + scale_in) + shift_in).type_as(hidden_states)
    y = block.attn1(modulated, None, None, rotary_emb)
    if isinstance(block.norm2, nn.Identity):
        x = queries = added(hidden_states, y, gate_in)
    else:
        x, queries = between(hidden_states, y, block.norm2, gate_in, None, None)
    y = block.attn2(queries, encoder_hidden_states, None, None)
    x, modulated = between(x, y, block.norm3, None, scale, shift)
    return added(x, block.ffn(modulated), gate)


FUSED: dict[str, Forward] = {
    "diffusers.models.attention.BasicTransformerBlock": basic,
    "diffusers.models.attention.JointTransformerBlock": joint,
    "diffusers.models.transformers.transformer_flux.FluxTransformerBlock": flux,
    "diffusers.models.transformers.transformer_flux.FluxSingleTransformerBlock": flux_single,
    "diffusers.models.transformers.transformer_wan.WanTransformerBlock": wan,
}
"""By class; not by what inherits from it."""


def fused_forward(block: nn.Module) -> Forward | None:
    """The function for a block, or None where there is none or the block has a forward of its own (hooks of accelerate, a compiled one)."""
    kind = type(block)
    if "forward" in vars(block) or compiled_whole(block):
        return None
    return FUSED.get(f"{kind.__module__}.{kind.__qualname__}")


def fused_handlers(denoiser: nn.Module) -> dict[nn.Module, Handler]:
    """For `intercept`: the denoiser's blocks run fused wherever their tensors are on CUDA and kernels are on."""
    # What is compiled as a whole is fused by its compiler, and would be compiled anew for every run.
    if not at_hand() or compiled_whole(denoiser):
        return {}
    found = ((block, fused_forward(block)) for block in denoiser.modules())
    return {block: _handler(block, function) for block, function in found if function is not None}


def at_hand() -> bool:
    """Whether there is a device whose kernels are wanted."""
    return torch.cuda.is_available() and backend.wanted()


def _handler(block: nn.Module, function: Forward) -> Handler:
    """Fused where the call allows it, else what the block would have done."""

    def handle(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs.get("hidden_states")
        if isinstance(x, Tensor) and _takes(x) and not (block._forward_hooks or block._forward_pre_hooks):
            with suppress(NotForeseen):
                return function(block, *args, **kwargs)
        return call(*args, **kwargs)

    return handle


def _takes(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.dtype not in ops.STREAMS or x.numel() < max(1, LEAST * len(x)):
        return False
    return fuses(x) and not torch.is_autocast_enabled(x.device.type)
