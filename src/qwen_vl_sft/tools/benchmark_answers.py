"""Measure ways of answering rows side by side in one process, and compare their answers."""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from peft import get_peft_model

from qwen_vl_sft.batching.collator import pad
from qwen_vl_sft.config.command_line import recipe_values
from qwen_vl_sft.config.reading import Recipe, read_recipe
from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.data.dataset import Rows, open_split
from qwen_vl_sft.data.encoding import Encoded, Encoder
from qwen_vl_sft.data.media import ReadMedia
from qwen_vl_sft.data.scan import scan
from qwen_vl_sft.distributed.context import read_context
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.inference.engine.clock import Clock
from qwen_vl_sft.inference.engine.engine import Engine
from qwen_vl_sft.inference.engine.features import FeatureMemory
from qwen_vl_sft.inference.generation import estimate_length, plan_units
from qwen_vl_sft.inference.models import answer_with_adapters, answering_kernels
from qwen_vl_sft.inference.padded_batches import generate_tokens, plan_batches
from qwen_vl_sft.modeling.attention import OWN, use_segmented_vision_attention
from qwen_vl_sft.modeling.base_model import load_family, load_model, load_processor
from qwen_vl_sft.modeling.kernels import use_fused_kernels
from qwen_vl_sft.modeling.lora import lora_config
from qwen_vl_sft.tools.measuring import TEXT, format_table, machine_facts, make_output_dir, random_model_of
from qwen_vl_sft.tools.options import AnswerBenchmarkOptions
from qwen_vl_sft.training.generation_metrics import GenerationMetrics

# Answers of random weights rarely end, so all are about as long as they may be.
LORA_B_STD = 0.02
FEATURE_BYTES = 2**35
# Rows with other answers whose margins are computed.
MOST_MARGINS = 16
COLUMNS = {
    "work": ("work", TEXT),
    "variant": ("variant", TEXT),
    "rows": ("rows", "{:,}"),
    "rows_per_second": ("rows/s", "{:.2f}"),
    "tokens_per_second": ("new tokens/s", "{:,.0f}"),
    "ratio": ("ratio", "{:.2f}"),
    "peak_memory_gib": ("peak GiB", "{:.1f}"),
    "differing": ("other answers", "{:,}"),
    "largest_margin": ("margin", "{:.3f}"),
}
# Padded batches by transformers' generate, what evaluate.py does, the same without CUDA graphs, without fused kernels.
VARIANTS = ("padded", "engine", "eager", "unfused")
# accelerate's names of the types that training computes in.
ACCELERATE = {None: "no", "bfloat16": "bf16", "float16": "fp16"}
UNFUSED = ("padded", "unfused")
ONE_BY_ONE = "transformers, one row at a time"
Tokens = dict[int, list[int]]


@dataclass(frozen=True)
class AnswerWork:
    """Rows to answer, each up to `new_tokens`, with one arm or with three: base, prompted and tuned.

    With `metrics` they are answered and scored as at an evaluation while training. With `one_by_one` answers are compared
    with those of transformers' generate to one row at a time, else with the first variant's.
    """

    name: str
    rows: Sequence[int]
    new_tokens: int
    arms: int = 1
    metrics: GenerationMetrics | None = None
    one_by_one: bool = False


@dataclass(frozen=True)
class AnswerTimes:
    """How long the rows of a work took, the tokens of their answers, and the most memory of the GPU meanwhile.

    `parts` are seconds and number of the parts of an engine's work (`Clock`).
    """

    seconds: float
    answers: Tokens
    peak_memory_gib: float
    parts: dict[str, tuple[float, int]]


@dataclass(frozen=True)
class Bench:
    """A model with an adapter, and the questions that it is asked. Encoders: with the system message and without."""

    model: Any
    fused: Mapping[Any, Any]
    encoder: Encoder
    bare: Encoder
    rows: Rows
    conversations: Sequence[Conversation]
    batch_size: int
    mixed_precision: str

    @contextlib.contextmanager
    def kernels(self, on: bool) -> Iterator[None]:
        """Answer with fused kernels or without; `fused` are the forwards that layers have with them.

        Without, adapters compute in float32, as PEFT has them; their values are those of the model's type all the same.
        """
        base = self.model.get_base_model()
        own = base.config.vision_config._attn_implementation.endswith(OWN)
        adapter = [weight for name, weight in self.model.named_parameters() if "lora_" in name]
        types = [weight.dtype for weight in adapter]
        if not on:
            if own:
                use_segmented_vision_attention(base)
            for layer in self.fused:
                del layer.forward
            for weight in adapter:
                weight.data = weight.data.float()
        try:
            yield
        finally:
            if not on:
                if own:
                    use_segmented_vision_attention(base, own=True)
                for layer, forward in self.fused.items():
                    layer.forward = forward
                for weight, dtype in zip(adapter, types, strict=True):
                    weight.data = weight.data.to(dtype)

    def encoders(self, arms: int) -> list[tuple[Encoder, bool]]:
        """Return the encoder of each arm, and whether its adapter is on."""
        return [(self.bare, False), (self.encoder, False), (self.encoder, True)][-arms:]

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Estimate the prompts' tokens."""
        return [estimate_length(self.encoder, self.conversations[row]) for row in rows]


def run_session(options: AnswerBenchmarkOptions) -> str:
    """Answer every work with every variant and write results.json, all in turns; returns the table. Raises `UserError`."""
    unknown = [name for name in options.variants if name not in VARIANTS]
    if unknown:
        raise UserError(f"--variants: unknown {', '.join(unknown)}; known are {', '.join(VARIANTS)}")
    keys = recipe_values(options.recipe_keys, options)
    make_output_dir(options.output_dir)
    model_dir = random_model_of(options)
    recipe = read_recipe(options.recipe, {**keys, "model_name_or_path": str(model_dir)})
    began = time.perf_counter()
    bench = _bench(recipe, options)
    print(f"model and rows ready after {time.perf_counter() - began:.0f} s", flush=True)
    facts = {"config": options.config, "recipe": str(options.recipe), "keys": keys, **machine_facts()}
    results: list[dict[str, Any]] = []
    for work in _works(bench, options):
        before = list(results)
        for name in options.variants:
            # A few rows first: kernels are compiled and loaded.
            _answer(name, bench, replace(work, metrics=None), work.rows[: options.batch_size], Clock())
        rounds: dict[str, list[AnswerTimes]] = {}
        for name in list(options.variants) * options.rounds:
            clock = Clock()
            rounds.setdefault(name, []).append(_timed(partial(_answer, name, bench, work, work.rows, clock), clock))
            print(
                f"{work.name}, {name}: {len(work.rows) * work.arms / rounds[name][-1].seconds:.2f} rows/s", flush=True
            )
            # After each, so that results are kept if the session ends early.
            results = before + _summarise(work, rounds)
            _write(options, {**facts, "results": results})
        compared = _compare(bench, work, rounds)
        results = before + [result | compared[result["variant"]] for result in results[len(before) :]]
        _write(options, {**facts, "results": results})
    return format_table(results, COLUMNS)


def _write(options: AnswerBenchmarkOptions, found: Mapping[str, Any]) -> None:
    (options.output_dir / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _summarise(work: AnswerWork, rounds: Mapping[str, Sequence[AnswerTimes]]) -> list[dict[str, Any]]:
    """Return the medians of each variant, and how its speed compares with the first's."""
    medians = {name: statistics.median(one.seconds for one in timed) for name, timed in rounds.items()}
    reference, count = next(iter(rounds)), len(work.rows) * work.arms
    results = []
    for name, timed in rounds.items():
        answers = timed[-1].answers
        result = {
            "work": work.name,
            "variant": name,
            "rows": count,
            "new_tokens": work.new_tokens,
            "seconds": [one.seconds for one in timed],
            "rows_per_second": count / medians[name],
            "tokens_per_second": sum(map(len, answers.values())) * work.arms / medians[name] if answers else None,
            "ratio": medians[reference] / medians[name],
            "peak_memory_gib": max(one.peak_memory_gib for one in timed) or None,
            "parts": {part: {"seconds": took, "times": times} for part, (took, times) in timed[-1].parts.items()},
        }
        results.append(result)
    return results


def _compare(bench: Bench, work: AnswerWork, rounds: Mapping[str, Sequence[AnswerTimes]]) -> dict[str, dict[str, Any]]:
    """Return for each variant which answers differ, and from whose."""
    reference = next(iter(rounds))
    name, expected = reference, rounds[reference][0].answers
    if work.one_by_one:
        with bench.kernels(on=False):
            name, expected = (
                ONE_BY_ONE,
                _padded(replace(bench, batch_size=1), bench.encoder, work.rows, work.new_tokens),
            )
    return {
        variant: {"compared_with": name, **_differences(bench, expected, timed[-1].answers)}
        for variant, timed in rounds.items()
    }


def _bench(recipe: Recipe, options: AnswerBenchmarkOptions) -> Bench:
    context = read_context(bool(recipe.get("use_cpu")))
    model = load_model(recipe.model, context.on_cpu, context.local_rank)
    own = {layer for layer in model.modules() if "forward" in vars(layer)}
    use_fused_kernels(model, answering_kernels(recipe.model, context.on_cpu))
    model = get_peft_model(model, lora_config(model, recipe.model)).eval()
    numbers = torch.Generator().manual_seed(0)
    dtype = getattr(torch, recipe.model.dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=numbers) * LORA_B_STD)
        if "lora_" in name:
            parameter.data.copy_(parameter.data.to(dtype))
    answer_with_adapters(model, recipe.model)
    fused = {layer: vars(layer)["forward"] for layer in model.modules() if "forward" in vars(layer)}
    fused = {layer: forward for layer, forward in fused.items() if layer not in own}
    data = recipe.data
    if not data.dataset_name:
        raise UserError("dataset_name is not set; name a dataset with --dataset_name")
    rows = open_split(data, options.split, streaming=False)
    processor = load_processor(recipe.model, data.min_pixels, data.max_pixels)
    message, chat = rows.format.resolve_system_message(data.system_message), load_family(recipe.model).chat
    # In memory, as they are in an evaluation's second arm; decoding them is part of what is measured.
    most = min(len(rows), max(options.rows, options.long_rows) * 4)
    conversations = [rows.conversation(rows.dataset[row]).up_to_last_answer() for row in range(most)]
    encoder, bare = Encoder(processor, message, chat=chat), Encoder(processor, chat=chat)
    return Bench(
        model, fused, encoder, bare, rows, conversations, options.batch_size, ACCELERATE[recipe.mixed_precision]
    )


def _works(bench: Bench, options: AnswerBenchmarkOptions) -> Iterator[AnswerWork]:
    images = [tuple(file.content_hash for file in asked.media) for asked in bench.conversations]
    first = list({image: row for row, image in reversed([*enumerate(images)])}.values())[::-1]
    shared, new_tokens = range(min(options.rows, len(images))), options.new_tokens
    works = {
        "alone": lambda: AnswerWork("one question an image", first[: options.rows], new_tokens),
        "shared": lambda: AnswerWork("rows as they come", shared, new_tokens),
        "arms": lambda: AnswerWork("three arms", shared, new_tokens, arms=3),
        "long": lambda: AnswerWork("long answers", first[: options.long_rows], options.long_tokens),
        "predict": lambda: AnswerWork(
            "predict_with_generate", shared, new_tokens, metrics=_metrics(bench, shared, new_tokens)
        ),
        "checked": lambda: AnswerWork("checked rows", first[: options.checked_rows], new_tokens, one_by_one=True),
    }
    unknown = [name for name in options.works if name not in works]
    if unknown:
        raise UserError(f"--works: unknown {', '.join(unknown)}; known are {', '.join(works)}")
    for name in options.works:
        yield works[name]()


def _metrics(bench: Bench, rows: Sequence[int], new_tokens: int) -> GenerationMetrics:
    chosen = scan(bench.rows.select(list(rows)), bench.encoder, verify_images=False, num_proc=1)
    return GenerationMetrics(chosen, bench.encoder, None, bench.batch_size, new_tokens)


def _answer(variant: str, bench: Bench, work: AnswerWork, rows: Sequence[int], clock: Clock) -> Tokens:
    """Return the tokens of the last arm's answers, which is the tuned one; none of answers that are only scored."""
    found: Tokens = {}
    memory = FeatureMemory(FEATURE_BYTES, most_bytes_on_gpu=FEATURE_BYTES) if work.arms > 1 else None
    with bench.kernels(on=variant not in UNFUSED):
        for encoder, adapted in bench.encoders(work.arms):
            with contextlib.nullcontext() if adapted else bench.model.disable_adapter():
                if variant == "padded":
                    found = _padded(bench, encoder, rows, work.new_tokens)
                elif work.metrics is not None:
                    accelerator = Accelerator(mixed_precision=bench.mixed_precision)
                    work.metrics.measure(bench.model, accelerator, step=0)
                else:
                    engine = Engine(
                        bench.model,
                        encoder,
                        work.new_tokens,
                        memory=memory,
                        cuda_graphs=variant != "eager",
                        decode_kernel=variant not in UNFUSED,
                        clock=clock,
                    )
                    found = _with_engine(engine, bench, rows)
    return found


def _padded(bench: Bench, encoder: Encoder, rows: Sequence[int], new_tokens: int) -> Tokens:
    batches = plan_batches(bench.lengths(rows), bench.batch_size)

    def encode(batch: Sequence[int]) -> list[Encoded]:
        return [encoder.encode_prompt(bench.conversations[rows[place]]) for place in batch]

    found: Tokens = {}
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = [reader.submit(encode, batch) for batch in batches]
        for batch, prompts in zip(batches, coming, strict=True):
            tokens = generate_tokens(bench.model, encoder, prompts.result(), new_tokens)
            found.update(zip([rows[place] for place in batch], tokens, strict=True))
    return {row: _without_padding(encoder, tokens) for row, tokens in found.items()}


def _without_padding(encoder: Encoder, tokens: list[int]) -> list[int]:
    ends = (encoder.end_of_turn_id, encoder.pad_token_id)
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]


def _with_engine(engine: Engine, bench: Bench, rows: Sequence[int]) -> Tokens:
    images = [tuple(file.content_hash for file in bench.conversations[row].media) for row in rows]
    units = [[rows[place] for place in unit] for unit in plan_units(bench.lengths(rows), images)]

    def prompt_at(row: int, read_media: ReadMedia) -> Encoded:
        return engine.encoder.encode_prompt(bench.conversations[row], read_media)

    found: Tokens = {}
    with closing(engine.steps(prompt_at, units)) as steps:
        for answered in steps:
            found |= {row.prompt.number: row.tokens for row in answered if row.finished}
    return found


def _timed(work: Callable[[], Tokens], clock: Clock) -> AnswerTimes:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    began = time.perf_counter()
    found = work()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    parts = {part: (took, clock.counts[part]) for part, took in clock.seconds().items()}
    return AnswerTimes(seconds, found, torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0, parts)


def _differences(bench: Bench, reference: Tokens, found: Tokens) -> dict[str, Any]:
    """Count the rows whose tokens differ, with the margins of their first differing tokens when each row is alone.

    `largest_margin` is in units of what the model's precision rounds a logit by: one of a few units is rounding, one of
    dozens would be another computation.
    """
    margins = []
    others = [row for row, tokens in found.items() if tokens != reference.get(row, tokens)]
    for row in others[:MOST_MARGINS]:
        tokens = found[row]
        same = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(tokens, reference[row], strict=False))
        )
        prompt = bench.encoder.encode_prompt(bench.conversations[row])
        so_far = torch.tensor(tokens[:same], dtype=torch.long)
        asked = replace(
            prompt,
            input_ids=torch.cat([prompt.input_ids, so_far]),
            mm_token_type_ids=torch.cat([prompt.mm_token_type_ids, torch.zeros_like(so_far)]),
            labels=torch.cat([prompt.labels, so_far]),
        )
        inputs = pad([asked], bench.encoder.pad_token_id)
        del inputs["labels"]
        with torch.no_grad():
            output = bench.model(
                **{name: value.to(bench.model.device) for name, value in inputs.items()}, logits_to_keep=1
            )
        logits = output.logits[0, -1].float()
        end = bench.encoder.pad_token_id
        one, other = ([*answer, end][same] for answer in (tokens, reference[row]))
        rounding = float(logits[one].abs()) * torch.finfo(output.logits.dtype).eps
        margins.append(float((logits[one] - logits[other]).abs()) / max(rounding, 1e-30))
    return {"differing": len(others), "margins": margins, "largest_margin": max(margins) if margins else None}
