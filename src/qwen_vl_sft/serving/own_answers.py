"""This package's own answers, token by token, and its logits where an engine answers otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwen_vl_sft.batching.collator import pad
from qwen_vl_sft.data.encoding import Encoded, Encoder
from qwen_vl_sft.data.labels import IGNORE_INDEX
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.inference.engine.engine import Engine
from qwen_vl_sft.inference.engine.reading import PromptAt
from qwen_vl_sft.inference.generation import answer_ends, decode_answer
from qwen_vl_sft.serving.base import EngineAnswer
from qwen_vl_sft.serving.comparison import NEAR_TIE, Difference, first_difference


def own_answers(
    model: Any, encoder: Encoder, prompt_at: PromptAt, units: Sequence[Sequence[int]], max_new_tokens: int, title: str
) -> dict[int, list[int]]:
    """Answer the rows of all units greedily; return the tokens of each answer by the row's number. Raises `BadRow`."""
    engine, answers = Engine(model, encoder, max_new_tokens), {}
    with (
        tqdm(total=sum(map(len, units)), desc=title, unit="row") as progress,
        closing(engine.steps(prompt_at, units)) as steps,
    ):
        for answered in steps:
            for row in answered:
                if row.finished:
                    answers[row.prompt.number] = list(row.tokens)
                    progress.update()
    return answers


def differences(
    model: Any,
    encoder: Encoder,
    prompt_at: Callable[[int], Encoded],
    arm: str,
    ours: Mapping[int, Sequence[int]],
    engines: Mapping[int, EngineAnswer],
    same_prompts: Mapping[int, bool],
    dtype: str,
) -> list[Difference]:
    """Compare the answers of an arm whose model is loaded, and measure our logits where two first differ."""
    ends, found = frozenset(answer_ends(encoder)), []
    for number, tokens in ours.items():
        theirs = answer_tokens(encoder, engines[number])
        places = told_places(tokens, engines[number], encoder)
        told = [tokens[place] for place in places]
        at = first_difference(told, theirs, ends)
        if at is None:
            continue
        margin, tie = None, False
        if same_prompts[number]:
            before = places[at] if at < len(places) else len(tokens)
            logits = next_logits(model, encoder, prompt_at(number), tokens[:before])
            margin = margin_of(logits, _token_at(told, at, encoder), _token_at(theirs, at, encoder))
            tie = margin <= NEAR_TIE[dtype]
        texts = decode_answer(encoder, tokens), decode_answer(encoder, theirs)
        found.append(Difference(number, arm, *texts, margin, tie))
    return found


def answer_tokens(encoder: Encoder, answer: EngineAnswer) -> list[int]:
    """Return the tokens of an engine's answer; those of its text and the end of the turn where it gave no others."""
    if answer.answer_ids is not None:
        return answer.answer_ids
    ids: list[int] = encoder.processor.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
    return [*ids, encoder.end_of_turn_id]


def told_places(ours: Sequence[int], answer: EngineAnswer, encoder: Encoder) -> list[int]:
    """Return the places of our tokens that the engine would tell of the same answer: all, or those of whole characters."""
    if not answer.whole_characters:
        return [*range(len(ours))]
    text, places = b"", []
    for place, token in enumerate(ours):
        text += bytes_of(encoder.processor.tokenizer, token)
        if not ends_within_character(text):
            places.append(place)
    return places


def bytes_of(tokenizer: Any, token: int) -> bytes:
    """Return the bytes of a token of a byte-level tokenizer, none for one beside its vocabulary, such as the turn's end."""
    if token in tokenizer.added_tokens_decoder:
        return b""
    letters = bytes_to_unicode()
    values = {letter: byte for byte, letter in letters.items()}
    return bytes(values[letter] for letter in tokenizer.convert_ids_to_tokens(token))


def ends_within_character(text: bytes) -> bool:
    """Return whether one of the last bytes begins a character of UTF-8 of more bytes than follow, as llama.cpp finds it."""
    return any(
        length > back
        for back in range(1, min(4, len(text)) + 1)
        for length, low, high in ((2, 0xC0, 0xE0), (3, 0xE0, 0xF0), (4, 0xF0, 0xF8))
        if low <= text[-back] < high
    )


def next_logits(model: Any, encoder: Encoder, prompt: Encoded, answer: Sequence[int]) -> torch.Tensor:
    """Return the logits [vocabulary] float32 of the token that follows a prompt and the beginning of its answer."""
    new = torch.tensor(list(answer), dtype=prompt.input_ids.dtype)
    row = replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, new]),
        labels=torch.cat([prompt.labels, torch.full_like(new, IGNORE_INDEX)]),
        mm_token_type_ids=torch.cat([prompt.mm_token_type_ids, torch.zeros_like(new)]),
    )
    batch = pad([row], encoder.pad_token_id)
    del batch["labels"]
    model.eval()
    with torch.no_grad():
        output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
    return output.logits[0, -1].float().cpu()  # type: ignore[no-any-return]


def margin_of(logits: torch.Tensor, ours: int, theirs: int) -> float:
    """Return how much one token lies above another, as a share of the root mean square of `logits` [vocabulary]."""
    return float((logits[ours] - logits[theirs]) / logits.square().mean().sqrt())


def round_activations(model: Any, layers: Sequence[str]) -> None:
    """Have layers round their inputs to FP8 (e4m3) and back, each token with its own scale, as a model in FP8 does."""
    most = torch.finfo(torch.float8_e4m3fn).max

    def rounded(module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        scale = inputs[0].float().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / most
        values = (inputs[0].float() / scale).clamp(-most, most).to(torch.float8_e4m3fn)
        return ((values.float() * scale).to(inputs[0].dtype),)

    modules = dict(model.named_modules())
    for name in layers:
        modules[name].register_forward_pre_hook(rounded)


def silence_vision(model: Any) -> None:
    """Take the vision part of an adapter out of a model: its second matrices become zero."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    family = family_of(model.get_base_model().config)
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and family.part_of(name) != "language":
            for matrix in getattr(module, "lora_B", {}).values():
                torch.nn.init.zeros_(matrix.weight)


def _token_at(tokens: Sequence[int], at: int, encoder: Encoder) -> int:
    """Return the token at a place; one past the end, where an answer was cut, counts as the end of the turn."""
    return tokens[at] if at < len(tokens) else encoder.end_of_turn_id
