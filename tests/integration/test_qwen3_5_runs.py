"""A tiny Qwen3.5 through the scripts: packed, shared, resumed, merged, described on its card, on all strategies."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file

from fixtures.family_runs import FULL, trainer_of, write_recipe
from fixtures.models import chat_template
from fixtures.packed_rows import losses_of
from fixtures.processes import launch, run_process
from qwen_vl_sft.inference.source import read_source
from qwen_vl_sft.merging.merge import merge
from qwen_vl_sft.merging.plan import MergeOptions, make_plan
from qwen_vl_sft.publishing.card_code import python_code
from qwen_vl_sft.publishing.card_serving import serving_lines
from qwen_vl_sft.publishing.published_model import read_published_model


@pytest.fixture
def recipe(hybrid_model, tmp_path):
    """Write a recipe of the quickstart with this model, and with other keys."""
    return functools.partial(write_recipe, tmp_path / "recipe.yaml", hybrid_model)


@pytest.fixture(scope="module")
def trained(hybrid_model, tmp_path_factory):
    """A finished run in one process, with other keys once each."""
    return trainer_of(hybrid_model, tmp_path_factory.mktemp("runs"))


def test_a_resumed_run_ends_as_the_whole_one(trained, tmp_path):
    run = trained()
    assert len(losses_of(run)) == 4
    done = run_process(
        "scripts/sft.py", "--recipe", run / "recipe.yaml", "--output_dir", tmp_path / "run",
        "--resume_from_checkpoint", run / "checkpoint-2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    whole, resumed = (load_file(folder / "adapter_model.safetensors") for folder in (run, tmp_path / "run"))
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in whole} >= {"in_proj_qkv", "in_proj_a", "out_proj"}
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_plan_tells_that_linear_attention_is_slow(recipe, tmp_path):
    done = run_process(
        "scripts/sft.py", "--recipe", recipe(fused_kernels="auto"), "--output_dir", tmp_path / "run", "--dry_run"
    )
    assert done.returncode == 0, done.stderr
    assert "slow        linear attention, in PyTorch's own operations: exact, slow on a GPU\n" in done.stdout
    assert "<think>\n\n" in done.stdout
    # A path may be longer than a line.
    shown = done.stdout.split("\nmodel ")[1].replace(str(tmp_path), "")
    assert max(map(len, shown.splitlines())) <= 80
    assert not (tmp_path / "run").exists()


def test_a_merge_keeps_what_transformers_does_not_load(trained, hybrid_model, tmp_path):
    report = merge(make_plan(MergeOptions(run=trained(), output_dir=tmp_path / "merged", dtype="float32", samples=2)))
    assert report["against_adapter"]["same_answers"] == 2
    base, merged = (load_file(folder / "model.safetensors") for folder in (hybrid_model, tmp_path / "merged"))
    assert merged.keys() == base.keys()
    kept = [name for name in base if name.startswith("mtp.")]
    assert len(kept) == 2
    assert all(torch.equal(merged[name], base[name]) for name in kept)
    assert "preserve_thinking" in (tmp_path / "merged/chat_template.jinja").read_text()


def test_the_card_gives_the_chat_template_what_training_gave(trained):
    published = read_published_model(trained(), base_model="some/model")
    assert published.template_options == {"enable_thinking": False, "preserve_thinking": True}
    assert "    enable_thinking=False,\n    preserve_thinking=True,\n)" in python_code(published, "me/tiny", "main")
    assert '"chat_template_kwargs": {"enable_thinking": false, "preserve_thinking": true}' in "\n".join(
        serving_lines(published, "me/tiny")
    )
    assert read_source(trained(), {}, tuned_needed=True).recipe.data.enable_thinking is False
    assert (trained() / "chat_template.jinja").read_text() != chat_template("qwen3_5_think")


def test_a_full_model_keeps_what_transformers_does_not_load(trained, hybrid_model):
    run = trained(**FULL)
    index = json.loads((run / "model.safetensors.index.json").read_text())["weight_map"]
    base = load_file(hybrid_model / "model.safetensors")
    assert index.keys() == base.keys()
    saved = json.loads((run / "checkpoint-2/model.safetensors.index.json").read_text())["weight_map"]
    assert saved.keys() == index.keys()
    found = {name: load_file(run / file)[name] for name, file in index.items()}
    changed = {name for name in base if not torch.equal(found[name], base[name])}
    assert not [name for name in changed if name.startswith("mtp.")]
    assert {name.rsplit(".", 2)[-2] for name in changed if "linear_attn" in name} >= {"conv1d", "in_proj_a", "norm"}
    assert {name.rsplit(".", 1)[-1] for name in changed if "linear_attn" in name} == {"weight", "A_log", "dt_bias"}


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        pytest.param("cpu", {}, marks=pytest.mark.long),
        pytest.param("zero2", {}, marks=pytest.mark.long),
        pytest.param("zero3", {}, marks=pytest.mark.long),
        pytest.param("fsdp2", {}, marks=pytest.mark.long),
        pytest.param("fsdp2", {"load_in_4bit": True}, marks=pytest.mark.long),
        pytest.param("zero3", FULL, marks=pytest.mark.long),
        pytest.param("fsdp2", FULL, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_two_processes_give_the_losses_of_one(config, keys, recipe, trained, tmp_path):
    keys = {**keys, "predict_with_generate": False}
    losses = losses_of(trained(**keys))
    # One process computes layer and adapter apart.
    keys["fused_kernels"] = ["lora"] if keys.get("use_peft", True) else None
    done = launch(config, "scripts/sft.py", "--recipe", recipe(**keys), "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "run") == pytest.approx(losses, abs=2e-5)
