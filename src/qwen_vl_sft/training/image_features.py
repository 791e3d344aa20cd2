"""The features of images that a run keeps on disk: the different images of its training rows, and the folder for them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from qwen_vl_sft.cache_folder import cache_folder
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.feature_cache import FeatureCache, add_to_digest
from qwen_vl_sft.data.scan import Scan
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.modeling.base_model import load_config
from qwen_vl_sft.modeling.structure import ModelStructure

# Raise it when images are decoded, resized, stored or filed otherwise than before: old folders are then not used.
_FORMAT = 3


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
    identity = _identity(recipe, image_processor)
    name = re.sub(r"[^\w.-]+", "_", Path(str(recipe.model.model_name_or_path)).name)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    config = load_config(recipe.model)
    parts = family_of(config).count_feature_layers(config)
    width = parts * config.get_text_config().hidden_size
    folder = _home(recipe.run.image_features_dir) / f"{name}-{recipe.run.cache_image_features}-{digest}"
    cache = FeatureCache(folder, recipe.run.cache_image_features, width, parts)
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


def _identity(recipe: Recipe, image_processor: Any) -> dict[str, Any]:
    """Return everything that features depend on but the image: other values make another folder."""
    settings = recipe.model
    # What the weights are computed in; a tower in half precision is not autocast (`patches`).
    autocast = [name for name in ("bf16", "fp16") if recipe.get(name)] if settings.dtype == "float32" else []
    return {
        "model": _weights(settings),
        "precision": settings.precision,
        "autocast": autocast,
        "image_processor": json.loads(json.dumps(image_processor.to_dict(), sort_keys=True, default=str)),
        "storage": recipe.run.cache_image_features,
        "format": _FORMAT,
    }


def _weights(settings: ModelSettings) -> dict[str, Any]:
    """Return an identifier of the tower's weights: the commit of a Hub model, or a digest for a local folder."""
    config = load_config(settings)
    folder = Path(str(settings.model_name_or_path)).expanduser()
    if not folder.is_dir():
        commit = getattr(config, "_commit_hash", None)
        return {"name": str(settings.model_name_or_path), "commit": commit or settings.model_revision}
    vision = json.dumps(config.vision_config.to_dict(), sort_keys=True, default=str)
    digest, family = hashlib.sha256(vision.encode()), family_of(config)
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with safetensors.safe_open(path, "pt") as file:
            for name in sorted(name for name in file.keys() if family.part_of(name) != "language"):  # noqa: SIM118
                add_to_digest(digest, name, file.get_tensor(name))
    if not files:
        for path in sorted(folder.glob("*.bin")):
            digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    return {"vision_weights": digest.hexdigest()}


def _home(stated: str | None) -> Path:
    return cache_folder("image_features") if stated is None else Path(stated).expanduser()
