"""Tiny mixtures of experts through the scripts: router and auxiliary loss, load, resume, merge, full, on all strategies."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures.family_runs import FULL, trainer_of, write_recipe
from fixtures.models import chat_template, write_newer
from fixtures.packed_rows import losses_of
from fixtures.processes import launch, run_process
from qwen_vl_sft.merging.merge import merge
from qwen_vl_sft.merging.plan import MergeOptions, make_plan
from qwen_vl_sft.publishing.options import PushOptions, run_push

ROUTED = {"train_router": True, "router_aux_loss_coef": 0.01}
# QLoRA with experts in 4 bits, and an adapter on each.
QUANTIZED = {"load_in_4bit": True, "lora_scope": "experts", "lora_r": 4}
FP8 = {"load_in_fp8": "emulation", "lora_scope": "experts", "lora_r": 4}
LONG = pytest.mark.long


@pytest.fixture(scope="module", params=["Qwen3VLMoeConfig", pytest.param("Qwen3_5MoeConfig", marks=LONG)])
def model(request, tmp_path_factory):
    folder = write_newer(request.param, tmp_path_factory.mktemp("models") / request.param)
    if "VL" in request.param:
        weights = load_file(folder / "model.safetensors")
        # As in the files that Qwen publishes.
        turned = {name: tensor.mT.contiguous() for name, tensor in weights.items() if ".experts." in name}
        save_file(weights | turned, folder / "model.safetensors", metadata={"format": "pt"})
    if "3_5" in request.param:
        (folder / "chat_template.jinja").write_text(chat_template("qwen3_5_think"))
    return folder


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    return trainer_of(model, tmp_path_factory.mktemp("runs"))


def logged(run, name):
    entries = [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    return [entry[name] for entry in entries if name in entry]


def test_routers_train_when_asked_and_their_load_is_told(trained, model, tmp_path):
    run = trained(**ROUTED)
    assert len(logged(run, "aux_loss")) == len(losses_of(run)) == 4
    assert min(logged(run, "expert_load_max")) > 1
    assert json.loads((run / "metrics.json").read_text())["experts"]["expert_load_max"] > 1
    assert (run / "expert_load.png").stat().st_size > 5000
    saved = load_file(run / "adapter_model.safetensors")
    assert [name for name in saved if name.endswith("layers.0.mlp.gate.weight")]
    assert not [name for name in saved if ".experts." in name]
    report = merge(make_plan(MergeOptions(run=run, output_dir=tmp_path / "merged", dtype="float32", samples=2)))
    assert report["against_adapter"]["same_answers"] == 2
    assert (
        len(report["replaced"]) == json.loads((model / "config.json").read_text())["text_config"]["num_hidden_layers"]
    )
    base, merged = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "merged"))
    experts = [name for name in base if ".experts." in name]
    assert experts
    assert all(torch.equal(merged[name], base[name]) for name in experts)
    assert merged.keys() == base.keys()


@pytest.mark.parametrize(("keys", "flag"), [(QUANTIZED, "nf4_aware"), (FP8, "fp8_aware")], ids=["nf4", "fp8"])
def test_adapters_on_quantized_experts_are_merged(keys, flag, trained, model, tmp_path):
    """Into the 16-bit experts, and into those that training has quantized."""
    run = trained(**keys)
    layers = json.loads((model / "config.json").read_text())["text_config"]["num_hidden_layers"]
    saved = load_file(run / "adapter_model.safetensors")
    assert len([name for name in saved if ".mlp.experts." in name]) == 4 * layers
    config = json.loads((run / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    for aware in (False, True):
        output = tmp_path / f"merged-{aware}"
        options = MergeOptions(run=run, output_dir=output, dtype="float32", samples=2, **{flag: aware})
        report = merge(make_plan(options))
        assert report["against_adapter"]["same_answers"] == 2
        assert report["against_adapter"]["max"] < 1e-3
        base, merged = (load_file(folder / "model.safetensors") for folder in (model, output))
        assert {name: tensor.shape for name, tensor in merged.items()} == {
            name: tensor.shape for name, tensor in base.items()
        }
        assert all(not torch.equal(merged[name], base[name]) for name in base if ".experts.gate_up_proj" in name)


@pytest.mark.parametrize("keys", [{}, ROUTED, FULL, QUANTIZED, FP8], ids=str)
@LONG
def test_a_resumed_run_ends_as_the_whole_one(keys, model, trained, tmp_path):
    run = trained(**keys)
    recipe = write_recipe(tmp_path / "recipe.yaml", model, **keys)
    done = run_process(
        "scripts/sft.py", "--recipe", recipe, "--output_dir", tmp_path / "run",
        "--resume_from_checkpoint", run / "checkpoint-2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (name,) = (path.name for path in run.glob("*.safetensors"))
    whole, resumed = (load_file(folder / name) for folder in (run, tmp_path / "run"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@LONG
def test_its_card_is_written(trained):
    text = run_push(PushOptions(trained(**QUANTIZED), "alice/name", base_model="alice/base", dry_run=True))
    assert "base_model: alice/base\n" in text
    assert "model = PeftModel.from_pretrained(base, repo, revision=revision)" in text


@LONG
def test_a_second_stage_goes_on_from_adapters_on_experts(model, trained, tmp_path):
    run = trained(**QUANTIZED)
    recipe = write_recipe(tmp_path / "recipe.yaml", model, **{**QUANTIZED, "max_steps": 1, "learning_rate": 1e-9})
    done = run_process("scripts/sft.py", "--recipe", recipe, "--output_dir", tmp_path / "run", "--init_adapter", run)
    assert done.returncode == 0, done.stderr
    layers = json.loads((model / "config.json").read_text())["text_config"]["num_hidden_layers"]
    assert f"experts     each of the {6 * layers} has an adapter that trains" in done.stdout
    assert "experts     with an adapter each, in 4 bits; routers frozen" in done.stdout
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (run, tmp_path / "run"))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], rtol=0, atol=1e-6) for name in first)


@LONG
def test_a_full_model_is_saved_in_the_form_of_its_base(trained, model):
    base, found = load_file(model / "model.safetensors"), load_file(trained(**FULL) / "model.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in base.items()
    }
    changed = {name for name in base if not torch.equal(found[name], base[name])}
    assert [name for name in changed if ".experts." in name]
    assert not [name for name in changed if ".mlp.gate." in name]


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        ("cpu", ROUTED),
        ("zero2", ROUTED),
        ("zero3", ROUTED),
        ("fsdp2", ROUTED),
        ("cpu", QUANTIZED),
        ("zero2", QUANTIZED),
        ("zero3", QUANTIZED),
        ("fsdp2", QUANTIZED),
        ("cpu", FP8),
        ("fsdp2", FP8),
        ("zero3", {"lora_scope": "experts", "lora_r": 4}),
        ("fsdp2", {"lora_scope": "experts", "lora_r": 4}),
        ("zero3", FULL),
        ("fsdp2", {**FULL, **ROUTED}),
    ],
    ids=str,
)
@LONG
def test_two_processes_give_the_losses_of_one(config, keys, model, trained, tmp_path):
    keys = {**keys, "predict_with_generate": False}
    losses = losses_of(trained(**keys))
    recipe = write_recipe(tmp_path / "recipe.yaml", model, **keys)
    done = launch(config, "scripts/sft.py", "--recipe", recipe, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    # Sums in another order round a value the other way now and then, an eighth of it in FP8; once weights differ by that,
    # a token goes to another expert. The first two steps come before.
    exact = 2 if "load_in_fp8" in keys else len(losses)
    found = losses_of(tmp_path / "run")
    assert found[:exact] == pytest.approx(losses[:exact], abs=2e-5)
    assert found[exact:] == pytest.approx(losses[exact:], abs=1e-2)
    balanced = logged(trained(**keys), "aux_loss")
    assert logged(tmp_path / "run", "aux_loss") == pytest.approx(balanced, abs=2e-5)


@pytest.mark.parametrize("config", ["zero3", "fsdp2"])
@LONG
def test_two_processes_resume_adapters_on_experts_and_routers_to_the_bit(config, model, tmp_path):
    keys = {"lora_scope": "experts", "lora_r": 4, **ROUTED, "predict_with_generate": False, "eval_strategy": "no"}
    recipe = write_recipe(tmp_path / "recipe.yaml", model, **keys)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for output, more in ((whole, []), (resumed, ["--resume_from_checkpoint", whole / "checkpoint-2"])):
        done = launch(config, "scripts/sft.py", "--recipe", recipe, "--output_dir", output, *more)
        assert done.returncode == 0, done.stderr
    wanted, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert logged(resumed, "aux_loss") == logged(whole, "aux_loss")
