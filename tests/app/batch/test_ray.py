"""Ray Data as a back end: the class by itself, the command on a local cluster, and what is said where there is no Ray."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hasten.app.batch
from hasten.app.batch.ray_painter import RayPainter
from tests.app.batch.conftest import hashes, jobs_of, manifest, write_jobs

Run = Callable[..., Any]


def test_the_class_draws_columns(tiny_pipeline_folder: Path) -> None:
    assert hasten.app.batch.RayPainter is RayPainter
    painter = RayPainter(str(tiny_pipeline_folder), "float32", "cpu", defaults={"method": "none", "steps": 2})
    batch = {
        "prompt": np.array(["a red circle", "a blue square", "a red", "a"], dtype=object),
        "seed": np.array([3.0, np.nan, 5.0, 6.0]),
        "steps": np.array([np.nan, 3.0, -1.0, np.nan]),
        "size": np.array([None, None, None, "33x64"], dtype=object),
        "mine": np.arange(4),
    }
    out = painter(batch)
    assert list(out["mine"]) == [0, 1, 2, 3] and list(out["status"]) == ["done", "done", "failed", "failed"]
    assert "steps must be a whole number" in out["error"][2] and "divisible by 8" in out["error"][3] and out["image"][2] is None
    first = Image.open(io.BytesIO(out["image"][0]))
    assert out["sha256"][0] == hashlib.sha256(first.tobytes()).hexdigest()
    assert json.loads(first.info["hasten"])["seed"] == 3 and json.loads(Image.open(io.BytesIO(out["image"][1])).info["hasten"])["seed"] == 1
    alone = painter({"prompt": np.array(["a red circle"], dtype=object), "seed": np.array([3])})
    assert alone["sha256"][0] == out["sha256"][0]


@pytest.mark.slow
def test_a_local_cluster_draws_what_one_process_draws_and_goes_on(run: Run, tmp_path: Path) -> None:
    import ray

    rows = [*jobs_of(5, steps=2, method="none"), {"prompt": "a red circle", "id": "odd", "size": "33x64", "steps": 1, "method": "none"}]
    source = write_jobs(tmp_path / "jobs.jsonl", rows)
    assert run(source, "--out", tmp_path / "local", "--batch-size", 2).exit_code == 1
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        done = run(source, "--out", tmp_path / "ray", "--batch-size", 2, "--engine", "ray")
        assert done.exit_code == 1, (done.output, done.exception)
        assert hashes(tmp_path / "ray") == hashes(tmp_path / "local")
        odd = manifest(tmp_path / "ray")[5]
        assert odd["status"] == "failed" and "divisible by 8" in odd["error"]
        (tmp_path / "ray" / "images" / "job-002.png").unlink()
        again = run(source, "--out", tmp_path / "ray", "--engine", "ray")
        assert again.exit_code == 1 and hashes(tmp_path / "ray") == hashes(tmp_path / "local")
        assert (tmp_path / "ray" / "images" / "job-002.png").exists()
    finally:
        ray.shutdown()


def test_without_ray_one_line_says_what_to_install(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("hasten.app.batch.ray_engine.find_spec", lambda name: None)
    done = run(write_jobs(tmp_path / "jobs.jsonl", jobs_of(1)), "--out", tmp_path / "out", "--engine", "ray")
    assert done.exit_code == 2 and done.stderr == 'error: --engine ray needs Ray: pip install "hasten[ray]"\n'
    assert not (tmp_path / "out").exists()
