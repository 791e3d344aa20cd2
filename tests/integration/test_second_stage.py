"""A run that starts from the adapter of an earlier one."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures.evaluation import write_charts, write_run
from fixtures.publishing import set_offline, start_hub, take_hub
from qwen_vl_sft.config.reading import read_recipe
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.modeling.base_identity import identity_of_base
from qwen_vl_sft.training.prepared_data import prepare_data
from qwen_vl_sft.training.resolve import resolve
from qwen_vl_sft.training.second_stage import problems_of_init_adapter, with_init_adapter
from qwen_vl_sft.training.trainer_setup import build_trainer, sft_config

SINGLE = DistributedContext("single", 1, 0, 0, on_cpu=True)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The run folder of a first stage: LoRA of rank 4 on q_proj and v_proj, with its base and data beside it."""
    root = tmp_path_factory.mktemp("stages")
    lora = {"lora_r": 4, "lora_alpha": 64, "lora_target_modules": ["q_proj", "v_proj"]}
    run = write_run(root, write_charts(root / "charts"), **lora)
    base = identity_of_base(read_recipe(run / "recipe.yaml", {}).model)
    (run / "environment.json").write_text(json.dumps({"base": base}))
    return run


def asked(first, tmp_path, **keys):
    stated = {
        "dataset_name": str(first.parent / "charts"),
        "dataset_format": "chartqa",
        "dtype": "float32",
        "bf16": False,
        "use_cpu": True,
        "max_train_samples": 2,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "save_strategy": "no",
        "learning_rate": 0.01,
        "output_dir": str(tmp_path / "second"),
        **keys,
    }
    return read_recipe(None, stated)


def test_a_second_stage_starts_from_the_adapter_and_trains_it_further(first, tmp_path):
    run = resolve(asked(first, tmp_path, model_name_or_path=str(first)), SINGLE)
    model = run.recipe.model
    assert (model.model_name_or_path, model.init_adapter) == (str(first.parent / "model"), str(first))
    assert (model.lora_r, model.lora_alpha, model.lora_target_modules) == (4, 64, ["q_proj", "v_proj"])
    trainer = build_trainer(run, sft_config(run), prepare_data(run))
    saved = load_file(first / WEIGHTS)

    def now():
        weights = {name.replace(".default", ""): value for name, value in trainer.model.state_dict().items()}
        return {name: weights[name].clone() for name in saved}

    start = now()
    for name, tensor in saved.items():
        assert torch.equal(start[name], tensor), name
    trainer.train()
    after = now()
    assert all(not torch.equal(after[name], saved[name]) for name in saved)


def test_it_starts_from_the_adapter_of_another_trainer(first, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    saved = load_file(first / WEIGHTS)
    renamed = {name.replace("model.language_model.layers", "model.layers"): value for name, value in saved.items()}
    assert not set(saved) & set(renamed)
    save_file(renamed, theirs / WEIGHTS)
    config = json.loads((first / "adapter_config.json").read_text())
    targets = r"^(model(?=\.).*\.(q_proj|v_proj))$"
    config |= {"target_modules": targets, "base_model_name_or_path": str(first.parent / "model")}
    (theirs / "adapter_config.json").write_text(json.dumps(config))
    run = resolve(asked(first, tmp_path, init_adapter=str(theirs)), SINGLE)
    assert (
        run.structure.lora_targets
        == resolve(asked(first, tmp_path, init_adapter=str(first)), SINGLE).structure.lora_targets
    )
    trainer = build_trainer(run, sft_config(run), prepare_data(run))
    now = {name.replace(".default", ""): value for name, value in trainer.model.state_dict().items()}
    assert all(torch.equal(now[name], tensor) for name, tensor in saved.items())


def test_the_ways_to_name_it_mean_the_same(first, tmp_path):
    peft = tmp_path / "peft"  # of another program: without a recipe
    peft.mkdir()
    for name in (WEIGHTS, "adapter_config.json"):
        shutil.copy(first / name, peft)
    checkpoint = tmp_path / "run/checkpoint-3"
    shutil.copytree(peft, checkpoint)
    shutil.copy(first / "recipe.yaml", checkpoint.parent)
    base = str(first.parent / "model")
    for keys in (
        {"init_adapter": str(first)},
        {"init_adapter": str(first), "model_name_or_path": base},
        {"init_adapter": str(first), "lora_r": 4, "lora_dropout": 0.5},
        {"init_adapter": str(checkpoint)},
        {"model_name_or_path": str(checkpoint)},
        {"init_adapter": str(peft), "model_name_or_path": base},
    ):
        structure = resolve(asked(first, tmp_path, **keys), SINGLE).structure
        assert {name.rsplit(".", 1)[-1] for name in structure.lora_targets} == {"q_proj", "v_proj"}
    config = json.loads((peft / "adapter_config.json").read_text())
    (peft / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    run = resolve(asked(first, tmp_path, init_adapter=str(peft)), SINGLE)
    assert run.recipe.model.model_name_or_path == base
    assert run.structure.lora_targets == structure.lora_targets


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    yield from start_hub(tmp_path_factory.mktemp("store"))


def test_an_adapter_on_the_hub_is_started_from_at_one_commit(first, hub, tmp_path, monkeypatch):
    take_hub(hub, tmp_path / "cache", monkeypatch)
    config = json.loads((first / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(first.parent / "model")
    files = {"adapter_config.json": json.dumps(config), WEIGHTS: (first / WEIGHTS).read_bytes()}
    hub.put_files("alice/adapter", files)
    commit = json.loads(hub.get("/api/models/alice/adapter"))["sha"]
    run = resolve(asked(first, tmp_path, init_adapter="alice/adapter"), SINGLE)
    model = run.recipe.model
    assert (model.model_name_or_path, model.init_adapter) == (str(first.parent / "model"), f"alice/adapter@{commit}")
    assert (model.lora_r, model.lora_alpha) == (4, 64)
    hub.put_files("alice/adapter", {"adapter_config.json": "{}"})
    (tmp_path / "recipe.yaml").write_text(run.recipe.to_yaml())
    set_offline(True, monkeypatch)
    again = resolve(read_recipe(tmp_path / "recipe.yaml", {}), SINGLE)
    trainer = build_trainer(again, sft_config(again), prepare_data(again))
    saved = load_file(first / WEIGHTS)
    trained = {name: value for name, value in trainer.model.named_parameters() if "lora_B" in name}
    assert trained
    for name, value in trained.items():
        assert torch.equal(value.detach(), saved[name.replace(".default", "")])
    set_offline(False, monkeypatch)
    hub.put_files("bob/private", files, private=True)
    for name, told in {
        "alice/adapter": "holds no adapter_model.safetensors",
        "alice/adapter@v9": "has no such branch, tag or commit on the Hub; check what stands after @",
        "bob/private": "neither a folder here, nor visible on the Hub; check the name, and log in",
        "no name/at all": "is not a folder here; name a run folder",
    }.items():
        with pytest.raises(UserError, match=told):
            resolve(asked(first, tmp_path, init_adapter=name), SINGLE)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"init_adapter": "RUN", "lora_r": 8}, r"lora_r: 8, and the adapter in .* has 4; leave lora_r out, or merge"),
        ({"init_adapter": "RUN", "use_dora": True}, "use_dora: True, and the adapter"),
        ({"init_adapter": "RUN", "lora_target_modules": ["q_proj"]}, r"differ in their layers: .*v_proj; leave"),
        (
            {"init_adapter": "RUN", "lora_target_modules": ["q_proj", "v_proj", "o_proj"]},
            r"recipe puts LoRA on .*o_proj",
        ),
        ({"init_adapter": "RUN", "use_peft": False}, "full training needs a whole model; merge the adapter"),
        ({"init_adapter": "BASE"}, "holds a whole model and no adapter; name it in model_name_or_path"),
        ({"init_adapter": "RUN/nowhere"}, "is not a folder here"),
        ({"init_adapter": "RUN", "model_name_or_path": "RUN"}, "both name an adapter"),
        ({"init_adapter": "RUN", "model_name_or_path": "OTHER"}, r"was trained on .* is another model"),
        ({"model_name_or_path": "STOPPED"}, r"finish its run with --resume_from_checkpoint latest, or .*checkpoint-7"),
        ({"init_adapter": "EMPTY"}, r"holds no adapter_model.safetensors with its adapter_config.json"),
    ],
)
def test_what_cannot_be_started_from_is_told(first, tmp_path, keys, told):
    other, stopped, empty = (tmp_path / name for name in ("other", "stopped", "empty"))
    if "OTHER" in keys.values():
        shutil.copytree(first.parent / "model", other)
        weights = {name: value + 0.01 for name, value in load_file(other / "model.safetensors").items()}
        save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    stopped.mkdir()
    shutil.copy(first / "recipe.yaml", stopped)
    shutil.copytree(first, stopped / "checkpoint-7", ignore=shutil.ignore_patterns("recipe.yaml"))
    empty.mkdir()
    places = {"RUN": first, "BASE": first.parent / "model", "OTHER": other, "STOPPED": stopped, "EMPTY": empty}
    keys = {
        name: str(places[value.partition("/")[0]]) + value[len(value.partition("/")[0]) :]
        if isinstance(value, str)
        else value
        for name, value in keys.items()
    }
    with pytest.raises(UserError, match=told):
        resolve(asked(first, tmp_path, **keys), SINGLE)


def test_layers_that_train_in_full_are_not_loaded_once_they_are_split(first, tmp_path):
    recipe = asked(first, tmp_path, init_adapter=str(first))
    saving = replace(recipe, model=replace(recipe.model, lora_modules_to_save=["norm"]))
    for strategy, told in (("zero3", 1), ("fsdp2", 0)):
        assert len([*problems_of_init_adapter(saving, replace(SINGLE, strategy=strategy))]) == told
        assert [*problems_of_init_adapter(recipe, replace(SINGLE, strategy=strategy))] == []


def test_a_recipe_without_an_adapter_is_left_as_it_is(first, tmp_path):
    recipe = asked(first, tmp_path, model_name_or_path=str(first.parent / "model"))
    assert with_init_adapter(recipe) is recipe
