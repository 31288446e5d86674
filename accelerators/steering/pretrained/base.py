"""What verifiers with published weights share: frozen settings, weights that come with the first score, and one line when they do not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.accelerators.steering.pretrained.preprocess import wide
from hasten.accelerators.steering.verifiers import VerifierError


class WeightsError(RuntimeError):
    """The weights of a verifier cannot be loaded; the message names them, the reason and what to do."""


class Judge(nn.Module, ABC):
    """A loaded network with its tokenizer and preprocessing. It keeps what it worked out about each prompt."""

    @abstractmethod
    def forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of frames [N, 3, H, W] in 0 to 1, one prompt for each."""


@dataclass(eq=False)
class _Held:
    """A judge and where it lies, once something was scored."""

    judge: Judge | None = None
    place: tuple[torch.device, torch.dtype] | None = None


@dataclass(frozen=True)
class Pretrained(ABC):
    """A verifier with published weights. Making one loads nothing: the first `score` does.

    Attributes:
        model: An id of the Hugging Face hub or a local folder.
        revision: Branch, tag or commit of `model` on the hub; the default branch if None.
        device: Of the weights; that of the images if None.
        dtype: Of the weights; that of the images if None. Weights that change place or precision between two scores are loaded again.

    Raises:
        ValueError: A setting is out of range.
    """

    model: str
    revision: str | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    _held: _Held = field(default_factory=_Held, init=False, repr=False, compare=False)
    differentiable = True
    range_hint: ClassVar[tuple[float, float] | None] = None

    def __post_init__(self) -> None:
        if not self.model or not isinstance(self.model, str):
            raise ValueError(f"model must be an id of the Hugging Face hub or a local folder, not {self.model!r}")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type or None, not {self.dtype}")
        if isinstance(self.device, str):
            try:
                torch.device(self.device)
            except RuntimeError as error:
                raise ValueError(f"device must be a device of torch such as 'cuda:0' or None, not {self.device!r}") from error

    @property
    def _at(self) -> dict[str, str]:
        return {} if self.revision is None else {"revision": self.revision}

    @abstractmethod
    def _load(self) -> Judge:
        """The judge, on the CPU and in the precision of its files."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of images in 0 to 1.

        Args:
            images: [N, 3, H, W], or videos [N, F, 3, H, W], which score the mean over their frames.
            prompts: One for each.

        Returns:
            Scores [N] in float32 (float64 for weights in float64) on the device of the images.

        Raises:
            VerifierError: The images have another shape or type, or there is not one prompt for each.
            WeightsError: The weights cannot be loaded.
        """
        if images.ndim not in (4, 5) or images.shape[-3] != 3 or not images.is_floating_point():
            raise VerifierError(
                f"images must be float of shape [N, 3, H, W], videos [N, F, 3, H, W], not {images.dtype} of {list(images.shape)}"
            )
        if len(prompts) != len(images):
            raise VerifierError(f"there are {len(images)} images but {len(prompts)} prompts; give one prompt per image")
        device = torch.device(self.device or images.device)
        judge = self._judge(device, self.dtype or images.dtype)
        count = images.shape[1] if images.ndim == 5 else 1
        frames = images.reshape(-1, *images.shape[-3:]).to(device)
        scores = judge(frames, [prompt for prompt in prompts for _ in range(count)])
        return scores.view(len(images), count).mean(1).to(images.device)

    def _judge(self, device: torch.device, dtype: torch.dtype) -> Judge:
        held = self._held
        if held.judge is None or held.place != (device, dtype):
            held.judge = None
            # Weights made in inference mode could not be part of a graph later, when the same object scores with gradients.
            with torch.inference_mode(False), torch.no_grad():
                held.judge = self._load().to(device, dtype).eval().requires_grad_(False)
            held.place = device, dtype
        return held.judge

    # ----------------------------------------------------------------------------------------------------------- loading

    @contextmanager
    def _loading(self, source: str) -> Iterator[None]:
        try:
            yield
        except WeightsError:
            raise
        except Exception as error:  # the hub, its files and three formats of weights fail in a dozen ways
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" .:;")
            raise WeightsError(
                f"{type(self).__name__} cannot load {source!r}: {reason}; check the name and the connection, "
                "or download it elsewhere and give the local folder"
            ) from error

    def _network(self, cls: Any, source: str, model_type: str | None = None, **options: Any) -> Any:
        """A model of transformers.

        Args:
            cls: A model class or an Auto class.
            source: Hub id or local folder.
            model_type: What its configuration must say; anything if None.
            options: For `from_pretrained`.
        """
        from transformers import AutoConfig

        with self._loading(source):
            config = AutoConfig.from_pretrained(source, **options)
            if model_type is not None and config.model_type != model_type:
                raise ValueError(f"it is a {config.model_type!r} model, not a {model_type!r} one")
            network, found = cls.from_pretrained(source, output_loading_info=True, **options)
            return _complete(network, found, ("missing_keys", "mismatched_keys"))

    def _network_of(self, source: str, cls: Any, config: Any, state: Mapping[str, Tensor], **options: Any) -> Any:
        """A model of transformers with every tensor of `state` in its place."""
        with self._loading(source):
            network, found = cls.from_pretrained(None, config=config, state_dict=dict(state), output_loading_info=True, **options)
            return _complete(network, found, ("missing_keys", "mismatched_keys", "unexpected_keys"))

    def _from(self, cls: Any, source: str, **options: Any) -> Any:
        """A tokenizer or a processor of transformers."""
        with self._loading(source):
            return cls.from_pretrained(source, **options)

    def _checkpoint(self, source: str, filename: str, **options: Any) -> dict[str, Tensor]:
        """The tensors of a checkpoint file: `source` itself, a file of that folder, or one of that hub id."""
        from huggingface_hub import hf_hub_download

        with self._loading(f"{source}/{filename}" if not Path(source).is_file() else source):
            if Path(source).exists():
                path = Path(source) if Path(source).is_file() else Path(source) / filename
            else:
                path = Path(hf_hub_download(source, filename, **options))
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
            if not all(isinstance(value, Tensor) for value in state.values()):
                raise ValueError("it is no dictionary of tensors")
            return state


def _complete(network: Any, found: Mapping[str, Any], kinds: Sequence[str]) -> Any:
    """The network, if the checkpoint filled it."""
    for kind in kinds:
        if found[kind]:
            names = sorted(str(name) for name in found[kind])
            raise ValueError(f"it does not fit {type(network).__name__}: {len(names)} {kind.replace('_', ' ')}, the first is {names[0]}")
    return network


def unit(features: Tensor) -> Tensor:
    """Features [N, C] of length 1, in float32 at least."""
    return F.normalize(wide(features), dim=-1)
