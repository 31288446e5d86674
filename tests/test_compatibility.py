"""The rows of the compatibility table in docs/caching.md that need a library beside diffusers' plain pipelines."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

from hasten.accelerators.caching.delta_dit import DeltaDiT
from hasten.accelerators.caching.runtime import attach
from hasten.accelerators.caching.trace import trace_module
from tests.families import FAMILIES


def run(model: torch.nn.Module, inputs, steps: int = 4) -> list[torch.Tensor]:
    with torch.no_grad(), attach(model, DeltaDiT(interval=2, cached=0.5), num_inference_steps=steps) as session:
        outputs = []
        for i in range(steps):
            with session.step(i):
                outputs.append(model(**inputs(i))[0])
    assert session.report.computed_fraction < 1.0
    return outputs


@pytest.mark.parametrize("family", ["pixart", "flux"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload_gives_the_same_pictures(family: str, kind: str) -> None:
    model, inputs = FAMILIES[family]()
    expected = run(model, inputs)
    cpu = torch.device("cpu")
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type=kind, **options)
    for got, want in zip(run(model, inputs), expected, strict=True):
        assert torch.equal(got, want)


def test_a_device_map_gives_the_same_pictures() -> None:
    model, inputs = FAMILIES["pixart"]()
    expected = run(model, inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    for got, want in zip(run(model, inputs), expected, strict=True):
        assert torch.equal(got, want)


class Int8Linear(torch.nn.Module):
    """A linear layer that keeps int8 weights and a scale per output, as weight-only quantisers leave behind."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)


def quantise(module: torch.nn.Module) -> None:
    for name, child in module.named_children():
        if type(child) is torch.nn.Linear:
            setattr(module, name, Int8Linear(child))
        else:
            quantise(child)


def test_quantised_weights_have_the_same_sites_and_are_reused_alike() -> None:
    model, inputs = FAMILIES["pixart"]()
    plain = trace_module(model, (), inputs(0))
    quantise(model.transformer_blocks)
    found = trace_module(model, (), inputs(0))
    assert found.sites == plain.sites
    assert [block.streams for block in found.blocks] == [block.streams for block in plain.blocks]
    with torch.no_grad():
        expected = model(**inputs(1))[0]
    same = run(model, lambda i: inputs(1))
    for got in same:  # the same input at every step: a reused offset is the present one
        assert torch.allclose(got, expected, atol=2e-5)


def test_ip_adapter_acts_inside_the_blocks_and_is_reused_with_them() -> None:
    model, inputs = FAMILIES["flux"]()
    torch.manual_seed(3)
    adapters = {}
    for name, processor in model.attn_processors.items():
        if name.startswith("transformer_blocks"):
            adapters[name] = FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=8, num_tokens=(4,), scale=1.0)
        else:
            adapters[name] = processor
    model.set_attn_processor(adapters)
    image = torch.randn(2, 4, 8)

    def with_image(seed: int, strength: float = 1.0):
        return {**inputs(seed), "joint_attention_kwargs": {"ip_hidden_states": [strength * image]}}

    with torch.no_grad():
        expected, without = model(**with_image(1))[0], model(**with_image(1, strength=0.0))[0]
    assert not torch.allclose(expected, without, atol=1e-3)
    for got in run(model, lambda i: with_image(1)):
        assert torch.allclose(got, expected, atol=2e-5)
