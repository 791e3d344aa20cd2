#!/usr/bin/env bash
# transformers 5.23.0 writes the positions of a model as `rope_parameters` alone; transformers 4.57.6 does not know that entry,
# and reads the model without a message. A Qwen2 or Qwen3 then answers with rope_theta 10000, the default of the class, in
# place of its own: other answers, no error, no warning. A Qwen2-VL, Qwen2.5-VL or Qwen3-VL ends with an error that names
# neither the file nor the entry.
#
# Guess before it was run: config.json states what both versions need, as it did before, or version 4 refuses a file of
# version 5 (the file states transformers_version).
#
# Seen (Python 3.11, Linux, CPU, float32, rope_theta 1000000, 64 tokens without an image):
#   Qwen2                   rope_theta 10000.0, 7 of 64 next tokens are the same, no message
#   Qwen3                   rope_theta 10000.0, 14 of 64, no message
#   Qwen2-VL, Qwen2.5-VL    TypeError: 'NoneType' object is not subscriptable, in the first forward
#   Qwen3-VL                AttributeError: 'NoneType' object has no attribute 'get', in from_pretrained
#   with rope_theta and rope_scaling written beside rope_parameters, all five answer as they were written
# Who is hurt: whoever trains with version 5 and answers with a program that holds version 4 (engines pin one); a text model
# is scored with wrong positions. Of text models vLLM's pull request 42624 tells the same.
# Way around: write rope_theta, and rope_scaling with the other values, beside rope_parameters; version 5 reads either.
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages). Version 4 replaces version 5 in one environment.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install --quiet --disable-pip-version-check)
cat > "$work/write.py" <<'PY'
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
text |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 320, "initializer_range": 0.3}
rope = {"rope_type": "default", "rope_theta": 1e6}
plain = text | {"rope_parameters": rope}
axes = text | {"rope_parameters": rope | {"mrope_section": [4, 6, 6]}}
woven = text | {"rope_parameters": rope | {"mrope_section": [4, 6, 6], "mrope_interleaved": True}}
tower = {"depth": 2, "num_heads": 2, "hidden_size": 64}
tokens = {"image_token_id": 300, "video_token_id": 301}
configs = {
    "Qwen2": transformers.Qwen2Config(**plain),
    "Qwen3": transformers.Qwen3Config(**plain),
    "Qwen2-VL": transformers.Qwen2VLConfig(text_config=axes, vision_config=tower | {"embed_dim": 64}, **tokens),
    "Qwen2.5-VL": transformers.Qwen2_5_VLConfig(
        text_config=axes,
        vision_config=tower | {"out_hidden_size": 64, "intermediate_size": 128, "fullatt_block_indexes": [1]},
        **tokens,
    ),
    "Qwen3-VL": transformers.Qwen3VLConfig(
        text_config=woven,
        vision_config=tower | {"out_hidden_size": 64, "intermediate_size": 128, "deepstack_visual_indexes": [0]},
        **tokens,
    ),
}
ids = torch.arange(4, 68)[None]
for name, config in configs.items():
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    torch.manual_seed(0)
    folder = Path(sys.argv[1]) / name
    auto.from_config(config).to(torch.float32).save_pretrained(folder)
    with torch.no_grad():
        logits = auto.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids).logits
    torch.save({"ids": ids, "logits": logits, "vision": hasattr(config, "vision_config")}, folder / "answer.pt")
PY
cat > "$work/read.py" <<'PY'
import json
import logging
import sys
import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText


class Kept(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())


records = []
transformers.logging.get_logger().addHandler(Kept())
warnings.simplefilter("error", UserWarning)


def read(name, folder):
    """Return how the model answers: as it was written, otherwise, or with an error."""
    wanted = torch.load(folder / "answer.pt")
    auto = AutoModelForImageTextToText if wanted["vision"] else AutoModelForCausalLM
    try:
        model = auto.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = model(input_ids=wanted["ids"]).logits
    except (TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    if torch.allclose(logits, wanted["logits"], atol=1e-3):
        return "the same"
    print(f"  {name}: rope_theta {model.config.get_text_config().rope_theta}", end="; ")
    same = (logits.argmax(-1) == wanted["logits"].argmax(-1)).sum().item()
    print(f"{same} of {wanted['ids'].shape[1]} next tokens the same; messages: {len(records)}")
    return "otherwise, with messages" if records else "otherwise, silently"


seen = {}
for name in ("Qwen2", "Qwen3", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"):
    folder = Path(sys.argv[1]) / name
    records.clear()
    first = read(name, folder)
    # The way around: the values where transformers 4 looks for them, beside those of transformers 5.
    path = folder / "config.json"
    config = json.loads(path.read_text())
    part = config.get("text_config", config)
    rope = dict(part["rope_parameters"])
    part["rope_theta"] = rope.pop("rope_theta")
    if len(rope) > 1:
        part["rope_scaling"] = rope
    path.write_text(json.dumps(config))
    seen[name] = [first, read(name, folder)]
    print(f"{name:<16} {seen[name][0]}; with rope_theta and rope_scaling: {seen[name][1]}")
print("transformers", transformers.__version__, "torch", torch.__version__)
silent, nothing = "otherwise, silently", "TypeError: 'NoneType' object is not subscriptable"
expected = {name: [silent, "the same"] for name in ("Qwen2", "Qwen3")}
expected |= {name: [nothing, "the same"] for name in ("Qwen2-VL", "Qwen2.5-VL")}
expected |= {"Qwen3-VL": ["AttributeError: 'NoneType' object has no attribute 'get'", "the same"]}
sys.exit(f"other than stated: {seen}" if seen != expected else 0)
PY
export HF_HUB_OFFLINE=1
"${pip[@]}" 'transformers==5.23.0' 'torch==2.13.0' 'numpy<3'
"$work/venv/bin/python" "$work/write.py" "$work/models" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
"${pip[@]}" 'transformers==4.57.6'
"$work/venv/bin/python" "$work/read.py" "$work/models" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
