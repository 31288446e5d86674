"""What is settled once for an output folder, by whichever process comes first, and holds for all that follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hasten.app.batch.folder import BatchPlan, Folder, list_hash
from hasten.app.batch.jobs import Job
from hasten.app.batch.locks import SETUP
from hasten.app.batch.painter import Painter
from hasten.app.batch.sizing import Size, find_size
from hasten.app.errors import BadInput


@dataclass(frozen=True)
class Wanted:
    """What pictures are drawn with, as it was asked for.

    Attributes:
        model, dtype, device: As for `Painter`.
        score: What judges them.
        batch_size: None to find it.
    """

    model: str = "shapes"
    dtype: str = "auto"
    device: str = "auto"
    score: str | None = "auto"
    batch_size: int | None = None

    def painter(self, plan: BatchPlan | None = None) -> Painter:
        """Loads the pipeline, as the plan says where there is one.

        Raises:
            BadInput: It cannot be loaded, or the plan says something else.
        """
        if plan is None:
            return Painter(self.model, self.dtype, self.device, score=self.score)
        for option, asked, was in (("--dtype", self.dtype, plan.dtype), ("--device", self.device, plan.device)):
            if asked not in ("auto", was):
                raise BadInput(f"{option} must be {was}, with which the folder of --out was begun, not {asked}; or name another folder")
        painter = Painter(plan.model, plan.dtype, plan.device, score=self.score)
        use_threads(plan.threads)
        return painter


def use_threads(threads: int) -> None:
    """Has torch use so many threads; 0 changes nothing."""
    import torch

    if threads:
        torch.set_num_threads(threads)


def settled(wanted: Wanted, painter: Painter, jobs: Sequence[Job], processes: int, world: int, told: Callable[[str], None]) -> BatchPlan:
    """The plan of a folder that is begun.

    Args:
        wanted: What was asked for.
        painter: For the measurement.
        jobs: The whole list.
        processes: On this machine.
        world: Processes in all.
        told: Hears what is being done.
    """
    import torch

    threads = max(1, torch.get_num_threads() // processes) if painter.model.device == "cpu" else 0
    use_threads(threads)
    if painter.model.device == "cuda":
        processes = -(-processes // torch.cuda.device_count())  # on each GPU
    given = wanted.batch_size
    size = Size(given, {"found": "given"}) if given is not None else find_size(painter, jobs, processes, world, told)
    return BatchPlan(
        list_hash(jobs), len(jobs), size.size, wanted.model, painter.model.dtype, painter.model.device, threads, size.how
    )  # fmt: skip


def begun(folder: Folder, wanted: Wanted, jobs: Sequence[Job], make: Callable[[], BatchPlan]) -> BatchPlan:
    """The folder's plan, made now where it has none; other processes wait meanwhile.

    Raises:
        BadInput: The folder belongs to another list of jobs, or was begun otherwise.
        WriteError: It cannot be written.
    """
    folder.locks.take(SETUP)
    try:
        plan = folder.check(jobs, model=wanted.model, batch_size=wanted.batch_size, hash_=list_hash(jobs))
        if plan is None:
            plan = make()
            folder.begin(plan, jobs)
        return plan
    finally:
        folder.locks.release(SETUP)
