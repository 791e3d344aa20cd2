"""Statistics clustered by image: narrower or wider than those of rows where they must be, and the same in any order."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vl_sft.evaluation.clusters import compare_clustered, estimate_clustered, flip_test, number_clusters
from qwen_vl_sft.evaluation.metrics import Comparison, Estimate, estimate
from qwen_vl_sft.evaluation.scoring import Question, format_summary, score_row, summarise


def test_rows_that_share_an_image_directly_or_through_others_are_one_cluster():
    images = [("a",), ("b",), ("a", "c"), (), ("c", "d"), (), ("b",), ("e",)]
    assert number_clusters(images) == [0, 1, 0, 2, 0, 3, 1, 4]
    assert number_clusters([]) == []


def test_an_interval_of_clusters_that_agree_is_that_of_one_row_each():
    generator = np.random.default_rng(3)
    of_chart = generator.integers(0, 2, 200).astype(float)
    repeated = np.repeat(of_chart, 4)
    found = estimate_clustered(repeated, np.repeat(np.arange(200), 4))
    alone, rows = estimate(of_chart), estimate(repeated)
    assert (found.mean, found.rows) == (alone.mean, 800)
    assert found.high - found.low == pytest.approx(alone.high - alone.low, rel=0.05)
    assert found.high - found.low > 1.8 * (rows.high - rows.low)


def test_an_interval_of_single_rows_is_that_of_rows():
    scores = np.random.default_rng(4).integers(0, 2, 300).astype(float)
    found, rows = estimate_clustered(scores, range(300)), estimate(scores)
    assert (found.low, found.high) == pytest.approx((rows.low, rows.high), abs=0.01)
    assert math.isnan(estimate_clustered([], []).mean)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 5)), min_size=1, max_size=20), st.randoms())
def test_order_does_not_matter(rows, rng):
    shuffled = rng.sample(rows, len(rows))
    one, other = (estimate_clustered(*zip(*these, strict=True), resamples=200) for these in (rows, shuffled))
    assert one == other
    assert one.low - 1e-9 <= one.mean <= one.high + 1e-9
    first, second = [score for score, _ in rows], [1.0 - score for score, _ in rows]
    clusters = [cluster for _, cluster in rows]
    assert 0 < compare_clustered(first, second, clusters).p_value <= 1


def test_wins_that_come_by_the_chart_prove_less():
    first, second = [0.0] * 12, [1.0] * 12
    alone, together = (compare_clustered(first, second, clusters) for clusters in (range(12), [0] * 6 + [1] * 6))
    assert (alone.first_wins, alone.second_wins) == (0, 12)
    assert alone.p_value == pytest.approx(2 / 2**12, rel=0.5)
    assert together.p_value == pytest.approx(0.5, abs=0.02)
    assert flip_test(np.zeros(3)) == 1.0


def test_one_chart_tells_nothing_of_others():
    """Resampling one cluster gives it again and again: an interval without width, which would be certainty."""
    scores, clusters = [1.0, 1.0, 0.0, 1.0], [3] * 4
    assert estimate_clustered(scores, clusters) == Estimate(0.75, 0.0, 1.0, 4)
    found = compare_clustered([0.0] * 4, scores, clusters)
    assert found == Comparison(4, 0, 3, Estimate(0.75, -1.0, 1.0, 4), 1.0)
    two = estimate_clustered(scores, [0, 0, 1, 1])
    assert (two.low, two.high) == (0.5, 1.0)
    rows = [score_row(Question(n, "?", ["1"], "human" if n else "machine"), {"a": "1", "b": "2"}) for n in range(4)]
    summary = summarise(rows, ["a", "b"], dict.fromkeys(range(4), ("chart",)))
    lines = format_summary(summary).splitlines()
    assert sum("100.0 [0.0, 100.0]" in line for line in lines) == 1
    assert sum("-100.0 [-100.0, +100.0]" in line for line in lines) == 3
    assert max(map(len, lines)) <= 80


def test_a_summary_has_both_where_rows_share_images():
    rows = [score_row(Question(n, "?", ["1"], None), {"a": "1" if n % 3 else "2", "b": "1"}) for n in range(12)]
    shared = summarise(rows, ["a", "b"], {n: (n // 2,) for n in range(12)})
    plain = summarise(rows, ["a", "b"])
    assert "by_image" not in plain
    assert "by_image" not in summarise(rows, ["a", "b"], {n: (n,) for n in range(12)})
    assert {name: value for name, value in shared.items() if name != "by_image"} == plain
    clustered = shared["by_image"]
    assert clustered["clusters"] == 6
    assert clustered["scores"]["a"]["all"]["relaxed_accuracy"]["mean"] == pytest.approx(8 / 12)
    assert clustered["comparisons"][0]["second_wins"] == 4
    lines = format_summary(shared).splitlines()
    assert "relaxed_accuracy clustered by image (6 clusters)" in lines
    assert max(map(len, lines)) <= 80
