"""Build the embedded model and data set from scratch, and compare a build with the shipped one."""

import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file

from qwen_vl_sft.tools.tiny.box_dataset import write_box_dataset
from qwen_vl_sft.tools.tiny.dataset import IMAGES, sample_split, write_dataset
from qwen_vl_sft.tools.tiny.model import build_model
from qwen_vl_sft.tools.tiny.pretrain import Schedule, pretrain
from qwen_vl_sft.tools.tiny.processor import build_processor

PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class BuildConfig:
    """Everything the weights depend on besides the code, the library versions and the type of CPU."""

    seed: int = 0
    threads: int = 1  # sums are split by thread, so another number gives slightly different weights
    schedule: Schedule = field(default_factory=Schedule)


def build(output_dir: Path, config: BuildConfig, report: Callable[[str], None] = print) -> None:
    """Write `model/`, `data/` and `boxes/` into output_dir, which must not hold them yet.

    Errors: ValueError when output_dir already holds a build.
    """
    model_dir, data_dir, boxes_dir = (output_dir / name for name in ("model", "data", "boxes"))
    for folder in (model_dir, data_dir, boxes_dir):
        if folder.exists():
            raise ValueError(f"{folder}: exists already; choose another --output_dir or remove it")
    for folder, write in ((data_dir, write_dataset), (boxes_dir, write_box_dataset)):
        folder.mkdir(parents=True)
        write(folder)

    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(config.seed)
    processor = build_processor()
    model = build_model(processor)
    held_out = {rows.chart for split in IMAGES for rows in sample_split(split)}
    pretrain(model, processor, config.schedule, held_out, report)
    model.bfloat16().save_pretrained(model_dir)
    (model_dir / "model.safetensors").chmod(0o644)  # safetensors writes for the owner only
    processor.save_pretrained(model_dir)


def differences(built: Path, shipped: Path) -> list[str]:
    """Return the differences of two builds, one line each: processor files, data by content, weights bit by bit."""
    found = [
        f"model/{name}"
        for name in PROCESSOR_FILES
        if (built / "model" / name).read_bytes() != (shipped / "model" / name).read_bytes()
    ]
    for folder, split in itertools.product(("data", "boxes"), IMAGES):
        name = f"{folder}/{split}-00000-of-00001.parquet"
        if read_rows(built / name) != read_rows(shipped / name):
            found.append(name)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (built, shipped))
    if ours.keys() != theirs.keys():
        return [*found, "model/model.safetensors: other tensors"]
    largest = max(float((ours[key].float() - theirs[key].float()).abs().max()) for key in ours)
    if largest:
        found.append(f"model/model.safetensors: weights differ by up to {largest:.3g}")
    return found


def read_rows(path: Path) -> list[dict]:
    """Return a parquet file's rows with decoded pixels for the image: PNG bytes depend on the zlib version."""
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        (stored,) = row.pop("images") if "images" in row else [row["image"]]
        image = Image.open(io.BytesIO(stored["bytes"])).convert("RGB")
        row["image"] = (stored["path"], image.size, image.tobytes())
    return rows
