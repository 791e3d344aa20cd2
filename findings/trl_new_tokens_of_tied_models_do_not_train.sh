#!/usr/bin/env bash
# TRL 1.16.0, peft 0.21.2: SFTTrainer and DPOTrainer do not train new tokens (trainable_token_indices) where the output head takes part,
# because it is tied to the embeddings or named too: the first step ends with "'TrainableTokensWrapper' object has no attribute 'bias'",
# which names neither the setting nor a way out. LoRA on the output head is refused with a message when the trainer is made.
#
# Guess before it was run: PEFT's way to train tokens works in TRL as in transformers' Trainer, tied or not; or it is refused like LoRA
# on the head.
#
# Seen (Python 3.11, Linux, trl 1.16.0, peft 0.21.2, transformers 5.23.0, torch 2.11.0), a tiny Qwen2-VL, two steps on texts:
#   embeddings and head, tokens of          Trainer   SFTTrainer       DPOTrainer       SFTTrainer, the way around
#   apart, the embeddings                   trains    trains           trains           trains
#   apart, embeddings and head              trains    AttributeError   AttributeError   trains
#   tied, the embeddings (and so the head)  trains    AttributeError   AttributeError   trains
# Why: TRL's fused output head reads lm_head.weight and lm_head.bias instead of calling the layer; PEFT's wrapper of trained tokens
# gives a weight with the trained rows in it, and has no bias where the layer has none.
# Who is hurt: who teaches Qwen2-VL-2B, Qwen2.5-VL-3B, Qwen3-VL-2B or 4B, whose heads are tied, new tokens for boxes, tools or
# a language beside LoRA, as PEFT's guide advises.
# Way around: model.get_output_embeddings().bias = None before trainer.train(); the loss then is the model's own, as checked below.
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'trl==1.16.0' 'peft==0.21.2' 'transformers==5.23.0' \
    'accelerate==1.15.0' 'datasets==5.2.0' 'torch==2.11.0' 'numpy<3'
cat > "$work/train.py" <<'PY'
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
text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
text |= {"num_key_value_heads": 2, "rope_parameters": rope, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 2}
tokens = {"vision_start_token_id": 12, "vision_end_token_id": 13, "image_token_id": 14, "video_token_id": 15}
settings = {"output_dir": sys.argv[1], "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "max_steps": 2}
settings |= {"per_device_train_batch_size": 4, "save_strategy": "no", "logging_strategy": "no", "learning_rate": 1e-2}
row = {"prompt": "color ?", "completion": " <box> red </box>", "chosen": " <box> red </box>", "rejected": " blue"}
sft = datasets.Dataset.from_list([{key: row[key] for key in ("prompt", "completion")}] * 8)
dpo = datasets.Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")}] * 8)


def new(tied, indices):
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(
        text_config=text | {"tie_word_embeddings": tied}, vision_config=vision, tie_word_embeddings=tied, **tokens
    )
    model = transformers.Qwen2VLForConditionalGeneration(config)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=indices))


def trains(make, model, mend=False):
    if mend:
        model.get_output_embeddings().bias = None
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if "trainable_tokens_delta" in name}
    try:
        trainer = make(model)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    except AttributeError as error:
        assert "'TrainableTokensWrapper' object has no attribute 'bias'" in str(error), error
        return "AttributeError"
    weights = dict(model.named_parameters())
    assert all(not torch.equal(weights[name], value) for name, value in before.items())
    if mend:
        batch = next(iter(trainer.get_train_dataloader()))
        with torch.no_grad():
            assert torch.allclose(trainer.compute_loss(model.eval(), dict(batch)), model(**batch).loss, atol=1e-4)
    return "trains"


def plain(model):
    ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
    data = datasets.Dataset.from_list([{"input_ids": ids, "labels": ids}] * 8)
    return transformers.Trainer(model, transformers.TrainingArguments(**settings), train_dataset=data)


def supervised(model):
    return trl.SFTTrainer(model, trl.SFTConfig(**settings), train_dataset=sft, processing_class=tokenizer)


def preference(model):
    return trl.DPOTrainer(model, args=trl.DPOConfig(**settings), train_dataset=dpo, processing_class=tokenizer)


seen = {}
print(f"{'embeddings and head, tokens of':<40}Trainer   SFTTrainer       DPOTrainer       SFTTrainer, the way around")
for name, tied, indices in (
    ("apart, the embeddings", False, [7, 8]),
    ("apart, embeddings and head", False, {"embed_tokens": [7, 8], "lm_head": [7, 8]}),
    ("tied, the embeddings (and so the head)", True, [7, 8]),
):
    found = [trains(make, new(tied, indices)) for make in (plain, supervised, preference)]
    cells = seen[name] = [*found, trains(supervised, new(tied, indices), mend=True)]
    print(f"{name:<40}{cells[0]:<10}{cells[1]:<17}{cells[2]:<17}{cells[3]}")
print("trl", trl.__version__, "peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
yes, error = "trains", "AttributeError"
expected = [[yes] * 4, [yes, error, error, yes], [yes, error, error, yes]]
sys.exit(0 if list(seen.values()) == expected else f"other than stated: {seen}")
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$work/cache" "$work/venv/bin/python" "$work/train.py" "$work/out" \
    2> "$work/log" || { tail -5 "$work/log"; exit 1; }
