#!/usr/bin/env bash
# triton 3.6.0: with TRITON_INTERPRET=1, which runs kernels on a CPU for tests and debugging, a cast from float32 to
# float8e4nv gives 1.0 for 1.97 (right is 2.0: a mantissa that is rounded up to the next power of two loses its carry), and
# rounds ties away from zero; a cast to bfloat16 cuts the lower bits off. No error, no warning.
#
# Guess before it was run: casts round to the nearest number, ties to even, as `Tensor.to` does and as GPUs do (a kernel with
# these casts to float8e4nv agreed with `Tensor.to` bit by bit on an H200).
#
# Seen (Python 3.11, Linux, triton 3.6.0, torch 2.11.0):
#   float32    1.97 3.97 1.0625 1.999
#   float8e4nv 1.0 4.0 1.125 1.0             Tensor.to: 2.0 4.0 1.0 2.0
#   bfloat16   1.96875 3.96875 1.0625 1.992188   Tensor.to: 1.96875 3.96875 1.0625 2.0
# Who is hurt: tests of quantization kernels on machines without a GPU: right kernels fail, by up to a factor of two, or a
# tolerance is widened until it hides real faults.
# Way around: give such tests values that the narrow type holds exactly, or keep their outputs in float32.
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'triton==3.6.0' 'torch==2.11.0' 'numpy<3'
cat > "$work/casts.py" <<'PY'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def cast(source, target, kind: tl.constexpr, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(target + at, tl.load(source + at).to(kind))


values = torch.tensor([1.97, 3.97, 1.0625, 1.999])
seen = {}
for name, kind, dtype in (("float8e4nv", tl.float8e4nv, torch.float8_e4m3fn), ("bfloat16", tl.bfloat16, torch.bfloat16)):
    found = torch.empty(4, dtype=dtype)
    cast[(1,)](values, found, kind, 4)
    pair = [[round(value, 6) for value in tensor.float().tolist()] for tensor in (found, values.to(dtype))]
    seen[name] = pair
    print(name, *pair[0], "  Tensor.to:", *pair[1])
print("triton", triton.__version__, "torch", torch.__version__)
expected = {
    "float8e4nv": [[1.0, 4.0, 1.125, 1.0], [2.0, 4.0, 1.0, 2.0]],
    "bfloat16": [[1.96875, 3.96875, 1.0625, 1.992188], [1.96875, 3.96875, 1.0625, 2.0]],
}
sys.exit(f"other than stated: {seen}" if seen != expected else 0)
PY
TRITON_INTERPRET=1 "$work/venv/bin/python" "$work/casts.py"
