"""Plan which rows train together: an epoch's order, its optimizer steps, and their micro-batches by process.

Everything follows from the rows' lengths, the recipe and the seed, so that all processes work it out alike. The rows of
an optimizer step do not depend on the number of processes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Sampler

from qwen_vl_sft.batching.global_batch import GlobalBatch
from qwen_vl_sft.data.row_lengths import RowLengths

# Rows that share one copy of their prefix; without sharing a single row.
PrefixGroup = list[int]
MicroBatch = list[PrefixGroup]


def epoch_order(rows: int, seed: int, epoch: int) -> list[int]:
    """Return the indices of all rows in the random order of an epoch."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


@dataclass(frozen=True)
class PackingStats:
    """Rows a step, micro-batches a process and step, how full of tokens these are, and the share that is computed."""

    rows: float
    micro_batches: float
    filled: float
    computed: float


class StepPlan:
    """The optimizer steps of every epoch.

    Args:
        sizes: lengths of the rows.
        batch: what one optimizer step takes over all processes; the last step of an epoch may have fewer rows.
        tokens_per_batch: most tokens of a micro-batch.
        processes: number of processes.
        seed: seed of the order.
        share_prefixes: rows with the same prefix stay together, and are computed on one copy of it.
    """

    def __init__(
        self,
        sizes: RowLengths,
        batch: GlobalBatch,
        tokens_per_batch: int,
        processes: int,
        seed: int,
        share_prefixes: bool = False,
    ) -> None:
        assert sizes.tokens.max() <= tokens_per_batch, "a row does not fit a micro-batch"
        self.sizes = sizes
        self.batch = batch
        self.tokens_per_batch = tokens_per_batch
        self.processes = processes
        self.seed = seed
        self.share_prefixes = share_prefixes

    def __len__(self) -> int:
        """Return the optimizer steps of an epoch."""
        return self.batch.steps(self.sizes.tokens)

    def order(self, epoch: int) -> np.ndarray:
        """Return every row once, in the order of an epoch; rows that share a prefix are adjacent."""
        shuffled = np.array(epoch_order(len(self.sizes.tokens), self.seed, epoch))
        if not self.share_prefixes:
            return shuffled
        prefix = self.sizes.prefix[shuffled]
        # A row without a prefix is a unit of its own. A unit comes where its lowest row does, not where its first does:
        # else the images with many questions would come first in every epoch.
        unit = np.where(prefix < 0, len(prefix) + np.arange(len(prefix)), prefix)
        _, inverse = np.unique(unit, return_inverse=True)
        lowest = np.full(len(prefix), len(prefix))
        np.minimum.at(lowest, inverse, shuffled)
        place = np.argsort(shuffled)[lowest[inverse]]
        return shuffled[np.argsort(place, kind="stable")]

    def steps(self, epoch: int) -> Iterator[list[list[MicroBatch]]]:
        """Return the steps of an epoch, each as micro-batches by process; every process gets the same number."""
        order = self.order(epoch)
        for rows in self.batch.split(self.sizes.tokens[order]):
            yield self.split(order[rows].tolist())

    def packing_stats(self, steps: int = 50) -> PackingStats:
        """Return statistics of the first steps of a run."""
        found, tokens, rows, rows_alone = [], 0.0, 0, 0
        for step in itertools.islice(self.steps(0), steps):
            found.append(len(step[0]))
            groups = [group for batches in step for batch in batches for group in batch]
            tokens += sum(self.sizes.of(group)[0] for group in groups)
            rows += sum(len(group) for group in groups)
            rows_alone += int(self.sizes.tokens[[row for group in groups for row in group]].sum())
        room = sum(found) * self.processes * self.tokens_per_batch
        return PackingStats(rows / len(found), sum(found) / len(found), tokens / room, tokens / rows_alone)

    def split(self, rows: Sequence[int]) -> list[list[MicroBatch]]:
        """Return micro-batches by process for the rows of one step: as few as the budget allows, as equal as possible."""
        groups = self.groups(rows)
        tokens = sum(self.sizes.of(group)[0] for group in groups)
        for count in range(max(1, math.ceil(tokens / (self.processes * self.tokens_per_batch))), len(rows) + 1):
            bins = self._fill(self._enough(groups, count * self.processes), count * self.processes)
            if bins is not None:
                return self._deal(bins, count)
        raise AssertionError("every row fits a micro-batch of its own")

    def groups(self, rows: Sequence[int]) -> list[PrefixGroup]:
        """Return these rows in groups on one prefix that each fit a micro-batch; single rows when nothing is shared."""
        if not self.share_prefixes:
            return [[row] for row in rows]
        found: dict[tuple[int, int], PrefixGroup] = {}
        for row in rows:
            prefix = int(self.sizes.prefix[row])
            found.setdefault((prefix, -1 if prefix >= 0 else row), []).append(row)
        return [part for group in found.values() for part in self._fitting(group)]

    def _fitting(self, group: PrefixGroup) -> list[PrefixGroup]:
        if len(group) == 1 or self.sizes.of(group)[0] <= self.tokens_per_batch:
            return [group]
        half = len(group) // 2
        return self._fitting(group[:half]) + self._fitting(group[half:])

    def _enough(self, groups: list[PrefixGroup], bins: int) -> list[PrefixGroup]:
        """Cut the largest groups until no process is without rows, as far as there are rows."""
        groups = list(groups)
        while len(groups) < bins and any(len(group) > 1 for group in groups):
            largest = max((group for group in groups if len(group) > 1), key=lambda group: self.sizes.of(group)[0])
            half = len(largest) // 2
            groups.remove(largest)
            groups += [largest[:half], largest[half:]]
        return groups

    def _fill(self, groups: list[PrefixGroup], bins: int) -> list[tuple[np.ndarray, MicroBatch]] | None:
        """Put the longest first into the lightest bin, by tokens or patches, whichever it has more of. None if it fails."""
        costs = [self.sizes.of(group) for group in groups]
        scale = np.maximum(sum(costs), 1.0)
        loads = np.zeros((bins, 2))
        filled: list[MicroBatch] = [[] for _ in range(bins)]
        for place in sorted(range(len(groups)), key=lambda place: (-max(costs[place] / scale), groups[place])):
            after = loads + costs[place]
            weight = (after / scale).max(axis=1)
            weight[after[:, 0] > self.tokens_per_batch] = np.inf
            lightest = int(weight.argmin())
            if weight[lightest] == np.inf:
                return None
            loads[lightest] = after[lightest]
            filled[lightest].append(groups[place])
        return list(zip(loads, filled, strict=True))

    def _deal(self, bins: list[tuple[np.ndarray, MicroBatch]], count: int) -> list[list[MicroBatch]]:
        """Give `count` bins to each process, the heaviest first to the one with least: all wait for the slowest."""
        scale = np.maximum(sum(load for load, _ in bins), 1.0)
        totals = np.zeros((self.processes, 2))
        dealt: list[list[MicroBatch]] = [[] for _ in range(self.processes)]
        for load, batch in sorted(bins, key=lambda entry: (-max(entry[0] / scale), entry[1])):
            weight = ((totals + load) / scale).max(axis=1)
            weight[[len(batches) == count for batches in dealt]] = np.inf
            process = int(weight.argmin())
            totals[process] += load
            dealt[process].append(batch)
        return dealt


class StepSampler(Sampler[list[MicroBatch]]):
    """Gives a data loader, as its batch sampler, the micro-batches of one process for one optimizer step after another.

    Args:
        plan: the steps.
        rank: the process.
    """

    def __init__(self, plan: StepPlan, rank: int) -> None:
        self.plan = plan
        self.rank = rank
        self.epoch = 0

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        for step in self.plan.steps(self.epoch):
            yield step[self.rank]

    def __len__(self) -> int:
        return len(self.plan)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose steps are given next."""
        self.epoch = epoch
