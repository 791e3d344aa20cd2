"""Triton kernels of the vision tower: what they compute, in Triton's interpreter, is what transformers does."""

import os
import subprocess
import sys

# A process of its own: Triton reads the variable when it is imported.
INTERPRETED = """
import torch
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from qwen_vl_sft.modeling.vision_kernels import quick_gelu, rotate

torch.manual_seed(0)
for shape in ((3, 5), (7, 2, 1025)):
    x = torch.randn(shape) * 4
    assert torch.allclose(quick_gelu(x), x * torch.sigmoid(1.702 * x), atol=1e-6)
qkv = torch.randn(11, 3, 6, 20)
query, key, _ = qkv.permute(1, 0, 2, 3).unbind(0)
angles = torch.randn(11, 20)
found = rotate(query, key, angles.cos(), angles.sin())
wanted = apply_rotary_pos_emb_vision(query, key, angles.cos(), angles.sin())
assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, wanted))
assert all(one.is_contiguous() for one in found)
print("the same")
"""


def test_kernels_do_what_transformers_does():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout == "the same\n", done.stderr[-2000:]
