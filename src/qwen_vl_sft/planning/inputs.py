"""Read what a plan needs of a recipe, a launch configuration and a model's config.json, without the training libraries."""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import get_token

from qwen_vl_sft.errors import UserError, first_line, quoted
from qwen_vl_sft.families.released import RELEASED
from qwen_vl_sft.families.shape import ModelShape
from qwen_vl_sft.families.shape_reading import read_shape
from qwen_vl_sft.shipped_files import launch_config

# A plan waits so long for the Hub.
_SECONDS = 2.5
_STRATEGIES = {"NO": "single", "MULTI_GPU": "ddp", "FSDP": "fsdp2"}


@dataclass(frozen=True)
class Launch:
    """How a run is launched: its strategy, and GPUs in all and on a machine."""

    strategy: str
    processes: int
    machines: int = 1

    @property
    def on_cpu(self) -> bool:
        """Return False: what is planned runs on GPUs."""
        return False


def read_launch(config_file: str | None, num_gpus: int | None) -> Launch:
    """Read an accelerate configuration; `num_gpus` wins over its number of processes. Without a file: DDP, or one GPU.

    Raises `UserError` for a file that is none, and for one that asks for what this package does not train with.
    """
    if config_file is None:
        count = num_gpus or 1
        return Launch("ddp" if count > 1 else "single", count)
    path = launch_config(config_file, "config_file")
    try:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        kind = str(written["distributed_type"]).upper()
        machines = int(written.get("num_machines", 1))
        count = num_gpus or int(written.get("num_processes", 1))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"--config_file {config_file}: is no accelerate configuration: {first_line(error)}") from None
    if kind == "DEEPSPEED":
        return Launch(f"zero{_zero_stage(path, written.get('deepspeed_config') or {})}", count, machines)
    if kind not in _STRATEGIES:
        raise UserError(f"--config_file {config_file}: distributed_type {quoted(kind)} is not supported here")
    strategy = "ddp" if kind == "NO" and count > 1 else _STRATEGIES[kind]
    return Launch("single" if strategy == "ddp" and count == 1 else strategy, count, machines)


def _zero_stage(path: Path, settings: Mapping[str, Any]) -> int:
    stage = settings.get("zero_stage")
    if stage is None:
        named = Path(str(settings.get("deepspeed_config_file")))
        file = next((place for place in (named, path.parent / named.name) if place.is_file()), None)
        if file is None:
            raise UserError(f"--config_file {path}: its deepspeed_config_file {named} does not exist")
        stage = json.loads(file.read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise UserError(f"--config_file {path}: ZeRO stage {quoted(stage)}; stages 1, 2 and 3 are supported")
    return int(stage)


def find_shape(model: str, revision: str = "main") -> ModelShape:
    """Return a model's dimensions: of a folder, of the Hub's cache, of a released model that is known here, of the Hub.

    Raises `UserError` where none of them has it.
    """
    folder = Path(model).expanduser()
    config = folder / "config.json" if folder.is_dir() else _cached_config(model, revision)
    if config is None and model in RELEASED:
        return read_shape(RELEASED[model], model)
    source = f"model_name_or_path: {model}"
    if config is None or not config.is_file():
        return read_shape(_download(model, revision), source)
    try:
        return read_shape(json.loads(config.read_text(encoding="utf-8")), source)
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"model_name_or_path: {config} cannot be read: {first_line(error)}") from None


def _cached_config(model: str, revision: str) -> Path | None:
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    folder = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{model.replace('/', '--')}"
    reference = folder / "refs" / revision
    try:
        commit = reference.read_text(encoding="utf-8").strip()
    except OSError:
        commit = revision
    path = folder / "snapshots" / commit / "config.json"
    return path if path.is_file() else None


def _download(model: str, revision: str) -> Any:
    """Fetch a config.json from the Hub, without the repeated attempts of its client: a plan answers at once or says why."""
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model):
        raise UserError(f"model_name_or_path: {quoted(model)} is no folder with a config.json, and no name on the Hub")
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    request = urllib.request.Request(f"{endpoint}/{model}/resolve/{urllib.parse.quote(revision, safe='')}/config.json")
    try:
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
            raise OSError("HF_HUB_OFFLINE is set")
        if token := get_token():
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            return json.load(answer)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"model_name_or_path: the config.json of {quoted(model)} is not on this machine and cannot be fetched:"
            f" {first_line(error)}; give a folder with it, or a model whose dimensions are known here"
            f" ({', '.join(name.removeprefix('Qwen/') for name in RELEASED)})"
        ) from None
