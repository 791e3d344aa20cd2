"""Read and encode prompts ahead of the model, in threads; rows on one image are read together and decode it once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

import torch

from qwen_vl_sft.batching.positions import Positions
from qwen_vl_sft.cpu_cores import usable_cores
from qwen_vl_sft.data.encoding import Encoded, Encoder
from qwen_vl_sft.data.media import EncodedMedia, MediaFile, ReadMedia, reading_once
from qwen_vl_sft.errors import BadRow
from qwen_vl_sft.inference.engine.features import FeatureMemory
from qwen_vl_sft.inference.engine.prompts import Group, group_prompts

PromptAt = Callable[[int, ReadMedia], Encoded]
# Threads beside a GPU: decoding and resizing a chart takes as long as answering two questions on it.
_MOST_THREADS = 8
# Groups of rows that are read ahead for each thread: about as many as are read in one forward pass.
_AHEAD = 6


class PromptReader:
    """Reads groups of rows in their order; a context manager, which waits for no row that nobody wants any longer.

    Args:
        encoder: reads images.
        prompt_at: encodes the prompt of a row, with a function that reads its images. Raises `BadRow`.
        units: the rows' numbers, those on one image together.
        positions: M-RoPE positions of a row.
        memory: features that are known.
        on_cpu: whether the model computes on the CPU too, and so leaves one thread.
    """

    def __init__(
        self,
        encoder: Encoder,
        prompt_at: PromptAt,
        units: Sequence[Sequence[int]],
        positions: Positions,
        memory: FeatureMemory | None,
        on_cpu: bool,
    ) -> None:
        self._prompt_at = prompt_at
        self._positions = positions
        self._read_media = memory.reading(encoder.read_media) if memory else encoder.read_media
        threads = 1 if on_cpu else max(1, min(_MOST_THREADS, _cores() - 1))
        # Beside a GPU each thread works on an image of its own, and PyTorch need not start more.
        self._pool = ThreadPoolExecutor(max_workers=threads, initializer=None if on_cpu else _compute_alone)
        self._on_cpu = on_cpu
        self._threads_before = torch.get_num_threads()
        self._left = iter(units)
        self._coming: deque[Future[list[Group]]] = deque()
        self._ahead = _AHEAD * threads
        self._ready: deque[Group] = deque()
        # A row that cannot be read ends the reading; whoever asks for more is told.
        self.failure: BadRow | None = None
        self._fill()

    def __enter__(self) -> PromptReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if not self._on_cpu:
            torch.set_num_threads(self._threads_before)  # what a thread sets holds for later ones too

    def next_group(self, wait: bool) -> Group | None:
        """Return the next group; None where none is left, or none is ready and `wait` is off."""
        while not self._ready and self._coming and (wait or self._coming[0].done()):
            try:
                self._ready += self._coming.popleft().result()
            except BadRow as error:
                self.failure = error
                self._coming.clear()
                self._left = iter(())
            self._fill()
        return self._ready.popleft() if self._ready else None

    def take_ready(self, most_tokens: int, waiting: deque[Group]) -> None:
        """Append the groups that are ready to those that wait, until these have so many tokens."""
        tokens = sum(group.tokens for group in waiting)
        while tokens < most_tokens and (group := self.next_group(wait=False)) is not None:
            waiting.append(group)
            tokens += group.tokens

    @property
    def exhausted(self) -> bool:
        """Return whether nothing more comes."""
        return not self._ready and not self._coming

    def _fill(self) -> None:
        while len(self._coming) < self._ahead and (unit := next(self._left, None)) is not None:
            self._coming.append(self._pool.submit(self._read, unit))

    def _read(self, unit: Sequence[int]) -> list[Group]:
        read_media = reading_once(self._read_media if self._on_cpu else self._read_pinned)
        return group_prompts([(number, self._prompt_at(number, read_media)) for number in unit], self._positions)

    def _read_pinned(self, file: MediaFile) -> EncodedMedia:
        """Read an image into memory that the GPU copies from by itself."""
        read = self._read_media(file)
        return replace(read, patches=_pinned(read.patches), features=_pinned(read.features))


def _pinned(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor if tensor is None or tensor.is_cuda or tensor.is_pinned() else tensor.pin_memory()


def _compute_alone() -> None:
    torch.set_num_threads(1)


def _cores() -> int:
    """Count the cores that this process may use, of those that the processes of this machine share."""
    return usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
