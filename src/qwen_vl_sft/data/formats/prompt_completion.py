"""Rows of a prompt and its completion, as TRL writes them: texts, or turns of role and content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.data.formats.base import DataFormat, Row
from qwen_vl_sft.data.formats.content import number_as_text
from qwen_vl_sft.data.formats.turns import LEARNED, is_list_of_turns, turns_as_conversation
from qwen_vl_sft.errors import BadRow


def parse(row: Row, folder: Path | None) -> Conversation:
    """Read `prompt` and `completion` as messages are read; of the prompt nothing is learned."""
    prompt, completion = _turns(row, "prompt", "user"), _turns(row, "completion", "assistant")
    if any(turn.get(name) for turn in prompt for name in LEARNED):
        raise BadRow("has a prompt with a turn that is to be learned, and only the completion is")
    shown = [{**turn, "weight": 0} if turn.get("role") == "assistant" else turn for turn in prompt]
    return turns_as_conversation([*shown, *completion], row, folder)


def _turns(row: Row, column: str, role: str) -> list[dict[str, Any]]:
    value = number_as_text(row.get(column))
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not value or not is_list_of_turns(value):
        raise BadRow(f"has a {column} that is neither text nor a list of turns")
    return list(value)


FORMAT = DataFormat(
    name="prompt_completion",
    help="prompt, completion and images",
    columns=frozenset({"prompt", "completion"}),
    parse=parse,
    priority=40,
    optional=frozenset({"image", "images", "objects", "system", "tools"}),
)
