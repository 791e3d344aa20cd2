"""Carry weights over that a base's files hold and transformers does not load: a saved model would lose them in silence."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file

from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.modeling.base_model import load_family

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def add_unloaded_weights(settings: ModelSettings, folder: Path) -> int:
    """Add to the full model in `folder` what its base has of the family's `unloaded_weights`; return how many tensors.

    They are written in the recipe's `dtype`, as they were before training. A model in one file then has two and an index.
    Call it on one process, once the model is saved. Raises `OSError`.
    """
    if not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        return 0  # a strategy saves split weights in a form of its own
    beginnings = load_family(settings).unloaded_weights
    tensors = _read(_folder_of(settings), beginnings, getattr(torch, settings.dtype)) if beginnings else {}
    if not tensors:
        return 0
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        places, total = index["weight_map"], index["metadata"]["total_size"]
    else:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            sizes = {key: _bytes(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118, no dictionary
        places, total = dict.fromkeys(sizes, _shard(1, 2)), sum(sizes.values())
    shards = len(set(places.values())) + 1
    added = _shard(shards, shards)
    save_file(tensors, folder / added, metadata={"format": "pt"})
    total += sum(map(_bytes, tensors.values()))
    index = {"metadata": {"total_size": total}, "weight_map": {**places, **dict.fromkeys(tensors, added)}}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if (folder / WEIGHTS).is_file():
        # Last: transformers takes one whole file, where there is one, before an index.
        (folder / WEIGHTS).replace(folder / _shard(1, 2))
    return len(tensors)


def _folder_of(settings: ModelSettings) -> Path:
    name = settings.model_name_or_path or ""
    if Path(name).is_dir():
        return Path(name)
    # It was loaded from there, so it is on this machine.
    return Path(snapshot_download(name, revision=settings.model_revision, local_files_only=True))


def _read(folder: Path, beginnings: tuple[str, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(beginnings)]  # noqa: SIM118, no dictionary
            found.update({key: file.get_tensor(key).to(dtype) for key in keys})
    return found


def _shard(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
