#!/usr/bin/env bash
# peft 0.21.2: hotswap_adapter puts lora_alpha / r on every layer of an adapter that has alpha_pattern or rank_pattern, so that
# layers the patterns name get another scaling than from_pretrained gives them. An adapter swapped for itself answers otherwise
# than before: no error, no warning. (The function compares the two alpha_pattern and refuses others, so equal ones are meant
# to work.)
#
# Guess before it was run: after a swap the model is the one that from_pretrained loads, scalings included, as it is for adapters
# without patterns, other ranks and alphas among them.
#
# Seen (Python 3.11, Linux, peft 0.21.2, transformers 5.23.0, torch 2.11.0), r=8, lora_alpha=8; scalings of a layer's q_proj, v_proj:
#   settings of the adapter            from_pretrained   after the swap   logits off
#   no pattern                         1, 1              1, 1             0%
#   no pattern, lora_alpha=4           0.5, 0.5          0.5, 0.5         0%
#   alpha_pattern={"v_proj": 32}       1, 4              1, 1             35%
#   rank_pattern={"q_proj": 2}         4, 1              1, 1             4%
# Why: hotswap_adapter_from_state_dict matches the patterns with names of weights, which end in .lora_A.default.weight, and not
# with those of layers.
# Who is hurt: who serves one base, changes its adapters in place (a compiled model need not be compiled again), and trained
# them with patterns: here layers count a quarter of what was trained.
# Way around: load_adapter under another name, set_adapter and delete_adapter instead of the swap.
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'peft==0.21.2' 'transformers==5.23.0' 'accelerate==1.15.0' \
    'torch==2.11.0' 'numpy<3'
cat > "$work/swap.py" <<'PY'
import sys
from pathlib import Path

import peft
import torch
import transformers
from peft.utils.hotswap import hotswap_adapter

work, ids = Path(sys.argv[1]), torch.arange(10, 20)[None]
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
sizes |= {"num_key_value_heads": 2, "vocab_size": 320, "initializer_range": 0.1}


def base():
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes)).eval()


def write(name, **settings):
    config = peft.LoraConfig(**{"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | settings)
    model = peft.get_peft_model(base(), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(work / name)


def state(model):
    layers = model.get_base_model().model.layers[0].self_attn
    return [layers.q_proj.scaling["default"], layers.v_proj.scaling["default"]], model.eval()(input_ids=ids).logits


seen = {}
print(f"{'settings of the adapter':<35}from_pretrained   after the swap   logits off")
for name, first, settings in (
    ("no pattern", {}, {}),
    ("no pattern, lora_alpha=4", {}, {"lora_alpha": 4}),
    ('alpha_pattern={"v_proj": 32}', {"alpha_pattern": {"v_proj": 32}}, {"alpha_pattern": {"v_proj": 32}}),
    ('rank_pattern={"q_proj": 2}', {"rank_pattern": {"q_proj": 2}}, {"rank_pattern": {"q_proj": 2}}),
):
    write("first", **first)
    write("second", **settings)
    with torch.no_grad():
        scalings, right = state(peft.PeftModel.from_pretrained(base(), work / "second"))
        model = peft.PeftModel.from_pretrained(base(), work / "first")
        hotswap_adapter(model, work / "second", adapter_name="default")
        swapped, found = state(model)
    off = round(100 * ((found - right).norm() / right.norm()).item())
    seen[name] = [scalings, swapped, off > 0]
    cells = [", ".join(f"{value:g}" for value in values) for values in (scalings, swapped)]
    print(f"{name:<35}{cells[0]:<18}{cells[1]:<17}{off}%")
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
expected = [[[1, 1], [1, 1], False], [[0.5, 0.5], [0.5, 0.5], False], [[1, 4], [1, 1], True], [[4, 1], [1, 1], True]]
sys.exit(f"other than stated: {seen}" if list(seen.values()) != expected else 0)
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/swap.py" "$work" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
