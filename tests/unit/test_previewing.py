"""Statistics of rows: how lengths spread, rows that repeat others, padding, pixel limits, odd images, and their charts."""

import re
from dataclasses import replace

import numpy as np
import pytest

from fixtures.row_lengths import sizes_of
from qwen_vl_sft.batching.global_batch import GlobalBatch
from qwen_vl_sft.batching.packing import epoch_order
from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.data.row_digests import row_digests
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.families.base import resized_within
from qwen_vl_sft.previewing.charts import histogram, stacked_bars
from qwen_vl_sft.previewing.options import check_page
from qwen_vl_sft.previewing.statistics import (
    Identities,
    ImageSizes,
    find_overlap,
    find_repeats,
    odd_images,
    padded_tokens,
    pixel_limits,
    spread,
    ways_to_batch,
)


def in_bytes(*texts):
    return np.array(texts, dtype=np.bytes_)


def test_how_values_spread():
    found = spread(np.array([3, 3, 4, 9, 20]))
    assert (found.least, found.median, found.mean, found.most, found.total) == (3, 4, 7.8, 20, 39)
    assert found.bars == [2, 1, 0, 0, 0, 0, 1, *[0] * 10, 1]
    assert (found.start, found.width, found.open_end) == (3, 1, False)
    assert spread(np.array([], dtype=np.int64)) is None
    same = spread(np.array([7, 7]))
    assert (same.bars, same.start, same.open_end) == ([2], 7, False)


def test_a_value_far_out_leaves_bars_for_the_others():
    values = np.append(np.arange(100, 500).repeat(3), 90_000)
    found = spread(values)
    assert found.open_end
    assert sum(found.bars) == 1201
    assert len(found.bars) > 15
    assert found.start + found.width * len(found.bars) < 600
    even = spread(np.arange(100, 90_000, 7))
    assert (even.open_end, sum(even.bars)) == (False, len(range(100, 90_000, 7)))


def test_rows_that_ask_again_are_found():
    questions = in_bytes("a", "b", "a", "", "", "b", "c", "a")
    answers = in_bytes("1", "2", "1", "1", "1", "3", "1", "1")
    found = find_repeats(questions, answers, np.arange(10, 18))
    assert (found.rows, found.same, found.contradicted) == (3, 2, 1)
    assert found.pairs == [(12, 10, True), (15, 11, False), (17, 10, True)]
    nothing = find_repeats(in_bytes("a", "b", ""), in_bytes("1", "1", "1"), np.arange(3))
    assert (nothing.rows, nothing.same, nothing.contradicted, nothing.pairs) == (0, 0, 0, [])
    assert find_repeats(in_bytes(), in_bytes(), np.arange(0)).rows == 0


def identities(rows):
    """Rows as (question, answer, images)."""
    images = [(image, place) for place, (*_, shown) in enumerate(rows) for image in shown]
    return Identities(
        in_bytes(*(row[0] for row in rows)),
        in_bytes(*(row[1] for row in rows)),
        np.arange(len(rows)) + 100,
        in_bytes(*(image for image, _ in images)),
        np.array([place for _, place in images], dtype=np.int64),
    )


def test_training_rows_in_the_evaluation_are_found():
    train = identities([("q1", "a", "x"), ("q2", "b", "xy"), ("", "c", ""), ("q1", "d", "x")])
    evaluation = identities([("q2", "b", "xy"), ("q1", "z", "x"), ("q3", "a", "zy"), ("", "c", ""), ("q4", "a", "z")])
    found = find_overlap(train, evaluation)
    assert (found.rows, found.same, found.shown) == (2, 1, 1)
    assert found.pairs == [(100, 101), (101, 100)]
    assert find_overlap(train, identities([("q5", "a", "z")])).rows == 0


def asked(text, answer="red", role="user", image=True):
    shown = [{"type": "image"}] if image else []
    return Conversation(
        [
            {"role": role, "content": [*shown, {"type": "text", "text": text}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        [],
    )


def test_digests_tell_questions_apart():
    question, answer = row_digests(asked("Which one?"), ["x"])
    assert row_digests(asked(" Which\n one? ", "blue"), ["x"])[0] == question
    assert row_digests(asked(" Which\n one? ", "blue"), ["x"])[1] != answer
    others = [(asked("Which two?"), ["x"]), (asked("Which one?"), ["y"]), (asked("Which one?", image=False), ["x"])]
    assert question not in {row_digests(*other)[0] for other in others}
    assert row_digests(asked("Which one?", role="system"), ["x"]) == ("", answer)


def test_padding_is_counted_batch_by_batch():
    tokens = np.array([10, 20, 30, 40, 50])
    order = [tokens[place] for place in epoch_order(5, 7, 0)]
    expected = 2 * max(order[:2]) + 2 * max(order[2:4]) + order[4]
    assert padded_tokens(tokens, 2, seed=7) == expected
    assert padded_tokens(tokens, 1, seed=7) == 150
    assert padded_tokens(tokens, 8, seed=7) == 250


def test_ways_to_batch_compute_less_one_after_another():
    lengths = sizes_of([100] * 6 + [900], prefix=[0, 0, 0, 1, 1, -1, -1], prefix_tokens=[80] * 5 + [0, 0])
    padded, packed, shared = ways_to_batch(lengths, 7, GlobalBatch(rows=7), 1000, seed=0)
    assert (padded.computed, padded.padding) == (6300, 1 - 1500 / 6300)
    assert (packed.computed, packed.padding, packed.filled) == (1500, 0, 0.75)
    assert shared.computed == 1500 - 3 * 80
    # The opening is in each of two micro-batches once, not once for each of four groups.
    assert ways_to_batch(replace(lengths, opening_tokens=10), 7, GlobalBatch(rows=7), 1000, 0)[2].computed == (
        shared.computed - 2 * 10
    )
    # A row that fits no micro-batch is left out, and nothing is shared where every prefix is another.
    ways = ways_to_batch(sizes_of([100, 5000], prefix=[0, 1]), 2, GlobalBatch(rows=2), 1000, seed=0)
    assert [way.computed for way in ways] == [10_000, 100]
    assert len(ways_to_batch(sizes_of([5000]), 2, GlobalBatch(rows=2), 1000, seed=0)) == 1


def test_pixel_limits_are_counted_from_sizes():
    sides = np.array([[280, 280], [560, 280], [280, 280], [56, 56]])
    images = ImageSizes(sides, np.array([0, 0, 1, 2]), np.array([10, 20, 30, 40]))
    found = pixel_limits(images, 28, 4 * 784, 784 * 150, most_tokens=250)
    now = next(limit for limit in found if limit.now)
    assert (now.pixels, now.image_tokens, now.change) == (784 * 150, 150, 0)
    assert [limit.pixels for limit in found] == sorted({limit.pixels for limit in found})
    for limit in found:
        tokens = [
            width * height // 784
            for width, height in (resized_within(*side, 28, 4 * 784, limit.pixels) for side in sides.tolist())
        ]
        rows = [10 + tokens[0] + tokens[1], 20 + tokens[2], 30 + tokens[3], 40]
        assert (limit.tokens, limit.longest) == (sum(rows), max(rows))
        assert limit.too_long == sum(row > 250 for row in rows)
        assert limit.change == pytest.approx(limit.tokens / now.tokens - 1)
        assert limit.reduced == sum(count < own for count, own in zip(tokens, [100, 200, 100, 4], strict=True)) / 4
    # The largest limit changes no image, the smallest all but the smallest image.
    assert (found[-1].reduced, found[-1].scale) == (0, 1)
    assert found[0].reduced == 0.75
    assert found[0].scale < found[1].scale < 1
    assert pixel_limits(ImageSizes(sides[:0], np.arange(0), np.array([5])), 28, 784, 7840, None) == []


def test_odd_images_are_told_once_each():
    sides = np.array([[100, 100], [4000, 4000], [4000, 4000], [10, 10], [2000, 100]])
    resized = np.array([[112, 112], [1008, 1008], [1008, 1008], [56, 56], [2016, 112]])
    found = odd_images(sides, resized, distinct=np.array([0, 1, 3, 4]))
    assert [(odd.images, odd.places) for odd in found] == [(1, [1]), (1, [3]), (1, [4])]
    assert [odd.what.split()[0] for odd in found] == ["reduced", "enlarged", "more"]
    assert odd_images(sides[:1], resized[:1], np.array([0])) == []


def test_bars_stand_for_the_rows():
    found = spread(np.append(np.arange(100, 500).repeat(3), 90_000))
    drawn = histogram(found, "tokens <b>", "tokens", ("max_length", 300))
    counts = [int(count.replace(",", "")) for count in re.findall(r"tokens: ([\d,]+)</title>", drawn)]
    assert sum(counts) == 1201
    assert drawn.count('class="limit"') == 2
    assert "<b>" not in drawn
    heights = [float(height) for height in re.findall(r'height="([\d.]+)"', drawn)]
    assert max(heights) == 100
    assert 'class="limit"' not in histogram(found, "tokens", "tokens", ("max_length", 70_000))
    bars = stacked_bars("way", "", [("all", 50.0, 50.0, "half"), ("none", 25.0, 0.0, "none")])
    assert re.findall(r'width="([\d.]+)"', bars) == ["50.00", "50.00", "25.00", "0.00"]


def test_no_other_file_is_overwritten(tmp_path):
    check_page(tmp_path / "new.html")
    mine = tmp_path / "mine.html"
    mine.write_text("<html>my own</html>")
    with pytest.raises(UserError, match="exists and is no page of a preview; name another file"):
        check_page(mine)
    mine.write_text('<meta name="generator" content="qwen_vl_sft preview">')
    check_page(mine)
    for path in (tmp_path, tmp_path / "not there/preview.html"):
        with pytest.raises(UserError, match="is no place for a file"):
            check_page(path)
