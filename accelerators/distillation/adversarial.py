"""The adversarial loss of trajectory-segmented consistency (Hyper-SD, arXiv 2404.13686), in the form that PCM (arXiv 2405.18407) published.

Where the student's jump lands, and where it should, is noised again and shown to the frozen denoiser. Small heads on the features of its
blocks learn to tell the two apart, and the student learns to mislead them. The longer a jump, the further it is off, and the more a mean
squared error asks for blur: so this loss gains on it as there are fewer segments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from hasten.accelerators.checks import check_whole
from hasten.accelerators.distillation.dmd import drawn_noise
from hasten.accelerators.distillation.grid import Denoiser, Grid, exact
from hasten.accelerators.distillation.method import Task
from hasten.accelerators.distillation.teacher import drawn_index

TAPS = 9
"""Blocks whose features are looked at, or all where there are fewer; 9 in PCM's published code."""
CEILING = 1e4
"""Of the dynamic weight, as in VQGAN (arXiv 2012.09841): the adversarial gradient may vanish."""
_ATTENTION = re.compile(r"^(self_|cross_)?att(n|ention)\d*$")
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Discriminator(nn.Module):
    """Heads on the features of a frozen denoiser. Its parameters are those of the heads alone.

    Args:
        network: The module whose blocks are watched while the teacher is called. It is not changed, and not held as a part.
        blocks: Their names in the network. By default `TAPS` of its transformer blocks, evenly spaced from the first to the last: a
            transformer block is a member of a list of modules, with an attention of its own.
        width: Of the heads' hidden layer.
        seed: Of the heads.

    Attributes:
        blocks: Names of the blocks, in the network's order unless they were given.
        widths: Of the blocks' features.
        heads: One for each block: a score for every token (or every place of a feature map), seen alone and normalised.

    Raises:
        ValueError: There is no such block, or none is found.
    """

    def __init__(self, network: nn.Module, blocks: Sequence[str] | None = None, width: int = 64, seed: int = 0) -> None:
        super().__init__()
        check_whole(1, width=width)
        self.blocks = tuple(transformer_blocks(network, TAPS) if blocks is None else blocks)
        known = dict(network.named_modules())
        if strange := [name for name in self.blocks if name not in known or not name] or not self.blocks:
            raise ValueError(f"blocks must be names of modules in the {type(network).__name__}, not {strange if self.blocks else blocks!r}")
        self._network = (network,)  # in a tuple it is no part of this module
        self.widths = tuple(_width_of(known[name]) for name in self.blocks)
        device = next(network.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(_head(channels, width) for channels in self.widths).to(device)

    def scores(self, teacher: Denoiser, latents: Tensor, times: Tensor, told: Any, learning: bool = True) -> list[Tensor]:
        """What each head says of latents [B, ...] at timesteps [B]: [..., 1], higher for what it takes to be real.

        Args:
            teacher: The denoiser with its adapters off; nothing of it gets a gradient, but what flows through it to the latents.
            latents, times, told: Of its call.
            learning: Whether the heads get gradients.

        Raises:
            ValueError: The denoiser recomputes activations in the backward pass, where it would be the student again; or a block was not
                called, or gave features of another width than its layers say.
        """
        network = self._network[0]
        if (
            torch.is_grad_enabled()
            and latents.requires_grad
            and any(getattr(m, "gradient_checkpointing", False) for m in network.modules())
        ):
            raise ValueError("the discriminator's gradients need gradient checkpointing off: network.disable_gradient_checkpointing()")
        with _watched(network, self.blocks) as features, _frozen(network):
            teacher(latents, times, told)
        return [self._said(place, features, learning) for place in range(len(self.blocks))]

    def _said(self, place: int, features: Mapping[str, Tensor], learning: bool) -> Tensor:
        name, head = self.blocks[place], self.heads[place]
        weights = {key: value if learning else value.detach() for key, value in head.named_parameters()}
        if name not in features:
            raise ValueError(f"blocks must be called whenever the denoiser is, and {name} was not")
        seen, width = features[name], self.widths[place]
        if seen.ndim > 3 and seen.shape[1] == width:
            seen = seen.movedim(1, -1)  # a feature map
        if seen.shape[-1] != width:
            raise ValueError(
                f"blocks must give features as wide as their layers, and {name} gives {list(features[name].shape)}, not {width}"
            )
        said: Tensor = functional_call(head, weights, (seen.to(next(iter(weights.values())).dtype),))
        return said

    def student_loss(
        self, teacher: Denoiser, fake: Tensor, landing: Tensor, told: Any, grid: Grid, span: int, generator: torch.Generator
    ) -> Tensor:
        """How real the student's samples look to the heads, negated: the mean over all scores.

        Args:
            teacher: See `scores`.
            fake: [B, ...] where the student's jumps landed, with gradients; the only thing that gets any.
            landing: [B] nodes of `fake`.
            told: The rows' conditions.
            grid: Of the nodes.
            span: Nodes of a segment. Samples are noised to one of as many nodes from the landing on, drawn for each row.
            generator: For nodes and noise.
        """
        noisy, times = self._noised(fake, landing, grid, span, generator)
        return -torch.stack([score.mean() for score in self.scores(teacher, noisy, times, told, learning=False)]).mean()

    def own_loss(
        self,
        teacher: Denoiser,
        fake: Tensor,
        real: Tensor,
        landing: Tensor,
        told: Any,
        grid: Grid,
        span: int,
        generator: torch.Generator,
    ) -> Tensor:
        """The hinge loss of the heads; nothing else gets a gradient.

        Args:
            fake: [B, ...] the student's samples.
            real: [B, ...] at the same nodes: where the student should have landed, or data noised to there.
            teacher, landing, told, grid, span, generator: As for `student_loss`. Both are shown at the same nodes, with the same noise.
        """
        state = generator.get_state()
        with torch.no_grad():
            noisy, times = self._noised(fake, landing, grid, span, generator)
            generator.set_state(state)
            genuine, times = self._noised(real, landing, grid, span, generator)
        taken_for_real = [F.relu(1 + score).mean() for score in self.scores(teacher, noisy, times, told)]
        taken_for_fake = [F.relu(1 - score).mean() for score in self.scores(teacher, genuine, times, told)]
        return torch.stack(taken_for_real).mean() + torch.stack(taken_for_fake).mean()

    def _noised(self, samples: Tensor, landing: Tensor, grid: Grid, span: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        check_whole(1, span=span)
        # The denoiser knows nothing of node 0, and at node N there is nothing left to see.
        index = landing + drawn_index(0, span - 1, len(samples), generator).to(landing.device)
        index = torch.maximum(index.clamp(1, max(grid.steps - 1, 1)), landing)
        samples = exact(samples)
        return grid.renoised(samples, landing, index, drawn_noise(samples, generator)), grid.times(index)


class Adversarial:
    """The adversarial part of one training: what is added to the student's loss, and what the discriminator learns from the same jumps.

    Args:
        discriminator: Its heads are trained by `own_loss`.
        factors: Of the adapters of a late layer, where both losses are weighed.
    """

    def __init__(self, discriminator: Discriminator, factors: Sequence[Tensor]) -> None:
        self.discriminator, self.factors = discriminator, list(factors)
        self._seen: tuple[Task, Tensor, Tensor, Tensor, int] | None = None

    def added(self, loss: Tensor, task: Task, prediction: Tensor, target: Tensor, landing: Tensor, segments: int) -> Tensor:
        """See `method.Adversary`."""
        span = max(1, task.grid.steps // segments)
        self._seen = task, prediction.detach(), target, landing, span
        told = task.conditions.told
        adversarial = self.discriminator.student_loss(task.teacher, prediction, landing, told, task.grid, span, task.generator)
        return loss + dynamic_weight(loss, adversarial, self.factors, segments) * adversarial

    def own_loss(self) -> Tensor:
        """Of the discriminator, on the jumps that were seen last."""
        assert self._seen is not None
        task, fake, real, landing, span = self._seen
        return self.discriminator.own_loss(task.teacher, fake, real, landing, task.conditions.told, task.grid, span, task.generator)


def dynamic_weight(consistency: Tensor, adversarial: Tensor, factors: Sequence[Tensor], segments: int = 1) -> Tensor:
    """What the adversarial loss is multiplied with before it is added to the consistency loss.

    The paper says that its share grows as segments get longer, and gives no formula. Here both gradients are as long as each other with one
    segment, measured at some factors as in VQGAN (arXiv 2012.09841) and CTM (arXiv 2310.02279), and the adversarial one is shorter by
    their number with several.

    Args:
        consistency, adversarial: Losses with a graph, which is kept.
        factors: Of the adapters of the student's last layer.
        segments: Of the present stage.

    Returns:
        A number without gradients, at most `CEILING`; 0 where the consistency loss has no gradient.

    Raises:
        ValueError: There are no factors, or one of the losses does not depend on any.
    """
    check_whole(1, segments=segments)
    if not factors:
        raise ValueError("factors must be those of the student's last adapted layer, not none")
    lengths = []
    for name, loss in (("consistency", consistency), ("adversarial", adversarial)):
        found = [g for g in torch.autograd.grad(loss, list(factors), retain_graph=True, allow_unused=True) if g is not None]
        if not found:
            raise ValueError(f"factors must be those of a layer that the {name} loss depends on")
        lengths.append(torch.stack([exact(gradient).square().sum() for gradient in found]).sum().sqrt())
    return (lengths[0] / lengths[1].clamp(min=1e-12) / segments).clamp(max=CEILING)


def transformer_blocks(network: nn.Module, most: int) -> list[str]:
    """Names of at most so many transformer blocks, evenly spaced over all, the first and the last among them.

    Raises:
        ValueError: There are none.
    """
    found = [
        f"{path}.{key}" if path else key
        for path, module in network.named_modules()
        if isinstance(module, nn.ModuleList)
        for key, member in module.named_children()
        if any(_ATTENTION.match(name) for name, _ in member.named_children())
    ]
    if not found:
        raise ValueError(f"{type(network).__name__} has no list of blocks with attentions; name some with blocks=")
    taken = min(most, len(found))
    last = len(found) - 1
    return [found[round(place * last / (taken - 1)) if taken > 1 else last] for place in range(taken)]


def _head(channels: int, width: int) -> nn.Sequential:
    norm = nn.LayerNorm(channels, elementwise_affine=False)
    return nn.Sequential(norm, nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))


def _width_of(block: nn.Module) -> int:
    """Channels of a block's features: what its attention reads, or else what its last layer gives."""
    layers = [(name, layer) for name, layer in block.named_modules() if isinstance(layer, _LAYERS) and "lora_" not in name]
    for name, layer in layers:
        if isinstance(layer, nn.Linear) and any(_ATTENTION.match(part) for part in name.split(".")):
            return layer.in_features
    if not layers:
        raise ValueError(f"blocks must have layers that tell the width of their features, which a {type(block).__name__} has not")
    last: Any = layers[-1][1]
    return int(last.out_features if isinstance(last, nn.Linear) else last.out_channels)


@contextmanager
def _watched(network: nn.Module, blocks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The features of blocks that are called within, by name."""
    features: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            features[name] = _stream(args, kwargs, output)

        return hook

    handles = [network.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True) for name in blocks]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def _stream(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
    """The picture's tokens in a block's output: what has the shape of the hidden states that it was given, or else its first tensor."""
    if isinstance(output, Tensor):
        return output
    tensors = [part for part in output if isinstance(part, Tensor)]
    given = kwargs.get("hidden_states", args[0] if args else None)
    alike = [part for part in tensors if isinstance(given, Tensor) and part.shape == given.shape]
    return alike[-1] if alike else tensors[0]  # the text stands first where both are as long


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Within, nothing that the network's weights are used for is recorded for their gradients."""
    needed = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in needed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)
