#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0: prompt tuning and P-tuning of a Qwen-VL put the tokens of an image in one line of positions, as
# if they were text, in training and in generate() alike; so does inputs_embeds without input_ids. No error, although the inputs bring
# image_grid_thw and mm_token_type_ids, and no warning in training; PEFT's generate() says "Ignoring position ids", as it does for
# models of text, where nothing is lost. (With input_ids, forward() refuses images without mm_token_type_ids.)
#
# Guess before it was run: virtual tokens stand before the prompt and the rest stays as it is, so that an image keeps its rows and
# columns (M-RoPE), as under LoRA; or the inputs are refused.
#
# Seen (Python 3.11, Linux, peft 0.21.2, transformers 5.23.0, torch 2.11.0), random weights, an image of 4 x 4 tokens, 8 virtual
# tokens; how far the logits are from those of the same embeddings with an image's positions, and with positions of text:
#               inputs_embeds     prompt tuning     P-tuning          first token of generate(), the same three
#               image    text     image    text     image    text     image             text
#   Qwen2-VL     95%       0%       88%       0%       83%       0%     108%, 89%, 90%    0%, 0%, 0%
#   Qwen2.5-VL  101%       0%       91%       0%       90%       0%     100%, 134%, 115%  0%, 0%, 0%
#   Qwen3-VL     71%       0%       76%       0%       51%       0%     86%, 74%, 72%     0%, 0%, 0%
# Why: PEFT hands on embeddings in place of input_ids, and the models work out an image's positions from input_ids alone.
# Who is hurt: who tunes prompts on charts or documents trains against a base that no longer knows where in the image a patch lies,
# and compares it with LoRA, which keeps the positions; and who feeds own embeddings (cached features, soft prompts).
# Way around: without PEFT, forward() with position_ids from model.model.get_rope_index, and generate() with input_ids beside
# inputs_embeds, as checked below. With PEFT none: it drops position_ids.
# (transformers issue 35463 says of version 4 that answers get worse with inputs_embeds; peft issue 2899 was about what prompt
# tuning made of the steps after the first, repaired in transformers pull request 42508.)
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'peft==0.21.2' 'transformers==5.23.0' 'accelerate==1.15.0' \
    'torch==2.11.0' 'numpy<3'
cat > "$work/prompts.py" <<'PY'
import sys

import peft
import torch
import transformers

rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320}
text |= {"num_key_value_heads": 2, "rope_parameters": rope, "initializer_range": 0.3}
text |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
tokens = {"vision_start_token_id": 12, "vision_end_token_id": 13, "image_token_id": 14, "video_token_id": 15}
tower = {"depth": 1, "hidden_size": 64, "num_heads": 2}
later = tower | {"out_hidden_size": 64, "intermediate_size": 128}
virtual = 8
ids = torch.tensor([[20, 21, 12] + [14] * 16 + [13, *range(30, 40)]])
longer = torch.cat([torch.full((1, virtual), 20), ids], 1)
grid = torch.tensor([[1, 8, 8]])


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


def off(found, right):
    return round(100 * ((found - right).norm() / right.norm()).item())


def look(name, settings):
    model = new(name)
    torch.manual_seed(4)
    tuned = peft.get_peft_model(model, settings).eval() if settings else None
    size = 3 * 2 * model.config.vision_config.patch_size ** 2
    images = {"pixel_values": torch.randn(64, size), "image_grid_thw": grid}
    inputs = images | {"attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 14).int()}
    embeddings = model.get_input_embeddings()(ids)
    once = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    if tuned:
        found = tuned(input_ids=ids, **inputs).logits
        first = tuned.generate(input_ids=ids, **inputs, **once).logits[0]
        embeddings, whole = torch.cat([tuned.get_prompt(1), embeddings], 1), longer
    else:
        found = model(inputs_embeds=embeddings, **inputs).logits
        first = model.generate(inputs_embeds=embeddings, **inputs, **once).logits[0]
        whole = ids
    mask = torch.ones_like(whole)
    of_image, _ = model.model.get_rope_index(
        whole, image_grid_thw=grid, attention_mask=mask, mm_token_type_ids=(whole == 14).int()
    )
    of_text = torch.arange(whole.shape[1]).expand(3, 1, -1)
    by_hand = [
        model(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, **images).logits
        for positions in (of_image, of_text)
    ]
    if not tuned:
        right = model(input_ids=ids, **inputs).logits
        both = model.generate(input_ids=ids, inputs_embeds=embeddings, **inputs, **once).logits[0]
        assert off(by_hand[0], right) == 0 and off(both, right[:, -1]) == 0
    return [off(found, right) for right in by_hand], [off(first, right[:, -1]) for right in by_hand]


ways = (
    None,
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual),
    peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual, encoder_hidden_size=32),
)
seen = {}
print(f"{'':<13}inputs_embeds     prompt tuning     P-tuning          first token of generate(), the same three")
print(f"{'':<13}{'image    text     ' * 3}image             text")
for name in ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"):
    with torch.no_grad():
        found = seen[name] = [look(name, settings) for settings in ways]
    cells = "".join(f"{image:>4}%{words:>8}%     " for (image, words), _ in found)
    firsts = [", ".join(f"{first[number]}%" for _, first in found) for number in (0, 1)]
    print(f"{name:<12}{cells}{firsts[0]:<18}{firsts[1]}")
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
as_stated = all(image > 20 and words == 0 for rows in seen.values() for pairs in rows for image, words in pairs)
sys.exit(0 if as_stated else f"other than stated: {seen}")
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/prompts.py" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
