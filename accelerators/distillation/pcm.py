"""Phased consistency (PCM, arXiv 2405.18407), for variance-preserving models and flows alike.

Time is cut into as many phases as the student shall take steps. Inside each it learns to jump to the phase's clean end, so that sampling
is deterministic: DDIM or Euler from end to end. One LoRA serves one number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hasten.accelerators.checks import check_whole
from hasten.accelerators.distillation.method import Task
from hasten.accelerators.distillation.segmented import segmented_loss
from hasten.accelerators.distillation.teacher import check_ema, check_guidance, check_huber, drawn_index, drawn_scale


@dataclass(frozen=True)
class PhasedConsistency:
    """Its last jump ends at the clean sample, where the published code stops one schedule entry short.

    Attributes:
        phases: Steps of the student; 4 in the published runs.
        guidance: Lowest and highest guidance scale, drawn for each row; 4 to 4 in the published code for SD3.
        huber: Width of the pseudo-Huber distance, 0.001 in the published code; None is the mean squared error.
        stride: Nodes that the teacher crosses at once.
        ema: Of an averaged target; none in the published code.
        adversarial: Whether a discriminator on the teacher's features judges the jumps too, as in the published runs.

    Raises:
        ValueError: A value is out of range.
    """

    phases: int = 4
    guidance: tuple[float, float] = (4.0, 4.0)
    huber: float | None = 0.001
    stride: int = 1
    ema: float | None = None
    adversarial: bool = False

    def __post_init__(self) -> None:
        check_whole(1, phases=self.phases, stride=self.stride)
        check_guidance(self.guidance)
        check_huber(self.huber)
        check_ema(self.ema)

    @property
    def stages(self) -> tuple[int, ...]:
        return (self.phases,)

    @property
    def counts(self) -> tuple[int, ...]:
        return (self.phases,)

    @property
    def gamma(self) -> float:
        return 0.0

    def loss(self, task: Task, segments: int) -> Tensor:
        """See `DistillationMethod`."""
        grid, rows = task.grid, len(task.x0)
        index = drawn_index(1, grid.steps, rows, task.generator)
        scale = drawn_scale(self.guidance, rows, task.generator)
        landing = grid.segment_start(index, segments)
        return segmented_loss(task, index, landing, scale, self.stride, self.huber, segments)
