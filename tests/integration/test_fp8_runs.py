"""A base in emulated FP8 through the scripts: loaded, trained, resumed, evaluated, merged, on several processes."""

import functools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures.family_runs import trainer_of, write_recipe
from fixtures.packed_rows import losses_of
from fixtures.processes import launch, run_process
from qwen_vl_sft import tiny
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.merging.base import read_base
from qwen_vl_sft.merging.check import format_report
from qwen_vl_sft.merging.merge import merge, prepare
from qwen_vl_sft.merging.plan import MergeOptions, make_plan
from qwen_vl_sft.modeling.base_model import build_on_meta, count_parameters, load_model
from qwen_vl_sft.modeling.fp8 import plain
from qwen_vl_sft.modeling.fp8.blocks import FP8BlockLinear
from qwen_vl_sft.modeling.fp8.fused import use_fp8_kernels
from qwen_vl_sft.modeling.fp8.linear import FP8Linear
from qwen_vl_sft.modeling.fp8.projections import join_projections
from qwen_vl_sft.modeling.fp8.weights import dequantize, quantize_rows
from qwen_vl_sft.modeling.kernels import use_fused_kernels

FP8 = {"load_in_fp8": "emulation"}
FUSED = {"fused_kernels": "auto"}
GRADIENTS = {"fp8_gradients": "emulation", **FUSED}


def loaded(**keys):
    settings = ModelSettings(model_name_or_path=str(tiny.MODEL_DIR), dtype="float32", **keys)
    return load_model(settings, on_cpu=True)


def fp8_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FP8Linear)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run in one process, with other keys once each."""
    return trainer_of(tiny.MODEL_DIR, tmp_path_factory.mktemp("runs"))


def test_the_language_models_layers_hold_their_weights_in_8_bits():
    plain_model, model = loaded(), loaded(**FP8)
    layers, weights = fp8_layers(model), plain_model.state_dict()
    assert len(layers) == 7 * len(model.model.language_model.layers)
    assert all("language_model" in name for name in layers)
    for name, layer in layers.items():
        values, scales = quantize_rows(weights[f"{name}.weight"])
        assert torch.equal(layer.values.view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(layer.scales, scales)
        if layer.bias is not None:
            assert torch.equal(layer.bias, weights[f"{name}.bias"])
    counts = [{part: count.total for part, count in count_parameters(one).items()} for one in (plain_model, model)]
    assert counts[0] == counts[1]
    held = [sum(layer.weight.nbytes + layer.weight_scale.nbytes for layer in layers.values())]
    held.append(sum(weights[f"{name}.weight"].nbytes for name in layers))
    assert held[0] < 0.27 * held[1]


def test_other_modules_are_in_fp8_where_they_are_named():
    model = loaded(**FP8, fp8_modules=["visual.blocks"])
    names = fp8_layers(model)
    assert sum("visual.blocks" in name for name in names) == 4 * len(model.model.visual.blocks)
    assert not any("merger" in name for name in names)


def test_fused_layers_compute_what_the_model_does_and_stay():
    torch.manual_seed(0)
    model = loaded(**FP8).requires_grad_(False)
    tokens = torch.randint(5, 200, (1, 40))

    def outcome():
        inputs = model.get_input_embeddings()(tokens).detach().requires_grad_()
        logits = model(inputs_embeds=inputs).logits
        logits.square().sum().backward()
        return logits.detach(), inputs.grad

    expected = outcome()
    layers = len(model.model.language_model.layers)
    assert use_fp8_kernels(model, ["rms_norm", "mlp"], plain) == {"rms_norm": 2 * layers, "mlp": layers}
    assert join_projections(model, plain) == layers
    # liger's kernels, of which none runs on a CPU, leave all but the last norm alone.
    assert use_fused_kernels(model, ["rms_norm", "swiglu"]) == {"rms_norm": 1, "swiglu": 0}
    del model.model.language_model.norm.forward
    # Sums in another order round a few values the other way, and layers of one input share the scales of gradients; in four
    # layers that comes to less than what rounding costs.
    for found, wanted in zip(outcome(), expected, strict=True):
        assert (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.long
def test_a_base_in_16_bits_may_have_gradients_by_fp8_products(trained):
    keys = {"predict_with_generate": False}
    plain_losses, losses = losses_of(trained(**keys, **FUSED)), losses_of(trained(**keys, **GRADIENTS))
    # The forward pass is the same: losses part when the adapter does, which all quantized layers have.
    assert losses[0] == plain_losses[0]
    assert losses[1:] != plain_losses[1:]
    assert losses == pytest.approx(plain_losses, rel=0.01)


def test_a_resumed_run_ends_as_the_whole_one(trained, tmp_path):
    run = trained(**FP8)
    assert len(losses_of(run)) == 4
    done = run_process(
        "scripts/sft.py", "--recipe", run / "recipe.yaml", "--output_dir", tmp_path / "run",
        "--resume_from_checkpoint", run / "checkpoint-2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "precision   FP8 (e4m3) weights, forward and backward products in FP8, emulated in float32" in done.stdout
    whole, resumed = (load_file(folder / "adapter_model.safetensors") for folder in (run, tmp_path / "run"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_does_not_resume_with_other_products(trained, tmp_path):
    run = trained(**FP8)
    done = run_process(
        "scripts/sft.py", "--recipe", run / "recipe.yaml", "--output_dir", tmp_path / "run",
        "--resume_from_checkpoint", run / "checkpoint-2", "--fp8_backward", "false",
    )  # fmt: skip
    assert done.returncode == 2
    assert "fp8_backward" in done.stderr


def test_a_merge_that_knows_of_fp8_has_the_weights_of_training(trained, tmp_path):
    run = trained(**FP8)
    report = merge(make_plan(MergeOptions(run=run, output_dir=tmp_path / "merged", dtype="bfloat16", fp8_aware=True)))
    layers = fp8_layers(loaded(**FP8))
    saved = load_file(run / "adapter_model.safetensors")
    adapted = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in saved}
    settings = ModelSettings(model_name_or_path=str(tmp_path / "merged"), dtype="bfloat16")
    merged = load_model(settings, on_cpu=True).state_dict()
    kept = layers.keys() - adapted
    for name in kept:
        # Exact in bfloat16, as scales are powers of two.
        assert torch.equal(merged[f"{name}.weight"].float(), layers[name].dequantized()), name
    assert report["against_adapter"]["mean"] < 0.03 * report["against_adapter"]["rms"]
    # In training the layers round their inputs, too.
    assert (
        report["against_adapter"]["mean"] < report["against_training"]["mean"] < 0.1 * report["against_adapter"]["rms"]
    )
    plain_report = merge(make_plan(MergeOptions(run=run, output_dir=tmp_path / "plain", dtype="float32")))
    assert plain_report["against_adapter"]["max"] < 1e-3
    assert plain_report["against_training"]["mean"] > report["against_adapter"]["mean"]
    assert "against the FP8 base + adapter, without rounded inputs" in format_report(report)


def write_official(folder):
    """Write the embedded model as Qwen publishes FP8 models: blocks of 128 x 128, scales in bfloat16."""
    shutil.copytree(tiny.MODEL_DIR, folder)
    tensors, weights = load_file(folder / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or not name.startswith("model.layers."):
            weights[name] = tensor
            continue
        rows, columns = tensor.shape
        scales = torch.empty(-(-rows // 128), -(-columns // 128), dtype=torch.bfloat16)
        values = torch.empty_like(tensor, dtype=torch.float8_e4m3fn)
        for i, j in ((i, j) for i in range(scales.shape[0]) for j in range(scales.shape[1])):
            place = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
            scales[i, j] = tensor[place].abs().max().float() / 440
            values[place] = (tensor[place].float() / scales[i, j].float()).to(values.dtype)
        weights[name], weights[f"{name}_scale_inv"] = values, scales
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.visual"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder, weights


def test_an_official_checkpoint_is_taken_as_it_is_and_trained(tmp_path):
    folder, weights = write_official(tmp_path / "official")
    settings = ModelSettings(model_name_or_path=str(folder), dtype="float32")
    with pytest.raises(UserError, match="holds FP8 weights; set load_in_fp8: true to train on them as they are"):
        load_model(settings, on_cpu=True)
    model = load_model(replace(settings, **FP8), on_cpu=True)
    layers = fp8_layers(model)
    assert {type(layer) for layer in layers.values()} == {FP8BlockLinear}
    assert len(layers) == sum(name.endswith("_scale_inv") for name in weights)
    for name, layer in layers.items():
        key = name.replace("model.language_model.", "model.")
        assert torch.equal(layer.values.view(torch.uint8), weights[f"{key}.weight"].view(torch.uint8))
        assert torch.equal(layer.scales, weights[f"{key}.weight_scale_inv"].float())
    exact = loaded()
    tokens = torch.randint(5, 200, (1, 40))
    with torch.no_grad():
        found, wanted = model(input_ids=tokens).logits, exact(input_ids=tokens).logits
    assert (found - wanted).norm() < 0.06 * wanted.norm()
    keys = {**FP8, "predict_with_generate": False, "max_steps": 2, "eval_strategy": "no"}
    keys["lora_target_modules"] = ["q_proj", "up_proj"]
    recipe = write_recipe(tmp_path / "recipe.yaml", folder, **keys)
    done = run_process("scripts/sft.py", "--recipe", recipe, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of_rows(tmp_path, keys), rel=0.05)
    merges_of_an_official_checkpoint(tmp_path, folder, weights)


def merges_of_an_official_checkpoint(tmp_path, folder, weights):
    """Merge a run on FP8 weights of a checkpoint into them, into a copy of them, and into the 16-bit model."""

    def merged(output, **changes):
        return merge(
            make_plan(MergeOptions(tmp_path / "run", tmp_path / output, dtype="bfloat16", samples=2, **changes))
        )

    with pytest.raises(
        UserError, match=r"holds FP8 weights, not the 16-bit ones .* add --fp8_aware to merge into these"
    ):
        merged("refused")
    report = merged("aware", fp8_aware=True)
    assert report["against_adapter"]["mean"] < 0.03 * report["against_adapter"]["rms"]
    config = json.loads((tmp_path / "aware/config.json").read_text())
    assert "quantization_config" not in config
    tensors = load_file(tmp_path / "aware/model.safetensors")
    assert tensors.keys() == {key for key in weights if not key.endswith("_scale_inv")}
    adapted = {name.split(".lora_")[0] for name in load_file(tmp_path / "run/adapter_model.safetensors")}
    adapted = {name.replace("base_model.model.model.language_model.", "model.") for name in adapted}
    kept = [key for key in tensors if f"{key}_scale_inv" in weights and key.removesuffix(".weight") not in adapted]
    assert kept
    for key in kept:
        wanted = dequantize(weights[key], weights[f"{key}_scale_inv"].float())
        assert torch.equal(tensors[key], wanted.bfloat16()), key
    # In another place it is the same model.
    moved = shutil.copytree(folder, tmp_path / "moved")
    again = merged("again", fp8_aware=True, base=str(moved))
    assert again["against_adapter"] == report["against_adapter"]
    with pytest.raises(UserError, match=r"was trained on the FP8 weights of .* leave --fp8_aware out"):
        merged("other", fp8_aware=True, base=str(tiny.MODEL_DIR))
    original = merged("original", base=str(tiny.MODEL_DIR))
    assert original["against_training"]["mean"] > original["against_adapter"]["mean"]
    assert not (tmp_path / "refused").exists()
    assert not (tmp_path / "other").exists()


def test_fp8_weights_of_a_checkpoint_are_not_those_that_training_made(trained, tmp_path):
    folder, _ = write_official(tmp_path / "official")
    options = MergeOptions(trained(**FP8), tmp_path / "merged", base=str(folder), fp8_aware=True)
    with pytest.raises(UserError, match="does not tell that it was trained on the FP8 weights of"):
        prepare(make_plan(options))
    with pytest.raises(UserError, match="holds FP8 weights, not the 16-bit ones they were made from; add --fp8_aware"):
        prepare(make_plan(replace(options, fp8_aware=False)))


def test_scales_of_an_official_checkpoint_may_be_in_another_file(tmp_path):
    folder, weights = write_official(tmp_path / "official")
    settings = ModelSettings(model_name_or_path=str(folder), **FP8)
    model = build_on_meta(settings)
    expected = {weight.key: weight.read() for weight in read_base(folder, model)}
    (folder / "model.safetensors").unlink()
    scales = {key: tensor for key, tensor in weights.items() if key.endswith("_scale_inv")}
    files = {"a.safetensors": scales, "b.safetensors": {key: weights[key] for key in weights.keys() - scales.keys()}}
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {"weight_map": {key: name for name, tensors in files.items() for key in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = {weight.key: weight.read() for weight in read_base(folder, model)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    lost = next(iter(scales))
    save_file({key: scales[key] for key in scales.keys() - {lost}}, folder / "a.safetensors", metadata={"format": "pt"})
    del index["weight_map"][lost]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"is FP8 without its scales {lost}"):
        read_base(folder, model)


def losses_of_rows(tmp_path, keys):
    """Losses of the same run on the embedded model."""
    recipe = write_recipe(tmp_path / "plain.yaml", tiny.MODEL_DIR, **keys)
    done = run_process("scripts/sft.py", "--recipe", recipe, "--output_dir", tmp_path / "plain")
    assert done.returncode == 0, done.stderr
    return losses_of(tmp_path / "plain")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"quant_method": "awq"}, r"quantized already \(awq\); name the 16-bit model"),
        ({"weight_block_size": None}, "in another form than blocks of 128 x 128"),
        ({"weight_block_size": [64, 64]}, "in another form"),
        ({"activation_scheme": "static"}, "in another form"),
        ({"scale_fmt": "ue8m0"}, "in another form"),
    ],
    ids=str,
)
def test_other_forms_of_quantized_checkpoints_are_refused(changes, told, tmp_path):
    folder = shutil.copytree(tiny.MODEL_DIR, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=told):
        load_model(ModelSettings(model_name_or_path=str(folder), dtype="float32", **FP8), on_cpu=True)


# One process takes two micro-batches a step, and of two processes each takes one of them: sums in another order round values
# of the next layer the other way.
TWO_MICRO_BATCHES = {"tokens_per_batch": 500, "predict_with_generate": False}


@pytest.mark.long
@pytest.mark.parametrize(
    ("config", "own", "bf16", "apart"),
    [
        ("cpu", FP8, False, 1e-4),
        ("zero2", FP8, False, 1e-4),
        ("fsdp2", FP8, False, 1e-4),
        # All that is not quantized is rounded to bfloat16 before it computes, of which one process rounds products alone.
        ("fsdp2", FP8, True, 0.02),
        ("zero3", GRADIENTS, False, 1e-4),
        ("fsdp2", GRADIENTS, False, 1e-4),
    ],
)
def test_two_processes_give_the_losses_of_one(config, own, bf16, apart, trained, tmp_path):
    """FSDP2 gathers the bytes bit by bit, which every run checks when it begins."""
    keys = {**own, **TWO_MICRO_BATCHES, "bf16": bf16}
    recipe = functools.partial(write_recipe, tmp_path / "recipe.yaml", tiny.MODEL_DIR)
    done = launch(config, "scripts/sft.py", "--recipe", recipe(**keys), "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(trained(**keys)), rel=apart)


@pytest.mark.long
@pytest.mark.parametrize("official", [False, True], ids=["rows", "blocks"])
def test_a_run_that_fsdp2_splits_resumes_and_is_merged(official, tmp_path):
    base = write_official(tmp_path / "official")[0] if official else tiny.MODEL_DIR
    keys = {**FP8, **TWO_MICRO_BATCHES, "bf16": False}
    (tmp_path / "one").mkdir()
    one = losses_of(trainer_of(base, tmp_path / "one")(**keys))
    # Scales of blocks are no powers of two, so sums in another order round a value of the next layer the other way.
    apart = 5e-3 if official else 1e-4
    recipe = write_recipe(tmp_path / "recipe.yaml", base, **keys)
    for output, more in (("whole", ()), ("resumed", ("--resume_from_checkpoint", tmp_path / "whole/checkpoint-2"))):
        run = tmp_path / output
        done = launch("fsdp2", "scripts/sft.py", "--recipe", recipe, "--output_dir", run, *more)
        assert done.returncode == 0, done.stderr
        assert losses_of(run) == pytest.approx(one, rel=apart)
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    report = merge(make_plan(MergeOptions(tmp_path / "resumed", tmp_path / "merged", dtype="bfloat16", fp8_aware=True)))
    assert report["against_adapter"]["mean"] < 0.03 * report["against_adapter"]["rms"]
