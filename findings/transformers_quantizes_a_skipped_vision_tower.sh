#!/usr/bin/env bash
# transformers 5.23.0, bitsandbytes 0.50.2: BitsAndBytesConfig(llm_int8_skip_modules=["visual"]) keeps no layer of a Qwen-VL in 16
# bits: the vision tower is in 4 bits as without it, and so is the output head, which an empty setting spares. ["proj"], a layer
# of that tower, spares the attention and the MLPs of the language model. No error, no warning; config.json keeps the list.
#
# Guess before it was run: a name spares the modules of that name with all that is in them, wherever they are in the model
# ("An explicit list of the modules that we do not want to convert in 8-bit", in 4 bits too); a name that spares nothing is
# told; and what is spared without the setting still is.
#
# Seen (Python 3.11, Linux, transformers 5.23.0, bitsandbytes 0.50.2, torch 2.11.0), linear layers in 4 bits, and how far the tower's
# output is from that of 16 bits, the same for Qwen2-VL and Qwen3-VL but for the numbers (those of Qwen2-VL):
#   llm_int8_skip_modules     tower      language model   head     image features off
#   None                      10 of 10   14 of 14         0 of 1   13%
#   ["visual"]                10 of 10   14 of 14         1 of 1   13%
#   ["visual", "lm_head"]     10 of 10   14 of 14         0 of 1   13%
#   ["model.visual"]           0 of 10   14 of 14         1 of 1    0%
#   ["proj"]                   8 of 10    0 of 14         1 of 1   13%
# Why: a name counts where a module's full name begins with it ("model.visual.blocks...") or ends with it ("...q_proj" ends with
# "proj"), and a list replaces the default, the output head. In version 4.57.6 parts of the name count, "visual" among them (read
# in its source, not run), so settings from then lose their effect.
# Who is hurt: who quantizes to fine-tune and leaves the vision tower in 16 bits, as guides for Qwen-VL advise: the tower is as
# coarse as the rest, and the head more than by default; with "proj" the model is nearly as large as unquantized.
# Way around: full names and the head, ["model.visual", "lm_head"]; count the Linear4bit layers after loading.
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'transformers==5.23.0' 'bitsandbytes==0.50.2' 'accelerate==1.15.0' \
    'torch==2.11.0' 'numpy<3'
cat > "$work/skip.py" <<'PY'
import sys
from pathlib import Path

import bitsandbytes
import torch
import transformers

work = Path(sys.argv[1])
text = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320}
text |= {"num_key_value_heads": 2, "head_dim": 64}
tokens = {"vision_start_token_id": 300, "vision_end_token_id": 301, "image_token_id": 302, "video_token_id": 303}
rope = {"rope_type": "default", "rope_theta": 1e6}
tower = {"depth": 2, "hidden_size": 128, "num_heads": 2}
families = {
    "Qwen2-VL": ("Qwen2VL", [8, 12, 12], tower | {"embed_dim": 64}, 14),
    "Qwen3-VL": ("Qwen3VL", [12, 10, 10], tower | {"intermediate_size": 256, "out_hidden_size": 128, "deepstack_visual_indexes": [0]}, 16),
}


def linear_layers(model, part):
    layers = [layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and part in name]
    return [sum(isinstance(layer, bitsandbytes.nn.Linear4bit) for layer in layers), len(layers)]


seen = {}
print(f"{'':<36}{'tower':<11}{'language model':<17}{'head':<9}image features off")
for family, (kind, section, vision, patch) in families.items():
    folder, model_class = str(work / kind), getattr(transformers, f"{kind}ForConditionalGeneration")
    torch.manual_seed(0)
    own = text | {"rope_parameters": rope | {"mrope_section": section}, "tie_word_embeddings": False}
    config = getattr(transformers, f"{kind}Config")(text_config=own, vision_config=vision, tie_word_embeddings=False, **tokens)
    model_class(config).save_pretrained(folder)
    pixels, grid = torch.randn(64, 6 * patch * patch), torch.tensor([[1, 8, 8]])

    def features(model):
        with torch.no_grad():
            return model.eval().model.visual(pixels, grid_thw=grid).pooler_output.float()

    right = features(model_class.from_pretrained(folder, dtype=torch.float32))
    for skip in (None, ["visual"], ["visual", "lm_head"], ["model.visual"], ["proj"]):
        settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skip)
        model = model_class.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)
        counts = [linear_layers(model, part) for part in ("visual", "language_model", "lm_head")]
        off = round(100 * ((features(model) - right).norm() / right.norm()).item())
        seen[family, str(skip)] = [*counts, off]
        shown = [f"{some} of {all_}" for some, all_ in counts]
        print(f"{family:<10}{skip!s:<26}{shown[0]:<11}{shown[1]:<17}{shown[2]:<9}{off}%")
print("transformers", transformers.__version__, "bitsandbytes", bitsandbytes.__version__, "torch", torch.__version__)


def stands(family):
    default, named, with_head, full, part = [seen[key] for key in seen if key[0] == family]
    whole = [default[0][1]] * 2
    tower_in_4_bits = default[0] == named[0] == with_head[0] == whole and min(default[3], named[3], with_head[3]) > 5
    heads = [found[2][0] for found in (default, named, with_head)] == [0, 1, 0]
    return tower_in_4_bits and heads and full[0][0] == full[3] == 0 and part[1][0] == 0 and part[0][0] > 0


sys.exit(0 if all(map(stands, families)) else f"other than stated: {seen}")
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/skip.py" "$work" 2> "$work/log" ||
    { tail -5 "$work/log"; exit 1; }
