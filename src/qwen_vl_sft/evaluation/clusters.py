"""Statistics of rows that share images: intervals and paired tests in which a chart counts as one draw, not each question.

Questions on one chart are mostly right or wrong together, so intervals of rows as if they were independent are too narrow
(Cameron and Miller 2015, "A practitioner's guide to cluster-robust inference").
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from qwen_vl_sft.evaluation.metrics import BOOTSTRAP_CHUNK, BOOTSTRAP_RESAMPLES, BOOTSTRAP_SEED, Comparison, Estimate

SIGN_FLIPS = 20_000


def number_clusters(images: Sequence[Sequence[Hashable]]) -> list[int]:
    """Return the number of each row's cluster: rows that share one, directly or through others, are in one cluster.

    A row without images is a cluster of its own.
    """
    parents: dict[Hashable, Hashable] = {}

    def root(name: Hashable) -> Hashable:
        parents.setdefault(name, name)
        while parents[name] != name:
            parents[name] = parents[parents[name]]
            name = parents[name]
        return name

    names: list[Hashable] = []
    for row, shown in enumerate(images):
        names.append(("row", row))
        for image in shown:
            parents[root(("image", image))] = root(names[-1])
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(root(name), len(numbers)) for name in names]


def estimate_clustered(
    scores: Sequence[float],
    clusters: Sequence[int],
    resamples: int = BOOTSTRAP_RESAMPLES,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Estimate:
    """Estimate the mean of N scores with its 95% percentile interval, resampling whole clusters, whatever their order.

    The interval of a single cluster is all that scores can be, from the lower to the upper of `limits`: one draw tells
    nothing of others.
    """
    if not len(scores):
        return Estimate(math.nan, math.nan, math.nan, 0)
    sums, counts = _by_cluster(scores, clusters)
    if len(sums) == 1:
        return Estimate(math.fsum(scores) / len(scores), *limits, len(scores))
    # A resample is a multinomial draw over the distinct pairs of sum and count: few numbers, and no order to depend on.
    kinds, frequencies = np.unique(np.stack([sums, counts]), axis=1, return_counts=True)
    total = int(frequencies.sum())
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    means = []
    for start in range(0, resamples, BOOTSTRAP_CHUNK):
        size = min(BOOTSTRAP_CHUNK, resamples - start)
        drawn = generator.multinomial(total, frequencies / total, size=size)
        means.append((drawn @ kinds[0]) / (drawn @ kinds[1]))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(math.fsum(scores) / len(scores), float(low), float(high), len(scores))


def compare_clustered(first: Sequence[float], second: Sequence[float], clusters: Sequence[int]) -> Comparison:
    """Compare the scores of two arms, N each, on the same rows in the same order.

    Wins count rows. The p-value is that of a two-sided test that flips the sign of each cluster's difference at random: how
    often a difference as large comes up if neither arm is better.
    """
    assert len(first) == len(second) == len(clusters)
    differences = [b - a for a, b in zip(first, second, strict=True)]
    first_wins = sum(difference < 0 for difference in differences)
    second_wins = sum(difference > 0 for difference in differences)
    p_value = flip_test(_by_cluster(differences, clusters)[0]) if differences else math.nan
    difference = estimate_clustered(differences, clusters, limits=(-1.0, 1.0))
    return Comparison(len(differences), first_wins, second_wins, difference, p_value)


def flip_test(sums: np.ndarray) -> float:
    """Return the p-value of the two-sided sign-flip test of the differences of clusters, from `SIGN_FLIPS` random flips."""
    # Clusters of equal size of difference flip alike: how many of them stay positive is binomial.
    sizes, counts = np.unique(np.abs(sums).round(12), return_counts=True)
    sizes, counts = sizes[sizes > 0], counts[sizes > 0]
    if not len(sizes):
        return 1.0
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    totals = np.zeros(SIGN_FLIPS)
    for size, count in zip(sizes, counts, strict=True):
        totals += size * (2.0 * generator.binomial(count, 0.5, SIGN_FLIPS) - count)
    as_large = int((np.abs(totals) >= abs(math.fsum(sums)) - 1e-9).sum())
    return (as_large + 1) / (SIGN_FLIPS + 1)


def _by_cluster(scores: Sequence[float], clusters: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of each cluster's scores and the number of its rows."""
    numbers = np.asarray(clusters)
    count = int(numbers.max()) + 1
    # Sorted first, so that sums do not depend on the order of rows.
    order = np.lexsort((np.asarray(scores), numbers))
    sums = np.bincount(numbers[order], np.asarray(scores, dtype=np.float64)[order], count)
    counts = np.bincount(numbers, minlength=count)
    return sums[counts > 0], counts[counts > 0].astype(np.float64)
