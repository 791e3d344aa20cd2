"""Rows of a dataset as conversations: the formats that are read, and the images they point to."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from qwen_vl_sft.errors import BadRow, first_line

IMAGE_PLACEHOLDER = "<image>"
# Pillow warns of a decompression bomb above this many pixels; no chart or photo needs more.
MAX_PIXELS_OF_A_FILE = 89_478_485
# smart_resize of the Qwen-VL image processors refuses anything more elongated.
MAX_ASPECT_RATIO = 200

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


@dataclass(frozen=True)
class ImageFile:
    """An image that is not decoded yet: encoded bytes, or a file."""

    data: bytes | None
    path: str | None

    @property
    def identity(self) -> bytes:
        """The same for the same image: its encoded bytes, or its file."""
        return self.data if self.data is not None else str(self.path).encode()

    @cached_property
    def digest(self) -> str:
        """The sha256 of its encoded bytes. Raises `BadRow` for a file that cannot be read."""
        try:
            data = self.data if self.data is not None else Path(str(self.path)).read_bytes()
        except FileNotFoundError:
            raise BadRow(f"image file {self.path} does not exist") from None
        except OSError as error:
            raise BadRow(f"image{self._named()} cannot be read ({first_line(error)})") from None
        return hashlib.sha256(data).hexdigest()

    def open(self) -> Image.Image:
        """Open without decoding pixels: size and mode come from the header. Raises `BadRow`."""
        try:
            image = Image.open(io.BytesIO(self.data) if self.data is not None else str(self.path))
        except FileNotFoundError:
            raise BadRow(f"image file {self.path} does not exist") from None
        except Image.DecompressionBombError as error:
            raise BadRow(f"image{self._named()} is refused: {error}") from None
        except (OSError, ValueError) as error:
            raise BadRow(f"image{self._named()} cannot be read ({first_line(error)})") from None
        width, height = image.size
        if width * height > MAX_PIXELS_OF_A_FILE:
            raise BadRow(f"image{self._named()} of {width}x{height} pixels is refused: above {MAX_PIXELS_OF_A_FILE:,}")
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise BadRow(f"image{self._named()} of {width}x{height} pixels is refused: more elongated than 200 to 1")
        return image

    def decode(self) -> Image.Image:
        """Decode to RGB, transparency over white as Qwen's own code does. Raises `BadRow`."""
        from qwen_vl_utils.vision_process import to_rgb

        image = self.open()
        try:
            return to_rgb(image)
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise BadRow(f"image{self._named()} cannot be decoded ({first_line(error)})") from None

    def _named(self) -> str:
        return f" {self.path}" if self.path else ""


def chartqa_conversation(row: Mapping[str, Any], folder: Path | None) -> Conversation:
    """Read `image`, `query`, `label` (a string, or a list whose first entry counts) as one question and answer."""
    if row.get("image") is None:
        raise BadRow("has no image")
    if not isinstance(row.get("query"), str) or not row["query"].strip():
        raise BadRow("has an empty query")
    content = [{"type": "image"}, {"type": "text", "text": row["query"]}]
    messages = [{"role": "user", "content": content}]
    label = row.get("label")
    answer = (label[0] if label else None) if isinstance(label, list) else label
    if not isinstance(answer, str) or not answer.strip():
        raise BadRow("has an empty answer (column label)")
    messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return Conversation(messages, [image_file(row["image"], folder)])


def messages_conversation(row: Mapping[str, Any], folder: Path | None) -> Conversation:
    """Read `messages` (role, content) and `images`; `<image>` in a string stands for the next image."""
    turns = row.get("messages")
    if not turns:
        raise BadRow("has no messages")
    messages = [{"role": turn.get("role"), "content": _content_parts(turn.get("content"))} for turn in turns]
    _check_roles(messages)
    images = row.get("images") or []
    if not isinstance(images, list):
        images = [images]
    wanted = sum(part["type"] == "image" for message in messages for part in message["content"])
    if wanted != len(images):
        raise BadRow(f"has {wanted} image placeholder(s) in its messages but {len(images)} image(s)")
    return Conversation(messages, [image_file(image, folder) for image in images])


FORMATS = {"chartqa": chartqa_conversation, "messages": messages_conversation}
FORMAT_COLUMNS = {"chartqa": {"image", "query", "label"}, "messages": {"messages"}}
DEFAULT_SYSTEM_MESSAGES: dict[str, str | None] = {"chartqa": CHARTQA_SYSTEM_MESSAGE, "messages": None}


def resolve_system_message(stated: str | None, row_format: str) -> str | None:
    """The system message of a recipe: the one stated, else the format's own; an empty one is none."""
    return (DEFAULT_SYSTEM_MESSAGES[row_format] if stated is None else stated) or None


def image_file(value: Any, folder: Path | None) -> ImageFile:
    """An image column's value (`{"bytes", "path"}`, a path, or bytes) as a file that is not decoded yet.

    A path written in the data is relative to `folder` and may not leave it.
    """
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return ImageFile(value["bytes"], value.get("path"))
        value = value.get("path")
    if isinstance(value, bytes):
        return ImageFile(value, None)
    if not isinstance(value, str) or not value:
        raise BadRow("has a missing image")
    if folder is None:
        raise BadRow(f"names the image file {value}, but the dataset is not a local folder")
    path = (folder / value).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise BadRow(f"names the image file {value}, which lies outside the data folder {folder}")
    return ImageFile(None, str(path))


def _content_parts(content: Any) -> list[dict[str, Any]]:
    """A message's content as parts; a string is split at its `<image>` placeholders."""
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
        if kind == "image":
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise BadRow(f"has a content part of type {kind!r}; known are 'text' and 'image'")
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
