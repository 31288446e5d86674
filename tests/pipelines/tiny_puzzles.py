"""A tiny `puzzles` model with random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from hasten.pipelines.zoo.puzzles import BLOCK_LENGTH, new_config, new_tokenizer
from hasten.pipelines.zoo.puzzles.modeling_puzzles import PuzzlesConfig, PuzzlesForMaskedLM


def tiny(block_length: int = BLOCK_LENGTH, layers: int = 2, **options: object) -> PuzzlesForMaskedLM:
    torch.manual_seed(0)
    config = new_config(new_tokenizer(), width=32, layers=layers, heads=2, inner=48)
    config.block_length = block_length
    # Weights as small as a real initialisation's would make all logits alike.
    config.initializer_range = 0.2
    return PuzzlesForMaskedLM._from_config(config, **options).eval()


def save(folder: Path) -> None:
    """As the model ships: its code beside the weights, and the tokenizer."""
    PuzzlesConfig.register_for_auto_class()
    PuzzlesForMaskedLM.register_for_auto_class("AutoModelForCausalLM")
    tiny().save_pretrained(folder)
    new_tokenizer().save_pretrained(folder)
