#!/usr/bin/env bash
# TRL 1.16.0: SFTTrainer and DPOTrainer put the end-of-text token behind completions (chosen and rejected answers) of plain-text
# rows, and leave it away as soon as rows have images. A model that is trained on such rows never learns to stop: no error, no
# warning, low losses. Conversational rows are right, for their chat template ends each answer.
#
# Guess before it was run: a column of images changes nothing about the text; in both cases the completion is learned with the
# token after which the model stops, which rows of datasets do not have in their texts.
#
# Seen (Python 3.11, Linux, trl 1.16.0, transformers 5.23.0, torch 2.11.0), a tiny Qwen2-VL, 60 steps on "color red ?" and
# "color blue ?", or the same question about a red and a blue picture; answers have at most 12 tokens:
#                       learned tokens        answers after training
#   SFT, text           dark red <|end|>      dark red <|end|> | dark blue <|end|>
#   SFT, images         dark red              dark red red red ... | dark blue dark blue dark ...
#   DPO, text           dark red <|end|>
#   DPO, images         dark red
# Why: the token is added while a dataset is prepared for training, which vision datasets skip; their collators do not add it.
# Who is hurt: who trains on prompt-completion or preference rows with images in TRL's standard format: answers run on until
# max_new_tokens, and exact-match metrics fall although the loss is good.
# Way around: end each completion with processor.tokenizer.eos_token in the dataset, or write the rows as messages.
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'trl==1.16.0' 'transformers==5.23.0' 'accelerate==1.15.0' \
    'datasets==5.2.0' 'pyarrow==26.0.1' 'pillow==12.3.0' 'torch==2.11.0' 'torchvision==0.26.0' 'numpy<3'
cat > "$work/train.py" <<'PY'
import sys

import datasets
import torch
import transformers
import trl
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()
special = ["<|end|>", "<|pad|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<unk>"]
words = {word: number for number, word in enumerate([*special, "color", "?", "red", "blue", "dark", "light"])}
splitter = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=splitter, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<unk>", additional_special_tokens=special[2:6]
)
processor = transformers.Qwen2VLProcessor(
    image_processor=transformers.Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 56 * 56}),
    tokenizer=tokenizer,
    video_processor=transformers.Qwen2VLVideoProcessor(),
)
rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
text |= {"num_key_value_heads": 2, "rope_parameters": rope, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 2}
tokens = {"vision_start_token_id": 2, "vision_end_token_id": 3, "image_token_id": 4, "video_token_id": 5}
settings = {"output_dir": sys.argv[1], "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
settings |= {"per_device_train_batch_size": 8, "save_strategy": "no", "logging_strategy": "no", "max_length": None}


def new():
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    model = transformers.Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 0, 1
    return model


def rows(images, preference=False):
    made = []
    for color in ("red", "blue") * 8:
        asked = "<|vision_start|> <|image_pad|> <|vision_end|> color ?" if images else f"color {color} ?"
        row = {"prompt": asked, "images": [Image.new("RGB", (56, 56), color)]} if images else {"prompt": asked}
        answer = f" dark {color}"
        made.append(row | ({"chosen": answer, "rejected": f" light {color}"} if preference else {"completion": answer}))
    return datasets.Dataset.from_list(made)


def sft(images):
    data, model = rows(images), new()
    trainer = trl.SFTTrainer(
        model, trl.SFTConfig(**settings, max_steps=60, learning_rate=3e-3), train_dataset=data, processing_class=processor
    )
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    learned = {processor.tokenizer.decode(row[row != -100]) for row in labels}
    trainer.train()
    answers = []
    for row in data.select([0, 1]):
        asked = processor(text=[row["prompt"]], images=row.get("images"), return_tensors="pt")
        given = model.eval().generate(**asked, do_sample=False, max_new_tokens=12)[0, asked["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(given))
    return learned, answers


def dpo(images):
    trainer = trl.DPOTrainer(
        new(),
        new(),
        args=trl.DPOConfig(**settings, max_steps=1),
        train_dataset=rows(images, preference=True),
        processing_class=processor if images else processor.tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    chosen = [processor.tokenizer.decode(row[mask == 1]) for row, mask in zip(batch["input_ids"], batch["completion_mask"])]
    return set(chosen[: len(chosen) // 2])


seen = {}
for images in (False, True):
    kind = "images" if images else "text"
    learned, answers = sft(images)
    seen[kind] = [sorted(learned), answers, sorted(dpo(images))]
    print(f"SFT, {kind:<8}learned {' | '.join(seen[kind][0]):<44}answers {' | '.join(answers)}")
    print(f"DPO, {kind:<8}learned {' | '.join(seen[kind][2])}")
print("trl", trl.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
ended = ["dark blue <|end|>", "dark red <|end|>"]
right = seen["text"] == [ended, ended[::-1], ended]
never = seen["images"][0] == seen["images"][2] == ["dark blue", "dark red"] and not any("<|end|>" in a for a in seen["images"][1])
sys.exit(0 if right and never else f"other than stated: {seen}")
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$work/cache" "$work/venv/bin/python" "$work/train.py" "$work/out" \
    2> "$work/log" || { tail -5 "$work/log"; exit 1; }
