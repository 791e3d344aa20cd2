"""Checkpointing as far as memory needs it: chosen on the largest micro-batch, alike on all processes, and unnoticed."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.models import qwen2_vl
from fixtures.processes import launch, run_process
from fixtures.repository import REPOSITORY
from fixtures.row_lengths import sizes_of
from fixtures.saved_activations import SavedActivations
from fixtures.trainers import make_trainer
from qwen_vl_sft import tiny
from qwen_vl_sft.batching.global_batch import GlobalBatch
from qwen_vl_sft.batching.largest import largest_micro_batch
from qwen_vl_sft.batching.packing import StepPlan
from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.scan import scan
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.random_state import random_state
from qwen_vl_sft.training.memory import MARGIN, Fit, MemoryProbe, all_layers, choose, found_fit, largest_batch, room_for

HUGE = 10**12


@settings(max_examples=200)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=80), st.integers(0, 200), st.integers(0, 4000))
def test_as_many_layers_keep_their_activations_as_fit(growth, start, room):
    peaks = [start, *(start + total for total in itertools.accumulate(growth))]
    kept, peak = choose(lambda number: peaks[number], len(growth), room)
    assert peak == peaks[kept]
    fitting = [number for number, needed in enumerate(peaks) if needed <= room]
    # What is flat may end anywhere: the peak is what counts.
    assert peak == max((peaks[number] for number in fitting), default=start)


@pytest.mark.parametrize("room", [10.0, 11.5, 20.0, 34.0, 100.0])
def test_a_few_trials_are_enough(room):
    """Flat at first, as when a frozen vision tower needs more than the first layers; out of memory above 36."""
    tried = []

    def peak(kept):
        tried.append(kept)
        needed = max(12.0, 8.0 + 0.9 * kept)
        return needed if needed < 36 else math.inf

    kept, _ = choose(peak, 28, room)
    assert kept == (0 if room < 12 else min(28, int((room - 8) / 0.9)))
    assert len(tried) <= 6


@pytest.mark.parametrize("guess", [1, 20, 27, 28, 90])
def test_a_plan_that_is_near_saves_trials_and_one_that_is_wrong_changes_nothing(guess):
    tried = []

    def peak(kept):
        tried.append(kept)
        return 8.0 + 0.9 * kept

    kept, most = choose(peak, 28, 30.0, guess)
    assert (kept, most) == (24, 8.0 + 0.9 * 24)
    assert tried[1] == min(guess, 28)
    assert len(tried) <= (4 if guess == 20 else 7)


def test_the_largest_micro_batch_is_as_large_as_any(tiny_processor):
    data = scan(open_rows(str(tiny.DATA_DIR), "train[:200]"), Encoder(tiny_processor))
    for share, rows_per_step in itertools.product((False, True), (4, 32)):
        plan = StepPlan(data.lengths, GlobalBatch(rows_per_step), 700, 2, seed=1, share_prefixes=share)

        def cost(batch, plan=plan):
            return plan.costs(batch).sum() if batch else 0

        met = max(
            cost(batch) for epoch in (0, 1) for step in plan.steps(epoch) for batches in step for batch in batches
        )
        largest = largest_micro_batch(plan)
        assert cost(largest) >= met
        assert plan.tokens_of(largest) <= 700
        assert sum(len(group) for group in largest) <= rows_per_step


def test_the_largest_step_is_limited_by_its_rows():
    plan = StepPlan(sizes_of([10, 40, 20, 40, 30]), GlobalBatch(2), 100, 1, seed=0)
    assert largest_micro_batch(plan) == [[1], [3]]


def test_the_largest_micro_batch_has_an_opening_once():
    sizes = sizes_of([30] * 6, prefix=[*range(6)], prefix_tokens=[25] * 6, opening_tokens=20)
    plan = StepPlan(sizes, GlobalBatch(6), 50, 1, seed=0, share_prefixes=True)
    largest = largest_micro_batch(plan)
    assert (len(largest), plan.tokens_of(largest)) == (3, 20 + 3 * 10)


def most_met(plan, epochs=4):
    """Tokens, and tokens with patches, of the micro-batches of some epochs that have most of them, openings aside."""
    batches = [batch for epoch in range(epochs) for step in plan.steps(epoch) for part in step for batch in part]
    costs = [plan.costs(batch).sum(axis=0) for batch in batches if batch]
    return max(tokens for tokens, _ in costs), max(sum(cost) for cost in costs)


@pytest.mark.parametrize(("rows_per_step", "images"), [(1, 1), (16, 2), (20, 2), (32, 3)])
def test_a_step_shows_more_images_than_whole_groups_would(rows_per_step, images):
    """20 questions on each of ten images: a step that begins with an image's last question comes to one image more."""
    count, picture, question = 200, 600, 30
    prefix = [row // 20 for row in range(count)]
    sizes = sizes_of(
        [picture + question] * count, [4 * picture] * count, prefix, [picture] * count, [4 * picture] * count
    )
    plan = StepPlan(sizes, GlobalBatch(rows_per_step), 100_000, 1, seed=0, share_prefixes=True)
    largest = largest_micro_batch(plan)
    assert sum(sizes.of(group)[0] for group in largest) == images * picture + rows_per_step * question
    assert most_met(plan)[0] <= images * picture + rows_per_step * question


@st.composite
def questions_on_images(draw):
    """Images of 4 patches a token with up to 30 questions on each, and rows of text."""
    rows, opening = [], draw(st.one_of(st.just(0), st.integers(1, 40)))
    images = draw(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30), st.integers(1, 20)), max_size=8))
    for number, (picture, questions, longest) in enumerate(images):
        lengths = draw(st.lists(st.integers(1, longest), min_size=questions, max_size=questions))
        rows += [(picture + length, 4 * picture, number, picture, 4 * picture) for length in lengths]
    rows += [(length, 0, -1, 0, 0) for length in draw(st.lists(st.integers(1, 80), min_size=not rows, max_size=20))]
    rows = [(opening + row[0], *row[1:3], opening * (row[2] >= 0) + row[3], row[4]) for row in rows]
    columns = (list(column) for column in zip(*draw(st.permutations(rows)), strict=True))
    return sizes_of(*columns, opening_tokens=opening)


@settings(max_examples=80)
@given(
    questions_on_images(),
    st.one_of(
        st.integers(1, 40).map(GlobalBatch), st.integers(80, 1500).map(lambda tokens: GlobalBatch(tokens=tokens))
    ),
    st.integers(120, 540),
    st.integers(1, 3),
    st.booleans(),
)
def test_no_micro_batch_needs_more_than_the_one_that_is_tried_but_for_a_row(sizes, batch, budget, processes, share):
    plan = StepPlan(sizes, batch, budget, processes, seed=3, share_prefixes=share)
    largest = largest_micro_batch(plan)
    tokens, patches = plan.costs(largest).sum(axis=0)
    assert plan.tokens_of(largest) <= budget
    assert sum(map(len, largest)) <= batch.most(sizes.tokens)[0]
    assert len({row for group in largest for row in group}) == sum(map(len, largest))
    assert most_met(plan)[1] <= tokens + patches + (sizes.tokens + sizes.patches).max()


@pytest.fixture
def probed(ragged, tiny_processor, tmp_path):
    """Trains two steps with the given room (None: without a probe); returns the trainer."""
    data = scan(ragged, Encoder(tiny_processor))
    number = itertools.count()

    def run(room, memory=None, automatic=True, **arguments):
        torch.manual_seed(0)
        model = qwen2_vl()
        folder = tmp_path / str(next(number))
        trainer = make_trainer(model, ragged, tiny_processor, folder, activation_checkpointing=True, **arguments)
        if room is not None or memory is not None:

            def largest():
                return largest_batch(trainer.data_collator, data, None, 2)

            trainer.add_callback(MemoryProbe(trainer, largest, automatic, memory=memory or SavedActivations(room)))
        trainer.train()
        return trainer

    return run


def test_more_room_means_fewer_checkpointed_layers(probed):
    layers = len(all_layers(qwen2_vl()))
    assert layers >= 4
    none = found_fit(probed(HUGE))
    assert (none.layers, none.checkpointed) == (layers, 0)
    every = found_fit(probed(1))
    assert every.checkpointed == layers
    between = found_fit(probed((none.peak + every.peak) / 2 / (1 - MARGIN)))
    assert 0 < between.checkpointed < layers
    assert between.peak <= between.room * (1 - MARGIN)
    # One layer more that keeps its activations would not fit.
    assert between.peak + (none.peak - every.peak) / layers > between.room * (1 - MARGIN) * 0.9


def test_the_run_does_not_notice_the_trial(probed):
    plain, tried = probed(None), probed(HUGE)
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (plain, tried)]
    assert losses[0] == losses[1]
    for one, other in zip(plain.model.parameters(), tried.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_trial_draws_no_random_numbers_and_leaves_no_gradient(probed, monkeypatch):
    from qwen_vl_sft.training import memory

    before = []
    inner = memory.MemoryProbe.on_train_begin

    def watched(self, *args, **kwargs):
        before.append(random_state()[2])
        inner(self, *args, **kwargs)
        assert torch.equal(random_state()[2], before[0])
        assert all(parameter.grad is None for parameter in self.trainer.model.parameters())

    monkeypatch.setattr(memory.MemoryProbe, "on_train_begin", watched)
    assert found_fit(probed(HUGE)) is not None
    assert before


def test_a_trial_keeps_activations_where_a_step_does(probed, monkeypatch):
    from qwen_vl_sft.training import memory

    class Offloading:
        inside = False

        def __enter__(self):
            self.inside = True

        def __exit__(self, *error):
            self.inside = False

    offloading, found = Offloading(), []
    inner, grad = memory.MemoryProbe.on_train_begin, torch.autograd.grad

    def begin(self, *args, **kwargs):
        self.trainer.maybe_activation_offload_context = offloading
        inner(self, *args, **kwargs)

    def watched(*args, **kwargs):
        found.append(offloading.inside)
        return grad(*args, **kwargs)

    monkeypatch.setattr(memory.MemoryProbe, "on_train_begin", begin)
    monkeypatch.setattr(torch.autograd, "grad", watched)
    probed(None, memory=SavedActivations(HUGE), automatic=False, max_steps=1)
    assert found == [True]


class Small(SavedActivations):
    """Fails as a GPU does when more is asked for than there is."""

    def peak_of(self, work):
        needed = super().peak_of(work)
        if needed > self._room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return needed


def test_out_of_memory_in_a_trial_is_survived(probed):
    every, none = found_fit(probed(1)), found_fit(probed(HUGE))
    to_come = sum(3 * 4 * parameter.numel() for parameter in qwen2_vl().parameters())
    small = Small((every.peak + none.peak) // 2 - to_come)
    small.room = lambda: HUGE  # nothing but the failure tells
    found = found_fit(probed(None, memory=small))
    assert 0 < found.checkpointed < found.layers


@pytest.mark.parametrize("automatic", [True, False])
def test_too_little_memory_ends_before_the_first_step_with_the_rows(probed, automatic):
    with pytest.raises(UserError, match=r"out of memory in a micro-batch of 2 row\(s\) \(row_id 1, 3\)"):
        probed(None, memory=Small(10), automatic=automatic)


@pytest.mark.parametrize(
    ("used", "peak", "room", "tokens"),
    [
        (10, 20, 29, None),  # not twice as many tokens
        (10, 20, 31, 200),
        (10, 20, 1000, 400),  # a step has no more
        (10, 5, 100, 400),
    ],
)
def test_room_for_larger_micro_batches(used, peak, room, tokens):
    plan = StepPlan(sizes_of([50] * 40), GlobalBatch(8), 100, 1, seed=0)
    assert plan.packing_stats().micro_batches == 4
    assert room_for(plan, used, peak, room) == tokens
    assert room_for(StepPlan(sizes_of([50] * 40), GlobalBatch(8), 100, 4, seed=0), used, peak, room) is None


def test_the_line_that_is_printed():
    text = f"memory      {Fit(28, 12, 61 * 2**30, 140 * 2**30)}"
    assert text == "memory      12 of 28 layers checkpointed: 61.0 of 140.0 GiB at most"


KEYS = {
    "recipe": "recipes/quickstart.yaml",
    "max_steps": 2,
    "max_train_samples": 32,
    "lora_dropout": 0.0,
    "packing": "true",
    "tokens_per_batch": 500,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": "false",
    "logging_steps": 1,
    "report_to": "none",
}


@pytest.mark.parametrize(
    "config", ["cpu", *(pytest.param(name, marks=pytest.mark.long) for name in ("zero2", "fsdp2"))]
)
def test_processes_with_unlike_memory_choose_alike(config, tmp_path, monkeypatch):
    """The losses are those of a run without a trial, and the smaller memory decides for both."""
    found = {}
    for name, rooms, checkpointing in (("plain", None, "false"), ("tried", (HUGE, 12_000_000), "auto")):
        keys = {**KEYS, "output_dir": tmp_path / name, "gradient_checkpointing": checkpointing}
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        for rank, room in enumerate(rooms or ()):
            monkeypatch.setenv(f"ROOM_{rank}", str(room))
        script = REPOSITORY / "tests/fixtures/saved_activations.py" if rooms else "scripts/sft.py"
        done = launch(config, script, *words)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "room for" not in done.stdout
        entries = [json.loads(line) for line in (tmp_path / name / "training_log.jsonl").read_text().splitlines()]
        found[name] = [entry["loss"] for entry in entries if "loss" in entry]
    assert found["tried"] == pytest.approx(found["plain"], abs=1e-6)
    fit = json.loads((tmp_path / "tried/metrics.json").read_text())["memory"]
    assert 0 < fit["checkpointed"] < fit["layers"]
    assert fit["peak"] <= fit["room"] == pytest.approx(12_000_000, rel=1e-6)


def test_the_memory_of_a_photo_is_kept_for_the_next_one():
    """Pages that the kernel gives anew cost a third of the time of decoding; a photo of 12 megapixels has 8,800."""
    done = run_process(REPOSITORY / "tests/fixtures/decoded_photo.py")
    words = done.stdout.split()
    assert words[0] == "pages", done.stderr
    # A block that was freed may be a little short for the next photo a few times.
    assert int(words[1]) < 7000
