#!/usr/bin/env bash
# peft 0.21.2: unload(), which is to "return the base model by removing all the PEFT modules", returns one in which the modules of
# modules_to_save stay as they were trained: a model without adapter that answers neither as the base nor as the tuned model.
# No error, no warning. LoRA, and tokens of trainable_token_indices, are taken out.
#
# Guess before it was run: what unload() returns is the base model, as under disable_adapter(), which uses the modules' originals;
# PEFT keeps a copy of them for that ("or they might want to unload the base model. To allow this functionality, we need to keep a
# copy of the original weights", a maintainer in
# https://github.com/huggingface/peft/issues/551).
#
# Seen (Python 3.11, Linux, peft 0.21.2, transformers 5.23.0, torch 2.11.0), a Qwen2-VL after 20 steps of AdamW; how far the logits
# are from the base model's, as a share of what training changed:
#                                    disable_adapter()   unload()   unload(), after the way around
#   LoRA                              0%                  0%         0%
#   LoRA, trained tokens              0%                  0%         0%
#   LoRA, lm_head in full             0%                 80%         0%
#   LoRA, embed_tokens in full        0%                 67%         0%
#   LoRA, the merger in full          0%                 83%         0%
# Why: unload() and merge_and_unload() share one function, which puts the active adapter's module in the place of each wrapper,
# whether it merges or not. (https://github.com/huggingface/peft/pull/3455 mended a crash of that function, not what it
# returns.)
# Who is hurt: who trains the merger or the output head beside LoRA, as recipes for new domains and new tokens do, and scores the base
# next to the tuned model with unload(): the base's score is that of a mixture; so is what is saved, or trained further.
# Way around: disable_adapter(), or load the base again; or put the originals back first, as below.
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'peft==0.21.2' 'transformers==5.23.0' 'accelerate==1.15.0' \
    'torch==2.11.0' 'numpy<3'
cat > "$work/unload.py" <<'PY'
import sys

import peft
import torch
import transformers

rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.1}
text |= {"num_key_value_heads": 2, "vocab_size": 320, "rope_parameters": rope}
vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 2}
tokens = {"vision_start_token_id": 300, "vision_end_token_id": 301, "image_token_id": 302, "video_token_id": 303}
torch.manual_seed(0)
question = torch.tensor([[10, 11, 300, *[302] * 4, 301, 12, 13]])
image = {"pixel_values": torch.randn(16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def base():
    torch.manual_seed(1)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    return transformers.Qwen2VLForConditionalGeneration(config)


def forward(model, ids, **more):
    return model(input_ids=ids, mm_token_type_ids=(ids == 302).int(), **image, **more)


@torch.no_grad()
def logits(model):
    return forward(model.eval(), question).logits


def trained(**more):
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], **more)
    model = peft.get_peft_model(base(), config)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=3e-3)
    for _ in range(20):
        ids = torch.cat([question, torch.randint(14, 290, (1, 20)), question[:, :2]], 1)
        forward(model, ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def put_originals_back(model):
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, peft.utils.ModulesToSaveWrapper):
                setattr(module, name, child.original_module)


before, seen = logits(base()), {}
print(f"{'':<32}disable_adapter()   unload()   unload(), after the way around")
for name, more in {
    "LoRA": {},
    "LoRA, trained tokens": {"trainable_token_indices": [10, 11, 12]},
    "LoRA, lm_head in full": {"modules_to_save": ["lm_head"]},
    "LoRA, embed_tokens in full": {"modules_to_save": ["embed_tokens"]},
    "LoRA, the merger in full": {"modules_to_save": ["merger"]},
}.items():
    model = trained(**more)
    change = (logits(model) - before).norm()
    with model.disable_adapter():
        found = [logits(model)]
    found.append(logits(model.unload()))
    model = trained(**more)
    put_originals_back(model)
    found.append(logits(model.unload()))
    seen[name] = [round(100 * ((value - before).norm() / change).item()) for value in found]
    print(f"{name:<32}{seen[name][0]:>3}%{seen[name][1]:>19}%{seen[name][2]:>10}%")
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
right = all(found[0] == 0 and found[2] == 0 for found in seen.values()) and [f[1] for f in seen.values()][:2] == [0, 0]
sys.exit(0 if right and all(f[1] > 10 for f in list(seen.values())[2:]) else f"other than stated: {seen}")
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/unload.py" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
