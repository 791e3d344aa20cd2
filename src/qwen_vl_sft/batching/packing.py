"""Plan which rows train together: an epoch's order, its optimizer steps, and their micro-batches by process.

Everything follows from the rows' lengths, the recipe and the seed, so that all processes work it out alike. The rows of
an optimizer step do not depend on the number of processes.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from qwen_vl_sft.batching.global_batch import GlobalBatch
from qwen_vl_sft.data.row_lengths import RowLengths

STATS_OF_STEPS = 50
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
        share_prefixes: rows with the same prefix stay together, and are computed on one copy of it; the opening of all
            rows, if `sizes` have one, is computed once in each micro-batch.
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
        self.opening = sizes.opening_tokens if share_prefixes else 0
        # What a micro-batch holds beside the opening.
        self.room = tokens_per_batch - self.opening

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
        return map(self.split, self.rows_of_steps(epoch))

    def packing_stats(self) -> PackingStats:
        """Return statistics of the first steps of a run, at most `STATS_OF_STEPS`."""
        found, tokens, rows, rows_alone = [], 0, 0, 0
        for step in itertools.islice(self.steps(0), STATS_OF_STEPS):
            found.append(len(step[0]))
            filled = [batch for batches in step for batch in batches if batch]
            groups = [group for batch in filled for group in batch]
            tokens += sum(map(self.tokens_of, filled))
            rows += sum(len(group) for group in groups)
            rows_alone += int(self.sizes.tokens[[row for group in groups for row in group]].sum())
        room = sum(found) * self.processes * self.tokens_per_batch
        return PackingStats(rows / len(found), sum(found) / len(found), tokens / room, tokens / rows_alone)

    def rows_of_steps(self, epoch: int) -> Iterator[list[int]]:
        """Return the rows of each step of an epoch, which `split` plans: that takes long, and can wait."""
        order = self.order(epoch)
        for rows in self.batch.split(self.sizes.tokens[order]):
            yield order[rows].tolist()

    def split(self, rows: Sequence[int]) -> list[list[MicroBatch]]:
        """Return micro-batches by process for the rows of one step: as few as the budget allows, as equal as possible."""
        groups = self.groups(rows)
        costs = self.costs(groups)
        tokens = costs[:, 0].sum()
        for count in range(max(1, math.ceil(tokens / (self.processes * self.room))), len(rows) + 1):
            bins = self._fill(*self._enough(groups, costs, count * self.processes), count * self.processes)
            if bins is not None:
                return self._deal(*bins, count)
        raise AssertionError("every row fits a micro-batch of its own")

    def costs(self, groups: Sequence[PrefixGroup]) -> np.ndarray:
        """Return tokens, without those of the opening, and patches of G groups: [G, 2] float64."""
        return self.sizes.of_each(groups) - [self.opening, 0]

    def tokens_of(self, batch: MicroBatch) -> int:
        """Return the tokens that a micro-batch of some rows computes."""
        return self.opening + int(self.costs(batch)[:, 0].sum())

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

    def _enough(self, groups: list[PrefixGroup], costs: np.ndarray, bins: int) -> tuple[list[PrefixGroup], np.ndarray]:
        """Cut the largest groups until no process is without rows, as far as there are rows; with costs [groups, 2]."""
        if len(groups) >= bins:
            return groups, costs
        parts = dict(enumerate(groups))
        # The most tokens first; of equal groups the one that stands first.
        largest = [(-costs[place, 0], place) for place, group in parts.items() if len(group) > 1]
        heapq.heapify(largest)
        numbers = itertools.count(len(groups))
        while len(parts) < bins and largest:
            group = parts.pop(heapq.heappop(largest)[1])
            half = len(group) // 2
            for place, part in zip(numbers, (group[:half], group[half:]), strict=False):
                parts[place] = part
                if len(part) > 1:
                    heapq.heappush(largest, (self.opening - self.sizes.of(part)[0], place))
        cut = list(parts.values())
        return cut, self.costs(cut)

    def _fill(
        self, groups: list[PrefixGroup], costs: np.ndarray, bins: int
    ) -> tuple[np.ndarray, list[MicroBatch]] | None:
        """Put the heaviest first into the lightest bin, by tokens or patches, whichever it has more of. None if it fails.

        Returns the tokens and patches of the bins [bins, 2] with what is in them.
        """
        loads = _Loads(bins, costs)
        filled: list[MicroBatch] = [[] for _ in range(bins)]
        for place in _heaviest_first(costs, [group[0] for group in groups]):
            lightest = loads.lightest_with(place)
            if loads.after[0, lightest] > self.room:
                over = loads.after[0] > self.room
                if over.all():
                    return None
                lightest = loads.lightest_with(place, over)
            loads.add(lightest)
            filled[lightest].append(groups[place])
        return loads.values.T, filled

    def _deal(self, costs: np.ndarray, bins: list[MicroBatch], count: int) -> list[list[MicroBatch]]:
        """Give `count` bins to each process, the heaviest first to the one with least: all wait for the slowest."""
        loads = _Loads(self.processes, costs)
        dealt: list[list[MicroBatch]] = [[] for _ in range(self.processes)]
        full = np.zeros(self.processes, dtype=bool)
        for place in _heaviest_first(costs, [batch[0][0] if batch else -1 for batch in bins]):
            process = loads.lightest_with(place, full)
            loads.add(process)
            dealt[process].append(bins[place])
            full[process] = len(dealt[process]) == count
        return dealt


class _Loads:
    """Tokens and patches of bins that are filled: `values` [2, bins], and `after` [2, bins] with one thing more in each.

    Args:
        bins: number of bins.
        costs: tokens and patches [things, 2] of all things that go into them.
    """

    def __init__(self, bins: int, costs: np.ndarray) -> None:
        self.values = np.zeros((2, bins))
        self.after = np.zeros((2, bins))
        self._costs = list(costs[:, :, None])
        self._scale = np.maximum(costs.sum(axis=0), 1.0)[:, None]
        self._shares = np.zeros((2, bins))
        self._weights = np.zeros(bins)

    def lightest_with(self, place: int, left_out: np.ndarray | None = None) -> int:
        """Return the bin that is lightest with a thing in it, by its larger share of tokens or patches."""
        # A step takes thousands of these: no new arrays.
        np.add(self.values, self._costs[place], out=self.after)
        np.divide(self.after, self._scale, out=self._shares)
        np.maximum(self._shares[0], self._shares[1], out=self._weights)
        if left_out is not None:
            self._weights[left_out] = np.inf
        return int(self._weights.argmin())

    def add(self, bin_number: int) -> None:
        """Put the thing that was asked for last into a bin."""
        self.values[:, bin_number] = self.after[:, bin_number]


def _heaviest_first(costs: np.ndarray, first_rows: list[int]) -> list[int]:
    """Return the order of things by their larger share of all tokens or patches; of equal ones the lower row first."""
    shares = costs / np.maximum(costs.sum(axis=0), 1.0)
    order: list[int] = np.lexsort((first_rows, -shares.max(axis=1))).tolist()
    return order


class StepSampler(Sampler[list[int]]):
    """Gives a data loader, as its batch sampler, the rows of one optimizer step after another; `MicroBatches` plans them.

    Args:
        plan: the steps.
        rank: the process whose micro-batches are made of them.
    """

    def __init__(self, plan: StepPlan, rank: int) -> None:
        self.plan = plan
        self.rank = rank
        self.epoch = 0

    def __iter__(self) -> Iterator[list[int]]:
        return self.plan.rows_of_steps(self.epoch)

    def __len__(self) -> int:
        return len(self.plan)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose steps are given next."""
        self.epoch = epoch

    def take(self, plan: StepPlan) -> None:
        """Give the steps of another plan from now on."""
        self.plan = plan

    def reseed(self, seed: int) -> None:
        """Give the orders of another seed from now on."""
        plan = self.plan
        self.take(StepPlan(plan.sizes, plan.batch, plan.tokens_per_batch, plan.processes, seed, plan.share_prefixes))


class MicroBatches(Dataset[MicroBatch]):
    """Plans the step that is asked for, in the worker that reads its rows: hundreds of processes take a while to plan.

    Args:
        plan: the steps.
        rank: the process whose micro-batches are given.
    """

    def __init__(self, plan: StepPlan, rank: int) -> None:
        self.plan = plan
        self.rank = rank

    def __getitems__(self, rows: list[int]) -> list[MicroBatch]:
        """Return the micro-batches of this process for the rows of a step over all processes."""
        return self.plan.split(rows)[self.rank]
