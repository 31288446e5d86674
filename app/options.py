"""Options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from hasten.app.errors import BadInput

CACHING, DECODING, DRAWING, OUTPUT = "Caching", "Decoding", "Drawing", "Output"

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="shapes, shapes-flow, shapes-unet, a diffusers pipeline folder, or a hub id.")
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="shapes, shapes-flow, shapes-unet, a diffusers pipeline folder, or a hub id.",
        rich_help_panel=DRAWING,
    ),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="NAME",
        help="delta-dit, forecast, fora, deepcache (UNets), first-block, teacache, auto or none. "
        "Default: for models that ship delta-dit (deepcache for the UNet), where it was measured; auto, a careful rule, for others.",
        rich_help_panel=CACHING,
    ),
]
IntervalOption = Annotated[
    int | None, typer.Option("--interval", metavar="N", help="Every N-th step computes everything.", rich_help_panel=CACHING)
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        metavar="X",
        help="Of first-block and teacache: the change below which a step is reused.",
        rich_help_panel=CACHING,
    ),
]
SkipOption = Annotated[
    int | None,
    typer.Option(
        "--skip-guidance",
        metavar="N",
        help="Beside any method: after the first third of the steps, both guidance branches only on every N-th step.",
        rich_help_panel=CACHING,
    ),
]
CachedOption = Annotated[
    str | None,
    typer.Option(
        "--cached", metavar="X", help="Blocks reused in the steps between: a fraction (0.75) or a count (21).", rich_help_panel=CACHING
    ),
]
BoundaryOption = Annotated[
    str | None,
    typer.Option(
        "--boundary",
        metavar="X",
        help="Last steps, in which front blocks are reused, not rear ones: fraction or count.",
        rich_help_panel=CACHING,
    ),
]
PresetOption = Annotated[
    str | None,
    typer.Option("--preset", metavar="NAME", help="A published setting of Delta-DiT, such as pixart-alpha-20.", rich_help_panel=CACHING),
]
PlanOption = Annotated[
    Path | None, typer.Option("--plan", metavar="FILE", help="A saved plan, in place of a method.", rich_help_panel=CACHING)
]
StepsOption = Annotated[
    int | None,
    typer.Option("--steps", "-n", metavar="N", help="Denoising steps. Default: the model's, or the plan's.", rich_help_panel=DRAWING),
]
GuidanceOption = Annotated[
    float | None, typer.Option("--guidance", "-g", metavar="G", help="Guidance scale. Default: the model's.", rich_help_panel=DRAWING)
]
SeedOption = Annotated[
    int,
    typer.Option("--seed", "-s", metavar="S", help="Picture i starts from the noise of seed S + i, in any batch.", rich_help_panel=DRAWING),
]
SizeOption = Annotated[
    str | None, typer.Option("--size", metavar="WxH", help="Pixels, such as 1024x768. Default: the model's.", rich_help_panel=DRAWING)
]
BatchOption = Annotated[
    int | None,
    typer.Option(
        "--batch", metavar="N", help="Pictures at a time. Default: 8 for models that ship, 1 for others.", rich_help_panel=DRAWING
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="TYPE", help="float32, bfloat16 or float16. Default: float32 on a CPU, else bfloat16.", rich_help_panel=DRAWING
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="NAME", help="cpu, cuda or mps. Default: a GPU where there is one.", rich_help_panel=DRAWING)
]
CaptionOption = Annotated[
    str, typer.Option("--caption", metavar="TEXT", help="What to call the model with; nothing is drawn.", rich_help_panel=DRAWING)
]
JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else there.", rich_help_panel=OUTPUT)]


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Width and height from '1024x768', or from one number for a square.

    Raises:
        BadInput: It is neither.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})(?:[x×X]([1-9]\d{0,4}))?", text.strip())
    if match is None:
        raise BadInput(f"--size must be width and height in pixels such as 1024x768, not {text!r}")
    return int(match[1]), int(match[2] or match[1])
