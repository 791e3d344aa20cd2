"""A cache of a frozen vision tower's outputs on disk: one file an image, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from qwen_vl_sft.atomic_write import PARTIAL
from qwen_vl_sft.data.media.image import EncodedImage
from qwen_vl_sft.data.media.image_file import ImageFile
from qwen_vl_sft.errors import BadRow

BYTES = {"bfloat16": 2, "int8": 1, "float32": 4}
# Tensors in these files start after a header of about so many bytes.
_HEADER = 300
_ABOUT = "about.json"
# A half file that nothing has added to for so long was left by a run that was killed.
_STALE_SECONDS = 3600


@dataclass(frozen=True)
class FeatureCache:
    """A folder of features that all come from the same tower, precision and pixel limits, stored in the same format.

    An image has M merged tokens of `width` values: those that the tower's merger gives and, for Qwen3-VL, those of each
    deeper layer beside them, `parts` of equal width in all. `storage` is what a value is written as: "bfloat16" and
    "float32" as they are, "int8" in 255 steps with a float32 scale for each token and part, its largest value. That is
    0.9% off (root mean square, normally distributed values, width 3,584), bfloat16 0.17%; see
    `tests/integration/test_image_features.py`.
    """

    folder: Path
    storage: str
    width: int
    parts: int

    def path(self, content_hash: str) -> Path:
        """Return the file of an image."""
        return self.folder / content_hash[:2] / f"{content_hash}.safetensors"

    def size(self, tokens: int) -> int:
        """Estimate the bytes of the file of an image with this many merged tokens."""
        scales = 4 * self.parts if self.storage == "int8" else 0
        return tokens * (self.width * BYTES[self.storage] + scales) + _HEADER

    def write(self, content_hash: str, features: torch.Tensor, grid: torch.Tensor) -> None:
        """Store the features [M, width] of an image of `grid` [3] patches. Raises `OSError`."""
        tensors = {"grid": grid.cpu().long(), **self.pack(features)}
        data = safetensors.torch.save(tensors, {"sha256": _digest(tensors)})
        path = self.path(content_hash)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another run may be writing the same image; the last one to finish wins, with the same content.
        partial = path.with_name(f"{content_hash}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            partial.write_bytes(data)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def read(self, content_hash: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Read features [M, width], bfloat16 or float32, and grid [3] of an image. Raises `OSError` or `SafetensorError`."""
        tensors = safetensors.torch.load_file(self.path(content_hash))
        return self.unpack(tensors), tensors["grid"]

    def read_image(self, file: ImageFile) -> EncodedImage:
        """Return an image with its features instead of pixels, undecoded. Raises `BadRow` when they are not there."""
        content_hash = file.content_hash
        try:
            features, grid = self.read(content_hash)
        except (OSError, safetensors.SafetensorError) as error:
            reason = "they were not computed" if isinstance(error, FileNotFoundError) else str(error)
            raise BadRow(
                f"shows an image whose features cannot be read from {self.path(content_hash)}: {reason}"
            ) from None
        return EncodedImage(content_hash, grid, features=features)

    def holds(self, content_hash: str) -> bool:
        """Tell whether an image has a file, without looking into it."""
        return self.path(content_hash).is_file()

    def is_sound(self, content_hash: str) -> bool:
        """Tell whether an image has a file that is whole, by its length and by the digest in it."""
        try:
            with safetensors.safe_open(self.path(content_hash), "pt") as file:
                stated = (file.metadata() or {}).get("sha256")
                return stated == _digest({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, safetensors.SafetensorError):
            return False

    def pack(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return features [M, width] as they are stored, on the CPU: `values`, for "int8" with `scales` [M, parts]."""
        assert features.shape[1] == self.width, f"{features.shape[1]} values a token, not {self.width}"
        if self.storage != "int8":
            return {"values": features.to(getattr(torch, self.storage)).cpu().contiguous()}
        parts = features.float().unflatten(1, (self.parts, -1))
        scales = parts.abs().amax(-1) / 127
        values = (parts / scales.clamp(min=1e-30)[..., None]).round().to(torch.int8).flatten(1)
        return {"values": values.cpu().contiguous(), "scales": scales.cpu().contiguous()}

    def unpack(self, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return what `pack` stored as features [M, width]."""
        values = stored["values"]
        if self.storage != "int8":
            return values
        return (values.unflatten(1, (self.parts, -1)) * stored["scales"][..., None]).flatten(1)

    def begin(self, about: dict[str, Any]) -> None:
        """Create the folder, record where its features come from, and remove the half-written files of killed runs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _ABOUT).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for half in self.folder.glob(f"*/*{PARTIAL}"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - half.stat().st_mtime > _STALE_SECONDS:
                    half.unlink()


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        add_to_digest(digest, name, tensors[name])
    return digest.hexdigest()


def add_to_digest(digest: Any, name: str, tensor: torch.Tensor) -> None:
    """Add a tensor's name, type, shape and every bit to a digest of hashlib."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
