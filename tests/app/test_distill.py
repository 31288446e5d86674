"""`hasten distill` as a user meets it, and `hasten generate --step-lora`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from hasten.app import distill as work
from hasten.app.cli import app
from hasten.app.errors import BadInput
from hasten.pipelines.step_lora import StepLoRA


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


PROMPTS = ["a small red circle", "a large blue square"]


@pytest.fixture
def config(tiny_pipeline_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_pipeline_folder), "prompts": PROMPTS, "output": "run", "method": "trajectory", "steps": 2,
        "settings": {"segments": [2, 1], "guidance": [2.0, 2.0]}, "lora": {"rank": 2}, "teacher_steps": 1,
        "train": {"batch_size": 2, "grid_steps": 4, "top": 499, "warmup": 0}, "call": {"max_sequence_length": 16},
    }  # fmt: skip


def written(tmp_path: Path, config: dict[str, Any]) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_from_a_file_to_pictures_in_two_steps(config: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path, config)
    assert run("distill", str(path), "--dry-run").exit_code == 0 and not (tmp_path / "run").exists()
    done = run("distill", str(path))
    assert done.exit_code == 0, done.stderr
    said = done.stdout
    assert "TrajectoryConsistency, rank 2, for 1, 2 steps" in said and "--step-lora" in said
    assert StepLoRA.load(tmp_path / "run").steps == (1, 2)
    before = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert before == 2 and run("distill", str(path)).exit_code == 0  # done: nothing is trained again
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 1
    assert run("distill", str(path), "--no-resume").exit_code == 2
    tuning = {
        **config, "method": "online-pso", "start": "run", "output": "tuned", "reward": "brightness", "sampled_in": 2, "steps": 1,
        "settings": {"beta": 10.0}, "train": {"batch_size": 2},
    }  # fmt: skip
    del tuning["lora"]
    assert run("distill", str(written(tmp_path, tuning))).exit_code == 0
    model = ["--model", config["model"], "--out", str(tmp_path / "out")]
    assert run("generate", PROMPTS[0], *model, "--step-lora", str(tmp_path / "tuned"), "--steps", "2").exit_code == 0
    (picture,) = (tmp_path / "out").glob("*.png")
    settings = json.loads(Image.open(picture).info["hasten"])
    assert settings["steps"] == 2 and settings["guidance_scale"] == 1.0 and settings["step_lora"] == str(tmp_path / "tuned")


def test_the_example_is_in_order(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(run("distill", "--example").stdout)
    config = work.read(path)
    assert config.model == "shapes" and repr(work.method_of(config)).startswith("TrajectoryConsistency(segments=(8, 4, 2, 1)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methud": "lcm"}, "there is no entry 'methud'; did you mean method?"),
        ({"steps": "many"}, "steps must be a whole number, not 'many'"),
        ({"steps": True}, "steps must be a whole number, not True"),
        ({"output": None}, "output must be a text, not None"),
        ({"method": "trajectry"}, "did you mean trajectory?"),
        ({"settings": {"segment": [1]}}, "trajectory has no 'segment'; it has segments, guidance"),
        ({"settings": {"segments": [1, 2]}}, "segments must be falling whole numbers"),
        ({"data": "pictures"}, "exactly one of data"),
        ({"prompts": None, "data": "nowhere"}, "data must be a folder"),
        ({"prompts": "none.txt"}, "prompts must be a text file"),
        ({"method": "feedback", "settings": {}}, "start must name a step LoRA's folder"),
        ({"method": "online-pso", "settings": {}, "start": "nowhere"}, "start: no step LoRA at"),
        ({"reward": "brightness"}, "reward and sampled_in belong to"),
        ({"train": {"rate": 1}}, "train: .*unexpected keyword argument 'rate'"),
        ({"train": {"batch_size": 0}}, "batch_size must be a whole number of at least 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(config: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as refused:
        work.distill(written(tmp_path, {**config, **change}))
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"), [("[1, 2", "must be a YAML file"), ("- 1", "must be entries"), ("model: x", "output is missing")]
)
def test_files_that_are_none_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=message):
        work.read(path)
    with pytest.raises(BadInput, match="No such file"):
        work.read(tmp_path / "none.yaml")


def test_step_loras_that_do_not_fit_are_refused(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    common = ["generate", PROMPTS[0], "--model", str(tiny_pipeline_folder), "--out", str(tmp_path / "out")]
    for more, message in (([], "--step-lora must be a folder or file, or one of"), (["--compare"], "--compare draws with fewer steps")):
        done = run(*common, "--step-lora", "nowhere", *more)
        assert done.exit_code == 2 and message in done.stderr
    assert not (tmp_path / "out").exists()
