"""What every benchmark shares: the machine, interleaved timing, paired statistics, the writers of JSON and Markdown, and the whole run.

Variants take turns within one process and are compared as ratios of neighbouring runs, so that what the machine does beside
(another job, a change of clock) falls on all of them alike. Absolute times mean something on one machine only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hasten._version import __version__


class BenchError(ValueError):
    """A benchmark cannot be run as asked; the message is one line that names what is wrong."""


# ------------------------------------------------------------------------------------------------------------ surroundings


def machine() -> dict[str, Any]:
    """What was measured on: processor, cores this process may use, torch's threads, memory, system, and how busy it was.

    No host name, user or path: the numbers are published.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if hasattr(os, "getloadavg"):
        found["load_at_start"] = round(os.getloadavg()[0], 2)
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of hasten, Python and the packages that decide how fast it is."""
    found = {"hasten": __version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "numpy"):
        found[name] = metadata.version(name)
    return found


def results_page(name: str) -> Path | None:
    """`docs/results/NAME.md` of the source checkout this file lies in, or None where it is installed."""
    root = Path(__file__).resolve().parents[1]
    return root / "docs" / "results" / f"{name}.md" if (root / "pyproject.toml").is_file() else None


def steady_memory() -> None:
    """Has glibc's allocator keep what is freed, as CUDA's does, for the rest of the process.

    By default it hands tensors of a megabyte back to the system, and getting them again costs a page fault every four kilobytes. How
    many there are depends on what else was allocated when, and moves the time of the same plain run by ten percent and more.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another C library; its ways are left as they are
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    mallopt(m_mmap_threshold, 32 << 20)  # the most that glibc takes
    mallopt(m_trim_threshold, (1 << 31) - 1)
    mallopt(m_top_pad, 256 << 20)


# ------------------------------------------------------------------------------------------------------------------ timing


@dataclass(frozen=True)
class Timing:
    """One run.

    Attributes:
        seconds: Of the part that is compared.
        call_seconds: Of the whole call around it.
        processor_seconds: What the process's threads spent on `seconds`; other jobs on the machine hardly change it.
    """

    seconds: float
    call_seconds: float
    processor_seconds: float = 0.0


@dataclass(frozen=True)
class Variant:
    """One way to do the same work.

    Attributes:
        run: Does it for the given round and says how long it took; anything else it makes, it keeps itself.
        rounds: Takes part in the first so many rounds only; None in all.
    """

    name: str
    run: Callable[[int], Timing]
    rounds: int | None = None


def interleave(
    variants: Sequence[Variant],
    rounds: int,
    *,
    least: int | None = None,
    deadline: float | None = None,
    done: Callable[[], None] = lambda: None,
) -> dict[str, list[Timing]]:
    """Runs all variants once a round, every other round in reverse, so that none is always the first or the last.

    Args:
        rounds: How many rounds.
        least: Rounds that are made even after the deadline; all of them unless told.
        deadline: `time.monotonic()` after which no further round begins.
        done: Called after each run.

    Returns:
        For each variant its timings by round.
    """
    least = rounds if least is None else least
    timings: dict[str, list[Timing]] = {variant.name: [] for variant in variants}
    for r in range(rounds):
        if r >= least and deadline is not None and time.monotonic() > deadline:
            break
        for variant in variants if r % 2 == 0 else variants[::-1]:
            if variant.rounds is None or r < variant.rounds:
                timings[variant.name].append(variant.run(r))
                done()
    return timings


@dataclass(frozen=True)
class Ratios:
    """How much longer something takes than the base, one value a round: by the clock, and in processor time."""

    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


def paired_ratios(
    base: Callable[[], Timing],
    others: Mapping[str, Callable[[], Timing]],
    *,
    rounds: int,
    least: int = 6,
    width: float = 0.0,
    deadline: float | None = None,
    done: Callable[[], None] = lambda: None,
) -> dict[str, Ratios]:
    """How much longer each of `others` takes than `base`, from many short runs: for differences of a percent or less.

    A round runs all of them and then all again in reverse (A B C C B A), which cancels a steady drift; who begins rotates.
    The first run of each is thrown away.

    Args:
        base, others: Do the work once and time it.
        rounds: Most rounds.
        least: Fewest rounds, whatever the deadline says.
        width: Stops early once the 95% interval of every median is at most this wide (whatever the median is).
        deadline: `time.monotonic()` after which no further round begins.
        done: Called after each round.

    Returns:
        For each of `others` its ratios.
    """
    runs = {"": base, **others}
    names = list(runs)
    for run in runs.values():
        run()
    ratios = {name: Ratios() for name in others}
    for r in range(rounds):
        if r >= least:
            spans = [high - low for low, high in (median_interval(found.clock) for found in ratios.values())]
            if max(spans) <= width or (deadline is not None and time.monotonic() > deadline):
                break
        shift = r % len(names)
        order = names[shift:] + names[:shift]
        clock, processor = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for name in order + order[::-1]:
            timing = runs[name]()
            clock[name] += timing.seconds
            processor[name] += timing.processor_seconds
        for name, found in ratios.items():
            found.clock.append(clock[name] / clock[""])
            if processor[""] > 0:
                found.processor.append(processor[name] / processor[""])
        done()
    return ratios


# -------------------------------------------------------------------------------------------------------------- statistics


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval for the median from order statistics: holds whatever the distribution is.

    With fewer than six values no interval reaches 95%; then it is their whole range.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("values is empty: there is no median")
    ordered, n = sorted(values), len(values)
    skip, tail = 0, 0.5**n + n * 0.5**n
    # Without `skip` values at each end, the interval misses when at most `skip` values lie on one side of the median.
    while 2 * tail <= 1 - confidence:
        skip += 1
        tail += math.comb(n, skip + 1) * 0.5**n
    return ordered[skip], ordered[n - 1 - skip]


def wilson(right: int, n: int) -> tuple[float, float]:
    """95% interval of a rate: `right` of `n` (Wilson's score interval)."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Difference:
    """A difference of two rates with its 95% interval."""

    value: float
    low: float
    high: float


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> Difference:
    """By how much the rate of `after` exceeds that of `before`, on the same items in the same order.

    The interval is Wald's with half an item added to each cell of the 2 x 2 table (Agresti and Min, 2005), so that it has a width
    also where no item changed.

    Raises:
        ValueError: The sequences are empty or of different length.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"before and after must have the same length, at least 1; they have {len(before)} and {len(after)}")
    gained = sum(1 for b, a in zip(before, after, strict=True) if a and not b)
    lost = sum(1 for b, a in zip(before, after, strict=True) if b and not a)
    n, up, down = len(before) + 2.0, gained + 0.5, lost + 0.5
    centre = (up - down) / n
    half = 1.959964 * math.sqrt(max(0.0, up + down - (up - down) ** 2 / n)) / n
    value = (gained - lost) / len(before)
    return Difference(value, max(-1.0, min(value, centre - half)), min(1.0, max(value, centre + half)))


# ---------------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Bar:
    """What an issue demands, and what was measured."""

    name: str
    value: float
    limit: float
    holds: bool
    note: str

    @classmethod
    def at_most(cls, name: str, value: float, limit: float, note: str = "") -> Bar:
        """Holds where `value` is `limit` or less."""
        return cls(f"{name}, at most", value, limit, value <= limit, note)

    @classmethod
    def at_least(cls, name: str, value: float, limit: float, note: str = "") -> Bar:
        """Holds where `value` is `limit` or more."""
        return cls(f"{name}, at least", value, limit, value >= limit, note)


@dataclass
class Results:
    """All that a benchmark found.

    Attributes:
        rows: One for each model and variant; plain data.
        bars: One for each bar of the issue, computed from the rows and the settings' measurements.
        settings: What it was run with, so that it can be run again.
    """

    name: str
    quick: bool
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=machine)
    versions: dict[str, str] = field(default_factory=versions)

    def to_json(self) -> dict[str, Any]:
        """Plain data; a value that is not finite (the PSNR of identical pictures) becomes None."""
        return {
            "name": self.name,
            "quick": self.quick,
            "machine": self.machine,
            "versions": self.versions,
            "settings": self.settings,
            "rows": [_finite(row) for row in self.rows],
            "bars": [_finite(asdict(bar)) for bar in self.bars],
        }

    def write_json(self, path: Path) -> None:
        """Writes the results; an interrupted write leaves no half file."""
        write_text(path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    @property
    def all_hold(self) -> bool:
        """Whether every bar holds."""
        return all(bar.holds for bar in self.bars)


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def check_target(path: Path | None, argument: str) -> None:
    """Finds out before hours of work whether a file can be written.

    Raises:
        BenchError: Its folder does not exist and cannot be made, is not writable, or the path is a folder.
    """
    if path is None:
        return
    if path.is_dir():
        raise BenchError(f"{argument} must be a file, but {path} is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise BenchError(f"{argument} cannot be written: {path} ({error.strerror})") from None


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8") as scratch:
        try:
            scratch.write(text)
            scratch.close()
            os.chmod(scratch.name, 0o644)  # temporary files are made for their owner alone
            os.replace(scratch.name, path)
        except BaseException:
            os.unlink(scratch.name)
            raise


def read_results(path: Path, name: str) -> dict[str, Any]:
    """The JSON that benchmark `name` wrote, for `--assemble`.

    Raises:
        BenchError: The file cannot be read, or holds something else.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"--assemble: {path} cannot be read as results: {error}") from None
    if data.get("name") != name:
        raise BenchError(f"--assemble: {path} holds no results of this benchmark")
    return data


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """A Markdown table, padded so that it reads well in a terminal too.

    Args:
        left: Heads of the columns that are flush left besides the first; the others are flush right.
    """
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    flush = [i == 0 or name in left for i, name in enumerate(head)]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.ljust(width) if to_left else cell.rjust(width) for cell, width, to_left in zip(cells, widths, flush, strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = "|".join("-" * (width + 2) if to_left else "-" * (width + 1) + ":" for width, to_left in zip(widths, flush, strict=True))
    return "\n".join([line(head), f"|{rule}|", *map(line, rows)])


def bars_table(bars: Sequence[Bar]) -> str:
    """The bars as a table."""
    rows = [(bar.name, f"{bar.value:.4g}", f"{bar.limit:g}", "yes" if bar.holds else "NO", bar.note) for bar in bars]
    return table(("bar", "measured", "limit", "holds", "note"), rows, left=("note",))


def surroundings(results: Results) -> str:
    """Machine and versions as Markdown lines."""
    m = results.machine
    parts = [m["processor"], f"{m['cores']} cores", f"{m['threads']} torch threads"]
    if "memory_gib" in m:
        parts.append(f"{m['memory_gib']:g} GiB")
    parts.append(m["system"])
    if "load_at_start" in m:
        parts.append(f"load {m['load_at_start']:g} at the start")
    return f"Machine: {', '.join(parts)}.\n\nVersions: {', '.join(f'{name} {version}' for name, version in results.versions.items())}."


def bars_last(results: Results, title: str, *parts: str) -> str:
    """A Markdown page: who wrote it and on what machine, then the parts, and the bars at the end."""
    head = [f"# {title}", f"Written by `hasten bench {results.name}`, never by hand.", surroundings(results)]
    return "\n\n".join([*head, *parts, "## Bars", bars_table(results.bars)]) + "\n"


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest."""
    return statistics.median(values), min(values), max(values)


# --------------------------------------------------------------------------------------------------------- the whole run

Note = Callable[[str, int | None], Callable[[], None]]
"""Adds a line to the progress bar: given its text and how many runs there will be (None where nobody knows), returns what to call after
each of them."""


def unnoted(text: str, total: int | None) -> Callable[[], None]:
    """A `Note` that shows nothing."""
    return lambda: None


@contextmanager
def progress_bar() -> Iterator[Note]:
    """A progress bar on stderr, so that stdout has nothing but results. It appears with its first line: what is refused before anything
    ran leaves one line there and no empty bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True))

    def note(text: str, total: int | None) -> Callable[[], None]:
        progress.start()
        task = progress.add_task(text, total=total)
        return lambda: progress.advance(task)

    try:
        yield note
    finally:
        if progress.tasks:
            progress.stop()


def publish(results: Results, docs: Path, page: Callable[[Results], str], pictures: Callable[[Results, Path], None] | None = None) -> None:
    """Writes the page; its pictures go into the folder `pictures` beside the page's own."""
    if pictures is not None:
        pictures(results, docs.parent.parent / "pictures")
    write_text(docs, page(results))


def shown_bars(results: Results) -> str:
    """What is printed unless a benchmark has more to show."""
    return bars_table(results.bars)


def refused(name: str, error: BenchError) -> int:
    """Says in one line on stderr why a benchmark was not run; returns the exit code for that."""
    print(f"hasten bench {name}: {error}", file=sys.stderr)
    return 2


def conduct(
    name: str,
    execute: Callable[..., Results],
    page: Callable[[Results], str],
    settings: Mapping[str, Any],
    *,
    json_path: Path | None,
    docs: Path | None,
    pictures: Callable[[Results, Path], None] | None = None,
    shown: Callable[[Results], str] = shown_bars,
) -> int:
    """A benchmark from beginning to end: its files are tried, it is carried out under a progress bar, written down and printed.

    Args:
        name: As `hasten bench NAME` knows it.
        execute: Measures; called with `settings` and a `note` by name.
        page: The results as Markdown.
        settings: Arguments of `execute`.
        json_path: Where the JSON goes, or None.
        docs: Where the page goes, or None.
        pictures: Draws the page's pictures into a folder.
        shown: What is printed at the end, the bars last.

    Returns:
        Exit code: 0 where every bar holds, 1 where one does not, 2 where it could not be run as asked (one line on stderr).
    """
    try:
        check_target(json_path, "--json")
        check_target(docs, "--docs")
        with progress_bar() as note:
            results = execute(**settings, note=note)
    except BenchError as error:
        return refused(name, error)
    if json_path is not None:
        results.write_json(json_path)
    if docs is not None:
        publish(results, docs, page, pictures)
    print(shown(results))
    return 0 if results.all_hold else 1


def command_line(module: str, about: str | None, page: str = "docs/results of the checkout") -> argparse.ArgumentParser:
    """The parser of `python -m hasten.benchmarks.MODULE`, with `--json` and `--docs`.

    Args:
        about: The first line is shown; a module's `__doc__` will do.
        page: Where the page goes unless told.
    """
    parser = argparse.ArgumentParser(prog=f"python -m hasten.benchmarks.{module}", description=(about or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--docs", type=Path, metavar="FILE", help=f"write the page there (default: {page})")
    return parser


def run_from_command_line(
    run: Callable[..., int],
    parser: argparse.ArgumentParser,
    settings: Mapping[str, tuple[Any, str]],
    arguments: Sequence[str] | None,
) -> int:
    """Calls `run` with settings that are whole numbers, or tuples of them, from the command line.

    Args:
        run: Takes `quick`, `json_path` and `docs`, and the settings by name.
        parser: Of `command_line`.
        settings: For each what it is unless told, and what it means.
        arguments: Those of the process unless given.

    Returns:
        What `run` returns.
    """
    for name, (usual, meaning) in settings.items():
        many = "+" if isinstance(usual, tuple) else None
        parser.add_argument(f"--{name}", type=int, nargs=many, default=usual, help=f"{meaning} (default: %(default)s)")
    options = vars(parser.parse_args(arguments))
    return run(False, options.pop("json"), options.pop("docs"), **options)
