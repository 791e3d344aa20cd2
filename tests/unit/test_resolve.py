"""A run that is resolved: worked out once, frozen, and refused with everything that stands against it."""

from dataclasses import FrozenInstanceError, fields, is_dataclass

import pytest

from fixtures.repository import REPOSITORY
from qwen_vl_sft.batching.global_batch import GlobalBatch
from qwen_vl_sft.config.reading import read_recipe
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.training.plan_warnings import warnings
from qwen_vl_sft.training.resolve import resolve
from qwen_vl_sft.training.rules import problems_of
from qwen_vl_sft.training.trainer_setup import sft_config


def resolved(tmp_path, processes=1, **keys):
    ours = {"model_name_or_path": "builtin:tiny-qwen2-vl", "dataset_name": "builtin:tiny-charts", "report_to": "none"}
    recipe = read_recipe(None, {**ours, "output_dir": str(tmp_path / "run"), **keys})
    return recipe, resolve(
        recipe, DistributedContext("single" if processes == 1 else "ddp", processes, 0, 0, on_cpu=True)
    )


def test_gradient_accumulation_follows_from_the_global_batch_and_the_recipe_stays_as_it_is(tmp_path):
    recipe, run = resolved(tmp_path, processes=2, global_batch_size=16, per_device_train_batch_size=2)
    assert run.global_batch == GlobalBatch(rows=16)
    assert run.recipe.get("gradient_accumulation_steps") == 4
    assert "gradient_accumulation_steps: 4" in run.recipe.to_yaml()
    assert "gradient_accumulation_steps" not in recipe.training
    assert "gradient_accumulation_steps" not in run.recipe.stated


@pytest.mark.parametrize(
    ("keys", "batch"),
    [
        ({"packing": True, "global_batch_tokens": 9000}, GlobalBatch(tokens=9000)),
        ({"packing": True, "global_batch_size": 6}, GlobalBatch(rows=6)),
        ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, GlobalBatch(rows=6)),
    ],
)
def test_what_packing_plans_by_itself_sets_no_accumulation(keys, batch, tmp_path):
    recipe, run = resolved(tmp_path, **keys)
    assert run.global_batch == batch
    assert run.recipe == recipe


def test_nothing_of_a_run_can_be_changed(tmp_path):
    _, run = resolved(tmp_path)
    for part in (run, run.recipe, run.recipe.data, run.recipe.model, run.recipe.run, run.chosen, run.structure):
        assert is_dataclass(part)
        name = fields(part)[0].name
        with pytest.raises(FrozenInstanceError):
            setattr(part, name, getattr(part, name))
    with pytest.raises(TypeError, match="does not support item assignment"):
        run.recipe.training["seed"] = 1


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_is_set_up_on_a_cpu_with_no_key_changed_but_the_model(path, tmp_path):
    recipe = read_recipe(path, {"model_name_or_path": "builtin:tiny-qwen2-vl", "output_dir": str(tmp_path / "run")})
    run = resolve(recipe, DistributedContext("single", 1, 0, 0, on_cpu=True))
    args = sft_config(run)
    assert args.use_cpu
    assert not args.tf32
    assert_read_again(run, tmp_path)


def assert_read_again(run, tmp_path):
    """The file that a run writes of its recipe is one that sft.py takes, without another warning."""
    (tmp_path / "recipe.yaml").write_text(run.recipe.to_yaml())
    again = read_recipe(tmp_path / "recipe.yaml", {})
    assert problems_of(again, run.context) == []
    assert warnings(again, []) == warnings(run.recipe, [])
    assert again.values() == run.recipe.values()


FULL = {"use_peft": False, "load_in_4bit": False, "init_adapter": None}


@pytest.mark.parametrize(
    "keys",
    [
        FULL,
        FULL | {"freeze_vision_tower": True},
        FULL | {"packing": True, "global_batch_tokens": 9000},
        {"use_peft": True, "packing": True, "share_prefixes": True},
        {"use_peft": True, "eval_strategy": "steps", "eval_steps": 5, "dataset_test_split": "val"},
        {"use_peft": True, "predict_with_generate": True, "eval_strategy": "epoch", "dataset_test_split": "val"},
        {"use_peft": True, "dataset_streaming": True, "max_steps": 3, "save_strategy": "no"},
    ],
    ids=str,
)
def test_the_recipe_that_a_run_writes_is_one_to_start_from(keys, tmp_path):
    _, run = resolved(tmp_path, **keys)
    assert_read_again(run, tmp_path)


@pytest.mark.parametrize("scope", ["language", "all"])
def test_all_linear_is_every_linear_layer_of_the_scope(scope, tmp_path):
    _, run = resolved(tmp_path, lora_target_modules="all-linear", lora_scope=scope)
    _, default = resolved(tmp_path, lora_scope=scope)
    assert run.structure == default.structure


def test_the_structure_tells_what_trains(tmp_path):
    _, run = resolved(tmp_path, lora_target_modules=["q_proj"], lora_modules_to_save=["norm"])
    assert all(name.endswith("q_proj") for name in run.structure.lora_targets)
    assert run.structure.adapts_language_only
    assert run.structure.in_full
    assert run.structure.trained_parts == {"language"}
    _, run = resolved(tmp_path, use_peft=False, freeze_vision_tower=True)
    assert run.structure.lora_targets == run.structure.in_full == ()
    assert run.structure.trained_parts == {"language", "merger"}
    assert run.structure.parameters["vision"].trainable == 0


def test_problems_of_recipe_attention_and_layers_are_told_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        resolved(tmp_path, seed=-1, attn_implementation="flash_attention_2", lora_modules_to_save=["nrom"])
    told = "\n".join(error.value.problems)
    assert len(error.value.problems) == 3
    for words in ("seed: -1 must be", "flash_attention_2", "nrom matches no layer of the model; did you mean norm"):
        assert words in told


def test_a_model_that_cannot_be_had_is_told_when_the_recipe_is_fine(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="cannot be loaded"):
        resolved(tmp_path, model_name_or_path=str(tmp_path / "model"))
    with pytest.raises(UserError) as error:
        resolved(tmp_path, model_name_or_path=str(tmp_path / "model"), seed=-1)
    assert error.value.problems == ("seed: -1 must be at least 0 and at most 4294967295",)
