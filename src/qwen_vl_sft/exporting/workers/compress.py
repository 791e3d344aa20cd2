"""Quantize a model folder with llm-compressor: compress.py MODEL OUTPUT SCHEME ROWS, the scheme W4A16, AWQ or FP8.

The language model's linear layers are quantized. The vision tower and the output head stay as they are. ROWS is a folder of
inputs of the model (safetensors) for calibration: W4A16 is GPTQ with them and rounded to nearest without; AWQ needs them.
"""

import json
import sys
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText

IGNORED = ["re:.*lm_head", "re:.*visual.*"]
GROUPS = (128, 64, 32)
LAYER = r"re:.*language_model\.layers\.\d+\."
# What AWQ scales before which layers. llm-compressor's own list also meets vision towers whose layers have these names.
SMOOTHED = (
    (r"input_layernorm$", (r"self_attn\.q_proj$", r"self_attn\.k_proj$", r"self_attn\.v_proj$")),
    (r"self_attn\.v_proj$", (r"self_attn\.o_proj$",)),
    (r"post_attention_layernorm$", (r"mlp\.gate_proj$", r"mlp\.up_proj$")),
    (r"mlp\.up_proj$", (r"mlp\.down_proj$",)),
)


def groups_of(model, symmetric):
    """Return 4 bits by the largest group that fits all layers."""
    layers = [
        module.in_features
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "visual" not in path and "lm_head" not in path
    ]
    group = next((size for size in GROUPS if not any(width % size for width in layers)), None)
    if group is None:
        sys.exit(f"no group of {GROUPS} divides the widths of all layers")
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def recipe_of(name, model, calibrated):
    """Return the modifiers of a scheme."""
    common = {"targets": ["Linear"], "ignore": IGNORED}
    if name == "FP8":
        return [QuantizationModifier(scheme="FP8_DYNAMIC", **common)]
    if name == "AWQ":
        mappings = [
            AWQMapping(f"{LAYER}{before}", [f"{LAYER}{layer}" for layer in layers]) for before, layers in SMOOTHED
        ]
        return [AWQModifier(mappings=mappings), QuantizationModifier(**groups_of(model, symmetric=False), **common)]
    modifier = GPTQModifier if calibrated else QuantizationModifier
    return [modifier(**groups_of(model, symmetric=True), **common)]


def main():
    """Quantize and write."""
    folder, output, name, rows = sys.argv[1:]
    files = sorted(Path(rows).glob("*.safetensors"))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    if not torch.accelerator.is_available():
        # AWQ (llm-compressor 0.14.0.1) pins memory in any case, which needs an accelerator's driver.
        IntermediatesCache.pin_memory = lambda *given: None
    calibration = {}
    if files and name != "FP8":
        inputs = [load_file(file) for file in files]
        loader: DataLoader = DataLoader(inputs, batch_size=None)  # type: ignore[arg-type]
        calibration = {"dataset": loader, "num_calibration_samples": len(inputs)}
    oneshot(model=model, recipe=recipe_of(name, model, bool(files)), **calibration)
    model.save_pretrained(output, save_compressed=True)
    # The names that it lists are those of the file (visual.blocks...), and transformers looks for those of the model
    # (model.visual.blocks...): the vision tower would be taken for quantized, and get random weights.
    path = Path(output) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"]["ignore"] += IGNORED
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
