"""Adapters: the base is the teacher, nothing is left behind, and both ways of applying them are the same student."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from hasten.accelerators.distillation.adapters import Adapters, LoRA, carried, layers_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Linear(6, 6)
        self.attn1 = nn.ModuleDict({"to_q": nn.Linear(6, 6), "to_out": nn.Sequential(nn.Linear(6, 6))})
        self.ff = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn1["to_out"](self.attn1["to_q"](self.norm(x)))
        out: Tensor = x + self.ff(x)
        return out


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.proj_out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.proj_out(x)
        return out


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()


def trained(adapters: Adapters) -> None:
    with torch.no_grad():
        for factor in adapters.factors.values():
            factor.add_(0.1 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(factor.numel())))


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def test_attention_and_feed_forward_are_adapted_unless_others_are_named(network: Network) -> None:
    parts = ("attn1.to_q", "attn1.to_out.0", "ff.0", "ff.2")
    assert layers_of(network) == [f"blocks.{i}.{part}" for i in (0, 1) for part in parts]
    assert layers_of(network, ["norm", "proj_out"]) == ["blocks.0.norm", "blocks.1.norm", "proj_out"]
    with pytest.raises(ValueError, match="no linear layer called to_k; name some with targets="):
        layers_of(network, ["to_k"])
    with pytest.raises(ValueError, match="no linear layer in an attention"):
        layers_of(nn.Sequential(nn.Linear(2, 2)))


def test_the_student_begins_as_the_teacher_and_the_teacher_stays(network: Network) -> None:
    before = network(X)
    adapters = Adapters(network, layers_of(network), 3)
    assert torch.equal(network(X), before)
    trained(adapters)
    assert not torch.allclose(network(X), before)
    with adapters.off():
        assert torch.equal(network(X), before)
    assert not torch.allclose(network(X), before)


def test_factors_alone_are_trained_and_have_the_names_of_diffusers(network: Network) -> None:
    adapters = Adapters(network, ["blocks.1.ff.0"], 3)
    assert {name: tuple(factor.shape) for name, factor in adapters.factors.items()} == {
        "blocks.1.ff.0.lora_A.weight": (3, 6),
        "blocks.1.ff.0.lora_B.weight": (12, 3),
    }
    network(X).sum().backward()
    with_gradients = {id(parameter) for parameter in network.parameters() if parameter.grad is not None}
    assert with_gradients == {id(factor) for factor in adapters.factors.values()}


def test_multiplied_into_the_weights_they_are_the_same_student(network: Network) -> None:
    adapters = Adapters(network, layers_of(network), 3)
    trained(adapters)
    factors = list(adapters.factors.values())
    applied = network(X)
    gradients = torch.autograd.grad(applied.square().sum(), factors)
    merged = adapters.call_merged(adapters.merged(), X)
    torch.testing.assert_close(merged, applied)
    torch.testing.assert_close(torch.autograd.grad(merged.square().sum(), factors), gradients)


def test_the_first_factor_depends_on_the_seed_alone(network: Network) -> None:
    def first(seed: int) -> Tensor:
        adapters = Adapters(network, ["proj_out"], 2, seed=seed)
        state = adapters.state()["proj_out.lora_A.weight"]
        adapters.remove()
        return state

    before = torch.get_rng_state()
    one, torch_state = first(4), torch.get_rng_state()
    assert torch.equal(before, torch_state)
    torch.manual_seed(99)
    assert torch.equal(first(4), one) and not torch.equal(first(5), one)


def test_they_are_taken_off_without_a_trace(network: Network) -> None:
    network.proj_out.bias.requires_grad_(False)
    modules = dict(network.named_modules())
    needed = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    before, attributes = network(X), set(vars(network))
    adapters = Adapters(network, layers_of(network), 3)
    trained(adapters)
    adapters.remove()
    assert set(vars(network)) == attributes
    now = dict(network.named_modules())
    assert now.keys() == modules.keys() and all(now[name] is module for name, module in modules.items())
    assert {name: parameter.requires_grad for name, parameter in network.named_parameters()} == needed
    assert torch.equal(network(X), before)


def test_two_sets_lie_side_by_side_on_one_base(network: Network) -> None:
    before = network(X)
    first = Adapters(network, layers_of(network), 3, name="student")
    trained(first)
    student = network(X)
    second = Adapters(network, layers_of(network), 2, name="score", seed=1)
    torch.testing.assert_close(network(X), before)  # the newer one is on, and begins as the base
    first.set(True)
    torch.testing.assert_close(network(X), student)
    assert all(factor.requires_grad for adapters in (first, second) for factor in adapters.factors.values())
    torch.testing.assert_close(second.call_merged(second.merged(), X), before)
    second.remove()
    first.set(True)
    torch.testing.assert_close(network(X), student)
    first.remove()
    assert torch.equal(network(X), before)
    with pytest.raises(ValueError, match="has an adapter 'student' already"):
        Adapters(network, ["proj_out"], 2, name="student")
        Adapters(network, ["proj_out"], 2, name="student")


def test_factors_of_another_network_are_refused(network: Network) -> None:
    adapters = Adapters(network, ["proj_out"], 2)
    state = adapters.state()
    trained(adapters)
    adapters.load(state)
    assert all(torch.equal(now, state[name]) for name, now in adapters.state().items())
    with pytest.raises(ValueError, match=r"do not fit the denoiser: other.lora_A.weight and 0 more differ"):
        adapters.load({**state, "other.lora_A.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"proj_out.lora_A.weight and 1 more differ"):
        adapters.load({name: torch.zeros(3, 3) for name in state})


def test_half_precision_bases_are_trained_in_single(network: Network) -> None:
    adapters = Adapters(network.bfloat16(), layers_of(network), 3)
    assert {factor.dtype for factor in adapters.factors.values()} == {torch.float32}
    merged = adapters.merged()
    assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}
    assert adapters.call_merged(merged, X.bfloat16()).dtype == torch.bfloat16


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match="targets must be names of layers"):
        LoRA(targets="to_q")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ carried by the weights


@pytest.fixture
def factors(network: Network) -> dict[str, Tensor]:
    adapters = Adapters(network, layers_of(network), 3)
    trained(adapters)
    state = adapters.state()
    adapters.remove()
    return state


def beside(network: Network, factors: dict[str, Tensor]) -> Tensor:
    adapters = Adapters(network, layers_of(network), 3)
    adapters.load(factors)
    answer = network(X)
    adapters.remove()
    return answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_weights_carry_them_and_are_bit_for_bit_as_before(network: Network, factors: dict[str, Tensor], dtype: torch.dtype) -> None:
    expected = beside(network, factors)
    network.to(dtype)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    places = [parameter.data_ptr() for parameter in network.parameters()]
    with carried(network, factors, "steps"):
        assert all(type(module) is nn.Linear for name, module in network.named_modules() if name in layers_of(network))
        assert [parameter.data_ptr() for parameter in network.parameters()] == places
        torch.testing.assert_close(network(X.to(dtype)).to(expected), expected, rtol=1e-5, atol=3e-2 if dtype == torch.bfloat16 else 1e-5)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_what_was_moved_meanwhile_is_restored_where_it_is_now(network: Network, factors: dict[str, Tensor]) -> None:
    before = network(X)
    with pytest.raises(KeyboardInterrupt), carried(network, factors, "steps"):
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()  # as offloading does
        raise KeyboardInterrupt
    assert torch.equal(network(X), before)


def test_beside_layers_that_are_not_plain(network: Network, factors: dict[str, Tensor]) -> None:
    """Other adapters, quantised layers, and weights that another copy stands for."""
    other = Adapters(network, ["blocks.0.ff.0"], 2, name="other")
    trained(other)
    before = network(X)
    with carried(network, factors, "steps"):
        assert "steps" in network.blocks[1].ff[0].lora_A and not torch.allclose(network(X), before)
    assert torch.equal(network(X), before)
    other.remove()
    expected = beside(network, factors)

    class Stands:
        hooks: ClassVar[dict[str, object]] = {"group_offloading": object()}

    network.blocks[0]._diffusers_hook = Stands()
    with carried(network, factors, "steps"):
        assert "steps" in network.blocks[1].ff[0].lora_A
        torch.testing.assert_close(network(X), expected)


def test_factors_that_do_not_fit_change_nothing(network: Network, factors: dict[str, Tensor]) -> None:
    before = network(X)
    wide = {**factors, "blocks.1.ff.0.lora_A.weight": torch.zeros(3, 7)}
    said = r"do not fit the denoiser: blocks.1.ff.0 takes \(12, 6\), not \(12, 7\)"
    with pytest.raises(ValueError, match=said), carried(network, wide, "x"):
        pass
    strange = {name.replace("blocks.1", "blocks.9"): factor for name, factor in factors.items()}
    with pytest.raises(ValueError, match=r"it has no blocks.9.attn1.to_q, and 3 more are missing"), carried(network, strange, "x"):
        pass
    half = {name: factor for name, factor in factors.items() if name != "blocks.1.ff.2.lora_B.weight"}
    with pytest.raises(ValueError, match=r"blocks.1.ff.2.lora_B.weight is missing"), carried(network, half, "x"):
        pass
    assert torch.equal(network(X), before)
