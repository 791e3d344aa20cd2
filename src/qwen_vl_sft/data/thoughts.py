"""Thoughts before an answer, of models whose recipe says whether there are any (`enable_thinking`)."""

from __future__ import annotations

from qwen_vl_sft.data.conversation import Message, text_of
from qwen_vl_sft.errors import BadRow
from qwen_vl_sft.families.base import ChatFormat

SWITCH = "enable_thinking"
# The key of a message in which chat templates look for a thought.
REASONING = "reasoning_content"


def opens_thought(chat: ChatFormat) -> bool:
    """Return whether every prompt ends with the opening of a thought."""
    return bool(chat.template_options.get(SWITCH))


def check_thoughts(chat: ChatFormat, messages: list[Message]) -> None:
    """Raise `BadRow` for an answer with a thought under `enable_thinking: false`, or for one without under true.

    Prompts of these two end otherwise, so the model would learn to think, or not to, after the wrong one.
    """
    if SWITCH not in chat.template_options:
        return
    for message in messages:
        if message["role"] != "assistant":
            continue
        thought = thought_apart(chat, message).get(REASONING) or ""
        if thought.strip() and not opens_thought(chat):
            raise BadRow(
                f"has an answer with a thought, and {SWITCH} is false, so that prompts ask for none; set {SWITCH}: true,"
                f" or leave such rows out"
            )
        # An answer that is only shown may have lost its thought.
        if not thought.strip() and opens_thought(chat) and message.get("learned", True):
            raise BadRow(
                f"has an answer without a thought, and {SWITCH} is true, so that prompts open one; set {SWITCH}: false, or"
                f" write {chat.start_of_thought}...{chat.end_of_thought} before the answer"
            )


def thought_apart(chat: ChatFormat, message: Message) -> Message:
    """Return an answer with the thought in its text under a key of its own, where every chat template finds it.

    Qwen3.8's template takes it from there alone, Qwen3.5's and Qwen3.6's drop what stands before it. Raises `BadRow` for
    a thought in another place.
    """
    text = text_of(message)
    if message["role"] != "assistant" or SWITCH not in chat.template_options or chat.end_of_thought not in text:
        return message
    before, _, answer = text.partition(chat.end_of_thought)
    opening, opened, thought = before.rpartition(chat.start_of_thought)
    others = (chat.start_of_thought, chat.end_of_thought)
    if opening.strip() or any(word in answer for word in others) or message.get(REASONING):
        raise BadRow(
            f"has an answer with {chat.end_of_thought} in another place than after one thought at its beginning, which the"
            f" chat template would cut; write one {chat.start_of_thought}...{chat.end_of_thought} before the answer"
        )
    content = [{"type": "text", "text": answer.strip()}]
    return {**message, REASONING: (thought if opened else before).strip(), "content": content}
