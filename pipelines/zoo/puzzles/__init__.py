"""The `puzzles` world: tasks in a line of text, most with many right answers, exact checkers, and a small block-diffusion model."""

from hasten.pipelines.zoo.puzzles.loading import (
    BLOCK_LENGTH,
    GEN_LENGTH,
    load_pipeline,
    load_puzzles,
    new_config,
    new_tokenizer,
    weights_folder,
)
from hasten.pipelines.zoo.puzzles.world import TASKS, Puzzle, Verdict, check, draw, held_out, task_of, validation_puzzles

__all__ = [
    "BLOCK_LENGTH",
    "GEN_LENGTH",
    "TASKS",
    "Puzzle",
    "Verdict",
    "check",
    "draw",
    "held_out",
    "load_pipeline",
    "load_puzzles",
    "new_config",
    "new_tokenizer",
    "task_of",
    "validation_puzzles",
    "weights_folder",
]
