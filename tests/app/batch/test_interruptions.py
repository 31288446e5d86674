"""What is left of a batch run that is killed, stopped, or out of disk, and what the next run makes of it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hasten.app.batch import folder as folder_module
from tests.app.batch.conftest import Processes, hashes, jobs_of, manifest, write_jobs

Run = Callable[..., Any]
Make = Callable[..., Processes]


def done(out: Path) -> int:
    """Pictures so far."""
    images = out / "images"
    return len(list(images.iterdir())) if images.is_dir() else 0


def check_whole(out: Path, count: int) -> None:
    """Exactly so many pictures and rows, every hash that of its file, nothing half written."""
    rows = manifest(out)
    assert len(rows) == count == len({row["id"] for row in rows}) and {row["status"] for row in rows} == {"done"}
    assert sorted(path.name for path in (out / "images").iterdir()) == sorted(f"{row['id']}.png" for row in rows)
    for row in rows:
        assert hashlib.sha256(Image.open(out / row["path"]).tobytes()).hexdigest() == row["sha256"]
    assert not list((out / ".hasten" / "scratch").iterdir())


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def test_kill_9_at_any_moment_on_two_processes_loses_nothing(run: Run, processes: Make, tmp_path: Path) -> None:
    source = write_jobs(tmp_path / "jobs.jsonl", jobs_of(40, steps=6, method="none"))
    assert run(source, "--out", tmp_path / "calm", "--batch-size", 4).exit_code == 0
    pool, draw = processes(source, tmp_path / "killed"), random.Random(5)
    alive = {pool.start(0, 2): 0, pool.start(1, 2): 1}
    kills, codes = [1, 5, 11, 17, 23, 29], []
    while alive:
        if kills and done(tmp_path / "killed") >= kills[0]:
            kills.pop(0)
            time.sleep(draw.uniform(0, 0.1))
            os.kill(draw.choice(sorted(alive)), signal.SIGKILL)
        for pid, rank in list(alive.items()):
            code = pool.ended(pid)
            if code is not None:
                del alive[pid]
                codes.append(code)
                if code < 0:
                    alive[pool.start(rank, 2)] = rank
        time.sleep(0.005)
    # The last kills may find their process at its end, or none left.
    assert set(codes) == {-signal.SIGKILL, 0} and codes.count(-signal.SIGKILL) >= 3
    check_whole(tmp_path / "killed", 40)
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "calm")


def test_batches_of_a_dead_process_are_taken_over_at_once(processes: Make, tmp_path: Path) -> None:
    source = write_jobs(tmp_path / "jobs.jsonl", jobs_of(12, steps=20, method="none"))
    pool = processes(source, tmp_path / "out")
    first, second = pool.start(0, 2), pool.start(1, 2)
    wait_for(lambda: done(tmp_path / "out") >= 4)
    os.kill(first, signal.SIGKILL)
    assert pool.wait(first) == -signal.SIGKILL
    assert pool.wait(second) == 0
    check_whole(tmp_path / "out", 12)
    attempts = [json.loads(path.read_text()) for path in sorted((tmp_path / "out" / ".hasten" / "rows").iterdir())]
    assert [row["batch"] for rows in attempts for row in rows] == [i // 4 for i in range(12)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_at_the_next_step_and_the_next_run_goes_on(
    processes: Make, tmp_path: Path, number: signal.Signals, tiny_pipeline_folder: Path
) -> None:
    source = write_jobs(tmp_path / "jobs.jsonl", jobs_of(6, steps=80, method="none"))
    pool = processes(source, tmp_path / "out", batch_size=2)
    pid = pool.start()
    wait_for(lambda: done(tmp_path / "out") >= 2)
    os.kill(pid, number)
    assert pool.wait(pid, 10) == 128 + number
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").iterdir()}
    assert 2 <= len(before) < 6 and len(manifest(tmp_path / "out")) == len(before)
    assert pool.wait(pool.start()) == 0
    check_whole(tmp_path / "out", 6)
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())  # none was drawn twice


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """After so many files, the disk is full: half of the next one's bytes are there, and the write fails."""
    left = [10**9]
    write = folder_module._write_through

    def limited(path: Path, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(folder_module, "_write_through", limited)
    yield lambda files: left.__setitem__(0, files)


@pytest.mark.parametrize("files", [0, 1, 2, 3, 5, 6, 7, 9])
def test_a_full_disk_at_any_file_leaves_nothing_half_there(run: Run, full_disk: Callable[[int], None], tmp_path: Path, files: int) -> None:
    source = write_jobs(tmp_path / "jobs.jsonl", jobs_of(5, steps=1, method="none"))
    full_disk(files)
    failed = run(source, "--out", tmp_path / "out", "--batch-size", 2)
    assert failed.exit_code == 1 and failed.stderr.count("\n") == 1 and "No space left on device" in failed.stderr
    assert not list((tmp_path / "out" / ".hasten" / "scratch").iterdir())
    for path in (tmp_path / "out" / "images").iterdir():
        Image.open(path).load()
    full_disk(10**9)
    assert run(source, "--out", tmp_path / "out", "--batch-size", 2).exit_code == 0
    check_whole(tmp_path / "out", 5)


def test_a_picture_that_was_deleted_is_drawn_again_with_its_batch(run: Run, tmp_path: Path) -> None:
    source = write_jobs(tmp_path / "jobs.jsonl", jobs_of(6, steps=2, method="none"))
    words = (source, "--out", tmp_path / "out", "--batch-size", 3)
    assert run(*words).exit_code == 0
    before = hashes(tmp_path / "out")
    (tmp_path / "out" / "images" / "job-004.png").unlink()
    untouched = (tmp_path / "out" / "images" / "job-000.png").stat().st_mtime_ns
    assert run(*words).exit_code == 0
    check_whole(tmp_path / "out", 6)
    assert hashes(tmp_path / "out") == before
    assert (tmp_path / "out" / "images" / "job-000.png").stat().st_mtime_ns == untouched


def test_rows_that_the_disk_lost_are_made_again(run: Run, tmp_path: Path) -> None:
    source = write_jobs(tmp_path / "jobs.jsonl", jobs_of(6, steps=2, method="none"))
    words = (source, "--out", tmp_path / "out", "--batch-size", 3)
    assert run(*words).exit_code == 0
    before = hashes(tmp_path / "out")
    rows = tmp_path / "out" / ".hasten" / "rows"
    (rows / "000000.json").write_bytes(b"")
    (rows / "000001.json").write_bytes((rows / "000001.json").read_bytes()[:100])
    (tmp_path / "out" / ".hasten" / "scratch" / "000001-job-003").write_bytes(b"half")
    (tmp_path / "out" / ".hasten" / "scratch" / "manifest-manifest.jsonl.part").write_bytes(b"half")
    assert run(*words).exit_code == 0
    check_whole(tmp_path / "out", 6)
    assert hashes(tmp_path / "out") == before


def test_a_finished_folder_is_only_looked_at(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jobs(tmp_path / "jobs.jsonl", jobs_of(3, steps=1, method="none"))
    assert run(source, "--out", tmp_path / "out", "--batch-size", 2).exit_code == 0
    monkeypatch.setattr("hasten.app.batch.begin.Painter", None)  # a model that was loaded would fail
    again = run(source, "--out", tmp_path / "out")
    assert again.exit_code == 0 and "3 of 3 pictures" in again.stdout


def test_a_second_signal_ends_a_process_at_once(tmp_path: Path) -> None:
    from hasten.app.batch.stopping import Stopper

    with Stopper() as stopper:
        stopper.patient = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopper.asked() and stopper.code == 143
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert left.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
