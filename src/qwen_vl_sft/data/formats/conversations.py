"""Rows of conversations, as Qwen's own fine-tuning code and LLaVA write them: turns of from and value."""

from __future__ import annotations

from pathlib import Path

from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.data.formats.base import DataFormat, Row
from qwen_vl_sft.data.formats.turns import is_list_of_turns, number_as_text, turns_as_conversation
from qwen_vl_sft.errors import BadRow

# Who speaks, and the role that they have in messages.
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def parse(row: Row, folder: Path | None) -> Conversation:
    """Read `conversations` (from, value) as messages are read."""
    turns = row.get("conversations")
    if not turns or not is_list_of_turns(turns):
        raise BadRow("has no conversations, or some that are not a list of turns, each with a from and a value")
    messages = []
    for turn in turns:
        speaker, value = str(turn.get("from")), number_as_text(turn.get("value"))
        if speaker not in SPEAKERS:
            raise BadRow(f"has a turn from {speaker!r}; known are {', '.join(SPEAKERS)}")
        if not isinstance(value, str):
            raise BadRow(f"has a turn from {speaker} whose value is neither text nor a number")
        messages.append({"role": SPEAKERS[speaker], "content": value})
    return turns_as_conversation(messages, row, folder)


FORMAT = DataFormat(
    name="conversations",
    help="like messages, but each turn has from and value",
    columns=frozenset({"conversations"}),
    parse=parse,
    priority=30,
    optional=frozenset({"image", "images", "objects"}),
    refused={
        name: f"has something in column {name}, which is not read; a system message is the first turn"
        for name in ("system", "tools")
    },
)
