"""Pixels to patches of the vision tower: the image processor's resizing, in bytes until they are where the model is.

The image processor makes four bytes of every byte, and writes every patch of an image twice, for the two frames of a film.
Workers send an eighth of that; `PatchNormalizer` does the rest, to the same bits, on the model's device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers.image_utils import SizeDict

_COLORS = 3


def cut_into_patches(pixels: torch.Tensor, image_processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Resize an image and cut it into P patches.

    Args:
        pixels: the image, [height, width, 3] uint8.
        image_processor: that of the Qwen-VL family, with its limits of pixels.

    Returns:
        The patches [P, 3 * patch_size * patch_size] uint8, in the order in which the model takes them, and their number in
        time, height and width, [3] int64.
    """
    # Pixels keep their colors side by side: resized so, they cost a fraction of planes of one color each.
    image = pixels.permute(2, 0, 1)[None]
    side, merged = image_processor.patch_size, image_processor.merge_size
    if image_processor.do_resize:
        # A recipe's limits are a plain dictionary.
        size = SizeDict(**dict(image_processor.size))
        image = image_processor.resize(image, size=size, resample=image_processor.resample, factor=side * merged)
    height, width = image.shape[-2:]
    rows, columns = height // side, width // side
    # Patches that are merged into one token follow each other.
    cells = image[0].view(_COLORS, rows // merged, merged, side, columns // merged, merged, side)
    patches = cells.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, _COLORS * side * side)
    return patches, torch.tensor([1, rows, columns])


def join_patches(patches: torch.Tensor, grid: torch.Tensor, image_processor: Any) -> torch.Tensor:
    """Put patches [P, values of a frame] uint8 together again: the resized image, [height, width, 3] uint8."""
    side, merged = image_processor.patch_size, image_processor.merge_size
    _, rows, columns = grid.tolist()
    cells = patches.view(rows // merged, columns // merged, merged, merged, _COLORS, side, side)
    return cells.permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * side, columns * side, _COLORS)


@dataclass(frozen=True)
class PatchNormalizer:
    """Makes of patches in bytes what the image processor gives the model, to the same bits.

    Attributes:
        mean: taken from each color.
        std: what each color is divided by then.
        frames: how often a patch of an image is written.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    frames: int

    @classmethod
    def of(cls, image_processor: Any) -> PatchNormalizer:
        """Return what an image processor would do to colors; in one step, and rounded as it does it."""
        scale = image_processor.rescale_factor if image_processor.do_rescale else 1.0
        normalizes = image_processor.do_normalize
        mean = torch.tensor(image_processor.image_mean if normalizes else [0.0] * _COLORS) * (1.0 / scale)
        std = torch.tensor(image_processor.image_std if normalizes else [1.0] * _COLORS) * (1.0 / scale)
        return cls(tuple(mean.tolist()), tuple(std.tolist()), image_processor.temporal_patch_size)

    def __call__(self, patches: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return `patches` [P, values of a frame] uint8 as [P, values of a patch] in `dtype`, on their device."""
        values = patches.unflatten(1, (_COLORS, -1)).to(torch.float32)
        values.sub_(_on_device(self.mean, patches.device)).div_(_on_device(self.std, patches.device))
        return values.to(dtype)[:, :, None].expand(-1, -1, self.frames, -1).flatten(1)


@lru_cache(maxsize=64)
def _on_device(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return a value for each color, [colors, 1] float32; sent to a GPU once, as sending it would wait for the GPU."""
    return torch.tensor(values, device=device)[:, None]
