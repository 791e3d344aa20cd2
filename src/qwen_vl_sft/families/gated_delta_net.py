"""Gated delta-net layers on packed sequences: every piece goes on from its parent, or begins from nothing.

Such a layer (https://arxiv.org/abs/2412.06464) carries two things from token to token: the last inputs of a short causal
convolution, and a state that the gated delta rule writes to. transformers 5.23 lets both run from one packed row into the
next. Here an index puts the last inputs of its parent before each piece, zeros for a piece without one; the rule runs over
all pieces without a parent, which stand first, and then over the others, each from its parent's last state. Gradients flow
back through both.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.activations import ACT2FN

from qwen_vl_sft.families.base import PackedLayout

PIECES = "delta_pieces"
# An entry of `PIECES`: last states are kept behind the sequence, and some pieces may go on from such states.
KEPT = "kept"
# Tokens of a chunk, inside which the rule is computed as attention is; the same in transformers and in its kernels.
CHUNK = 64
Rule = Callable[..., tuple[torch.Tensor, torch.Tensor]]
# Takes `PIECES`, the number of a round, query, key, value, decay and beta of its tokens, first states or None, and whether
# last states are wanted.
RoundRule = Callable[
    [dict[str, Any], int, Sequence[torch.Tensor], torch.Tensor | None, bool], tuple[torch.Tensor, torch.Tensor]
]


@dataclass(frozen=True)
class Operations:
    """What computes the parts of a layer that are no linear layers.

    Attributes:
        convolve: takes a layer, the projected inputs [1, T, C], `PIECES`, and the inputs before each piece [S, C, kernel - 1]
            where these stand outside of the sequence, else None; gives [1, T, C].
        heads: takes a layer and what was convolved, and gives query, key and value [1, T, heads, D] as the rule takes them.
        rule: gives the gated delta rule of a layer.
        norm: takes a layer, attended values and their gate [N, D], and normalises: [N, D].
    """

    convolve: Callable[[Any, torch.Tensor, dict[str, Any], torch.Tensor | None], torch.Tensor]
    heads: Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    rule: Callable[[Any], RoundRule]
    norm: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


# Gives the operations of a layer for its projected inputs [1, T, C] and `PIECES`.
Choice = Callable[[Any, torch.Tensor, dict[str, Any]], Operations]


def pieces_of(layout: PackedLayout, kernel_size: int) -> dict[str, Any]:
    """Return what layers with a convolution over `kernel_size` tokens need of a packed sequence of T tokens, S pieces.

    The rule takes pieces in rounds: those without a parent, which stand first, then those with one. `lengths` has the tokens
    of the pieces of each round, `round_bounds` [pieces + 1] int32 where they begin and end in it, and `round_chunks` [chunks,
    2] int32 the piece and the chunk of each chunk.

    `history` [T + S * (kernel_size - 1)] puts the inputs before each piece in front of it, by their positions, T for one that
    is zero; `positions` [T] are those of the tokens in the convolved sequence. `window` [T, kernel_size - 1] int32 has the
    same for kernels: the positions of the inputs before each token, the nearest first, -1 for zero.

    Where some have a parent, `parents` are the numbers of theirs in the first round. Inputs at `taken` [N] int32 stand before
    tokens that do not follow them in the sequence: number i before those of `takers` [`taken_bounds`[i] to
    `taken_bounds`[i + 1], 2] int32, a token and how far before it.
    """
    width, total = kernel_size - 1, sum(layout.lengths)
    roots = sum(parent is None for parent in layout.parents)
    assert None not in layout.parents[roots:], "pieces without a parent stand first"
    tokens = torch.arange(total).split(list(layout.lengths))
    nothing = torch.full((width,), total)
    past = [nothing if parent is None else torch.cat([nothing, tokens[parent]])[-width:] for parent in layout.parents]
    rounds = [run for run in (layout.lengths[:roots], layout.lengths[roots:]) if run]
    found = _in_rounds(rounds, past)
    found["window"] = found["window"].where(found["window"] < total, -1)
    if roots < len(layout.lengths):
        parents = layout.parents[roots:]
        assert all(parent is not None and parent < roots for parent in parents), "a prefix goes on from nothing"
        found["parents"] = torch.tensor(parents)
        found |= _taken(found["window"])
    return found


def _taken(window: torch.Tensor) -> dict[str, Any]:
    """Return which inputs tokens take that do not follow them in the sequence, and which tokens do (`pieces_of`)."""
    steps = torch.arange(1, window.shape[1] + 1)
    elsewhere = (window >= 0) & (window != torch.arange(len(window))[:, None] - steps)
    takers, places = elsewhere.nonzero(as_tuple=True)
    taken, order = window[takers, places].sort(stable=True)
    inputs, counts = taken.unique_consecutive(return_counts=True)
    return {
        "taken": inputs.int(),
        "taken_bounds": F.pad(counts.cumsum(0), (1, 0)).int(),
        "takers": torch.stack([takers[order], places[order] + 1], dim=1).int(),
    }


def round_behind_states(lengths: Sequence[int], kernel_size: int, known: bool) -> dict[str, Any]:
    """Return what `pieces_of` does of a sequence of one round whose pieces leave their states outside of it.

    Inputs before them [S, C, kernel - 1] stand behind the sequence, at T and after it, and with `known` `history` puts
    them in front of the pieces; else all begin from nothing. `ends` [S, kernel - 1] are the last inputs of each piece.
    """
    width, total = kernel_size - 1, sum(lengths)
    outside = total + torch.arange(len(lengths) * width).view(-1, width)
    past = list(outside if known else torch.full_like(outside, total))
    tokens = torch.arange(total).split(list(lengths))
    ends = [torch.cat(pair)[-width:] for pair in zip(outside, tokens, strict=True)]
    found = _in_rounds([lengths], past)
    if not known:
        found["window"] = found["window"].where(found["window"] < total, -1)
    return {**found, "ends": torch.stack(ends), KEPT: True}


def _in_rounds(rounds: Sequence[Sequence[int]], past: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Return the entries of `pieces_of` that every sequence has, for the positions of the inputs before each piece."""
    lengths, width = [length for run in rounds for length in run], len(past[0])
    tokens = torch.arange(sum(lengths)).split(lengths)
    history = torch.cat([run for runs in zip(past, tokens, strict=True) for run in runs])
    # A convolution without padding gives fewer values for each piece.
    positions = torch.cat([own + number * width for number, own in enumerate(tokens)])
    return {
        "history": history,
        "positions": positions,
        "window": history[positions[:, None] + width - 1 - torch.arange(width)].int(),
        "lengths": [list(run) for run in rounds],
        "round_bounds": [_bounds(run) for run in rounds],
        "round_chunks": [_chunks(run) for run in rounds],
    }


def _bounds(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _chunks(lengths: Sequence[int]) -> torch.Tensor:
    counts = (torch.tensor(lengths) + CHUNK - 1) // CHUNK
    pieces = torch.arange(len(lengths)).repeat_interleave(counts)
    own = torch.cat([torch.arange(count) for count in counts.tolist()])
    return torch.stack([pieces, own], dim=1).int()


def take_pieces(model: nn.Module, kind: str) -> None:
    """Have the layers whose class name ends in `kind` take `PIECES` of a packed batch; they take others as before."""
    for module in model.modules():
        if type(module).__name__.endswith(kind):
            module.forward = PackedForward(plain, module)


def plain(layer: Any, projected: torch.Tensor, pieces: dict[str, Any]) -> Operations:
    """Choose PyTorch's own operations."""
    return TORCH


class PackedForward:
    """The forward of a layer that takes `PIECES`, with the operations that `choose` gives.

    It holds its layer: in a copy of the model it is the copy's.
    """

    def __init__(self, choose: Choice, layer: Any) -> None:
        self.choose = choose
        self._layer = layer

    def __call__(self, hidden_states: torch.Tensor, delta_pieces: Any = None, **kwargs: Any) -> torch.Tensor:
        """Compute a layer of transformers over the pieces of a packed sequence: [1, T, D] -> [1, T, D]."""
        layer = self._layer
        if delta_pieces is None:
            if kwargs.get("cu_seq_lens_q") is not None:
                raise RuntimeError(
                    "a packed batch does not tell its pieces: states would run from one row into the next"
                )
            found: torch.Tensor = type(layer).forward(layer, hidden_states, **kwargs)
            return found
        if (
            kwargs.get("attention_mask") is not None
            or kwargs.get("cache_params") is not None
            or len(hidden_states) != 1
        ):
            raise RuntimeError("packed rows take no attention mask and no cache, and batches of one sequence")
        projected, decay, beta, gate = projections(layer, hidden_states)
        operations = self.choose(layer, projected, delta_pieces)
        output: torch.Tensor = layer.out_proj(attended(operations, layer, delta_pieces, projected, decay, beta, gate))
        return output


def projections(layer: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what a layer makes of hidden states [1, T, D]: queries, keys and values before the convolution [1, T, C], decay
    and beta [1, T, heads], and the gate [1, T, heads * values].
    """
    projected = layer.in_proj_qkv(hidden_states)
    beta = layer.in_proj_b(hidden_states).sigmoid()
    # float16 does not hold every exponential.
    decay = -layer.A_log.float().exp() * F.softplus(layer.in_proj_a(hidden_states).float() + layer.dt_bias)
    return projected, decay, beta, layer.in_proj_z(hidden_states)


def attended(
    operations: Operations,
    layer: Any,
    pieces: dict[str, Any],
    projected: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    gate: torch.Tensor,
) -> torch.Tensor:
    """Compute what stands between the linear layers of a layer over the pieces of a packed sequence.

    Args:
        operations: what computes it.
        layer: gives the sizes of heads, and the weights of convolution and norm.
        pieces: of `pieces_of`.
        projected: [1, T, C] queries, keys and values before the convolution.
        decay: [1, T, heads] float32 logarithms.
        beta: [1, T, heads].
        gate: [1, T, heads * values].

    Returns [1, T, heads * values].
    """
    tokens = projected.shape[1]
    query, key, value = operations.heads(layer, operations.convolve(layer, projected, pieces, None))
    found = delta_rule_in_rounds(operations.rule(layer), pieces, query, key, value, decay, beta)
    width = layer.head_v_dim
    normed = operations.norm(layer, found.reshape(-1, width), gate.reshape(-1, width))
    return normed.reshape(1, tokens, -1)


def heads(layer: Any, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split what comes out of the convolution [B, T, C] into query, key and value [B, T, heads, D]."""
    query, key, value = mixed.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    return (
        query.unflatten(-1, (-1, layer.head_k_dim)),
        key.unflatten(-1, (-1, layer.head_k_dim)),
        value.unflatten(-1, (-1, layer.head_v_dim)),
    )


def _convolved(
    layer: Any, projected: torch.Tensor, pieces: dict[str, Any], before: torch.Tensor | None
) -> torch.Tensor:
    """Convolve each piece behind the inputs before it: [1, T, C] -> [1, T, C]."""
    weight = layer.conv1d.weight
    if before is None:
        known = F.pad(projected, (0, 0, 0, 1))
    else:
        known = torch.cat([projected, before.transpose(1, 2).flatten(0, 1)[None].to(projected.dtype)], dim=1)
    extended = known.index_select(1, pieces["history"]).transpose(1, 2)
    convolved = F.conv1d(extended.to(weight.dtype), weight, layer.conv1d.bias, groups=weight.shape[0])
    activated = ACT2FN[layer.activation](convolved).to(projected.dtype)
    return activated.transpose(1, 2).index_select(1, pieces["positions"])


def delta_rule_in_rounds(rule: RoundRule, pieces: dict[str, Any], *inputs: torch.Tensor) -> torch.Tensor:
    """Compute pieces without a parent, then the others from the last states of theirs.

    Args:
        rule: gives outputs and last states of a round.
        pieces: of `pieces_of`.
        *inputs: query, key, value [1, T, heads, D], decay and beta [1, T, heads].

    Returns the output [1, T, heads, D].
    """
    rounds = pieces["lengths"]
    if "parents" not in pieces:
        return rule(pieces, 0, inputs, None, False)[0]
    totals = [sum(lengths) for lengths in rounds]
    first, second = zip(*(tensor.split(totals, dim=1) for tensor in inputs), strict=True)
    prefixes, states = rule(pieces, 0, first, None, True)
    branches, _ = rule(pieces, 1, second, states.index_select(0, pieces["parents"]), False)
    return torch.cat([prefixes, branches], dim=1)


def by_piece(rule: Rule) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return a rule for pieces of any lengths that calls one for batches: once for all pieces of as many chunks.

    It takes the lengths of the pieces, query, key, value, decay and beta of their tokens, and first states or None.

    A shorter piece is filled up with zeros to the chunk it ends in, as `rule` does itself: they leave its state alone.
    """

    def compute(
        lengths: Sequence[int], inputs: Sequence[torch.Tensor], first: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [tensor.squeeze(0).split(list(lengths)) for tensor in inputs]
        alike: dict[int, list[int]] = {}
        for number, length in enumerate(lengths):
            alike.setdefault(-(-length // CHUNK), []).append(number)
        outputs: dict[int, torch.Tensor] = {}
        states: dict[int, torch.Tensor] = {}
        for numbers in alike.values():
            query, key, value, decay, beta = (
                pad_sequence([part[number] for number in numbers], batch_first=True) for part in parts
            )
            begin = None if first is None else torch.stack([first[number] for number in numbers])
            out, last = rule(
                query,
                key,
                value,
                g=decay,
                beta=beta,
                initial_state=begin,
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )
            for place, number in enumerate(numbers):
                outputs[number], states[number] = out[place, : lengths[number]], last[place]
        order = range(len(lengths))
        return torch.cat([outputs[number] for number in order])[None], torch.stack([states[number] for number in order])

    return compute


def torch_rule(layer: nn.Module) -> Rule:
    """Return the gated delta rule in PyTorch's own operations, of the module that defines the layer."""
    # Where flash-linear-attention is installed, transformers has put its kernel around it.
    rule: Rule = inspect.unwrap(sys.modules[type(layer).__module__].torch_chunk_gated_delta_rule)
    return rule


def _rounds_in_torch(layer: nn.Module) -> RoundRule:
    rule = by_piece(torch_rule(layer))
    return lambda pieces, number, inputs, first, keep: rule(pieces["lengths"][number], inputs, first)


TORCH = Operations(_convolved, heads, _rounds_in_torch, lambda layer, attended, gate: layer.norm(attended, gate))
