"""Images as a medium: how one becomes patches, how many tokens they cost, and what the model gets of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from qwen_vl_sft.data.media.image_file import ImageFile, image_file
from qwen_vl_sft.data.media.patches import PatchNormalizer, cut_into_patches
from qwen_vl_sft.families.base import ChatFormat, resized_image


@dataclass(frozen=True)
class EncodedImage:
    """One image: P patches, from which the vision tower makes M merged ones, each of which costs a token.

    `content_hash` is that of its file, `grid` [3] int64 its patches in time, height and width. It brings `patches` [P, values
    of a frame] uint8, from which `normalizer` makes `pixel_values`, or the tower's output for them, `features` [M, values
    of a merged patch].
    """

    kind: ClassVar[str] = "image"
    content_hash: str
    grid: torch.Tensor
    patches: torch.Tensor | None = None
    normalizer: PatchNormalizer | None = None
    features: torch.Tensor | None = None

    @property
    def pixel_values(self) -> torch.Tensor | None:
        """Return what the model takes: [P, values of a patch] float32; None for an image that brings features."""
        return self.normalizer(self.patches) if self.normalizer and self.patches is not None else None


class ImageMedium:
    """Images, with the image processor of Qwen-VL."""

    kind = "image"
    placeholder = "<image>"
    token_type = 1

    def file(self, value: Any, folder: Path | None) -> ImageFile:
        """Return an image column's value as a file; see `image_file`. Raises `BadRow`."""
        return image_file(value, folder)

    def token(self, chat: ChatFormat) -> str:
        """Return the family's token of a merged patch."""
        return chat.image

    def count_patches(self, file: ImageFile, processor: Any, decode: bool = False) -> int:
        """Count patches from the header; `decode` also proves the pixels readable. Raises `BadRow`."""
        image = file.open()
        if decode:
            file.pixels()
        count: int = processor.image_processor.get_number_of_image_patches(image.height, image.width, {})
        return count

    def size(self, file: ImageFile) -> tuple[int, int]:
        """Return width and height from the header, before it is turned upright. Raises `BadRow`."""
        return file.open().size

    def count_tokens(self, patches: int, processor: Any) -> int:
        """Count the merged patches of this many patches."""
        return patches // int(processor.image_processor.merge_size) ** 2

    def encode(self, file: ImageFile, processor: Any) -> EncodedImage:
        """Decode an image, resize it and cut it into patches. Raises `BadRow`."""
        patches, grid = cut_into_patches(file.pixels(), processor.image_processor)
        return EncodedImage(file.content_hash, grid, patches, PatchNormalizer.of(processor.image_processor))

    def model_inputs(self, encoded: Sequence[EncodedImage], in_bytes: bool = False) -> dict[str, torch.Tensor]:
        """Return `pixel_values` [P, values of a patch] and `image_grid_thw` [I, 3] of I images with pixels.

        With `in_bytes` the former are patches in bytes, [P, values of a frame] uint8, for `PatchNormalizer`.
        """
        patches = [image.patches for image in encoded if image.patches is not None]
        if not patches:
            return {}
        pixels = torch.cat(patches)
        normalizer = encoded[0].normalizer
        if not in_bytes and normalizer is not None:
            pixels = normalizer(pixels)
        return {"pixel_values": pixels, "image_grid_thw": torch.stack([image.grid for image in encoded])}

    def describe(self, encoded: EncodedImage, processor: Any) -> str:
        """Describe an image by the size it is resized to and the tokens it costs."""
        _, height, width = (int(patches) * processor.image_processor.patch_size for patches in encoded.grid)
        tokens = self.count_tokens(int(encoded.grid.prod()), processor)
        return f"[image of {width} x {height} pixels, {tokens:,} tokens]"


def resized_size(file: ImageFile, processor: Any) -> tuple[int, int]:
    """Return width and height of the image after resizing, from its header. Raises `BadRow`."""
    return resized_image(*file.upright_size, processor.image_processor)
