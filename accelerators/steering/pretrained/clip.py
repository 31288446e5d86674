"""CLIPScore (arXiv 2104.08718) and PickScore (arXiv 2305.01569): the cosine of a CLIP's image and text embeddings, times a scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.accelerators.steering.pretrained.base import Judge, Pretrained, unit
from hasten.accelerators.steering.pretrained.preprocess import Preprocess

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class ClipJudge(Judge):
    """`scale` times the cosine of the embeddings of image and prompt.

    Attributes:
        texts: By prompt, its text embedding [C] of length 1.
    """

    def __init__(self, model: Any, tokenizer: Any, preprocess: Preprocess, scale: float) -> None:
        super().__init__()
        self.model, self.tokenizer, self.preprocess, self.scale = model, tokenizer, preprocess, scale
        self.texts: dict[str, Tensor] = {}

    def forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of frames [N, 3, H, W] in 0 to 1."""
        pixels = self.preprocess(frames).to(self.model.dtype)
        image = unit(self.model.get_image_features(pixels).pooler_output)
        return self.scale * (image * self.embedded(prompts)).sum(-1)

    def embedded(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings [N, C]; longer prompts are cut to the context of the model, end token included."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.texts]
        if new:
            # Tensors made in inference mode could not be part of a graph later.
            with torch.inference_mode(False), torch.no_grad():
                limit = self.model.config.text_config.max_position_embeddings
                tokens = self.tokenizer(new, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(self.model.device)
                embeddings = self.model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
                self.texts.update(zip(new, unit(embeddings), strict=True))
        return torch.stack([self.texts[prompt] for prompt in prompts])


@dataclass(frozen=True)
class CLIPScore(Pretrained):
    """100 times the cosine of CLIP's image and text embeddings, the scale on which ReNO (arXiv 2406.04312) weighs it with 0.01.

    ReNO reads the scale from the weights, where CLIP's training caps it at 100. The original CLIPScore is 2.5 times the cosine, cut off
    at 0.

    Attributes:
        model: Any CLIP of transformers, with its tokenizer and image processor; the ViT-H/14 of ReNO by default.
        revision: See `Pretrained`.
        device: See `Pretrained`.
        dtype: See `Pretrained`.

    Raises:
        ValueError: A setting is out of range.
    """

    model: str = CLIP_H
    range_hint = (0.0, 100.0)

    def _load(self) -> ClipJudge:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        clip = self._network(CLIPModel, self.model, "clip", **self._at)
        tokenizer = self._from(AutoTokenizer, self.model, **self._at)
        processor = self._from(AutoImageProcessor, self.model, **self._at)
        with self._loading(self.model):
            return ClipJudge(clip, tokenizer, Preprocess.of(processor), 100.0)


@dataclass(frozen=True)
class PickScore(Pretrained):
    """A CLIP ViT-H/14 trained on people's choices between two images: its own scale (about 100) times the cosine.

    Scores of good images lie around 20 to 23 (recalled, not looked up); ReNO's loss is 30 minus the score.

    Attributes:
        model: The weights, "yuvalkirstain/PickScore_v1".
        revision: See `Pretrained`.
        device: See `Pretrained`.
        dtype: See `Pretrained`.
        processor: Hub id or local folder of the tokenizer and the image processor, those of CLIP ViT-H/14.

    Raises:
        ValueError: A setting is out of range.
    """

    model: str = "yuvalkirstain/PickScore_v1"
    processor: str = CLIP_H
    range_hint = (0.0, 30.0)

    def _load(self) -> ClipJudge:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        clip = self._network(CLIPModel, self.model, "clip", **self._at)
        tokenizer, processor = self._from(AutoTokenizer, self.processor), self._from(AutoImageProcessor, self.processor)
        with self._loading(self.processor):
            return ClipJudge(clip, tokenizer, Preprocess.of(processor), float(clip.logit_scale.float().exp()))
