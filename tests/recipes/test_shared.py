"""What all recipes rely on: a training that is interrupted ends where it would have ended, and an export that fails harms nothing."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPES))
    import shared

    return shared


class Pair:
    """A model and a head, trained on something that depends on the step alone."""

    def __init__(self, shared: ModuleType, path: Path, **options: Any) -> None:
        torch.manual_seed(0)
        self.model, self.head = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 2)
        settings = {"steps": 6, "rate": 0.1, "falling": 0.5, "warmup": 2, **options}
        self.training = shared.Training(path, {"model": self.model, "head": self.head}, [self.model[0].weight], **settings)

    def run(self, until: int) -> Pair:
        for step in range(self.training.start, until):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            (self.head(self.model(x)) - x[:, :2]).square().mean().backward()
            self.training.step(step)
        return self

    @property
    def weights(self) -> dict[str, Tensor]:
        found = {**self.model.state_dict(), **{f"head.{name}": value for name, value in self.head.state_dict().items()}}
        return {name: value.clone() for name, value in found.items()}


def test_an_interrupted_training_ends_where_it_would_have_ended(shared: ModuleType, tmp_path: Path) -> None:
    whole = Pair(shared, tmp_path / "whole.pt").run(6)
    Pair(shared, tmp_path / "model.pt").run(4).training.save(4, scale=0.5)
    again = Pair(shared, tmp_path / "model.pt")
    assert again.training.start == 4 and not again.training.finished and again.training.state["scale"] == 0.5
    again.run(6)
    assert all(torch.equal(again.weights[name], value) for name, value in whole.weights.items())
    assert all(torch.equal(again.training.average[name], value) for name, value in whole.training.average.items())
    again.training.save(6, scale=0.5)
    assert set(torch.load(tmp_path / "model.pt")) == {"average", "step", "scale"}, "what only going on needs is left out at the end"
    assert Pair(shared, tmp_path / "model.pt").training.finished


def test_every_parameter_is_trained_by_one_optimiser_at_its_rate(shared: ModuleType, tmp_path: Path) -> None:
    pair = Pair(shared, tmp_path / "model.pt", steps=10, rate=0.4, falling=0.5, warmup=2)
    muon, adam = ([p for group in optimizer.param_groups for p in group["params"]] for optimizer in pair.training.optimizers)
    assert [p is pair.model[0].weight for p in muon] == [True]
    assert {id(p) for p in adam} == {id(p) for p in [pair.model[0].bias, *pair.head.parameters()]} and len(adam) == 3
    rates = []
    for step in range(10):
        for p in [*muon, *adam]:
            p.grad = torch.zeros_like(p)
        pair.training.step(step)
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in pair.training.optimizers])
        assert all(p.grad is None for p in [*muon, *adam])
    assert [rate for rate, _ in rates] == pytest.approx([0.2, 0.4, 0.4, 0.4, 0.4, 0.4, 0.32, 0.24, 0.16, 0.08])
    assert [2 * half for _, half in rates] == pytest.approx([rate for rate, _ in rates])


def test_the_average_follows_the_first_parts_weights(shared: ModuleType, tmp_path: Path) -> None:
    pair = Pair(shared, tmp_path / "model.pt")
    expected = {name: value.double() for name, value in pair.model.state_dict().items()}
    for step in range(6):
        pair.run(step + 1)
        pair.training.start = step + 1
        keep = (step + 1) / (step + 10)  # below EMA in the first steps
        expected = {name: keep * value + (1 - keep) * pair.model.state_dict()[name].double() for name, value in expected.items()}
    assert pair.training.average.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(pair.training.average[name].double(), value, rtol=1e-5, atol=1e-6)


def test_an_export_takes_the_place_of_the_old_one_as_a_whole_or_not_at_all(shared: ModuleType, tmp_path: Path) -> None:
    weights, work = tmp_path / "zoo" / "model", tmp_path / "runs"
    weights.mkdir(parents=True)
    (weights / "old").write_text("1")
    work.mkdir()
    (work / "log.jsonl").write_text("{}\n")
    with pytest.raises(RuntimeError, match="judged"), shared.replacing(weights) as scratch:
        scratch.mkdir()
        (scratch / "half").write_text("2")
        raise RuntimeError("could not be judged")
    assert [path.name for path in weights.iterdir()] == ["old"]
    with shared.replacing(weights) as scratch:
        assert not scratch.exists(), "nothing of the failed export is left"
        scratch.mkdir()
        shared.describe(scratch, work, {"step": 6}, "# model\n")
    assert {path.name for path in weights.iterdir()} == {"README.md", "results.json", "training_log.jsonl"}
    assert json.loads((weights / "results.json").read_text()) == {"step": 6} and [p.name for p in weights.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(("given", "run"), [([], ["train", "export"]), (["--stage", "export"], ["export"])])
def test_stages_run_in_order_or_one_alone(
    shared: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], run: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--steps", "3", *given])
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int)
    called: list[tuple[str, int]] = []
    stages = {name: lambda args, name=name: called.append((name, args.steps)) for name in ("train", "export")}
    shared.run_stages(parser, stages, [tmp_path / "runs" / "model"])
    assert called == [(name, 3) for name in run] and (tmp_path / "runs" / "model").is_dir()
