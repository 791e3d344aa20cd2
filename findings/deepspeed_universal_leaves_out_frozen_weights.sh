#!/usr/bin/env bash
# DeepSpeed 0.19.8: a universal checkpoint holds the weights that train, and no others. A run that goes on from one keeps its frozen
# weights and its buffers as the script has just made them, while the checkpoint it was converted from brings all of them back. No
# error, no warning, with ZeRO-1, 2 and 3; the trained weights are right.
#
# Guess before it was run: a universal checkpoint brings back what the checkpoint brings back that it was made from; frozen weights
# have been in those of ZeRO-3 since 2023 (https://github.com/deepspeedai/DeepSpeed/issues/3090 is their loss there), and
# ds_to_universal reads the files that hold them.
#
# Seen (Python 3.11, Linux, CPU, gloo, DeepSpeed 0.19.8, torch 2.11.0), saved by two processes, resumed by a script that starts from
# other weights; is what was saved back?
#                                  trained weights   frozen weights   buffers
#   ZeRO-1, 2 processes            yes               yes              yes
#   ZeRO-1, universal, 2           yes               no               no
#   ZeRO-2, 2 processes            yes               yes              yes
#   ZeRO-2, universal, 2           yes               no               no
#   ZeRO-3, 2 processes            yes               yes              yes
#   ZeRO-3, universal, 2           yes               no               no
#   ZeRO-3, universal, 1 process   yes               no               no
#   the same, the way around       yes               yes              yes
# Why: the converter writes a file for each parameter of the optimizer, and load_checkpoint takes the module's other weights from the
# checkpoint only where it is not universal.
# Who is hurt: who trains in stages (the merger first, then LoRA with the merger frozen), or added tokens whose rows are drawn at
# random and frozen, and resumes on another number of GPUs with a script that starts from the published model, as it may for an
# ordinary checkpoint: adapters that were trained beside one merger go on beside another.
# Way around: load the frozen weights from the checkpoint before it was converted, as below (zero_to_fp32 reads them; buffers too).
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, a C++ compiler, several GB in a
# temporary folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.11.0' 'numpy<3' ninja setuptools wheel
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'deepspeed==0.19.8'
cat > "$work/run.py" <<'PY'
import os
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

stage, folder, tag, result, *mend = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), *sys.argv[5:]
deepspeed.init_distributed("gloo")
torch.manual_seed(0 if tag == "none" else 1)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
model.register_buffer("scale", torch.rand(1))
model[0].requires_grad_(False)
if mend:
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(folder, tag="saved"))
settings = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}, "zero_force_ds_cpu_optimizer": False}
settings["checkpoint"] = {"load_universal": tag == "universal"}
optimizer = torch.optim.AdamW(model[1].parameters(), lr=1e-2)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
if tag == "none":
    for _ in range(3):
        engine.backward((engine(torch.ones(4, 8)) - 1).square().mean())
        engine.step()
    more = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
    engine.save_checkpoint(folder, tag="saved", client_state=more)
else:
    engine.load_checkpoint(folder, tag=tag)
layers = {"trained": model[1].weight, "frozen": model[0].weight}
if stage == 3:
    with deepspeed.zero.GatheredParameters(list(layers.values())):
        found = {name: weight.detach().clone() for name, weight in layers.items()}
else:
    found = {name: weight.detach().clone() for name, weight in layers.items()}
found["buffer"] = model.scale.clone()
if torch.distributed.get_rank() == 0:
    torch.save(found, result)
torch.distributed.barrier()
os._exit(0)  # gloo's threads sometimes abort a process that ends by itself
PY
cat > "$work/compare.py" <<'PY'
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

work = Path(sys.argv[1])


def run(processes, *arguments):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, work / "run.py", *arguments]
    subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.DEVNULL)


seen = {}
print(f"{'':<31}trained weights   frozen weights   buffers")
for stage in (1, 2, 3):
    folder = work / f"stage{stage}"
    run(2, stage, folder, "none", work / "saved.pt")
    saved = torch.load(work / "saved.pt")
    convert = ["-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", folder / "saved", "--output_folder", folder / "universal"]
    subprocess.run([sys.executable, *map(str, convert)], check=True, stdout=subprocess.DEVNULL)
    cases = [("saved", 2), ("universal", 2)] + [("universal", 1), ("universal", 1, "mend")] * (stage == 3)
    for tag, processes, *mend in cases:
        run(processes, stage, folder, tag, work / "found.pt", *mend)
        found = torch.load(work / "found.pt")
        cells = seen[stage, tag, processes, *mend] = ["yes" if torch.equal(found[name], saved[name]) else "no" for name in saved]
        name = f"ZeRO-{stage}, {'universal, ' * (tag == 'universal')}{processes} process{'es' * (processes > 1)}"
        print(f"{'the same, the way around' if mend else name:<31}{cells[0]:<18}{cells[1]:<17}{cells[2]}")
print("deepspeed", version("deepspeed"), "torch", torch.__version__)
expected = {key: ["yes", "no", "no"] if key[1] == "universal" and "mend" not in key else ["yes"] * 3 for key in seen}
sys.exit(0 if seen == expected else f"other than stated: {seen}")
PY
CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR="$work/extensions" \
    PATH="$work/venv/bin:$PATH" "$work/venv/bin/python" "$work/compare.py" "$work" 2> "$work/log" || { tail -20 "$work/log"; exit 1; }
