"""Questions and answers: what is streamed is a prefix of what comes of it, and ends where it should."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.accelerators.decoding.engine import COMMITTED, FINAL, GUESSED, MASKED
from hasten.app.serving.errors import Refused
from hasten.app.serving.metrics import Metrics
from hasten.app.serving.schemas import ChatRequest, CompletionRequest, Message
from hasten.app.serving.texts import Answer, Desk, Question
from hasten.app.serving.worker import Left, Ticket
from hasten.pipelines.text import TextPipeline, TextUpdate

GRID = "1??4/?4??/?1??/4??1"


@pytest.fixture(scope="module")
def desk(puzzles: TextPipeline) -> Desk:
    return Desk("puzzles", puzzles, Metrics(), 32)


def ask(desk: Desk, *questions: Question) -> list[tuple[list[str], Answer]]:
    """What each question is told on the way, and its answer."""
    told: list[list[str]] = [[] for _ in questions]
    tickets = [Ticket[Question, Answer](question, question.key(), told[i].append) for i, question in enumerate(questions)]
    try:
        desk.work(tickets, lambda: not any(ticket.wanted for ticket in tickets))
    except Left:
        assert not any(ticket.wanted for ticket in tickets)
    return [(texts, ticket.future.result(0)) for texts, ticket in zip(told, tickets, strict=True)]


def question(desk: Desk, prompt: str, **options: object) -> Question:
    (found,) = desk.asked(CompletionRequest.model_validate({"model": "puzzles", "prompt": prompt, **options}))
    return found


def test_what_is_told_grows_from_the_left_and_is_what_the_pipeline_says(desk: Desk, puzzles: TextPipeline) -> None:
    prompts = [GRID, "483 + 759 = ?", "depth 3 ????????"]
    alone = [puzzles([prompt], gen_length=32).texts[0] for prompt in prompts]
    counts = [len(tokens) for tokens in puzzles(prompts, gen_length=32).tokens]
    found = ask(desk, *(question(desk, prompt, seed=0) for prompt in prompts))
    assert [answer.text for _, answer in found] == alone and [answer.tokens for _, answer in found] == counts
    for told, answer in found:
        assert all(answer.text.startswith(text) for text in told) and told == sorted(told, key=len)
        assert answer.finish == "stop"
    assert any(0 < len(text) < len(GRID) for text in found[0][0])


@pytest.mark.parametrize("most", [1, 4, 8, 9, 16, 17, 32])
def test_an_answer_has_no_more_tokens_than_were_asked_for(desk: Desk, most: int) -> None:
    ((told, answer),) = ask(desk, question(desk, "483 + 759 = ?", max_tokens=most))
    whole = "111:1242"
    assert answer.text == whole[:most] and answer.tokens == min(most, len(whole) + 1)
    assert answer.finish == ("stop" if most > len(whole) else "length") and all(whole[:most].startswith(text) for text in told)


@pytest.mark.parametrize(
    ("stop", "text"), [("2", "111:1"), (":12", "111"), (["42", "1:1"], "11"), ("zz", "111:1242"), ("1242x", "111:1242")]
)
def test_an_answer_ends_in_front_of_a_stop_text_and_none_of_it_is_told(desk: Desk, stop: str | list[str], text: str) -> None:
    ((told, answer),) = ask(desk, question(desk, "483 + 759 = ?", stop=stop))
    assert answer.text == text and answer.finish == "stop" and all(text.startswith(before) for before in told)


@given(
    st.text("0123456789:/<", min_size=1, max_size=12), st.text("0123456789:/", min_size=1, max_size=3), st.integers(1, 12), st.integers(0)
)
def test_no_order_of_commits_tells_what_is_taken_back(desk: Desk, letters: str, stop: str, most: int, seed: int) -> None:
    tokens = [desk.pipe.eos_id if letter == "<" else desk.pipe.tokenizer(letter).input_ids[0] for letter in letters]
    asked, chance = Question((5,), most, 16, 0.0, 0, (stop,)), random.Random(seed)
    whole = letters[:most].split("<")[0].split(stop)[0]
    told: list[str] = []
    for final in sorted({*(chance.randint(0, len(tokens)) for _ in range(4)), len(tokens)}):
        marks = [FINAL] * final + [chance.choice((MASKED, GUESSED, COMMITTED)) for _ in tokens[final:]]
        shown = tokens[:final] + [chance.choice(range(1, 20)) for _ in tokens[final:]]  # what is not final may be anything still
        answer = desk._so_far(asked, TextUpdate(0, 1, shown, marks, "", "", final == len(tokens)))
        told.append(answer.text)
        assert whole.startswith(answer.text)
        if answer.finish:
            break
    assert told[-1] == whole and told == sorted(told, key=len)
    assert answer.finish == ("stop" if "<" in letters[:most] or stop in letters[:most] else "length")


def test_answers_depend_on_their_seed_and_not_on_their_neighbours(desk: Desk) -> None:
    asked = desk.asked(CompletionRequest(model="puzzles", prompt=["3? + ? = 91", GRID], n=3, temperature=1.0, seed=7))
    assert [found.seed for found in asked] == [7, 8, 9, 10, 11, 12] and len({found.tokens for found in asked}) == 2
    together = [answer.text for _, answer in ask(desk, *asked)]
    assert together[:2] == [answer.text for _, answer in ask(desk, *asked[:2])]
    assert len(set(together[:3])) > 1


def test_work_stops_when_nobody_wants_it_any_more(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    ticket = Ticket[Question, Answer](question(desk, GRID, seed=0), "")
    stream = desk.pipe.stream

    def counted(*args: object, **options: object) -> object:
        for update in stream(*args, **options):  # type: ignore[arg-type]
            steps.append(update.step)
            if update.step == 2:
                ticket.fail(Left())
            yield update

    monkeypatch.setattr(desk.pipe, "stream", counted)
    with pytest.raises(Left):
        desk.work([ticket], lambda: not ticket.wanted)
    assert steps == [1, 2]


def test_a_chat_needs_a_template_or_is_one_message(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    one = ChatRequest(model="puzzles", messages=[Message(role="user", content="3? + ? = 91")])
    assert desk.chatted(one)[0].tokens == question(desk, "3? + ? = 91").tokens
    several = ChatRequest(model="puzzles", messages=[Message(role="system", content="Be brief."), *one.messages])
    with pytest.raises(Refused, match="was not trained on chats"):
        desk.chatted(several)
    monkeypatch.setattr(
        desk.pipe.tokenizer, "chat_template", "{% for m in messages %}{{ m.role[:1] }}{{ m.content }}/{% endfor %}", raising=False
    )
    text = desk.pipe.tokenizer.decode(desk.chatted(several)[0].tokens)
    assert text.replace(" ", "").endswith("/3?+?=91/") or "3?+?=91" in text.replace(" ", "")
    monkeypatch.setattr(desk.pipe.tokenizer, "chat_template", "{{ raise_exception('no system, please') }}")
    with pytest.raises(Refused, match="do not fit the model's chat template: no system, please"):
        desk.chatted(several)


def test_a_prompt_that_does_not_fit_says_what_would(desk: Desk) -> None:
    with pytest.raises(Refused, match="the prompt's 301 tokens and an answer of 32") as refused:
        question(desk, "1" * 300)
    assert refused.value.param == "prompt" and refused.value.code == "context_length_exceeded"
    with pytest.raises(Refused) as refused:
        question(desk, "1", max_tokens=300)
    assert refused.value.param == "max_tokens"
    fits = question(desk, "1" * 239, max_tokens=16)
    assert (len(fits.tokens), fits.length) == (240, 16)
    ((_, answer),) = ask(desk, fits)
    assert answer.tokens <= 16
    with pytest.raises(Refused, match="prompt must not be blank"):
        question(desk, "  ")
