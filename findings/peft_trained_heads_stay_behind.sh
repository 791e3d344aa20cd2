#!/usr/bin/env bash
# peft 0.21.2: a trained output head (modules_to_save), and trained tokens (trainable_token_indices), do not follow their adapter.
# merge_and_unload(adapter_names=["two"]) merges the LoRA weights of "two" and takes the head of the adapter that is active, "one"
# say; add_weighted_adapter makes an adapter with the head and tokens of the base model. No error, no warning.
#
# Guess before it was run: an adapter is its LoRA weights and the modules saved with it, as for set_adapter, save_pretrained and
# load_adapter. So "two" merged by its name is the model that answers while "two" is active, and an adapter that is combined from
# "two" alone, with weight 1, is "two". (add_weighted_adapter refuses several adapters with the same trained module, and those of
# target_parameters, rather than to combine them otherwise.)
#
# Seen (Python 3.11, Linux, peft 0.21.2, transformers 5.23.0, torch 2.11.0), a Qwen2-VL with two adapters; how far the logits are
# from those of "two", as a share of what "two" changes:
#                         two merged while one is active   two merged while two is active   two combined alone
#   LoRA                         0%                            0%                            0%
#   LoRA and output head        62%                            0%                           86%
#   LoRA and tokens              0%                            0%                           65%
# The head of the merged model is bit by bit that of "one", and the head of the combined adapter, also in the file that
# save_pretrained writes, that of the base.
# Who is hurt: who trains new tokens or the head beside LoRA, keeps several checkpoints or tasks on one base, and merges or mixes
# them: LoRA weights meet a head that they were not trained with.
# Way around: set_adapter("two") before merge_and_unload(); after add_weighted_adapter, copy `modules_to_save["two"]` by hand.
# (Issue 3761 is the same method's scaling of rank-stabilized LoRA, DoRA and lora_bias.)
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'peft==0.21.2' 'transformers==5.23.0' 'accelerate==1.15.0' \
    'torch==2.11.0' 'numpy<3'
cat > "$work/heads.py" <<'PY'
import sys
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file

rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.1}
text |= {"num_key_value_heads": 2, "vocab_size": 320, "rope_parameters": rope}
vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 2}
tokens = {"vision_start_token_id": 300, "vision_end_token_id": 301, "image_token_id": 302, "video_token_id": 303}
work, ids = Path(sys.argv[1]), torch.arange(10, 30)[None]


def base():
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    return transformers.Qwen2VLForConditionalGeneration(config)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def train(model, seed):
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(20):
        batch = torch.randint(0, 290, (4, 20))
        batch[:, :10] = ids[0, :10]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


seen, heads = {}, {}
print(f"{'':<24}two merged while one is active   two merged while two is active   two combined alone")
before = logits(base())
for name, more in {
    "LoRA": {},
    "LoRA and output head": {"modules_to_save": ["lm_head"]},
    "LoRA and tokens": {"trainable_token_indices": list(range(10, 20))},
}.items():

    def settings():
        return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], **more)

    def with_adapters(names):
        torch.manual_seed(3)
        model = peft.get_peft_model(base(), settings(), adapter_name=names[0])
        for other in names[1:]:
            model.add_adapter(other, settings())
        for seed, adapter in enumerate(names):
            model.set_adapter(adapter)
            train(model, seed)
        return model

    def off(found, right):
        return round(100 * ((found - right).norm() / (right - before).norm()).item())

    found = []
    for active in ("one", "two"):
        model = with_adapters(["one", "two"])
        right = logits(model)
        if "modules_to_save" in more:
            heads |= {key: model.base_model.model.lm_head.modules_to_save[key].weight.detach().clone() for key in ("one", "two")}
        model.set_adapter(active)
        merged = model.merge_and_unload(adapter_names=["two"])
        found.append(off(logits(merged), right))
        if "modules_to_save" in more and active == "one":
            heads["merged"] = merged.lm_head.weight.detach().clone()
    model = with_adapters(["two"])
    right = logits(model)
    model.add_weighted_adapter(["two"], [1.0], "alone", combination_type="svd")
    model.set_adapter("alone")
    found.append(off(logits(model), right))
    if "modules_to_save" in more:
        model.save_pretrained(work, selected_adapters=["alone"])
        written = load_file(work / "alone" / "adapter_model.safetensors")
        heads["alone"] = next(value for key, value in written.items() if "lm_head" in key)
    seen[name] = found
    print(f"{name:<24}{found[0]:>8}%{found[1]:>29}%{found[2]:>29}%")
same = [torch.equal(heads["merged"], heads["one"]), torch.equal(heads["alone"], base().lm_head.weight)]
print("merged head is that of one:", same[0], " combined head is the base's:", same[1])
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
plain, head, token = seen.values()
right = plain == [0, 0, 0] and head[1] == 0 and token[:2] == [0, 0]
sys.exit(0 if right and min(head[0], head[2], token[2]) > 10 and all(same) else f"other than stated: {seen}")
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/heads.py" "$work" 2> "$work/log" ||
    { tail -5 "$work/log"; exit 1; }
