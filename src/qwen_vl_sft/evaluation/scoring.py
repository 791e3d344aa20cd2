"""Score answers: scored rows, the summary of all arms and splits, and its table for a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from qwen_vl_sft.atomic_write import atomic_write, writing_to
from qwen_vl_sft.config.settings import current_metric
from qwen_vl_sft.data.conversation import without_thought
from qwen_vl_sft.evaluation.box_metrics import BoxTarget
from qwen_vl_sft.evaluation.clusters import compare_clustered, estimate_clustered, number_clusters
from qwen_vl_sft.evaluation.metrics import (
    NOTES,
    Comparison,
    Estimate,
    compare,
    estimate,
    headline_of,
    measured_metrics,
    score,
)

ROWS_FILE = "rows.jsonl"
SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
ALL = "all"
# The column of ChartQA that tells its two halves apart: 0 and 1, or the names.
SPLIT_COLUMN = "human_or_machine"
HALVES = {"0": "human", "1": "machine"}
SPLITS_A_LINE = 3
NAME_WIDTH = 11


@dataclass(frozen=True)
class Question:
    """A row to answer: its accepted answers, the part of the data that it is also counted in, and its boxes."""

    row_id: int
    question: str
    answers: list[str]
    split: str | None
    boxes: tuple[BoxTarget, ...] = ()


def split_name(value: Any) -> str | None:
    """Return the part of the data named by a value of the split column; None if the row has none."""
    return None if value is None else HALVES.get(str(value), str(value))


def score_row(question: Question, predictions: Mapping[str, str]) -> dict[str, Any]:
    """Return a line of `rows.jsonl`: the row, and for each arm its answer and every metric of it.

    A thought is kept with its answer, and not scored.
    """
    scores = {arm: score(without_thought(text), question.answers, question.boxes) for arm, text in predictions.items()}
    return {
        "row_id": question.row_id,
        "question": question.question,
        "answers": question.answers,
        SPLIT_COLUMN: question.split,
        "arms": {arm: {"answer": text, **scores[arm]} for arm, text in predictions.items()},
    }


def summarise(
    rows: Sequence[Mapping[str, Any]], arms: Sequence[str], images: Mapping[int, Sequence[Hashable]] | None = None
) -> dict[str, Any]:
    """Return means and paired comparisons of scored rows, each of which holds all `arms`.

    Returns `scores[arm][split][metric]`, an `Estimate`, and `comparisons`, a list with every pair of arms for each split
    and metric. Splits are "all" and those the rows name. The order of the rows does not matter. A metric is measured over
    the rows that have it, and is not there in a split without such rows.

    `images` names the images of each row by its `row_id`. Where rows share some, `by_image` holds the same, clustered by
    image, and the number of `clusters`.
    """
    splits = _splits(rows)
    summary = {"rows": len(rows), **_statistics(splits, arms, lambda _: estimate, lambda _: compare)}
    if images is None:
        return summary
    numbers = number_clusters([images.get(row["row_id"], ()) for row in rows])
    if len(set(numbers)) == len(rows):
        return summary
    cluster_of = {row["row_id"]: number for row, number in zip(rows, numbers, strict=True)}

    def clusters(measured: Sequence[Mapping[str, Any]]) -> list[int]:
        return [cluster_of[row["row_id"]] for row in measured]

    clustered = _statistics(
        splits,
        arms,
        lambda measured: partial(estimate_clustered, clusters=clusters(measured)),
        lambda measured: partial(compare_clustered, clusters=clusters(measured)),
    )
    return summary | {"by_image": {"clusters": len(set(numbers)), **clustered}}


def _statistics(
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    arms: Sequence[str],
    estimate_of: Callable[[Sequence[Mapping[str, Any]]], Callable[[list[float]], Estimate]],
    compare_of: Callable[[Sequence[Mapping[str, Any]]], Callable[[list[float], list[float]], Comparison]],
) -> dict[str, Any]:
    """Return `scores` and `comparisons`, as `summarise` does, of functions that are chosen by the rows."""
    measured = {split: measured_metrics(_metrics_of(chosen)) for split, chosen in splits.items()}
    scores = {
        arm: {
            split: {
                metric: asdict(estimate_of(_having(chosen, metric))(_values(chosen, arm, metric)))
                for metric in measured[split]
            }
            for split, chosen in splits.items()
        }
        for arm in arms
    }
    comparisons = [
        {"first": first, "second": second, "split": split, "metric": metric}
        | asdict(compare_of(_having(chosen, metric))(_values(chosen, first, metric), _values(chosen, second, metric)))
        for first, second in combinations(arms, 2)
        for split, chosen in splits.items()
        for metric in measured[split]
    ]
    return {"scores": scores, "comparisons": comparisons}


def format_summary(summary: Mapping[str, Any]) -> str:
    """Return the summary as a table of at most 80 columns: percentages with 95% intervals, rows in the headings."""
    lines = ["in % with 95% intervals; in brackets after a heading its number of rows", ""]
    of_all = next(iter(summary["scores"].values()))[ALL]
    for metric in measured_metrics(of_all):
        lines += [f"{metric} ({NOTES[metric]})", *_metric_table(summary["scores"], metric), ""]
    first = headline_of(of_all)
    shown = [entry for entry in summary["comparisons"] if entry["metric"] == first]
    if shown:
        lines += [f"arms on the same rows by {first}, in points, with an exact sign test"]
        lines += [_comparison_line("", "", "difference", "won:lost", "p"), *_comparison_table(shown), ""]
    if "by_image" in summary:
        lines += _by_image(summary["by_image"], first)
    return "\n".join(lines).rstrip()


def _by_image(clustered: Mapping[str, Any], metric: str) -> list[str]:
    """Return lines with the headline metric where rows on the same images count as one draw."""
    lines = [f"{metric} clustered by image ({clustered['clusters']:,} clusters)"]
    lines += _metric_table(clustered["scores"], metric)
    shown = [entry for entry in clustered["comparisons"] if entry["metric"] == metric]
    if shown:
        lines += [_comparison_line("", "", "difference", "won:lost", "p"), *_comparison_table(shown)]
    return lines


def describe_cut(summary: Mapping[str, Any]) -> str | None:
    """Return a line that counts the truncated answers of each arm; None if there are none, or it is not known."""
    cut = [f"{arm} {count:,}" for arm, count in summary.get("cut_answers", {}).items() if count]
    return (
        f"at {summary['settings']['max_new_tokens']:,} tokens: {', '.join(cut)} of {summary['rows']:,}" if cut else None
    )


def describe_engine(summary: Mapping[str, Any]) -> str | None:
    """Return a line on how many answers of another engine are those of this package's; None where that answered."""
    engine = summary.get("engine")
    if engine is None:
        return None
    version = next(iter(engine["versions"].values()), None)
    name = f"{engine['title']} {version}" if version else engine["title"]
    agree = [f"{arm} {found['same']:,} of {found['rows']:,}" for arm, found in engine["compared"].items()]
    return f"{name} answered; of a sample this package's engine answers alike: {', '.join(agree)}"


def write_results(folder: Path, rows: Iterable[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """Write `rows.jsonl` and `summary.json`, the summary last: where it is, the results are complete.

    Raises `UserError` where that is impossible.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / ROWS_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        atomic_write(folder / SUMMARY_FILE, json.dumps(summary, ensure_ascii=False, indent=2) + "\n")


def with_current_names(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored summary with today's names of metrics; earlier versions named some otherwise."""

    def renamed(cells: Mapping[str, Any]) -> dict[str, Any]:
        return {current_metric(metric): cell for metric, cell in cells.items()}

    scores = {
        arm: {split: renamed(cells) for split, cells in splits.items()} for arm, splits in summary["scores"].items()
    }
    comparisons = [{**entry, "metric": current_metric(entry["metric"])} for entry in summary["comparisons"]]
    return {**summary, "scores": scores, "comparisons": comparisons}


def _splits(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    splits: dict[str, list[Mapping[str, Any]]] = {ALL: list(rows)}
    for name in sorted({row[SPLIT_COLUMN] for row in rows if row[SPLIT_COLUMN] is not None}):
        splits[name] = [row for row in rows if row[SPLIT_COLUMN] == name]
    return splits


def _metrics_of(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    return {name for row in rows for scored in row["arms"].values() for name in scored}


def _having(rows: Sequence[Mapping[str, Any]], metric: str) -> list[Mapping[str, Any]]:
    """Return the rows that have a metric: it depends on the right answer, and so is the same in all arms."""
    return [row for row in rows if metric in next(iter(row["arms"].values()))]


def _values(rows: Sequence[Mapping[str, Any]], arm: str, metric: str) -> list[float]:
    return [row["arms"][arm][metric] for row in rows if metric in row["arms"][arm]]


def _metric_table(scores: Mapping[str, Any], metric: str) -> Iterator[str]:
    splits = [split for split, cells in next(iter(scores.values())).items() if metric in cells]
    for start in range(0, len(splits), SPLITS_A_LINE):
        columns = splits[start : start + SPLITS_A_LINE]
        counts = [next(iter(scores.values()))[split][metric]["rows"] for split in columns]
        headings = [f"{_short(split, 10)} ({count:,})" for split, count in zip(columns, counts, strict=True)]
        yield _line("", headings)
        for arm, of_arm in scores.items():
            yield _line(arm, [_percent(of_arm[split][metric]) for split in columns])


def _line(name: str, cells: Sequence[str]) -> str:
    return (f"  {_short(name, NAME_WIDTH):<{NAME_WIDTH}}" + "".join(f"{cell:>22}" for cell in cells)).rstrip()


def _percent(cell: Mapping[str, float]) -> str:
    return f"{100 * cell['mean']:.1f} [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"


def _comparison_table(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    previous = ""
    for entry in entries:
        pair = f"{entry['second']} - {entry['first']}"
        cell = entry["difference"]
        difference = f"{100 * cell['mean']:+.1f} [{100 * cell['low']:+.1f}, {100 * cell['high']:+.1f}]"
        won = f"{entry['second_wins']}:{entry['first_wins']}"
        split = f"{_short(entry['split'], 8)} ({entry['rows']:,})"
        yield _comparison_line("" if pair == previous else pair, split, difference, won, f"{entry['p_value']:.2g}")
        previous = pair


def _comparison_line(pair: str, split: str, difference: str, won: str, p_value: str) -> str:
    return f"  {pair:<17}{split:<17}{difference:>23}{won:>12}{p_value:>9}"


def _short(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"
