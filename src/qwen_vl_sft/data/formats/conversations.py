"""Rows of conversations, as Qwen's own fine-tuning code and LLaVA write them: turns of from and value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_vl_sft.data.conversation import Conversation, Message
from qwen_vl_sft.data.formats.base import DataFormat, Row, has_value
from qwen_vl_sft.data.formats.content import number_as_text
from qwen_vl_sft.data.formats.turns import is_list_of_turns, list_of, turns_as_conversation
from qwen_vl_sft.errors import BadRow, quoted

# Who speaks, and the role that they have in messages.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
}


def parse(row: Row, folder: Path | None) -> Conversation:
    """Read `conversations` (from, value; or role, content) as messages are read.

    The value of a `function_call` is its JSON text.
    """
    turns = list_of(row.get("conversations"))
    if not turns or not is_list_of_turns(turns):
        raise BadRow("has no conversations, or some that are not a list of turns, each with a from and a value")
    return turns_as_conversation([_turn(turn) for turn in turns], row, folder)


def _turn(turn: Mapping[str, Any]) -> Message:
    if "role" in turn and not has_value(turn.get("from")):
        return {name: entry for name, entry in turn.items() if name not in ("from", "value")}
    speaker, value = str(turn.get("from")), number_as_text(turn.get("value"))
    if speaker not in SPEAKERS:
        raise BadRow(f"has a turn from {quoted(speaker)}; known are {', '.join(SPEAKERS)}")
    if not isinstance(value, str):
        raise BadRow(f"has a turn from {speaker} whose value is neither text nor a number")
    others = {name: entry for name, entry in turn.items() if name not in ("from", "value")}
    message: Message = {**others, "role": SPEAKERS[speaker], "content": value}
    if speaker != "function_call":
        return message
    try:
        calls = json.loads(value)
    except ValueError:
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not is_list_of_turns(calls) or not all("name" in call for call in calls):
        raise BadRow("has a turn from 'function_call' whose value is no JSON of a name and arguments")
    return {**message, "content": "", "tool_calls": calls}


FORMAT = DataFormat(
    name="conversations",
    help="like messages, but each turn has from and value",
    columns=frozenset({"conversations"}),
    parse=parse,
    priority=30,
    optional=frozenset({"image", "images", "objects", "system", "tools"}),
)
