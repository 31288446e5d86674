"""What `--reward` names: the verifiers that come with hasten, and any callable of one's own."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from hasten.app.errors import BadInput

if TYPE_CHECKING:
    from hasten.accelerators.steering.verifiers import Verifier

COLOUR = "colour"
OF_SHAPES = ("shapes", "shapes-proxy")
"""Rewards that know the captions of the shapes world, and no others."""


@dataclass(frozen=True)
class Reward:
    """What is maximised.

    Attributes:
        text: As it was named.
        names: Of its parts, without their weights.
        verifier: The parts as one.
    """

    text: str
    names: tuple[str, ...]
    verifier: Verifier

    @property
    def parts(self) -> tuple[Verifier, ...]:
        """Its verifiers one by one."""
        from hasten.accelerators.steering.mixes import Mix

        return self.verifier.verifiers if isinstance(self.verifier, Mix) else (self.verifier,)

    def check_captions(self, captions: Sequence[str]) -> None:
        """Refuses captions that the reward cannot read.

        Raises:
            BadInput: A caption is not of the shapes world, and the reward judges by it.
        """
        names = [name for name in self.names if name in OF_SHAPES]
        if not names:
            return
        from hasten.pipelines.zoo.shapes import parse

        for number, caption in enumerate(captions, 1):
            try:
                parse(caption)
            except ValueError as why:
                raise BadInput(f"CAPTION {number} cannot be judged by --reward {names[0]}: {why}") from None

    def load(self, device: str) -> None:
        """Loads published weights now, so that what is missing is said before anything is drawn.

        Raises:
            BadInput: They cannot be loaded.
        """
        import torch

        from hasten.accelerators.steering.pretrained import Pretrained, WeightsError

        for verifier in self.parts:
            if isinstance(verifier, Pretrained):
                try:
                    with torch.no_grad():
                        verifier.score(torch.full((1, 3, 64, 64), 0.5, device=device), ["a picture"])
                except WeightsError as why:
                    raise BadInput(f"--reward: {why}") from why


def choose_reward(text: str, *, rank: bool = False) -> Reward:
    """The reward that a text such as "hps:5,clip:0.01" names.

    Args:
        text: Names with commas between them, each with ":WEIGHT" behind it or not.
        rank: Whether several rewards are combined by the mean of their ranks, not by a weighted sum.

    Raises:
        BadInput: There is no such reward, it cannot be had, or a weight is not allowed.
    """
    from hasten.accelerators.steering.mixes import MeanRank, WeightedSum
    from hasten.accelerators.steering.verifiers import VerifierError, as_verifier

    named = [_weighed(part.strip()) for part in text.split(",")]
    names = tuple(name for name, _ in named)
    try:
        parts = tuple(as_verifier(_made(name)) for name in names)
        if rank:
            if len(parts) < 2 or any(weight is not None for _, weight in named):
                raise BadInput(f"--rank takes two rewards or more, without weights, not --reward {text}")
            return Reward(text, names, MeanRank(parts))
        if len(parts) == 1 and named[0][1] is None:
            return Reward(text, names, parts[0])
        return Reward(text, names, WeightedSum(parts, tuple(1.0 if weight is None else weight for _, weight in named)))
    except VerifierError as why:
        raise BadInput(f"--reward {text}: {why}") from None


def reward_names() -> list[str]:
    """All names, for messages."""
    return [*_factories(), f"{COLOUR}:NAME", "package.module:function"]


def with_gradients() -> list[str]:
    """Those whose scores pass gradients to the picture."""
    from hasten.accelerators.steering.pretrained import PRETRAINED

    return ["shapes-proxy", *PRETRAINED, "brightness", "sharpness", f"{COLOUR}:NAME"]


def closest(value: str, allowed: Sequence[str]) -> str:
    """'; did you mean fk?', or nothing where no name is alike."""
    found = get_close_matches(value, allowed, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _weighed(part: str) -> tuple[str, float | None]:
    """A name and its weight, None where none is given."""
    head, _, tail = part.rpartition(":")
    try:
        weight = float(tail) if head else None
    except ValueError:
        weight = None
    if weight is None:
        return part, None
    if not math.isfinite(weight) or weight == 0:
        raise BadInput(f"--reward {part}: a weight must be a finite number other than 0, negative to minimise, not {tail}")
    return head, weight


def _factories() -> dict[str, Callable[[], Any]]:
    """By name, what makes a verifier; nothing is loaded until it is made."""
    from hasten.accelerators.steering.pretrained import PRETRAINED
    from hasten.accelerators.steering.verifiers import Brightness, JPEGSize, Sharpness
    from hasten.pipelines.zoo.shapes.reward import ShapesReward

    weight_free = {"brightness": Brightness, "sharpness": Sharpness, "jpeg-size": JPEGSize}
    return {"shapes": ShapesReward, "shapes-proxy": _proxy, **PRETRAINED, **weight_free}


def _proxy() -> Any:
    from hasten.pipelines.zoo.shapes.proxy import load_proxy

    try:
        return load_proxy()
    except FileNotFoundError as why:
        raise BadInput(f"--reward shapes-proxy: {why}") from None


def _made(name: str) -> Any:
    """A verifier or callable by name."""
    factories = _factories()
    if name in factories:
        return factories[name]()
    module, colon, rest = name.partition(":")
    if module == COLOUR:
        return _colour(rest)
    if not colon:
        near = closest(name, [*factories, COLOUR])
        raise BadInput(f"--reward must be one of {', '.join(reward_names())}, not {name!r}{near}")
    return _imported(name, module, rest)


def _colour(name: str) -> Any:
    from PIL import ImageColor

    from hasten.accelerators.steering.verifiers import ColourTarget

    try:
        red, green, blue = ImageColor.getrgb(name)[:3]
    except ValueError:
        raise BadInput(f"--reward {COLOUR} needs a colour, such as {COLOUR}:red or {COLOUR}:#ff8800, not {name!r}") from None
    return ColourTarget((red / 255, green / 255, blue / 255))


def _imported(name: str, module: str, path: str) -> Any:
    """What `path` is in a module; a class is called without arguments."""
    try:
        with _working_folder_importable():
            found: Any = importlib.import_module(module)
            for attribute in path.split("."):
                found = getattr(found, attribute)
            return found() if isinstance(found, type) else found
    except Exception as why:  # a module of the user's own may fail in any way
        said = " ".join(str(why).split())
        raise BadInput(f"--reward {name} cannot be imported: {type(why).__name__}: {said}") from why


@contextmanager
def _working_folder_importable() -> Iterator[None]:
    """A console script does not look for modules where it is called."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
