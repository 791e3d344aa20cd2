"""transformers with PEFT, in the environment of llm-compressor and so with compressed-tensors, which reads its exports."""

from __future__ import annotations

from qwen_vl_sft.serving.base import Served, ServingEngine, Size
from qwen_vl_sft.serving.engines.shared_packages import share_training_packages


def arguments(served: Served) -> list[str]:
    """Return the limits of image sizes that an adapter needs, whose base has others; a whole model's folder has its own."""
    return [word for name, pixels in served.limits.items() for word in (f"--{name}", str(pixels))]


def check_arguments(served: Served, size: Size) -> list[str]:
    """Return the precision."""
    return ["--dtype", served.dtype]


def refuses(served: Served) -> str | None:
    """Return None: what cannot be read is told by transformers."""
    return None


ENGINE = ServingEngine(
    name="transformers",
    title="transformers",
    package="transformers",
    requirements="llm_compressor.txt",
    worker="transformers_worker.py",
    arguments=arguments,
    check_arguments=check_arguments,
    refuses=refuses,
    before_use=share_training_packages,
)
