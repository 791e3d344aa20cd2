"""Find the micro-batch of a plan that needs most memory, to try it before the first step."""

from __future__ import annotations

import itertools

import numpy as np

from qwen_vl_sft.batching.packing import MicroBatch, PrefixGroup, StepPlan

# How much an order minds the tokens of a micro-batch, against the rows of a step.
_WEIGHTS = (0.0, 0.5, 1.0)


def largest_micro_batch(plan: StepPlan) -> MicroBatch:
    """Return a micro-batch that needs as much memory as any of any epoch, but for a row: full, with the largest images.

    A step begins and ends anywhere in a group, so one of few rows may show an image for the last question on it alone,
    and another for the first few. A patch counts as a token does: it costs about as much where the vision tower trains,
    and nearly nothing where it does not.
    """
    search = _Search(plan)
    found = [search.filled_up(weight, begun) for weight, begun in itertools.product(_WEIGHTS, (False, True))]
    return max(found, key=lambda batch: plan.costs(batch).sum())


class _Search:
    """Fills micro-batches with the groups of a plan, each with its largest rows first."""

    def __init__(self, plan: StepPlan) -> None:
        self.sizes = sizes = plan.sizes
        self.opening = plan.opening
        self.alone = sizes.tokens + sizes.patches
        groups = plan.groups(range(len(sizes.tokens)))
        self.groups = [sorted(group, key=self.alone.__getitem__, reverse=True) for group in groups]
        counts = np.array([len(group) for group in self.groups])
        rows = np.fromiter(itertools.chain.from_iterable(self.groups), np.int64, int(counts.sum()))
        starts = counts.cumsum() - counts
        self.first_rows = first = rows[starts]
        # Beside the opening, which a micro-batch has once.
        self.shortest = (np.minimum.reduceat(sizes.tokens[rows], starts) - plan.opening).tolist()
        whole = np.add.reduceat(sizes.tokens[rows], starts)
        tokens = whole - (counts - 1) * sizes.prefix_tokens[first] - plan.opening
        patches = np.add.reduceat(sizes.patches[rows], starts) - (counts - 1) * sizes.prefix_patches[first]
        self.limits = np.array([plan.room, *plan.batch.most(sizes.tokens)], dtype=np.float64)
        # Tokens of a micro-batch, then rows and their tokens in a step, where those of a shared prefix count for each.
        self.shares = np.stack([tokens, counts, whole], axis=1) / self.limits
        self.costs = tokens + patches

    def filled_up(self, weight: float, begun: bool) -> MicroBatch:
        """Add groups one after another, cut where they do not fit whole; `begun` with one row of a group."""
        batch: MicroBatch = []
        left = self.limits
        needs = weight * self.shares[:, 0] + (1 - weight) * self.shares[:, 1:].max(axis=1)
        order = np.argsort(-self.costs / needs, kind="stable")  # alike on all processes
        if begun:
            largest = self.alone[self.first_rows].argmax()
            order = np.concatenate([[largest], order[order != largest]])
        shortest_of_all = min(self.shortest)
        for place in order.tolist():
            if left[0] < shortest_of_all or left[1] < 1:
                break
            if self.shortest[place] > left[0]:
                continue
            part = self._fitting(self.groups[place][:1] if begun and not batch else self.groups[place], left)
            if part:
                batch.append(part)
                left = left - self._use(part)
        return batch

    def _fitting(self, group: PrefixGroup, left: np.ndarray) -> PrefixGroup:
        part: PrefixGroup = []
        for row in group:
            if (self._use([*part, row]) <= left).all():
                part.append(row)
        return part

    def _use(self, group: PrefixGroup) -> np.ndarray:
        return np.array([self.sizes.of(group)[0] - self.opening, len(group), self.sizes.tokens[group].sum()])
