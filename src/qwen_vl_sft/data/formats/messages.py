"""Rows of messages, as TRL and transformers write them: turns of role and content."""

from __future__ import annotations

from pathlib import Path

from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.data.formats.base import DataFormat, Row
from qwen_vl_sft.data.formats.turns import is_list_of_turns, list_of, turns_as_conversation
from qwen_vl_sft.errors import BadRow


def parse(row: Row, folder: Path | None) -> Conversation:
    """Read `messages` (role, content) and `images`, or `image`; see `turns_as_conversation`."""
    turns = list_of(row.get("messages"))
    if not turns:
        raise BadRow("has no messages")
    if not is_list_of_turns(turns):
        raise BadRow("has messages that are not a list of turns, each with a role and a content")
    return turns_as_conversation(turns, row, folder)


FORMAT = DataFormat(
    name="messages",
    help="messages and images",
    columns=frozenset({"messages"}),
    parse=parse,
    priority=20,
    optional=frozenset({"image", "images", "objects", "system", "tools"}),
)
