"""Step LoRAs that others have published, each with the settings that its authors give for it.

    with hasten.few_step(pipe, "hyper-sdxl-8") as call:
        image = pipe("a red circle", **call).images[0]

Within the block the LoRA is loaded, its scale is set and the scheduler is the one it was made for; after it the pipeline is as it was.
What a table entry says is said by the authors' model card or sampling code; what they leave open is left to the pipeline. LoRAs trained
by `hasten.distill` bring their settings with them: see `pipelines.step_lora`.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, TCDScheduler
from safetensors import SafetensorError, safe_open
from torch import nn

from hasten.pipelines.solver_schedulers import GammaScheduler
from hasten.pipelines.step_lora import WEIGHTS_FILE

BASES = {
    "SD 1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "SD 2.1": "stabilityai/stable-diffusion-2-1-base",
    "SDXL": "stabilityai/stable-diffusion-xl-base-1.0",
    "SSD-1B": "segmind/SSD-1B",
    "SD 3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "FLUX.1-dev": "black-forest-labs/FLUX.1-dev",
}
"""Base models and where they are published."""
_UNET, _UNET_XL, _SD3, _FLUX = (
    "a Stable Diffusion 1 or 2 UNet",
    "a Stable Diffusion XL UNet",
    "a Stable Diffusion 3 transformer",
    "a FLUX with embedded guidance",
)
_KINDS = {"SD 1.5": _UNET, "SD 2.1": _UNET, "SDXL": _UNET_XL, "SSD-1B": _UNET_XL, "SD 3": _SD3, "FLUX.1-dev": _FLUX}
_FLOWS = (_SD3, _FLUX)

# What the pipeline's scheduler knows of the base itself; the rest (spacing, clipping, Karras sigmas) may have been set for long runs.
_NOISE_SCHEDULE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "shift", "use_dynamic_shifting",
    "time_shift_type", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "shift_terminal",
)  # fmt: skip
_FACTOR = re.compile(r"lora(_A|_down|\w*\.down)\.weight$")
"""The first factor of an adapted layer, in the names of peft, of older diffusers and of kohya's trainer."""


@dataclass(frozen=True)
class Preset:
    """A published LoRA and how it is sampled.

    Attributes:
        name: Of the adapter while it is loaded.
        repository: On the hub.
        file: Path in the repository.
        base: One of `BASES`.
        scheduler: Class of the scheduler, made on the noise schedule of the pipeline's own.
        settings: Of the scheduler, beyond the noise schedule.
        steps: Numbers of steps it is for, the usual one first.
        guidance: Lowest and highest guidance scale; None where the authors give no limits. For all bases but FLUX, 0 and 1 mean none.
        guidance_scale: The usual one.
        scale: Of the LoRA.
        eta: Share of noise drawn anew at each step, from 0 (deterministic) to 1, where the scheduler is told at the call.
        timesteps: Of the run, where they are not the scheduler's.
        note: What else the authors say.

    Raises:
        ValueError: The base is unknown, or a usual value is outside its range.
    """

    name: str
    repository: str
    file: str
    base: str
    scheduler: type[Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[int, ...] = (4,)
    guidance: tuple[float, float] | None = (0.0, 1.0)
    guidance_scale: float = 0.0
    scale: float = 1.0
    eta: float | None = None
    timesteps: tuple[int, ...] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.base not in BASES:
            raise ValueError(f"base must be one of {', '.join(BASES)}, not {self.base!r}")
        if not self.steps or any(type(count) is not int or count < 1 for count in self.steps):
            raise ValueError(f"steps must be whole numbers of at least 1, not {self.steps!r}")
        low, high = self.guidance or (0.0, math.inf)
        if not 0 <= low <= self.guidance_scale <= high:
            raise ValueError(f"guidance must be (lowest, highest) around guidance_scale {self.guidance_scale!r}, not {self.guidance!r}")
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0, not {self.scale!r}")
        if self.timesteps is not None and self.steps != (len(self.timesteps),):
            raise ValueError(f"steps must be the number of timesteps, {len(self.timesteps)}, not {self.steps!r}")

    def check(self, pipe: Any) -> None:
        """Refuses a pipeline that the LoRA is not for.

        Raises:
            ValueError: Its denoiser is of another kind, it predicts something else, or it loads no LoRAs.
        """
        if not hasattr(pipe, "load_lora_weights"):
            raise ValueError(f"{type(pipe).__name__} cannot load LoRAs: it has no load_lora_weights")
        wanted, found = _KINDS[self.base], _kind_of(pipe)
        if found != wanted:
            raise ValueError(f"{self.name} is for {self.base}, {wanted}, and this {type(pipe).__name__} has {found}")
        predicts = pipe.scheduler.config.get("prediction_type")
        allowed = (None, "flow_prediction") if wanted in _FLOWS else ("epsilon",)
        if predicts not in allowed:
            raise ValueError(f"{self.name} is for {self.base} with prediction_type {allowed[-1]!r}, and the scheduler's is {predicts!r}")

    def call(self, pipe: Any, steps: int | None = None, guidance_scale: float | None = None) -> dict[str, Any]:
        """Arguments of the pipeline's call.

        Args:
            pipe: The pipeline.
            steps: One of `steps`; the first by default.
            guidance_scale: Within `guidance`; the usual one by default.

        Raises:
            ValueError: The LoRA was not made for that, or the pipeline's call does not take what it needs.
        """
        steps = self.steps[0] if steps is None else steps
        if steps not in self.steps:
            raise ValueError(f"steps must be {_listed(self.steps)}, which {self.name} was made for, not {steps!r}")
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        low, high = self.guidance or (0.0, math.inf)
        if not low <= scale <= high:
            limits = f"from {low:g} to {high:g}, which {self.name} was made for" if self.guidance else "at least 0"
            raise ValueError(f"guidance_scale must be {limits}, not {scale!r}")
        call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": scale}
        if self.eta is not None:
            call["eta"] = self.eta
        if self.timesteps is not None:
            call["timesteps"] = list(self.timesteps)
        taken = inspect.signature(pipe.__call__).parameters
        if missing := [name for name in call if name not in taken and not _open(taken)]:
            raise ValueError(f"{self.name} needs {missing[0]}, which the call of {type(pipe).__name__} does not take")
        return call

    def make_scheduler(self, pipe: Any) -> Any:
        """The scheduler, on the noise schedule of the pipeline's own."""
        present, taken = pipe.scheduler.config, inspect.signature(self.scheduler.__init__).parameters
        kept = {name: present[name] for name in _NOISE_SCHEDULE if name in present and name in taken}
        if "shift" in taken and "shift" not in present and "flow_shift" in present:
            kept["shift"] = present["flow_shift"]  # the multistep solvers' name for it
        return self.scheduler(**{**kept, **self.settings})


def _table() -> Iterator[Preset]:
    fifty = {"original_inference_steps": 50}  # of consistency models; runs take evenly spaced ones of them
    for name, base, repository in (
        ("sd15", "SD 1.5", "lcm-lora-sdv1-5"),
        ("sdxl", "SDXL", "lcm-lora-sdxl"),
        ("ssd1b", "SSD-1B", "lcm-lora-ssd-1b"),
    ):
        yield Preset(
            f"lcm-{name}", f"latent-consistency/{repository}", WEIGHTS_FILE, base, LCMScheduler, fifty, (4, 2, 3, 5, 6, 7, 8), (0, 2), 1.0
        )  # fmt: skip

    for name, base, repository in (
        ("sd15", "SD 1.5", "TCD-SD15-LoRA"),
        ("sd21", "SD 2.1", "TCD-SD21-base-LoRA"),
        ("sdxl", "SDXL", "TCD-SDXL-LoRA"),
    ):
        yield Preset(
            f"tcd-{name}", f"h1t/{repository}", WEIGHTS_FILE, base, TCDScheduler, fifty, (4, *(n for n in range(1, 51) if n != 4)), eta=0.3,
            note="any number of steps of the scheduler's grid of 50; more steps want a higher eta",
        )  # fmt: skip

    # Their cards leave clipping and the last step to the bases' configurations, which say this.
    trailing = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False}
    hyper = "ByteDance/Hyper-SD"
    for name, base in (("sd15", "SD 1.5"), ("sdxl", "SDXL")):
        prefix = f"Hyper-{name.upper()}"
        one = f"{prefix}-1step-lora.safetensors"
        yield Preset(f"hyper-{name}-1", hyper, one, base, TCDScheduler, fifty, (1,), eta=1.0)
        yield Preset(
            f"hyper-{name}-unified", hyper, one, base, TCDScheduler, fifty, tuple(range(1, 9)), eta=1.0,
            note="the LoRA of one step serves up to 8; with more steps a lower eta gives more detail",
        )  # fmt: skip
        for steps in (2, 4, 8):
            yield Preset(f"hyper-{name}-{steps}", hyper, f"{prefix}-{steps}steps-lora.safetensors", base, DDIMScheduler, trailing, (steps,))
        for steps in (8, 12):
            yield Preset(
                f"hyper-{name}-{steps}-cfg", hyper, f"{prefix}-{steps}steps-CFG-lora.safetensors", base, DDIMScheduler, trailing, (steps,),
                (5, 8), 5.0, note="works with negative prompts",
            )  # fmt: skip
    fewer = "the authors say that somewhat fewer steps work too"
    for steps, guidance, counts, note in ((4, 3.0, (4,), ""), (8, 5.0, (8, 6), fewer), (16, 7.0, (16, 12), fewer)):
        file = f"Hyper-SD3-{steps}steps-CFG-lora.safetensors"
        yield Preset(
            f"hyper-sd3-{steps}", hyper, file, "SD 3", FlowMatchEulerDiscreteScheduler, {}, counts, None, guidance, 0.125,
            note=note,
        )  # fmt: skip
    for steps in (8, 16):
        file = f"Hyper-FLUX.1-dev-{steps}steps-lora.safetensors"
        yield Preset(
            f"hyper-flux-{steps}", hyper, file, "FLUX.1-dev", FlowMatchEulerDiscreteScheduler, {}, (steps,), None, 3.5, 0.125
        )  # fmt: skip

    pcm = "wangfuyun/PCM_Weights"
    for name, base in (("sd15", "SD 1.5"), ("sdxl", "SDXL")):
        for steps in (2, 4, 8, 16):
            file = f"{name}/pcm_{name}_smallcfg_{steps}step_converted.safetensors"
            yield Preset(f"pcm-{name}-{steps}", pcm, file, base, DDIMScheduler, trailing, (steps,), (1, 2), 1.0)
        for steps, usual, note in (
            (4, 3.0, "2.5 to 3.5 for so few steps; the authors find that it does not work very well"),
            (8, 4.5, "3 to 6 for so few steps"),
            (16, 7.5, ""),
        ):
            file = f"{name}/pcm_{name}_normalcfg_{steps}step_converted.safetensors"
            yield Preset(f"pcm-{name}-{steps}-cfg", pcm, file, base, DDIMScheduler, trailing, (steps,), (2, 9), usual, note=note)
        file = f"{name}/pcm_{name}_lcmlike_lora_converted.safetensors"
        yield Preset(f"pcm-{name}-lcm", pcm, file, base, LCMScheduler, fifty, (4,), note="to be sampled as an LCM, not with one step")
    # The authors' own schedulers, deterministic and redrawing, are these with gamma 0 and 1.
    for name, steps, shift, gamma in (
        ("deterministic_2step_shift1", 2, 1.0, 0.0),
        ("deterministic_4step_shift1", 4, 1.0, 0.0),
        ("deterministic_4step_shift3", 4, 3.0, 0.0),
        ("stochastic_shift3", 4, 3.0, 1.0),
    ):
        fixed = {"prediction_type": "flow_prediction", "shift": shift, "gamma": gamma, "use_dynamic_shifting": False, **fifty}
        label = f"{steps}-shift{shift:g}" if gamma == 0 else "lcm"
        yield Preset(f"pcm-sd3-{label}", pcm, f"sd3/pcm_{name}.safetensors", "SD 3", GammaScheduler, fixed, (steps,), None, 1.2)

    for steps in (2, 4, 8):
        file = f"sdxl_lightning_{steps}step_lora.safetensors"
        yield Preset(
            f"lightning-sdxl-{steps}", "ByteDance/SDXL-Lightning", file, "SDXL", EulerDiscreteScheduler, {"timestep_spacing": "trailing"},
            (steps,), note="for fine-tuned bases; the authors have a whole UNet for the base itself",
        )  # fmt: skip
    yield Preset(
        "dmd2-sdxl-4", "tianweiy/DMD2", "dmd2_sdxl_4step_lora_fp16.safetensors", "SDXL", LCMScheduler, fifty, (4,),
        timesteps=(999, 749, 499, 249), note="fine-tuned bases may want a smaller scale",
    )  # fmt: skip


PUBLISHED: Mapping[str, Preset] = {preset.name: preset for preset in _table()}
"""By name."""


@contextmanager
def few_step(
    pipe: Any,
    preset: str | Preset,
    steps: int | None = None,
    *,
    guidance_scale: float | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Within the block the pipeline takes few steps with a published LoRA; after it all is as before.

    LoRAs that are loaded already stay loaded, and those that are active stay so, with their weights.

    Args:
        pipe: A diffusers pipeline that loads LoRAs.
        preset: A name in `PUBLISHED`, or a preset of one's own.
        steps: One that the LoRA was made for; the usual number by default.
        guidance_scale: One that it was made for; the usual one by default.
        weights: The LoRA's file, or the folder it lies in; it comes from the hub by default.

    Yields:
        Arguments for the pipeline's call.

    Raises:
        ValueError: The preset is unknown or for another base, steps or guidance are not what the LoRA was made for, the pipeline loads no
            LoRAs, has one of that name or a fused one, or the weights do not fit it.
        FileNotFoundError: There are no such weights, or the hub cannot be reached.
    """
    found = _named(preset)
    found.check(pipe)
    call, scheduler = found.call(pipe, steps, guidance_scale), found.make_scheduler(pipe)
    before = _Adapters(pipe, found.name)
    if before.active:
        warnings.warn(
            f"{', '.join(before.active)} stays active beside {found.name}: with so few steps a style comes out weaker or breaks. Try other "
            "weights for it, and a guidance_scale of at most 2",
            stacklevel=3,
        )
    file, present = _file_of(found, weights), pipe.scheduler
    try:
        before.load(file, found.scale)
        pipe.scheduler = scheduler
        yield call
    finally:
        pipe.scheduler = present
        before.restore()


class _Layer:
    """How a layer's adapters stand: those that are active, which act unless all are disabled, and the scale of each."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.active, self.disabled = list(layer.active_adapters), bool(layer.disable_adapters)
        self.scaling = dict(layer.scaling)

    @property
    def acting(self) -> list[str]:
        return [] if self.disabled else self.active


class _Adapters:
    """The adapters of a pipeline's networks as they are, and one more beside them.

    Args:
        pipe: The pipeline.
        name: Of the one more.

    Raises:
        ValueError: There is one of that name already, or one is fused: peft would leave out all others.
        ImportError: peft is not installed.
    """

    def __init__(self, pipe: Any, name: str) -> None:
        self.pipe, self.name = pipe, name
        self.networks: dict[str, nn.Module] = {
            part: network for part in pipe._lora_loadable_modules if isinstance(network := getattr(pipe, part, None), nn.Module)
        }
        self.layers = {id(layer): _Layer(layer) for _, _, layer in self._wrapped()}
        for before in self.layers.values():
            layer = before.layer
            if name in layer._all_available_adapter_names():
                raise ValueError(f"an adapter called {name} is loaded already; delete it first (pipe.delete_adapters({name!r}))")
            if layer.merged:
                raise ValueError(f"{', '.join(layer.merged_adapters)} is fused, so that {name} would have no effect; unfuse it first")
        self.configs = {part: "peft_config" in vars(network) for part, network in self.networks.items()}
        self.flags = {part: vars(network).get("_hf_peft_config_loaded", self) for part, network in self.networks.items()}
        self.trained = [(parameter, parameter.requires_grad) for network in self.networks.values() for parameter in network.parameters()]

    @property
    def active(self) -> list[str]:
        """Those that act on the pictures, in order."""
        return list(dict.fromkeys(name for before in self.layers.values() for name in before.acting))

    def load(self, file: Path, scale: float) -> None:
        """Loads the one more, and makes it active with a scale."""
        listed = _layers_in(file)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters on one base are meant
                warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")  # where it does not fit
                self.pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=self.name)
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{file} does not fit this {type(self.pipe).__name__}: {reason[:300]}") from error
        made = [layer for _, _, layer in self._wrapped() if self.name in layer._all_available_adapter_names()]
        if len(made) < listed or not made:
            kinds = " and ".join(type(network).__name__ for network in self.networks.values())
            raise ValueError(f"{file} is for another base: it adapts {listed} layers, of which this {kinds} has {len(made)}")
        for _, _, layer in self._wrapped():
            before = self.layers.get(id(layer))
            layer.enable_adapters(True)
            layer.set_adapter([*(before.acting if before else ()), self.name])
            layer.set_scale(self.name, scale)
        self._reset_trained()

    def restore(self) -> None:
        """Takes away the one more, whatever has become of it, and all that was made for it."""
        for _, _, layer in self._wrapped():
            if layer.merged and self.name in layer.merged_adapters:
                layer.unmerge()
            if id(layer) in self.layers:  # peft chooses another where the active one is deleted
                layer.set_adapter(self.layers[id(layer)].active)
        self.pipe.delete_adapters(self.name)
        for network, path, layer in self._wrapped():
            if before := self.layers.get(id(layer)):
                layer.enable_adapters(not before.disabled)
                layer.scaling.update({name: scale for name, scale in before.scaling.items() if name in layer.scaling})
            elif not layer._all_available_adapter_names():
                parent, _, last = path.rpartition(".")
                setattr(network.get_submodule(parent), last, layer.get_base_layer())
        for part, network in self.networks.items():
            if not self.configs[part] and not vars(network).get("peft_config", True):
                del network.peft_config
            if self.flags[part] is not self:
                network._hf_peft_config_loaded = self.flags[part]
            elif "peft_config" not in vars(network):
                vars(network).pop("_hf_peft_config_loaded", None)
        self._reset_trained()

    def _reset_trained(self) -> None:
        for parameter, trained in self.trained:
            parameter.requires_grad_(trained)

    def _wrapped(self) -> list[tuple[nn.Module, str, Any]]:
        """Every adapted layer, and where it lies."""
        try:
            from peft.tuners.tuners_utils import BaseTunerLayer
        except ImportError:
            raise ImportError("published LoRAs are loaded with peft: pip install 'hasten[train]'") from None
        return [
            (network, path, layer)
            for network in self.networks.values()
            for path, layer in network.named_modules()
            if isinstance(layer, BaseTunerLayer)
        ]


def _named(preset: str | Preset) -> Preset:
    if isinstance(preset, Preset):
        return preset
    if preset not in PUBLISHED:
        close = get_close_matches(preset, PUBLISHED, n=1, cutoff=0.0)[0]
        raise ValueError(f"preset must be one of PUBLISHED, not {preset!r}; did you mean {close}?")
    return PUBLISHED[preset]


def _kind_of(pipe: Any) -> str:
    """What a pipeline's denoiser is, in the words of `_KINDS` where it is one of them."""
    network = getattr(pipe, "unet", None)
    if network is None:
        network = getattr(pipe, "transformer", None)
    kind, config = type(network).__name__, getattr(network, "config", {})
    if kind == "UNet2DConditionModel":
        return {None: _UNET, "text_time": _UNET_XL}.get(config.get("addition_embed_type"), f"a {kind} of another model")
    if kind == "SD3Transformer2DModel":
        return _SD3
    if kind == "FluxTransformer2DModel":
        return _FLUX if config.get("guidance_embeds") else "a FLUX without embedded guidance"
    return "no denoiser" if network is None else f"a {kind}"


def _file_of(preset: Preset, weights: str | os.PathLike[str] | None) -> Path:
    if weights is None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

        try:
            return Path(hf_hub_download(preset.repository, preset.file))
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise FileNotFoundError(
                f"{preset.file} of {preset.repository} could not be fetched ({type(error).__name__}); weights= takes a file"
            ) from error
    path = Path(weights)
    if path.is_dir():
        candidates = [path / preset.file, path / Path(preset.file).name, path / WEIGHTS_FILE]
        path = next((file for file in candidates if file.is_file()), candidates[1])
    if not path.is_file():
        raise FileNotFoundError(f"no weights of {preset.name} at {path}")
    return path


def _layers_in(file: Path) -> int:
    """How many layers a LoRA's file adapts."""
    try:
        with safe_open(file, "pt") as opened:
            return sum(_FACTOR.search(name) is not None for name in opened.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {error}") from None


def _listed(counts: tuple[int, ...]) -> str:
    ordered = sorted(counts)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"from {ordered[0]} to {ordered[-1]}"
    return " or ".join(map(str, ordered))


def _open(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a call takes any keyword, as a wrapper's does."""
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
