"""The published metric's edge cases, the variants beside it, intervals, and the paired comparison."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_vl_sft.evaluation.metrics import (
    METRICS,
    anls,
    compare,
    estimate,
    exact_match,
    normalised_relaxed_accuracy,
    relaxed_accuracy,
    score,
    sign_test,
)
from qwen_vl_sft.evaluation.scoring import with_current_names

# target, prediction, published metric, the normalised one, exact match
EDGE_CASES = [
    ("100", "95", 1, 1, 0),
    ("95", "100", 0, 0, 0),
    ("0.39", "39%", 1, 1, 0),
    ("0.39", "39", 0, 0, 0),
    ("62", "62%", 0, 0, 0),
    ("977633", "977,633", 0, 1, 0),
    ("0", "0.0", 0, 1, 0),
    ("Yes", "yes", 1, 1, 0),
    ("Yes", "Yes.", 0, 1, 0),
    ("3", "three", 0, 0, 0),
    ("14", "14 million", 0, 0, 0),
    ("2014", "1950", 1, 0, 0),
    ("[63, 26]", "[63, 26]", 1, 1, 1),
    ("[63, 26]", "63", 0, 0, 0),
    # beyond the published table
    ("100", " 105\n", 1, 1, 0),
    ("100", "94.9", 0, 0, 0),
    ("-100", "-95", 1, 1, 0),
    ("-100", "95", 0, 0, 0),
    ("20%", "0.21", 1, 1, 0),
    ("20%", "20%", 1, 1, 1),
    ("2014", "2014", 1, 1, 1),
    ("2014", "2014.", 1, 1, 0),
    ("2014", "the year 2014", 0, 0, 0),
    ("3500", "3,500", 0, 1, 0),
    ("1,234,567.5", "1234567.5", 0, 1, 0),
    ("12,34", "1234", 0, 0, 0),
    ("0", "0", 1, 1, 1),
    ("0", "0.01", 0, 0, 0),
    ("0%", "0", 0, 1, 0),
    ("Yes", "", 0, 0, 0),
    ("5", "nan", 0, 0, 0),
    ("5", "inf", 0, 0, 0),
    ("5", "%", 0, 0, 0),
    ("Dark blue", "dark blue", 1, 1, 0),
    ("U.S.", "U.S.", 1, 1, 1),
]


@pytest.mark.parametrize(("target", "prediction", "published", "normalised", "exact"), EDGE_CASES)
def test_edge_cases(target, prediction, published, normalised, exact):
    assert relaxed_accuracy(prediction, target) == published
    assert normalised_relaxed_accuracy(prediction, target) == normalised
    assert exact_match(prediction, target) == exact


def test_the_best_of_several_accepted_targets_counts():
    assert score("63", ["63", "26"])["relaxed_accuracy"] == 1
    assert score("26", ["63", "26"])["exact_match"] == 1
    assert score("63", ["[63, 26]"])["relaxed_accuracy"] == 0
    assert set(score("a", ["b"])) == set(METRICS)


def test_anls_is_the_similarity_of_texts():
    assert anls("The tallest bar is red.", "the tallest bar is RED.") == 1
    assert anls("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert anls("abcd", "abxy") == 0  # half of the letters differ
    assert anls("", "x") == 0
    assert anls("", "") == 1


def plain_distance(first, second):
    table = [[max(i, j) if not (i and j) else 0 for j in range(len(second) + 1)] for i in range(len(first) + 1)]
    for i, a in enumerate(first, 1):
        for j, b in enumerate(second, 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a != b))
    return table[-1][-1]


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_edit_distance_is_levenshtein(first, second):
    longest = max(len(first), len(second)) or 1
    share = plain_distance(first, second) / longest
    assert anls(first, second) == (1 - share if share < 0.5 else 0)


@given(st.text(max_size=20), st.text(min_size=1, max_size=20))
def test_any_text_can_be_scored(prediction, target):
    assert all(0 <= value <= 1 for value in score(prediction, [target]).values())


def test_interval_of_a_share_is_close_to_the_normal_one():
    found = estimate([1.0] * 700 + [0.0] * 300)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 1000)
    assert (found.mean, found.rows) == (0.7, 1000)
    assert found.low == pytest.approx(0.7 - half, abs=0.002)
    assert found.high == pytest.approx(0.7 + half, abs=0.002)


def test_interval_of_many_distinct_scores_is_close_to_the_normal_one():
    scores = [random.Random(1).random()] + [random.Random(seed).random() for seed in range(2000)]
    found = estimate(scores)
    half = 1.96 * math.sqrt(1 / 12 / len(scores))
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    assert found.low < found.mean < found.high


def test_an_estimate_without_rows_says_so():
    assert estimate([]).rows == 0


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=30), st.randoms())
def test_order_of_rows_changes_nothing(scores, rng):
    shuffled = rng.sample(scores, len(scores))
    assert estimate(scores, resamples=50) == estimate(shuffled, resamples=50)


def test_comparison_of_two_arms():
    found = compare([1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 1, 0])
    assert (found.first_wins, found.second_wins, found.rows) == (1, 3, 6)
    assert found.difference.mean == pytest.approx(2 / 6)
    assert found.p_value == pytest.approx(0.625)  # 2 * (1 + 4) / 16


def test_sign_test_is_exact():
    assert sign_test(0, 0) == 1
    assert sign_test(5, 5) == 1
    assert sign_test(0, 10) == pytest.approx(2 / 1024)
    assert sign_test(10, 0) == sign_test(0, 10)
    assert sign_test(2, 8) == pytest.approx(0.109375)
    # For many rows it nears the normal approximation with continuity correction.
    assert sign_test(5000, 5200) == pytest.approx(math.erfc(199 / math.sqrt(10200) / math.sqrt(2)), rel=1e-3)
    assert 0 < sign_test(0, 1000) < 1e-300
    assert sign_test(0, 20_000) == 0


def test_an_evaluation_of_an_earlier_version_is_read_by_todays_names():
    former, current = "strict_relaxed_accuracy", "normalised_relaxed_accuracy"
    stored = {"rows": 1, "scores": {"tuned": {"all": {former: {"mean": 1.0}}}}, "comparisons": [{"metric": former}]}
    read = with_current_names(stored)
    assert read == {
        "rows": 1,
        "scores": {"tuned": {"all": {current: {"mean": 1.0}}}},
        "comparisons": [{"metric": current}],
    }
    assert with_current_names(read) == read
    assert former in stored["scores"]["tuned"]["all"]


def test_the_normalised_accuracy_can_be_above_and_below_the_published_one():
    above, below = ("977,633", "977633"), ("1950", "2014")
    assert normalised_relaxed_accuracy(*above) > relaxed_accuracy(*above)
    assert normalised_relaxed_accuracy(*below) < relaxed_accuracy(*below)
