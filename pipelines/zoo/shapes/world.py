"""The `shapes` world: captions, scenes and an anti-aliased renderer, all as vectorised tensor code.

A scene holds one to three solid objects on a plain background. The caption names every object and says where the
first one lies with respect to each of the others:

    "a small red circle"
    "a small red circle left of a blue square"
    "a large cyan cross above a small red circle and left of a blue square"

A size that is not named may be either. No two objects of a scene share colour and shape, so that a caption's truth
can be read back from the pixels (see `verifier.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

RESOLUTION = 64
MAX_OBJECTS = 3
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
RADIUS = (7.0, 11.0)
"""Half the extent of a small and of a large object, in pixels."""
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUND = (0.93, 0.93, 0.91)
PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.13, 0.62, 0.25),
    "blue": (0.16, 0.30, 0.86),
    "yellow": (0.95, 0.78, 0.08),
    "purple": (0.55, 0.15, 0.65),
    "cyan": (0.10, 0.75, 0.82),
}
COLOURS = tuple(PALETTE)

GAP = 3.0
"""Free pixels between the bounding boxes of two objects."""
MARGIN = 1.5
"""Free pixels between an object and the edge of the picture."""

HELD_OUT_PAIRS: tuple[tuple[str, str], ...] = (("blue", "triangle"), ("yellow", "circle"))
"""Colour and shape pairs that no training caption holds (2 of 24)."""
HELD_OUT_TRIPLES: tuple[tuple[str, str, str], ...] = (
    ("circle", "left of", "cross"),
    ("square", "above", "circle"),
    ("triangle", "right of", "square"),
    ("cross", "below", "triangle"),
    ("circle", "below", "circle"),
    ("square", "left of", "triangle"),
)
"""(shape, relation, shape) triples that no training caption holds (6 of 64)."""


@dataclass(frozen=True)
class Thing:
    """One object of a caption. `size` is None where the caption does not say it."""

    shape: str
    colour: str
    size: str | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (("shape", self.shape, SHAPES), ("colour", self.colour, COLOURS), ("size", self.size, (*SIZES, None))):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(str(word) for word in allowed)}, got {value!r}")

    def __str__(self) -> str:
        return " ".join(word for word in ("a", self.size, self.colour, self.shape) if word)


@dataclass(frozen=True)
class Caption:
    """`relations[i]` says where `things[0]` lies with respect to `things[i + 1]`."""

    things: tuple[Thing, ...]
    relations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= len(self.things) <= MAX_OBJECTS or len(self.relations) != len(self.things) - 1:
            raise ValueError(
                f"a caption has 1 to {MAX_OBJECTS} things and one relation for each but the first, got {len(self.things)} things and "
                f"{len(self.relations)} relations"
            )
        for relation in self.relations:
            if relation not in RELATIONS:
                raise ValueError(f"relations must be of {', '.join(RELATIONS)}, got {relation!r}")
        if len({(thing.colour, thing.shape) for thing in self.things}) < len(self.things):
            raise ValueError(f"two objects of {str(self)!r} share colour and shape; make them differ so that they can be told apart")

    def __str__(self) -> str:
        clauses = [f"{relation} {thing}" for relation, thing in zip(self.relations, self.things[1:], strict=True)]
        return " ".join((str(self.things[0]), " and ".join(clauses))).strip()

    @property
    def held_out(self) -> bool:
        """Whether the caption holds a combination that training never showed."""
        first = self.things[0].shape
        pairs = {(thing.colour, thing.shape) for thing in self.things}
        triples = {(first, rel, thing.shape) for rel, thing in zip(self.relations, self.things[1:], strict=True)}
        return bool(pairs & set(HELD_OUT_PAIRS) or triples & set(HELD_OUT_TRIPLES))


_THING = rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CLAUSE = rf"({'|'.join(RELATIONS)}) {_THING}"
_CAPTION = re.compile(rf"{_THING}(?: {_CLAUSE})?(?: and {_CLAUSE})?")


def parse(text: str) -> Caption:
    """The caption that `text` spells.

    Raises:
        ValueError: `text` is not a caption of this world, and the message says what one looks like; or two of its objects
            share colour and shape.
    """
    match = _CAPTION.fullmatch(" ".join(text.lower().split()).rstrip("."))
    if match is None or (match[4] is None and match[8] is not None):
        raise ValueError(
            f"not a caption of the shapes world: {text!r}; say one to three objects such as 'a small red circle left of "
            f"a blue square and above a cyan cross' (sizes {', '.join(SIZES)}; colours {', '.join(COLOURS)}; "
            f"shapes {', '.join(SHAPES)}; relations {', '.join(RELATIONS)})"
        )
    groups = match.groups()
    things, relations = [Thing(groups[2], groups[1], groups[0])], []
    for at in (3, 7):
        if groups[at] is not None:
            relations.append(groups[at])
            things.append(Thing(groups[at + 3], groups[at + 2], groups[at + 1]))
    return Caption(tuple(things), tuple(relations))


class Scenes(NamedTuple):
    """A batch of scenes as tensors; entries of objects beyond `count` are meaningless."""

    count: Tensor  # type: ignore[assignment]  # [B] 1..3; it hides tuple.count, which nobody needs here
    shape: Tensor  # [B, 3] index into SHAPES
    colour: Tensor  # [B, 3] index into COLOURS
    size: Tensor  # [B, 3] index into SIZES
    size_said: Tensor  # [B, 3] bool
    relation: Tensor  # [B, 2] index into RELATIONS, of object 0 to objects 1 and 2
    centre: Tensor  # [B, 3, 2] x, y in pixels

    def captions(self) -> list[Caption]:
        """The caption of every scene."""
        out = []
        rows = zip(*(field.tolist() for field in self[:6]), strict=True)
        for count, shape, colour, size, said, relation in rows:
            things = tuple(Thing(SHAPES[shape[i]], COLOURS[colour[i]], SIZES[size[i]] if said[i] else None) for i in range(count))
            out.append(Caption(things, tuple(RELATIONS[r] for r in relation[: count - 1])))
        return out


def _held_out(scenes: Scenes) -> Tensor:
    """[B] bool: rows with a combination that is held out of training."""
    exists = torch.arange(MAX_OBJECTS) < scenes.count[:, None]
    pairs = torch.zeros(len(COLOURS), len(SHAPES), dtype=torch.bool)
    for colour, shape in HELD_OUT_PAIRS:
        pairs[COLOURS.index(colour), SHAPES.index(shape)] = True
    triples = torch.zeros(len(SHAPES), len(RELATIONS), len(SHAPES), dtype=torch.bool)
    for first, relation, second in HELD_OUT_TRIPLES:
        triples[SHAPES.index(first), RELATIONS.index(relation), SHAPES.index(second)] = True
    pair = (pairs[scenes.colour, scenes.shape] & exists).any(1)
    triple = (triples[scenes.shape[:, :1], scenes.relation, scenes.shape[:, 1:]] & exists[:, 1:]).any(1)
    return pair | triple


def _distinct(scenes: Scenes) -> Tensor:
    """[B] bool: no two objects share colour and shape."""
    exists = torch.arange(MAX_OBJECTS) < scenes.count[:, None]
    kind = torch.where(exists, scenes.colour * len(SHAPES) + scenes.shape, -1 - torch.arange(MAX_OBJECTS))
    return (kind[:, 0] != kind[:, 1]) & (kind[:, 0] != kind[:, 2]) & (kind[:, 1] != kind[:, 2])


def _roomy(scenes: Scenes) -> Tensor:
    """[B] bool: not three in a row with more than one large among them, for which the picture is too narrow."""
    row = (scenes.count == 3) & (scenes.relation[:, 0] // 2 == scenes.relation[:, 1] // 2)
    row &= scenes.relation[:, 0] != scenes.relation[:, 1]
    return ~(row & (scenes.size.sum(1) > 1))


def _allowed(scenes: Scenes) -> Tensor:
    """[B] bool: objects apart, inside the picture, and placed as the relations say."""
    radius = torch.tensor(RADIUS)[scenes.size]
    exists = torch.arange(MAX_OBJECTS) < scenes.count[:, None]
    inside = ((scenes.centre >= radius[..., None] + MARGIN) & (scenes.centre <= RESOLUTION - MARGIN - radius[..., None])).all(-1)
    ok = (inside | ~exists).all(1)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        distance = (scenes.centre[:, i] - scenes.centre[:, j]).abs().amax(-1)
        ok &= (distance >= radius[:, i] + radius[:, j] + GAP) | ~exists[:, j]
    # Where the first object lies: the named direction is the larger of the two, as people mean it.
    offset = scenes.centre[:, 1:] - scenes.centre[:, :1]
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])[scenes.relation]
    along = torch.where(scenes.relation < 2, offset[..., 0], offset[..., 1]) * sign
    across = torch.where(scenes.relation < 2, offset[..., 1], offset[..., 0]).abs()
    return ok & ((along >= across) | ~exists[:, 1:]).all(1)


def sample_scenes(
    n: int, generator: torch.Generator, *, held_out: bool | None = False, counts: Sequence[float] = (0.2, 0.35, 0.45), placed: bool = True
) -> Scenes:
    """`n` random scenes.

    Args:
        held_out: False draws training scenes only, True only scenes with a held-out combination, None both.
        counts: Probabilities of one, two and three objects.
        placed: Whether places are drawn too; without them the scenes serve for their captions only.
    """

    def draw(m: int) -> Scenes:
        def index(high: int, *shape: int) -> Tensor:
            return torch.randint(high, (m, *shape), generator=generator)

        size = index(2, 3)
        radius = torch.tensor(RADIUS)[size][..., None] + MARGIN
        return Scenes(
            count=torch.multinomial(torch.tensor(counts, dtype=torch.float32), m, replacement=True, generator=generator) + 1,
            shape=index(len(SHAPES), 3),
            colour=index(len(COLOURS), 3),
            size=size,
            size_said=torch.rand(m, 3, generator=generator) < 0.75,
            relation=index(len(RELATIONS), 2),
            centre=radius + torch.rand(m, 3, 2, generator=generator) * (RESOLUTION - 2 * radius),
        )

    def wanted(scenes: Scenes) -> Tensor:
        if held_out is None:
            return torch.ones_like(scenes.count, dtype=torch.bool)
        return _held_out(scenes) == held_out

    # What is said is drawn first and kept; only then are places drawn until they fit, so that the placement's
    # acceptance does not bias what is said.
    scenes = draw(n)
    while len(bad := (~(wanted(scenes) & _distinct(scenes) & _roomy(scenes))).nonzero()[:, 0]):
        fresh = draw(len(bad))
        keep_count = scenes.count[bad]
        for field, value in zip(scenes, fresh._replace(count=keep_count), strict=True):
            field[bad] = value
    return place(scenes, generator) if placed else scenes


def place(scenes: Scenes, generator: torch.Generator) -> Scenes:
    """The same scenes with places drawn anew until every object fits.

    Raises:
        ValueError: Some scene has no room for its objects.
    """
    if not bool(_roomy(scenes).all()):
        raise ValueError("three objects in a row fit only if at most one of them is large")
    centre = scenes.centre.clone()
    tries = 64
    todo = torch.arange(len(centre))
    radius = torch.tensor(RADIUS)[scenes.size][..., None] + MARGIN
    while len(todo):
        low = radius[todo].repeat_interleave(tries, 0)
        candidate = low + torch.rand(len(low), MAX_OBJECTS, 2, generator=generator) * (RESOLUTION - 2 * low)
        rows = Scenes._make((*(field[todo].repeat_interleave(tries, 0) for field in scenes[:6]), candidate))
        ok = _allowed(rows).view(-1, tries)
        first = ok.int().argmax(1)
        found = ok.any(1)
        centre[todo[found]] = candidate.view(-1, tries, MAX_OBJECTS, 2)[torch.arange(len(todo)), first][found]
        todo = todo[~found]
    return scenes._replace(centre=centre)


def scenes_of(captions: Sequence[Caption], generator: torch.Generator) -> Scenes:
    """Scenes that show the given captions; unsaid sizes and all places are drawn.

    Raises:
        ValueError: Some caption has no room: three in a row of which two are said to be large.
    """
    n = len(captions)
    zeros = torch.zeros(n, MAX_OBJECTS, dtype=torch.long)
    scenes = Scenes(
        count=torch.tensor([len(c.things) for c in captions]),
        shape=zeros.clone(),
        colour=zeros.clone(),
        size=torch.randint(2, (n, MAX_OBJECTS), generator=generator),
        size_said=torch.zeros(n, MAX_OBJECTS, dtype=torch.bool),
        relation=torch.zeros(n, 2, dtype=torch.long),
        centre=torch.zeros(n, MAX_OBJECTS, 2),
    )
    for row, caption in enumerate(captions):
        for i, thing in enumerate(caption.things):
            scenes.shape[row, i] = SHAPES.index(thing.shape)
            scenes.colour[row, i] = COLOURS.index(thing.colour)
            if thing.size is not None:
                scenes.size[row, i] = SIZES.index(thing.size)
                scenes.size_said[row, i] = True
        for i, relation in enumerate(caption.relations):
            scenes.relation[row, i] = RELATIONS.index(relation)
    # Unsaid sizes are drawn again where they leave no room, unless those that are said already do.
    hopeless = (scenes.size * scenes.size_said).sum(1) > 1
    while len(bad := (~_roomy(scenes) & ~hopeless).nonzero()[:, 0]):
        fresh = torch.randint(2, (len(bad), MAX_OBJECTS), generator=generator)
        scenes.size[bad] = torch.where(scenes.size_said[bad], scenes.size[bad], fresh)
    return place(scenes, generator)


def coverage(shape: Tensor, radius: Tensor, centre: Tensor, resolution: int = RESOLUTION) -> Tensor:
    """How much of each pixel an object covers (anti-aliased over one pixel), in [0, 1].

    Args:
        shape: [N] index into SHAPES.
        radius: [N] half the extent in pixels.
        centre: [N, 2] x, y in pixels (a pixel's centre is at its index plus one half).

    Returns:
        [N, resolution, resolution].
    """
    axis = torch.arange(resolution, dtype=radius.dtype, device=radius.device) + 0.5
    x = axis[None, None, :] - centre[:, 0, None, None]
    y = axis[None, :, None] - centre[:, 1, None, None]
    r = radius[:, None, None]
    ax, ay = x.abs(), y.abs()
    circle = (x * x + y * y).sqrt() - r
    square = torch.maximum(ax, ay) - 0.9 * r
    # An upright isosceles triangle that fills its box: base 2r, height 2r; |(2, 1)| normalises the slanted sides.
    triangle = torch.maximum(y - r, (2.0 * ax - y - r) / 5.0**0.5)
    arm = 0.36 * r
    cross = torch.minimum(torch.maximum(ax - arm, ay - r), torch.maximum(ax - r, ay - arm))
    kind = shape[:, None, None]
    distance = torch.where(kind == 0, circle, torch.where(kind == 1, square, torch.where(kind == 2, triangle, cross)))
    return (0.5 - distance).clamp(0.0, 1.0)


def render(scenes: Scenes) -> Tensor:
    """[B, 3, 64, 64] pictures in [0, 1]."""
    b = len(scenes.count)
    radius = torch.tensor(RADIUS)[scenes.size]
    alpha = coverage(scenes.shape.flatten(), radius.flatten(), scenes.centre.flatten(0, 1)).view(b, MAX_OBJECTS, 1, RESOLUTION, RESOLUTION)
    alpha = alpha * (torch.arange(MAX_OBJECTS) < scenes.count[:, None])[..., None, None, None]
    background = torch.tensor(BACKGROUND).view(1, 3, 1, 1)
    paint = torch.tensor([PALETTE[name] for name in COLOURS])[scenes.colour][..., None, None]
    return background + (alpha * (paint - background[:, None])).sum(1)
