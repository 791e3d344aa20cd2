"""Greedy generation in batches. Prompts are padded on the left, so that every answer starts in the same column."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from qwen_vl_sft.batching.collator import pad
from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.data.encoding import Encoded, Encoder

# A token of a chart question is about four letters; only the order of the estimates matters.
LETTERS_OF_A_TOKEN = 4
# Rows on the same images that are read together, and by one process: with more, processes would get unequal shares.
ROWS_OF_A_UNIT = 16


@dataclass(frozen=True)
class GeneratedAnswer:
    """A model's answer without structural tokens; `ended` is false where `max_new_tokens` cut it."""

    text: str
    ended: bool


def generate_answers(
    model: Any, encoder: Encoder, conversations: Sequence[Conversation], batch_size: int, max_new_tokens: int
) -> list[str]:
    """Answer the last turn of each conversation; its own last assistant turn is not shown to the model.

    Returns one text for each conversation, in their order (`decode_answer`). Raises `BadRow`.
    """
    lengths = [estimate_length(encoder, conversation) for conversation in conversations]
    batches = plan_batches(lengths, batch_size)
    answers: dict[int, str] = {}

    def prompt_at(index: int) -> Encoded:
        return encoder.encode_prompt(conversations[index])

    for indices, generated in generate_batches(model, encoder, prompt_at, batches, max_new_tokens):
        answers.update(zip(indices, (answer.text for answer in generated), strict=True))
    return [answers[index] for index in range(len(conversations))]


def plan_units(lengths: Sequence[int], images: Sequence[Hashable]) -> list[list[int]]:
    """Group the indices 0 to N-1 into units of rows on the same images, which can share their beginning.

    Longest first: out-of-memory surfaces at once. A row whose `images` are empty is a unit of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    found: dict[Hashable, list[list[int]]] = {}
    units: list[list[int]] = []
    for index in order:
        alike = found.setdefault(images[index] or index, [])
        if not alike or len(alike[-1]) == ROWS_OF_A_UNIT:
            alike.append([])
            units.append(alike[-1])
        alike[-1].append(index)
    return units


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group the indices 0 to N-1 into batches of similar length, longest first: out-of-memory surfaces at once."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def estimate_length(encoder: Encoder, conversation: Conversation) -> int:
    """Estimate the tokens of a prompt from its text and its images' headers; decodes nothing. Raises `BadRow`."""
    letters = sum(len(part.get("text", "")) for message in conversation.messages for part in message["content"])
    return encoder.count_media(conversation.media) + letters // LETTERS_OF_A_TOKEN


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

    `prompt_at` reads and encodes the prompt of an index, in a thread of its own. Set `synced` where weights are sharded
    over processes: each process then generates until the longest answer of all is done. `autocast` is entered anew for
    each batch, so that its cache of half-precision weights is dropped afterwards.
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
    **generate_options: Any,
) -> list[GeneratedAnswer]:
    """Answer B encoded prompts greedily, each up to the end of its turn or `max_new_tokens` tokens.

    `generate_options` are passed to transformers' `generate`: `streamer` and `stopping_criteria`.
    """
    batch = pad(rows, encoder.pad_token_id, side="left", in_bytes=True)
    del batch["labels"]
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = encoder.normalize_patches(inputs["pixel_values"])
    # Not inference mode: weights that are gathered under it could not be trained with afterwards.
    with torch.no_grad():
        config = greedy_config(encoder, max_new_tokens)
        output = model.generate(**inputs, generation_config=config, synced_gpus=synced, **generate_options)
    answers = output[:, batch["input_ids"].shape[1] :].tolist()
    ends = set(answer_ends(encoder))
    return [GeneratedAnswer(decode_answer(encoder, tokens), not ends.isdisjoint(tokens)) for tokens in answers]


def greedy_config(encoder: Encoder, max_new_tokens: int) -> GenerationConfig:
    """Build a configuration of plain greedy decoding.

    `generate` takes whatever is unset here from the model's generation_config.json. That of Qwen-VL models has a
    repetition penalty, which would make digits of the question less likely in the answer.
    """
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        use_cache=True,
        # Padding is the end-of-text token, with which base models end.
        eos_token_id=answer_ends(encoder),
        pad_token_id=encoder.pad_token_id,
    )


def logits_processors(model: Any, encoder: Encoder, prompt: torch.Tensor, max_new_tokens: int) -> LogitsProcessorList:
    """Return what the model's generation_config.json has `generate` do with the logits of a row; empty as a rule.

    That of a Qwen-VL model asks for nothing beside what `greedy_config` sets itself. `prompt` [T] are its tokens.
    """
    config, _ = model._prepare_generation_config(greedy_config(encoder, max_new_tokens))
    config.max_length = len(prompt) + max_new_tokens
    if config.min_new_tokens is not None:
        config.min_length = len(prompt) + config.min_new_tokens
    model._prepare_special_tokens(config, True, device=model.device)
    return model._get_logits_processor(  # type: ignore[no-any-return]
        config,
        input_ids_seq_length=len(prompt),
        encoder_input_ids=prompt[None].to(model.device),
        logits_processor=LogitsProcessorList(),
        device=model.device,
    )


def decode_answer(encoder: Encoder, tokens: list[int]) -> str:
    """Decode generated tokens up to the end of the turn, without structural tokens and surrounding whitespace.

    A thought is part of the text, with the opening that the prompt ends with.

    Special tokens of boxes and of references to objects stay in the text: they are part of the training targets.
    """
    ends = answer_ends(encoder)
    end = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    text_tokens = [token for token in tokens[:end] if token not in encoder.structural_ids]
    text = encoder.processor.tokenizer.decode(text_tokens, clean_up_tokenization_spaces=False)
    return f"{encoder.opening}{text}".strip()


def answer_ends(encoder: Encoder) -> list[int]:
    """Return the tokens that end an answer."""
    return [encoder.end_of_turn_id, encoder.pad_token_id]
