"""Rules on numbers and on keys that hold keys: each problem is told before anything is read."""

import inspect
import re

import pytest
from transformers import trainer_optimizer
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from fixtures.row_lengths import sizes_of
from qwen_vl_sft.batching.global_batch import GlobalBatch
from qwen_vl_sft.batching.packing import StepPlan, StepSampler
from qwen_vl_sft.batching.sampler import step_loader
from qwen_vl_sft.checkpointing.resume_rules import _resume
from qwen_vl_sft.config.batch_rules import BATCH_RULES
from qwen_vl_sft.config.model_rules import IDLE_RULES, MODEL_RULES
from qwen_vl_sft.config.range_rules import RANGE_RULES
from qwen_vl_sft.config.reading import key_hints, read_recipe
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.modeling.base_model import build_on_meta
from qwen_vl_sft.modeling.model_rules import DEVICE_RULES, problems_of_structure
from qwen_vl_sft.training.rules import _evaluation
from qwen_vl_sft.training.scheduler_and_optimizer_rules import OPTIM_ARGS, SCHEDULER_AND_OPTIMIZER_RULES


def problems(rules, processes=1, strategy="ddp", **keys):
    context = DistributedContext("single" if processes == 1 else strategy, processes, 0, 0, True)
    return [problem for rule in rules for problem in rule(read_recipe(None, keys), context)]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"dataloader_num_workers": -1}, "dataloader_num_workers: -1 must be at least 0"),
        ({"dataloader_prefetch_factor": 0}, "dataloader_prefetch_factor: 0 must be at least 1"),
        ({"save_total_limit": 0}, "save_total_limit: 0 must be at least 1"),
        ({"weight_decay": -0.1}, "weight_decay: -0.1 must be at least 0"),
        ({"adam_beta2": 1}, "adam_beta2: 1.0 must be at least 0 and below 1"),
        ({"lora_dropout": 1}, "lora_dropout: 1.0 must be at least 0 and below 1"),
        ({"save_steps": 0}, "save_steps: 0 must be above 0; save_strategy: no is for never"),
        ({"logging_steps": -1}, "logging_steps: -1 must be above 0; logging_strategy: no is for never"),
        (
            {"max_steps": 0},
            "max_steps: 0 would train nothing; leave it out, or write -1, to train for num_train_epochs",
        ),
        ({"seed": -1}, "seed: -1 must be at least 0 and at most 4294967295"),
        ({"data_seed": 2**32}, "data_seed: 4294967296 must be at least 0 and at most 4294967295"),
    ],
)
def test_numbers_out_of_range(keys, told):
    assert problems(RANGE_RULES, **keys) == [told]


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"save_steps": 0, "save_strategy": "no"},
        {"eval_steps": 0},
        {"max_steps": -1},
        {"dataloader_num_workers": 2, "save_total_limit": 1, "seed": 0},
    ],
)
def test_numbers_in_range(keys):
    assert problems(RANGE_RULES, **keys) == []


@pytest.mark.parametrize(
    ("optim", "module"),
    [
        ("adamw_8bit", "bitsandbytes"),
        ("paged_lion_8bit", "bitsandbytes"),
        ("rmsprop_bnb", "bitsandbytes"),
        ("adamw_torch_8bit", "torchao"),
        ("galore_adamw", "galore_torch"),
        ("lomo", "lomo_optim"),
        ("schedule_free_adamw", "schedulefree"),
        ("stable_adamw", "optimi"),
        ("adamw_torch", None),
        ("adamw_torch_fused", None),
        ("adafactor", None),
        ("sgd", None),
    ],
)
def test_an_optimizer_whose_package_is_missing_is_refused(optim, module, monkeypatch):
    asked = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: asked.append(name))
    found = problems(SCHEDULER_AND_OPTIMIZER_RULES, optim=optim)
    assert asked == ([module] if module else [])
    assert [f"optim: {optim} needs" in problem for problem in found] == [True] * len(asked)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, None),
        ({"bf16": False}, "with dtype: bfloat16 needs bf16: true or fp16: true"),
        ({"bf16": False, "dtype": "float32"}, None),
        ({"strategy": "zero2"}, None),
        ({"strategy": "zero3"}, "in half precision does not run under zero3"),
        ({"strategy": "zero3", "dtype": "float32"}, "in half precision does not run under zero3"),
        ({"strategy": "zero3", "load_in_4bit": True}, None),
        ({"strategy": "zero3", "bf16": False, "dtype": "float32"}, None),
        (
            {"lora_modules_to_save": ["blocks"]},
            "blocks is a list of layers (model.visual.blocks), .* holds it (visual)",
        ),
        ({"lora_modules_to_save": ["blocks.1"]}, None),
    ],
    ids=str,
)
def test_layers_that_train_in_full_beside_an_adapter(keys, told):
    keys = {"model_name_or_path": "builtin:tiny-qwen2-vl", "lora_modules_to_save": ["norm"], **keys}
    settings = read_recipe(None, {name: value for name, value in keys.items() if name != "strategy"}).model
    rules = (*MODEL_RULES, *IDLE_RULES, *DEVICE_RULES)
    found = problems(rules, processes=2, **keys) + list(problems_of_structure(build_on_meta(settings), settings))
    assert len(found) == (told is not None)
    assert told is None or re.search(re.escape(told).replace(r"\.\*", ".*"), found[0])


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"gradient_checkpointing_kwargs": {"use_reentrnat": False}},
            "gradient_checkpointing_kwargs: unknown key use_reentrnat; did you mean use_reentrant?",
        ),
        (
            {"gradient_checkpointing_kwargs": {"use_reentrant": "false"}},
            "gradient_checkpointing_kwargs: use_reentrant: 'false' is not true or false",
        ),
        (
            {"gradient_checkpointing_kwargs": {"every_n_layers": 0}},
            "gradient_checkpointing_kwargs: every_n_layers: 0 must be at least 1",
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"nmu_cycles": 2}},
            "lr_scheduler_kwargs of lr_scheduler_type cosine: unknown key nmu_cycles; did you mean num_cycles?",
        ),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"num_cycles": 2}},
            "lr_scheduler_kwargs of lr_scheduler_type constant: unknown key num_cycles; it reads none",
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "many"}},
            "lr_scheduler_type cosine cannot be made with lr_scheduler_kwargs {'num_cycles': 'many'}: ",
        ),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type warmup_stable_decay cannot be made with"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type cosine_with_min_lr cannot be made with"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patince": 2}},
            "lr_scheduler_kwargs of lr_scheduler_type reduce_lr_on_plateau: unknown key patince; did you mean patience?",
        ),
        ({"optim_args": "beta9=3"}, "optim_args of optim adamw_torch_fused: unknown key beta9; it reads none"),
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, "optim_args of optim sgd: unknown key momentun; did you mean"),
        ({"optim": "sgd", "optim_args": "momentum=much"}, "optim_args: momentum: 'much' is not a number"),
        ({"optim": "sgd", "optim_args": "momentum"}, "optim_args: 'momentum' is not written name=value, name=value"),
        ({"optim": "rmsprop_bnb", "optim_args": "alpha=1"}, "optim_args of optim rmsprop_bnb: unknown key alpha"),
    ],
)
def test_mistakes_inside_keys(keys, told):
    found = problems(SCHEDULER_AND_OPTIMIZER_RULES, **keys)
    assert len(found) == 1
    assert found[0].startswith(told)


def test_every_key_that_holds_keys_has_a_rule_or_is_refused():
    holds_keys = {name for name, hint in key_hints().items() if "dict" in str(hint)}
    assert holds_keys == {"gradient_checkpointing_kwargs", "lr_scheduler_kwargs"}


@pytest.mark.parametrize(
    "keys",
    [
        {"gradient_checkpointing_kwargs": {"use_reentrant": False, "every_n_layers": 2, "offload": True}},
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 10}, "max_steps": 20},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 2}},
        {"lr_scheduler_type": "greedy", "lr_scheduler_kwargs": {"patience": 2}},
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
        {"optim": "paged_ademamix_8bit", "optim_args": "beta3=0.999"},
    ],
)
def test_keys_inside_keys_that_are_read(keys):
    assert problems(SCHEDULER_AND_OPTIMIZER_RULES, **keys) == []


def test_every_schedule_can_be_made_on_trial():
    from transformers.trainer_utils import SchedulerType

    needs = {"warmup_stable_decay": {"num_decay_steps": 5}}
    needs |= {kind: {"min_lr": 1e-7} for kind in ("cosine_with_min_lr", "cosine_warmup_with_min_lr")}
    for kind in SchedulerType:
        keys = {"lr_scheduler_type": kind.value, "lr_scheduler_kwargs": needs.get(kind.value)}
        assert problems(SCHEDULER_AND_OPTIMIZER_RULES, **keys) == []


def test_the_arguments_of_optimizers_are_those_that_transformers_reads():
    for optimizer in OptimizerNames:
        handler = trainer_optimizer._OPTIMIZER_HANDLERS.get(optimizer)
        if handler is None or handler is trainer_optimizer._get_bitsandbytes_optimizer:
            continue  # one function for several, read by the eye
        source = inspect.getsource(handler)
        read = set(re.findall(r"optim_args\.(?:get|pop)\(\s*\"(\w+)\"", source))
        read |= set(re.findall(r"\"(\w+)\" in ctx\.optim_args", source))
        for names in re.findall(r"for key in \(([^)]*)\)", source):
            read |= set(re.findall(r"\"(\w+)\"", names))
        beginning = max((known for known in OPTIM_ARGS if optimizer.value.startswith(known)), key=len, default="")
        assert set(OPTIM_ARGS.get(beginning, ())) == read, optimizer


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha with packing: transformers would scale the noise"),
        ({"include_num_input_tokens_seen": True}, "include_num_input_tokens_seen counts only padded batches"),
        ({"include_num_input_tokens_seen": "non_padding"}, "include_num_input_tokens_seen counts only padded batches"),
        (
            {"global_batch_size": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
            "global_batch_size 8 contradicts per_device_train_batch_size 2 x 2 process(es) x gradient_accumulation_steps 8",
        ),
        (
            {"global_batch_tokens": 800, "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps has no effect with global_batch_tokens; remove one of the two",
        ),
        (
            {"dataloader_multiprocessing_context": "threads"},
            "dataloader_multiprocessing_context: 'threads' is unknown; ",
        ),
        (
            {"dataloader_multiprocessing_context": "fork"},
            "dataloader_multiprocessing_context is set but dataloader_num",
        ),
    ],
)
def test_keys_that_packing_would_ignore_or_change(keys, told):
    found = problems(BATCH_RULES, packing=True, processes=2, **keys)
    assert len(found) == 1
    assert found[0].startswith(told)


@pytest.mark.parametrize(
    "keys",
    [
        {"neftune_noise_alpha": 0, "include_num_input_tokens_seen": "no"},
        {"global_batch_size": 6, "per_device_train_batch_size": 4},
        {"global_batch_size": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
        {"dataloader_multiprocessing_context": "spawn", "dataloader_num_workers": 1},
    ],
)
def test_keys_that_packing_takes(keys):
    assert problems(BATCH_RULES, packing=True, processes=2, **keys) == []


def test_padded_batches_take_what_packing_does_not():
    keys = {"neftune_noise_alpha": 5, "include_num_input_tokens_seen": "all"}
    assert problems(BATCH_RULES, **keys) == []
    found = problems(BATCH_RULES, include_num_input_tokens_seen="some")
    assert found == ["include_num_input_tokens_seen: 'some' is unknown; one of all, non_padding, no"]


def test_the_loader_of_packed_steps_starts_its_workers_as_asked():
    def context(**keys):
        args = SFTConfig(use_cpu=True, bf16=False, report_to="none", dataloader_multiprocessing_context="spawn", **keys)
        plan = StepPlan(sizes_of([1]), GlobalBatch(1), 1, 1, seed=0)
        return step_loader(StepSampler(plan, 0), list, args).multiprocessing_context

    assert context(dataloader_num_workers=1).get_start_method() == "spawn"
    assert context() is None


@pytest.mark.parametrize(
    ("save", "every", "told"),
    [
        (0.5, 0.1, None),
        (0.3, 0.1, None),
        (6, 3, None),
        (0.5, 0.2, "save_steps 0.5 to be a multiple of eval_steps 0.2"),
        (7, 3, "save_steps 7.0 to be a multiple of eval_steps 3.0"),
        (100, 0.1, "write both as shares, or both as steps"),
    ],
)
def test_the_best_model_needs_saves_where_it_is_evaluated(save, every, told):
    keys = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": save, "eval_steps": every}
    found = problems((_evaluation,), dataset_test_split="test", load_best_model_at_end=True, **keys)
    assert len(found) == (told is not None)
    assert told is None or told in found[0]


@pytest.mark.parametrize(
    ("resume", "saved", "told"),
    [
        (None, True, None),
        ("latest", False, None),
        ("latest", True, "dataset_streaming cannot resume from checkpoint-4: "),
        ("runs/other/checkpoint-2", False, "dataset_streaming cannot resume from runs/other/checkpoint-2: "),
    ],
)
def test_a_stream_begins_where_there_is_no_checkpoint_yet(resume, saved, told, tmp_path):
    """slurm/sft.sbatch always says latest."""
    (tmp_path / "checkpoint-6").mkdir()  # not written to its end
    if saved:
        (tmp_path / "checkpoint-4").mkdir()
        (tmp_path / "checkpoint-4/complete.json").touch()
    keys = {"dataset_streaming": True, "max_steps": 4, "resume_from_checkpoint": resume, "output_dir": str(tmp_path)}
    found = problems((_resume,), **keys)
    assert [text[: len(told or "")] for text in found] == ([told] if told else [])
