"""Content of rows other than text, one module per medium: `MEDIA` lists all that are read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qwen_vl_sft.data.media.base import Medium
from qwen_vl_sft.data.media.image import EncodedImage, ImageMedium
from qwen_vl_sft.data.media.image_file import ImageFile
from qwen_vl_sft.errors import BadRow

# Of any kind; a second medium adds its own types: `ImageFile | VideoFile`.
MediaFile = ImageFile
EncodedMedia = EncodedImage
ReadMedia = Callable[[MediaFile], EncodedMedia]
# Files whose facts are kept, at some hundred bytes each.
_MOST_KEPT = 200_000

MEDIA: dict[str, Medium[Any, Any]] = {medium.kind: medium for medium in (ImageMedium(),)}


@dataclass(frozen=True)
class MediaFacts:
    """What is known of a file before training: its patches; if it was asked for, width, height and sha256 of its bytes."""

    patches: int
    size: tuple[int, int] = (0, 0)
    content_hash: str = ""


LookAt = Callable[[MediaFile], MediaFacts]


def path_of(file: MediaFile) -> str | None:
    """Return the path of the file that has the content, None where the row has it."""
    return None if getattr(file, "data", None) is not None else getattr(file, "path", None)


def model_inputs(encoded: Sequence[EncodedMedia], in_bytes: bool = False) -> dict[str, torch.Tensor]:
    """Return the arguments of the model's forward for media in order of appearance, grouped by kind.

    With `in_bytes` pixels are left for `PatchNormalizer`, which finishes them where the model is.
    """
    found: dict[str, torch.Tensor] = {}
    for kind, medium in MEDIA.items():
        own = [item for item in encoded if item.kind == kind]
        found |= medium.model_inputs(own, in_bytes=True) if in_bytes else medium.model_inputs(own)
    return found


def reading_once(read: ReadMedia) -> ReadMedia:
    """Return `read` with a cache: a file that appears again is not decoded again."""
    known: dict[str, EncodedMedia] = {}

    def remembered(file: MediaFile) -> EncodedMedia:
        content_hash = file.content_hash
        if content_hash not in known:
            known[content_hash] = read(file)
        return known[content_hash]

    return remembered


def looking_once(look: LookAt) -> LookAt:
    """Return `look` with a cache: many rows show the same file, which is then looked at once, also when it is refused."""
    known: dict[tuple[str | None, bytes], MediaFacts | BadRow] = {}

    def remembered(file: MediaFile) -> MediaFacts:
        # A name stands in what is said of a refused file.
        key = (getattr(file, "path", None), hashlib.sha256(file.origin).digest())
        if key not in known:
            if len(known) >= _MOST_KEPT:
                known.clear()
            try:
                known[key] = look(file)
            except BadRow as error:
                known[key] = error
        found = known[key]
        if isinstance(found, BadRow):
            raise type(found)(str(found))
        return found

    return remembered
