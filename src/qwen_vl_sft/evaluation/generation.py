"""Greedy answers in batches. Prompts are padded on the left, so that every answer begins at the same column."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import GenerationConfig

from qwen_vl_sft.batching.collator import pad
from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.data.encoding import Encoded, Encoder
from qwen_vl_sft.evaluation.generated_answer import GeneratedAnswer

# A token of a chart question is about four letters; only the order of the estimates matters.
LETTERS_OF_A_TOKEN = 4


def generate_answers(
    model: Any, encoder: Encoder, conversations: Sequence[Conversation], batch_size: int, max_new_tokens: int
) -> list[str]:
    """Answer the last turn of each conversation; what its own last assistant turn says is not shown to the model.

    Returns one text a conversation, in their order (`decode_answer`). Raises `BadRow`.
    """
    lengths = [estimate_length(encoder, conversation) for conversation in conversations]
    batches = plan_batches(lengths, batch_size)
    answers: dict[int, str] = {}

    def prompt_at(place: int) -> Encoded:
        return encoder.encode_prompt(conversations[place])

    for places, given in generate_batches(model, encoder, prompt_at, batches, max_new_tokens):
        answers.update(zip(places, (answer.text for answer in given), strict=True))
    return [answers[place] for place in range(len(conversations))]


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Places 0 to N-1 in batches of similar length, the longest first: memory runs out at once or not at all."""
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def estimate_length(encoder: Encoder, conversation: Conversation) -> int:
    """Roughly the tokens of a prompt, from its text and the headers of its images; nothing is decoded. Raises `BadRow`."""
    _, media_tokens = encoder.count_media(conversation.media)
    letters = sum(len(part.get("text", "")) for message in conversation.messages for part in message["content"])
    return sum(media_tokens) + letters // LETTERS_OF_A_TOKEN


def generate_batches(
    model: Any,
    encoder: Encoder,
    prompt_at: Callable[[int], Encoded],
    batches: Sequence[Sequence[int]],
    max_new_tokens: int,
    synced: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[tuple[list[int], list[GeneratedAnswer]]]:
    """Answer batch after batch: yields its places and their answers. The next batch is read while one is answered.

    `prompt_at` reads and encodes the prompt of a place, in a thread of its own. `synced` is for weights that are split
    over processes: each then goes on until the longest answer of all is done. `autocast` is entered for each batch anew,
    so that what it keeps of float32 weights in half precision is dropped behind it.
    """

    def encode(batch: Sequence[int]) -> list[Encoded]:
        return [prompt_at(place) for place in batch]

    was_training = model.training
    model.eval()
    try:
        with ThreadPoolExecutor(max_workers=1) as reader:
            coming = reader.submit(encode, batches[0]) if batches else None
            for number, batch in enumerate(batches):
                assert coming is not None
                rows = coming.result()
                coming = reader.submit(encode, batches[number + 1]) if number + 1 < len(batches) else None
                with autocast():
                    given = generate_batch(model, encoder, rows, max_new_tokens, synced)
                yield list(batch), given
    finally:
        model.train(was_training)


def generate_batch(
    model: Any, encoder: Encoder, rows: Sequence[Encoded], max_new_tokens: int, synced: bool = False, **watched_by: Any
) -> list[GeneratedAnswer]:
    """Answer B encoded prompts together, greedily, up to the end of the turn or `max_new_tokens` tokens each.

    `watched_by` takes `streamer` and `stopping_criteria`, as `generate` does.
    """
    batch = pad(rows, encoder.pad_token_id, side="left")
    del batch["labels"]
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    # Not inference mode: weights that are gathered under it could not be trained with afterwards.
    with torch.no_grad():
        config = greedy_config(encoder, max_new_tokens)
        output = model.generate(**inputs, generation_config=config, synced_gpus=synced, **watched_by)
    answers = output[:, batch["input_ids"].shape[1] :].tolist()
    ends = set(_ends(encoder))
    return [GeneratedAnswer(decode_answer(encoder, tokens), not ends.isdisjoint(tokens)) for tokens in answers]


def greedy_config(encoder: Encoder, max_new_tokens: int) -> GenerationConfig:
    """Plain greedy decoding.

    Whatever is left unset here, `generate` takes from the model's own generation_config.json, and Qwen-VL models ship
    one with a repetition penalty: digits that stand in the question would become less likely in the answer.
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
        eos_token_id=_ends(encoder),
        pad_token_id=encoder.pad_token_id,
    )


def decode_answer(encoder: Encoder, tokens: list[int]) -> str:
    """The text of generated tokens up to the end of the turn, without structural tokens and surrounding whitespace.

    Other special tokens belong to it as they belong to what was learned: those of boxes and of references to objects.
    """
    ends = _ends(encoder)
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    kept = [token for token in tokens[:end] if token not in encoder.structural_ids]
    return str(encoder.processor.tokenizer.decode(kept, clean_up_tokenization_spaces=False)).strip()


def _ends(encoder: Encoder) -> list[int]:
    return [encoder.end_of_turn_id, encoder.pad_token_id]
