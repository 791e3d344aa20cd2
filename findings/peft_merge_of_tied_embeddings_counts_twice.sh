#!/usr/bin/env bash
# peft 0.21.2: LoRA on the embeddings of a model whose output head is tied to them, with ensure_weight_tying=True, trains one
# pair of matrices for both; merge_and_unload (and merge_adapter) then adds their product to the shared weight twice, once for
# each layer. The merged model answers otherwise than the adapter, without an error. When the adapter is made, a warning says
# that tied layers "can lead to complications", with ensure_weight_tying as without it.
#
# Guess before it was run: with tied adapters the merge is exact, W + B A in both layers, which one tied weight can hold; that is
# what the option is for ("This will ensure that the adapters added to the tied layers are also tied").
#
# Seen (Python 3.11, Linux, peft 0.21.2, transformers 5.23.0, torch 2.11.0); share of the logits by which the merged model is off:
#                        change of the weight / (B A)   embeddings   head   logits off
#   Qwen2, tied                                         2.0          2.0    31%
#   Qwen2-VL, tied                                      2.0          2.0    32%
#   Qwen2-VL, untied                                    1.0          0.0    0%
#   Qwen2-VL, tied, after the way around                1.0          1.0    0%
# Why: _unload_and_optionally_merge merges every layer that has an adapter, and both of them hold the same weight. (Issue 2018,
# before the option existed, is about adapters on one of the two; issue 2864 plans what the option does.)
# Who is hurt: who teaches new tokens to Qwen2-VL-2B, Qwen2.5-VL-3B, Qwen3-VL-2B or 4B with LoRA on embed_tokens, and serves the
# merged model, which has twice the trained change in its embeddings.
# Way around: merge with half of the head's and half of the embeddings' scaling, `layer.scaling["default"] /= 2` on both; or use
# modules_to_save=["embed_tokens"] with ensure_weight_tying, which merges exactly.
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'peft==0.21.2' 'transformers==5.23.0' 'accelerate==1.15.0' \
    'torch==2.11.0' 'numpy<3'
cat > "$work/merge.py" <<'PY'
import sys

import peft
import torch
import transformers

text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
text |= {"num_key_value_heads": 2, "vocab_size": 320, "initializer_range": 0.1}
rope = {"rope_type": "default", "rope_theta": 1e6}
vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 2}
tokens = {"vision_start_token_id": 300, "vision_end_token_id": 301, "image_token_id": 302, "video_token_id": 303}


def new(kind, tied):
    torch.manual_seed(0)
    if kind == "Qwen2":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**text, rope_parameters=rope, tie_word_embeddings=tied))
    own = text | {"rope_parameters": rope | {"mrope_section": [4, 6, 6]}, "tie_word_embeddings": tied}
    config = transformers.Qwen2VLConfig(text_config=own, vision_config=vision, tie_word_embeddings=tied, **tokens)
    return transformers.Qwen2VLForConditionalGeneration(config)


def merged(kind, tied, way_around=False):
    model, ids = new(kind, tied), torch.arange(10, 20)[None]
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    before = [layer.weight.detach().clone() for layer in layers]
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["embed_tokens"], ensure_weight_tying=tied)
    model = peft.get_peft_model(model, config).eval()
    pair = [value for name, value in model.named_parameters() if "lora_embedding_" in name]
    for value in pair:
        torch.nn.init.normal_(value, std=0.1)
    embeddings = model.get_input_embeddings()
    update = (embeddings.lora_embedding_B["default"] @ embeddings.lora_embedding_A["default"]).T.detach()
    right = model(input_ids=ids).logits.detach()
    if way_around:
        for layer in (embeddings, model.get_output_embeddings()):
            layer.scaling["default"] /= 2
    model = model.merge_and_unload()
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    times = [round(((layer.weight - old) / update).median().item(), 2) for layer, old in zip(layers, before)]
    off = (model(input_ids=ids).logits - right).norm() / right.norm()
    return [*times, round(100 * off.item())]


seen = {}
print(f"{'':<22}change of the weight / (B A)   embeddings   head   logits off")
for name, (kind, *more) in {
    "Qwen2, tied": ("Qwen2", True),
    "Qwen2-VL, tied": ("Qwen2-VL", True),
    "Qwen2-VL, untied": ("Qwen2-VL", False),
    "Qwen2-VL, tied, after the way around": ("Qwen2-VL", True, True),
}.items():
    with torch.no_grad():
        seen[name] = merged(kind, *more)
    print(f"{name:<53}{seen[name][0]:<13}{seen[name][1]:<7}{seen[name][2]}%")
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
doubled = all(found[:2] == [2.0, 2.0] and found[2] > 5 for found in list(seen.values())[:2])
right = list(seen.values())[2:] == [[1.0, 0.0, 0], [1.0, 1.0, 0]]
sys.exit(0 if doubled and right else f"other than stated: {seen}")
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/merge.py" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
