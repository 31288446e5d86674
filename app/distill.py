"""`hasten distill`: a training, described in a YAML file, from data to a step LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.app import files
from hasten.app.errors import BadInput
from hasten.app.output import Outcome

if TYPE_CHECKING:
    from hasten.pipelines.step_lora import StepLoRA

DISTILLING = {
    "trajectory": "TrajectoryConsistency",
    "phased": "PhasedConsistency",
    "lcm": "LCM",
    "ctm": "ConsistencyTrajectory",
    "dmd": "DistributionMatching",
}
"""Methods that learn from the teacher, by their public name."""
TUNING = {"online-pso": "OnlinePSO", "offline-pso": "OfflinePSO", "feedback": "RewardFeedback"}
"""Methods that go on with a step LoRA."""

EXAMPLE = """\
# hasten distill CONFIG.yaml: trains a LoRA with which a pipeline needs few steps.
model: shapes                # a model that ships, a diffusers folder or a hub id
prompts: prompts.txt         # one a line; the teacher draws the training pictures itself.  Or:
# data: pictures/            # NAME.txt beside NAME.png, or metadata.jsonl with file_name and text
output: runs/steps           # adapters, checkpoint, log, sample sheets; the same command goes on from the checkpoint
method: trajectory           # trajectory, phased, lcm, ctm, dmd;  online-pso, offline-pso, feedback go on with `start`
settings:                    # of the method, see docs/distillation.md
  segments: [8, 4, 2, 1]
  guidance: [3.0, 3.0]       # the range of guidance scales that is folded in
steps: 1000                  # optimiser steps
train:                       # of the optimiser: batch_size, learning_rate, warmup, grid_steps, top, mixed_precision, seed, ...
  batch_size: 16
  learning_rate: 1.0e-4
  checkpoint_every: 100
  sample_every: 200
lora: {rank: 16}
teacher_steps: 50            # of the pictures that the teacher draws
sample_prompts: ["a small red circle", "a large blue square left of a green cross"]
# start: runs/steps          # adapters to begin from; needed by the methods that tune
# reward: shapes-proxy       # of the methods that tune: as for hasten generate --reward
# sampled_in: 4              # steps that are tuned
# call: {height: 512}        # further arguments of the pipeline's call
"""


@dataclass(frozen=True)
class Config:
    """What the file says; relative paths in it are relative to it.

    Attributes:
        model, dtype, device: As for other commands.
        output, method, settings, steps, train, lora, start, teacher_steps, sample_prompts, call: See `hasten.distill`.
        data, prompts: One of them.
        reward, sampled_in: See `hasten.tune`.
    """

    model: str
    output: str
    steps: int
    method: str = "trajectory"
    data: str | None = None
    prompts: str | list[str] | None = None
    settings: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    start: str | None = None
    teacher_steps: int = 50
    sample_prompts: list[str] | None = None
    reward: str | None = None
    sampled_in: int | None = None
    call: dict[str, Any] | None = None
    dtype: str = "float32"
    device: str = "auto"


def distill(path: Path, *, resume: bool = True, dry_run: bool = False) -> Outcome:
    """Trains what the file describes.

    Args:
        resume: Whether to go on from a checkpoint in the output folder.
        dry_run: Whether everything is checked, the model loaded, and nothing trained.

    Raises:
        BadInput: The file, or what it names, is not allowed. Nothing was written.
    """
    config = read(path)
    folder = path.parent
    tuning = config.method in TUNING
    method = method_of(config)
    data = _data(config, folder, tuning)
    output = folder / config.output
    files.check_folder("output", output)
    start = _start(config, folder)
    if tuning and start is None:
        raise BadInput(f"start must name a step LoRA's folder: method {config.method} goes on with one")
    if not tuning and (config.reward or config.sampled_in):
        raise BadInput(f"reward and sampled_in belong to {', '.join(TUNING)}, not to method {config.method}")

    from hasten.app.models import choose_model, open_model
    from hasten.app.rewards import choose_reward

    reward = choose_reward(config.reward) if config.reward else None
    model = open_model(choose_model(config.model), dtype=config.dtype, device=config.device)
    call = {**model.arguments(None, None), **(config.call or {})}
    call.pop("guidance_scale", None)
    common: dict[str, Any] = {
        "steps": config.steps, "output": output, "call": call, "sample_prompts": tuple(config.sample_prompts or ()), "resume": resume,
        **(config.train or {}),
    }  # fmt: skip
    if dry_run:
        return Outcome({"config": vars(config), "method": repr(method)}, f"{path} is in order: {method!r}, {config.steps} steps")
    try:
        made = _run(config, model.pipe, data, method, start, reward, common)
    except TypeError as error:
        raise BadInput(f"{path}: train: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from error
    counts = ", ".join(map(str, made.steps))
    text = (
        f"{output / 'pytorch_lora_weights.safetensors'}: {made.facts['method']}, rank {made.rank}, for {counts} steps\n"
        f'hasten generate "{(config.sample_prompts or ["a small red circle"])[0]}" --model {config.model} --step-lora {output} '
        f"--steps {made.steps[-1]}"
    )
    return Outcome({"output": str(output), "steps": list(made.steps), "facts": dict(made.facts)}, text)


def _run(config: Config, pipe: Any, data: Any, method: Any, start: StepLoRA | None, reward: Any, common: dict[str, Any]) -> StepLoRA:
    from hasten.accelerators.distillation.adapters import LoRA
    from hasten.pipelines.distilling import distill as train
    from hasten.pipelines.tuning import tune

    if config.method in TUNING:
        assert start is not None
        verifier = None if reward is None else reward.verifier
        return tune(pipe, start, data, method, reward=verifier, sampled_in=config.sampled_in, **common)
    lora = None if config.lora is None else LoRA(**_tuples(config.lora))
    return train(pipe, data, method, start=start, lora=lora, teacher_steps=config.teacher_steps, **common)


def read(path: Path) -> Config:
    """The file.

    Raises:
        BadInput: It is missing, no YAML, or has an entry that is unknown, missing or of a wrong kind.
    """
    yaml: Any = import_module("yaml")  # which comes without types
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"CONFIG must be a YAML file, not {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"CONFIG must be a YAML file; {path}: {' '.join(str(error).split())}") from None
    if not isinstance(told, Mapping):
        raise BadInput(f"CONFIG must be entries such as model: shapes; {path} holds {type(told).__name__}. --example shows one")
    known = {entry.name: entry for entry in fields(Config)}
    for name, value in told.items():
        if name not in known:
            near = get_close_matches(str(name), known, 1)
            raise BadInput(f"{path}: there is no entry {name!r}; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"))
        _check_kind(path, known[name], value)
    missing = [name for name, entry in known.items() if entry.default is MISSING and name not in told]
    if missing:
        raise BadInput(f"{path}: {missing[0]} is missing; --example shows a whole file")
    return Config(**told)


def _check_kind(path: Path, entry: Field[Any], value: Any) -> None:
    """Entries are of few kinds, and their annotations name them."""
    kinds: dict[str, type] = {"str": str, "int": int, "list[str]": list, "dict[str, Any]": dict}
    allowed = [part for part in str(entry.type).split(" | ") if part != "None"]
    if value is None and "None" in str(entry.type):
        return
    if not any(isinstance(value, kinds[part]) and not isinstance(value, bool) for part in allowed):
        words = {"str": "a text", "int": "a whole number", "list[str]": "a list of texts", "dict[str, Any]": "entries of its own"}
        raise BadInput(f"{path}: {entry.name} must be {' or '.join(words[part] for part in allowed)}, not {value!r}")


def method_of(config: Config) -> Any:
    """The method with its settings.

    Raises:
        BadInput: There is none of that name, or it has no such setting.
    """
    import hasten

    known = {**DISTILLING, **TUNING}
    if config.method not in known:
        near = get_close_matches(config.method, known, 1)
        raise BadInput(f"method must be one of {', '.join(known)}, not {config.method!r}" + (f"; did you mean {near[0]}?" if near else ""))
    kind = getattr(hasten, known[config.method])
    settings = _tuples(config.settings or {})
    allowed = [entry.name for entry in fields(kind)]
    for name in settings:
        if name not in allowed:
            raise BadInput(f"settings: {config.method} has no {name!r}; it has {', '.join(allowed)}")
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        raise BadInput(f"settings of {config.method}: {error}") from error


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _data(config: Config, folder: Path, tuning: bool) -> Any:
    """A folder, or prompts."""
    if (config.data is None) == (config.prompts is None):
        raise BadInput("exactly one of data (a folder of pictures) and prompts (a file, or a list) must be there")
    if config.data is not None:
        if tuning and config.method != "offline-pso":
            raise BadInput(f"method {config.method} learns from prompts, not from data")
        if not (folder / config.data).is_dir():
            raise BadInput(f"data must be a folder; {folder / config.data} is none")
        return folder / config.data
    if isinstance(config.prompts, str):
        return files.read_lines("prompts", folder / config.prompts)
    return [str(prompt) for prompt in config.prompts or ()]


def _start(config: Config, folder: Path) -> StepLoRA | None:
    if config.start is None:
        return None
    from hasten.pipelines.step_lora import StepLoRA

    try:
        return StepLoRA.load(folder / config.start)
    except (FileNotFoundError, ValueError) as error:
        raise BadInput(f"start: {error}") from None
