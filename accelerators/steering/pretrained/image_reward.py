"""ImageReward (arXiv 2304.05977): BLIP-large reads the prompt while it looks at the image, and a linear head scores what it read.

The published checkpoint names the tensors as BLIP's own code does (a timm vision transformer, a BERT with cross-attention). They are
renamed here to those of transformers' BLIP; only three settings must be told that transformers has otherwise: 12 text heads, an
epsilon of 1e-6 in the image's layer norms, and 224 pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.accelerators.steering.pretrained.aesthetic import LinearHead
from hasten.accelerators.steering.pretrained.base import Judge, Pretrained
from hasten.accelerators.steering.pretrained.preprocess import Preprocess, wide

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's raw scores, from the code that comes with the weights."""

_CONTEXT = 35
"""Tokens of a prompt; longer ones are cut."""

_VISION_HEADS, _TEXT_HEADS = 16, 12

_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")
"""BLIP's projections for retrieval and a counting buffer."""

_VISUAL = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def split_checkpoint(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of ImageReward.pt as those of transformers' `BlipVisionModel`, of its `BlipTextModel` and of the head.

    Raises:
        ValueError: A name belongs to none of them.
    """
    vision: dict[str, Tensor] = {}
    text: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for name, value in state.items():
        if _UNUSED.fullmatch(name):
            continue
        visual = name.removeprefix("blip.visual_encoder.")
        block = re.fullmatch(r"blip\.visual_encoder\.blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if block and block[2] in _BLOCK:
            vision[f"encoder.layers.{block[1]}.{_BLOCK[block[2]]}.{block[3]}"] = value
        elif visual != name and visual in _VISUAL:
            vision[_VISUAL[visual]] = value
        elif name.startswith("blip.text_encoder."):
            text[name.removeprefix("blip.text_encoder.")] = value
        elif name.startswith("mlp."):
            head[name.removeprefix("mlp.")] = value
        else:
            raise ValueError(f"{name!r} is no tensor of ImageReward")
    return vision, text, head


def blip_configs(vision: Mapping[str, Tensor], text: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """transformers' configurations of the two networks; sizes come from the shapes."""
    from transformers import BlipTextConfig, BlipVisionConfig

    width, _, patch, _ = vision["embeddings.patch_embedding.weight"].shape
    vocabulary, text_width = text["embeddings.word_embeddings.weight"].shape
    return (
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(vision["encoder.layers.0.mlp.fc1.weight"]),
            num_hidden_layers=len({name.split(".")[2] for name in vision if name.startswith("encoder.layers.")}),
            num_attention_heads=_VISION_HEADS,
            image_size=round((vision["embeddings.position_embedding"].shape[1] - 1) ** 0.5) * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,
        ),
        BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=text_width,
            encoder_hidden_size=width,
            intermediate_size=len(text["encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=len({name.split(".")[2] for name in text if name.startswith("encoder.layer.")}),
            num_attention_heads=_TEXT_HEADS,
            max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
            bos_token_id=vocabulary - 2,
            eos_token_id=None,
            sep_token_id=None,
        ),
    )


class ImageRewardJudge(Judge):
    """The head on the first token's state of the text network that attends to the image.

    Attributes:
        texts: By prompt, its tokens and their mask, [2, 35].
    """

    def __init__(self, vision: Any, text: Any, head: LinearHead, tokenizer: Any, preprocess: Preprocess) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head
        self.tokenizer, self.preprocess = tokenizer, preprocess
        self.texts: dict[str, Tensor] = {}

    def forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of frames [N, 3, H, W] in 0 to 1."""
        seen = self.vision(self.preprocess(frames).to(self.vision.dtype)).last_hidden_state
        tokens, mask = self.tokenized(prompts).unbind(1)
        read = self.text(
            tokens,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=seen.device),
        ).last_hidden_state
        return (wide(self.head(read[:, 0])) - MEAN) / STD

    def tokenized(self, prompts: Sequence[str]) -> Tensor:
        """Tokens and masks [N, 2, 35]."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.texts]
        if new:
            with torch.inference_mode(False):
                tokens = self.tokenizer(new, padding="max_length", truncation=True, max_length=_CONTEXT, return_tensors="pt")
                pairs = torch.stack([tokens.input_ids, tokens.attention_mask], 1).to(self.vision.device)
                self.texts.update(zip(new, pairs, strict=True))
        return torch.stack([self.texts[prompt] for prompt in prompts])


@dataclass(frozen=True)
class ImageReward(Pretrained):
    """A reward learned from people's comparisons, standardised: about -2 (bad) to 2 (good), 0 on average.

    Attributes:
        model: Hub id, local folder or the checkpoint file itself.
        revision: See `Pretrained`.
        device: See `Pretrained`.
        dtype: See `Pretrained`.
        filename: The checkpoint.
        tokenizer: Hub id or local folder of the tokenizer, that of BERT (uncased).

    Raises:
        ValueError: A setting is out of range.
    """

    model: str = "THUDM/ImageReward"
    filename: str = "ImageReward.pt"
    tokenizer: str = "google-bert/bert-base-uncased"
    range_hint = (-2.0, 2.0)

    def _load(self) -> ImageRewardJudge:
        from transformers import AutoTokenizer, BlipTextModel, BlipVisionModel

        state = self._checkpoint(self.model, self.filename, **self._at)
        with self._loading(self.model):
            vision_state, text_state, head_state = split_checkpoint(state)
            vision_config, text_config = blip_configs(vision_state, text_state)
            head = LinearHead(text_config.hidden_size)
            head.load_state_dict(head_state)
        vision = self._network_of(self.model, BlipVisionModel, vision_config, vision_state)
        text = self._network_of(self.model, BlipTextModel, text_config, text_state, add_pooling_layer=False)
        size = vision_config.image_size
        return ImageRewardJudge(vision, text, head, self._from(AutoTokenizer, self.tokenizer), Preprocess(size, size, "crop"))
