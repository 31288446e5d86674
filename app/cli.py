"""The `hasten` command: its words and options. What a command does stands in the modules beside this one.

torch and diffusers are imported by the commands that need them, after everything that can be checked without them.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from hasten._version import __version__
from hasten.app import errors
from hasten.app.batch_cli import batch
from hasten.app.options import (
    CACHING,
    DECODING,
    DRAWING,
    OUTPUT,
    BatchOption,
    BoundaryOption,
    BudgetOption,
    CachedOption,
    CaptionOption,
    DeviceOption,
    DtypeOption,
    GuidanceOption,
    IntervalOption,
    JsonFlag,
    KernelOption,
    MethodOption,
    MicroBatchOption,
    ModelName,
    ModelOption,
    ParticlesOption,
    PlanOption,
    PlotsOption,
    PresetOption,
    RankFlag,
    ReportOption,
    RewardOption,
    RoundsOption,
    SearchOption,
    SeedOption,
    SelectOption,
    SetOption,
    SizeOption,
    SkipOption,
    SteerOption,
    StepLoRAOption,
    StepsOption,
    ThresholdOption,
    VersusFlag,
    parse_size,
)

if TYPE_CHECKING:
    from hasten.app.output import Outcome

SAMPLE_CAPTION = "a small red circle left of a large blue square"
"""What a model is called with where only its blocks are of interest."""

BENCHMARKS = {
    "caching": "caching",
    "caching-rivals": "rivals",
    "caching-policy": "policy",
    "caching-cachequant": "cachequant",
    "caching-compiled": "compiled",
    "decoding": "decoding",
    "steering": "steering",
    "distillation": "distillation",
    "kernels": "kernels",
    "batch": "batch",
}
"""Their modules in `hasten.benchmarks`."""


class OneLineErrors(TyperGroup):
    """Says every error in one line, with the exit codes of `hasten.app.errors`."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Runs the command line and exits."""
        code: object
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except (typer.Abort, KeyboardInterrupt):
            code = errors.INTERRUPTED
        except Exception as error:
            code = errors.report(error)
        if code == errors.INTERRUPTED:
            print("interrupted", file=sys.stderr)
        sys.exit(code if isinstance(code, int) else errors.OK)


app = typer.Typer(
    cls=OneLineErrors,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
plan_app = typer.Typer(rich_markup_mode="rich")
app.add_typer(plan_app, name="plan", help="Make plans and look at plan files: which block is computed at which step.")


def _help_if_bare(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(errors.USAGE)


def _show_version(value: bool) -> None:
    if value:
        print(f"hasten {__version__}")
        raise typer.Exit(errors.OK)


def _finish(outcome: Outcome, as_json: bool) -> None:
    raise typer.Exit(outcome.show(as_json))


@app.callback(invoke_without_command=True)
def hasten(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Makes diffusers pipelines faster without forking them.

    [bold]Start here[/bold]

    \b
    hasten generate "a small red circle" --compare  # plain and accelerated
    hasten explain shapes                           # what would be cached
    hasten verify MODEL --prompts FILE              # your own: time and error
    hasten doctor                                   # what is missing

    Exit codes: 0 done, 1 a failure in the work, 2 bad input. HASTEN_DEBUG=1 shows tracebacks.
    """
    _help_if_bare(context)


@plan_app.callback(invoke_without_command=True)
def plan(context: typer.Context) -> None:
    """Make plans and look at plan files: which block is computed at which step."""
    _help_if_bare(context)


@app.command()
def generate(
    captions: Annotated[list[str] | None, typer.Argument(metavar="CAPTION...", help="What to draw; each caption is a picture.")] = None,
    captions_file: Annotated[
        Path | None, typer.Option("--captions", "-f", metavar="FILE", help="More captions, one a line.", show_default=False)
    ] = None,
    model: ModelOption = "shapes",
    method: MethodOption = None,
    interval: IntervalOption = None,
    threshold: ThresholdOption = None,
    skip_guidance: SkipOption = None,
    cached: CachedOption = None,
    boundary: BoundaryOption = None,
    preset: PresetOption = None,
    plan: PlanOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    seed: SeedOption = 0,
    size: SizeOption = None,
    batch: BatchOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    steer: SteerOption = None,
    search: SearchOption = None,
    reward: RewardOption = None,
    rank: RankFlag = False,
    particles: ParticlesOption = None,
    rounds: RoundsOption = None,
    settings: SetOption = None,
    kernel: KernelOption = None,
    budget: BudgetOption = None,
    micro_batch: MicroBatchOption = None,
    select: SelectOption = None,
    versus: VersusFlag = False,
    report: ReportOption = None,
    plots: PlotsOption = None,
    step_lora: StepLoRAOption = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Draw plain, accelerated and fewer steps in turns; write one picture of them all.", rich_help_panel=OUTPUT
        ),
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the pictures.", rich_help_panel=OUTPUT)] = Path(
        "hasten-out"
    ),
    save_plan: Annotated[
        Path | None, typer.Option("--save-plan", metavar="FILE", help="Save what was executed, for --plan.", rich_help_panel=OUTPUT)
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Draw pictures from captions, accelerated, or steered towards a reward.

    [bold]Examples[/bold]

    \b
    hasten generate "a small red circle" "a blue square above a red cross"
    hasten generate "a small red circle" --compare
    hasten generate --captions captions.txt --interval 3 --cached 0.5
    hasten generate "a small red circle" --method forecast --skip-guidance 5
    hasten generate "a cat" -m PixArt-alpha/PixArt-XL-2-512x512 --steps 20
    hasten generate "a small red circle" --save-plan plan.safetensors
    hasten generate "a large green cross" --plan plan.safetensors
    hasten generate "a large green cross" --step-lora shapes-steps --steps 4
    hasten generate "a red circle above a blue square" --steer fk --particles 4
    hasten generate "a red circle above a blue square" --search zero-order --rounds 4 --versus
    hasten generate "a cat" -m ./my-pipeline --steer best-of-n --reward hps:5,clip:0.01

    Every PNG holds its caption, seed and settings as text.

    With --steer or --search each caption is sampled several times, and a reward chooses. Best-of-n is what the others must beat: --versus
    measures whether they do. Nothing is cached then, unless a caching option is given.
    """
    from hasten.app import generate as work
    from hasten.app.setup import Options
    from hasten.app.steered import generate_steered
    from hasten.app.steering import Steering

    wanted = work.gather_captions(captions or [], captions_file)
    options = Options(
        model, method, interval, cached, boundary, preset, plan, steps, guidance, seed, parse_size(size), batch, dtype, device,
        threshold, skip_guidance, step_lora,
    )  # fmt: skip
    if compare and step_lora is not None:
        raise errors.BadInput("--compare draws with fewer steps too, which a step LoRA is not for: give one of them")
    steering = Steering(
        steer, search, reward, rank, particles, rounds, settings or (), kernel, budget or (), micro_batch, select, versus, report, plots
    )
    if steering.asked():
        if compare:
            raise errors.BadInput("--compare measures caching alone; with --steer and --search, --versus compares")
        _finish(generate_steered(options, steering, wanted, out, save_plan), json)
    else:
        _finish((work.compare if compare else work.generate)(options, wanted, out, save_plan), json)


@app.command()
def verify(
    model: ModelName,
    prompts: Annotated[Path, typer.Option("--prompts", "-f", metavar="FILE", help="Captions, one a line.", rich_help_panel=DRAWING)],
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Only the first N captions of the file.", rich_help_panel=DRAWING)
    ] = None,
    method: MethodOption = None,
    interval: IntervalOption = None,
    threshold: ThresholdOption = None,
    skip_guidance: SkipOption = None,
    cached: CachedOption = None,
    boundary: BoundaryOption = None,
    preset: PresetOption = None,
    plan: PlanOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    seed: SeedOption = 0,
    size: SizeOption = None,
    batch: BatchOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    rounds: Annotated[
        int | None,
        typer.Option(
            "--rounds", metavar="N", help="Times are medians of N rounds. Default: 3 if a round is short, else 1.", rich_help_panel=OUTPUT
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="A page with all pictures inside it.", rich_help_panel=OUTPUT)
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Measure acceleration on your own pipeline and captions.

    Draws every caption plainly, accelerated, and plainly with so few steps that the same fraction is computed, from the same noise and in
    turns: time, error, PSNR, and the pictures side by side.

    [bold]Examples[/bold]

    \b
    hasten verify shapes --prompts captions.txt --interval 3
    hasten verify ./my-pipeline --prompts captions.txt --limit 8 --html page.html
    hasten verify ./my-pipeline --prompts captions.txt --plan plan.safetensors --json
    """
    from hasten.app.drawing import check_number
    from hasten.app.generate import gather_captions
    from hasten.app.setup import Options
    from hasten.app.verify import verify as work

    check_number("--limit", limit, 1, whole=True)
    check_number("--rounds", rounds, 1, whole=True)
    wanted = gather_captions([], prompts, "--prompts")[:limit]
    options = Options(
        model, method, interval, cached, boundary, preset, plan, steps, guidance, seed, parse_size(size), batch, dtype, device,
        threshold, skip_guidance,
    )  # fmt: skip
    _finish(work(options, wanted, html, rounds), json)


@app.command()
def trace(
    model: ModelName,
    caption: CaptionOption = SAMPLE_CAPTION,
    size: SizeOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    json: JsonFlag = False,
) -> None:
    """Show a model's blocks: their chains and streams, what they cost, and which can be cached.

    [bold]Example[/bold]

    \b
    hasten trace shapes
    """
    from hasten.app.inspect_model import trace as work
    from hasten.app.setup import Options

    _finish(work(Options(model, "none", size=parse_size(size), dtype=dtype, device=device), caption), json)


@app.command()
def explain(
    model: ModelName,
    caption: CaptionOption = SAMPLE_CAPTION,
    method: MethodOption = None,
    interval: IntervalOption = None,
    threshold: ThresholdOption = None,
    skip_guidance: SkipOption = None,
    cached: CachedOption = None,
    boundary: BoundaryOption = None,
    preset: PresetOption = None,
    plan: PlanOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    size: SizeOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    json: JsonFlag = False,
) -> None:
    """Say before a run what a method will cache, what that can save, and why something is not cached.

    [bold]Examples[/bold]

    \b
    hasten explain shapes
    hasten explain ./my-pipeline --interval 3 --cached 20 --steps 28
    """
    from hasten.app.inspect_model import explain as work
    from hasten.app.setup import Options

    options = Options(
        model, method, interval, cached, boundary, preset, plan, steps, guidance, size=parse_size(size), dtype=dtype, device=device,
        threshold=threshold, skip_guidance=skip_guidance,
    )  # fmt: skip
    _finish(work(options, caption), json)


@plan_app.command("make")
def plan_make(
    model: ModelName,
    prompts: Annotated[Path, typer.Option("--prompts", "-f", metavar="FILE", help="Captions, one a line.", rich_help_panel=DRAWING)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The plan.", rich_help_panel=OUTPUT)] = Path("plan.safetensors"),
    speedup: Annotated[
        float | None, typer.Option("--speedup", metavar="X", help="Least error at this speed-up.", rich_help_panel=CACHING)
    ] = None,
    error: Annotated[
        float | None,
        typer.Option("--error", metavar="E", help="Greatest speed-up within this relative L2 error.", rich_help_panel=CACHING),
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option("--held-out", metavar="N", help="Captions kept for the certificate. Default: a third.", rich_help_panel=DRAWING),
    ] = None,
    replays: Annotated[
        int | None,
        typer.Option("--replays", metavar="N", help="Most schedules to try on the captions. Default: 14.", rich_help_panel=CACHING),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how long it would take.", rich_help_panel=OUTPUT)] = False,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    seed: SeedOption = 0,
    size: SizeOption = None,
    batch: BatchOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    json: JsonFlag = False,
) -> None:
    """Measure a model on a few captions and solve for its best plan.

    Runs the captions in full and, for some steps, with that step reused; then decides which steps to compute, fits the forecasts of the
    others, replays candidates and corrects itself by what they do, and certifies the best one on captions that were held out.

    [bold]Examples[/bold]

    \b
    hasten plan make shapes --prompts captions.txt --speedup 2
    hasten plan make ./my-pipeline --prompts captions.txt --error 0.05 --steps 28
    hasten generate "a small red circle" --plan plan.safetensors
    """
    from hasten.app.generate import gather_captions
    from hasten.app.plans import make
    from hasten.app.setup import Options

    wanted = gather_captions([], prompts, "--prompts")
    options = Options(
        model, "none", steps=steps, guidance=guidance, seed=seed, size=parse_size(size), batch=batch, dtype=dtype, device=device
    )
    _finish(make(options, wanted, out, speedup=speedup, error=error, held_out=held_out, replays=replays, dry_run=dry_run), json)


@plan_app.command("show")
def plan_show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A plan, from `hasten generate --save-plan` or `Plan.save`.")],
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Draw it as a heat map.", rich_help_panel=OUTPUT)] = None,
    json: JsonFlag = False,
) -> None:
    """Show a plan as a table, with the facts that it is bound to."""
    from hasten.app.plans import show

    _finish(show(file, png), json)


@plan_app.command("verify")
def plan_verify(
    model: ModelName,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A plan.")],
    prompts: Annotated[Path, typer.Option("--prompts", "-f", metavar="FILE", help="Captions, one a line.", rich_help_panel=DRAWING)],
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    seed: SeedOption = 0,
    size: SizeOption = None,
    batch: BatchOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    json: JsonFlag = False,
) -> None:
    """Replay a plan on captions and hold its error against what it predicts.

    Exit code 1 where the error is over twice the predicted one.

    [bold]Example[/bold]

    \b
    hasten plan verify shapes plan.safetensors --prompts captions.txt
    """
    from hasten.app.generate import gather_captions
    from hasten.app.plans import verify as work
    from hasten.app.setup import Options

    wanted = gather_captions([], prompts, "--prompts")
    options = Options(
        model, None, steps=steps, guidance=guidance, seed=seed, size=parse_size(size), batch=batch, dtype=dtype, device=device
    )
    _finish(work(options, file, wanted), json)


@plan_app.command("diff")
def plan_diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A plan.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    json: JsonFlag = False,
) -> None:
    """Say what differs between two plans."""
    from hasten.app.plans import diff

    _finish(diff(first, second), json)


@app.command()
def doctor(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Compile the CUDA kernels, check and time them on the present device (a minute or two).")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """List versions, devices and models: what is here, and what to install for the rest.

    [bold]Examples[/bold]

    \b
    hasten doctor
    hasten doctor --kernels --json
    """
    if kernels:
        from hasten.app.kernel_check import doctor_kernels

        _finish(doctor_kernels(), json)
    from hasten.app.doctor import doctor as work

    _finish(work(), json)


@app.command()
def text(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="What to answer; all prompts are one batch.")] = None,
    schedule: Annotated[
        str,
        typer.Option(
            "--schedule",
            metavar="NAME",
            help="static, threshold, factor, hierarchical, entropy-bound, klass, ccd, credit, saber, rcr, editing, wino or freedave.",
            rich_help_panel=DECODING,
        ),
    ] = "credit",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the schedule; may be repeated.", rich_help_panel=DECODING),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="puzzles, a folder of transformers, or a hub id.")
    ] = "puzzles",
    gen_length: Annotated[
        int | None,
        typer.Option("--gen-length", metavar="N", help="Most tokens of an answer; a multiple of the block.", rich_help_panel=DECODING),
    ] = None,
    block_length: Annotated[
        int | None, typer.Option("--block-length", metavar="N", help="Default: the model's own, else 32.", rich_help_panel=DECODING)
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", metavar="T", help="0: no noise.", rich_help_panel=DECODING)] = 0.0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the first prompt's noise.", rich_help_panel=DECODING)] = 0,
    cache: Annotated[
        str | None,
        typer.Option(
            "--cache",
            metavar="NAME",
            help="none, block-append (exact), prefix, dual or vicinity (approximate). Default: what is exact.",
            rich_help_panel=DECODING,
        ),
    ] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Show each step, tokens coloured by the step that committed them.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the weights; LLaDA, Dream and SDAR need it.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Answer prompts with a diffusion language model, several tokens a forward.

    [bold]Examples[/bold]

    \b
    hasten text "3? + ? = 91" "483 + 759 = ?" "depth 3 ????????"
    hasten text "1??4/?4??/?1??/4??1" --schedule threshold --set threshold=0.8 --trace
    hasten text "3? + ? = 91" --schedule freedave --set drafts=8
    hasten text "What is 7 times 8?" -m inclusionAI/LLaDA2.0-mini --trust-remote-code --gen-length 128
    """
    from hasten.app.text import TextOptions, answer

    options = TextOptions(
        model, schedule, settings or (), gen_length, block_length, temperature, seed, cache, dtype, device, trust_remote_code
    )
    _finish(answer(options, prompts or [], trace), json)


app.command()(batch)


@app.command()
def distill(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="A YAML file; see --example.", show_default=False)] = None,
    example: Annotated[bool, typer.Option("--example", help="Print a file to begin with, every entry explained.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, load the model, train nothing.")] = False,
    fresh: Annotated[bool, typer.Option("--no-resume", help="Refuse to go on from a checkpoint in the output folder.")] = False,
    json: JsonFlag = False,
) -> None:
    """Train a LoRA with which a pipeline draws in 1 to 8 steps.

    The pipeline teaches itself: from pictures with captions, or from prompts alone. Stop it at any time; the same command goes on.

    [bold]Examples[/bold]

    \b
    hasten distill --example > steps.yaml
    hasten distill steps.yaml
    accelerate launch --num_processes 2 -m hasten distill steps.yaml
    hasten generate "a small red circle" --step-lora runs/steps --steps 4
    """
    from hasten.app import distill as work

    if example:
        print(work.EXAMPLE, end="")
        return
    if config is None:
        raise errors.BadInput("CONFIG is missing: a YAML file; --example prints one to begin with")
    _finish(work.distill(config, resume=not fresh, dry_run=dry_run), json)


_serving = partial(typer.Option, rich_help_panel="Serving")


@app.command()
def serve(
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="For pictures: shapes, shapes-flow, shapes-unet, a diffusers folder, a hub id, or none."
        ),
    ] = "shapes",
    text_model: Annotated[
        str, typer.Option("--text-model", metavar="MODEL", help="For text: puzzles, a folder of transformers, a hub id, or none.")
    ] = "puzzles",
    host: Annotated[str, _serving("--host", metavar="ADDRESS", help="Where to listen; 0.0.0.0 is everywhere.")] = "127.0.0.1",
    port: Annotated[int, _serving("--port", metavar="N", help="0 takes a free one and prints it.")] = 8000,
    api_key: Annotated[
        str | None,
        _serving(
            "--api-key", metavar="KEY", help="What clients must show. Default: the variable HASTEN_API_KEY, which `ps` does not list."
        ),
    ] = None,
    queue: Annotated[int, _serving("--queue", metavar="N", help="Pictures or answers that may wait; then clients get status 429.")] = 64,
    max_batch: Annotated[int, _serving("--max-batch", metavar="N", help="Pictures or answers done together.")] = 8,
    max_wait_ms: Annotated[
        float, _serving("--max-wait-ms", metavar="MS", help="How long one waits for others to come along, in milliseconds.")
    ] = 20.0,
    timeout: Annotated[
        float | None, _serving("--timeout", metavar="S", help="Seconds for a request, its waiting included. Default: no limit.")
    ] = None,
    max_body: Annotated[int, _serving("--max-body", metavar="BYTES", help="Of a request.")] = 1 << 20,
    max_steps: Annotated[int, _serving("--max-steps", metavar="N", help="Denoising steps that a client may ask for.")] = 250,
    max_pixels: Annotated[
        int | None, _serving("--max-pixels", metavar="N", help="Width times height. Default: four times the model's own.")
    ] = None,
    drain_seconds: Annotated[
        float, _serving("--drain-seconds", metavar="S", help="After SIGTERM, for what is running and waiting, at most.")
    ] = 30.0,
    method: MethodOption = None,
    interval: IntervalOption = None,
    threshold: ThresholdOption = None,
    skip_guidance: SkipOption = None,
    cached: CachedOption = None,
    boundary: BoundaryOption = None,
    preset: PresetOption = None,
    plan: PlanOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    schedule: Annotated[
        str,
        typer.Option("--schedule", metavar="NAME", help="Of the text model, as for `hasten text`; not freedave.", rich_help_panel=DECODING),
    ] = "credit",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the schedule; may be repeated.", rich_help_panel=DECODING),
    ] = None,
    block_length: Annotated[
        int | None, typer.Option("--block-length", metavar="N", help="Default: the model's own, else 32.", rich_help_panel=DECODING)
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the text model's weights.")
    ] = False,
) -> None:
    """Serve pictures and text over HTTP, in the form of OpenAI's API.

    [bold]Examples[/bold]

    \b
    hasten serve
    curl localhost:8000/v1/images/generations -H 'Content-Type: application/json' \\
        -d '{"prompt": "a small red circle", "seed": 1}'
    HASTEN_API_KEY=secret hasten serve --host 0.0.0.0 --max-batch 16 --timeout 60
    hasten serve --model ./my-pipeline --text-model none --method forecast --steps 20

    Requests that come close together and fit together are drawn in one call. Caching, steps and guidance are what holds where a request
    says nothing. POST /v1/images/generations, /v1/completions, /v1/chat/completions; GET /v1/models, /health, /ready, /metrics,
    /openapi.json. SIGTERM or Ctrl-C: what was taken on is finished, then the server ends with exit code 0. Needs hasten\\[serve].
    """
    from hasten.app.serving.installed import check_installed

    check_installed()
    from hasten.app.serving.server import ServeOptions
    from hasten.app.serving.server import serve as work

    given = {
        "method": method, "interval": interval, "threshold": threshold, "skip_guidance": skip_guidance, "cached": cached,
        "boundary": boundary, "preset": preset, "plan": str(plan) if plan is not None else None,
    }  # fmt: skip
    caching = {name: value for name, value in given.items() if value is not None}
    options = ServeOptions(
        model, text_model, host, port, api_key, queue, max_batch, max_wait_ms, timeout, max_body, drain_seconds, caching, steps, guidance,
        max_steps, max_pixels, schedule, settings or (), block_length, dtype, device, trust_remote_code,
    )  # fmt: skip
    raise typer.Exit(work(options))


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="MODEL", help="A diffusers pipeline folder or a hub id. Default: the models that ship."),
    ] = None,
    host: Annotated[str, _serving("--host", metavar="ADDRESS", help="Where to listen; 0.0.0.0 is everywhere.")] = "127.0.0.1",
    port: Annotated[
        int | None, _serving("--port", metavar="N", help="0 takes a free one and prints it. Default: the first free one from 7860 on.")
    ] = None,
    share: Annotated[bool, _serving("--share", help="Have Gradio make a public link, through its own servers.")] = False,
    queue: Annotated[int, _serving("--queue", metavar="N", help="Requests that may wait; others are told that the queue is full.")] = 64,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Open a page that shows it all: compare, plan, steer, text and steps.

    [bold]Examples[/bold]

    \b
    hasten demo
    hasten demo --model ./my-pipeline --port 8080
    hasten demo --host 0.0.0.0 --queue 16

    Compare: plain beside accelerated, timed in turns, with the plan that was executed. Plan: solve for one, edit its cells, save it.
    Steer: particles step by step, and other methods in the same time. Text: tokens as they are committed. Steps: the distilled student
    beside its teacher; it and Text use the models that ship. Works offline and on a CPU. A link keeps the settings. Needs hasten\\[demo].
    """
    from hasten.app.demo.command import DemoOptions
    from hasten.app.demo.command import demo as work

    work(DemoOptions(model, host, port, share, queue, dtype, device))


@app.command()
def bench(
    name: Annotated[str, typer.Argument(metavar="|".join(BENCHMARKS), help="Which benchmark.")],
    quick: Annotated[bool, typer.Option("--quick", help="Smaller settings: at most ten minutes on two cores.")] = False,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write rows and bars as JSON.")] = None,
) -> None:
    """Run a benchmark: variants in turns in one run, compared as ratios.

    [bold]Example[/bold]

    \b
    hasten bench caching --quick --json caching.json

    caching: Delta-DiT against fewer steps, what the runtime costs. caching-rivals: the planner against cache-dit, diffusers' own caches
    and fewer steps (about an hour; the others' packages come with \\[bench]). caching-policy: BAC and the planner in a robot's policy.
    caching-cachequant: the parts of CacheQuant on a UNet. caching-compiled: caching with blocks compiled by torch.compile.
    decoding: every schedule of text diffusion, for answers and for forwards. steering: FK, halving and noise search beside best-of-N in
    equal time (about half an hour). kernels: the fused CUDA kernels on a GPU, checked, then timed beside PyTorch (ten minutes).
    batch: hasten batch beside a plain loop of every batch size, and a thousand jobs under kill -9 (half an hour).
    """
    from importlib import import_module

    from hasten.app.files import check_target

    if name not in BENCHMARKS:
        raise errors.BadInput(f"NAME must be one of {', '.join(BENCHMARKS)}, not {name!r}")
    if json is not None:
        check_target("--json", json)
    raise typer.Exit(import_module(f"hasten.benchmarks.{BENCHMARKS[name]}").run(quick, json))


def main() -> None:
    """The console script."""
    app(prog_name="hasten")
