"""Attention back ends: the same output from every family, only these layers, only now, and every layer says what it ran."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch, transformers
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import (
    Attention as DiffusersAttention,
)
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    XFormersAttnProcessor,
)
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from hasten.accelerators.attention import BACKENDS, Attention, _Route, additive_bias, backend_of
from tests.families import FAMILIES, UNETS, Built, run

CPU = ("sdpa", "math", "sdpa_flash")
"""Back ends that run here."""


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def process_wide() -> Iterator[None]:
    """diffusers' own choice is never touched."""
    before = _AttentionBackendRegistry.get_active_backend()
    yield
    assert _AttentionBackendRegistry.get_active_backend() == before


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def processors(model: nn.Module) -> list[Any]:
    return [module.processor for module in model.modules() if hasattr(module, "processor")]


def state(model: nn.Module) -> list[tuple[Any, type, dict[str, Any]]]:
    return [(p, type(p), dict(vars(p))) for p in processors(model)]


# -------------------------------------------------------------------------------------------------------------- families


def dit() -> Built:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=3, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.05)

    def inputs(seed: int) -> dict[str, Any]:
        return {
            "hidden_states": randn(seed, 2, 4, 8, 8),
            "timestep": torch.tensor([900 - seed] * 2),
            "class_labels": torch.tensor([1, 2]),
            "return_dict": False,
        }

    return model.eval(), inputs


def masked_pixart() -> Built:
    model, inputs = FAMILIES["pixart"]()
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return model, lambda seed: {**inputs(seed), "encoder_attention_mask": mask}


def unet() -> Built:
    def inputs(seed: int) -> dict[str, Any]:
        mask = torch.tensor([[1.0, 1, 0], [1, 1, 1]])
        return {
            "sample": randn(seed, 2, 4, 8, 8),
            "timestep": 900 - seed,
            "encoder_hidden_states": randn(100, 2, 3, 16),
            "encoder_attention_mask": mask,
            "return_dict": False,
        }

    return UNETS["sd"]()[0].unet, inputs


MODELS: dict[str, Callable[[], Built]] = {**FAMILIES, "dit": dit, "masked_pixart": masked_pixart, "unet": unet}

HOW = {
    "pixart": {"AttnProcessor2_0": "routed"},
    "masked_pixart": {"AttnProcessor2_0": "routed"},
    "dit": {"AttnProcessor2_0": "routed"},
    "unet": {"AttnProcessor2_0": "routed"},
    "sd3": {"JointAttnProcessor2_0": "routed"},
    "flux": {"FluxAttnProcessor": "set"},
    "wan": {"WanAttnProcessor": "set"},
}


@pytest.mark.parametrize("family", MODELS)
def test_the_output_stays_and_the_model_is_given_back_bit_equal(family: str) -> None:
    model, inputs = MODELS[family]()
    plain, before = model(**inputs(1))[0], state(model)
    for name in CPU:
        with Attention(name).applied(model) as report:
            out = model(**inputs(1))[0]
            inside = processors(model)
        torch.testing.assert_close(out, plain, rtol=0, atol=1e-5)
        assert len(report.layers) == len(inside) and all(layer.how != "kept" for layer in report.layers)
        if name != "sdpa":
            assert report.changed == len(report.layers)
            assert {ran for ran in report.ran.values() if name not in ran} == set()
            for layer in report.layers:
                assert layer.how == HOW.get(family, {}).get(layer.processor, layer.how)
            # What forwards look at: the class by isinstance, the parameters that `__call__` takes, the state.
            for face, (processor, cls, _) in zip(inside, before, strict=True):
                assert face is not processor and isinstance(face, cls) and vars(face) is vars(processor)
                assert inspect.signature(face.__call__) == inspect.signature(processor.__call__)
        for (a, cls, had), (b, _, _) in zip(state(model), before, strict=True):
            assert a is b and type(a) is cls and vars(a) == had
        assert torch.equal(model(**inputs(1))[0], plain)


def test_math_is_computed_by_math(monkeypatch: pytest.MonkeyPatch) -> None:
    """A back end that counts: all of DiT's calls go through it, which diffusers' own method leaves at none."""
    model, inputs = dit()
    seen: list[tuple[int, ...]] = []
    true = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]

    def counting(**kwargs: Any) -> Tensor:
        seen.append(tuple(kwargs["query"].shape))
        return true(**kwargs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, counting)
    with Attention("math").applied(model):
        model(**inputs(0))
    assert seen == [(2, 16, 2, 16)] * 3  # [batch, tokens, heads, head_dim]
    model(**inputs(0))
    assert len(seen) == 3


def test_a_whole_pipeline() -> None:
    pipe, call = UNETS["sd"]()
    plain = run(pipe, call)
    with Attention("math").applied(pipe.unet) as report:
        out = run(pipe, call)
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-4)
    assert report.ran == {"AttnProcessor2_0": {"math"}} and torch.equal(run(pipe, call), plain)


def test_masked_calls_run_sdpa_where_the_back_end_takes_no_mask() -> None:
    model, inputs = masked_pixart()
    plain = model(**inputs(1))[0]
    with Attention("sdpa_flash").applied(model) as report:
        assert report.ran == {"AttnProcessor2_0": set()}
        torch.testing.assert_close(model(**inputs(1))[0], plain, rtol=0, atol=1e-5)
    assert report.ran == {"AttnProcessor2_0": {"sdpa_flash", "sdpa (mask)"}}
    lines = str(report).splitlines()
    assert lines[0] == "attention 'sdpa_flash' on PixArtTransformer2DModel"
    assert lines[2].split(maxsplit=4) == ["12", "AttnProcessor2_0", "sdpa_flash", "routed", "sdpa (mask), sdpa_flash"]
    assert report.to_json()["ran"] == {"AttnProcessor2_0": ["sdpa (mask)", "sdpa_flash"]}


def test_sdpa_changes_no_layer_that_calls_it_but_those_that_could_be_told_otherwise() -> None:
    assert Attention("sdpa").report(dit()[0]).changed == 0
    model, inputs = FAMILIES["flux"]()
    plain = model(**inputs(1))[0]
    # Somebody has set another back end for the whole process, one that cannot run here.
    before = _AttentionBackendRegistry._active_backend
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.XFORMERS)
    try:
        with Attention("sdpa").applied(model) as report:
            assert torch.equal(model(**inputs(1))[0], plain)
    finally:
        _AttentionBackendRegistry.set_active_backend(before)
    assert report.changed == len(report.layers) == 7


# ----------------------------------------------------------------------------------------------------------------- masks


class Net(nn.Module):
    """One attention layer."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.attention(*args, **kwargs)


def full_attention(**options: Any) -> Net:
    """Every feature that the plain processor has."""
    torch.manual_seed(0)
    attention = DiffusersAttention(
        query_dim=16, heads=2, dim_head=8, norm_num_groups=4, qk_norm="rms_norm", residual_connection=True, rescale_output_factor=1.7,
        bias=True, **options,
    )  # fmt: skip
    return Net(attention.eval())


def naive(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """softmax(QK^T)V written out; [batch, tokens, heads, head_dim]."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * (scale or q.shape[-1] ** -0.5)
    weights = (scores + (0 if bias is None else bias.double())).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.double()).to(q.dtype)


class Xformers:
    """The part of xformers that diffusers calls, as strict as its kernels are."""

    def __init__(self) -> None:
        self.calls: list[Tensor | None] = []

    def memory_efficient_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None = None, p: float = 0.0, scale: float | None = None
    ) -> Tensor:
        assert query.ndim == key.ndim == value.ndim == 4 and p == 0.0
        if attn_bias is not None:
            assert attn_bias.shape == (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
            assert attn_bias.dtype == query.dtype and attn_bias.stride(-1) == 1 and all(s % 8 == 0 for s in attn_bias.stride()[:-1])
        self.calls.append(attn_bias)
        return naive(query, key, value, attn_bias, scale)


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> Xformers:
    """As if the package were installed."""
    fake = Xformers()
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", True)
    monkeypatch.setattr(attention_dispatch, "xops", fake)
    return fake


@pytest.mark.parametrize("name", ["math", "xformers"])
@pytest.mark.parametrize("masked", [False, True])
def test_norms_residual_scale_and_images_are_the_processors_own(name: str, masked: bool, xformers: Xformers) -> None:
    net, x = full_attention(), randn(1, 2, 16, 3, 3)
    mask = torch.zeros(2, 1, 9).masked_fill(randn(2, 2, 1, 9) > 0.5, -10000.0) if masked else None
    plain = net(x, attention_mask=mask)
    with Attention(name).applied(net, device="cuda"):
        torch.testing.assert_close(net(x, attention_mask=mask), plain, rtol=0, atol=1e-5)
    assert len(xformers.calls) == (name == "xformers")


@pytest.mark.parametrize("name", ["math", "xformers"])
@pytest.mark.parametrize("shape", [(2, 9), (9, 9), (2, 1, 1, 9), (1, 1, 9, 9)])
def test_masks_of_processors_that_carry_a_back_end(name: str, shape: tuple[int, ...], xformers: Xformers) -> None:
    """Boolean masks, which diffusers' xformers would add as 1.0, and padding masks, which its math would take for something else."""
    torch.manual_seed(0)
    net = Net(FluxAttention(query_dim=16, heads=2, dim_head=8, processor=FluxAttnProcessor()).eval())
    mask = randn(3, *shape) > 0
    mask[..., 0] = True
    x = randn(1, 2, 9, 16)
    plain = net(x, attention_mask=mask)
    with Attention(name).applied(net, device="cuda"):
        torch.testing.assert_close(net(x, attention_mask=mask), plain, rtol=0, atol=1e-5)


@given(
    broadcast=st.tuples(*[st.booleans()] * 3),
    sizes=st.tuples(*[st.integers(1, 3)] * 2, st.integers(1, 5), st.integers(1, 19)),
    boolean=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_a_bias_is_the_mask_in_aligned_rows(
    broadcast: tuple[bool, ...], sizes: tuple[int, ...], boolean: bool, dtype: torch.dtype, seed: int
) -> None:
    batch, heads, queries, keys = sizes
    lead = [1 if b else size for b, size in zip(broadcast, sizes, strict=False)]
    mask = randn(seed, *lead, keys) > 0
    mask[..., 0] = True
    given_mask = mask if boolean else torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    q = randn(seed, batch, queries, heads, 8).to(dtype)
    bias = additive_bias(given_mask, q, keys)
    assert bias.shape == (batch, heads, queries, keys) and bias.dtype == dtype and bool(bias.isfinite().all())
    assert bias.stride(-1) == 1 and all(stride % 8 == 0 for stride in bias.stride()[:-1])
    scores = randn(seed + 1, batch, heads, queries, keys).to(dtype)
    expected = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    assert torch.equal((scores + bias).softmax(-1), expected)


@given(
    lead=st.sampled_from([None, (), (3,), (1,), (2, 3), (2, 1), (1, 3)]),
    tokens=st.tuples(st.integers(1, 4), st.integers(1, 9)),
    scale=st.sampled_from([None, 0.3, 1.0]),
    is_causal=st.booleans(),
    enable_gqa=st.booleans(),
    call=st.sampled_from(["sdpa", "dispatch"]),
    name=st.sampled_from(CPU),
    seed=st.integers(0, 99),
)
def test_a_routed_call_means_what_it_meant(
    lead: tuple[int, ...] | None,
    tokens: tuple[int, int],
    scale: float | None,
    is_causal: bool,
    enable_gqa: bool,
    call: str,
    name: str,
    seed: int,
) -> None:
    """Every argument of SDPA, masks of two to four dimensions among them, over [batch 2, heads 3]."""
    queries, keys = tokens
    mask = None if lead is None else randn(seed, *lead, queries, keys)
    q = randn(seed + 1, 2, 3, queries, 8)
    k, v = randn(seed + 2, 2, 1 if enable_gqa else 3, keys, 8), randn(seed + 3, 2, 1 if enable_gqa else 3, keys, 8)
    options: dict[str, Any] = {"scale": scale, "is_causal": is_causal and mask is None, "enable_gqa": enable_gqa}
    route = _Route(name, BACKENDS[name])
    if call == "sdpa":
        expected = F.scaled_dot_product_attention(q, k, v, mask, **options)
        got = route.sdpa(q, k, v, mask, **options)
    else:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        expected = attention_dispatch.dispatch_attention_fn(q, k, v, mask, **options, backend="native")
        got = route.dispatch(q, k, v, mask, **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_call_without_batch_or_heads_is_left_to_sdpa() -> None:
    route, q = _Route("math", BACKENDS["math"]), randn(0, 3, 5, 8)
    for t in (q, q[0]):
        assert torch.equal(route.sdpa(t, t, t, scale=0.5), F.scaled_dot_product_attention(t, t, t, scale=0.5))
    assert route.ran == {"sdpa (3-d call)", "sdpa (2-d call)"}


def test_a_row_without_any_key_is_finite(xformers: Xformers) -> None:
    net, x = full_attention(), randn(1, 2, 9, 16)
    with Attention("xformers").applied(net, device="cuda"):
        assert bool(net(x, attention_mask=torch.full((2, 1, 9), float("-inf"))).isfinite().all())


def test_what_a_back_end_leaves_to_sdpa() -> None:
    q, short = torch.empty(1, 4, 2, 64), torch.empty(1, 3, 2, 64)
    mask = torch.ones(4, 4, dtype=torch.bool)

    def refusal(name: str, query: Tensor = q, key: Tensor = q, value: Tensor = q, **call: Any) -> str | None:
        defaults: dict[str, Any] = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "enable_gqa": False}
        return BACKENDS[name].refusal(query, key, value, **{**defaults, **call})

    for name, backend in BACKENDS.items():
        assert refusal(name) is None
        assert refusal(name, attn_mask=mask) == (None if name in ("sdpa", "native", "math", "efficient", "cudnn", "xformers") else "mask")
        assert refusal(name, is_causal=True) is None
        assert (refusal(name, is_causal=True, key=short, value=short) is not None) == backend.outside
        assert (refusal(name, dropout_p=0.1) is not None) == backend.outside
        assert (refusal(name, value=torch.empty(1, 4, 2, 32)) is not None) == backend.outside
    assert refusal("xformers", attn_mask=mask, enable_gqa=True) == "mask with grouped heads"
    assert refusal("flash", enable_gqa=True) is None
    wide = torch.empty(1, 4, 2, 160)
    assert refusal("sage", wide, wide, wide) == "head dimension 160" and refusal("flash", wide, wide, wide) is None
    with FakeTensorMode():
        for dtype, expected in ((torch.float32, "float32"), (torch.bfloat16, None)):
            on_gpu = torch.empty(1, 4, 2, 64, dtype=dtype, device="cuda")
            assert refusal("flash", on_gpu, on_gpu, on_gpu) == expected and refusal("xformers", on_gpu, on_gpu, on_gpu) is None


def test_a_back_end_that_is_written_into_the_processor_stays() -> None:
    route, seen = _Route("math", BACKENDS["math"]), []

    def diffusers(*args: Any, **kwargs: Any) -> Tensor:
        seen.append((args[3], kwargs["backend"]))
        return args[0]

    route.diffusers = diffusers
    q, blocks = randn(0, 1, 4, 2, 8), object()
    route.dispatch(q, q, q, blocks, backend="flex")
    route.dispatch(q, q, q, backend=AttentionBackendName.FLEX)
    route.dispatch(q, q, q, backend=None)
    assert seen == [(blocks, "flex"), (None, AttentionBackendName.FLEX), (None, AttentionBackendName._NATIVE_MATH)]
    assert route.ran == {"flex (the processor's choice)", "math"}


# -------------------------------------------------------------------------------------------------------- faked packages


@pytest.mark.parametrize("family", ["dit", "pixart", "masked_pixart", "sd3", "flux", "wan", "unet"])
def test_xformers_reaches_every_layer(family: str, xformers: Xformers) -> None:
    model, inputs = MODELS[family]()
    plain = model(**inputs(1))[0]
    with Attention("xformers").applied(model, device="cuda") as report:
        out = model(**inputs(1))[0]
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-5)
    assert report.changed == len(report.layers) and set().union(*report.ran.values()) == {"xformers"}
    assert len(xformers.calls) == len(report.layers)
    assert any(bias is not None for bias in xformers.calls) == (family in ("masked_pixart", "unet"))


@pytest.mark.parametrize(
    ("name", "flag", "function"),
    [
        ("flash", "_CAN_USE_FLASH_ATTN", "flash_attn_func"),
        ("flash3", "_CAN_USE_FLASH_ATTN_3", "_wrapped_flash_attn_3"),
        ("sage", "_CAN_USE_SAGE_ATTN", "sageattn"),
    ],
)
@pytest.mark.parametrize("family", ["flux", "masked_pixart"])
def test_flash_and_sage(name: str, flag: str, function: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        assert not options.get("causal") and not options.get("is_causal") and not options.get("dropout_p")
        calls.append(q.dtype)
        out = naive(q, k, v, None, options.get("softmax_scale", options.get("sm_scale")))
        return (out, None) if name == "flash3" else out

    monkeypatch.setattr(attention_dispatch, flag, True)
    monkeypatch.setattr(attention_dispatch, function, kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    model, inputs = MODELS[family]()
    with pytest.raises(ValueError, match=r"needs float16 or bfloat16, and the attention layers of .* are float32"):
        Attention(name).applied(model, device="cuda").__enter__()
    model.to(torch.bfloat16)
    call = {k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs(1).items()}
    plain = model(**call)[0]
    with Attention(name).applied(model, device="cuda") as report:
        out = model(**call)[0]
    assert float((out - plain).norm() / plain.norm()) < 0.02
    layers = len(report.layers)
    assert calls == [torch.bfloat16] * (layers if family == "flux" else layers // 2)
    assert set().union(*report.ran.values()) == ({name} if family == "flux" else {name, "sdpa (mask)"})


# --------------------------------------------------------------------------------------------- whose processors these are


class Custom:
    """A user's processor, which reads a global."""

    def __call__(self, attn: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return F.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states) * SCALE


class Derived(AttnProcessor2_0):
    """A user's processor over one of diffusers."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().__call__(*args, **kwargs) * 2


class Carrying:
    """A user's processor by diffusers' convention."""

    _attention_backend = None

    def __call__(self, attn: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        heads = hidden_states.unflatten(-1, (attn.heads, -1))
        return attention_dispatch.dispatch_attention_fn(heads, heads, heads, backend=self._attention_backend).flatten(2)


class Slotted:
    """The same without a state that could be shared."""

    __slots__ = ("_attention_backend",)

    def __call__(self, attn: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return F.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states) if self._attention_backend else hidden_states


SCALE = 3.0


def test_custom_processors_stay_and_are_reported() -> None:
    model, inputs = dit()
    layers = [m for m in model.modules() if isinstance(m, DiffusersAttention)]
    layers[0].set_processor(Custom())
    layers[1].set_processor(Derived())
    plain, kept = model(**inputs(1))[0], processors(model)[:2]
    with Attention("math").applied(model) as report:
        assert processors(model)[:2] == kept
        torch.testing.assert_close(model(**inputs(1))[0], plain, rtol=0, atol=1e-5)
    assert [(layer.processor, layer.how, layer.reason) for layer in report.layers] == [
        ("Custom", "kept", "its code is not diffusers'"),
        ("Derived", "kept", "it calls no attention function"),
        ("AttnProcessor2_0", "routed", ""),
    ]
    assert report.layers[0].path == "transformer_blocks.0.attn1"
    assert "1       Custom            its own   kept: its code is not diffusers'" in str(report)


def test_custom_processors_that_carry_a_back_end_are_told_it(xformers: Xformers) -> None:
    net, x = full_attention(), randn(1, 2, 9, 16)
    net.attention.set_processor(carrying := Carrying())
    plain = net(x)
    with Attention("xformers").applied(net, device="cuda") as report:
        torch.testing.assert_close(net(x), plain, rtol=0, atol=1e-5)
    assert [layer.how for layer in report.layers] == ["set"] and len(xformers.calls) == 1
    assert net.attention.processor is carrying and vars(carrying) == {}
    net.attention.set_processor(Slotted())
    assert [layer.how for layer in Attention("math").report(net).layers] == ["kept"]


def test_a_derived_processor_that_leaves_the_call_to_diffusers_runs_the_back_end() -> None:
    class Named(AttnProcessor2_0):
        def describe(self) -> str:
            return "mine"

    net, x = full_attention(), randn(1, 2, 9, 16)
    net.attention.set_processor(Named())
    plain = net(x)
    with Attention("math").applied(net) as report:
        assert net.attention.processor.describe() == "mine"
        torch.testing.assert_close(net(x), plain, rtol=0, atol=1e-5)
    assert report.ran == {"Named": {"math"}}


def test_image_prompt_adapters_keep_their_weights_and_their_scale() -> None:
    net, x = full_attention(cross_attention_dim=12), randn(1, 2, 9, 16)
    torch.manual_seed(1)
    adapter = IPAdapterAttnProcessor2_0(hidden_size=16, cross_attention_dim=12, num_tokens=(4,), scale=0.7)
    net.attention.set_processor(adapter)
    text = (randn(2, 2, 5, 12), [randn(3, 2, 1, 4, 12)])
    names, plain = list(net.state_dict()), net(x, encoder_hidden_states=text)
    with Attention("math").applied(net) as report:
        torch.testing.assert_close(net(x, encoder_hidden_states=text), plain, rtol=0, atol=1e-5)
        assert list(net.state_dict()) == names and isinstance(net.attention.processor, IPAdapterAttnProcessor2_0)
        net.attention.processor.scale = [0.0]  # as a callback in mid-run does
        other = net(x, encoder_hidden_states=text)
    assert report.layers[0].how == "routed" and report.ran == {"IPAdapterAttnProcessor2_0": {"math"}}
    assert net.attention.processor is adapter and adapter.scale == [0.0] and not torch.allclose(other, plain, atol=1e-3)
    torch.testing.assert_close(net(x, encoder_hidden_states=text), other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("processor", "reason"), [(AttnProcessor, "it calls no attention function"), (XFormersAttnProcessor, "it calls xformers")]
)
def test_where_nothing_can_be_changed_there_is_an_error(processor: type, reason: str) -> None:
    net = full_attention()
    net.attention.set_processor(processor())
    with pytest.raises(ValueError, match=rf"^attention='math' changes nothing in Net: {processor.__name__}: {reason}$"):
        Attention("math").applied(net).__enter__()


def test_xformers_processors_run_xformers_already(xformers: Xformers) -> None:
    net = full_attention()
    net.attention.set_processor(XFormersAttnProcessor())
    with Attention("xformers").applied(net, device="cuda") as report:
        assert [layer.how for layer in report.layers] == ["already"]


def test_plain_models() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    with pytest.raises(ValueError, match="changes nothing in Linear: it has no attention layers"):
        Attention("math").applied(nn.Linear(2, 2)).__enter__()
    model = nn.Sequential(Plain(), nn.TransformerEncoderLayer(8, 2))
    with pytest.raises(ValueError, match="MultiheadAttention: it has no processor; Plain: it has no processor"):
        Attention("math").applied(model).__enter__()


def test_every_processor_of_diffusers_that_computes_attention_by_a_function_can_be_reached() -> None:
    """Their code names one of the two functions in a way that can be bound otherwise."""
    reached = 0
    for found in pkgutil.iter_modules(transformers.__path__, transformers.__name__ + "."):
        module = importlib.import_module(found.name)
        for cls in {c for c in vars(module).values() if isinstance(c, type) and "AttnProcessor" in c.__name__}:
            code = getattr(cls.__call__, "__code__", None)
            if code is None or not {"scaled_dot_product_attention", "dispatch_attention_fn"} & set(code.co_names):
                continue
            net = Net(nn.Identity())
            net.attention.processor = object.__new__(cls)
            if isinstance(net.attention.processor, nn.Module):
                nn.Module.__init__(net.attention.processor)
            assert Attention("math").report(net).changed == 1, cls
            reached += 1
    assert reached > 60


# ------------------------------------------------------------------------------------------------------- only here and now


def test_a_model_that_shares_a_processor_is_not_touched() -> None:
    shared, (a, b) = FluxAttnProcessor(), (FAMILIES["flux"]()[0], FAMILIES["flux"]()[0])
    a.set_attn_processor(shared)
    b.set_attn_processor(shared)
    with Attention("math").applied(a):
        assert all(p._attention_backend is AttentionBackendName._NATIVE_MATH for p in processors(a))
        assert all(p is shared and p._attention_backend is None for p in processors(b))
    assert all(p is shared for p in processors(a))


def test_a_back_end_that_the_user_set_is_overridden_and_comes_back() -> None:
    model, inputs = FAMILIES["flux"]()
    plain = model(**inputs(1))[0]
    for p in processors(model):
        p._attention_backend = AttentionBackendName.FLASH  # not installed: would fail
    with Attention("math").applied(model):
        torch.testing.assert_close(model(**inputs(1))[0], plain, rtol=0, atol=1e-5)
    assert {p._attention_backend for p in processors(model)} == {AttentionBackendName.FLASH}


def test_one_at_a_time_and_errors_give_back() -> None:
    model, _ = dit()
    before = processors(model)
    with pytest.raises(ZeroDivisionError), Attention("math").applied(model):
        with pytest.raises(RuntimeError, match="is on DiTTransformer2DModel already"):
            Attention("sdpa_flash").applied(model).__enter__()
        with pytest.raises(RuntimeError, match="is on DiTTransformer2DModel already"):
            Attention("math").report(model)
        _ = 1 / 0
    assert processors(model) == before


def test_processors_that_change_between_and_during_runs() -> None:
    model, inputs = dit()
    attention, layers = Attention("math"), [m for m in model.modules() if isinstance(m, DiffusersAttention)]
    with attention.applied(model):
        faces = processors(model)
        layers[0].set_processor(mine := AttnProcessor())
    assert layers[0].processor is mine  # the user's change stays
    with attention.applied(model) as report:
        assert processors(model)[1:] == faces[1:]  # the same objects: nothing is compiled anew
        assert [layer.how for layer in report.layers] == ["kept", "routed", "routed"]
        model(**inputs(0))
    assert report.ran == {"AttnProcessor2_0": {"math"}}


@pytest.mark.parametrize("name", ["math", "sdpa_flash"])
def test_compiled_blocks_have_no_break_and_are_compiled_once(name: str) -> None:
    model, inputs = masked_pixart()
    plain, attention, counter = model(**inputs(1))[0], Attention(name), CompileCounter()
    torch._dynamo.reset()
    for block in model.transformer_blocks:
        block.compile(backend=counter, fullgraph=True)
    frames = []
    for _ in range(3):
        with attention.applied(model) as report:
            torch.testing.assert_close(model(**inputs(1))[0], plain, rtol=0, atol=1e-5)
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1 and frames[0] <= 2  # all blocks share their code
    assert report.ran == {"AttnProcessor2_0": {name} if name == "math" else {name, "sdpa (mask)"}}


# ---------------------------------------------------------------------------------------------------------------- errors


def test_names() -> None:
    known = {member.value for member in AttentionBackendName}
    assert all(backend.key in known and backend_of(backend.key) == backend for backend in BACKENDS.values())
    with pytest.raises(ValueError, match=r"attention must be one of sdpa, native, math, .*, not 'warp'"):
        Attention("warp")


@pytest.mark.parametrize("name", ["xformers", "flash", "flash3", "sage", "flash_hub"])
def test_a_missing_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for flag in ("_CAN_USE_XFORMERS_ATTN", "_CAN_USE_FLASH_ATTN", "_CAN_USE_FLASH_ATTN_3", "_CAN_USE_SAGE_ATTN"):
        monkeypatch.setattr(attention_dispatch, flag, False)
    monkeypatch.setattr(attention_dispatch, "is_kernels_available", lambda: False)
    with pytest.raises(ValueError, match=rf"^attention='{name}' cannot be used: .*(package|version)"):
        Attention(name)


def test_the_device_is_checked_before_anything_is_changed(xformers: Xformers, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = dit()
    before = state(model)
    with pytest.raises(ValueError, match="attention='xformers' runs on CUDA devices only, and DiTTransformer2DModel is on cpu"):
        Attention("xformers").applied(model).__enter__()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"attention='sdpa_flash' needs a device of compute capability 8\.0 or above; cuda:1 has less"):
        Attention("sdpa_flash").applied(model, device="cuda:1").__enter__()
    assert [(a is b, c) for (a, c, _), (b, _, _) in zip(state(model), before, strict=True)] == [(True, AttnProcessor2_0)] * 3


def test_context_parallelism_needs_a_back_end_that_has_it() -> None:
    model, _ = FAMILIES["flux"]()
    for p in processors(model):
        p._parallel_config = object()
    with pytest.raises(ValueError, match="attention='math' does not support context parallelism"):
        Attention("math").applied(model).__enter__()
    with Attention("sdpa").applied(model) as report:
        assert report.changed == 7
