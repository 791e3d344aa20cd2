"""Plans of packed steps: every row once, budgets kept, processes even, and the rows of a step the same on any world."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.row_lengths import sizes_of
from qwen_vl_sft.batching.global_batch import GlobalBatch
from qwen_vl_sft.batching.packing import MicroBatches, StepPlan, StepSampler

BUDGET = 100


@st.composite
def any_sizes(draw):
    """Rows with and without a prefix; all rows of a prefix have the same one, and something after it.

    Some begin with one opening, all of them.
    """
    prefixes = draw(st.lists(st.tuples(st.integers(1, 45), st.integers(0, 300)), max_size=6))
    opening = draw(st.one_of(st.just(0), st.integers(1, 15)))
    rows = draw(
        st.lists(
            st.tuples(st.integers(-1, len(prefixes) - 1), st.integers(1, 40), st.integers(0, 100)),
            min_size=1,
            max_size=40,
        )
    )
    columns = []
    for prefix, own_tokens, own_patches in rows:
        tokens, patches = prefixes[prefix] if prefix >= 0 else (0, 0)
        begins = tokens + opening if prefix >= 0 else 0
        columns.append((opening + tokens + own_tokens, patches + own_patches, prefix, begins, patches))
    return sizes_of(*(list(column) for column in zip(*columns, strict=True)), opening_tokens=opening)


# No row of `any_sizes` is longer than 100 tokens.
any_batch = st.one_of(
    st.integers(1, 12).map(lambda rows: GlobalBatch(rows=rows)),
    st.integers(200, 1000).map(lambda tokens: GlobalBatch(tokens=tokens)),
)


def rows_of(step):
    return sorted(row for batches in step for groups in batches for group in groups for row in group)


@settings(max_examples=150)
@given(any_sizes(), any_batch, st.sampled_from([1, 2, 3, 8]), st.booleans(), st.integers(0, 3))
def test_an_epoch_visits_each_row_once_within_the_budget(sizes, batch, processes, share, epoch):
    plan = StepPlan(sizes, batch, BUDGET, processes, seed=7, share_prefixes=share)
    steps = list(plan.steps(epoch))
    assert len(steps) == len(plan)
    assert sorted(row for step in steps for row in rows_of(step)) == list(range(len(sizes.tokens)))
    for step in steps:
        assert len({len(batches) for batches in step}) == 1  # every process waits for as many micro-batches
        for batches in step:
            for groups in batches:
                opening = sizes.opening_tokens if share and groups else 0
                tokens = opening + sum(sizes.of(group)[0] - opening for group in groups)
                assert tokens <= BUDGET
                assert not groups or tokens == plan.tokens_of(groups)
                for group in groups:
                    assert len(group) == 1 or (share and len({int(sizes.prefix[row]) for row in group}) == 1)


@settings(max_examples=50)
@given(any_sizes(), any_batch, st.booleans())
def test_the_rows_of_a_step_do_not_depend_on_the_number_of_processes(sizes, batch, share):
    plans = [StepPlan(sizes, batch, BUDGET, processes, 7, share) for processes in (1, 2, 3, 8)]
    found = [[rows_of(step) for step in plan.steps(1)] for plan in plans]
    assert found[1:] == found[:1] * 3
    # Nor on whether an opening is shared: a run goes on from a checkpoint that was made without.
    apart = StepPlan(sizes.without_opening(), batch, BUDGET, 1, 7, share)
    assert [rows_of(step) for step in apart.steps(1)] == found[0]


@settings(max_examples=200)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=200), st.integers(200, 2000))
def test_steps_of_so_many_tokens_are_alike_and_as_many_in_every_epoch(lengths, tokens):
    lengths, batch = np.array(lengths), GlobalBatch(tokens=tokens)
    steps = batch.split(lengths)
    assert len(steps) == batch.steps(lengths) == batch.steps(lengths[::-1])
    assert [row for step in steps for row in range(len(lengths))[step]] == list(range(len(lengths)))
    sums = [int(lengths[step].sum()) for step in steps]
    assert min(sums) > 0
    even = lengths.sum() / len(steps)
    assert even <= tokens
    assert max(abs(total - even) for total in sums) <= lengths.max()
    assert max(sums) <= batch.most(lengths)[1]


def plainly_split(plan, rows):
    """Split a step by the rules as they are written down, one comparison at a time."""
    sizes, groups = plan.sizes, plan.groups(rows)
    opening = np.array([sizes.opening_tokens if plan.share_prefixes else 0, 0])
    total, room = sum(sizes.of(group)[0] - opening[0] for group in groups), BUDGET - opening[0]
    for count in range(max(1, math.ceil(total / (plan.processes * room))), len(rows) + 1):
        parts = list(groups)
        while len(parts) < count * plan.processes and any(len(group) > 1 for group in parts):
            largest = max((group for group in parts if len(group) > 1), key=lambda group: sizes.of(group)[0])
            parts.remove(largest)
            parts += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
        things = [(sizes.of(group) - opening, group) for group in parts]
        bins = plainly_filled(things, [(np.zeros(2), []) for _ in range(count * plan.processes)], most=room)
        if bins:
            dealt = plainly_filled(bins, [(np.zeros(2), []) for _ in range(plan.processes)], full=count)
            return [batches for _, batches in dealt]


def plainly_filled(things, bins, most=math.inf, full=math.inf):
    scale = np.maximum(sum(cost for cost, _ in things), 1.0)
    for cost, thing in sorted(things, key=lambda entry: (-max(entry[0] / scale), entry[1])):
        weights = [
            max((load + cost) / scale) if load[0] + cost[0] <= most and len(inside) < full else math.inf
            for load, inside in bins
        ]
        lightest = weights.index(min(weights))
        if weights[lightest] == math.inf:
            return None
        bins[lightest] = (bins[lightest][0] + cost, [*bins[lightest][1], thing])
    return bins


@settings(max_examples=150)
@given(any_sizes(), st.sampled_from([1, 2, 3, 8]), st.booleans())
def test_a_step_is_split_by_the_rules(sizes, processes, share):
    plan = StepPlan(sizes, GlobalBatch(rows=40), BUDGET, processes, seed=7, share_prefixes=share)
    for rows in plan.rows_of_steps(0):
        assert plan.split(rows) == plainly_split(plan, rows)


def test_epochs_differ_and_follow_from_the_seed_alone():
    sizes = sizes_of([10] * 30)
    orders = [
        StepPlan(sizes, GlobalBatch(4), BUDGET, 2, seed).order(epoch).tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({tuple(order) for order in orders}) == 3
    assert StepPlan(sizes, GlobalBatch(4), BUDGET, 8, 0).order(1).tolist() == orders[1]


def test_without_sharing_the_order_is_that_of_padded_training():
    from qwen_vl_sft.batching.sampler import EpochSampler

    sampler = EpochSampler(30, 30, seed=3)
    sampler.set_epoch(2)
    assert StepPlan(sizes_of([10] * 30), GlobalBatch(4), BUDGET, 2, seed=3).order(2).tolist() == list(sampler)


def test_micro_batches_are_as_few_as_the_budget_allows_and_even():
    plan = StepPlan(sizes_of([30] * 12), GlobalBatch(12), BUDGET, 2, seed=0)
    (step,) = plan.steps(0)
    assert [[len(groups) for groups in batches] for batches in step] == [[3, 3], [3, 3]]


def test_processes_get_as_much_of_patches_as_of_tokens():
    """Long texts and large images: by tokens alone, one process could get all images."""
    tokens = [50, 50, 50, 50, 10, 10, 10, 10]
    patches = [0, 0, 0, 0, 400, 400, 400, 400]
    (step,) = StepPlan(sizes_of(tokens, patches), GlobalBatch(8), 1000, 2, seed=0).steps(0)
    loads = [sum(patches[row] for row in rows_of([batches])) for batches in step]
    assert loads == [800, 800]
    assert [sum(tokens[row] for row in rows_of([batches])) for batches in step] == [120, 120]


def test_a_shared_prefix_counts_once_and_many_questions_are_cut():
    sizes = sizes_of([50] * 20, [100] * 20, [0] * 20, [40] * 20, [100] * 20)
    assert sizes.of([0, 1, 2]).tolist() == [40 + 3 * 10, 100]
    (step,) = StepPlan(sizes, GlobalBatch(20), BUDGET, 1, 0, share_prefixes=True).steps(0)
    groups = [group for batch in step[0] for group in batch]
    assert all(sizes.of(group)[0] <= BUDGET for group in groups)
    assert len(groups) <= 5


def test_an_opening_counts_once_in_a_micro_batch():
    """Six rows of 30 tokens, 20 of which all begin with: 20 + 6 x 10 are one micro-batch of 100, where 180 were two."""
    sizes = sizes_of([30] * 6, prefix=[*range(6)], prefix_tokens=[25] * 6, opening_tokens=20)
    plan = StepPlan(sizes, GlobalBatch(6), BUDGET, 1, 0, share_prefixes=True)
    (step,) = plan.steps(0)
    assert [plan.tokens_of(batch) for batch in step[0]] == [80]
    stats = plan.packing_stats()
    assert (stats.micro_batches, stats.filled, stats.computed) == (1, 0.8, 80 / 180)
    for others in (sizes.without_opening(), sizes.select(np.arange(6)).without_patches()):
        found = StepPlan(others, GlobalBatch(6), BUDGET, 1, 0, share_prefixes=True).packing_stats()
        assert found.micro_batches == (1 if others.opening_tokens else 2)
    apart = StepPlan(sizes, GlobalBatch(6), BUDGET, 1, 0).packing_stats()
    assert (apart.micro_batches, apart.computed) == (2, 1)


def test_one_question_a_process_is_better_than_idle_processes():
    sizes = sizes_of([50] * 4, None, [0] * 4, [40] * 4)
    (step,) = StepPlan(sizes, GlobalBatch(4), BUDGET, 4, 0, share_prefixes=True).steps(0)
    assert [len(rows_of([batches])) for batches in step] == [1, 1, 1, 1]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_the_sampler_gives_each_process_its_part(processes):
    plan = StepPlan(sizes_of(list(range(10, 60))), GlobalBatch(16), BUDGET, processes, seed=5)
    samplers = [StepSampler(plan, rank) for rank in range(processes)]
    for sampler in samplers:
        sampler.set_epoch(3)
    parts = [[MicroBatches(plan, rank).__getitems__(rows) for rows in sampler] for rank, sampler in enumerate(samplers)]
    assert [list(step) for step in zip(*parts, strict=True)] == list(plan.steps(3))
    assert [len(part) for part in parts] == [len(sampler) for sampler in samplers] == [4] * processes
    seen = [row for part in parts for step in part for groups in step for group in groups for row in group]
    assert sorted(seen) == list(range(50))


def test_images_with_many_questions_come_no_earlier():
    """Over many epochs, rows of large groups and rows alone stand in the middle of the order on average."""
    prefix = [number for number in range(10) for _ in range(6)] + [-1] * 60
    plan = StepPlan(
        sizes_of([10] * 120, prefix=prefix, prefix_tokens=[5] * 120), GlobalBatch(8), BUDGET, 1, 0, share_prefixes=True
    )
    places = np.array([np.argsort(plan.order(epoch)) for epoch in range(200)])
    assert abs(places[:, :60].mean() - places[:, 60:].mean()) < 3


def test_features_that_are_kept_leave_tokens_alone_to_be_balanced():
    sizes = sizes_of([50, 50, 10, 10], [0, 400, 0, 400])
    (step,) = StepPlan(sizes.without_patches(), GlobalBatch(4), 1000, 2, seed=0).steps(0)
    assert [sum(sizes.tokens[row] for groups in batches for group in groups for row in group) for batches in step] == [
        60,
        60,
    ]
    assert sizes.patches.tolist() == [0, 400, 0, 400]
