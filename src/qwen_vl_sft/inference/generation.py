"""Greedy answers: what every way of generating them has in common, and the units that their rows are dealt in."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.data.encoding import Encoder

# A token of a chart question is about four letters; only the order of the estimates matters.
LETTERS_OF_A_TOKEN = 4
# Rows on the same images that are read together, and by one process: with more, processes would get unequal shares.
ROWS_OF_A_UNIT = 16


@dataclass(frozen=True)
class GeneratedAnswer:
    """A model's answer without structural tokens; `ended` is false where `max_new_tokens` cut it."""

    text: str
    ended: bool


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


def estimate_length(encoder: Encoder, conversation: Conversation) -> int:
    """Estimate the tokens of a prompt from its text and its images' headers; decodes nothing. Raises `BadRow`."""
    letters = sum(len(part.get("text", "")) for message in conversation.messages for part in message["content"])
    return encoder.count_media(conversation.media) + letters // LETTERS_OF_A_TOKEN


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


def decode_answer(encoder: Encoder, tokens: Sequence[int]) -> str:
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
