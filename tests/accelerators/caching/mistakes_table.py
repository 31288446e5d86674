"""Which mistake of other projects is tested on which pipeline, by which test, and why a cell is empty.

`python -m tests.accelerators.caching.mistakes_table` writes docs/caching-mistakes.md; a test fails when the page and this table disagree.
A later method adds its row sets to `TABLE`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from tests.families import PIPELINES

PAGE = Path(__file__).parents[3] / "docs" / "caching-mistakes.md"

ONE_CALL = "one call a step: there is no guidance to lay out"
BATCHED = "guidance is one batch"
TWO_CALLS = "guidance is two calls"
OWN = "tested on toy denoisers whose arithmetic is known: the pipeline has no part in it"
NO_CONTROL = "takes no ControlNet"
FORM = "the form of a block's output and what it does to its input belong to the block: tested on toy blocks of every form"
SCHEDULER = "the scheduler decides, not the model: tested on the pipelines that take such a scheduler, and on a toy loop"


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
        what: The mistake, as the situation in which it shows.
        tests: Names of tests, as module::function, for each pipeline they cover; "toys" for tests on toy denoisers.
        why: Why a pipeline has no test: one reason for all, or one for each.
    """

    what: str
    tests: dict[str, str]
    why: str | dict[str, str] = ""

    def reason(self, pipeline: str) -> str:
        return self.why if isinstance(self.why, str) else self.why[pipeline]


def everywhere(test: str) -> dict[str, str]:
    return dict.fromkeys(PIPELINES, test)


def some(test: str, *pipelines: str) -> dict[str, str]:
    return dict.fromkeys(pipelines, test)


TABLE: dict[str, tuple[Mistake, ...]] = {
    "Delta-DiT, Forecast, FORA, FirstBlock, TeaCache, SkipGuidance": (
        Mistake("A second pipeline of the same class", everywhere("test_mistakes::test_a_second_pipeline_of_the_same_class")),
        Mistake("Two wrappers on one transformer", everywhere("test_mistakes::test_two_wrappers_on_one_transformer")),
        Mistake(
            "Two runs on one transformer that overlap in time",
            some("test_mistakes::test_two_overlapping_runs_on_one_transformer", "pixart", "sd3", "flux", "wan", "lumina2"),
            "as flux: the transformer is of the same class",
        ),
        Mistake(
            "A run aborted by an exception, then another resolution, then the same",
            everywhere("test_mistakes::test_a_run_aborted_by_an_exception"),
        ),
        Mistake(
            "A run ended by the interrupt flag, then another resolution, then the same",
            some("test_mistakes::test_a_run_ended_by_the_interrupt_flag", "sd3", "flux", "flux_control", "wan"),
            "the pipeline has no interrupt flag",
        ),
        Mistake("The same call twice gives the same image", everywhere("test_mistakes::test_the_same_call_twice_gives_the_same_image")),
        Mistake(
            "Guidance in one batch",
            some("test_mistakes::test_guidance_layouts", "pixart", "sd3"),
            {"flux": ONE_CALL, "flux_control": ONE_CALL, "wan": TWO_CALLS, "lumina2": TWO_CALLS},
        ),
        Mistake(
            "Guidance in two calls: branches mixed",
            {
                **some("test_mistakes::test_guidance_layouts", "wan", "lumina2"),
                "toys": "test_mistakes::test_guidance_in_two_calls_keeps_the_branches_apart",
            },
            {"pixart": BATCHED, "sd3": BATCHED, "flux": ONE_CALL, "flux_control": ONE_CALL},
        ),
        Mistake(
            "Guidance switched off part-way",
            {
                "sd3": "test_mistakes::test_guidance_in_one_batch_is_switched_off_part_way",
                "lumina2": "test_mistakes::test_guidance_in_two_calls_ends_part_way",
                "toys": "test_mistakes::test_a_batch_that_shrinks_during_the_run",
            },
            {
                "pixart": "its callback cannot change the embeddings",
                "flux": ONE_CALL,
                "flux_control": ONE_CALL,
                "wan": "has no such option; calls that pause or end are tested on toys",
            },
        ),
        Mistake(
            "Guidance with layers left out",
            some("test_mistakes::test_skip_layer_guidance_is_a_branch_with_its_own_blocks", "sd3"),
            "the pipeline has no skip-layer guidance",
        ),
        Mistake(
            "Guidance-distilled models",
            some("test_mistakes::test_guidance_layouts", "flux", "flux_control"),
            "the model is not guidance-distilled",
        ),
        Mistake(
            "Image-to-image with strength below 1",
            {
                "sd3": "test_mistakes::test_image_to_image_with_a_begin_index",
                "toys": "test_mistakes::test_image_to_image_without_a_begin_index",
            },
            SCHEDULER,
        ),
        Mistake(
            "Samplers that call the model twice a step",
            some("test_mistakes::test_both_calls_of_a_second_order_step_share_a_row", "pixart", "sd3"),
            SCHEDULER,
        ),
        Mistake(
            "Samplers with more timesteps than steps (PNDM)",
            some("test_mistakes::test_pndm_has_a_row_for_every_timestep", "pixart"),
            "PNDM is for noise prediction: the pipeline is a flow-matching one",
        ),
        Mistake(
            "A sample's result depends on its batch-mates",
            some("test_mistakes::test_a_batch_mate_changes_nothing", *(name for name in PIPELINES if name != "flux_control")),
            "the pipeline draws the control latents for the batch as a whole, so the inputs themselves depend on it",
        ),
        Mistake(
            "ControlNet residuals between blocks frozen or doubled",
            {
                "flux_control": "test_exact::test_pipelines_are_bit_identical_when_everything_is_computed",
                "flux": "test_exact::test_control_residuals_act_live",
                "toys": "test_exact::test_what_the_model_adds_between_blocks_is_neither_frozen_nor_doubled",
            },
            NO_CONTROL,
        ),
        Mistake("Blocks that return tuples or lists", {"toys": "test_exact::test_two_streams_by_hand"}, FORM),
        Mistake("Blocks that work in place", {"toys": "test_exact::test_delta_dit_by_hand"}, FORM),
        Mistake(
            "LoRA loaded after the plan was made",
            some("test_mistakes::test_lora_loaded_after_the_wrapper_was_made", "sd3"),
            "adapters sit inside blocks, which are called the same way in every pipeline; Delta-DiT's plans say nothing of weights",
        ),
        Mistake(
            "A plan for other steps, another scheduler, another model",
            some("test_mistakes::test_a_plan_for_other_steps_another_scheduler_another_model", "pixart"),
            "the facts are compared before the pipeline has any part in it; every single fact: test_plan::test_hard_facts",
        ),
        Mistake(
            "A plan for another guidance layout",
            some("test_mistakes::test_a_plan_for_another_guidance_layout", "pixart", "lumina2"),
            {"sd3": "as pixart", "flux": ONE_CALL, "flux_control": ONE_CALL, "wan": "as lumina2"},
        ),
        Mistake(
            "Two threads on one wrapper", some("test_mistakes::test_two_threads_on_one_wrapper", "sd3"), "the lock is the wrapper's own"
        ),
        Mistake("NaN in a value that is reused", {"toys": "test_mistakes::test_a_value_that_is_not_finite_is_computed_again"}, OWN),
        Mistake(
            "Offload through accelerate's hooks",
            some("test_mistakes::test_offload_through_accelerates_hooks", "flux", "sd3", "wan"),
            "the hooks sit on modules, inside the intercepted call, whatever the pipeline",
        ),
        Mistake(
            "Blocks under torch.compile: graph breaks, recompilation",
            {
                "flux": "../test_dispatch::test_compiled_blocks_have_no_break_and_are_compiled_once",
                "toys": "../test_dispatch::test_blocks_compiled_by_inductor",
            },
            "the call is intercepted outside compiled code, whatever the model",
        ),
        Mistake(
            "Copies of the scheduler advance the step",
            {"toys": "test_mistakes::test_copies_of_the_scheduler_do_not_advance_the_step"},
            "the pipeline makes no copies",
        ),
        Mistake(
            "The prompt is changed during the run",
            some("test_mistakes::test_a_prompt_that_is_changed_during_the_run", "sd3", "flux", "wan", "lumina2"),
            {"pixart": "its callback cannot change the embeddings", "flux_control": "as flux: the transformer is of the same class"},
        ),
    ),
}


def exists(test: str, pipeline: str) -> bool:
    """Whether there is such a test, and it covers the pipeline where it is told by `name` which to take."""
    module, function = test.split("::")
    path = f"tests.accelerators.{module[3:]}" if module.startswith("../") else f"tests.accelerators.caching.{module}"
    found = getattr(importlib.import_module(path), function, None)
    if found is None:
        return False
    for mark in getattr(found, "pytestmark", []):
        if mark.name == "parametrize" and mark.args[0] == "name" and pipeline in PIPELINES:
            return pipeline in mark.args[1] or pipeline.replace("_control", "") in mark.args[1]
    return True


def page() -> str:
    """The page, as Markdown."""
    lines = [
        "# Mistakes other projects made, and where they are tested here",
        "",
        "Each of these was reproduced in a released caching project. `x` is a test on that (tiny, random) pipeline; a number says why",
        "there is none. Tests that take a method run with every one of the heading; what a calibrated method makes is a plan of one of the",
        "same kinds. A UNet's deep branch has tests of its own (`test_deep`). This page is written by",
        "`python -m tests.accelerators.caching.mistakes_table`.",
    ]
    columns = [*PIPELINES, "toys"]
    for method, mistakes in TABLE.items():
        notes: list[str] = []
        lines += ["", f"## {method}", "", "| mistake | " + " | ".join(columns) + " | test |", "|---" * (len(columns) + 2) + "|"]
        for mistake in mistakes:
            cells = []
            for column in columns:
                if column in mistake.tests:
                    cells.append("x")
                elif column == "toys":
                    cells.append("")
                else:
                    reason = mistake.reason(column)
                    if reason not in notes:
                        notes.append(reason)
                    cells.append(str(notes.index(reason) + 1))
            tests = ", ".join(f"`{test.removeprefix('../').partition('::')[2]}`" for test in dict.fromkeys(mistake.tests.values()))
            lines.append(f"| {mistake.what} | " + " | ".join(cells) + f" | {tests} |")
        lines += ["", "Not applicable, or not needed, because:", "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
