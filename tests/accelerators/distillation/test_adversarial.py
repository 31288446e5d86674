"""The adversarial loss: heads on a frozen denoiser's features, gradients where they belong, and a student that follows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.accelerators.distillation.adapters import Adapters, layers_of
from hasten.accelerators.distillation.adversarial import CEILING, TAPS, Discriminator, dynamic_weight, transformer_blocks
from hasten.accelerators.distillation.grid import Grid
from tests.families import FAMILIES, sd_pipeline

GRID = Grid.flow(12)


class Blocks(nn.Module):
    """A denoiser of [B, tokens, 2]: two blocks that are random features, of no attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Sequential(nn.Linear(2, 16), nn.SiLU())
        self.second = nn.Sequential(nn.Linear(16, 12), nn.Tanh())
        self.unused = nn.Linear(2, 2)
        self.last = nn.Linear(12, 2)

    def forward(self, latents: Tensor) -> Tensor:
        return self.last(self.second(self.first(latents)))


def teacher_of(network: nn.Module, told_of: list[Tensor] | None = None) -> Callable[..., Tensor]:
    def teacher(latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        if told_of is not None:
            told_of.append(timesteps)
        return network(latents.float())

    return teacher


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def no_gradients(module: nn.Module) -> bool:
    return all(parameter.grad is None for parameter in module.parameters())


# ------------------------------------------------------------------------------------------------------------ the blocks


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_features_are_those_of_evenly_spaced_blocks(family: str) -> None:
    """Of every family: what a head is shown is the picture's stream of its block, whatever else the block returns."""
    network, inputs = FAMILIES[family]()
    given = inputs(0)
    found = transformer_blocks(network, 1000)
    assert transformer_blocks(network, 3) == [found[0], found[round((len(found) - 1) / 2)], found[-1]]
    critic = Discriminator(network, transformer_blocks(network, 3), width=4)
    streams: dict[str, Tensor] = {}
    for name in critic.blocks:

        def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], name: str = name) -> None:
            streams[name] = kwargs.get("hidden_states", args[0] if args else None)

        network.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
    latents = given["hidden_states"].clone().requires_grad_()

    def teacher(latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        return network(**{**given, "hidden_states": latents})[0]

    scores = critic.scores(teacher, latents, given["timestep"], None, learning=False)
    assert [score.shape for score in scores] == [(*streams[name].shape[:-1], 1) for name in critic.blocks]
    sum(score.sum() for score in scores).backward()
    assert latents.grad is not None and latents.grad.abs().max() > 0 and no_gradients(network) and no_gradients(critic)


def test_of_a_unet_they_are_those_within_its_attentions_and_feature_maps_can_be_named() -> None:
    unet = sd_pipeline()[0].unet
    critic = Discriminator(unet)
    inner = "transformer_blocks.0"
    assert critic.blocks == (
        f"down_blocks.0.attentions.0.{inner}", f"up_blocks.1.attentions.0.{inner}", f"up_blocks.1.attentions.1.{inner}",
        f"mid_block.attentions.0.{inner}",
    )  # fmt: skip
    assert len(critic.blocks) <= TAPS and critic.widths == (8, 8, 8, 16)
    latents = torch.randn(2, 4, 8, 8, generator=generator())

    def teacher(latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        return unet(latents, timesteps, encoder_hidden_states=conditions).sample

    told = torch.randn(2, 5, 16, generator=generator())
    assert [tuple(score.shape) for score in critic.scores(teacher, latents, torch.tensor([9, 500]), told)] == [
        (2, 64, 1), (2, 64, 1), (2, 64, 1), (2, 16, 1)
    ]  # fmt: skip
    maps = Discriminator(unet, ["mid_block.resnets.1", "up_blocks.1"])
    assert [tuple(score.shape) for score in maps.scores(teacher, latents, torch.tensor([9, 500]), told)] == [(2, 4, 4, 1), (2, 8, 8, 1)]


def test_heads_are_their_own_and_are_seeded() -> None:
    network = Blocks()
    torch.manual_seed(2)
    expected = torch.randn(3)
    torch.manual_seed(2)
    critics = [Discriminator(network, ["first"], seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.randn(3), expected)
    weights = [torch.cat([p.detach().flatten() for p in critic.parameters()]) for critic in critics]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert len(list(critics[0].parameters())) == 6 and "network" not in dict(critics[0].named_modules())


# ------------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_go_only_where_they_should(trained: bool) -> None:
    """With adapters as the trainer has them, and also where the base's own weights are trained."""
    network, inputs = FAMILIES["sd3"]()
    given = inputs(0)
    adapters = Adapters(network, layers_of(network), 2)
    if trained:
        network.requires_grad_(True)
    flags = [parameter.requires_grad for parameter in network.parameters()]

    def teacher(latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        with adapters.off():
            return network(**{**given, "hidden_states": latents, "timestep": timesteps})[0]

    critic = Discriminator(network, width=8)
    fake = torch.randn(2, 4, 8, 8, generator=generator()).requires_grad_()
    real = torch.randn(2, 4, 8, 8, generator=generator(1)).requires_grad_()
    landing = torch.tensor([0, 6])
    critic.student_loss(teacher, fake, landing, None, GRID, 6, generator()).backward()
    assert fake.grad is not None and (fake.grad.flatten(1).abs().amax(1) > 0).all()
    assert no_gradients(network) and no_gradients(critic)
    fake.grad = None
    critic.own_loss(teacher, fake, real, landing, None, GRID, 6, generator()).backward()
    assert fake.grad is None and real.grad is None and no_gradients(network)
    for name, parameter in critic.named_parameters():  # what is added to all scores alike cancels out while all hinges are open
        assert parameter.grad is not None and (parameter.grad.abs().max() > 0 or name.endswith("5.bias"))
    assert [parameter.requires_grad for parameter in network.parameters()] == flags
    assert not any(module._forward_hooks for module in network.modules())
    # The student's own graph, made before, is not cut by what the discriminator does to the network's flags.
    made = network(**{**given, "hidden_states": real.detach()})[0]
    critic.student_loss(teacher, made, landing, None, GRID, 6, generator()).backward()
    assert all(factor.grad is not None for name, factor in adapters.factors.items() if "lora_B" in name and "context" not in name)
    adapters.remove()


def test_it_is_the_teacher_that_is_asked_not_the_student() -> None:
    network, inputs = FAMILIES["sd3"]()
    given = inputs(0)
    adapters = Adapters(network, layers_of(network), 2)

    def teacher(latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        with adapters.off():
            return network(**{**given, "hidden_states": latents})[0]

    critic = Discriminator(network, width=4)
    fake, landing = given["hidden_states"], torch.tensor([0, 6])
    with torch.no_grad():
        before = critic.student_loss(teacher, fake, landing, None, GRID, 6, generator())
        for factor in adapters.factors.values():
            factor.add_(1.0)
        assert torch.equal(critic.student_loss(teacher, fake, landing, None, GRID, 6, generator()), before)
    adapters.remove()


def test_an_error_of_the_teacher_leaves_no_hooks_and_no_flags() -> None:
    network = Blocks()

    def teacher(latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        raise RuntimeError("out of memory")

    critic = Discriminator(network, ["first"])
    with pytest.raises(RuntimeError, match="out of memory"):
        critic.scores(teacher, torch.zeros(1, 3, 2), torch.zeros(1), None)
    assert not network.first._forward_hooks and all(parameter.requires_grad for parameter in network.parameters())


# ---------------------------------------------------------------------------------------------------------------- losses


def test_the_losses_are_hinges_of_the_scores_of_what_was_noised_to_the_segment() -> None:
    network, times = Blocks(), []
    critic = Discriminator(network, ["first", "second"], width=8)
    rows, landing, span = 400, torch.tensor([0, 4, 8, 11] * 100), 4
    fake, real = torch.randn(2, rows, 3, 2, generator=generator())
    loss = critic.own_loss(teacher_of(network, times), fake, real, landing, None, GRID, span, generator(7))
    assert torch.equal(times[0], times[1])
    node = torch.round(times[0] * 12 / 1000).long()
    for place, drawn in ((0, {1, 2, 3}), (4, {4, 5, 6, 7}), (8, {8, 9, 10, 11}), (11, {11})):
        assert set(node[landing == place].tolist()) == drawn
    # The same nodes and noise, drawn by hand.
    again = generator(7)
    again_node = torch.maximum((landing + torch.randint(0, span, (rows,), generator=again)).clamp(1, 11), landing)
    noise = torch.randn(fake.shape, generator=again)
    assert torch.equal(node, again_node)
    shown = [GRID.renoised(samples, landing, node, noise) for samples in (fake, real)]
    scores = [critic.scores(teacher_of(network), one, times[0], None) for one in shown]
    expected = sum(F.relu(1 + f).mean() + F.relu(1 - r).mean() for f, r in zip(*scores, strict=True)) / 2
    torch.testing.assert_close(loss, expected)
    own = critic.student_loss(teacher_of(network), fake, landing, None, GRID, span, generator(7))
    torch.testing.assert_close(own, -sum(score.mean() for score in scores[0]) / 2)


def test_what_is_noised_has_the_distribution_of_its_node() -> None:
    """Exactly renoised, data that were at node e are at node a as if they had been noised there at once."""
    seen: list[Tensor] = []
    network = Blocks()
    network.first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    critic = Discriminator(network, ["first"])
    landing = torch.full((40_000,), 6)
    x0 = 0.7 + 0.4 * torch.randn(40_000, 1, 2, generator=generator())
    at = GRID.noised(x0, torch.randn(x0.shape, generator=generator(1)), landing)
    times: list[Tensor] = []
    critic.student_loss(teacher_of(network, times), at, landing, None, GRID, 6, generator(2))
    node = torch.round(times[0] * 12 / 1000).long()
    for a in range(6, 12):
        alpha, sigma, here = float(GRID.alpha[a]), float(GRID.sigma[a]), seen[0][node == a]
        assert abs(float(here.mean()) - 0.7 * alpha) < 0.02
        assert abs(float(here.var()) - (alpha**2 * 0.16 + sigma**2)) < 0.03


def test_heads_learn_to_separate_and_a_student_that_follows_them_becomes_the_data() -> None:
    """Data around (2, -1), and a student that shifts noise of the same shape: it finds where the data are from what the heads say alone."""
    network = Blocks()
    critic = Discriminator(network, ["first", "second"], width=24)
    teacher, draws = teacher_of(network), generator(3)
    mix = torch.tensor([[0.5, 0.0], [0.3, 0.4]])
    mean = torch.zeros(2, requires_grad=True)
    own = torch.optim.Adam(critic.parameters(), 4e-3, betas=(0.5, 0.99))
    learner = torch.optim.Adam([mean], 0.03, betas=(0.5, 0.99))
    landing = torch.zeros(96, dtype=torch.long)

    def samples() -> tuple[Tensor, Tensor]:
        noise = torch.randn(2, 96, 3, 2, generator=draws) @ mix.T
        return mean + noise[0], torch.tensor([2.0, -1.0]) + noise[1]

    def update() -> float:
        loss = critic.own_loss(teacher, *samples(), landing, None, GRID, 6, draws)
        own.zero_grad()
        loss.backward()
        own.step()
        return loss.item()

    for _ in range(60):
        separated = update()
    assert separated < 0.8
    for step in range(260):
        for optimizer, rate in ((own, 4e-3), (learner, 0.03)):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / 260)
        update()
        fake, _ = samples()
        loss = critic.student_loss(teacher, fake, landing, None, GRID, 6, draws)
        learner.zero_grad()
        loss.backward()
        learner.step()
    assert (mean.detach() - torch.tensor([2.0, -1.0])).abs().max() < 0.25
    assert update() > 1.6  # they can no longer be told apart: the hinge of a guess is 2


# ------------------------------------------------------------------------------------------------------------ the weight


def test_the_weight_makes_both_gradients_as_long_as_each_other() -> None:
    """At a = (1, 2), b = 3: the gradients of the first loss are (6, 12) and 4, of the second (0.5, 0) and 2."""
    a = torch.tensor([1.0, 2.0], requires_grad=True)
    b = torch.tensor(3.0, requires_grad=True)
    consistency, adversarial = 3 * a.square().sum() + 4 * b, 0.5 * a[0] + b.square() / 3
    expected = ((36 + 144 + 16) / (0.25 + 4)) ** 0.5
    assert float(dynamic_weight(consistency, adversarial, [a, b])) == pytest.approx(expected)
    assert float(dynamic_weight(consistency, adversarial, [a, b], segments=8)) == pytest.approx(expected / 8)
    weight = dynamic_weight(consistency, adversarial, [a, b], segments=4)
    assert not weight.requires_grad
    (consistency + weight * adversarial).backward()  # the graphs are still there
    torch.testing.assert_close(a.grad, torch.tensor([6.0, 12.0]) + weight * torch.tensor([0.5, 0.0]))
    assert float(dynamic_weight(3 * a.sum(), 0 * a.sum(), [a])) == CEILING
    assert float(dynamic_weight(0 * a.sum(), a.sum(), [a])) == 0.0
    with pytest.raises(ValueError, match="factors must be those of a layer that the adversarial loss depends on"):
        dynamic_weight(a.sum(), b.square(), [a])
    with pytest.raises(ValueError, match="factors must be those of the student's last adapted layer, not none"):
        dynamic_weight(a.sum(), a.sum(), [])
    with pytest.raises(ValueError, match="segments must be a whole number"):
        dynamic_weight(a.sum(), a.sum(), [a], segments=0)


# ---------------------------------------------------------------------------------------------------------------- errors


def test_blocks_that_cannot_be_used_are_refused() -> None:
    network = Blocks()
    with pytest.raises(ValueError, match="Blocks has no list of blocks with attentions; name some with blocks="):
        Discriminator(network)
    for wrong in (["third"], [""], []):
        with pytest.raises(ValueError, match="blocks must be names of modules in the Blocks, not"):
            Discriminator(network, wrong)
    with pytest.raises(ValueError, match="a SiLU has not"):
        Discriminator(network, ["first.1"])
    with pytest.raises(ValueError, match="width must be a whole number"):
        Discriminator(network, ["first"], width=0)
    latents, times = torch.zeros(1, 3, 2), torch.zeros(1)
    with pytest.raises(ValueError, match="blocks must be called whenever the denoiser is, and unused was not"):
        Discriminator(network, ["unused"]).scores(teacher_of(network), latents, times, None)
    network.second.append(nn.Flatten())
    network.last = nn.Linear(36, 2)
    with pytest.raises(ValueError, match=r"as wide as their layers, and second gives \[1, 36\], not 12"):
        Discriminator(network, ["second"]).scores(teacher_of(network), latents, times, None)


def test_gradient_checkpointing_is_refused_where_it_would_ask_the_student() -> None:
    network, inputs = FAMILIES["pixart"]()
    given = inputs(0)
    network.enable_gradient_checkpointing()
    critic = Discriminator(network, width=4)

    def teacher(latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        return network(**{**given, "hidden_states": latents})[0]

    fake = given["hidden_states"].clone().requires_grad_()
    with pytest.raises(ValueError, match="need gradient checkpointing off"):
        critic.student_loss(teacher, fake, torch.tensor([0, 0]), None, GRID, 4, generator())
    critic.own_loss(teacher, fake, fake, torch.tensor([0, 0]), None, GRID, 4, generator())
