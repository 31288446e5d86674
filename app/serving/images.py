"""Pictures for the endpoint: requests become the jobs of `hasten batch`, and one painter draws them."""

from __future__ import annotations

import secrets
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hasten.app.batch.jobs import CACHING, Job, Rules
from hasten.app.batch.painter import Cancelled
from hasten.app.errors import BadInput
from hasten.app.files import png
from hasten.app.serving.errors import Refused
from hasten.app.serving.metrics import Metrics
from hasten.app.serving.worker import Left, Ticket

if TYPE_CHECKING:
    from hasten.app.batch.painter import Painted, Painter
    from hasten.app.serving.schemas import ImageRequest

RENAMED = {"guidance": "guidance_scale"}
"""Keys of a job that a request has under the name that diffusers gives them."""
SEEDS = 2**32
"""Seeds that are drawn lie below it: whole numbers that JavaScript holds exactly."""


class Paints(Protocol):
    """What is needed of a `Painter`."""

    def paint(self, jobs: Sequence[Job], *, cancelled: Callable[[], bool] | None = None) -> list[Painted]:
        """Draws jobs of one key in one call."""

    def settings(self, job: Job) -> dict[str, Any]:
        """Everything that the job's picture depends on."""


@dataclass(frozen=True)
class Frame:
    """Which pictures may be asked for.

    Attributes:
        unit: Width and height must be multiples of it, in pixels.
        pixels: Width times height at most.
        steps: Denoising steps at most.
    """

    unit: int = 8
    pixels: int = 2048 * 2048
    steps: int = 250

    def __post_init__(self) -> None:
        for name in ("unit", "pixels", "steps"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be a whole number of at least 1, not {getattr(self, name)}")

    @classmethod
    def of(cls, painter: Painter, pixels: int | None, steps: int) -> Frame:
        """The frame of a loaded model.

        Args:
            pixels: None for four times those of the model's own size, beyond which no model draws sense.
        """
        pipe = painter.model.pipe
        scale = int(getattr(pipe, "vae_scale_factor", 8))
        config = next((part.config for name in ("transformer", "unet") if (part := getattr(pipe, name, None)) is not None), None)
        patch, side = getattr(config, "patch_size", 1), getattr(config, "sample_size", None)
        if pixels is None:
            pixels = 4 * (side * scale) ** 2 if isinstance(side, int) else cls.pixels
        return cls(scale * (patch if isinstance(patch, int) else 1), pixels, steps)


@dataclass(frozen=True)
class Studio:
    """Turns requests into jobs, and does them.

    Attributes:
        name: The model's.
        painter: Draws; used by the worker's thread alone.
        metrics: Where pictures are counted.
        defaults: What holds where a request says nothing, by the keys of a job.
        frame: Which pictures may be asked for.
    """

    name: str
    painter: Paints
    metrics: Metrics
    defaults: Mapping[str, Any] = field(default_factory=dict)
    frame: Frame = field(default_factory=Frame)

    def jobs(self, request: ImageRequest) -> list[Job]:
        """The jobs of a request, one for each of its pictures.

        Raises:
            Refused: Something in it is not allowed.
        """
        seed = request.seed if request.seed is not None else secrets.randbelow(SEEDS)
        row: dict[str, Any] = {"prompt": request.prompt, "steps": request.steps, "guidance": request.guidance_scale}
        row |= {name: getattr(request, name) for name in ("negative_prompt", *CACHING) if name != "plan"}
        if request.size is not None and request.size != "auto":
            row["size"] = self._size(request.size)
        if request.steps is not None and request.steps > self.frame.steps:
            raise Refused(400, f"steps must be at most {self.frame.steps} here, not {request.steps}", param="steps")
        rules = Rules()
        try:
            return [Job.from_row({**row, "seed": seed + i}, self.defaults, "request", number=i, rules=rules) for i in range(request.n or 1)]
        except BadInput as why:
            raise _refused(str(why).removeprefix("request: ")) from None

    def work(self, tickets: Sequence[Ticket[Job, bytes]], cancelled: Callable[[], bool]) -> None:
        """Draws a batch.

        Raises:
            Left: Nobody waits for it any more.
            Refused: The model does not take what was asked for.
        """
        try:
            painted = self.painter.paint([ticket.item for ticket in tickets], cancelled=cancelled)
        except Cancelled:
            raise Left("nobody waits for the pictures") from None
        except ValueError as why:
            if _about_request(why):
                raise _refused(str(why)) from why
            raise
        except (RuntimeError, IndexError) as why:
            job = tickets[0].item
            if job.width is None:
                raise
            # Which sizes a model takes, and the memory has room for, shows only when it is tried.
            raise Refused(400, f"{self.name} cannot draw {job.width}x{job.height}: {_first(why)}", param="size") from why
        self.metrics.drawn(self.name, len(painted))
        for ticket, found in zip(tickets, painted, strict=True):
            ticket.settle(png(found.image, ticket.item.prompt, self._settings(ticket.item)))

    def _size(self, size: str) -> str:
        width, height = map(int, size.split("x"))
        if width % self.frame.unit or height % self.frame.unit or width * height > self.frame.pixels:
            raise Refused(
                400,
                f"size must be multiples of {self.frame.unit}, and at most {self.frame.pixels} pixels in all, not {size}",
                param="size",
            )
        return size

    def _settings(self, job: Job) -> dict[str, Any]:
        """As they are written into the picture; where files lie on the server is nobody's business."""
        settings = {**self.painter.settings(job), "model": self.name}
        return {**settings, "plan": Path(job.caching["plan"]).name} if "plan" in job.caching else settings


def _about_request(error: ValueError) -> bool:
    """Whether it says that settings do not fit the model: hasten raised it, or a diffusers pipeline while it checked its arguments.

    Anything else is a fault of the server.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""
    return raised_in.startswith("hasten.") or any(frame.f_code.co_name == "check_inputs" for frame, _ in frames)


def _first(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:150]


def _refused(message: str) -> Refused:
    """An error about a job, as an answer; its first word is the key that it is about."""
    message = " ".join(message.split())
    word = message.split(" ", 1)[0].strip("`:")
    return Refused(
        400, message, param=RENAMED.get(word, word) if word in ("prompt", "negative_prompt", "steps", *RENAMED, *CACHING) else None
    )
