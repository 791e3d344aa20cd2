#!/usr/bin/env bash
# transformers 5.23.0: with label_smoothing_factor, Trainer compares each logit of a vision-language model with the token at its
# own place instead of the next one. The loss falls nicely, and the model has learned to repeat its input: no error, no warning.
# Text models of the same family are shifted. Seen with Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5, with peft too.
#
# Guess before it was run: the factor smooths the loss that it has without it, so that a factor near 0 gives nearly the loss of 0,
# and a trained model goes on with the text it was trained on.
#
# Seen (Python 3.11, Linux, transformers 5.23.0, peft 0.21.2, torch 2.11.0); labels are the input, as the documentation asks:
#                              loss at factor 0   at 0.000001   same places   after training with 0 / 0.1, [11, 12] goes on
#   Qwen2ForCausalLM           5.69               5.69          5.91          13 14 15 / 13 14 15
#   Qwen2VLFor...              6.32               6.55          6.55          13 14 15 / 12 12 12
#   Qwen2_5_VLFor...           6.10               6.16          6.16          13 14 15 / 12 12 12
#   Qwen3VLFor...              5.91               6.66          6.66          13 14 15 / 12 12 12
#   Qwen3_5For...              6.08               5.92          5.92          13 14 15 / 12 12 12
# Why: Trainer.compute_loss takes the labels out of the batch and shifts them only for the classes of
# MODEL_FOR_CAUSAL_LM_MAPPING_NAMES. (TRL 1.16's SFTTrainer shifts them itself; Qwen issue 834 is the same with remote code.)
# Who is hurt: who fine-tunes a vision-language model with Trainer and its smoothing: low losses, useless answers.
# Way around: leave label_smoothing_factor at 0, or give a compute_loss_func that shifts.
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'transformers==5.23.0' 'accelerate==1.15.0' 'peft==0.21.2' \
    'torch==2.11.0' 'numpy<3'
cat > "$work/run.py" <<'PY'
import sys

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import Trainer, TrainingArguments

transformers.logging.set_verbosity_error()
text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
text |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2}
text |= {"initializer_range": 0.1}
tokens = {"vision_start_token_id": 300, "vision_end_token_id": 301, "image_token_id": 302, "video_token_id": 303}
vision = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128}
linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}


def rope(section=None, **more):
    sections = {"mrope_section": section} if section else {}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **sections, **more}}


def config_of(name):
    if name == "Qwen2ForCausalLM":
        return transformers.Qwen2Config(**text, **rope())
    parts = {
        "Qwen2VL": (rope([4, 6, 6]), {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 2}),
        "Qwen2_5_VL": (rope([4, 6, 6]), vision | {"out_hidden_size": 64, "fullatt_block_indexes": [0]}),
        "Qwen3VL": (rope([6, 5, 5]), vision | {"out_hidden_size": 64, "deepstack_visual_indexes": [0]}),
        "Qwen3_5": (rope([2, 1, 1], partial_rotary_factor=0.25) | linear | {"num_hidden_layers": 4}, vision | {"out_hidden_size": 64}),
    }
    own, tower = parts[name.removesuffix("ForConditionalGeneration")]
    kind = getattr(transformers, name.replace("ForConditionalGeneration", "Config"))
    return kind(text_config=text | own, vision_config=tower, **tokens)


def trainer(model, factor, **more):
    options = TrainingArguments(
        output_dir=sys.argv[1], label_smoothing_factor=factor, use_cpu=True, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, per_device_train_batch_size=4, **more,
    )  # fmt: skip
    made = Trainer(model, options, train_dataset=[{"input_ids": row, "labels": row}] * 4)
    made.remove_callback(transformers.PrinterCallback)
    return made


row = [11, 12, 13, 14, 15, 16, 17, 18]
seen, short = {}, {}
for name in ("Qwen2ForCausalLM", *(f"{kind}ForConditionalGeneration" for kind in ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3_5"))):

    def new():
        torch.manual_seed(0)
        return getattr(transformers, name)(config_of(name))

    model, ids = new(), torch.tensor([row])
    losses = [trainer(model, factor).compute_loss(model, {"input_ids": ids, "labels": ids}).item() for factor in (0, 1e-6)]
    same = functional.cross_entropy(model(input_ids=ids).logits[0], ids[0]).item()
    adapted = get_peft_model(new(), LoraConfig(target_modules=["q_proj"]))
    losses.append(trainer(adapted, 1e-6).compute_loss(adapted, {"input_ids": ids, "labels": ids}).item())
    goes_on = []
    for factor in (0, 0.1):
        model = new()
        trainer(model, factor, max_steps=60, learning_rate=3e-3, weight_decay=0.0).train()
        answer = model.eval().generate(torch.tensor([row[:2]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
        goes_on.append(" ".join(map(str, answer[0, 2:].tolist())))
    shifted = abs(losses[1] - losses[0]) < 1e-3 and abs(losses[2] - losses[0]) < 1e-3
    in_place = abs(losses[1] - same) < 1e-3 and abs(losses[2] - same) < 1e-3
    seen[name] = ["shifted" if shifted else "in place" if in_place else "neither", *goes_on]
    cells = f"{losses[0]:<19.2f}{losses[1]:<14.2f}{same:<14.2f}{goes_on[0]} / {goes_on[1]}"
    print(f"{name.replace('ConditionalGeneration', '...'):<27}{cells}")
print("transformers", transformers.__version__, "torch", torch.__version__)
expected = {name: ["in place", "13 14 15", "12 12 12"] for name in seen}
expected["Qwen2ForCausalLM"] = ["shifted", "13 14 15", "13 14 15"]
sys.exit(f"other than stated: {seen}" if seen != expected else 0)
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/run.py" "$work/out" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
