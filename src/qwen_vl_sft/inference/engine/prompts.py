"""Prompts that wait for the model: groups of rows that begin alike, packed piece by piece into one prefill."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from qwen_vl_sft.batching.packed_collator import prefix_length
from qwen_vl_sft.batching.positions import Positions
from qwen_vl_sft.data.encoding import Encoded
from qwen_vl_sft.data.media.image import EncodedImage
from qwen_vl_sft.families.base import StateStep


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt of T tokens with its M-RoPE positions [3, T]; `number` is the caller's name for it."""

    number: int
    row: Encoded
    positions: torch.Tensor

    def __len__(self) -> int:
        return len(self.row.input_ids)


@dataclass
class Head:
    """The text before the first image, which prompts on any images begin with: the system message.

    `slots` are those of its `tokens` [T] in the cache, `state` that of what layers carry from its last token on, and
    `users` counts the groups that begin with it and have not ended.
    """

    tokens: torch.Tensor
    slots: Sequence[int]
    state: int
    users: int = 0

    def in_common(self, row: Encoded) -> int:
        """Count the tokens that a row begins with too; its last one is never among them."""
        length = min(len(self.tokens), len(row.input_ids) - 1)
        same = self.tokens[:length] == row.input_ids[:length]
        return int(same.long().cumprod(0).sum())


@dataclass
class Group:
    """Prompts that wait and have their first `shared` tokens in common.

    The first `begun` tokens are those of `head`. `prefix` are the slots of the others of those in common, once they are
    computed; they are held until the last row of the group has ended, and `users` counts the rows that have not. `state`
    is the slot of what layers carry from the last one on.
    """

    shared: int
    waiting: deque[Prompt]
    users: int
    head: Head | None = None
    begun: int = 0
    prefix: list[int] = field(default_factory=list)
    state: int | None = None

    def begin_with(self, head: Head, begun: int) -> None:
        """Take the first tokens from a head."""
        head.users += 1
        self.head, self.begun = head, begun

    @property
    def can_begin_anew(self) -> bool:
        """Return whether nothing is computed yet, and it begins with a part of its head alone."""
        computed = bool(self.prefix) or len(self.waiting) < self.users
        return not computed and self.head is not None and self.begun < len(self.head.slots)

    def begin_anew(self) -> None:
        """Take nothing from the head."""
        assert self.can_begin_anew
        assert self.head is not None
        self.head.users -= 1
        self.head, self.begun = None, 0

    @property
    def known(self) -> int:
        """Count the tokens that each row begins with and does not compute itself."""
        return max(self.shared, self.begun)

    @property
    def missing(self) -> int:
        """Count the tokens in common that have yet to be computed."""
        return 0 if self.prefix else self.known - self.begun

    @property
    def before(self) -> list[int]:
        """Return the slots of the tokens that each row begins with."""
        return [*(self.head.slots[: self.begun] if self.head else ()), *self.prefix]

    @property
    def begin(self) -> int | None:
        """Return the slot of the state that each row goes on from."""
        return self.state if self.state is not None or self.head is None else self.head.state

    @property
    def tokens(self) -> int:
        """Count the tokens that have yet to be computed."""
        return self.missing + sum(len(prompt) - self.known for prompt in self.waiting)


@dataclass(frozen=True)
class Piece:
    """A run of tokens of a prompt, in `slots` of the cache, behind the tokens in the slots `before`.

    With `answers` the model's next token is wanted: the piece ends its prompt. What layers carry from token to token goes
    on from the slot `begin`, None at the beginning of a prompt, and is left in the slot `end`.
    """

    prompt: Prompt
    start: int
    stop: int
    slots: Sequence[int]
    before: Sequence[int]
    answers: bool
    begin: int | None
    end: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def images(self) -> tuple[EncodedImage, ...]:
        """Return the images of the prompt that stand in this piece: all, or none in what follows a shared prefix."""
        return self.prompt.row.media if bool(self.prompt.row.mm_token_type_ids[self.start : self.stop].any()) else ()


@dataclass(frozen=True)
class PackedPrompts:
    """Pieces in one sequence of T tokens.

    `input_ids` [1, T], `position_ids` [3, 1, T], `images` in order of appearance, `last` [N] the positions of the tokens
    that predict an answer's first, and what `PrefillStep` needs.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    images: list[EncodedImage]
    last: torch.Tensor
    write: torch.Tensor
    read: torch.Tensor | None
    bounds_q: torch.Tensor
    bounds_k: torch.Tensor
    longest_q: int
    longest_k: int
    states: StateStep


def group_prompts(numbered: Sequence[tuple[int, Encoded]], positions: Positions) -> list[Group]:
    """Group prompts that begin with the same tokens and images, up to the last image; others stand alone."""
    found: dict[object, list[Prompt]] = {}
    for number, row in numbered:
        prompt = Prompt(number, row, positions(row))
        shared = prefix_length(row)
        images = tuple(image.content_hash for image in row.media)
        key = (row.input_ids[:shared].numpy().tobytes(), images) if shared else number
        found.setdefault(key, []).append(prompt)
    return [
        Group(prefix_length(prompts[0].row) if len(prompts) > 1 else 0, deque(prompts), len(prompts))
        for prompts in found.values()
    ]


def text_before_image(row: Encoded) -> int:
    """Count the tokens before a row's first image, and of a row without images none."""
    image = row.mm_token_type_ids.nonzero()
    return int(image[0]) if len(image) else 0


def pack(pieces: Sequence[Piece]) -> PackedPrompts:
    """Pack pieces one after another."""
    lengths = [len(piece) for piece in pieces]
    reach = [len(piece.before) + len(piece) for piece in pieces]
    ends = list(itertools.accumulate(lengths))
    seen = [slot for piece in pieces for slot in (*piece.before, *piece.slots)] if lengths != reach else None
    return PackedPrompts(
        torch.cat([piece.prompt.row.input_ids[piece.start : piece.stop] for piece in pieces])[None],
        torch.cat([piece.prompt.positions[:, piece.start : piece.stop] for piece in pieces], dim=1)[:, None],
        [image for piece in pieces for image in piece.images],
        torch.tensor([end - 1 for piece, end in zip(pieces, ends, strict=True) if piece.answers]),
        torch.tensor([slot for piece in pieces for slot in piece.slots]),
        None if seen is None else torch.tensor(seen),
        torch.tensor([0, *ends], dtype=torch.int32),
        torch.tensor([0, *itertools.accumulate(reach)], dtype=torch.int32),
        max(lengths),
        max(reach),
        StateStep(lengths, [piece.begin for piece in pieces], [piece.end for piece in pieces]),
    )
