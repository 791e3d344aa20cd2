"""The chart data set in ChartQA's Hub layout: image, query, label (list), human_or_machine, in three parquet files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from datasets import Features, Image, List, Value

from qwen_vl_sft.tools.tiny.charts import Chart, random_chart
from qwen_vl_sft.tools.tiny.questions import Question, ask
from qwen_vl_sft.tools.tiny.splits import distinct_charts, file_name, png_of, write_splits

IMAGES = {"train": 533, "val": 67, "test": 200}  # one and two questions in turn: 799, 100 and 300 rows
FEATURES = Features(
    {"image": Image(), "query": Value("string"), "label": List(Value("string")), "human_or_machine": Value("int64")}
)
DESCRIPTION = """\
Charts drawn by `scripts/make_tiny.py`, in the layout of ChartQA on the Hub: image, query, label (list),
human_or_machine (0 for freely worded questions, 1 for template wording). No chart stands in two splits. For tests and
for trying the package without a network.
"""


@dataclass(frozen=True)
class ChartRows:
    """One chart of the data set, its questions and its place."""

    chart: Chart
    questions: list[Question]
    name: str


def sample_split(split: str) -> list[ChartRows]:
    """Return the charts of one split. They are sampled over all splits at once, so that no chart is in two."""
    return [rows for part, rows in _sample() if part == split]


def _sample() -> Iterator[tuple[str, ChartRows]]:
    rng = Random("data")
    for split, index, chart in distinct_charts(rng, IMAGES, random_chart):
        yield split, ChartRows(chart, ask(rng, chart, 1 + index % 2), file_name(split, index))


def to_rows(charts: list[ChartRows]) -> list[dict]:
    """Return one row per question, questions on one chart in succession; `image` holds PNG bytes and a file name."""
    rows = []
    for item in charts:
        png = png_of(item.chart)
        for question in item.questions:
            rows.append(
                {
                    "image": {"bytes": png, "path": item.name},
                    "query": question.text,
                    "label": [question.label],
                    "human_or_machine": 0 if question.human else 1,
                }
            )
    return rows


def write_dataset(folder: Path) -> None:
    """Write README.md and a parquet file per split into an existing folder."""
    write_splits(folder, {split: to_rows(sample_split(split)) for split in IMAGES}, FEATURES, DESCRIPTION)
