"""Command-line options of the scripts that measure and of those that make models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen_vl_sft.config.command_line import REQUIRED, any_recipe_key, names, option

Dtype = Literal["bfloat16", "float16", "float32"]
Signal = Literal["SIGKILL", "SIGTERM", "SIGUSR1", "SIGINT"]


def counts(text: str) -> tuple[int, ...]:
    """Read whole numbers between commas, each once."""
    try:
        return tuple(int(count) for count in names(text))
    except ValueError:
        raise ValueError("is not a list of whole numbers such as 1,2,4") from None


def json_value(text: str) -> Any:
    """Read JSON."""
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError('is not JSON such as {"text_config": {"num_hidden_layers": 2}}') from None


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """A recipe to measure, the folder of the results, and a random model; other keys go to the recipe."""

    recipe: Path = option(Path("recipes/chartqa_qlora.yaml"), "the recipe that is measured", metavar="file")
    output_dir: Path = option(REQUIRED, "folder of the results", metavar="folder")
    config: str | None = option(
        None, "random weights of this shape: local folder or Hub id with a config.json", metavar="model"
    )
    processor: str | None = option(
        None, "local folder or Hub id of the processor; default: that of --config", metavar="model"
    )
    model_dir: Path | None = option(None, "where the random model is kept; default: in output_dir", metavar="folder")
    recipe_keys: dict[str, list[str]] = any_recipe_key()


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(RecipeOptions):
    """Command-line options of benchmark.py."""

    config: str = option(
        REQUIRED, "random weights of this shape: local folder or Hub id with a config.json", metavar="model"
    )
    variants: str = option("trl,padded,packed,shared", "variants to measure, in this order", metavar="names")
    rounds: int = option(3, "times each variant runs", at_least=1)
    seconds: float = option(15.0, "how long a variant runs each time, about")
    repeat: int = option(1, "times each row is repeated in the data", at_least=1)


@dataclass(frozen=True, kw_only=True)
class AnswerBenchmarkOptions(RecipeOptions):
    """Command-line options of benchmark_answers.py."""

    config: str = option(
        REQUIRED, "random weights of this shape: local folder or Hub id with a config.json", metavar="model"
    )
    variants: tuple[str, ...] = option(
        ("padded", "engine"),
        "some of padded,engine,eager (no CUDA graphs),unfused (no kernels); ratios refer to the first",
        parse=names,
    )
    works: tuple[str, ...] = option(
        ("alone", "shared", "arms", "long", "predict", "checked"),
        "one question an image, rows as they come, three arms, long answers, while training, against transformers",
        parse=names,
        shown="all",
    )
    split: str = option("test", "split of the dataset, slices allowed")
    rows: int = option(256, "rows to answer", at_least=1)
    new_tokens: int = option(16, "most tokens of an answer", at_least=1)
    checked_rows: int = option(16, "rows that transformers answers one at a time", at_least=1)
    long_rows: int = option(64, "rows with long answers", at_least=1)
    long_tokens: int = option(256, "most tokens of a long answer", at_least=1)
    rounds: int = option(2, "times each variant runs", at_least=1)
    batch_size: int = option(16, "rows of a padded batch", at_least=1)


@dataclass(frozen=True, kw_only=True)
class CheckPackingOptions(RecipeOptions):
    """Command-line options of check_packing.py."""

    rows: int = option(32, "rows to compare", at_least=1)
    tokens_per_batch: int = option(8192, "tokens of a batch of packed rows", at_least=1)
    precisions: tuple[str, ...] = option(
        ("float32", "bfloat16"),
        "precisions to compare, some of float32, bfloat16, nf4 and fp8 (with bfloat16), fp8_forward and fp8_backward (FP8 in"
        " one direction), fp8_gradients (bfloat16, with FP8 products in the backward pass), emulation and"
        " emulation_gradients (the same on any device)",
        parse=names,
        shown="float32,bfloat16",
    )


@dataclass(frozen=True, kw_only=True)
class CompareBasesOptions(RecipeOptions):
    """Command-line options of compare_bases.py."""

    bases: tuple[str, ...] = option(
        ("bf16", "fp8", "nf4"),
        "two or more of bf16, float32, nf4, fp8, emulation (FP8 on any device), these two with _forward or _backward"
        " (FP8 in one direction) or _gradients (a base in 16 bits, with FP8 products in the backward pass); the first is"
        " what the others are compared with",
        parse=names,
        shown="bf16,fp8,nf4",
    )
    seeds: tuple[int, ...] = option((0,), "seeds of rows and adapter, e.g. 0,1,2", parse=counts, shown="0")
    steps: int = option(150, "optimizer steps of each run", at_least=1)
    controls: int = option(
        0,
        "times the first base is trained again, from weights moved as rounding does: how far that takes losses",
        at_least=0,
        shown="none",
    )


@dataclass(frozen=True, kw_only=True)
class CompareStrategiesOptions(RecipeOptions):
    """Command-line options of compare_strategies.py."""

    strategies: tuple[str, ...] = option(
        ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2"),
        "strategies to compare",
        parse=names,
        shown="single,ddp,zero1,zero2,zero3,fsdp2",
    )
    processes: tuple[int, ...] = option((2,), "numbers of processes, e.g. 1,2,4", parse=counts, shown="2")
    modes: tuple[str, ...] = option(
        ("recipe",), "some of qlora,lora,full; default: what the recipe says", parse=names, shown=""
    )
    warmup: int = option(5, "first steps, whose speed does not count", at_least=0)
    timeout: float = option(1800.0, "seconds a run may take")
    kill: bool = option(False, "kill and resume each strategy once more, and compare")
    keep_models: bool = option(False, "keep every run's weights, not only the first's")


@dataclass(frozen=True, kw_only=True)
class DataCostsOptions:
    """Command-line options of data_costs.py."""

    output_dir: Path = option(REQUIRED, "folder of the results, and of the data that are made up", metavar="folder")
    parts: tuple[str, ...] = option(
        ("starts", "worker", "turns", "planning"),
        "some of starts,large,worker,turns,planning",
        parse=names,
        shown="starts,worker,turns,planning",
    )
    before: Path | None = option(
        None,
        "folder of another version, with its environment in .venv, whose starts are measured too",
        metavar="folder",
    )
    processor: str | None = option(
        None, "local folder or Hub id of the processor; default: that of the embedded model", metavar="model"
    )
    rows: int = option(665_000, "rows of the part large", at_least=1)
    images: int = option(20_000, "image files that they show", at_least=1)
    processes: int = option(2, "processes of the part large", at_least=1)


@dataclass(frozen=True, kw_only=True)
class KillAndResumeOptions:
    """Command-line options of kill_and_resume.py; other keys go to the recipe."""

    kills: int = option(20, "how often")
    processes: int = option(1, "processes of the run")
    config: str = option("cpu", "how several processes share the work: zero2, zero3, fsdp2, ...", metavar="name")
    packing: bool = option(False, "packed batches with shared prefixes")
    signal: Signal = option("SIGKILL", "any but SIGKILL stops the run instead")
    seed: int = option(0, "seed of the random moments")
    output_dir: Path = option(Path("runs/kill_and_resume"), "folder of the runs", metavar="folder")
    report: Path | None = option(None, "add the result to this JSON file", metavar="file")
    recipe_keys: dict[str, list[str]] = any_recipe_key()


@dataclass(frozen=True, kw_only=True)
class RandomModelOptions:
    """Command-line options of make_random_model.py."""

    config: str = option(REQUIRED, "local folder or Hub id with a config.json", metavar="model")
    output_dir: Path = option(REQUIRED, "new folder", metavar="folder")
    processor: str | None = option(
        None, "local folder or Hub id of the processor; default: that of --config", metavar="model"
    )
    dtype: Dtype = option("bfloat16", "precision of the weights")
    overrides: dict[str, Any] | None = option(
        None, 'JSON, e.g. {"text_config": {"num_hidden_layers": 2}}', parse=json_value
    )
    seed: int = option(0, "seed of the weights")
    device: str = option("cpu", "where the weights are drawn; cuda is faster")


@dataclass(frozen=True, kw_only=True)
class TinyOptions:
    """Command-line options of make_tiny.py."""

    output_dir: Path = option(REQUIRED, "folder that gets model/ and data/; must not hold them yet", metavar="folder")
    steps: int | None = option(None, "pretraining steps; fewer give a model that cannot read charts yet", at_least=0)
    seed: int = option(0, "seed of the first weights; the charts do not depend on it")
    threads: int = option(1, "CPU threads; the shipped weights were made with 1", at_least=1)
    check: bool = option(False, "compare with the shipped assets; exit 1 if they differ")
