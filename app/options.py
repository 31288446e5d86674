"""Options that several commands share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.app.errors import BadInput

CACHING, DECODING, DRAWING, OUTPUT, STEERING = "Caching", "Decoding", "Drawing", "Output", "Steering and search"


def _panel(title: str) -> Callable[..., Any]:
    """Makes options that `--help` shows together under the title."""
    return partial(typer.Option, rich_help_panel=title)


_caching, _drawing, _output, _steering = _panel(CACHING), _panel(DRAWING), _panel(OUTPUT), _panel(STEERING)

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="shapes, shapes-flow, shapes-unet, a diffusers pipeline folder, or a hub id.")
]
ModelOption = Annotated[
    str, _drawing("--model", "-m", metavar="MODEL", help="shapes, shapes-flow, shapes-unet, a diffusers pipeline folder, or a hub id.")
]
MethodOption = Annotated[
    str | None,
    _caching(
        "--method",
        metavar="NAME",
        help="delta-dit, forecast, fora, deepcache (UNets), first-block, teacache, auto or none. "
        "Default: for models that ship delta-dit (deepcache for the UNet), where it was measured; auto, a careful rule, for others.",
    ),
]
IntervalOption = Annotated[int | None, _caching("--interval", metavar="N", help="Every N-th step computes everything.")]
ThresholdOption = Annotated[
    float | None, _caching("--threshold", metavar="X", help="Of first-block and teacache: the change below which a step is reused.")
]
SkipOption = Annotated[
    int | None,
    _caching(
        "--skip-guidance",
        metavar="N",
        help="Beside any method: after the first third of the steps, both guidance branches only on every N-th step.",
    ),
]
CachedOption = Annotated[
    str | None, _caching("--cached", metavar="X", help="Blocks reused in the steps between: a fraction (0.75) or a count (21).")
]
BoundaryOption = Annotated[
    str | None, _caching("--boundary", metavar="X", help="Last steps, in which front blocks are reused, not rear ones: fraction or count.")
]
PresetOption = Annotated[
    str | None, _caching("--preset", metavar="NAME", help="A published setting of Delta-DiT, such as pixart-alpha-20.")
]
PlanOption = Annotated[Path | None, _caching("--plan", metavar="FILE", help="A saved plan, in place of a method.")]
StepsOption = Annotated[int | None, _drawing("--steps", "-n", metavar="N", help="Denoising steps. Default: the model's, or the plan's.")]
StepLoRAOption = Annotated[
    str | None, _drawing("--step-lora", metavar="NAME|DIR", help="Draw in 1, 2, 4 or 8 steps with adapters that `hasten distill` made.")
]
GuidanceOption = Annotated[float | None, _drawing("--guidance", "-g", metavar="G", help="Guidance scale. Default: the model's.")]
SeedOption = Annotated[int, _drawing("--seed", "-s", metavar="S", help="Picture i starts from the noise of seed S + i, in any batch.")]
SizeOption = Annotated[str | None, _drawing("--size", metavar="WxH", help="Pixels, such as 1024x768. Default: the model's.")]
BatchOption = Annotated[
    int | None, _drawing("--batch", metavar="N", help="Pictures at a time. Default: 8 for models that ship, 1 for others.")
]
DtypeOption = Annotated[
    str, _drawing("--dtype", metavar="TYPE", help="float32, bfloat16 or float16. Default: float32 on a CPU, else bfloat16.")
]
DeviceOption = Annotated[str, _drawing("--device", metavar="NAME", help="cpu, cuda or mps. Default: a GPU where there is one.")]
CaptionOption = Annotated[str, _drawing("--caption", metavar="TEXT", help="What to call the model with; nothing is drawn.")]
SteerOption = Annotated[
    str | None,
    _steering(
        "--steer",
        metavar="NAME",
        help="fk, best-of-n, halving, svdd or code: several particles of each caption run side by side, a reward judges them on the way, "
        "and the best is returned.",
    ),
]
SearchOption = Annotated[
    str | None,
    _steering(
        "--search",
        metavar="NAME",
        help="random, zero-order, paths or rollover, or by gradients reno or carinox: looks for the noise to start from.",
    ),
]
RewardOption = Annotated[
    str | None,
    _steering(
        "--reward",
        metavar="NAME[:WEIGHT],...",
        help="What is maximised: shapes, shapes-proxy, clip, pickscore, hps, image_reward, aesthetic, vqa, brightness, sharpness, "
        "jpeg-size, colour:red, colour:#ff8800, or your own as package.module:function. Several are added up: hps:5,clip:0.01. "
        "Default: shapes, for models that ship.",
    ),
]
RankFlag = Annotated[bool, _steering("--rank", help="Several rewards by the mean of their ranks, not their sum.")]
ParticlesOption = Annotated[
    int | None, _steering("--particles", metavar="N", help="Of --steer, for each caption. Default: the method's; 4 for fk.")
]
RoundsOption = Annotated[int | None, _steering("--rounds", metavar="N", help="Of random and zero-order; iterations of reno and carinox.")]
SetOption = Annotated[
    list[str] | None,
    _steering(
        "--set",
        metavar="NAME=VALUE",
        help="Any other setting of the method, such as potential=max for fk; may be repeated. A wrong name lists them.",
    ),
]
KernelOption = Annotated[
    str | None,
    _steering(
        "--kernel",
        metavar="NAME",
        help="The step that draws noise: auto, ddim, linear-sde, renoise (distilled models alone) or scheduler. Default: auto.",
    ),
]
BudgetOption = Annotated[
    list[str] | None,
    _steering(
        "--budget",
        metavar="UNIT=N,...",
        help="The most that one caption may spend: particle_steps, denoiser_rows, decodes, verifier_rows, seconds.",
    ),
]
MicroBatchOption = Annotated[
    int | None,
    _steering(
        "--micro-batch",
        metavar="N",
        help="Particles computed at a time, for memory; pictures stay the same. Default: 8 for models that ship, 1 for others.",
    ),
]
SelectOption = Annotated[
    str | None,
    _steering(
        "--select",
        metavar="NAME",
        help="Of fk and best-of-n: best, all (every particle is saved, best first), or sample (fk: one by its weight).",
    ),
]
VersusFlag = Annotated[bool, _steering("--versus", help="Also draw the best of as many plain samples as the same time buys.")]
ReportOption = Annotated[
    Path | None, _steering("--report", metavar="FILE", help="Who came from whom, rewards and costs, as JSON: what --json prints.")
]
PlotsOption = Annotated[Path | None, _steering("--plots", metavar="DIR", help="Folder for family trees, reward curves and galleries.")]
JsonFlag = Annotated[bool, _output("--json", help="One JSON document on stdout, nothing else there.")]


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
