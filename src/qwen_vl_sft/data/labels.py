"""Labels: which tokens of a conversation are targets of the loss.

A turn's prompt and its answer are tokenized apart and joined, so that the prompt's token ids in training are exactly
those of generation. The targets follow from that construction; no text is searched for.
"""

from __future__ import annotations

from typing import Any

import torch

from qwen_vl_sft.data.chat_template import ChatTemplate
from qwen_vl_sft.data.conversation import Message, text_of
from qwen_vl_sft.data.thoughts import REASONING, SWITCH, check_thoughts
from qwen_vl_sft.data.turn_texts import turn_texts
from qwen_vl_sft.errors import BadRow, quoted

IGNORE_INDEX = -100


def tokenize_turns(
    template: ChatTemplate, messages: list[Message], tools: list[dict[str, Any]]
) -> tuple[list[int], list[bool]]:
    """Return token ids with one token for each picture, and which belong to an answer that is learned or its end-of-turn.

    Raises `BadRow`, and `UserError` for a template that has no fixed text for earlier turns.
    """
    template.check(messages, tools)
    check_thoughts(template.chat, messages)
    ids: list[int] = []
    is_target: list[bool] = []
    answers = (message for message in messages if message["role"] == "assistant")
    for prompt, answer in turn_texts(template, messages, tools):
        answer_length, learned = 0, False
        answer_ids: list[int] = []
        if answer:
            message = next(answers)
            learned = message.get("learned", True)
            _check_thought(template, message, answer)
            answer_ids = template.tokenize(answer)
            # What the template puts after the end-of-turn (a newline) is the beginning of the next prompt.
            answer_length = answer_ids.index(template.end_of_turn_id) + 1
        prompt_ids = template.tokenize(prompt)
        ids += prompt_ids + answer_ids[:answer_length]
        is_target += [False] * len(prompt_ids) + [learned] * answer_length
    return ids, is_target


def _check_thought(template: ChatTemplate, message: Message, answer: str) -> None:
    end_of_thought = template.chat.end_of_thought
    decided = SWITCH in template.chat.template_options or REASONING in message  # by the recipe, or checked already
    if end_of_thought in answer and end_of_thought not in text_of(message) and not decided:
        raise BadRow(
            "has an answer without a thought, and the model's chat template opens one before every answer, so"
            f" that {quoted(answer[: answer.rindex(template.chat.end_of_turn)])} would be learned; write"
            " <think>...</think> before the answer, or train an Instruct model"
        )


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
