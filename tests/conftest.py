"""What every test shares: no network, no display, no surprises from hypothesis, and a tiny pipeline to run."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports transformers, diffusers or matplotlib: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
from hypothesis import settings

# The machine's load decides how long an example takes, and a failure in CI must be found again at home.
settings.register_profile("hasten", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("hasten")


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unmodified PixArtAlphaPipeline with random weights, 64x64 pictures and 4 blocks of width 32, saved by diffusers.

    Of the classes and the shape of the `shapes` model, about 200 kB: for tests of the way to a picture, not of the picture.
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(0)
    words = ["a", "small", "large", "red", "blue", "circle", "square", "left", "right", "of", "above", "below", "and"]
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *(("▁" + word, -1.0) for word in words)], extra_ids=0)
    text_encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=False,
    )
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
        patch_size=1,
        interpolation_scale=1,
        use_additional_conditions=False,
    )
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", prediction_type="epsilon")
    pipe = PixArtAlphaPipeline(tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer.eval(), scheduler=scheduler)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_puzzles_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `puzzles` model of two layers of width 32 with random weights, saved with its code and tokenizer."""
    from tests.pipelines.tiny_puzzles import save

    folder = tmp_path_factory.mktemp("models") / "puzzles"
    save(folder)
    return folder
