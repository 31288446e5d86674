"""What can go wrong while a picture is drawn, and what it is called in a row."""

from __future__ import annotations

LIMIT = 500
"""Characters of an error in a row."""


def out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory: of a GPU, or of the machine."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text or "cannot allocate memory" in text
    )


def one_line(error: BaseException) -> str:
    """An error for a row: its message where it is one of hasten's, which say all, else its name too."""
    text = " ".join(str(error).split())
    ours = isinstance(error, ValueError) and type(error).__module__.startswith("hasten.")
    return (text if ours else f"{type(error).__name__}: {text}")[:LIMIT]
