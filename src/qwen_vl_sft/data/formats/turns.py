"""Parsing that formats share: texts, turns with their roles, content parts, and the media they show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_vl_sft.data.conversation import Conversation, Message
from qwen_vl_sft.data.formats.base import Row, has_value, unread_media
from qwen_vl_sft.data.media import MEDIA, MediaFile
from qwen_vl_sft.data.media.base import Medium
from qwen_vl_sft.errors import BadRow

# Under these names a content part may bring what it shows.
_PAYLOADS = ("image", "image_url", "video", "audio", "url", "path", "base64")


def turns_as_conversation(turns: list[Message], row: Row, folder: Path | None) -> Conversation:
    """Return turns (role, content) with the media of their row's columns as a conversation. Raises `BadRow`.

    A placeholder in a string, or a content part, stands for the next of its kind. A single image that nothing stands for
    is put before the first question, as TRL does it.
    """
    messages: list[Message] = [
        {"role": turn.get("role"), "content": content_parts(turn.get("content"))} for turn in turns
    ]
    check_roles(messages)
    asked = [part for message in messages if message["role"] != "assistant" for part in message["content"]]
    check_placeholders([part["text"] for part in asked if part["type"] == "text"])
    values = {kind: _values(row, medium) for kind, medium in MEDIA.items()}
    for kind, found in values.items():
        wanted = sum(part["type"] == kind for part in asked)
        question = next((message for message in messages if message["role"] == "user"), None)
        if not wanted and question and has_value(row.get(kind)) and len(found) == 1:
            question["content"].insert(0, {"type": kind})
            wanted = 1
        if wanted != len(found):
            raise BadRow(
                f"has {wanted} {kind} placeholder(s) in its messages but {len(found)} {kind}(s); write"
                f" {MEDIA[kind].placeholder} where each is shown"
            )
    shown = [part["type"] for message in messages for part in message["content"] if part["type"] in MEDIA]
    coming = {kind: iter(found) for kind, found in values.items()}
    media: list[MediaFile] = [MEDIA[kind].file(next(coming[kind]), folder) for kind in shown]
    return Conversation(messages, media)


def is_list_of_turns(value: Any) -> bool:
    """Tell whether a column holds turns: a list of mappings."""
    return isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value)


def content_parts(content: Any) -> list[dict[str, Any]]:
    """Return a message's content as parts; a string is split at its placeholders. Raises `BadRow`."""
    content = number_as_text(content)
    if isinstance(content, str):
        return _split(content)
    if not isinstance(content, list):
        raise BadRow("has a message whose content is neither text nor a list of parts")
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        brought = next((name for name in _PAYLOADS if kind in ("text", *MEDIA) and has_value(part.get(name))), None)
        if brought:
            raise BadRow(f"has a content part that brings its own {brought}; put its images into the column images")
        if kind in MEDIA:
            parts.append({"type": kind})
        elif kind == "text":
            text = number_as_text(part.get("text"))
            if not isinstance(text, str):
                raise BadRow("has a content part of type 'text' without a text")
            for medium in MEDIA.values():
                if medium.placeholder in text:
                    raise BadRow(
                        f"has {medium.placeholder} inside a text part; write a part of type {medium.kind!r} in its place"
                    )
            parts.append({"type": "text", "text": text})
        else:
            known = " and ".join(repr(name) for name in ("text", *MEDIA))
            raise BadRow(f"has a content part of type {kind!r}; only {known} are read")
    return parts


def check_roles(messages: list[Message]) -> None:
    """Accept a system message first, then user and assistant; at least one answer, none of them empty.

    Raises `BadRow`.
    """
    for number, message in enumerate(messages):
        if message["role"] not in ("system", "user", "assistant"):
            raise BadRow(f"has a message of role {message['role']!r}; known are system, user and assistant")
        if message["role"] == "system" and number:
            raise BadRow("has a system message that is not its first message")
        if message["role"] == "assistant":
            shown = next((part["type"] for part in message["content"] if part["type"] in MEDIA), None)
            if shown:
                raise BadRow(f"has an {shown} inside an assistant message")
            if not "".join(part["text"] for part in message["content"]).strip():
                raise BadRow("has an empty answer")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("has no assistant turn, so there is nothing to learn from it")
    if messages[0]["role"] == "assistant":
        raise BadRow("begins with an assistant turn")


def check_placeholders(questions: list[str]) -> None:
    """Raise `BadRow` for a question about a medium that is not read."""
    for kind in unread_media():
        if any(f"<{kind}>" in question for question in questions):
            raise BadRow(f"has <{kind}> in a question, and only images are read; leave such rows out")


def text_or_number(value: Any, what: str) -> str:
    """Return a text as it is, a number as text. Raises `BadRow` that calls it `what`."""
    value = number_as_text(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRow(f"has an empty {what}")
    if not isinstance(value, str):
        raise BadRow(f"has neither text nor a number as its {what}: {str(value)[:40]}")
    return value


def number_as_text(value: Any) -> Any:
    """Return a number as text, NaN (a missing value) as None, and everything else unchanged."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if value != value:
        return None
    # Beside a 2.5 the column has made 5.0 of a 5.
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _split(text: str) -> list[dict[str, Any]]:
    """Split a text at the placeholders of all media."""
    parts = [{"type": "text", "text": text}]
    for medium in MEDIA.values():
        parts = [piece for part in parts for piece in _split_at(part, medium)]
    return [part for part in parts if part["type"] != "text" or part["text"]]


def _split_at(part: dict[str, Any], medium: Medium[Any, Any]) -> list[dict[str, Any]]:
    if part["type"] != "text":
        return [part]
    first, *others = part["text"].split(medium.placeholder)
    found = [{"type": "text", "text": first}]
    for text in others:
        found += [{"type": medium.kind}, {"type": "text", "text": text}]
    return found


def _values(row: Row, medium: Medium[Any, Any]) -> list[Any]:
    """Return the values of a medium in a row's columns. Raises `BadRow` if two columns have some."""
    one, several = medium.kind, f"{medium.kind}s"
    values = row.get(several) or []
    values = values if isinstance(values, list) else [values]
    if not has_value(row.get(one)):
        return values
    if values:
        raise BadRow(f"has both a column {one} and a column {several}; keep one")
    return row[one] if isinstance(row[one], list) else [row[one]]
