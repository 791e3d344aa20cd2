"""transformers in the environment of llm-compressor, which reads what that library writes."""

from __future__ import annotations

from qwen_vl_sft.serving.base import Served, ServingEngine, Size
from qwen_vl_sft.serving.engines.shared_packages import share_training_packages


def arguments(served: Served) -> list[str]:
    """Return the precision; limits of image sizes are read from the model's folder."""
    return ["--dtype", served.dtype]


def check_arguments(served: Served, size: Size) -> list[str]:
    """Return no further options."""
    return []


def refuses(served: Served) -> str | None:
    """Return None: what cannot be read is told by transformers."""
    return None


ENGINE = ServingEngine(
    name="compressed-tensors",
    title="transformers with compressed-tensors",
    package="compressed-tensors",
    requirements="llm_compressor.txt",
    worker="transformers_worker.py",
    arguments=arguments,
    check_arguments=check_arguments,
    refuses=refuses,
    before_use=share_training_packages,
)
