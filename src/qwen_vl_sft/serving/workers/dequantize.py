"""Write a model of compressed-tensors with its weights unpacked to float32: dequantize.py MODEL OUTPUT.

OUTPUT/rounded.json lists the layers whose inputs are rounded to FP8, each token with its own scale.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText


def main():
    """Unpack, and write everything else as it is."""
    source, output = map(Path, sys.argv[1:])
    config = AutoConfig.from_pretrained(source)
    config.quantization_config["dequantize"] = True
    model = AutoModelForImageTextToText.from_pretrained(source, config=config, dtype=torch.float32)
    rounded = []
    for name, module in model.named_modules():
        inputs = getattr(getattr(module, "quantization_scheme", None), "input_activations", None)
        if inputs is not None:
            assert (str(inputs.type), inputs.num_bits, inputs.dynamic) == ("float", 8, True), inputs
            rounded.append(name)
    scales = {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if hasattr(module, "quantization_scheme")
        for own, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if own not in ("weight", "bias")
    }
    weights = {name: value.contiguous().clone() for name, value in model.state_dict().items() if name not in scales}
    output.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, output / file.name)
    stated = json.loads((source / "config.json").read_text(encoding="utf-8"))
    del stated["quantization_config"]
    (output / "config.json").write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")
    (output / "rounded.json").write_text(json.dumps(rounded), encoding="utf-8")
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
