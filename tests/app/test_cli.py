"""The `hasten` command on a tiny random pipeline: what it writes, what it says, and how it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import hasten
from hasten.app.cli import app
from hasten.pipelines.zoo import loading

ROOT = Path(__file__).resolve().parents[2]
CAPTIONS = ("a small red circle", "a large blue square left of a small red circle", "a cat")

Run = Callable[..., Any]


@pytest.fixture
def run(tiny_pipeline_folder: Path) -> Run:
    """Runs the command in this process; TINY among its words is the pipeline's folder."""

    def call(*words: object) -> Any:
        return CliRunner().invoke(app, [str(tiny_pipeline_folder) if word == "TINY" else str(word) for word in words])

    return call


@pytest.fixture
def shapes(tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the tiny pipeline in the place of the model that ships."""
    monkeypatch.setattr(loading, "path_of", lambda name: tiny_pipeline_folder)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


# ------------------------------------------------------------------------------------------------------------ generate


def test_a_caption_becomes_a_picture_that_says_how_it_was_made(run: Run, tmp_path: Path) -> None:
    done = run("generate", CAPTIONS[0], "--model", "TINY", "--steps", 3, "--seed", 7, "--out", tmp_path / "new" / "folder")
    assert done.exit_code == 0, done.stderr
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert path.name == "00-a-small-red-circle-seed7.png" and str(path) in done.stdout
    picture = Image.open(path)
    assert picture.size == (64, 64) and picture.info["Title"] == CAPTIONS[0]
    settings = json.loads(picture.info["hasten"])
    assert (settings["seed"], settings["steps"], settings["caption"], settings["method"]) == (7, 3, CAPTIONS[0], "auto")
    assert settings["use_resolution_binning"] is False and settings["versions"]["hasten"] == hasten.__version__


def test_a_picture_does_not_depend_on_its_batch(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_text("\n\n".join(CAPTIONS[1:]), encoding="utf-8")
    words = ("generate", CAPTIONS[0], "--captions", file, "--model", "TINY", "--steps", 4, "--interval", 2)
    for batch in (1, 3):
        assert run(*words, "--batch", batch, "--out", tmp_path / str(batch)).exit_code == 0
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(names) == 3 and names == sorted(path.name for path in (tmp_path / "3").iterdir())
    for name in names:
        assert np.abs(pixels(tmp_path / "1" / name) - pixels(tmp_path / "3" / name)).max() <= 1


def test_json_is_one_document_and_nothing_else(run: Run, tmp_path: Path) -> None:
    done = run("generate", CAPTIONS[0], "--model", "TINY", "--steps", 2, "--method", "none", "--out", tmp_path, "--json")
    read = json.loads(done.stdout)
    assert read["method"] == "none" and read["reports"] == [] and Path(read["images"][0]["file"]).is_file()


def test_a_saved_plan_draws_the_same_picture_again(run: Run, tmp_path: Path) -> None:
    plan = tmp_path / "plan.safetensors"
    words = ("generate", CAPTIONS[0], "--model", "TINY")
    assert run(*words, "--steps", 6, "--cached", 2, "--boundary", 0.5, "--save-plan", plan, "--out", tmp_path / "a").exit_code == 0
    again = run(*words, "--plan", plan, "--out", tmp_path / "b", "--json")
    assert again.exit_code == 0 and json.loads(again.stdout)["steps"] == 6
    (first,), (second,) = (list((tmp_path / folder).iterdir()) for folder in "ab")
    assert np.array_equal(pixels(first), pixels(second))

    refused = run(*words, "--plan", plan, "--steps", 5, "--out", tmp_path / "c")
    assert refused.exit_code == 2 and "--steps must be 6" in refused.stderr and not (tmp_path / "c").exists()
    refused = run(*words, "--plan", plan, "--guidance", 1, "--out", tmp_path / "c")  # another guidance layout
    assert refused.exit_code == 2 and "guidance" in refused.stderr and not (tmp_path / "c").exists()

    shown = run("plan", "show", plan, "--png", tmp_path / "plan.png", "--json")
    read = json.loads(shown.stdout)
    assert (read["steps"], len(read["sites"])) == (6, 4) and Image.open(tmp_path / "plan.png").width > 100
    assert "6 steps x 4 sites" in run("plan", "show", plan).stdout
    assert run("plan", "diff", plan, plan).stdout.strip() == "the same"


def test_compare_writes_one_picture_of_everything(run: Run, shapes: None, tmp_path: Path) -> None:
    words = ("generate", *CAPTIONS, "--steps", 4, "--interval", 2, "--batch", 2, "--out", tmp_path, "--compare", "--json")
    done = run(*words)
    assert done.exit_code == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["compare.png"]
    picture = Image.open(tmp_path / "compare.png")
    assert picture.width > 1000 and picture.height > 1000
    assert json.loads(picture.info["hasten"])["captions"] == list(CAPTIONS)
    read = json.loads(done.stdout)
    plain, accelerated, fewer = read["variants"]
    assert [row["steps"] for row in (plain, accelerated)] == [4, 4] and fewer["steps"] < 4
    assert plain["psnr"] is None and plain["relative_l2"] == 0 and accelerated["relative_l2"] > 0
    assert read["bound"] > 1 and read["rounds"] == 3 and accelerated["seconds"] > 0
    # The verifier judges captions of its world, and finds noise wrong; a cat it cannot judge.
    assert plain["correct"] == "0 of 2" and [row["correct"] for row in plain["pictures"]] == [False, False, None]


def test_a_models_folder_recommends_its_call(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    assert loading.call_defaults(tiny_pipeline_folder) == {}
    (tmp_path / "hasten.json").write_text('{"steps": 50, "guidance_scale": 3, "note": "for people"}')
    assert loading.call_defaults(tmp_path) == {"num_inference_steps": 50, "guidance_scale": 3.0}
    for wrong in ("[1]", '{"steps": "many"}', "{"):
        (tmp_path / "hasten.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"hasten\.json must be a JSON object"):
            loading.call_defaults(tmp_path)
    with pytest.raises(ValueError, match="no model 'nonsense' ships with hasten; there are shapes"):
        loading.path_of("nonsense")


# ------------------------------------------------------------------------------------------------- looking, measuring


class Page(HTMLParser):
    """Collects where a page's pictures come from, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_verify_writes_a_page_that_needs_nothing_else(run: Run, tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("a <b>red</b> & blue $x_1$\na cat\nleft out\n")
    words = ("verify", "TINY", "--prompts", captions, "--limit", 2, "--steps", 4, "--interval", 2, "--rounds", 1)
    done = run(*words, "--html", tmp_path / "page.html")
    assert done.exit_code == 0, done.stderr
    assert all(word in done.stdout for word in ("plain", "accelerated", "fewer steps", "page.html"))
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert len(page.sources) == 1 + 2 * 3 and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "a <b>red</b> & blue $x_1$" in page.text and "left out" not in page.text
    read = json.loads(run(*words, "--json").stdout)
    assert [row["variant"] for row in read["variants"]] == ["plain", "accelerated", "fewer steps"] and read["html"] is None


def test_trace_and_explain(run: Run) -> None:
    assert "4 can be cached" in run("trace", "TINY").stdout
    assert len(json.loads(run("trace", "TINY", "--json").stdout)["blocks"]) == 4
    done = run("explain", "TINY", "--interval", 2, "--steps", 4)
    assert done.exit_code == 0 and "at most" in done.stdout
    few = json.loads(run("explain", "TINY", "--steps", 4, "--json").stdout)
    assert any("too few" in reason for reason in few["reasons"])


def test_doctor(run: Run, shapes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("doctor", "--json")
    read = json.loads(done.stdout)
    assert done.exit_code == 0 and read["ok"] and read["packages"]["torch"]["state"] == "ok" and "nvrtc" in read["kernels"]

    def missing(name: str) -> Path:
        raise FileNotFoundError(f"the weights of {name!r} are missing")

    monkeypatch.setattr(loading, "path_of", missing)
    done = run("doctor")
    assert done.exit_code == 1 and "the weights of 'shapes' are missing" in done.stdout


def test_bench_hands_over(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, Path | None]] = []
    stand_in = ModuleType("hasten.benchmarks.caching")
    stand_in.run = lambda quick, json_path: asked.append((quick, json_path)) or 1  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hasten.benchmarks.caching", stand_in)
    assert run("bench", "caching", "--quick", "--json", tmp_path / "rows.json").exit_code == 1
    assert asked == [(True, tmp_path / "rows.json")]


def test_a_dry_run_tells_the_time_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    prompts, plan = tmp_path / "prompts.txt", tmp_path / "plan.safetensors"
    prompts.write_text("a cat\na dog\n")
    told = run("plan", "make", "TINY", "--prompts", prompts, "--speedup", 2, "--steps", 5, "--out", plan, "--dry-run")
    assert told.exit_code == 0 and "denoiser calls" in told.stdout and not plan.exists()


def test_a_plan_without_a_certificate_is_replayed_all_the_same(run: Run, tmp_path: Path) -> None:
    prompts, plan = tmp_path / "prompts.txt", tmp_path / "plan.safetensors"
    prompts.write_text("a cat\n")
    words = ("generate", "a cat", "--model", "TINY", "--steps", 5, "--out", tmp_path / "out", "--save-plan", plan)
    assert run(*words, "--method", "forecast", "--interval", 2).exit_code == 0
    told = run("plan", "verify", "TINY", plan, "--prompts", prompts)
    assert told.exit_code == 0 and "carries no prediction" in told.stdout


@pytest.mark.parametrize("method", ["forecast", "fora", "first-block", "teacache"])
def test_every_method_draws_and_its_plan_is_saved_and_drawn_again(run: Run, tmp_path: Path, method: str) -> None:
    plan = tmp_path / "plan.safetensors"
    words = ("generate", "a cat", "--model", "TINY", "--steps", 5, "--out", tmp_path / "out")
    made = run(*words, "--method", method, "--save-plan", plan)
    assert made.exit_code == 0, made.stderr
    first = next((tmp_path / "out").glob("*.png")).read_bytes()
    assert first and run(*words, "--plan", plan).exit_code == 0


def test_a_plan_that_was_made_draws(run: Run, tmp_path: Path) -> None:
    prompts, plan = tmp_path / "prompts.txt", tmp_path / "made" / "plan.safetensors"
    prompts.write_text("a cat\na dog\na cow\n")
    made = run("plan", "make", "TINY", "--prompts", prompts, "--error", 0.5, "--steps", 5, "--out", plan, "--json")
    assert made.exit_code == 0, made.stderr
    certificate = json.loads(made.stdout)["facts"]["certificate"]
    assert certificate["held_out"] == 1 and certificate["predicted"] <= 0.5
    checked = run("plan", "verify", "TINY", plan, "--prompts", prompts, "--json")
    verdict = json.loads(checked.stdout)
    assert verdict["captions"] == 3 and verdict["low"] <= verdict["error"] <= verdict["high"]
    assert checked.exit_code == (0 if verdict["error"] <= 2 * certificate["predicted"] else 1)
    shown = run("plan", "show", plan).stdout
    assert "planned for error 0.5" in shown and "held-out captions" in shown
    assert run("generate", "a cat", "--model", "TINY", "--plan", plan, "--out", tmp_path / "out").exit_code == 0


def test_version_and_help(run: Run) -> None:
    assert run("--version").stdout == f"hasten {hasten.__version__}\n"
    assert run().exit_code == 2 and "Usage" in run().stdout
    for command in ("generate", "verify", "trace", "explain", "doctor", "bench", "plan"):
        done = run(command, "--help")
        assert done.exit_code == 0 and "Usage" in done.stdout


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate"], "CAPTION is missing"),
        (["generate", " "], "CAPTION 1 is empty"),
        (["generate", "--captions", "EMPTY"], "--captions must hold at least one caption"),
        (["generate", "--captions", "MISSING"], "--captions must be a text file"),
        (["generate", "--captions", "BINARY"], "--captions must be UTF-8 text"),
        (["generate", "x", "--model", "nonsense"], "--model must be shapes, shapes-flow, shapes-unet, a diffusers pipeline folder"),
        (["generate", "x", "--model", "EMPTY"], "--model must be"),
        (["generate", "x", "--model", "nobody/nothing"], "HF_HUB_OFFLINE"),
        (["generate", "x", "--model", "TINY", "--interval", "0"], "--interval must be a whole number of at least 1, not 0"),
        (["generate", "x", "--model", "TINY", "--cached", "1.5"], "--cached must be a fraction from 0.0 to 1.0"),
        (["generate", "x", "--model", "TINY", "--boundary", "half"], "--boundary must be a fraction such as 0.75 or a count"),
        (
            ["generate", "x", "--model", "TINY", "--method", "magic"],
            "--method must be one of delta-dit, forecast, fora, deepcache, first-block, teacache, auto, none",
        ),
        (["generate", "x", "--model", "TINY", "--method", "fora", "--cached", "2"], "--method must be delta-dit where --cached is given"),
        (["generate", "x", "--model", "TINY", "--method", "teacache", "--interval", "2"], "must be delta-dit where --interval is given"),
        (["generate", "x", "--model", "TINY", "--method", "forecast", "--interval", "0"], "--interval must be a whole number"),
        (["generate", "x", "--model", "TINY", "--method", "auto", "--cached", "2"], "--method must be delta-dit where --cached is given"),
        (["generate", "x", "--model", "TINY", "--method", "none", "--compare"], "--compare needs something to compare with"),
        (["generate", *["x"] * 25, "--model", "TINY", "--compare"], "--compare shows at most 24 captions, not 25"),
        (["generate", "x", "--model", "TINY", "--method", "none", "--save-plan", "PLAN"], "--save-plan needs a run with a plan"),
        (["generate", "x", "--model", "TINY", "--preset", "best"], "--preset must be one of pixart-alpha-20"),
        (["generate", "x", "--model", "TINY", "--plan", "MISSING"], "there is no plan file"),
        (["generate", "x", "--model", "TINY", "--plan", "BINARY"], "cannot be read as a plan"),
        (["generate", "x", "--model", "TINY", "--plan", "PLAN", "--method", "auto"], "give either it or --method"),
        (["generate", "x", "--model", "TINY", "--steps", "0"], "--steps must be a whole number of at least 1, not 0"),
        (["generate", "x", "--model", "TINY", "--steps", "many"], "--steps"),
        (["generate", "x", "--model", "TINY", "--guidance", "nan"], "--guidance must be a number of at least 0, not nan"),
        (["generate", "x", "--model", "TINY", "--batch", "0"], "--batch must be a whole number of at least 1"),
        (["generate", "x", "--model", "TINY", "--seed", "-1"], "--seed must be a whole number from 0"),
        (["generate", "x", "--model", "TINY", "--size", "wide"], "--size must be width and height in pixels"),
        (["generate", "x", "--model", "TINY", "--size", "63"], "divisible by 8"),
        (["generate", "x", "--model", "TINY", "--dtype", "int3"], "--dtype must be one of"),
        (["generate", "x", "--model", "TINY", "--device", "abacus"], "--device must be one of"),
        (["generate", "x", "--model", "TINY", "--out", "EMPTY"], "--out must be a folder that can be written to"),
        (["generate", "x", "--model", "TINY", "--colour", "red"], "--colour"),
        (["verify", "TINY"], "--prompts"),
        (["verify", "TINY", "--prompts", "EMPTY"], "--prompts must hold at least one caption"),
        (["verify", "TINY", "--prompts", "ONE", "--limit", "0"], "--limit must be a whole number of at least 1"),
        (["verify", "TINY", "--prompts", "ONE", "--method", "none"], "--method must be"),
        (["verify", "TINY", "--prompts", "ONE", "--html", "."], "--html must be a file"),
        (["explain", "TINY", "--method", "none"], "nothing to explain"),
        (["plan", "show", "MISSING"], "there is no plan file"),
        (["plan", "make", "TINY", "--prompts", "TWO"], "give --speedup or --error, one of the two"),
        (["plan", "make", "TINY", "--prompts", "TWO", "--speedup", "2", "--error", "1"], "give --speedup or --error"),
        (["plan", "make", "TINY", "--prompts", "TWO", "--speedup", "0.5"], "--speedup must be a number of at least 1"),
        (["plan", "make", "TINY", "--prompts", "TWO", "--error", "0"], "--error must be positive, not 0"),
        (["plan", "make", "TINY", "--prompts", "ONE", "--speedup", "2"], "--prompts must hold more captions than are held out (1), not 1"),
        (["plan", "make", "TINY", "--prompts", "TWO", "--speedup", "2", "--held-out", "2"], "than are held out (2), not 2"),
        (["plan", "make", "TINY", "--prompts", "TWO", "--speedup", "2", "--out", "."], "--out must be a file"),
        (["bench", "patience"], "NAME must be one of caching, caching-rivals"),
        (["conjure"], "conjure"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_one_line(run: Run, tmp_path: Path, words: list[str], said: str) -> None:
    files = {name: tmp_path / name.lower() for name in ("EMPTY", "MISSING", "BINARY", "ONE", "TWO", "PLAN")}
    files["EMPTY"].write_text(" \n")
    files["BINARY"].write_bytes(b"\xff\xfe\x00\x81")
    files["ONE"].write_text("a cat\n")
    files["TWO"].write_text("a cat\na dog\n")
    before = sorted(tmp_path.iterdir())
    if words[0] == "generate" and "--out" not in words:
        words = [*words, "--out", str(tmp_path / "out")]
    done = run(*(files.get(word, word) for word in words))
    assert done.exit_code == 2, (done.stdout, done.stderr, done.exception)
    assert done.stdout == "" and said in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert sorted(tmp_path.iterdir()) == before


def test_a_failure_in_the_work_is_one_line_unless_debugging(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.app import drawing

    def broken(*anything: object) -> None:
        raise RuntimeError("the lamp\nwent out")

    monkeypatch.setattr(drawing.Job, "call", broken)
    words = ("generate", "x", "--model", "TINY", "--steps", 2, "--out", tmp_path / "out")
    done = run(*words)
    assert done.exit_code == 1 and done.stderr == "error: RuntimeError: the lamp went out (HASTEN_DEBUG=1 shows where)\n"
    monkeypatch.setenv("HASTEN_DEBUG", "1")
    done = run(*words)
    assert done.exit_code == 1 and "Traceback" in done.stderr and "in broken" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.app import files

    path = tmp_path / "picture.png"
    files.write(path, b"old")

    def stop(*anything: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        files.write(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_help_loads_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys\n"
        "from hasten.app.cli import app\n"
        "try:\n    app(['generate', '--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_command_as_a_process(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    words = ["generate", "a cat", "--model", str(tiny_pipeline_folder), "--steps", "2", "--out", str(tmp_path), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-m", "hasten", *words], capture_output=True, text=True, env=environment, check=True)
    assert Path(json.loads(done.stdout)["images"][0]["file"]).is_file()
    assert "Warning" not in done.stderr and len(done.stderr.splitlines()) <= 1  # the announcement of the automatic method
