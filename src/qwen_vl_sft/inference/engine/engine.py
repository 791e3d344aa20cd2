"""The engine: prompts are packed and read by a budget of tokens, answers decoded in a batch whose free places are refilled.

Every answer is the one that transformers' `generate` gives to its prompt alone: greedy, to the end of the turn or to
`max_new_tokens`. It does not depend on what else is answered, but for rounding in half precision.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
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
from qwen_vl_sft.inference.engine.decoding import Decoder
from qwen_vl_sft.inference.engine.features import FeatureMemory, image_layers
from qwen_vl_sft.inference.engine.prompts import Group, Head, PackedPrompts, Piece, Prompt, pack, text_before_image
from qwen_vl_sft.inference.engine.reading import PromptAt, PromptReader
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
# While others are answered, rows get a pass of their own if they are so large a part of these, or half of the tokens.
_WORTH_A_PASS = 4
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
# And what states that layers carry from token to token may: a row's, and for each row at most one prefix's. Beside them
# stand that of no row, of a prefix that is being read, and of the head.
_STATE_SHARE = 0.25
_MORE_STATES = 3


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


@dataclass
class Answering:
    """A row that is being answered: the tokens of its answer so far, and what the next one needs.

    `length` counts the tokens in the cache with those of passes that were started, `position` is the M-RoPE position of
    the answer's first token, and `asked` counts the tokens that were asked for, which may not be here yet.
    """

    prompt: Prompt
    group: Group
    place: int
    slots: list[int]
    length: int
    position: int
    processors: Any
    asked: int = 0
    tokens: list[int] = field(default_factory=list)
    finished: bool = False


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
            affordable = int(free_memory(self.device) * _STATE_SHARE) // state
            rows = max(1, min(rows, (affordable - _MORE_STATES) // 2))
        self.rows = rows
        if prefill_tokens is None:
            per_token = dtype.itemsize * (_WIDE * config.hidden_size + _MLP_WIDE * config.intermediate_size)
            affordable = int(free_memory(self.device) * _PREFILL_SHARE) // per_token
            prefill_tokens = min(PREFILL_TOKENS, max(LEAST_PREFILL_TOKENS, affordable))
        self.prefill_tokens = prefill_tokens
        wanted = max(LEAST_SLOTS, self.rows * (SLOTS_A_ROW + max_new_tokens))
        self.cache = KeyValueCache(
            config, slots or min(wanted, affordable_slots(config, dtype, self.device)), dtype, self.device
        )
        states = 2 * self.rows + _MORE_STATES
        self._states = family.row_states(base, states, dtype)
        self._free_states = list(range(self.rows + 1, states))
        self._free_places: list[int] = []
        # What prompts begin with before their images; made of the first one with an image.
        self._head: Head | None = None
        graphs = cuda_graphs and self._overlaps and max_new_tokens >= TOKENS_WORTH_A_GRAPH
        self._decoder = Decoder(base, self.cache, self.rows, self._states, graphs)
        self._ends = set(answer_ends(encoder))
        # Asked once: it takes a millisecond, which on a CPU is an answer's token.
        self._processes = bool(self._processors_of(torch.zeros(1, dtype=torch.long)))

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
        waiting: deque[Group] = deque()
        asked: deque[_Asked] = deque()
        self._free_places = list(range(self.rows - 1, -1, -1))
        try:
            with (
                dequantized_weights(self.model, self.device) if self.rows > 1 else nullcontext(),
                PromptReader(
                    self.encoder, prompt_at, units, self.positions, self.memory, self.device.type == "cpu"
                ) as reader,
            ):
                while True:
                    new, pieces = self._admit(reader, waiting, running, idle=not (running or asked))
                    if pieces:
                        asked.append(self._prefill(new, pieces))
                        running += new
                    elif running:
                        asked.append(self._decode(running))
                    elif not asked:
                        if waiting:
                            raise self._too_long(waiting[0])
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
            for row in held.values():
                if not row.finished:
                    self._release(row)
            for group in waiting:
                self._release_prefix(group)
            self._drop_head()
            self._decoder.forget_graphs()
            self.model.train(was_training)

    def _timed(self, part: str) -> AbstractContextManager[None]:
        return self._clock.part(part) if self._clock else nullcontext()

    def _admit(
        self, reader: PromptReader, waiting: deque[Group], running: Sequence[Answering], idle: bool
    ) -> tuple[list[Answering], list[Piece]]:
        """Take rows that wait, as many as places, slots and the budget of tokens allow; they wait in their order.

        Where the host works beside the device, few of them are not worth a pass while others are answered: every pass reads
        all weights. Else reading and answering share the cores, and each pass waits for as many as it can take.
        """
        if self._overlaps:
            reader.take_ready(self.prefill_tokens, waiting)
            if idle and not waiting and not reader.exhausted:
                with self._timed(READING):
                    group = reader.next_group(wait=True)
                waiting += [group] if group else []
            if running and not self._pays(reader, waiting, len(running)):
                return [], []
        rows: list[Answering] = []
        pieces: list[Piece] = []
        tokens = 0
        while self._free_places:
            if not waiting:
                next_group = reader.next_group(wait=not self._overlaps)
                if next_group is None:
                    break
                waiting.append(next_group)
            group = waiting[0]
            prompt = group.waiting[0]
            self._begin_with_head(group)
            new_tokens = group.missing + len(prompt) - group.known
            if pieces and tokens + new_tokens > self.prefill_tokens:
                break
            if new_tokens + self.max_new_tokens - 1 > self.cache.free:
                if self._drops_head_for(group):
                    continue
                break
            tokens += new_tokens
            pieces += self._prefixes(group)
            own = self.cache.take(len(prompt) - group.known + self.max_new_tokens - 1)
            place = self._free_places.pop()
            branch = own[: len(prompt) - group.known]
            pieces.append(Piece(prompt, group.known, len(prompt), branch, group.before, True, group.begin, place))
            rows.append(self._start(group, group.waiting.popleft(), place, own))
            if not group.waiting:
                waiting.popleft()
        return rows, pieces

    def _begin_with_head(self, group: Group) -> None:
        """Have a group of which nothing is computed begin with the head, as far as it does."""
        if self._head is None or group.head is not None or group.prefix:
            return
        begun = self._head.in_common(group.waiting[0].row)
        # A state is that after the whole head.
        if begun and (self._states is None or begun == len(self._head.tokens)):
            group.begin_with(self._head, begun)

    def _drops_head_for(self, group: Group) -> bool:
        """Drop the head where that makes room for a group and nobody else begins with it; return whether it was dropped."""
        head = self._head
        begins_with_it = head is not None and group.head is head
        if head is None or head.users > begins_with_it or (begins_with_it and not group.can_begin_anew):
            return False
        if begins_with_it:
            group.begin_anew()
        self._drop_head()
        return True

    def _prefixes(self, group: Group) -> list[Piece]:
        """Take slots for what the rows of a group begin with and is yet to be computed, and return its pieces."""
        pieces = []
        prompt = group.waiting[0]
        length = text_before_image(prompt.row)
        if self._head is None and length and not group.prefix and self.rows > 1:
            self._head = Head(prompt.row.input_ids[:length], self.cache.take(length), self._free_states.pop())
            pieces.append(Piece(prompt, 0, length, self._head.slots, (), False, None, self._head.state))
            group.begin_with(self._head, length)
        if group.missing:
            before, begin = group.before, group.begin
            group.prefix, group.state = self.cache.take(group.missing), self._free_states.pop()
            pieces.append(Piece(prompt, group.begun, group.known, group.prefix, before, False, begin, group.state))
        return pieces

    def _pays(self, reader: PromptReader, waiting: Sequence[Group], running: int) -> bool:
        """Return whether the rows that can be taken now are worth a pass of their own while others are answered."""
        tokens = rows = 0
        free = self.cache.free
        for group in waiting:
            for place, prompt in enumerate(group.waiting):
                new_tokens = len(prompt) - group.known + (group.missing if place == 0 else 0)
                needed = new_tokens + self.max_new_tokens - 1
                if rows == len(self._free_places) or needed > free:
                    return rows * _WORTH_A_PASS >= max(1, running)
                free -= needed
                tokens += new_tokens
                rows += 1
                if 2 * tokens >= self.prefill_tokens:
                    return True
        return rows > 0 and (reader.exhausted or rows * _WORTH_A_PASS >= running)

    def _start(self, group: Group, prompt: Prompt, place: int, own: list[int]) -> Answering:
        processors = self._processors_of(prompt.row.input_ids) if self._processes else None
        return Answering(prompt, group, place, own, len(prompt), int(prompt.positions.max()) + 1, processors)

    def _release(self, row: Answering) -> None:
        self.cache.release(row.slots)
        self._free_places.append(row.place)
        row.group.users -= 1
        if not row.group.users:
            self._release_prefix(row.group)

    def _release_prefix(self, group: Group) -> None:
        if group.head is not None:
            group.head.users -= 1
        if group.state is not None:
            self.cache.release(group.prefix)
            self._free_states.append(group.state)

    def _drop_head(self) -> None:
        if self._head is not None:
            self.cache.release(self._head.slots)
            self._free_states.append(self._head.state)
            self._head = None

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
                self._release(row)
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
