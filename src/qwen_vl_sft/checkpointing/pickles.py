"""Check the pickles of a checkpoint before DeepSpeed and FSDP load them without restrictions.

transformers restricts what it unpickles itself to tensors and plain data. DeepSpeed's states, and the index and the numbers
of PyTorch's distributed checkpoints, are loaded without restrictions, so a crafted file could run code.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as index_types
from torch.distributed.checkpoint.filesystem import _StorageInfo

_DEEPSPEED_TAG, _DEEPSPEED_LATEST = "global_step", "latest"
_FSDP_INDEX = ".metadata"
# What the index holds besides the types of `torch.distributed.checkpoint.metadata`.
_IN_INDEX = {
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    (_StorageInfo.__module__, _StorageInfo.__name__),
    ("torch.serialization", "_get_layout"),
}


def problem_of_pickles(folder: Path) -> str | None:
    """Return what in a checkpoint could run code on a resume, and why; None if it is tensors and plain data."""
    looked_at = {
        f"{_DEEPSPEED_TAG}*/**/*.pt": _problem_of_state,
        _DEEPSPEED_LATEST: _problem_of_tag,
        f"**/{_FSDP_INDEX}": _problem_of_index,
    }
    for pattern, problem_of in looked_at.items():
        for path in sorted(folder.glob(pattern)):
            problem = problem_of(path)
            if problem:
                return f"{path.relative_to(folder)} {problem}"
    return None


def _problem_of_tag(path: Path) -> str | None:
    tag = path.read_text(encoding="utf-8").strip()
    return None if tag.removeprefix(_DEEPSPEED_TAG).isdigit() else f"names {tag!r}, which is no step"


def _problem_of_state(path: Path) -> str | None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # Plain data of DeepSpeed's own.
    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        # Mapped, so that only the pickle is read and none of the tensors.
        return _refused(path, mmap=True)


def _problem_of_index(path: Path) -> str | None:
    try:
        index = _IndexReader(io.BytesIO(path.read_bytes())).load()
        stored = [(index.state_dict_metadata[place.fqn], info) for place, info in index.storage_data.items()]
    except Exception as error:
        return f"cannot be read safely: {_first_line(error)}"
    for kind, info in stored:
        # Tensors are loaded with restrictions.
        if isinstance(kind, index_types.BytesStorageMetadata):
            file = path.parent / info.relative_path
            if file.resolve().parent != path.parent.resolve():
                return f"names {info.relative_path}, which lies elsewhere"
            with file.open("rb") as parts:
                parts.seek(info.offset)
                problem = _refused(io.BytesIO(parts.read(info.length)))
            if problem:
                return f"names a part of {info.relative_path} that {problem}"
    return None


class _IndexReader(pickle.Unpickler):
    """Unpickles only the types that the index of a distributed checkpoint consists of."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a type of `_IN_INDEX`, of the index itself, or a dtype."""
        if module == index_types.__name__ and isinstance(getattr(index_types, name, None), type):
            found: Any = getattr(index_types, name)
            if found.__module__ == module:
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _IN_INDEX:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _refused(file: Any, **options: Any) -> str | None:
    """Return why PyTorch does not load a file with restrictions."""
    try:
        torch.load(file, map_location="cpu", weights_only=True, **options)
    except Exception as error:
        return f"cannot be read safely: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Before it, PyTorch's advice is to trust the file.
    found = [line for line in lines if "unsupported" in line.lower() and not line.startswith("Weights only")]
    return (found or lines or [type(error).__name__])[0][:200].rstrip(".")
