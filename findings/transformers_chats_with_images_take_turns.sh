#!/usr/bin/env bash
# transformers 5.23.0: a chat with images that is continued with its own cache (past_key_values) answers otherwise once the same
# model has served another chat in between: generate() takes the positions of new tokens from rope_deltas, which the model keeps
# of its last prompt and the cache does not. Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5 do so. No error, no warning.
#
# Guess before it was run: the cache is the whole state of a chat, as it is for text models, so that chats may take turns.
#
# Seen (Python 3.11, Linux, transformers 5.23.0, torch 2.11.0): a question about an image, its answer, a second question; how far
# the logits of the next token are from those of the whole chat without a cache
#                 cache alone   another image chat between   a text chat between   the way around
#   Qwen2         0%            (no images)                  0%                    0%
#   Qwen2-VL      0%            90%                          51%                   0%
#   Qwen2.5-VL    0%            106%                         89%                   0%
#   Qwen3-VL      0%            70%                          72%                   0%
#   Qwen3.5       0%            4%                           4%                    0%
# (huggingface/transformers issue 39749 is the same state, overwritten by the second of two passes of guided generation.)
# Who is hurt: who serves several chats about images from one model and keeps their caches, or caches a long prompt with images
# and asks about it between other requests: the new question lies at other positions than after its own image.
# Way around: keep `model.model.rope_deltas` beside each cache, and put it back before the chat goes on.
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'transformers==5.23.0' 'torch==2.11.0' 'numpy<3'
cat > "$work/chats.py" <<'PY'
import sys

import torch
import transformers

transformers.logging.set_verbosity_error()
text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
text |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 320, "bos_token_id": None, "eos_token_id": None}
tokens = {"vision_start_token_id": 300, "vision_end_token_id": 301, "image_token_id": 302, "video_token_id": 303}
vision = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "out_hidden_size": 64}
linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}


def rope(section=None, **more):
    sections = {"mrope_section": section} if section else {}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **sections, **more}}


parts = {
    "Qwen2-VL": ("Qwen2VL", rope([4, 6, 6]), {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 2}, 14),
    "Qwen2.5-VL": ("Qwen2_5_VL", rope([4, 6, 6]), vision | {"fullatt_block_indexes": [0]}, 14),
    "Qwen3-VL": ("Qwen3VL", rope([6, 5, 5]), vision | {"deepstack_visual_indexes": [0]}, 16),
    "Qwen3.5": ("Qwen3_5", rope([6, 5, 5], partial_rotary_factor=1.0) | linear | {"num_hidden_layers": 4}, vision, 16),
}


def new(name):
    torch.manual_seed(0)
    if name == "Qwen2":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**text, **rope())).eval()
    kind, own, tower, _ = parts[name]
    config = getattr(transformers, f"{kind}Config")(text_config=text | own, vision_config=tower, **tokens)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()


def chat(name, side):
    """Return a prompt with an image of side x side patches; of text alone for Qwen2, or without a side."""
    if name == "Qwen2" or not side:
        return {"input_ids": torch.tensor([[7, 8, 9, 12, 13]])}
    ids = torch.tensor([[7, 8, 9, 300, *[302] * (side**2 // 4), 301, 12, 13]])
    torch.manual_seed(side)
    pixels = torch.randn(side**2, 3 * 2 * parts[name][3] ** 2)
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]])}


def generate(model, prompt, **more):
    ids = prompt["input_ids"]
    marks = {} if "pixel_values" not in prompt else {"mm_token_type_ids": (ids == 302).int()}
    more = {"max_new_tokens": 4, "pad_token_id": 0} | more
    return model.generate(
        **prompt, **marks, attention_mask=torch.ones_like(ids), do_sample=False, return_dict_in_generate=True,
        output_logits=True, **more,
    )  # fmt: skip


def goes_on(model, name, between, keep=False):
    """Return how far the cached second turn's first logits are from those without a cache, in percent."""
    first = chat(name, 8)
    found = generate(model, first)
    kept = getattr(model.model, "rope_deltas", None)
    ids = torch.cat([found.sequences, torch.tensor([[20, 21, 22]])], 1)
    for prompt in between:
        generate(model, prompt)
    if keep:
        model.model.rope_deltas = kept
    cached = generate(model, {"input_ids": ids}, past_key_values=found.past_key_values).logits[0]
    right = generate(model, first | {"input_ids": ids}).logits[0]
    return round(100 * ((cached - right).norm() / right.norm()).item())


seen = {}
print(f"{'':<14}cache alone   another image chat between   a text chat between   the way around")
for name in ("Qwen2", *parts):
    model = new(name)
    image, words = [chat(name, 4)], [chat(name, 0)]
    found = [goes_on(model, name, between) for between in ([], image, words)] + [goes_on(model, name, image, keep=True)]
    seen[name] = [value > 1 for value in found]
    cells = [f"{value}%" for value in found]
    if name == "Qwen2":
        cells[1] = "(no images)"
    print(f"{name:<14}{cells[0]:<14}{cells[1]:<29}{cells[2]:<22}{cells[3]}")
print("transformers", transformers.__version__, "torch", torch.__version__)
expected = {name: [False, True, True, False] for name in parts} | {"Qwen2": [False] * 4}
sys.exit(f"other than stated: {seen}" if seen != expected else 0)
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/chats.py" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
