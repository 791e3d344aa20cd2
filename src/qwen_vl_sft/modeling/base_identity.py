"""Identify a base model by its commit or its files: two models of one shape fit the same adapter and optimizer."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.modeling.base_model import load_config

# How the identity of a local folder begins.
FOLDER = "a folder of weights"
# Of each file so many pieces, evenly spread: tens of megabytes are read of a model of many gigabytes.
_PIECES, _PIECE_BYTES = 64, 64 * 1024


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
