"""The engines, by the name that the command line takes."""

from __future__ import annotations

from qwen_vl_sft.errors import UserError, quoted
from qwen_vl_sft.serving.base import ServingEngine
from qwen_vl_sft.serving.engines import llama_cpp, transformers, transformers_4, vllm

ENGINES: dict[str, ServingEngine] = {
    engine.name: engine for engine in (vllm.ENGINE, llama_cpp.ENGINE, transformers.ENGINE, transformers_4.ENGINE)
}


def engine_named(name: str) -> ServingEngine:
    """Return an engine by its name. Raises `UserError`."""
    if name not in ENGINES:
        raise UserError(f"--engine: {quoted(name)} is none of {', '.join(ENGINES)}")
    return ENGINES[name]
