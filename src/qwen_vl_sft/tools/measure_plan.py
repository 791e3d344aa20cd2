"""Measure runs that plans are compared with: memory and step time by model, method, budget, checkpointing and sharing.

A model is loaded once for each method, as `gradient_checkpointing: auto` loads it; how many of its layers are
checkpointed, the budget, sharing and the allocator's segments then change from run to run. A run ends when its steps
have settled, and the last of them count.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import statistics
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, TrainerCallback

from qwen_vl_sft.atomic_write import atomic_write
from qwen_vl_sft.batching.packing import StepPlan
from qwen_vl_sft.config.command_line import recipe_values
from qwen_vl_sft.config.model_rules import LORA_KEYS
from qwen_vl_sft.config.reading import read_file
from qwen_vl_sft.data.scan import Scan
from qwen_vl_sft.errors import UserError, first_line, raise_all
from qwen_vl_sft.families.released import released_config
from qwen_vl_sft.modeling.attention_kernels import SDPA
from qwen_vl_sft.modeling.flops import BatchStats
from qwen_vl_sft.planning.cards import CARDS, card_of_device
from qwen_vl_sft.planning.inputs import Launch, find_shape
from qwen_vl_sft.planning.options import CheckPlanOptions
from qwen_vl_sft.planning.rows import ASSUMED, measured_sizes
from qwen_vl_sft.planning.run import RunPlan
from qwen_vl_sft.tools.benchmark import ALL_PROJECTIONS, KERNELS, PACKED, RARELY
from qwen_vl_sft.tools.measuring import TRAINING_ALONE, contradictions, machine_facts
from qwen_vl_sft.tools.prepared_run import set_up
from qwen_vl_sft.tools.random_model import make_random_model
from qwen_vl_sft.tools.settled_steps import ALIKE, WORK, Steps, counting, have_settled
from qwen_vl_sft.tools.timed_steps import watched_fetching
from qwen_vl_sft.training.memory import MemoryProbe, all_layers
from qwen_vl_sft.training.prepared_data import PreparedData, with_train_rows
from qwen_vl_sft.training.resolve import Run
from qwen_vl_sft.training.trainer_setup import build_trainer, sft_config

KEYS: dict[str, Any] = {**PACKED, **KERNELS, "bf16": True, "global_batch_size": 16}
METHODS: dict[str, dict[str, Any]] = {
    "QLoRA": {"load_in_4bit": True, "lora_r": 8, "lora_target_modules": ["q_proj", "v_proj"]},
    "LoRA": {"load_in_4bit": False, **ALL_PROJECTIONS},
    "full": {"load_in_4bit": False, "use_peft": False},
}
# What each run has of its own (`Setting`).
OF_EACH_RUN = ("packing", "share_prefixes", "tokens_per_batch", "gradient_checkpointing")


@dataclass(frozen=True)
class Setting:
    """What differs between runs of one model and method; PyTorch's allocator has `expandable` segments, as in training."""

    tokens_per_batch: int
    share_prefixes: bool = False
    checkpointed: bool = False
    expandable: bool = True

    @property
    def about(self) -> str:
        """Return it in words."""
        words = [f"{'shared' if self.share_prefixes else 'packed'} {self.tokens_per_batch:,}"]
        words += ["checkpointed"] * self.checkpointed
        return ", ".join(words + ["segments of fixed sizes"] * (not self.expandable))


# A step of ChartQA's rows is one micro-batch of about 11,000 tokens, one of fewer, or three of the smaller budget.
WIDE, FIXED = Setting(16384), Setting(16384, expandable=False)
CHECKPOINTED, SHARED, NARROW = Setting(16384, checkpointed=True), Setting(16384, share_prefixes=True), Setting(4096)
SETTINGS = (WIDE, CHECKPOINTED, SHARED, NARROW)


@dataclass(frozen=True)
class Group:
    """Runs of one model and method, which is loaded once for them."""

    model: str
    method: str
    settings: tuple[Setting, ...] = SETTINGS


# The most telling ones first: a run that is cut off has these. The first 14 runs have each model's size, method, budget,
# checkpointing and sharing.
GROUPS: tuple[Group, ...] = (
    Group("Qwen/Qwen2-VL-7B-Instruct", "QLoRA"),
    Group("Qwen/Qwen2-VL-7B-Instruct", "LoRA"),
    Group("Qwen/Qwen3-VL-8B-Instruct", "QLoRA"),
    Group("Qwen/Qwen2-VL-2B-Instruct", "full", (CHECKPOINTED, WIDE, FIXED, SHARED, NARROW)),
    Group("Qwen/Qwen2-VL-2B-Instruct", "QLoRA", (WIDE, FIXED, CHECKPOINTED, SHARED, NARROW)),
    Group("Qwen/Qwen3-VL-8B-Instruct", "LoRA"),
    Group("Qwen/Qwen3-VL-2B-Instruct", "LoRA"),
    Group("Qwen/Qwen2.5-VL-7B-Instruct", "QLoRA"),
    Group("Qwen/Qwen2.5-VL-7B-Instruct", "LoRA"),
    Group("Qwen/Qwen2-VL-2B-Instruct", "LoRA"),
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


@dataclass(frozen=True)
class Prepared:
    """A trainer of one model and method on the data, and the bytes that others hold on the GPU."""

    run: Run
    data: PreparedData
    trainer: Any
    others: int


def measure_points(options: CheckPlanOptions, groups: Sequence[Group] = GROUPS) -> bool:
    """Measure all runs on this machine, and write those that are done into `options.measure` after each.

    Returns whether plans can be compared with them: on a CPU nothing tells the memory.

    Models have random weights, lie in `options.model_dir` while they are needed, and are removed afterwards. No run begins
    once `options.seconds` are over. A group that fails is told in the file, and the others go on. Raises `UserError` for
    a processor, keys or data that cannot be used.
    """
    assert options.measure is not None
    if options.processor is None:
        raise UserError("--measure needs --processor, a local folder or Hub id with a tokenizer and an image processor")
    keys, began = recipe_values(options.recipe_keys, options), time.monotonic()
    groups = [group for group in groups if _wanted(options, group)]
    raise_all([*_problems(keys, {group.method for group in groups})])
    stored: dict[str, Any] = {
        "what": "runs on random weights, measured by scripts/check_plan.py --measure",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "keys_of_all": KEYS,
        "keys": keys,
        "steps": {"warmup": options.warmup, "counted": options.steps, "most": options.most_steps, "alike": ALIKE},
        **machine_facts(),
        "row_sizes": {},
        "failed": {},
        "points": [],
    }
    for number, group in enumerate(groups):
        model, method = group.model, group.method
        if time.monotonic() - began > options.seconds:
            break
        with _failures_told(stored, f"{model}, {method}", options.measure):
            folder = _made(model, options.model_dir, options.processor)
            prepared = _prepare(folder, method, options, keys)
            assert isinstance(prepared.data.train, Scan)
            stored["row_sizes"].setdefault(model, asdict(measured_sizes(prepared.data.train.lengths)))
            for setting in group.settings:
                name = f"{model}, {method}, {setting.about}"
                if time.monotonic() - began < options.seconds:
                    with _failures_told(stored, name, options.measure):
                        point = _measure(prepared, setting, options)
                        stored["points"].append({"about": setting.about, "model": model, "method": method, **point})
                        print(f"{time.monotonic() - began:4.0f} s  {name}: {_told(point)}", flush=True)
            del prepared
        _forget()
        if model not in {later.model for later in groups[number + 1 :]}:
            shutil.rmtree(options.model_dir / model.replace("/", "--"), ignore_errors=True)
    return torch.cuda.is_available()


def _problems(keys: Mapping[str, Any], methods: Collection[str]) -> Iterator[str]:
    """Yield the recipe keys that runs or methods set themselves: with other values, points would be told as others."""
    for key in keys:
        if key in OF_EACH_RUN:
            yield f"--{key}: each of the measured runs sets it; leave it out"
    yield from contradictions(keys, "methods", {method: METHODS[method] for method in sorted(methods)})


def _wanted(options: CheckPlanOptions, group: Group) -> bool:
    """Return whether a group is asked for. Its model is named in full, or by its name between owner and -Instruct."""
    names = {group.model, group.model.removeprefix("Qwen/").removesuffix("-Instruct")}
    return (not options.models or bool(names & set(options.models))) and (
        not options.methods or group.method in options.methods
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
    run, data = set_up(None, values)
    assert isinstance(data.train, Scan), "rows are looked up"
    data = with_train_rows(run, data, data.train)
    trainer = build_trainer(run, sft_config(run), data)
    trainer.remove_callback(MemoryProbe)  # what is checkpointed is stated here
    return Prepared(run, data, trainer, before)


def _measure(prepared: Prepared, setting: Setting, options: CheckPlanOptions) -> dict[str, Any]:
    """Train until steps have settled, and return what they took with the sizes of what they computed."""
    run, data, trainer, cuda = prepared.run, prepared.data, prepared.trainer, torch.cuda.is_available()
    plan = data.step_plan
    assert plan is not None, "rows are packed"
    plan = StepPlan(plan.sizes, plan.batch, setting.tokens_per_batch, plan.processes, plan.seed, setting.share_prefixes)
    layers = Checkpointed(trainer, setting.checkpointed)
    trainer.sampler.take(plan)
    trainer.data_collator = trainer.data_collator.sharing(setting.share_prefixes)
    trainer.args.max_steps = options.most_steps
    with _segments(setting.expandable), watched_fetching(trainer) as fetched:
        steps = Steps(fetched, _planned(run), layers.count, len(plan), options.warmup, options.steps)
        for callback in (layers, steps):
            trainer.add_callback(callback)
        trainer.train()
        for callback in (layers, steps):
            trainer.remove_callback(callback)
        trainer.end_workers()
        memory = _memory(prepared.others) if cuda else {}
    done, last = steps.done, counting(steps.done, options.warmup, options.steps)
    work = [sum(fetched.steps[number], BatchStats()) for number in last]
    seconds = statistics.fmean(done[number].seconds for number in last)
    rows = statistics.fmean(one.rows for one in work)
    return {
        "keys": _stored_keys(run, setting),
        "strategy": "single",
        "processes": 1,
        "checkpointed": layers.count,
        "attention": "PyTorch" if run.chosen.attention == SDPA else run.chosen.attention,
        "last_mlp_spared": True,
        # Of all steps: the one that needs most memory depends on what trains.
        "batches": [[batch.tokens, batch.target_tokens, batch.patches] for step in fetched.steps for batch in step],
        "rows": rows,
        "step": [statistics.fmean(getattr(one, name) for one in work) for name in WORK],
        "micro_batches": statistics.fmean(len(fetched.steps[number]) for number in last),
        "seconds": seconds,
        "settled": have_settled(done, options.warmup, options.steps),
        "counted": last,
        "waited": statistics.fmean(done[number].waited for number in last),
        "start": statistics.fmean(done[number].start for number in last),
        "each_step": [
            {name: round(value, 7) if isinstance(value, float) else value for name, value in asdict(step).items()}
            for step in done
        ],
        "rows_per_second": rows / seconds,
        **memory,
    }


def _planned(run: Run) -> RunPlan:
    """Return the plan of a run on this GPU; on one that is not known, and on a CPU, that on an H200."""
    card = card_of_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    shape = find_shape(str(run.recipe.model.model_name_or_path))
    flash = run.chosen.attention != SDPA
    return RunPlan(run.recipe, shape, ASSUMED, card or CARDS["h200"], Launch("single", 1), flash)


@contextlib.contextmanager
def _segments(expandable: bool) -> Iterator[None]:
    """Have PyTorch's allocator take memory in segments that grow, from no cached memory on."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.memory._set_allocator_settings(f"expandable_segments:{expandable}")
    torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")


def _memory(others: int) -> dict[str, float]:
    """Return the peaks of memory in use, without what others hold, and of memory that the allocator had."""
    gib = (torch.cuda.max_memory_allocated() - others) / 2**30
    return {"gib": gib, "reserved_gib": torch.cuda.max_memory_reserved() / 2**30}


def _stored_keys(run: Run, setting: Setting) -> dict[str, Any]:
    model = run.recipe.model
    names = ("load_in_4bit", "use_peft", "lora_r", "lora_target_modules", "lora_scope")
    keys = {name: getattr(model, name) for name in names}
    return {**keys, "tokens_per_batch": setting.tokens_per_batch, "share_prefixes": setting.share_prefixes}


def _told(point: Mapping[str, Any]) -> str:
    memory = f"{point['gib']:.2f} GiB ({point['reserved_gib']:.2f} reserved), " if "gib" in point else ""
    settled = f"settled after {len(point['each_step'])}" if point["settled"] else "not settled"
    return f"{memory}{point['seconds']:.3f} s a step and {point['waited']:.3f} waiting for data, {settled}"


def _forget() -> None:
    """Free what nothing refers to any more: a trainer and its model refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
