"""The puzzles world: every answer that is drawn is right, the checkers agree with brute force, and no prompt is on both sides."""

from __future__ import annotations

import random
import re
from itertools import accumulate, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.pipelines.zoo.puzzles import TASKS, check, draw, held_out, task_of, validation_puzzles, world

every_task = pytest.mark.parametrize("task", TASKS)


def solutions(prompt: str, candidates: list[str]) -> set[str]:
    return {answer for answer in candidates if check(prompt, answer).solved}


# --------------------------------------------------------------------------------------------------------------- drawing


@given(st.sampled_from(TASKS), st.integers(0, 2**32), st.booleans())
def test_what_is_drawn_is_right_and_on_its_side(task: str, seed: int, validation: bool) -> None:
    puzzle = draw(task, random.Random(seed), validation=validation)
    assert puzzle.task == task == task_of(puzzle.prompt)
    verdict = check(puzzle.prompt, puzzle.answer)
    assert verdict.solved and verdict.reason == "" and verdict.task == task
    assert held_out(puzzle.prompt) == validation


@every_task
def test_the_same_seed_draws_the_same_puzzles(task: str) -> None:
    first, second = ([draw(task, random.Random(seed)) for seed in range(20)] for _ in range(2))
    assert first == second and len(set(first)) > 10


def test_every_sudoku_grid_is_found_by_brute_force() -> None:
    def complete(cells: tuple[str, ...]) -> bool:
        rows = [set(row) for row in cells]
        columns = [{row[j] for row in cells} for j in range(4)]
        boxes = [{cells[i + a][j + b] for a in (0, 1) for b in (0, 1)} for i in (0, 2) for j in (0, 2)]
        return all(group == set("1234") for group in rows + columns + boxes)

    rows = ["".join(row) for row in product("1234", repeat=4) if len(set(row)) == 4]
    found = ["/".join(cells) for cells in product(rows, repeat=4) if len({row[0] for row in cells}) == 4 and complete(cells)]
    assert len(found) == 288 and sorted(world.grids()) == sorted(found)
    assert all(check("????/????/????/????", grid).solved for grid in found)


@pytest.mark.parametrize("length", [2, 6, 10, 12])
def test_balanced_lines_are_those_of_brute_force(length: int) -> None:
    by_depth: dict[int, list[str]] = {}
    for steps in product((1, -1), repeat=length):
        levels = list(accumulate(steps))
        if min(levels) >= 0 and levels[-1] == 0:
            by_depth.setdefault(max(levels), []).append("".join("(" if step == 1 else ")" for step in steps))
    assert {depth: sorted(lines) for depth, lines in by_depth.items()} == {
        depth: sorted(world.balanced(length, depth)) for depth in range(1, length // 2 + 1)
    }
    assert world.balanced(length, length // 2 + 1) == ()


def test_most_prompts_have_several_right_answers_and_addition_has_one() -> None:
    brackets = validation_puzzles("brackets", 100)
    several = [
        len(solutions(puzzle.prompt, [*world.balanced(len(puzzle.answer), depth)])) > 1
        for puzzle in brackets
        for depth in [world.depth_of(puzzle.answer) or 0]
    ]
    assert sum(several) > 60
    assert sum(len(solutions(puzzle.prompt, [*world.grids()])) > 1 for puzzle in validation_puzzles("sudoku", 100)) > 50
    assert solutions("7 + 5 = ?", [f"{a}{b}{c}:{n}" for a in (0, 1) for b in (0, 1) for c in (0, 1) for n in range(30)]) == {"001:12"}


# ---------------------------------------------------------------------------------------------------------------- the split


@every_task
def test_no_prompt_is_on_both_sides(task: str) -> None:
    rng = random.Random(3)
    trained = {draw(task, rng).prompt for _ in range(4_000)}
    assert not trained & {puzzle.prompt for puzzle in validation_puzzles(task, 1_000)}


def test_the_side_does_not_depend_on_how_a_prompt_is_spelled() -> None:
    for prompt in ("3? + ? = 91", "depth 2 (????)??", "1??4/?4??/?1??/4??1"):
        assert (
            len({held_out(spelled) for spelled in (prompt, prompt.replace(" ", ""), prompt.upper(), f" {prompt}\n", " ".join(prompt))}) == 1
        )


def test_one_prompt_in_sixteen_is_held_out() -> None:
    share = sum(held_out(f"{a} + {b} = ?") for a in range(100, 300) for b in range(100, 300)) / 40_000
    assert share == pytest.approx(1 / 16, rel=0.05)


@every_task
def test_validation_puzzles_are_distinct_and_the_first_ones_stay(task: str) -> None:
    many = validation_puzzles(task, 2_000)
    assert len({puzzle.prompt for puzzle in many}) == 2_000 and all(held_out(puzzle.prompt) for puzzle in many)
    assert validation_puzzles(task, 50) == many[:50]
    assert validation_puzzles(task, 50, seed=1) != many[:50]


# ------------------------------------------------------------------------------------------------------------ the checkers


def test_addends_agree_with_brute_force() -> None:
    pairs = [(a, b) for a in range(1, 130) for b in range(1, 130)]
    texts = [f"{a}+{b}" for a, b in pairs]
    assert solutions("3? + ? = 91", texts) == {f"{a}+{91 - a}" for a in range(30, 40)}
    assert solutions("?+?=17", texts) == {f"{a}+{17 - a}" for a in range(1, 17)}
    assert solutions("?7 + ?0 = 127", texts) == {f"{a}+{127 - a}" for a in range(17, 118, 10)}
    assert solutions("37 + ? = 50", texts) == {"37+13"}
    # A ? stands for one digit at least, and the digits beside it do not overlap.
    assert solutions("1?1 + ? = 112", texts) == {"101+11", "111+1"}
    assert solutions("1? + ? = 12", texts) == {"10+2", "11+1"}


def test_sudoku_agrees_with_brute_force_over_all_fillings() -> None:
    prompt = "1??4/34??/2143/43?1"
    fillings = ["1{}{}4/34{}{}/2143/43{}1".format(*cells) for cells in product("1234", repeat=5)]
    assert solutions(prompt, fillings) == {grid for grid in world.grids() if grid in fillings} == {"1234/3412/2143/4321"}
    # Four grids share these cells, and all are right.
    assert solutions("12??/34??/21??/43??", [*world.grids()]) == {
        f"12{a}/34{b}/21{c}/43{d}" for a, c in (("34", "43"), ("43", "34")) for b, d in (("12", "21"), ("21", "12"))
    }


def test_brackets_agree_with_brute_force() -> None:
    lines = ["".join(line) for n in (4, 6, 8) for line in product("()", repeat=n)]

    def depth(line: str) -> int:
        """Layers of innermost pairs that can be taken away, or 0 if something is left."""
        layers, opened = 0, line
        while "()" in opened:
            opened = opened.replace("()", "")
        if opened:
            return 0
        for i in range(len(line) + 1):
            layers = max(layers, line[:i].count("(") - line[:i].count(")"))
        return layers

    for wanted in (1, 2, 3, 4):
        assert solutions(f"depth {wanted} ????????", lines) == {line for line in lines if len(line) == 8 and depth(line) == wanted}
    assert solutions("depth 2 (??)??", lines) == {"(())()"}
    assert solutions("depth 2 ?(????", lines) == {"(())()", "(()())"}


@given(st.integers(0, 999), st.integers(0, 999))
def test_carries_are_those_of_adding_digit_by_digit(first: int, second: int) -> None:
    carry, carries, digits = 0, "", ""
    for a, b in zip(f"{first:03}"[::-1], f"{second:03}"[::-1], strict=True):
        carry, digit = divmod(int(a) + int(b) + carry, 10)
        carries, digits = str(carry) + carries, str(digit) + digits
    total = (("1" if carry else "") + digits).lstrip("0") or "0"
    right = f"{carries}:{total}"
    assert check(f"{first} + {second} = ?", right).solved
    for i, character in enumerate(right):
        wrong = right[:i] + ("0" if character != "0" else "1") + right[i + 1 :]
        assert not check(f"{first} + {second} = ?", wrong).solved


@pytest.mark.parametrize(
    ("prompt", "answer", "reason"),
    [
        ("3? + ? = 91", "", "not two numbers"),
        ("3? + ? = 91", "38+53+0", "not two numbers"),
        ("3? + ? = 91", "038+53", "not two numbers"),
        ("3? + ? = 91", "٣٨+53", "not two numbers"),
        ("3? + ? = 91", "48+43", "48 does not fit 3?"),
        ("3? + ? = 91", "3+88", "3 does not fit 3?"),
        ("3? + ? = 91", "38+54", "the sum is 92"),
        ("1??4/34??/2143/43?1", "1234/3412/2143", "not four rows"),
        ("1??4/34??/2143/43?1", "1234/3412/2143/4341", "row 4 holds 4341"),
        ("1??4/34??/2143/43?1", "1234/3412/2143/1321", "a given cell was changed"),
        ("????/????/????/????", "1234/1234/1234/1234", "column 1 holds 1111"),
        ("????/????/????/????", "1234/2341/3412/4123", "box 1 holds 1223"),
        ("depth 2 (????)??", "(())(())", "a given bracket was changed"),
        ("depth 2 (????)??", "(()())", "6 brackets instead of 8"),
        ("depth 2 ????", "())(", "not balanced"),
        ("depth 2 ????", "()()", "the depth is 1"),
        ("depth 2 ????", "(x))", "not a line of brackets"),
        ("483 + 759 = ?", "101:1242", "right is 111:1242"),
        ("483 + 759 = ?", "1242", "right is 111:1242"),
        ("483 + 759 = ?", "111:01242", "right is 111:1242"),
    ],
)
def test_wrong_answers_are_refused_with_the_reason(prompt: str, answer: str, reason: str) -> None:
    verdict = check(prompt, answer)
    assert not verdict.solved and verdict.reason.startswith(reason)


def test_spaces_in_prompt_and_answer_do_not_matter() -> None:
    assert check(" 3 ?+ ?=9 1", "38 + 53\n").solved
    assert check("Depth 2 ( ??) ??", "( () ) ()").solved


@pytest.mark.parametrize(
    "prompt", ["", "hello", "3 + 4 = 7", "? + ? =", "1??4/??2?/?3??", "depth ????", "depth 2", "1483 + 2 = ?", "5?+?=9?"]
)
def test_other_prompts_are_no_puzzles(prompt: str) -> None:
    with pytest.raises(ValueError, match="prompt must look like"):
        check(prompt, "1")


def test_the_examples_that_the_refusal_names_have_an_answer() -> None:
    with pytest.raises(ValueError, match="prompt must look like") as refusal:
        check("hello", "1")
    addends, sudoku, brackets, addition = re.findall(r"'([^']+)'", str(refusal.value))[:4]
    assert solutions(addends, [f"{a}+{b}" for a in range(100) for b in range(100)])
    assert solutions(sudoku, [*world.grids()]) == {"1234/3412/2143/4321", "1324/2413/3142/4231"}
    assert solutions(brackets, [*world.balanced(8, 2)])
    assert check(addition, "111:1242").solved


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="task must be one of addends, sudoku, brackets, addition, not 'chess'"):
        draw("chess", random.Random(0))
    with pytest.raises(ValueError, match="n must be from 1 to 4000, not 0"):
        validation_puzzles("sudoku", 0)
