"""The exact verifier: truth passes, slightly degraded truth passes, and every damage fails by the name of what it damages."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hasten.pipelines.zoo.shapes import (
    COLOURS,
    PALETTE,
    SHAPES,
    Scenes,
    ShapesVerdict,
    coverage,
    find,
    parse,
    place,
    render,
    sample_scenes,
    verify,
    world,
)

ATTRIBUTES = ("objects", "colour", "shape", "size", "relation")
BACKGROUND = torch.tensor(world.BACKGROUND).view(1, 3, 1, 1)
PAINT = torch.tensor([PALETTE[name] for name in COLOURS])
RADII = torch.tensor(world.RADIUS)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layers(scenes: Scenes) -> Tensor:
    """[B, 3, 64, 64]: the opacity of every object, for damages to work on."""
    alpha = coverage(scenes.shape.flatten(), RADII[scenes.size].flatten(), scenes.centre.flatten(0, 1)).view(-1, 3, 64, 64)
    return alpha * (torch.arange(3) < scenes.count[:, None])[..., None, None]


def compose(alpha: Tensor, paint: Tensor) -> Tensor:
    """Pictures of objects with opacities [B, 3, 64, 64] and colours [B, 3, 3]."""
    return BACKGROUND + (alpha[:, :, None] * (paint[..., None, None] - BACKGROUND[:, None])).sum(1)


def replaced_first(alpha: Tensor, first: Tensor) -> Tensor:
    return torch.cat((first[:, None], alpha[:, 1:]), 1)


def blur(pictures: Tensor, sigma: float) -> Tensor:
    kernel = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).repeat(3, 1, 1, 1)
    padded = torch.nn.functional.pad(pictures, (3, 3, 3, 3), mode="replicate")
    return torch.nn.functional.conv2d(torch.nn.functional.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def assert_fails(verdict: ShapesVerdict, *names: str, keeps: tuple[str, ...] = ()) -> None:
    """Every picture is judged wrong for at least the named attributes, and those in `keeps` are judged right in every picture."""
    assert len(verdict) > 0
    for name in (*names, "correct"):
        passed = getattr(verdict, name).nonzero().flatten().tolist()
        assert not passed, f"{len(passed)} of {len(verdict)} pass {name}; the first: {verdict.explain(passed[0])}"
    for name in keeps:
        failed = (~getattr(verdict, name)).nonzero().flatten().tolist()
        assert not failed, f"{len(failed)} of {len(verdict)} fail {name}; the first: {verdict.explain(failed[0])}"


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return sample_scenes(128, generator(20), held_out=None)


# --------------------------------------------------------------------------------------------------------------- truth


@pytest.mark.parametrize(("held_out", "n"), [(False, 1280), (True, 768)])
def test_rendered_truth_is_all_correct(held_out: bool, n: int) -> None:
    truth = sample_scenes(n, generator(21), held_out=held_out)
    verdict = verify(render(truth), truth.captions())
    assert verdict.rates() == dict.fromkeys((*ATTRIBUTES, "correct"), 1.0)
    # Not only the verdict but what was measured is exact: every object is there with its place and radius.
    for row in range(0, n, 16):
        for slot in range(int(truth.count[row])):
            piece = int(verdict.assigned[row, slot])
            assert (verdict.found.centre[row, piece] - truth.centre[row, slot]).abs().max() < 0.25
            assert abs(verdict.found.radius[row, piece] - RADII[truth.size[row, slot]]) < 0.25
            assert verdict.found.size[row, piece] == truth.size[row, slot]


@pytest.mark.parametrize("shift", [-0.04, 0.04, None], ids=["darker", "lighter", "tinted"])
def test_soft_noisy_and_slightly_miscoloured_truth_passes(shift: float | None) -> None:
    truth = sample_scenes(256, generator(22), held_out=None)
    random = generator(23)
    tint = torch.where(torch.rand(256, 3, 1, 1, generator=random) < 0.5, -0.04, 0.04) if shift is None else shift
    pictures = blur(render(truth), 0.5)
    pictures = (pictures + 0.02 * torch.randn(pictures.shape, generator=random) + tint).clamp(0, 1)
    assert verify(pictures, truth.captions()).rates()["correct"] >= 0.99


# -------------------------------------------------------------------------------------------------------------- damages


def test_an_extra_object_fails_objects_alone() -> None:
    for asked in (1, 2):
        crowded = sample_scenes(96, generator(24), held_out=None, counts=(0, 0, 1))
        captions = crowded._replace(count=torch.full((96,), asked)).captions()
        assert_fails(verify(render(crowded), captions), "objects", keeps=ATTRIBUTES[1:])


def test_a_missing_object_fails_objects_and_is_named() -> None:
    full = sample_scenes(128, generator(25), held_out=None, counts=(0, 0.5, 0.5))
    for gone in (0, 1):
        alpha = layers(full)
        alpha[:, gone] = 0
        verdict = verify(compose(alpha, PAINT[full.colour]), full.captions())
        assert_fails(verdict, "objects", "relation")
        assert all("missing: " in verdict.explain(i) for i in range(128))


SIDES = {"left": (1, 0), "right": (-1, 0), "top": (0, 1), "bottom": (0, -1)}
SIDES |= {f"{v}-{h}": (SIDES[h][0] * 0.5**0.5, SIDES[v][1] * 0.5**0.5) for v in ("top", "bottom") for h in ("left", "right")}


@pytest.mark.parametrize("side", SIDES)
def test_half_erased_shapes_fail_shape(scenes: Scenes, side: str) -> None:
    axis = torch.arange(64) + 0.5
    x, y = (axis - scenes.centre[:, 0, i, None] for i in (0, 1))
    kept = (x[:, None, :] * SIDES[side][0] + y[:, :, None] * SIDES[side][1] + 0.5).clamp(0, 1)
    alpha = layers(scenes)
    verdict = verify(compose(replaced_first(alpha, alpha[:, 0] * kept), PAINT[scenes.colour]), scenes.captions())
    assert_fails(verdict)
    # The top half of a triangle is a triangle, of a quarter of the area: its size is wrong, or it is too little to be an object.
    similar = (scenes.shape[:, 0] == SHAPES.index("triangle")) & (side == "bottom")
    assert not (verdict.shape & ~similar).any()
    assert not (verdict.objects & verdict.size & similar).any()


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_even_blends_of_two_shapes_fail_shape(scenes: Scenes, turn: int) -> None:
    alpha = layers(scenes)
    other = layers(scenes._replace(shape=(scenes.shape + turn) % len(SHAPES)))
    verdict = verify(compose(replaced_first(alpha, (alpha[:, 0] + other[:, 0]) / 2), PAINT[scenes.colour]), scenes.captions())
    assert_fails(verdict, "shape")


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_unions_of_two_shapes_fail_shape(scenes: Scenes, turn: int) -> None:
    alpha = layers(scenes)
    other = layers(scenes._replace(shape=(scenes.shape + turn) % len(SHAPES)))
    first = torch.maximum(alpha[:, 0], other[:, 0])
    verdict = verify(compose(replaced_first(alpha, first), PAINT[scenes.colour]), scenes.captions())
    # A circle all but holds the cross and a square the triangle of its size: what sticks out is a rim of at most a tenth of the
    # radius, which is one pixel or less. Such a union is the larger shape, to within the slack, and may pass as that.
    swallows = {("circle", "cross"), ("square", "triangle")}
    pairs = [(SHAPES[i], SHAPES[(i + turn) % len(SHAPES)]) for i in scenes.shape[:, 0].tolist()]
    may_pass = torch.tensor([pair in swallows for pair in pairs])
    assert not (verdict.shape & ~may_pass).any() and not (verdict.correct & ~may_pass).any()


def test_a_union_of_two_shapes_side_by_side_fails_shape() -> None:
    one = sample_scenes(128, generator(26), counts=(1, 0, 0))
    inward = (32 - one.centre[:, :1]).sign() * torch.tensor([6.0, 0.0])
    other = one._replace(centre=one.centre + inward, shape=one.shape.roll(1, 0))
    alpha = torch.maximum(layers(one), layers(other))
    assert_fails(verify(compose(alpha, PAINT[one.colour]), one.captions()), "shape")


@pytest.mark.parametrize("turn", [1, 2, 3, 4, 5])
def test_mixed_colours_fail_colour_alone(scenes: Scenes, turn: int) -> None:
    paint = PAINT[scenes.colour]
    paint[:, 0] = (paint[:, 0] + PAINT[(scenes.colour[:, 0] + turn) % len(COLOURS)]) / 2
    assert_fails(verify(compose(layers(scenes), paint), scenes.captions()), "colour", keeps=("objects", "shape", "size"))


@pytest.mark.parametrize("level", [0.0, 0.3, 0.5, 0.65])
def test_greys_fail_colour_alone(scenes: Scenes, level: float) -> None:
    paint = PAINT[scenes.colour]
    paint[:, 0] = level
    assert_fails(verify(compose(layers(scenes), paint), scenes.captions()), "colour", keeps=("objects", "shape", "size"))


def test_an_object_of_two_colours_fails_colour(scenes: Scenes) -> None:
    other = compose(layers(scenes), PAINT[(scenes.colour + 1) % len(COLOURS)])
    right = torch.arange(64) + 0.5 > scenes.centre[:, :1, :1, None]
    pictures = torch.where(right, other, render(scenes))
    assert_fails(verify(pictures, scenes.captions()), "colour")


def test_the_wrong_colour_fails_colour_alone(scenes: Scenes) -> None:
    wrong = scenes.colour.clone()
    wrong[:, 0] = (wrong[:, 0] + 1 + torch.arange(len(wrong)) % 5) % len(COLOURS)
    assert_fails(verify(render(scenes._replace(colour=wrong)), scenes.captions()), "colour", keeps=("objects", "shape", "size"))


def test_the_wrong_shape_fails_shape_alone(scenes: Scenes) -> None:
    wrong = scenes.shape.clone()
    wrong[:, 0] = (wrong[:, 0] + 1 + torch.arange(len(wrong)) % 3) % len(SHAPES)
    assert_fails(verify(render(scenes._replace(shape=wrong)), scenes.captions()), "shape", keeps=("objects", "colour", "size"))


def test_small_for_large_and_large_for_small_fail_size_alone() -> None:
    said = sample_scenes(256, generator(27), held_out=None)
    said = said._replace(size_said=torch.ones_like(said.size_said))
    large = Scenes(*(field[said.size[:, 0] == 1] for field in said))
    shrunk = large.size.clone()
    shrunk[:, 0] = 0
    keeps = ("objects", "colour", "shape", "relation")
    assert_fails(verify(render(large._replace(size=shrunk)), large.captions()), "size", keeps=keeps)
    small = Scenes(*(field[(said.size == 0).all(1)] for field in said))
    grown = small.size.clone()
    grown[:, 0] = 1
    assert_fails(verify(render(place(small._replace(size=grown), generator(28))), small.captions()), "size", keeps=keeps)


def test_a_size_between_the_two_fails_size_even_where_none_was_said(scenes: Scenes) -> None:
    unsaid = scenes._replace(size_said=torch.zeros_like(scenes.size_said))
    first = coverage(scenes.shape[:, 0], torch.full((len(scenes.count),), 9.0), scenes.centre[:, 0])
    large = scenes.size[:, 0] == 1  # there is room for it where there was for a large one
    pictures = compose(replaced_first(layers(scenes), first), PAINT[scenes.colour])[large]
    captions = [caption for caption, keep in zip(unsaid.captions(), large, strict=True) if keep]
    assert_fails(verify(pictures, captions), "size", keeps=("objects", "colour", "shape", "relation"))


def test_an_unsaid_size_may_be_either(scenes: Scenes) -> None:
    unsaid = scenes._replace(size_said=torch.zeros_like(scenes.size_said))
    assert bool(verify(render(scenes), unsaid.captions()).correct.all())


def test_swapped_places_fail_relation_alone() -> None:
    pairs = sample_scenes(128, generator(29), held_out=None, counts=(0, 0.5, 0.5))
    size = pairs.size.clone()
    size[:, 1] = size[:, 0] = 0  # of one size, so that each fits in the other's place
    pairs = place(pairs._replace(size=size), generator(30))
    swapped = pairs._replace(centre=pairs.centre[:, [1, 0, 2]])
    assert_fails(verify(render(swapped), pairs.captions()), "relation", keeps=("objects", "colour", "shape", "size"))


@pytest.mark.parametrize("opacity", [0.3, 0.2])
def test_a_ghost_fails_objects(opacity: float) -> None:
    crowded = sample_scenes(128, generator(31), held_out=None, counts=(0, 0, 1))
    alpha = layers(crowded)
    alpha[:, 2] *= opacity
    pictures = compose(alpha, PAINT[crowded.colour])
    assert_fails(verify(pictures, crowded._replace(count=torch.full((128,), 2)).captions()), "objects", keeps=ATTRIBUTES[1:])
    assert_fails(verify(pictures, crowded.captions()), "objects", "colour", "shape")


@pytest.mark.parametrize("opacity", [0.5, 0.7])
def test_a_pale_object_fails_colour(scenes: Scenes, opacity: float) -> None:
    alpha = layers(scenes)
    alpha[:, 0] *= opacity
    assert_fails(verify(compose(alpha, PAINT[scenes.colour]), scenes.captions()), "colour", keeps=("objects", "shape", "size"))


def test_debris_fails_objects_alone() -> None:
    crowded = sample_scenes(128, generator(32), held_out=None, counts=(0, 0, 1))
    alpha = layers(crowded)
    alpha[:, 2] = coverage(crowded.shape[:, 2], torch.full((128,), 2.5), crowded.centre[:, 2])
    captions = crowded._replace(count=torch.full((128,), 2)).captions()
    assert_fails(verify(compose(alpha, PAINT[crowded.colour]), captions), "objects", keeps=ATTRIBUTES[1:])


def _noise(seed: int, low: float, high: float) -> Callable[[int], Tensor]:
    return lambda n: low + (high - low) * torch.rand(n, 3, 64, 64, generator=generator(seed))


@pytest.mark.parametrize(
    "draw",
    [
        lambda n: BACKGROUND.expand(n, 3, 64, 64),
        lambda n: torch.zeros(n, 3, 64, 64),
        lambda n: torch.ones(n, 3, 64, 64),
        lambda n: torch.full((n, 3, 64, 64), float("nan")),
        lambda n: PAINT[0].view(1, 3, 1, 1).expand(n, 3, 64, 64),
        _noise(33, 0.0, 1.0),
        _noise(34, 0.4, 0.6),
        _noise(35, 0.7, 1.0),
        lambda n: blur(torch.rand(n, 3, 64, 64, generator=generator(36)), 2.0),
    ],
    ids=["blank", "black", "white", "nan", "red", "noise", "grey-noise", "pale-noise", "blotches"],
)
def test_pictures_of_nothing_fail_objects_shape_and_size(scenes: Scenes, draw: Callable[[int], Tensor]) -> None:
    assert_fails(verify(draw(64), scenes.captions()[:64]), "objects", "shape", "size")


def test_one_nan_spoils_its_picture_and_no_other(scenes: Scenes) -> None:
    pictures = render(scenes)[:4].clone()
    pictures[2, 0, 5, 5] = float("nan")
    assert verify(pictures, scenes.captions()[:4]).correct.tolist() == [True, True, False, True]


# ------------------------------------------------------------------------------------------------- inputs and the verdict


def test_all_kinds_of_images_are_judged_alike(scenes: Scenes) -> None:
    pictures, captions = render(scenes)[:8], scenes.captions()[:8]
    captions[3] = parse("a large red cross")
    bytes_ = (pictures * 255).round().byte()
    arrays = bytes_.movedim(1, -1).numpy()
    tensors, one_by_one = (pictures, pictures.double(), bytes_), (list(pictures), list(arrays), [Image.fromarray(a) for a in arrays])
    kinds = (*tensors, arrays, arrays / np.float32(255), *one_by_one)
    expected = verify(pictures, captions).correct
    assert expected.sum() == 7
    for images in kinds:
        assert torch.equal(verify(images, captions).correct, expected)
    assert torch.equal(verify(pictures, [str(caption) for caption in captions], batch=3).correct, expected)


def test_a_verdict_does_not_depend_on_its_batch(scenes: Scenes) -> None:
    pictures, captions = render(scenes)[:32], scenes.captions()[:32]
    whole, parts = verify(pictures, captions).found, [find(picture[None]) for picture in pictures]
    torch.testing.assert_close(whole.centre, torch.cat([part.centre for part in parts]))
    torch.testing.assert_close(whole.shape_fit, torch.cat([part.shape_fit for part in parts]))
    assert torch.equal(whole.count, torch.cat([part.count for part in parts]))


def test_unfit_input_is_refused_with_what_is_allowed(scenes: Scenes) -> None:
    picture, caption = render(scenes)[:1], scenes.captions()[:1]
    with pytest.raises(ValueError, match="1 images but 2 captions"):
        verify(picture, caption * 2)
    with pytest.raises(ValueError, match=r"shape \(1, 3, 32, 32\); the shapes world needs"):
        verify(picture[..., :32, :32], caption)
    with pytest.raises(ValueError, match=r"shape \(3, 64, 64\)"):
        verify(picture[0], caption)
    with pytest.raises(ValueError, match=r"shape \(1, 3, 64, 64\)"):
        verify(picture.numpy(), caption)
    with pytest.raises(ValueError, match=r"scale it to \[0, 1\]"):
        verify(picture * 2 - 1, caption)
    with pytest.raises(ValueError, match=r"dtype torch\.int64"):
        verify(picture.long(), caption)
    with pytest.raises(ValueError, match="give a list"):
        verify(Image.new("RGB", (64, 64)), caption)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a caption of the shapes world"):
        verify(picture, ["a nice picture"])
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        verify(picture, caption, batch=0)


def test_the_verdict_of_no_pictures() -> None:
    verdict = verify([], [])
    assert len(verdict) == 0 and all(rate != rate for rate in verdict.rates().values())


def test_the_verdict_reads_as_one_line_and_explains_itself() -> None:
    asked = parse("a small red circle left of a large blue square")
    shown = parse("a small green circle right of a large blue square and below a cyan cross")
    pictures = torch.cat([render(world.scenes_of([caption], generator(37))) for caption in (asked, shown)])
    verdict = verify(pictures, [asked, asked])
    assert verdict.correct.tolist() == [True, False] and verdict.found.count.tolist() == [2, 3] and verdict.asked.tolist() == [2, 2]
    assert str(verdict) == "50.0% of 2 pictures correct (objects 50.0%, colour 50.0%, shape 100.0%, size 100.0%, relation 50.0%)"
    right, wrong = verdict.explain(0), verdict.explain(-1)
    assert right.startswith(f"asked: {asked}\nfound: a large blue square at (") and right.endswith("verdict: correct")
    for words in ("2 asked for, 3 found", "colour: a small red circle is green", "is not left of a large blue square", "verdict: wrong"):
        assert words in wrong
    with pytest.raises(IndexError, match="picture 2 of 2"):
        verdict.explain(2)


def test_explanations_name_every_failing_attribute(scenes: Scenes) -> None:
    shown = render(scenes)[:48]
    pictures = torch.cat((shown.flip(3), blur(shown, 3.0), _noise(38, 0.0, 1.0)(48)))
    verdict = verify(pictures, scenes.captions()[:48] * 3)
    for i in range(len(verdict)):
        text = verdict.explain(i)
        assert text.endswith("verdict: correct" if verdict.correct[i] else "verdict: wrong")
        for name in ATTRIBUTES:
            if not getattr(verdict, name)[i]:
                assert f"\n{name}: " in text or "\nmissing: " in text
