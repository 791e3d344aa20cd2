"""The micro-batch of a plan that needs most memory, to be tried before the first step."""

from __future__ import annotations

import itertools

import numpy as np

from qwen_vl_sft.batching.packing import Group, MicroBatch, StepPlan

# How much an order minds the tokens of a micro-batch, against the rows of a step.
_WEIGHTS = (0.0, 0.5, 1.0)


def largest_micro_batch(plan: StepPlan) -> MicroBatch:
    """A micro-batch that needs as much memory as any of any epoch, but for a row: full, and of the largest images.

    A step begins and ends inside a group, wherever its rows do: of few rows it may show more images than they ask about
    when groups stay whole, one of them for a single row. A patch counts as a token does: it costs about as much where
    the vision tower trains, and nearly nothing where it does not.
    """
    search = _Search(plan)
    found = [search.filled_up(weight, begun) for weight, begun in itertools.product(_WEIGHTS, (False, True))]
    return max(found, key=lambda batch: sum(plan.sizes.of(group).sum() for group in batch))


class _Search:
    """Fills micro-batches with the groups of a plan, each with its largest rows first."""

    def __init__(self, plan: StepPlan) -> None:
        self.sizes = sizes = plan.sizes
        alone = sizes.tokens + sizes.patches
        groups = plan.groups(range(len(sizes.tokens)))
        self.groups = [sorted(group, key=lambda row: -alone[row]) for group in groups]
        self.uses = np.array([self._use(group) for group in self.groups])
        self.costs = np.array([sizes.of(group).sum() for group in self.groups])
        self.first_rows = np.array([group[0] for group in self.groups])
        self.limits = np.array([plan.tokens_per_batch, *plan.batch.most(sizes.tokens)], dtype=np.float64)

    def filled_up(self, weight: float, begun: bool) -> MicroBatch:
        """Groups one after another, cut where there is no room for them whole; `begun` with one row of a group."""
        batch: MicroBatch = []
        left = self.limits
        shares = self.uses / self.limits
        order = np.argsort(-self.costs / (weight * shares[:, 0] + (1 - weight) * shares[:, 1:].max(axis=1)))
        if begun:
            alone = self.sizes.tokens[self.first_rows] + self.sizes.patches[self.first_rows]
            order = np.concatenate([[alone.argmax()], order[order != alone.argmax()]])
        smallest = np.array([self.sizes.tokens.min(), 1, self.sizes.tokens.min()])
        for place in order:
            if (smallest > left).any():
                break
            part = self._fitting(self.groups[place][:1] if begun and not batch else self.groups[place], left)
            if part:
                batch.append(part)
                left = left - self._use(part)
        return batch

    def _fitting(self, group: Group, left: np.ndarray) -> Group:
        part: Group = []
        for row in group:
            if (self._use([*part, row]) <= left).all():
                part.append(row)
        return part

    def _use(self, group: Group) -> np.ndarray:
        """Tokens of a micro-batch, then rows and their tokens in a step, where those of a shared prefix count for each."""
        return np.array([self.sizes.of(group)[0], len(group), self.sizes.tokens[group].sum()])
