#!/usr/bin/env bash
# TRL 1.16.0: SFTTrainer, DPOTrainer and KTOTrainer leave the tools of a row (column "tools") out of its prompt as soon as rows have
# images; SFTTrainer leaves chat_template_kwargs out too (enable_thinking, say). The model learns to call tools that it was never shown,
# from prompts that differ from those it will be asked with. No error, no warning. Rows of text are rendered whole.
#
# Guess before it was run: a column of images adds images, and changes nothing about the text: the chat template gets the row's tools
# and settings, as in the same rows without images.
#
# Seen (Python 3.11, Linux, trl 1.16.0, transformers 5.23.0, torch 2.11.0), a Qwen2-VL, a template that names the tools first; the first
# row of a batch, without the tokens of the image ("tools zoom" is the tool's name, "brief" a setting of the template):
#                               text                                                 images                                     the way around
#   SFT, messages               tools zoom brief user color ? assistant red <|end|>  user color ? assistant red <|end|>         -
#   SFT, prompt and completion  tools zoom brief user color ? assistant red <|end|>  user color ? assistant red <|end|>         whole
#   DPO                         tools zoom brief user color ? assistant red <|end|>  brief user color ? assistant red <|end|>   whole
#   KTO                         tools zoom brief user color ? assistant red <|end|>  brief user color ? assistant red <|end|>   whole
# Why: the tools are read where rows of text are tokenized before training; rows with images go through a collator, which calls the
# template without them. SFTTrainer also drops the two columns of such rows before that; DPOTrainer and KTOTrainer keep them.
# Who is hurt: who trains a Qwen-VL to use tools on what it sees (screens, documents, zooming into a chart), and who turns thoughts off
# by row for Qwen3.5.
# Way around: render prompt and answer first, trl.apply_chat_template(row, processor, tools=..., **settings) with a part of type "image"
# in the question, and train on these texts, as checked below. (Not with "messages": give SFTTrainer a prompt and a completion.)
# (https://github.com/huggingface/trl/pull/6259 says of DPOTrainer and KTOTrainer that their vision collators do not pass tools on; no
# issue was found, nor a word about SFTTrainer.)
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'trl==1.16.0' 'transformers==5.23.0' 'accelerate==1.15.0' \
    'datasets==5.2.0' 'torch==2.11.0' 'torchvision==0.26.0' 'pillow==12.3.0' 'numpy<3'
cat > "$work/rows.py" <<'PY'
import json
import sys

import datasets
import numpy
import torch
import transformers
import trl
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()
special = ["<|end|>", "<|pad|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<unk>"]
words = [*special, "tools", "zoom", "brief", "user", "assistant", "color", "?", "red", "blue"]
splitter = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=splitter, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<unk>", additional_special_tokens=special[2:6]
)
tokenizer.chat_template = (
    "{% if tools %}tools {% for tool in tools %}{{ tool['function']['name'] }} {% endfor %}{% endif %}"
    "{% if brief %}brief {% endif %}"
    "{% for message in messages %}{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|> <|image_pad|> <|vision_end|> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}<|end|> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
processor = transformers.Qwen2VLProcessor(
    image_processor=transformers.Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 56 * 56}),
    tokenizer=tokenizer,
    video_processor=transformers.Qwen2VLVideoProcessor(),
    chat_template=tokenizer.chat_template,
)
rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
text |= {"num_key_value_heads": 2, "rope_parameters": rope, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 2}
tokens = {"vision_start_token_id": 2, "vision_end_token_id": 3, "image_token_id": 4, "video_token_id": 5}
settings = {"output_dir": sys.argv[1], "report_to": "none", "use_cpu": True, "bf16": False, "max_length": None}
settings |= {"per_device_train_batch_size": 2}
zoom = {"type": "function", "function": {"name": "zoom", "description": "zoom", "parameters": {"type": "object", "properties": {}}}}


def said(role, words):
    return [{"role": role, "content": words}]


def new():
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    return transformers.Qwen2VLForConditionalGeneration(config)


def read(kind, images, mend=False):
    """Return the first row of a batch, as words, without those of the image."""
    question, good, bad = said("user", "color ?"), said("assistant", "red"), said("assistant", "blue")
    row = {
        "SFT, messages": {"messages": question + good},
        "SFT, prompt and completion": {"prompt": question, "completion": good},
        "DPO": {"prompt": question, "chosen": good, "rejected": bad},
        "KTO": {"prompt": question, "completion": good, "label": True},
    }[kind]
    if mend:
        parts = [{"type": "image"}, {"type": "text", "text": "color ?"}]
        row |= trl.apply_chat_template(row | {"prompt": said("user", parts)}, processor, tools=[zoom], brief=True)
    else:
        row |= {"tools": json.dumps([zoom]), "chat_template_kwargs": {"brief": True}}
    if images:
        row["images"] = [Image.fromarray(numpy.zeros((56, 56, 3), numpy.uint8))]
    name = kind[:3]
    other = {"label": False} if "label" in row else {}
    trainer = getattr(trl, name + "Trainer")(
        new(),
        **({} if name == "SFT" else {"ref_model": new()}),
        args=getattr(trl, name + "Config")(**settings),
        train_dataset=datasets.Dataset.from_list([row, row | other]),
        processing_class=processor if images else tokenizer,
    )
    ids = next(iter(trainer.get_train_dataloader()))["input_ids"][0]
    return tokenizer.decode([number for number in ids.tolist() if number not in range(1, 6)])


whole = "tools zoom brief user color ? assistant red <|end|>"
seen = {}
print(f"{'':<28}{'text':<53}{'images':<43}the way around")
for kind in ("SFT, messages", "SFT, prompt and completion", "DPO", "KTO"):
    seen[kind] = [read(kind, False), read(kind, True), "-" if "messages" in kind else read(kind, True, mend=True)]
    last = "whole" if seen[kind][2] == whole else seen[kind][2]
    print(f"{kind:<28}{seen[kind][0]:<53}{seen[kind][1]:<43}{last}", flush=True)
print("trl", trl.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
bare, short = "user color ? assistant red <|end|>", "brief user color ? assistant red <|end|>"
expected = [[whole, bare, "-"], [whole, bare, whole], [whole, short, whole], [whole, short, whole]]
sys.exit(0 if list(seen.values()) == expected else f"other than stated: {seen}")
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$work/cache" "$work/venv/bin/python" "$work/rows.py" "$work/out" \
    2> "$work/log" || { tail -5 "$work/log"; exit 1; }
