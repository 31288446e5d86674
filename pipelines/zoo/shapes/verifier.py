"""The exact verifier of the `shapes` world: is what a caption says really in the picture?

No network judges here. A picture is compared with the plain background; whatever stands out is gathered into connected
pieces, and each piece is measured: its colour against the palette, its outline against the four shapes, its extent
against the two sizes, its place. The pieces are then matched with the objects that the caption names.

    verdict = verify(images, ["a small red circle left of a blue square", ...])
    print(verdict)             # one line of percentages
    print(verdict.explain(0))  # what was asked of picture 0, what was found, and what is wrong with it

Pictures that a decoder drew are never quite clean. The slack below lets pass what a blur of half a pixel, noise of 0.02
and a shift of 0.04 per channel do, together, and no more; `tests/pipelines/test_shapes_verifier.py` holds it to both sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import permutations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hasten.pipelines.zoo.shapes.world import (
    BACKGROUND,
    COLOURS,
    MAX_OBJECTS,
    PALETTE,
    RADIUS,
    RELATIONS,
    RESOLUTION,
    SHAPES,
    SIZES,
    Caption,
    Thing,
    coverage,
    parse,
)

Images = Tensor | NDArray[np.generic] | Sequence[Tensor | NDArray[np.generic] | Image.Image]

PIECE_TONE = 0.38
"""Opacity from which a pixel belongs to a piece; below one half, so that a 50/50 blend of two shapes is seen whole."""
PIECE_AREA = (40, 600)
"""Pixels of a piece that may be an object. The smallest object has 98, the largest 392."""
STRAY_TONE, STRAY_AREA = 0.16, 20
"""Away from all pieces, at most this many pixels may be more opaque than this (after averaging over 3x3)."""
HALO = 2
"""Pixels around a piece that still count as its own soft edge."""
COLOUR_ERROR = 0.15
"""Distance in RGB that the mean colour of an object's inside may have from its palette colour (the nearest two of the
palette lie 0.47 apart, so that an even mix is at least 0.23 away from either)."""
COLOUR_PIXEL, COLOUR_SHARE = 0.30, 0.92
"""This share of an object's inside must have its palette colour nearest and no farther than this."""
EDGE_CLIP = 0.15
"""Opacity at either end that is clipped before outlines are compared: noise on the plains, tails of soft edges."""
SHAPE_FIT, SHAPE_MARGIN = 0.88, 0.10
"""Least overlap (intersection over union of soft masks) with the best shape, and least lead over the second best. Within the
slack, true shapes measured at least 0.947 and 0.13; even blends at most 0.93 and 0.10, but never both, and the union of a circle
and a square 0.95 and 0.087."""
SIZE_ERROR = 1.0
"""Pixels by which a radius may differ from the nominal one. The top half of a large triangle, itself a triangle, is 1.5 short."""
RELATION_OFFSET = 4.0
"""Pixels by which two centres must differ in the direction that the caption names."""


@dataclass(frozen=True)
class Tolerance:
    """By how much a measured picture may differ from what its caption says.

    Attributes:
        colour_error, colour_share, shape_fit, shape_margin, size_error, relation_offset, stray_area: See the constants of these names.
    """

    colour_error: float = COLOUR_ERROR
    colour_share: float = COLOUR_SHARE
    shape_fit: float = SHAPE_FIT
    shape_margin: float = SHAPE_MARGIN
    size_error: float = SIZE_ERROR
    relation_offset: float = RELATION_OFFSET
    stray_area: float = STRAY_AREA


EXACT = Tolerance()
BLURRED = Tolerance(
    colour_error=0.25, colour_share=0.7, shape_fit=0.8, shape_margin=0.03, size_error=2.0, relation_offset=2.0, stray_area=80
)
"""For estimates of a clean picture in the middle of sampling: soft edges, washed-out colours, ghosts that have yet to go."""

_SLOTS = MAX_OBJECTS + 1
_WINDOW = 32
_AREA = (math.pi, 3.24, 2.0, 2.3616)
"""Area of each shape of radius 1."""
_CENTROID = (0.0, 0.0, 1 / 3, 0.0)
"""How far each shape's centroid lies below its box's centre, for radius 1."""


@dataclass(frozen=True)
class Findings:
    """What is in a batch of pictures, whatever their captions say.

    Pieces are sorted by area, largest first, and only the first four of a picture are measured; slots beyond `count` are
    meaningless.
    """

    count: Tensor
    """[N] pieces of at least the least object's area."""
    oversized: Tensor
    """[N] bool: some piece is larger than any object."""
    stray: Tensor
    """[N] pixels of debris or ghosts that belong to no piece."""
    colour: Tensor
    """[N, 4] index into COLOURS of the nearest."""
    colour_error: Tensor
    """[N, 4] distance in RGB from it."""
    colour_share: Tensor
    """[N, 4] share of the inside that has it."""
    shape: Tensor
    """[N, 4] index into SHAPES of the best fit."""
    shape_fit: Tensor
    """[N, 4] overlap with it, in [0, 1]."""
    shape_margin: Tensor
    """[N, 4] lead of that overlap over the second best shape's."""
    radius: Tensor
    """[N, 4] half the extent in pixels, were it exactly that shape."""
    centre: Tensor
    """[N, 4, 2] x, y of the box's centre in pixels."""
    tolerance: Tolerance = EXACT
    """What counts as one of the shapes, colours and sizes."""

    @property
    def colour_ok(self) -> Tensor:
        """[N, 4] bool: one palette colour throughout."""
        return (self.colour_error <= self.tolerance.colour_error) & (self.colour_share >= self.tolerance.colour_share)

    @property
    def shape_ok(self) -> Tensor:
        """[N, 4] bool: clearly one of the shapes."""
        return (self.shape_fit >= self.tolerance.shape_fit) & (self.shape_margin >= self.tolerance.shape_margin)

    @property
    def size(self) -> Tensor:
        """[N, 4] index into SIZES of the nearer."""
        return (self.radius > sum(RADIUS) / 2).long()

    @property
    def size_ok(self) -> Tensor:
        """[N, 4] bool: near enough to one of the two sizes."""
        return (self.radius - torch.tensor(RADIUS)[self.size]).abs() <= self.tolerance.size_error

    @property
    def clean(self) -> Tensor:
        """[N] bool: no debris, no ghost, nothing too large."""
        return ~self.oversized & (self.stray <= self.tolerance.stray_area)

    def describe(self, picture: int, slot: int) -> str:
        """Piece `slot` of a picture in words, with its place and whatever is odd about it."""
        shape, colour, size = (int(index[picture, slot]) for index in (self.shape, self.colour, self.size))
        x, y = self.centre[picture, slot].tolist()
        text = f"{Thing(SHAPES[shape], COLOURS[colour], SIZES[size])} at ({x:.0f}, {y:.0f})"
        odd, least = [], self.tolerance
        if not self.colour_ok[picture, slot]:
            odd.append(
                f"colour off the palette: {self.colour_error[picture, slot]:.2f} from {COLOURS[colour]} (at most {least.colour_error}), "
                f"{self.colour_share[picture, slot]:.0%} of it {COLOURS[colour]} (at least {least.colour_share:.0%})"
            )
        if not self.shape_ok[picture, slot]:
            odd.append(
                f"no clear shape: overlap with a {SHAPES[shape]} {self.shape_fit[picture, slot]:.2f} (at least {least.shape_fit}), "
                f"lead over the next {self.shape_margin[picture, slot]:.2f} (at least {least.shape_margin})"
            )
        if not self.size_ok[picture, slot]:
            odd.append(
                f"neither size: radius {self.radius[picture, slot]:.1f}, not within {least.size_error} of {RADIUS[0]:g} or {RADIUS[1]:g}"
            )
        return f"{text} ({'; '.join(odd)})" if odd else text


@dataclass(frozen=True)
class ShapesVerdict:
    """Per picture, whether each thing that its caption says is true; all fields are [N] bool unless they say otherwise.

    An object that was asked for and is not there has neither colour, shape, size nor place, so that those fail with it. An
    extra object, debris or a ghost fails `objects` alone.
    """

    objects: Tensor
    """As many objects as asked for, and nothing else."""
    colour: Tensor
    """Every object asked for has its colour, throughout and on the palette."""
    shape: Tensor
    """Every object asked for has its shape, and no other shape fits nearly as well."""
    size: Tensor
    """Every object asked for has its size; one of the two where the caption leaves it open."""
    relation: Tensor
    """Every relation holds between the objects' centres; true where the caption has none."""
    correct: Tensor
    """All of the above."""
    share: Tensor
    """[N] float: how much of all that is asked is there, in [0, 1]: number of objects, every object's colour, shape and size, relations."""
    asked: Tensor
    """[N] objects that the caption names."""
    assigned: Tensor
    """[N, 3] which piece each named object was taken to be; -1 for none."""
    found: Findings
    """What was measured; `found.count` is the number of objects found."""
    captions: tuple[Caption, ...]

    ATTRIBUTES = ("objects", "colour", "shape", "size", "relation", "correct")

    def __len__(self) -> int:
        return len(self.captions)

    def rates(self) -> dict[str, float]:
        """The share of pictures that pass, for each of `ATTRIBUTES`; NaN where there are no pictures."""
        return {name: float(getattr(self, name).double().mean()) for name in self.ATTRIBUTES}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {rate:.1%}" for name, rate in self.rates().items() if name != "correct")
        return f"{self.rates()['correct']:.1%} of {len(self)} pictures correct ({parts})"

    def explain(self, i: int) -> str:
        """In words, what was asked of picture `i`, what was found, and what is wrong.

        Raises:
            IndexError: There is no such picture.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"picture {i} of {len(self)}")
        caption, found = self.captions[i], self.found
        slots = range(min(int(found.count[i]), _SLOTS))
        lines = [f"asked: {caption}", f"found: {', '.join(found.describe(i, slot) for slot in slots) or 'nothing'}"]
        if found.count[i] > _SLOTS:
            lines[-1] += f" and {int(found.count[i]) - _SLOTS} more"
        if not self.objects[i]:
            wrong = f"{int(self.asked[i])} asked for, {int(found.count[i])} found"
            if found.oversized[i]:
                wrong += f", one larger than any object ({PIECE_AREA[1]} pixels)"
            if found.stray[i] > found.tolerance.stray_area:
                wrong += f", {int(found.stray[i])} stray pixels that belong to none (at most {found.tolerance.stray_area:g})"
            lines.append(f"objects: {wrong}")
        taken = self.assigned[i].tolist()
        for thing, slot in zip(caption.things, taken, strict=False):
            if slot < 0:
                lines.append(f"missing: {thing}")
                continue
            for name, index, words, ok, said in (
                ("colour", found.colour, COLOURS, found.colour_ok, thing.colour),
                ("shape", found.shape, SHAPES, found.shape_ok, thing.shape),
                ("size", found.size, SIZES, found.size_ok, thing.size),
            ):
                is_what = words[int(index[i, slot])]
                if said is not None and is_what != said:
                    lines.append(f"{name}: {thing} is {is_what}")
                elif not ok[i, slot]:
                    lines.append(f"{name}: {thing} is unclear (see above)")
        for relation, thing, slot in zip(caption.relations, caption.things[1:], taken[1:], strict=False):
            if slot >= 0 and taken[0] >= 0:
                x, y = (found.centre[i, taken[0]] - found.centre[i, slot]).tolist()
                if _along(torch.tensor([x, y]), torch.tensor(RELATIONS.index(relation))) < found.tolerance.relation_offset:
                    lines.append(f"relation: {caption.things[0]} is not {relation} {thing}, from which it lies ({x:+.0f}, {y:+.0f}) away")
        lines.append("verdict: " + ("correct" if self.correct[i] else "wrong"))
        return "\n".join(lines)


def verify(images: Images, captions: Sequence[str | Caption], *, batch: int = 32, tolerance: Tolerance = EXACT) -> ShapesVerdict:
    """Judges pictures of the shapes world.

    Args:
        images: Tensor [N, 3, 64, 64] or numpy array [N, 64, 64, 3], in [0, 1] or uint8; or a sequence of PIL images or of such
            tensors and arrays without their first axis. A picture with a value that is not finite is judged as wrong.
        captions: What each should show, N of them.
        batch: Pictures measured at a time; 32 stay in a core's cache, which makes it the fastest.
        tolerance: How exact the pictures must be.

    Raises:
        ValueError: Wrong shape or range, not one caption for each picture, or a caption that is none of this world.
    """
    pictures = _pictures(images)
    if len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} images but {len(captions)} captions; give one caption for each image")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    parsed = tuple(parse(caption) if isinstance(caption, str) else caption for caption in captions)
    return _judge(replace(_find(pictures, batch), tolerance=tolerance), parsed)


def find(images: Images, *, batch: int = 32) -> Findings:
    """What is in the pictures, with no caption to compare with; arguments and errors as in `verify`."""
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    return _find(_pictures(images), batch)


# ------------------------------------------------------------------------------------------------------------ pictures


def _pictures(images: Images) -> Tensor:
    """[N, 3, 64, 64] float32 in [0, 1], on the CPU."""
    if isinstance(images, Image.Image):
        raise ValueError("images is one PIL image; give a list of them")
    if isinstance(images, Tensor):
        pictures = images.detach().cpu()
    elif isinstance(images, np.ndarray):
        pictures = torch.from_numpy(np.array(images))
        pictures = pictures.movedim(-1, 1) if pictures.ndim == 4 else pictures
    elif len(images) == 0:
        pictures = torch.zeros(0, 3, RESOLUTION, RESOLUTION)
    else:
        pictures = torch.cat([_pictures(_one(image)) for image in images])
    if pictures.shape[1:] != (3, RESOLUTION, RESOLUTION):
        given = tuple(images.shape if isinstance(images, Tensor | np.ndarray) else pictures.shape)
        side = f"{RESOLUTION}, {RESOLUTION}"
        raise ValueError(f"images has shape {given}; the shapes world needs tensors [N, 3, {side}] or arrays [N, {side}, 3]")
    if pictures.dtype == torch.uint8:
        pictures = pictures.float() / 255
    elif not pictures.is_floating_point():
        raise ValueError(f"images has dtype {pictures.dtype}; give floating point in [0, 1] or uint8")
    pictures = pictures.float()
    # A picture that holds NaN goes black as a whole, which no caption describes.
    broken = ~pictures.isfinite().flatten(1).all(1)
    pictures = torch.where(broken[:, None, None, None], 0.0, pictures)
    if len(pictures) and (pictures.min() < -0.01 or pictures.max() > 1.01):
        raise ValueError(f"images ranges over [{pictures.min():.2f}, {pictures.max():.2f}]; scale it to [0, 1]")
    return pictures


def _one(image: Tensor | NDArray[np.generic] | Image.Image) -> Tensor | NDArray[np.generic]:
    """One picture with a batch axis."""
    return image[None] if isinstance(image, Tensor | np.ndarray) else np.asarray(image.convert("RGB"))[None]


# ------------------------------------------------------------------------------------------------------------- findings


def _find(pictures: Tensor, batch: int) -> Findings:
    parts = [_find_chunk(chunk) for chunk in pictures.split(batch)]
    names = [field.name for field in fields(Findings) if field.name != "tolerance"]
    whole: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return Findings(**whole)


def _find_chunk(pictures: Tensor) -> Findings:
    n = len(pictures)
    tone = _tone(pictures)
    smooth = F.avg_pool2d(tone, 3, 1, 1, count_include_pad=False)
    label = _components(tone > PIECE_TONE)

    # Moments of every component at once: column l of each table belongs to label l.
    flat = label.flatten(1)
    axis = torch.arange(RESOLUTION, dtype=torch.float32) + 0.5
    place = torch.stack((axis.repeat(RESOLUTION), axis.repeat_interleave(RESOLUTION)))
    area = torch.zeros(n, RESOLUTION**2 + 1).scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float32))
    area[:, 0] = 0
    is_piece = area >= PIECE_AREA[0]
    top_area, top_label = area.topk(_SLOTS)
    moment = torch.stack([torch.zeros_like(area).scatter_add_(1, flat, row.expand(n, -1)) for row in place], -1)
    centroid = moment.gather(1, top_label[..., None].expand(-1, -1, 2)) / top_area[..., None].clamp(min=1)

    near = _widen(is_piece.gather(1, flat).view_as(tone), HALO)
    stray = ((smooth > STRAY_TONE) & ~near).flatten(1).sum(1)

    row, slot = (top_area >= PIECE_AREA[0]).nonzero(as_tuple=True)
    measured = _measure(pictures, tone, smooth, label, row, top_label[row, slot], top_area[row, slot], centroid[row, slot])

    def slots(values: Tensor) -> Tensor:
        out = values.new_zeros(n, _SLOTS, *values.shape[1:])
        out[row, slot] = values
        return out

    each: dict[str, Any] = {name: slots(values) for name, values in measured.items()}
    return Findings(count=is_piece.sum(1), oversized=(area > PIECE_AREA[1]).any(1), stray=stray, **each)


def _tone(pictures: Tensor) -> Tensor:
    """[N, 1, 64, 64]: how far each pixel is from the background, as the opacity of the palette colour it leans to most."""
    background = torch.tensor(BACKGROUND)
    lean = torch.tensor(list(PALETTE.values())) - background
    reach = lean.norm(dim=1)
    offset = pictures - background[:, None, None]
    alignment = ((lean / reach[:, None]) @ offset.flatten(2)).unbind(1)
    best, full = alignment[0], reach[0].expand_as(alignment[0])
    for other, length in zip(alignment[1:], reach[1:], strict=True):  # a running maximum is faster than argmax over an inner axis
        full = torch.where(other > best, length, full)
        best = torch.maximum(best, other)
    return offset.square().sum(1, keepdim=True).sqrt() / full.view(-1, 1, *pictures.shape[2:])


def _widen(maps: Tensor, by: int) -> Tensor:
    """The maximum over all pixels at most `by` rows and columns away, for [..., H, W] maps of any type."""
    for axis in (-1, -2) * by:  # shifts are several times as fast as a pooling layer on the CPU
        wide, inner = maps.clone(), maps.shape[axis] - 1
        for to, source in ((0, 1), (1, 0)):
            target = wide.narrow(axis, to, inner)
            torch.maximum(target, maps.narrow(axis, source, inner), out=target)
        maps = wide
    return maps


def _components(mask: Tensor) -> Tensor:
    """Labels 1.. of the 8-connected components of [N, 1, H, W] masks, 0 elsewhere: each has its highest pixel's number."""
    label = torch.arange(1, math.prod(mask.shape[1:]) + 1).view(1, *mask.shape[1:]) * mask
    while True:
        spread = (_widen(label, 1) * mask).flatten(1)
        # Each pixel jumps to the label that the pixel it is named after has by now: distances double at every round.
        table = F.pad(spread, (1, 0))
        spread = table.gather(1, table.gather(1, spread)).view_as(label)
        if torch.equal(spread, label):
            return label
        label = spread


def _crisp(tone: Tensor) -> Tensor:
    return ((tone - EDGE_CLIP) / (1 - 2 * EDGE_CLIP)).clamp(0.0, 1.0)


def _measure(
    pictures: Tensor, tone: Tensor, smooth: Tensor, label: Tensor, row: Tensor, name: Tensor, area: Tensor, centroid: Tensor
) -> dict[str, Tensor]:
    """Colour, shape, radius and centre of M pieces: number `name[m]` of picture `row[m]`, of `area[m]` around `centroid[m]`."""
    corner = centroid.round().long() - _WINDOW // 2
    step = torch.arange(_WINDOW)
    ys, xs = (corner[:, 1:, None] + step[:, None]), (corner[:, :1, None] + step)
    inside = (ys >= 0) & (ys < RESOLUTION) & (xs >= 0) & (xs < RESOLUTION)
    at = ys.clamp(0, RESOLUTION - 1) * RESOLUTION + xs.clamp(0, RESOLUTION - 1)

    def window(maps: Tensor) -> Tensor:
        """[M, C, 32, 32] cut out of [N, C, 64, 64]; outside the picture it repeats the border, which `inside` masks."""
        channels = maps.shape[1]
        cut = maps.flatten(2)[row].gather(2, at.flatten(1)[:, None].expand(-1, channels, -1))
        return cut.view(-1, channels, _WINDOW, _WINDOW)

    rgb, opacity, plateau, number = window(pictures), window(tone)[:, 0], window(smooth)[:, 0], window(label)[:, 0]
    own = (number == name[:, None, None]) & inside
    halo = _widen(own, HALO)
    halo &= inside & (own | (number == 0))

    # Colour, of what lies at least one pixel inside.
    core = (~_widen(~own, 1)).float()[:, None]
    weight = core.sum((2, 3)).clamp(min=1)
    mean = (rgb * core).sum((2, 3)) / weight
    palette = torch.tensor(list(PALETTE.values()))
    colour_error, colour = (mean[:, None] - palette).norm(dim=2).min(1)
    distance, nearest = torch.cdist(rgb.flatten(2).transpose(1, 2), palette.expand(len(rgb), -1, -1)).min(2)
    same = (nearest == colour[:, None]) & (distance <= COLOUR_PIXEL)
    colour_share = (same * core.flatten(1)).sum(1) / weight[:, 0]

    # Shape: opacity relative to the piece's own full tone, against each shape of the same area and centroid.
    peak = (plateau * own).amax((1, 2), keepdim=True)
    full = own & (opacity > 0.75 * peak)
    level = (opacity * full).sum((1, 2), keepdim=True) / full.sum((1, 2), keepdim=True).clamp(min=1)
    soft = _crisp(opacity / level.clamp(min=1e-6)) * halo
    mass, middle = _moments(soft[:, None])
    radius = (mass / torch.tensor(_AREA)).sqrt()
    centre = middle - radius[..., None] * torch.tensor(_CENTROID)[:, None] * torch.tensor([0.0, 1.0])
    template = _templates(radius, centre)
    # Clipping moves area and centroid a little, by the phase of the edges on the grid. It does the same to the template,
    # whose error tells what to correct.
    drawn_mass, drawn_middle = _moments(template)
    radius, centre = radius * (mass / drawn_mass).sqrt(), centre + middle - drawn_middle
    template = _templates(radius, centre)
    shared = torch.minimum(template, soft[:, None]).sum((2, 3))
    together = torch.maximum(template, soft[:, None]).sum((2, 3)) + (area - own.sum((1, 2)))[:, None]  # what no window holds counts too
    overlap = shared / together.clamp(min=1e-6)
    best = overlap.topk(2)
    shape = best.indices[:, 0]
    chosen = torch.arange(len(shape)), shape
    return {
        "colour": colour,
        "colour_error": colour_error,
        "colour_share": colour_share,
        "shape": shape,
        "shape_fit": best.values[:, 0],
        "shape_margin": best.values[:, 0] - best.values[:, 1],
        "radius": radius[chosen],
        "centre": centre[chosen] + corner,
    }


def _moments(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Area [M, S] and centroid [M, S, 2] of soft masks [M, S, 32, 32]."""
    axis = torch.arange(_WINDOW) + 0.5
    columns, rows = masks.sum(2), masks.sum(3)
    area = rows.sum(2).clamp(min=1e-6)
    return area, torch.stack((columns @ axis, rows @ axis), -1) / area[..., None]


def _templates(radius: Tensor, centre: Tensor) -> Tensor:
    """[M, 4, 32, 32]: each of SHAPES as the renderer draws it, for [M, 4] radii and [M, 4, 2] centres."""
    kinds = torch.arange(len(SHAPES)).expand_as(radius)
    drawn = coverage(kinds.flatten(), radius.flatten(), centre.flatten(0, 1), _WINDOW)
    return _crisp(drawn).view(-1, len(SHAPES), _WINDOW, _WINDOW)


# -------------------------------------------------------------------------------------------------------------- verdict


def _along(offset: Tensor, relation: Tensor) -> Tensor:
    """How far [..., 2] offsets (x, y) of the first object from another reach in the direction that `relation` names."""
    axis = torch.where(relation < 2, offset[..., 0], offset[..., 1])
    return torch.where(relation % 2 == 0, -axis, axis)


def _judge(found: Findings, captions: tuple[Caption, ...]) -> ShapesVerdict:
    n = len(captions)
    asked = torch.tensor([len(caption.things) for caption in captions], dtype=torch.long)
    wanted = torch.zeros(n, MAX_OBJECTS, 3, dtype=torch.long)  # colour, shape, size (-1: either)
    relation = torch.zeros(n, MAX_OBJECTS - 1, dtype=torch.long)
    for i, caption in enumerate(captions):
        for j, thing in enumerate(caption.things):
            size = -1 if thing.size is None else SIZES.index(thing.size)
            wanted[i, j] = torch.tensor([COLOURS.index(thing.colour), SHAPES.index(thing.shape), size])
        for j, word in enumerate(caption.relations):
            relation[i, j] = RELATIONS.index(word)

    # Every way to give pieces to the named objects. Among ways that fit the attributes equally well, one that also has
    # the relations right is taken, hence their small weight.
    ways = torch.tensor(list(permutations(range(_SLOTS), MAX_OBJECTS)))  # [W, 3]
    exists = torch.arange(MAX_OBJECTS) < asked[:, None]
    there = (ways < found.count[:, None, None]) & exists[:, None]  # [N, W, 3]
    is_colour = found.colour[:, ways] == wanted[:, None, :, 0]
    is_shape = found.shape[:, ways] == wanted[:, None, :, 1]
    is_size = (found.size[:, ways] == wanted[:, None, :, 2]) | (wanted[:, None, :, 2] < 0)
    centre = found.centre[:, ways]
    holds = _along(centre[:, :, :1] - centre[:, :, 1:], relation[:, None]) >= found.tolerance.relation_offset
    holds &= there[..., :1] & there[..., 1:]
    agreement = ((1 + is_colour + is_shape + 0.5 * is_size) * there).sum(2) + 0.1 * holds.sum(2)
    best = agreement.argmax(1)
    row = torch.arange(n)

    named = {  # [N, 3] of the objects that are asked for
        "colour": (is_colour & found.colour_ok[:, ways] & there)[row, best],
        "shape": (is_shape & found.shape_ok[:, ways] & there)[row, best],
        "size": (is_size & found.size_ok[:, ways] & there)[row, best],
    }
    related, objects = holds[row, best], (found.count == asked) & found.clean
    verdict = {
        "objects": objects,
        **{name: (true | ~exists).all(1) for name, true in named.items()},
        "relation": (related | ~exists[:, 1:]).all(1),
    }
    true = objects + sum((there & exists).sum(1) for there in named.values()) + (related & exists[:, 1:]).sum(1)
    return ShapesVerdict(
        **verdict,
        correct=torch.stack(list(verdict.values())).all(0),
        share=true / (1 + 3 * asked + (asked - 1)),
        asked=asked,
        assigned=torch.where(there[row, best], ways[best], -1),
        found=found,
        captions=captions,
    )
