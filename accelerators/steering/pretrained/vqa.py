"""VQAScore (arXiv 2404.01291): the probability that a model which looks at the image answers "Yes" when asked whether it shows the prompt.

The CLIP-FlanT5 of the paper is no model of transformers; any of its models that answer questions about images will do. Scores of two
models cannot be compared.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.accelerators.steering.pretrained.base import Judge, Pretrained
from hasten.accelerators.steering.pretrained.preprocess import Preprocess, wide


class QuestionJudge(Judge):
    """Asks about all images of one prompt at a time, so that no question is padded."""

    def __init__(self, question: str, token: int) -> None:
        super().__init__()
        self.question, self.token = question, token

    @abstractmethod
    def logits(self, frames: Tensor, prompt: str) -> Tensor:
        """Of the first token of the answer, [N, vocabulary], for frames [N, 3, H, W] of one prompt."""

    def forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Probabilities [N] of the answer."""
        rows = {prompt: [row for row, other in enumerate(prompts) if other == prompt] for prompt in dict.fromkeys(prompts)}
        logits = torch.cat([self.logits(frames[index], prompt) for prompt, index in rows.items()])
        order = torch.tensor([row for index in rows.values() for row in index], device=logits.device).argsort()
        return wide(logits).softmax(-1)[order, self.token]


class BlipJudge(QuestionJudge):
    """BLIP-VQA: the question is read while looking at the image, and the answer is decoded from what was read.

    Attributes:
        texts: By prompt, the tokens of its question [1, L].
    """

    def __init__(self, model: Any, tokenizer: Any, preprocess: Preprocess, question: str, token: int) -> None:
        super().__init__(question, token)
        self.model, self.tokenizer, self.preprocess = model, tokenizer, preprocess
        self.texts: dict[str, Tensor] = {}

    def logits(self, frames: Tensor, prompt: str) -> Tensor:
        """Of the first token of the answer, [N, vocabulary]."""
        seen = self.model.vision_model(self.preprocess(frames).to(self.model.dtype)).last_hidden_state
        if prompt not in self.texts:
            with torch.inference_mode(False):
                self.texts[prompt] = self.tokenized(prompt)
        read = self.model.text_encoder(self.texts[prompt].expand(len(frames), -1), encoder_hidden_states=seen).last_hidden_state
        start = torch.full((len(frames), 1), self.model.decoder_start_token_id, device=seen.device)
        return self.model.text_decoder(start, encoder_hidden_states=read, use_cache=False).logits[:, 0]

    def tokenized(self, prompt: str) -> Tensor:
        """The tokens of the question [1, L]."""
        config = self.model.config.text_config
        limit = config.max_position_embeddings
        tokens = self.tokenizer(self.question.replace("{text}", prompt), truncation=True, max_length=limit, return_tensors="pt").input_ids
        if config.bos_token_id == config.vocab_size - 2:  # BLIP adds two tokens: the decoder starts with one, the encoder with the other
            tokens[:, 0] = config.vocab_size - 1
        return tokens.to(self.model.device)


class ChatJudge(QuestionJudge):
    """Any other model that continues text about an image.

    Attributes:
        preprocess: None if the model's own processor prepares the images, without gradients.
        texts: By prompt, the inputs of the model other than the pixels, each [1, ...].
    """

    def __init__(self, model: Any, processor: Any, preprocess: Preprocess | None, question: str, token: int) -> None:
        super().__init__(question, token)
        self.model, self.processor, self.preprocess = model, processor, preprocess
        self.options = {"use_cache": False, "logits_to_keep": 1}
        accepted = inspect.signature(model.forward).parameters
        self.options = {name: value for name, value in self.options.items() if name in accepted}
        self.texts: dict[str, dict[str, Tensor]] = {}

    def logits(self, frames: Tensor, prompt: str) -> Tensor:
        """Of the first token of the answer, [N, vocabulary]."""
        if self.preprocess is None:
            with torch.no_grad():
                return torch.cat([self.answered(self.asked(picture(frame), prompt), 1) for frame in frames])
        if prompt not in self.texts:
            with torch.inference_mode(False):
                inputs = self.asked(picture(torch.zeros_like(frames[0])), prompt)
                self.texts[prompt] = {name: value for name, value in inputs.items() if name != "pixel_values"}
        inputs = {name: value.expand(len(frames), *value.shape[1:]) for name, value in self.texts[prompt].items()}
        return self.answered({**inputs, "pixel_values": self.preprocess(frames).to(self.model.dtype)}, len(frames))

    def asked(self, image: Any, prompt: str) -> dict[str, Tensor]:
        """The inputs of the model for one picture and its question, in the words of its chat template if it has one."""
        text = self.question.replace("{text}", prompt)
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
            inputs = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        else:
            inputs = self.processor(images=image, text=text, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        return {name: value.to(self.model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}

    def answered(self, inputs: dict[str, Tensor], count: int) -> Tensor:
        """Logits [count, vocabulary] after the question."""
        text = self.model.config.get_text_config(decoder=True)
        if text.is_encoder_decoder:
            start = torch.full((count, 1), text.decoder_start_token_id, device=self.model.device)
            inputs = {**inputs, "decoder_input_ids": start}
        return self.model(**inputs, **self.options).logits[:, -1]


def picture(frame: Tensor) -> Any:
    """A frame [3, H, W] in 0 to 1 as an 8-bit picture."""
    from PIL import Image

    return Image.fromarray(frame.detach().float().nan_to_num().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy())


@dataclass(frozen=True)
class VQAScore(Pretrained):
    """The probability, 0 to 1, that the answer to the question begins with `answer`.

    Attributes:
        model: A BLIP-VQA, or any model that transformers' AutoModelForImageTextToText loads. The default is the one of which CARINOX
            (arXiv 2509.17458) builds its DA-score, at 384 pixels instead of 480.
        revision: See `Pretrained`.
        device: See `Pretrained`.
        dtype: See `Pretrained`.
        question: What is asked, with {text} in the place of the prompt. Models without a chat template get it as it stands.
        answer: One token of the model; "Yes" in the paper's code.
        differentiable: Whether images stay tensors. Models that cut images into tiles or patches before they see them (LLaVA-NeXT,
            Qwen-VL, SmolVLM) need False: their own processor then gets 8-bit pictures one by one.

    Raises:
        ValueError: A setting is out of range.
    """

    model: str = "Salesforce/blip-vqa-base"
    question: str = 'Does this figure show "{text}"? Please answer yes or no.'
    answer: str = "Yes"
    differentiable: bool = True
    range_hint = (0.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{text}" not in self.question:
            raise ValueError(f"question must hold {{text}}, the place of the prompt, not {self.question!r}")
        if not self.answer:
            raise ValueError(f"answer must be one token of the model, not {self.answer!r}")

    def _load(self) -> QuestionJudge:
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BlipForQuestionAnswering

        config = self._from(AutoConfig, self.model, **self._at)
        processor = self._from(AutoProcessor, self.model, **self._at)
        blip = config.model_type == "blip"
        network = self._network(BlipForQuestionAnswering if blip else AutoModelForImageTextToText, self.model, **self._at)
        with self._loading(self.model):
            tokens = processor.tokenizer(self.answer, add_special_tokens=False).input_ids
            if len(tokens) != 1:
                raise ValueError(f"answer {self.answer!r} is {len(tokens)} of its tokens and must be one")
            if blip:
                return BlipJudge(network, processor.tokenizer, Preprocess.of(processor.image_processor), self.question, tokens[0])
            judge = ChatJudge(network, processor, None, self.question, tokens[0])
            judge.preprocess = _tensor_form(judge) if self.differentiable else None
            return judge


def _tensor_form(judge: ChatJudge) -> Preprocess:
    """The preprocessing of the model on tensors, tried on a picture against its own processor.

    Raises:
        ValueError: They differ.
    """
    advice = "pass differentiable=False"
    try:
        preprocess = Preprocess.of(judge.processor.image_processor)
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from error
    ramp = torch.linspace(0, 1, 60).expand(3, 40, 60)
    probe = torch.stack([ramp[0], ramp[1].flip(1), ramp[2] ** 2]).mul(255).round() / 255
    theirs, ours = judge.asked(picture(probe), "probe")["pixel_values"], preprocess(probe[None])
    if theirs.shape != ours.shape or (theirs.float() - ours).abs().max() > 0.1:
        raise ValueError(f"its processor makes other pixel values {list(theirs.shape)} than a resized image; {advice}")
    return preprocess
