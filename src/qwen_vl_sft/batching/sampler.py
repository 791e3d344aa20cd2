"""The order of rows: every epoch visits each row once, on any number of processes, and follows from the seed alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments

from qwen_vl_sft.batching.collator import NO_ROW
from qwen_vl_sft.batching.packing import MicroBatches, StepSampler, epoch_order


def filled_items(rows: int, multiple_of: int) -> Dataset:
    """Return dataset items `{"row": index}` for `rows` rows, filled up with `NO_ROW` to a whole number of batches.

    Without them the launcher would fill up with rows that are trained on, or counted, twice.
    """
    total = math.ceil(rows / multiple_of) * multiple_of
    return Dataset.from_dict({"row": [*range(rows), *[NO_ROW] * (total - rows)]})


class EpochSampler(Sampler[int]):
    """Gives row indices in a new random order each epoch, then those that fill up.

    Args:
        rows: number of rows.
        total: number of items that `filled_items` gives.
        seed: seed of the order.
    """

    def __init__(self, rows: int, total: int, seed: int) -> None:
        self.rows = rows
        self.total = total
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        yield from epoch_order(self.rows, self.seed, self.epoch)
        yield from range(self.rows, self.total)

    def __len__(self) -> int:
        return self.total

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is given next."""
        self.epoch = epoch

    def reseed(self, seed: int) -> None:
        """Give the orders of another seed from now on."""
        self.seed = seed


def step_loader(sampler: StepSampler, collate: Callable[..., Any], args: TrainingArguments) -> DataLoader[Any]:
    """Return the data loader of one process's packed steps."""
    workers = args.dataloader_num_workers
    return DataLoader(
        MicroBatches(sampler.plan, sampler.rank),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        # A batch is a whole step; one a worker in advance is enough, and memory holds no more.
        prefetch_factor=(args.dataloader_prefetch_factor or 1) if workers else None,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers and workers > 0,
        multiprocessing_context=args.dataloader_multiprocessing_context if workers else None,
    )
