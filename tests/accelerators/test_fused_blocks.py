"""Blocks with what stands behind attention in one pass: the same numbers within rounding, and everything else left alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.accelerators import fused_blocks as fused
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
    with fused.fused_blocks(model) as counts:
        made = model(**given)[0]
    if name.startswith("wan"):
        expected = (1 if "without" in name else 2) * counts["WanTransformerBlock"]
    assert len(passes) == expected and made.dtype == plain.dtype
    if dtype == torch.float32:
        torch.testing.assert_close(made, plain, rtol=1e-4, atol=1e-5)
    else:  # no further from the exact answer than the block as it is
        assert (made - exact).norm() <= 1.1 * (plain - exact).norm()


def test_blocks_are_as_before_afterwards(passes: list[tuple[int, ...]]) -> None:
    model, inputs = families.pixart()
    with pytest.raises(KeyboardInterrupt), fused.fused_blocks(model):
        assert all("forward" in vars(block) for block in model.transformer_blocks)
        raise KeyboardInterrupt
    assert not any("forward" in vars(module) for module in model.modules())
    model(**inputs(0))
    assert not passes


def test_a_copy_that_is_made_meanwhile_computes_with_its_own_weights(passes: list[tuple[int, ...]]) -> None:
    model, inputs = families.pixart()
    with fused.fused_blocks(model):
        before = model(**inputs(0))[0]
        copied = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(copied(**inputs(0))[0], before)
        assert str(inspect.signature(copied.transformer_blocks[0].forward)).startswith("(hidden_states: torch.Tensor, attention_mask")
    torch.testing.assert_close(copied(**inputs(0))[0], before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_what_is_not_foreseen_runs_as_it_is(name: str, passes: list[tuple[int, ...]]) -> None:
    model, inputs = FAMILIES[name][0]()
    for block in model.transformer_blocks:
        block.set_chunk_feed_forward(1, 1)
    plain = model(**inputs(0))[0]
    with fused.fused_blocks(model):
        assert torch.equal(model(**inputs(0))[0], plain)
    assert not passes


def test_blocks_with_a_forward_of_their_own_stay(passes: list[tuple[int, ...]]) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Own(type(families.pixart()[0].transformer_blocks[0])):  # type: ignore[misc]
        pass

    model, inputs = families.pixart()
    add_hook_to_module(model.transformer_blocks[0], ModelHook())
    model.transformer_blocks[1].compile(backend="eager")
    model.transformer_blocks[2].__class__ = Own
    with fused.fused_blocks(model) as counts:
        model(**inputs(0))
    assert counts == {"BasicTransformerBlock": 3} and len(passes) == 3
    with fused.fused_blocks(torch.compile(model, backend="eager")) as counts:  # type: ignore[arg-type]
        assert counts == {}


def test_gradients_autocast_and_other_devices_run_as_always(passes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = families.pixart()
    with fused.fused_blocks(model):
        with torch.enable_grad():
            model(**inputs(0))[0].sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs(0))
        monkeypatch.undo()
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


def test_nothing_is_placed_where_there_is_no_device() -> None:
    model: nn.Module = families.pixart()[0]
    with fused.fused_blocks(model) as counts:
        assert counts == {} or torch.cuda.is_available()
