"""Charts with the boxes of their bars, as ms-swift writes them: images, messages, objects, in three parquet files."""

from pathlib import Path
from random import Random

from datasets import Features, Image, List, Value

from qwen_vl_sft.tools.tiny.charts import Chart, item_boxes, random_chart
from qwen_vl_sft.tools.tiny.questions import WORDS
from qwen_vl_sft.tools.tiny.splits import distinct_charts, file_name, png_of, write_splits

IMAGES = {"train": 640, "val": 20, "test": 60}  # a row for each bar, about 3.5 on a chart
FEATURES = Features(
    {
        "images": List(Image()),
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "objects": {"ref": List(Value("string")), "bbox": List(List(Value("int32")))},
    }
)
DESCRIPTION = """\
Bar charts drawn by `scripts/make_tiny.py`, and where each bar is: images, messages and objects as ms-swift writes them,
boxes in pixels. No chart stands in two splits. For tests and for trying boxes without a network.
"""


def charts_of(split: str) -> list[tuple[str, Chart]]:
    """Return names and charts of one split. They are sampled over all splits at once, so that no chart is in two."""
    found = distinct_charts(Random("boxes"), IMAGES, _bar_chart)
    return [(file_name(part, index), chart) for part, index, chart in found if part == split]


def _bar_chart(rng: Random) -> Chart:
    chart = random_chart(rng)
    while chart.kind not in ("bar", "hbar"):
        chart = random_chart(rng)
    return chart


def to_rows(named: list[tuple[str, Chart]]) -> list[dict]:
    """Return one row per bar, those of one chart in succession; a box ends behind the bar's last pixel."""
    rows = []
    for name, chart in named:
        png = png_of(chart)
        for color, (left, top, right, bottom) in zip(chart.colors, item_boxes(chart), strict=True):
            messages = [("user", "<image>Where is <ref-object>?"), ("assistant", "<bbox>")]
            rows.append(
                {
                    "images": [{"bytes": png, "path": name}],
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
    write_splits(folder, {split: to_rows(charts_of(split)) for split in IMAGES}, FEATURES, DESCRIPTION)
