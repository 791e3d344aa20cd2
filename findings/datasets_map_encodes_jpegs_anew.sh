#!/usr/bin/env bash
# datasets 5.2.0: `map` with a function that only looks at an image encodes the whole column anew, JPEG as JPEG at Pillow's
# quality of 75, even if the function returns other columns alone. Small text in charts and scans gets blurred, and each
# further `map` that looks loses more. No error, no warning.
#
# Guess before it was run: columns that a function does not return stay as they are, as they do when it does not look, and in
# `filter`; a file's bytes are only read.
#
# Seen (Python 3.11, Linux, datasets 5.2.0, pillow 12.3.0), a JPEG of quality 95 in the dataset (as in parquet files of the Hub):
#   function                                       bytes     mean and largest difference of a pixel (of 255)
#   as it was                                      34803     0.0    0
#   lambda row: {"number": 1}                      34803     0.0    0
#   lambda row: {"width": row["image"].width}      10651     5.5    168
#   the same three times                           10262     7.2    200
#   filter(lambda row: row["image"].width > 0)     34803     0.0    0
#   {"width": ...}, input_columns=["image"]        34803     0.0    0
# Why: a row that decoded one of its images is written back with the decoded one, and image_to_bytes saves it in its format with
# Pillow's defaults.
# Who is hurt: who adds sizes, token counts or checks with `map` before training on documents, charts or receipts: the model
# sees other, worse images than those that were published, and than those it is asked about later.
# Way around: give such functions undecoded images, `cast_column("image", Image(decode=False))`, and open the bytes there.
#
# The script fails once a version behaves otherwise. Needs network for pip, no account, about 200 MB in a temporary folder.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'datasets==5.2.0' 'pyarrow==26.0.1' 'pillow==12.3.0' 'numpy<3'
HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$work/cache" "$work/venv/bin/python" - <<'PY'
import io
import sys

import datasets
import numpy as np
import PIL
from PIL import Image, ImageDraw

datasets.disable_progress_bars()
picture = Image.new("RGB", (320, 160), "white")
draw = ImageDraw.Draw(picture)
for line in range(8):
    text = f"Revenue 20{10 + line}: {line * 137 % 100}.{line * 31 % 100} million"
    draw.text((10, 10 + 18 * line), text, fill=(200, 30 * line, 255 - 30 * line))
    draw.line((200, 10 + 18 * line, 310, 150 - 10 * line), fill=(255, 0, 40 * line % 255))
file = io.BytesIO()
picture.save(file, "JPEG", quality=95, subsampling=0)
rows = datasets.Dataset.from_list([{"image": {"bytes": file.getvalue(), "path": None}}])
rows = rows.cast_column("image", datasets.Image())
first = np.asarray(rows[0]["image"]).astype(int)


def width(row):
    return {"width": row["image"].width}


def look(rows, times):
    for time in range(times):
        rows = rows.map(lambda row, time=time: width(row) | {"time": time})
    return rows


seen = {}
print(f"{'function':<47}bytes     mean and largest difference of a pixel (of 255)")
for name, found in {
    "as it was": rows,
    'lambda row: {"number": 1}': rows.map(lambda row: {"number": 1}),
    'lambda row: {"width": row["image"].width}': rows.map(width),
    "the same three times": look(rows, 3),
    'filter(lambda row: row["image"].width > 0)': rows.filter(lambda row: row["image"].width > 0),
    '{"width": ...}, input_columns=["image"]': rows.map(lambda image: {"width": image.width}, input_columns=["image"]),
}.items():
    stored = found.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"]
    difference = abs(np.asarray(found[0]["image"]).astype(int) - first)
    seen[name] = [stored == file.getvalue(), difference.mean() > 3]
    print(f"{name:<47}{len(stored):<10}{difference.mean():<7.1f}{difference.max()}")
print("datasets", datasets.__version__, "pillow", PIL.__version__)
expected = [[True, False], [True, False], [False, True], [False, True], [True, False], [True, False]]
sys.exit(f"other than stated: {seen}" if list(seen.values()) != expected else 0)
PY
