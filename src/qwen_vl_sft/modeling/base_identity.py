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
# With more tensors one run of each.
_MANY = 2000
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
        files = {file: _header(file) for file in sorted(folder.glob("*.safetensors"))}
        # A mixture of experts may have tens of thousands of tensors, on a slow disk.
        runs = _RUNS if sum(map(len, files.values())) <= _MANY else 1
        return {name: digest for file, header in files.items() for name, digest in _tensors(file, header, runs)} or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def digest_of_weights(weights: Mapping[str, str]) -> str:
    """Return one digest of all tensors, whatever their names: libraries name them differently, and store tied ones twice."""
    return hashlib.sha256("".join(sorted(set(weights.values()))).encode()).hexdigest()[:16]


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """Return type, shape and place of each tensor in a file of safetensors; the place counts from the file's beginning."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path} is no safetensors file")
        header: dict[str, dict[str, Any]] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: entry | {"place": [8 + length + offset for offset in entry["data_offsets"]]}
        for name, entry in header.items()
    }


def _tensors(path: Path, header: Mapping[str, Mapping[str, Any]], runs: int) -> Iterator[tuple[str, str]]:
    data = np.memmap(path, mode="r")
    for name, entry in header.items():
        begin, end = entry["place"]
        yield name, _sampled(data[begin:end], entry["dtype"], entry["shape"], runs)


def _sampled(data: Any, dtype: str, shape: list[int], runs: int) -> str:
    count = math.prod(shape)
    width = len(data) // count if count else 1
    digest = hashlib.sha256(f"{shape} {dtype if dtype not in _FLOATS else 'float'}".encode())
    length = min(count, _RUN)
    for number in range(runs):
        start = (number + 1) * (count - length) // (runs + 1)
        values = bytes(data[start * width : (start + length) * width])
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
