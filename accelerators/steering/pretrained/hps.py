"""HPS v2.1 (arXiv 2306.09341): a CLIP ViT-H/14 trained on people's rankings; the score is the bare cosine.

The weights are published as a checkpoint of open_clip. Its tensors are renamed here to those of transformers' CLIP, which computes
the same function, so open_clip is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hasten.accelerators.steering.pretrained.base import Pretrained
from hasten.accelerators.steering.pretrained.clip import CLIP_H, ClipJudge
from hasten.accelerators.steering.pretrained.preprocess import Preprocess

_HEADS = 16
"""Attention heads of both towers of ViT-H/14: 1280 / 80 and 1024 / 64."""

_TOWERS = {"visual.transformer.resblocks.": "vision_model.encoder.layers.", "transformer.resblocks.": "text_model.encoder.layers."}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_SINGLE = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
"""open_clip multiplies from the right, a linear layer of torch by its transpose."""


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an open_clip CLIP (both towers ViT or transformer) under the names of transformers' `CLIPModel`.

    Raises:
        ValueError: A name is not one of open_clip's CLIP.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in _SINGLE:
            renamed[_SINGLE[name]] = value
            continue
        if name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = value.T.contiguous()
            continue
        tower = next((prefix for prefix in _TOWERS if name.startswith(prefix)), None)
        layer, _, part = name.removeprefix(tower or "").partition(".")
        block, _, kind = part.rpartition(".")
        if tower and part in ("attn.in_proj_weight", "attn.in_proj_bias"):  # queries, keys and values, one upon the other
            for letter, rows in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{_TOWERS[tower]}{layer}.self_attn.{letter}_proj.{part.removeprefix('attn.in_proj_')}"] = rows.contiguous()
        elif tower and block in _BLOCK:
            renamed[f"{_TOWERS[tower]}{layer}.{_BLOCK[block]}.{kind}"] = value
        else:
            raise ValueError(f"{name!r} is no tensor of an open_clip CLIP")
    return renamed


def clip_config(state: Mapping[str, Tensor]) -> Any:
    """transformers' configuration of the open_clip CLIP with this state, 16 heads in both towers; sizes come from the shapes."""
    from transformers import CLIPConfig

    if not {"visual.conv1.weight", "token_embedding.weight", "visual.proj", "visual.positional_embedding"} <= state.keys():
        raise ValueError("it is no checkpoint of an open_clip CLIP with a vision transformer")
    vocabulary, text = state["token_embedding.weight"].shape
    vision, _, patch, _ = state["visual.conv1.weight"].shape
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    return CLIPConfig(
        projection_dim=state["visual.proj"].shape[1],
        text_config={
            **_tower(state, "transformer.resblocks.", text),
            "vocab_size": vocabulary,
            "max_position_embeddings": len(state["positional_embedding"]),
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,  # where open_clip pools: the highest token
            "pad_token_id": vocabulary - 1,
        },
        vision_config={**_tower(state, "visual.transformer.resblocks.", vision), "image_size": grid * patch, "patch_size": patch},
    )


def _tower(state: Mapping[str, Tensor], prefix: str, width: int) -> dict[str, Any]:
    layers = {int(match[1]) for name in state if (match := re.match(re.escape(prefix) + r"(\d+)\.", name))}
    return {
        "hidden_size": width,
        "intermediate_size": len(state[f"{prefix}0.mlp.c_fc.weight"]),
        "num_hidden_layers": len(layers),
        "num_attention_heads": _HEADS,
        "hidden_act": "gelu",  # the exact one: ViT-H/14 was not trained with OpenAI's quick approximation
        "layer_norm_eps": 1e-5,
    }


@dataclass(frozen=True)
class HPSv2(Pretrained):
    """The cosine of the embeddings of the Human Preference Score v2.1, the scale on which ReNO and CARINOX weigh it with 5.

    The `hpsv2` package prints the same number. Like it, the whole image is seen: the longer side is resized to 224 and the rest is black
    (ReNO crops the centre instead; square images do not differ).

    Attributes:
        model: Hub id, local folder or the checkpoint file itself.
        revision: See `Pretrained`.
        device: See `Pretrained`.
        dtype: See `Pretrained`.
        filename: The checkpoint: "HPS_v2.1_compressed.pt", or "HPS_v2_compressed.pt" for version 2.0.
        tokenizer: Hub id or local folder of the tokenizer, that of CLIP ViT-H/14.

    Raises:
        ValueError: A setting is out of range.
    """

    model: str = "xswu/HPSv2"
    filename: str = "HPS_v2.1_compressed.pt"
    tokenizer: str = CLIP_H
    range_hint = (0.0, 1.0)

    def _load(self) -> ClipJudge:
        from transformers import AutoTokenizer, CLIPModel

        state = self._checkpoint(self.model, self.filename, **self._at)
        with self._loading(self.model):
            config, renamed = clip_config(state), from_open_clip(state)
        clip = self._network_of(self.model, CLIPModel, config, renamed)
        size = config.vision_config.image_size
        return ClipJudge(clip, self._from(AutoTokenizer, self.tokenizer), Preprocess(size, size, "pad"), 1.0)
