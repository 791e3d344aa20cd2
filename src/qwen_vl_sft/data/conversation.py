"""A row as a conversation, and which part of it is the prompt of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_vl_sft.data.media import MEDIA, MediaFile

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages in the chat template's form, and the media they show in order of appearance.

    `messages` are `{"role": str, "content": [{"type": "image"} | {"type": "text", "text": str}, ...]}`; a content part
    of a medium's kind stands for the next of `media`.
    """

    messages: list[Message]
    media: list[MediaFile]

    @property
    def last_answer(self) -> str:
        """The text of the last message, which is an answer after `up_to_last_answer`."""
        return text_of(self.messages[-1])

    @property
    def last_question(self) -> str:
        """The text of the last user message, empty without one."""
        asked = [text_of(message) for message in self.messages if message["role"] == "user"]
        return asked[-1] if asked else ""

    def up_to_last_answer(self) -> Conversation:
        """Drop the messages after the last assistant turn, which an evaluation scores."""
        last = max(number for number, message in enumerate(self.messages) if message["role"] == "assistant")
        kept = self.messages[: last + 1]
        shown = sum(part["type"] in MEDIA for message in kept for part in message["content"])
        return Conversation(kept, self.media[:shown])


# The two rules differ for several assistant turns in a row: training keeps the earlier ones in the prompt of the later.
def training_prompt(messages: list[Message], number: int) -> list[Message]:
    """Return the messages that an answer is learned after, of which it is the one at `number`."""
    return messages[:number]


def generation_prompt(messages: list[Message]) -> list[Message]:
    """Return the messages that an answer is generated after: all before the assistant turns at the end."""
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages


def text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a message without its media."""
    return "".join(part.get("text", "") for part in message["content"])
