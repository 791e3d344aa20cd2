"""The features of images that a run keeps on disk: the different images of its training rows, and the folder for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.feature_cache import FeatureCache
from qwen_vl_sft.data.scan import Scan
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.modeling.kept_features import kept_features
from qwen_vl_sft.modeling.structure import ModelStructure


@dataclass(frozen=True)
class ImageLocation:
    """Where an image is shown: the row, which of its images it is, and its merged tokens."""

    row: int
    number: int
    tokens: int


@dataclass(frozen=True)
class ImageFeatures:
    """The cache of a run, what its folder depends on, and a location of each different image, by content hash."""

    cache: FeatureCache
    identity: dict[str, Any]
    locations: dict[str, ImageLocation]

    def size(self, content_hashes: Iterable[str]) -> int:
        """Return the bytes that these images take on disk."""
        return sum(self.cache.size(self.locations[content_hash].tokens) for content_hash in content_hashes)

    def describe(self) -> str:
        """Describe them in a line of the plan, at most 80 columns."""
        missing = [content_hash for content_hash in self.locations if not self.cache.holds(content_hash)]
        whole = f"{len(self.locations):,} images in {self.cache.storage}, {in_words(self.size(self.locations))}"
        return f"features    {whole}; {len(missing):,} to compute, {in_words(self.size(missing))}"


def in_words(size: int) -> str:
    """Format bytes as a person reads them."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def plan_features(recipe: Recipe, structure: ModelStructure, train: Scan, encoder: Encoder) -> ImageFeatures | None:
    """Plan what `cache_image_features` asks for, None when it does not. The rows must have been scanned for their images.

    Raises `UserError` when something in the vision tower or its merger trains.
    """
    if recipe.run.cache_image_features is None:
        return None
    _check_frozen(structure)
    image_processor = encoder.processor.image_processor
    cache, identity = kept_features(recipe, image_processor)
    locations: dict[str, ImageLocation] = {}
    for row, (hashes, patches) in enumerate(zip(train.content_hashes, train.image_patches, strict=True)):
        for number, (content_hash, count) in enumerate(zip(hashes, patches, strict=True)):
            locations.setdefault(content_hash, ImageLocation(row, number, count // image_processor.merge_size**2))
    if not locations:
        raise UserError("cache_image_features: no training row has an image; leave it out")
    return ImageFeatures(cache, identity, locations)


def _check_frozen(structure: ModelStructure) -> None:
    trained = (*structure.lora_targets, *structure.in_full)
    seeing = [name for name in trained if structure.family.part_of(name) != "language"]
    if seeing:
        raise UserError(
            f"cache_image_features needs a vision tower and merger that do not change, and {len(seeing)} of their layers"
            f" train ({seeing[0]}); set lora_scope: language, name lora_target_modules and lora_modules_to_save more"
            f" fully, or leave cache_image_features out"
        )
