"""Splits of drawn charts: no chart in two of them, and a parquet file each beside a dataset card."""

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features

from qwen_vl_sft.tools.tiny.charts import Chart, draw

CARD = """---
license: apache-2.0
configs:
- config_name: default
  data_files:
  - {split: train, path: train-00000-of-00001.parquet}
  - {split: val, path: val-00000-of-00001.parquet}
  - {split: test, path: test-00000-of-00001.parquet}
---
"""


def distinct_charts(
    rng: Random, counts: Mapping[str, int], pick: Callable[[Random], Chart]
) -> Iterator[tuple[str, int, Chart]]:
    """Yield split, number in the split, and chart: as many of each split as `counts` says, no two of one picture."""
    pictures = set()
    for split, count in counts.items():
        for index in range(count):
            chart = pick(rng)
            while (pixels := draw(chart).tobytes()) in pictures:
                chart = pick(rng)
            pictures.add(pixels)
            yield split, index, chart


def file_name(split: str, index: int) -> str:
    """Return the name of a chart's image."""
    return f"{split}_{index:03d}.png"


def png_of(chart: Chart) -> bytes:
    """Draw a chart as PNG."""
    png = io.BytesIO()
    draw(chart).save(png, "PNG", optimize=True)
    return png.getvalue()


def write_splits(folder: Path, rows: Mapping[str, list[dict[str, Any]]], features: Features, description: str) -> None:
    """Write README.md and a parquet file per split into an existing folder."""
    for split, found in rows.items():
        table = pa.Table.from_pylist(found, schema=features.arrow_schema)
        # Not Dataset.to_parquet: it turns off dictionaries for images, and would store a chart once per row.
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet", compression="zstd")
    (folder / "README.md").write_text(CARD + description, encoding="utf-8")
