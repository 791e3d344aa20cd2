#!/usr/bin/env bash
# transformers 5.23.0: a Qwen-VL keeps how far the last image shortened the positions (rope_deltas) in the model, not in the cache.
# Own loops of forward() with past_key_values then decode a text at the positions of the image that was asked about before it, and
# a chat about one image at those of another that was read in between. No error, no warning.
#
# Guess before it was run: past_key_values are all that a prompt leaves behind, so a step with them gives what one forward() of the
# whole text gives, whatever the model has read meanwhile, as it does for models of text and for generate().
#
# Seen (Python 3.11, Linux, transformers 5.23.0, torch 2.11.0), random weights, images of 4 x 4 and 8 x 8 tokens; 7 steps, one token
# each, with the prompt's own past_key_values; logits against those of one forward() of the whole text:
#                a text,        a text after   4 x 4 after    4 x 4, then 8 x 8 is read   generate(),
#                fresh model    an image       a text         before the steps            a text after an image
#   Qwen2-VL     0%             93%            0%             115%                        the same answer
#   Qwen2.5-VL   0%             114%           0%             121%                        the same answer
#   Qwen3-VL     0%             79%            0%             85%                         the same answer
# Why: forward() of a prompt without images leaves rope_deltas as they are, and a step with a cache adds them.
# Who is hurt: own decoding loops that one model serves in turns: chats with their own caches, shared prefixes, trees and beams,
# scoring of several continuations of one prompt, constrained or speculative decoding.
# Way around: pass position_ids with each step, or keep model.model.rope_deltas beside each cache and put it back (None for a text),
# as checked below. With an attention_mask for all tokens the steps after an image end in an error of shapes instead.
# (transformers pull request 43952 mends generate() alone. Issue 39749, closed, is of version 4.49 and of two prompts in one loop,
# classifier-free guidance; pull request 39756 for it is open. mlx-vlm had the like, pull request 1143.)
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'transformers==5.23.0' 'torch==2.11.0' 'numpy<3'
cat > "$work/steps.py" <<'PY'
import sys

import torch
import transformers

rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320}
text |= {"num_key_value_heads": 2, "rope_parameters": rope, "initializer_range": 0.3}
text |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
tokens = {"vision_start_token_id": 12, "vision_end_token_id": 13, "image_token_id": 14, "video_token_id": 15}
tower = {"depth": 1, "hidden_size": 64, "num_heads": 2}
later = tower | {"out_hidden_size": 64, "intermediate_size": 128}
answer = torch.arange(100, 107)[None]


def new(name):
    torch.manual_seed(0)
    if name == "Qwen2-VL":
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=tower | {"embed_dim": 64}, **tokens)
        return transformers.Qwen2VLForConditionalGeneration(config).eval()
    if name == "Qwen2.5-VL":
        vision = later | {"fullatt_block_indexes": [0]}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
        return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    vision = later | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = transformers.Qwen3VLConfig(text_config=text | {"head_dim": 32}, vision_config=vision, **tokens)
    return transformers.Qwen3VLForConditionalGeneration(config).eval()


def prompt(model, side=0):
    if not side:
        return {"input_ids": torch.arange(20, 40)[None]}
    torch.manual_seed(side)
    ids = torch.tensor([[20, 21, 12] + [14] * side**2 + [13, *range(30, 40)]])
    pixels = torch.randn(4 * side**2, 3 * 2 * model.config.vision_config.patch_size ** 2)
    grid = torch.tensor([[1, 2 * side, 2 * side]])
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == 14).int()}


def whole(model, inputs):
    ids = torch.cat([inputs["input_ids"], answer], 1)
    types = {"mm_token_type_ids": (ids == 14).int()} if "pixel_values" in inputs else {}
    return model(**(inputs | {"input_ids": ids} | types)).logits[:, -answer.shape[1]:]


def steps(model, read):
    logits = []
    for number in range(answer.shape[1]):
        token = answer[:, number : number + 1]
        logits.append(model(input_ids=token, past_key_values=read.past_key_values, use_cache=True).logits)
    return torch.cat(logits, 1)


def look(name):
    model = new(name)
    plain, small, large = prompt(model), prompt(model, 4), prompt(model, 8)

    def off(found, inputs):
        right = whole(new(name), inputs)
        return round(100 * ((found - right).norm() / right.norm()).item())

    cells = [off(steps(model, model(**plain, use_cache=True)), plain)]
    model(**small)
    kept = model(**plain, use_cache=True)
    cells.append(off(steps(model, kept), plain))
    cells.append(off(steps(model, model(**small, use_cache=True)), small))
    read = model(**small, use_cache=True)
    deltas = model.model.rope_deltas
    model(**large)
    cells.append(off(steps(model, read), small))

    short = {"max_new_tokens": 8, "do_sample": False}
    first = new(name).generate(**plain, **short)
    model.generate(**small, **short)
    cells.append(bool(torch.equal(first, model.generate(**plain, **short))))

    read = model(**small, use_cache=True)
    model(**large)
    model.model.rope_deltas = deltas
    assert off(steps(model, read), small) == 0
    model.model.rope_deltas = None
    assert off(steps(model, model(**plain, use_cache=True)), plain) == 0
    return cells


seen = {}
print(f"{'':<13}a text,        a text after   4 x 4 after    4 x 4, then 8 x 8 is read   generate(),")
print(f"{'':<13}fresh model    an image       a text         before the steps            a text after an image")
for name in ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"):
    with torch.no_grad():
        found = seen[name] = look(name)
    percents = [f"{value}%" for value in found[:4]]
    same = "the same answer" if found[4] else "another answer"
    print(f"{name:<13}{percents[0]:<15}{percents[1]:<15}{percents[2]:<15}{percents[3]:<28}{same}")
print("transformers", transformers.__version__, "torch", torch.__version__)
as_stated = all(
    fresh == 0 and after > 20 and own == 0 and between > 20 and generated
    for fresh, after, own, between, generated in seen.values()
)
sys.exit(0 if as_stated else f"other than stated: {seen}")
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/steps.py" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
