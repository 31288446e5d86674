"""`hasten bench batch`: the command beside a plain loop over the same jobs, and a thousand jobs under kill -9.

`hasten batch` is run as its users run it, as a process of its own; what is compared is the drawing and writing, without the loading of
Python and the model. The plain loop is what one would write by hand: batches of one size, a call of the pipeline for each, `image.save`.

    python -m hasten.benchmarks.batch --quick
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from hasten.accelerators.caching.delta_dit import DeltaDiT
from hasten.benchmarks.harness import (
    Bar,
    BenchError,
    Note,
    Results,
    Timing,
    Variant,
    bars_last,
    command_line,
    conduct,
    interleave,
    results_page,
    spread,
    table,
)
from hasten.pipelines.accelerated import accelerate
from hasten.pipelines.zoo.loading import call_defaults, load, path_of
from hasten.pipelines.zoo.shapes.world import sample_scenes

NAME = "batch"
PAGE = results_page(NAME)
CAPTION_SEED = 20_260_110
"""Fixed before the first measurement."""

THROUGHPUT, ROUNDING = 0.95, 1.0
"""The bars: pictures per second over the best plain loop's, and steps of 255 by which a pixel may differ between batch sizes."""

PLAIN, FAST = "hasten batch", "hasten batch, accelerated"
LOOP = "loop, {}"
FAST_LOOP = "accelerated loop, {}"


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        jobs: Of the comparison.
        steps: Denoising steps of its jobs.
        sizes: Of the plain loop's batches.
        fast_size: Of the accelerated loop's batches.
        rounds: Times that each variant is run.
        killed_jobs, killed_steps: Of the runs that are killed.
        killed_batch: Their batch size.
        pause: Seconds between the kills, least and most; each also waits until a picture was drawn since the last.
        rounding_jobs: That are drawn with a second batch size.
    """

    jobs: int = 128
    steps: int = 10
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    fast_size: int = 16
    rounds: int = 3
    killed_jobs: int = 1_000
    killed_steps: int = 4
    killed_batch: int = 8
    pause: tuple[float, float] = (3.0, 8.0)
    rounding_jobs: int = 64

    def __post_init__(self) -> None:
        for name in ("jobs", "steps", "fast_size", "rounds", "killed_jobs", "killed_steps", "killed_batch", "rounding_jobs"):
            if getattr(self, name) < 1:
                raise BenchError(f"{name} must be at least 1, not {getattr(self, name)}")


FULL = Settings()
QUICK = Settings(jobs=32, steps=6, sizes=(1, 4, 8, 16), fast_size=8, rounds=2, killed_jobs=80, pause=(1.0, 3.0), rounding_jobs=32)


# ------------------------------------------------------------------------------------------------------------- the command


def command(jobs: Path, out: Path, *words: str) -> list[str]:
    """`hasten batch` of these jobs, its summary as JSON."""
    return [sys.executable, "-m", "hasten", "batch", str(jobs), "--out", str(out), "--json", *words]


def batch(jobs: Path, out: Path, *words: str) -> dict[str, Any]:
    """Runs it from the beginning; returns its summary.

    Raises:
        BenchError: It failed.
    """
    shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run(command(jobs, out, *words), capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"hasten batch exited with {done.returncode}: {(done.stderr.strip() or done.stdout.strip())[-300:]}")
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def manifest(out: Path) -> dict[str, dict[str, Any]]:
    """Rows by job.

    Raises:
        BenchError: A job has two.
    """
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {row["id"]: row for row in rows}
    if len(found) < len(rows):
        raise BenchError(f"the manifest of {out.name} has {len(rows)} rows for {len(found)} jobs")
    return found


def write_jobs(path: Path, captions: Sequence[str], steps: int, **more: Any) -> Path:
    """A file of jobs with seeds 0, 1, ..."""
    rows = ({"id": f"job-{i:04d}", "prompt": caption, "seed": i, "steps": steps, **more} for i, caption in enumerate(captions))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# -------------------------------------------------------------------------------------------------------------- throughput


@dataclass
class Loop:
    """The plain loop.

    Args:
        captions: Of the jobs; job i has seed i.
        steps: Denoising steps.
        folder: For the pictures.
    """

    captions: Sequence[str]
    steps: int
    folder: Path
    pipe: Any = field(init=False)

    def __post_init__(self) -> None:
        self.pipe = load("shapes")
        self.pipe.set_progress_bar_config(disable=True)
        self._call = {name: value for name, value in call_defaults(path_of("shapes")).items() if name != "num_inference_steps"}

    def run(self, call: Callable[..., Any], size: int) -> Timing:
        """Draws and saves all jobs in batches of `size`."""
        began, processor = time.perf_counter(), time.process_time()
        for start in range(0, len(self.captions), size):
            part = range(start, min(start + size, len(self.captions)))
            images = call(
                prompt=[self.captions[i] for i in part],
                generator=[torch.Generator().manual_seed(i) for i in part],
                num_inference_steps=self.steps,
                use_resolution_binning=False,
                clean_caption=False,
                **self._call,
            ).images
            for i, image in zip(part, images, strict=True):
                image.save(self.folder / f"{i}.png")
        seconds = time.perf_counter() - began
        return Timing(seconds, seconds, time.process_time() - processor)


def throughput(settings: Settings, captions: Sequence[str], folder: Path, note: Note) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Pictures per second of every variant, in turns, and what `hasten batch` settled on."""
    jobs = write_jobs(folder / "jobs.jsonl", captions, settings.steps)
    loop = Loop(captions, settings.steps, folder)
    found: dict[str, Any] = {}

    def ours(name: str, method: str) -> Callable[[int], Timing]:
        def run(_: int) -> Timing:
            words = ("--method", method, "--score", "none", *(("--batch-size", str(found["size"])) if "size" in found else ()))
            summary = batch(jobs, folder / "out", *words)
            found.setdefault("size", summary["batch_size"])  # measured once; the later runs begin new folders with it
            found.setdefault("from", summary["batch_size_from"])
            seconds = len(captions) / summary["images_per_second"]
            return Timing(seconds, summary["seconds"], summary["processor_seconds"])

        return run

    variants = [Variant(LOOP.format(size), lambda _, size=size: loop.run(loop.pipe, size)) for size in settings.sizes]  # type: ignore[misc]
    # A wrapper for each run, as the command makes one: it traces the model in its first call.
    variants.append(
        Variant(FAST_LOOP.format(settings.fast_size), lambda _: loop.run(accelerate(loop.pipe, DeltaDiT()), settings.fast_size))
    )
    variants += [Variant(PLAIN, ours(PLAIN, "none")), Variant(FAST, ours(FAST, "delta-dit"))]
    loop.run(loop.pipe, max(settings.sizes))
    timings = interleave(variants, settings.rounds, done=note("throughput", settings.rounds * len(variants)))
    rows = []
    for name, each in timings.items():
        seconds, least, most = spread([timing.seconds for timing in each])
        row = {
            "model": "shapes",
            "variant": name,
            "seconds": seconds,
            "seconds_min": least,
            "seconds_max": most,
            "images_per_second": len(captions) / seconds,
            "processor_seconds": median(timing.processor_seconds for timing in each),
        }
        rows.append({**row, "rounds": [timing.seconds for timing in each]})
    return rows, found


def throughput_bars(rows: Sequence[Mapping[str, Any]], settings: Settings) -> list[Bar]:
    """`hasten batch` over the best plain loop, and the acceleration it keeps; medians of the rounds' ratios."""
    by_name = {row["variant"]: row for row in rows}
    best = min((by_name[LOOP.format(size)] for size in settings.sizes), key=lambda row: float(row["seconds"]))
    ours, fast = by_name[PLAIN], by_name[FAST]
    loop, fast_loop = by_name[LOOP.format(settings.fast_size)], by_name[FAST_LOOP.format(settings.fast_size)]

    def ratio(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[float]:
        return [x / y for x, y in zip(a["rounds"], b["rounds"], strict=True)]

    over = ratio(best, ours)
    processor = best["processor_seconds"] / ours["processor_seconds"]
    gain, loop_gain = median(ratio(ours, fast)), median(ratio(loop, fast_loop))
    return [
        Bar.at_least(
            "batch: pictures per second over the best plain loop's",
            median(over),
            THROUGHPUT,
            f"{ours['images_per_second']:.2f} against {best['images_per_second']:.2f} of batches of {best['variant'].split()[-1]}; rounds "
            f"{min(over):.2f} to {max(over):.2f}; in processor time {processor:.3f}",
        ),
        Bar.at_least(
            "batch: its speed-up by acceleration over the loop's own",
            gain / loop_gain,
            THROUGHPUT,
            f"Delta-DiT makes `hasten batch` {gain:.2f} times as fast, the loop of batches of {settings.fast_size} {loop_gain:.2f} times",
        ),
    ]


# ---------------------------------------------------------------------------------------------------------------- kill -9


@dataclass
class Killed:
    """Two processes on one folder, of which one dies every few seconds.

    Args:
        jobs: Their file.
        out: Their folder.
        batch_size: Of the plan.
        seed: Of who dies when.

    Attributes:
        kills: So far.
    """

    jobs: Path
    out: Path
    batch_size: int
    seed: int = 0
    kills: int = field(default=0, init=False)

    def start(self, rank: int) -> subprocess.Popen[bytes]:
        """A process as a launcher starts it."""
        ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        words = command(self.jobs, self.out, "--batch-size", str(self.batch_size))
        return subprocess.Popen(words, env={**os.environ, **ranks}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def run(self, pause: tuple[float, float], seen: Callable[[int], None]) -> None:
        """Kills and starts again until both end by themselves.

        Raises:
            BenchError: One ended with an error.
        """
        draw = random.Random(self.seed)
        processes = [self.start(0), self.start(1)]
        ended: set[int] = set()
        since, before = time.monotonic() + draw.uniform(*pause), 0
        while len(ended) < 2:
            for rank, process in enumerate(processes):
                code = process.poll()
                if code is None or rank in ended:
                    continue
                if code == -signal.SIGKILL:
                    processes[rank] = self.start(rank)
                elif code == 0:
                    ended.add(rank)
                else:
                    said = process.stderr.read().decode() if process.stderr is not None else ""
                    raise BenchError(f"hasten batch exited with {code} after {self.kills} kills: {said.strip()[-300:]}")
            count = self.drawn()
            seen(count)
            alive = [rank for rank in (0, 1) if rank not in ended and processes[rank].poll() is None]
            if alive and time.monotonic() > since and count > before:
                processes[draw.choice(alive)].kill()
                self.kills += 1
                since, before = time.monotonic() + draw.uniform(*pause), count
            time.sleep(0.05)

    def drawn(self) -> int:
        """Pictures so far."""
        images = self.out / "images"
        return len(os.listdir(images)) if images.is_dir() else 0


def survived(settings: Settings, captions: Sequence[str], folder: Path, note: Note) -> dict[str, Any]:
    """What is left after the kills, held against a run that nobody disturbed."""
    jobs = write_jobs(folder / "killed.jsonl", captions, settings.killed_steps, method="none")
    told = note("undisturbed", 1)
    calm = batch(jobs, folder / "calm", "--batch-size", str(settings.killed_batch), "--workers", "2")
    told()
    killed = Killed(jobs, folder / "killed", settings.killed_batch)
    told, shown = note("under kill -9", len(captions)), [0]

    def seen(count: int) -> None:
        for _ in range(shown[0], count):
            told()
        shown[0] = max(shown[0], count)

    began = time.monotonic()
    killed.run(settings.pause, seen)
    seconds = time.monotonic() - began
    quiet, loud = manifest(folder / "calm"), manifest(folder / "killed")
    images = sorted(os.listdir(folder / "killed" / "images"))
    decoded = sum(1 for name in images if Image.open(folder / "killed" / "images" / name).convert("RGB").size)
    return {
        "jobs": len(captions),
        "kills": killed.kills,
        "images": len(images),
        "whole_images": decoded,
        "rows": len(loud),
        "done": sum(row["status"] == "done" for row in loud.values()),
        "hashes_unlike": sum(row["sha256"] != loud.get(name, {}).get("sha256") for name, row in quiet.items()),
        "left_over": len(os.listdir(folder / "killed" / ".hasten" / "scratch")),
        "seconds": seconds,
        "calm_seconds": calm["seconds"],
    }


def rounding(settings: Settings, captions: Sequence[str], folder: Path) -> int:
    """The greatest difference of a pixel, in steps of 255, between batches of one size and of another."""
    jobs = write_jobs(folder / "rounding.jsonl", captions, settings.killed_steps, method="none")
    sizes = (settings.killed_batch, settings.killed_batch // 2 + 1)
    for size in sizes:
        batch(jobs, folder / f"size-{size}", "--batch-size", str(size))
    most = 0
    for path in (folder / f"size-{sizes[0]}" / "images").iterdir():
        one, other = (np.asarray(Image.open(folder / f"size-{size}" / "images" / path.name)).astype(int) for size in sizes)
        most = max(most, int(np.abs(one - other).max()))
    return most


def survival_bars(found: Mapping[str, Any], most: int) -> list[Bar]:
    """Nothing lost, nothing twice, every hash as it was."""
    jobs = found["jobs"]
    note = f"of {jobs:,} jobs on two processes, {found['kills']} times kill -9"
    wrong = abs(found["images"] - jobs) + abs(found["rows"] - jobs) + abs(found["whole_images"] - jobs) + abs(found["done"] - jobs)
    return [
        Bar.at_most("kill -9: pictures and rows missing, too many or broken", wrong, 0, note),
        Bar.at_most("kill -9: hashes unlike an undisturbed run's", found["hashes_unlike"], 0, note),
        Bar.at_most("kill -9: files left half written", found["left_over"], 0, note),
        Bar.at_most("across batch sizes: difference of a pixel, in 255ths", most, ROUNDING),
    ]


# ------------------------------------------------------------------------------------------------------------ the whole run


def captions_of(count: int) -> list[str]:
    """Captions of the shapes world."""
    scenes = sample_scenes(count, torch.Generator().manual_seed(CAPTION_SEED), held_out=False, placed=False)
    return [str(caption) for caption in scenes.captions()]


def execute(settings: Settings, quick: bool, note: Note) -> Results:
    """Measures everything."""
    captions = captions_of(max(settings.jobs, settings.killed_jobs, settings.rounding_jobs))
    results = Results(NAME, quick, settings={name: getattr(settings, name) for name in settings.__dataclass_fields__})
    with tempfile.TemporaryDirectory(prefix="hasten-bench-batch-") as folder:
        rows, size = throughput(settings, captions[: settings.jobs], Path(folder), note)
        found = survived(settings, captions[: settings.killed_jobs], Path(folder), note)
        most = rounding(settings, captions[: settings.rounding_jobs], Path(folder))
    results.rows = rows
    results.settings |= {"batch_size": size["size"], "batch_size_from": size["from"], "killed": found}
    results.bars = [*throughput_bars(rows, settings), *survival_bars(found, most)]
    return results


def page(results: Results) -> str:
    """The results as a Markdown page."""
    s, killed = results.settings, results.settings["killed"]
    fastest = max(float(row["images_per_second"]) for row in results.rows if str(row["variant"]).startswith("loop"))
    lines = [
        (
            row["variant"],
            f"{row['images_per_second']:.2f}",
            f"{row['images_per_second'] / fastest:.2f}",
            f"{row['seconds']:.1f} ({row['seconds_min']:.1f} to {row['seconds_max']:.1f})",
            f"{row['processor_seconds']:.1f}",
        )
        for row in results.rows
    ]
    how = s["batch_size_from"]
    speeds = ", ".join(f"{size}: {speed:.2f}" for size, speed in how.get("pictures_per_second", {}).items())
    measured = f"It had measured, in calls of {how.get('steps')} steps, pictures per second by batch size {speeds}. " if speeds else ""
    return bars_last(
        results,
        "Batches, measured",
        "## Pictures per second",
        f"{s['jobs']} jobs of {s['steps']} steps on `shapes`, drawn and saved, {s['rounds']} rounds in turns. Loading is not counted, and "
        "pictures are not scored. `loop, N` calls the plain pipeline with batches of N and saves the pictures; the accelerated ones run "
        f"Delta-DiT. `hasten batch` found a batch size of {s['batch_size']} in its first run. {measured}Beside drawing it writes every "
        "picture with its settings down to the disk, hashes it and keeps its rows.",
        table(("variant", "pictures per second", "over the best loop", "seconds (least to most)", "processor seconds"), lines),
        "## Under kill -9",
        f"{killed['jobs']:,} jobs of {s['killed_steps']} steps in batches of {s['killed_batch']}, on two processes that share a folder. "
        f"After every {s['pause'][0]:g} to {s['pause'][1]:g} seconds in which something was drawn, one of them is killed and started "
        f"again: {killed['kills']} times in {killed['seconds']:.0f} seconds (undisturbed: {killed['calm_seconds']:.0f}). Then there were "
        f"{killed['images']:,} pictures, {killed['whole_images']:,} of them whole, {killed['rows']:,} rows, {killed['hashes_unlike']} "
        f"hashes unlike the undisturbed run's, and {killed['left_over']} files half written.",
    )


def run(quick: bool = False, json_path: Path | None = None, docs: Path | None = None, *, settings: Settings | None = None) -> int:
    """Runs the benchmark, prints the bars and writes the results.

    Args:
        quick: Fewer jobs, within ten minutes on two cores; writes a page only where it is told to.
        json_path: Where the JSON goes, or None.
        docs: Where the page goes; in a source checkout docs/results/batch.md, after a full run.
        settings: In place of the quick or full ones.

    Returns:
        Exit code: 0 where every bar holds, 1 where one does not, 2 where it could not be run as asked (one line on stderr).
    """
    docs = docs if docs is not None or quick else PAGE
    chosen = {"settings": settings or (QUICK if quick else FULL), "quick": quick}
    return conduct(NAME, execute, page, chosen, json_path=json_path, docs=docs)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m hasten.benchmarks.batch`."""
    parser = command_line("batch", __doc__)
    parser.add_argument("--quick", action="store_true", help="within ten minutes on two cores")
    parser.add_argument("--jobs", type=int, help="of the comparison of speeds")
    parser.add_argument("--killed-jobs", type=int, help="of the run that is killed")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    given = {"jobs": options.jobs, "killed_jobs": options.killed_jobs}
    settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
    return run(options.quick, options.json, options.docs, settings=settings)


if __name__ == "__main__":
    raise SystemExit(main())
