"""Measure ways of training side by side in one process: the variants, their rounds, the results."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen_vl_sft.compat.for_transformers import compute_linear_attention_on_cpu, use_one_gpu
from qwen_vl_sft.config.command_line import recipe_values
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.data.dataset import Rows
from qwen_vl_sft.data.encoding import Encoded, Encoder
from qwen_vl_sft.data.media import ReadMedia
from qwen_vl_sft.data.row_files import parse_texts
from qwen_vl_sft.data.scan import Scan
from qwen_vl_sft.distributed import launch
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import UserError, raise_all
from qwen_vl_sft.modeling import linear_attention
from qwen_vl_sft.modeling.base_model import load_family, quantization_config
from qwen_vl_sft.modeling.flops import BatchStats, FlopCounter, peak_flops
from qwen_vl_sft.modeling.lora import lora_config
from qwen_vl_sft.tools.measuring import (
    TEXT,
    TRAINING_ALONE,
    contradictions,
    format_table,
    machine_facts,
    make_output_dir,
    random_model_of,
)
from qwen_vl_sft.tools.options import BenchmarkOptions
from qwen_vl_sft.tools.prepared_run import IN_16_BITS, set_up
from qwen_vl_sft.tools.timed_steps import train_timed
from qwen_vl_sft.training import precompute_features
from qwen_vl_sft.training.prepared_data import PreparedData, with_train_rows
from qwen_vl_sft.training.trainer import VisionSFTTrainer
from qwen_vl_sft.training.trainer_setup import build_trainer, sft_config

NOT_PACKED = {"packing": False, "share_prefixes": False}
PACKED = {"packing": True, "share_prefixes": False, "gradient_checkpointing": False, "lora_dropout": 0.0}
KERNELS = {"fused_kernels": "auto"}
ALL_PROJECTIONS = {"lora_target_modules": None, "lora_scope": "language", "lora_r": 16, "lora_alpha": 32}
CACHED = {"cache_image_features": "bfloat16"}
# What each variant changes in the recipe; None is TRL's trainer.
VARIANTS: dict[str, Mapping[str, Any] | None] = {
    "trl": None,
    "padded": {**NOT_PACKED, "gradient_checkpointing": True},
    "packed_checkpointing": {**PACKED, **KERNELS, "gradient_checkpointing": True, "tokens_per_batch": 8192},
    "packed_plain": {**PACKED, "tokens_per_batch": 8192},
    "packed": {**PACKED, **KERNELS, "tokens_per_batch": 8192},
    "packed_16k": {**PACKED, **KERNELS, "tokens_per_batch": 16384},
    "packed_32k": {**PACKED, **KERNELS, "tokens_per_batch": 32768},
    "shared": {**PACKED, **KERNELS, "tokens_per_batch": 16384, "share_prefixes": True},
    "shared_all": {**PACKED, **KERNELS, **ALL_PROJECTIONS, "tokens_per_batch": 8192, "share_prefixes": True},
    "packed_sdpa": {**PACKED, **KERNELS, "tokens_per_batch": 8192, "attn_implementation": "sdpa"},
    "packed_all": {**PACKED, **KERNELS, **ALL_PROJECTIONS, "tokens_per_batch": 8192},
    "packed_16k_all": {**PACKED, **KERNELS, **ALL_PROJECTIONS, "tokens_per_batch": 16384},
    "cached": {**PACKED, **KERNELS, **CACHED, "tokens_per_batch": 32768},
    "shared_cached": {**PACKED, **KERNELS, **CACHED, "tokens_per_batch": 16384, "share_prefixes": True},
    "smallest": {**PACKED, **KERNELS, "gradient_checkpointing": True, "tokens_per_batch": 2816},
}
# What follows a plus sign in the name of a variant: the precision of its base, in place of the recipe's.
BASES: dict[str, Mapping[str, Any]] = {
    "bf16": IN_16_BITS,
    "nf4": {**IN_16_BITS, "load_in_4bit": True},
    "fp8": {**IN_16_BITS, "load_in_fp8": True},
    "fp8_gradients": {**IN_16_BITS, "fp8_gradients": True},
}
TRL_BATCH = 4
COLUMNS = {
    "variant": ("variant", TEXT),
    "rows_per_second": ("rows/s", "{:.2f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "ratio": ("ratio", "{:.2f}"),
    "tflops": ("useful TFLOP/s", "{:.0f}"),
    "mfu": ("MFU", "{:.1%}"),
    "peak_memory_gib": ("peak GiB", "{:.1f}"),
    "data_wait": ("waiting for data", "{:.1%}"),
}
WARMUP = 3
# A round of fewer rows says more of those rows than of the variant.
FEWEST_ROWS = 96
RARELY = {"logging_steps": 10_000}


@dataclass
class Variant:
    """A trainer that is ready to run, and the mean work of a row; `counter` counts the useful FLOPs of work."""

    name: str
    trainer: Any
    rows_per_step: int
    row: BatchStats
    tokens_per_row: float
    counter: FlopCounter
    bytes_of_weights: int = 0

    def work_done(self, steps: int) -> BatchStats:
        """Return the work so far: as our trainer counts it, or estimated from average rows for TRL's."""
        meter = getattr(self.trainer, "throughput", None)
        if meter is not None:
            return meter.total + meter.work
        rows = steps * self.rows_per_step
        return BatchStats(*(value * rows for value in vars(self.row).values()))

    def reorder(self, seed: int) -> None:
        """Make the next run use another order of rows, as a few steps of one order are not a fair sample."""
        sampler = self.trainer.sampler if isinstance(self.trainer, VisionSFTTrainer) else None
        if sampler is not None:
            sampler.reseed(seed)
        else:
            self.trainer.args.data_seed = seed


def read_names(text: str) -> list[str]:
    """Read variants between commas. Raises `UserError` for an unknown one, and for none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [repr(name) for name in names if not _is_known(name)]
    if unknown or not names:
        what = f"unknown variant {', '.join(unknown)}" if unknown else "names none"
        raise UserError(
            f"--variants: {what}; known are {', '.join(VARIANTS)}, with another base as in packed+fp8 ({', '.join(BASES)})"
        )
    return names


def _is_known(name: str) -> bool:
    variant, plus, base = name.partition("+")
    return variant in VARIANTS and (not plus or base in BASES)


def settings_of(name: str) -> dict[str, Any]:
    """Return what a known variant changes in the recipe, and its base."""
    variant, _, base = name.partition("+")
    return {**(VARIANTS[variant] or NOT_PACKED), **(BASES[base] if base else {})}


def build(name: str, recipe_file: Path, keys: Mapping[str, Any], repeat: int) -> Variant:
    """Load the model of a variant and set up its trainer on the recipe's rows, each standing `repeat` times.

    Raises `UserError` for a recipe that cannot work.
    """
    keys = {**keys, **settings_of(name)}
    if "cache_image_features" in keys:
        keys.setdefault("image_features_dir", str(Path(keys["output_dir"]).with_name("image_features")))
    run, data = set_up(recipe_file, keys)
    assert isinstance(data.train, Scan), "rows are looked up"
    data = with_train_rows(run, data, repeated(data.train, repeat))
    scan: Any = data.train
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    if VARIANTS[name.partition("+")[0]] is None:
        trainer, rows = trl_trainer(run.recipe, run.context, data), TRL_BATCH
    else:
        trainer = build_trainer(run, sft_config(run), data)
        rows = math.ceil(len(scan.rows) / run.global_batch.steps(scan.lengths.tokens))
        if data.features:
            precompute_features.fill(trainer, data.features, skip_bad_rows=False)
    after = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    counter = FlopCounter.of(trainer.model.config, peft=True, trained={"language"}, packed=run.recipe.run.packing)
    return Variant(name, trainer, rows, mean_work(scan), float(scan.lengths.tokens.mean()), counter, after - before)


@dataclass(frozen=True)
class RepeatedRows(Rows):
    """The same `once` rows several times. Images of one time and another go through the tower as if they were not alike."""

    once: int = 1

    def encode(self, item: Mapping[str, Any], encoder: Encoder, read_media: ReadMedia | None = None) -> Encoded:
        """Encode a row as `Rows` does, with another image hash in each repetition."""
        row = super().encode(item, encoder, read_media)
        time = item["row"] // self.once
        # Those of the first time are the ones that kept features are filed by.
        images = [
            dataclasses.replace(image, content_hash=f"{image.content_hash}-{time}") if time else image
            for image in row.media
        ]
        return dataclasses.replace(row, media=tuple(images))


def repeated(scan: Scan, times: int) -> Scan:
    """Repeat the rows, so that an epoch is long; the images of each repetition count as different."""
    lengths = scan.lengths.select(np.tile(np.arange(len(scan.lengths)), times))
    apart = np.repeat(np.arange(times), len(scan.rows)) * (int(scan.lengths.prefix.max()) + 1)
    lengths = dataclasses.replace(lengths, prefix=np.where(lengths.prefix < 0, -1, lengths.prefix + apart))
    rows = scan.rows.select([*range(len(scan.rows))] * times)
    rows = RepeatedRows(rows.dataset, rows.format, rows.name, rows.folder, once=len(scan.rows))
    return dataclasses.replace(scan, rows=rows, kept=np.tile(scan.kept, times), lengths=lengths)


def mean_work(scan: Scan) -> BatchStats:
    """Return the mean work of a row, assuming images of one size within a row."""
    lengths = scan.lengths
    images = np.maximum(lengths.images, 1)
    return BatchStats(
        tokens=round(lengths.tokens.mean()),
        tokens_squared=round((lengths.tokens**2).mean()),
        target_tokens=round(lengths.target_tokens.mean()),
        images=round(lengths.images.mean()),
        patches=round(lengths.patches.mean()),
        patches_squared=round((lengths.patches**2 / images).mean()),
        rows=1,
    )


def trl_trainer(recipe: Recipe, context: DistributedContext, data: PreparedData) -> Any:
    """Build TRL's SFTTrainer with its own vision collator: padded batches of 4, checkpointing, loss on all tokens."""
    from transformers import AutoModelForImageTextToText
    from trl import SFTConfig, SFTTrainer

    settings = recipe.model
    if not context.on_cpu:
        linear_attention.complete_installed()
    model = AutoModelForImageTextToText.from_pretrained(
        str(settings.model_name_or_path),
        dtype=getattr(torch, settings.dtype),
        quantization_config=quantization_config(settings, load_family(settings)),
        attn_implementation="sdpa",
        device_map=None if context.on_cpu else {"": 0},
    )
    compute_linear_attention_on_cpu(model)
    args = SFTConfig(
        output_dir=str(recipe.output_dir),
        per_device_train_batch_size=TRL_BATCH,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        max_length=None,
        bf16=recipe.get("bf16"),
        optim=recipe.get("optim"),
        learning_rate=recipe.get("learning_rate"),
        max_grad_norm=recipe.get("max_grad_norm"),
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_num_workers=recipe.get("dataloader_num_workers"),
        dataloader_persistent_workers=recipe.get("dataloader_persistent_workers"),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=10_000,
        **launch.training_arguments(context),
    )
    use_one_gpu(args)
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=as_messages(data),
        processing_class=data.encoder.processor,
        peft_config=lora_config(model, settings),
    )


def as_messages(data: PreparedData) -> Any:
    """Build a dataset for TRL's collator, read lazily: messages with placeholders, and decoded images."""
    assert isinstance(data.train, Scan)
    rows, system_message = data.train.rows, data.encoder.system_message
    start = [{"role": "system", "content": [{"type": "text", "text": system_message}]}] if system_message else []

    def read(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        columns = parse_texts(batch)
        raw = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        conversations = [rows.conversation(row) for row in raw]
        return {
            "messages": [start + conversation.messages for conversation in conversations],
            "images": [[file.decode() for file in conversation.media] for conversation in conversations],
        }

    return rows.dataset.with_transform(read)  # type: ignore[union-attr]


def measure(variant: Variant, steps: int, warmup: int, order: int = 0) -> dict[str, float]:
    """Train `warmup` and `steps` steps of the rows in some order, and return the speed of the latter."""
    variant.reorder(order)
    trainer, cuda = variant.trainer, torch.cuda.is_available()
    others = torch.cuda.memory_allocated() - variant.bytes_of_weights if cuda else 0
    timed = train_timed(trainer, steps, warmup, variant.work_done)
    began, ended, seconds = timed.began, timed.ended, timed.seconds
    rows = ended.told.rows - began.told.rows
    found = {
        "rows_per_second": rows / seconds,
        "tokens_per_second": rows * variant.tokens_per_row / seconds,
        "data_wait": (ended.waited - began.waited) / seconds,
        "tflops": (variant.counter.flops(ended.told) - variant.counter.flops(began.told)) / seconds / 1e12,
        "loss": trainer.state.log_history[-1].get("train_loss", float("nan")),
    }
    if cuda:
        found["peak_memory_gib"] = (torch.cuda.max_memory_allocated() - others) / 2**30
    return found


def summarise(measured: Sequence[dict[str, dict[str, float]]], reference: str) -> list[dict[str, Any]]:
    """Return each variant's medians over the rounds, and its speed relative to `reference` in the same round."""
    results = []
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    for name in measured[0]:
        found: dict[str, Any] = {"variant": name}
        for key in measured[0][name]:
            found[key] = statistics.median(one[name][key] for one in measured)
        found["ratio"] = statistics.median(
            one[name]["rows_per_second"] / one[reference]["rows_per_second"] for one in measured
        )
        if peak:
            found["mfu"] = found["tflops"] * 1e12 / peak
        results.append(found)
    return results


def write_results(folder: Path, results: Sequence[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Write results.json, results.md and speed.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({**facts, "results": results}, indent=2) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(format_table(results, COLUMNS) + "\n", encoding="utf-8")
    figure, axes = pyplot.subplots(figsize=(7, 0.5 * len(results) + 1.2), layout="constrained")
    names, speeds = [result["variant"] for result in results], [result["rows_per_second"] for result in results]
    bars = axes.barh(names, speeds, color="#2563eb")
    axes.bar_label(bars, [f"{speed:.1f}" for speed in speeds], padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("rows a second")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "speed.png", dpi=150)
    pyplot.close(figure)


def run_session(options: BenchmarkOptions) -> str:
    """Run everything and write the results; returns the table. Raises `UserError`."""
    names = read_names(options.variants)
    keys = recipe_values(options.recipe_keys, options)
    raise_all([*contradictions(keys, "variants", {name: settings_of(name) for name in names})])
    make_output_dir(options.output_dir)
    model_dir = random_model_of(options)
    variants = []
    for name in names:
        own = {"model_name_or_path": str(model_dir), "output_dir": str(options.output_dir / "runs" / name)}
        variants.append(build(name, options.recipe, {**TRAINING_ALONE, **RARELY, **own, **keys}, options.repeat))
        print(f"ready: {name}", flush=True)
    steps = {variant.name: steps_of_a_round(variant, options.seconds) for variant in variants}
    measured: list[dict[str, dict[str, float]]] = []
    for number in range(options.rounds):
        measured.append({variant.name: measure(variant, steps[variant.name], WARMUP, number) for variant in variants})
        speeds = ", ".join(f"{name} {one['rows_per_second']:.2f}" for name, one in measured[-1].items())
        print(f"round {number + 1}: {speeds} rows/s", flush=True)
        # After each round, so that results are kept if the run ends early.
        results = summarise(measured, reference=names[0])
        write_results(options.output_dir, results, _facts(options, keys, steps, measured, variants))
    return format_table(results, COLUMNS)


def steps_of_a_round(variant: Variant, seconds: float) -> int:
    """Return how many steps take about `seconds` and have at least `FEWEST_ROWS` rows."""
    # A first run compiles and loads kernels, and is far slower.
    measure(variant, steps=3, warmup=WARMUP)
    speed = measure(variant, steps=3, warmup=WARMUP)["rows_per_second"]
    return max(3, math.ceil(max(FEWEST_ROWS, seconds * speed) / variant.rows_per_step))


def _facts(
    options: BenchmarkOptions, keys: dict[str, Any], steps: dict[str, int], measured: Any, variants: Any
) -> dict[str, Any]:
    return {
        "config": options.config,
        "recipe": str(options.recipe),
        "keys": keys,
        "reference": variants[0].name,
        "tokens_per_row": variants[0].tokens_per_row,
        "steps": steps,
        "rounds": measured,
        **machine_facts(),
    }
