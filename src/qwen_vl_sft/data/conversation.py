"""A row as a conversation, and which part of it is the prompt of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qwen_vl_sft.data.media import MEDIA, MediaFile
from qwen_vl_sft.families.base import ChatFormat

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages in the chat template's form, and the media they show in order of appearance.

    `messages` are `{"role": str, "content": [{"type": "image"} | {"type": "text", "text": str}, ...]}`; a content part
    of a medium's kind stands for the next of `media`. An answer with `"learned": False` is shown and not learned.
    Messages may have `tool_calls`, `reasoning_content` and `name`, and `tools` are functions that the prompt offers; they
    are shown by chat templates that know them.
    """

    messages: list[Message]
    media: list[MediaFile]
    tools: list[dict[str, Any]] = field(default_factory=list)

    @property
    def last_answer(self) -> str:
        """Return the text of the last message, which is an answer after `up_to_last_answer`."""
        return text_of(self.messages[-1])

    @property
    def last_question(self) -> str:
        """Return the text of the last user message, empty without one."""
        asked = [text_of(message) for message in self.messages if message["role"] == "user"]
        return asked[-1] if asked else ""

    def up_to_last_answer(self) -> Conversation:
        """Drop the messages after the last answer that is learned, which an evaluation scores."""
        last = max(
            number
            for number, message in enumerate(self.messages)
            if message["role"] == "assistant" and message.get("learned", True)
        )
        kept = self.messages[: last + 1]
        shown = sum(part["type"] in MEDIA for message in kept for part in message["content"])
        return replace(self, messages=kept, media=self.media[:shown])


def prompt_of(messages: list[Message], number: int | None = None) -> list[Message]:
    """Return the messages that an answer is learned or generated after: all that stand before it.

    The answer is the message at `number`, by default the last one where that is an answer; without one all are the prompt.
    """
    if number is None:
        number = len(messages) - (bool(messages) and messages[-1]["role"] == "assistant")
    return messages[:number]


def without_thought(text: str) -> str:
    """Return an answer without the thought before it; nothing of one whose thought has not ended."""
    _, ended, answer = text.rpartition(ChatFormat.end_of_thought)
    if ended:
        return answer.strip()
    return "" if text.startswith(ChatFormat.start_of_thought) else text


def text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a message without its media."""
    return "".join(part.get("text", "") for part in message["content"])
