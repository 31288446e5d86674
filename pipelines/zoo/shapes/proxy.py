"""A differentiable stand-in for the exact verifier of the `shapes` world: gradients for noise optimisation and reward feedback.

A small convolutional network reads a picture as the verifier does (pieces with a colour, a shape and a size, or none that is clear; how
many pieces; debris) and knows no captions. What it read is compared with a parsed caption in closed form, so captions need no encoder,
unseen ones are no harder, and every part of a caption that is not met contributes its own gradient.

    proxy = load_proxy()
    score = proxy.score(images, ["a small red circle left of a blue square", ...])  # [N] log-probability that all is right
    score.sum().backward()
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from hasten.pipelines.zoo.shapes.verifier import PIECE_TONE, RELATION_OFFSET, STRAY_TONE
from hasten.pipelines.zoo.shapes.world import (
    BACKGROUND,
    COLOURS,
    MAX_OBJECTS,
    PALETTE,
    RELATIONS,
    RESOLUTION,
    SHAPES,
    SIZES,
    Caption,
    parse,
)

WEIGHTS = "weights/shapes-proxy"

GRID = 8
"""Cells along each side; the centres of two objects lie at least 17 pixels apart, those of two cells 8."""
COUNTS = MAX_OBJECTS + 2
"""Classes of the number of pieces: none to three, and more."""
RELATION_SOFTNESS = 1.0
"""Pixels over which a relation turns from false to true: about what the network's centres are off by."""
EXCLUDED = -1e3
"""Log-probability of two things in one cell."""
COLOUR_WIDTH = 0.15
"""Distance in RGB over which a pixel stops belonging to a palette colour; two of the palette lie at least 0.47 apart."""

_DIRECTION = ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0))
"""Where the other thing lies as seen from the first, for each of RELATIONS."""


class Question(NamedTuple):
    """What N captions ask, as tensors; entries of things that are not there are zero and meaningless."""

    exists: Tensor
    """[N, 3] bool."""
    colour: Tensor
    """[N, 3] index into COLOURS."""
    shape: Tensor
    """[N, 3] index into SHAPES."""
    size: Tensor
    """[N, 3] index into SIZES; their number where the caption leaves the size open."""
    relation: Tensor
    """[N, 2] index into RELATIONS, of thing 0 to things 1 and 2."""


def question_of(captions: Sequence[str | Caption], device: torch.device | str = "cpu") -> Question:
    """What the captions ask.

    Raises:
        ValueError: One of them is no caption of this world.
    """
    parsed = [parse(caption) if isinstance(caption, str) else caption for caption in captions]
    things = [[(1, COLOURS.index(t.colour), SHAPES.index(t.shape), _size(t.size)) for t in caption.things] for caption in parsed]
    relations = [[RELATIONS.index(word) for word in caption.relations] for caption in parsed]
    blank = (0, 0, 0, 0)
    table = torch.tensor([(row + [blank] * MAX_OBJECTS)[:MAX_OBJECTS] for row in things], device=device).view(-1, MAX_OBJECTS, 4)
    relation = torch.tensor([[*row, 0, 0][: MAX_OBJECTS - 1] for row in relations], device=device).view(-1, MAX_OBJECTS - 1)
    return Question(table[..., 0].bool(), table[..., 1], table[..., 2], table[..., 3], relation)


def _size(said: str | None) -> int:
    return len(SIZES) if said is None else SIZES.index(said)


class Reading(NamedTuple):
    """What the network sees in N pictures, cell by cell; the last class of each attribute is "none that is clear"."""

    presence: Tensor
    """[N, 64] logits that the centre of a piece lies in the cell."""
    colour: Tensor
    """[N, 64, 7] log-probabilities of the piece that may be there."""
    shape: Tensor
    """[N, 64, 5] log-probabilities."""
    size: Tensor
    """[N, 64, 3] log-probabilities."""
    centre: Tensor
    """[N, 64, 2] x, y in pixels."""
    number: Tensor
    """[N, 5] log-probabilities of the number of pieces, the last for four or more."""
    clean: Tensor
    """[N] logit that nothing is too large and no debris lies about."""


class Block(nn.Module):
    """Two convolutions, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        # No norm anywhere: one would mix what lies far apart. Blocks that begin as identities train without.
        for parameter in self.second.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        """[N, width, H, W]."""
        return features + self.second(F.relu(self.first(F.relu(features))))


class ShapesProxy(ModelMixin, ConfigMixin):
    """Reads pictures of the shapes world and scores them against captions; a verifier whose gradients reach the pixels.

    Args:
        fine: Channels at 32x32.
        width: Channels at 16x16 and 8x8.
        blocks: Residual blocks at 32x32, 16x16 and 8x8.

    Attributes:
        differentiable: True.
        range_hint: What pictures of this world score, from nothing right up to 0; others may score lower still.
    """

    differentiable = True
    range_hint = (-40.0, 0.0)

    @register_to_config
    def __init__(self, fine: int = 32, width: int = 64, blocks: tuple[int, int, int] = (2, 3, 1)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4 * (6 + len(COLOURS) + 1), fine, 3, padding=1)
        self.upper = nn.ModuleList(Block(fine) for _ in range(blocks[0]))
        self.down1 = nn.Conv2d(fine, width, 3, stride=2, padding=1)
        self.inner = nn.ModuleList(Block(width) for _ in range(blocks[1]))
        self.down2 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.lower = nn.ModuleList(Block(width) for _ in range(blocks[2]))
        self.classes = (1, len(COLOURS) + 1, len(SHAPES) + 1, len(SIZES) + 1, 2)
        self.cells = nn.Conv2d(width, sum(self.classes), 1)
        self.local = nn.Conv2d(2 * width, width, 1)
        self.whole_in = nn.Linear(width, width)
        self.whole_out = nn.Linear(width, COUNTS + 1)

    def forward(self, images: Tensor) -> Reading:
        """Reads pictures [N, 3, 64, 64] in 0 to 1."""
        seen = F.pixel_unshuffle(_seen(images), 2).to(self.stem.weight.dtype)
        features = self.stem(seen.contiguous(memory_format=torch.channels_last))
        for block in self.upper:
            features = block(features)
        features = self.down1(F.relu(features))
        for block in self.inner:
            features = block(features)
        middle = features
        features = self.down2(F.relu(features))
        for block in self.lower:
            features = block(features)
        features = F.relu(features)
        out = self.cells(features).flatten(2).transpose(1, 2).float()
        presence, colour, shape, size, offset = out.split(self.classes, 2)
        # Counts and debris are sums over the picture of what is seen in places.
        local = self.local(torch.cat([F.avg_pool2d(F.relu(middle), 2), features], 1))
        whole = self.whole_in(F.relu(local).mean((2, 3)) * GRID)
        whole = self.whole_out(F.relu(whole)).float()
        stride = RESOLUTION / GRID
        axis = (torch.arange(GRID, device=images.device) + 0.5) * stride
        cells = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1)
        return Reading(
            presence=presence[..., 0] - 3.0,  # few cells hold a centre
            colour=colour.log_softmax(-1),
            shape=shape.log_softmax(-1),
            size=size.log_softmax(-1),
            centre=cells + stride * offset,
            number=whole[:, :-1].log_softmax(-1),
            clean=whole[:, -1],
        )

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Log-probability [N] that all a caption says is right, at most 0; partly right pictures score in between.

        Args:
            images: [N, 3, H, W] in 0 to 1. Other sizes than 64x64 are resampled: averaged over areas where both sides are larger, else
                linearly.
            prompts: A caption of this world for each.

        Raises:
            ValueError: `images` has another shape, there is not one prompt for each image, or a prompt is no caption of this world.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape [N, 3, H, W], not {list(images.shape)}")
        if len(prompts) != len(images):
            raise ValueError(f"there are {len(images)} images but {len(prompts)} prompts; give one prompt for each image")
        question = question_of(prompts, images.device)
        if not len(images):  # reshaping guesses no sizes from nothing
            return images.new_zeros(0)
        return agreement(self(resampled(images)), question)


def resampled(images: Tensor) -> Tensor:
    """Images [N, 3, H, W] brought to 64x64."""
    side = RESOLUTION
    if images.shape[2:] == (side, side):
        return images
    if min(images.shape[2:]) >= side:
        return F.adaptive_avg_pool2d(images, side)
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def agreement(reading: Reading, question: Question) -> Tensor:
    """Log-probability [N] that pictures are what was asked for, all parts taken as independent given what was read.

    Of the ways to find the named things in cells, no two in one, the probabilities are added up exactly. Relations join thing 0 with each
    of the others and those with nothing else, so the sum over cells of thing 0 holds a product of two sums, from which the ways that put
    both others into one cell are taken away.
    """
    precision = reading.presence.dtype
    reading = Reading(*(part.double() for part in reading))  # the difference of two nearly equal sums may be what counts
    there = F.logsigmoid(reading.presence)[:, None]
    clear = reading.size[..., :-1].logsumexp(-1, keepdim=True)
    sizes = torch.cat([reading.size[..., :-1], clear], -1)

    def of(attribute: Tensor, asked: Tensor) -> Tensor:
        """[N, 3, 64]: the log-probability in every cell of what is asked of each thing."""
        return attribute.transpose(1, 2).gather(1, asked[..., None].expand(-1, -1, attribute.shape[1]))

    here = there + of(reading.colour, question.colour) + of(reading.shape, question.shape) + of(sizes, question.size)
    direction = reading.centre.new_tensor(_DIRECTION)[question.relation]
    along = torch.einsum("nax,njx->nja", reading.centre, direction)
    beyond = (along[:, :, None] - along[:, :, :, None] - RELATION_OFFSET) / RELATION_SOFTNESS  # [N, 2, cell of thing 0, cell of the other]
    same = EXCLUDED * torch.eye(beyond.shape[-1], dtype=beyond.dtype, device=beyond.device)
    ways = here[:, 1:, None] + F.logsigmoid(beyond) + same
    each, both = ways.logsumexp(-1), ways.sum(1).logsumexp(-1)
    share = (both - each.sum(1)).clamp(max=-1e-12)
    second, third = question.exists[:, 1, None], question.exists[:, 2, None]
    others = torch.where(second, each[:, 0], 0.0) + torch.where(third, each[:, 1] + torch.log(-torch.expm1(share)), 0.0)
    # A centre between two cells is shared by them, which is why their probabilities are added; two alike make more than one.
    things = (here[:, 0] + others).logsumexp(-1).clamp(max=0.0)
    number = reading.number.gather(1, question.exists.sum(1, keepdim=True))[:, 0]
    return (things + number + F.logsigmoid(reading.clean)).to(precision)


def _seen(images: Tensor) -> Tensor:
    """[N, 13, H, W]: pixels as offsets from the background, how opaque they are by the verifier's measure and whether it would take them
    for part of a piece or for debris, and how near each is to the background and to the palette's colours."""
    with torch.autocast(images.device.type, enabled=False):  # colours 0.01 apart matter
        images = images.float()
        colours = images.new_tensor([BACKGROUND, *PALETTE.values()])
        lean = colours[1:] - colours[0]
        reach = lean.norm(dim=1)
        offset = images - colours[0][:, None, None]
        inner = torch.einsum("kc,nchw->nkhw", lean, offset)
        square = offset.square().sum(1, keepdim=True)
        tone = (square + 1e-6).sqrt() / reach[_first_largest(inner.detach() / reach[:, None, None])]  # a root has no gradient at 0
        smooth = F.avg_pool2d(tone, 3, 1, 1, count_include_pad=False)
        apart = torch.cat([square, square - 2 * inner + reach[:, None, None].square()], 1)
        near = (-apart / (2 * COLOUR_WIDTH**2)).exp()
        piece, stray = torch.sigmoid((tone - PIECE_TONE) / 0.05), torch.sigmoid((smooth - STRAY_TONE) / 0.03)
        return torch.cat([2 * offset, tone, piece, stray, near], 1)


def _first_largest(maps: Tensor) -> Tensor:
    """argmax over axis 1 of [N, C, H, W], kept; a running maximum is several times as fast on the CPU."""
    best, index = maps[:, :1], torch.zeros_like(maps[:, :1], dtype=torch.long)
    for i in range(1, maps.shape[1]):
        larger = maps[:, i : i + 1] > best
        best, index = torch.where(larger, maps[:, i : i + 1], best), index.masked_fill(larger, i)
    return index


def weights_folder() -> Path:
    """Where the proxy that ships lies.

    Raises:
        FileNotFoundError: It is not installed.
    """
    folder = Path(str(files("hasten.pipelines.zoo"))) / WEIGHTS
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the proxy's weights are missing ({folder}): reinstall hasten, or train them with recipes/shapes_proxy.py")
    return folder


def load_proxy(folder: Path | None = None) -> ShapesProxy:
    """The proxy that ships, in float32 (the file holds bfloat16), its own weights frozen.

    Args:
        folder: Another folder of the same kind.

    Raises:
        FileNotFoundError: The weights are not installed.
    """
    proxy = ShapesProxy.from_pretrained(folder or weights_folder(), torch_dtype=torch.float32, local_files_only=True)
    return proxy.eval().requires_grad_(False)
