"""What the trace finds: chains, streams, seams, additions, long skips, blocks in place, and what it does not offer."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.accelerators.caching.segments import breaks_of
from hasten.accelerators.caching.trace import Trace, TraceError, config_hash, trace_module
from tests.accelerators.caching.toys import WIDTH, Affine, Dual, InPlace, Scratch, Toy, Two, chain, randn
from tests.families import FAMILIES


def traced(name: str) -> Trace:
    model, inputs = FAMILIES[name]()
    return hasten.trace(model, **inputs(1))


def toy_trace(toy: nn.Module, *args: object) -> Trace:
    return trace_module(toy, args or (randn(1, 2, 3, WIDTH),), {})


EXPECTED = {
    # name: blocks called, chains as numbers of blocks, streams of each chain
    "pixart": (6, [6], [1]),
    "sd3": (5, [5], [2]),
    "flux": (7, [7], [2]),  # single blocks take and give both streams, so they go on from the dual ones
    "wan": (5, [5], [1]),
    "latte": (6, [1] * 6, [1] * 6),  # spatial and temporal blocks alternate with a change of layout between
    "hunyuan_dit": (6, [6], [1]),
    "lumina2": (6, [1, 4], [1, 1]),
    "auraflow": (5, [2, 3], [2, 1]),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_chains_and_streams(name: str) -> None:
    trace = traced(name)
    blocks, lengths, streams = EXPECTED[name]
    assert len(trace.blocks) == blocks
    assert [len(c.blocks) for c in trace.chains] == lengths
    assert [c.streams for c in trace.chains] == streams
    # Every offered path names a module, in call order, once.
    model, _ = FAMILIES[name]()
    assert len(set(trace.sites)) == len(trace.sites) == sum(lengths)
    for path, i in zip(trace.sites, trace.offered, strict=True):
        assert sum(p.numel() for p in model.get_submodule(path).parameters()) == trace.blocks[i].parameters


def test_seams_are_where_the_layout_changes() -> None:
    assert [b.gap for b in traced("auraflow").blocks] == ["seam", "linked", "seam", "linked", "linked"]
    assert {b.gap for b in traced("latte").blocks} == {"seam"}
    assert [b.gap for b in traced("pixart").blocks] == ["seam"] + ["linked"] * 5


def test_the_text_refiner_is_no_site() -> None:
    trace = traced("lumina2")
    refiner = [b for b in trace.blocks if "context_refiner" in b.path]
    assert len(refiner) == 1
    assert refiner[0].chain == -1
    assert refiner[0].reason == "does not depend on the latents"
    assert not any("context_refiner" in site for site in trace.sites)


def test_the_last_sd3_block_has_no_text_stream() -> None:
    trace = traced("sd3")
    assert [len(b.streams) for b in trace.blocks] == [2, 2, 2, 2, 1]
    image = [next(s for s in b.streams if s.position == "hidden_states") for b in trace.blocks]
    assert len({s.index for s in image}) == 1
    assert {s.slot for s in image} == {1}
    assert {s.shape for s in image} == {(2, 64, 32)}


def test_flux_streams_keep_their_index_over_both_lists() -> None:
    trace = traced("flux")
    for position, shape in (("hidden_states", (2, 16, 32)), ("encoder_hidden_states", (2, 5, 32))):
        found = {(s.index, s.shape) for b in trace.blocks for s in b.streams if s.position == position}
        assert len(found) == 1
        assert found.pop()[1] == shape


def test_hunyuan_long_skips_are_seen_and_break_spans_only_when_read() -> None:
    trace = traced("hunyuan_dit")
    assert [b.skips_from for b in trace.blocks] == [(), (), (), (), (1,), (0,)]
    assert not any(b.kept for b in trace.blocks)  # kept for blocks, which is known exactly
    everything = [True] * 6
    assert breaks_of(trace, everything) == {0}  # both ends of every skip are reused: one span
    assert breaks_of(trace, [True] * 5 + [False]) == {0, 1}
    assert breaks_of(trace, [True] * 4 + [False] * 2) == {0, 1, 2}


def test_parts() -> None:
    parts = [(p.kind, p.path) for p in traced("pixart").blocks[0].parts]
    assert parts == [
        ("attention", "transformer_blocks.0.attn1"),
        ("cross-attention", "transformer_blocks.0.attn2"),
        ("feed-forward", "transformer_blocks.0.ff"),
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_prints_and_json(name: str) -> None:
    trace = traced(name)
    text = str(trace)
    lines = text.splitlines()
    assert len(lines) == 2 + len(trace.blocks)
    for block, line in zip(trace.blocks, lines[2:], strict=True):
        assert line.startswith(block.path)
        assert (block.reason or "") in line
    data = json.loads(json.dumps(trace.to_json()))
    assert [b["path"] for b in data["blocks"]] == [b.path for b in trace.blocks]


@pytest.mark.parametrize("name", FAMILIES)
def test_costs(name: str) -> None:
    trace = traced(name)
    sites, rest = trace.costs()
    assert min(sites) > 0 and rest >= 0
    assert sum(b.seconds for b in trace.blocks) <= trace.seconds * (1 + 1e-9)
    # Blocks of one kind and shape cost the same, whatever the clock said.
    groups: dict[tuple[object, ...], set[float]] = {}
    for block in trace.blocks:
        kind = (block.path.rpartition(".")[0], block.parameters, len(block.streams), block.skips_from != ())
        groups.setdefault(kind, set()).add(block.seconds)
    assert all(len(times) == 1 for times in groups.values())


def test_tracing_changes_nothing() -> None:
    model, inputs = FAMILIES["flux"]()
    given = inputs(1)
    before = {key: value.clone() for key, value in given.items() if isinstance(value, Tensor)}
    state = torch.random.get_rng_state()
    with torch.no_grad():
        plain = model(**given)[0]
    keys = {name: set(module.__dict__) for name, module in model.named_modules()}
    hasten.trace(model, **given)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == keys
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(given[key], value) for key, value in before.items())
    with torch.no_grad():
        assert torch.equal(model(**given)[0], plain)


def test_dropout_draws_the_same_with_and_without_a_trace() -> None:
    toy = Toy([Affine(0), Affine(1)], between=lambda i, x, t: nn.functional.dropout(x, 0.5))
    torch.manual_seed(3)
    plain = toy(randn(1, 2, 3, WIDTH))
    torch.manual_seed(3)
    toy_trace(toy)
    assert torch.equal(toy(randn(1, 2, 3, WIDTH)), plain)


# ----------------------------------------------------------------------------------------------------------------- toys


def test_a_norm_between_blocks_is_a_seam() -> None:
    toy = Toy([Affine(s) for s in range(4)], between=lambda i, x, t: nn.functional.layer_norm(x, (WIDTH,)) if i == 2 else x)
    trace = toy_trace(toy)
    assert [b.gap for b in trace.blocks] == ["seam", "linked", "seam", "linked"]
    assert [c.blocks for c in trace.chains] == [(0, 1), (2, 3)]


def test_a_scaling_between_blocks_is_a_seam() -> None:
    trace = toy_trace(Toy([Affine(s) for s in range(3)], between=lambda i, x, t: x * 1.01 if i == 1 else x))
    assert [b.gap for b in trace.blocks] == ["seam", "seam", "linked"]


def test_an_addition_lies_inside_a_chain() -> None:
    hints = randn(50, 2, 3, WIDTH)
    trace = toy_trace(Toy([Affine(s) for s in range(4)], between=lambda i, x, t: x + hints if i == 2 else x))
    assert [b.gap for b in trace.blocks] == ["seam", "linked", "added", "linked"]
    assert [c.blocks for c in trace.chains] == [(0, 1, 2, 3)]
    assert breaks_of(trace, [True] * 4) == {0}


def test_an_addition_that_depends_on_the_latents_is_a_seam() -> None:
    trace = toy_trace(Toy([Affine(s) for s in range(3)], between=lambda i, x, t: x + torch.sin(x) if i == 2 else x))
    assert [b.gap for b in trace.blocks] == ["seam", "linked", "seam"]


@pytest.mark.parametrize("inference", [False, True])
def test_a_change_in_place_between_blocks_is_a_seam(inference: bool) -> None:
    hints = randn(50, 2, 3, WIDTH)
    toy = Toy([Affine(s) for s in range(4)], between=lambda i, x, t: x.add_(hints) if i == 2 else x)
    with torch.inference_mode(inference):
        trace = toy_trace(toy, randn(1, 2, 3, WIDTH))
    assert [b.gap for b in trace.blocks] == ["seam", "linked", "seam", "linked"]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(("kind", "aliased"), [(InPlace, True), (Scratch, False)])
def test_blocks_that_work_in_place(kind: type[Affine], aliased: bool, inference: bool) -> None:
    with torch.inference_mode(inference):
        trace = toy_trace(chain(3, kind), randn(1, 2, 3, WIDTH))
    assert [b.in_place for b in trace.blocks] == [True] * 3
    assert {s.aliased for b in trace.blocks for s in b.streams} == {aliased}
    assert [c.blocks for c in trace.chains] == [(0, 1, 2)]
    assert not any(b.in_place for b in toy_trace(chain(3)).blocks)


def test_tracing_does_not_touch_latents_that_the_first_block_overwrites() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([InPlace(0), InPlace(1)])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    latents = randn(1, 2, 3, WIDTH)
    before = latents.clone()
    trace_module(Bare(), (latents,), {})
    assert torch.equal(latents, before)


@pytest.mark.parametrize("form", ["tensor", "tuple", "list"])
def test_output_forms(form: str) -> None:
    trace = toy_trace(chain(3, form=form))
    assert {(b.form, b.width) for b in trace.blocks} == {(form, 1)}
    assert len(trace.sites) == 3


@pytest.mark.parametrize("form", [tuple, list])
def test_two_streams(form: type) -> None:
    trace = toy_trace(Dual([Two(s, form) for s in range(3)]), randn(1, 2, 3, WIDTH), randn(2, 2, 5, WIDTH))
    assert [c.blocks for c in trace.chains] == [(0, 1, 2)]
    for block in trace.blocks:
        assert {(s.position, s.slot) for s in block.streams} == {(0, 1), (1, 0)}
    assert len({(s.index, s.position) for b in trace.blocks for s in b.streams}) == 2


def test_a_block_that_returns_more_than_its_streams_is_not_offered() -> None:
    class More(Affine):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + self.offset(x), x.mean()

    class Net(Toy):
        def forward(self, x: Tensor, t: float = 0.0) -> Tensor:
            for block in self.blocks:
                x = block(x)[0]
            return x

    trace = toy_trace(Net([More(0), More(1)]))
    assert trace.sites == ()
    assert {b.reason for b in trace.blocks} == {"returns tensors beside its streams"}


def test_a_block_that_returns_a_dictionary_is_not_offered() -> None:
    class Named(Affine):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"sample": x + self.offset(x)}

    class Net(Toy):
        def forward(self, x: Tensor, t: float = 0.0) -> Tensor:
            for block in self.blocks:
                x = block(x)["sample"]
            return x

    trace = toy_trace(Net([Named(0), Named(1)]))
    assert trace.sites == ()
    assert all(b.reason for b in trace.blocks)


def test_a_block_called_twice_in_a_pass_is_not_offered() -> None:
    shared = Affine(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([shared, Affine(1)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](self.blocks[0](x * 2)))

    trace = toy_trace(Net())
    assert trace.sites == ("blocks.1",)
    assert {b.reason for b in trace.blocks if b.path == "blocks.0"} == {"called 2 times in one pass"}


def test_interleaved_lists() -> None:
    """Two lists that take turns on one stream are one chain, in call order."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.even = nn.ModuleList([Affine(0), Affine(2)])
            self.odd = nn.ModuleList([Affine(1), Affine(3)])

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            for a, b in zip(self.even, self.odd, strict=True):
                x = b(a(x))
            return x

    trace = toy_trace(Net())
    assert trace.sites == ("even.0", "odd.0", "even.1", "odd.1")
    assert [c.blocks for c in trace.chains] == [(0, 1, 2, 3)]


def test_outputs_that_the_model_keeps_end_spans() -> None:
    """A head that reads the outputs of some blocks must find them right, so no span may run over such a block's end."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Affine(s) for s in range(5)])

        def forward(self, x: Tensor) -> Tensor:
            x, features = x * 2, []
            for i, block in enumerate(self.blocks):
                x = block(x)
                if i == 1:
                    features.append(x)
            return x + features[0]

    trace = toy_trace(Net())
    assert [b.kept for b in trace.blocks] == [False, True, False, True, False]
    assert breaks_of(trace, [True] * 5) >= {0, 2}


def test_a_denoiser_without_latents() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(TraceError, match="without a floating-point tensor"):
        trace_module(Net(), (torch.zeros(2, dtype=torch.long),), {})


def test_the_config_hash_follows_the_config() -> None:
    model, _ = FAMILIES["pixart"]()
    same, _ = FAMILIES["pixart"]()
    other, _ = FAMILIES["sd3"]()
    assert config_hash(model) == config_hash(same) != config_hash(other)
    assert config_hash(chain(3)) == config_hash(chain(3)) != config_hash(chain(4))
