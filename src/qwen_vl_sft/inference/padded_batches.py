"""Greedy generation in padded batches, where the weights are split over processes that must compute in step.

Prompts are padded on the left, so that every answer starts in the same column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from qwen_vl_sft.batching.collator import pad
from qwen_vl_sft.data.encoding import Encoded, Encoder
from qwen_vl_sft.inference.generation import GeneratedAnswer, answer_ends, decode_answer, greedy_config


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group the indices 0 to N-1 into batches of similar length, longest first: out-of-memory surfaces at once."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def generate_batches(
    model: Any,
    encoder: Encoder,
    prompt_at: Callable[[int], Encoded],
    batches: Sequence[Sequence[int]],
    max_new_tokens: int,
    synced: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[tuple[list[int], list[GeneratedAnswer]]]:
    """Answer batch after batch and yield each batch's indices and answers; the next batch is read meanwhile.

    `prompt_at` reads and encodes the prompt of an index, in a thread of its own. With `synced` each process generates
    until the longest answer of all is done. `autocast` is entered anew for each batch, so that its cache of
    half-precision weights is dropped afterwards.
    """

    def encode(batch: Sequence[int]) -> list[Encoded]:
        return [prompt_at(place) for place in batch]

    was_training = model.training
    model.eval()
    try:
        with ThreadPoolExecutor(max_workers=1) as reader:
            upcoming = reader.submit(encode, batches[0]) if batches else None
            for number, batch in enumerate(batches):
                assert upcoming is not None
                rows = upcoming.result()
                upcoming = reader.submit(encode, batches[number + 1]) if number + 1 < len(batches) else None
                with autocast():
                    generated = generate_batch(model, encoder, rows, max_new_tokens, synced)
                yield list(batch), generated
    finally:
        model.train(was_training)


def generate_batch(
    model: Any,
    encoder: Encoder,
    rows: Sequence[Encoded],
    max_new_tokens: int,
    synced: bool = False,
) -> list[GeneratedAnswer]:
    """Answer B encoded prompts greedily, each up to the end of its turn or `max_new_tokens` tokens."""
    ends = set(answer_ends(encoder))
    answers = generate_tokens(model, encoder, rows, max_new_tokens, synced)
    return [GeneratedAnswer(decode_answer(encoder, tokens), not ends.isdisjoint(tokens)) for tokens in answers]


def generate_tokens(
    model: Any, encoder: Encoder, rows: Sequence[Encoded], max_new_tokens: int, synced: bool = False
) -> list[list[int]]:
    """Return the tokens of B answers, padded to the longest."""
    batch = pad(rows, encoder.pad_token_id, side="left", in_bytes=True)
    del batch["labels"]
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = encoder.normalize_patches(inputs["pixel_values"])
    # Not inference mode: weights that are gathered under it could not be trained with afterwards.
    with torch.no_grad():
        config = greedy_config(encoder, max_new_tokens)
        output = model.generate(**inputs, generation_config=config, synced_gpus=synced)
    new: list[list[int]] = output[:, batch["input_ids"].shape[1] :].tolist()
    return new
