#!/usr/bin/env bash
# datasets 5.2.0: an image that Pillow opened from a file and that was edited in place (thumbnail, ImageDraw, paste, putalpha)
# is stored as the name of that file, so that a dataset made of such images, and a `map` that returns them, give the unedited
# picture back: no error, no warning. to_parquet writes the bytes of the file.
#
# Guess before it was run: an Image column keeps the picture that it was given ("PIL.Image.Image: Image object" is one of the
# inputs that its documentation lists), as it does for an image that `resize` or `convert` returned, and for one whose bytes
# lay in the dataset.
#
# Seen (Python 3.11, Linux, datasets 5.2.0, pillow 12.3.0), a PNG of 160 x 160; "edited" is the picture that was given:
#                      of opened files   map, files in a folder   map, bytes in the dataset
#   resize             edited            edited                   edited
#   thumbnail          the file's        the file's               edited
#   ImageDraw          the file's        the file's               edited
#   paste              the file's        the file's               edited
#   putalpha           the file's        the file's               edited
#   thumbnail, copied  edited            edited                   edited
#   thumbnail, written with to_parquet and read again: the file's
# Why: encode_pil_image stores {"path": image.filename, "bytes": None} of every image that has a file name, and Pillow keeps
# that name through edits in place.
# Who is hurt: who draws boxes or marks on pictures, hides parts of them or makes them smaller with `thumbnail`, and trains on
# the result: the rows hold the original pictures, with the original number of image tokens.
# Way around: return `image.copy()`, which has no file name, or set `image.filename = ""`.
#
# The script fails once a version behaves otherwise. Needs network for pip, no account, about 200 MB in a temporary folder.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'datasets==5.2.0' 'pyarrow==26.0.1' 'pillow==12.3.0' 'numpy<3'
HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$work/cache" "$work/venv/bin/python" - "$work" <<'PY'
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL
from PIL import Image, ImageDraw

datasets.disable_progress_bars()


def in_place(edit):
    def edited(image):
        edit(image)
        return image

    return edited


box = (0, 0, 80, 80)
edits = {
    "resize": lambda image: image.resize((64, 64)),
    "thumbnail": in_place(lambda image: image.thumbnail((64, 64))),
    "ImageDraw": in_place(lambda image: ImageDraw.Draw(image).rectangle(box, fill="red")),
    "paste": in_place(lambda image: image.paste((255, 0, 0), box)),
    "putalpha": in_place(lambda image: image.putalpha(128)),
    "thumbnail, copied": lambda image: in_place(lambda image: image.thumbnail((64, 64)))(image).copy(),
}
folder = Path(sys.argv[1]) / "pictures"
folder.mkdir()
path = folder / "a.png"
pixels = np.kron(np.random.default_rng(0).integers(0, 256, (20, 20, 3)), np.ones((8, 8, 1)))
Image.fromarray(pixels.astype("uint8")).save(path)
of_files = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
embedded = datasets.Dataset.from_list([{"image": {"bytes": path.read_bytes(), "path": None}}])
embedded = embedded.cast_column("image", datasets.Image())


def what(found, given):
    for name, image in (("edited", given), ("the file's", Image.open(path))):
        if np.array_equal(np.asarray(found.convert("RGBA")), np.asarray(image.convert("RGBA"))):
            return name
    return "neither"


seen = {}
print(f"{'':<19}{'of opened files':<18}{'map, files in a folder':<25}map, bytes in the dataset")
for name, edit in edits.items():
    given = edit(Image.open(path))
    made = [datasets.Dataset.from_dict({"image": [given]}, features=of_files.features)]
    made += [rows.map(lambda row: {"image": edit(row["image"])}) for rows in (of_files, embedded)]
    seen[name] = [what(rows[0]["image"], given) for rows in made]
    print(f"{name:<19}{seen[name][0]:<18}{seen[name][1]:<25}{seen[name][2]}")
    if name == "thumbnail":
        made[1].to_parquet(folder.parent / "rows.parquet")
        again = datasets.load_dataset("parquet", data_files=str(folder.parent / "rows.parquet"), split="train")
        written = what(again[0]["image"], given)
print("thumbnail, written with to_parquet and read again:", written)
print("datasets", datasets.__version__, "pillow", PIL.__version__)
expected = {name: ["the file's", "the file's", "edited"] for name in edits}
expected["resize"] = expected["thumbnail, copied"] = ["edited"] * 3
sys.exit(0 if seen == expected and written == "the file's" else f"other than stated: {seen}, {written}")
PY
