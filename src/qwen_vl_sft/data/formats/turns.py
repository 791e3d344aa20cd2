"""Parsing of turns that formats share: roles, what is learned of them, calls of tools, and the media they show."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_vl_sft.data.conversation import Conversation, Message, text_of
from qwen_vl_sft.data.formats.base import Row, has_value
from qwen_vl_sft.data.formats.bookkeeping import is_bookkeeping
from qwen_vl_sft.data.formats.content import check_named_files, check_question, content_parts, part_kind
from qwen_vl_sft.data.media import MEDIA, MediaFile, path_of
from qwen_vl_sft.data.media.base import Medium
from qwen_vl_sft.errors import BadRow, quoted

ROLES = ("system", "user", "assistant", "tool")
# Keys of a turn by which other trainers say whether it is learned.
LEARNED = ("weight", "loss", "train")
# Names of a thought, as transformers knows them.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_PRINTED_LIST = re.compile(r"\s*\[\s*(?:'.*'|\{\s*'.*\})\s*,?\s*\]\s*", re.DOTALL)
_READ_OF_TURNS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", *LEARNED, *_THOUGHTS})


def turns_as_conversation(turns: list[Message], row: Row, folder: Path | None) -> Conversation:
    """Return turns (role, content) with the media of their row's columns as a conversation. Raises `BadRow`.

    A placeholder in a string, or a content part, stands for the next of its kind, or for what the part brings itself.
    Images that nothing stands for are put before the first question, as TRL does it. Where images have parts of their own,
    and in an answer, a placeholder inside a text is text.
    """
    system = system_turns(row)
    if system and turns[0].get("role") == "system":
        raise BadRow("has a system message both in its turns and in column system; keep one")
    turns = _without_known_names([*system, *turns])
    has_parts = any(
        part_kind(part) in MEDIA
        for turn in turns
        for part in (turn["content"] if isinstance(turn.get("content"), list) else ())
    )
    messages = [_message(turn, has_parts) for turn in turns]
    check_roles(messages)
    asked = [part for message in messages if message["role"] != "assistant" for part in message["content"]]
    shows_own = any(part["type"] in MEDIA for part in asked)
    values = {kind: _values(row, medium) for kind, medium in MEDIA.items()}
    questions = [part["text"] for part in asked if part["type"] == "text" and not part["plain"]]
    for text in questions:
        check_question(text, shows_own, any(values.values()))
    for kind, found in values.items():
        _match(kind, found, asked, messages)
    coming = {kind: iter(found) for kind, found in values.items()}
    media: list[MediaFile] = []
    for message in messages:
        for part in message["content"]:
            part.pop("plain", None)
            if part["type"] in MEDIA:
                value = part.pop("value") if "value" in part else next(coming[part["type"]])
                media.append(MEDIA[part["type"]].file(value, folder))
    for text in questions:
        check_named_files(text, [path_of(file) for file in media], folder)
    return Conversation(messages, media, tools_of(row))


def _match(kind: str, found: list[Any], asked: list[dict[str, Any]], messages: list[Message]) -> None:
    """Put images that nothing stands for before the first question. Raises `BadRow` where the numbers differ."""
    brings_own = any(part["type"] == kind and "value" in part for part in asked)
    wanted = sum(part["type"] == kind and "value" not in part for part in asked)
    question = next((message for message in messages if message["role"] == "user"), None)
    if not wanted and question and found and not brings_own:
        question["content"][:0] = [{"type": kind} for _ in found]
        wanted = len(found)
    if wanted == len(found):
        return
    placeholder = MEDIA[kind].placeholder
    if any(placeholder in text_of(message) for message in messages if message["role"] == "assistant"):
        raise BadRow(f"has an {kind} inside an assistant message")
    raise BadRow(
        f"has {wanted} {kind} placeholder(s) in its messages but {len(found)} {kind}(s); write"
        f" {placeholder} where each is shown"
    )


def system_turns(row: Row) -> list[Message]:
    """Return the system message of a row's column `system` as turns: one or none. Raises `BadRow`."""
    value = row.get("system")
    if not has_value(value):
        return []
    if not isinstance(value, str):
        raise BadRow("has something other than text in column system")
    return [{"role": "system", "content": value}]


def tools_of(row: Row) -> list[dict[str, Any]]:
    """Return the tools of a row's column `tools`: a list of functions, or its JSON text. Raises `BadRow`.

    Keys without a value are left out: Arrow gives each tool the keys of all others.
    """
    value = row.get("tools")
    if not has_value(value):
        return []
    tools = _from_json(value)
    if not is_list_of_turns(tools) or not all(has_value(tool) for tool in tools):
        raise BadRow("has something in column tools that is no list of functions, as objects or as one JSON text")
    return [_without_nulls(tool) for tool in tools]


def tool_call(name: Any, arguments: Any) -> dict[str, Any]:
    """Return the call of a function as templates read it. Raises `BadRow`."""
    if not isinstance(name, str) or not name or not isinstance(arguments, Mapping | str | None):
        raise BadRow("has a call of a tool without a name, or whose arguments are neither an object nor its JSON text")
    return {
        "type": "function",
        "function": {"name": name, "arguments": _without_nulls({} if arguments is None else arguments)},
    }


def list_of(value: Any) -> Any:
    """Return the list that a text holds as JSON, as tables and some datasets write it, and everything else as it is.

    Raises `BadRow` for a list as Python prints it, whose quotes and escapes are others than those of JSON.
    """
    found = _from_json(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if isinstance(found, str) and _PRINTED_LIST.fullmatch(found):
        raise BadRow(f"has a list as Python prints it, {found.strip()[:40]!r}; write it as JSON (json.dumps)")
    return found if isinstance(found, list) else value


def is_list_of_turns(value: Any) -> bool:
    """Tell whether a column holds turns: a list of mappings."""
    return isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value)


def check_roles(messages: list[Message]) -> None:
    """Accept a system message first, then user, assistant and tool; at least one answer, none of them empty.

    Raises `BadRow`.
    """
    for number, message in enumerate(messages):
        role = message["role"]
        if role not in ROLES:
            raise BadRow(f"has a message of role {quoted(role)}; known are {', '.join(ROLES)}")
        if role == "system" and number:
            raise BadRow("has a system message that is not its first message")
        if role == "tool" and (not number or messages[number - 1]["role"] not in ("assistant", "tool")):
            raise BadRow("has a message of role 'tool' that follows no answer")
        if role == "assistant":
            shown = next((part["type"] for part in message["content"] if part["type"] in MEDIA), None)
            if shown:
                raise BadRow(f"has an {shown} inside an assistant message")
            if not text_of(message).strip() and "tool_calls" not in message:
                raise BadRow("has an empty answer")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadRow("has no assistant turn, so there is nothing to learn from it")
    if not any(message.get("learned", True) for message in answers):
        raise BadRow("has no assistant turn that is to be learned")
    if messages[0]["role"] == "assistant":
        raise BadRow("begins with an assistant turn")


def _message(turn: Message, has_parts: bool) -> Message:
    role = turn.get("role")
    for name, value in turn.items():
        if name not in _READ_OF_TURNS and not is_bookkeeping(name) and has_value(value):
            raise BadRow(
                f"has a turn with something in {quoted(name)}, which is not read; leave such rows out, or the key"
            )
    content = turn.get("content")
    message: Message = {"role": role}
    message |= _said_beside(turn)
    if "tool_calls" in message and not has_value(content):
        content = []
    message["content"] = content_parts(content, role == "assistant", has_parts)
    if "tool_calls" in message and not text_of(message).strip():
        # Templates put a line break between a content and its calls.
        message["content"] = [part for part in message["content"] if part["type"] != "text"]
    learned = [_is_learned(turn[name], name) for name in LEARNED if turn.get(name) is not None]
    if role != "assistant" and True in learned:
        raise BadRow(f"has a turn of role {quoted(role)} that is to be learned, and only answers are")
    if len(set(learned)) > 1:
        raise BadRow(f"has a turn whose {' and '.join(LEARNED)} do not agree on whether it is learned")
    if role == "assistant" and False in learned:
        message["learned"] = False
    return message


def _said_beside(turn: Message) -> dict[str, Any]:
    """Return what a turn holds beside its content: the keys that chat templates know, by one name each. Raises `BadRow`."""
    found: dict[str, Any] = {}
    thoughts = [name for name in _THOUGHTS if has_value(turn.get(name))]
    calls = _from_json(turn.get("tool_calls"))
    for name in (*thoughts, *(["tool_calls"] if has_value(calls) else [])):
        if turn.get("role") != "assistant":
            raise BadRow(
                f"has a turn of role {quoted(turn.get('role'))} with something in {name!r}, which answers alone have"
            )
    if len(thoughts) > 1:
        raise BadRow(f"has a turn with something in {' and '.join(thoughts)}; keep one")
    for name in (*thoughts, "name"):
        if has_value(turn.get(name)):
            if not isinstance(turn[name], str):
                raise BadRow(f"has a turn with something other than text in {name!r}")
            found["name" if name == "name" else _THOUGHTS[0]] = turn[name]
    if has_value(calls):
        if not is_list_of_turns(calls):
            raise BadRow("has a turn whose tool_calls are no list of calls")
        named = [call["function"] if isinstance(call.get("function"), Mapping) else call for call in calls]
        found["tool_calls"] = [tool_call(call.get("name"), call.get("arguments")) for call in named]
    if has_value(turn.get("tool_call_id")) and turn.get("role") != "tool":
        raise BadRow(
            f"has a turn of role {quoted(turn.get('role'))} with something in 'tool_call_id', which is not read"
        )
    return found


def _without_known_names(turns: list[Message]) -> list[Message]:
    """Leave out the name of a tool's result where it is that of the call it answers, as templates show results in order.

    Raises `BadRow` for results in another order than their calls.
    """
    found: list[Message] = []
    waiting: list[Mapping[str, Any]] = []
    for turn in turns:
        calls = _from_json(turn.get("tool_calls"))
        if turn.get("role") == "assistant":
            waiting = list(calls) if is_list_of_turns(calls) else []
        elif turn.get("role") == "tool" and waiting:
            call = waiting.pop(0)
            called = call["function"] if isinstance(call.get("function"), Mapping) else call
            asked, answered = call.get("id"), turn.get("tool_call_id")
            if has_value(asked) and has_value(answered) and asked != answered:
                raise BadRow("has results of tools in another order than their calls; put them into that order")
            if turn.get("name") == called.get("name"):
                turn = {**turn, "name": None}
        found.append(turn)
    return found


def _is_learned(value: Any, name: str) -> bool:
    if value not in (0, 1):
        raise BadRow(f"has a turn with {name}: {quoted(value)}; only 0, 1, false and true are read")
    return bool(value)


def _from_json(value: Any) -> Any:
    """Return what a JSON text holds, and everything else, bad JSON too, as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _values(row: Row, medium: Medium[Any, Any]) -> list[Any]:
    """Return the values of a medium in a row's columns. Raises `BadRow` if two columns have some."""
    one, several = medium.kind, f"{medium.kind}s"
    values = list_of(row.get(several)) or []
    values = values if isinstance(values, list) else [values]
    if not has_value(row.get(one)):
        return values
    if values:
        raise BadRow(f"has both a column {one} and a column {several}; keep one")
    value = list_of(row[one])
    return value if isinstance(value, list) else [value]
