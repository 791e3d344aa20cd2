"""Triton kernels: what they compute, in Triton's interpreter, is what transformers and PyTorch do."""

import os
import subprocess
import sys

import pytest

# Before all others.
PREPARED = """
import logging
import sys
import triton.runtime.interpreter as interpreter

# Warnings are printed too, in their order.
logging.basicConfig(stream=sys.stdout, format="%(message)s")
# The interpreter takes arrays of one number as the bounds of a loop; NumPy 2.4 no longer has these as indices.
patch_tensors = interpreter._patch_lang_tensor


def with_indices(tensor, scope):
    patch_tensors(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = with_indices
"""
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

from transformers.models.qwen3_5.modeling_qwen3_5 import apply_rotary_pos_emb
from qwen_vl_sft.modeling.partial_rope import rotate_partly

# Views, as those of attention are; of 24 values 4 are rotated.
query, key = (torch.randn(2, 5, heads, 24).transpose(1, 2).requires_grad_() for heads in (6, 2))
angles = torch.randn(2, 5, 2).repeat(1, 1, 2)
for own in (angles, angles[:1]):
    found = rotate_partly(query, key, own.cos(), own.sin())
    for one, other in zip(found, apply_rotary_pos_emb(query, key, own.cos(), own.sin()), strict=True):
        same(one, other, query if one is found[0] else key)

from qwen_vl_sft.modeling import partial_rope
from qwen_vl_sft.modeling.rope_check import first_values_rotated

called = []


def counted(*arguments):
    called.append(len(arguments))
    return apply_rotary_pos_emb(*arguments)


turns = angles.cos(), angles.sin()
checked = first_values_rotated(counted)
for _ in range(2):
    same(checked(query, key, *turns)[0], apply_rotary_pos_emb(query, key, *turns)[0], query)
assert called == [4], "compared once"
partial_rope.rotate_partly = lambda query, key, cos, sin: (rotate_partly(query, key, cos, sin)[0], key)
same(checked(query[:, :4], key, *turns)[1], apply_rotary_pos_emb(query, key, *turns)[1], key)
assert called == [4] * 3
partial_rope.rotate_partly = rotate_partly
print("the same")
"""
GRADIENT = """
import itertools
import math
import torch
from qwen_vl_sft.families.delta_gradient import chunk_gradients


def chunked_rule(q, k, w, u, g, first, scale, size, bounds):
    # The chunked rule in float64, piece by piece; keeps every state before and behind a chunk, and new values.
    shared = u.shape[2] // q.shape[2]
    before, behind, values, outputs = [], [], [], []
    for start, stop in itertools.pairwise(bounds):
        state = first.clone()
        for begin in range(start, stop, size):
            part = slice(begin, min(begin + size, stop))
            queries, keys = (one[:, part].repeat_interleave(shared, 2) for one in (q, k))
            decay = g[:, part]
            before.append(state)
            new = u[:, part] - torch.einsum("bthk,bhkv->bthv", w[:, part], state)
            apart = (decay.mT[..., :, None] - decay.mT[..., None, :]).tril().exp2()
            scores = (torch.einsum("bthk,bshk->bhts", queries, keys) * apart).tril()
            known = torch.einsum("bthk,bhkv->bthv", queries * decay.exp2()[..., None], state)
            outputs.append(scale * (known + torch.einsum("bhts,bshv->bthv", scores, new)))
            rest = (decay[:, -1:] - decay).exp2()[..., None]
            state = state * decay[:, -1].exp2()[..., None, None] + torch.einsum("bthk,bthv->bhkv", keys * rest, new)
            values.append(new)
            behind.append(state)
    return torch.cat(outputs, 1), before, behind, values


def compare(lengths, speed, size=16, scale=0.3, heads=2, width=5, wide=6):
    # Of queries, keys, w and decay, with a key head for two of values; without lengths for a batch of two rows.
    double = {"dtype": torch.float64}
    torch.manual_seed(0)
    batch, tokens = (1, sum(lengths)) if lengths else (2, 39)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()] if lengths else [0, tokens]
    chunks = [[s, c] for s, (a, b) in enumerate(itertools.pairwise(bounds)) for c in range(-(-(b - a) // size))]
    q, k = (torch.randn(batch, tokens, heads, width, requires_grad=True, **double) for _ in range(2))
    w, u = (torch.randn(batch, tokens, 2 * heads, one, requires_grad=True, **double) for one in (width, wide))
    steps = -torch.rand(batch, tokens, 2 * heads, **double) * speed
    # The decay begins anew in every chunk.
    starts = [bounds[piece] + number * size for piece, number in chunks]
    g = torch.cat([steps[:, a:b].cumsum(1) for a, b in itertools.pairwise([*starts, tokens])], 1).requires_grad_()
    first = torch.randn(batch, 2 * heads, width, wide, requires_grad=True, **double)
    out, before, behind, values = chunked_rule(q, k, w, u, g, first, scale, size, bounds)
    last = [n for n, (one, other) in enumerate(zip(chunks, [*chunks[1:], [-1]], strict=True)) if one[0] != other[0]]
    do = torch.randn_like(out)
    loss = (out * do).sum() + sum((behind[number] * torch.randn_like(first)).sum() for number in last)
    wanted = torch.autograd.grad(loss, (q, k, w, g), retain_graph=True)
    dh = torch.autograd.grad(loss, behind, retain_graph=True)
    dv = torch.autograd.grad(loss, values)
    inputs = {
        "q": q, "k": k, "v": torch.cat(values, 1), "do": do, "h": torch.stack(before, 1), "dh": torch.stack(dh, 1),
        "w": w, "g": g, "dv": torch.cat(dv, 1),
    }
    found = chunk_gradients(
        **{name: tensor.detach().float() for name, tensor in inputs.items()}, scale=scale,
        cu_seqlens=torch.tensor(bounds).int() if lengths else None, chunk_size=size,
        chunk_indices=torch.tensor(chunks).int() if lengths else None, g_gamma=None,
    )
    # By the natural logarithm, as the kernels take the decay.
    for one, other in zip((*found[:3], found[3] * math.log(2)), wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


compare((21, 3, 16, 15), 0.25)
compare(None, 0.25)
# Behind most of a chunk the inverse of the decay is more than float32 holds.
compare((15, 30), 40.0)
print("autograd's")
"""
CONVOLUTION = """
import torch
from types import SimpleNamespace
from qwen_vl_sft.families import delta_convolution
from qwen_vl_sft.families.base import PackedLayout
from qwen_vl_sft.families.delta_kernels import convolve
from qwen_vl_sft.families.gated_delta_net import TORCH, pieces_of, round_behind_states

delta_convolution._SIZES |= {"TOKENS": 32, "CHANNELS": 16}
torch.manual_seed(0)
weight = torch.nn.Parameter(torch.randn(20, 1, 4))
layer = SimpleNamespace(activation="silu", conv1d=SimpleNamespace(weight=weight, bias=None))


def compare(pieces, tokens, before=None, leaves=True):
    # A view, whose rows stand apart.
    x = torch.randn(1, tokens, 25)[..., :20].requires_grad_(leaves)
    found, wanted = (convolve_with(layer, x, pieces, before) for convolve_with in (convolve, TORCH.convolve))
    outputs = [[found], [wanted]]
    if leaves:
        grad = torch.randn_like(wanted)
        for outcome in outputs:
            outcome += torch.autograd.grad(outcome[0], (x, weight), grad)
    for one, other in zip(*outputs, strict=True):
        assert torch.allclose(one, other, atol=1e-5), (one - other).abs().max()


# Rows apart; prefixes, one shorter than the kernel, with branches of which some are, and one right behind its prefix.
compare(pieces_of(PackedLayout([31, 2, 1, 5], [None] * 4, None), 4), 39)
compare(pieces_of(PackedLayout([2, 14, 9, 3, 1, 2, 5], [None, None, None, 2, 1, 0, 0], None), 4), 36)
# Behind inputs that stand outside of the sequence, or behind none.
with torch.no_grad():
    for known in (True, False):
        before = torch.randn(3, 20, 3) if known else None
        compare(round_behind_states([5, 1, 19], 4, known), 25, before, leaves=False)
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
ATTENTION = """
import torch
from torch.nn.functional import scaled_dot_product_attention

from qwen_vl_sft.inference.engine import decode_check, decode_kernel
from qwen_vl_sft.inference.engine.attention import DecodeStep, SlotStep
from qwen_vl_sft.inference.engine.cache import KeyValueCache
from types import SimpleNamespace

torch.manual_seed(0)
# Groups of 7, 2 and 1 queries on a head of keys; heads of 16, 20 and 32 values; rows that end in and at a step of 64 keys.
for heads, of_keys, width, lengths in ((14, 2, 16, [5, 700, 64]), (8, 4, 20, [0, 63]), (3, 3, 32, [300, 1, 129, 900, 513])):
    config = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=of_keys, head_dim=width)
    cache = KeyValueCache(config, 1500, torch.float32, torch.device("cpu"))
    for stored in (*cache.keys.values(), *cache.values.values()):
        stored.normal_()
    rows, longest = len(lengths), max(lengths) + 1
    # Rows share slots, as those on one image do, but for the newest.
    table = torch.randint(1, 1400, (rows + 1, 1024))
    places, lengths = torch.randperm(rows + 1)[:rows], torch.tensor(lengths)
    write = torch.arange(1401, 1401 + rows)
    table[places, lengths] = write
    q, k, v = (torch.randn(count, rows, width).transpose(0, 1) for count in (heads, of_keys, of_keys))
    slots = table[places, :longest]
    mask = torch.zeros(rows, longest).masked_fill_(torch.arange(longest) > lengths[:, None], float("-inf"))
    before = {name: {0: tensors[0].clone()} for name, tensors in (("keys", cache.keys), ("values", cache.values))}
    wanted = DecodeStep(cache, write, slots, mask[:, None, None]).attend("", 0, q, k, v, None)
    cache.keys, cache.values = before["keys"], before["values"]
    # What is masked counts for nothing, whatever it holds.
    for stored in (cache.keys[0], cache.values[0]):
        stored[0] = float("nan")
    found = SlotStep(cache, write, table, places, lengths).attend("", 0, q, k, v, None)
    assert torch.allclose(found, wanted, atol=1e-5), (found - wanted).abs().max()
    assert torch.equal(cache.keys[0][write], k)
    assert decode_check.difference(heads, of_keys, width, torch.float32, cache.device) < 1e-5

from qwen_vl_sft.modeling import image_attention, image_kernel
from qwen_vl_sft.modeling.plain_attention import attend_by_piece

# Images of few patches, of none, of a part of a tile, and of whole ones; values lie beside keys and queries.
bounds = torch.tensor([0, 7, 7, 135, 393], dtype=torch.int32)
for heads, width in ((2, 80), (1, 72)):
    q, k, v = torch.randn(393, 3, heads, width).permute(1, 0, 2, 3).unbind(0)
    found = image_attention.attend_to_images(q, k.contiguous(), v, bounds, 258, None)
    wanted = attend_by_piece(q, k, v, bounds, bounds, None, causal=False)
    assert torch.allclose(found, wanted, atol=1e-5), (found - wanted).abs().max()
right = image_kernel.attend
image_kernel.attend = lambda q, *arguments: torch.zeros_like(q)
images = [torch.zeros(300, 2, 80) for _ in range(3)]
print(image_attention.takes_images(*images, 300))
image_kernel.attend = right
print(image_attention.takes_images(*(image[:, :1] for image in images), 300))

right = decode_kernel.attend_to_slots
# Of bfloat16 the interpreter computes something else.
cache = SimpleNamespace(dtype=torch.float16, keys=dict(cache.keys), device=cache.device)
decode_kernel.attend_to_slots = lambda q, *arguments: torch.zeros_like(q)
print(decode_check.has_decode_kernel(3, cache))


def broken(*arguments):
    raise RuntimeError("no such card")


decode_kernel.attend_to_slots = broken
print(decode_check.has_decode_kernel(6, cache))


def with_a_row_that_nothing_wrote(*arguments):
    found = right(*arguments)
    found[-1] = torch.nan
    return found


decode_kernel.attend_to_slots = with_a_row_that_nothing_wrote
print(decode_check.has_decode_kernel(12, cache))
decode_kernel.attend_to_slots = right
print(decode_check.has_decode_kernel(9, cache))
print(decode_check.has_decode_kernel(9, SimpleNamespace(dtype=torch.float32)))
"""
# Behind ATTENTION, which lets the interpreter take bounds of a loop.
GATHERED = """
import torch
from qwen_vl_sft.modeling import gathered_keys, gathered_keys_kernel
from qwen_vl_sft.modeling.gathered_keys import Gathered, copies_of

# Tokens with three copies, with one, and with none; heads whose values are no power of two.
index = torch.tensor([4, 0, 1, 2, 0, 1, 5, 1])
copies = copies_of(index, 7)
for shape, kind in (((3, 20), torch.float32), ((2, 8), torch.float16)):
    x = torch.randn(7, *shape, dtype=kind, requires_grad=True)
    taken = Gathered.apply(x, index, *copies)
    assert torch.equal(taken, x[index])
    grad = torch.randn(shape[0], len(index), shape[1]).to(kind).transpose(0, 1)
    (found,) = torch.autograd.grad(taken, x, grad)
    wanted = torch.zeros(7, *shape, dtype=torch.float64).index_add_(0, index, grad.double())
    assert torch.equal(found, wanted.to(kind)) or kind == torch.float32
    assert torch.allclose(found.double(), wanted, atol=1e-3 if kind == torch.float16 else 1e-6)
# One after another in float32: in float16, or in another order, this would not be 1.
one_by_one = gathered_keys_kernel.sum_copies(torch.tensor([[9e7], [-9e7], [1.0]]), *copies_of(torch.tensor([0, 0, 0]), 1))
assert one_by_one.item() == 1
assert gathered_keys._is_right(48, torch.float16, torch.device("cpu"))
sum_copies = gathered_keys_kernel.sum_copies
gathered_keys_kernel.sum_copies = lambda grad, order, starts: sum_copies(grad.flip(0), order, starts)
assert not gathered_keys._is_right(24, torch.float16, torch.device("cpu"))
gathered_keys_kernel.sum_copies = sum_copies
"""


@pytest.fixture(scope="module")
def printed():
    """What each of the scripts prints; all are run by one process."""
    end = "---"
    scripts = (INTERPRETED, EXPERTS, ATTENTION, GRADIENT, GATHERED, CONVOLUTION)
    script = "".join(f"exec({one!r}, {{'__name__': '__main__'}})\nprint({end!r})\n" for one in scripts)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PREPARED + script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split(f"{end}\n")


def test_kernels_do_what_transformers_does(printed):
    told, same = printed[0].splitlines()
    assert told.startswith(
        "heads of 24 values, of which 4 are rotated, are rotated in PyTorch's own operations: the kernel"
    )
    assert told.endswith("% off float32")
    assert same == "the same"


def test_the_gradient_of_the_gated_delta_rule_is_autograds(printed):
    assert printed[3] == "autograd's\n"


def test_the_convolution_and_its_gradients_are_pytorchs(printed):
    assert printed[5] == "the same\n"


def test_kernels_around_experts_do_what_pytorch_does(printed):
    wrong, broken = printed[1].splitlines()
    assert wrong == (
        "fused_kernels: experts (summed) is 100.0% off PyTorch's own operations; leave experts out of fused_kernels"
    )
    assert broken == (
        "fused_kernels: experts (summed) does not run here: no such card; leave experts out of fused_kernels"
    )


def test_the_kernel_that_decodes_attends_to_the_slots_of_each_row(printed):
    off, wrong, fails, failed, unwritten, refused, right, exact = printed[2].splitlines()[3:]
    assert off == (
        "answers are decoded with PyTorch's own attention of 3 heads of 32 values: the kernel for it is 100.0% off float32"
    )
    assert fails == (
        "answers are decoded with PyTorch's own attention of 6 heads of 32 values: the kernel for it fails here:"
        " no such card"
    )
    assert unwritten.endswith("attention of 12 heads of 32 values: the kernel for it is nan% off float32")
    assert (wrong, failed, refused, right, exact) == ("False", "False", "False", "True", "False")


def test_the_kernel_for_images_attends_inside_each(printed):
    assert printed[2].splitlines()[:3] == [
        "images are attended to with PyTorch's own attention of 2 heads of 80 values: the kernel for it is 100.0% off"
        " float32",
        "False",
        "True",
    ]


def test_gradients_of_shared_keys_are_summed_in_float32_and_in_order(printed):
    (told,) = printed[4].splitlines()
    assert told.startswith("gradients of 24 values of keys that rows share are added by PyTorch: the kernel for it is")
