"""The shipped models of the shapes world: each loads with diffusers alone, is small, and draws what captions say."""

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
assert type(pipe).__name__ == sys.argv[2]
own = {"PixArt": {"use_resolution_binning": False, "clean_caption": False}, "AuraFlow": {"height": 64, "width": 64}}
options = next((call for name, call in own.items() if name in sys.argv[2]), {})
image = pipe("a red circle", num_inference_steps=2, **options).images[0]
assert image.size == (64, 64)
assert not any(name.partition(".")[0] == "hasten" for name in sys.modules)
"""

CLASSES = {"shapes": "PixArtAlphaPipeline", "shapes-flow": "AuraFlowPipeline", "shapes-unet": "StableDiffusionPipeline"}
MEGABYTES = {"shapes": 12, "shapes-flow": 10, "shapes-unet": 10}
every_model = pytest.mark.parametrize("name", CLASSES)


def draw(name: str, captions: list[world.Caption], **options: object) -> Tensor:
    """Pictures of the captions, each with a noise of its own, under bf16 autocast (five times faster on a CPU)."""
    pipe = load(name)
    pipe.set_progress_bar_config(disable=True)
    own = {"use_resolution_binning": False, "clean_caption": False} if name == "shapes" else {}
    call = {**call_defaults(path_of(name)), **own, "output_type": "pt", **options}
    pictures = []
    for at in range(0, len(captions), 64):
        part = captions[at : at + 64]
        noise = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(at + i)) for i in range(len(part))])
        with torch.autocast("cpu", torch.bfloat16):
            pictures.append(pipe([str(caption) for caption in part], latents=noise, **call).images.float())
    return torch.cat(pictures)


@every_model
def test_it_loads_and_draws_with_diffusers_alone(name: str) -> None:
    subprocess.run([sys.executable, "-c", ALONE, str(path_of(name)), CLASSES[name]], check=True, timeout=300, cwd="/")


@every_model
def test_it_is_small_enough_to_ship(name: str) -> None:
    assert sum(file.stat().st_size for file in path_of(name).rglob("*") if file.is_file()) <= MEGABYTES[name] * 1_000_000


@every_model
def test_its_weights_are_stored_in_bf16(name: str) -> None:
    from safetensors import safe_open

    for path in path_of(name).rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = file.keys()
            assert {file.get_slice(tensor).get_dtype() for tensor in tensors} == {"BF16"}, path.name


@every_model
def test_its_card_tells_what_was_measured(name: str) -> None:
    folder = path_of(name)
    results = json.loads((folder / "results.json").read_text())
    card = (folder / "README.md").read_text()
    for captions in ("unseen", "held_out"):
        assert f"{100 * results[captions]['correct']:.1f}%" in card
    assert results["git"] in card
    assert (folder / "training_log.jsonl").stat().st_size > 0


@every_model
def test_it_draws_what_captions_say(name: str) -> None:
    captions = world.sample_scenes(32, torch.Generator().manual_seed(11), placed=False).captions()
    assert verify(draw(name, captions, num_inference_steps=25), captions).correct.sum() >= 26


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "held_out", "bar", "three"),
    [("shapes", False, 0.90, 0.75), ("shapes", True, 0.80, None), ("shapes-flow", False, 0.85, None), ("shapes-unet", False, 0.85, None)],
)
def test_accuracy_holds_on_captions_never_seen_in_training(name: str, held_out: bool, bar: float, three: float | None) -> None:
    captions = world.sample_scenes(2048, torch.Generator().manual_seed(6_000_000 + held_out), held_out=held_out, placed=False).captions()
    correct = verify(draw(name, captions), captions).correct.float()
    assert correct.mean() >= bar
    if three is not None:
        assert correct[torch.tensor([len(caption.things) == 3 for caption in captions])].mean() >= three
