"""A conversation's text, cut into prompts and answers, in time that grows with its length and not with its square.

The text is what the chat template writes, and a prompt is what it writes before the answer is generated. Rendering the
conversation up to each answer says both, but renders the first turn once for every turn. Of longer conversations each turn
is therefore rendered alone, after a short turn that stands for all before it; the whole conversation, and the prompt of its
last answer, are rendered once and must agree, else everything is rendered in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qwen_vl_sft.data.chat_template import ChatTemplate
from qwen_vl_sft.data.conversation import Message, prompt_of
from qwen_vl_sft.errors import UserError

# Up to so many answers, rendering everything in full is as fast.
_FEW_ANSWERS = 3
_EARLIER_TURN: list[Message] = [
    {"role": role, "content": [{"type": "text", "text": role}]} for role in ("system", "user", "assistant")
]
# A prompt and its answer. The prompt begins with what the template writes after the end-of-turn before it, and such text
# may also follow the answer.
Turn = tuple[str, str]


def turn_texts(template: ChatTemplate, messages: list[Message], tools: Sequence[dict[str, Any]] = ()) -> Iterator[Turn]:
    """Yield the text of a conversation in turns, the last of which is what follows the last answer, with an empty answer.

    Raises `UserError` for a template that has no fixed text for earlier turns, at the first turn that shows it.
    """
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    found = _rendered_alone(template, messages, answers, tools) if len(answers) > _FEW_ANSWERS else None
    return iter(found) if found else _rendered_in_full(template, messages, answers, tools)


def _rendered_in_full(
    template: ChatTemplate, messages: list[Message], answers: list[int], tools: Sequence[dict[str, Any]]
) -> Iterator[Turn]:
    prompts = template.render_each([prompt_of(messages, number) for number in answers], True, tools)
    parts = [*(messages[: number + 1] for number in answers), messages]
    *through_answers, whole = template.render_each(parts, tools=tools)
    done = ""
    for prompt, through_answer in zip(prompts, through_answers, strict=True):
        if not (prompt.startswith(done) and through_answer.startswith(prompt)):
            raise UserError(
                "the processor's chat template writes an answer otherwise once a later turn follows, so its tokens"
                " cannot be told apart: templates of Thinking models leave out the thoughts of earlier turns. Train"
                " on rows with one answer each, or an Instruct model; a template of your own must keep earlier turns"
            )
        yield prompt[len(done) :], through_answer[len(prompt) :]
        done = through_answer[: _end(template, through_answer)]
    yield whole[len(done) :], ""


def _rendered_alone(
    template: ChatTemplate, messages: list[Message], answers: list[int], tools: Sequence[dict[str, Any]]
) -> list[Turn] | None:
    """Render each turn after `_EARLIER_TURN`, None where that says something else than the whole conversation."""
    first, *others = answers
    starts = [number + 1 for number in answers[:-1]]
    turns = [[*_EARLIER_TURN, *messages[start : number + 1]] for start, number in zip(starts, others, strict=True)]
    try:
        first_prompt, last_prompt, *prompts = template.render_each(
            [prompt_of(messages, first), prompt_of(messages, answers[-1]), *(turn[:-1] for turn in turns)],
            True,
            tools,
        )
        earlier, first_answer, whole, *through_answers = template.render_each(
            [_EARLIER_TURN, messages[: first + 1], messages, *turns], tools=tools
        )
    except Exception:  # templates that refuse a system message, or a turn without a question, raise what they like
        return None
    if not all(text.startswith(earlier) for text in (*prompts, *through_answers)):
        return None
    pairs = [(first_prompt, first_answer)]
    pairs += [
        (prompt[len(earlier) :], text[len(earlier) :]) for prompt, text in zip(prompts, through_answers, strict=True)
    ]
    end_of_turn = template.chat.end_of_turn
    if not all(text.startswith(prompt) and end_of_turn in text for prompt, text in pairs):
        return None
    joined = "".join(text for _, text in pairs)
    last = len(joined) - len(pairs[-1][1])
    if not (whole.startswith(joined) and last_prompt == joined[:last] + pairs[-1][0]):
        return None
    turns_found, rest = [], ""
    for prompt, text in pairs:
        turns_found.append((rest + prompt, text[len(prompt) :]))
        rest = text[_end(template, text) :]
    return [*turns_found, (rest + whole[len(joined) :], "")]


def _end(template: ChatTemplate, text: str) -> int:
    """Return where the last turn of a text ends."""
    return text.rindex(template.chat.end_of_turn) + len(template.chat.end_of_turn)
