"""Finds and loads the models that ship with hasten: ordinary diffusers pipeline folders inside the package."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

MODELS = ("shapes", "shapes-flow", "shapes-unet")
"""Names of the models that ship."""

STEPS = "-steps"
"""Behind a model's name: its step LoRA."""
DEFAULTS_FILE = "hasten.json"
"""Beside a pipeline's `model_index.json`: the call that the model was trained for and is judged with."""

_DEFAULTS = {
    "steps": ("num_inference_steps", int),
    "guidance_scale": ("guidance_scale", float),
    "max_sequence_length": ("max_sequence_length", int),
    "height": ("height", int),
    "width": ("width", int),
}


def path_of(name: str) -> Path:
    """The folder of a model that ships; `DiffusionPipeline.from_pretrained` reads it without hasten.

    Raises:
        ValueError: There is no model of that name.
        FileNotFoundError: Its weights are not installed.
    """
    if name not in MODELS:
        raise ValueError(f"no model {name!r} ships with hasten; there are {', '.join(MODELS)}")
    folder = Path(str(files("hasten.pipelines.zoo"))) / "weights" / name
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"the weights of {name!r} are missing ({folder}): reinstall hasten, or train them with recipes/{name}.py")
    return folder


def step_loras() -> dict[str, Path]:
    """Folders of the step LoRAs that ship, by name: a model's with `-steps` behind it."""
    weights = Path(str(files("hasten.pipelines.zoo"))) / "weights"
    found = {f"{model}{STEPS}": weights / f"{model}{STEPS}" for model in MODELS}
    return {name: folder for name, folder in found.items() if folder.is_dir()}


def load(name: str, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """Loads a model that ships.

        pipe = load("shapes")
        image = pipe("a small red circle", **call_defaults(path_of("shapes")), use_resolution_binning=False).images[0]

    Args:
        name: One of `MODELS`.
        dtype: Of all weights; float32 by default, in which CPUs are fastest or most exact. The files hold bfloat16.

    Raises:
        ValueError: There is no model of that name.
        FileNotFoundError: Its weights are not installed.
    """
    import torch
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(path_of(name), dtype=dtype or torch.float32, local_files_only=True)


def call_defaults(folder: Path) -> dict[str, Any]:
    """Arguments of the pipeline's call that its folder recommends in `hasten.json`; none where there is no such file.

    The file may give `steps`, `guidance_scale`, `max_sequence_length`, `height` and `width`.

    Raises:
        ValueError: The file is no JSON object, or a value is not a positive number.
    """
    path = folder / DEFAULTS_FILE
    if not path.is_file():
        return {}
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        return {argument: kind(read[key]) for key, (argument, kind) in _DEFAULTS.items() if read.get(key) is not None}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must be a JSON object whose {', '.join(_DEFAULTS)} are numbers: {error}") from None
