"""The output folder: what was asked for, what is done, and how both get there so that nothing is ever half there.

    images/ID.png           the pictures
    manifest.jsonl          one row for each job (or manifest.parquet)
    .hasten/jobs.jsonl      the job list, checked and with defaults filled in
    .hasten/plan.json       which list that is, the batch size, and what else must stay as it was
    .hasten/rows/000012.json    rows of batch 12, written after its pictures
    .hasten/splits/000012.json  into how large parts batch 12 was cut when it did not fit into memory, or one of its jobs failed
    .hasten/lock            the locks; see `hasten.app.batch.locks`
    .hasten/scratch/        what is being written, under the number of its batch

Every file is written under scratch, synchronised with the disk and renamed. Scratch files of a batch belong to whoever holds its lock: who
takes the lock next removes what is left of a dead process.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hasten._version import __version__
from hasten.app.batch.jobs import Job, Rules
from hasten.app.batch.locks import BATCHES, MANIFEST, SETUP, Locks
from hasten.app.errors import BadInput

DONE, FAILED = "done", "failed"
FORMAT = 1


class WriteError(Exception):
    """Something cannot be written; what was written before is whole."""


@dataclass(frozen=True)
class BatchPlan:
    """What stays the same for the life of an output folder.

    Attributes:
        jobs: SHA-256 of the job list, and of the plan files it names.
        count: Of jobs.
        batch_size: Most jobs that are drawn together.
        model, dtype, device: What they are drawn with.
        threads: Of torch, on a CPU: sums are rounded by how they are cut up, so other numbers of threads make other last bits. 0 elsewhere.
        how: Where the batch size came from.
        version: Of hasten.
        format: Of the folder.
    """

    jobs: str
    count: int
    batch_size: int
    model: str
    dtype: str
    device: str
    threads: int
    how: dict[str, Any]
    version: str = __version__
    format: int = FORMAT


def list_hash(jobs: Sequence[Job]) -> str:
    """SHA-256 of a job list: ids, everything that the pictures depend on, and the contents of plan files."""
    digest = hashlib.sha256()
    for job in jobs:
        digest.update(f"{job.id} {job.digest()}\n".encode())
    for plan in sorted({str(job.caching["plan"]) for job in jobs if "plan" in job.caching}):
        digest.update(f"{plan} {hashlib.sha256(Path(plan).read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def batches_of(jobs: Sequence[Job], size: int) -> list[tuple[Job, ...]]:
    """Jobs that are drawn together: those of one key, in their order, at most `size`; steered ones alone."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.key(), []).append(job)
    batches = []
    for group in groups.values():
        most = 1 if group[0].steered else size
        batches += [tuple(group[start : start + most]) for start in range(0, len(group), most)]
    return batches


class Folder:
    """An output folder that is open.

    Args:
        out: The folder; made where there is none.

    Raises:
        BadInput: Its file system has no locks, or it was made by another version of hasten.
        WriteError: It cannot be written.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.images, self._own = out / "images", out / ".hasten"
        self._rows, self._splits, self._scratch = self._own / "rows", self._own / "splits", self._own / "scratch"
        try:
            for folder in (self.images, self._rows, self._splits, self._scratch):
                folder.mkdir(parents=True, exist_ok=True)
            self.locks = Locks(self._own / "lock")
        except OSError as error:
            raise WriteError(_why(out, error)) from error

    def close(self) -> None:
        """Lets go of all locks."""
        self.locks.close()

    # ------------------------------------------------------------------------------------------------------------ the plan

    @property
    def plan(self) -> BatchPlan | None:
        """What the folder was begun with; None where nothing was.

        Raises:
            BadInput: It cannot be read.
        """
        path = self._own / "plan.json"
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            if read["format"] != FORMAT:
                raise BadInput(
                    f"--out {self.out} was begun by another version of hasten ({read['version']}); finish it there, or name another"
                )
            return BatchPlan(**{entry.name: read[entry.name] for entry in fields(BatchPlan)})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(
                f"--out {self.out} has a {path.name} that cannot be read ({type(error).__name__}); name another folder"
            ) from None

    def begin(self, plan: BatchPlan, jobs: Sequence[Job]) -> None:
        """Writes the job list, then the plan; under the lock SETUP."""
        self.keep_jobs(jobs)
        self._write(self._own / "plan.json", json.dumps(asdict(plan), indent=1).encode(), "plan")

    def keep_jobs(self, jobs: Sequence[Job]) -> None:
        """Writes the job list; under the lock SETUP."""
        lines = (json.dumps(job.to_row(), ensure_ascii=False, allow_nan=False) for job in jobs)
        self._write(self._own / "jobs.jsonl", "".join(f"{line}\n" for line in lines).encode(), "plan")

    def jobs(self, rules: Rules) -> list[Job]:
        """The job list that is kept.

        Raises:
            BadInput: It does not hold any more, for instance since a plan file is gone.
        """
        text = (self._own / "jobs.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.split("\n") if line]
        return [Job.from_row(row, None, f"job {row['id']}", rules=rules) for row in rows]

    def check(self, jobs: Sequence[Job], *, model: str, batch_size: int | None, hash_: str) -> BatchPlan | None:
        """The plan of the folder if it is this job list's; None where there is none yet.

        Raises:
            BadInput: The folder belongs to another list or model, or another batch size was asked for.
        """
        plan = self.plan
        if plan is None:
            foreign = sorted(path for path in (*self.images.iterdir(), *self.out.glob("manifest.*")))
            if foreign:
                raise BadInput(f"--out {self.out} holds something else already ({foreign[0].relative_to(self.out)}); name another folder")
            return None
        if plan.jobs != hash_:
            count = (
                f"of {plan.count} jobs, this is one of {len(jobs)}" if plan.count != len(jobs) else f"of {plan.count} jobs as this one is"
            )
            raise BadInput(
                f"--out {self.out} belongs to another job list ({count}, but they differ): name another folder, or the list it had"
            )
        for option, asked, was in (("--model", model, plan.model), ("--batch-size", batch_size, plan.batch_size)):
            if asked is not None and asked != was:
                raise BadInput(f"{option} must be {was}, with which {self.out} was begun, not {asked}; or name another folder")
        return plan

    # -------------------------------------------------------------------------------------------------------------- batches

    def take(self, batch: int) -> bool:
        """Takes a batch's lock if it is free, and removes what a dead holder left half written."""
        if not self.locks.try_take(BATCHES + batch):
            return False
        for left in self._scratch.glob(f"{batch:06d}-*"):
            left.unlink(missing_ok=True)
        return True

    def release(self, batch: int) -> None:
        """Lets go of a batch's lock."""
        self.locks.release(BATCHES + batch)

    def sweep(self, batches: int) -> None:
        """Removes scratch files of dead processes; those of living ones are behind their locks."""
        for left in list(self._scratch.iterdir()):
            number = left.name.partition("-")[0]
            if number.isdigit() and int(number) < batches:
                if self.take(int(number)):
                    self.release(int(number))
            elif not number.isdigit():
                byte = MANIFEST if number == "manifest" else SETUP
                if self.locks.try_take(byte):
                    left.unlink(missing_ok=True)
                    self.locks.release(byte)

    def rows(self, batch: int) -> dict[str, dict[str, Any]]:
        """Rows of a batch by job: those that failed, and those whose picture is there."""
        try:
            read = json.loads((self._rows / f"{batch:06d}.json").read_bytes())
        except (FileNotFoundError, ValueError):  # no JSON: the disk lost it with the power, so the batch is drawn again
            return {}
        return {row["id"]: row for row in read if row["status"] == FAILED or (self.out / row["path"]).is_file()}

    def written(self) -> set[int]:
        """Batches of which there are rows."""
        return {int(entry.name[:-5]) for entry in os.scandir(self._rows) if entry.name[:-5].isdigit()}

    def split(self, batch: int) -> int | None:
        """Into parts of how many jobs the batch was cut; None where it was not."""
        try:
            return int(json.loads((self._splits / f"{batch:06d}.json").read_bytes())["size"])
        except (FileNotFoundError, ValueError):
            return None

    def record_split(self, batch: int, size: int, reason: str) -> None:
        """Keeps it for everybody who draws the batch again; under its lock."""
        self._write(self._splits / f"{batch:06d}.json", json.dumps({"size": size, "reason": reason}).encode(), f"{batch:06d}")

    def save(self, batch: int, pictures: Mapping[str, bytes], rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes pictures by job, then the rows of the batch, those of before too; under its lock.

        Raises:
            WriteError: The disk is full, or the like.
        """
        scratch = {name: self._scratch / f"{batch:06d}-{name}" for name in pictures}
        try:
            for name, data in pictures.items():
                _write_through(scratch[name], data)
            for name, path in scratch.items():
                os.replace(path, self.images / f"{name}.png")
            if pictures:
                _sync_folder(self.images)
        except OSError as error:
            for path in scratch.values():
                path.unlink(missing_ok=True)
            raise WriteError(_why(self.out, error)) from error
        text = json.dumps(list(rows), ensure_ascii=False, allow_nan=False)
        self._write(self._rows / f"{batch:06d}.json", text.encode(), f"{batch:06d}")

    def write_manifest(self, name: str, data: bytes) -> None:
        """Writes a file of the whole folder; under the lock MANIFEST."""
        self._write(self.out / name, data, "manifest")

    def _write(self, path: Path, data: bytes, owner: str) -> None:
        scratch = self._scratch / f"{owner}-{path.name}.part"
        try:
            _write_through(scratch, data)
            os.replace(scratch, path)
            _sync_folder(path.parent)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise WriteError(_why(self.out, error)) from error


def _why(out: Path, error: OSError) -> str:
    return f"{out} cannot be written: {error.strerror or error}; when that is mended, the same command goes on where this one ended"


def _write_through(path: Path, data: bytes) -> None:
    """Writes a file down to the disk: after a rename no power cut can leave it empty."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
