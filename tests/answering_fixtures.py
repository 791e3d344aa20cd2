"""Runs with an adapter of random weights on the embedded model, made in a second each."""

from functools import cache
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.recipe.reading import read_recipe
from qwen_vl_sft.tiny import DATA_DIR, MODEL_DIR


def write_builtin_run(run: Path, seed: int, message: str, **keys) -> Path:
    """A run folder; adapters of other seeds answer otherwise."""
    model = AutoModelForImageTextToText.from_pretrained(MODEL_DIR, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(run)
    AutoProcessor.from_pretrained(MODEL_DIR).save_pretrained(run)
    known = {"model_name_or_path": "builtin:tiny-qwen2-vl", "dataset_name": "builtin:tiny-charts"}
    known |= {"dataset_format": "chartqa", "dtype": "float32", "use_cpu": True, "output_dir": str(run)}
    (run / "asked.yaml").write_text(yaml.safe_dump(known | keys))
    (run / "recipe.yaml").write_text(read_recipe(run / "asked.yaml", {}).to_yaml())
    (run / "asked.yaml").unlink()
    (run / "system_message.txt").write_text(message)
    return run


@cache
def charts():
    """The rows of the embedded charts, undecoded."""
    return open_rows(str(DATA_DIR), "test").dataset


def chart(number: int) -> tuple[bytes, str]:
    """The PNG and the question of a row."""
    row = charts()[number]
    return row["image"]["bytes"], row["query"]
