"""The shipped `shapes` model: it loads with diffusers alone, is small, and draws what captions say."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from hasten.pipelines.zoo.loading import call_defaults, load, path_of
from hasten.pipelines.zoo.shapes import verify, world

ALONE = """
import sys
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True)
assert type(pipe).__name__ == "PixArtAlphaPipeline"
image = pipe("a red circle", num_inference_steps=2, use_resolution_binning=False, clean_caption=False).images[0]
assert image.size == (64, 64)
assert not any(name.partition(".")[0] == "hasten" for name in sys.modules)
"""


def draw(captions: list[world.Caption], **options: object) -> Tensor:
    """Pictures of the captions, each with a noise of its own, under bf16 autocast (five times faster on a CPU)."""
    pipe = load("shapes")
    pipe.set_progress_bar_config(disable=True)
    call = {**call_defaults(path_of("shapes")), "use_resolution_binning": False, "clean_caption": False, "output_type": "pt", **options}
    pictures = []
    for at in range(0, len(captions), 64):
        part = captions[at : at + 64]
        noise = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(at + i)) for i in range(len(part))])
        with torch.autocast("cpu", torch.bfloat16):
            pictures.append(pipe([str(caption) for caption in part], latents=noise, **call).images.float())
    return torch.cat(pictures)


def test_it_loads_and_draws_with_diffusers_alone() -> None:
    subprocess.run([sys.executable, "-c", ALONE, str(path_of("shapes"))], check=True, timeout=300, cwd="/")


def test_it_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in path_of("shapes").rglob("*") if file.is_file()) <= 12_000_000


def test_its_weights_are_stored_in_bf16() -> None:
    from safetensors import safe_open

    for path in path_of("shapes").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = file.keys()
            assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}, path.name


def test_its_card_tells_what_was_measured() -> None:
    folder = path_of("shapes")
    results = json.loads((folder / "results.json").read_text())
    card = (folder / "README.md").read_text()
    for name in ("unseen", "held_out"):
        assert f"{100 * results[name]['correct']:.1f}%" in card
    assert results["git"] in card
    assert (folder / "training_log.jsonl").stat().st_size > 0


def test_it_draws_what_captions_say() -> None:
    captions = world.sample_scenes(32, torch.Generator().manual_seed(11), placed=False).captions()
    assert verify(draw(captions, num_inference_steps=25), captions).correct.sum() >= 26


@pytest.mark.slow
@pytest.mark.parametrize(("held_out", "bar", "three"), [(False, 0.90, 0.75), (True, 0.80, None)])
def test_accuracy_holds_on_captions_never_seen_in_training(held_out: bool, bar: float, three: float | None) -> None:
    captions = world.sample_scenes(2048, torch.Generator().manual_seed(6_000_000 + held_out), held_out=held_out, placed=False).captions()
    correct = verify(draw(captions), captions).correct.float()
    assert correct.mean() >= bar
    if three is not None:
        assert correct[torch.tensor([len(caption.things) == 3 for caption in captions])].mean() >= three
