"""The `puzzles` world: four tasks in one line of text each, most with many right answers, and exact checkers.

    addends    3? + ? = 91               38+53                  two numbers with that sum; a ? stands for one or more digits
    sudoku     1??4/?4??/?1??/4??1       the whole grid         rows, columns and 2x2 boxes hold 1 to 4
    brackets   depth 2 (????)??          ((()))...              balanced, nested to exactly that depth; each ? is one bracket
    addition   483 + 759 = ?             110:1242               carries out of hundreds, tens and ones, then the sum

Spaces mean nothing. A prompt belongs to training or to validation by its hash alone (`held_out`), so no prompt is ever on both sides.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import permutations

TASKS = ("addends", "sudoku", "brackets", "addition")

LENGTHS = (8, 12, 16)
"""Brackets in a line."""

GIVENS = range(4, 9)
"""Cells of a sudoku that are told; four can be enough for a single solution, and mostly are not."""

HELD_OUT_SHARE = 16
"""One prompt in so many is kept from training."""


@dataclass(frozen=True)
class Puzzle:
    """A prompt and one of its right answers.

    Attributes:
        task: One of `TASKS`.
        prompt: As a user would type it.
        answer: Without spaces.
    """

    task: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Verdict:
    """What a checker found.

    Attributes:
        task: Which the prompt belongs to.
        solved: Whether the answer is right.
        reason: Why it is not, in a few words; empty if it is.
    """

    task: str
    solved: bool
    reason: str = ""


def bare(text: str) -> str:
    """The text in small letters without any white space, which is how the tokenizer reads it."""
    return "".join(text.split()).lower()


def held_out(prompt: str) -> bool:
    """Whether the prompt is kept from training: by a hash of the prompt without its spaces, so that spelling changes nothing."""
    digest = hashlib.blake2b(bare(prompt).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


# --------------------------------------------------------------------------------------------------------------- drawing


def _pattern(number: str, kind: str) -> str:
    return {"free": "?", "head": f"{number[0]}?", "tail": f"?{number[-1]}", "known": number}[kind]


def _draw_addends(rng: random.Random) -> Puzzle:
    # Both numbers are as long as the sum, or have two digits where the sum is just above a hundred.
    low, high, sums = (10, 99, range(20, 199)) if rng.random() < 0.3 else (100, 899, range(200, 1000))
    total = rng.choice(sums)
    first = rng.randint(max(low, total - high), min(high, total - low))
    numbers = [str(first), str(total - first)]
    kinds = rng.choices(("free", "head", "tail", "known"), (5, 2, 2, 1), k=2)
    if kinds == ["known", "known"]:
        kinds[rng.randrange(2)] = "free"
    left, right = (_pattern(number, kind) for number, kind in zip(numbers, kinds, strict=True))
    return Puzzle("addends", f"{left} + {right} = {total}", "+".join(numbers))


@cache
def grids() -> tuple[str, ...]:
    """The 288 complete grids, rows joined by slashes, in lexical order."""
    rows = ["".join(row) for row in permutations("1234")]

    def grow(grid: list[str]) -> list[list[str]]:
        if len(grid) == 4:
            return [grid]
        fitting = (row for row in rows if _fits([*grid, row]))
        return [whole for row in fitting for whole in grow([*grid, row])]

    return tuple("/".join(grid) for grid in grow([]))


def _fits(grid: list[str]) -> bool:
    """Whether complete rows from the top repeat nothing in a column or a 2x2 box."""
    columns = ("".join(column) for column in zip(*grid, strict=True))
    boxes = (a[j : j + 2] + b[j : j + 2] for a, b in zip(grid[::2], grid[1::2], strict=False) for j in (0, 2))
    return all(len(set(group)) == len(group) for group in (*columns, *boxes))


def _draw_sudoku(rng: random.Random) -> Puzzle:
    answer = rng.choice(grids())
    cells = [i for i, cell in enumerate(answer) if cell != "/"]
    told = set(rng.sample(cells, rng.choice(GIVENS)))
    return Puzzle("sudoku", "".join(cell if i in told or cell == "/" else "?" for i, cell in enumerate(answer)), answer)


def depth_of(brackets: str) -> int | None:
    """How deep a balanced line is nested; None if it is not balanced."""
    level = deepest = 0
    for bracket in brackets:
        level += 1 if bracket == "(" else -1
        deepest = max(deepest, level)
        if level < 0:
            return None
    return deepest if level == 0 else None


@cache
def balanced(length: int, depth: int) -> tuple[str, ...]:
    """Every balanced line of that many brackets that is nested to exactly that depth, in lexical order."""

    def grow(line: str, level: int) -> list[str]:
        if len(line) == length:
            return [line] if depth_of(line) == depth else []
        longer = grow(line + "(", level + 1) if level < min(depth, length - len(line)) else []
        return longer + (grow(line + ")", level - 1) if level else [])

    return tuple(grow("", 0))


def _draw_brackets(rng: random.Random) -> Puzzle:
    length = rng.choice(LENGTHS)
    # The shallowest and the deepest have one right answer each, so they come half as often as the others.
    depth = rng.choice([*range(1, length // 2 + 1), *range(2, length // 2)])
    answer = rng.choice(balanced(length, depth))
    told = set(rng.sample(range(length), rng.randint(0, length // 3)))
    return Puzzle("brackets", f"depth {depth} " + "".join(c if i in told else "?" for i, c in enumerate(answer)), answer)


def add(first: int, second: int) -> str:
    """The written-out addition of two numbers below a thousand: `carries:sum`, the carries out of hundreds, tens and ones."""
    carries = "".join(str(int(first % place + second % place >= place)) for place in (1000, 100, 10))
    return f"{carries}:{first + second}"


def _draw_addition(rng: random.Random) -> Puzzle:
    first, second = rng.randint(100, 999), rng.randint(100, 999)
    return Puzzle("addition", f"{first} + {second} = ?", add(first, second))


_DRAW: dict[str, Callable[[random.Random], Puzzle]] = {
    "addends": _draw_addends,
    "sudoku": _draw_sudoku,
    "brackets": _draw_brackets,
    "addition": _draw_addition,
}


def draw(task: str, rng: random.Random, *, validation: bool = False) -> Puzzle:
    """Draws a puzzle of the training side, or of the validation side.

    Raises:
        ValueError: `task` is none of `TASKS`.
    """
    if task not in _DRAW:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
    while True:
        puzzle = _DRAW[task](rng)
        if held_out(puzzle.prompt) == validation:
            return puzzle


def validation_puzzles(task: str, n: int, seed: int = 0) -> list[Puzzle]:
    """`n` puzzles that training never sees, no prompt twice; the first ones do not depend on `n`.

    Raises:
        ValueError: `task` is none of `TASKS`, or `n` is below 1 or above 4,000 (the task with the fewest prompts has few more).
    """
    if not 1 <= n <= 4_000:
        raise ValueError(f"n must be from 1 to 4000, not {n}")
    rng = random.Random(f"{task} {seed}")
    found: dict[str, Puzzle] = {}
    while len(found) < n:
        puzzle = draw(task, rng, validation=True)
        found.setdefault(puzzle.prompt, puzzle)
    return list(found.values())


# -------------------------------------------------------------------------------------------------------------- checking

_NUMBER = r"([0-9]+|[0-9]*\?[0-9]*)"
_FORMS = {
    "addends": re.compile(rf"(?=.*\?){_NUMBER}\+{_NUMBER}=([0-9]+)"),
    "sudoku": re.compile(r"([1-4?]{4}(?:/[1-4?]{4}){3})"),
    "brackets": re.compile(r"depth([1-9])([()?]+)"),
    "addition": re.compile(r"([0-9]{1,3})\+([0-9]{1,3})=\?"),
}


def _parsed(prompt: str) -> tuple[str, tuple[str, ...]]:
    for task, form in _FORMS.items():
        match = form.fullmatch(bare(prompt))
        if match:
            return task, match.groups()
    raise ValueError(f"prompt must look like '3? + ? = 91', '1??4/?4??/?1??/4??1', 'depth 2 (????)??' or '483 + 759 = ?', not {prompt!r}")


def task_of(prompt: str) -> str:
    """The task that a prompt belongs to.

    Raises:
        ValueError: It has the form of none.
    """
    return _parsed(prompt)[0]


def check(prompt: str, answer: str) -> Verdict:
    """Whether an answer is right, whichever of the right ones it is.

    Args:
        prompt: Of any task; spaces do not matter.
        answer: What was generated, without special tokens; spaces do not matter.

    Raises:
        ValueError: The prompt has the form of no task.
    """
    task, parts = _parsed(prompt)
    reason = _CHECK[task](bare(answer), *parts)
    return Verdict(task, not reason, reason)


def _check_addends(answer: str, left: str, right: str, total: str) -> str:
    match = re.fullmatch(r"([1-9][0-9]*)\+([1-9][0-9]*)", answer)
    if not match:
        return "not two numbers with a plus between them"
    for number, pattern in zip(match.groups(), (left, right), strict=True):
        head, hole, tail = pattern.partition("?")
        fits = len(number) > len(head + tail) and number.startswith(head) and number.endswith(tail) if hole else number == pattern
        if not fits:
            return f"{number} does not fit {pattern}"
    found = int(match[1]) + int(match[2])
    return "" if found == int(total) else f"the sum is {found}"


def _check_sudoku(answer: str, prompt: str) -> str:
    if not re.fullmatch(r"[1-4]{4}(/[1-4]{4}){3}", answer):
        return "not four rows of four digits from 1 to 4"
    if any(told not in ("?", cell) for told, cell in zip(prompt, answer, strict=True)):
        return "a given cell was changed"
    rows = answer.split("/")
    groups = {
        "row": rows,
        "column": ["".join(row[j] for row in rows) for j in range(4)],
        "box": [rows[i][j : j + 2] + rows[i + 1][j : j + 2] for i in (0, 2) for j in (0, 2)],
    }
    for name, members in groups.items():
        for i, member in enumerate(members, 1):
            if len(set(member)) < 4:
                return f"{name} {i} holds {member}"
    return ""


def _check_brackets(answer: str, depth: str, pattern: str) -> str:
    if not re.fullmatch(r"[()]+", answer):
        return "not a line of brackets"
    if len(answer) != len(pattern):
        return f"{len(answer)} brackets instead of {len(pattern)}"
    if any(told not in ("?", bracket) for told, bracket in zip(pattern, answer, strict=True)):
        return "a given bracket was changed"
    found = depth_of(answer)
    if found is None:
        return "not balanced"
    return "" if found == int(depth) else f"the depth is {found}"


def _check_addition(answer: str, first: str, second: str) -> str:
    right = add(int(first), int(second))
    return "" if answer == right else f"right is {right}"


_CHECK: dict[str, Callable[..., str]] = {
    "addends": _check_addends,
    "sudoku": _check_sudoku,
    "brackets": _check_brackets,
    "addition": _check_addition,
}
