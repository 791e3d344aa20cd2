"""Compare the kernels of gated delta-net layers with a recurrence in float32, once for each shape, before they are used."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from qwen_vl_sft.families.base import PackedLayout, StateStep
from qwen_vl_sft.families.gated_delta_net import Operations, attended, pieces_of
from qwen_vl_sft.families.gated_delta_states import read, rounds_of

# Pieces of more than a chunk and of less, one shorter than the convolution. Where they share, the last two go on from the
# second.
LENGTHS, PARENTS = (126, 66, 5, 2), (None, None, 1, 1)
# Where prompts are read one goes on from another that does.
READ_AFTER = (None, None, 1, 2)
# |a - b| / |b|. Half precision rounds to 0.4%, and again in each of a chain of products; a piece that goes on from
# another state is off by far more.
TOLERANCE = 3e-2
# Heads forget at different speeds, by these powers of two. Behind most of a chunk the inverse of the fastest one's decay is
# more than float32 holds.
_SPEEDS = (-2.0, 3.5)
_ROWS = ((0,), (1, 2), (1, 3))
_ROWS_APART = ((0,), (1,), (2,), (3,))
_ROWS_READ = ((0,), (1, 2, 3))


def differences(
    operations: Operations, layer: Any, dtype: torch.dtype, shared: bool, learns: bool = True
) -> dict[str, float]:
    """Return how far the operations of a layer are from float32, as |a - b| / |b|: of the output and of each gradient.

    Of `layer` only the sizes count, and the device of its weights; numbers are drawn. With `shared` some pieces go on
    from another one.
    """
    rows = _ROWS if shared else _ROWS_APART
    device = layer.conv1d.weight.device
    numbers = torch.Generator(device).manual_seed(0)
    _fill_free_memory(device)
    example, inputs = drawn(layer, sum(LENGTHS), dtype, numbers)
    pieces = pieces_on(device, LENGTHS, PARENTS if shared else [None] * len(LENGTHS), layer.conv_kernel_size)
    grad = torch.randn(1, sum(LENGTHS), layer.value_dim, generator=numbers, device=device).to(dtype)
    # A checkpointed layer would take what is saved here for its own, and compute itself anew for the gradients of this.
    on_its_own = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.set_grad_enabled(learns), torch.autocast(device.type, enabled=False), on_its_own:
        found = _outcome(lambda *tensors: attended(operations, example, pieces, *tensors), inputs, grad, learns)
        wanted = _outcome(lambda *tensors: _by_row(example, rows, *tensors), inputs, grad, learns)
    return _apart(found, wanted)


def differences_reading(operations: Operations, layer: Any, dtype: torch.dtype) -> dict[str, float]:
    """Return the same of prompts that are read: of the output, and of the states that are left for the next tokens."""
    numbers = torch.Generator(layer.conv1d.weight.device).manual_seed(0)
    _fill_free_memory(numbers.device)
    example, inputs = drawn(layer, sum(LENGTHS), dtype, numbers)
    with torch.no_grad(), torch.autocast(numbers.device.type, enabled=False):
        found = read_example(operations, layer, example, LENGTHS, READ_AFTER, inputs)
        states: dict[int, torch.Tensor] = {}
        output = _by_row(example, _ROWS_READ, *inputs.values(), states=states)
    return _apart(found, {"output": output, "state": torch.stack([states[number] for number in range(len(LENGTHS))])})


def read_example(
    operations: Operations,
    layer: Any,
    example: Any,
    lengths: Sequence[int],
    after: Sequence[int | None],
    inputs: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Read pieces of prompts, each `after` another one; return the output, and the state behind each piece."""
    device, width = layer.conv1d.weight.device, layer.conv_kernel_size - 1
    rounds = rounds_of(StateStep(lengths, after, range(len(lengths))), layer.conv_kernel_size, device)
    channels = inputs["projected"].shape[-1]
    past = torch.zeros(len(lengths), channels, width, dtype=inputs["projected"].dtype, device=device)
    states = torch.zeros(len(lengths), layer.num_v_heads, layer.head_k_dim, layer.head_v_dim, device=device)
    return {"output": read(operations, example, rounds, list(inputs.values()), past, states), "state": states}


def _apart(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    return {
        name: float((one.float() - wanted[name].float()).norm() / wanted[name].float().norm())
        for name, one in found.items()
    }


def _fill_free_memory(device: torch.device) -> None:
    """Put NaN into memory that what is computed next is given: what reads values that nothing wrote shows."""
    if device.type == "cuda":
        for count, size in ((4, 2**26), (64, 2**17)):
            # Beside a model and its cache there may be less than that.
            with suppress(torch.OutOfMemoryError):
                blocks = [torch.full((size,), torch.nan, device=device) for _ in range(count)]
                del blocks


def layer_of(config: Any, device: torch.device) -> Any:
    """Return the sizes of a configuration's gated delta-net layers, as the layers themselves have them."""
    text = config.get_text_config()
    keys, values = text.linear_num_key_heads, text.linear_num_value_heads
    return SimpleNamespace(
        num_v_heads=values,
        key_dim=keys * text.linear_key_head_dim,
        value_dim=values * text.linear_value_head_dim,
        head_k_dim=text.linear_key_head_dim,
        head_v_dim=text.linear_value_head_dim,
        conv_kernel_size=text.linear_conv_kernel_dim,
        activation=text.hidden_act,
        conv1d=SimpleNamespace(weight=torch.zeros(1, device=device)),
    )


def drawn(layer: Any, tokens: int, dtype: torch.dtype, numbers: torch.Generator) -> tuple[Any, dict[str, torch.Tensor]]:
    """Draw a layer's weights, for its sizes, and the inputs of `attended` for a sequence of tokens."""
    device = numbers.device

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=numbers, device=device)

    channels, kernel, heads = 2 * layer.key_dim + layer.value_dim, layer.conv_kernel_size, layer.num_v_heads
    speeds = torch.linspace(*_SPEEDS, heads, device=device).exp2()
    sizes = {name: getattr(layer, name) for name in ("key_dim", "value_dim", "head_k_dim", "head_v_dim", "activation")}
    example = SimpleNamespace(
        conv1d=SimpleNamespace(weight=draw(channels, 1, kernel).to(dtype) / 2, bias=None),
        norm=SimpleNamespace(weight=1 + draw(layer.head_v_dim).to(dtype) / 4, variance_epsilon=1e-6),
        **sizes,
    )
    inputs = {
        "projected": draw(1, tokens, channels).to(dtype),
        "decay": -F.softplus(draw(1, tokens, heads) - 2) * speeds,
        "beta": draw(1, tokens, heads).sigmoid().to(dtype),
        "gate": draw(1, tokens, layer.value_dim).to(dtype),
    }
    return example, inputs


def pieces_on(device: torch.device, lengths: Any, parents: Any, kernel_size: int) -> dict[str, Any]:
    """Return `pieces_of` pieces of these lengths on a device."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(one) for one in value]
        return value.to(device) if isinstance(value, torch.Tensor) else value

    pieces = pieces_of(PackedLayout(lengths, parents, torch.zeros(0)), kernel_size)
    return {name: moved(value) for name, value in pieces.items()}


def _outcome(
    function: Any, inputs: dict[str, torch.Tensor], grad: torch.Tensor, learns: bool
) -> dict[str, torch.Tensor]:
    leaves = {name: tensor.detach().requires_grad_(learns) for name, tensor in inputs.items()}
    output = function(*leaves.values())
    if not learns:
        return {"output": output}
    grads = torch.autograd.grad(output, list(leaves.values()), grad.to(output.dtype))
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def _by_row(
    layer: Any, rows: Sequence[Sequence[int]], *inputs: torch.Tensor, states: dict[int, torch.Tensor] | None = None
) -> torch.Tensor:
    """Compute every row, given by its pieces, by itself and in float32; a shared prefix as often as rows share it.

    Puts the state behind each piece into `states`.
    """
    parts = [tensor[0].float().split(list(LENGTHS)) for tensor in inputs]
    found: dict[int, torch.Tensor] = {}
    for row in rows:
        whole = [torch.cat([part[number] for number in row]) for part in parts]
        output, behind = _recurrence(layer, *whole)
        found |= dict(zip(row, output.split([LENGTHS[number] for number in row]), strict=True))
        if states is not None:
            ends = itertools.accumulate(LENGTHS[number] for number in row)
            states |= {number: behind[end - 1] for number, end in zip(row, ends, strict=True)}
    return torch.cat([found[number] for number in range(len(LENGTHS))])[None]


def _recurrence(
    layer: Any, projected: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, gate: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Compute a row [T, ...] -> [T, heads * values] and the state behind each token.

    Token by token (https://arxiv.org/abs/2412.06464, equation 10).
    """
    weight = layer.conv1d.weight.float()
    before = F.pad(projected.T[None], (weight.shape[-1] - 1, 0))
    mixed = F.silu(F.conv1d(before, weight, groups=len(weight)))[0].T
    query, key, value = mixed.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    value = value.unflatten(-1, (-1, layer.head_v_dim))
    shared = value.shape[1] // (layer.key_dim // layer.head_k_dim)
    query, key = (part.unflatten(-1, (-1, layer.head_k_dim)).repeat_interleave(shared, dim=1) for part in (query, key))
    query, key = (part * torch.rsqrt(part.square().sum(-1, keepdim=True) + 1e-6) for part in (query, key))
    query = query * layer.head_k_dim**-0.5
    state = value.new_zeros(value.shape[1], layer.head_k_dim, layer.head_v_dim)
    outputs, states = [], []
    for q, k, v, g, b in zip(query, key, value, decay, beta, strict=True):
        state = state * g.exp()[:, None, None]
        written = (v - (state * k[:, :, None]).sum(1)) * b[:, None]
        state = state + k[:, :, None] * written[:, None]
        outputs.append((state * q[:, :, None]).sum(1))
        states.append(state)
    out = torch.stack(outputs)
    normed = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + layer.norm.variance_epsilon)
    gated = normed * layer.norm.weight.float() * F.silu(gate.unflatten(-1, (-1, layer.head_v_dim)))
    return gated.flatten(1), states
