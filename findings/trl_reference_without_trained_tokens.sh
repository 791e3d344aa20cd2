#!/usr/bin/env bash
# TRL 1.16.0, peft 0.21.2: given a model with a trained adapter, DPOTrainer, KTOTrainer, GRPOTrainer and RLOOTrainer make a copy of the
# adapter their reference. The copy leaves out LoRA on embeddings and tokens of trainable_token_indices, which stay as before training:
# the policy is held to a model that does not know its tokens. No error, no warning.
#
# Guess before it was run: the reference is the adapter as it came ("an initial copy is loaded", says TRL's code), so that the first step
# logs a DPO loss of ln 2, a KTO loss of 0.5 and a KL divergence of 0, as it does with LoRA on other layers.
#
# Seen (Python 3.11, Linux, trl 1.16.0, peft 0.21.2, transformers 5.23.0, torch 2.11.0), a Qwen2-VL after 20 steps of AdamW; how far the
# reference's logits about an image are from the policy's before the first step, and what that step logs:
#                               reference off   DPO loss   KTO loss   GRPO KL   RLOO KL
#   LoRA                                   0%     0.6931     0.5000    0.0000    0.0000
#   LoRA, embeddings in full               0%     0.6931     0.5000    0.0000    0.0000
#   LoRA, also on embeddings              77%     0.6242     0.4821    0.9314    1.0299
#   LoRA, trained tokens                  59%     0.9329     0.5532    0.1616   -0.0681
#   these two, the rest copied             0%     0.6931     0.5000    0.0000    0.0000
#                                          0%     0.6931     0.5000    0.0000    0.0000
# Why: weights are copied whose names hold ".default."; those of LoRA on embeddings and of trained tokens end in ".default".
# Who is hurt: who teaches a Qwen-VL tokens for boxes, points, tools or a language, and trains on preferences or rewards next: the
# reference pulls these tokens back to what they were before, and the logged rewards begin with a difference that is not the policy's.
# Way around: copy the rest once the trainer is made, as below; or merge the adapter, and train a new one (peft_config).
# (https://github.com/huggingface/trl/pull/4723 brought the copy. Issue 5222 and pull requests 6043 and 6591 there are about adapters
# with target_parameters, for which there was none. No issue was found on what the copy leaves out.)
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'trl==1.16.0' 'peft==0.21.2' 'transformers==5.23.0' \
    'accelerate==1.15.0' 'datasets==5.2.0' 'torch==2.11.0' 'numpy<3'
cat > "$work/reference.py" <<'PY'
import math
import sys

import datasets
import peft
import torch
import transformers
import trl
from tokenizers import Tokenizer, models, pre_tokenizers

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()
words = ["<|end|>", "<|pad|>", "<unk>", "color", "?", "red", "blue", "<box>", "</box>"]
splitter = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=splitter, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<unk>"
)
rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
text |= {"num_key_value_heads": 2, "rope_parameters": rope, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
text |= {"initializer_range": 0.2}
vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 2}
tokens = {"vision_start_token_id": 12, "vision_end_token_id": 13, "image_token_id": 14, "video_token_id": 15}
settings = {"output_dir": sys.argv[1], "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
settings |= {"per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1, "max_steps": 1}
answering = {"beta": 0.1, "num_generations": 2, "max_completion_length": 4}
question, good, bad = "<box> color ?", " <box> red </box>", " blue"
marked = [{"prompt": question, "completion": good, "label": True}, {"prompt": question, "completion": bad, "label": False}]
rows = {"DPO": [{"prompt": question, "chosen": good, "rejected": bad}] * 4, "KTO": marked * 2}
torch.manual_seed(0)
ids = torch.tensor([[7, 12, *[14] * 4, 13, 3, 4, 7, 5, 8, 0]])
image = {"pixel_values": torch.randn(16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def base():
    torch.manual_seed(1)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    return transformers.Qwen2VLForConditionalGeneration(config)


def forward(model, **more):
    return model(input_ids=ids, mm_token_type_ids=(ids == 14).int(), **image, **more)


@torch.no_grad()
def logits(model, adapter):
    model.set_adapter(adapter)
    found = forward(model.eval()).logits
    model.set_adapter("default")
    return found


def tuned(**more):
    torch.manual_seed(2)
    model = peft.get_peft_model(base(), peft.LoraConfig(r=4, **{"target_modules": ["q_proj", "v_proj"]} | more))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(20):
        forward(model, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(sys.argv[2])
    return peft.PeftModel.from_pretrained(base(), sys.argv[2], is_trainable=True)


def copy_the_rest(model):
    for name, weight in list(model.named_parameters()):
        if name.endswith(".default"):
            model.get_parameter(name.removesuffix("default") + "ref").data.copy_(weight)


def first_step(kind, model, mend):
    learned = kind in rows
    more = {} if learned else {"reward_funcs": lambda completions, **_: [float(len(answer)) for answer in completions]}
    before = logits(model, "default")
    trainer = getattr(trl, kind + "Trainer")(
        model,
        args=getattr(trl, kind + "Config")(**settings, **({} if learned else answering)),
        train_dataset=datasets.Dataset.from_list(rows.get(kind) or [{"prompt": question}] * 4),
        processing_class=tokenizer,
        **more,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if mend:
        copy_the_rest(model)
    off = (logits(model, "ref") - before).norm() / before.norm()
    trainer.train()
    return round(100 * off.item()), trainer.state.log_history[0]["loss" if learned else "kl"]


start, seen = {"DPO": math.log(2), "KTO": 0.5, "GRPO": 0.0, "RLOO": 0.0}, {}
print(f"{'':<28}reference off   DPO loss   KTO loss   GRPO KL   RLOO KL")
for name, as_stated, more, mend in (
    ("LoRA", True, {}, False),
    ("LoRA, embeddings in full", True, {"modules_to_save": ["embed_tokens"]}, False),
    ("LoRA, also on embeddings", False, {"target_modules": ["q_proj", "v_proj", "embed_tokens"]}, False),
    ("LoRA, trained tokens", False, {"trainable_token_indices": [7, 8]}, False),
    ("these two, the rest copied", True, {"target_modules": ["q_proj", "v_proj", "embed_tokens"]}, True),
    ("", True, {"trainable_token_indices": [7, 8]}, True),
):
    found = {kind: first_step(kind, tuned(**more), mend) for kind in start}
    (off,) = {away for away, _ in found.values()}
    values = [value for _, value in found.values()]
    same = [abs(value - right) < 1e-4 for value, right in zip(values, start.values(), strict=True)]
    seen[name, mend] = all(same) and off == 0 if as_stated else not any(same) and off > 5
    print(f"{name:<28}{off:>12}%{values[0]:>11.4f}{values[1]:>11.4f}{values[2]:>10.4f}{values[3]:>10.4f}", flush=True)
print("trl", trl.__version__, "peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
sys.exit(0 if all(seen.values()) else f"other than stated: {seen}")
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$work/cache" "$work/venv/bin/python" "$work/reference.py" "$work/out" "$work/adapter" \
    2> "$work/log" || { tail -5 "$work/log"; exit 1; }
