#!/usr/bin/env bash
# bitsandbytes 0.50.2, CPUs with AVX-512: a 4-bit weight whose rows end inside a block of absmax is unpacked with the scales of
# other blocks, so that what comes back is 24 to 28% off instead of 9%. dequantize_4bit and Linear4bit do so, for NF4 and FP4,
# wherever a row is a multiple of 16 long and no multiple of the block size (64 unless told). No error, no warning.
#
# Guess before it was run: blocks run through the whole tensor, as quantize_4bit made them and as a GPU reads them, so any shape
# comes back within the error of 4 bits. The same numbers in one row do, and so do rows of 98 and 3420, no multiples of 16.
#
# Seen (Python 3.11, Linux, x86-64 with AVX-512, bitsandbytes 0.50.2, torch 2.11.0), normal weights, NF4 in blocks of 64:
#   1152 x 4304  own unpacking  9.2%  dequantize_4bit 24.6%  Linear4bit 24.7%  blocks by rows
#     64 x   96  own unpacking  9.1%  dequantize_4bit 27.9%  Linear4bit 27.4%  blocks by rows
#     64 x 4320  own unpacking  9.2%  dequantize_4bit 24.1%  Linear4bit 21.4%  blocks by rows
#      1 x 4304  own unpacking  9.1%  dequantize_4bit  9.1%  Linear4bit  9.9%  as stored
#     64 x 4288  own unpacking  9.2%  dequantize_4bit  9.2%  Linear4bit  9.1%  as stored
#     64 x   98  own unpacking  9.1%  dequantize_4bit  9.1%  Linear4bit  9.8%  as stored
#     64 x 3420  own unpacking  9.2%  dequantize_4bit  9.2%  Linear4bit  9.6%  as stored
# Value (row, column) is its code times absmax[row * (n // 64) + column // 64], with n the length of a row, bit by bit; absmax was
# made as the maximum of each 64 of the flattened tensor, (row * n + column) // 64.
# Who is hurt: who runs, tests or merges on a CPU a model in 4 bits whose MLPs are 4304 wide, as those of the vision towers of
# Qwen3-VL-8B and of SigLIP so400m.
# Way around: dequantize_4bit with quant_state.shape (1, rows * n), then reshape; or leave such layers in 16 bits
# (llm_int8_skip_modules).
#
# The script fails once a version behaves otherwise, and on a CPU without AVX-512. Needs network for pip, no GPU, no account,
# several GB in a temporary folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'bitsandbytes==0.50.2' 'torch==2.11.0' 'numpy<3'
"$work/venv/bin/python" - <<'PY'
import sys

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

if torch.backends.cpu.get_cpu_capability() != "AVX512":
    sys.exit("this CPU has no AVX-512")
torch.manual_seed(0)


def unpacked(packed, state, block_of):
    """Return code times scale in float32; high nibbles come first."""
    nibbles = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], 1).reshape(state.shape)
    rows, columns = torch.arange(state.shape[0])[:, None], torch.arange(state.shape[1])[None]
    return state.code[nibbles.long()] * state.absmax[block_of(rows, columns)]


def off(found, right):
    return round(100 * ((found - right).norm() / right.norm()).item(), 1)


seen = {}
for rows, n in ((1152, 4304), (64, 96), (64, 4320), (1, 4304), (64, 4288), (64, 98), (64, 3420)):
    weight = torch.randn(rows, n)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    found = dequantize_4bit(packed, state)
    stored = unpacked(packed, state, lambda row, column: (row * n + column) // 64)
    by_rows = unpacked(packed, state, lambda row, column: row * (n // 64) + column // 64)
    layer = bnb.nn.Linear4bit(n, rows, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=False)
    layer.load_state_dict({"weight": weight})
    layer = layer.to("cpu").train()
    x = torch.randn(8, n)
    exact = [torch.equal(found, stored), torch.equal(found, by_rows)]
    state.shape = torch.Size([1, rows * n])
    seen[rows, n] = [*exact, torch.equal(dequantize_4bit(packed, state).reshape(rows, n), stored)]
    errors = [off(stored, weight), off(found, weight), off(layer(x).detach(), x @ weight.T)]
    print(f"{rows:4} x {n:4}  own unpacking {errors[0]:4}%  dequantize_4bit {errors[1]:4}%  Linear4bit {errors[2]:4}%  ", end="")
    print("as stored" if exact[0] else "blocks by rows" if exact[1] else "neither")
print("bitsandbytes", bnb.__version__, "torch", torch.__version__)
print("as one row, then reshaped: as stored", all(found[2] for found in seen.values()))
wrong = {shape for shape, found in seen.items() if not found[0]}
expected = {(1152, 4304), (64, 96), (64, 4320)}
same = all(found[2] for found in seen.values()) and all(seen[shape][1] for shape in wrong)
sys.exit(0 if wrong == expected and same else f"other than stated: {seen}")
PY
