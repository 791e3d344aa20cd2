"""Rows of a dataset as conversations: the formats that are read, and what of a row is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vl_sft.data.image_file import ImageFile, image_file
from qwen_vl_sft.errors import BadRow

IMAGE_PLACEHOLDER = "<image>"
# What other trainers read, and this package does not: a model that never saw it would learn to guess.
UNREAD_COLUMNS = ("video", "videos", "audio", "audios")
UNREAD_PLACEHOLDERS = ("<video>", "<audio>")
# Who speaks in `conversations`, and the roles that they have in messages.
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Under these names a content part may bring what it shows.
_PAYLOADS = ("image", "image_url", "video", "audio", "url", "path", "base64")

CHARTQA_SYSTEM_MESSAGE = (
    "You are a Vision Language Model specialized in interpreting visual data from chart images.\n"
    "Your task is to analyze the provided chart image and respond to queries with concise answers, usually a single"
    " word, number, or short phrase.\n"
    "The charts include a variety of types (e.g., line charts, bar charts) and contain colors, labels, and text.\n"
    "Focus on delivering accurate, succinct answers based on the visual information. Avoid additional explanation"
    " unless absolutely necessary."
)


@dataclass(frozen=True)
class Conversation:
    """Messages in the chat template's form, and the images they show in order of appearance.

    `messages` are `{"role": str, "content": [{"type": "image"} | {"type": "text", "text": str}, ...]}`.
    """

    messages: list[dict[str, Any]]
    images: list[ImageFile]


def chartqa_conversation(row: Mapping[str, Any], folder: Path | None) -> Conversation:
    """Read `image`, `query`, `label` (text, or a list whose first entry counts) as one question and answer."""
    if row.get("image") is None:
        raise BadRow("has no image")
    query = _text(row.get("query"), "query")
    if _holds(row.get("images")):
        raise BadRow("has images in column images too, of which this format shows none; see dataset_format: messages")
    _check_nothing_unread(row, [query])
    if IMAGE_PLACEHOLDER in query:
        raise BadRow(f"has {IMAGE_PLACEHOLDER} in its query; the image is put before the query, so leave it out")
    content = [{"type": "image"}, {"type": "text", "text": query}]
    answer = {"type": "text", "text": chartqa_answers(row)[0]}
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [answer]}]
    return Conversation(messages, [image_file(row["image"], folder)])


def chartqa_answers(row: Mapping[str, Any]) -> list[str]:
    """The accepted answers in `label`, of which the first is learned. Raises `BadRow`."""
    label = row.get("label")
    first, *others = [_number_as_text(answer) for answer in label] or [None] if isinstance(label, list) else [label]
    others = [answer for answer in others if answer is not None and str(answer).strip()]
    return [_text(answer, "answer (column label)") for answer in (first, *others)]


def _text(value: Any, what: str) -> str:
    """A text as it is, a number as text. Raises `BadRow`."""
    value = _number_as_text(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRow(f"has an empty {what}")
    if not isinstance(value, str):
        raise BadRow(f"has neither text nor a number as its {what}: {str(value)[:40]}")
    return value


def _number_as_text(value: Any) -> Any:
    """A number as text, NaN, which stands for what is missing, as None, and everything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if value != value:
        return None
    # Beside a 2.5 the column has made 5.0 of a 5.
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def messages_conversation(row: Mapping[str, Any], folder: Path | None) -> Conversation:
    """Read `messages` (role, content) and `images`, or `image`; `<image>` in a string stands for the next one.

    A single `image` that nothing stands for is put before the first question, as TRL does it.
    """
    turns = row.get("messages")
    if not turns:
        raise BadRow("has no messages")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRow("has messages that are no list of turns, each with a role and a content")
    messages = [{"role": turn.get("role"), "content": _content_parts(turn.get("content"))} for turn in turns]
    _check_roles(messages)
    asked = [part for message in messages if message["role"] != "assistant" for part in message["content"]]
    _check_nothing_unread(row, [part["text"] for part in asked if part["type"] == "text"])
    images = _images_of(row)
    wanted = sum(part["type"] == "image" for part in asked)
    question = next((message for message in messages if message["role"] == "user"), None)
    if not wanted and question and _holds(row.get("image")) and len(images) == 1:
        question["content"].insert(0, {"type": "image"})
        wanted = 1
    if wanted != len(images):
        raise BadRow(
            f"has {wanted} image placeholder(s) in its messages but {len(images)} image(s); write {IMAGE_PLACEHOLDER}"
            f" where each is shown"
        )
    return Conversation(messages, [image_file(image, folder) for image in images])


def conversations_conversation(row: Mapping[str, Any], folder: Path | None) -> Conversation:
    """Read `conversations` (from, value), the form of Qwen's own fine-tuning code and LLaVA, as `messages` are read."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRow("has no conversations, or some that are no list of turns, each with a from and a value")
    for name in ("system", "tools"):
        if _holds(row.get(name)):
            raise BadRow(f"has something in column {name}, which is not read; a system message is the first turn")
    messages = []
    for turn in turns:
        speaker, value = str(turn.get("from")), _number_as_text(turn.get("value"))
        if speaker not in SPEAKERS:
            raise BadRow(f"has a turn from {speaker!r}; known are {', '.join(SPEAKERS)}")
        if not isinstance(value, str):
            raise BadRow(f"has a turn from {speaker} whose value is neither text nor a number")
        messages.append({"role": SPEAKERS[speaker], "content": value})
    return messages_conversation({**row, "messages": messages}, folder)


def _images_of(row: Mapping[str, Any]) -> list[Any]:
    images = row.get("images") or []
    images = images if isinstance(images, list) else [images]
    if not _holds(row.get("image")):
        return images
    if images:
        raise BadRow("has both a column image and a column images; keep one")
    return row["image"] if isinstance(row["image"], list) else [row["image"]]


def _check_nothing_unread(row: Mapping[str, Any], questions: list[str]) -> None:
    """Raise `BadRow` for a row that shows what is not read."""
    for name in UNREAD_COLUMNS:
        if _holds(row.get(name)):
            raise BadRow(f"has something in column {name}, and only images are read; leave such rows out")
    for placeholder in UNREAD_PLACEHOLDERS:
        if any(placeholder in question for question in questions):
            raise BadRow(f"has {placeholder} in a question, and only images are read; leave such rows out")


def _holds(value: Any) -> bool:
    """Whether a column's value is more than empty: Arrow fills what is missing with nulls."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return any(_holds(entry) for entry in value) if isinstance(value, list) else value is not None and value != ""


FORMATS = {
    "chartqa": chartqa_conversation,
    "messages": messages_conversation,
    "conversations": conversations_conversation,
}
FORMAT_COLUMNS = {
    "chartqa": {"image", "query", "label"},
    "messages": {"messages"},
    "conversations": {"conversations"},
}
DEFAULT_SYSTEM_MESSAGES = {"chartqa": CHARTQA_SYSTEM_MESSAGE}


def resolve_system_message(stated: str | None, row_format: str) -> str | None:
    """The system message of a recipe: the one stated, else the format's own; an empty one is none."""
    return (DEFAULT_SYSTEM_MESSAGES.get(row_format) if stated is None else stated) or None


def _content_parts(content: Any) -> list[dict[str, Any]]:
    """A message's content as parts; a string is split at its `<image>` placeholders."""
    content = _number_as_text(content)
    if isinstance(content, str):
        parts: list[dict[str, Any]] = []
        for number, text in enumerate(content.split(IMAGE_PLACEHOLDER)):
            if number:
                parts.append({"type": "image"})
            if text:
                parts.append({"type": "text", "text": text})
        return parts
    if not isinstance(content, list):
        raise BadRow("has a message whose content is neither text nor a list of parts")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        brought = next((name for name in _PAYLOADS if kind in ("image", "text") and _holds(part.get(name))), None)
        if brought:
            raise BadRow(f"has a content part that brings its own {brought}; put its images into the column images")
        if kind == "image":
            parts.append({"type": "image"})
        elif kind == "text":
            text = _number_as_text(part.get("text"))
            if not isinstance(text, str):
                raise BadRow("has a content part of type 'text' without a text")
            if IMAGE_PLACEHOLDER in text:
                raise BadRow(f"has {IMAGE_PLACEHOLDER} inside a text part; write a part of type 'image' in its place")
            parts.append({"type": "text", "text": text})
        else:
            raise BadRow(f"has a content part of type {kind!r}; only 'text' and 'image' are read")
    return parts


def _check_roles(messages: list[dict[str, Any]]) -> None:
    """Only system first, then user and assistant; at least one assistant turn, none of them empty."""
    for number, message in enumerate(messages):
        if message["role"] not in ("system", "user", "assistant"):
            raise BadRow(f"has a message of role {message['role']!r}; known are system, user and assistant")
        if message["role"] == "system" and number:
            raise BadRow("has a system message that is not its first message")
        if message["role"] == "assistant":
            if any(part["type"] == "image" for part in message["content"]):
                raise BadRow("has an image inside an assistant message")
            if not "".join(part["text"] for part in message["content"]).strip():
                raise BadRow("has an empty answer")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("has no assistant turn, so there is nothing to learn from it")
    if messages[0]["role"] == "assistant":
        raise BadRow("begins with an assistant turn")
