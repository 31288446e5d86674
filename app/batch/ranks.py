"""Which of several processes this is: from torchrun or `accelerate launch`, SLURM, `--array`, or a parent of ours."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from hasten.app.batch.work import Share
from hasten.app.errors import BadInput

_NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)


@dataclass(frozen=True)
class Rank:
    """This process among those that share the work.

    Attributes:
        share: Of the batches.
        local: Its number on its machine.
        neighbours: Processes on its machine, itself among them.
    """

    share: Share = Share()  # noqa: RUF009  frozen
    local: int = 0
    neighbours: int = 1


def find_rank(array: str | None, environment: Mapping[str, str] | None = None) -> Rank:
    """From `--array INDEX/COUNT` where it is given, else from what a launcher has put into the environment.

    Raises:
        BadInput: It is not INDEX/COUNT with INDEX below COUNT, or the launcher's numbers are none.
    """
    if array is not None:
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", array.strip())
        if match is None or int(match[1]) >= int(match[2]):
            raise BadInput(f"--array must be INDEX/COUNT with INDEX from 0 to COUNT - 1, such as 0/4, not {array!r}")
        return Rank(Share(int(match[1]), int(match[2]), wait=False))
    given = os.environ if environment is None else environment
    for names in _NAMES:
        if names[0] in given and names[1] in given:
            rank, world, local, neighbours = (_number(name, given.get(name, default)) for name, default in zip(names, "0101", strict=True))
            if rank >= world:
                raise BadInput(f"{names[0]} must be below {names[1]}, which is {world}, not {rank}")
            return Rank(Share(rank, world), local, max(1, neighbours))
    return Rank()


def _number(name: str, text: str) -> int:
    if not text.isdigit():
        raise BadInput(f"{name} must be a whole number, as launchers set it, not {text!r}")
    return int(text)


def use_gpu(local: int) -> None:
    """Has this process use its own GPU where there are several."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
