"""Where the features of images that a frozen vision tower makes are kept on disk, for a recipe that keeps them."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import safetensors

from qwen_vl_sft.cache_folder import cache_folder
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.data.feature_cache import FeatureCache, add_to_digest
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.modeling.base_model import load_config

# Raise it when images are decoded, resized, stored or filed otherwise than before: old folders are then not used.
_FORMAT = 3


def kept_features(recipe: Recipe, image_processor: Any) -> tuple[FeatureCache, dict[str, Any]]:
    """Return the cache of a recipe with `cache_image_features`, and what its folder depends on."""
    storage = recipe.run.cache_image_features
    assert storage is not None, "a recipe that keeps features"
    identity = _identity(recipe, image_processor)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    config = load_config(recipe.model)
    parts = family_of(config).count_feature_layers(config)
    width = parts * config.get_text_config().hidden_size
    return FeatureCache(_home(recipe) / f"{_name(recipe)}-{storage}-{digest}", storage, width, parts), identity


def unrounded_features(recipe: Recipe, processor: Any) -> FeatureCache | None:
    """Return the cache of a recipe whose features are as the tower makes them while rows are answered, None without one.

    Not those that are stored in fewer bits, nor those that training computed under autocast.
    """
    storage, dtype = recipe.run.cache_image_features, recipe.model.dtype
    if storage not in ("float32", dtype) or _autocast(recipe):
        return None
    # The name of the folder takes a digest of the tower's weights, which is worth it only where there may be one.
    if not any(_home(recipe).glob(f"{_name(recipe)}-{storage}-*")):
        return None
    cache, _ = kept_features(recipe, processor.image_processor)
    return cache if cache.folder.is_dir() else None


def _name(recipe: Recipe) -> str:
    return re.sub(r"[^\w.-]+", "_", Path(str(recipe.model.model_name_or_path)).name)


def _autocast(recipe: Recipe) -> list[str]:
    """Return what the tower is computed in, beside its weights' type; one in half precision is not autocast (`patches`)."""
    return [name for name in ("bf16", "fp16") if recipe.get(name)] if recipe.model.dtype == "float32" else []


def _identity(recipe: Recipe, image_processor: Any) -> dict[str, Any]:
    """Return everything that features depend on but the image: other values make another folder."""
    settings = recipe.model
    return {
        "model": _weights(settings),
        "precision": settings.precision,
        "autocast": _autocast(recipe),
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


def _home(recipe: Recipe) -> Path:
    stated = recipe.run.image_features_dir
    return cache_folder("image_features") if stated is None else Path(stated).expanduser()
