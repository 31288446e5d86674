"""Whether what the endpoint is built on is there; it comes with an extra."""

from __future__ import annotations

from importlib.util import find_spec

from hasten.app.errors import BadInput

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def check_installed() -> None:
    """Looks for the packages of the extra `serve`.

    Raises:
        BadInput: Some are missing; the message says how to get them.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise BadInput(f"serve needs {', '.join(missing)}: pip install 'hasten[serve]'")
