"""What `--model` names, loaded, and how such a pipeline wants to be called."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hasten.app.errors import BadInput
from hasten.pipelines.zoo import loading

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda", "mps")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BINS = (16, 32, 64, 128, 256)
"""Values of `transformer.config.sample_size` for which diffusers has a table of resolutions."""
_SHAPES_TOKENS = 32
"""The longest caption of the shapes world has 20 tokens; the default of its class, 120, would only be padded."""


@dataclass(frozen=True)
class Choice:
    """A model that was named, before it is loaded.

    Attributes:
        name: As it was named.
        folder: Where it lies; None for one on the hub.
        shipped: Whether it came with hasten.
    """

    name: str
    folder: Path | None
    shipped: bool = False

    @property
    def title(self) -> str:
        """For headings: a folder without the folders around it."""
        return self.name if self.shipped or self.folder is None else self.folder.resolve().name


def choose_model(name: str) -> Choice:
    """What a name means: a model that ships, a folder, or a hub id. Looks at the disk only.

    Raises:
        BadInput: None of them.
    """
    allowed = f"{', '.join(loading.MODELS)}, a diffusers pipeline folder, or a hub id such as PixArt-alpha/PixArt-XL-2-512x512"
    if name in loading.MODELS:
        try:
            return Choice(name, loading.path_of(name), shipped=True)
        except FileNotFoundError as error:
            raise BadInput(f"--model {name}: {error}") from None
    folder = Path(name).expanduser()
    if folder.exists():
        if not (folder / "model_index.json").is_file():
            raise BadInput(f"--model must be {allowed}; {name} has no model_index.json")
        return Choice(name, folder)
    if _HUB_ID.fullmatch(name) is None:
        raise BadInput(f"--model must be {allowed}; there is no {name!r}")
    return Choice(name, None)


@dataclass
class Model:
    """A loaded pipeline."""

    choice: Choice
    pipe: Any
    device: str
    dtype: str
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Parameters of the pipeline's call by name."""
        return dict(inspect.signature(self.pipe.__call__).parameters)

    @property
    def steps(self) -> int:
        """Steps where the user names none: what the model's folder recommends, else the pipeline's default."""
        default = self.parameters["num_inference_steps"].default
        return int(self.defaults.get("num_inference_steps", default))

    def arguments(self, guidance: float | None, size: tuple[int, int] | None) -> dict[str, Any]:
        """Arguments of the call that are the same for all captions and any number of steps.

        Args:
            guidance: Guidance scale; None for the model's own.
            size: Width and height in pixels; None for the model's own.

        Raises:
            BadInput: The pipeline has no such argument.
        """
        known = self.parameters
        asked: dict[str, Any] = {key: value for key, value in self.defaults.items() if key in known and key != "num_inference_steps"}
        if "max_sequence_length" in known and self.choice.shipped:
            asked.setdefault("max_sequence_length", _SHAPES_TOKENS)
        if "clean_caption" in known and (self.choice.shipped or not all(map(find_spec, ("bs4", "ftfy")))):
            asked["clean_caption"] = False  # else the picture would depend on whether these are installed
        if "use_resolution_binning" in known and self._latents_side() not in _BINS:
            asked["use_resolution_binning"] = False
        if guidance is not None:
            self._need("--guidance", "guidance_scale")
            asked["guidance_scale"] = guidance
        if size is not None:
            for name in ("height", "width"):
                self._need("--size", name)
            asked["width"], asked["height"] = size
        return asked

    def _need(self, option: str, argument: str) -> None:
        if argument not in self.parameters:
            raise BadInput(f"{option} cannot be set for {type(self.pipe).__name__}: its call takes no {argument}")

    def _latents_side(self) -> int | None:
        config = getattr(getattr(self.pipe, "transformer", None), "config", None)
        side = getattr(config, "sample_size", None)
        return side if isinstance(side, int) else None


def open_model(choice: Choice, *, dtype: str = "auto", device: str = "auto") -> Model:
    """Loads a pipeline.

    Args:
        choice: From `choose_model`.
        dtype: One of `DTYPES`; "auto" is float32 on a CPU, bfloat16 elsewhere.
        device: One of `DEVICES`; "auto" takes a GPU where there is one.

    Raises:
        BadInput: It cannot be loaded, or makes no pictures from captions.
    """
    for option, value, allowed in (("--dtype", dtype, DTYPES), ("--device", device, DEVICES)):
        if value not in allowed:
            raise BadInput(f"{option} must be one of {', '.join(allowed)}, not {value!r}")
    import torch

    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if present[name])
    elif not present[device]:
        raise BadInput(f"--device {device} is not available here; there are {', '.join(name for name, there in present.items() if there)}")
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    pipe = _from_pretrained(choice, getattr(torch, dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)  # hasten draws a bar of its own
    try:
        defaults = loading.call_defaults(choice.folder) if choice.folder is not None else {}
    except ValueError as error:
        raise BadInput(f"--model {choice.name}: {error}") from None
    model = Model(choice, pipe, device, dtype, defaults)
    missing = [name for name in ("prompt", "num_inference_steps", "generator") if name not in model.parameters]
    if missing:
        raise BadInput(
            f"--model must be a text-to-image pipeline, but the call of {type(pipe).__name__} takes no {' and no '.join(missing)}"
        )
    return model


def _from_pretrained(choice: Choice, dtype: Any) -> Any:
    import diffusers
    import transformers

    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    if choice.folder is not None:  # with a download, the bars say how far it is
        diffusers.logging.disable_progress_bar()
        transformers.logging.disable_progress_bar()
    source = str(choice.folder or choice.name)
    try:
        return diffusers.DiffusionPipeline.from_pretrained(source, dtype=dtype, local_files_only=choice.folder is not None)
    except (OSError, ValueError) as error:
        first = " ".join(str(error).split())[:200]
        if choice.folder is None:
            from huggingface_hub.constants import HF_HUB_OFFLINE

            why = "HF_HUB_OFFLINE is set, and it is not in the local cache" if HF_HUB_OFFLINE else first
            raise BadInput(f"--model {choice.name}: there is no such folder, and it could not be loaded from the hub: {why}") from error
        raise BadInput(f"--model {choice.name} could not be loaded: {first}") from error
