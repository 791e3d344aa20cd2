"""Rows as the model sees them: their tokens, their images after resizing, and boxes where the model learns them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from qwen_vl_sft.data.boxes import BOX, REFERENCE, has_boxes, in_model_coordinates, scales
from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.data.encoding import Encoded, Encoder
from qwen_vl_sft.data.media import EncodedMedia
from qwen_vl_sft.data.media.image import resized_size
from qwen_vl_sft.data.media.patches import join_patches
from qwen_vl_sft.data.preview import Piece, pieces
from qwen_vl_sft.errors import BadRow
from qwen_vl_sft.evaluation.report_images import Shown, embed
from qwen_vl_sft.previewing.checked_split import CheckedSplit

# Pixels of an image in the page; a row's images that it shows; rows that are looked through for one with boxes.
_MOST_PIXELS = (1000, 1400)
MOST_IMAGES = 6
_LOOKED_THROUGH = 200


@dataclass(frozen=True)
class Box:
    """A box (x1, y1, x2, y2) or a point (x, y) in pixels of the resized image, and the name before it, if any."""

    numbers: tuple[float, ...]
    name: str


@dataclass(frozen=True)
class ExampleImage:
    """An image after resizing: as a page shows it, its width and height for the model, and its boxes."""

    shown: Shown
    size: tuple[int, int]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Example:
    """A row: why it was chosen, its pieces, and its images, `MOST_IMAGES` at most."""

    why: str
    name: str
    tokens: int
    learned: int
    pieces: tuple[Piece, ...]
    images: tuple[ExampleImage, ...]


def choose_examples(split: CheckedSplit, most: int) -> list[tuple[str, int]]:
    """Return some rows that can be used, each once: why, and its place in the split."""
    places = split.is_good.nonzero()[0]
    if not len(places) or not most:
        return []
    lengths, answers = split.lengths, np.asarray(split.usable["answer_tokens"])
    found: list[tuple[str, int]] = [("first row", 0)]
    for why, values in (("longest row", lengths.tokens), ("longest answer", answers), ("most images", lengths.images)):
        if values.max() > values.min():
            found.append((why, int(values.argmax())))
    found.append(("shortest row", int(lengths.tokens.argmin())))
    named = [(why, int(places[number])) for why, number in found]
    if (boxed := _with_boxes(split, places)) is not None:
        named.insert(1, ("with boxes", boxed))
    named += [("some row", int(places[number * len(places) // most])) for number in range(most)]
    reasons: dict[int, str] = {}
    for why, place in named:
        reasons.setdefault(place, why)
    return [(why, place) for place, why in reasons.items()][:most]


def _with_boxes(split: CheckedSplit, places: np.ndarray) -> int | None:
    for place in map(int, places[:_LOOKED_THROUGH]):
        if has_boxes(split.rows.conversation({"row": place})):
            return place
    return None


def read_examples(split: CheckedSplit, encoder: Encoder, most: int) -> Iterator[Example]:
    """Yield the chosen rows; one that can no longer be read is left out."""
    for why, place in choose_examples(split, most):
        try:
            row = split.rows.encode({"row": place}, encoder)
            conversation = split.rows.conversation({"row": place})
        except BadRow:
            continue
        yield Example(
            why,
            split.rows.name_of(row.row_id),
            len(row.labels),
            row.target_tokens,
            tuple(pieces(row, encoder)),
            tuple(_images(row, conversation, encoder)),
        )


def _images(row: Encoded, conversation: Conversation, encoder: Encoder) -> Iterator[ExampleImage]:
    boxes = boxes_of_images(conversation, encoder)
    for number, item in enumerate(row.media[:MOST_IMAGES]):
        image = resized(item, encoder)
        if image is not None:
            yield ExampleImage(embed(image, _MOST_PIXELS), image.size, tuple(boxes.get(number, ())))


def resized(item: EncodedMedia, encoder: Encoder) -> Image.Image | None:
    """Return an image as the model sees it, from its patches; None for one that brings none."""
    if item.patches is None:
        return None
    return Image.fromarray(join_patches(item.patches, item.grid, encoder.processor.image_processor).numpy())


def boxes_of_images(conversation: Conversation, encoder: Encoder) -> dict[int, list[Box]]:
    """Return the boxes of each image, by its number, as the model learns them; those of an unknown image are left out.

    Raises `BadRow`.
    """
    found: dict[int, list[Box]] = {}
    # "Where is NAME?" stands in the question, and its boxes in the answer.
    name = ""
    for message in conversation.messages:
        for part in message["content"]:
            if part["type"] == REFERENCE:
                name = part["text"]
            if part["type"] != BOX or part["image"] is None:
                continue
            numbers = in_model_coordinates(part, conversation.media, encoder.boxes, encoder.processor)
            _, model = scales(part, conversation.media, encoder.boxes, encoder.processor)
            shown = resized_size(conversation.media[part["image"]], encoder.processor)
            placed = tuple(number * shown[place % 2] / model[place % 2] for place, number in enumerate(numbers))
            found.setdefault(part["image"], []).append(Box(placed, name))
    return found
