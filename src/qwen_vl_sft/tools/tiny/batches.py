"""Pretraining rows: several questions share one chart, each hidden from the others, so that a chart is read once.

A row is `prefix, question, question, ...`: the prefix ends with the image, every question attends to the prefix and
itself only, and its positions continue from the prefix. Each question is thus computed exactly as if it stood alone.
"""

from dataclasses import dataclass

import torch
from PIL import Image
from transformers import Qwen2VLProcessor

from qwen_vl_sft.tools.tiny.questions import Question

GRID = 4  # merged patches along each side of a 112x112 image
IGNORE = -100
FILLER = -1  # branch number of padding; the prefix is branch 0


@dataclass(frozen=True)
class Example:
    """One chart with its questions, and whether they are answered in sentences."""

    image: Image.Image
    questions: list[Question]


class Batcher:
    """Turns examples under one system message into model inputs."""

    def __init__(self, processor: Qwen2VLProcessor) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def __call__(self, examples: list[Example], system: str, verbose: bool) -> dict[str, torch.Tensor]:
        """Return inputs for B charts and rows of T tokens: ids and labels [B, T], positions [3, B, T], mask [B, 1, T, T]."""
        prefix = self._prefix(system)
        rows = [self._branches(example.questions, verbose) for example in examples]
        length = max(len(ids) for ids, *_ in rows)
        pad = self.tokenizer.pad_token_id
        ids = _stack([row[0] for row in rows], length, pad)
        labels = _stack([row[1] for row in rows], length, IGNORE)
        branch = _stack([row[2] for row in rows], length, FILLER)
        offset = _stack([row[3] for row in rows], length, 0)

        count, start = len(rows), len(prefix)
        prefix_positions, following = self._prefix_positions(prefix)
        ids = torch.cat([prefix.expand(count, -1), ids], 1)
        labels = torch.cat([torch.full((count, start), IGNORE), labels], 1)
        branch = torch.cat([torch.zeros(count, start, dtype=torch.long), branch], 1)
        positions = torch.cat(
            [prefix_positions[:, None].expand(-1, count, -1), (offset + following).expand(3, -1, -1)], 2
        )
        same = branch[:, :, None] == branch[:, None, :]
        visible = (same | (branch == 0)[:, None, :]) & torch.ones(same.shape[1:], dtype=torch.bool).tril()
        pictures = [example.image.convert("RGB") for example in examples]
        images = self.processor.image_processor(pictures, return_tensors="pt")
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": positions,
            "attention_mask": visible[:, None],
            "pixel_values": images["pixel_values"],
            "image_grid_thw": images["image_grid_thw"],
        }

    def _prefix(self, system: str) -> torch.Tensor:
        """Return the token ids from the start up to the question, image tokens included."""
        messages: list = [
            {"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": [{"type": "image"}]},
        ]
        text = self.processor.apply_chat_template(messages)
        text = text.removesuffix("<|im_end|>\n").replace("<|image_pad|>", "<|image_pad|>" * GRID**2)
        return torch.tensor(self.tokenizer(text)["input_ids"])

    def _branches(self, questions: list[Question], verbose: bool) -> tuple[list[int], ...]:
        """Return ids, labels, branch numbers and positions after the prefix of all questions of one row."""
        ids: list[int] = []
        labels: list[int] = []
        branch: list[int] = []
        offset: list[int] = []
        for number, question in enumerate(questions, start=1):
            ask = self.tokenizer(f"{question.text}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
            answer = self.tokenizer((question.sentence if verbose else question.brief) + "<|im_end|>")["input_ids"]
            ids += ask + answer
            labels += [IGNORE] * len(ask) + answer
            branch += [number] * (len(ask) + len(answer))
            offset += range(len(ask) + len(answer))
        return ids, labels, branch, offset

    def _prefix_positions(self, prefix: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return M-RoPE positions [3, P] of the prefix and the position that follows it.

        Image tokens share one time step and count height and width from there; text after the image goes on from the
        largest position (Qwen2-VL paper, section 2.1).
        """
        first = int((prefix == self.image_token).nonzero()[0])
        text = torch.arange(first).expand(3, -1)
        cell = torch.arange(GRID)
        height, width = cell.repeat_interleave(GRID), cell.repeat(GRID)
        image = first + torch.stack([torch.zeros_like(height), height, width])
        after = len(prefix) - first - GRID**2
        rest = first + GRID + torch.arange(after).expand(3, -1)
        return torch.cat([text, image, rest], 1), first + GRID + after


def _stack(rows: list[list[int]], length: int, fill: int) -> torch.Tensor:
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])
