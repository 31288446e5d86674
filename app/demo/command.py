"""What `hasten demo` does: checks, builds and serves the page, and loads the model while the first visitor reads."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass
from importlib.util import find_spec

from hasten.app.demo.runs import Models
from hasten.app.errors import BadInput
from hasten.app.models import DEVICES, DTYPES
from hasten.pipelines.zoo.loading import MODELS

MOST_WAITING = 10_000


@dataclass(frozen=True)
class DemoOptions:
    """What the command line says.

    Attributes:
        model: For pictures; None for all that ship.
        host, port: Where the page is served; port 0 takes a free one, None one from 7860 on.
        share: Whether Gradio makes a public link.
        queue: Most requests that may wait.
        dtype, device: Of the models.

    Raises:
        BadInput: A value is out of range.
    """

    model: str | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    share: bool = False
    queue: int = 64
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.port is not None and not 0 <= self.port < 65536:
            raise BadInput(f"--port must be from 0 to 65535, not {self.port}")
        if not 1 <= self.queue <= MOST_WAITING:
            raise BadInput(f"--queue must be from 1 to {MOST_WAITING}, not {self.queue}")
        for option, value, allowed in (("--dtype", self.dtype, DTYPES), ("--device", self.device, DEVICES)):
            if value not in allowed:
                raise BadInput(f"{option} must be one of {', '.join(allowed)}, not {value!r}")


def demo(options: DemoOptions) -> None:
    """Serves the page until it is interrupted.

    Raises:
        BadInput: There is no such model, the port is taken, or gradio is not installed.
    """
    if find_spec("gradio") is None:
        raise BadInput("hasten demo needs gradio: pip install 'hasten[demo]'")
    # Read when they are imported: a page that works offline asks nobody for anything.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    models = Models([options.model] if options.model is not None else MODELS, options.dtype, options.device)
    from hasten.app.demo.page import build, launch

    page = build(models, options.queue)
    try:
        port = free_port(options.host) if options.port == 0 else options.port
        address = launch(page, options.host, port, share=options.share)
    except OSError as why:
        raise BadInput(f"--port: {why}") from None
    print(f"hasten demo: {address}", flush=True)
    threading.Thread(target=_warmed, args=(models,), name="hasten-demo-loading", daemon=True).start()
    try:
        threading.Event().wait()
    except KeyboardInterrupt:  # how a server is ended
        page.close()


def _warmed(models: Models) -> None:
    """A model that cannot be loaded is told here, and to every visitor who asks for it."""
    try:
        models.warm_up()
    except Exception as error:
        print(f"warning: {models.default} could not be loaded: {' '.join(str(error).split())}", file=sys.stderr)


def free_port(host: str) -> int:
    """One that nobody listens on."""
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
