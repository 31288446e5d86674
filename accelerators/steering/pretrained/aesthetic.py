"""LAION's aesthetic predictor v2: a linear head on CLIP's image embedding of length 1; the prompt does not matter.

Its five layers have no activation between them (the file is called linearMSE), so together they are one linear map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hasten.accelerators.steering.pretrained.base import Judge, Pretrained, unit
from hasten.accelerators.steering.pretrained.preprocess import Preprocess, wide


class LinearHead(nn.Module):
    """Width to 1024, 128, 64, 16 and 1. The predictor and ImageReward both end in it; its dropout only matters in training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The numbers of the published checkpoints count the dropout layers between.
        self.layers = nn.ModuleDict(
            {
                "0": nn.Linear(width, 1024),
                "2": nn.Linear(1024, 128),
                "4": nn.Linear(128, 64),
                "6": nn.Linear(64, 16),
                "7": nn.Linear(16, 1),
            }
        )

    def forward(self, features: Tensor) -> Tensor:
        """Scores [N] of features [N, width]."""
        for layer in self.layers.values():
            features = layer(features)
        return features[:, 0]


class AestheticJudge(Judge):
    """The head on CLIP's image embedding."""

    def __init__(self, model: Any, head: LinearHead, preprocess: Preprocess) -> None:
        super().__init__()
        self.model, self.head, self.preprocess = model, head, preprocess

    def forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of frames [N, 3, H, W] in 0 to 1."""
        image = unit(self.model(self.preprocess(frames).to(self.model.dtype)).image_embeds)
        return wide(self.head(image.to(self.model.dtype)))


@dataclass(frozen=True)
class Aesthetic(Pretrained):
    """How beautiful people found images, about 1 to 10.

    Attributes:
        model: Hub id, local folder or the file of the head. The default is a copy on the hub of the file that the authors publish on GitHub
            (improved-aesthetic-predictor).
        revision: See `Pretrained`.
        device: See `Pretrained`.
        dtype: See `Pretrained`.
        filename: The checkpoint of the head.
        clip: Hub id or local folder of the CLIP whose embeddings it reads, ViT-L/14 of OpenAI.

    Raises:
        ValueError: A setting is out of range.
    """

    model: str = "camenduru/improved-aesthetic-predictor"
    filename: str = "sac+logos+ava1-l14-linearMSE.pth"
    clip: str = "openai/clip-vit-large-patch14"
    range_hint = (1.0, 10.0)

    def _load(self) -> AestheticJudge:
        from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

        state = self._checkpoint(self.model, self.filename, **self._at)
        vision = self._network(CLIPVisionModelWithProjection, self.clip, "clip")
        processor = self._from(AutoImageProcessor, self.clip)
        head = LinearHead(vision.visual_projection.out_features)
        with self._loading(self.model):
            head.load_state_dict(state)
        with self._loading(self.clip):
            return AestheticJudge(vision, head, Preprocess.of(processor))
