"""Decide which rows are answered when: each takes a place of the batch, slots of the cache, and states of layers.

Rows wait in groups that begin alike. What a group begins with is computed once and held until its last row has ended; so
is the head, the text before the first image, which all groups begin with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from qwen_vl_sft.inference.engine.cache import KeyValueCache
from qwen_vl_sft.inference.engine.prompts import Group, Head, Piece, Prompt, text_before_image
from qwen_vl_sft.inference.engine.reading import PromptReader

# While others are answered, rows get a pass of their own if they are so large a part of these, or half of the tokens.
_WORTH_A_PASS = 4
# States beside those of rows and of their prefixes: of no row, of a prefix that is being read, and of the head.
MORE_STATES = 3


@dataclass
class Answering:
    """A row that is being answered: the tokens of its answer so far, and what the next one needs.

    `length` counts the tokens in the cache with those of passes that were started, `position` is the M-RoPE position of
    the answer's first token, and `asked` counts the tokens that were asked for, which may not be here yet.
    """

    prompt: Prompt
    group: Group
    place: int
    slots: list[int]
    length: int
    position: int
    processors: Any
    asked: int = 0
    tokens: list[int] = field(default_factory=list)
    finished: bool = False


class Scheduler:
    """Hands out places, slots and states, and takes them back.

    Args:
        cache: the slots.
        rows: most rows that are answered at once.
        prefill_tokens: most tokens of prompts in one forward pass, unless one prompt is longer.
        max_new_tokens: most tokens of an answer.
        overlaps: the device computes while the host works.
        carries_states: layers carry states from token to token.
        processors_of: makes the logits processors of a prompt; None where there are none.
        while_waiting: entered while the host waits for a prompt.
    """

    def __init__(
        self,
        cache: KeyValueCache,
        rows: int,
        prefill_tokens: int,
        max_new_tokens: int,
        overlaps: bool,
        carries_states: bool,
        processors_of: Callable[[torch.Tensor], Any] | None,
        while_waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.cache = cache
        self.rows = rows
        self.prefill_tokens = prefill_tokens
        self.max_new_tokens = max_new_tokens
        self._overlaps = overlaps
        self._carries_states = carries_states
        self._processors_of = processors_of
        self._while_waiting = while_waiting
        self.waiting: deque[Group] = deque()
        self._free_places: list[int] = []
        self._free_states = list(range(rows + 1, states_of(rows)))
        # What prompts begin with before their images; made of the first one with an image.
        self._head: Head | None = None

    def begin(self) -> None:
        """Make all places free."""
        self._free_places = list(range(self.rows - 1, -1, -1))

    def end(self, unfinished: Sequence[Answering]) -> None:
        """Take back what rows, waiting groups and the head hold."""
        for row in unfinished:
            self.release(row)
        for group in self.waiting:
            self._release_prefix(group)
        self.waiting.clear()
        self._drop_head()

    def admit(
        self, reader: PromptReader, running: Sequence[Answering], idle: bool
    ) -> tuple[list[Answering], list[Piece]]:
        """Take rows that wait, as many as places, slots and the budget of tokens allow; they wait in their order.

        Where the host works beside the device, few of them are not worth a pass while others are answered: every pass reads
        all weights. Else reading and answering share the cores, and each pass waits for as many as it can take.
        """
        waiting = self.waiting
        if self._overlaps:
            reader.take_ready(self.prefill_tokens, waiting)
            if idle and not waiting and not reader.exhausted:
                with self._while_waiting():
                    group = reader.next_group(wait=True)
                waiting += [group] if group else []
            if running and not self._pays(reader, len(running)):
                return [], []
        rows: list[Answering] = []
        pieces: list[Piece] = []
        tokens = 0
        while self._free_places:
            if not waiting:
                next_group = reader.next_group(wait=not self._overlaps)
                if next_group is None:
                    break
                waiting.append(next_group)
            group = waiting[0]
            prompt = group.waiting[0]
            self._begin_with_head(group)
            new_tokens = group.missing + len(prompt) - group.known
            if pieces and tokens + new_tokens > self.prefill_tokens:
                break
            if new_tokens + self.max_new_tokens - 1 > self.cache.free:
                if self._drops_head_for(group):
                    continue
                break
            tokens += new_tokens
            pieces += self._prefixes(group)
            own = self.cache.take(len(prompt) - group.known + self.max_new_tokens - 1)
            place = self._free_places.pop()
            branch = own[: len(prompt) - group.known]
            pieces.append(Piece(prompt, group.known, len(prompt), branch, group.before, True, group.begin, place))
            rows.append(self._start(group, group.waiting.popleft(), place, own))
            if not group.waiting:
                waiting.popleft()
        return rows, pieces

    def release(self, row: Answering) -> None:
        """Take back what a row holds; with the last row of its group also what the group does."""
        self.cache.release(row.slots)
        self._free_places.append(row.place)
        row.group.users -= 1
        if not row.group.users:
            self._release_prefix(row.group)

    def _begin_with_head(self, group: Group) -> None:
        """Have a group of which nothing is computed begin with the head, as far as it does."""
        if self._head is None or group.head is not None or group.prefix:
            return
        begun = self._head.in_common(group.waiting[0].row)
        # A state is that after the whole head.
        if begun and (not self._carries_states or begun == len(self._head.tokens)):
            group.begin_with(self._head, begun)

    def _drops_head_for(self, group: Group) -> bool:
        """Drop the head where that makes room for a group and nobody else begins with it; return whether it was dropped."""
        head = self._head
        begins_with_it = head is not None and group.head is head
        if head is None or head.users > begins_with_it or (begins_with_it and not group.can_begin_anew):
            return False
        if begins_with_it:
            group.begin_anew()
        self._drop_head()
        return True

    def _prefixes(self, group: Group) -> list[Piece]:
        """Take slots for what the rows of a group begin with and is yet to be computed, and return its pieces."""
        pieces = []
        prompt = group.waiting[0]
        length = text_before_image(prompt.row)
        if self._head is None and length and not group.prefix and self.rows > 1:
            self._head = Head(prompt.row.input_ids[:length], self.cache.take(length), self._free_states.pop())
            pieces.append(Piece(prompt, 0, length, self._head.slots, (), False, None, self._head.state))
            group.begin_with(self._head, length)
        if group.missing:
            before, begin = group.before, group.begin
            group.prefix, group.state = self.cache.take(group.missing), self._free_states.pop()
            pieces.append(Piece(prompt, group.begun, group.known, group.prefix, before, False, begin, group.state))
        return pieces

    def _pays(self, reader: PromptReader, running: int) -> bool:
        """Return whether the rows that can be taken now are worth a pass of their own while others are answered."""
        tokens = rows = 0
        free = self.cache.free
        for group in self.waiting:
            for place, prompt in enumerate(group.waiting):
                new_tokens = len(prompt) - group.known + (group.missing if place == 0 else 0)
                needed = new_tokens + self.max_new_tokens - 1
                if rows == len(self._free_places) or needed > free:
                    return rows * _WORTH_A_PASS >= max(1, running)
                free -= needed
                tokens += new_tokens
                rows += 1
                if 2 * tokens >= self.prefill_tokens:
                    return True
        return rows > 0 and (reader.exhausted or rows * _WORTH_A_PASS >= running)

    def _start(self, group: Group, prompt: Prompt, place: int, own: list[int]) -> Answering:
        processors = self._processors_of(prompt.row.input_ids) if self._processors_of else None
        return Answering(prompt, group, place, own, len(prompt), int(prompt.positions.max()) + 1, processors)

    def _release_prefix(self, group: Group) -> None:
        if group.head is not None:
            group.head.users -= 1
        if group.state is not None:
            self.cache.release(group.prefix)
            self._free_states.append(group.state)

    def _drop_head(self) -> None:
        if self._head is not None:
            self.cache.release(self._head.slots)
            self._free_states.append(self._head.state)
            self._head = None


def states_of(rows: int) -> int:
    """Return the states that so many rows need at most: one each, and for each at most one prefix's."""
    return 2 * rows + MORE_STATES
