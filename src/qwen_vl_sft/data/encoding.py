"""From a conversation to what the model reads: token ids, labels, pixels. One path for training, evaluation and demo.

A turn's prompt and its answer are tokenized apart and joined, so that the prompt's token ids in training are exactly
those of generation. Which tokens are learned follows from that construction; no text is searched for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from qwen_vl_sft.data.encoded_image import EncodedImage, ReadImage
from qwen_vl_sft.data.image_file import ImageFile
from qwen_vl_sft.data.row_lengths import RowLength
from qwen_vl_sft.data.rows import Conversation
from qwen_vl_sft.errors import BadRow, OverLongRow, UserError

IGNORE_INDEX = -100
END_OF_TURN = "<|im_end|>"
# Tokens that give a conversation its structure: inside a text they would forge a turn or an image.
STRUCTURAL_TOKENS = (
    "<|im_start|>",
    END_OF_TURN,
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_END_OF_THOUGHT = "</think>"
# What the tutorial's collator leaves out of the loss when it trains on everything.
VISUAL_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


@dataclass(frozen=True)
class Encoded:
    """One conversation as tensors: T tokens, I images.

    `input_ids`, `labels` [T] int64 (`labels` -100 where nothing is learned), `mm_token_type_ids` [T] int64 (1 on image
    tokens), `images` in order of appearance. `row_id` is that of the row it came from.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    mm_token_type_ids: torch.Tensor
    images: tuple[EncodedImage, ...] = ()
    row_id: int = -1

    @cached_property
    def image_grid_thw(self) -> torch.Tensor:
        """Patches of each image in time, height and width: [I, 3] int64."""
        return torch.stack([image.grid for image in self.images]) if self.images else torch.zeros(0, 3).long()

    def without_labels(self) -> Encoded:
        """The same row with nothing to learn, for filling up a micro-batch."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE_INDEX))


class Encoder:
    """Turns conversations into tensors with a processor of the Qwen-VL family.

    Args:
        processor: tokenizer, image processor with its pixel limits, and chat template.
        system_message: put before conversations that bring none; None leaves the template's own default.
        train_on: "assistant" learns answers and their end-of-turn; "all" every token but visual ones and padding.
        max_length: most tokens of a row, None for no limit. A longer row raises `OverLongRow`: an image is never cut.
    """

    def __init__(
        self,
        processor: Any,
        system_message: str | None = None,
        train_on: str = "assistant",
        max_length: int | None = None,
    ) -> None:
        self.processor = processor
        self.system_message = system_message
        self.train_on = train_on
        self.max_length = max_length
        tokenizer = processor.tokenizer
        vocabulary = tokenizer.get_vocab()
        self.image_token_id = vocabulary["<|image_pad|>"]
        self.end_of_turn_id = vocabulary[END_OF_TURN]
        self.pad_token_id = tokenizer.pad_token_id
        self.structural_ids = frozenset(vocabulary[token] for token in STRUCTURAL_TOKENS if token in vocabulary)
        self._never_learned = torch.tensor([vocabulary[token] for token in VISUAL_TOKENS if token in vocabulary])

    def encode(self, conversation: Conversation, read_image: ReadImage | None = None) -> Encoded:
        """Encode a whole conversation for training. Raises `BadRow` or `OverLongRow`.

        `read_image` may know an image already; default: `read_image` of this encoder.
        """
        ids, learned = self._tokenize(self._with_system_message(conversation.messages))
        return self._with_images(ids, learned, conversation, read_image or self.read_image)

    def encode_prompt(self, conversation: Conversation) -> Encoded:
        """Encode everything before the last assistant turn, ready to generate that turn."""
        messages = self._with_system_message(conversation.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        self._check_texts(messages)
        ids = self._ids(self._render(messages, add_generation_prompt=True))
        return self._with_images(ids, [False] * len(ids), conversation, self.read_image)

    def read_image(self, file: ImageFile) -> EncodedImage:
        """Decode an image, resize it and cut it into patches. Raises `BadRow`."""
        batch = self.processor.image_processor(images=[file.decode()], return_tensors="pt")
        return EncodedImage(file.digest, batch["image_grid_thw"][0], batch["pixel_values"])

    def measure(self, conversation: Conversation, decode: bool = False, image_keys: bool = False) -> RowLength:
        """Count tokens and patches from the text and the image headers; `decode` also proves the pixels readable.

        `image_keys` reads the images' bytes too, and tells which images there are.
        """
        ids, learned = self._tokenize(self._with_system_message(conversation.messages))
        images = [file.decode() if decode else file.open() for file in conversation.images]
        processor = self.processor.image_processor
        patches = [processor.get_number_of_image_patches(image.height, image.width, {}) for image in images]
        tokens = len(ids) - len(images) + sum(count // processor.merge_size**2 for count in patches)
        self._check_length(tokens)
        masked = self._labels(torch.tensor(ids), torch.tensor(learned))
        count = int((masked[1:] != IGNORE_INDEX).sum())
        prefix = self._prefix(ids, learned, conversation, patches)
        found = ([file.digest for file in conversation.images], patches) if image_keys else ([], [])
        return RowLength(tokens, count, len(images), sum(patches), *prefix, *found)

    def _prefix(
        self, ids: list[int], learned: list[bool], conversation: Conversation, patches: list[int]
    ) -> tuple[str, int, int]:
        """`Lengths.prefix` and what it costs, from ids with one image token an image."""
        before_answers = ids[: learned.index(True)] if True in learned else ids
        images = before_answers.count(self.image_token_id)
        if not images:
            return "", 0, 0
        # An image is closed by one more token; the tokenizer never merges text into it.
        seam = len(before_answers) - before_answers[::-1].index(self.image_token_id) + 1
        digest = hashlib.sha256(repr(ids[:seam]).encode())
        for file in conversation.images[:images]:
            digest.update(hashlib.sha256(file.identity).digest())
        used = sum(patches[:images])
        merged = used // self.processor.image_processor.merge_size**2
        return digest.hexdigest(), seam - images + merged, used

    def _with_system_message(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.system_message is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": [{"type": "text", "text": self.system_message}]}, *messages]

    def _tokenize(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        """Token ids with one image token an image, and which of them belong to an answer or its end-of-turn."""
        self._check_texts(messages)
        ids: list[int] = []
        learned: list[bool] = []
        done = ""  # the text that `ids` stand for
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:number], add_generation_prompt=True)
            through_answer = self._render(messages[: number + 1])
            if not (prompt.startswith(done) and through_answer.startswith(prompt)):
                raise UserError(
                    "the processor's chat template writes an answer otherwise once a later turn follows, so its tokens"
                    " cannot be told apart: templates of Thinking models leave out the thoughts of earlier turns. Train"
                    " on rows with one answer each, or an Instruct model; a template of your own must keep earlier turns"
                )
            answer = through_answer[len(prompt) :]
            if _END_OF_THOUGHT in answer and not any(
                _END_OF_THOUGHT in part.get("text", "") for part in message["content"]
            ):
                raise BadRow(
                    "has an answer without a thought, and the model's chat template opens one before every answer, so"
                    f" that {answer[: answer.rindex(END_OF_TURN)]!r} would be learned; write <think>...</think> before"
                    " the answer, or train an Instruct model"
                )
            prompt_ids = self._ids(prompt[len(done) :])
            answer_ids = self._ids(answer)
            answer_length = answer_ids.index(self.end_of_turn_id) + 1
            ids += prompt_ids + answer_ids[:answer_length]
            learned += [False] * len(prompt_ids) + [True] * answer_length
            # What the template puts after the end-of-turn (a newline) is the beginning of the next prompt.
            done = through_answer[: through_answer.rindex(END_OF_TURN) + len(END_OF_TURN)]
        tail = self._ids(self._render(messages)[len(done) :])
        return ids + tail, learned + [False] * len(tail)

    def _with_images(
        self, ids: list[int], learned: list[bool], conversation: Conversation, read_image: ReadImage
    ) -> Encoded:
        """Read the images and give each as many image tokens as it has merged patches."""
        images = tuple(read_image(file) for file in conversation.images)
        input_ids = torch.tensor(ids)
        repeats = torch.ones_like(input_ids)
        merged = self.processor.image_processor.merge_size**2
        merged_patches = [int(image.grid.prod()) // merged for image in images]
        repeats[input_ids == self.image_token_id] = torch.tensor(merged_patches, dtype=torch.long)
        input_ids = input_ids.repeat_interleave(repeats)
        self._check_length(len(input_ids))
        labels = self._labels(input_ids, torch.tensor(learned).repeat_interleave(repeats))
        return Encoded(input_ids, labels, (input_ids == self.image_token_id).long(), images)

    def _labels(self, input_ids: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
        if self.train_on == "all":
            learned = ~torch.isin(input_ids, self._never_learned)
        return input_ids.masked_fill(~learned, IGNORE_INDEX)

    def _check_length(self, tokens: int) -> None:
        if self.max_length is not None and tokens > self.max_length:
            raise OverLongRow(f"has {tokens} tokens, more than max_length {self.max_length}")

    def _check_texts(self, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            for part in message["content"]:
                for token in STRUCTURAL_TOKENS if part["type"] == "text" else ():
                    if token in part["text"]:
                        raise BadRow(f"has the special token {token} inside the text of its {message['role']} message")

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert isinstance(text, str)
        return text

    def _ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
