"""The interface of a medium: everything that reading, measuring, encoding and showing a picture or a film depends on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from qwen_vl_sft.families.base import ChatFormat

File = TypeVar("File")
Encoded = TypeVar("Encoded")


class Medium(Protocol[File, Encoded]):
    """A kind of content of rows other than text.

    A file is what a row brings, not decoded yet. It has a `kind` (the medium's), an `origin` and a `content_hash`, and a
    `path` if its content is a file on disk, as `ImageFile` has. Encoded, it has its `kind`, its `content_hash` and its
    `grid` [3] int64, as `EncodedImage` has.

    Attributes:
        kind: type of its content parts ("image"); rows bring it in a column of this name, several in one with an s.
        placeholder: stands for it inside the text of a row ("<image>").
        token_type: the value of these tokens in `mm_token_type_ids`.
    """

    kind: str
    placeholder: str
    token_type: int

    def file(self, value: Any, folder: Path | None) -> File:
        """Return the value of a column as a file; paths are relative to `folder`. Raises `BadRow`."""

    def token(self, chat: ChatFormat) -> str:
        """Return its text in the chat template: once for the placeholder, then for each of its tokens."""

    def count_patches(self, file: File, processor: Any, decode: bool = False) -> int:
        """Count patches from the header alone; `decode` also proves the content readable. Raises `BadRow`."""

    def size(self, file: File) -> tuple[int, int]:
        """Return width and height in pixels from the header, before it is turned upright. Raises `BadRow`."""

    def count_tokens(self, patches: int, processor: Any) -> int:
        """Count the tokens of this many patches."""

    def encode(self, file: File, processor: Any) -> Encoded:
        """Decode a file and cut it into patches. Raises `BadRow`."""

    def model_inputs(self, encoded: Sequence[Encoded], in_bytes: bool = False) -> dict[str, torch.Tensor]:
        """Return the arguments of the model's forward for these, one after another; empty for none.

        With `in_bytes` pixels are left for `PatchNormalizer`.
        """

    def describe(self, encoded: Encoded, processor: Any) -> str:
        """Describe it for the preview, in place of its tokens."""
