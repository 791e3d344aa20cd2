"""An adapter as GGUF, for llama.cpp on its base: which adapters it takes, and their matrices for the converter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.families.base import ModelFamily
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.merging.adapter import Adapter, LowRank, read_adapter
from qwen_vl_sft.modeling.base_model import build_on_meta


def write_pairs(settings: ModelSettings, base: Path, adapter: Path, file: Path) -> None:
    """Write the two matrices of each layer, "NAME.a" [r, in] and "NAME.b" [out, r] with the scaling, in float32.

    Args:
        settings: of the base model, whose files are in `base`.
        base: the folder of the base model.
        adapter: the folder of the adapter.
        file: the safetensors file to write.

    Raises `UserError` for an adapter that llama.cpp does not take.
    """
    from safetensors.torch import save_file

    model = build_on_meta(replace(settings, model_name_or_path=str(base), model_revision="main"))
    family = family_of(model.config)
    found = read_adapter(adapter, model)
    if reason := next(problems(found, family), None):
        raise UserError(
            f"--to gguf: {reason}, which llama.cpp does not take as an adapter; merge it first: python scripts/merge.py --run"
            f" {adapter} --output_dir merged"
        )
    tensors = {}
    for name, pair in found.pairs.items():
        assert isinstance(pair, LowRank)
        _, inside, rest = name.rpartition(f"{family.language}.")
        layer = f"model.{rest}" if inside else name
        tensors[f"{layer}.a"] = pair.a.float().contiguous()
        tensors[f"{layer}.b"] = (pair.b.float() * pair.scaling).contiguous()
    save_file(tensors, file)


def problems(adapter: Adapter, family: ModelFamily) -> Iterator[str]:
    """Yield what of an adapter llama.cpp has no place for: its adapters are pairs on linear layers of the language model."""
    if adapter.whole:
        yield f"{next(iter(adapter.whole))} was trained in full (lora_modules_to_save)"
    for name, pair in adapter.pairs.items():
        if family.part_of(name) != "language":
            yield f"the adapter reaches {name}, outside the language model"
        elif not isinstance(pair, LowRank):
            yield f"the adapter is on the experts of {name}"
        elif pair.magnitude is not None:
            yield "the adapter is DoRA (use_dora)"
        elif ".linear_attn." in name:
            yield f"the adapter is on linear attention ({name}), whose heads the converter puts in another order"
