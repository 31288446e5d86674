"""`distill` on a tiny pipeline: an interrupted run goes on to the same weights, the pipeline stays, and errors say what differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor

from hasten.accelerators.distillation.adapters import LoRA
from hasten.accelerators.distillation.lcm import LCM
from hasten.accelerators.distillation.trajectory import TrajectoryConsistency
from hasten.pipelines import distillation_data, distilling, training
from hasten.pipelines.distillation_data import columns, examples_of, folder, grid_of
from hasten.pipelines.distilling import distill
from hasten.pipelines.step_lora import WEIGHTS_FILE, StepLoRA, few_steps
from hasten.pipelines.training import Settings
from hasten.pipelines.zoo.loading import call_defaults, load, path_of

PROMPTS = ["a small red circle", "a large blue square", "a red square left of a blue circle"]
CALL = {"use_resolution_binning": False, "max_sequence_length": 16, "clean_caption": False}
METHOD = TrajectoryConsistency((2, 1), guidance=(2.0, 4.0))
QUICK: dict[str, Any] = {
    "lora": LoRA(2), "call": CALL, "batch_size": 2, "grid_steps": 4, "teacher_steps": 2, "learning_rate": 1e-2, "warmup": 2,
    "progress": False,
}  # fmt: skip


@pytest.fixture
def pipe(tiny_pipeline_folder: Path) -> Any:
    made = DiffusionPipeline.from_pretrained(tiny_pipeline_folder, dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


def picture(pipe: Any, **call: Any) -> Tensor:
    arguments = {**CALL, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt", **call}
    made: Tensor = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), **arguments).images
    return made


class Interrupted(Exception):
    pass


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("method", [METHOD, LCM(ema=0.9)], ids=["own target", "averaged target"])
def test_an_interrupted_run_goes_on_to_the_same_weights(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any) -> None:
    run = {**QUICK, "steps": 6, "checkpoint_every": 2}
    whole = distill(pipe, PROMPTS, method, output=tmp_path / "whole", **run)

    def stopping(total: int, done: int, shown: bool) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def bar() -> Iterator[Any]:
            steps = iter(range(done, 3))

            def advance(note: str) -> None:
                if next(steps, None) == 2:
                    raise Interrupted  # after the third step, of which no checkpoint is kept

            yield advance

        return bar()

    with monkeypatch.context() as patch:
        patch.setattr(training, "progress_bar", stopping)
        with pytest.raises(Interrupted):
            distill(pipe, PROMPTS, method, output=tmp_path / "parts", **run)
    assert torch.load(tmp_path / "parts" / "checkpoint.pt")["step"] == 2
    torch.manual_seed(123)  # whatever happened meanwhile
    monkeypatch.delattr(distillation_data, "drawn")  # the teacher's samples are there
    parts = distill(pipe, PROMPTS, method, output=tmp_path / "parts", **run)
    assert whole.factors.keys() == parts.factors.keys()
    assert all(torch.equal(parts.factors[name], factor) for name, factor in whole.factors.items())
    assert any(float(factor.abs().max()) > 0 for name, factor in whole.factors.items() if "lora_B" in name)
    left = {file.name for file in (tmp_path / "whole").iterdir()}
    assert left == {"checkpoint.pt", "log.jsonl", "samples.npz", WEIGHTS_FILE}


def test_the_pipeline_is_left_as_it_was(pipe: Any, tmp_path: Path) -> None:
    before, scheduler = picture(pipe), pipe.scheduler
    names = [name for name, _ in pipe.transformer.named_modules()]
    pipe.transformer.train()
    distill(pipe, PROMPTS, METHOD, steps=1, output=tmp_path, sample_prompts=PROMPTS[:2], sample_every=1, **QUICK)
    assert pipe.transformer.training and pipe.scheduler is scheduler
    assert all(parameter.requires_grad for parameter in pipe.transformer.parameters())
    assert [name for name, _ in pipe.transformer.named_modules()] == names
    assert torch.equal(picture(pipe), before)
    sheet = Image.open(tmp_path / "samples-000001.png")
    assert sheet.size == (2 * 64, 2 * 64)  # two prompts, in one step and in two


def test_multiplied_into_the_weights_it_learns_the_same(pipe: Any, tmp_path: Path) -> None:
    run = {**QUICK, "steps": 2}
    applied = distill(pipe, PROMPTS, METHOD, output=tmp_path / "applied", **run)
    merged = distill(pipe, PROMPTS, METHOD, output=tmp_path / "merged", **{**run, "lora": LoRA(2, merged=True)})
    for name, factor in applied.factors.items():
        torch.testing.assert_close(merged.factors[name], factor, rtol=1e-2, atol=1e-4)


def test_half_precision_is_that_of_the_run_alone(pipe: Any, tmp_path: Path) -> None:
    half = distill(pipe, PROMPTS, METHOD, steps=2, output=tmp_path / "half", mixed_precision="bf16", **QUICK)
    full = distill(pipe, PROMPTS, METHOD, steps=2, output=tmp_path / "full", **QUICK)
    assert {factor.dtype for factor in half.factors.values()} == {torch.float32}
    assert not all(torch.equal(half.factors[name], factor) for name, factor in full.factors.items())
    for name, factor in full.factors.items():
        if "lora_A" in name:
            torch.testing.assert_close(half.factors[name], factor, rtol=0, atol=0.04)


def test_another_seed_gives_another_student(pipe: Any, tmp_path: Path) -> None:
    one, other = (distill(pipe, PROMPTS, METHOD, steps=1, seed=seed, output=tmp_path / str(seed), **QUICK) for seed in (0, 1))
    assert not all(torch.equal(one.factors[name], other.factors[name]) for name in one.factors)


def test_a_checkpoint_of_other_data_is_refused(pipe: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    save_picture(data / "one.png")
    (data / "one.txt").write_text(PROMPTS[0])
    distill(pipe, data, METHOD, steps=1, output=tmp_path / "run", **QUICK)
    save_picture(data / "one.png", seed=1)
    with pytest.raises(ValueError, match="is of a run on other data"):
        distill(pipe, data, METHOD, steps=1, output=tmp_path / "run", **QUICK)


def test_a_checkpoint_of_other_settings_is_refused(pipe: Any, tmp_path: Path) -> None:
    distill(pipe, PROMPTS, METHOD, steps=1, output=tmp_path, **QUICK)
    with pytest.raises(ValueError, match=r"other settings: steps was 1 and is 2; learning_rate was 0.01 and is 0.5\. Name another"):
        distill(pipe, PROMPTS, METHOD, steps=2, output=tmp_path, **{**QUICK, "learning_rate": 0.5})
    with pytest.raises(ValueError, match=r"method.guidance was \(2.0, 4.0\) and is \(2.0, 5.0\)"):
        distill(pipe, PROMPTS, TrajectoryConsistency((2, 1), guidance=(2.0, 5.0)), steps=1, output=tmp_path, **QUICK)
    with pytest.raises(ValueError, match="resume=True goes on from it"):
        distill(pipe, PROMPTS, METHOD, steps=1, output=tmp_path, resume=False, **QUICK)
    with torch.no_grad():
        pipe.transformer.proj_out.weight.add_(1)
    with pytest.raises(ValueError, match="base weights was"):
        distill(pipe, PROMPTS, METHOD, steps=1, output=tmp_path, **QUICK)


TWO_PROCESSES = """
import sys
import torch
from diffusers import DiffusionPipeline
from tests.pipelines.test_distilling import METHOD, PROMPTS, QUICK, distill

torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
distill(pipe, PROMPTS, METHOD, steps=2, output=sys.argv[2], **QUICK)
"""


@pytest.mark.slow
def test_two_processes_take_batches_of_their_own_and_share_gradients(
    pipe: Any, tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `accelerate launch` makes is what one process makes of the mean of both losses."""
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--mixed_precision=no"]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    command = [*launch, str(script), str(tiny_pipeline_folder), str(tmp_path / "two")]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)
    assert torch.load(tmp_path / "two" / "checkpoint.pt")["about"]["processes"] == "2"
    both = StepLoRA.load(tmp_path / "two")

    stream, task = training.stream, distilling.Distillation._task
    loss = TrajectoryConsistency.loss

    def mean(self: Any, both: Any, segments: int) -> Tensor:
        return (loss(self, both[0], segments) + loss(self, both[1], segments)) / 2

    def tasks(self: Any, step: int, part: int, adapters: Any) -> Any:
        made = []
        for process in (0, 1):
            with monkeypatch.context() as patch:
                patch.setattr(
                    training, "stream", lambda seed, step, _, device, part, process=process: stream(seed, step, process, device, part)
                )
                made.append(task(self, step, part, adapters))
        return made

    monkeypatch.setattr(distilling.Distillation, "_task", tasks)
    monkeypatch.setattr(TrajectoryConsistency, "loss", mean)
    one = distill(pipe, PROMPTS, METHOD, steps=2, output=tmp_path / "one", **QUICK)
    for name, factor in one.factors.items():
        torch.testing.assert_close(both.factors[name], factor, rtol=1e-3, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- what it makes


@pytest.fixture
def lora(pipe: Any, tmp_path: Path) -> StepLoRA:
    return distill(pipe, PROMPTS, METHOD, steps=2, output=tmp_path / "run", **QUICK)


def test_what_was_saved_is_what_was_trained_and_is_applied_for_a_block_alone(pipe: Any, lora: StepLoRA, tmp_path: Path) -> None:
    loaded = StepLoRA.load(tmp_path / "run")
    assert loaded.facts == json.loads(json.dumps(lora.facts)) and loaded.steps == (1, 2) and loaded.guidance == (2.0, 4.0)
    assert all(torch.equal(loaded.factors[name], factor) for name, factor in lora.factors.items())
    before, scheduler = picture(pipe), pipe.scheduler
    with loaded.applied(pipe, 2) as call:
        assert call == {"num_inference_steps": 2, "guidance_scale": 1.0}
        few = picture(pipe, **call)
        assert pipe.scheduler.timesteps.tolist() == loaded.timesteps(2)
    assert not torch.allclose(few, before)
    assert pipe.scheduler is scheduler and torch.equal(picture(pipe), before)
    with pytest.raises(Interrupted), loaded.applied(pipe, 1):
        raise Interrupted
    assert pipe.scheduler is scheduler and torch.equal(picture(pipe), before)


def test_the_file_is_in_the_format_of_diffusers(pipe: Any, lora: StepLoRA, tmp_path: Path) -> None:
    """Diffusers' own loader, where a class has one, makes the same student of the file."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from diffusers.loaders import SD3LoraLoaderMixin

    assert not hasattr(pipe, "load_lora_weights")  # why there is a loader of ours
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
        caption_projection_dim=32, pooled_projection_dim=12, out_channels=4, pos_embed_max_size=8,
    ).eval()  # fmt: skip
    from hasten.accelerators.distillation.adapters import Adapters, layers_of

    given = {
        "hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 12), "timestep": torch.tensor([900.0, 900.0]), "return_dict": False,
    }  # fmt: skip
    adapters = Adapters(network, layers_of(network), 3)
    with torch.no_grad():
        for factor in adapters.factors.values():
            factor.add_(0.1 * torch.randn_like(factor))
        expected = network(**given)[0]
        state = adapters.state()
        adapters.remove()
        StepLoRA("transformer", state, {**lora.facts, "rank": 3}).save(tmp_path / "sd3")
        read = StableDiffusion3Pipeline.lora_state_dict(tmp_path / "sd3")
        SD3LoraLoaderMixin.load_lora_into_transformer(read, network)
        torch.testing.assert_close(network(**given)[0], expected)


@pytest.mark.parametrize("name", ["shapes-flow", "shapes-unet"])
def test_other_families_are_distilled_and_load_the_file_themselves(name: str, tmp_path: Path) -> None:
    """A flow with dual- and single-stream blocks, and a UNet: both pipelines have diffusers' own loader."""
    pipe: Any = load(name)
    pipe.set_progress_bar_config(disable=True)
    call = call_defaults(path_of(name))
    call.pop("num_inference_steps")
    guidance = call.pop("guidance_scale")
    run = {**QUICK, "call": call, "learning_rate": 0.05}
    lora = distill(pipe, PROMPTS[:2], TrajectoryConsistency((1,), guidance=(guidance, guidance)), steps=2, output=tmp_path, **run)

    def draw(**few: Any) -> Tensor:
        made: Tensor = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="latent", **{**call, **few}).images
        return made

    before = draw(num_inference_steps=1, guidance_scale=1.0)
    with lora.applied(pipe, 1, gamma=0.0) as few:
        expected = draw(**few)
    assert lora.gamma(1) == 1.0 and lora.steps == (1,)
    first = lora.timesteps(1)[0]
    twice = replace(lora, facts={**lora.facts, "steps": {"2": {"timesteps": [first, first / 2], "gamma": 1.0}}})
    with twice.applied(pipe, 2) as more:
        assert torch.equal(draw(**more), draw(**more))  # the noise of all steps is that of the call's generator
    assert "prepare_latents" not in vars(pipe)
    pipe.scheduler = lora.scheduler(pipe, 1, gamma=0.0)
    bare = draw(**few)
    assert not torch.allclose(bare, expected, rtol=1e-3, atol=1e-3)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(draw(**few), expected, rtol=1e-4, atol=1e-4)
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(**few), bare)
    assert before.shape == expected.shape


def test_a_lora_of_another_base_is_refused(pipe: Any, lora: StepLoRA) -> None:
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].attn1.to_q.weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"for another base: the PixArtTransformer2DModel has weights \w+, not \w+"), lora.applied(pipe, 1):
        pass
    with lora.applied(pipe, 1, allow_mismatch=True):
        pass
    other = StepLoRA("transformer", lora.factors, {**lora.facts, "config": "0" * 16})
    with pytest.raises(ValueError, match="of config 0000000000000000, not"), other.applied(pipe, 1):
        pass
    other = StepLoRA("transformer", lora.factors, {**lora.facts, "base": "FluxTransformer2DModel"})
    with pytest.raises(ValueError, match="a FluxTransformer2DModel, not this PixArtTransformer2DModel"), other.applied(pipe, 1):
        pass
    with pytest.raises(ValueError, match="a pipeline's unet, and PixArtAlphaPipeline has none"):
        StepLoRA("unet", lora.factors, lora.facts).check(pipe)


def test_guidance_and_steps_that_were_not_trained_are_refused(pipe: Any, lora: StepLoRA) -> None:
    assert lora.call(pipe, 1, guidance_scale=3.0) == {"num_inference_steps": 1, "guidance_scale": 1.0}
    with pytest.raises(ValueError, match="guidance_scale 5 is above what the student was trained for, 2 to 4"):
        lora.call(pipe, 1, guidance_scale=5.0)
    with pytest.raises(ValueError, match="guidance_scale 1 is below"):
        lora.call(pipe, 1, guidance_scale=1.0)
    with pytest.raises(ValueError, match="steps must be one of 1, 2, which the LoRA was trained for, not 4"):
        lora.scheduler(pipe, 4)


def test_what_is_no_step_lora_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="no step LoRA at"):
        StepLoRA.load(tmp_path)
    save_file({"transformer.x.lora_A.weight": torch.zeros(1)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="is no step LoRA saved by hasten"):
        StepLoRA.load(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00garbage")
    with pytest.raises(ValueError, match="is no step LoRA"):
        StepLoRA.load(tmp_path / WEIGHTS_FILE)


# ----------------------------------------------------------------------------------------------------------------- data


def save_picture(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_pictures_of_a_folder_become_the_latents_of_the_pipeline(pipe: Any, tmp_path: Path) -> None:
    save_picture(tmp_path / "one.png")
    save_picture(tmp_path / "two.png", (96, 64), seed=1)  # wider: its middle is taken
    (tmp_path / "one.txt").write_text(PROMPTS[0] + "\n")
    (tmp_path / "two.txt").write_text(PROMPTS[1])
    found = examples_of(pipe, "transformer", pipe.transformer, tmp_path, CALL, (1.0, 1.0), 2, 0)
    assert found.empty is None and found.caption.tolist() == [0, 1]
    pixels = torch.from_numpy(np.asarray(Image.open(tmp_path / "one.png"), dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    torch.testing.assert_close(found.latents[:1], expected)
    middle = Image.open(tmp_path / "two.png").crop((16, 0, 80, 64))
    middle.save(tmp_path / "middle.png")
    from hasten.pipelines.distillation_data import latents_of

    torch.testing.assert_close(found.latents[1:], latents_of(pipe, tmp_path / "middle.png", found.layout))


def test_what_the_denoiser_is_told_is_what_the_pipeline_tells_it(pipe: Any) -> None:
    captions = [f"a {size} {colour} {shape}" for size in ("small", "large") for colour in ("red", "blue") for shape in ("circle", "square")]
    found = examples_of(pipe, "transformer", pipe.transformer, captions, CALL, (2.0, 3.0), 1, 0)
    said: list[dict[str, Any]] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: said.append({**kwargs}), with_kwargs=True)
    pipe([captions[7], captions[2]], guidance_scale=2.0, num_inference_steps=1, **CALL)
    handle.remove()
    index = torch.tensor([7, 2])
    told = found.encoded.rows(index, torch.device("cpu"))
    assert found.empty is not None
    untold = found.empty.rows(torch.zeros_like(index), torch.device("cpu"))
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        torch.testing.assert_close(torch.cat([untold[name], told[name]]), said[0][name])
    assert found.layout.shape == (4, 8, 8) and found.layout.scale == 1


def test_captions_and_pictures_must_come_together(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no pictures with captions"):
        folder(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        folder(tmp_path / "nowhere")
    (tmp_path / "one.txt").write_text(PROMPTS[0])
    with pytest.raises(ValueError, match=r"1 captions have no picture, one.txt the first"):
        folder(tmp_path)
    save_picture(tmp_path / "one.png")
    save_picture(tmp_path / "two.jpg")
    with pytest.raises(ValueError, match=r"1 pictures have no caption, two.jpg the first"):
        folder(tmp_path)
    lines = [{"file_name": name, "text": PROMPTS[0]} for name in ("one.png", "three.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"1 captions have no picture, three.png the first"):
        folder(tmp_path)
    with pytest.raises(ValueError, match="data has no prompts"):
        distill(pipe, [], METHOD, steps=1, output=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_columns_of_a_dataset() -> None:
    rows = [{"image": Image.new("RGB", (8, 8)), "text": "one"}, {"image": None, "text": "two"}]
    assert columns(rows[:1])[1] == ["one"]
    with pytest.raises(ValueError, match="entry 1 of the data has no 'image', only image, text"):
        columns(rows)
    with pytest.raises(ValueError, match="entry 0 of the data has no 'image', only int"):
        columns([3])
    with pytest.raises(ValueError, match="data is empty"):
        columns(iter(()))


# ------------------------------------------------------------------------------------------------------------- the grid


def test_the_grid_is_on_the_pipeline_s_schedule_and_few_steps_are_nodes_of_it(pipe: Any) -> None:
    grid = grid_of(pipe, 8, 649, None)
    assert grid.prediction_type == "epsilon" and few_steps(grid, 1) == [649.0]
    torch.testing.assert_close(grid.alpha[8].square().float(), pipe.scheduler.alphas_cumprod[649])
    assert few_steps(grid, 4) == [float(grid.timesteps[node]) for node in (8, 6, 4, 2)]
    with pytest.raises(ValueError, match="steps must be from 1 to the grid's, 8"):
        few_steps(grid, 9)
    with pytest.raises(ValueError, match="shift belongs to flows"):
        grid_of(pipe, 8, None, 3.0)

    class Flowing:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    flow = grid_of(Flowing(), 4, None, None)
    torch.testing.assert_close(flow.sigma, torch.tensor([0.0, 0.5, 0.75, 0.9, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="must be None for FlowMatchEulerDiscreteScheduler"):
        grid_of(Flowing(), 4, 700, None)
    Flowing.scheduler = type(Flowing.scheduler)(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="shift must be given"):
        grid_of(Flowing(), 4, None, None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    assert grid_of(pipe, 4, None, None).prediction_type == "v_prediction"


def test_the_rate_rises_stays_and_falls_and_stages_are_even() -> None:
    settings = Settings(steps=100, learning_rate=1.0, warmup=10, falling=0.5)
    assert [settings.rate(step) for step in (0, 9, 50)] == [0.1, 1.0, 1.0] and settings.rate(99) == pytest.approx(0.02)
    assert [settings.stage(step, 4) for step in (0, 24, 25, 99)] == [0, 0, 1, 3]
    for wrong, message in (
        ({"falling": 2.0}, "falling"),
        ({"mixed_precision": "tf32"}, "mixed_precision"),
        ({"learning_rate": 0.0}, "above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(steps=1, **wrong)
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        Settings(steps=0)
