"""What the tests of batches share: a folder of jobs, and processes that can be killed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hasten.app.batch.begin import Wanted
from hasten.app.batch.command import BatchOptions, batch
from hasten.app.cli import app

COLOURS, SHAPES = ("red", "blue"), ("circle", "square")


def jobs_of(count: int, **more: Any) -> list[dict[str, Any]]:
    """Rows of jobs with prompts that the tiny pipeline's tokenizer knows."""
    return [{"prompt": f"a {COLOURS[i % 2]} {SHAPES[i // 2 % 2]}", "id": f"job-{i:03d}", **more} for i in range(count)]


def write_jobs(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def manifest(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def hashes(out: Path) -> dict[str, str]:
    return {row["id"]: row["sha256"] for row in manifest(out)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Children that are forked have one thread, and their number decides how sums are rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(tiny_pipeline_folder: Path) -> Callable[..., Any]:
    """Runs `hasten batch` in this process on the tiny pipeline."""

    def call(*words: object, input: str | None = None) -> Any:
        arguments = ["batch", *map(str, words), "--model", str(tiny_pipeline_folder)]
        return CliRunner().invoke(app, arguments, input=input)

    return call


class Processes:
    """Runs `hasten batch` in children that are forks of this process, which spares them the imports.

    Args:
        options: What they run.
    """

    def __init__(self, options: BatchOptions) -> None:
        self._options = options
        self.pids: list[int] = []

    def start(self, rank: int = 0, world: int = 1) -> int:
        """Returns the child's number."""
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                os.setsid()
                torch.set_num_threads(1)  # the pool of OpenMP does not outlive a fork
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
                code = batch(self._options).code
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 98
            finally:
                os._exit(code)
        self.pids.append(pid)
        return pid

    def ended(self, pid: int) -> int | None:
        """The child's exit code, negative for a signal; None while it runs."""
        done, status = os.waitpid(pid, os.WNOHANG)
        if not done:
            return None
        self.pids.remove(pid)
        return os.waitstatus_to_exitcode(status)

    def wait(self, pid: int, seconds: float = 60) -> int:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            code = self.ended(pid)
            if code is not None:
                return code
            time.sleep(0.02)
        raise AssertionError(f"process {pid} still runs after {seconds} s")

    def close(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.fixture
def processes(tiny_pipeline_folder: Path) -> Iterator[Callable[..., Processes]]:
    """Makes `Processes`; what still runs at the end is killed."""
    made: list[Processes] = []

    def make(source: Path, out: Path, batch_size: int | None = 4, **more: Any) -> Processes:
        wanted = Wanted(str(tiny_pipeline_folder), batch_size=batch_size)
        made.append(Processes(BatchOptions(str(source), out, wanted, **more)))
        return made[-1]

    yield make
    for one in made:
        one.close()
