"""Boxes and points of a row: read from its `objects` and texts, and written as the model's family writes them.

A box in a conversation is a content part of its own, in the data's coordinates. The encoder writes it in the model's,
which may depend on the size of the resized image. Rows are those of ms-swift (Custom-dataset, "Grounding"): `<bbox>` and
`<ref-object>` in the texts stand for the entries of `objects`. Coordinates of the families: see `BoxForm`.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from qwen_vl_sft.data.conversation import Conversation, Message, text_of
from qwen_vl_sft.data.media import MediaFile
from qwen_vl_sft.data.media.image import resized_size
from qwen_vl_sft.errors import BadRow, quoted
from qwen_vl_sft.families.base import BoxForm

# Of the upright original image in pixels, or as parts or thousandths of its sides.
BoxCoordinates = Literal["pixels", "norm1", "norm1000"]
BOX, REFERENCE = "box", "reference"
# What `objects` may hold; ms-swift calls pixels "real".
_KEYS = ("ref", "bbox", "bbox_type", "image_id")
_TYPES: dict[str, BoxCoordinates] = {"real": "pixels", **{name: name for name in get_args(BoxCoordinates)}}
_SLOTS = {"<bbox>": BOX, "<ref-object>": REFERENCE}
_SLOT = re.compile("(<bbox>|<ref-object>)")
# Annotations are rounded: a box may stand out of its image by this part of a side.
_TOLERANCE = 1e-4

_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
_PAIR = rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)"
_FIGURES = re.compile(_NUMBER)
# In the texts of rows only what can be nothing else: between special tokens, under Qwen's JSON keys, in its XML tags.
_TOKENS = re.compile(r"<\|box_start\|>(?P<inside>.*?)<\|box_end\|>", re.DOTALL)
_JSON = re.compile(r"""["'](?P<key>bbox_2d|point_2d)["']\s*:\s*(?P<inside>\[[^\[\]]*\])""")
_TAG = re.compile(r"<points?\s(?P<inside>[^<>]*)>")
_ATTRIBUTES = re.compile(rf'\bx(?P<number>\d*)="{_NUMBER}"\s+y(?P=number)="{_NUMBER}"')
_BETWEEN_TOKENS = re.compile(rf"\s*(?P<found>{_PAIR}(?:\s*,\s*{_PAIR})?)\s*")
_BOX_LIST = re.compile(rf"\[\s*{_NUMBER}(?:\s*,\s*{_NUMBER}){{3}}\s*\]")
_POINT_LIST = re.compile(rf"\[\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\]")
# What else writes coordinates: other keys and tags, tokens of Florence and others, arguments of clicks.
_OTHER_FORMS = re.compile(
    rf"""<box>.*?</box>|<bbox>.*?</bbox>|<point>.*?</point>|(?:<loc_?\d+>)+|<\d+>(?:\s*,?\s*<\d+>)+"""
    rf"""|["'](?:bbox\w*|box\w*|point\w*|coord\w*|position|xyxy|xywh)["']\s*:\s*[\[({{][^\]}})]*"""
    rf"""|["']?(?:start|end)_box["']?\s*[=:]\s*["']?[(\[][^)\]]*"""
    rf"""|\w\(\s*x\s*=\s*{_NUMBER}\s*,\s*y\s*=\s*{_NUMBER}"""
    rf"""|\bx_?(?:1|min)["']?\s*[=:]\s*{_NUMBER},?\s*["']?y_?(?:1|min)["']?\s*[=:]\s*{_NUMBER},?\s*["']?x_?(?:2|max)""",
    re.DOTALL | re.IGNORECASE,
)
# Numbers alone are a box where they are a whole answer.
_BARE_BOXES = re.compile(rf"\s*\[?\s*(?:(?:{_BOX_LIST.pattern}|{_PAIR}\s*,\s*{_PAIR})\s*[,;]?\s*)+\]?\s*\.?\s*")
# In an answer all of them, with the special tokens around.
_IN_ANSWER = re.compile(
    rf"(?:<\|box_start\|>\s*)?(?P<found>{_PAIR}(?:\s*,\s*{_PAIR})?|{_BOX_LIST.pattern}|{_POINT_LIST.pattern}"
    rf"|{_ATTRIBUTES.pattern})(?:\s*<\|box_end\|>)?"
)
_REFERENCE_TOKENS = re.compile(r"<\|object_ref_(?:start|end)\|>")


@dataclass(frozen=True)
class Region:
    """A box (x1, y1, x2, y2) or a point (x, y) in a text: its numbers, and where it stands."""

    numbers: tuple[float, ...]
    start: int
    stop: int

    def form(self, text: str) -> str:
        """Return the text of the region with `{}` in place of its numbers."""
        return _as_form(text[self.start : self.stop])


def read_boxes(conversation: Conversation, objects: Any, coordinates: BoxCoordinates | None) -> Conversation:
    """Return a conversation whose boxes are content parts of their own.

    `objects` is the column of that name, None for a row without. `coordinates` are those of the recipe; without them
    boxes in texts stay the text that they are, and those of `objects` are pixels. Raises `BadRow`.
    """
    found = conversation
    if isinstance(objects, str) and objects.lstrip().startswith("{"):  # as tables hold it
        with contextlib.suppress(ValueError):
            objects = json.loads(objects)
    if objects is not None:
        found = _with_objects(conversation, objects, coordinates or "pixels")
    else:
        _check_no_slots(conversation)
    return _with_regions(found, coordinates) if coordinates else found


def place_boxes(conversation: Conversation, form: BoxForm, processor: Any) -> Conversation:
    """Write the boxes as the model does, in the coordinates of the images as `processor` resizes them.

    Raises `BadRow` for a box that is empty or not inside its image.
    """
    if not has_boxes(conversation):
        return conversation

    def text(part: Mapping[str, Any]) -> str:
        if part["type"] == REFERENCE:
            return form.reference.format(part["text"])
        numbers = in_model_coordinates(part, conversation.media, form, processor)
        written = form.box if len(numbers) == 4 else form.point
        return (part["form"] or written).format(*numbers)

    return replace(conversation, messages=[_written(message, text) for message in conversation.messages])


def has_boxes(conversation: Conversation) -> bool:
    """Return whether a conversation has boxes, points or references to objects as content parts."""
    return any(part["type"] in (BOX, REFERENCE) for message in conversation.messages for part in message["content"])


def boxes_of(message: Message) -> list[dict[str, Any]]:
    """Return the content parts of a message that are boxes or points."""
    return [part for part in message["content"] if part["type"] == BOX]


def in_model_coordinates(
    part: Mapping[str, Any], media: Sequence[MediaFile], form: BoxForm, processor: Any
) -> list[int]:
    """Return the numbers of a box as the model writes them. Raises `BadRow` where it is not inside its image."""
    (width, height), model = scales(part, media, form, processor)
    named = f"has the {'box' if len(part['numbers']) == 4 else 'point'} {part['text'][:80]}"
    if part["coordinates"] != "norm1" and len(part["numbers"]) == 4 and 0 < max(part["numbers"]) <= 1:
        raise BadRow(
            f"{named}, which is no larger than a {'pixel' if part['coordinates'] == 'pixels' else 'thousandth'}; if its"
            f" coordinates are parts of the image's sides, set box_coordinates: norm1"
        )
    relative = _along(part["numbers"], (1 / width, 1 / height))
    if len(relative) == 4 and not (relative[0] < relative[2] and relative[1] < relative[3]):
        raise BadRow(f"{named}, which is empty: it must be x1, y1, x2, y2 with x1 < x2 and y1 < y2")
    if not all(-_TOLERANCE <= number <= 1 + _TOLERANCE for number in relative):
        raise BadRow(f"{named}, which is not inside its image of {width:g} x {height:g} ({part['coordinates']})")
    return [round(number) for number in _along([min(max(number, 0.0), 1.0) for number in relative], model)]


def scales(
    part: Mapping[str, Any], media: Sequence[MediaFile], form: BoxForm, processor: Any
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return width and height of a box's image in the data's coordinates and in the model's. Raises `BadRow`."""
    data = data_scale(part, media)
    if form.coordinates == "norm1000":
        return data, (1000.0, 1000.0)
    return data, _agreed([resized_size(file, processor) for file in _shown(part, media)])


def data_scale(part: Mapping[str, Any], media: Sequence[MediaFile]) -> tuple[float, float]:
    """Return width and height of a box's image in the data's coordinates. Raises `BadRow`."""
    if part["coordinates"] == "pixels":
        return _agreed([file.upright_size for file in _shown(part, media)])
    return (1.0, 1.0) if part["coordinates"] == "norm1" else (1000.0, 1000.0)


def answer_in_data_coordinates(answer: str, target: Conversation, form: BoxForm, processor: Any) -> str:
    """Return a model's answer with its boxes in the data's coordinates, written as those of the right answer.

    The right answer is the last message of `target`. The answer's boxes are on the images of its boxes, in their order.
    Raises `BadRow`.
    """
    boxes = boxes_of(target.messages[-1])
    if not boxes:
        return answer
    written, done = [], 0
    for number, region in enumerate(regions_in_answer(answer)):
        part = boxes[min(number, len(boxes) - 1)]
        (width, height), (model_width, model_height) = scales(part, target.media, form, processor)
        numbers = _along(region.numbers, (width / model_width, height / model_height))
        figures = [_figure(value, part["coordinates"]) for value in numbers]
        inside = region.form(answer)
        if part["form"] is None:
            inside = f"[{', '.join(['{}'] * len(figures))}]"
        written += [answer[done : region.start], inside.format(*figures)]
        done = region.stop
    text = "".join([*written, answer[done:]])
    named = any(part["type"] == REFERENCE for part in target.messages[-1]["content"])
    return _REFERENCE_TOKENS.sub("", text) if named else text


def regions_in_answer(text: str) -> list[Region]:
    """Return the boxes and points of an answer in any form that a model of Qwen-VL writes, in their order."""
    found = []
    for match in _IN_ANSWER.finditer(text):
        numbers = _numbers(match["found"])
        found.append(Region(numbers, match.start(), match.end()))
    return found


def _check_no_slots(conversation: Conversation) -> None:
    """Raise `BadRow` for a slot of an object in a row without any: its name would be learned in place of a box."""
    for message in conversation.messages:
        text = text_of(message)
        for slot in _SLOTS:
            # "<bbox>1, 2, 3, 4</bbox>" is how some write a box in a text.
            if slot in text and f"</{slot[1:]}" not in text:
                raise BadRow(f"has {slot} in its messages and nothing in column objects, which it stands for")


def _with_objects(conversation: Conversation, objects: Any, coordinates: BoxCoordinates) -> Conversation:
    """Put the entries of `objects` into the texts, in their order."""
    if not isinstance(objects, Mapping):
        raise BadRow('has objects in another form than {"ref": [names], "bbox": [[x1, y1, x2, y2], ...]}')
    if unread := [name for name, value in objects.items() if name not in _KEYS and value not in (None, [], "")]:
        raise BadRow(
            f"has {', '.join(map(str, unread))[:80]} in its objects, and only {', '.join(_KEYS)} are read; boxes are"
            " [x1, y1, x2, y2], so those of COCO, [x, y, width, height], must be converted"
        )
    stated = objects.get("bbox_type") or next(name for name, kind in _TYPES.items() if kind == coordinates)
    if stated not in _TYPES:
        raise BadRow(f"has objects of bbox_type {quoted(stated)}; known are {', '.join(_TYPES)}")
    boxes, names = _listed(objects, "bbox"), _listed(objects, "ref")
    images = _listed(objects, "image_id") or [0] * len(boxes)
    if len(images) != len(boxes):
        raise BadRow(
            f"has {len(boxes)} boxes in its objects but {len(images)} image_id; give one for each box, or none"
        )
    entries = {
        BOX: iter([_box(*box, _TYPES[stated], len(conversation.media)) for box in zip(boxes, images, strict=True)]),
        REFERENCE: iter([_reference(name) for name in names]),
    }
    wanted = dict.fromkeys(entries, 0)
    messages = []
    for message in conversation.messages:
        parts: list[dict[str, Any]] = []
        for part in message["content"]:
            for piece in _SLOT.split(part["text"]) if part["type"] == "text" else []:
                if piece in _SLOTS:
                    wanted[_SLOTS[piece]] += 1
                    parts += [entry for entry in [next(entries[_SLOTS[piece]], None)] if entry]
                elif piece:
                    parts.append({"type": "text", "text": piece})
            parts += [] if part["type"] == "text" else [part]
        messages.append({**message, "content": parts})
    for slot, (kind, have) in zip(_SLOTS, ((BOX, boxes), (REFERENCE, names)), strict=True):
        if wanted[kind] != len(have):
            name = "bbox" if kind == BOX else "ref"
            raise BadRow(
                f"has {wanted[kind]} {slot} in its messages but {len(have)} in {name} of its objects; write {slot} where"
                " each stands"
            )
    return replace(conversation, messages=messages)


def _listed(objects: Mapping[str, Any], name: str) -> list[Any]:
    value = objects.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRow(f"has objects whose {name} is not a list")
    return value


def _box(numbers: Any, image: Any, coordinates: BoxCoordinates, images: int) -> dict[str, Any]:
    if not isinstance(numbers, list) or not all(_is_number(number) for number in numbers):
        raise BadRow(f"has a box in its objects that is not a list of numbers: {quoted(numbers)[:80]}")
    if len(numbers) not in (2, 4):
        raise BadRow(f"has a box of {len(numbers)} numbers in its objects; a box has 4, x1, y1, x2, y2, and a point 2")
    if isinstance(image, bool) or not isinstance(image, int) or not 0 <= image < images:
        raise BadRow(f"has a box on image_id {quoted(image)[:40]}, and it has {images} image(s), counted from 0")
    text = f"[{', '.join(f'{number:.8g}' for number in numbers)}]"
    return {"type": BOX, "text": text, "numbers": numbers, "coordinates": coordinates, "image": image, "form": None}


def _reference(name: Any) -> dict[str, Any]:
    if not isinstance(name, str) or not name:
        raise BadRow(f"has a name in ref of its objects that is no text: {quoted(name)[:80]}")
    return {"type": REFERENCE, "text": name}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _with_regions(conversation: Conversation, coordinates: BoxCoordinates) -> Conversation:
    """Make content parts of the boxes that the texts hold."""
    images = len(conversation.media)
    messages = []
    for message in conversation.messages:
        parts: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] != "text":
                parts.append(part)
                continue
            text, done = part["text"], 0
            for region in _regions_in_text(text):
                written = text[region.start : region.stop]
                if not images:
                    raise BadRow(f"has the box {written[:80]} in its messages and no image")
                parts += [
                    {"type": "text", "text": text[done : region.start]},
                    {
                        "type": BOX,
                        "text": written,
                        "numbers": list(region.numbers),
                        "coordinates": coordinates,
                        "image": 0 if images == 1 else None,
                        "form": region.form(text),
                    },
                ]
                done = region.stop
            parts.append({"type": "text", "text": text[done:]})
        if images:
            _check_other_forms(message["role"], parts)
        messages.append({**message, "content": [part for part in parts if part["type"] != "text" or part["text"]]})
    return replace(conversation, messages=messages)


def _check_other_forms(role: str, parts: Sequence[Mapping[str, Any]]) -> None:
    """Raise `BadRow` for texts that write a box in a form that is not read: its numbers would be left as they are."""
    texts = [part["text"] for part in parts if part["type"] == "text"]
    found = next(filter(None, map(_OTHER_FORMS.search, texts)), None)
    if found is None and role == "assistant" and len(parts) == 1 and texts:
        found = _BARE_BOXES.fullmatch(texts[0])
    if found:
        raise BadRow(
            f"has {quoted(found[0])[:80]} in its messages, which box_coordinates does not convert; write <bbox> and column"
            f' objects, <|box_start|>(x1,y1),(x2,y2)<|box_end|>, or "bbox_2d": [x1, y1, x2, y2]; without box_coordinates'
            f" texts are learned as they are"
        )


def _regions_in_text(text: str) -> list[Region]:
    """Return the boxes and points that a row's text holds, in their order. Raises `BadRow` for damaged ones."""
    if "<|quad_start|>" in text:
        raise BadRow("has a quadrangle (<|quad_start|>) in its messages, and only boxes and points are read")
    found = []
    for match in _TOKENS.finditer(text):
        inside = _BETWEEN_TOKENS.fullmatch(match["inside"])
        if inside is None:
            raise BadRow(f"has {match[0][:80]} in its messages; between these tokens stands (x1,y1),(x2,y2), or (x,y)")
        start = match.start("inside") + inside.start("found")
        found.append(Region(_numbers(inside["found"]), start, start + len(inside["found"])))
    for match in _JSON.finditer(text):
        if not (_BOX_LIST if match["key"] == "bbox_2d" else _POINT_LIST).fullmatch(match["inside"]):
            raise BadRow(f"has {match[0][:80]} in its messages; bbox_2d has 4 numbers, point_2d has 2")
        found.append(Region(_numbers(match["inside"]), *match.span("inside")))
    for tag in _TAG.finditer(text):
        for match in _ATTRIBUTES.finditer(text, *tag.span("inside")):
            found.append(Region(_numbers(match[0]), *match.span()))
    return sorted(found, key=lambda region: region.start)


def _numbers(written: str) -> tuple[float, ...]:
    return tuple(float(figure) for figure in _FIGURES.findall(_without_names(written)))


def _as_form(written: str) -> str:
    names = [match.span() for match in re.finditer(r"[xy]\d+(?==)", written)]
    inside = [match for match in _FIGURES.finditer(written) if not any(a <= match.start() < b for a, b in names)]
    form, done = "", 0
    for match in inside:
        form += written[done : match.start()] + "{}"
        done = match.end()
    return form + written[done:]


def _without_names(written: str) -> str:
    """Drop the numbers in names of attributes: the 1 of `x1="20"`."""
    return re.sub(r"[xy]\d*(?==)", "", written)


def _written(message: Message, text: Callable[[Mapping[str, Any]], str]) -> Message:
    """Return a message whose boxes are text; texts that then follow each other are one part, as they were written."""
    parts: list[dict[str, Any]] = []
    for part in message["content"]:
        if part["type"] in (BOX, REFERENCE):
            part = {"type": "text", "text": text(part)}
        if part["type"] == "text" and parts and parts[-1]["type"] == "text":
            parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
        else:
            parts.append(part)
    return {**message, "content": parts}


def _along(numbers: Sequence[float], factors: tuple[float, float]) -> list[float]:
    """Multiply x coordinates by the first factor and y coordinates by the second."""
    return [number * factors[place % 2] for place, number in enumerate(numbers)]


def _figure(value: float, coordinates: BoxCoordinates) -> str:
    return f"{value:.4g}" if coordinates == "norm1" else str(round(value))


def _shown(part: Mapping[str, Any], media: Sequence[MediaFile]) -> Sequence[MediaFile]:
    """Return the images that a box may be on: one, or all where the text does not tell which."""
    image = part["image"]
    if image is None:
        return media
    if image >= len(media):
        raise BadRow(f"has a box on image_id {image}, which is shown only after the answer")
    return media[image : image + 1]


def _agreed(sizes: Sequence[tuple[float, float]]) -> tuple[float, float]:
    if len(set(sizes)) > 1:
        raise BadRow(
            "has a box in its text and images of several sizes, so that it is not known on which it is; write <bbox> in"
            " the text, and the box with its image_id into column objects"
        )
    return sizes[0]
