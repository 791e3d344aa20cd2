import copy
import json
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from fixtures.models import FAMILIES, newer, qwen2_vl
from fixtures.trainers import make_trainer
from qwen_vl_sft import tiny
from qwen_vl_sft.batching.collator import pad
from qwen_vl_sft.checkpointing.resumed_state import explained_groups
from qwen_vl_sft.compat.vision_tower import run_frozen_vision_without_gradients
from qwen_vl_sft.config.reading import build
from qwen_vl_sft.data.dataset import Rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import BadRow, UserError
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.modeling.base_model import freeze_vision_tower, trained_parts
from qwen_vl_sft.modeling.chosen import Chosen
from qwen_vl_sft.modeling.lora import lora_config
from qwen_vl_sft.training import throughput
from qwen_vl_sft.training.callbacks import format_log
from qwen_vl_sft.training.model_setup import finish_model
from qwen_vl_sft.training.trainer import VisionSFTTrainer

SINGLE = DistributedContext(strategy="single", processes=1, rank=0, local_rank=0, on_cpu=True)


def token_mean(model, rows, processor):
    """The loss by its definition: one row at a time, all learned tokens weighing the same."""
    encoder, total, count = Encoder(processor), 0.0, 0
    for index in range(len(rows)):
        batch = pad([rows.encode({"row": index}, encoder)], encoder.pad_token_id)
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = model(**batch).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100))
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize("model", FAMILIES)
def test_the_loss_is_the_token_mean_of_the_global_batch_on_every_model(model, ragged, tiny_processor, tmp_path):
    start = qwen2_vl() if model == "qwen2_vl" else newer(model)
    wanted = token_mean(start, ragged, tiny_processor)
    weights, losses = [], []
    for batch, accumulation in ((6, 1), (2, 3), (1, 6)):
        trained = copy.deepcopy(start)
        batches = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(trained, ragged, tiny_processor, tmp_path, **batches)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        weights.append(torch.cat([parameter.detach().flatten() for parameter in trained.parameters()]))
    assert losses[0][0] == pytest.approx(wanted, abs=1e-4)
    for other in (1, 2):
        assert losses[other] == pytest.approx(losses[0], abs=1e-4)
        torch.testing.assert_close(weights[other], weights[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_decay_shrinks_matrices_alone(family, ragged, tiny_processor, tmp_path):
    model = qwen2_vl() if family == "qwen2_vl" else newer(family)
    trainer = make_trainer(model, ragged, tiny_processor, tmp_path, weight_decay=0.1)
    shrunk = {
        id(parameter)
        for group in trainer.create_optimizer().param_groups
        for parameter in group["params"]
        if group["weight_decay"]
    }
    decays = {name: id(parameter) in shrunk for name, parameter in model.named_parameters()}
    assert {decays[name] for name in decays if "norm" in name or "ln_q" in name} == {False}
    assert {decays[name] for name in decays if name.endswith(("bias", "A_log"))} == {False}
    assert decays == {name: parameter.dim() > 1 for name, parameter in model.named_parameters()}


def test_split_weights_are_shrunk_by_their_whole_shape(ragged, tiny_processor, tmp_path):
    """Under ZeRO-3 a parameter holds nothing until it is gathered."""
    trainer = make_trainer(qwen2_vl(), ragged, tiny_processor, tmp_path, weight_decay=0.1)
    wanted = trainer.get_decay_parameter_names(trainer.model)
    for parameter in trainer.model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.zeros(0)
    assert wanted
    assert trainer.get_decay_parameter_names(trainer.model) == wanted


def test_without_weight_decay_the_groups_are_those_of_older_checkpoints(ragged, tiny_processor, tmp_path):
    trainer = make_trainer(newer("Qwen3_5Config"), ragged, tiny_processor, tmp_path)
    assert "model.language_model.layers.0.linear_attn.A_log" in trainer.get_decay_parameter_names(trainer.model)


@pytest.mark.parametrize("batch", [1, 4, 5])
def test_the_evaluation_loss_is_the_token_mean_of_all_rows(batch, ragged, tiny_processor, tmp_path):
    model = qwen2_vl()
    trainer = make_trainer(model, ragged, tiny_processor, tmp_path, per_device_eval_batch_size=batch)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(token_mean(model, ragged, tiny_processor), abs=1e-5)
    assert 0 <= metrics["eval_mean_token_accuracy"] <= 1
    assert trainer.state.log_history[-1]["eval_loss"] == metrics["eval_loss"]
    # Six rows, and none of those that fill up a batch.
    assert round(metrics["eval_samples_per_second"] * metrics["eval_runtime"], 1) == pytest.approx(6, rel=0.02)


def test_an_incomplete_last_step_weighs_its_own_tokens(ragged, tiny_processor, tmp_path):
    """Four rows in a global batch of six: two empty places change nothing."""
    start = qwen2_vl()
    few = ragged.select([0, 1, 2, 3])
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 1}
    trainer = make_trainer(copy.deepcopy(start), few, tiny_processor, tmp_path, train_rows=4, **batches)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx([token_mean(start, few, tiny_processor)], abs=1e-4)
    assert trainer.throughput.total.rows == 4


def test_a_frozen_vision_tower_builds_no_graph_and_changes_no_gradient(ragged, tiny_processor):
    encoder, gradients = Encoder(tiny_processor), []
    batch = pad([ragged.encode({"row": 0}, encoder)], encoder.pad_token_id)
    for freeze in (False, True):
        model = qwen2_vl()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(family_of(model.config).part_of(name) == "language")
        model.enable_input_require_grads()
        if freeze:
            run_frozen_vision_without_gradients(model)
        features = torch.cat(model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output)
        assert not (freeze and features.requires_grad)
        model(**batch).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keys", [{"lora_scope": "merger"}, {"use_peft": False, "freeze_vision_tower": True}], ids=str)
def test_a_tower_of_which_the_merger_trains_is_not_run_backwards(family, keys, ragged, tiny_processor):
    """Also with checkpointing, which makes its input require gradients; those of the merger are the same."""
    recipe = build(
        {"model_name_or_path": str(tiny.MODEL_DIR), "dataset_name": str(tiny.DATA_DIR), "lora_r": 4, "bf16": False}
        | {"dtype": "float32", "fused_kernels": None, **keys}
    )
    encoder, gradients, start = Encoder(tiny_processor), [], qwen2_vl() if family == "qwen2_vl" else newer(family)
    batch = pad([ragged.encode({"row": 0}, encoder)], encoder.pad_token_id)
    for finish in (False, True):
        model = copy.deepcopy(start)
        if recipe.model.use_peft:
            torch.manual_seed(0)
            model = get_peft_model(model, lora_config(model, recipe.model))
        else:
            freeze_vision_tower(model)
        model.enable_input_require_grads()
        base = model.get_base_model() if recipe.model.use_peft else model
        base.activation_checkpointing_enable()
        if finish:
            accelerator = SimpleNamespace(state=SimpleNamespace())
            run = SimpleNamespace(recipe=recipe, context=SINGLE, chosen=Chosen("sdpa", []))
            finish_model(model, accelerator, run)
            assert "vision" not in trained_parts(model)
        graphs = []
        for block in base.model.visual.blocks:
            block.register_forward_hook(lambda block, given, output, graphs=graphs: graphs.append(output.requires_grad))
        model.train()(**batch).loss.backward()
        # transformers does not make the input of Qwen3-VL's tower require gradients.
        assert graphs == [not finish and "Qwen3" not in family] * len(base.model.visual.blocks)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert {family_of(model.config).part_of(name) for name in found} >= {"merger"}
        gradients.append(found)
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, rtol=0, atol=1e-6)


def test_speed_is_logged_and_counted(ragged, tiny_processor, tmp_path):
    trainer = make_trainer(qwen2_vl(), ragged, tiny_processor, tmp_path, per_device_train_batch_size=6)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["tokens_per_second"] > 0
    assert 0 <= entry["data_wait"] <= 1
    assert trainer.throughput.total.rows == 12
    assert trainer.throughput.total.images == 12


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_evaluations_and_checkpoints_are_no_time_of_training(strategy, ragged, tiny_processor, tmp_path, monkeypatch):
    """Also an evaluation that a resume makes up for; only the clock of the steps is to go on."""
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    keys = {"eval_strategy": strategy, "save_strategy": strategy, "eval_steps": 1, "save_steps": 1}
    keys |= {"per_device_train_batch_size": 3, "max_steps": 4, "logging_steps": 10}
    trainer = make_trainer(qwen2_vl(), ragged, tiny_processor, tmp_path, **keys)

    def slow(name, seconds):
        original = getattr(trainer, name)

        def slowly(*args, **kwargs):
            now[0] += seconds
            return original(*args, **kwargs)

        monkeypatch.setattr(trainer, name, slowly)

    slow("evaluate", 100.0)
    slow("_save_optimizer_and_scheduler", 100.0)
    slow("compute_loss", 1.0)
    trainer.train()
    trainer.throughput.measure(trainer.accelerator)
    assert trainer.throughput.total_seconds == 4
    trainer.evaluations.postpone()
    trainer.throughput.restore(throughput.ThroughputMeter(trainer.args.device).totals(trainer.accelerator))
    trainer.train(resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{2 if strategy == 'epoch' else 3}"))
    trainer.throughput.measure(trainer.accelerator)
    assert trainer.throughput.total_seconds == (2 if strategy == "epoch" else 1)


def test_a_checkpoint_counts_the_rows_left_out_until_then(ragged, tiny_processor, tmp_path, monkeypatch):
    """Not those of batches that the workers have made ahead."""
    keys = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, "per_device_train_batch_size": 1}
    trainer = make_trainer(qwen2_vl(), ragged, tiny_processor, tmp_path, **keys, dataloader_num_workers=1)
    encode = Rows.encode

    def fails(rows, item, *args):
        if item["row"] in (1, 3, 5):
            raise BadRow("unreadable")
        return encode(rows, item, *args)

    monkeypatch.setattr(Rows, "encode", fails)
    trainer.data_collator.skip_bad_rows = True
    trainer.train()
    found = [json.loads((tmp_path / f"run/checkpoint-{step}/complete.json").read_text()) for step in range(1, 7)]
    work = [mark["so_far"]["meter"]["work"] for mark in found]
    assert [one["rows"] + one["skipped"] for one in work] == [1, 2, 3, 4, 5, 6]
    assert work[-1]["skipped"] == 3


def test_log_lines_fit_80_columns():
    logs = {"loss": 11.9123, "learning_rate": 2e-4, "tokens_per_second": 123456.7, "images_per_second": 345.6}
    line = format_log(12345, 12345, {**logs, "data_wait": 0.123, "mfu": 0.512})
    assert len(line) <= 80
    assert line.startswith("12345/12345  loss 11.91  lr 2.0e-04  123,457 tok/s  346 img/s")


def test_full_weights_resume_from_the_checkpoint_and_not_from_the_base(ragged, tiny_processor, tmp_path):
    """transformers#43701: the Trainer finds none of a checkpoint's names and goes on with the base weights."""
    start = qwen2_vl()
    arguments = {
        "save_strategy": "steps",
        "save_steps": 1,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "max_steps": 3,
    }
    whole = make_trainer(copy.deepcopy(start), ragged, tiny_processor, tmp_path, **arguments)
    whole.train()
    resumed = make_trainer(copy.deepcopy(start), ragged, tiny_processor, tmp_path / "again", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    for (name, wanted), found in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(wanted, found), name


def test_an_optimizer_of_an_earlier_versions_groups_is_told(ragged, tiny_processor, tmp_path, monkeypatch):
    arguments = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "weight_decay": 0.1, "max_steps": 2}
    start = newer("Qwen2_5_VLConfig")
    with monkeypatch.context() as earlier:
        earlier.delattr(VisionSFTTrainer, "get_decay_parameter_names")
        make_trainer(copy.deepcopy(start), ragged, tiny_processor, tmp_path, **arguments).train()
    resumed = make_trainer(start, ragged, tiny_processor, tmp_path / "again", **arguments)
    with pytest.raises(UserError, match="checkpoint-1 shrinks other parameters by weight_decay"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))


def test_groups_that_fsdp2_leaves_without_settings_are_told():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    matrix, vectors = model[0].weight, [model[0].bias, model[1].bias]

    def grouped(shrunk, others):
        return torch.optim.AdamW([{"params": shrunk, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])

    earlier, now = grouped([matrix, model[1].weight], vectors), grouped([matrix], [*vectors, model[1].weight])
    with pytest.raises(UserError, match="checkpoint-1 shrinks other parameters"), explained_groups("checkpoint-1", now):
        set_optimizer_state_dict(model, now, get_optimizer_state_dict(model, earlier))
    with explained_groups("checkpoint-2", earlier):
        set_optimizer_state_dict(model, earlier, get_optimizer_state_dict(model, earlier))


@pytest.mark.parametrize("save_steps", [1, 2])
def test_the_best_full_weights_are_loaded_at_the_end(save_steps, ragged, tiny_processor, tmp_path):
    """A learning rate that ruins the model: the first evaluation is the best, also where no checkpoint was due."""
    arguments = {
        "save_strategy": "steps",
        "save_steps": save_steps,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 2,
    }
    arguments |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 5.0}
    trainer = make_trainer(qwen2_vl(), ragged, tiny_processor, tmp_path, **arguments)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-5)
