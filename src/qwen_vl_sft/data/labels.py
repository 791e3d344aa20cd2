"""Labels: which tokens of a conversation are targets of the loss.

A turn's prompt and its answer are tokenized apart and joined, so that the prompt's token ids in training are exactly
those of generation. The targets follow from that construction; no text is searched for.
"""

from __future__ import annotations

from typing import Any

import torch

from qwen_vl_sft.data.chat_template import ChatTemplate
from qwen_vl_sft.data.conversation import Message, prompt_of, text_of
from qwen_vl_sft.data.thoughts import REASONING, SWITCH, check_thoughts
from qwen_vl_sft.errors import BadRow, UserError, quoted

IGNORE_INDEX = -100


def tokenize_turns(
    template: ChatTemplate, messages: list[Message], tools: list[dict[str, Any]]
) -> tuple[list[int], list[bool]]:
    """Return token ids with one token for each picture, and which belong to an answer that is learned or its end-of-turn.

    Raises `BadRow`, and `UserError` for a template that has no fixed text for earlier turns.
    """
    template.check(messages, tools)
    check_thoughts(template.chat, messages)
    end_of_turn, end_of_thought = template.chat.end_of_turn, template.chat.end_of_thought
    ids: list[int] = []
    is_target: list[bool] = []
    done = ""  # the text that `ids` stand for
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = template.render(prompt_of(messages, number), add_generation_prompt=True, tools=tools)
        through_answer = template.render(messages[: number + 1], tools=tools)
        if not (prompt.startswith(done) and through_answer.startswith(prompt)):
            raise UserError(
                "the processor's chat template writes an answer otherwise once a later turn follows, so its tokens"
                " cannot be told apart: templates of Thinking models leave out the thoughts of earlier turns. Train"
                " on rows with one answer each, or an Instruct model; a template of your own must keep earlier turns"
            )
        answer = through_answer[len(prompt) :]
        decided = SWITCH in template.chat.template_options or REASONING in message  # by the recipe, or checked above
        if end_of_thought in answer and end_of_thought not in text_of(message) and not decided:
            raise BadRow(
                "has an answer without a thought, and the model's chat template opens one before every answer, so"
                f" that {quoted(answer[: answer.rindex(end_of_turn)])} would be learned; write <think>...</think> before"
                " the answer, or train an Instruct model"
            )
        prompt_ids = template.tokenize(prompt[len(done) :])
        answer_ids = template.tokenize(answer)
        answer_length = answer_ids.index(template.end_of_turn_id) + 1
        ids += prompt_ids + answer_ids[:answer_length]
        is_target += [False] * len(prompt_ids) + [message.get("learned", True)] * answer_length
        # What the template puts after the end-of-turn (a newline) is the beginning of the next prompt.
        done = through_answer[: through_answer.rindex(end_of_turn) + len(end_of_turn)]
    tail = template.tokenize(template.render(messages, tools=tools)[len(done) :])
    return ids + tail, is_target + [False] * len(tail)


class LabelRule:
    """Makes labels by what is trained on.

    Args:
        template: knows the ids of special tokens.
        train_on: "assistant" for answers and their end-of-turn, "all" for every token but visual ones and padding.
    """

    def __init__(self, template: ChatTemplate, train_on: str) -> None:
        self.train_on = train_on
        self._visual = torch.tensor(template.ids_of(template.chat.visual))

    def labels(self, input_ids: torch.Tensor, is_target: torch.Tensor) -> torch.Tensor:
        """Return `input_ids` [T] with `IGNORE_INDEX` wherever a token is no target; `is_target` [T] marks answers."""
        if self.train_on == "all":
            is_target = ~torch.isin(input_ids, self._visual)
        return input_ids.masked_fill(~is_target, IGNORE_INDEX)
