#!/usr/bin/env bash
# transformers 5.23.0: a DoRA adapter that `load_adapter` loads, or `from_pretrained` of the adapter's folder, has lost its trained
# magnitudes: each layer gets the norms of the base's weights, as before training. The model answers otherwise than the one that
# was trained, without an error. A load report names the vectors as UNEXPECTED under one name and as MISSING under another,
# and says that the former "can be ignored when loading from different task/architecture". LoRA without DoRA loads right.
#
# Guess before it was run: load_adapter, which is documented for adapters that PEFT saved, loads what PeftModel.from_pretrained
# loads; and what the model's own save_pretrained writes after add_adapter, its load_adapter reads as it was.
#
# Seen (Python 3.11, Linux, transformers 5.23.0, peft 0.21.2, torch 2.11.0), 20 steps of AdamW on random tokens; how far the logits
# are from the trained model's, as a share of what training the adapter had changed:
#                            PeftModel.from_pretrained   load_adapter   from_pretrained   add_adapter, saved, load_adapter
#   Qwen2     LoRA            0%                          0%             0%                0%
#   Qwen2     DoRA            0%                         26%            26%               26%
#   Qwen2-VL  LoRA            0%                          0%             0%                0%
#   Qwen2-VL  DoRA            0%                         17%            17%               17%
# Why: the file has "...lora_magnitude_vector", the module "...lora_magnitude_vector.default.weight"; PEFT's own loader adds both
# words, that of transformers "default" alone.
# Who is hurt: who trains with use_dora and loads the adapter as transformers' documentation of PEFT shows, its pipelines
# of an adapter's folder included: part of what was trained is missing.
# Way around: PeftModel.from_pretrained(base, folder).
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'transformers==5.23.0' 'peft==0.21.2' 'accelerate==1.15.0' \
    'torch==2.11.0' 'numpy<3'
cat > "$work/dora.py" <<'PY'
import sys
from pathlib import Path

import peft
import torch
import transformers

text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
text |= {"num_key_value_heads": 2, "vocab_size": 320, "initializer_range": 0.1}
rope = {"rope_type": "default", "rope_theta": 1e6}
vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 2}
tokens = {"vision_start_token_id": 300, "vision_end_token_id": 301, "image_token_id": 302, "video_token_id": 303}
own = text | {"rope_parameters": rope | {"mrope_section": [4, 6, 6]}}
bases = {
    "Qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**text, rope_parameters=rope)),
    "Qwen2-VL": (
        transformers.Qwen2VLForConditionalGeneration,
        transformers.Qwen2VLConfig(text_config=own, vision_config=vision, **tokens),
    ),
}
work, ids = Path(sys.argv[1]), torch.arange(10, 30)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def train(model):
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(20):
        batch = torch.randint(0, 290, (4, 20))
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return logits(model)


seen = {}
print(f"{'':<18}{'PeftModel':<13}{'load_adapter':<15}{'from_pretrained':<18}add_adapter, saved, load_adapter")
for name, (model_class, config) in bases.items():
    base = str(work / name)
    torch.manual_seed(0)
    model_class(config).save_pretrained(base)

    def load():
        return model_class.from_pretrained(base, dtype=torch.float32)

    for dora in (False, True):
        settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=dora)
        by_peft, by_model = (str(work / f"{name}_{dora}_{saved_by}") for saved_by in ("peft", "model"))
        torch.manual_seed(2)
        trained = peft.get_peft_model(load(), settings)
        first = train(trained)
        trained.save_pretrained(by_peft)
        torch.manual_seed(2)
        trained = load()
        trained.add_adapter(settings)
        second = train(trained)
        trained.save_pretrained(by_model)
        again, own_again = load(), load()
        again.load_adapter(by_peft)
        own_again.load_adapter(by_model)
        found = {
            "peft": (logits(peft.PeftModel.from_pretrained(load(), by_peft)), first),
            "load_adapter": (logits(again), first),
            "from_pretrained": (logits(model_class.from_pretrained(by_peft, dtype=torch.float32)), first),
            "own": (logits(own_again), second),
        }
        before = logits(load())
        off = [round(100 * ((a - b).norm() / (b - before).norm()).item()) for a, b in found.values()]
        seen[name, dora] = off
        print(f"{name:<10}{'DoRA' if dora else 'LoRA':<8}{off[0]:>3}%{off[1]:>15}%{off[2]:>14}%{off[3]:>17}%")
print("transformers", transformers.__version__, "peft", peft.__version__, "torch", torch.__version__)
right = all(seen[name, False] == [0, 0, 0, 0] and seen[name, True][0] == 0 for name in bases)
lost = all(min(seen[name, True][1:]) > 10 for name in bases)
sys.exit(0 if right and lost else f"other than stated: {seen}")
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/dora.py" "$work" 2> "$work/log" ||
    { tail -5 "$work/log"; exit 1; }
