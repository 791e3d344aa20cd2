"""Make models of a real shape with random weights, for benchmarks and for tests without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from qwen_vl_sft.errors import UserError, first_line, quoted


def make_random_model(
    config: str,
    output_dir: Path,
    processor: str | None = None,
    dtype: str = "bfloat16",
    overrides: dict[str, Any] | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> int:
    """Write a model with random weights and its processor; returns the number of parameters.

    Args:
        config: local folder or Hub id with a `config.json`.
        output_dir: a new or empty folder.
        processor: local folder or Hub id of the processor, `config` by default.
        dtype: precision of the weights.
        overrides: changes to the configuration; nested for `text_config` and `vision_config`.
        seed: seed of the weights. They are the same on one kind of device only.
        device: where the weights are drawn.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"output_dir: {output_dir} exists and is not empty; name another folder")
    try:
        shape = AutoConfig.from_pretrained(config)
        tokens = AutoProcessor.from_pretrained(processor or config)
    except (OSError, ValueError) as error:
        raise UserError(f"config {config}, processor {processor or config}: {first_line(error)}") from None
    try:
        shape = _overridden(shape, overrides or {})
        with torch.device("meta"):  # what makes no model is told before memory is taken for it
            AutoModelForImageTextToText.from_config(shape)
    except (ValueError, RuntimeError, StrictDataclassError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"config {config}, overrides {overrides}: no model: {' '.join(str(error).split())}") from None
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(shape, dtype=getattr(torch, dtype))
    vocabulary = tokens.tokenizer.get_vocab()
    side = getattr(shape.vision_config, "patch_size", None)
    if side is not None and getattr(tokens.image_processor, "patch_size", side) != side:
        tokens.image_processor.patch_size = side  # the processor is another family's
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=vocabulary.get("<|endoftext|>"),
        eos_token_id=[vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]],
        pad_token_id=tokens.tokenizer.pad_token_id,
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output_dir)
    tokens.save_pretrained(output_dir)
    return sum(parameter.numel() for parameter in model.parameters())


def _overridden(config: Any, changes: dict[str, Any]) -> Any:
    if not isinstance(changes, dict):
        raise UserError(f'overrides: {quoted(changes)} is no object; write one such as {{"text_config": {{...}}}}')
    values = config.to_dict()
    for part, part_changes in changes.items():
        if part not in values:
            raise UserError(f"overrides: the configuration has no {part}; it has {', '.join(sorted(values))}")
        if not isinstance(part_changes, dict):
            values[part] = part_changes
            continue
        for name, value in part_changes.items():
            if name not in values[part]:
                raise UserError(f"overrides: {part} has no {name}; it has {', '.join(sorted(values[part]))}")
            values[part][name] = value
        # It has one entry per layer, so it is rebuilt for the number of layers.
        values[part].pop("layer_types", None)
    return type(config).from_dict(values)
