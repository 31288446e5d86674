"""The shapes world: captions mean what they say, scenes show what their captions mean, and training never sees what is held out."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.pipelines.zoo.shapes import world
from hasten.pipelines.zoo.shapes.world import (
    COLOURS,
    RADIUS,
    RELATIONS,
    SHAPES,
    SIZES,
    Caption,
    Scenes,
    Thing,
    parse,
    render,
    sample_scenes,
)

HELD_OUT_WORDS = [rf"\b{colour} {shape}\b" for colour, shape in world.HELD_OUT_PAIRS]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def training() -> Scenes:
    return sample_scenes(2048, generator(0))


things = st.builds(Thing, st.sampled_from(SHAPES), st.sampled_from(COLOURS), st.sampled_from((None, *SIZES)))


@st.composite
def captions(draw: st.DrawFn) -> Caption:
    named = draw(st.lists(things, min_size=1, max_size=3, unique_by=lambda thing: (thing.colour, thing.shape)))
    relations = draw(st.lists(st.sampled_from(RELATIONS), min_size=len(named) - 1, max_size=len(named) - 1))
    return Caption(tuple(named), tuple(relations))


# ------------------------------------------------------------------------------------------------------------- captions


@given(captions())
@settings(max_examples=200, deadline=None)
def test_captions_survive_being_spelt_and_parsed(caption: Caption) -> None:
    assert parse(str(caption)) == caption


def test_captions_of_scenes_survive_too(training: Scenes) -> None:
    for caption in training.captions():
        assert parse(str(caption)) == caption


def test_spelling_is_forgiving_about_case_spaces_articles_and_a_full_stop() -> None:
    expected = Caption((Thing("circle", "red", "small"), Thing("square", "blue")), ("left of",))
    assert parse("  An Small  red circle LEFT OF a blue square. ") == expected
    assert str(expected) == "a small red circle left of a blue square"
    three = "a cyan cross above a red circle and left of a blue square"
    assert str(parse(three)) == three


@pytest.mark.parametrize(
    "text",
    [
        "",
        "red circle",
        "a red",
        "a circle",
        "a pink circle",
        "a red hexagon",
        "a tiny red circle",
        "a red small circle",
        "a red circle near a blue square",
        "a red circle and left of a blue square",
        "a red circle and a blue square",
        "a red circle left of a blue square above a cyan cross",
        "a red circle left of a blue square and above a cyan cross and below a green cross",
    ],
)
def test_text_that_is_no_caption_is_refused_and_told_what_one_looks_like(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption of the shapes world") as error:
        parse(text)
    message = str(error.value)
    assert repr(text) in message and "\n" not in message
    assert all(word in message for word in (*COLOURS, *SHAPES, *SIZES, *RELATIONS))


@pytest.mark.parametrize(
    "text", ["a red circle left of a red circle", "a small red circle above a blue square and below a large red circle"]
)
def test_objects_that_cannot_be_told_apart_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="share colour and shape"):
        parse(text)


def test_things_and_captions_refuse_what_the_world_does_not_hold() -> None:
    circle, square = Thing("circle", "red"), Thing("square", "red")
    with pytest.raises(ValueError, match=r"shape must be one of circle, .* got 'star'"):
        Thing("star", "red")
    with pytest.raises(ValueError, match=r"colour must be one of red, .* got 'pink'"):
        Thing("circle", "pink")
    with pytest.raises(ValueError, match="size must be one of small, large, None, got 'huge'"):
        Thing("circle", "red", "huge")
    with pytest.raises(ValueError, match="got 0 things"):
        Caption(())
    with pytest.raises(ValueError, match="got 2 things and 0 relations"):
        Caption((circle, square))
    with pytest.raises(ValueError, match="got 'beside'"):
        Caption((circle, square), ("beside",))


# -------------------------------------------------------------------------------------------------------------- scenes


def test_training_scenes_hold_nothing_that_is_held_out(training: Scenes) -> None:
    triples = set(world.HELD_OUT_TRIPLES)
    for caption in training.captions():
        assert not caption.held_out
        assert not any(re.search(words, str(caption)) for words in HELD_OUT_WORDS)
        for relation, thing in zip(caption.relations, caption.things[1:], strict=True):
            assert (caption.things[0].shape, relation, thing.shape) not in triples


def test_training_scenes_hold_everything_else(training: Scenes) -> None:
    seen = training.captions()
    pairs = {(thing.colour, thing.shape) for caption in seen for thing in caption.things}
    triples = {(c.things[0].shape, rel, thing.shape) for c in seen for rel, thing in zip(c.relations, c.things[1:], strict=True)}
    assert len(pairs) == len(COLOURS) * len(SHAPES) - len(world.HELD_OUT_PAIRS)
    assert len(triples) == len(SHAPES) ** 2 * len(RELATIONS) - len(world.HELD_OUT_TRIPLES)
    assert {thing.size for caption in seen for thing in caption.things} == {None, *SIZES}


def test_held_out_scenes_are_all_held_out_and_show_every_combination() -> None:
    seen = sample_scenes(1024, generator(1), held_out=True).captions()
    assert all(caption.held_out for caption in seen)
    pairs = {(thing.colour, thing.shape) for caption in seen for thing in caption.things}
    triples = {(c.things[0].shape, rel, thing.shape) for c in seen for rel, thing in zip(c.relations, c.things[1:], strict=True)}
    assert pairs >= set(world.HELD_OUT_PAIRS) and triples >= set(world.HELD_OUT_TRIPLES)


def test_no_scene_holds_two_objects_that_share_colour_and_shape(training: Scenes) -> None:
    for caption in training.captions():
        assert len({(thing.colour, thing.shape) for thing in caption.things}) == len(caption.things)


def test_every_relation_is_true_and_names_the_larger_offset(training: Scenes) -> None:
    for caption, centres in zip(training.captions(), training.centre.tolist(), strict=True):
        for relation, (x, y) in zip(caption.relations, centres[1:], strict=False):
            dx, dy = centres[0][0] - x, centres[0][1] - y
            along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
            assert along == max(abs(dx), abs(dy)) > 2 * RADIUS[0]


def test_drawn_objects_are_whole_and_apart() -> None:
    scenes = sample_scenes(512, generator(2), held_out=None)
    radius = torch.tensor(RADIUS)[scenes.size]
    alpha = world.coverage(scenes.shape.flatten(), radius.flatten(), scenes.centre.flatten(0, 1)).view(512, 3, 64, 64)
    alpha = alpha * (torch.arange(3) < scenes.count[:, None])[..., None, None]
    edge = torch.ones(64, 64, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    assert alpha[..., edge].max() == 0
    wide = torch.nn.functional.max_pool2d(alpha, 3, 1, 1)
    assert ((wide > 0).sum(1) <= 1).all(), "two objects touch"
    # Each object fills its nominal area, and the picture is its paint over the plain background.
    expected = torch.tensor([3.1416, 3.24, 2.0, 2.3616])[scenes.shape] * radius**2
    exists = torch.arange(3) < scenes.count[:, None]
    torch.testing.assert_close(alpha.sum((2, 3))[exists], expected[exists], rtol=0.01, atol=0.5)
    pictures = render(scenes)
    assert pictures.shape == (512, 3, 64, 64) and pictures.min() >= 0 and pictures.max() <= 1
    plain = alpha.sum(1) == 0
    assert torch.equal(pictures.movedim(1, -1)[plain], torch.tensor(world.BACKGROUND).expand(int(plain.sum()), 3))
    paint = torch.tensor([world.PALETTE[name] for name in COLOURS])
    for slot in range(3):
        row, y, x = (alpha[:, slot] == 1).nonzero(as_tuple=True)
        torch.testing.assert_close(pictures[row, :, y, x], paint[scenes.colour[row, slot]])


def test_scenes_depend_on_the_seed_alone() -> None:
    first, again, other = (sample_scenes(64, generator(seed), held_out=None) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(render(first), render(again))
    assert not torch.equal(first.centre, other.centre)


def test_counts_follow_the_given_probabilities() -> None:
    assert set(sample_scenes(64, generator(5), counts=(0, 0, 1)).count.tolist()) == {3}
    share = sample_scenes(2048, generator(6)).count.bincount()[1:] / 2048
    torch.testing.assert_close(share, torch.tensor([0.2, 0.35, 0.45]), rtol=0, atol=0.04)


def test_scenes_of_captions_show_those_captions_in_many_places_and_sizes() -> None:
    caption = parse("a red circle left of a large blue square")
    scenes = world.scenes_of([caption] * 64, generator(7))
    assert set(map(str, scenes.captions())) == {str(caption)}
    assert set(scenes.size[:, 0].tolist()) == {0, 1} and set(scenes.size[:, 1].tolist()) == {1}
    assert len(scenes.centre[:, 0, 0].unique()) == 64


def test_scenes_of_any_drawn_caption_can_be_made() -> None:
    captions = sample_scenes(1024, generator(8), held_out=None).captions()
    assert world.scenes_of(captions, generator(9)).captions() == captions


def test_a_row_with_no_room_is_refused_but_unsaid_sizes_are_chosen_to_fit() -> None:
    scenes = world.scenes_of([parse("a red circle left of a blue square and right of a large cyan cross")] * 32, generator(10))
    assert (scenes.size.sum(1) == 1).all()
    with pytest.raises(ValueError, match="at most one of them is large"):
        world.scenes_of([parse("a red circle left of a large blue square and right of a large cyan cross")], generator(11))
