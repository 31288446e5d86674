"""The page's address and its errors, and lists that must agree with the library's."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import gradio
import pytest

import hasten.app.demo.page as page
from hasten.app.demo import compare, steer, steps, text
from hasten.app.demo.page import Tab, caption_of, one_line, read_address
from hasten.app.demo.runs import Models
from hasten.app.errors import BadInput
from hasten.app.methods import METHODS


@pytest.fixture(scope="module")
def tab() -> Tab:
    with gradio.Blocks():
        fields = {
            "caption": gradio.Textbox("a"),
            "method": gradio.Dropdown(["fk", "code"], value="fk"),
            "steps": gradio.Slider(1, 50, 20, step=1),
            "seed": gradio.Number(0, minimum=0, maximum=9),
            "versus": gradio.Checkbox(True),
            "beside": gradio.CheckboxGroup(["static", "wino"], value=["static"]),
        }
    return Tab("steer", fields)


def read(tab: Tab, **query: str) -> tuple[dict[str, Any], list[str]]:
    _, values, refused = read_address([tab], {"tab": "steer", **query})
    return {name: values[field] for name, field in tab.fields.items() if field in values}, refused


def test_an_address_gives_settings_of_their_kinds(tab: Tab) -> None:
    found, refused = read(tab, caption="two words", method="code", steps="7", seed="3", versus="false", beside="wino,static", other="x")
    assert found == {"caption": "two words", "method": "code", "steps": 7, "seed": 3, "versus": False, "beside": ["wino", "static"]}
    assert type(found["steps"]) is int and not refused
    assert read(tab, beside="")[0] == {"beside": []}


@pytest.mark.parametrize(
    ("name", "text_"),
    [
        ("method", "halving"), ("steps", "0"), ("steps", "51"), ("steps", "nan"), ("steps", "inf"), ("steps", "many"), ("seed", "-1"),
        ("versus", "1"), ("beside", "static,other"), ("caption", "x" * 2001),
    ],
)  # fmt: skip
def test_a_setting_that_is_not_allowed_is_left_out_and_said(tab: Tab, name: str, text_: str) -> None:
    found, refused = read(tab, **{name: text_})
    assert not found and len(refused) == 1 and f"the link's {name} must be" in refused[0] and len(refused[0]) < 200


def test_an_unknown_tab_is_said_and_no_tab_is_nothing(tab: Tab) -> None:
    assert read_address([tab], {}) == (None, {}, [])
    name, values, (refused,) = read_address([tab], {"tab": "other", "steps": "7"})
    assert name is None and not values and "steer" in refused


def test_an_error_is_one_line_without_the_dashes_of_an_option() -> None:
    assert one_line(BadInput("--interval must be\n  2")) == "interval must be 2"
    assert one_line(RuntimeError("boom")) == "RuntimeError: boom"
    assert len(one_line(RuntimeError("x" * 10_000))) <= 500


def test_captions_are_trimmed_and_limited() -> None:
    assert caption_of("  a \n circle ") == "a circle"
    for bad in ("", "  \n", "x" * 2001):
        with pytest.raises(BadInput):
            caption_of(bad)


# ------------------------------------------------------------------------------------------------- the library's own lists


def test_the_page_offers_what_the_library_has() -> None:
    from hasten.app.steering import SEARCHES, STEERS
    from hasten.app.text import WITHOUT_A_SCHEDULER
    from hasten.pipelines.decoding_schedulers import SCHEDULERS
    from hasten.pipelines.step_lora import WEIGHTS_FILE

    assert set(text.SCHEDULES) == {*SCHEDULERS, *WITHOUT_A_SCHEDULER}
    assert set(steer.STEERING) == set(STEERS) and set(steer.SEARCHING) == set(SEARCHES)
    assert steps.WEIGHTS_FILE == WEIGHTS_FILE


@pytest.mark.parametrize("method", [name for name in METHODS if name != "none"])
@pytest.mark.parametrize("skip", [1, 3])
def test_every_method_takes_its_sliders(method: str, skip: int) -> None:
    from hasten.app.setup import Options, check

    options = compare.method_options(method, 3, 0.2, 0.75, 0.5, skip)
    assert check(Options("shapes", **options)).method is not None
    assert {"interval": 3, "threshold": 0.2}.items() >= {
        name: options[name] for name in ("interval", "threshold") if name in options
    }.items()


def test_a_visitor_cannot_name_a_module_as_reward(models: Models) -> None:
    given: dict[str, Any] = {"caption": "a small red circle", "model": "shapes", "method": "fk", "particles": 2, "steps": 4, "guidance": 0}
    given |= {"seed": 0, "versus": False}
    for reward in ("os:getcwd", "shapes,os:getcwd", "clip"):
        with pytest.raises(BadInput, match="reward must be one of"):
            steer.steered(models, reward=reward, **given)
    for changed in ({"particles": 17}, {"steps": 201}, {"model": "x"}, {"method": "other"}, {"caption": "a cat"}):
        with pytest.raises(BadInput):
            steer.steered(models, **{**given, "reward": "shapes", **changed})


def test_no_file_of_the_page_comes_from_elsewhere() -> None:
    """The rest is for the browser's test; this says it of the sources, for pages that it does not open."""
    for file in Path(page.__file__).parent.glob("*.py"):
        strings = [
            node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        assert not [each for each in strings if re.search(r"https?://(?!127\.0\.0\.1)|@import", each)], file
