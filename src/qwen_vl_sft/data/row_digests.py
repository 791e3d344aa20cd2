"""Digests of what rows ask and answer, by which equal rows are found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from qwen_vl_sft.data.conversation import Conversation, Message


def row_digests(conversation: Conversation, content_hashes: Sequence[str]) -> tuple[str, str]:
    """Return digests of a row's question and of its answer, empty for a row that asks nothing.

    The question is all that is shown but the answers: images by their content, texts without regard to white space. The
    answer is all turns of the assistant.
    """
    asked = [_spoken(message) for message in conversation.messages if message["role"] != "assistant"]
    answered = [_spoken(message) for message in conversation.messages if message["role"] == "assistant"]
    if not any(role == "user" for role, *_ in asked):
        return "", _digest(answered)
    return _digest([asked, list(content_hashes), conversation.tools]), _digest(answered)


def _spoken(message: Message) -> list[Any]:
    """Return role, and texts with the kinds of media between them."""
    parts = [" ".join(part["text"].split()) if "text" in part else part["type"] for part in message["content"]]
    return [message["role"], [part for part in parts if part], message.get("tool_calls")]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]
