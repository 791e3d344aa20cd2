"""Packed rows and shared prefixes against the same rows one at a time: per-token losses, gradients, three steps."""

import copy
import functools
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from fixtures.family_runs import write_recipe
from fixtures.messages import conversation_row, png, write_messages
from fixtures.models import FAMILIES, newer, qwen2_vl
from fixtures.packed_rows import GROUPS, ROWS, in_order, losses_of, one_at_a_time, token_losses
from fixtures.processes import launch, run_process
from qwen_vl_sft import tiny
from qwen_vl_sft.batching.collator import Collator, pad
from qwen_vl_sft.batching.global_batch import GlobalBatch
from qwen_vl_sft.batching.packed_collator import MICRO_BATCHES, PackedCollator, join, opening_length, prefix_length
from qwen_vl_sft.batching.packing import StepPlan, StepSampler
from qwen_vl_sft.batching.positions import Positions
from qwen_vl_sft.compat.packed_batches import take_packed_batches
from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.media.image_file import ImageFile
from qwen_vl_sft.data.scan import scan
from qwen_vl_sft.modeling import gathered_keys, gathered_keys_kernel
from qwen_vl_sft.modeling.attention import use_packed_attention
from qwen_vl_sft.modeling.routing import _Tokens
from qwen_vl_sft.previewing.inspection import _batches
from qwen_vl_sft.tools.prepared_run import set_up
from qwen_vl_sft.training.trainer_setup import build_trainer, sft_config


def pixels(row):
    """Of all its images one after another; empty when it shows none."""
    return torch.cat([torch.zeros(0), *(image.pixel_values.flatten() for image in row.media)])


def gradients(model, losses):
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(losses.mean(), list(parameters.values()), allow_unused=True)
    return {name: grad for name, grad in zip(parameters, found, strict=True) if grad is not None}


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# Qwen2-VL's losses here come to 19, which float32 itself resolves to 2e-6.
TOLERATED = {torch.float64: {"rtol": 0, "atol": 1e-12}, torch.float32: {"rtol": 1e-6, "atol": 1e-5}}


@pytest.fixture(params=TOLERATED, ids=["float64", "float32"])
def tolerated(request, model):
    """How far losses may be apart in each precision; the model is put into it."""
    model.to(request.param)
    yield TOLERATED[request.param]
    model.double()


@pytest.mark.parametrize("share", [False, True])
def test_losses_and_gradients_are_those_of_rows_one_at_a_time(share, model, tolerated, encoded):
    groups = [[encoded[place] for place in group] for group in GROUPS]
    if not share:
        groups = [[row] for group in groups for row in group]
    batch = join(groups, Positions(model.config))
    assert ("kv_index" in batch) == share
    wanted, found = one_at_a_time(model, in_order(groups)), token_losses(model, batch)
    torch.testing.assert_close(found, wanted, **tolerated)
    # A branch begins a chunk of the delta rule anew, which in float32 rounds otherwise: of gradients up to 4, by 4e-5.
    rounds = wanted.dtype == torch.float32 and any("A_log" in name for name in model.state_dict())
    assert largest_difference(gradients(model, wanted), gradients(model, found)) < (1e-4 if rounds else 1e-5)


@pytest.mark.parametrize("share", [False, True])
def test_an_image_goes_through_the_vision_tower_once(share, model, encoded):
    """Rows show red three times, red and blue twice, and blue once; a shared group is cut in two."""
    groups = [[0, 1], [2], [3, 4], [5], [6]] if share else [[place] for place in range(len(ROWS))]
    batch = join([[encoded[place] for place in group] for group in groups], Positions(model.config))
    one = encoded[0].media[0].pixel_values
    assert len(batch["image_grid_thw"]) == batch["stats"]["images"] == 2
    assert len(batch["pixel_values"]) == batch["stats"]["patches"] == 2 * len(one)
    torch.testing.assert_close(batch["pixel_values"][: len(one)], one, rtol=0, atol=0)
    assert batch["image_index"] == ([0, 0, 0, 1, 1] if share else [0, 0, 0, 0, 1, 0, 1, 1])
    wanted = one_at_a_time(model, [encoded[place] for place in in_order(groups)])
    torch.testing.assert_close(token_losses(model, batch), wanted, rtol=0, atol=1e-12)
    wrong = {**batch, "image_index": [1 - number for number in batch["image_index"]]}
    assert (token_losses(model, wrong) - token_losses(model, batch)).abs().max() > 1e-4


def test_images_that_differ_are_not_taken_for_one(model, encoded):
    batch = join([[encoded[3]]], Positions(model.config))
    assert len(batch["image_grid_thw"]) == 2
    assert "image_index" not in batch


def test_keys_and_values_are_gathered_in_the_order_of_the_rows(model, encoded):
    batch = join([[encoded[5]], [encoded[0], encoded[1]]], Positions(model.config))
    text, shared = len(encoded[5].input_ids), prefix_length(encoded[0])
    first, second = len(encoded[0].input_ids) - shared, len(encoded[1].input_ids) - shared
    prefix = list(range(text, text + shared))
    one = list(range(text + shared, text + shared + first))
    other = list(range(text + shared + first, text + shared + first + second))
    assert batch["kv_index"].tolist() == [*range(text), *prefix, *prefix, *one, *prefix, *other]


@pytest.fixture(scope="module")
def opened(tiny_processor, tmp_path_factory):
    """Encode rows of `GROUPS` behind a system message: `ROWS`, of which the one without an image begins otherwise."""
    system = {"role": "system", "content": "Answer in a word or two, in English."}
    rows = [{**row, "messages": [system, *row["messages"]]} for row in ROWS]
    data = open_rows(str(write_messages(tmp_path_factory.mktemp("opened"), rows, (84, 56))), "train")
    return [data.encode({"row": index}, Encoder(tiny_processor)) for index in range(len(rows))]


def test_rows_that_begin_alike_are_computed_on_one_opening(model, tolerated, opened):
    groups = [[opened[place] for place in group] for group in GROUPS]
    positions = Positions(model.config)
    if not positions.family.shared_openings:
        with pytest.raises(AssertionError, match="stand first"):
            join(groups, positions, share_openings=True)
        return
    batch, apart = join(groups, positions, share_openings=True), join(groups, positions)
    opening = opening_length(opened[0])
    assert opening > 8
    # Three of the four groups begin with it; the row without an image has none.
    assert batch["input_ids"].shape[1] == apart["input_ids"].shape[1] - 2 * opening
    assert batch["stats"]["tokens"] == batch["input_ids"].shape[1]
    # Each token attends to as many as before, but for two of the three openings.
    assert batch["stats"]["tokens_squared"] == apart["stats"]["tokens_squared"] - 2 * opening**2
    for name in ("shift_labels", "pixel_values", "image_index"):
        assert torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(apart[name]))
    wanted, found = one_at_a_time(model, in_order(groups)), token_losses(model, batch)
    torch.testing.assert_close(found, wanted, **tolerated)
    assert largest_difference(gradients(model, wanted), gradients(model, found)) < 1e-5


def test_openings_that_differ_are_not_shared(model, encoded, opened):
    positions = Positions(model.config)
    pair = [[encoded[0]], [opened[0]]]
    assert "kv_index" not in join(pair, positions, share_openings=True)
    if positions.family.shared_openings:
        both = join([*pair, [encoded[3]], [opened[3]]], positions, share_openings=True)
        lengths = both["cu_seq_lens_q"].diff().tolist()
        assert lengths[:2] == [opening_length(encoded[0]), opening_length(opened[0])]
        wanted = one_at_a_time(model, [encoded[0], opened[0], encoded[3], opened[3]])
        torch.testing.assert_close(token_losses(model, both), wanted, rtol=0, atol=1e-12)


def test_a_router_counts_a_token_for_each_row_that_has_it(model, opened):
    positions = Positions(model.config)
    groups = [[opened[place] for place in group] for group in GROUPS]
    for shares in {False, positions.family.shared_openings}:
        batch = join(groups, positions, share_openings=shares)
        found = batch["input_ids"][0].bincount(_Tokens.of(batch, len(opened)).rows_of, minlength=1000)
        assert torch.equal(found.long(), torch.cat([row.input_ids for row in opened]).bincount(minlength=1000))


@pytest.fixture(scope="module")
def charts(tiny_processor, tmp_path_factory):
    """Scan rows with and without a system message, two or three on an image each, and return them with those encoded."""
    system = {"role": "system", "content": "Answer in a word or two, in English."}
    folder, rows = tmp_path_factory.mktemp("charts"), []
    for number in range(12):
        (folder / "images").mkdir(exist_ok=True)
        (folder / f"images/{number}.png").write_bytes(png("red", (56 + 28 * (number % 3), 56 + 28 * (number % 5))))
        for question in ("Which color?", "Is it blue? " * (1 + number % 4), "a")[: 2 + number % 2]:
            rows.append(conversation_row(f"<image>{question}", "red " * (1 + number % 3), [f"images/{number}.png"]))

    def scanned(name, rows):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = scan(open_rows(str(folder / f"{name}.jsonl"), "train"), Encoder(tiny_processor))
        return data.lengths, [data.rows.encode({"row": index}, Encoder(tiny_processor)) for index in range(len(rows))]

    behind = [{**row, "messages": [system, *row["messages"]]} for row in rows]
    return {"one opening": scanned("alike", behind), "two openings": scanned("mixed", [*behind[:15], *rows[15:]])}


def test_scanned_openings_are_those_of_the_encoded_rows(charts, encoded, tiny_processor, messages_folder):
    lengths, rows = charts["one opening"]
    assert {opening_length(row) for row in rows} == {lengths.opening_tokens}
    assert lengths.opening_tokens > 8
    assert lengths.select(np.array([3, 1])).opening_tokens == lengths.opening_tokens
    assert charts["two openings"][0].opening_tokens == 0
    # A row without an image has none, so that not all rows begin with it.
    for count, opening in ((5, opening_length(encoded[0])), (6, 0)):
        found = scan(open_rows(str(messages_folder(ROWS[:count])), "train"), Encoder(tiny_processor))
        assert found.lengths.opening_tokens == opening


@settings(max_examples=60)
@given(st.data(), st.sampled_from(["one opening", "two openings"]), st.integers(90, 600), st.sampled_from([1, 2, 3]))
def test_micro_batches_have_the_tokens_that_are_planned(charts, data, name, budget, processes):
    lengths, rows = charts[name]
    picked = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, unique=True))
    assert lengths.tokens.max() <= 90
    plan = StepPlan(lengths, GlobalBatch(rows=40), budget, processes, 0, share_prefixes=True)
    stub = SimpleNamespace(
        encode_all=lambda items, read_media: [rows[item["row"]] for item in items],
        filler_row=lambda items, read_media: rows[0],
        encoder=SimpleNamespace(read_media=None),
        in_bytes=False,
    )
    collator = PackedCollator(stub, Positions(AutoConfig.from_pretrained(tiny.MODEL_DIR)), share_prefixes=True)
    for step in plan.split(picked):
        for groups, batch in zip(step, collator(step)[MICRO_BATCHES], strict=True):
            tokens = batch["stats"]["tokens"]
            assert tokens <= budget
            if groups:
                # Of rows that begin in several ways the collator shares more than is planned.
                assert (
                    (tokens == plan.tokens_of(groups)) if lengths.opening_tokens else (tokens <= plan.tokens_of(groups))
                )


def test_gradients_of_gathered_keys_are_pytorchs(model, encoded, monkeypatch):
    """On a GPU a kernel sums them; PyTorch stands in for it here."""
    batch = join([[encoded[place] for place in group] for group in GROUPS], Positions(model.config))
    wanted, called = gradients(model, token_losses(model, batch)), []

    def sum_copies(grad, order, starts):
        called.append(starts)
        return torch.stack([grad[order[start:stop]].sum(0) for start, stop in itertools.pairwise(starts.tolist())])

    monkeypatch.setattr(gathered_keys_kernel, "sum_copies", sum_copies)
    monkeypatch.setattr(gathered_keys, "_has_kernel", lambda tensor: True)
    assert largest_difference(gradients(model, token_losses(model, batch)), wanted) < 1e-12
    assert called
    assert all(starts is called[0] for starts in called), "sorted once a micro-batch"
    called.clear()
    del batch
    assert not gathered_keys._KNOWN


def test_padded_batches_go_on_as_before(model, encoded):
    batch = pad(encoded, 0)
    padded = token_losses(model, batch)
    torch.testing.assert_close(padded, one_at_a_time(model, encoded), rtol=0, atol=1e-12)
    left = pad(encoded, 0, side="left")
    torch.testing.assert_close(token_losses(model, left), padded, rtol=0, atol=1e-12)


def test_positions_of_the_collator_are_those_that_the_model_works_out(model, encoded):
    collator = Collator(
        SimpleNamespace(encode=lambda item, *args: encoded[item["row"]]), SimpleNamespace(pad_token_id=0)
    )
    items = [{"row": row} for row in range(len(encoded))]
    plain = collator(items)
    collator.positions = Positions(model.config)
    told = collator(items)
    assert told["position_ids"].shape == (3, *told["input_ids"].shape)
    assert {"image_cu_seqlens", "image_position_ids"} <= told.keys() - plain.keys()
    losses = [token_losses(model, {**batch, "row_ids": None}) for batch in (plain, told)]
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-12)
    gradients_of = [gradients(model, found) for found in losses]
    assert largest_difference(*gradients_of) < 1e-12
    collator([{"row": 5}])  # shows no image


def wrong(name, batch):
    """The batch with one of the mistakes that raise no error by themselves."""
    batch = dict(batch)
    if name == "no boundaries":
        for key in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
            del batch[key]
    elif name == "positions of the sequence":
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand(3, 1, -1)
    elif name == "positions of the targets":
        batch["logit_positions"] = batch["logit_positions"] + 1
    return batch


def test_boundaries_that_are_lost_in_training_are_an_error(model, encoded):
    batch = wrong("no boundaries", join([[row] for row in encoded], Positions(model.config)))
    model.train()
    try:
        with pytest.raises(RuntimeError, match="rows would attend to each other"):
            token_losses(model, batch)
    finally:
        model.eval()


def test_a_mask_of_ones_joins_no_rows(model, encoded):
    batch = join([[row] for row in encoded], Positions(model.config))
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    torch.testing.assert_close(token_losses(model, batch), one_at_a_time(model, encoded), rtol=0, atol=1e-12)


def test_a_mask_beside_boundaries_is_an_error(model, encoded):
    batch = join([[row] for row in encoded], Positions(model.config))
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, :3] = 0
    with pytest.raises(RuntimeError, match="packed rows take no attention mask"):
        token_losses(model, batch)


@pytest.mark.parametrize("name", ["no boundaries", "positions of the sequence", "positions of the targets"])
def test_the_comparison_above_would_notice(name, model, encoded):
    batch = wrong(name, join([[row] for row in encoded], Positions(model.config)))
    difference = (token_losses(model, batch) - one_at_a_time(model, encoded)).abs().max()
    assert difference > 1e-3


def test_generation_on_the_packed_attention_is_that_of_plain_attention(encoded, tiny_processor):
    from qwen_vl_sft.inference.padded_batches import generate_batch

    encoder = Encoder(tiny_processor)
    plain, packed = qwen2_vl(), qwen2_vl()
    use_packed_attention(packed)
    rows = [row for row in encoded if row.media][:3]
    assert generate_batch(plain, encoder, rows, 8) == generate_batch(packed, encoder, rows, 8)


def test_a_prefix_ends_after_the_last_image_before_an_answer(encoded, tiny_processor):
    end = tiny_processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    for row, images in ((encoded[0], 1), (encoded[3], 2)):
        assert int(row.input_ids[prefix_length(row) - 1]) == end
        assert int((row.input_ids[: prefix_length(row)] == end).sum()) == images
    assert prefix_length(encoded[5]) == 0


def test_scanned_prefixes_are_those_of_the_encoded_rows(tiny_processor):
    found = scan(open_rows(str(tiny.DATA_DIR), "val"), Encoder(tiny_processor))
    rows = [found.rows.encode({"row": index}, Encoder(tiny_processor)) for index in range(len(found.rows))]
    assert found.lengths.prefix_tokens.tolist() == [prefix_length(row) for row in rows]
    by_prefix = {}
    for number, row in zip(found.lengths.prefix.tolist(), rows, strict=True):
        by_prefix.setdefault(number, []).append(row)
    assert len(by_prefix) < len(rows)
    for alike in by_prefix.values():
        first = alike[0]
        prefix = first.input_ids[: prefix_length(first)]
        assert all(torch.equal(row.input_ids[: len(prefix)], prefix) for row in alike)
        assert all(torch.equal(pixels(row), pixels(first)) for row in alike)


@settings(max_examples=10)
@given(st.lists(st.integers(0, len(ROWS) - 1), min_size=1, max_size=6), st.booleans())
def test_any_mix_of_rows(mixed, picked, share):
    model, encoded = mixed
    groups = {}
    for number, place in enumerate(picked):
        family = next(index for index, group in enumerate(GROUPS) if place in group)
        together = share and bool(encoded[place].media)
        groups.setdefault(family if together else -1 - number, []).append(place)
    # A row twice in a group is one branch twice.
    batch = join([[encoded[place] for place in group] for group in groups.values()], Positions(model.config))
    wanted = one_at_a_time(model, [encoded[place] for place in in_order(groups.values())])
    torch.testing.assert_close(token_losses(model, batch), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shares", [True, False])
def test_a_run_plans_the_openings_that_its_model_shares(shares, hybrid_model, tmp_path):
    """The layers of a hybrid share none."""
    model = tiny.MODEL_DIR if shares else hybrid_model
    keys = yaml.safe_load(write_recipe(tmp_path / "recipe.yaml", model, tokens_per_batch=300).read_text())
    run, data = set_up(None, {**keys, "output_dir": str(tmp_path / "run"), "eval_strategy": "no", "use_cpu": True})
    assert data.train.lengths.opening_tokens > 0
    assert (data.step_plan.opening > 0) == shares
    collator = build_trainer(run, sft_config(run), data).data_collator
    for step in data.step_plan.split(range(40)):
        for groups, batch in zip(step, collator(step)[MICRO_BATCHES], strict=True):
            assert batch["stats"]["tokens"] == data.step_plan.tokens_of(groups) <= 300
    (*_, shared) = _batches(run.recipe, SimpleNamespace(lengths=data.train.lengths, is_good=np.ones(1)))
    assert shared.way == "packed, prefixes shared"
    assert shared.filled == data.step_plan.packing_stats().filled


@pytest.fixture
def mixed(encoded):
    """In float64: the largest losses are near 20, where float32 alone is 1e-5 off after some layers."""
    model = qwen2_vl().double()
    use_packed_attention(model)
    take_packed_batches(model)
    return model.eval(), encoded


def three_steps(start, data, processor, folder, share, budget):
    """Losses and weights of three packed steps of six rows."""
    from fixtures.trainers import make_trainer

    model = copy.deepcopy(start)
    use_packed_attention(model)
    take_packed_batches(model)
    trainer = make_trainer(model, data.rows, processor, folder, train_rows=len(data.rows), max_steps=3)
    plan = StepPlan(data.lengths, GlobalBatch(6), budget, 1, seed=0, share_prefixes=share)
    trainer.sampler = StepSampler(plan, 0)
    rows = Collator(data.rows, Encoder(processor))
    trainer.data_collator = PackedCollator(rows, Positions(model.config), share_prefixes=share)
    trainer._train_batch_size = trainer.args.gradient_accumulation_steps = 1
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("family", FAMILIES)
def test_three_optimizer_steps_packed_and_shared(family, tiny_processor, tmp_path):
    """Each row of the data has a partner on the same chart, so that sharing changes no step's rows."""
    start = qwen2_vl() if family == "qwen2_vl" else newer(family)
    everything = scan(open_rows(str(tiny.DATA_DIR), "val"), Encoder(tiny_processor))
    pairs = [
        index for index in range(20) if (everything.lengths.prefix == everything.lengths.prefix[index]).sum() == 2
    ][:6]
    data = scan(everything.rows.select(pairs), Encoder(tiny_processor))
    results = [
        three_steps(start, data, tiny_processor, tmp_path / str(number), share, budget)
        for number, (share, budget) in enumerate([(False, 200), (False, 100_000), (True, 100_000)])
    ]
    for losses, weights in results[1:]:
        assert losses == pytest.approx(results[0][0], abs=1e-5)
        torch.testing.assert_close(weights, results[0][1], rtol=0, atol=1e-5)


def test_a_step_of_the_collator_counts_its_work_once(tiny_processor):
    data = scan(open_rows(str(tiny.DATA_DIR), "val"), Encoder(tiny_processor))
    collator = PackedCollator(Collator(data.rows, Encoder(tiny_processor)), Positions(qwen2_vl().config))
    (step,) = next(iter(StepPlan(data.lengths, GlobalBatch(8), 10_000, 1, 0, share_prefixes=True).steps(0)))
    (batch,) = collator(step)[MICRO_BATCHES]
    groups = step[0]
    assert batch["stats"]["rows"] == 8
    assert batch["stats"]["images"] == len(groups) < 8
    assert batch["stats"]["tokens"] == batch["input_ids"].shape[1] == sum(data.lengths.of(group)[0] for group in groups)
    assert batch["stats"]["target_tokens"] == sum(
        int(data.lengths.target_tokens[row]) for group in groups for row in group
    )


@pytest.mark.parametrize("share", [False, True])
def test_an_image_is_decoded_once_in_a_micro_batch(share, tiny_processor, monkeypatch):
    data = scan(open_rows(str(tiny.DATA_DIR), "val"), Encoder(tiny_processor))
    pair = [index for index in range(20) if (data.lengths.prefix == data.lengths.prefix[index]).sum() == 2][:4]
    together = np.argsort(data.lengths.prefix[pair], kind="stable")
    rows = [pair[place] for place in together]
    groups = [rows[:2], rows[2:]] if share else [[row] for row in rows]
    decoded = []
    monkeypatch.setattr(ImageFile, "decode", lambda file, decode=ImageFile.decode: decoded.append(file) or decode(file))
    collator = PackedCollator(Collator(data.rows, Encoder(tiny_processor)), Positions(qwen2_vl().config))
    (batch,) = collator([groups])[MICRO_BATCHES]
    assert batch["stats"]["images"] == len(decoded) == len({data.lengths.prefix[row] for row in rows}) == 2


KEYS = {
    "max_steps": 3,
    "max_train_samples": 48,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": "false",
    "logging_steps": 1,
    "report_to": "none",
}
ARGUMENTS = ["scripts/sft.py"]
ARGUMENTS += [word for key, value in KEYS.items() for word in (f"--{key}", str(value))]
PACKING = ["--packing", "true", "--tokens_per_batch", "500"]


WAYS = {
    "padded": [],
    "packed": PACKING,
    "shared": [*PACKING, "--share_prefixes", "true"],
    "so many tokens a step": [*PACKING, "--share_prefixes", "true", "--global_batch_tokens", "900"],
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Losses of one process that trains in one of `WAYS`."""
    folder = tmp_path_factory.mktemp("single")

    @functools.cache
    def train(way):
        recipe = folder / f"{way}.yaml"
        written = yaml.safe_load(Path("recipes/quickstart.yaml").read_text())
        if "--global_batch_tokens" in WAYS[way]:
            del written["global_batch_size"]
        recipe.write_text(yaml.safe_dump(written))
        arguments = [*ARGUMENTS, "--recipe", recipe, *WAYS[way], "--output_dir", folder / way]
        done = run_process(*arguments)
        assert done.returncode == 0, done.stderr
        return losses_of(folder / way), arguments

    return train


def test_packed_training_is_padded_training(one_process):
    assert one_process("packed")[0] == pytest.approx(one_process("padded")[0], abs=1e-5)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("cpu", "shared"),
        pytest.param("zero3", "shared", marks=pytest.mark.long),
        pytest.param("cpu", "so many tokens a step", marks=pytest.mark.long),
        pytest.param("fsdp2", "packed", marks=pytest.mark.long),
    ],
)
def test_two_processes_give_the_losses_of_one(config, name, one_process, tmp_path):
    losses, arguments = one_process(name)
    done = launch(config, *arguments[:-1], tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "run") == pytest.approx(losses, abs=1e-5)
