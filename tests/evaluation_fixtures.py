"""A tiny Qwen2-VL with random weights, its charts, and a run folder as the trainer leaves it; made in about 5 s."""

import json
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, get_peft_model

from qwen_vl_sft.evaluation.options import Plan, check_options, make_plan, parse_options
from qwen_vl_sft.recipe.reading import read_recipe
from qwen_vl_sft.tiny.dataset import write_dataset
from qwen_vl_sft.tiny.model import build_model
from qwen_vl_sft.tiny.processor import build_processor

SYSTEM_MESSAGE = "Answer with one word."


def tiny_model(scale: float = 1.0):
    """A model in float32 whose answers differ from prompt to prompt, and its processor."""
    torch.manual_seed(0)
    processor = build_processor()
    model = build_model(processor)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model.eval(), processor


def write_charts(folder: Path) -> Path:
    folder.mkdir()
    write_dataset(folder)
    return folder


def write_run(root: Path, data: Path, dtype: str = "float32", **keys) -> Path:
    """`root/model` with the base model and `root/run` with an adapter that changes its answers."""
    model, processor = tiny_model(scale=2.0)
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    run = root / "run"
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(run)
    processor.save_pretrained(run)
    keys = {"model_name_or_path": str(root / "model"), "dataset_name": str(data), "dtype": dtype, **keys}
    recipe = root / "asked.yaml"
    recipe.write_text(yaml.safe_dump(keys | {"output_dir": str(run)}))
    (run / "recipe.yaml").write_text(read_recipe(recipe, {}).to_yaml())
    (run / "system_message.txt").write_text(SYSTEM_MESSAGE)
    return run


def plan(*arguments) -> Plan:
    """What the command line asks for."""
    # New strings, as those of a command line are: `coerce` tells a choice from a bool by identity.
    options = parse_options([str(argument).encode().decode() for argument in arguments])
    check_options(options)
    return make_plan(options)


def read_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
