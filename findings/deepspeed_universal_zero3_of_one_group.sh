#!/usr/bin/env bash
# DeepSpeed 0.19.8: a ZeRO-3 run that goes on from a universal checkpoint gives every parameter group the learning rate and the weight
# decay of the first one, and its Adam counts each step as many times as there are groups. No error, no warning. A resume from the same
# checkpoint before it was converted is right, and so is ZeRO-1 and ZeRO-2 from a universal one.
#
# Guess before it was run: a universal checkpoint holds what the checkpoint holds that it was made from, so that a run goes on as it
# would have, on another number of processes too, which is what it is for.
#
# Seen (Python 3.11, Linux, CPU, gloo, DeepSpeed 0.19.8, torch 2.11.0), saved by two processes after 5 steps, 3 steps more:
#                                  learning rate / weight decay of tower, language, norms      steps of Adam
#   ZeRO-2, 2 processes            0.0001 / 0.1   0.01 / 0.1     0.001 / 0.0                    8
#   ZeRO-2, universal, 1 process   0.0001 / 0.1   0.01 / 0.1     0.001 / 0.0                    8
#   ZeRO-3, 2 processes            0.0001 / 0.1   0.01 / 0.1     0.001 / 0.0                    8
#   ZeRO-3, universal, 2           0.0001 / 0.1   0.0001 / 0.1   0.0001 / 0.1                   14
#   ZeRO-3, universal, 1 process   0.0001 / 0.1   0.0001 / 0.1   0.0001 / 0.1                   14
#   the same, the way around       0.0001 / 0.1   0.01 / 0.1     0.001 / 0.0                    8
# Why: load_hp_checkpoint_state_from_checkpoint_dir_stage3 copies param_groups[0] into all groups, and puts one tensor, the count of
# the first parameter, into the state of each group, where Adam adds to it in place. (Checkpoints of several groups can be
# converted since https://github.com/deepspeedai/DeepSpeed/pull/7585.)
# Who is hurt: who trains tower, merger and language model at rates of their own, and resumes on another number of GPUs; and every
# run of transformers' Trainer with a weight decay: it has a second group of norms and biases, which decay from then on. A schedule
# may set the rates again with its next step; it does not set the decay.
# Way around: after load_checkpoint, set the values of the groups again and give each state its own count, as below; or resume on as
# many processes as had saved.
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
import json
import os
import sys
from pathlib import Path

import deepspeed
import torch

stage, folder, tag, steps, result = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), Path(sys.argv[5])
mend = "mend" in sys.argv
deepspeed.init_distributed("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 8))
tower, norm, language = model
groups = [
    {"params": [tower.weight], "lr": 1e-4, "weight_decay": 0.1},
    {"params": [language.weight], "lr": 1e-2, "weight_decay": 0.1},
    {"params": [norm.weight, norm.bias, tower.bias, language.bias], "lr": 1e-3, "weight_decay": 0.0},
]
settings = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}, "zero_force_ds_cpu_optimizer": False}
settings["checkpoint"] = {"load_universal": tag == "universal"}
optimizer = torch.optim.AdamW([dict(group) for group in groups])
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
if tag != "none":
    engine.load_checkpoint(folder, tag=tag)
if mend:
    for group, right in zip(engine.optimizer.optimizer.param_groups, groups):
        group |= {"lr": right["lr"], "weight_decay": right["weight_decay"]}
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = state["step"].clone()
for step in range(steps):
    torch.manual_seed(100 + engine.global_steps)
    engine.backward((engine(torch.randn(4, 8)) - 1).square().mean())
    engine.step()
if tag == "none":
    more = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
    engine.save_checkpoint(folder, tag="saved", client_state=more)
optimizer = engine.optimizer.optimizer
found = {"groups": [[group["lr"], group["weight_decay"]] for group in optimizer.param_groups]}
found["steps"] = sorted({float(state["step"]) for state in optimizer.state.values()})
if torch.distributed.get_rank() == 0:
    result.write_text(json.dumps(found))
torch.distributed.barrier()
os._exit(0)  # gloo's threads sometimes abort a process that ends by itself
PY
cat > "$work/compare.py" <<'PY'
import json
import os
import subprocess
import sys
from pathlib import Path

work = Path(sys.argv[1])


def run(processes, *arguments):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, work / "run.py", *arguments]
    subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.DEVNULL)


seen = {}
print(f"{'':<31}learning rate / weight decay of tower, language, norms      steps of Adam")
for stage in (2, 3):
    folder = work / f"stage{stage}"
    run(2, stage, folder, "none", 5, work / "ignored")
    convert = ["-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", folder / "saved", "--output_folder", folder / "universal"]
    subprocess.run([sys.executable, *map(str, convert)], check=True, stdout=subprocess.DEVNULL)
    cases = [("saved", 2), ("universal", 1)]
    if stage == 3:
        cases = [("saved", 2), ("universal", 2), ("universal", 1), ("universal", 1, "mend")]
    for tag, processes, *mend in cases:
        run(processes, stage, folder, tag, 3, work / "found.json", *mend)
        found = seen[stage, tag, processes, *mend] = json.loads((work / "found.json").read_text())
        name = f"ZeRO-{stage}, {'universal, ' * (tag == 'universal')}{processes} process{'es' * (processes > 1)}"
        if mend:
            name = "the same, the way around"
        cells = "".join(f"{f'{rate:g} / {decay}':<15}" for rate, decay in found["groups"])
        print(f"{name:<31}{cells}{'':<16}{', '.join(f'{count:g}' for count in found['steps'])}")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed  # noqa: E402
import torch  # noqa: E402

print("deepspeed", deepspeed.__version__, "torch", torch.__version__)
right = {"groups": [[1e-4, 0.1], [1e-2, 0.1], [1e-3, 0.0]], "steps": [8.0]}
wrong = {"groups": [[1e-4, 0.1]] * 3, "steps": [14.0]}
expected = {key: wrong if key[:2] == (3, "universal") and "mend" not in key else right for key in seen}
sys.exit(0 if seen == expected else f"other than stated: {seen}")
PY
CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR="$work/extensions" \
    PATH="$work/venv/bin:$PATH" "$work/venv/bin/python" "$work/compare.py" "$work" 2> "$work/log" || { tail -20 "$work/log"; exit 1; }
