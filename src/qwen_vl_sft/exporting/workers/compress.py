"""Quantize a model folder with llm-compressor: compress.py MODEL OUTPUT SCHEME, the scheme W4A16 or FP8.

The language model's linear layers are quantized. The vision tower and the output head stay as they are.
"""

import json
import sys
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForImageTextToText

IGNORED = ["re:.*lm_head", "re:.*visual.*"]
GROUPS = (128, 64, 32)


def scheme_of(name, model):
    """Return what the modifier is told: FP8 by channel, or 4 bits by the largest group that fits all layers."""
    if name == "FP8":
        return {"scheme": "FP8_DYNAMIC"}
    layers = [
        module.in_features
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "visual" not in path and "lm_head" not in path
    ]
    group = next((size for size in GROUPS if not any(width % size for width in layers)), None)
    if group is None:
        sys.exit(f"no group of {GROUPS} divides the widths of all layers")
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def main():
    """Quantize and write."""
    folder, output, name = sys.argv[1:]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    oneshot(model=model, recipe=QuantizationModifier(targets=["Linear"], ignore=IGNORED, **scheme_of(name, model)))
    model.save_pretrained(output, save_compressed=True)
    # The names that it lists are those of the file (visual.blocks...), and transformers looks for those of the model
    # (model.visual.blocks...): the vision tower would be taken for quantized, and get random weights.
    path = Path(output) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"]["ignore"] += IGNORED
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
