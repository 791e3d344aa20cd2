"""Charts with the boxes of their bars, as ms-swift writes them: images, messages, objects, in three parquet files."""

import io
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value

from qwen_vl_sft.tools.tiny.charts import Chart, draw, item_boxes, random_chart
from qwen_vl_sft.tools.tiny.questions import WORDS

IMAGES = {"train": 640, "val": 20, "test": 60}  # a row for each bar, about 3.5 on a chart
FEATURES = Features(
    {
        "images": List(Image()),
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "objects": {"ref": List(Value("string")), "bbox": List(List(Value("int32")))},
    }
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
Bar charts drawn by `scripts/make_tiny.py`, and where each bar is: images, messages and objects as ms-swift writes them,
boxes in pixels. No chart stands in two splits. For tests and for trying boxes without a network.
"""


def charts_of(split: str) -> list[tuple[str, Chart]]:
    """Return names and charts of one split. They are sampled over all splits at once, so that no chart is in two."""
    return [(name, chart) for part, name, chart in _sample() if part == split]


def _sample() -> Iterator[tuple[str, str, Chart]]:
    rng, pictures = Random("boxes"), set()
    for split, count in IMAGES.items():
        for index in range(count):
            chart = _bar_chart(rng)
            while (pixels := draw(chart).tobytes()) in pictures:
                chart = _bar_chart(rng)
            pictures.add(pixels)
            yield split, f"{split}_{index:03d}.png", chart


def _bar_chart(rng: Random) -> Chart:
    chart = random_chart(rng)
    while chart.kind not in ("bar", "hbar"):
        chart = random_chart(rng)
    return chart


def to_rows(named: list[tuple[str, Chart]]) -> list[dict]:
    """Return one row per bar, those of one chart in succession; a box ends behind the bar's last pixel."""
    rows = []
    for name, chart in named:
        png = io.BytesIO()
        draw(chart).save(png, "PNG", optimize=True)
        for color, (left, top, right, bottom) in zip(chart.colors, item_boxes(chart), strict=True):
            messages = [("user", "<image>Where is <ref-object>?"), ("assistant", "<bbox>")]
            rows.append(
                {
                    "images": [{"bytes": png.getvalue(), "path": name}],
                    "messages": [{"role": role, "content": content} for role, content in messages],
                    "objects": {
                        "ref": [f"the {color} {WORDS[chart.kind][0]}"],
                        "bbox": [[left, top, right + 1, bottom + 1]],
                    },
                }
            )
    return rows


def write_box_dataset(folder: Path) -> None:
    """Write README.md and a parquet file per split into an existing folder."""
    for split in IMAGES:
        table = pa.Table.from_pylist(to_rows(charts_of(split)), schema=FEATURES.arrow_schema)
        # Not Dataset.to_parquet: it turns off dictionaries for images, and would store a chart once per bar.
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet", compression="zstd")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
