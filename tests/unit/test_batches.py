import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fixtures.messages import conversation_row
from qwen_vl_sft.batching.collator import NO_ROW, Collator, pad
from qwen_vl_sft.batching.sampler import EpochSampler, filled_items
from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.scan import scan
from qwen_vl_sft.errors import BadRow, UserError

BAD = conversation_row(answer="")
LONG = conversation_row(question="<image>" + "color " * 200)


@pytest.fixture
def encoder(tiny_processor):
    return Encoder(tiny_processor, max_length=200)


@pytest.fixture
def mixed(messages_folder):
    text_only = conversation_row("Say yes.", "yes", ())
    two = conversation_row("<image> or <image>?", "blue it is", ("images/red.png", "images/blue.png"))
    return open_rows(str(messages_folder([conversation_row(), text_only, two])), "train")


def test_padding_right_and_left(mixed, encoder):
    encoded = [mixed.encode({"row": index}, encoder) for index in range(3)]
    lengths = [len(row.input_ids) for row in encoded]
    for side in ("right", "left"):
        batch = pad(encoded, encoder.pad_token_id, side)
        assert batch["input_ids"].shape == batch["labels"].shape == (3, max(lengths))
        assert batch["attention_mask"].sum(1).tolist() == lengths
        for index, row in enumerate(encoded):
            there = batch["attention_mask"][index].bool()
            assert torch.equal(batch["input_ids"][index][there], row.input_ids)
            assert torch.equal(batch["labels"][index][there], row.labels)
            assert (batch["labels"][index][~there] == -100).all()
            assert (batch["input_ids"][index][~there] == encoder.pad_token_id).all()
        assert len(batch["image_grid_thw"]) == 3
        assert len(batch["pixel_values"]) == int(batch["image_grid_thw"].prod(-1).sum())
    assert "pixel_values" not in pad([encoded[1]], encoder.pad_token_id)


def test_empty_places_hold_nothing_to_learn(mixed, encoder):
    collator = Collator(mixed, encoder, filler=0)
    assert len(collator([{"row": 0}, {"row": NO_ROW}])["input_ids"]) == 1
    empty = collator([{"row": NO_ROW}, {"row": NO_ROW}])
    assert (empty["labels"] == -100).all()
    assert "pixel_values" in empty
    assert set(empty["stats"].values()) == {0}


def test_work_is_counted_without_padding(mixed, encoder):
    batch = Collator(mixed, encoder)([{"row": 0}, {"row": 1}, {"row": 2}])
    work = batch["stats"]
    assert work["tokens"] == int(batch["attention_mask"].sum())
    assert work["target_tokens"] == int((batch["labels"] != -100).sum())
    assert (work["images"], work["patches"], work["rows"]) == (3, len(batch["pixel_values"]), 3)


def test_a_row_that_turns_bad_later_is_skipped_and_counted_or_refused(mixed, encoder, messages_folder):
    (mixed.folder / "images/blue.png").write_bytes(b"gone bad")
    with pytest.raises(BadRow, match=r"row 2 image .*blue\.png cannot be read"):
        Collator(mixed, encoder)([{"row": 0}, {"row": 2}])
    collator = Collator(mixed, encoder, skip_bad_rows=True)
    one, none = collator([{"row": 0}, {"row": 2}]), collator([{"row": 2}, {"row": NO_ROW}])
    assert len(one["input_ids"]) == 1
    assert (none["labels"] == -100).all()
    assert (one["stats"]["skipped"], none["stats"]["skipped"]) == (1, 1)
    # The row that stands in for a batch without any may be the one that has turned bad.
    collator = Collator(mixed, encoder, skip_bad_rows=True, filler=2)
    for _ in range(2):
        batch = collator([{"row": 2}])
        assert (batch["labels"] == -100).all()
        assert (batch["row_ids"], batch["stats"]["rows"], batch["stats"]["skipped"]) == ([], 0, 1)
    for color in ("red", "blue"):
        (mixed.folder / f"images/{color}.png").write_bytes(b"gone bad")
    with pytest.raises(BadRow, match="its rows can be read no longer"):
        Collator(mixed.select([0, 2]), encoder, skip_bad_rows=True)([{"row": 0}])


def test_a_bad_row_in_a_worker_keeps_its_one_message(mixed, encoder):
    from torch.utils.data import DataLoader

    from qwen_vl_sft.errors import format_error

    (mixed.folder / "images/red.png").write_bytes(b"gone bad")
    loader = DataLoader([{"row": 0}], batch_size=1, collate_fn=Collator(mixed, encoder), num_workers=1)
    with pytest.raises(BadRow) as caught:
        next(iter(loader))
    message = format_error(caught.value)
    assert message.startswith(f"error: {mixed.name}, row 0 image ")
    assert "\n" not in message


def test_scan_measures_what_encoding_gives(mixed, encoder):
    found = scan(mixed, encoder)
    for index in range(3):
        row = mixed.encode({"row": index}, encoder)
        assert found.lengths.tokens[index] == len(row.input_ids)
        assert found.lengths.target_tokens[index] == int((row.labels != -100).sum())
        assert found.lengths.images[index] == len(row.image_grid_thw)
    assert found.filler == 0  # the cheapest row with an image
    assert found.summary()["rows"] == 3


def test_scan_names_bad_rows(messages_folder, encoder):
    rows = open_rows(str(messages_folder([conversation_row(), *[BAD] * 7])), "train")
    with pytest.raises(UserError) as caught:
        scan(rows, encoder)
    lines = str(caught.value).splitlines()
    assert lines[0] == "7 of 8 rows cannot be used; fix them, or set bad_rows: skip to leave them out:"
    assert lines[1].endswith("data [train], row 1 has an empty answer")
    assert lines[-1].strip() == "and 2 more"


def test_scan_names_overlong_rows(messages_folder, encoder):
    rows = open_rows(str(messages_folder([conversation_row(), LONG])), "train")
    with pytest.raises(UserError, match=r"1 of 2 rows are too long; raise max_length, .*set overlong: drop"):
        scan(rows, encoder, skip_bad_rows=True)


def test_scan_leaves_out_and_counts(messages_folder, encoder):
    rows = open_rows(str(messages_folder([BAD, conversation_row(answer="blue"), LONG, conversation_row()])), "train")
    found = scan(rows, encoder, skip_bad_rows=True, drop_overlong=True, num_proc=2)
    assert list(found.rows.dataset["row_id"]) == [1, 3]
    summary = found.summary()
    assert (summary["skipped_bad_rows"], summary["dropped_overlong_rows"], summary["rows"]) == (1, 1, 2)


def test_scan_refuses_when_nothing_is_left(messages_folder, encoder):
    rows = open_rows(str(messages_folder([BAD])), "train")
    with pytest.raises(UserError, match=r"none of its 1 rows can be used; the first: .* row 0 has an empty answer"):
        scan(rows, encoder, skip_bad_rows=True)


def test_scan_sees_a_file_that_changed(messages_folder, encoder):
    folder = messages_folder([conversation_row()])
    rows = open_rows(str(folder), "train")
    scan(rows, encoder)
    (folder / "images/red.png").unlink()
    with pytest.raises(UserError, match=r"red\.png does not exist"):
        scan(open_rows(str(folder), "train"), encoder)


@given(
    rows=st.integers(1, 50), batch=st.integers(1, 16), processes=st.sampled_from([1, 2, 3, 8]), epoch=st.integers(0, 3)
)
def test_an_epoch_visits_each_row_once_on_any_number_of_processes(rows, batch, processes, epoch):
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    total = math.ceil(rows / (batch * processes)) * batch * processes
    orders = []
    for rank in range(processes):
        sampler = EpochSampler(rows, total, seed=7)
        sampler.set_epoch(epoch)
        shard = BatchSamplerShard(BatchSampler(sampler, batch, drop_last=False), processes, rank)
        orders.append(list(shard))
    assert len({len(order) for order in orders}) == 1
    visited = [place for order in orders for places_of_batch in order for place in places_of_batch]
    assert sorted(place for place in visited if place < rows) == list(range(rows))
    assert len(visited) == total


def test_the_order_changes_with_the_epoch_and_the_seed():
    def order(seed, epoch):
        sampler = EpochSampler(20, 24, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    assert order(1, 0)[20:] == [20, 21, 22, 23]


def test_indices_are_filled_up():
    assert filled_items(5, 4)["row"] == [0, 1, 2, 3, 4, NO_ROW, NO_ROW, NO_ROW]
    assert len(filled_items(8, 4)) == 8
