"""The options of `hasten batch`; what it does stands in `hasten.app.batch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.app.options import (
    DRAWING,
    OUTPUT,
    STEERING,
    BoundaryOption,
    BudgetOption,
    CachedOption,
    DeviceOption,
    DtypeOption,
    IntervalOption,
    JsonFlag,
    KernelOption,
    MethodOption,
    MicroBatchOption,
    ModelOption,
    ParticlesOption,
    PlanOption,
    PresetOption,
    RewardOption,
    RoundsOption,
    SearchOption,
    SetOption,
    SkipOption,
    SteerOption,
    ThresholdOption,
)

RUNNING = "Running"


def batch(
    jobs: Annotated[str, typer.Argument(metavar="JOBS", help="JSON lines, or CSV where the name ends in .csv or .tsv; - for stdin.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for pictures and manifest.", rich_help_panel=OUTPUT)],
    model: ModelOption = "shapes",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    defaults: Annotated[
        Path | None,
        typer.Option("--defaults", metavar="FILE", help="YAML: what holds where a line says nothing.", rich_help_panel=DRAWING),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", "-n", metavar="N", help="Default of the lines: denoising steps.", rich_help_panel=DRAWING)
    ] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", "-g", metavar="G", help="Default: guidance scale.", rich_help_panel=DRAWING)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", "-s", metavar="S", help="A line without a seed, number i from 0, has S + i.", rich_help_panel=DRAWING),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="WxH", help="Default: pixels, such as 1024x768.", rich_help_panel=DRAWING)
    ] = None,
    method: MethodOption = None,
    interval: IntervalOption = None,
    threshold: ThresholdOption = None,
    skip_guidance: SkipOption = None,
    cached: CachedOption = None,
    boundary: BoundaryOption = None,
    preset: PresetOption = None,
    plan: PlanOption = None,
    steer: SteerOption = None,
    search: SearchOption = None,
    reward: RewardOption = None,
    particles: ParticlesOption = None,
    rounds: RoundsOption = None,
    settings: SetOption = None,
    kernel: KernelOption = None,
    budget: BudgetOption = None,
    micro_batch: MicroBatchOption = None,
    score: Annotated[
        str,
        typer.Option(
            "--score",
            metavar="NAME",
            help="Judges pictures that are not steered, named as --reward names it, or none. Default: shapes for models that ship.",
            rich_help_panel=STEERING,
        ),
    ] = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", metavar="N", help="Pictures at a time. Default: measured once, within free memory.", rich_help_panel=RUNNING
        ),
    ] = None,
    on_error: Annotated[
        str,
        typer.Option("--on-error", metavar="stop|skip", help="With bad lines: draw nothing, or leave them out.", rich_help_panel=RUNNING),
    ] = "stop",
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try jobs again that failed in an earlier run.", rich_help_panel=RUNNING)
    ] = False,
    workers: Annotated[
        int, typer.Option("--workers", metavar="N", help="Start N processes here, each with a GPU of its own.", rich_help_panel=RUNNING)
    ] = 1,
    array: Annotated[
        str | None,
        typer.Option(
            "--array",
            metavar="INDEX/COUNT",
            help="One of COUNT tasks of a scheduler, from 0: begins with its own share, then helps the others, and waits for none.",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", metavar="local|ray", help="ray: on the actors of a Ray cluster.", rich_help_panel=RUNNING)
    ] = "local",
    manifest: Annotated[
        str, typer.Option("--manifest", metavar="jsonl|parquet", help="Form of the manifest.", rich_help_panel=OUTPUT)
    ] = "jsonl",
    report: Annotated[bool, typer.Option("--report", help="Also write report.html, a contact sheet.", rich_help_panel=OUTPUT)] = False,
    json: JsonFlag = False,
) -> None:
    """Draw pictures from a file of jobs, and lose none of them.

    A job is a line: [bold]{"prompt": "a small red circle", "seed": 7, "steps": 20}[/bold]. It may say prompt, negative_prompt, id, seed,
    size (or width and height), steps, guidance, everything under Caching and under Steering below by the option's name with _ for -, and
    whatever else the pipeline's call takes. Only prompt is needed.

    Stop it in any way, even with kill -9, and run the same command again: it goes on. Bad lines are all reported before anything runs.

    [bold]Examples[/bold]

    \b
    hasten batch jobs.jsonl --out pictures --report
    hasten batch jobs.csv --out pictures --defaults defaults.yaml --manifest parquet
    hasten batch jobs.jsonl --out pictures -m ./my-pipeline --steps 20 --method first-block
    hasten batch jobs.jsonl --out pictures --workers 4               # one machine, four processes
    accelerate launch -m hasten batch jobs.jsonl --out /shared/pictures  # or torchrun, srun
    hasten batch jobs.jsonl --out /shared/pictures --array $SLURM_ARRAY_TASK_ID/16
    hasten batch jobs.jsonl --out pictures --engine ray              # a Ray cluster
    hasten batch jobs.jsonl --out pictures --retry-failed

    DIR gets images/ID.png, with all settings in its text, and a manifest with one row for each job: status, path, hash of the pixels,
    seconds, score, hash of the plan, error. Exit codes: 0 all done, 1 some failed (their rows say why), 2 bad input, 130 Ctrl-C.
    """
    from hasten.app.batch.begin import Wanted
    from hasten.app.batch.command import BatchOptions
    from hasten.app.batch.command import batch as work
    from hasten.app.batch.reading import read_defaults

    flags = {
        "steps": steps, "guidance": guidance, "seed": seed, "size": size, "method": method, "interval": interval, "threshold": threshold,
        "skip_guidance": skip_guidance, "cached": cached, "boundary": boundary, "preset": preset,
        "plan": None if plan is None else str(plan), "steer": steer, "search": search, "reward": reward, "particles": particles,
        "rounds": rounds, "set": settings, "kernel": kernel, "budget": budget, "micro_batch": micro_batch,
    }  # fmt: skip
    given = {name: value for name, value in flags.items() if value is not None}
    wanted = Wanted(model, dtype, device, None if score == "none" else score, batch_size)
    options = BatchOptions(
        jobs, out, wanted, {**(read_defaults(defaults) if defaults is not None else {}), **given}, on_error, retry_failed, workers, array,
        engine, manifest, report,
    )  # fmt: skip
    raise typer.Exit(work(options).show(json))
