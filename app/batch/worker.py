"""A process that `hasten batch --workers` starts: `python -m hasten.app.batch.worker JSON`."""

from __future__ import annotations

import json
import sys

from hasten.app import errors
from hasten.app.batch.command import run_worker


def main(argument: str) -> int:
    """Works until nothing is left; returns the exit code."""
    try:
        return run_worker(json.loads(argument))
    except Exception as error:
        return errors.report(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
