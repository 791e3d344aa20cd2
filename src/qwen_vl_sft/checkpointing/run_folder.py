"""The run folder: refuse a used one, and write everything but the model into it."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from qwen_vl_sft import __version__
from qwen_vl_sft.checkpointing.checkpoints import LATEST, is_checkpoint_name
from qwen_vl_sft.distributed.folder_claim import is_claim
from qwen_vl_sft.errors import UserError

RECIPE = "recipe.yaml"
SYSTEM_MESSAGE = "system_message.txt"
METRICS = "metrics.json"
LOG = "training_log.jsonl"
LOSS_PLOT = "loss.png"
EXPERT_LOAD_PLOT = "expert_load.png"
ENVIRONMENT = "environment.json"
# The key of the base model's identity in it (`modeling.base_identity`).
BASE = "base"
# And of a digest of its tensors, whatever files they lie in.
BASE_WEIGHTS = "base_weights"
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "qwen-vl-utils",
    "safetensors",
)


def problems_of_output_dir(folder: Path, overwrite: bool, resume: str | None) -> Iterator[str]:
    """Yield the reasons why a run may not write to `folder`."""
    if folder.is_file():
        yield f"output_dir: {folder} is a file; name a folder"
        return
    if resume and overwrite:
        yield "resume_from_checkpoint and overwrite_output_dir exclude each other; keep one"
    elif resume:
        if resume != LATEST and not Path(resume).is_dir():
            yield f"resume_from_checkpoint: {resume} is not a folder; give one, or {LATEST} for the newest in output_dir"
    elif folder.is_dir() and not all(map(is_claim, folder.iterdir())):
        if not overwrite:
            yield (
                f"output_dir: {folder} holds files already; continue its run with --resume_from_checkpoint {LATEST},"
                f" delete them with --overwrite_output_dir true, or name another folder with --output_dir"
            )
        elif not _is_run(folder):
            yield f"overwrite_output_dir: {folder} does not look like a run folder, so it is not deleted; empty it by hand"


def begin(
    folder: Path, overwrite: bool, recipe_yaml: str, system_message: str | None, environment: dict[str, Any]
) -> None:
    """Make the folder, and write what is known before training."""
    try:
        if overwrite and folder.is_dir() and _is_run(folder):
            _empty(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECIPE).write_text(recipe_yaml, encoding="utf-8")
        (folder / SYSTEM_MESSAGE).write_text(system_message or "", encoding="utf-8")
        (folder / ENVIRONMENT).write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"output_dir: {folder} cannot be written: {why}; name another folder") from None


def finish(folder: Path, metrics: dict[str, Any], log_history: list[dict[str, Any]]) -> None:
    """Write the metrics and the log of a finished run; a number that is not finite, which JSON has not, is null."""
    (folder / METRICS).write_text(json.dumps(_finite(metrics), indent=2) + "\n", encoding="utf-8")
    (folder / LOG).write_text("".join(json.dumps(_finite(entry)) + "\n" for entry in log_history), encoding="utf-8")
    # PEFT leaves a card of blanks to fill in.
    (folder / "README.md").unlink(missing_ok=True)
    # safetensors writes its files for their owner alone, so a group that shares the folder could not load them.
    umask = os.umask(0)
    os.umask(umask)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o666 & ~umask)


def read_facts(file: Path) -> dict[str, Any]:
    """Return what a run folder's `environment.json` or `metrics.json` tells; nothing where it is missing or not whole."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of an earlier version, or of a run that was killed
        return {}
    return content if isinstance(content, dict) else {}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment(context: dict[str, Any], data: dict[str, Any], devices: list[str]) -> dict[str, Any]:
    """Return versions, machine, code, data and launch of a run, without environment variables, which may hold tokens."""
    return {
        "versions": {"qwen_vl_sft": __version__, **{name: _version(name) for name in PACKAGES}},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": devices,
        "git_commit": _git_commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "world": context,
        "data": data,
    }


def _empty(folder: Path) -> None:
    """Empty the folder but keep it: it may be a link to where there is room, or a mount point. Its claim stays."""
    for path in folder.iterdir():
        if is_claim(path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_run(folder: Path) -> bool:
    return (folder / RECIPE).is_file() or any(is_checkpoint_name(path.name) for path in folder.iterdir())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of this code, with `-dirty` if the checkout differs; None outside a checkout of it."""
    # Installed into a virtual environment, it may lie inside the repository of something else.
    if _git("ls-files", "--error-unmatch", __file__) is None:
        return None
    commit = _git("describe", "--always", "--dirty", "--abbrev=40")
    # To `describe`, a module that was never added is no change.
    if commit and not commit.endswith("-dirty") and _git("ls-files", "--others", "--exclude-standard"):
        return f"{commit}-dirty"
    return commit


def _git(*words: str) -> str | None:
    """Return git's output in the folder of this package, None when it fails or prints nothing."""
    try:
        found = subprocess.run(["git", *words], cwd=Path(__file__).parents[1], capture_output=True)
    except OSError:
        return None
    return (found.stdout.decode().strip() or None) if found.returncode == 0 else None
