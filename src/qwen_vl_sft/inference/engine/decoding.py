"""Compute the next token of rows that are being answered, all in one forward pass; on a GPU as a CUDA graph if asked."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from qwen_vl_sft.families.base import RowStates, StateStep
from qwen_vl_sft.inference.engine.attention import DecodeStep
from qwen_vl_sft.inference.engine.cache import NO_TOKEN, KeyValueCache

# The mask of a step is as wide as its longest row, rounded up: kernels want it aligned, and graphs want few widths.
WIDTH_STEP, GRAPH_WIDTH_STEP = 8, 256
_WARMUPS = 2


@dataclass(frozen=True)
class StepInputs:
    """Of each of B rows: its last `tokens`, their M-RoPE `positions`, the `lengths` before them, and its `places`."""

    tokens: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    places: torch.Tensor

    def copy_from(self, other: StepInputs) -> None:
        """Take the values of `other` in place."""
        for name, value in vars(other).items():
            getattr(self, name).copy_(value)


@dataclass(frozen=True)
class _Graph:
    inputs: StepInputs
    graph: Any
    logits: torch.Tensor


class Decoder:
    """Computes logits of the next token of any of `places` rows, each of which has its slots in a table.

    Args:
        model: the model, without the wrapper of an adapter.
        cache: keys and values of all rows.
        places: most rows at once.
        states: what layers carry from token to token, a slot for each place and one more; None without such layers.
        graphs: replay CUDA graphs, one for each number of rows and width, both rounded up.
    """

    def __init__(self, model: Any, cache: KeyValueCache, places: int, states: RowStates | None, graphs: bool) -> None:
        self.model = model
        self.cache = cache
        self.places = places
        self.states = states
        self.graphs = graphs
        self.device = cache.device
        # One more row, which stands for none: it fills up the batch of a graph.
        self._table = torch.full((places + 1, GRAPH_WIDTH_STEP), NO_TOKEN, device=self.device)
        self._captured: dict[tuple[int, int], _Graph] = {}

    def take_place(self, place: int, slots: Sequence[int]) -> None:
        """Note the slots of all tokens of a row, of those to come too."""
        if len(slots) > self._table.shape[1]:
            wider = -(-len(slots) // GRAPH_WIDTH_STEP) * GRAPH_WIDTH_STEP
            table = torch.full((self.places + 1, wider), NO_TOKEN, device=self.device)
            table[:, : self._table.shape[1]] = self._table
            self._table = table
            self._captured.clear()  # they read the former table
        self._table[place] = NO_TOKEN
        self._table[place, : len(slots)] = torch.tensor(slots, device=self.device)

    def logits(
        self, places: Sequence[int], tokens: Sequence[int], positions: Sequence[int], lengths: Sequence[int]
    ) -> torch.Tensor:
        """Return the logits [B, vocabulary] float32 behind each row's last token, which is stored in the cache."""
        longest = max(lengths) + 1
        if not self.graphs:
            width = -(-longest // WIDTH_STEP) * WIDTH_STEP
            return self._compute(self._inputs(places, tokens, positions, lengths), width)
        width = -(-longest // GRAPH_WIDTH_STEP) * GRAPH_WIDTH_STEP
        # Above 32 rows in steps of 32: a step with twice the rows takes longer than the launches that it saves.
        rows = next((size for size in (1, 2, 4, 8, 16, 32) if size >= len(places)), -(-len(places) // 32) * 32)
        fillers = rows - len(places)
        inputs = self._inputs(
            [*places, *[self.places] * fillers],
            [*tokens, *[0] * fillers],
            [*positions, *[0] * fillers],
            [*lengths, *[0] * fillers],
        )
        found = self._captured.get((rows, width))
        if found is None:
            found = self._captured[rows, width] = self._capture(inputs, width)
        found.inputs.copy_from(inputs)
        found.graph.replay()
        return found.logits[: len(places)]

    def _inputs(self, places: Any, tokens: Any, positions: Any, lengths: Any) -> StepInputs:
        whole = torch.tensor([tokens, positions, lengths, places]).to(self.device)
        return StepInputs(*whole)

    def _capture(self, inputs: StepInputs, width: int) -> _Graph:
        kept = StepInputs(**{name: value.clone() for name, value in vars(inputs).items()})
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and buffers made here, which no graph could record
            for _ in range(_WARMUPS):
                self._compute(kept, width)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next((one.graph.pool() for one in self._captured.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            logits = self._compute(kept, width)
        return _Graph(kept, graph, logits)

    def _compute(self, inputs: StepInputs, width: int) -> torch.Tensor:
        table = self._table[:, :width]
        slots = table.index_select(0, inputs.places)
        write = slots.gather(1, inputs.lengths[:, None])[:, 0]
        seen = torch.arange(slots.shape[1], device=self.device) <= inputs.lengths[:, None]
        mask = torch.zeros(seen.shape, dtype=self.cache.dtype, device=self.device).masked_fill_(~seen, float("-inf"))
        embedded = self.model.get_input_embeddings()(inputs.tokens)[None]
        with self.states.applied(StateStep(slots=inputs.places)) if self.states else nullcontext():
            output = self.model.model.language_model(
                inputs_embeds=embedded,
                position_ids=inputs.positions.expand(3, 1, -1),
                use_cache=False,
                step=DecodeStep(self.cache, write, slots, mask[:, None, None]),
            )
        return self.model.lm_head(output.last_hidden_state[0]).float()  # type: ignore[no-any-return]
