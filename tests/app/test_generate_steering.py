"""`hasten generate --steer` and `--search` on a tiny random pipeline: what comes out, what is told about it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import hasten
from hasten.accelerators.steering.kernels import linear_sde
from hasten.accelerators.steering.mixes import MeanRank, WeightedSum
from hasten.accelerators.steering.pretrained import PRETRAINED
from hasten.accelerators.steering.verifiers import Brightness, ColourTarget, JPEGSize
from hasten.app import rewards
from hasten.app.cli import app
from hasten.app.models import choose_model, open_model
from hasten.app.rewards import choose_reward, reward_names, with_gradients
from hasten.app.steering import NOT_PLAIN, SEARCHES, STEERS, Steering, choose
from hasten.pipelines.zoo import loading

Run = Callable[..., Any]
CAPTIONS = ("a small red circle", "a large blue square left of a small red circle")

OWN = """
import torch

class Darkness:
    differentiable = True
    range_hint = None

    def score(self, images, prompts):
        return -images.flatten(1).mean(1)

def redness(images):
    return images[:, 0].flatten(1).mean(1) - images[:, 2].flatten(1).mean(1)

def broken(images, prompts):
    return images.flatten(1).mean(1) * float("nan")

def one(images, prompts):
    return images.mean()

def detached(images, prompts):
    return images.detach().flatten(1).mean(1)

number = 3
"""


@pytest.fixture
def run(tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `hasten generate` in this process, in a folder with a module `own_rewards`; TINY is the pipeline's folder."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "own_rewards.py").write_text(OWN)
    (tmp_path / "here" / "failing_rewards.py").write_text("raise RuntimeError('the lamp\\nwent out')")
    monkeypatch.chdir(tmp_path / "here")

    def call(*words: object) -> Any:
        return CliRunner().invoke(app, ["generate", *(str(tiny_pipeline_folder) if word == "TINY" else str(word) for word in words)])

    return call


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def luma(path: Path | str) -> float:
    return float((pixels(Path(path)) @ np.array([0.299, 0.587, 0.114])).mean() / 255)


def told(done: Any) -> Any:
    assert done.exit_code == 0, (done.stderr, done.exception)
    return json.loads(done.stdout)


# ------------------------------------------------------------------------------------------------------------ what comes out


def test_the_command_draws_what_the_library_draws(run: Run, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    words = (
        CAPTIONS[0],
        "--model",
        "TINY",
        "--steps",
        6,
        "--seed",
        7,
        "--out",
        tmp_path / "out",
        "--particles",
        3,
        "--reward",
        "brightness",
    )
    read = told(run(*words, "--steer", "fk", "--set", "lambda=50", "--set", "every=0.4", "--set", "eta=0.8", "--json"))
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == "00-a-small-red-circle-seed7.png"
    model = open_model(choose_model(str(tiny_pipeline_folder)))
    wrapped = hasten.steer(model.pipe, Brightness(), hasten.FKSteering(particles=3, lambda_=50, every=0.4), eta=0.8)
    call = {"generator": torch.Generator().manual_seed(7), "num_inference_steps": 6, **model.arguments(None, None)}
    # One particle at a time against three: the same but for rounding.
    assert np.abs(pixels(path) - np.asarray(wrapped(CAPTIONS[0], **call).images[0]).astype(int)).max() <= 1
    text = json.loads(Image.open(path).info["hasten"])
    assert text["method"] == "none" and text["steering"]["settings"]["lambda_"] == 50 and text["steering"]["eta"] == 0.8
    assert text["reward"] == read["images"][0]["reward"] == pytest.approx(luma(path), abs=2 / 255)
    assert read["runs"][0]["report"]["facts"]["schedule"] == wrapped.report.facts["schedule"]
    assert read["runs"][0]["report"]["cost"]["spent"] == wrapped.report.meter.to_json()["spent"]


def test_all_particles_are_saved_best_first_and_the_best_is_the_one_alone(run: Run, tmp_path: Path) -> None:
    words = (CAPTIONS[0], "--model", "TINY", "--steps", 2, "--steer", "best-of-n", "--particles", 3, "--reward", "brightness")
    read = told(run(*words, "--select", "all", "--out", tmp_path / "all", "--json"))
    files = [entry["file"] for entry in read["images"]]
    assert [Path(file).name for file in files] == [f"00-a-small-red-circle-seed0-{rank}.png" for rank in (1, 2, 3)]
    found = [entry["reward"] for entry in read["images"]]
    assert found == sorted(found, reverse=True) and len(set(found)) == 3
    assert found == pytest.approx([luma(file) for file in files], abs=1 / 255)
    done = run(*words, "--out", tmp_path / "one")
    (path,) = (tmp_path / "one").iterdir()
    assert np.array_equal(pixels(path), pixels(Path(files[0])))
    assert f"{path}  reward {found[0]:.4f}" in done.stdout and "1 caption of 2 steps" in done.stdout and "best of 3" in done.stdout
    assert "6 particle steps, 3 decodes, 3 verifier rows" in done.stdout


def test_a_picture_depends_neither_on_other_captions_nor_on_the_micro_batch(run: Run, tmp_path: Path) -> None:
    words = ("--model", "TINY", "--steps", 3, "--steer", "code", "--particles", 3, "--reward", "sharpness")
    both = run(*CAPTIONS, *words, "--seed", 4, "--micro-batch", 2, "--out", tmp_path / "both")
    alone = run(CAPTIONS[1], *words, "--seed", 5, "--micro-batch", 3, "--out", tmp_path / "alone")
    assert both.exit_code == alone.exit_code == 0, (both.stderr, alone.stderr)
    (first,) = (tmp_path / "alone").iterdir()
    second = tmp_path / "both" / first.name.replace("00-", "01-", 1)
    assert first.name.endswith("-seed5.png") and np.abs(pixels(first) - pixels(second)).max() <= 1


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        (["random", "--rounds", "2"], 18),
        (["zero-order", "--rounds", "2", "--set", "neighbours=2"], 15),
        (["paths", "--set", "branches=2"], 40),
        (["rollover", "--set", "initial=2", "--kernel", "linear-sde"], 12),
        (["reno", "--rounds", "2"], 9),
        (["carinox", "--set", "seeds=[1, 2]", "--rounds", "1"], 9),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_search_finds_within_its_budget(run: Run, tmp_path: Path, words: list[str], limit: int) -> None:
    budget = f"particle-steps={limit}, seconds=600"
    own = ("--model", "TINY", "--steps", 3, "--reward", "brightness:2", "--budget", budget, "--out", tmp_path / "out")
    read = told(run(CAPTIONS[0], "--search", *words, *own, "--json"))
    (entry,) = read["images"]
    assert entry["reward"] == pytest.approx(2 * luma(entry["file"]), abs=4 / 255)
    cost = read["runs"][0]["report"]["cost"]
    assert 0 < cost["spent"]["particle_steps"] <= limit and cost["budget"]["particle_steps"] == limit
    assert read["steering"]["budget"] == {"particle_steps": limit, "seconds": 600.0}


def test_a_climb_through_drafts_tells_the_reward_of_the_picture_not_of_the_draft(run: Run, tmp_path: Path) -> None:
    words = ("--model", "TINY", "--steps", 3, "--reward", "own_rewards:Darkness", "--search", "reno", "--rounds", 1)
    read = told(run(CAPTIONS[0], *words, "--set", "draft_steps=1", "--out", tmp_path / "out", "--json"))
    (entry,) = read["images"]
    picture = -float(pixels(Path(entry["file"])).mean() / 255)
    (draft,) = read["runs"][0]["report"]["rewards"]
    assert entry["reward"] == pytest.approx(picture, abs=1e-6) and abs(draft - picture) > 1e-4


def test_versus_draws_best_of_n_in_the_same_time(run: Run, tmp_path: Path) -> None:
    words = (*CAPTIONS, "--model", "TINY", "--steps", 3, "--steer", "halving", "--set", "rungs=[[0.4, 1]]", "--particles", 2)
    done = run(*words, "--reward", "jpeg-size", "--versus", "--out", tmp_path / "out", "--report", tmp_path / "a" / "report.json")
    assert done.exit_code == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(names) == 4 and names[0] == "00-a-small-red-circle-seed0-best-of-n.png"
    read = json.loads((tmp_path / "a" / "report.json").read_text())
    for mine in read["runs"]:
        rival = mine["best_of_n"]
        assert rival["report"]["cost"]["budget"]["seconds"] == mine["seconds"]
        scored = [row[2] for row in rival["report"]["nodes"]["rows"]]
        assert rival["reward"] == max(scored) and len(scored) == rival["report"]["cost"]["spent"]["decodes"]
        assert rival["report"]["cost"]["spent"]["particle_steps"] == 3 * len(scored)
    table = {line[:4]: line.split() for line in done.stdout.splitlines()}
    means = [sum(rewards) / 2 for rewards in zip(*((m["reward"], m["best_of_n"]["reward"]) for m in read["runs"]), strict=True)]
    assert [float(table["halv"][1]), float(table["best"][7])] == pytest.approx(means, abs=1e-4)
    assert "of 2 captions halving is better on" in done.stdout


def test_report_and_plots(run: Run, tmp_path: Path) -> None:
    words = (CAPTIONS[0], "--model", "TINY", "--steps", 3, "--steer", "svdd", "--particles", 2, "--reward", "own_rewards:redness")
    done = run(*words, "--out", tmp_path / "out", "--plots", tmp_path / "plots", "--report", tmp_path / "report.json", "--json")
    assert told(done) == json.loads((tmp_path / "report.json").read_text())
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == [f"00-a-small-red-circle-seed0-{name}.png" for name in ("gallery", "lineage", "rewards")]
    assert all(Image.open(tmp_path / "plots" / name).width > 100 for name in names)


def test_steering_goes_with_caching(run: Run, tmp_path: Path) -> None:
    plan = tmp_path / "plan.safetensors"
    words = (CAPTIONS[0], "--model", "TINY", "--steps", 5, "--steer", "fk", "--particles", 2, "--reward", "brightness")
    read = told(run(*words, "--interval", 2, "--out", tmp_path / "out", "--save-plan", plan, "--json"))
    assert read["method"].startswith("delta-dit N=2") and read["steering"]["micro_batch"] is None
    assert hasten.Plan.load(plan).computed_fraction < 1
    again = told(run(*words, "--plan", plan, "--versus", "--out", tmp_path / "again", "--json"))
    assert again["runs"][0]["best_of_n"]["report"]["cost"]["spent"]["particle_steps"] % 5 == 0
    assert np.array_equal(pixels(Path(read["images"][0]["file"])), pixels(Path(again["images"][0]["file"])))


def test_a_reward_that_is_no_number_loses_with_a_warning(run: Run, tmp_path: Path) -> None:
    words = (CAPTIONS[0], "--model", "TINY", "--steps", 2, "--steer", "best-of-n", "--particles", 2, "--reward", "own_rewards:broken")
    done = run(*words, "--out", tmp_path / "out")
    assert done.exit_code == 0 and "reward none" in done.stdout and "warning: broken returned NaN or infinity for" in done.stdout
    assert "Warning" not in done.stderr
    assert told(run(*words, "--out", tmp_path / "out", "--json"))["images"][0]["reward"] is None


def test_models_that_ship_have_a_reward_of_their_own(
    run: Run, tmp_path: Path, tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "path_of", lambda name: tiny_pipeline_folder)
    read = told(run(CAPTIONS[1], "--steer", "best-of-n", "--particles", 2, "--steps", 2, "--out", tmp_path / "out", "--json"))
    assert read["steering"]["reward"] == "shapes" and read["steering"]["micro_batch"] == 8 and 0 <= read["images"][0]["reward"] < 1


# ------------------------------------------------------------------------------------------------------------------ names


def chosen(**options: Any) -> Any:
    return choose(Steering(**{"reward": "brightness", **options}), shipped=False, captions=CAPTIONS)


def test_names_and_settings_become_methods() -> None:
    assert chosen(steer="fk").method == hasten.FKSteering()
    settings = ("lambda=10", "potential=max", "ess=null", "eta=0.5")
    found = chosen(steer="fk", particles=8, select="sample", settings=settings, kernel="linear-sde")
    assert found.method == hasten.FKSteering(8, "max", 10, ess=None, select="sample")
    assert found.extra == {"kernel": "linear-sde", "eta": 0.5}
    halving = chosen(steer="halving", particles=6, settings=["rungs=[[0.3, 3], [0.7, 1]]"])
    assert halving.method == hasten.SuccessiveHalving(6, ((0.3, 3), (0.7, 1)))
    assert chosen(search="random", rounds=2, settings=["pool=3"]).method == hasten.RandomSearch(rounds=2, pool=3)
    assert chosen(search="rollover", kernel="linear-sde").method == hasten.RolloverBudget(kernel=linear_sde)
    reno = chosen(search="reno", rounds=7, settings=["clip_each=0.1", "draft_steps=2"])
    assert reno.method == hasten.ReNO(iterations=7, clip_each=0.1) and reno.extra == {"draft_steps": 2}
    assert chosen(search="carinox", settings=["seeds=[3]"]).method == hasten.CARINOX(seeds=(3,))
    for name in STEERS:
        assert chosen(steer=name, particles=3).method == getattr(hasten, STEERS[name].kind)(3)
    for name in SEARCHES:
        assert type(chosen(search=name).method).__name__ == SEARCHES[name].kind


def test_every_setting_can_be_set() -> None:
    for option, table in (("steer", STEERS), ("search", SEARCHES)):
        for name, named in table.items():
            method = getattr(hasten, named.kind)()
            plain = [entry for entry in fields(method) if entry.name not in NOT_PLAIN]
            settings = [f"{entry.name}={json.dumps(getattr(method, entry.name))}" for entry in plain]
            assert settings and chosen(**{option: name}, settings=settings).method == method


def test_budgets() -> None:
    texts = ["particle_steps=200, verifier-rows=7", "seconds=1.5"]
    assert chosen(steer="fk", budget=texts).budget == hasten.Budget(particle_steps=200, verifier_rows=7, seconds=1.5)
    assert chosen(steer="fk").budget == hasten.Budget()


def test_rewards_and_their_weights(run: Run) -> None:
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = ["x"] * 3
    bright, size = Brightness().score(images, prompts), JPEGSize().score(images, prompts)
    both = choose_reward("brightness:2, jpeg-size:-0.5")
    assert isinstance(both.verifier, WeightedSum) and both.names == ("brightness", "jpeg-size")
    assert torch.allclose(both.verifier.score(images, prompts), 2 * bright - 0.5 * size)
    assert choose_reward("brightness").verifier == Brightness()
    assert torch.allclose(choose_reward("brightness:3").verifier.score(images, prompts), 3 * bright)
    assert choose_reward("colour:red").verifier == ColourTarget((1.0, 0.0, 0.0))
    hexadecimal = choose_reward("colour:#ff8800:0.5")
    assert hexadecimal.parts == (ColourTarget((1.0, 136 / 255, 0.0)),) and hexadecimal.verifier.weights == (0.5,)
    own = choose_reward("own_rewards:redness:2,own_rewards:Darkness")
    expected = 2 * (images[:, 0] - images[:, 2]).flatten(1).mean(1) - images.flatten(1).mean(1)
    assert torch.allclose(own.verifier.score(images, prompts), expected, atol=1e-6)
    ranked = choose_reward("brightness,own_rewards:Darkness", rank=True).verifier
    assert isinstance(ranked, MeanRank)
    assert ranked.score(images, prompts).tolist() == pytest.approx([4 / 6] * 3)  # opposite ranks cancel


def test_what_is_said_of_gradients_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "_proxy", lambda: Brightness())  # its weights need not be there; it is differentiable by design
    names = [name.replace("NAME", "red") for name in reward_names()[:-1]]
    assert set(PRETRAINED) < set(names)
    passing = [name for name in names if choose_reward(name).verifier.differentiable]
    assert sorted(passing) == sorted(name.replace("NAME", "red") for name in with_gradients())


# --------------------------------------------------------------------------------------------------------------- refusals

FK, RENO = ["--steer", "fk", "--reward", "brightness"], ["--search", "reno", "--reward"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*FK, "--search", "random"], "give --steer or --search, one of the two"),
        (["--reward", "brightness"], "--reward needs --steer or --search"),
        (["--set", "rho=1"], "--set needs --steer or --search"),
        (["--micro-batch", "2"], "--micro-batch needs --steer or --search"),
        (["--versus"], "--versus needs --steer or --search"),
        (["--particles", "0"], "--particles needs --steer or --search"),
        (["--steer", "fkk"], "--steer must be one of fk, best-of-n, halving, svdd, code, not 'fkk'; did you mean fk?"),
        (["--steer", "random"], "not 'random'; random is for --search"),
        (["--search", "zero_order"], "reno, carinox, not 'zero_order'; did you mean zero-order?"),
        (["--steer", "fk"], "--reward is missing: say what is to be maximised, one of shapes, shapes-proxy, clip"),
        (["--steer", "fk", "--reward", "brigthness"], "not 'brigthness'; did you mean brightness?"),
        (["--steer", "fk", "--reward", "brightness,"], "package.module:function, not ''"),
        (["--steer", "fk", "--reward", "brightness:0"], "a weight must be a finite number other than 0"),
        (["--steer", "fk", "--reward", "brightness:inf"], "a weight must be a finite number other than 0"),
        (["--steer", "fk", "--reward", "colour"], "--reward colour needs a colour, such as colour:red"),
        (["--steer", "fk", "--reward", "colour:blurple"], "such as colour:red or colour:#ff8800, not 'blurple'"),
        (["--steer", "fk", "--reward", "no.such.module:f"], "--reward no.such.module:f cannot be imported: ModuleNotFoundError"),
        (["--steer", "fk", "--reward", "own_rewards:nothing"], "cannot be imported: AttributeError"),
        (["--steer", "fk", "--reward", "failing_rewards:f"], "cannot be imported: RuntimeError: the lamp went out"),
        (["--steer", "fk", "--reward", "own_rewards:number"], "a verifier must be callable or have score(images, prompts), not int"),
        (["--steer", "fk", "--reward", "own_rewards:one"], "must return one score per image, shape ["),
        (["--steer", "fk", "--reward", "shapes"], "CAPTION 1 cannot be judged by --reward shapes:"),
        (["--steer", "fk", "--reward", "clip"], "--reward: CLIPScore cannot load"),
        ([*FK, "--rank"], "--rank takes two rewards or more"),
        (["--steer", "fk", "--reward", "brightness:2,sharpness", "--rank"], "--rank takes two rewards or more, without weights"),
        (["--steer", "fk", "--reward", "brightness,sharpness", "--rank", "--versus"], "leave out --rank"),
        ([*RENO, "jpeg-size"], "--search reno climbs gradients, and jpeg-size has none; these have: shapes-proxy, clip"),
        ([*RENO, "brightness,sharpness", "--rank"], "climbs gradients, and ranks have none"),
        ([*RENO, "own_rewards:detached"], "detached detaches its scores from the images"),
        ([*FK, "--particles", "0"], "--particles must be a whole number of at least 1, not 0"),
        ([*FK, "--rounds", "2"], "--rounds is no setting of fk; --set takes particles, potential"),
        (["--search", "paths", "--rounds", "2"], "--rounds is no setting of paths; --set takes paths, branches"),
        (["--search", "random", "--particles", "2"], "--particles is no setting of random; --set takes rounds, pool"),
        ([*FK, "--set", "lamda=2"], "--set: fk has no setting 'lamda', but particles, potential"),
        ([*FK, "--set", "potental=max"], "did you mean potential?"),
        ([*FK, "--set", "potential"], "--set must be NAME=VALUE, such as potential=max, not 'potential'"),
        ([*FK, "--set", "every=0.2", "--set", "every=0.3"], "--set gives every twice"),
        ([*FK, "--set", "particles=3", "--particles", "4"], "--set gives particles, which another option gives already"),
        ([*FK, "--set", "lambda=high"], "--set lambda_ must be a number, not 'high'"),
        ([*FK, "--set", "lambda=true"], "--set lambda_ must be a number, not True"),
        ([*FK, "--set", "ess=2"], "--set: ess must be a share above 0 and at most 1, or None, not 2"),
        ([*FK, "--set", "eta=2"], "eta must be from 0 to 1, not 2"),
        ([*FK, "--set", "draft_steps=2"], "fk has no setting 'draft_steps'"),
        ([*FK, "--select", "worst"], "--select must be one of best, sample, all, not 'worst'"),
        (["--steer", "halving", "--reward", "brightness", "--select", "all"], "where the method is halving: it returns one sample"),
        (["--steer", "halving", "--reward", "brightness", "--set", "rungs=[1]"], "--set: halving cannot take rungs=[1]"),
        (["--steer", "halving", "--reward", "brightness", "--steps", "2"], "2 steps are too few for rungs at"),
        ([*FK, "--kernel", "euler"], "--kernel must be one of auto, ddim, linear-sde, renoise, scheduler, not 'euler'"),
        ([*FK, "--kernel", "scheduler"], "a sampler that draws no noise would keep the copies the same"),
        (["--search", "random", "--reward", "brightness", "--kernel", "ddim"], "--kernel is for --steer and for --search rollover"),
        (["--search", "rollover", "--reward", "brightness", "--kernel", "scheduler"], "where --search is rollover, not 'scheduler'"),
        ([*FK, "--budget", "lots"], "--budget must be UNIT=N such as particle_steps=200 or seconds=30, not 'lots'"),
        ([*FK, "--budget", "second=3"], "not 'second'; did you mean seconds?"),
        ([*FK, "--budget", "decodes=2.5"], "--budget decodes must be a whole number, not '2.5'"),
        ([*FK, "--budget", "decodes=9", "--budget", "decodes=9"], "--budget gives decodes twice"),
        ([*FK, "--budget", "decodes=0"], "--budget: decodes must be a whole number of at least 1"),
        ([*FK, "--budget", "seconds=inf"], "--budget seconds must be finite"),
        ([*FK, "--budget", "particle_steps=3"], "particle_steps left, but one sample takes 6; raise particle_steps"),
        ([*FK, "--micro-batch", "0"], "--micro-batch must be a whole number of at least 1"),
        ([*FK, "--micro-batch", "1", "--interval", "2"], "micro_batch does not go with an accelerated pipeline"),
        ([*FK, "--batch", "2"], "--batch is for plain drawing"),
        ([*FK, "--compare"], "--compare measures caching alone"),
        ([*FK, "--save-plan", "plan.safetensors"], "--save-plan needs one run with a plan"),
        ([*FK, "--report", "."], "--report must be a file"),
        ([*FK, "--plots", "own_rewards.py"], "--plots must be a folder that can be written to"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_one_line(run: Run, tmp_path: Path, words: list[str], said: str) -> None:
    steps = [] if "--steps" in words else ["--steps", "6"]
    files = {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}
    done = run("x", "--model", "TINY", *steps, "--out", tmp_path / "out", *words)
    assert done.exit_code == 2, (done.stdout, done.stderr, done.exception)
    assert done.stdout == "" and said in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts} == files
