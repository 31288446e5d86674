"""The puzzles model as it is built, and as it is loaded: a tokenizer of characters, a block-causal Qwen3, an unmodified pipeline."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hasten.pipelines.zoo.puzzles.modeling_puzzles import PuzzlesConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK_LENGTH, GEN_LENGTH = 16, 32
"""Positions of a block, and positions to generate: the longest answer with its end takes 20."""

CHARACTERS = "0123456789?+=/:()dehpt"

WEIGHTS = "weights/puzzles"


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; white space is dropped, and every prompt is closed by <sep>, where the answer begins.

    Padding goes to the left, since the answer is written behind the prompt. The mask token is the last of the vocabulary.
    """
    names = ["<pad>", "<eos>", "<unk>", "<sep>", *CHARACTERS, "<mask>"]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s"), ""), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <sep>", special_tokens=[("<sep>", vocabulary["<sep>"])])
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        sep_token="<sep>",
        mask_token="<mask>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        # A block-causal model wants positions and a mask only.
        model_input_names=["input_ids", "attention_mask"],
    )


def new_config(tokenizer: PreTrainedTokenizerFast, *, width: int = 128, layers: int = 8, heads: int = 4, inner: int = 384) -> PuzzlesConfig:
    """The configuration of the model that ships; the arguments make it smaller for tests."""
    return PuzzlesConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000.0},
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        block_length=BLOCK_LENGTH,
    )


def weights_folder() -> Path:
    """Where the shipped model lies.

    Raises:
        FileNotFoundError: It is not installed.
    """
    folder = Path(str(files("hasten.pipelines.zoo"))) / WEIGHTS
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the weights of 'puzzles' are missing ({folder}): reinstall hasten, or train them with recipes/puzzles.py")
    return folder


def load_puzzles(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", folder: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The trained model and its tokenizer, as plain transformers loads them.

    Args:
        dtype: Of the weights; the files hold bfloat16.
        device: Of the weights.
        folder: A folder that `recipes/puzzles.py` exported; the one that ships by default.

    Raises:
        FileNotFoundError: The weights are not installed.
    """
    folder = folder or weights_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, local_files_only=True, dtype=dtype)
    # It reads the configuration, whose class is remote code; without trust it would ask at the terminal.
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)


def load_pipeline(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", folder: Path | None = None) -> LLaDA2Pipeline:
    """The trained model in diffusers' own pipeline. Arguments and errors are those of `load_puzzles`.

        pipe = load_pipeline()
        pipe("3? + ? = 91", gen_length=GEN_LENGTH, num_inference_steps=BLOCK_LENGTH, threshold=2.0, editing_threshold=None).texts

    One token is committed per forward at that threshold; `num_inference_steps=1` commits a block at once.
    """
    folder = folder or weights_folder()
    model, tokenizer = load_puzzles(dtype, device, folder)
    scheduler = BlockRefinementScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
    return LLaDA2Pipeline(model=model, scheduler=scheduler, tokenizer=tokenizer)
