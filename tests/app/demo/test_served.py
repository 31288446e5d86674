"""The page under load, and how soon it is there."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.app.demo.conftest import Served

ROOT = Path(__file__).resolve().parents[3]
READY = 5.0
"""Seconds from the command to a page that answers."""


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    from gradio_client import Client

    return Client(served.address, verbose=False)


def answer(client: Any, prompt: str) -> Any:
    return client.submit(prompt, "threshold", "", [], "16", 0.0, 0, 0.0, api_name="/text")


def test_fifty_queued_requests_are_all_served_and_none_sees_another(client: Any) -> None:
    jobs = {first: answer(client, f"{first} + ? = {first + 20}") for first in range(10, 60)}
    for first, job in jobs.items():
        status, cards = job.result(timeout=120)
        assert "done in" in status, first
        assert f">{first}+" in cards.replace(" ", ""), first  # each answer repeats its own first addend


def test_a_full_queue_says_so_and_goes_on(served: Served, client: Any) -> None:
    """More than may wait: those that are refused get an error, and all others their answer."""
    before, served.page._queue.max_size = served.page._queue.max_size, 3
    try:
        jobs = [answer(client, "3? + ? = 91") for _ in range(12)]
        found: list[str] = []
        for job in jobs:
            try:
                found.append(str(job.result(timeout=120)[0]))
            except Exception as error:
                found.append(f"refused: {error}")
    finally:
        served.page._queue.max_size = before
    refused = [text for text in found if text.startswith("refused")]
    assert refused and all("full" in text.lower() for text in refused)
    assert len(refused) < len(found) and all("done in" in text for text in found if text not in refused)
    assert "done in" in answer(client, "3? + ? = 91").result(timeout=60)[0]


def test_what_is_not_allowed_is_refused_over_the_wire_too(client: Any) -> None:
    given = {"schedule": "threshold", "length": "16"}
    for changed in ({"schedule": "../../etc/passwd"}, {"length": "1000000"}):
        values = {**given, **changed}
        job = client.submit("3? + ? = 91", values["schedule"], "", [], values["length"], 0.0, 0, 0.0, api_name="/text")
        with pytest.raises(Exception, match=r"not in the list of choices|must be one of"):
            job.result(timeout=60)
    long = client.submit("9" * 100_000, "threshold", "", [], "16", 0.0, 0, 0.0, api_name="/text")
    with pytest.raises(Exception, match="at most 2000 letters"):
        long.result(timeout=60)


def test_the_page_is_built_without_torch() -> None:
    """Its import takes seconds, which the first visitor is not to wait for."""
    program = (
        "import sys\nfrom hasten.app.demo.runs import Models\nfrom hasten.app.demo.page import build\n"
        "build(Models(['shapes', 'shapes-flow', 'shapes-unet']), 8)\nassert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True, timeout=120)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="reads how much time a process has had from /proc")
def test_the_page_takes_less_than_five_seconds_of_a_core_to_be_there(tmp_path: Path) -> None:
    """What it needs on a machine that does nothing else, measured on one that does; the first start compiles what it imports."""
    seconds = []
    for _ in range(2):
        server = subprocess.Popen(
            [sys.executable, "-c", "from hasten.app.cli import main; main()", "demo", "--port", "0"],
            stdout=subprocess.PIPE, text=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[-1]
            with urllib.request.urlopen(address, timeout=60) as page:
                assert page.status == 200 and "hasten" in page.read().decode()
            user, system = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            seconds.append((int(user) + int(system)) / os.sysconf("SC_CLK_TCK"))
        finally:
            server.kill()
            server.wait()
    assert min(seconds) < READY, seconds
