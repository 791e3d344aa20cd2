"""Encoding: from a conversation to token ids, labels and pixels. One path for training, evaluation and demo."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from qwen_vl_sft.data.boxes import place_boxes
from qwen_vl_sft.data.chat_template import ChatTemplate, with_system_message
from qwen_vl_sft.data.conversation import Conversation, prompt_of
from qwen_vl_sft.data.labels import IGNORE_INDEX, LabelRule, tokenize_turns
from qwen_vl_sft.data.media import MEDIA, EncodedMedia, LookAt, MediaFacts, MediaFile, ReadMedia
from qwen_vl_sft.data.media.patches import PatchNormalizer
from qwen_vl_sft.data.row_digests import row_digests
from qwen_vl_sft.data.row_lengths import RowLength
from qwen_vl_sft.data.thoughts import opens_thought
from qwen_vl_sft.errors import BadRow, OverLongRow
from qwen_vl_sft.families.base import ChatFormat


@dataclass(frozen=True)
class Encoded:
    """One conversation as tensors: T tokens, I images.

    `input_ids`, `labels` [T] int64 (`labels` -100 where no token is a target), `mm_token_type_ids` [T] int64 (1 on image
    tokens, as `Medium.token_type` says), `media` in order of appearance. `row_id` is that of the row it came from.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    mm_token_type_ids: torch.Tensor
    media: tuple[EncodedMedia, ...] = ()
    row_id: int = -1

    @cached_property
    def image_grid_thw(self) -> torch.Tensor:
        """Return the patches of each image in time, height and width: [I, 3] int64."""
        grids = [item.grid for item in self.media if item.kind == "image"]
        return torch.stack(grids) if grids else torch.zeros(0, 3).long()

    @property
    def target_tokens(self) -> int:
        """Count the tokens that the loss is taken of."""
        return int((self.labels != IGNORE_INDEX).sum())

    def without_labels(self) -> Encoded:
        """Return the same row without targets, for filling up a micro-batch."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE_INDEX))


class Encoder:
    """Turns conversations into tensors with a processor of the Qwen-VL family.

    Args:
        processor: tokenizer, image processor with its pixel limits, and chat template.
        system_message: put before conversations that bring none; None leaves the template's own default.
        train_on: "assistant" learns answers and their end-of-turn; "all" every token but visual ones and padding.
        max_length: most tokens of a row, None for no limit. A longer row raises `OverLongRow`: an image is never cut.
        chat: the model family's special tokens and template options; None for those that all of Qwen-VL share.
    """

    def __init__(
        self,
        processor: Any,
        system_message: str | None = None,
        train_on: str = "assistant",
        max_length: int | None = None,
        chat: ChatFormat | None = None,
    ) -> None:
        self.processor = processor
        self.system_message = system_message
        self.train_on = train_on
        self.max_length = max_length
        self._template = template = ChatTemplate(processor, chat or ChatFormat())
        self._rule = LabelRule(template, train_on)
        self.boxes = template.chat.boxes
        self.template_options = dict(template.chat.template_options)
        # What prompts end with and an answer therefore begins with.
        self.opening = f"{template.chat.start_of_thought}\n" if opens_thought(template.chat) else ""
        self.end_of_turn_id = template.end_of_turn_id
        self.pad_token_id = processor.tokenizer.pad_token_id
        self.normalize_patches = PatchNormalizer.of(processor.image_processor)
        self.structural_ids = frozenset(template.ids_of(template.chat.structural))
        self.media_token_ids = {
            kind: template.vocabulary[medium.token(template.chat)] for kind, medium in MEDIA.items()
        }

    def encode(self, conversation: Conversation, read_media: ReadMedia | None = None) -> Encoded:
        """Encode a whole conversation for training. Raises `BadRow` or `OverLongRow`.

        `read_media` may know an image already; default: `read_media` of this encoder.
        """
        conversation = self.with_boxes(conversation)
        ids, is_target = self._tokenize(conversation)
        return self._with_media(ids, is_target, conversation, read_media or self.read_media)

    def encode_prompt(self, conversation: Conversation, read_media: ReadMedia | None = None) -> Encoded:
        """Encode the prompt of the last answer, ready to generate it. Raises `BadRow` or `OverLongRow`.

        `read_media` may know an image already; default: `read_media` of this encoder.
        """
        conversation = self.with_boxes(conversation)
        messages = prompt_of(with_system_message(conversation.messages, self.system_message))
        self._template.check(messages, conversation.tools)
        text = self._template.render(messages, add_generation_prompt=True, tools=conversation.tools)
        ids = self._template.tokenize(text)
        return self._with_media(ids, [False] * len(ids), conversation, read_media or self.read_media)

    def with_boxes(self, conversation: Conversation) -> Conversation:
        """Return the conversation with its boxes as the model writes them. Raises `BadRow`."""
        return place_boxes(conversation, self.boxes, self.processor)

    def read_media(self, file: MediaFile) -> EncodedMedia:
        """Decode what a row shows and cut it into patches. Raises `BadRow`."""
        encoded: EncodedMedia = MEDIA[file.kind].encode(file, self.processor)
        return encoded

    def count_patches(self, file: MediaFile, decode: bool = False) -> int:
        """Count the patches of a file from its header; `decode` also proves its content readable. Raises `BadRow`."""
        return MEDIA[file.kind].count_patches(file, self.processor, decode)

    def look_at(self, file: MediaFile, decode: bool = False, identify: bool = False) -> MediaFacts:
        """Count patches as `count_patches` does; `identify` adds the sides, and the hash of the bytes. Raises `BadRow`."""
        patches = self.count_patches(file, decode)
        return MediaFacts(patches, MEDIA[file.kind].size(file), file.content_hash) if identify else MediaFacts(patches)

    def count_media(self, files: list[MediaFile]) -> int:
        """Count the tokens of these files from their headers. Raises `BadRow`."""
        return sum(self._count_tokens(file, self.count_patches(file)) for file in files)

    def measure(
        self, conversation: Conversation, look: LookAt | None = None, content_hashes: bool = False
    ) -> RowLength:
        """Count tokens and patches from the text and the headers, whatever `max_length` is. Raises `BadRow`.

        `look` may do more than `look_at` of this encoder, or know a file already. `content_hashes` reads the bytes of images
        too, and tells which they are, their sides, and which text the row has.
        """
        conversation = self.with_boxes(conversation)
        ids, is_target = self._tokenize(conversation)
        files = conversation.media
        facts = [(look or partial(self.look_at, identify=content_hashes))(file) for file in files]
        patches = [fact.patches for fact in facts]
        media_tokens = [self._count_tokens(file, count) for file, count in zip(files, patches, strict=True)]
        tokens = len(ids) - len(files) + sum(media_tokens)
        labels = self._rule.labels(torch.tensor(ids), torch.tensor(is_target))
        target_tokens = int((labels[1:] != IGNORE_INDEX).sum())
        prefix = self._prefix(ids, is_target, files, patches, media_tokens)
        length = RowLength(tokens, target_tokens, len(files), sum(patches), *prefix, answer_tokens=sum(is_target))
        if not content_hashes:
            return length
        hashes = [fact.content_hash for fact in facts]
        question, answer = row_digests(conversation, hashes)
        sides = [side for fact in facts for side in fact.size]
        return replace(
            length, content_hashes=hashes, image_patches=patches, image_sides=sides, question=question, answer=answer
        )

    def _tokenize(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        messages = with_system_message(conversation.messages, self.system_message)
        if self.train_on == "all" and not all(message.get("learned", True) for message in messages):
            raise BadRow(
                "has a turn that is not to be learned, and train_on: all learns them all; set train_on: assistant"
            )
        return tokenize_turns(self._template, messages, conversation.tools)

    def _prefix(
        self, ids: list[int], is_target: list[bool], files: list[MediaFile], patches: list[int], media_tokens: list[int]
    ) -> tuple[str, int, int, str, int]:
        """Return `RowLength.prefix` and `opening` with their costs, from ids with one token for each picture."""
        before_answers = ids[: is_target.index(True)] if True in is_target else ids
        shown = [place for place, token in enumerate(before_answers) if token in self.media_token_ids.values()]
        if not shown:
            return "", 0, 0, "", 0
        # A picture is closed by one more token; the tokenizer never merges text into it.
        stop, count = shown[-1] + 2, len(shown)
        digest = hashlib.sha256(repr(ids[:stop]).encode())
        for file in files[:count]:
            digest.update(hashlib.sha256(file.origin).digest())
        opening = hashlib.blake2b(repr(ids[: shown[0]]).encode(), digest_size=16).hexdigest()
        tokens = stop - count + sum(media_tokens[:count])
        return digest.hexdigest(), tokens, sum(patches[:count]), opening, shown[0]

    def _with_media(
        self, ids: list[int], is_target: list[bool], conversation: Conversation, read_media: ReadMedia
    ) -> Encoded:
        """Read what is shown, and repeat its token as often as it has tokens."""
        media = tuple(read_media(file) for file in conversation.media)
        input_ids = torch.tensor(ids)
        repeats = torch.ones_like(input_ids)
        is_media = torch.isin(input_ids, torch.tensor([*self.media_token_ids.values()]))
        counts = [self._count_tokens(item, int(item.grid.prod())) for item in media]
        repeats[is_media] = torch.tensor(counts, dtype=torch.long)
        input_ids = input_ids.repeat_interleave(repeats)
        self.check_length(len(input_ids))
        labels = self._rule.labels(input_ids, torch.tensor(is_target).repeat_interleave(repeats))
        token_types = torch.zeros_like(input_ids)
        for kind, token_id in self.media_token_ids.items():
            token_types[input_ids == token_id] = MEDIA[kind].token_type
        return Encoded(input_ids, labels, token_types, media)

    def _count_tokens(self, item: MediaFile | EncodedMedia, patches: int) -> int:
        return MEDIA[item.kind].count_tokens(patches, self.processor)

    def check_length(self, tokens: int) -> None:
        """Raise `OverLongRow` for a row of more tokens than `max_length`."""
        if self.max_length is not None and tokens > self.max_length:
            raise OverLongRow(f"has {tokens} tokens, more than max_length {self.max_length}")
