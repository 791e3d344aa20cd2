"""The list of files to publish, without local paths; a file with the token is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import get_token

from qwen_vl_sft.checkpointing.run_folder import (
    ENVIRONMENT,
    EXPERT_LOAD_PLOT,
    LOG,
    LOSS_PLOT,
    METRICS,
    RECIPE,
    SYSTEM_MESSAGE,
)
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.evaluation.scoring import SUMMARY_FILE
from qwen_vl_sft.inference.source import FULL_MODEL_FILES
from qwen_vl_sft.merging.folder import PROCESSOR_FILES
from qwen_vl_sft.merging.plan import REPORT_FILE as MERGE_FILE
from qwen_vl_sft.modeling.adapter_layout import ADAPTER_CONFIG, ADAPTER_FILE
from qwen_vl_sft.publishing.names import public_name, without_paths
from qwen_vl_sft.publishing.published_model import PublishedModel

CARD = "README.md"
EVALUATION = f"evaluation/{SUMMARY_FILE}"
_INDEX = FULL_MODEL_FILES[1]
# The names of all files of a push but the card: what the next one no longer brings it may delete.
LISTING = "published.json"
# Read as text; the others are weights, the vocabulary and the plot.
_TEXTS = (".json", ".jsonl", ".yaml", ".txt", ".md", ".jinja")
_LARGE_TEXTS = ("tokenizer.json", "vocab.json", _INDEX)
_PIECE = 2**20


@dataclass(frozen=True)
class PublishedFile:
    """A file as it will be on the Hub: `content` is the local file, or the text where it differs from that."""

    path: str
    content: Path | bytes
    size: int
    sha256: str
    git_sha1: str


def collect_files(published: PublishedModel, card: str | None) -> list[PublishedFile]:
    """List all files to publish, the card first. Raises `UserError` if one contains the token."""
    folder, home = published.folder, published.home
    contents: dict[str, Path | bytes] = {} if card is None else {CARD: card.encode()}
    for name in _weights(published):
        contents[name] = folder / name
    if published.adapter is not None:
        contents[ADAPTER_CONFIG] = _json(published.adapter | {"base_model_name_or_path": published.base})
    else:
        contents |= _first({"config.json": _clean, "generation_config.json": _clean, MERGE_FILE: _clean}, [folder])
    # A checkpoint may hold weights alone; the run around it has the processor.
    contents |= _first(dict.fromkeys(PROCESSOR_FILES, _processor), [folder, home])
    contents |= _first({SYSTEM_MESSAGE: None, ENVIRONMENT: _environment}, [home])
    contents[RECIPE] = _recipe(published)
    if published.step is None:
        contents |= _first({METRICS: _metrics, LOG: None, LOSS_PLOT: None, EXPERT_LOAD_PLOT: None}, [home])
    if published.evaluation is not None:
        contents[EVALUATION] = _json(_summary(published.evaluation))
    # The card may have become its reader's own (`keep_card`), so it is never deleted.
    contents[LISTING] = _json({"files": sorted({*contents, LISTING} - {CARD})})
    files = [_measured(path, content) for path, content in contents.items()]
    _check_no_token(files)
    return files


def _weights(published: PublishedModel) -> list[str]:
    folder = published.folder
    if published.is_adapter:
        return [ADAPTER_FILE]
    index = folder / _INDEX
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise UserError(f"--run: {folder} lacks {missing[0]}, which its {_INDEX} names; copy the whole model")
        return [_INDEX, *shards]
    return [FULL_MODEL_FILES[0]]


def _first(
    names: dict[str, Callable[[dict[str, Any]], dict[str, Any]] | None], folders: Sequence[Path]
) -> dict[str, Path | bytes]:
    """Take each file from the first of `folders` that has it; JSON goes through the function given with its name."""
    found: dict[str, Path | bytes] = {}
    for name, change in names.items():
        path = next((candidate / name for candidate in folders if (candidate / name).is_file()), None)
        if path is None:
            continue
        found[name] = path
        if change is not None and path.suffix == ".json" and name not in _LARGE_TEXTS:
            before = json.loads(path.read_text(encoding="utf-8"))
            after = change(before)
            found[name] = path if before == after else _json(after)
    return found


def _clean(value: dict[str, Any]) -> dict[str, Any]:
    return without_paths(value)


def _processor(value: dict[str, Any]) -> dict[str, Any]:
    # Templates and special tokens, which may look like paths, must stay to the letter.
    names = ("name_or_path", "tokenizer_file")
    return value | {name: without_paths(value[name]) for name in names if name in value}


def _environment(value: dict[str, Any]) -> dict[str, Any]:
    # The resolved recipe has what the command set.
    return without_paths({name: entry for name, entry in value.items() if name != "command"})


def _metrics(value: dict[str, Any]) -> dict[str, Any]:
    # What became of pushes concerns this folder, not the model.
    return without_paths({name: entry for name, entry in value.items() if name != "push"})


def _summary(value: dict[str, Any]) -> dict[str, Any]:
    environment = {name: entry for name, entry in (value.get("environment") or {}).items() if name != "command"}
    return without_paths(value | {"environment": environment})


def _recipe(published: PublishedModel) -> bytes:
    """Return the resolved recipe with public names and without the keys of publishing."""
    path = published.home / RECIPE
    text = path.read_text(encoding="utf-8")
    notes = "".join(f"{line}\n" for line in text.splitlines() if line.startswith("#"))
    values = {
        name: value for name, value in yaml.safe_load(text).items() if not name.startswith(("hub_", "push_to_hub"))
    }
    base = values.get("model_name_or_path")
    values["model_name_or_path"] = published.base or (public_name(base) if base else base)
    if values.get("dataset_name"):
        values["dataset_name"] = public_name(values["dataset_name"])
    if values.get("output_dir"):
        values["output_dir"] = f"runs/{Path(values['output_dir']).name}"
    message = values.get("system_message")
    values = without_paths(values) | ({"system_message": message} if "system_message" in values else {})
    return (notes + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)).encode()


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


def _measured(path: str, content: Path | bytes) -> PublishedFile:
    """Compute size and both digests that the Hub states: SHA-256 for large files, git's SHA-1 for small ones."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    if isinstance(content, bytes):
        sha256.update(content)
        sha1.update(content)
    else:
        with content.open("rb") as file:
            while piece := file.read(_PIECE):
                sha256.update(piece)
                sha1.update(piece)
    return PublishedFile(path, content, size, sha256.hexdigest(), sha1.hexdigest())


def _check_no_token(files: Sequence[PublishedFile]) -> None:
    token = get_token()
    if not token:
        return
    for file in files:
        if file.path.endswith(_TEXTS) and not file.path.endswith(_LARGE_TEXTS):
            text = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
            if token.encode() in text:
                raise UserError(
                    f"push: {file.path} holds the token you are logged in with; take it out, and make a new token, since"
                    f" this one was written to a file"
                )
