#!/usr/bin/env bash
# ms-swift 4.6.0: transparent pixels of a picture are black in training, though Qwen's own function, which ms-swift calls for
# Qwen-VL, puts white behind them: a chart with black text on a transparent background is black on black. No error, no warning.
#
# Guess before it was run: a Qwen2-VL row is learned with the pixels that qwen_vl_utils.fetch_image gives for its image.
#
# Seen (Python 3.11, Linux, ms-swift 4.6.0, qwen-vl-utils 0.0.14, transformers 5.19.0, pillow 12.3.0), a red bar on a black axis,
# saved with a white and with a transparent background:
#                                       white  black
#   white background  qwen_vl_utils      88%     2%
#   white background  ms-swift           88%     2%
#   transparent       qwen_vl_utils      88%     2%
#   transparent       ms-swift            0%    90%
# ms-swift's is the same for a path, for bytes as in Parquet, and for base64.
# Why: load_image calls image.convert("RGB"), which drops the alpha channel and shows whatever color lies under transparent
# pixels, before fetch_image sees the picture (https://github.com/QwenLM/Qwen3-VL/pull/661 made that put white). vLLM puts white
# too (https://github.com/vllm-project/vllm/pull/22052), so a model that was trained so is served other pictures. The image
# processor of transformers 5.19.0 drops the alpha channel as well.
# Who is hurt: who trains on charts, logos or formulas saved with a transparent background.
# Way around: composite such pictures over white before training.
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'ms-swift==4.6.0' 'qwen-vl-utils==0.0.14' \
    'transformers==5.19.0' 'torch==2.11.0' 'torchvision==0.26.0' 'pillow==12.3.0' 'numpy<3'
cat > "$work/pictures.py" <<'PY'
import base64
import importlib.metadata
import io
import sys

import numpy as np
import transformers
from PIL import Image, ImageDraw
from qwen_vl_utils import fetch_image
from swift.model import get_processor
from swift.template import get_template
from tokenizers import Tokenizer, models, pre_tokenizers

folder = sys.argv[1]
special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
words = {word: number for number, word in enumerate([*special, "<unk>", "user", "assistant", "system", "color", "?", "red"])}
splitter = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=splitter,
    eos_token="<|im_end|>",
    pad_token="<|endoftext|>",
    unk_token="<unk>",
    additional_special_tokens=special,
)
pixels = transformers.Qwen2VLImageProcessor()
video = transformers.Qwen2VLVideoProcessor()
transformers.Qwen2VLProcessor(image_processor=pixels, tokenizer=tokenizer, video_processor=video).save_pretrained(folder)
tokens = {"vision_start_token_id": 3, "vision_end_token_id": 4, "image_token_id": 5, "video_token_id": 6}
transformers.Qwen2VLConfig(**tokens).save_pretrained(folder)
template = get_template(get_processor(folder, model_type="qwen2_vl", use_hf=True), template_type="qwen2_vl")
template.image_token_id = tokens["image_token_id"]
template.set_mode("train")


def shares(patches):
    """Return the percentages of white and of black pixels in the patches of an image."""
    patches = np.asarray(patches, dtype=np.float64)
    colors = patches.reshape(len(patches), 3, -1).transpose(0, 2, 1) * np.array(pixels.image_std) + np.array(pixels.image_mean)
    return [round(100 * float(found.all(-1).mean())) for found in (colors > 0.95, colors < 0.05)]


def by_swift(image):
    messages = [{"role": "user", "content": "<image>color ?"}, {"role": "assistant", "content": "red"}]
    return shares(template.encode({"messages": messages, "images": [image]})["pixel_values"])


def by_qwen(path):
    return shares(pixels(images=[fetch_image({"image": path})], do_resize=False, return_tensors="np")["pixel_values"])


chart = Image.new("RGBA", (224, 224))
pen = ImageDraw.Draw(chart)
pen.rectangle((30, 100, 80, 195), fill="red")
pen.line((20, 200, 210, 200), fill="black", width=6)
on_white = Image.alpha_composite(Image.new("RGBA", chart.size, "white"), chart).convert("RGB")
seen = {}
print(f"{'':<38}white  black")
for name, picture in (("white background", on_white), ("transparent", chart)):
    path, file = f"{folder}/{name}.png", io.BytesIO()
    picture.save(path)
    picture.save(file, "PNG")
    encoded = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    forms = {"path": path, "bytes": {"bytes": file.getvalue(), "path": None}, "base64": encoded}
    seen[name] = {"qwen_vl_utils": by_qwen(path)} | {f"ms-swift, {form}": by_swift(value) for form, value in forms.items()}
    for where, found in seen[name].items():
        print(f"{name:<18}{where:<20}{found[0]:4}%  {found[1]:4}%")
print(*(f"{name} {importlib.metadata.version(name)}" for name in ("ms-swift", "qwen-vl-utils", "transformers", "pillow")))
light, dark = [88, 2], [0, 90]
right = all(found == light for found in (*seen["white background"].values(), seen["transparent"].pop("qwen_vl_utils")))
sys.exit(0 if right and all(found == dark for found in seen["transparent"].values()) else f"other than stated: {seen}")
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 MODELSCOPE_CACHE="$work/cache" "$work/venv/bin/python" "$work/pictures.py" "$work/model" \
    2> "$work/log" || { tail -5 "$work/log"; exit 1; }
