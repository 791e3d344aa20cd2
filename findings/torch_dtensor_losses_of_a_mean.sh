#!/usr/bin/env bash
# torch 2.11.0 and 2.13.0: mse_loss, smooth_l1_loss, huber_loss and soft_margin_loss of split DTensors, the parameters of FSDP2
# say, give gradients that are as many times too large as there are processes, beside the right loss; where rows do not split
# evenly, the loss is wrong too. No error, no warning. l1_loss, kl_div and the same means written by hand are right.
#
# Guess before it was run: a DTensor computes what the whole tensor computes, for operators that it takes at all (others raise
# "does not have a sharding strategy registered"), so loss and gradient are those of one process.
#
# Seen (Python 3.11, Linux, torch 2.11.0, 2 processes, gloo): a layer of FSDP2, and its weight's mean distance from a tensor
#                 6 rows, 3 each           5 rows, 3 and 2
#                 loss      gradient       loss      gradient
#   by hand       right     x 1            right     x 1
#   l1_loss       right     x 1            right     x 1
#   mse_loss      right     x 2            wrong     x 1.67 and x 2.5
#   smooth_l1     right     x 2            wrong     x 1.67 and x 2.5
#   huber_loss    right     x 2            wrong     x 1.67 and x 2.5
#   soft_margin   right     x 2            wrong     x 1.67 and x 2.5
# Why: each process runs the backward of the mean on its own rows, which divides by their number instead of that of all rows.
# Uneven: means of unequal parts are averaged as if they were equal. (pytorch/pytorch issue 185167 is such a mean of nll_loss
# with weights.)
# Who is hurt: who keeps weights near the base model's (L2-SP), or distils hidden states under tensor parallelism: on 8 GPUs
# the term weighs eight times what it weighs on one, while the loss in the log looks right.
# Way around: `(a - b).square().mean()`.
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.11.0' 'numpy<3'
cat > "$work/losses.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
losses = {
    "by hand": lambda weight, other: (weight - other).square().mean(),
    "l1_loss": functional.l1_loss,
    "mse_loss": functional.mse_loss,
    "smooth_l1": functional.smooth_l1_loss,
    "huber_loss": functional.huber_loss,
    "soft_margin": lambda weight, other: functional.soft_margin_loss(weight, other.sign()),
}
seen = {}
for name, loss_of in losses.items():
    seen[name] = []
    for rows in (6, 5):
        torch.manual_seed(0)
        layer, other = torch.nn.Linear(4, rows, bias=False), torch.randn(rows, 4)
        whole = layer.weight.detach().clone().requires_grad_()
        right = loss_of(whole, other)
        right.backward()
        fully_shard(layer, mesh=mesh)
        loss = loss_of(layer.weight, distribute_tensor(other, mesh, [Shard(0)]))
        loss.backward()
        times = (layer.weight.grad.full_tensor() / whole.grad).median(1).values
        value = "right" if torch.allclose(loss.full_tensor(), right) else "wrong"
        seen[name] += [value, " and ".join(f"x {round(time, 2):g}" for time in sorted(set(times.round(decimals=4).tolist())))]
    if dist.get_rank() == 0:
        print(f"{name:<14}" + "".join(f"{cell:<10}{factor:<15}" for cell, factor in (seen[name][:2], seen[name][2:])).rstrip())
if dist.get_rank() == 0:
    print("torch", torch.__version__)
expected = {name: ["right", "x 1", "right", "x 1"] for name in ("by hand", "l1_loss")}
other_than_right = ["right", "x 2", "wrong", "x 1.67 and x 2.5"]
expected |= {name: other_than_right for name in ("mse_loss", "smooth_l1", "huber_loss", "soft_margin")}
dist.barrier()
dist.destroy_process_group()
sys.exit(f"other than stated: {seen}" if seen != expected else 0)
PY
CUDA_VISIBLE_DEVICES='' "$work/venv/bin/torchrun" --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint localhost:0 \
    "$work/losses.py" 2> "$work/log" || { tail -20 "$work/log"; exit 1; }
