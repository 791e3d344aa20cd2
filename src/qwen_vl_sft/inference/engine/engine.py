"""The engine: prompts are packed and read by a budget of tokens, answers decoded in a batch whose free places are refilled.

Every answer is the one that transformers' `generate` gives to its prompt alone: greedy, to the end of the turn or to
`max_new_tokens`. It does not depend on what else is answered, but for rounding in half precision.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from qwen_vl_sft.batching.positions import Positions
from qwen_vl_sft.compat.packed_batches import reading_prompts
from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.inference.engine.attention import PrefillStep, cached_attention
from qwen_vl_sft.inference.engine.cache import KeyValueCache, affordable_slots, free_memory
from qwen_vl_sft.inference.engine.clock import PROMPTS, READING, TOKENS, TOWER, Clock
from qwen_vl_sft.inference.engine.decode_check import has_decode_kernel
from qwen_vl_sft.inference.engine.decoding import Decoder
from qwen_vl_sft.inference.engine.features import FeatureMemory, image_layers
from qwen_vl_sft.inference.engine.prompts import Group, PackedPrompts, Piece, pack
from qwen_vl_sft.inference.engine.reading import PromptAt, PromptReader
from qwen_vl_sft.inference.engine.scheduler import MORE_STATES, Answering, Scheduler, states_of
from qwen_vl_sft.inference.engine.transfer import Arriving, to_device
from qwen_vl_sft.inference.engine.weights import dequantized_weights
from qwen_vl_sft.inference.generation import (
    GeneratedAnswer,
    answer_ends,
    decode_answer,
    estimate_length,
    logits_processors,
    plan_units,
)

# Rows that are answered at once, where memory does not say fewer.
ROWS_ON_GPU, ROWS_ON_CPU = 256, 64
# Tokens of prompts that are read in one forward pass, and the least of them where memory is short.
PREFILL_TOKENS, LEAST_PREFILL_TOKENS = 16_384, 1024
# Slots of the cache for the prompt of each row that is answered at once; those with several images take more of them.
SLOTS_A_ROW = 1024
# What the cache has at least, if memory has it: a prompt of several large images is that long.
LEAST_SLOTS = 32_768
# Shorter answers are decoded before a CUDA graph would have paid.
TOKENS_WORTH_A_GRAPH = 8
# A forward pass holds about so many vectors of a token, of the width of the model and of its MLP.
_WIDE, _MLP_WIDE = 8, 3
# Share of the free memory that a prefill may take.
_PREFILL_SHARE = 0.2
# And what states that layers carry from token to token may.
_STATE_SHARE = 0.25


def computes_beside_host(device: torch.device) -> bool:
    """Return whether a device computes what is started on it while the host goes on."""
    return device.type != "cpu"


def answer_conversations(
    model: Any, encoder: Encoder, conversations: Sequence[Conversation], max_new_tokens: int, rows: int | None = None
) -> list[str]:
    """Answer the last turn of each conversation; its own last assistant turn is not shown to the model.

    Returns one text for each conversation, in their order. Raises `BadRow`.
    """
    engine = Engine(model, encoder, max_new_tokens, rows)
    images = [tuple(file.content_hash for file in conversation.media) for conversation in conversations]
    units = plan_units([estimate_length(encoder, conversation) for conversation in conversations], images)
    answers: dict[int, GeneratedAnswer] = {}
    for finished in engine.answers(lambda number, read: encoder.encode_prompt(conversations[number], read), units):
        answers.update(finished)
    return [answers[number].text for number in range(len(conversations))]


@dataclass(frozen=True)
class _Asked:
    """Rows of a forward pass, whose tokens arrive in this order."""

    rows: Sequence[Answering]
    tokens: Arriving


class Engine:
    """Answers prompts with a model that is loaded, adapter and all, as it is now.

    Args:
        model: a Qwen-VL model, with or without an adapter.
        encoder: knows the tokens that end an answer, and reads images.
        max_new_tokens: most tokens of an answer.
        rows: most rows that are answered at once; None for as many as pay off.
        slots: most tokens in the cache; None for what the free memory holds.
        prefill_tokens: most tokens of prompts in one forward pass, unless one prompt is longer; None by memory.
        memory: keeps features of images for later rows and engines on the same vision tower.
        cuda_graphs: decode by replaying CUDA graphs on a GPU, where it pays.
        decode_kernel: attend with a kernel of a GPU while answers are decoded, where it computes attention.
        clock: is told what takes how long.
        autocast: entered anew for each forward pass, so that its cache of half-precision weights is dropped afterwards.
    """

    def __init__(
        self,
        model: Any,
        encoder: Encoder,
        max_new_tokens: int,
        rows: int | None = None,
        slots: int | None = None,
        prefill_tokens: int | None = None,
        memory: FeatureMemory | None = None,
        cuda_graphs: bool = True,
        decode_kernel: bool = True,
        clock: Clock | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.max_new_tokens = max_new_tokens
        self.memory = memory
        self.autocast = autocast
        self._clock = clock
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self._base = base
        self._language = base.model.language_model
        self.positions = Positions(base.config)
        weight = self._language.embed_tokens.weight
        self.device: torch.device = weight.device
        on_gpu = self.device.type == "cuda"
        self._overlaps = computes_beside_host(self.device)
        config = base.config.get_text_config()
        with autocast():
            autocasts = torch.is_autocast_enabled(self.device.type)
            dtype = torch.get_autocast_dtype(self.device.type) if autocasts else weight.dtype
        rows = rows or (ROWS_ON_GPU if on_gpu else ROWS_ON_CPU)
        family = self.positions.family
        if state := family.state_bytes(base.config, dtype):
            rows = min(rows, _affordable_rows(state, self.device))
        self.rows = rows
        self.prefill_tokens = prefill_tokens or _affordable_prefill(config, dtype, self.device)
        wanted = max(LEAST_SLOTS, self.rows * (SLOTS_A_ROW + max_new_tokens))
        self.cache = KeyValueCache(
            config, slots or min(wanted, affordable_slots(config, dtype, self.device)), dtype, self.device
        )
        self._states = family.row_states(base, states_of(self.rows), dtype)
        graphs = cuda_graphs and self._overlaps and max_new_tokens >= TOKENS_WORTH_A_GRAPH
        kernel = decode_kernel and on_gpu and has_decode_kernel(config.num_attention_heads, self.cache)
        self._decoder = Decoder(base, self.cache, self.rows, self._states, graphs, kernel)
        self._ends = set(answer_ends(encoder))
        # Asked once: it takes a millisecond, which on a CPU is an answer's token.
        self._processes = bool(self._processors_of(torch.zeros(1, dtype=torch.long)))
        self._scheduler = Scheduler(
            self.cache,
            self.rows,
            self.prefill_tokens,
            max_new_tokens,
            self._overlaps,
            self._states is not None,
            self._processors_of if self._processes else None,
            lambda: self._timed(READING),
        )

    def answers(
        self, prompt_at: PromptAt, units: Sequence[Sequence[int]]
    ) -> Iterator[list[tuple[int, GeneratedAnswer]]]:
        """Answer the rows of all units and yield them, with their numbers, as they are finished.

        `prompt_at` encodes the prompt of a row; rows of a unit are read together. A row that it raises `BadRow` for ends
        the work: rows that are being answered are finished and yielded before it is raised.
        """
        with closing(self.steps(prompt_at, units)) as steps:
            for answered in steps:
                done = [(row.prompt.number, self.answer_of(row)) for row in answered if row.finished]
                if done:
                    yield done

    def answer_of(self, row: Answering) -> GeneratedAnswer:
        """Return the answer of a row so far."""
        return GeneratedAnswer(decode_answer(self.encoder, row.tokens), not self._ends.isdisjoint(row.tokens))

    def steps(self, prompt_at: PromptAt, units: Sequence[Sequence[int]]) -> Generator[list[Answering], None, None]:
        """Compute one forward pass after another, and yield the rows that got a token from it."""
        # A GPU computes the next pass while the host reads the tokens of this one.
        ahead = 1 if self._overlaps and not self._processes else 0
        was_training = self.model.training
        self.model.eval()
        running: list[Answering] = []
        asked: deque[_Asked] = deque()
        scheduler = self._scheduler
        scheduler.begin()
        try:
            with (
                dequantized_weights(self.model, self.device) if self.rows > 1 else nullcontext(),
                PromptReader(
                    self.encoder, prompt_at, units, self.positions, self.memory, self.device.type == "cpu"
                ) as reader,
            ):
                while True:
                    new, pieces = scheduler.admit(reader, running, idle=not (running or asked))
                    if pieces:
                        asked.append(self._prefill(new, pieces))
                        running += new
                    elif running:
                        asked.append(self._decode(running))
                    elif not asked:
                        if scheduler.waiting:
                            raise self._too_long(scheduler.waiting[0])
                        if reader.exhausted:
                            break
                        continue
                    running = [row for row in running if row.asked < self.max_new_tokens]
                    while len(asked) > (ahead if running or pieces else 0):
                        answered = self._receive(asked.popleft())
                        running = [row for row in running if not row.finished]
                        if answered:
                            yield answered
                if reader.failure is not None:
                    raise reader.failure
        finally:
            held = {id(row): row for row in (*running, *(row for one in asked for row in one.rows))}
            scheduler.end([row for row in held.values() if not row.finished])
            self._decoder.forget_graphs()
            self.model.train(was_training)

    def _timed(self, part: str) -> AbstractContextManager[None]:
        return self._clock.part(part) if self._clock else nullcontext()

    def _prefill(self, rows: Sequence[Answering], pieces: Sequence[Piece]) -> _Asked:
        packed = pack(pieces)
        with torch.no_grad(), self.autocast(), cached_attention(self._language):
            tokens = self._choose(rows, self._prompt_logits(packed))
        self._decoder.begin(
            [row.place for row in rows],
            [[*row.group.before, *row.slots] for row in rows],
            tokens,
            [row.position for row in rows],
            [row.length for row in rows],
        )
        return self._ask(rows, tokens)

    def _processors_of(self, prompt: torch.Tensor) -> Any:
        return logits_processors(self._base, self.encoder, prompt, self.max_new_tokens)

    def _prompt_logits(self, packed: PackedPrompts) -> torch.Tensor:
        device = self.device
        step = PrefillStep(
            self.cache,
            to_device(packed.write, device),
            None if packed.read is None else to_device(packed.read, device),
            to_device(packed.bounds_q, device),
            to_device(packed.bounds_k, device),
            packed.longest_q,
            packed.longest_k,
        )
        shown = {}
        if packed.images:
            with self._timed(TOWER):
                layers = image_layers(self._base.model, self.positions, packed.images, self.memory)
            shown = {"image": self.positions.family.feature_output(layers)}
        with (
            self._timed(PROMPTS),
            self._states.applied(packed.states) if self._states else nullcontext(),
            reading_prompts(self._base.model),
        ):
            output = self._base.model(
                input_ids=to_device(packed.input_ids, device),
                position_ids=to_device(packed.position_ids, device),
                mm_encoder_outputs=shown,
                use_cache=False,
                step=step,
                # The last layer gives no other ones.
                logit_positions=to_device(packed.last, device),
            )
            return self._base.lm_head(output.last_hidden_state[0]).float()  # type: ignore[no-any-return]

    def _decode(self, rows: Sequence[Answering]) -> _Asked:
        longest = max(row.length for row in rows) + 1
        choose = (lambda logits: self._choose(rows, logits)) if self._processes else None
        with torch.no_grad(), self.autocast(), cached_attention(self._language), self._timed(TOKENS):
            tokens = self._decoder.step([row.place for row in rows], longest, choose)
        for row in rows:
            row.length += 1
        return self._ask(rows, tokens)

    def _choose(self, rows: Sequence[Answering], logits: torch.Tensor) -> torch.Tensor:
        """Return the most likely token [B] of each row."""
        if self._processes:
            logits = torch.cat([self._processed(row, one) for row, one in zip(rows, logits, strict=True)])
        return logits.argmax(-1)

    def _ask(self, rows: Sequence[Answering], tokens: torch.Tensor) -> _Asked:
        for row in rows:
            row.asked += 1
        return _Asked(list(rows), Arriving.of(tokens))

    def _receive(self, asked: _Asked) -> list[Answering]:
        """Wait for the tokens of a pass, and return the rows that they belong to; one may have ended the pass before."""
        answered = []
        for row, token in zip(asked.rows, asked.tokens.wait(), strict=True):
            if row.finished:
                continue
            answered.append(row)
            row.tokens.append(token)
            row.finished = token in self._ends or len(row.tokens) == self.max_new_tokens
            if row.finished:
                self._scheduler.release(row)
        return answered

    def _processed(self, row: Answering, logits: torch.Tensor) -> torch.Tensor:
        so_far = torch.cat([row.prompt.row.input_ids, torch.tensor(row.tokens, dtype=torch.long)]).to(logits.device)
        return row.processors(so_far[None], logits[None])  # type: ignore[no-any-return]

    def _too_long(self, group: Group) -> UserError:
        needed = len(group.waiting[0]) + self.max_new_tokens - 1  # the last token is not read any more
        return UserError(
            f"a row's prompt and answer may have {needed:,} tokens, and the memory that is free holds"
            f" {self.cache.slots:,}; give a smaller --max_new_tokens, or reduce the images with --max_pixels"
        )


def _affordable_rows(state_bytes: int, device: torch.device) -> int:
    """Return how many rows the free memory holds states for, at least one."""
    affordable = int(free_memory(device) * _STATE_SHARE) // state_bytes
    return max(1, (affordable - MORE_STATES) // 2)


def _affordable_prefill(config: Any, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many tokens of prompts the free memory holds in one forward pass of a language model."""
    per_token = dtype.itemsize * (_WIDE * config.hidden_size + _MLP_WIDE * config.intermediate_size)
    affordable = int(free_memory(device) * _PREFILL_SHARE) // per_token
    return min(PREFILL_TOKENS, max(LEAST_PREFILL_TOKENS, affordable))
