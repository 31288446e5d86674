"""Options that several commands share."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.app.errors import BadInput

CACHING, DECODING, DRAWING, OUTPUT, STEERING = "Caching", "Decoding", "Drawing", "Output", "Steering and search"

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
SteerOption = Annotated[
    str | None,
    typer.Option(
        "--steer",
        metavar="NAME",
        help="fk, best-of-n, halving, svdd or code: several particles of each caption run side by side, a reward judges them on the way, "
        "and the best is returned.",
        rich_help_panel=STEERING,
    ),
]
SearchOption = Annotated[
    str | None,
    typer.Option(
        "--search",
        metavar="NAME",
        help="random, zero-order, paths or rollover, or by gradients reno or carinox: looks for the noise to start from.",
        rich_help_panel=STEERING,
    ),
]
RewardOption = Annotated[
    str | None,
    typer.Option(
        "--reward",
        metavar="NAME[:WEIGHT],...",
        help="What is maximised: shapes, shapes-proxy, clip, pickscore, hps, image_reward, aesthetic, vqa, brightness, sharpness, "
        "jpeg-size, colour:red, colour:#ff8800, or your own as package.module:function. Several are added up: hps:5,clip:0.01. "
        "Default: shapes, for models that ship.",
        rich_help_panel=STEERING,
    ),
]
RankFlag = Annotated[
    bool, typer.Option("--rank", help="Several rewards by the mean of their ranks, not their sum.", rich_help_panel=STEERING)
]
ParticlesOption = Annotated[
    int | None,
    typer.Option(
        "--particles", metavar="N", help="Of --steer, for each caption. Default: the method's; 4 for fk.", rich_help_panel=STEERING
    ),
]
RoundsOption = Annotated[
    int | None,
    typer.Option("--rounds", metavar="N", help="Of random and zero-order; iterations of reno and carinox.", rich_help_panel=STEERING),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other setting of the method, such as potential=max for fk; may be repeated. A wrong name lists them.",
        rich_help_panel=STEERING,
    ),
]
KernelOption = Annotated[
    str | None,
    typer.Option(
        "--kernel",
        metavar="NAME",
        help="The step that draws noise: auto, ddim, linear-sde, renoise (distilled models alone) or scheduler. Default: auto.",
        rich_help_panel=STEERING,
    ),
]
BudgetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        metavar="UNIT=N,...",
        help="The most that one caption may spend: particle_steps, denoiser_rows, decodes, verifier_rows, seconds.",
        rich_help_panel=STEERING,
    ),
]
MicroBatchOption = Annotated[
    int | None,
    typer.Option(
        "--micro-batch",
        metavar="N",
        help="Particles computed at a time, for memory; pictures stay the same. Default: 8 for models that ship, 1 for others.",
        rich_help_panel=STEERING,
    ),
]
SelectOption = Annotated[
    str | None,
    typer.Option(
        "--select",
        metavar="NAME",
        help="Of fk and best-of-n: best, all (every particle is saved, best first), or sample (fk: one by its weight).",
        rich_help_panel=STEERING,
    ),
]
VersusFlag = Annotated[
    bool, typer.Option("--versus", help="Also draw the best of as many plain samples as the same time buys.", rich_help_panel=STEERING)
]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="FILE", help="Who came from whom, rewards and costs, as JSON: what --json prints.", rich_help_panel=STEERING
    ),
]
PlotsOption = Annotated[
    Path | None,
    typer.Option("--plots", metavar="DIR", help="Folder for family trees, reward curves and galleries.", rich_help_panel=STEERING),
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


def parse_settings(settings: Sequence[str], example: str) -> dict[str, Any]:
    """What "name=value" texts set; values are JSON, or else words.

    Args:
        example: For the message.

    Raises:
        BadInput: One of them is no such text, or a name is set twice.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = (part.strip() for part in setting.partition("="))
        if not equals or not name or not text:
            raise BadInput(f"--set must be NAME=VALUE, such as {example}, not {setting!r}")
        if name in values:
            raise BadInput(f"--set gives {name} twice")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    return values
