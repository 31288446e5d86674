"""`hasten batch`: from a file of jobs to a folder of pictures and a manifest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hasten.app import files
from hasten.app.batch.begin import Wanted, begun, settled
from hasten.app.batch.folder import BatchPlan, Folder, batches_of, list_hash
from hasten.app.batch.jobs import Job, Rules
from hasten.app.batch.locks import SETUP
from hasten.app.batch.manifest import check_format, failures, merge
from hasten.app.batch.painter import Painter
from hasten.app.batch.progress import BatchBar
from hasten.app.batch.ranks import Rank, find_rank, use_gpu
from hasten.app.batch.reading import call_arguments, read_jobs
from hasten.app.batch.stopping import Stopper
from hasten.app.batch.work import Ledger, work
from hasten.app.drawing import check_number
from hasten.app.errors import FAILURE, OK, BadInput
from hasten.app.models import DEVICES, DTYPES, choose_model
from hasten.app.output import Outcome
from hasten.app.rewards import choose_reward

ENGINES = ("local", "ray")
SHOWN = 5
"""Failed jobs that the summary names."""


@dataclass(frozen=True)
class BatchOptions:
    """What the command line says.

    Attributes:
        source: A file of jobs, or "-".
        out: The folder.
        wanted: Model and batch size.
        defaults: Of the jobs.
        on_error: "stop" or "skip", for bad lines.
        retry_failed: Whether jobs that failed are tried again.
        workers: Processes that are started here.
        array: INDEX/COUNT.
        engine: One of `ENGINES`.
        manifest: One of `hasten.app.batch.manifest.FORMATS`.
        report: Whether a contact sheet is written.
    """

    source: str
    out: Path
    wanted: Wanted = Wanted()  # noqa: RUF009  frozen
    defaults: Mapping[str, Any] = field(default_factory=dict)
    on_error: str = "stop"
    retry_failed: bool = False
    workers: int = 1
    array: str | None = None
    engine: str = "local"
    manifest: str = "jsonl"
    report: bool = False


def batch(options: BatchOptions) -> Outcome:
    """Draws the jobs that are not done yet.

    Raises:
        BadInput: An option, a default or a line of the file is not allowed, or the folder is another list's; nothing was drawn.
        WriteError: The folder cannot be written any more. What was written is whole.
    """
    rank = _checked(options)
    choice = choose_model(options.wanted.model)
    rules = Rules(choice.shipped, call_arguments(choice))
    listed = read_jobs(options.source, options.defaults, rules)
    for line in listed.errors:
        print(f"{'skipped: ' if options.on_error == 'skip' else ''}{line}", file=sys.stderr)
    if listed.errors and (options.on_error == "stop" or not listed.jobs):
        bad, total = len(listed.errors), len(listed.errors) + len(listed.jobs)
        hint = "; --on-error skip leaves them out" if listed.jobs else ""
        raise BadInput(f"{bad} of {total} lines of JOBS {'is' if bad == 1 else 'are'} not allowed, so nothing was drawn{hint}")
    with Stopper() as stopper:
        folder = Folder(options.out)
        try:
            run = Run(options, listed.jobs, rules, folder, stopper, rank)
            return run.outcome(skipped=len(listed.errors))
        finally:
            folder.close()


def _checked(options: BatchOptions) -> Rank:
    """What can be checked at once.

    Raises:
        BadInput: Something is not allowed.
    """
    wanted = options.wanted
    for option, value, allowed in (
        ("--on-error", options.on_error, ("stop", "skip")),
        ("--engine", options.engine, ENGINES),
        ("--dtype", wanted.dtype, DTYPES),
        ("--device", wanted.device, DEVICES),
    ):
        if value not in allowed:
            raise BadInput(f"{option} must be {' or '.join(allowed)}, not {value!r}")
    check_number("--batch-size", wanted.batch_size, 1, whole=True)
    check_number("--workers", options.workers, 1, whole=True)
    check_format(options.manifest)
    if wanted.score not in ("auto", None):
        try:
            choose_reward(str(wanted.score))
        except BadInput as why:
            raise BadInput(str(why).replace("--reward", "--score")) from None
    rank = find_rank(options.array)
    if options.workers > 1 and (options.array is not None or rank.share.world > 1):
        raise BadInput("--workers starts processes of its own; leave it out under a launcher, or with --array")
    if options.engine == "ray":
        if options.workers > 1 or options.array is not None:
            raise BadInput("--engine ray starts its own processes; leave out --workers and --array")
        from hasten.app.batch.ray_engine import check_ray

        check_ray()
    if options.source == "-" and rank.share.world > 1:
        raise BadInput("JOBS must be a file where several processes read it, not - for stdin")
    files.check_folder("--out", options.out)
    return rank


@dataclass
class Run:
    """One run of the command on a folder that is open."""

    options: BatchOptions
    jobs: Sequence[Job]
    rules: Rules
    folder: Folder
    stopper: Stopper
    rank: Rank

    def outcome(self, skipped: int) -> Outcome:
        """Draws what is missing, merges the manifest, and says how it went."""
        began = time.monotonic()
        with BatchBar(len(self.jobs), shown=self.rank.share.rank == 0) as bar:
            plan = self._draw(bar)
        if plan is None:  # stopped before there was one
            raise SystemExit(self.stopper.code)
        batches = batches_of(self.jobs, plan.batch_size)
        rows = merge(self.folder, batches, self.jobs, self.options.manifest)
        if self.options.report:
            from hasten.app.batch.report import report_page

            self.folder.write_manifest("report.html", report_page(rows, self.jobs, plan).encode())
        bad, left = failures(rows), len(self.jobs) - len(rows)
        data = {
            "out": str(self.options.out),
            "jobs": len(self.jobs),
            "done": len(rows) - len(bad),
            "failed": len(bad),
            "left": left,
            "skipped_lines": skipped,
            "seconds": time.monotonic() - began,
            "images_per_second": bar.pace,
            "processor_seconds": bar.processor_seconds,
            "batch_size": plan.batch_size,
            "batch_size_from": plan.how,
            "manifest": str(self.options.out / f"manifest.{self.options.manifest}"),
            "report": str(self.options.out / "report.html") if self.options.report else None,
            "errors": [{"id": row["id"], "error": row["error"]} for row in bad],
        }
        if self.stopper.asked():
            code = self.stopper.code
        else:
            unfinished = left > 0 and self.rank.share.wait
            code = FAILURE if bad or unfinished else OK
        return Outcome(data, "\n".join(_summary(data, self.stopper.asked())), code)

    def _draw(self, bar: BatchBar) -> BatchPlan | None:
        if self.options.engine == "ray":
            from hasten.app.batch.ray_engine import draw_with_ray

            return draw_with_ray(self.folder, self.options.wanted, self.jobs, self.options.retry_failed, self.stopper, bar)
        if self.options.workers > 1:
            return self._with_workers(bar)
        return self._alone(bar)

    # ----------------------------------------------------------------------------------------------------------- one process

    def _alone(self, bar: BatchBar) -> BatchPlan:
        return draw_share(self.folder, self.options.wanted, self.jobs, self.rank, self.options.retry_failed, self.stopper, bar)

    # ------------------------------------------------------------------------------------------------------------- several

    def _with_workers(self, bar: BatchBar) -> BatchPlan | None:
        """Starts processes and watches the folder until they have ended."""
        wanted, hash_ = self.options.wanted, list_hash(self.jobs)
        self.folder.locks.take(SETUP)
        try:
            plan = self.folder.check(self.jobs, model=wanted.model, batch_size=wanted.batch_size, hash_=hash_)
            if plan is None:
                self.folder.keep_jobs(self.jobs)
        finally:
            self.folder.locks.release(SETUP)
        if plan is not None and not self.options.retry_failed:
            ledger = Ledger(self.folder, batches_of(self.jobs, plan.batch_size))
            _catch_up(ledger, bar)
            if ledger.done:
                return plan
            bar.done = bar.failed = 0
        self.stopper.patient = True
        workers = [self._worker(number) for number in range(self.options.workers)]
        try:
            plan = self._watch(workers, bar)
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.terminate()
            for worker in workers:
                worker.wait()
        return plan

    def _worker(self, number: int) -> subprocess.Popen[bytes]:
        """A process in a session of its own, so that Ctrl-C reaches it through this one, once."""
        told = {"out": str(self.options.out), "wanted": asdict(self.options.wanted), "retry_failed": self.options.retry_failed}
        count = str(self.options.workers)
        ranks = {"RANK": str(number), "WORLD_SIZE": count, "LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": count}
        command = [sys.executable, "-m", "hasten.app.batch.worker", json.dumps(told)]
        return subprocess.Popen(command, env={**os.environ, **ranks}, stdin=subprocess.DEVNULL, start_new_session=True)

    def _watch(self, workers: Sequence[subprocess.Popen[bytes]], bar: BatchBar) -> BatchPlan | None:
        ledger: Ledger | None = None
        plan: BatchPlan | None = None
        told: set[int] = set()
        forwarded = False
        while True:
            alive = [worker for worker in workers if worker.poll() is None]
            if plan is None:
                plan = self.folder.plan
                if plan is not None:
                    ledger = Ledger(self.folder, batches_of(self.jobs, plan.batch_size), self.options.retry_failed)
                    _catch_up(ledger, bar)
                    bar.begin()
            elif ledger is not None:
                _catch_up(ledger, bar)
            for number, worker in enumerate(workers):
                if worker.returncode is not None and worker.returncode < 0 and number not in told and not forwarded:
                    told.add(number)
                    others = "the others take over its jobs" if alive else "none is left; the same command goes on"
                    print(f"worker {number} was ended by signal {-worker.returncode}; {others}", file=sys.stderr)
            if self.stopper.asked() and not forwarded:
                forwarded = True
                for worker in alive:
                    worker.terminate()
            if not alive:
                if plan is None and not self.stopper.asked():  # they have said why
                    raise SystemExit(max(FAILURE, *(worker.returncode for worker in workers)))
                return plan
            time.sleep(0.1)


def draw_share(
    folder: Folder, wanted: Wanted, jobs: Sequence[Job], rank: Rank, retry_failed: bool, stopper: Stopper, bar: BatchBar
) -> BatchPlan:
    """One process's work: settles the plan with the others, then draws batches until none is left.

    Raises:
        BadInput: The folder belongs to another list, or a job asks for what the pipeline does not take.
        WriteError: The folder cannot be written.
    """
    use_gpu(rank.local)
    made: list[Painter] = []

    def make() -> BatchPlan:
        made.append(wanted.painter())
        return settled(wanted, made[0], jobs, rank.neighbours, rank.share.world, bar.say)

    plan = begun(folder, wanted, jobs, make)
    batches = batches_of(jobs, plan.batch_size)
    folder.sweep(len(batches))
    ledger = Ledger(folder, batches, retry_failed)
    _catch_up(ledger, bar)
    if not ledger.done:
        painter = made[0] if made else wanted.painter(plan)
        bar.begin()
        stopper.patient = True
        work(folder, painter, ledger, rank.share, stop=stopper.asked, progress=bar)
        folder.sweep(len(batches))
    return plan


def _catch_up(ledger: Ledger, bar: BatchBar) -> None:
    for rows in ledger.news():
        bar.batch(rows)


def _summary(data: Mapping[str, Any], stopped: bool) -> list[str]:
    """For people."""
    lines = [f"failed: {entry['id']}: {entry['error']}" for entry in data["errors"][:SHOWN]]
    if data["failed"] > SHOWN:
        lines.append(f"failed: {data['failed'] - SHOWN} more, in the manifest")
    if data["failed"]:
        lines.append("--retry-failed tries them again")
    pace = f", {data['images_per_second']:.2f} pictures a second" if data["images_per_second"] else ""
    counts = f"{data['done']} of {data['jobs']} pictures in {data['out']}/images"
    lines.append(f"{counts}, {data['failed']} failed, {data['left']} left; {data['seconds']:.1f} s{pace}, batches of {data['batch_size']}")
    if stopped:
        lines.append("stopped; the same command goes on from here")
    lines += [str(data[name]) for name in ("manifest", "report") if data[name] is not None]
    return lines


def run_worker(told: Mapping[str, Any]) -> int:
    """The work of a process that `--workers` started; returns its exit code.

    Args:
        told: Its folder, what is wanted and whether failed jobs are tried again.
    """
    wanted = Wanted(**told["wanted"])
    choice = choose_model(wanted.model)
    rules = Rules(choice.shipped, call_arguments(choice))
    with Stopper() as stopper:
        folder = Folder(Path(told["out"]))
        try:
            jobs = folder.jobs(rules)
            draw_share(folder, wanted, jobs, find_rank(None), bool(told["retry_failed"]), stopper, BatchBar(len(jobs), shown=False))
        finally:
            folder.close()
    return stopper.code if stopper.asked() else OK
