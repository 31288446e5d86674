"""`hasten trace` and `hasten explain`: a model's blocks, and what a method would do with them. Nothing is drawn."""

from __future__ import annotations

from hasten.app.errors import BadInput
from hasten.app.output import Outcome
from hasten.app.setup import Options, check, prepare


def trace(options: Options, caption: str) -> Outcome:
    """The denoiser's blocks, how they are linked, what they cost and what of them can be cached.

    Raises:
        BadInput: The model cannot be loaded or called so.
        TraceError: It cannot be traced.
    """
    from hasten.pipelines.accelerated import trace as trace_pipeline

    ready = prepare(check(options), [caption])
    found = trace_pipeline(ready.model.pipe, **ready.job.call(range(1)))
    return Outcome(found.to_json(), str(found))


def explain(options: Options, caption: str) -> Outcome:
    """The plan that a method would make, its bound, its memory, and a reason for everything that is not cached.

    Raises:
        BadInput: The model cannot be loaded or called so, or no method was named.
        PlanError: The plan does not fit.
    """
    from hasten.pipelines.accelerated import explain as explain_pipeline

    if options.method == "none":
        raise BadInput("--method must be delta-dit or auto, or a --plan given: with none there is nothing to explain")
    ready = prepare(check(options), [caption])
    found = explain_pipeline(ready.model.pipe, ready.checked.method, **ready.job.call(range(1)))
    return Outcome(found.to_json(), str(found))
