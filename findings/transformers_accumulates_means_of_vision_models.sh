#!/usr/bin/env bash
# transformers 5.23.0, TRL 1.16.0: with gradient_accumulation_steps, Trainer and SFTTrainer average the means of the micro-batches of
# Qwen2.5-VL, Qwen3-VL (its mixture of experts too) and Qwen3.5, so that a token of a short answer counts many times as much as one of
# a long answer, and the batch size chosen for memory changes what is learned. Qwen2 and Qwen2-VL are averaged over the tokens of the
# step. No error, no warning.
#
# Guess before it was run: four rows one at a time give the loss and the gradient of a batch of four, as Qwen2's do since Trainer hands
# num_items_in_batch to the model ("supposed to be mathematically equivalent to full batch training":
# https://github.com/huggingface/blog/blob/main/gradient_accumulation.md).
#
# Seen (Python 3.11, Linux, transformers 5.23.0, trl 1.16.0, torch 2.11.0), one step on four rows, three answers of one token and one of
# 40; the gradient is compared with that of the four rows at once:
#                 Trainer, images: loss, gradient off             SFTTrainer, texts         off the mean of
#                 4 rows   2, twice       1, 4 times    mended    4 rows   1, 4 times       the rows' means
#   Qwen2         6.02     6.02    0%     6.02    0%      0%      6.02     6.02    0%             96%
#   Qwen2-VL      6.02     6.02    0%     6.02    0%      0%      6.12     6.12    0%             91%
#   Qwen2.5-VL    6.05     6.01  278%     6.09  330%      0%      6.09     6.16  201%              0%
#   Qwen3-VL      5.87     5.80  346%     5.60  374%      0%      5.99     5.84  252%              0%
#   Qwen3-VL-MoE  6.17     6.10  160%     6.38  243%      0%      6.28     6.29  177%              0%
#   Qwen3.5       6.01     5.91  206%     6.24  254%      0%      5.91     5.26  110%              0%
# (The last column: how far "1, 4 times" of the Trainer is from the mean of the four rows' mean gradients, made by hand.)
# Why: these classes say accepts_loss_kwargs = False, although their forward() takes num_items_in_batch and divides by it, as the way
# around shows. https://github.com/huggingface/transformers/pull/40333 set it against losses that grew with the steps.
# Who is hurt: who trains on short answers (ChartQA: a word) and long ones together; who compares runs with other micro-batches, or
# Qwen2-VL with its successors.
# Way around: trainer.model_accepts_loss_kwargs = True before trainer.train(), as checked ("mended", both trainers).
# (https://github.com/huggingface/transformers/issues/37766, closed, says of version 4 that models without the count are not told; no
# issue was found on these families, whose forward() takes it.)
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'transformers==5.23.0' 'trl==1.16.0' 'accelerate==1.15.0' \
    'datasets==5.2.0' 'torch==2.11.0' 'numpy<3'
cat > "$work/means.py" <<'PY'
import sys

import datasets
import torch
import transformers
import trl
from tokenizers import Tokenizer, models

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()
words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>", unk_token="<unk>")
rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320}
text |= {"num_key_value_heads": 2, "rope_parameters": rope, "initializer_range": 0.1}
text |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
tokens = {"vision_start_token_id": 12, "vision_end_token_id": 13, "image_token_id": 14, "video_token_id": 15}
tower = {"depth": 1, "hidden_size": 64, "num_heads": 2}
later = tower | {"out_hidden_size": 64, "intermediate_size": 128}
third = later | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def new(name):
    torch.manual_seed(0)
    if name == "Qwen2":
        plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**text | plain))
    if name == "Qwen2-VL":
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=tower | {"embed_dim": 64}, **tokens)
        return transformers.Qwen2VLForConditionalGeneration(config)
    if name == "Qwen2.5-VL":
        vision = later | {"fullatt_block_indexes": [0]}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
        return transformers.Qwen2_5_VLForConditionalGeneration(config)
    if name == "Qwen3-VL":
        config = transformers.Qwen3VLConfig(text_config=text | {"head_dim": 32}, vision_config=third, **tokens)
        return transformers.Qwen3VLForConditionalGeneration(config)
    if name == "Qwen3-VL-MoE":
        config = transformers.Qwen3VLMoeConfig(text_config=text | {"head_dim": 32} | experts, vision_config=third, **tokens)
        return transformers.Qwen3VLMoeForConditionalGeneration(config)
    hybrid = {"head_dim": 32, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
    hybrid |= {"linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    hybrid["rope_parameters"] = rope | {"mrope_section": [6, 5, 5], "partial_rotary_factor": 1.0}
    vision = later | {"num_position_embeddings": 16}
    config = transformers.Qwen3_5Config(text_config=text | hybrid, vision_config=vision, **tokens)
    return transformers.Qwen3_5ForConditionalGeneration(config)


def rows(model):
    """Four questions about an image: the answers of three have one token, that of the last has 40."""
    torch.manual_seed(1)
    made = []
    for length in (1, 1, 1, 40):
        ids = torch.tensor([20, 12, *[14] * 4, 13, 21, *torch.randint(30, 300, (40,)).tolist()])
        seen = torch.arange(48) < 8 + length
        labels = torch.where(seen & (torch.arange(48) >= 8), ids, -100)
        made.append({"input_ids": ids, "attention_mask": seen.long(), "labels": labels})
        vision = getattr(model.config, "vision_config", None)
        if vision:
            pixels = torch.randn(16, 3 * 2 * vision.patch_size**2)
            made[-1] |= {"mm_token_type_ids": (ids == 14).long(), "pixel_values": pixels, "image_grid_thw": torch.tensor([1, 4, 4])}
    return made


def collate(examples):
    join = {key: torch.stack([row[key] for row in examples]) for key in examples[0] if key != "pixel_values"}
    return join | ({"pixel_values": torch.cat([row["pixel_values"] for row in examples])} if "pixel_values" in examples[0] else {})


class Keep(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.gradient = torch.cat([weight.grad.flatten().clone() for weight in model.parameters() if weight.grad is not None])


def step(name, size, kind="Trainer", mend=False):
    model, keep = new(name), Keep()
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1, "learning_rate": 0.0}
    settings |= {"max_grad_norm": 0.0, "report_to": "none", "use_cpu": True, "bf16": False, "logging_steps": 1}
    settings |= {"save_strategy": "no", "disable_tqdm": True}
    if kind == "Trainer":
        args = transformers.TrainingArguments(sys.argv[1], remove_unused_columns=False, **settings)
        trainer = transformers.Trainer(model, args, train_dataset=rows(model), data_collator=collate, callbacks=[keep])
    else:
        texts = datasets.Dataset.from_list([{key: row[key].tolist() for key in ("input_ids", "labels")} for row in rows(model)])
        trainer = trl.SFTTrainer(
            model, trl.SFTConfig(sys.argv[1], **settings), train_dataset=texts, processing_class=tokenizer, callbacks=[keep]
        )
    trainer.remove_callback(transformers.PrinterCallback)
    if mend:
        trainer.model_accepts_loss_kwargs = True
    trainer.train()
    return trainer.state.log_history[0]["loss"], keep.gradient


def means(name):
    model = new(name).train()
    for row in rows(model):
        (model(**collate([row])).loss / 4).backward()
    return None, torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def off(found, right):
    return round(100 * ((found[1] - right[1]).norm() / right[1].norm()).item())


seen = {}
print(f"{'':<14}Trainer, images: loss, gradient off             SFTTrainer, texts         off the mean of")
print(f"{'':<14}4 rows   2, twice       1, 4 times    mended    4 rows   1, 4 times       the rows' means")
for name in ("Qwen2", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "Qwen3-VL-MoE", "Qwen3.5"):
    right, double, single = step(name, 4), step(name, 2), step(name, 1)
    texts, one_by_one = step(name, 4, "SFTTrainer"), step(name, 1, "SFTTrainer")
    mended = [off(step(name, 1, mend=True), right), off(step(name, 1, "SFTTrainer", mend=True), texts)]
    apart = seen[name] = [off(double, right), off(single, right), off(one_by_one, texts), off(single, means(name)), *mended]
    print(f"{name:<14}{right[0]:.2f}{double[0]:>9.2f}{apart[0]:>5}%{single[0]:>9.2f}{apart[1]:>5}%{mended[0]:>7}%", end="")
    print(f"{texts[0]:>10.2f}{one_by_one[0]:>9.2f}{apart[2]:>5}%{apart[3]:>15}%", flush=True)
print("transformers", transformers.__version__, "trl", trl.__version__, "torch", torch.__version__)
by_tokens = all(seen[name][:3] == [0, 0, 0] for name in ("Qwen2", "Qwen2-VL"))
by_rows = all(min(found[:3]) > 50 and found[3] == 0 for name, found in seen.items() if name not in ("Qwen2", "Qwen2-VL"))
mends = all(found[4:] == [0, 0] for found in seen.values())
sys.exit(0 if by_tokens and by_rows and mends else f"other than stated: {seen}")
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$work/cache" "$work/venv/bin/python" "$work/means.py" "$work/out" \
    2> "$work/log" || { tail -5 "$work/log"; exit 1; }
