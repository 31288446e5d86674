"""What goes wrong, in one line: exit code 2 for bad input, 1 for a failure in the work."""

from __future__ import annotations

import os
import sys
import traceback

OK, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130


class BadInput(ValueError):
    """What the user asked for cannot be done; the message names the argument and says what is allowed."""


def debugging() -> bool:
    """Whether HASTEN_DEBUG asks for tracebacks."""
    return os.environ.get("HASTEN_DEBUG", "") not in ("", "0")


def _refused_by_pipeline(error: BaseException) -> bool:
    """Whether a diffusers pipeline raised it while it checked the arguments of its call, as it does before any work."""
    return any(frame.name == "check_inputs" for frame in traceback.extract_tb(error.__traceback__))


def report(error: BaseException) -> int:
    """Says on stderr what went wrong, in one line, and returns the exit code."""
    message = " ".join(str(error).split())
    shown = getattr(error, "format_message", None)
    if shown is not None:  # a usage error of the command line's parser
        message, code = f"{' '.join(shown().split()).rstrip('.')}; see --help", int(getattr(error, "exit_code", USAGE))
    elif isinstance(error, ValueError) and type(error).__module__.startswith("hasten."):
        code = USAGE
    elif isinstance(error, ValueError) and _refused_by_pipeline(error):
        message, code = f"the pipeline refuses these settings: {message}", USAGE
    else:
        message, code = f"{type(error).__name__}: {message}", FAILURE
    if debugging():
        traceback.print_exception(error)
    elif code == FAILURE:
        message += " (HASTEN_DEBUG=1 shows where)"
    print(f"error: {message}", file=sys.stderr)
    return code
