"""Content of rows other than text, one module per medium: `MEDIA` lists all that are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qwen_vl_sft.data.media.base import Medium
from qwen_vl_sft.data.media.image import EncodedImage, ImageMedium
from qwen_vl_sft.data.media.image_file import ImageFile

# Of any kind; a second medium adds its own types: `ImageFile | VideoFile`.
MediaFile = ImageFile
EncodedMedia = EncodedImage
ReadMedia = Callable[[MediaFile], EncodedMedia]

MEDIA: dict[str, Medium[Any, Any]] = {medium.kind: medium for medium in (ImageMedium(),)}


def model_inputs(encoded: Sequence[EncodedMedia]) -> dict[str, torch.Tensor]:
    """Return the arguments of the model's forward for media in order of appearance, grouped by kind."""
    found: dict[str, torch.Tensor] = {}
    for kind, medium in MEDIA.items():
        found |= medium.model_inputs([item for item in encoded if item.kind == kind])
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
