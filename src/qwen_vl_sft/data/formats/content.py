"""Parsing of content that formats share: texts, numbers, content parts, and images that a text names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from qwen_vl_sft.data.formats.base import has_value, unread_media
from qwen_vl_sft.data.media import MEDIA
from qwen_vl_sft.data.media.base import Medium
from qwen_vl_sft.data.media.image_file import WAY_OUT_OF_URLS, is_url
from qwen_vl_sft.errors import BadRow, quoted, shortened

# Under these names a content part may bring what it shows.
_PAYLOADS = ("image", "image_url", "url", "path", "base64")
# Types of content parts under other names, as OpenAI's interfaces write them.
_OTHER_KINDS = {"image_url": "image", "input_image": "image", "input_text": "text", "output_text": "text"}
_HARMLESS_OF_PARTS = frozenset({"type", "text", "detail", "id", "index", "cache_control", "annotations"})
_NAMED_IMAGE = re.compile(r"<img>([^<>\n]+)</img>")


def _tags(names: str) -> str:
    """Return the pattern of what stands for a medium in a text: <|image_1|>, <image: a bar>, [img], {{image}}."""
    return (
        rf"<\|(?!image_pad|video_pad)(?:{names})[^|<>\n]*\|>"
        rf"|<(?:{names})(?:[\s_:=/.-][^<>\n]*|\d+|here|placeholder)?>"
        rf"|\[(?:{names})(?:[\s_#-]*\d+|\s*[:=][^\[\]\n]*)?\]"
        rf"|\{{\{{\s*(?:{names})(?:_?\d+)?\s*\}}\}}"
    )


_IMAGES, _OTHERS = "images?|img|picture|photo", "videos?|audio"
_ENDINGS = r"\.(?:png|jpe?g|webp|gif|bmp|tiff?|heic|avif)"
_FILE = rf"[^<>\[\]\n]*{_ENDINGS}"
# Forms in which other trainers and pages show an image. A model that never sees it would learn to guess.
_REFERENCES = re.compile(
    rf"{_tags(_IMAGES)}|<im_patch>|<(?:start|end)_of_image>|<{_FILE}>|\[{_FILE}\]"
    rf"|<\|\w+_(?:{_IMAGES})\w*\|>|<\|media_\w*\|>"
    rf"|^[ \t]*(?:(?:{_IMAGES})[ \t]*\d*[ \t]*:[ \t]*)?\S+{_ENDINGS}[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
# Those that show an image of their own, whatever else the row shows.
_SHOWN = re.compile(
    rf"<(?:{_IMAGES})\s[^<>\n]*=[^<>\n]*>|</(?:{_IMAGES})>|\[/(?:{_IMAGES})\]|<\w+>{_FILE}\s*</"
    r"|!\[[^\]\n]*\][(\[]|!\[\[|\\includegraphics\b|\.\. image::|data:image/[\w.+-]+;base64,",
    re.IGNORECASE,
)
# What would be text in other rows, and marks the place of an image that nothing else places.
_LIKELY = re.compile(
    rf"(?:[<\uff1c{{]|&lt;)[\s\u200b]*/?[\w-]{{0,30}}?(?:{_IMAGES})[\w-]{{0,30}}[\s\u200b]*(?:[>\uff1e}}]|&gt;)"
    rf"|\|(?:{_IMAGES})\||<im_\w+>",
    re.IGNORECASE,
)
_NAMED_FILE = re.compile(rf"\w[\w./%+@-]*{_ENDINGS}(?!\w)", re.IGNORECASE)
# Letters of a text that a message quotes around what it found.
_AROUND = 40
_OTHER_FORMS = re.compile(_tags(_OTHERS), re.IGNORECASE)


def content_parts(content: Any, is_answer: bool = False, has_parts: bool = False) -> list[dict[str, Any]]:
    """Return a message's content as parts; a string is split at its placeholders. Raises `BadRow`.

    A part has a `value` where it brings what it shows. `has_parts` tells that images of the row have parts of their own, so
    that a placeholder inside a text part is text; in an answer (`is_answer`) it always is. Such a text is `plain`.
    """
    content = number_as_text(content)
    if isinstance(content, str):
        return [_text_part(content, plain=True)] if is_answer else _split(content)
    if not isinstance(content, list):
        raise BadRow("has a message whose content is neither text nor a list of parts")
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part_kind(part)
        if kind != "text" and kind not in MEDIA:
            names = " and ".join(repr(name) for name in ("text", *MEDIA))
            raise BadRow(f"has a content part of type {quoted(kind)}; only {names} are read")
        readable = _PAYLOADS if kind != "text" else ()
        for name, value in part.items():
            if name not in _HARMLESS_OF_PARTS and name not in readable and has_value(value):
                ways = f"; write what it shows into {', '.join(readable)}" if readable else "; leave the key out"
                raise BadRow(f"has a content part that brings its own {shortened(str(name))}, which is not read{ways}")
        if kind == "text":
            parts.append(_written_part(part.get("text"), is_answer or has_parts))
        elif has_value(part.get("text")):
            raise BadRow(f"has a content part of type {kind!r} with a text; write the text as a part of its own")
        else:
            parts.append({"type": kind, **_brought(part)})
    return parts


def part_kind(part: Any) -> Any:
    """Return what a content part is by our names, which a part without a type tells by its only key."""
    if not isinstance(part, Mapping):
        return None
    kind = part.get("type")
    if kind is None:
        found = [name for name in ("text", "image", "image_url") if has_value(part.get(name))]
        kind = found[0] if len(found) == 1 else None
    return _OTHER_KINDS.get(str(kind), kind)


def check_question(text: str, has_placeholders: bool = False, has_images: bool = False) -> None:
    """Raise `BadRow` for the text of a question that shows an image in a form that is not read, or another medium.

    Where the images of its row have placeholders (`has_placeholders`), "[image 1]" only refers to one of them. Where there
    are images (`has_images`) and no placeholders, "{image}" tells where one is meant.
    """
    for kind in unread_media():
        if f"<{kind}>" in text:
            raise BadRow(f"has <{kind}> in a question, and only images are read; leave such rows out")
    found = _SHOWN.search(text)
    if not found and not has_placeholders:
        found = _REFERENCES.search(text) or (_LIKELY.search(text) if has_images else None)
    if found:
        raise _names_an_image(text, found)
    if found := _OTHER_FORMS.search(text):
        raise BadRow(
            f"names a video or a sound in its text, {quoted(found[0])}, and only images are read; leave such rows out"
        )


def check_named_files(text: str, shown: Collection[str | None], folder: Path | None) -> None:
    """Raise `BadRow` for the text of a question that names a file of the data folder which is not among those shown."""
    if folder is None:
        return
    for found in _NAMED_FILE.finditer(text):
        path = folder / found[0]
        if ".." not in path.parts and path.is_file() and str(path.resolve()) not in shown:
            raise _names_an_image(text, found)


def _names_an_image(text: str, found: re.Match[str]) -> BadRow:
    around = text[max(0, found.start() - _AROUND) : found.end() + _AROUND]
    return BadRow(
        f"names an image in its text, {quoted(around)}; write <image> in its place and the file into column images (in"
        " messages whose images are content parts of their own, it is text)"
    )


def text_or_number(value: Any, what: str) -> str:
    """Return a text as it is, a number as text. Raises `BadRow` that calls it `what`."""
    value = number_as_text(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRow(f"has an empty {what}")
    if not isinstance(value, str):
        raise BadRow(f"has neither text nor a number as its {what}: {shortened(str(value))}")
    return value


def number_as_text(value: Any) -> Any:
    """Return a number as text, NaN (a missing value) as None, and everything else unchanged."""
    if isinstance(value, Decimal):
        return format(value, "f") if value.is_finite() else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if value != value:
        return None
    # Beside a 2.5 the column has made 5.0 of a 5.
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _text_part(text: str, plain: bool) -> dict[str, Any]:
    return {"type": "text", "text": text, "plain": plain}


def _written_part(text: Any, plain: bool) -> dict[str, Any]:
    text = number_as_text(text)
    if not isinstance(text, str):
        raise BadRow("has a content part of type 'text' without a text")
    for medium in () if plain else MEDIA.values():
        if medium.placeholder in text:
            raise BadRow(
                f"has {medium.placeholder} inside a text part; write a part of type {medium.kind!r} in its place"
            )
    return _text_part(text, plain)


def _brought(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of a part that brings what it shows, else nothing. Raises `BadRow` for a URL."""
    brought = {name: part[name] for name in _PAYLOADS if has_value(part.get(name))}
    if not brought:
        return {}
    if len(brought) > 1:
        raise BadRow(f"has a content part that brings its own {' and '.join(brought)}; keep one")
    ((name, value),) = brought.items()
    if name == "image_url" and isinstance(value, Mapping):
        value = value.get("url")
    if isinstance(value, str) and is_url(value):
        raise BadRow(
            f"has a content part that brings its own {name}, {shortened(value)}: URLs are not read; {WAY_OUT_OF_URLS}"
        )
    return {"value": value}


def _split(text: str) -> list[dict[str, Any]]:
    """Split a text at the placeholders of all media, and at images that it names as Qwen-VL does."""
    first, *others = _NAMED_IMAGE.split(text)
    parts = [_text_part(first, plain=False)]
    for name, following in zip(others[::2], others[1::2], strict=True):
        parts += [{"type": "image", "value": name.strip()}, _text_part(following, plain=False)]
    for medium in MEDIA.values():
        parts = [piece for part in parts for piece in _split_at(part, medium)]
    return [part for part in parts if part["type"] != "text" or part["text"]]


def _split_at(part: dict[str, Any], medium: Medium[Any, Any]) -> list[dict[str, Any]]:
    if part["type"] != "text":
        return [part]
    first, *others = part["text"].split(medium.placeholder)
    found = [_text_part(first, plain=False)]
    for text in others:
        found += [{"type": medium.kind}, _text_part(text, plain=False)]
    return found
