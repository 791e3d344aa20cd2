"""Compute the next token of rows that are being answered, all in one forward pass; on a GPU as a CUDA graph where it pays.

A row's last token, its position and its length stay on the device, where each pass reads and advances them: the next pass
can be started before the host has seen the tokens of this one.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from qwen_vl_sft.errors import first_line
from qwen_vl_sft.families.base import RowStates, StateStep
from qwen_vl_sft.inference.engine.attention import DecodeStep, SlotStep, Step
from qwen_vl_sft.inference.engine.cache import NO_TOKEN, KeyValueCache
from qwen_vl_sft.inference.engine.transfer import to_device

logger = logging.getLogger(__name__)
# The mask of a step is as wide as its longest row, rounded up: kernels want it aligned, and graphs want few widths.
WIDTH_STEP, GRAPH_WIDTH_STEP = 8, 256
# How wide the table of slots is on a GPU from the beginning: graphs that read a narrower one would have to go.
_WIDTH_ON_GPU = 4096
# Recording a graph takes as long as some steps: where one for more rows can be replayed, so many steps of a size do that
# before they get a graph of their own.
_STEPS_WITH_LARGER = 12
# Numbers of rows that graphs are recorded for; above the last in steps of it.
_GRAPH_ROWS = (1, 2, 4, 8, 16, 32, 64)

Choose = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Graph:
    places: torch.Tensor
    graph: Any
    tokens: torch.Tensor


class Decoder:
    """Computes the next token of any of `places` rows, each of which has its slots in a table.

    Args:
        model: the model, without the wrapper of an adapter.
        cache: keys and values of all rows.
        places: most rows at once.
        states: what layers carry from token to token, a slot for each place and one more; None without such layers.
        graphs: replay CUDA graphs, one for each number of rows and width, both rounded up.
        kernel: attend with a kernel of the GPU, which reads slots where they lie and takes rows of any length.
    """

    def __init__(
        self,
        model: Any,
        cache: KeyValueCache,
        places: int,
        states: RowStates | None,
        graphs: bool,
        kernel: bool,
    ) -> None:
        self.model = model
        self.cache = cache
        self.places = places
        self.states = states
        self.graphs = graphs
        self.kernel = kernel
        self.device = cache.device
        # One more row, which stands for none: it fills up the batch of a graph.
        width = _WIDTH_ON_GPU if self.device.type == "cuda" else GRAPH_WIDTH_STEP
        self._table = torch.full((places + 1, width), NO_TOKEN, device=self.device)
        self._tokens, self._positions, self._lengths = torch.zeros(3, places + 1, dtype=torch.long, device=self.device)
        self._captured: dict[tuple[int, int], _Graph] = {}
        self._side: Any = None  # the stream that graphs are recorded on
        self._computed: Counter[tuple[int, int]] = Counter()
        self._sent: tuple[tuple[int, ...], torch.Tensor] = ((), torch.zeros(0, dtype=torch.long, device=self.device))

    def begin(
        self,
        places: Sequence[int],
        slots: Sequence[Sequence[int]],
        tokens: torch.Tensor,
        positions: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        """Note of rows that are read the slots of all tokens, of those to come too, and what their next token needs.

        `tokens` [B] are the first of their answers, on the device; `positions` the M-RoPE position of these, `lengths` the
        tokens before them.
        """
        longest = max(map(len, slots))
        if longest > self._table.shape[1]:
            wider = -(-longest // GRAPH_WIDTH_STEP) * GRAPH_WIDTH_STEP
            table = torch.full((self.places + 1, wider), NO_TOKEN, device=self.device)
            table[:, : self._table.shape[1]] = self._table
            self._table = table
            self.forget_graphs()  # they read the former table
        rows = torch.full((len(slots), longest), NO_TOKEN)
        for row, own in zip(rows, slots, strict=True):
            row[: len(own)] = torch.tensor(own)
        where, own_positions, own_lengths = to_device(torch.tensor([places, positions, lengths]), self.device)
        self._table[:, :longest].index_copy_(0, where, to_device(rows, self.device))
        self._tokens.index_copy_(0, where, tokens)
        self._positions.index_copy_(0, where, own_positions)
        self._lengths.index_copy_(0, where, own_lengths)

    def step(self, places: Sequence[int], longest: int, choose: Choose | None = None) -> torch.Tensor:
        """Compute and return the next token [B] of the rows in these places, on the device.

        The longest of them has `longest` tokens in the cache with its last one. `choose` takes a token of each row from
        logits [B, vocabulary] float32; None for the most likely.
        """
        if not self.graphs or choose is not None:
            return self._compute(self._on_device(places), -(-longest // WIDTH_STEP) * WIDTH_STEP, choose)
        width = self._table.shape[1] if self.kernel else -(-longest // GRAPH_WIDTH_STEP) * GRAPH_WIDTH_STEP
        most = _GRAPH_ROWS[-1]
        count = next((size for size in _GRAPH_ROWS if size >= len(places)), -(-len(places) // most) * most)
        found = self._recorded(count, width)
        if found is None:
            return self._compute(self._on_device(places), width, None)
        count = len(found.places)
        found.places.copy_(self._on_device([*places, *[self.places] * (count - len(places))]))
        found.graph.replay()
        return found.tokens[: len(places)]

    def _recorded(self, count: int, width: int) -> _Graph | None:
        """Return a graph for at least so many rows and so wide; None where none can be recorded."""
        wanted = (count, width)
        if wanted not in self._captured:
            self._computed[wanted] += 1
            larger = [size for size in self._captured if size[0] >= count and size[1] >= width]
            if larger and self._computed[wanted] <= _STEPS_WITH_LARGER:
                return self._captured[min(larger)]
            made = self._capture(count, width)
            if made is None:
                return None
            self._captured[wanted] = made
        return self._captured[wanted]

    def forget_graphs(self) -> None:
        """Drop what is recorded: it holds the addresses of the weights of then."""
        self._captured.clear()

    def _on_device(self, places: Sequence[int]) -> torch.Tensor:
        """Send the places, which mostly are those of the step before."""
        wanted = tuple(places)
        if self._sent[0] != wanted:
            self._sent = wanted, to_device(torch.tensor(wanted), self.device)
        return self._sent[1]

    def _capture(self, count: int, width: int) -> _Graph | None:
        """Record a step. Where that fails, say so once, and record none any more."""
        # Of rows that stand for none: what is only tried out must not advance those that are answered. Nothing here waits
        # for the GPU, which meanwhile reads prompts.
        places = torch.full((count,), self.places, device=self.device)
        pool = next((one.graph.pool() for one in self._captured.values()), None)
        try:
            self._side = side = self._side or torch.cuda.Stream()
            graph = torch.cuda.CUDAGraph()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._compute(places, width, None)  # kernels are loaded here, which no graph could record
                # Not by `torch.cuda.graph`, which gives all of PyTorch's free memory back first. Other threads may go on
                # pinning memory meanwhile.
                graph.capture_begin(pool, capture_error_mode="thread_local")
                try:
                    tokens = self._compute(places, width, None)
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            logger.warning("answers are decoded without CUDA graphs, which fail here: %s", first_line(error))
            self.graphs = False
            self.forget_graphs()
            return None
        torch.cuda.current_stream().wait_stream(side)
        return _Graph(places, graph, tokens)

    def _compute(self, places: torch.Tensor, width: int, choose: Choose | None) -> torch.Tensor:
        lengths, positions = self._lengths.index_select(0, places), self._positions.index_select(0, places)
        embedded = self.model.get_input_embeddings()(self._tokens.index_select(0, places))[None]
        with self.states.applied(StateStep(slots=places)) if self.states else nullcontext():
            output = self.model.model.language_model(
                inputs_embeds=embedded,
                position_ids=positions.expand(3, 1, -1),
                use_cache=False,
                step=self._step(places, lengths, width),
            )
        logits = self.model.lm_head(output.last_hidden_state[0]).float()
        tokens = logits.argmax(-1) if choose is None else choose(logits)
        self._tokens.index_copy_(0, places, tokens)
        self._positions.index_copy_(0, places, positions + 1)
        # A row that stands for none stays where it is.
        self._lengths.index_copy_(0, places, (lengths + 1).masked_fill_(places == self.places, 0))
        return tokens

    def _step(self, places: torch.Tensor, lengths: torch.Tensor, width: int) -> Step:
        if self.kernel:
            write = self._table.flatten().index_select(0, places * self._table.shape[1] + lengths)
            return SlotStep(self.cache, write, self._table, places, lengths)
        slots = self._table[:, :width].index_select(0, places)
        write = slots.gather(1, lengths[:, None])[:, 0]
        seen = torch.arange(slots.shape[1], device=self.device) <= lengths[:, None]
        mask = torch.zeros(seen.shape, dtype=self.cache.dtype, device=self.device).masked_fill_(~seen, float("-inf"))
        return DecodeStep(self.cache, write, slots, mask[:, None, None])
