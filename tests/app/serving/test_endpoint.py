"""A real server, and OpenAI's own client: pictures and text, alone and together, and what is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from hasten.app.batch.jobs import Job
from hasten.app.batch.painter import Painter
from hasten.app.serving.application import Service
from hasten.pipelines.text import TextPipeline
from tests.app.serving.stand_ins import opened

GRID = "1??4/?4??/?1??/4??1"
CAPTIONS = ["a small red circle", "a large blue square", "a small blue circle left of a large red square", "a red square"]


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="right", max_retries=0, timeout=60)


def pixels(b64: str | None) -> np.ndarray:
    assert b64 is not None
    return np.asarray(opened(base64.b64decode(b64))).astype(int)


def drawn(client: openai.OpenAI, prompt: str, **options: Any) -> list[Any]:
    return list(client.images.generate(prompt=prompt, model="tiny", extra_body=options).data or ())


def test_pictures_are_those_of_their_seeds_and_say_how_they_were_made(client: openai.OpenAI, painter: Painter) -> None:
    found = list(client.images.generate(prompt=CAPTIONS[0], model="tiny", n=2, size="64x48", extra_body={"seed": 7}).data or ())
    assert [picture.seed for picture in found] == [7, 8]
    for picture in found:
        job = Job.from_row({"prompt": CAPTIONS[0], "seed": picture.seed, "size": "64x48", "steps": 2})
        (painted,) = painter.paint([job])
        assert np.abs(pixels(picture.b64_json) - np.asarray(painted.image).astype(int)).max() <= 1
    said = opened(base64.b64decode(found[0].b64_json or ""))
    settings = json.loads(said.info["hasten"])
    assert said.size == (64, 48) and said.info["Title"] == CAPTIONS[0]
    assert (settings["model"], settings["seed"], settings["steps"], settings["prompt"]) == ("tiny", 7, 2, CAPTIONS[0])


def test_a_seed_that_was_drawn_draws_the_picture_again(client: openai.OpenAI) -> None:
    first, other = drawn(client, CAPTIONS[1]) + drawn(client, CAPTIONS[1])
    assert first.seed != other.seed and (pixels(first.b64_json) != pixels(other.b64_json)).any()
    (again,) = drawn(client, CAPTIONS[1], seed=first.seed)
    assert again.b64_json == first.b64_json


def test_settings_of_the_method_reach_the_picture(client: openai.OpenAI) -> None:
    (plain,) = drawn(client, CAPTIONS[0], seed=1, steps=4, method="none")
    (cached,) = drawn(client, CAPTIONS[0], seed=1, steps=4, method="delta-dit", interval=2, cached=2, boundary=0.5)
    (guided,) = drawn(client, CAPTIONS[0], seed=1, steps=4, method="none", guidance_scale=9, negative_prompt="a large square")
    assert (pixels(plain.b64_json) != pixels(cached.b64_json)).any() and (pixels(plain.b64_json) != pixels(guided.b64_json)).any()
    assert "N=2" in json.loads(opened(base64.b64decode(cached.b64_json)).info["hasten"])["method"]


def test_completions(client: openai.OpenAI) -> None:
    found = client.completions.create(model="puzzles", prompt=["483 + 759 = ?", "3? + ? = 91"], n=2, max_tokens=16, seed=5)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3] and found.seed == 5  # type: ignore[attr-defined]
    assert [choice.text for choice in found.choices[:2]] == ["111:1242"] * 2 and found.choices[0].finish_reason == "stop"
    assert found.usage is not None and found.usage.prompt_tokens == 10 + 8
    assert found.usage.completion_tokens == 2 * 9 + sum(len(choice.text) + 1 for choice in found.choices[2:])
    cut = client.completions.create(model="puzzles", prompt="483 + 759 = ?", max_tokens=3)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == ("111", "length")


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI, puzzles: TextPipeline, usage: bool) -> None:
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(client.completions.create(model="puzzles", prompt=[GRID, "483 + 759 = ?"], stream=True, seed=0, **options))
    pieces = [choice for chunk in chunks for choice in chunk.choices]
    for index, prompt in enumerate((GRID, "483 + 759 = ?")):
        own = [choice for choice in pieces if choice.index == index]
        assert "".join(choice.text for choice in own) == puzzles([prompt], gen_length=32).texts[0]
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["stop"]
    assert len([choice for choice in pieces if choice.index == 0]) > 2 and len({chunk.id for chunk in chunks}) == 1
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [usage]
    if usage:
        assert chunks[-1].usage is not None and chunks[-1].choices == [] and chunks[-1].usage.prompt_tokens == 30


def test_chats_whole_and_streamed(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "483 + "}, {"type": "text", "text": "759 = ?"}]}]
    whole = client.chat.completions.create(model="puzzles", messages=messages, max_completion_tokens=16)
    assert whole.choices[0].message.content == "111:1242" and whole.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(model="puzzles", messages=messages, stream=True, n=2))
    assert [chunk.choices[0].delta.role for chunk in chunks[:3]] == ["assistant", "assistant", None]
    for index in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in own) == "111:1242" and own[-1].finish_reason == "stop"


def test_two_visitors_at_once_get_what_they_get_alone_from_one_batch(
    client: openai.OpenAI, service: Service, puzzles: TextPipeline
) -> None:
    asked = [(caption, seed) for caption in CAPTIONS for seed in (1, 2)]
    alone = [pixels(drawn(client, caption, seed=seed)[0].b64_json) for caption, seed in asked]
    prompts = [GRID, "483 + 759 = ?", "3? + ? = 91", "depth 3 ????????"]
    before = service.metrics.page().decode()
    with ThreadPoolExecutor(12) as visitors:
        pictures = [visitors.submit(drawn, client, caption, seed=seed) for caption, seed in asked]
        texts = [visitors.submit(client.completions.create, model="puzzles", prompt=prompt, temperature=0.0) for prompt in prompts]
        for expected, found in zip(alone, pictures, strict=True):
            assert np.abs(expected - pixels(found.result()[0].b64_json)).max() <= 1
        for prompt, answered in zip(prompts, texts, strict=True):
            assert answered.result().choices[0].text == puzzles([prompt], gen_length=32).texts[0]
    after = service.metrics.page().decode()
    for model, rows in (("tiny", len(asked)), ("puzzles", len(prompts))):
        batches, members = (
            counted(after, f"hasten_batch_size_{what}", model) - counted(before, f"hasten_batch_size_{what}", model)
            for what in ("count", "sum")
        )
        assert members == rows and batches < rows


def counted(page: str, name: str, model: str) -> float:
    return next(float(line.split()[-1]) for line in page.splitlines() if line.startswith(f'{name}{{model="{model}"}}'))


def test_what_a_server_tells_of_itself(client: openai.OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "puzzles"]
    root = url.removesuffix("/v1")
    assert httpx.get(f"{root}/health").json() == httpx.get(f"{root}/ready").json() == {"status": "ok"}
    assert httpx.get(f"{root}/metrics").status_code == httpx.get(f"{root}/openapi.json").status_code == 401
    client.completions.create(model="puzzles", prompt="483 + 759 = ?")
    shown = {"Authorization": "Bearer right"}
    page = httpx.get(f"{root}/metrics", headers=shown)
    assert page.headers["content-type"].startswith("text/plain")
    assert counted(page.text, "hasten_forwards_saved_total", "puzzles") > 0 and counted(page.text, "hasten_queue_length", "tiny") == 0
    for path in ("/docs", "/redoc", "/wp-login.php", "/v1/engines"):
        assert httpx.get(root + path, headers=shown).status_code == 404
    page = httpx.get(f"{root}/metrics", headers=shown)
    assert 'hasten_requests_total{code="404",route="other"} 4.0' in page.text and "wp-login" not in page.text
    document = httpx.get(f"{root}/openapi.json", headers=shown).json()
    assert document["security"] == [{"key": []}] and document["paths"]["/health"]["get"]["security"] == []
    assert document["components"]["schemas"]["ChatRequest"]["properties"]["model"]["enum"] == ["puzzles"]


# --------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("key", ["wrong", "righ", "rightt", "RIGHT"])
def test_a_wrong_key(url: str, key: str) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        openai.OpenAI(base_url=url, api_key=key, max_retries=0).models.list()
    assert refused.value.code == "invalid_api_key" and refused.value.response.headers["www-authenticate"] == "Bearer"


def test_a_wrong_model(client: openai.OpenAI) -> None:
    calls: list[Callable[[], object]] = [
        lambda: client.images.generate(prompt="a", model="puzzles"),
        lambda: client.completions.create(prompt="a", model="tiny"),
        lambda: client.chat.completions.create(messages=[{"role": "user", "content": "a"}], model="gpt-4o"),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError, match="there is no model") as refused:
            call()
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", "prompt is missing"),
        ({"prompt": "a", "stepz": 3}, "stepz", "unknown key 'stepz'; did you mean steps?"),
        ({"prompt": "a" * 10_001}, "prompt", "at most 10000 characters"),
        ({"prompt": " \n"}, "prompt", "must not be empty"),
        ({"prompt": "a\0"}, "prompt", "without zero characters"),
        ({"prompt": "\ud800"}, "prompt", "unicode"),
        ({"prompt": 3}, "prompt", "valid string"),
        ({"prompt": "a", "n": 11}, "n", "less than or equal to 10"),
        ({"prompt": "a", "n": "2"}, "n", "valid integer"),
        ({"prompt": "a", "n": True}, "n", "valid integer"),
        ({"prompt": "a", "size": "-64x64"}, "size", "match pattern"),
        ({"prompt": "a", "size": "60x64"}, "size", "multiples of 8"),
        ({"prompt": "a", "size": "1024x1024"}, "size", "at most 16384 pixels"),
        ({"prompt": "a", "steps": 5}, "steps", "at most 4 here"),
        ({"prompt": "a", "seed": -1}, "seed", "greater than or equal to 0"),
        ({"prompt": "a", "seed": 2**62}, "seed", "less than"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale", "finite"),
        ({"prompt": "a", "response_format": "url"}, "response_format", "keeps no files"),
        ({"prompt": "a", "quality": "best"}, "quality", "'hd'"),
        ({"prompt": "a", "method": "magic"}, "method", "must be one of delta-dit"),
        ({"prompt": "a", "method": "forecast", "preset": "x"}, "method", "must be delta-dit where preset is given"),
        ({"prompt": "a", "method": "deepcache"}, None, "DeepCache needs a UNet"),
        ({"prompt": "a", "plan": "/etc/passwd"}, "plan", "unknown key 'plan'"),
        ([], None, "must be a JSON object"),
        ("a", None, "must be a JSON object"),
    ],
)
def test_a_wrong_picture(url: str, body: Any, param: str | None, message: str) -> None:
    answer = post(url, "/images/generations", json.dumps(body).encode())
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"] and "\n" not in error["message"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": "1"}, "model", "model is missing"),
        ({"model": "puzzles", "prompt": []}, "prompt", "at least 1 item"),
        ({"model": "puzzles", "prompt": ["1"] * 17}, "prompt", "at most 16 items"),
        ({"model": "puzzles", "prompt": ["1", " "]}, "prompt", "must not be blank"),
        ({"model": "puzzles", "prompt": "1", "temperature": 3}, "temperature", "less than or equal to 2"),
        ({"model": "puzzles", "prompt": "1", "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"model": "puzzles", "prompt": "1", "stop": ["a"] * 5}, "stop", "at most 4 items"),
        ({"model": "puzzles", "prompt": "1", "top_p": 0.5}, "top_p", "greater than or equal to 1"),
        ({"model": "puzzles", "prompt": "1", "stream_options": {"x": 1}}, "stream_options", "unknown key 'x' in stream_options"),
        ({"model": "puzzles", "prompt": "1", "logprobs": 3}, "logprobs", "unknown key 'logprobs'"),
        ({"model": "puzzles", "prompt": "1" * 300, "stream": True}, "prompt", "more than the model's context of 256"),
    ],
)
def test_a_wrong_question(url: str, body: Any, param: str, message: str) -> None:
    answer = post(url, "/completions", json.dumps(body).encode())
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"] and error["param"] == param


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b"[" * 50_000, b'{"prompt": "a", "seed": ' + b"9" * 5_000 + b"}", b"null", b'{"prompt": NaN}']
)
def test_a_body_that_is_no_json_object(url: str, body: bytes) -> None:
    answer = post(url, "/images/generations", body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_a_body_that_is_too_large_is_not_read(url: str) -> None:
    large = b'{"prompt": "' + b"a" * 200_000 + b'"}'
    assert post(url, "/images/generations", large).json()["error"]["code"] == "body_too_large"
    chunks = (large[i : i + 1000] for i in range(0, len(large), 1000))  # without Content-Length
    assert post(url, "/images/generations", chunks).status_code == 413
    wrong = httpx.post(f"{url}/completions", content=large, headers={"Authorization": "Bearer wrong"})
    assert wrong.status_code == 401


def test_other_methods_and_types(url: str) -> None:
    shown = {"Authorization": "Bearer right"}
    answer = httpx.get(f"{url}/images/generations", headers=shown)
    assert answer.status_code == 405 and answer.headers["allow"] == "POST" and "does not take GET" in answer.json()["error"]["message"]
    form = httpx.post(f"{url}/images/generations", headers={**shown, "Content-Type": "text/plain"}, content=b'{"prompt": "a"}')
    assert form.status_code == 400 and "application/json" in form.json()["error"]["message"]


def post(url: str, path: str, content: Any) -> httpx.Response:
    headers = {"Authorization": "Bearer right", "Content-Type": "application/json"}
    return httpx.post(url + path, content=content, headers=headers, timeout=60)
