"""Gated delta-net layers while rows are answered: the last inputs of the convolution and the state of each row are kept.

transformers keeps them in a cache of a batch, whose rows all begin and end together. Here they lie in slots: a row that is
read goes on from the slot of its prefix, or from nothing, and leaves what its next token needs in a slot of its own.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from qwen_vl_sft.families.base import StateStep
from qwen_vl_sft.families.gated_delta_net import Rule, by_piece, torch_rule


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
        compute = self._read if step.slots is None else self._decode
        before = {layer: vars(layer).get("forward") for layer in self._layers}
        for layer in self._layers:
            layer.forward = partial(compute, layer, step)
        try:
            yield
        finally:
            for layer, forward in before.items():
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward

    def _read(self, layer: Any, step: StateStep, /, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """Compute the pieces of packed prompts, each after the one that it goes on from."""
        inputs, states = self._inputs[layer], self._states[layer]
        projected, *gates = _projected(layer, hidden_states)
        parts = [tensor.split(list(step.lengths)) for tensor in (projected, *gates)]
        outputs: dict[int, torch.Tensor] = {}
        for numbers in _in_order(step):
            begins = [step.begins[number] for number in numbers]
            ends = torch.tensor([step.ends[number] for number in numbers], device=inputs.device)
            if begins[0] is None:
                history, first = torch.zeros_like(inputs[: len(numbers)]), None
            else:
                where = torch.tensor(begins, device=inputs.device)
                history, first = inputs.index_select(0, where), states.index_select(0, where)
            extended = [
                torch.cat([past.T.to(projected.dtype), parts[0][number]])
                for past, number in zip(history, numbers, strict=True)
            ]
            width, lengths = inputs.shape[-1], [step.lengths[number] for number in numbers]
            inputs.index_copy_(0, ends, torch.stack([run[-width:].T for run in extended]).to(inputs.dtype))
            mixed = torch.cat([_convolved(layer, run) for run in extended])[None]
            own = [torch.cat([part[number] for number in numbers])[None] for part in parts[1:]]
            out, last = by_piece(torch_rule(layer))(lengths, [*_heads(layer, mixed), *own], first)
            states.index_copy_(0, ends, last.to(states.dtype))
            outputs |= dict(zip(numbers, out[0].split(lengths), strict=True))
        attended = torch.cat([outputs[number] for number in range(len(step.lengths))])
        return _finished(layer, hidden_states, attended)

    def _decode(self, layer: Any, step: StateStep, /, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """Compute one token of each of B rows."""
        assert step.slots is not None
        inputs, states = self._inputs[layer], self._states[layer]
        projected, decay, beta = _projected(layer, hidden_states)
        window = torch.cat(
            [inputs.index_select(0, step.slots).to(projected.dtype), projected[:, :, None]], dim=-1
        )  # [B, channels, kernel]
        inputs.index_copy_(0, step.slots, window[:, :, 1:].to(inputs.dtype))
        weight = layer.conv1d.weight
        convolved = F.conv1d(window.to(weight.dtype), weight, layer.conv1d.bias, groups=weight.shape[0])[:, :, 0]
        mixed = ACT2FN[layer.activation](convolved).to(projected.dtype)[:, None]
        out, last = _recurrent_rule(layer)(
            *_heads(layer, mixed),
            g=decay[:, None],
            beta=beta[:, None],
            initial_state=states.index_select(0, step.slots),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        states.index_copy_(0, step.slots, last.to(states.dtype))
        return _finished(layer, hidden_states, out[:, 0])


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


def _projected(layer: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys and values before the convolution [T, C], and decay and beta [T, heads]."""
    beta = layer.in_proj_b(hidden_states)[0].sigmoid()
    # float16 does not hold every exponential.
    rate = layer.in_proj_a(hidden_states)[0].float()
    decay = -layer.A_log.float().exp() * F.softplus(rate + layer.dt_bias)
    return layer.in_proj_qkv(hidden_states)[0], decay, beta


def _convolved(layer: Any, run: torch.Tensor) -> torch.Tensor:
    """Convolve a piece behind the inputs before it: [T + kernel - 1, C] -> [T, C]."""
    weight = layer.conv1d.weight
    convolved = F.conv1d(run.T[None].to(weight.dtype), weight, layer.conv1d.bias, groups=weight.shape[0])
    activated: torch.Tensor = ACT2FN[layer.activation](convolved).to(run.dtype)
    return activated[0].T


def _heads(layer: Any, mixed: torch.Tensor) -> list[torch.Tensor]:
    """Split [B, T, C] into query, key and value [B, T, heads, D]."""
    query, key, value = mixed.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    return [
        query.unflatten(-1, (-1, layer.head_k_dim)),
        key.unflatten(-1, (-1, layer.head_k_dim)),
        value.unflatten(-1, (-1, layer.head_v_dim)),
    ]


def _finished(layer: Any, hidden_states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """Gate, normalise and project: hidden states [1, T, D], attended [T, heads, values] -> [1, T, D]."""
    gate = layer.in_proj_z(hidden_states).reshape(-1, layer.head_v_dim)
    normed = layer.norm(attended.reshape(-1, layer.head_v_dim), gate)
    projected: torch.Tensor = layer.out_proj(normed.reshape(1, hidden_states.shape[1], -1))
    return projected


def _recurrent_rule(layer: nn.Module) -> Rule:
    """Return the gated delta rule token by token, in PyTorch's own operations."""
    rule: Callable[..., Any] = sys.modules[type(layer).__module__].torch_recurrent_gated_delta_rule
    return inspect.unwrap(rule)
