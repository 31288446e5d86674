"""Blocks with what stands behind attention in one pass: the same numbers within rounding, and everything else left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.accelerators import fused_blocks as fused
from hasten.accelerators import fusing
from hasten.accelerators.dispatch import intercept
from tests import families
from tests.families import PIPELINES, run


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Makes the CPU count as a device with kernels; the shapes of what went through in one pass."""
    seen: list[tuple[int, ...]] = []
    one_pass = fused.ops.gated_residual_adaln

    def noted(residual: Tensor, *rest: Any) -> Any:
        seen.append(tuple(residual.shape))
        return one_pass(residual, *rest)

    monkeypatch.setattr(fused.ops, "gated_residual_adaln", noted)
    monkeypatch.setattr(fused, "at_hand", lambda: True)
    monkeypatch.setattr(fused, "LEAST", 1)
    monkeypatch.setattr(fused, "fuses", lambda *tensors: True)
    return seen


def dit() -> families.Built:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10,
    )  # fmt: skip

    def inputs(seed: int) -> dict[str, Any]:
        return {
            "hidden_states": families._randn(seed, 2, 4, 8, 8),
            "timestep": torch.tensor([900 - seed] * 2),
            "class_labels": torch.tensor([3, 7]),
            "return_dict": False,
        }

    return families._ready(model), inputs


def sd35() -> families.Built:
    """With a second attention in the first blocks."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
        caption_projection_dim=32, pooled_projection_dim=12, out_channels=4, pos_embed_max_size=8, dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )  # fmt: skip
    _, inputs = families.sd3()
    return families._ready(model), inputs


def wan_plain() -> families.Built:
    """Without a norm in front of cross-attention."""
    model, inputs = families.wan()
    made = type(model)(**{**model.config, "cross_attn_norm": False})
    made.load_state_dict({name: p for name, p in model.state_dict().items() if name in made.state_dict()})
    return made.eval(), inputs


FAMILIES: dict[str, tuple[Callable[[], families.Built], int]] = {
    "pixart": (families.pixart, 6), "dit": (dit, 3), "sd3": (families.sd3, 9), "sd35": (sd35, 5), "flux": (families.flux, 6),
    "wan": (families.wan, 0), "wan without a norm": (wan_plain, 0),
}  # fmt: skip
"""With the passes of one call; 0 counts the blocks."""


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_denoiser_answers_the_same(name: str, dtype: torch.dtype, passes: list[tuple[int, ...]]) -> None:
    make, expected = FAMILIES[name]
    model, inputs = make()
    given = inputs(3)
    exact = model(**given)[0]
    model.to(dtype)
    given = {key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value for key, value in given.items()}
    plain = model(**given)[0]
    handlers = fused.fused_handlers(model)
    with intercept(handlers):
        made = model(**given)[0]
    if name.startswith("wan"):
        expected = (1 if "without" in name else 2) * len(handlers)
    assert len(passes) == expected and made.dtype == plain.dtype
    if dtype == torch.float32:
        torch.testing.assert_close(made, plain, rtol=1e-4, atol=1e-5)
    else:  # no further from the exact answer than the block as it is
        assert (made - exact).norm() <= 1.1 * (plain - exact).norm()


def test_only_who_asked_is_answered_so(passes: list[tuple[int, ...]]) -> None:
    """Another thread's plain pipeline with the same model is not, nor anybody afterwards."""
    model, inputs = families.pixart()
    plain = model(**inputs(0))[0]
    with pytest.raises(KeyboardInterrupt), intercept(fused.fused_handlers(model)):
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(torch.no_grad()(model), **inputs(0)).result()[0], plain)
        assert not passes
        model(**inputs(0))
        assert passes
        raise KeyboardInterrupt
    passes.clear()
    assert torch.equal(model(**inputs(0))[0], plain) and not passes
    assert not any({"forward", "_compiled_call_impl"} & set(vars(module)) for module in model.modules())


def test_a_copy_that_is_made_meanwhile_computes_with_its_own_weights(passes: list[tuple[int, ...]]) -> None:
    model, inputs = families.pixart()
    plain = model(**inputs(0))[0]
    with intercept(fused.fused_handlers(model)):
        copied = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(copied(**inputs(0))[0], plain)


@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_what_is_not_foreseen_runs_as_it_is(name: str, passes: list[tuple[int, ...]]) -> None:
    model, inputs = FAMILIES[name][0]()
    for block in model.transformer_blocks:
        block.set_chunk_feed_forward(1, 1)
    plain = model(**inputs(0))[0]
    with intercept(fused.fused_handlers(model)):
        assert torch.equal(model(**inputs(0))[0], plain)
    assert not passes


@pytest.mark.parametrize("name", ["pixart", "dit", "sd3", "flux", "wan"])
def test_whoever_listens_to_a_block_or_its_norm_is_heard(name: str, passes: list[tuple[int, ...]]) -> None:
    """A norm that is another class, too: what its forward does is not known."""

    class Doubling(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model, inputs = FAMILIES[name][0]()
    blocks = next(child for child in model.children() if isinstance(child, nn.ModuleList))
    norms = [module for module in blocks[0].children() if isinstance(module, nn.LayerNorm)]
    heard: list[nn.Module] = []
    removed = blocks[1].register_forward_hook(lambda module, args, out: heard.append(module))
    removable = [norm.register_forward_hook(lambda module, args, out: heard.append(module)) for norm in norms]
    plain = model(**inputs(0))[0]
    listened, heard = heard.copy(), []
    with intercept(fused.fused_handlers(model)):
        torch.testing.assert_close(model(**inputs(0))[0], plain, rtol=1e-4, atol=1e-5)
        assert heard == listened and len(heard) >= 2
        for handle in (removed, *removable):
            handle.remove()
        for norm in norms:
            norm.__class__ = Doubling
        made = model(**inputs(0))[0]
    torch.testing.assert_close(made, model(**inputs(0))[0], rtol=1e-4, atol=1e-5)


def test_blocks_with_a_forward_of_their_own_stay(passes: list[tuple[int, ...]]) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Own(type(families.pixart()[0].transformer_blocks[0])):  # type: ignore[misc]
        pass

    model, inputs = families.pixart()
    add_hook_to_module(model.transformer_blocks[0], ModelHook())
    model.transformer_blocks[1].compile(backend="eager")
    model.transformer_blocks[2].__class__ = Own
    handlers = fused.fused_handlers(model)
    with intercept(handlers):
        model(**inputs(0))
    assert len(handlers) == len(passes) == 3
    assert not fused.fused_handlers(torch.compile(model, backend="eager"))  # type: ignore[arg-type]


def test_gradients_autocast_few_tokens_and_other_devices_run_as_always(
    passes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = families.pixart()
    with intercept(fused.fused_handlers(model)):
        with torch.enable_grad():
            model(**inputs(0))[0].sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs(0))
        monkeypatch.setattr(fused, "LEAST", 64 * 32 + 1)  # a sample has 64 tokens of 32 channels
        model(**inputs(0))
        monkeypatch.setattr(fused, "LEAST", 1)
        monkeypatch.setattr(fused, "fuses", fusing.fuses)
        model(**inputs(0))
    assert not passes and next(model.parameters()).grad is not None


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux", "wan"])
@pytest.mark.parametrize("method", [hasten.DeltaDiT(interval=2), hasten.FORA(interval=2), hasten.FirstBlock(warmup=1)], ids=str)
def test_a_plan_is_carried_out_the_same(name: str, method: Any, passes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reused blocks, parts that are answered with what they stored, and blocks of which some rows run."""
    pipe, call = PIPELINES[name]()
    fast = hasten.accelerate(pipe, method)
    made = run(fast, call)
    assert passes
    count, executed = len(passes), fast.report.plan.actions
    with monkeypatch.context() as patched:
        patched.setattr(fused, "at_hand", lambda: False)
        again = hasten.accelerate(pipe, method)
        torch.testing.assert_close(made, run(again, call), rtol=1e-3, atol=1e-4)
    assert len(passes) == count and (executed == again.report.plan.actions).all()


def test_no_block_is_listened_to_where_there_is_no_device() -> None:
    assert not fused.fused_handlers(families.pixart()[0]) or torch.cuda.is_available()
