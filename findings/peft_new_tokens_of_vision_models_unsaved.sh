#!/usr/bin/env bash
# peft 0.21.2: after resize_token_embeddings, the adapter of a Qwen-VL is saved without the embeddings, so that the rows of new tokens
# are gone; loaded again, the tokens have rows that resizing draws anew, and the model answers otherwise. No error, no warning.
# The adapter of a text model is saved with them, and a warning says so ("as the embedding layer has been resized").
#
# Guess before it was run: save_pretrained detects resized embeddings of any model of transformers and saves them, as the guide on
# new tokens says ("PEFT will automatically take care of storing the embedding layer when saving the adapter").
#
# Seen (Python 3.11, Linux, peft 0.21.2, transformers 5.23.0, torch 2.11.0): ten new tokens, their rows set to the mean of three words
# each, 20 steps of LoRA on random texts, saved, loaded onto a base that was resized likewise; how far the logits are off:
#                embeddings in the file   logits off   with save_embedding_layers=True
#   Qwen2        yes                        0%         0%
#   Qwen2-VL     no                        76%         0%
#   Qwen2.5-VL   no                        79%         0%
#   Qwen3-VL     no                        82%         0%
#   Qwen3.5      no                       102%         0%
# Why: get_peft_model_state_dict compares config.vocab_size with that of the base model's file, and the configuration of a
# vision-language model has it in its text_config alone.
# Who is hurt: who adds tokens to a Qwen-VL, for boxes, tools or a language, and sets their rows by hand or trains them outside of the
# adapter: what was made is in no file, checkpoints of the Trainer included.
# Way around: save_pretrained(..., save_embedding_layers=True); or train the rows with the adapter (trainable_token_indices).
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'peft==0.21.2' 'transformers==5.23.0' 'accelerate==1.15.0' \
    'torch==2.11.0' 'numpy<3'
cat > "$work/tokens.py" <<'PY'
import sys
import warnings
from pathlib import Path

import peft
import torch
import transformers
from safetensors import safe_open

transformers.logging.set_verbosity_error()
text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
text |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 320, "bos_token_id": None, "eos_token_id": None}
tokens = {"vision_start_token_id": 300, "vision_end_token_id": 301, "image_token_id": 302, "video_token_id": 303}
vision = {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "out_hidden_size": 64}
linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
families = {
    "Qwen2": None,
    "Qwen2-VL": ("Qwen2VL", [4, 6, 6], {}, {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2}),
    "Qwen2.5-VL": ("Qwen2_5_VL", [4, 6, 6], {}, vision | {"fullatt_block_indexes": [0]}),
    "Qwen3-VL": ("Qwen3VL", [6, 5, 5], {}, vision | {"deepstack_visual_indexes": [0]}),
    "Qwen3.5": ("Qwen3_5", [6, 5, 5], linear | {"num_hidden_layers": 4}, vision),
}
work, asked = Path(sys.argv[1]), torch.tensor([[5, 6, 7, 321, 325, 9]])


def new(family):
    rope = {"rope_type": "default", "rope_theta": 1e4}
    if families[family] is None:
        config = transformers.Qwen2Config(**text, rope_parameters=rope, tie_word_embeddings=True)
        return transformers.Qwen2ForCausalLM(config)
    kind, section, more, tower = families[family]
    rope |= {"mrope_section": section, **({"partial_rotary_factor": 1.0} if more else {})}
    own = text | more | {"rope_parameters": rope, "tie_word_embeddings": True}
    config = getattr(transformers, f"{kind}Config")(text_config=own, vision_config=tower, tie_word_embeddings=True, **tokens)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=asked).logits


seen = {}
print(f"{'':<13}{'embeddings in the file':<25}{'logits off':<13}with save_embedding_layers=True")
for family in families:
    torch.manual_seed(0)
    base, model = str(work / family), new(family)
    model.save_pretrained(base)
    model_class = type(model)

    def resized():
        loaded = model_class.from_pretrained(base)
        loaded.resize_token_embeddings(330)
        return loaded

    model = resized()
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        for number in range(10):
            rows[320 + number] = rows[number : number + 3].mean(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(20):
        batch = torch.randint(0, 290, (4, 16))
        batch[:, ::4] = 320 + batch[:, ::4] % 10
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    right = logits(model)
    found = []
    for name, more in {"default": {}, "told": {"save_embedding_layers": True}}.items():
        folder = str(work / f"{family}_{name}")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model.save_pretrained(folder, **more)
        again = logits(peft.PeftModel.from_pretrained(resized(), folder))
        with safe_open(f"{folder}/adapter_model.safetensors", "pt") as file:
            written = any("embed_tokens" in key for key in file.keys())
        warned = any("resized" in str(warning.message) for warning in told)
        found += [written, warned, round(100 * ((again - right).norm() / right.norm()).item())]
    seen[family] = found
    print(f"{family:<13}{'yes' if found[0] else 'no':<25}{found[2]:>4}%{'':<8}{found[5]:>4}%")
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
saved, *lost = seen.values()
stands = saved[:3] == [True, True, 0] and all(found[:2] == [False, False] and found[2] > 20 for found in lost)
cured = all(found[3] and found[5] == 0 for found in seen.values())
sys.exit(0 if stands and cured else f"other than stated: {seen}")
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/tokens.py" "$work" 2> "$work/log" ||
    { tail -5 "$work/log"; exit 1; }
