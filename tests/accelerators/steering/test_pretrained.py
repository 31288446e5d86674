"""Verifiers with published weights, tried on tiny random networks: the same numbers as transformers or as the published code's own
formulas, gradients that reach the images, and one line when weights do not load."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hasten.accelerators.steering.mixes import CARINOX_REWARDS, RENO_REWARDS, WeightedSum
from hasten.accelerators.steering.pretrained import (
    PRETRAINED,
    Aesthetic,
    CLIPScore,
    HPSv2,
    ImageReward,
    PickScore,
    Preprocess,
    Pretrained,
    VQAScore,
    WeightsError,
    hps,
    image_reward,
    vqa,
)
from hasten.accelerators.steering.pretrained.preprocess import CLIP_MEAN, CLIP_STD
from hasten.accelerators.steering.verifiers import Verifier, VerifierError, checked_score

SIZE, PATCH, CONTEXT = 32, 8, 12
PROMPTS = ["a cab", "bad fed", "a cab", "deaf beef cafe and so on until the end"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
WORDS += ["yes", "no", "does", "this", "figure", "show", "please", "answer", "or", '"', "?", "."]


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Smooth pictures of 8-bit values away from black and white, [*shape[:-2], 3, *shape[-2:]]."""
    *batch, height, width = shape
    coarse = torch.rand(math.prod(batch), 3, 4, 5, generator=torch.Generator().manual_seed(sum(shape)))
    smooth = F.interpolate(coarse * 0.6 + 0.2, (height, width), mode="bilinear", align_corners=True)
    return (smooth.mul(255).round() / 255).view(*batch, 3, height, width).to(dtype)


def pictures(batch: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy()) for image in batch]


def clip_tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = [*letters, *(f"{letter}</w>" for letter in letters), "ab", "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: number for number, name in enumerate(names)}, merges=[("a", "b")])


def clip_config() -> CLIPConfig:
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return CLIPConfig(
        projection_dim=20,
        text_config={
            **tower,
            "vocab_size": 55,
            "max_position_embeddings": CONTEXT,
            "bos_token_id": 53,
            "eos_token_id": 54,
            "pad_token_id": 54,
        },
        vision_config={**tower, "image_size": SIZE, "patch_size": PATCH, "projection_dim": 20},
    )


def roughened(model: nn.Module, seed: int) -> nn.Module:
    """Fresh weights hardly react to their input: larger ones, biases and layer norms that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim:
                norm = value.ndim == 1 and name.endswith("weight")
                value.copy_(float(norm) + torch.randn(value.shape, generator=generator) * (0.2 if value.ndim == 1 else 0.25))
    return model.eval()


def random_state(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        norm = len(shape) == 1 and name.endswith("weight")
        state[name] = float(norm) + torch.randn(shape, generator=generator) * (0.2 if len(shape) == 1 else 0.25)
    return state


# ---------------------------------------------------------------------------------------------- folders with tiny networks


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    roughened(CLIPModel(clip_config()), 0).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}).save_pretrained(folder)
    return str(folder)


def open_clip_shapes() -> dict[str, tuple[int, ...]]:
    """As open_clip names them: width 64 and 48, 16 heads each, two layers and three."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (CONTEXT, 48),
        "text_projection": (48, 20),
        "logit_scale": (),
        "visual.class_embedding": (64,),
        "visual.positional_embedding": ((SIZE // PATCH) ** 2 + 1, 64),
        "visual.proj": (64, 20),
        "visual.conv1.weight": (64, 3, PATCH, PATCH),
        "token_embedding.weight": (55, 48),
    }
    for name, width in (("visual.ln_pre", 64), ("visual.ln_post", 64), ("ln_final", 48)):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for tower, width, layers in (("visual.transformer", 64, 3), ("transformer", 48, 2)):
        for layer in range(layers):
            block = f"{tower}.resblocks.{layer}"
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            for name, out, inner in (("attn.out_proj", width, width), ("mlp.c_fc", 80, width), ("mlp.c_proj", width, 80)):
                shapes |= {f"{block}.{name}.weight": (out, inner), f"{block}.{name}.bias": (out,)}
            for name in ("ln_1", "ln_2"):
                shapes |= {f"{block}.{name}.weight": (width,), f"{block}.{name}.bias": (width,)}
    return shapes


@pytest.fixture(scope="module")
def hps_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 3, "state_dict": random_state(open_clip_shapes(), 1)}, path)
    return str(path)


def image_reward_shapes(vision: int = 32, text: int = 24) -> dict[str, tuple[int, ...]]:
    """As BLIP's own code names them; the head has its published sizes."""
    eye, ear = "blip.visual_encoder", "blip.text_encoder"
    linear = {
        f"{eye}.patch_embed.proj": (vision, 3, PATCH, PATCH),
        "blip.vision_proj": (8, vision),
        "blip.text_proj": (8, text),
        "mlp.layers.0": (1024, text),
        "mlp.layers.2": (128, 1024),
        "mlp.layers.4": (64, 128),
        "mlp.layers.6": (16, 64),
        "mlp.layers.7": (1, 16),
    }
    norms = {f"{eye}.norm": vision, f"{ear}.embeddings.LayerNorm": text}
    for layer in range(2):
        block = f"{eye}.blocks.{layer}"
        norms |= {f"{block}.norm1": vision, f"{block}.norm2": vision}
        linear |= {f"{block}.attn.qkv": (3 * vision, vision), f"{block}.attn.proj": (vision, vision)}
        linear |= {f"{block}.mlp.fc1": (48, vision), f"{block}.mlp.fc2": (vision, 48)}
        block = f"{ear}.encoder.layer.{layer}"
        for kind, width in (("attention", text), ("crossattention", vision)):
            linear |= {f"{block}.{kind}.self.query": (text, text), f"{block}.{kind}.output.dense": (text, text)}
            linear |= {f"{block}.{kind}.self.key": (text, width), f"{block}.{kind}.self.value": (text, width)}
            norms[f"{block}.{kind}.output.LayerNorm"] = text
        linear |= {f"{block}.intermediate.dense": (40, text), f"{block}.output.dense": (text, 40)}
        norms[f"{block}.output.LayerNorm"] = text
    shapes: dict[str, tuple[int, ...]] = {
        f"{eye}.cls_token": (1, 1, vision),
        f"{eye}.pos_embed": (1, (SIZE // PATCH) ** 2 + 1, vision),
        f"{ear}.embeddings.word_embeddings.weight": (len(WORDS) + 2, text),
        f"{ear}.embeddings.position_embeddings.weight": (40, text),
    }
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


@pytest.fixture(scope="module")
def image_reward_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("image_reward") / "ImageReward.pt"
    torch.save({**random_state(image_reward_shapes(), 2), "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}, path)
    return str(path)


@pytest.fixture(scope="module")
def aesthetic_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("aesthetic") / "head.pth"
    shapes = {name.removeprefix("mlp."): shape for name, shape in image_reward_shapes(text=20).items() if name.startswith("mlp.")}
    torch.save(random_state(shapes, 3), path)
    return str(path)


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("blip")
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BlipConfig(
        text_config={**tower, "vocab_size": len(WORDS) + 2, "bos_token_id": len(WORDS), "sep_token_id": 3, "max_position_embeddings": 64},
        vision_config={**tower, "image_size": SIZE, "patch_size": PATCH},
    )
    roughened(BlipForQuestionAnswering(config), 4).save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
    from transformers import BlipProcessor

    BlipProcessor(BlipImageProcessorPil(size={"height": SIZE, "width": SIZE}), tokenizer).save_pretrained(folder)
    return str(folder)


def word_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    names = ["<unk>", "<pad>", "<image>", "USER", "ASSISTANT", "Yes", "No", "Does", "this", "figure", "show", "a", "cab", "bad", "fed"]
    tokenizer = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )


CHAT = (
    "{% for m in messages %}USER {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT{% endif %}"
)


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import LlavaProcessor

    folder = tmp_path_factory.mktemp("llava")
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **tower, "image_size": SIZE, "patch_size": PATCH},
        text_config={"model_type": "llama", **tower, "vocab_size": 16, "max_position_embeddings": 64},
        image_token_index=2,
        image_seq_length=(SIZE // PATCH) ** 2,
        vision_feature_layer=-1,
    )
    roughened(LlavaForConditionalGeneration(config), 5).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}),
        word_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def made(
    clip_folder: str,
    bert_folder: str,
    hps_file: str,
    image_reward_file: str,
    aesthetic_file: str,
    blip_folder: str,
    llava_folder: str,
) -> dict[str, Callable[..., Pretrained]]:
    """Makers of each verifier over its tiny weights."""
    return {
        "clip": lambda **options: CLIPScore(clip_folder, **options),
        "pickscore": lambda **options: PickScore(clip_folder, processor=clip_folder, **options),
        "hps": lambda **options: HPSv2(hps_file, tokenizer=clip_folder, **options),
        "image_reward": lambda **options: ImageReward(image_reward_file, tokenizer=bert_folder, **options),
        "aesthetic": lambda **options: Aesthetic(aesthetic_file, clip=clip_folder, **options),
        "vqa": lambda **options: VQAScore(blip_folder, **options),
        "chat": lambda **options: VQAScore(llava_folder, question="Does this figure show {text}", **options),
    }


NAMES = ["clip", "pickscore", "hps", "image_reward", "aesthetic", "vqa", "chat"]


# ------------------------------------------------------------------------------------------------------------ preprocessing


@settings(max_examples=30, deadline=None)
@given(st.integers(9, 90), st.integers(9, 90), st.integers(12, 40), st.integers(0, 9), st.booleans())
def test_preprocessing_is_that_of_the_image_processors(height: int, width: int, crop: int, margin: int, stretch: bool) -> None:
    batch = images(2, height, width)
    if stretch:
        processor: Any = BlipImageProcessorPil(size={"height": crop, "width": crop + margin}, image_mean=[0.5, 0.4, 0.3])
    else:
        processor = CLIPImageProcessorPil(size={"shortest_edge": crop + margin}, crop_size={"height": crop, "width": crop})
    expected = torch.from_numpy(np.stack(processor(pictures(batch))["pixel_values"]))
    found = Preprocess.of(processor)(batch)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 2.5 / 255 / 0.26  # two passes of 8-bit rounding, in units of the standard deviation
    assert (found - expected).abs().mean() < 0.6 / 255 / 0.26


def test_hard_edges_do_not_overshoot() -> None:
    batch = torch.zeros(1, 3, 64, 64)
    batch[..., 24:] = 1
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    expected = torch.from_numpy(np.stack(processor(pictures(batch))["pixel_values"]))
    assert (Preprocess.of(processor)(batch) - expected).abs().max() < 1.5 / 255 / 0.26


@pytest.mark.parametrize(("height", "width"), [(64, 48), (20, 50), (32, 31), (32, 32), (7, 200)])
def test_padding_keeps_the_whole_image(height: int, width: int) -> None:
    batch = torch.full((1, 3, height, width), 0.5)
    pixels = Preprocess(SIZE, SIZE, "pad")(batch)[0]
    pixels = pixels * torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None]
    scale = SIZE / max(height, width)
    inner = (round(height * scale), round(width * scale))
    top, left = (SIZE - inner[0]) // 2, (SIZE - inner[1]) // 2
    expected = torch.zeros(3, SIZE, SIZE)
    expected[:, top : top + inner[0], left : left + inner[1]] = 0.5
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"fit": "squeeze"}, "fit must be"),
        ({"mode": "lanczos"}, "mode must be"),
        ({"edge": 200}, "edge must be at least the crop of 224x224, not 200"),
        ({"fit": "pad", "width": 8}, "height and width must be equal"),
    ],
)
def test_preprocessing_is_checked(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        Preprocess(**options)


@pytest.mark.parametrize(
    ("processor", "text"),
    [
        (CLIPImageProcessorPil(do_center_crop=False), "one height and width"),
        (CLIPImageProcessorPil(resample=1), "bilinear or bicubic"),
        (CLIPImageProcessorPil(do_normalize=False), "normalise"),
        (CLIPImageProcessorPil(size={"height": 224, "width": 224}), "shortest edge"),
    ],
)
def test_other_image_processors_are_refused(processor: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Preprocess.of(processor)


# --------------------------------------------------------------------------------------------- the numbers they should give


def clip_cosines(folder: str, batch: Tensor, prompts: Sequence[str]) -> tuple[Tensor, float]:
    """By transformers' own classes, on 8-bit pictures."""
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder)(pictures(batch), return_tensors="pt").pixel_values
    tokens = AutoTokenizer.from_pretrained(folder)(
        list(prompts), padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(pixel_values=pixels, **tokens).logits_per_image.diag()
    scale = float(model.logit_scale.detach().exp())
    return logits / scale, scale


def test_clip_score_is_a_hundred_cosines(clip_folder: str) -> None:
    for size, tolerance in (((SIZE, SIZE), 1e-3), ((40, 56), 0.3)):  # without resizing, 8-bit pictures lose nothing
        batch = images(4, *size)
        cosines, _ = clip_cosines(clip_folder, batch, PROMPTS)
        scores = CLIPScore(clip_folder).score(batch, PROMPTS)
        torch.testing.assert_close(scores, 100 * cosines, atol=tolerance, rtol=0)
        assert scores.argsort().tolist() == cosines.argsort().tolist()
        assert scores.std() > 3  # the tolerance means something


def test_pickscore_scales_by_its_own_weights(clip_folder: str) -> None:
    batch = images(4, SIZE, SIZE)
    cosines, scale = clip_cosines(clip_folder, batch, PROMPTS)
    assert 10 < scale < 20
    scores = PickScore(clip_folder, processor=clip_folder).score(batch, PROMPTS)
    torch.testing.assert_close(scores, scale * cosines, atol=1e-3, rtol=0)


def test_long_prompts_are_cut_at_the_context(clip_folder: str) -> None:
    batch, scorer = images(1, 40, 40), CLIPScore(clip_folder)
    words = ["a"] * (CONTEXT - 2)  # start and end take two
    full = scorer.score(batch, [" ".join(words)])
    assert scorer.score(batch, [" ".join([*words, "z", "y"])]) == pytest.approx(full)
    assert scorer.score(batch, [" ".join([*words[:-1], "z"])]) != pytest.approx(full)


def open_clip_embeddings(state: dict[str, Tensor], pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The two towers as open_clip computes them, straight from its names, by torch's own attention."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def tower(x: Tensor, name: str, layers: int, mask: Tensor | None) -> Tensor:
        for layer in range(layers):
            block, width = f"{name}.resblocks.{layer}", x.shape[-1]
            attention = nn.MultiheadAttention(width, 16, batch_first=True)
            attention.load_state_dict({key: state[f"{block}.attn.{key}"] for key in attention.state_dict()})
            y = norm(x, f"{block}.ln_1")
            x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
            y = F.gelu(F.linear(norm(x, f"{block}.ln_2"), state[f"{block}.mlp.c_fc.weight"], state[f"{block}.mlp.c_fc.bias"]))
            x = x + F.linear(y, state[f"{block}.mlp.c_proj.weight"], state[f"{block}.mlp.c_proj.bias"])
        return x

    patches = F.conv2d(pixels, state["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(pixels), 1, -1), patches], 1) + state["visual.positional_embedding"]
    x = tower(norm(x, "visual.ln_pre"), "visual.transformer", 3, None)
    image = norm(x[:, 0], "visual.ln_post") @ state["visual.proj"]
    length = tokens.shape[1]
    mask = torch.full((length, length), -torch.inf).triu(1)
    x = tower(state["token_embedding.weight"][tokens] + state["positional_embedding"][:length], "transformer", 2, mask)
    text = norm(x, "ln_final")[torch.arange(len(tokens)), tokens.argmax(-1)] @ state["text_projection"]
    return image, text


@torch.no_grad()
def test_hps_is_the_cosine_of_the_open_clip_network(hps_file: str, clip_folder: str) -> None:
    state = torch.load(hps_file)["state_dict"]
    batch = images(4, 44, 60)
    tokens = AutoTokenizer.from_pretrained(clip_folder)(
        PROMPTS, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
    ).input_ids
    image, text = open_clip_embeddings(state, Preprocess(SIZE, SIZE, "pad")(batch), tokens)
    scores = HPSv2(hps_file, tokenizer=clip_folder).score(batch, PROMPTS)
    torch.testing.assert_close(scores, F.cosine_similarity(image, text), atol=1e-5, rtol=1e-4)
    assert scores.std() > 0.02


def test_every_open_clip_tensor_lands_in_its_place() -> None:
    state = random_state(open_clip_shapes(), 7)
    renamed = hps.from_open_clip(state)
    model = CLIPModel(hps.clip_config(state))
    assert {name: value.shape for name, value in renamed.items()} == {name: value.shape for name, value in model.state_dict().items()}
    assert sum(value.numel() for value in renamed.values()) == sum(value.numel() for value in state.values())
    together = state["transformer.resblocks.1.attn.in_proj_weight"]
    for number, letter in enumerate("qkv"):
        part = renamed[f"text_model.encoder.layers.1.self_attn.{letter}_proj.weight"]
        assert torch.equal(part, together[48 * number : 48 * (number + 1)])
    assert torch.equal(renamed["visual_projection.weight"], state["visual.proj"].T)
    with pytest.raises(ValueError, match=r"'visual\.attnpool\.proj' is no tensor"):
        hps.from_open_clip({**state, "visual.attnpool.proj": torch.zeros(1)})


def image_reward_score(state: dict[str, Tensor], pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """As the published code computes it, straight from its names: timm's blocks, BERT's layers with cross-attention, the head."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str, epsilon: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], epsilon)

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, allowed: Tensor | None = None) -> Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, allowed).transpose(1, 2).flatten(2)

    eye, ear = "blip.visual_encoder", "blip.text_encoder"
    patches = F.conv2d(pixels, state[f"{eye}.patch_embed.proj.weight"], state[f"{eye}.patch_embed.proj.bias"], PATCH)
    x = torch.cat([state[f"{eye}.cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    x = x + state[f"{eye}.pos_embed"]
    for layer in range(2):
        block = f"{eye}.blocks.{layer}"
        x = x + linear(attention(*linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1), 16), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    seen = norm(x, f"{eye}.norm", 1e-6)

    x = state[f"{ear}.embeddings.word_embeddings.weight"][tokens] + state[f"{ear}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = norm(x, f"{ear}.embeddings.LayerNorm", 1e-12)
    for layer in range(2):
        block = f"{ear}.encoder.layer.{layer}"
        for kind in ("attention", "crossattention"):
            source, allowed = (x, mask[:, None, None].bool()) if kind == "attention" else (seen, None)
            q, k, v = (linear(y, f"{block}.{kind}.self.{part}") for y, part in ((x, "query"), (source, "key"), (source, "value")))
            x = norm(x + linear(attention(q, k, v, 12, allowed), f"{block}.{kind}.output.dense"), f"{block}.{kind}.output.LayerNorm", 1e-12)
        y = linear(F.gelu(linear(x, f"{block}.intermediate.dense")), f"{block}.output.dense")
        x = norm(x + y, f"{block}.output.LayerNorm", 1e-12)
    y = x[:, 0]
    for number in (0, 2, 4, 6, 7):
        y = linear(y, f"mlp.layers.{number}")
    return (y[:, 0] - 0.16717362830052426) / 1.0333394966054072


@torch.no_grad()
def test_image_reward_is_the_published_network(image_reward_file: str, bert_folder: str) -> None:
    state = torch.load(image_reward_file)
    batch = images(4, 44, 60)
    prompts = [*PROMPTS[:3], " ".join("abcdefghijklmnopqrstuvwxyz" * 2)]  # 52 tokens, of which 33 and the two marks remain
    tokens = AutoTokenizer.from_pretrained(bert_folder)(prompts, padding=True, truncation=True, max_length=35, return_tensors="pt")
    assert tokens.input_ids.shape == (4, 35)
    expected = image_reward_score(state, Preprocess(SIZE, SIZE)(batch), tokens.input_ids, tokens.attention_mask)
    scores = ImageReward(image_reward_file, tokenizer=bert_folder).score(batch, prompts)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    assert scores.std() > 0.05


def test_every_image_reward_tensor_lands_in_its_place(image_reward_file: str) -> None:
    state = torch.load(image_reward_file)
    vision, text, head = image_reward.split_checkpoint(state)
    unused = [name for name in state if "vision_proj" in name or "text_proj" in name or "position_ids" in name]
    assert len(unused) == 5
    assert len(vision) + len(text) + len(head) + len(unused) == len(state)
    vision_config, text_config = image_reward.blip_configs(vision, text)
    assert (vision_config.layer_norm_eps, vision_config.num_attention_heads, vision_config.image_size) == (1e-6, 16, SIZE)
    assert (text_config.layer_norm_eps, text_config.num_attention_heads, text_config.encoder_hidden_size) == (1e-12, 12, 32)
    for name in ("blip.visual_encoder.blocks.0.attn.rel_pos.weight", "blip.itm_head.weight", "foo"):
        with pytest.raises(ValueError, match="is no tensor of ImageReward"):
            image_reward.split_checkpoint({**state, name: torch.zeros(1)})


@torch.no_grad()
def test_aesthetic_is_a_linear_map_of_the_unit_embedding(aesthetic_file: str, clip_folder: str) -> None:
    batch, state = images(3, SIZE, SIZE), torch.load(aesthetic_file)
    model = CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval()
    pixels = AutoImageProcessor.from_pretrained(clip_folder)(pictures(batch), return_tensors="pt").pixel_values
    y = model(pixels).image_embeds
    y = y / y.norm(dim=-1, keepdim=True)
    for number in (0, 2, 4, 6, 7):
        y = y @ state[f"layers.{number}.weight"].T + state[f"layers.{number}.bias"]
    scorer = Aesthetic(aesthetic_file, clip=clip_folder)
    scores = scorer.score(batch, PROMPTS[:3])
    torch.testing.assert_close(scores, y[:, 0], atol=1e-4 * float(y.std()), rtol=1e-4)
    assert torch.equal(scores, scorer.score(batch, ["", "", "other"]))


@torch.no_grad()
def test_vqa_is_the_first_step_of_blip_generation(blip_folder: str) -> None:
    batch = images(4, SIZE, SIZE)
    model, processor = BlipForQuestionAnswering.from_pretrained(blip_folder).eval(), AutoProcessor.from_pretrained(blip_folder)
    expected = []
    for picture, prompt in zip(pictures(batch), PROMPTS, strict=True):
        inputs = processor(images=picture, text=f'Does this figure show "{prompt}"? Please answer yes or no.', return_tensors="pt")
        inputs["input_ids"][:, 0] = len(WORDS) + 1  # the encoder's own mark
        steps = model.generate(**inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
        expected.append(steps.logits[0][0].softmax(-1)[WORDS.index("yes")])
    scores = VQAScore(blip_folder).score(batch, PROMPTS)
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-4, atol=1e-6)
    assert scores.max() > 1.3 * scores.min() > 0
    negative = VQAScore(blip_folder, answer="No").score(batch, PROMPTS)
    assert not torch.allclose(negative, scores, rtol=0.1)


@torch.no_grad()
def test_vqa_speaks_the_chat_template(llava_folder: str) -> None:
    batch, prompts = images(4, SIZE, SIZE), ["a cab", "bad", "a cab", "fed cab bad"]
    model, processor = LlavaForConditionalGeneration.from_pretrained(llava_folder).eval(), AutoProcessor.from_pretrained(llava_folder)
    expected = []
    for picture, prompt in zip(pictures(batch), prompts, strict=True):
        inputs = processor(images=picture, text=f"USER <image> Does this figure show {prompt} ASSISTANT", return_tensors="pt")
        expected.append(model(**inputs).logits[0, -1].softmax(-1)[processor.tokenizer.convert_tokens_to_ids("Yes")])
    question = "Does this figure show {text}"
    scores = VQAScore(llava_folder, question=question).score(batch, prompts)
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-4, atol=1e-6)
    assert scores.max() > 1.3 * scores.min() > 0
    exact = VQAScore(llava_folder, question=question, differentiable=False)
    assert not exact.differentiable
    torch.testing.assert_close(exact.score(batch, prompts), torch.stack(expected), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_vqa_starts_the_decoder_of_encoder_decoder_models() -> None:
    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dtype, self.device = torch.float32, torch.device("cpu")
            text = T5Config(decoder_start_token_id=7)
            self.config = SimpleNamespace(get_text_config=lambda decoder: text)

        def forward(self, pixel_values: Tensor, input_ids: Tensor, decoder_input_ids: Tensor, use_cache: bool = True) -> Any:
            assert decoder_input_ids.tolist() == [[7]] * len(pixel_values) and not use_cache
            return SimpleNamespace(logits=pixel_values.mean((1, 2, 3))[:, None, None] * torch.tensor([0.0, 1.0]))

    class Inputs(dict):  # type: ignore[type-arg]
        def to(self, device: torch.device) -> Inputs:
            return self

    def processor(images: Any, text: str, return_tensors: str) -> Inputs:
        return Inputs(input_ids=torch.tensor([[len(text)]]), pixel_values=torch.zeros(1, 3, 8, 8))

    judge = vqa.ChatJudge(Recorder(), processor, Preprocess(8, 8), "{text}", 1)
    batch = images(3, 8, 8)
    expected = Preprocess(8, 8)(batch).mean((1, 2, 3)).sigmoid()
    torch.testing.assert_close(judge(batch, ["a", "b", "a"]), expected)
    assert list(judge.texts) == ["a", "b"]


# ------------------------------------------------------------------------------------------------------ what all of them keep


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_images(made: dict[str, Callable[..., Pretrained]], name: str) -> None:
    scorer = made[name]()
    batch = images(3, 40, 48, dtype=torch.float64).requires_grad_()
    scores = scorer.score(batch, PROMPTS[:3])
    assert scorer.differentiable and scores.dtype == torch.float64
    (gradient,) = torch.autograd.grad(scores.sum(), batch)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    direction = torch.randn(batch.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = direction / direction.norm() + gradient / gradient.norm()  # along noise alone the slope is lost in the rounding
    step = 1e-2 if name == "chat" else 1e-5  # llama's norms compute in float32
    with torch.no_grad():
        slope = (scorer.score(batch + step * direction, PROMPTS[:3]) - scorer.score(batch - step * direction, PROMPTS[:3])) / (2 * step)
    expected = (gradient * direction).flatten(1).sum(1)
    torch.testing.assert_close(slope, expected, rtol=2e-2 if name == "chat" else 1e-4, atol=1e-8)
    judge = scorer._held.judge
    assert judge is not None and not judge.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in judge.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_after_a_score_in_inference_mode(made: dict[str, Callable[..., Pretrained]], name: str) -> None:
    scorer, batch = made[name](), images(2, 40, 48)
    with torch.inference_mode():
        first = scorer.score(batch.clone(), PROMPTS[:2])
    again = scorer.score(batch.requires_grad_(), PROMPTS[:2])
    again.sum().backward()
    torch.testing.assert_close(again.detach(), first.clone())
    assert batch.grad is not None and batch.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_videos_score_the_mean_of_their_frames(made: dict[str, Callable[..., Pretrained]], name: str) -> None:
    scorer, video = made[name](), images(2, 3, 40, 48)
    alone = torch.stack([scorer.score(video[:, frame], PROMPTS[:2]) for frame in range(3)]).mean(0)
    torch.testing.assert_close(scorer.score(video, PROMPTS[:2]), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_score_does_not_depend_on_its_neighbours(made: dict[str, Callable[..., Pretrained]], name: str) -> None:
    scorer, batch = made[name](), images(4, 40, 48)
    together = scorer.score(batch, PROMPTS)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(scorer.score(batch[order], [PROMPTS[row] for row in order]), together[order], rtol=1e-4, atol=1e-5)
    alone = torch.cat([made[name]().score(batch[row : row + 1], PROMPTS[row : row + 1]) for row in range(4)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(checked_score(scorer, batch, PROMPTS), together)


@pytest.mark.parametrize("name", NAMES)
def test_precision_follows_the_images_unless_told(made: dict[str, Callable[..., Pretrained]], name: str) -> None:
    batch = images(2, 40, 48)
    full = made[name]().score(batch, PROMPTS[:2])
    scorer = made[name]()
    rounded = scorer.score(batch.bfloat16(), PROMPTS[:2])
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, full)
    torch.testing.assert_close(rounded, full, rtol=0.15, atol=0.1 * float(full.abs().max()))
    assert torch.equal(scorer.score(batch, PROMPTS[:2]), full)  # nothing of the rounded weights is left
    fixed = made[name](dtype=torch.float64, device="cpu").score(batch, PROMPTS[:2])
    assert fixed.dtype == torch.float64
    torch.testing.assert_close(fixed.float(), full, rtol=1e-3, atol=1e-4)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many prompts each call of CLIP's text tower got."""
    calls: list[int] = []
    original = CLIPModel.get_text_features

    def counting(self: Any, input_ids: Tensor, *arguments: Any, **options: Any) -> Any:
        calls.append(len(input_ids))
        return original(self, input_ids, *arguments, **options)

    monkeypatch.setattr(CLIPModel, "get_text_features", counting)
    yield calls


@pytest.mark.parametrize("name", ["clip", "pickscore", "hps"])
def test_text_is_read_once_for_each_prompt(made: dict[str, Callable[..., Pretrained]], name: str, counted: list[int]) -> None:
    scorer, batch = made[name](), images(4, 40, 48)
    first = scorer.score(batch, PROMPTS)
    assert counted == [3]  # one prompt comes twice
    scorer.score(batch[:2], ["a cab", "new"])
    assert counted == [3, 1]
    torch.testing.assert_close(scorer.score(batch, PROMPTS), first)
    assert counted == [3, 1]


@pytest.mark.parametrize("name", ["image_reward", "vqa", "chat"])
def test_tokens_are_kept_for_each_prompt(made: dict[str, Callable[..., Pretrained]], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, batch = made[name](), images(4, 40, 48)
    first = scorer.score(batch, PROMPTS)
    judge: Any = scorer._held.judge

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("tokenized again")

    for part in {"tokenizer", "processor"} & set(vars(judge)):
        monkeypatch.setattr(judge, part, refuse)
    torch.testing.assert_close(scorer.score(batch, PROMPTS), first)


@pytest.mark.parametrize("name", NAMES)
def test_making_one_loads_nothing(made: dict[str, Callable[..., Pretrained]], name: str) -> None:
    scorer = made[name]()
    other = made[name]()
    assert scorer == other and hash(scorer) == hash(other) and isinstance(scorer, Verifier)
    assert scorer._held.judge is None
    shown = repr(scorer)
    scorer.score(images(1, 40, 48), ["a"])
    assert scorer == other and repr(scorer) == shown and "_held" not in shown
    assert other._held.judge is None


def test_the_registry_has_the_names_of_the_mixes() -> None:
    assert set(PRETRAINED) == {"clip", "pickscore", "hps", "image_reward", "aesthetic", "vqa"}
    assert set(RENO_REWARDS) <= set(PRETRAINED) and set(CARINOX_REWARDS) - {"da"} <= set(PRETRAINED)
    mix = WeightedSum(tuple(PRETRAINED[name]() for name in RENO_REWARDS), tuple(RENO_REWARDS.values()))
    assert mix.differentiable
    # ReNO's losses subtract from these: their weighted sum is what the best image could score.
    assert mix.range_hint is not None and mix.range_hint[1] == pytest.approx(5 * 1 + 1 * 2 + 0.01 * 100 + 0.05 * 30)


# ------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: CLIPScore(""), "model must be an id"),
        (lambda: CLIPScore(dtype=torch.int8), "dtype must be a floating-point type"),
        (lambda: HPSv2(device="gpu"), "device must be a device of torch such as 'cuda:0' or None, not 'gpu'"),
        (lambda: VQAScore(question="Is it good?"), "question must hold {text}"),
        (lambda: VQAScore(answer=""), "answer must be one token"),
    ],
)
def test_settings_are_checked(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        make()


@pytest.mark.parametrize(
    ("batch", "prompts", "text"),
    [
        (torch.zeros(2, 1, 8, 8), ["a", "b"], r"images must be float of shape \[N, 3, H, W\]"),
        (torch.zeros(3, 8, 8), ["a"], "images must be float"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"], r"not torch\.uint8"),
        (torch.zeros(2, 3, 8, 8), ["a"], "2 images but 1 prompts"),
    ],
)
def test_images_and_prompts_are_checked(batch: Tensor, prompts: list[str], text: str) -> None:
    with pytest.raises(VerifierError, match=text):
        CLIPScore("nobody/nothing").score(batch, prompts)


def refusal(scorer: Pretrained) -> str:
    with pytest.raises(WeightsError) as caught:
        scorer.score(images(1, 40, 48), ["a"])
    text = str(caught.value)
    assert "\n" not in text and text.startswith(f"{type(scorer).__name__} cannot load ")
    assert "download it" in text and "local folder" in text
    assert scorer._held.judge is None
    return text


@pytest.mark.parametrize("name", list(PRETRAINED))
def test_missing_weights_are_named(name: str, tmp_path: Path) -> None:
    maker: Any = PRETRAINED[name]
    assert "'nobody/nothing" in refusal(maker("nobody/nothing"))
    assert str(tmp_path) in refusal(maker(str(tmp_path)))


def test_other_networks_are_refused(
    clip_folder: str, blip_folder: str, hps_file: str, image_reward_file: str, aesthetic_file: str, bert_folder: str
) -> None:
    assert "it is a 'blip' model, not a 'clip' one" in refusal(CLIPScore(blip_folder))
    assert "it is a 'blip' model, not a 'clip' one" in refusal(PickScore(blip_folder, processor=clip_folder))
    assert "'nobody/tokenizer'" in refusal(HPSv2(hps_file, tokenizer="nobody/tokenizer"))
    assert "no checkpoint of an open_clip CLIP" in refusal(HPSv2(image_reward_file, tokenizer=clip_folder))
    assert "is no tensor of ImageReward" in refusal(ImageReward(hps_file, tokenizer=bert_folder))
    assert "LinearHead" in refusal(Aesthetic(hps_file, clip=clip_folder))
    assert "answer 'aardvark' is 8 of its tokens" in refusal(VQAScore(blip_folder, answer="aardvark"))


def test_incomplete_checkpoints_are_refused(tmp_path: Path, hps_file: str, clip_folder: str) -> None:
    state = torch.load(hps_file)["state_dict"]
    del state["visual.ln_post.bias"]
    torch.save({"state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")
    text = refusal(HPSv2(str(tmp_path), tokenizer=clip_folder))
    assert "does not fit CLIPModel: 1 missing keys, the first is vision_model.post_layernorm.bias" in text
    (tmp_path / "HPS_v2.1_compressed.pt").write_bytes(b"<html>not found</html>")
    refusal(HPSv2(str(tmp_path), tokenizer=clip_folder))
    torch.save({"state_dict": {"a": 1}}, tmp_path / "HPS_v2.1_compressed.pt")
    assert "no dictionary of tensors" in refusal(HPSv2(str(tmp_path), tokenizer=clip_folder))


def test_a_network_without_its_answers_is_refused(tmp_path: Path, blip_folder: str) -> None:
    model = BlipForQuestionAnswering.from_pretrained(blip_folder)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("text_decoder.bert.encoder")}
    model.save_pretrained(tmp_path, state_dict=state)
    AutoProcessor.from_pretrained(blip_folder).save_pretrained(tmp_path)
    assert "does not fit BlipForQuestionAnswering" in refusal(VQAScore(str(tmp_path)))


def test_models_that_cut_images_need_their_own_processor(tmp_path: Path, llava_folder: str) -> None:
    LlavaForConditionalGeneration.from_pretrained(llava_folder).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(llava_folder)
    processor.image_processor.do_center_crop = False  # the size follows the image
    processor.save_pretrained(tmp_path)
    assert "differentiable=False" in refusal(VQAScore(str(tmp_path)))
    scores = VQAScore(str(tmp_path), differentiable=False).score(images(2, 32, 32), ["a", "cab"])
    assert scores.shape == (2,)

    judge: Any = SimpleNamespace(processor=processor, asked=lambda image, prompt: {"pixel_values": torch.zeros(1, 5, 3, SIZE, SIZE)})
    processor.image_processor.do_center_crop = True
    with pytest.raises(ValueError, match=r"other pixel values \[1, 5, 3, 32, 32\].*pass differentiable=False"):
        vqa._tensor_form(judge)
