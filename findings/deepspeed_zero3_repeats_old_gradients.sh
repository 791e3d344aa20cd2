#!/usr/bin/env bash
# DeepSpeed 0.19.8, ZeRO-3: weights that get no gradient in a step are moved by the last gradient they had, once more in every such
# step. The vision tower of a Qwen-VL that trains is moved so by each batch of text alone; and where the first micro-batch of a step
# has no image, the old gradient is added to that of the images that follow. No error, no warning. ZeRO-1 and ZeRO-2 are right.
#
# Guess before it was run: no gradient means no step, or one of zeros, so that with plain SGD the tower stays where it is in a step
# without images, as with torch's own optimizer and with ZeRO-1 and 2.
#
# Seen (Python 3.11, Linux, CPU, gloo, 2 processes, DeepSpeed 0.19.8, transformers 5.23.0, torch 2.11.0), a tiny Qwen2-VL, SGD with a
# fixed rate, no clipping; how far the tower moved, as a share of the first step, an image:
#             image   text   text   another image   two micro-batches: text, image   the image alone
#   ZeRO-1    100%    0%     0%     94%             47%                              46%
#   ZeRO-2    100%    0%     0%     94%             47%                              46%
#   ZeRO-3    100%    100%   100%   91%             111%                             46%
# ("The image alone": the same two micro-batches in a run whose tower had no gradient before.)
# Why: gradients are kept in averaged_gradients and in a buffer for accumulation; a micro-batch with number 0 overwrites the places of
# those weights that have one, and nothing clears the others before the step reads all. (That processes wait for each other where
# only some have an image is well known, https://github.com/QwenLM/Qwen3-VL/issues/126; here all have text alone, and none waits.)
# Who is hurt: who trains tower or merger with ZeRO-3 on a mixture of rows with and without images: an image is learned as often as
# batches of text follow it, and gradients of the step before are added to those of this one. Loss and logs look as ever.
# Way around: give the tower a gradient of zeros: run it on a small blank image in each batch without one, times 0.
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, a C++ compiler, several GB in a
# temporary folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.11.0' 'transformers==5.23.0' 'numpy<3' ninja setuptools wheel
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'deepspeed==0.19.8'
cat > "$work/run.py" <<'PY'
import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
import transformers

stage, result, steps = int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
deepspeed.init_distributed("gloo")
rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.1}
text |= {"num_key_value_heads": 2, "vocab_size": 320, "rope_parameters": rope}
vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 2}
tokens = {"vision_start_token_id": 300, "vision_end_token_id": 301, "image_token_id": 302, "video_token_id": 303}
torch.manual_seed(0)
config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
model = transformers.Qwen2VLForConditionalGeneration(config)
settings = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": len(steps[0]), "gradient_clipping": 0.0}
settings |= {"zero_optimization": {"stage": stage}, "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
tower = list(model.model.visual.parameters())


def weights():
    if stage == 3:
        with deepspeed.zero.GatheredParameters(tower):
            return torch.cat([weight.detach().flatten().clone() for weight in tower])
    return torch.cat([weight.detach().flatten().clone() for weight in tower])


def batch(image):
    """Return a row of text alone for 0, else a row with the image of this number."""
    if not image:
        ids, more = torch.arange(10, 20)[None], {}
    else:
        torch.manual_seed(image)
        ids = torch.tensor([[10, 300, *[302] * 4, 301, 11, 12, 13]])
        more = {"pixel_values": torch.randn(16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return {"input_ids": ids, "labels": ids, "mm_token_type_ids": (ids == 302).int()} | more


moved = []
for step in steps:
    before = weights()
    for image in step:
        engine.backward(engine(**batch(image)).loss)
        engine.step()
    moved.append((weights() - before).norm().item())
if torch.distributed.get_rank() == 0:
    result.write_text(json.dumps(moved))
torch.distributed.barrier()
os._exit(0)  # gloo's threads sometimes abort a process that ends by itself
PY
cat > "$work/compare.py" <<'PY'
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

work = Path(sys.argv[1])


def moved(stage, steps):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, work / "run.py", stage, work / "moved.json"]
    subprocess.run([sys.executable, *map(str, command), json.dumps(steps)], check=True, stdout=subprocess.DEVNULL)
    return json.loads((work / "moved.json").read_text())


seen = {}
print(f"{'':<10}image   text   text   another image   two micro-batches: text, image   the image alone")
for stage in (1, 2, 3):
    one = moved(stage, [[1], [0], [0], [2]])
    found = [*one, moved(stage, [[1, 1], [0, 2]])[1], moved(stage, [[0, 0], [0, 2]])[1]]
    seen[stage] = cells = [round(100 * value / one[0]) for value in found]
    widths = (8, 7, 7, 16, 33, 0)
    print(f"ZeRO-{stage}    " + "".join(f"{cell}%".ljust(width) for cell, width in zip(cells, widths)))
print("deepspeed", version("deepspeed"), "transformers", version("transformers"), "torch", version("torch"))
right = all(seen[stage][1:3] == [0, 0] and abs(seen[stage][4] - seen[stage][5]) < 15 for stage in (1, 2))
wrong = all(abs(cell - 100) < 2 for cell in seen[3][1:3]) and seen[3][4] > 1.5 * seen[3][5]
sys.exit(0 if right and wrong else f"other than stated: {seen}")
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR="$work/extensions" \
    PATH="$work/venv/bin:$PATH" "$work/venv/bin/python" "$work/compare.py" "$work" 2> "$work/log" || { tail -20 "$work/log"; exit 1; }
