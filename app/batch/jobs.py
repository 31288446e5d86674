"""A job: one picture, and everything it depends on. Rows of a file become jobs here, or a one-line error."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.app.errors import BadInput
from hasten.app.methods import choose_method
from hasten.app.options import parse_size
from hasten.app.rewards import Reward, closest
from hasten.app.steering import Steering, choose

if TYPE_CHECKING:
    from hasten.app.steering import Chosen

PROMPT_LIMIT, ID_LIMIT, SIDE_LIMIT, STEP_LIMIT, COUNT_LIMIT = 10_000, 128, 16_384, 10_000, 100_000
"""Characters of a prompt and of an id, pixels of a side, denoising steps, and any other count."""
SEED_LIMIT = 2**62

CACHING = ("method", "interval", "threshold", "skip_guidance", "cached", "boundary", "preset", "plan")
STEERING = ("steer", "search", "reward", "rank", "particles", "rounds", "set", "kernel", "budget", "micro_batch", "select")
KEYS = (
    "id", "prompt", "negative_prompt", "seed", "size", "width", "height", "steps", "guidance", *CACHING, *STEERING, "arguments",
)  # fmt: skip
"""What a row may say; beside these, arguments of the pipeline's call."""
TEXTS = (
    "id", "prompt", "negative_prompt", "size", "method", "cached", "boundary", "preset", "plan", "steer", "search", "reward", "kernel",
    "select",
)  # fmt: skip
"""Those whose values are words, also where they look like numbers."""

OURS = {
    "prompt": "prompt",
    "generator": "seed",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "width": "width",
    "height": "height",
    "negative_prompt": "negative_prompt",
}
"""Arguments of a pipeline's call that keys of a row stand for."""
NOT_A_JOBS = (
    "latents", "image", "mask_image", "num_images_per_prompt", "output_type", "return_dict", "prompt_embeds", "negative_prompt_embeds",
    "prompt_attention_mask", "negative_prompt_attention_mask", "pooled_prompt_embeds", "negative_pooled_prompt_embeds", "callback",
    "callback_on_step_end", "callback_on_step_end_tensor_inputs", "callback_steps",
)  # fmt: skip
"""Arguments of a pipeline's call that no row can give: tensors, functions, and what says how the result is handed back."""
OF_THE_RUN = ("model", "dtype", "device")
"""What all jobs of a run share."""

_ID = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{ID_LIMIT - 1}}}")
_DEVICE_NAMES = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)


@dataclass
class Rules:
    """What rows are held against beside what is always so, and what has been found right already.

    Attributes:
        shipped: Whether the model came with hasten: rewards have a default then.
        arguments: Names of further arguments that the pipeline's call takes; None where that is not known yet, and the painter checks.
    """

    shipped: bool = False
    arguments: Collection[str] | None = None
    _methods: set[str] = field(default_factory=set, init=False, repr=False)
    _rewards: dict[str, Reward] = field(default_factory=dict, init=False, repr=False)

    def check_method(self, caching: Mapping[str, Any]) -> None:
        """Refuses options of caching that do not go together; each combination is looked at once.

        Raises:
            BadInput: They do not, or the plan file is none.
        """
        text = _canonical(caching)
        if text not in self._methods:
            method_of(caching, default="auto")
            self._methods.add(text)

    def check_steering(self, options: Mapping[str, Any], prompt: str) -> None:
        """Refuses options of steering that do not go together, or a prompt that the reward cannot judge.

        Raises:
            BadInput: So it is.
        """
        text = _canonical(options)
        if text not in self._rewards:
            self._rewards[text] = choose(steering_of(options), shipped=self.shipped, captions=()).reward
        try:
            self._rewards[text].check_captions([prompt])
        except BadInput as why:
            raise BadInput(str(why).replace("CAPTION 1", "prompt")) from None


@dataclass(frozen=True)
class Job:
    """One picture.

    Attributes:
        id: Name of its file without the ending: letters, digits, dots, dashes and underscores, at most 128.
        prompt: At most 10,000 characters.
        seed: Of its own noise, drawn on the CPU: 0 to 2^62.
        width, height: In pixels; None for the model's own.
        steps: Denoising steps; None for the model's, or the plan's.
        guidance: Guidance scale; None for the model's.
        negative_prompt: What it should not show; None to leave it to the pipeline.
        caching: Options of `hasten generate` under Caching, by name; empty for the default.
        steering: Those under Steering and search; empty where the picture is not steered.
        arguments: Further arguments of the pipeline's call, plain data.
    """

    id: str
    prompt: str
    seed: int = 0
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    caching: Mapping[str, Any] = field(default_factory=dict)
    steering: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_row(
        cls,
        row: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        where: str = "job",
        *,
        number: int = 0,
        rules: Rules | None = None,
    ) -> Job:
        """A job from a row of a file, a request or the like.

        Args:
            row: Values by key (see `KEYS`), and by the names of further arguments of the pipeline's call; None says nothing.
            defaults: What holds where the row says nothing. A row with a method or a plan leaves aside the defaults' caching, and one with
                a steering or a search their steering.
            where: What errors begin with, such as "line 3".
            number: The row's place in its list, from 0. Without a seed of its own, its seed is the default's plus this; without an id,
                it is named after its number and contents.
            rules: What else it is held against. One object for many rows does the same check only once.

        Raises:
            BadInput: In one line: where, key, value, and what is allowed.
        """
        rules = rules if rules is not None else Rules()
        try:
            return cls._from(_merged(row, defaults or {}, rules), number, rules, own_seed=row.get("seed") is not None)
        except BadInput as why:
            raise BadInput(f"{where}: {why}") from None
        except ValueError as why:  # a PlanError: its message names the file
            raise BadInput(f"{where}: {_as_keys(str(why))}") from None

    @classmethod
    def _from(cls, given: dict[str, Any], number: int, rules: Rules, *, own_seed: bool) -> Job:
        if "prompt" not in given:
            raise BadInput("prompt is missing: say what to draw")
        prompt = _text("prompt", given["prompt"], PROMPT_LIMIT)
        negative = given.get("negative_prompt")
        seed = _whole("seed", given.get("seed", 0), 0, SEED_LIMIT - 1)
        if not own_seed:
            seed = (seed + number) % SEED_LIMIT
        width, height = _size(given)
        guidance = given.get("guidance")
        steering = {key: _STEERING[key](key, given[key]) for key in STEERING if key in given}
        caching = {key: _CACHING[key](key, given[key]) for key in CACHING if key in given}
        job = cls(
            id="",
            prompt=prompt,
            seed=seed,
            width=width,
            height=height,
            steps=_whole("steps", given["steps"], 1, STEP_LIMIT) if "steps" in given else None,
            guidance=_number("guidance", guidance, 0, 1e6) if guidance is not None else None,
            negative_prompt=_text("negative_prompt", negative, PROMPT_LIMIT, empty=True) if negative is not None else None,
            caching=caching,
            steering=steering,
            arguments=given["arguments"],
        )
        job._check_together(rules)
        name = _id(given["id"]) if "id" in given else f"{number + 1:06d}-{job.digest()[:8]}"
        return replace(job, id=name)

    def _check_together(self, rules: Rules) -> None:
        try:
            rules.check_method(self.caching)
            if steering_of(self.steering).asked():
                rules.check_steering(self.steering, self.prompt)
        except ValueError as why:
            raise BadInput(_as_keys(str(why))) from None

    @property
    def steered(self) -> bool:
        """Whether it is steered or searched for. Such a job is drawn in a call of its own, whatever its key."""
        return "steer" in self.steering or "search" in self.steering

    def _values(self) -> dict[str, Any]:
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def key(self) -> str:
        """Everything that must be equal for jobs to be drawn in one call, as JSON with sorted keys."""
        own = ("id", "prompt", "seed", "negative_prompt")
        shared = {name: value for name, value in self._values().items() if name not in own}
        return _canonical({**shared, "negative_prompt": self.negative_prompt is not None})

    def digest(self) -> str:
        """SHA-256 of everything that the picture depends on, which its id is not."""
        return hashlib.sha256(_canonical({**self._values(), "id": None}).encode()).hexdigest()

    def to_row(self) -> dict[str, Any]:
        """Plain data from which `from_row` makes the same job; what was not given is left out."""
        values = {name: value for name, value in self._values().items() if name not in ("caching", "steering", "arguments")}
        row = {name: value for name, value in values.items() if value is not None}
        return {**row, **self.caching, **self.steering, **({"arguments": dict(self.arguments)} if self.arguments else {})}


def method_of(caching: Mapping[str, Any], *, default: str) -> Any:
    """The method, the plan or None that options of caching mean; see `hasten.app.methods.choose_method`.

    Raises:
        BadInput: They do not go together.
        PlanError: The plan file is none.
    """
    options = dict(caching)
    plan = options.pop("plan", None)
    return choose_method(options.pop("method", None), **options, plan=None if plan is None else Path(plan), default=default)


def steering_of(options: Mapping[str, Any]) -> Steering:
    """What options of steering mean, before they are checked."""
    values = dict(options)
    if "set" in values:
        values["settings"] = values.pop("set")
    return Steering(**values)


def chosen_of(job: Job, *, shipped: bool) -> Chosen:
    """The method, reward and budget of a steered job.

    Raises:
        BadInput: They do not go together.
    """
    return choose(steering_of(job.steering), shipped=shipped, captions=[job.prompt])


# ------------------------------------------------------------------------------------------------------------- the row's keys


def _merged(row: Mapping[str, Any], defaults: Mapping[str, Any], rules: Rules) -> dict[str, Any]:
    """What the row says over what the defaults say; `arguments` is always there."""
    own, usual = _sorted_out(row, rules), _sorted_out(defaults, rules)
    for group, deciding in ((CACHING, ("method", "plan", "preset")), (STEERING, ("steer", "search")), (("size", "width", "height"),) * 2):
        if any(key in own for key in deciding):
            usual = {key: value for key, value in usual.items() if key not in group}
    return {**usual, **own, "arguments": {**usual["arguments"], **own["arguments"]}}


def _sorted_out(row: Mapping[str, Any], rules: Rules) -> dict[str, Any]:
    """The row without what says nothing, and with arguments of the pipeline's call under `arguments`.

    Raises:
        BadInput: There is no such key.
    """
    found: dict[str, Any] = {}
    arguments = row.get("arguments")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise BadInput(f'arguments must be names with values, such as {{"eta": 0.5}}, not {_shown(arguments)}')
    extra: dict[str, Any] = dict(arguments or {})
    for key, value in row.items():
        if value is None or key == "arguments":
            continue
        if key in KEYS:
            found[key] = value
        elif key in OURS or key in NOT_A_JOBS or (rules.arguments is not None and key in rules.arguments):
            extra[key] = value
        elif key in OF_THE_RUN:
            raise BadInput(f"{key} is the same for all jobs of a run; --{key} says it")
        else:
            allowed = [*KEYS, *sorted(rules.arguments or ())]
            raise BadInput(f"unknown key {_shown(key)}{closest(str(key), allowed)}; allowed are {', '.join(allowed)}")
    found["arguments"] = {name: _argument(name, value, rules) for name, value in extra.items()}
    return found


def _argument(name: Any, value: Any, rules: Rules) -> Any:
    """The value of a further argument of the pipeline's call."""
    if not isinstance(name, str):
        raise BadInput(f"arguments must have words for names, not {_shown(name)}")
    if name in OURS:
        raise BadInput(f"{name} is given by the key {OURS[name]}")
    if name in NOT_A_JOBS:
        raise BadInput(f"{name} cannot be given by a job: it is no plain value of one picture")
    if rules.arguments is not None and name not in rules.arguments:
        allowed = sorted(set(rules.arguments) - set(OURS) - set(NOT_A_JOBS))
        raise BadInput(f"the pipeline's call takes no {_shown(name)}{closest(name, allowed)}; it takes {', '.join(allowed)}")
    try:
        text = _canonical(value)
        text.encode()
    except (TypeError, ValueError, RecursionError):
        raise BadInput(f"{name} must be plain data (numbers, words, true, false, lists of them), not {_shown(value)}") from None
    if len(text) > PROMPT_LIMIT:
        raise BadInput(f"{name} must have at most {PROMPT_LIMIT} characters, not {len(text)}")
    return value


def _shown(value: Any) -> str:
    """A value for a message: one line, not too long, and printable on any terminal."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _as_keys(message: str) -> str:
    """An error about options, in words of keys: '--skip-guidance must' becomes 'skip_guidance must'."""
    return re.sub(r"--([a-z][a-z-]*)", lambda found: found[1].replace("-", "_"), " ".join(message.split()))


def _text(key: str, value: Any, limit: int = 1_000, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{key} must be a text, not {_shown(value)}")
    if len(value) > limit:
        raise BadInput(f"{key} must have at most {limit:,} characters, not {len(value):,}")
    if not empty and not value.strip():
        raise BadInput(f"{key} must not be empty")
    if "\0" in value or any(0xD800 <= ord(letter) < 0xE000 for letter in value):
        raise BadInput(f"{key} must be text without zero characters and half surrogates, not {_shown(value)}")
    return value


def _whole(key: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BadInput(f"{key} must be a whole number from {least} to {most}, not {_shown_number(value)}")
    return value


def _shown_number(value: Any) -> str:
    """Python refuses to write very long numbers."""
    return "a longer one" if isinstance(value, int) and abs(value) > 10**40 else _shown(value)


def _number(key: str, value: Any, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:  # NaN is not either
        raise BadInput(f"{key} must be a number from {least:g} to {most:g}, not {_shown_number(value)}")
    return float(value)


def _id(value: Any) -> str:
    if not isinstance(value, str) or _ID.fullmatch(value) is None or ".." in value or value.endswith("."):
        raise BadInput(
            f"id must be at most {ID_LIMIT} letters, digits, dots, dashes and underscores, begin with a letter or digit, and have no '..', "
            f"not {_shown(value)}"
        )
    if _DEVICE_NAMES.fullmatch(value) is not None:
        raise BadInput(f"id must not be {value!r}, which names a device on some systems")
    return value


def _size(given: Mapping[str, Any]) -> tuple[int | None, int | None]:
    if "size" in given:
        if "width" in given or "height" in given:
            raise BadInput("size says what width and height say; give one or the other")
        try:
            width, height = parse_size(_text("size", given["size"])) or (None, None)
        except BadInput as why:
            raise BadInput(_as_keys(str(why))) from None
    elif "width" in given or "height" in given:
        if "width" not in given or "height" not in given:
            there, missing = ("width", "height") if "width" in given else ("height", "width")
            raise BadInput(f"{missing} is missing: {there} is given")
        width, height = given["width"], given["height"]
    else:
        return None, None
    return _whole("width", width, 1, SIDE_LIMIT), _whole("height", height, 1, SIDE_LIMIT)


def _word(key: str, value: Any) -> str:
    return _text(key, value)


def _count(key: str, value: Any) -> int:
    return _whole(key, value, 1, COUNT_LIMIT)


def _amount(key: str, value: Any) -> str:
    """A fraction or a count: a number, or a text that says one."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(_number(key, value, 0, COUNT_LIMIT)):
        return str(value)
    return _text(key, value)


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadInput(f"{key} must be true or false, not {_shown(value)}")
    return value


def _settings(key: str, value: Any) -> list[str]:
    """NAME=VALUE texts, from such texts or from names with values."""
    if isinstance(value, Mapping):
        return [f"{_text(key, name)}={_plain(key, setting)}" for name, setting in value.items()]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        raise BadInput(f'{key} must be names with values, such as {{"name": 1}}, or texts such as "name=1", not {_shown(value)}')
    return [_text(key, text) for text in texts]


def _plain(key: str, value: Any) -> str:
    try:
        return _canonical(value)
    except (TypeError, ValueError, RecursionError):
        raise BadInput(f"{key} must have plain values, not {_shown(value)}") from None


def _select(key: str, value: Any) -> str:
    if value == "all":
        raise BadInput("select must be best or sample: a job makes one picture, not all")
    return _text(key, value)


_CACHING: dict[str, Callable[[str, Any], Any]] = {
    "method": _word,
    "interval": _count,
    "threshold": lambda key, value: _number(key, value, 0, 1e6),
    "skip_guidance": _count,
    "cached": _amount,
    "boundary": _amount,
    "preset": _word,
    "plan": _word,
}
_STEERING: dict[str, Callable[[str, Any], Any]] = {
    "steer": _word,
    "search": _word,
    "reward": _word,
    "rank": _flag,
    "particles": _count,
    "rounds": _count,
    "set": _settings,
    "kernel": _word,
    "budget": _settings,
    "micro_batch": _count,
    "select": _select,
}
