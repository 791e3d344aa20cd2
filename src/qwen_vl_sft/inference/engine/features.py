"""What the vision tower makes of images, kept in memory for rows and arms that show them again."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from qwen_vl_sft.batching.positions import Positions
from qwen_vl_sft.data.feature_cache import FeatureCache
from qwen_vl_sft.data.media import EncodedMedia, MediaFile, ReadMedia, model_inputs
from qwen_vl_sft.data.media.image import EncodedImage
from qwen_vl_sft.errors import BadRow
from qwen_vl_sft.families.base import FeatureLayers


class FeatureMemory:
    """Features of images by content hash, on the CPU. What no longer fits is computed again when it is needed.

    All come from one vision tower and one image processor; who has several keeps a memory for each.

    Args:
        most_bytes: most memory to take.
        kept: features of the same tower on disk, which are read where there are any.
    """

    def __init__(self, most_bytes: int, kept: FeatureCache | None = None) -> None:
        self.most_bytes = most_bytes
        self.kept = kept
        self.taken = 0
        self._known: dict[str, EncodedImage] = {}

    def reading(self, read: ReadMedia) -> ReadMedia:
        """Return `read` that brings features instead of pixels where they are known, without decoding."""

        def known_or_read(file: MediaFile) -> EncodedMedia:
            content_hash = file.content_hash
            if content_hash in self._known:
                return self._known[content_hash]
            if self.kept is not None and self.kept.holds(content_hash):
                with contextlib.suppress(BadRow):  # a damaged file: the tower computes its features anew
                    return self.kept.read_image(file)
            return read(file)

        return known_or_read

    def keep(self, image: EncodedImage, layers: Sequence[torch.Tensor]) -> None:
        """Keep the features [M, values] of each layer of an image, if there is room for them."""
        size = sum(layer.numel() * layer.element_size() for layer in layers)
        if image.content_hash in self._known or self.taken + size > self.most_bytes:
            return
        self.taken += size
        features = torch.cat(list(layers), dim=-1).cpu()
        self._known[image.content_hash] = replace(image, patches=None, normalizer=None, features=features)


def image_layers(
    backbone: Any, positions: Positions, images: Sequence[EncodedImage], memory: FeatureMemory | None
) -> FeatureLayers:
    """Return the features of images, layer by layer: [merged tokens, D] each; the tower runs once on each different image."""
    family, device = positions.family, backbone.language_model.embed_tokens.weight.device
    different = {image.content_hash: image for image in images if image.features is None}
    made: dict[str, list[torch.Tensor]] = {}
    if different:
        shown = list(different.values())
        brought = model_inputs(shown, in_bytes=True)
        grids, pixels = brought["image_grid_thw"], brought["pixel_values"].to(device)
        if shown[0].normalizer is not None:
            pixels = shown[0].normalizer(pixels)
        inputs = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in positions.patch_inputs(grids).items()
        }
        output = backbone.get_image_features(pixels, grids.to(device), return_dict=True, **inputs)
        for image, *layers in zip(shown, *family.feature_layers(output), strict=True):
            made[image.content_hash] = layers
            if memory is not None:
                memory.keep(image, layers)
    width = positions.config.get_text_config().hidden_size
    of_images = [
        made[image.content_hash]
        if image.features is None
        else list(image.features.to(device, non_blocking=True).split(width, dim=-1))
        for image in images
    ]
    return [list(layer) for layer in zip(*of_images, strict=True)]
