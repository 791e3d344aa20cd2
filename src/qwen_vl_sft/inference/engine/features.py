"""What the vision tower makes of images, kept in memory for rows and arms that show them again."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from qwen_vl_sft.batching.positions import Positions
from qwen_vl_sft.data.feature_cache import FeatureCache
from qwen_vl_sft.data.media import EncodedMedia, MediaFile, ReadMedia
from qwen_vl_sft.data.media.image import EncodedImage
from qwen_vl_sft.errors import BadRow
from qwen_vl_sft.families.base import FeatureLayers
from qwen_vl_sft.inference.engine.transfer import PinnedMemory, to_device


class FeatureMemory:
    """Features of images by content hash. What no longer fits is computed again when it is needed.

    All come from one vision tower and one image processor; who has several keeps a memory for each.

    Args:
        most_bytes: most memory of the host to take.
        kept: features of the same tower on disk, which are read where there are any.
        most_bytes_on_gpu: most memory to take of the GPU where they are made, which is filled first.
    """

    def __init__(self, most_bytes: int, kept: FeatureCache | None = None, most_bytes_on_gpu: int = 0) -> None:
        self.most_bytes = most_bytes
        self.most_bytes_on_gpu = most_bytes_on_gpu
        self.kept = kept
        self.taken = self.taken_on_gpu = 0
        self._known: dict[str, EncodedImage] = {}
        self._pinned = PinnedMemory()

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
        if image.content_hash in self._known:
            return
        size = sum(layer.numel() * layer.element_size() for layer in layers)
        on_gpu = layers[0].is_cuda
        if on_gpu and self.taken_on_gpu + size <= self.most_bytes_on_gpu:
            self.taken_on_gpu += size
            features = torch.cat(list(layers), dim=-1)
        elif self.taken + size <= self.most_bytes:
            self.taken += size
            joined = torch.cat(list(layers), dim=-1)
            features = self._pinned.keep(joined) if on_gpu else joined
        else:
            return
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
        grids = torch.stack([image.grid for image in shown])
        pixels = torch.cat([to_device(image.patches, device) for image in shown if image.patches is not None])
        if shown[0].normalizer is not None:
            pixels = shown[0].normalizer(pixels)
        inputs = {
            name: to_device(value, device) if isinstance(value, torch.Tensor) else value
            for name, value in positions.patch_inputs(grids).items()
        }
        # The grids stay on the host, which reads them: what the tower needs of them is among the inputs.
        output = backbone.get_image_features(pixels, grids, return_dict=True, **inputs)
        for image, *layers in zip(shown, *family.feature_layers(output), strict=True):
            made[image.content_hash] = layers
            if memory is not None:
                memory.keep(image, layers)
    width = positions.config.get_text_config().hidden_size
    of_images = [
        made[image.content_hash]
        if image.features is None
        else list(to_device(image.features, device).split(width, dim=-1))
        for image in images
    ]
    return [list(layer) for layer in zip(*of_images, strict=True)]
