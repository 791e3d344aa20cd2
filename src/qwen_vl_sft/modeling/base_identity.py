"""Identify a base model by its commit or its files: two models of one shape fit the same adapter and optimizer."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import try_to_load_from_cache

from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.modeling.base_model import load_config

# How the identity of a local folder begins.
FOLDER = "a folder of weights"
# Of each file so many pieces, evenly spread: tens of megabytes are read of a model of many gigabytes.
_PIECES, _PIECE_BYTES = 64, 64 * 1024
# Of each tensor so many runs of values: a few megabytes of any model.
_RUNS, _RUN = 4, 512
_FLOATS = {"BF16": None, "F16": np.float16, "F32": np.float32}


def identity_of_base(settings: ModelSettings) -> str:
    """Return name and commit of a Hub model, or a digest of a local folder's configuration and weights.

    Raises `UserError` where it cannot be read.
    """
    folder = Path(str(settings.model_name_or_path)).expanduser()
    if not folder.is_dir():
        commit = getattr(load_config(settings), "_commit_hash", None)
        return f"{settings.model_name_or_path} at {commit or settings.model_revision}"
    try:
        return f"{FOLDER} {_digest(folder)[:16]}"
    except OSError as error:
        raise UserError(
            f"model_name_or_path: {folder} cannot be read: {error.strerror}: {error.filename}; name a whole model"
        ) from None


def weights_of_base(settings: ModelSettings) -> dict[str, str] | None:
    """Return a digest of each tensor of a base model by its name, from samples of its values in bfloat16.

    The same weights give the same digests in other files, under another folder or name on the Hub, or in another precision
    of 16 or 32 bits. None where the weights are not in safetensors on this machine.
    """
    folder = Path(str(settings.model_name_or_path)).expanduser()
    if not folder.is_dir():
        config = try_to_load_from_cache(str(folder), "config.json", revision=settings.model_revision)
        folder = Path(config).parent if isinstance(config, str) else folder
    try:
        return {
            name: digest for file in sorted(folder.glob("*.safetensors")) for name, digest in _tensors(file)
        } or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def digest_of_weights(weights: Mapping[str, str]) -> str:
    """Return one digest of all tensors, whatever their names: libraries name them differently, and store tied ones twice."""
    return hashlib.sha256("".join(sorted(set(weights.values()))).encode()).hexdigest()[:16]


def _tensors(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path} is no safetensors file")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        yield name, _sampled(path, entry["dtype"], entry["shape"], 8 + length + begin, end - begin)


def _sampled(path: Path, dtype: str, shape: list[int], begin: int, size: int) -> str:
    count = math.prod(shape)
    width = size // count if count else 1
    digest = hashlib.sha256(f"{shape} {dtype if dtype not in _FLOATS else 'float'}".encode())
    run = min(count, _RUN)
    data = np.memmap(path, mode="r", offset=begin, shape=(size,)) if size else np.empty(0, np.uint8)
    for number in range(_RUNS):
        start = number * (count - run) // (_RUNS - 1)
        values = bytes(data[start * width : (start + run) * width])
        digest.update(_in_bfloat16(values, dtype) if dtype in _FLOATS else values)
    return digest.hexdigest()[:16]


def _in_bfloat16(values: bytes, dtype: str) -> bytes:
    """Return floats rounded to bfloat16, to the nearest and to even, as PyTorch does."""
    if dtype == "BF16":
        return values
    bits = np.frombuffer(values, _FLOATS[dtype]).astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for number in range(_PIECES):
                file.seek(number * max(size - _PIECE_BYTES, 0) // (_PIECES - 1))
                digest.update(file.read(_PIECE_BYTES))
                if size <= _PIECE_BYTES:
                    break
    return digest.hexdigest()
