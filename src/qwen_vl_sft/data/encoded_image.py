"""An image as the model reads it, and reading each image once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qwen_vl_sft.data.image_file import ImageFile


@dataclass(frozen=True)
class EncodedImage:
    """One image: P patches, from which the vision tower makes M merged ones.

    `key` is the sha256 of its encoded bytes, `grid` [3] int64 (patches). It brings `pixel_values` [P, values of a patch]
    float32, or what the tower made of them before, `features` [M, values of a merged patch].
    """

    key: str
    grid: torch.Tensor
    pixel_values: torch.Tensor | None = None
    features: torch.Tensor | None = None


ReadImage = Callable[[ImageFile], EncodedImage]


def reading_once(read_image: ReadImage) -> ReadImage:
    """`read_image` with a memory of what it has read: an image that is shown again is not decoded again."""
    known: dict[str, EncodedImage] = {}

    def read(file: ImageFile) -> EncodedImage:
        key = file.digest
        if key not in known:
            known[key] = read_image(file)
        return known[key]

    return read
