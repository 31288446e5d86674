"""The differentiable stand-in for the shapes verifier: its comparison is exact, its reading is good, its gradients lead somewhere."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from hasten.accelerators.steering.verifiers import Verifier, as_verifier, checked_score, ranks
from hasten.pipelines.zoo.loading import load
from hasten.pipelines.zoo.shapes import find, proxy, verifier, verify, world
from hasten.pipelines.zoo.shapes.proxy import COUNTS, GRID, Reading, ShapesProxy, agreement, load_proxy, question_of, weights_folder

CELLS = GRID * GRID


@pytest.fixture(scope="module")
def shipped() -> ShapesProxy:
    return load_proxy()


def auc(scores: Tensor, right: Tensor) -> float:
    n = int(right.sum())
    return float((ranks(scores)[right].sum() - n * (n + 1) / 2) / (n * (len(right) - n)))


def changed(caption: world.Caption, rng: random.Random) -> world.Caption:
    """The caption with one attribute of one thing, or one relation, said otherwise."""
    while True:
        things, relations = list(caption.things), list(caption.relations)
        at = rng.randrange(len(things))
        what = rng.choice(("colour", "shape", "size", "relation"))
        if what == "relation" and relations:
            relations[rng.randrange(len(relations))] = rng.choice(world.RELATIONS)
        elif what != "relation":
            words = {"colour": world.COLOURS, "shape": world.SHAPES, "size": world.SIZES}[what]
            things[at] = replace(things[at], **{what: rng.choice(words)})
        distinct = len({(thing.colour, thing.shape) for thing in things}) == len(things)
        if distinct and (tuple(things), tuple(relations)) != (caption.things, caption.relations):
            return world.Caption(tuple(things), tuple(relations))


# -------------------------------------------------------------------------------------------------------- the comparison


def random_reading(n: int, seed: int) -> Reading:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Reading(
        presence=normal(n, CELLS) - 4,
        colour=normal(n, CELLS, 7).log_softmax(-1),
        shape=normal(n, CELLS, 5).log_softmax(-1),
        size=normal(n, CELLS, 3).log_softmax(-1),
        centre=64 * torch.rand(n, CELLS, 2, generator=generator, dtype=torch.float64),
        number=normal(n, COUNTS).log_softmax(-1),
        clean=normal(n),
    )


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_agreement_is_the_sum_over_all_ways_to_place_the_things(seed: int) -> None:
    captions = world.sample_scenes(3, torch.Generator().manual_seed(seed), held_out=None, placed=False).captions()
    reading = random_reading(3, seed)
    scores = agreement(reading, question_of(captions))
    axis = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
    for i, caption in enumerate(captions):
        here = []
        for thing in caption.things:
            size = reading.size[i].exp()
            sized = size[:, :2].sum(1) if thing.size is None else size[:, world.SIZES.index(thing.size)]
            colour, shape = world.COLOURS.index(thing.colour), world.SHAPES.index(thing.shape)
            here.append(reading.presence[i].sigmoid() * reading.colour[i, :, colour].exp() * reading.shape[i, :, shape].exp() * sized)
        joint = here[0].view(-1, 1, 1)
        for j, relation in enumerate(caption.relations):
            which, sign = axis[relation]
            place = reading.centre[i, :, which]
            holds = torch.sigmoid(sign * (place[None, :] - place[:, None]) - 4.0)  # [cell of thing 0, cell of the other]
            joint = joint * (here[j + 1] * holds).view(CELLS, *((CELLS, 1), (1, CELLS))[j])
        apart = ~torch.eye(CELLS, dtype=torch.bool)
        if len(caption.things) > 1:
            joint = joint * apart[:, :, None]
        if len(caption.things) > 2:
            joint = joint * apart[:, None] * apart[None]
        expected = joint.sum().clamp(max=1).log() + reading.number[i, len(caption.things)] + F.logsigmoid(reading.clean[i])
        assert math.isclose(scores[i], expected, rel_tol=1e-9)


def reading_of(pictures: Tensor) -> Reading:
    """What a network that never errs would read."""
    found, n = find(pictures), len(pictures)
    low = -20.0
    presence = torch.full((n, CELLS), low)
    colour, shape, size = (torch.full((n, CELLS, classes), low) for classes in (7, 5, 3))
    centre = torch.zeros(n, CELLS, 2)
    number = torch.full((n, COUNTS), low)
    for i in range(n):
        number[i, min(int(found.count[i]), COUNTS - 1)] = 0
        for slot in range(min(int(found.count[i]), 4)):
            x, y = (int(v) // (64 // GRID) for v in found.centre[i, slot])
            cell = y * GRID + x
            presence[i, cell] = 20.0
            centre[i, cell] = found.centre[i, slot]
            for table, index, ok in (
                (colour, found.colour, found.colour_ok),
                (shape, found.shape, found.shape_ok),
                (size, found.size, found.size_ok),
            ):
                table[i, cell, int(index[i, slot]) if ok[i, slot] else -1] = 0
    return Reading(presence, colour, shape, size, centre, number, torch.where(found.clean, 20.0, -20.0))


def test_with_a_perfect_reading_it_is_the_exact_verdict() -> None:
    scenes = world.sample_scenes(96, torch.Generator().manual_seed(3), held_out=None)
    pictures, captions, rng = world.render(scenes), scenes.captions(), random.Random(3)
    reading = reading_of(pictures)
    for asked in (captions, [changed(caption, rng) for caption in captions], captions[1:] + captions[:1]):
        verdict = verify(pictures, asked)
        scores = agreement(reading, question_of(asked))
        # Relations are soft: leave out those that hold or fail by less than two pixels.
        offset = scenes.centre[:, 1:] - scenes.centre[:, :1]
        close = ((offset.abs() - verifier.RELATION_OFFSET).abs() < 2).flatten(1).any(1)
        right = scores.exp() > 0.5
        assert torch.equal(right[~close], verdict.correct[~close])
        assert int((~close).sum()) > 50


def test_every_part_that_is_wrong_costs() -> None:
    scenes = world.scenes_of([world.parse("a small red circle left of a large blue square")], torch.Generator().manual_seed(0))
    reading = reading_of(world.render(scenes))
    asked = [
        "a small red circle left of a large blue square",
        "a small green circle left of a large blue square",
        "a small green cross left of a large blue square",
        "a large green cross left of a large blue square",
        "a large green cross right of a large blue square",
        "a large green cross right of a large blue square and above a cyan circle",
    ]
    scores = [float(agreement(reading, question_of([text]))[0]) for text in asked]
    assert scores[0] > -0.1
    assert all(later < before - 5 for before, later in pairwise(scores))


def test_questions_name_every_word() -> None:
    question = question_of(["a large cyan cross", "a purple triangle below a small yellow square and right of a red circle"])
    assert question.exists.tolist() == [[True, False, False], [True, True, True]]
    assert question.colour.tolist() == [[5, 0, 0], [4, 3, 0]]
    assert question.shape.tolist() == [[3, 0, 0], [2, 1, 0]]
    assert question.size.tolist() == [[1, 0, 0], [2, 0, 2]]
    assert question.relation.tolist() == [[0, 0], [3, 1]]
    assert [field.shape[0] for field in question_of([])] == [0] * 5


# ------------------------------------------------------------------------------------------------------------ what it sees


def test_it_sees_opacity_as_the_verifier_does() -> None:
    pictures = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    seen = proxy._seen(pictures)
    assert torch.allclose(seen[:, 3:4], verifier._tone(pictures), atol=2e-3)
    palette = torch.tensor([world.BACKGROUND, *world.PALETTE.values()])
    far = (pictures[:, None] - palette[:, :, None, None]).square().sum(2)
    assert torch.allclose(seen[:, 6:], torch.exp(-far / (2 * proxy.COLOUR_WIDTH**2)), atol=1e-5)


def test_half_precision_round_it_does_not_change_what_it_sees() -> None:
    pictures = world.render(world.sample_scenes(2, torch.Generator().manual_seed(0)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(proxy._seen(pictures), proxy._seen(pictures))
        inside = proxy._seen(pictures)
    assert torch.equal(inside, proxy._seen(pictures))


def test_other_sizes_are_resampled(shipped: ShapesProxy) -> None:
    scenes = world.sample_scenes(6, torch.Generator().manual_seed(1))
    pictures, prompts = world.render(scenes), [str(caption) for caption in scenes.captions()]
    scores = shipped.score(pictures, prompts)
    for factor in (2, 3):
        large = pictures.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        assert torch.allclose(shipped.score(large, prompts), scores, atol=1e-3)
    odd = F.interpolate(pictures, (100, 90), mode="bilinear")
    assert (shipped.score(odd, prompts).exp() > 0.5).float().mean() >= 0.5
    assert shipped.score(pictures[..., ::2, ::2], prompts).isfinite().all()


# ------------------------------------------------------------------------------------------------------- what it ships as


def test_it_is_a_verifier_that_passes_gradients(shipped: ShapesProxy) -> None:
    assert isinstance(shipped, Verifier) and as_verifier(shipped) is shipped and shipped.differentiable
    pictures = torch.cat([
        world.render(world.sample_scenes(3, torch.Generator().manual_seed(0))),
        torch.zeros(1, 3, 64, 64),
        torch.tensor(world.BACKGROUND).view(1, 3, 1, 1).expand(1, 3, 64, 64),
        torch.ones(1, 3, 64, 64),
    ]).requires_grad_()  # fmt: skip
    scores = checked_score(shipped, pictures, ["a small red circle left of a blue square"] * len(pictures))
    scores.sum().backward()
    assert pictures.grad is not None and pictures.grad.isfinite().all()
    assert (pictures.grad.flatten(1).abs().amax(1) > 0).all()
    assert not any(p.requires_grad or p.grad is not None for p in shipped.parameters())
    low, high = shipped.range_hint
    assert low <= scores[:3].amin() and scores.amax() <= high


def test_a_score_depends_on_its_own_picture_and_prompt_alone(shipped: ShapesProxy) -> None:
    scenes = world.sample_scenes(8, torch.Generator().manual_seed(4))
    pictures, prompts = world.render(scenes), [str(caption) for caption in scenes.captions()]
    together = shipped.score(pictures, prompts)
    alone = torch.cat([shipped.score(pictures[i : i + 1], prompts[i : i + 1]) for i in range(8)])
    assert torch.allclose(together, alone, atol=1e-4)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(shipped.score(pictures[order], [prompts[i] for i in order.tolist()]), together[order], atol=1e-4)


def test_what_it_cannot_judge_is_refused_in_one_line(shipped: ShapesProxy) -> None:
    picture = torch.rand(1, 3, 64, 64)
    for images, prompts, words in (
        (picture, ["a photo of a cat"], "not a caption of the shapes world: 'a photo of a cat'"),
        (picture, ["a red circle", "a blue square"], "1 images but 2 prompts"),
        (picture[0], ["a red circle"], r"images must have shape \[N, 3, H, W\]"),
        (picture[:, :1], ["a red circle"], r"images must have shape \[N, 3, H, W\]"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            shipped.score(images, prompts)
        assert "\n" not in str(caught.value)


def test_no_pictures_no_scores(shipped: ShapesProxy) -> None:
    assert shipped.score(torch.zeros(0, 3, 64, 64), []).shape == (0,)


def test_its_folder_is_small_and_in_bf16() -> None:
    folder = weights_folder()
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 2_000_000
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


# ---------------------------------------------------------------------------------------------------------- how good it is


def test_it_tells_true_captions_from_ones_with_one_attribute_changed(shipped: ShapesProxy) -> None:
    scenes = world.sample_scenes(128, torch.Generator().manual_seed(11), held_out=None)
    pictures, captions, rng = world.render(scenes).repeat(2, 1, 1, 1), scenes.captions(), random.Random(11)
    asked = [*captions, *(changed(caption, rng) for caption in captions)]
    scores = shipped.score(pictures, [str(caption) for caption in asked])
    assert auc(scores, verify(pictures, asked).correct) >= 0.99


def test_it_tells_right_from_wrong_among_what_the_model_draws_and_leads_to_right_ones(shipped: ShapesProxy) -> None:
    pipe = load("shapes")
    pipe.set_progress_bar_config(disable=True)
    captions = [str(c) for c in world.sample_scenes(80, torch.Generator().manual_seed(12), held_out=None, placed=False).captions()]
    noise = torch.randn(80, 4, 8, 8, generator=torch.Generator().manual_seed(12))
    options = {"num_inference_steps": 6, "guidance_scale": 2.0, "use_resolution_binning": False, "clean_caption": False}
    with torch.autocast("cpu", torch.bfloat16):
        latents = pipe(captions, latents=noise, max_sequence_length=20, output_type="latent", **options).images.float()

    def decoded(latents: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.float() / 2 + 0.5).clamp(0, 1)

    with torch.no_grad():
        pictures = decoded(latents)
        right = verify(pictures, captions).correct
        assert 10 <= int(right.sum()) <= 70
        assert auc(shipped.score(pictures, captions), right) >= 0.93

    wrong = (~right).nonzero()[:10, 0]
    asked = [captions[i] for i in wrong.tolist()]
    pipe.vae.requires_grad_(False)
    x = latents[wrong].requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.1)
    for _ in range(12):
        (x.grad,) = torch.autograd.grad(-shipped.score(decoded(x), asked).sum(), x)
        optimizer.step()
    with torch.no_grad():
        assert int(verify(decoded(x), asked).correct.sum()) >= 2
