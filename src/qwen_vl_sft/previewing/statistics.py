"""Numbers of many rows: how lengths spread, which rows repeat others, what padding and pixel limits cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qwen_vl_sft.batching.global_batch import GlobalBatch
from qwen_vl_sft.batching.packing import StepPlan, epoch_order
from qwen_vl_sft.data.row_lengths import RowLengths
from qwen_vl_sft.families.base import resized_within

_BINS = 30
# A histogram ends where few rows are longer: its last bar counts all of these.
_TAIL = 0.995
_MOST_LIMITS = 8
# Pairs of rows and places of images that are told of each finding.
_TOLD = 5
# Tokens of an image that limits are tried at.
_LADDER = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)


@dataclass(frozen=True)
class Spread:
    """How values spread: some of their quantiles, and bars of equal width from `start` on.

    The last bar also counts all larger values where `open_end`.
    """

    count: int
    least: int
    median: float
    mean: float
    most_of_95: float
    most: int
    total: int
    start: int
    width: int
    bars: list[int]
    open_end: bool


def spread(values: np.ndarray) -> Spread | None:
    """Return how whole numbers spread, None for none at all."""
    if not len(values):
        return None
    least, most = int(values.min()), int(values.max())
    upper = int(np.quantile(values, _TAIL, method="higher"))
    # Few values far out would leave one bar for all others.
    end = upper if most - least > 2 * (upper - least) and upper > least else most
    width = _round_width((end - least + 1) / _BINS)
    start = least // width * width
    count = (end - start) // width + 1
    places = np.minimum((values - start) // width, count - 1)
    return Spread(
        count=len(values),
        least=least,
        median=float(np.median(values)),
        mean=float(values.mean()),
        most_of_95=float(np.quantile(values, 0.95, method="higher")),
        most=most,
        total=int(values.sum()),
        start=start,
        width=width,
        bars=np.bincount(places, minlength=count).tolist(),
        open_end=most >= start + count * width,
    )


def _round_width(width: float) -> int:
    """Return the next of 1, 2, 5, 10, 20, 50, ..."""
    if width <= 1:
        return 1
    power = 10 ** math.floor(math.log10(width))
    return next(int(factor * power) for factor in (1, 2, 5, 10) if factor * power >= width)


@dataclass(frozen=True)
class Repeats:
    """Rows that ask what an earlier row asks of the same images.

    Attributes:
        rows: how many.
        same: those of them that also have the answer of an earlier one.
        contradicted: questions with more than one answer.
        pairs: row ids of some such rows, with that of the first that asks the same, and whether they answer the same.
    """

    rows: int
    same: int
    contradicted: int
    pairs: list[tuple[int, int, bool]]


def find_repeats(questions: np.ndarray, answers: np.ndarray, row_ids: np.ndarray) -> Repeats:
    """Find rows with equal digests of their questions; an empty one is equal to none."""
    asked = (np.char.str_len(questions) > 0).nonzero()[0]
    _, first, number = np.unique(questions[asked], return_index=True, return_inverse=True)
    later = first[number] != np.arange(len(asked))
    answer = np.unique(answers[asked], return_inverse=True)[1]
    both = np.unique(np.stack([number, answer]), axis=1)
    told, known = len(first), both.shape[1]
    contradicted = int((np.bincount(both[0], minlength=told) > 1).sum()) if told else 0
    pairs = []
    for place in later.nonzero()[0][:_TOLD]:
        original = first[number[place]]
        same = bool(answer[place] == answer[original])
        pairs.append((int(row_ids[asked[place]]), int(row_ids[asked[original]]), same))
    return Repeats(len(asked) - told, len(asked) - known, contradicted, pairs)


@dataclass(frozen=True)
class Overlap:
    """Evaluation rows that training sees.

    Attributes:
        rows: those that ask what a training row asks of the same images.
        same: those of them that also have the answer of a training row.
        pairs: row ids of some, with that of a training row that asks the same.
        shown: evaluation rows with other questions on images of training rows.
    """

    rows: int
    same: int
    pairs: list[tuple[int, int]]
    shown: int


@dataclass(frozen=True)
class Identities:
    """What tells rows apart: digests of question and answer, and ids, [R] each; hashes of images, and their row's place.

    Digests and hashes are arrays of bytes.
    """

    questions: np.ndarray
    answers: np.ndarray
    row_ids: np.ndarray
    images: np.ndarray
    image_rows: np.ndarray


def find_overlap(train: Identities, evaluation: Identities) -> Overlap:
    """Find evaluation rows among training rows, by image content and text."""
    seen = np.isin(evaluation.questions, train.questions) & (np.char.str_len(evaluation.questions) > 0)
    answered = np.char.add(evaluation.questions, evaluation.answers)
    known = np.char.add(train.questions, train.answers)
    pairs = []
    for place in seen.nonzero()[0][:_TOLD]:
        original = int((train.questions == evaluation.questions[place]).argmax())
        pairs.append((int(evaluation.row_ids[place]), int(train.row_ids[original])))
    shown = np.zeros(len(seen), dtype=bool)
    shown[evaluation.image_rows[np.isin(evaluation.images, train.images)]] = True
    return Overlap(int(seen.sum()), int((seen & np.isin(answered, known)).sum()), pairs, int((shown & ~seen).sum()))


@dataclass(frozen=True)
class Batches:
    """A way to make batches of an epoch's rows.

    Attributes:
        way: in words.
        computed: tokens that the model computes.
        padding: the share of these that are padding.
        filled: the share of `tokens_per_batch` that micro-batches hold, None for padded ones.
    """

    way: str
    computed: int
    padding: float
    filled: float | None = None


def ways_to_batch(
    lengths: RowLengths, rows_of_a_batch: int, batch: GlobalBatch, tokens_per_batch: int, seed: int
) -> list[Batches]:
    """Compare padded batches with packed ones, on one process; rows that fit no micro-batch are left out of the latter."""
    useful = int(lengths.tokens.sum())
    padded = padded_tokens(lengths.tokens, rows_of_a_batch, seed)
    found = [Batches(f"padded, {rows_of_a_batch} rows a batch", padded, 1 - useful / padded)]
    fitting = lengths.tokens <= tokens_per_batch
    if not fitting.any():
        return found
    kept = lengths.select(fitting)
    total = int(kept.tokens.sum())
    for share, way in ((False, f"packed into {tokens_per_batch:,} tokens"), (True, "packed, prefixes shared")):
        if share and not _shares(kept):
            continue
        stats = StepPlan(kept, batch, tokens_per_batch, 1, seed, share).packing_stats()
        found.append(Batches(way, round(total * stats.computed), 0.0, stats.filled))
    return found


def padded_tokens(tokens: np.ndarray, rows_of_a_batch: int, seed: int) -> int:
    """Count the tokens of an epoch's batches, each padded to its longest row."""
    ordered = tokens[np.asarray(epoch_order(len(tokens), seed, 0))]
    starts = np.arange(0, len(ordered), rows_of_a_batch)
    sizes = np.minimum(len(ordered) - starts, rows_of_a_batch)
    return int((np.maximum.reduceat(ordered, starts) * sizes).sum())


def _shares(lengths: RowLengths) -> bool:
    prefixes = lengths.prefix[lengths.prefix >= 0]
    return len(np.unique(prefixes)) < len(prefixes)


@dataclass(frozen=True)
class PixelLimit:
    """What a limit of pixels comes to.

    Attributes:
        pixels: the value of `max_pixels`.
        image_tokens: of the largest image that it allows.
        now: it is that of the recipe.
        tokens: of all rows, texts included.
        change: of `tokens`, as a share of those now.
        longest: tokens of the longest row.
        too_long: rows above the limit of tokens.
        reduced: the share of images that are made smaller.
        scale: of the sides of those, on average; 1 for none.
    """

    pixels: int
    image_tokens: int
    now: bool
    tokens: int
    change: float
    longest: int
    too_long: int
    reduced: float
    scale: float


@dataclass(frozen=True)
class ImageSizes:
    """Images of rows as they are: width and height [I, 2] and the place of their row [I]; text tokens of each row [R]."""

    sides: np.ndarray
    rows: np.ndarray
    text_tokens: np.ndarray


def pixel_limits(images: ImageSizes, factor: int, least: int, most: int, most_tokens: int | None) -> list[PixelLimit]:
    """Return what some limits cost and save, that of now among them; computed from the sizes alone.

    Args:
        images: of all rows.
        factor: pixels along a side of a token.
        least: pixels that smaller images are enlarged to.
        most: the limit of now.
        most_tokens: the limit of tokens of a row, None for none.
    """
    if not len(images.sides):
        return []
    sizes, number, count = np.unique(images.sides, axis=0, return_inverse=True, return_counts=True)
    number = number.reshape(-1)

    def resized(limit: int) -> np.ndarray:
        return np.array([resized_within(int(width), int(height), factor, least, limit) for width, height in sizes])

    native = resized(int(sizes.prod(axis=1).max()) + 4 * factor * int(sizes.max()) + least)
    own = native.prod(axis=1) // factor**2
    tried = [most, *(tokens * factor**2 for tokens in _rungs(own, count))]
    found, tokens_now = [], 0
    for limit in dict.fromkeys(value for value in tried if value >= least):
        shown = resized(limit)
        of_images = shown.prod(axis=1) // factor**2
        of_rows = np.bincount(images.rows, of_images[number], minlength=len(images.text_tokens)).astype(np.int64)
        tokens = images.text_tokens + of_rows
        total = int(tokens.sum())
        tokens_now = tokens_now or total
        smaller = of_images < own
        scales = np.sqrt(shown[smaller].prod(axis=1) / native[smaller].prod(axis=1))
        weights = count[smaller]
        found.append(
            PixelLimit(
                pixels=limit,
                image_tokens=limit // factor**2,
                now=limit == most,
                tokens=total,
                change=total / tokens_now - 1,
                longest=int(tokens.max()),
                too_long=int((tokens > most_tokens).sum()) if most_tokens else 0,
                reduced=float(weights.sum() / count.sum()),
                scale=float(np.average(scales, weights=weights)) if weights.sum() else 1.0,
            )
        )
    return sorted(found, key=lambda limit: limit.pixels)


def _rungs(tokens: np.ndarray, count: np.ndarray) -> Sequence[int]:
    """Return the tokens of limits that change something: between the smaller images and the largest one."""
    low = float(np.quantile(np.repeat(tokens, np.minimum(count, 1000)), 0.25)) / 4
    rungs = [rung for rung in _LADDER if rung >= low]
    rungs = rungs[: sum(rung < tokens.max() for rung in rungs) + 1]
    step = max(1, math.ceil(len(rungs) / _MOST_LIMITS))
    return rungs[::-1][::step][::-1]


@dataclass(frozen=True)
class OddImages:
    """Images that may not be meant: what is odd, how many there are that show different things, and places of some."""

    what: str
    images: int
    places: list[int]


def odd_images(sides: np.ndarray, resized: np.ndarray, distinct: np.ndarray) -> list[OddImages]:
    """Find images that resizing changes much, and long narrow ones.

    Args:
        sides: width and height of each, [I, 2].
        resized: its width and height as the model sees it, [I, 2].
        distinct: the places of images that show something for the first time.
    """
    sides, resized = sides[distinct], resized[distinct]
    ratio = np.sqrt(resized.prod(axis=1) / np.maximum(sides.prod(axis=1), 1))
    kinds: dict[str, Callable[[], np.ndarray]] = {
        "reduced to less than half of width and height: small text may be lost": lambda: ratio < 0.5,
        "enlarged to more than twice width and height: there may be little to see": lambda: ratio > 2,
        "more than 10 times as long as wide": lambda: sides.max(axis=1) > 10 * sides.min(axis=1),
    }
    found = {what: np.sort(distinct[test()]) for what, test in kinds.items()}
    return [OddImages(what, len(places), places[:_TOLD].tolist()) for what, places in found.items() if len(places)]
