#!/usr/bin/env bash
# qwen-vl-utils 0.0.14: what is transparent in a picture is white if the file has the mode RGBA, and the color that happens to lie below,
# mostly black, if it is a PNG with a palette or a gray one with alpha, so that black text and axes on a transparent ground are black
# on black; those of a GIF are white on white. transformers' processor makes the ground of all of them white. No error, no warning
# from qwen-vl-utils.
#
# Guess before it was run: transparent is white, in whatever file the same picture lies, as the function says that reads images
# (to_rgb pastes on white since https://github.com/QwenLM/Qwen3-VL/pull/661), and as in the processor that the images go to next.
#
# Seen (Python 3.11, Linux, qwen-vl-utils 0.0.14, pillow 12.3.0, transformers 5.23.0), a black word on a transparent ground; mean of the
# pixels, 0 to 255, and whether the word can be told from its ground:
#   file                              mode   process_vision_info   the processor alone
#   PNG                               RGBA   244 seen              244 seen
#   WebP                              RGBA   244 seen              244 seen
#   PNG, palette (as optimizers do)   P        0 black             244 seen
#   GIF                               P      255 white             241 seen
#   PNG, gray with alpha              LA       0 black             244 seen
#   PNG, gray, 255 transparent        L      244 seen              244 seen
# Why: to_rgb looks at the mode RGBA alone, and leaves the rest to Pillow's convert("RGB"), which drops the transparency; that of a
# GIF becomes a mark that black is transparent, by which the processor makes all black white, the word too.
# (https://github.com/huggingface/transformers/issues/49003 is about other models' own functions there.)
# Who is hurt: who trains with transformers or TRL and answers with process_vision_info, as the model cards of Qwen-VL show, or the
# other way round, on charts, formulas and logos from the web, which are often such files: the model is shown an empty picture.
# Way around: open such images oneself, and give process_vision_info image.convert("RGBA").
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'qwen-vl-utils==0.0.14' 'transformers==5.23.0' 'pillow==12.3.0' \
    'torch==2.11.0' 'torchvision==0.26.0' 'numpy<3'
cat > "$work/pictures.py" <<'PY'
import io
import sys

import qwen_vl_utils  # noqa: F401
import torch
import transformers
from PIL import Image, ImageDraw
from qwen_vl_utils import process_vision_info

picture = Image.new("RGBA", (112, 112), (0, 0, 0, 0))
ImageDraw.Draw(picture).text((20, 40), "42%", fill=(0, 0, 0, 255), font_size=36)
gray = Image.new("L", (112, 112), 255)
gray.paste(0, mask=picture.getchannel("A"))


def stored(image, kind, **more):
    file = io.BytesIO()
    image.save(file, kind, **more)
    return Image.open(io.BytesIO(file.getvalue()))


files = {
    "PNG": lambda: stored(picture, "PNG"),
    "WebP": lambda: stored(picture, "WEBP", lossless=True),
    "PNG, palette (as optimizers do)": lambda: stored(picture.quantize(16), "PNG"),
    "GIF": lambda: stored(picture, "GIF"),
    "PNG, gray with alpha": lambda: stored(picture.convert("LA"), "PNG"),
    "PNG, gray, 255 transparent": lambda: stored(gray, "PNG", transparency=255),
}
processor = transformers.Qwen2VLImageProcessor()
mean, deviation = (torch.tensor(value)[:, None] for value in (processor.image_mean, processor.image_std))


def seen_by_the_model(image):
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"].reshape(-1, 3, 2 * 14 * 14)
    return (pixels * deviation + mean) * 255


def opened(make):
    return process_vision_info([{"role": "user", "content": [{"type": "image", "image": make()}]}])[0][0]


seen = {}
print(f"{'':<34}mode   process_vision_info   the processor alone")
for name, make in files.items():
    cells = []
    for image in (opened(make), make()):
        pixels = seen_by_the_model(image)
        cells.append(f"{pixels.mean():>3.0f} {'seen' if pixels.max() - pixels.min() > 100 else 'black' if pixels.max() < 1 else 'white'}")
    mended = seen_by_the_model(opened(lambda: make().convert("RGBA")))
    assert mended.max() - mended.min() > 100, name
    seen[name] = [cell.split()[1] for cell in cells]
    print(f"{name:<34}{make().mode:<7}{cells[0]:<22}{cells[1]}")
from importlib.metadata import version  # noqa: E402

print("qwen-vl-utils", version("qwen-vl-utils"), "transformers", transformers.__version__, "pillow", version("pillow"))
empty = {"PNG, palette (as optimizers do)": "black", "GIF": "white", "PNG, gray with alpha": "black"}
expected = {name: [empty.get(name, "seen"), "seen"] for name in files}
sys.exit(0 if seen == expected else f"other than stated: {seen}")
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/pictures.py" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
