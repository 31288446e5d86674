"""More visitors than there is room for, visitors who leave, time that is over, and a server that is told to stop."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from hasten.app.batch.jobs import Job
from hasten.app.serving.application import Room, Service
from hasten.app.serving.metrics import Metrics
from hasten.app.serving.texts import Desk
from hasten.pipelines.text import TextPipeline, TextUpdate
from tests.app.serving.stand_ins import colour, gated, listening, opened, until

Visitors = ThreadPoolExecutor


def ask(url: str, prompt: str = "a", **options: Any) -> httpx.Response:
    return httpx.post(f"{url}/images/generations", json={"prompt": prompt, **options}, timeout=30)


def colours(answer: httpx.Response) -> list[Any]:
    assert answer.status_code == 200, answer.text
    return [opened(base64.b64decode(picture["b64_json"])).getpixel((0, 0)) for picture in answer.json()["data"]]


@pytest.fixture
def visitors() -> Iterator[Visitors]:
    with ThreadPoolExecutor(60) as found:
        yield found


def test_fifty_who_wait_are_all_served_with_what_is_theirs(visitors: Visitors) -> None:
    painter, service = gated(Room(queue=100, batch=8, wait=0.0))
    with listening(service) as (url, _):
        waiting = [visitors.submit(ask, url, "x" * (i + 1), seed=1000 + i, n=1 + i % 2, steps=1 + i % 3) for i in range(50)]
        until(lambda: sum(map(len, painter.began)) + service.workers[0].waiting == 75)
        painter.gate.set()
        for i, answer in enumerate(waiting):
            own = [Job("", "x" * (i + 1), 1000 + i + k) for k in range(1 + i % 2)]
            assert colours(answer.result()) == [colour(job) for job in own]
        assert len(painter.began) < 25 and all(len({job.key() for job in batch}) == 1 for batch in painter.began)


def test_a_full_queue_sends_visitors_away_for_a_while(visitors: Visitors) -> None:
    painter, service = gated(Room(queue=1, batch=1, wait=0.0))
    with listening(service) as (url, _):
        first = visitors.submit(ask, url)
        until(lambda: len(painter.began) == 1)
        second = visitors.submit(ask, url)
        until(lambda: service.workers[0].waiting == 1)
        with pytest.raises(openai.RateLimitError) as refused:
            openai.OpenAI(base_url=url, api_key="any", max_retries=0).images.generate(prompt="b")
        assert refused.value.code == "queue_full" and int(refused.value.response.headers["retry-after"]) >= 1
        painter.gate.set()
        assert first.result().status_code == second.result().status_code == ask(url).status_code == 200


def test_what_takes_too_long_is_given_up(visitors: Visitors) -> None:
    painter, service = gated(Room(batch=1, wait=0.0, timeout=0.3))
    with listening(service) as (url, _):
        answers = [visitors.submit(ask, url) for _ in range(2)]  # the second never leaves the queue
        for answer in answers:
            assert answer.result().status_code == 504 and "longer than 0.3 s" in answer.result().json()["error"]["message"]
        until(lambda: service.idle)
        assert painter.cancelled == len(painter.began) <= 2
        painter.gate.set()
        assert ask(url).status_code == 200


def test_who_hangs_up_is_forgotten(visitors: Visitors) -> None:
    painter, service = gated(Room(batch=2, wait=0.2))
    with listening(service) as (url, _):
        stays = visitors.submit(ask, url, "stays", steps=1)
        hang_up(url, "leaves", steps=1, until_=lambda: len(painter.began) == 1)
        assert len(painter.began[0]) == 2
        hang_up(url, "waits", steps=2, until_=lambda: service.workers[0].waiting == 1)
        until(lambda: service.workers[0].waiting == 0)
        assert not painter.cancelled  # the other one of the batch is still there
        painter.gate.set()
        assert colours(stays.result())[0][0] == len("stays")
        painter.gate.clear()
        hang_up(url, "alone", steps=3, until_=lambda: len(painter.began) == 2)
        until(lambda: service.idle)
        assert painter.cancelled == 1


def hang_up(url: str, prompt: str, *, steps: int, until_: Any) -> None:
    """Sends a request, waits until something is true, and closes the connection."""
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    body = json.dumps({"prompt": prompt, "steps": steps}).encode()
    with socket.create_connection((host, int(port))) as line:
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        line.sendall(head.encode() + body)
        until(until_)


def test_a_broken_request_does_not_break_its_neighbours(visitors: Visitors) -> None:
    painter, service = gated(Room(batch=3, wait=1.0))
    painter.gate.set()
    with listening(service) as (url, _):
        answers = [visitors.submit(ask, url, prompt, seed=i) for i, prompt in enumerate(("one", "broken", "three"))]
        codes = [answer.result().status_code for answer in answers]
        assert codes == [200, 500, 200] and [len(batch) for batch in painter.began] == [3, 1, 1, 1]
        assert "cannot be painted" not in answers[1].result().text
        picture = opened(base64.b64decode(answers[0].result().json()["data"][0]["b64_json"]))
        assert json.loads(picture.info["hasten"])["model"] == "gated" and "secret" not in str(picture.info)


class SlowText:
    """Lets a pipeline's stream go on one update at a time."""

    def __init__(self, pipe: TextPipeline, patch: pytest.MonkeyPatch) -> None:
        self.updates, self.ended = threading.Semaphore(0), threading.Event()
        stream = pipe.stream

        def slow(*args: Any, **options: Any) -> Iterator[TextUpdate]:
            try:
                for update in stream(*args, **options):
                    self.updates.acquire()
                    yield update
            finally:
                self.ended.set()

        patch.setattr(pipe, "stream", slow)


def test_tokens_come_when_they_are_final_and_leaving_stops_the_rest(puzzles: TextPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, metrics = SlowText(puzzles, monkeypatch), Metrics()
    service = Service(None, Desk("puzzles", puzzles, metrics, 32), metrics, Room(wait=0.0))
    with listening(service) as (url, _):
        client = openai.OpenAI(base_url=url, api_key="any", max_retries=0)
        stream = client.completions.create(model="puzzles", prompt="483 + 759 = ?", stream=True)
        slow.updates.release()
        assert next(stream).choices[0].text == "111:12"  # the second step has not been taken
        assert not slow.ended.is_set()
        stream.close()
        until(lambda: [slow.updates.release(), slow.ended.is_set()][1])
        until(lambda: service.idle)
        with pytest.raises(openai.NotFoundError, match="this server has none for pictures"):
            client.images.generate(prompt="a")


def test_a_stream_whose_time_is_over_says_so(puzzles: TextPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, metrics = SlowText(puzzles, monkeypatch), Metrics()
    service = Service(None, Desk("puzzles", puzzles, metrics, 32), metrics, Room(wait=0.0, timeout=0.5))
    with listening(service) as (url, _):
        slow.updates.release()
        answer = httpx.post(f"{url}/completions", json={"model": "puzzles", "prompt": "483 + 759 = ?", "stream": True})
        events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]
        assert events[0]["choices"][0]["text"] == "111:12" and events[1]["error"]["code"] == "timeout" and len(events) == 2
        slow.updates.release(100)


# -------------------------------------------------------------------------------------------------------------- stopping


def test_draining_finishes_what_was_taken_on_and_takes_no_more(visitors: Visitors) -> None:
    painter, service = gated(Room(batch=1, wait=0.0))
    with listening(service) as (url, server):
        root = url.removesuffix("/v1")
        taken = [visitors.submit(ask, url) for _ in range(3)]
        until(lambda: len(painter.began) == 1 and service.workers[0].waiting == 2)
        server.handle_exit(signal.SIGTERM, None)
        assert httpx.get(f"{root}/ready").status_code == 503 and httpx.get(f"{root}/health").status_code == 200
        refused = ask(url)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining" and "retry-after" in refused.headers
        painter.gate.set()
        assert [answer.result().status_code for answer in taken] == [200] * 3
        until(lambda: not server.servers or not server.servers[0].is_serving())
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{root}/health")


def test_draining_has_an_end(visitors: Visitors) -> None:
    painter, service = gated(Room(batch=1, wait=0.0))
    with listening(service, drain_seconds=0.3) as (url, server):
        taken = [visitors.submit(ask, url) for _ in range(2)]
        until(lambda: len(painter.began) == 1 and service.workers[0].waiting == 1)
        server.handle_exit(signal.SIGTERM, None)
        assert [answer.result().status_code for answer in taken] == [503, 503]
        until(lambda: painter.cancelled == 1)


def test_a_second_signal_gives_up_the_rest(visitors: Visitors) -> None:
    painter, service = gated()
    with listening(service, drain_seconds=60) as (url, server):
        taken = visitors.submit(ask, url)
        until(lambda: len(painter.began) == 1)
        server.handle_exit(signal.SIGINT, None)
        server.handle_exit(signal.SIGINT, None)
        assert taken.result().status_code == 503 and not server.force_exit
        until(lambda: painter.cancelled == 1 and not server.servers[0].is_serving())


def test_the_command_serves_drains_at_sigterm_and_ends_with_0(tiny_pipeline_folder: Path) -> None:
    words = ["serve", "--model", str(tiny_pipeline_folder), "--text-model", "none", "--port", "0", "--steps", "40", "--method", "none"]
    environment = {**os.environ, "HASTEN_API_KEY": "of-the-environment"}
    command = [sys.executable, "-c", "from hasten.app.cli import main; main()", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert line.startswith("serving tiny at http://127.0.0.1:")
            url = line.split(" at ")[1].strip()
            client = openai.OpenAI(base_url=url, api_key="of-the-environment", max_retries=0, timeout=60)
            with ThreadPoolExecutor(1) as visitor:
                taken = visitor.submit(client.images.generate, prompt="a small red circle", n=4)
                page, shown = url.removesuffix("/v1") + "/metrics", {"Authorization": "Bearer of-the-environment"}
                until(lambda: 'hasten_batch_size_sum{model="tiny"} 4.0' in httpx.get(page, headers=shown).text)
                began = time.monotonic()
                process.send_signal(signal.SIGTERM)
                assert len(taken.result().data or ()) == 4
            assert process.wait(60) == 0 and time.monotonic() - began < 60
            assert process.stderr.read() == ""
        finally:
            process.kill()
