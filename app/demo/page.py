"""The page: its tabs, how their runs are started, queued, told of and stopped, and the settings in its address."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio

from hasten.app.demo import markup
from hasten.app.demo.runs import Line, Models, follow
from hasten.app.demo.style import CSS, theme
from hasten.app.errors import BadInput, debugging

MOST_LETTERS = 2000
"""Of a caption or a prompt."""
KEPT_SECONDS = 3600
"""How long a visitor's files and state are kept."""

SUBTITLE = "diffusion, faster: each claim beside what it is measured against"

Values = dict[str, Any]
Work = Callable[[Line], None]


@dataclass(frozen=True)
class Tab:
    """A tab that was built.

    Attributes:
        name: In the page's address.
        fields: Components of its settings, by their names in the address.
    """

    name: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What a button starts.

    Attributes:
        tab: Whose settings it takes.
        name: Of its endpoint.
        queue: Runs of one queue wait for each other.
        work: From the settings, and the states, to the work. Raises BadInput before anything is done where a setting is not allowed.
        render: From a value that the work shows to new values of components.
        outputs: All that it may change, without the status.
        states: Further inputs, by name: what the visitor has made before.
    """

    tab: Tab
    name: str
    queue: str
    work: Callable[..., Work]
    render: Callable[[Any], Values | dict[Any, Any]]
    outputs: Sequence[Any]
    states: Mapping[str, Any]

    def handler(self, status: Any) -> Callable[..., Iterator[dict[Any, Any]]]:
        """What Gradio calls."""
        names = [*self.tab.fields, *self.states]

        def handle(*values: Any) -> Iterator[dict[Any, Any]]:
            given, began = dict(zip(names, values, strict=True)), time.perf_counter()
            whole: dict[Any, Any] = {}
            try:
                for news in follow(self.work(**given)):
                    changed: dict[Any, Any] = {}
                    for value in news.values:
                        changed |= self.render(value)
                    whole |= changed
                    yield {**changed, status: markup.progress(news)}
            except Exception as error:
                text = one_line(error)
                yield {status: markup.said(text, "failed")}
                raise gradio.Error(text, print_exception=debugging()) from (error if debugging() else None)
            # All of it once more: clients of the endpoint are given what was yielded last.
            yield {**whole, status: markup.said(f"done in {time.perf_counter() - began:.1f} s")}

        return handle


def one_line(error: Exception) -> str:
    """What went wrong, for the visitor."""
    text = " ".join(str(error).split())
    own = isinstance(error, ValueError) and type(error).__module__.startswith("hasten.")
    return (text if own else f"{type(error).__name__}: {text}").removeprefix("--")[:500]


def caption_of(text: str) -> str:
    """A caption as it may be drawn.

    Raises:
        BadInput: It is empty or too long.
    """
    text = " ".join((text or "").split())
    if not text:
        raise BadInput("the caption is empty: say what to draw, such as a small red circle")
    if len(text) > MOST_LETTERS:
        raise BadInput(f"the caption must have at most {MOST_LETTERS} letters, not {len(text)}")
    return text


def start(run: Run, button: Any, stop: Any, status: Any) -> Any:
    """Lets `button` start the run and `stop` end it, also while it waits in the queue; afterwards the address has the settings."""
    event = button.click(
        run.handler(status),
        [*run.tab.fields.values(), *run.states.values()],
        [status, *run.outputs],
        api_name=run.name,
        concurrency_id=run.queue,
        concurrency_limit=1,
        show_progress="minimal",
        show_progress_on=[status],
    )
    if run.tab.fields:
        event.success(None, list(run.tab.fields.values()), None, js=link_script(run.tab))
    stop.click(None, None, None, cancels=[event], api_visibility="private")
    stop.click(lambda: markup.said("stopped", "stopped"), None, status, queue=False, api_visibility="private", show_progress="hidden")
    return event


def status_line() -> Any:
    """Where a run tells how far it is."""
    return gradio.HTML("", elem_classes="hasten-status")


def buttons(name: str, label: str) -> tuple[Any, Any]:
    """A tab's buttons that start and stop."""
    with gradio.Row():
        run = gradio.Button(label, variant="primary", elem_id=f"{name}-run", min_width=120)
        stop = gradio.Button("Stop", elem_id=f"{name}-stop", min_width=80)
    return run, stop


# ------------------------------------------------------------------------------------------------------------------ address


def link_script(tab: Tab) -> str:
    """Puts the settings that differ from their defaults into the page's address."""
    defaults = [field.value for field in tab.fields.values()]
    return f"""(...values) => {{
        const names = {json.dumps(list(tab.fields))}, defaults = {json.dumps(defaults)};
        const before = new URLSearchParams(location.search), now = new URLSearchParams();
        if (before.has("__theme")) now.set("__theme", before.get("__theme"));
        now.set("tab", {json.dumps(tab.name)});
        names.forEach((name, i) => {{
            const value = values[i];
            if (value === null || value === undefined || JSON.stringify(value) === JSON.stringify(defaults[i])) return;
            now.set(name, Array.isArray(value) ? value.join(",") : String(value));
        }});
        history.replaceState(null, "", "?" + now.toString());
        return [];
    }}"""


def read_setting(field: Any, text: str) -> Any:
    """A setting from the address.

    Raises:
        ValueError: The field cannot have it; the message says what it can.
    """
    if isinstance(field, gradio.Checkbox):
        if text not in ("true", "false"):
            raise ValueError("true or false")
        return text == "true"
    if isinstance(field, gradio.Slider | gradio.Number):
        try:
            value = float(text)
        except ValueError:
            raise ValueError("a number") from None
        low, high = field.minimum, field.maximum
        if not (low is None or value >= low) or not (high is None or value <= high):
            raise ValueError(f"a number from {low} to {high}")
        return int(value) if value.is_integer() else value
    if isinstance(field, gradio.CheckboxGroup | gradio.Dropdown | gradio.Radio):
        allowed = [str(value) for _, value in field.choices]
        asked = text.split(",") if isinstance(field, gradio.CheckboxGroup) else [text]
        if not all(value in allowed for value in asked if value):
            raise ValueError(f"one of {', '.join(allowed)}")
        return [value for value in asked if value] if isinstance(field, gradio.CheckboxGroup) else text
    if len(text) > MOST_LETTERS:
        raise ValueError(f"at most {MOST_LETTERS} letters")
    return text


def read_address(tabs: Sequence[Tab], query: Mapping[str, str]) -> tuple[str | None, dict[Any, Any], list[str]]:
    """What an address says.

    Returns:
        The tab, values of its fields, and a line for every setting that is not allowed.
    """
    asked = query.get("tab")
    tab = next((tab for tab in tabs if tab.name == asked), None)
    if asked is None:
        return None, {}, []
    if tab is None:
        names = ", ".join(each.name for each in tabs)
        return None, {}, [f"the link's tab must be one of {names}, not {asked[:40]!r}"]
    values: dict[Any, Any] = {}
    refused = []
    for name, field in tab.fields.items():
        if name not in query:
            continue
        try:
            values[field] = read_setting(field, query[name])
        except ValueError as why:
            refused.append(f"the link's {name} must be {why}, not {query[name][:40]!r}")
    return tab.name, values, refused


# --------------------------------------------------------------------------------------------------------------------- page


def build(models: Models, queue: int) -> Any:
    """The page.

    Args:
        models: Those that it offers.
        queue: Most requests that may wait.
    """
    from hasten.app.demo import compare, plan, steer, steps, text

    with gradio.Blocks(analytics_enabled=False, title="hasten", delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gradio.HTML(f'<div class="hasten-head"><h1>hasten</h1><span>{SUBTITLE}</span></div>')
        notice = gradio.HTML("", visible=False, elem_classes="hasten-notice", elem_id="notice")
        with gradio.Tabs(elem_id="tabs") as bar:
            tabs = []
            for module in (compare, plan, steer, text, steps):
                name = module.NAME
                with gradio.Tab(name.capitalize(), id=name):
                    tabs.append(module.build(models))
        fields = [field for tab in tabs for field in tab.fields.values()]

        def arrive(request: gradio.Request) -> dict[Any, Any]:
            chosen, values, refused = read_address(tabs, dict(request.query_params))
            changed = {field: type(field)(value=value) for field, value in values.items()}
            changed[notice] = gradio.HTML("".join(markup.said(line, "failed") for line in refused), visible=bool(refused))
            if chosen is not None:
                changed[bar] = gradio.Tabs(selected=chosen)
            return changed

        page.load(arrive, None, [bar, notice, *fields], queue=False, api_visibility="private", show_progress="hidden")
    page.queue(max_size=queue, api_open=False, default_concurrency_limit=4)
    return page


def launch(page: Any, host: str, port: int | None, *, share: bool = False) -> str:
    """Serves the page in threads of its own and returns its address; `page.close()` ends it.

    Raises:
        OSError: The port is taken.
    """
    _, local, public = page.launch(
        server_name=host, server_port=port, share=share, quiet=True, theme=theme(), css=CSS, footer_links=["settings"], run_history=False,
        max_file_size="20mb", ssr_mode=False, prevent_thread_lock=True, show_error=True, enable_monitoring=False, pwa=False,
    )  # fmt: skip
    return str(public or local)
