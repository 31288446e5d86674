"""`hasten batch` as it is called: what comes out, what fails alone, what is refused, and who takes what."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hasten.app.batch import work as work_module
from hasten.app.batch.folder import batches_of
from hasten.app.batch.jobs import Job
from hasten.app.batch.painter import Painter
from hasten.app.batch.ranks import find_rank
from hasten.app.batch.report import report_page
from hasten.app.batch.sizing import find_size
from hasten.app.batch.work import Share
from hasten.app.errors import BadInput
from tests.app.batch.conftest import Processes, hashes, jobs_of, manifest, write_jobs

Run = Callable[..., Any]


def test_pictures_rows_and_settings_say_the_same(run: Run, tmp_path: Path) -> None:
    rows = [*jobs_of(5, steps=2), {"prompt": "a red circle", "id": "small", "size": "32x64", "steps": 3, "method": "none", "seed": 99}]
    out = tmp_path / "out"
    done = run(write_jobs(tmp_path / "jobs.jsonl", rows), "--out", out, "--batch-size", 2, "--json", "--score", "brightness", "--report")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["jobs"], told["done"], told["failed"], told["left"], told["batch_size"]) == (6, 6, 0, 0, 2)
    found = manifest(out)
    assert [row["id"] for row in found] == [row["id"] for row in rows]  # in the order of the list
    for row in found:
        image = Image.open(out / row["path"])
        assert row["sha256"] == hashlib.sha256(image.tobytes()).hexdigest() and image.size == (row["width"], row["height"])
        luma = (np.asarray(image) @ np.array([0.299, 0.587, 0.114])).mean() / 255
        assert row["score"] == pytest.approx(luma, abs=1e-3) and row["seconds"] > 0 and row["error"] is None
        text = json.loads(image.info["hasten"])
        assert (text["seed"], text["id"], text["plan_hash"]) == (row["seed"], row["id"], row["plan_hash"])
        assert image.info["Title"] == row["prompt"]
    assert [row["seed"] for row in found] == [0, 1, 2, 3, 4, 99] and [row["batch"] for row in found] == [0, 0, 1, 1, 2, 3]
    assert found[0]["plan_hash"] is not None and found[5]["plan_hash"] is None and found[5]["width"] == 32
    assert "images/job-000.png" in (out / "report.html").read_text()


def test_the_manifest_in_parquet_is_the_one_in_lines(run: Run, tmp_path: Path) -> None:
    parquet: Any = import_module("pyarrow.parquet")
    words = (write_jobs(tmp_path / "jobs.jsonl", jobs_of(3, steps=1, method="none")), "--out", tmp_path / "out", "--batch-size", 2)
    assert run(*words).exit_code == 0
    lines = manifest(tmp_path / "out")
    assert run(*words, "--manifest", "parquet").exit_code == 0
    assert parquet.read_table(tmp_path / "out" / "manifest.parquet").to_pylist() == lines
    assert not (tmp_path / "out" / "manifest.jsonl").exists()  # it would be out of date


def test_one_job_that_fails_harms_no_other_and_can_be_tried_again(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*jobs_of(4, steps=1, method="none"), {"prompt": "a red circle", "id": "odd", "size": "33x64", "steps": 1, "method": "none"}]
    words = (write_jobs(tmp_path / "jobs.jsonl", rows), "--out", tmp_path / "out", "--batch-size", 4)
    paint = Painter.paint

    def failing(painter: Painter, jobs: Any, **more: Any) -> Any:
        if any(job.id == "job-002" for job in jobs):
            raise RuntimeError("the lamp\nwent out")
        return paint(painter, jobs, **more)

    monkeypatch.setattr(Painter, "paint", failing)
    done = run(*words)
    assert done.exit_code == 1 and "failed: job-002: RuntimeError: the lamp went out" in done.stdout
    found = {row["id"]: row for row in manifest(tmp_path / "out")}
    assert {name for name, row in found.items() if row["status"] == "failed"} == {"job-002", "odd"}
    assert "divisible by 8" in found["odd"]["error"] and found["job-002"]["path"] is None
    assert not (tmp_path / "out" / "images" / "job-002.png").exists()
    monkeypatch.undo()
    untouched = (tmp_path / "out" / "images" / "job-001.png").stat().st_mtime_ns
    assert run(*words).exit_code == 1  # a failed job stays failed
    again = run(*words, "--retry-failed")
    assert again.exit_code == 1 and "1 failed" in again.stdout
    found = {row["id"]: row for row in manifest(tmp_path / "out")}
    assert found["job-002"]["status"] == "done" and found["job-002"]["attempt"] == 2
    assert found["odd"]["status"] == "failed" and found["odd"]["attempt"] == 2
    assert (tmp_path / "out" / "images" / "job-001.png").stat().st_mtime_ns == untouched


def test_a_batch_too_large_for_memory_is_halved_and_stays_halved(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (write_jobs(tmp_path / "jobs.jsonl", jobs_of(8, steps=1, method="none")), "--out", tmp_path / "out", "--batch-size", 8)
    paint, drawn = Painter.paint, []

    def small(painter: Painter, jobs: Any, **more: Any) -> Any:
        if len(jobs) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        drawn.append(len(jobs))
        return paint(painter, jobs, **more)

    monkeypatch.setattr(Painter, "paint", small)
    assert run(*words).exit_code == 0
    assert drawn == [2, 2, 2, 2] and {row["status"] for row in manifest(tmp_path / "out")} == {"done"}
    before = hashes(tmp_path / "out")
    monkeypatch.undo()
    sizes: list[int] = []
    monkeypatch.setattr(Painter, "paint", lambda painter, jobs, **more: sizes.append(len(jobs)) or paint(painter, jobs, **more))
    (tmp_path / "out" / "images" / "job-003.png").unlink()
    assert run(*words).exit_code == 0
    assert sizes == [2] and hashes(tmp_path / "out") == before  # the part that was lost, as it was cut before


def test_workers_share_a_folder(run: Run, processes: Callable[..., Processes], tmp_path: Path) -> None:
    source = write_jobs(tmp_path / "jobs.jsonl", jobs_of(12, steps=8, method="none"))
    pool = processes(source, tmp_path / "out", 2)
    assert [pool.wait(pid) for pid in (pool.start(0, 2), pool.start(1, 2))] == [0, 0]
    assert run(source, "--out", tmp_path / "alone", "--batch-size", 2).exit_code == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone") and len(hashes(tmp_path / "out")) == 12


def test_an_array_task_begins_with_its_own_share(run: Run, tmp_path: Path) -> None:
    source = write_jobs(tmp_path / "jobs.jsonl", jobs_of(4, steps=1, method="none"))
    assert run(source, "--out", tmp_path / "out", "--batch-size", 1, "--array", "1/2").exit_code == 0
    assert len(manifest(tmp_path / "out")) == 4
    assert Share(1, 3).order(7) == [1, 4, 0, 2, 3, 5, 6]
    assert find_rank("2/5").share == Share(2, 5, wait=False)
    for text in ("5/5", "-1/2", "a/b", "1", "1/0"):
        with pytest.raises(BadInput, match="--array must be INDEX/COUNT"):
            find_rank(text)


def test_ranks_come_from_what_launchers_set() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    rank = find_rank(None, torchrun)
    assert (rank.share, rank.local, rank.neighbours) == (Share(3, 8), 1, 2)
    slurm = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    assert find_rank(None, slurm).share == Share(2, 4) and find_rank(None, {}).share == Share()
    for wrong in ({"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}):
        with pytest.raises(BadInput, match="RANK must be"):
            find_rank(None, wrong)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--on-error", "ignore"], "--on-error must be stop or skip"),
        (["--batch-size", "0"], "--batch-size must be a whole number of at least 1"),
        (["--workers", "2", "--array", "0/2"], "--workers starts processes of its own"),
        (["--manifest", "xml"], "--manifest must be jsonl or parquet"),
        (["--engine", "spark"], "--engine must be local or ray"),
        (["--score", "beauty"], "--score must be one of"),
        (["--steps", "0"], "defaults: steps must be a whole number from 1"),
        (["--array", "3/2"], "--array must be INDEX/COUNT"),
        (["--dtype", "float8"], "--dtype must be auto or float32"),
    ],
)
def test_options_that_are_not_allowed_are_refused_in_one_line(run: Run, tmp_path: Path, words: list[str], said: str) -> None:
    done = run(write_jobs(tmp_path / "jobs.jsonl", jobs_of(1)), "--out", tmp_path / "out", *words)
    assert done.exit_code == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_lines_stop_everything_or_are_left_out(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "jobs.jsonl"
    source.write_text('{"prompt": "a red circle", "steps": 1}\n{"prompt": "a", "stepz": 1}\n{"prompt": "a", "id": "../x"}\n')
    stopped = run(source, "--out", tmp_path / "out")
    assert stopped.exit_code == 2 and not (tmp_path / "out").exists()
    first, second, last = stopped.stderr.splitlines()
    assert first.startswith("line 2: unknown key 'stepz'; did you mean steps?") and second.startswith("line 3: id must")
    assert "2 of 3 lines of JOBS are not allowed" in last
    skipped = run(source, "--out", tmp_path / "out", "--on-error", "skip", "--method", "none", "--batch-size", "1")
    assert skipped.exit_code == 0 and "skipped: line 2" in skipped.stderr and len(manifest(tmp_path / "out")) == 1


def test_a_folder_belongs_to_one_list_one_model_and_one_batch_size(run: Run, tmp_path: Path) -> None:
    source = write_jobs(tmp_path / "jobs.jsonl", jobs_of(2, steps=1, method="none"))
    assert run(source, "--out", tmp_path / "out", "--batch-size", 2).exit_code == 0
    other = write_jobs(tmp_path / "other.jsonl", jobs_of(2, steps=1, method="none", seed=5))
    longer = write_jobs(tmp_path / "longer.jsonl", jobs_of(3, steps=1, method="none"))
    for words, said in (
        ((other,), "belongs to another job list (of 2 jobs as this one is, but they differ)"),
        ((longer,), "belongs to another job list (of 2 jobs, this is one of 3"),
        ((source, "--batch-size", 1), "--batch-size must be 2, with which"),
    ):
        refused = run(*words, "--out", tmp_path / "out")
        assert refused.exit_code == 2 and said in refused.stderr and refused.stderr.count("\n") == 1
    (tmp_path / "foreign" / "images").mkdir(parents=True)
    (tmp_path / "foreign" / "images" / "mine.png").write_bytes(b"")
    refused = run(source, "--out", tmp_path / "foreign")
    assert refused.exit_code == 2 and "holds something else already (images/mine.png)" in refused.stderr


def test_jobs_are_grouped_by_key_in_their_order() -> None:
    def job(name: str, **row: Any) -> Job:
        return Job.from_row({"prompt": "a", "id": name, **row})

    steered = {"steer": "best-of-n", "reward": "brightness"}
    jobs = [job("a"), job("b", steps=2), job("c"), job("d"), job("e", **steered), job("f", **steered), job("g", steps=2)]
    names = [[one.id for one in batch] for batch in batches_of(jobs, 2)]
    assert names == [["a", "c"], ["d"], ["b", "g"], ["e"], ["f"]]


def test_the_batch_size_is_measured_once_within_memory(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_pipeline_folder: Path
) -> None:
    painter = Painter(str(tiny_pipeline_folder), "float32", "cpu")
    jobs = [Job.from_row({"prompt": "a red circle", "steps": 50, "method": "none"}, number=i) for i in range(200)]
    found = find_size(painter, jobs)
    assert found.size in (1, 2, 4, 8, 16, 32, 64) and found.how["found"] == "measured" and found.size <= found.how["fits"]
    monkeypatch.setattr("hasten.app.batch.sizing._Linux.free", lambda memory: 1)
    assert find_size(painter, jobs).size == 1  # what is drawn alone fits or fails, but nothing larger is tried
    odd = [Job.from_row({"prompt": "a red circle", "size": "33x64"}, number=i) for i in range(20)]
    assert find_size(painter, odd).how["found"] == "not measured"
    short = find_size(painter, jobs[:3])
    assert short.size <= 3


@pytest.mark.parametrize(("seconds", "size"), [(0.1, 16), (4.0, 8)])
def test_a_list_too_short_for_measuring_gets_a_usual_size(
    seconds: float, size: int, monkeypatch: pytest.MonkeyPatch, tiny_pipeline_folder: Path
) -> None:
    """Smaller where a batch takes so long that one that dies is a loss."""
    painter = Painter(str(tiny_pipeline_folder), "float32", "cpu")
    jobs = [Job.from_row({"prompt": "a red circle", "steps": 8, "method": "none"}, number=i) for i in range(40)]
    monkeypatch.setattr("hasten.app.batch.sizing._paint", lambda painter, jobs: seconds * len(jobs))
    found = find_size(painter, jobs)
    assert found.size == size and found.how["pictures_per_second"] == {"1": round(1 / seconds, 3)}


def test_the_contact_sheet_is_safe_and_whole(tmp_path: Path) -> None:
    from hasten.app.batch.folder import BatchPlan

    nasty = "</script><script>alert(1)</script>\u2028<img src=x onerror=alert(1)>"
    jobs = [Job("a", nasty), Job("b", "waiting")]
    row = {"id": "a", "status": "failed", "path": None, "error": nasty, "score": None, "seconds": None, "plan_hash": None}
    page = report_page([{**row, "width": None, "height": None, "sha256": None}], jobs, BatchPlan("", 2, 1, "m", "d", "c", 1, {}))
    assert page.count("<script") == 2 and "<img" not in page and "\u2028" not in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert data["rows"][0]["prompt"] == nasty and data["rows"][1]["status"] == "waiting"
    assert not re.findall(r"(?:https?:)?//[a-z]", page)  # nothing is fetched from anywhere


NAME = st.text(max_size=20) | st.sampled_from(["../x", "/etc/x", "a/../../b", "..", "con", "a\0", "x" * 300, "ok", "C:\\x", "~", "a.png"])
ROW = st.fixed_dictionaries(
    {"prompt": st.just("a red circle") | st.text(max_size=30)},
    optional={
        "id": NAME,
        "seed": st.integers(-5, 2**70),
        "steps": st.integers(-1, 2),
        "width": st.sampled_from([-8, 0, 8, 16, 33, 10**9]),
        "height": st.sampled_from([8, 16]),
        "method": st.sampled_from(["none", "nine"]),
        "path": st.just("/tmp/x"),
    },
)


@given(rows=st.lists(ROW, min_size=1, max_size=3))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_row_writes_outside_the_folder(run: Run, tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    here = tmp_path_factory.mktemp("fuzz")
    source = write_jobs(here / "jobs.jsonl", rows)
    done = run(source, "--out", here / "deep" / "out", "--on-error", "skip", "--batch-size", 2, "--steps", 1, "--method", "none")
    assert (
        done.exit_code in (0, 1, 2)
        and "Traceback" not in done.output
        and (done.exception is None or isinstance(done.exception, SystemExit))
    )
    assert {path.name for path in here.iterdir()} <= {"jobs.jsonl", "deep"}
    assert {path.name for path in here.glob("deep/*")} <= {"out"}
    if done.exit_code < 2:
        names = {row["id"] for row in manifest(here / "deep" / "out") if row["status"] == "done"}
        assert {path.name for path in (here / "deep" / "out" / "images").iterdir()} == {f"{name}.png" for name in names}


def test_help_teaches_without_loading_torch() -> None:
    code = "import sys; from hasten.app.cli import app; app(['batch', '--help'])"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "kill -9" in done.stdout and "--retry-failed" in done.stdout and "accelerate launch" in done.stdout
    assert not re.search(r"\|\s+(torch|diffusers)$", done.stderr, re.MULTILINE)


def test_what_a_row_lost_is_never_written_after_a_failed_write() -> None:
    """After one write failed, a later one of the same batch must not claim the pictures of the first."""

    class Broken:
        saved: list[int] = []  # noqa: RUF012

        def save(self, batch: int, pictures: Any, rows: Any) -> None:
            Broken.saved.append(batch)
            raise OSError("full")

        def release(self, batch: int) -> None:
            Broken.saved.append(-batch)

    with pytest.raises(OSError, match="full"), work_module._Writer(Broken()) as writer:  # type: ignore[arg-type]
        writer.save(1, [], [])
        writer.save(2, [], [])
        writer.release(2)
    assert Broken.saved == [1]


@pytest.mark.slow
def test_workers_that_are_started_here_share_the_work_or_say_why_they_cannot(run: Run, tmp_path: Path) -> None:
    source = write_jobs(tmp_path / "jobs.jsonl", jobs_of(8, steps=2, method="none"))
    assert run(source, "--out", tmp_path / "alone", "--batch-size", 2).exit_code == 0
    assert run(source, "--out", tmp_path / "out", "--batch-size", 2, "--workers", 2).exit_code == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")
    assert run(source, "--out", tmp_path / "none", "--workers", 2, "--device", "mps").exit_code == 2


def test_a_prompt_with_odd_ends_of_lines_is_one_row(run: Run, tmp_path: Path) -> None:
    prompt = "a red\x85circle\u2028or\u2029square"
    source = write_jobs(tmp_path / "jobs.jsonl", [{"prompt": prompt, "steps": 1, "method": "none"}])
    assert run(source, "--out", tmp_path / "out").exit_code == 0
    (row,) = manifest(tmp_path / "out")
    assert row["prompt"] == prompt
