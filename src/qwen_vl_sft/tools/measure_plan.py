"""Measure runs that plans are compared with: memory and step time by model, method, budget, checkpointing and sharing.

A model is loaded once for each method, as `gradient_checkpointing: auto` loads it; how many of its layers are
checkpointed, the budget and sharing then change from run to run.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, TrainerCallback

from qwen_vl_sft.atomic_write import atomic_write
from qwen_vl_sft.batching.packing import StepPlan
from qwen_vl_sft.config.command_line import recipe_values
from qwen_vl_sft.config.reading import read_file, read_recipe
from qwen_vl_sft.data.scan import Scan
from qwen_vl_sft.distributed import launch
from qwen_vl_sft.distributed.context import read_context
from qwen_vl_sft.errors import UserError, first_line
from qwen_vl_sft.families.shape import released_config
from qwen_vl_sft.modeling.attention_kernels import SDPA
from qwen_vl_sft.modeling.flops import BatchStats
from qwen_vl_sft.modeling.model_rules import LORA_KEYS
from qwen_vl_sft.planning import rows as row_sizes
from qwen_vl_sft.planning.options import CheckPlanOptions
from qwen_vl_sft.tools.benchmark import ALL_PROJECTIONS, KERNELS, PACKED, RARELY, train_timed
from qwen_vl_sft.tools.measuring import TRAINING_ALONE, machine_facts
from qwen_vl_sft.tools.random_model import make_random_model
from qwen_vl_sft.training import sft
from qwen_vl_sft.training.memory import MemoryProbe, all_layers
from qwen_vl_sft.training.prepared_data import PreparedData, prepare_data, with_train_rows
from qwen_vl_sft.training.resolve import Run, resolve

KEYS: dict[str, Any] = {**PACKED, **KERNELS, "bf16": True, "global_batch_size": 16}
METHODS: dict[str, dict[str, Any]] = {
    "QLoRA": {"load_in_4bit": True, "lora_r": 8, "lora_target_modules": ["q_proj", "v_proj"]},
    "LoRA": {"load_in_4bit": False, **ALL_PROJECTIONS},
    "full": {"load_in_4bit": False, "use_peft": False},
}


@dataclass(frozen=True)
class Setting:
    """What differs between runs of one model and method."""

    tokens_per_batch: int
    share_prefixes: bool = False
    checkpointed: bool = False

    @property
    def about(self) -> str:
        """Return it in words."""
        words = [f"{'shared' if self.share_prefixes else 'packed'} {self.tokens_per_batch:,}"]
        return ", ".join(words + ["checkpointed"] * self.checkpointed)


# A step of ChartQA's rows is one micro-batch of about 11,000 tokens, one of fewer, or three of the smaller budget.
SETTINGS = (Setting(16384), Setting(16384, checkpointed=True), Setting(16384, share_prefixes=True), Setting(4096))
# The most telling ones first: a run that is cut off has these.
GROUPS: tuple[tuple[str, str], ...] = (
    ("Qwen/Qwen2-VL-7B-Instruct", "QLoRA"),
    ("Qwen/Qwen2.5-VL-7B-Instruct", "QLoRA"),
    ("Qwen/Qwen2-VL-2B-Instruct", "full"),
    ("Qwen/Qwen2-VL-7B-Instruct", "LoRA"),
    ("Qwen/Qwen2-VL-2B-Instruct", "QLoRA"),
    ("Qwen/Qwen2.5-VL-7B-Instruct", "LoRA"),
    ("Qwen/Qwen2-VL-2B-Instruct", "LoRA"),
    ("Qwen/Qwen3-VL-8B-Instruct", "QLoRA"),
    ("Qwen/Qwen3-VL-8B-Instruct", "LoRA"),
)


class Checkpointed(TrainerCallback):
    """Has all layers of a model checkpointed, or none, from the first step of a run on."""

    def __init__(self, trainer: Any, every: bool) -> None:
        self.layers = all_layers(trainer.model)
        self.count = len(self.layers) if every else 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set it: the Trainer has just made all of them checkpointed."""
        for place, layer in enumerate(self.layers):
            layer.gradient_checkpointing = place < self.count


class StepEnds(TrainerCallback):
    """Keeps the moment of each step's end; the norm of the gradient has waited for the device by then."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep it."""
        self.moments.append(time.perf_counter())


@dataclass(frozen=True)
class Prepared:
    """A trainer of one model and method on the data, and the bytes that others hold on the GPU."""

    run: Run
    data: PreparedData
    trainer: Any
    others: int


def measure_points(
    options: CheckPlanOptions,
    groups: Sequence[tuple[str, str]] = GROUPS,
    settings: Sequence[Setting] = SETTINGS,
) -> bool:
    """Measure all runs on this machine, and write those that are done into `options.measure` after each.

    Returns whether plans can be compared with them: on a CPU nothing tells the memory.

    Models have random weights, lie in `options.model_dir` while they are needed, and are removed afterwards. No run begins
    once `options.seconds` are over. A group that fails is told in the file, and the others go on. Raises `UserError` for
    a processor or data that cannot be used.
    """
    assert options.measure is not None
    if options.processor is None:
        raise UserError("--measure needs --processor, a local folder or Hub id with a tokenizer and an image processor")
    keys, began = recipe_values(options.recipe_keys, options), time.monotonic()
    stored: dict[str, Any] = {
        "what": "runs on random weights, measured by scripts/check_plan.py --measure",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "keys_of_all": KEYS,
        "keys": keys,
        "steps": {"warmup": options.warmup, "timed": options.steps},
        **machine_facts(),
        "row_sizes": {},
        "failed": {},
        "points": [],
    }
    groups = [(model, method) for model, method in groups if _wanted(options, model, method)]
    for number, (model, method) in enumerate(groups):
        if time.monotonic() - began > options.seconds:
            break
        with _failures_told(stored, f"{model}, {method}", options.measure):
            folder = _made(model, options.model_dir, options.processor)
            prepared = _prepare(folder, method, options, keys)
            assert isinstance(prepared.data.train, Scan)
            stored["row_sizes"].setdefault(model, asdict(row_sizes.measured(prepared.data.train.lengths)))
            for setting in settings:
                name = f"{model}, {method}, {setting.about}"
                if time.monotonic() - began < options.seconds:
                    with _failures_told(stored, name, options.measure):
                        point = _measure(prepared, setting, options.warmup, options.steps)
                        stored["points"].append({"about": setting.about, "model": model, "method": method, **point})
                        print(f"{time.monotonic() - began:4.0f} s  {name}: {_told(point)}", flush=True)
            del prepared
        _forget()
        if model not in {later for later, _ in groups[number + 1 :]}:
            shutil.rmtree(options.model_dir / model.replace("/", "--"), ignore_errors=True)
    return torch.cuda.is_available()


def _wanted(options: CheckPlanOptions, model: str, method: str) -> bool:
    """Return whether a group is asked for. Its model is named in full, or by its name between owner and -Instruct."""
    names = {model, model.removeprefix("Qwen/").removesuffix("-Instruct")}
    return (not options.models or bool(names & set(options.models))) and (
        not options.methods or method in options.methods
    )


@contextlib.contextmanager
def _failures_told(stored: dict[str, Any], name: str, path: Path) -> Iterator[None]:
    """Write what is stored at the end; a failure is told there, and the next run goes on."""
    try:
        yield
    except (RuntimeError, OSError, UserError) as error:
        stored["failed"][name] = first_line(error)
        print(f"{name}: failed: {first_line(error)}", flush=True)
    atomic_write(path, json.dumps(stored, indent=1) + "\n")


def _made(model: str, parent: Path, processor: str) -> Path:
    """Make a random model of a released one's shape, if it is not there, and return its folder."""
    folder, config = parent / model.replace("/", "--"), parent / "config"
    if not (folder / "config.json").is_file():
        values = released_config(model)
        AutoConfig.for_model(values.pop("model_type"), **values).save_pretrained(config)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        make_random_model(str(config), folder, processor, device=device)
        shutil.rmtree(config)
        _forget()
    return folder


def _prepare(folder: Path, method: str, options: CheckPlanOptions, keys: Mapping[str, Any]) -> Prepared:
    """Load a model for a method, with the trainer that measures it."""
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    own = {"model_name_or_path": str(folder), "output_dir": str(options.model_dir / "run")}
    widest = {"gradient_checkpointing": True, "tokens_per_batch": max(entry.tokens_per_batch for entry in SETTINGS)}
    values = {
        **read_file(options.recipe),
        **TRAINING_ALONE,
        **RARELY,
        **KEYS,
        **widest,
        **METHODS[method],
        **own,
        **keys,
    }
    if method == "full":
        values = {name: value for name, value in values.items() if name not in LORA_KEYS}
    recipe = read_recipe(None, values)
    context = read_context(use_cpu=recipe.get("use_cpu"))
    run = resolve(recipe, context)
    launch.start(context)
    data = prepare_data(run)
    assert isinstance(data.train, Scan), "rows are looked up"
    data = with_train_rows(run, data, data.train)
    trainer = sft.build_trainer(run, sft.sft_config(run), data)
    trainer.remove_callback(MemoryProbe)  # what is checkpointed is stated here
    return Prepared(run, data, trainer, before)


def _measure(prepared: Prepared, setting: Setting, warmup: int, counted: int) -> dict[str, Any]:
    """Train some steps, and return what they took with the sizes of what they computed."""
    run, data, trainer, cuda = prepared.run, prepared.data, prepared.trainer, torch.cuda.is_available()
    plan = data.step_plan
    assert plan is not None, "rows are packed"
    plan = StepPlan(plan.sizes, plan.batch, setting.tokens_per_batch, plan.processes, plan.seed, setting.share_prefixes)
    layers = Checkpointed(trainer, setting.checkpointed)
    trainer._sampler.plan = plan
    ends = StepEnds()
    for callback in (layers, ends):
        trainer.add_callback(callback)
    timed = train_timed(trainer, counted, warmup)
    for callback in (layers, ends):
        trainer.remove_callback(callback)
    trainer.end_workers()
    steps = timed.fetched.steps
    settled = _settled(warmup, len(steps), len(plan))
    work = [sum(steps[number], BatchStats()) for number in settled]
    found: dict[str, Any] = {
        "keys": _stored_keys(run, setting),
        "strategy": "single",
        "processes": 1,
        "checkpointed": layers.count,
        "attention": "PyTorch" if run.chosen.attention == SDPA else run.chosen.attention,
        "last_mlp_spared": True,
        # Of all steps: the one that needs most memory depends on what trains.
        "batches": [[batch.tokens, batch.target_tokens, batch.patches] for step in steps for batch in step],
        "rows": statistics.fmean(one.rows for one in work),
        "step": [statistics.fmean(getattr(one, name) for one in work) for name in _STEP],
        "micro_batches": statistics.fmean(len(steps[number]) for number in settled),
        "seconds": statistics.fmean(ends.moments[number] - ends.moments[number - 1] for number in settled),
        "settled": settled,
        "waited": (timed.ended.waited - timed.began.waited) / counted,
    }
    found["each_step"] = [round(end - begin, 4) for begin, end in pairwise(ends.moments)]
    found["rows_per_second"] = found["rows"] / found["seconds"]
    if cuda:
        found["gib"] = (torch.cuda.max_memory_allocated() - prepared.others) / 2**30
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return found


def _settled(warmup: int, steps: int, epoch: int) -> list[int]:
    """Return the numbers of the steps whose time counts, from 0: after the warm-up, but those that begin an epoch.

    There the workers are started anew, and the first batch is waited for. Where no step is left, all count.
    """
    after = range(warmup, steps)
    return [number for number in after if number % epoch] or list(after)


_STEP = ("tokens", "tokens_squared", "target_tokens", "patches", "patches_squared")


def _stored_keys(run: Run, setting: Setting) -> dict[str, Any]:
    model = run.recipe.model
    names = ("load_in_4bit", "use_peft", "lora_r", "lora_target_modules", "lora_scope")
    keys = {name: getattr(model, name) for name in names}
    return {**keys, "tokens_per_batch": setting.tokens_per_batch, "share_prefixes": setting.share_prefixes}


def _told(point: Mapping[str, Any]) -> str:
    memory = f"{point['gib']:.2f} GiB ({point['reserved_gib']:.2f} reserved), " if "gib" in point else ""
    return f"{memory}{point['seconds']:.3f} s a step, {point['waited']:.3f} of them waiting for data"


def _forget() -> None:
    """Free what nothing refers to any more: a trainer and its model refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
