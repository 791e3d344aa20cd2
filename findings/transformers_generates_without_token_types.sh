#!/usr/bin/env bash
# transformers 5.23.0: generate() of a Qwen-VL with images but without `mm_token_type_ids` puts the image's tokens in one line of
# positions, as if they were text, and answers otherwise. No error, no warning. forward() refuses the same inputs with a
# ValueError that says what is missing, but for Qwen2.5-VL, which also goes on.
#
# Guess before it was run: generate() needs what forward() needs, or works the types out from input_ids, where the tokens of images
# can be seen, as version 4 did; either way it does not answer with other positions.
#
# Seen (Python 3.11, Linux, transformers 5.23.0, torch 2.11.0), random weights, an image of 4 x 4 tokens; greedy answers of 12 tokens:
#                forward()         generate(): first logits off   tokens that are the same
#   Qwen2-VL     a ValueError                   39%                1 of 12
#   Qwen2.5-VL   logits, 51% off                51%                1 of 12
#   Qwen3-VL     a ValueError                   48%                1 of 12
#   Qwen3.5      a ValueError                    3%               12 of 12
# (LightX2V issue 1416 is forward() of Qwen2.5-VL, by a package that passes on the inputs it knows by name.)
# Who is hurt: whoever passes inputs by name (input_ids, attention_mask, pixel_values, image_grid_thw), as code for version 4 does,
# in evaluation loops, servers and reward models: training with all inputs is right, and answers are scored with other positions.
# Way around: pass all that the processor returns, or add mm_token_type_ids: 1 where input_ids is the image token, else 0.
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'transformers==5.23.0' 'torch==2.11.0' 'numpy<3'
cat > "$work/positions.py" <<'PY'
import sys

import torch
import transformers

transformers.logging.set_verbosity_error()
text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
text |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 320, "bos_token_id": None, "eos_token_id": None}
tokens = {"vision_start_token_id": 300, "vision_end_token_id": 301, "image_token_id": 302, "video_token_id": 303}
vision = {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "out_hidden_size": 64}
linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
deltas = linear | {"num_hidden_layers": 4}
families = {
    "Qwen2-VL": ("Qwen2VL", [4, 6, 6], {}, {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2}, 14),
    "Qwen2.5-VL": ("Qwen2_5_VL", [4, 6, 6], {}, vision | {"fullatt_block_indexes": [0]}, 14),
    "Qwen3-VL": ("Qwen3VL", [6, 5, 5], {}, vision | {"deepstack_visual_indexes": [0]}, 16),
    "Qwen3.5": ("Qwen3_5", [6, 5, 5], deltas, vision, 16),
}


def difference(found, right):
    return round(100 * ((found - right).norm() / right.norm()).item())


seen = {}
print(f"{'':<12}{'forward()':<18}{'generate(): first logits off':<31}tokens that are the same")
for family, (kind, section, more, tower, patch) in families.items():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section}
    rope |= {"partial_rotary_factor": 1.0} if more else {}
    own = text | more | {"rope_parameters": rope, "tie_word_embeddings": False}
    config = getattr(transformers, f"{kind}Config")(text_config=own, vision_config=tower, tie_word_embeddings=False, **tokens)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    ids = torch.cat([torch.randint(0, 290, (6,)), torch.tensor([300] + [302] * 16 + [301]), torch.randint(0, 290, (8,))])[None]
    named = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_grid_thw": torch.tensor([[1, 8, 8]])}
    named["pixel_values"] = torch.randn(64, 6 * patch * patch)
    whole = named | {"mm_token_type_ids": (ids == 302).int()}
    greedy = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        right = model(**whole).logits
        try:
            forward = difference(model(**named).logits[:, -1], right[:, -1])
        except ValueError as error:
            assert "mm_token_type_ids" in str(error)
            forward = None
        first, second = model.generate(**whole, **greedy), model.generate(**named, **greedy)
    off = difference(second.logits[0], first.logits[0])
    same = int((first.sequences == second.sequences)[0, -12:].sum())
    seen[family] = [forward, off, same]
    shown = "a ValueError" if forward is None else f"logits, {forward}% off"
    print(f"{family:<12}{shown:<18}{off:>15}%{same:>19} of 12")
print("transformers", transformers.__version__, "torch", torch.__version__)
refused = [family for family, found in seen.items() if found[0] is None] == ["Qwen2-VL", "Qwen3-VL", "Qwen3.5"]
sys.exit(0 if refused and all(found[1] > 0 for found in seen.values()) else f"other than stated: {seen}")
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/positions.py" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
