"""Triton kernels: what they compute, in Triton's interpreter, is what transformers and PyTorch do."""

import os
import subprocess
import sys

import pytest

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

from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated, l2norm
from qwen_vl_sft.families.delta_norms import gated_norm, normalised

def same(found, wanted, *leaves):
    grad = torch.randn_like(wanted)
    found, wanted = ([output, *torch.autograd.grad(output, leaves, grad)] for output in (found, wanted))
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, wanted, strict=True))

for tokens, heads, width in ((37, 3, 16), (5, 1, 24)):
    # A view, as queries are of what was convolved.
    x = torch.randn(1, tokens, 2 * heads * width)[..., : heads * width].unflatten(-1, (heads, width)).requires_grad_()
    same(normalised(x), l2norm(x, dim=-1, eps=1e-6), x)
    norm = Qwen3_5RMSNormGated(width)
    torch.nn.init.normal_(norm.weight)
    x, gate = (torch.randn(tokens * heads, width, requires_grad=True) for _ in range(2))
    same(gated_norm(x, gate, norm.weight, norm.variance_epsilon), norm(x, gate), x, gate, norm.weight)
print("the same")
"""
EXPERTS = """
import torch
from torch import nn
from types import MethodType, SimpleNamespace
from qwen_vl_sft.modeling import expert_kernels
from qwen_vl_sft.modeling.experts import _plain, compute_fused
from qwen_vl_sft.modeling.token_routes import Checked

torch.manual_seed(0)


class Experts(nn.Module):
    num_experts = 5

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(5, 2 * 12, 20) / 4)
        self.down_proj = nn.Parameter(torch.randn(5, 20, 12) / 4)

    def _apply_gate(self, widened):
        gate, up = widened.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


def outcome(compute, tokens, weights):
    experts.zero_grad()
    tokens, weights = tokens.clone().requires_grad_(), weights.clone().requires_grad_()
    output = compute(experts, tokens, chosen, weights)
    (output * torch.arange(output.numel()).view_as(output).sin()).sum().backward()
    return [output, tokens.grad, weights.grad, *(parameter.grad.clone() for parameter in experts.parameters())]


experts = Experts()
# Of the third expert no token makes use.
chosen = torch.stack([torch.tensor([0, 1, 3, 4])[torch.randperm(4)[:3]] for _ in range(33)])
tokens, weights = torch.randn(33, 20), torch.rand(33, 3)
found, wanted = (outcome(compute, tokens, weights) for compute in (compute_fused, _plain))
for one, other in zip(found, wanted, strict=True):
    assert torch.allclose(one, other, atol=1e-5), (one - other).abs().max()
# In the model's own loop over experts.
for token in range(33):
    alone = sum(
        weight * (experts._apply_gate(tokens[token] @ experts.gate_up_proj[e].T) @ experts.down_proj[e].T)
        for e, weight in zip(chosen[token].tolist(), weights[token])
    )
    assert torch.allclose(found[0][token], alone, atol=1e-5)
empty = compute_fused(experts, torch.zeros(0, 20), torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3))
assert empty.shape == (0, 20)

# What is wrong is told on the first call, by its name.
right, expert_kernels.summed = expert_kernels.summed, lambda rows, places, choices: 2 * right(rows, places, choices)
try:
    Checked().summed(torch.ones(4, 3), torch.arange(4), 2)
except ValueError as error:
    print(error)


def broken(*arguments):
    raise RuntimeError("no such card")


expert_kernels.summed = broken
try:
    Checked().summed(torch.ones(4, 3), torch.arange(4), 2)
except ValueError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def printed():
    """What each of the scripts prints; both are run by one process."""
    end = "---"
    script = "".join(f"exec({one!r}, {{'__name__': '__main__'}})\nprint({end!r})\n" for one in (INTERPRETED, EXPERTS))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split(f"{end}\n")


def test_kernels_do_what_transformers_does(printed):
    assert printed[0] == "the same\n"


def test_kernels_around_experts_do_what_pytorch_does(printed):
    wrong, broken = printed[1].splitlines()
    assert wrong == (
        "fused_kernels: experts (summed) is 100.0% off PyTorch's own operations; leave experts out of fused_kernels"
    )
    assert broken == (
        "fused_kernels: experts (summed) does not run here: no such card; leave experts out of fused_kernels"
    )
