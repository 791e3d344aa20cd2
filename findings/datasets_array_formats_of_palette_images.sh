#!/usr/bin/env bash
# datasets 5.2.0: with_format("numpy") and with_format("torch") give the numbers of the colors of a PNG or GIF with a palette, not
# its colors: a white chart with 16 colors is an array of 0 to 15, shaped as a gray image and nearly black. No error, no warning.
#
# Guess before it was run: the arrays hold what the picture looks like, RGB or gray, as its decoded image shows it.
#
# Seen (Python 3.11, Linux, datasets 5.2.0, pillow 12.3.0): the same picture, white with a red bar, in four files
#   file                decoded image       numpy            values
#   RGB PNG             RGB, mean 222.3     (80, 160, 3)     0 to 255
#   gray PNG            L, mean 220.6       (80, 160)        76 to 255
#   PNG, 16 colors      P, mean 222.3       (80, 160)        0 to 1
#   GIF                 P, mean 222.3       (80, 160)        0 to 1
# ("mean" is that of the image converted to RGB.) With torch 2.11.0 the format "torch" gave the same numbers as (1, 80, 160).
# Who is hurt: charts and screenshots are often PNGs with a palette; a Qwen2-VL image processor (transformers 5.23.0) takes such
# an array for a gray image without complaint, so that the model is trained on a dark picture.
# Way around: cast_column("image", Image(mode="RGB")) before with_format.
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
picture = Image.new("RGB", (160, 80), "white")
ImageDraw.Draw(picture).rectangle((10, 10, 69, 50), fill="red")


def rows_of(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    rows = datasets.Dataset.from_list([{"image": {"bytes": file.getvalue(), "path": None}}])
    return rows.cast_column("image", datasets.Image())


seen = {}
print(f"{'file':<20}{'decoded image':<20}{'numpy':<17}values")
for name, image, kind in (
    ("RGB PNG", picture, "PNG"),
    ("gray PNG", picture.convert("L"), "PNG"),
    ("PNG, 16 colors", picture.quantize(16), "PNG"),
    ("GIF", picture, "GIF"),
):
    rows = rows_of(image, kind)
    decoded, array = rows[0]["image"], rows.with_format("numpy")[0]["image"]
    cured = rows.cast_column("image", datasets.Image(mode="RGB")).with_format("numpy")[0]["image"]
    right = np.asarray(decoded.convert("RGB"))
    colors = array if array.ndim == 3 else np.repeat(array[..., None], 3, 2)
    seen[name] = [bool(abs(found.astype(int) - right).max() < 3) for found in (colors, cured)]
    shown = f"{decoded.mode}, mean {right.mean():.1f}"
    print(f"{name:<20}{shown:<20}{array.shape!s:<17}{array.min()} to {array.max()}")
print("with Image(mode=\"RGB\") all right:", all(found[1] for found in seen.values()))
print("datasets", datasets.__version__, "pillow", PIL.__version__)
expected = [[True, True], [True, True], [False, True], [False, True]]
sys.exit(f"other than stated: {seen}" if list(seen.values()) != expected else 0)
PY
