#!/usr/bin/env bash
# transformers 5.23.0: once flash-linear-attention (its kernels' package, fla-core 0.6.0) is installed, a Qwen3.5 no longer
# runs on a CPU: the first forward pass ends in Triton, "0 active drivers ([]). There should only be one." Nothing names the
# package, the layer or a way out, and fla itself says when it is imported that it rolls back to the CPU.
#
# Guess before it was run: the package is optional and its kernels are for GPUs, so tensors on a CPU go through the PyTorch
# implementation, as they do without the package. (transformers takes the package's function when it is imported, on
# whatever device tensors are: integrations/hub_kernels.py, use_kernel_func_from_hub_with_fallback.)
#
# Seen (Python 3.11, Linux, transformers 5.23.0, torch 2.11.0, triton 3.6.0, no GPU):
#   without fla-core   logits of (1, 20, 128)
#   with fla-core      RuntimeError: 0 active drivers ([]). There should only be one.
# Who is hurt: who installs it to train on a GPU, and then merges, converts or tests on a CPU in the same environment.
# Way around: put the PyTorch function back, `modeling_qwen3_5.torch_chunk_gated_delta_rule.__wrapped__`, or use another
# environment for the CPU.
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" 'transformers==5.23.0' 'torch==2.11.0'
cat > "$work/forward.py" <<'PY'
import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
heads = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**sizes, **heads, num_key_value_heads=2, head_dim=32))
try:
    print("logits of", tuple(model(input_ids=torch.arange(20)[None]).logits.shape))
except RuntimeError as error:
    print("RuntimeError:", error)
PY
export CUDA_VISIBLE_DEVICES=
before=$("$work/venv/bin/python" "$work/forward.py" 2> "$work/log" | tail -1)
"${pip[@]}" 'fla-core==0.6.0'
after=$("$work/venv/bin/python" "$work/forward.py" 2>> "$work/log" | tail -1)
printf 'without fla-core   %s\nwith fla-core      %s\n' "$before" "$after"
[[ $before == "logits of (1, 20, 128)" && $after == "RuntimeError: 0 active drivers"* ]] || { tail -20 "$work/log"; exit 1; }
