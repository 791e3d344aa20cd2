"""The chart data set in ChartQA's Hub layout: image, query, label (list), human_or_machine, in three parquet files."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value

from qwen_vl_sft.tools.tiny.charts import Chart, draw, random_chart
from qwen_vl_sft.tools.tiny.questions import Question, ask

IMAGES = {"train": 533, "val": 67, "test": 200}  # one and two questions in turn: 799, 100 and 300 rows
FEATURES = Features(
    {"image": Image(), "query": Value("string"), "label": List(Value("string")), "human_or_machine": Value("int64")}
)
CARD = """---
license: apache-2.0
configs:
- config_name: default
  data_files:
  - {split: train, path: train-00000-of-00001.parquet}
  - {split: val, path: val-00000-of-00001.parquet}
  - {split: test, path: test-00000-of-00001.parquet}
---
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
    rng, pictures = Random("data"), set()
    for split, count in IMAGES.items():
        for index in range(count):
            chart = random_chart(rng)
            while (pixels := draw(chart).tobytes()) in pictures:
                chart = random_chart(rng)
            pictures.add(pixels)
            yield split, ChartRows(chart, ask(rng, chart, 1 + index % 2), f"{split}_{index:03d}.png")


def to_rows(charts: list[ChartRows]) -> list[dict]:
    """Return one row per question, questions on one chart in succession; `image` holds PNG bytes and a file name."""
    rows = []
    for item in charts:
        png = io.BytesIO()
        draw(item.chart).save(png, "PNG", optimize=True)
        for question in item.questions:
            rows.append(
                {
                    "image": {"bytes": png.getvalue(), "path": item.name},
                    "query": question.text,
                    "label": [question.label],
                    "human_or_machine": 0 if question.human else 1,
                }
            )
    return rows


def write_dataset(folder: Path) -> None:
    """Write README.md and a parquet file per split into an existing folder."""
    for split in IMAGES:
        table = pa.Table.from_pylist(to_rows(sample_split(split)), schema=FEATURES.arrow_schema)
        # Not Dataset.to_parquet: it turns off dictionaries for images, and would store a chart once per question.
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet", compression="zstd")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
