#!/usr/bin/env bash
# peft 0.21.2: LoraConfig(target_modules="all-linear", exclude_modules=["visual"]) excludes no layer of a Qwen-VL: the vision tower
# gets LoRA as without it. No error, no warning, although peft warns of an exclude_modules that excludes nothing: the tower itself
# counts as excluded, and its layers are taken. ["model.visual"] does the same.
#
# Guess before it was run: what is inside an excluded module is excluded too, or the warning comes, as it does for a name that is
# not in the model.
#
# Seen (Python 3.11, Linux, peft 0.21.2, transformers 5.23.0, torch 2.11.0), linear layers with LoRA:
#                                    Qwen2-VL          Qwen2.5-VL        Qwen3-VL
#   exclude_modules                  tower  language   tower  language   tower  language
#   None                             10     14         12     14         12     14
#   ["visual"]                       10     14         12     14         12     14
#   ["model.visual"]                 10     14         12     14         12     14
#   "visual"                         10     14         12     14         12     14   warning
#   ["vision_tower"]                 10     14         12     14         12     14   warning
#   r".*\bvisual\b.*"                 0     14          0     14          0     14
# Why: a name of a list counts where it is the end of a layer's full name ("model.visual"), as its documentation says, not where
# the layer lies in it; the warning comes only where no module at all was excluded, and the tower itself was.
# Who is hurt: who means to train the language model alone: the tower is trained as well, in more memory, and an engine that
# serves adapters without their vision part (vLLM unless told) then answers with another model than was trained.
# Way around: one regular expression for the full name, as in the last row; print_trainable_parameters() tells.
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'peft==0.21.2' 'transformers==5.23.0' 'accelerate==1.15.0' \
    'torch==2.11.0' 'numpy<3'
cat > "$work/exclude.py" <<'PY'
import sys
import warnings

import peft
import torch
import transformers

text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320}
text |= {"num_key_value_heads": 2, "head_dim": 32}
tokens = {"vision_start_token_id": 300, "vision_end_token_id": 301, "image_token_id": 302, "video_token_id": 303}
vision = {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "out_hidden_size": 64}
families = {
    "Qwen2-VL": ("Qwen2VL", [4, 6, 6], {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2}),
    "Qwen2.5-VL": ("Qwen2_5_VL", [4, 6, 6], vision | {"fullatt_block_indexes": [0]}),
    "Qwen3-VL": ("Qwen3VL", [6, 5, 5], vision | {"deepstack_visual_indexes": [0]}),
}


def new(family):
    kind, section, tower = families[family]
    own = text | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}}
    config = getattr(transformers, f"{kind}Config")(text_config=own, vision_config=tower, **tokens)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def adapted(family, exclude):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        settings = peft.LoraConfig(r=4, target_modules="all-linear", exclude_modules=exclude)
        model = peft.get_peft_model(new(family), settings)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, peft.tuners.lora.Linear)]
    warned = any("no modules were excluded" in str(warning.message) for warning in told)
    return [sum(part in name for name in layers) for part in ("visual", "language_model")], warned


seen = {}
print(f"{'':<25}{''.join(f'{family:<17}' for family in families)}layers of tower and language model with LoRA")
for exclude in (None, ["visual"], ["model.visual"], "visual", ["vision_tower"], r".*\bvisual\b.*"):
    found = [adapted(family, exclude) for family in families]
    seen[str(exclude)] = found
    counts = "".join(f"{tower:<7}{language:<10}" for (tower, language), _ in found)
    print(f"{exclude!s:<25}{counts}{'warning' if found[0][1] else ''}")
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
everything, *silent, exact, other, pattern = seen.values()
stands = everything == silent[0] == silent[1] and not any(warned for _, warned in everything)
warned = all(warned for found in (exact, other) for _, warned in found)
spared = all(tower == 0 and language == 14 for (tower, language), _ in pattern)
sys.exit(0 if stands and warned and spared and everything[0][0][0] > 0 else f"other than stated: {seen}")
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/exclude.py" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
