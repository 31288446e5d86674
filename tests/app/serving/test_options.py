"""What `hasten serve` refuses, in one line and before it loads a model."""

from __future__ import annotations

import socket

import pytest
from typer.testing import CliRunner

from hasten.app.cli import app
from hasten.app.errors import BadInput
from hasten.app.serving import installed, server
from hasten.app.serving.application import Room
from hasten.app.serving.images import Frame


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*args: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(server, "_service", loaded)


def refusal(*words: str) -> str:
    done = CliRunner().invoke(app, ["serve", *words])
    assert done.exit_code == 2 and not done.stdout, done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--queue", "0"], "--queue must be a whole number of at least 1, not 0"),
        (["--max-batch", "0"], "--max-batch must be"),
        (["--max-wait-ms", "-1"], "--max-wait-ms must be a number of at least 0, not -1"),
        (["--timeout", "nan"], "--timeout must be"),
        (["--max-body", "0"], "--max-body must be"),
        (["--drain-seconds", "inf"], "--drain-seconds must be"),
        (["--max-steps", "0"], "--max-steps must be"),
        (["--steps", "300"], "--steps must be at most --max-steps, 250, not 300"),
        (["--port", "70000"], "--port must be a number from 0 to 65535, not 70000"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid --port 8000 cannot be listened on"),
        (["--api-key", ""], "--api-key must be 1 to 500 printable ASCII characters without spaces"),
        (["--api-key", "schlüssel"], "--api-key must be"),
        (["--model", "none", "--text-model", "none"], "there would be nothing to serve"),
        (["--model", "no such"], "--model must be shapes"),
        (["--method", "magic"], "--method must be one of delta-dit"),
        (["--method", "fora", "--preset", "x"], "--method must be delta-dit where --preset is given"),
        (["--plan", "/no/such/plan"], "/no/such/plan"),
        (["--schedule", "freedave"], "--schedule must not be freedave here"),
        (["--schedule", "magic"], "--schedule must be one of"),
        (["--set", "magic=1"], "--set: credit has no such setting"),
        (["--modle", "shapes"], "No such option: --modle"),
    ],
)
def test_wrong_options(words: list[str], message: str) -> None:
    assert message in refusal(*words)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--host 127.0.0.1 --port {port} cannot be listened on" in refusal("--port", str(port))


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "find_spec", lambda name: None if name == "uvicorn" else name)
    assert refusal().endswith("serve needs uvicorn: pip install 'hasten[serve]'")


def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_API_KEY", "hidden")
    assert server._key(None) == "hidden" and server._key("shown") == "shown"
    monkeypatch.setenv("HASTEN_API_KEY", "")
    assert server._key(None) is None


def test_rooms_and_frames_are_checked() -> None:
    for wrong in ({"queue": 0}, {"batch": 0}, {"wait": -1}, {"timeout": float("inf")}, {"body": 0}):
        with pytest.raises(BadInput, match=f"{next(iter(wrong))} must be"):
            Room(**wrong)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="pixels must be"):
        Frame(pixels=0)


def test_the_help_shows_an_example_for_each_use() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"]).stdout
    for word in ("curl", "HASTEN_API_KEY", "--text-model none", "/v1/chat/completions", "SIGTERM", "429"):
        assert word in shown
