"""Gated delta-net layers while rows are answered: the last inputs of the convolution and the state of each row are kept.

transformers keeps them in a cache of a batch, whose rows all begin and end together. Here they lie in slots: a row that is
read goes on from the slot of its prefix, or from nothing, and leaves what its next token needs in a slot of its own. Prompts
are read with the operations that the layer was given for packed rows; a row's next token takes PyTorch's own.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from qwen_vl_sft.families.base import StateStep
from qwen_vl_sft.families.gated_delta_net import (
    Choice,
    Operations,
    PackedForward,
    Rule,
    heads,
    plain,
    projections,
    round_behind_states,
)


@dataclass(frozen=True)
class Round:
    """Pieces of packed prompts that are computed together.

    Attributes:
        pieces: of `round_behind_states`.
        order: [T] the positions of their tokens in the sequence.
        begins: [S] the slots that they go on from; None where they begin from nothing.
        ends: [S] the slots that they leave their states in.
    """

    pieces: dict[str, Any]
    order: torch.Tensor
    begins: torch.Tensor | None
    ends: torch.Tensor


def rounds_of(step: StateStep, kernel_size: int, device: torch.device) -> list[Round]:
    """Return the pieces of a step in rounds, each of which goes on from states that those before it leave."""
    tokens = torch.arange(sum(step.lengths)).split(list(step.lengths))
    found = []
    for numbers in _in_order(step):
        begins = [begin for number in numbers if (begin := step.begins[number]) is not None]
        assert len(begins) in (0, len(numbers))
        lengths = [step.lengths[number] for number in numbers]
        found.append(
            Round(
                _on(device, round_behind_states(lengths, kernel_size, known=bool(begins))),
                torch.cat([tokens[number] for number in numbers]).to(device),
                torch.tensor(begins, device=device) if begins else None,
                torch.tensor([step.ends[number] for number in numbers], device=device),
            )
        )
    return found


def read(
    operations: Operations,
    layer: Any,
    rounds: Sequence[Round],
    parts: Sequence[torch.Tensor],
    inputs: torch.Tensor,
    states: torch.Tensor,
) -> torch.Tensor:
    """Compute what stands between the linear layers of a layer over the pieces of packed prompts, and leave their states.

    Args:
        operations: what computes it.
        layer: gives the sizes of heads, and the weights of convolution and norm.
        rounds: of `rounds_of`.
        parts: of `projections`, for a sequence [1, T].
        inputs: [slots, C, kernel - 1] of the convolution, read and written.
        states: [slots, heads, keys, values] float32, read and written.

    Returns [1, T, heads * values].
    """
    *known, gate = parts
    rule, width = operations.rule(layer), inputs.shape[-1]
    outputs = []
    for one in rounds:
        projected, decay, beta = (part.index_select(1, one.order) for part in known)
        before = first = None
        if one.begins is not None:
            before, first = (kept.index_select(0, one.begins) for kept in (inputs, states))
        mixed = operations.convolve(layer, projected, one.pieces, before)
        out, last = rule(one.pieces, 0, [*operations.heads(layer, mixed), decay, beta], first, True)
        past = inputs.new_zeros(len(one.ends), *inputs.shape[1:]) if before is None else before
        behind = torch.cat([projected[0], past.transpose(1, 2).flatten(0, 1).to(projected.dtype)])
        ends = behind.index_select(0, one.pieces["ends"].flatten()).view(-1, width, behind.shape[-1])
        inputs.index_copy_(0, one.ends, ends.transpose(1, 2).to(inputs.dtype))
        states.index_copy_(0, one.ends, last.to(states.dtype))
        outputs.append(out[0])
    order = torch.cat([one.order for one in rounds])
    attended = torch.cat(outputs).index_select(0, order.argsort())
    value = layer.head_v_dim
    normed = operations.norm(layer, attended.reshape(-1, value), gate.reshape(-1, value))
    return normed.reshape(1, len(order), -1)


class DeltaStates:
    """What the layers whose class name ends in `kind` carry from token to token, in `slots` slots.

    Of each layer the last inputs of its convolution [slots, channels, kernel - 1], and its states [slots, heads, keys,
    values] float32.
    """

    def __init__(self, model: nn.Module, kind: str, slots: int, dtype: torch.dtype) -> None:
        self._layers: list[Any] = [module for module in model.modules() if type(module).__name__.endswith(kind)]
        self._inputs: dict[Any, torch.Tensor] = {}
        self._states: dict[Any, torch.Tensor] = {}
        for layer in self._layers:
            inputs = (slots, layer.conv_dim, layer.conv_kernel_size - 1)
            state = (slots, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim)
            self._inputs[layer] = torch.zeros(inputs, dtype=dtype, device=layer.conv1d.weight.device)
            self._states[layer] = torch.zeros(state, device=layer.conv1d.weight.device)

    @contextmanager
    def applied(self, step: StateStep) -> Iterator[None]:
        """Have the layers go on from states and leave them as `step` says, in forward passes of one sequence [1, T, D]."""
        before = {layer: vars(layer).get("forward") for layer in self._layers}
        rounds: dict[Any, list[Round]] = {}
        for layer in self._layers:
            if step.slots is not None:
                layer.forward = partial(self._decode, layer, step.slots)
                continue
            where = (layer.conv_kernel_size, self._inputs[layer].device)
            if where not in rounds:
                rounds[where] = rounds_of(step, *where)
            layer.forward = partial(self._read, layer, _choice(before[layer]), rounds[where])
        try:
            yield
        finally:
            for layer, forward in before.items():
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward

    def _read(
        self, layer: Any, choose: Choice, rounds: Sequence[Round], /, hidden_states: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Compute the pieces of packed prompts, each after the one that it goes on from."""
        parts = projections(layer, hidden_states)
        operations = choose(layer, parts[0], rounds[0].pieces)
        found: torch.Tensor = layer.out_proj(
            read(operations, layer, rounds, parts, self._inputs[layer], self._states[layer])
        )
        return found

    def _decode(self, layer: Any, slots: torch.Tensor, /, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """Compute one token of each of B rows."""
        inputs, states = self._inputs[layer], self._states[layer]
        projected, decay, beta, gate = (part[0] for part in projections(layer, hidden_states))
        window = torch.cat([inputs.index_select(0, slots).to(projected.dtype), projected[:, :, None]], dim=-1)
        inputs.index_copy_(0, slots, window[:, :, 1:].to(inputs.dtype))
        weight = layer.conv1d.weight
        convolved = F.conv1d(window.to(weight.dtype), weight, layer.conv1d.bias, groups=weight.shape[0])[:, :, 0]
        mixed = ACT2FN[layer.activation](convolved).to(projected.dtype)[:, None]
        out, last = _recurrent_rule(layer)(
            *heads(layer, mixed),
            g=decay[:, None],
            beta=beta[:, None],
            initial_state=states.index_select(0, slots),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        states.index_copy_(0, slots, last.to(states.dtype))
        width = layer.head_v_dim
        normed = layer.norm(out.reshape(-1, width), gate.reshape(-1, width))
        found: torch.Tensor = layer.out_proj(normed.reshape(1, len(slots), -1))
        return found


def _choice(forward: Any) -> Choice:
    """Return what chose a layer's operations for packed rows; PyTorch's own where none did."""
    return forward.choose if isinstance(forward, PackedForward) else plain


def _on(device: torch.device, value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _on(device, one) for name, one in value.items()}
    if isinstance(value, list):
        return [_on(device, one) for one in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _in_order(step: StateStep) -> list[list[int]]:
    """Return the numbers of pieces that can be computed together, in order: those that begin from nothing stand alone."""
    depths: dict[int, int] = {}
    rounds: dict[int, list[int]] = {}
    for number, (begin, end) in enumerate(zip(step.begins, step.ends, strict=True)):
        # A slot that no piece before leaves its state in holds one of an earlier pass.
        depths[end] = depth = 0 if begin is None else depths.get(begin, 0) + 1
        rounds.setdefault(depth, []).append(number)
    return [rounds[depth] for depth in sorted(rounds)]


def state_bytes(text: Any, layers: int, dtype: torch.dtype) -> int:
    """Return the memory of a slot for a text configuration with so many of these layers."""
    keys = text.linear_num_key_heads * text.linear_key_head_dim
    values = text.linear_num_value_heads * text.linear_value_head_dim
    convolution = (2 * keys + values) * (text.linear_conv_kernel_dim - 1) * dtype.itemsize
    return layers * int(convolution + 4 * values * text.linear_key_head_dim)


def _recurrent_rule(layer: nn.Module) -> Rule:
    """Return the gated delta rule token by token, in PyTorch's own operations."""
    rule: Callable[..., Any] = sys.modules[type(layer).__module__].torch_recurrent_gated_delta_rule
    return inspect.unwrap(rule)
