"""llama.cpp, as the package xllamacpp, which serves a GGUF file with its mmproj file on CPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_vl_sft.serving.base import Served, ServingEngine, Size
from qwen_vl_sft.serving.engines.shared_packages import share_training_packages

MODEL_FILE, MMPROJ_FILE = "model.gguf", "mmproj.gguf"


def image_tokens(config: dict[str, Any], limits: dict[str, int]) -> dict[str, int]:
    """Return the limits of an image in tokens, of limits in pixels: one token is a square of patch * merge pixels a side.

    Args:
        config: the model's configuration.
        limits: `shortest_edge` and `longest_edge` of the processor's `size`, in pixels of the whole image.
    """
    vision = config["vision_config"]
    pixels = (vision["patch_size"] * vision["spatial_merge_size"]) ** 2
    found = {}
    if limits.get("shortest_edge"):
        found["image-min-tokens"] = max(-(-limits["shortest_edge"] // pixels), 1)
    if limits.get("longest_edge"):
        found["image-max-tokens"] = max(limits["longest_edge"] // pixels, 1)
    return found


def arguments(served: Served) -> list[str]:
    """Return the options of `llama-server` that a model needs: the mmproj file does not hold the limits of image sizes."""
    config = json.loads((served.model / "config.json").read_text(encoding="utf-8"))
    return [word for name, tokens in image_tokens(config, served.limits).items() for word in (f"--{name}", str(tokens))]


def check_arguments(served: Served, size: Size) -> list[str]:
    """Return the options for a check: the context that the longest row needs, and in float32 nothing rounded to f16.

    Otherwise keys and values are, and with flash attention those of the vision tower too.
    """
    context = ["--ctx-size", str(-(-size.tokens // 256) * 256)]
    exact = ["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off"]
    return context + (exact if served.dtype == "float32" else [])


def refuses(served: Served) -> str | None:
    """Return that llama.cpp takes GGUF alone."""
    if (Path(served.model) / MODEL_FILE).is_file():
        return None
    return f"llama.cpp reads {MODEL_FILE} with {MMPROJ_FILE} alone; export first, with scripts/export.py --to gguf."


ENGINE = ServingEngine(
    name="llama.cpp",
    title="llama.cpp",
    package="xllamacpp",
    requirements="llama_cpp.txt",
    worker="llama_cpp_worker.py",
    arguments=arguments,
    check_arguments=check_arguments,
    refuses=refuses,
    before_use=share_training_packages,
    gguf=True,
)
