"""Tiny Qwen2.5-VL and Qwen3-VL through the scripts: packed, shared, resumed, on all strategies."""

import pytest
import torch
from safetensors.torch import load_file

from fixtures.family_runs import trainer_of, write_recipe
from fixtures.models import write_newer
from fixtures.packed_rows import losses_of
from fixtures.processes import launch, run_process
from qwen_vl_sft.publishing.options import PushOptions, run_push

pytestmark = pytest.mark.long
QUANTIZED = {"load_in_4bit": True}


@pytest.fixture(scope="module", params=["Qwen2_5_VLConfig", "Qwen3VLConfig"])
def model(request, tmp_path_factory):
    return write_newer(request.param, tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    return trainer_of(model, tmp_path_factory.mktemp("runs"))


def test_a_resumed_run_ends_as_the_whole_one(trained, model, tmp_path):
    run = trained(predict_with_generate=False)
    recipe = write_recipe(tmp_path / "recipe.yaml", model, predict_with_generate=False)
    done = run_process(
        "scripts/sft.py", "--recipe", recipe, "--output_dir", tmp_path / "run",
        "--resume_from_checkpoint", run / "checkpoint-2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    whole, resumed = (load_file(folder / "adapter_model.safetensors") for folder in (run, tmp_path / "run"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_its_card_is_written(trained):
    run = trained(predict_with_generate=False)
    text = run_push(PushOptions(run, "alice/name", base_model="alice/base", dry_run=True))
    assert "base_model: alice/base\n" in text
    assert "model = PeftModel.from_pretrained(base, repo, revision=revision)" in text


@pytest.mark.parametrize(
    ("config", "keys"),
    [("cpu", {}), ("zero2", {}), ("zero3", {}), ("fsdp2", {}), ("fsdp2", QUANTIZED), ("zero3", QUANTIZED)],
    ids=str,
)
def test_two_processes_give_the_losses_of_one(config, keys, model, trained, tmp_path):
    keys = {**keys, "predict_with_generate": False}
    losses = losses_of(trained(**keys))
    recipe = write_recipe(tmp_path / "recipe.yaml", model, **keys)
    done = launch(config, "scripts/sft.py", "--recipe", recipe, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "run") == pytest.approx(losses, abs=2e-5)
